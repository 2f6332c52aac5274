"""`lacy check` finds every fault of a dataset and names its file."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lacy.labelers.tokenize import CALL
from lacy.pipeline import batches
from lacy.pipeline.check import check
from lacy.schemas.files import sha256
from lacy.schemas.manifest import at, label_sets, read_complete
from lacy.schemas.parts import to_parquet

RERUN = "rerun the lacy label command that made the dataset"
DECIDE = "rerun lacy decide with the same --policy, --budget and --name"


@dataclass
class Dataset:
    """A copy whose files and records can be changed."""

    folder: Path

    @property
    def parts(self) -> list[str]:
        return [part["name"] for part in self.manifest["parts"]]

    @property
    def manifest(self) -> dict:
        return json.loads((self.folder / "manifest.json").read_text())

    def faults(self, **options) -> list[str]:
        return list(check(self.folder, read_complete(self.folder), label_sets(self.folder), **options))

    def set(self, file: str, *, part: str | None = None, **fields) -> None:
        """Change fields of a record file, or of one of its parts."""
        path = self.folder / file
        told = json.loads(path.read_text())
        target = told if part is None else next(entry for entry in told["parts"] if entry["name"] == part)
        target |= fields
        path.write_text(json.dumps(told))

    def rewrite(self, folder: str, part: str, change) -> None:
        """Change the table of a part and its digest, so that only its content is wrong."""
        path = self.folder / folder / f"{part}.parquet"
        data = to_parquet(change(pq.ParquetFile(path).read())).to_pybytes()
        path.write_bytes(data)
        record = "manifest.json" if folder == "signals" else f"{folder}/_policy.json"
        self.set(record, part=part, sha256=sha256(data), bytes=len(data))


@pytest.fixture
def dataset(tiny, tmp_path) -> Dataset:
    return Dataset(Path(shutil.copytree(tiny, tmp_path / "d")))


def values(name: str, change):
    """Changes the values of a column of lists, which stay as long."""

    def apply(table: pa.Table) -> pa.Table:
        place, column = table.schema.get_field_index(name), table[name].combine_chunks()
        flat = column.values.to_numpy(zero_copy_only=False).copy()
        change(flat)
        made = pa.array(flat, column.type.value_type, from_pandas=True)
        return table.set_column(
            place, table.schema.field(name), pa.ListArray.from_arrays(column.offsets, made, column.type)
        )

    return apply


def put(name: str, place: int, value):
    return values(name, lambda flat: flat.__setitem__(place, value))


def column(name: str, change):
    """Changes a column as Python values."""

    def apply(table: pa.Table) -> pa.Table:
        field = table.schema.field(name)
        return table.set_column(
            table.schema.get_field_index(name), field, pa.array(change(table[name].to_pylist()), field.type)
        )

    return apply


SIGNALS = {
    "lists of unequal length: pos": column("pos", lambda rows: [rows[0][:-1], *rows[1:]]),
    "a doc_id occurs twice": column("doc_id", lambda rows: [rows[0]] * len(rows)),
    "a token id is beyond the vocabulary": put("token_ids", 1, 1 << 20),
    "token offsets do not rise": put("token_starts", 2, 0),
    "pos has a code that lacy.schemas.codes does not know": put("pos", 0, 200),
    "ent_type has a code that lacy.schemas.codes does not know": put("ent_type", 0, 200),
    "ref_nll: the first token of a document has a score": put("ref_nll", 0, 1.0),
    "ref_nll: a score is negative or infinite": put("ref_nll", 1, -1.0),
    "a token ends behind its text": column("text", lambda rows: [rows[0][:-1], *rows[1:]]),
    "columns are not those of the schema": lambda table: table.rename_columns(
        ["other" if name == "source" else name for name in table.schema.names]
    ),
}
LABELS = {
    "token_ids differs from the signals": put("token_ids", 1, 3),
    "ref_nll differs from the signals": put("ref_nll", 1, 3.5),
    "counts of labels differ from _policy.json": values("label", lambda flat: flat.fill(0)),
    "an unknown label code": put("label", 1, 7),
    "the first token of a document is not labelled learn": put("label", 0, 1),
    "lists of unequal length: label": column("label", lambda rows: [rows[0][:-1], *rows[1:]]),
    "columns are not those of the schema": lambda table: table.drop_columns(["factual"]),
}


def test_a_sound_dataset(dataset):
    assert dataset.faults() == [] and dataset.faults(quick=True) == []


@pytest.mark.parametrize("fault", SIGNALS)
def test_signals(dataset, fault):
    part = dataset.parts[-2]
    dataset.rewrite("signals", part, SIGNALS[fault])
    found = [line for line in dataset.faults() if line.startswith("signals/")]
    assert found == [f"signals/{part}.parquet: {fault}"]


@pytest.mark.parametrize("fault", LABELS)
def test_labels(dataset, fault):
    part = dataset.parts[1]
    dataset.rewrite("labels/lacy", part, LABELS[fault])
    assert f"labels/lacy/{part}.parquet: {fault}" in dataset.faults()
    assert all(line.startswith(f"labels/lacy/{part}.parquet: ") for line in dataset.faults())


def test_a_call_among_the_tokens(dataset):
    call = dataset.manifest["tokenizer"]["call_id"]
    dataset.rewrite("signals", dataset.parts[0], put("token_ids", 1, call))
    assert f"signals/{dataset.parts[0]}.parquet: {CALL} stands among the tokens" in dataset.faults()


def test_every_damaged_part_is_reported(dataset, monkeypatch):
    """Whichever parts are looked at together."""
    for part in dataset.parts[:3]:
        dataset.rewrite("signals", part, put("pos", 0, 200))
    wanted = [f"signals/{part}.parquet: {list(SIGNALS)[4]}" for part in dataset.parts[:3]]
    for together in (1, 2, 256):
        monkeypatch.setattr(batches, "PARTS", together)
        assert dataset.faults(workers=2) == wanted


def test_counts(dataset):
    part = dataset.parts[0]
    dataset.set("manifest.json", part=part, rows=9, factual=1, bad=2, deadletter_sha256="0")
    dataset.set("manifest.json", tokens=5)
    faults = dataset.faults()
    total = sum(record["tokens"] for record in dataset.manifest["parts"])
    assert f"manifest.json: tokens is 5, its parts add up to {total:,}" in faults
    assert all(any(line.startswith(f"manifest.json: {name} is") for line in faults) for name in ("documents", "bad"))
    assert any(line.startswith(f"signals/{part}.parquet: ") and "the manifest says 9 and" in line for line in faults)
    missing = f"deadletter/{part}.jsonl: missing, though the part has 2 bad records: {RERUN}"
    assert missing in faults
    assert any(line.startswith("labels/lacy: ") and line.endswith("the signals have 5") for line in faults)
    assert missing in dataset.faults(quick=True)


def test_files(dataset):
    one, other, third = dataset.parts[:3]
    (dataset.folder / f"signals/{one}.parquet").unlink()
    path = dataset.folder / f"labels/lacy/{other}.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    (dataset.folder / "labels/lacy/part-stray.parquet").touch()
    (dataset.folder / "deadletter").mkdir(exist_ok=True)
    (dataset.folder / f"deadletter/{third}.jsonl").write_bytes(b"{}")
    dataset.set("manifest.json", part=third, bad=1, deadletter_sha256="0")
    dataset.set("manifest.json", bad=1)
    lines = {
        "labels/lacy/part-stray.parquet: not in the manifest",
        f"signals/{one}.parquet: missing: {RERUN}",
        f"labels/lacy/{other}.parquet: checksum differs from the manifest: remove it, then {DECIDE}",
        f"deadletter/{third}.jsonl: checksum differs from the manifest: remove it, then {RERUN}",
    }
    assert set(dataset.faults()) == lines
    quick = {line.split(":")[0] for line in dataset.faults(quick=True)}
    assert quick == {line.split(":")[0] for line in lines} - {f"deadletter/{third}.jsonl"}


def test_a_part_that_is_no_parquet(dataset):
    path = dataset.folder / f"signals/{dataset.parts[0]}.parquet"
    path.write_bytes(b"PAR1 or not")
    dataset.set("manifest.json", part=dataset.parts[0], sha256=sha256(path.read_bytes()))
    assert dataset.faults()[0].startswith(f"signals/{path.name}: cannot be read: ")


def test_labels_that_are_missing_and_another_tokenizer(dataset):
    labels = json.loads((dataset.folder / "labels/lacy/_policy.json").read_text())
    dataset.set("labels/lacy/_policy.json", parts=labels["parts"][1:])
    dataset.set("manifest.json", tokenizer=dataset.manifest["tokenizer"] | {"sha256": "0"})
    lines = dataset.faults()
    assert lines[0].startswith("tokenizer/ is not the tokenizer of the manifest")
    assert f"labels/lacy: 1 parts have no labels: {DECIDE}" in lines


def test_a_store(dataset):
    """The same of an object store, where a part is one request."""
    import fsspec

    store, place = fsspec.filesystem("memory"), at("memory://check/d")
    store.put(str(dataset.folder), "/check/d", recursive=True)
    opened: list[str] = []
    real = type(store).cat_file
    type(store).cat_file = lambda self, path, *args, **more: (opened.append(path), real(self, path, *args, **more))[1]
    try:
        assert list(check(place, read_complete(place), label_sets(place))) == []
    finally:
        type(store).cat_file = real
    parts = [path for path in opened if path.endswith(".parquet")]
    assert len(parts) == len(set(parts)) == 2 * len(dataset.parts)


def test_progress(dataset):
    told: list[int] = []
    dataset.faults(on_progress=told.append)
    assert told[-1] == len(dataset.parts) and told == sorted(told)


def test_scores_between_0_and_1(dataset):
    part = dataset.parts[0]

    def judged(table: pa.Table) -> pa.Table:
        tokens = table["token_ids"].combine_chunks()
        scores = pa.array(np.full(len(tokens.values), 2.0), pa.float32())
        return table.append_column("judge", pa.ListArray.from_arrays(tokens.offsets, scores))

    dataset.rewrite("signals", part, judged)
    assert dataset.faults() == [f"signals/{part}.parquet: judge: a score is not between 0 and 1"]
