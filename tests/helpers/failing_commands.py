"""Run as a program: a command killed, or failed, at calls that change a folder, once for each.

    python -m helpers.failing_commands PLACE COMMAND POINTS

It is started with failing_calls.c's library loaded first. What a command needs is made once; each
attempt is a process forked from this one, in a copy of it. After a failure what lies at the goal is
whole, or as it was before; then the same command is given again and makes what it makes without a
failure. Prints how many attempts each kind of failure had, and how many of them succeeded at once.
"""

import ctypes
import errno
import io
import json
import os
import re
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from helpers.commands import LETTERS, write_adapter
from helpers.models import tiny_model
from nanogpt_surgery import CharacterTokenizer, GPTConfig, open_model, save_model
from nanogpt_surgery.cli.framework.app import run
from nanogpt_surgery.data.text.token_files import is_token_folder, verify_tokens
from nanogpt_surgery.files.atomic import damage, file_hash
from nanogpt_surgery.formats.folders.run_folder import checkpoints

KILLED = -9
FAILURES = {"kill": (0, False), "EIO": (errno.EIO, False), "ENOSPC": (errno.ENOSPC, True)}
SIZES = "--n-embd 8 --n-head 1 --n-layer 1 --block-size 8"
STEPS = "--max-steps 4 --evaluate-every 2 --save-every 1 --batch-size 1 --compile off"
COMMANDS = {
    "train": f"train text.txt {SIZES} {STEPS} --out new",
    "finetune": f"finetune m text.txt --block-size 8 {STEPS} --out new",
    "export": "export m --adapter a --format huggingface --out new",
    "merge": "merge m a --out new",
    "merge in place": "merge m a",
    "data prepare": "data prepare text.txt --tokenizer m --out new --workers 1",
}
RUNS = ("train", "finetune")
library = ctypes.CDLL(None)
kept = []  # C holds no reference to the text that it is given


def prepare(start: Path) -> None:
    start.mkdir()
    (start / "text.txt").write_text("to be, or not to be: that is the question.\n" * 20)
    tokenizer = CharacterTokenizer(LETTERS)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 32}
    config = GPTConfig.for_family("llama", vocab_size=tokenizer.vocab_size, **sizes)
    save_model(model := tiny_model(config), start / "m", tokenizer)
    write_adapter(model, start / "a", 1)


def attempt(words: list[str], number: int, how: int, lasting: bool) -> tuple[int, str, int]:
    """Status, stderr and counted calls of a command whose call of a number fails."""
    reads, writes = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(reads)
        errors, status = io.StringIO(), 0
        kept.append(os.fsencode(Path.cwd()))
        library.fail_call(kept[-1], number, how, lasting)
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(errors):
                run(words)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status = 70
            errors.write(traceback.format_exc())
        counted = library.counted_calls()
        library.fail_call(None, 0, 0, False)
        os.write(writes, json.dumps([errors.getvalue()[-4000:], counted]).encode())
        os._exit(status)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status, *(json.loads(said) if said else ("", 0))


def made(command: str) -> dict[str, str]:
    """The hashes of what a command is there to make."""
    goal = Path("m" if "in place" in command else "new")
    files = [path for path in sorted(goal.rglob("*")) if path.suffix in (".bin", ".safetensors")]
    here = [path for path in files if "checkpoints" not in path.parts]
    return {str(path): file_hash(path) for path in here if path.name != "training.safetensors"}


def check_whole(command: str, before: dict[str, str], after: dict[str, str]) -> None:
    """What lies there is whole, or as it was."""
    goal = Path("m" if "in place" in command else "new")
    if command in RUNS:
        for path in checkpoints(goal) if goal.is_dir() else []:
            assert damage(path) is None, damage(path)
    elif command == "data prepare":
        if is_token_folder(goal):
            verify_tokens(goal)
    else:
        assert made(command) in (before, after), "half a state"
        if goal.exists():
            assert damage(goal) is None, damage(goal)
            open_model(goal)


def again(command: str) -> list[str]:
    words = COMMANDS[command].split()
    resumes = command in RUNS and Path("new").is_dir() and checkpoints(Path("new"))
    return [*words, "--resume"] if resumes else words


def check_point(command: str, after: dict[str, str], number: int, kind: str) -> bool:
    how, lasting = FAILURES[kind]
    before = made(command)
    status, said, _ = attempt(COMMANDS[command].split(), number, how, lasting)
    assert status in ((KILLED, 0) if kind == "kill" else (0, 1)), f"status {status}: {said}"
    assert "Traceback" not in said, said
    if status == 1:
        assert said.count("surgery: ") == 1, said
        assert re.search(r"\b(new|m|here|tmp)\b", said), said
    check_whole(command, before, after)
    if status == 0 or (made(command) == after and command not in RUNS):
        assert made(command) == after
        return status == 0
    if kind == "EIO":
        print(f"EIO at call {number}: {said}", file=sys.stderr)
    status, said, _ = attempt(again(command), 0, 0, False)
    assert status == 0, f"again: status {status}: {said}"
    check_whole(command, before, after)
    assert made(command) == after, f"{made(command)} for {after}"
    if command in (*RUNS, "data prepare"):
        left = list(Path("new").rglob(".tmp-*"))
        assert not left, f"left: {left}"
    return False


def main(place: Path, command: str, points: int) -> dict[str, list[int]]:
    start, found = place / "start", {}
    prepare(start)
    shutil.copytree(start, place / "plain")
    os.chdir(place / "plain")
    status, said, calls = attempt(COMMANDS[command].split(), 0, 0, False)
    assert status == 0, said
    after = made(command)
    assert after and calls
    wrong = []
    for kind in FAILURES:
        numbers = sorted({1 + i * (calls - 1) // max(1, points - 1) for i in range(points)})
        whole = 0
        for number in numbers:
            here = place / "here"
            shutil.copytree(start, here)
            os.chdir(here)
            try:
                whole += check_point(command, after, number, kind)
            except Exception as error:
                wrong.append(f"{kind} at call {number} of {calls}: {error!r}")
            os.chdir(place)
            shutil.rmtree(here)
        found[kind] = [len(numbers), whole]
    assert not wrong, "\n".join(wrong)
    return {"calls": calls, **found}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
