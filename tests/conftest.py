"""Settings that every test shares."""

import os
import signal
import warnings
from pathlib import Path

import pytest
from hypothesis import settings

# Programs that tests start find helpers too.
os.environ["PYTHONPATH"] = str(Path(__file__).parent)
os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers or peft is imported: no network
# Tests run side by side, one on each core: more threads would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell starts what runs in its background deaf to Ctrl-C, which tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("ours", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("ours")


def pytest_configure() -> None:
    """Compiles the decoder before any test, in one process: its one line would be a warning."""
    from nanogpt_surgery.generation.native.library import decoder_library

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decoder_library()


def pytest_runtest_setup() -> None:
    """Lets the random numbers of a test not depend on which tests its process has run before."""
    import torch

    torch.manual_seed(1337)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pages first: begun last, they would keep one core busy while the other has no tests."""
    items.sort(key=lambda item: item.path.name != "test_docs.py")
