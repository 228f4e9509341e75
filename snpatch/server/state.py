"""Serving: what one server holds: its engine, what clients can name, judges, uploads, and who is being answered."""

import asyncio
import os
import signal
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from snpatch.async_engine import AsyncEngine
from snpatch.errors import OverflowedError, ServerBusyError, SnpatchError, SpoiledEngineError
from snpatch.judges.protocol import Judge
from snpatch.server.config import ServeConfig
from snpatch.server.registry import PatchRegistry
from snpatch.server.responses import private_folders
from snpatch.server.uploads import Uploads


@dataclass(eq=False)
class Quota:
    """A context manager of which so many may be inside at once; option: the one that sets how many."""

    what: str
    limit: int
    option: str
    taken: int = 0

    def take(self, n: int = 1) -> None:
        """Take so many, or raise where there is no room for them."""
        if self.taken + n > self.limit:
            raise ServerBusyError(f"{self.what}: at most {self.limit} at once ({self.option}). Send it again later.")
        self.taken += n

    def leave(self, n: int = 1) -> None:
        """Give so many back."""
        self.taken -= n

    def __enter__(self) -> None:
        self.take()

    def __exit__(self, *_: object) -> None:
        self.leave()


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


@dataclass(eq=False)
class ServerState:
    """config: `fitted` to the engine once it has started. keys: API keys, of which clients need one, if there are any.
    has_own_template: whether the user named the server's chat template. models: FastAPI's field of each path's body."""

    config: ServeConfig
    engine: AsyncEngine
    catalogue: PatchRegistry
    inflight: InflightRequests
    judges: dict[str, Judge]
    uploads: Uploads | None
    keys: tuple[str, ...]
    has_own_template: bool
    waiting: int = 0  # texts that clients asked for, and that have no place yet
    sweeps: set = field(default_factory=set)  # that run
    models: dict[str, object] = field(default_factory=dict)
    beginning: asyncio.Lock = field(default_factory=asyncio.Lock)  # of whoever begins a text
    preparing: int = 0  # sweeps that are being made
    spoiled: SpoiledEngineError | None = None  # why the server is to be restarted

    def judge(self, error: OverflowedError) -> OverflowedError:
        """Return the error to report of a text that overflowed. One of a spoiled engine ends the server, as SIGTERM."""
        error = self.engine.judge(error)
        if isinstance(error, SpoiledEngineError) and self.spoiled is None:
            self.spoiled = error
            os.kill(os.getpid(), signal.SIGTERM)
        return error

    @cached_property
    def folders(self) -> tuple[str, ...]:
        """Return folders of this machine that no answer may name."""
        uploads, model = self.config.allow_upload or ".", self.config.engine.model
        return private_folders(uploads, model, tempfile.gettempdir(), Path.cwd())

    @cached_property
    def requests(self) -> Quota:
        """Return the places of requests that change or run something."""
        return Quota("requests", self.config.max_requests, "--max-requests")

    @cached_property
    def arriving(self) -> Quota:
        """Return the room for bytes of bodies that have not arrived in full."""
        return Quota("bytes of bodies that arrive", self.config.max_incoming_bytes, "--max-incoming-bytes")

    @cached_property
    def uploading(self) -> Quota:
        """Return the places of uploads, each of which is in memory."""
        return Quota("uploads", self.config.max_uploads, "--max-uploads")

    def check_template(self, recipient: str) -> None:
        """An error for a model that reads chats by another template than vLLM's server renders them with."""
        template = self.engine.requests.template
        if (
            not self.has_own_template
            and template(recipient).fingerprint != self.engine.requests.templates[0].fingerprint
        ):
            raise SnpatchError(
                f"{recipient} reads chats by another template than this server renders them with: send its text to "
                "/v1/completions, or start a server with its weights as MODEL",
                field="messages",
            )

    def check_waiting(self, n: int = 1) -> None:
        """An error for so many more texts where too many wait."""
        is_full = self.engine.executor.num_waiting > 0
        if is_full and self.waiting + n > self.config.max_waiting:
            raise ServerBusyError(f"{self.waiting} texts wait for a place of what they name, and {n} more would")
