"""The page in Chromium: each of its four places used as a person would, to its end."""

import json
import re

import pytest
from helpers.browser import Browser, chromium
from helpers.served_page import ADAPTER, SCRIPT, ServedPage, served_page
from selenium.webdriver.common.keys import Keys

TOKENS = "#sides .side:nth-child({}) .answer .token"
RIGHT_DIAL = '#sides .side:nth-child(2) input[type="range"]'


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    with served_page(tmp_path_factory.mktemp("page")) as server:
        yield server


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(served: ServedPage, chrome: Browser):
    """The page as one who comes for the first time sees it."""
    chrome.driver.get(served.url)
    chrome.run("sessionStorage.clear()")
    chrome.size(1280, 800)
    chrome.open(served.url)
    yield chrome
    worst = [line for line in chrome.log("browser") if "Content Security" in line["message"]]
    assert not worst


def tokens(page: Browser, side: int) -> list[str]:
    texts = page.run(
        "return [...document.querySelectorAll(arguments[0])].map((t) => t.textContent)",
        TOKENS.format(side),
    )
    return texts


def answers(page: Browser) -> tuple[str, str]:
    """Returns both sides' answers once neither streams."""
    page.wait(lambda: not page.all(".answer.running") and page.text("answer") == "Answer again")
    return "".join(tokens(page, 1)), "".join(tokens(page, 2))


def ask(page: Browser, prompt: str, count: int = 12) -> tuple[str, str]:
    if not page.at("seed").is_displayed():
        page.one("#talk summary").click()
    page.write("max-new-tokens", count)
    page.write("prompt", prompt)
    page.click(page.at("answer"))
    page.wait(lambda: page.all(TOKENS.format(1)) and page.all(TOKENS.format(2)))
    return answers(page)


def dial(page: Browser, weight: float) -> None:
    """Moves the right side's slider; both sides answer again."""
    page.run(
        "const [slider, value] = arguments; slider.value = value;"
        "document.querySelectorAll('.answer .token').forEach((t) => t.remove());"
        "slider.dispatchEvent(new Event('input', {bubbles: true}))",
        page.one(RIGHT_DIAL),
        weight,
    )
    page.wait(lambda: page.all(TOKENS.format(1)) and page.all(TOKENS.format(2)))


def test_talk_answers_on_two_sides_which_a_slider_makes_one(page):
    base, adapted = ask(page, "The sky")
    assert base and adapted and base != adapted
    titles = [title.text for title in page.all(".side h2")]
    assert titles == ["base", ADAPTER]
    hashes = page.one(".side:nth-child(2) code").get_attribute("title")
    assert len(re.findall("[0-9a-f]{64}", hashes)) == 2
    dial(page, 0)
    assert answers(page) == (base, base)
    dial(page, 1)
    assert answers(page) == (base, adapted)


def test_another_choice_is_taken_and_the_answer_goes_on_from_there(page):
    ask(page, "The sky")
    page.at("tint").click()
    assert float(page.run(
        "return getComputedStyle(arguments[0]).getPropertyValue('--surprise')",
        page.all(TOKENS.format(1))[4],
    )) >= 0  # fmt: skip
    before = tokens(page, 1), tokens(page, 2)
    page.all(TOKENS.format(1))[4].click()
    other = page.wait(lambda: page.all("#alternatives li button:not(.taken)"))[0]
    wanted = other.get_attribute("aria-label")
    other.click()
    page.wait(lambda: len(tokens(page, 1)) == 12)
    answers(page)
    after = tokens(page, 1)
    assert after[:4] == before[0][:4]
    assert after[4] != before[0][4] and f"with {after[4]}," in wanted
    assert tokens(page, 2) == before[1]


def test_look_shows_attention_shares_and_lens_with_and_without_the_adapter(page):
    ask(page, "The sky")
    page.one(".side:nth-child(2) .foot button").click()
    page.wait(lambda: page.text("attention-reading") and page.text("most"))
    text = page.at("look-text").get_property("value")
    assert text.startswith("The sky") and len(page.all("#look-tokens .token")) == len(text)
    layers = page.run("return document.querySelectorAll('#lens tbody tr').length") - 1
    assert len(page.all("#attribution tbody tr")) == layers
    assert len(page.all("#heads button")) == len(
        page.all("#attribution tbody tr:first-child button")
    )
    with_adapter = page.text("lens"), page.text("look-chosen")
    page.at("look-on").click()
    page.wait(lambda: page.text("lens") != with_adapter[0])
    page.one("#look-tokens .token:nth-child(3)").click()
    page.wait(lambda: page.text("look-chosen").startswith("3 of"))
    page.push_at("#attribution tbody tr:first-child button")  # head 0 of the last layer
    page.wait(lambda: page.at("look-layer").get_property("value") == str(layers - 1))
    page.wait(lambda: f"layer {layers - 1}" in page.at("attention").get_attribute("aria-label"))
    page.wait(lambda: page.one("#heads button").get_attribute("aria-pressed") == "true")
    page.wait(lambda: "“T”" in page.text("attention-reading"))


def journal(page: Browser) -> list[tuple[str, bool]]:
    """Returns the titles, the newest first, and whether each is undone."""
    return page.run(
        "return [...document.querySelectorAll('#journal li:not(.none)')].map("
        "(one) => [one.querySelector('span').textContent, one.classList.contains('undone')])"
    )


def test_operate_from_targets_to_a_merge_and_back(page, served):
    page.go("operate")
    page.wait(lambda: page.all(".layers [data-path]"))
    page.one('[data-preset="qv"]').click()
    assert "q_proj, v_proj" in page.text("targets")
    page.write("inject-name", "fresh")
    page.write("inject-rank", 2)
    page.at("inject-plan-button").click()
    page.wait(lambda: page.text("inject-plan"))
    before, done = page.text("model"), len(journal(page))
    page.push_at("#inject")
    page.wait(lambda: page.all('[aria-label="Merge fresh"]'))
    assert len(journal(page)) == done + 1
    page.wait(lambda: page.all(".changed"))
    page.push("Disable fresh")
    page.push("Enable fresh")
    page.wait(lambda: page.all('[aria-label="Disable fresh"]'))
    page.push(f"Merge {ADAPTER}")
    page.wait(lambda: not page.all(f'[aria-label="Merge {ADAPTER}"]'))
    merged = page.text("model")
    assert merged != before
    page.push_at("#undo")
    page.wait(lambda: page.text("model") != merged)
    page.push_at("#redo")
    page.wait(lambda: page.text("model") == merged)
    while any(not undone for _, undone in journal(page)):
        left = sum(not undone for _, undone in journal(page))
        page.push_at("#undo")
        page.wait(lambda left=left: sum(not undone for _, undone in journal(page)) < left)
    assert page.text("model") == before


def test_a_head_is_ablated_with_a_click_and_comes_back(page):
    page.go("operate")
    page.push("Ablate head 1 of layer 0")
    page.wait(lambda: page.all('[aria-label="Head 1 of layer 0 is ablated"]'))
    page.push_at("#undo")
    page.wait(lambda: page.all('[aria-label="Ablate head 1 of layer 0"]'))


def test_saving_says_where(page, served):
    page.go("operate")
    page.write("save-name", "kept")
    page.one("#save-form button").click()
    page.wait(lambda: "kept" in page.text("save-note"))
    assert any(path.name == "kept" and path.is_dir() for path in served.folder.rglob("kept"))


def test_train_from_dropped_answers_to_an_adapter_beside_the_base(page, served, tmp_path):
    records = [{"messages": [{"role": "user", "content": f"{i} + 1?"},
                             {"role": "assistant", "content": f"It is {i + 1}."}]}
               for i in range(24)]  # fmt: skip
    answers_file = tmp_path / "sums.jsonl"
    answers_file.write_text("".join(json.dumps(record) + "\n" for record in records))
    page.go("train")
    page.at("file").send_keys(str(answers_file))
    page.wait(lambda: page.all("#preview mark"))
    assert "It is 1." in page.one("#preview mark").text
    assert "0 + 1?" in page.text("preview")
    assert not any("+ 1?" in mark.text for mark in page.all("#preview mark"))
    for name, value in (("name", "sums"), ("steps", 100_000), ("batch", 2), ("every", 5)):
        page.write(f"train-{name}", value)
    page.click(page.at("train-plan-button"))
    page.wait(
        lambda: (
            page.all("#train-plan dl") or page.all("#train-plan table") or page.text("train-error")
        )
    )
    assert not page.text("train-error")
    page.click(page.at("train-start"))
    page.wait(lambda: page.at("pause").is_displayed())
    page.wait(lambda: page.all("#chart canvas") and page.all(".sample"))
    page.push_at("#pause")
    page.wait(lambda: page.at("resume").is_displayed())
    page.push_at("#resume")
    page.wait(lambda: page.at("pause").is_displayed())
    page.push_at("#stop")
    page.wait(lambda: "Statestopped" in page.text("figures"))
    assert page.wait(lambda: [b for b in page.all(".runs b") if b.text == "sums"])
    page.go("talk")
    page.wait(lambda: page.one(".side:nth-child(2) h2").text == "sums")
    base, trained = ask(page, "3 + 1?")
    assert base and trained
    hashes = page.one(".side:nth-child(2) code").get_attribute("title")
    assert len(re.findall("[0-9a-f]{64}", hashes)) == 2  # the base's and the newest checkpoint's


def test_what_models_and_people_write_is_shown_as_text(page):
    ask(page, SCRIPT)
    assert SCRIPT in page.one(".answer .prompt").get_property("textContent")
    page.one(".side .foot button").click()
    page.wait(lambda: page.text("most"))
    page.go("operate")
    page.wait(lambda: page.all(".layers [data-path]"))
    page.one('[data-preset="head"]').click()
    page.write("inject-name", SCRIPT)
    page.push_at("#inject")
    page.wait(lambda: page.text("inject-error") or page.all(f'[aria-label="Merge {SCRIPT}"]'))
    assert SCRIPT in page.text("operate")
    found = page.run("return [...document.scripts].map((one) => one.src)")
    assert all(address.startswith(page.url) for address in found) and len(found) == 2
    assert page.run("return document.images.length") == 0


def test_the_line_is_lost_and_comes_back_to_where_it_was(page, served):
    page.write("prompt", "kept as it is")
    page.go("operate")
    page.write("inject-name", "halfway")
    served.stop()
    page.wait(lambda: "lost" in page.text("connection"))
    served.start()
    page.wait(lambda: not page.text("connection"))
    assert page.at("operate").is_displayed()
    assert page.at("inject-name").get_property("value") == "halfway"
    assert page.at("prompt").get_property("value") == "kept as it is"


def test_two_tabs_see_the_same(page, served):
    first = page.driver.current_window_handle
    page.go("operate")
    done = len(journal(page))
    page.driver.switch_to.new_window("tab")
    try:
        page.open(served.url, "operate")
        page.wait(lambda: page.all('[aria-label="Ablate head 0 of layer 1"]'))
        page.push("Ablate head 0 of layer 1")
        page.wait(lambda: page.all('[aria-label="Head 0 of layer 1 is ablated"]'))
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    page.wait(lambda: page.all('[aria-label="Head 0 of layer 1 is ablated"]'))
    assert len(journal(page)) == done + 1
    page.push_at("#undo")
    page.wait(lambda: journal(page)[0][1])


def focused(page: Browser) -> str:
    return page.run(
        "const e = document.activeElement; return e.id || e.getAttribute('href') || e.className"
    )


def press(page: Browser, *keys: str) -> None:
    for key in keys:
        page.driver.switch_to.active_element.send_keys(key)


def tab_to(page: Browser, name: str) -> None:
    for _ in range(60):
        if focused(page) == name:
            return
        press(page, Keys.TAB)
    raise AssertionError(f"the Tab key does not reach {name}")


def test_the_keyboard_is_enough(page):
    tab_to(page, "prompt")
    press(page, "The sky", Keys.ENTER)
    page.wait(lambda: page.all(TOKENS.format(2)))
    answers(page)
    tab_to(page, "token")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.run("return document.activeElement.textContent") == tokens(page, 1)[2]
    press(page, Keys.ENTER)
    assert page.run("return document.activeElement.closest('#alternatives') !== null")
    press(page, Keys.ESCAPE)
    assert not page.at("alternatives").is_displayed()
    assert page.run("return document.activeElement.textContent") == tokens(page, 1)[2]
    for place in ("look", "operate", "train"):
        page.run("document.querySelector('.skip').focus()")
        tab_to(page, f"#{place}")
        outline = "return getComputedStyle(document.activeElement).outlineStyle"
        assert page.run(outline) != "none"
        press(page, Keys.ENTER)
        page.wait(lambda place=place: page.at(place).is_displayed())
        page.wait(lambda: focused(page) == "place")


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_window_and_every_field_has_a_name(page, width):
    page.size(width, 844 if width == 390 else 800)
    ask(page, "The sky " * 3)
    page.click(page.one(".side:nth-child(2) .foot button"))
    page.wait(lambda: page.text("most"))
    for place in ("talk", "look", "operate", "train"):
        page.go(place)
        assert page.run("return document.documentElement.scrollWidth") <= width
        nameless = page.run(
            "return [...document.querySelectorAll('main button, main input, main select,"
            " main textarea')].filter((e) => !e.hidden && !e.labels?.length && !e.textContent"
            " && !e.getAttribute('aria-label')).map((e) => e.id)"
        )
        assert nameless == []


def test_nothing_is_fetched_from_elsewhere(page):
    page.requests()
    page.open(page.url)
    ask(page, "The sky")
    for place in ("look", "operate", "train"):
        page.go(place)
    addresses = page.requests()
    assert len(addresses) > 10
    assert [a for a in addresses if not a.startswith((page.url, "data:", "about:"))] == []


def test_with_a_key_the_page_is_a_shell_that_asks_for_it(page, served):
    with served.with_key("open sesame, if you please") as url:
        page.driver.get(url)
        page.wait(lambda: page.at("key-form").is_displayed())
        assert not page.at("place").is_displayed() and not page.text("model")
        page.write("key", "open barley")
        press(page, Keys.ENTER)
        page.wait(lambda: page.text("key-wrong"))
        page.write("key", "open sesame, if you please")
        press(page, Keys.ENTER)
        page.wait(lambda: page.text("model") and page.at("place").is_displayed())
        assert page.run("return sessionStorage.getItem('key')") == "open sesame, if you please"
        assert "sesame" not in json.dumps(page.requests())
