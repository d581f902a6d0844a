"""What an evaluation reads of a large held-out text."""

import pytest
import torch

from nanogpt_surgery import GPTDataset
from nanogpt_surgery.data.batches import Spread, held_out

DATA = GPTDataset.from_ids(torch.arange(10_001), 10)  # 1,000 windows side by side


@pytest.mark.parametrize("most", [0, 10_000, 20_000])
def test_a_small_text_is_read_whole(most):
    assert held_out(DATA, most) is DATA


@pytest.mark.parametrize(("most", "share"), [(5000, 2), (3000, 4), (999, 11)])
def test_of_a_large_one_a_part_spread_over_all(most, share):
    part = held_out(DATA, most)
    assert isinstance(part, Spread)
    assert part.share == share
    read = torch.cat([x.flatten() for x, _ in part.whole(64)])
    assert len(read) == len(read.unique())
    assert read.min() == 0
    assert read.max() >= 10_000 - share * 16 * 10
    assert abs(len(read) - 10_000 / share) <= 16 * 10
    again = torch.cat([x.flatten() for x, _ in part.whole(64)])
    assert torch.equal(read, again)


def test_targets_are_those_of_the_data():
    for x, y in held_out(DATA, 999).whole(4):
        assert torch.equal(y, x + 1)
        assert len(x) <= 4
