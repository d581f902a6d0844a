from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted, change_config, unsealed
from helpers.models import FAMILY_CONFIGS, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn

from nanogpt_surgery import (
    SurgeryError,
    SurgeryWarning,
    inject_lora,
    load_adapter,
    save_adapter,
)
from nanogpt_surgery.lora.several import lora_layers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
LLAMA = FAMILY_CONFIGS["llama"]


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def assert_refused(folder: Path, match: str, model: nn.Module | None = None) -> str:
    """Loading raises our own error and leaves the model as it was."""
    model = model or tiny_model(LLAMA)
    modules = dict(model.named_modules())
    trainable = [p.requires_grad for p in model.parameters()]
    with pytest.raises(SurgeryError, match=match) as caught:
        load_adapter(model, folder)
    assert dict(model.named_modules()) == modules
    assert [p.requires_grad for p in model.parameters()] == trainable
    return str(caught.value)


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_flipped_bit_is_caught(file, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert_refused(tmp_path / "adapter", rf"{file}.*sha256")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_missing_file_is_named(file, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    (tmp_path / "adapter" / file).unlink()
    assert_refused(tmp_path / "adapter", file)
    assert_refused(unsealed(tmp_path / "adapter"), file)


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TAMPERINGS = {
    "missing B": (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj.*lora_B"),
    "missing A": (lambda t: t.pop(f"{Q}.lora_A.weight"), "q_proj.lora_B"),
    "extra tensor": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(60)}),
        "lora_magnitude_vector",
    ),
    "ranks differ": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(2, 24)}),
        "q_proj has no lora_B of its rank",
    ),
    "a vector": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3)}),
        "q_proj has no lora_B of its rank",
    ),
    "other input": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 25)}),
        r"layers\.0\.self_attn\.q_proj.*\(60, 24\).*\(60, 25\)",
    ),
    "other output": (
        lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(61, 3)}),
        r"\(60, 24\).*\(61, 24\)",
    ),
    "nothing": (lambda t: t.clear(), "no LoRA at all"),
    "unknown layer": (
        lambda t: t.update(
            {f"{Q}x.lora_A.weight": torch.ones(3, 24), f"{Q}x.lora_B.weight": torch.ones(60, 3)}
        ),
        "q_projx",
    ),
}


@pytest.mark.parametrize("change, match", TAMPERINGS.values(), ids=TAMPERINGS)
def test_tensors_that_do_not_fit_are_refused(change, match, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    change_tensors(unsealed(tmp_path / "adapter"), change)
    assert_refused(tmp_path / "adapter", match)


def test_all_layers_that_do_not_fit_are_told_at_once(tmp_path):
    save_adapter(adapted(replace(LLAMA, n_inner=36), "down_proj"), tmp_path / "adapter")
    message = assert_refused(tmp_path / "adapter", "another model")
    for i in (0, 1):
        assert f"layers.{i}.mlp.down_proj is (24, 28) in the model and (24, 36)" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts"]),
        ("alora_invocation_tokens", [5]),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "loftq"),
        ("kasa_config", {"rank": 2}),
    ],
)
def test_an_option_that_changes_the_result_is_refused_by_name(option, value, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), **{option: value})
    assert_refused(tmp_path / "adapter", rf"{CONFIG}.*\b{option}\b")


def test_all_such_options_are_told_at_once(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    change_config(
        unsealed(tmp_path / "adapter"), layer_replication=[[0, 2]], bias="all", use_qalora=True
    )
    message = assert_refused(tmp_path / "adapter", "use_qalora")
    assert all(option in message for option in ("layer_replication", "bias", "use_qalora"))


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused(kind, tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), peft_type=kind)
    assert_refused(tmp_path / "adapter", rf"\b{kind}\b")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    (unsealed(tmp_path / "adapter") / TENSORS).write_bytes(b"no header")
    assert_refused(tmp_path / "adapter", TENSORS)


def test_a_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere")


def test_a_model_that_carries_a_lora_is_refused(tmp_path):
    model = adapted(LLAMA)
    save_adapter(model, tmp_path / "adapter")
    assert_refused(tmp_path / "adapter", "default", model)


def test_a_convolution_s_lora_is_called_that(tmp_path):
    save_adapter(adapted(LLAMA), tmp_path / "adapter")
    a, b = torch.randn(2, 24, 3, 3), torch.randn(60, 2, 1, 1)
    change_tensors(
        unsealed(tmp_path / "adapter"),
        lambda t: t.update({f"{Q}.lora_A.weight": a, f"{Q}.lora_B.weight": b}),
    )
    assert "merge_and_unload" in assert_refused(tmp_path / "adapter", r"\(2, 24, 3, 3\)")


def test_dora_on_a_base_where_an_output_has_no_length_is_refused(tmp_path):
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(7, 5))

    model = base()
    inject_lora(model, "0", rank=2, dora=True)
    save_adapter(model, tmp_path / "newborn")
    nn.init.normal_(lora_layers(model)["0"].lora_B)
    save_adapter(model, tmp_path / "trained")
    padded = base()
    padded[0].weight.data[3:] = 0
    message = "DoRA .* 0: 2 of its 5 outputs .* zero"
    with pytest.warns(SurgeryWarning), pytest.raises(SurgeryError, match=message):
        load_adapter(padded, tmp_path / "newborn", force=True)
    assert type(padded[0]) is nn.Linear
    with pytest.warns(SurgeryWarning, match="another base"):  # there ΔW has a length
        load_adapter(padded, tmp_path / "trained", force=True)
    assert bool(padded(torch.randn(2, 7)).isfinite().all())
