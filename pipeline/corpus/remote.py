"""Corpus files in object stores, listed with one request for each thousand."""

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
