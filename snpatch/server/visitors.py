"""Visitors: the requests that are being answered, so that the server's end can wait for theirs."""

import threading


class InflightRequests:
    """Used by the event loop, and waited for in a thread. limit_s: how long they may take once it is to end."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s, self._inside, self._left = limit_s, 0, threading.Condition()
        self.is_closing = False

    def __enter__(self) -> None:
        with self._left:
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._left:
            self._inside -= 1
            self._left.notify_all()

    def close(self, limit_s: float | None) -> None:
        """Let nobody in any more, and wait until all have left, or so long (0 or None: the limit it was made with)."""
        self.is_closing = True
        with self._left:
            self._left.wait_for(lambda: not self._inside, limit_s or self._limit_s)
