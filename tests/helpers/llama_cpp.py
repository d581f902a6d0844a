"""llama.cpp, through the package xllamacpp, on one thread."""

import json
import urllib.request

import pytest
import torch

from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids

xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed (xllamacpp)")


def server(path, adapter=None):
    """A server inside this process for a GGUF file, and an adapter of it."""
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_gpu_layers = 64, 1, 0
    params.cpuparams.n_threads = 1
    params.warmup = False
    params.verbosity = -1
    if adapter is not None:
        info = xllamacpp.CommonAdapterLoraInfo()
        info.path, info.scale = str(adapter), 1.0
        params.lora_adapters = [info]
    return xllamacpp.Server(params)


def answering_server(path):
    """A server whose loop runs: one that is stopped before it does would never end."""
    running = server(path)
    running.handle_completions({"prompt": "a", "max_tokens": 1, "temperature": 0})
    return running


def tokenized(running, text):
    """The ids of a text, special tokens written out in it included."""
    body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
    address = f"{running.listening_address}/tokenize"
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["tokens"]


def greedy_text(path, prompt, count, adapter=None):
    """What llama.cpp goes on with, always taking the likeliest token."""
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0}
    return server(path, adapter).handle_completions(request)["choices"][0]["text"]


def assert_goes_on_alike(model, tokenizer, prompt, theirs, count, least=2):
    """Their greedy text is ours, as far as our choices are clear.

    llama.cpp keeps keys and values in float16, so where our two likeliest tokens are as close as
    that rounding, either may be taken, and the texts may part.
    """
    ids, said = prompt_ids(tokenizer, prompt), ""
    for step in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1]
        best, second = logits.topk(2).values
        if best - second < 0.005 * logits.std():
            assert step >= least, "the test's model is unsure too soon: draw another"
            assert theirs.startswith(said)
            return
        ids.append(int(logits.argmax()))
        said += tokenizer.decode(ids[-1:])
    assert theirs == said
