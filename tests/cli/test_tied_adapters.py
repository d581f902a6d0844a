"""PEFT's adapters on a head that is tied to the embedding: each command is told what is meant."""

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.commands import LETTERS, called
from helpers.models import assert_equal_logits, tiny_model
from transformers import AutoModelForCausalLM

from nanogpt_surgery import CharacterTokenizer, GPTConfig, open_model, save_model

pytestmark = [  # PEFT's own, none of which ours can help
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer"),
]
SIZES = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 2, "block_size": 60}
CONFIG = GPTConfig.for_family("llama", vocab_size=96, tie_head=True, **SIZES)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
ADAPTERS = {
    "head": {"target_modules": ["lm_head"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
}
COMMANDS = {
    "generate": ["generate", "base", "--max-new-tokens", 3],
    "many": ["generate", "base", "--max-new-tokens", 3, "--samples", 2],
    "chat": ["chat", "base"],
    "eval": ["eval", "base", "text.txt"],
    "merge": ["merge", "base", "--out", "out"],
    "export": ["export", "base", "--format", "huggingface", "--out", "out"],
}
WRITING = ("merge", "export")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied base and PEFT's adapters on it."""
    place = tmp_path_factory.mktemp("tied")
    save_model(tiny_model(CONFIG), place / "base", CharacterTokenizer(LETTERS))
    (place / "text.txt").write_text("to be or not to be")
    (place / "nothing").write_text("")
    for name in ADAPTERS:
        theirs(place, name).save_pretrained(place / name)
    return place


def theirs(place: Path, name: str) -> peft.PeftModel:
    """PEFT's model with an adapter as training leaves it: nowhere zero."""
    base = AutoModelForCausalLM.from_pretrained(place / "base").eval()
    settings = peft.LoraConfig(r=3, lora_alpha=5, task_type="CAUSAL_LM", **ADAPTERS[name])
    adapted = peft.get_peft_model(base, settings).eval()
    draw = torch.Generator().manual_seed(5)
    for key, parameter in adapted.named_parameters():
        noise = torch.randn(parameter.shape, generator=draw) / 5
        if "lora_" in key:
            parameter.data = noise
        if "modules_to_save" in key:
            parameter.data += noise
    return adapted


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_tied_weight_takes_a_word(folder, tmp_path, monkeypatch, command, adapter) -> None:
    monkeypatch.chdir(folder)
    words = [str(tmp_path / word) if word == "out" else word for word in COMMANDS[command]]
    with (folder / "nothing").open() as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        _, refused = called(*words, "--adapter", adapter, check=1)
        assert "--tied untie" in refused
        assert not (tmp_path / "out").exists()
        called(*words, "--adapter", adapter, "--tied", "untie")
    if command in WRITING:
        merged, _ = open_model(tmp_path / "out")
        with torch.no_grad():
            assert_equal_logits(merged(IDS), theirs(folder, adapter)(IDS).logits)


def test_the_adapter_counts(folder, monkeypatch) -> None:
    """What eval measures is PEFT's loss, and no longer the base's."""
    monkeypatch.chdir(folder)
    text = "to be or not to be"
    ids = torch.tensor([CharacterTokenizer(LETTERS).encode(text)])
    with torch.no_grad():
        loss = float(theirs(folder, "head")(input_ids=ids, labels=ids).loss)
    measured = ["eval", "base", "text.txt", "--json"]
    out, _ = called(*measured, "--adapter", "head", "--tied", "untie")
    assert json.loads(out)["loss"] == pytest.approx(loss, rel=1e-5)
    assert json.loads(called(*measured)[0])["loss"] != pytest.approx(loss, rel=1e-3)
