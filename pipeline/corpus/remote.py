"""Corpus files in object stores: listed with one request for each thousand, read with few requests for each part."""

import io
import os
from collections.abc import Iterator
from typing import Any

from lacy.schemas.files import patiently, store_of


def match(url: str) -> Iterator[tuple[str, int]]:
    """The files behind the URL of a file, a folder or a glob, and their bytes; of a folder, none that is hidden.

    Raises DatasetError when the store cannot be reached or refuses.
    """
    store, name = store_of(url)

    def look() -> dict[str, dict[str, Any]]:
        store.invalidate_cache()
        try:
            entry = store.info(name)
        except FileNotFoundError:
            return store.glob(name, detail=True)
        return {name: entry} if entry["type"] == "file" else store.find(name, detail=True)

    for found, entry in patiently(look, url).items():
        hidden = any(piece.startswith(".") for piece in found.removeprefix(name).split("/"))
        if entry["type"] == "file" and not hidden:
            yield store.unstrip_protocol(found), entry["size"]


class RemoteFile(io.RawIOBase):
    """An object of a store, to read and seek in.

    start, end  fetched at once, with the first request; without them the first request asks for the size
    ahead       at least so many bytes are fetched with each other request, and what is there already is read first;
                without it, a read is whole, and one request
    size        of the object, where it is known

    Raises FileNotFoundError where there is none; DatasetError, then and later, when the store goes on failing.
    """

    def __init__(self, url: str, start: int = 0, end: int = 0, *, ahead: int = 0, size: int | None = None):
        self._store, self._name = store_of(url)
        self._url, self._ahead = url, ahead
        self._size = size
        self._place, self._begin, self._window = 0, 0, b""
        if end > start:
            self._fetch(start, end)
        else:
            self._find_size()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place}
        self._place = offset + (self._find_size() if whence == os.SEEK_END else origin[whence])
        return self._place

    def readinto(self, buffer: Any) -> int:
        target, filled = memoryview(buffer).cast("B"), 0
        while filled < len(target) and not (filled and self._ahead):
            offset = self._place - self._begin
            if not 0 <= offset < len(self._window):
                if self._place >= self._find_size():
                    break
                self._fetch(self._place, self._place + max(len(target) - filled, self._ahead))
                offset = 0
            piece = self._window[offset : offset + len(target) - filled]
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
            self._place += len(piece)
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
