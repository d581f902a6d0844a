"""A trained model goes from llama2.c's format to every other, and tells the same story."""

import pytest
import torch
from helpers.llama_cpp import greedy_text
from helpers.models import assert_equal_logits
from helpers.stories import stories
from transformers import AutoModelForCausalLM, AutoTokenizer

from nanogpt_surgery import generate, open_model, save_model
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.formats.gguf.writing import save_gguf

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def told():
    model, tokenizer = stories()
    ids = prompt_ids(tokenizer, PROMPT)
    return model, tokenizer, tokenizer.decode(list(generate(model, ids, 40, 0)))


def test_it_tells_a_story(told):
    assert ", there was a little girl named" in told[2]


def test_it_tells_the_same_in_transformers(told, tmp_path):
    model, tokenizer, story = told
    save_model(model, tmp_path / "m", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    encode = AutoTokenizer.from_pretrained(tmp_path / "m")
    ids = encode(PROMPT, return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == prompt_ids(tokenizer, PROMPT)
    with torch.no_grad():
        assert_equal_logits(model(ids), theirs(ids).logits)
        out = theirs.generate(ids, max_new_tokens=40, do_sample=False)
    assert tokenizer.decode(out[0, ids.size(1) :]) == story


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_it_tells_the_same_in_llama_cpp(told, kind, tmp_path):
    model, tokenizer, story = told
    save_gguf(model, tmp_path / "m.gguf", tokenizer, kind)
    if kind == "Q8_0":
        model, tokenizer = open_model(tmp_path / "m.gguf")
        story = tokenizer.decode(list(generate(model, prompt_ids(tokenizer, PROMPT), 20, 0)))
    theirs = greedy_text(tmp_path / "m.gguf", PROMPT, 40 if kind == "F32" else 20)
    assert theirs.strip() == story.strip()
