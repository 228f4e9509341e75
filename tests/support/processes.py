"""Descendants of a process, and whether they run."""

import subprocess
import time
from pathlib import Path


def descendants(process: int) -> set[int]:
    pids, parents = set(), [process]
    while parents:
        text = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parents.pop())], capture_output=True, text=True).stdout
        children = {int(pid) for pid in text.split()} - pids
        pids |= children
        parents += children
    return pids


def command_line(process: int) -> bytes:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float) -> float:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"not within {seconds} s"
        time.sleep(0.05)
    return time.monotonic() - start
