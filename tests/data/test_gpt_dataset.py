import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nanogpt_surgery import CharacterTokenizer, GPTDataset, SurgeryError
from nanogpt_surgery.data.shuffling import shuffled

TEXT = "In the beginning was the word.\n" * 3


def dataset_of(n_ids: int, block_size: int, stride: int = 1) -> GPTDataset:
    """Ids that tell their own place: 0, 1, 2, …"""
    return GPTDataset.from_ids(torch.arange(n_ids, dtype=torch.int32), block_size, stride)


shapes = st.tuples(st.integers(2, 60), st.integers(1, 12), st.integers(1, 9))


@given(shapes)
def test_windows_lie_a_stride_apart_and_targets_one_further(shape):
    n_ids, block_size, stride = shape
    assume(n_ids > block_size)
    dataset = dataset_of(n_ids, block_size, stride)
    for index in range(len(dataset)):
        x, y = dataset[index]
        start = index * stride
        assert x.tolist() == list(range(start, start + block_size))
        assert y.tolist() == list(range(start + 1, start + block_size + 1))
        assert x.dtype == y.dtype == torch.int64


def test_another_stride_takes_the_same_ids():
    dataset = GPTDataset.from_ids(torch.arange(50), 7, 2, "known").with_stride(3)
    assert (dataset.stride, dataset.block_size, dataset.fingerprint) == (3, 7, "known")
    assert dataset[5][0].tolist() == list(range(15, 22))


@given(shapes)
def test_no_further_window_would_fit(shape):
    n_ids, block_size, stride = shape
    assume(n_ids > block_size)
    dataset = dataset_of(n_ids, block_size, stride)
    fitting = [start for start in range(0, n_ids, stride) if start + block_size < n_ids]
    assert len(dataset) == len(fitting)


def test_text_becomes_its_tokenizer_s_ids():
    tokenizer = CharacterTokenizer(TEXT)
    x, y = GPTDataset(TEXT, tokenizer, block_size=7)[4]
    assert tokenizer.decode(x) == TEXT[4:11]
    assert tokenizer.decode(y) == TEXT[5:12]


def test_every_window_is_visited_by_iteration():
    dataset = dataset_of(20, 4, 3)
    assert [int(x[0]) for x, _ in dataset] == [0, 3, 6, 9, 12, 15]


def test_negative_indices_count_from_the_end():
    dataset = dataset_of(20, 4, 3)
    for back in range(1, len(dataset) + 1):
        assert torch.equal(dataset[-back][0], dataset[len(dataset) - back][0])


@pytest.mark.parametrize("index", [6, -7, 100])
def test_an_index_beyond_the_end_is_an_index_error(index):
    with pytest.raises(IndexError, match=rf"{index}\b.*\b6\b"):
        dataset_of(20, 4, 3)[index]


def test_a_text_shorter_than_a_window_is_refused_with_both_numbers():
    with pytest.raises(SurgeryError, match=r"\b5\b.*block_size 5\b.*\b6\b") as caught:
        GPTDataset("abcab", CharacterTokenizer("abc"), block_size=5)
    assert "smaller block_size" in caught.value.hint
    assert len(GPTDataset("abcabc", CharacterTokenizer("abc"), block_size=5)) == 1


@pytest.mark.parametrize(("block_size", "stride"), [(0, 1), (4, 0), (-1, 1)])
def test_sizes_below_one_are_refused(block_size, stride):
    with pytest.raises(SurgeryError, match=f"block_size {block_size} and stride {stride}"):
        dataset_of(20, block_size, stride)


@given(shapes, st.data())
def test_windows_are_the_single_windows_stacked(shape, data):
    n_ids, block_size, stride = shape
    assume(n_ids > block_size)
    dataset = dataset_of(n_ids, block_size, stride)
    indices = data.draw(st.lists(st.integers(0, len(dataset) - 1), min_size=1, max_size=5))
    windows = torch.from_numpy(dataset.gather(np.array(indices)))
    assert torch.equal(windows[:, :-1], torch.stack([dataset[i][0] for i in indices]))
    assert torch.equal(windows[:, 1:], torch.stack([dataset[i][1] for i in indices]))
    assert windows.dtype == torch.int64


def starts(dataset: GPTDataset, steps: range, batch_size: int, seed: int) -> list[int]:
    """Which windows the batches of these steps hold."""
    batches = [dataset.batch(step, batch_size, seed)[0][:, 0] for step in steps]
    return [int(start) // dataset.stride for start in torch.cat(batches)]


@given(shapes, st.integers(0, 10**6), st.integers(1, 7), st.integers(0, 2**40))
def test_a_batch_is_a_pure_function_of_seed_and_step(shape, step, batch_size, seed):
    n_ids, block_size, stride = shape
    assume(n_ids > block_size)
    first, second = dataset_of(n_ids, block_size, stride), dataset_of(n_ids, block_size, stride)
    second.batch(3, 2, 1)
    torch.manual_seed(step)
    np.random.seed(step % 2**32)
    for mine, other in zip(
        first.batch(step, batch_size, seed), second.batch(step, batch_size, seed), strict=True
    ):
        assert mine.shape == (batch_size, block_size)
        assert torch.equal(mine, other)


@given(shapes, st.integers(1, 5), st.integers(0, 2**40))
def test_each_epoch_visits_every_window_once(shape, batch_size, seed):
    n_ids, block_size, stride = shape
    assume(n_ids > block_size)
    dataset = dataset_of(n_ids, block_size, stride)
    epochs = 3
    steps = -(-epochs * len(dataset) // batch_size)
    visited = starts(dataset, range(steps), batch_size, seed)
    for epoch in range(epochs):
        part = visited[epoch * len(dataset) : (epoch + 1) * len(dataset)]
        assert sorted(part) == list(range(len(dataset)))


def test_the_size_of_a_batch_does_not_change_the_order():
    dataset = dataset_of(150, 5)
    assert starts(dataset, range(24), 5, 3) == starts(dataset, range(10), 12, 3)


def test_epochs_and_seeds_have_orders_of_their_own():
    dataset = dataset_of(105, 5)
    orders = [
        tuple(starts(dataset, range(epoch * 100, (epoch + 1) * 100), 1, seed))
        for seed in range(5)
        for epoch in range(4)
    ]
    assert len(set(orders)) == 20
    assert tuple(range(100)) not in orders


@given(st.integers(1, 3000), st.integers(0, 2**50))
def test_shuffled_is_a_bijection(length, key):
    result = shuffled(np.arange(length), length, np.full(length, key))
    assert np.array_equal(np.sort(result), np.arange(length))


def test_shuffled_leaves_its_arguments_alone():
    places, keys = np.arange(10), np.full(10, 4)
    shuffled(places, 10, keys)
    assert places.tolist() == list(range(10))
    assert keys.tolist() == [4] * 10


@pytest.mark.parametrize("length", [2, 3, 7, 20])
def test_shuffled_sends_each_place_anywhere(length):
    """Over many orders every place lands everywhere about equally often."""
    orders = 500 * length
    places, keys = np.tile(np.arange(length), orders), np.arange(orders).repeat(length)
    goals = shuffled(places, length, keys)
    counts = np.zeros((length, length))
    np.add.at(counts, (places, goals), 1)
    assert np.abs(counts / 500 - 1).max() < 0.25  # five standard deviations of a fair draw


def test_neighbours_are_torn_apart():
    length = 5000
    result = shuffled(np.arange(length), length, np.zeros(length, dtype=np.int64))
    correlation = np.corrcoef(np.arange(length), result)[0, 1]
    steps = np.abs(np.diff(result))
    assert abs(correlation) < 0.05
    assert 0.9 < steps.mean() / (length / 3) < 1.1  # the mean distance of two random places


def test_ids_of_a_large_text_are_never_a_python_list():
    class OnlyArrays(CharacterTokenizer):
        def encode(self, text: str) -> list[int]:
            raise AssertionError("asked for a list")

    tokenizer = OnlyArrays(TEXT)
    text = TEXT * 20_000  # 1.9 million characters
    tracemalloc.start()
    try:
        dataset = GPTDataset(text, tokenizer, block_size=64)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(dataset.ids, torch.Tensor)
    assert dataset.ids.dtype == torch.int32
    assert peak < 16 * len(text)  # a list and its array would take 20


def test_a_tokenizer_that_only_encodes_to_lists_serves_too():
    class Plain:
        def encode(self, text: str) -> list[int]:
            return [ord(character) for character in text]

        def decode(self, ids: list[int]) -> str:
            return "".join(map(chr, ids))

    dataset = GPTDataset("hello there", Plain(), block_size=4)
    assert dataset.ids.tolist() == Plain().encode("hello there")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_ids_of_any_width_give_the_same_windows(dtype):
    ids = torch.arange(40).to(dtype)
    x, _ = GPTDataset.from_ids(ids, 6)[5]
    assert x.tolist() == list(range(5, 11))
    assert GPTDataset.from_ids(ids, 6).gather(np.array([5, 2])).dtype == np.int64


def test_it_feeds_a_data_loader():
    dataset = dataset_of(23, 4, 2)
    batches = list(DataLoader(dataset, batch_size=3))
    assert [tuple(x.shape) for x, _ in batches] == [(3, 4), (3, 4), (3, 4), (1, 4)]
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    expected = torch.from_numpy(dataset.gather(np.arange(len(dataset))))
    assert torch.equal(inputs, expected[:, :-1])
    assert torch.equal(targets, expected[:, 1:])


def test_whole_covers_every_target_once_in_order():
    ids = torch.arange(23, dtype=torch.int32)
    for length, size in ((7, 2), (11, 9), (22, 1), (5, 64)):
        batches = list(GPTDataset.from_ids(ids, length, stride=3).iter_all(size))
        assert torch.cat([y.flatten() for _, y in batches]).tolist() == list(range(1, 23))
        assert all(torch.equal(x + 1, y) and x.dtype == torch.int64 for x, y in batches)
        assert all(len(x) <= size and x.size(1) <= length for x, _ in batches)
