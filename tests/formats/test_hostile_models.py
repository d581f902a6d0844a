"""GGUF files and tokenizer.json files made to fill the machine: our own error, soon, in 300 MiB."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers.measured import assert_cheap, costs
from helpers.tokenizers import byte_level, sentencepiece_like, unigram

OPENING = """
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.gguf.file import is_gguf, read_gguf
from nanogpt_surgery.formats.gguf.model import family_of_file
from nanogpt_surgery.formats.gguf.tokenizer import tokenizer_of
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer
PretrainedTokenizer(TINY).encode("a")

def opened(path):
    if is_gguf(Path(path)):
        file = read_gguf(path)
        tokenizer_of(file.metadata)
        family_of_file(file)
    else:
        tokenizer = open_tokenizer(path)
        tokenizer.decode(tokenizer.encode("a" * 1_000_000))
        tokenizer.decode(tokenizer.encode_prompt("a b" * 100_000))
""".replace("TINY", repr(byte_level()))

U32, F32, STRING, ARRAY = 4, 6, 8, 9
TOKENS = "tokenizer.ggml.tokens"


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: str, kind: int, count: int, values: bytes = b"") -> bytes:
    return pair(key, ARRAY, struct.pack("<IQ", kind, count) + values)


def strings(key: str, values: list[str]) -> bytes:
    return array(key, STRING, len(values), b"".join(map(text, values)))


def gguf(pairs: list[bytes], tensors: list[bytes] | tuple = (), size: int = 0) -> tuple[bytes, int]:
    """A file's beginning, and the size up to which it is filled with nothing."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join([*pairs, *tensors])
    return head, max(size, len(head))


def info(name: str, offset: int) -> bytes:
    return text(name) + struct.pack("<IQIQ", 1, 8, 0, offset)


def late_duplicate() -> tuple[bytes, int]:
    names = [f"{i:064}" for i in range(49_999)]
    infos = [info(name, 32 * i) for i, name in enumerate([*names, names[-1]])]
    return gguf([], infos, 64 * 50_000 * 3)


def vocabulary(kind: str, tokens: list[str], **more: list[str]) -> tuple[bytes, int]:
    scores = np.arange(len(tokens), dtype="<f4").tobytes()
    return gguf(
        [
            pair("tokenizer.ggml.model", STRING, text(kind)),
            pair("tokenizer.ggml.pre", STRING, text("gpt-2")),
            strings(TOKENS, tokens),
            array("tokenizer.ggml.scores", F32, len(tokens), scores),
            *(strings(f"tokenizer.ggml.{key}", value) for key, value in more.items()),
        ]
    )


def letters(count: int, length: int) -> list[str]:
    return [f"{i:x}".rjust(length, "q") for i in range(count)]


def many_keys() -> tuple[bytes, int]:
    keys = [f"{i:05}".encode() + bytes(65_000) for i in range(10_000)]
    return gguf([pair(key, U32, bytes(4)) for key in keys])


GGUF_BOMBS: dict[str, tuple[Callable[[], tuple[bytes, int]], str]] = {
    "late duplicate": (late_duplicate, "twice"),
    "array of 4 GiB": (lambda: gguf([array("a", F32, 1 << 30)], size=(4 << 30) + 99), "limit"),
    "string of 1 GiB": (
        lambda: gguf([pair("a", STRING, struct.pack("<Q", 1 << 30))], size=(1 << 30) + 99),
        "limit",
    ),
    "wide string": (lambda: gguf([pair("a", STRING, text("😀" + "a" * (47 << 20)))]), "arch"),
    "key of 1 GiB": (lambda: gguf([struct.pack("<Q", 1 << 30)], size=(1 << 30) + 99), "limit"),
    "10,000 long keys": (many_keys, "limit"),
    "3,000,000 empty strings": (
        lambda: gguf([array("a", STRING, 3_000_000)], size=24_000_099), "3,000,000",
    ),
    "2,000,000 empty strings": (
        lambda: gguf([array("a", STRING, 2_000_000)], size=16_000_099), "architecture",
    ),
    "2,000,000 empty tokens": (
        lambda: gguf(
            [
                pair("tokenizer.ggml.model", STRING, text("llama")),
                array("tokenizer.ggml.tokens", STRING, 1_000_000, bytes(8_000_000)),
                array("tokenizer.ggml.scores", F32, 1_000_000, bytes(4_000_000)),
                array("tokenizer.ggml.merges", STRING, 1_000_000, bytes(8_000_000)),
            ]
        ),
        "1,000,000",
    ),
    "1,500,000 tokens": (lambda: vocabulary("gpt2", letters(1_500_000, 6), merges=[]), "1,500,000"),
    "300,000 tokens": (
        lambda: vocabulary("gpt2", letters(300_000, 8), merges=["q q"] * 500_000), "merge 0",
    ),
    "1,000,000 merges": (lambda: vocabulary("gpt2", ["q"], merges=["q q"] * 1_000_000), "merges"),
    "300,000 pieces": (lambda: vocabulary("llama", letters(300_000, 8)), "architecture"),
    "long tokens": (lambda: vocabulary("gpt2", letters(1000, 40_000), merges=[]), "architecture"),
    "growing pieces": (lambda: vocabulary("llama", ["a" * i for i in range(1, 2000)]), "token"),
    "short growing pieces": (
        lambda: vocabulary(
            "llama", [c * i for c in map(chr, range(0x4E00, 0x4F00)) for i in range(1, 250)]
        ),
        "ways",
    ),
    "one long piece": (lambda: vocabulary("llama", ["a", "b", "a" * 100_000]), "100,000"),
    "characters": (lambda: vocabulary("rwkv", ["\\x0" * 1000] * 1000), "RWKV"),
}  # fmt: skip

REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}


def steps(part: str, children: str, *each: dict) -> str:
    return json.dumps(byte_level() | {part: {"type": "Sequence", children: list(each)}})


def cut_by(pattern: str) -> str:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    whole = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    cuts = [split | {"invert": False}, whole | {"use_regex": False}]
    return steps("pre_tokenizer", "pretokenizers", *cuts)


def with_model(contents: dict, **model: object) -> str:
    return json.dumps(contents | {"model": contents["model"] | model})


def with_added(count: int) -> str:
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": True}
    added = [flags | {"id": 99 + i, "content": f"t{i}", "special": False} for i in range(count)]
    return json.dumps(byte_level() | {"added_tokens": added})


JSON_BOMBS: dict[str, Callable[[], str]] = {
    "doubling normalizer": lambda: steps("normalizer", "normalizers", *[REPLACE] * 40),
    "doubling decoder": lambda: steps("decoder", "decoders", *[REPLACE] * 40),
    "doubling expression": lambda: steps(
        "normalizer", "normalizers", *[REPLACE | {"pattern": {"Regex": "a|$|^"}}] * 40
    ),
    "nested sequences": lambda: '{"normalizer":' + '{"type":"Sequence","normalizers":[' * 100_000,
    "byte-level again": lambda: steps(
        "pre_tokenizer", "pretokenizers", *[{"type": "ByteLevel", "add_prefix_space": False}] * 30
    ),
    "prepend": lambda: steps(
        "normalizer", "normalizers", {"type": "Prepend", "prepend": "a" * 10**7}
    ),
    "lists": lambda: '{"a":[' + "[]," * 40_000_000 + "[]]}",
    "numbers": lambda: '{"a":[' + "1000," * 9_000_000 + "1]}",
    "unigram of one character": lambda: json.dumps(unigram()),
    "unigram of nested tokens": lambda: with_model(
        unigram(), vocab=[["<unk>", 0.0], *[["a" * i, -1.0] for i in range(1, 129)]]
    ),
    "unigram of growing tokens": lambda: with_model(
        unigram(), vocab=[["<unk>", 0.0], *[["a" * i, -1.0] for i in range(1, 33)]]
    ),
    "unigram of a long token": lambda: with_model(
        unigram(), vocab=[["<unk>", 0.0], ["a" * 10_000, 0.0]]
    ),
    "sentencepiece": lambda: json.dumps(sentencepiece_like()),
    "merges": lambda: with_model(byte_level(), merges=[["a", "a"]] * 300_000),
    "expression": lambda: cut_by("(a+)+$b"),
    "expression that looks to the end": lambda: cut_by("a(?=a*b)"),
    "expression of repeated groups": lambda: cut_by("((((a{1,99}){1,99}){1,99}){1,99}){1,99}b"),
    "long expression": lambda: cut_by("|".join(["a"] * 500_000)),
    "150,000 added tokens": lambda: with_added(150_000),
    "140,000 added tokens": lambda: with_added(140_000),
    "wide string": lambda: '{"a":"😀' + "a" * (47 << 20) + '"}',
    "wide strings": lambda: '{"a":[' + ",".join(['"😀' + "a" * 900 + '"'] * 38_000) + "]}",
    "wide string in ASCII": lambda: '{"a":"\\ud83d\\ude00' + "a" * (47 << 20) + '"}',
    "wordpiece": lambda: json.dumps(
        byte_level()
        | {
            "pre_tokenizer": None,
            "decoder": None,
            "model": {
                "type": "WordPiece", "unk_token": "x", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**7, "vocab": {"x": 0, "a": 1, "##a": 2},
            },
        }
    ),
}  # fmt: skip
OPEN = {
    "unigram of one character",
    "unigram of growing tokens",
    "sentencepiece",
    "140,000 added tokens",
}


def write_ggufs(folder: Path) -> list[Path]:
    for name, (make, _) in GGUF_BOMBS.items():
        head, size = make()
        with (folder / name).open("wb") as file:
            file.write(head)
            file.truncate(size)
    return [folder / name for name in GGUF_BOMBS]


def write_tokenizers(folder: Path) -> list[Path]:
    for name, make in JSON_BOMBS.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer.json").write_text(make(), "utf-8")
    return [folder / name for name in JSON_BOMBS]


def test_gguf_bombs_end_with_our_own_error_in_little_time_and_memory(tmp_path):
    for name, cost in costs(OPENING, write_ggufs(tmp_path)).items():
        assert_cheap(cost, name)
        assert GGUF_BOMBS[name][1] in (cost.error or "opened"), name


def test_tokenizer_bombs_end_with_our_own_error_in_little_time_and_memory(tmp_path):
    for name, cost in costs(OPENING, write_tokenizers(tmp_path)).items():
        assert_cheap(cost, name)
        assert (cost.error is None) == (name in OPEN), (name, cost.error)
