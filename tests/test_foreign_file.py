"""What a parser raises over a stranger's file leaves the boundary as a SurgeryError."""

import pytest
import tokenizers

from nanogpt_surgery.errors import LONGEST_QUOTE, SurgeryError, foreign_file, quoted


def test_whatever_a_parser_raises_names_file_and_part():
    for error in (KeyError("a"), TypeError("b"), RecursionError("c"), AssertionError("d")):
        wanted = pytest.raises(SurgeryError, match=r"config\.json, rope_scaling,.*" + error.args[0])
        with wanted, foreign_file("config.json", "rope_scaling"):
            raise error


def test_a_panic_in_rust_is_no_exception_and_is_caught_all_the_same():
    steps = [{"type": "Truncate"}, {"type": "Replace"}]
    with pytest.raises(SurgeryError, match=r"tokenizer\.json"), foreign_file("tokenizer.json"):
        tokenizers.Tokenizer.from_str(str(steps))
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SurgeryError, match="off the end"), foreign_file("tokenizer.json"):
        raise panic("off the end")


def test_an_interrupt_passes_and_what_is_said_already_stays_as_it_is():
    with pytest.raises(KeyboardInterrupt), foreign_file("a"):
        raise KeyboardInterrupt
    with pytest.raises(SurgeryError, match=r"^said$"), foreign_file("a"):
        raise SurgeryError("said")


@pytest.mark.parametrize(
    "value", ["x" * 10**6, ["y"] * 10**6, {i: i for i in range(999)}, b"z" * 999]
)
def test_a_quotation_is_short(value):
    assert len(quoted(value)) <= LONGEST_QUOTE


def test_a_quotation_is_escaped():
    assert quoted("a\x1b[2J\n") == r"'a\x1b[2J\n'"
    assert quoted(3) == "3"
