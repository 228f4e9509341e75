"""Plot a curve from a running server: mean score against k, printed point by point.

    python curve.py prompts.jsonl --recipient sft --donor dpo --ranking safety -k 0,200,1000 -o curve
    snpatch report curve        # the same data as an HTML page

Each line of prompts.jsonl has `prompt` (a string, sent as a user message) or `messages`.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import matplotlib
import matplotlib.pyplot as plt


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--api-key", default="none")
    for name in ("recipient", "donor", "ranking"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("-k", "--windows", default="0,100,200,500,1000")
    parser.add_argument("--judge", default="refusal", help="name of a judge; GET /v1/snpatch lists the server's")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("-o", "--out", type=Path, default=Path("curve"))
    return parser.parse_args()


def read_chats(path: Path) -> list[list[dict]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [row.get("messages") or [{"role": "user", "content": row["prompt"]}] for row in rows]


def parse_events(lines: Iterator[str]) -> Iterator[tuple[str, dict]]:
    """Yield server-sent events as (name, data)."""
    name = ""
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


def plot(rows: list[dict], floor: dict, path: Path) -> None:
    unpatched = [row for row in rows if row["ranking"] is None]
    patched = sorted((row for row in rows if row["ranking"] and "floor" not in row), key=lambda row: row["rank_hi"])
    figure, axes = plt.subplots(layout="constrained")
    k, mean = [row["rank_hi"] - row["rank_lo"] for row in patched], [row["mean"] for row in patched]
    axes.plot(k, mean, marker="o")
    low, high = ([row[name] for row in patched] for name in ("mean_low", "mean_high"))
    axes.fill_between(k, low, high, alpha=0.2)
    for row in unpatched:
        axes.axhline(row["mean"], linestyle="--", linewidth=1, color="gray")
        axes.annotate(row["recipient"], (0, row["mean"]))
    noise = ", ".join(f"{name}: {point.get('changed', 0):.0%} of completions differ" for name, point in floor.items())
    axes.set(xlabel="k, patched neurons", ylabel=f"mean {rows[0]['judge']}", title=f"noise floor: {noise}")
    figure.savefig(path)


def main() -> None:
    matplotlib.use("Agg")
    options = parse_options()
    body = {name: getattr(options, name) for name in ("recipient", "donor", "ranking", "judge", "max_tokens")}
    body |= {"windows": [int(k) for k in options.windows.split(",")], "prompts": read_chats(options.prompts)}
    rows, floor, headers = [], {}, {"authorization": f"Bearer {options.api_key}"}
    with httpx.stream("POST", f"{options.url}/v1/snpatch/sweep", json=body, headers=headers, timeout=None) as answer:
        if answer.status_code != 200:
            raise SystemExit(answer.read().decode())
        for name, data in parse_events(answer.iter_lines()):
            if name == "row":
                rows.append(data)
                point = (
                    "unpatched"
                    if data["ranking"] is None
                    else f"{data['donor']} [{data['rank_lo']}, {data['rank_hi']})"
                )
                print(f"{data['recipient']}, {point}: {data['mean']:.3f}, {data['changed']:.0%} changed", flush=True)
            elif name == "error":
                raise SystemExit(data["message"])
            elif name == "summary":
                floor = data["floor"]
                print(data)
    options.out.mkdir(parents=True, exist_ok=True)
    plot(rows, floor, options.out / "sweep.png")
    curve = [row for row in rows if "floor" not in row]
    table = {"provenance": {**body, "prompts": len(body["prompts"])}, "headline": [], "rows": curve}
    (options.out / "sweep.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    print(f"wrote {options.out / 'sweep.png'} and {options.out / 'sweep.json'}")


if __name__ == "__main__":
    main()
