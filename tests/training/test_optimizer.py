import pytest
import torch
from helpers.models import FAMILY_CONFIGS, tiny_model
from torch import nn

from nanogpt_surgery import FitSettings, SurgeryError, inject_lora
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.training.optimizer import make_optimizer

SETTINGS = FitSettings(learning_rate=0.1, weight_decay=0.5, beta1=0.8, beta2=0.95)


def grouped(optimizer: torch.optim.Optimizer) -> dict[float, list[nn.Parameter]]:
    return {group["weight_decay"]: group["params"] for group in optimizer.param_groups}


@pytest.mark.parametrize("config", FAMILY_CONFIGS.values(), ids=FAMILY_CONFIGS)
def test_matrices_decay_and_vectors_do_not(config):
    model = tiny_model(config)
    groups = grouped(make_optimizer(model, SETTINGS))
    matrices, vectors = groups[0.5], groups[0.0]
    assert all(p.dim() == 2 for p in matrices)
    assert all(p.dim() == 1 for p in vectors)
    both = [id(p) for p in matrices + vectors]
    assert sorted(both) == sorted(id(p) for p in model.parameters())  # a tied head once


def test_without_a_gradient_a_matrix_shrinks_and_a_vector_stays():
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer = make_optimizer(layer, SETTINGS)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * (1 - 0.1 * 0.5))
    assert torch.equal(layer.bias, before["bias"])


def test_it_is_adamw_as_written_down():
    """Loshchilov and Hutter's algorithm 2, by hand in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 3, bias=False)
    optimizer = make_optimizer(layer, SETTINGS)
    weight = layer.weight.detach().double().clone()
    mean = square = torch.zeros_like(weight)
    for step in range(1, 6):
        gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(step))
        layer.weight.grad = gradient.clone()
        optimizer.step()
        mean = 0.8 * mean + 0.2 * gradient.double()
        square = 0.95 * square + 0.05 * gradient.double() ** 2
        corrected = (mean / (1 - 0.8**step)) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        weight = weight - 0.1 * (corrected + 0.5 * weight)
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-5, atol=1e-6)


def test_only_what_can_be_trained_is_in_it():
    model = tiny_model(FAMILY_CONFIGS["llama"])
    inject_lora(model, "q_proj")
    optimizer = make_optimizer(model, SETTINGS)
    updates = [p for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)]
    assert {id(p) for p in grouped(optimizer)[0.5]} == {id(p) for p in updates}
    assert len(optimizer.param_groups) == 1  # no vectors, no empty group


def test_a_model_of_vectors_alone_is_no_trouble():
    assert set(grouped(make_optimizer(nn.LayerNorm(4), SETTINGS))) == {0.0}


def test_nothing_to_train_is_an_error():
    model = tiny_model(FAMILY_CONFIGS["llama"]).requires_grad_(False)
    with pytest.raises(SurgeryError) as caught:
        make_optimizer(model, SETTINGS)
    assert "inject_lora" in caught.value.hint
