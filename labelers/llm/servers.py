"""A pool of servers that speak the OpenAI protocol: requests in, answers out, whatever happens to one server.

Requests go to the least loaded server that answers, some at a time. A server that cannot be reached, or that fails
several times in a row, is left out, probed more and more rarely, and taken back when it answers. What becomes of a
request depends on whose fault it may be:

- no connection, or HTTP 429: the server's. Another try, elsewhere where there is an elsewhere, and not counted.
- HTTP 5xx or 408, a timeout, a connection that breaks before the answer is complete, an answer that is wrong: perhaps
  the request's, since a request can be what kills its server. Another try, but only a few of them, then `Refused`; the
  last try has a server to itself, so that none is refused for what a neighbour does.
- any other HTTP 4xx: the request's. `Refused` at once.
- a refused key, an unknown model, no server left for longer than the pool's patience: nobody's document. `ModelError`.

The key comes from the environment (`LACY_API_KEY`, else `OPENAI_API_KEY`), and stands in no log and no message.
"""

import asyncio
import logging
import math
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from lacy.schemas.errors import ModelError

log = logging.getLogger(__name__)

T = TypeVar("T")
Body = dict[str, Any]
KEYS = ("LACY_API_KEY", "OPENAI_API_KEY")
TRIES = 4  # of one request, for faults that may be its own
FAULTS_IN_A_ROW = 3  # after which a server is left out; fewer than TRIES, so that no request pays for a dead server
MOST_ATTEMPTS = 100  # of one request, with those that are not counted as tries
LONGEST_BACKOFF = 30.0  # seconds
LONGEST_RETRY_AFTER = 60.0  # seconds that a server may ask for
CONNECT_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # servers close an idle connection themselves after 5 or so; a request must not meet that
PROBE_PATHS = ("/health", "/v1/models")


class BadAnswerError(Exception):
    """A server answered, but not what was asked for."""


@dataclass(frozen=True)
class Refused:
    """A request that no server answers, for a reason that is its own; one line."""

    reason: str


class ServerPool:
    """Servers with their health and connections, which last over calls; a thread of its own does the talking.

    servers      base URLs, http or https, with or without `/v1`
    concurrency  most requests in flight on one server from this pool
    timeout      seconds for one request, from sending to the last byte of its answer
    patience     seconds without any server after which a call gives up
    backoff      seconds before the first further try; each later one waits about twice as long

    Raises `ModelError` for a URL that is none; nothing is sent before the first call.
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
            raise ModelError("no server is named", usage=True)
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
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            verify=any(url.startswith("https:") for url in self.urls),  # no certificates are read in vain
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout / 2), pool=None),
            limits=httpx.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=KEEP_ALIVE_SECONDS
            ),
        )
        if (logger := logging.getLogger("httpx")).level == logging.NOTSET:
            logger.setLevel(logging.WARNING)  # it tells of every request
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server pool", daemon=True)
        self._thread.start()

    def post_all(
        self,
        path: str,
        bodies: Iterable[Body],
        accept: Callable[[Any, Body], T],
        on_done: Callable[[int, T | Refused], None] | None = None,
    ) -> list[T | Refused]:
        """POST each body as JSON to `path` on some server; what became of each, in the order of the bodies.

        bodies   taken one by one as servers become free, in the pool's thread
        accept   turns the JSON of an answer into a result, or raises `BadAnswerError`; called in the pool's thread
        on_done  is told the place and the result of each request as it is done; called in this thread

        Raises `ModelError` for what concerns no single request, and what `bodies`, `accept` and `on_done` raise. When
        this raises, KeyboardInterrupt included, what is in flight is cancelled.
        """
        done: queue.SimpleQueue[tuple[int, T | Refused] | None] = queue.SimpleQueue()
        numbered = enumerate(bodies)
        results: dict[int, T | Refused] = {}
        future = self._submit(self._post_all(path, numbered, accept, done.put))
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
        """What `/v1/models` lists on each server that answers, by base URL; empty where a server has no such list.

        Servers that do not answer are left out, and taken back when they do. Raises `ModelError` when none answers
        for longer than the pool's patience, or when one refuses the key.
        """
        future = self._submit(self._models())
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what is in flight and close the connections. Closing twice is harmless."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Any:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the server pool is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

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
            server = await self._take(avoid, alone=tries == TRIES - 1)
            try:
                result = await self._send(server, path, body, accept)
            except _AttemptError as fault:
                avoid, reason, counts = server, fault.reason, fault.counts
                self._note(server, fault, attempt)
            else:
                self._take_back(server)
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
        raise ModelError(f"no server took a request in {MOST_ATTEMPTS} attempts, the last said: {reason}")

    async def _send(self, server: "_Server", path: str, body: Body, accept: Callable[[Any, Body], T]) -> T | Refused:
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(server.url + path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _AttemptError(
                f"no connection to {server.url} ({self._line(error)})", gone=True, counts=False
            ) from None
        except (TimeoutError, httpx.TimeoutException):
            raise _AttemptError(f"{server.url} did not answer within {self._timeout:g} s") from None
        except httpx.RequestError as error:
            raise _AttemptError(f"{server.url} broke off its answer ({self._line(error)})") from None
        status = response.status_code
        if status == 200:
            try:
                answer = response.json()
            except ValueError:
                raise _AttemptError(f"{server.url} answered no JSON") from None
            try:
                return accept(answer, body)
            except BadAnswerError as error:
                raise _AttemptError(f"{server.url} answered wrongly: {self._line(error)}") from None
        if status in (401, 403):
            raise ModelError(f"{server.url} refused the key: set {KEYS[0]}")
        if status == 404:
            raise ModelError(await self._not_found(server, path, body))
        reason = f"answered HTTP {status}: {self._line(_message(response))}"
        if 400 <= status < 500 and status not in (408, 429):
            return Refused(f"the server {reason}")  # whichever it was
        pause = _retry_after(response) if status in (429, 503) else None
        raise _AttemptError(f"{server.url} {reason}", counts=status != 429, pause=pause)

    async def _take(self, avoid: "_Server | None", alone: bool) -> "_Server":
        """A place on the least loaded server, or a server that is idle and stays so; `avoid` where no other is up."""
        while True:  # each round waits for a request in flight, a pause or a probe, which all have their bounds
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
                self._leave_out(server, fault.reason)

    def _leave_out(self, server: "_Server", reason: str) -> None:
        server.reason = reason
        if not server.up:
            return
        server.up = False
        log.warning("%s is left out for now: %s", server.url, reason)
        if self._gone_since is None and not any(other.up for other in self._servers):
            self._gone_since = time.monotonic()
        task = asyncio.create_task(self._probe(server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._notify()

    def _take_back(self, server: "_Server") -> None:
        if not server.up:
            log.warning("%s is back", server.url)
            server.up, server.faults, self._gone_since = True, 0, None
            self._notify()

    async def _probe(self, server: "_Server") -> None:
        while not server.up:  # ever more rarely, until it answers or the pool is closed
            server.probe_after = min(max(2 * server.probe_after, self._backoff), LONGEST_BACKOFF)
            await asyncio.sleep(server.probe_after * self._random.uniform(0.5, 1))
            if await self._answers(server):
                self._take_back(server)

    async def _answers(self, server: "_Server") -> bool:
        for path in PROBE_PATHS:
            try:
                response = await self._client.get(server.url + path, timeout=CONNECT_SECONDS)
            except httpx.RequestError:
                return False
            if response.status_code not in (404, 405):
                return response.status_code < 500
        return True  # it has neither path, but speaks HTTP

    async def _models(self) -> dict[str, list[dict[str, Any]]]:
        began, warned = time.monotonic(), False
        for attempt in range(10**6):  # as long as patience lasts
            listings = await asyncio.gather(*map(self._listing, self._servers), return_exceptions=True)
            found, faults = {}, []
            for server, listing in zip(self._servers, listings, strict=True):
                if isinstance(listing, _AttemptError):
                    server.reason = listing.reason
                    faults.append(server)
                elif isinstance(listing, BaseException):
                    raise listing
                else:
                    found[server.url] = listing
            if found:
                for server in faults:
                    self._leave_out(server, server.reason)
                return found
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
            response = await self._client.get(server.url + "/v1/models", timeout=CONNECT_SECONDS)
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
            return f"{server.url} has no {path}: name the base URL of a server that speaks the OpenAI protocol"
        return f"{server.url} has no model {body.get('model')!r}; it has: {', '.join(names)}"

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
        self.alone = False  # the one in flight is to have no other beside it
        self.faults = 0  # in a row
        self.reason = ""  # why it was left out last
        self.not_before = 0.0  # monotonic time until which it asked for peace
        self.probe_after = 0.0  # seconds between the last two probes


class _AttemptError(Exception):
    """One attempt failed. `counts`: as a try of the request; `gone`: no connection; `pause`: seconds asked for."""

    def __init__(self, reason: str, *, counts: bool = True, gone: bool = False, pause: float | None = None) -> None:
        super().__init__(reason)
        self.reason, self.counts, self.gone, self.pause = reason, counts, gone, pause


def base_url(url: str) -> str:
    """A server's URL without `/v1` and slash at its end; raises `ModelError` for what is none."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL:
        raise ModelError("a server's URL cannot be read: name it like http://127.0.0.1:8000", usage=True) from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ModelError(f"a server's URL is only scheme, host, port and path; its key goes into {KEYS[0]}", usage=True)
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ModelError(f"{url!r} is no server's URL: name it like http://127.0.0.1:8000", usage=True)
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def pick_model(pool: ServerPool, name: str, *, exact: bool = False) -> tuple[str, int | None]:
    """The name to ask the servers for, and the least `max_model_len` that they report, in tokens.

    It is `name` where the servers have it, else, unless `exact`, their only model. Raises `ModelError` where neither
    holds for all servers that answer, and as `ServerPool.models` does.
    """
    listings = {url: {entry["id"]: entry for entry in entries} for url, entries in pool.models().items()}
    known = {url: entries for url, entries in listings.items() if entries}
    only = {next(iter(entries)) for entries in known.values() if len(entries) == 1}
    if not exact and known and not any(name in entries for entries in known.values()) and len(only) == 1:
        name = only.pop()
    for url, entries in known.items():
        if name not in entries:
            raise ModelError(f"{url} has no model {name!r}; it has: {', '.join(entries)}", usage=True)
    lengths = [entries[name].get("max_model_len") for entries in known.values()]
    return name, min((length for length in lengths if isinstance(length, int)), default=None)


def api_key() -> str | None:
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ModelError(f"{name} holds characters that no key has: set it again")
            return key
    return None


def _message(response: httpx.Response) -> str:
    """What a server says is wrong, out of the usual places."""
    try:
        answer = response.json()
    except ValueError:
        return response.text or response.reason_phrase
    for name in ("error", "message", "detail"):
        if isinstance(answer, dict) and answer.get(name):
            answer = answer[name]
    return answer if isinstance(answer, str) else str(answer)


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for (a number or a date), capped; None where it does not."""
    text = response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None
