"""A plan counts what there is, and leaves every bit where it was."""

import torch
from small_training import DATASET, SETTINGS, VALIDATION, hashes, model_of

from nanogpt_surgery import inject_lora
from nanogpt_surgery.training.planning import plan_training


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
    parts = ("weights", "gradient", "optimizer", "activation", "logits")
    assert plan["memory_bytes"] == sum(plan[f"{part}_bytes"] for part in parts)
    assert plan["tokens"] == 6 * 5 * 9
    assert plan["evaluations"] == 1


def test_what_is_frozen_or_computed_again_takes_less():
    plain = plan_training(model_of(), DATASET, SETTINGS)
    again = plan_training(
        model_of(),
        DATASET,
        SETTINGS.__class__(**(SETTINGS.to_dict() | {"gradient_checkpointing": True})),
    )
    assert again["activation_bytes"] < plain["activation_bytes"] / 2
    tuned = model_of()
    inject_lora(tuned, "lm_head", rank=2)
    head = plan_training(tuned, DATASET, SETTINGS)
    assert head["activation_bytes"] == 0
    assert head["optimizer_bytes"] == 8 * head["trained_parameters"]
    assert "evaluations" in head
    assert head["evaluations"] == 0
