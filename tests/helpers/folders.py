"""Model folders for tests, whole and changed."""

import json

import torch
from safetensors.torch import load_file, save_file

from helpers.models import CONFIGS, tiny_model
from nanogpt_surgery import save_model

CONFIG, TENSORS, TOKENIZER, MANIFEST = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "MANIFEST.json",
)


def saved(folder, name="gpt2"):
    """A model and the folder that it was saved to."""
    model = tiny_model(CONFIGS[name])
    save_model(model, folder)
    return model


def rewrite(folder, change):
    """Change the tensors of a folder; its manifest, which would notice, goes."""
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)
    (folder / MANIFEST).unlink(missing_ok=True)


def rewrite_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    (folder / MANIFEST).unlink(missing_ok=True)


def assert_same_bits(model, other):
    first, second = model.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
