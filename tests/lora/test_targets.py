import re

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, tiny_model
from torch import nn

from nanogpt_surgery import SurgeryError, inject_lora, plan_lora
from nanogpt_surgery.lora.targets import find_targets

LLAMA = FAMILY_CONFIGS["llama"]
LINEARS = [
    f"layers.{i}.{name}"
    for i in (0, 1)
    for name in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
]


def found(targets, model=None) -> list[str]:
    matches = find_targets(model or tiny_model(LLAMA), targets)
    return [name for names in matches.values() for name in names]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("q_proj", ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]),
        ("mlp.up_proj", ["layers.0.mlp.up_proj", "layers.1.mlp.up_proj"]),
        ("layers.1.mlp.up_proj", ["layers.1.mlp.up_proj"]),
        ("1.mlp.up_proj", ["layers.1.mlp.up_proj"]),
        ("lm_head", ["lm_head"]),
        (
            r".*\.1\.self_attn\.[kv]_proj",
            ["layers.1.self_attn.k_proj", "layers.1.self_attn.v_proj"],
        ),
        (r"layers\.0\..*(up|down)_proj", ["layers.0.mlp.up_proj", "layers.0.mlp.down_proj"]),
        ("all-linear", LINEARS),
        (r".*", ["embed_tokens", *LINEARS, "lm_head"]),
    ],
)
def test_a_pattern_is_a_name_an_ending_or_an_expression(pattern, expected):
    assert found(pattern) == found([pattern]) == expected


def test_an_ending_begins_after_a_dot():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2)})
    assert found("proj", model) == ["proj"]


def test_each_pattern_has_its_own_matches():
    matches = find_targets(tiny_model(LLAMA), ["v_proj", "lm_head"])
    assert matches == {
        "v_proj": ["layers.0.self_attn.v_proj", "layers.1.self_attn.v_proj"],
        "lm_head": ["lm_head"],
    }


@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_all_linear_leaves_the_output_layer_out(config):
    model = tiny_model(config)
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert found("all-linear", model) == [name for name in names if name != "lm_head"]


def test_no_match_lists_the_real_names_and_the_nearest():
    with pytest.raises(SurgeryError) as caught:
        found("q_prj")
    assert "'q_prj'" in caught.value.what
    for name in ("q_proj", "down_proj", "lm_head", "layers.0.self_attn.q_proj", "15 Linears"):
        assert name in caught.value.what
    assert "q_proj" in caught.value.hint
    assert "down_proj" not in caught.value.hint


@pytest.mark.parametrize("joined", ["q_proj,v_proj", "q_proj, v_proj,"])
def test_names_joined_by_commas_are_shown_apart(joined):
    with pytest.raises(SurgeryError) as caught:
        found(joined)
    assert caught.value.hint.endswith(": q_proj v_proj")
    with pytest.raises(SurgeryError) as caught:
        found("q_proj,v_prj")
    assert "nearest" in caught.value.hint


def test_every_pattern_without_a_match_is_told():
    with pytest.raises(SurgeryError) as caught:
        found(["q_proj", "c_attn", "gate"])
    assert "'c_attn'" in caught.value.what
    assert "'gate'" in caught.value.what
    assert "'q_proj'" not in caught.value.what


@pytest.mark.parametrize(
    "pattern", ["self_attn", "norm", "layers.2.mlp.up_proj", "proj", r"layers\.\d"]
)
def test_what_is_no_linear_does_not_match(pattern):
    with pytest.raises(SurgeryError, match=re.escape(repr(pattern))):
        found(pattern)


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(SurgeryError, match=r"'\*_proj'"):
        found("*_proj")


@pytest.mark.parametrize("targets", [[], ()])
def test_no_target_is_refused(targets):
    with pytest.raises(SurgeryError, match="all-linear"):
        found(targets)


@pytest.mark.parametrize("targets", [None, 5, ["q_proj", 3], [None], b"q_proj", {"a": 1}.items()])
def test_targets_of_another_type_are_refused(targets):
    with pytest.raises(SurgeryError, match=r"targets are .*; they must be text") as caught:
        found(targets)
    assert "all-linear" in caught.value.hint


def test_a_module_that_is_itself_a_linear_has_nothing_to_replace_it_in():
    with pytest.raises(SurgeryError, match=r"no Linear .*the model has none") as caught:
        found("all-linear", nn.Linear(2, 2))
    assert "nn.Sequential" in caught.value.hint


def unfit() -> nn.Module:
    return nn.Sequential(
        nn.Linear(3, 3, device="meta"),
        nn.LazyLinear(3),
        nn.Linear(3, 3, dtype=torch.complex64),
        nn.Embedding(4, 3, device="meta"),
    )


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("0", "0 is an nn.Linear on the meta device, without numbers"),
        ("1", "1 is a LazyLinear, which has no size before its first call"),
        ("2", "2 is an nn.Linear of complex64 numbers"),
        ("3", "3 is an nn.Embedding on the meta device"),
        ("all-linear", r"0 is an nn.Linear on the meta device.*; the model has none"),
    ],
)
def test_a_layer_without_real_numbers_is_refused_with_the_reason(target, reason):
    model = unfit()
    for verb in (plan_lora, inject_lora):
        with pytest.raises(SurgeryError, match=reason):
            verb(model, target)


def test_a_lazy_layer_can_be_adapted_once_it_has_a_size():
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.ones(2, 5))
    assert found("0", model) == ["0"]
