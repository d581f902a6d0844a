"""Commands killed at calls that change a folder, or told of a failing or a full device there.

What lies there is whole or as it was, and the same command given again succeeds. The program in
helpers/failing_commands.py says the rest.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.failing_commands import COMMANDS

SOURCE = Path(__file__).parents[1] / "helpers" / "failing_calls.c"
COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None, reason="calls are counted by a library in C"
)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("library") / "failing_calls.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", path, SOURCE, "-ldl"], check=True)
    return path


def failed_at(library: Path, place: Path, command: str, points: int) -> dict:
    program = [sys.executable, "-m", "helpers.failing_commands", place, command, str(points)]
    environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(program, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_data_prepare_asks_a_failing_device_again(library: Path, tmp_path: Path) -> None:
    found = failed_at(library, tmp_path, "data prepare", 2)
    assert found["EIO"] == [2, 2]  # of so many attempts, as many succeeded at once
    assert found["kill"][0] == found["ENOSPC"][0] == 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_fails_anywhere(library: Path, tmp_path: Path, command: str) -> None:
    found = failed_at(library, tmp_path, command, 60)
    assert {len(found[kind]) for kind in ("kill", "EIO", "ENOSPC")} == {2}
