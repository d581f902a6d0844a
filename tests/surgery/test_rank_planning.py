"""A budget of parameters becomes ranks, where the gradients say that they help most."""

import pytest
import torch
from helpers.adapters import assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model
from torch import nn

from nanogpt_surgery import SurgeryError, inject_lora
from nanogpt_surgery.model.loss import cross_entropy
from nanogpt_surgery.surgery import plan_ranks
from nanogpt_surgery.surgery.rank_planning import _bought

LLAMA = CONFIGS["llama"]


def batches(count=4, config=LLAMA):
    ids = [random_ids(config, 2, 9, seed) for seed in range(count)]
    return [(one[:, :-1], one[:, 1:]) for one in ids]


@pytest.mark.parametrize("budget", [500, 5_000, 10**9])
def test_the_plan_keeps_to_the_budget_and_can_be_injected(budget):
    model = tiny_model(LLAMA)
    before = bits(model)
    plan = plan_ranks(model, batches(), budget, rank=4, alpha=8)
    assert_same_bits(model, before)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    used = plan.report.summary["trainable_parameters"]
    assert used <= budget
    report = inject_lora(model, **plan.options)
    assert report.summary["trainable_parameters"] == used
    assert {row["layer"]: row["rank"] for row in report.rows} == plan.rank_pattern
    assert all(row["alpha"] == 2 * row["rank"] for row in report.rows)
    assert not any("lm_head" in name for name in plan.targets)


def test_a_layer_whose_gradient_has_one_direction_gets_one_rank():
    """The loss of all batches depends on one output of one layer alone, and the same way."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 4), nn.Linear(4, 5))
    with torch.no_grad():
        model[2].weight[:] = 0
        model[2].weight[0, 1] = 1
    ids = torch.tensor([[0, 1, 2, 3]])
    plan = plan_ranks(model, [(ids, 0 * ids)] * 2, 10**6, ["1", "2"])
    assert plan.rank_pattern["1"] == 1


def test_the_budget_buys_what_gives_most_for_its_price():
    energies = {
        "a": torch.tensor([9.0, 4.0, 0.0]),
        "b": torch.tensor([12.0, 1.0, 0.0]),
        "c": torch.zeros(3),
    }
    costs = {"a": 1, "b": 2, "c": 1}
    assert _bought(energies, costs, 1) == {"a": 1}
    assert _bought(energies, costs, 3) == {"a": 1, "b": 1}
    assert _bought(energies, costs, 4) == {"a": 2, "b": 1}
    assert _bought(energies, costs, 100) == {"a": 2, "b": 2}


def test_the_first_direction_is_that_of_the_gradient():
    model = tiny_model(LLAMA)
    data = batches(2)
    plan = plan_ranks(model, [data[0], data[0]], 10**9, "q_proj", most=2)
    weight = model.layers[0].self_attn.q_proj.weight
    gradient = torch.autograd.grad(cross_entropy(model(data[0][0]), data[0][1]), weight)[0]
    energy = torch.linalg.svdvals(gradient).square()
    [row] = [row for row in plan.report.rows if row["layer"].startswith("layers.0")]
    assert row["rank"] == 2
    plan = plan_ranks(model, [data[0], data[0]], 24 + 60, "layers.0.self_attn.q_proj", most=60)
    share = float(energy[0] / energy.sum())
    assert plan.report.rows[0]["energy followed"] == pytest.approx(share, rel=1e-4)


def test_what_cannot_be_planned_is_named():
    model = tiny_model(LLAMA)
    for options, said in (
        ({"budget": 5}, "5 parameters"),
        ({"budget": 0}, "budget is 0"),
        ({"budget": 500, "most": 0}, "most 0"),
        ({"budget": 500, "batches": batches(1)}, "1 batches"),
        ({"budget": 500, "targets": "q_prj"}, "q_prj"),
    ):
        with pytest.raises(SurgeryError, match=said):
            plan_ranks(model, **({"batches": batches()} | options))
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(SurgeryError, match="not finite"):
        plan_ranks(model, batches(), 500)
    assert all(p.requires_grad for p in model.parameters())
    inject_lora(model)
    with pytest.raises(SurgeryError, match="carries a LoRA"):
        plan_ranks(model, batches(), 500)
