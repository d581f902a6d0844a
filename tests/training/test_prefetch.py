"""Batches that are made ahead are the batches of their steps."""

import threading

import pytest
import torch
from helpers.training import DATASET, SETTINGS, model_of

from nanogpt_surgery.training.distributed import ALONE
from nanogpt_surgery.training.fast.accelerate import accelerate, made_ahead
from nanogpt_surgery.training.hardware import Hardware, pinned


def test_batches_are_those_of_their_steps():
    hardware = Hardware(torch.device("cpu"), torch.float32, False)
    found = list(accelerate(model_of(), SETTINGS, DATASET, hardware, ALONE).batches(2))
    assert len(found) == 4
    for step, batch in enumerate(found, 2):
        wanted = DATASET.batch(step, SETTINGS.batch_size, SETTINGS.seed)
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


def test_made_ahead_in_another_thread_in_order():
    threads = []

    def make(step: int) -> tuple[int, ...]:
        threads.append(threading.get_ident())
        return (step,)

    assert list(made_ahead(make, range(3, 9))) == [(step,) for step in range(3, 9)]
    assert threading.get_ident() not in threads
    assert len(threads) == 6
    assert list(made_ahead(make, range(4, 4))) == []


def test_one_batch_is_made_while_the_one_before_is_used():
    made = [threading.Event() for _ in range(3)]
    coming = made_ahead(lambda step: (made[step].set(),), range(3))
    next(coming)
    assert made[1].wait(60)
    assert not made[2].is_set()
    coming.close()


def test_what_a_dataset_raises_arrives():
    def make(step: int) -> tuple[int, ...]:
        raise ValueError(f"step {step}")

    with pytest.raises(ValueError, match="step 0"):
        next(made_ahead(make, range(2)))


def test_what_is_pinned_is_dense(monkeypatch):
    """A GPU's copy of a strided tensor is first made dense in memory that is not pinned."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs a GPU
    batch = DATASET.batch(0, 3)
    assert not batch[0].is_contiguous()
    for part, dense in zip(batch, map(pinned, batch), strict=True):
        assert dense.is_contiguous()
        assert torch.equal(part, dense)
