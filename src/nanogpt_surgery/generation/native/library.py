"""The compiled decoder as a library: compiled on first use for the machine at hand, and kept.

A compiler of C is on most machines; where there is none, the package `ziglang` brings one (the
extra `native`). What was compiled lies in the user's cache, under a name that is the hash of the
source, the flags, the compiler and the processor, so that another of any of these compiles anew.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import quoted, warn

SOURCE = Path(__file__).with_name("decoder.c")
KERNELS = SOURCE.with_name("kernels.h")
# Not -ffast-math: with gcc, a library linked by it changes how the whole process rounds.
# -ffp-contract: without it, -std=c11 keeps gcc from multiplying and adding in one instruction.
FLAGS = (
    "-std=c11",
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
)
LINKED = ("-shared", "-fPIC", "-lm", "-lpthread")
TIMEOUT = 600  # seconds: ziglang's first use builds parts of its own, and machines are busy


def compiler() -> list[str] | None:
    """Returns the command of a C compiler: CC's, the system's, or ziglang's; None without any."""
    named = os.environ.get("CC", "").split()
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if named and shutil.which(named[0]):
        return named
    if found:
        return [found]
    return [sys.executable, "-m", "ziglang", "cc"] if find_spec("ziglang") else None


def cache_folder() -> Path:
    """Returns the folder for what was compiled: the user's own, by the XDG convention."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "nanogpt-surgery"


@cache
def decoder_library() -> tuple[Any, str]:
    """Returns the library, compiled if it was not yet; or None, and why there is none."""
    command = compiler()
    if command is None:
        return (
            None,
            "there is no C compiler here (the package ziglang, our extra native, brings one)",
        )
    try:
        path = cache_folder() / f"decoder-{_key(command)}.so"
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # it is not there, or damaged
            _compile(command, path)
            library = ctypes.CDLL(str(path))
        return _with_signatures(library), ""
    except subprocess.CalledProcessError as error:
        said = quoted(error.stderr.decode(errors="replace"))
        return None, f"{command[0]} does not compile the decoder: {said}"
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:  # Runtime: no home folder
        return None, f"the decoder cannot be compiled or loaded: {error}"


def _compile(command: list[str], path: Path) -> None:
    """Compiles beside the path and renames, so that another process never sees half a file."""
    start = time.perf_counter()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        arguments = [*command, *FLAGS, str(SOURCE), "-o", str(made), *LINKED]
        subprocess.run(arguments, check=True, capture_output=True, timeout=TIMEOUT)
        made.replace(path)
    seconds = time.perf_counter() - start
    warn(f"the decoder was compiled for this processor, once ({seconds:.1f} s; {path.parent})")


def _key(command: list[str]) -> str:
    sources = SOURCE.read_bytes(), KERNELS.read_bytes()
    parts = [*sources, repr((FLAGS, LINKED, command)).encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _processor() -> bytes:
    """Returns what tells one processor's instructions from another's."""
    facts = Path("/proc/cpuinfo")
    if not facts.is_file():
        return repr(platform.uname()[4:]).encode()
    lines = facts.read_bytes().split(b"\n\n")[0].split(b"\n")
    return b"\n".join(line for line in lines if line.startswith((b"model name", b"flags", b"Feat")))


def _with_signatures(library: Any) -> Any:
    library.pool_make.restype = ctypes.c_void_p
    library.pool_make.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int]
    library.pool_step.restype, library.pool_free.restype = ctypes.c_int, None
    pointers, numbers = [ctypes.c_void_p] * 4, [ctypes.c_int] * 2
    library.pool_step.argtypes = [*pointers, *numbers, ctypes.c_void_p]
    library.pool_free.argtypes = [ctypes.c_void_p]
    return library
