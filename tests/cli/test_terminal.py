"""What a training and a note look like on terminals of several widths."""

import logging
import os
import re
import sys
import warnings

import pytest
from helpers.commands import Terminal

from nanogpt_surgery import Step, SurgeryWarning
from nanogpt_surgery.cli.framework.console import quiet_libraries, say, spoken_warnings
from nanogpt_surgery.runs.progress import Announced, Progress

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


def steps(count: int) -> list[Step]:
    return [
        Step(i, 4.3217, 1e-3, 1.0, 1000, 0.5, 4.1234 if i % 2 == 0 else None)
        for i in range(1, count + 1)
    ]


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_bar_step_and_loss_stay(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress(0, 20_000, 1e6).bar(Announced([])) as show:
        for step in steps(4):
            show(step)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue())
    lines = re.split(r"[\r\n]+", ESCAPES.sub("\n", plain))
    assert max(map(len, lines)) <= columns
    shown = "\n".join(lines)
    assert "step 4 of 20,000  loss 4.3217  validation loss 4.1234" in shown
    bars = [line for line in lines if "4/20000" in line and "━" in line]
    assert bars and all("loss 4.3217" in line for line in bars)
    assert all(("of the matmul rate" in line) == (columns == 120) for line in bars)


def test_no_number_of_a_note_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stderr", terminal)
    say("12,345,678 windows to train on, 1,234 held out; a model of some 17,568,123 parameters")
    lines = terminal.getvalue().splitlines()
    assert max(map(len, lines)) <= 60
    assert "17,568,123" in terminal.getvalue()


def test_a_skipped_step_is_said() -> None:
    nan = float("nan")
    done = [
        Step(1, nan, 1e-3, nan, 10, 0.5, 4.5, skipped=True),
        Step(2, 4.1, 1e-3, 1.0, 10, 0.5, 4.25),
    ]
    said: list[str] = []
    show = Progress(0, 2, 1e6).lines(said.append)
    for step in done:
        show(step)
    first, second = said
    assert "skipped" in first and "nan" not in first and "4.5" in first
    assert "loss 4.1000" in second and "skipped" not in second


@pytest.mark.filterwarnings("default")
def test_no_remark_of_a_library_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log of torch's compiler, a warning; an error stays, and so does what is ours."""
    monkeypatch.delenv("TORCH_LOGS", raising=False)
    log = logging.getLogger("torch.utils.cpp_extension")
    handler = logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    try:
        with quiet_libraries(), spoken_warnings():
            log.warning("stray log")
            warnings.warn("stray warning", UserWarning, stacklevel=1)
            log.error("an error")
            warnings.warn("ours", SurgeryWarning, stacklevel=1)
        assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
        log.warning("heard again")
    finally:
        log.removeHandler(handler)
    said = capsys.readouterr().err
    assert "stray" not in said
    assert all(text in said for text in ("an error", "ours", "heard again"))
