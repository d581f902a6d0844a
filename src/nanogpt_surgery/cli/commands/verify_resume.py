"""`surgery verify-resume`: a run that is killed and resumed has the bits of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.cli.framework.options import Json
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.writing import read_json

LEAST = 4  # steps before the kill: one, a checkpoint, and some that the kill takes away
NOT_REPEATED = ("--resume", "--no-resume", "--json", "--strict", "--allow-changes")


def verify_resume(
    run: Path,
    *,
    before: int = 6,
    after: int = 4,
    scratch: Path | None = None,
    json: Json = False,
) -> None:
    """Prove on this machine that a run, killed and resumed, has the bits of one that was not.

    The command that began the run is carried out again in a scratch folder, for a few steps: once
    without a break, and once stopped, resumed, killed (SIGKILL) and resumed. The run itself is only
    read, and the text that it learned from must still be there.

    Args:
        run: a run folder
        before: steps before the kill, at least 4
        after: steps after it
        scratch: where to make the scratch folder; by default where the system keeps such
    """
    from tempfile import TemporaryDirectory

    from nanogpt_surgery.files.disk_errors import writing
    from nanogpt_surgery.runs.summary import compare_runs

    typed = _recorded(run, before, after)
    last = before + after - 1  # a run saves after the step that follows the signal
    with writing(scratch or run), TemporaryDirectory(prefix="surgery-", dir=scratch) as place:
        whole, cut = (Path(place).resolve() / name for name in ("whole", "cut"))
        train = partial(_train, typed)
        train(whole, last, signal.SIGTERM)
        say(f"{before + after} steps without a break are done")
        train(cut, max(1, before // 2 - 1), signal.SIGTERM)
        train(cut, before, signal.SIGKILL, "--resume")
        say(f"killed after step {before}")
        train(cut, last, signal.SIGTERM, "--resume")
        report = compare_runs(whole, cut)
    report.summary.update(run=str(run), killed_after_step=before)
    show(report, json)
    if not report.summary["same"]:
        sys.exit(1)


def _recorded(run: Path, before: int, after: int) -> dict[str, Any]:
    """The command that a run records: its arguments, where it was typed, and its config file.

    Raises:
        SurgeryError: it is no run, records none, its text came from standard input, the folder it
            was typed in is gone, or it has too few steps.
    """
    from nanogpt_surgery.formats.folders.run_folder import is_run
    from nanogpt_surgery.history.folder_history import RUN

    if before < LEAST or after < 1:
        what = f"before is {before} and after {after}; they must be at least {LEAST} and 1"
        raise SurgeryError(what)
    if not is_run(run):
        raise SurgeryError(f"{run} is no run", "name the --out of a train or finetune")
    description = read_json(run / RUN)
    typed: dict[str, Any] = description.get("typed") or {}
    if not typed.get("arguments"):
        what = f"{run / RUN} does not record the command that began the run"
        raise SurgeryError(what, "surgery train and finetune record it from this version on")
    if "-" in typed["arguments"]:
        what = f"{run} learned from standard input, which is not there any more"
        raise SurgeryError(what, "keep the text in a file")
    if (steps := description["settings"]["max_steps"]) <= before:
        what = f"{run} has {steps} steps, and is to be killed after {before}"
        hint = f"--before {LEAST}" if steps > LEAST else "a longer run can be tried"
        raise SurgeryError(what, hint)
    if not Path(typed["folder"]).is_dir():
        what = f"{typed['folder']}, in which the run was begun, is not there"
        raise SurgeryError(what, "bring it back with its text")
    return typed


def _train(typed: dict[str, Any], out: Path, step: int, number: int, *more: str) -> None:
    """Carries the command out into `out`, in a process that sends itself a signal after a step.

    Raises:
        SurgeryError: it ended in another way than by that signal, or at the end of its steps.
    """
    from nanogpt_surgery.formats.folders.old_keys import with_current_config, with_current_flags

    words = [*with_current_flags(_kept(typed["arguments"])), "--out", str(out), *more]
    if (config := typed.get("config")) is not None:
        (out.parent / "config.toml").write_text(with_current_config(config), encoding="utf-8")
        words += ["--config", str(out.parent / "config.toml")]
    program = [sys.executable, "-m", __name__, str(step), str(int(number)), *words]
    done = subprocess.run(program, cwd=typed["folder"], capture_output=True, text=True, check=False)
    if done.returncode not in ((-number,) if number == signal.SIGKILL else (0, 128 + number)):
        lines = done.stderr.strip().splitlines() or [""]
        said = next((line for line in lines if line.startswith("surgery: ")), lines[-1])
        raise SurgeryError(
            f"surgery {' '.join(words)}, in {typed['folder']}, ended with status "
            f"{done.returncode}: {said.removeprefix('surgery: ')}",
            "the text and the model that the run was begun with must be where they were",
        )


def _kept(words: list[str]) -> list[str]:
    """A command's words without where it went and how it spoke."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in ("--out", "--config"):
            next(rest, None)
        elif word not in NOT_REPEATED and not word.startswith(("--out=", "--config=")):
            kept.append(word)
    return kept


def main() -> None:
    """Carries out a command in a process that sends itself a signal after a step.

    python -m nanogpt_surgery.cli.commands.verify_resume 5 9 train TEXT --out RUN
    """
    import os

    from nanogpt_surgery.cli.framework.app import run
    from nanogpt_surgery.runs.checkpoints import RunFolder

    record, (last, number) = RunFolder.record, map(int, sys.argv[1:3])

    def record_and_send(folder: RunFolder, step: Any) -> None:
        record(folder, step)
        if step.step == last:
            os.kill(os.getpid(), number)

    setattr(RunFolder, "record", record_and_send)  # noqa: B010 - in this process alone
    run(sys.argv[3:])


if __name__ == "__main__":
    main()
