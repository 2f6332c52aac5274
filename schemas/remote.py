"""A file in an object store that is read by ranges of bytes."""

import io
import os
from pathlib import Path
from typing import Any

from lacy.schemas.files import located, patiently


class RemoteFile(io.RawIOBase):
    """An object of a store, open for reading and seeking.

    Args:
        url: its URL, or a UPath.
        start, end: the range of bytes that the first request fetches, at once. Without them it asks for the size.
        ahead: the least number of bytes that each later request fetches. A read returns what is left of them first;
            without `ahead` a read is complete, and one request.
        size: bytes of the object, where the caller knows them.

    Raises FileNotFoundError where there is no such object; DatasetError, then and later, when the store keeps failing.
    """

    def __init__(self, url: str | Path, start: int = 0, end: int = 0, *, ahead: int = 0, size: int | None = None):
        self._store, self._name = located(url)
        self._url, self._ahead = url, ahead
        self._size = size
        self._position, self._begin, self._window = 0, 0, b""
        if end > start:
            self._fetch(start, end)
        else:
            self._find_size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}
        self._position = offset + (self._find_size() if whence == os.SEEK_END else origin[whence])
        return self._position

    def readinto(self, buffer: Any) -> int:
        target, filled = memoryview(buffer).cast("B"), 0
        while filled < len(target) and not (filled and self._ahead):
            offset = self._position - self._begin
            if not 0 <= offset < len(self._window):
                if self._position >= self._find_size():
                    break
                self._fetch(self._position, self._position + max(len(target) - filled, self._ahead))
                offset = 0
            piece = self._window[offset : offset + len(target) - filled]
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._position += len(piece)
        return filled

    def _find_size(self) -> int:
        if self._size is None:
            self._size = int(patiently(lambda: self._store.info(self._name), self._url)["size"])
        return self._size

    def _fetch(self, begin: int, end: int) -> None:
        self._window = patiently(lambda: self._store.cat_file(self._name, start=begin, end=end), self._url)
        self._begin = begin
        if len(self._window) < end - begin:
            self._size = begin + len(self._window)
