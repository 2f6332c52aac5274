"""Files in a folder and in a store: whole or not there, listed at once, and requests that fail are made again."""

import errno
import threading
import uuid

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lacy.schemas import files
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import at


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    return tmp_path / "d" if request.param == "local" else at(f"memory://{uuid.uuid4().hex}/d")


@pytest.fixture
def remote(monkeypatch):
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.001)
    return at(f"memory://{uuid.uuid4().hex}/d")


def failing(monkeypatch, method, errors):
    """The store's method raises these one after the other, then works; returns what is left of them."""
    left, real = list(errors), getattr(MemoryFileSystem, method)

    def call(self, *args, **kwargs):
        if left:
            raise left.pop(0)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, method, call)
    return left


def test_written_and_read(folder):
    path = folder / "deep" / "file"
    for data in (b"one", b"", memoryview(b"two")):
        files.write_atomic(path, data)
        assert files.read_bytes(path) == bytes(data)
    assert files.sha256_of(path) == files.sha256(b"two")
    with pytest.raises(FileNotFoundError):
        files.read_bytes(folder / "nothing")


def test_created_once(folder):
    path = folder / "file"
    files.write_atomic(path, b"one", create=True)
    files.write_atomic(path, b"one", create=True)
    with pytest.raises(FileExistsError):
        files.write_atomic(path, b"two", create=True)
    assert files.read_bytes(path) == b"one"
    assert files.sizes(folder) == {"file": 3}


def test_one_of_many_creates(tmp_path):
    """Of many at once, one writes, and the others are told."""
    path, failed = tmp_path / "file", []

    def create(number):
        try:
            files.write_atomic(path, b"%d" % number, create=True)
        except FileExistsError:
            failed.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failed) == 19
    assert int(files.read_bytes(path)) not in failed


def test_many_at_once(folder):
    names = [f"{number:03d}" for number in range(300)]
    for name in names:
        files.write_atomic(folder / name, name.encode())
    wanted = names[::-1]
    assert files.read_many([folder / name for name in wanted]) == [name.encode() for name in wanted]
    assert files.read_many([]) == [] and files.read_many([folder / "007"]) == [b"007"]
    with pytest.raises(FileNotFoundError):
        files.read_many([folder / "007", folder / "nothing"])


def test_listed(folder):
    assert files.sizes(folder) == {} and files.folders(folder) == []
    for name in ("b.json", "a.parquet", "c.json", "sub/d.json", "sub/deep/e.json", "s u%b/x"):
        files.write_atomic(folder / name, name.encode())
    assert list(files.sizes(folder).items()) == [("a.parquet", 9), ("b.json", 6), ("c.json", 6)]
    assert files.sizes(folder, "*.json") == {"b.json": 6, "c.json": 6}
    assert files.folders(folder) == ["s u%b", "sub"]


def test_removed(folder):
    for name in ("a", "b/c", "b/d/e", "bb"):
        files.write_atomic(folder / name, b"x")
    for _ in range(2):
        files.remove(folder / "a")
        files.remove_tree(folder / "b")
        assert files.sizes(folder) == {"bb": 1} and files.folders(folder) == []
    files.remove_temporary(folder)
    assert files.sizes(folder) == {"bb": 1}


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    files.write_atomic(path, b"old")
    with pytest.raises(OSError, match="full"), files.open_atomic(path) as file:
        file.write(b"ne")
        raise OSError(errno.ENOSPC, "the disk is full")
    assert [child.name for child in tmp_path.iterdir()] == ["file"] and path.read_bytes() == b"old"
    (tmp_path / ".file.0123.tmp").touch()
    files.remove_temporary(tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("method", ["pipe_file", "cat_file", "ls", "rm_file"])
def test_what_fails_is_tried_again(remote, monkeypatch, method):
    path = remote / "file"
    files.write_atomic(path, b"x")
    left = failing(monkeypatch, method, [TimeoutError("slow"), OSError(errno.EIO, "500"), ConnectionResetError()])
    files.write_atomic(path, b"y")
    assert files.read_bytes(path) == b"y"
    assert files.sizes(remote) == {"file": 1}
    files.remove(path)
    assert not left and files.sizes(remote) == {}


def test_many_reads_repeat_those_that_failed(remote, monkeypatch):
    paths = [remote / str(number) for number in range(50)]
    for path in paths:
        files.write_atomic(path, path.name.encode())
    left = failing(monkeypatch, "cat_file", [OSError(errno.EIO, "500") for _ in range(70)])
    assert files.read_many(paths) == [path.name.encode() for path in paths]
    assert not left


def test_a_store_that_goes_on_failing_is_one_line(remote, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    left = failing(monkeypatch, "pipe_file", [OSError(errno.EIO, "500\nInternal Error") for _ in range(10000)])
    with pytest.raises(DatasetError, match=r"^memory://.*/d/x cannot be reached: .*500 Internal Error$"):
        files.write_atomic(remote / "x", b"x")
    assert 0 < len(left) < 9998


def test_a_refusal_is_told_at_once(remote, monkeypatch):
    left = failing(monkeypatch, "cat_file", [PermissionError("Access Denied")] * 2)
    with pytest.raises(DatasetError, match=r"refuses access .*check the credentials"):
        files.read_bytes(remote / "x")
    assert len(left) == 1


def test_an_answer_that_was_lost(remote, monkeypatch):
    """The store has the file, the client does not know."""
    real, lost = MemoryFileSystem.pipe_file, []

    def pipe_file(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if not lost:
            lost.append(True)
            raise ConnectionResetError("cut")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", pipe_file)
    files.write_atomic(remote / "x", b"x", create=True)
    assert lost and files.read_bytes(remote / "x") == b"x"


def test_nothing_is_cached(remote):
    """Another process may have written since."""
    assert files.sizes(remote) == {}
    other = fsspec.filesystem("memory", skip_instance_cache=True)
    other.pipe_file(f"{remote.path}/x", b"x")
    assert files.sizes(remote) == {"x": 1}
