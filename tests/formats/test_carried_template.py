"""The chat template beside an adapter is that of every model that the adapter is merged into."""

import json
import shlex
import urllib.request

import pytest
from helpers.commands import LETTERS, called, write_adapter
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import byte_level
from transformers import PreTrainedTokenizerFast

from nanogpt_surgery import (
    BPETokenizer,
    CharacterTokenizer,
    GPTConfig,
    open_model,
    save_model,
)
from nanogpt_surgery.data.conversations.chat import named_template, template_of, to_jinja
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.folders.merging import merge_adapter
from nanogpt_surgery.history.folder_history import hashes_of, undo_folder

STORED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}: {{ m.content }}]\n{% endfor %}ünd"
TALK = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me"}]
OTHERS = {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}
TOKENIZERS = {
    "characters": lambda: CharacterTokenizer(LETTERS),
    "our BPE": lambda: BPETokenizer.train(LETTERS * 9, 270),
    "another's": lambda: PretrainedTokenizer(byte_level(), bos_id=1, stop_ids=[2]),
    "with a template": lambda: PretrainedTokenizer(byte_level(), chat_template="{{ 1 }}"),
    "with two": lambda: PretrainedTokenizer(
        byte_level(), chat_template=OTHERS["default"], chat_templates=OTHERS
    ),
}
WAYS = {
    "merge": "merge {t}/base {t}/a --force --out {t}/out",
    "export": "export {t}/base --adapter {t}/a --force --format huggingface --out {t}/out",
    "gguf": "export {t}/base --adapter {t}/a --force --format F32 --out {t}/out.gguf",
}


def write_both(place, tokenizer):
    """A model, and beside it an adapter with a template."""
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 64}
    model = tiny_model(GPTConfig(**FAMILY_CONFIGS["llama"].to_dict() | sizes))
    save_model(model, place / "base", tokenizer)
    write_adapter(model, place / "a", 1)
    (place / "a" / "chat_template.jinja").write_text(STORED, encoding="utf-8")


def rendered(folder, conversation=TALK, **more):
    """A conversation as transformers renders it."""
    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    return theirs.apply_chat_template(conversation, tokenize=False, **more)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_adapters_template_is_the_merged_models(kind, way, tmp_path):
    write_both(tmp_path, TOKENIZERS[kind]())
    called(*shlex.split(WAYS[way].format(t=tmp_path)))
    model, tokenizer = open_model(tmp_path / ("out.gguf" if way == "gguf" else "out"))
    assert (tokenizer.chat_template, template_of(tokenizer).source) == (STORED, STORED)
    expected = rendered(tmp_path / "base", chat_template=STORED)
    assert expected.endswith("ünd")
    assert template_of(tokenizer).render(TALK, ask=False) == expected
    if way != "gguf":
        assert rendered(tmp_path / "out") == rendered(tmp_path / "out", tools=[]) == expected
    save_model(model, tmp_path / "again", tokenizer)
    assert rendered(tmp_path / "again") == expected


def test_named_templates_of_the_base_give_way(tmp_path):
    """They lie in a folder of their own in newer models; transformers would take one for tools."""
    write_both(tmp_path, TOKENIZERS["another's"]())
    more = tmp_path / "base" / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text(OTHERS["tool_use"])
    called(*shlex.split(WAYS["merge"].format(t=tmp_path)))
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "out")
    assert theirs.chat_template == STORED
    assert (more / "tool_use.jinja").is_file()


@pytest.mark.parametrize("kind", ["characters", "with a template", "with two"])
def test_in_place_too_and_undo_takes_it_back(kind, tmp_path):
    write_both(tmp_path, TOKENIZERS[kind]())
    before = hashes_of(tmp_path / "base")
    expected = rendered(tmp_path / "base", chat_template=STORED)
    merge_adapter(tmp_path / "base", tmp_path / "a", force=True)
    assert rendered(tmp_path / "base") == expected
    undo_folder(tmp_path / "base")
    assert hashes_of(tmp_path / "base") == before


def test_an_adapter_without_one_leaves_the_models_own(tmp_path):
    write_both(tmp_path, TOKENIZERS["with a template"]())
    (tmp_path / "a" / "chat_template.jinja").unlink()
    called(*shlex.split(WAYS["merge"].format(t=tmp_path)))
    assert rendered(tmp_path / "out") == "1"


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_one_of_ours_is_known_after_the_merge_with_its_stops(name, tmp_path):
    write_both(tmp_path, TOKENIZERS["characters"]())
    _, tokenizer = open_model(tmp_path / "base")
    ours = named_template(tokenizer, name)
    (tmp_path / "a" / "chat_template.jinja").write_text(to_jinja(ours, tokenizer))
    called(*shlex.split(WAYS["merge"].format(t=tmp_path)))
    found = template_of(open_model(tmp_path / "out")[1])
    assert (found.source, found.stop) == (name, ours.stop)
    _, said = called("ask", tmp_path / "out", "who?", "--max-new-tokens", 2)
    assert "no chat template" not in said


@pytest.mark.parametrize("kind", ["characters", "another's"])
def test_llama_cpp_renders_the_same(kind, tmp_path):
    from helpers.llama_cpp import answering_server

    write_both(tmp_path, TOKENIZERS[kind]())
    called(*shlex.split(WAYS["gguf"].format(t=tmp_path)))
    running = answering_server(tmp_path / "out.gguf")
    request = urllib.request.Request(
        f"{running.listening_address}/apply-template",
        json.dumps({"messages": TALK[:1]}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        prompt = json.load(answer)["prompt"]
    assert prompt == rendered(tmp_path / "base", chat_template=STORED, conversation=TALK[:1])
