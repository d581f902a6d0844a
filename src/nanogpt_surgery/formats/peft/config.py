"""`adapter_config.json` and `surgery.json`: what is written into them and what may stand there.

`surgery.json` holds what PEFT's files have no place for, beside them, where its readers do not
look: the fingerprint of the base, what was chosen for tied weights, and what fused matrices and
PiSSA's updates were put together from. A folder without it is an adapter all the same. (As metadata
in the safetensors file it would not do: its order, and with it the hash, changes each time.)

Alphas are given by patterns, each a regular expression for a layer's name or its ending, and some
expressions keep a backtracking matcher such as Python's busy for ever. Names, escaped or not, are
looked up in a table; any other expression is matched by Rust's automata, which read each character
of a name once (Thompson, 1968) and which tiktoken brings.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_args

from nanogpt_surgery.errors import SurgeryError, first_problems, foreign_file, quoted
from nanogpt_surgery.files.writing import read_json
from nanogpt_surgery.formats.folders.old_keys import with_current_modules
from nanogpt_surgery.lora.settings import LoRASettings, Tied
from nanogpt_surgery.lora.stored_adapter import FusedParts, RankAndAlpha, StoredAdapter
from nanogpt_surgery.values import NOT_0, SHARE, SIZE, SWITCH, TABLE, Kind, wrong_values

CONFIG = "adapter_config.json"
LARGEST_CONFIG = 8 << 20  # bytes; an adapter of 25,000 layers, each with an alpha, has half of it
_MOST_WHOLE = 100  # modules_to_save
_QUOTES = "'\""
MERGE_IN_PEFT = (
    "merge it in peft, PeftModel.from_pretrained(base, adapter).merge_and_unload()"
    ".save_pretrained(folder), after base.resize_token_embeddings(n) if the vocabulary was "
    "resized, and open that folder"
)
_SAVE_AGAIN = "restore it from a copy, or save the adapter again where it was made"

# Options that change the result and that we do not have; unset, they say nothing. Which layers were
# chosen (layers_to_transform, exclude_modules, …) shows in the tensors.
_CHANGE_THE_RESULT = """
    layer_replication target_parameters trainable_token_indices alora_invocation_tokens
    arrow_config use_qalora velora_config use_bdlora kasa_config monteclora_config
""".split()
_NO_TARGETS = "dummy-target-modules"  # PEFT's word for an adapter without any update
# How A and B began is past, unless it changed the base, as PEFT's "pissa" does.
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def config_for(
    adapter: StoredAdapter,
    base: str = "",
    fan_in_fan_out: bool = False,
    task: str | None = "CAUSAL_LM",
) -> dict[str, Any]:
    """The contents of `adapter_config.json` for an adapter under the names of the base.

    Args:
        adapter: with the names of the model that PEFT will load it on.
        base: name or path of the base model, for information.
        fan_in_fan_out: the base stores its matrices transposed (GPT-2's Conv1D).
        task: PEFT's task_type, by which it chooses what it wraps the base in; None for any module.
    """
    updates = adapter.updates
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: update.alpha for name, update in updates.items()}
    rank, rank_pattern = _usual(ranks, LoRASettings.rank)
    alpha, alpha_pattern = _usual(alphas, LoRASettings.alpha)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base or None,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": max((update.dropout for update in updates.values()), default=0.0),
        "target_modules": sorted(updates) or _NO_TARGETS,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "use_rslora": any(update.rslora for update in updates.values()),
        "use_dora": any(update.magnitude is not None for update in updates.values()),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in adapter.whole}) or None,
        "init_lora_weights": True,
        "inference_mode": True,
        **({"lora_bias": True} if any(u.bias is not None for u in updates.values()) else {}),
    }


def _usual(values: dict[str, Any], default: Any) -> tuple[Any, dict[str, Any]]:
    """The commonest value, or the default of none, and a pattern for each name with another."""
    usual = Counter(values.values()).most_common(1)[0][0] if values else default
    return usual, {_pattern(name, values): v for name, v in values.items() if v != usual}


def _pattern(name: str, names: Iterable[str]) -> str:
    """The expression that is for this name alone: PEFT's match endings, the first one counts."""
    ends_another = any(other.endswith(f".{name}") for other in names)
    return f"^{re.escape(name)}" if ends_another else re.escape(name)


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of an adapter folder's config.

    Raises:
        SurgeryError: it is missing or not a LORA's, sets what we do not have, or a value that we
            read is not of its kind (all of them at once).
    """
    path = folder / CONFIG
    if not path.is_file():
        below = sorted(str(config.parent) for config in folder.glob(f"*/{CONFIG}"))
        inside = f"; there is one in {', '.join(below)}" if below else ""
        raise SurgeryError(
            f"{path} is missing", f"an adapter is a folder as PEFT writes it{inside}"
        )
    config = read_json(path, LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise SurgeryError(f"{path} is damaged: it holds no table", _SAVE_AGAIN)
    with foreign_file(path):
        _check_unknown(config, folder)
        if problems := _wrong(config):
            raise SurgeryError(f"{path} is damaged: {first_problems(problems, 12)}", _SAVE_AGAIN)
    return with_current_modules(config)


def alphas_of(config: dict[str, Any], path: Path) -> Callable[[str], float]:
    """The alpha of a layer by its name, as an adapter's config says.

    Raises:
        SurgeryError: a pattern is none that we read; from the function: they take too long.
    """
    usual = config.get("lora_alpha", 8)
    try:
        patterns = Patterns(config.get("alpha_pattern") or {})
    except SurgeryError as error:
        raise SurgeryError(f"{path} is damaged: alpha_pattern: {error.what}", _SAVE_AGAIN) from None
    return lambda name: float(patterns.value(name, usual))


def _wrong(config: dict[str, Any]) -> list[str]:
    """For each value that we read and that is not of its kind, a sentence."""
    patterns = config.get("alpha_pattern")
    problems = wrong_values(TABLE, {"alpha_pattern": patterns})
    patterns = {} if problems or not patterns else patterns
    alphas = {f"alpha_pattern of {quoted(key)}": value for key, value in patterns.items()}
    problems += wrong_values(NOT_0, {"lora_alpha": config.get("lora_alpha", 8), **alphas})
    problems += wrong_values(SHARE, {"lora_dropout": config.get("lora_dropout") or 0})
    switches = ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying")
    problems += wrong_values(SWITCH, {key: config.get(key) or False for key in switches})
    return problems + wrong_values(_NAMES, {"modules_to_save": config.get("modules_to_save")})


def _are_few_names(value: Any) -> bool:
    few = isinstance(value, list) and len(value) <= _MOST_WHOLE
    return value is None or (few and all(name and isinstance(name, str) for name in value))


_NAMES = Kind(f"null or a list of at most {_MOST_WHOLE} names", _are_few_names)


def _check_unknown(config: dict[str, Any], folder: Path) -> None:
    """Raises `SurgeryError`, with all their names, if options are set that we do not have."""
    kind = config.get("peft_type", "folder without peft_type")
    if kind != "LORA":
        raise SurgeryError(
            f"{folder} is a {quoted(kind).strip(_QUOTES)}, not a LORA",
            f"if its kind can be merged, {MERGE_IN_PEFT}",
        )
    found = [key for key in _CHANGE_THE_RESULT if config.get(key)]
    if config.get("bias", "none") != "none":
        found.append("bias")
    if config.get("lora_bias") and config.get("use_dora"):
        found.append("lora_bias beside use_dora")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        found.append(f"init_lora_weights {quoted(config['init_lora_weights'])}")
    if found:
        raise SurgeryError(
            f"{folder / CONFIG} sets {', '.join(found)}, which would change the result and "
            "is not supported",
            MERGE_IN_PEFT,
        )


EXTRAS = "surgery.json"
# In the file an update's initial rank and alpha are called its birth, fused parts pieces.


def extras_of(adapter: StoredAdapter) -> dict[str, Any]:
    """The contents of the file for an adapter."""
    updates = adapter.updates
    return {
        "fingerprint": adapter.fingerprint,
        "tied": adapter.tied,
        "births": {name: u.initial for name, u in updates.items() if u.initial},
        "pieces": {name: u.fused_parts for name, u in updates.items() if u.fused_parts},
    }


def _is_rank_and_alpha(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and SIZE[1](value[0]) and NOT_0[1](value[1])


def _is_fused_part(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 3:
        return value is None
    return _is_rank_and_alpha(value[:2]) and (value[2] is None or _is_rank_and_alpha(value[2]))


_TIED = Kind(
    f"null or one of {', '.join(get_args(Tied))}",
    lambda x: x in (None, *get_args(Tied)),
)
_ENTRIES: dict[str, Kind] = {
    "fingerprint": Kind("a sha256", lambda x: isinstance(x, str)),
    "births": Kind("[rank, alpha]", _is_rank_and_alpha),
    "pieces": Kind(
        "a list, each null or [rank, alpha, null or [rank, alpha]]",
        lambda x: isinstance(x, list) and all(_is_fused_part(part) for part in x),
    ),
}


def read_extras(path: Path) -> dict[str, Any]:
    """The contents of the file, or nothing where there is none.

    Raises:
        SurgeryError: a value is not of its kind (all of them at once).
    """
    extras = read_json(path, LARGEST_CONFIG) if path.is_file() else {}
    problems = wrong_values(TABLE, {"the whole": extras})
    if not problems:
        problems = wrong_values(_TIED, {"tied": extras.get("tied")})
        for key, kind in _ENTRIES.items():
            table = extras.get(key)
            problems += wrong_values(TABLE, {key: table}) or wrong_values(
                kind, {f"{key} of {quoted(name)}": value for name, value in (table or {}).items()}
            )
    if problems:
        raise SurgeryError(f"{path} is damaged: {first_problems(problems, 12)}", f"rm {path}")
    return with_current_modules(extras)


def fused_parts_of(
    extras: dict[str, Any], name: str, rank: int
) -> tuple[RankAndAlpha | None, FusedParts | None]:
    """The initial rank and alpha of a layer's update, and the parts that it was fused from.

    Raises:
        SurgeryError: it does not add up to the rank.
    """
    initial = (extras.get("births") or {}).get(name)
    parts = (extras.get("pieces") or {}).get(name) or []
    found = [part for part in parts if part is not None]
    initials = [(rank, initial), *((whole, one) for whole, _, one in found)]
    adds_up = not parts or sum(whole for whole, _, _ in found) == rank
    if not adds_up or any(one and one[0] >= whole for whole, one in initials):
        raise SurgeryError(
            f"{EXTRAS} and the rank {rank} of {name} do not agree", f"delete that {EXTRAS}"
        )
    read = tuple(part and (*part[:2], _rank_and_alpha(part[2])) for part in parts)
    return _rank_and_alpha(initial), read or None


def _rank_and_alpha(value: list[Any] | None) -> RankAndAlpha | None:
    return None if value is None else (int(value[0]), float(value[1]))


LONGEST_PATTERN = 1_000  # characters
_MOST_STATES = 5_000  # of one expression: its characters, repeated as it says
_MOST_EXPRESSIONS = 100  # beside the names; each takes half a MiB
_MOST_SECONDS = 5.0  # of the processor, for all patterns of a file

Layout: TypeAlias = tuple[tuple[int, ...], bool]  # places of wildcards, only for whole names


class Patterns:
    """The values of a table of patterns; the first pattern that matches counts, as in PEFT.

    Raises:
        SurgeryError: a pattern is no regular expression, or one that we do not read.
    """

    def __init__(self, values: Mapping[str, Any]):
        self._values = list(values.values())
        self._seconds = 0.0
        self._plain: dict[tuple[str, Layout], int] = {}
        self._layouts: dict[int, set[Layout]] = {}  # by length
        self._expressions: list[tuple[int, Callable[[str], bool]]] = []
        for order, pattern in enumerate(values):
            plain = _plain(pattern)
            if plain is not None:
                self._plain.setdefault(plain, order)
                self._layouts.setdefault(len(plain[0]), set()).add(plain[1])
                continue
            self._expressions.append((order, _expression(pattern)))
            if len(self._expressions) > _MOST_EXPRESSIONS:
                raise SurgeryError(f"more than {_MOST_EXPRESSIONS} patterns are no plain names")

    def value(self, name: str, default: Any) -> Any:
        """The value of the first pattern that is a layer's name or its ending.

        Raises:
            SurgeryError: the patterns of the table take too long.
        """
        if not self._values:
            return default
        start = time.process_time()
        found = min(self._named(name), default=len(self._values))
        before = (entry for entry in self._expressions if entry[0] < found)
        found = next((order for order, matches in before if matches(name)), found)
        self._seconds += time.process_time() - start
        if self._seconds > _MOST_SECONDS:
            raise SurgeryError("its patterns take too long to match with its layers' names")
        return self._values[found] if found < len(self._values) else default

    def _named(self, name: str) -> Iterator[int]:
        """The places of those patterns without operators that match."""
        starts = [0, *(place + 1 for place, character in enumerate(name) if character == ".")]
        for start in starts:
            ending = name[start:]
            for wildcards, whole in self._layouts.get(len(ending), ()):
                if start == 0 or not whole:
                    masked = list(ending)
                    for place in wildcards:
                        masked[place] = "."
                    order = self._plain.get(("".join(masked), (wildcards, whole)))
                    if order is not None:
                        yield order


_OPERATOR = re.compile(r"[\\^$*+?{}\[\]|()]")


def _plain(pattern: str) -> tuple[str, Layout] | None:
    """A pattern without operators but for ^ at the beginning and dots, each any character."""
    whole = pattern.startswith("^")
    rest = iter(pattern[1:] if whole else pattern)
    text, wildcards = "", []
    for character in rest:
        if character == "\\":
            character = next(rest, "a")
            if character.isalnum():
                return None
        elif character == ".":
            wildcards.append(len(text))
        elif _OPERATOR.match(character):
            return None
        text += character
    return text, (tuple(wildcards), whole)


_REPEATS = re.compile(r"\{(\d*),?(\d*)\}")
# Look-around, back-references and the like, for which no matcher is bounded.
_UNBOUNDED = re.compile(r"\(\?(?!:|P<)|\\[^\W_dDwWsS]|[*+?}]\+")
_BYTES = {bytes([byte]): byte for byte in range(256)}


def _expression(pattern: str) -> Callable[[str], bool]:
    """Whether a name or its ending matches, as PEFT has it.

    Tiktoken cuts a text into the matches of an expression and leaves out what is between them: of a
    name that matches as a whole, and of no other, every byte becomes an id.
    """
    import tiktoken  # few adapters have expressions

    if len(pattern) > LONGEST_PATTERN:
        raise SurgeryError(
            f"the pattern {quoted(pattern)} has {len(pattern):,} characters; the limit is "
            f"{LONGEST_PATTERN:,}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # sets that other readers, Rust's too, read otherwise
            re.compile(f"^(.*\\.)?({pattern})$")
    except (re.error, OverflowError, RecursionError, Warning) as error:
        raise SurgeryError(
            f"the pattern {quoted(pattern)} is not a regular expression: {error}"
        ) from None
    repeats = [max(1, int(least or 0), int(most or 0)) for least, most in _REPEATS.findall(pattern)]
    if len(pattern) * math.prod(repeats) > _MOST_STATES:
        raise SurgeryError(f"the pattern {quoted(pattern)} repeats too much to be matched")
    whole = "^(?:.*\\.)?(?:" + re.sub(r"\{,(\d+)\}", r"{0,\1}", pattern) + ")$"
    try:
        if _UNBOUNDED.search(pattern):
            raise ValueError
        matcher = tiktoken.Encoding("", pat_str=whole, mergeable_ranks=_BYTES, special_tokens={})
    except ValueError:
        raise SurgeryError(
            f"the pattern {quoted(pattern)} is not matched in bounded time and is not supported"
        ) from None
    return lambda name: len(matcher.encode_ordinary(name)) == len(name.encode()) > 0
