"""The tables that gpu_check.py prints at its end, built from its records."""

from collections.abc import Iterable


def summary(records: list[dict]) -> str:
    """Return one line per part: status, seconds, counts or reason."""
    rows = []
    for record in records:
        for name, part in record["parts"].items():
            detail = part.get("reason") or ", ".join(f"{n} {kind}" for kind, n in part.get("counts", {}).items())
            seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
            rows.append((record["step"], name, part["status"], seconds, detail))
    tails = [
        f"\n{record['step']}: {name}, last lines:\n  " + "\n  ".join(part["tail"])
        for record in records
        for name, part in record["parts"].items()
        if "tail" in part
    ]
    rehearsal = (
        " (a rehearsal at tiny size: the numbers are meaningless)" if any(r["rehearsal"] for r in records) else ""
    )
    return "".join(tails) + f"\n\nsteps{rehearsal}\n" + table(("step", "part", "status", "s", ""), rows)


def measurements(records: list[dict]) -> str:
    """Return the tables of all measurements: kernel, native, ratios, contrast, profile."""
    rows_by_kind = {kind: [] for kind in ("kernel", "native", "ratios", "contrast", "profile")}
    predicted = next((r["parts"]["predicted"].get("found") for r in records if "predicted" in r["parts"]), None)
    for record in records:
        for part in record["parts"].values():
            benchmarks = part.get("benchmarks", ())
            if benchmarks and "bytes" in benchmarks[0]["extra_info"]:
                rows_by_kind["kernel"] += kernel(benchmarks, predicted)
                continue
            for benchmark in benchmarks:
                kind, row = _row(benchmark)
                if row not in rows_by_kind[kind]:  # parts of a rehearsal share a child
                    rows_by_kind[kind].append(row)
    for record in records:
        if ceilings := record["parts"].get("ceilings", {}).get("found"):
            rows_by_kind["kernel"].append(
                ("", "", "large copy", "", f"{ceilings['copy_gb_per_s']:.0f}", "", "", "", "", "")
            )
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
        "native": ("runner", "batch", "new", "tokens/s", "ms per token"),
        "ratios": ("runner", "side", "batch", "ms", "baseline", "ratio", "quartiles"),
        "contrast": ("runner", "positions", "positions/s", "growth, MiB"),
        "profile": ("runner", "side", "batch", "us per step", "busy us", "time by kind, us"),
    }
    texts = [f"\n{kind}\n{table(heads[kind], rows)}" for kind, rows in rows_by_kind.items() if rows]
    return "\n".join(texts) + tops(records)


def kernel(benchmarks: Iterable[dict], predicted: dict | None) -> list[tuple]:
    """Return a row per case and side; the device's copy of the same bytes is the ceiling."""
    expected = {(case["tokens"], case["neurons"]): case for case in (predicted or {}).get("cases", ())}
    sides: dict[tuple, dict[str, tuple[float, float]]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        call_us = benchmark["stats"]["median"] / info.get("calls", 1) * 1e6
        sides.setdefault((info["tokens"], info["neurons"]), {})[info["side"]] = call_us, info["bytes"] / call_us / 1e3
    rows = []
    for case, measured in sides.items():
        copy_speed = measured.get("copy", (0, 0))[1]
        native = f"{measured['vllm silu_and_mul'][0]:.1f}" if "vllm silu_and_mul" in measured else ""
        prediction = expected.get(case)
        for side, (time, speed) in measured.items():
            share = f"{100 * speed / copy_speed:.0f}" if copy_speed else ""
            cells = ("",) * 4
            if side.startswith("snpatch") and prediction:
                times = f"{prediction['floor_us']:.1f}", f"{prediction['expected_us']:.1f}"
                cells = native, *times, prediction["programs"]
            rows.append((*case, side, f"{time:.1f}", f"{speed:.0f}", share, *cells))
    return rows


def _row(benchmark: dict) -> tuple[str, tuple]:
    """Return a table's kind and the row for a record of bench_generate.py."""
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
    baselines = {name: data for name, data in info.items() if isinstance(data, dict) and "ratio" in data}
    against = " / ".join(baselines)
    ratios = " / ".join(f"{data['ratio']:.3f}" for data in baselines.values())
    spread = " / ".join(f"{data['q1']:.3f}..{data['q3']:.3f}" for data in baselines.values())
    side = f"{info['side']}, {info['lengths']}" if "lengths" in info else info["side"]
    return "ratios", (runner, side, info["batch"], f"{1e3 * median:.1f}", against, ratios, spread)


def tops(records: list[dict]) -> str:
    """Return the longest kernels of each profiled side."""
    text, titles = "", set()
    for record in records:
        for part in record["parts"].values():
            for info in (b["extra_info"] for b in part.get("benchmarks", ()) if "top" in b["extra_info"]):
                title = f"{info['side']}, {info['runner']}, batch {info['batch']}"
                if title not in titles:
                    titles.add(title)
                    rows = [(f"{k['us']:.0f}", f"{k['calls']:.1f}", k["name"][:80]) for k in info["top"][:8]]
                    text += f"\n\n{title}\n" + table(("us per step", "calls", "kernel"), rows)
    return text


def table(head: tuple[str, ...], rows: Iterable[tuple]) -> str:
    """Return aligned columns."""
    lines = [tuple(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
