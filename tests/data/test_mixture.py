"""Sources in their proportions, each without repetition, from the number of a row alone."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_surgery import GPTDataset, Mixture, SurgeryError
from nanogpt_surgery.data.text.mixture import whole_shares


def source(start: int, n_ids: int, block_size: int = 4) -> GPTDataset:
    """Ids that tell their source and place: start, start + 1, …"""
    return GPTDataset.from_ids(torch.arange(start, start + n_ids), block_size)


def mixture(weights=(3, 1)) -> Mixture:
    return Mixture([source(1000 * i, 40 + 9 * i) for i in range(len(weights))], weights)


@pytest.mark.parametrize(
    ("weights", "shares"),
    [((3, 1), [3, 1]), ((0.75, 0.25), [3, 1]), ((0.1, 0.2, 0.7), [1, 2, 7]), ((2, 2), [1, 1])],
)
def test_weights_become_whole_shares(weights, shares):
    assert whole_shares(weights, len(shares)) == shares


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 2**40))
def test_proportions_are_exact_after_each_group(weights, seed):
    mixed = mixture(tuple(weights))
    size = sum(mixed.counts)
    for group in range(3):
        sources, _ = mixed.drawn(range(group * size, (group + 1) * size), seed)
        for index, weight in enumerate(weights):
            assert (sources == index).sum() == size * Fraction(weight, sum(weights))


def test_the_order_of_the_sources_is_drawn():
    sources, _ = mixture().drawn(range(1024), seed=5)
    other, _ = mixture().drawn(range(1024), seed=6)
    runs = (sources[1:] != sources[:-1]).sum()
    assert 300 < runs < 450  # 2 · 3/4 · 1/4 of 1,023 seams, were each row drawn alone
    assert (sources != other).any()


def test_each_source_is_seen_whole_before_any_window_comes_again():
    mixed = mixture()
    sources, places = mixed.drawn(range(4000), seed=3)
    for index, part in enumerate(mixed.sources):
        seen = places[sources == index]
        for start in range(0, len(seen) - len(part), len(part)):
            assert sorted(seen[start : start + len(part)]) == list(range(len(part)))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(0, 2**40))
def test_a_batch_is_a_pure_function_of_seed_and_step(step, batch_size, seed):
    first, second = mixture(), mixture()
    for other in range(12):
        second.batch(other * 300, 7, other)
    for mine, theirs in zip(
        first.batch(step, batch_size, seed), second.batch(step, batch_size, seed), strict=True
    ):
        assert mine.shape == (batch_size, 4)
        assert mine.dtype == torch.int64
        assert torch.equal(mine, theirs)


def test_a_row_is_the_window_that_was_drawn():
    mixed = mixture((1, 2, 1))
    sources, places = mixed.drawn(range(14, 21), seed=9)
    x, y = mixed.batch(2, 7, 9)
    for row, (index, place) in enumerate(zip(sources, places, strict=True)):
        wanted = mixed.sources[index][int(place)]
        assert torch.equal(x[row], wanted[0])
        assert torch.equal(y[row], wanted[1])


@pytest.mark.parametrize("data", [mixture((2, 1)), source(0, 70)])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_the_batch_of_one_process(data, world_size):
    for step in (0, 700):
        parts = [data.batch(step, 8, 3, rank=r, world_size=world_size) for r in range(world_size)]
        assert [len(x) for x, _ in parts] == [8 // world_size] * world_size
        joined = [torch.cat(of_ranks) for of_ranks in zip(*parts, strict=True)]
        for mine, whole in zip(joined, data.batch(step, 8, 3), strict=True):
            assert torch.equal(mine, whole)


def test_a_batch_that_ranks_cannot_share_is_refused():
    with pytest.raises(SurgeryError, match=r"\b8\b.*\b3\b") as caught:
        source(0, 70).batch(0, 8, rank=1, world_size=3)
    assert "multiple of 3" in caught.value.hint


def test_all_of_it_is_measured_once():
    mixed = mixture((5, 1))
    targets = torch.cat([y.flatten() for _, y in mixed.iter_all(3)])
    assert targets.tolist() == [*range(1, 40), *range(1001, 1049)]


def test_another_stride_keeps_the_proportions():
    spaced = mixture((5, 1)).with_stride(4)
    assert [s.stride for s in spaced.sources] == [4, 4]
    rows = spaced.batch(0, sum(mixture((5, 1)).counts))[0]
    assert int((rows[:, 0] < 1000).sum()) == 5 * int((rows[:, 0] >= 1000).sum())
    assert set((rows[:, 0] % 1000 % 4).tolist()) == {0}


def test_passes_count_tokens():
    mixed = mixture()  # 3 : 1, sources of 39 and 48 targets
    assert mixed.passes(400) == pytest.approx([300 * 4 / 39, 100 * 4 / 48])


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ((1,), r"\b2\b.*\b1\b"),
        ((1, 0), r"\b0\b"),
        ((1, float("nan")), "nan"),
        ((-1, 1), "-1"),
        ((1, 1e-9), "1, 1e-09"),
        ((1.2345, 4.4321), "1.2345, 4.4321"),
    ],
)
def test_weights_that_cannot_be_drawn_are_refused(weights, said):
    with pytest.raises(SurgeryError, match=said):
        Mixture([source(0, 20), source(0, 20)], weights)


def test_sources_of_other_windows_are_refused():
    with pytest.raises(SurgeryError, match="3, 4"):
        Mixture([source(0, 20), source(0, 20, 3)], (1, 1))
    with pytest.raises(SurgeryError, match="no source"):
        Mixture([], ())
