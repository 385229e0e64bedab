"""The drawn channel graph in a real browser: it answers, in both themes, on a phone, without a network or an error."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

import secateur as sc
from secateur.report import draw_graph
from tests.report.chromium import open_page, requests
from tests.report.test_graph_page import graph_of

pytestmark = pytest.mark.slow

NETWORKS = ["lenet5", "dense", "resnet50", "densenet201"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, sc.ChannelGraph]]:
    folder = tmp_path_factory.mktemp("graphs")
    found = {}
    for name in NETWORKS:
        if name in ("lenet5", "dense"):
            graph = graph_of(name)
        else:
            graph = sc.trace(getattr(torchvision.models, name)().eval(), torch.randn(1, 3, 224, 224))
        page = folder / f"{name}.html"
        page.write_text(draw_graph(graph, name), encoding="utf-8")
        found[name] = (page, graph)
    return found


def opened(browser: Any, pages: dict[str, Any], name: str) -> sc.ChannelGraph:
    page, graph = pages[name]
    open_page(browser, page)
    return graph


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_drawn_without_an_error_or_a_request(browser: Any, name: str, pages: dict[str, Any]) -> None:
    graph = opened(browser, pages, name)
    rows = len({port.module for port in graph.layers})
    heights, tops = browser.execute_script(
        """const box = (e) => e.getBoundingClientRect();
           return [Array.from(document.querySelectorAll('.strand .line')).map((e) => box(e).height),
                   [0, 1, 2].map((i) => Array.from(document.querySelectorAll('.names li, .facts li'))
                     .filter((e, j) => j % arguments[0] === i).map((e) => box(e).top))]""",
        rows,
    )
    assert len(heights) == len(graph.groups)
    assert min(heights) > 15
    # The two columns of words are level with each other.
    assert all(len(pair) == 2 and abs(pair[0] - pair[1]) < 0.5 for pair in tops)
    assert browser.get_log("browser") == []
    assert not [url for url in requests(browser) if url.startswith(("http", "ws", "ftp"))]


def test_a_pressed_group_stands_out_with_all_its_members(browser: Any, pages: dict[str, Any]) -> None:
    graph = opened(browser, pages, "resnet50")
    for index in (0, 3):
        group = graph.groups[index]
        browser.execute_script(
            "document.querySelectorAll('.strand')[arguments[0]].dispatchEvent(new Event('click', {bubbles: true}))",
            index,
        )
        told, on, rows = browser.execute_script(
            """return [document.getElementById('detail').textContent,
                 Array.from(document.querySelectorAll('.strand.on')).map((e) => Number(e.dataset.group)),
                 Array.from(document.querySelectorAll('.names .on')).map((e) => e.textContent)]"""
        )
        assert on == [index]
        assert set(rows) == {m.module for m in group.members if m.role is not sc.Role.FOLLOWER}
        assert all(m.module in told and m.tensor.rpartition(".")[2] in told for m in group.members)
        assert f"{group.size} channels" in told
    faint = browser.execute_script("return Number(getComputedStyle(document.querySelectorAll('.strand')[9]).opacity)")
    assert faint < 0.3
    browser.execute_script("document.querySelector('#detail .clear').click()")
    assert not browser.find_elements("css selector", ".strand.on, .names .on")


def test_the_filter_finds_groups_by_the_layers_in_them(browser: Any, pages: dict[str, Any]) -> None:
    graph = opened(browser, pages, "densenet201")
    text = "denseblock4.denselayer31."
    expected = [i for i, group in enumerate(graph.groups) if any(text in m.module for m in group.members)]
    browser.find_element("id", "filter").send_keys(text)
    on, listed, found = browser.execute_script(
        """return [Array.from(document.querySelectorAll('.strand.on')).map((e) => Number(e.dataset.group)),
             Array.from(document.querySelectorAll('.list li:not([hidden]) button')).map((e) => Number(e.dataset.group)),
             document.getElementById('found').textContent]"""
    )
    assert on == listed == expected
    assert len(expected) > 30
    assert found == f"{len(expected)} of 200 groups have it"
    browser.find_element("id", "filter").send_keys("nowhere")
    assert "No group has a layer of this name" in browser.find_element("id", "detail").text


def test_a_layer_tells_its_groups_and_why_its_outputs_stay(browser: Any, pages: dict[str, Any]) -> None:
    opened(browser, pages, "lenet5")
    for label in browser.find_elements("css selector", ".names button"):
        label.click()
    told = browser.find_element("id", "detail").text
    assert "fc1" in told
    assert "Its outputs stay: model output" in told


def test_the_pointer_is_told_what_lies_under_it(browser: Any, pages: dict[str, Any]) -> None:
    graph = opened(browser, pages, "lenet5")
    told = browser.execute_script(
        """const mark = document.querySelector('.strand .c'), box = mark.getBoundingClientRect();
           const place = {bubbles: true, clientX: box.left + 4, clientY: box.top + 4};
           mark.dispatchEvent(new PointerEvent('pointermove', place));
           const tip = document.getElementById('tip');
           return [tip.hidden, Array.from(tip.children).map((e) => e.textContent)]"""
    )
    share = f"{graph.share_of_macs(graph.groups[0]):.1%}"
    assert told == [
        False,
        [
            "group conv1",
            "conv2 reads them",
            f"20 channels; {share} of the MACs go with all of them",
            "free: any of them may go",
        ],
    ]


def test_dark_and_light_differ_in_every_part(browser: Any, pages: dict[str, Any]) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        opened(browser, pages, "lenet5")
        seen[scheme] = browser.execute_script(
            """const of = (query, name) => getComputedStyle(document.querySelector(query))[name];
               return [of('body', 'backgroundColor'), of('.strand .line', 'stroke'), of('.strand .p', 'fill'),
                 of('.strand .c', 'fill'), of('.names', 'backgroundColor'), of('.names button', 'color')]"""
        )
    assert all(light != dark for light, dark in zip(seen["light"], seen["dark"], strict=True))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_phone_scrolls_sideways_inside_the_figure_alone(browser: Any, name: str, pages: dict[str, Any]) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    opened(browser, pages, name)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    left = """const sheet = document.querySelector('.sheet'), names = document.querySelector('.names');
              sheet.scrollLeft = 60;
              return names.getBoundingClientRect().left - sheet.getBoundingClientRect().left"""
    assert browser.execute_script(left) == pytest.approx(0, abs=1)
