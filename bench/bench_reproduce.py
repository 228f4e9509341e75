"""`snpatch reproduce --model demo` in a new folder: seconds and results of each step, as a record.

    python bench/bench_reproduce.py            (make bench-reproduce)

Why the seconds are also written into the package: `--dry-run` prints them before anything has run.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from cpuinfo import get_cpu_info

from snpatch.op import ops
from snpatch.utils.environment import describe_environment

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "reproduce"
RECORD = ROOT / "bench" / "results" / "reproduce" / "demo.json"
MEASURED = ROOT / "snpatch" / "reproduce" / "measured.json"
COPIED_FILES = ("reproduction.csv",)  # stored next to the record
ALL = "all, with imports and engine"


def main() -> None:
    shutil.rmtree(OUT, ignore_errors=True)
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "snpatch.cli", "reproduce", "--model", "demo", "--out", str(OUT)], check=True)
    total_s = round(time.monotonic() - begin, 1)
    steps = json.loads((OUT / "steps.json").read_text())
    seconds = {name: step["seconds"] for name, step in steps.items()} | {ALL: total_s}
    report = json.loads((OUT / "report.json").read_text())
    about = describe_environment(ops.implementations())
    machine = f"{get_cpu_info()['brand_raw']}, {about['device']['cpu threads']} threads"
    headlines = {name: experiment["headline"] for name, experiment in report["experiments"].items()}
    trainings = {path.parent.name: figures(path) for path in sorted(OUT.glob("adapters/*/training.json"))}
    record = {"machine": machine, **about, "seconds": seconds, "trainings": trainings}
    record |= {"headlines": headlines, "comparison": report["comparison"]}
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    for name in COPIED_FILES:
        shutil.copy(OUT / name, RECORD.parent / name)
    MEASURED.write_text(json.dumps({"demo": {"machine": machine, "seconds": seconds}}, indent=1) + "\n")


def figures(path: Path) -> dict:
    return json.loads(path.read_text())["provenance"]["figures"]


if __name__ == "__main__":
    main()
