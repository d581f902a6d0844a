import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONFIGS, FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model
from torch import nn

from nanogpt_surgery import (
    SimpleGPT,
    SurgeryError,
    inject_lora,
    load_adapter,
    merge_lora,
    remove_lora,
    save_adapter,
)
from nanogpt_surgery.lora.operations import has_lora, lora_layers

CONFIG, TENSORS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "MANIFEST.json"
LLAMA = FAMILY_CONFIGS["llama"]
EVERY_LINEAR = r".*_proj|lm_head"


def adapted(config=LLAMA, targets=EVERY_LINEAR, rank: int = 3, alpha: float = 5) -> SimpleGPT:
    """A model whose updates are as training leaves them: nowhere zero."""
    model = tiny_model(config)
    inject_lora(model, targets, rank, alpha)
    randomise_updates(model)
    return model


def randomise_updates(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for matrix in (layer.lora_A, layer.lora_B):
                matrix.copy_(torch.randn(matrix.shape, generator=draw) / 5)


def unsealed(folder: Path) -> Path:
    """The folder as another program would leave it: without our manifest."""
    (folder / MANIFEST).unlink()
    return folder


def change_config(folder: Path, **changes: object) -> None:
    contents = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(contents | changes), encoding="utf-8")


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


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("targets", ["q_proj", EVERY_LINEAR])
def test_loaded_is_what_was_saved(config, targets, tmp_path):
    model = adapted(config, targets)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(config)
    load_adapter(again, tmp_path / "adapter")
    assert lora_layers(again).keys() == lora_layers(model).keys()
    for layer, other in zip(lora_layers(model).values(), lora_layers(again).values(), strict=True):
        assert torch.equal(layer.lora_A, other.lora_A)
        assert torch.equal(layer.lora_B, other.lora_B)
        assert layer.rank == other.rank
    ids = random_ids(config, 2, 9)
    assert torch.equal(again(ids), model(ids))


def test_a_loaded_adapter_can_be_trained_and_removed(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    model = tiny_model(LLAMA).train()
    base = model(random_ids(LLAMA, 1, 6))
    load_adapter(model, tmp_path / "adapter")
    assert all(module.training for module in model.modules())
    updates = {id(p) for layer in lora_layers(model).values() for p in (layer.lora_A, layer.lora_B)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == updates
    remove_lora(model)
    assert torch.equal(model(random_ids(LLAMA, 1, 6)), base)
    assert all(p.requires_grad for p in model.parameters())


def test_a_bfloat16_model_keeps_its_update_in_float32(tmp_path):
    model = tiny_model(LLAMA).bfloat16()
    inject_lora(model, "v_proj")
    randomise_updates(model)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(LLAMA).bfloat16()
    load_adapter(again, tmp_path / "adapter")
    ids = random_ids(LLAMA, 1, 6)
    assert torch.equal(again(ids), model(ids))
    assert all(t.dtype == torch.float32 for t in load_file(tmp_path / "adapter" / TENSORS).values())


def test_the_folder_is_in_peft_s_format(tmp_path):
    save_adapter(adapted(targets=["q_proj", "down_proj"]), tmp_path / "adapter", base="some/base")
    assert {file.name for file in (tmp_path / "adapter").iterdir()} == {CONFIG, TENSORS, MANIFEST}
    contents = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    names = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("mlp.down_proj", "self_attn.q_proj")]
    assert contents == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/base",
        "revision": None,
        "r": 3,
        "lora_alpha": 5,
        "lora_dropout": 0.0,
        "target_modules": names,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter" / TENSORS).items()}
    assert len(shapes) == 8
    q = "base_model.model.model.layers.1.self_attn.q_proj"
    assert shapes[f"{q}.lora_A.weight"] == (3, 24)
    assert shapes[f"{q}.lora_B.weight"] == (60, 3)


def test_a_gpt2_s_queries_keys_and_values_are_fused(tmp_path):
    config = FAMILY_CONFIGS["gpt2"]
    save_adapter(adapted(config, ["q_proj", "v_proj", "up_proj"]), tmp_path / "adapter")
    contents = json.loads((tmp_path / "adapter" / CONFIG).read_text(encoding="utf-8"))
    assert contents["fan_in_fan_out"] is True
    shapes = {k: tuple(t.shape) for k, t in load_file(tmp_path / "adapter" / TENSORS).items()}
    c_attn = "base_model.model.transformer.h.0.attn.c_attn"
    assert shapes[f"{c_attn}.lora_A.weight"] == (2 * 3, 24)
    assert shapes[f"{c_attn}.lora_B.weight"] == (3 * 24, 2 * 3)
    assert shapes["base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"] == (40, 3)
    assert len(contents["rank_pattern"]) + len(contents["alpha_pattern"]) == 2 * 2


def test_any_module_keeps_its_own_names(tmp_path):
    def perceptron() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3)))

    model, x = perceptron(), torch.randn(2, 4)
    inject_lora(model, "2.0", rank=2)
    randomise_updates(model)
    save_adapter(model, tmp_path / "adapter")
    assert set(load_file(tmp_path / "adapter" / TENSORS)) == {
        "base_model.model.2.0.lora_A.weight",
        "base_model.model.2.0.lora_B.weight",
    }
    again = perceptron()
    load_adapter(again, tmp_path / "adapter")
    assert torch.equal(again(x), model(x))


def test_a_name_that_ends_another_is_told_from_it(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3)))
    inject_lora(model, "^0$", rank=2)
    assert list(lora_layers(model)) == ["0"]
    save_adapter(model, tmp_path / "adapter")
    remove_lora(model)
    load_adapter(model, tmp_path / "adapter")
    assert list(lora_layers(model)) == ["0"]


def test_saving_again_replaces_what_was_there(tmp_path):
    first, second = adapted(targets="q_proj"), adapted(targets="v_proj")
    save_adapter(first, tmp_path / "adapter")
    save_adapter(second, tmp_path / "adapter")
    model = tiny_model(LLAMA)
    load_adapter(model, tmp_path / "adapter")
    assert lora_layers(model).keys() == lora_layers(second).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_foreign_folder_is_not_written_over(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(SurgeryError, match="not written by this program"):
        save_adapter(adapted(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_model_without_a_lora_has_nothing_to_save(tmp_path):
    with pytest.raises(SurgeryError, match="no LoRA"):
        save_adapter(tiny_model(LLAMA), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_flipped_bit_is_caught(file, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    path = tmp_path / "adapter" / file
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    assert_refused(tmp_path / "adapter", rf"{file} has changed since it was written")


@pytest.mark.parametrize("file", [CONFIG, TENSORS])
def test_a_missing_file_is_named(file, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    (tmp_path / "adapter" / file).unlink()
    assert_refused(tmp_path / "adapter", f"{file} is missing")
    assert_refused(unsealed(tmp_path / "adapter"), f"{file} is missing")


Q = "base_model.model.model.layers.0.self_attn.q_proj"
TAMPERINGS = {
    "missing B": (lambda t: t.pop(f"{Q}.lora_B.weight"), "q_proj has no lora_B"),
    "missing A": (lambda t: t.pop(f"{Q}.lora_A.weight"), "not understood: .*q_proj.lora_B"),
    "extra tensor": (
        lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(60)}),
        "not understood: .*lora_magnitude_vector",
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
        r"layers.0.self_attn.q_proj is \(60, 24\) in the model and \(60, 25\) in the adapter",
    ),
    "other output": (
        lambda t: t.update({f"{Q}.lora_B.weight": torch.ones(61, 3)}),
        r"\(60, 24\) in the model and \(61, 24\)",
    ),
    "nothing": (lambda t: t.clear(), "no LoRA at all"),
    "unknown layer": (
        lambda t: t.update(
            {f"{Q}x.lora_A.weight": torch.ones(3, 24), f"{Q}x.lora_B.weight": torch.ones(60, 3)}
        ),
        "another model: .*q_projx",
    ),
}


@pytest.mark.parametrize("change, match", TAMPERINGS.values(), ids=TAMPERINGS)
def test_tensors_that_do_not_fit_are_refused(change, match, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
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
        ("use_dora", True),
        ("use_rslora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
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
    save_adapter(adapted(), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), **{option: value})
    assert_refused(tmp_path / "adapter", f"sets {option}.*not supported")


def test_all_such_options_are_told_at_once(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), use_dora=True, bias="all", use_rslora=True)
    message = assert_refused(tmp_path / "adapter", "not supported")
    assert all(option in message for option in ("use_dora", "bias", "use_rslora"))


@pytest.mark.parametrize("kind", ["IA3", "PREFIX_TUNING", None])
def test_another_kind_of_adapter_is_refused(kind, tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    change_config(unsealed(tmp_path / "adapter"), peft_type=kind)
    assert_refused(tmp_path / "adapter", f"is a {kind}, not a LORA")


def test_options_that_change_nothing_are_passed_over(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    change_config(
        unsealed(tmp_path / "adapter"),
        init_lora_weights="gaussian",
        lora_dropout=0.1,
        peft_version="99",
        a_future_key=None,
        megatron_core="megatron.core",
    )
    again = tiny_model(LLAMA)
    load_adapter(again, tmp_path / "adapter")
    ids = random_ids(LLAMA, 1, 6)
    assert torch.equal(again(ids), model(ids))


def test_alpha_follows_its_patterns(tmp_path):
    save_adapter(adapted(targets=["q_proj", "v_proj"]), tmp_path / "adapter")
    patterns = {r"layers.0.self_attn.q_proj": 50, r".*\.1\..*v_proj": 7, "proj": 1000}
    change_config(unsealed(tmp_path / "adapter"), alpha_pattern=patterns, lora_alpha=9)
    model = tiny_model(LLAMA)
    load_adapter(model, tmp_path / "adapter")
    scales = {name: layer.scaling * 3 for name, layer in lora_layers(model).items()}
    assert scales == {
        "layers.0.self_attn.q_proj": pytest.approx(50),
        "layers.0.self_attn.v_proj": pytest.approx(9),
        "layers.1.self_attn.q_proj": pytest.approx(9),
        "layers.1.self_attn.v_proj": pytest.approx(7),
    }


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    save_adapter(adapted(), tmp_path / "adapter")
    (unsealed(tmp_path / "adapter") / TENSORS).write_bytes(b"no header")
    assert_refused(tmp_path / "adapter", "not a safetensors file")


def test_a_missing_folder_is_named(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere")


def test_a_model_that_carries_a_lora_is_refused(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    assert_refused(tmp_path / "adapter", "carries a LoRA already", model)


def test_saved_merged_and_loaded_agree(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(LLAMA)
    load_adapter(again, tmp_path / "adapter")
    merge_lora(again)
    assert not has_lora(again)
    ids = random_ids(LLAMA, 2, 8)
    assert_equal_logits(again(ids), model(ids))
