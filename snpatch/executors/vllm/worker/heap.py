"""The heap of a worker on a CPU: freed memory is kept for the next step and returned to the system at intervals.

By default glibc returns the memory of large activations at every free, and the next step pays a page fault for each
4 KiB of it: 11 % of the CPU time of reading prompts. Without a limit, kept memory would grow by more than 1 MB per
1,000 mixed requests, because activations of many sizes leave holes between them.
"""

import ctypes

REQUESTS_PER_TRIM = 100  # a trim takes 2 to 16 ms
# Parameters of glibc's mallopt: return the heap's top above 1 GiB only, extend it by 64 MiB, never map a block alone.
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4
KEEP_FREED = {TRIM_THRESHOLD: 2**30, TOP_PAD: 2**26, MMAP_MAX: 0}


class WorkerHeap:
    """glibc's heap of this process. With another C library, nothing is changed."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._is_glibc = hasattr(library, "malloc_trim")
        self._library, self._num_finished, self._keeps_freed = library, 0, False

    def step(self, num_finished: int) -> None:
        """Count the requests that finished before this step; trim the heap after `REQUESTS_PER_TRIM` of them."""
        if not self._is_glibc:
            return
        if not self._keeps_freed:  # at the first step: weights and KV cache are allocated by then
            for parameter, value in KEEP_FREED.items():
                self._library.mallopt(parameter, value)
            self._keeps_freed = True
        self._num_finished += num_finished
        if self._num_finished >= REQUESTS_PER_TRIM:
            self._num_finished = 0
            self._library.malloc_trim(0)


HEAP = WorkerHeap()
