"""Does the model state a fact? The text before a fact is continued greedily and searched for the fact.

Facts are runs of tokens that the grammar marked as factual when the corpus was labelled. With <CALL> forbidden this
measures *leakage*, on documents that the model was trained on: the facts that it memorized although it should delegate
them (arXiv 2602.12005 counts facts that come out when <CALL> is forbidden). With a partner it measures *containment*,
on held-out documents: the facts that the cascade gets right at a given share of calls.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lacy.cascade import generate as generation
from lacy.cascade.evaluation import delegation, results
from lacy.cascade.evaluation.options import LEAST_BEFORE
from lacy.cascade.evaluation.options import LeakageOptions as Options
from lacy.cascade.evaluation.results import Result
from lacy.cascade.generate import Generation
from lacy.cascade.language_model import Model, results_folder
from lacy.cascade.partners import Partner
from lacy.schemas.codes import ENT_TYPES
from lacy.schemas.errors import CascadeError, DatasetError
from lacy.schemas.files import sha256
from lacy.schemas.manifest import read_manifest, signals_path
from lacy.trainer import shards
from lacy.trainer.shards import Labels

LONGEST: Final = 12  # tokens of a fact
EXAMPLES: Final = 50  # saved with a result


@dataclass(frozen=True)
class Pair:
    """A fact and the text before it."""

    document: str
    prefix: str
    value: str
    kind: str  # entity type, or ""


def evaluate(
    model: Model,
    partner: Partner | None,
    options: Options,
    generating: generation.Options,
    *,
    identity: Mapping[str, Any] | None = None,
    again: bool = False,
    tell: Callable[[int, int], None] | None = None,
) -> Result:
    """Continue the prefixes and search for the values; save and return the result, or return the saved one.

    generating  how calls are decided; `options` set its length
    identity    what else distinguishes this partner's answers; None: only its name
    tell        gets the number of prefixes done and their total

    Raises CascadeError if there are no such facts, or if the partner does not answer, and DatasetError for a dataset
    that cannot be read.
    """
    kind = "leakage" if partner is None else "containment"
    settled, labels = delegation.settle(
        model.folder, delegation.Options(dataset=options.dataset, holdout=options.holdout)
    )
    documents = options.documents or ("trained" if partner is None else "held-out")
    options = options.model_copy(
        update={"dataset": settled.dataset, "holdout": settled.holdout, "documents": documents}
    )
    generating = generating.model_copy(update={"max_new_tokens": options.new_tokens})
    asked = options.model_dump() | {"fingerprint": labels.fingerprint}
    if partner is not None:
        asked |= {"partner": partner.name, **(identity or {})}
        asked |= generating.model_dump(exclude={"batch", "max_new_tokens"})
    folder = results_folder(model.folder)
    if not again and (saved := results.read(folder, kind)) is not None and saved[0].options == asked:
        return saved[0]
    pairs = find_pairs(labels, options, model.context)
    written: list[Generation | None] = [None] * len(pairs)
    for done, text in enumerate(
        generation.generate(model, [pair.prefix for pair in pairs], partner, generating), start=1
    ):
        written[text.index] = text
        if tell:
            tell(done, len(pairs))
    answered = [(pair, text) for pair, text in zip(pairs, written, strict=True) if text is not None]
    generation.require_answered([text for _, text in answered])
    contained = np.array([contains(text.text, pair.value) for pair, text in answered])
    units = pa.table(
        {
            "prompt": pa.array(range(len(answered)), pa.int32()),
            "document": [pair.document for pair, _ in answered],
            "kind": [pair.kind for pair, _ in answered],
            "contained": contained,
            "calls": pa.array([text.calls for _, text in answered], pa.int32()),
            "tokens": pa.array([text.positions for _, text in answered], pa.int32()),
        }
    )
    missed = sum(text.missed for _, text in answered)
    result = Result(
        kind=kind,
        checkpoint=model.folder.name,
        options=asked,
        figures={
            "contained": float(contained.mean()),
            "called": sum(text.calls for _, text in answered) / max(1, sum(text.positions for _, text in answered)),
            "missed": float(missed),
            "pairs": float(len(answered)),
        },
        details={
            "by_type": _by_type(answered, contained),
            "examples": [
                {"prefix": pair.prefix[-200:], "value": pair.value, "text": text.text, "contained": bool(hit)}
                for (pair, text), hit in list(zip(answered, contained, strict=True))[:EXAMPLES]
            ],
        },
    )
    results.save(folder, result, units)
    return result


def contains(text: str, value: str) -> bool:
    """Whether a text contains a value as words or a number of its own, ignoring case and white space."""
    words = r"\s+".join(map(re.escape, _plain(value).split()))
    return re.search(rf"(?<!\w)(?<!\d[.,]){words}(?!\w)(?![.,]\d)", _plain(text)) is not None


def find_pairs(labels: Labels, options: Options, context: int) -> list[Pair]:
    """Facts of a labelled corpus with the text before them, the same for every model with this tokenizer.

    A fact has up to LONGEST tokens and at least two characters, including a letter or digit, is on one line, and does
    not occur earlier in its document. The first by a hash of document and position are taken, at most `per_document` of
    a document. Raises CascadeError if there is none.
    """
    room = min(options.prefix, context - options.new_tokens - 1)
    if room < LEAST_BEFORE:
        raise CascadeError(f"the model reads {context} tokens: ask for fewer --new-tokens", usage=True)
    manifest = read_manifest(labels.root)
    digests = {record.name: record.sha256 for record in manifest.parts}
    ranked = (
        (rank, pair) for record in labels.records for rank, pair in _facts(labels, record.name, digests, options, room)
    )
    taken: dict[str, int] = {}
    pairs = []
    for _, pair in sorted(ranked, key=lambda item: item[0]):
        if taken.get(pair.document, 0) < options.per_document:
            taken[pair.document] = taken.get(pair.document, 0) + 1
            pairs.append(pair)
            if len(pairs) == options.pairs:
                break
    if not pairs:
        raise CascadeError(
            f"no {options.documents} document of {labels.root} has a fact after {LEAST_BEFORE} tokens: use a larger "
            "dataset, or other --documents",
            usage=True,
        )
    return pairs


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _facts(
    labels: Labels, part: str, digests: dict[str, str], options: Options, room: int
) -> Iterator[tuple[bytes, Pair]]:
    """All facts of a part that qualify, each with its hash."""
    path = signals_path(labels.root, part)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror or error}") from None
    if sha256(data) != digests.get(part):
        raise DatasetError(f"{path} is not the file that was written, its checksum differs: label the corpus again")
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        if "text" not in file.schema_arrow.names:
            raise CascadeError(f"{labels.root} has no text (lacy label --no-text): label the corpus with its text")
        held = shards.is_held(file, options.holdout or 0.0)
        table = file.read(["doc_id", "text", "token_starts", "token_ends", "factual", "ent_type"])
    rows = np.flatnonzero(held == (options.documents == "held-out"))
    for row in rows.tolist():
        name, text, starts, ends, factual, types = (table.column(index)[row] for index in range(6))
        flags = factual.values.to_numpy(zero_copy_only=False)
        edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
        starts, ends, types = (column.values.to_numpy() for column in (starts, ends, types))
        whole = text.as_py()
        for first, last in edges.reshape(-1, 2):
            if first < LEAST_BEFORE or last - first > LONGEST:
                continue
            value = whole[starts[first] : ends[last - 1]].strip()
            before = whole[: starts[first]]
            if len(value) < 2 or "\n" in value or not any(map(str.isalnum, value)) or contains(before, value):
                continue
            prefix = whole[starts[max(0, first - room)] : starts[first]]
            rank = blake2b(f"{name.as_py()}\0{first}".encode(), digest_size=16).digest()
            yield rank, Pair(name.as_py(), prefix, value, ENT_TYPES[types[first]])


def _by_type(pairs: list[tuple[Pair, Generation]], contained: np.ndarray) -> dict[str, Any]:
    kinds = np.array([pair.kind for pair, _ in pairs])
    return {
        str(kind) or "none": {"pairs": int((kinds == kind).sum()), "contained": float(contained[kinds == kind].mean())}
        for kind in np.unique(kinds)
    }
