"""schemas.files against real servers: one request for what is written, none that is lost, and what a fault leaves."""

import threading

import pytest

from lacy.schemas import files
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import at


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)


@pytest.fixture
def folder(store):
    found = at(store.new())
    store.proxy.requests.clear()
    store.proxy.every(0)
    return found


def in_turn(store, *faults):
    """The next requests meet these faults; returns what is left."""
    left = list(faults)
    store.proxy.fault = lambda method, path: left.pop(0) if left else None
    return left


def test_written_with_one_request(store, folder):
    data = bytes(range(256)) * 400
    files.write_atomic(folder / "a b%", data)
    assert [(request.method, request.fault) for request in store.proxy.requests] in ([("PUT", None)], [("POST", None)])
    assert store.files(str(folder)) == {"a b%": data}


@pytest.mark.slow
def test_a_large_file_is_written_with_one_request(store, folder):
    """Beyond 50 MiB, or twice that, the libraries would write in pieces, which could be left behind."""
    large = bytes(105 << 20)
    files.write_atomic(folder / "large", large)
    assert len(store.proxy.requests) == 1
    assert store.files(str(folder)) == {"large": large} and store.uploads() == []


@pytest.mark.parametrize("fault", ["500", "503", "reset", "lost", "cut"])
@pytest.mark.parametrize("create", [False, True])
def test_a_write_that_fails_is_made_again(store, folder, fault, create):
    left = in_turn(store, fault, None, fault)
    files.write_atomic(folder / "x", b"whole", create=create)
    assert len(left) < 3
    assert store.files(str(folder)) == {"x": b"whole"}


def test_read_with_one_request(store, folder):
    """However large: what is read in pieces can be of two versions of the file."""
    data = bytes(12 << 20)
    store.put(f"{folder}/x", data)
    assert files.read_bytes(folder / "x") == data
    assert [request.method for request in store.proxy.requests] == ["GET"]


def test_one_creates(store, folder):
    failed, path = [], folder / "x"

    def create(number):
        try:
            files.write_atomic(path, b"%d" % number, create=True)
        except FileExistsError:
            failed.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (data,) = store.files(str(folder)).values()
    assert sorted([*failed, int(data)]) == list(range(12))


@pytest.mark.parametrize("fault", ["500", "503", "reset", "cut"])
def test_a_read_that_fails_is_made_again(store, folder, fault):
    data = bytes(range(256)) * 4000
    store.put(f"{folder}/x", data)
    in_turn(store, fault, fault)
    assert files.read_bytes(folder / "x") == data
    with pytest.raises(FileNotFoundError):
        files.read_bytes(folder / "y")


def test_a_thousand_and_more(store, folder):
    """Listings and removals come in pages of a thousand."""
    names = [f"part-{number:05d}.json" for number in range(1100)]
    root = str(folder).split("://")[1]
    store.direct.pipe({f"{root}/{name}": name.encode() for name in names})
    store.direct.pipe({f"{root}/sub/deep": b"", f"{root}other": b""})
    assert files.sizes(folder, "part-*") == {name: len(name) for name in names}
    assert len(store.proxy.requests) <= 3
    assert len(files.sizes(folder)) == 1100 and files.folders(folder) == ["sub"]
    assert files.sizes(folder, "part-0003*") == {name: len(name) for name in names[30:40]}
    in_turn(store, None, "503", None, "cut", None, "reset")
    assert files.read_many([folder / name for name in names[:70]]) == [name.encode() for name in names[:70]]
    in_turn(store, None, "cut", "500", None, "lost")
    files.remove_tree(folder)
    assert files.sizes(folder) == {} and store.files(str(folder)) == {}
    files.remove_tree(folder)
    files.remove(folder / "nothing")


def test_what_lasts_is_one_line(store, folder):
    scheme = store.url.split("://")[0]
    with pytest.raises(DatasetError, match=f"^{scheme}://nowhere/x cannot be written: there is no bucket nowhere"):
        files.write_atomic(at(f"{scheme}://nowhere/x"), b"x")
    assert files.sizes(at(f"{scheme}://nowhere/d")) == {}
    with pytest.raises(FileNotFoundError):
        files.read_bytes(at(f"{scheme}://nowhere/x"))


def test_a_refusal_is_one_line_at_once(store, folder):
    for attempt in (
        lambda: files.read_bytes(folder / "x"),
        lambda: files.write_atomic(folder / "x", b"x"),
        lambda: files.sizes(folder),
        lambda: files.remove(folder / "x"),
    ):
        store.proxy.requests.clear()
        store.proxy.fault = lambda method, path: "403"
        with pytest.raises(DatasetError, match=r"the store refuses access \(.*; (set AWS_PROFILE|run gcloud)") as error:
            attempt()
        assert "\n" not in str(error.value)
        assert len(store.proxy.requests) <= 2


def test_credentials_that_are_missing(s3, monkeypatch, tmp_path):
    s3.proxy.every(0)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    at("s3://x").fs.clear_instance_cache()
    with pytest.raises(DatasetError, match=r"s3://bucket/x: the store refuses access .*; set AWS_PROFILE, or"):
        files.read_bytes(at("s3://bucket/x"))
    at("s3://x").fs.clear_instance_cache()
