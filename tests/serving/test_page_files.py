"""The page's files: what they name is there, and what is there is named."""

import re
from hashlib import sha256
from pathlib import Path

import nanogpt_surgery.serving

PAGE = Path(nanogpt_surgery.serving.__file__).parent / "page"
OF_UPLOT = {"u-legend"}


def text_of(*endings: str) -> str:
    return "".join(
        path.read_text("utf-8") for path in sorted(PAGE.iterdir()) if path.suffix in endings
    )


def test_every_class_and_id_of_the_styles_is_used():
    names = set(re.findall(r"[.#]([a-zA-Z][\w-]*)(?=[^{}]*\{)", text_of(".css"))) - OF_UPLOT
    assert len(names) > 50
    used = set(re.findall(r"[\w-]+", text_of(".html", ".js")))
    assert names - used == set()


def test_every_element_that_the_modules_look_for_is_in_the_page():
    sought = set(re.findall(r'\bat\("([^"]+)"\)', text_of(".js")))
    assert len(sought) > 50
    assert sought - set(re.findall(r'id="([^"]+)"', text_of(".html"))) == set()


def test_nothing_is_put_into_the_page_as_html():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write", text_of(".js"))
    assert not re.findall(r"<script(?![^>]* src=)|<style|\son\w+=", text_of(".html"))


def test_the_chart_library_is_as_its_authors_published_it():
    digests = {
        "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
        "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    }
    for name, digest in digests.items():
        assert sha256((PAGE / "uplot" / name).read_bytes()).hexdigest() == digest
