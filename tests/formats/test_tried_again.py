"""A device that fails for a moment is asked again wherever a model or an adapter is written."""

import errno
import os
from pathlib import Path

import pytest
import torch
from helpers.models import train_a_little

from nanogpt_surgery import (
    GPTConfig,
    SimpleGPT,
    SurgeryError,
    inject_lora,
    open_model,
    save_adapter,
    save_lora_gguf,
    save_mlx_adapter,
    save_model,
)
from nanogpt_surgery.files.atomic import damage
from nanogpt_surgery.files.disk_errors import ATTEMPTS, NotFlushedError
from nanogpt_surgery.formats.folders.merging import merge_adapter, merge_into_gguf
from nanogpt_surgery.history.folder_history import hashes_of, read_journal, undo_folder

pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer was written")


def small(adapted: bool = False) -> SimpleGPT:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_head": 2, "n_layer": 1, "block_size": 8}
    model = SimpleGPT.from_config(GPTConfig.for_family("llama", vocab_size=10, **sizes))
    return adapt(model) if adapted else model.eval()


def adapt(model: SimpleGPT) -> SimpleGPT:
    inject_lora(model, ["q_proj", "v_proj"], rank=2)
    train_a_little(model, size=1.0)
    return model.eval()


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    save_model(small(), tmp_path / "m")
    save_adapter(small(adapted=True), tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanogpt_surgery.files.disk_errors._PAUSE", 0)
    return tmp_path


WRITERS = {
    "model": lambda: save_model(small(), "new"),
    "adapter": lambda: save_adapter(small(adapted=True), "new"),
    "lora gguf": lambda: save_lora_gguf(small(adapted=True), "new"),
    "mlx": lambda: save_mlx_adapter(small(adapted=True), "new"),
    "merged": lambda: merge_adapter("m", "a", "new"),
    "merged gguf": lambda: merge_into_gguf("m", "a", "new", "F32"),
    "merged in place": lambda: merge_adapter("m", "a"),
}
CALLS = {"fsync": os, "replace": Path, "rename": Path}


def failing(monkeypatch, call: str, failures: int) -> list[str]:
    """The device fails the first calls of a kind."""
    failed, owner = [], CALLS[call]
    works = getattr(owner, call)

    def fail(*arguments: object) -> object:
        if len(failed) < failures:
            failed.append(call)
            raise OSError(errno.EIO, "Input/output error")
        return works(*arguments)

    monkeypatch.setattr(owner, call, fail)
    return failed


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("writer", WRITERS)
def test_a_failure_that_passes_is_not_seen(place, monkeypatch, writer, call):
    failed = failing(monkeypatch, call, 2)
    WRITERS[writer]()
    monkeypatch.undo()
    goal = place / ("m" if "in place" in writer else "new")
    if goal.is_dir():
        assert failed and damage(goal) is None
    if "in place" in writer:
        assert len(read_journal(goal).done) == 1
    assert not list(place.glob(".tmp-*"))


@pytest.mark.parametrize("writer", WRITERS)
def test_one_that_stays_is_an_error_that_names_the_place(place, monkeypatch, writer):
    before = hashes_of(place / "m")
    failed = failing(monkeypatch, "fsync", 10_000)
    with pytest.raises(SurgeryError, match=rf"(new|{place / 'm'}).*Input/output error"):
        WRITERS[writer]()
    assert ATTEMPTS <= len(failed) <= ATTEMPTS**2
    monkeypatch.undo()
    assert sorted(path.name for path in place.iterdir()) == ["a", "m"]
    assert hashes_of(place / "m") == before


def test_what_has_taken_its_place_is_not_done_twice(place, monkeypatch):
    """The last flush of an undo fails: a second undo would take the merge before it back, too."""
    before = hashes_of(place / "m")
    merge_adapter("m", "a")
    after = hashes_of(place / "m")
    save_adapter(adapt(open_model("m")[0]), "b")
    merge_adapter("m", "b")
    flush = os.fsync

    def fail(descriptor: int) -> None:
        if os.path.samestat(os.fstat(descriptor), place.stat()):
            raise OSError(errno.EIO, "Input/output error")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotFlushedError):
        undo_folder("m")
    monkeypatch.undo()
    assert hashes_of(place / "m") == after != before
