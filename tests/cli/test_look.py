"""`surgery look` and `surgery adapter examine`."""

import json
from pathlib import Path

import pytest
from helpers.commands import called, write_adapter, write_model
from matplotlib.image import imread

PICTURES = {"lens.png", "attribution.png", "look.html", "MANIFEST.json"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("look")
    write_adapter(write_model(place / "m", block_size=64), place / "a", 1)
    return place


def test_the_grid_has_a_row_for_each_layer_and_a_column_for_each_token(place: Path) -> None:
    out, _ = called("look", place / "m", "--prompt", "to be")
    head, *rows = out.splitlines()
    assert head.split() == ["t", "o", "·", "b", "e"]
    assert [row.split()[0] for row in rows] == ["2", "1", "input"]
    report = json.loads(called("look", place / "m", "--prompt", "to be", "--json")[0])
    last = report["layers"][-1]
    for position, answers in enumerate(last["answers"]):
        best = answers[0]
        assert f"{best['text']:<8}{100 * best['probability']:3.0f}" in rows[0]
        assert last["final_probability"][position] == pytest.approx(best["probability"])
    assert report["tokens"] == ["t", "o", "·", "b", "e"]


def test_a_long_text_is_shown_from_the_end(place: Path) -> None:
    out, _ = called("look", place / "m", "--prompt", "abcdefghijklmnop")
    assert out.split()[:7] == list("jklmnop")
    assert "7 of 16" in out


def test_an_adapter_adds_the_tokens_that_it_moved(place: Path) -> None:
    words = ["look", place / "m", "--adapter", place / "a", "--prompt", "to be"]
    report = json.loads(called(*words, "--json")[0])
    first = report["moved"][0]
    changes = [abs(one["with_it"] - one["without"]) for one in report["moved"]]
    assert changes == sorted(changes, reverse=True)
    assert changes[0] > 0
    assert f"{first['with_it']:.4f}".rstrip("0") in called(*words)[0]


def test_a_folder_holds_pictures_and_a_page(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "seen"
    words = ["look", place / "m", "--prompt", "to be", "--out", out]
    _, said = called(*words, "--adapter", place / "a", "--layers", 1, "--heads", 0)
    assert {path.name for path in out.iterdir()} == PICTURES | {"attention-1.png"}
    assert "look.html" in said
    for path in out.glob("*.png"):
        picture = imread(path)
        assert picture[..., 3].min() == 0, "the background is transparent"
        assert picture[..., 3].max() == 1
    assert '"base"' in (out / "look.html").read_text()
    assert "seen" in called(*words, check=1)[1]
    called(*words, "--overwrite")
    assert {path.name for path in out.iterdir()} == PICTURES | {
        "attention-0.png",
        "attention-1.png",
    }


@pytest.mark.parametrize(("flag", "value"), [("--layers", 2), ("--heads", 2), ("--layers", -1)])
def test_a_layer_that_is_not_there_is_refused(flag: str, value: int, place: Path) -> None:
    words = ["look", place / "m", "--prompt", "to be", f"{flag}={value}"]
    said = called(*words, "--out", place / "x", check=1)[1]
    assert str(value) in said
    assert "0 to 1" in said
    assert not (place / "x").exists()


def test_an_empty_text_is_refused(place: Path) -> None:
    assert "empty" in called("look", place / "m", "--prompt", "", check=1)[1]


def test_an_adapter_is_examined_with_a_picture(place: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    words = ["adapter", "examine", place / "a", "--base", place / "m", "--json"]
    report = json.loads(called(*words, "--picture", picture)[0])
    assert report["layers"] == len(report["rows"]) > 0
    for row in report["rows"]:
        assert 1 - 1e-6 <= row["effective rank"] <= row["rank"] + 1e-6
        assert row["ΔW / W"] > 0
        assert 0 <= row["int4"] <= row["int8"] <= 1
    assert imread(picture).shape[2] == 4


def test_a_base_that_is_not_named_is_asked_for(place: Path, tmp_path: Path) -> None:
    config = place / "a" / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"base_model_name_or_path": "elsewhere"}))
    try:
        assert "--base" in called("adapter", "examine", place / "a", check=1)[1]
    finally:
        config.write_text(before)
