"""Objects that live as long as the server: engine, registry, judges, uploads, quotas and requests in flight."""

import asyncio
import os
import signal
import tempfile
import threading
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from snpatch.engine.async_engine import AsyncEngine
from snpatch.errors import OverflowedError, ServerBusyError, SnpatchError, SpoiledEngineError
from snpatch.judges.protocol import Judge
from snpatch.server.config import ServeConfig
from snpatch.server.registry import PatchRegistry
from snpatch.server.responses import find_private_folders
from snpatch.server.uploads import Uploads
from snpatch.utils.optional import require


@dataclass(eq=False)
class Quota:
    """Context manager that admits at most `limit` units at once. option: the option that sets the limit."""

    subject: str
    limit: int
    option: str
    used: int = 0

    def acquire(self, n: int = 1) -> None:
        """Acquire n units, or raise if fewer are free."""
        if self.used + n > self.limit:
            raise ServerBusyError(f"{self.subject}: at most {self.limit} at once ({self.option}). Send it again later.")
        self.used += n

    def release(self, n: int = 1) -> None:
        """Release n units."""
        self.used -= n

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Turnstile:
    """Lets one waiter pass in each turn of the event loop, in the order of arrival.

    Without it, a burst of requests would be handled in one turn, and `/health` would wait for all of them.
    """

    def __init__(self) -> None:
        self._lock = asyncio.Lock()

    async def wait(self) -> None:
        """Wait for those that came earlier, and one turn."""
        async with self._lock:
            await asyncio.sleep(0)


class InflightRequests:
    """Count of the requests being answered. The event loop enters and leaves it; a thread waits for zero.

    timeout_s: how long running requests may take once the server shuts down.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s, self._count, self._changed = timeout_s, 0, threading.Condition()
        self.is_closing = False

    def __enter__(self) -> None:
        with self._changed:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._count -= 1
            self._changed.notify_all()

    def close(self, timeout_s: float | None) -> None:
        """Stop accepting requests and wait for the running ones.

        timeout_s: maximum time to wait; 0 or None is the default limit.
        """
        self.is_closing = True
        with self._changed:
            self._changed.wait_for(lambda: not self._count, timeout_s or self._timeout_s)


@dataclass(eq=False)
class ServerState:
    """State shared by all requests of one server.

    Attributes:
        config: Complete (`resolve_limits`) once the engine has started.
        api_keys: API keys; if there are any, each client needs one of them.
        has_own_template: Whether the user set the server's chat template.
        body_fields: FastAPI's body field of each path.
        num_waiting: Completions that clients requested and that have no slots yet.
        sweeps: Running sweeps.
        num_preparing_sweeps: Sweeps whose requests are being built.
        bodies: Passed by each request before its body is parsed.
        starts: Passed by each completion before it is started.
        spoiled_error: The reason to restart the server.
    """

    config: ServeConfig
    engine: AsyncEngine
    registry: PatchRegistry
    inflight: InflightRequests
    judges: dict[str, Judge]
    uploads: Uploads | None
    api_keys: tuple[str, ...]
    has_own_template: bool
    body_fields: dict[str, Any] = field(default_factory=dict)
    num_waiting: int = 0
    sweeps: set = field(default_factory=set)
    num_preparing_sweeps: int = 0
    bodies: Turnstile = field(default_factory=Turnstile)
    starts: Turnstile = field(default_factory=Turnstile)
    spoiled_error: SpoiledEngineError | None = None

    def handle_overflow(self, error: OverflowedError) -> OverflowedError:
        """Return the error to report for a completion that overflowed.

        If the engine is spoiled, stop the server.
        """
        error = self.engine.judge(error)
        if isinstance(error, SpoiledEngineError) and self.spoiled_error is None:
            self.spoiled_error = error
            os.kill(os.getpid(), signal.SIGTERM)
        return error

    @cached_property
    def private_folders(self) -> tuple[str, ...]:
        """Return the folders of this machine that no response may name."""
        uploads, model = self.config.allow_upload or ".", self.config.engine.model
        return find_private_folders(uploads, model, tempfile.gettempdir(), Path.cwd())

    @cached_property
    def request_quota(self) -> Quota:
        """Requests that change or run something."""
        return Quota("requests", require(self.config.max_requests), "--max-requests")

    @cached_property
    def body_quota(self) -> Quota:
        """Bytes of request bodies that have not arrived in full."""
        return Quota("bytes of incomplete bodies", require(self.config.max_incoming_bytes), "--max-incoming-bytes")

    @cached_property
    def upload_quota(self) -> Quota:
        """Uploads, each of which is held in memory."""
        return Quota("uploads", self.config.max_uploads, "--max-uploads")

    def check_template(self, recipient: str) -> None:
        """Raise if a model's chat template differs from the one that vLLM's server renders chats with."""
        requests = self.engine.requests
        if not self.has_own_template and requests.template(recipient).fingerprint != requests.templates[0].fingerprint:
            raise SnpatchError(
                f"messages: expected a model with this server's chat template, got {recipient}, which has another "
                "one. Send the rendered prompt to /v1/completions, or start a server with its weights as MODEL.",
                field="messages",
            )

    def check_queue(self, n: int = 1) -> None:
        """Raise if n more completions would exceed the number that may wait for slots."""
        is_full = self.engine.executor.num_waiting > 0
        if is_full and self.num_waiting + n > self.config.max_waiting:
            raise ServerBusyError(
                f"queue: expected at most {self.config.max_waiting} completions waiting for adapter, ranking or "
                f"constant slots (--max-waiting), got {self.num_waiting} and {n} more. Send it again later."
            )
