"""Prometheus metrics of patches, which vLLM's `/metrics` route includes."""

from collections.abc import Callable

from prometheus_client import Counter, Gauge

PATCHED = Counter("snpatch_patched_requests", "Patched completions whose receipt was verified.")
OVERFLOWED = Counter("snpatch_overflowed_completions", "Completions with non-finite values, answered with an error.")
OVERWRITES = Counter("snpatch_overwrites", "Overwritten neurons, counted on the device.")
REFUSED = Counter("snpatch_refused_prompts", "Prompts refused by a guard.")
RECEIPTS_FAILED = Counter(
    "snpatch_receipts_failed", "Completions whose patch was not applied in full, answered with an error."
)
_SLOTS_IN_USE = Gauge("snpatch_slots_in_use", "Slots used by unfinished requests, by kind.", ["kind"])
_WAITING = Gauge("snpatch_waiting_requests", "Requests that wait for adapter, ranking or constant slots.")


def watch(slots_in_use: Callable[[], dict[str, int]], num_waiting: Callable[[], int]) -> None:
    """Set the functions that the gauges read."""
    for kind in slots_in_use():
        _SLOTS_IN_USE.labels(kind).set_function(lambda kind=kind: slots_in_use()[kind])
    _WAITING.set_function(num_waiting)
