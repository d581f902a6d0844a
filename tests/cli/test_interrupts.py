"""Ctrl-C and SIGTERM in each phase of each command: one line, the status, nothing half-written."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import LETTERS, write_adapter
from helpers.models import tiny_model

from nanogpt_surgery import CharacterTokenizer, GPTConfig, save_model
from nanogpt_surgery.cli.framework.app import run
from nanogpt_surgery.cli.framework.console import ready_streams
from nanogpt_surgery.cli.framework.signals import AnsweredSignals
from nanogpt_surgery.formats.folders.run_folder import checkpoints, step_of
from nanogpt_surgery.runs.checkpoints import RunFolder
from nanogpt_surgery.training.step import Step

TEXT = "to be, or not to be: that is the question.\n" * 60
SIZES = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --max-steps 3 --out new".split()
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# Sends a signal to itself when a module begins to load, and is the command beside that.
AT_AN_IMPORT = """
import os, sys
where, number, *sys.argv[1:] = sys.argv[1:]
class Sends:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            os.kill(os.getpid(), int(number))
sys.meta_path.insert(0, Sends())
from nanogpt_surgery.cli import main
main()
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("interrupted")
    (place / "text.txt").write_text(TEXT)
    tokenizer = CharacterTokenizer(LETTERS)
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 1, "block_size": 64}
    model = tiny_model(GPTConfig.for_family("llama", vocab_size=tokenizer.vocab_size, **sizes))
    save_model(model, place / "m", tokenizer)
    write_adapter(model, place / "a", 1)
    return place


@pytest.fixture
def folder(made: Path, monkeypatch: pytest.MonkeyPatch):
    """The working directory; handlers of signals are as before afterwards."""
    monkeypatch.chdir(made)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    before = {number: signal.getsignal(number) for number in STATUS}
    yield made
    for number, handler in before.items():
        signal.signal(number, handler)


def inside(monkeypatch: pytest.MonkeyPatch, where: str, number: int) -> None:
    """Let a signal come when a function, named as module:name, is called the first time."""
    name = where.replace(":", ".")
    module, _, function = where.partition(":")
    __import__(module)
    original, sent = getattr(sys.modules[module], function), []

    def sends(*args: object, **more: object) -> object:
        if not sent:
            sent.append(signal.raise_signal(number))
        return original(*args, **more)

    monkeypatch.setattr(name, sends)


@pytest.mark.parametrize(
    ("command", "where", "number"),
    [
        ("export m --out new", "nanogpt_surgery.files.atomic:flush", signal.SIGINT),
        (
            "export m --out new --format huggingface",
            "nanogpt_surgery.files.atomic:seal",
            signal.SIGTERM,
        ),
        ("merge m a --out new", "nanogpt_surgery.files.atomic:flush", signal.SIGINT),
        ("merge m a", "nanogpt_surgery.files.atomic:flush", signal.SIGTERM),
        ("merge m a --plan", "nanogpt_surgery.formats.folders.merging:_planned", signal.SIGINT),
        (
            "tokenizer train text.txt --vocab-size 270 --out new",
            "nanogpt_surgery.files.atomic:seal",
            2,
        ),
        ("eval m text.txt", "nanogpt_surgery.generation.evaluation:perplexity", signal.SIGINT),
        (
            f"train text.txt --plan {' '.join(SIZES)}",
            "nanogpt_surgery.training.estimates:plan_training",
            signal.SIGINT,
        ),
        ("plan m", "nanogpt_surgery.formats.peft.writing:plan_lora", signal.SIGTERM),
        ("inspect m", "nanogpt_surgery.formats.inspection:open_model", signal.SIGINT),
    ],
)
def test_nothing_half_written_stays(command, where, number, folder, monkeypatch, capfd):
    before = sorted(str(path) for path in folder.rglob("*"))
    inside(monkeypatch, where, number)
    with pytest.raises(SystemExit) as left, AnsweredSignals():
        run(command.split())
    assert left.value.code == STATUS[number]
    out, said = capfd.readouterr()
    assert out == ""
    assert said.count("surgery: ") == 1
    assert "Traceback" not in said
    assert sorted(str(path) for path in folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("where", "number"), [("cyclopts", signal.SIGINT), ("torch.nn", signal.SIGTERM)]
)
def test_an_import_is_left_at_once(where: str, number: signal.Signals, folder: Path) -> None:
    words = [sys.executable, "-c", AT_AN_IMPORT, where, str(int(number)), "generate", "m"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout) == (STATUS[number], "")
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("surgery: ")


def test_one_that_comes_in_a_destructor_is_not_lost(folder: Path) -> None:
    program = (
        "import signal\n"
        "from nanogpt_surgery.cli.framework.signals import AnsweredSignals\n"
        "class Dies:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n"
        "with AnsweredSignals():\n    Dies()\n    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "")
    assert len(done.stderr.splitlines()) == 1


def test_what_the_shell_lets_ignore_stays_ignored(folder: Path) -> None:
    program = (
        "import signal\n"
        "from nanogpt_surgery.cli.framework.signals import AnsweredSignals\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with AnsweredSignals():\n    signal.raise_signal(signal.SIGINT)\n    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", "")


SMALL = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --max-steps 1000000 --out new".split()
LONG = [
    ["generate", "m", "--max-new-tokens", "1000000"],
    ["train", "text.txt", *SMALL, "--evaluate-every", "3"],
    ["train", "text.txt", *SMALL, "--plan"],
    ["finetune", "m", "text.txt", "--block-size", "12", "--max-steps", "1000000", "--out", "new"],
    ["export", "m", "--out", "new"],
    ["merge", "m", "a", "--out", "new"],
    ["tokenizer", "train", "text.txt", "--vocab-size", "3000", "--out", "new"],
    ["data", "prepare", "text.txt", "--tokenizer", "m", "--out", "new", "--workers", "2"],
    ["eval", "m", "text.txt", "--stride", "1"],
    ["chat", "m", "--template", "plain"],
]
# Says by a pipe that signals are answered from now on: before that no line of ours has run.
THAT_SAYS_WHEN = """
import os, sys
told, *sys.argv[1:] = sys.argv[1:]
from nanogpt_surgery.cli import main
from nanogpt_surgery.cli.framework import signals
class Says(signals.AnsweredSignals):
    def __enter__(self):
        super().__enter__()
        os.write(int(told), b"!")
signals.AnsweredSignals = Says
main()
"""


def ended_by(number: int, words: list[str], folder: Path, wait: float) -> tuple[int, str]:
    """Status and stderr of a command that gets a signal some seconds after it answers signals."""
    reads, writes = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", THAT_SAYS_WHEN, str(writes), *words], cwd=folder, pass_fds=[writes],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writes)
    assert os.read(reads, 1) == b"!"
    os.close(reads)
    time.sleep(wait)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    return process.returncode, said


@pytest.mark.slow
@pytest.mark.parametrize("number", STATUS)
@pytest.mark.parametrize("words", LONG, ids=lambda words: "-".join(words[:2] + words[-1:]))
def test_at_any_moment(words: list[str], number: signal.Signals, made: Path, tmp_path: Path):
    """Every 0.4 s of a command's life: its status is the signal's, or it had ended before."""
    for name in ("m", "a", "text.txt"):
        (tmp_path / name).symlink_to(made / name)
    for wait in (step * 0.4 for step in range(20)):
        status, said = ended_by(number, words, tmp_path, wait)
        assert status in (STATUS[number], 0), f"after {wait} s: {said}"
        assert "Traceback" not in said, f"after {wait} s: {said}"
        assert "Exception ignored" not in said, f"after {wait} s: {said}"
        subprocess.run(["rm", "-rf", str(tmp_path / "new")], check=True)
        assert not [p for p in tmp_path.iterdir() if p.name not in ("m", "a", "text.txt")]
        if status == 0:
            break


def test_a_character_that_the_terminal_has_not_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii", write_through=True))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))
    ready_streams()
    print("3×4")
    assert written.getvalue() == b"3\\xd74\n"


@pytest.mark.parametrize(
    ("shell", "status", "said"),
    [
        (">/dev/full", 1, "No space left on device"),
        (">&-", 0, ""),
        (">&- 2>&-", 0, ""),
    ],
)
def test_a_stdout_that_takes_nothing(shell: str, status: int, said: str, folder: Path) -> None:
    command = f"{sys.executable} -m nanogpt_surgery log --help {shell}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=600)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    assert "Errno" not in done.stderr
    assert said in done.stderr


@pytest.mark.parametrize("number", list(STATUS))
def test_a_second_one_ends_a_training_at_once(number, folder, monkeypatch, capfd):
    """It comes while the first one's step is being recorded; what was saved can be gone on from."""
    record = RunFolder.record

    def twice(going: RunFolder, step: Step) -> None:
        record(going, step)
        if step.step == 4:
            signal.raise_signal(number)
            signal.raise_signal(number)

    command = f"train text.txt {' '.join(SIZES[:8])} --evaluate-every 2 --out twice-{number}"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "record", twice)
        with pytest.raises(SystemExit) as left, AnsweredSignals():
            run([*command.split(), "--max-steps", "6"])
    assert left.value.code == STATUS[number]
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.count("surgery: ") == 1
    assert not list(Path(f"twice-{number}").rglob(".tmp-*"))
    assert [step_of(path) for path in checkpoints(Path(f"twice-{number}"))] == [2]
    run([*command.split(), "--max-steps", "6", "--resume"])
    assert "going on from step 2 of 6" in capfd.readouterr().err
