"""Atomic reads and writes of files in a folder or an object store.

A path is a `Path`, or the `UPath` of a URL (`schemas.manifest.at`). In a folder a file is written under a temporary
name and renamed; in a store an object appears with the one request that puts it, and nothing has a temporary name.
Failed requests are retried with growing pauses; a store that keeps failing, or refuses, raises DatasetError.
"""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import fsspec
from fsspec.config import conf

from lacy.schemas.errors import DatasetError

TEMPORARY = ".tmp"
PATIENCE = 60.0  # seconds after which a failing store is given up
FIRST_PAUSE = 0.2  # seconds at most; doubles, and is random so that workers do not retry together
LONGEST_PAUSE: Final = 20.0
CONNECTIONS: Final = 64  # of one process to a store
READERS: Final = 16  # threads that read local files
LOCAL_BATCH: Final = 16  # files that a thread reads at once
CREDENTIALS: Final = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
}

_PACKAGES: Final = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

# botocore's default of ten connections limits reads of many small objects, and its own retries would make each of
# ours take minutes.
_S3 = conf.setdefault("s3", {}).setdefault("config_kwargs", {})
_S3.setdefault("max_pool_connections", CONNECTIONS)
_S3.setdefault("retries", {"mode": "standard", "total_max_attempts": 2})

T = TypeVar("T")


def write_atomic(path: Path, data: bytes | memoryview, *, create: bool = False) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part of either.

    With `create`, raises FileExistsError where a file exists, unless it holds the same bytes, as after a request that
    was repeated because its answer was lost.
    """
    if is_remote(path):
        _put(path, bytes(data), create)
    else:
        with open_atomic(path, create=create) as file:
            file.write(data)


@contextmanager
def open_atomic(path: Path, *, create: bool = False) -> Iterator[BinaryIO]:
    """Open a local file under a temporary name beside `path`; at the end flush it to disk and rename it.

    Raises OSError (full disk, no permission). The temporary file is removed then, and when the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if create:
            _link(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises FileNotFoundError where there is none, DatasetError where it cannot be read."""
    if not is_remote(path):
        try:
            return path.read_bytes()
        except NotADirectoryError:
            raise FileNotFoundError(f"{path.parent} is not a folder") from None
        except PermissionError as error:
            raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    store, name = located(path)
    once = {"max_concurrency": 1} if _kind(store) == "s3" else {}  # pieces could come from two versions of the file
    return patiently(lambda: store.cat_file(name, **once), path)


def read_many(paths: Sequence[Path]) -> list[bytes]:
    """Read files, many at a time, in the given order. Raises FileNotFoundError where one is missing."""
    if not paths:
        return []
    if is_remote(paths[0]):
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            return list(pool.map(read_bytes, paths))
    batches = [paths[start : start + LOCAL_BATCH] for start in range(0, len(paths), LOCAL_BATCH)]
    with ThreadPoolExecutor(READERS) as pool:
        return [
            data for batch in pool.map(lambda batch: [read_bytes(path) for path in batch], batches) for data in batch
        ]


def sizes(folder: Path, pattern: str = "*") -> dict[str, int]:
    """List the files in a folder: bytes by name, sorted. Empty where there is no such folder.

    A store is only asked for names that begin like the pattern up to its first special character.
    """
    return {name: size for name, size, _ in _files(folder, pattern)}


def modified(folder: Path, pattern: str = "*") -> dict[str, float]:
    """Times at which the files in a folder were written, in seconds since 1970, by name as in `sizes`."""
    return {name: time for name, _, time in _files(folder, pattern)}


def folders(folder: Path) -> list[str]:
    """The names of the folders in a folder, sorted. Empty where there is no such folder."""
    if not is_remote(folder):
        with suppress(FileNotFoundError), os.scandir(folder) as children:
            return sorted(child.name for child in children if child.is_dir())
        return []
    store, name = located(folder)
    entries = patiently(lambda: listing(store, name, store.ls), folder)
    return sorted(entry["name"] for entry in entries if entry["type"] == "directory")


def remove(path: Path) -> None:
    """Remove a file, if there is one."""
    if not is_remote(path):
        path.unlink(missing_ok=True)
        return
    store, name = located(path)
    with suppress(FileNotFoundError):
        patiently(lambda: store.rm_file(name), path)


def remove_tree(folder: Path) -> None:
    """Remove a folder and its contents, if there is one."""
    if not is_remote(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    store, name = located(folder)

    def remove_all() -> None:
        if left := listing(store, name, store.find):
            with suppress(FileNotFoundError):  # another process removes the same
                store.rm([f"{name}/{entry['name']}" for entry in left])
        if left and listing(store, name, store.find):
            raise OSError(f"{len(left)} objects could not be removed")

    patiently(remove_all, folder)


def remove_temporary(folder: Path) -> None:
    """Remove temporary files of interrupted writes anywhere below `folder`; a store has none."""
    if not is_remote(folder):
        for path in folder.rglob(f".*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store."""
    return hasattr(path, "fs")


def store_of(url: str) -> tuple[Any, str]:
    """The store behind a URL, and the name of the object in it.

    Raises DatasetError for a URL of an unknown kind, or one that needs a package that is not installed.
    """
    scheme = url.split("://")[0]
    try:
        store = fsspec.filesystem(scheme)
    except ImportError:
        raise DatasetError(f"{url} needs a package: pip install {_PACKAGES.get(scheme, scheme)}", usage=True) from None
    except ValueError:
        raise DatasetError(
            f"{url}: this kind of URL is not supported: use s3://, gs:// or a folder", usage=True
        ) from None
    return store, store._strip_protocol(url)


def located(path: str | Path) -> tuple[Any, str]:
    """The store that a URL or a UPath leads to, and the name of the object there. Raises as `store_of`."""
    return store_of(path) if isinstance(path, str) else (path.fs, path.path)  # type: ignore[attr-defined]


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def sha256_of(path: Path) -> str:
    """Digest of a file; a local one is read in pieces. Raises OSError."""
    if is_remote(path):
        return sha256(read_bytes(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def patiently(request: Callable[[], T], what: object) -> T:
    """Make a request to a store, and retry it while it fails in a way that may pass.

    Raises FileNotFoundError and FileExistsError unchanged; DatasetError, which names `what`, for anything else.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    retrying = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_delay(PATIENCE),
        wait=wait_random_exponential(FIRST_PAUSE, LONGEST_PAUSE),
        reraise=True,
    )
    try:
        return retrying(request)
    except (FileNotFoundError, FileExistsError, DatasetError):
        raise
    except Exception as error:  # every store has exceptions of its own
        raise DatasetError(_advice(error, str(what))) from error


def listing(store: Any, name: str, lister: Callable[..., Any]) -> list[dict[str, Any]]:
    """List the entries below `name` by `lister` (the store's `ls` or `find`), with names relative to it.

    Nothing is cached, since others write to the same store. Empty where there is nothing.
    """
    store.invalidate_cache(name)
    try:
        entries = lister(name, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []
    finally:
        store.invalidate_cache(name)
    prefix = name.rstrip("/") + "/"
    return [
        entry | {"name": entry["name"].rstrip("/").removeprefix(prefix)}
        for entry in (entries.values() if isinstance(entries, dict) else entries)
        if entry["name"].startswith(prefix) and entry["name"] != prefix
    ]


def _files(folder: Path, pattern: str) -> list[tuple[str, int, float]]:
    """Name, bytes and time of each file in a folder, sorted."""
    found: list[tuple[str, int, float]] = []
    if is_remote(folder):
        store, name = located(folder)
        prefix = re.split(r"[*?[]", pattern)[0] if _kind(store) in CREDENTIALS else ""
        flat = partial(store.find, prefix=prefix) if prefix else store.ls  # there is no folder in these folders
        entries = patiently(lambda: listing(store, name, flat), folder)
        found = [(entry["name"], entry["size"], _time(entry)) for entry in entries if entry["type"] == "file"]
    else:
        with suppress(FileNotFoundError), os.scandir(folder) as children:
            for child in children:
                with suppress(FileNotFoundError):  # a temporary file that is renamed now
                    if child.is_file():
                        stat = child.stat()
                        found.append((child.name, stat.st_size, stat.st_mtime))
    return sorted(entry for entry in found if fnmatchcase(entry[0], pattern))


def _time(entry: dict[str, Any]) -> float:
    """Time at which an object was written, under the name that the store's library has for it."""
    names = ("LastModified", "last_modified", "mtime", "updated", "created")
    value = next((entry[name] for name in names if name in entry), 0.0)
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        if path.read_bytes() != temporary.read_bytes():
            raise


def _put(path: Path, data: bytes, create: bool) -> None:
    store, name = located(path)
    mode = "create" if create else "overwrite"
    try:
        # With a chunk larger than the data, the stores' libraries make one request.
        patiently(lambda: store.pipe_file(name, data, mode=mode, **_whole(store, data)), path)
    except FileExistsError:
        if read_bytes(path) != data:
            raise
    except FileNotFoundError:
        raise DatasetError(
            f"{path} cannot be written: there is no bucket {name.split('/')[0]}; make it first"
        ) from None


def _whole(store: Any, data: bytes) -> dict[str, int]:
    return {"chunksize": len(data) + 1} if _kind(store) in CREDENTIALS else {}


def _kind(store: Any) -> str:
    protocols = (store.protocol,) if isinstance(store.protocol, str) else store.protocol
    return next((kind for kind in CREDENTIALS if kind in protocols), protocols[0])


_LASTING: Final = (
    DatasetError, FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError,
    ImportError, TypeError, ValueError,
)  # fmt: skip
_REFUSED: Final = ("forbidden", "access denied", "accessdenied", "anonymous caller", "invalid credentials")


def _is_transient(error: BaseException) -> bool:
    code = getattr(error, "code", None)
    mistaken = isinstance(code, int) and 400 <= code < 500 and code not in (408, 429)  # timeout, too many requests
    lasting = mistaken or isinstance(error, _LASTING) or _is_refusal(error)
    return isinstance(error, Exception) and not lasting


def _is_refusal(error: BaseException) -> bool:
    """Credentials that are missing or do not suffice. The libraries have no class for it in common."""
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return True
    return getattr(error, "code", None) in (401, 403) or any(word in str(error).lower() for word in _REFUSED)


def _advice(error: Exception, what: str) -> str:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if _is_refusal(error):
        kind = {"gcs": "gs", "s3a": "s3"}.get(scheme := what.split("://")[0], scheme)
        return f"{what}: the store refuses access ({reason}); {CREDENTIALS.get(kind, 'check the credentials')}"
    return f"{what} cannot be reached: {reason}"
