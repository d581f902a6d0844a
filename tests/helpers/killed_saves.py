"""Run as a program: kill a run before each call that changes a directory, in a save or a start.

Prints how many kills each had. After every kill the run is started again, and LATEST, BEST and the
top of the folder must say what the checkpoints say. A model is a file of one word, so that it is
quick.
"""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from nanogpt_surgery.files.atomic import file_hash
from nanogpt_surgery.formats.folders.run_folder import checkpoints
from nanogpt_surgery.runs.checkpoints import RunFolder, open_run_folder
from nanogpt_surgery.training.step import Step

KILLED = 9
EVENTS = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}
LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.5, 5: 0.7, 6: None}  # a better, a worse, and none
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(model.parameters())


def save(run: RunFolder, number: int) -> None:
    step = Step(number, 1.0, 0.1, 1.0, 1, 0.1, LOSSES[number])
    run.record(step)
    run.save(step, lambda to: write(to, number), model, optimizer)


def write(folder: Path, number: int) -> None:
    (folder / "model.safetensors").write_text(f"weights {number}")
    (folder / "config.json").write_text(f"[{number}]")


def go_on(folder: Path, until: int) -> None:
    with open_run_folder(folder, {"kind": "train"}, resume=True) as run:
        for number in range(run.first_step + 1, until + 1):
            save(run, number)


def killed_at(call: int, folder: Path, until: int) -> bool:
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, KILLED), status
        return status == KILLED
    calls = itertools.count()

    def kill(event: str, _: tuple) -> None:
        if event in EVENTS and next(calls) == call:
            os._exit(KILLED)

    sys.addaudithook(kill)
    go_on(folder, until)
    os._exit(0)


def check(folder: Path, steps: int) -> None:
    """After a start: nothing is lost but the step in which the kill came, and nothing is stale."""
    known = {c: json.loads((c / "training.json").read_text()) for c in checkpoints(folder)}
    newest = max(known)
    measured = {c: said["validation_loss"] for c, said in known.items()}
    measured = {c: loss for c, loss in measured.items() if loss is not None}
    best = min(measured, key=measured.get)
    assert steps - 1 <= known[newest]["step"] <= steps
    ever = [loss for step, loss in LOSSES.items() if step <= known[newest]["step"] and loss]
    assert measured[best] == min(ever), "the best was pruned"
    assert (folder / "LATEST").read_text().strip() == newest.name
    assert (folder / "BEST").read_text().strip() == best.name
    for name in ("model.safetensors", "config.json"):
        assert file_hash(folder / name) == file_hash(best / name)
    assert not list(folder.rglob(".tmp-*"))


def kill_everywhere(place: Path, steps: int) -> int:
    """Kill the save of each further step, at every call."""
    start = place / f"start-{steps}"
    go_on(start, steps - 1)
    for call in itertools.count():
        here = place / "here"
        shutil.copytree(start, here)
        if not killed_at(call, here, steps):
            break
        go_on(here, 0)
        check(here, steps)
        go_on(here, max(LOSSES))
        check(here, max(LOSSES))
        shutil.rmtree(here)
    shutil.rmtree(here)
    return call


if __name__ == "__main__":
    os.fsync = lambda _: None  # a kill leaves what the system holds; this is not a power cut
    print(json.dumps({steps: kill_everywhere(Path(sys.argv[1]), steps) for steps in (4, 5)}))
