import errno
import resource
from pathlib import Path

import pytest
import torch
from helpers.models import CONFIGS, FAMILY_CONFIGS, assert_equal_logits, random_ids, tiny_model

from nanogpt_surgery import GPTConfig, GPTDataset, SimpleGPT, SurgeryError, fit, inject_lora
from nanogpt_surgery.training.distributed import World
from nanogpt_surgery.training.fast import frozen_prefix
from nanogpt_surgery.training.fast.frozen_prefix import (
    FrozenPrefix,
    first_trainable_stage,
    mapped_file,
    prefix_for,
)
from nanogpt_surgery.training.settings import FitSettings

SETTINGS = FitSettings(
    max_steps=8, batch_size=4, grad_accum_steps=2, warmup_steps=0, learning_rate=1e-2,
    device="cpu", precision="float32", compile="off",
)  # fmt: skip
TARGETS = {"lm_head": 2, r"layers\.1\..*": 1, "q_proj": 0, "embed_tokens": None}
NAMES = ["gpt2-gelu-untied", "llama", "qwen3-bias-untied", "rotary-layernorm-gelu"]


def adapted(name: str, targets: str = "lm_head") -> SimpleGPT:
    torch.manual_seed(1)
    model = tiny_model(CONFIGS[name])
    inject_lora(model, targets, rank=2)
    return model


def dataset() -> GPTDataset:
    return GPTDataset.from_ids(random_ids(FAMILY_CONFIGS["llama"], 1, 40)[0], 9, stride=3)


@pytest.mark.parametrize("targets, first", TARGETS.items())
def test_the_first_part_that_learns(targets, first):
    found = first_trainable_stage(adapted("llama", targets))
    assert found == (3 if targets == "lm_head" else first)  # two layers and the norm are frozen


def test_a_norm_that_learns_is_not_kept():
    model = adapted("llama")
    model.norm.weight.requires_grad_(True)
    assert first_trainable_stage(model) == 2


@pytest.mark.parametrize("targets", ["lm_head", r"layers\.1\..*"])
@pytest.mark.parametrize("name", NAMES)
def test_kept_states_are_those_of_the_model(name, targets):
    model = adapted(name, targets)
    prefix = FrozenPrefix(model, windows=3)
    for seed in (0, 1, 0):
        ids = random_ids(model.config, 3, 7, seed)
        assert_equal_logits(prefix.hidden(ids), model.hidden(ids))
    assert len(prefix.places) == 3  # there is no room for more
    ids = random_ids(model.config, 3, 7, 0)
    model.embed_tokens.weight.data.zero_()  # what is kept is not computed again
    assert not torch.equal(prefix.hidden(ids), model.hidden(ids))


def test_rows_of_another_length_are_computed_and_not_kept():
    model = adapted("llama")
    prefix = FrozenPrefix(model, windows=9)
    for tokens in (7, 5, 9, 7):
        ids = random_ids(model.config, 2, tokens)
        assert_equal_logits(prefix.hidden(ids), model.hidden(ids))
    assert len(prefix.places) == 2


def test_a_window_s_bits_do_not_depend_on_its_batch():
    model = adapted("llama")
    ids = random_ids(model.config, 6, 7)
    alone = torch.cat([FrozenPrefix(model, 9).hidden(row[None]) for row in ids])
    assert torch.equal(FrozenPrefix(model, 9).hidden(ids), alone)
    mixed = FrozenPrefix(model, 9)
    mixed.hidden(ids[1:4])
    assert torch.equal(mixed.hidden(ids), alone)


def losses(model: SimpleGPT, **changes) -> list[float]:
    return [step.loss for step in fit(model, dataset(), SETTINGS, **changes)]


@pytest.mark.parametrize("targets", ["lm_head", r"layers\.1\..*"])
def test_states_kept_on_disk_are_those_kept_in_memory(targets, tmp_path):
    kept, on_disk = (adapted("llama", targets) for _ in range(2))
    assert losses(on_disk, cache_dir=tmp_path) == losses(kept)
    assert not list(tmp_path.iterdir())
    for one, other in zip(kept.parameters(), on_disk.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.fixture(params=["by the system", "no such call", "not on this file system"])
def reserving(request, monkeypatch):
    """Each way to get a file's bytes from the disk."""

    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if request.param == "no such call":
        monkeypatch.delattr("os.posix_fallocate", raising=False)
    elif request.param == "not on this file system":
        monkeypatch.setattr("os.posix_fallocate", refuse, raising=False)


@pytest.mark.usefixtures("reserving")
def test_a_full_disk_refuses_in_words_and_nothing_stays(tmp_path):
    needed = 3 * 7 * 24 * 4
    model = adapted("llama")
    ids = random_ids(model.config, 2, 7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (needed - 1, limits[1]))
    try:
        with pytest.raises(SurgeryError, match=rf"need {needed:,} bytes: .*bytes free") as caught:
            FrozenPrefix(model, 3, tmp_path).hidden(ids)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(tmp_path) in caught.value.what
    assert "cache_gib" in caught.value.hint
    assert not list(tmp_path.iterdir())
    assert_equal_logits(FrozenPrefix(model, 3, tmp_path).hidden(ids), model.hidden(ids))
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("reserving")
def test_the_disk_has_given_the_whole_file_before_it_is_mapped(tmp_path, monkeypatch):
    """A write into a mapped byte that a full disk has not given kills the process."""
    given, from_file = [], torch.from_file

    def measured(name: str, **options: object) -> torch.Tensor:
        given.append(512 * Path(name).stat().st_blocks)
        return from_file(name, **options)

    monkeypatch.setattr(torch, "from_file", measured)
    room = mapped_file(tmp_path, 700_001, torch.float32)
    assert given[0] >= room.nbytes == 4 * 700_001
    assert not room.any()


def test_the_frozen_part_is_run_once_for_each_window():
    model, runs = adapted("llama"), []
    model.layers[0].register_forward_hook(lambda _m, inputs, _o: runs.append(inputs[0].size(0)))
    losses(model)
    assert sum(runs) == len(dataset())


def test_it_is_used_only_where_it_pays(monkeypatch):
    data = dataset()
    assert prefix_for(adapted("llama"), data, SETTINGS) is not None
    few = FitSettings(max_steps=1, batch_size=4)
    assert prefix_for(adapted("llama"), data, few) is None
    assert prefix_for(adapted("llama", "q_proj"), data, SETTINGS) is None
    assert prefix_for(adapted("llama", "embed_tokens"), data, SETTINGS) is None
    assert prefix_for(torch.nn.Linear(3, 3), data, SETTINGS) is None
    dropping = SimpleGPT.from_config(GPTConfig(53, dropout=0.1))
    inject_lora(dropping, "lm_head")
    assert prefix_for(dropping, data, SETTINGS) is None
    monkeypatch.setattr(frozen_prefix, "world", lambda: World(0, 4))  # each sees a fourth as often
    assert prefix_for(adapted("llama"), data, SETTINGS) is None
