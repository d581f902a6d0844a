"""A plan counts what there is, and leaves every bit where it was."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.training import DATASET, SETTINGS, VALIDATION, hashes, model_of

from nanogpt_surgery import GPTDataset, SimpleGPT, fit, inject_lora
from nanogpt_surgery.training.estimates import (
    AGAIN,
    NEW,
    LiveTensors,
    Pace,
    Part,
    Probe,
    cut,
    plan_training,
)
from nanogpt_surgery.training.fast import frozen_head
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix
from nanogpt_surgery.training.optimizer import make_optimizer


def test_a_plan_undoes_its_steps_to_the_bit():
    model = model_of(0.2)
    before, state = hashes(model), torch.get_rng_state()
    plan = plan_training(model.eval(), DATASET, SETTINGS, VALIDATION)
    assert hashes(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    parameters = sum(p.numel() for p in model.parameters())
    assert plan["parameters"] == plan["trained_parameters"] == parameters
    assert plan["weights_bytes"] == plan["gradient_bytes"] == 4 * parameters
    assert plan["optimizer_bytes"] == 8 * parameters  # AdamW keeps two numbers for each
    parts = ("weights", "gradient", "optimizer", "activation", "logits", "hidden_states")
    assert plan["memory_bytes"] >= sum(plan[f"{part}_bytes"] for part in parts)
    assert plan["tokens"] == 6 * 5 * 9
    assert plan["evaluations"] == 1
    assert plan["hidden_states_bytes"] == 0
    assert "first_pass_steps" not in plan, "all steps are alike"


def test_what_is_frozen_or_computed_again_takes_less():
    plain = plan_training(model_of(), DATASET, SETTINGS)
    again = plan_training(
        model_of(),
        DATASET,
        replace(SETTINGS, gradient_checkpointing=True),
    )
    assert again["activation_bytes"] < 0.7 * plain["activation_bytes"]  # one block of two stays
    tuned = model_of()
    inject_lora(tuned, "lm_head", rank=2)
    head = plan_training(tuned, DATASET, SETTINGS)
    assert head["activation_bytes"] == 0
    assert head["optimizer_bytes"] == 8 * head["trained_parameters"]
    assert head["evaluations"] == 0


IDS = torch.randint(13, (200,), generator=torch.Generator().manual_seed(0))
WINDOWS = GPTDataset.from_ids(IDS, 9, stride=5)  # 39, no two alike
LONGER = replace(SETTINGS, max_steps=40)


def tuned(dtype: torch.dtype = torch.float32):
    model = model_of().to(dtype)
    inject_lora(model, "lm_head", rank=2)
    return model


@pytest.mark.parametrize(
    ("dtype", "precision", "size"),
    [
        (torch.float32, "float32", 4),
        (torch.bfloat16, "float32", 4),  # cast for its products
        (torch.bfloat16, "bfloat16", 2),
    ],
)
def test_the_kept_hidden_states_are_counted(dtype, precision, size, monkeypatch):
    rooms, room = [], FrozenPrefix._room
    monkeypatch.setattr(FrozenPrefix, "_room", lambda s, x: rooms.append(room(s, x)) or rooms[-1])
    longer, model = replace(LONGER, precision=precision, device="cpu"), tuned(dtype)
    plan = plan_training(model, WINDOWS, longer)
    assert plan["hidden_states_bytes"] == 39 * 9 * 16 * size
    next(fit(tuned(dtype), WINDOWS, longer))
    assert rooms[-1].nbytes == plan["hidden_states_bytes"]
    four = replace(longer, cache_gib=4 * 9 * 16 * size / 2**30)
    assert plan_training(model, WINDOWS, four)["hidden_states_bytes"] == 4 * 9 * 16 * size
    next(fit(tuned(dtype), WINDOWS, four))
    assert rooms[-1].nbytes == 4 * 9 * 16 * size
    none = plan_training(model, WINDOWS, replace(longer, cache_gib=0.0))
    assert none["hidden_states_bytes"] == 0
    more = plan["hidden_states_bytes"] + plan["logits_bytes"] - none["logits_bytes"]
    assert plan["memory_bytes"] - none["memory_bytes"] == more


@pytest.mark.parametrize("most", [2**23, 13 * 10])
def test_over_a_frozen_head_one_tensor_is_as_wide_as_the_vocabulary(most, monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.training.fast.chunked_logits.MOST_LOGITS", most)
    rooms, forward = [], frozen_head.forward
    monkeypatch.setattr(
        frozen_head,
        "forward",
        lambda head, h, y, room, *rest: rooms.append(room) or forward(head, h, y, room, *rest),
    )
    vocabulary = tuned().config.vocab_size
    whole = 5 * 9 * vocabulary
    plan = plan_training(tuned(), WINDOWS, LONGER)
    next(fit(tuned(), WINDOWS, LONGER))
    assert plan["logits_bytes"] == 4 * min(whole, 2 * most)
    assert plan["logits_bytes"] - 4 * vocabulary < rooms[-1].nbytes <= plan["logits_bytes"]
    everything = plan_training(model_of(), WINDOWS, LONGER)
    assert everything["logits_bytes"] == 4 * 4 * min(whole, most)


def test_the_first_pass_and_what_comes_after_are_probed_apart():
    model, computed = tuned(), []
    model.layers[0].register_forward_hook(lambda _m, inputs, _o: computed.append(len(inputs[0])))
    pace = Probe(model, WINDOWS, LONGER).pace()
    assert sum(computed) == 5 * NEW, "of the first steps alone"
    assert pace.first_pass_steps == math.ceil(39 / 5)
    plan = plan_training(model, WINDOWS, LONGER)
    assert plan["first_pass_steps"] == pace.first_pass_steps
    assert {"seconds_a_step", "seconds_a_step_of_the_first_pass"} <= plan.keys()
    computed.clear()
    Probe(model, WINDOWS, replace(LONGER, cache_gib=0.0)).pace()
    assert sum(computed) == 5 * (NEW + AGAIN)


def test_the_time_is_that_of_both_phases():
    assert Pace(10.0, 4.0, 1.0, first_pass_steps=3).seconds(100) == 10 + 2 * 4 + 97 * 1
    assert Pace(10.0, 4.0, 1.0, first_pass_steps=3).seconds(2) == 10 + 4
    assert Pace(10.0, 4.0, 4.0).seconds(100) == 10 + 99 * 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_training_and_its_evaluation_hold_no_more_than_was_planned(checkpointed):
    ids = torch.randint(11, (4000,), generator=torch.Generator().manual_seed(0))
    data = GPTDataset.from_ids(ids, 32)
    changes = {"max_steps": 2, "batch_size": 4, "gradient_checkpointing": checkpointed}
    settings, model = replace(SETTINGS, **changes), SimpleGPT(11, 48, 3, 4, 32)
    plan = plan_training(model, data, settings, data)
    with LiveTensors(model.parameters()) as live:
        list(fit(model, data, settings, validation=data, examine=False))
    held = plan["weights_bytes"] + live.most
    assert 0.7 * plan["memory_bytes"] < held < 1.1 * plan["memory_bytes"]


def test_a_probe_learns_from_what_is_affordable(monkeypatch):
    """Of a machine a millionth as fast: few tokens of few rows; sizes are scaled to the batch."""
    model, steps = tuned(), []
    model.lm_head.register_forward_hook(lambda _m, inputs, _o: steps.append(inputs[0].shape))
    whole = plan_training(model, WINDOWS, replace(LONGER, cache_gib=0.0), WINDOWS)
    assert Probe(model, WINDOWS, LONGER).part.tokens == LONGER.batch_size * 9
    monkeypatch.setattr("nanogpt_surgery.training.estimates.matmul_rate", lambda *_: 1e3)
    part = Probe(model, WINDOWS, LONGER).part
    assert (part.rows, part.block_size) == (1, 9)
    large = replace(LONGER, batch_size=10**6, cache_gib=0.0)
    steps.clear()
    plan = plan_training(model, WINDOWS, large, WINDOWS)
    assert max(shape.numel() // model.config.n_embd for shape in steps) <= 9
    assert plan["tokens"] == 40 * 10**6 * 9
    assert plan["seconds_a_step"] > 10**3 * whole["seconds_a_step"]
    scale = 10**6 / LONGER.batch_size
    assert plan["activation_bytes"] == whole["activation_bytes"] * scale


def test_a_line_through_two_sizes_of_batch_goes_on_to_the_real_one(monkeypatch):
    def seconds(_probe, _optimizer, part):
        return 9.0, 1 + part.tokens / 8, 0.5 + part.tokens / 80

    monkeypatch.setattr("nanogpt_surgery.training.estimates.Probe._step_seconds", seconds)
    pace = Probe(tuned(), WINDOWS, LONGER, Part(WINDOWS, 2, 9)).pace()
    assert pace.first_pass == pytest.approx(1 + 5 * 9 / 8)
    assert pace.later == pytest.approx(0.5 + 5 * 9 / 80)


def test_what_is_cut_is_where_most_is_learned_from():
    inputs = torch.arange(20).view(2, 10)
    targets = torch.full((2, 10), -100)
    targets[0, 7:9], targets[1, 2] = 1, 1
    x, y, documents = cut((inputs, targets, inputs), 3)
    assert (y != -100).sum() == 2
    assert torch.equal(x, documents)
    assert x.shape == (2, 3)
    assert torch.equal(cut((inputs, targets), 10)[1], targets)


@pytest.mark.parametrize("muon", [False, True])
def test_an_update_that_takes_long_is_counted_and_not_made(muon, monkeypatch):
    settings, model = replace(SETTINGS, muon=muon), model_of()
    optimizer = make_optimizer(model, settings)
    list(fit(model, DATASET, settings, optimizer=optimizer, max_steps=1))
    kept = [t for values in optimizer.state.values() for t in values.values() if t.dim()]
    size = sum(t.numel() * t.element_size() for t in kept)
    assert Probe(model, DATASET, settings).optimizer_bytes == size
    monkeypatch.setattr("nanogpt_surgery.training.estimates.update_operations", lambda _: 1e30)
    monkeypatch.setattr("nanogpt_surgery.training.estimates.matmul_rate", lambda *_: 1e12)
    before = hashes(model)
    probe = Probe(model, DATASET, settings)
    pace = probe.pace()
    assert hashes(model) == before
    assert probe.optimizer_bytes == size
    assert pace.later == pytest.approx(1e18)
