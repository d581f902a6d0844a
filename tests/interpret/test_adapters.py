"""What an adapter does, against its definition."""

import math

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model
from torch.nn import functional as F

from nanogpt_surgery import SurgeryError, disable_lora, enable_lora, inject_lora
from nanogpt_surgery.interpret import compare, examine, forgetting
from nanogpt_surgery.interpret.examination import effective_rank, intruders, overlap
from nanogpt_surgery.lora.several import adapter_weights
from nanogpt_surgery.lora.stored_adapter import StoredAdapter, attach_adapter


def next_loss(model, ids):
    return F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("name", ["gpt2", "llama", "prev-tokens-relu2"])
@torch.no_grad()
def test_a_comparison_is_of_the_model_with_and_without(name):
    model = adapted(CONFIGS[name])
    ids = random_ids(model.config, 2, 7)
    before = bits(model)
    found = compare(model, ids, top=4)
    assert_same_bits(model, before)
    on, loss = model(ids).softmax(-1), next_loss(model, ids)
    disable_lora(model)
    off, base_loss = model(ids).softmax(-1), next_loss(model, ids)
    enable_lora(model)
    changes = (on - off).abs()
    for moved in found.moved:
        at = moved.row, moved.position, moved.id
        assert moved.with_it == pytest.approx(float(on[at]), abs=1e-6)
        assert moved.without == pytest.approx(float(off[at]), abs=1e-6)
    sizes = [abs(moved.with_it - moved.without) for moved in found.moved]
    assert sizes == pytest.approx(changes.flatten().topk(4).values.tolist(), abs=1e-6)
    torch.testing.assert_close(found.kl, (on * (on / off).log()).sum(-1), atol=1e-5, rtol=1e-4)
    assert torch.equal(found.lens_with.final, on.argmax(-1))
    assert torch.equal(found.lens_without.final, off.argmax(-1))
    summary = found.layers.summary
    assert summary["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert summary["loss of the base"] == pytest.approx(float(base_loss), abs=1e-5)


@torch.no_grad()
def test_each_layer_is_measured_beside_its_weight_and_left_out():
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, ["q_proj", "lm_head"], rank=2)
    model.lm_head.lora_B.fill_(0.3)  # the others add nothing as yet
    ids = random_ids(model.config, 2, 7)
    rows = {row["layer"]: row for row in compare(model, ids).layers.rows}
    assert list(rows) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj", "lm_head"]
    x, layer = model.hidden(ids), model.lm_head
    ratio = (layer(x) - layer.original_layer(x)).norm() / layer.original_layer(x).norm()
    assert rows["lm_head"]["‖ΔW x‖ / ‖W x‖"] == pytest.approx(float(ratio), rel=1e-5)
    assert rows["layers.0.self_attn.q_proj"]["‖ΔW x‖ / ‖W x‖"] == 0
    with_all = float(next_loss(model, ids))
    assert rows["layers.1.self_attn.q_proj"]["loss without it"] == pytest.approx(with_all)
    disable_lora(model)
    without = float(next_loss(model, ids))
    assert rows["lm_head"]["loss without it"] == pytest.approx(without)


def test_there_must_be_an_adapter_to_compare():
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 4)
    with pytest.raises(SurgeryError, match="no LoRA"):
        compare(model, ids)
    inject_lora(model, "q_proj")
    disable_lora(model)
    with pytest.raises(SurgeryError, match="disabled"):
        compare(model, ids)


@torch.no_grad()
def test_forgetting_is_loss_and_divergence_on_both_domains():
    model = adapted(CONFIGS["gpt2"])
    old = [random_ids(model.config, 2, 7), random_ids(model.config, 1, 5, seed=2)]
    new = [random_ids(model.config, 3, 4, seed=3)]
    report = forgetting(model, old, new)
    assert [row["tokens"] for row in report.rows] == [2 * 6 + 4, 9]
    expected = sum(next_loss(model, ids) * ids[:, 1:].numel() for ids in old) / 16
    assert report.rows[0]["loss with it"] == pytest.approx(float(expected), abs=1e-5)
    assert all(row["kl divergence"] > 0 for row in report.rows)
    disable_lora(model)
    assert report.rows[1]["loss without"] == pytest.approx(
        float(next_loss(model, new[0])), abs=1e-5
    )
    with pytest.raises(SurgeryError, match="disabled"):
        forgetting(model, old, new)
    enable_lora(model)
    with pytest.raises(SurgeryError, match="old"):
        forgetting(model, [], new)
    single = [old[0][:, :1], *old]  # of one token nothing is told
    assert forgetting(model, single, new).rows == report.rows


def test_an_examination_counts_directions():
    model = tiny_model(CONFIGS["llama"])
    inject_lora(model, ["q_proj", "k_proj", "down_proj"], rank=3, alpha=3)
    q, k = model.layers[0].self_attn.q_proj, model.layers[0].self_attn.k_proj
    with torch.no_grad():
        left, right = torch.linalg.qr(torch.randn(60, 3))[0], torch.linalg.qr(torch.randn(24, 3))[0]
        q.lora_A.copy_(right.T)
        q.lora_B.copy_(left * 0.5)  # three directions of one size
        k.lora_B.fill_(torch.nan)
    rows = {row["layer"]: row for row in examine("default", model).rows}
    row = rows["layers.0.self_attn.q_proj"]
    assert row["rank"] == 3
    assert row["effective rank"] == pytest.approx(3, abs=1e-3)
    weight = q.original_layer.weight
    assert row["ΔW / W"] == pytest.approx(0.5 * math.sqrt(3) / float(weight.norm()), rel=1e-4)
    assert rows["layers.0.self_attn.k_proj"]["rank"] is None
    assert rows["layers.1.mlp.down_proj"]["rank"] == 0
    assert examine("default", model).summary == {"layers": 6, "dead": 4, "not finite": 1}
    inject_lora(model, "v_proj", name="other")  # the first one waits
    assert examine("default", model).summary == {"layers": 6, "dead": 4, "not finite": 1}
    assert adapter_weights(model) == {"default": None, "other": 1.0}
    assert examine("other", model).summary == {"layers": 2, "dead": 2, "not finite": 0}


def test_effective_rank_is_between_one_and_the_rank():
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert 1 < effective_rank(torch.tensor([1.0, 0.5])) < 2
    assert effective_rank(torch.tensor([])) == 0


def test_overlap_and_intruders():
    torch.manual_seed(0)
    weight = torch.randn(40, 30)
    u, _, vh = torch.linalg.svd(weight, full_matrices=False)
    inside = u[:, :2] @ vh[:2]
    assert overlap(inside, u, vh, 2) == pytest.approx(40 * 30 / 4, rel=1e-4)
    outside = u[:, 20:22] @ vh[20:22]
    assert overlap(outside, u, vh, 2) < 1e-6
    assert intruders(u, weight + 3 * inside) == 0  # what W does, only more of it
    used = u[:, :20] @ torch.linspace(30, 11, 20).diag() @ vh[:20]
    spread = u[:, 20:] @ torch.ones(10, 1) / math.sqrt(10)  # resembles none of W's directions
    assert intruders(u, used + 100 * spread @ vh[25:26]) == 1
    assert intruders(u, used + 100 * u[:, 22:23] @ vh[25:26]) == 0  # a direction of W's


def test_a_module_replaced_whole_has_a_row_for_each_tensor():
    model = tiny_model(CONFIGS["gpt2"])
    norm = {name: t.clone() for name, t in model.norm.state_dict().items()}
    norm["weight"] += 0.25
    whole = {f"norm.{name}": tensor for name, tensor in norm.items()}
    head = model.layers[0].mlp.up_proj
    whole |= {f"layers.0.mlp.up_proj.{n}": t.clone() for n, t in head.state_dict().items()}
    whole["layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    size = 0.25 * model.norm.weight.numel() ** 0.5 / float(model.norm.weight.detach().norm())
    attach_adapter(model, StoredAdapter({}, whole), "whole")
    report = examine("whole", model)
    rows = {row["layer"]: row for row in report.rows}
    assert rows.keys() == whole.keys()
    assert rows["norm.weight"]["ΔW / W"] == pytest.approx(size, rel=1e-5)
    assert 0.9 < rows["norm.weight"]["bfloat16"] <= 1 and rows["norm.weight"]["rank"] is None
    assert rows["norm.bias"]["ΔW / W"] == 0
    assert rows["layers.0.mlp.up_proj.weight"]["ΔW / W"] is None
    assert report.summary == {
        "layers": 2, "dead": 0, "not finite": 1, "tensors replaced whole": 4
    }  # fmt: skip
    assert str(report)
