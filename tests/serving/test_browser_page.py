"""The page in Chromium: each of its four places used as a person would, to its end."""

import json
import re
import signal
import subprocess
import sys

import pytest
from helpers.browser import Browser, chromium
from helpers.page import (
    TOKENS,
    answered_again,
    answers,
    ask,
    dial,
    figure,
    focused,
    in_force,
    press,
    shown_hashes,
    tokens,
    undo,
)
from helpers.served_page import ADAPTER, OTHER, SCRIPT, ServedPage, served_page
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

RECORDS = [
    {
        "messages": [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": f"It is {i + 1}."},
        ]
    }
    for i in range(24)
]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS)


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


# Talk


def test_talk_answers_on_two_sides_which_a_slider_makes_one(page):
    base, adapted = ask(page, "The sky")
    assert base and adapted and base != adapted
    titles = [title.text for title in page.all(".side h2")]
    assert titles == ["base", ADAPTER]
    assert all(re.fullmatch("[0-9a-f]{64}", one) for one in shown_hashes(page))
    assert len(shown_hashes(page)) == 2
    assert dial(page, ADAPTER, 0) == (base, base)
    assert dial(page, ADAPTER, 1) == (base, adapted)


def test_adapters_are_blended_with_sliders_and_the_blend_is_looked_into(page):
    base, one = ask(page, "The sky")
    more = Select(page.one(".side:nth-child(2) .dials select"))
    assert [option.text for option in more.options][1:] == [OTHER]
    _, both = answered_again(page, lambda: more.select_by_value(OTHER))
    assert both not in (base, one)
    assert len(set(shown_hashes(page))) == 3
    assert dial(page, OTHER, 0) == (base, one)
    _, half = dial(page, OTHER, 0.5)
    assert half not in (base, one, both)
    title = page.one(".side:nth-child(2) h2").text
    assert title == f"{ADAPTER} + {OTHER} × 0.5"
    page.click(page.one(".side:nth-child(2) .foot button"))
    page.wait(lambda: page.text("most"))
    assert page.at("look-adapter").get_property("value") == title
    blended = page.text("lens")
    Select(page.at("look-adapter")).select_by_visible_text(ADAPTER)
    page.wait(lambda: page.text("lens") != blended)
    page.go("talk")
    take_off = page.one(f'[aria-label="Take {OTHER} off the right side"]')
    assert answered_again(page, take_off.click) == (base, one)


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


def test_an_answer_says_when_the_weights_have_changed_since(page):
    ask(page, "The sky")
    hashes = shown_hashes(page)
    page.go("operate")
    page.push(f"Merge {ADAPTER}")
    page.wait(lambda: not page.all(f'[aria-label="Merge {ADAPTER}"]'))
    page.go("talk")
    changed = page.one(".side:nth-child(1) > p:not(.wrong)")
    page.wait(changed.is_displayed)
    page.go("operate")
    undo(page)
    page.go("talk")
    page.wait(lambda: not changed.is_displayed())
    page.wait(lambda: shown_hashes(page) == hashes)


# Look


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


def test_of_an_answer_that_is_too_long_the_beginning_is_looked_into(page, served):
    most = served.model.config.block_size
    ask(page, "The sky", most)  # 7 characters, and as many tokens as there is room for
    page.click(page.one(".side:nth-child(1) .foot button"))
    page.wait(lambda: page.text("most"))
    assert str(most) in page.text("look-note") and not page.text("look-error")
    assert len(page.all("#look-tokens .token")) == most
    page.write("look-text", "A text of one's own")
    page.click(page.one("#look-form .primary"))
    page.wait(lambda: len(page.all("#look-tokens .token")) == len("A text of one's own"))
    assert not page.text("look-note")


# Operate


def test_operate_from_targets_to_a_merge_and_back(page):
    page.go("operate")
    page.wait(lambda: page.all(".layers [data-path]"))
    page.one('[data-preset="qv"]').click()
    assert "q_proj, v_proj" in page.text("targets")
    page.write("inject-name", "fresh")
    page.write("inject-rank", 2)
    page.at("inject-plan-button").click()
    page.wait(lambda: page.text("inject-plan"))
    before, done = page.text("model"), in_force(page)
    page.push_at("#inject")
    page.wait(lambda: page.all('[aria-label="Merge fresh"]'))
    assert in_force(page) == done + 1
    page.wait(lambda: page.all(".changed"))
    page.push("Disable fresh")
    page.push("Enable fresh")
    page.wait(lambda: page.all('[aria-label="Disable fresh"]'))
    weight = page.one(f'#blend-weights [name="{ADAPTER}"]')
    weight.clear()
    weight.send_keys("0.5", Keys.ENTER)
    page.wait(lambda: "on × 0.50" in page.text("adapters"))
    page.push(f"Merge {ADAPTER}")
    page.wait(lambda: not page.all(f'[aria-label="Merge {ADAPTER}"]'))
    merged = page.text("model")
    assert merged != before
    undo(page)
    assert page.text("model") == before
    page.push_at("#redo")
    page.wait(lambda: page.text("model") == merged)
    while in_force(page) > done:
        undo(page)
    assert page.text("model") == before


def test_a_head_is_ablated_with_a_click_and_comes_back(page):
    page.go("operate")
    page.push("Ablate head 1 of layer 0")
    page.wait(lambda: page.all('[aria-label="Head 1 of layer 0 is ablated"]'))
    undo(page)
    page.wait(lambda: page.all('[aria-label="Ablate head 1 of layer 0"]'))


def test_saving_says_where(page, served):
    page.go("operate")
    page.write("save-name", "kept")
    page.one("#save-form button").click()
    page.wait(lambda: "kept" in page.text("save-note"))
    assert any(path.name == "kept" and path.is_dir() for path in served.folder.rglob("kept"))


# Train


def test_train_from_dropped_answers_to_an_adapter_beside_the_base(page, tmp_path):
    (tmp_path / "sums.jsonl").write_text(JSONL)
    page.go("train")
    page.drop(tmp_path / "sums.jsonl", page.at("drop"))
    page.wait(lambda: page.all("#preview mark"))
    assert "It is 1." in page.one("#preview mark").text
    assert "0 + 1?" in page.text("preview")
    assert not any("+ 1?" in mark.text for mark in page.all("#preview mark"))
    fill_training(page, "sums")
    page.click(page.at("train-start"))
    page.wait(lambda: page.at("pause").is_displayed())
    page.wait(lambda: page.all("#chart canvas") and page.all(".sample"))
    assert page.text("train-start") != "Start" and not page.at("train-start").is_enabled()
    page.write("train-name", "second")
    page.run("const it = document.getElementById('train-start'); it.disabled = false; it.click()")
    page.wait(lambda: "sums" in page.text("train-error"))  # that one runs
    names = "return [...document.querySelectorAll('.runs b')].map((one) => one.textContent)"
    assert "second" not in page.run(names)
    page.push_at("#stop")
    page.wait(lambda: figure(page, "State") == "stopped")
    assert page.wait(lambda: [one for one in page.all(".runs b") if one.text == "sums"])
    page.go("talk")
    page.wait(lambda: page.one(".side:nth-child(2) h2").text == "sums")
    base, trained = ask(page, "3 + 1?")
    assert base and trained
    assert len(set(shown_hashes(page))) == 2  # the base's and the newest checkpoint's


def fill_training(page: Browser, name: str) -> None:
    for field, value in (("name", name), ("steps", 100_000), ("batch", 2), ("every", 5)):
        page.write(f"train-{field}", value)


def test_a_run_that_a_terminal_began_is_watched(page, served):
    run = served.folder / "runs" / "far"
    text = served.folder / "far.txt"
    text.write_text("It is what it is. " * 200)
    words = f"train {text} --out {run} --max-steps 100000 --evaluate-every 50 --batch-size 2"
    sizes = "--n-layer 1 --n-embd 8 --n-head 1 --block-size 8"
    command = [sys.executable, "-m", "nanogpt_surgery", *words.split()]
    terminal = subprocess.Popen(
        [*command, *sizes.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        page.go("train")
        button = (
            "[...document.querySelectorAll('.runs button')].find("
            "(b) => b.textContent.startsWith('far'))"
        )
        page.wait(lambda: page.run(f"const it = {button}; it?.click(); return Boolean(it)"))
        page.wait(lambda: figure(page, "State") == "running" and page.all("#chart canvas"))
        first = figure(page, "Step")
        page.wait(lambda: figure(page, "Step") != first)
        assert not page.at("stop").is_displayed()  # it belongs to the terminal
        terminal.send_signal(signal.SIGTERM)
        terminal.wait(300)
        page.wait(lambda: figure(page, "State") == "stopped")
    finally:
        terminal.kill()
        terminal.wait()


# What models and people write, the line, tabs


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
    done = in_force(page)
    page.driver.switch_to.new_window("tab")
    try:
        page.open(served.url, "operate")
        page.push("Ablate head 0 of layer 1")
        page.wait(lambda: page.all('[aria-label="Head 0 of layer 1 is ablated"]'))
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)
    page.wait(lambda: page.all('[aria-label="Head 0 of layer 1 is ablated"]'))
    page.wait(lambda: in_force(page) == done + 1)
    undo(page)


# The keyboard


def tab_to(page: Browser, name: str) -> None:
    """Presses Tab until an element has the focus, which is seen wherever it is on the way."""
    for _ in range(120):
        if focused(page) == name:
            return
        press(page, Keys.TAB)
        seen = page.run(
            "const e = document.activeElement, s = getComputedStyle(e.closest('.drop') ?? e);"
            "return e === document.body"
            " || s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 2"
        )
        assert seen, focused(page)
    raise AssertionError(f"the Tab key does not reach {name}")


def enter(page: Browser, name: str) -> None:
    """Goes to a button with Tab, and presses Enter."""
    tab_to(page, name)
    press(page, Keys.ENTER)


def go_by_keyboard(page: Browser, place: str) -> None:
    page.run("document.querySelector('.skip').focus()")
    enter(page, f"#{place}")
    page.wait(lambda: page.at(place).is_displayed() and focused(page) == "place")


def write(page: Browser, name: str, text: object) -> None:
    """Goes to a field with Tab, and writes over what it holds."""
    tab_to(page, name)
    page.run("document.activeElement.select()")
    press(page, str(text))


def test_the_keyboard_is_enough_to_talk(page):
    tab_to(page, "prompt")
    press(page, "The sky", Keys.ENTER)
    page.wait(lambda: page.all(TOKENS.format(2)))
    answers(page)
    page.run("document.querySelector('#answer').focus()")
    tab_to(page, "token")
    press(page, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert page.run("return document.activeElement.textContent") == tokens(page, 1)[2]
    press(page, Keys.ENTER)
    assert page.run("return document.activeElement.closest('#alternatives') !== null")
    press(page, Keys.ESCAPE)
    assert not page.at("alternatives").is_displayed()
    assert page.run("return document.activeElement.textContent") == tokens(page, 1)[2]


def test_the_keyboard_is_enough_to_look(page):
    go_by_keyboard(page, "look")
    write(page, "look-text", "The sky")
    press(page, Keys.TAB, Keys.ENTER)
    page.wait(lambda: page.text("most"))
    tab_to(page, "token")
    press(page, Keys.HOME, Keys.ARROW_RIGHT)
    page.wait(lambda: page.text("look-chosen").startswith("2 of 7"))
    enter(page, "Head 1")
    assert page.at("look-head").get_property("value") == "1"
    tab_to(page, "attribution")
    press(page, Keys.TAB, Keys.END, Keys.ENTER)  # the last head of the first layer
    page.wait(lambda: "head 1, layer 0" in page.at("attention").get_attribute("aria-label"))


def test_the_keyboard_is_enough_to_operate(page):
    go_by_keyboard(page, "operate")
    page.wait(lambda: page.all(".layers [data-path]"))
    done = in_force(page)
    enter(page, "q and v")
    enter(page, "Ablate head 0 of layer 0")
    page.wait(lambda: focused(page) == "Head 0 of layer 0 is ablated")
    write(page, "inject-name", "fresh")
    enter(page, "inject-plan-button")
    page.wait(lambda: page.text("inject-plan") or page.text("inject-error"))
    assert not page.text("inject-error")
    enter(page, "inject")
    page.wait(lambda: page.all('[aria-label="Merge fresh"]'))
    enter(page, "Disable fresh")
    page.wait(lambda: focused(page) == "Enable fresh")
    enter(page, f"Merge {ADAPTER}")
    page.wait(lambda: focused(page) == "undo" and page.at("undo").is_enabled())
    for left in range(3, -1, -1):
        press(page, Keys.ENTER)
        page.wait(lambda n=left: in_force(page) == done + n)


def test_the_keyboard_is_enough_to_train(page, served):
    (served.folder / "runs" / "named.jsonl").write_text(JSONL)
    go_by_keyboard(page, "train")
    write(page, "path", "named.jsonl")
    press(page, Keys.TAB)
    page.wait(lambda: page.all("#preview mark"))
    for name, value in (("name", "typed"), ("steps", 100_000), ("batch", 2), ("every", 5)):
        write(page, f"train-{name}", value)
    enter(page, "train-plan-button")
    page.wait(lambda: page.all("#train-plan dl") or page.text("train-error"))
    assert not page.text("train-error")
    enter(page, "train-start")
    page.wait(lambda: focused(page) == "run-title" and page.all("#chart canvas"))
    enter(page, "pause")
    page.wait(lambda: figure(page, "State") == "paused" and focused(page) == "run-title")
    enter(page, "resume")
    page.wait(lambda: figure(page, "State") == "running" and focused(page) == "run-title")
    enter(page, "stop")
    page.wait(lambda: figure(page, "State") == "stopped")


# What is seen


def show_all(page: Browser) -> None:
    """Fills the four places with what they can show."""
    ask(page, "The sky " * 3)
    page.at("tint").click()
    page.click(page.one(".side:nth-child(2) .foot button"))
    page.wait(lambda: page.text("most"))
    page.go("operate")
    page.wait(lambda: page.all(".layers [data-path]"))


def test_nothing_is_wider_than_the_window_and_every_field_has_a_name(page):
    show_all(page)
    for width in (1280, 390, 640, 320):  # the last two: a laptop's at 200 and 400 %
        page.size(width, 800)
        for place in ("talk", "look", "operate", "train"):
            page.go(place)
            page.wait(lambda w=width: page.run("return document.documentElement.scrollWidth") <= w)
            nameless = page.run(
                "return [...document.querySelectorAll('main button, main input, main select,"
                " main textarea')].filter((e) => !e.hidden && !e.labels?.length && !e.textContent"
                " && !e.getAttribute('aria-label')).map((e) => e.id)"
            )
            assert nameless == []


FAINT = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const over = (top, below) => {
  const alpha = top[3] ?? 1;
  return [0, 1, 2].map((i) => alpha * top[i] + (1 - alpha) * below[i]);
};
const fill = (e) => channels(getComputedStyle(e).backgroundColor);
const behind = (e) => e.parentElement ? over(fill(e), behind(e.parentElement)) : fill(e);
const linear = (c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const share = [.2126, .7152, .0722];
const light = (rgb) => rgb.reduce((sum, c, i) => sum + linear(c / 255) * share[i], 0);
const faint = [];
for (const e of document.querySelectorAll("body *")) {
  const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
  if (!(own || e.matches("input")) || !e.checkVisibility()) continue;
  if (e.matches(":disabled, .unseen, .skip, option")) continue;
  const back = behind(e);
  const [a, b] = [light(over(channels(getComputedStyle(e).color), back)), light(back)];
  const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
  if (ratio < 4.5) faint.push([ratio, e.tagName, e.className, e.textContent.slice(0, 20)]);
}
return faint;
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_text_stands_out_from_what_is_behind_it(page, dark):
    page.size(1280, 800, dark, still=True)
    show_all(page)
    blink = "return getComputedStyle(arguments[0], '::after').animationName"
    answer = page.one(".answer")
    page.run("arguments[0].classList.add('running')", answer)
    assert page.run(blink, answer) == "none"
    page.run("arguments[0].classList.remove('running')", answer)
    for place in ("talk", "look", "operate", "train"):
        page.go(place)
        assert page.run(FAINT) == []


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
