import itertools
import warnings

import pytest
import torch
from helpers.models import CONFIGS, FAMILY_CONFIGS, random_ids, tiny_model, train_a_little
from helpers.sampling import sample

from nanogpt_surgery import SimpleGPT, SurgeryError, SurgeryWarning, generate, inject_lora

EVERY_CONFIG = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
LLAMA = FAMILY_CONFIGS["llama"]
SLIDES = pytest.mark.filterwarnings("ignore:the text has outgrown")


def prompt_for(model: SimpleGPT, length: int, seed: int = 0) -> list[int]:
    return random_ids(model.config, 1, length, seed)[0].tolist()


def one_by_one(model: SimpleGPT, prompt: list[int], count: int, choose) -> list[int]:
    """The judge: no cache, the whole window computed anew for each id."""
    ids = list(prompt)
    for _ in range(count):
        window = torch.tensor([ids[-model.config.block_size :]])
        with torch.no_grad():
            ids.append(choose(model(window)[0, -1]))
    return ids[len(prompt) :]


def greedy(model: SimpleGPT, prompt: list[int], count: int) -> list[int]:
    return one_by_one(model, prompt, count, lambda logits: int(logits.argmax()))


@EVERY_CONFIG
def test_temperature_zero_is_the_argmax_of_every_step(config):
    model, seen = tiny_model(config), set()
    for length in (1, 2, 6, 9):
        prompt = prompt_for(model, length, seed=length)
        expected = greedy(model, prompt, 20 - length)
        assert list(generate(model, prompt, 20 - length, temperature=0)) == expected
        seen |= set(expected)
    assert len(seen) > 2, "a loop of one id would show nothing"


@EVERY_CONFIG
def test_a_draw_is_the_draw_from_the_whole_window(config):
    model, draw = tiny_model(config), torch.Generator().manual_seed(11)
    prompt = prompt_for(model, 3)
    expected = one_by_one(model, prompt, 16, lambda logits: sample(logits, 1.5, 40, draw))
    assert len(set(expected)) > 5
    assert list(generate(model, prompt, 16, 1.5, 40, seed=11)) == expected


@EVERY_CONFIG
@pytest.mark.parametrize("length", [1, 19, 30])
def test_past_block_size_the_window_slides(config, length):
    model, draw = tiny_model(config), torch.Generator().manual_seed(11)
    prompt = prompt_for(model, length)
    with pytest.warns(SurgeryWarning, match="block_size of 19") as told:
        ids = list(generate(model, prompt, 25, 1.5, seed=11))
    assert len(told) == 1
    assert told[0].filename == __file__  # it points at who asked for the text
    assert ids == one_by_one(model, prompt, 25, lambda logits: sample(logits, 1.5, None, draw))


def test_up_to_block_size_nothing_slides():
    model = tiny_model(LLAMA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(generate(model, prompt_for(model, 6), 19 - 6 + 1, temperature=0))


def test_it_is_lazy():
    model = tiny_model(LLAMA)
    calls = []
    model.embed_tokens.register_forward_hook(lambda *_: calls.append(1))
    ids = generate(model, prompt_for(model, 4), 10)
    assert iter(ids) is ids
    assert not calls
    for count in (1, 2, 3):
        next(ids)
        assert len(calls) == count


def test_each_token_costs_a_pass_of_one_token():
    model = tiny_model(LLAMA)
    widths = []
    model.embed_tokens.register_forward_hook(lambda _m, args, _o: widths.append(args[0].size(1)))
    list(generate(model, prompt_for(model, 4), 6))
    assert widths == [4, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("more", [0, 1, 1000])
def test_top_k_above_the_vocabulary_is_the_vocabulary(more):
    model = tiny_model(LLAMA)
    prompt = prompt_for(model, 4)
    whole = list(generate(model, prompt, 12, seed=3))
    assert list(generate(model, prompt, 12, top_k=53 + more, seed=3)) == whole


def test_top_1_is_greedy():
    model = tiny_model(LLAMA)
    prompt = prompt_for(model, 4)
    assert list(generate(model, prompt, 12, 5.0, 1, seed=3)) == greedy(model, prompt, 12)


@SLIDES
def test_a_seed_fixes_the_text():
    model = tiny_model(LLAMA)
    prompt = prompt_for(model, 4)
    texts = [tuple(generate(model, prompt, 30, seed=seed)) for seed in (0, 1, 2, 0, 1, 2)]
    assert texts[:3] == texts[3:]
    assert len(set(texts)) == 3
    assert all(0 <= i < 53 for i in itertools.chain(*texts))


def test_without_a_seed_each_text_is_its_own():
    model = tiny_model(LLAMA)
    prompt = prompt_for(model, 4)
    torch.manual_seed(0)
    first = list(generate(model, prompt, 14, temperature=2.0))
    torch.manual_seed(0)
    assert list(generate(model, prompt, 14, temperature=2.0)) != first


def test_two_generations_side_by_side_do_not_disturb_each_other():
    model = tiny_model(LLAMA)
    first, second = prompt_for(model, 4), prompt_for(model, 7, seed=1)
    apart = [list(generate(model, first, 8, seed=1)), list(generate(model, second, 8, seed=2))]
    pairs = zip(generate(model, first, 8, seed=1), generate(model, second, 8, seed=2), strict=True)
    assert [list(ids) for ids in zip(*pairs, strict=True)] == apart


def test_the_users_generator_and_gradients_are_left_alone():
    model = tiny_model(LLAMA)
    state = torch.get_rng_state()
    list(generate(model, prompt_for(model, 4), 5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()
    within = []
    model.norm.register_forward_hook(lambda *_: within.append(torch.is_grad_enabled()))
    list(generate(model, [1, 2], 2))
    assert within == [False, False]
    model(random_ids(LLAMA, 1, 4)).mean().backward()  # the weights are no inference tensors


def test_it_stops_at_a_stop_id_and_keeps_it_to_itself():
    model = tiny_model(LLAMA)
    prompt = prompt_for(model, 4)
    text = greedy(model, prompt, 12)
    stop = text[5]
    expected = text[: text.index(stop)]
    assert list(generate(model, prompt, 12, 0, stop_ids={stop})) == expected
    assert list(generate(model, prompt, 12, 0, stop_ids=[stop, text[0]])) == []
    unused = next(i for i in range(53) if i not in text)
    assert list(generate(model, prompt, 12, 0, stop_ids=(unused,))) == text


def test_a_prompt_may_be_a_sequence_or_a_tensor():
    model = tiny_model(LLAMA)
    ids = prompt_for(model, 4)
    expected = greedy(model, ids, 5)
    for prompt in (
        ids,
        tuple(ids),
        torch.tensor(ids),
        torch.tensor([ids]),
        torch.tensor(ids).int(),
    ):
        assert list(generate(model, prompt, 5, temperature=0)) == expected


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "prompt is empty"),
        (torch.empty(1, 0), "prompt is empty"),
        ([3, 53], "ids from 3 to 53; the model's vocabulary is 0 to 52"),
        ([-1, 3], "ids from -1 to 3"),
        (torch.tensor([[1, 2], [3, 4]]), r"shape \(2, 2\); it must be one row"),
        (torch.tensor(3), r"shape \(\); it must be one row"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(prompt, match):
    with pytest.raises(SurgeryError, match=match):
        generate(tiny_model(LLAMA), prompt, 5)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": -3}, "top_k is -3"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ],
)
def test_a_setting_outside_its_range_is_refused_at_once(settings, match):
    with pytest.raises(SurgeryError, match=match):
        generate(tiny_model(LLAMA), [1], **{"max_new_tokens": 5, **settings})
    assert list(generate(tiny_model(LLAMA), [1], max_new_tokens=0)) == []


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_left_as_it_was(training):
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.5).train(training)
    ids = generate(model, [1, 2, 3], 6, temperature=0)
    for _ in range(3):
        next(ids)
        assert all(module.training == training for module in model.modules())


def test_a_part_in_a_mode_of_its_own_stays_in_it():
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.5).train()
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    assert True in modes and False in modes
    next(generate(model, [1, 2, 3], 1, temperature=0))
    assert [module.training for module in model.modules()] == modes


def test_it_computes_in_eval_mode():
    model = SimpleGPT(53, 24, 3, 2, 19, dropout=0.5).train()
    expected = list(generate(model.eval(), [1, 2, 3], 12, temperature=0))
    assert list(generate(model.train(), [1, 2, 3], 12, temperature=0)) == expected


def test_the_mode_comes_back_after_an_error():
    model = tiny_model(LLAMA).train()

    def fail(*_: object) -> None:
        raise RuntimeError("from a hook")

    model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="from a hook"):
        next(generate(model, [1, 2], 3))
    assert all(module.training for module in model.modules())


def test_an_update_takes_part():
    model = tiny_model(LLAMA)
    inject_lora(model, "all-linear")
    prompt = prompt_for(model, 5)
    before = list(generate(model, prompt, 12, temperature=0))
    train_a_little(model, size=1.0)
    expected = greedy(model, prompt, 12)
    assert expected != before
    assert list(generate(model, prompt, 12, temperature=0)) == expected
