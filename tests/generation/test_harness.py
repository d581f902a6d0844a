"""Through lm-evaluation-harness itself, on tasks of our own."""

import lm_eval
import pytest
import torch
from helpers.commands import LETTERS
from helpers.models import tiny_model
from helpers.tokenizers import byte_level
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    SurgeryError,
    SurgeryWarning,
    generate,
)
from nanogpt_surgery.data.conversations.chat import chat_ids
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.conversation import Conversation
from nanogpt_surgery.generation.harness import HarnessModel
from nanogpt_surgery.generation.settings import SamplingSettings

SIZES = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 2, "block_size": 30}
MODEL = tiny_model(GPTConfig.for_family("llama", vocab_size=300, **SIZES))
TOKENIZER = PretrainedTokenizer(byte_level(), bos_id=0, stop_ids=[2], add_bos=True)
HARNESS = HarnessModel(MODEL, TOKENIZER, batch_size=2)
QUESTIONS = [
    {"q": "The quick", "choices": ["brown fox", "lazy"], "answer": 0},
    {"q": "over", "choices": ["dogs", "12", "the"], "answer": 2},
]


def plain(ids):
    with torch.no_grad():
        return MODEL(torch.tensor([ids[:-1]]))[0].log_softmax(-1)


def asked(method, *arguments):
    kind = "generate_until" if method == "generate_until" else "loglikelihood"
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]
    return getattr(HARNESS, method)(requests)


def test_log_likelihoods_are_those_of_a_plain_pass():
    pairs = [("The quick", " brown fox"), ("The ", "quick"), ("", "lazy dogs"), ("x", "y")]
    for (context, text), (found, greedy) in zip(pairs, asked("loglikelihood", *pairs), strict=True):
        whole = [0, *TOKENIZER.encode(context + text)]
        start = len([0, *TOKENIZER.encode(context.rstrip())])
        scores = plain(whole)
        expected = sum(float(scores[i - 1, whole[i]]) for i in range(start, len(whole)))
        assert found == pytest.approx(expected, rel=1e-5)
        assert greedy == all(scores[i - 1].argmax() == whole[i] for i in range(start, len(whole)))


def test_what_greedy_decoding_writes_is_called_greedy():
    ids = list(generate(MODEL, [0, *TOKENIZER.encode("The")], 3, 0))
    written = TOKENIZER.decode(ids)
    if TOKENIZER.encode("The" + written) == TOKENIZER.encode("The") + ids:
        assert asked("loglikelihood", ("The", written))[0][1]


@pytest.mark.parametrize("length", [5, 29, 30, 31, 60, 75])
def test_a_rolling_text_is_predicted_once_with_the_windows_of_the_harness(length):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    text = TOKENIZER.decode((TOKENIZER.encode("The quick brown fox, naïve — jumps! ") * 9)[:length])
    ids = TOKENIZER.encode(text)
    windows = get_rolling_token_windows(ids, 0, max_seq_len=30, context_len=1)
    total = 0.0
    for before, new in map(make_disjoint_window, windows):
        whole = before + new
        scores = plain(whole)
        total += sum(float(scores[i - 1, whole[i]]) for i in range(len(before), len(whole)))
    assert asked("loglikelihood_rolling", (text,)) == [pytest.approx(total, rel=1e-5)]


def test_answers_are_greedy_and_end_at_a_stop_string():
    ids = [0, *TOKENIZER.encode("The quick")]
    free = TOKENIZER.decode(list(generate(MODEL, ids, 9, 0, stop_ids=[2])))
    assert asked("generate_until", ("The quick", {"max_gen_toks": 9})) == [free]
    until = {"until": [free[3:5]], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}
    assert asked("generate_until", ("The quick", until)) == [free.partition(free[3:5])[0]]
    with pytest.raises(SurgeryError, match="num_beams"):
        asked("generate_until", ("a", {"num_beams": 4}))
    with pytest.raises(SurgeryError, match="answers of 30 tokens"):
        asked("generate_until", ("a", {"max_gen_toks": 30}))


def test_what_is_too_long_loses_its_beginning_and_says_so():
    context = "The quick brown fox jumps over 12345 lazy dogs. " * 3
    with pytest.warns(SurgeryWarning, match="loses its beginning: 31 fit"):
        [(found, _)] = asked("loglikelihood", (context.rstrip(), " The"))
    whole = TOKENIZER.encode(context + "The")[-31:]
    new = len(TOKENIZER.encode(context + "The")) - len(TOKENIZER.encode(context.rstrip()))
    scores = plain(whole)
    expected = sum(float(scores[i - 1, whole[i]]) for i in range(31 - new, 31))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_of_characters_has_no_beginning():
    letters = CharacterTokenizer(LETTERS)
    harness = HarnessModel(tiny_model(GPTConfig(96, 12, 2, 1, 30)), letters)
    [(found, _)] = harness.loglikelihood([Instance("loglikelihood", {}, ("", "abc"), 0)])
    with torch.no_grad():
        scores = harness.model(torch.tensor([letters.encode("ab")]))[0].log_softmax(-1)
    expected = sum(float(scores[i, j]) for i, j in enumerate(letters.encode("bc")))
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_harness_runs_a_task_with_it():
    import datasets

    task = {
        "task": "ours",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(QUESTIONS)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    none_of_the_harness = TaskManager(include_defaults=False)  # reading them takes a minute
    found = lm_eval.simple_evaluate(
        HARNESS,
        tasks=[task],
        bootstrap_iters=0,
        verbosity="ERROR",
        task_manager=none_of_the_harness,
    )
    right = 0
    for question in QUESTIONS:
        pairs = [(question["q"], f" {choice}") for choice in question["choices"]]
        scores = [score for score, _ in asked("loglikelihood", *pairs)]
        right += scores.index(max(scores)) == question["answer"]
    assert found["results"]["ours"]["acc,none"] == right / 2


def test_answers_are_cached_under_the_very_request():
    stored = []

    class Hook:
        def add_partial(self, *entry):
            stored.append(entry)

    harness = HarnessModel(MODEL, TOKENIZER)
    harness.set_cache_hook(Hook())
    request = ("The quick", {"until": ["x"], "max_gen_toks": 4})
    [answer] = harness.generate_until([Instance("generate_until", {}, request, 0)])
    assert stored == [("generate_until", request, answer)]


def test_two_tokenizers_of_one_kind_have_two_names():
    names = {HarnessModel(MODEL, CharacterTokenizer(text)).tokenizer_name for text in ("ab", "abc")}
    assert len(names) == 2
    with pytest.raises(SurgeryError, match="batch_size is 0"):
        HarnessModel(MODEL, TOKENIZER, batch_size=0)


WITHOUT_BOS = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
TEMPLATES = {
    "its own": WITHOUT_BOS + "{% if add_generation_prompt %}assistant:{% endif %}",
    "its own, with BOS": "{{ bos_token }}" + WITHOUT_BOS + "assistant:",
    "ours": None,
}


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
def test_a_conversation_is_read_and_answered_as_in_a_chat(source):
    model = tiny_model(GPTConfig.for_family("llama", vocab_size=300, **SIZES | {"block_size": 160}))
    tokenizer = PretrainedTokenizer(
        byte_level(), bos_id=0, stop_ids=[2], add_bos=True, chat_template=source
    )
    harness = HarnessModel(model, tokenizer)
    said = [{"role": "user", "content": "The quick brown fox?"}]
    context = harness.apply_chat_template(said)
    ids = chat_ids(tokenizer, said)
    assert ids.count(0) == (0 if source == TEMPLATES["its own"] else 1)
    [answer] = harness.generate_until(
        [Instance("generate_until", {}, (context, {"max_gen_toks": 12}), 0)]
    )
    talk = Conversation(model, tokenizer)
    greedy = SamplingSettings(temperature=0)
    assert answer == "".join(talk.ask("The quick brown fox?", 12, greedy))
    pairs = [(context, " jumps"), (context + "Well,", " it")]  # a task may add to the context
    for before, after in pairs:
        [(found, _)] = harness.loglikelihood([Instance("loglikelihood", {}, (before, after), 0)])
        kept = tokenizer.encode(before.rstrip())  # the harness counts spaces before an answer to it
        start = len(kept) + (ids[:1] == [0] != kept[:1])
        whole = torch.tensor([ids + tokenizer.encode(before[len(context) :] + after)])
        with torch.no_grad():
            scores = model(whole[:, :-1])[0].log_softmax(-1)
        expected = sum(float(scores[i - 1, whole[0, i]]) for i in range(start, whole.size(1)))
        assert found == pytest.approx(expected, rel=1e-5)


def test_an_answer_in_a_conversation_ends_where_its_template_ends_one():
    model = tiny_model(GPTConfig.for_family("llama", vocab_size=300, **SIZES | {"block_size": 160}))
    tokenizer = PretrainedTokenizer(byte_level(), stop_ids=[0])
    harness = HarnessModel(model, tokenizer)
    script = iter(tokenizer.encode(" fine.<|im_end|>\nmore") * 2)

    def scripted(hidden):
        chosen = torch.nn.functional.one_hot(torch.tensor(next(script)), 300) * 1e4
        return chosen.expand(*hidden.shape[:-1], 300)

    model.lm_head.forward = scripted
    context = harness.apply_chat_template([{"role": "user", "content": "ab"}])
    arguments = {"until": "never", "max_gen_toks": 40}
    request = Instance("generate_until", {}, (context, arguments), 0)
    assert harness.generate_until([request]) == [" fine."]
