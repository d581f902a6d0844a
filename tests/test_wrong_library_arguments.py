"""Every public name, with each argument in turn replaced by what is plausible and wrong.

What is wrong is refused by name, or is a `TypeError` that names the argument; the model keeps every
bit, and nothing is written. A kind of argument is listed with what is no such thing.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import LETTERS
from helpers.models import train_a_little
from helpers.tokenizers import byte_level
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nanogpt_surgery as ns
from nanogpt_surgery.data.tokenizers.token_text import BYTE_OF_CHARACTER
from nanogpt_surgery.errors import SurgeryError

TEXT = "to be, or not to be: that is the question. " * 8


def theirs() -> LlamaForCausalLM:
    """A model of transformers, whose Linears have the names of ours."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip


class Things:
    """What the calls are made with, in a folder of its own."""

    def __init__(self, place: Path):
        self.tokenizer = ns.CharacterTokenizer(LETTERS)
        torch.manual_seed(0)
        sizes = {"n_embd": 8, "n_head": 1, "n_layer": 1, "block_size": 16}
        config = ns.GPTConfig.for_family("llama", vocab_size=self.tokenizer.vocab_size, **sizes)
        self.model = ns.SimpleGPT.from_config(config)
        self.bare = ns.SimpleGPT.from_config(config)
        self.bare.load_state_dict(self.model.state_dict())
        ns.inject_lora(self.model, "q_proj", rank=2)
        train_a_little(self.model)
        self.data = ns.GPTDataset(TEXT, self.tokenizer, 16)
        self.messages = [{"role": "user", "content": "to be?"}]
        self.conversation = [*self.messages, {"role": "assistant", "content": "or not"}]
        self.examples = ns.encode_conversations([self.conversation], self.tokenizer)
        self.template = ns.ChatTemplate("plain")
        (place / "empty").mkdir()
        (place / "text.txt").write_text(TEXT)
        (place / "pairs.json").write_text('[{"instruction": "to be?", "output": "or not"}]')
        (place / "a.json").write_text("{}")
        ns.save_model(self.bare, place / "m", self.tokenizer)
        ns.save_adapter(self.model, place / "a")

    def state(self) -> list[object]:
        """All that a call that fails must leave as it was."""
        return [
            [ns.tensor_hashes(m), [p.requires_grad for p in m.parameters()], m.training, repr(m),
             ns.lora_log(m).rows]
            for m in (self.model, self.bare)
        ] + sorted(Path().rglob("*"))  # fmt: skip


def without(wrong: dict[str, Any], *those: str) -> dict[str, Any]:
    return {key: wrong[key] for key in wrong if key not in those}


ANY_MODULE = {"None": None, "number": 3, "text": "m", "list": [], "a class": nn.Linear, "{}": {}}
SIMPLE_GPT = ANY_MODULE | {"a Linear": nn.Linear(8, 8), "of transformers": theirs()}
PATH = {"None": None, "number": 3, "list": ["m"], "no text": "", "NUL": "a\0b", "bytes": b"m"}
TO_READ = PATH | {"missing": "missing/m", "an empty folder": "empty", "a file": "text.txt"}
A_FILE_TO_READ = PATH | {"missing": "missing/m", "a folder": "empty", "no records": "a.json"}
A_NEW_FOLDER = PATH | {"a file": "text.txt", "in a file": "text.txt/new"}
A_NEW_FILE = PATH | {"a folder": "empty", "in a file": "text.txt/new"}
TEXTS = {"None": None, "number": 3, "list": [1], "bytes": b"to be"}
LIST_OF_PATHS = {"None": None, "number": 3, "[]": [], "[None]": [None], "[3]": [3]}
LIST_OF_TEXT = {"None": None, "number": 3, "text": "to", "[]": [], "[None]": [None], "[3]": [3]}
IDS = {"None": None, "text": "to", "[]": [], "[None]": [None], "['1']": ["1"], "[1.5]": [1.5]}
COUNT = {"None": None, "text": "5", "list": [5], "1.5": 1.5, "0": 0, "-1": -1, "nan": float("nan")}
SEVERAL = {"None": None, "number": 3, "text": "to", "[]": [], "[None]": [None], "[3]": [3]}
A_THING = {"None": None, "number": 3, "text": "to", "[]": [], "{}": {}, "a class": nn.Linear}
OPTION = without(A_THING, "None")
CALLED = without(OPTION, "a class")
TABLE = without(OPTION, "{}")
A_NUMBER = without(OPTION, "number")
STOP_IDS = {"number": 3, "text": "to", "[None]": [None]}
AT_LEAST_0 = without(COUNT, "0")
A_KIND = without(COUNT, "0", "-1")  # its range is not looked at
A_WEIGHT = {"None": None, "text": "1", "list": [1.0], "nan": float("nan")}
NAME = {"None": None, "number": 3, "list": ["default"], "no text": "", "unknown": "q"}
A_NEW_NAME, A_NAME = without(NAME, "unknown"), without(NAME, "None")
SOME = without(SEVERAL, "[]")
A_CHOICE = {"number": 3, "list": [], "unknown": "sometimes"}

# Each public name: how it is called, and for each argument what is no such thing.
CALLS: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {
    "open_model": (lambda t: {"path": "m"}, {"path": TO_READ, "dtype": A_CHOICE}),
    "save_model": (
        lambda t: {"model": t.bare, "folder": "new", "tokenizer": t.tokenizer},
        {"model": SIMPLE_GPT, "folder": A_NEW_FOLDER, "tokenizer": OPTION,
         "source": without(TO_READ, "None")},
    ),
    "load_adapter": (
        lambda t: {"model": t.bare, "folder": "a"},
        {"model": ANY_MODULE, "folder": TO_READ, "name": A_NEW_NAME, "tied": A_CHOICE},
    ),
    "save_adapter": (
        lambda t: {"model": t.model, "folder": "new"},
        {"model": ANY_MODULE, "folder": A_NEW_FOLDER, "base": TEXTS,
         "name": A_NAME},
    ),
    "save_gguf": (
        lambda t: {"model": t.bare, "path": "new.gguf"},
        {"model": SIMPLE_GPT, "path": A_NEW_FILE, "tokenizer": OPTION, "kind": A_CHOICE},
    ),
    "save_lora_gguf": (
        lambda t: {"model": t.model, "path": "new.gguf"}, {"model": SIMPLE_GPT, "path": A_NEW_FILE}
    ),
    "save_mlx_adapter": (
        lambda t: {"model": t.model, "folder": "new"},
        {"model": SIMPLE_GPT, "folder": A_NEW_FOLDER},
    ),
    "save_vllm_adapter": (
        lambda t: {"model": t.model, "folder": "new"},
        {"model": SIMPLE_GPT, "folder": A_NEW_FOLDER},
    ),
    "inject_lora": (
        lambda t: {"model": t.bare, "targets": ["q_proj"]},
        {"model": ANY_MODULE, "targets": LIST_OF_TEXT, "settings": OPTION, "rank": COUNT,
         "name": A_NEW_NAME, "rank_pattern": {"text": "q", "3": 3}},
    ),
    "plan_lora": (
        lambda t: {"model": t.bare, "targets": ["q_proj"]},
        {"model": ANY_MODULE, "targets": LIST_OF_TEXT, "settings": OPTION, "rank": COUNT,
         "as_saved": CALLED | {"None": None}},
    ),
    "merge_lora": (
        lambda t: {"model": t.model},
        {"model": ANY_MODULE, "probe": CALLED, "tolerance": without(A_WEIGHT, "nan")},
    ),
    "merge_survival": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "remove_lora": (
        lambda t: {"model": t.model},
        {"model": ANY_MODULE, "name": A_NAME},
    ),
    "swap_lora": (
        lambda t: {"model": t.model, "name": "default"}, {"model": ANY_MODULE, "name": NAME}
    ),
    "blend_lora": (
        lambda t: {"model": t.model, "weights": {"default": 1.0}},
        {"model": ANY_MODULE,
         "weights": SEVERAL | {"unknown": {"q": 1.0}, "3": {3: 1.0},
         "no number": {"default": "1"}}},
    ),
    "lora_rows": (
        lambda t: {"model": t.model, "names": ["default"]},
        {"model": ANY_MODULE, "names": without(SOME, "[None]")},
    ),
    "enable_lora": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "disable_lora": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "undo_lora": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "redo_lora": (lambda t: {"model": t.bare}, {"model": ANY_MODULE}),
    "lora_log": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "learned": (lambda t: {"model": t.model}, {"model": ANY_MODULE}),
    "tensor_hashes": (lambda t: {"model": t.model}, {"model": ANY_MODULE, "seen": TABLE}),
    "fit": (
        lambda t: {"model": t.bare, "dataset": t.data, "max_steps": 1, "batch_size": 1,
                   "compile": "off", "validation": t.data},
        {"model": ANY_MODULE, "dataset": A_THING, "settings": OPTION, "validation": OPTION,
         "optimizer": OPTION, "first_step": A_KIND, "skipped_before": A_KIND, "max_steps": COUNT,
         "cache_dir": OPTION},
    ),
    "evaluate": (
        lambda t: {"model": t.bare, "dataset": t.data},
        {"model": ANY_MODULE, "dataset": A_THING, "batch_size": COUNT, "processes": A_THING},
    ),
    "generate": (
        lambda t: {"model": t.bare, "ids": [1, 2], "max_new_tokens": 1},
        {"model": SIMPLE_GPT, "ids": IDS | {"number": 3}, "max_new_tokens": AT_LEAST_0,
         "temperature": A_WEIGHT, "top_k": A_NUMBER, "sampling": OPTION,
         "stop_ids": STOP_IDS | {"None": None},
         "seed": A_NUMBER, "cache": OPTION},
    ),
    "generate_speculative": (
        lambda t: {"model": t.bare, "ids": [1, 2], "max_new_tokens": 1, "draft": ns.PromptLookup()},
        {"model": SIMPLE_GPT, "ids": IDS | {"number": 3}, "max_new_tokens": AT_LEAST_0,
         "draft": A_THING, "sampling": OPTION, "stop_ids": STOP_IDS | {"None": None},
         "seed": A_NUMBER, "cache": OPTION},
    ),
    "PromptLookup": (lambda t: {}, {"num_tokens": COUNT, "max_ngram": COUNT}),
    "DraftModel": (lambda t: {"model": t.bare}, {"model": SIMPLE_GPT, "num_tokens": COUNT}),
    "generate_batch": (
        lambda t: {"model": t.bare, "prompts": [[1, 2]], "max_new_tokens": 1},
        {"model": SIMPLE_GPT, "prompts": IDS | {"number": 3, "[[]]": [[]]},
         "max_new_tokens": AT_LEAST_0,
         "sampling": OPTION, "stop_ids": STOP_IDS | {"None": None}, "seed": A_NUMBER,
         "likeliest": AT_LEAST_0,
         "until": CALLED},
    ),
    "generate_text": (
        lambda t: {"model": t.bare, "tokenizer": t.tokenizer, "prompt": [1], "max_new_tokens": 1},
        {"model": SIMPLE_GPT, "tokenizer": A_THING, "prompt": IDS | {"number": 3},
         "max_new_tokens": AT_LEAST_0, "sampling": OPTION, "stop": SOME, "stop_ids": STOP_IDS,
         "seed": A_NUMBER, "cache": OPTION},
    ),
    "multiple_choice": (
        lambda t: {"model": t.bare, "tokenizer": t.tokenizer, "question": "a", "answers": ["b"]},
        {"model": SIMPLE_GPT, "tokenizer": A_THING, "question": TEXTS, "answers": LIST_OF_TEXT},
    ),
    "perplexity": (
        lambda t: {"model": t.bare, "ids": [1, 2, 3]},
        {"model": SIMPLE_GPT, "ids": IDS | {"number": 3}, "stride": A_NUMBER, "batch_size": COUNT,
         "context": A_NUMBER},
    ),
    "Conversation": (
        lambda t: {"model": t.bare, "tokenizer": t.tokenizer},
        {"model": SIMPLE_GPT, "tokenizer": A_THING, "template": OPTION},
    ),
    "chat_ids": (
        lambda t: {"tokenizer": t.tokenizer, "messages": t.messages},
        {"tokenizer": A_THING, "messages": SOME, "template": OPTION},
    ),
    "encode_conversations": (
        lambda t: {"conversations": [t.conversation], "tokenizer": t.tokenizer},
        {"conversations": SOME | {"one": ["to"]}, "tokenizer": A_THING, "template": OPTION},
    ),
    "read_conversations": (lambda t: {"path": "pairs.json"}, {"path": A_FILE_TO_READ}),
    "read_texts": (
        lambda t: {"paths": ["text.txt"]},
        {"paths": LIST_OF_PATHS | {"text": "text.txt", "missing": ["missing"], "empty": ["empty"]}},
    ),
    "split_by_position": (lambda t: {"text": TEXT}, {"text": TEXTS}),
    "ChatTemplate": (
        lambda t: {"source": "plain"},
        {"source": TEXTS, "bos_token": TEXTS, "eos_token": TEXTS,
         "seconds": A_KIND, "special_tokens": TABLE},
    ),
    "GPTDataset": (
        lambda t: {"text": TEXT, "tokenizer": t.tokenizer, "block_size": 16},
        {"text": TEXTS | {"no text": ""}, "tokenizer": A_THING, "block_size": COUNT,
         "stride": COUNT},
    ),
    "InstructionDataset": (
        lambda t: {"examples": t.examples, "block_size": 32},
        {"examples": SEVERAL, "block_size": COUNT, "end_ids": {"number": 3, "text": "to"}},
    ),
    "Mixture": (
        lambda t: {"sources": [t.data, t.data], "weights": [1, 1]},
        {"sources": SEVERAL, "weights": SEVERAL | {"nan": [1, float("nan")], "text": ["1", "1"]}},
    ),
    "CharacterTokenizer": (lambda t: {"text": TEXT}, {"text": TEXTS | {"no text": ""}}),
    "BPETokenizer": (
        lambda t: {"vocab": {c: i for i, c in enumerate(BYTE_OF_CHARACTER)}, "merges": []},
        {"vocab": A_THING, "merges": {"None": None, "text": "to", "[3]": [3]}, "special": TABLE},
    ),
    "PretrainedTokenizer": (lambda t: {"contents": byte_level()}, {"contents": A_THING}),
    "KVCache": (
        lambda t: {"config": t.bare.config, "batch_size": 1},
        {"config": A_THING, "batch_size": A_KIND, "max_length": A_NUMBER, "dtype": A_THING,
         "device": without(A_THING, "text")},
    ),
    "GPTConfig": (
        lambda t: {"vocab_size": 5}, {"vocab_size": COUNT, "n_head": COUNT, "positions": A_CHOICE}
    ),
    "SimpleGPT": (
        lambda t: {"vocab_size": 5}, {"vocab_size": COUNT, "n_head": COUNT, "norm": A_CHOICE}
    ),
    "TransformerEncoderLayer": (lambda t: {"config": t.bare.config}, {"config": A_THING}),
    "RopeScaling": (lambda t: {"factor": 2.0}, {"factor": A_WEIGHT, "rope_type": A_CHOICE}),
    "LoRAEmbedding": (
        lambda t: {"original_layer": nn.Embedding(8, 8)},
        {"original_layer": A_THING},
    ),
    "LoRALinear": (
        lambda t: {"original_layer": nn.Linear(8, 8)},
        {"original_layer": A_THING, "rank": COUNT, "alpha": A_WEIGHT, "dropout": A_WEIGHT},
    ),
    "LoRASettings": (
        lambda t: {}, {"rank": COUNT, "alpha": A_WEIGHT, "rank_pattern": TABLE, "tied": A_CHOICE}
    ),
    "FitSettings": (
        lambda t: {}, {"max_steps": COUNT, "learning_rate": A_WEIGHT, "device": A_CHOICE}
    ),
    "SamplingSettings": (
        lambda t: {}, {"temperature": A_WEIGHT, "top_k": A_NUMBER, "logit_bias": without(A_THING,
         "{}")}
    ),
}  # fmt: skip
NOT_CALLED = {
    "FAMILIES", "Step", "SurgeryError", "SurgeryWarning", "Tokenizer", "python_reference",
    "python_source", "Run", "Training",
}  # fmt: skip
ROWS = [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments]


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Things]:
    """The same for all: no call that fails may change any of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place := tmp_path_factory.mktemp("things"))
        yield Things(place)


def call(name: str, arguments: dict[str, Any]) -> object:
    """The call, and what is first taken from it where it gives things one by one."""
    result = getattr(ns, name)(**arguments)
    if isinstance(result, Iterator):
        return list(islice(result, 2))
    if name == "lora_rows":
        with result:
            pass
    return result


def test_every_public_name_is_swept():
    assert CALLS.keys() | NOT_CALLED == set(ns.__all__)


@pytest.mark.filterwarnings("ignore:no tokenizer was written")
@pytest.mark.parametrize("name", CALLS)
def test_without_a_wrong_argument_it_works(name, tmp_path, monkeypatch):
    """Or else a row below would be refused for another reason."""
    monkeypatch.chdir(tmp_path)
    things = Things(tmp_path)
    if name == "redo_lora":
        ns.inject_lora(things.bare, "q_proj")
        ns.undo_lora(things.bare)
    call(name, CALLS[name][0](things))


@pytest.mark.parametrize(("name", "argument"), ROWS)
def test_a_wrong_argument_is_refused_by_name(name, argument, things):
    right, wrong = CALLS[name][0](things), CALLS[name][1][argument]
    before = things.state()
    for what, value in wrong.items():
        try:
            call(name, right | {argument: value})
        except SurgeryError:
            continue
        except TypeError as error:
            assert argument in str(error), what
        else:
            pytest.fail(f"{what} is taken")
    assert things.state() == before


def test_a_model_of_transformers_is_any_module():
    """Where any module is allowed, one that is no SimpleGPT works."""
    model = theirs()
    before = ns.tensor_hashes(model)
    assert ns.inject_lora(model, ["q_proj"], rank=2).summary["layers"] == 1
    train_a_little(model)
    ns.save_adapter(model, "adapter")
    ns.disable_lora(model), ns.enable_lora(model)
    assert ns.merge_survival(model).rows and ns.learned(model).rows
    data = ns.GPTDataset.from_ids(torch.arange(64) % 32, 8)
    assert [s.step for s in ns.fit(model, data, max_steps=1, batch_size=1, compile="off")] == [1]
    assert ns.evaluate(model, data) > 0
    ns.merge_lora(model)
    for _ in range(4):
        ns.undo_lora(model)
    assert ns.tensor_hashes(model) == before
    ns.load_adapter(model, "adapter")
