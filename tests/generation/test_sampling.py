import pytest
import torch
from helpers.sampling import sample
from hypothesis import given
from hypothesis import strategies as st

numbers = st.floats(-20, 20, width=32)
logits_lists = st.lists(numbers, min_size=1, max_size=30, unique=True)


def draws(logits: torch.Tensor, count: int, **settings: object) -> torch.Tensor:
    """How often each id is drawn, (V)."""
    generator = torch.Generator().manual_seed(0)
    ids = [sample(logits, generator=generator, **settings) for _ in range(count)]
    return torch.bincount(torch.tensor(ids), minlength=len(logits))


def assert_drawn_from(counts: torch.Tensor, probabilities: torch.Tensor) -> None:
    """Pearson's chi-squared over its degrees of freedom is near 1 for draws from these."""
    assert not counts[probabilities == 0].any()
    possible = probabilities > 0
    expected = probabilities[possible] * counts.sum()
    assert expected.min() > 5, "too few draws to judge"
    chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_squared / (possible.sum() - 1) < 2.5


LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.3, 1.7, -1.0, 0.9])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    counts = draws(LOGITS, 4000, temperature=temperature)
    assert_drawn_from(counts, torch.softmax(LOGITS / temperature, -1))


@pytest.mark.parametrize("top_k", [2, 4, 6])
def test_top_k_draws_among_the_k_likeliest_alone(top_k):
    counts = draws(LOGITS, 3000, temperature=1.3, top_k=top_k)
    kept = LOGITS.argsort(descending=True)[:top_k]
    probabilities = torch.zeros(7)
    probabilities[kept] = torch.softmax(LOGITS[kept] / 1.3, -1)
    assert_drawn_from(counts, probabilities)


@given(logits_lists, st.integers(0, 30))
def test_temperature_zero_is_the_largest(values, top_k):
    logits = torch.tensor(values)
    largest = max(range(len(values)), key=values.__getitem__)
    assert sample(logits, temperature=0) == largest
    assert sample(logits, temperature=0, top_k=top_k or None) == largest


def test_temperature_zero_leaves_nothing_to_chance():
    state = torch.get_rng_state()
    logits = torch.tensor([0.0, 2.0, 2.0, 2.0])
    assert [sample(logits, temperature=0) for _ in range(20)] == [1] * 20
    assert torch.equal(torch.get_rng_state(), state)


@given(logits_lists, st.floats(0.1, 10), st.integers(0, 2**31))
def test_top_1_is_the_largest(values, temperature, seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = sample(torch.tensor(values), temperature, 1, generator)
    assert drawn == max(range(len(values)), key=values.__getitem__)


@given(logits_lists, st.floats(0.1, 10), st.integers(0, 50), st.integers(0, 2**31))
def test_top_k_from_the_vocabulary_on_is_the_whole_vocabulary(values, temperature, more, seed):
    logits = torch.tensor(values)
    whole = sample(logits, temperature, None, torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    assert sample(logits, temperature, len(values) + more, generator) == whole


@pytest.mark.parametrize("temperature", [1e-3, 1e-10, 1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_largest(temperature):
    logits = torch.tensor([-50.0, 80.0, 3.0, 79.0])
    assert sample(logits, temperature) == 1


def test_a_huge_temperature_draws_evenly():
    counts = draws(LOGITS, 3000, temperature=1e6)
    assert_drawn_from(counts, torch.full((7,), 1 / 7))


def test_a_token_ruled_out_is_never_drawn():
    logits = torch.tensor([0.0, -torch.inf, 0.0])
    assert draws(logits, 200)[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_logits_of_any_width_are_drawn_from(dtype):
    assert 0 <= sample(LOGITS.to(dtype), 0.8, 3) < 7


def test_the_argument_is_left_alone():
    logits = LOGITS.clone()
    sample(logits, 0.5, 2)
    assert torch.equal(logits, LOGITS)


def test_the_users_own_generator_is_left_alone():
    state = torch.get_rng_state()
    sample(LOGITS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), state)
