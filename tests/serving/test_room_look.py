"""`/api/look`: the numbers of interpret/, in answers that stay small, and the model left alone."""

import pytest
import torch
from helpers.commands import LETTERS
from helpers.rooms import SMALL, model_with, page_of, posted

from nanogpt_surgery import CharacterTokenizer, blend_lora, tensor_hashes
from nanogpt_surgery.interpret import attention, attribution, compare, logit_lens
from nanogpt_surgery.lora.several import adapter_weights

TEXT = "the cat sat"
IDS = torch.tensor([CharacterTokenizer(LETTERS).encode(TEXT)])
WEIGHTS = {"one": 0.5, "two": -1.0}


@pytest.fixture(scope="module")
def page():
    with page_of(model_with("one", "two")) as (client, _):
        yield client


@pytest.fixture(scope="module")
def blended():
    """The same model, its adapters blended as in WEIGHTS by an operation."""
    model = model_with("one", "two")
    blend_lora(model, WEIGHTS)
    return model


def test_the_lens_is_that_of_the_model_with_the_adapters_that_were_asked_for(page, blended):
    found = posted(page, "/api/look", text=TEXT, adapters=WEIGHTS)
    lens = logit_lens(blended, IDS, 1)
    assert (found["layers"], found["heads"]) == (2, 6)
    assert [token["text"] for token in found["tokens"]] == list(TEXT)
    rows = found["lens"]["layers"]
    assert len(rows) == 3
    assert all(len(row) == len(TEXT) for row in rows)
    for layer, row in enumerate(rows):
        probabilities = lens.probabilities[layer, 0, :, 0].tolist()
        assert [cell["probability"] for cell in row] == pytest.approx(probabilities, abs=1e-4)
        assert [cell["rank"] for cell in row] == lens.final_rank[layer, 0].tolist()
    moved = compare(blended, IDS, 10, left_out=False).moved[0]
    assert found["moved"][0]["position"] == moved.position
    assert found["moved"][0]["with_it"] == pytest.approx(moved.with_it, abs=1e-4)


def test_without_adapters_it_is_the_base_and_nothing_has_moved(page):
    found = posted(page, "/api/look", ids=IDS[0].tolist())
    lens = logit_lens(model_with(), IDS, 1)
    last = [cell["probability"] for cell in found["lens"]["layers"][-1]]
    assert last == pytest.approx(lens.probabilities[-1, 0, :, 0].tolist(), abs=1e-4)
    assert found["moved"] == []


def test_attention_is_that_of_one_layer_up_to_each_token(page, blended):
    found = posted(page, "/api/look/attention", text=TEXT, adapters=WEIGHTS, layer=1)["heads"]
    expected = attention(blended, IDS)[1, 0]
    assert len(found) == 6
    for head, wanted in zip(found, expected, strict=True):
        for position, row in enumerate(head):
            assert row == pytest.approx(wanted[position, : position + 1].tolist(), abs=1e-3)


@pytest.mark.parametrize("token", [None, 7])
def test_shares_add_up_to_the_logit(page, blended, token):
    values = {"position": 4, "token_id": token, "adapters": WEIGHTS}
    found = posted(page, "/api/look/attribution", text=TEXT, **values)
    wanted = attribution(blended, IDS, token, 4)
    assert found["token"]["id"] == int(wanted.token)
    assert found["logit"] == pytest.approx(float(wanted.logit), abs=1e-3)
    heads = [share for layer in found["heads"] for share in layer]
    parts = [found["embedding"], found["bias"], *found["mlp"], *heads]
    assert sum(parts) == pytest.approx(found["logit"], abs=5e-3)


def test_looking_leaves_the_model_and_its_journal_as_they_were():
    model = model_with("one", "two")
    before, weights = tensor_hashes(model), adapter_weights(model)
    with page_of(model) as (client, _):
        posted(client, "/api/look", text=TEXT, adapters={"one": 2})
        posted(client, "/api/look/attention", text=TEXT, layer=0)
        revision = client.get("/api/state").json()["revision"]
        posted(client, "/api/look/attribution", text=TEXT, position=1, adapters={"one": 2})
        state = client.get("/api/state").json()
        assert state["revision"] == revision
        assert len(state["journal"]) == 2  # the injections of its making
    assert (tensor_hashes(model), adapter_weights(model)) == (before, weights)


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("", {}),
        ("", {"text": ""}),
        ("", {"text": "é"}),
        ("", {"text": 5}),
        ("", {"ids": [len(LETTERS)]}),
        ("", {"ids": [-1]}),
        ("", {"text": "a" * (SMALL.block_size + 1)}),
        ("", {"text": "a" * 100_000}),
        ("", {"text": TEXT, "adapters": {"absent": 1}}),
        ("", {"text": TEXT, "adapters": {"one": "much"}}),
        ("", {"text": TEXT, "adapters": {"one": 1e9}}),
        ("", {"text": TEXT, "adapters": [1]}),
        ("/attention", {"text": TEXT}),
        ("/attention", {"text": TEXT, "layer": 2}),
        ("/attention", {"text": TEXT, "layer": -1}),
        ("/attention", {"text": TEXT, "layer": True}),
        ("/attribution", {"text": TEXT}),
        ("/attribution", {"text": TEXT, "position": len(TEXT)}),
        ("/attribution", {"text": TEXT, "position": 0, "token_id": len(LETTERS)}),
    ],
)
def test_what_is_wrong_is_refused(page, path, values):
    error = posted(page, f"/api/look{path}", 400, **values)["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"]


def test_a_model_that_computes_no_numbers_says_so():
    model = model_with()
    model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.inf
    with page_of(model) as (client, _):
        error = posted(client, "/api/look", 400, text=TEXT)["error"]
        assert "finite" in error["message"]
