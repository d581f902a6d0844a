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
    """Name → module, from the list as a type checker reads it."""
    tree = ast.parse(SOURCE.with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    homes = [(node.module.removeprefix("nanogpt_surgery."), node.names) for node in imports]
    return {alias.asname: home for home, names in homes for alias in names}


def test_what_is_loaded_is_what_type_checkers_see():
    assert names_for_type_checkers() == nanogpt_surgery._HOME
    assert set(nanogpt_surgery.__all__) == set(names_for_type_checkers())
    assert len(nanogpt_surgery.__all__) > 60


@pytest.mark.parametrize("name", nanogpt_surgery.__all__)
def test_a_public_name_resolves_and_is_documented(name):
    value = getattr(nanogpt_surgery, name)
    home = importlib.import_module(f"nanogpt_surgery.{nanogpt_surgery._HOME[name]}")
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
