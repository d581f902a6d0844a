"""What an evaluation reads of a large held-out text."""

import pytest
import torch

from nanogpt_surgery import GPTDataset
from nanogpt_surgery.data.text.mixture import Mixture
from nanogpt_surgery.training.evaluation import Subsampled, subsample

DATA = GPTDataset.from_ids(torch.arange(10_001), 10)  # 1,000 windows side by side


@pytest.mark.parametrize("most", [0, 10_000, 20_000])
def test_a_small_text_is_read_whole(most):
    assert subsample(DATA, most) is DATA


@pytest.mark.parametrize(("most", "share"), [(5000, 2), (3000, 4), (999, 11)])
def test_of_a_large_one_a_part_spread_over_all(most, share):
    part = subsample(DATA, most)
    assert isinstance(part, Subsampled)
    assert part.every == share
    read = torch.cat([x.flatten() for x, _ in part.iter_all(64)])
    assert len(read) == len(read.unique())
    assert read.min() == 0
    assert read.max() >= 10_000 - share * 10
    assert 0 <= len(read) - 10_000 / share < 10
    again = torch.cat([x.flatten() for x, _ in part.iter_all(64)])
    assert torch.equal(read, again)


def test_targets_are_those_of_the_data():
    for x, y in subsample(DATA, 999).iter_all(4):
        assert torch.equal(y, x + 1)
        assert len(x) <= 4


def test_windows_as_long_as_a_part_and_a_short_last_one():
    ids = torch.arange(1_000_004)
    long = GPTDataset.from_ids(ids, 2**15)
    read = [x for x, _ in subsample(long, 2**18).iter_all(64)]
    assert [x.shape for x in read] == [(8, 2**15)]  # of 30 rows 0, 4, … 28
    assert int(read[0][-1, 0]) == 28 * 2**15
    tail = GPTDataset.from_ids(ids[:26], 10)  # two rows, and one of five
    assert [x.shape for x, _ in tail.iter_all(4, every=2)] == [(1, 10), (1, 5)]


def test_each_source_of_a_mixture_takes_part():
    mixed = Mixture([DATA, GPTDataset.from_ids(torch.arange(50_000, 50_021), 10)], [3, 1])
    assert mixed.tokens == 10_020
    read = torch.cat([x.flatten() for x, _ in subsample(mixed, 100).iter_all(64)])
    assert len(read) == 110
    assert read.max() >= 50_000


def test_other_data_is_read_whole():
    class Other:
        block_size = 3

    other = Other()
    assert subsample(other, 1) is other
