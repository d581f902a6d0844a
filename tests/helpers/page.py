"""What a person does on the page of a served model, and what they see there."""

from collections.abc import Callable

from selenium.webdriver.common.action_chains import ActionChains

from helpers.browser import Browser

TOKENS = "#sides .side:nth-child({}) .answer .token"


def tokens(page: Browser, side: int) -> list[str]:
    """Returns the texts of a side's tokens."""
    return page.run(
        "return [...document.querySelectorAll(arguments[0])].map((t) => t.textContent)",
        TOKENS.format(side),
    )


def answers(page: Browser) -> tuple[str, str]:
    """Returns both sides' answers once neither streams."""
    page.wait(lambda: not page.all(".answer.running") and page.text("answer") == "Answer again")
    return "".join(tokens(page, 1)), "".join(tokens(page, 2))


def answered_again(page: Browser, act: Callable[[], object]) -> tuple[str, str]:
    """Returns both sides' answers after an act that makes them answer anew."""
    page.run("document.querySelectorAll('.answer .token').forEach((t) => t.classList.add('old'))")
    act()
    page.wait(lambda: not page.all(".token.old") and all(tokens(page, side) for side in (1, 2)))
    return answers(page)


def write_prompt(page: Browser, prompt: str, count: int = 12) -> None:
    if not page.at("seed").is_displayed():
        page.one("#talk summary").click()
    page.write("max-new-tokens", count)
    page.write("prompt", prompt)


def ask(page: Browser, prompt: str, count: int = 12) -> tuple[str, str]:
    """Returns both sides' answers to a prompt."""
    write_prompt(page, prompt, count)
    return answered_again(page, lambda: page.click(page.at("answer")))


def dial(page: Browser, adapter: str, weight: float) -> tuple[str, str]:
    """Moves an adapter's slider on the right side, and returns both answers."""
    slider = page.one(f'[aria-label="Weight of {adapter} on the right side"]')
    move = "const [at, to] = arguments; at.value = to; at.dispatchEvent(new Event('input'))"
    return answered_again(page, lambda: page.run(move, slider, weight))


def shown_hashes(page: Browser) -> list[str]:
    """Returns the hashes that the right side shows, in full."""
    title = page.one(".side:nth-child(2) code").get_attribute("title")
    return title.partition(": ")[2].split(", ")


def journal(page: Browser) -> list[tuple[str, bool]]:
    """Returns the operations' titles, the newest first, and whether each is undone."""
    return page.run(
        "return [...document.querySelectorAll('#journal li:not(.none)')].map("
        "(one) => [one.querySelector('span').firstChild.data, one.classList.contains('undone')])"
    )


def in_force(page: Browser) -> int:
    """Returns how many operations are not undone."""
    return sum(not undone for _, undone in journal(page))


def undo(page: Browser) -> None:
    """Clicks Undo, and waits until one operation fewer is in force."""
    before = in_force(page)
    page.push_at("#undo")
    page.wait(lambda: in_force(page) == before - 1)


def figure(page: Browser, name: str) -> str:
    """Returns one of the figures of the run that is open."""
    return page.run(
        "return [...document.querySelectorAll('#figures div')].find("
        "(one) => one.firstChild.textContent === arguments[0])?.lastChild.textContent ?? ''",
        name,
    )


def focused(page: Browser) -> str:
    """Returns a name of what has the focus."""
    return page.run(
        "const e = document.activeElement;"
        "return e.id || e.getAttribute('aria-label') || e.getAttribute('href') || e.className"
        " || e.textContent.slice(0, 40)"
    )


def press(page: Browser, *keys: str) -> None:
    """Presses keys, whatever has the focus."""
    ActionChains(page.driver).send_keys(*keys).perform()
