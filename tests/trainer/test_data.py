"""The stream of packed sequences: what is in it, in which order, from which place on, and what it refuses.

Every token of these datasets has an id of its own, which its label and signals follow from: a batch shows by itself
which tokens it holds, and whether the columns are aligned with them.
"""

import json
import math
import multiprocessing
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models

from lacy.schemas import files
from lacy.schemas.codes import LEARN
from lacy.schemas.errors import DatasetError
from lacy.schemas.files import sha256, write_atomic
from lacy.schemas.manifest import LabelSet, label_sets, labels_path, load, read_manifest, save
from lacy.schemas.parts import LABELS, select, to_parquet
from lacy.trainer import data, shards
from tests.support import datasets
from tests.support.datasets import CALL, END

EOS, CALL_ID = 0, 1
WORDS = 6000  # ids below are words

UNEVEN = [[5, 1, 9, 300, 2], [40], [7, 8, 9] * 12, [3] * 50, [25, 60, 11]]  # tokens of each document of each part
SMALL = [[4, 9, 2, 6], [3], [8, 5, 7]]


def write(root: Path, sizes: Sequence[Sequence[int]], *, names: Callable[[int], str] = "doc-{}".format) -> Path:
    """A dataset with documents of so many tokens; the tokens count from 2 on through all of it."""
    records = []
    first = 2
    for number, lengths in enumerate(sizes):
        ids = np.arange(first, first + sum(lengths))
        first += len(ids)
        before = sum(map(len, sizes[:number]))
        table = tabled(ids, lengths, [names(before + row) for row in range(len(lengths))])
        records.append(datasets._write(root, f"part-{number:05d}", table))
    assert first < WORDS
    tokenizer = Tokenizer(models.WordLevel({END: EOS, CALL: CALL_ID} | {f"w{n}": n for n in range(2, WORDS)}, "w2"))
    tokenizer.add_special_tokens([AddedToken(END, special=True), AddedToken(CALL, special=True)])
    write_atomic(root / "tokenizer" / "tokenizer.json", tokenizer.to_str().encode())
    write_atomic(root / "tokenizer" / "tokenizer_config.json", json.dumps({"eos_token": END}).encode())
    datasets.save(root, [p for p, _ in records], [p for _, p in records], sha256(tokenizer.to_str().encode()))
    return root


def tabled(ids: np.ndarray, lengths: Sequence[int], names: list[str]) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
    values = {"token_ids": ids} | {name: expected(ids, name) for name in shards.COLUMNS}
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(found, LABELS.field(name).type.value_type, from_pandas=True))
        for name, found in values.items()
    ]
    return pa.Table.from_arrays([pa.array(names), *lists], schema=select(LABELS, list(values)))


def expected(ids: np.ndarray, column: str) -> np.ndarray:
    """What stands beside tokens, end tokens too."""
    words = ids != EOS
    match column:
        case "label":
            return np.where(words, ids % 3, LEARN).astype(np.int8)
        case "factual":
            return words & (ids % 2 == 0)
        case "ref_nll":
            return np.where(words & (ids % 7 > 0), ids / 8, np.nan).astype(np.float32)
    return np.where(words & (ids % 5 > 0), ids % 8 / 8, np.nan).astype(np.float32)


def documents(sizes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    ends = np.cumsum([0, *chain(*sizes)])
    return [tuple(range(2 + first, 2 + last)) for first, last in pairwise(ends.tolist())]


def take(stream: Iterable[dict[str, torch.Tensor]], count: int) -> list[dict[str, torch.Tensor]]:
    return list(islice(stream, count))


def tokens(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    """The stream that the batches of one slot were cut from."""
    rows = [row for batch in batches for row in batch["ids"].tolist()]
    assert all(before[-1] == after[0] for before, after in pairwise(rows)), "sequences share one token"
    return [*rows[0], *chain.from_iterable(row[1:] for row in rows[1:])]


def split(stream: list[int]) -> list[tuple[int, ...]]:
    """The documents between end tokens, without the last, which may be cut."""
    assert stream[0] == EOS
    ends = [place for place, token in enumerate(stream) if token == EOS]
    return [tuple(stream[first + 1 : last]) for first, last in pairwise(ends)]


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    return len(left) == len(right) > 0 and all(
        a.keys() == b.keys() and all(torch.equal(a[name].nan_to_num(-1), b[name].nan_to_num(-1)) for name in a)
        for a, b in zip(left, right, strict=True)
    )


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state, allow_nan=False))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory) -> shards.Labels:
    return shards.open_labels(str(write(tmp_path_factory.mktemp("data") / "uneven", UNEVEN)), None)


@pytest.fixture
def small(tmp_path) -> Path:
    return write(tmp_path / "small", SMALL)


# What is in the stream


def test_batches_are_the_documents_one_after_the_other(uneven):
    count = len(documents(UNEVEN))
    total = sum(map(sum, UNEVEN)) + count
    with_columns = data.loader(uneven, batch=3, context=16, columns=shards.COLUMNS, buffer_tokens=200)
    batches = take(with_columns, 3 * total // 48 + 2)
    found = split(tokens(batches))
    for epoch in range(3):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == documents(UNEVEN)
    for batch in batches:
        assert batch["ids"].dtype == torch.int32 and batch["ids"].shape == (3, 17) and batch["ids"].is_contiguous()
        for name in shards.COLUMNS:
            wanted = expected(batch["ids"][:, 1:].numpy(), name)
            assert batch[name].numpy().dtype == wanted.dtype
            np.testing.assert_array_equal(batch[name].numpy(), wanted)


def test_a_sequence_may_be_longer_than_an_epoch(small):
    count = len(documents(SMALL))
    found = split(tokens(take(data.loader(shards.open_labels(str(small), None), batch=2, context=150), 2)))
    assert len(found) > 6 * count
    for epoch in range(6):
        assert sorted(found[epoch * count : (epoch + 1) * count]) == documents(SMALL)


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("sizes", [UNEVEN, [[30, 2, 70, 9] * 6], [[2, 5]] * 20], ids=["uneven", "one part", "many"])
@pytest.mark.parametrize("buffer_tokens", [40, 10_000])
def test_every_token_is_a_target_once_in_an_epoch(tmp_path, sizes, ranks, buffer_tokens):
    labels = shards.open_labels(str(write(tmp_path, sizes)), None)
    epochs: dict[int, Counter[int]] = {0: Counter({EOS: ranks}), 1: Counter()}  # the first end tokens are no targets
    for rank in range(ranks):
        stream = data.loader(labels, batch=1, context=1, rank=rank, ranks=ranks, buffer_tokens=buffer_tokens)
        for batch in stream:
            if stream.epoch >= 2:
                break
            epochs[int(stream.epoch)][int(batch["ids"][0, 1])] += 1
    wanted = Counter(chain(*documents(sizes))) + Counter({EOS: len(documents(sizes))})
    assert epochs == {0: wanted, 1: wanted}


@pytest.mark.parametrize("sizes", [[[10] * 400], [[10] * 10, [10] * 300, [10] * 20]], ids=["one part", "uneven"])
def test_ranks_get_about_as_much(tmp_path, sizes):
    labels = shards.open_labels(str(write(tmp_path, sizes)), None)
    for rank in range(4):
        stream = data.loader(labels, batch=1, context=10, rank=rank, ranks=4)
        count = next(number for number, _ in enumerate(stream) if stream.epoch >= 1)
        assert count * 10 == pytest.approx(sum(map(len, sizes)) * 11 / 4, rel=0.15)


def test_a_worker_reads_what_a_rank_of_its_own_would(uneven):
    shared = {"batch": 2, "context": 20, "columns": ["factual", "ref_nll"], "buffer_tokens": 150, "positions": True}
    stream = data.loader(uneven, rank=1, ranks=2, workers=2, **shared)
    found = take(stream, 60)
    assert stream.epoch > 2
    stream.close()
    for worker in range(2):
        assert same(found[worker::2], take(data.loader(uneven, rank=2 + worker, ranks=4, **shared), 30))


def test_documents_without_tokens_are_left_out(tmp_path):
    sizes = [[0, 3, 0, 2], [0], [4, 0]]
    labels = shards.open_labels(str(write(tmp_path, sizes)), None)
    found = split(tokens(take(data.loader(labels, batch=1, context=12, buffer_tokens=1), 4)))
    assert sorted(found[:3]) == [(2, 3, 4), (5, 6), (7, 8, 9, 10)]


@pytest.mark.parametrize("rows", [1, 3])
def test_positions_begin_anew_at_end_tokens(uneven, rows):
    for batch in take(data.loader(uneven, batch=rows, context=50, positions=True), 10):
        assert batch["positions"].dtype == torch.int64
        for ids, positions in zip(batch["ids"].tolist(), batch["positions"].tolist(), strict=True):
            place, wanted = -1, []
            for token in ids[:-1]:
                place = 0 if token == EOS else place + 1
                wanted.append(place)
            assert positions == wanted


def test_batches_do_not_share_memory(uneven):
    """A batch that the consumer writes into changes no other."""
    untouched = take(data.loader(uneven, batch=1, context=30, columns=["factual"]), 5)
    stream = data.loader(uneven, batch=1, context=30, columns=["factual"])
    for wanted in untouched:
        batch = next(stream)
        assert same([batch], [wanted])
        batch["ids"].zero_()
        batch["factual"].fill_(True)


# Its order


def test_the_order_follows_from_the_seed_and_the_epoch(uneven):
    def order(seed: int) -> list[tuple[int, ...]]:
        return split(tokens(take(data.loader(uneven, batch=4, context=64, seed=seed, buffer_tokens=150), 12)))

    count = len(documents(UNEVEN))
    first = order(1)
    assert first == order(1)
    assert first[:count] != first[count : 2 * count]
    assert first[:count] != order(2)[:count]
    assert first[:count] != documents(UNEVEN)


def test_parts_and_documents_are_both_shuffled(tmp_path):
    sizes = [[5] * 10] * 12
    labels = shards.open_labels(str(write(tmp_path, sizes)), None)
    found = split(tokens(take(data.loader(labels, batch=1, context=800, buffer_tokens=170), 1)))[:120]
    numbers = [(document[0] - 2) // 5 for document in found]
    buffers = [numbers[first : first + 30] for first in range(0, 120, 30)]
    for buffer in buffers:
        parts = {number // 10 for number in buffer}
        assert len(parts) == 3, "a buffer holds whole parts"
        assert buffer != sorted(buffer)
    assert [min(b) for b in buffers] != sorted(min(b) for b in buffers)
    assert any(max(p) - min(p) != 2 for p in ({number // 10 for number in b} for b in buffers))


def test_the_seed_of_torch_is_left_alone(uneven):
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    stream = data.loader(uneven, batch=1, context=8, workers=1)
    next(stream)
    stream.state_dict()
    stream.close()
    assert torch.equal(torch.rand(3), wanted)


# Its place


@settings(deadline=None, max_examples=40)
@given(
    before=st.integers(0, 60),
    batch=st.integers(1, 3),
    context=st.sampled_from([1, 13, 64, 250]),
    buffer_tokens=st.sampled_from([1, 120, 10_000]),
    rank=st.integers(0, 1),
    holdout=st.sampled_from([0, 0.2]),
)
def test_a_resumed_stream_goes_on_exactly(uneven, before, batch, context, buffer_tokens, rank, holdout):
    def begin() -> data.Stream:
        return data.loader(
            uneven, batch=batch, context=context, columns=["label"], rank=rank, ranks=2, holdout=holdout,
            buffer_tokens=buffer_tokens, seed=3,
        )  # fmt: skip

    stream = begin()
    take(stream, before)
    state = through_json(stream.state_dict())
    wanted = take(stream, 6)
    resumed = begin()
    resumed.load_state_dict(state)
    assert through_json(resumed.state_dict()) == state
    assert resumed.epoch == state["epochs"][0]
    assert same(take(resumed, 3), wanted[:3])
    again = begin()
    again.load_state_dict(through_json(resumed.state_dict()))
    assert same(take(again, 3), wanted[3:])


@pytest.mark.parametrize("before", [0, 1, 5, 32])
def test_a_resumed_stream_goes_on_exactly_with_workers(uneven, before):
    """With an even and an odd number of batches taken, while workers have read ahead."""

    def begin() -> data.Stream:
        return data.loader(uneven, batch=2, context=30, columns=["judge"], workers=2, buffer_tokens=100)

    stream = begin()
    take(stream, before)
    time.sleep(0.05)
    state = through_json(stream.state_dict())
    wanted = take(stream, 9)
    stream.close()
    resumed = begin()
    resumed.load_state_dict(state)
    assert through_json(resumed.state_dict()) == state
    assert same(take(resumed, 9), wanted)
    resumed.load_state_dict(state)
    assert same(take(resumed, 9), wanted), "a stream in use can be set back"
    resumed.close()


def test_a_state_stays_what_it_was(uneven):
    stream = data.loader(uneven, batch=1, context=30)
    next(stream)
    state = stream.state_dict()
    kept = through_json(state)
    take(stream, 9)
    assert through_json(state) == kept != through_json(stream.state_dict())


def test_columns_and_positions_may_change_on_resuming(uneven):
    stream = data.loader(uneven, batch=1, context=30)
    take(stream, 4)
    other = data.loader(uneven, batch=1, context=30, columns=["factual"], positions=True)
    other.load_state_dict(through_json(stream.state_dict()))
    assert torch.equal(next(other)["ids"], next(stream)["ids"])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ranks": 4}, "made with 2 ranks, this run has 4 ranks: resume with 2 ranks, or start a new run"),
        ({"rank": 1}, "made with rank 0, this run has rank 1"),
        ({"workers": 1}, "made with 0 loader workers, this run has 1 loader workers"),
        ({"seed": 8}, "made with seed 7, this run has seed 8"),
        ({"holdout": 0.1}, "made with a holdout of 0, this run has a holdout of 0.1"),
        ({"batch": 3}, "made with 2 sequences in a batch, this run has 3"),
        ({"context": 9}, "made with a context of 8, this run has a context of 9"),
        ({"buffer_tokens": 5}, f"made with buffers of {data.BUFFER_TOKENS} tokens, this run has buffers of 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_place_in_another_stream_is_refused(uneven, changed, message):
    arguments: dict[str, Any] = {"batch": 2, "context": 8, "ranks": 2, "seed": 7, "holdout": 0.0}
    state = data.loader(uneven, **arguments).state_dict()
    other = data.loader(uneven, **(arguments | changed))
    with pytest.raises(DatasetError, match=message) as caught:
        other.load_state_dict(through_json(state))
    assert "--model" in str(caught.value)


def test_a_place_in_other_data_is_refused(small, tmp_path):
    state = data.loader(shards.open_labels(str(small), None), batch=1, context=4).state_dict()
    other = data.loader(shards.open_labels(str(write(tmp_path / "other", [[5]])), None), batch=1, context=4)
    with pytest.raises(DatasetError, match=r"made from other data .* resume with the dataset and the labels"):
        other.load_state_dict(state)
    with pytest.raises(DatasetError, match="has version 99, this lacy reads 1"):
        other.load_state_dict(state | {"version": 99})


def test_the_same_data_elsewhere_is_the_same_data(small, tmp_path):
    moved = tmp_path / "moved"
    stream = data.loader(shards.open_labels(str(small), None), batch=1, context=4)
    small.rename(moved)
    other = data.loader(shards.open_labels(str(moved), None), batch=1, context=4)
    other.load_state_dict(stream.state_dict())
    assert split(tokens(take(other, 20)))


# Held-out documents


def held(
    labels: shards.Labels, *, batch: int = 2, context: int = 10, ranks: int = 1, **options: Any
) -> list[list[Any]]:
    """The batches of each rank."""
    options = {"holdout": 0.3} | options
    return [
        list(data.held_out(labels, batch=batch, context=context, rank=rank, ranks=ranks, **options))
        for rank in range(ranks)
    ]


def targets(batches: list[dict[str, torch.Tensor]]) -> list[int]:
    return [int(token) for batch in batches for token in batch["ids"][:, 1:][batch["real"]]]


def test_held_out_documents_are_never_trained_on(uneven):
    [batches] = held(uneven, holdout=0.3)
    kept = set(targets(batches)) - {EOS}
    everything = set(chain(*documents(UNEVEN)))
    assert 0 < len(kept) < len(everything)
    for seed, ranks in ((0, 1), (1, 2)):
        learned: set[int] = set()
        for rank in range(ranks):
            stream = data.loader(uneven, batch=1, context=60, seed=seed, rank=rank, ranks=ranks, holdout=0.3)
            while stream.epoch < 2.5:
                learned |= set(next(stream)["ids"].flatten().tolist())
        assert learned - {EOS} == everything - kept


def test_a_document_is_held_out_by_its_id(tmp_path):
    """In whatever part it stands, and among whichever documents."""
    one = shards.open_labels(str(write(tmp_path / "a", [[1] * 400])), None)
    other = shards.open_labels(
        str(write(tmp_path / "b", [[1] * 50] * 4, names=lambda row: f"doc-{399 - 2 * row}")), None
    )

    def numbers(labels: shards.Labels, holdout: float) -> set[int]:
        return {token - 2 for token in targets(held(labels, holdout=holdout)[0]) if token != EOS}

    kept = numbers(one, 0.2)
    assert {399 - 2 * row for row in numbers(other, 0.2)} == {number for number in kept if number % 2}
    assert 0.12 < len(kept) / 400 < 0.28
    assert kept < numbers(one, 0.4)


def test_held_out_documents_are_packed_in_corpus_order(uneven):
    [batches] = held(uneven, batch=3, context=10, columns=list(shards.COLUMNS))
    real = targets(batches)
    stream = tokens(batches)
    assert stream[0] == EOS and stream[1 : len(real) + 1] == real
    found = split([*stream[: len(real) + 1], EOS])
    assert found == sorted(found) and set(found) < set(documents(UNEVEN))
    flat = torch.cat([batch["real"].flatten() for batch in batches])
    assert flat.tolist() == [True] * len(real) + [False] * (len(flat) - len(real))
    assert 0 < len(flat) - len(real) < 30, "what is padded is less than a batch"
    for batch in batches:
        assert batch["ids"].shape == (3, 11)
        assert (batch["ids"][:, 1:][~batch["real"]] == EOS).all()
        for name in shards.COLUMNS:
            np.testing.assert_array_equal(batch[name].numpy(), expected(batch["ids"][:, 1:].numpy(), name))


@pytest.mark.parametrize("max_tokens", [None, 1, 37, 40, 10_000])
def test_ranks_share_the_held_out_sequences(uneven, max_tokens):
    def sequences(batch: int, ranks: int) -> list[tuple[Any, ...]]:
        shares = held(uneven, batch=batch, ranks=ranks, columns=["factual"], positions=True, max_tokens=max_tokens)
        assert len({len(share) for share in shares}) == 1, "each rank has as many batches"
        found = []
        for batches in zip(*shares, strict=True):
            for row in range(batch):
                for share in batches:
                    real = share["real"][row]
                    if real.any():
                        found.append(tuple(share[n][row].tolist() for n in ("ids", "factual", "positions", "real")))
        return found

    wanted = sequences(1, 1)
    for batch, ranks in ((1, 2), (2, 1), (3, 2), (2, 5)):
        assert sequences(batch, ranks) == wanted
    count = sum(sum(real) for *_, real in wanted)
    available = len(targets(held(uneven)[0]))
    assert count == min(available, max_tokens or available)


def test_held_out_reads_no_further_than_it_must(uneven, monkeypatch):
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    held(uneven, holdout=0.9, max_tokens=20)
    assert opened == ["part-00000.parquet"]


def test_a_holdout_without_a_document_is_refused(small):
    labels = shards.open_labels(str(small), None)
    with pytest.raises(
        DatasetError, match=r"none of the documents of .* is held out by a holdout of 1e-06: use a larg"
    ):
        next(iter(data.held_out(labels, batch=1, context=4, holdout=1e-6)))
    with pytest.raises(DatasetError, match=r"has no document for one of 1 loaders: use fewer .* smaller holdout"):
        next(data.loader(labels, batch=1, context=4, holdout=1 - 1e-9))


# What it reads


def test_it_reads_the_buffer_and_the_next_one(tmp_path, monkeypatch):
    labels = shards.open_labels(str(write(tmp_path, [[10] * 10] * 20)), None)
    opened = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path.name) or read(path))
    stream = data.loader(labels, batch=1, context=10, buffer_tokens=300)
    take(stream, 5)
    time.sleep(0.3)
    assert len(opened) == len(set(opened)) == 6


def test_a_column_that_is_not_asked_for_is_not_read(small):
    replace(small, 0, "factual", lambda values, _: pa.array([None] * len(values), pa.bool_()))
    labels = shards.open_labels(str(small), None)
    assert next(data.loader(labels, batch=1, context=4, columns=["label"]))["label"].shape == (1, 4)
    with pytest.raises(DatasetError, match=r"part-00000.parquet: factual has nulls"):
        next(data.loader(labels, batch=1, context=4, columns=["factual"]))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_dataset_in_a_store(small, scheme):
    where = f"{scheme}://{small}"
    if scheme == "memory":
        store = fsspec.filesystem("memory")
        for path in small.rglob("*"):
            if path.is_file():
                store.pipe(str(path), path.read_bytes())
    there, here = shards.open_labels(where, "lacy"), shards.open_labels(str(small), "lacy")
    assert there.fingerprint == here.fingerprint
    options: dict[str, Any] = {"batch": 2, "context": 7, "columns": list(shards.COLUMNS), "holdout": 0.1}
    assert same(take(data.loader(there, **options), 9), take(data.loader(here, **options), 9))
    assert same(held(there)[0], held(here)[0])
    with pytest.raises(DatasetError, match=r"is not a dataset: it has no manifest.json"):
        shards.open_labels(f"{scheme}:///nowhere/at/all", None)


@pytest.mark.parametrize("lasts", [False, True])
def test_a_store_that_fails_is_asked_again(small, monkeypatch, lasts):
    store = fsspec.filesystem("memory")
    for path in small.rglob("*"):
        if path.is_file():
            store.pipe(str(path), path.read_bytes())
    labels = shards.open_labels(f"memory://{small}", None)
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(files, "PATIENCE", 0.05 if lasts else 60.0)
    left, read = dict.fromkeys(labels.records, 1_000_000 if lasts else 3), type(store).cat_file

    def flaky(self: Any, path: str, **options: Any) -> bytes:
        record = next((record for record in left if record.name in path), None)
        if record and left[record]:
            left[record] -= 1
            raise RuntimeError("503 slow\ndown")
        return read(self, path, **options)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    stream = data.loader(labels, batch=1, context=4)
    if lasts:
        with pytest.raises(DatasetError, match=r"part-0000\d.parquet cannot be reached: 503 slow down$"):
            next(stream)
    else:
        assert split(tokens(take(stream, 20)))
        assert not any(left.values())


def test_what_cannot_change_is_not_asked_again(small, monkeypatch):
    asked = []

    def denied(path: Path) -> bytes:
        asked.append(path)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(DatasetError, match=r"small/manifest.json cannot be read: .*Permission denied"):
        shards.open_labels(str(small), None)
    assert len(asked) == 1


# What it refuses


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content))


def set_tokenizer(root: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change tokenizer.json, and the digest in the manifest."""
    edit(root / "tokenizer" / "tokenizer.json", change)
    digest = sha256((root / "tokenizer" / "tokenizer.json").read_bytes())
    edit(root / "manifest.json", lambda manifest: manifest["tokenizer"].update(sha256=digest))


def drop_end(tokenizer: dict[str, Any]) -> None:
    del tokenizer["model"]["vocab"][END]
    tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != END]


def settings_of(root: Path) -> Path:
    return root / "tokenizer" / "tokenizer_config.json"


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no dataset": (lambda d: (d / "manifest.json").unlink(), r"is not a dataset: .*lacy label"),
    "unfinished": (lambda d: edit(d / "manifest.json", lambda m: m.update(state="running")), "is not finished: rerun"),
    "no labels": (lambda d: (d / "labels" / "lacy" / "_policy.json").unlink(), "has no labels: lacy decide makes them"),
    "a part without labels": (
        lambda d: edit(d / "labels" / "lacy" / "_policy.json", lambda p: p["parts"].pop()),
        "label set 'lacy' does not fit .*, 1 parts differ: lacy decide --name lacy",
    ),
    "labels of other documents": (
        lambda d: edit(d / "labels" / "lacy" / "_policy.json", lambda p: p["parts"][0].update(rows=99)),
        "label set 'lacy' does not fit .*, 1 parts differ",
    ),
    "no document": (
        lambda d: [
            edit(d / "labels" / "lacy" / "_policy.json", lambda p: p["parts"].clear()),
            edit(d / "manifest.json", lambda m: m["parts"].clear()),
        ],
        "has no documents to train on: label",
    ),
    "no tokenizer": (lambda d: (d / "tokenizer" / "tokenizer.json").unlink(), "tokenizer is incomplete .*: copy"),
    "no settings": (lambda d: settings_of(d).unlink(), "tokenizer is incomplete .*: copy"),
    "damaged settings": (lambda d: settings_of(d).write_text("{"), "tokenizer_config.json is damaged: copy"),
    "other settings": (lambda d: settings_of(d).write_text("[]"), "tokenizer_config.json is damaged: copy"),
    "another tokenizer": (
        lambda d: (d / "tokenizer" / "tokenizer.json").write_text("{}"),
        "tokenizer.json is not the tokenizer of the manifest: copy",
    ),
    "an impossible tokenizer": (lambda d: set_tokenizer(d, dict.clear), "tokenizer.json cannot be read"),
    "no <CALL>": (
        lambda d: edit(d / "manifest.json", lambda m: m["tokenizer"].pop("call_id")),
        "has no <CALL>: label the corpus again",
    ),
    "a <CALL> that is not there": (
        lambda d: edit(d / "manifest.json", lambda m: m["tokenizer"].update(call_id=WORDS)),
        "has no <CALL>: label the corpus again",
    ),
    "no end token": (lambda d: settings_of(d).write_text("{}"), "names no eos_token .*: label with a tokenizer"),
    "an end token that is not there": (
        lambda d: set_tokenizer(d, drop_end),
        r"end token '<\|endoftext\|>' is not in the tokenizer of .*: label with",
    ),
}


@pytest.mark.parametrize(("damage", "message"), REFUSED.values(), ids=REFUSED)
def test_a_dataset_that_cannot_be_learned_from_is_refused(small, damage, message):
    shards.open_labels(str(small), None)
    damage(small)
    with pytest.raises(DatasetError, match=message) as caught:
        shards.open_labels(str(small), None)
    assert "\n" not in str(caught.value) and str(small) in str(caught.value)


@pytest.mark.parametrize("where", ["nope://bucket/d", "s3://bucket/d"])
def test_a_store_that_cannot_be_opened_is_refused(where, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(DatasetError, match=f"^{where}.*(this kind of URL is not supported|s3fs|AWS_ACCESS_KEY_ID)"):
        shards.open_labels(where, None)


def test_which_label_set(small):
    policy = load(small / "labels" / "lacy" / "_policy.json", LabelSet)
    for name in ("about", "zeta"):
        (small / "labels" / name).mkdir()
        save(small / "labels" / name / "_policy.json", policy.model_copy(update={"name": name}))
    assert list(label_sets(small)) == ["about", "lacy", "zeta"]
    assert shards.open_labels(str(small), None).name == "lacy"
    assert shards.open_labels(str(small), "zeta").name == "zeta"
    with pytest.raises(DatasetError, match="has no label set 'x': it has about, lacy, zeta; lacy decide makes others"):
        shards.open_labels(str(small), "x")
    (small / "labels" / "lacy" / "_policy.json").unlink()
    assert shards.open_labels(str(small), None).name == "about"


def test_what_is_opened(small):
    settings_of(small).write_text(json.dumps({"eos_token": {"content": END}, "more": 1}))
    labels = shards.open_labels(str(small), None)
    assert (labels.call_id, labels.eos_id, labels.eos_token, labels.vocab_size) == (CALL_ID, EOS, END, WORDS)
    assert labels.tokens == sum(map(sum, SMALL)) == read_manifest(small).tokens
    assert labels.tokenizer_config["more"] == 1
    assert labels.tokenizer_json == (small / "tokenizer" / "tokenizer.json").read_bytes()


def test_parts_without_a_document_have_no_file(small):
    def append(content: dict[str, Any]) -> None:
        content["parts"].insert(1, content["parts"][0] | {"name": "part-empty", "rows": 0, "tokens": 0})

    edit(small / "manifest.json", append)
    labels = shards.open_labels(str(small), None)
    assert [record.name for record in labels.records] == ["part-00000", "part-00001", "part-00002"]


def replace(root: Path, part: int, column: str | None, change: Callable[..., Any]) -> None:
    """Write a part anew, `change` applied to the flat values of a column or to the table; its record fits again."""
    path = labels_path(root, "lacy", f"part-{part:05d}")
    table = pa.parquet.read_table(path)
    if column is None:
        table = change(table)
    else:
        lists = table[column].combine_chunks()
        values = change(lists.values, lists.offsets)
        if not isinstance(values, pa.ListArray):
            values = pa.ListArray.from_arrays(lists.offsets, values)
        place = table.schema.get_field_index(column)
        field = pa.field(column, values.type, nullable=table.schema.field(column).nullable)
        table = table.set_column(place, field, values)
    content(root, part, to_parquet(table).to_pybytes())


def content(root: Path, part: int, written: bytes) -> None:
    path = labels_path(root, "lacy", f"part-{part:05d}")
    path.write_bytes(written)
    edit(root / "labels" / "lacy" / "_policy.json", lambda p: p["parts"][part].update(sha256=sha256(written)))


def put(value: int) -> Callable[..., pa.Array]:
    return lambda values, _: pa.array([*values.to_pylist()[:-1], value], values.type)


def one_list_longer(values: pa.Array, offsets: pa.Array) -> pa.ListArray:
    moved = offsets.to_pylist()
    moved[1] += 1
    return pa.ListArray.from_arrays(pa.array(moved, pa.int32()), values)


def missing_list(values: pa.Array, offsets: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array([None, *offsets.to_pylist()[1:]], pa.int32()), values)


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "checksum": (
        lambda d: labels_path(d, "lacy", "part-00002").write_bytes(b"PAR1"),
        "part-00002.parquet is not the file that was written",
    ),
    "missing": (lambda d: labels_path(d, "lacy", "part-00002").unlink(), "part-00002.parquet is missing"),
    "no Parquet": (lambda d: content(d, 2, b"what?"), r"part-00002.parquet cannot be read as Parquet \("),
    "cut Parquet": (lambda d: content(d, 2, cut(d)), r"part-00002.parquet cannot be read as Parquet \("),
    "no token_ids": (
        lambda d: replace(d, 2, None, lambda table: table.drop_columns("token_ids")),
        "part-00002.parquet: it has no column token_ids",
    ),
    "no doc_id": (
        lambda d: replace(d, 2, None, lambda table: table.drop_columns("doc_id")),
        "part-00002.parquet: it has no column doc_id",
    ),
    "no label": (
        lambda d: replace(d, 2, None, lambda table: table.drop_columns("label")),
        "part-00002.parquet: it has no column label",
    ),
    "other type": (
        lambda d: replace(d, 2, "token_ids", lambda values, _: values.cast(pa.int64())),
        "part-00002.parquet: its column token_ids is list<.*int64",
    ),
    "id too large": (
        lambda d: replace(d, 2, "token_ids", put(WORDS)),
        f"part-00002.parquet: a token id is not one of the tokenizer's {WORDS}",
    ),
    "negative id": (lambda d: replace(d, 2, "token_ids", put(-1)), "part-00002.parquet: a token id is not one of"),
    "<CALL>": (lambda d: replace(d, 2, "token_ids", put(CALL_ID)), "part-00002.parquet: <CALL> is among"),
    "no such label": (lambda d: replace(d, 2, "label", put(3)), "part-00002.parquet: a label is none of learn, deleg"),
    "uneven": (
        lambda d: replace(d, 2, "label", one_list_longer),
        "part-00002.parquet: lists of label are not as long as those of token_ids",
    ),
    "null list": (lambda d: nullable(d, missing_list), "part-00002.parquet: label has nulls"),
    "null": (lambda d: replace(d, 2, "label", put(None)), "part-00002.parquet: label has nulls"),  # type: ignore[arg-type]
}


def cut(root: Path) -> bytes:
    """A part whose last pages are gone, with a good footer."""
    whole = labels_path(root, "lacy", "part-00002").read_bytes()
    return whole[:4] + bytes(600) + whole[604:]


def nullable(root: Path, change: Callable[..., Any]) -> None:
    def permit(table: pa.Table) -> pa.Table:
        place = table.schema.get_field_index("label")
        return table.cast(table.schema.set(place, table.schema.field("label").with_nullable(True)))

    replace(root, 2, None, permit)
    replace(root, 2, "label", change)


@pytest.mark.parametrize(("damage", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_part_ends_the_stream(small, damage, message):
    damage(small)
    labels = shards.open_labels(str(small), None)
    stream = data.loader(labels, batch=1, context=4, columns=["label"], holdout=0.01, buffer_tokens=1)
    with pytest.raises(DatasetError, match=message) as caught:
        take(stream, 30)
    assert "\n" not in str(caught.value)
    assert "lacy check" in str(caught.value) and "lacy decide --name lacy" in str(caught.value)
    with pytest.raises(DatasetError, match=message):
        next(stream)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_leaves_the_place_behind_the_last_good_batch(tmp_path, workers):
    root = write(tmp_path, [[20] * 6] * 8)
    options: dict[str, Any] = {"batch": 1, "context": 16, "buffer_tokens": 1, "workers": workers, "seed": 2}
    whole = data.loader(shards.open_labels(str(root), None), **options)
    wanted = take(whole, 80)
    whole.close()
    labels = shards.open_labels(str(root), None)
    path = labels_path(root, "lacy", "part-00004")
    good = path.read_bytes()
    path.write_bytes(b"bad")
    stream = data.loader(labels, **options)
    found = []
    with pytest.raises(DatasetError, match=f"^{re.escape(str(path))} is not the file that was written") as caught:
        while True:
            found.append(next(stream))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    assert 0 < len(found) < 60
    state = through_json(stream.state_dict())
    stream.close()
    assert multiprocessing.active_children() == []
    path.write_bytes(good)
    resumed = data.loader(labels, **options)
    resumed.load_state_dict(state)
    assert same(found + take(resumed, 80 - len(found)), wanted)
    resumed.close()


def test_a_killed_worker_ends_the_stream(uneven):
    stream = data.loader(uneven, batch=1, context=16, workers=2)
    next(stream)
    worker, _ = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.raises(DatasetError, match=r"a loader worker was killed, .* use fewer workers or smaller buffers"):
        take(stream, 100)
    stream.close()
    assert multiprocessing.active_children() == []


def read_until_killed(dataset: Path, pids: Any) -> None:
    stream = data.loader(shards.open_labels(str(dataset), None), batch=1, context=16, workers=2)
    next(stream)
    pids.send([worker.pid for worker in multiprocessing.active_children()])
    time.sleep(60)


def test_workers_end_with_a_killed_run(small):
    context = multiprocessing.get_context("forkserver")
    pids, there = context.Pipe()
    run = context.Process(target=read_until_killed, args=(small, there))
    run.start()
    workers = pids.recv()
    assert len(workers) == 2 and all(Path(f"/proc/{pid}").exists() for pid in workers)
    run.kill()
    run.join()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.05)


def test_closing_ends_the_workers(uneven):
    stream = data.loader(uneven, batch=1, context=16, workers=2)
    first = next(stream)
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []
    assert same([next(stream)], [first])
    stream.close()


@pytest.mark.parametrize(("column", "flag"), [("judge", "--judge"), ("ref_nll", "--reference")])
def test_a_signal_that_was_not_measured_is_refused(tmp_path, column, flag):
    root = write(tmp_path, [[1, 1], [4, 2], [9]])
    for part in range(3):
        if column == "judge":
            replace(root, part, None, lambda table: table.drop_columns("judge"))
        else:
            replace(root, part, "ref_nll", lambda values, _: pa.nulls(len(values), pa.float32()))
    labels = shards.open_labels(str(root), None)
    message = f"has no {column}: it was labelled without .*: lacy label with {flag}"
    with pytest.raises(DatasetError, match=message):
        data.loader(labels, batch=1, context=4, columns=[column])
    with pytest.raises(DatasetError, match=message):
        data.held_out(labels, batch=1, context=4, columns=[column], holdout=0.5)
    assert next(data.loader(labels, batch=1, context=4, columns=["label"]))


def test_a_column_that_is_none_is_a_mistake(uneven):
    with pytest.raises(ValueError, match="no such columns: pos"):
        data.loader(uneven, batch=1, context=4, columns=["pos"])


def test_more_loaders_than_documents_are_refused(small):
    labels = shards.open_labels(str(small), None)
    with pytest.raises(DatasetError, match=r"too few documents for 10 loaders \(5 ranks, 2 workers each\): use fewer"):
        data.loader(labels, batch=1, context=4, ranks=5, workers=2)
    for rank in range(8):
        assert math.isfinite(next(data.loader(labels, batch=1, context=4, ranks=8, rank=rank))["ids"].sum())
