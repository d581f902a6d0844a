"""A GGUF file split into parts opens from any of them, or says which part is missing or wrong."""

import shutil

import gguf
import pytest
import torch
from helpers.commands import called, write_adapter
from helpers.llama_cpp import assert_goes_on_alike, greedy_text
from helpers.models import assert_equal_logits
from test_foreign_options import LETTERS, one  # noqa: F401

from nanogpt_surgery import SurgeryError, open_model

T = gguf.GGUFValueType
IDS = torch.arange(12)[None]


def split(source, goal, most=6, change=lambda writer: None, **options):
    """The parts of a file, as the format's own writer makes them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(goal, "llama", split_max_tensors=most, **options)
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == T.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    add_split_keys = writer.add_shard_kv_data
    writer.add_shard_kv_data = lambda: (add_split_keys(), change(writer))
    writer.write_header_to_file(goal)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(goal.parent.glob(f"{goal.stem}-0*.gguf"))


@pytest.mark.parametrize("options", [{}, {"small_first_shard": True}])
def test_every_part_opens_the_whole_model(options, one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf", **options)
    assert len(parts) > 2
    with torch.no_grad():
        whole = open_model(one)[0](IDS)
        for part in parts:
            model, tokenizer = open_model(part)
            assert torch.equal(model(IDS), whole)
            assert tokenizer.encode("the fox") == LETTERS.encode("the fox")


def test_it_goes_on_as_in_llama_cpp(one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf")
    prompt = "the quick brown fox jumps over"
    assert_goes_on_alike(*open_model(parts[-1]), prompt, greedy_text(parts[0], prompt, 8), 8)


def test_commands_take_a_part(one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf")
    called("inspect", parts[1])
    called("export", parts[1], "--format", "huggingface", "--out", tmp_path / "hf")
    model, _ = open_model(parts[0])
    with torch.no_grad():
        assert_equal_logits(open_model(tmp_path / "hf")[0](IDS), model(IDS))
        write_adapter(model, tmp_path / "a", 1)
        called("merge", parts[2], tmp_path / "a", "--force", "--out", tmp_path / "merged")
        assert not torch.equal(open_model(tmp_path / "merged")[0](IDS), model(IDS))


def test_missing_parts_are_named(one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf")
    parts[0].unlink()
    parts[2].unlink()
    for part in (parts[1], parts[3]):
        with pytest.raises(SurgeryError) as refusal:
            open_model(part)
        assert parts[0].name in refusal.value.what
        assert parts[2].name in refusal.value.what


def test_a_renamed_part_is_refused(one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf")
    parts[1].rename(tmp_path / "other.gguf")
    with pytest.raises(SurgeryError, match=r"-of-0000\d\.gguf"):
        open_model(tmp_path / "other.gguf")
    (tmp_path / "other.gguf").rename(parts[1])
    shutil.copy(parts[1], parts[0])
    for part in parts[::2]:
        with pytest.raises(SurgeryError, match=parts[0].name):
            open_model(part)


def set_key(key, value, kind, part=1):
    def change(writer):
        writer.kv_data[part][key] = gguf.GGUFValue(value, kind)

    return change


CONTRADICTIONS = {
    "another count": set_key("split.count", 3, T.UINT16),
    "no count": lambda writer: writer.kv_data[1].pop("split.count"),
    "another number": set_key("split.no", 3, T.UINT16),
    "no number": lambda writer: writer.kv_data[1].pop("split.no"),
    "another total": set_key("split.tensors.count", 5, T.INT32),
    "a count that is text": set_key("split.count", "4", T.STRING),
    "a negative count": set_key("split.count", -4, T.INT32),
    "a vast count": set_key("split.count", 2**60, T.UINT64),
    "another model": set_key("general.architecture", "qwen2", T.STRING),
    "other heads": set_key("llama.attention.head_count", 2, T.UINT32),
    "what the first does not say": set_key("llama.rope.scaling.factor", 2.0, T.FLOAT32),
    "a total that is not there": lambda writer: [
        data.update({"split.tensors.count": gguf.GGUFValue(99, T.INT32)}) for data in writer.kv_data
    ],
    "a tensor twice": lambda writer: writer.tensors[1].update(
        {next(iter(writer.tensors[0])): writer.tensors[1].pop(next(iter(writer.tensors[1])))}
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_part_that_contradicts_is_refused(kind, one, tmp_path):  # noqa: F811
    parts = split(one, tmp_path / "m.gguf", change=CONTRADICTIONS[kind])
    for part in (parts[0], parts[-1]):
        with pytest.raises(SurgeryError, match=r"m-0000\d-of"):
            open_model(part)
