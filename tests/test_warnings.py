"""A warning names the line outside the package that called into it, however deep it arose."""

import warnings

from nanogpt_surgery import CharacterTokenizer, SurgeryWarning, encode_conversations
from nanogpt_surgery.data.conversations.instruction_dataset import InstructionDataset

TALK = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b a"}]


def test_the_place_of_a_warning_is_the_callers() -> None:
    tokenizer = CharacterTokenizer("User:\nAssistant: ab")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        examples = encode_conversations([TALK], tokenizer)
        InstructionDataset.for_tokenizer(examples, tokenizer, 64)
    [warning] = told
    assert warning.category is SurgeryWarning
    assert warning.filename == __file__
