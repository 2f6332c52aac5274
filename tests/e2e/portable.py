"""Beam's job server and a pool of three workers, each in a network namespace of its own where that is allowed."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

HERE = Path(__file__).parent
COUNT = 3


@dataclass(frozen=True)
class Cluster:
    job_endpoint: str
    pool: str
    namespaces: bool
    folder: Path  # the processes' logs, and the workers' ids

    @property
    def beam_options(self) -> list[str]:
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={self.job_endpoint}",
            "--environment_type=EXTERNAL",
            f"--environment_config={self.pool}",
            f"--direct_num_workers={COUNT}",
        ]

    def workers(self) -> list[psutil.Process]:
        """Those that live, the oldest first."""
        found = []
        for path in sorted(self.folder.glob("worker_*.pid"), key=lambda path: int(path.stem.partition("_")[2])):
            with contextlib.suppress(psutil.NoSuchProcess):
                worker = psutil.Process(int(path.read_text()))
                if worker.status() != psutil.STATUS_ZOMBIE:
                    found.append(worker)
        return found

    def kill_workers(self) -> None:
        for worker in self.workers():
            worker.kill()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Both end, with all workers, when the block does."""
    with contextlib.ExitStack() as stack:
        prefix = f"lacy-{os.getpid()}-"
        address = stack.enter_context(_network(prefix)) if _may_make_networks() else None
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "WORKERS": str(folder),
            "NAMESPACES": prefix if address else "",
        }
        # Beam tells its workers the name of the job server's host: here that is an address which they reach.
        as_host = ["unshare", "--uts", "sh", "-c", f'hostname {address}; exec "$@"', "sh"] if address else []
        port = _free_port()
        commands = {
            "job-server": [*as_host, sys.executable, HERE / "job_server.py", "--port_file", folder / "port"],
            "pool": [
                *(sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main"),
                *("--service_port", str(port), "--container_executable", HERE / "worker.sh"),
            ],
        }
        for name, command in commands.items():
            log = stack.enter_context(open(folder / f"{name}.log", "wb"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            stack.callback(process.wait)
            stack.callback(process.kill)
        deadline = time.monotonic() + 100
        while not (folder / "port").exists():
            assert time.monotonic() < deadline, (folder / "job-server.log").read_text()
            time.sleep(0.05)
        found = Cluster(f"localhost:{(folder / 'port').read_text()}", f"localhost:{port}", bool(address), folder)
        stack.callback(found.kill_workers)
        yield found


def _may_make_networks() -> bool:
    if os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("unshare")):
        return False
    probe = f"lacy-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return False
    return subprocess.run(["ip", "netns", "del", probe], capture_output=True).returncode == 0


@contextlib.contextmanager
def _network(prefix: str) -> Iterator[str]:
    """Namespaces `prefix`0, 1, ... on one bridge; the address by which they reach this host."""
    number = os.getpid()
    bridge, subnet = f"lacy{number}", f"10.{64 + number % 128}.{number // 128 % 256}"

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    with contextlib.ExitStack() as stack:
        ip("link", "add", bridge, "type", "bridge")
        stack.callback(ip, "link", "del", bridge)
        ip("addr", "add", f"{subnet}.1/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for index in range(COUNT):
            space, link = f"{prefix}{index}", f"lacy{number}v{index}"
            ip("netns", "add", space)
            stack.callback(ip, "netns", "del", space)
            ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", link, "master", bridge, "up")
            ip("-n", space, "addr", "add", f"{subnet}.{10 + index}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield f"{subnet}.1"


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
