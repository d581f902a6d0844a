"""A folder's tokenizer opens here as in transformers, and what is written here opens there."""

import json
import re
from dataclasses import replace
from shutil import copyfile

import pytest
from helpers.models import FAMILY_CONFIGS, tiny_model
from helpers.tokenizers import TEXT, byte_level, sentencepiece_like
from transformers import AutoTokenizer

from nanogpt_surgery import CharacterTokenizer, SurgeryError, SurgeryWarning, open_model, save_model
from nanogpt_surgery.data.tokenizers.bpe_tokenizer import BPETokenizer
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.data.tokenizers.tokenizer import prompt_ids
from nanogpt_surgery.formats.gguf.writing import save_gguf
from nanogpt_surgery.formats.huggingface.tokenizer_files import open_tokenizer
from nanogpt_surgery.formats.model_file import open_tokenizer_of

TOKENIZERS = {
    "characters": CharacterTokenizer(TEXT),
    "bpe": BPETokenizer.train(TEXT, 280),
    "byte-level": PretrainedTokenizer(
        byte_level(), bos_id=1, stop_ids=[2, 0], add_bos=False, chat_template="{{ messages }}"
    ),
    "sentencepiece": PretrainedTokenizer(sentencepiece_like(), bos_id=1, stop_ids=[2]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_tokenizer_comes_back_and_transformers_reads_it(kind, tmp_path):
    tokenizer = TOKENIZERS[kind]
    config = replace(FAMILY_CONFIGS["llama"], vocab_size=tokenizer.vocab_size)
    save_model(tiny_model(config), tmp_path / "m", tokenizer)
    again = open_model(tmp_path / "m")[1]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert type(again) is type(tokenizer)
    assert prompt_ids(again, TEXT) == prompt_ids(tokenizer, TEXT) == theirs(TEXT)["input_ids"]
    assert theirs.decode(again.encode(TEXT)) == again.decode(again.encode(TEXT))
    for name in ("bos_id", "stop_ids", "add_bos", "chat_template"):
        assert getattr(again, name, None) == getattr(tokenizer, name, None), name


def folder_with(tmp_path, contents, **files):
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


@pytest.mark.parametrize("written", ["<|im_end|>", {"content": "<|im_end|>", "lstrip": False}])
def test_what_ends_a_turn_is_gathered_from_every_file(written, tmp_path):
    folder = folder_with(
        tmp_path,
        byte_level(),
        tokenizer_config={"eos_token": written, "bos_token": "<|im_start|>"},
        generation_config={"eos_token_id": [2, 0]},
        config={"eos_token_id": 5},
    )
    tokenizer = open_tokenizer(folder)
    assert tokenizer.stop_ids == {0, 2}  # a generation config wins over the config
    assert tokenizer.eos_id == 2
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)


def test_a_template_is_found_wherever_it_lies(tmp_path):
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]
    folder = folder_with(tmp_path, byte_level(), tokenizer_config={"chat_template": named})
    assert open_tokenizer(folder).chat_template == "D"
    (folder / "chat_template.jinja").write_text("J")
    assert open_tokenizer(folder).chat_template == "J"


def test_a_folder_with_only_gpt2s_two_files_opens(tmp_path):
    trained = BPETokenizer.train(TEXT, 280)
    (tmp_path / "vocab.json").write_text(json.dumps(trained.vocab))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in trained.merges))
    assert open_tokenizer(tmp_path).encode(TEXT) == trained.encode(TEXT)


def test_a_sentencepiece_file_alone_is_said_not_to_be_read(tmp_path):
    assert open_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.model").write_bytes(b"\n")
    with pytest.warns(SurgeryWarning, match="tokenizer.model"):
        assert open_tokenizer(tmp_path) is None


def test_a_foreign_tokenizer_cannot_be_saved(tmp_path):
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    foreign = tiktoken.Encoding("own", pat_str=".", mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(SurgeryError, match="Encoding"):
        save_model(tiny_model(FAMILY_CONFIGS["llama"]), tmp_path / "m", foreign)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_opens_without_the_weights_it_belongs_to(tmp_path):
    tokenizer = TOKENIZERS["byte-level"]
    model = tiny_model(replace(FAMILY_CONFIGS["llama"], vocab_size=tokenizer.vocab_size))
    save_model(model, tmp_path / "m", tokenizer)
    save_gguf(model, tmp_path / "m.gguf", tokenizer, "F32")
    (tmp_path / "m" / "model.safetensors").unlink()
    (tmp_path / "m" / "MANIFEST.json").unlink()
    (tmp_path / "alone").mkdir()
    copyfile(tmp_path / "m" / "tokenizer.json", tmp_path / "alone" / "tokenizer.json")
    for path, context in {
        "m": 19, "m/tokenizer.json": 19, "m.gguf": 19, "alone": None, "alone/tokenizer.json": None,
    }.items():  # fmt: skip
        again, found = open_tokenizer_of(tmp_path / path)
        assert again.encode(TEXT) == tokenizer.encode(TEXT)
        assert found == context
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(SurgeryError, match=re.escape(str(tmp_path / "m"))):
        open_tokenizer_of(tmp_path / "m")
