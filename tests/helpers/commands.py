"""Commands as a user types them, and a model to type them about."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

from helpers.models import randomise, train_a_little
from nanogpt_surgery import (
    CharacterTokenizer,
    SimpleGPT,
    inject_lora,
    remove_lora,
    save_adapter,
    save_model,
)
from nanogpt_surgery.cli.framework.app import run

LETTERS = "".join(map(chr, range(32, 127))) + "\n"


class Terminal(io.StringIO):
    """What a terminal is to a program that asks; its width is $COLUMNS."""

    def isatty(self) -> bool:
        return True


def called(*arguments: object, check: int = 0, terminal: bool = False) -> tuple[str, str]:
    """A command's stdout and stderr, without the seconds that a process of its own takes."""
    out, errors = (Terminal() if terminal else io.StringIO() for _ in range(2))
    with redirect_stdout(out), redirect_stderr(errors):
        try:
            run(list(map(str, arguments)))
            status = 0
        except SystemExit as end:
            status = end.code
    assert status == check, f"{status}\n{out.getvalue()}\n{errors.getvalue()}"
    return out.getvalue(), errors.getvalue()


def surgery(*arguments: object, check: int = 0, **options: object) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "nanogpt_surgery", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == check, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def until_closed(terminal: int) -> bytes:
    """All that is shown on a terminal until the last program on it has ended."""
    shown = b""
    with suppress(OSError):  # the end of a terminal
        while piece := os.read(terminal, 1 << 16):
            shown += piece
    os.close(terminal)
    return shown


def write_model(folder: Path, block_size: int = 200, seed: int = 0) -> SimpleGPT:
    """A model folder with random weights and a tokenizer of the printable characters."""
    tokenizer = CharacterTokenizer(LETTERS)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 2, "block_size": block_size}
    model = SimpleGPT(tokenizer.vocab_size, **sizes, positions="rotary", norm="rmsnorm").eval()
    randomise(model, seed)
    save_model(model, folder, tokenizer)
    return model


def write_adapter(model: SimpleGPT, folder: Path, seed: int) -> None:
    """An adapter folder for a model that carries none, with random updates that show."""
    inject_lora(model, ["q_proj", "lm_head"], rank=3, alpha=9)
    train_a_little(model, seed, size=0.5)
    save_adapter(model, folder)
    remove_lora(model)
