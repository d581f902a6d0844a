"""Paths that are not what a command reads: status 1, the path in the message, no traceback."""

import os
from pathlib import Path

import pytest
from helpers.commands import called, write_model

WRONG = ("missing", "folder", "empty.json", "random.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrong-inputs")
    (place / "text.txt").write_text("to be, or not to be\n" * 40)
    write_model(place / "m")
    (place / "folder").mkdir()
    (place / "empty.json").touch()
    (place / "random.json").write_bytes(bytes([200, 1, 255]) + os.urandom(400))
    return place


@pytest.mark.parametrize("path", WRONG)
@pytest.mark.parametrize(
    "command",
    [
        "generate {}",
        "ask {} question",
        "ask m question --adapter {}",
        "chat {}",
        "eval {} text.txt",
        "eval m {}",
        "plan {}",
        "inspect {}",
        "merge m {}",
        "undo {}",
        "redo {}",
        "log {}",
        "export {} --out new",
        "verify-resume {}",
        "finetune {} text.txt --out new",
        "finetune m {} --out new",
        "train {} --out new",
        "train text.txt --init-from {} --out new",
        "tokenizer train {} --vocab-size 300 --out new",
        "data prepare {} --tokenizer m --out new",
        "data preview m {}",
        "generate m --adapter {}",
    ],
)
def test_a_wrong_path_is_named(command, path, place, monkeypatch):
    monkeypatch.chdir(place)
    _, said = called(*command.format(path).split(), check=1)
    assert path in said
    assert "Traceback" not in said
    assert not Path("new").exists()
