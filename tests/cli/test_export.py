"""`surgery export` to a Hugging Face folder, from a file of another kind."""

from pathlib import Path

import pytest
import torch
from helpers.commands import called, write_adapter
from helpers.models import tiny_model
from helpers.tokenizers import byte_level
from transformers import AutoModelForCausalLM

from nanogpt_surgery import GPTConfig, load_adapter, merge_lora, open_model, save_model
from nanogpt_surgery.data.tokenizers.pretrained_tokenizer import PretrainedTokenizer

CONFIG = GPTConfig.for_family(
    "llama", vocab_size=300, n_embd=24, n_head=6, n_kv_head=2, n_layer=2, block_size=40
)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    model, tokenizer = tiny_model(CONFIG), PretrainedTokenizer(byte_level(), stop_ids=[2])
    save_model(model, tmp_path / "m", tokenizer)
    write_adapter(model, tmp_path / "a", 1)
    called("export", tmp_path / "m", "--format", "F32", "--out", tmp_path / "m.gguf")
    return tmp_path


def test_a_gguf_file_becomes_a_folder_that_transformers_opens(place: Path) -> None:
    form = ["--format", "huggingface", "--out", place / "out"]
    _, errors = called("export", place / "m.gguf", *form)
    assert "and read it again" in errors
    model, tokenizer = open_model(place / "out")
    first, first_tokenizer = open_model(place / "m")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert tokenizer.encode("naïve dogs") == first_tokenizer.encode("naïve dogs")
    theirs = AutoModelForCausalLM.from_pretrained(place / "out").eval()
    with torch.no_grad():
        assert torch.allclose(theirs(IDS).logits, first(IDS), atol=1e-4)
    (place / "diary").mkdir()
    (place / "diary" / "page").write_text("mine")
    form[-1] = place / "diary"
    _, errors = called("export", place / "m.gguf", *form, check=1)
    assert "was not written by this program" in errors
    assert [path.name for path in (place / "diary").iterdir()] == ["page"]


def test_with_an_adapter_the_folder_holds_the_merged_model(place: Path) -> None:
    form = ["--format", "huggingface", "--adapter", place / "a", "--out", place / "out"]
    called("export", place / "m", *form)
    merged, _ = open_model(place / "m")
    load_adapter(merged, place / "a")
    merge_lora(merged)
    with torch.no_grad():
        assert torch.equal(open_model(place / "out")[0](IDS), merged(IDS))
        assert not torch.allclose(open_model(place / "m")[0](IDS), merged(IDS), atol=1e-2)
