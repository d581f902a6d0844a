"""How much memory there is, and refusals of what cannot fit, before anything is allocated.

Only what is certain to be needed is counted, and all that may be there: what would fit is never
refused. This module does not load torch.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from nanogpt_surgery.errors import SurgeryError

WORTH_A_LOOK = 1 << 28  # bytes; less is not compared with what there is
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_SAYS_SO = re.compile(
    r"(can.?t|cannot|unable to|failed to|not enough memory to) allocate|out of memory|bad_alloc"
    r"|not enough memory|size calculation overflowed|os error 12\b|can't start new thread"
    r"|failed to map segment from shared object$",
    re.IGNORECASE,
)


def in_gib(size: float) -> str:
    """Bytes as people read them: three digits and GiB."""
    gib = size / 2**30
    return f"{gib:,.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"


def check_memory(
    what: str, parts: Mapping[str, int], hint: str, available: int | None = None
) -> None:
    """Raise where something needs more memory than there is.

    Args:
        what: needs the memory, as the subject of a sentence.
        parts: the bytes of each part that is certain to be needed.
        hint: names what to lower.
        available: bytes; by default what this process can still have.

    Raises:
        SurgeryError: there is less (both numbers, and the largest parts).
    """
    needed = sum(parts.values())
    if needed < WORTH_A_LOOK:
        return
    available = available_memory() if available is None else available
    if available is None or needed <= available:
        return
    largest = sorted(parts.items(), key=lambda part: -part[1])[:3]
    shown = ", ".join(f"{name} {in_gib(size)}" for name, size in largest if 100 * size > needed)
    raise SurgeryError(
        f"{what} needs at least {in_gib(needed)} of memory ({shown}), and {in_gib(available)} are "
        "available",
        hint,
    )


def available_memory() -> int | None:
    """Bytes that this process can still have, or None where the system does not say.

    The least of what the machine has left, swap included, of what a control group leaves (of a
    container or a batch system), and of the process's own limit (`ulimit -v`).
    """
    found = [size for size in (_of_machine(), _of_groups(), _of_process()) if size is not None]
    return max(0, min(found)) if found else None


def _of_machine() -> int | None:
    lines = _read(PROC / "meminfo").splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if ":" in line}
    if "MemAvailable" in sizes:
        return sizes["MemAvailable"] + sizes.get("SwapFree", 0)
    try:  # not Linux: all there is, used or not
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _of_groups() -> int | None:
    """Returns the bytes left of the tightest limit of this process's control groups."""
    found = []
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            found += [_left(f, "memory.max", "memory.current") for f in _folders(CGROUPS, path)]
        elif "memory" in controllers.split(","):
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            found += [_left(f, *files) for f in _folders(CGROUPS / "memory", path)]
    left = [size for size in found if size is not None]
    return min(left) if left else None


def _folders(root: Path, path: str) -> Iterator[Path]:
    """The folders of a group and of those around it, as far as they can be seen from here."""
    folder = root / path.lstrip("/")
    yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _left(folder: Path, limit: str, used: str) -> int | None:
    """Returns the bytes that a group leaves; cached files count as free."""
    most, now = _read(folder / limit).strip(), _read(folder / used).strip()
    if not most.isdigit() or not now.isdigit() or int(most) >= 1 << 60:
        return None
    names = ("active_file", "inactive_file", "total_active_file", "total_inactive_file")
    lines = [line.split() for line in _read(folder / "memory.stat").splitlines()]
    kept = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[0] in names}
    totals = [size for name, size in kept.items() if name.startswith("total_")]
    return int(most) - int(now) + sum(totals or kept.values())


def _of_process() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    pages = _read(PROC / "self/statm").split()
    if limit == resource.RLIM_INFINITY or not pages:
        return None
    return limit - int(pages[0]) * resource.getpagesize()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, PyTorch's, a library's, the system's."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, Exception) and bool(_SAYS_SO.search(str(error)))
