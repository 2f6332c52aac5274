"""A part crosses between machines as Arrow: the same, small, and without what it was sliced from."""

import numpy as np
import pyarrow as pa
import pytest

from lacy.labelers import tokenize
from lacy.pipeline.corpus.deadletters import DeadLetter
from lacy.pipeline.corpus.readers import read
from lacy.pipeline.corpus.sources import Range
from lacy.pipeline.element import Part, PartCoder
from lacy.schemas.parts import SIGNALS
from tests.support import corpora

CODER = PartCoder()


def tagged(texts: list[str], tokenizer: tokenize.TargetTokenizer) -> pa.RecordBatch:
    """What a part has when it crosses; the signals are noise, which zstd makes nothing of."""
    tokens = tokenize.encode(tokenizer, texts)
    rng = np.random.default_rng(0)
    count = len(tokens.ids)
    return pa.RecordBatch.from_pydict(
        {
            "doc_id": pa.array([f"document-{row}" for row in range(len(texts))]),
            "source": pa.array([f"corpus/a.jsonl:{row}" for row in range(len(texts))]),
            "text": pa.array(texts, pa.large_string()),
            "token_ids": tokens.lists(tokens.ids),
            "token_starts": tokens.lists(tokens.starts),
            "token_ends": tokens.lists(tokens.ends),
            "factual": tokens.lists(rng.random(count) < 0.25),
            "pos": tokens.lists(rng.integers(0, 18, count).astype(np.uint8)),
            "ent_type": tokens.lists(rng.integers(0, 19, count).astype(np.uint8)),
        }
    )


@pytest.fixture(scope="module")
def tokenizer(small_model) -> tokenize.TargetTokenizer:
    return tokenize.load(str(small_model))


@pytest.fixture(scope="module")
def batch(tokenizer) -> pa.RecordBatch:
    return tagged([row["text"] for row in corpora.documents(30, seed=5)] + ["", "é\U0001f600 \x00"], tokenizer)


def test_all_of_a_part_crosses(batch):
    part = Part(
        Range("part-00001-000000000004096", "a.gz", "d/.spool/x", "jsonl", 0, 9, base=4096, error="cut", limit=3),
        batch,
        bad=(DeadLetter("a.jsonl.gz", 17, "not JSON: é\ud800", "id"), DeadLetter("a.jsonl.gz", 18, "no text")),
        skipped=2,
        seconds={"read": 0.1, "grammar": 1 / 3},
        scored={"student": "transformers"},
        judged={"spans": 4},
    )  # fmt: skip
    assert CODER.decode(CODER.encode(part)) == part


def test_a_part_without_documents_crosses(batch):
    part = Part(Range("part-0", "a", "a", "jsonl", 0, 1), batch.take(pa.array([], pa.int64())))
    assert CODER.decode(CODER.encode(part)) == part


def test_encoding_is_deterministic(batch):
    part = Part(Range("part-0", "a", "a", "jsonl", 0, 1), batch, scored={"b": "x", "a": "y"})
    again = CODER.decode(CODER.encode(part))
    assert CODER.is_deterministic()
    assert CODER.encode(again) == CODER.encode(part)
    assert CODER.encode(Part(part.range, batch, scored={"a": "y", "b": "x"})) == CODER.encode(part)


def test_a_slice_does_not_bring_its_parent(batch):
    place = Range("part-0", "a", "a", "jsonl", 0, 1)
    alone, sliced = Part(place, batch.take(pa.array([3]))), Part(place, batch.slice(3, 1))
    assert CODER.decode(CODER.encode(sliced)) == alone
    assert len(CODER.encode(sliced)) < len(CODER.encode(alone)) + 512


def test_a_range_of_a_mebibyte_stays_a_few_mebibytes(tmp_path, tokenizer):
    """With a tokenizer of 1,000 entries, which makes more tokens of a text than an ordinary one."""
    path = corpora.write(tmp_path / "a.jsonl", corpora.documents(2000, seed=7))
    assert path.stat().st_size > 1 << 20
    place = Range("part-0", str(path), str(path), "jsonl", 0, 1 << 20)
    part = Part(place, tagged(read(place).texts, tokenizer))
    tokens = len(part.tokens().ids)
    encoded = len(CODER.encode(part))
    assert tokens > 200_000
    assert encoded < 8 << 20
    assert encoded < part.batch.nbytes / 1.5
    assert CODER.estimate_size(part) == part.batch.nbytes


def test_it_has_every_column_that_is_measured_before_the_scores(batch):
    scores = {"ref_nll", "ref_correct", "student_nll", "judge"}
    assert set(batch.schema.names) == set(SIGNALS.names) - scores
