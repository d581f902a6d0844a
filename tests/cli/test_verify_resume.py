"""`surgery verify-resume`: what a run folder records is enough to train again, and to prove it."""

import io
import json
import os
import subprocess
import sys
import traceback
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.commands import called

from nanogpt_surgery.cli.commands import verify_resume
from nanogpt_surgery.cli.commands.verify_resume import _kept
from nanogpt_surgery.files.atomic import write_folder
from nanogpt_surgery.runs.summary import compare_runs

TEXT = "to be, or not to be: that is the question.\n" * 40
SMALL = "--n-embd 16 --n-head 2 --n-layer 2 --block-size 12 --batch-size 4 --warmup-steps 1".split()
CONFIG = "max_steps = 12\nseed = 5\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was stopped after a checkpoint, begun with a config file that is gone since."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    Path("own.toml").write_text(CONFIG)
    called("train", "text.txt", "--out", "run", *SMALL, "--config", "own.toml", "--dropout", 0.1)
    Path("own.toml").unlink()
    return tmp_path / "run"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def forked(command: list[str], cwd: Path, **_: object) -> subprocess.CompletedProcess:
    """`subprocess.run` of a module of ours, in a copy of this process: torch is loaded already."""
    assert command[1:3] == ["-m", verify_resume.__name__]
    if not (child := os.fork()):
        torch.set_num_threads(1)  # the others were not copied
        said = io.StringIO()
        try:
            with chdir(cwd), redirect_stdout(said), redirect_stderr(said):
                sys.argv = command[2:]
                verify_resume.main()
            os._exit(0)
        except SystemExit as end:
            os._exit(end.code)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return subprocess.CompletedProcess(command, status, "", "")


@pytest.mark.parametrize("processes", ["copied", pytest.param("new", marks=pytest.mark.slow)])
def test_a_killed_run_has_the_bits_of_one_that_was_not(run, tmp_path, monkeypatch, processes):
    if processes == "copied":
        monkeypatch.setattr(subprocess, "run", forked)
    described = json.loads((run / "run.json").read_text())["typed"]
    assert described["arguments"][:4] == ["train", "text.txt", "--out", "run"]
    assert (described["folder"], described["config"]) == (str(tmp_path), CONFIG)
    before = contents(run)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    report = called("verify-resume", run, "--scratch", tmp_path, "--json", "--before", 4)[0]
    summary = json.loads(report)
    assert summary["same"] is True
    assert summary["killed_after_step"] == 4
    assert summary["steps"] >= 7
    assert {row["file"] for row in summary["rows"]} == {
        "model.safetensors",
        "training.safetensors",
    }
    assert contents(run) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "run", "text.txt"]
    (tmp_path / "text.txt").unlink()
    if processes == "new":  # whose last words are quoted
        assert "text.txt" in called("verify-resume", run, check=1)[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda described: described.pop("typed"), "does not record"),
        (lambda described: described["settings"].update(max_steps=6), "6 steps"),
        (lambda described: described["typed"]["arguments"].append("-"), "standard input"),
        (lambda described: described["typed"].update(folder="/nowhere"), "/nowhere"),
    ],
)
def test_what_cannot_be_done_again_is_said(tmp_path, change, said):
    typed = {"arguments": ["train", "text.txt"], "folder": str(tmp_path), "config": None}
    described = {"kind": "train", "settings": {"max_steps": 100}, "typed": typed}
    change(described)
    (tmp_path / "run.json").write_text(json.dumps(described))
    assert said in called("verify-resume", tmp_path, check=1)[1]
    assert "at least 4 and 1" in called("verify-resume", tmp_path, "--before", 3, check=1)[1]
    assert "is no run" in called("verify-resume", tmp_path / "nowhere", check=1)[1]


def test_words_that_say_where_and_how_are_left_out():
    words = "train --out a b.txt --resume --seed 3 --out=c --config d.toml --json --beta1=0.2"
    words = words.split()
    assert _kept(words) == ["train", "b.txt", "--seed", "3", "--beta1=0.2"]


@pytest.mark.parametrize("differs", ["nothing", "a loss", "a step", "a tensor"])
def test_a_difference_is_found_and_named(tmp_path, differs):
    def fill(spoilt, folder):
        (folder / "training.safetensors").write_bytes(b"1")
        (folder / "model.safetensors").write_text(str(spoilt and differs == "a tensor"))

    for name in ("whole", "cut"):
        spoilt = name == "cut"
        write_folder(tmp_path / name / "checkpoints" / "step-00000002", partial(fill, spoilt))
        steps = [1, 2, 3] if spoilt and differs == "a step" else [1, 2]
        loss = 0.5 if spoilt and differs == "a loss" else 0.25
        rows = [{"step": step, "loss": loss, "seconds": len(name)} for step in steps]
        (tmp_path / name / "metrics.jsonl").write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    found = compare_runs(tmp_path / "whole", tmp_path / "cut").summary
    assert found["same"] is (differs == "nothing")
    assert found["losses_differ"] == {"a loss": "step 1, step 2", "a step": "step 3"}.get(differs)
    assert found["files_differ"] == {"a tensor": "model.safetensors"}.get(differs)
