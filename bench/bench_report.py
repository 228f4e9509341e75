"""Report page of 10,000 completions of about 128 tokens: write it, open it in Chromium, search it once."""

import shutil

import pages
import pytest

from snpatch.report.page import write_page

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page():
    return pages.page(prompts=385, words=100)


@pytest.fixture
def tab():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: no chromium or google-chrome in PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page()
        browser.close()


def test_write_page(benchmark, page, tmp_path):
    path = benchmark.pedantic(write_page, args=(tmp_path / "page.html", page), rounds=3)
    bytes_written = path.stat().st_size
    benchmark.extra_info.update(side="write", texts=len(page.completions), bytes_written=bytes_written)


def test_open(benchmark, page, tab, tmp_path):
    url = write_page(tmp_path / "page.html", page).as_uri()

    def open_() -> None:
        tab.goto(url)
        tab.wait_for_selector("html[data-ready]", state="attached")

    benchmark.pedantic(open_, rounds=5, warmup_rounds=1)
    assert tab.locator("#place").inner_text() == "Prompt 1 of 385"
    benchmark.extra_info.update(side="open", texts=len(page.completions))


def test_first_search(benchmark, page, tab, tmp_path):
    """The first search decompresses all completions."""
    url = write_page(tmp_path / "page.html", page).as_uri()

    def open_() -> None:
        tab.goto(url)
        tab.wait_for_selector("html[data-ready]", state="attached")

    def search() -> None:
        tab.fill("#query", "nowhere")
        tab.wait_for_function("() => document.getElementById('place').textContent === 'No prompt matches.'")

    benchmark.pedantic(search, setup=open_, rounds=5)
    benchmark.extra_info.update(side="search", texts=len(page.completions))
