"""What commands say of files and arguments is what is there."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model
from helpers.models import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import save_gguf


@pytest.mark.filterwarnings("ignore:no tokenizer was written")
@pytest.mark.parametrize("family", ["gpt2", "llama-scaled-tied"])
def test_inspect_shows_the_types_that_a_gguf_file_stores(family: str, tmp_path: Path) -> None:
    save_gguf(tiny_model(FAMILY_CONFIGS[family]), tmp_path / "m.gguf", None, "F16")
    out, _ = called("inspect", tmp_path / "m.gguf", "--json")
    dtypes = {row["module"]: row["dtype"] for row in json.loads(out)["rows"]}
    assert dtypes["norm"] == "F32"
    assert dtypes["layers.1.self_attn.q_proj"] == ("F16, F32" if family == "gpt2" else "F16")
    assert dtypes["embed_tokens"] == dtypes["lm_head"] == "F16"


@pytest.mark.parametrize("tolerance", ["nan", "-1"])
def test_a_tolerance_is_refused_before_anything_is_merged(tolerance: str, tmp_path: Path) -> None:
    write_adapter(write_model(tmp_path / "m"), tmp_path / "a", 1)
    (tmp_path / "m" / "model.safetensors").write_bytes(b"not opened")
    _, errors = called("merge", tmp_path / "m", tmp_path / "a", "--tolerance", tolerance, check=1)
    assert f"tolerance is {float(tolerance)};" in errors


def test_a_file_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    assert "no.toml" in called("plan", "--config", "no.toml", check=1)[1]
    assert "no.jsonl" in called("eval", "m", "no.jsonl", check=1)[1]


def test_samples_have_one_numbering(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    words = ["generate", tmp_path / "m", "--samples", "2", "--max-new-tokens", "1"]
    shown = called(*words)[0]
    assert "--- sample 1\n" in shown
    assert "--- sample 2\n" in shown
    lines = called(*words, "--json")[0].splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [1, 2]


def test_texts_that_cannot_be_read_are_named_up_to_a_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "m")
    (tmp_path / "texts").mkdir()
    for number in range(9):
        (tmp_path / "texts" / f"{number}.bin").write_bytes(b"\xff")
    _, errors = called("eval", "m", "texts", check=1)
    assert "4.bin is not UTF-8" in errors
    assert "5.bin" not in errors
    assert "; 4 more" in errors
