"""The README's tables from the records in bench/results/: `python bench/readme_table.py` rewrites them in place.

What a measurement is, its record says itself (`extra_info`: side, size, batch, what it is compared with): a further one
shows up here without a line of code. Where no record is of a GPU, its tables stay empty.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import rooms

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WHAT = {
    "32 windows": "32 different windows in a batch",
    "one stream": "plain requests with streams=1",
    "pair": "patched between two sets of weights",
    "plain on twin": "plain requests on a dual-stream engine",
    "prefill": "reading prompts, one written token",
    "statistics": "statistics of every position",
    "sweep": "a sweep of 32 windows x 64 prompts",
    "twin": "patched",
}
AGAINST = {
    "hooks": "two transformers models with hooks",
    "native 2B": "native vLLM on as many rows",
    "native B": "native vLLM on as many requests",
    "one after the other": "one window after the other",
    "one window": "as many texts of one window",
    "two natives": "two native engines, one after the other",
    "without": "none",
}
ATTACK = {
    "ended first": "ended before their client left",
    "known": "known texts, exact",
    "left": "left in the middle",
    "malformed": "malformed and refused",
    "overflowed": "overflowed, with an error that says so",
    "whole": "whole streams with verified receipts",
}
TIMES = ("median_ttft_ms", "median_tpot_ms")


@dataclass(frozen=True)
class Run:
    """One measurement. info: its extra_info; seconds: the median; machine: where; versions: of what."""

    info: dict
    seconds: float
    machine: str
    versions: dict

    @property
    def is_gpu(self) -> bool:
        return self.info.get("device") == "cuda"

    @property
    def ratios(self) -> dict[str, str]:
        """What it was compared with -> how many times as fast it is, with quartiles."""
        compared = {name: told for name, told in self.info.items() if isinstance(told, dict) and "ratio" in told}
        return {name: f"{t['ratio']:.2f}x ({t['q1']:.2f} .. {t['q3']:.2f})" for name, t in compared.items()}


def runs(folder: Path = RESULTS) -> Iterator[Run]:
    """Every measurement of all records: pytest-benchmark's, and those of gpu_check.py in gpu/."""
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


def _runs(benchmarks: Iterable[dict], machine: str, versions: dict) -> Iterator[Run]:
    for one in benchmarks:
        info = one["extra_info"]
        yield Run(info, one["stats"]["median"] / info.get("calls", 1), machine, versions)


def op_table(found: list[Run]) -> str:
    """Microseconds of each side on the same tokens, and how many times the op's time the others take."""
    cases: dict[tuple, dict[str, Run]] = {}
    for run in found:
        if "bytes" in run.info:
            case = run.info["tokens"], run.info["neurons"], run.info["dtype"]
            cases.setdefault(case, {})[run.info["side"]] = run
    if not cases:
        return ""
    first = next(iter(cases.values()))
    others = sorted(first.keys() - {"snpatch"}, key=lambda side: first[side].seconds)
    rows = []
    for (tokens, neurons, dtype), sides in cases.items():
        own = sides["snpatch"]
        times = [f"{sides[o].seconds * 1e6:.0f} us ({sides[o].seconds / own.seconds:.2f}x)" for o in others]
        speed = own.info["bytes"] / own.seconds / 1e9
        rows.append((f"{tokens} x {neurons}, {dtype}", f"{own.seconds * 1e6:.0f} us", *times, f"{speed:.0f}"))
    table = _table(("tokens x neurons, type", "snpatch", *others, "op's GB/s"), rows)
    return f"{table}\n\n{own.machine}; {_versions(own, 'torch', 'triton')}; medians."


def generate_table(found: list[Run]) -> str:
    """Patched generation against native vLLM, and every other comparison, of each machine, size and model runner."""
    groups: dict[tuple, list[Run]] = {}
    for run in found:
        if run.ratios and "runner" in run.info:
            groups.setdefault((run.machine, run.info["size"], run.info["runner"]), []).append(run)
    return "\n\n".join(_generate_group(group) for group in groups.values())


def _generate_group(group: list[Run]) -> str:
    decoding, others = [], []
    for run in group:
        if run.info["side"] == "twin" and {"native 2B", "native B"} <= run.ratios.keys():
            speed = run.info["batch"] * run.info["new"] / run.seconds
            ratios = run.ratios["native 2B"], run.ratios["native B"]
            decoding.append((f"batch of {run.info['batch']}", f"{speed:.0f}", *ratios))
        else:
            what = WHAT.get(run.info["side"], run.info["side"])
            batch = f", batch of {run.info['batch']}" if "batch" in run.info else ""
            texts = ", texts of 8 to 128 tokens" if run.info.get("lengths") == "ragged" else ""
            for other, ratio in run.ratios.items():
                others.append((f"{what}{batch}{texts}, against {AGAINST.get(other, other)}", ratio))
    head = "patched, 5 % of the neurons", "tokens/s", "against native vLLM on as many rows", "on as many requests"
    tables = [_table(head, decoding), _table(("", "ratio of speeds (quartiles)"), others)]
    geometry = f"{run.info['size']} geometry, {run.info.get('dtype', 'bfloat16')}"
    about = f"{geometry}, {run.machine}, model runner {run.info['runner']}"
    return "\n\n".join([*filter(None, tables), f"{about}; {_versions(run, 'vllm', 'torch')}; medians."])


def sweeps_table(found: list[Run]) -> str:
    """What a sweep's store costs, and the completions that finding the smallest k takes."""
    rows = []
    for run in found:
        if "store_share" in run.info:
            i = run.info
            rows += [
                (f"{i['texts']} texts of the demo model, kept and judged", f"{i['first_s']:.0f} s"),
                ("CPU time of these in the store", f"{i['store_s']:.2f} s ({i['store_share']:.1%})"),
                ("the same command again", f"{i['again_s']:.1f} s"),
            ]
        if run.info.get("side") == "two processes":
            texts = f"{run.info['texts']} texts by two processes of one folder, start and end included"
            rows.append((texts, f"{run.seconds:.0f} s (one process: {run.info['one_s']:.0f} s)"))
        if run.info.get("side") == "minimal":
            for name, told in run.info.items():
                if isinstance(told, dict):
                    answer = (
                        f"k = {told['k']} (interval {told['low']} .. {told['high']}; whole grid: {told['whole_grid']})"
                    )
                    rows.append((f"smallest k, {name}: {answer}", f"{told['used']} of {told['full']} completions"))
    return _table(("sweeps", ""), rows)


def serve_table(found: list[Run]) -> str:
    """The server under vLLM's own serving benchmark, and what HTTP adds to the offline engine."""
    rows, tables, about = [], [], None
    sides = ("served patched", "served plain", "native server 2B")
    for run in found:
        if run.info.get("side") == "served":
            figures, about = run.info["figures"], run
            speeds = f"{figures[sides[0]]['request_throughput']:.2f}"
            ratios = run.ratios["served plain"], run.ratios["native server 2B"]
            times = (" / ".join(f"{figures[side][key]:.0f}" for side in sides) for key in TIMES)
            rows.append((run.info["batch"], speeds, *ratios, *times))
    if rows:
        head = (
            "concurrency",
            "requests/s",
            "against plain, same server",
            "against vLLM's server, twice the concurrency",
        )
        tables.append(_table((*head, "TTFT, ms: patched / plain / vLLM's, twice", "TPOT, ms"), rows))
    for run in found:
        if run.info.get("side") == "http":
            i = run.info
            tables.append(
                f"{i['requests']} whole answers of {i['new']} tokens, {i['batch']} at a time: HTTP adds "
                f"{i['added_ms']:.1f} ms a request ({i['added_q1']:.1f} .. {i['added_q3']:.1f}) to the offline "
                f"engine's {i['offline_ms']:.0f} ms."
            )
    if about is not None:
        geometry = f"{about.info['size']} geometry, texts of {about.info['prompt']} + {about.info['new']} tokens"
        tables.append(f"{geometry}, {about.machine}; {_versions(about, 'vllm', 'torch')}; medians (quartiles).")
    return "\n\n".join(tables)


def attack_table(found: list[Run]) -> str:
    """The server under attack: each process's memory, and what the attack found."""
    return "\n\n".join(_attack(run) for run in found if run.info.get("side") == "attack")


def _attack(run: Run) -> str:
    i = run.info
    rows = [
        (name, f"{one['before']['rss_mb']:.1f}", f"{one['after']['rss_mb']:.1f}", f"{one['growth_mb']['rss_all']:.3f}",
         f"{one['growth_mb']['rss_second_half']:.3f}",
         *(f"{one['before'][kind]} / {one['after'][kind]}" for kind in ("descriptors", "threads")))
        for name, one in i["processes"].items()
    ]  # fmt: skip
    head = ("process", "memory before, MB", "after", "growth, MB per 1,000 requests", "in the second half")
    table = _table((*head, "descriptors before / after", "threads"), rows)
    outcomes = ", ".join(f"{n:,} {ATTACK.get(name, name)}" for name, n in sorted(i["outcomes"].items()))
    health = "{median_ms:.0f} ms (median), {p99_ms:.0f} ms (99 %), {worst_ms:.0f} ms (worst)".format(**i["health"])
    return (
        f"{table}\n\n{i['requests']:,} requests of {i['clients']} clients in {run.seconds / 60:.1f} minutes, with "
        f"{i['slow_sockets']} slow sockets open: {outcomes}. Wrong answers: {len(i['faults'])}. `/health`: {health}, "
        f"{i['health']['asked']:,} times. Afterwards {i['known']} known texts were exact, and the server held nothing "
        f"of any request.\n\nServer, clients and `/health` share {i['cores']} cores; {run.machine}; "
        f"{_versions(run, 'vllm', 'torch')}."
    )


def zeroing_table(found: list[Run]) -> str:
    """The cost of zeroing KV blocks against the same engine without it."""
    sizes: dict[str, list[Run]] = {}
    for run in found:
        if run.info.get("side") == "zeroing":
            sizes.setdefault(run.info["size"], []).append(run)
    rows = []
    for size, (whole, first) in sizes.items():
        speed = whole.info["batch"] * whole.info["new"] / whole.seconds
        ratios = (
            "{ratio:.1%} ({q1:.1%} .. {q3:.1%})".format(**one.info["no zeroing"]).replace("%", " %")
            for one in (whole, first)
        )
        shares = (f"{one.info['zeroing_share']:.2%}".replace("%", " %") for one in (whole, first))
        rows.append(
            (size, f"{speed:.0f}", next(ratios), next(shares), f"{first.seconds:.2f}", next(ratios), next(shares))
        )
    if not rows:
        return ""
    of_time = "time spent zeroing"
    head = (
        "geometry",
        "tokens/s",
        "speed against no zeroing",
        of_time,
        "first tokens, s",
        "against no zeroing",
        of_time,
    )
    i = whole.info
    return (
        f"{_table(head, rows)}\n\n{i['batch']} texts of {i['prompt']} + {i['new']} tokens, {whole.machine}; "
        f"{_versions(whole, 'vllm', 'torch')}; medians (quartiles)."
    )


def contrast_table(found: list[Run]) -> str:
    """Memory of a contrast against the number of positions, of the geometry that was read the longest."""
    sizes: dict[str, list[dict]] = {}
    for run in found:
        if run.info.get("side") == "contrast":
            sizes.setdefault(run.info["size"], []).append(run.info)
    longest = max(sizes.values(), key=lambda infos: infos[-1]["positions"], default=[])
    rows = [
        (i["positions"], f"{i['positions_per_s']:.0f}", _mib(i["grown_bytes"]), _mib(i["stored_bytes"]))
        for i in longest
    ]
    return _table(("positions", "positions/s", "memory grew by", "activations kept would take"), rows)


def demo_table(folder: Path = RESULTS / "demo") -> str:
    """The sentences and the points of the demo's own sweep."""
    rows = []
    for row in json.loads((folder / "curve.json").read_text())["rows"]:
        if row["ranking"] is None:
            rows.append((row["recipient"], "unpatched", f"{row['mean']:.2f}", ""))
        elif row["control_seed"] is None and 0.03 < row["neuron_fraction"] < 0.2:
            effect = f"{row['effect']:.0%} ({row['effect_low']:.0%} .. {row['effect_high']:.0%})"
            rows.append(
                (row["recipient"], f"{row['rank_hi']} ({row['neuron_fraction']:.1%})", f"{row['mean']:.2f}", effect)
            )
    return _table(("recipient", "k (share of neurons)", "mean cost", "effect (95 % interval)"), rows)


def experiments_table(folder: Path = RESULTS / "demo") -> str:
    """What each experiment found in the demo model, and its seconds."""
    found = json.loads((folder / "report.json").read_text())
    seconds = {name: told["provenance"]["seconds"] for name, told in found.items()}
    rows = [(name, next(iter(told["headline"]), ""), f"{seconds[name]:.0f}") for name, told in found.items()]
    about = next(iter(found.values()))["provenance"]
    versions = ", ".join(f"{name} {about['versions'][name]}" for name in ("vllm", "torch"))
    cpu = f"{about['device']['cpu threads']} CPU threads, {about['device']['cpu capability']}"
    table = _table(("experiment", "found in the demo model", "seconds"), rows)
    return f"{table}\n\n{sum(seconds.values()) / 60:.1f} minutes in all ({cpu}, {versions})."


def reproduce_table(path: Path = RESULTS / "reproduce" / "demo.json") -> str:
    """What the demo's reproduction found beside the paper's numbers of Llama2-7B, and what it took."""
    if not path.exists():
        return ""
    record = json.loads(path.read_text())
    wanted = ("effect (Eq. 4)", "share of", "overlap", "Spearman", "mean accuracy", "change of")
    rows = [
        (row["what"], f"{row['model']} {row['set']}".strip(), f"{row['bound']} {_number(row['published'])}".strip(),
         _number(row["measured"]))
        for row in record["beside"]
        if row["what"].startswith(wanted) and row["bound"] != "at most"
    ]  # fmt: skip
    head = ("", "of", "published, Llama2-7B", "measured, demo model")
    seconds = record["seconds"]
    trained = sum(s for name, s in seconds.items() if name in record["trainings"])
    whole = max(seconds.values())
    return (
        f"{_table(head, rows)}\n\n{whole / 60:.1f} minutes in all, {trained / 60:.1f} of them for "
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


def _versions(run: Run, *packages: str) -> str:
    return ", ".join(f"{name} {run.versions[name]}" for name in packages if name in run.versions)


def tables(folder: Path = RESULTS) -> dict[str, Callable[[], str]]:
    """Name of a place in the README -> what makes its table."""
    found = list(runs(folder))
    cpu, gpu = [run for run in found if not run.is_gpu], [run for run in found if run.is_gpu]
    return {
        "generate": lambda: generate_table(cpu),
        "generate on a GPU": lambda: generate_table(gpu),
        "sweeps": lambda: sweeps_table(cpu),
        "serve": lambda: serve_table(cpu),
        "attack": lambda: attack_table(cpu),
        "zeroing": lambda: zeroing_table(cpu),
        "contrast": lambda: contrast_table(cpu),
        "op": lambda: op_table(cpu),
        "op on a GPU": lambda: op_table(gpu),
        "demo": lambda: demo_table(folder / "demo"),
        "experiments": lambda: experiments_table(folder / "demo"),
        "reproduce": lambda: reproduce_table(folder / "reproduce" / "demo.json"),
        "rooms": rooms.plan,
    }


def filled(text: str, folder: Path = RESULTS) -> str:
    """README text with every table between its markers made anew."""
    for name, make in tables(folder).items():
        table = "".join(f"{part}\n" for part in [make()] if part)
        pattern = rf"(<!-- table: {name} -->\n)(?:(?!<!--).)*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, table=table: f"{m[1]}{table}{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"the README must have one place for the table {name}, has {found}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
