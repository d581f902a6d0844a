"""A training that torchrun starts in several processes: one voice, one folder, one result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import called

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.files.atomic import file_hash, seal
from nanogpt_surgery.runs import data
from nanogpt_surgery.training.distributed import World

TEXT = "to be, or not to be: that is the question.\n" * 40
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2 --max-restarts 1".split()
TRAINING = (
    "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --batch-size 4 --warmup-steps 1 "
    "--evaluate-every 10 --precision float32 --resume --max-steps"
).split()
STEPS = 200


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"


def started(text: Path, out: Path, steps: int = STEPS) -> subprocess.Popen:
    """Two processes of a training, when its first checkpoint is there."""
    command = [sys.executable, *TORCHRUN, "-m", "nanogpt_surgery", "train", text, "--out", out]
    process = subprocess.Popen(
        [*map(str, command), *TRAINING, str(steps)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 600
    while True:
        is_over = process.poll() is not None
        if list(out.glob("checkpoints/step-*")):
            break
        assert not is_over, process.communicate()[1]
        assert time.monotonic() < deadline, "no checkpoint within ten minutes"
        time.sleep(0.02)
    return process


def lines(run: Path) -> list[dict]:
    return [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]


def assert_over(process: subprocess.Popen) -> str:
    """That a training came to its end; returns what it said."""
    _, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def assert_same(cut: Path, whole: Path) -> None:
    for name in ("model.safetensors", "training.safetensors"):
        place = f"checkpoints/step-{STEPS:08d}/{name}"
        assert file_hash(cut / place) == file_hash(whole / place)
    assert [row["loss"] for row in lines(cut)] == [row["loss"] for row in lines(whole)]


def children(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    return [int(number) for number in found.stdout.split()]


def test_two_do_what_one_does_with_one_voice(text, tmp_path):
    process = started(text, tmp_path / "two", 20)
    out, said = process.communicate(timeout=600)
    assert process.returncode == 0, said
    assert out.count("best validation loss") == said.count("a model of") == 1
    assert "not compiled; 2 processes" in said
    called("train", text, "--out", tmp_path / "one", *TRAINING, 20)
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert {row["processes"] for row in two[1:]} == {2}
    start = "validation_loss"
    assert one[0][start] == pytest.approx(two[0][start], rel=1e-5)
    for a, b in zip(one[1:], two[1:], strict=True):
        del a["seconds"], a["processes"], b["seconds"], b["processes"]
        found, wanted = list(b.values()), list(a.values())
        assert [v is None for v in found] == [v is None for v in wanted]
        assert [v or 0 for v in found] == pytest.approx([v or 0 for v in wanted], rel=1e-3)
    files = {path.name for path in (tmp_path / "one").iterdir()}
    assert files == {path.name for path in (tmp_path / "two").iterdir()}


@pytest.mark.slow
def test_where_one_is_killed_all_begin_again_to_the_same_bits(text, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert_over(started(text, whole))
    process = started(text, cut)
    os.kill(children(process)[-1], signal.SIGKILL)
    said = assert_over(process)
    assert "going on from step" in said
    assert said.count("a model of") == 2  # once before it was killed, and once after
    assert_same(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_they_save_and_resume_to_the_same_bits(text, tmp_path, number):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert_over(started(text, whole))
    process = started(text, cut)
    process.send_signal(number)
    _, said = process.communicate(timeout=600)
    assert "can be resumed" in said
    steps = len(lines(cut)) - 1  # after step 0
    assert (cut / "LATEST").read_text() == f"step-{steps:08d}\n"
    assert 10 <= steps < 200
    said = assert_over(started(text, cut))
    assert f"going on from step {steps} of 200" in said
    assert_same(cut, whole)


def test_gone_on_with_by_another_number_of_processes_it_says_so(text, tmp_path):
    words = ["train", text, "--out", tmp_path / "run", *TRAINING, 20]
    called(*words)
    summary = tmp_path / "run" / "checkpoints" / "step-00000020" / "training.json"
    contents = json.loads(summary.read_text())
    assert contents["processes"] == 1
    assert "processes" not in called(*words)[1]
    summary.write_text(json.dumps(contents | {"processes": 3}))
    (summary.parent / "MANIFEST.json").unlink()
    seal(summary.parent)
    assert "note: so far 3 at a time trained, now 1" in called(*words)[1]


def torchrun(monkeypatch, size: str, rank: str = "0") -> None:
    """What it tells a process."""
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": size, "RANK": rank}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["generate", "run", "--prompt", "x"], "surgery generate"),
        (["data", "preview", "m", "x"], "surgery data preview"),
    ],
)
def test_what_is_not_shared_is_refused(words, answer, monkeypatch):
    torchrun(monkeypatch, "3")
    said = called(*words, check=1)[1]
    assert "3 processes" in said and answer in said


def test_standard_input_is_not_shared(monkeypatch):
    monkeypatch.setattr(data, "world", lambda: World(0, 2))
    with pytest.raises(SurgeryError, match="standard input"):
        data.open_sources(("-",))


def test_one_process_speaks_for_all(text, tmp_path, monkeypatch):
    words = ["train", text, "--out", tmp_path / "run", *TRAINING, 1]
    monkeypatch.setattr("nanogpt_surgery.cli.framework.console.is_main_process", lambda: False)
    monkeypatch.setenv("RANK", "1")
    assert called(*words) == ("", "")
    assert str(text / "x") in called("generate", text / "x", "--prompt", "x", check=1)[1]


def test_an_error_names_the_process_that_it_is_of(monkeypatch):
    torchrun(monkeypatch, "2", rank="1")
    said = called("generate", "m", "--prompt", "x", check=1)[1]
    assert said.startswith("process 1: surgery: 2 processes")


def test_other_programs_that_set_the_size_are_not_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "there is no" in called("generate", "nowhere", "--prompt", "x", check=1)[1]
