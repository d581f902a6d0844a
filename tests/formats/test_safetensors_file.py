"""A header is a claim: every false one is refused by name, before anything is allocated."""

import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.formats.huggingface.safetensors_file import (
    DTYPES,
    INDEX,
    read_header,
    stored_tensors,
    write_tensors,
)

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def crafted(header, data=b"\0" * 24, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes):
    return crafted({"a": GOOD | changes})


HOSTILE = {
    "empty": b"",
    "shorter than a length": b"\1\0\0",
    "header beyond the file": crafted({"a": GOOD}, length=1 << 62),
    "header over the limit": crafted(b" " * ((16 << 20) + 1)),
    "not UTF-8": crafted(b"\xff\xfe{}"),
    "not JSON": crafted(b"{'a': 1}"),
    "a list": crafted([GOOD]),
    "nested too deep": crafted(b"[" * 500_000),
    "a number too long": crafted(b'{"a": ' + b"9" * 10_000 + b"}"),
    "the same name twice": crafted(b'{"a": %s, "a": %s}' % ((json.dumps(GOOD).encode(),) * 2)),
    "the same key twice": crafted(b'{"a": {"dtype": "F32", "dtype": "F16"}}'),
    "an empty name": crafted({"": GOOD}),
    "too many tensors": crafted(
        {str(i): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_001)}, b""
    ),
    "an entry that is no object": crafted({"a": 3}),
    "a missing key": crafted({"a": {"dtype": "F32", "shape": [2, 3]}}),
    "an unknown key": entry(extra=1),
    "an unknown dtype": entry(dtype="F128"),
    "a dtype that is no name": entry(dtype=["F32"]),
    "a negative size": entry(shape=[-2, -3]),
    "a fractional size": entry(shape=[2.0, 3]),
    "a true size": entry(shape=[True, 6]),
    "a size that overflows": entry(shape=[1 << 62, 1 << 62]),
    "too many dimensions": entry(shape=[1] * 9 + [6]),
    "a shape that is no list": entry(shape="23"),
    "more bytes than its shape": entry(shape=[2, 2]),
    "fewer bytes than its shape": entry(shape=[2, 4]),
    "one offset": entry(data_offsets=[24]),
    "offsets turned round": entry(data_offsets=[24, 0]),
    "beyond the file": crafted({"a": GOOD | {"data_offsets": [8, 32]}}),
    "data after the last": crafted({"a": GOOD}, b"\0" * 25),
    "data cut short": crafted({"a": GOOD}, b"\0" * 23),
    "a hole": crafted(
        {"a": GOOD, "b": GOOD | {"data_offsets": [28, 52]}},
        b"\0" * 52,
    ),
    "an overlap": crafted(
        {"a": GOOD, "b": GOOD | {"data_offsets": [12, 36]}},
        b"\0" * 36,
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_headers_are_refused(kind, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(SurgeryError, match=r"model.safetensors"):
        read_header(path)


@given(data=st.data())
def test_flipped_bytes_give_tensors_or_our_own_error(data, tmp_path_factory):
    good = bytearray(save({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}))
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(good)
    try:
        for tensor in read_header(path).values():
            assert tensor.n_numbers <= 10
            tensor.mapped()
            list(tensor.pieces())
    except SurgeryError:
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_mapped_and_in_pieces_are_what_was_saved(dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.formats.placing.PIECE", 6)
    tensors = {"a": torch.arange(35).view(7, 5).to(dtype), "b": torch.arange(3).to(dtype)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors))
    for name, stored in read_header(path).items():
        assert torch.equal(stored.mapped(), tensors[name])
        pieces = list(stored.pieces())
        assert torch.equal(torch.cat([piece for _, piece in pieces]), tensors[name])
        assert [start for start, _ in pieces] == ([0, 1, 2, 3, 4, 5, 6] if name == "a" else [0])


def test_a_tensor_across_its_numbers_bounds_is_read_in_pieces(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(crafted(json.dumps({"a": GOOD}).encode() + b" ", b"\0" * 24))
    stored = read_header(path)["a"]
    if stored.offset % 4 == 0:
        path.write_bytes(crafted(json.dumps({"a": GOOD}).encode(), b"\0" * 24))
        stored = read_header(path)["a"]
    assert stored.mapped() is None
    assert torch.equal(next(iter(stored.pieces()))[1], torch.zeros(2, 3))


def write_index(folder, places):
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def test_an_index_is_followed_and_its_false_promises_are_refused(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_bytes(save({name: torch.ones(2)}))
    write_index(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})
    assert set(stored_tensors(tmp_path)) == {"one", "two"}
    write_index(tmp_path, {"one": "two.safetensors"})
    with pytest.raises(SurgeryError, match=r"'one'.*two\.safetensors"):
        stored_tensors(tmp_path)
    write_index(tmp_path, {"one": "three.safetensors"})
    with pytest.raises(SurgeryError, match=r"three\.safetensors"):
        stored_tensors(tmp_path)
    write_index(tmp_path, {"one": "../one.safetensors"})
    with pytest.raises(SurgeryError, match=r"\.\./one\.safetensors"):
        stored_tensors(tmp_path)
    write_index(tmp_path, ["one"])
    with pytest.raises(SurgeryError, match="no weight_map"):
        stored_tensors(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(SurgeryError, match=r"pytorch_model\.bin"):
        stored_tensors(tmp_path)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_file_is_written_to_the_byte_as_the_library_writes_it(one_by_one, tmp_path):
    tensors = {f"{i} é": torch.arange(6 + i).to(dtype) for i, dtype in enumerate(DTYPES.values())}
    tensors |= {
        "none": torch.zeros(2, 0),
        "one": torch.tensor(1.5),
        "turned": torch.randn(3, 4).t(),
    }
    shapes = (
        {name: tensor.to("meta") for name, tensor in tensors.items()} if one_by_one else tensors
    )
    make = (lambda names: (tensors[name] for name in names)) if one_by_one else None
    write_tensors(shapes, tmp_path / "a", make)
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "a").read_bytes() == save(plain, metadata={"format": "pt"})
