"""Language understanding: tasks of lm-evaluation-harness, for the small model alone.

The model never calls: <CALL> has probability zero in every forward pass. A context begins like every text of this model
(`Model.begin`), even if it is cut on the left to fit; nothing in a task's text is read as a special token. The harness
provides the tasks, the prompts and the metrics.

A task is a name that the harness knows, whose data it loads from the Hub, a YAML file in its task format, or a folder
of such files. Paths of data in a local file (`dataset_path: json`, `data_files: questions.jsonl`) are relative to the
file. As in the harness, a local file may name Python functions, which are run.
"""

import io
import logging
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from transformers import AutoTokenizer

from lacy.cascade.evaluation.results import Result
from lacy.cascade.language_model import Model
from lacy.schemas.errors import CascadeError

MAIN: Final = ("acc_norm", "acc")  # the first of these that a task has is its main metric
ANSWER: Final = 256  # tokens of a generated answer if its task sets no limit; at most half the context
FORMATS: Final = ("arrow", "csv", "json", "parquet", "text", "xml")  # of local data, as `dataset_path`
RESAMPLES: Final = 1000  # for standard errors of metrics without a formula

UNITS: Final = pa.schema([("task", pa.string()), ("doc", pa.string()), ("value", pa.float64())])


def evaluate(
    model: Model,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch: int = 16,
    seed: int = 0,
    offline: bool = False,
) -> tuple[Result, pa.Table]:
    """Answer the questions of some tasks with <CALL> forbidden.

    num_fewshot  examples before a question; None: as the task says, else none
    limit        number of questions per task, the first ones
    batch        sequences in a forward pass
    seed         for the choice of examples and for random numbers of tasks
    offline      use local files only: data in the local cache

    Figures are "TASK.METRIC" and "TASK.METRIC.stderr" for each task and group of tasks, and "average": the mean over
    the tasks of their main metric, acc_norm, else acc. In it a group counts as one task, with the mean over its
    questions; a task with neither metric does not count. Units have one row per question of the average: task (or
    group), doc (an id within it) and value (of the main metric).

    Raises CascadeError if a task is unknown or cannot be run, or if its data is not available.
    """
    lm_eval = _harness()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(_offline() if offline else nullcontext())
        loaded, groups, counted_as = _load(tasks)
        for task in loaded.values():
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        stack.enter_context(masked(model.network, model.call_id))
        try:
            evaluated = lm_eval.evaluator.evaluate(
                lm=_language_model(model, batch),
                task_dict={"tasks": loaded, "groups": groups},
                limit=limit,
                bootstrap_iters=RESAMPLES,
            )
        except (AssertionError, ValueError) as error:
            raise CascadeError(f"the tasks cannot be run: {_one_line(error)}") from None
    units = _units(evaluated["samples"], evaluated["results"], counted_as)
    result = Result(
        kind="nlu",
        checkpoint=model.folder.name,
        options={
            "tasks": list(tasks),
            "num_fewshot": num_fewshot,
            "limit": limit,
            "seed": seed,
            "lm_eval": lm_eval.__version__,
        },
        figures=_figures(evaluated["results"]) | {"average": average(units)},
        details={
            "tasks": {
                name: {
                    "metric": _main(evaluated["results"][name]),
                    "version": evaluated["versions"][name],
                    "num_fewshot": evaluated["n-shot"][name],
                    "questions": evaluated["n-samples"][name]["effective"],
                }
                for name in loaded
            }
        },
    )
    return result, units


def average(units: pa.Table) -> float | None:
    """The mean over tasks of the mean over their questions; None if there are none."""
    means = units.group_by("task").aggregate([("value", "mean")])["value_mean"].to_numpy()
    return float(means.mean()) if len(means) else None


@contextmanager
def masked(network: nn.Module, call_id: int | None) -> Iterator[None]:
    """Give <CALL> the logit -inf in each forward pass of a causal language model."""

    def mask(module: nn.Module, args: Any, output: Any) -> None:
        output.logits[..., call_id] = -torch.inf

    with ExitStack() as stack:
        if call_id is not None:
            stack.callback(network.register_forward_hook(mask).remove)
        yield


def _harness() -> Any:
    try:
        import lm_eval
        import lm_eval.evaluator
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError:
        raise CascadeError("the tasks need lm-evaluation-harness: pip install 'lacy[eval]'") from None
    return lm_eval


def _language_model(model: Model, batch: int) -> Any:
    """The model with the harness's interface: text in, log-likelihoods or text out."""

    class LanguageModel(_harness().models.huggingface.HFLM):  # type: ignore[misc]
        @property
        def max_gen_toks(self) -> int:
            return min(ANSWER, self.max_length // 2)

        def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
            return self.tokenizer(string, add_special_tokens=False, split_special_tokens=True)["input_ids"]

        def tok_batch_encode(
            self, strings: Iterable[str], padding_side: str = "left", left_truncate_len: int | None = None, **_: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            rows = [_begun(model.begin, self.tok_encode(string), left_truncate_len) for string in strings]
            padded = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
            return padded["input_ids"], padded["attention_mask"]

        def _loglikelihood_tokens(self, requests: Iterable[Any], disable_tqdm: bool = False, **options: Any) -> Any:
            begun = []
            for texts, context, continuation in requests:
                if texts is not None:  # else a window of a whole text, which begins with `prefix_token_id`
                    read = context if texts[0] or not model.begin else []
                    context = _begun(model.begin, read, self.max_length + 1 - len(continuation))
                begun.append((texts, context, continuation))
            return super()._loglikelihood_tokens(begun, disable_tqdm=disable_tqdm, **options)

    return LanguageModel(
        pretrained=model.network,
        tokenizer=AutoTokenizer.from_pretrained(str(model.folder)),
        backend="causal",
        max_length=model.context,
        batch_size=batch,
        prefix_token_id=model.begin[-1] if model.begin else None,
    )


def _begun(begin: tuple[int, ...], ids: list[int], room: int | None) -> list[int]:
    """The beginning of every text, and the last of its ids that fit."""
    first = 0 if room is None else max(0, len(begin) + len(ids) - room)
    return [*begin, *ids[first:]]


def _load(specs: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str]]:
    """Tasks by name, groups by name, and for each task what it counts as: itself, or the requested group."""
    from lm_eval.tasks import TaskManager

    local: dict[str, Any] = {}
    names: list[str] = []
    for spec in specs:
        if spec.endswith((".yaml", ".yml")) and not Path(spec).is_file():
            raise CascadeError(f"there is no file {spec}: name a task, a YAML file or a folder of them", usage=True)
        entries = _local(Path(spec)) if Path(spec).exists() else {}
        local |= entries
        names += list(entries) or [spec]
    lists = [entry.cfg["task"] for entry in local.values() if isinstance(entry.cfg["task"], list)]  # groups have one
    members = [member if isinstance(member, str) else member.get("task") for members in lists for member in members]
    manager = TaskManager(include_defaults=not all(name in local for name in [*names, *members]))  # which take seconds
    manager.task_index.update(local)

    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    counted_as: dict[str, str] = {}
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.task_index, 3)
            hint = f" (similar: {', '.join(near)})" if near else ""
            raise CascadeError(
                f"unknown task {name}{hint}: use one of the harness, a YAML file or a folder of them", usage=True
            )
        try:
            loaded = manager.load([name])
        except Exception as error:  # the libraries may raise anything
            raise CascadeError(
                f"the task {name} or its data is not available: {_one_line(error)} "
                "(without a network, use a local YAML file with local data)"
            ) from None
        tasks |= loaded["tasks"]
        groups |= loaded["groups"]
        counted_as |= {task: name if name in loaded["groups"] else task for task in loaded["tasks"]}
    return tasks, groups, counted_as


def _local(path: Path) -> dict[str, Any]:
    """The harness's entries for the tasks of a YAML file, or of a folder: its tasks, then its groups."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        if path.is_dir():
            tasks = [entry for entry in TaskIndex.build([path.resolve()]).values() if entry.yaml_path is not None]
        else:
            tasks = [entry for entry in [TaskIndex.entry_from_path(path)] if entry is not None]
        entries = [
            replace(entry, yaml_path=None, cfg=_with_data(load_yaml(entry.yaml_path), entry.yaml_path.parent))
            for entry in tasks
        ]
    except Exception as error:  # YAML, and Python that it names
        raise CascadeError(f"{path} is not a task: {_one_line(error)}", usage=True) from None
    if not entries:
        raise CascadeError(f"{path} contains no task: a task is a YAML file with a line `task: NAME`", usage=True)
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: "group" in entry.cfg)}


def _with_data(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A task's configuration with absolute paths of its data, which are relative to its folder."""

    def absolute(paths: Any) -> Any:
        if isinstance(paths, dict):
            return {split: absolute(path) for split, path in paths.items()}
        if isinstance(paths, list):
            return [absolute(path) for path in paths]
        return paths if "://" in paths else str(folder / paths)

    source, options = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    if source in FORMATS:
        given = {name: absolute(options[name]) for name in ("data_files", "data_dir") if options.get(name)}
        return config | {"dataset_kwargs": options | given}
    if isinstance(source, str) and (folder / source).exists():
        return config | {"dataset_path": str(folder / source)}
    return config


def _figures(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """The harness's "METRIC,FILTER" and "METRIC_stderr,FILTER" as TASK.METRIC and TASK.METRIC.stderr."""
    figures = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            name, comma, answers = key.partition(",")
            if comma:
                metric = name.removesuffix("_stderr") + ("" if answers == "none" else f".{answers}")
                end = ".stderr" if name.endswith("_stderr") else ""
                figures[f"{task}.{metric}{end}"] = float(value) if _is_number(value) else None
    return figures


def _main(metrics: dict[str, Any]) -> str | None:
    """The main metric's "METRIC,FILTER"; None if the task has none."""
    return next((key for name in MAIN for key in metrics if key.partition(",")[0] == name), None)


def _units(
    samples: dict[str, list[dict[str, Any]]], results: dict[str, dict[str, Any]], counted_as: dict[str, str]
) -> pa.Table:
    rows = []
    for task, answered in samples.items():
        metric, _, answers = (_main(results[task]) or "").partition(",")
        whole = counted_as[task]
        for sample in answered:
            if sample["filter"] == answers and _is_number(sample.get(metric)):
                doc = str(sample["doc_id"]) if whole == task else f"{task}/{sample['doc_id']}"
                rows.append({"task": whole, "doc": doc, "value": float(sample[metric])})
    return pa.Table.from_pylist(rows, schema=UNITS)


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number, np.bool_))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's logs, and its progress bars if there is no terminal."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _offline() -> Iterator[None]:
    """Keep the libraries offline: they read the environment on import, and these constants when they load data."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
