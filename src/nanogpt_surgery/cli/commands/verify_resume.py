"""`surgery verify-resume`: a run that is killed and resumed has the bits of one that was not."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanogpt_surgery.cli.framework.console import say, show
from nanogpt_surgery.errors import SurgeryError

if TYPE_CHECKING:
    from nanogpt_surgery.report import Report

LEAST = 4  # steps before the kill: one, a checkpoint, and some that the kill takes away
WITHOUT_VALUE = ("resume", "no-resume", "json", "plan", "strict", "allow-changes", "debug")
WITH_VALUE = ("out", "config")
HOW_IT_ENDS = (0, 128 + signal.SIGTERM)


def verify_resume(
    run: Path,
    *,
    before: int = 6,
    after: int = 4,
    scratch: Path | None = None,
    json: bool = False,
) -> None:
    """Prove on this machine that a run, killed and resumed, has the bits of one that was not.

    The command that began the run is carried out again in a scratch folder, for a few steps: once
    without a break, and once stopped, resumed, killed (SIGKILL) and resumed. The run itself is only
    read, and the text that it learned from must still be there.

    Parameters
    ----------
    run
        a run folder
    before
        steps before the kill, at least 4
    after
        steps after it
    scratch
        where to make the scratch folder; by default where the system keeps such
    json
        print the result as JSON
    """
    from tempfile import TemporaryDirectory

    from nanogpt_surgery.files.disk_errors import writing

    command = _command_of(run, before, after)
    with writing(scratch or run), TemporaryDirectory(prefix="surgery-", dir=scratch) as folder:
        place = Path(folder).resolve()
        whole = command.carried_out(place / "whole", {before + after - 1: signal.SIGTERM})
        say(f"{before + after} steps without a break are done")
        cut = command.interrupted(place / "cut", before, after)
        report = _report(run, before, whole, cut)
    show(report, json)
    if not report.summary["same"]:
        sys.exit(1)


@dataclass(frozen=True)
class Command:
    """The command that began a run, to be carried out again elsewhere."""

    words: tuple[str, ...]
    folder: Path
    config: str | None

    def carried_out(
        self,
        out: Path,
        signals: Mapping[int, int],
        *,
        resume: bool = False,
        ends: tuple[int, ...] = HOW_IT_ENDS,
    ) -> Path:
        """Train into `out` in a process of its own, which sends itself signals after steps.

        Raises:
            SurgeryError: it ended in another way than one of `ends`.
        """
        import json

        planned = json.dumps({step: int(number) for step, number in signals.items()})
        words = [*self.words, "--out", str(out), *(["--resume"] if resume else [])]
        if self.config is not None:
            config = out.parent / "config.toml"
            config.write_text(self.config, encoding="utf-8")
            words += ["--config", str(config)]
        module = [sys.executable, "-m", "nanogpt_surgery.cli.framework.signals", planned]
        done = subprocess.run(
            [*module, *words], cwd=self.folder, capture_output=True, text=True, check=False
        )
        if done.returncode not in ends:
            lines = done.stderr.strip().splitlines()
            said = next(
                (line for line in lines if line.startswith("surgery: ")), "".join(lines[-1:])
            )
            raise SurgeryError(
                f"surgery {' '.join(self.words)}, in {self.folder}, ended with status "
                f"{done.returncode}: {said.removeprefix('surgery: ')}",
                "the text and the model that the run was begun with must be where they were",
            )
        return out

    def interrupted(self, out: Path, before: int, after: int) -> Path:
        """The same stopped and resumed, killed after `before` steps, and resumed once more."""
        self.carried_out(out, {max(1, before // 2 - 1): signal.SIGTERM})
        self.carried_out(out, {before: signal.SIGKILL}, resume=True, ends=(-signal.SIGKILL,))
        say(f"killed after step {before}")
        return self.carried_out(out, {before + after - 1: signal.SIGTERM}, resume=True)


def _command_of(run: Path, before: int, after: int) -> Command:
    """The command that a run folder records.

    Raises:
        SurgeryError: it is no run, records none, its text came from standard input, the folder it
            was typed in is gone, or it has too few steps.
    """
    from nanogpt_surgery.files.json_files import read_json
    from nanogpt_surgery.formats.folders.old_keys import with_current_config, with_current_flags
    from nanogpt_surgery.formats.folders.run_folder import is_run
    from nanogpt_surgery.history.folder_history import RUN

    if before < LEAST or after < 1:
        raise SurgeryError(
            f"before is {before} and after {after}; they must be at least {LEAST} and 1"
        )
    if not is_run(run):
        raise SurgeryError(f"{run} is no run", "name the --out of a train or finetune")
    description = read_json(run / RUN)
    typed = description.get("typed") if isinstance(description, dict) else None
    if not isinstance(typed, dict) or not typed.get("arguments"):
        raise SurgeryError(
            f"{run / RUN} does not record the command that began the run",
            "surgery train and finetune record it from this version on",
        )
    if "-" in typed["arguments"]:
        raise SurgeryError(
            f"{run} learned from standard input, which is not there any more",
            "keep the text in a file",
        )
    steps, folder = description["settings"]["max_steps"], Path(typed["folder"])
    if steps <= before:
        raise SurgeryError(
            f"{run} has {steps} steps, and is to be killed after {before}",
            f"--before {LEAST}" if steps > LEAST else "a longer run can be tried",
        )
    if not folder.is_dir():
        raise SurgeryError(
            f"{folder}, in which the run was begun, is not there", "bring it back with its text"
        )
    arguments = with_current_flags(_kept(typed["arguments"]))
    config = typed.get("config")
    return Command(tuple(arguments), folder, config and with_current_config(config))


def _kept(words: list[str]) -> list[str]:
    """A command's words without where it went and how it spoke."""
    kept, rest = [], iter(words)
    for word in rest:
        name, given, _ = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in (*WITHOUT_VALUE, *WITH_VALUE):
            kept.append(word)
        elif name in WITH_VALUE and not given:
            next(rest, None)
    return kept


def _report(run: Path, before: int, whole: Path, cut: Path) -> Report:
    """Compare the losses of every step, and the newest checkpoint's files by their hashes."""
    from nanogpt_surgery.report import Report

    losses = [_losses(folder) for folder in (whole, cut)]
    hashes = [_hashes(folder) for folder in (whole, cut)]
    wrong = [
        f"step {one['step']}" for one, other in zip(*losses, strict=False) if one != other
    ] or [f"{len(losses[0])} and {len(losses[1])} steps"] * (len(losses[0]) != len(losses[1]))
    rows = [
        {"file": name, "without a break": digest, "killed": hashes[1].get(name, "-")}
        for name, digest in hashes[0].items()
    ]
    files = [row["file"] for row in rows if row["without a break"] != row["killed"]]
    summary = {
        "run": str(run),
        "steps": len(losses[0]),
        "killed_after_step": before,
        "losses_differ": ", ".join(wrong[:8]) or None,
        "files_differ": ", ".join(files) or None,
        "same": not wrong and not files,
    }
    return Report("resumed after a kill (sha256)", rows, summary)


def _losses(folder: Path) -> list[dict[str, Any]]:
    """Returns the metrics of each step, without its time."""
    import json

    from nanogpt_surgery.formats.folders.run_folder import METRICS

    lines = (folder / METRICS).read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def _hashes(folder: Path) -> dict[str, str]:
    """The sha256 of the tensors in the newest checkpoint."""
    from nanogpt_surgery.files.manifest import file_hash
    from nanogpt_surgery.formats.folders.run_folder import latest_checkpoint

    checkpoint = latest_checkpoint(folder)
    assert checkpoint is not None
    return {path.name: file_hash(path) for path in sorted(checkpoint.glob("*.safetensors"))}
