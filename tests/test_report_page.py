"""Pages: one file that holds all, opens without a network, and runs no script that a model wrote."""

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
from snpatch.report.page import ASSETS, Page, write_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def parts(text: str, kind: str) -> list[str]:
    return re.findall(rf'<script type="{kind}"[^>]*>(.*?)</script>', text, re.S)


def unpacked(text: str) -> list:
    return [json.loads(gzip.decompress(base64.b64decode(part))) for part in parts(text, "application/json-gz")]


def test_a_page_holds_its_texts_and_they_its_scores(tmp_path):
    page = pages.page(prompts=3)
    text = write_page(tmp_path / "new" / "page.html", page).read_text()
    index, completions = unpacked(text)
    found = []
    for one, completion in zip(index["texts"], completions, strict=True):
        kept = {name: value for name, value in one.items() if name not in ("case", "point")}
        found.append({**index["cases"][one["case"]], **index["points"][one["point"]], **kept, "completion": completion})
    assert len(found) == len(page.texts) == 3 * 26
    assert all(one in page.texts for one in found)
    assert [one["prompt_index"] for one in found] == sorted(one["prompt_index"] for one in found)
    [data] = map(json.loads, parts(text, "application/json"))
    for name in ("command", "unfinished", "headline", "provenance", "rows", "maps", "reports"):
        assert data[name] == getattr(page, name)


def test_texts_are_in_pieces_and_a_prompt_s_are_together(tmp_path):
    page = pages.page(prompts=50, words=4)
    index, *pieces = unpacked(write_page(tmp_path / "page.html", page).read_text())
    assert [len(piece) for piece in pieces] == [500, 500, 300]
    order = [one["case"] for one in index["texts"]]
    assert order == sorted(order)


def test_nothing_that_a_model_wrote_ends_a_script(tmp_path):
    clean, hostile = pages.page(prompts=1), pages.HOSTILE
    page = replace(
        clean,
        title=hostile.encode(errors="ignore").decode(),
        command=hostile,
        headline=[hostile],
        provenance={hostile: hostile},
        rows=[row | {"ranking": row["ranking"] and hostile} for row in clean.rows],
        texts=[text | {"completion": hostile} for text in clean.texts],
    )
    ours, theirs = (write_page(tmp_path / "page.html", one).read_text() for one in (clean, page))
    for mark in ("<script", "</script", "<img", "<!--"):
        assert theirs.count(mark) == ours.count(mark)
    assert unpacked(theirs)[1] == [hostile] * 26
    assert json.loads(parts(theirs, "application/json")[0])["headline"] == [hostile]


def test_what_is_no_number_is_undefined(tmp_path):
    page = pages.page(prompts=1)
    page.rows[0]["mean"], page.rows[0]["mean_low"] = math.nan, -math.inf
    page.texts[0]["scores"]["cost"] = math.nan
    text = write_page(tmp_path / "page.html", page).read_text()
    row = json.loads(parts(text, "application/json")[0], parse_constant=pytest.fail)["rows"][0]
    assert (row["mean"], row["mean_low"]) == (None, None)
    assert unpacked(text)[0]["texts"][0]["scores"]["cost"] is None


def test_page_of_nested_data_past_all_depth_is_an_error(tmp_path):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(SnpatchError, match="expected plain tables and provenance, got some nested too deep"):
        write_page(tmp_path / "page.html", replace(pages.page(prompts=1), provenance={"x": nested}))


def test_equal_pages_are_equal_files_and_name_no_other(tmp_path):
    one, other = (write_page(tmp_path / name, pages.page()).read_bytes() for name in ("a.html", "b.html"))
    assert one == other
    own = b"".join((ASSETS / name).read_bytes() for name in ("page.html", "page.css", "dom.js", "texts.js", "page.js"))
    assert b"http:" not in own
    assert b"https:" not in own
    assert (
        re.findall(rb'(?:src|href)="(?!#|data:)', one.replace((ASSETS / "plotly-cartesian.min.js").read_bytes(), b""))
        == []
    )


def test_the_page_s_own_part_is_small(tmp_path):
    """At most 12 MB and the texts as they are: compressed they take less."""
    page = pages.page(prompts=385, words=100)
    assert len(page.texts) > 10_000
    size = write_page(tmp_path / "page.html", page).stat().st_size
    assert size < 12e6 + sum(len(text["completion"]) for text in page.texts)
    assert write_page(tmp_path / "page.html", Page("nothing", "")).stat().st_size < 2e6


def test_the_licence_of_plotly_is_kept():
    head = (ASSETS / "plotly-cartesian.min.js").read_text()[:300]
    assert "Plotly, Inc." in head
    assert "MIT license" in head


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the dev extra")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: no chromium, chromium-browser or google-chrome in PATH")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """opened(page, **context): it in Chromium and offline; at the end, that nothing was complained of or asked for."""
    complaints, asked = [], []

    def open_(page: Page, **context):
        tab = chromium.new_context(offline=True, **context).new_page()
        path = write_page(tmp_path / "page.html", page)
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: asked.append(request.url))
        tab.goto(path.as_uri())
        expect(tab, "html").to_have_attribute("data-ready", "")
        return tab

    yield open_
    for context in chromium.contexts:
        context.close()
    assert complaints == []
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def expect(tab, selector: str):
    """Playwright's assertions of what a selector finds, which wait for it."""
    from playwright.sync_api import expect

    return expect(tab.locator(selector))


def place(tab, wanted: str) -> None:
    expect(tab, "#place").to_have_text(wanted)


def test_all_sections_are_there(opened):
    tab = opened(pages.page())
    assert tab.locator("nav a").all_inner_texts() == [
        "Mean score", "Causal effect", "Where the neurons are", "alignment_tax", "Texts", "Rows", "Provenance"
    ]  # fmt: skip
    assert tab.locator("#headline li").all_inner_texts() == ["1000 neurons give 80% of the effect."]
    assert tab.locator("#plot-mean .legendtext").all_text_contents() == [
        "base, unpatched", "dpo, donor, unpatched", "random controls", "change", "variance"
    ]  # fmt: skip
    assert tab.locator("#plot-effect .errorbar").count() == 2 * 2 * 3
    assert tab.locator("#maps .heatmaplayer image").count() == 2
    assert tab.locator("#rows tbody tr").count() == 2 + 2 * 3 * len(pages.KS)
    assert tab.locator("#report-alignment_tax img").count() == 1
    tab.click("#report-alignment_tax th >> text=task")
    assert tab.locator("#report-alignment_tax tbody tr td:first-child").all_inner_texts() == ["a", "b"]


@pytest.mark.parametrize("without", ["rows", "texts", "maps", "reports", "headline", "provenance", "all"])
def test_a_page_without(opened, without):
    page = (
        Page("nothing", "")
        if without == "all"
        else replace(pages.page(2), **{without: {} if without in ("maps", "provenance") else []})
    )
    tab = opened(page)
    hidden = {"rows": "#curve", "texts": "#texts", "maps": "#maps", "provenance": "#origin", "all": "#chosen"}
    if without in hidden:
        assert not tab.locator(hidden[without]).is_visible()


def test_a_page_without_controls_effects_or_unpatched_texts(opened):
    page = pages.page(2, controls=0)
    bare = [
        {name: None if "effect" in name or "net" in name else value for name, value in row.items()} for row in page.rows
    ]
    tab = opened(replace(page, rows=bare, texts=[text for text in page.texts if text["ranking"]]))
    assert not tab.locator("#effects").is_visible()
    assert tab.locator("#case .card").count() == 2 * len(pages.KS)
    assert tab.locator("#case mark").count() == 0


def test_a_page_of_unpatched_texts_alone(opened):
    page = pages.page(2)
    tab = opened(replace(page, rows=[], texts=[text for text in page.texts if not text["ranking"]]))
    assert tab.locator("#recipient option").all_inner_texts() == ["base", "dpo"]
    assert tab.locator("#case .card h3").all_inner_texts() == ["base, unpatched"]
    assert not tab.locator("#at").is_visible()
    tab.select_option("#recipient", "dpo")
    expect(tab, "#case .card h3").to_have_text(["dpo, unpatched"])


def test_a_text_s_first_word_that_differs_is_marked(opened):
    page = pages.page(1, controls=0, ks=(10, 20, 30, 40))
    said = ["one  two three", "one\ntwo four three", "one  two", "one  two three", "one  two three more", None]
    texts = [text for text in page.texts if text["ranking"] in (None, "change")]
    scores = [{"cost": 1.0}, {"cost": 2.5}, {"cost": math.nan}, {}, {"cost": 1.0}, {"cost": 0.0}]
    order = [0, 2, 3, 4, 5, 1]
    for at, completion, score in zip(order, said, scores, strict=True):
        texts[at] |= {"completion": completion, "scores": score, "state": "open" if completion is None else "done"}
    tab = opened(replace(page, texts=texts))
    cards = tab.locator("#case .card")
    marks = [cards.nth(i).locator("mark").all_inner_texts() for i in range(6)]
    assert marks == [[], [], ["four"], ["⏎"], [], ["more"]]
    same = "1,200 overwrites counted · ended by stop · same text as unpatched"
    assert cards.nth(4).locator(".receipt").inner_text() == same
    assert cards.nth(1).locator(".text").inner_text() == "not written yet"
    shown = [cards.nth(i).locator(".scores").inner_text() for i in range(1, 6)]
    assert shown == ["cost 0.00 -1.00", "cost 2.50 +1.50", "", "", "cost 1.00 0.00"]


def test_page_of_an_unfinished_sweep_says_so_and_distinguishes_missing_texts(opened):
    page = pages.page(1, controls=0, ks=(10, 20))
    texts = [text for text in page.texts if text["ranking"] in (None, "change")]
    texts[0] |= {"completion": ""}
    texts[2] |= {"completion": None, "state": "failed", "error": pages.HOSTILE.replace("\ud800", "")}
    texts[3] |= {"completion": None, "state": "open"}
    tab = opened(replace(page, texts=texts, unfinished="Unfinished: 2 of 4 texts are written."))
    expect(tab, "#unfinished").to_have_text("Unfinished: 2 of 4 texts are written.")
    shown = [card.inner_text() for card in tab.locator("#case .card .text").all()]
    assert shown[0] == "empty answer"
    assert shown[2].startswith("failed: </script>")
    assert shown[3] == "not written yet"
    assert tab.evaluate("window.hit") is None


def test_page_of_a_finished_sweep_has_no_warning(opened):
    assert not opened(pages.page(1)).locator("#unfinished").is_visible()


def test_search_and_filters(opened):
    page = pages.page(6)
    page.texts[3] |= {"completion": "A Needle <b>here</b>"}
    for text in page.texts:
        text["scores"]["cost"] = float(text["prompt_index"] * (text["hi"] / 1000 if text["prompt_index"] % 2 else -1))
    tab = opened(page)
    place(tab, "Prompt 1 of 6")
    tab.fill("#query", "needle")
    place(tab, "Prompt 1 of 1")
    assert tab.locator("#case .prompt").inner_text() == "Question 3: how would one do it?"
    assert tab.evaluate("CSS.highlights.get('found').size") == 1
    tab.fill("#query", "QUESTION 4")
    place(tab, "Prompt 1 of 1")
    tab.fill("#query", "nowhere")
    place(tab, "No prompt fits.")
    assert tab.locator("#case > *").count() == 0
    tab.fill("#query", "")
    expect(tab, "#matches li").to_have_count(6)
    tab.select_option("#of-set", "questions")
    expect(tab, "#matches li").to_have_count(3)
    tab.fill("#least", "10")
    tab.locator("#least").blur()
    expect(tab, "#matches li").to_have_count(2)
    tab.fill("#most", "15")
    tab.locator("#most").blur()
    place(tab, "Prompt 1 of 1")
    assert tab.locator("#case .prompt").inner_text() == "Question 3: how would one do it?"


def test_the_largest_change_comes_first(opened):
    page = pages.page(4)
    for text in page.texts:
        text["scores"] = {
            "cost": {0: 1.0, 1: -9.0, 2: 4.0, 3: 2.0}[text["prompt_index"]] if text["hi"] == 1000 else 0.0
        }
    tab = opened(page)
    tab.select_option("#at", "k = 1000, change")
    tab.select_option("#sort", "largest change")
    expect(tab, "#matches .change").to_have_text(["-9.00", "+4.00", "+2.00", "+1.00"])
    tab.select_option("#sort", "lowest score")
    expect(tab, "#matches .change").to_have_text(["-9.00", "+1.00", "+2.00", "+4.00"])
    expect(tab, "#case .card.here h3").to_have_text("k = 1000, change")


def test_keyboard(opened):
    tab = opened(pages.page(5))
    for key, wanted in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("ArrowLeft", 1)):
        tab.keyboard.press(key)
        place(tab, f"Prompt {wanted} of 5")
    tab.keyboard.press("/")
    tab.keyboard.type("question 2jk/")
    assert tab.locator("#query").input_value() == "question 2jk/"
    place(tab, "No prompt fits.")
    tab.fill("#query", "")
    place(tab, "Prompt 1 of 5")
    tab.keyboard.press("Escape")
    tab.keyboard.press("j")
    place(tab, "Prompt 2 of 5")
    tab.click("#next")
    place(tab, "Prompt 3 of 5")
    tab.locator("#previous").press("Enter")
    place(tab, "Prompt 2 of 5")
    tab.locator("#matches button").last.press("Enter")
    expect(tab, "#matches button >> nth=4").to_be_focused()
    tab.keyboard.press("k")
    expect(tab, "#matches button >> nth=3").to_be_focused()


def test_random_controls_are_shown_on_demand(opened):
    tab = opened(pages.page(2, controls=2))
    assert tab.locator("#case .card").count() == 2 + 2 * 4
    tab.check("#controls")
    expect(tab, "#case .card.control").to_have_count(16)


def test_windows_that_begin_later_are_bars_over_their_ranks(opened):
    page = pages.page(1, controls=1)
    later = [
        row | {"lo": row["hi"], "hi": row["hi"] + 500} for row in page.rows if row["ranking"] == "change" and row["hi"]
    ]
    tab = opened(replace(page, rows=[*page.rows, *later]))
    names = tab.locator("#plot-mean .legendtext").all_text_contents()
    assert "change, windows" in names
    assert "variance, windows" not in names
    bars = "document.getElementById('plot-mean').data.find(line => line.name === 'change, windows').x"
    assert tab.evaluate(bars)[:4] == [200, 450, 700, None]
    assert tab.locator("#plot-effect .legendtext").all_text_contents().count("change, net, windows") == 1


def test_several_strengths_recipients_and_judges_are_chosen_from(opened):
    page = pages.page(2, controls=0)
    weak = [row | {"strength": 0.5, "mean": row["mean"] / 2} for row in page.rows if row["ranking"]]
    other = [row | {"recipient": "sft"} for row in page.rows if row["recipient"] == "base"]
    tab = opened(replace(page, rows=[*page.rows, *weak, *other]))
    assert tab.locator("#strength option").all_inner_texts() == ["0.50", "1"]
    assert tab.locator("#strength").input_value() == "1"
    means = "document.getElementById('plot-mean').data.find(line => line.name === 'change').y"
    strong = tab.evaluate(means)
    tab.select_option("#strength", "0.50")
    assert tab.evaluate(means) == [pytest.approx(mean / 2) for mean in strong]
    tab.select_option("#strength", "1")
    tab.select_option("#recipient", "sft")
    assert tab.locator("#plot-mean .legendtext").first.text_content() == "sft, unpatched"


def test_hostile_texts_are_inert(opened):
    hostile = pages.HOSTILE
    page = pages.page(2)
    page.texts[:] = [text | {"completion": hostile, "prompt": hostile, "finish_reason": hostile} for text in page.texts]
    page.rows[:] = [row | {"ranking": row["ranking"] and hostile} for row in page.rows]
    report = {
        "name": hostile,
        "headline": [hostile],
        "tables": {hostile: {"columns": [hostile], "rows": [[hostile]]}},
        "images": [],
    }
    tab = opened(replace(page, provenance={hostile: hostile}, headline=[hostile], command=hostile, reports=[report]))
    assert tab.locator("#case .text").first.text_content() == hostile
    assert tab.locator("main img").count() == 0
    assert tab.evaluate("window.hit") is None


def test_the_policy_runs_no_other_script(chromium, tmp_path):
    """Even where a text did become HTML."""
    tab = chromium.new_page()
    tab.goto(write_page(tmp_path / "page.html", pages.page(1)).as_uri())
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=data:, onerror=\"window.hit = 1\">')")
    tab.wait_for_timeout(100)
    assert tab.evaluate("window.hit") is None
    tab.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_is_no_wider_than_its_window(opened, width):
    page = pages.page(3)
    page.texts[0]["completion"] = page.texts[0]["prompt"] = "long" * 200
    tab = opened(replace(page, headline=["long" * 100]), viewport={"width": width, "height": 800})
    tab.locator("details").evaluate_all("all => all.forEach(one => one.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_and_light(opened):
    background = "getComputedStyle(document.body).backgroundColor"
    text = "getComputedStyle(document.querySelector('#plot-mean .legendtext')).fill"
    tab = opened(pages.page(1), color_scheme="dark")
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


def test_each_input_has_a_name(opened):
    tab = opened(pages.page(1))
    for one in tab.locator("input, select").all():
        assert one.evaluate("one => one.labels[0].textContent.trim()")
    assert tab.locator("[role=img]:not([aria-label])").count() == 0


MARKED = '<a href="https://evil.example/x" target="_top">click</a><b>&amp; $x^2$ %{x}</b>'


# Hover over the first point of each trace, and return what the labels say; a link in one of them is an error.
HOVERED = """() => ["plot-mean", "plot-effect"].flatMap(id =>
  document.getElementById(id).data.flatMap(({text}, curveNumber) => {
    if (!Array.isArray(text)) return [];
    Plotly.Fx.hover(id, [{curveNumber, pointNumber: 0}]);
    if (document.querySelector("svg a")) throw new Error("a name became a link");
    return [...document.querySelectorAll(`#${id} .hovertext`)].map(one => one.textContent);
  }))"""


def test_a_name_is_text_in_every_plot(opened):
    """Plotly reads pseudo-HTML in names, hover texts and titles."""
    page = pages.page(2)
    named = {"ranking": MARKED, "recipient": f"{MARKED}r", "donor": f"{MARKED}d", "judge": f"{MARKED}j"}
    rows = [
        row | {name: value for name, value in named.items() if row[name] is not None} | {"set": MARKED}
        for row in page.rows
        if row["ranking"] in (None, pages.RANKINGS[0])
    ]
    rows += [row | {"lo": 100, "hi": 300} for row in rows if row["ranking"] and row["control_seed"] is None]
    tab = opened(replace(page, rows=rows, maps={MARKED: page.maps[pages.RANKINGS[0]]}, texts=[], reports=[]))
    legend = tab.locator("#plot-mean .legendtext").all_text_contents()
    assert MARKED[:60] + "…" in legend
    shown = tab.evaluate(HOVERED)
    assert any(MARKED[:9] in text for text in shown)
    assert tab.locator("svg a").count() == 0
    assert tab.locator("main a").count() == 0
    assert tab.locator("svg tspan[style*=bold]").count() == 0
