"""An HTTP client for servers that speak the OpenAI protocol, with its base URLs and its key.

The key comes from the environment (`LACY_API_KEY`, else `OPENAI_API_KEY`). Callers keep it out of logs and messages.
"""

import asyncio
import logging
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

import httpx

from lacy.schemas.errors import ModelError

T = TypeVar("T")
KEYS = ("LACY_API_KEY", "OPENAI_API_KEY")
CONNECT_SECONDS = 10.0
CLOSE_SECONDS = 10.0
KEEP_ALIVE_SECONDS = 2.0  # shorter than the 5 or so after which servers close an idle connection themselves


class ClientThread:
    """An `httpx.AsyncClient` whose event loop runs in a thread of its own, as there may be another loop in this one.

    timeout      seconds for one request
    key          sent as a bearer token; None: no key
    connections  open at a time, at most; None: no limit
    verify       check certificates; without any https server, reading them takes time for nothing
    """

    def __init__(
        self, *, timeout: float, key: str | None = None, connections: int | None = None, verify: bool = True
    ) -> None:
        self.http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            verify=verify,
            timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout / 2), pool=None),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_ALIVE_SECONDS
            ),
        )
        if (logger := logging.getLogger("httpx")).level == logging.NOTSET:
            logger.setLevel(logging.WARNING)  # it logs every request
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http client", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine in the client's thread. Raises RuntimeError after `close`."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the client's thread, and cancel it if this thread is interrupted."""
        future = self.submit(work)
        try:
            return future.result()
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what is in flight and close the connections. Closing twice is harmless."""
        if self._loop.is_closed():
            return
        with suppress(Exception):
            self.submit(self._shut_down()).result(timeout=CLOSE_SECONDS)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=CLOSE_SECONDS)
        if not self._thread.is_alive():
            self._loop.close()

    async def _shut_down(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.http.aclose()


def base_url(url: str) -> str:
    """A server's URL without `/v1` and a slash at its end. Raises `ModelError` for anything but an http(s) URL."""
    try:
        parsed = httpx.URL(url.strip())
    except httpx.InvalidURL:
        raise ModelError("a server's URL cannot be read: write it like http://127.0.0.1:8000", usage=True) from None
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise ModelError(
            f"a server's URL has only scheme, host, port and path; its key goes into {KEYS[0]}", usage=True
        )
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ModelError(f"{url!r} is not a server's URL: write it like http://127.0.0.1:8000", usage=True)
    return str(parsed).rstrip("/").removesuffix("/v1").rstrip("/")


def api_key() -> str | None:
    """The key from the environment; None without one. Raises `ModelError` for characters that no key has."""
    for name in KEYS:
        if key := os.environ.get(name, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ModelError(f"{name} contains characters that no key has: set it again")
            return key
    return None
