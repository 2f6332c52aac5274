"""Compute the figures of a dataset that `lacy stats` prints and the report shows.

DuckDB unnests the lists of each document into rows of tokens, in three scans: one for counts and sums, one for the few
losses that quantiles and thresholds depend on, one for the choice at each budget. `stats.words` finds the words in the
text, batch by batch.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lacy.schemas.codes import DELEGATE, ENT_TYPES, IGNORE, LABELS, LEARN, POS
from lacy.schemas.errors import DatasetError, SqlError
from lacy.schemas.manifest import LabelSet, at, label_sets, pick_labels, read_complete
from lacy.schemas.views import document_lists
from lacy.stats.connect import connect, one_line, require_reading
from lacy.stats.figures import (
    BIN_WIDTH,
    BINS,
    BUDGETS,
    COUNTS,
    QUANTILES,
    Agreement,
    Difference,
    Group,
    Labels,
    Losses,
    Pick,
    Stats,
    Word,
)
from lacy.stats.words import count_words

Row = dict[str, Any]
Subset = tuple[bool, ...]  # factual tokens, others, or both

POSITIONS: Final = (0, 1, 16, 64, 256, 1024, 4096)  # where a range of positions in the document begins
LENGTHS: Final = (1, 64, 256, 1024, 4096, 16384)  # tokens of a document, where ranges begin
WORDS: Final = 10  # of each kind
DIFFERENCES: Final = 5  # for each pair of label sets
GROUPS: Final = 1000  # values of the column to group by
RARE: Final = 5  # occurrences that the mean loss of a kept word is taken over at least, see `_rare`
_BATCH = 512  # documents: what `lacy.stats.words` makes of them fits a processor's cache

# Multiplication and roots round monotonically, so bins keep the order of the losses. Bins of small losses are narrower.
_BIN = "floor(sqrt(sqrt(CASE WHEN nll < 0 THEN 0 ELSE nll END)) * 2048)::INTEGER"


def compute(
    dataset: str | Path,
    labels: str | None = None,
    *,
    where: str | None = None,
    by: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Stats:
    """Compute the figures.

    Args:
        labels: name of the label set; None is lacy where there is one, else the first by name.
        where: SQL condition on the columns of the view `labels`, which selects the tokens that are counted.
        by: column of that view, or an expression, to group by.
        on_stage: is called with the name of each stage when it begins.

    Raises DatasetError for a dataset that is missing, unfinished or damaged, or that has no such label set; SqlError
    for a condition or a column that DuckDB does not understand.
    """
    for option, given in (("where", where), ("by", by)):
        if given is not None and not given.strip():
            raise SqlError(f"--{option} is empty: pass SQL on the columns of the view labels")
    folder = at(dataset)
    manifest = read_complete(folder)
    sets = label_sets(folder)
    labels = pick_labels(folder, sets, labels)
    mine = None if labels is None else list(sets).index(labels)
    with connect(folder) as connection:
        if where is not None:
            on_stage("finding the tokens")
            with _blaming("where"):
                _look_at(connection, labels, where)
        on_stage("grouping")
        with _blaming("by"):
            groups = _by(connection, labels, where, by) if by is not None else []
        try:
            on_stage("counting tokens")
            tokens = _Tokens(document_lists(folder, list(sets)), narrow=where is not None)
            counts = _count(connection, tokens, len(sets), mine)
            has_text, has_student = (_has(connection, tokens, column) for column in ("text", "student_nll"))
            on_stage("ordering losses")
            policy = "loss" if labels is not None and sets[labels].policy == "loss" else "lacy"
            quantiles, budgets = _ordered(connection, tokens, counts, policy, has_student)
            on_stage("counting words")
            words = _words(connection, tokens, mine) if has_text else None
            rows = connection.execute(
                f"SELECT count(*) FROM {'documents' if where is None else 'looked_at'}"
            ).fetchall()
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # Arrow's, where it streams what DuckDB reads
            raise DatasetError(
                f"{dataset} cannot be read: {one_line(error)}: run lacy check {dataset} to list all damage"
            ) from None
    at_least = _rare(counts.tokens)
    return Stats(
        dataset=str(dataset),
        where=where,
        documents=rows[0][0],
        tokens=counts.tokens,
        factual=sum(row["tokens"] for row in _add_up(counts.cells, "f") if row["f"]),
        bad=manifest.bad,
        label_sets=[_label_set(found, number, counts.cells) for number, found in enumerate(sets.values())],
        labels=labels,
        pos=_most_first(_groups(counts.cells, "p", POS)),
        ent_type=_most_first(_groups(counts.cells, "e", ENT_TYPES)),
        position=_groups(counts.cells, "place", _names(POSITIONS)),
        length=_groups(counts.cells, "size", _names(LENGTHS)),
        by=by,
        groups=groups[:GROUPS],
        losses=_losses(counts.bins, quantiles),
        policy=policy,
        budgets=budgets,
        agreement=[_agreement(a, b, counts.cells) for a, b in combinations(enumerate(sets), 2)],
        chosen_words=_chosen(words) if words is not None else [],
        kept_words=_kept(words, at_least) if words is not None else [],
        kept_at_least=at_least,
        notes=_notes(has_text, bool(quantiles[True] or quantiles[False]) or not counts.tokens, len(groups)),
    )


# The tokens that the user asks for, through the views


def _by(connection: Any, labels: str | None, where: str | None, by: str) -> list[Group]:
    """Tokens with the same value of `by`, most tokens first; one group more than GROUPS at most."""
    sql = f"""
SELECT coalesce((
{by}
)::VARCHAR, '') AS name, count(*), count_if(factual), count(*) FILTER (label = '{LABELS[DELEGATE]}'),
    count(*) FILTER (label = '{LABELS[IGNORE]}'), count(ref_nll), coalesce(sum(ref_nll), 0)
{tokens_where(labels, where)}
GROUP BY name ORDER BY count(*) DESC, name LIMIT {GROUPS + 1}"""
    require_reading(sql)
    rows = connection.execute(sql, parameters(labels)).fetchall()
    return [Group(**dict(zip(("name", *COUNTS), row, strict=True))) for row in rows]


@contextmanager
def _blaming(option: str) -> Iterator[None]:
    try:
        yield
    except SqlError as error:
        raise SqlError(f"--{option}: {error}") from None
    except duckdb.Error as error:
        raise SqlError(f"--{option}: {one_line(error)}") from None


def _look_at(connection: Any, labels: str | None, where: str) -> None:
    """Make the table `looked_at`: part, doc_id, and `places` in its lists (from 1) where the condition holds."""
    rows = tokens_where(labels, where)
    sql = f"SELECT part, doc_id, list(position + 1 ORDER BY position) AS places {rows} GROUP BY ALL"
    require_reading(sql)
    connection.execute(f"CREATE TEMP TABLE looked_at AS {sql}", parameters(labels))


def tokens_where(labels: str | None, where: str | None) -> str:
    """The tokens of a view, with a label. The user's condition has lines of its own, since it may end in a comment."""
    if labels is None:
        rows = "FROM (SELECT *, NULL::VARCHAR AS labels, NULL::VARCHAR AS label FROM tokens) WHERE true"
    else:
        rows = "FROM labels WHERE labels = $labels"
    return rows if where is None else f"{rows} AND (\n{where}\n)"


def parameters(labels: str | None) -> dict[str, str]:
    return {} if labels is None else {"labels": labels}


# Rows of tokens out of lists


class _Tokens(NamedTuple):
    lists: str  # SQL: one row a document
    narrow: bool  # only the tokens of the table `looked_at`

    def rows(self, **columns: str) -> str:
        """One row a token with these columns, each the name of a list or an expression of lists.

        Expressions in one SELECT are unnested together.
        """
        if not self.narrow:
            unnested = ", ".join(f"unnest({of}) AS {name}" for name, of in columns.items())
            return f"SELECT {unnested}, len(factual) AS length FROM ({self.lists})"
        unnested = ", ".join(f"unnest(list_select({of}, places)) AS {name}" for name, of in columns.items())
        return f"SELECT {unnested}, len(factual) AS length FROM ({self.lists}) JOIN looked_at USING (part, doc_id)"


def _has(connection: Any, tokens: _Tokens, column: str) -> bool:
    return connection.execute(f"SELECT {column} IS NOT NULL FROM ({tokens.lists}) LIMIT 1").fetchall() == [(True,)]


class _Counts(NamedTuple):
    """Counts of tokens, with `tokens`, `scored` (that have a loss) and `nll` (its sum)."""

    cells: pa.Table  # by p, e, f, l0, l1, ..., label, and place and size, the numbers of ranges
    bins: pa.Table  # by f, `bin` (of BIN_WIDTH), `bucket` (of `_BIN`); tokens without a loss have null

    @property
    def tokens(self) -> int:
        return pc.sum(self.cells["tokens"]).as_py() or 0


def _count(connection: Any, tokens: _Tokens, sets: int, mine: int | None) -> _Counts:
    """Compute all counts and sums. `mine` is the index of the chosen label set among all."""
    codes = [f"l{number}" for number in range(sets)]
    label = codes[mine] if mine is not None else f"{LEARN}::TINYINT"
    columns = {"p": "pos", "e": "ent_type", "f": "factual", "nll": "ref_nll", "position": "range(len(factual))"}
    columns |= {code: f"label_{number}" for number, code in enumerate(codes)}
    cells = connection.sql(f"""
SELECT p, e, f, {"".join(f"{code}, " for code in codes)}{label} AS label, {_range("position", POSITIONS)} AS place,
    {_range("length", LENGTHS)} AS size, count(*) AS tokens, count(nll) AS scored, coalesce(sum(nll), 0) AS nll
FROM ({tokens.rows(**columns)}) GROUP BY ALL""").to_arrow_table()
    return _Counts(cells, _bins(connection, tokens, "ref_nll"))


def _bins(connection: Any, tokens: _Tokens, column: str) -> pa.Table:
    last = BINS - 1
    return connection.sql(f"""
SELECT f, CASE WHEN nll >= {last * BIN_WIDTH} THEN {last} ELSE floor(nll / {BIN_WIDTH})::INTEGER END AS bin,
    {_BIN} AS bucket, count(nll) AS scored
FROM ({tokens.rows(f="factual", nll=column)}) GROUP BY ALL""").to_arrow_table()


def _range(column: str, begins: Sequence[int]) -> str:
    """SQL for the index of the range that a value is in."""
    return " + ".join(["0", *(f"({column} >= {begin})::INTEGER" for begin in begins[1:])])


def _names(begins: Sequence[int]) -> list[str]:
    between = [f"{a:,}" if a == b - 1 else f"{a:,}-{b - 1:,}" for a, b in pairwise(begins)]
    return [*between, f"{begins[-1]:,}+"]


def _add_up(counts: pa.Table, *by: str) -> list[Row]:
    sums = [name for name in ("tokens", "scored", "nll") if name in counts.column_names]
    added = counts.group_by(list(by)).aggregate([(name, "sum") for name in sums])
    return added.rename_columns([*by, *sums]).to_pylist()


def _groups(cells: pa.Table, by: str, names: Sequence[str]) -> list[Group]:
    """Add up the cells by the index in column `by`, in the order of `names`."""
    sums: dict[int, dict[str, Any]] = {}
    for row in _add_up(cells, by, "f", "label"):
        found = sums.setdefault(row[by], dict.fromkeys(COUNTS, 0))
        found["factual"] += row["tokens"] * row["f"]
        found["delegated"] += row["tokens"] * (row["label"] == DELEGATE)
        found["ignored"] += row["tokens"] * (row["label"] == IGNORE)
        for name in ("tokens", "scored", "nll"):
            found[name] += row[name]
    return [Group(name=names[number], **sums[number]) for number in sorted(sums)]


def _most_first(groups: Iterable[Group]) -> list[Group]:
    return sorted(groups, key=lambda group: (-group.tokens, group.name))


def _losses(bins: pa.Table, quantiles: Mapping[bool, list[float]]) -> Losses:
    counts = {factual: [0] * (BINS if found else 0) for factual, found in quantiles.items()}
    for row in _add_up(bins, "f", "bin"):
        if row["bin"] is not None:
            counts[row["f"]][row["bin"]] = row["scored"]
    return Losses(factual=quantiles[True], other=quantiles[False], factual_bins=counts[True], other_bins=counts[False])


def _label_set(found: LabelSet, number: int, cells: pa.Table) -> Labels:
    rows = [(row[f"l{number}"], row["f"], row["tokens"]) for row in _add_up(cells, f"l{number}", "f")]
    return Labels(
        name=found.name,
        policy=found.policy,
        action=found.action,
        budget=found.budget,
        threshold=found.threshold,
        tokens=sum(tokens for *_, tokens in rows),
        delegated=sum(tokens for label, _, tokens in rows if label == DELEGATE),
        ignored=sum(tokens for label, _, tokens in rows if label == IGNORE),
        factual=sum(tokens for label, factual, tokens in rows if label != LEARN and factual),
    )


def _agreement(a: tuple[int, str], b: tuple[int, str], cells: pa.Table) -> Agreement:
    """Cohen's kappa: (observed - expected) / (1 - expected), both as shares of tokens with the same label."""
    table = np.zeros((len(LABELS), len(LABELS)), np.int64)
    kinds: Counter[tuple[int, int]] = Counter()
    different: Counter[tuple[int, int]] = Counter()
    for first, second, p, e, tokens, *_ in map(dict.values, _add_up(cells, f"l{a[0]}", f"l{b[0]}", "p", "e")):
        table[first, second] += tokens
        kinds[p, e] += tokens
        different[p, e] += tokens * (first != second)
    total = int(table.sum())
    same = int(table.trace())
    by_chance = int(table.sum(0) @ table.sum(1))  # expected * total**2
    most = sorted((-count, POS[p], ENT_TYPES[e], kinds[p, e]) for (p, e), count in different.items() if count)
    return Agreement(
        a=a[1],
        b=b[1],
        both=int(table[1:, 1:].sum()),
        only_a=int(table[1:, LEARN].sum()),
        only_b=int(table[LEARN, 1:].sum()),
        neither=int(table[LEARN, LEARN]),
        same=same,
        kappa=(same * total - by_chance) / (total**2 - by_chance) if by_chance < total**2 else None,
        differences=[
            Difference(pos=pos, ent_type=ent_type, tokens=tokens, different=-count)
            for count, pos, ent_type, tokens in most[:DIFFERENCES]
        ],
    )


# Order: quantiles, and the thresholds of budgets


def _ordered(
    connection: Any, tokens: _Tokens, counts: _Counts, policy: str, has_student: bool
) -> tuple[dict[bool, list[float]], list[Pick]]:
    """The losses of factual and of other tokens at QUANTILES, and what `policy` would choose within BUDGETS."""
    loss = "student_nll" if has_student else "ref_nll"
    fine = {"ref_nll": _add_up(counts.bins, "f", "bucket")}
    if has_student:
        fine[loss] = _add_up(_bins(connection, tokens, loss), "f", "bucket")
    candidates: Subset = (True,) if policy == "lacy" else (True, False)
    number = _number(fine[loss], candidates)
    chosen = [min(number, round(budget * counts.tokens)) for budget in BUDGETS]
    scored = {factual: _number(fine["ref_nll"], (factual,)) for factual in (True, False)}
    asked: dict[str, dict[Subset, set[int]]] = {column: defaultdict(set) for column in fine}
    for factual, many in scored.items():
        asked["ref_nll"][(factual,)].update(rank for share in QUANTILES if many for rank in _around(share, many))
    asked[loss][candidates].update(number - many for many in chosen if many)
    exact = {column: _exact(connection, tokens, column, fine[column], asked[column]) for column in fine}
    quantiles = {
        factual: [_between(exact["ref_nll"][(factual,)], share, many) for share in QUANTILES if many]
        for factual, many in scored.items()
    }
    thresholds = [exact[loss][candidates][number - many] if many else None for many in chosen]
    return quantiles, _picks(connection, tokens, loss, candidates, thresholds) if number else []


def _number(fine: Iterable[Row], subset: Subset) -> int:
    return sum(row["scored"] for row in fine if row["f"] in subset)


def _around(share: float, number: int) -> tuple[int, int]:
    """The ranks, from 0, between which a quantile lies."""
    rank = share * (number - 1)
    return math.floor(rank), math.ceil(rank)


def _between(values: Mapping[int, float], share: float, number: int) -> float:
    low, high = _around(share, number)
    return values[low] + (values[high] - values[low]) * (share * (number - 1) - low)


def _exact(
    connection: Any, tokens: _Tokens, column: str, fine: Sequence[Row], asked: Mapping[Subset, set[int]]
) -> dict[Subset, dict[int, float]]:
    """The losses at some ranks, from 0 for the lowest loss. Only the bins of these ranks are read."""
    below: dict[Subset, dict[int, int]] = {}  # tokens in lower bins than those that are needed
    for subset, ranks in asked.items():
        counts: Counter[int] = Counter()
        for row in fine:
            if row["f"] in subset and row["bucket"] is not None:
                counts[row["bucket"]] += row["scored"]
        buckets = sorted(counts)
        ends = np.cumsum([counts[bucket] for bucket in buckets])
        needed = np.searchsorted(ends, sorted(ranks), "right")
        below[subset] = {buckets[place]: int(ends[place]) - counts[buckets[place]] for place in needed}
    listed = sorted({bucket for needed in below.values() for bucket in needed})
    found = connection.sql(f"""
SELECT f, nll, {_BIN} AS bucket, count(*) AS tokens FROM ({tokens.rows(f="factual", nll=column)})
WHERE list_contains({listed}::INTEGER[], bucket) GROUP BY ALL""").to_arrow_table()
    factual, nll, bucket, many = (column.to_numpy() for column in found.columns)
    order = np.argsort(nll)
    factual, nll, bucket, many = factual[order], nll[order], bucket[order], many[order]
    exact: dict[Subset, dict[int, float]] = {}
    for subset, ranks in asked.items():
        exact[subset] = {}
        for place, lower in below[subset].items():
            there = (bucket == place) & np.isin(factual, subset)
            ends = lower + np.cumsum(many[there])
            inside = [rank for rank in ranks if lower <= rank < ends[-1]]
            values = nll[there][np.searchsorted(ends, inside, "right")]
            exact[subset] |= dict(zip(inside, map(float, values), strict=True))
    return exact


def _picks(
    connection: Any, tokens: _Tokens, loss: str, candidates: Subset, thresholds: Sequence[float | None]
) -> list[Pick]:
    """Sum up the tokens at or above each threshold. Thresholds fall as budgets rise."""
    bounds = [math.inf if threshold is None else threshold for threshold in thresholds]
    first = " + ".join(f"(nll < ${place})::INTEGER" for place in range(1, len(bounds) + 1))
    rows = connection.execute(
        f"""
SELECT {first} AS first, p, e, count(*), sum(nll) FROM ({tokens.rows(p="pos", e="ent_type", f="factual", nll=loss)})
WHERE list_contains({list(candidates)}, f) AND nll >= ${len(bounds)} GROUP BY ALL""",
        bounds,
    ).fetchall()
    picks = []
    for place, (budget, threshold) in enumerate(zip(BUDGETS, thresholds, strict=True)):
        inside = [row for row in rows if row[0] <= place]
        pos: Counter[str] = Counter()
        ent_type: Counter[str] = Counter()
        for _, p, e, count, _ in inside:
            pos[POS[p]] += count
            ent_type[ENT_TYPES[e]] += count
        picks.append(
            Pick(
                budget=budget,
                threshold=threshold,
                tokens=pos.total(),
                nll=math.fsum(row[4] for row in inside),
                pos=_sorted(pos),
                ent_type=_sorted(ent_type),
            )
        )
    return picks


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# Words


def _words(connection: Any, tokens: _Tokens, mine: int | None) -> pa.Table:
    label = f"list_resize([]::TINYINT[], len(factual), {LEARN})" if mine is None else f"label_{mine}"
    places = "places" if tokens.narrow else "NULL::INTEGER[]"
    join = "JOIN looked_at USING (part, doc_id)" if tokens.narrow else ""
    reader = connection.sql(f"""
SELECT text, token_starts, token_ends, ref_nll, {label} AS label, {places} AS places
FROM ({tokens.lists}) {join}""").to_arrow_reader(_BATCH)
    return count_words(reader)


def _rare(tokens: int) -> int:
    """The least occurrences of a kept word: fewer in a small dataset, where nothing occurs often."""
    return max(1, min(RARE, tokens // 10_000))


def _chosen(words: pa.Table) -> list[Word]:
    """The words most often chosen."""
    return _first(words.filter(pc.greater(words["chosen"], 0)), "chosen")


def _kept(words: pa.Table, at_least: int) -> list[Word]:
    """The words with the highest loss among those kept often enough."""
    kept = pc.subtract(words["occurrences"], words["chosen"])
    often = pc.and_(pc.greater_equal(kept, at_least), pc.greater(words["kept_scored"], 0))
    words = words.append_column("mean_kept_nll", pc.divide(words["kept_nll"], words["kept_scored"]))
    return _first(words.filter(often), "mean_kept_nll")


def _first(words: pa.Table, by: str) -> list[Word]:
    if not words.num_rows:
        return []
    keys = [(by, "descending"), ("word", "ascending")]
    found = words.take(pc.select_k_unstable(words, WORDS, keys)).to_pylist()
    return [
        Word(
            word=word["word"],
            occurrences=word["occurrences"],
            chosen=word["chosen"],
            mean_nll=word["nll"] / word["scored"] if word["scored"] else None,
            mean_kept_nll=word["kept_nll"] / word["kept_scored"] if word["kept_scored"] else None,
        )
        for word in found
    ]


def _notes(has_text: bool, has_loss: bool, groups: int) -> list[str]:
    notes = []
    if not has_text:
        notes.append("no tables of words: the dataset was made without text (--no-text)")
    if not has_loss:
        notes.append("no losses: the dataset was made without a reference model")
    if groups > GROUPS:
        notes.append(f"only the {GROUPS:,} largest groups")
    return notes
