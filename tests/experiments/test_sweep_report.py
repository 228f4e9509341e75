"""Headlines of sweeps: a window that is fixed in advance, directions of changes, gaps that are not established."""

from dataclasses import replace

import pytest

from snpatch.experiments.common.sweep_headline import build_headline, choose_window
from snpatch.experiments.common.sweep_report import build_sweep_report
from snpatch.sweeps.config import SweepConfig
from snpatch.sweeps.rows import Row
from snpatch.sweeps.sweep import SweepResult

FIGURES = {
    "mean_low": None, "mean_high": None, "effect": None, "effect_low": None, "effect_high": None, "net_effect": None,
    "net_effect_low": None, "net_effect_high": None, "p_vs_unpatched": None, "p_vs_random": None,
}  # fmt: skip
UNPATCHED = Row("cost", "attacks", "sft", None, None, None, None, 0, 0, None, 0.0, 200, 0, 0, 0, mean=7.0, **FIGURES)
GAP = {"gap": -10.0, "gap_low": -11.0, "gap_high": -9.0, "gap_t": -19.6}


def patched(k: int, mean: float, **figures) -> Row:
    """Return the row of the top k of 1000 ranked neurons, of 1250."""
    effect = {"effect": (mean - 7) / -10, "effect_low": (mean - 6) / -10, "effect_high": (mean - 8) / -10}
    return replace(
        UNPATCHED, donor="dpo", ranking="safety", rank_hi=k, strength=1.0, mean=mean, neuron_fraction=k / 1250,
        ranked_fraction=k / 1000, **{**GAP, **effect, **figures},
    )  # fmt: skip


def build_result(*rows: Row, **settings) -> SweepResult:
    config = SweepConfig(("sft",), "dpo", tuple((row.rank_lo, row.rank_hi) for row in rows), **settings)
    donor = replace(UNPATCHED, recipient="dpo", mean=-3.0)
    return SweepResult(config, [UNPATCHED, donor, *rows], [], [], [])


def test_headline_is_about_the_k_that_was_fixed_in_advance():
    rows = [patched(k, mean) for k, mean in ((0, 7.0), (40, 5.5), (70, -2.0), (500, -1.0))]
    (sentence,) = build_headline(build_result(*rows))
    assert sentence == (
        "sft: the top 40 neurons (3.2% of all, 4.0% of the ranked) of ranking safety lower the mean cost by 1.50, 15% "
        "(95% CI 5% .. 25%) of the way to dpo, whose mean is 10.00 lower; no random control."
    )
    for k, expected in ((60, "top 70"), (0.4, "top 500"), (0, "top 40"), (1000, "top 500")):
        assert expected in build_headline(build_result(*rows, report_k=k))[0]


def test_headline_names_the_controls_that_the_effect_is_net_of():
    net = {"net_effect": 0.1, "net_effect_low": 0.02, "net_effect_high": 0.18, "controls": 3, "control_overlap": 0.25}
    (sentence,) = build_headline(build_result(patched(40, 5.5, **net)))
    assert sentence.endswith(
        "; net of 3 random controls (25.0% of them in the window: conservative): 10% (95% CI 2% .. 18%)."
    )
    alone = {"net_effect": 0.1, "controls": 1}
    assert build_headline(build_result(patched(40, 5.5, **alone)))[0].endswith("; net of 1 random control: 10%.")


def test_headline_of_a_rise_of_cost_says_raise():
    gap = {"gap": 10.0, "gap_low": 9.0, "gap_high": 11.0, "gap_t": 19.6}
    row = patched(50, 16.0, **gap, effect=0.9, effect_low=0.8, effect_high=1.0)
    (sentence,) = build_headline(build_result(row))
    assert (
        "raise the mean cost by 9.00, 90% (95% CI 80% .. 100%) of the way to dpo, whose mean is 10.00 higher"
        in sentence
    )
    assert "gain" not in sentence
    assert "leave the mean cost unchanged, 0%" in build_headline(build_result(patched(50, 7.0)))[0]


def test_headline_without_established_gap_gives_no_effect():
    gap = {"gap": -1.2, "gap_low": -3.0, "gap_high": 0.6, "gap_t": -1.3}
    row = patched(50, 5.0, **gap, effect=None, effect_low=None, effect_high=None)
    result = build_result(row)
    assert build_headline(result) == [
        "sft: the difference of dpo's mean cost, -1.20 (95% CI -3.00 .. 0.60, 200 prompts), is not established: "
        "t = -1.3, so no effect is given."
    ]
    (table,) = build_sweep_report(result, "curve").displays
    assert [cells[3] for cells in table.rows] == ["", "", ""]
    empty = replace(row, gap=None, gap_low=None, gap_high=None, gap_t=None, prompts=0)
    assert build_headline(build_result(empty)) == [
        "sft: no prompt has scores of both models, so there is no effect of dpo."
    ]


def test_headline_names_the_effect_of_all_ranked_neurons():
    (sentence,) = build_headline(build_result(patched(50, 2.0), patched(1000, -2.9)))
    assert sentence.endswith("; no random control; all ranked neurons: 99%.")


def test_all_rankings_are_reported_at_one_k():
    rows = [patched(k, mean) for k, mean in ((40, 5.5), (160, 0.0))]
    others = [replace(patched(k, mean), ranking="other") for k, mean in ((40, -1.0), (160, -2.0))]
    sentences = build_headline(build_result(*rows, *others))
    assert [sentence.split(" (")[0] for sentence in sentences] == ["sft: the top 40 neurons"] * 2


@pytest.mark.parametrize(
    ("windows", "k", "expected"),
    [
        ([(0, 0), (0, 100)], 0.05, (0, 100)),
        ([(0, 20), (0, 80)], 50, (0, 20)),
        ([(100, 150), (0, 900)], 0.05, (0, 900)),
        ([(300, 350), (100, 150)], 0.05, (100, 150)),
    ],
    ids=["not the empty window", "the smaller of two as near", "from the top", "the first ranks"],
)
def test_chosen_window_depends_on_the_grid_alone(windows, k, expected):
    rows = [replace(patched(hi - lo, 0.0), rank_lo=lo, rank_hi=hi) for lo, hi in windows]
    row = choose_window(rows, k)
    assert (row.rank_lo, row.rank_hi) == expected
