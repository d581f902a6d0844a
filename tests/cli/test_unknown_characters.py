"""A character that a vocabulary lacks is shown with its file, and its place in that file."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_model

FEW = ["--max-steps", "1", "--batch-size", "1", "--block-size", "8", "--out", "out"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_model(tmp_path / "m")
    (tmp_path / "known.txt").write_text("one line of it\n" * 40)
    (tmp_path / "late.txt").write_text("another line of it\n" * 40 + "and a é\n" + "more\n" * 9)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", [["finetune", "m", "known.txt", "late.txt", *FEW],
                                   ["finetune", "m", ".", "--mix", "1", *FEW],
                                   ["eval", "m", "late.txt"]])  # fmt: skip
def test_text_names_the_file_and_the_place_in_it(place: Path, words: list[str]) -> None:
    (place / "m").rename(place / ".m")
    _, errors = called(*[".m" if word == "m" else word for word in words], check=1)
    position = 40 * len("another line of it\n") + len("and a ")
    assert f"late.txt: the character 'é' (U+00E9) at position {position}, line 41," in errors
    assert not (place / "out").exists()


RECORDS = [
    ({"prompt": "Who?", "completion": "An é."}, "completion"),
    ({"instruction": "Say", "input": "é", "output": "no"}, "instruction and input"),
    ({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "é"}]},
     "messages[1]"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "field"), RECORDS)
@pytest.mark.parametrize("words", [["finetune", "m", "r.jsonl", *FEW], ["eval", "m", "r.jsonl"]])
def test_instruction_data_names_the_record_and_the_field(
    place: Path, record: dict[str, object], field: str, words: list[str]
) -> None:
    good = {"prompt": "Who?", "completion": "I."}
    lines = [json.dumps(r) + "\n" for r in (good, record, good)]
    (place / "r.jsonl").write_text("".join(lines))
    _, errors = called(*words, check=1)
    assert f"r.jsonl, record 2, {field}: the character 'é' (U+00E9) at position" in errors
