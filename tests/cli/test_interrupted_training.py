"""A training that is killed, or asked to stop, goes on where it was."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.commands import called

from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.runs.checkpoints import RunFolder
from nanogpt_surgery.training.step import Step

TEXT = "to be, or not to be: that is the question.\n" * 40
LONG = (
    "--n-embd 16 --n-head 2 --n-layer 2 --block-size 12 --batch-size 4 --warmup-steps 1 "
    "--evaluate-every 10 --max-steps"
).split()
# Does what `surgery` does, but stands still within a step between two checkpoints.
STANDS_STILL = """
import signal
from nanogpt_surgery.cli import main
from nanogpt_surgery.runs.checkpoints import RunFolder
record = RunFolder.record
def stands_still(run, step):
    record(run, step)
    if step.step == 14:
        signal.pause()
RunFolder.record = stands_still
main()
"""
SURGERY = ["-m", "nanogpt_surgery"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def start_training(program: list[str], folder: Path, out: Path, *flags: str) -> subprocess.Popen:
    """A training in a process of its own, when its first checkpoint is there."""
    command = [sys.executable, *program, "train", "text.txt", "--out", out]
    process = subprocess.Popen(
        [*map(str, command), *LONG, *flags],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 600
    while not list(out.glob("checkpoints/step-*")):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no checkpoint within ten minutes"
        time.sleep(0.02)
    return process


@pytest.mark.parametrize("flags", [(), ("--recipe", "fast")], ids=["plain", "fast"])
def test_a_killed_training_resumes_to_the_same_bits(folder: Path, flags: tuple[str, ...]) -> None:
    text, whole, cut = folder / "text.txt", folder / "whole", folder / "cut"
    flags = "150", *flags
    called("train", text, "--out", whole, *LONG, *flags)
    process = start_training(["-c", STANDS_STILL], folder, cut, *flags)
    process.kill()
    process.communicate()
    assert not (cut / "loss.png").exists(), "it was killed before the end"
    called("train", text, "--out", cut, *LONG, *flags, "--resume")
    for name in ("model.safetensors", "training.safetensors"):
        place = f"checkpoints/step-00000150/{name}"
        assert file_hash(cut / place) == file_hash(whole / place)
    assert losses(cut) == losses(whole)


def losses(run: Path) -> list[float]:
    return [json.loads(row)["loss"] for row in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_leaves(folder: Path, number: signal.Signals, status: int) -> None:
    process = start_training(SURGERY, folder, folder / "run", "1000000")
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == status, errors.decode()
    assert b"--resume goes on" in errors
    steps = len((folder / "run" / "metrics.jsonl").read_text().splitlines()) - 1  # after step 0
    assert (folder / "run" / "LATEST").read_text() == f"step-{steps:08d}\n"


@pytest.mark.parametrize("command", [["train"], ["finetune", "nowhere"]])
def test_a_folder_and_a_device_are_checked_before_anything_is_read(
    folder: Path, command: list[str]
) -> None:
    """The text is not there, and neither is the model: what is said first was looked at first."""
    (folder / "run").mkdir()
    (folder / "run" / "run.json").write_text("{}")
    words = [*command, folder / "nowhere.txt", "--out", folder / "run"]
    assert "holds a run already" in called(*words, check=1)[1]
    for lacking in {"cuda", "mps"} - devices():
        _, said = called(*words, "--device", lacking, check=1)
        assert f"there is no {lacking} device here" in said


def devices() -> set[str]:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return {name for name, present in there.items() if present}


def test_a_resume_that_finds_nothing_says_so(folder: Path) -> None:
    small = [*LONG[:-1], "--max-steps", 1]
    words = ["train", folder / "text.txt", "--out", folder / "run", *small, "--resume"]
    note = f"note: there is no checkpoint in {folder / 'run'}: --resume begins at step 0"
    assert note in called(*words)[1]
    assert "note:" not in called(*words)[1]


def test_asked_to_stop_in_its_last_step_a_run_is_over(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, out = RunFolder.record, folder / "run"

    def asked(run: RunFolder, step: Step) -> None:
        record(run, step)
        if step.step == 10:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RunFolder, "record", asked)
    command = ["train", folder / "text.txt", "--out", out, *LONG[:-3], "--max-steps", 10]
    called(*command)
    assert "train, 10 steps" in called("log", out)[0]
    called(*command, "--resume")
    assert called("log", out)[0].count("train, 10 steps") == 1
    shutil.rmtree(out / "operations")  # as a kill before the line would leave it
    called(*command, "--resume")
    assert called("log", out)[0].count("train, 10 steps") == 1


def test_a_place_that_refuses_a_folder_is_named(folder: Path) -> None:
    (folder / "file").write_text("")
    out = folder / "file" / "run"
    for command in (["train", *LONG, 1], ["data", "prepare"]):
        _, said = called(*command, folder / "text.txt", "--out", out, check=1)
        assert f"could not write {out}" in said, said


def test_gone_on_with_by_another_number_of_threads_a_run_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", folder / "text.txt", "--out", folder / "run", *LONG[:-3], "--max-steps", 1]
    called(*command)
    known = json.loads((folder / "run" / "run.json").read_text())["environment"]
    assert known["threads"] == torch.get_num_threads()
    assert {"device", "precision", "torch", "processes"} <= known.keys()
    monkeypatch.setattr(torch, "get_num_threads", lambda: known["threads"] + 6)
    said = called(*command, "--resume")[1]
    assert f"threads was {known['threads']} and is {known['threads'] + 6}" in said
