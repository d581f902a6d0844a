"""Opening and saving models: `open_model` takes whatever the path holds, `save_model` writes it.

A model that is named as on the Hugging Face hub is fetched by `huggingface_hub` and kept in its
cache. What is there is used without asking the network. Only weights in safetensors and JSON files
are fetched, never code; a download that was cut off goes on where it stopped.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanogpt_surgery.arguments import check_arguments
from nanogpt_surgery.data.tokenizers.tokenizer import Tokenizer, required_tokenizer
from nanogpt_surgery.errors import SurgeryError, foreign_file, nearest, warn
from nanogpt_surgery.files.atomic import check_undamaged, write_folder
from nanogpt_surgery.files.writing import read_json, write_json
from nanogpt_surgery.formats.comparison import check_equal
from nanogpt_surgery.formats.folders.old_keys import with_current_fields, with_current_modules
from nanogpt_surgery.formats.folders.run_folder import checkpoints, chosen_checkpoint, is_run
from nanogpt_surgery.formats.gguf.file import is_gguf, read_gguf
from nanogpt_surgery.formats.gguf.model import config_of, open_gguf
from nanogpt_surgery.formats.gguf.tokenizer import tokenizer_of
from nanogpt_surgery.formats.huggingface.config import (
    CONFIG,
    MODEL_TYPES,
    OWN,
    config_from_json,
    config_to_json,
    in_step,
)
from nanogpt_surgery.formats.huggingface.name_map import (
    NAME_MAPS,
    Row,
    each_layer,
    identity,
    normal_names,
    to_theirs,
)
from nanogpt_surgery.formats.huggingface.safetensors_file import stored_tensors, write_tensors
from nanogpt_surgery.formats.huggingface.special_tokens import GENERATION_CONFIG, read_object
from nanogpt_surgery.formats.huggingface.tokenizer_files import (
    CHAT_TEMPLATE,
    CHAT_TEMPLATES,
    TOKENIZER,
    VOCABULARY_FILES,
    check_ids,
    moved_ids,
    open_tokenizer,
    special_ids,
    with_moved_ids,
    write_tokenizer_files,
)
from nanogpt_surgery.formats.peft.config import CONFIG as ADAPTER_CONFIG
from nanogpt_surgery.formats.placing import Dtype, build_model, usual_dtype
from nanogpt_surgery.history.folder_history import operations_on
from nanogpt_surgery.lora.merging import in_turn
from nanogpt_surgery.lora.several import has_lora
from nanogpt_surgery.model.config import GPTConfig
from nanogpt_surgery.model.quantized import Quantization, check_computes_in, check_not_quantized
from nanogpt_surgery.model.simple_gpt import SimpleGPT

TENSORS = "model.safetensors"


@check_arguments
def save_model(
    model: SimpleGPT,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    source: str | Path | None = None,
) -> None:
    """Writes a model folder in Hugging Face's form, whole or not at all.

    A model on a family's axes is written under the family's names and opens in transformers.
    Whether the head is tied is read from the tensors. `MANIFEST.json` holds sizes and hashes. What
    is written is opened again and compared before it counts as written. A folder of ours that lies
    there is replaced, in one step, if nothing in it would be lost.

    Args:
        model: what is written, every tensor in the dtype that it has.
        folder: made, or replaced.
        tokenizer: written beside the weights.
        source: what model and tokenizer were opened from; what a folder holds there beside the
            weights (generation_config.json, the tokenizer's files, the rest of its config) is
            carried over.

    Raises:
        SurgeryError: the model carries a LoRA, or the folder holds something else, or what was
            written does not read back. There is no new folder then.
    """

    def write(new: Path) -> None:
        write_model_files(model, new, tokenizer, source)
        again, tokenizer_again = open_model(new, "each")
        check_equal(model, again, tokenizer, tokenizer_again)

    write_folder(folder, write)


def write_model_files(
    model: SimpleGPT,
    folder: Path,
    tokenizer: Tokenizer | None = None,
    source: str | Path | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    make: Callable[[str], Tensor] | None = None,
) -> None:
    """Writes the files of a model folder into a folder that is being made; see `save_model`.

    With `make`, which gives each tensor by its name in the model, and their `dtypes`, no two need
    be in memory, but for those that a format fuses.
    """
    check_not_quantized(model, "a model folder")
    if has_lora(model):
        raise SurgeryError(
            "the model carries a LoRA, which a model folder has no place for",
            "save_adapter(model, folder), or merge_lora(model) or remove_lora(model) first",
        )
    tied = model.lm_head.weight is model.embed_tokens.weight
    shapes = {
        name: torch.empty(t.shape, dtype=dtypes[name] if dtypes else t.dtype, device="meta")
        for name, t in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    dtype = usual_dtype((shape.dtype, shape.numel()) for shape in shapes.values())
    contents = config_to_json(model.config, tied, str(dtype).removeprefix("torch."))
    table = NAME_MAPS.get(contents["model_type"]) or identity(shapes)
    rows = list(each_layer(table, model.config.n_layer))
    contents |= special_ids(tokenizer)
    if source is not None and not is_gguf(Path(source)):
        carried = model_folder(source)
        contents = _carried_config(carried, contents, model.config, tied)
        moved = moved_ids(carried, tokenizer)
        contents = contents if moved is None else with_moved_ids(contents, moved)
        _carry_files(carried, folder, moved)
    write_json(folder / CONFIG, contents)
    made = partial(_theirs, make=make or model.state_dict().__getitem__, rows=rows)
    in_order = partial(in_turn, made) if make else partial(map, made)
    write_tensors(to_theirs(shapes, rows), folder / TENSORS, in_order)
    if tokenizer is not None and not any((folder / name).is_file() for name in _VOCABULARIES):
        write_tokenizer_files(tokenizer, folder, model.config.block_size)


def _theirs(name: str, make: Callable[[str], Tensor], rows: list[Row]) -> Tensor:
    """The tensor of a family's name, from ours by ours."""
    theirs, _, kind = name.rpartition(".")
    row = next(row for row in rows if row.theirs == theirs)
    return to_theirs({f"{n}.{kind}": make(f"{n}.{kind}") for n in row.ours}, [row])[name]


_VOCABULARIES = (TOKENIZER, "vocab.json", "tokenizer.model")
_CARRIED = (
    *_VOCABULARIES,
    GENERATION_CONFIG,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    CHAT_TEMPLATE,
)


def _carry_files(source: Path, new: Path, moved: dict[int, int] | None = None) -> None:
    """Copies the files of a model folder beside its weights and config: none is ours to drop.

    With another vocabulary, whose ids are `moved`, those of the tokenizer are written anew.
    """
    for name in _CARRIED:
        if (source / name).is_file() and (moved is None or name not in VOCABULARY_FILES):
            shutil.copyfile(source / name, new / name)
    if moved is not None and (new / GENERATION_CONFIG).is_file():
        contents = with_moved_ids(read_object(new / GENERATION_CONFIG), moved)
        write_json(new / GENERATION_CONFIG, contents)
    if (source / CHAT_TEMPLATES).is_dir():
        shutil.copytree(source / CHAT_TEMPLATES, new / CHAT_TEMPLATES)


_RESIZED = ("n_layer", "vocab_size")  # what operations on the structure change


def _carried_config(
    source: Path, written: dict[str, Any], config: GPTConfig, tied: bool
) -> dict[str, Any]:
    """Returns the `config.json` of `source`, with the dtype and the tied head as written.

    The number of layers and of tokens may be others than there. Of another model (other sizes
    than `config`) nothing is taken over.
    """
    old = read_json(source / CONFIG)
    try:
        theirs = config_from_json(old)
    except SurgeryError:
        return written
    alike = {name: getattr(config, name) for name in ("tie_head", "dropout", *_RESIZED)}
    if replace(theirs, **alike) != config:
        return written
    old = in_step(with_current_fields(old) if old["model_type"] == OWN else old, theirs, config)
    changed: dict[str, Any] = {
        key: written["dtype"] for key in ("dtype", "torch_dtype") if key in old
    }
    if theirs.tie_head != tied:
        changed |= {key: tied for key in ("tie_word_embeddings", "tie_head") if key in written}
    return old | changed


@check_arguments
def open_model(
    path: str | Path, dtype: Dtype = None, *, quantize: Quantization | None = None
) -> tuple[SimpleGPT, Tokenizer | None]:
    """Opens whatever a path holds, in eval mode on the CPU.

    Weights are mapped where the file holds them as the model needs them, and otherwise read piece
    by piece, so they are never held twice.

    Args:
        path: a model folder in Hugging Face's form, a run folder (its best checkpoint), a GGUF
            file, or a name on the Hugging Face hub ("HuggingFaceTB/SmolLM2-135M").
        dtype: of the weights; None: as most of them are stored, float32 if they are quantised;
            "each": every tensor in its own, to be written again: a model of several dtypes does
            not compute.
        quantize: keep the matrices in 8 or 4 bits (`QuantizedLinear`), and compute in float32;
            the numbers that they were rounded from are not kept. Blocks of a GGUF file that are no
            wider stay as they lie there.

    Returns:
        The model, and its tokenizer if there is one.

    Raises:
        SurgeryError: nothing is there, it is damaged, it is a model that we do not have, or another
            dtype than float32 is asked for beside `quantize`.
    """
    if quantize is not None:
        dtype = check_computes_in(dtype)
    if is_gguf(Path(path)):
        return open_gguf(path, dtype, quantize)
    folder = model_folder(path)
    if folder == Path(path) or not is_run(path):  # a checkpoint was read when it was chosen
        check_undamaged(folder)
    return _opened(folder, dtype, quantize)


def _opened(
    folder: Path, dtype: Dtype, quantize: Quantization | None
) -> tuple[SimpleGPT, Tokenizer | None]:
    contents = read_json(folder / CONFIG)
    if isinstance(contents, dict) and contents.get("auto_map"):
        warn(f"{folder / CONFIG} asks for code of its own (auto_map), which is not run")
    with foreign_file(folder / CONFIG):
        config = config_from_json(contents)
    stored = stored_tensors(folder, TENSORS)
    family = MODEL_TYPES.get(contents["model_type"], OWN)
    if family == OWN:
        stored = with_current_modules(stored)
    table = identity(stored) if family == OWN else NAME_MAPS[family]
    names = normal_names(stored, family)
    tokenizer = open_tokenizer(folder)  # first: what it needs in passing is free again for weights
    check_ids(tokenizer, config.vocab_size, folder)
    return build_model(config, names, table, dtype, str(folder), quantize), tokenizer


def open_tokenizer_of(path: str | Path) -> tuple[Tokenizer, int | None]:
    """The tokenizer of whatever `open_model` opens, without the weights, and the longest context.

    A tokenizer alone serves as well, as a `tokenizer.json` or the folder that holds it; its context
    is None.

    Raises:
        SurgeryError: there is no tokenizer that can be read.
    """
    path = Path(path)
    alone = path.parent if path.name == TOKENIZER else path
    config: GPTConfig | None = None
    if is_gguf(path):
        file = read_gguf(path)
        tokenizer = tokenizer_of(file.metadata)
        _, config = config_of(file)
    elif (alone / TOKENIZER).is_file() and not (alone / CONFIG).is_file():
        tokenizer = open_tokenizer(alone)
    else:
        folder = model_folder(alone if alone.is_dir() else path)
        tokenizer = open_tokenizer(folder)
        config = config_from_json(read_json(folder / CONFIG))
    if config is not None:
        check_ids(tokenizer, config.vocab_size, path)
    context = None if config is None else config.block_size
    return required_tokenizer(tokenizer, str(path)), context


MERGE_FIRST = "name its model, or merge them: merge_adapter({base}, {path}, out=FOLDER)"


def check_adapter(path: str | Path, hint: str = MERGE_FIRST) -> None:
    """Raises `SurgeryError` for an adapter, or the run of one, where a model is needed.

    The hint may hold {path} and {base}, the model that the adapter names.
    """
    newest = checkpoints(Path(path))[-1:] if is_run(path) else [Path(path)]
    for config in [folder / ADAPTER_CONFIG for folder in newest]:
        if config.is_file():
            contents = read_json(config)
            named = contents.get("base_model_name_or_path") if isinstance(contents, dict) else None
            raise SurgeryError(
                f"{path} is an adapter, not a model", hint.format(path=path, base=named or "MODEL")
            )


def model_folder(path: str | Path) -> Path:
    """The model folder that a path means.

    It is the path itself, the checkpoint chosen in a run folder that was not operated on since, or
    the copy of a model on the hub.
    """
    folder = Path(path)
    check_adapter(folder)
    if is_run(folder) and not operations_on(folder):
        folder = chosen_checkpoint(folder)
    if not folder.exists() and is_hub_name(str(path)):
        return hub_folder(str(path))
    if not (folder / CONFIG).is_file():
        there = "there is no such folder" if not folder.exists() else f"it holds no {CONFIG}"
        raise SurgeryError(
            f"{folder} is neither a run nor a model folder: {there}",
            "a training makes a run",
        )
    return folder


_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_FILES = ["*.json", "*.safetensors", "merges.txt", "chat_template.jinja"]


def is_hub_name(name: str) -> bool:
    """Whether it has the form of a name on the hub, owner/model."""
    return _NAME.fullmatch(name) is not None and ".." not in name


def hub_folder(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a model of the hub, fetched if it is not in the cache.

    Args:
        name: owner/model.
        cache: where copies are kept; None: where huggingface_hub keeps them.

    Raises:
        SurgeryError: there is no such model, or it cannot be reached. Where a folder here has the
            owner's name, a path in it was meant.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    cached = _cached(name, cache)
    if cached is not None:
        return cached
    try:
        folder = Path(
            snapshot_download(name, cache_dir=cache, allow_patterns=_FILES, ignore_patterns=["*/*"])
        )
    except (HfHubHTTPError, OSError) as error:
        _check_local(name)
        reason = str(error).strip().splitlines()[0]
        raise SurgeryError(
            f"{name} is no folder here, and it cannot be fetched from the Hugging Face hub: "
            f"{reason}",
            "check the name and the network, or name a folder or file that is on this machine",
        ) from error
    stored_tensors(folder)  # raises if the network is off and the copy is incomplete
    return folder


def _check_local(name: str) -> None:
    """Raises `SurgeryError` for a name that begins with a folder that is here: it is mistyped."""
    owner, _, _ = name.partition("/")
    if Path(owner).is_dir():
        there = [path.name for path in Path(owner).iterdir() if not path.name.startswith(".")]
        close = nearest(name.rpartition("/")[2], sorted(there)) or "nothing"
        raise SurgeryError(f"there is no {name} here", f"{owner}/ has: {close}")


def _cached(name: str, cache: str | Path | None) -> Path | None:
    """The copy in the cache, if there is a whole one."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, cache_dir=cache, local_files_only=True))
        whole = (folder / CONFIG).is_file() and bool(stored_tensors(folder))
    except (LocalEntryNotFoundError, SurgeryError):
        return None
    return folder if whole else None
