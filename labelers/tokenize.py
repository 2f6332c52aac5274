"""Token ids with exact character offsets, from any Hugging Face fast tokenizer.

Offsets are half open and count the characters of a Python string. A byte-level tokenizer may split a character into
several tokens, which then all have the offsets of the whole character. No token is trimmed: the space in front of a
word belongs to the token that holds it, so the tokens of a document cover its text without gaps.

Special tokens are never parsed from the text: a `<CALL>` in the corpus is six ordinary characters.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from tokenizers import AddedToken, Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from lacy.labelers.llm.model_folders import is_hub_name, resolve
from lacy.schemas.errors import DatasetError, ModelError, TokenizerError
from lacy.schemas.files import read_bytes, sha256, write_atomic
from lacy.schemas.manifest import at

CALL = "<CALL>"
END = "<|endoftext|>"


@dataclass(frozen=True)
class TargetTokenizer:
    name: str
    json: str  # the tokenizer as tokenizer.json holds it, with <CALL>
    vocab_size: int
    call_id: int
    bos_id: int | None  # which the tokenizer itself puts in front of a text
    eos_token: str | None

    @property
    def sha256(self) -> str:
        return sha256(self.json.encode())


@dataclass(frozen=True)
class Tokens:
    """The tokens of D documents, one after the other.

    `offsets` (D + 1,) int64: document d has the tokens [offsets[d], offsets[d + 1]).
    `ids`, `starts`, `ends` (T,) int32: vocabulary ids, and half-open character offsets into the document's text.
    """

    offsets: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def document(self) -> np.ndarray:
        """(T,) int64: the document of each token."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    @property
    def position(self) -> np.ndarray:
        """(T,) int64: the index of each token in its document, from 0."""
        return np.arange(len(self.ids)) - np.repeat(self.offsets[:-1], np.diff(self.offsets))

    def lists(self, values: np.ndarray | pa.Array) -> pa.ListArray:
        """(T,) values as one Arrow list for each document."""
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(values))


def load(name: str, *, trust_remote_code: bool = False) -> TargetTokenizer:
    """Load the tokenizer of a folder, a URL or a model's name, and add `<CALL>` as a special token if it has none.

    Raises TokenizerError if there is no fast tokenizer, and ModelError as `lacy.labelers.llm.model_folders.resolve`.
    """
    backend, eos_token = _backend(name, trust_remote_code)
    bos_id = _bos(backend)
    return describe(name, backend, bos_id, eos_token)


def describe(name: str, backend: Tokenizer, bos_id: int | None, eos_token: str | None) -> TargetTokenizer:
    """A library tokenizer as a target; `<CALL>` is added as a special token if it has none."""
    if backend.token_to_id(CALL) is None:
        backend.add_special_tokens([AddedToken(CALL, special=True, normalized=False)])
    call_id = backend.token_to_id(CALL)
    assert call_id is not None, "just added"
    return TargetTokenizer(
        name=name,
        json=backend.to_str(),
        vocab_size=backend.get_vocab_size(with_added_tokens=True),
        call_id=call_id,
        bos_id=bos_id,
        eos_token=eos_token,
    )


def save(tokenizer: TargetTokenizer, folder: Path) -> None:
    """Write a folder that `transformers.AutoTokenizer` and `load` open."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": [CALL]}
    if tokenizer.eos_token:
        config["eos_token"] = tokenizer.eos_token
    write_atomic(folder / "tokenizer.json", tokenizer.json.encode())
    write_atomic(folder / "tokenizer_config.json", (json.dumps(config, indent=1) + "\n").encode())


def encode(tokenizer: TargetTokenizer, texts: list[str]) -> Tokens:
    """Tokenize documents. Raises TokenizerError for a text that is not valid Unicode (a lone surrogate)."""
    reader = _reader(tokenizer.json)
    try:
        encodings = reader.tokenizer.encode_batch(texts, add_special_tokens=False)
    except (UnicodeEncodeError, TypeError) as error:
        raise TokenizerError(f"text is not valid Unicode: {error}") from None
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    spans = []
    for text, token_ids, encoding in zip(texts, ids, encodings, strict=True):
        span = None if reader.byte_lengths is None else _byte_offsets(text, reader.byte_lengths[token_ids])
        # Where the tokens' bytes are not those of the text (a normalizer, an added token), the library knows offsets.
        spans.append(np.array(encoding.offsets, np.int32).reshape(-1, 2) if span is None else span)
    flat = np.concatenate(spans) if spans else np.zeros((0, 2), np.int32)
    return Tokens(
        offsets=np.concatenate([[0], np.cumsum([len(token_ids) for token_ids in ids])]).astype(np.int64),
        ids=np.concatenate(ids) if ids else np.zeros(0, np.int32),
        starts=np.ascontiguousarray(flat[:, 0]),
        ends=np.ascontiguousarray(flat[:, 1]),
    )


@dataclass(frozen=True)
class _Reader:
    tokenizer: Tokenizer
    byte_lengths: np.ndarray | None  # (V,) int64, for byte-level vocabularies; a negative length marks "unknown"


@lru_cache(maxsize=4)
def _reader(tokenizer_json: str) -> _Reader:
    spec = json.loads(tokenizer_json)
    spec["post_processor"] = None  # a byte-level post-processor would trim spaces off the offsets
    spec["truncation"] = spec["padding"] = None
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    tokenizer.encode_special_tokens = True
    if not _is_byte_level(spec):
        return _Reader(tokenizer, None)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    lengths = np.full(max(vocabulary.values()) + 1, -(1 << 40), np.int64)
    alphabet = set(ByteLevel.alphabet())
    added = {token["content"] for token in spec["added_tokens"]}
    for token, index in vocabulary.items():
        if token in added:
            lengths[index] = len(token.encode())
        elif alphabet.issuperset(token):  # one character of this alphabet is one byte
            lengths[index] = len(token)
    return _Reader(tokenizer, lengths)


def _byte_offsets(text: str, lengths: np.ndarray) -> np.ndarray | None:
    """(T, 2) int32 character offsets of tokens with these byte lengths; None if they do not add up to the text."""
    data = np.frombuffer(text.encode(), np.uint8)
    ends = np.cumsum(lengths)
    if len(lengths) == 0 or ends[-1] != len(data) or lengths.min() < 0:
        return None if len(data) else np.zeros((0, 2), np.int32)
    character = np.cumsum((data & 0xC0) != 0x80) - 1  # of each byte
    return np.stack([character[ends - lengths], character[ends - 1] + 1], 1).astype(np.int32)


def _is_byte_level(spec: dict) -> bool:
    def steps(node: dict | None) -> list[dict]:
        if not node:
            return []
        inner = node.get("pretokenizers") or node.get("normalizers") or []
        return [step for child in inner for step in steps(child)] if node["type"] == "Sequence" else [node]

    before = steps(spec.get("pre_tokenizer"))
    return (
        spec["model"]["type"] == "BPE"
        and not spec.get("normalizer")
        and any(step["type"] == "ByteLevel" for step in before)
        and not any(step.get("add_prefix_space") for step in before)
    )


def _bos(backend: Tokenizer) -> int | None:
    plain, full = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    return full[0] if len(full) > len(plain) and full[0] != plain[0] else None


def _backend(name: str, trust_remote_code: bool) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the name of its end token; `transformers` is needed only without a tokenizer.json."""
    folder = at(name if "://" in name else resolve(name))
    try:
        content = None if is_hub_name(name) else _content(folder / "tokenizer.json")
        if content is not None:
            backend = Tokenizer.from_str(content)
            settings = _content(folder / "tokenizer_config.json")
            eos = json.loads(settings).get("eos_token") if settings is not None else None
        else:
            from transformers import AutoTokenizer

            opened = AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
            backend, eos = opened.backend_tokenizer, opened.eos_token
    except (DatasetError, ModelError):
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(f"no fast tokenizer at {name!r}: {reason}") from None
    eos = eos["content"] if isinstance(eos, dict) else eos
    if eos is None and backend.token_to_id(END) is not None:
        eos = END
    return backend, eos


def _content(file: Path) -> str | None:
    try:
        return read_bytes(file).decode()
    except FileNotFoundError:
        return None
