"""Copy a compressed stream, once and in order, into uncompressed ranges that workers can read in parallel.

The ranges are files in DATASET/.spool, each removed when its part is finished. A stream that breaks off (truncated,
damaged) still gives the records before the break; the last range then carries the reason.
"""

import bz2
import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path

import zstandard

from lacy.pipeline.corpus.deadletters import MAX_RECORD_BYTES, Code, Fault, fault
from lacy.pipeline.corpus.readers import CHUNK, MARKS, open_file, read_chunks, records
from lacy.pipeline.corpus.sources import SPOOL, Range, Stream, part_name
from lacy.schemas.files import read_bytes, remove, sizes, write_atomic

EXPANSION_BYTES = 8 << 20


def spool(stream: Stream, dataset: Path, part_bytes: int, committed: set[str]) -> list[Range]:
    """Write the ranges of a stream, except those in `committed`, and return all of them in order.

    A list of the ranges is written last, so that a second call reads only that.
    """
    with suppress(FileNotFoundError):
        ranges = _listed(stream, dataset)
        copies = sizes(dataset / SPOOL, f"part-{stream.index:05d}-*").keys()
        if all(part.name in committed or Path(part.path).name in copies for part in ranges):
            return ranges
    ranges = list(cut(stream, dataset, part_bytes, committed))
    write_atomic(_list(stream, dataset), json.dumps([asdict(part) for part in ranges]).encode())
    return ranges


def is_measured(stream: Stream, dataset: Path, finished: Set[str]) -> bool:
    """Whether a stream has been cut, and all its parts are finished."""
    try:
        return all(part.name in finished for part in _listed(stream, dataset))
    except FileNotFoundError:
        return False


def _listed(stream: Stream, dataset: Path) -> list[Range]:
    return [Range(**fields) for fields in json.loads(read_bytes(_list(stream, dataset)))]


def _list(stream: Stream, dataset: Path) -> Path:
    return dataset / SPOOL / f"stream-{stream.index:05d}.json"


def cut(stream: Stream, dataset: Path, part_bytes: int, committed: set[str]) -> Iterator[Range]:
    """The ranges of a stream, each written before it is yielded."""
    breaks: list[Fault] = []
    pieces: list[bytes] = []
    first = size = 0

    def flush(wrong: Fault | None = None) -> Range:
        name, data = part_name(stream.index, first), b"".join(pieces)
        path = dataset / SPOOL / f"{name}.{stream.format}"
        if name not in committed:
            write_atomic(path, data)
        error, code = (wrong.reason, wrong.code.value) if wrong else ("", "")
        return Range(name, stream.source, str(path), stream.format, 0, len(data), first, error, code)

    chunks = _decompress(stream, breaks)
    spans = _whole(chunks) if stream.format == "txt" else records(chunks, b"", MARKS[stream.format][1])
    for position, data in spans:
        if not pieces:
            first, size = position, 0
        if data is None:  # the range's error stands at its end, which is where this record begins
            yield flush(fault(Code.TOO_LONG))
            pieces.clear()
            continue
        if breaks and not data.endswith(MARKS.get(stream.format, (b"", b"\0"))[1]):
            break  # the broken end of a record
        pieces.append(data)
        size += len(data)
        if size >= part_bytes:
            yield flush()
            pieces.clear()
    if not pieces:
        first += size
    if pieces or breaks:
        yield flush(breaks[0] if breaks else None)


def expansion(stream: Stream) -> float:
    """Uncompressed bytes per compressed byte, from the first 8 MiB of a stream; 1.0 where nothing can be read."""
    size = 0
    try:
        with open_file(stream.path) as file:
            for chunk in _OPENERS[stream.compression](file):
                size += len(chunk)
                if size >= EXPANSION_BYTES:
                    break
            read = file.tell()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):
        return 1.0
    return size / read if size and read else 1.0


def discard(dataset: Path, part: Range) -> None:
    """Remove the copy of a finished part."""
    if part.path != part.source:
        remove(dataset / SPOOL / Path(part.path).name)


def _whole(chunks: Iterator[bytes]) -> Iterator[tuple[int, bytes | None]]:
    pieces, size = [], 0
    for chunk in chunks:
        pieces.append(chunk)
        size += len(chunk)
        if size > MAX_RECORD_BYTES:
            yield 0, None
            return
    yield 0, b"".join(pieces)


def _decompress(stream: Stream, breaks: list[Fault]) -> Iterator[bytes]:
    """Uncompressed chunks, up to the first error in the stream, which is appended to `breaks`."""
    try:
        with open_file(stream.path) as file:
            yield from _OPENERS[stream.compression](file)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        breaks.append(fault(Code.BROKEN_STREAM, stream.compression, str(error).splitlines()[0]))


def _buffers(file: gzip.GzipFile | bz2.BZ2File) -> Iterator[bytes]:
    """The output of each decoder step: `read` would lose the bytes before an error."""
    while chunk := file.read1(CHUNK):
        yield chunk


def _unzstd(file: BufferedReader) -> Iterator[bytes]:
    decoder, started = zstandard.ZstdDecompressor().decompressobj(), False
    for chunk in read_chunks(file):
        while chunk:
            started = True
            yield decoder.decompress(chunk)
            chunk = decoder.unused_data if decoder.eof else b""
            if decoder.eof:
                decoder, started = zstandard.ZstdDecompressor().decompressobj(), False
    if started:
        raise EOFError("the last frame is not complete")


_OPENERS: dict[str, Callable[[BufferedReader], Iterator[bytes]]] = {
    "gzip": lambda file: _buffers(gzip.GzipFile(fileobj=file)),
    "bzip2": lambda file: _buffers(bz2.BZ2File(file)),
    "zstd": _unzstd,
}
