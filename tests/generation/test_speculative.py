"""A draft changes how fast a text comes, and nothing of the text."""

import dataclasses
import itertools
import math
from collections import Counter

import pytest
import torch
from helpers.models import CONFIGS, tiny_model

from nanogpt_surgery import GPTConfig, KVCache, SurgeryError, generate
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.generation import speculative
from nanogpt_surgery.generation.generate import choose
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.generation.speculative import (
    Draft,
    DraftModel,
    PromptLookup,
    generate_speculative,
)

LLAMA = CONFIGS["llama"]
PROMPT = [3, 1, 4, 3, 1, 4, 3]
SETTINGS = {
    "greedy": SamplingSettings(0),
    "greedy, penalised": SamplingSettings(0, repetition_penalty=1.5, logit_bias={3: -2.0}),
    "drawn": SamplingSettings(0.8),
    "all settings": SamplingSettings(
        0.9, 20, 0.95, 0.01, repetition_penalty=1.3, presence_penalty=0.2, frequency_penalty=0.1,
        logit_bias={5: 1.5, 7: -math.inf},
    ),
}  # fmt: skip


class Always(Draft):
    """Guesses one id again and again."""

    guess = 2

    def propose(self, prompt, answer, settings, generator):
        return [self.guess] * self.num_tokens


def drafts(model):
    smaller = dataclasses.replace(model.config, n_layer=1)
    return {
        "lookup": PromptLookup(),
        "itself": DraftModel(4, model=model),
        "another": DraftModel(3, model=tiny_model(smaller, 5)),
        "nonsense": Always(3),
    }


@pytest.mark.parametrize("engine", ["auto", "plain"])
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_text_is_that_without_a_draft(name, kind, engine):
    model = tiny_model(CONFIGS[name])
    options = {"sampling": SETTINGS[kind], "seed": 7, "engine": engine}
    wanted = list(generate(model, PROMPT, 9, **options))
    for draft in drafts(model).values():
        assert list(generate_speculative(model, PROMPT, 9, draft, **options)) == wanted


def test_a_model_that_drafts_for_itself_is_always_right():
    """Also where ids are drawn at random: it draws by the same random numbers."""
    model = tiny_model(LLAMA)
    for settings in SETTINGS.values():
        draft = DraftModel(4, model=model)
        assert len(list(generate_speculative(model, [5], 11, draft, sampling=settings))) == 11
        # One by the prompt's pass, then twice four and what follows them.
        assert (draft.drafted, draft.accepted, draft.accepted_share) == (8, 8, 1.0)


def test_a_lookup_is_right_where_the_text_repeats_itself():
    model = tiny_model(LLAMA)
    with torch.no_grad():  # each id's successor is the likeliest, whatever came before
        model.lm_head.weight.copy_(model.embed_tokens.weight.roll(1, 0) * 50)
        for layer in model.layers:
            layer.mlp.down_proj.weight.zero_(), layer.self_attn.o_proj.weight.zero_()
            for linear in (layer.mlp.down_proj, layer.self_attn.o_proj):
                if linear.bias is not None:
                    linear.bias.zero_()
    ids = list(generate(model, [1], 8, 0))
    draft = PromptLookup(5)
    found = list(generate_speculative(model, [1, *ids, 1], 8, draft, sampling=SamplingSettings(0)))
    assert found == list(generate(model, [1, *ids, 1], 8, 0))
    assert draft.accepted > 0.5 * draft.drafted > 0


@pytest.mark.parametrize(
    ("ids", "found"),
    [
        ([1, 2, 3, 9, 1, 2, 3], [9, 1]),
        ([1, 2, 3, 9, 7, 2, 3, 8, 2, 3], [8, 2]),  # the latest
        ([1, 2, 3, 4, 5, 2, 3, 8, 1, 2, 3], [4, 5]),  # the longest
        ([1, 2, 3], []),
        ([4], []),
        ([4, 4], [4]),
    ],
)
def test_what_is_looked_up(ids, found):
    propose = PromptLookup(2).propose
    for cut in range(len(ids)):
        assert propose(ids[:cut], ids[cut:], SamplingSettings(), torch.Generator()) == found


TINY = GPTConfig(5, 8, 2, 1, 8)


def exact(model, settings, tokens):
    """The probability of each continuation of [1]."""
    found = {}
    for ids in itertools.product(range(TINY.vocab_size), repeat=tokens):
        with torch.no_grad():
            logits = model(torch.tensor([[1, *ids]]))[0, :-1] / settings.temperature
        found[ids] = float(logits.softmax(-1)[range(tokens), list(ids)].prod())
    return found


def chi_square(counts, probabilities):
    """The statistic over its mean, in its standard deviations; rare cells are put together."""
    total = sum(counts.values())
    common = [k for k, p in probabilities.items() if p * total >= 5]
    cells = [(counts[k], probabilities[k] * total) for k in common]
    rest = total - sum(seen for seen, _ in cells), total - sum(want for _, want in cells)
    cells += [rest] if rest[1] > 5 else []
    freedom = len(cells) - 1
    statistic = sum((seen - want) ** 2 / want for seen, want in cells)
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.fixture
def each_pass_once(monkeypatch):
    """Thousands of texts of three ids out of five need few different passes."""
    found = {}
    computing = {name: getattr(speculative, name) for name in ("next_logits", "_after_each")}
    for name, compute in computing.items():

        def once(model, *given, name=name, compute=compute):
            lists = [part for part in given if isinstance(part, list)]
            key = name, id(model), str(lists)
            if key not in found:
                cache = KVCache(TINY)
                if before := lists[0][:-1]:
                    with torch.inference_mode():
                        model(torch.tensor([before]), cache)
                found[key] = compute(model, *lists, cache, None)
            return found[key]

        monkeypatch.setattr(speculative, name, once)


def sampled(model, draft, settings, count=1000):
    options = {"sampling": settings, "engine": "plain"}
    return Counter(
        tuple(generate_speculative(model, [1], 3, draft, seed=seed, **options))
        for seed in range(count)
    )


def without_correction(draft):
    """Chooses as speculation would that draws from all ids where a guess is not accepted."""
    wrapped, guesses = draft.propose, {}

    def propose(prompt, answer, settings, generator):
        found = wrapped(prompt, answer, settings, generator)
        guesses.clear(), guesses.update(enumerate(found, len(answer)))
        return found

    def uncorrected(logits, settings, prompt, answer, generator):
        chosen = choose(logits, settings, prompt, answer, generator)
        if guesses.get(len(answer), chosen) == chosen:
            return chosen
        return choose(logits, settings, prompt, answer, generator)

    draft.propose = propose
    return uncorrected


@pytest.mark.parametrize("kind", ["another", "nonsense"])
def test_the_distribution_is_the_models(kind, monkeypatch, each_pass_once):
    model, settings = tiny_model(TINY), SamplingSettings(0.7)
    draft = drafts(model)[kind]
    probabilities = exact(model, settings, 3)
    assert abs(chi_square(sampled(model, draft, settings), probabilities)) < 3
    assert 0.05 < draft.accepted_share < 0.95
    monkeypatch.setattr(speculative, "choose", without_correction(draft))
    assert chi_square(sampled(model, draft, settings), probabilities) > 6


def test_a_draft_that_draws_by_the_same_numbers_is_right_more_often(each_pass_once):
    model, settings, shares = tiny_model(TINY), SamplingSettings(0.7), []
    for own_numbers in (False, True):
        draft = drafts(model)["another"]
        if own_numbers:
            wrapped, own = draft.propose, torch.Generator().manual_seed(0)
            draft.propose = lambda *given, wrapped=wrapped, own=own: wrapped(*given[:3], own)
        sampled(model, draft, settings, 500)
        shares.append(draft.accepted_share)
    assert shares[0] > 1.3 * shares[1]


def test_it_ends_where_a_text_ends():
    model = tiny_model(LLAMA)
    free = list(generate(model, PROMPT, 9, 0))
    for end in free:
        draft, stop = DraftModel(4, model=model), {"stop_ids": [end]}
        stop |= {"sampling": SamplingSettings(0)}
        found = list(generate_speculative(model, PROMPT, 9, draft, **stop))
        assert found == free[: free.index(end)]


@pytest.mark.filterwarnings("ignore:the text has outgrown")
@pytest.mark.parametrize("engine", ["auto", "plain"])
def test_past_the_block_the_window_slides_as_it_did(engine):
    model = tiny_model(LLAMA)
    for draft in drafts(model).values():
        options = {"sampling": SamplingSettings(0), "engine": engine}
        found = list(generate_speculative(model, [5, 2], 30, draft, **options))
        assert found == list(generate(model, [5, 2], 30, **options))


def test_the_cache_serves_the_next_text():
    """It holds what was guessed in vain neither while ids are taken nor afterwards."""
    model, cache = tiny_model(LLAMA), KVCache(LLAMA)
    options = {"sampling": SamplingSettings(0), "cache": cache}
    ids = []
    for new in generate_speculative(model, PROMPT, 9, Always(3), **options):
        ids.append(new)
        if len(ids) == 5:
            break
    longer = [*PROMPT, *ids, 8]
    found = list(generate_speculative(model, longer, 5, PromptLookup(), **options))
    assert found == list(generate(model, longer, 5, 0))


def test_what_cannot_be_is_refused():
    model = tiny_model(LLAMA)
    other = DraftModel(model=tiny_model(CONFIGS["gpt2"]))
    sizes = LLAMA.vocab_size, other.model.config.vocab_size
    if sizes[0] == sizes[1]:
        other = DraftModel(model=tiny_model(TINY))
    with pytest.raises(SurgeryError, match=str(LLAMA.vocab_size)):
        generate_speculative(model, PROMPT, 3, other)
    with pytest.raises(SurgeryError, match="num_tokens"):
        PromptLookup(0)
    with pytest.raises(SurgeryError, match="empty"):
        generate_speculative(model, [], 3, PromptLookup())


def test_a_logit_that_is_no_number_is_traced_to_its_module():
    model = tiny_model(LLAMA)
    with pytest.raises(NotFiniteError, match="down_proj"):
        for _ in generate_speculative(model, PROMPT, 9, Always(3), sampling=SamplingSettings(0)):
            with torch.no_grad():
                model.layers[1].mlp.down_proj.weight[0] = torch.nan
