"""The page holds what it was given, as text, and asks nobody for anything."""

import base64
import json
import re

import pytest
import torch
from helpers.adapters import adapted
from helpers.models import CONFIGS, random_ids, tiny_model

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.interpret import attention, compare, logit_lens
from nanogpt_surgery.interpret.page import TEMPLATE, Side, page

HOSTILE = '</script><script>alert("x")</script><!--'


def data_of(html):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


def sides_of(model, ids):
    found = compare(model, ids, top=3)
    weights = attention(model, ids)[:, 0]
    sides = {"base": Side(found.lens_without, weights), HOSTILE: Side(found.lens_with, weights)}
    return sides, found.moved


def test_it_holds_lens_attention_and_what_moved():
    model = adapted(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 6)
    sides, moved = sides_of(model, ids)
    tokens = [f"t{i}" for i in ids[0].tolist()]
    data = data_of(page("m", tokens, str, sides, moved))
    assert data["tokens"] == tokens
    lens, side = sides["base"].lens, data["sides"][0]
    text, share = side["lens"][1][4][2]  # after layer 1, at token 4, the third
    assert text == str(int(lens.likeliest[1, 0, 4, 2]))
    assert share == pytest.approx(float(lens.probabilities[1, 0, 4, 2]), abs=1e-4)
    weights = torch.frombuffer(bytearray(base64.b64decode(side["attention"])), dtype=torch.uint8)
    expected = sides["base"].attention
    torch.testing.assert_close(
        weights.view(expected.shape) / 255, expected, atol=1 / 255, rtol=0, check_dtype=False
    )
    assert [row[1] for row in data["moved"]] == [str(one.id) for one in moved]


def test_what_others_wrote_is_text():
    model = adapted(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 6)
    sides, moved = sides_of(model, ids)
    html = page(HOSTILE, [HOSTILE] * 6, lambda i: HOSTILE, sides, moved)
    assert html.count("<script") == html.count("</script>") == TEMPLATE.read_text().count("<script")
    assert data_of(html)["title"] == HOSTILE
    assert "innerHTML" not in html


def test_it_asks_nobody_for_anything():
    text = TEMPLATE.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.search(r"https?:|url\(|@import|src=|href=|fetch\(|import\(", text)


def test_a_text_too_long_for_a_page_is_refused_with_both_numbers():
    model = tiny_model(CONFIGS["llama"])
    lens = logit_lens(model, random_ids(model.config, 1, 3))
    weights = torch.zeros(2, 6, 1, 1).expand(2, 6, 2000, 2000)
    with pytest.raises(SurgeryError, match=r"2,000.*48,000,000.*16,777,216"):
        page("m", ["t"] * 2000, str, {"model": Side(lens, weights)})


@torch.no_grad()
def test_what_is_no_number_is_null_as_json_has_no_nan():
    model = adapted(CONFIGS["llama"])
    ids = random_ids(model.config, 1, 6)
    model.layers[1].mlp.down_proj.original_layer.weight[0, 0] = torch.nan
    sides, moved = sides_of(model, ids)
    html = page("m", ["t"] * 6, str, sides, moved)
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', html, re.DOTALL)[1]
    lens = data_of(html)["sides"][0]["lens"]
    assert lens[2][0][0][1] is None
    assert lens[1][0][0][1] > 0
