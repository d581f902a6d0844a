"""Paths that are not what a command reads: status 1, the path in the message, no traceback."""

import os
from pathlib import Path

import pytest
from helpers.commands import called, write_model

WRONG = ("missing", "folder", "others", "empty.json", "random.json")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrong-inputs")
    (place / "text.txt").write_text("to be, or not to be\n" * 40)
    write_model(place / "m")
    (place / "folder").mkdir()
    (place / "others").mkdir()
    (place / "others" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    (place / "others" / "run.json.txt").write_text("{}")
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


@pytest.mark.parametrize("command", ["generate {}", "inspect {}", "ask {} hello", "plan {}"])
def test_a_hub_name_without_network_is_said(command, place, monkeypatch):
    """The tests have no network (HF_HUB_OFFLINE), and nothing of this name lies in a cache."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "cache"))
    name = "nobody-at-all/no-such-model"
    _, said = called(*command.format(name).split(), check=1)
    assert name in said
    assert "Traceback" not in said
    assert said.count("surgery: ") == 1
