"""The time and the memory that hostile files cost, many of them in one other process."""

import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

# The peak begins anew with each file, after what the last one left is given back.
_MEASURED = """
import ctypes, gc, json, re, sys, time
from pathlib import Path
from nanogpt_surgery import SurgeryError
status = lambda key: int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
costs = {{}}
{setup}
for path in sys.argv[1:]:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before, begun, error = status("VmRSS"), time.process_time(), None
    try:
        opened(path)
    except SurgeryError as raised:
        error = raised.what
    costs[path] = [error, (status("VmHWM") - before) / 1024, time.process_time() - begun]
print(json.dumps(costs))
"""


@dataclass
class Cost:
    """What opening a file came to: the error, if one of ours was raised; MiB; seconds."""

    error: str | None
    mib: float
    seconds: float


def costs(setup: str, paths: Iterable[Path]) -> dict[str, Cost]:
    """Opens each path with the function `opened` that the code `setup` defines.

    Returns:
        The costs by the paths' names; all of them are printed.
    """
    if sys.platform != "linux":
        pytest.skip("/proc says what the peak is")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED.format(setup=setup), *map(str, paths)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        Path(p).name: Cost(*cost) for p, cost in json.loads(done.stdout.splitlines()[-1]).items()
    }
    for name, cost in found.items():
        print(f"{name}: {cost.mib:.0f} MiB, {cost.seconds:.2f} s: {(cost.error or 'opened')[:100]}")
    return found


def assert_cheap(cost: Cost, name: str) -> None:
    """Holds a cost against the limits: 300 MiB, and 10 s, which only what hangs goes over."""
    assert cost.mib < 300, name
    assert cost.seconds < 10, name
    assert len(cost.error or "") < 20_000, name
