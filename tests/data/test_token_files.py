"""Files of ids: the dtype of the vocabulary, mapped and not read, nothing damaged passes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nanogpt_surgery import CharacterTokenizer, GPTDataset, SimpleGPT, SurgeryError, evaluate
from nanogpt_surgery.data.text.corpus import chunks_of
from nanogpt_surgery.data.text.preparation import prepare_tokens
from nanogpt_surgery.data.text.token_files import (
    Shard,
    TokenHeader,
    dtype_for,
    open_tokens,
    verify_tokens,
    write_header,
)

TEXT = "".join(f"line {i} of {i * i}\n" for i in range(300))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "tokens"
    folder.mkdir()
    chunks = chunks_of([tmp_path / "text.txt"], 1000)
    list(prepare_tokens(chunks, folder, lambda: CharacterTokenizer(TEXT), workers=1))
    return folder


@pytest.mark.parametrize(
    ("ids", "dtype"), [(1, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (2**31, "uint32")]
)
def test_the_dtype_follows_the_vocabulary(ids, dtype):
    assert dtype_for(ids) == dtype


def test_a_vocabulary_that_no_dtype_holds_is_refused():
    with pytest.raises(SurgeryError, match="2,147,483,649"):
        dtype_for(2**31 + 1)


class Far:
    """A tokenizer of large ids."""

    vocab_size = 200_000

    def encode(self, text: str) -> list[int]:
        return [199_000 + ord(c) for c in text]

    def to_json(self) -> dict[str, str]:
        return {"kind": "far"}

    def decode(self, ids) -> str:
        return "".join(chr(i - 199_000) for i in ids)


def test_large_ids_take_four_bytes_and_come_back(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "far").mkdir()
    chunks = chunks_of([tmp_path / "text.txt"])
    list(prepare_tokens(chunks, tmp_path / "far", Far, held_out=0, workers=1))
    tokens = open_tokens(tmp_path / "far")
    assert tokens.header.dtype == "uint32"
    assert (tmp_path / "far" / "train.bin").stat().st_size == 4 * len(TEXT)
    assert Far().decode(tokens.train.tolist()) == TEXT
    assert len(tokens.validation) == 0


def test_mapped_ids_give_the_windows_of_ids_in_memory(folder):
    tokens = open_tokens(folder)
    assert tokens.train.dtype == torch.uint16
    mapped = GPTDataset.from_ids(tokens.train, 9)
    inside = GPTDataset.from_ids(tokens.train.to(torch.int32), 9)
    for mine, other in zip(mapped.batch(3, 7, 5), inside.batch(3, 7, 5), strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, other)
    torch.manual_seed(0)
    model = SimpleGPT(tokens.header.vocab_size, 8, 2, 1, 9)
    assert evaluate(model, mapped) == evaluate(model, inside)


def test_ids_are_mapped_and_not_copied(folder):
    """What changes in the file is seen by a dataset that was made before: it holds no copy."""
    dataset = GPTDataset.from_ids(open_tokens(folder).train, 9)
    with (folder / "train.bin").open("r+b") as file:
        file.write(np.array([7, 8, 9], "<u2").tobytes())
    assert dataset[0][0][:3].tolist() == [7, 8, 9]


def test_the_fingerprint_is_of_the_ids(folder):
    header = open_tokens(folder).header
    again = TokenHeader(**vars(header))
    other = TokenHeader(**(vars(header) | {"train": (Shard(3, "0" * 64),)}))
    assert header.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_flipped_bit_is_found(folder):
    verify_tokens(folder)
    data = bytearray((folder / "train.bin").read_bytes())
    data[2500] ^= 16
    (folder / "train.bin").write_bytes(data)
    with pytest.raises(SurgeryError, match=r"train\.bin.* shard 1\b"):
        verify_tokens(folder)


def cut_file(folder: Path) -> None:
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])


def remove_file(folder: Path) -> None:
    (folder / "validation.bin").unlink()


def remove_header(folder: Path) -> None:
    (folder / "tokens.json").unlink()


def header_with(**changes: object):
    def change(folder: Path) -> None:
        path = folder / "tokens.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (cut_file, r"train\.bin.*[\d,]+ bytes.*[\d,]+ ids of uint16"),
        (remove_file, r"validation\.bin.*\b0 bytes"),
        (remove_header, r"tokens\.json"),
        (header_with(version=2), "version 1"),
        (header_with(dtype="float32"), "dtype.*'float32'"),
        (header_with(vocab_size=-3), "vocab_size.*-3"),
        (header_with(vocab_size="many"), "vocab_size.*'many'"),
        (header_with(train=[{"tokens": 3}]), r"tokens\.json"),
        (header_with(train=[{"tokens": True, "sha256": ""}]), "tokens.*True"),
        (header_with(more=1), r"tokens\.json"),
        (lambda folder: (folder / "tokens.json").write_text("[]"), "version 1"),
    ],
)
def test_damage_is_refused(folder, damage, said):
    damage(folder)
    with pytest.raises(SurgeryError, match=said):
        open_tokens(folder)


def test_a_header_is_read_as_it_was_written(folder, tmp_path):
    header = open_tokens(folder).header
    (tmp_path / "copy").mkdir()
    write_header(tmp_path / "copy", header)
    assert (tmp_path / "copy" / "tokens.json").read_bytes() == (folder / "tokens.json").read_bytes()
