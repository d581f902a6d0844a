"""Structure and vocabulary of a folder change together; transformers opens what comes out."""

import json
import shutil

import pytest
import torch
from helpers.folders import CONFIG
from helpers.models import assert_equal_logits, randomise, tiny_model
from helpers.tokenizers import TEXT, byte_level
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Encoder
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from nanogpt_surgery import (
    BPETokenizer,
    CharacterTokenizer,
    GPTConfig,
    SurgeryError,
    open_model,
    save_model,
)
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer
from nanogpt_surgery.formats.folders.operating import operate_on_folder
from nanogpt_surgery.history.folder_history import folder_log, hashes_of, redo_folder, undo_folder
from nanogpt_surgery.surgery import (
    add_tokens,
    drop_unused_tokens,
    duplicate_layers,
    prune_layers,
)

SIZES = {
    "hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "num_hidden_layers": 3, "max_position_embeddings": 40, "intermediate_size": 28,
}  # fmt: skip
WINDOW = {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 8}
THEIRS = {
    "gpt2": GPT2Config(n_embd=24, n_head=3, n_layer=3, n_positions=40),
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES, **WINDOW, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
}


VOCABULARY = PretrainedTokenizer(byte_level(330))


def pruning(*layers):
    return lambda model, _, **how: prune_layers(model, layers, **how)


def doubling(*layers):
    return lambda model, _, **how: duplicate_layers(model, layers, **how)


def adding(*tokens, **options):
    return lambda model, tokenizer, **how: add_tokens(model, tokenizer, tokens, **how, **options)


def dropping(text):
    return lambda model, tokenizer, probe, plan: drop_unused_tokens(
        model, tokenizer, text, plan=plan
    )


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A folder of each family as transformers writes it, with a tokenizer of its own."""
    place = tmp_path_factory.mktemp("theirs")
    encoder = Encoder.from_str(json.dumps(VOCABULARY.to_json()))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=encoder, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    for name, config in THEIRS.items():
        config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), 2, 0
        config.bos_token_id = 1
        model = AutoModelForCausalLM.from_config(config).eval()
        randomise(model)
        model.save_pretrained(place / name)
        tokenizer.save_pretrained(place / name)
    return place


@pytest.fixture(params=THEIRS)
def folder(request, originals, tmp_path):
    return shutil.copytree(originals / request.param, tmp_path / "m")


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@torch.no_grad()
def assert_agrees(folder, text=TEXT[:30]):
    """Tokenizer, logits and config are the same to transformers as they are here."""
    model, tokenizer = open_model(folder)
    theirs, their_tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer.encode(text)
    assert their_tokenizer.encode(text, add_special_tokens=False) == ids
    assert their_tokenizer.decode(ids) == text
    ids = torch.tensor([ids])
    assert_equal_logits(model(ids), theirs(ids).logits)
    assert theirs.config.vocab_size == model.config.vocab_size
    assert theirs.config.num_hidden_layers == len(model.layers)
    assert their_tokenizer.eos_token_id == getattr(tokenizer, "eos_id", None)
    return model, tokenizer, theirs


@torch.no_grad()
def test_a_pruned_and_a_doubled_folder_open_in_transformers(folder):
    before, config = hashes_of(folder), config_of(folder)
    ids = torch.tensor([[5, 7, 11]])
    plain = open_model(folder)[0](ids)
    report = operate_on_folder(folder, doubling(1, 1))
    assert report.summary["largest_error"] == 0
    model, *_ = assert_agrees(folder)
    assert torch.equal(model(ids), plain)
    now = config_of(folder)
    changed = {key for key in now if now[key] != config[key]}
    assert changed <= {"num_hidden_layers", "n_layer", "layer_types", "max_window_layers"}
    for key, value in now.items():
        assert "layer" not in key or not isinstance(value, list) or len(value) == 5
    operate_on_folder(folder, pruning(0, 4), probe=TEXT * 30)
    assert len(assert_agrees(folder)[0].layers) == 3
    rows = folder_log(folder).rows
    assert [row["operation"] for row in rows] == ["duplicate layers 1, 1", "prune layers 0, 4"]
    assert rows[1]["kl"] > 0
    undo_folder(folder)
    undo_folder(folder)
    assert hashes_of(folder) == before


def test_tokens_are_added_and_dropped_as_transformers_reads_them(folder):
    before = hashes_of(folder)
    operate_on_folder(folder, adding("brown fox", "<tool>"))
    model, tokenizer, _ = assert_agrees(folder, "The brown fox <tool>")
    size = VOCABULARY.vocab_size
    assert model.config.vocab_size == size + 2
    assert tokenizer.encode("brown fox") == [size]
    operate_on_folder(folder, dropping("The quick brown fox"))
    _, tokenizer, theirs = assert_agrees(folder, "The quick brown fox and naïve")
    assert tokenizer.id_of("<|im_end|>") == tokenizer.eos_id
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == theirs.config.eos_token_id == tokenizer.eos_id
    assert theirs.config.pad_token_id == tokenizer.id_of("<|endoftext|>")
    undo_folder(folder)
    undo_folder(folder)
    assert hashes_of(folder) == before
    redo_folder(folder)
    assert_agrees(folder, "The brown fox <tool>")


@pytest.mark.parametrize(
    "tokenizer", [BPETokenizer.train(TEXT, 300), CharacterTokenizer(TEXT)], ids=["bpe", "letters"]
)
def test_folders_of_ours_too(tokenizer, tmp_path):
    config = GPTConfig.for_family("gpt2", vocab_size=tokenizer.vocab_size, n_embd=24, n_head=3)
    save_model(tiny_model(config), tmp_path / "m", tokenizer)
    before = hashes_of(tmp_path / "m")
    operate_on_folder(tmp_path / "m", adding("✂"), tmp_path / "more")
    operate_on_folder(tmp_path / "more", dropping("The quick brown ✂ fox"), tmp_path / "less")
    for name in ("more", "less"):
        assert_agrees(tmp_path / name, "The quick brown ✂ fox")
    assert open_model(tmp_path / "less")[0].config.vocab_size < config.vocab_size
    assert hashes_of(tmp_path / "m") == before
    assert folder_log(tmp_path / "less").rows[0]["operation"].startswith("drop ")
    with pytest.raises(SurgeryError, match="no operation to undo"):
        undo_folder(tmp_path / "less")


def test_files_of_the_old_vocabulary_go_and_come_back(originals, tmp_path):
    folder = shutil.copytree(originals / "gpt2", tmp_path / "m")
    (folder / "tokenizer.json").unlink()
    bpe = BPETokenizer.train(TEXT, 300)
    contents = bpe.to_json()["model"]
    (folder / "vocab.json").write_text(json.dumps(contents["vocab"] | bpe.special))
    (folder / "merges.txt").write_text("\n".join(" ".join(pair) for pair in contents["merges"]))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)
    before = hashes_of(folder)
    operate_on_folder(folder, dropping("The quick brown fox"))
    assert not (folder / "vocab.json").exists()
    assert not (folder / "merges.txt").exists()
    undo_folder(folder)
    assert hashes_of(folder) == before


def test_a_plan_writes_nothing(originals, tmp_path):
    folder = shutil.copytree(originals / "llama", tmp_path / "m")
    before = hashes_of(folder)
    planned = operate_on_folder(folder, pruning(1), plan=True)
    done = operate_on_folder(folder, pruning(1))
    assert done.summary["model_after_bytes"] == planned.summary["model_after_bytes"]
    assert planned.summary["kept_originals_bytes"] > planned.summary["model_before_bytes"]
    undo_folder(folder)
    assert hashes_of(folder) == before
    with pytest.raises(SurgeryError, match="itself"):
        operate_on_folder(folder, pruning(1), folder)
    with pytest.raises(SurgeryError, match="layer 7"):
        operate_on_folder(folder, pruning(7))
    assert hashes_of(folder) == before


def test_an_operation_does_not_undo_another_one_that_was_done_meanwhile(originals, tmp_path):
    folder = shutil.copytree(originals / "llama", tmp_path / "m")

    def slow(model, tokenizer, **how):
        operate_on_folder(folder, adding("<tool>"))
        return prune_layers(model, [1], **how)

    with pytest.raises(SurgeryError, match=r"0 lines.* 1"):
        operate_on_folder(folder, slow)
    assert open_model(folder)[1].id_of("<tool>") == VOCABULARY.vocab_size
    assert [row["operation"] for row in folder_log(folder).rows] == ["add 1 tokens: '<tool>'"]
    assert len(open_model(folder)[0].layers) == 3


def test_each_tensor_keeps_its_dtype(originals, tmp_path):
    model, tokenizer = open_model(originals / "qwen3", torch.bfloat16)
    model.norm.float()
    save_model(model, tmp_path / "m", tokenizer)
    operate_on_folder(tmp_path / "m", doubling(0))
    operate_on_folder(tmp_path / "m", adding("<tool>"))
    again, _ = open_model(tmp_path / "m", "each")
    assert again.norm.weight.dtype == torch.float32
    assert again.embed_tokens.weight.dtype == torch.bfloat16
    assert again.layers[1].mlp.down_proj.weight.dtype == torch.bfloat16


STEPS = {
    "double": doubling(0),
    "prune": pruning(0),
    "add": adding("brown fox"),
    "drop": dropping("The lazy brown fox"),
}


@settings(
    max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(names=st.lists(st.sampled_from(sorted(STEPS)), min_size=2, max_size=4, unique=True))
def test_any_sequence_undone_gives_every_byte_back(originals, tmp_path, names):
    folder = tmp_path / "m"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(originals / "llama", folder)
    states = [hashes_of(folder)]
    for name in names:
        operate_on_folder(folder, STEPS[name])
        states.append(hashes_of(folder))
    for state in states[-2::-1]:
        undo_folder(folder)
        assert hashes_of(folder) == state
