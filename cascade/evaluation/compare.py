"""Runs side by side: the main figures of their evaluations, as tables and as a page with curves.

Read is what `cascade.evaluation.results` keeps of each run's newest checkpoint. Intervals are bootstrapped from the
units of the results (`cascade.evaluation.bootstrap`), over documents, prompts, entities or questions. Where a run and
the first one were measured on the same of these, there is also the interval of their difference, paired: both see the
same resamples.
"""

import io
import shlex
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path
from typing import Any, Final

import markupsafe
import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lacy.cascade.evaluation import bootstrap, results
from lacy.cascade.evaluation.results import Result
from lacy.cascade.language_model import checkpoint, results_folder
from lacy.schemas.errors import CascadeError, TrainingError
from lacy.schemas.pages import template
from lacy.trainer import config, logs

WIDTH: Final = 100  # columns of the tables where there is no terminal
SHOWN: Final = 0.6  # share called up to which curves are drawn; of few kept tokens the accuracy is noise
CURVES: Final = {
    "kept_accuracy": "accuracy of the tokens kept",
    "covered": "share of factual and wrong tokens called",
}
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's, for all eyes
DASHES: Final = ((), (4, 2), (1, 1.5), (5, 1.5, 1, 1.5))  # widths of a line and of the gap behind it
STYLE: Final[Any] = {
    "svg.hashsalt": "lacy",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "xtick.color": "#888888",
    "ytick.color": "#888888",
    "axes.grid": True,
    "grid.color": "#888888",
    "grid.alpha": 0.25,
}

# What gives the results of each kind, for a run.
COMMANDS: Final = {
    "delegation": "lacy eval delegation {}",
    "leakage": "lacy eval leakage {}",
    "containment": "lacy eval leakage {} --partner MODEL",
    "factscore": "lacy eval factscore {} --entities FILE --knowledge FILE --judge MODEL",
    "nlu": "lacy eval nlu {} --task TASK",
}


@dataclass(frozen=True)
class Units:
    """What a figure is over: `clusters` of them, a statistic, and what tells whether another run has the same."""

    clusters: int
    statistic: bootstrap.Statistic
    identity: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Column:
    """A figure of a kind of evaluation; `units` gives None where a model has no such figure."""

    kind: str
    figure: str
    title: str
    note: str
    units: Callable[[pa.Table], Units | None]
    percent: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind}.{self.figure}"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Estimate(_Model):
    """A figure with its interval (`bootstrap.LEVEL`), None where there are fewer than two clusters."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class Curve(_Model):
    """By share of tokens called (S,), those of the highest `score`; None where undefined."""

    score: str
    shares: list[float]
    values: dict[str, list[float | None]]


class Row(_Model):
    """A run. `figures` and `differences`, to the first run, are by the name of their column."""

    name: str
    checkpoint: str
    objective: str | None
    learnt_tokens: int | None
    figures: dict[str, Estimate | None]
    differences: dict[str, Estimate | None]
    missing: list[str]  # kinds that were not evaluated
    hints: list[str]  # commands that would
    curve: Curve | None = Field(default=None, exclude=True)


class Comparison(_Model):
    level: float
    rows: list[Row]


def compare(runs: Sequence[Path]) -> Comparison:
    """Read the results of runs, or of checkpoints. Raises CascadeError where one has no checkpoint, or is damaged."""
    rows: list[Row] = []
    first: dict[str, _Measured] = {}
    for number, (run, name) in enumerate(zip(runs, names(runs), strict=True)):
        folder = checkpoint(run)
        read = {kind: results.read(results_folder(folder), kind) for kind in KINDS}
        measured = {}
        for column in COLUMNS:
            found = read[column.kind]
            if found is not None and (figure := _measured(column, *found)) is not None:
                measured[column.name] = figure
        if number == 0:
            first = measured
        missing = [kind for kind in KINDS if read[kind] is None]
        objective, learnt = _training(folder)
        rows.append(
            Row(
                name=name,
                checkpoint=folder.name,
                objective=objective,
                learnt_tokens=learnt,
                figures={
                    column.name: measured[column.name].estimate if column.name in measured else None
                    for column in COLUMNS
                },
                differences={
                    column.name: _difference(measured.get(column.name), first.get(column.name)) if number else None
                    for column in COLUMNS
                },
                missing=missing,
                hints=[hint.format(shlex.quote(str(run))) for kind, hint in COMMANDS.items() if kind in missing],
                curve=_curve(read["delegation"]),
            )
        )
    return Comparison(level=bootstrap.LEVEL, rows=rows)


def names(runs: Sequence[Path]) -> list[str]:
    """What to call each run: its folder's name, with as many of the folders above as tell it from the others.

    A checkpoint is RUN/STEP; what is named twice is numbered.
    """
    parts = [[part for part in run.resolve().parts if part != "checkpoints"] for run in runs]
    depths = [2 if run.resolve().parent.name == "checkpoints" else 1 for run in runs]
    for _ in range(max(map(len, parts), default=0)):
        called = ["/".join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        depths = [depth + (called.count(name) > 1) for depth, name in zip(depths, called, strict=True)]
    again = [parts[:number].count(part) for number, part in enumerate(parts)]
    called = [
        "/".join(part[-1 if parts.count(part) > 1 else -depth :]) for part, depth in zip(parts, depths, strict=True)
    ]
    return [f"{name} ({count + 1})" if count else name for name, count in zip(called, again, strict=True)]


def show(comparison: Comparison, console: Console) -> None:
    """Print the tables; what is no terminal gets plain text of WIDTH columns."""
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDTH, color_system=None)
    figures = _table("run")
    for number, row in enumerate(comparison.rows):
        if number:
            figures.add_row()
        figures.add_row(
            Text.assemble((_plain(row.name), "bold"), f"\n{trained(row)}"),
            *(Text(cell(column, row.figures[column.name])) for column in COLUMNS),
        )
    console.print(figures)
    if any(estimate for row in comparison.rows for estimate in row.differences.values()):
        differences = _table(f"minus {_plain(comparison.rows[0].name)}")
        for number, row in enumerate(comparison.rows[1:]):
            if number:
                differences.add_row()
            estimates = [(column, row.differences[column.name]) for column in COLUMNS]
            differences.add_row(
                Text(_plain(row.name), style="bold"),
                *(
                    Text(cell(c, found, difference=True), style="bold" if found and found.clear else "")
                    for c, found in estimates
                ),
            )
        console.print()
        console.print(differences)
    console.print()
    for line in notes(comparison):
        console.print(Text(line, style="dim"))


def notes(comparison: Comparison) -> list[str]:
    """What the tables mean, and what would fill their gaps."""
    lines = [f"{column.title}: {column.note}" for column in COLUMNS]
    lines.append(f"In brackets: {comparison.level:.0%} bootstrap intervals, of differences paired.")
    if any(
        row.differences[name] is None for row in comparison.rows[1:] for name in row.differences if row.figures[name]
    ):
        lines.append("No difference: measured on other documents, prompts or questions than the first run.")
    missing = {kind for row in comparison.rows for kind in row.missing}
    gaps = [hint.format("RUN") for kind, hint in COMMANDS.items() if kind in missing]
    return lines + ([f"Where there is a dash: {'; '.join(gaps)}"] if gaps else [])


def cell(column: Column, estimate: Estimate | None, difference: bool = False) -> str:
    """A figure, and on a second line its interval; a dash where there is none. Shares differ by percentage points."""
    if estimate is None:
        return "-"
    scale, digits, unit = (100, 1, " pp" if difference else " %") if column.percent else (1, 3, "")
    value = f"{estimate.value * scale:{'+' if difference else ''}.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return value
    digits = 1 if column.percent else 3 if difference else 2
    return f"{value}\n[{estimate.low * scale:.{digits}f} {estimate.high * scale:.{digits}f}]"


def trained(row: Row) -> str:
    """What the run was trained by, and on how many tokens with a gradient of their true token."""
    count = row.learnt_tokens
    learnt = None
    if count is not None:
        unit, size = next(((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if count >= s), ("", 1))
        learnt = f"{count / size:.3g}{unit} learnt"
    return ", ".join(part for part in (row.objective, learnt) if part) or "-"


def page(comparison: Comparison) -> str:
    """One HTML page of its own: tables, curves, notes. All text is escaped; the same comparison gives the same page.

    Raises CascadeError without matplotlib.
    """
    lines = [(row, *look) for row, look in zip(comparison.rows, _looks(), strict=False) if row.curve]
    charts = _charts([(row.curve, *look) for row, *look in lines if row.curve]) if lines else ""
    filled = template("lacy.cascade.evaluation", "compare.html").render(
        rows=comparison.rows,
        columns=COLUMNS,
        cell=cell,
        plain=_plain,
        trained=trained,
        notes=notes(comparison),
        differences=any(estimate for row in comparison.rows for estimate in row.differences.values()),
        charts=markupsafe.Markup(charts),
        lines=lines,
    )
    return filled + "\n"


@dataclass(frozen=True)
class _Measured:
    estimate: Estimate
    draws: np.ndarray | None  # (resamples,) the statistic's values, from the seed and the number of clusters
    identity: tuple[np.ndarray, ...]


def _measured(column: Column, result: Result, table: pa.Table) -> _Measured | None:
    try:
        units = column.units(table)
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        raise CascadeError(
            f"the units of {column.kind} of {result.checkpoint} are damaged: lacy eval {column.kind} writes them anew"
        ) from None
    if units is None or not units.clusters:
        return None
    value = float(units.statistic(np.ones((1, units.clusters), np.int32))[0])
    if np.isnan(value):
        return None
    draws = bootstrap.resampled(units.clusters, units.statistic) if units.clusters > 1 else None
    low, high = (draws is not None and bootstrap.bounds(draws)) or (None, None)
    return _Measured(Estimate(value=value, low=low, high=high), draws, units.identity)


def _difference(mine: _Measured | None, first: _Measured | None) -> Estimate | None:
    if mine is None or first is None or mine.draws is None or first.draws is None:
        return None
    same = len(mine.identity) == len(first.identity) and all(map(np.array_equal, mine.identity, first.identity))
    found = bootstrap.bounds(mine.draws - first.draws) if same else None
    return found and Estimate(value=mine.estimate.value - first.estimate.value, low=found[0], high=found[1])


def _tokens(table: pa.Table) -> Units | None:
    if "margin" not in table.column_names:
        return None
    document, margin, factual, correct = (
        table[name].to_numpy() for name in ("document", "margin", "factual", "correct")
    )
    if not np.isfinite(margin).all():
        return None
    documents, cluster = np.unique(document, return_inverse=True)
    statistic = bootstrap.auc(cluster, margin, factual & ~correct)
    return Units(len(documents), statistic, (document, factual))


def _prompts(value: str, weight: str | None = None) -> Callable[[pa.Table], Units]:
    """The mean of a column over prompts, or its sum over that of `weight`; clusters are documents where there are."""

    def units(table: pa.Table) -> Units:
        table = table.sort_by("prompt")
        identity = tuple(table[name].to_numpy() for name in ("prompt", "document") if name in table.column_names)
        clusters, cluster = np.unique(identity[-1], return_inverse=True)
        values = table[value].cast(pa.float64()).to_numpy()
        if weight is None:
            return Units(len(clusters), bootstrap.mean(cluster, values), identity)
        over = table[weight].cast(pa.float64()).to_numpy()
        share = np.divide(values, over, out=np.zeros_like(values), where=over > 0)
        return Units(len(clusters), bootstrap.mean(cluster, share, over), identity)

    return units


def _entities(table: pa.Table) -> Units:
    """The mean score of the texts that have one."""
    entities, cluster = np.unique(table["entity"].to_numpy(), return_inverse=True)
    score = table["score"].cast(pa.float64()).to_numpy()
    scored = np.isfinite(score)
    return Units(len(entities), bootstrap.mean(cluster, np.where(scored, score, 0), scored), (entities,))


def _questions(table: pa.Table) -> Units:
    """The mean over tasks of the mean over their questions."""
    table = table.sort_by([("task", "ascending"), ("doc", "ascending")])
    task, doc, value = (table[name].to_numpy() for name in ("task", "doc", "value"))
    cluster = np.arange(len(value))
    means = [bootstrap.mean(cluster, value, task == name) for name in np.unique(task)]

    def statistic(multiplicities: np.ndarray) -> np.ndarray:
        return np.mean([mean(multiplicities) for mean in means], axis=0)

    return Units(len(value), statistic, (task, doc))


COLUMNS: Final = (
    Column(
        "delegation",
        "auc.margin.factual_wrong",
        "call AUC",
        "how well the score of <CALL> tells factual tokens that the model gets wrong from all others.",
        _tokens,
        percent=False,
    ),
    Column(
        "leakage",
        "contained",
        "leaked",
        "prompts whose fact is in what the model writes, unable to call.",
        _prompts("contained"),
    ),
    Column(
        "containment",
        "contained",
        "contained",
        "prompts whose fact is in what the cascade writes.",
        _prompts("contained"),
    ),
    Column(
        "containment", "called", "called", "share of its positions that asked the partner.", _prompts("calls", "tokens")
    ),
    Column("factscore", "score", "FActScore", "facts of a text that the knowledge source supports.", _entities),
    Column("nlu", "average", "NLU", "mean over tasks of acc_norm or acc, <CALL> forbidden.", _questions),
)
KINDS: Final = tuple(dict.fromkeys(column.kind for column in COLUMNS))


def _training(folder: Path) -> tuple[str | None, int | None]:
    """The objective, and the tokens learnt up to a checkpoint, as far as its run's folder tells them."""
    run = folder.parent.parent
    if folder.parent.name != "checkpoints":
        return None, None
    objective = learnt = None
    with suppress(TrainingError, ValidationError, TypeError):
        objective = config.load({"out": run}, None, resume=True).objective if (run / "config.yaml").is_file() else None
    with suppress(OSError, ValueError, KeyError, TypeError):
        step = int(folder.name.removeprefix("step-"))
        counts = [
            int(record["gt_tokens"]) for record in logs.read(run) if "gt_tokens" in record and record["step"] <= step
        ]
        learnt = counts[-1] if counts else None
    return objective, learnt


def _curve(found: tuple[Result, pa.Table] | None) -> Curve | None:
    """By margin, else by uncertainty, of a model that has no <CALL>."""
    curves = found[0].details.get("curves") if found else None
    if found is None or not curves:
        return None
    score = "margin" if "margin" in curves else "uncertainty"
    try:
        return Curve(
            score=score,
            shares=found[0].details["shares"],
            values={name: curves[score][name] for name in CURVES},
        )
    except (KeyError, TypeError, ValidationError):
        raise CascadeError(
            f"the curves of {found[0].checkpoint} are damaged: lacy eval delegation writes them anew"
        ) from None


def _looks() -> Any:
    """Colour and dashes of one run's lines after another's; all colours before a second kind of dashes."""
    return cycle((colour, dashes) for dashes, colour in product(DASHES, COLOURS))


def _charts(lines: Sequence[tuple[Curve, str, tuple[float, ...]]]) -> str:
    """An SVG element. It has no text but the axes', so that no run's name is ever markup or mathematics."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import PercentFormatter
    except ImportError:
        raise CascadeError("the page's curves need matplotlib: pip install 'lacy[eval]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(10.4, 3.7), layout="constrained")
        for axes, (name, label) in zip(figure.subplots(1, len(CURVES)), CURVES.items(), strict=True):
            for curve, colour, dashes in lines:
                shown = np.array(curve.shares) <= SHOWN
                values = np.array(curve.values[name], np.float64)
                line = (0, dashes) if dashes else "-"
                axes.plot(np.array(curve.shares)[shown], values[shown], color=colour, linewidth=1.8, linestyle=line)
            axes.set_xlim(0, SHOWN)
            axes.set_xlabel("share of tokens called")
            axes.set_ylabel(label)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return file.getvalue()[file.getvalue().index("<svg") :]


def _table(title: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(Text(title), overflow="fold", ratio=1, min_width=16)
    for column in COLUMNS:
        table.add_column(Text(column.title), justify="right", no_wrap=True)
    return table


def _plain(text: str) -> str:
    """In one line, with nothing in it that steers a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
