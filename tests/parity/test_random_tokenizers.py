"""Tokenizers put together at random: ids as in transformers; in llama.cpp too, or refused by name.

What the export says of a text counts as said: blanks, accents, added tokens that overlap in it.
"""

import json
import random
import re
import warnings

import pytest
from helpers.llama_cpp import answering_server, server, tokenized
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import KINDS
from transformers import AutoTokenizer

from nanogpt_surgery import GPTConfig, SurgeryError, SurgeryWarning
from nanogpt_surgery.formats.gguf.tokenizer import CUTTINGS
from nanogpt_surgery.formats.gguf.tokenizer_writing import overlap as overlapping
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.formats.huggingface.tokenizer_files import (
    TOKENIZER,
    open_tokenizer,
    write_tokenizer_files,
)

pytestmark = pytest.mark.slow
COUNT, TEXTS = 100, 30
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PIECES = [
    " ", "  ", "\n", "\t", "The", "quick", "brown fox", "naïve", "café", "e\u0301", "日本語", "😀",
    "12345", "'s", "It's", "!", "…", "<new>", "<|im_end|>", "</s>", "<s>", "<unk>", "<pad>", "x<",
    "<x>", "\u00a0", "\u200b", "ﬁ", "Ａ", "\r\n", "▁", "Ł", "ß",
]  # fmt: skip


def maybe(draw, value, otherwise=None, chance=0.5):
    return value if draw.random() < chance else otherwise


def normalizers(draw):
    steps = [{"type": draw.choice(["NFC", "NFKC", "NFD", "Lowercase"])}]
    steps += [{"type": "StripAccents"}] * maybe(draw, 1, 0, 0.2)
    return maybe(draw, {"type": "Sequence", "normalizers": steps}, steps[0])


def cut_otherwise(draw, contents):
    """A byte-level BPE whose words are cut under one of llama.cpp's names, or nearly so."""
    cutting = CUTTINGS[draw.choice(sorted(CUTTINGS))]
    split = {"type": "Split", "pattern": {"Regex": cutting.pattern}, "behavior": "Isolated"}
    last = {"type": "ByteLevel", "add_prefix_space": maybe(draw, True, False, 0.1)}
    stages = [split | {"invert": False}, last | {"trim_offsets": True, "use_regex": False}]
    if maybe(draw, cutting.digits, not cutting.digits, 0.9):
        stages.insert(0, {"type": "Digits", "individual_digits": maybe(draw, True, False, 0.9)})
    model = contents["model"] | {
        "ignore_merges": maybe(draw, cutting.ignore_merges, not cutting.ignore_merges, 0.9)
    }
    usual = {"type": cutting.normalizer} if cutting.normalizer else None
    contents["normalizer"] = maybe(draw, usual, normalizers(draw), 0.8)
    contents["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": stages}
    return contents | {"model": model}


def spaced_otherwise(draw, contents):
    """SentencePiece's kind whose blanks are written by a pre-tokenizer, or none before a text."""
    scheme = draw.choice(["first", "always", "never"])
    split = maybe(draw, True, False, 0.2)
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}
    only = {"type": "Sequence", "normalizers": [REPLACE]}
    other = maybe(draw, {"normalizer": None, "pre_tokenizer": step}, {"normalizer": only})
    return contents | maybe(draw, {}, other, 0.3)


def with_new_tokens(draw, contents):
    names = [*"<new> <pad> <x> x< é<".split(), "<x>\n", "  ", "   "]
    names = draw.sample(names, draw.randrange(4))
    first = max(t["id"] for t in contents["added_tokens"]) + 1
    vocab = contents["model"]["vocab"]
    first = max(first, len(vocab))
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    more = [
        {"id": first + i, "content": name, "special": maybe(draw, True, False)}
        | {flag: maybe(draw, True, False, 0.15) for flag in flags}
        for i, name in enumerate(names)
    ]
    return contents | {"added_tokens": [*contents["added_tokens"], *more]}


def processor(draw, contents):
    """Puts some of the special tokens before a text, behind it, or both."""
    ids = {t["content"]: t["id"] for t in contents["added_tokens"] if t["special"]}
    name = draw.choice(sorted(ids))
    one, before, behind = {"Sequence": {"id": "A", "type_id": 0}}, [], []
    around = {"SpecialToken": {"id": name, "type_id": 0}}
    draw.choice([before, behind]).append(around)
    return {
        "type": "TemplateProcessing",
        "single": [*before, one, *behind],
        "pair": [one, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [ids[name]], "tokens": [name]}},
    }


def write_random(draw, place):
    """A folder with a tokenizer whose parts are drawn."""
    kind = draw.choice(sorted(KINDS))
    contents = KINDS[kind]()
    if kind == "byte-level":
        contents = maybe(draw, cut_otherwise(draw, contents), contents, 0.7)
    elif kind == "sentencepiece":
        contents = spaced_otherwise(draw, contents)
    else:
        contents["normalizer"] = maybe(draw, normalizers(draw), contents["normalizer"])
    contents = with_new_tokens(draw, contents)
    contents["post_processor"] = maybe(
        draw, processor(draw, contents), contents["post_processor"], 0.3
    )
    names = [t["content"] for t in contents["added_tokens"]]
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        config |= maybe(draw, {role: draw.choice([*names, "<other>"])}, {}, 0.4)
    config |= maybe(draw, {"extra_special_tokens": [draw.choice(names)]}, {}, 0.2)
    for file, value in {TOKENIZER: contents, "tokenizer_config.json": config}.items():
        (place / file).write_text(json.dumps(value), "utf-8")
    (place / "config.json").write_text('{"model_type": "llama"}')
    return kind


def texts_of(draw):
    return ["".join(draw.choices(PIECES, k=draw.randrange(1, 9))) for _ in range(TEXTS)]


def check_alike(ours, theirs, texts):
    for text in texts:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.encode(text, add_special_tokens=True) == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids), text
    assert ours.vocab_size == len(theirs)


def exported(tokenizer, path):
    """What was warned of; None if the tokenizer is refused, by the name of a part."""
    sizes = {"vocab_size": tokenizer.vocab_size, "n_embd": 96, "head_dim": 16, "n_inner": 160}
    config = GPTConfig(**FAMILY_CONFIGS["llama"].to_dict() | sizes | {"block_size": 64})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SurgeryWarning)
        try:
            save_gguf(tiny_model(config), path, tokenizer)
        except SurgeryError as refusal:
            assert not path.exists()
            assert "tokenizer" in refusal.what or "token" in refusal.what
            return None
    return " ".join(str(warning.message) for warning in caught)


def overlap(text, tokens):
    """Whether two of these tokens overlap in a text."""
    found = {(i, i + len(t)) for t in tokens for i in range(len(text)) if text.startswith(t, i)}
    return any(a != b and a[0] <= b[0] < a[1] for a in found for b in found)


def otherwise(text, said, tokens):
    """Whether a text is one of those that an export has said are tokenised otherwise there."""
    return (
        ("blank" in said and (text[:1].isspace() or text[:1] == "▁" or "<" in text))
        or ("behind a special" in said and "<" in text)
        or ("accents" in said and "\u0301" in text)
        or ("overlap" in said and overlap(text, tokens))
    )


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_random_tokenizer_has_the_ids_of_its_peers(seed, tmp_path):
    draw = random.Random(seed)
    kind = write_random(draw, tmp_path)
    texts = texts_of(draw)
    ours, theirs = open_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    check_alike(ours, theirs, texts)
    again = tmp_path / "again"
    again.mkdir()
    write_tokenizer_files(ours, again)
    (again / "config.json").write_text('{"model_type": "llama"}')
    check_alike(open_tokenizer(again), theirs, texts)
    check_alike(ours, AutoTokenizer.from_pretrained(again), texts)
    said = exported(ours, tmp_path / "m.gguf")
    print(seed, kind, "refused" if said is None else f"exported {said}")
    if said is not None:
        tokens = [token["content"] for token in ours.to_json()["added_tokens"]]
        running = server(tmp_path / "m.gguf")
        for text in texts:
            if not otherwise(text, said, tokens):
                assert tokenized(running, text) == ours.encode(text), text


@pytest.mark.parametrize("seed", range(30))
def test_added_tokens_over_three_letters_are_found_alike_or_said(seed, tmp_path):
    """Each text of an export that says nothing is alike, and what one shows as other is other."""
    draw = random.Random(seed)
    contents = KINDS["byte-level"]()
    names = {
        "".join(draw.choices("aé<", k=draw.randrange(1, 6))) for _ in range(draw.randrange(2, 5))
    }
    first = len(contents["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "special": False}
    more = [
        {"id": first + i, "content": name, "normalized": maybe(draw, True, False, 0.3)} | flags
        for i, name in enumerate(sorted(names - contents["model"]["vocab"].keys()))
    ]
    contents["added_tokens"] = [*contents["added_tokens"], *more]
    (tmp_path / TOKENIZER).write_text(json.dumps(contents), "utf-8")
    tokenizer = open_tokenizer(tmp_path)
    example = overlapping(contents["added_tokens"])
    said = exported(tokenizer, tmp_path / "m.gguf")
    print(seed, "refused" if said is None else example or "alike")
    if said is None:  # one that is normalized holds one that is not
        assert example
        return
    assert ("overlap" in said) == bool(example)
    running = answering_server(tmp_path / "m.gguf")
    if not example:
        for _ in range(60):
            text = "".join(draw.choices("aé<", k=draw.randrange(1, 16)))
            assert tokenized(running, text) == tokenizer.encode(text), text
    elif len({len(token["content"].encode()) for token in more}) == len(more):  # no equals
        text = re.search("in '([^']*)'", example)[1]
        assert tokenized(running, text) != tokenizer.encode(text)
