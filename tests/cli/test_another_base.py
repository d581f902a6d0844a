"""An adapter whose base has changed since: refused by each command, and taken with --force."""

from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model

COMMANDS = {
    "generate": lambda model, adapter, out: ["generate", model, "--adapter", adapter],
    "chat": lambda model, adapter, out: ["chat", model, "--adapter", adapter],
    "eval": lambda model, adapter, out: ["eval", model, out / "text.txt", "--adapter", adapter],
    "export": lambda model, adapter, out: [
        "export", model, "--adapter", adapter, "--format", "huggingface", "--out", out / "made",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("bases")
    write_adapter(write_model(place / "first"), place / "adapter", 1)
    write_model(place / "second", seed=7)
    return place


@pytest.mark.parametrize("command", COMMANDS)
def test_another_base_takes_force(folder, tmp_path, monkeypatch, command) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be")
    (tmp_path / "nothing").write_text("")
    words = COMMANDS[command](folder / "second", folder / "adapter", tmp_path)
    with (tmp_path / "nothing").open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        _, refused = called(*words, check=1)
        assert "made for another base: 3 of 3" in refused
        assert "--force" in refused
        assert not (tmp_path / "made").exists()
        _, said = called(*words, "--force")
    assert "made for another base: 3 of 3" in said
    assert (tmp_path / "made").exists() == (command == "export")
