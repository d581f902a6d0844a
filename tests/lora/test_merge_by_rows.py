"""A merge is one pass over some rows of a layer at a time, and its figures are as defined."""

import threading

import pytest
import torch
from helpers.models import train_a_little
from torch import nn

from nanogpt_surgery import (
    LoRALinear,
    SurgeryError,
    blend_lora,
    inject_lora,
    merge_lora,
    merge_survival,
)
from nanogpt_surgery.lora.merging import CHUNK, ROUNDINGS, add_update
from nanogpt_surgery.lora.several import lora_layers

IN, OUT = 300, 1100
assert OUT * IN > 2 * CHUNK, "three parts, the last one shorter"


class Both(nn.Module):
    """A Linear and an Embedding, each larger than what is worked on at once."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.linear = nn.Linear(IN, OUT).to(dtype)
        self.table = nn.Embedding(OUT, IN).to(dtype)


def adapted(dtype: torch.dtype, adapters: int = 1, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    model = Both(dtype)
    for i in range(adapters):
        inject_lora(model, ["linear", "table"], rank=4, name=f"n{i}", **settings)
        train_a_little(model, size=0.3)
    if adapters > 1:
        blend_lora(model, {f"n{i}": 0.5 + i for i in range(adapters)})
    return model


CASES = {
    "bfloat16": (torch.bfloat16, 1, {}),
    "float16": (torch.float16, 1, {}),
    "float32": (torch.float32, 1, {}),
    "float64": (torch.float64, 1, {}),
    "two": (torch.bfloat16, 2, {}),
    "dora": (torch.bfloat16, 1, {"dora": True}),
    "pissa": (torch.bfloat16, 1, {"pissa": True}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_figures_are_those_of_their_definitions_in_float64(case):
    dtype, adapters, settings = case
    model = adapted(dtype, adapters, **settings)
    for layer in lora_layers(model).values():
        weight, delta = layer.original_layer.weight.detach(), layer.delta_weight()
        wide = torch.promote_types(dtype, torch.float32)
        merged, row = add_update(layer)
        assert torch.equal(merged, (weight.to(wide) + delta).to(dtype))
        w, d, after = weight.double(), delta.double(), merged.double()
        lost = (after - w - d).square().sum() / d.square().sum()
        assert row["dtype"] == str(dtype).removeprefix("torch.")
        assert row["change kept"] == pytest.approx(float(1 - lost), rel=1e-6)
        assert row["ΔW / W"] == pytest.approx(float(d.norm() / w.norm()), rel=1e-6)
        assert row["weights changed"] == float((after != w).double().mean())
        error = (after - (weight.to(wide) + delta).double()).abs().max()
        assert row["largest error"] == float(error)


def test_survival_is_that_of_its_definition_in_float64():
    model = adapted(torch.bfloat16)
    for row, layer in zip(merge_survival(model).rows, lora_layers(model).values(), strict=True):
        weight, delta = layer.original_layer.weight.detach().float(), layer.delta_weight()
        assert 0 < row["int4"] < row["int8"] < row["bfloat16"] < 1
        for name, rounded in ROUNDINGS.items():
            arrived = (rounded(weight + delta) - rounded(weight)).double()
            lost = (arrived - delta.double()).square().sum() / delta.double().square().sum()
            assert row[name] == pytest.approx(float(1 - lost), rel=1e-6), name


@pytest.mark.parametrize("row", [0, OUT - 1])
def test_a_number_that_is_not_finite_is_seen_wherever_it_is(row):
    model = nn.Sequential(nn.Linear(IN, OUT).bfloat16())
    inject_lora(model, "0", rank=2)
    train_a_little(model)
    lora_layers(model)["0"].lora_B.data[row, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"NaN or infinite in 1 layers \(0\)"):
        merge_lora(model)


def test_pytorch_has_as_many_threads_afterwards_as_before():
    before, later = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        model = adapted(torch.float32)
        merge_survival(model)
        merge_lora(model)
        thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert (torch.get_num_threads(), later) == (3, [3])
    finally:
        torch.set_num_threads(before)


def test_a_merge_takes_little_more_memory_than_the_merged_layer():
    """Whatever is made on the way is as large as some rows."""
    layer = LoRALinear(nn.Linear(1024, 4096, bias=False).bfloat16(), rank=2)
    nn.init.normal_(layer.lora_B, std=0.01)
    with torch.profiler.profile(profile_memory=True) as profile:
        merged, _ = add_update(layer)
    sizes = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
    assert max(sizes) == merged.nbytes
    assert sorted(sizes)[-2] <= 8 * CHUNK  # a part in float64
