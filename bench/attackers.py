"""Clients that attack a server: random patches, disconnects, malformed bodies, overflows, slow sockets.

Why a separate process: the process that measures the server does not wait for the clients. A request depends on its
number alone, so each can be sent again.

stdin: {"url", "requests", "every", "known": [[body, token ids], ...]}. stdout: the number of finished requests after
every `every` of them; then one line of JSON: {"outcomes": {name: count}, "faults": [...], "reopened": slow sockets}.
"""

import asyncio
import json
import sys
from collections import Counter
from contextlib import closing, suppress
from random import Random
from urllib.parse import urlsplit

import aiohttp

CLIENTS, SLOW_SOCKETS = 200, 100
MALFORMED, OVERFLOWING, KNOWN, PLAIN, LEAVING = 0.05, 0.01, 0.1, 0.1, 0.3  # shares of the requests
TIMEOUT_S, REOPEN_S = 300, 1
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
DONORS = ("zero", "mean:recipient", "mean:donor", "add:mean:donor", "noise:0.5", "noise:2", "scale:0", "scale:1.5")
POSITIONS = ("all", "prompt", "completion", -1, 2)
MAX_INTERVENTIONS, MAX_TEXTS, MAX_TOKENS = 3, 3, 24
OVERFLOW = "scale:1e19"  # within a factor's bounds; applied three times it exceeds float32
WORDS = "bala bama bana bara bela bema bena bera"  # in the tiny model's vocabulary
MALFORMED_FIELDS = (  # each makes a good body malformed
    {"model": "nobody"},
    {"prompt": None},
    {"prompt": [10**9]},
    {"max_tokens": -1},
    {"temperature": "warm"},
    {"snpatch": 7},
    {"snpatch": {"recipient": "nobody"}},
    {"snpatch": {"recipient": "base", "donor": "zero"}},
    {"snpatch": {"recipient": "base", "donor": "zero", "ranking": "none", "window": 3}},
    {"snpatch": {"recipient": "base", "donor": "constant:none", "ranking": "first", "window": 3}},
    {"snpatch": {"recipient": "base", "donor": "zero", "ranking": "first", "window": [9, 3]}},
    {"snpatch": {"recipient": "base", "donor": "zero", "ranking": "first", "window": 3, "strength": float("nan")}},
    {"snpatch": {"recipient": "base", "donor": "zero", "ranking": "first", "window": 3, "positions": "nowhere"}},
)
HALF_REQUESTS = (  # sent by slow sockets
    b"POST /v1/comple",
    b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{",
)


class Attack:
    """The attack on one server. resources: models, rankings and constants, as `GET /v1/snpatch` lists them."""

    def __init__(self, order: dict, session: aiohttp.ClientSession, resources: dict) -> None:
        self._order, self._session = order, session
        self._models = list(resources["models"])
        self._rankings = {name: ranking["neurons"] for name, ranking in resources["rankings"].items()}
        self._constants = [f"{add}constant:{name}" for name in resources["constants"] for add in ("", "add:")]
        self.outcomes, self.faults, self.reopened = Counter(), [], 0

    async def run(self) -> None:
        sockets = [
            asyncio.create_task(self._hold_socket(HALF_REQUESTS[i % len(HALF_REQUESTS)])) for i in range(SLOW_SOCKETS)
        ]
        numbers = iter(range(self._order["requests"]))
        await asyncio.gather(*(self._run_client(numbers) for _ in range(CLIENTS)))
        for task in sockets:
            task.cancel()
        ends = await asyncio.gather(*sockets, return_exceptions=True)
        self.faults += [f"slow socket: {end!r}" for end in ends if not isinstance(end, asyncio.CancelledError)]

    async def _run_client(self, numbers) -> None:
        for number in numbers:
            try:
                self.outcomes[await self._send(Random(number))] += 1
            except (AssertionError, aiohttp.ClientError, TimeoutError) as fault:
                self.faults.append(f"request {number}: {type(fault).__name__}: {fault}")
            num_done = self.outcomes.total() + len(self.faults)
            if num_done % self._order["every"] == 0:
                print(num_done, flush=True)

    async def _send(self, draw: Random) -> str:
        """Send a random request and return its outcome; raise AssertionError for a wrong answer."""
        kind = draw.random() - MALFORMED
        if kind < 0:
            return await self._send_malformed(draw)
        if kind < OVERFLOWING:
            return await self._send_overflowing(draw)
        if draw.random() < KNOWN:
            body, ids = draw.choice(self._order["known"])
            return await self._read(COMPLETIONS, {**body, "stream": True}, ids)
        path, body = self._body(draw)
        body |= {"stream": True} | ({} if draw.random() < PLAIN else {"snpatch": self._patch(draw)})
        if draw.random() < LEAVING:
            return await self._leave(path, body, draw.randrange(6))
        return await self._read(path, body)

    async def _read(self, path: str, body: dict, ids: list[int] | None = None) -> str:
        """Read a stream to its end; check finish reasons, verified receipts, [DONE], and the known tokens."""
        async with self._session.post(path, json=body) as answer:
            assert answer.status == 200, f"{answer.status} for {body}: {await answer.text()}"
            lines = [line async for line in _data(answer)]
        assert lines[-1:] == ["[DONE]"], f"ended with {lines[-1:]}"
        chunks = [json.loads(line) for line in lines[:-1]]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        num_ended = sum(choice["finish_reason"] is not None for choice in choices)
        assert num_ended == body.get("n", 1), f"{num_ended} texts ended of {body}"
        assert chunks[-1].get("snpatch", {}).get("verified") is True, f"no verified receipt: {lines[-2]}"
        if ids is None:
            return "whole"
        assert [token for choice in choices for token in choice["token_ids"] or ()] == ids, f"wrong text of {body}"
        return "known"

    async def _leave(self, path: str, body: dict, chunks: int) -> str:
        """Close the connection after some chunks, or before the answer if `chunks` is 0."""
        timeout = asyncio.timeout(None if chunks else 0.1)
        with suppress(TimeoutError):
            async with timeout, self._session.post(path, json=body) as answer:
                async for line in _data(answer):
                    chunks -= 1
                    if line == "[DONE]":
                        return "ended first"
                    if chunks <= 0:
                        break
        return "left"

    async def _send_malformed(self, draw: Random) -> str:
        body = self._body(draw, COMPLETIONS)[1] | draw.choice(MALFORMED_FIELDS)
        text = json.dumps(body)
        if draw.random() < 0.2:
            text = text[: draw.randrange(len(text))]
        headers = {"content-type": "application/json"}
        async with self._session.post(COMPLETIONS, data=text, headers=headers) as answer:
            assert 400 <= answer.status < 500, f"{answer.status} for {text}: {await answer.text()}"
        return "malformed"

    async def _send_overflowing(self, draw: Random) -> str:
        """Scale all neurons three times; expect a 500, or an error chunk without a receipt."""
        path, body = self._body(draw)
        ranking, neurons = draw.choice(list(self._rankings.items()))
        interventions = [{"donor": OVERFLOW, "ranking": ranking, "window": neurons} for _ in range(3)]
        body["snpatch"] = {"recipient": draw.choice(self._models), "interventions": interventions}
        body["stream"] = is_stream = draw.random() < 0.5
        async with self._session.post(path, json=body) as answer:
            text = await answer.text()
        assert answer.status == (200 if is_stream else 500), f"{answer.status} for an overflow: {text}"
        assert "overflowed" in text, f"an overflow is not named: {text}"
        assert '"verified"' not in text, f"a receipt of an overflow: {text}"
        return "overflowed"

    def _body(self, draw: Random, path: str | None = None) -> tuple[str, dict]:
        """Return a path and a body without a patch."""
        path = path or draw.choice((COMPLETIONS, COMPLETIONS, COMPLETIONS, CHAT))
        words = draw.choices(WORDS.split(), k=draw.randrange(1, 20))
        ids = [draw.randrange(6, 100) for _ in range(draw.randrange(3, 64))]
        body = {"prompt": ids} if path == COMPLETIONS else {"messages": [{"role": "user", "content": " ".join(words)}]}
        body |= {"model": draw.choice(self._models), "max_tokens": draw.randrange(1, MAX_TOKENS)}
        body |= {"n": draw.randrange(1, MAX_TEXTS + 1), "seed": draw.randrange(100), "temperature": 1.0}
        if draw.random() < 0.3:
            body["cache_salt"] = draw.choice(("one", "two", "three"))
        return path, body

    def _patch(self, draw: Random) -> dict:
        donors = [*DONORS, *self._constants, *[draw.choice(self._models)] * 8]  # a patch has one model as a donor
        interventions = [self._intervention(draw, donors) for _ in range(draw.randrange(1, MAX_INTERVENTIONS + 1))]
        return {"recipient": draw.choice(self._models), "interventions": interventions}

    def _intervention(self, draw: Random, donors: list[str]) -> dict:
        ranking, neurons = draw.choice(list(self._rankings.items()))
        donor, window = draw.choice(donors), sorted(draw.randrange(neurons) for _ in range(2))
        intervention = {"donor": donor, "ranking": ranking, "window": window, "positions": draw.choice(POSITIONS)}
        intervention["strength"] = draw.choice((-0.5, 0.5, 1.0, 1.5))
        return intervention | ({"seed": draw.randrange(3)} if donor.startswith("noise") else {})

    async def _hold_socket(self, half: bytes) -> None:
        """Send half a request and wait; open another connection when the server closes this one."""
        address = urlsplit(self._order["url"])
        while True:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            with closing(writer), suppress(ConnectionResetError):
                writer.write(half)
                await reader.read()
            self.reopened += 1
            await asyncio.sleep(REOPEN_S)


async def _data(answer: aiohttp.ClientResponse):
    """Yield the data of each server-sent event."""
    async for line in answer.content:
        if line.startswith(b"data: "):
            yield line.removeprefix(b"data: ").decode().strip()


async def main() -> None:
    order = json.load(sys.stdin)
    options = {
        "connector": aiohttp.TCPConnector(limit=0, force_close=True),
        "timeout": aiohttp.ClientTimeout(TIMEOUT_S),
    }
    async with aiohttp.ClientSession(order["url"], **options) as session:
        async with session.get("/v1/snpatch") as answer:
            resources = await answer.json()
        attack = Attack(order, session, resources)
        await attack.run()
    print(json.dumps({"outcomes": attack.outcomes, "faults": attack.faults, "reopened": attack.reopened}))


if __name__ == "__main__":
    asyncio.run(main())
