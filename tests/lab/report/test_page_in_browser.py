"""The page in headless Chromium, from a file and without a network: it sorts, switches, and stays within a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_sweep

from midl.lab.report import read_results, to_html

selenium = pytest.importorskip("selenium", reason="selenium is not installed")

_CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
_DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (_CHROMIUM and _DRIVER), reason="Chromium and its driver are not installed (Debian: chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("browser")
    page = folder / "report.html"
    page.write_text(to_html(read_results(write_sweep(folder / "runs")), "midl report runs"))
    options = webdriver.ChromeOptions()
    options.binary_location = str(_CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "window-size=1280,900"):
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(_DRIVER))
    driver.get(page.as_uri())
    yield driver
    driver.quit()


def _find(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def _column(browser: Any, caption: str, column: int) -> list[str]:
    return browser.execute_script(
        "const t = [...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith(arguments[0]));"
        "return [...t.tBodies[0].rows].map(r => r.cells[arguments[1]].textContent);",
        caption, column,
    )  # fmt: skip


def test_sorting_a_table(browser: Any) -> None:
    caption = "mnist: accuracy, mean"
    before = _column(browser, caption, 0)
    assert before[0] == "dense"
    header = browser.execute_script(
        "const t = [...document.querySelectorAll('table')].find(t => t.caption.textContent.startsWith(arguments[0]));"
        "return t.tHead.rows[0].cells[1];",
        caption,
    )
    for order in ("ascending", "descending"):
        browser.execute_script("arguments[0].querySelector('button').click()", header)
        assert header.get_attribute("aria-sort") == order
        accuracies = [float(text.split(" ")[0]) for text in _column(browser, caption, 1)]
        assert accuracies == sorted(accuracies, reverse=order == "descending")
    assert sorted(_column(browser, caption, 0)) == sorted(before)


def test_switching_the_data_set(browser: Any) -> None:
    def visible() -> list[str]:
        return [panel.get_attribute("data-dataset") for panel in _find(browser, ".panel") if panel.is_displayed()]

    assert visible() == ["mnist"]
    for name in ("adult", "mnist"):
        (button,) = _find(browser, f".switch button[data-show={name}]")
        browser.execute_script("arguments[0].click()", button)
        assert visible() == [name]
        assert button.get_attribute("aria-pressed") == "true"
        assert _find(browser, f".panel[data-dataset={name}] svg[role=img]")[0].is_displayed()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(browser: Any, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    )
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(browser: Any, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )

    def luminance(colour: str) -> float:
        channels = [int(part.strip(" rgba()")) / 255 for part in colour.split(",")[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def colour(selector: str, name: str) -> float:
        return luminance(_find(browser, selector)[0].value_of_css_property(name))

    paper = colour("html", "background-color")
    assert (paper > 0.5) == (scheme == "light")
    texts = {".badge.v-holds": 4.5, ".badge.v-fails": 4.5, ".note": 4.5, "body": 7, "a": 4.5}
    # Marks need less contrast than text.
    marks = {f".legend .c-{name}": 3 for name in ("dense", "dropout", "narrow", "scratch", "converted", "elastic")}
    for selector, least in (texts | marks).items():
        light, dark = sorted((colour(selector, "color"), paper), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= least, selector


def test_no_errors_and_no_requests(browser: Any) -> None:
    browser.refresh()
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    # Chromium's own start page asks for things too.
    asked = {request["request"]["url"] for request in requests if request["documentURL"] == browser.current_url}
    assert asked
    assert all(address.startswith(("file://", "data:")) for address in asked), asked


def test_the_page_is_small_enough_to_send(browser: Any) -> None:
    page = Path(browser.current_url.removeprefix("file://"))
    assert page.stat().st_size < 2_000_000
