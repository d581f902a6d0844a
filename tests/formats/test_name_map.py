import pytest
import torch
from helpers.models import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery.formats.huggingface.name_map import (
    NAME_MAPS,
    each_layer,
    normal_names,
    to_ours,
    to_theirs,
)


def rows(family, n_layer):
    return list(each_layer(NAME_MAPS[family], n_layer))


EVERY_FAMILY = pytest.mark.parametrize(
    ("name", "config"), FAMILY_CONFIGS.items(), ids=FAMILY_CONFIGS
)


@EVERY_FAMILY
def test_there_and_back_again_every_bit_is_the_same(name, config):
    family = name.partition("-")[0]
    tensors = tiny_model(config).state_dict()
    there = to_theirs(tensors, rows(family, config.n_layer))
    back, unknown = to_ours(there, rows(family, config.n_layer))
    assert unknown == []
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensors[key]) for key in tensors)


@pytest.mark.parametrize("family", NAME_MAPS)
def test_no_name_stands_twice_in_a_table(family):
    table = list(rows(family, 3))
    ours = [name for row in table for name in row.ours]
    theirs = [row.theirs for row in table]
    assert len(set(ours)) == len(ours)
    assert len(set(theirs)) == len(theirs)


def test_gpt2_stacks_q_k_v_in_this_order_and_turns_them():
    config = FAMILY_CONFIGS["gpt2"]
    tensors = tiny_model(config).state_dict()
    theirs = to_theirs(tensors, rows("gpt2", config.n_layer))
    fused = theirs["transformer.h.1.attn.c_attn.weight"]
    assert fused.shape == (24, 72)
    for i, part in enumerate("qkv"):
        ours = tensors[f"layers.1.self_attn.{part}_proj.weight"]
        assert torch.equal(fused[:, 24 * i : 24 * (i + 1)], ours.t())
    square = theirs["transformer.h.1.attn.c_proj.weight"]
    assert torch.equal(square, tensors["layers.1.self_attn.o_proj.weight"].t())


def test_what_has_no_place_is_named():
    tensors = {
        "model.norm.weight": torch.ones(3),
        "extra": torch.ones(3),
        "norm.weight": torch.ones(3),
    }
    converted, unknown = to_ours(tensors, rows("llama", 1))
    assert list(converted) == ["norm.weight"]
    assert unknown == ["extra", "norm.weight"]


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3, 2), (2, 3, 4)])
def test_a_tensor_of_any_shape_is_passed_on_to_be_judged(shape):
    tensors = {"transformer.h.0.attn.c_attn.weight": torch.ones(shape)}
    converted, unknown = to_ours(tensors, rows("gpt2", 1))
    assert len(converted) == 3
    assert unknown == []


def test_older_gpt2_files_have_masks_and_no_prefix():
    tensors = {
        "wte.weight": torch.ones(1),
        "h.0.attn.bias": torch.ones(1),
        "h.0.attn.masked_bias": torch.ones(1),
        "h.0.attn.c_attn.bias": torch.ones(1),
        "transformer.h.1.attn.bias": torch.ones(1),
        "lm_head.weight": torch.ones(1),
    }
    assert list(normal_names(tensors, "gpt2")) == [
        "transformer.wte.weight",
        "transformer.h.0.attn.c_attn.bias",
        "lm_head.weight",
    ]


def test_older_llama_files_have_rotary_frequencies():
    tensors = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(1),
        "model.norm.weight": torch.ones(1),
    }
    assert list(normal_names(tensors, "llama")) == ["model.norm.weight"]
