"""The manifest of a dataset, the records of its parts, and where its files lie.

    DATASET/
      manifest.json                 written when a run starts, again when it ends
      signals/part-*.parquet        what was measured
      labels/<name>/part-*.parquet  what a policy decided
      labels/<name>/policy.json     the policy, its threshold, its parts
      deadletter/part-*.jsonl       documents that could not be labelled, and why
      tokenizer/                    the target tokenizer with <CALL>
      .parts/part-*.json            records of finished parts while the run goes on; folded into the manifest at its end

A part exists when its record does: the record is written after the file, and holds the file's digest.
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from lacy.schemas.errors import DatasetError
from lacy.schemas.files import folders, read_bytes, sha256, store_of, write_atomic
from lacy.schemas.parts import SCHEMA_VERSION

RECORDS = ".parts"
M = TypeVar("M", bound=BaseModel)


def at(location: str | os.PathLike[str]) -> Path:
    """The path of a dataset: a folder, or for a URL (s3://, gs://, memory://, any that fsspec knows) a UPath.

    A UPath is no subclass of Path, but has the methods for reading. Raises DatasetError for a URL of an unknown kind,
    or one that needs a package that is not installed.
    """
    if not isinstance(location, str) or "://" not in location:
        return cast(Path, location) if hasattr(location, "read_bytes") else Path(location)
    from upath import UPath

    store_of(location)
    found = UPath(location)
    return Path(found.path) if found.protocol in ("file", "local") else cast(Path, found)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PartRecord(_Model):
    name: str
    source: str
    rows: int
    tokens: int
    factual: int
    bad: int
    skipped: int = 0  # records that are no documents, like a dump's redirects
    scored: dict[str, str] = {}  # how each scorer asked its engine: role -> path
    judged: dict[str, int] = {}  # the judge's windows and spans, counted
    bytes: int  # of the Parquet file; 0 when the part has no row, and then no file
    sha256: str
    deadletter_sha256: str = ""


class CorpusFile(_Model):
    path: str
    bytes: int


class Manifest(_Model):
    schema_version: int = SCHEMA_VERSION
    state: Literal["running", "complete"]
    corpus: list[CorpusFile]
    options: dict[str, Any]  # all that changes a byte of the parts
    tokenizer: dict[str, Any]
    models: dict[str, Any]
    versions: dict[str, str]
    documents: int = 0
    tokens: int = 0
    factual: int = 0
    bad: int = 0
    skipped: int = 0
    judged: dict[str, int] = {}
    parts: list[PartRecord] = []

    def fingerprint(self) -> str:
        """Digest of everything that decides the bytes of the parts."""
        fields = {"schema_version", "corpus", "options", "tokenizer", "models", "versions"}
        return sha256(json.dumps(self.model_dump(include=fields), sort_keys=True).encode())


class LabelRecord(_Model):
    name: str
    rows: int
    tokens: int
    candidates: int  # tokens that the policy might have chosen
    delegated: int
    ignored: int
    lowest: float | None = None  # the lowest score chosen; None for a policy without one
    bytes: int
    sha256: str


class LabelSet(_Model):
    """labels/<name>/policy.json"""

    name: str
    policy: str
    action: Literal["delegate", "ignore"]
    budget: float | None
    seed: int
    threshold: float | None  # the lowest score chosen
    candidates: int
    tokens: int
    chosen: int
    share: float
    parts: list[LabelRecord]


def signals_path(dataset: Path, part: str) -> Path:
    return dataset / "signals" / f"{part}.parquet"


def labels_path(dataset: Path, labels: str, part: str) -> Path:
    return dataset / "labels" / labels / f"{part}.parquet"


def deadletter_path(dataset: Path, part: str) -> Path:
    return dataset / "deadletter" / f"{part}.jsonl"


def record_path(dataset: Path, part: str) -> Path:
    return dataset / RECORDS / f"{part}.json"


def save(path: Path, model: BaseModel, *, create: bool = False) -> None:
    """Write a model as `write_atomic` does."""
    write_atomic(path, (model.model_dump_json(indent=1) + "\n").encode(), create=create)


def load(path: Path, model: type[M]) -> M:
    """Raises DatasetError for a file that is damaged; FileNotFoundError when there is none."""
    return parse(path, read_bytes(path), model)


def parse(path: Path, data: bytes, model: type[M]) -> M:
    """What a file with these contents says. Raises DatasetError when it is damaged."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise DatasetError(f"{path} is damaged: {first['msg']} at {'.'.join(map(str, first['loc']))}") from None


def read_manifest(dataset: Path) -> Manifest:
    """Raises DatasetError when `dataset` is no dataset, or was written by another version of the schema."""
    path = dataset / "manifest.json"
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DatasetError(
            f"{dataset} is not a dataset: it has no manifest.json (lacy label writes one)", usage=True
        ) from None
    try:
        manifest = parse(path, data, Manifest)
        version: object = manifest.schema_version
    except DatasetError as damaged:  # only now, as it takes memory: what version is it of?
        try:
            version = json.loads(data).get("schema_version")
        except (ValueError, AttributeError):
            raise DatasetError(f"{path} is damaged: it is not a JSON object") from None
        if version == SCHEMA_VERSION:
            raise damaged from None
    if version != SCHEMA_VERSION:
        raise DatasetError(f"{dataset} has schema version {version}; this lacy reads version {SCHEMA_VERSION}")
    return manifest


def read_complete(dataset: Path) -> Manifest:
    """The manifest of a finished dataset. Raises DatasetError when the run that writes it has not ended."""
    manifest = read_manifest(dataset)
    if manifest.state != "complete":
        raise DatasetError(f"{dataset} is not finished: run its lacy label command again to complete it")
    return manifest


def label_sets(dataset: Path) -> dict[str, LabelSet]:
    """The finished label sets of a dataset, by name."""
    found = {}
    for name in folders(dataset / "labels"):
        with suppress(FileNotFoundError):  # one that is being written
            found[name] = load(dataset / "labels" / name / "policy.json", LabelSet)
    return found
