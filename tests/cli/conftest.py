"""A folder with a model and two adapters, and lines typed to `surgery chat` about them."""

import io
import sys
from pathlib import Path

import pytest
from helpers.chats import FEW
from helpers.commands import called, write_adapter, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("chat")
    model = write_model(place / "m")
    write_adapter(model, place / "first", 1)
    write_adapter(model, place / "second", 2)
    return place


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Lines typed → what the model said, line by line, and what the program said."""
    monkeypatch.chdir(folder)

    def typed(lines: str, *arguments: object, few: list[object] = FEW) -> tuple[list[str], str]:
        data = io.TextIOWrapper(io.BytesIO(lines.encode()), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", data)
        out, errors = called("chat", "m", *few, *arguments)
        return out.removesuffix("\n").split("\n") if out else [], errors

    return typed
