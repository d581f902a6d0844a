"""Every command's numeric flags with numbers out of reason: refused in one line, or they work."""

import io
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import get_args, get_origin

import pytest
from helpers.commands import called, write_adapter, write_model

from nanogpt_surgery.cli.framework.app import COMMANDS, GROUPS, make_app, run

NOT_NUMBERS = ("nan", "inf", "1e400")  # refused by every flag
NUMBERS = (*NOT_NUMBERS, "-1", str(10**30))
ENDLESS = ("--max-new-tokens", str(10**30))  # it is done, for as long as one waits
SEEDS = ("-1", str(2**64), str(2**70))
IN_TEXT = {"--save-every": "{}", "--logit-bias": "t={}"}  # numbers within a text
FEW = ("generate", "ask", "eval", "data preview", "plan")  # of every run; the rest is slow
SECONDS = 20  # of the processor, since other tests may keep it busy
SIZES = {"--n-embd": "8", "--n-head": "1", "--n-layer": "1", "--block-size": "8"}
SHORT = {"--out": "new", "--max-steps": "1", "--batch-size": "1", "--compile": "off"}
NEEDED: dict[str, tuple[str, dict[str, str]]] = {
    "train": ("text.txt", SHORT | SIZES),
    "plan": ("m", {}),
    "finetune": ("m text.txt", SHORT | {"--block-size": "8"}),
    "generate": ("m", {"--prompt": "to", "--max-new-tokens": "1"}),
    "ask": ("m to", {"--template": "plain", "--max-new-tokens": "1"}),
    "chat": ("m", {"--template": "plain", "--max-new-tokens": "1"}),
    "eval": ("m text.txt", {}),
    "merge": ("m a", {"--out": "new"}),
    "export": ("m", {"--adapter": "a", "--format": "huggingface", "--out": "new"}),
    "verify-resume": ("run", {"--before": "4", "--after": "1"}),
    "tokenizer train": ("text.txt", {"--vocab-size": "300", "--out": "new"}),
    "data prepare": ("text.txt", {"--tokenizer": "m", "--out": "new"}),
    "data preview": ("m pairs.json", {"--template": "plain"}),
}


def _kinds(hint: object) -> set[object]:
    return {hint}.union(*map(_kinds, get_args(hint)))


def _form(name: str, hint: object) -> str:
    """How a flag takes a number, "" if it takes none."""
    if any(get_origin(kind) is dict for kind in _kinds(hint)):
        return "q_proj={}"
    return "{}" if _kinds(hint) & {int, float} else IN_TEXT.get(name, "")


def _rows() -> Iterator[object]:
    groups = {name: own for name, (_, own) in GROUPS.items()}
    for name in COMMANDS:
        for command in [f"{name} {own}" for own in groups[name]] if name in groups else [name]:
            app = make_app()
            for word in command.split():
                app = app[word]
            marks = () if command in FEW else pytest.mark.slow
            for argument in app.assemble_argument_collection():
                form = _form(argument.name, argument.hint)
                for value in SEEDS if argument.name == "--seed" else NUMBERS if form else ():
                    if (argument.name, value) == ENDLESS:
                        continue
                    yield pytest.param(command, argument.name, form.format(value), marks=marks)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("numbers")
    (place / "text.txt").write_text("to be, or not to be\n" * 20)
    (place / "pairs.json").write_text('[{"instruction": "to be?", "output": "or not"}]')
    write_adapter(write_model(place / "m", block_size=32), place / "a", 1)
    return place


@pytest.fixture
def a_run(place: Path, request: pytest.FixtureRequest) -> None:
    """The run that verify-resume looks at, made when it is wanted."""
    if request.node.callspec.params["command"] == "verify-resume" and not (place / "run").exists():
        flags = SHORT | SIZES | {"--out": str(place / "run"), "--max-steps": "5"}
        called("train", place / "text.txt", *(f"{key}={flags[key]}" for key in flags))


@pytest.fixture
def in_time() -> Iterator[None]:
    def ends(*_: object) -> None:
        pytest.fail(f"it takes over {SECONDS} s")  # no Exception, which a command may answer

    before = signal.signal(signal.SIGPROF, ends)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, before)


def _status(words: list[str]) -> tuple[int, str]:
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        try:
            run(words)
        except SystemExit as end:
            return int(end.code or 0), errors.getvalue()
    return 0, errors.getvalue()


def _folder(place: Path, name: str) -> Path:
    """A folder of its own, in which a command finds what it needs."""
    folder = place / name.replace(" ", "")
    folder.mkdir()
    for path in place.iterdir():
        if path.name in ("m", "a", "run", "text.txt", "pairs.json"):
            (folder / path.name).symlink_to(path)
    return folder


def _words(command: str, but: str = "") -> list[str]:
    """A command that works, less a flag."""
    words, flags = NEEDED[command]
    given = [word for name in flags if name != but for word in (name, flags[name])]
    return [*command.split(), *words.split(), *given]


@pytest.fixture(scope="module")
def works(place: Path):
    """Whether a command works without a swept flag; tried once a command."""
    found: dict[str, tuple[int, str]] = {}

    def once(command: str) -> tuple[int, str]:
        if command not in found:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(_folder(place, command))
                patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
                found[command] = _status(_words(command))
        return found[command]

    return once


@pytest.mark.parametrize(("command", "flag", "value"), list(_rows()))
def test_a_number_out_of_reason(command, flag, value, place, a_run, works, in_time, monkeypatch):
    status, said = works(command)
    assert status == 0, f"without {flag}: {said}"
    folder = _folder(place, f"{command}{flag}{value}")
    before = sorted(folder.iterdir())
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    swept = [f"{flag}={value}"] if "=" not in value else [flag, value]
    status, said = _status([*_words(command, flag), *swept])
    assert status in (0, 1, 2)
    if value.rpartition("=")[2] in NOT_NUMBERS:
        assert status, f"{value} is taken for a number"
    if status:
        assert said.count("surgery: ") == 1
        assert "Traceback" not in said
        names = flag.removeprefix("--"), flag.removeprefix("--").replace("-", "_"), value
        assert any(name in said for name in names), f"{flag} is not named: {said}"
        assert sorted(folder.iterdir()) == before
