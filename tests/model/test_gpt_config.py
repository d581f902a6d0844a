import dataclasses
import inspect
import itertools
import subprocess
import sys

import pytest
import torch
from helpers.models import AXES, CONFIGS, SCALING, random_ids, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nanogpt_surgery import FAMILIES, GPTConfig, KVCache, RopeScaling, SimpleGPT, SurgeryError

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
COMBINATIONS = list(itertools.product(*AXES.values(), (False, True), (False, True)))


def counted(config):
    model = SimpleGPT.from_config(config)
    assert model.n_parameters == config.n_parameters
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("positions", "norm", "mlp", "bias", "qk_norm", "tie_head"), COMBINATIONS)
def test_n_parameters_is_the_count_on_every_combination_of_axes(
    positions, norm, mlp, bias, qk_norm, tie_head
):
    config = GPTConfig(
        vocab_size=53,
        n_embd=20,
        n_head=6,
        n_layer=3,
        block_size=11,
        n_kv_head=2,
        head_dim=8,
        n_inner=28,
        positions=positions,
        norm=norm,
        mlp=mlp,
        bias=bias,
        qk_norm=qk_norm,
        tie_head=tie_head,
    )
    assert config.n_parameters == counted(config)


@given(
    axes=st.sampled_from(COMBINATIONS),
    vocab_size=st.integers(1, 99),
    n_layer=st.integers(1, 3),
    block_size=st.integers(1, 40),
    n_kv_head=st.integers(1, 4),
    groups=st.integers(1, 3),
    half_head_dim=st.integers(1, 5),
    n_embd=st.integers(1, 40),
    n_inner=st.integers(0, 50),
)
def test_n_parameters_is_the_count_at_any_size(
    axes, n_kv_head, groups, half_head_dim, n_embd, **sizes
):
    names = (*AXES, "qk_norm", "tie_head")
    config = GPTConfig(
        n_embd=n_embd,
        n_head=n_kv_head * groups,
        n_kv_head=n_kv_head,
        head_dim=2 * half_head_dim,
        **sizes,
        **dict(zip(names, axes, strict=True)),
    )
    assert config.n_parameters == counted(config)


def counted_flops(forward):
    """With the written-out attention, so that the counter sees its two products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        forward()
    return counter.get_total_flops()


@EVERY_CONFIG
def test_flops_per_token_is_the_count(config):
    model = tiny_model(config)
    for batch, tokens in ((1, 19), (3, 7)):
        ids = random_ids(config, batch, tokens)
        flops = counted_flops(lambda ids=ids: model(ids))
        assert flops == batch * tokens * config.flops_per_token(tokens)
    assert config.flops_per_token() == config.flops_per_token(config.block_size)


@EVERY_CONFIG
def test_flops_per_token_is_the_count_for_one_token_after_a_cache(config):
    model, cache = tiny_model(config), KVCache(config)
    ids = random_ids(config, 1, 12)
    model(ids[:, :11], cache)
    flops = counted_flops(lambda: model(ids[:, 11:], cache))
    assert flops == config.flops_per_token(12)


def test_sizes_left_out_follow_from_the_others():
    config = GPTConfig(65, n_embd=96, n_head=6)
    assert (config.n_kv_head, config.head_dim, config.n_inner) == (6, 16, 4 * 96)
    gated = GPTConfig(65, n_embd=100, n_head=5, mlp="swiglu")
    assert gated.n_inner == 288  # 8 / 3 of 100 is 266.7, up to a multiple of 32


CONTRADICTIONS = [
    ({"vocab_size": 0}, ["vocab_size is 0"]),
    ({"n_embd": -4}, ["n_embd is -4"]),
    ({"n_layer": 2.0}, ["n_layer is 2.0"]),
    ({"n_head": "4"}, ["n_head is '4'"]),
    ({"n_embd": 130, "n_head": 4}, ["n_embd 130", "n_head 4"]),
    ({"n_head": 4, "n_kv_head": 3}, ["n_head 4", "n_kv_head 3"]),
    ({"n_kv_head": -2}, ["n_kv_head is -2"]),
    ({"n_inner": 64.0}, ["n_inner is 64.0"]),
    ({"positions": "rotary", "head_dim": 7}, ["head_dim 7", "pairs"]),
    ({"positions": "rotary", "n_embd": 36, "n_head": 4}, ["head_dim 9", "pairs"]),
    ({"rope_scaling": SCALING}, ["rope_scaling", "'rotary'", "'learned'"]),
    ({"positions": "alibi"}, ["positions is 'alibi'", "learned, rotary"]),
    ({"norm": "batchnorm"}, ["norm is 'batchnorm'", "layernorm, rmsnorm"]),
    ({"mlp": "relu"}, ["mlp is 'relu'", "gelu, gelu_tanh, relu2, swiglu"]),
    ({"bias": True}, ["bias is True", "all, qkv, attention, none"]),
    ({"dropout": 1.0}, ["dropout is 1.0", "below 1"]),
    ({"dropout": -0.1}, ["dropout is -0.1"]),
    ({"norm_eps": 0.0}, ["norm_eps is 0.0"]),
    ({"norm_eps": float("nan")}, ["norm_eps is nan"]),
    ({"norm_eps": "1e-5"}, ["norm_eps is '1e-5'"]),
    ({"rope_theta": 0}, ["rope_theta is 0"]),
    ({"qk_norm": "no"}, ["qk_norm is 'no'"]),
    ({"tie_head": 2}, ["tie_head is 2"]),
]


@pytest.mark.parametrize(("values", "fragments"), CONTRADICTIONS, ids=str)
def test_a_contradiction_is_reported_with_its_numbers(values, fragments):
    with pytest.raises(SurgeryError) as caught:
        GPTConfig(**({"vocab_size": 65} | values))
    for fragment in fragments:
        assert fragment in caught.value.what


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        (
            {"n_head": 0, "norm": "batchnorm", "dropout": 2.0, "norm_eps": -1.0},
            ["n_head is 0", "batchnorm", "dropout is 2.0", "norm_eps is -1"],
        ),
        ({"n_embd": 130, "n_kv_head": 3}, ["n_embd 130", "n_kv_head 3"]),
    ],
)
def test_wrong_values_and_then_contradictions_are_reported_at_once(values, fragments):
    with pytest.raises(SurgeryError) as caught:
        GPTConfig(65, **values)
    for fragment in fragments:
        assert fragment in caught.value.what


def test_a_wrong_size_does_not_hide_a_wrong_value():
    with pytest.raises(SurgeryError) as caught:
        GPTConfig(0, n_layer=-1, mlp="relu", dropout=2.0)
    for fragment in ("vocab_size is 0", "n_layer is -1", "mlp is 'relu'", "dropout is 2.0"):
        assert fragment in caught.value.what


def test_simple_gpt_checks_its_values_too():
    with pytest.raises(SurgeryError, match="n_embd 130 is not a multiple of n_head 4"):
        SimpleGPT(65, n_embd=130)


@pytest.mark.parametrize(
    ("values", "fragments"),
    [
        ((0, 1.0, 4.0, 0), ["factor is 0", "original_max_position_embeddings is 0"]),
        ((0.5, 4.0, 1.0, 8192), ["factor is 0.5", "low_freq_factor 4.0"]),
        ((8.0, 4.0, 1.0, 8192), ["low_freq_factor 4.0", "high_freq_factor 1.0"]),
        (("8", 0, 4.0, 8192), ["factor is '8'", "low_freq_factor is 0"]),
    ],
)
def test_rope_scaling_reports_its_contradictions_at_once(values, fragments):
    with pytest.raises(SurgeryError) as caught:
        RopeScaling(*values)
    for fragment in fragments:
        assert fragment in caught.value.what


@pytest.mark.parametrize("family", FAMILIES)
def test_for_family_takes_the_first_value_of_each_axis(family):
    config = GPTConfig.for_family(family, vocab_size=65, n_layer=2)
    assert (config.vocab_size, config.n_layer) == (65, 2)
    for axis, values in FAMILIES[family].items():
        assert getattr(config, axis) == values[0]


def test_for_family_lets_an_axis_be_changed():
    assert GPTConfig.for_family("gpt2", vocab_size=65, mlp="gelu").mlp == "gelu"


def test_an_unknown_family_is_refused_with_those_there_are():
    with pytest.raises(SurgeryError, match=r"'bert'.*\n.*gpt2 or llama or qwen2 or qwen3"):
        GPTConfig.for_family("bert", vocab_size=65)


def test_the_families_stay_on_the_axes():
    fields = {field.name for field in dataclasses.fields(GPTConfig)}
    for axes in FAMILIES.values():
        assert axes.keys() <= fields
        for axis, allowed in AXES.items():
            assert set(axes[axis]) <= set(allowed)


def test_a_config_is_frozen_and_hashable():
    config = GPTConfig(65)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n_embd = 64
    assert hash(config) == hash(GPTConfig(65))


@EVERY_CONFIG
def test_to_dict_holds_every_field(config):
    values = config.to_dict()
    scaling = values.pop("rope_scaling")
    assert GPTConfig(**values, rope_scaling=RopeScaling(**scaling) if scaling else None) == config


def test_every_field_is_documented():
    source = inspect.getsource(GPTConfig)
    for field in dataclasses.fields(GPTConfig):
        _, _, after = source.partition(f"\n    {field.name}: ")
        assert after.partition("\n")[2].lstrip().startswith('"""'), f"{field.name} has no docstring"


def test_the_config_is_read_without_torch():
    code = "import sys, nanogpt_surgery.model.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
