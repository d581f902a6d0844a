"""Every kind in common with PEFT, both ways, on transformers' models with random weights."""

import warnings

import pytest
import torch
from helpers.models import (
    FAMILY_CONFIGS,
    assert_equal_logits,
    random_ids,
    tiny_model,
    train_a_little,
)
from torch import nn

from nanogpt_surgery import (
    SimpleGPT,
    SurgeryError,
    SurgeryWarning,
    inject_lora,
    load_adapter,
    merge_lora,
    open_model,
    remove_lora,
    save_adapter,
    save_model,
    tensor_hashes,
)
from nanogpt_surgery.lora.several import lora_layers, trained_updates
from nanogpt_surgery.lora.variants import PiSSAUpdate

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

FAMILIES = ["gpt2-gelu-untied", "llama", "qwen2-untied", "qwen3"]
KINDS = {
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "pissa": {"pissa": True},
    "patterns": {"rank_pattern": {"v_proj": 2, r"layers\.1.*up_proj": 5},
                 "alpha_pattern": {r"layers\.0.*q_proj": 11}},
    "all": {"rslora": True, "dora": True, "pissa": True, "rank_pattern": {"v_proj": 2}},
}  # fmt: skip
TARGETS = ["q_proj", "v_proj", "up_proj", "embed_tokens", "lm_head"]


def shaken(model: nn.Module) -> nn.Module:
    """Every update away from its birth."""
    draw = torch.Generator().manual_seed(9)
    for update in trained_updates(model).values():
        for parameter in update.trainable():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=draw)
    return model


def operated(name: str, **kind: object) -> SimpleGPT:
    model = tiny_model(FAMILY_CONFIGS[name])
    inject_lora(model, TARGETS, rank=3, alpha=7, tied="untie", **kind)
    return shaken(model)


def theirs(name: str, folder) -> nn.Module:
    save_model(tiny_model(FAMILY_CONFIGS[name]), folder)
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def loaded_by_peft(name: str, adapter, folder) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's remarks on embeddings and tied heads
        return peft.PeftModel.from_pretrained(theirs(name, folder), adapter).eval()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_loads_what_is_written_here_and_is_read_back(name, kind, tmp_path):
    model, ids = operated(name, **kind), random_ids(FAMILY_CONFIGS[name], 2, 9)
    adapted = model(ids)
    plain = tiny_model(FAMILY_CONFIGS[name])(ids)
    assert (adapted - plain).abs().max() > 0.1 * plain.std()  # there is something to lose
    save_adapter(model, tmp_path / "ours")
    other = loaded_by_peft(name, tmp_path / "ours", tmp_path / "base")
    assert_equal_logits(other(ids).logits, adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other.save_pretrained(tmp_path / "peft", save_embedding_layers=True)
    again = tiny_model(FAMILY_CONFIGS[name])
    load_adapter(again, tmp_path / "peft", tied="untie")
    assert_equal_logits(again(ids), adapted)
    merge_lora(again)
    assert_equal_logits(again(ids), adapted)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_read_again_it_is_the_same_to_the_bit_and_can_be_trained_on(name, kind, tmp_path):
    model = operated(name, **kind)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_model(FAMILY_CONFIGS[name])
    load_adapter(again, tmp_path / "adapter")
    if name.startswith("gpt2") and "rank_pattern" in kind:  # v's scale differs from q's
        for path, layer in lora_layers(model).items():
            torch.testing.assert_close(lora_layers(again)[path].lora_B, layer.lora_B)
    else:
        assert tensor_hashes(again) == tensor_hashes(model)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    for path, layer in lora_layers(model).items():
        other = lora_layers(again)[path]
        assert (layer.rank, layer.alpha) == (other.rank, other.alpha)
        assert layer.scaling == pytest.approx(other.scaling, rel=1e-12)


def test_pissa_goes_out_plain_and_the_base_stays(tmp_path):
    model = operated("llama", pissa=True)
    assert isinstance(lora_layers(model)["lm_head"].update, PiSSAUpdate)
    save_adapter(model, tmp_path / "adapter")
    other = loaded_by_peft("llama", tmp_path / "adapter", tmp_path / "base")
    config = other.peft_config["default"]
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (6, 14, True)
    remove_lora(model)
    assert tensor_hashes(model) == tensor_hashes(tiny_model(FAMILY_CONFIGS["llama"]))


@pytest.mark.parametrize("name", FAMILIES)
def test_peft_s_modules_to_save_are_read(name, tmp_path):
    family = "gpt2" if "gpt2" in name else name.partition("-")[0]
    targets, whole = (["c_proj"], "ln_f") if family == "gpt2" else (["o_proj"], "norm")
    config = peft.LoraConfig(
        r=2, target_modules=targets, modules_to_save=[whole, "lm_head"],
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = peft.get_peft_model(theirs(name, tmp_path / "base"), config).eval()
        train_a_little(other)
        other.save_pretrained(tmp_path / "adapter")
    model, ids = tiny_model(FAMILY_CONFIGS[name]), random_ids(FAMILY_CONFIGS[name], 2, 9)
    first = tensor_hashes(model)
    plain = model(ids)
    load_adapter(model, tmp_path / "adapter", tied="untie")
    assert_equal_logits(model(ids), other(ids).logits)
    save_adapter(model, tmp_path / "again")
    back = loaded_by_peft(name, tmp_path / "again", tmp_path / "base2")
    assert_equal_logits(back(ids).logits, other(ids).logits)
    merge_lora(model)
    assert_equal_logits(model(ids), other(ids).logits)
    save_model(model, tmp_path / "merged")
    assert_equal_logits(open_model(tmp_path / "merged")[0](ids), other(ids).logits)
    model = tiny_model(FAMILY_CONFIGS[name])
    load_adapter(model, tmp_path / "adapter", tied="untie")
    remove_lora(model)
    assert tensor_hashes(model) == first
    assert torch.equal(model(ids), plain)


def test_an_adapter_on_a_transformers_model_is_the_one_on_ours(tmp_path):
    name = "llama"
    ours, ids = operated(name, dora=True), random_ids(FAMILY_CONFIGS[name], 2, 9)
    save_adapter(ours, tmp_path / "adapter")
    model = theirs(name, tmp_path / "base")
    load_adapter(model, tmp_path / "adapter")  # the fingerprints agree, too
    assert_equal_logits(model(ids).logits, ours(ids))
    save_adapter(model, tmp_path / "again")
    load_adapter(again := tiny_model(FAMILY_CONFIGS[name]), tmp_path / "again")
    assert tensor_hashes(again) == tensor_hashes(ours)


@pytest.mark.parametrize("name", ["gpt2-gelu-untied", "llama"])
def test_another_base_is_refused_and_force_warns(name, tmp_path):
    save_adapter(operated(name), tmp_path / "adapter")
    other = tiny_model(FAMILY_CONFIGS[name], seed=5)
    hashes = tensor_hashes(other)
    with pytest.raises(SurgeryError, match=r"8 of 8|6 of 6"):
        load_adapter(other, tmp_path / "adapter")
    assert tensor_hashes(other) == hashes
    with pytest.warns(SurgeryWarning, match=r"8 of 8|6 of 6"):
        load_adapter(other, tmp_path / "adapter", force=True)
    touched = tiny_model(FAMILY_CONFIGS[name])
    touched.layers[1].self_attn.v_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(SurgeryError, match=r"1 of [68]\b.*v_proj|1 of [68]\b.*c_attn"):
        load_adapter(touched, tmp_path / "adapter")
    touched = tiny_model(FAMILY_CONFIGS[name])
    touched.norm.weight.data += 1  # no adapter sits on it
    load_adapter(touched, tmp_path / "adapter")


def test_the_fingerprint_does_not_depend_on_the_dtype_a_file_is_opened_in(tmp_path):
    model = tiny_model(FAMILY_CONFIGS["llama"]).bfloat16()
    inject_lora(model, TARGETS)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(tiny_model(FAMILY_CONFIGS["llama"]).bfloat16().float(), tmp_path / "adapter")


def test_one_of_several_adapters_is_saved_by_name(tmp_path):
    model, ids = tiny_model(FAMILY_CONFIGS["llama"]), random_ids(FAMILY_CONFIGS["llama"], 2, 9)
    outputs = {}
    for name in ("first", "second"):
        inject_lora(model, "q_proj", rank=2, name=name)
        shaken(model)
        outputs[name] = model(ids)
    for name in outputs:
        save_adapter(model, tmp_path / name, name=name)
    again = tiny_model(FAMILY_CONFIGS["llama"])
    for name, output in outputs.items():
        load_adapter(again, tmp_path / name, name=name)
        assert torch.equal(again(ids), output)
