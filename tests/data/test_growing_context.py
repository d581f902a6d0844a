import torch

from nanogpt_surgery import GPTDataset, Mixture
from nanogpt_surgery.data.growing_context import growing

IDS = torch.arange(500)


def batches(dataset, steps):
    return [dataset.batch(step, 3, seed=5) for step in range(steps)]


def test_windows_grow_and_batches_keep_their_tokens():
    dataset = growing(GPTDataset.from_ids(IDS, 32), max_steps=9)
    shapes = [tuple(x.shape) for x, _ in batches(dataset, 9)]
    assert shapes == [(12, 8)] * 3 + [(6, 16)] * 3 + [(3, 32)] * 3
    for x, y in batches(dataset, 9):
        assert torch.equal(x + 1, y)


def test_a_batch_follows_from_the_step_alone():
    dataset = growing(GPTDataset.from_ids(IDS, 32), max_steps=9)
    in_order = batches(dataset, 9)
    for step in (8, 0, 4):
        assert torch.equal(dataset.batch(step, 3, seed=5)[0], in_order[step][0])
    assert not torch.equal(dataset.batch(4, 3, seed=6)[0], in_order[4][0])


def test_beyond_the_last_step_the_windows_are_whole():
    dataset = growing(GPTDataset.from_ids(IDS, 32), max_steps=9)
    assert dataset.batch(40, 3)[0].shape == (3, 32)
    assert next(dataset.whole(2))[0].shape == (2, 32)


def test_a_length_that_does_not_divide_is_left_out():
    dataset = growing(GPTDataset.from_ids(IDS, 33), max_steps=4)
    assert {tuple(x.shape) for x, _ in batches(dataset, 4)} == {(3, 33)}


def test_a_mixture_keeps_its_proportions():
    sources = [GPTDataset.from_ids(IDS, 16), GPTDataset.from_ids(IDS + 1000, 16)]
    mixture = Mixture(sources, [3, 1])
    dataset = growing(mixture, max_steps=2 * 1024 // 8)
    rows = torch.cat([dataset.batch(step, 8)[0] for step in range(32)])
    assert rows.shape == (32 * 8 * 4, 4)
    assert (rows[:, 0] >= 1000).sum() == len(rows) // 4
