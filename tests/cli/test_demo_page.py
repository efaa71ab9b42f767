"""The pages of `zoo demo` in headless Chromium: what one clicks works, and nothing is asked of any other machine."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import zoo.hub.artifact as artifact
from zoo.demo.page import build, gradio, open_demo, serve
from zoo.errors import ZooError

pytest.importorskip("gradio")
pytest.importorskip("selenium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not shutil.which("chromium") or not shutil.which("chromedriver"), reason="no chromium or chromedriver here"
    ),
]
WAIT = 90  # seconds; the machine may be busy
Page = Callable[[Path], Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-proxy-server",
                 "--window-size=1180,1000", "--disable-background-networking"):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(shutil.which("chromedriver"))))
    driver.set_page_load_timeout(WAIT)
    yield driver
    driver.quit()


@pytest.fixture
def visit(browser: Any) -> Iterator[Page]:
    """Serve the page of an artifact, open it, and close it after the test."""
    pages = []

    def go(place: Path) -> Any:
        found = artifact.load(place)
        page = build(open_demo(found), place.name)
        pages.append(page)
        browser.get(serve(page, port=0))
        wait(browser, lambda: browser.find_elements("id", "read"))
        return browser

    yield go
    for page in pages:
        page.close(verbose=False)


def wait(browser: Any, condition: Callable[[], Any]) -> Any:
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.support.ui import WebDriverWait

    ignored = [StaleElementReferenceException]
    return WebDriverWait(browser, WAIT, ignored_exceptions=ignored).until(lambda _: condition())


def click(browser: Any, name: str) -> None:
    browser.execute_script("document.getElementById(arguments[0]).click()", name)


def words(browser: Any, name: str) -> str:
    return str(browser.execute_script("return document.getElementById(arguments[0])?.innerText || ''", name))


def width(browser: Any, name: str) -> int:
    """Width in pixels of the picture in a component, 0 before there is one."""
    script = "return document.querySelector('#' + arguments[0] + ' img')?.naturalWidth || 0"
    return int(browser.execute_script(script, name))


def upload(browser: Any, file: Path, name: str = "input") -> None:
    field = wait(browser, lambda: browser.find_elements("css selector", f"#{name} input[type=file]"))[0]
    field.send_keys(str(file))


def hosts(browser: Any) -> set[str]:
    """Hosts of everything that the browser asked for since the last call."""
    import json
    from urllib.parse import urlsplit

    found = set()
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            address = urlsplit(message["params"]["request"]["url"])
            found |= {address.hostname} if address.scheme in ("http", "https", "ws", "wss") else set()
    return found


def shot(browser: Any, name: str) -> None:
    """A picture of the page where ZOO_SCREENSHOTS names a folder."""
    if os.environ.get("ZOO_SCREENSHOTS"):
        browser.save_screenshot(str(Path(os.environ["ZOO_SCREENSHOTS"]) / f"{name}.png"))


def test_dna_is_read_and_substituted(visit: Page, models: dict[str, Path]) -> None:
    page = visit(models["letters"])
    click(page, "read")
    wait(page, lambda: width(page, "picture") > 500)
    assert "log-likelihood" in words(page, "table")
    assert "a uniform guess costs 2" in words(page, "note")
    shot(page, "dna")
    click(page, "mutate")
    wait(page, lambda: "substitutions of sequence" in words(page, "note"))
    assert hosts(page) <= {"127.0.0.1"}, "the page asks other machines"


def test_a_complaint_of_the_model_is_a_sentence_on_the_page(visit: Page, models: dict[str, Path]) -> None:
    page = visit(models["classes"])
    field = page.find_element("css selector", "#dna textarea")
    field.clear()
    field.send_keys("ACGT" * 40)
    click(page, "read")
    complaint = wait(page, lambda: words(page, "complaint"))
    assert complaint == ("sequence 'sequence' has 161 tokens but the model takes at most 130: cut it into windows")
    field.clear()
    field.send_keys("ACGTACGT")
    click(page, "read")
    wait(page, lambda: "p_yes" in words(page, "table"))
    assert not words(page, "complaint")


def test_a_picture_is_dropped_and_tokens_are_slid(visit: Page, visual: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 100).save(tmp_path / "picture.png")
    page = visit(visual["flextok"])
    upload(page, tmp_path / "picture.png")
    wait(page, lambda: "4 of 4 tokens" in words(page, "note"))
    wait(page, lambda: width(page, "picture") == 256)
    slider = page.find_element("css selector", "#tokens input[type=range]")
    page.execute_script(
        "const s = arguments[0]; s.value = 1; s.dispatchEvent(new Event('input', {bubbles: true}));"
        "s.dispatchEvent(new Event('change', {bubbles: true}));"
        "s.dispatchEvent(new PointerEvent('pointerup', {bubbles: true}))",
        slider,
    )
    wait(page, lambda: "1 of 4 tokens" in words(page, "note"))
    shot(page, "picture")
    assert hosts(page) <= {"127.0.0.1"}


def test_a_clip_is_watched(visit: Page, visual: dict[str, Path]) -> None:
    page = visit(visual["nbp_class"])
    click(page, "read")
    wait(page, lambda: width(page, "picture") >= 256)
    source = page.execute_script("return document.querySelector('#picture img').src")
    assert source.split("?")[0].endswith(".gif")
    shot(page, "clip")
    assert hosts(page) <= {"127.0.0.1"}


def test_a_question_is_answered(visit: Page, visual: dict[str, Path], tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (30, 30), "red").save(tmp_path / "p.png")
    page = visit(visual["mqt"])
    click(page, "read")
    wait(page, lambda: words(page, "complaint") == "drop a picture first")
    upload(page, tmp_path / "p.png")
    page.find_element("css selector", "#question textarea, #question input").send_keys("what color is it?")
    wait(page, lambda: width(page, "input") > 0)
    click(page, "read")
    wait(page, lambda: "9 of 9 visual tokens" in words(page, "note"))
    assert not words(page, "complaint")
    shot(page, "question")


@pytest.mark.parametrize("name", ["titok", "maskgit", "rar", "nbp", "nbp_tokenizer"])
def test_the_other_pages_show_up(visit: Page, visual: dict[str, Path], name: str) -> None:
    page = visit(visual[name])
    click(page, "read")
    if name in ("maskgit", "rar"):
        wait(page, lambda: width(page, "picture") >= 256)
    else:
        wait(page, lambda: "drop" in words(page, "complaint"))


def test_a_port_that_is_taken(models: dict[str, Path]) -> None:
    import socket

    page = build(open_demo(artifact.load(models["letters"])), "letters")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ZooError, match=f"cannot serve on 127.0.0.1:{port} .*choose another --port"):
            serve(page, port=port)
    with pytest.raises(ZooError, match=r"cannot serve on 203\.0\.113\.5"):
        serve(page, host="203.0.113.5", port=0)


def test_gradio_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    gradio()
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
