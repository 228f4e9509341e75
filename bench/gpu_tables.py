"""The tables that gpu_check.py prints last, out of its records."""

from collections.abc import Iterable


def summary(records: list[dict]) -> str:
    """One line a part: what came of it."""
    rows = []
    for record in records:
        for name, part in record["parts"].items():
            said = part.get("reason") or ", ".join(f"{n} {kind}" for kind, n in part.get("counts", {}).items())
            seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
            rows.append((record["step"], name, part["status"], seconds, said))
    tails = [
        f"\n{record['step']}: {name}, its last lines:\n  " + "\n  ".join(part["tail"])
        for record in records
        for name, part in record["parts"].items()
        if "tail" in part
    ]
    rehearsal = " (a rehearsal at tiny size: no number means anything)" if any(r["rehearsal"] for r in records) else ""
    return "".join(tails) + f"\n\nsteps{rehearsal}\n" + table(("step", "part", "status", "s", ""), rows)


def measurements(records: list[dict]) -> str:
    """Tables of what was measured: kernel, native, ratios, contrast, profile."""
    found = {kind: [] for kind in ("kernel", "native", "ratios", "contrast", "profile")}
    predicted = next((r["parts"]["predicted"].get("found") for r in records if "predicted" in r["parts"]), None)
    for record in records:
        for part in record["parts"].values():
            benchmarks = part.get("benchmarks", ())
            if benchmarks and "bytes" in benchmarks[0]["extra_info"]:
                found["kernel"] += kernel(benchmarks, predicted)
                continue
            for benchmark in benchmarks:
                kind, row = _row(benchmark)
                if row not in found[kind]:  # a rehearsal shares its child
                    found[kind].append(row)
    for record in records:
        if told := record["parts"].get("ceilings", {}).get("found"):
            found["kernel"].append(("", "", "large copy", "", f"{told['copy_gb_per_s']:.0f}", "", "", "", "", ""))
    heads = {
        "kernel": (
            "T",
            "F",
            "side",
            "us",
            "GB/s",
            "% of copy",
            "silu_and_mul us",
            "floor us",
            "expected us",
            "programs",
        ),
        "native": ("runner", "batch", "new", "tokens/s", "ms a token"),
        "ratios": ("runner", "what", "batch", "ms", "against", "ratio", "quartiles"),
        "contrast": ("runner", "positions", "positions/s", "grew MiB"),
        "profile": ("runner", "side", "batch", "us a step", "busy us", "time by kind, us"),
    }
    texts = [f"\n{kind}\n{table(heads[kind], rows)}" for kind, rows in found.items() if rows]
    return "\n".join(texts) + tops(records)


def kernel(benchmarks: Iterable[dict], predicted: dict | None) -> list[tuple]:
    """A row for each case and side; the device's copy of as many bytes is the ceiling."""
    expected = {(case["tokens"], case["neurons"]): case for case in (predicted or {}).get("cases", ())}
    sides: dict[tuple, dict[str, tuple[float, float]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        own = benchmark["stats"]["median"] / info.get("calls", 1) * 1e6
        sides.setdefault((info["tokens"], info["neurons"]), {})[info["side"]] = own, info["bytes"] / own / 1e3
    rows = []
    for case, of in sides.items():
        copied = of.get("copy", (0, 0))[1]
        native = f"{of['vllm silu_and_mul'][0]:.1f}" if "vllm silu_and_mul" in of else ""
        hoped = expected.get(case)
        for side, (time, speed) in of.items():
            share = f"{100 * speed / copied:.0f}" if copied else ""
            mine = side.startswith("snpatch") and hoped
            told = (f"{hoped['floor_us']:.1f}", f"{hoped['expected_us']:.1f}", hoped["programs"]) if mine else ("",) * 3
            rows.append((*case, side, f"{time:.1f}", f"{speed:.0f}", share, native if mine else "", *told))
    return rows


def _row(benchmark: dict) -> tuple[str, tuple]:
    """(kind of table, its row) of a record of bench_generate.py."""
    info, median = benchmark["extra_info"], benchmark["stats"]["median"]
    runner = info["runner"]
    if info["side"] == "native":
        token = f"{1e3 * median / info['new']:.2f}"
        return "native", (runner, info["batch"], info["new"], f"{info['tokens_per_s']:.0f}", token)
    if info["side"] == "contrast":
        grown = f"{info['grown_bytes'] / 2**20:.0f}"
        return "contrast", (runner, info["positions"], f"{info['positions_per_s']:.0f}", grown)
    if info["side"].startswith("profile"):
        kinds = ", ".join(f"{group} {time:.0f}" for group, time in info["groups_us"].items())
        times = (f"{info['step_us']:.0f}", f"{info['busy_us']:.0f}")
        side = info["side"].removeprefix("profile of ")
        return "profile", (runner, side, info["batch"], *times, kinds or info["no_kernels"])
    others = {name: told for name, told in info.items() if isinstance(told, dict) and "ratio" in told}
    against = " / ".join(others)
    ratios = " / ".join(f"{told['ratio']:.3f}" for told in others.values())
    spread = " / ".join(f"{told['q1']:.3f}..{told['q3']:.3f}" for told in others.values())
    what = f"{info['side']}, {info['lengths']}" if "lengths" in info else info["side"]
    return "ratios", (runner, what, info["batch"], f"{1e3 * median:.1f}", against, ratios, spread)


def tops(records: list[dict]) -> str:
    """The longest kernels of each profiled side."""
    text, done = "", set()
    for record in records:
        for part in record["parts"].values():
            for info in (b["extra_info"] for b in part.get("benchmarks", ()) if "top" in b["extra_info"]):
                title = f"{info['side']}, {info['runner']}, batch {info['batch']}"
                if title not in done:
                    done.add(title)
                    rows = [(f"{k['us']:.0f}", f"{k['calls']:.1f}", k["name"][:80]) for k in info["top"][:8]]
                    text += f"\n\n{title}\n" + table(("us a step", "calls", "kernel"), rows)
    return text


def table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Columns as wide as what is in them."""
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
