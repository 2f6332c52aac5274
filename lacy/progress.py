"""Progress and messages of a run: a bar on a terminal and in a notebook, a line every few seconds elsewhere."""

import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from rich import filesize
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

STAGE_SECONDS = 2.0  # after which a stage is named
INTERVAL = 10.0  # seconds between progress lines where there is no terminal


def messages(progress: bool | Callable[[str], None] = True) -> Console:
    """The console for messages: on stderr, silent, or a function that gets each line.

    Lines are not wrapped.
    """
    if callable(progress):
        return Console(file=_Lines(progress), highlight=False, markup=False, soft_wrap=True)  # type: ignore[arg-type]
    return Console(stderr=True, quiet=not progress, highlight=False, markup=False, soft_wrap=True)


class _Lines:
    """A text file that hands each line to a function."""

    def __init__(self, say: Callable[[str], None]):
        self._say = say

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._say(line)
        return len(text)

    def flush(self) -> None:
        pass


def span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def size(value: float) -> str:
    return filesize.decimal(round(value))


class _Field(ProgressColumn):
    def render(self, task: Any) -> Text:
        return Text(task.fields["text"])


class View:
    """One bar with a text beside it."""

    def __init__(self, console: Console, name: str):
        self.console = console
        self._name = name
        self._live = not console.quiet and (
            console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        )
        columns = TextColumn(name), BarColumn(24), _Field(), TimeElapsedColumn()
        self._bar = Progress(*columns, console=console, transient=True)
        self._task: Any = None
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        if self._task is not None:
            self._bar.stop()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def begin(self, text: str = "", share: float | None = None) -> None:
        """Start the bar. share: how much is done already, 0 to 1; None: not known yet."""
        self._began = self._printed = time.monotonic()
        self._start_bar(text, share)

    def _start_bar(self, text: str, share: float | None = None) -> None:
        if self._live and self._task is None:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None if share is None else 1, text=text)
            self._bar.update(self._task, completed=share)

    def show(self, share: float, text: str) -> None:
        if self._live:
            if self._task is None:
                self.begin(text, share)
            self._bar.update(self._task, total=1, completed=share, text=text)
        elif time.monotonic() - self._printed > INTERVAL:
            self._printed = time.monotonic()
            self.console.print(f"{self._name}: {text}")


class CountView(View):
    """Items that are done, of a number that is known, or not."""

    def __init__(self, console: Console, name: str, unit: str = ""):
        super().__init__(console, name)
        self._unit = unit

    def __call__(self, done: int, total: int) -> None:
        count = f"{done:,} of {total:,}" if total else f"{done:,}"
        self.show(done / total if total else 0.0, f"{count} {self._unit}".rstrip())


class LabelView(View):
    """Documents, tokens, rate, parts, bad records and time left of a labelling run."""

    def __init__(self, console: Console):
        super().__init__(console, "label")
        self._bytes = self._parts = 0
        self._before: tuple[int, int, int, int] = (0, 0, 0, 0)
        self._stage = ""
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()  # the timer's thread names a stage, and may start the bar
        self.scored = 0
        self.warning = ""

    def __exit__(self, *_: object) -> None:
        self.stage("")
        super().__exit__()

    def stage(self, name: str) -> None:
        """Begin a stage, or none ("") once the work itself shows progress."""
        with self._lock:
            if self._timer:
                self._timer.cancel()
            self._stage, self._timer = name, None
        if name:
            self._timer = threading.Timer(STAGE_SECONDS, self._name_stage, [name])
            self._timer.daemon = True
            self._timer.start()

    def _name_stage(self, name: str) -> None:
        with self._lock:
            if self._stage != name:  # it ended as the timer went off
                return
            if self._live:
                self._start_bar(name)
                self._bar.update(self._task, text=name)
            else:
                self.console.print(f"label: {name}")

    def start(self, outlook: Any) -> None:
        finished = outlook.finished
        self._bytes, self._parts = outlook.bytes, outlook.parts
        self._before = (
            len(finished),
            sum(part.rows for part in finished),
            sum(part.tokens for part in finished),
            sum(part.bad for part in finished),
        )
        self.warning = outlook.warning
        if self.warning:
            self.console.print(f"warning: {self.warning}", style="yellow")
        if finished and outlook.bytes:
            self.console.print(f"resuming: {len(finished):,} parts are finished")
        with self._lock:
            self.begin(self._stage)

    def update(self, counts: Any) -> None:
        parts, documents, tokens, bad = self._before
        self.scored = counts.tokens + counts.scored
        elapsed = self.seconds
        fraction = self._fraction(counts, self._bytes + counts.planned_bytes)
        if not self.scored and not counts.parts:
            if self._stage and self._live:
                self.show(fraction, self._stage)
            return
        if self._stage:
            self.stage("")
        left = f", {span(elapsed / fraction - elapsed)} left" if counts.parts else ""
        restarts = f", {counts.restarts:,} engine restarts" if counts.restarts else ""
        all_parts = parts + self._parts + counts.planned_parts
        self.show(
            fraction,
            f"{documents + counts.documents:,} documents, {tokens + self.scored:,} tokens, "
            f"{self.scored / max(elapsed, 1e-9):,.0f} tokens/s, "
            f"{parts + counts.parts:,}/{all_parts:,} parts, {bad + counts.bad:,} bad{restarts}{left}",
        )

    def _fraction(self, counts: Any, total_bytes: int) -> float:
        """Share of the corpus bytes that is done; unfinished parts count by the tokens per byte so far."""
        if not total_bytes:
            return 0.0
        per_token = counts.bytes / counts.tokens if counts.tokens else 4.0
        return min(1.0, (counts.bytes + counts.scored * per_token) / total_bytes)


class TrainView(View):
    """Steps, losses, rate and time left of a training run; validations and notes are lines of their own."""

    def __init__(self, console: Console):
        super().__init__(console, "train")
        self._done = 0.0
        self.heard = False  # whether this rank reports at all

    def report(self, event: str, figures: dict[str, Any]) -> None:
        self.heard = True
        getattr(self, "_" + event)(figures)

    def _start(self, figures: dict[str, Any]) -> None:
        begins = f"resuming at step {figures['step']:,}" if figures["step"] else "from the beginning"
        limit = f"{figures['max_steps']:,} steps" if figures["max_steps"] else f"{figures['gt_limit']:,} learned tokens"
        self.console.print(
            f"{figures['parameters']:,} parameters, {figures['objective']}, {figures['device']}, "
            f"{figures['precision']}; {figures['tokens_per_step']:,} tokens a step, {limit}, {begins}"
        )
        self._done = figures["done"]
        self.begin(share=self._done)

    def _step(self, figures: dict[str, Any]) -> None:
        done = figures["done"] - self._done
        remaining = 1 - figures["done"]
        left = f", {span(self.seconds / done * remaining)} left" if done > 0 and remaining > 0 else ""
        call = "" if figures["call_loss"] is None else f", call {figures['call_loss']:.3f} ({figures['called']:.1%})"
        mfu = "" if figures["mfu"] is None else f", MFU {figures['mfu']:.1%}"
        if remaining <= 0:
            self._printed = float("-inf")  # the last step is printed whenever it comes
        self.show(
            figures["done"],
            f"step {figures['step']:,}, learn {figures['learn_loss'] or 0:.3f}{call}, "
            f"{figures['tokens_per_second']:,.0f} tokens/s{mfu}, {size(figures['memory'])}{left}",
        )

    def _valid(self, figures: dict[str, Any]) -> None:
        def figure(name: str) -> str:
            return "none" if figures[name] is None else f"{figures[name]:.3f}"

        self.console.print(
            f"step {figures['step']:,}, held out: nats {figure('nll_factual')} factual, {figure('nll_other')} other; "
            f"AUC of p(<CALL>) for factual and wrong {figure('auc_factual_wrong')}"
        )

    def _note(self, figures: dict[str, Any]) -> None:
        self.console.print(figures["text"], style="yellow")
