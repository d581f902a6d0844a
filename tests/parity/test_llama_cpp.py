"""What is written here runs in llama.cpp with the same greedy text, and reads in transformers."""

from dataclasses import replace

import pytest
import torch
from helpers.llama_cpp import assert_goes_on_alike, greedy_text, server
from helpers.models import FAMILY_CONFIGS, OWN_CONFIGS, assert_equal_logits, random_ids, tiny_model
from helpers.tokenizers import TEXT, byte_level, sentencepiece_like
from transformers import AutoModelForCausalLM

from nanogpt_surgery import (
    CharacterTokenizer,
    SurgeryError,
    SurgeryWarning,
    generate,
    inject_lora,
    open_model,
)
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.surgery import add_tokens, drop_unused_tokens, duplicate_layers, prune_layers

LETTERS = CharacterTokenizer("the quick brown fox jumps over the lazy dog\n 0123456789\\é日😀")
KNOWN = [k for k in FAMILY_CONFIGS if k not in ("gpt2-gelu-untied", "qwen3-bias-untied")]


def model_for(kind, tokenizer):
    config = FAMILY_CONFIGS[kind]
    sizes = {"vocab_size": tokenizer.vocab_size, "n_embd": 96, "head_dim": 16, "n_inner": 160}
    if config.positions == "learned":
        sizes["n_embd"] = 48
    return tiny_model(replace(config, **sizes, block_size=64))


@pytest.mark.parametrize("kind", KNOWN)
def test_every_family_runs_in_llama_cpp_with_the_same_text(kind, tmp_path):
    model = model_for(kind, LETTERS)
    report = save_gguf(model, tmp_path / "m.gguf", LETTERS, "F32")
    assert report.summary["largest_logit_error"] < 1e-4
    theirs = greedy_text(tmp_path / "m.gguf", "the quick日\\", 20)
    assert_goes_on_alike(model, LETTERS, "the quick日\\", theirs, 20)


@pytest.mark.parametrize("storage", ["F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-scaled-tied"])
def test_every_storage_runs_with_the_text_of_what_was_stored(storage, kind, tmp_path):
    model = model_for(kind, LETTERS)
    report = save_gguf(model, tmp_path / "m.gguf", LETTERS, storage)
    again, tokenizer = open_model(tmp_path / "m.gguf", torch.float32)
    theirs = greedy_text(tmp_path / "m.gguf", "brown fox", 6)
    assert_goes_on_alike(again, tokenizer, "brown fox", theirs, 6)
    assert {row["stored as"] for row in report.rows} >= {"F32", storage}


TOKENIZERS = {
    "bpe": lambda: BPETokenizer.train(TEXT, 290),
    "byte-level": lambda: PretrainedTokenizer(byte_level(), bos_id=1, stop_ids=[2], add_bos=True),
    "sentencepiece": lambda: PretrainedTokenizer(sentencepiece_like(), bos_id=1, stop_ids=[2]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_tokenizer_encodes_and_decodes_alike_in_llama_cpp(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]()
    model = model_for("llama", tokenizer)
    save_gguf(model, tmp_path / "m.gguf", tokenizer, "F32")
    running = server(tmp_path / "m.gguf")
    for prompt in ("The quick brown", "naïve café 日本", " It's 12345\n\n"):
        answer = running.handle_completions({"prompt": prompt, "max_tokens": 1, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids(tokenizer, prompt))
        ids = list(generate(model, prompt_ids(tokenizer, prompt), 1, 0))
        if ids[0] not in tokenizer.stop_ids:
            assert answer["choices"][0]["text"].strip() in tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_transformers_reads_the_file_with_equal_logits(kind, tmp_path):
    # It takes GPT-2 for one of 1,024 positions, and reads no rotary factors and no head of Qwen3.
    tokenizer = BPETokenizer.train(TEXT, 290)
    config = model_for(kind, tokenizer).config
    block_size = 1024 if kind == "gpt2" else 64
    model = tiny_model(replace(config, n_inner=192, block_size=block_size))
    save_gguf(model, tmp_path / "m.gguf", tokenizer, "F32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").eval()
    ids = random_ids(model.config, 1, 9)
    with torch.no_grad():
        assert_equal_logits(model(ids), theirs(ids).logits)


@pytest.mark.parametrize("storage", ["F32", "F16", "BF16", "Q8_0"])
@pytest.mark.parametrize("kind", ["gpt2", "llama-all-bias", "qwen2", "qwen3"])
def test_a_written_file_opens_as_the_model_with_its_tokenizer(storage, kind, tmp_path):
    tokenizer = PretrainedTokenizer(byte_level(), bos_id=1, stop_ids=[2], chat_template="{{x}}")
    model = model_for(kind, tokenizer)
    report = save_gguf(model, tmp_path / "m.gguf", tokenizer, storage)
    again, opened = open_model(tmp_path / "m.gguf", torch.float32)
    assert opened.encode(TEXT) == tokenizer.encode(TEXT)
    assert (opened.bos_id, opened.stop_ids, opened.chat_template) == (1, {2}, "{{x}}")
    assert replace(again.config, norm_eps=2e-3) == model.config
    if storage == "F32":
        assert report.summary["largest_logit_error"] == 0
    else:
        assert report.summary["largest_logit_error"] > 0


@pytest.mark.parametrize("kind", [*OWN_CONFIGS, "gpt2-gelu-untied", "qwen3-bias-untied"])
def test_what_llama_cpp_has_not_is_refused_and_nothing_is_written(kind, tmp_path):
    if kind == "llama-uneven-width":
        pytest.skip("a family's axes: llama.cpp has it")
    model = tiny_model((FAMILY_CONFIGS | OWN_CONFIGS)[kind])
    with pytest.raises(SurgeryError, match=r"llama\.cpp"):
        save_gguf(model, tmp_path / "m.gguf", None, "F32")
    assert list(tmp_path.iterdir()) == []


def test_a_lora_a_missing_tokenizer_and_another_file_in_the_way_are_said(tmp_path):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    with pytest.warns(SurgeryWarning, match="tokenizer"):
        save_gguf(model, tmp_path / "m.gguf")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(SurgeryError, match="notes"):
        save_gguf(model, tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    inject_lora(model)
    with pytest.raises(SurgeryError, match="LoRA"):
        save_gguf(model, tmp_path / "m.gguf")


def test_weights_beyond_the_range_of_f16_are_not_kept(tmp_path):
    model = tiny_model(FAMILY_CONFIGS["llama"])
    with torch.no_grad():
        model.layers[1].mlp.up_proj.weight[3, 4] = 1e6
    with pytest.raises(SurgeryError, match=r"1\.mlp\.up_proj"):
        save_gguf(model, tmp_path / "m.gguf", LETTERS, "F16")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_a_model_of_another_structure_and_vocabulary_runs_in_llama_cpp(kind, tmp_path):
    tokenizer = TOKENIZERS["byte-level"]()
    model = model_for(kind, tokenizer)
    duplicate_layers(model, [0])
    prune_layers(model, [2])
    tokenizer, _ = drop_unused_tokens(model, tokenizer, "The quick brown fox and naïve café")
    tokenizer, _ = add_tokens(model, tokenizer, ["brown fox", "<tool>"])
    save_gguf(model, tmp_path / "m.gguf", tokenizer, "F32")
    prompt = "The quick brown fox <tool> naïve"
    running = server(tmp_path / "m.gguf")
    answer = running.handle_completions({"prompt": prompt, "max_tokens": 8, "temperature": 0})
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids(tokenizer, prompt))
    ids = list(generate(model, prompt_ids(tokenizer, prompt), 8, 0))
    assert answer["choices"][0]["text"] == tokenizer.decode(ids)
