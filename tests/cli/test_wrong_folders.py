"""A folder that is not there, or is of another kind: what is said, and the way out."""

from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wrong")
    (place / "text.txt").write_text("a line of it\n" * 40)
    model = write_model(place / "m")
    write_adapter(model, place / "a", 1)
    few = ["--max-steps", "1", "--batch-size", "1", "--block-size", "8"]
    sizes = ["--n-layer", "1", "--n-embd", "8", "--n-head", "2"]
    runs = place / "runs"
    called("train", place / "text.txt", "--out", runs / "book", *few, *sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        called("finetune", "runs/book", "text.txt", "--out", "runs/code", *few)
    return place


def refused(*arguments: object) -> str:
    return called(*arguments, check=1)[1]


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["plan", "a"], "surgery merge MODEL a --out FOLDER"),
        (["inspect", "runs/code", "--json"], None),
        (["finetune", "a", "text.txt", "--out", "x"], "surgery merge MODEL a --out FOLDER"),
        (["generate", "a"], "MODEL --adapter a"),
        (
            ["eval", "a", "text.txt"],
            "MODEL --adapter a",
        ),
        (["chat", "a"], "MODEL --adapter a"),
        (
            ["export", "a", "--out", "a.gguf"],
            "MODEL --adapter a",
        ),
    ],
)
def test_an_adapter_is_no_model(arguments: list[str], hint: str | None) -> None:
    if hint is None:
        called(*arguments)
        return
    error = refused(*arguments)
    assert "surgery: a is an adapter" in error
    assert hint in error
    has_flag = arguments[0] not in ("plan", "finetune")
    assert ("--adapter" in error) == has_flag


def test_the_hint_names_the_base_that_the_adapter_names() -> None:
    error = refused("plan", "runs/code")
    assert "runs/code is an adapter" in error
    assert "surgery merge runs/book runs/code --out FOLDER" in error
    assert "runs/book --adapter runs/code" in refused("generate", "runs/code")


def test_a_model_is_no_adapter() -> None:
    assert "runs/book is a model's run" in refused("merge", "runs/book", "runs/book")
    assert "m is a model" in refused("generate", "m", "--adapter", "m")


def test_a_folder_that_is_not_there() -> None:
    for words in (["log", "nope"], ["merge", "nope", "a"], ["undo", "nope"]):
        error = refused(*words)
        assert "nope" in error
        assert "--out" not in error
    assert "nope" in refused("generate", "m", "--adapter", "nope")


def test_a_mistyped_run_is_not_looked_for_on_the_hub() -> None:
    error = refused("inspect", "runs/bok")
    assert "runs/bok" in error and "→ runs/ has: book\n" in error
    (Path("runs") / ".tmp-1").mkdir()
    assert "runs/ has: book, code" in refused("inspect", "runs/zzzzzz")
