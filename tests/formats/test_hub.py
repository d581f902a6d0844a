"""Names on the hub are resolved from the cache, without a network."""

import pytest
import torch
from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model

from nanogpt_surgery import SurgeryError, open_model, save_model
from nanogpt_surgery.formats.model_file import hub_folder, is_hub_name


def test_names_on_the_hub_are_told_from_paths():
    assert is_hub_name("HuggingFaceTB/SmolLM2-135M")
    for path in ("gpt2", "./a", "/a/b", "a/b/c", "a/../b", "../a", "a/", "a b/c", "a/b\n"):
        assert not is_hub_name(path), path


def cached(cache, name):
    """A model in the cache, laid out as huggingface_hub lays it out."""
    folder = cache / f"models--{name.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    save_model(tiny_model(FAMILY_CONFIGS["llama"]), folder / "snapshots" / commit)
    return folder / "snapshots" / commit


def test_what_is_cached_is_used_without_asking(tmp_path):
    folder = cached(tmp_path, "someone/tiny")
    assert hub_folder("someone/tiny", tmp_path) == folder
    ids = random_ids(FAMILY_CONFIGS["llama"], 1, 5)
    assert torch.equal(
        open_model(hub_folder("someone/tiny", tmp_path))[0](ids),
        tiny_model(FAMILY_CONFIGS["llama"])(ids),
    )


def test_a_model_that_is_neither_here_nor_reachable_is_said_to_be(tmp_path):
    with pytest.raises(SurgeryError, match="someone/nothing"):
        hub_folder("someone/nothing", tmp_path)
    with pytest.raises(SurgeryError, match="someone/nothing"):
        open_model("someone/nothing")


def test_half_a_model_in_the_cache_is_not_taken_for_whole(tmp_path):
    (cached(tmp_path, "someone/half") / "model.safetensors").unlink()
    with pytest.raises(SurgeryError, match=r"model\.safetensors"):
        hub_folder("someone/half", tmp_path)
