"""What Prometheus is told of patches: `/metrics` of vLLM's server shows these beside its own."""

from collections.abc import Callable

from prometheus_client import Counter, Gauge

PATCHED = Counter("snpatch_patched_requests", "Texts that were patched and whose receipt was verified.")
OVERFLOWED = Counter("snpatch_overflowed_completions", "Texts with non-finite values: answered with an error.")
OVERWRITES = Counter("snpatch_overwrites", "Neurons that were overwritten, by the device's own count.")
REFUSED = Counter("snpatch_refused_prompts", "Prompts that a guard refused.")
RECEIPTS_FAILED = Counter(
    "snpatch_receipts_failed", "Texts whose patch was not applied in full: answered with an error."
)
_IN_USE = Gauge("snpatch_slots_in_use", "Rows that unfinished requests use, by kind.", ["kind"])
_WAITING = Gauge("snpatch_waiting_requests", "Requests that wait for a place of what they name.")


def watch(in_use: Callable[[], dict[str, int]], waiting: Callable[[], int]) -> None:
    """Where the gauges read."""
    for kind in in_use():
        _IN_USE.labels(kind).set_function(lambda kind=kind: in_use()[kind])
    _WAITING.set_function(waiting)
