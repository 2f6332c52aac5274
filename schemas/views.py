"""The SQL of the DuckDB views over a dataset. They read the part files that the manifest lists, and nothing else.

`documents`, one row a document:
    doc_id, source, part                text: NULL without text
    characters                          of the text; NULL without text
    tokens, factual_tokens, scored_tokens
    ref_nll, student_nll                sums over the scored tokens, nats; NULL without any

`tokens`, one row a token:
    doc_id, part, position              position counts from 0
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

A word is a run of characters without whitespace, punctuation and all; a token belongs to the word of its first
character that is no whitespace. Tokens of whitespace, and words of more than 64 characters (prose without spaces),
have NULL. Group by doc_id and word_start to join the tokens of a word.

Lists are indexed, not unnested, so a query reads the columns that it names; a condition on `part` or `labels` opens
these files alone. `substring` counts from the beginning of a text, which makes the tokens of a long document
quadratic: the text is cut once into pieces of 64 characters, and a token is taken out of two of them.
"""

from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.codes import ENT_TYPES, LABELS, POS
from schemas.manifest import DatasetError, Manifest, label_sets, labels_path, read_complete, signals_path
from schemas.parts import LABELS as LABEL_COLUMNS
from schemas.parts import SIGNALS

NAMES: Final = ("documents", "tokens", "labels", "parts")

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


def create_views(dataset: Path) -> list[str]:
    """Statements that create the views in a database; paths in them are absolute.

    Raises DatasetError for a dataset that is missing, unfinished or damaged.
    """
    manifest = read_complete(dataset)
    folder = dataset.resolve()
    signals = _signals(folder, manifest)
    sets = {
        name: _read([labels_path(folder, name, part.name) for part in found.parts if part.rows], LABEL_COLUMNS)
        for name, found in label_sets(folder).items()
    }
    bodies = {
        "documents": _documents(signals),
        "tokens": _tokens(signals, ""),
        "labels": _labels(signals, sets),
        "parts": _parts(folder),
    }
    return [f"CREATE OR REPLACE VIEW {name} AS {bodies[name]}" for name in NAMES]


def quote(value: object) -> str:
    """A string literal of SQL."""
    return "'" + str(value).replace("'", "''") + "'"


def _signals(folder: Path, manifest: Manifest) -> str:
    return _read([signals_path(folder, part.name) for part in manifest.parts if part.rows], SIGNALS)


def _read(files: list[Path], schema: pa.Schema) -> str:
    """The rows of part files with all columns of `schema`, NULL for those that the dataset leaves out, and `part`."""
    present: set[str] = set()
    if files:
        try:
            present = set(pq.read_schema(files[0]).names)
        except (OSError, pa.ArrowInvalid):
            raise DatasetError(f"{files[0]} is missing or damaged: lacy check says what else is") from None
    columns = [
        field.name if field.name in present else f"NULL::{_type(field.type)} AS {field.name}" for field in schema
    ]
    if not files:
        return f"SELECT {', '.join(columns)}, NULL::VARCHAR AS part WHERE false"
    listed = ", ".join(map(quote, files))
    return (
        f"SELECT {', '.join(columns)}, parse_filename(filename, true) AS part "
        f"FROM read_parquet([{listed}], filename = true)"
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


def _labels(signals: str, sets: dict[str, str]) -> str:
    """Each label set is joined with the signals a document at a time, before the lists become rows."""
    selects = []
    for name, labels in sets.items():
        decided = f"SELECT doc_id, part, label FROM ({labels})"
        joined = f"SELECT * FROM ({signals}) JOIN ({decided}) USING (part, doc_id)"
        selects.append(_tokens(joined, f"{quote(name)} AS labels, {_name(LABELS, 'label')} AS label,"))
    if not selects:
        selects.append(_tokens(signals, "NULL::VARCHAR AS labels, NULL::VARCHAR AS label,") + " WHERE false")
    return "\nUNION ALL\n".join(f"({select})" for select in selects)


def _tokens(documents: str, decided: str) -> str:
    """One row a token of `documents`, which has the signals' columns; `decided` stands before the others.

    `i` is the place in the lists, from 1; `anchor` the first character of a token that is no whitespace.
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
    doc_id, part, i - 1 AS position,
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


def _parts(folder: Path) -> str:
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
    manifest = folder / "manifest.json"
    return f"""
SELECT part.name AS part, part.source, part.rows AS documents, part.tokens, part.factual AS factual_tokens,
    part.bad, part.skipped, part.bytes, part.sha256, part.deadletter_sha256
FROM (
    SELECT unnest(parts) AS part
    FROM read_json({quote(manifest)}, format = 'unstructured', columns = {{parts: 'STRUCT({struct})[]'}},
        maximum_object_size = {max(1 << 24, 2 * manifest.stat().st_size)})
)"""
