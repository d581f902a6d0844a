"""Every field of a record is honoured, refused by name, or listed: none goes in silence."""

import json

import pytest
from helpers.tokenizers import byte_level

from nanogpt_surgery import SurgeryError, SurgeryWarning
from nanogpt_surgery.data.conversations.chat import TRAINED, ChatTemplate
from nanogpt_surgery.data.conversations.instruction_dataset import preview
from nanogpt_surgery.data.conversations.instructions import encode_conversations, read_conversations
from nanogpt_surgery.data.conversations.record_files import looks_like_data, read_records
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer

TOKENIZER = PretrainedTokenizer(byte_level(), stop_ids=[2])
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
S = {"role": "system", "content": "s"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f"}}


def read(tmp_path, *records):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return read_conversations(path)


def said(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"instruction": "q", "input": "", "output": "a", "system": "s"}, [S, Q, A]),
        ({"instruction": "q", "output": "a", "history": [["q", "a"], ["q", "a"]]}, [Q, A] * 3),
        ({"instruction": "q", "output": "a", "system": None, "history": []}, [Q, A]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [S, Q, A]),
        ({"prompt": [S, Q], "completion": [A]}, [S, Q, A]),
        ({"prompt": [Q, A, Q], "completion": [A]}, [Q, A | {"weight": 0}, Q, A]),
        (said(("system", "s"), ("human", "q"), ("gpt", "a")), [S, Q, A]),
        (said(("human", "q"), ("gpt", "a")) | {"system": "s"}, [S, Q, A]),
        ({"conversations": [Q, A]}, [Q, A]),
        ({"messages": [{"role": "developer", "content": "s"}, Q, A]}, [S, Q, A]),
        ({"messages": [S, Q, A], "system": "s"}, [S, Q, A]),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
            [Q, A],
        ),
        ({"messages": [Q, A | {"train": False}]}, [Q, A | {"weight": 0}]),
        (
            {"messages": [Q, {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ]}]},
            [Q, {"role": "assistant", "content": None, "tool_calls": [CALL | {"id": "1"}]}],
        ),
        (
            said(("human", "q"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                 ("observation", "3"), ("gpt", "a")),
            [Q, {"role": "assistant", "content": None, "tool_calls": [CALL]},
             {"role": "tool", "content": "3"}, A],
        ),
    ],
)  # fmt: skip
def test_forms(record, messages, tmp_path):
    [found] = read(tmp_path, record)
    assert found == messages


G = {"function": {"name": "g", "arguments": {}}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("mark", "trained"),
    [
        *(({name: value}, value) for name in TRAINED for value in (0, 1, False, True)),
        *(({"masked": value}, not value) for value in (0, 1, False, True)),
        *(({"mask": value}, not value) for value in (False, True)),
        ({"weight": 0, "train": False, "loss": None, "masked": True}, False),
        ({"weight": 1, "trainable": True, "mask": False}, True),
    ],
)
def test_marks_on_an_answer_say_whether_it_is_trained_on(mark, trained, tmp_path):
    [found] = read(tmp_path, {"messages": [Q, A | mark]})
    assert found == [Q, A | {"weight": int(trained)}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [Q, A], "conversations": [{"from": "human", "value": "q"}, A]},
        {"messages": [Q, A], "conversations": []},
        {"messages": [{"role": "user", "from": "human", "content": "q", "value": "q"}, A]},
        {"messages": [{"from": "user", "content": None, "value": "q"}, A]},
        {"messages": [{"role": "user", "content": [{"text": "q"}], "value": "q"}, A]},
        {"prompt": "q", "instruction": "q", "completion": "a", "output": "a"},
    ],
)  # fmt: skip
def test_fields_that_say_the_same_may_stand_beside_each_other(record, tmp_path):
    [found] = read(tmp_path, record)
    assert found == [Q, A]


def test_tools_and_calls_under_two_names_that_say_the_same(tmp_path):
    tools = {"tools": [TOOL], "functions": [{"name": "f"}]}
    call = {"name": "f", "arguments": '{"x": 1}'}
    answer = {"role": "assistant", "function_call": call, "tool_calls": [CALL | {"id": "1"}]}
    shared = {"from": "function_call", "value": json.dumps(call), "tool_calls": [CALL]}
    first, second = read(tmp_path, {"messages": [Q, answer]} | tools, {"messages": [Q, shared]})
    assert first.variables == {"tools": [TOOL]}
    assert first[1]["tool_calls"] == [CALL | {"id": "1"}]
    assert second[1] == {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("record", "one", "other"),
    [
        ({"messages": [Q, A], "tools": [TOOL], "functions": [{"name": "g"}]}, "tools", "functions"),
        ({"messages": [Q, A], "conversations": [Q, Q, A]}, "messages", "conversations"),
        ({"messages": [Q, CALLS | {"function_call": G["function"]}]},
         "tool_calls", r"messages\[1\]\.function_call"),
        ({"messages": [Q, {"from": "function_call", "value": '{"name": "g"}', "tool_calls": [CALL]}
          ]}, "tool_calls", r"messages\[1\]\.value"),
        ({"messages": [Q, A | {"weight": 1, "train": False}]},
         "weight", r"messages\[1\]\.train"),
        ({"messages": [Q, A | {"loss": True, "masked": True}]}, "loss", r"messages\[1\]\.masked"),
        ({"messages": [Q, A | {"value": "b"}]}, "content", r"messages\[1\]\.value"),
        ({"messages": [Q, A | {"from": "human"}]}, "role", r"messages\[1\]\.from"),
        ({"instruction": "q", "input": "x", "context": "y", "output": "a"}, "input", "context"),
    ],
)  # fmt: skip
def test_fields_that_differ_are_refused_by_both_names(record, one, other, tmp_path):
    with pytest.raises(SurgeryError, match=rf"d\.jsonl.*record 2, {other}: .*beside {one}\b"):
        read(tmp_path, {"prompt": "q", "completion": "a"}, record)


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"prompt": "q", "prompt": "r", "completion": "a"}', "prompt"),
        ('{"messages": [{"role": "user", "content": "q"},'
         ' {"role": "assistant", "content": "a", "content": "b"}]}', r"messages\[1\]\.content"),
        ('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls":'
         ' [{"function": {"name": "f", "arguments": "{\\"x\\": 1, \\"x\\": 2}"}}]}]}', "x"),
        ('{"messages": [], "tools": "[{\\"name\\": \\"f\\", \\"name\\": \\"g\\"}]",'
         '"prompt": "q", "completion": "a"}', r"tools: .*\[0\]\.name|messages"),
    ],
)  # fmt: skip
def test_a_key_that_stands_twice_is_refused_with_its_record(text, field, tmp_path):
    good = '{"prompt": "q", "prompt": "q", "completion": "a"}'
    lines, whole = tmp_path / "d.jsonl", tmp_path / "d.json"
    lines.write_text(f"{good}\n\n{text}\n")
    whole.write_text(f"[{good},\n{text}]")
    for path in (lines, whole):
        with pytest.raises(SurgeryError, match=rf"{path.name}.*record 2.*{field}"):
            read_conversations(path)
    lines.write_text(good)
    assert len(read_conversations(lines)) == 1
    for line in '{"prompt": "q", "prompt": "r"}', '{"question": "q", "choices": 1, "choices": 2}':
        lines.write_text(line)
        with pytest.raises(SurgeryError, match=r"record 1.*twice"):
            list(read_records(lines))


def test_tools_are_told_to_the_template(tmp_path):
    records = [
        {"messages": [Q, A], "tools": [TOOL]},
        {"messages": [Q, A], "tools": json.dumps([TOOL])},
        {"messages": [Q, A], "functions": [{"name": "f"}]},
    ]
    talks = read(tmp_path, *records)
    assert [talk.variables["tools"] for talk in talks] == [[TOOL]] * 3
    template = ChatTemplate(
        "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    for example in encode_conversations(talks, TOKENIZER, template, answers_only=False):
        assert TOKENIZER.decode(example.ids) == json.dumps([TOOL]) + "qa"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": [Q, A | {"weight": 0.5}]}, r"messages\[1\]\.weight.*0\.5"),
        ({"messages": [Q | {"train": True}, A]}, r"messages\[0\]\.train"),
        ({"messages": [Q | {"masked": False}, A]}, r"messages\[0\]\.masked"),
        ({"messages": [Q, A | {"mask": 1}]}, r"messages\[1\]\.mask.*1"),
        ({"messages": [Q, A | {"loss": 0.3}]}, r"messages\[1\]\.loss.*0\.3"),
        ({"messages": [Q, {"role": "gpt", "content": "a"}]}, r"messages\[1\]\.role.*'gpt'"),
        (
            {"messages": [Q, {"role": "assistant", "content": None}]},
            r"messages\[1\]\.content.*null",
        ),
        ({"messages": [Q, {"role": "assistant"}]}, r"messages\[1\]\.content"),
        ({"messages": [Q, A | {"refusal": "no"}]}, r"messages\[1\]\.refusal"),
        ({"messages": [Q, A | {"tool_calls": [3]}]}, r"messages\[1\]\.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]}, "image_url"),
        ({"messages": []}, "messages"),
        ({"messages": [S, Q, A], "system": "other"}, "system"),
        ({"messages": [Q, A], "images": ["x.png"]}, "images"),
        ({"messages": [Q, A], "tools": "no json"}, "tools"),
        ({"messages": [Q, A], "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]\.from.*robot"),
        ({"instruction": "q", "output": "a", "history": ["x"]}, r"history\[0\]"),
        ({"prompt": "q", "completion": 4}, "completion.*4"),
        ({"prompt": "q", "completion": None}, "completion"),
        ({"prompt": "", "completion": "a"}, "prompt: .*empty"),
        ({"instruction": None, "input": "", "output": "a"}, "instruction: .*empty"),
        ({"prompt": "q", "completion": "a", "label": False}, "label"),
        ({"prompt": "q", "completion": "a", "label": "False"}, "label.*False"),
        ({"messages": [Q, A], "label": 0}, "label.*0"),
        ({"messages": [Q, A], "rejected": "b"}, "rejected"),
        ({"prompt": "q", "completion": "a", "weight": 0}, "weight.*0"),
        ({"prompt": "q", "completion": "a", "train": False}, "train.*False"),
        ({"prompt": "q", "completion": "a", "loss": "false"}, "loss.*false"),
        ({"messages": [Q, A], "masked": True}, "masked.*True"),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "rejected"),
        ({"instruction": "q", "prompt": "other", "output": "a"}, "prompt"),
        ({"prompt": "q", "output": "a", "response": "b"}, "output|response"),
        ({"name": "x", "size": 3}, "name, size"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(record, field, tmp_path):
    with pytest.raises(SurgeryError, match=rf"d\.jsonl.*record 2, .*{field}"):
        read(tmp_path, {"prompt": "q", "completion": "a"}, record)


def test_fields_that_are_not_used_are_listed_once(tmp_path):
    records = [{"prompt": "q", "completion": "a", "id": i, "note": "x" * (i > 2)} for i in range(5)]
    with pytest.warns(SurgeryWarning, match=r"id \(5 records\), note \(2 records\)") as said:
        read(tmp_path, *records)
    assert len(said) == 1


def test_answers_of_weight_0_are_not_trained_on(tmp_path):
    wrong = {"role": "assistant", "content": "wrong", "weight": 0}
    talks = read(tmp_path, {"messages": [Q, wrong, Q, A | {"weight": 1}]})
    for template in (None, ChatTemplate("{% for m in messages %}{{ m | tojson }};{% endfor %}"
                                        "{% if add_generation_prompt %}{% endif %}")):  # fmt: skip
        [example] = encode_conversations(talks, TOKENIZER, template)
        parts = [text for text, trained in preview(example, TOKENIZER) if trained]
        assert len(parts) == 1
        assert "wrong" not in parts[0]
        [rest] = encode_conversations(talks, TOKENIZER, template, answers_only=False)
        untrained = [text for text, trained in preview(rest, TOKENIZER) if not trained]
        assert len(untrained) == 1
        assert "wrong" in untrained[0]
        assert "weight" not in TOKENIZER.decode(example.ids)
    with pytest.raises(SurgeryError, match=r"record 1.*weight 0"):
        encode_conversations(read(tmp_path, {"messages": [Q, wrong]}), TOKENIZER)


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"messages": [Q | {"name": "Bob"}, A]}, r"user\.name"),
        ({"messages": [Q, A], "tools": [TOOL]}, "tools"),
        ({"messages": [Q, {"role": "assistant", "tool_calls": [CALL]}]}, r"assistant\.tool_calls"),
    ],
)
def test_what_a_template_does_not_write_and_answers_rest_on_is_refused(record, field, tmp_path):
    talks = read(tmp_path, {"messages": [Q, A]}, record)
    with pytest.raises(SurgeryError, match=rf"record 2: .*{field}"):
        encode_conversations(talks, TOKENIZER)


def test_what_a_template_does_not_write_besides_is_listed(tmp_path):
    talks = read(tmp_path, *[{"messages": [Q | {"time": "9:00"}, A]}] * 3)
    with pytest.warns(SurgeryWarning, match=r"user\.time \(3 records\)"):
        encode_conversations(talks, TOKENIZER)


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('must alternate') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "what"),
    [([S, Q, A], "no system"), ([Q, Q, A], "must alternate"), ([Q], "no answer")],
)
def test_what_goes_wrong_with_a_record_names_it(messages, what, tmp_path):
    talks = read(tmp_path, *[{"messages": [Q, A]}] * 3, {"messages": messages})
    with pytest.raises(SurgeryError, match=rf"d\.jsonl, record 4.*{what}"):
        encode_conversations(talks, TOKENIZER, ChatTemplate(STRICT))


def test_tables(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('\ufeff Question ;Answer\n"a;b\u2028c";"d\n""e"""\n\nf;g\n', encoding="utf-8")
    talks = read_conversations(path)
    assert [[m["content"] for m in talk] for talk in talks] == [
        ["a;b\u2028c", 'd\n"e"'],
        ["f", "g"],
    ]
    path.write_text("question,answer\na,b\nc,d,e\n")
    with pytest.raises(SurgeryError, match=r"t\.csv, record 2 \(line 3\).*3 cells.*2 columns"):
        read_conversations(path)
    path.write_text("question,answer\na,\n")
    with pytest.raises(SurgeryError, match="record 1, answer"):
        read_conversations(path)
    path.write_text('question,answer\na,"b\nc,d\n')
    with pytest.raises(SurgeryError, match=r"t\.csv, line 3"):
        read_conversations(path)
    path.write_text("question,Answer,answer\na,b,c\n")
    with pytest.raises(SurgeryError, match=r"t\.csv.*'answer' twice"):
        read_conversations(path)
    path.write_text("prompt,completion,label\na,b,True\nc,d,False\n")
    with pytest.raises(SurgeryError, match=r"t\.csv.*record 2, label.*False"):
        read_conversations(path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("To be, or not to be.\nThat is, so to say, it.\nOh, no.\nAh, me.\n", ""),
        ("a,b,c\n" * 9, "a table of 3 columns"),
        ("a\tb\n" * 9, "a table of 2 columns"),
        ('{"a": 1}\n{"a": 2}\n', "JSON"),
        ('{\n "a": 1\n}', "JSON"),
        ("{% if x %}\nhello\n", ""),
        ("", ""),
    ],
)
def test_data_is_told_from_prose(text, kind):
    assert looks_like_data(text) == kind
