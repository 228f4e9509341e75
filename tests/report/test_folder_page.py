"""The page of a results folder: each sentence and each plot appears once."""

import json
from dataclasses import fields

import pytest

from snpatch import SnpatchError
from snpatch.report.folder_page import load_page
from snpatch.sweeps.rows import Row

SWEEP_ROW = dict.fromkeys([field.name for field in fields(Row)]) | {
    "judge": "cost",
    "set": "attacks",
    "recipient": "sft",
}
SENTENCE, NOTE = "sft: 5% recovered 90%.", "safety [0, 9] has no random control."


def write_table(folder, stem: str, row: dict, has_plot: bool = True, **parts) -> None:
    table = {"provenance": {}, "headline": [SENTENCE], "notes": [NOTE], "rows": [row], **parts}
    (folder / f"{stem}.json").write_text(json.dumps(table))
    if has_plot:
        (folder / f"{stem}.png").write_bytes(b"png")


def test_page_of_a_sweep_has_its_sentences_and_plot_once(tmp_path):
    write_table(tmp_path, "curve", SWEEP_ROW | {"state": "whole"})
    page = load_page(tmp_path)
    assert page.reports == []
    assert (page.headline, page.notes) == ([SENTENCE], [NOTE])
    assert len(page.rows) == 1


def test_page_of_a_sweep_keeps_a_plot_that_the_figure_does_not_show(tmp_path):
    write_table(tmp_path, "transfer", SWEEP_ROW | {"benchmark": "attacks"})
    page = load_page(tmp_path)
    [section] = page.reports
    assert (section["headline"], section["tables"], len(section["images"])) == ([SENTENCE], {}, 1)
    assert page.headline == []


def test_page_joins_sentences_and_notes_that_two_tables_share(tmp_path):
    write_table(tmp_path, "guard", {"k": 1})
    write_table(tmp_path, "guard-summary", {"k": 1}, has_plot=False, notes=[NOTE, "other"])
    write_table(tmp_path, "positions-effects", SWEEP_ROW, headline=[SENTENCE, "second"])
    page = load_page(tmp_path)
    assert [(section["name"], section["headline"]) for section in page.reports] == [
        ("guard", []),
        ("guard-summary", []),
    ]
    assert page.headline == [SENTENCE, "second"]
    assert page.notes == [NOTE, "other"]


def test_page_of_a_table_without_notes_has_none(tmp_path):
    (tmp_path / "t.json").write_text(json.dumps({"provenance": {}, "headline": [SENTENCE], "rows": [{"a": 1}]}))
    assert load_page(tmp_path).notes == []


@pytest.mark.parametrize("notes", ["one", [1], None])
def test_page_of_damaged_notes_raises_one_line_error(tmp_path, notes):
    write_table(tmp_path, "t", {"a": 1}, notes=notes)
    with pytest.raises(SnpatchError, match=r"t\.json: damaged"):
        load_page(tmp_path)
