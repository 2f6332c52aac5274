"""The manifest of a dataset, the records of its parts, and the paths of its files.

    DATASET/
      manifest.json                 written when a run starts, again when it ends
      signals/part-*.parquet        what was measured
      labels/<name>/part-*.parquet  what a policy decided
      labels/<name>/_policy.json    the policy, its threshold, its parts
      README.md                     a dataset card (`schemas.card`)
      deadletter/part-*.jsonl       documents that could not be labelled, and why
      tokenizer/                    the target tokenizer with <CALL>
      .parts/part-*.json            records of finished parts while the run goes on; folded into the manifest at its end

A part exists when its record does, which is written after the file and holds its digest. Folders of parts
hold Parquet files alone, beside names that begin with "_" or ".": pandas, Arrow, Spark and DuckDB skip those.
"""

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError

from lacy.schemas.errors import DatasetError
from lacy.schemas.files import folders, read_bytes, sha256, store_of, write_atomic
from lacy.schemas.parts import SCHEMA_VERSION

RECORDS = ".parts"
DEFAULT_LABELS = "lacy"
POLICY = "_policy.json"
LABEL_SET_NAME = r"[A-Za-z0-9][\w.-]*"
OLD_POLICY = "policy.json"  # its name in older datasets
M = TypeVar("M", bound=BaseModel)


def at(location: str | os.PathLike[str]) -> Path:
    """The path of a dataset: a folder, or a UPath for a URL (s3://, gs://, memory://, any that fsspec knows).

    A UPath is not a subclass of Path, but has its methods for reading. Raises DatasetError for a URL of an unknown
    kind, or one that needs a package that is not installed.
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
    skipped: int = 0  # records that are not documents, like the redirects of a dump
    scored: dict[str, str] = {}  # role -> the engine interface that its scorer used
    judged: dict[str, int] = {}  # counts of the judge's windows and spans
    bytes: int  # of the Parquet file; 0 for a part without rows, which has no file
    sha256: str
    deadletter_sha256: str = ""


class CorpusFile(_Model):
    path: str
    bytes: int


class Manifest(_Model):
    schema_version: int = SCHEMA_VERSION
    state: Literal["running", "complete"]
    corpus: list[CorpusFile]
    options: dict[str, Any]  # all options that affect the bytes of the parts
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
    candidates: int  # tokens that the policy could choose
    delegated: int
    ignored: int
    lowest: float | None = None  # the lowest score chosen; None for a policy without one
    bytes: int
    sha256: str


class LabelSet(_Model):
    """labels/<name>/_policy.json"""

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


def policy_path(dataset: Path, labels: str) -> Path:
    return dataset / "labels" / labels / POLICY


def record_path(dataset: Path, part: str) -> Path:
    return dataset / RECORDS / f"{part}.json"


def save(path: Path, model: BaseModel, *, create: bool = False) -> None:
    """Write a model as `write_atomic` does."""
    write_atomic(path, (model.model_dump_json(indent=1) + "\n").encode(), create=create)


def load(path: Path, model: type[M]) -> M:
    """Read a model. Raises DatasetError for a damaged file, FileNotFoundError when there is none."""
    return parse(path, read_bytes(path), model)


def parse(path: Path, data: bytes, model: type[M]) -> M:
    """Parse the contents of a file. Raises DatasetError when they are damaged."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        raise DatasetError(f"{path} is damaged: {first['msg']} at {'.'.join(map(str, first['loc']))}") from None


def read_manifest(dataset: Path) -> Manifest:
    """Read the manifest. Raises DatasetError when there is none, or when it has another version of the schema."""
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
    except DatasetError as damaged:  # look for its version only now, since that takes memory
        try:
            version = json.loads(data).get("schema_version")
        except (ValueError, AttributeError):
            raise DatasetError(f"{path} is damaged: it is not a JSON object") from None
        if version == SCHEMA_VERSION:
            raise damaged from None
    if version != SCHEMA_VERSION:
        raise DatasetError(
            f"{dataset} has schema version {version}; this lacy reads version {SCHEMA_VERSION}: "
            "use the lacy that wrote it, or label the corpus again"
        )
    return manifest


def read_complete(dataset: Path) -> Manifest:
    """Read the manifest of a finished dataset. Raises DatasetError when its run has not ended."""
    manifest = read_manifest(dataset)
    if manifest.state != "complete":
        raise DatasetError(f"{dataset} is not finished: rerun its lacy label command to resume")
    return manifest


def label_sets(dataset: Path) -> dict[str, LabelSet]:
    """The finished label sets of a dataset, by name."""
    found = {}
    for name in folders(dataset / "labels"):
        with suppress(FileNotFoundError):  # one that is being written
            found[name] = read_label_set(dataset, name)
    return found


def read_label_set(dataset: Path, name: str) -> LabelSet:
    """A finished label set. Raises FileNotFoundError when there is none, DatasetError when its record is damaged."""
    path = policy_path(dataset, name)
    try:
        return load(path, LabelSet)
    except FileNotFoundError:
        return load(path.with_name(OLD_POLICY), LabelSet)


def pick_labels(dataset: object, sets: Collection[str], asked: str | None) -> str | None:
    """The name of the label set to use: `asked`, or DEFAULT_LABELS where there is one, or the first; None without any.

    Raises DatasetError, which names `dataset`, when there is no label set `asked`.
    """
    if asked is None:
        return DEFAULT_LABELS if DEFAULT_LABELS in sets else next(iter(sets), None)
    if asked not in sets:
        others = f"it has {', '.join(sets)}; lacy decide makes others" if sets else "lacy decide makes one"
        raise DatasetError(f"{dataset} has no label set {asked!r}: {others}", usage=True)
    return asked
