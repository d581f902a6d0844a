"""Folders to operate on, and what they hold."""

import json

import torch

from helpers.adapters import adapted
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little
from nanogpt_surgery import inject_lora, open_model, save_adapter, save_model
from nanogpt_surgery.files.atomic import file_hash


def model_and_adapter(place):
    """A sealed model folder, and an adapter on its q_proj and lm_head."""
    model = adapted(CONFIGS["llama-scaled-tied"], ["q_proj", "lm_head"])
    save_adapter(model, place / "adapter")
    save_model(tiny_model(CONFIGS["llama-scaled-tied"]), place / "model")
    (place / "model" / "README.md").write_text("mine")
    return place


def bytes_of(folder):
    """The sha256 of every file of a folder, wherever it lies, but for what operations keep."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "LOCK"]
    return {str(p.relative_to(folder)): file_hash(p) for p in files if "operations" not in p.parts}


def tied(folder):
    return json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def logits(folder, config=CONFIGS["llama-scaled-tied"]):
    with torch.no_grad():
        return open_model(folder)[0](random_ids(config, 2, 9))


def save_adapter_for(folder, goal):
    model, _ = open_model(folder)
    inject_lora(model, "q_proj", rank=2)
    train_a_little(model)
    save_adapter(model, goal)
