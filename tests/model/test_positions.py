import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import GPTConfig, RopeScaling
from nanogpt_surgery.model.embeddings import make_positions, rotary_frequencies, rotate

LLAMA_3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)


def config(**changes):
    return GPTConfig.for_family("llama", vocab_size=31, n_embd=48, n_head=4, **changes)


def turned(x, place, **changes):
    _, rotation = make_positions(config(**changes))(x, torch.tensor([place]))
    return rotate(x, rotation)


@given(place=st.integers(0, 200), distance=st.integers(0, 50))
def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone(place, distance):
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 12, dtype=torch.float64)
    here = (turned(q, place + distance) * turned(k, place)).sum()
    there = (turned(q, distance) * turned(k, 0)).sum()
    # The angles are float32's.
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3)


def test_a_rotation_keeps_lengths_and_the_first_position_as_it_is():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 1, 12)
    torch.testing.assert_close(turned(x, 77).norm(), x.norm())
    assert torch.equal(turned(x, 0), x)


def test_number_i_is_turned_with_number_i_plus_half_the_width():
    x = torch.zeros(1, 1, 1, 12)
    x[..., 2] = 1.0
    angle = 5 * 10000.0 ** (-2 * 2 / 12)
    y = turned(x, 5).flatten()
    expected = torch.zeros(12)
    expected[2], expected[8] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(y, expected)


def test_frequencies_fall_from_one_by_the_power_of_theta():
    frequencies = rotary_frequencies(config(rope_theta=500.0))
    expected = [500.0 ** (-2 * i / 12) for i in range(6)]
    torch.testing.assert_close(frequencies, torch.tensor(expected))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaling_keeps_short_waves_and_slows_long_ones(head_dim):
    plain = rotary_frequencies(config(head_dim=head_dim, rope_theta=500000.0))
    scaled = rotary_frequencies(
        config(head_dim=head_dim, rope_theta=500000.0, rope_scaling=LLAMA_3)
    )
    wavelengths = 2 * math.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    assert short.any() and long.any() and not (short | long).all()
    torch.testing.assert_close(scaled[short], plain[short])
    torch.testing.assert_close(scaled[long], plain[long] / 8)
    between = ~(short | long)
    share = (8192 / wavelengths[between] - 1) / (4 - 1)
    expected = (1 - share) * plain[between] / 8 + share * plain[between]
    torch.testing.assert_close(scaled[between], expected)


def test_angles_are_not_rounded_with_the_model():
    positions = make_positions(config()).bfloat16()
    assert positions.frequencies.dtype == torch.float32


def test_angles_exist_on_a_model_built_without_a_body():
    with torch.device("meta"):
        positions = make_positions(config())
    assert torch.equal(positions.frequencies, rotary_frequencies(config()))


def test_learned_positions_are_a_row_of_the_table_added():
    positions = make_positions(GPTConfig(31, n_embd=12, block_size=9))
    x = torch.randn(2, 3, 12)
    y, rotation = positions(x, torch.tensor([4, 5, 6]))
    assert rotation is None
    assert torch.equal(y, x + positions.weight[4:7])
