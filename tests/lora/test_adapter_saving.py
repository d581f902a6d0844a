"""What is saved is what takes part, whole, and under names that can be loaded; or it is refused."""

import pytest
import torch
from helpers.adapters import adapted
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    inject_lora,
    load_adapter,
    lora_log,
    remove_lora,
    save_adapter,
    swap_lora,
    undo_lora,
)
from nanogpt_surgery.lora.several import lora_layers

LLAMA = FAMILY_CONFIGS["llama"]
IDS = random_ids(LLAMA, 2, 9)


@pytest.mark.parametrize("others", [0, 1])
def test_an_adapter_at_another_weight_is_not_saved_as_if_it_were_whole(others, tmp_path):
    model = adapted(LLAMA)
    whole = model(IDS)
    if others:
        inject_lora(model, "q_proj", name="other")
    blend_lora(model, {"default": 0.5})
    with pytest.raises(SurgeryError, match=r"'default'.*0\.5") as caught:
        save_adapter(model, tmp_path / "adapter")
    assert "swap_lora(model, 'default')" in caught.value.hint
    assert "merge_lora" in caught.value.hint
    assert not list(tmp_path.iterdir())
    save_adapter(model, tmp_path / "named", name="default")  # whoever names it means all of it
    swap_lora(model, "default")
    save_adapter(model, tmp_path / "adapter")
    for folder in ("named", "adapter"):
        load_adapter(again := tiny_model(LLAMA), tmp_path / folder)
        assert torch.equal(again(IDS), whole)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compiled_model_s_adapter_has_the_names_of_the_plain_one_s(name, tmp_path):
    config = FAMILY_CONFIGS[name]
    model, ids = tiny_model(config), random_ids(config, 2, 9)
    compiled = torch.compile(model, backend="eager")
    inject_lora(compiled, ["q_proj", "up_proj"], rank=3)
    train_a_little(compiled)
    out = model(ids)
    save_adapter(compiled, tmp_path / "adapter")
    load_adapter(again := tiny_model(config), tmp_path / "adapter")
    assert torch.equal(again(ids), out)
    remove_lora(compiled)
    load_adapter(compiled, tmp_path / "adapter")
    assert torch.equal(compiled(ids), out)
    assert lora_log(compiled).rows[-1]["operation"] == "load default"
    undo_lora(compiled)
    assert not any("updates" in path for path, _ in model.named_parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_adapter_that_is_no_number_is_refused_by_name(value, tmp_path):
    model = adapted(LLAMA, ["q_proj", "v_proj"])
    lora_layers(model)["layers.1.self_attn.v_proj"].lora_B.data[0, 0] = value
    message = r"1 of 4\b.*model\.layers\.1\.self_attn\.v_proj"
    with pytest.raises(SurgeryError, match=message):
        save_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_the_folders_below_that_hold_an_adapter_are_named(tmp_path):
    for name in ("poet", "clerk"):
        save_adapter(adapted(LLAMA), tmp_path / name)
    with pytest.raises(SurgeryError, match=r"adapter_config\.json") as caught:
        load_adapter(tiny_model(LLAMA), tmp_path)
    for name in ("poet", "clerk"):
        assert str(tmp_path / name) in caught.value.hint


def test_an_adapter_on_a_module_of_one_s_own_that_is_compiled(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    compiled = torch.compile(model, backend="eager")
    inject_lora(compiled, "0", rank=2, dora=True)
    save_adapter(compiled, tmp_path / "adapter")
    remove_lora(compiled)
    load_adapter(model, tmp_path / "adapter")
    assert list(lora_layers(model)) == ["0"]
