"""The report page in a real browser: clicked through, by mouse and by keyboard, at several widths."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, Keys
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from benchmarks import history
from benchmarks.page import page
from benchmarks.schema import read_result

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


@pytest.fixture(scope="session")
def browser() -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "hide-scrollbars"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    # Both named, so that selenium looks for neither on the network.
    driver = Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="session")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "bench.html"
    path.write_text(page(read_result(RESULTS / "smollm2-2026-11-22.json")))
    return path


@pytest.fixture
def opened(browser: Chrome, html: Path) -> Chrome:
    resize(browser, 1200)
    browser.get(html.as_uri())
    return browser


def resize(browser: Chrome, width: int, scheme: str = "light") -> None:
    metrics = {"width": width, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)


def all_of(browser: Chrome, selector: str) -> list[WebElement]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def one(browser: Chrome, selector: str) -> WebElement:
    return browser.find_element(By.CSS_SELECTOR, selector)


def log_of(browser: Chrome, kind: str) -> list[dict[str, str]]:
    """What was logged since it was last asked for."""
    return [dict(entry) for entry in browser.execute("getLog", {"type": kind})["value"]]


def facts(browser: Chrome) -> str:
    return one(browser, "#facts").text


def shown_runs(browser: Chrome) -> list[str | None]:
    return [run.get_attribute("id") for run in all_of(browser, ".run") if run.is_displayed()]


def importing(browser: Chrome) -> WebElement:
    return one(browser, '#run-1-3 .bar[aria-label^="engine import, template"]')


def test_the_median_run_of_each_image_is_shown_at_first(opened: Chrome) -> None:
    assert shown_runs(opened) == ["run-0-2", "run-1-3", "run-2-1"]
    assert not one(opened, "#facts").is_displayed()


def test_pointing_at_a_bar_tells_its_details_until_the_pointer_leaves(opened: Chrome) -> None:
    ActionChains(opened).move_to_element(importing(opened)).perform()
    assert "engine_import" in facts(opened)
    assert "template, pid 9" in facts(opened)
    assert "5.634 s, 56.4% of the start" in facts(opened)
    ActionChains(opened).move_to_element(one(opened, "h1")).perform()
    assert not one(opened, "#facts").is_displayed()


def test_a_click_keeps_the_details_and_escape_lets_go(opened: Chrome) -> None:
    importing(opened).click()
    ActionChains(opened).move_to_element(one(opened, "h1")).perform()
    assert "engine_import" in facts(opened)
    ActionChains(opened).send_keys(Keys.ESCAPE).perform()
    assert not one(opened, "#facts").is_displayed()


def test_runs_are_chosen_by_their_times_and_all_at_once(opened: Chrome) -> None:
    chips = all_of(opened, "#image-1 .chip[aria-controls]")
    chips[0].click()
    assert chips[0].get_attribute("aria-pressed") == "true"
    assert "run-1-0" in shown_runs(opened)
    chips[0].click()
    assert "run-1-0" not in shown_runs(opened)
    one(opened, "#image-1 .all").click()
    assert [run for run in shown_runs(opened) if run and run.startswith("run-1-")] == [
        f"run-1-{i}" for i in range(5)
    ]


def test_a_folded_image_leaves_its_scale_to_the_others(opened: Chrome) -> None:
    before = importing(opened).size["width"]
    one(opened, "#image-0 .fold").click()
    assert shown_runs(opened) == ["run-1-3", "run-2-1"]
    assert importing(opened).size["width"] > 1.9 * before
    ticks = [tick.text for tick in all_of(opened, "#run-1-3 .axis b")]
    assert (ticks[0], ticks[-1]) == ("0", "10 s")


def test_the_keyboard_reaches_every_bar_of_a_run(opened: Chrome) -> None:
    bars = all_of(opened, "#run-1-3 .bar")
    assert [bar.get_attribute("tabindex") for bar in bars].count("0") == 1
    opened.execute_script("arguments[0].focus({focusVisible: true})", bars[0])
    told = []
    for _ in bars:
        told.append(facts(opened))
        ActionChains(opened).send_keys(Keys.ARROW_RIGHT).perform()
    assert opened.switch_to.active_element == bars[0]
    assert len(told) == len(bars) == len([text for text in told if "took" in text])
    ActionChains(opened).send_keys(Keys.ENTER, Keys.TAB).perform()
    assert facts(opened) == told[0]


def test_a_chip_can_be_pressed_by_keyboard(opened: Chrome) -> None:
    one(opened, "#image-2 .chip").send_keys(Keys.SPACE)
    assert "run-2-0" in shown_runs(opened)


@pytest.mark.parametrize("width", [360, 400, 900, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_at_any_width(opened: Chrome, width: int, scheme: str) -> None:
    resize(opened, width, scheme)
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    for bar in all_of(opened, ".run:not([hidden]) .bar"):
        assert bar.rect["x"] + bar.rect["width"] <= width
    importing(opened).click()
    box = one(opened, "#facts").rect
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


CONTRAST = """
const light = (color) => {
  const parts = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
};
const solid = (element) => {
  for (; element; element = element.parentElement) {
    const color = getComputedStyle(element).backgroundColor;
    if (!color.endsWith(", 0)") && color !== "transparent") return color;
  }
};
return [...document.querySelectorAll("main *")]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => {
    const [a, b] = [light(getComputedStyle(e).color), light(solid(e))].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 120)];
  })
  .sort((x, y) => x[0] - y[0])[0];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_asks_for(opened: Chrome, scheme: str) -> None:
    resize(opened, 1600, scheme)
    worst, where = opened.execute_script(CONTRAST)
    assert worst >= 4.5, where


def test_in_print_the_controls_are_gone_and_the_bars_are_there(opened: Chrome) -> None:
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        assert not one(opened, ".chips").is_displayed()
        assert importing(opened).is_displayed()
        assert opened.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
    finally:
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_page_loads_nothing_and_logs_no_error(opened: Chrome, html: Path) -> None:
    log_of(opened, "performance")
    opened.get(html.as_uri())
    sent = [
        entry for entry in log_of(opened, "performance") if "Network.requestWillBeSent" in entry["message"]
    ]
    assert len(sent) == 1  # the page itself
    assert log_of(opened, "browser") == []


@pytest.fixture(scope="session")
def ablation_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours whole, and as if AWQ were ours without an optimisation and stock without all."""
    result = read_result(RESULTS / "smollm2-2026-11-23-warm.json")
    stock, whole, awq = result.images
    variants = {
        whole.reference: whole,
        awq.reference: whole.without("read-ahead"),
        stock.reference: whole.without("read-ahead", "template", name="all of them"),
    }
    runs = [run.model_copy(update={"image": variants[run.image].reference}) for run in result.runs]
    made = result.model_copy(update={"images": tuple(variants.values()), "runs": tuple(runs)})
    path = tmp_path_factory.mktemp("ablation") / "bench.html"
    path.write_text(page(made))
    return path


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_what_each_optimisation_saves_can_be_read_at_any_width(
    browser: Chrome, ablation_html: Path, width: int, scheme: str
) -> None:
    resize(browser, width, scheme)
    browser.get(ablation_html.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    table = one(browser, ".savings")
    # Nothing of it has to be scrolled to.
    assert table.rect["x"] + table.rect["width"] <= width
    rows = [row.text for row in all_of(browser, ".savings tbody tr")]
    assert rows[0].startswith("all of them")
    assert "3.87" in rows[0]
    assert "undecided" in (all_of(browser, ".savings tbody tr")[1].get_attribute("class") or "")
    assert len(all_of(browser, "section.image")) == 2
    worst, where = browser.execute_script(CONTRAST)
    assert worst >= 4.5, where


def test_the_history_fits_a_narrow_screen(browser: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "history.html"
    results = [item for item in history.read_folder(RESULTS)[0] if item[0] == "smollm2-2026-11-22.json"]
    path.write_text(history.page(history.series(results)))
    resize(browser, 400)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert len(all_of(browser, "svg circle")) == 3


OUTSIDE = """
const plot = document.querySelector("svg").viewBox.baseVal;
return [...document.querySelectorAll("svg text")]
  .filter((text) => {
    const box = text.getBBox();
    return box.x < 0 || box.x + box.width > plot.width || box.y < 0 || box.y + box.height > plot.height;
  })
  .map((text) => text.textContent);
"""


def test_no_text_of_a_history_of_many_series_leaves_its_plot(browser: Chrome, tmp_path: Path) -> None:
    path = tmp_path / "history.html"
    lines = history.series(history.read_folder(RESULTS)[0])
    path.write_text(history.page(lines))
    resize(browser, 1200)
    browser.get(path.as_uri())
    shown = [text.text for text in all_of(browser, "svg text")]
    assert {line.name for line in lines} <= set(shown)
    assert browser.execute_script(OUTSIDE) == []
