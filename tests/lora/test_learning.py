import pytest
import torch
from helpers.builds import MODELS, some_ids
from torch import nn

from nanogpt_surgery import (
    GPTDataset,
    SurgeryError,
    disable_lora,
    fit,
    inject_lora,
    learned,
)
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.training.checks import check_gradients, check_moved, check_optimizer
from nanogpt_surgery.training.optimizer import make_optimizer
from nanogpt_surgery.training.settings import FitSettings

SETTINGS = FitSettings(
    max_steps=3, batch_size=2, warmup_steps=0, device="cpu", precision="float32", compile="off"
)


def dataset() -> GPTDataset:
    return GPTDataset.from_ids(some_ids(batch=1, tokens=90)[0], block_size=8)


@pytest.mark.parametrize("kind", [{}, {"dora": True}, {"pissa": True}, {"rslora": True}])
@pytest.mark.parametrize("patient", ["SimpleGPT", "another"])
def test_fit_passes_what_learns(kind, patient):
    model = MODELS[patient]()
    inject_lora(model, [r".*(?<!embed_positions)"], rank=2, **kind)
    assert len(list(fit(model, dataset(), SETTINGS))) == 3
    report = learned(model)
    assert all(row["moved"] for row in report.rows)
    assert len(report.rows) == len(lora_layers(model))


def test_fit_names_the_parameters_that_the_optimizer_lacks():
    model = MODELS["SimpleGPT"]()
    early = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inject_lora(model, "q_proj", rank=2)
    with pytest.raises(SurgeryError, match=r"4 trainable .*layers\.0\.self_attn\.q_proj.*lora_A"):
        fit(model, dataset(), SETTINGS, optimizer=early)
    list(fit(model, dataset(), SETTINGS, optimizer=make_optimizer(model, SETTINGS), examine=False))


def test_fit_stops_after_the_first_step_when_no_gradient_arrives():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, ["q_proj", "lm_head"], rank=2)
    lora_layers(model)["layers.1.self_attn.q_proj"].enabled = False
    steps = fit(model, dataset(), SETTINGS)
    with pytest.raises(SurgeryError, match=r"1 of the adapter's updates: layers\.1\.self_attn"):
        next(steps)


def test_fit_stops_when_nothing_moves():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "v_proj", rank=2)
    with pytest.raises(SurgeryError, match="2 of the adapter's updates have not moved"):
        next(fit(model, dataset(), SETTINGS, learning_rate=0.0))


def test_fit_examines_the_last_step_too():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "v_proj", rank=2)
    steps = fit(model, dataset(), SETTINGS)
    next(steps), next(steps)
    disable_lora(model)
    with pytest.raises((SurgeryError, RuntimeError)):
        next(steps)


def test_a_frozen_parameter_that_moves_is_named():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "v_proj", rank=2)
    steps = fit(model, dataset(), SETTINGS)
    next(steps)
    model.norm.weight.data[3] += 1e-6
    with pytest.raises(SurgeryError, match=r"1 frozen parameters have changed.*norm\.weight"):
        list(steps)


def test_a_layer_that_is_not_used_is_named():
    class Deaf(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = Deaf()
    inject_lora(model, ["used", "unused"], rank=1)
    model(torch.randn(2, 3)).square().sum().backward()
    with pytest.raises(SurgeryError, match="unused") as caught:
        check_gradients(model)
    assert "used (default)" not in caught.value.what.replace("unused (default)", "")
    with pytest.raises(SurgeryError, match=r"used.*unused"):
        check_moved(model)
    check_optimizer(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))


def test_lora_plus_gives_b_a_rate_of_its_own():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, ["q_proj", "embed_tokens"], rank=2, dora=True)
    settings = FitSettings(learning_rate=1e-2, lora_plus_ratio=16, max_steps=4, warmup_steps=1)
    optimizer = make_optimizer(model, settings)
    fast = {id(p) for g in optimizer.param_groups if g["lr"] == 0.16 for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in fast}
    assert len(names) == 2
    assert all("q_proj" in name and name.endswith("lora_B") for name in names)
    step = next(
        fit(model, dataset(), settings, optimizer=optimizer, device="cpu", compile="off",
            precision="float32", batch_size=2)
    )  # fmt: skip
    rates = {g["lr"] / step.learning_rate for g in optimizer.param_groups}
    assert rates == {1, 16}
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == 2 * 3 + 3


def test_without_a_ratio_there_is_no_further_group():
    model = MODELS["SimpleGPT"]()
    inject_lora(model, "q_proj", rank=2)
    assert len(make_optimizer(model, SETTINGS).param_groups) == 1
