"""Label shards made of random words: what a trainer reads, without a corpus, a model or a labelling run."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer, models, pre_tokenizers

from lacy.schemas import manifest
from lacy.schemas.files import sha256, write_atomic
from lacy.schemas.parts import LABELS, select, to_parquet

END, CALL = "<|endoftext|>", "<CALL>"


def make(
    dataset: Path,
    *,
    vocabulary: int = 200,
    parts: int = 3,
    documents: int = 40,
    length: tuple[int, int] = (10, 60),
    judge: bool = False,
    seed: int = 0,
) -> Path:
    """A dataset with the label set "lacy": words of a Zipf distribution, of which the rare ones are factual.

    Each word depends on the one before it, so that there is something to learn. `documents` are those of a part, of
    `length` tokens. ref_nll is missing at a document's first token, as it is in real shards.
    """
    words = {END: 0, CALL: 1} | {f"w{number}": number for number in range(2, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([END, CALL])
    write_atomic(dataset / "tokenizer" / "tokenizer.json", tokenizer.to_str().encode())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "additional_special_tokens": [CALL]}
    write_atomic(dataset / "tokenizer" / "tokenizer_config.json", json.dumps(settings).encode())
    rng = np.random.default_rng(seed)
    records = []
    for number in range(parts):
        lengths = rng.integers(*length, documents)
        table = _table(rng, number, lengths, vocabulary, judge)
        records.append(_write(dataset, f"part-{number:05d}", table))
    save(
        dataset,
        [part for part, _ in records],
        [labelled for _, labelled in records],
        sha256(tokenizer.to_str().encode()),
    )
    return dataset


def _table(rng: np.random.Generator, number: int, lengths: np.ndarray, vocabulary: int, judge: bool) -> pa.Table:
    tokens = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    steps = rng.zipf(1.3, tokens) % (vocabulary - 2)
    factual = rng.random(tokens) < 0.25
    steps[~factual] %= 7
    ids = 2 + np.cumsum(steps) % (vocabulary - 2)
    first = np.isin(np.arange(tokens), offsets[:-1])
    factual &= ~first
    loss = rng.exponential(3, tokens)
    columns = {
        "token_ids": pa.array(ids),
        "label": pa.array(factual & (rng.random(tokens) < 0.6)).cast(pa.int8()),
        "factual": pa.array(factual),
        "ref_nll": pa.array(loss, mask=first),
    }
    if judge:
        columns["judge"] = pa.array(np.where(factual, rng.random(tokens), 0), mask=rng.random(tokens) < 0.1)
    schema = select(LABELS, list(columns))
    lists = [
        pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values.cast(schema.field(name).type.value_type))
        for name, values in columns.items()
    ]
    names = pa.array([f"{number}-{row}" for row in range(len(lengths))])
    return pa.Table.from_arrays([names, *lists], schema=schema)


def _write(dataset: Path, name: str, table: pa.Table) -> tuple[manifest.PartRecord, manifest.LabelRecord]:
    data = to_parquet(table)
    write_atomic(manifest.labels_path(dataset, "lacy", name), data)
    factual, label = (table[column].combine_chunks().flatten().to_numpy(False) for column in ("factual", "label"))
    shared = {"name": name, "rows": len(table), "tokens": len(label), "bytes": len(data), "sha256": sha256(data)}
    return (
        manifest.PartRecord(**shared, source="-", factual=int(factual.sum()), bad=0),
        manifest.LabelRecord(**shared, candidates=int(factual.sum()), delegated=int((label == 1).sum()), ignored=0),
    )


def save(dataset: Path, parts: list[manifest.PartRecord], labelled: list[manifest.LabelRecord], tokenizer: str) -> None:
    """The manifest and the _policy.json of "lacy"."""
    tokens = sum(part.tokens for part in parts)
    chosen = sum(part.delegated for part in labelled)
    labels = manifest.LabelSet(
        name="lacy", policy="lacy", action="delegate", budget=0.15, seed=0, threshold=0.0, tokens=tokens,
        candidates=sum(part.candidates for part in labelled), chosen=chosen, share=chosen / max(1, tokens),
        parts=labelled,
    )  # fmt: skip
    manifest.save(dataset / "labels" / "lacy" / "_policy.json", labels)
    whole = manifest.Manifest(
        state="complete", corpus=[], options={}, models={}, versions={}, parts=parts, tokens=tokens,
        documents=sum(part.rows for part in parts), factual=sum(part.factual for part in parts),
        tokenizer={"name": "made", "sha256": tokenizer, "call_id": 1},
    )  # fmt: skip
    manifest.save(dataset / "manifest.json", whole)
