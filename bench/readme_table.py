"""The README's tables from the records in bench/results/: `python bench/readme_table.py` rewrites them in place."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SIDES = ("snpatch", "plain silu*up", "inductor", "eager")


def op_table(record: Path = RESULTS / "patched_glu.cpu.json") -> str:
    """Microseconds of each side of bench_patched_glu.py, and how many times the op's time the others take."""
    data = json.loads(record.read_text())
    cases: dict[tuple, dict[str, dict]] = {}
    for run in data["benchmarks"]:
        info = run["extra_info"]
        cases.setdefault((info["tokens"], info["neurons"], info["dtype"]), {})[info["side"]] = run
    machine = data["machine_info"]
    lines = [
        "| tokens x neurons, type | " + " | ".join(SIDES) + " | op's GB/s |",
        "|---|" + "---|" * (len(SIDES) + 1),
    ]
    for (tokens, neurons, dtype), runs in cases.items():
        own = runs["snpatch"]["stats"]["median"]
        cells = [f"{own * 1e6:.0f} us"]
        cells += [
            f"{runs[s]['stats']['median'] * 1e6:.0f} us ({runs[s]['stats']['median'] / own:.2f}x)" for s in SIDES[1:]
        ]
        speed = runs["snpatch"]["extra_info"]["bytes"] / own / 1e9
        lines.append(f"| {tokens} x {neurons}, {dtype} | " + " | ".join(cells) + f" | {speed:.0f} |")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines.append(f"\n{machine['device']}, {machine['threads']} thread, {machine['capability']}; {versions}; median.")
    return "\n".join(lines)


def demo_table(folder: Path = RESULTS / "demo") -> str:
    """The sentences and the points of the demo's own sweep."""
    rows = json.loads((folder / "curve.json").read_text())["rows"]
    lines = ["| recipient | k (share of neurons) | mean cost | effect (95 % interval) |", "|---|---|---|---|"]
    for row in rows:
        if row["ranking"] is None:
            lines.append(f"| {row['recipient']} | unpatched | {row['mean']:.2f} | |")
        elif row["control_seed"] is None and 0.03 < row["share"] < 0.2:
            interval = f"{row['effect']:.0%} ({row['effect_low']:.0%} .. {row['effect_high']:.0%})"
            lines.append(f"| {row['recipient']} | {row['hi']} ({row['share']:.1%}) | {row['mean']:.2f} | {interval} |")
    return "\n".join(lines)


def experiments_table(folder: Path = RESULTS / "demo") -> str:
    """What each experiment found in the demo world, and its seconds."""
    found = json.loads((folder / "report.json").read_text())
    lines = ["| experiment | found in the demo world | seconds |", "|---|---|---|"]
    for name, told in found.items():
        sentence = told["headline"][0] if told["headline"] else ""
        lines.append(f"| {name} | {sentence} | {told['provenance']['seconds']:.0f} |")
    machine = next(iter(found.values()))["provenance"]
    minutes = sum(told["provenance"]["seconds"] for told in found.values()) / 60
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in ("vllm", "torch"))
    cpu = f"{machine['device']['cpu threads']} CPU threads, {machine['device']['cpu capability']}"
    lines.append(f"\n{minutes:.1f} minutes in all ({cpu}, {versions}).")
    return "\n".join(lines)


def generate_table(record: Path = RESULTS / "generate.cpu.json") -> str:
    """Ratios of bench_generate.py: how many times the rows or tokens a second of each other side."""
    data = json.loads(record.read_text())
    runs = {run["name"]: run for run in data["benchmarks"]}
    size = next(run["extra_info"]["size"] for run in runs.values() if "size" in run["extra_info"])

    def ratio(name: str, other: str) -> str:
        found = runs[name]["extra_info"][other]
        return f"{found['ratio']:.2f}x ({found['q1']:.2f} .. {found['q3']:.2f})"

    batches = [run["extra_info"]["batch"] for name, run in runs.items() if name.startswith("test_twin_against")]
    lines = [
        "| patched, 5 % of the neurons | tokens/s | against native vLLM on as many rows | on as many requests |",
        "|---|---|---|---|",
    ]
    for batch in batches:
        run = runs[f"test_twin_against_native[{batch}]"]
        speed = batch * run["extra_info"]["new"] / run["stats"]["median"]
        cells = [ratio(run["name"], other) for other in ("native 2B", "native B")]
        lines.append(f"| batch of {batch} | {speed:.0f} | {cells[0]} | {cells[1]} |")
    lines += ["", "| | ratio of speeds (quartiles) |", "|---|---|"]
    more = {
        "two transformers models with hooks, batch of 4": ("test_against_hooks[B4]", "hooks"),
        "the same, batch of 32, texts of 8 to 128 tokens": ("test_against_hooks[B32-ragged]", "hooks"),
        "the same, batch of 32, texts of one length": ("test_against_hooks[B32-static]", "hooks"),
        "32 different windows in a batch, against one": ("test_windows", "one window"),
        "statistics of every position, against none": ("test_statistics", "without"),
    }
    for label, (name, other) in more.items():
        lines.append(f"| {label} | {ratio(name, other)} |")
    for batch in batches[-2:]:
        label = f"plain requests on a twin engine, batch of {batch}, against native vLLM on as many rows"
        lines.append(f"| {label} | {ratio(f'test_plain_requests_on_a_twin_engine[{batch}]', 'native 2B')} |")
    machine = data["machine_info"]
    lines.append(f"\n{size} geometry, bfloat16, {machine['device']}, {machine['threads']} threads; "
                 f"vLLM {machine['versions']['vllm']}, torch {machine['versions']['torch']}; medians.")  # fmt: skip
    return "\n".join(lines)


def contrast_table(record: Path = RESULTS / "contrast.cpu.json") -> str:
    """Memory of a contrast against the number of positions."""
    data = json.loads(record.read_text())
    lines = ["| positions | positions/s | memory grew by | activations kept would take |", "|---|---|---|---|"]
    for run in data["benchmarks"]:
        info = run["extra_info"]
        grown, stored = info["grown_bytes"] / 2**20, info["stored_bytes"] / 2**20
        lines.append(f"| {info['positions']} | {info['positions_per_s']:.0f} | {grown:.0f} MiB | {stored:.0f} MiB |")
    return "\n".join(lines)


TABLES = {
    "generate": generate_table,
    "contrast": contrast_table,
    "op": op_table,
    "demo": demo_table,
    "experiments": experiments_table,
}


def filled(text: str) -> str:
    """README text with every table between its markers made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n)(?:(?!<!--).)*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"the README must have one place for the table {name}, has {found}")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
