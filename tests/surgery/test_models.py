"""Fine-tuned models of one base become one: against the formula, adapters, and transformers."""

import json

import pytest
import torch
from helpers.adapters import assert_same_bits, bits
from helpers.commands import called
from helpers.models import CONFIGS, assert_equal_logits, random_ids, tiny_model
from transformers import AutoModelForCausalLM

from nanogpt_surgery import SurgeryError, merge_lora, open_model, save_model, undo_lora
from nanogpt_surgery.history.folder_history import hashes_of
from nanogpt_surgery.surgery import combine_models, extract
from nanogpt_surgery.surgery.combining import arc_shares

IDS = random_ids(CONFIGS["llama"], 2, 7)


@torch.no_grad()
def tuned(name, seed):
    """A model of the base with some tensors changed, norms and biases among them."""
    model, draw = tiny_model(CONFIGS[name]), torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if path.startswith(("layers.1", "norm", "embed_tokens")):
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return model


def two(name):
    return {"one": tuned(name, 1), "two": tuned(name, 2)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-scaled-tied"])
@torch.no_grad()
def test_a_linear_combination_is_the_sum_of_task_vectors_and_undone(name):
    base, others = tiny_model(CONFIGS[name]), two(name)
    before, states = bits(base), [model.state_dict() for model in others.values()]
    report = combine_models(base, others, {"one": 0.5, "two": -2}, probe=IDS)
    for key, tensor in base.state_dict().items():
        first = before[key]
        wanted = first + 0.5 * (states[0][key] - first) - 2 * (states[1][key] - first)
        torch.testing.assert_close(tensor, wanted, atol=1e-5, rtol=1e-5)
        if key.startswith("layers.0"):
            assert torch.equal(tensor, first)
    assert (base.lm_head.weight is base.embed_tokens.weight) is base.config.tie_head
    assert {row["tensor"] for row in report.rows} >= {"norm.weight", "embed_tokens.weight"}
    assert report.summary["kl"] > 0
    assert report.summary["loss_before"] != report.summary["loss_after"]
    undo_lora(base)
    assert_same_bits(base, before)


@torch.no_grad()
def test_the_other_methods_follow_their_formulas():
    key, others = "layers.1.mlp.down_proj.weight", two("llama")
    first = tiny_model(CONFIGS["llama"]).get_parameter(key)
    deltas = [model.get_parameter(key) - first for model in others.values()]

    def change(weights, **options):
        base = tiny_model(CONFIGS["llama"])
        combine_models(base, others, weights, **options)
        return base.get_parameter(key) - first

    s, t = arc_shares(*deltas, 0.25)
    found = change({"one": 3, "two": 1}, method="slerp")
    torch.testing.assert_close(found, s * deltas[0] + t * deltas[1], atol=1e-5, rtol=1e-4)
    found = change({"one": 2}, method="dare", density=0.5, seed=1)
    kept = found.abs() > 1e-6
    torch.testing.assert_close(found[kept], 4 * deltas[0][kept], atol=1e-5, rtol=1e-4)
    assert 0.4 < float(kept.float().mean()) < 0.6
    found = change({"one": 1, "two": 1}, method="ties", density=1.0)
    sign = (deltas[0] + deltas[1]).sign()
    agreed = torch.stack([d * (d.sign() == sign) for d in deltas])
    wanted = agreed.sum(0) / (agreed != 0).sum(0).clamp_min(1)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_with_a_rank_an_adapter_holds_each_matrix():
    base, others = tiny_model(CONFIGS["llama"]), two("llama")
    report = combine_models(base, others, {"one": 1, "two": 1}, rank=2)
    errors = [row["error"] for row in report.rows if row["error"] is not None]
    assert report.summary["largest_layer_error"] == max(errors) > 0.1
    again = tiny_model(CONFIGS["llama"])
    found = extract(again, base, "sum", rank=2)
    assert max(row["error"] for row in found.rows) < 1e-4
    merge_lora(again)
    for key in ("layers.1.mlp.down_proj.weight", "embed_tokens.weight"):
        torch.testing.assert_close(again.state_dict()[key], base.state_dict()[key])


def test_what_cannot_be_combined_leaves_the_base_as_it_is():
    base, others = tiny_model(CONFIGS["llama"]), two("llama")
    broken = tuned("llama", 3)
    broken.norm.weight.data[0] = torch.nan
    others |= {"gpt2": tiny_model(CONFIGS["gpt2"]), "same": tiny_model(CONFIGS["llama"])}
    others |= {"broken": broken}
    before = bits(base)
    wrong = [
        ({"three": 1.0}, {}, "three"),
        ({"gpt2": 1.0}, {}, "embed_positions|gate_proj"),
        ({"same": 1.0}, {}, "no tensor"),
        ({"broken": 1.0}, {}, "norm.weight"),
        ({"one": 1e39}, {}, r"1e\+39"),
        ({"one": 1.0}, {"method": "slerp"}, "1.*2"),
        ({"one": 1.0}, {"density": 0.0}, "0.0"),
        ({"one": 1.0}, {"probe": torch.tensor([[53]])}, "53"),
    ]
    for weights, options, said in wrong:
        with pytest.raises(SurgeryError, match=said):
            combine_models(base, others, weights, **options)
    assert_same_bits(base, before)


def test_on_folders_it_is_planned_done_and_undone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = {"base": tiny_model(CONFIGS["llama"])} | two("llama")
    for name, model in models.items():
        save_model(model, name)
    before = hashes_of(tmp_path / "base")
    words = ("model", "combine", "base", "one=0.5", "two=-1", "--json")
    plan = json.loads(called(*words, "--plan")[0])
    assert plan["tensors_changed"] == len(plan["rows"]) > 5
    assert {row["changed by"] for row in plan["rows"]} == {2}
    again = json.loads(called(*words, "--plan")[0])
    same = {"free_bytes": 0, "available_bytes": 0, "seconds": 0}
    assert plan | same == again | same, "but for what else is on the machine"
    assert plan["memory_bytes"] > 0
    assert hashes_of(tmp_path / "base") == before
    called(*words, "--out", "both")
    wanted = models["base"]
    combine_models(wanted, models, {"one": 0.5, "two": -1})
    theirs = AutoModelForCausalLM.from_pretrained("both")
    with torch.no_grad():
        assert_equal_logits(theirs(IDS).logits, wanted(IDS))
    called(*words)
    assert_same_bits(open_model("base")[0], bits(wanted))
    called("undo", "base")
    assert hashes_of(tmp_path / "base") == before


def test_the_plan_says_what_the_operation_changes():
    base, others = tiny_model(CONFIGS["gpt2"]), two("gpt2")
    planned = combine_models(base, others, {"one": 1, "two": 1}, plan=True)
    done = combine_models(base, others, {"one": 1, "two": 1})
    assert [row["tensor"] for row in planned.rows] == [row["tensor"] for row in done.rows]
