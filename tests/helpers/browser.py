"""A headless Chromium that opens the page as a person does."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

WAIT = 300  # seconds, for a busy machine; nothing takes nearly as long
ARGUMENTS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")


class Browser:
    """A browser with the page in it; elements are named by id, or by CSS selector."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver
        self.url = ""

    def open(self, url: str, place: str = "talk") -> None:
        """Opens a place of the page and waits until the server's state is shown."""
        self.url = url
        self.driver.get("about:blank")
        self.driver.get(f"{url}#{place}")
        self.wait(lambda: self.at("model").text)

    def go(self, place: str) -> None:
        self.one(f'nav a[href="#{place}"]').click()
        self.wait(lambda: self.at(place).is_displayed())

    def at(self, name: str) -> WebElement:
        return self.driver.find_element(By.ID, name)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, element: WebElement) -> None:
        """Scrolls to the middle of the window, where no bar stands over an element, and clicks."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def push(self, label: str) -> None:
        """Clicks the button of this label, as `push_at`."""
        self.push_at(f'[aria-label="{label}"]')

    def push_at(self, selector: str) -> None:
        """Clicks a button once it is not hidden; it may move, or be drawn anew, at any moment."""
        push = (
            "const it = document.querySelector(arguments[0]);"
            "if (!it || it.closest('[hidden]')) return false; it.click(); return true"
        )
        self.wait(lambda: self.run(push, f"{selector}:enabled"))

    def text(self, name: str) -> str:
        return self.at(name).get_property("textContent")

    def write(self, name: str, text: object) -> None:
        """Puts a text in the place of a field's own."""
        self.at(name).clear()
        self.at(name).send_keys(str(text))

    def run(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, condition: Callable[[], Any]) -> Any:
        """Returns what a condition gives once it is true; elements may be replaced meanwhile."""
        waiting = WebDriverWait(
            self.driver, WAIT, 0.05, ignored_exceptions=[StaleElementReferenceException]
        )
        return waiting.until(lambda _: condition())

    def size(self, width: int, height: int, dark: bool = False, still: bool = False) -> None:
        """Sets the window's size, the theme, and whether its person wants nothing to move."""
        phone = width < 600
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone},
        )
        wanted = {
            "prefers-color-scheme": "dark" if dark else "light",
            "prefers-reduced-motion": "reduce" if still else "no-preference",
        }
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def drop(self, file: Path, element: WebElement) -> None:
        """Drags a file from outside over an element, and lets it go there."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        box = self.run("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y]", element)
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.driver.execute_cdp_cmd(
                "Input.dispatchDragEvent",
                {"type": kind, "x": box[0] + 9, "y": box[1] + 9, "data": data},
            )

    def requests(self) -> list[str]:
        """Returns the addresses of all requests since it was last called."""
        events = (json.loads(line["message"])["message"] for line in self.log("performance"))
        return [e["params"]["request"]["url"] for e in events if "requestWillBeSent" in e["method"]
                and "request" in e["params"]]  # fmt: skip

    def log(self, kind: str) -> list[dict[str, Any]]:
        return self.driver.get_log(kind)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Starts the browser; skips where there is none, but fails where BROWSER_TESTS=required."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if not (program and driver):
        reason = f"no browser to open the page in: chromium {program}, chromedriver {driver}"
        if os.environ.get("BROWSER_TESTS") == "required":
            pytest.fail(reason)
        pytest.skip(reason)
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ARGUMENTS:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    running = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(running)
    finally:
        running.quit()
