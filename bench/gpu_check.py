"""All checks and measurements on a GPU, as steps in order of value, with JSON records.

    python bench/gpu_check.py --list                     list the steps and their parts
    python bench/gpu_check.py --all --minutes 9.5        run as much as fits into 9.5 minutes; run it again to resume
    python bench/gpu_check.py equal profile              run these steps (or their numbers: 4 5)
    python bench/gpu_check.py --rehearse --all           the same at tiny size on a CPU: checks this script

Requires Python 3.11 or newer with torch, triton, transformers, pytest, pytest-benchmark and hypothesis; no compiler, no
install, no network. Without a card it reports what it skips. vLLM is taken from the Python path, from --site, or
unpacked there from --parts (a folder with manifest.json, part-*.xz and unpack.py).

On a borrowed card, where a call ends after 10 minutes and the checkout is copied again for each call:

    python3 bench/gpu_check.py --all --minutes 9.4 --parts PARTS --site /tmp/site --work /tmp/gpu-check --out "$OUT"

Repeat it until it exits with 0 or 1. Unpacked parts are kept, unless the machine was returned in between. The first
call runs the kernels, the op, and the two-stream engine against native vLLM at 7b; the second equality and the profile;
further calls the rest. --work keeps compiled kernels, logs and records for the next call on that machine. --out gets
records.json, the file to copy to bench/results/gpu/: from there its records count as done on another machine with the
same card. SNPATCH_COMMIT gives the commit of a copy without a repository.
After a fix, `equal --again` repeats a step; `--all --any-commit` resumes and skips parts that passed at another commit.

A record belongs to one card and one `source` (a hash of the code); for another one the part runs again. Status of a
part: ok, failed (both stay until --again), timed out (the next call tries it once more, with warm caches), skipped
(with the reason), left (no time; the next call runs it).
Exit status: 1 if a part failed or timed out, 3 if a part is left, 2 for invalid arguments, else 0.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import gpu_tables
from gpu_host import ROOT, Host, commit, source
from gpu_steps import CheckStep, Part, steps

RESULTS = ROOT / "bench" / "results" / "gpu"
RECORDS_FILE = "records.json"  # one file, because a borrowed machine returns few files
MAX_TRIES = 2
FAILURES = ("failed", "timed out")
TAIL_LINES = 60
ONE_LAUNCH = "import torch; torch.ones(8, device='cuda').add_(1); torch.cuda.synchronize()"
REHEARSAL_LIMIT_S = 400
FOLDER_OPTIONS = ("--out", "--work", "--parts", "--site")


class GpuCheck:
    """One call of this script. machine: the output of gpu_probe.py."""

    def __init__(self, host: Host, machine: dict, options: argparse.Namespace, selected_steps: list[CheckStep]) -> None:
        self.host, self.machine, self.options, self.selected_steps = host, machine, options, selected_steps
        self.card = machine["card"]
        self.deadline = time.monotonic() + 60 * (options.minutes or 10**6)
        self.about = {
            "rehearsal": options.rehearse,
            "card": self.card,
            "versions": machine["versions"],
            "commit": commit(),
            "source": source(),
        }
        self._shared: dict[tuple, dict] = {}  # results of rehearsed children that serve several parts

    def step(self, step: CheckStep) -> dict:
        """Run the parts of a step that are not settled yet.

        Return its record, which is saved after every part.
        """
        record = self._load_record(step)
        for part in step.parts:
            before = record["parts"].get(part.name, {})
            if not self.options.again and _is_settled(before):
                continue
            result = {**self._stamp(), **self._part(step, part)}
            if result["status"] == "timed out":
                result["tries"] = 1 + before.get("tries", 0)
            record["parts"][part.name] = result
            self._write(record)
            print(f"{step.name}: {part.name} {result['status']} {result.get('reason', '')}".rstrip(), flush=True)
        self._write(record)
        return record

    def _stamp(self) -> dict:
        """Return time, code and command: parts of one record may come from several calls and commits."""
        timestamp = datetime.now(UTC).isoformat(timespec="seconds")
        return {"time": timestamp, **{n: self.about[n] for n in ("commit", "source")}, "asked": self.options.asked}

    def _part(self, step: CheckStep, part: Part) -> dict:
        if self.options.rehearse and part.needs:
            if isinstance(part.rehearsal, str):
                return {"status": "skipped", "reason": f"not rehearsed: {part.rehearsal}"}
            part = part.rehearsal
        if missing := self._missing(part):
            return {"status": "skipped", "reason": missing}
        if part.targets == ("machine",):
            return {"status": "ok", "found": self.machine}
        remaining_s = self.deadline - time.monotonic()
        if remaining_s < part.expect_s:
            return {
                "status": "left",
                "reason": f"expected to take {part.expect_s} s or more, {max(remaining_s, 0):.0f} s are left",
            }
        if not self.options.rehearse or part.kind != "benches":
            return self._child(f"{step.name}.{part.name}", part.command, part, min(part.limit_s, remaining_s))
        return self._rehearsed_benches(part)

    def _missing(self, part: Part) -> str | None:
        has = {"card": self.card, "vllm": self.machine["has_vllm"]}
        reasons = {
            "card": "no NVIDIA card here",
            "vllm": self.machine.get("no_vllm") or "no vLLM here: give --parts, or have it on the Python path",
        }
        if missing := next((reasons[need] for need in part.needs if not has.get(need, True)), None):
            return missing
        return self._no_sanitizer if "sanitizer" in part.needs else None

    @cached_property
    def _no_sanitizer(self) -> str | None:
        """Reason why compute-sanitizer cannot be used, if any: the machine may block tools from its card."""
        if not (program := self.machine["sanitizer"]):
            return "compute-sanitizer is not installed"
        call = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", ONE_LAUNCH]
        logs = self.host.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / "sanitizer.tryout.log"
        code = run_limited(call, self.host.environment(), log, 90)
        if code == 0:
            return None
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
        return f"compute-sanitizer does not work here: exit status {code}, {self._without_paths(last)}"

    def _rehearsed_benches(self, part: Part) -> dict:
        """Return this part's benches from one child that runs those of all chosen steps."""
        key = (part.targets[0].split("::")[0], part.select)
        if key not in self._shared:
            rehearsed = [
                p.rehearsal for step in self.selected_steps for p in step.parts if isinstance(p.rehearsal, Part)
            ]
            same_file = [p for p in rehearsed if p.kind == "benches" and p.targets[0].split("::")[0] == key[0]]
            targets = tuple(dict.fromkeys(test for p in same_file if not self._missing(p) for test in p.targets))
            command = Part("", "benches", targets, part.select).command
            self._shared[key] = self._child(f"rehearsal.{Path(key[0]).stem}", command, part, REHEARSAL_LIMIT_S)
        result = dict(self._shared[key])
        names = [test.split("::")[1] for test in part.targets if "::" in test]
        result["benchmarks"] = [b for b in result["benchmarks"] if not names or b["name"].startswith(tuple(names))]
        if result["status"] == "ok" and not result["benchmarks"]:
            result |= {"status": "failed", "reason": "nothing was measured"}
        return result

    def _child(self, name: str, command: list[str], part: Part, limit_s: float) -> dict:
        """Run a part's child to its end or time limit; return its result."""
        facts = {"sanitizer": self.machine["sanitizer"], "kind": "h200" if "H200" in (self.card or "") else "h100"}
        command = [re.sub(r"^\{(\w+)\}$", lambda match: facts[match[1]], word) for word in command]
        if part.workers > 1 and "pytest-xdist" in self.machine["versions"]:
            command += ["-n", str(part.workers)]
        logs = self.host.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log, measured = logs / f"{name}.log", logs / f"{name}.jsonl"
        measured.unlink(missing_ok=True)
        environment = self.host.environment(SNPATCH_BENCH_LOG=str(measured), **part.env)
        start = time.monotonic()
        code = run_limited(command, environment, log, limit_s)
        text = self._without_paths(log.read_text(errors="replace"))
        lines = text.strip().splitlines()
        result = {
            "status": "ok",
            "seconds": round(time.monotonic() - start, 1),
            "command": self._without_paths(shlex.join(command)),
            "env": part.env,
        }
        if part.kind == "benches":
            rows = measured.read_text().splitlines() if measured.exists() else []
            result["benchmarks"] = [json.loads(row) for row in rows]
        if part.kind == "probe" and code == 0:
            result["found"] = json.loads(lines[-1])
        if part.kind != "probe":
            result["counts"] = count_outcomes(text)
            result["seen"] = find_log_lines(text)
        if code is None:
            result |= {"status": "timed out", "reason": f"killed after {limit_s:.0f} s"}
            if limit_s < part.limit_s:
                result |= {"status": "left", "reason": f"stopped after {limit_s:.0f} s: no time was left"}
        elif code:
            result |= {"status": "failed", "reason": f"exit status {code}"}
        elif part.kind != "probe" and not result["counts"].get("passed"):
            result |= {"status": "skipped", "reason": skip_reason(text)}
        if result["status"] in FAILURES:
            result["tail"] = lines[-TAIL_LINES:]
        return result

    def _without_paths(self, text: str) -> str:
        """Replace the machine's folders: records are stored in the repository and name none of them."""
        names = {
            sys.executable: "python",
            self.host.site: "SITE",
            self.host.work: "WORK",
            ROOT: ".",
            sys.prefix: "PREFIX",
        }
        for path, name in names.items():
            text = text.replace(str(path), name)
        return text

    def _load_record(self, step: CheckStep) -> dict:
        """Return the step's record, with the stored parts for this card and this code."""
        record = {"step": step.name, "title": step.title, **self.about, "parts": {}}
        homes = [self.options.out] if self.options.rehearse else [self.options.out, self._work_records, RESULTS]
        for home in homes:
            if stored_record := load_records(home).get(step.name):
                is_same = all(stored_record[name] == record[name] for name in ("rehearsal", "card"))
                parts = {
                    name: part for name, part in stored_record["parts"].items() if is_same and self._is_current(part)
                }
                if parts:
                    return {**record, "parts": parts}
        return record

    def _is_current(self, part: dict) -> bool:
        return self.options.any_commit or part["source"] == self.about["source"]

    @property
    def _work_records(self) -> Path:
        return self.host.work / "records"

    def _write(self, record: dict) -> None:
        for home in (
            {self.options.out} if self.options.rehearse or not self.card else {self.options.out, self._work_records}
        ):
            home.mkdir(parents=True, exist_ok=True)
            path = home / RECORDS_FILE
            records = {**load_records(home), record["step"]: record}
            path.with_suffix(".partial").write_text(json.dumps(records, indent=1) + "\n")
            path.with_suffix(".partial").replace(path)


def _is_settled(result: dict) -> bool:
    status = result.get("status")
    return status in ("ok", "failed") or (status == "timed out" and result["tries"] >= MAX_TRIES)


def load_records(home: Path) -> dict[str, dict]:
    """Return a folder's records by step; empty if it has no file."""
    path = home / RECORDS_FILE
    return json.loads(path.read_text()) if path.exists() else {}


def run_limited(command: list[str], environment: dict[str, str], log: Path, limit_s: float) -> int | None:
    """Return a command's exit status; None if it and its children were killed at the limit."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, process_group=0
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # it and its children have ended
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def count_outcomes(text: str) -> dict[str, int]:
    """Return pytest's counts, such as {"passed": 12, "skipped": 1}; of a stopped run, those so far."""
    if last := re.findall(r"^=+ (.*(?:passed|failed|skipped|error|deselected).*) in [\d.]+s", text, re.MULTILINE):
        return {kind.rstrip("s"): int(n) for n, kind in re.findall(r"(\d+) (?!warning)(\w+)", last[-1])}
    outcomes = re.findall(r" (PASSED|FAILED|SKIPPED|ERROR)\b", text)
    return {kind.lower(): outcomes.count(kind) for kind in sorted(set(outcomes))}


def find_log_lines(text: str) -> list[str]:
    """Return lines of vLLM's log that describe the measurement: attention backend, compilation, graphs."""
    pattern = r"Using [\w ]*(?:attention|FLASH|TRITON)[^\n]*|torch.compile took[^\n]*|Graph capturing finished[^\n]*"
    return list(dict.fromkeys(line.strip()[:160] for line in re.findall(pattern, text, re.IGNORECASE)))[:12]


def skip_reason(text: str) -> str:
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.MULTILINE)
    return reasons[0] if reasons else "no test ran"


def main(arguments: list[str] | None = None) -> int:
    all_steps = steps()
    options = parse_options(arguments, [step.name for step in all_steps])
    if options.list:
        for number, step in enumerate(all_steps, 1):
            print(f"{number} {step.name}: {step.title}")
            print(*(f"    {part.name} ({', '.join(part.needs) or 'any machine'})" for part in step.parts), sep="\n")
        return 0
    selected_steps = [step for step in all_steps if options.all or step.name in options.steps]
    host = Host(options.work, options.site, has_own_caches=not options.rehearse)
    no_vllm = host.unpack(options.parts) if options.parts else None
    machine = {**host.machine(), "no_vllm": no_vllm}
    if options.out is None:
        scratch = options.work / ("rehearsal" if options.rehearse else "no-card")
        options.out = RESULTS if machine["card"] and not options.rehearse else scratch
    print(machine["card"] or "no card", *(f"{n} {v}" for n, v in machine["versions"].items()), sep=", ", flush=True)
    run = GpuCheck(host, machine, options, selected_steps)
    records = [run.step(step) for step in selected_steps]
    print(gpu_tables.measurements(records) + gpu_tables.summary(records))
    statuses = {part["status"] for record in records for part in record["parts"].values()}
    return 1 if statuses & set(FAILURES) else 3 if "left" in statuses else 0


def parse_options(arguments: list[str] | None, names: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="step names or numbers")
    parser.add_argument("--all", action="store_true", help="run all steps")
    parser.add_argument("--list", action="store_true", help="list the steps and their parts")
    parser.add_argument(
        "--rehearse", action="store_true", help="run at tiny size on a CPU; the records are marked as a rehearsal"
    )
    parser.add_argument("--again", action="store_true", help="repeat parts that have a record")
    parser.add_argument("--any-commit", action="store_true", help="accept records of another commit")
    parser.add_argument(
        "--minutes", type=float, help="time limit; a part that would exceed it is left for the next call"
    )
    parser.add_argument("--out", type=Path, help="folder of the records (default: bench/results/gpu on a card)")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "gpu-check", help="folder of caches, logs and records"
    )
    parser.add_argument("--parts", type=Path, help="folder with vLLM's parts")
    parser.add_argument("--site", type=Path, help="folder that has vLLM or that it is unpacked to (default: WORK/site)")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    preceding = [None, *words]  # folders are replaced by the names of their options
    command_words = [
        preceding[i][2:].upper() if preceding[i] in FOLDER_OPTIONS else word for i, word in enumerate(words)
    ]
    options.asked = shlex.join(["python", "bench/gpu_check.py", *command_words])
    options.steps = [names[int(s) - 1] if s.isdigit() and 0 < int(s) <= len(names) else s for s in options.steps]
    if unknown := set(options.steps) - set(names):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; the steps are {', '.join(names)}")
    if not (options.steps or options.all or options.list):
        parser.error("expected step names, --all or --list")
    options.work = options.work.resolve()
    options.site = (options.site or options.work / "site").resolve()
    options.parts = options.parts and options.parts.resolve()
    options.out = options.out and options.out.resolve()
    if options.rehearse and options.out and options.out.is_relative_to(ROOT / "bench" / "results"):
        parser.error("--out: records of a rehearsal must not be written to bench/results")
    return options


if __name__ == "__main__":
    sys.exit(main())
