"""Names from users are shown as plain text everywhere: terminal, plots, Markdown, file names."""

import json
import os
from pathlib import Path

import pytest
from commands import run
from matplotlib.figure import Figure
from rich.console import Console

from snpatch.errors import MAX_MESSAGE_CHARS, SnpatchError, printable, shown
from snpatch.experiments.common.summary import format_section
from snpatch.experiments.config import Contrast, load_experiment_config
from snpatch.experiments.context import ExperimentContext
from snpatch.report import files, terminal
from snpatch.report.folder_page import load_page
from snpatch.report.formatting import escape_markdown, to_plot_label
from snpatch.report.report import Report, TableView
from snpatch.utils.files import file_stem

ESCAPES = "\x1b]8;;https://evil.example\x07a\x1b[2J\x9b31m\r\u202e\ud800"
ESCAPED = r"\u001b]8;;https://evil.example\u0007a\u001b[2J\u009b31m\u000d\u202e\ud800"
MARKUP = "[red]a[/red] [link=https://evil.example]b[/link] [/]"
CURVE = Path(__file__).parents[1] / "bench" / "results" / "demo" / "curve.json"
PROVENANCE = {"model": "m", "backend": "vllm", "seconds": 1}


def test_printable_escapes_terminal_control_characters():
    assert printable(ESCAPES) == ESCAPED
    assert printable("é\t\n漢 [red]") == "é\t\n漢 [red]"
    data = {"completion": ESCAPES}
    assert json.loads(printable(json.dumps(data, ensure_ascii=False))) == data


def test_errors_are_one_printable_line():
    assert str(SnpatchError(f"no model named {ESCAPES}\nsnpatch: all is well")) == (
        f"no model named {ESCAPED}\\nsnpatch: all is well"
    )
    assert len(str(SnpatchError("a" * 10**6))) == MAX_MESSAGE_CHARS + 3
    assert len(shown("a" * 10**6)) < 300


def test_terminal_tables_show_names_unchanged():
    view = TableView((MARKUP, "b"), ((MARKUP, ESCAPES),), title=MARKUP)
    console = Console(width=300, force_terminal=True, color_system=None, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    terminal.print_report(Report("t", {}, {}, (view,), headline=[MARKUP, ESCAPES]), console)
    text = console.export_text(styles=True)
    assert text.count(MARKUP) == 4
    assert text.count(ESCAPED) == 2
    assert "\x1b]8" not in text


def test_cli_errors_contain_no_escape_sequences(tmp_path, capsys):
    path = tmp_path / "experiment.toml"
    path.write_text('"a\\u001b[2J\\nb" = 1\n')
    code, _, err = run(capsys, "exp", "curve", "-c", path)
    assert (code, err.count("\n")) == (2, 1)
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("$x$ and $y$", r"\$x\$ and \$y\$"),
        ("_hidden", " _hidden"),
        ("a\nb\x1b", r"a\nb\u001b"),
        ("a" * 99, "a" * 60 + "..."),
        ("plain", "plain"),
    ],
)
def test_plot_name_is_not_rendered_as_formula(name, expected):
    assert to_plot_label(name) == expected


def test_plots_show_names_unchanged(tmp_path):
    """`$\\frac{$` is no formula of Matplotlib, and ends in an error where it is read as one."""
    figure = Figure()
    axis = figure.subplots()
    for name in (r"$\frac{$", "$x$", "_hidden", "\ud800\x00"):
        axis.plot([1], [1], label=to_plot_label(name))
    legend = axis.legend()
    assert len(legend.get_texts()) == 4
    files.write_report(Report("t", {}, {"t": figure}, ()), tmp_path)
    assert (tmp_path / "t.svg").is_file()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a](https://evil.example)", r"\[a\](https\://evil.example)"),
        ("<script>x</script>", r"\<script\>x\</script\>"),
        ("![a](b)|c`d`*e*_f_", r"\!\[a\](b)\|c\`d\`\*e\*\_f\_"),
        ("www.evil.example, a@b.example", r"www\.evil.example, a\@b.example"),
        ("a\n# b", r"a\\n\# b"),
        ("effect 0.97 (0.93 .. 1.00), 41.7%", "effect 0.97 (0.93 .. 1.00), 41.7%"),
    ],
)
def test_markdown_in_names_is_escaped(text, expected):
    assert escape_markdown(text) == expected


def test_report_md_contains_no_links_from_names():
    provenance = {**PROVENANCE, "model": "[m](x)"}
    text = format_section("curve", {"headline": ["<b>[a](https://evil.example)"], "provenance": provenance})
    assert "<b>" not in text
    assert "[a](" not in text
    assert "[m](" not in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../../x", "%2E.%2F..%2Fx"),
        ("/etc/x", "%2Fetc%2Fx"),
        (".x", "%2Ex"),
        ("a b-é", "a b-é"),
        ("\x00", "%00"),
    ],
)
def test_file_stem_stays_in_its_folder(name, expected):
    assert file_stem(name) == expected


def test_reports_and_rankings_stay_in_their_folder(tmp_path):
    out = tmp_path / "deep" / "out"
    rows = [{"a": 1}]
    paths = files.write_report(Report("t", {"../../x": rows}, {"../../y": Figure()}, ()), out)
    assert all(path.parent == out for path in paths)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "deep"]
    with ExperimentContext(load_experiment_config("demo"), out) as context:
        path = context.ranking_file(Contrast("../../a", "b/c", "p"))
    assert path.parent == out / "rankings"


def table(folder, **changes):
    folder.mkdir(exist_ok=True)
    content = {"provenance": {}, "headline": [], "rows": [{"a": 1}, {"a": 2}], **changes}
    (folder / "t.json").write_text(json.dumps(content))
    return folder


def test_page_does_not_follow_links_out_of_its_folder(tmp_path):
    out = table(tmp_path / "out")
    (tmp_path / "secret").write_bytes(b"secret")
    (out / "t.png").symlink_to(tmp_path / "secret")
    assert load_page(out).reports[0]["images"] == []
    (out / "t.png").unlink()
    (out / "t.png").write_bytes(b"png")
    assert load_page(out).reports[0]["images"] == ["data:image/png;base64,cG5n"]


@pytest.mark.parametrize(
    "changes",
    [{"rows": [1]}, {"rows": [{"a": 1}, {"b": 2}]}, {"rows": {"a": 1}}, {"headline": [1]}, {"headline": 3},
     {"provenance": []}],
)  # fmt: skip
def test_page_of_damaged_table_raises_one_line_error(tmp_path, changes):
    with pytest.raises(SnpatchError, match=r"t\.json: damaged"):
        load_page(table(tmp_path / "out", **changes))


def test_page_reads_a_sweep_without_the_newest_columns(tmp_path):
    curve = json.loads(CURVE.read_text())
    rows = [{name: value for name, value in row.items() if name != "control_overlap"} for row in curve["rows"]]
    page = load_page(table(tmp_path / "out", rows=rows))
    assert len(page.rows) == len(rows)
    assert {row["control_overlap"] for row in page.rows} == {None}


def test_page_of_deeply_nested_table_raises_one_line_error(tmp_path):
    table(tmp_path / "out")
    (tmp_path / "out" / "t.json").write_text("[" * 100_000)
    with pytest.raises(SnpatchError, match="nested deeper than 100 levels"):
        load_page(tmp_path / "out")
