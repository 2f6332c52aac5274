"""`lacy stats`: the figures of a dataset as tables in a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from lacy.schemas.printable import printable
from lacy.stats import figures
from lacy.stats.figures import QUANTILES, Losses, Stats, Word

ROWS: Final = 12  # of a table of groups; smaller groups are added up in the last row
KINDS: Final = 3  # named in one cell
_WIDE = 100
_WORD_WIDTH = 22


def show(stats: Stats, console: Console) -> None:
    """Print the figures as tables, two side by side where the terminal has 100 columns, as a file always does."""
    if not console.is_terminal and console.width < _WIDE:
        console = Console(file=console.file, width=_WIDE)

    def put(caption: str, *tables: Table) -> None:
        console.print()
        console.print(Text(caption, style="bold"))
        console.print(_beside(tables, console.width), crop=False)

    console.print(Text(_headline(stats)), soft_wrap=True)
    if not stats.tokens:
        return
    if stats.label_sets:
        put("Decisions of each label set, as shares of all tokens", _label_sets_table(stats))
    verb = _verb(stats)
    mine = f" or {verb} by {printable(stats.labels)}" if stats.labels else ""
    scored = _scored(stats)
    shares = f"tokens, how many are factual{mine}{', mean loss' if scored else ''}"
    if stats.by:
        put(f"By {printable(stats.by)}: {shares}", _groups_table(printable(stats.by), stats.groups, stats))
    put(
        f"By part of speech and entity type: {shares}",
        _groups_table("pos", stats.pos, stats),
        _groups_table("ent_type", stats.ent_type, stats),
    )
    put(
        "By position in the document and by document length, in tokens",
        _groups_table("position", stats.position, stats),
        _groups_table("length", stats.length, stats),
    )
    if scored:
        put("Quantiles of the reference model's loss, in nats", _losses_table(stats.losses))
    if stats.budgets:
        what = "factual tokens with the highest loss" if stats.policy == "lacy" else "tokens with the highest loss"
        put(f"Choice of policy {stats.policy} at each budget: the {what}", _budgets_table(stats))
    if agreements := _agreements(stats):
        put("Agreement between label sets, as shares of all tokens", _agreement_table(stats, agreements))
    often = f"{stats.kept_at_least} times or more" if stats.kept_at_least > 1 else "at all"
    if stats.chosen_words:
        kept = [_kept_table(stats.kept_words, "kept")] if stats.kept_words else []
        also = f", and words kept {often} with the highest loss" if kept else ""
        put(f"Words most often {verb}{also}", _chosen_table(stats.chosen_words, verb), *kept)
    elif stats.kept_words:
        put(f"Words seen {often} with the highest mean loss", _kept_table(stats.kept_words, "count"))
    for note in stats.notes:
        console.print()
        console.print(Text(note, style="dim"))


def _headline(stats: Stats) -> str:
    where = f" where {printable(stats.where)}" if stats.where is not None else ""
    if not stats.tokens:
        return f"{printable(stats.dataset)}: no tokens{where}"
    bad = f", {stats.bad:,} bad records" if stats.bad else ""
    share = _share(stats.factual, stats.tokens)
    figures = f"{stats.documents:,} documents, {stats.tokens:,} tokens, {share} factual{bad}"
    return f"{printable(stats.dataset)}{where}: {figures}"


def _scored(stats: Stats) -> bool:
    return bool(stats.losses.factual or stats.losses.other)


def _verb(stats: Stats) -> str:
    actions = {labels.name: labels.action for labels in stats.label_sets}
    return "ignored" if stats.labels is not None and actions[stats.labels] == "ignore" else "delegated"


def _label_sets_table(stats: Stats) -> Table:
    table = _table(
        "labels", "policy", numbers=("budget", "delegated", "ignored", "factual of these", "lowest score chosen")
    )
    for labels in stats.label_sets:
        table.add_row(
            _name(labels.name),
            _name(labels.policy),
            "none" if labels.budget is None else f"{labels.budget:.1%}",
            _share(labels.delegated, labels.tokens),
            _share(labels.ignored, labels.tokens),
            _share(labels.factual, labels.delegated + labels.ignored),
            _number(labels.threshold),
        )
    return table


def _groups_table(title: str, groups: Sequence[figures.Group], stats: Stats) -> Table:
    scored = _scored(stats)
    chosen = [_verb(stats)] if stats.labels else []
    table = _table(title, numbers=("tokens", "share", "factual", *chosen, *(["loss"] if scored else [])), gap=1)
    for group in _fold(groups):
        row = [_count(group.tokens), _share(group.tokens, stats.tokens), _share(group.factual, group.tokens)]
        row += [_share(group.delegated + group.ignored, group.tokens)] if stats.labels else []
        row += [_number(group.mean_nll)] if scored else []
        table.add_row(_name(group.name or "(none)"), *row)
    return table


def _fold(groups: Sequence[figures.Group]) -> list[figures.Group]:
    """The first groups, and all others as one."""
    if len(groups) <= ROWS:
        return list(groups)
    rest = groups[ROWS - 1 :]
    sums = {name: sum(getattr(group, name) for group in rest) for name in figures.COUNTS}
    return [*groups[: ROWS - 1], figures.Group(name=f"({len(rest)} others)", **sums)]


def _budgets_table(stats: Stats) -> Table:
    table = _table(numbers=("budget", "picked", "lowest loss", "mean loss"), gap=2)
    table.add_column("parts of speech picked")
    table.add_column("entity types picked")
    for pick in stats.budgets:
        mean = pick.nll / pick.tokens if pick.tokens else None
        row = (f"{pick.budget:.0%}", _share(pick.tokens, stats.tokens), _number(pick.threshold), _number(mean))
        table.add_row(*row, _most(pick.pos), _most(pick.ent_type))
    return table


def _most(counts: Mapping[str, int]) -> Text:
    total = sum(counts.values())
    return _listed(f"{name or '(none)'} {count / total:.0%}" for name, count in list(counts.items())[:KINDS])


def _listed(items: Iterable[str]) -> Text:
    """Text for a column that may be narrowed to make a table fit; a `no_wrap` column never is."""
    return Text(", ".join(items), no_wrap=True, overflow="ellipsis")


def _agreements(stats: Stats) -> list[figures.Agreement]:
    """The comparisons of the chosen label set with each other one."""
    return [pair for pair in stats.agreement if stats.labels in (pair.a, pair.b)]


def _agreement_table(stats: Stats, agreements: Iterable[figures.Agreement]) -> Table:
    mine = stats.labels or ""
    table = _table(f"{printable(mine)} and", numbers=("same", "kappa", "both", f"only {printable(mine)}", "only other"))
    table.add_column("largest differences")
    for pair in agreements:
        other, only_this, only_other = pair.b, pair.only_a, pair.only_b
        if pair.b == mine:
            other, only_this, only_other = pair.a, pair.only_b, pair.only_a
        where = (
            f"{difference.pos or '(none)'} {difference.ent_type}".strip()
            + f" {difference.different / difference.tokens:.0%}"
            for difference in pair.differences[:KINDS]
        )
        shares = (_share(count, stats.tokens) for count in (pair.both, only_this, only_other))
        table.add_row(_name(other), _share(pair.same, stats.tokens), _number(pair.kappa), *shares, _listed(where))
    return table


def _losses_table(losses: Losses) -> Table:
    table = _table("tokens", numbers=tuple(f"{share:.0%}" for share in QUANTILES))
    for name, values in (("factual", losses.factual), ("other", losses.other)):
        if values:
            table.add_row(name, *map(_number, values))
    return table


def _chosen_table(words: list[Word], verb: str) -> Table:
    table = _table("word", numbers=(verb, "count", "loss"))
    for word in words:
        table.add_row(_name(word.word), _count(word.chosen), _count(word.occurrences), _number(word.mean_nll))
    return table


def _kept_table(words: list[Word], count: str) -> Table:
    table = _table("word", numbers=(count, "loss"))
    for word in words:
        table.add_row(_name(word.word), _count(word.occurrences - word.chosen), _number(word.mean_kept_nll))
    return table


def _table(*names: str, numbers: Sequence[str], gap: int = 2) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
    for name in names:
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=_WORD_WIDTH)
    for name in numbers:  # where space is short the heading wraps, so that no digit is cut
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    return table


def _beside(tables: Sequence[Table], width: int) -> RenderableType:
    if len(tables) == 1:
        return tables[0]
    if width < _WIDE:
        return Group(tables[0], *(line for table in tables[1:] for line in ("", table)))
    grid = Table.grid(padding=(0, 2))
    grid.add_row(*tables)
    return grid


def _name(text: str) -> Text:
    return Text(printable(text))


def _count(number: int) -> str:
    """Exact to 99,999, then three digits."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= max(size, 100_000):
            scaled = number / size
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{unit}"
    return f"{number:,}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:z.2f}"
