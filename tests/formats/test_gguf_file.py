"""Malformed files give our own error and nothing else; good ones the `gguf` package's numbers."""

import contextlib
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from helpers.models import FAMILY_CONFIGS, tiny_model
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer, SurgeryError, open_model
from nanogpt_surgery.formats.gguf.file import read_gguf
from nanogpt_surgery.formats.gguf.writing import save_gguf

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name="t", shape=(32,), kind=0, offset=0, n_dims=None):
    dims = struct.pack(f"<I{len(shape)}Q", len(shape) if n_dims is None else n_dims, *shape)
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def crafted(pairs=(), tensors=(), data=b"\0" * 128, **header):
    fields = {"magic": b"GGUF", "version": 3, "n": len(tensors), "pairs": len(pairs)} | header
    start = fields["magic"] + struct.pack("<IQQ", fields["version"], fields["n"], fields["pairs"])
    head = start + b"".join(pairs) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


HOSTILE = {
    "empty": b"",
    "cut in the magic": b"GGU",
    "cut in the counts": crafted()[:20],
    "another magic": crafted(magic=b"GGML"),
    "version 2": crafted(version=2),
    "big-endian": crafted(version=3 << 24),
    "a count of tensors beyond all": crafted(n=1 << 63),
    "a count of metadata beyond all": crafted()[:16] + struct.pack("<Q", 1 << 63) + b"\0" * 64,
    "fewer tensors than promised": crafted(n=3),
    "a key beyond the file": crafted([struct.pack("<Q", 1 << 40)]),
    "a key over the limit": crafted([pair("k" * 70_000, U32, b"\0" * 4)]),
    "a key that is not UTF-8": crafted([pair(b"\xff\xfe", U32, b"\0" * 4)]),
    "a key twice": crafted([pair("a", U32, b"\0" * 4)] * 2),
    "an unknown type": crafted([pair("a", 13, b"\0" * 8)]),
    "a bool of 2": crafted([pair("a", BOOL, b"\2")]),
    "a string beyond the file": crafted([pair("a", STRING, struct.pack("<Q", 1 << 62))]),
    "a string that is not UTF-8": crafted([pair("a", STRING, text(b"\xc3"))]),
    "an array beyond the file": crafted([pair("a", ARRAY, struct.pack("<IQ", F32, 1 << 60))]),
    "strings beyond the file": crafted([pair("a", ARRAY, struct.pack("<IQ", STRING, 1 << 60))]),
    "an array of arrays": crafted([pair("a", ARRAY, struct.pack("<IQ", ARRAY, 1) + b"\0" * 99)]),
    "no dimensions": crafted(tensors=[tensor(shape=())]),
    "five dimensions": crafted(tensors=[tensor(shape=(1,) * 5)]),
    "dimensions beyond the file": crafted(tensors=[tensor(n_dims=4)]),
    "a side of 0": crafted(tensors=[tensor(shape=(32, 0))]),
    "a shape that overflows": crafted(tensors=[tensor(shape=(1 << 47, 1 << 47))]),
    "an unknown storage": crafted(tensors=[tensor(kind=99)]),
    "a storage that is not read": crafted(tensors=[tensor(shape=(256,), kind=10)]),
    "rows that fill no block": crafted(tensors=[tensor(shape=(33,), kind=8)]),
    "a name over the limit": crafted(tensors=[tensor(name="n" * 65)]),
    "a name twice": crafted(tensors=[tensor(), tensor(offset=128)], data=b"\0" * 256),
    "an overlap": crafted(tensors=[tensor(), tensor("u", offset=64)], data=b"\0" * 256),
    "an offset that is not aligned": crafted(tensors=[tensor(offset=4)], data=b"\0" * 256),
    "an offset beyond the file": crafted(tensors=[tensor(offset=1 << 62)]),
    "data cut short": crafted(tensors=[tensor()], data=b"\0" * 127),
    "an alignment of 0": crafted([pair("general.alignment", U32, struct.pack("<I", 0))]),
    "an alignment of 24": crafted([pair("general.alignment", U32, struct.pack("<I", 24))]),
    "an alignment of 1 GiB": crafted([pair("general.alignment", U32, struct.pack("<I", 1 << 30))]),
    "an alignment that is a word": crafted([pair("general.alignment", STRING, text("32"))]),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_malformed_files_are_refused_without_large_allocations(kind, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(HOSTILE[kind])
    tracemalloc.start()
    with pytest.raises(SurgeryError, match=r"m\.gguf"):
        read_gguf(path)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


ARCHITECTURE = pair("general.architecture", STRING, text("llama"))
NONSENSE = {
    "no architecture": [],
    "an unknown architecture": [pair("general.architecture", STRING, text("mamba"))],
    "an adapter": [ARCHITECTURE, pair("general.type", STRING, text("adapter"))],
    "no sizes": [ARCHITECTURE],
    "a width that is a word": [ARCHITECTURE, pair("llama.embedding_length", STRING, text("9"))],
    "experts": [ARCHITECTURE, pair("llama.expert_count", U32, struct.pack("<I", 8))],
    "scaled positions": [ARCHITECTURE, pair("llama.rope.scaling.type", STRING, text("yarn"))],
    "half-rotated heads": [
        ARCHITECTURE,
        *(
            pair(f"llama.{key}", U32, struct.pack("<I", value))
            for key, value in [
                ("embedding_length", 32),
                ("attention.head_count", 2),
                ("rope.dimension_count", 8),
            ]
        ),
    ],
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_files_that_describe_no_model_of_ours_are_refused(kind, tmp_path):
    (tmp_path / "m.gguf").write_bytes(crafted(NONSENSE[kind], [tensor()]))
    with pytest.raises(SurgeryError, match=r"m\.gguf"):
        open_model(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "m.gguf"
    tokenizer = CharacterTokenizer("".join(map(chr, range(32, 85))))
    save_gguf(tiny_model(FAMILY_CONFIGS["llama-scaled-tied"]), path, tokenizer, "F16")
    return path.read_bytes()


@pytest.mark.filterwarnings("ignore::nanogpt_surgery.SurgeryWarning")
@given(data=st.data())
def test_flipped_bytes_give_a_model_or_our_own_error(data, good, tmp_path_factory):
    flipped = bytearray(good)
    header = len(good) // 4
    for _ in range(data.draw(st.integers(1, 3))):
        flipped[data.draw(st.integers(0, header))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.sampled_from([len(good), len(good) - 1, len(good) // 2]))
    path = tmp_path_factory.mktemp("flip") / "m.gguf"
    path.write_bytes(flipped[:cut])
    with contextlib.suppress(SurgeryError):
        open_model(path)


KINDS = {
    name: gguf.GGMLQuantizationType[name]
    for name in "F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_storage_is_dequantised_as_the_package_does_it(name, tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.formats.placing.PIECE", 1024)
    kind = KINDS[name]
    draw = np.random.default_rng(1)
    numbers = draw.standard_normal((7, 512), dtype=np.float32)
    if name.endswith("_K"):  # the package writes none: any bytes are some numbers
        block, size = gguf.GGML_QUANT_SIZES[kind]
        packed = draw.integers(0, 100, (7, 512 // block * size)).astype(np.uint8)
    else:
        packed = quantize(numbers, kind)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("t", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    stored = read_gguf(tmp_path / "m.gguf").tensors["t"]
    assert stored.shape == (7, 512)
    pieces = torch.cat([piece.float() for _, piece in stored.pieces()])
    assert torch.equal(pieces, torch.from_numpy(dequantize(packed, kind)))
    if stored.dtype is not None:
        assert torch.equal(stored.mapped().float(), pieces)
