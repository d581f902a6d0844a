"""Templates give transformers' text; hostile ones give our own error within their limits."""

import json
from dataclasses import replace

import pytest
from helpers.models import tiny_model
from helpers.tokenizers import byte_level, sentencepiece_like
from transformers import PreTrainedTokenizerFast

from nanogpt_surgery import CharacterTokenizer, GPTConfig, SurgeryError, SurgeryWarning
from nanogpt_surgery.data.conversations.chat import (
    ChatTemplate,
    chat_ids,
    encode_conversation,
    end_ids,
    named_template,
    template_from_jinja,
    template_of,
    to_jinja,
)
from nanogpt_surgery.data.conversations.instructions import encode_conversations
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.conversation import Conversation

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{- '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{% endif %}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'user' %}[INST] {{ m.content }} [/INST]
{%- elif m.role == 'assistant' %}{% generation %} {{ m.content }} {{ eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('no ' + m.role) }}{% endif %}{% endfor %}"""
JSON = """{% set ns = namespace(n=0) %}{% for m in messages %}
{%- if m.role == 'tool' %}{% continue %}{% endif %}
{%- set ns.n = ns.n + 1 %}{{ m | tojson }}{% endfor %}{{ ns.n }}"""
TALK = [
    {"role": "user", "content": "What's <2 + 2>?"},
    {"role": "assistant", "content": " 4, naïvely 😀 "},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("template", [CHATML, LLAMA, JSON])
@pytest.mark.parametrize("ask", [True, False])
def test_the_text_is_transformers(template, ask, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(sentencepiece_like()))
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )
    expected = theirs.apply_chat_template(
        TALK, chat_template=template, tokenize=False, add_generation_prompt=ask
    )
    assert ChatTemplate(template, "<s>", "</s>").render(TALK, ask) == expected


@pytest.mark.parametrize("kind", [byte_level, sentencepiece_like])
@pytest.mark.parametrize("name", ["plain", "chatml", "model"])
@pytest.mark.parametrize("ask", [True, False])
def test_transformers_writes_the_same_ids_by_what_lies_beside_an_adapter(kind, name, ask, tmp_path):
    contents = kind()
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    tokenizer = PretrainedTokenizer(contents, stop_ids=[2], chat_template=CHATML)
    template = named_template(tokenizer, name)
    jinja = to_jinja(template, tokenizer)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    system = [{"role": "system", "content": "{{ 'Be' }} \\n \"kind\""}, *TALK]
    expected = theirs.apply_chat_template(
        system, chat_template=jinja, add_generation_prompt=ask, return_dict=False
    )
    text = template.render(system, ask)
    assert encode_conversation(tokenizer, template, text)[0] == expected
    assert template_from_jinja(tokenizer, jinja) == replace(template, owner="adapter")


def test_bos_comes_once_and_twice_is_said():
    tokenizer = PretrainedTokenizer(sentencepiece_like(), stop_ids=[2], chat_template=LLAMA)
    assert tokenizer.add_bos
    ids = chat_ids(tokenizer, TALK)
    assert ids[0] == 1
    assert ids.count(1) == 1
    twice = ChatTemplate("<s><s>{{ messages[0].content }}")
    with pytest.warns(SurgeryWarning, match="BOS twice"):
        chat_ids(tokenizer, TALK, twice)


def test_a_model_without_a_template_gets_ours():
    assert template_of(PretrainedTokenizer(byte_level())).source == "chatml"
    assert template_of(CharacterTokenizer("abc")).source == "plain"
    assert ChatTemplate("chatml").render(TALK[:1]) == (
        "<|im_start|>user\nWhat's <2 + 2>?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ChatTemplate("plain").render(TALK[2:]) == "User:\nThanks\n\nAssistant:\n"


HOSTILE = {
    "reaching for classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "reaching for globals": "{{ raise_exception.__globals__['sys'] }}",
    "through attr": "{{ ''|attr('__class__') }}{{ (''|attr('__class__')).mro() }}",
    "through format": "{{ '{0.__class__.__mro__}'.format(messages) ~ 1/0 }}",
    "importing": "{% import 'os' as os %}{{ os.getcwd() }}",
    "including a file": "{% include '/etc/passwd' %}",
    "changing its input": "{{ messages.append(1) }}",
    "an endless loop": "{% for a in range(99999) %}" * 2 + "{% endfor %}" * 2,
    "endless recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "huge output": "{% for a in range(99999) %}{{ messages[0].content * 99 }}{% endfor %}",
    "huge memory": "{% set x = 'a' * 9999999999 %}{{ x | length }}",
    "huge padding": "{{ '%9999999999d' % 1 }}",
    "a huge power": "{{ (9 ** (9 ** 9)) % 7 }}",
    "no template": "{% for %}",
    "an unknown filter": "{{ 1 | exec }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_give_our_own_error(kind):
    with pytest.raises(SurgeryError, match="chat template fails"):
        ChatTemplate(HOSTILE[kind], seconds=1).render(TALK)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user"}, {"role": "god", "content": "x"}], "message 1 has no text.*'god'"),
        (["hello"], "message 1 has no text"),
        ([{"role": "user", "content": 3}], "message 1 has no text"),
    ],
)
def test_messages_that_are_none_are_named_at_once(messages, message):
    with pytest.raises(SurgeryError, match=message):
        ChatTemplate("chatml").render(messages)


def test_a_refusal_of_the_template_is_told():
    with pytest.raises(SurgeryError, match="no system"):
        ChatTemplate(LLAMA).render([{"role": "system", "content": "x"}])


def test_chatml_ends_an_answer_also_where_the_tokenizer_has_another_end():
    base = PretrainedTokenizer(byte_level(), stop_ids=[0])
    assert template_of(base).stop == ("<|im_end|>",)
    own = PretrainedTokenizer(byte_level(), stop_ids=[0], chat_template=CHATML)
    assert template_of(own).stop == ("<|im_end|>",)
    assert ChatTemplate(LLAMA).stop == ()
    assert end_ids(base) == {0, base.id_of("<|im_end|>")}
    assert end_ids(CharacterTokenizer("abc")) == set()


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_training_and_chat_begin_alike(name):
    """A tokenizer that begins a text with BOS does so before our templates, everywhere."""
    tokenizer = PretrainedTokenizer(byte_level(), bos_id=0, stop_ids=[2], add_bos=True)
    template = replace(template_of(tokenizer), source=name)
    config = GPTConfig.for_family(
        "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=1, block_size=200
    )
    talk = Conversation(tiny_model(config), tokenizer, template)
    next(talk.ask(TALK[0]["content"], 3, seed=0))
    asked = chat_ids(tokenizer, TALK[:1], template)
    assert asked[0] == 0
    assert talk.ids[: len(asked)] == asked
    for answers_only in (True, False):
        [example] = encode_conversations([TALK[:2]], tokenizer, template, answers_only=answers_only)
        assert list(example.ids[: len(asked)]) == asked
        assert example.ids.count(0) == 1
