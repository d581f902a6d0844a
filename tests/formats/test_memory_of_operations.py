"""Operations on folders take memory for a few tensors, however many a model has."""

import ctypes
import gc
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers.models import train_a_little

from nanogpt_surgery import (
    GPTConfig,
    SimpleGPT,
    inject_lora,
    open_model,
    save_adapter,
    save_gguf,
    save_model,
)
from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
from nanogpt_surgery.history.folder_history import undo_folder

STATUS = Path("/proc/self/status")
WIDTH = 512
MMAP_THRESHOLD = -3  # glibc's name of a setting: what is larger has pages of its own


def own_bytes() -> int:
    """Memory of this process that no file holds."""
    lines = STATUS.read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak_bytes():
    """Yields a list that holds the peak in the end, looked at all the time."""
    gc.collect()
    allocator = ctypes.CDLL(None)
    allocator.mallopt(MMAP_THRESHOLD, 1 << 16)  # a tensor that is freed goes back to the system
    allocator.malloc_trim(0)  # what was freed before would be taken again, and not be seen
    before, peak, done, found = own_bytes(), 0, threading.Event(), []

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, own_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        allocator.mallopt(MMAP_THRESHOLD, 1 << 25)  # as glibc's own rises to in time
        found.append(peak - before)


def model_and_adapter(place: Path, family: str, n_layer: int) -> int:
    """Folders with a model in bfloat16 and an adapter for all of it; its size in float32."""
    config = GPTConfig.for_family(
        family, vocab_size=64, n_embd=WIDTH, n_head=8, n_layer=n_layer, block_size=32
    )
    torch.manual_seed(0)
    model = SimpleGPT.from_config(config).bfloat16()
    save_model(model, place / "model")
    inject_lora(model, "all-linear", rank=2)
    train_a_little(model, size=0.05)
    save_adapter(model, place / "adapter")
    return 4 * model.n_parameters


def merged_folder(place: Path) -> None:
    merge_adapter(place / "model", place / "adapter", place / "out", tolerance=9)


def merged_in_place(place: Path) -> None:
    merge_adapter(place / "model", place / "adapter", tolerance=9)
    undo_folder(place / "model")


def merged_gguf(place: Path) -> None:
    merge_into_gguf(place / "model", place / "adapter", place / "out.gguf", "Q8_0", tolerance=9)


def exported(place: Path) -> None:
    model, _ = open_model(place / "model", "each")
    save_model(model, place / "copy", source=place / "model")
    save_gguf(model, place / "copy.gguf", kind="Q8_0")


@pytest.mark.skipif(not STATUS.is_file(), reason="/proc says how much memory there is")
@pytest.mark.filterwarnings("ignore:no tokenizer was written")
@pytest.mark.parametrize(
    ("work", "family"),
    [
        (merged_folder, "llama"),
        *(
            pytest.param(work, family, marks=pytest.mark.slow)
            for work in (merged_folder, merged_in_place, merged_gguf, exported)
            for family in ("llama", "gpt2")
            if (work, family) != (merged_folder, "llama")
        ),
    ],
)
def test_twelve_layers_take_as_much_memory_as_three(work, family, tmp_path):
    peaks = {}
    for n_layer in (3, 3, 12):  # the first time loads code
        place = tmp_path / str(len(peaks)) / str(n_layer)
        size = model_and_adapter(place, family, n_layer)
        with peak_bytes() as found:
            work(place)
        peaks[n_layer] = found[0]
    # Twelve layers in float32 are 150 MB, in bfloat16 75.
    assert size > 12e7
    assert peaks[12] < peaks[3] + size / 8, peaks
