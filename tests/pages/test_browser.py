"""Pages in a browser: headless Chromium, where the machine has it; otherwise the tests are skipped and say so."""

from __future__ import annotations

import http.server
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import peers
import pytest
from page_samples import DIALOGUE, HOSTILE, SCIENCE, SHAKESPEARE, hostile_list

import loratools

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    peers.needs("selenium"),
    pytest.mark.skipif(CHROMIUM is None or DRIVER is None, reason="chromium or its driver is not installed"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    loratools.write_page(loratools.inspect(SCIENCE, values=True), folder / "inspect.html")
    loratools.write_page(loratools.compare(SCIENCE, DIALOGUE, SHAKESPEARE), folder / "compare.html")
    loratools.write_page(hostile_list(), folder / "hostile.html")
    loratools.write_page(hostile_list(300), folder / "some.html")
    loratools.write_page(hostile_list(10_000), folder / "many.html")
    return folder


def shown(browser: Any, table: int = 0) -> list[str]:
    """The first cells of the rows that are seen, in order."""
    cells: list[str] = browser.execute_script(
        "return Array.from(document.querySelectorAll('main table')[arguments[0]].tBodies[0].rows)"
        ".filter(row => getComputedStyle(row).display !== 'none')"
        ".map(row => row.cells[0].textContent)",
        table,
    )
    return cells


def column(browser: Any, index: int) -> list[str]:
    cells: list[str] = browser.execute_script(
        "const rows = Array.from(document.querySelector('main table').tBodies[0].rows);"
        "return rows.map(row => row.cells[arguments[0]].textContent)",
        index,
    )
    return cells


def heading(browser: Any, name: str) -> tuple[Any, int]:
    """The button in a heading, and the number of its column."""
    buttons = browser.find_elements("css selector", "main table:first-of-type th button")
    names = [button.text for button in buttons]
    return buttons[names.index(name)], names.index(name)


def complaints(browser: Any) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: Any) -> list[str]:
    """Addresses of everything that was asked for since the last call."""
    import json

    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if not address.startswith("data:")]


def test_click_on_a_heading_sorts_by_number_and_again_the_other_way(browser: Any, pages: Path) -> None:
    browser.get((pages / "inspect.html").as_uri())
    button, index = heading(browser, "norm")

    button.click()
    rising = [float(text) for text in column(browser, index)]
    assert rising == sorted(rising)
    assert len(set(rising)) > 10
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "ascending"

    button.click()
    assert [float(text) for text in column(browser, index)] == rising[::-1]
    sorts = [th.get_attribute("aria-sort") for th in browser.find_elements("css selector", "main table th")]
    assert sorts.count("descending") == 1
    assert sorts.count("ascending") == 0


def test_names_sort_as_people_count_and_the_keyboard_sorts_too(browser: Any, pages: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    browser.get((pages / "some.html").as_uri())
    button, index = heading(browser, "adapter")

    button.send_keys(Keys.ENTER)

    names = [name for name in column(browser, index) if name.startswith("adapter-")]
    assert names == [f"adapter-{i}" for i in range(300)]


def test_sizes_sort_by_bytes_and_not_by_their_text(browser: Any, pages: Path) -> None:
    browser.get((pages / "some.html").as_uri())
    button, index = heading(browser, "size")

    button.click()

    sizes = column(browser, index)
    assert sizes.index("997 bytes") < sizes.index("1 kB") < sizes.index("2.01 kB")


def test_text_box_filters_by_all_of_its_words(browser: Any, pages: Path) -> None:
    browser.get((pages / "inspect.html").as_uri())
    box = browser.find_element("css selector", "main .table .filter")

    box.send_keys("LAYERS.1 q_proj")
    assert shown(browser) == ["model.layers.1.self_attn.q_proj"]
    assert browser.find_element("css selector", "caption .count").text == "1 of 21"

    box.clear()
    box.send_keys(" ")
    assert len(shown(browser)) == 21
    assert browser.find_element("css selector", "caption .count").text == "21"


def test_ten_thousand_rows_sort_and_filter_in_a_moment(browser: Any, pages: Path) -> None:
    browser.get((pages / "many.html").as_uri())
    seconds = browser.execute_script(
        "const began = performance.now();"
        "document.querySelectorAll('th button')[0].click();"
        "const box = document.querySelector('.filter'); box.value = 'adapter-77';"
        "box.dispatchEvent(new Event('input')); document.body.offsetHeight;"
        "return (performance.now() - began) / 1000"
    )

    # 7, 70 to 79 and so on: those whose number begins with 77.
    assert len(shown(browser)) == sum(str(i).startswith("77") for i in range(10_000))
    assert seconds < 10  # half a second on a quiet machine


def test_hostile_names_are_shown_and_do_not_run(browser: Any, pages: Path) -> None:
    browser.get((pages / "hostile.html").as_uri())

    assert browser.title == f"{len(HOSTILE)} adapters in folder/ · loratools"
    assert browser.find_elements("css selector", "main img, main script, main h1") == []
    assert f"folder/{HOSTILE[0]}" in browser.find_element("tag name", "main").text
    assert [name for name in HOSTILE[:5] if name not in " ".join(shown(browser))] == []
    assert complaints(browser) == []


@pytest.mark.parametrize("page", ["inspect", "compare", "hostile"])
def test_no_request_leaves_the_page_and_the_console_is_empty(page: str, browser: Any, pages: Path) -> None:
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(pages))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/{page}.html"
        browser.get("about:blank")
        requests(browser), complaints(browser)

        browser.get(address)

        assert requests(browser) == [address]
        assert complaints(browser) == []
        server.shutdown()


def test_policy_stops_a_script_and_a_picture_that_got_in(browser: Any, pages: Path, tmp_path: Path) -> None:
    text = (pages / "inspect.html").read_text(encoding="utf-8")
    got_in = "<script>document.title='ran'</script>"
    got_in += "<img src=http://127.0.0.1:9/x onerror=\"document.title='ran'\"></main>"
    (tmp_path / "page.html").write_text(text.replace("</main>", got_in), encoding="utf-8")

    browser.get((tmp_path / "page.html").as_uri())

    assert browser.title != "ran"
    assert "Content Security Policy" in " ".join(complaints(browser))


def test_page_is_readable_without_its_script(browser: Any, pages: Path, tmp_path: Path) -> None:
    text = (pages / "inspect.html").read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.partition("<script>")[0], encoding="utf-8")

    browser.get((tmp_path / "page.html").as_uri())

    assert len(shown(browser)) == 21
    assert browser.find_elements("css selector", "button, input") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [800, 1400])
@pytest.mark.parametrize("page", ["inspect", "compare"])
def test_page_follows_the_colours_of_the_browser_and_fits_its_width(
    page: str, width: int, scheme: str, browser: Any, pages: Path
) -> None:
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((pages / f"{page}.html").as_uri())

    ground, ink = browser.execute_script(
        "const style = getComputedStyle(document.body); return [style.backgroundColor, style.color]"
    )
    overflow = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    assert (brightness(ground) > brightness(ink)) == (scheme == "light")
    assert abs(brightness(ground) - brightness(ink)) > 150
    assert overflow <= 0


def brightness(colour: str) -> float:
    return sum(map(float, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 3


def test_number_of_a_cell_is_shown_on_hover(browser: Any, pages: Path) -> None:
    browser.get((pages / "inspect.html").as_uri())

    titles = browser.execute_script("return Array.from(document.querySelectorAll('svg title'), t => t.textContent)")

    assert any(title.startswith("layers.0 q_proj: ") for title in titles)
