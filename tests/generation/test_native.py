"""The compiled decoder computes what the readable model computes, for every family and adapter."""

import copy
import threading

import pytest
import torch
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little

from nanogpt_surgery import (
    GPTConfig,
    KVCache,
    SimpleGPT,
    SurgeryError,
    blend_lora,
    disable_lora,
    generate,
    inject_lora,
    merge_lora,
    undo_lora,
)
from nanogpt_surgery.generation.native.decoder import NativeDecoder, NativeSteps, unsupported_reason
from nanogpt_surgery.generation.native.library import decoder_library

pytestmark = pytest.mark.skipif(
    isinstance(decoder_library(), str), reason=f"no compiled decoder: {decoder_library()}"
)
LLAMA = CONFIGS["llama"]


def two(model):
    inject_lora(model, ["q_proj", "lm_head"], rank=2, name="one", tied="untie")
    inject_lora(model, ["q_proj", "down_proj"], rank=3, name="other", tied="untie")
    train_a_little(model)
    blend_lora(model, {"one": 0.7, "other": -0.4})


def every_linear(model):
    inject_lora(model, "all-linear", rank=5, alpha=7, tied="untie")
    train_a_little(model)


def switched_off(model):
    every_linear(model)
    disable_lora(model)


def merged(model):
    every_linear(model)
    merge_lora(model)


ADAPTERS = {
    "none": lambda model: None,
    "all linear": every_linear,
    "a blend of two": two,
    "disabled": switched_off,
    "merged": merged,
}


def stepped(model, ids, first, threads=2, dtype=torch.float32):
    """Logits (B, T, V) of ids (B, T), the first of them by PyTorch, the others a step each."""
    rows, tokens = ids.shape
    with torch.inference_mode():
        cache = KVCache(model.config, rows, tokens, dtype)
        parts = [model(ids[:, :first], cache).float()]
        assert unsupported_reason(model, cache) == ""
        decoder = NativeDecoder(model, cache, threads)
        parts += [decoder.step(ids[:, t : t + 1])[:, None] for t in range(first, tokens)]
    assert cache.length == tokens
    return torch.cat(parts, 1)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_steps_are_the_models(name, adapter, rows):
    model = tiny_model(CONFIGS[name])
    ADAPTERS[adapter](model)
    ids = random_ids(model.config, rows, 13)
    with torch.inference_mode():
        wanted = model(ids)
    found = stepped(model, ids, 4)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_the_first_token_on(name):
    model = tiny_model(CONFIGS[name])
    ids = random_ids(model.config, 2, 6)
    with torch.inference_mode():
        wanted = model(ids)
        cache = KVCache(model.config, 2)
        decoder = NativeDecoder(model, cache, 3)
        found = torch.stack([decoder.step(ids[:, t : t + 1]) for t in range(6)], 1)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama-all-bias", "qwen3", "prev-tokens-relu2"])
def test_weights_in_bfloat16_lose_nothing_but_their_own_rounding(name):
    """It rounds weights and cache; PyTorch's bfloat16 rounds every result as well."""
    model = tiny_model(CONFIGS[name]).bfloat16()
    ids = random_ids(model.config, 2, 13)
    exact = copy.deepcopy(model).float()
    with torch.inference_mode():
        wanted, theirs = exact(ids), model(ids).float()
    found = stepped(model, ids, 4, dtype=torch.bfloat16)
    error, rounding = ((x - wanted)[:, 4:].norm() for x in (found, theirs))
    assert 0 < error < 1.2 * rounding


@pytest.mark.parametrize("seed", range(12))
def test_any_shape(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(least, most):
        return int(torch.randint(least, most + 1, (), generator=draw))

    groups, head_dim = number(1, 4), 2 * number(1, 9)
    config = GPTConfig(
        number(1, 70), number(1, 50), groups * number(1, 3), number(1, 3), 24, groups, head_dim,
        number(1, 60), n_prev_tokens=seed % 4, qk_norm=seed % 5 == 1,
        positions=("learned", "rotary")[seed % 2], norm=("rmsnorm", "layernorm")[seed % 2],
        mlp=("swiglu", "relu2")[seed % 3 // 2],
    )  # fmt: skip
    model = tiny_model(config, seed)
    rows, threads = number(1, 5), number(1, 4)
    ids = random_ids(config, rows, 17)
    with torch.inference_mode():
        wanted = model(ids)
    torch.testing.assert_close(stepped(model, ids, 3, threads), wanted, rtol=1e-4, atol=1e-4)


def test_a_rows_bits_do_not_depend_on_its_companions_or_the_threads():
    model = tiny_model(LLAMA)
    every_linear(model)
    ids = random_ids(LLAMA, 4, 12)
    with torch.inference_mode():
        caches = [KVCache(LLAMA, 4), *(KVCache(LLAMA, 1) for _ in range(4))]
        together = NativeDecoder(model, caches[0], 2)
        alone = [NativeDecoder(model, cache, 3) for cache in caches[1:]]
        for t in range(12):
            logits = together.step(ids[:, t : t + 1])
            for row, decoder in enumerate(alone):
                assert torch.equal(decoder.step(ids[row : row + 1, t : t + 1])[0], logits[row])


def test_two_models_in_two_threads():
    models = [tiny_model(CONFIGS[name], 3) for name in ("llama", "gpt2")]
    prompts = [random_ids(m.config, 1, 5)[0].tolist() for m in models]
    pairs = list(zip(models, prompts, strict=True))
    wanted = [list(generate(model, prompt, 9, 0, engine="plain")) for model, prompt in pairs]
    found = [[], []]

    def write(number):
        for _ in range(20):
            ids = generate(models[number], prompts[number], 9, 0, engine="native")
            found[number].append(list(ids))

    threads = [threading.Thread(target=write, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[wanted[0]] * 20, [wanted[1]] * 20]


def greedy(model, engine, change=lambda: None, tokens=8):
    ids = []
    for index, new in enumerate(generate(model, [3, 1, 4], tokens, 0, engine=engine)):
        ids.append(new)
        if index == 3:
            torch.manual_seed(0)
            change()
    return ids


def in_place(model):
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight += 1.0


def by_data(model):
    model.lm_head.weight.data = model.lm_head.weight.data.flip(0).contiguous()


def hooked(model):
    model.layers[1].register_forward_hook(lambda module, inputs, output: output.flip(-1))


def injected(model):
    inject_lora(model, ["o_proj", "lm_head"], rank=2, dora=True)
    train_a_little(model, size=1.0)


CHANGES = {
    "in place": in_place,
    "another tensor": by_data,
    "a hook": hooked,
    "all linear": every_linear,
    "DoRA": injected,
    "undo": undo_lora,
    "another attention": lambda m: setattr(m.layers[0].self_attn, "attend", lambda q, k, v, *_: q),
}


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_never_stale(change):
    """Whatever happens to the model between two tokens is seen by the next."""
    found = []
    for engine in ("plain", "auto"):
        model = tiny_model(LLAMA)
        every_linear(model) if change == "undo" else None
        found.append(greedy(model, engine, lambda model=model: CHANGES[change](model)))
    assert found[0] == found[1]
    assert found[0] != greedy(tiny_model(LLAMA), "plain")


def test_what_it_does_not_compute_is_plain_or_refused():
    model = tiny_model(LLAMA)
    hooked(model)
    cache = KVCache(LLAMA)
    assert "layers.1" in unsupported_reason(model, cache)
    assert not NativeSteps(model, cache).can_step()
    with pytest.raises(SurgeryError, match=r"layers\.1"):
        list(generate(model, [1], 2, engine="native"))


def test_past_the_block_the_window_slides_as_it_did():
    model = tiny_model(LLAMA)
    with pytest.warns(UserWarning, match="slides"):
        wanted = list(generate(model, [5, 2], 30, 0, engine="plain"))
    with pytest.warns(UserWarning, match="slides"):
        assert list(generate(model, [5, 2], 30, 0, engine="native")) == wanted


def test_nothing_is_written_past_the_caches_end():
    model = tiny_model(LLAMA)
    cache = KVCache(LLAMA, 1, 6)
    around = torch.full((3, *cache.layers[-1].keys.shape), 7.0)
    cache.layers[-1].keys = around[1]
    ids = random_ids(LLAMA, 1, 6)
    with torch.inference_mode():
        decoder = NativeDecoder(model, cache)
        for t in range(6):
            decoder.step(ids[:, t : t + 1])
        with pytest.raises(SurgeryError, match="6"):
            decoder.step(ids[:, :1])
    assert bool((around[0] == 7).all() and (around[2] == 7).all())


def test_a_gpt_from_nothing():
    model = SimpleGPT(11, 8, 2, 1, 10)
    assert len(list(generate(model, [1], 9, seed=3, engine="native"))) == 9
