"""A text of lines of every kind, and a corpus of files made of it."""

from pathlib import Path

TEXT = "".join(
    f"word {i}, größer as {i**3}\n" + "    indented\n" * (i % 3) + "\n" * (i % 5 == 0)
    for i in range(200)
)


def corpus(place: Path) -> list[Path]:
    """A long file, a folder of short ones, and an empty file."""
    (place / "long.txt").write_text(TEXT, "utf-8")
    (place / "short").mkdir()
    for i in range(5):
        (place / "short" / f"{i}.txt").write_text(f"short text {i} " * (5 * i), "utf-8")
    return [place / "long.txt", place / "short"]
