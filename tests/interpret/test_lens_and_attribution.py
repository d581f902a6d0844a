"""The logit lens, attention and attribution, against their definitions and transformers."""

import pytest
import torch
import transformers
from helpers.adapters import adapted
from helpers.models import CONFIGS, FAMILY_CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import SurgeryError, inject_lora, lora_rows, save_model, swap_lora
from nanogpt_surgery.interpret import (
    attention,
    attribution,
    compare,
    forgetting,
    logit_lens,
    patch,
    put,
    record,
    zero,
)


def forget(model, ids):
    return forgetting(model, [ids], [ids])


FAMILIES = ["gpt2", "gpt2-gelu-untied", "llama", "llama-scaled-tied", "qwen2", "qwen3"]


def their_model(ours, folder):
    save_model(ours, folder)
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_attention_and_hidden_states_are_those_of_transformers(name, tmp_path):
    ours = tiny_model(FAMILY_CONFIGS[name])
    theirs = their_model(ours, tmp_path / "model")
    ids = random_ids(ours.config, 2, 9)
    out = theirs(ids, output_attentions=True, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(attention(ours, ids), torch.stack(out.attentions))
    with record(ours, ["layers.0.residual_before", "layers.*.residual", "norm"]) as found:
        ours(ids)
    names = ["layers.0.residual_before", "layers.0.residual", "norm"]
    for point, hidden in zip(names, out.hidden_states, strict=True):
        torch.testing.assert_close(found[point], hidden, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_model_of_transformers_is_recorded_and_patched_by_path(tmp_path):
    ours = tiny_model(FAMILY_CONFIGS["llama"])
    theirs = their_model(ours, tmp_path / "model")
    ids = random_ids(ours.config, 2, 9)
    with record(theirs, "model.layers.*") as found, record(ours, "layers.*") as own:
        theirs(ids)
        ours(ids)
    for path in ("mlp.gate_proj", "self_attn.o_proj", "mlp", "self_attn"):
        value = found[f"model.layers.1.{path}"]
        torch.testing.assert_close(value, own[f"layers.1.{path}"], atol=1e-5, rtol=1e-5)
    before = theirs(ids).logits
    with patch(theirs, {"model.layers.0": put(own["layers.0.residual"] * 2)}):
        changed = theirs(ids).logits
    with patch(ours, {"layers.0.residual": put(own["layers.0.residual"] * 2)}):
        torch.testing.assert_close(changed, ours(ids), atol=1e-4, rtol=1e-4)
    assert torch.equal(theirs(ids).logits, before)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_lens_is_norm_and_head_on_each_layer(name):
    model = tiny_model(CONFIGS[name])
    ids = random_ids(model.config, 2, 7)
    lens = logit_lens(model, ids, top=3)
    logits = model(ids)
    assert torch.equal(lens.final, logits.argmax(-1))
    assert torch.equal(lens.likeliest[-1], logits.topk(3).indices)
    torch.testing.assert_close(lens.probabilities[-1], logits.softmax(-1).topk(3).values)
    assert not lens.final_rank[-1].any()
    with record(model, "layers.0.residual") as found:
        model(ids)
    early = model.lm_head(model.norm(found["layers.0.residual"]))
    expected = early.softmax(-1).gather(-1, lens.final[..., None])[..., 0]
    torch.testing.assert_close(lens.final_probability[1], expected)
    order = early.argsort(-1, descending=True)
    ranks = (order == lens.final[..., None]).int().argmax(-1)
    assert torch.equal(lens.final_rank[1], ranks)


def test_the_layer_from_which_on_the_answer_stays():
    model = tiny_model(CONFIGS["llama"])
    lens = logit_lens(model, random_ids(model.config, 1, 7))
    for position in range(7):
        right = (lens.final_rank[:, 0, position] == 0).tolist()
        first = lens.first_layer(position=position)
        assert all(right[first:])
        assert first == 0 or not right[first - 1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("with_adapter", [False, True])
@torch.no_grad()
def test_the_shares_add_up_to_the_logit(name, with_adapter):
    model = adapted(CONFIGS[name]) if with_adapter else tiny_model(CONFIGS[name])
    ids = random_ids(model.config, 2, 7)
    for token, position in ((None, -1), (5, 3)):
        found = attribution(model, ids, token, position)
        logits = model(ids)[:, position]
        chosen = logits.argmax(-1) if token is None else torch.tensor([token, token])
        assert torch.equal(found.token, chosen)
        torch.testing.assert_close(found.logit, logits.gather(1, chosen[:, None])[:, 0])
        assert torch.equal(found.total(), found.logit)
        assert found.rounding.abs().max() < 1e-4


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_in_bfloat16_what_is_rounded_is_named(name):
    """It is the logit's that the model computes, and as small as the rounding of its sums."""
    model = adapted(CONFIGS[name]).bfloat16()
    ids = random_ids(model.config, 2, 7)
    found, logits = attribution(model, ids), model(ids)[:, -1].float()
    torch.testing.assert_close(found.logit, logits.amax(-1))
    torch.testing.assert_close(found.total(), found.logit, atol=1e-4, rtol=0)
    assert found.rounding.abs().max() < 2**-6 * logits.abs().max()
    assert dict(found.largest(1000))["rounding"] == float(found.rounding[0])


@torch.no_grad()
def test_rows_with_adapters_of_their_own_are_attributed():
    model = adapted(CONFIGS["llama-all-bias"])
    inject_lora(model, ["o_proj", "lm_head"], rank=2, name="other")
    train_a_little(model, seed=7, size=0.3)
    ids = random_ids(model.config, 2, 7)
    with lora_rows(model, ["default", "other"]):
        logits, found = model(ids)[:, -1], attribution(model, ids)
    torch.testing.assert_close(found.logit, logits.amax(-1))
    assert found.rounding.abs().max() < 1e-4
    swap_lora(model, "default")
    alone = attribution(model, ids[:1])
    torch.testing.assert_close(found.heads[:1], alone.heads, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.attention_bias[:1], alone.attention_bias, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_share_is_what_is_lost_where_the_scale_stays():
    """At the last layer, without its head, the residual differs by the share alone."""
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 7)
    found = attribution(model, ids)
    with record(model, ["layers.1.heads", "layers.1.residual"]) as at:
        model(ids)
    residual, head = at["layers.1.residual"][0, -1], at["layers.1.heads"][0, -1, 4]
    scale = torch.rsqrt(residual.square().mean() + model.config.norm_eps)
    share = (head * scale * model.norm.weight) @ model.lm_head.weight[found.token[0]]
    torch.testing.assert_close(found.heads[0, 1, 4], share)
    name, size = found.largest(1)[0]
    assert abs(size) == max(abs(share) for _, share in found.largest(1000))
    assert name


@torch.no_grad()
def test_a_head_that_adds_nothing_has_no_share():
    model = tiny_model(CONFIGS["gpt2"])
    ids = random_ids(model.config, 2, 7)
    with patch(model, {"layers.0.heads": zero(heads=[2])}):
        found = attribution(model, ids)
        assert found.heads[:, 0, 2].abs().max() == 0
        assert found.rounding.abs().max() < 1e-4


@torch.no_grad()
def test_looking_leaves_the_mode_and_sees_the_adapter():
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 5)
    before = logit_lens(model, ids).final_probability
    inject_lora(model, "lm_head", rank=2)
    model.lm_head.lora_B.fill_(0.3)
    model.train()
    assert not torch.equal(logit_lens(model, ids).final_probability, before)
    assert model.training


def test_what_is_not_there_is_named():
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 5)
    with pytest.raises(SurgeryError, match=r"54.*53"):
        logit_lens(model, ids, top=54)
    with pytest.raises(SurgeryError, match=r"5.*5"):
        attribution(model, ids, position=5)
    with pytest.raises(SurgeryError, match=r"53.*52"):
        attribution(model, ids, token=53)


@pytest.mark.parametrize("look", [logit_lens, attention, attribution, compare, forget])
def test_ids_that_are_none_of_the_models_are_named(look):
    model = adapted(CONFIGS["llama"])
    ids = random_ids(model.config, 2, 7)
    wrong = [
        (ids[0], r"\(7,\)"),
        (torch.tensor(3), r"\(\)"),
        (ids[:, :0], r"\(2, 0\)"),
        (ids[:0], r"\(0, 7\)"),
        (torch.tensor([[0, 53]]), r"0 to 53.*0 to 52"),
        (torch.tensor([[-1, 5]]), r"-1 to 5.*0 to 52"),
        (ids.float(), "float32"),
    ]
    for few, said in wrong:
        with pytest.raises(SurgeryError, match=said):
            look(model, few)
    look(model, ids.int())
