"""How answers are made in `surgery chat`, as a user changes it in mid-conversation."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, get_type_hints

from nanogpt_surgery.errors import SurgeryError, nearest
from nanogpt_surgery.generation.settings import (
    MOST_SEED,
    SamplingSettings,
    check_count,
    check_seed,
    check_stop,
)

_OFF = ("none", "off")


@dataclass
class ChatSettings:
    """Settings of the answers to come."""

    sampling: SamplingSettings
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        check_count(self.max_new_tokens, 1)
        check_seed(self.seed)
        check_stop(self.stop)

    def next_seed(self) -> None:
        """Go on to the seed of the next answer, which is one more for each."""
        if self.seed is not None:
            self.seed = (self.seed + 1) % (MOST_SEED + 1)

    def to_dict(self) -> dict[str, Any]:
        """The settings that `change` takes, by name."""
        named = [field.name for field in fields(SamplingSettings) if field.name != "logit_bias"]
        found = {name: getattr(self.sampling, name) for name in named}
        return found | {"max_new_tokens": self.max_new_tokens, "seed": self.seed}

    def change(self, name: str, text: str) -> None:
        """Set one of them to what a text says.

        Raises:
            SurgeryError: there is no such setting, or the value is out of its range. Nothing is
                changed then.
        """
        if name not in self.to_dict():
            close = nearest(name, self.to_dict(), 1)
            raise SurgeryError(f"there is no setting {name!r}", f"{close}? /set lists them")
        if not text:
            raise SurgeryError(f"{name!r} needs a value", f"/set {name} VALUE")
        if name in ("max_new_tokens", "seed"):
            hint = get_type_hints(ChatSettings)[name]
            changed = replace(self, **{name: _parsed(name, text, hint)})
            self.max_new_tokens, self.seed = changed.max_new_tokens, changed.seed
        else:
            value = _parsed(name, text, get_type_hints(SamplingSettings)[name])
            self.sampling = replace(self.sampling, **{name: value})


def number(name: str, text: str) -> float:
    """A finite number from a text.

    Raises:
        SurgeryError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        raise SurgeryError(f"{name} is {text!r}, which is not a number") from None
    if value - value != 0:
        raise SurgeryError(f"{name} is {text}; it must be finite")
    return value


def _parsed(name: str, text: str, hint: Any) -> Any:
    if text in _OFF and hint == int | None:
        return None
    value = number(name, text)
    if hint is float:
        return value
    if value != int(value):
        raise SurgeryError(f"{name} is {text}; it must be a whole number")
    return int(value)
