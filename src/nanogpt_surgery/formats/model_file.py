"""Opening and saving models: `open_model` takes whatever the path holds, `save_model` writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nanogpt_surgery.data.character_tokenizer import CharacterTokenizer
from nanogpt_surgery.data.tokenizer import Tokenizer
from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files import (
    read_json,
    refuse_damage,
    whole_folder,
    write_json,
    write_tensors,
)
from nanogpt_surgery.formats.huggingface import OWN, config_from_json, config_to_json
from nanogpt_surgery.formats.name_map import normal_names, to_ours, to_theirs
from nanogpt_surgery.formats.run_folder import chosen_checkpoint, is_run
from nanogpt_surgery.lora.operations import has_lora
from nanogpt_surgery.lora.peft_config import CONFIG as ADAPTER_CONFIG
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.simple_gpt import SimpleGPT

CONFIG, TENSORS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save_model(model: SimpleGPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a model folder in Hugging Face's form, whole or not at all.

    A model on a family's axes is written under the family's names and opens in transformers.
    Whether the head is tied is read from the tensors. `MANIFEST.json` holds sizes and hashes.

    Raises:
        SurgeryError: the model carries a LoRA, or the folder holds something else.
    """
    with whole_folder(folder) as temporary:
        write_model_files(model, temporary, tokenizer)


def write_model_files(model: SimpleGPT, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write the files of a model folder into a folder that is being made."""
    if has_lora(model):
        raise SurgeryError(
            "the model carries a LoRA, which a model folder has no place for",
            "save_adapter(model, folder), or merge_lora(model) or remove_lora(model) first",
        )
    weight = model.lm_head.weight
    tied = weight is model.embed_tokens.weight
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    contents = config_to_json(model.config, tied, str(weight.dtype).removeprefix("torch."))
    if contents["model_type"] != OWN:
        tensors = to_theirs(tensors, contents["model_type"], model.config.n_layer)
    write_json(folder / CONFIG, contents)
    write_tensors(tensors, folder / TENSORS)
    if tokenizer is not None:
        if not isinstance(tokenizer, CharacterTokenizer):
            raise SurgeryError(f"a {type(tokenizer).__name__} cannot be written as {TOKENIZER}")
        tokenizer.save(folder / TOKENIZER)
        write_json(folder / "tokenizer_config.json", _tokenizer_config(model.config))


def _tokenizer_config(config: GPTConfig) -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.block_size,
    }


def open_model(path: str | Path) -> tuple[SimpleGPT, Tokenizer | None]:
    """Open a model folder, or the best checkpoint of a run folder, in eval mode on the CPU.

    Returns:
        The model, and its tokenizer if the folder has one.

    Raises:
        SurgeryError: nothing is there, it is damaged, or it is a model that we do not have.
    """
    folder = model_folder(path)
    refuse_damage(folder)
    contents = read_json(folder / CONFIG)
    config = config_from_json(contents)
    with torch.device("meta"), _NothingDrawn():
        model = SimpleGPT.from_config(config)
    tensors = _read_tensors(folder / TENSORS)
    unknown: list[str] = []
    if (family := contents["model_type"]) != OWN:
        tensors, unknown = to_ours(normal_names(tensors, family), family, config.n_layer)
    if config.tie_head and "embed_tokens.weight" in tensors:
        tensors.setdefault("lm_head.weight", tensors["embed_tokens.weight"])
    _check_tensors(model, tensors, unknown, folder)
    model.load_state_dict(tensors, assign=True)
    if config.tie_head:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval(), _tokenizer(folder)


class _NothingDrawn(TorchFunctionMode):
    """Constructors draw no weights: those on the meta device have no numbers.

    Without it torch takes seconds, the first time, to find out that there is nothing to draw.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass over every draw from a normal distribution, call anything else."""
        kwargs = kwargs or {}
        if func is nn.init.normal_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means: itself, or the checkpoint chosen in a run folder."""
    path = Path(path)
    if is_run(path):
        path = chosen_checkpoint(path)
    if (path / ADAPTER_CONFIG).is_file():
        raise SurgeryError(
            f"{path} is an adapter, not a model", "name its model, and the adapter with --adapter"
        )
    if not (path / CONFIG).is_file():
        there = "there is no such folder" if not path.exists() else f"it holds no {CONFIG}"
        raise SurgeryError(
            f"{path} is neither a run nor a model folder: {there}",
            "surgery train --out RUN makes a run",
        )
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise SurgeryError(f"{path} is missing")
    try:
        with safe_open(path, "pt") as file:
            # Copies: the file may be replaced while the model is in use.
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SurgeryError(f"{path} is not a safetensors file: {error}") from None


def _check_tensors(
    model: SimpleGPT, tensors: dict[str, Tensor], unknown: list[str], folder: Path
) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is unknown" for name in unknown + sorted(set(tensors) - set(expected))]
    for name, tensor in tensors.items():
        shape, wanted = tuple(tensor.shape), expected.get(name, tuple(tensor.shape))
        if shape != wanted:
            problems.append(f"{name} is {shape}, the config says {wanted}")
        if not tensor.is_floating_point():
            problems.append(f"{name} holds {tensor.dtype}, not floating-point numbers")
    if not problems and model.config.tie_head and not _same(tensors):
        problems.append("lm_head.weight differs from the embedding to which the config ties it")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; {len(problems) - 8} more" if problems[8:] else "")
        raise SurgeryError(f"the tensors in {folder} do not fit its {CONFIG}: {shown}")


def _same(tensors: dict[str, Tensor]) -> bool:
    head, embedding = tensors["lm_head.weight"], tensors["embed_tokens.weight"]
    return head.dtype == embedding.dtype and torch.equal(head, embedding)


def _tokenizer(folder: Path) -> Tokenizer | None:
    path = folder / TOKENIZER
    return CharacterTokenizer.from_json(read_json(path)) if path.is_file() else None
