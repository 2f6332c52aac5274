"""Runs side by side: the main figures of their evaluations, as tables and as a page with curves.

The figures are those saved for each run's newest checkpoint (`lacy.cascade.evaluation.results`). Intervals are
bootstrapped from the units of the results (`lacy.cascade.evaluation.bootstrap`), over documents, prompts, entities or
questions. If a run was measured on the same of these as the first one, there is also an interval of their difference,
paired: both see the same resamples.
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
SHOWN: Final = 0.6  # share called up to which curves are drawn; the accuracy on few kept tokens is noise
CURVES: Final = {
    "kept_accuracy": "accuracy of the tokens kept",
    "covered": "share of factual and wrong tokens called",
}
COLORS: Final = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito's, safe for color blindness
DASHES: Final = ((), (4, 2), (1, 1.5), (5, 1.5, 1, 1.5))  # widths of dashes and gaps
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

# The commands that produce a run's results of each kind.
COMMANDS: Final = {
    "delegation": "lacy eval delegation {}",
    "leakage": "lacy eval leakage {}",
    "containment": "lacy eval leakage {} --partner MODEL",
    "factscore": "lacy eval factscore {} --entities FILE --knowledge FILE --judge MODEL",
    "nlu": "lacy eval nlu {} --task TASK",
}


@dataclass(frozen=True)
class Units:
    """The units behind a figure: the number of clusters, the statistic, and an identity equal for the same units."""

    clusters: int
    statistic: bootstrap.Statistic
    identity: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Column:
    """A figure of a kind of evaluation; `units` returns None if a model has no such figure."""

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
    """A figure with its interval (`bootstrap.LEVEL`), None for fewer than two clusters."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def clear(self) -> bool:
        """Whether 0 is outside of the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


class Curve(_Model):
    """Values by share of tokens called (S,), those with the highest `score`; None where undefined."""

    score: str
    shares: list[float]
    values: dict[str, list[float | None]]


class Row(_Model):
    """A run; `figures`, and `differences` from the first run, are by column name."""

    name: str
    checkpoint: str
    objective: str | None
    learnt_tokens: int | None  # trained on the true token; the name is part of the JSON output
    figures: dict[str, Estimate | None]
    differences: dict[str, Estimate | None]
    missing: list[str]  # kinds that were not evaluated
    hints: list[str]  # commands that evaluate them
    curve: Curve | None = Field(default=None, exclude=True)


class Comparison(_Model):
    level: float
    rows: list[Row]


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare the results of runs or checkpoints. Raises CascadeError if one has no checkpoint, or is damaged."""
    rows: list[Row] = []
    first: dict[str, _Measured] = {}
    for number, (run, name) in enumerate(zip(runs, names(runs), strict=True)):
        folder = checkpoint(run)
        read = {kind: results.read(results_folder(folder), kind) for kind in KINDS}
        measured = {}
        for column in COLUMNS:
            saved = read[column.kind]
            if saved is not None and (figure := _measured(column, *saved)) is not None:
                measured[column.name] = figure
        if number == 0:
            first = measured
        missing = [kind for kind in KINDS if read[kind] is None]
        objective, learned = _training(folder)
        rows.append(
            Row(
                name=name,
                checkpoint=folder.name,
                objective=objective,
                learnt_tokens=learned,
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
    """A name for each run: its folder's name, with as many parent folders as distinguish it from the others.

    A checkpoint is RUN/STEP; runs that are given twice are numbered.
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
    """Print the tables; without a terminal, as plain text of WIDTH columns."""
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
                    Text(cell(c, estimate, difference=True), style="bold" if estimate and estimate.clear else "")
                    for c, estimate in estimates
                ),
            )
        console.print()
        console.print(differences)
    console.print()
    for line in notes(comparison):
        console.print(Text(line, style="dim"))


def notes(comparison: Comparison) -> list[str]:
    """Explanations of the tables, and the commands that would fill their gaps."""
    lines = [f"{column.title}: {column.note}" for column in COLUMNS]
    lines.append(f"In brackets: {comparison.level:.0%} bootstrap intervals, paired for differences.")
    if any(
        row.differences[name] is None for row in comparison.rows[1:] for name in row.differences if row.figures[name]
    ):
        lines.append("No difference: not measured on the same documents, prompts or questions as the first run.")
    missing = {kind for row in comparison.rows for kind in row.missing}
    gaps = [hint.format("RUN") for kind, hint in COMMANDS.items() if kind in missing]
    return lines + ([f"To fill in a dash: {'; '.join(gaps)}"] if gaps else [])


def cell(column: Column, estimate: Estimate | None, difference: bool = False) -> str:
    """A figure, and on a second line its interval; a dash without one. Differences of shares are percentage points."""
    if estimate is None:
        return "-"
    scale, digits, unit = (100, 1, " pp" if difference else " %") if column.percent else (1, 3, "")
    value = f"{estimate.value * scale:{'+' if difference else ''}.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return value
    digits = 1 if column.percent else 3 if difference else 2
    return f"{value}\n[{estimate.low * scale:.{digits}f} {estimate.high * scale:.{digits}f}]"


def trained(row: Row) -> str:
    """The run's objective, and the number of tokens that were trained on their true token."""
    count = row.learnt_tokens
    learned = None
    if count is not None:
        unit, size = next(((u, s) for u, s in (("B", 1e9), ("M", 1e6), ("K", 1e3)) if count >= s), ("", 1))
        learned = f"{count / size:.3g}{unit} learned"
    return ", ".join(part for part in (row.objective, learned) if part) or "-"


def page(comparison: Comparison) -> str:
    """A self-contained HTML page: tables, curves, notes. Text is escaped; equal comparisons give equal pages.

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
    draws: np.ndarray | None  # (resamples,) the statistic's values on the resamples
    identity: tuple[np.ndarray, ...]


def _measured(column: Column, result: Result, table: pa.Table) -> _Measured | None:
    try:
        units = column.units(table)
    except (KeyError, TypeError, ValueError, pa.ArrowException):
        again = COMMANDS[column.kind].format("RUN")
        raise CascadeError(f"the {column.kind} units of {result.checkpoint} are damaged: rerun {again}") from None
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
    bounds = bootstrap.bounds(mine.draws - first.draws) if same else None
    return bounds and Estimate(value=mine.estimate.value - first.estimate.value, low=bounds[0], high=bounds[1])


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
    """The mean of a column over prompts, or its sum over that of `weight`; clusters are documents if there are any."""

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
    """The mean score of the texts with a score."""
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
        "how well the score of <CALL> separates factual tokens that the model gets wrong from all others.",
        _tokens,
        percent=False,
    ),
    Column(
        "leakage",
        "contained",
        "leaked",
        "prompts whose fact the model states when it cannot call.",
        _prompts("contained"),
    ),
    Column(
        "containment",
        "contained",
        "contained",
        "prompts whose fact the cascade states.",
        _prompts("contained"),
    ),
    Column(
        "containment",
        "called",
        "called",
        "share of its positions that called the partner.",
        _prompts("calls", "tokens"),
    ),
    Column("factscore", "score", "FActScore", "facts of a text that the knowledge source supports.", _entities),
    Column("nlu", "average", "NLU", "mean over tasks of acc_norm or acc, <CALL> forbidden.", _questions),
)
KINDS: Final = tuple(dict.fromkeys(column.kind for column in COLUMNS))


def _training(folder: Path) -> tuple[str | None, int | None]:
    """The objective, and the tokens learned up to a checkpoint; None where its run's folder does not say."""
    run = folder.parent.parent
    if folder.parent.name != "checkpoints":
        return None, None
    objective = learned = None
    with suppress(TrainingError, ValidationError, TypeError):
        objective = config.load({"out": run}, None, resume=True).objective if (run / "config.yaml").is_file() else None
    with suppress(OSError, ValueError, KeyError, TypeError):
        step = int(folder.name.removeprefix("step-"))
        counts = [
            int(record["gt_tokens"]) for record in logs.read(run) if "gt_tokens" in record and record["step"] <= step
        ]
        learned = counts[-1] if counts else None
    return objective, learned


def _curve(saved: tuple[Result, pa.Table] | None) -> Curve | None:
    """The curve by margin, or by uncertainty for a model without <CALL>."""
    curves = saved[0].details.get("curves") if saved else None
    if saved is None or not curves:
        return None
    score = "margin" if "margin" in curves else "uncertainty"
    try:
        return Curve(
            score=score,
            shares=saved[0].details["shares"],
            values={name: curves[score][name] for name in CURVES},
        )
    except (KeyError, TypeError, ValidationError):
        raise CascadeError(
            f"the curves of {saved[0].checkpoint} are damaged: write them again with lacy eval delegation"
        ) from None


def _looks() -> Any:
    """Color and dashes of each run's lines: all colors before the next kind of dashes."""
    return cycle((color, dashes) for dashes, color in product(DASHES, COLORS))


def _charts(lines: Sequence[tuple[Curve, str, tuple[float, ...]]]) -> str:
    """An SVG element. Its only text is that of the axes, so that no run's name is read as markup or mathematics."""
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
            for curve, color, dashes in lines:
                shown = np.array(curve.shares) <= SHOWN
                values = np.array(curve.values[name], np.float64)
                line = (0, dashes) if dashes else "-"
                axes.plot(np.array(curve.shares)[shown], values[shown], color=color, linewidth=1.8, linestyle=line)
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
    """The text on one line, without characters that control a terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
