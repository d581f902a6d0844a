"""llama.cpp, through the package xllamacpp, on one thread."""

import pytest

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


def greedy_text(path, prompt, count, adapter=None):
    """What llama.cpp goes on with, always taking the likeliest token."""
    request = {"prompt": prompt, "max_tokens": count, "temperature": 0}
    return server(path, adapter).handle_completions(request)["choices"][0]["text"]
