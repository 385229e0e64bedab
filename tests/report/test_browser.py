"""The report in a real browser: drawn, answering, sortable, printable, without a network and without an error."""

import base64
import time
from pathlib import Path
from typing import Any

import pytest

from secateur.report import write_report
from tests.report import real
from tests.report.chromium import open_page, requests, unfold
from tests.report.synthetic import write_run, write_sweep

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install selenium)")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    return write_report(write_run(folder / "run"), folder / "report.html").html


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    wide = {f"layer{s}.{b}.conv": (16, 32, 64) for s in range(3) for b in range(6)}
    runs = [write_run(folder / "a"), write_run(folder / "b", wide, 12, 1, method="l1", lost=0.002)]
    return write_report(runs, folder / "report.html").html


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs, and a sweep one of whose trials is one of them."""
    folder = tmp_path_factory.mktemp("mixed")
    sweep = write_sweep(folder / "sweep")
    runs = [write_run(folder / f"run{i}", seed=i, lost=0.002 * i, method=("cfp", "l1")[i % 2]) for i in range(4)]
    return write_report([*runs, sweep, sweep / "runs" / "0001"], folder / "report.html").html


@pytest.fixture(scope="module")
def lenet5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lenet5")
    original, pruned = real.lenet5_run(folder / "run", tolerance=5.0, max_rounds=6, finetune_epochs=1)
    real.measure(folder / "run", original, pruned, (1, 16, 16))
    return write_report(folder / "run").html


@pytest.fixture(scope="module")
def resnet20(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not real.SHARED.is_dir():
        pytest.skip(f"{real.SHARED} is not here; SECATEUR_SHARED names the folder of weights and data")
    folder = tmp_path_factory.mktemp("resnet20")
    original, pruned = real.resnet20_run(folder / "run", tolerance=20.0, max_rounds=2, finetune_epochs=1)
    real.measure(folder / "run", original, pruned, (3, 32, 32))
    return write_report(folder / "run").html


@pytest.mark.parametrize("name", ["page", "comparison", "mixed", "lenet5", "resnet20"])
def test_every_figure_is_drawn_without_an_error_or_a_request(
    browser: Any, name: str, request: pytest.FixtureRequest
) -> None:
    page = request.getfixturevalue(name)
    open_page(browser, page)
    unfold(browser)
    drawn = browser.execute_script(
        """return Array.from(document.querySelectorAll('.plot:not([hidden])')).map(plot => [
             plot.querySelectorAll('svg.main-svg').length,
             plot.querySelectorAll('.point path, .points path, .heatmaplayer image, .scatterlayer path').length,
             plot.getBoundingClientRect().height])"""
    )
    assert page.stat().st_size < 6_000_000
    assert len(drawn) >= 7
    assert all(frames and marks and height > 100 for frames, marks, height in drawn)
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert page.as_uri() in asked
    assert not [url for url in asked if url.startswith(("http", "ws", "ftp"))]


def test_tooltips_answer_the_mouse_and_the_arrow_keys(browser: Any, page: Path) -> None:
    open_page(browser, page)
    bar = browser.find_element("css selector", "#run0-macs .point path")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", bar)
    webdriver.ActionChains(browser).move_to_element(bar).perform()
    text = _await(browser, "return document.querySelector('#run0-macs .hoverlayer')?.textContent")
    assert "conv1" in text
    assert "original" in text
    assert "MACs: 104 k" in text
    plot = browser.find_element("id", "run0-history")
    browser.execute_script("arguments[0].focus()", plot)
    for _ in range(2):
        plot.send_keys(webdriver.Keys.ARROW_RIGHT)
    spoken = _await(browser, "return document.getElementById('spoken').textContent")
    assert spoken.startswith("round 2; after dropping")


def test_tables_sort_both_ways_by_number_and_say_so(browser: Any, page: Path) -> None:
    open_page(browser, page)
    table = browser.find_element("css selector", "#run0-widths table")
    head = table.find_elements("css selector", "thead th")[4]
    for expected in ("ascending", "descending"):
        browser.execute_script("arguments[0].click()", head.find_element("tag name", "button"))
        assert head.get_attribute("aria-sort") == expected
        values = [
            float(row.find_elements("css selector", "th, td")[4].get_attribute("data-value"))
            for row in table.find_elements("css selector", "tbody tr")
        ]
        assert values == sorted(values, reverse=expected == "descending")
        assert len(set(values)) == 3


def test_the_heat_map_follows_the_chosen_layer(browser: Any, page: Path) -> None:
    open_page(browser, page)
    shape = "return document.querySelector('.plot.heat[data-side=before]').data[0].z.length"
    assert browser.execute_script(shape) == 20
    browser.execute_script(
        "const s = document.querySelector('.heat-layer'); s.value = '2'; s.dispatchEvent(new Event('change'))"
    )
    assert browser.execute_script(shape) == 64
    assert browser.find_element("class name", "heat-summary").text.startswith("conv3: 64 filters")


def test_dark_and_light_paint_page_and_figures(browser: Any, page: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        open_page(browser, page)
        seen[scheme] = browser.execute_script(
            """return [getComputedStyle(document.body).backgroundColor,
                 document.getElementById('run0-macs')._fullLayout.font.color,
                 document.getElementById('run0-macs').data[1].marker.color]"""
        )
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["page", "comparison", "mixed", "resnet20"])
def test_nothing_scrolls_sideways_and_no_table_is_cut_off(
    browser: Any, name: str, width: int, request: pytest.FixtureRequest
) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    open_page(browser, request.getfixturevalue(name))
    # A phone zooms out until everything fits: then innerWidth grows along with what is too wide.
    assert browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]") == [width, width]
    unfold(browser)
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    cut = browser.execute_script(
        """return Array.from(document.querySelectorAll('.scroll')).filter(box => box.scrollWidth > box.clientWidth + 1)
             .map(box => box.getAttribute('aria-label') + ': ' + box.scrollWidth + ' in ' + box.clientWidth)"""
    )
    assert cut == []
    assert browser.get_log("browser") == []
    wide = browser.execute_script(
        """return Array.from(document.querySelectorAll('.plot svg.main-svg'))
             .filter(drawing => drawing.getBoundingClientRect().right > innerWidth + 1).length"""
    )
    assert wide == 0


@pytest.mark.parametrize("name", ["page", "lenet5", "resnet20"])
def test_it_prints_to_pdf_and_goes_back_to_the_screen(browser: Any, name: str, request: pytest.FixtureRequest) -> None:
    open_page(browser, request.getfixturevalue(name))
    before = browser.execute_script("return document.getElementById('run0-macs').getBoundingClientRect().width")
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    assert browser.execute_script(
        "return document.getElementById('run0-macs').getBoundingClientRect().width"
    ) == pytest.approx(before, abs=2)
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [390, 1280])
def test_table_and_figure_of_several_runs_come_before_folded_details(browser: Any, mixed: Path, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    open_page(browser, mixed)
    tops = browser.execute_script(
        """return ['#compare table', '#compare-pareto', '#run0 summary', '#run4 summary', 'footer'].map(
             place => document.querySelector(place).getBoundingClientRect().top)"""
    )
    assert tops == sorted(tops)
    assert tops[-1] < (6500 if width == 390 else 4000)
    assert browser.execute_script("return document.querySelectorAll('article details.run[open]').length") == 0
    # A keyboard opens and closes one, whose figures are drawn then.
    summary = browser.find_element("css selector", "#run1 details.run > summary")
    browser.execute_script("arguments[0].focus()", summary)
    summary.send_keys(webdriver.Keys.ENTER)
    _await(browser, "return document.querySelector('#run1-macs svg.main-svg') && 'drawn'")
    assert browser.execute_script("return document.getElementById('run1-macs').getBoundingClientRect().height") > 100
    assert not browser.execute_script("return document.querySelector('#run2-macs svg.main-svg')")
    summary.send_keys(webdriver.Keys.SPACE)
    assert not browser.execute_script("return document.querySelector('#run1 details.run').open")
    browser.execute_script("document.querySelector('nav a[href=\"#run3\"]').click()")
    _await(browser, "return document.querySelector('#run3 details.run').open && 'open'")
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scripts", [True, False])
def test_folded_details_are_printed_open(browser: Any, mixed: Path, scripts: bool) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    browser.get(mixed.as_uri())
    pages = []
    for unfolded in (False, True):
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
        pages.append(pdf.count(b"/Type /Page\n"))
        if not unfolded:
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
            assert browser.execute_script("return document.querySelectorAll('details.run[open]').length") == 0
            browser.execute_script("document.querySelectorAll('details.run').forEach(run => { run.open = true; })")
            browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": not scripts})
    assert pages[0] == pages[1] > 10
    assert browser.get_log("browser") == []


def _await(browser: Any, script: str) -> str:
    for _ in range(100):
        if text := browser.execute_script(script):
            return str(text)
        time.sleep(0.05)
    pytest.fail(f"nothing came of {script}")
