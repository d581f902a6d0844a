"""docs/anatomy.svg: its text lies within its boxes in any font, and it shows the default model."""

import re
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

from nanogpt_surgery import SimpleGPT
from nanogpt_surgery.lora.settings import LoRASettings
from nanogpt_surgery.model.config import GPTConfig

DRAWING = Path(__file__).parents[1] / "docs" / "anatomy.svg"
WIDEST = 0.62  # of the font's size: a letter, on average, in wide fonts (Verdana, DejaVu Sans)
SVG = "{http://www.w3.org/2000/svg}"


def drawn(kind: str) -> list[tuple[dict[str, str], str]]:
    """Attributes, with those inherited from what is around, and text of all elements of a kind."""
    found = []

    def walk(element: ElementTree.Element, above: dict[str, str]) -> None:
        own = above | element.attrib
        if element.tag == SVG + kind:
            found.append((own, "".join(element.itertext())))
        for child in element:
            walk(child, own)

    walk(ElementTree.parse(DRAWING).getroot(), {})
    return found


def boxes() -> list[tuple[float, float, float, float]]:
    """The rectangles: left, top, right, bottom; the page among them."""
    found = []
    for box, _ in drawn("rect"):
        x, y = float(box.get("x", 0)), float(box.get("y", 0))
        found.append((x, y, x + float(box["width"]), y + float(box["height"])))
    return found


def extent(text: dict[str, str], words: str) -> tuple[float, float, float, float]:
    """About where a text lies, generously."""
    size, x, y = (float(text[key]) for key in ("font-size", "x", "y"))
    width = WIDEST * size * len(words) * (1.08 if text.get("font-weight") else 1)
    left = {"start": x, "middle": x - width / 2}[text.get("text-anchor", "start")]
    return left, y - 0.8 * size, left + width, y + 0.25 * size


@pytest.mark.parametrize(("text", "words"), drawn("text"), ids=[w for _, w in drawn("text")])
def test_text_lies_within_its_box(text: dict[str, str], words: str) -> None:
    left, top, right, bottom = extent(text, words)
    x, y = float(text["x"]), float(text["y"])
    around = [b for b in boxes() if b[0] <= x <= b[2] and b[1] <= y <= b[3]]
    box = min(around, key=lambda b: (b[2] - b[0]) * (b[3] - b[1]))
    assert box[0] <= left and right <= box[2], (words, box, left, right)
    assert box[1] <= top and bottom <= box[3], (words, box, top, bottom)


def test_no_text_lies_on_another() -> None:
    lying = [(extent(*one), one[1]) for one in drawn("text")]
    for i, (a, first) in enumerate(lying):
        for b, second in lying[:i]:
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, (first, second)


def test_it_shows_the_default_model() -> None:
    words = " ".join(words for _, words in drawn("text"))
    default = {field.name: field.default for field in fields(GPTConfig)}
    assert (default["positions"], "embed_positions" in words) == ("learned", True)
    assert (default["mlp"], "gate_proj" in words) == ("gelu", False)
    assert (default["tie_head"], default["n_prev_tokens"], default["qk_norm"]) == (False, 0, False)
    model = SimpleGPT(11, n_embd=8, n_head=2, n_layer=2, block_size=4)
    parts = {name for name, _ in model.named_modules()}
    last = {name.split(".")[-1] for name in parts} - {"", "0", "1", "layers"}
    shown = set(re.findall(r"[a-z_]+", words))
    leaves = {"embed_tokens", "embed_positions", "norm", "lm_head", "self_attn", "mlp"}
    leaves |= {"input_layernorm", "post_attention_layernorm", "up_proj", "down_proj"}
    leaves |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert leaves <= last & shown
    assert {word for word in shown if "_" in word} <= last | {"n_layer"}
    assert type(model.layers[0]).__name__ in words
    assert type(model.layers[0]).__name__ == "TransformerEncoderLayer"


def test_rank_and_alpha_are_called_as_in_the_docs() -> None:
    words = " ".join(words for _, words in drawn("text"))
    assert "α/R" in words and "α/r" not in words
    assert {"rank", "alpha"} <= {field.name for field in fields(LoRASettings)}


def test_it_says_why_the_block_is_named_as_it_is() -> None:
    readme = (DRAWING.parents[1] / "README.md").read_text(encoding="utf-8")
    below = readme[readme.index("docs/anatomy.svg") :].split("##")[0]
    assert all(
        word in below for word in ("TransformerEncoderLayer", "causal", "decoder", "R ", "α")
    )
