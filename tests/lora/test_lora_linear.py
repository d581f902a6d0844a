import pytest
import torch
from helpers.adapters import merged_layer
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nanogpt_surgery import LoRALinear, SurgeryError

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8))


def linear(in_features: int, out_features: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(in_features, out_features, bias=bias)


def trained(layer: LoRALinear, seed: int = 1) -> LoRALinear:
    """The layer with an update as training leaves it: nowhere zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=draw))
    return layer


@given(shapes, st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5]))
def test_born_changing_nothing(shape, bias, training, dropout):
    in_features, out_features, rank = shape
    original = linear(in_features, out_features, bias)
    x = torch.randn(3, 2, in_features)
    expected = original(x)
    layer = LoRALinear(original, rank, 7, dropout).train(training)
    assert torch.equal(layer(x), expected)
    assert not layer.delta_weight().any()


def test_a_is_kaiming_uniform_and_b_is_zero():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 7), rank=50)
    bound = 1 / 400**0.5  # what nn.Linear's own weights are drawn from
    assert layer.lora_A.shape == (50, 400)
    assert layer.lora_B.shape == (7, 50)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.abs().max() > 0.99 * bound
    assert abs(layer.lora_A.std() * 3**0.5 / bound - 1) < 0.02
    assert not layer.lora_B.any()


@given(shapes, st.sampled_from([1, 4, 0.7, 33.3]))
def test_the_update_is_b_a_scaled_by_alpha_over_rank(shape, alpha):
    in_features, out_features, rank = shape
    layer = trained(LoRALinear(linear(in_features, out_features), rank, alpha)).double()
    assert layer.scaling == alpha / rank
    x = torch.randn(5, in_features, dtype=torch.float64)
    weight, bias = layer.original_layer.weight, layer.original_layer.bias
    by_hand = x @ (weight + alpha / rank * layer.lora_B @ layer.lora_A).T + bias
    torch.testing.assert_close(layer(x), by_hand)
    by_hand = (alpha / rank * layer.lora_B @ layer.lora_A).float()
    torch.testing.assert_close(layer.delta_weight(), by_hand)


@given(shapes)
def test_the_rank_of_the_update_is_at_most_r(shape):
    in_features, out_features, rank = shape
    layer = trained(LoRALinear(linear(in_features, out_features), rank))
    singular_values = torch.linalg.svdvals(layer.delta_weight().double())
    assert (singular_values > 1e-5 * singular_values[0]).sum() <= rank


@pytest.mark.parametrize("training", [True, False])
def test_an_update_takes_part_in_both_modes(training):
    layer = trained(LoRALinear(linear(6, 5))).train(training)
    x = torch.randn(4, 6)
    assert not torch.allclose(layer(x), layer.original_layer(x), atol=0.1)


def test_only_a_and_b_get_gradients():
    layer = trained(LoRALinear(linear(6, 5)))
    layer(torch.randn(4, 6)).square().sum().backward()
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {
        name for name, p in layer.named_parameters() if p is layer.lora_A or p is layer.lora_B
    }
    assert layer.lora_A.grad.abs().min() > 0
    assert layer.lora_B.grad.abs().min() > 0
    assert layer.original_layer.weight.grad is None
    assert layer.original_layer.bias.grad is None


def test_at_birth_the_first_step_moves_b():
    layer = LoRALinear(linear(6, 5))
    layer(torch.randn(4, 6)).square().sum().backward()
    assert layer.lora_B.grad.abs().max() > 0
    assert not layer.lora_A.grad.any()  # B is zero, so nothing comes down to A yet


def test_dropout_is_on_the_update_alone():
    layer = trained(LoRALinear(linear(40, 5), dropout=0.5)).train()
    x = torch.randn(3, 40)
    original, update = layer.original_layer(x), x @ layer.delta_weight().T
    changes = torch.stack([layer(x) - original for _ in range(4000)])
    assert changes.std(0).min() > 0.01
    # the mean over the draws is the update without dropout: the original is never dropped
    error = (changes.mean(0) - update).abs() / (changes.std(0) / 4000**0.5)
    assert error.max() < 5
    layer.eval()
    torch.testing.assert_close(layer(x), original + update, atol=1e-5, rtol=1e-5)


def test_without_dropout_no_random_number_is_drawn():
    layer = LoRALinear(linear(6, 5)).train()
    state = torch.get_rng_state()
    layer(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_original_keeps_its_own_tensors():
    original = linear(6, 5)
    weight, bias = original.weight, original.bias
    layer = LoRALinear(original)
    assert layer.original_layer is original
    assert original.weight is weight
    assert original.bias is bias


@given(shapes, st.booleans())
def test_merged_and_adapted_agree_within_float32(shape, bias):
    in_features, out_features, rank = shape
    layer = trained(LoRALinear(linear(in_features, out_features, bias), rank))
    x = torch.randn(9, in_features)
    merged = merged_layer(layer)
    assert type(merged) is nn.Linear
    assert (merged.in_features, merged.out_features) == (in_features, out_features)
    assert merged.bias is layer.original_layer.bias
    adapted = layer(x)
    assert (merged(x) - adapted).abs().max() <= 1e-5 * max(1.0, adapted.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merge_into_few_bits_is_rounded_once(dtype):
    layer = trained(LoRALinear(linear(60, 50).to(dtype)))
    with torch.no_grad():
        layer.lora_B.mul_(0.02)  # of the size of the weights' own rounding
    assert layer.lora_A.dtype == torch.float32
    exact = layer.original_layer.weight.double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    merged = merged_layer(layer).weight
    assert merged.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal  # under it the spacing no longer shrinks
    spacing = torch.finfo(dtype).eps * 2 ** exact.abs().clamp(smallest).log2().floor()
    error = ((merged.double() - exact).abs() / spacing).max()
    assert error <= 0.5 + 1e-3  # half a unit in the last place: the nearest number there is
    # An update rounded before it is added loses more.
    twice = layer.original_layer.weight + layer.delta_weight().to(dtype)
    assert ((twice.double() - exact).abs() / spacing).max() > error


def test_merging_writes_to_nothing():
    layer = trained(LoRALinear(linear(6, 5)))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    merged = merged_layer(layer)
    assert merged.weight.data_ptr() != layer.original_layer.weight.data_ptr()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_it_computes_in_the_input_s_dtype():
    layer = trained(LoRALinear(linear(6, 5).bfloat16()))
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_printing_shows_rank_and_alpha():
    shown = repr(LoRALinear(linear(6, 5), rank=3, alpha=12))
    assert "rank=3" in shown
    assert "alpha=12" in shown


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank is 0; it must be a positive integer"),
        ({"rank": -2}, "rank is -2"),
        ({"rank": 2.5}, "rank is 2.5"),
        ({"rank": "8"}, "rank is '8'"),
        ({"rank": True}, "rank is True"),
        ({"alpha": "3"}, "alpha is '3'; it must be a number above 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": -1}, "alpha is -1"),
        ({"dropout": "x"}, "dropout is 'x'; it must be a number of at least 0 and below 1"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dropout": 1.5, "rank": 0}, "rank is 0.*dropout is 1.5"),
    ],
)
def test_what_no_update_can_have_is_refused_as_the_settings_are(wrong, said):
    original = linear(6, 5)
    with pytest.raises(SurgeryError, match=said):
        LoRALinear(original, **wrong)
    assert original.weight.requires_grad


@pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 1), nn.LayerNorm(4), "a name"])
def test_what_is_not_a_linear_is_refused(layer):
    with pytest.raises(SurgeryError, match="not a " + type(layer).__name__):
        LoRALinear(layer)
