"""What a model folder holds beside its weights is there again in every folder written from it."""

import json

import pytest
import torch
from helpers.commands import called, write_adapter
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level
from transformers import AutoTokenizer, GenerationConfig

from nanogpt_surgery import GPTConfig, open_model, save_model
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.files.atomic import MANIFEST

GENERATION = {
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
    "eos_token_id": [2, 0],
    "pad_token_id": 0,
}
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture
def base(tmp_path):
    """A folder as others write it, with an adapter beside it."""
    contents = byte_level()
    size = len(contents["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": True, "normalized": False}
    contents["added_tokens"].append({"id": size, "content": "<tool>", "special": False} | flags)
    config = GPTConfig(
        **FAMILY_CONFIGS["llama"].to_dict() | {"vocab_size": size + 5, "block_size": 64}
    )
    model = tiny_model(config)
    save_model(model, tmp_path / "base", PretrainedTokenizer(contents, stop_ids=[2, 0]))
    (tmp_path / "base" / MANIFEST).unlink()
    write_json(tmp_path / "base" / "generation_config.json", GENERATION)
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "padding_side": "left",
        "additional_special_tokens": ["<|im_start|>"],
        "model_max_length": 64,
    }
    write_json(tmp_path / "base" / "tokenizer_config.json", tokenizer)
    (tmp_path / "base" / "chat_template.jinja").write_text(TEMPLATE)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    more = {"initializer_range": 0.013, "use_cache": False, "pad_token_id": 0}
    write_json(tmp_path / "base" / "config.json", config | more)
    write_adapter(model, tmp_path / "a", 1)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return tmp_path / "base"


def write_json(path, contents):
    path.write_text(json.dumps(contents))


WAYS = {
    "export": lambda t: ["export", t / "base", "--format", "huggingface", "--out", t / "out"],
    "export with an adapter": lambda t: [
        "export", t / "base", "--adapter", t / "a", "--format", "huggingface", "--force",
        "--out", t / "out",
    ],
    "merge": lambda t: ["merge", t / "base", t / "a", "--force", "--out", t / "out"],
    "train": lambda t: [
        "train", t / "text.txt", "--init-from", t / "base", "--max-steps", "1", "--batch-size", "2",
        "--block-size", "16", "--out", t / "out",
    ],
    "export of a run": lambda t: [
        "export", t / "run", "--format", "huggingface", "--out", t / "out",
    ],
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_generation_padding_template_and_added_tokens_are_carried_over(way, base):
    place = base.parent
    if way == "export of a run":
        called(*WAYS["train"](place)[:-1], place / "run")
    called(*WAYS[way](place))
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        assert (place / "out" / name).read_bytes() == (base / name).read_bytes(), name
    found = GenerationConfig.from_pretrained(place / "out").to_dict()
    assert {key: found[key] for key in GENERATION} == GENERATION
    theirs = AutoTokenizer.from_pretrained(place / "out")
    assert (theirs.pad_token, theirs.padding_side) == ("<|endoftext|>", "left")
    assert theirs.chat_template == TEMPLATE
    first = AutoTokenizer.from_pretrained(base)
    assert theirs("a<tool>  b").input_ids == first("a<tool>  b").input_ids
    assert theirs(["a", "b c d"], padding=True).input_ids[0][0] == theirs.pad_token_id
    config = json.loads((place / "out" / "config.json").read_text())
    old = json.loads((base / "config.json").read_text())
    assert config == old | {"dtype": config["dtype"]}


def test_a_merge_in_place_touches_the_weights_alone(base):
    before = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    called("merge", base, base.parent / "a", "--force")
    after = {path.name: path.read_bytes() for path in base.iterdir() if path.is_file()}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"model.safetensors"}
    assert before.keys() <= after.keys()


def test_of_another_model_the_config_is_not_taken_over(base, tmp_path):
    _, tokenizer = open_model(base)
    config = open_model(base)[0].config.to_dict() | {"n_layer": 1}
    save_model(tiny_model(GPTConfig(**config)), tmp_path / "out", tokenizer, base)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_a_head_that_was_untied_is_said_in_a_carried_config(base, tmp_path):
    model, tokenizer = open_model(base)
    old = json.loads((base / "config.json").read_text())
    model.lm_head.weight = model.embed_tokens.weight
    save_model(model, tmp_path / "tied", tokenizer, base)
    said = json.loads((tmp_path / "tied" / "config.json").read_text())
    assert said == old | {"tie_word_embeddings": True}
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    save_model(model, tmp_path / "untied", tokenizer, tmp_path / "tied")
    said = json.loads((tmp_path / "untied" / "config.json").read_text())
    assert said == old | {"tie_word_embeddings": False}


def test_a_gguf_file_says_what_ends_a_turn_and_what_pads(base, tmp_path):
    contents = json.loads((base / "tokenizer.json").read_text())
    contents["added_tokens"][-1]["rstrip"] = False
    write_json(base / "tokenizer.json", contents)
    called("export", base, "--format", "F32", "--out", tmp_path / "m.gguf")
    _, tokenizer = open_model(tmp_path / "m.gguf")
    assert (tokenizer.eos_id, tokenizer.stop_ids) == (2, {2, 0})
    assert tokenizer.pad_id == 0
    assert "unk_token" not in tokenizer.special_tokens
    assert tokenizer.chat_template == TEMPLATE
