import pytest
import torch
from helpers.models import (
    CONFIGS,
    assert_equal_in_bfloat16,
    assert_equal_logits,
    random_ids,
    tiny_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_surgery import GPTConfig, KVCache, SurgeryError

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def by_chunks(model, ids, lengths):
    """The logits of ids that are fed to the model chunk by chunk."""
    cache = KVCache(model.config, ids.size(0))
    logits = [model(chunk, cache) for chunk in ids.split(lengths, dim=1)]
    assert cache.length == ids.size(1)
    return torch.cat(logits, dim=1)


@EVERY_CONFIG
@torch.no_grad()
def test_cached_equals_uncached_at_every_split(config):
    model, length = tiny_model(config), config.block_size
    ids = random_ids(config, 2, length)
    uncached = model(ids)
    for split in range(1, length):
        assert_equal_logits(by_chunks(model, ids, [split, length - split]), uncached)


@EVERY_CONFIG
@pytest.mark.parametrize("chunk", [1, 2, 7])
@torch.no_grad()
def test_cached_equals_uncached_chunk_by_chunk(config, chunk):
    model = tiny_model(config)
    ids = random_ids(config, 3, config.block_size)
    assert_equal_logits(by_chunks(model, ids, chunk), model(ids))


@given(
    config=st.sampled_from(list(CONFIGS.values())),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=9),
)
@settings(max_examples=30)
@torch.no_grad()
def test_cached_equals_uncached_for_any_chunks(config, lengths):
    model = tiny_model(config)
    while sum(lengths) > config.block_size:
        lengths = lengths[:-1]
    ids = random_ids(config, 1, sum(lengths))
    assert_equal_logits(by_chunks(model, ids, lengths), model(ids))


@EVERY_CONFIG
@torch.no_grad()
def test_after_truncating_other_tokens_follow(config):
    model, cache = tiny_model(config), KVCache(config, 2)
    first, second = random_ids(config, 2, 12, seed=1), random_ids(config, 2, 12, seed=2)
    model(first, cache)
    cache.truncate(5)
    assert cache.length == 5
    followed = model(second[:, 5:], cache)
    whole = model(torch.cat((first[:, :5], second[:, 5:]), dim=1))
    assert_equal_logits(followed, whole[:, 5:])


@torch.no_grad()
def test_rows_of_a_cache_are_independent():
    config = CONFIGS["llama"]
    model, ids = tiny_model(config), random_ids(config, 4, 11)
    together = by_chunks(model, ids, [6, 1, 4])
    for row in range(4):
        alone = by_chunks(model, ids[row : row + 1], [6, 1, 4])
        assert_equal_logits(alone, together[row : row + 1])


@torch.no_grad()
def test_the_model_keeps_nothing():
    config = CONFIGS["llama"]
    model, ids = tiny_model(config), random_ids(config, 1, 9)
    before = model(ids)
    model(random_ids(config, 1, 9, seed=3), KVCache(config))
    assert torch.equal(model(ids), before)


@torch.no_grad()
def test_a_full_cache_is_refused_with_its_numbers_and_stays_as_it_is():
    config = CONFIGS["gpt2"]
    model, cache = tiny_model(config), KVCache(config, max_length=8)
    ids = random_ids(config, 1, 9)
    model(ids[:, :6], cache)
    with pytest.raises(SurgeryError, match=r"6 tokens in the cache and 3 new ones .* room for 8"):
        model(ids[:, 6:], cache)
    assert cache.length == 6
    assert_equal_logits(model(ids[:, 6:8], cache), model(ids)[:, 6:8])


def test_a_cache_longer_than_the_model_is_refused():
    with pytest.raises(SurgeryError, match=r"cache of 20 tokens .* block_size of 19"):
        KVCache(CONFIGS["gpt2"], max_length=20)


def test_another_number_of_rows_is_refused():
    config = CONFIGS["gpt2"]
    with pytest.raises(SurgeryError, match="3 rows of ids, but the cache was made for 2"):
        tiny_model(config)(random_ids(config, 3, 4), KVCache(config, 2))


def test_only_what_is_there_can_be_forgotten():
    with pytest.raises(AssertionError, match="0 tokens to 1"):
        KVCache(CONFIGS["gpt2"]).truncate(1)


@torch.no_grad()
def test_a_cache_in_bfloat16_serves_a_model_in_bfloat16():
    config = GPTConfig.for_family("llama", vocab_size=31, n_embd=32, n_kv_head=2, n_layer=2)
    model = tiny_model(config).bfloat16()
    ids = random_ids(config, 1, 9)
    cache = KVCache(config, dtype=torch.bfloat16)
    logits = torch.cat((model(ids[:, :5], cache), model(ids[:, 5:], cache)), dim=1)
    assert_equal_in_bfloat16(logits, model(ids))
