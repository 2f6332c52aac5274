"""Tables that the commands print: a plan, an estimate, the status of a run, figures of an evaluation."""

import sys
import time
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lacy.progress import size, span


def show_plan(plan: Any, rates: Any) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()

    def row(name: str, value: str, note: str = "") -> None:
        table.add_row(name, value, note)

    row("tokens", f"{plan.tokens:,.0f}", size(plan.corpus_bytes))
    row("parts", f"{plan.parts:,}", f"of {size(plan.part_bytes)}, {plan.part_minutes:,.1f} minutes of a core")
    row("tagging", f"{plan.tagging_core_hours:,.0f} vCPU hours", f"on {plan.taggers:,} {plan.tagger}")
    if plan.scorers:
        row("scoring", f"{plan.scoring_gpu_hours:,.0f} GPU hours", f"on {plan.scorers:,} {plan.scorer}")
    clock = ", ".join(f"{name} {hours:,.1f}" for name, hours in plan.hours_of.items() if hours)
    row("from start to end", f"{plan.hours:,.1f} hours", clock)
    row("through the shuffle", size(plan.shuffle_bytes), f"{size(plan.element_bytes)} a part")
    row("signals on disk", size(plan.signals_bytes))
    row("labels on disk", size(plan.labels_bytes))
    row("requests", f"{plan.reads + plan.writes:,.0f}", f"{plan.reads:,.0f} reads, {plan.writes:,.0f} writes")
    money = ", ".join(f"{name} {dollars:,.0f}" for name, dollars in plan.money_of.items() if dollars)
    row("money", f"${plan.money:,.0f}", money)
    row("a month on disk", f"${plan.storage_month:,.0f}")
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}")
    console.print("\nby these rates (--rates FILE replaces any)")
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, rate in rates.items():
        table.add_row(name, f"{rate.value:,.10g}", rate.source)
    console.print(table)


def show_estimate(estimate: Any) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "estimate", "90 % interval"):
        table.add_column(name, justify="left" if not name else "right")

    def row(name: str, figure: Any, show: Any) -> None:
        table.add_row(name, show(figure.value), f"{show(figure.low)} to {show(figure.high)}")

    row("corpus, uncompressed", estimate.corpus_bytes, size)
    row("documents", estimate.documents, lambda value: f"{value:,.0f}")
    row("tokens", estimate.tokens, lambda value: f"{value:,.0f}")
    row("signals on disk", estimate.signals_bytes, size)
    row("labels on disk", estimate.labels_bytes, size)
    for stage, hours in estimate.stages.items():
        row(f"{stage}, on one {'engine' if stage in estimate.engines else 'core'}", hours, _hours)
    engines = max(estimate.engines.values(), default=0)
    beside = f", {engines} {'engine' if engines == 1 else 'engines'}" if engines else ""
    row(f"from start to end ({estimate.workers} workers{beside})", estimate.hours, _hours)
    sample = f"{estimate.sample_documents:,} documents, {estimate.sample_tokens:,} tokens"
    Console(soft_wrap=True, highlight=False).print(
        f"The whole corpus, by a sample of {sample} labelled on this machine\n"
    )
    Console(highlight=False).print(table)


def _hours(value: float) -> str:
    return span(3600 * value) if value < 100 else f"{value:,.0f} h"


def show_status(console: Console, status: Any) -> None:
    if status.state == "none":
        console.print(f"{status.dataset}: no run has begun here: there is no manifest.json")
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("state", status.state + (f", {status.share:.1%} done" if status.state == "running" else ""))
    table.add_row("parts", _parts_of(status))
    table.add_row("documents", f"{status.documents:,}")
    table.add_row("tokens", f"{status.tokens:,}")
    table.add_row("bad records", f"{status.bad:,}")
    table.add_row("corpus", f"{size(status.corpus_bytes_done)} of {size(status.corpus_bytes)}")
    if status.state == "running":
        last = "none yet" if status.last_part is None else f"{span(max(0.0, time.time() - status.last_part))} ago"
        table.add_row("last part", last)
        table.add_row("pace", _pace_of(status))
    for labels in status.labels:
        budget = "" if labels.budget is None else f", budget {labels.budget:.1%}"
        what = (
            f"{labels.policy}{budget}, {labels.share:.2%} chosen"
            if labels.policy
            else "incomplete: being written, or interrupted"
        )
        missing = "" if labels.complete or not labels.policy else f", {labels.parts:,} parts: rerun lacy decide"
        table.add_row(f"labels/{labels.name}", what + missing)
    console.print(status.dataset, style="bold")
    console.print(table)
    for line in status.stuck:
        console.print(line, style="yellow")


def status_line(status: Any) -> str:
    if status.state == "none":
        return f"{status.dataset}: no run has begun here"
    done = f"{status.share:.1%} done, " if status.state == "running" else ""
    parts = [f"{status.state}, {done}{_parts_of(status)} parts, {status.tokens:,} tokens, {status.bad:,} bad"]
    if status.state == "running":
        parts += [_pace_of(status), *status.stuck]
    return "; ".join(parts)


def _parts_of(status: Any) -> str:
    planned = "" if status.parts_planned is None else f" of {status.parts_planned:,}"
    files = "file" if status.uncut == 1 else "files"
    return f"{status.parts:,}{planned}" + (
        f", and of {status.uncut:,} compressed {files} to split" if status.uncut else ""
    )


def _pace_of(status: Any) -> str:
    if status.parts_per_second is None:
        return "unknown yet"
    left = f", {span(status.seconds_left)} left" if status.seconds_left else ""
    return f"{status.parts_per_second:,.2f} parts/s, {status.tokens_per_second:,.0f} tokens/s{left}"


def figures(title: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(title)
    table.add_column("", justify="right")
    return table


def results_console() -> Console:
    """Where there is no terminal, wide enough for all tables."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def show_result(result: Any, as_json: bool, table: Any) -> None:
    if as_json:
        print(result.model_dump_json(indent=1))
    else:
        results_console().print(table)


def percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.1%}"
