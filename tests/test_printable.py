"""Names in files are written by strangers: none of them moves a terminal's cursor."""

import json
import struct

import pytest

from nanogpt_surgery import SurgeryError
from nanogpt_surgery.errors import printable
from nanogpt_surgery.formats.huggingface.safetensors_file import read_header


def test_control_characters_are_shown_by_their_number():
    assert printable("a\x1b[2Jb\x9b\u202e\r") == "a\\u001b[2Jb\\u009b\\u202e\\u000d"
    assert printable("naïve 日本 😀\n\ttab") == "naïve 日本 😀\n\ttab"


def test_a_hostile_name_in_a_file_reaches_no_terminal(tmp_path):
    name = "w\x1b]0;owned\x07"
    header = json.dumps({name: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(SurgeryError) as error:
        read_header(path)
    assert "\x1b" not in str(error.value)
    assert "owned" in str(error.value)
