"""A GGUF file is written in one pass over the tensors, and read again to the bit."""

from collections import Counter
from dataclasses import replace

import pytest
from helpers.models import FAMILY_CONFIGS, tiny_model

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.formats.gguf.writing import read_again, write_gguf_file

ERRORS = {"F32": 0.0, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 0.51 / 127}  # half a step


def written(family, kind, path):
    """The file's tensors as they were noted, and how often each was asked for."""
    model = tiny_model(FAMILY_CONFIGS[family])
    asked = Counter()

    def make(name):
        asked[name] += 1
        return model.state_dict()[name]

    tensors, _ = write_gguf_file(model, path, None, kind, make)
    return model, tensors, asked


@pytest.mark.filterwarnings("ignore::nanogpt_surgery.SurgeryWarning")
@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])  # fused rows, and interleaved ones
def test_each_tensor_is_made_once_and_its_error_is_noted(family, kind, tmp_path):
    model, tensors, asked = written(family, kind, tmp_path / "m.gguf")
    assert set(asked.values()) == {1} and asked.keys() == tensors.keys()
    again, rows = read_again(tmp_path / "m.gguf", None, tensors, set())
    for name, one in tensors.items():
        ours, theirs = model.state_dict()[name], again.state_dict()[name].float()
        scale = ours.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        assert one.moved == float(((ours - theirs).abs() / scale).max()) <= ERRORS[one.kind]
    assert {row["stored as"]: row["tensors"] for row in rows} == Counter(
        one.kind for one in tensors.values()
    )


@pytest.mark.parametrize("changed", [{"sha256": "0" * 64}, {"moved": 0.1}])
def test_a_tensor_that_is_not_as_it_was_written_is_named(changed, tmp_path):
    _, tensors, _ = written("llama", "F16", tmp_path / "m.gguf")
    name = "layers.0.self_attn.q_proj.weight"
    tensors[name] = replace(tensors[name], **changed)
    with pytest.raises(SurgeryError, match=name):
        read_again(tmp_path / "m.gguf", None, tensors, set())
