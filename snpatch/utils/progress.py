"""Progress of Python calls: bars by default where a person watches, in a terminal or a notebook.

The command line has bars of its own, so it switches the default off (`set_default`).
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]  # (requests done, requests in total)

_is_shown_by_default = True


def set_default(is_shown: bool) -> None:
    """Set whether calls without `progress` show a bar in a terminal or notebook."""
    global _is_shown_by_default
    _is_shown_by_default = is_shown


def is_watched() -> bool:
    """Return whether stderr is a terminal, or the output of a notebook's cell."""
    is_notebook = "ipykernel" in sys.modules and type(sys.stderr).__module__.startswith("ipykernel")
    return is_notebook or (sys.stderr is not None and sys.stderr.isatty())


@contextmanager
def open_progress(progress: Progress | bool | None, name: str) -> Iterator[Progress | None]:
    """Yield a callback for `progress`: itself, a bar for True, None for False.

    None gives a bar if somebody watches.
    """
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not (_is_shown_by_default and is_watched())):
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(desc=name, unit="request", file=sys.stderr) as bar:

        def update(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield update


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Print what takes long and then how many seconds it took, if somebody watches."""
    if not is_watched():
        yield
        return
    from tqdm.auto import tqdm

    start = time.monotonic()
    tqdm.write(f"snpatch: {what} ...", file=sys.stderr)
    yield
    tqdm.write(f"snpatch: {what} took {time.monotonic() - start:.0f} s", file=sys.stderr)
