"""An engine gives each request the text that it would have alone."""

import asyncio
import math
import random
import threading
from itertools import product

import pytest
import torch
from generation.test_native_rows import needs_decoder, two_adapters
from helpers.models import CONFIGS, tiny_model

from nanogpt_surgery import (
    SamplingSettings,
    SurgeryError,
    blend_lora,
    disable_lora,
    generate,
    merge_lora,
    undo_lora,
)
from nanogpt_surgery.errors import NotFiniteError
from nanogpt_surgery.serving import engine as engine_of_serving
from nanogpt_surgery.serving import rows as rows_of_serving
from nanogpt_surgery.serving.engine import Engine, EngineClosed, QueueFull, Request

LLAMA = CONFIGS["llama"]
SETTINGS = SamplingSettings(0.9, 20, 0.95, repetition_penalty=1.3, frequency_penalty=0.1)
GREEDY = SamplingSettings(0)
PROMPTS = [(3,), (5, 1, 4, 1, 5, 9, 2), (6, 5, 3, 5)]
BLENDS = [{}, {"one": 1}, {"other": 1.0}, {"one": 0.7, "other": -0.4}]
ENGINES = [pytest.param("native", marks=needs_decoder), pytest.param("plain")]


@pytest.fixture
def engine():
    engines = []

    def made(model, **options):
        engines.append(Engine(model, **options))
        return engines[-1]

    yield made
    for one in engines:
        one.close(0)


def adapted(name="llama"):
    model = tiny_model(CONFIGS[name])
    two_adapters(model)
    return model


def ids(answer):
    return [token.id for token in answer.result(60)]


def all_of(answer):
    """The tokens with their log-probabilities: equal to the bit where the logits are."""
    return answer.result(60)


class Held:
    """An `until` that holds the engine's thread at a text's first token, until it is let go."""

    def __init__(self):
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self, token):
        self.reached.set()
        assert self.go.wait(60)
        return False


def held(serving, **options):
    """An engine's text that holds it, and what lets it go."""
    until = Held()
    answer = serving.submit(Request(PROMPTS[0], 2, GREEDY, until=until, **options))
    assert until.reached.wait(60)
    return answer, until.go


def test_texts_are_those_of_generate(engine):
    model = tiny_model(LLAMA)
    serving = engine(model)
    answers = [serving.submit(Request(p, 9, SETTINGS, seed=4)) for p in PROMPTS]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert ids(answer) == list(generate(model, prompt, 9, sampling=SETTINGS, seed=4))
        assert answer.reason == "length"


def test_tokens_reach_an_event_loop(engine):
    model = tiny_model(LLAMA)
    answer = engine(model).submit(Request(PROMPTS[1], 9, SamplingSettings(0)))

    async def taken():
        return [token.id async for token in answer]

    assert asyncio.run(taken()) == list(generate(model, PROMPTS[1], 9, 0))


@pytest.mark.parametrize("max_new_tokens", [0, 1, 5])
@pytest.mark.parametrize("computed_by", ["auto", "plain"])
def test_log_probabilities_of_a_prompt_are_those_of_a_pass(engine, computed_by, max_new_tokens):
    model = tiny_model(LLAMA)
    asked = Request(
        *(PROMPTS[1], max_new_tokens, SamplingSettings(0)),
        likeliest=2,
        prompt_log_probabilities=True,
    )
    answer = engine(model, engine=computed_by).submit(asked)
    assert len(ids(answer)) == max_new_tokens
    with torch.no_grad():
        wanted = model(torch.tensor([PROMPTS[1]]))[0].log_softmax(-1)
    assert [token.id for token in answer.prompt_tokens] == list(PROMPTS[1][1:])
    for token, row in zip(answer.prompt_tokens, wanted, strict=False):
        assert token.log_probability == pytest.approx(float(row[token.id]), abs=1e-4)
        assert list(token.likeliest) == row.topk(2).indices.tolist()


def test_what_outgrows_the_model_is_refused_with_both_numbers(engine):
    with pytest.raises(SurgeryError, match=r"7 .* 14.* 19"):
        engine(tiny_model(LLAMA)).submit(Request(PROMPTS[1], 14))


@pytest.mark.parametrize("computed_by", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "prev-tokens-relu2"])
def test_a_text_among_others_is_to_the_bit_what_it_is_alone(engine, name, computed_by):
    model = adapted(name)
    asked = [
        Request(prompt, 9, SETTINGS, seed=n, adapters=blend, likeliest=2)
        for n, (prompt, blend) in enumerate(product(PROMPTS, BLENDS))
    ]
    serving = engine(model, engine=computed_by, rows=5)
    together = list(map(all_of, [serving.submit(request) for request in asked]))
    for request, found in zip(asked, together, strict=True):
        alone = engine(model, engine=computed_by)
        assert all_of(alone.submit(request)) == found
        alone.close()
    assert len({tuple(t.id for t in text) for text in together}) > 6


@needs_decoder
@pytest.mark.parametrize("blend", BLENDS)
def test_adapters_by_weight_are_those_of_the_model_blended(engine, blend):
    model = adapted()
    serving = engine(model)
    answer = serving.submit(Request(PROMPTS[1], 9, SETTINGS, seed=4, adapters=blend))
    served = ids(answer)
    if blend:
        serving.operate(lambda m: blend_lora(m, {n: float(w) for n, w in blend.items()})).result(60)
    else:
        serving.operate(disable_lora).result(60)
    assert served == list(generate(model, PROMPTS[1], 9, sampling=SETTINGS, seed=4))


@needs_decoder
def test_the_order_of_adapters_and_those_of_weight_0_make_no_difference(engine):
    serving = engine(adapted())
    blends = (
        {"one": 0.5, "other": 2},
        {"other": 2.0, "one": 0.5},
        {"one": 1},
        {"one": 1, "other": 0},
    )
    found = [all_of(serving.submit(Request(PROMPTS[2], 6, GREEDY, adapters=b))) for b in blends]
    assert found[0] == found[1] and found[2] == found[3] and found[0] != found[2]
    assert serving.figures()["prompt_tokens_reused_total"] == 6


def fresh(engine, model, request, computed_by):
    """A text from an engine that has computed no other."""
    return all_of(engine(model, engine=computed_by).submit(request))


@pytest.mark.parametrize("computed_by", ENGINES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_beginning_of_another_text_gives_the_same_logits_to_the_bit(
    engine, name, computed_by, monkeypatch
):
    monkeypatch.setattr(rows_of_serving, "PIECE", 4)
    model = adapted(name)
    serving = engine(model, engine=computed_by)
    prompt = (7, 1, 8, 2, 8, 1, 8, 2, 8, 4)
    told = [prompt, (*prompt[:9], 5, 9), (*prompt, 5), (*prompt[:5], 3), prompt]
    for text in told:
        request = Request(text, 5, GREEDY, adapters={"one": 0.5}, likeliest=3)
        assert all_of(serving.submit(request)) == fresh(engine, model, request, computed_by)
    reused = serving.figures()["prompt_tokens_reused_total"]
    assert reused == (9 + 10 + 5 + 9 if computed_by == "native" else 8 + 8 + 4 + 8)


@needs_decoder
def test_the_answer_of_a_text_is_part_of_a_beginning(engine):
    model = tiny_model(LLAMA)
    serving = engine(model)
    first = ids(serving.submit(Request(PROMPTS[1], 5, GREEDY)))
    longer = Request((*PROMPTS[1], *first, 2), 3, GREEDY, likeliest=2)
    assert all_of(serving.submit(longer)) == fresh(engine, model, longer, "native")
    assert serving.figures()["prompt_tokens_reused_total"] == 7 + 4


@needs_decoder
def test_texts_that_begin_alike_at_once_compute_the_beginning_once(engine, monkeypatch):
    monkeypatch.setattr(rows_of_serving, "MOST_TOKENS", 8)
    monkeypatch.setattr("nanogpt_surgery.serving.engine.WORTH_WAITING", 2)
    serving = engine(tiny_model(LLAMA))
    _, go = held(serving)
    prompt = tuple(range(15))
    samples = [serving.submit(Request(prompt, 3, SETTINGS, seed=n)) for n in range(3)]
    go.set()
    found = list(map(all_of, samples))
    assert serving.figures()["prompt_tokens_reused_total"] == 2 * 14
    for n, tokens in enumerate(found):
        alone = fresh(engine, tiny_model(LLAMA), Request(prompt, 3, SETTINGS, seed=n), "native")
        assert tokens == alone


@needs_decoder
def test_a_long_prompt_does_not_keep_others_from_their_tokens(engine, monkeypatch):
    monkeypatch.setattr(rows_of_serving, "STEP", 2)
    model, came = tiny_model(LLAMA), []

    def comes(name):
        return lambda token: came.append(name)

    serving = engine(model)
    _, go = held(serving)
    short = serving.submit(Request(PROMPTS[0], 6, GREEDY, until=comes("short")))
    long = Request(tuple(range(12)), 2, GREEDY, until=comes("long"), likeliest=2)
    answer = serving.submit(long)
    go.set()
    assert all_of(answer) == fresh(engine, model, long, "native")
    short.result(60)
    assert came.index("long") >= 4


@pytest.mark.parametrize("computed_by", ENGINES)
def test_nothing_is_stale_after_an_operation(engine, computed_by):
    model = adapted()
    serving = engine(model, engine=computed_by)
    request = Request(PROMPTS[1], 5, GREEDY, likeliest=2)
    with_one = Request(PROMPTS[1], 5, GREEDY, adapters={"one": 1.0}, likeliest=2)
    before = all_of(serving.submit(request)), all_of(serving.submit(with_one))

    def grow(m):
        with torch.no_grad():
            m.layers[1].mlp.down_proj.original_layer.weight.mul_(1.5)
            m.layers[0].self_attn.q_proj.updates["one"].scaling *= 3

    for change, asked in (
        *((grow, [request, with_one]), (merge_lora, [request]), (undo_lora, [request, with_one])),
    ):
        serving.operate(change).result(60)
        for one in asked:
            found = all_of(serving.submit(one))
            assert found == fresh(engine, model, one, computed_by)
            assert found not in before


def test_an_operation_waits_for_texts_that_run_and_others_for_it(engine):
    serving, order = engine(tiny_model(LLAMA)), []
    first, go = held(serving)
    done = serving.operate(lambda m: order.append((first.reason, len(later.tokens))) or m.config)
    later = serving.submit(Request(PROMPTS[1], 2, GREEDY))
    assert not done.done()
    go.set()
    assert done.result(60) == LLAMA
    assert len(later.result(60)) == 2
    assert order == [("length", 0)]


@pytest.mark.parametrize("computed_by", ENGINES)
def test_the_model_is_read_between_two_tokens(engine, computed_by):
    model = adapted()
    wanted = model(torch.tensor([[3]]))
    serving, until = engine(model, engine=computed_by), Held()
    request = Request(PROMPTS[1], 5, GREEDY, adapters={"one": 1.0}, until=until)
    answer = serving.submit(request)
    assert until.reached.wait(60)
    read = serving.look(lambda m: (m(torch.tensor([[3]])), len(answer.tokens)))
    until.go.set()
    logits, tokens = read.result(60)
    assert torch.equal(logits, wanted) and tokens == 1
    with pytest.raises(ZeroDivisionError):
        serving.look(lambda m: 1 / 0).result(60)
    assert all_of(answer) == fresh(engine, model, request, computed_by)


def test_an_operation_that_fails_says_so_and_the_engine_goes_on(engine):
    serving = engine(tiny_model(LLAMA))
    with pytest.raises(ZeroDivisionError):
        serving.operate(lambda m: 1 / 0).result(60)
    assert len(ids(serving.submit(Request(PROMPTS[0], 3)))) == 3


@needs_decoder
def test_what_the_decoder_cannot_compute_after_an_operation_the_model_does(engine):
    model = tiny_model(LLAMA)
    serving = engine(model)
    assert serving.figures()["native_engine"] == 1

    def hook(m):
        m.layers[1].register_forward_hook(lambda module, inputs, output: output.flip(-1))

    serving.operate(hook).result(60)
    assert serving.figures()["native_engine"] == 0
    found = ids(serving.submit(Request(PROMPTS[1], 5, GREEDY)))
    assert found == list(generate(model, PROMPTS[1], 5, 0))


def test_a_full_queue_refuses_and_says_when_to_come_again(engine):
    serving = engine(tiny_model(LLAMA), rows=1, waiting=2)
    first, go = held(serving)
    others = [serving.submit(Request(PROMPTS[0], 2)) for _ in range(2)]
    with pytest.raises(QueueFull, match="2") as refused:
        serving.submit(Request(PROMPTS[0], 2))
    assert refused.value.retry_after == 1.0
    others[0].cancel()
    others.append(serving.submit(Request(PROMPTS[0], 2)))
    go.set()
    assert [len(ids(answer)) for answer in (first, *others)] == [2, 0, 2, 2]
    assert others[0].reason == "cancelled"
    assert 0 < serving._figures.retry_after(1) < 60


def test_a_client_that_leaves_frees_its_row_within_a_token(engine):
    serving = engine(tiny_model(LLAMA), rows=1)
    _, go = held(serving)
    answer = serving.submit(
        Request(PROMPTS[0], 15, until=lambda t: len(answer.tokens) == 2 and answer.cancel())
    )
    later = serving.submit(Request(PROMPTS[0], 2))
    go.set()
    assert len(ids(later)) == 2
    assert answer.reason == "cancelled" and len(answer.tokens) == 3


def test_a_text_ends_when_its_time_is_over_begun_or_not(engine):
    serving = engine(tiny_model(LLAMA), rows=1)
    first, go = held(serving)
    waits = serving.submit(Request(PROMPTS[0], 2))
    for answer in (first, waits):
        answer.submitted -= 601
    go.set()
    assert len(ids(first)) == 1 and first.reason == "time"
    assert ids(waits) == [] and waits.reason == "time"


def test_stop_ids_and_until_end_a_text(engine):
    model = tiny_model(LLAMA)
    serving = engine(model)
    free = list(generate(model, PROMPTS[1], 9, 0))
    stop = frozenset([free[4]])
    stopped = serving.submit(Request(PROMPTS[1], 9, GREEDY, stop_ids=stop))
    assert ids(stopped) == free[: free.index(free[4])] and stopped.reason == "stop"
    until = serving.submit(Request(PROMPTS[1], 9, GREEDY, until=lambda t: t.id == free[2]))
    assert ids(until) == free[: free.index(free[2]) + 1] and until.reason == "stop"


@pytest.mark.parametrize("computed_by", ENGINES)
def test_a_poisoned_row_ends_alone(engine, computed_by):
    model = adapted()
    with torch.no_grad():
        model.layers[1].self_attn.v_proj.updates["other"].lora_B.fill_(torch.nan)
    serving = engine(model, engine=computed_by)
    _, go = held(serving)
    asked = [Request(PROMPTS[1], 6, SETTINGS, seed=1, adapters=b) for b in BLENDS]

    def fails(token):
        raise ZeroDivisionError("in until")

    answers = [serving.submit(request) for request in asked]
    raising = serving.submit(Request(PROMPTS[1], 6, until=fails))
    go.set()
    for answer in answers[2:]:
        with pytest.raises(NotFiniteError, match="other"):
            answer.result(60)
        assert answer.reason == "failed" and answer.tokens == []
    with pytest.raises(SurgeryError, match="in until"):
        raising.result(60)
    for found, request in zip(list(map(all_of, answers[:2])), asked, strict=False):
        assert found == fresh(engine, model, request, computed_by)
    assert serving.figures()['requests_total{outcome="failed"}'] == 3


def test_a_text_that_cannot_be_kept_loses_no_answer(engine, monkeypatch):
    serving = engine(tiny_model(LLAMA))

    def no_memory(*arguments):
        raise MemoryError

    monkeypatch.setattr(serving._ended_texts, "add", no_memory)
    for _ in range(2):
        answer = serving.submit(Request(PROMPTS[0], 2))
        assert len(ids(answer)) == 2 and answer.reason == "length"


def test_a_step_that_fails_ends_the_rows_and_the_engine_goes_on(engine, monkeypatch):
    serving = engine(tiny_model(LLAMA))
    first, go = held(serving)
    with monkeypatch.context() as patch:
        patch.setattr(serving._rows, "compute", lambda rows: 1 / 0)
        go.set()
        with pytest.raises(SurgeryError, match="ZeroDivisionError"):
            first.result(60)
    assert len(ids(serving.submit(Request(PROMPTS[0], 2)))) == 2


def test_closing_lets_texts_end_within_the_grace_and_takes_no_more(engine):
    serving = engine(tiny_model(LLAMA), rows=1)
    answers = [serving.submit(Request(PROMPTS[0], 9)) for _ in range(3)]
    serving.close(60)
    assert [answer.reason for answer in answers] == ["length"] * 3
    for refused in (lambda: serving.submit(Request(PROMPTS[0], 2)), lambda: serving.operate(id)):
        with pytest.raises(EngineClosed):
            refused()


def test_after_the_grace_all_that_is_left_ends(engine):
    serving = engine(tiny_model(LLAMA), rows=1)
    first, go = held(serving)
    waits, never = serving.submit(Request(PROMPTS[0], 9)), serving.operate(lambda m: None)
    closing = threading.Thread(target=serving.close, args=(0,))
    closing.start()
    while not serving._at_once:
        closing.join(0.001)
    go.set()
    closing.join(60)
    assert not closing.is_alive()
    assert (first.reason, waits.reason) == ("cancelled", "cancelled")
    with pytest.raises(EngineClosed):
        never.result(60)


def test_memory_of_caches_is_bounded_and_known_before(engine):
    model = tiny_model(LLAMA)
    a_token = 2 * 2 * 2 * 10 * 4  # keys and values, layers, KV heads, head width, bytes
    serving = engine(model, cache_bytes=20 * a_token)
    with pytest.raises(SurgeryError, match="GiB"):
        engine(model, cache_bytes=9 * a_token).submit(Request(PROMPTS[1], 4))
    _, go = held(serving)
    asked = [Request((n, *PROMPTS[1]), 5, GREEDY) for n in range(4)]  # 12 tokens each
    seen = []
    answers = [
        serving.submit(Request(*map(vars(r).get, ("prompt", "max_new_tokens", "sampling")),
                               until=lambda t: seen.append(serving.figures()) or False))
        for r in asked
    ]  # fmt: skip
    go.set()
    for request, answer in zip(asked, answers, strict=True):
        assert ids(answer) == list(generate(model, request.prompt, 5, 0))
    assert {figures["requests_running"] for figures in seen} == {1}
    assert max(figures["cache_bytes"] for figures in seen) <= 20 * a_token
    assert serving.figures()["cache_bytes"] == 12 * a_token


def test_wrong_requests_are_refused_by_name(engine):
    serving = engine(adapted())
    wrong = {
        "two": Request(PROMPTS[0], 2, adapters={"two": 1.0}),
        "nan": Request(PROMPTS[0], 2, adapters={"one": math.nan}),
        "53": Request((53,), 2),
        "empty": Request((), 2),
        "max_new_tokens": Request(PROMPTS[0], -1),
        "likeliest": Request(PROMPTS[0], 2, likeliest=-1),
        "seconds": Request(PROMPTS[0], 2, seconds=0),
        "logit_bias": Request(PROMPTS[0], 2, SamplingSettings(logit_bias={99: 1.0})),
    }
    for part, request in wrong.items():
        with pytest.raises(SurgeryError, match=part):
            serving.submit(request)
    serving.operate(disable_lora).result(60)
    with pytest.raises(SurgeryError, match="disabled"):
        serving.submit(Request(PROMPTS[0], 2, adapters={"one": 1.0}))
    assert serving.figures()['requests_total{outcome="refused"}'] == len(wrong) + 1
    for option in ("rows", "waiting", "cache_bytes"):
        with pytest.raises(SurgeryError, match=option):
            Engine(serving.model, **{option: 0})


def test_figures_count_requests_tokens_and_seconds(engine):
    serving = engine(tiny_model(LLAMA))
    for n in range(3):
        serving.submit(Request(PROMPTS[1], 2 + n)).result(60)
    serving.close()
    found = serving.figures()
    assert found['requests_total{outcome="length"}'] == 3
    assert found["generated_tokens_total"] == 9 and found["prompt_tokens_total"] == 21
    assert found["first_token_seconds_count"] == 3
    assert found['first_token_seconds_bucket{le="+Inf"}'] == 3
    buckets = [n for name, n in found.items() if "_bucket" in name]
    assert buckets == sorted(buckets)


def test_many_loops_and_threads_take_the_same_answer(engine):
    serving = engine(tiny_model(LLAMA))
    _, go = held(serving)
    answer = serving.submit(Request(PROMPTS[1], 9, GREEDY))
    found = []

    async def taken():
        return [token.id async for token in answer]

    async def several():
        found.extend(await asyncio.gather(taken(), taken()))

    threads = [threading.Thread(target=asyncio.run, args=(several(),)) for _ in range(2)]
    threads += [threading.Thread(target=lambda: found.append(ids(answer)))]
    for thread in threads:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(60)
    assert found == [ids(answer)] * 5


def some_requests(draw):
    """Twelve requests with any prompts and adapters."""
    prompts = [tuple(draw.choices(range(53), k=draw.randint(1, 9))) for _ in range(12)]
    seeds = {"seed": draw.randint(0, 99)}
    return [
        Request(prompt, draw.randint(1, 8), SETTINGS, adapters=draw.choice(BLENDS), **seeds)
        for prompt in prompts
    ]


class Turned:
    """An operation: some weights become their negatives, and with the next call themselves."""

    def __init__(self, model):
        self.weight = model.layers[1].mlp.down_proj.original_layer.weight
        self.first = self.weight.detach().clone()

    def __call__(self, model):
        with torch.no_grad():
            first = torch.equal(self.weight, self.first)
            self.weight.copy_(-self.first if first else self.first)


def use_at_random(serving, asked, turn, draw, answers):
    """Submits, leaves, operates; the answers are added with the numbers of their requests."""
    for _ in range(40):
        number = draw.randrange(len(asked))
        try:
            if draw.random() < 0.1:
                serving.operate(turn)
            answer = serving.submit(asked[number])
        except QueueFull:
            continue
        except EngineClosed:
            return
        answers.append((number, answer))
        for _ in answer:
            if draw.random() < 0.05:
                answer.cancel()
            if draw.random() < 0.02:
                break


@needs_decoder
@pytest.mark.parametrize("seed", range(3))
def test_under_stress_no_answer_is_lost_and_each_is_right(engine, seed):
    """Each text is, to the bit, that of one of the two models that the operations make."""
    model, draw = adapted(), random.Random(seed)
    asked, turn, right = some_requests(draw), Turned(model), []
    for _ in range(2):
        turn(model)
        alone = engine(model, rows=1)
        right.append([all_of(alone.submit(request)) for request in asked])
        alone.close()
    room = 60 * 2 * 2 * 2 * 10 * 4
    serving, answers = engine(model, rows=4, waiting=6, cache_bytes=room), []
    clients = [
        threading.Thread(
            target=use_at_random, args=(serving, asked, turn, random.Random(n), answers)
        )
        for n in range(100 * seed, 100 * seed + 6)
    ]
    for client in clients:
        client.start()
    while seed and len(answers) < 60 and clients[0].is_alive():
        clients[0].join(0.001)
    if seed:
        serving.close(60 * (seed - 1))
    for client in clients:
        client.join(60)
    serving.close(60)
    assert not any(client.is_alive() for client in clients)
    for number, answer in answers:
        ends = [text[number][: len(answer.tokens)] for text in right]
        whole = answer.reason in ("stop", "length")
        assert answer.tokens in ([text[number] for text in right] if whole else ends)
        assert whole or answer.reason == "cancelled"
    counts = serving.figures()
    ended = (n for k, n in counts.items() if k.startswith("requests_total") and "full" not in k)
    assert sum(ended) == len(answers) and counts["cache_bytes"] <= room


@needs_decoder
def test_texts_are_right_where_no_decoder_can_be_made_after_an_operation(engine, monkeypatch):
    model = adapted()
    blend_lora(model, {"other": 1.0})
    one = engine(model)
    request = Request(PROMPTS[1], 8, GREEDY)
    before = all_of(one.submit(request))

    def fails(*_arguments, **_named):
        raise MemoryError

    monkeypatch.setattr(rows_of_serving, "NativeDecoder", fails)
    one.operate(merge_lora).result(60)
    assert all_of(one.submit(request)) == fresh(engine, model, request, "plain") != before


def test_an_engine_that_cannot_follow_an_operation_ends_and_answers_all(engine, monkeypatch):
    """What was made of the old weights would answer otherwise."""
    one = engine(adapted())
    running, go = held(one)
    change = one.operate(lambda _: None)
    waiting = one.submit(Request(PROMPTS[1], 8, GREEDY))
    monkeypatch.setattr(engine_of_serving, "WeightHashes", Missing)
    go.set()
    assert len(running.result(60)) == 2 and running.reason == "length"
    with pytest.raises(ZeroDivisionError):
        change.result(60)
    waiting.result(60)
    assert waiting.reason == "cancelled"
    one.close()
    assert one.closed and isinstance(one.error, ZeroDivisionError)
    with pytest.raises(EngineClosed):
        one.submit(Request(PROMPTS[1], 8, GREEDY))


class Missing:
    """What fails when it is made."""

    def __init__(self, *_):
        raise ZeroDivisionError


def test_what_is_told_after_a_change_may_fail_and_the_engine_goes_on(engine):
    def fails():
        raise OSError("nobody listens")

    serving = engine(tiny_model(LLAMA))
    with pytest.raises(OSError, match="nobody"):
        serving.operate(lambda _: 1, fails).result(60)
    assert serving.operate(lambda _: 2).result(60) == 2 and not serving.closed
