"""Decide how each model of a run is loaded: its backend, its engines, its GPUs. Models are found here, not loaded."""

import importlib.util
from pathlib import Path
from typing import Any

from lacy.labelers import tokenize
from lacy.labelers.llm import model_folders
from lacy.labelers.llm import scorer as reference_scores
from lacy.pipeline.options import Backend, LabelOptions, ModelSpec
from lacy.pipeline.runners.presets import Cluster
from lacy.schemas.errors import ModelError, UsageError

GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA's driver, AMD's, and both under WSL
ANSWER_SECONDS = 5.0  # within which a server must answer before a run starts


def models_of(
    options: LabelOptions, cluster: Cluster | None = None
) -> tuple[tokenize.TargetTokenizer, dict[str, ModelSpec]]:
    """The target tokenizer and the models of a run. Raises ModelError or TokenizerError when one is missing.

    Models go to the workers by name: each machine fetches its own (`lacy.labelers.llm.model_folders.resolve`).
    """
    trust = options.trust_remote_code
    names = {"reference": options.reference, "student": options.student}
    tokenizer = tokenize.load(options.tokenizer or str(options.reference), trust_remote_code=trust)
    specs = {role: _scorer(options, cluster, role, name, tokenizer) for role, name in names.items() if name}
    if options.judge:
        specs["judge"] = _judge(options, cluster)
    here = [spec for spec in specs.values() if spec.backend == "vllm"]
    if options.engine_arg and not here:
        raise ModelError(
            "--engine-arg needs a model that runs in vLLM, and this run has none: add --scorer vllm", usage=True
        )
    if len(here) > 1:  # models that share GPUs share their memory
        for spec in here:
            share = reference_scores.GPU_MEMORY_SHARE / len(here)
            spec.arguments.setdefault("gpu_memory_utilization", round(share, 3))
    return tokenizer, specs


def _scorer(
    options: LabelOptions, cluster: Cluster | None, role: str, model: str, target: tokenize.TargetTokenizer
) -> ModelSpec:
    trust = options.trust_remote_code
    backend = _best_backend(options, cluster) if options.scorer == "auto" else options.scorer
    own = tokenize.load(model, trust_remote_code=trust)
    if options.window:
        try:
            reference_scores.check_window(model, options.window, options.overlap, own.bos_id, trust_remote_code=trust)
        except ModelError as error:
            raise UsageError(f"--{error}") from None
    arguments: dict[str, Any] = {"backend": backend, "model": model, "bos": own.bos_id, "trust_remote_code": trust}
    arguments |= {"window": options.window, "overlap": options.overlap}
    if backend == "server":
        window = options.window or reference_scores.spare_window(model, trust_remote_code=trust)
        arguments |= {"window": window, "servers": options.server, "concurrency": _share(options)}
    else:
        arguments |= {"dtype": options.dtype, "max_batch_tokens": options.batch_tokens, "threads": options.threads}
    if backend == "transformers":
        arguments["device"] = options.device
    engines, gpus = _engines(options, cluster, backend, role)
    if backend == "vllm":
        arguments |= options.engine_arg.get(role, {})
    return ModelSpec(
        role=role,
        model=model,
        backend=backend,
        factory="lacy.labelers.llm.load:scorer",
        arguments=arguments,
        tokenizer=None if own.sha256 == target.sha256 else model,
        engines=engines,
        gpus=gpus,
    )


def _judge(options: LabelOptions, cluster: Cluster | None) -> ModelSpec:
    assert options.judge
    if options.judge_server:
        arguments: dict[str, Any] = {"backend": "server", "model": options.judge, "servers": options.judge_server}
        arguments["concurrency"] = _share(options)
        return ModelSpec("judge", options.judge, "server", "lacy.labelers.llm.load:chat", arguments)
    model_folders.resolve(options.judge)  # raises here when it is missing, not in a worker
    arguments = {"backend": "vllm", "model": options.judge, "dtype": options.dtype, "threads": options.threads}
    arguments |= {"trust_remote_code": options.trust_remote_code} | options.engine_arg.get("judge", {})
    engines, gpus = _engines(options, cluster, "vllm", "judge")
    return ModelSpec(
        "judge", options.judge, "vllm", "lacy.labelers.llm.load:chat", arguments, engines=engines, gpus=gpus
    )


def _share(options: LabelOptions) -> int:
    """Requests that one worker may have in flight on one server."""
    return max(1, options.concurrency // options.workers)


def _engines(options: LabelOptions, cluster: Cluster | None, backend: Backend, role: str) -> tuple[int, int]:
    """The number of engines on a machine for a model, and the GPUs of each.

    Without a GPU, `transformers` runs inside the workers: no engines, and each worker holds the model.
    """
    if backend == "server":
        return 0, 0
    given = options.engine_arg.get(role, {}) if backend == "vllm" else {}
    gpus = int(given.get("tensor_parallel_size", 1)) * int(given.get("pipeline_parallel_size", 1))
    count = _gpus(options, cluster)
    if options.engines and count and options.engines * gpus > count:
        where = "of a machine" if cluster else "here"
        raise ModelError(f"{options.engines} engines of {gpus} GPUs are more than the {count} GPUs {where}", usage=True)
    return options.engines or count // gpus or int(backend == "vllm"), gpus


def _gpus(options: LabelOptions, cluster: Cluster | None) -> int:
    """GPUs of each machine that scores."""
    if options.device == "cpu":
        return 0
    if cluster:
        return cluster.accelerators
    if not any(Path(device).exists() for device in GPU_DEVICES):  # without importing torch: seconds, and a gigabyte
        return 0
    import torch

    return torch.cuda.device_count()


def _best_backend(options: LabelOptions, cluster: Cluster | None) -> Backend:
    """Servers where given, vLLM where it is installed and a GPU is there, else transformers."""
    if options.server:
        return "server"
    has_vllm = cluster is not None or importlib.util.find_spec("vllm") is not None
    return "vllm" if has_vllm and _gpus(options, cluster) else "transformers"


def require_servers(specs: dict[str, ModelSpec]) -> None:
    """Raises ModelError when no server of a model answers. Workers would wait, even for a mistyped URL."""
    for spec in specs.values():
        if spec.backend == "server":
            _require_server(spec.arguments["servers"])


def _require_server(urls: list[str]) -> None:
    from lacy.labelers.llm.servers import ServerPool

    pool = ServerPool(urls, patience=ANSWER_SECONDS)
    try:
        pool.models()
    finally:
        pool.close()
