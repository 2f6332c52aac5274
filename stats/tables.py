"""`lacy stats`: the figures of a dataset, and tables of them.

Three scans over the views: one counts tokens by part of speech, entity type and label; one takes the quantiles of the
loss; one joins tokens to words. The last costs most, about 3 seconds of one core for a million tokens.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import duckdb
from pydantic import BaseModel, ConfigDict, computed_field
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from schemas.codes import LABELS, LEARN
from schemas.manifest import DatasetError, LabelSet, label_sets, read_complete
from stats.connect import connect, one_line
from stats.printable import printable

DEFAULT_LABELS: Final = "lacy"
QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
EXACT_QUANTILES: Final = 50_000_000  # tokens; with more they are estimated, in little memory
WORDS: Final = 10  # of each kind
KINDS: Final = 12  # rows of the tables by part of speech and entity type
RARE: Final = 5  # occurrences that the mean loss of a kept word is taken over at least, see `_rare`


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Labels(_Model):
    name: str
    policy: str
    action: str
    budget: float | None  # share of all tokens
    threshold: float | None  # the lowest score chosen
    delegated: float  # share of all tokens
    ignored: float


class Kind(_Model):
    """The tokens of one part of speech or entity type."""

    name: str  # "" for none
    tokens: int
    factual: int
    chosen: int  # delegated or ignored
    scored: int  # tokens that have a loss
    nll: float  # sum over the scored tokens, nats

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean_nll(self) -> float | None:
        return self.nll / self.scored if self.scored else None


class Losses(_Model):
    """`ref_nll` of the tokens that have one, nats."""

    factual: list[float]  # at QUANTILES; empty when no token has a loss
    other: list[float]


class Word(_Model):
    """A word without the punctuation around it. Its loss is the sum over its tokens."""

    word: str
    occurrences: int
    chosen: int  # occurrences with a token that is delegated or ignored
    mean_nll: float | None  # nats, over all occurrences
    mean_kept_nll: float | None  # over the occurrences that are not chosen


class Stats(_Model):
    dataset: str
    documents: int
    tokens: int
    factual: int  # tokens
    bad: int  # records in deadletter/
    label_sets: list[Labels]
    labels: str | None  # the label set that the figures below are about; None when there is none
    pos: list[Kind]  # most tokens first
    ent_type: list[Kind]
    losses: Losses
    chosen_words: list[Word]  # most often chosen first
    kept_words: list[Word]  # highest mean_kept_nll first
    kept_at_least: int  # times that each of kept_words was kept
    notes: list[str]


def compute(dataset: str | Path, labels: str | None = None) -> Stats:
    """Count. `labels` names the label set; None takes DEFAULT_LABELS where there is one, else the first by name.

    Raises DatasetError for a dataset that is missing, unfinished or damaged, or that has no such label set.
    """
    folder = Path(dataset)
    manifest = read_complete(folder)
    sets = label_sets(folder)
    labels = pick_labels(folder, sets, labels)
    has_loss = has_text = False
    with connect(folder) as connection:
        try:
            groups = connection.execute(_KINDS_SQL.format(tokens=_tokens(labels)), _parameters(labels)).fetchall()
            has_loss = any(scored for *_, scored, _ in groups)
            losses = _losses(connection, manifest.tokens) if has_loss else Losses(factual=[], other=[])
            has_text = connection.execute("SELECT text IS NOT NULL FROM documents LIMIT 1").fetchone() == (True,)
            at_least = _rare(manifest.tokens)
            words = _words(connection, labels, at_least) if has_text else []
        except duckdb.Error as error:
            raise DatasetError(f"{dataset} cannot be read: {one_line(error)} (lacy check says more)") from None
    notes = []
    if not has_text:
        notes.append("no tables of words: the dataset was made without text (--no-text)")
    if not has_loss:
        notes.append("no losses: the dataset was made without a reference model")
    if manifest.tokens > EXACT_QUANTILES:
        notes.append("quantiles are estimated")
    return Stats(
        dataset=str(dataset),
        documents=manifest.documents,
        tokens=manifest.tokens,
        factual=manifest.factual,
        bad=manifest.bad,
        label_sets=[_label_set(found) for found in sets.values()],
        labels=labels,
        pos=_kinds((pos, *counts) for pos, _, *counts in groups),
        ent_type=_kinds((ent_type, *counts) for _, ent_type, *counts in groups),
        losses=losses,
        chosen_words=sorted((w for w in words if w.chosen), key=lambda w: (-w.chosen, w.word))[:WORDS],
        kept_words=_kept(words, at_least),
        kept_at_least=at_least,
        notes=notes,
    )


def pick_labels(dataset: Path, sets: dict[str, LabelSet], asked: str | None) -> str | None:
    """The name of the label set to look at, None when there is none. Raises DatasetError for one that is not there."""
    if asked is not None and asked not in sets:
        there = f"it has {', '.join(sets)}" if sets else "lacy decide makes one"
        raise DatasetError(f"{dataset} has no label set {asked!r}: {there}")
    if asked is None:
        return DEFAULT_LABELS if DEFAULT_LABELS in sets else next(iter(sets), None)
    return asked


def _tokens(labels: str | None) -> str:
    """The tokens, with `chosen`."""
    if labels is None:
        return "(SELECT *, false AS chosen FROM tokens)"
    return f"(SELECT *, label <> '{LABELS[LEARN]}' AS chosen FROM labels WHERE labels = $labels)"


def _parameters(labels: str | None) -> dict[str, str]:
    return {} if labels is None else {"labels": labels}


_KINDS_SQL = """
SELECT coalesce(pos, ''), coalesce(ent_type, ''), count(*), count_if(factual), count_if(chosen), count(ref_nll),
    coalesce(sum(ref_nll), 0)
FROM {tokens}
GROUP BY 1, 2"""


def _kinds(groups: Iterable[tuple[Any, ...]]) -> list[Kind]:
    """Add up (name, tokens, factual, chosen, scored, nll) by name; most tokens first."""
    sums: dict[str, list[Any]] = {}
    for name, *counts in groups:
        sums[name] = [a + b for a, b in zip(sums.get(name, [0] * len(counts)), counts, strict=True)]
    kinds = [
        Kind(name=name, tokens=tokens, factual=factual, chosen=chosen, scored=scored, nll=nll)
        for name, (tokens, factual, chosen, scored, nll) in sums.items()
    ]
    return sorted(kinds, key=lambda kind: (-kind.tokens, kind.name))


def _losses(connection: duckdb.DuckDBPyConnection, tokens: int) -> Losses:
    quantile = "quantile_cont" if tokens <= EXACT_QUANTILES else "approx_quantile"
    found = connection.execute(
        f"SELECT factual, {quantile}(ref_nll, {list(QUANTILES)}) FROM tokens WHERE ref_nll IS NOT NULL GROUP BY factual"
    ).fetchall()
    by_factual = dict(found)
    return Losses(factual=by_factual.get(True, []), other=by_factual.get(False, []))


# Punctuation goes when words are few: after those that are spelled alike are counted together.
_WORDS_SQL = r"""
WITH occurrences AS (
    SELECT any_value(word) AS word, bool_or(chosen) AS chosen, sum(ref_nll) AS nll
    FROM {tokens}
    WHERE word IS NOT NULL
    GROUP BY doc_id, word_start
),
spelled AS (
    SELECT word, count(*) AS occurrences, count_if(chosen) AS chosen,
        sum(nll) AS nll, count(nll) AS scored,
        sum(nll) FILTER (NOT chosen) AS kept_nll, count(nll) FILTER (NOT chosen) AS kept_scored
    FROM occurrences
    GROUP BY word
),
words AS (
    SELECT regexp_replace(word, '^\p{{P}}+|\p{{P}}+$', '', 'g') AS word,
        sum(occurrences)::BIGINT AS occurrences, sum(chosen)::BIGINT AS chosen,
        sum(nll) / nullif(sum(scored), 0) AS mean_nll, sum(kept_nll) / nullif(sum(kept_scored), 0) AS mean_kept_nll
    FROM spelled
    GROUP BY 1
)
SELECT * FROM words
WHERE word <> ''
QUALIFY row_number() OVER (ORDER BY chosen DESC, word) <= {most}
    OR row_number() OVER (
        ORDER BY occurrences - chosen >= {at_least} DESC, mean_kept_nll DESC NULLS LAST, word) <= {most}"""


def _words(connection: duckdb.DuckDBPyConnection, labels: str | None, at_least: int) -> list[Word]:
    """The words most often chosen, and those with the highest loss among those kept often enough."""
    sql = _WORDS_SQL.format(tokens=_tokens(labels), most=WORDS, at_least=at_least)
    names = ("word", "occurrences", "chosen", "mean_nll", "mean_kept_nll")
    rows = connection.execute(sql, _parameters(labels)).fetchall()
    return [Word(**dict(zip(names, row, strict=True))) for row in rows]


def _rare(tokens: int) -> int:
    """In a small dataset nothing occurs often."""
    return max(1, min(RARE, tokens // 10_000))


def _kept(words: list[Word], at_least: int) -> list[Word]:
    found = [
        (-word.mean_kept_nll, word.word, word)
        for word in words
        if word.mean_kept_nll is not None and word.occurrences - word.chosen >= at_least
    ]
    return [word for *_, word in sorted(found, key=lambda item: item[:2])[:WORDS]]


def _label_set(found: LabelSet) -> Labels:
    tokens = max(1, found.tokens)
    return Labels(
        name=found.name,
        policy=found.policy,
        action=found.action,
        budget=found.budget,
        threshold=found.threshold,
        delegated=sum(part.delegated for part in found.parts) / tokens,
        ignored=sum(part.ignored for part in found.parts) / tokens,
    )


def show(stats: Stats, console: Console) -> None:
    """Print the figures for a reader. Two tables stand side by side where 100 columns are free, as in a file."""
    if not console.is_terminal and console.width < _WIDE:
        console = Console(file=console.file, width=_WIDE)

    def put(caption: str, *tables: Table) -> None:
        console.print()
        console.print(Text(caption, style="bold"))
        console.print(_beside(tables, console.width))

    console.print(Text(_headline(stats)), soft_wrap=True)
    if stats.label_sets:
        put("What each policy decided, in shares of all tokens", _label_sets_table(stats))
    verb = _verb(stats)
    mine = f" or {verb} by {printable(stats.labels)}" if stats.labels else ""
    scored = bool(stats.losses.factual or stats.losses.other)
    loss = ", mean loss" if scored else ""
    put(
        f"By part of speech and entity type: tokens, how many are factual{mine}{loss}",
        _kinds_table("pos", stats.pos, stats, scored),
        _kinds_table("ent_type", stats.ent_type, stats, scored),
    )
    if scored:
        put("Loss of the reference model in nats: this share of the tokens has less", _losses_table(stats.losses))
    often = f"{stats.kept_at_least} times or more" if stats.kept_at_least > 1 else "at all"
    if stats.chosen_words:
        kept = [_kept_table(stats.kept_words, "kept")] if stats.kept_words else []
        also = f", and the words kept {often} that have the highest loss" if kept else ""
        put(f"Words most often {verb}{also}", _chosen_table(stats.chosen_words, verb), *kept)
    elif stats.kept_words:
        put(f"Words with the highest mean loss, of those seen {often}", _kept_table(stats.kept_words, "count"))
    for note in stats.notes:
        console.print()
        console.print(Text(note, style="dim"))


_WIDE = 100
_WORD_WIDTH = 22


def _headline(stats: Stats) -> str:
    bad = f", {stats.bad:,} bad records" if stats.bad else ""
    share = _share(stats.factual, stats.tokens)
    return f"{printable(stats.dataset)}: {stats.documents:,} documents, {stats.tokens:,} tokens, {share} factual{bad}"


def _verb(stats: Stats) -> str:
    actions = {found.name: found.action for found in stats.label_sets}
    return "ignored" if stats.labels is not None and actions[stats.labels] == "ignore" else "delegated"


def _label_sets_table(stats: Stats) -> Table:
    table = _table("labels", "policy", numbers=("budget", "delegated", "ignored", "lowest score chosen"))
    for found in stats.label_sets:
        table.add_row(
            _name(found.name),
            _name(found.policy),
            "none" if found.budget is None else f"{found.budget:.1%}",
            f"{found.delegated:.1%}",
            f"{found.ignored:.1%}",
            _number(found.threshold),
        )
    return table


def _kinds_table(title: str, kinds: list[Kind], stats: Stats, scored: bool) -> Table:
    chosen = [_verb(stats)] if stats.labels else []
    table = _table(title, numbers=("tokens", "share", "factual", *chosen, *(["loss"] if scored else [])), gap=1)
    for kind in _fold(kinds):
        row = [_count(kind.tokens), _share(kind.tokens, stats.tokens), _share(kind.factual, kind.tokens)]
        row += [_share(kind.chosen, kind.tokens)] if stats.labels else []
        row += [_number(kind.mean_nll)] if scored else []
        table.add_row(_name(kind.name or "(none)"), *row)
    return table


def _fold(kinds: list[Kind]) -> list[Kind]:
    """The kinds with the most tokens, and all others as one."""
    if len(kinds) <= KINDS:
        return kinds
    rest = _kinds(
        (f"({len(kinds) - KINDS + 1} others)", k.tokens, k.factual, k.chosen, k.scored, k.nll)
        for k in kinds[KINDS - 1 :]
    )
    return kinds[: KINDS - 1] + rest


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
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _beside(tables: Sequence[Table], width: int) -> RenderableType:
    if len(tables) == 1 or width < _WIDE:
        return Group(*tables)
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
    return "-" if value is None else f"{value:.2f}"
