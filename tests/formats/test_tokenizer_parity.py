"""Folders of every kind open here as in transformers: ids, special tokens, rendered chats."""

import json

import pytest
from helpers.tokenizers import TEXT, byte_level, sentencepiece_like, unigram
from transformers import AutoTokenizer

from nanogpt_surgery.data.conversations.chat import template_of
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.huggingface.tokenizer_files import (
    CHAT_TEMPLATE,
    TOKENIZER,
    open_tokenizer,
    write_tokenizer_files,
)

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
TEXTS = [
    TEXT[:90],
    "say <|cutoff|> now<|done|>",
    "<|im_start|>user\n hi <|im_end|>  <|pad|>",
    "a <|done|> b",
    "</s>new <s>",
]


def token(content, special=True, **flags):
    return {"content": content, "special": special} | PLAIN | flags


def typed(content, **flags):
    return token(content, **flags) | {"__type": "AddedToken"}


def with_processor(processor, contents=None):
    return (contents or byte_level()) | {"post_processor": processor}


def template(before=(), behind=()):
    """A template processor that puts tokens of `byte_level` around a text."""
    ids = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    named = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in ids.items()}
    first, last = (
        [{"SpecialToken": {"id": n, "type_id": 0}} for n in side] for side in (before, behind)
    )
    one = [{"Sequence": {"id": "A", "type_id": 0}}]
    two = [{"Sequence": {"id": "B", "type_id": 1}}]
    return {
        "type": "TemplateProcessing",
        "single": first + one + last,
        "pair": first + one + two + last,
        "special_tokens": named,
    }


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
AROUND = {"sep": ["<|im_end|>", 2], "cls": ["<|im_start|>", 1]}
ROBERTA = {"type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False} | AROUND
END = {"eos_token": "<|im_end|>"}
SHOW = (
    "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|"
    "{{ bos_token is defined }}\n"
)
CHATML = (
    "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% set x = 1 %}<|im_start|>{{ m.role }}\n{% generation %}{% set x = 2 %}{{ m.content }}"
    "{% endgeneration %}{{ x }}<|im_end|>\n{% endfor %}"
    "{{ messages | tojson(indent=1) }}{{ dict(a='é<b>') | tojson(ensure_ascii=True, "
    "separators=(',', ':'), sort_keys=true) }}{{ tools is none }}{{ documents is none }}"
    "{% if strftime_now('%Y') | length == 4 %}dated{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# name: tokenizer.json, tokenizer_config.json, other files
FOLDERS = {
    "bare": (byte_level(), {}, {}),
    "additional": (
        byte_level(),
        {"additional_special_tokens": ["<|cutoff|>", "<|done|>"]} | END,
        {},
    ),
    "extra": (byte_level(), {"extra_special_tokens": ["<|cutoff|>", "<|done|>"]} | END, {}),
    "extra with roles": (
        byte_level(),
        {"extra_special_tokens": {"image_token": "<|cutoff|>"}, "chat_template": SHOW} | END,
        {},
    ),
    "decoder": (
        byte_level(),
        {
            "added_tokens_decoder": {
                "0": token("<|endoftext|>"),
                "401": token("<|done|>", lstrip=True),
                "400": token("<|cutoff|>", special=False),
            },
            "additional_special_tokens": ["<|done|>"],
        }
        | END,
        {},
    ),
    "decoder and a stale map": (
        byte_level(),
        {"added_tokens_decoder": {"300": token("<|done|>")}} | END,
        {
            "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
            "added_tokens.json": {"<|cutoff|>": 9},
        },
    ),
    "eos that is new": (byte_level(), {"eos_token": "<|done|>", "chat_template": SHOW}, {}),
    "typed objects": (
        byte_level(),
        {"eos_token": typed("<|im_end|>"), "pad_token": typed("<|pad|>", rstrip=True)},
        {},
    ),
    "map": (
        byte_level(),
        END | {"chat_template": SHOW},
        {
            "special_tokens_map.json": {
                "eos_token": {"content": "<|endoftext|>"} | PLAIN,
                "pad_token": "<|pad|>",
                "additional_special_tokens": ["<|cutoff|>"],
            }
        },
    ),
    "added_tokens.json": (
        byte_level(),
        END,
        {"added_tokens.json": {"<|done|>": 401, "<|cutoff|>": 400}},
    ),
    "added_tokens.json and roles": (
        byte_level(),
        END | {"pad_token": "<|pad|>", "extra_special_tokens": ["<|done|>"]},
        {"added_tokens.json": {"<|pad|>": 300, "<|done|>": 301, "<|cutoff|>": 302}},
    ),
    "a role of its own": (
        byte_level(),
        END | {"image_token": "<|cutoff|>", "chat_template": SHOW + CHATML},
        {},
    ),
    "empty roles": (byte_level(), {"eos_token": "", "bos_token": "", "unk_token": None}, {}),
    "two ways to say bos": (
        byte_level(),
        END | {"bos_token": "<|im_start|>", "add_bos_token": True},
        {},
    ),
    "end behind": (with_processor(template(behind=["<|endoftext|>"])), END, {}),
    "end behind, switched off": (
        with_processor(template(behind=["<|endoftext|>"])),
        END | {"add_bos_token": False, "add_eos_token": False},
        {},
    ),
    "before and behind": (
        with_processor(template(["<|im_start|>", "<|endoftext|>"], ["<|im_end|>"])),
        END | {"bos_token": "<|im_start|>", "chat_template": SHOW + CHATML},
        {},
    ),
    "sequence": (
        with_processor({"type": "Sequence", "processors": [BYTES, template(["<|im_start|>"])]}),
        END,
        {},
    ),
    "sequence of two": (
        with_processor(
            {
                "type": "Sequence",
                "processors": [
                    template(["<|im_start|>"]),
                    template(["<|endoftext|>"], ["<|im_end|>"]),
                ],
            }
        ),
        END,
        {},
    ),
    "roberta": (with_processor(ROBERTA), END, {}),
    "bert": (with_processor({"type": "BertProcessing"} | AROUND), END, {}),
    "sentencepiece": (
        sentencepiece_like(),
        {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": SHOW + CHATML,
        },
        {},
    ),
    "unigram": (unigram(), {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "<|pad|>"}, {}),
    "templates with names": (
        byte_level(),
        END
        | {
            "chat_template": [
                {"name": "tool_use", "template": "T"},
                {"name": "default", "template": SHOW},
            ]
        },
        {},
    ),
    "template of its own": (byte_level(), END | {"chat_template": "no"}, {CHAT_TEMPLATE: CHATML}),
}


def folder_of(name, place):
    contents, config, files = FOLDERS[name]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    for file, value in {TOKENIZER: contents, "tokenizer_config.json": config, **files}.items():
        (place / file).write_text(value if isinstance(value, str) else json.dumps(value))
    (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return place


def check_alike(ours, theirs):
    assert isinstance(ours, PretrainedTokenizer)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"], text
    ids = theirs(TEXTS[1], add_special_tokens=False)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    roles = {role: text for role, text in theirs.special_tokens_map.items() if text}
    assert ours.special_tokens == roles
    assert ours.extra_special_tokens == theirs.extra_special_tokens
    for role in ("eos", "pad"):
        expected = getattr(theirs, f"{role}_token_id") if getattr(theirs, f"{role}_token") else None
        assert getattr(ours, f"{role}_id") == expected, role
    if theirs.unk_token:
        assert ours.id_of(ours.special_tokens["unk_token"]) == theirs.unk_token_id
    if theirs.bos_token:
        assert ours.bos_id == theirs.bos_token_id


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_opens_as_in_transformers_and_so_does_what_is_written_of_it(name, tmp_path):
    ours = open_tokenizer(folder_of(name, tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    check_alike(ours, theirs)
    again = tmp_path / "again"
    again.mkdir()
    write_tokenizer_files(ours, again)
    (again / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_alike(open_tokenizer(again), theirs)
    check_alike(ours, AutoTokenizer.from_pretrained(again))
    assert open_tokenizer(again).chat_templates == ours.chat_templates
    if theirs.chat_template:
        messages = [{"role": "user", "content": f"é <b> {i}"} for i in range(5)]
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert template_of(ours).render(messages) == text


@pytest.mark.parametrize("cls", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_roles_that_a_class_has_by_default_count_where_the_vocabulary_has_them(cls, tmp_path):
    config = {"tokenizer_class": cls}
    contents = {TOKENIZER: sentencepiece_like(), "tokenizer_config.json": config}
    for file, value in (contents | {"config.json": {"model_type": "llama"}}).items():
        (tmp_path / file).write_text(json.dumps(value))
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert ours.special_tokens == theirs.special_tokens_map
    assert (ours.eos_id, ours.id_of(ours.special_tokens["unk_token"])) == (
        theirs.eos_token_id,
        theirs.unk_token_id,
    )
    assert ours.settings["padding_side"] == theirs.padding_side == "left"
    (tmp_path / TOKENIZER).write_text(json.dumps(byte_level()))
    assert open_tokenizer(tmp_path).special_tokens == {}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "qwen3", "llama"])
def test_the_class_follows_from_the_model_where_nothing_names_it(kind, tmp_path):
    (tmp_path / TOKENIZER).write_text(json.dumps(byte_level()))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert open_tokenizer(tmp_path).special_tokens == theirs.special_tokens_map


@pytest.mark.parametrize("name", ["end behind", "end behind, switched off"])
def test_what_stands_behind_a_text_is_no_beginning(name, tmp_path):
    ours = open_tokenizer(folder_of(name, tmp_path))
    assert (ours.bos_id, ours.add_bos, ours.eos_id) == (None, False, 2)
    assert (ours.prefix_ids, ours.suffix_ids) == ([], [0])
    assert ours.encode_prompt("To be") == ours.encode("To be")


def test_what_stands_before_a_text_begins_a_prompt(tmp_path):
    ours = open_tokenizer(folder_of("before and behind", tmp_path))
    assert (ours.prefix_ids, ours.suffix_ids) == ([1, 0], [2])
    assert ours.encode_prompt("To be") == [1, 0, *ours.encode("To be")]
