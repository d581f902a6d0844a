"""A run's metrics: a line for each step, none missing before the checkpoint to go on from."""

import json
import resource
import signal
from pathlib import Path

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.runs.checkpoints import RunFolder, trim_metrics
from nanogpt_surgery.training.step import Step

LINES = [json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (1, 2, 3, 4)]
TORN = '{"step": 1, "lo\n'


def test_lines_of_steps_that_come_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES) + TORN.strip())
    trim_metrics(path, 3)
    assert path.read_text() == "".join(LINES[:3])


@pytest.mark.parametrize("kept", [0, 1, 3])
@pytest.mark.parametrize("how", ["cut", "torn", "gap", "no step"])
def test_metrics_that_lack_steps_of_the_checkpoint_are_refused(
    tmp_path: Path, kept: int, how: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    rest = {"cut": [], "torn": [TORN, *LINES[kept + 1 :]], "gap": LINES[kept + 1 :]}
    spoilt = "".join(LINES[:kept] + rest.get(how, ["[1]\n", *LINES[kept + 1 :]]))
    path.write_text(spoilt)
    with pytest.raises(SurgeryError, match=rf"lines of {kept} steps[\s\S]*step 4"):
        trim_metrics(path, 4)
    assert path.read_text() == spoilt


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(LINES))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        with pytest.raises(SurgeryError, match=r"could not write .*metrics\.jsonl"):
            RunFolder(tmp_path).record(Step(5, 1.0, 0.1, 1.0, 12, 0.1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
