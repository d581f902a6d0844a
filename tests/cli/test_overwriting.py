"""What lies at `--out` is replaced with --overwrite, and else refused, by every command alike."""

from pathlib import Path

import pytest
import torch
from helpers.commands import called, write_adapter
from helpers.models import randomise, tiny_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import GPTConfig, inject_lora, save_adapter, save_model
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.files.atomic import file_hash

CONFIG = GPTConfig.for_family(
    "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=2, block_size=40
)
ADAPTED = ["--adapter", "{one}-a"]
COMMANDS = {
    "tokenizer train": ["tokenizer", "train", "text.txt", "--vocab-size", "{size}"],
    "merge": ["merge", "{one}", "{one}-a"],
    "export GGUF": ["export", "{one}", "--format", "F32"],
    "export folder": ["export", "{one}", "--format", "huggingface"],
    "export merged GGUF": ["export", "{one}", "--format", "F32", *ADAPTED],
    "export merged folder": ["export", "{one}", "--format", "huggingface", *ADAPTED],
    "export lora-gguf": ["export", "{one}", "--format", "lora-gguf", "--adapter", "{one}-q"],
    "export mlx": ["export", "{one}", "--format", "mlx", "--adapter", "{one}-q"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, each with an adapter, and one on its projections alone; and a text."""
    place = tmp_path_factory.mktemp("overwriting")
    (place / "text.txt").write_text("to be, or not to be\n" * 30)
    for number, name in enumerate(("m", "other")):
        model, tokenizer = tiny_model(CONFIG), PretrainedTokenizer(byte_level(), stop_ids=[2])
        randomise(model, number)
        save_model(model, place / name, tokenizer)
        write_adapter(model, place / f"{name}-a", number)
        inject_lora(model, "q_proj", rank=2)
        torch.nn.init.ones_(model.layers[0].self_attn.q_proj.lora_B)
        save_adapter(model, place / f"{name}-q")
    return place


def typed(command: str, one: str, size: int) -> list[str]:
    return [word.format(one=one, size=size) for word in COMMANDS[command]]


def hashes(out: Path) -> dict[str, str]:
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    return {path.name: file_hash(path) for path in files}


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_there_is_replaced_with_overwrite_alone(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    out = tmp_path / "out"
    if "gguf" not in command.lower():
        out.mkdir()  # an empty folder is nothing
    called(*typed(command, "m", 260), "--out", out)
    first = hashes(out)
    again = [*typed(command, "other", 270), "--out", out]
    _, said = called(*again, check=1)
    assert f"surgery: {out} is there already\n" in said
    assert "--overwrite" in said
    assert hashes(out) == first
    called(*again, "--overwrite")
    assert hashes(out).keys() == first.keys()
    assert hashes(out) != first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_not_ours_stays_whatever_is_typed(
    command: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    page, run = tmp_path / "diary" / "page", tmp_path / "run" / "run.json"
    for mine in (page, run):
        mine.parent.mkdir()
        mine.write_text("{}")
    for out in (page.parent, page, run.parent):
        words = [*typed(command, "m", 260), "--out", out, "--overwrite"]
        _, said = called(*words, check=1)
        assert f"surgery: {out} " in said
        assert "--overwrite" not in said
    assert [page.read_text(), run.read_text()] == ["{}", "{}"]


def test_a_model_is_not_merged_over_itself(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = hashes(place / "m")
    for more in ([], ["--overwrite"]):
        _, said = called("merge", "m", "m-a", "--out", "m", *more, check=1)
        assert "in place, with undo" in said
    assert hashes(place / "m") == before
    called("merge", "m", "m-a", "--out", "other", "--plan")  # which writes nothing
