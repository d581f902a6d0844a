"""Ids that a folder's files give: of the model's vocabulary, or said, or none."""

import json
import shutil
import warnings

import pytest
from helpers.commands import called
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import GPTConfig, open_model, save_model
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import stop_ids
from nanogpt_surgery.files.atomic import MANIFEST

SIZE = 300


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder as others write it, with as many rows as tokens and no end of text."""
    folder = tmp_path_factory.mktemp("ids") / "m"
    config = GPTConfig(**FAMILY_CONFIGS["llama"].to_dict() | {"vocab_size": SIZE, "block_size": 32})
    save_model(tiny_model(config), folder, PretrainedTokenizer(byte_level(SIZE)))
    for name in (MANIFEST, "generation_config.json"):
        (folder / name).unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder.parent / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return folder


@pytest.fixture
def folder(sound, tmp_path, monkeypatch):
    """A copy of it to spoil, beside a text."""
    shutil.copytree(sound.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "m"


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("eos", "ends", "said"),
    [
        (-1, set(), None),
        ([2, -1], {2}, None),
        ([0, 2], {0, 2}, None),
        (99999, set(), "99999"),
        (SIZE, set(), str(SIZE)),
        ("2", set(), "2"),
        (None, set(), None),
    ],
    ids=str,
)
def test_what_ends_a_text_is_an_id_of_the_vocabulary(eos, ends, said, folder, tmp_path):
    change(folder / "config.json", eos_token_id=eos)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, tokenizer = open_model(folder)
    assert stop_ids(tokenizer) == ends
    texts = [str(warning.message) for warning in caught]
    assert any("eos_token_id" in text and said in text for text in texts) if said else not texts
    for form, out in (("F32", "m.gguf"), ("huggingface", "hf")):
        called("export", folder, "--format", form, "--out", tmp_path / out)
    written = json.loads((tmp_path / "hf" / "config.json").read_text()).get("eos_token_id")
    kept = written if isinstance(written, list) else [written]
    assert {i for i in kept if i is not None and i in range(SIZE)} == ends
    assert stop_ids(open_model(tmp_path / "m.gguf")[1]) == ends


@pytest.mark.parametrize(
    "command",
    [
        "finetune m text.txt --out new --max-steps 1",
        "train text.txt --init-from m --out new --max-steps 1",
        "generate m --prompt a --max-new-tokens 1",
        "ask m a",
        "eval m text.txt",
        "export m --format F32 --out new",
        "export m --format huggingface --out new",
    ],
)
def test_a_token_beyond_the_model_is_said_before_anything_is_written(command, folder, tmp_path):
    path = folder / "tokenizer.json"
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    extra = {"id": SIZE, "content": "<|extra|>", "special": True} | flags
    change(path, added_tokens=[*json.loads(path.read_text())["added_tokens"], extra])
    said = called(*command.split(), check=1)[1]
    assert f"up to {SIZE}," in said
    assert f"rows for {SIZE} tokens" in said
    assert "<|extra|>" in said
    assert f"resize_token_embeddings({SIZE + 1})" in said
    assert not (tmp_path / "new").exists()
