"""What the commands do and print: the packages do the work, this tells the user about it."""

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from lacy.schemas.manifest import LabelSet, Manifest

PLAIN_INTERVAL = 10.0  # seconds between progress lines where there is no terminal
STAGE_SECONDS = 2.0  # after which a stage is named


def cluster_of(on: str | None, **options: Any) -> Any:
    """The cluster that options describe; None where they name none."""
    from lacy.pipeline.runners.presets import Cluster
    from lacy.schemas.errors import UsageError

    if on is None:
        for name, value in options.items():
            if value not in (None, 1):
                raise UsageError(f"--{name.replace('_', '-')} needs --on dataflow, flink or portable")
        return None
    return Cluster(on=on, **options)  # type: ignore[arg-type]


def _options_of(cluster: Any, job: str, dataset: Any, given: list[str]) -> list[str]:
    """Beam's options of a job: what the preset fills in, which is printed, then the user's own."""
    if cluster is None:
        return given
    from lacy.pipeline.runners.presets import beam_options

    filled = beam_options(cluster, job, str(dataset))
    console_for_messages().print(f"{job} on {cluster.on}: {' '.join(filled)}")
    return filled + given


def run_label(
    options: Any,
    policy: str,
    budget: float | None,
    action: str,
    seed: int,
    cluster: Any,
    beam_options: list[str],
    wait: bool,
    patience: float | None,
    debug: bool,
) -> None:
    from lacy.pipeline.decide import decide, decided, require_policy

    require_policy(options, policy, action, budget)
    console = console_for_messages()
    if not _annotate(console, options, cluster, beam_options, wait, patience, debug):
        console.print("lacy status shows the progress; rerun the same command to finish")
    elif found := decided(options.out, policy, budget=budget, action=action, seed=seed):
        _tell_decided(console, found, "as decided before, ")
    else:
        on_cluster = _options_of(cluster, "decide", options.out, beam_options)
        labels = decide(options.out, policy, budget=budget, action=action, seed=seed, beam_options=on_cluster)
        _tell_decided(console, labels)


def _annotate(
    console: Console,
    options: Any,
    cluster: Any,
    beam_options: list[str],
    wait: bool,
    patience: float | None,
    debug: bool,
) -> bool:
    """Whether the dataset is complete now."""
    from lacy.pipeline.label import Run, label

    view = _LabelProgress(console)
    started = time.monotonic()
    with view:
        run = Run(
            cluster=cluster,
            beam_options=_options_of(cluster, "label", options.out, beam_options),
            on_stage=view.stage,
            on_start=view.start,
            on_submit=lambda job: console.print(f"submitted: {job}"),
            on_progress=view.update,
            wait=wait,
            patience=None if patience is None else 60 * patience,
            debug=debug,
        )
        manifest = label(options, run)
    complete = manifest.state == "complete"
    if complete:
        _tell_annotated(console, manifest, time.monotonic() - started, view.scored, options.out)
        if view.warning:
            console.print(f"warning: {view.warning}", style="yellow")
    return complete


def run_estimate(options: Any, policy: str, budget: float | None, save_rates: Path | None, debug: bool) -> None:
    from lacy.pipeline.cost import measured
    from lacy.pipeline.estimate import estimate
    from lacy.pipeline.label import Run

    console = console_for_messages()
    view = _LabelProgress(console)
    with view:
        run = Run(on_stage=view.stage, on_start=view.start, on_progress=view.update, debug=debug)
        found = estimate(options, policy, budget, run=run)
    _tell_estimate(found)
    if save_rates:
        save_rates.write_text(json.dumps(measured(found), indent=1) + "\n")


def run_plan(
    dataset: str | None, tokens: str | None, size: str | None, rates: Path | None, as_json: bool, **machines: Any
) -> None:
    from lacy.pipeline.cost import DEFAULTS, amount, estimate_cost, with_dataset, with_file
    from lacy.schemas.errors import UsageError

    known, total = with_dataset(DEFAULTS, dataset) if dataset else (DEFAULTS, 0)
    known = with_file(known, rates) if rates else known
    if tokens and size:
        raise UsageError("--tokens and --bytes: leave out one of them")
    if not (tokens or size or dataset):
        raise UsageError("name a DATASET, or give --tokens or --bytes of the corpus")
    wanted = amount(size) / known["bytes_per_token"].value if size else amount(tokens) if tokens else float(total)
    found = estimate_cost(wanted, known, **machines)
    if as_json:
        given = {name: rate.model_dump() for name, rate in known.items()}
        print(json.dumps(found.model_dump() | {"rates": given}, indent=1))
    else:
        _tell_plan(found, known)


def run_decide(
    dataset: str,
    policy: str,
    budget: float | None,
    action: str,
    name: str | None,
    seed: int,
    workers: int,
    cluster: Any,
    beam_options: list[str],
) -> None:
    from lacy.pipeline.decide import decide
    from lacy.pipeline.runners.presets import require_store
    from lacy.schemas.manifest import at

    if cluster:
        require_store(cluster, dataset)
    labels = decide(
        at(dataset),
        policy,
        budget=budget,
        action=action,
        name=name,
        seed=seed,
        workers=workers,
        beam_options=_options_of(cluster, "decide", dataset, beam_options),
    )
    _tell_decided(console_for_messages(), labels)


def run_status(dataset: str, as_json: bool, watch: float | None) -> None:
    from lacy.pipeline.status import status
    from lacy.schemas.manifest import at

    console, place = Console(highlight=False, soft_wrap=True), at(dataset)
    known: dict[str, Any] = {}
    while True:
        found = status(place, known)
        if as_json:
            print(found.model_dump_json(indent=None if watch else 1), flush=True)
        elif watch and not console.is_terminal:
            print(_status_line(found), flush=True)
        else:
            if watch:
                console.clear()
            _tell_status(console, found)
        if not watch or found.state == "complete":
            return
        time.sleep(watch)


def run_check(dataset: str, quick: bool, workers: int) -> int:
    from lacy.pipeline.check import check
    from lacy.schemas.manifest import at, label_sets, read_complete

    place = at(dataset)
    manifest, sets = read_complete(place), label_sets(place)
    gc.freeze()  # records by the 100,000 that stay: not to be gone through again and again
    faults = 0
    with _Steps(console_for_messages(), "check", len(manifest.parts), "parts") as steps:
        for fault in check(place, manifest, sets, quick=quick, workers=workers, on_progress=steps.update):
            faults += 1
            print(fault, flush=True)
    parts = f"{len(manifest.parts):,} parts, {manifest.documents:,} documents, {manifest.tokens:,} tokens"
    sound = "sound by names, sizes and totals" if quick else "sound"
    print(f"{dataset}: {parts}, labels: {', '.join(sets) or 'none'}: {f'{faults} faults' if faults else sound}")
    return faults


def run_report(dataset: str, out: Path, labels: str | None, where: str | None, documents: int, ids: list[str]) -> None:
    from lacy.stats.report import write

    console = console_for_messages()
    with console.status("reading") as status:
        write(dataset, out, labels=labels, where=where, documents=ids or documents, on_stage=status.update)
    console.print(f"{out}: {filesize.decimal(out.stat().st_size)}")


def run_stats(dataset: str, labels: str | None, where: str | None, by: str | None, as_json: bool) -> None:
    from lacy.stats.compute import compute
    from lacy.stats.tables import show

    with console_for_messages().status("reading") as status:
        result = compute(dataset, labels, where=where, by=by, on_stage=status.update)
    if as_json:
        print(result.model_dump_json(indent=1))
    else:
        show(result, Console())


def run_sql(dataset: str, query: str | None, form: str, out: Path | None) -> None:
    from lacy.schemas.errors import UsageError
    from lacy.schemas.manifest import at
    from lacy.stats.answers import answer, destination, require_format
    from lacy.stats.connect import connect, statements

    require_format(form)
    asks = query is None and sys.stdin.isatty() and sys.stdout.isatty()
    if asks and out is not None:
        raise UsageError('--out needs a query: lacy sql DATASET "SELECT ..." --out FILE')
    with connect(dataset) as connection:
        if asks:
            from lacy.stats.prompt import prompt

            prompt(connection, form, sys.stdout)
            return
        if query is None:
            found = statements(sys.stdin.read())
            if len(found) != 1 and (out is not None or form == "parquet"):
                raise UsageError(f"{len(found)} statements: give one for {'--out' if out else '--format parquet'}")
        else:
            found = [query]
        try:
            with destination(out, at(dataset)) as file:
                for statement in found:
                    answer(connection, statement, form, file, session=len(found) > 1)
        except BrokenPipeError:  # the reader, head or less, has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_show(dataset: str, doc_id: str | None, labels: str | None, color: str, signals: bool) -> None:
    from lacy.schemas.errors import UsageError
    from lacy.stats.show import paged, render, show

    if signals and doc_id is None:
        raise UsageError("--signals needs a document: lacy show DATASET DOC_ID --signals")
    console = Console(highlight=False)
    with paged(console):
        if doc_id is None:
            render(dataset, labels=labels, color=color, console=console)  # type: ignore[arg-type]
        else:
            show(dataset, doc_id, labels=labels, color=color, signals=signals, console=console)  # type: ignore[arg-type]


def run_tokenizer(corpus: list[str], out: Path, vocab_size: int, limit: int | None) -> None:
    from lacy.pipeline.train_tokenizer import train

    documents, size = train(corpus, out, vocab_size, limit)
    print(f"{out}: {size:,} entries, <CALL> among them, from {documents:,} documents")
    if size < vocab_size:
        console_for_messages().print(
            f"fewer than --vocab-size {vocab_size:,}: the corpus has no more pairs of tokens to merge", style="yellow"
        )


def run_train(given: dict[str, Any], file: Path | None, resume: bool) -> int | None:
    """The signal that ended the run before its limit, if one did."""
    from lacy.trainer.checkpoint import newest
    from lacy.trainer.config import load
    from lacy.trainer.train import train

    config = load(given, file, resume)
    console = console_for_messages()
    view = _TrainProgress(console)
    with view:
        outcome = train(config, view.tell)
    if view.told:
        progress = outcome.progress
        ended = "stopped" if outcome.stopped else "done"
        after = "; go on with --resume" if outcome.stopped else ""
        console.print(
            f"{ended} at step {progress.step:,}: {progress.tokens:,} tokens, {progress.gt_tokens:,} of them learnt "
            f"({_span(view.seconds)}); {newest(config.out) or 'no checkpoint'}{after}"
        )
    return outcome.stopped


def _tell_plan(found: Any, rates: Any) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def row(name: str, value: str, note: str = "") -> None:
        table.add_row(name, value, note)

    row("tokens", f"{found.tokens:,.0f}", _bytes(found.corpus_bytes))
    row("parts", f"{found.parts:,}", f"of {_bytes(found.part_bytes)}, {found.part_minutes:,.1f} minutes of a core")
    row("tagging", f"{found.tagging_core_hours:,.0f} vCPU hours", f"on {found.taggers:,} {found.tagger}")
    if found.scorers:
        row("scoring", f"{found.scoring_gpu_hours:,.0f} GPU hours", f"on {found.scorers:,} {found.scorer}")
    clock = ", ".join(f"{name} {hours:,.1f}" for name, hours in found.hours_of.items() if hours)
    row("from start to end", f"{found.hours:,.1f} hours", clock)
    row("through the shuffle", _bytes(found.shuffle_bytes), f"{_bytes(found.element_bytes)} a part")
    row("signals on disk", _bytes(found.signals_bytes))
    row("labels on disk", _bytes(found.labels_bytes))
    row("requests", f"{found.reads + found.writes:,.0f}", f"{found.reads:,.0f} reads, {found.writes:,.0f} writes")
    money = ", ".join(f"{name} {dollars:,.0f}" for name, dollars in found.money_of.items() if dollars)
    row("money", f"${found.money:,.0f}", money)
    row("a month on disk", f"${found.storage_month:,.0f}")
    console.print(table)
    for note in found.notes:
        console.print(f"note: {note}")
    console.print("\nby these rates (--rates FILE replaces any)")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, rate in rates.items():
        table.add_row(name, f"{rate.value:,.10g}", rate.source)
    console.print(table)


def _tell_estimate(found: Any) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "estimate", "90 % interval"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, figure: Any, show: Any) -> None:
        table.add_row(name, show(figure.value), f"{show(figure.low)} to {show(figure.high)}")

    row("corpus, uncompressed", found.corpus_bytes, _bytes)
    row("documents", found.documents, lambda value: f"{value:,.0f}")
    row("tokens", found.tokens, lambda value: f"{value:,.0f}")
    row("signals on disk", found.signals_bytes, _bytes)
    row("labels on disk", found.labels_bytes, _bytes)
    for stage, hours in found.stages.items():
        row(f"{stage}, on one {'engine' if stage in found.engines else 'core'}", hours, _hours)
    engines = max(found.engines.values(), default=0)
    beside = f", {engines} {'engine' if engines == 1 else 'engines'}" if engines else ""
    row(f"from start to end ({found.workers} workers{beside})", found.hours, _hours)
    sample = f"{found.sample_documents:,} documents, {found.sample_tokens:,} tokens"
    Console(soft_wrap=True, highlight=False).print(
        f"The whole corpus, by a sample of {sample} labelled on this machine\n"
    )
    Console(highlight=False).print(table)


def _bytes(value: float) -> str:
    return filesize.decimal(round(value))


def _hours(value: float) -> str:
    return _span(3600 * value) if value < 100 else f"{value:,.0f} h"


def console_for_messages() -> Console:
    """For messages: on stderr, as they stand, not broken into lines where there is no terminal."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def _tell_status(console: Console, found: Any) -> None:
    if found.state == "none":
        console.print(f"{found.dataset}: no run has begun here: there is no manifest.json")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("state", found.state + (f", {found.share:.1%} done" if found.state == "running" else ""))
    table.add_row("parts", _parts_of(found))
    table.add_row("documents", f"{found.documents:,}")
    table.add_row("tokens", f"{found.tokens:,}")
    table.add_row("bad records", f"{found.bad:,}")
    table.add_row("corpus", f"{_bytes(found.corpus_bytes_done)} of {_bytes(found.corpus_bytes)}")
    if found.state == "running":
        last = "none yet" if found.last_part is None else f"{_span(max(0.0, time.time() - found.last_part))} ago"
        table.add_row("last part", last)
        table.add_row("pace", _pace_of(found))
    for labels in found.labels:
        budget = "" if labels.budget is None else f", budget {labels.budget:.1%}"
        what = (
            f"{labels.policy}{budget}, {labels.share:.2%} chosen" if labels.policy else "being written, or broken off"
        )
        missing = "" if labels.complete or not labels.policy else f", {labels.parts:,} parts: run lacy decide again"
        table.add_row(f"labels/{labels.name}", what + missing)
    console.print(found.dataset, style="bold")
    console.print(table)
    for line in found.stuck:
        console.print(line, style="yellow")


def _status_line(found: Any) -> str:
    if found.state == "none":
        return f"{found.dataset}: no run has begun here"
    done = f"{found.share:.1%} done, " if found.state == "running" else ""
    told = [f"{found.state}, {done}{_parts_of(found)} parts, {found.tokens:,} tokens, {found.bad:,} bad"]
    if found.state == "running":
        told += [_pace_of(found), *found.stuck]
    return "; ".join(told)


def _parts_of(found: Any) -> str:
    planned = "" if found.parts_planned is None else f" of {found.parts_planned:,}"
    files = "file" if found.uncut == 1 else "files"
    return f"{found.parts:,}{planned}" + (f", and of {found.uncut:,} compressed {files} to cut" if found.uncut else "")


def _pace_of(found: Any) -> str:
    if found.parts_per_second is None:
        return "not known yet"
    left = f", {_span(found.seconds_left)} left" if found.seconds_left else ""
    return f"{found.parts_per_second:,.2f} parts/s, {found.tokens_per_second:,.0f} tokens/s{left}"


def _tell_annotated(console: Console, manifest: Manifest, seconds: float, scored: int, out: Path) -> None:
    rate = f", {scored / seconds:,.0f} tokens/s" if scored and seconds else ""
    console.print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens in {len(manifest.parts):,} parts"
        f" ({_span(seconds)}{rate})"
    )
    if manifest.judged:
        told = manifest.judged
        console.print(
            f"judge: {told['windows_judged']:,} windows judged, {told['windows_unjudged']:,} not; "
            f"{told['spans']:,} spans, {told['spans_dropped']:,} dropped (not in the text)"
        )
    if manifest.bad:
        console.print(f"{manifest.bad:,} bad records: see {out / 'deadletter'}", style="yellow")


def _tell_decided(console: Console, labels: LabelSet, how: str = "") -> None:
    verb = "delegated" if labels.action == "delegate" else "ignored"
    note = ""
    if labels.budget is not None and labels.candidates < round(labels.budget * labels.tokens):
        note = f" (the budget is {labels.budget:.1%}, but no more tokens can be chosen by this policy)"
    console.print(f"labels/{labels.name}: {how}{labels.share:.2%} of {labels.tokens:,} tokens {verb}{note}")


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


class _Field(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(task.fields["text"])


class _LabelProgress:
    """A bar on a terminal, a line every few seconds elsewhere: documents, tokens, rate, parts, bad, time left."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("label"), BarColumn(24), _Field(), TimeElapsedColumn(), console=console, transient=True
        )
        self._live = console.is_terminal
        self._task: Any = None
        self._bytes = self._parts = 0
        self._before: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._began = self._told = time.monotonic()
        self._stage = ""
        self._timer: threading.Timer | None = None
        self.scored = 0
        self.warning = ""

    def __enter__(self) -> "_LabelProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self.stage("")
        if self._task is not None:
            self._bar.stop()

    def stage(self, what: str) -> None:
        """A stage begins, or none: one that takes over STAGE_SECONDS is named."""
        if self._timer:
            self._timer.cancel()
        self._stage, self._timer = what, None
        if what:
            self._timer = threading.Timer(STAGE_SECONDS, self._name_stage)
            self._timer.daemon = True
            self._timer.start()

    def _name_stage(self) -> None:
        if self._live and self._task is not None:
            self._bar.update(self._task, text=self._stage)
        else:
            print(f"label: {self._stage}", file=sys.stderr, flush=True)

    def start(self, outlook: Any) -> None:
        finished = outlook.finished
        self.warning = outlook.warning
        if self.warning:
            self._console.print(f"warning: {self.warning}", style="yellow")
        self._bytes, self._parts = outlook.bytes, outlook.parts
        self._before = (
            len(finished),
            sum(part.rows for part in finished),
            sum(part.tokens for part in finished),
            sum(part.bad for part in finished),
        )
        if finished:
            self._console.print(f"resuming: {len(finished):,} parts are finished")
        self._began = self._told = time.monotonic()
        if self._live:
            self._bar.start()
            self._task = self._bar.add_task("label", total=None, text=self._stage)

    def update(self, counts: Any) -> None:
        parts, documents, tokens, bad = self._before
        self.scored = counts.tokens + counts.scored
        elapsed = time.monotonic() - self._began
        total_bytes = self._bytes + counts.planned_bytes
        fraction = self._fraction(counts, total_bytes)
        left = f", {_span(elapsed / fraction - elapsed)} left" if counts.parts else ""
        restarts = f", {counts.restarts:,} engine restarts" if counts.restarts else ""
        all_parts = parts + self._parts + counts.planned_parts
        text = (
            f"{documents + counts.documents:,} documents, {tokens + self.scored:,} tokens, "
            f"{self.scored / max(elapsed, 1e-9):,.0f} tokens/s, "
            f"{parts + counts.parts:,}/{all_parts:,} parts, {bad + counts.bad:,} bad{restarts}{left}"
        )
        if not self.scored and not counts.parts:
            text = self._stage
        elif self._stage:
            self.stage("")
        if self._live:
            self._bar.update(self._task, total=1, completed=fraction, text=text)
        elif text and time.monotonic() - self._told > PLAIN_INTERVAL:
            self._told = time.monotonic()
            print(f"label: {text}", file=sys.stderr, flush=True)

    def _fraction(self, counts: Any, total_bytes: int) -> float:
        """Of the corpus bytes; for parts in hand, by the tokens a byte has had so far."""
        if not total_bytes:
            return 0.0
        per_token = counts.bytes / counts.tokens if counts.tokens else 4.0
        return min(1.0, (counts.bytes + counts.scored * per_token) / total_bytes)


class _Steps:
    """How many of a known number are done: a bar on a terminal, a line every few seconds elsewhere."""

    def __init__(self, console: Console, name: str, total: int, what: str):
        columns = (TextColumn(name), BarColumn(24), _Field(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=total, text="")
        self._name, self._total, self._what, self._live = name, total, what, console.is_terminal
        self._told = time.monotonic()

    def __enter__(self) -> "_Steps":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def update(self, done: int) -> None:
        text = f"{done:,}/{self._total:,} {self._what}"
        if self._live:
            self._bar.update(self._task, completed=done, text=text)
        elif time.monotonic() - self._told > PLAIN_INTERVAL:
            self._told = time.monotonic()
            print(f"{self._name}: {text}", file=sys.stderr, flush=True)


class _TrainProgress:
    """A bar on a terminal, a line every few seconds elsewhere; validations and checkpoints are lines of their own."""

    def __init__(self, console: Console):
        self._console = console
        self._bar = Progress(
            TextColumn("train"), BarColumn(24), _Field(), TimeElapsedColumn(), console=console, transient=True
        )
        self._live = console.is_terminal
        self._task: Any = None
        self._began = self._said = time.monotonic()
        self._done = 0.0
        self.told = False

    def __enter__(self) -> "_TrainProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def tell(self, what: str, told: dict[str, Any]) -> None:
        self.told = True
        getattr(self, "_" + what)(told)

    def _start(self, told: dict[str, Any]) -> None:
        begins = f"going on at step {told['step']:,}" if told["step"] else "from the beginning"
        steps = f"{told['max_steps']:,} steps" if told["max_steps"] else f"{told['gt_limit']:,} learnt tokens"
        self._console.print(
            f"{told['parameters']:,} parameters, {told['objective']}, {told['device']}, {told['precision']}; "
            f"{told['tokens_per_step']:,} tokens a step, {steps}, {begins}"
        )
        self._began = time.monotonic()
        self._done = told["done"]
        if self._live:
            self._bar.start()
            self._task = self._bar.add_task("train", total=1, completed=told["done"], text="")

    def _step(self, told: dict[str, Any]) -> None:
        done = told["done"] - self._done
        left = f", {_span(self.seconds / done * (1 - told['done']))} left" if done > 0 and told["done"] < 1 else ""
        call = "" if told["call_loss"] is None else f", call {told['call_loss']:.3f} ({told['called']:.1%})"
        mfu = "" if told["mfu"] is None else f", MFU {told['mfu']:.1%}"
        text = (
            f"step {told['step']:,}, learn {told['learn_loss'] or 0:.3f}{call}, {told['tokens_per_second']:,.0f} "
            f"tokens/s{mfu}, {_bytes(told['memory'])}{left}"
        )
        if self._live:
            self._bar.update(self._task, completed=told["done"], text=text)
        elif time.monotonic() - self._said > PLAIN_INTERVAL or told["done"] >= 1:
            self._said = time.monotonic()
            self._console.print(f"train: {text}")

    def _valid(self, told: dict[str, Any]) -> None:
        def figure(name: str) -> str:
            return "none" if told[name] is None else f"{told[name]:.3f}"

        self._console.print(
            f"step {told['step']:,}, held out: nats {figure('nll_factual')} factual, {figure('nll_other')} other; "
            f"AUC of p(<CALL>) for factual and wrong {figure('auc_factual_wrong')}"
        )

    def _note(self, told: dict[str, Any]) -> None:
        self._console.print(told["text"], style="yellow")
