"""Models in stores: fetched once to a machine, whole, and again when they change."""

import subprocess
import sys
from pathlib import Path

import pytest

from lacy.labelers import tokenize
from lacy.labelers.llm import model_folders
from lacy.schemas import files
from lacy.schemas.errors import ModelError


@pytest.fixture(autouse=True)
def home(store, monkeypatch, tmp_path):
    monkeypatch.setenv("LACY_HOME", str(tmp_path))
    monkeypatch.setattr(files, "FIRST_PAUSE", 0.01)
    model_folders._fetched.cache_clear()
    store.proxy.every(0)
    store.proxy.requests.clear()
    return tmp_path


@pytest.fixture
def model(store, small_model):
    url = f"{store.new()}/small"
    for path in small_model.iterdir():
        store.put(f"{url}/{path.name}", path.read_bytes())
    store.put(f"{url}/.cache/hidden", b"no part of it")
    return url


def fetched(store):
    return [request for request in store.proxy.requests if "model.safetensors" in request.path and request.bytes > 999]


def test_a_model_is_the_same_from_a_store(store, model, small_model, home):
    store.proxy.every(2, ["cut", "503", "reset"])
    assert model_folders.fingerprint(model) == {
        "name": model,
        "sha256": model_folders.fingerprint(str(small_model))["sha256"],
    }
    folder = Path(model_folders.resolve(model))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in small_model.iterdir()
    }
    assert len(store.proxy.faults()) > 1
    left = [path.name for path in (home / "stored").iterdir() if not path.name.endswith(".lock")]
    assert left == [folder.name], "nothing is left of what was begun"
    assert model_folders.text_config(model).hidden_size == 64
    assert tokenize.load(model).sha256 == tokenize.load(str(small_model)).sha256


def test_processes_of_a_machine_fetch_once(store, model):
    code = "import sys; from lacy.labelers.llm.model_folders import resolve; print(resolve(sys.argv[1]))"
    running = [
        subprocess.Popen([sys.executable, "-c", code, model], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    folders = {process.communicate(timeout=120)[0] for process in running}
    assert len(folders) == 1 and all(process.returncode == 0 for process in running)
    assert len(fetched(store)) == 1


def test_a_model_that_changed_is_fetched_anew(store, model):
    before = model_folders.resolve(model)
    assert model_folders.resolve(model) == before and len(fetched(store)) == 1
    store.put(f"{model}/tokenizer_config.json", b"{}")
    model_folders._fetched.cache_clear()
    after = model_folders.resolve(model)
    assert after != before and (Path(after) / "tokenizer_config.json").read_bytes() == b"{}"


def test_what_is_no_model(store):
    for url in (f"{store.new()}/nothing", f"{store.url.split('://')[0]}://nowhere/model"):
        with pytest.raises(ModelError, match=f"^no model at {url}: this folder is empty"):
            model_folders.resolve(url)
    with pytest.raises(files.DatasetError, match="this kind of URL is not supported"):
        tokenize.load("gopher://host/model")
