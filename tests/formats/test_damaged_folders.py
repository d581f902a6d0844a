"""What does not fit is refused, everything at once, and only by our own error."""

import re

import pytest
import torch
from helpers.folders import (
    CONFIG,
    MANIFEST,
    TENSORS,
    TOKENIZER,
    assert_same_bits,
    rewrite,
    rewrite_config,
    saved,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer, SimpleGPT, SurgeryError, open_model, save_model


@pytest.mark.parametrize("name", ["gpt2", "llama", "rotary-layernorm-gelu"])
def test_missing_unknown_and_misshapen_tensors_are_named_at_once(name, tmp_path):
    saved(tmp_path / "model", name)

    def damage(tensors):
        norm = next(n for n in tensors if n.endswith(("ln_f.weight", "norm.weight")) and "." in n)
        tensors.pop(norm)
        head = next(n for n in tensors if n.endswith(("wte.weight", "embed_tokens.weight")))
        tensors[head] = tensors[head][:-1].clone()
        tensors["stranger.weight"] = torch.ones(3)

    rewrite(tmp_path / "model", damage)
    with pytest.raises(SurgeryError) as caught:
        open_model(tmp_path / "model")
    norm, embedding = "norm.weight", "embed_tokens.weight"
    if name == "gpt2":
        norm, embedding = "ln_f.weight", "transformer.wte.weight"
    for fragment in (
        f"{norm} is missing",
        f"{embedding} is (52, 24)",
        "(53, 24)",
        "stranger.weight",
    ):
        assert fragment in caught.value.what


def test_a_long_list_of_problems_is_counted(tmp_path):
    saved(tmp_path / "model", "llama")
    rewrite(tmp_path / "model", lambda tensors: tensors.clear())
    with pytest.raises(SurgeryError, match=r"; \d+ more"):
        open_model(tmp_path / "model")


def test_a_tied_model_without_its_embedding_is_refused(tmp_path):
    saved(tmp_path / "model", "gpt2")
    rewrite(tmp_path / "model", lambda tensors: tensors.pop("transformer.wte.weight"))
    with pytest.raises(SurgeryError, match=r"transformer\.wte\.weight.*missing"):
        open_model(tmp_path / "model")


def test_a_head_that_contradicts_its_tie_is_refused(tmp_path):
    saved(tmp_path / "model", "gpt2-gelu-untied")
    rewrite_config(tmp_path / "model", tie_word_embeddings=True)
    with pytest.raises(SurgeryError, match=r"lm_head\.weight.*embedding"):
        open_model(tmp_path / "model")


def test_a_head_that_repeats_the_embedding_is_fine(tmp_path):
    model = saved(tmp_path / "model", "gpt2")

    def repeat(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()

    rewrite(tmp_path / "model", repeat)
    opened = open_model(tmp_path / "model")[0]
    assert_same_bits(opened, model)
    assert opened.lm_head.weight is opened.embed_tokens.weight


def test_whole_numbers_are_no_weights(tmp_path):
    saved(tmp_path / "model", "llama")

    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    rewrite(tmp_path / "model", quantise)
    with pytest.raises(SurgeryError, match=r"norm\.weight.*torch\.int8"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS, TOKENIZER])
def test_a_flipped_bit_is_noticed(name, tmp_path):
    tokenizer = CharacterTokenizer("abc")
    save_model(SimpleGPT(3, n_embd=16, n_layer=1), tmp_path / "model", tokenizer)
    path = tmp_path / "model" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SurgeryError, match=rf"{name}.*sha256"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
@pytest.mark.parametrize("kept", ["nothing", "header", "all but one byte"])
def test_a_truncated_file_is_noticed(name, kept, tmp_path):
    saved(tmp_path / "model")
    path = tmp_path / "model" / name
    data = path.read_bytes()
    length = {"nothing": 0, "header": 30, "all but one byte": len(data) - 1}[kept]
    path.write_bytes(data[:length])
    with pytest.raises(SurgeryError, match=rf"{name}\D+{length:,}\D+{len(data):,}"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("length", [0, 4, 30, 400, -1])
def test_a_truncated_file_without_a_manifest_is_noticed_too(length, tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / MANIFEST).unlink()
    path = tmp_path / "model" / TENSORS
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(SurgeryError, match=re.escape(TENSORS)):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("name", [CONFIG, TENSORS])
def test_a_missing_file_is_named(name, tmp_path):
    saved(tmp_path / "model")
    (tmp_path / "model" / name).unlink()
    with pytest.raises(SurgeryError, match=name):
        open_model(tmp_path / "model")


def test_a_path_that_holds_no_model_is_refused_with_a_hint(tmp_path):
    with pytest.raises(SurgeryError, match=r"nothing is neither.*no such folder"):
        open_model(tmp_path / "nothing")
    with pytest.raises(SurgeryError, match=r"neither.*holds no config\.json"):
        open_model(tmp_path)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_bytes_open_or_give_our_own_error(data, tmp_path):
    folder = tmp_path / "model"
    if not folder.exists():
        saved(folder, "llama")
        (folder / MANIFEST).unlink()
        (tmp_path / "whole").write_bytes((folder / TENSORS).read_bytes())
    contents = bytearray((tmp_path / "whole").read_bytes())
    header = int.from_bytes(contents[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 8 + header - 1))
        contents[place] = data.draw(st.integers(0, 255))
    (folder / TENSORS).write_bytes(contents)
    try:
        open_model(folder)
    except SurgeryError as error:
        assert str(folder) in str(error)
