"""Reports as text: no number is broken, layers of a kind are one line, units are the usual ones."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanogpt_surgery.report import Report, duration, folded, percent, size

ROWS = [
    {
        "layer": f"model.layers.{i}.self_attn.{name}",
        "pattern": name,
        "parameters": 1234 + (name == "v_proj"),
        "bytes": 4096,
        "change kept": 0.5 + i / 100,
        "dtype": "bfloat16",
        "tied to": None,
    }
    for i in range(30)
    for name in ("q_proj", "v_proj")
]
SUMMARY = {"model_bytes": 3 * 2**30, "free_bytes": 2**30, "seconds": 15_660, "kl": 1.25e-7}


def numbers(text: str) -> list[str]:
    return re.findall(r"[\d.,–]*\d", text)


def test_layers_of_a_kind_are_one_line() -> None:
    found = folded(ROWS)
    assert [row["layer"] for row in found] == [
        "model.layers.*.self_attn.q_proj",
        "model.layers.*.self_attn.v_proj",
    ]
    assert [row["layers"] for row in found] == [30, 30]
    assert [row["parameters"] for row in found] == [30 * 1234, 30 * 1235]
    assert {row["change kept"] for row in found} == {"50.0–79.0 %"}
    assert {row["dtype"] for row in found} == {"bfloat16"}


def test_few_rows_and_rows_of_other_things_are_left() -> None:
    assert folded(ROWS[:16]) == ROWS[:16]
    files = [{"file": f"a.{i}", "size": i} for i in range(40)]
    assert folded(files) == files


def test_one_of_a_kind_keeps_its_name() -> None:
    found = folded([*ROWS, {**ROWS[0], "layer": "lm_head"}])
    assert (found[-1]["layer"], found[-1]["parameters"]) == ("lm_head", 1234)


def test_all_rows_where_all_are_asked_for() -> None:
    text = Report("t", ROWS, {}).to_text(200, whole=True, hint="whole=True")
    assert all(row["layer"] in text for row in ROWS)
    assert "whole=True" not in text
    assert "whole=True" in Report("t", ROWS, {}).to_text(200, hint="whole=True")


@pytest.mark.parametrize("width", [40, 60, 80, 120, None])
@pytest.mark.parametrize("whole", [False, True])
def test_no_line_is_too_long_and_no_number_broken(width: int | None, whole: bool) -> None:
    text = Report("a title of some words, which may be long " * 3, ROWS, SUMMARY).to_text(
        width, whole
    )
    if width is not None:
        assert max(map(len, text.splitlines())) <= width
    wide = Report("t", ROWS, SUMMARY).to_text(None, whole)
    assert set(numbers(wide)) == set(numbers(text))
    assert "tied to" not in text


@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "layer": st.integers(0, 99).map(lambda i: f"layers.{i}.q"),
                "parameters": st.integers(0, 10**13),
                "ΔW / W": st.floats(0, 1e9),
                "dtype": st.sampled_from(["float32", None]),
            }
        ),
        max_size=30,
    ),
    st.integers(40, 150),
)
def test_any_rows_fit_any_width(rows: list[dict], width: int) -> None:
    text = Report("title", rows, {"layers": len(rows)}).to_text(width)
    assert max(map(len, text.splitlines())) <= width


def test_whether_it_fits() -> None:
    [line] = [x for x in Report("t", [], SUMMARY).to_text().splitlines() if "3.00 GiB" in x]
    assert "not fit" in line and "1.00 GiB free" in line
    [line] = [
        x
        for x in Report("t", [], {**SUMMARY, "free_bytes": 2**40}).to_text().splitlines()
        if "3" in x
    ]
    assert "not fit" not in line


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.0123, "0.012 s"),
        (9.4, "9.4 s"),
        (9.99, "10 s"),
        (59.6, "1 min"),
        (312, "5 min 12 s"),
        (3599, "1 h"),
        (15_660, "4 h 21 min"),
        (86_399, "1 d"),
        (97_300, "1 d 3 h"),
    ],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0, "0 %"),
        (1, "100 %"),
        (0.898, "89.8 %"),
        (0.99999999, "99.99 %"),
        (0.9996, "99.96 %"),
        (1e-6, "0.0001 %"),
        (1.5, "150.0 %"),
    ],
)
def test_shares(share: float, said: str) -> None:
    assert percent(share) == said


@pytest.mark.parametrize(
    ("count", "said"),
    [(17, "17 bytes"), (2048, "2.00 KiB"), (2**20, "1.00 MiB"), (300 * 2**30, "300 GiB")],
)
def test_sizes(count: int, said: str) -> None:
    assert size(count) == said
