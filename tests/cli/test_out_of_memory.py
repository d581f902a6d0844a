"""A training under a real limit of memory: a sentence with what to lower, and what was saved stays.

Run as a program it is such a training: the limit comes with the first checkpoint.
"""

import resource
import subprocess
import sys
from pathlib import Path

from helpers.commands import called

ROOM = 32 << 20  # bytes, above what the process had before it began to train
TRAIN = (
    "--n-embd 64 --n-head 2 --n-layer 2 --block-size 256 --batch-size 64 --max-steps 6 "
    "--save-every 1 --sample-every 0 --device cpu --precision float32 --compile off"
).split()


def main(run: str, *words: str) -> None:
    """Train, and leave no more memory than there was before from the first checkpoint on."""
    import torch  # noqa: F401  its libraries are no memory that a training takes

    from nanogpt_surgery.cli.framework.app import run as surgery
    from nanogpt_surgery.runs.checkpoints import RunFolder

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ROOM
    save = RunFolder.save

    def limited(*arguments: object) -> None:
        save(*arguments)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    RunFolder.save = limited
    surgery([*words, "--out", run])


def test_memory_that_runs_out_is_a_sentence_and_the_last_checkpoint_stays(tmp_path):
    (tmp_path / "text.txt").write_text("to be, or not to be: that is the question.\n" * 200)
    words = ["train", str(tmp_path / "text.txt"), *TRAIN]
    run = tmp_path / "run"
    command = [sys.executable, __file__, str(run), *words]
    path = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in ("memory ran out", "--batch-size from 64", "--gradient-checkpointing"):
        assert part in done.stderr
    last = sorted((run / "checkpoints").iterdir())[-1]
    assert last.name in done.stderr and last.name != "step-00000006"
    said = called(*words, "--out", run, "--resume")[1]
    assert f"going on from step {int(last.name[-8:])} of 6" in said


if __name__ == "__main__":
    main(*sys.argv[1:])
