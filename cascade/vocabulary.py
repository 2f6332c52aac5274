"""Tokens of a model as bytes of text, also after text of another model has been joined to them.

The two models of a cascade may tokenize differently, so they exchange characters. `Writing` is a text that grows by
tokens of its own vocabulary, whose bytes are appended, or by characters (`join`). Characters become tokens as the
tokenizer reads the whole text, but as few old tokens as possible change: all tokens stay up to the last offset, within
the old text, at which both the old tokens and the new reading have a boundary. So "19" and a joined "45" become one
token "1945" if the vocabulary has it, and tokens further back stay as they were written, even if the tokenizer would
have split them differently. The text itself never changes: its bytes are those of the prompt and of all additions.
"""

import json
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from lacy.labelers.llm.model_folders import resolve
from lacy.schemas.errors import CascadeError

CALL: Final = "<CALL>"
SPACE: Final = "\u2581"  # SentencePiece's, in place of a space

_ALPHABET: Final = frozenset(pre_tokenizers.ByteLevel.alphabet())
# The byte of each character: printable ones stand for themselves, those of the others begin at U+0100, in order.
_BYTES: Final = dict(
    zip(sorted(_ALPHABET), sorted(range(256), key=lambda b: (chr(b) not in _ALPHABET, b)), strict=True)
)


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer for generation.

    pieces   bytes of each token, by id; None for tokens without text: special tokens, and ids without a token
    call_id  id of <CALL>, or None
    """

    tokenizer: Tokenizer = field(repr=False)
    pieces: tuple[bytes | None, ...] = field(repr=False)
    call_id: int | None
    prefixed: bool  # whether reading puts a space in front of a text, as SentencePiece does

    def read(self, text: str) -> tuple[list[int], list[int]]:
        """Token ids of a text and their ends, in bytes of its UTF-8. Nothing in the text is read as a special token."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids = encoding.ids
        lengths = [len(self.pieces[index] or b"") for index in ids]
        ends = np.cumsum(lengths) if ids else np.zeros(0, np.int64)
        data = text.encode()
        if not len(ends) or ends[-1] != len(data):  # a normalizer, a prefixed space, an unknown character
            width = np.cumsum([0, *(len(c.encode()) for c in text)])
            ends = np.maximum.accumulate(width[[end for _, end in encoding.offsets]]) if ids else ends
        return ids, ends.tolist()

    def forbidden(self, rows: int, ends: frozenset[int]) -> list[int]:
        """Ids below `rows` that a model must not write: those that have no text and do not end one."""
        written = {index for index, piece in enumerate(self.pieces) if piece is not None} | ends
        return [index for index in range(rows) if index not in written]


class Writing:
    """A text that grows, its tokens, and who wrote each byte.

    ids      tokens of the whole text
    ends     end of each token, in bytes
    data     bytes of the whole text, which may end in the middle of a character
    authors  for each byte, the number of its author
    """

    def __init__(self, vocabulary: Vocabulary, prompt: str):
        self._vocabulary = vocabulary
        self.ids, self.ends = vocabulary.read(prompt)
        self.data = bytearray(prompt.encode())
        self.authors = bytearray(len(self.data))

    def add(self, token: int, author: int) -> None:
        """Append a token of the vocabulary; one without text, like the end token, does not change the text."""
        piece = self._vocabulary.pieces[token] or b""
        if self._vocabulary.prefixed and not self.data:
            piece = piece.removeprefix(b" ")
        self.data += piece
        self.authors += bytes([author]) * len(piece)
        self.ids.append(token)
        self.ends.append(len(self.data))

    def join(self, text: str, author: int) -> int:
        """Append characters; returns how many old tokens stay. The text must not end in the middle of a character."""
        old = len(self.data)
        self.data += text.encode()
        self.authors += bytes([author]) * (len(self.data) - old)
        first = self._readable()
        ids, ends = self._vocabulary.read(self.data[first:].decode())
        ends = [first + end for end in ends]
        keep = bisect_right(self.ends, old)
        while keep and self.ends[keep - 1] > first and not _has(ends, self.ends[keep - 1]):
            keep -= 1
        start = self.ends[keep - 1] if keep else 0
        rest = bisect_right(ends, start)
        self.ids[keep:] = ids[rest:]
        self.ends[keep:] = ends[rest:]
        return keep

    def _readable(self) -> int:
        """The byte to read from: 0, or, in a text with invalid bytes, the end of a token behind them."""
        first = _after_invalid(self.data)
        if not first:
            return 0
        later = self.ends[bisect_left(self.ends, first) :]
        return next(end for end in later if end == len(self.data) or self.data[end] & 0xC0 != 0x80)

    @property
    def text(self) -> str:
        """The complete characters, with invalid bytes as U+FFFD."""
        return bytes(self.data[: len(self.data) - incomplete(self.data)]).decode(errors="replace")

    @property
    def mid_character(self) -> bool:
        return incomplete(self.data) > 0


def incomplete(data: bytes | bytearray) -> int:
    """The number of bytes at the end that begin a UTF-8 character which may still be completed."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            if back < length and byte not in (0xC0, 0xC1) and byte <= 0xF4:
                try:  # the decoder knows which second bytes are impossible
                    bytes(data[-back:]).decode()
                except UnicodeDecodeError as error:
                    return back if error.reason == "unexpected end of data" else 0
            return 0
        if byte < 0x80:
            return 0
    return 0


def open_vocabulary(name: str, *, trust_remote_code: bool = False) -> tuple[Vocabulary, tuple[int, ...], int | None]:
    """The tokenizer of a model's folder or Hub name; ids that it puts in front of a text; the id that ends one.

    Raises ModelError for a model that cannot be found, CascadeError for one whose tokenizer cannot generate text.
    """
    resolved = resolve(name)
    try:
        opened = AutoTokenizer.from_pretrained(resolved, trust_remote_code=trust_remote_code)
        backend: Tokenizer = opened.backend_tokenizer
        full = backend.encode("a", add_special_tokens=True).ids
        plain = backend.encode("a", add_special_tokens=False).ids
    except Exception as error:  # the library raises what its parts raise
        reason = " ".join(str(error).split())[:200]
        raise CascadeError(f"no fast tokenizer in {name}: {reason}", usage=not Path(name).is_dir()) from None
    begin = tuple(full[: len(full) - len(plain)]) if plain and full[-len(plain) :] == plain else ()
    return vocabulary(backend, name), begin, opened.eos_token_id


def vocabulary(tokenizer: Tokenizer, name: str) -> Vocabulary:
    """A library tokenizer for generation; `name` is for the error. Raises CascadeError as `open_vocabulary` does."""
    spec = json.loads(tokenizer.to_str())
    spec["post_processor"] = spec["truncation"] = spec["padding"] = None
    plain = Tokenizer.from_str(json.dumps(spec))
    plain.encode_special_tokens = True
    byte_level = _uses(spec.get("decoder"), "ByteLevel")
    metaspace = _uses(spec.get("decoder"), "Metaspace") or _uses(spec.get("decoder"), "ByteFallback")
    if not byte_level and not metaspace:
        raise CascadeError(
            f"the tokenizer of {name} is neither byte-level nor SentencePiece: use a model with one of these"
        )
    entries = plain.get_vocab(with_added_tokens=True)
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    added = {token["id"] for token in spec["added_tokens"]}
    pieces: list[bytes | None] = [None] * (max(entries.values()) + 1)
    for token, index in entries.items():
        if index in special:
            continue
        if index in added:
            pieces[index] = token.encode()
        elif byte_level:
            pieces[index] = bytes(_BYTES[c] for c in token) if all(c in _BYTES for c in token) else None
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            pieces[index] = bytes([int(token[3:5], 16)])
        else:
            pieces[index] = token.replace(SPACE, " ").encode()
    prefixed = metaspace and any(token.startswith(SPACE) for token in plain.encode("a").tokens[:1])
    return Vocabulary(plain, tuple(pieces), entries.get(CALL), prefixed)


def same(a: Vocabulary, b: Vocabulary) -> bool:
    """Whether two tokenizers split every text into the same ids; their special tokens may differ."""
    if a.tokenizer is b.tokenizer:
        return True

    def kernel(vocabulary: Vocabulary) -> tuple[Any, ...]:
        spec = json.loads(vocabulary.tokenizer.to_str())
        for token in spec["added_tokens"]:
            if token["special"] and isinstance(spec["model"]["vocab"], dict):
                spec["model"]["vocab"].pop(token["content"], None)
        added = [(token["id"], token["content"]) for token in spec["added_tokens"] if not token["special"]]
        return spec["model"], spec["normalizer"], spec["pre_tokenizer"], added

    return kernel(a) == kernel(b)


def _uses(node: dict[str, Any] | None, kind: str) -> bool:
    if not node:
        return False
    return node["type"] == kind or any(_uses(child, kind) for child in node.get("decoders", []))


def _has(ends: list[int], end: int) -> bool:
    index = bisect_left(ends, end)
    return index < len(ends) and ends[index] == end


def _after_invalid(data: bytearray) -> int:
    """The first byte of the valid UTF-8 at the end."""
    first = 0
    while True:
        try:
            data[first:].decode()
            return first
        except UnicodeDecodeError as error:
            first += error.end
