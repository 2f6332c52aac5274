"""SQL of the DuckDB views over a dataset, which read the part files listed in the manifest and nothing else.

In SQL a file is `dataset://` and its name below the dataset's folder, wherever that is; the database needs a file
system for that scheme (`lacy.stats.files`).

`documents`, one row a document:
    doc_id, source, part                text: NULL without text
    characters                          of the text; NULL without text
    tokens, factual_tokens, scored_tokens
    ref_nll, student_nll                sums over the scored tokens, nats; NULL without any

`tokens`, one row a token:
    doc_id, source, part, position      position counts from 0
    token                               the piece of text; NULL without text
    token_id, token_start, token_end    half-open character offsets into the text
    word, word_start                    the word that the token belongs to, and its offset, see below
    factual                             boolean
    pos, ent_type                       names; NULL for none
    ref_nll, student_nll                nats; NULL where there is no score
    judge                               0 to 1; NULL where the judge gave no verdict
    ref_correct                         boolean; NULL where it is not known

`labels`, the columns of `tokens` once for each label set, and:
    labels                              the name of the label set
    label                               learn, delegate or ignore

`parts`, one row a part of the manifest:
    part, source, documents, tokens, factual_tokens, bad, skipped, bytes, sha256, deadletter_sha256

A word is a run of non-whitespace characters, with punctuation; a token belongs to the word of its first non-whitespace
character. Tokens of whitespace, and words of more than 64 characters (prose without spaces),
have NULL. Group by doc_id and word_start to join the tokens of a word.

Lists are indexed, not unnested, so a query reads only the columns that it names. A condition on `doc_id` or `source`
is applied before a document becomes rows, and one on `part` or `labels` limits the files that are opened. Columns of a
label file are read from it, and only the others from the signals. `substring` counts from the beginning of a text,
which would make the cost of a long document quadratic, so the text is cut once into pieces of 64 characters, and a
token is taken from two of them.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from lacy.schemas.codes import ENT_TYPES, LABELS, POS
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import LabelSet, label_sets, labels_path, read_complete, signals_path
from lacy.schemas.parts import LABELS as LABEL_COLUMNS
from lacy.schemas.parts import SIGNALS

NAMES: Final = ("documents", "tokens", "labels", "parts")
PREFIX: Final = "dataset://"

_PIECE = 64  # characters; also the longest word
_SPACE = r"\p{Z}\x09-\x0d\x1c-\x1f\x85"  # what str.isspace says
_TYPES = {
    pa.string(): "VARCHAR",
    pa.large_string(): "VARCHAR",
    pa.int32(): "INTEGER",
    pa.uint8(): "UTINYINT",
    pa.int8(): "TINYINT",
    pa.bool_(): "BOOLEAN",
    pa.float32(): "FLOAT",
}


@dataclass(frozen=True)
class Views:
    statements: list[str]  # SQL that creates them
    files: dict[str, int]  # all files that they read: name below the dataset, bytes


def create_views(dataset: Path) -> Views:
    """Make the views over `dataset`, a folder or a UPath.

    Raises DatasetError for a dataset that is missing, unfinished or damaged.
    """
    signal_files = _signal_files(dataset)
    label_files = {name: _label_files(name, found) for name, found in label_sets(dataset).items()}
    size = (dataset / "manifest.json").stat().st_size
    signals = _read(dataset, signal_files, SIGNALS)
    bodies = {
        "documents": _documents(signals),
        "tokens": _tokens(signals, ""),
        "labels": _labels(dataset, signals, label_files),
        "parts": _parts(size),
    }
    files = {"manifest.json": size} | signal_files
    for found_files in label_files.values():
        files |= found_files
    return Views([f"CREATE OR REPLACE VIEW {name} AS {bodies[name]}" for name in NAMES], files)


def document_lists(dataset: Path, labels: Sequence[str]) -> str:
    """A query of one row a document: the columns of the signals, `part`, and lists label_0, label_1, ...

    These hold the codes of the label sets named in `labels`, in this order. Raises DatasetError as `create_views` does.
    """
    sets = label_sets(dataset)
    joined = f"SELECT * FROM ({_read(dataset, _signal_files(dataset), SIGNALS)})"
    for number, name in enumerate(labels):
        rows = _read(dataset, _label_files(name, sets[name]), LABEL_COLUMNS)
        joined += f" JOIN (SELECT part, doc_id, label AS label_{number} FROM ({rows})) USING (part, doc_id)"
    return joined


def quote(value: object) -> str:
    """A string literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _signal_files(dataset: Path) -> dict[str, int]:
    """Files of the parts that have one: name below the dataset, bytes."""
    parts = [part for part in read_complete(dataset).parts if part.rows]
    return {signals_path(Path(), _sound(part.name)).as_posix(): part.bytes for part in parts}


def _label_files(name: str, labels: LabelSet) -> dict[str, int]:
    parts = [part for part in labels.parts if part.rows]
    return {labels_path(Path(), name, _sound(part.name)).as_posix(): part.bytes for part in parts}


def _sound(part: str) -> str:
    if part != PurePath(part).name:
        raise DatasetError(f"the manifest is damaged: {part!r} is not a name of a part")
    return part


def _present(dataset: Path, files: dict[str, int]) -> set[str]:
    """The columns of part files, read from the first, since all of a kind have the same."""
    if not files:
        return set()
    first = dataset / next(iter(files))
    exactly: dict[str, Any] = (
        {} if isinstance(first, Path) else {"cache_type": "none"}
    )  # read no more than needed from an object
    try:
        with first.open("rb", **exactly) as file:
            return set(pq.read_schema(file).names)
    except (OSError, pa.ArrowInvalid):
        raise DatasetError(f"{first} is missing or damaged: run lacy check DATASET to list all damage") from None


def _read(dataset: Path, files: dict[str, int], schema: pa.Schema) -> str:
    """Rows of part files with all columns of `schema`, NULL where the dataset lacks them, and `part`."""
    present = _present(dataset, files)
    columns = [
        field.name if field.name in present else f"NULL::{_type(field.type)} AS {field.name}" for field in schema
    ]
    if not files:
        return f"SELECT {', '.join(columns)}, NULL::VARCHAR AS part WHERE false"
    return f"SELECT {', '.join(columns)}, part FROM ({_scan(files)})"


def _scan(files: Collection[str]) -> str:
    listed = ", ".join(quote(PREFIX + name) for name in files)
    return (
        "SELECT *, parse_filename(filename, true) AS part "
        f"FROM read_parquet([{listed}], filename = true, hive_partitioning = false)"
    )


def _type(of: pa.DataType) -> str:
    return f"{_TYPES[of.value_type]}[]" if pa.types.is_list(of) else _TYPES[of]


def _documents(signals: str) -> str:
    return f"""
SELECT
    doc_id, source, part, text,
    length(text) AS characters,
    len(factual) AS tokens,
    coalesce(list_sum(factual::TINYINT[]), 0)::BIGINT AS factual_tokens,
    list_aggregate(ref_nll, 'count') AS scored_tokens,
    list_sum(ref_nll) AS ref_nll,
    list_sum(student_nll) AS student_nll
FROM ({signals})"""


def _labels(dataset: Path, signals: str, sets: dict[str, dict[str, int]]) -> str:
    """Join each label set with the signals document by document, before the lists become rows."""
    selects = []
    for name, files in sets.items():
        there = _present(dataset, files)
        if not files:
            continue
        own = [field.name for field in LABEL_COLUMNS if field.name in there and field.name != "doc_id"]
        others = ", ".join(["part", *(field.name for field in SIGNALS if field.name not in own)])
        decided = f"SELECT part, doc_id, {', '.join(own)} FROM ({_scan(files)})"
        joined = f"SELECT * FROM ({decided}) JOIN (SELECT {others} FROM ({signals})) USING (part, doc_id)"
        selects.append(_tokens(joined, f"{quote(name)} AS labels, {_name(LABELS, 'label')} AS label,"))
    if not selects:
        selects.append(_tokens(signals, "NULL::VARCHAR AS labels, NULL::VARCHAR AS label,") + " WHERE false")
    return "\nUNION ALL\n".join(f"({select})" for select in selects)


def _tokens(documents: str, decided: str) -> str:
    """One row a token of `documents`, which has the signals' columns; `decided` stands before the others.

    `i` is the index into the lists, from 1; `anchor` the first non-whitespace character of a token.
    """
    return rf"""
WITH documents AS NOT MATERIALIZED ({documents}),
pieces AS NOT MATERIALIZED (
    SELECT *,
        regexp_extract_all(text, '(?s).{{1,{_PIECE}}}') AS pieces,
        [i FOR i IN range(1, len(token_ends) + 1) IF token_ends[i] - token_starts[i] > {_PIECE}] AS long_tokens
    FROM documents
),
places AS NOT MATERIALIZED (
    SELECT *,
        [
            substring(
                array_to_string([
                    pieces[n] FOR n IN range(token_starts[i] // {_PIECE} + 1, (token_ends[i] - 1) // {_PIECE} + 2)
                ], ''),
                token_starts[i] % {_PIECE} + 1, token_ends[i] - token_starts[i]
            ) FOR i IN long_tokens
        ] AS long_pieces,
        unnest(range(1, len(factual) + 1)) AS i
    FROM pieces
),
spelled AS NOT MATERIALIZED (
    SELECT *,
        token_starts[i] AS token_start,
        token_ends[i] AS token_end,
        CASE
            WHEN token_end - token_start > {_PIECE} THEN long_pieces[list_position(long_tokens, i)]
            ELSE substring(
                pieces[token_start // {_PIECE} + 1] || coalesce(pieces[token_start // {_PIECE} + 2], ''),
                token_start % {_PIECE} + 1, token_end - token_start)
        END AS token,
        token_start + length(regexp_extract(token, '^[{_SPACE}]*')) AS anchor
    FROM places
),
sides AS NOT MATERIALIZED (
    SELECT *,
        pieces[anchor // {_PIECE} + 1] AS piece,
        regexp_extract(
            coalesce(pieces[anchor // {_PIECE}], '') || substring(piece, 1, anchor % {_PIECE}), '[^{_SPACE}]*$'
        ) AS before,
        regexp_extract(
            substring(piece, anchor % {_PIECE} + 1) || coalesce(pieces[anchor // {_PIECE} + 2], ''), '^[^{_SPACE}]*'
        ) AS after,
        anchor < token_end AND length(before) + length(after) <= {_PIECE} AS is_word
    FROM spelled
)
SELECT {decided}
    doc_id, source, part, i - 1 AS position,
    token, token_ids[i] AS token_id, token_start, token_end,
    CASE WHEN is_word THEN before || after END AS word,
    CASE WHEN is_word THEN anchor - length(before) END AS word_start,
    factual[i] AS factual,
    {_name(POS, "pos")} AS pos,
    {_name(ENT_TYPES, "ent_type")} AS ent_type,
    ref_nll[i] AS ref_nll,
    student_nll[i] AS student_nll,
    judge[i] AS judge,
    ref_correct[i] AS ref_correct
FROM sides"""


def _name(table: tuple[str, ...], column: str) -> str:
    """The name of a token's code; NULL for none."""
    names = ", ".join(quote(name) if name else "NULL" for name in table)
    return f"[{names}][{column}[i]::INTEGER + 1]"


def _parts(size: int) -> str:
    """`size`: bytes of the manifest."""
    columns = {
        "name": "VARCHAR",
        "source": "VARCHAR",
        "rows": "BIGINT",
        "tokens": "BIGINT",
        "factual": "BIGINT",
        "bad": "BIGINT",
        "skipped": "BIGINT",
        "bytes": "BIGINT",
        "sha256": "VARCHAR",
        "deadletter_sha256": "VARCHAR",
    }
    struct = ", ".join(f"{name} {kind}" for name, kind in columns.items())
    manifest = quote(PREFIX + "manifest.json")
    return f"""
SELECT part.name AS part, part.source, part.rows AS documents, part.tokens, part.factual AS factual_tokens,
    part.bad, part.skipped, part.bytes, part.sha256, part.deadletter_sha256
FROM (
    SELECT unnest(parts) AS part
    FROM read_json({manifest}, format = 'unstructured', columns = {{parts: 'STRUCT({struct})[]'}},
        maximum_object_size = {max(1 << 24, 2 * size)})
)"""
