"""`surgery export --adapter`: a merge like any other, into the form that is asked for."""

import json
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted
from helpers.commands import called
from helpers.models import tiny_model, train_a_little
from helpers.tokenizers import byte_level

from nanogpt_surgery import (
    GPTConfig,
    inject_lora,
    load_adapter,
    open_model,
    remove_lora,
    save_adapter,
    save_model,
)
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.lora.several import lora_layers

SIZES = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 2, "block_size": 40, "n_inner": 64}
CONFIG = GPTConfig.for_family("llama", vocab_size=300, **SIZES)
FORMS = ["F32", "F16", "BF16", "Q8_0", "huggingface"]
Q_PROJ = "layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bfloat16 base; adapters on it that show, that are faint, and that never learned."""
    place = tmp_path_factory.mktemp("bases")
    base = tiny_model(CONFIG).bfloat16()
    save_model(base, place / "base", PretrainedTokenizer(byte_level(), stop_ids=[2]))
    for name, size in (("plain", 0.2), ("faint", 0.02), ("newborn", 0.0)):
        inject_lora(base, ["q_proj", "down_proj"], rank=2)
        train_a_little(base, size=size)
        save_adapter(base, place / name)
        remove_lora(base)
    return place


def exported(place: Path, adapter: str, form: str, out: Path, *more: object) -> tuple[dict, str]:
    arguments = ["export", place / "base", "--adapter", place / adapter, "--format", form]
    said, errors = called(*arguments, "--out", out, "--json", *more)
    return json.loads(said), errors


def wanted(place: Path, adapter: str) -> torch.Tensor:
    """W + ΔW in float32."""
    model, _ = open_model(place / "base", torch.float32)
    load_adapter(model, place / adapter)
    layer = lora_layers(model)[Q_PROJ]
    return (layer.original_layer.weight + layer.delta_weight()).detach()


def test_a_wider_file_keeps_all_that_the_adapter_learned(place, tmp_path) -> None:
    report, said = exported(place, "faint", "F32", tmp_path / "m.gguf")
    assert "and read it again" in said
    model, _ = open_model(tmp_path / "m.gguf", torch.float32)
    assert torch.equal(model.get_submodule(Q_PROJ).weight, wanted(place, "faint"))
    assert [row["change kept"] > 0.999999 for row in report["rows"]] == [True] * 4
    assert report["kl"] < 1e-9
    assert report["measured_on"] == "64 random tokens"


@pytest.mark.parametrize(
    ("form", "rounded"),
    [("F16", torch.float16), ("BF16", torch.bfloat16), ("huggingface", torch.bfloat16)],
)
def test_the_sum_is_rounded_once_to_the_form(place, tmp_path, form, rounded) -> None:
    report, _ = exported(place, "plain", form, tmp_path / "m", "--tolerance", 1)
    model, _ = open_model(tmp_path / "m")
    assert torch.equal(model.get_submodule(Q_PROJ).weight, wanted(place, "plain").to(rounded))
    dtypes = {row["dtype"] for row in report["rows"]}
    assert dtypes == {"bfloat16" if form == "huggingface" else form}
    assert all(0.5 < row["change kept"] < 1 for row in report["rows"])


def test_what_a_quantised_file_keeps_is_told(place, tmp_path) -> None:
    """24 columns are no multiple of 32, so a q_proj is stored as F16; 64 are."""
    report, _ = exported(place, "faint", "Q8_0", tmp_path / "m.gguf", "--tolerance", 1)
    by_layer = {row["layer"]: row for row in report["rows"]}
    assert by_layer[Q_PROJ]["dtype"] == "F16"
    down = by_layer["layers.1.mlp.down_proj"]
    assert down["dtype"] == "Q8_0"
    assert down["change kept"] < by_layer[Q_PROJ]["change kept"]
    called("export", place / "base", "--format", "Q8_0", "--out", tmp_path / "base.gguf")
    ours, base = (open_model(tmp_path / f"{n}.gguf")[0].layers[1].mlp.down_proj.weight
                  for n in ("m", "base"))  # fmt: skip
    assert down["weights changed"] == float((ours != base).double().mean()) > 0


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_that_never_learned_is_refused(place, tmp_path, form) -> None:
    arguments = ["export", place / "base", "--adapter", place / "newborn", "--format", form]
    _, said = called(*arguments, "--out", tmp_path / "m", check=1)
    assert "newborn" in said and "ΔW is 0 in all 4 layers" in said
    assert not list(tmp_path.iterdir())
    called(*arguments, "--out", tmp_path / "m", "--force")
    assert (tmp_path / "m").exists()


@pytest.mark.parametrize(("form", "name"), [("BF16", "BF16"), ("huggingface", "bfloat16")])
def test_a_change_that_the_form_swallows_is_refused(place, tmp_path, form, name) -> None:
    model, _ = open_model(place / "base", torch.float32)
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model, size=1e-5)
    save_adapter(model, tmp_path / "dust")
    arguments = ["export", place / "base", "--adapter", tmp_path / "dust", "--out", tmp_path / "m"]
    _, said = called(*arguments, "--format", form, check=1)
    assert f"lost in the rounding to {name}" in said
    assert "--format F32" in said
    assert not (tmp_path / "m").exists()
    called(*arguments, "--format", "F32")


@pytest.mark.parametrize("form", ["BF16", "huggingface"])
def test_what_is_not_the_adapted_model_is_refused(place, tmp_path, form) -> None:
    arguments = ["export", place / "base", "--adapter", place / "plain", "--format", form]
    more = ["--out", tmp_path / "m", "--tolerance", 1e-12]
    _, said = called(*arguments, *more, check=1)
    assert "the merged model is not the adapted one" in said
    assert not list(tmp_path.iterdir())
    called(*arguments, *more, "--force")


def test_the_head_of_a_tied_model_gets_a_matrix_of_its_own(tmp_path) -> None:
    config = GPTConfig.for_family("llama", vocab_size=300, **SIZES, tie_head=True)
    model = adapted(config, ["lm_head"])
    save_adapter(model, tmp_path / "a")
    remove_lora(model)
    save_model(model, tmp_path / "m", PretrainedTokenizer(byte_level(), stop_ids=[2]))
    called("export", tmp_path / "m", "--adapter", tmp_path / "a", "--out", tmp_path / "m.gguf")
    made, _ = open_model(tmp_path / "m.gguf")
    assert made.lm_head.weight is not made.embed_tokens.weight
    assert torch.equal(made.embed_tokens.weight, model.embed_tokens.weight.half())
