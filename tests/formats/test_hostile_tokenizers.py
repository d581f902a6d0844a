"""Tokenizer files that strangers made: bombs, and values of the wrong kind in every place."""

import copy
import json
import warnings

import pytest
from helpers.tokenizers import byte_level, sentencepiece_like, unigram

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.gguf.tokenizer import PREFIX, tokenizer_of
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer

WRONG = [None, 5, -1, 1.5, True, "x", "\ud800", [], [1], {}, {"a": 1}, 2**70]
ROLES = {
    "eos_token": "<|im_end|>",
    "pad_token": {"content": "<|pad|>", "lstrip": False, "special": True},
    "extra_special_tokens": ["<|a|>"],
    "chat_template": [{"name": "default", "template": "{{ messages }}"}],
    "padding_side": "left",
}
FILES = {
    "tokenizer_config.json": ROLES
    | {"added_tokens_decoder": {"300": {"content": "<|done|>", "special": True}}},
    "special_tokens_map.json": {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|b|>"]},
    "added_tokens.json": {"<|c|>": 300},
    "generation_config.json": {"eos_token_id": [1, 2]},
}


def places(value, path=()):
    """The paths to some of the values within a value."""
    yield path
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items[:12]:
        if isinstance(inner, (dict, list)):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def mutated(value, path, wrong):
    if not path:
        return wrong
    value = copy.copy(value)
    value[path[0]] = mutated(value[path[0]], path[1:], wrong)
    return value


def use(tokenizer):
    if tokenizer is not None:
        tokenizer.decode(tokenizer.encode("The <|im_end|> fox")[:9])
        if isinstance(tokenizer, PretrainedTokenizer):
            tokenizer.encode_prompt("a")


def try_all(original, opened, wrongs=WRONG):
    refused = 0
    for path in places(original):
        for wrong in wrongs:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    use(opened(mutated(original, path, wrong)))
            except SurgeryError as error:
                refused += 1
                assert len(error.what) < 1500
    return refused


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like, unigram])
def test_a_wrong_value_anywhere_in_a_tokenizer_is_an_error_of_ours(kind, tmp_path, capfd):
    def opened(contents):
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
        return open_tokenizer(tmp_path)

    assert try_all(kind(), opened, WRONG[::2] if kind is not byte_level else WRONG) > 50


@pytest.mark.parametrize("file", FILES)
def test_a_wrong_value_anywhere_beside_it_is_an_error_of_ours(file, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))

    def opened(contents):
        (tmp_path / file).write_text(json.dumps(contents))
        return open_tokenizer(tmp_path)

    assert try_all(FILES[file], opened) > 0


def test_wrong_metadata_of_a_gguf_file_are_an_error_of_ours():
    tokens = ["<unk>", "<s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    own = {"model": "llama", "tokens": tokens, "scores": [0.0], "pre": "gpt-2", "merges": ["a b"]}
    own |= {"bos_token_id": 1, "eos_token_id": 0, "token_type": [1], "add_bos_token": True}
    for kind in ("llama", "gpt2", "rwkv"):
        metadata = {PREFIX + k: v for k, v in (own | {"model": kind}).items()}
        assert try_all(metadata, tokenizer_of) > 0


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
def test_what_is_not_utf_8_is_an_error_that_names_the_file(file, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(byte_level()))
    (tmp_path / file).write_bytes(b"\xff\xfe")
    with pytest.raises(SurgeryError, match=file):
        open_tokenizer(tmp_path)


def test_a_million_of_one_character_is_encoded_by_a_unigram_model():
    tokenizer = PretrainedTokenizer(unigram())
    assert len(tokenizer.encode("a" * 1_000_000)) > 100_000


BLANKS = [" ", "\n", " \n", "\u3000\t"]


@pytest.mark.parametrize("blank", BLANKS)
def test_a_million_blanks_are_encoded_as_a_few_thousand_are(blank):
    tokenizer = BPETokenizer.train("a  b   c\n\n d \n e" * 9, 280)
    long = blank * (1_000_000 // len(blank))
    assert tokenizer.decode(tokenizer.encode(long)) == long
    for text in (f"a{blank * 3000}b", f"{blank * 3000}<|endoftext|> c", f"x {blank * 3000}", "a"):
        expected = tokenizer._encoding.encode(text, allowed_special="all")
        assert tokenizer.encode(text) == tokenizer.encode_to_numpy(text).tolist() == expected
