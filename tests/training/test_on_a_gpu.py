"""What a step asks of a GPU, shown without one.

Tensors on the meta device have shapes and no numbers. Whatever would make the host wait for a
number of the device raises there: `item`, `nonzero`, a choice by a value. What runs here never
waits.
"""

from contextlib import nullcontext

import pytest
import torch
from helpers.models import CONFIGS, FAMILY_CONFIGS, tiny_model
from helpers.training_ways import adapted, answers, recipe, text
from torch import nn

from nanogpt_surgery import FitSettings, SimpleGPT
from nanogpt_surgery.training.fast import chunked_logits as loss
from nanogpt_surgery.training.fast.accelerate import Accelerated
from nanogpt_surgery.training.fast.chunked_logits import summed_loss
from nanogpt_surgery.training.fast.frozen_prefix import FrozenPrefix
from nanogpt_surgery.training.hardware import Hardware
from nanogpt_surgery.training.muon import Muon
from nanogpt_surgery.training.optimizer import set_learning_rate

SETTINGS = FitSettings(batch_size=2, grad_accum_steps=2, max_steps=2)


class Meta(Hardware):
    """The device without numbers; it has no generator to seed either."""

    def seeded(self, seed: int) -> nullcontext[None]:
        return nullcontext()


META = Meta(torch.device("meta"), torch.float32, False)


MODELS = {
    "gpt2": lambda: tiny_model(FAMILY_CONFIGS["gpt2"]),
    "llama": lambda: tiny_model(FAMILY_CONFIGS["llama"]),
    "qwen3": lambda: tiny_model(CONFIGS["qwen3-bias-untied"]),
    "dropout": lambda: SimpleGPT(53, 24, 3, 2, 19, dropout=0.1),
    "fast": recipe,
    "q and v": lambda: adapted(["q_proj", "v_proj"]),
    "head": lambda: adapted("lm_head"),
}


def losses_of_a_step(model, data, prefix):
    fast = Accelerated(model, SETTINGS, data, META, {}, prefix, {})
    batch = data.batch(0, 4, 1)
    parts = zip(*(tensor.chunk(2) for tensor in batch), strict=True)
    return [fast.forward_backward(rows, 0.5) for rows in parts]


@pytest.mark.parametrize("most", [40, 2**23])
@pytest.mark.parametrize("data", [text, answers])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_asked_for_and_not_waited_for(name, data, most, monkeypatch):
    monkeypatch.setattr(loss, "MOST_LOGITS", most)
    model = MODELS[name]().to("meta").train()
    found = losses_of_a_step(model, data(), None)
    assert [value.device.type for value in found] == ["meta", "meta"]
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("data", [text, answers])
@pytest.mark.parametrize("targets", ["lm_head", r"layers\.1\..*"])
def test_nor_with_states_that_are_kept(targets, data):
    model = adapted(targets).to("meta").train()
    prefix = FrozenPrefix(model, windows=9)
    for _ in range(2):  # computed, and then looked up
        found = losses_of_a_step(model, data(), prefix)
        assert found[0].device.type == "meta"
    assert len(prefix.places) == 4


def test_states_kept_in_a_file_stand_beside_computed_ones():
    model = adapted("lm_head").to("meta").train()
    prefix = FrozenPrefix(model, windows=1)
    ids = text().batch(0, 4, 1)[0]
    prefix.kept = torch.zeros(1, *ids[0].shape, model.config.n_embd)  # the host's, as a file's are
    prefix.places[ids[2].numpy().tobytes()] = 0
    assert prefix.hidden(ids).device.type == "meta"


@pytest.mark.parametrize("data", [text, answers])
@pytest.mark.parametrize("name", MODELS)
def test_nor_in_an_evaluation(name, data):
    model = MODELS[name]().to("meta").eval()
    with torch.no_grad():
        assert summed_loss(model, next(data().iter_all(4))).device.type == "meta"


def test_nor_in_an_update():
    """(AdamW is PyTorch's; its fused kernel is not to be had on this device.)"""
    matrices = [nn.Parameter(torch.randn(*shape, device="meta")) for shape in ((5, 3), (3, 5))]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    muon = Muon([{"params": matrices, "muon": True}], 0.02, 0.9, (0.9, 0.99))
    norm = nn.utils.get_total_norm([matrix.grad for matrix in matrices])
    nn.utils.clip_grads_with_norm_(matrices, 1.0, norm)
    set_learning_rate(muon, 0.02)
    muon.step()
    assert muon.state[matrices[0]]["momentum"].device.type == "meta"
