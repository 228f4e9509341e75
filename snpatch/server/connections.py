"""Connections whose request line and headers do not arrive are closed: uvicorn itself waits for them without end."""

import asyncio

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def protocol_with_deadline(timeout_s: float) -> type[asyncio.Protocol]:
    """Return uvicorn's protocol, with so many seconds for the head of each request."""

    class Protocol(AutoHTTPProtocol):
        _deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Start the deadline where a head is awaited, and end it once the head is there."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._unwatch()
            elif self._deadline is None:
                self._deadline = self.loop.call_later(timeout_s, self.transport.close)

        def _unwatch(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Protocol
