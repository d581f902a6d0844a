"""Models stored in bfloat16, where the processor has no arithmetic for it, and where it has."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.adapters import adapted, attach_adapter
from helpers.commands import LETTERS, called
from helpers.models import assert_equal_in_bfloat16, random_ids, tiny_model

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    SurgeryWarning,
    inject_lora,
    open_model,
    remove_lora,
    save_adapter,
    save_model,
)
from nanogpt_surgery.cli.framework.options import OpeningOptions
from nanogpt_surgery.history.model_history import history_of
from nanogpt_surgery.lora.linear import LoRAUpdate
from nanogpt_surgery.lora.several import lora_layers
from nanogpt_surgery.lora.stored_adapter import extract_adapter

SIZES = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 2, "block_size": 60}
CONFIG = GPTConfig.for_family("llama", vocab_size=96, tie_head=True, **SIZES)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored") / "m"
    save_model(tiny_model(CONFIG).bfloat16(), folder, CharacterTokenizer(LETTERS))
    return folder


def processor(monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool) -> None:
    monkeypatch.setattr("nanogpt_surgery.training.hardware.cpu_has_bfloat16", lambda: has_bfloat16)


def test_without_bfloat16_arithmetic_it_is_computed_in_float32(stored, monkeypatch) -> None:
    processor(monkeypatch, False)
    with pytest.warns(SurgeryWarning, match="float32, with 0 MiB"):
        model, _ = OpeningOptions().open(str(stored), [])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.lm_head.weight is model.embed_tokens.weight
    as_stored, _ = open_model(stored)
    ids = random_ids(CONFIG, 2, 40)
    with torch.no_grad():
        assert_equal_in_bfloat16(as_stored(ids), model(ids))


@pytest.mark.parametrize(
    ("has_bfloat16", "asked", "expected"),
    [
        (True, None, torch.bfloat16),
        (True, "float32", torch.float32),
        (False, "bfloat16", torch.bfloat16),
    ],
)
def test_what_is_asked_for_counts(stored, monkeypatch, has_bfloat16, asked, expected) -> None:
    processor(monkeypatch, has_bfloat16)
    model, _ = OpeningOptions(asked).open(str(stored), [])
    assert model.lm_head.weight.dtype == expected


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in float32, and its adapter, which also replaces the last norm."""
    place = tmp_path_factory.mktemp("operated")
    save_model(tiny_model(CONFIG), place / "m", CharacterTokenizer(LETTERS))
    model = adapted(CONFIG, ["q_proj", "lm_head"])
    adapter = replace(extract_adapter(model), whole={"norm.weight": torch.linspace(0.5, 2, 24)})
    remove_lora(model)
    attach_adapter(model, adapter)
    save_adapter(model, place / "a")
    return place


def test_an_adapter_sits_on_its_base_in_bfloat16(operated) -> None:
    adapters = [("a", operated / "a")]
    exact, _ = OpeningOptions().open(str(operated / "m"), adapters)
    model, _ = OpeningOptions("bfloat16").open(str(operated / "m"), adapters)
    updates = [module for module in model.modules() if isinstance(module, LoRAUpdate)]
    thin = {parameter for update in updates for parameter in update.parameters()}
    assert {p.dtype for p in thin} == {torch.float32}
    assert {p.dtype for p in model.parameters() if p not in thin} == {torch.bfloat16}
    ids = random_ids(CONFIG, 2, 40)
    with torch.no_grad():
        assert_equal_in_bfloat16(model(ids), exact(ids))


def test_an_adapter_knows_a_base_of_mixed_dtypes(operated, tmp_path, monkeypatch) -> None:
    """Its head is float32 and most of it bfloat16, in which it computes."""
    processor(monkeypatch, True)
    model, tokenizer = open_model(operated / "m")
    for layer in model.layers:
        layer.bfloat16()
    save_model(model, tmp_path / "m", tokenizer)
    inject_lora(model, ["v_proj", "lm_head"], rank=2, tied="untie")
    save_adapter(model, tmp_path / "a")
    opened, _ = OpeningOptions().open(str(tmp_path / "m"), [("a", tmp_path / "a")])
    head = opened.lm_head.original_layer.weight
    assert head.dtype == torch.bfloat16 == opened.layers[1].self_attn.k_proj.weight.dtype
    assert torch.equal(head, model.lm_head.original_layer.weight.bfloat16())
    with torch.no_grad():
        opened(random_ids(CONFIG, 2, 40))


@pytest.mark.parametrize("command", ["generate", "chat", "eval"])
def test_the_commands_say_so(stored, monkeypatch, tmp_path, command) -> None:
    processor(monkeypatch, False)
    (tmp_path / "empty").write_text("")
    (tmp_path / "text.txt").write_text("to be or not to be")
    arguments = {"generate": ["--max-new-tokens", 2], "chat": [], "eval": [tmp_path / "text.txt"]}
    with (tmp_path / "empty").open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        said = called(command, stored, *arguments[command])[1]
        assert "float32, with 0 MiB" in said and "--dtype bfloat16" in said
        more = ["--dtype", "bfloat16"]
        assert "float32" not in called(command, stored, *arguments[command], *more)[1]


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_an_adapter_on_quantized_weights(tmp_path: Path, bits: str) -> None:
    """It is held against the weights as they are stored, which are then let go."""
    config = replace(CONFIG, n_embd=96, n_inner=64, head_dim=16, tie_head=False)
    save_model(tiny_model(config), tmp_path / "m", CharacterTokenizer(LETTERS))
    adapter = adapted(config, ["q_proj", "down_proj"])
    save_adapter(adapter, tmp_path / "a", base=str(tmp_path / "m"))
    found, _ = OpeningOptions(quantize=bits).open(str(tmp_path / "m"), [("x", tmp_path / "a")])
    ids = random_ids(config, 2, 20)
    with torch.no_grad():
        error = (found(ids) - adapter(ids)).norm() / adapter(ids).norm()
        bare, _ = OpeningOptions(quantize=bits).open(str(tmp_path / "m"), [])
        assert (bare(ids) - found(ids)).norm() > 0.02 * bare(ids).norm()
    assert error < {"int8": 0.1, "int4": 0.7}[bits]
    kinds = {type(m.original_layer).__name__ for m in lora_layers(found).values()}
    assert kinds == {"QuantizedLinear"}
    floats = sum(p.numel() for n, p in found.named_parameters() if "updates" not in n)
    assert floats < 20 * config.n_embd  # norms
    # Nothing keeps the weights as they were.
    assert [done.operation for done in history_of(found).done] == ["swap to x"]
