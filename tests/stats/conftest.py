"""Small datasets, written with the same schemas as real ones, and what is in them as plain Python values."""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lacy.schemas import manifest, parts
from lacy.schemas.codes import DELEGATE, ENT_TYPES, IGNORE, LEARN, POS
from lacy.schemas.files import sha256, write_atomic
from lacy.schemas.manifest import LabelRecord, LabelSet, Manifest, PartRecord

SENTENCES = (
    "The lighthouse of Örskär was built in 1687, they say; nobody counted the steps.",
    'Marta said "no" twice — and the third time, in Łódź, she didn\'t.',
    "\n\n  Two lines further\tdown, 37 geese crossed the Oder.",
    "e\u0301te\u0301 and été look alike; 🦆🦆 quack, the geese don't.",
    "[red]Not markup[/red], {nor} %s a <b>format</b>; \x1b[31mESC and \x00 stay inside.",
    "漢字 has no spaces,\u3000but\u00a0these\u2028do.",
    f"A word of {'very' * 20}long letters, then geese.",
    "geese, geese and (geese)!",
)


@dataclass
class Document:
    doc_id: str
    text: str
    spans: list[tuple[int, int]]  # one for each token
    signals: dict[str, list[Any]]  # pos and ent_type as codes
    source: str = ""
    part: str = ""
    labels: dict[str, list[int]] = field(default_factory=dict)  # by label set

    def word(self, token: int) -> tuple[str, int] | tuple[None, None]:
        """The word of a token and its offset, letter by letter."""
        start, end = self.spans[token]
        anchor = next((place for place in range(start, end) if not self.text[place].isspace()), None)
        if anchor is None:
            return None, None
        first = last = anchor
        while first and not self.text[first - 1].isspace():
            first -= 1
        while last < len(self.text) and not self.text[last].isspace():
            last += 1
        return (self.text[first:last], first) if last - first <= 64 else (None, None)


def split(text: str) -> list[tuple[int, int]]:
    """Pieces of up to four characters with the space before them; an astral character is two tokens."""
    spans = []
    for match in re.finditer(r"\s*[\U00010000-\U0010ffff]|\s*[^\s\U00010000-\U0010ffff]{1,4}|\s+", text):
        spans += [match.span()] * (1 + any(ord(letter) > 0xFFFF for letter in match.group()))
    return spans


def document(doc_id: str, text: str, seed: int = 0, spans: list[tuple[int, int]] | None = None) -> Document:
    spans = split(text) if spans is None else spans
    draw, count = random.Random(f"{doc_id} {seed}"), len(spans)

    def losses() -> list[float | None]:
        return [None if place == 0 else draw.randrange(1, 400) / 32 for place in range(count)]

    signals: dict[str, list[Any]] = {
        "token_ids": [draw.randrange(32000) for _ in spans],
        "factual": [draw.random() < 0.4 for _ in spans],
        "pos": [draw.randrange(len(POS)) for _ in spans],
        "ent_type": [draw.choice((0, 0, draw.randrange(len(ENT_TYPES)))) for _ in spans],
        "ref_nll": losses(),
        "ref_correct": [draw.random() < 0.5 for _ in spans],
        "student_nll": losses(),
        "judge": [draw.choice((None, 0.0, 0.5, 1.0)) for _ in spans],
    }
    return Document(doc_id, text, spans, signals)


def corpus(count: int = 24) -> list[Document]:
    draw = random.Random(1)
    return [document(f"d'{n}\"", " ".join(draw.choices(SENTENCES, k=4)), n) for n in range(count)]


def by_loss(above: float, code: int = DELEGATE) -> Callable[[Document, int], int]:
    """A policy: factual tokens with a higher loss."""

    def decide(document: Document, token: int) -> int:
        nll = document.signals["ref_nll"][token]
        return code if nll is not None and nll > above and document.signals["factual"][token] else LEARN

    return decide


SETS = {"lacy": by_loss(6.0), "a 'quoted' set": by_loss(3.0, IGNORE)}


def write(
    folder: Path,
    documents: Sequence[Document],
    *,
    sets: dict[str, Callable[[Document, int], int]] | None = None,
    without: Sequence[str] = (),
    per_part: int = 7,
    state: str = "complete",
) -> Path:
    """A dataset in `folder`, the optional columns `without` left out. Each third part has no document, so no file."""
    names = [name for name in parts.OPTIONAL if name not in without]
    signals, labels = parts.select(parts.SIGNALS, names), parts.select(parts.LABELS, names)
    sets = SETS if sets is None else sets
    records, decided = [], {name: list[LabelRecord]() for name in sets}
    waiting = list(documents)
    for number in range(1000):
        if not waiting:
            break
        rows = [] if number % 3 == 1 else [waiting.pop(0) for _ in range(min(per_part, len(waiting)))]
        part = f"part-{number:05d}-000000"
        for row in rows:
            row.part, row.source = part, f"corpus.jsonl:{number}"
        tokens = sum(len(row.spans) for row in rows)
        data = parts.to_parquet(_table(signals, rows, None)) if rows else b""
        if rows:
            write_atomic(manifest.signals_path(folder, part), data)
        factual = sum(sum(row.signals["factual"]) for row in rows)
        records.append(
            PartRecord(
                name=part,
                source="corpus.jsonl",
                rows=len(rows),
                tokens=tokens,
                factual=factual,
                bad=number % 2,
                bytes=len(data),
                sha256=sha256(data),
            )
        )
        if not rows:
            continue
        for name, decide in sets.items():
            for row in rows:
                row.labels[name] = [decide(row, token) for token in range(len(row.spans))]
            data = parts.to_parquet(_table(labels, rows, name))
            write_atomic(manifest.labels_path(folder, name, part), data)
            codes = [code for row in rows for code in row.labels[name]]
            decided[name].append(
                LabelRecord(
                    name=part,
                    rows=len(rows),
                    tokens=tokens,
                    candidates=factual,
                    delegated=codes.count(DELEGATE),
                    ignored=codes.count(IGNORE),
                    bytes=len(data),
                    sha256=sha256(data),
                )
            )
    total = sum(record.tokens for record in records)
    for name, found in decided.items():
        chosen = sum(record.delegated + record.ignored for record in found)
        written = LabelSet(
            name=name,
            policy="lacy",
            action="ignore" if any(record.ignored for record in found) else "delegate",
            budget=0.15,
            seed=0,
            threshold=6.0,
            candidates=sum(record.candidates for record in found),
            tokens=total,
            chosen=chosen,
            share=chosen / total if total else 0.0,
            parts=found,
        )
        manifest.save(folder / "labels" / name / "_policy.json", written)
    whole = Manifest(
        state=state,
        corpus=[],
        options={},
        tokenizer={},
        models={},
        versions={},
        documents=sum(record.rows for record in records),
        tokens=total,
        factual=sum(record.factual for record in records),
        bad=sum(record.bad for record in records),
        parts=records,
    )
    manifest.save(folder / "manifest.json", whole)
    return folder


def _table(schema: pa.Schema, documents: list[Document], labels: str | None) -> pa.Table:
    def value(row: Document, column: str) -> Any:
        match column:
            case "doc_id" | "source" | "text":
                return getattr(row, column)
            case "token_starts":
                return [start for start, _ in row.spans]
            case "token_ends":
                return [end for _, end in row.spans]
            case "label":
                return row.labels[labels or ""]
        return row.signals[column]

    return pa.table([pa.array([value(row, f.name) for row in documents], f.type) for f in schema], schema=schema)


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return corpus()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory, documents) -> Path:
    """With every column, two label sets, and a path that has to be quoted."""
    return write(tmp_path_factory.mktemp("data") / 'it\'s a "set" [1]*?' / "d", documents)


@pytest.fixture(scope="session")
def bare(tmp_path_factory) -> Path:
    """Without optional columns and without labels."""
    return write(tmp_path_factory.mktemp("data") / "bare", corpus(), sets={}, without=parts.OPTIONAL)


@pytest.fixture(scope="session")
def empty(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "empty", [])
