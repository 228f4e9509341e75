"""The HTML page: one self-contained file, opens offline, and runs no script from a completion."""

import base64
import gzip
import json
import math
import re
import shutil
from dataclasses import replace

import pages
import pytest

from snpatch import SnpatchError
from snpatch.report.page import ASSETS, DATA_FIELDS, SCRIPTS, Page, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def find_scripts(text: str, kind: str) -> list[str]:
    return re.findall(rf'<script type="{kind}"[^>]*>(.*?)</script>', text, re.S)


def decompress_chunks(text: str) -> list:
    return [json.loads(gzip.decompress(base64.b64decode(part))) for part in find_scripts(text, "application/json-gz")]


def test_page_contains_every_completion_with_its_scores(tmp_path):
    page = pages.page(prompts=3)
    text = write_page(tmp_path / "new" / "page.html", page).read_text()
    index, completions = decompress_chunks(text)
    records = []
    for entry, completion in zip(index["records"], completions, strict=True):
        fields = {name: value for name, value in entry.items() if name not in ("case", "point")}
        case, point = index["cases"][entry["case"]], index["points"][entry["point"]]
        records.append({**case, **point, **fields, "completion": completion})
    assert len(records) == len(page.completions) == 3 * 26
    assert all(record in page.completions for record in records)
    prompt_indices = [record["prompt_index"] for record in records]
    assert prompt_indices == sorted(prompt_indices)
    [data] = map(json.loads, find_scripts(text, "application/json"))
    for name in DATA_FIELDS:
        assert data[name] == getattr(page, name)


def test_completions_are_chunked_and_sorted_by_prompt(tmp_path):
    page = pages.page(prompts=50, words=4)
    index, *chunks = decompress_chunks(write_page(tmp_path / "page.html", page).read_text())
    assert [len(chunk) for chunk in chunks] == [500, 500, 300]
    cases = [record["case"] for record in index["records"]]
    assert cases == sorted(cases)


def test_completion_with_markup_ends_no_script(tmp_path):
    clean, hostile = pages.page(prompts=1), pages.HOSTILE
    page = replace(
        clean,
        title=hostile.encode(errors="ignore").decode(),
        command=hostile,
        headline=[hostile],
        provenance={hostile: hostile},
        rows=[row | {"ranking": row["ranking"] and hostile} for row in clean.rows],
        completions=[record | {"completion": hostile} for record in clean.completions],
    )
    clean_html, hostile_html = (write_page(tmp_path / "page.html", content).read_text() for content in (clean, page))
    for tag in ("<script", "</script", "<img", "<!--"):
        assert hostile_html.count(tag) == clean_html.count(tag)
    assert decompress_chunks(hostile_html)[1] == [hostile] * 26
    assert json.loads(find_scripts(hostile_html, "application/json")[0])["headline"] == [hostile]


def test_non_finite_numbers_become_null(tmp_path):
    page = pages.page(prompts=1)
    page.rows[0]["mean"], page.rows[0]["mean_low"] = math.nan, -math.inf
    page.completions[0]["scores"]["cost"] = math.nan
    text = write_page(tmp_path / "page.html", page).read_text()
    row = json.loads(find_scripts(text, "application/json")[0], parse_constant=pytest.fail)["rows"][0]
    assert (row["mean"], row["mean_low"]) == (None, None)
    assert decompress_chunks(text)[0]["records"][0]["scores"]["cost"] is None


def test_write_page_rejects_data_nested_too_deep(tmp_path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(SnpatchError, match="expected plain tables and provenance, got some nested too deep"):
        write_page(tmp_path / "page.html", replace(pages.page(prompts=1), provenance={"x": nested}))


def test_equal_pages_give_equal_files_without_external_references(tmp_path):
    first, second = (write_page(tmp_path / name, pages.page()).read_bytes() for name in ("a.html", "b.html"))
    assert first == second
    assets = b"".join((ASSETS / name).read_bytes() for name in ("page.html", "page.css", *SCRIPTS))
    assert b"http:" not in assets
    assert b"https:" not in assets
    assert (
        re.findall(rb'(?:src|href)="(?!#|data:)', first.replace((ASSETS / "plotly-cartesian.min.js").read_bytes(), b""))
        == []
    )


def test_page_overhead_is_small(tmp_path):
    """At most 12 MB plus the uncompressed completions; compressed they take less."""
    page = pages.page(prompts=385, words=100)
    assert len(page.completions) > 10_000
    size = write_page(tmp_path / "page.html", page).stat().st_size
    assert size < 12e6 + sum(len(record["completion"]) for record in page.completions)
    assert write_page(tmp_path / "page.html", Page("nothing", "")).stat().st_size < 2e6


def test_plotly_license_is_included():
    head = (ASSETS / "plotly-cartesian.min.js").read_text()[:300]
    assert "Plotly, Inc." in head
    assert "MIT license" in head


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: no chromium, chromium-browser or google-chrome in PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium, tmp_path):
    """Return a function that opens a page in Chromium, offline. Fail if it logged an error or requested a URL."""
    messages, requested_urls = [], []

    def open_(page: Page, **context):
        tab = chromium.new_context(offline=True, **context).new_page()
        path = write_page(tmp_path / "page.html", page)
        tab.on("console", lambda message: messages.append(message.text))
        tab.on("pageerror", lambda error: messages.append(str(error)))
        tab.on("request", lambda request: requested_urls.append(request.url))
        tab.goto(path.as_uri())
        expect(tab, "html").to_have_attribute("data-ready", "")
        return tab

    yield open_
    for context in chromium.contexts:
        context.close()
    assert messages == []
    assert [url for url in requested_urls if not url.startswith(("file:", "data:", "blob:"))] == []


def expect(tab, selector: str):
    """Return Playwright's assertions for a selector; they wait until they hold."""
    from playwright.sync_api import expect

    return expect(tab.locator(selector))


def expect_position(tab, text: str) -> None:
    expect(tab, "#place").to_have_text(text)


def test_page_has_all_sections(open_page):
    tab = open_page(pages.page())
    assert tab.locator("nav a").all_inner_texts() == [
        "Results", "Layers of the neurons", "alignment_tax", "Completions", "Rows", "Notes", "Provenance"
    ]  # fmt: skip
    assert tab.locator("#headline li").all_inner_texts() == ["1000 neurons give 80% of the effect."]
    assert tab.locator("#plot-curve .legendtext").all_text_contents() == [
        "recipient, unpatched", "dpo, donor, unpatched", "random controls", "change", "variance"
    ]  # fmt: skip
    assert tab.locator("#plot-curve .errorbar").count() == 2 * len(pages.KS)
    assert tab.locator("#maps .heatmaplayer image").count() == 2
    assert tab.locator("#rows tbody tr").count() == 2 + 2 * 3 * len(pages.KS)
    assert tab.locator("#report-alignment_tax img").count() == 1
    tab.click("#report-alignment_tax th >> text=task")
    assert tab.locator("#report-alignment_tax tbody tr td:first-child").all_inner_texts() == ["a", "b"]


def build_recipients(page: Page, *names: str) -> list[dict]:
    """Return the page's rows, with copies of those of its recipient under other names."""
    copies = [row | {"recipient": name} for name in names for row in page.rows if row["recipient"] == "base"]
    return [*page.rows, *copies]


def read_panels(tab) -> dict[str, dict]:
    """Return the line of the ranking `change` in each panel of the figure, by its title."""
    panels = """() => {
      const {data, layout} = document.getElementById("plot-curve");
      return layout.annotations.map(({text, xref}) =>
        [text, data.find(line => line.name === "change" && `${line.xaxis} domain` === xref)]);
    }"""
    return dict(tab.evaluate(panels))


def test_figure_shows_all_recipients_side_by_side_on_equal_axes(open_page):
    page = pages.page(1)
    tab = open_page(replace(page, rows=build_recipients(page, "sft")), viewport={"width": 1280, "height": 800})
    panels = read_panels(tab)
    assert list(panels) == ["base", "sft"]
    assert [line["xaxis"] for line in panels.values()] == ["x", "x2"]
    assert [line["yaxis"] for line in panels.values()] == ["y", "y"]
    x_ranges = "(({xaxis, xaxis2}) => [xaxis.range, xaxis2.range])(document.getElementById('plot-curve')._fullLayout)"
    assert len({tuple(ends) for ends in tab.evaluate(x_ranges)}) == 1
    assert tab.locator("#plot-curve .legendtext").all_text_contents().count("random controls") == 1
    assert tab.locator(".js-plotly-plot:not(#maps *)").count() == 1
    bottom = tab.evaluate("document.getElementById('plot-curve').getBoundingClientRect().bottom")
    assert bottom <= 800, "cards and figure are on the first screen"
    tab.set_viewport_size({"width": 390, "height": 800})
    tab.wait_for_function("document.getElementById('plot-curve').data.some(line => line.yaxis === 'y2')")
    ranges = "(({yaxis, yaxis2}) => [yaxis.range, yaxis2.range])(document.getElementById('plot-curve')._fullLayout)"
    assert len({tuple(ends) for ends in tab.evaluate(ranges)}) == 1


def test_figure_switches_between_share_and_log_k(open_page):
    tab = open_page(pages.page(1))
    assert read_panels(tab)["base"]["x"] == [pytest.approx(k / 16384) for k in pages.KS]
    tab.select_option("#scale", "log k")
    x = read_panels(tab)["base"]["x"]
    assert x[0] == 0
    assert x == [pytest.approx(math.asinh(k / 200)) for k in pages.KS]
    ticks = tab.evaluate("document.getElementById('plot-curve').layout.xaxis.ticktext")
    assert ticks == ["0", "200", "500", "1000", "2000"]
    tab.select_option("#estimate", "effect")
    assert read_panels(tab)["base"]["x"] == x[1:], "the effect of k = 0 is undefined here"


def test_cards_show_effect_controls_and_gap_at_the_selected_window(open_page):
    page = pages.page(1)
    for row in page.rows:
        if row["ranking"] == "change" and row["rank_hi"] == 1000:
            row["effect"], row["effect_low"], row["effect_high"] = 0.5, 0.25, 0.75
            row |= {} if row["control_seed"] is None else {"effect": 0.1 * row["control_seed"] - 0.001}
        if row["ranking"] is None:
            row["mean"], row["mean_low"], row["mean_high"] = {"base": (7, 6, 8), "dpo": (-5, -6, -4)}[row["recipient"]]
    tab = open_page(page)
    assert tab.locator("#window option").all_inner_texts()[2] == "k = 1000 (6.1% of the neurons)"
    assert tab.locator("#window").input_value() == "k = 1000 (6.1% of the neurons)", "the nearest to the paper's k"
    expect(tab, "#cards h3").to_have_text(["base, patched from dpo"])
    expected = "50% [25% .. 75%] effect of k = 1000, change random controls: 0% .. 10%"
    assert tab.locator("#cards button").first.inner_text().split() == expected.split()
    assert tab.locator("#cards").inner_text().split("\n").count("gap of the mean cost: -12.00") == 1
    assert [text.strip() for text in tab.locator("#cards button").all_inner_texts()[2:]] == [
        "base: 7.00 [6.00 .. 8.00]",
        "dpo: -5.00 [-6.00 .. -4.00]",
    ]
    tab.select_option("#window", "k = 0 (0.0% of the neurons)")
    assert tab.locator("#cards strong").all_inner_texts() == ["undefined"] * 2
    expect(tab, "#case .card.here h3").to_have_text("k = 0, change")


def test_card_opens_the_completions_by_keyboard(open_page):
    page = pages.page(3)
    tab = open_page(page)
    titles = {
        0: "k = 1000, change",
        1: "k = 1000, variance",
        2: "base, unpatched",
        3: "dpo, unpatched, donor",
    }
    for number, title in titles.items():
        tab.locator("#cards button").nth(number).press("Enter")
        expect(tab, "#case .card.here h3").to_have_text(title)
        expect(tab, "#case").to_be_focused()
        expect(tab, "#case .card.here").to_be_in_viewport()
    tab.keyboard.press("j")
    expect_position(tab, "Prompt 2 of 2")
    assert tab.locator("#of-set").input_value() == "attacks"


def test_click_on_a_point_opens_its_completions(open_page):
    page = pages.page(3)
    completions = [*page.completions, *(record | {"recipient": "sft"} for record in page.completions)]
    tab = open_page(replace(page, rows=build_recipients(page, "sft"), completions=completions))
    points = tab.locator("#plot-curve .subplot.x2y .points path")
    box = points.nth(3).bounding_box()
    tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    tab.wait_for_selector("#plot-curve .hovertext")
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    expect(tab, "#case .card.here h3").to_have_text("k = 4000, change")
    assert tab.locator("#recipient").input_value() == "sft"
    control = "document.getElementById('plot-curve').data.find(line => line.name === 'random controls').customdata[1]"
    tab.evaluate(f"document.getElementById('plot-curve').emit('plotly_click', {{points: [{{customdata: {control}}}]}})")
    expect(tab, "#case .card.here h3").to_have_text("k = 200, random control 0 of change")
    assert tab.locator("#controls").is_checked()


def test_donor_selector_separates_donors(open_page):
    page = pages.page(2)
    rows = [row | {"donor": "ppo", "mean": 0.0} for row in page.rows if row["ranking"]]
    completions = [record | {"donor": "ppo"} for record in page.completions if record["ranking"]]
    tab = open_page(replace(page, rows=[*page.rows, *rows], completions=[*page.completions, *completions]))
    assert tab.locator("#donor option").all_inner_texts() == ["dpo", "ppo"]
    assert any(read_panels(tab)["base"]["y"])
    tab.select_option("#donor", "ppo")
    assert not any(read_panels(tab)["base"]["y"])
    expect(tab, "#cards h3").to_have_text(["base, patched from ppo"])
    expect(tab, "#case .card").to_have_count(1 + 2 * len(pages.KS))


@pytest.mark.parametrize("scale", ["share of neurons", "log k"])
@pytest.mark.parametrize("kind", ["undefined", "one window", "only k = 0", "many windows", "many recipients", "failed"])
def test_sweeps_of_every_kind_are_drawn(open_page, kind, scale):
    page = pages.page(1, controls=0 if kind == "one window" else 1)
    rows = page.rows
    if kind == "undefined":
        rows = [row | {name: None for name in row if "mean" in name or "effect" in name} for row in rows]
    elif kind in ("one window", "only k = 0"):
        rows = [row for row in rows if not row["ranking"] or row["rank_hi"] == (4000 if kind == "one window" else 0)]
    elif kind == "many windows":
        windows = [row for row in rows if row["rank_hi"] == 1000]
        rows = [*rows, *(row | {"rank_lo": 20 * i, "rank_hi": 20 * i + 1000} for row in windows for i in range(300))]
    elif kind == "many recipients":
        rows = build_recipients(page, *(f"model {i}" for i in range(6)))
    else:
        rows = [row | {"failed": 2, "state": "4 of 6 prompts"} for row in rows]
    tab = open_page(replace(page, rows=rows))
    tab.select_option("#scale", scale)
    assert tab.locator("#plot-curve .main-svg").count() > 0
    assert tab.locator("#cards h3").count() == (7 if kind == "many recipients" else 1)
    if kind == "failed":
        assert tab.locator("#cards").inner_text().count("on 4 of 6 prompts") == 2
    if kind == "one window":
        assert tab.locator("#cards").inner_text().count("random controls: none") == 2
        assert tab.locator("#plot-curve .errorbar").count() == 2


def test_notes_are_folded_at_the_end(open_page):
    tab = open_page(pages.page(1))
    assert tab.locator("main > section >> nth=-2").get_attribute("id") == "notes"
    assert not tab.locator("#notes li").first.is_visible()
    tab.locator("#notes summary").press("Enter")
    expect(tab, "#notes li").to_have_text(["change [0, 4000] has no random control."])
    text = tab.evaluate("document.body.innerText")
    for sentence in ("1000 neurons give 80% of the effect.", "change [0, 4000] has no random control."):
        assert text.count(sentence) == 1


@pytest.mark.parametrize(
    "without", ["rows", "completions", "maps", "reports", "headline", "notes", "provenance", "all"]
)
def test_page_without_one_part_hides_its_section(open_page, without):
    page = (
        Page("nothing", "")
        if without == "all"
        else replace(pages.page(2), **{without: {} if without in ("maps", "provenance") else []})
    )
    tab = open_page(page)
    sections = {
        "rows": "#curve",
        "completions": "#completions",
        "maps": "#maps",
        "notes": "#notes",
        "provenance": "#origin",
        "all": "#selection",
    }
    if without in sections:
        assert not tab.locator(sections[without]).is_visible()


def test_page_without_controls_effects_or_unpatched_completions_opens(open_page):
    page = pages.page(2, controls=0)
    rows = [
        {name: None if "effect" in name or "net" in name else value for name, value in row.items()} for row in page.rows
    ]
    tab = open_page(replace(page, rows=rows, completions=[record for record in page.completions if record["ranking"]]))
    assert not tab.locator("#estimate").is_visible()
    assert tab.locator("#cards strong").all_inner_texts() == ["undefined"] * 2
    assert tab.locator("#case .card").count() == 2 * len(pages.KS)
    assert tab.locator("#case mark").count() == 0


def test_page_of_unpatched_completions_opens(open_page):
    page = pages.page(2)
    tab = open_page(
        replace(page, rows=[], completions=[record for record in page.completions if not record["ranking"]])
    )
    assert tab.locator("#recipient option").all_inner_texts() == ["base", "dpo"]
    assert tab.locator("#case .card h3").all_inner_texts() == ["base, unpatched"]
    assert not tab.locator("#at").is_visible()
    tab.select_option("#recipient", "dpo")
    expect(tab, "#case .card h3").to_have_text(["dpo, unpatched"])


def test_first_differing_word_is_marked(open_page):
    page = pages.page(1, controls=0, ks=(10, 20, 30, 40))
    completions = ["one  two three", "one\ntwo four three", "one  two", "one  two three", "one  two three more", None]
    records = [record for record in page.completions if record["ranking"] in (None, "change")]
    scores = [{"cost": 1.0}, {"cost": 2.5}, {"cost": math.nan}, {}, {"cost": 1.0}, {"cost": 0.0}]
    order = [0, 2, 3, 4, 5, 1]
    for at, completion, score in zip(order, completions, scores, strict=True):
        records[at] |= {"completion": completion, "scores": score, "state": "open" if completion is None else "done"}
    tab = open_page(replace(page, completions=records))
    tab.select_option("#at", "base, unpatched")
    cards = tab.locator("#case .card")
    expect(tab, "#case .card.here h3").to_have_text("base, unpatched")
    marks = [cards.nth(i).locator("mark").all_inner_texts() for i in range(6)]
    assert marks == [[], [], ["four"], ["⏎"], [], ["more"]]
    receipt = "1,200 overwrites counted · ended by stop · same completion as unpatched"
    assert cards.nth(4).locator(".receipt").inner_text() == receipt
    assert cards.nth(1).locator(".text").inner_text() == "not written yet"
    score_texts = [cards.nth(i).locator(".scores").inner_text() for i in range(1, 6)]
    assert score_texts == ["cost 0.00 -1.00", "cost 2.50 +1.50", "", "", "cost 1.00 0.00"]


def test_page_of_unfinished_sweep_shows_warning_and_missing_completions(open_page):
    page = pages.page(1, controls=0, ks=(10, 20))
    records = [record for record in page.completions if record["ranking"] in (None, "change")]
    records[0] |= {"completion": ""}
    records[2] |= {"completion": None, "state": "failed", "error": pages.HOSTILE.replace("\ud800", "")}
    records[3] |= {"completion": None, "state": "open"}
    tab = open_page(replace(page, completions=records, unfinished="Unfinished: 2 of 4 completions are written."))
    tab.select_option("#at", "base, unpatched")
    expect(tab, "#case .card.here h3").to_have_text("base, unpatched")
    expect(tab, "#unfinished").to_have_text("Unfinished: 2 of 4 completions are written.")
    texts = [card.inner_text() for card in tab.locator("#case .card .text").all()]
    assert texts[0] == "empty completion"
    assert texts[2].startswith("failed: </script>")
    assert texts[3] == "not written yet"
    assert tab.evaluate("window.hit") is None


def test_page_of_finished_sweep_has_no_warning(open_page):
    assert not open_page(pages.page(1)).locator("#unfinished").is_visible()


def test_search_and_filters_select_prompts(open_page):
    page = pages.page(6)
    page.completions[3] |= {"completion": "A Needle <b>here</b>"}
    for record in page.completions:
        factor = record["rank_hi"] / 1000 if record["prompt_index"] % 2 else -1
        record["scores"]["cost"] = float(record["prompt_index"] * factor)
    tab = open_page(page)
    expect_position(tab, "Prompt 1 of 6")
    tab.fill("#query", "needle")
    expect_position(tab, "Prompt 1 of 1")
    assert tab.locator("#case .prompt").inner_text() == "Question 3: how would one do it?"
    assert tab.evaluate("CSS.highlights.get('found').size") == 1
    tab.fill("#query", "QUESTION 4")
    expect_position(tab, "Prompt 1 of 1")
    tab.fill("#query", "nowhere")
    expect_position(tab, "No prompt matches.")
    assert tab.locator("#case > *").count() == 0
    tab.fill("#query", "")
    expect(tab, "#matches li").to_have_count(6)
    tab.select_option("#of-set", "questions")
    expect(tab, "#matches li").to_have_count(3)
    tab.select_option("#at", "k = 4000, change")
    tab.fill("#least", "10")
    tab.locator("#least").blur()
    expect(tab, "#matches li").to_have_count(2)
    tab.fill("#most", "15")
    tab.locator("#most").blur()
    expect_position(tab, "Prompt 1 of 1")
    assert tab.locator("#case .prompt").inner_text() == "Question 3: how would one do it?"


def test_sort_by_change_and_score_orders_prompts(open_page):
    page = pages.page(4)
    changes = {0: 1.0, 1: -9.0, 2: 4.0, 3: 2.0}
    for record in page.completions:
        record["scores"] = {"cost": changes[record["prompt_index"]] if record["rank_hi"] == 1000 else 0.0}
    tab = open_page(page)
    tab.select_option("#at", "k = 1000, change")
    tab.select_option("#sort", "largest change")
    expect(tab, "#matches .change").to_have_text(["-9.00", "+4.00", "+2.00", "+1.00"])
    tab.select_option("#sort", "lowest score")
    expect(tab, "#matches .change").to_have_text(["-9.00", "+1.00", "+2.00", "+4.00"])
    expect(tab, "#case .card.here h3").to_have_text("k = 1000, change")


def test_keyboard_shortcuts_step_and_search(open_page):
    tab = open_page(pages.page(5))
    for key, position in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("ArrowLeft", 1)):
        tab.keyboard.press(key)
        expect_position(tab, f"Prompt {position} of 5")
    tab.keyboard.press("/")
    tab.keyboard.type("question 2jk/")
    assert tab.locator("#query").input_value() == "question 2jk/"
    expect_position(tab, "No prompt matches.")
    tab.fill("#query", "")
    expect_position(tab, "Prompt 1 of 5")
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    expect_position(tab, "Prompt 2 of 5")
    tab.click("#next")
    expect_position(tab, "Prompt 3 of 5")
    tab.locator("#previous").press("Enter")
    expect_position(tab, "Prompt 2 of 5")
    tab.locator("#matches button").last.press("Enter")
    expect(tab, "#matches button >> nth=4").to_be_focused()
    tab.keyboard.press("k")
    expect(tab, "#matches button >> nth=3").to_be_focused()


def test_random_controls_checkbox_shows_control_completions(open_page):
    tab = open_page(pages.page(2, controls=2))
    assert tab.locator("#case .card").count() == 2 + 2 * 4
    tab.check("#controls")
    expect(tab, "#case .card.control").to_have_count(16)


def test_windows_above_rank_zero_are_drawn_over_their_ranks(open_page):
    page = pages.page(1, controls=1)
    later = [
        row | {"rank_lo": row["rank_hi"], "rank_hi": row["rank_hi"] + 500}
        for row in page.rows
        if row["ranking"] == "change" and row["rank_hi"]
    ]
    tab = open_page(replace(page, rows=[*page.rows, *later]))
    names = tab.locator("#plot-curve .legendtext").all_text_contents()
    assert "change, windows" in names
    assert "variance, windows" not in names
    bars = "document.getElementById('plot-curve').data.find(line => line.name === 'change, windows').x"
    *shares, end = tab.evaluate(bars)[:4]
    assert shares == [pytest.approx(rank / 16384) for rank in (200, 450, 700)]
    assert end is None
    tab.select_option("#estimate", "net effect")
    assert tab.locator("#plot-curve .legendtext").all_text_contents().count("change, windows") == 1


def test_selectors_choose_strength_and_recipient(open_page):
    page = pages.page(2, controls=0)
    weak_rows = [row | {"strength": 0.5, "mean": row["mean"] / 2} for row in page.rows if row["ranking"]]
    sft_rows = [row | {"recipient": "sft"} for row in page.rows if row["recipient"] == "base"]
    tab = open_page(replace(page, rows=[*page.rows, *weak_rows, *sft_rows]))
    assert tab.locator("#strength option").all_inner_texts() == ["0.50", "1"]
    assert tab.locator("#strength").input_value() == "1"
    means = "document.getElementById('plot-curve').data.find(line => line.name === 'change').y"
    strong = tab.evaluate(means)
    tab.select_option("#strength", "0.50")
    assert tab.evaluate(means) == [pytest.approx(mean / 2) for mean in strong]
    tab.select_option("#strength", "1")
    assert tab.locator("#recipient option").all_inner_texts() == ["base", "sft"]


def test_hostile_completions_are_inert(open_page):
    hostile = pages.HOSTILE
    page = pages.page(2)
    fields = {"completion": hostile, "prompt": hostile, "finish_reason": hostile}
    page.completions[:] = [record | fields for record in page.completions]
    page.rows[:] = [row | {"ranking": row["ranking"] and hostile} for row in page.rows]
    report = {
        "name": hostile,
        "headline": [hostile],
        "tables": {hostile: {"columns": [hostile], "rows": [[hostile]]}},
        "images": [],
    }
    tab = open_page(
        replace(
            page, provenance={hostile: hostile}, headline=[hostile], notes=[hostile], command=hostile, reports=[report]
        )
    )
    assert tab.locator("#case .text").first.text_content() == hostile
    assert tab.locator("main img").count() == 0
    assert tab.evaluate("window.hit") is None


def test_content_security_policy_blocks_other_scripts(chromium, tmp_path):
    """Even if a completion became HTML."""
    tab = chromium.new_page()
    tab.goto(write_page(tmp_path / "page.html", pages.page(1)).as_uri())
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hit = 1\">')")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hit") is None
    tab.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_page_fits_the_window_width(open_page, width):
    page = pages.page(3)
    page.completions[0]["completion"] = page.completions[0]["prompt"] = "long" * 200
    tab = open_page(replace(page, headline=["long" * 100]), viewport={"width": width, "height": 800})
    tab.locator("details").evaluate_all("nodes => nodes.forEach(node => node.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_theme_button_switches_colors(open_page):
    background = "getComputedStyle(document.body).backgroundColor"
    text = "getComputedStyle(document.querySelector('#plot-curve .legendtext')).fill"
    tab = open_page(pages.page(1), color_scheme="dark")
    dark = tab.evaluate(background), tab.evaluate(text)
    tab.click("#theme")
    light = tab.evaluate(background), tab.evaluate(text)
    assert light == ("rgb(255, 255, 255)", "rgb(26, 29, 33)")
    assert dark == ("rgb(21, 24, 29)", "rgb(228, 231, 235)")
    tab.click("#theme")
    tab.emulate_media(color_scheme="light")
    expect(tab, "body").to_have_css("background-color", "rgb(255, 255, 255)")
    tab.emulate_media(color_scheme="dark")
    expect(tab, "body").to_have_css("background-color", "rgb(21, 24, 29)")


def test_each_input_has_a_label(open_page):
    tab = open_page(pages.page(1))
    for control in tab.locator("input, select").all():
        assert control.evaluate("node => node.labels[0].textContent.trim()")
    assert tab.locator("[role=img]:not([aria-label])").count() == 0


MARKED = '<a href="https://evil.example/x" target="_top">click</a><b>&amp; $x^2$ %{x}</b>'


# Hovers over the first point of each trace and returns the labels' texts. Throws if a label contains a link.
HOVERED = """() => document.getElementById("plot-curve").data.flatMap((_, curveNumber) => {
  Plotly.Fx.hover("plot-curve", [{curveNumber, pointNumber: 0}]);
  if (document.querySelector("svg a")) throw new Error("a name became a link");
  return [...document.querySelectorAll("#plot-curve .hovertext")].map(label => label.textContent);
})"""


def test_names_are_literal_text_in_every_plot(open_page):
    """Plotly reads pseudo-HTML in names, hover texts and titles."""
    page = pages.page(2)
    names = {"ranking": MARKED, "recipient": f"{MARKED}r", "donor": f"{MARKED}d", "judge": f"{MARKED}j"}
    rows = [
        row | {name: value for name, value in names.items() if row[name] is not None} | {"set": MARKED}
        for row in page.rows
        if row["ranking"] in (None, pages.RANKINGS[0])
    ]
    rows += [row | {"rank_lo": 100, "rank_hi": 300} for row in rows if row["ranking"] and row["control_seed"] is None]
    tab = open_page(replace(page, rows=rows, maps={MARKED: page.maps[pages.RANKINGS[0]]}, completions=[], reports=[]))
    legend = tab.locator("#plot-curve .legendtext").all_text_contents()
    assert MARKED[:60] + "…" in legend
    texts = tab.evaluate(HOVERED)
    assert any(MARKED[:9] in text for text in texts)
    assert tab.locator("svg a").count() == 0
    assert tab.locator("main a").count() == 0
    assert tab.locator("svg tspan[style*=bold]").count() == 0
