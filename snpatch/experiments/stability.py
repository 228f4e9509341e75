"""Stability: do training runs that differ in their seed alone find the same safety neurons?"""

from dataclasses import dataclass

from snpatch.errors import SnpatchError
from snpatch.experiments import agreement
from snpatch.report.report import Report, between, cell, table_of
from snpatch.worlds.lab import Lab

SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)
COLUMNS = {name: name for name in ("a", "b", "k", "overlap", "chance", "common", "spearman")}


@dataclass(frozen=True)
class Settings:
    """k: what the sentence is about; more_k: further points of the curve. Ints, or shares of the ranked neurons."""

    k: int | float = 20_000
    more_k: tuple[int | float, ...] = SHARES


def run(lab: Lab, settings: Settings) -> Report:
    """Compare the rankings of the world's training seeds pairwise."""
    rankings = {seed: lab.ranking(contrast) for seed, contrast in lab.world.seeds.items()}
    return report_of(lab, "stability", rankings, settings, "training seeds")


def report_of(lab: Lab, name: str, rankings: dict, settings, what: str) -> Report:
    """The report of any comparison of rankings."""
    if len(rankings) < 2:
        raise SnpatchError(f"needs at least two {what} in the world, there are {', '.join(rankings) or 'none'}")
    any_one = next(iter(rankings.values()))
    k = lab.k(settings.k, any_one)
    ks = sorted({k, *(lab.k(value, any_one) for value in settings.more_k)})
    rows = agreement.compare(rankings, ks)
    main = [row for row in rows if row["k"] == k]
    spearmans = [row["spearman"] for row in main if row["spearman"] is not None]
    overlaps = [row["overlap"] for row in main]
    sentence = (
        f"{len(rankings)} {what}: overlap {between(overlaps)} at k = {k} ({cell(main[0]['chance'])} for random orders)"
    )
    if spearmans:
        sentence += f", Spearman {between(spearmans)}"
    plots = {name: agreement.plot(rows, rankings, k)}
    return Report(name, {name: rows}, plots, table_of(rows, COLUMNS), [f"{sentence}."])
