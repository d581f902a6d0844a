"""Answers are found in one text of a conversation, where texts of its beginnings say they are."""

import pytest

from nanogpt_surgery import CharacterTokenizer, SurgeryError
from nanogpt_surgery.data.conversations.chat import ChatTemplate, Messages
from nanogpt_surgery.data.conversations.instructions import encode_conversations
from nanogpt_surgery.data.conversations.template_worker import (
    RewritingError,
    environment,
    find_answers,
)

CHATML = """{% for m in messages %}{% if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
INST = """<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'system' %}<<SYS>>{{ m.content }}<</SYS>>{% else %} {{ m.content }} </s>
{%- endif %}{% endfor %}"""
SPACED = """{% for m in messages %}{{ m.role | upper }}: {{ m.content }}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""
LOOKING = """{% for m in messages %}{{ '|' + m.role + '|' }}
{%- if m.content.startswith('The') %}!{% endif %}{{ m.content + ';' }}{% endfor %}
{%- if add_generation_prompt %}|assistant|{% endif %}"""
# The last answer alone has a place for thoughts, as in Qwen3.
THINKING = """{% for m in messages %}{{ '<' + m.role + '>\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<end>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"""


def renders(source):
    template = environment().from_string(source)
    counts = []

    def render(messages, ask):
        counts.append(len(messages))
        return template.render(messages=messages, add_generation_prompt=ask)

    return render, counts


def talk(exchanges, system=True):
    said = [{"role": "system", "content": " Be brief. "}] if system else []
    for i in range(exchanges):
        said.append(
            {"role": "user", "content": f"  user {i}: The <|im_end|> assistant?\n" * (i % 3 + 1)}
        )
        said.append(
            {"role": "assistant", "content": ["The answer", "assistant", " a\n", "a"][i % 4]}
        )
    return said


@pytest.mark.parametrize("ended", [True, False], ids=["ends with an answer", "with a question"])
@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("source", [CHATML, INST, SPACED, LOOKING])
def test_answers_stand_where_prefixes_say(source, system, ended):
    render, _ = renders(source)
    messages = talk(6, system)[: None if ended else -1]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    text, spans = find_answers(render, messages, answers)
    assert text == render(messages, False)
    expected = [
        (len(render(messages[:i], True)), len(render(messages[: i + 1], False))) for i in answers
    ]
    assert spans == expected


def test_a_template_that_writes_the_last_answer_otherwise():
    render, _ = renders(THINKING)
    messages = talk(4)
    text, spans = find_answers(render, messages, [2, 4, 6, 8])
    said = [text[start:end] for start, end in spans]
    assert said[:3] == ["The answer<end>\n", "assistant<end>\n", " a\n<end>\n"]
    assert said[3] == "<think>\n\n</think>\n\na<end>\n"


@pytest.mark.parametrize("source", [CHATML, INST, SPACED, THINKING])
def test_the_work_grows_with_the_length_of_a_conversation_and_not_with_its_square(source):
    render, counts = renders(source)
    messages = talk(200, system=False)
    for message in messages:
        message["content"] = message["content"].strip()
    find_answers(render, messages, list(range(1, 400, 2)))
    assert sum(counts) < 4 * len(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages | length }}",
        "{% for m in messages %}{{ loop.revindex ~ m.content }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.content }}{% endfor %}",
    ],
)
def test_a_template_that_rewrites_the_past_is_refused(source):
    render, _ = renders(source)
    with pytest.raises(RewritingError):
        find_answers(render, talk(2), [2, 4])


def test_limits_hold_for_one_rendering_and_the_rest_goes_on():
    """Together these take more time, memory and text than one may."""
    source = "{% for i in range(n) %}{% set x = messages[0].content * 10000000 %}{{ x | length }}"
    source += "{% endfor %}{{ messages[0].content * 500000 }}"
    asked = [Messages([{"role": "user", "content": "ab"}], {"n": 20}) for _ in range(20)]
    written = list(ChatTemplate(source, seconds=1).write(asked))
    assert [len(one.text) for one in written] == [20 * 8 + 1000000] * 20


def test_a_record_that_goes_beyond_a_limit_is_named_and_ends_the_rest():
    source = "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}x"
    sizes = [1, 1, 99999, 1]
    said = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}]
    talks = [Messages(said, {"n": n}, f"d.jsonl, record {i}") for i, n in enumerate(sizes, 1)]
    letters = CharacterTokenizer("x")
    with pytest.raises(SurgeryError, match=r"d\.jsonl, record 3.*1 seconds"):
        encode_conversations(talks, letters, ChatTemplate(source, seconds=1), answers_only=False)


def test_replies_come_in_order_from_several_processes(monkeypatch):
    monkeypatch.setattr("nanogpt_surgery.data.conversations.chat._FOR_ONE", 3)
    monkeypatch.setattr("nanogpt_surgery.data.conversations.chat.cores", lambda: 3)
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}")
    talks = [[{"role": "user", "content": f"{i} " * (i % 7)}] for i in range(50)]
    assert [one.text for one in template.write(talks)] == [f"{i} " * (i % 7) for i in range(50)]
