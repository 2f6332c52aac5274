"""Read the documents in a byte range of a corpus file. A record that is no document becomes a dead letter.

Text is passed on unchanged: nothing is stripped, normalised or re-encoded. JSON Lines and Parquet use Dolma's field
names (`id`, `text`); a record without an id gets its location in the corpus as its id.
"""

import io
import json
from bz2 import BZ2File
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lacy.pipeline.corpus.deadletters import MAX_RECORD_BYTES, Code, DeadLetter, Fault, dead_letter, fault, location
from lacy.pipeline.corpus.sources import Range
from lacy.pipeline.corpus.wikitext import articles as wikitext
from lacy.schemas.errors import DatasetError
from lacy.schemas.remote import RemoteFile

CHUNK = 1 << 20
TAIL = 1 << 16  # bytes fetched from a store beyond a range, where its last record ends
STREAM = 8 << 20  # bytes fetched at a time from a store when a file is read from its beginning


@dataclass
class Documents:
    ids: list[str] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    bad: list[DeadLetter] = field(default_factory=list)
    skipped: int = 0  # records that are no documents by design, such as a dump's redirects


def read(part: Range) -> Documents:
    """The documents that begin in a range. A file that cannot be read gives one dead letter, in its first part.

    Raises DatasetError when a store cannot be reached, CopyGoneError when the copy of a stream is gone.
    """
    documents = Documents()
    try:
        records = _READERS[part.format](part) if part.end > part.start or not part.error else iter(())
        for position, doc_id, value in records:
            if len(documents.ids) == part.limit:
                return documents
            _add(documents, part.source, position, doc_id, value)
    except DatasetError:  # a store that cannot be reached says nothing about the file
        raise
    except Exception as error:
        whole = isinstance(error, _FileError)
        if not whole or part.start == 0:
            lines = str(error).strip().splitlines() or [""]
            unreadable = fault(Code.UNREADABLE, f"{type(error.__cause__ or error).__name__}: {lines[0]}")
            documents.bad.append(dead_letter(part.source, 0 if whole else part.base + part.start, unreadable))
    if part.error:
        broken = Fault(Code(part.error_code), part.error)
        documents.bad.append(dead_letter(part.source, part.base + part.end, broken))
    return documents


class CopyGoneError(DatasetError):
    """The copy of a piece of a stream is gone: another run that writes the same dataset has finished its part."""


class _FileError(Exception):
    """Nothing of the file can be read, whatever the range."""


class _Skip:
    """Stands for a record that is no document by design."""


_Record = tuple[int, Any, Any]  # position; id (None: make one); text, a Fault or _Skip


def _add(documents: Documents, source: str, position: int, doc_id: Any, value: Any) -> None:
    if value is _Skip:
        documents.skipped += 1
        return
    name = str(doc_id) if isinstance(doc_id, str | int) and not isinstance(doc_id, bool) and doc_id != "" else ""
    wrong: Fault | None = None
    if isinstance(value, Fault):
        wrong = value
    elif not isinstance(value, str):
        wrong = fault(Code.NO_TEXT) if value is None else fault(Code.TEXT_OF_ANOTHER_TYPE, _json_type(value))
    elif not value.strip():
        wrong = fault(Code.EMPTY)
    elif doc_id is not None and not name:
        wrong = fault(Code.BAD_ID, "empty" if doc_id == "" else f"{_json_type(doc_id)}, not a string")
    else:
        try:
            value.encode()
            name.encode()
        except UnicodeEncodeError:
            wrong = fault(Code.NOT_UTF8, "Unicode: a lone surrogate")
            name = name.encode(errors="replace").decode()
    if wrong is not None:
        documents.bad.append(dead_letter(source, position, wrong, name))
        return
    documents.ids.append(name or location(source, position))
    documents.sources.append(location(source, position))
    documents.texts.append(value)


def _json_type(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "an array", dict: "an object"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def open_file(path: str) -> io.BufferedReader:
    """Open a corpus file, compressed or not, to read its bytes from the beginning. Raises OSError."""
    if "://" not in path:
        return open(path, "rb")
    return io.BufferedReader(RemoteFile(path, ahead=STREAM), CHUNK)


def _open_range(part: Range) -> io.BufferedReader:
    """Open a corpus file to read a range of it: one request to a store, unless the last record is long."""
    try:
        if "://" not in part.path:
            return open(part.path, "rb")
        start = max(0, part.start - 1)
        end = part.end + TAIL if part.end > start else 0
        return io.BufferedReader(RemoteFile(part.path, start, end, ahead=CHUNK), CHUNK)
    except FileNotFoundError:
        if part.path != part.source:
            raise CopyGoneError(f"{part.path} is gone: rerun the same command to resume") from None
        raise


def records(chunks: Iterator[bytes], start_mark: bytes, end_mark: bytes) -> Iterator[tuple[int, bytes | None]]:
    """Cut a stream at record ends: (offset of the record's first byte, its bytes).

    A record goes from `start_mark` (empty: the end of the last record) through `end_mark`; bytes between records are
    skipped. One over MAX_RECORD_BYTES comes as None. The last may lack its end mark.
    """
    buffer, offset, searched, lost = b"", 0, 0, -1
    for chunk in chunks:
        buffer += chunk
        begin = 0
        while (end := buffer.find(end_mark, max(begin, searched))) >= 0:
            end += len(end_mark)
            first = buffer.find(start_mark, begin, end) if start_mark else begin
            if lost >= 0:
                yield lost, None
                lost = -1
            elif first >= 0:
                yield offset + first, buffer[first:end]
            begin, searched = end, 0
        buffer, offset = buffer[begin:], offset + begin
        if len(buffer) > MAX_RECORD_BYTES:
            lost = lost if lost >= 0 else offset
            keep = len(end_mark)
            offset += len(buffer) - keep
            buffer = buffer[-keep:]
        searched = max(0, len(buffer) - len(end_mark))
    if lost >= 0:
        yield lost, None
    elif buffer.strip():
        first = buffer.find(start_mark) if start_mark else 0
        if first >= 0:
            yield offset + first, buffer[first:]


MARKS = {"jsonl": (b"", b"\n"), "xml": (b"<page>", b"</page>")}


def read_chunks(file: io.BufferedReader | BZ2File) -> Iterator[bytes]:
    """Chunks of a file. Bytes that are buffered already come first, so a store is asked for no more than is used."""
    while chunk := file.read1(CHUNK):
        yield chunk


def _records_in(part: Range) -> Iterator[tuple[int, bytes | None]]:
    """Records whose first byte lies in the range; the last is read to its end, beyond the range if need be."""
    start_mark, end_mark = MARKS[part.format]
    try:
        file = _open_range(part)
    except OSError as error:
        raise _FileError(error.strerror or str(error)) from error
    with file:
        begin = part.start
        if begin > 0 and not start_mark:
            # The line around `begin` belongs to the part before, unless it begins right here.
            file.seek(begin - 1)
            rest = file.readline(part.end - begin + 1)
            if not rest.endswith(end_mark):
                return
            begin += len(rest) - 1
        file.seek(begin)
        for offset, data in records(read_chunks(file), start_mark, end_mark):
            if begin + offset >= part.end:
                return
            yield part.base + begin + offset, data


def _read_jsonl(part: Range) -> Iterator[_Record]:
    for position, line in _records_in(part):
        if line is None:
            yield position, None, fault(Code.TOO_LONG)
        elif line.strip():
            yield position, *_parse_line(line)


def _parse_line(line: bytes) -> tuple[Any, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return None, fault(Code.NOT_UTF8, f"UTF-8 at byte {error.start} of the line")
    except RecursionError:
        return None, fault(Code.NOT_JSON, "nested too deep")
    except ValueError as error:
        return None, fault(Code.NOT_JSON, error)
    if not isinstance(record, dict):
        return None, fault(Code.NOT_AN_OBJECT, _json_type(record))
    return record.get("id"), record.get("text")


def _read_xml(part: Range) -> Iterator[_Record]:
    for position, xml in _records_in(part):
        if xml is None:
            yield position, None, fault(Code.TOO_LONG)
            continue
        try:
            page = wikitext.parse_page(xml)
            record: _Record = (
                (position, None, _Skip) if page is None else (position, page.id, wikitext.clean(page.title, page.text))
            )
        except ValueError as error:
            code = Code.NOT_UTF8 if isinstance(error.__cause__, UnicodeDecodeError) else Code.BAD_PAGE
            record = position, None, Fault(code, str(error))
        yield record


def _read_txt(part: Range) -> Iterator[_Record]:
    try:
        with _open_range(part) as file:
            data = file.read(MAX_RECORD_BYTES + 1)
    except OSError as error:
        raise _FileError(error.strerror or str(error)) from error
    if len(data) > MAX_RECORD_BYTES:
        yield part.base, None, fault(Code.TOO_LONG)
        return
    try:
        yield part.base, None, data.decode()
    except UnicodeDecodeError as error:
        yield part.base, None, fault(Code.NOT_UTF8, f"UTF-8 at byte {error.start}")


def _read_parquet(part: Range) -> Iterator[_Record]:
    """Rows whose share of their row group's bytes begins in the range. `position` is the row's number in the file."""
    try:
        file = pq.ParquetFile(RemoteFile(part.path) if "://" in part.path else part.path)
        names = set(file.schema_arrow.names)
    except (OSError, pa.ArrowException) as error:
        raise _FileError(str(error).splitlines()[0]) from error
    if "text" not in names:
        raise _FileError(f"no column text (columns: {', '.join(sorted(names))})")
    columns = ["text"] + (["id"] if "id" in names else [])
    row = 0
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(index) for index in range(group.num_columns)]
        begin = min(chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks)
        size = sum(chunk.total_compressed_size for chunk in chunks)
        count = group.num_rows
        # Row i begins at byte begin + i * size / count: the first in the range is the first not before its start.
        low, high = (min(count, max(0, -(-(edge - begin) * count // max(size, 1)))) for edge in (part.start, part.end))
        if low < high:
            table = file.read_row_group(number, columns=columns).slice(low, high - low)
            ids = table.column("id").to_pylist() if "id" in names else [None] * table.num_rows
            for index, doc_id in enumerate(ids):
                yield row + low + index, doc_id, _parquet_text(table, index)
        row += count


def _parquet_text(table: pa.Table, index: int) -> Any:
    try:
        return table.column("text")[index].as_py()
    except UnicodeDecodeError as error:
        return fault(Code.NOT_UTF8, f"UTF-8 at byte {error.start} of the text")


_READERS = {"jsonl": _read_jsonl, "xml": _read_xml, "txt": _read_txt, "parquet": _read_parquet}
