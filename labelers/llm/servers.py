"""A pool of servers that speak the OpenAI protocol: requests in, answers out, whatever happens to one server.

Requests go to the least busy server that answers, several at a time. A server that cannot be reached, or that fails
several times in a row, is taken out of the pool, probed less and less often, and put back when it answers. What happens
to a failed request depends on whose fault it may be:

- no connection, or HTTP 429: the server's. Tried again, on another server if there is one; the try is not counted.
- HTTP 5xx or 408, a timeout, a connection that breaks before the answer is complete, a wrong answer: perhaps the
  request's, as a request can kill its server. It is tried a few more times, then `Refused`. The last try has a server
  to itself, so that no request is refused for what another one does.
- any other HTTP 4xx: the request's. `Refused` at once.
- a refused key, an unknown model, no server left for longer than the pool's patience: no request's. `ModelError`.

The server's key (`lacy.labelers.llm.client`) is in no log and no message.
"""

import asyncio
import logging
import math
import queue
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from lacy.labelers.llm.client import CONNECT_SECONDS, KEYS, ClientThread, api_key, base_url
from lacy.schemas.errors import ModelError

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = dict[str, Any]
TRIES = 4  # of one request, for faults that may be its own
FAULTS_IN_A_ROW = 3  # that take a server out; fewer than TRIES, so that no request pays for a dead server
MOST_ATTEMPTS = 100  # of one request, including those that are not counted as tries
LONGEST_BACKOFF = 30.0  # seconds
LONGEST_RETRY_AFTER = 60.0  # seconds that a server may ask for
PROBE_PATHS = ("/health", "/v1/models")


class BadAnswerError(Exception):
    """A server answered, but not what was asked for."""


@dataclass(frozen=True)
class Refused:
    """A request that no server answers, for a reason of its own, in one line."""

    reason: str


class ServerPool:
    """Servers with their health and connections, which outlast calls; a thread of its own sends the requests.

    servers      base URLs, http or https, with or without `/v1`
    concurrency  requests in flight on one server from this pool, at most
    timeout      seconds for one request, from sending it to the last byte of its answer
    patience     seconds without any server after which a call gives up
    backoff      seconds before the second try; each later one waits about twice as long

    Raises `ModelError` for an invalid URL; nothing is sent before the first call.
    """

    def __init__(
        self,
        servers: list[str],
        *,
        concurrency: int = 8,
        timeout: float = 600.0,
        patience: float = 300.0,
        backoff: float = 0.5,
    ) -> None:
        if not servers:
            raise ModelError("no server is given: pass at least one", usage=True)
        if concurrency < 1 or timeout <= 0 or patience < 0 or backoff <= 0:
            raise ValueError("concurrency, timeout and backoff must be above 0, and patience not below")
        self.urls = list(dict.fromkeys(base_url(url) for url in servers))
        self._servers = [_Server(url) for url in self.urls]
        self._concurrency, self._timeout, self._patience, self._backoff = concurrency, timeout, patience, backoff
        self._key = api_key()
        self._random = random.Random()  # for jitter alone
        self._gone_since: float | None = None  # since when no server is up
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._client = ClientThread(
            timeout=timeout, key=self._key, verify=any(url.startswith("https:") for url in self.urls)
        )

    def post_all(
        self,
        path: str,
        bodies: Iterable[Body],
        accept: Callable[[Any, Body], T],
        on_done: Callable[[int, T | Refused], None] | None = None,
    ) -> list[T | Refused]:
        """POST each body as JSON to `path` on some server; the results are in the order of the bodies.

        bodies   taken one by one as servers become free, in the pool's thread
        accept   turns the JSON of an answer into a result, or raises `BadAnswerError`; called in the pool's thread
        on_done  gets the index and the result of each request when it is done; called in this thread

        Raises `ModelError` for faults of no single request, and what `bodies`, `accept` and `on_done` raise. When this
        raises, including KeyboardInterrupt, requests in flight are cancelled.
        """
        done: queue.SimpleQueue[tuple[int, T | Refused] | None] = queue.SimpleQueue()
        numbered = enumerate(bodies)
        results: dict[int, T | Refused] = {}
        future = self._client.submit(self._post_all(path, numbered, accept, done.put))
        future.add_done_callback(lambda _: done.put(None))
        try:
            while (item := done.get()) is not None:
                results[item[0]] = item[1]
                if on_done:
                    on_done(*item)
            future.result()
        finally:
            future.cancel()
        return [results[index] for index in range(len(results))]

    def models(self) -> dict[str, list[dict[str, Any]]]:
        """The entries of `/v1/models` by base URL, for each server that answers; empty if a server has no such list.

        Servers that do not answer are taken out, and put back when they do. Raises `ModelError` if none answers for
        longer than the pool's patience, or if one refuses the key.
        """
        return self._client.run(self._models())

    def close(self) -> None:
        """Cancel requests in flight and close the connections. Closing twice is harmless."""
        self._client.close()

    async def _post_all(
        self,
        path: str,
        bodies: Iterator[tuple[int, Body]],
        accept: Callable[[Any, Body], T],
        put: Callable[[tuple[int, T | Refused]], None],
    ) -> None:
        async def work() -> None:
            for index, body in bodies:
                put((index, await self._post(path, body, accept)))

        workers = [asyncio.create_task(work()) for _ in range(self._concurrency * len(self._servers))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _post(self, path: str, body: Body, accept: Callable[[Any, Body], T]) -> T | Refused:
        avoid: _Server | None = None
        tries, reason = 0, ""
        for attempt in range(MOST_ATTEMPTS):
            server = await self._reserve(avoid, alone=tries == TRIES - 1)
            try:
                result = await self._send(server, path, body, accept)
            except _AttemptError as fault:
                avoid, reason, counts = server, fault.reason, fault.counts
                self._note(server, fault, attempt)
            else:
                self._put_back(server)
                server.faults, server.probe_after = 0, 0.0
                return result
            finally:
                server.in_flight -= 1
                server.alone = False
                self._notify()
            if counts:
                tries += 1
                if tries == TRIES:
                    return Refused(f"{tries} tries failed, the last with: {reason}")
                await asyncio.sleep(self._delay(tries - 1))
        raise ModelError(f"no server accepted a request in {MOST_ATTEMPTS} attempts; the last one: {reason}")

    async def _send(self, server: "_Server", path: str, body: Body, accept: Callable[[Any, Body], T]) -> T | Refused:
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.http.post(server.url + path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _AttemptError(
                f"no connection to {server.url} ({self._line(error)})", gone=True, counts=False
            ) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _AttemptError(f"{server.url} did not answer within {self._timeout:g} s") from None
        except httpx.RequestError as error:
            raise _AttemptError(f"{server.url} did not complete its answer ({self._line(error)})") from None
        status = response.status_code
        if status == 200:
            try:
                answer = response.json()
            except ValueError:
                raise _AttemptError(f"{server.url} did not answer with JSON") from None
            try:
                return accept(answer, body)
            except BadAnswerError as error:
                raise _AttemptError(f"{server.url} gave a wrong answer: {self._line(error)}") from None
        if status in (401, 403):
            raise ModelError(f"{server.url} refused the key: set {KEYS[0]}")
        if status == 404:
            raise ModelError(await self._not_found(server, path, body))
        reason = f"answered HTTP {status}: {self._line(_message(response))}"
        if 400 <= status < 500 and status not in (408, 429):
            return Refused(f"the server {reason}")  # without its URL: it does not matter which
        pause = _retry_after(response) if status in (429, 503) else None
        raise _AttemptError(f"{server.url} {reason}", counts=status != 429, pause=pause)

    async def _reserve(self, avoid: "_Server | None", alone: bool) -> "_Server":
        """Reserve the least busy server, or, for `alone`, an idle one; `avoid` only if no other is up."""
        while True:  # each round waits for a request in flight, a pause or a probe, which are all bounded
            now = time.monotonic()
            up = [server for server in self._servers if server.up]
            ready = [server for server in up if server.not_before <= now]
            wanted = [server for server in ready if server is not avoid] or ready
            most = 0 if alone else self._concurrency - 1
            free = [server for server in wanted if server.in_flight <= most and not server.alone]
            if free:
                server = min(free, key=lambda server: server.in_flight)
                server.in_flight += 1
                server.alone = alone
                return server
            until = [server.not_before - now for server in up if server.not_before > now]
            if not up:
                left = self._patience - (now - (self._gone_since or now))
                if left <= 0:
                    raise ModelError(self._gone())
                until = [left]
            changed = self._changed
            with suppress(TimeoutError):
                async with asyncio.timeout(min(until, default=None)):
                    await changed.wait()

    def _note(self, server: "_Server", fault: "_AttemptError", attempt: int) -> None:
        if fault.pause is not None or not (fault.counts or fault.gone):
            server.not_before = time.monotonic() + max(fault.pause or 0.0, self._delay(attempt))
        if fault.counts or fault.gone:
            server.faults += 1
            if fault.gone or server.faults >= FAULTS_IN_A_ROW:
                self._take_out(server, fault.reason)

    def _take_out(self, server: "_Server", reason: str) -> None:
        server.reason = reason
        if not server.up:
            return
        server.up = False
        log.warning("%s is out of the pool for now: %s", server.url, reason)
        if self._gone_since is None and not any(other.up for other in self._servers):
            self._gone_since = time.monotonic()
        task = asyncio.create_task(self._probe(server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._notify()

    def _put_back(self, server: "_Server") -> None:
        if not server.up:
            log.warning("%s is back", server.url)
            server.up, server.faults, self._gone_since = True, 0, None
            self._notify()

    async def _probe(self, server: "_Server") -> None:
        while not server.up:  # less and less often, until it answers or the pool is closed
            server.probe_after = min(max(2 * server.probe_after, self._backoff), LONGEST_BACKOFF)
            await asyncio.sleep(server.probe_after * self._random.uniform(0.5, 1))
            if await self._answers(server):
                self._put_back(server)

    async def _answers(self, server: "_Server") -> bool:
        for path in PROBE_PATHS:
            try:
                response = await self._client.http.get(server.url + path, timeout=CONNECT_SECONDS)
            except httpx.RequestError:
                return False
            if response.status_code not in (404, 405):
                return response.status_code < 500
        return True  # it has neither path, but it speaks HTTP

    async def _models(self) -> dict[str, list[dict[str, Any]]]:
        began, warned = time.monotonic(), False
        for attempt in range(10**6):  # as long as patience lasts
            listings = await asyncio.gather(*map(self._listing, self._servers), return_exceptions=True)
            answered, silent = {}, []
            for server, listing in zip(self._servers, listings, strict=True):
                if isinstance(listing, _AttemptError):
                    server.reason = listing.reason
                    silent.append(server)
                elif isinstance(listing, BaseException):
                    raise listing
                else:
                    answered[server.url] = listing
            if answered:
                for server in silent:
                    self._take_out(server, server.reason)
                return answered
            left = self._patience - (time.monotonic() - began)
            if left <= 0:
                break
            if not warned:
                log.warning("%s; waiting up to %.0f s", self._gone(), left)
                warned = True
            await asyncio.sleep(min(left, self._delay(attempt)))
        raise ModelError(self._gone())

    async def _listing(self, server: "_Server") -> list[dict[str, Any]]:
        try:
            response = await self._client.http.get(server.url + "/v1/models", timeout=CONNECT_SECONDS)
        except httpx.RequestError as error:
            raise _AttemptError(f"no connection to {server.url} ({self._line(error)})") from None
        if response.status_code in (401, 403):
            raise ModelError(f"{server.url} refused the key: set {KEYS[0]}")
        if response.status_code >= 500 or response.status_code == 429:
            raise _AttemptError(f"{server.url} answered HTTP {response.status_code}: {self._line(_message(response))}")
        try:
            entries = response.json()["data"] if response.status_code == 200 else []
            return [entry for entry in entries if isinstance(entry["id"], str)]
        except (ValueError, LookupError, TypeError):
            return []

    async def _not_found(self, server: "_Server", path: str, body: Body) -> str:
        try:
            names = [entry["id"] for entry in await self._listing(server)]
        except _AttemptError:
            names = []
        if not names or body.get("model") in names:
            return f"{server.url} has no {path}: pass the base URL of a server that speaks the OpenAI protocol"
        return f"{server.url} has no model {body.get('model')!r}: use one of {', '.join(names)}"

    def _gone(self) -> str:
        return f"no server answers: {'; '.join(server.reason or server.url for server in self._servers)}"

    def _delay(self, failures: int) -> float:
        return min(self._backoff * 2.0 ** min(failures, 16), LONGEST_BACKOFF) * self._random.uniform(0.5, 1)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _line(self, text: object) -> str:
        line = " ".join(str(text).split()) or type(text).__name__
        return (line.replace(self._key, "***") if self._key else line)[:300]


class _Server:
    def __init__(self, url: str) -> None:
        self.url = url
        self.up = True
        self.in_flight = 0
        self.alone = False  # its request in flight must stay the only one
        self.faults = 0  # in a row
        self.reason = ""  # why it was last taken out
        self.not_before = 0.0  # monotonic time until which it asked to be left alone
        self.probe_after = 0.0  # seconds between the last two probes


class _AttemptError(Exception):
    """A failed attempt. `counts`: as a try of the request; `gone`: no connection; `pause`: seconds asked for."""

    def __init__(self, reason: str, *, counts: bool = True, gone: bool = False, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.counts, self.gone, self.pause = reason, counts, gone, pause


def pick_model(pool: ServerPool, name: str, *, exact: bool = False) -> tuple[str, int | None]:
    """The servers' name of the model, and the smallest `max_model_len` that they report, in tokens.

    It is `name` if the servers have it, else, unless `exact`, their only model. Raises `ModelError` if neither holds
    for all servers that answer, and as `ServerPool.models` does.
    """
    listings = {url: {entry["id"]: entry for entry in entries} for url, entries in pool.models().items()}
    known = {url: entries for url, entries in listings.items() if entries}
    only = {next(iter(entries)) for entries in known.values() if len(entries) == 1}
    if not exact and known and not any(name in entries for entries in known.values()) and len(only) == 1:
        name = only.pop()
    for url, entries in known.items():
        if name not in entries:
            raise ModelError(f"{url} has no model {name!r}: use one of {', '.join(entries)}", usage=True)
    lengths = [entries[name].get("max_model_len") for entries in known.values()]
    return name, min((length for length in lengths if isinstance(length, int)), default=None)


def _message(response: httpx.Response) -> str:
    """The server's error message, from wherever servers usually put it."""
    try:
        answer = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return answer if isinstance(answer, str) else str(answer)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for (as a number or a date), capped; None if it does not ask."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None
