"""JSON read within limits, and text written in one rename."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanogpt_surgery.errors import SurgeryError
from nanogpt_surgery.files.disk_errors import tried_again
from nanogpt_surgery.files.writing import flush, replacing

LARGEST_JSON = 48 << 20  # bytes; the largest tokenizer.json in use, Gemma 2's, has 34,363,188
LARGEST_WIDE = 36 << 20  # bytes, with a character beyond U+FFFF: four bytes each in memory
MOST_VALUES = 2_500_000  # commas and brackets; Gemma 2's tokenizer.json has 2.0 million


def write_json(path: Path, contents: Any) -> None:
    """Writes JSON in one rename, so that a reader sees the old file or the new one."""
    replace_text(path, json.dumps(contents, indent=2) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Writes a text file in one rename, flushed to the disk."""
    replace_bytes(path, text.encode())


def replace_bytes(path: Path, data: bytes) -> None:
    """Writes a file in one rename, flushed to the disk; what the disk refuses is an `OSError`."""

    def replace() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
            flush(temporary)

    tried_again(replace)


def read_json(path: Path, most_bytes: int = LARGEST_JSON) -> Any:
    """The contents of a JSON file.

    Raises:
        SurgeryError: it is missing, too large, of too many values, not UTF-8, or not JSON (with
            line and column).
    """
    if path.is_file() and path.stat().st_size > most_bytes:
        raise SurgeryError(
            f"{path} has {path.stat().st_size:,} bytes; the limit for JSON is {most_bytes:,}"
        )
    try:
        data = tried_again(path.read_bytes)
        count = sum(map(data.count, (b",", b"[", b"{")))
        if count > MOST_VALUES:
            raise SurgeryError(
                f"{path} has {count:,} commas and brackets; the limit for JSON is {MOST_VALUES:,}"
            )
        if len(data) > LARGEST_WIDE and max(data) >= 0xF0:
            raise SurgeryError(
                f"{path} has {len(data):,} bytes with characters beyond U+FFFF; the limit for such "
                f"JSON is {LARGEST_WIDE:,}"
            )
        text = data.decode("utf-8")
        del data
        return json.loads(text)
    except FileNotFoundError:
        raise SurgeryError(f"{path} is missing") from None
    except OSError as error:
        raise SurgeryError(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{path} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise SurgeryError(
            f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number, or a nesting, beyond all measure
        raise SurgeryError(f"{path} is not JSON that can be read: {error}") from None
