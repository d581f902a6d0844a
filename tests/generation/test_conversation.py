"""A conversation remembers everything, shows the model what fits, and computes nothing twice."""

from dataclasses import replace

import pytest
import torch
from helpers.commands import LETTERS
from helpers.models import CONFIGS, FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level

from nanogpt_surgery import (
    CharacterTokenizer,
    GPTConfig,
    KVCache,
    SimpleGPT,
    SurgeryError,
    generate,
)
from nanogpt_surgery.data.conversations.chat import ChatTemplate
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.generation.conversation import Conversation

TOKENIZER = CharacterTokenizer(LETTERS)
CONFIG = GPTConfig.for_family(
    "llama", vocab_size=96, n_embd=24, n_head=6, n_kv_head=2, n_layer=2, block_size=120
)
SEED = 5


def conversation(template="plain", seed=0):
    return Conversation(tiny_model(CONFIG, seed), TOKENIZER, ChatTemplate(template))


def continued(model, text, tokens):
    return TOKENIZER.decode(list(generate(model, TOKENIZER.encode(text), tokens, seed=SEED)))


def said(talk, text, tokens=6, **more):
    return "".join(talk.ask(text, tokens, seed=SEED, **more))


PREV_TOKENS = replace(CONFIGS["learned-rmsnorm-swiglu"], n_prev_tokens=2)


@pytest.mark.parametrize("config", [*CONFIGS.values(), PREV_TOKENS], ids=[*CONFIGS, "prev-tokens"])
def test_with_a_cache_the_ids_are_those_without(config):
    model = tiny_model(config)
    cache, text = KVCache(config), [3, 1, 4]
    for new in ([1, 5], [9], [2, 6, 5]):
        text = text + new
        with_cache = list(generate(model, text, 3, seed=SEED, cache=cache))
        assert with_cache == list(generate(model, text, 3, seed=SEED))
        text = text + with_cache
    other = [*text[:4], 7, 7]
    assert list(generate(model, other, 3, seed=SEED, cache=cache)) == list(
        generate(model, other, 3, seed=SEED)
    )
    same = [list(generate(model, other, 3, seed=SEED, cache=cache)) for _ in range(2)]
    assert same[0] == same[1] == list(generate(model, other, 3, seed=SEED))


def test_what_both_texts_begin_with_is_not_computed_again(monkeypatch):
    model, widths, hidden = tiny_model(FAMILY_CONFIGS["llama"]), [], SimpleGPT.hidden
    monkeypatch.setattr(
        SimpleGPT,
        "hidden",
        lambda self, ids, *a: widths.append(ids.size(1)) or hidden(self, ids, *a),
    )
    cache = KVCache(model.config)
    first = list(generate(model, [1, 2, 3, 4], 2, 0, cache=cache, engine="plain"))
    list(generate(model, [1, 2, 3, 4, *first, 8, 9], 1, 0, cache=cache, engine="plain"))
    assert widths == [4, 1, 3], "of the second prompt only what the first pass had not computed"
    list(generate(model, [1, 2, 7, 7], 1, 0, cache=cache, engine="plain"))
    assert widths[3:] == [2]


def test_answers_are_those_of_the_whole_text_written_out():
    talk = conversation()
    talk.system = "Be"
    first = said(talk, "ab")
    second = said(talk, "cd")
    text = f"System:\nBe\n\nUser:\nab\n\nAssistant:\n{first}\n\nUser:\ncd\n\nAssistant:\n"
    assert second == continued(talk.model, text, 6)
    assert [m["content"] for m in talk.messages] == ["ab", first, "cd", second]


def test_the_oldest_exchanges_are_left_out_when_the_context_is_full_and_the_system_prompt_stays():
    talk = conversation("none")
    talk.system = "S" * 20
    for n, forgotten in enumerate([0, 0, 2, 4]):
        answer = said(talk, str(n) * 30, tokens=10)
        assert talk.forgotten == forgotten
    shown = talk.system + "".join(m["content"] for m in talk.messages[4:-1])
    assert len(shown) + 10 <= 120
    assert answer == continued(talk.model, shown, 10)
    assert len(talk.messages) == 8, "nothing is lost"
    shown = talk.system + "".join(m["content"] for m in talk.messages[4:]) + "x"
    assert said(talk, "x", tokens=2) == continued(talk.model, shown, 2)
    assert talk.forgotten == 4, "there is room again for the same exchanges"


def test_a_message_too_long_for_the_context_is_refused_and_not_said():
    talk = conversation()
    said(talk, "ab")
    before = list(talk.messages)
    with pytest.raises(SurgeryError, match=r"has 225 tokens.*block_size is 120, of which 6"):
        talk.ask("x" * 206, 6)
    assert talk.messages == before


def test_an_answer_ends_where_the_context_is_full():
    talk = conversation("none")
    assert len(said(talk, "x" * 50, tokens=1000)) == 70


def test_an_answer_that_was_stopped_is_remembered_as_far_as_it_came():
    talk = conversation("none")
    pieces = talk.ask("ab", 50, seed=SEED)
    assert talk.messages[-1]["content"] == ""
    taken = next(pieces) + next(pieces)
    assert talk.messages[-1]["content"] == taken
    with_cache = said(talk, "cd")
    assert with_cache == continued(talk.model, f"ab{taken}cd", 6)


def test_undo_takes_one_exchange_back_and_reset_all():
    talk = conversation("none")
    first = said(talk, "ab")
    assert said(talk, "ab") != first
    assert talk.undo() == "ab"
    assert talk.undo() == "ab"
    assert talk.messages == []
    with pytest.raises(SurgeryError, match="nothing has been said"):
        talk.undo()
    assert said(talk, "ab") == first
    talk.reset()
    assert said(talk, "ab") == first


def test_a_plain_answer_ends_before_the_next_speaker():
    """The model is made to write what a user would say next."""
    talk = conversation()
    script = TOKENIZER.encode(" fine.\n\nUser:\nand")
    begin = len(TOKENIZER.encode("User:\nab\n\nAssistant:\n"))

    def scripted(hidden):
        place = len(talk.ids) - begin
        return torch.nn.functional.one_hot(torch.tensor(script[place]), 96) * 1e4

    talk.model.lm_head.forward = scripted
    assert said(talk, "ab", 16) == " fine."
    assert talk.messages[-1]["content"] == " fine."


def test_a_models_own_template_is_used_and_bos_comes_once():
    source = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}:{{ m['content'] }}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant:{% endif %}"
    )
    tokenizer = PretrainedTokenizer(byte_level(), bos_id=0, stop_ids=[2], chat_template=source)
    config = GPTConfig.for_family(
        "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=1, block_size=120
    )
    talk = Conversation(tiny_model(config), tokenizer)
    said(talk, "hello")
    text = "<|endoftext|><|im_start|>user:hello<|im_end|><|im_start|>assistant:"
    prompt = talk.ids[: len(tokenizer.encode(text))]
    assert prompt == tokenizer.encode(text)
    assert prompt.count(0) == 1


def test_a_chatml_answer_ends_at_its_end_where_the_tokenizer_stops_at_another_token():
    tokenizer = PretrainedTokenizer(byte_level(), stop_ids=[0])
    config = GPTConfig.for_family(
        "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=1, block_size=120
    )
    talk = Conversation(tiny_model(config), tokenizer)
    script = tokenizer.encode(" fine.<|im_end|>\n<|im_start|>user")
    begin = len(tokenizer.encode(talk.template.render([{"role": "user", "content": "ab"}])))

    def scripted(hidden):
        place = len(talk.ids) - begin
        return torch.nn.functional.one_hot(torch.tensor(script[place]), 300) * 1e4

    talk.model.lm_head.forward = scripted
    assert said(talk, "ab", len(script)) == " fine."


def test_an_empty_stop_string_is_refused_before_anything_is_said():
    talk = conversation()
    with pytest.raises(SurgeryError, match="a stop string is empty"):
        talk.ask("ab", 6, stop=("",))
    assert talk.messages == []


def test_the_search_for_what_fits_begins_where_the_last_one_ended(monkeypatch):
    """And finds what a search from the beginning finds, whatever happened in between."""
    written, render = [], ChatTemplate.render

    def counted(self, messages):
        written.append(len(messages))
        return render(self, messages)

    monkeypatch.setattr(ChatTemplate, "render", counted)
    talk = conversation("none")
    for n in range(24):
        said(talk, str(n) * 9, tokens=10)
    assert talk.forgotten > 30
    written.clear()
    said(talk, "x" * 20, tokens=10)
    assert sum(written) < 40, "of 49 messages in all"
    for _ in range(20):
        talk.undo()
    said(talk, "y", tokens=10)
    anew = conversation("none")
    anew.messages = talk.messages[:-2]
    said(anew, "y", tokens=10)
    assert talk.forgotten == anew.forgotten
    assert talk.messages == anew.messages


def test_an_answer_that_a_stop_string_ends_in_its_last_token_is_not_cut_off():
    talk = conversation()
    answer = said(talk, "hello", 6)
    assert talk.cut_off, "it had no more room"
    again = conversation()
    assert said(again, "hello", 6, stop=(answer,)) == "", "a stop string is not shown"
    assert not again.cut_off
