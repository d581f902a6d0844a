"""The template that an adapter was trained with lies beside it, and is used without a flag."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model

from nanogpt_surgery import ChatTemplate, Conversation, SamplingSettings, load_adapter, open_model

STORED = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
GREEDY = ["--max-new-tokens", 8, "--temperature", 0]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, an adapter `a` with a template beside it, and an adapter `b` without."""
    model = write_model(tmp_path / "m")
    write_adapter(model, tmp_path / "a", 1)
    write_adapter(model, tmp_path / "b", 2)
    (tmp_path / "a" / "chat_template.jinja").write_text(STORED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(template: str, adapter: str | None = "a") -> str:
    model, tokenizer = open_model("m")
    if adapter is not None:
        load_adapter(model, adapter)
    talk = Conversation(model, tokenizer, ChatTemplate(template))
    return "".join(talk.ask("who?", 8, SamplingSettings(0.0)))


def test_ask_writes_as_the_adapter_was_trained_and_a_flag_wins(folder: Path) -> None:
    assert answer(STORED) != answer("plain") != answer("none")
    for flags, written in (([], STORED), (["--template", "none"], "none")):
        out, said = called("ask", "m", "who?", "--adapter", "a", *GREEDY, *flags)
        assert out == answer(written) + "\n"
        assert "no chat template" not in said
    out, said = called("ask", "m", "who?", "--adapter", "a", *GREEDY, "--template", "model")
    assert out == answer("plain") + "\n"
    assert "no chat template" in said


def test_a_tokenizer_config_beside_the_adapter_counts_as_well(folder: Path) -> None:
    """As transformers before 4.52 wrote it; the file of its own wins."""
    config = folder / "a" / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages[-1].content }}"}))
    for written in (STORED, "{{ messages[-1].content }}"):
        assert called("ask", "m", "who?", "--adapter", "a", *GREEDY)[0] == answer(written) + "\n"
        (folder / "a" / "chat_template.jinja").unlink(missing_ok=True)


def test_chat_changes_the_template_with_the_adapter(folder: Path, talk) -> None:
    lines = "who?\n/reset\n/adapter b\nwho?\n/reset\n/base\nwho?\n/reset\n/adapter a\nwho?\n"
    out, _ = talk(lines, "--adapter", "a", "--adapter", "b", few=GREEDY)
    expected = [answer(STORED), answer("plain", "b"), answer("plain", None), answer(STORED)]
    assert "\n".join(out).split("\n") == "\n".join(expected).split("\n")


@pytest.mark.parametrize(
    "text",
    ["{{", "{{ 'a' * 2000000000 }}", "{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}"],
)
def test_a_template_of_a_stranger_ends_within_the_limits(folder: Path, text: str) -> None:
    (folder / "a" / "chat_template.jinja").write_text(text)
    _, said = called("ask", "m", "who?", "--adapter", "a", *GREEDY, check=1)
    assert "the adapter's chat template fails" in said
    called("ask", "m", "who?", "--adapter", "a", *GREEDY, "--template", "plain")


def test_a_template_that_cannot_be_read_names_its_file(folder: Path) -> None:
    (folder / "a" / "chat_template.jinja").write_bytes(b"\xff")
    _, said = called("ask", "m", "who?", "--adapter", "a", *GREEDY, check=1)
    assert "chat_template.jinja" in said


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_finetune_stores_the_template_and_eval_uses_it(folder: Path, template: str) -> None:
    pairs = [{"prompt": f"{n}?", "completion": str(n) * 3} for n in range(20)]
    (folder / "pairs.json").write_text(json.dumps(pairs))
    words = ["--max-steps", 1, "--template", template]
    called("finetune", "m", "pairs.json", "--out", "run", *words)
    texts = [path.read_text() for path in folder.glob("run/**/chat_template.jinja")]
    assert texts and len(set(texts)) == 1
    found = [
        json.loads(called("eval", "m", "pairs.json", "--adapter", "run", *flags, "--json")[0])
        for flags in ([], ["--template", template], ["--template", "plain"])
    ]
    assert [one["template"] for one in found] == [template, template, "plain"]
    assert found[0]["loss"] == found[1]["loss"]
    assert (found[0]["loss"] == found[2]["loss"]) == (template == "plain")


def test_an_adapter_for_text_has_no_template(folder: Path) -> None:
    (folder / "text.txt").write_text("to be or not to be " * 200)
    called("finetune", "m", "text.txt", "--out", "run", "--max-steps", 1)
    assert not list(folder.glob("run/**/chat_template.jinja"))
