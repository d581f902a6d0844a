"""Rows of any lengths share a step of the compiled decoder, and none depends on the others."""

import os
from importlib.util import find_spec

import pytest
import torch
from generation.test_native import ADAPTERS, every_linear
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import KVCache, SurgeryError, generate, inject_lora, lora_rows, swap_lora
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.generation.batch import generate_batch
from nanogpt_surgery.generation.engine import chosen_engine
from nanogpt_surgery.generation.native.decoder import (
    LONGEST,
    MOST,
    NativeDecoder,
    NativeSteps,
    NewTokens,
    TextCache,
    row_caches,
    unsupported_reason,
)
from nanogpt_surgery.generation.native.library import decoder_library
from nanogpt_surgery.generation.settings import SamplingSettings

LIBRARY, WHY_NOT = decoder_library()
LLAMA = CONFIGS["llama"]
SETTINGS = SamplingSettings(0.9, 20, 0.95, repetition_penalty=1.3, frequency_penalty=0.1)
PROMPTS = [[3], [5, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5]]
needs_decoder = pytest.mark.skipif(LIBRARY is None, reason=f"no compiled decoder: {WHY_NOT}")


def test_a_compiler_in_the_environment_compiles_the_decoder():
    """Without this test, its tests would skip where a compiler that is there does not do its work.

    In `.ci/run` one must be there.
    """
    expected = find_spec("ziglang") or os.environ.get("NATIVE_TESTS") == "required"
    assert LIBRARY is not None or not expected, WHY_NOT


def two_adapters(model):
    inject_lora(model, ["q_proj", "lm_head"], rank=2, name="one", tied="untie")
    inject_lora(model, ["q_proj", "v_proj", "down_proj"], rank=3, name="other", tied="untie")
    train_a_little(model)


@needs_decoder
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_several_tokens_of_a_text_are_to_the_bit_what_one_after_another_are(name, adapter):
    model = tiny_model(CONFIGS[name])
    ADAPTERS[adapter](model)
    ids = random_ids(model.config, 2, 13)
    caches = [KVCache(model.config, 2) for _ in range(2)]
    single, several = (NativeDecoder(model, cache, 2) for cache in caches)
    wanted = torch.stack([single.step(ids[:, t : t + 1]) for t in range(13)], 1)
    found = torch.cat([several.logits(part, part.size(1)) for part in ids.split([1, 5, 7], 1)], 1)
    assert torch.equal(found, wanted)
    for one, other in zip(*(cache.layers for cache in caches), strict=True):
        assert torch.equal(one.keys[:, :, :13], other.keys[:, :, :13])


@needs_decoder
def test_more_tokens_than_a_step_takes_are_several_steps():
    config = CONFIGS["gpt2"]
    rows = 2 * MOST // config.block_size
    model, ids = tiny_model(config), random_ids(config, rows, config.block_size)
    with torch.inference_mode():
        wanted = model(ids)
    for count in (1, 3, config.block_size):
        decoder = NativeDecoder(model, KVCache(config, rows), 2)
        found = decoder.logits(ids, count)
        torch.testing.assert_close(found, wanted[:, -count:], rtol=1e-4, atol=3e-5)


def next_of(decoder, caches):
    """The logits (N, V) after the newest id of each text."""
    return torch.cat(decoder.step_texts([NewTokens(TextCache(cache)) for cache in caches]))


def ragged(model, ids, lengths, steps, threads=2):
    """Logits (N, V) of some rows after each of so many steps, their texts begun by a model."""
    cache = KVCache(model.config, len(ids), dtype=model.norm.weight.dtype)
    caches, found = row_caches(cache), []
    decoder = NativeDecoder(model, cache, threads)
    with torch.inference_mode():
        for row, length in enumerate(lengths):
            model(ids[row : row + 1, :length], caches[row])
    for _ in range(steps):
        for row, own in enumerate(caches):
            own.append_ids(ids[row : row + 1, own.length : own.length + 1])
        found.append(next_of(decoder, caches))
    return torch.stack(found, 1)


@needs_decoder
@pytest.mark.parametrize("adapter", ["none", "all linear", "a blend of two"])
@pytest.mark.parametrize("name", CONFIGS)
def test_rows_of_any_lengths_are_to_the_bit_as_alone(name, adapter):
    model = tiny_model(CONFIGS[name])
    ADAPTERS[adapter](model)
    ids, lengths = random_ids(model.config, 4, 16), [1, 9, 4, 12]
    together = ragged(model, ids, lengths, 4)
    with torch.inference_mode():
        plain = model(ids)
    for row, n in enumerate(lengths):
        alone = ragged(model, ids[row : row + 1], [n], 4, threads=3)[0]
        assert torch.equal(together[row], alone)
        torch.testing.assert_close(alone, plain[row, n : n + 4], rtol=1e-4, atol=3e-5)


@needs_decoder
@pytest.mark.parametrize("seed", range(8))
def test_any_lengths_and_dtypes(seed):
    draw = torch.Generator().manual_seed(seed)
    model = tiny_model(LLAMA).to((torch.float32, torch.bfloat16)[seed % 2])
    rows, threads = (int(torch.randint(1, 7, (), generator=draw)) for _ in "rt")
    lengths = torch.randint(1, 13, (rows,), generator=draw).tolist()
    ids = random_ids(LLAMA, rows, 16)
    together = ragged(model, ids, lengths, 3, threads)
    order = torch.randperm(rows, generator=draw)
    shuffled = ragged(model, ids[order], [lengths[i] for i in order], 3, threads)
    assert torch.equal(together[order], shuffled)


@needs_decoder
def test_nothing_past_a_rows_own_tokens_is_read():
    model, ids = tiny_model(LLAMA), random_ids(LLAMA, 3, 16)
    cache = KVCache(LLAMA, 3)
    for layer in cache.layers:
        layer.keys.fill_(torch.nan), layer.values.fill_(torch.nan)
    caches, lengths = row_caches(cache), [2, 15, 7]
    with torch.inference_mode():
        wanted = model(ids)
        for row, n in enumerate(lengths):
            model(ids[row : row + 1, :n], caches[row])
            caches[row].append_ids(ids[row : row + 1, n : n + 1])
    found = next_of(NativeDecoder(model, cache, 2), caches)
    wanted = torch.stack([wanted[row, n] for row, n in enumerate(lengths)])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


def tokens_by_row(found, count):
    rows = [[] for _ in range(count)]
    for token in found:
        rows[token.row].append((token.id, token.log_probability, token.likeliest))
    return rows


@pytest.mark.parametrize(
    "engine", [pytest.param("auto", marks=needs_decoder), pytest.param("plain")]
)
@pytest.mark.parametrize("adapter", ["none", "all linear"])
@pytest.mark.parametrize("name", CONFIGS)
def test_generated_rows_are_to_the_bit_as_alone(name, adapter, engine):
    model = tiny_model(CONFIGS[name])
    ADAPTERS[adapter](model)
    options = {"likeliest": 2, "engine": engine}
    together = tokens_by_row(generate_batch(model, PROMPTS, 9, SETTINGS, seed=11, **options), 3)
    for row, prompt in enumerate(PROMPTS):
        [alone] = tokens_by_row(
            generate_batch(model, [prompt], 9, SETTINGS, seed=11 + row, **options), 1
        )
        assert together[row] == alone
        ids = list(generate(model, prompt, 9, sampling=SETTINGS, seed=11 + row, engine=engine))
        assert [token[0] for token in alone] == ids


@needs_decoder
@pytest.mark.parametrize("name", CONFIGS)
def test_each_row_with_its_own_adapter_is_to_the_bit_as_alone_with_it(name):
    model = tiny_model(CONFIGS[name])
    two_adapters(model)
    names = ["one", None, "other"]
    with lora_rows(model, names):
        assert chosen_engine(model, "auto", 3).name == "native"
        together = tokens_by_row(generate_batch(model, PROMPTS, 9, SETTINGS, seed=11), 3)
    for row, name_of_row in enumerate(names):
        with lora_rows(model, [name_of_row]):
            [alone] = tokens_by_row(
                generate_batch(model, [PROMPTS[row]], 9, SETTINGS, seed=11 + row), 1
            )
        assert together[row] == alone
        if name_of_row:
            swap_lora(model, name_of_row)
            [swapped] = tokens_by_row(
                generate_batch(model, [PROMPTS[row]], 9, SETTINGS, seed=11 + row), 1
            )
            assert swapped == alone
    assert together[0] != together[2]


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3"])
def test_each_row_with_its_own_adapter_by_the_plain_engine(name):
    model = tiny_model(CONFIGS[name])
    two_adapters(model)
    with lora_rows(model, ["one", None, "other"]):
        found = [
            tokens_by_row(generate_batch(model, PROMPTS, 9, SETTINGS, seed=1, engine=engine), 3)
            for engine in ("plain", "auto")
        ]
    for plain, auto in zip(*found, strict=True):
        assert [token[0] for token in plain] == [token[0] for token in auto]


@needs_decoder
def test_adapters_for_more_rows_than_there_are_is_not_computed():
    model = tiny_model(LLAMA)
    two_adapters(model)
    with lora_rows(model, ["one", "other"]):
        assert "2" in unsupported_reason(model, KVCache(LLAMA, 3))
        with pytest.raises(SurgeryError, match="2"):
            list(generate_batch(model, PROMPTS, 2, engine="native"))


@needs_decoder
def test_other_adapters_of_the_rows_are_seen_by_the_next_token():
    model, ids = tiny_model(LLAMA), random_ids(LLAMA, 2, 6)
    two_adapters(model)
    from nanogpt_surgery.generation.native.decoder import NativeSteps

    cache, found = KVCache(LLAMA, 2), []
    steps = NativeSteps(model, cache)
    for names in (["one", "other"], ["other", "one"]):
        with lora_rows(model, names), torch.inference_mode():
            wanted = model(ids)[:, -1]
            cache.truncate(0)
            assert steps.can_step()
            found.append(steps.decoder.step(ids))
            torch.testing.assert_close(found[-1], wanted, rtol=1e-4, atol=3e-5)
    assert (found[0] - found[1]).abs().max() > 1e-3


@needs_decoder
@pytest.mark.filterwarnings("ignore:the text has outgrown")
def test_rows_that_slide_are_as_alone():
    model = tiny_model(LLAMA)
    prompts = [[3, 4], list(range(15)), list(range(30))]
    together = tokens_by_row(generate_batch(model, prompts, 9, SETTINGS, seed=3), 3)
    for row, prompt in enumerate(prompts):
        ids = list(generate(model, prompt, 9, sampling=SETTINGS, seed=3 + row))
        assert [token[0] for token in together[row]] == ids


def hook_after(model, tokens):
    """Takes so many tokens, then sets a hook on a layer, and takes the rest."""
    found = []
    for token in tokens:
        found.append((token.row, token.id))
        if len(found) == 6:
            model.layers[1].register_forward_hook(lambda module, inputs, output: output.flip(-1))
    return found


@needs_decoder
def test_a_hook_between_two_tokens_is_seen():
    found = []
    for engine in ("plain", "auto"):
        model = tiny_model(LLAMA)
        tokens = generate_batch(model, PROMPTS, 9, SamplingSettings(0), engine=engine)
        found.append(hook_after(model, tokens))
    assert found[0] == found[1]
    free = generate_batch(tiny_model(LLAMA), PROMPTS, 9, SamplingSettings(0))
    assert found[0] != [(token.row, token.id) for token in free]


def test_with_a_hook_auto_is_plain_and_says_why():
    model = tiny_model(LLAMA)
    every_linear(model)
    assert str(chosen_engine(model, "plain")).startswith("plain")
    model.layers[1].register_forward_hook(lambda module, inputs, output: output)
    choice = chosen_engine(model, "auto")
    assert choice.name == "plain" and "layers.1" in choice.reason
    with pytest.raises(SurgeryError, match=r"layers\.1"):
        generate_batch(model, PROMPTS, 2, engine="native")


@needs_decoder
def test_a_rows_logit_that_is_no_number_is_traced_to_its_module():
    model = tiny_model(LLAMA)
    two_adapters(model)
    update = model.layers[1].self_attn.v_proj.updates["other"]
    with torch.no_grad():
        update.lora_B.fill_(torch.nan)
    with lora_rows(model, ["one", None, "other"]), pytest.raises(NotFiniteError, match="other"):
        list(generate_batch(model, PROMPTS, 3, SamplingSettings(0)))
    with lora_rows(model, ["one", None, "one"]):
        assert len(list(generate_batch(model, PROMPTS, 3, SamplingSettings(0)))) == 9


@needs_decoder
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_is_given_to_the_decoder_up_to_the_length_at_which_it_is_faster(
    dtype, monkeypatch
):
    monkeypatch.setitem(LONGEST, "float32", 3)
    monkeypatch.setitem(LONGEST, "bfloat16", 3)
    monkeypatch.setattr("nanogpt_surgery.generation.native.decoder._has_bfloat16", lambda: True)
    model = tiny_model(LLAMA).to(dtype)
    steps = NativeSteps(model, KVCache(LLAMA, dtype=dtype))
    assert [n for n in range(1, 9) if steps.can_take(n)] == [1, 2, 3]
    wanted = [list(generate(model, prompt, 6, 0, engine="native")) for prompt in PROMPTS]
    tokens = list(generate_batch(model, PROMPTS, 6, SamplingSettings(0), engine="native"))
    found = [[token.id for token in tokens if token.row == row] for row in range(len(PROMPTS))]
    assert found == wanted
