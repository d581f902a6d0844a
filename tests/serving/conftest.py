"""What the tests of the page's routes share."""

import pytest
from helpers.rooms import folders_page


@pytest.fixture
def room(tmp_path):
    """A client of the page of a tiny model, with folders for adapters and runs, and its server."""
    with folders_page(tmp_path) as found:
        yield found
