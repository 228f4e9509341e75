"""Everything that is to be checked and measured on a GPU, in steps, most valuable first; records as JSON.

    python bench/gpu_check.py --list                     steps and their parts
    python bench/gpu_check.py --all --minutes 9.5        as much as 9.5 minutes hold; again: goes on where it was
    python bench/gpu_check.py equal profile              these steps (or their numbers: 4 5)
    python bench/gpu_check.py --rehearse --all           the same at tiny size on a CPU: checks this script

It needs Python 3.11 or newer with torch, triton, transformers, pytest, pytest-benchmark and hypothesis; no compiler, no
install, no network. Without a card it says what it skips. vLLM is taken from the Python path, from --site, or unpacked
there from --parts (a folder with manifest.json, part-*.xz and unpack.py).

On a lent card, whose calls end after 10 minutes and whose checkout is copied there anew each time:

    python3 bench/gpu_check.py --all --minutes 9.4 --parts PARTS --site /tmp/site --work /tmp/gpu-check --out "$OUT"

and the same line again until it exits with 0 or 1 (what is unpacked stays so; a machine that was given back in between
needs the parts again). The first call holds kernels, op and snpatch against native vLLM at 7b, the second equality
and the profile; all else is for further ones. --work keeps compiled kernels, logs and records for the next call on that
machine; --out gets records.json, the one file to take home to bench/results/gpu/, from where its records count as done
on another machine of the same card. SNPATCH_COMMIT names the commit of a copy.
After a fix, `equal --again` repeats a step; `--all --any-commit` resumes and skips parts that passed at another commit.

A record is of one card and one code (`source`, a digest of it): another one is measured anew. Status of a part: ok,
failed (both stay until --again), timed out (tried once more by the next call: its first try has warmed the caches),
skipped (with the reason), left (no time; the next call runs it).
Exit status: 1 a part failed or timed out, 3 something is left, 2 wrong arguments, else 0.
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
from gpu_steps import Part, Step, steps

RESULTS = ROOT / "bench" / "results" / "gpu"
RECORDS = "records.json"  # one file: what a lent machine sends home is limited in files
TRIES = 2
BAD = ("failed", "timed out")
TAIL = 60
ONE_LAUNCH = "import torch; torch.ones(8, device='cuda').add_(1); torch.cuda.synchronize()"
REHEARSAL_S = 400
FOLDERS = ("--out", "--work", "--parts", "--site")


class Run:
    """One call of this script. machine: gpu_probe.py's answer."""

    def __init__(self, host: Host, machine: dict, options: argparse.Namespace, chosen: list[Step]) -> None:
        self.host, self.machine, self.options, self.chosen = host, machine, options, chosen
        self.card = machine["card"]
        self.deadline = time.monotonic() + 60 * (options.minutes or 10**6)
        self.about = {
            "rehearsal": options.rehearse,
            "card": self.card,
            "versions": machine["versions"],
            "commit": commit(),
            "source": source(),
        }
        self._shared: dict[tuple, dict] = {}  # what a rehearsed child of several parts gave

    def step(self, step: Step) -> dict:
        """Run what of a step is not settled yet; its record, which is on disk after every part."""
        record = self._known(step)
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
        """Parts of one record may be of several calls, and with --any-commit of several commits."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return {"time": now, **{n: self.about[n] for n in ("commit", "source")}, "asked": self.options.asked}

    def _part(self, step: Step, part: Part) -> dict:
        if self.options.rehearse and part.needs:
            if isinstance(part.rehearsal, str):
                return {"status": "skipped", "reason": f"not rehearsed: {part.rehearsal}"}
            part = part.rehearsal
        if missing := self._missing(part):
            return {"status": "skipped", "reason": missing}
        if part.what == ("machine",):
            return {"status": "ok", "found": self.machine}
        left = self.deadline - time.monotonic()
        if left < part.expect_s:
            return {"status": "left", "reason": f"takes {part.expect_s} s or more, {max(left, 0):.0f} s are left"}
        if not self.options.rehearse or part.kind != "benches":
            return self._child(f"{step.name}.{part.name}", part.command, part, min(part.limit_s, left))
        return self._rehearsed_benches(part)

    def _missing(self, part: Part) -> str | None:
        has = {"card": self.card, "vllm": self.machine["has_vllm"]}
        why = {
            "card": "no NVIDIA card here",
            "vllm": self.machine.get("no_vllm") or "no vLLM here: give --parts, or have it on the Python path",
        }
        if missing := next((why[need] for need in part.needs if not has.get(need, True)), None):
            return missing
        return self._no_sanitizer if "sanitizer" in part.needs else None

    @cached_property
    def _no_sanitizer(self) -> str | None:
        """Why compute-sanitizer cannot be used: it may be installed, and the machine let no tool look at its card."""
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
        """This part's benches out of one child that runs those of all chosen steps."""
        key = (part.what[0].split("::")[0], part.select)
        if key not in self._shared:
            rehearsed = [p.rehearsal for step in self.chosen for p in step.parts if isinstance(p.rehearsal, Part)]
            alike = [p for p in rehearsed if p.kind == "benches" and p.what[0].split("::")[0] == key[0]]
            what = tuple(dict.fromkeys(test for p in alike if not self._missing(p) for test in p.what))
            command = Part("", "benches", what, part.select).command
            self._shared[key] = self._child(f"rehearsal.{Path(key[0]).stem}", command, part, REHEARSAL_S)
        told = dict(self._shared[key])
        wanted = [test.split("::")[1] for test in part.what if "::" in test]
        told["benchmarks"] = [b for b in told["benchmarks"] if not wanted or b["name"].startswith(tuple(wanted))]
        if told["status"] == "ok" and not told["benchmarks"]:
            told |= {"status": "failed", "reason": "nothing was measured"}
        return told

    def _child(self, name: str, command: list[str], part: Part, limit_s: float) -> dict:
        """Run a part's child to its end or limit, and say what came of it."""
        facts = {"sanitizer": self.machine["sanitizer"], "kind": "h200" if "H200" in (self.card or "") else "h100"}
        command = [re.sub(r"^\{(\w+)\}$", lambda found: facts[found[1]], word) for word in command]
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
        told = {
            "status": "ok",
            "seconds": round(time.monotonic() - start, 1),
            "command": self._without_paths(shlex.join(command)),
            "env": part.env,
        }
        if part.kind == "benches":
            rows = measured.read_text().splitlines() if measured.exists() else []
            told["benchmarks"] = [json.loads(row) for row in rows]
        if part.kind == "probe" and code == 0:
            told["found"] = json.loads(lines[-1])
        if part.kind != "probe":
            told["counts"] = counts(text)
            told["seen"] = seen(text)
        if code is None:
            told |= {"status": "timed out", "reason": f"killed after {limit_s:.0f} s"}
            if limit_s < part.limit_s:
                told |= {"status": "left", "reason": f"stopped after {limit_s:.0f} s: no time was left"}
        elif code:
            told |= {"status": "failed", "reason": f"exit status {code}"}
        elif part.kind != "probe" and not told["counts"].get("passed"):
            told |= {"status": "skipped", "reason": skip_reason(text)}
        if told["status"] in BAD:
            told["tail"] = lines[-TAIL:]
        return told

    def _without_paths(self, text: str) -> str:
        """Records are kept in the repository: they name no folder of the machine."""
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

    def _known(self, step: Step) -> dict:
        """The step's record, with what is known of it on this card and by this code."""
        now = {"step": step.name, "title": step.title, **self.about, "parts": {}}
        homes = [self.options.out] if self.options.rehearse else [self.options.out, self._kept, RESULTS]
        for home in homes:
            if found := kept_records(home).get(step.name):
                mine = all(found[name] == now[name] for name in ("rehearsal", "card"))
                parts = {name: told for name, told in found["parts"].items() if mine and self._counts(told)}
                if parts:
                    return {**now, "parts": parts}
        return now

    def _counts(self, told: dict) -> bool:
        return self.options.any_commit or told["source"] == self.about["source"]

    @property
    def _kept(self) -> Path:
        return self.host.work / "records"

    def _write(self, record: dict) -> None:
        for home in {self.options.out} if self.options.rehearse or not self.card else {self.options.out, self._kept}:
            home.mkdir(parents=True, exist_ok=True)
            path = home / RECORDS
            records = {**kept_records(home), record["step"]: record}
            path.with_suffix(".partial").write_text(json.dumps(records, indent=1) + "\n")
            path.with_suffix(".partial").replace(path)


def _is_settled(result: dict) -> bool:
    status = result.get("status")
    return status in ("ok", "failed") or (status == "timed out" and result["tries"] >= TRIES)


def kept_records(home: Path) -> dict[str, dict]:
    """Return a folder's records by step; of none where there is no file."""
    path = home / RECORDS
    return json.loads(path.read_text()) if path.exists() else {}


def run_limited(command: list[str], environment: dict[str, str], log: Path, limit_s: float) -> int | None:
    """A command's exit status; None where it, and all that it started, was killed at the limit."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT, process_group=0
        )
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):  # nothing of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def counts(text: str) -> dict[str, int]:
    """pytest's own: {"passed": 12, "skipped": 1}; of a run that was stopped, what it had said by then."""
    if last := re.findall(r"^=+ (.*(?:passed|failed|skipped|error|deselected).*) in [\d.]+s", text, re.MULTILINE):
        return {kind.rstrip("s"): int(n) for n, kind in re.findall(r"(\d+) (?!warning)(\w+)", last[-1])}
    said = re.findall(r" (PASSED|FAILED|SKIPPED|ERROR)\b", text)
    return {kind.lower(): said.count(kind) for kind in sorted(set(said))}


def seen(text: str) -> list[str]:
    """Lines of vLLM's log that say what was measured: attention's backend, compilation, graphs."""
    wanted = r"Using [\w ]*(?:attention|FLASH|TRITON)[^\n]*|torch.compile took[^\n]*|Graph capturing finished[^\n]*"
    return list(dict.fromkeys(line.strip()[:160] for line in re.findall(wanted, text, re.IGNORECASE)))[:12]


def skip_reason(text: str) -> str:
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", text, re.MULTILINE)
    return reasons[0] if reasons else "no test ran"


def main(arguments: list[str] | None = None) -> int:
    known = steps()
    options = parsed(arguments, [step.name for step in known])
    if options.list:
        for number, step in enumerate(known, 1):
            print(f"{number} {step.name}: {step.title}")
            print(*(f"    {part.name} ({', '.join(part.needs) or 'any machine'})" for part in step.parts), sep="\n")
        return 0
    chosen = [step for step in known if options.all or step.name in options.steps]
    host = Host(options.work, options.site, has_own_caches=not options.rehearse)
    no_vllm = host.unpack(options.parts) if options.parts else None
    machine = {**host.machine(), "no_vllm": no_vllm}
    if options.out is None:
        aside = options.work / ("rehearsal" if options.rehearse else "no-card")
        options.out = RESULTS if machine["card"] and not options.rehearse else aside
    print(machine["card"] or "no card", *(f"{n} {v}" for n, v in machine["versions"].items()), sep=", ", flush=True)
    run = Run(host, machine, options, chosen)
    records = [run.step(step) for step in chosen]
    print(gpu_tables.measurements(records) + gpu_tables.summary(records))
    found = {part["status"] for record in records for part in record["parts"].values()}
    return 1 if found & set(BAD) else 3 if "left" in found else 0


def parsed(arguments: list[str] | None, names: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("gpu_check.py", description=__doc__, formatter_class=formatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help="names or numbers")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="tiny, on a CPU; records are marked")
    parser.add_argument("--again", action="store_true", help="repeat what has a record")
    parser.add_argument("--any-commit", action="store_true", help="records of other code count as done")
    parser.add_argument("--minutes", type=float, help="stop starting things then")
    parser.add_argument("--out", type=Path, help="records (default: bench/results/gpu on a card)")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu-check", help="caches, logs, records")
    parser.add_argument("--parts", type=Path, help="vLLM's parts")
    parser.add_argument("--site", type=Path, help="where vLLM is, or is unpacked to (default: WORK/site)")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    after = [None, *given]  # a folder's name stands for it
    shown = [after[i][2:].upper() if after[i] in FOLDERS else word for i, word in enumerate(given)]
    options.asked = shlex.join(["python", "bench/gpu_check.py", *shown])
    options.steps = [names[int(s) - 1] if s.isdigit() and 0 < int(s) <= len(names) else s for s in options.steps]
    if unknown := set(options.steps) - set(names):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; the steps are {', '.join(names)}")
    if not (options.steps or options.all or options.list):
        parser.error("name steps, or --all, or --list")
    options.work = options.work.resolve()
    options.site = (options.site or options.work / "site").resolve()
    options.parts = options.parts and options.parts.resolve()
    options.out = options.out and options.out.resolve()
    if options.rehearse and options.out and options.out.is_relative_to(ROOT / "bench" / "results"):
        parser.error("a rehearsal's records do not belong in bench/results")
    return options


if __name__ == "__main__":
    sys.exit(main())
