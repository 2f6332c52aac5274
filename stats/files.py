"""The files of a dataset as a read-only file system: all that a connection can reach.

DuckDB opens `dataset://` and a name below the dataset's folder, which is read from the folder or the object store. A
name that the manifest does not list does not exist, and nothing can be written, whatever the SQL is.
"""

import errno
import io
import os
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec import AbstractFileSystem

from lacy.schemas.remote import RemoteFile
from lacy.schemas.views import PREFIX

_UNCHANGED = datetime(2000, 1, 1, tzinfo=UTC)


class DatasetFiles(AbstractFileSystem):
    """`dataset` is a folder or a UPath; `files` the names below it and their bytes (`schemas.views.Views.files`)."""

    protocol = PREFIX.removesuffix("://")
    cachable = False

    def __init__(self, dataset: Path, files: dict[str, int]):
        super().__init__()
        self._files = files
        self._local = isinstance(dataset, Path)
        self._dataset: Any = dataset.resolve() if self._local else dataset
        for folder in {PurePosixPath(name).parent for name in files} if self._local else ():
            if not (self._dataset / folder).resolve().is_relative_to(self._dataset):
                raise PermissionError(f"{self._dataset / folder} is a link out of the dataset, which is not followed")

    def glob(self, path: str, **_: Any) -> list[str]:
        name = path.removeprefix(PREFIX)
        found = [name] if name in self._files else sorted(known for known in self._files if fnmatchcase(known, name))
        return [PREFIX + name for name in found]

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": self._size(path), "type": "file"}

    def exists(self, path: str, **_: Any) -> bool:
        return path.removeprefix(PREFIX) in self._files

    def modified(self, path: str) -> datetime:
        """A constant, since parts are written once: DuckDB may cache what it has read."""
        return _UNCHANGED

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        """Raises PermissionError for a mode that writes, OSError for a file that is missing or not what was written."""
        if mode != "rb":
            raise PermissionError(f"{path} cannot be written: a dataset is only read here")
        size = self._size(path)
        if not self._local:
            return RemoteFile(self._dataset / path.removeprefix(PREFIX), size=size)  # one request for each read
        return io.FileIO(self._open_local(f"{self._dataset}/{path.removeprefix(PREFIX)}", size))

    def _open_local(self, path: str, size: int) -> int:
        """Open a descriptor with few system calls, between which the threads of a query wait for each other."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise PermissionError(f"{path} is a link, and may lead out of the dataset") from None
            raise
        if (there := os.fstat(descriptor).st_size) != size:
            os.close(descriptor)
            raise OSError(
                f"{path} is damaged, it has {there} bytes and not {size}: run lacy check DATASET to list all damage"
            )
        return descriptor

    def _size(self, path: str) -> int:
        try:
            return self._files[path.removeprefix(PREFIX)]
        except KeyError:
            raise FileNotFoundError(f"{path} is not a file of the dataset") from None
