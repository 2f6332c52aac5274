"""Passages to check facts against: a corpus in passages, indexed for full-text search.

FActScore (Min et al. 2023, arXiv 2305.14251, section 4 and its public implementation) cuts Wikipedia pages into
passages of up to 256 tokens, and takes the passages nearest to a fact from the page of the text's subject. Here a
passage has 256 words, nearness is BM25 (Robertson and Zaragoza 2009, as Lucene computes it, by `bm25s`), and for a
subject without a page the whole corpus is searched. A word is a run of letters and digits, in lower case, after NFKC;
English stop words do not count. The search is poor for languages that do not separate words.

The index is a folder `index-<digest>`, named by the bytes of the source and the options:

    index.json       a digest of its source and options, and one of each other file; written last
    passages.arrow   id, title and text of each passage
    titles.npy       (D, 3) uint64: digest of a page's title, its first passage, the one after its last
    *.index.npy, *.index.json   bm25s
"""

import io
import json
import os
import re
import shutil
import unicodedata
import uuid
from array import array
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from lacy.schemas.errors import CascadeError
from lacy.schemas.files import TEMPORARY, sha256, sha256_of, write_atomic
from lacy.schemas.manifest import read_complete, signals_path

FORMAT: Final = 1
SUFFIXES: Final = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
MAX_WORD: Final = 32  # characters; a longer run counts as several words, to bound the size of passages
MAX_TITLE: Final = 200  # characters of a first line that can be a title
_BATCH: Final = 512  # documents

Tell = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Passage:
    """`id` is the document's id with the index of the passage in it, from 0: "doc:3"."""

    id: str
    title: str
    text: str


class _Index(BaseModel):
    """index.json"""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: int
    fingerprint: str
    documents: int
    passages: int
    files: dict[str, str]


@dataclass(frozen=True)
class _File:
    path: Path
    sha256: str
    part: bool  # of a dataset


def open_knowledge(
    source: Path, cache: Path, *, words: int = 256, titles: Collection[str] | None = None, tell: Tell | None = None
) -> "Knowledge":
    """The passages of a corpus, from its index below `cache`, which is built if it is missing or damaged.

    source  a dataset of `lacy label`, or a file or a folder of files: .jsonl, .jsonl.gz, .jsonl.zst and .parquet, with
            `text` and optionally `id` and `title`
    words   words of a passage, at most
    titles  titles of the pages to index; default: all. Building takes some 15 KiB of memory and 1 ms per passage, so
            name the subjects if they are few of a whole Wikipedia
    tell    called after each file that is read into a new index

    The title is the record's; else the text's first line, if a blank line follows it, as in Wikipedia corpora; else the
    id. Records without text are skipped. Raises CascadeError if the source cannot be read or has no text, or if bm25s
    is missing; DatasetError if a dataset is unfinished or damaged.
    """
    if words < 1:
        raise ValueError(f"passages need at least one word, not {words}")
    version = _bm25s().__version__
    files = _files(source)
    wanted = None if titles is None else {_normal(title) for title in titles}
    contents = [[file.path.name, file.sha256] for file in files]
    identity = [FORMAT, version, words, MAX_WORD, MAX_TITLE, None if wanted is None else sorted(wanted), contents]
    fingerprint = sha256(json.dumps(identity).encode())
    folder = cache / f"index-{fingerprint[:16]}"
    index = _check(folder, fingerprint)
    if index is None:
        try:
            index = _build(source, files, folder, fingerprint, words, wanted, tell)
        except OSError as error:
            raise CascadeError(f"no index of {source} can be written to {cache}: {error.strerror or error}") from None
    return Knowledge(folder, index)


class Knowledge:
    """An index of P passages, whose files are read during searches; see `open_knowledge`."""

    def __init__(self, folder: Path, index: _Index) -> None:
        bm25s = _bm25s()
        self.documents = index.documents
        self.passages = index.passages
        self._bm25 = bm25s.BM25.load(folder, mmap=True, allow_pickle=False, show_progress=False)
        self._titles = np.load(folder / _TITLES, allow_pickle=False)
        file = pa.ipc.open_file(pa.memory_map(str(folder / _PASSAGES)))
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        self._firsts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def pages(self, title: str) -> list[tuple[int, int]]:
        """The pages with this title, ignoring case and spacing: half-open ranges of passages in [0, P)."""
        digest = _digest(title)
        low, high = (np.searchsorted(self._titles[:, 0], digest, side=side) for side in ("left", "right"))
        ranges = [(int(first), int(last)) for _, first, last in self._titles[low:high]]
        return [span for span in ranges if _normal(self._passage(span[0]).title) == _normal(title)]

    def search(self, queries: list[str], k: int, title: str | None = None) -> list[list[Passage]]:
        """The k passages nearest to each query, nearest first; ties in the order of the corpus.

        With the title of a page, only passages of that page, all if it has fewer than k. Without, or if no page has
        this title, at most k that share a word with the query.
        """
        spans = [] if title is None else self.pages(title)
        rows = np.concatenate([np.arange(*span) for span in spans]) if spans else None
        results = []
        for query in queries:
            ids = [
                self._bm25.vocab_dict[word] for word in dict.fromkeys(_terms(query)) if word in self._bm25.vocab_dict
            ]
            if rows is None:
                best = _best(self._scores(ids), k)
            else:
                scores = np.concatenate([self._scores_within(ids, *span) for span in spans])
                best = rows[np.argsort(-scores, kind="stable")[:k]]
            results.append([self._passage(int(row)) for row in best])
        return results

    def _scores(self, ids: list[int]) -> np.ndarray:
        """(P,) float32"""
        return self._bm25.get_scores_from_ids(ids) if ids else np.zeros(self.passages, np.float32)

    def _scores_within(self, ids: list[int], first: int, last: int) -> np.ndarray:
        """`_scores(ids)[first:last]`; a word's scores are sorted by passage, so those of others are not read."""
        scores = np.zeros(last - first, np.float32)
        matrix = self._bm25.scores
        for column in ids:
            begin, end = matrix["indptr"][column : column + 2]
            low, high = begin + np.searchsorted(matrix["indices"][begin:end], [first, last])
            scores[matrix["indices"][low:high] - first] += matrix["data"][low:high]
        return scores

    def _passage(self, row: int) -> Passage:
        batch = int(np.searchsorted(self._firsts, row, side="right")) - 1
        cells = self._batches[batch].slice(row - int(self._firsts[batch]), 1).to_pylist()[0]
        return Passage(**cells)


def cut(text: str, words: int) -> list[str]:
    """A text in passages of `words` words, the last with the rest, without the white space between passages."""
    spans = [match.span() for match in _RUN.finditer(text)]
    return [text[spans[i][0] : spans[min(i + words, len(spans)) - 1][1]] for i in range(0, len(spans), words)]


_PASSAGES: Final = "passages.arrow"
_TITLES: Final = "titles.npy"
_COLUMNS: Final = pa.schema([(name, pa.large_string()) for name in ("id", "title", "text")])
_RUN = re.compile(rf"\S{{1,{MAX_WORD}}}")
_WORD = re.compile(r"\w+")
_FIRST_LINE = re.compile(rf"\s*(\S[^\n]{{0,{MAX_TITLE - 1}}})\n[^\S\n]*\n")


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError:
        raise CascadeError("searching a knowledge source needs bm25s: pip install 'lacy[eval]'") from None
    return bm25s


def _terms(text: str) -> list[str]:
    stop = _bm25s().stopwords.STOPWORDS_EN
    return [word for word in _WORD.findall(unicodedata.normalize("NFKC", text).lower()) if word not in stop]


def _normal(title: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", title).casefold().replace("_", " ").split())


def _digest(title: str) -> np.uint64:
    digest = blake2b(_normal(title).encode(errors="surrogatepass"), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "big"))


def _best(scores: np.ndarray, k: int) -> np.ndarray:
    matches = np.flatnonzero(scores > 0)
    if len(matches) > k > 0:
        least = -np.partition(-scores[matches], k - 1)[k - 1]
        matches = matches[scores[matches] >= least]
    return matches[np.argsort(-scores[matches], kind="stable")[:k]]


def _files(source: Path) -> list[_File]:
    """The files of a source by name, with their digests: from the manifest for a dataset, else computed."""
    if (source / "manifest.json").is_file():
        parts = [part for part in read_complete(source).parts if part.rows]
        return [_File(signals_path(source, part.name), part.sha256, True) for part in parts]
    paths = [source] if source.is_file() else sorted(path for path in source.rglob("*") if _is_corpus(path))
    if not paths or not _is_corpus(paths[0]):
        raise CascadeError(
            f"{source} is not a knowledge source: use a dataset, or files that end in {', '.join(SUFFIXES)}",
            usage=True,
        )
    try:
        return [_File(path, sha256_of(path), False) for path in paths]
    except OSError as error:
        raise CascadeError(f"{error.filename or source} cannot be read: {error.strerror}", usage=True) from None


def _is_corpus(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()


def _check(folder: Path, fingerprint: str) -> _Index | None:
    """The index in a folder, if it is complete and the requested one."""
    try:
        index = _Index.model_validate_json((folder / "index.json").read_bytes())
        whole = all(sha256_of(folder / name) == digest for name, digest in index.files.items())
    except (OSError, ValidationError):
        return None
    return index if whole and index.fingerprint == fingerprint else None


def _build(
    source: Path,
    files: list[_File],
    folder: Path,
    fingerprint: str,
    words: int,
    wanted: set[str] | None,
    tell: Tell | None,
) -> _Index:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}{TEMPORARY}")
    temporary.mkdir(parents=True)
    try:
        documents, passages = _write(source, files, temporary, words, wanted, tell)
        digests = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        index = _Index(format=FORMAT, fingerprint=fingerprint, documents=documents, passages=passages, files=digests)
        write_atomic(temporary / "index.json", (index.model_dump_json(indent=1) + "\n").encode())
        if _check(folder, fingerprint) is None:  # another process may have built it meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(temporary, folder)
        return index
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(
    source: Path, files: list[_File], folder: Path, words: int, wanted: set[str] | None, tell: Tell | None
) -> tuple[int, int]:
    """Write all files but index.json; returns the number of documents and of passages."""
    vocabulary: dict[str, int] = {}
    ids: list[array[int]] = []
    titles: list[tuple[int, int, int]] = []
    with pa.OSFile(str(folder / _PASSAGES), "wb") as sink, pa.ipc.new_file(sink, _COLUMNS) as writer:
        for number, file in enumerate(files, 1):
            rows: list[dict[str, str]] = []
            for doc_id, title, text in _documents(file):
                if wanted is not None and _normal(title) not in wanted:
                    continue
                first = len(ids)
                for index, passage in enumerate(cut(text, words)):
                    rows.append({"id": f"{doc_id}:{index}", "title": title, "text": passage})
                    terms = _terms(f"{title} {passage}")
                    ids.append(array("i", [vocabulary.setdefault(term, len(vocabulary)) for term in terms]))
                titles.append((int(_digest(title)), first, len(ids)))
                if len(rows) >= _BATCH:
                    writer.write_batch(pa.RecordBatch.from_pylist(rows, _COLUMNS))
                    rows = []
            if rows:
                writer.write_batch(pa.RecordBatch.from_pylist(rows, _COLUMNS))
            if tell is not None:
                tell(number, len(files))
    if not vocabulary:
        subjects = "" if wanted is None else f" on any of the {len(wanted)} subjects"
        raise CascadeError(f"{source} has no text{subjects}: use a corpus that has some")
    bm25 = _bm25s().BM25()
    bm25.index((ids, vocabulary), create_empty_token=False, show_progress=False)
    bm25.save(folder, show_progress=False)
    table = np.array(sorted(titles), np.uint64)
    np.save(folder / _TITLES, table, allow_pickle=False)
    return len(titles), len(ids)


def _documents(file: _File) -> Iterator[tuple[str, str, str]]:
    """(id, title, text) of each record with text. Raises CascadeError for a file that cannot be read."""
    records = _parquet_records(file) if file.path.suffix == ".parquet" else _json_records(file.path)
    try:
        for position, record in records:
            text, doc_id, title = record.get("text"), record.get("id"), record.get("title")
            if text is None or text == "":
                continue
            if not isinstance(text, str):
                raise CascadeError(f"{position}: text is not a string")
            name = str(doc_id) if isinstance(doc_id, str | int) and doc_id != "" else position
            if not isinstance(title, str) or not title.strip():
                line = _FIRST_LINE.match(text)
                title = line[1].strip() if line else name
            if text.isspace():
                continue
            try:
                "".join((name, title, text)).encode()
            except UnicodeEncodeError:
                raise CascadeError(f"{position}: not valid Unicode: a lone surrogate") from None
            yield name, title, text
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise CascadeError(f"{file.path} cannot be read: {' '.join(str(error).split())[:300]}") from None


def _json_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with pa.input_stream(str(path), compression="detect") as stream:
        for number, line in enumerate(io.BufferedReader(stream), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if not isinstance(record, dict):
                raise CascadeError(f"{path}:{number}: the line is not a JSON object")
            yield f"{path.name}:{number}", record


def _parquet_records(file: _File) -> Iterator[tuple[str, dict[str, Any]]]:
    data = None
    if file.part:
        data = file.path.read_bytes()
        if sha256(data) != file.sha256:
            raise CascadeError(f"{file.path} is not the file that was written: find all damage with lacy check")
    with pq.ParquetFile(file.path if data is None else pa.BufferReader(data)) as parquet:
        names = parquet.schema_arrow.names
        if "text" not in names:
            remedy = "it was labelled with --no-text" if file.part else f"it has {', '.join(names)}"
            raise CascadeError(f"{file.path} has no column text: {remedy}")
        key = "doc_id" if "doc_id" in names and "id" not in names else "id"
        row = 0
        for batch in parquet.iter_batches(_BATCH, columns=[name for name in (key, "title", "text") if name in names]):
            for record in batch.to_pylist():
                row += 1
                yield f"{file.path.name}:{row}", {"id": record.get(key)} | record
