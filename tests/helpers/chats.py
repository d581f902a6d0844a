"""What `surgery chat` is expected to say."""

from pathlib import Path

from nanogpt_surgery import generate, open_model
from nanogpt_surgery.errors import printable

FEW = ["--max-new-tokens", 8, "--seed", 3, "--template", "none"]


def continued(folder: Path, text: str, seed: int = 3, count: int = 8) -> str:
    model, tokenizer = open_model(folder / "m")
    return printable(
        tokenizer.decode(list(generate(model, tokenizer.encode(text), count, seed=seed)))
    )


def flat(lines: list[str]) -> str:
    return "\n".join(lines)
