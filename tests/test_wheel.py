"""The wheel, built and installed into an empty environment."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="uv is not on the PATH")
def test_the_wheel_works_in_an_empty_environment(tmp_path: Path) -> None:
    def run(*words: object) -> str:
        done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run("uv", "build", "--wheel", "--out-dir", tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    run("uv", "venv", tmp_path / "empty")
    run("uv", "pip", "install", "--python", tmp_path / "empty/bin/python", wheel)
    assert "train" in run(tmp_path / "empty/bin/surgery", "--help")
    assert "0.1.0" in run(tmp_path / "empty/bin/nanogpt-surgery", "--version")
