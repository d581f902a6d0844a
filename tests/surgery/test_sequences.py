"""Any sequence of operations on adapters, undone, gives the first hash."""

import torch
from helpers.models import CONFIGS, random_ids, tiny_model, train_a_little
from hypothesis import given, settings
from hypothesis import strategies as st

from nanogpt_surgery import (
    SurgeryError,
    blend_lora,
    disable_lora,
    enable_lora,
    inject_lora,
    merge_lora,
    remove_lora,
    swap_lora,
    tensor_hashes,
    undo_lora,
)
from nanogpt_surgery.lora.several import adapter_names
from nanogpt_surgery.lora.stored_adapter import extract_adapter
from nanogpt_surgery.surgery import (
    ablate,
    combine,
    combine_models,
    compress,
    duplicate_layers,
    extract,
    prune_layers,
    remove_intruders,
)

PROBE = random_ids(CONFIGS["llama"], 1, 4)
SEEDS = st.integers(0, 5)


def inject(model, seed, name):
    inject_lora(model, ["q_proj", "down_proj", "lm_head"][seed % 2 :], rank=1 + seed, name=name)
    train_a_little(model, seed, 0.3)


def of_one(model, seed):
    names = adapter_names(model)
    return names[seed % len(names)] if names else "none"


def other(seed):
    model = tiny_model(CONFIGS["gpt2" if seed == 0 else "llama"], seed=9)
    return model


OPERATIONS = {
    "inject": inject,
    "combine": lambda m, s, n: combine(
        m, dict.fromkeys(adapter_names(m)[:2], 1.0 - s), n, method=["linear", "ties", "dare"][s % 3]
    ),
    "compress": lambda m, s, n: compress(m, of_one(m, s), n, rank=1 + s % 2, probe=PROBE),
    "intruders": lambda m, s, n: remove_intruders(m, of_one(m, s), n),
    "ablate": lambda m, s, n: ablate(m, n, heads={s % 2: [s]}, probe=PROBE),
    "direction": lambda m, s, n: ablate(m, n, direction=torch.ones(24), layers=[s % 3]),
    "extract": lambda m, s, n: extract(m, other(s), n, rank=1 + s),
    "models": lambda m, s, n: combine_models(m, {"o": other(s)}, {"o": 0.5}),
    "blend": lambda m, s, n: blend_lora(m, dict.fromkeys(adapter_names(m), 0.5)),
    "swap": lambda m, s, n: swap_lora(m, of_one(m, s)),
    "disable": lambda m, s, n: disable_lora(m),
    "enable": lambda m, s, n: enable_lora(m),
    "merge": lambda m, s, n: merge_lora(m, force=True),
    "remove": lambda m, s, n: remove_lora(m, of_one(m, s)),
    "prune": lambda m, s, n: prune_layers(m, [s % 2]),
    "duplicate": lambda m, s, n: duplicate_layers(m, [s % 2]),
}


def state(model):
    with torch.no_grad():
        return tensor_hashes(model), str(model), model(PROBE)


def assert_same(one, two):
    assert one[:2] == two[:2]
    assert torch.equal(one[2], two[2])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["gpt2", "llama"]),
    st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), SEEDS), min_size=2, max_size=7),
)
def test_any_sequence_undone_gives_the_first_hash(family, sequence):
    model = tiny_model(CONFIGS[family])
    states = []
    for number, (kind, seed) in enumerate([("inject", 1), *sequence]):
        before = state(model)
        try:
            OPERATIONS[kind](model, seed, f"a{number}")
        except SurgeryError:  # it refuses, as a merge without an adapter does: nothing happened
            assert_same(state(model), before)
        else:
            states.append(before)
    for before in reversed(states):
        undo_lora(model)
        now = state(model)
        assert_same(now, before)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_extract_after_merge_gives_the_adapter_back(seed, rank):
    merged, model = (tiny_model(CONFIGS["llama"], seed) for _ in range(2))
    inject_lora(merged, ["k_proj", "up_proj"], rank=rank)
    train_a_little(merged, seed, 0.3)
    first = extract_adapter(merged).updates
    merge_lora(merged)
    extract(model, merged, "back", rank=rank)
    back = extract_adapter(model).updates
    assert back.keys() == first.keys()
    for layer, update in first.items():
        found = back[layer].delta_weight
        torch.testing.assert_close(found, update.delta_weight, atol=1e-4, rtol=1e-3)
