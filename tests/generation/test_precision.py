"""Generation in the precision of the weights."""

from helpers.models import FAMILY_CONFIGS, random_ids, tiny_model

from nanogpt_surgery import generate

LLAMA = FAMILY_CONFIGS["llama"]


def test_a_bfloat16_model_generates():
    model = tiny_model(LLAMA).bfloat16()
    prompt = random_ids(LLAMA, 1, 5)[0].tolist()
    ids = list(generate(model, prompt, 10, temperature=0.8, top_k=5, seed=1))
    assert len(ids) == 10
