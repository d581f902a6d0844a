"""What does not fit is refused before it is allocated, with both numbers; what fits never is."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import called, write_adapter, write_model
from helpers.training import DATASET, SETTINGS, model_of

from nanogpt_surgery import BPETokenizer, SurgeryError, fit, memory
from nanogpt_surgery.memory import available_memory, check_memory, in_gib, is_out_of_memory
from nanogpt_surgery.training import fit as fit_module

TEXT = "to be, or not to be: that is the question.\n" * 40
GIB = 2**30
SMALL = "--n-embd 16 --n-head 2 --n-layer 1 --block-size 12 --batch-size 4 --device cpu".split()


@contextmanager
def limited(room: int) -> Iterator[None]:
    """A context in which this process may grow by so many bytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sizes")
    (place / "text.txt").write_text(TEXT)
    write_adapter(write_model(place / "m"), place / "a", 1)
    return place


@pytest.mark.parametrize(
    "command",
    [
        "train text.txt --out new --block-size 12 --batch-size 100000000000",
        "train text.txt --out new --block-size 12 --n-embd 100000000",
        "train text.txt --out new --block-size 12 --n-layer 1000000000",
        "train text.txt --out new --block-size 12 --n-inner 1000000000000",
        "train text.txt --out new --block-size 12 --n-prev-tokens 1000000000000",
        "train text.txt --out new --block-size 12 --grad-accum-steps 100000000000",
        "train text.txt --out new --block-size 1000000000000",
        "train text.txt --out new --block-size 12 --n-embd 100000000 --plan",
        "train text.txt --init-from m --out new --block-size 12 --batch-size 100000000000",
        "finetune m text.txt --out new --block-size 12 --batch-size 100000000000",
        "finetune m text.txt --out new --block-size 12 --batch-size 100000000000 --plan",
        "generate m --samples 100000000000000",
        "generate m --samples 10000000 --batch-size 100000000 --max-new-tokens 150",
    ],
)
def test_a_size_that_does_not_fit_is_refused_with_both_numbers(command, made, monkeypatch):
    monkeypatch.chdir(made)
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * GIB)
    out, said = called(*command.split(), check=1)
    assert "3 GiB" in said
    assert said.count("GiB") >= 2
    assert "→" in said
    assert out == ""
    assert not Path("new").exists()


@pytest.mark.parametrize(
    "command",
    [
        "eval m text.txt --batch-size 100000000000",  # there are no more windows than the text has
        "generate m --max-new-tokens 3 --batch-size 100000000000 --samples 2",
        "tokenizer train text.txt --out vocabulary --vocab-size 100000000000000000000",
    ],
)
def test_a_limit_that_is_never_reached_needs_nothing(command, made, monkeypatch):
    monkeypatch.chdir(made)
    called(*command.split())


def test_the_process_limit_counts_and_what_fits_goes_on():
    with limited(5 * GIB // 4):
        assert available_memory() <= 5 * GIB // 4
        check_memory("this", {"weights": GIB}, "less")
        with pytest.raises(SurgeryError, match=r"2 GiB.*1\.25 GiB"):
            check_memory("this", {"weights": 2 * GIB}, "less")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"proc/meminfo": "MemAvailable: 1048576 kB\nSwapFree: 1048576 kB\n"}, 2 * GIB),
        (
            {
                "proc/self/cgroup": "0::/box/in\n",
                "groups/box/memory.max": f"{3 * GIB}\n",
                "groups/box/memory.current": f"{2 * GIB}\n",
                "groups/box/memory.stat": f"anon 5\nactive_file {GIB // 2}\ninactive_file 0\n",
                "groups/box/in/memory.max": "max\n",
            },
            3 * GIB // 2,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/box\n0::/\n",
                "groups/memory/box/memory.limit_in_bytes": f"{3 * GIB}\n",
                "groups/memory/box/memory.usage_in_bytes": f"{2 * GIB}\n",
                "groups/memory/box/memory.stat": f"active_file 1\ntotal_active_file {GIB}\n",
                "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            2 * GIB,
        ),
    ],
    ids=["machine", "group", "old group"],
)
def test_what_is_left_is_read_from_the_system(files, expected, tmp_path, monkeypatch):
    files = {"proc/meminfo": "MemAvailable: 999999999 kB\n"} | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "groups")
    assert available_memory() == expected


def test_sizes_are_read_as_gib():
    assert (in_gib(3 * GIB), in_gib(GIB / 8), in_gib(2048 * GIB)) == (
        "3 GiB",
        "0.125 GiB",
        "2,048 GiB",
    )


def test_fit_refuses_before_a_step():
    with pytest.raises(SurgeryError, match=r"batch_size|GiB"):
        fit(model_of(), DATASET, SETTINGS, batch_size=10**14)


@pytest.mark.parametrize("kind", [torch.empty, np.empty], ids=["torch", "numpy"])
def test_memory_that_runs_out_all_the_same_is_a_sentence(kind, made, monkeypatch):
    """The last checkpoint is named, and is whole."""
    monkeypatch.chdir(made)
    run, steps = f"run-{kind.__module__}", []
    gradients = fit_module.TrainingLoop._accumulate_gradients

    def hungry(*arguments, **more):
        steps.append(1)
        if len(steps) == 3:
            with limited(GIB // 4):
                kind(GIB)
        return gradients(*arguments, **more)

    flags = [*SMALL, "--max-steps", 4, "--evaluate-every", 2, "--out", run]
    with monkeypatch.context() as patch:
        patch.setattr(fit_module.TrainingLoop, "_accumulate_gradients", hungry)
        _, said = called("train", "text.txt", *flags, check=1)
    assert "step-00000002" in said
    assert "--batch-size from 4" in said
    assert "Traceback" not in said
    _, said = called("train", "text.txt", *flags, "--resume")
    assert "step 2 of 4" in said


def test_other_commands_say_so_as_well(made, monkeypatch):
    from nanogpt_surgery.formats import opening

    monkeypatch.chdir(made)
    monkeypatch.setattr(opening, "usual_dtype", lambda _: torch.empty(1 << 50))
    _, said = called("generate", "m", check=1)
    assert "memory ran out" in said
    assert "--batch-size" in said


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        torch.OutOfMemoryError("CUDA out of memory"),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("std::bad_alloc"),
        ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    ],
)
def test_errors_of_memory_are_known(error):
    assert is_out_of_memory(error)
    noexec = "libx.so: failed to map segment from shared object: Operation not permitted"
    assert not is_out_of_memory(ImportError(noexec))
    assert not is_out_of_memory(RuntimeError("shapes (2, 3) and (4, 5) do not fit"))
    assert not is_out_of_memory(OSError(28, "No space left on device"))


def test_a_vocabulary_has_no_more_tokens_than_its_text_has_pieces():
    assert BPETokenizer.train("abababab", 10**15).vocab_size < 270
