"""A run folder belongs to one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.runs.checkpoints import open_run_folder


def test_two_processes_cannot_write_one_run(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom pathlib import Path\n"
        "from nanogpt_surgery.runs.checkpoints import open_run_folder\n"
        "with open_run_folder(Path(sys.argv[1]), {}, False):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with (
        pytest.raises(SurgeryError, match=f"PID {holder.pid}"),
        open_run_folder(tmp_path / "run", {}, resume=True),
    ):
        pass
    holder.kill()
    holder.communicate()
    with open_run_folder(tmp_path / "run", {}, resume=True):
        pass  # the lock of a dead process is no lock
