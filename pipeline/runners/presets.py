"""`--on dataflow|flink|portable`: Beam's options for a cluster.

A preset fills in Beam's own options and prints them; options after -- come later, so they win. None of them decides a
byte of a dataset, so none is in the manifest.

Processes and threads. A process that tags keeps one core busy (the GIL); one that scores mostly waits for an engine,
which all processes of a machine share (`labelers.llm.engines`). So both kinds of machine get Dataflow's default, one
process per core, and one thread in each: tagging fills the cores, and scoring always has parts ready for the engines.
Beam's image lets Dataflow start all processes in one container, in whose temporary folder they find the engines of
their machine; one process per machine (`no_use_multiple_sdk_containers`) would prepare and write the parts of all its
GPUs on one core.
"""

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from pydantic import model_validator

from lacy.schemas.errors import UsageError
from lacy.schemas.options import Options, option

TAGGER = "n2-standard-8"  # 4 GB per core; a process with spaCy takes up to 2 GB
TAGGER_CORES, TAGGER_RAM_GB = 8, 32
DISK_GB = 100  # an image with CUDA and vLLM takes 20 GB, plus the model


@dataclass(frozen=True)
class Machine:
    name: str
    cores: int
    ram_gb: int


@dataclass(frozen=True)
class Gpu:
    accelerator: str  # Dataflow's name for it
    machines: dict[int, Machine]  # by the number of GPUs


GPUS = {
    "l4": Gpu(
        "nvidia-l4",
        {
            1: Machine("g2-standard-8", 8, 32),
            2: Machine("g2-standard-24", 24, 96),
            4: Machine("g2-standard-48", 48, 192),
            8: Machine("g2-standard-96", 96, 384),
        },
    ),
    "a100": Gpu(
        "nvidia-tesla-a100",
        {
            1: Machine("a2-highgpu-1g", 12, 85),
            2: Machine("a2-highgpu-2g", 24, 170),
            4: Machine("a2-highgpu-4g", 48, 340),
            8: Machine("a2-highgpu-8g", 96, 680),
        },
    ),
    "h100": Gpu(
        "nvidia-h100-80gb",
        {
            1: Machine("a3-highgpu-1g", 26, 234),
            2: Machine("a3-highgpu-2g", 52, 468),
            4: Machine("a3-highgpu-4g", 104, 936),
            8: Machine("a3-highgpu-8g", 208, 1872),
        },
    ),
}
OWN = {  # the runners that an option is for; options not listed are for all
    "project": ("dataflow",),
    "region": ("dataflow",),
    "temp_location": ("dataflow",),
    "max_workers": ("dataflow",),
    "flink_master": ("flink",),
    "job_endpoint": ("portable",),
    "worker_pool": ("flink", "portable"),
}


class Cluster(Options):
    """The machines that run a job."""

    on: Literal["dataflow", "flink", "portable"] = option(
        description="Kind of machines that do the work.", panel="Other machines (docs/dataflow.md)"
    )
    image: str | None = option(None, "Worker container image (docs/docker.md).")
    gpu: Literal["l4", "a100", "h100"] | None = option(None, "GPU of the machines that score.", unset="no GPU")
    gpus: int = option(1, "GPUs of each machine that scores.", ge=1)
    max_workers: int | None = option(None, "Machines of a Dataflow job, at most.", ge=1)
    project: str | None = option(None, "Google Cloud project, for --on dataflow.")
    region: str | None = option(None, "Google Cloud region, as us-central1, for --on dataflow.")
    temp_location: str | None = option(
        None, "Folder for Dataflow's temporary files.", unset="lacy-temp in the dataset's bucket", metavar="gs://..."
    )
    flink_master: str | None = option(None, "Flink's job manager, for --on flink.", metavar="HOST:PORT")
    job_endpoint: str | None = option(None, "Beam's job server, for --on portable.", metavar="HOST:PORT")
    worker_pool: str | None = option(
        None, "Running pool of Beam workers, for --on flink or portable.", metavar="HOST:PORT"
    )

    @model_validator(mode="after")
    def _complete(self) -> "Cluster":
        for name, runners in OWN.items():
            if self.on not in runners and getattr(self, name) is not None:
                raise ValueError(f"{_flag(name)} is for --on {' or '.join(runners)}, not --on {self.on}")
        needed = {
            "dataflow": {"project": "PROJECT", "region": "REGION, as us-central1", "image": "IMAGE (docs/docker.md)"},
            "flink": {"flink_master": "HOST:PORT"},
            "portable": {"job_endpoint": "HOST:PORT"},
        }
        for name, what in needed[self.on].items():
            if getattr(self, name) is None:
                raise ValueError(f"--on {self.on} needs {_flag(name)} {what}")
        if self.image and self.worker_pool:
            raise ValueError("--worker-pool brings its own image: leave out --image")
        if self.gpu is None and self.gpus > 1:
            raise ValueError("--gpus needs --gpu l4, a100 or h100")
        if self.gpu and self.gpus not in GPUS[self.gpu].machines:
            counts = ", ".join(map(str, GPUS[self.gpu].machines))
            raise ValueError(f"no machine has {self.gpus} {self.gpu.upper()} GPUs: use --gpus {counts}")
        return self

    @property
    def accelerators(self) -> int:
        """GPUs of each machine that scores."""
        return self.gpus if self.gpu else 0

    @property
    def processes(self) -> int | None:
        """The most processes that tag, over all machines; None where unknown."""
        return self.max_workers * TAGGER_CORES if self.max_workers else None

    def hints(self) -> dict[str, str]:
        """Beam's resource hints for scoring steps, on runners that give them machines of their own."""
        if self.on != "dataflow" or self.gpu is None:
            return {}
        gpu = GPUS[self.gpu]
        machine = gpu.machines[self.gpus]
        kind = f"type:{gpu.accelerator};count:{self.gpus};machine_type:{machine.name};install-nvidia-driver"
        return {"accelerator": kind, "min_ram": f"{machine.ram_gb}GB"}


def beam_options(cluster: Cluster, job: str, out: str) -> list[str]:
    """Beam options of a job ("label", "decide") that writes to the dataset `out`."""
    return {"dataflow": _dataflow, "flink": _flink, "portable": _portable}[cluster.on](cluster, job, out)


def _dataflow(cluster: Cluster, job: str, out: str) -> list[str]:
    name = re.sub(r"[^a-z0-9]+", "-", out.partition("://")[2].lower()).strip("-")
    options = [
        "--runner=DataflowRunner",
        f"--project={cluster.project}",
        f"--region={cluster.region}",
        f"--job_name=lacy-{job}-{name[-40:].strip('-')}",  # Dataflow refuses a second job of this name while one runs
        f"--temp_location={cluster.temp_location or f'gs://{urlsplit(out).netloc}/lacy-temp'}",
        f"--sdk_container_image={cluster.image}",
        "--sdk_location=container",
        "--experiments=disable_logging_submission_environment",  # it lists the launcher's packages and paths
        "--number_of_worker_harness_threads=1",
        f"--machine_type={TAGGER}",
        f"--disk_size_gb={DISK_GB}",
    ]
    return options + ([f"--max_num_workers={cluster.max_workers}"] if cluster.max_workers else [])


def _flink(cluster: Cluster, job: str, out: str) -> list[str]:
    """`sdk_worker_parallelism=0` is one process for each core of a task manager."""
    options = ["--runner=FlinkRunner", f"--flink_master={cluster.flink_master}", "--sdk_worker_parallelism=0"]
    return options + _environment(cluster)


def _portable(cluster: Cluster, job: str, out: str) -> list[str]:
    return ["--runner=PortableRunner", f"--job_endpoint={cluster.job_endpoint}", *_environment(cluster)]


def _environment(cluster: Cluster) -> list[str]:
    """Where the steps run: in an existing worker pool, or in containers that the runner starts."""
    if cluster.worker_pool:
        return ["--environment_type=EXTERNAL", f"--environment_config={cluster.worker_pool}"]
    return ["--environment_type=DOCKER", f"--environment_config={cluster.image}"] if cluster.image else []


def require_store(cluster: Cluster, out: str) -> None:
    if cluster.on == "dataflow" and "://" not in out:
        raise UsageError(f"{out} is on this machine, out of reach of Dataflow: use a dataset on gs://")
    if cluster.on == "dataflow" and not out.startswith("gs://") and not cluster.temp_location:
        raise UsageError("--on dataflow needs --temp-location gs://..., where the dataset is not on gs://")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
