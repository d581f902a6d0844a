"""Answers alone are trained on, every answer once, and packing loses nothing."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery import CharacterTokenizer, SurgeryError, SurgeryWarning
from nanogpt_surgery.data.conversations.chat import ChatTemplate, template_of
from nanogpt_surgery.data.conversations.instruction_dataset import (
    UNTRAINED,
    InstructionDataset,
    preview,
)
from nanogpt_surgery.data.conversations.instructions import (
    Example,
    encode_conversations,
    is_instruction_data,
    read_conversations,
)
from nanogpt_surgery.data.gpt_dataset import documents_of
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer

TOKENIZER = PretrainedTokenizer(byte_level(), stop_ids=[2])
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4 😀"},
    {"role": "user", "content": "3+3?"},
    {"role": "assistant", "content": "6"},
]


def test_every_form_of_record_is_read(tmp_path):
    records = [
        {"messages": TALK},
        {"prompt": "a", "completion": "b"},
        {"instruction": "do", "input": "it", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"prompt": "a", "response": "b"},
    ]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    found = read_conversations(tmp_path / "a.json")
    assert found == read_conversations(tmp_path / "a.jsonl")
    assert found[0] == TALK
    assert [m["content"] for m in found[2]] == ["do\n\nit", "done"]
    assert [m["content"] for m in found[3]] == ["do", "done"]


def test_records_of_no_known_form_are_numbered(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"text": "x"}\n[1]')
    with pytest.raises(SurgeryError, match=r"record 2, .*text; record 3, .*\[1\]"):
        read_conversations(path)
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt"')
    with pytest.raises(SurgeryError, match=r"a\.jsonl.*line 2\b"):
        read_conversations(path)
    path.write_text("")
    with pytest.raises(SurgeryError, match=r"a\.jsonl.*no records"):
        read_conversations(path)
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path / "none"))):
        read_conversations(tmp_path / "none")


def test_answers_and_their_ends_are_trained_on_and_nothing_else():
    (example,) = encode_conversations([TALK], TOKENIZER)
    pieces = preview(example, TOKENIZER)
    assert [text for text, trained in pieces if trained] == ["4 😀<|im_end|>\n", "6<|im_end|>\n"]
    assert "".join(text for text, _ in pieces) == ChatTemplate("chatml").render(TALK, ask=False)
    (whole,) = encode_conversations([TALK], TOKENIZER, answers_only=False)
    assert all(whole.trained)


def test_a_template_of_the_model_marks_the_same_answers():
    source = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ours, theirs = (
        encode_conversations([TALK, TALK[:3]], TOKENIZER, ChatTemplate(s))
        for s in ("chatml", source)
    )
    assert [preview(e, TOKENIZER) for e in ours] == [preview(e, TOKENIZER) for e in theirs]


def test_a_template_that_rewrites_the_past_is_refused():
    with pytest.raises(SurgeryError, match="rewrites what came before"):
        encode_conversations([TALK], TOKENIZER, ChatTemplate("{{ messages | length }}"))
    with pytest.raises(SurgeryError, match="conversation 1 has no answer"):
        encode_conversations([TALK[:2]], TOKENIZER)


def test_every_token_can_be_trained_on_whatever_the_template_does():
    rewriting = ChatTemplate("{{ messages | length }} {{ messages[0].content }}")
    (example,) = encode_conversations([TALK], TOKENIZER, rewriting, answers_only=False)
    assert TOKENIZER.decode(example.ids) == "5 Be brief."
    assert all(example.trained)


def test_a_text_that_begins_with_bos_twice_is_said():
    tokenizer = PretrainedTokenizer(byte_level(), bos_id=0, stop_ids=[2])
    twice = ChatTemplate(
        "<|endoftext|><|endoftext|>{{ messages | map(attribute='content') | join }}"
    )
    with pytest.warns(SurgeryWarning, match="BOS twice"):
        encode_conversations([TALK], tokenizer, twice)


def test_answers_written_plainly_end_where_the_tokenizer_has_an_end():
    template = replace(template_of(TOKENIZER), source="plain")
    (example,) = encode_conversations([TALK[1:3]], TOKENIZER, template)
    assert preview(example, TOKENIZER)[1] == ("4 😀<|im_end|>\n\n", True)
    assert InstructionDataset.for_tokenizer([example], TOKENIZER, 99).counts.ends == 1
    letters = CharacterTokenizer(ChatTemplate("plain").render(TALK))
    endless = encode_conversations([TALK[1:3]], letters)
    with pytest.warns(SurgeryWarning, match="no target ends a turn"):
        InstructionDataset.for_tokenizer(endless, letters, 99)


def test_instruction_data_is_told_from_text(tmp_path):
    good, text, prose = (tmp_path / name for name in ("a.json", "b.jsonl", "c.txt"))
    good.write_text('[{"prompt": "a", "completion": "b"}]')
    prose.write_text('{"prompt": "a", "completion": "b"}')
    assert is_instruction_data([good, good])
    assert not is_instruction_data([prose, "-", tmp_path])
    assert not is_instruction_data([])
    with pytest.raises(SurgeryError, match=r"a\.json.*c\.txt"):
        is_instruction_data([good, prose])
    for contents in ('{"text": "x"}', "to be", "", "[]", "[1]"):
        text.write_text(contents)
        with pytest.raises(SurgeryError, match=r"b\.jsonl") as refused:
            is_instruction_data([good, text])
        assert "--data text" not in str(refused.value)
    with pytest.raises(SurgeryError, match=r"no file .*none\.json"):
        is_instruction_data([tmp_path / "none.json"])


def example(length, first, seed=0):
    return Example(tuple(range(seed, seed + length)), tuple(i >= first for i in range(length)))


def test_targets_are_shifted_and_the_rest_is_passed_over():
    data = InstructionDataset([example(5, 3, 10)], 6, end_ids=[14])
    inputs, targets = data[0]
    assert inputs.tolist() == [10, 11, 12, 13, 0, 0]
    assert targets.tolist() == [UNTRAINED, UNTRAINED, 13, 14, UNTRAINED, UNTRAINED]
    assert (data.counts.trained, data.counts.ends, data.counts.rows) == (2, 1, 1)


def test_what_is_cut_off_or_dropped_is_counted():
    data = InstructionDataset([example(9, 2), example(9, 7), example(4, 1)], 5)
    assert (data.counts.examples, data.counts.truncated, data.counts.dropped) == (3, 2, 1)
    with pytest.raises(SurgeryError, match=r"\b1 examples\b.*\b5\b"):
        InstructionDataset([example(9, 7)], 5)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=20), st.integers(11, 30))
def test_packing_keeps_every_example_whole_and_apart(lengths, size):
    examples = [example(length, 1, 100 * i) for i, length in enumerate(lengths)]
    data = InstructionDataset(examples, size, pack=True)
    found = set()
    for inputs, targets, documents in zip(data.inputs, data.targets, data.documents, strict=True):
        for number in set(documents.tolist()) - {0}:
            places = documents == number
            found.add((*inputs[places].tolist(), int(targets[places][-1])))
            assert torch.equal(targets[places][:-1], inputs[places][1:])
    assert found == {e.ids for e in examples}
    assert data.counts.trained == sum(lengths) - len(lengths)
    assert data.counts.rows <= len(lengths)


def test_batches_say_which_tokens_belong_together_where_rows_are_shared():
    examples = [example(4, 1, 100 * i) for i in range(7)]
    alone, packed = (InstructionDataset(examples, 7, pack=pack) for pack in (False, True))
    assert [len(batch) for batch in alone.iter_all(4)] == [2, 2]
    batches = list(packed.iter_all(3))
    assert torch.equal(torch.cat([documents for *_, documents in batches]), packed.documents)
    assert torch.equal(torch.cat([inputs for inputs, *_ in batches]), packed.inputs.long())
    rows = packed.indices(2, 3, 1)
    assert torch.equal(documents_of(packed.batch(2, 3, 1)), packed.documents[rows])
    assert documents_of(alone.batch(2, 3, 1)) is None
    sparse = InstructionDataset(examples, 5, pack=True)  # there is room for one in each row
    assert documents_of(sparse.batch(0, 2)) is None


def test_a_batch_is_a_pure_function_of_seed_and_step():
    data = InstructionDataset([example(4, 1, i) for i in range(7)], 5)
    assert torch.equal(data.batch(3, 2, 1)[0], data.batch(3, 2, 1)[0])
    epoch = np.concatenate([data.indices(step, 1, 5) for step in range(7)])
    assert sorted(epoch.tolist()) == list(range(7))


def test_lines_end_at_line_ends_alone(tmp_path):
    path, answer = tmp_path / "a.jsonl", "one\u2028two\u2029three\x85four"
    record = {"prompt": "a", "completion": answer}
    path.write_text(json.dumps(record, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    [talk] = read_conversations(path)
    assert talk[1]["content"] == answer


def test_chatmls_end_counts_where_the_tokenizer_stops_at_another_token():
    base = PretrainedTokenizer(byte_level(), stop_ids=[0])
    examples = encode_conversations([TALK], base, ChatTemplate("chatml"))
    assert InstructionDataset.for_tokenizer(examples, base, 99).counts.ends == 2
