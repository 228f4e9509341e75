"""Generator of the tables in README and guides from the records in bench/results/: `python bench/readme_table.py`.

Why a new measurement needs no code here: its record describes itself (`extra_info`: side, size, batch, baselines).
Tables of GPU measurements stay empty until there are records of a GPU.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import package_table
import typer
from typer.cli import get_docs_for_click

from snpatch import cli
from snpatch.cli.help_panels import arrange

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
REFERENCE = ROOT / "snpatch" / "cli" / "REFERENCE.md"
SIDE_LABELS = {
    "32 windows": "32 different windows in a batch",
    "one stream": "plain requests with streams=1",
    "pair": "patched, with secondary weights",
    "plain on twin": "plain requests on a two-stream engine",
    "prefill": "prefill, one generated token",
    "statistics": "statistics of every position",
    "sweep": "a sweep of 32 windows x 64 prompts",
    "twin": "patched",
}
BASELINE_LABELS = {
    "hooks": "two transformers models with hooks",
    "native 2B": "native vLLM, same number of rows",
    "native B": "native vLLM, same number of requests",
    "one after the other": "one window after the other",
    "one window": "the same number of completions with one window",
    "two natives": "two native engines, one after the other",
    "without": "no statistics",
}
OUTCOME_LABELS = {
    "ended first": "finished before their client disconnected",
    "known": "known completions, exact",
    "left": "disconnected before the end",
    "malformed": "malformed and rejected",
    "overflowed": "overflowed, with the right error",
    "whole": "complete streams with verified receipts",
}
LATENCY_METRICS = ("median_ttft_ms", "median_tpot_ms")


@dataclass(frozen=True)
class Measurement:
    """One measurement. info: its extra_info. seconds: the median. versions: package -> version."""

    info: dict
    seconds: float
    machine: str
    versions: dict

    @property
    def is_gpu(self) -> bool:
        return self.info.get("device") == "cuda"

    @property
    def ratios(self) -> dict[str, str]:
        """Baseline -> speedup over it, with quartiles."""
        baselines = {name: data for name, data in self.info.items() if isinstance(data, dict) and "ratio" in data}
        return {name: f"{b['ratio']:.2f}x ({b['q1']:.2f} .. {b['q3']:.2f})" for name, b in baselines.items()}


def load_runs(folder: Path = RESULTS) -> Iterator[Measurement]:
    """Yield every measurement in all records: pytest-benchmark's, and those of gpu_check.py in gpu/."""
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        about = record["machine_info"]
        threads = "1 thread" if about["threads"] == 1 else f"{about['threads']} threads"
        machine = f"{about['device']}, {threads}, {about['capability']}"
        yield from _runs(record["benchmarks"], machine, about["versions"])
    for path in sorted((folder / "gpu").glob("*.json")):
        for record in json.loads(path.read_text()).values():
            if not record["rehearsal"]:
                for part in record["parts"].values():
                    yield from _runs(part.get("benchmarks", ()), record["card"], record["versions"])


def _runs(benchmarks: Iterable[dict], machine: str, versions: dict) -> Iterator[Measurement]:
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        yield Measurement(info, benchmark["stats"]["median"] / info.get("calls", 1), machine, versions)


def op_table(runs: list[Measurement]) -> str:
    """Build the table of each side's microseconds on the same tokens, and its multiple of the op's time."""
    cases: dict[tuple, dict[str, Measurement]] = {}
    for run in runs:
        if "bytes" in run.info:
            case = run.info["tokens"], run.info["neurons"], run.info["dtype"]
            cases.setdefault(case, {})[run.info["side"]] = run
    if not cases:
        return ""
    first = next(iter(cases.values()))
    baselines = sorted(first.keys() - {"snpatch"}, key=lambda side: first[side].seconds)
    rows = []
    for (tokens, neurons, dtype), sides in cases.items():
        snpatch_run = sides["snpatch"]
        times = [f"{sides[o].seconds * 1e6:.0f} us ({sides[o].seconds / snpatch_run.seconds:.2f}x)" for o in baselines]
        speed = snpatch_run.info["bytes"] / snpatch_run.seconds / 1e9
        rows.append((f"{tokens} x {neurons}, {dtype}", f"{snpatch_run.seconds * 1e6:.0f} us", *times, f"{speed:.0f}"))
    table = _table(("tokens x neurons, dtype", "snpatch", *baselines, "snpatch GB/s"), rows)
    return f"{table}\n\n{snpatch_run.machine}; {_versions(snpatch_run, 'torch', 'triton')}; medians."


def generate_table(runs: list[Measurement]) -> str:
    """Build the tables of patched generation and of all other comparisons.

    There is one for each machine, size and model runner.
    """
    groups: dict[tuple, list[Measurement]] = {}
    for run in runs:
        if run.ratios and "runner" in run.info:
            groups.setdefault((run.machine, run.info["size"], run.info["runner"]), []).append(run)
    return "\n\n".join(_generate_group(group) for group in groups.values())


def speed_table(runs: list[Measurement]) -> str:
    """Build the README's table: decoding of patched requests on the first machine with a record."""
    decoding = [run for run in runs if _is_decoding(run)]
    return _generate_group([run for run in decoding if run.machine == decoding[0].machine]) if decoding else ""


def _is_decoding(run: Measurement) -> bool:
    return run.info.get("side") == "twin" and {"native 2B", "native B"} <= run.ratios.keys()


def _generate_group(group: list[Measurement]) -> str:
    decoding, rows = [], []
    for run in group:
        if _is_decoding(run):
            speed = run.info["batch"] * run.info["new"] / run.seconds
            ratios = run.ratios["native 2B"], run.ratios["native B"]
            decoding.append((f"batch of {run.info['batch']}", f"{speed:.0f}", *ratios))
        else:
            label = SIDE_LABELS.get(run.info["side"], run.info["side"])
            batch = f", batch of {run.info['batch']}" if "batch" in run.info else ""
            lengths = ", 8 to 128 tokens" if run.info.get("lengths") == "ragged" else ""
            for baseline, ratio in run.ratios.items():
                rows.append((f"{label}{batch}{lengths}, vs {BASELINE_LABELS.get(baseline, baseline)}", ratio))
    head = "patched, 5 % of the neurons", "tokens/s", "vs vLLM, same number of rows", "vs vLLM, same number of requests"
    tables = [_table(head, decoding), _table(("", "ratio of speeds (quartiles)"), rows)]
    geometry = f"{run.info['size']} geometry, {run.info.get('dtype', 'bfloat16')}"
    about = f"{geometry}, {run.machine}, model runner {run.info['runner']}"
    return "\n\n".join([*filter(None, tables), f"{about}; {_versions(run, 'vllm', 'torch')}; medians."])


def sweeps_table(runs: list[Measurement]) -> str:
    """Build the table of the store's cost and of the completions that finding the smallest k takes."""
    rows = []
    for run in runs:
        if "store_share" in run.info:
            i = run.info
            rows += [
                (f"{i['texts']} completions of the demo model, stored and judged", f"{i['first_s']:.0f} s"),
                ("of which CPU time in the store", f"{i['store_s']:.2f} s ({i['store_share']:.1%})"),
                ("the same command again, from the store", f"{i['again_s']:.1f} s"),
            ]
        if run.info.get("side") == "readings":
            share = run.seconds / run.info["generation_s"]
            texts = f"both unpatched models read {run.info['texts']} completions"
            rows.append((texts, f"{run.seconds:.1f} s ({share:.0%} of the time to generate and judge them)"))
        if run.info.get("side") == "two processes":
            texts = f"{run.info['texts']} completions by two processes on one folder, including start and end"
            rows.append((texts, f"{run.seconds:.0f} s (one process: {run.info['one_s']:.0f} s)"))
        if run.info.get("side") == "minimal":
            for name, result in run.info.items():
                if isinstance(result, dict):
                    high = "above the grid" if result["high"] is None else result["high"]
                    interval = f"interval {result['low'] or 0} .. {high}; whole grid: {result['whole_grid']}"
                    answer = f"k = {result['k']} ({interval})"
                    rows.append((f"smallest k, {name}: {answer}", f"{result['used']} of {result['full']} completions"))
    return _table(("measurement", "result"), rows)


def serve_table(runs: list[Measurement]) -> str:
    """Build the table of vLLM's serving benchmark, and the overhead of HTTP over the offline engine."""
    rows, tables, about = [], [], None
    sides = ("served patched", "served plain", "native server 2B")
    for run in runs:
        if run.info.get("side") == "served":
            figures, about = run.info["figures"], run
            speeds = f"{figures[sides[0]]['request_throughput']:.2f}"
            ratios = run.ratios["served plain"], run.ratios["native server 2B"]
            times = (" / ".join(f"{figures[side][key]:.0f}" for side in sides) for key in LATENCY_METRICS)
            rows.append((run.info["batch"], speeds, *ratios, *times))
    if rows:
        head = (
            "concurrency",
            "requests/s",
            "vs plain requests, same server",
            "vs vLLM's server, twice the concurrency",
        )
        latencies = (f"{name}, ms: patched / plain / vLLM's server, twice the concurrency" for name in ("TTFT", "TPOT"))
        tables.append(_table((*head, *latencies), rows))
    for run in runs:
        if run.info.get("side") == "http":
            i = run.info
            tables.append(
                f"{i['requests']} responses of {i['new']} tokens, {i['batch']} at a time: HTTP adds "
                f"{i['added_ms']:.1f} ms per request ({i['added_q1']:.1f} .. {i['added_q3']:.1f}) to the offline "
                f"engine's {i['offline_ms']:.0f} ms."
            )
    if about is not None:
        geometry = (
            f"{about.info['size']} geometry, {about.info['prompt']} prompt + {about.info['new']} completion tokens"
        )
        tables.append(f"{geometry}, {about.machine}; {_versions(about, 'vllm', 'torch')}; medians (quartiles).")
    return "\n\n".join(tables)


def attack_table(runs: list[Measurement]) -> str:
    """Build the table of each process's memory under attack, and the attack's outcomes."""
    return "\n\n".join(_attack(run) for run in runs if run.info.get("side") == "attack")


def _attack(run: Measurement) -> str:
    i = run.info
    rows = [
        (name, f"{p['before']['rss_mb']:.1f}", f"{p['after']['rss_mb']:.1f}",
         *(f"{p['growth_mb'][part]:.3f} ± {p['growth_error_mb'][part]:.3f}" for part in ("rss_all", "rss_second_half")),
         *(f"{p['before'][kind]} / {p['after'][kind]}" for kind in ("descriptors", "threads")))
        for name, p in i["processes"].items()
    ]  # fmt: skip
    head = ("process", "memory before, MB", "after", "growth, MB per 1,000 requests", "in the second half")
    table = _table((*head, "descriptors before / after", "threads"), rows)
    outcomes = ", ".join(f"{n:,} {OUTCOME_LABELS.get(name, name)}" for name, n in sorted(i["outcomes"].items()))
    health = "{median_ms:.0f} ms (median), {p99_ms:.0f} ms (99 %), {worst_ms:.0f} ms (worst)".format(**i["health"])
    return (
        f"{table}\n\nGrowth: least squares over samples under load, ± standard error. {i['requests']:,} requests from "
        f"{i['clients']} clients in {run.seconds / 60:.1f} minutes, with {i['slow_sockets']} slow sockets open: "
        f"{outcomes}. Wrong responses: {len(i['faults'])}. `/health`: {health}, {i['health']['asked']:,} times. "
        f"Afterwards {i['known']} known completions were exact, and the server held no resource of any request.\n\n"
        f"Server, clients and `/health` share {i['cores']} cores; {run.machine}; {_versions(run, 'vllm', 'torch')}."
    )


def zeroing_table(runs: list[Measurement]) -> str:
    """Build the table of the cost of zeroing KV blocks against the same engine without it."""
    sizes: dict[str, list[Measurement]] = {}
    for run in runs:
        if run.info.get("side") == "zeroing":
            sizes.setdefault(run.info["size"], []).append(run)
    rows = []
    for size, (text_run, first_run) in sizes.items():
        speed = text_run.info["batch"] * text_run.info["new"] / text_run.seconds
        ratios = (
            "{ratio:.1%} ({q1:.1%} .. {q3:.1%})".format(**run.info["no zeroing"]).replace("%", " %")
            for run in (text_run, first_run)
        )
        shares = (f"{run.info['zeroing_share']:.2%}".replace("%", " %") for run in (text_run, first_run))
        rows.append(
            (size, f"{speed:.0f}", next(ratios), next(shares), f"{first_run.seconds:.2f}", next(ratios), next(shares))
        )
    if not rows:
        return ""
    time_share = "time spent zeroing"
    head = (
        "geometry",
        "tokens/s",
        "speed vs no zeroing",
        time_share,
        "time to first tokens, s",
        "speed of first tokens vs no zeroing",
        f"{time_share} until then",
    )
    i = text_run.info
    return (
        f"{_table(head, rows)}\n\n{i['batch']} requests of {i['prompt']} prompt + {i['new']} completion tokens, "
        f"{text_run.machine}; {_versions(text_run, 'vllm', 'torch')}; medians (quartiles)."
    )


def contrast_table(runs: list[Measurement]) -> str:
    """Build the table of a contrast's memory by number of positions.

    The geometry is the one with the longest contrast.
    """
    sizes: dict[str, list[dict]] = {}
    for run in runs:
        if run.info.get("side") == "contrast":
            sizes.setdefault(run.info["size"], []).append(run.info)
    longest = max(sizes.values(), key=lambda infos: infos[-1]["positions"], default=[])
    rows = [
        (i["positions"], f"{i['positions_per_s']:.0f}", _mib(i["grown_bytes"]), _mib(i["stored_bytes"]))
        for i in longest
    ]
    return _table(("positions", "positions/s", "memory grew by", "storing all activations would take"), rows)


def _read_curve(folder: Path) -> list[dict]:
    """Return the cost rows of the demo's curve."""
    rows = json.loads((folder / "curve.json").read_text())["rows"]
    return [row for row in rows if (row["judge"], row["set"]) == (rows[0]["judge"], rows[0]["set"])]


def demo_table(folder: Path = RESULTS / "demo") -> str:
    """Build the table of the demo's sweep."""
    rows, cells = _read_curve(folder), []
    for row in rows:
        if row["ranking"] is None:
            cells.append((row["recipient"], "unpatched", f"{row['mean']:.2f}", "", "", "", ""))
        elif row["control"] is None and 0.03 < row["neuron_fraction"] < 0.2:
            effect = f"{row['effect']:.0%} ({row['effect_low']:.0%} .. {row['effect_high']:.0%})"
            neurons = f"{row['rank_hi']} ({row['neuron_fraction']:.1%})"
            controls = [f"{_control_effect(rows, row, kind):.0%}" for kind in ("per_layer", "magnitude")]
            cells.append((row["recipient"], neurons, f"{row['mean']:.2f}", effect, *controls, f"{row['broken']:.0%}"))
    head = ("recipient", "k (fraction of neurons)", "mean cost", "effect (95 % interval)", "random", "most active",
            "broken texts")  # fmt: skip
    return _table(head, cells)


def curve_sentence(folder: Path = RESULTS / "demo", k: int = 256) -> str:
    """Build the sentence under the README's plot: the effect of the top k neurons and of their controls."""
    rows = _read_curve(folder)
    (patched,) = (r for r in rows if (r["recipient"], r["rank_hi"], r["control"]) == ("sft", k, None))
    random, largest = (_control_effect(rows, patched, kind) for kind in ("per_layer", "magnitude"))
    return (
        f"Patching {k} neurons ({patched['neuron_fraction']:.0%}) into the SFT model moves its mean cost "
        f"{patched['effect']:.0%} of the way to DPO's. {k} random neurons of the same layers: {random:.0%}; the {k} "
        f"most active ones, which need no DPO model to be found: {largest:.0%}. {patched['broken']:.0%} of the patched "
        f"texts are broken, and {patched['harmless_refused']:.0%} of the look-alike harmless requests are refused."
    )


def _control_effect(rows: list[dict], row: dict, kind: str) -> float:
    """Return the mean effect of a row's controls of a kind."""
    key = ("recipient", "rank_lo", "rank_hi")
    effects = [r["effect"] for r in rows if r["control"] == kind and all(r[name] == row[name] for name in key)]
    return round(sum(effects) / len(effects), 2) + 0.0  # + 0.0: no "-0%"


def experiments_table(folder: Path = RESULTS / "demo") -> str:
    """Build the table of each experiment's headline on the demo model and its seconds."""
    experiments = json.loads((folder / "report.json").read_text())
    seconds = {name: result["provenance"]["seconds"] for name, result in experiments.items()}
    rows = [(name, next(iter(result["headline"]), ""), f"{seconds[name]:.0f}") for name, result in experiments.items()]
    about = next(iter(experiments.values()))["provenance"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("vllm", "torch"))
    cpu = f"{about['device']['cpu threads']} CPU threads, {about['device']['cpu capability']}"
    table = _table(("experiment", "result on the demo model", "seconds"), rows)
    return f"{table}\n\n{sum(seconds.values()) / 60:.1f} minutes in total ({cpu}, {versions})."


def reproduce_table(path: Path = RESULTS / "reproduce" / "demo.json") -> str:
    """Build the table of the demo's reproduction, and its time.

    The paper's numbers are of other models, and are not put next to the demo's.
    """
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    prefixes = ("effect (Eq. 4)", "share of", "overlap", "Spearman", "mean accuracy", "change of")
    rows = [
        (row["what"], f"{row['model']} {row['set']}".strip(), _number(row["measured"]))
        for row in record["comparison"]
        if row["what"].startswith(prefixes) and row["measured"] is not None
    ]
    head = ("", "of", "measured, demo model")
    seconds = record["seconds"]
    trained = sum(s for name, s in seconds.items() if name in record["trainings"])
    total_s = max(seconds.values())
    return (
        f"{_table(head, rows)}\n\n{total_s / 60:.1f} minutes in total, {trained / 60:.1f} of them for "
        f"{len(record['trainings'])} trainings ({record['machine']}; "
        f"vllm {record['versions']['vllm']}, torch {record['versions']['torch']}, trl {record['versions']['trl']})."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _table(head: tuple[str, ...], rows: list[tuple]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("|" + "|".join(_cell(cell) for cell in line) + "|" for line in lines) if rows else ""


def _cell(cell: object) -> str:
    return cell if cell == "---" else f" {cell} " if cell != "" else " "


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _versions(run: Measurement, *packages: str) -> str:
    return ", ".join(f"{name} {run.versions[name]}" for name in packages if name in run.versions)


def tables(folder: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """Return marker name in a page -> function that builds its table."""
    runs = list(load_runs(folder))
    cpu, gpu = [run for run in runs if not run.is_gpu], [run for run in runs if run.is_gpu]
    return {
        "speed": lambda: speed_table(cpu),
        "generate": lambda: generate_table(cpu),
        "generate on a GPU": lambda: generate_table(gpu),
        "sweeps": lambda: sweeps_table(cpu),
        "serve": lambda: serve_table(cpu),
        "attack": lambda: attack_table(cpu),
        "zeroing": lambda: zeroing_table(cpu),
        "contrast": lambda: contrast_table(cpu),
        "op": lambda: op_table(cpu),
        "op on a GPU": lambda: op_table(gpu),
        "curve": lambda: curve_sentence(folder / "demo"),
        "demo": lambda: demo_table(folder / "demo"),
        "experiments": lambda: experiments_table(folder / "demo"),
        "reproduce": lambda: reproduce_table(folder / "reproduce" / "demo.json"),
        "packages": package_table.build_table,
    }


def pages() -> list[Path]:
    """Return the pages that may have tables: README, CONTRIBUTING and the guides of the packages."""
    guides = [*(ROOT / "bench").glob("README.md"), *sorted((ROOT / "snpatch").rglob("README.md"))]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *guides]


def fill_pages(folder: Path = RESULTS) -> dict[Path, str]:
    """Return page -> its text with every table between its markers generated again.

    The command line reference is one of the pages.

    Raises:
        SystemExit: A table's marker is missing, or is there more than once over all pages.
    """
    texts = {page: page.read_text() for page in pages()}
    for name, build in tables(folder).items():
        table = "".join(f"{part}\n" for part in [build()] if part)
        pattern = rf"(<!-- table: {name} -->\n)(?:(?!<!--).)*?(<!-- end -->)"
        total = 0
        for page, text in texts.items():
            texts[page], count = re.subn(pattern, lambda m, table=table: f"{m[1]}{table}{m[2]}", text, flags=re.DOTALL)
            total += count
        if total != 1:
            raise SystemExit(f"README and guides: expected one marker for the table {name}, got {total}")
    return {**texts, REFERENCE: build_reference()}


def build_reference() -> str:
    """Return the page of all commands and options, made from their help."""
    command = typer.main.get_command(cli.app)
    arrange(command)
    context = typer.Context(command, info_name="snpatch")
    page = get_docs_for_click(obj=command, ctx=context, name="snpatch", title="Command line reference")
    return f"{page.strip()}\n"


if __name__ == "__main__":
    for page, text in fill_pages().items():
        page.write_text(text)
