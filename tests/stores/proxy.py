"""A proxy that stands before a store and does to it what networks and stores do.

with StoreProxy("127.0.0.1:5000") as proxy:
    proxy.every(7)  # each seventh request meets a fault, of the kinds in turn
    ...  # proxy.url is what clients are told
"""

import http.client
import itertools
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Literal

from tests.support.faulty_proxy import Server, close

Kind = Literal["403", "500", "503", "slow", "reset", "cut", "lost"]
KINDS: tuple[Kind, ...] = ("500", "lost", "slow", "cut", "503", "reset")
SLOW = 0.3  # seconds
HOP = {"connection", "keep-alive", "transfer-encoding", "content-length", "te", "trailer", "upgrade", "host"}


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str
    fault: Kind | None
    bytes: int  # of the answer


class StoreProxy:
    """`upstream`: host and port. `fault` says what a request meets, by its method and path.

    403, 500, 503  is answered, and the store knows nothing of it
    slow      is answered late
    reset     the connection is closed before the store sees the request
    lost      the store does what it is asked, and the connection is closed before the answer
    cut       the same, in the middle of the answer
    """

    def __init__(self, upstream: str):
        self.upstream = upstream
        self.requests: list[Request] = []
        self.fault: Callable[[str, str], Kind | None] = lambda method, path: None

    def every(self, number: int, kinds: Sequence[Kind] = KINDS) -> None:
        """From now on each request of this number meets a fault; 0: none does."""
        turn, count = itertools.cycle(kinds), itertools.count(1)
        self.fault = lambda method, path: next(turn) if number and next(count) % number == 0 else None

    def __enter__(self) -> "StoreProxy":
        self._server = Server(("127.0.0.1", 0), type("_Handler", (_Handler,), {"proxy": self}))
        self.address = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.address}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.close_all()

    def faults(self) -> set[Kind]:
        return {request.fault for request in self.requests if request.fault}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    proxy: StoreProxy

    def _handle(self) -> None:
        body = self._body()
        fault = self.proxy.fault(self.command, self.path)
        if fault == "slow":
            time.sleep(SLOW)
        status, headers, content = 0, [], b""
        if fault in ("403", "500", "503"):
            status = int(fault)
        elif fault != "reset":
            status, headers, content = self._ask(body)
        asked = self.headers.get("Range", "")
        self.proxy.requests.append(Request(self.command, self.path, asked, fault, len(content)))
        if fault in ("reset", "lost"):
            self._hang_up()
            return
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in HOP:
                self.send_header(name, value)
        length = dict((name.lower(), value) for name, value in headers).get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
        self.wfile.flush()
        if fault == "cut":
            self._hang_up()

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _handle  # noqa: N815

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            headers = {name: value for name, value in self.headers.items() if name.lower() not in HOP}
            headers["Content-Length"] = str(len(body))
            if expected := headers.pop("Expect", None):
                assert expected == "100-continue"
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.getheaders(), answer.read()
        finally:
            connection.close()

    def _hang_up(self) -> None:
        self.close_connection = True
        close(self.connection)

    def log_message(self, *_: object) -> None:
        pass
