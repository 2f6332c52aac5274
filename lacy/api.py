"""The Python API: `lacy.label`, `lacy.decide`, `lacy.train`, `lacy.generate`.

Keyword options are the fields of the option models, which are also the flags of the command. Known errors are
LacyErrors, whose message is one line that says what to do.
"""

import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel
from rich.console import Console

from lacy.cascade.options import DeviceOptions, GenerateOptions, PartnerOptions
from lacy.pipeline.options import DecideOptions, LabelOptions
from lacy.progress import CountView, LabelView, TrainView, messages, span
from lacy.running import THREADS, as_known, hush_libraries
from lacy.schemas.errors import UsageError
from lacy.trainer.config import TrainConfig, load

if TYPE_CHECKING:
    from lacy.cascade.generate import Generation
    from lacy.pipeline.runners.presets import Cluster
    from lacy.schemas.manifest import LabelSet, Manifest

Location = str | os.PathLike[str]  # a folder or file, or a URL
OF_THE_COMMAND = frozenset({"name", "estimate"})  # options that lacy.label does not have
Progress = bool | Callable[[str], None]  # True: on stderr; a function gets each line
F = TypeVar("F", bound=Callable[..., Any])


def _with_options(*models: type[BaseModel], without: Set[str] = frozenset()) -> Callable[[F], F]:
    """Show the fields of the models, except those in `without`, in the signature that `help` and notebooks print."""

    def decorate(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        taken = {one.name for one in own} | without
        fields = {name: field for model in models for name, field in model.model_fields.items() if name not in taken}
        more = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if field.is_required()
                else field.get_default(call_default_factory=True),
                annotation=field.annotation,
            )
            for name, field in fields.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *more])  # type: ignore[attr-defined]
        return function

    return decorate


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Limit the threads of the libraries and of worker processes, for the time of a call."""
    before = {name: os.environ.get(name) for name in THREADS}
    torch = sys.modules.get("torch")
    usual = torch.get_num_threads() if torch else int(os.environ.get(THREADS[0]) or os.cpu_count() or 1)
    os.environ.update({name: value or str(count) for name, value in before.items()})
    if torch:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(usual)


@contextmanager
def _known_errors(function: str, extra: str) -> Iterator[None]:
    hush_libraries()
    logger = logging.getLogger("apache_beam")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except Exception as error:
        known = as_known(error, f"lacy.{function}", extra)
        if known is None or known is error:
            raise
        raise known from error


def _split(options: dict[str, Any], *models: type[BaseModel], without: Set[str] = frozenset()) -> list[dict[str, Any]]:
    """The options of each model. Raises UsageError for one that no model has, or that is in `without`."""
    unknown = options.keys() - ({name for model in models for name in model.model_fields} - without)
    if unknown:
        raise UsageError(f"unknown option: {', '.join(sorted(unknown))}")
    return [{name: value for name, value in options.items() if name in model.model_fields} for model in models]


@_with_options(LabelOptions, DecideOptions, without=OF_THE_COMMAND)
def label(
    corpus: Location | Sequence[Location], out: Location, *, progress: Progress = True, **options: Any
) -> "Manifest":
    """Measure every token of a corpus, decide which to delegate, and return the manifest of the dataset.

    The same call resumes an interrupted one. `options` are those of LabelOptions, and policy, budget, action and seed.
    """
    with _known_errors("label", "label"):
        several = [corpus] if isinstance(corpus, str | os.PathLike) else corpus
        given = {"corpus": [os.fspath(one) for one in several], "out": out} | options
        measuring, deciding = (
            model(**chosen)
            for model, chosen in zip(
                (LabelOptions, DecideOptions),
                _split(given, LabelOptions, DecideOptions, without=OF_THE_COMMAND),
                strict=True,
            )
        )
        with _threads(measuring.threads):
            return run_label(measuring, deciding, messages(progress))


def run_label(
    options: LabelOptions,
    deciding: DecideOptions,
    console: Console,
    *,
    cluster: "Cluster | None" = None,
    beam_options: Callable[[str], list[str]] = lambda job: [],
    wait: bool = True,
    patience: float | None = None,
    debug: bool = False,
) -> "Manifest":
    """Label a corpus and decide; what `label` and the command share.

    beam_options  Beam's options of a job, "label" or "decide"
    patience      minutes without a finished part until a job elsewhere is cancelled
    """
    from lacy.pipeline.decide import decide as decide_again
    from lacy.pipeline.decide import decided, require_policy
    from lacy.pipeline.label import Run
    from lacy.pipeline.label import label as measure

    require_policy(options, deciding.policy, deciding.action, deciding.budget)
    started = time.monotonic()
    with LabelView(console) as view:
        run = Run(
            cluster=cluster,
            beam_options=beam_options("label"),
            on_stage=view.stage,
            on_start=view.start,
            on_submit=lambda job: console.print(f"submitted: {job}"),
            on_progress=view.update,
            wait=wait,
            patience=None if patience is None else 60 * patience,
            debug=debug,
        )
        manifest = measure(with_workers(options, cluster), run)
    if manifest.state != "complete":
        console.print("lacy status shows how far it is; rerun the same command to finish it")
        return manifest
    _print_measured(console, manifest, time.monotonic() - started, view.scored, options.out)
    if view.warning:
        console.print(f"warning: {view.warning}", style="yellow")
    how: dict[str, Any] = {"budget": deciding.budget, "action": deciding.action, "seed": deciding.seed}
    if before := decided(options.out, deciding.policy, **how):
        print_decided(console, before, "as decided before, ")
    else:
        labels = decide_again(options.out, deciding.policy, **how, beam_options=beam_options("decide"))
        print_decided(console, labels)
    return manifest


def with_workers(options: LabelOptions, cluster: "Cluster | None" = None) -> LabelOptions:
    """The options with a number of workers: as given, else one for each core of the machines."""
    if "workers" in options.model_fields_set:
        return options
    return options.model_copy(update={"workers": (cluster and cluster.processes) or os.cpu_count() or 1})


@_with_options(DecideOptions)
def decide(dataset: Location, policy: str, *, workers: int = 1, **options: Any) -> "LabelSet":
    """Decide again from what was measured, without any model, and return the record of the label set."""
    with _known_errors("decide", "label"):
        (given,) = _split({"policy": policy} | options, DecideOptions)
        chosen = DecideOptions(**given)
        with _threads(1):
            from lacy.pipeline.decide import decide as write_labels
            from lacy.schemas.manifest import at

            return write_labels(at(dataset), **chosen.model_dump(), workers=workers)


@_with_options(TrainConfig)
def train(
    dataset: Location,
    out: Location,
    *,
    config: Location | None = None,
    resume: bool = False,
    progress: Progress = True,
    **options: Any,
) -> Path:
    """Train a small model on a labelled dataset, and return the folder of the run.

    config  a YAML file with options; those given here override it
    resume  continue from the newest checkpoint, if there is one

    Raises KeyboardInterrupt when a signal ended the run; it has saved a checkpoint.
    """
    with _known_errors("train", "train"):
        given = {"dataset": os.fspath(dataset), "out": Path(out)} | options
        settled = load(given, None if config is None else Path(config), resume)
        if run_train(settled, messages(progress)):
            raise KeyboardInterrupt(f"stopped; resume with lacy.train(..., out={str(out)!r}, resume=True)")
        return settled.out


def run_train(config: TrainConfig, console: Console) -> int | None:
    """Train, and return the signal that ended the run before its limit, if one did."""
    from lacy.trainer.checkpoint import newest
    from lacy.trainer.train import train as train_model

    with TrainView(console) as view:
        outcome = train_model(config, view.report)
    if view.heard:
        progress = outcome.progress
        ended = "stopped" if outcome.stopped else "done"
        after = "; resume with --resume" if outcome.stopped else ""
        console.print(
            f"{ended} at step {progress.step:,}: {progress.tokens:,} tokens, {progress.gt_tokens:,} of them learned "
            f"({span(view.seconds)}); {newest(config.out) or 'no checkpoint'}{after}"
        )
    return outcome.stopped


@_with_options(PartnerOptions, GenerateOptions, DeviceOptions)
def generate(
    run: Location, prompts: str | Sequence[str], *, progress: Progress = True, **options: Any
) -> "list[Generation]":
    """Continue prompts with a trained model and, where it calls, a partner; one generation per prompt, in order.

    run      a folder that `train` returned, a checkpoint, a model folder or a hub name
    options  those of PartnerOptions, GenerateOptions and DeviceOptions
    """
    with _known_errors("generate", "eval"):
        asking, writing, device = _split(options, PartnerOptions, GenerateOptions, DeviceOptions)
        who, how, where = PartnerOptions(**asking), GenerateOptions(**writing), DeviceOptions(**device)
        from lacy.cascade.generate import generate as write
        from lacy.cascade.opening import open_cascade

        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        texts: list[Generation] = []
        count = CountView(messages(progress), "generate")
        with count, open_cascade(os.fspath(run), who, how, where) as (model, partner, settled):
            for text in write(model, asked, partner, settled):
                texts.append(text)
                count(len(texts), len(asked))
        return sorted(texts, key=lambda text: text.index)


def _print_measured(console: Console, manifest: "Manifest", seconds: float, scored: int, out: Path) -> None:
    rate = f", {scored / seconds:,.0f} tokens/s" if scored and seconds else ""
    console.print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.parts):,} parts"
        f" ({span(seconds)}{rate})"
    )
    if counts := manifest.judged:
        console.print(
            f"judge: {counts['windows_judged']:,} windows judged, {counts['windows_unjudged']:,} not; "
            f"{counts['spans']:,} spans, {counts['spans_dropped']:,} dropped (not in the text)"
        )
    if manifest.bad:
        console.print(f"{manifest.bad:,} bad records: see {out / 'deadletter'}", style="yellow")


def print_decided(console: Console, labels: "LabelSet", note: str = "") -> None:
    verb = "delegated" if labels.action == "delegate" else "ignored"
    short = ""
    if labels.budget is not None and labels.candidates < round(labels.budget * labels.tokens):
        short = f" (the budget is {labels.budget:.1%}, but the policy can choose no more tokens)"
    console.print(f"labels/{labels.name}: {note}{labels.share:.2%} of {labels.tokens:,} tokens {verb}{short}")
