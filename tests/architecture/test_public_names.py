import ast
import importlib
import inspect
from pathlib import Path

import pytest

import nanogpt_surgery

SOURCE = Path(nanogpt_surgery.__file__)

PROMISED = """
    SimpleGPT GPTConfig TransformerEncoderLayer KVCache Tokenizer CharacterTokenizer GPTDataset
    LoRALinear inject_lora merge_lora remove_lora enable_lora disable_lora save_adapter load_adapter
    fit generate open_model save_model SurgeryError
""".split()


def names_for_type_checkers():
    """Name → module, from the imports under `if TYPE_CHECKING`."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    return {alias.name: node.module for node in block.body for alias in node.names}


def names_to_load():
    """Name → module, from the table by which names are loaded when first used."""
    return {name: f"nanogpt_surgery.{home}" for name, home in nanogpt_surgery._HOME.items()}


def test_the_three_lists_of_public_names_agree():
    assert names_for_type_checkers() == names_to_load()
    assert set(nanogpt_surgery.__all__) == set(names_to_load())
    assert len(set(nanogpt_surgery.__all__)) == len(nanogpt_surgery.__all__)


@pytest.mark.parametrize("name", nanogpt_surgery.__all__)
def test_a_public_name_resolves_and_is_documented(name):
    value = getattr(nanogpt_surgery, name)
    home = importlib.import_module(names_to_load()[name])
    assert value is getattr(home, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)


def test_what_was_promised_is_there():
    assert set(PROMISED) <= set(nanogpt_surgery.__all__)


def test_dir_lists_the_public_names():
    assert set(dir(nanogpt_surgery)) == set(nanogpt_surgery.__all__)


def test_any_other_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"nanogpt_surgery.*SimpelGPT"):
        nanogpt_surgery.SimpelGPT  # noqa: B018
