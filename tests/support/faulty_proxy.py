"""An HTTP server that stands before a real one, or before a function, and does what servers should not do.

    with FaultyProxy("http://127.0.0.1:8000", faults=[Fault("status", status=500), None, Fault("hang")]) as proxy:
        ...  # proxy.url is what clients are told

The first POST gets the first fault, the second the second, and so on; None passes it on, as does the end of the list.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import httpx

Json = Any
Answer = tuple[int, Json]


@dataclass(frozen=True)
class Fault:
    """What happens to one POST.

    status     `status` is answered, with `message` and, if it is set, `Retry-After`
    hang       nothing is answered for `seconds`, then the connection is closed
    close      the connection is closed in the middle of the answer
    reset      the connection is closed before the answer
    truncate   the last prompt loses its last log-probability
    drop       the last prompt has no answer
    other_ids  the log-probabilities are those of other tokens
    garbage    the answer is no JSON
    stop       the proxy listens no more, and all its connections are closed, for `seconds`
    """

    kind: Literal["status", "hang", "close", "reset", "truncate", "drop", "other_ids", "garbage", "stop"]
    status: int = 500
    message: str = "injected"
    retry_after: str | None = None
    seconds: float = 60.0


class FaultyProxy:
    """See the module. `faults` may be a function of the body of a POST, too.

    upstream   base URL, or a function from path and body (None for a GET) to a status and JSON
    requests   path and body of each POST so far, in order of arrival
    headers    of the same
    peak       most POSTs that were in the works at one time
    """

    def __init__(
        self,
        upstream: str | Callable[[str, Json], Answer],
        faults: Iterable[Fault | None] | Callable[[Json], Fault | None] = (),
    ) -> None:
        self.upstream = upstream
        self._fault = faults if callable(faults) else (lambda script: lambda _: next(script, None))(iter(faults))
        self.requests: list[tuple[str, Json]] = []
        self.headers: list[dict[str, str]] = []
        self.gets: list[str] = []
        self.peak = self._busy = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server: Server | None = None
        self._port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> "FaultyProxy":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.stop()

    def start(self) -> None:
        """Listen, on the same port as before."""
        with self._lock:
            if self._server is None:
                self._server = Server(("127.0.0.1", self._port), _handler(self))
                self._port = self._server.server_address[1]
                threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections and close those there are."""
        with self._lock:
            server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.close_all()

    def handle(self, handler: "_Handler", body: Json) -> None:
        if body is None:
            with self._lock:
                self.gets.append(handler.path)
            handler.answer(*self._upstream(handler, None))
            return
        with self._lock:
            self.requests.append((handler.path, body))
            self.headers.append({name.lower(): value for name, value in handler.headers.items()})
            self._busy += 1
            self.peak = max(self.peak, self._busy)
            fault = self._fault(body)
        try:
            self._answer(handler, body, fault)
        finally:
            with self._lock:
                self._busy -= 1

    def _answer(self, handler: "_Handler", body: Json, fault: Fault | None) -> None:
        kind = fault.kind if fault else None
        if fault is None or kind in ("close", "truncate", "drop", "other_ids"):
            status, answer = self._upstream(handler, body)
            if kind == "close":
                handler.answer(status, answer, share=0.5)
                handler.hang_up()
            else:
                handler.answer(status, _spoil(answer, kind) if kind else answer)
        elif kind == "status":
            extra = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            handler.answer(fault.status, {"error": {"message": fault.message}}, extra)
        elif kind == "garbage":
            handler.answer(200, None, raw=b"<html>no JSON</html>")
        elif kind == "stop":
            self.stop()
            threading.Thread(target=self._start_later, args=(fault.seconds,), daemon=True).start()
        else:
            if kind == "hang":
                self._over.wait(fault.seconds)
            handler.hang_up()

    def _start_later(self, seconds: float) -> None:
        if not self._over.wait(seconds):
            self.start()

    def _upstream(self, handler: "_Handler", body: Json) -> Answer:
        if callable(self.upstream):
            return self.upstream(handler.path, body)
        headers = {"Authorization": handler.headers["Authorization"]} if handler.headers["Authorization"] else {}
        with httpx.Client(trust_env=False, timeout=600, headers=headers) as client:
            url = self.upstream + handler.path
            response = client.get(url) if body is None else client.post(url, json=body)
        return response.status_code, response.json() if response.content else {}


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_all(self) -> None:
        for connection in list(self.connections):
            close(connection)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: FaultyProxy

    def do_GET(self) -> None:
        self.proxy.handle(self, None)

    def do_POST(self) -> None:
        self.proxy.handle(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(
        self,
        status: int,
        answer: Json,
        extra: dict[str, str] | None = None,
        *,
        raw: bytes | None = None,
        share: float = 1.0,
    ) -> None:
        content = json.dumps(answer).encode() if raw is None else raw
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(extra or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: int(len(content) * share)])
        self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        close(self.connection)

    def log_message(self, *_: object) -> None:
        pass


def _handler(proxy: FaultyProxy) -> type[_Handler]:
    return type("_ProxyHandler", (_Handler,), {"proxy": proxy})


def close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # where the client was first
        connection.shutdown(socket.SHUT_RDWR)


def _spoil(answer: Json, kind: str) -> Json:
    """A completion with what `kind` says is wrong with it, in both ways to give log-probabilities."""
    spoilt = json.loads(json.dumps(answer))
    choices = spoilt["choices"]
    if kind == "drop":
        choices.pop()
    for choice in choices if kind == "other_ids" else choices[-1:]:
        entries, logprobs = choice.get("prompt_logprobs"), choice.get("logprobs")
        if kind == "truncate":
            for values in [entries, *((logprobs or {}).values())]:
                if isinstance(values, list):
                    values.pop()
        elif kind == "other_ids":
            if entries:
                choice["prompt_logprobs"] = [
                    entry and {str(int(token) + 1): value for token, value in entry.items()} for entry in entries
                ]
            if logprobs:
                numbers = [int(token.removeprefix("token_id:")) for token in logprobs["tokens"]]
                logprobs["tokens"] = [f"token_id:{number + 1}" for number in numbers]
    return spoilt


def wait_until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    """Return once `true` holds; an AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"not so within {seconds} s"
        time.sleep(0.01)
