"""A tokenizer goes into a GGUF file whole, or is refused by the name of its part."""

import copy
import time
import warnings

import pytest
from helpers.llama_cpp import answering_server, server, tokenized
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import KINDS, byte_level, sentencepiece_like

from nanogpt_surgery import SurgeryError, SurgeryWarning, open_model
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.formats.comparison import check_tokenizer
from nanogpt_surgery.formats.gguf.tokenizer import CUTTINGS
from nanogpt_surgery.formats.gguf.tokenizer_writing import overlap
from nanogpt_surgery.formats.gguf.writing import save_gguf

PREPEND = {"type": "Prepend", "prepend": "▁"}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def with_token(contents, **flags):
    more = {"id": len(contents["model"]["vocab"]), "content": "<tool>", "special": True}
    added = [*contents["added_tokens"], more | FLAGS | flags]
    vocab = contents["model"]["vocab"] | {"<tool>": more["id"]}
    return contents | {"added_tokens": added, "model": contents["model"] | {"vocab": vocab}}


def metaspace(scheme, **more):
    """SentencePiece's kind with its blanks written by a pre-tokenizer."""
    step = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
    return sentencepiece_like() | {"normalizer": None, "pre_tokenizer": step | more}


def cut_as(name):
    """A byte-level BPE that cuts words under one of llama.cpp's names."""
    cutting = CUTTINGS[name]
    split = {"type": "Split", "pattern": {"Regex": cutting.pattern}, "behavior": "Isolated"}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    stages = [split | {"invert": False}, last | {"use_regex": False}]
    if cutting.digits:
        stages.insert(0, {"type": "Digits", "individual_digits": True})
    contents = byte_level()
    return contents | {
        "normalizer": {"type": cutting.normalizer} if cutting.normalizer else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages},
        "model": contents["model"] | {"ignore_merges": cutting.ignore_merges},
    }


def save(folder, contents, **options):
    tokenizer = PretrainedTokenizer(contents, **({"stop_ids": [2]} | options))
    config = FAMILY_CONFIGS["llama"].to_dict() | {
        "vocab_size": tokenizer.vocab_size + 3,
        "n_embd": 96,
        "head_dim": 16,
        "n_inner": 160,
        "block_size": 64,
    }
    save_gguf(tiny_model(type(FAMILY_CONFIGS["llama"])(**config)), folder / "m.gguf", tokenizer)
    return tokenizer


def stages(contents):
    return contents["pre_tokenizer"]["pretokenizers"]


def change(contents, **parts):
    return contents | parts


REFUSED = {
    "Lowercase": lambda: change(byte_level(), normalizer={"type": "Lowercase"}),
    "StripAccents": lambda: change(
        cut_as("qwen2"),
        normalizer={
            "type": "Sequence",
            "normalizers": [{"type": "NFC"}, {"type": "StripAccents"}],
        },
    ),
    "NFC": lambda: change(byte_level(), normalizer={"type": "NFC"}),
    "Punctuation": lambda: change(
        byte_level(),
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Punctuation", "behavior": "Isolated"},
                *stages(byte_level()),
            ],
        },
    ),
    "Split": lambda: change(
        cut_as("qwen2"),
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                stages(cut_as("qwen2"))[0] | {"behavior": "MergedWithNext"},
                stages(cut_as("qwen2"))[1],
            ],
        },
    ),
    "Digits": lambda: change(
        byte_level(),
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": False},
                stages(byte_level())[1],
            ],
        },
    ),
    "ByteLevel": lambda: change(
        byte_level(), pre_tokenizer=stages(byte_level())[1] | {"add_prefix_space": True}
    ),
    "ignore_merges": lambda: change(
        byte_level(), model=byte_level()["model"] | {"ignore_merges": True}
    ),
    "end_of_word_suffix": lambda: change(
        byte_level(), model=byte_level()["model"] | {"end_of_word_suffix": "</w>"}
    ),
    "rstrip of the added token '<tool>'": lambda: with_token(byte_level(), rstrip=True),
    "lstrip of the added token '<tool>'": lambda: with_token(sentencepiece_like(), lstrip=True),
    "single_word of the added token '<tool>'": lambda: with_token(byte_level(), single_word=True),
    "normalized of the added token '<tool>'": lambda: with_token(
        sentencepiece_like(), normalized=True
    ),
    "Strip": lambda: change(
        sentencepiece_like(),
        normalizer={
            "type": "Sequence",
            "normalizers": [
                {"type": "Strip", "strip_left": True, "strip_right": True},
                PREPEND,
                REPLACE,
            ],
        },
    ),
    "Whitespace": lambda: change(sentencepiece_like(), pre_tokenizer={"type": "WhitespaceSplit"}),
    "writes a space": lambda: change(sentencepiece_like(), normalizer=None),
    "Metaspace split": lambda: metaspace("first", split=True),
    "Unigram": KINDS["unigram"],
}


@pytest.mark.parametrize("part", REFUSED)
def test_a_part_that_llama_cpp_has_not_is_refused_by_name(part, tmp_path):
    with pytest.raises(SurgeryError) as refusal:
        save(tmp_path, REFUSED[part]())
    assert part in refusal.value.what
    assert list(tmp_path.iterdir()) == []


EXPORTED = {
    "normalized without a normalizer": (lambda: with_token(byte_level(), normalized=True), set()),
    "normalized with Metaspace": (
        lambda: with_token(metaspace("never"), normalized=True),
        set(),
    ),
    "gpt-2": (lambda: cut_as("gpt-2"), set()),
    "llama-bpe": (lambda: cut_as("llama-bpe"), set()),
    "qwen2": (lambda: cut_as("qwen2"), {"accents"}),
    "no blank": (
        lambda: change(
            sentencepiece_like(), normalizer={"type": "Sequence", "normalizers": [REPLACE]}
        ),
        set(),
    ),
    "never": (lambda: metaspace("never"), set()),
    "always": (lambda: metaspace("always"), {"begins with a blank"}),
    "first": (lambda: metaspace("first"), {"begins with a blank", "behind a special"}),
}
TEXTS = ["The quick brown", "naïve café 日本", "It's 12345\n\n", "two  lazy", "a<tool>"]


@pytest.mark.parametrize("kind", EXPORTED)
def test_what_it_has_is_exported_and_tokenised_alike_there(kind, tmp_path):
    make, said = EXPORTED[kind]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SurgeryWarning)
        tokenizer = save(tmp_path, make(), add_bos=False)
    heard = " ".join(str(warning.message) for warning in caught)
    assert all(words in heard for words in said)
    assert bool(heard) == bool(said)
    _, again = open_model(tmp_path / "m.gguf")
    running = server(tmp_path / "m.gguf")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        answer = running.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0})
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids(tokenizer, text)), text


# Added tokens, whether each is normalized; a text; whether llama.cpp finds others in it.
OVERLAPPING = {
    "the longer begins later": ({"x<": False, "<tool>": False}, "x<tool>", True),
    "the longer begins first": ({"x<tool>": False, ">z": False}, "x<tool>z", False),
    "one within another": ({"<a>": False, "x<a>y": False, "<a>y": False}, "x<a>y<a>y", False),
    "a shorter one that is normalized": ({"<end>": False, "d>x": True}, "<end>x", False),
    "a longer one that is normalized": ({"d>": False, "<d": True, "<end": True}, "<end>", True),
    "in bytes alone": ({"xyz<": False, "<éé": False}, "xyz<éé", True),
    "three": ({"ab": False, "bcd": False, "cdef": False}, "abcd", True),
    "runs": ({" " * n: True for n in range(2, 25)}, " " * 40 + "x", False),
    "runs with a gap": ({"--": False, "-----": False}, "-" * 9, False),
    "themselves alone": ({"aba": False, "cc": True}, "ababa ccc", False),
}


@pytest.mark.parametrize("case", OVERLAPPING)
def test_added_tokens_that_overlap_are_said_where_llama_cpp_finds_others(case, tmp_path):
    names, text, differs = OVERLAPPING[case]
    contents = byte_level()
    first = len(contents["model"]["vocab"])
    more = [
        {"id": first + i, "content": name, "special": False} | FLAGS | {"normalized": normalized}
        for i, (name, normalized) in enumerate(names.items())
    ]
    contents["added_tokens"] = [*contents["added_tokens"], *more]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SurgeryWarning)
        tokenizer = save(tmp_path, contents, add_bos=False)
    theirs = tokenized(answering_server(tmp_path / "m.gguf"), text)
    assert (theirs != tokenizer.encode(text)) == differs
    heard = " ".join(str(warning.message) for warning in caught)
    assert ("overlap" in heard) == differs
    if case == "the longer begins later":
        assert heard.endswith("(in 'x<tool>' '<tool>', not 'x<')")


def test_two_tokens_as_long_as_each_other_that_overlap_are_said_once(tmp_path):
    """llama.cpp may take either first."""
    contents = byte_level()
    first = len(contents["model"]["vocab"])
    more = [{"id": first + i, "content": t, "special": False} for i, t in enumerate(("ab", "bc"))]
    contents["added_tokens"] = [*contents["added_tokens"], *(token | FLAGS for token in more)]
    with pytest.warns(SurgeryWarning, match="'abc'"):
        save(tmp_path, contents, add_bos=False)


def test_a_normalized_token_that_holds_one_that_is_not_is_refused(tmp_path):
    """Here the inner one is found first, in llama.cpp the outer one."""
    contents = with_token(byte_level())
    outer = contents["added_tokens"][-1] | {"content": "<tool>\n", "normalized": True}
    outer["id"] += 1
    contents["added_tokens"].append(outer)
    with pytest.raises(SurgeryError, match=r"'<tool>\\n'"), pytest.warns(SurgeryWarning):
        save(tmp_path, contents, add_bos=False)
    assert not (tmp_path / "m.gguf").exists()


def test_many_added_tokens_are_looked_through_in_seconds():
    many = [{"content": f"<|image {n}|>"} for n in range(130_000)]
    runs = [{"content": c * n} for c in "▁\n\t" for n in range(1, 32)]
    hostile = [{"content": "a" * n} for n in range(1, 1_000)]  # each begins and ends the others
    begun = time.process_time()
    assert not overlap([*many, *runs]) and not overlap(hostile)
    assert time.process_time() - begun < 30


def without(contents, *path):
    changed = copy.deepcopy(contents)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = None if not isinstance(place[path[-1]], list) else place[path[-1]][:-1]
    return changed


OTHERWISE = {
    "an accent written apart": (cut_as("qwen2"), without(cut_as("qwen2"), "normalizer")),
    "a merge": (byte_level(), without(byte_level(), "model", "merges")),
    "a flag": (with_token(byte_level()), with_token(byte_level(), rstrip=True)),
    "the blank before": (metaspace("always"), metaspace("never")),
    "after a token": (
        with_token(sentencepiece_like()),
        with_token(metaspace("first")),
    ),
}


@pytest.mark.parametrize("part", OTHERWISE)
def test_a_part_that_came_out_otherwise_is_seen(part):
    one, other = map(PretrainedTokenizer, OTHERWISE[part])
    check_tokenizer(one, PretrainedTokenizer(OTHERWISE[part][0]))
    with pytest.raises(SurgeryError, match=r"from its token \d+"):
        check_tokenizer(one, other)
