"""Recording and patching: the values are right, and nothing stays on the model."""

import math
from contextlib import ExitStack, nullcontext

import pytest
import torch
from helpers.adapters import adapted, assert_same_bits, bits
from helpers.models import CONFIGS, random_ids, tiny_model
from torch import nn

from nanogpt_surgery import SurgeryError, SurgeryWarning, generate
from nanogpt_surgery.interpret import (
    add,
    mean,
    patch,
    plan_recording,
    points_of,
    project_out,
    put,
    record,
    zero,
)
from nanogpt_surgery.model.kv_cache import KVCache
from nanogpt_surgery.training.fast.cpu_kernels import cpu_kernels

ANATOMY = ["residual_before", "residual_between", "residual", "attention", "heads", "neurons"]


def hooks(model: nn.Module) -> list[object]:
    """All that may be put on modules: hooks, and attributes of attention."""
    return [
        (dict(m._forward_hooks), dict(m._forward_pre_hooks), vars(m).get("attend"), type(m))
        for m in model.modules()
    ]


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(CONFIGS[request.param])


@torch.no_grad()
def test_what_is_recorded_fits_together(model):
    ids = random_ids(model.config, 2, 7)
    before = model(ids)
    with record(model, "layers.*") as found:
        assert torch.equal(model(ids), before)
    for i, layer in enumerate(model.layers):
        at = {name: found[f"layers.{i}.{name}"] for name in ANATOMY}
        mean_of_keys = at["attention"].sum(-1)
        torch.testing.assert_close(mean_of_keys, torch.ones_like(mean_of_keys))
        assert not at["attention"].triu(1).any()
        bias = layer.self_attn.o_proj(torch.zeros(1, 1, layer.self_attn.o_proj.in_features))
        between = at["residual_before"] + at["heads"].sum(2) + bias
        torch.testing.assert_close(between, at["residual_between"], atol=1e-5, rtol=1e-5)
        after = at["residual_between"] + layer.mlp.down_proj(at["neurons"])
        torch.testing.assert_close(after, at["residual"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.lm_head(model.norm(at["residual"])), before)


@torch.no_grad()
def test_attention_probabilities_give_what_attention_gives(model):
    ids = random_ids(model.config, 2, 7)
    before = model(ids)
    with record(model, "layers.*.attention") as found:
        model(ids)
    same = {point: put(value) for point, value in found.items()}
    unchanged = pytest.warns(SurgeryWarning, match="nothing was changed")
    with unchanged, patch(model, same), record(model, "layers.*.attention") as again:
        torch.testing.assert_close(model(ids), before, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(again[point], found[point]) for point in found)


@pytest.mark.parametrize("point", ["residual_before", "residual_between", "residual"])
@torch.no_grad()
def test_another_texts_residual_stream_gives_that_texts_answer(model, point):
    ids, other = random_ids(model.config, 1, 7), random_ids(model.config, 1, 7, seed=1)
    with record(model, "layers.1.*") as theirs:
        goal = model(other)
    with patch(model, {f"layers.1.{point}": put(theirs[f"layers.1.{point}"])}):
        torch.testing.assert_close(model(ids), goal, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_another_texts_heads_and_neurons_take_the_place_of_its_own(model):
    ids, other = random_ids(model.config, 1, 7), random_ids(model.config, 1, 7, seed=1)
    layer, points = model.layers[1], ["layers.1.heads", "layers.1.neurons"]
    with record(model, points) as theirs:
        model(other)
    cuts = {point: put(theirs[point]) for point in points}
    with patch(model, cuts), record(model, "layers.1.*") as found:
        model(ids)
    bias = layer.self_attn.o_proj(torch.zeros(1, 1, layer.self_attn.o_proj.in_features))
    between = found["layers.1.residual_before"] + theirs["layers.1.heads"].sum(2) + bias
    torch.testing.assert_close(found["layers.1.residual_between"], between, atol=1e-4, rtol=1e-4)
    after = between + layer.mlp.down_proj(theirs["layers.1.neurons"])
    torch.testing.assert_close(found["layers.1.residual"], after, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_head_without_a_share_is_a_head_whose_weights_are_zero(model):
    attention, ids = model.layers[0].self_attn, random_ids(model.config, 2, 7)
    with patch(model, {"layers.0.heads": zero(heads=[1])}):
        patched = model(ids)
    assert (patched - model(ids)).abs().max() > 1e-3
    d = attention.head_dim
    attention.o_proj.weight[:, d : 2 * d] = 0
    torch.testing.assert_close(patched, model(ids), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_places_are_chosen_by_row_position_and_head():
    model = tiny_model(CONFIGS["llama"])
    ids = random_ids(model.config, 3, 5)
    cuts = {
        "layers.0.residual": zero(rows=[1], positions=[-1]),
        "layers.1.heads": zero(heads=[0, 5], positions=[2]),
        "layers.1.attention": zero(heads=[2], rows=[0]),
        "layers.0.neurons": mean(rows=[2]),
    }
    with patch(model, cuts), record(model, "layers.*") as found:
        model(ids)
    residual, heads = found["layers.0.residual"], found["layers.1.heads"]
    assert (residual == 0).all(-1).nonzero().tolist() == [[1, 4]]
    there = {(row, 2, head) for row in range(3) for head in (0, 5)}
    there |= {(0, position, 2) for position in range(5)}  # a head that looks nowhere adds nothing
    assert set(map(tuple, (heads == 0).all(-1).nonzero().tolist())) == there
    assert found["layers.1.attention"][0, 2].abs().sum() == 0
    neurons = found["layers.0.neurons"][2]
    assert torch.equal(neurons, neurons[:1].expand_as(neurons))


@torch.no_grad()
def test_vectors_are_added_and_taken_out():
    model = tiny_model(CONFIGS["gpt2"])
    ids, direction = random_ids(model.config, 2, 5), torch.randn(24)
    with record(model, "layers.0.residual") as plain:
        model(ids)
    by = {"layers.0.residual": add(direction, -2.0)}
    with patch(model, by), record(model, "layers.0.residual") as moved:
        model(ids)
    expected = plain["layers.0.residual"] - 2 * direction
    torch.testing.assert_close(moved["layers.0.residual"], expected)
    by = {"layers.*.residual": project_out(direction)}
    with patch(model, by), record(model, "layers.*.residual") as without:
        model(ids)
    along = torch.stack(list(without.values())) @ direction / direction.norm()
    assert along.abs().max() < 1e-5


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_on_the_model(model, fails):
    before, on_it = bits(model), hooks(model)
    ids = random_ids(model.config, 1, 5)
    logits = model(ids)
    cuts = {"layers.*.heads": zero(heads=[0]), "layers.*.attention": zero(heads=[1])}
    if fails:
        cuts["layers.1.heads"] = zero(heads=[99])
    with record(model, "*"):
        refused = pytest.raises(SurgeryError, match="99") if fails else nullcontext()
        with refused, patch(model, cuts):
            model(ids)
    assert hooks(model) == on_it
    assert_same_bits(model, before)
    assert torch.equal(model(ids), logits)


def test_the_last_of_several_blocks_on_a_point_to_leave_takes_the_hook_away():
    model = tiny_model(CONFIGS["llama"])
    on_it, ids = hooks(model), random_ids(model.config, 1, 5)
    first, second = record(model, "layers.0.attention"), record(model, "layers.0.attention")
    one, other = first.__enter__(), second.__enter__()
    first.__exit__(None, None, None)
    model(ids)
    assert not one
    assert other["layers.0.attention"].shape == (1, 6, 5, 5)
    second.__exit__(None, None, None)
    assert hooks(model) == on_it


@torch.no_grad()
def test_what_was_recorded_stays_when_the_model_goes_on():
    model = tiny_model(CONFIGS["llama"])
    cache = KVCache(model.config)
    with record(model, "layers.0.*") as found:
        model(random_ids(model.config, 1, 4), cache)
        kept = {point: found[point] for point in found}
        copies = {point: value.clone() for point, value in kept.items()}
        model(random_ids(model.config, 1, 1, seed=2), cache)
    assert all(torch.equal(kept[point], copies[point]) for point in kept)
    assert found["layers.0.attention"].shape == (1, 6, 1, 5)  # the last pass: one query, five keys


def test_gradients_pass_through_an_intervention():
    model = tiny_model(CONFIGS["gpt2"])
    vector = torch.zeros(24, requires_grad=True)
    for point in ("residual_before", "residual_between", "residual"):
        with patch(model, {f"layers.1.{point}": add(vector + 1e-3, positions=[2])}):
            (gradient,) = torch.autograd.grad(model(random_ids(model.config, 1, 5)).sum(), vector)
        assert gradient.abs().max() > 0


@torch.no_grad()
def test_an_adapter_takes_part_in_the_shares_of_heads():
    model = adapted(CONFIGS["llama-all-bias"])
    ids = random_ids(model.config, 2, 5)
    with record(model, ["layers.1.heads", "layers.1.self_attn"]) as found:
        model(ids)
    o_proj = model.layers[1].self_attn.o_proj
    bias = o_proj(torch.zeros(1, 1, o_proj.in_features))
    total = found["layers.1.heads"].sum(2) + bias
    torch.testing.assert_close(total, found["layers.1.self_attn"], atol=1e-5, rtol=1e-5)


def test_a_point_that_is_not_there_is_named():
    model = tiny_model(CONFIGS["gpt2"])
    named = pytest.raises(SurgeryError, match=r"layers\.0\.residul.*\n.*layers\.0\.residual")
    with named, record(model, "layers.0.residul"):
        pass
    ids = random_ids(model.config, 1, 5)
    for cut in (zero(positions=[5]), zero(rows=[1]), zero(heads=[0]), put(torch.zeros(7))):
        named = pytest.raises(SurgeryError, match=r"layers\.0\.residual")
        with named, patch(model, {"layers.0.residual": cut}):
            model(ids)
    short = {"vector": add(torch.ones(7)), "direction": project_out(torch.ones(7))}
    for what, cut in short.items():
        named = pytest.raises(SurgeryError, match=rf"{what} has 7.*\(1, 5, 24\)")
        with named, patch(model, {"layers.0.residual": cut}):
            model(ids)
    named = pytest.raises(SurgeryError, match=r"layers\.0\.mlp.*int")
    with named, patch(model, {"layers.0.mlp": 3}):
        pass


@pytest.mark.parametrize("make", [add, project_out])
def test_a_vector_without_numbers_is_refused(make):
    nan, inf = torch.ones(24), torch.ones(24)
    nan[3:5], inf[0] = math.nan, math.inf
    wrong = [
        (nan, "2 of 24"),
        (inf, "1 of 24"),
        (torch.ones(24, 24), r"\(24, 24\)"),
        ([1.0], "list"),
    ]
    for vector, said in wrong:
        with pytest.raises(SurgeryError, match=said):
            make(vector)
    make(torch.arange(1, 25))


def test_a_direction_and_a_place_must_be():
    with pytest.raises(SurgeryError, match=r"length 0\.0"):
        project_out(torch.zeros(24))
    with pytest.raises(SurgeryError, match=r"positions.*1\.5"):
        zero(positions=[1.5])
    with pytest.raises(SurgeryError, match=r"heads.*3"):
        zero(heads=3)


@torch.no_grad()
def test_positions_and_heads_of_what_is_split_by_heads_are_not_confused():
    model = tiny_model(CONFIGS["qwen3"])
    ids, point = random_ids(model.config, 2, 7), "layers.0.self_attn.k_norm"
    with patch(model, {point: zero(positions=[6], heads=[1])}), record(model, point) as found:
        model(ids)
    gone = (found[point] == 0).all(-1).nonzero().tolist()  # of (B, G, T, D)
    assert gone == [[0, 1, 6], [1, 1, 6]]


@pytest.mark.parametrize("name", ["attention", "heads", "neurons", "residual_between", "mlp"])
def test_a_text_within_a_patch_is_made_by_the_patched_model(name):
    model, prompt = tiny_model(CONFIGS["llama"]), [1, 2, 3]
    options = {"max_new_tokens": 8, "temperature": 0}
    before = list(generate(model, prompt, **options))
    with patch(model, {f"layers.0.{name}": zero()}):
        patched = list(generate(model, prompt, **options))
        assert patched == list(generate(model, prompt, engine="plain", **options))
    assert patched != before
    assert list(generate(model, prompt, **options)) == before


@torch.no_grad()
def test_an_intervention_without_effect_is_said():
    model = tiny_model(CONFIGS["gpt2"])
    said = pytest.warns(SurgeryWarning, match=r"no forward pass.*layers\.0\.mlp")
    with said, patch(model, {"layers.0.mlp": zero()}):
        pass
    said = pytest.warns(SurgeryWarning, match=r"nothing.*layers\.0\.residual")
    with said, patch(model, {"layers.0.residual": add(torch.zeros(24))}):
        model(random_ids(model.config, 1, 5))


def test_memory_is_foreseen(monkeypatch):
    model = tiny_model(CONFIGS["llama"])
    points = [f"layers.*.{name}" for name in ANATOMY]
    plan = plan_recording(model, points, 3, 7)
    with record(model, points) as found:
        model(random_ids(model.config, 3, 7))
    assert {row["point"]: row["bytes"] for row in plan.rows} == {
        point: value.numel() * value.element_size() for point, value in found.items()
    }
    monkeypatch.setattr("nanogpt_surgery.memory.WORTH_A_LOOK", 0)
    monkeypatch.setattr("nanogpt_surgery.memory.available_memory", lambda: 1000)
    with pytest.raises(SurgeryError, match="recording"), record(model, points):
        model(random_ids(model.config, 3, 7))


def test_points_are_listed():
    points = points_of(tiny_model(CONFIGS["gpt2"]))
    assert points[:6] == [f"layers.0.{name}" for name in ANATOMY]
    assert "layers.1.mlp.up_proj" in points


@pytest.mark.parametrize("first", ["recording", "kernels"])
@torch.no_grad()
def test_a_recording_and_trainings_kernels_may_begin_and_end_in_any_order(first):
    model = tiny_model(CONFIGS["llama"])
    ids, clean = random_ids(model.config, 2, 7), hooks(model)
    before, point = model(ids), "layers.1.attention"
    recording, kernels = ExitStack(), ExitStack()
    order = (recording, kernels) if first == "recording" else (kernels, recording)
    entered = {
        one: record(model, point) if one is recording else cpu_kernels(model) for one in order
    }
    found = {one: one.enter_context(context) for one, context in entered.items()}[recording]
    torch.testing.assert_close(model(ids), before)
    assert found[point].shape == (2, 6, 7, 7)
    order[0].close()
    torch.testing.assert_close(model(ids), before)
    order[1].close()
    assert hooks(model) == clean


@torch.no_grad()
def test_attention_is_given_back_by_a_pass_that_fails():
    model = tiny_model(CONFIGS["llama"])
    ids, clean = random_ids(model.config, 2, 7), hooks(model)
    with record(model, "layers.1.attention"):
        with pytest.raises(SurgeryError), patch(model, {"layers.1.attention": put(torch.ones(3))}):
            model(ids)
        assert [h[2] for h in hooks(model)] == [h[2] for h in clean]
    assert hooks(model) == clean
