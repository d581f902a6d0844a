"""Stop strings are found wherever they begin, and what comes before them is shown."""

import pytest
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer, SurgeryError, generate
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.settings import SamplingSettings
from nanogpt_surgery.generation.text import TextUntil, generate_text

TOKENIZER = PretrainedTokenizer(byte_level())


@given(text=st.text("ab€\n", max_size=30), stop=st.lists(st.text("ab€\n", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_stop_string(text, stop):
    shown = "".join(TextUntil(TOKENIZER, stop).stream(TOKENIZER.encode(text)))
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert shown == text[: min(ends)[1] if ends else len(text)]


def test_a_stop_string_across_tokens_is_never_shown_in_part_and_ends_the_taking():
    letters = CharacterTokenizer("abcEND")
    taken = []

    def ids():
        for index in letters.encode("abENcENDab"):
            taken.append(index)
            yield index

    assert list(TextUntil(letters, ["END"]).stream(ids())) == ["a", "b", "ENc"]
    assert letters.decode(taken) == "abENcEND"


def test_what_could_have_been_a_beginning_is_shown_at_the_end():
    letters = CharacterTokenizer("abEND")
    assert list(TextUntil(letters, ["END"]).stream(letters.encode("abEN"))) == ["a", "b", "EN"]


def test_an_empty_stop_string_is_refused():
    with pytest.raises(SurgeryError, match="stop string is empty"):
        TextUntil(TOKENIZER, [""])


def test_generated_text_is_that_of_the_ids():
    letters = CharacterTokenizer("".join(map(chr, range(40, 93))))
    model = tiny_model(FAMILY_CONFIGS["llama"])
    ids = list(generate(model, [3, 4], 12, 0))
    pieces = generate_text(model, letters, [3, 4], 12, SamplingSettings(0))
    assert "".join(pieces) == letters.decode(ids)
    cut = letters.decode(ids)[4:6]
    pieces = generate_text(model, letters, [3, 4], 12, SamplingSettings(0), stop=[cut])
    assert "".join(pieces) == letters.decode(ids).split(cut)[0]
