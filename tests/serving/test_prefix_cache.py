"""The beginnings of texts are kept within their bytes, the one that was used last the longest."""

import torch
from helpers.models import CONFIGS, tiny_model

from nanogpt_surgery import KVCache, inject_lora
from nanogpt_surgery.serving.prefix_cache import PrefixCache
from nanogpt_surgery.serving.weights import WeightHashes

LLAMA = CONFIGS["llama"]
A_TOKEN = 2 * 2 * 2 * 10 * 4  # keys and values, layers, KV heads, head width, bytes


def text_of(ids):
    cache = KVCache(LLAMA, 1, len(ids) + 2)
    with torch.inference_mode():
        tiny_model(LLAMA)(torch.tensor([ids]), cache)
    return cache


def kept(texts, room=100, key="weights"):
    cache = PrefixCache(lambda length: KVCache(LLAMA, 1, length))
    for ids in texts:
        cache.add(key, text_of(ids), len(ids), room * A_TOKEN)
    return cache


def found(cache, ids, key="weights"):
    text, length = cache.longest(key, torch.tensor(ids))
    return (None if text is None else text.ids.tolist()), length


def test_the_longest_common_beginning_counts():
    cache = kept([[1, 2, 3, 4], [1, 2, 7, 8, 9], [5]])
    assert found(cache, [1, 2, 7, 8, 3]) == ([1, 2, 7, 8, 9], 4)
    assert found(cache, [1, 2, 3]) == ([1, 2, 3, 4], 3)
    assert found(cache, [9]) == (None, 0)
    assert found(cache, [1, 2, 3], key="other weights") == (None, 0)
    assert cache.n_bytes == 10 * A_TOKEN


def test_a_text_that_another_begins_with_is_not_kept_twice():
    cache = kept([[1, 2], [1, 2, 3], [1, 2], [1, 2, 3]])
    assert [text.ids.tolist() for text in cache.texts] == [[1, 2, 3]]
    assert cache.n_bytes == 3 * A_TOKEN


def test_those_used_last_stay_within_the_room():
    cache = kept([[1, 1, 1], [2, 2, 2], [3, 3, 3]])
    found(cache, [1, 1])
    cache.make_room(7 * A_TOKEN)
    assert [text.ids.tolist() for text in cache.texts] == [[3, 3, 3], [1, 1, 1]]
    cache.make_room(-1)
    assert cache.texts == [] and cache.n_bytes == 0
    assert kept([[1, 2, 3, 4]], room=3).texts == []


def hashed(change):
    """The hashes of a model with an adapter, before and after a change."""
    model = tiny_model(LLAMA)
    inject_lora(model, ["q_proj"], rank=2, name="one")
    before = WeightHashes(model)
    change(model)
    return before, WeightHashes(model)


def test_a_hash_is_that_of_the_weights_that_take_part():
    before, after = hashed(lambda model: inject_lora(model, ["v_proj"], rank=2, name="other"))
    assert before.base == after.base and before.adapters["one"] == after.adapters["one"]
    assert after.of({"one": 1.0, "other": 0.5}) == after.of({"other": 0.5, "one": 1.0})
    assert len({after.of(w) for w in ({}, {"one": 1.0}, {"one": 0.5}, {"other": 1.0})}) == 4


def test_a_change_of_weights_settings_or_modules_is_a_change_of_the_hash():
    def weight(model):
        model.norm.weight.data[0] += 1

    def setting(model):
        model.layers[0].input_layernorm.eps = 1e-3

    def hook(model):
        model.layers[1].self_attn.q_proj.register_forward_hook(lambda *arguments: None)

    def attention(model):
        model.layers[0].self_attn.attend = lambda *arguments: None

    for change in (weight, setting, hook, attention):
        before, after = hashed(change)
        assert before.base != after.base, change
        assert before.adapters == after.adapters


def test_an_adapters_scale_is_part_of_its_hash():
    def scale(model):
        model.layers[0].self_attn.q_proj.updates["one"].scaling = 9.0

    before, after = hashed(scale)
    assert before.base == after.base and before.adapters["one"] != after.adapters["one"]


def test_what_cannot_be_compared_is_like_no_other():
    model = tiny_model(LLAMA)
    model.layers[0].register_forward_hook(lambda *arguments: None)
    assert WeightHashes(model).base != WeightHashes(model).base
    assert WeightHashes(tiny_model(LLAMA)).base == WeightHashes(tiny_model(LLAMA)).base
