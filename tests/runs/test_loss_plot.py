"""The picture of a run's losses: what is drawn, read from the drawing itself."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from nanogpt_surgery.drawing import drawable
from nanogpt_surgery.runs.summary import centred_means, plot_losses


def rows(steps: int, first: bool = True, every: int = 10) -> list[dict[str, Any]]:
    before = [{"step": 0, "loss": None, "validation_loss": 3.5}] if first else []
    return before + [
        {"step": i, "loss": 3.0 - i / steps, "validation_loss": None if i % every else 3.1}
        for i in range(1, steps + 1)
    ]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Metrics → the axes that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1]
    )

    def draw(metrics: list[dict[str, Any]], **more: Any) -> Axes:
        plot_losses(metrics, tmp_path / "loss.png", title=more.pop("title", "runs/a"), **more)
        return figures[-1].axes[0]

    return draw


def curves(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): [*zip(*map(list, line.get_data()), strict=True)] for line in axes.lines
    }


def test_it_starts_at_step_0_with_the_base_as_a_line(drawn) -> None:
    axes = drawn(rows(40), base=True)
    found = curves(axes)
    assert found["validation"][0] == (0, 3.5)
    [base] = [line for name, line in found.items() if "base" in name]
    assert {y for _, y in base} == {3.5}
    assert axes.get_xlim()[0] == 0
    assert axes.get_xlabel() and axes.get_ylabel()


def test_without_a_validation_before_the_first_step(drawn) -> None:
    axes = drawn(rows(40, first=False), base=True)
    assert axes.get_xlim()[0] == 0
    assert not any("base" in name for name in curves(axes))
    assert not any("base" in name for name in curves(drawn(rows(40))))


def test_few_steps_are_not_smoothed(drawn) -> None:
    found = curves(drawn(rows(40)))
    assert found["training"] == [(i, 3.0 - i / 40) for i in range(1, 41)]


def test_many_are_without_lag(drawn) -> None:
    found = curves(drawn(rows(300)))
    [smooth] = [line for name, line in found.items() if "mean of" in name]
    assert smooth == [(x, pytest.approx(3.0 - x / 300)) for x in range(2, 300)]


def test_centred_means() -> None:
    assert centred_means([0, 0, 9, 0, 0], 1) == [0, 3, 3, 3, 0]
    assert centred_means([6, 0, 0], 5) == [6, 2, 0]


def test_steps_without_a_loss_leave_a_gap(drawn) -> None:
    metrics = rows(12)
    metrics[5] |= {"loss": float("nan")}
    metrics[6] |= {"loss": None}
    assert len(curves(drawn(metrics))["training"]) == 10


@pytest.mark.parametrize(
    "title",
    ["runs/中文", "runs/تجربة", "runs/😀", "runs/$x_1$", "runs/ключ", "a\udc80b\n\x1b", "é" * 300],
)
def test_a_title_in_any_letters_is_drawn_without_a_warning(drawn, title: str) -> None:
    axes = drawn(rows(5), title=title)
    text = axes.get_title()
    assert len(text) < 200
    assert text == drawable(title)[0]


def test_what_no_font_has_is_written_as_its_number() -> None:
    text, _ = drawable("a\U000f0000\ue123")  # of private use
    assert text.endswith("\\ue123") and "\\U000f0000" in text


def test_it_is_transparent_and_grey(tmp_path: Path, drawn) -> None:
    drawn(rows(5))
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[2] == 4
    assert pixels[0, 0, 3] == 0
    light = pixels[pixels[..., 3] > 0.99][:, :3].mean(1)
    assert light.min() > 0.4
    assert light.max() < 0.7
