"""Find the files of a corpus and cut them into parts. Planning reads file names and sizes only.

A part is a byte range of a file. In JSON Lines and MediaWiki XML it owns the records that begin in the range; in
Parquet, the rows whose share of their row group's bytes begins in it; a text file is one document, so one part.
A compressed stream cannot be read from the middle: `pipeline.corpus.spool` copies it once into uncompressed ranges.
"""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lacy.pipeline.corpus import remote
from lacy.schemas.errors import CorpusError, DatasetError
from lacy.schemas.manifest import CorpusFile

FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt", ".xml": "xml"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2"}
SPOOL = ".spool"  # the folder of a dataset for the ranges of compressed files, while a run goes on
MAX_PART_BYTES, MIN_PART_BYTES = 1 << 20, 1 << 15


@dataclass(frozen=True)
class Range:
    """The unit of work: bytes [start, end) of a file, and the name of the part that they become."""

    name: str
    source: str  # the corpus file, also when `path` is a copy of a piece of it
    path: str
    format: str
    start: int
    end: int
    base: int = 0  # where `path` begins in the (uncompressed) source
    error: str = ""  # why the source could not be read beyond this point
    error_code: str = ""  # its lacy.pipeline.corpus.deadletters.Code
    limit: int | None = None  # documents at most


@dataclass(frozen=True)
class Stream:
    """A compressed file that can only be read from its beginning."""

    index: int
    source: str
    path: str  # from which workers read it
    format: str
    compression: str


def part_name(index: int, position: int) -> str:
    """Names sort by file, then by position."""
    return f"part-{index:05d}-{position:015d}"


def kind_of(path: str) -> tuple[str, str] | None:
    """(format, compression or "") by the file's suffixes; None for a file of another kind."""
    stem, suffix = os.path.splitext(path.lower())
    compression = COMPRESSIONS.get(suffix, "")
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix.startswith(".xml-p"):  # a piece of a large dump: enwiki-latest-pages-articles1.xml-p1p41242.bz2
        suffix = ".xml"
    form = FORMATS.get(suffix)
    if form is None or (compression and form == "parquet"):
        return None
    return form, compression


def find_files(corpus: Iterable[str]) -> list[CorpusFile]:
    """The files behind paths, folders, globs and URLs of any store that fsspec knows, sorted, each once.

    Raises CorpusError when an argument matches nothing, or names a file of an unknown kind.
    """
    files: dict[str, int] = {}
    for argument in corpus:
        matches = dict(_match(argument))
        known = {path: size for path, size in matches.items() if kind_of(path)}
        if not matches:
            raise CorpusError(f"no file matches {argument}")
        if not known:
            kinds = ", ".join(sorted(FORMATS)) + " (also " + ", ".join(sorted(COMPRESSIONS)) + ")"
            raise CorpusError(f"{argument} has no file of a known kind: {kinds}")
        files |= known
    return [CorpusFile(path=path, bytes=size) for path, size in sorted(files.items())]


def default_part_bytes(files: list[CorpusFile]) -> int:
    """Bytes in a part: at most 1 MiB, less for a small corpus so that several workers have parts."""
    total = sum(file.bytes for file in files)
    return min(MAX_PART_BYTES, max(MIN_PART_BYTES, total // 64))


def plan_parts(files: list[CorpusFile], part_bytes: int) -> list[Range | Stream]:
    """Cut files into parts of about `part_bytes`, in order; a compressed file stays whole, as a Stream."""
    planned: list[Range | Stream] = []
    for index, file in enumerate(files):
        kind = kind_of(file.path)
        assert kind is not None, f"find_files lists known kinds only, not {file.path}"
        form, compression = kind
        if compression:
            planned.append(Stream(index, file.path, file.path, form, compression))
        elif form == "txt":
            planned.append(Range(part_name(index, 0), file.path, file.path, form, 0, file.bytes))
        else:
            for start in range(0, max(file.bytes, 1), part_bytes):
                end = min(start + part_bytes, file.bytes)
                planned.append(Range(part_name(index, start), file.path, file.path, form, start, end))
    return planned


def _match(argument: str) -> Iterator[tuple[str, int]]:
    path = Path(argument)
    if "://" in argument:
        try:
            yield from remote.match(argument)
        except DatasetError as error:
            raise CorpusError(str(error)) from None
    elif path.is_dir():
        for child in sorted(path.rglob("*")):
            hidden = any(piece.startswith(".") for piece in child.relative_to(path).parts)
            if child.is_file() and not hidden:
                yield str(child), child.stat().st_size
    elif path.is_file():
        yield str(path), path.stat().st_size
    else:
        for name in sorted(glob.glob(argument, recursive=True)):
            if os.path.isfile(name):
                yield name, os.path.getsize(name)
