"""With --plain a training runs the code as it is read, and a run keeps to it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.commands import called

TEXT = "the quick brown fox jumps over the lazy dog. " * 20
TRAIN = "train text.txt --out run --n-embd 8 --n-head 2 --n-layer 1 --block-size 8 --batch-size 2"
COMMON = "--max-steps 3 --device cpu --precision float32 --plain"
TUNE = "finetune run text.txt --out tuned --targets lm_head --batch-size 2"
PROGRAM = f"""
import sys
from helpers.commands import called
called(*"{TRAIN} {COMMON}".split())
called(*"{TUNE} {COMMON}".split())
found = [name for name in sys.modules if name.startswith("nanogpt_surgery.training.fast")]
assert "nanogpt_surgery.training.fit" in sys.modules
sys.exit(", ".join(found) or 0)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "text.txt").write_text(TEXT)
    tests = Path(__file__).parents[1]
    environment = {"PYTHONPATH": str(tests), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("run", ["run", "tuned"])
def test_nothing_quicker_is_loaded_and_the_run_says_so(place: Path, run: str) -> None:
    assert json.loads((place / run / "run.json").read_text())["settings"]["fast"] is False


def test_a_run_keeps_to_its_way(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    fast = [word for word in f"{TRAIN} {COMMON}".split() if word != "--plain"]
    _, said = called(*fast, "--resume", check=1)
    assert "fast was False and is True" in said
    called(*fast, "--plain", "--resume")


def test_both_ways_have_the_same_losses(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    for command, run in ((TRAIN, "run"), (TUNE, "tuned")):
        words = f"{command} {COMMON}".replace("--plain", "").replace(
            f"--out {run}", f"--out q{run}"
        )
        called(*words.split())
        plain, fast = (
            [
                json.loads(row)["loss"]
                for row in (place / name / "metrics.jsonl").read_text().splitlines()
            ]
            for name in (run, f"q{run}")
        )
        assert fast[1:] == pytest.approx(plain[1:], rel=1e-5)
