"""lm-evaluation-harness's `local-completions` gives the numbers of our own `HarnessModel`."""

import datasets
import lm_eval
import pytest
from helpers.models import tiny_model, train_a_little
from helpers.servers import served
from helpers.tokenizers import byte_level
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

from nanogpt_surgery import GPTConfig, inject_lora, remove_lora
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.harness import HarnessModel

SIZES = {"n_embd": 24, "n_head": 6, "n_kv_head": 2, "n_layer": 2, "block_size": 60}
TOKENIZER = PretrainedTokenizer(byte_level(), stop_ids=[0])
QUESTIONS = [
    {"q": "The quick", "choices": ["brown fox", "lazy"], "answer": 0},
    {"q": "over", "choices": ["dogs", "12", "the"], "answer": 2},
    {"q": "naïve café", "choices": ["日本語", "😀", "It's theirs!"], "answer": 1},
]
PAIRS = [("The quick", " brown fox"), ("The ", "quick"), ("naïve", " café 日本語"), ("", "lazy")]


def adapted():
    model = tiny_model(GPTConfig.for_family("llama", vocab_size=300, **SIZES))
    inject_lora(model, ["q_proj", "down_proj"], rank=3, alpha=9, name="tutor")
    train_a_little(model, size=0.5)
    return model


@pytest.fixture(scope="module")
def running():
    with served(adapted(), TOKENIZER) as found:
        yield found


def ours(name):
    model = adapted()
    if name == "tiny":
        remove_lora(model)
    return HarnessModel(model, TOKENIZER)


def theirs(running, name, batch_size=1):
    return LocalCompletionsAPI(
        model=name,
        base_url=f"{running.address}/v1/completions",
        max_length=SIZES["block_size"],
        batch_size=batch_size,
        max_gen_toks=8,
    )


def asked(model, method, arguments):
    kind = "generate_until" if method == "generate_until" else "loglikelihood"
    requests = [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]
    return getattr(model, method)(requests)


@pytest.mark.filterwarnings("ignore")  # of the harness and what it loads
@pytest.mark.parametrize("name", ["tiny", "tutor"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_log_likelihoods(running, name, batch_size):
    found = asked(theirs(running, name, batch_size), "loglikelihood", PAIRS)
    expected = asked(ours(name), "loglikelihood", PAIRS)
    for (score, greedy), (own, own_greedy) in zip(found, expected, strict=True):
        assert score == pytest.approx(own, rel=1e-4)
        assert greedy == own_greedy
    assert len({round(score, 3) for score, _ in found}) == len(PAIRS)


@pytest.mark.filterwarnings("ignore")
def test_what_greedy_decoding_writes_is_greedy_and_generated_alike(running):
    arguments = [("The quick", {"until": ["~"], "max_gen_toks": 8}), ("over", {"until": []})]
    arguments[1][1]["max_gen_toks"] = 8
    texts = asked(theirs(running, "tutor"), "generate_until", arguments)
    assert texts == asked(ours("tutor"), "generate_until", arguments)
    found = asked(theirs(running, "tutor"), "loglikelihood", [("The quick", texts[0])])
    assert found == [
        (pytest.approx(score, rel=1e-4), greedy)
        for score, greedy in asked(ours("tutor"), "loglikelihood", [("The quick", texts[0])])
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_text_is_rolled_over_alike(running):
    text = (
        "The quick brown fox — naïve café, 日本語 😀 jumps over 12345 lazy dogs. It's theirs! " * 2
    )
    [found] = asked(theirs(running, "tutor"), "loglikelihood_rolling", [(text[:60],)])
    assert [found] == [
        pytest.approx(one, rel=1e-4)
        for one in asked(ours("tutor"), "loglikelihood_rolling", [(text[:60],)])
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_task_has_the_same_results(running):
    task = {
        "task": "ours",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(QUESTIONS)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    none_of_the_harness = TaskManager(include_defaults=False)  # reading them takes long
    found = [
        lm_eval.simple_evaluate(
            model,
            tasks=[dict(task)],
            bootstrap_iters=0,
            log_samples=True,
            task_manager=none_of_the_harness,
        )
        for model in (theirs(running, "tutor"), ours("tutor"))
    ]
    assert found[0]["results"]["ours"] == found[1]["results"]["ours"]
    scores = [
        [one[0] for sample in result["samples"]["ours"] for one in sample["filtered_resps"]]
        for result in found
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    assert len(scores[0]) == 8
