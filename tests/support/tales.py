"""Labelled datasets whose facts are marked by hand: "born in [Port Hale|GPE] in [1871|DATE]"."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from lacy.schemas import manifest
from lacy.schemas.codes import ENT_TYPES
from lacy.schemas.files import sha256, write_atomic
from tests.stats.conftest import Document, document, write
from tests.support.models import CALL, END

BEGIN = "The people of the valley tell this at night, when the lamps are lit and the wind is low."


def tale(number: int) -> str:
    """Four facts behind a beginning that is always the same."""
    return (
        f"{BEGIN} Odra Venn the {number} was born in [Port {number} Hale|GPE] in [{1700 + number}|DATE]. She had "
        f"[{100 + number}|CARDINAL] lamps and came from [Upper Sarn {number}|GPE]."
    )


def marked(name: str, text: str, tokenizer: Tokenizer | None = None) -> Document:
    """A document; its tokens are those of a tokenizer, else `words`. Facts of the type "-" have none."""
    pieces = re.split(r"\[([^|]+)\|([^\]]+)\]", text)
    whole, facts = "", []
    for plain, fact, kind in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        whole += plain
        if fact:
            facts.append((len(whole), len(whole) + len(fact), kind.strip("-")))
        whole += fact
    encoding = tokenizer.encode(whole) if tokenizer else None
    spans = encoding.offsets if encoding else words(whole)
    found = document(name, whole, spans=spans)
    of = [next((kind for first, last, kind in facts if first < end and start < last), None) for start, end in spans]
    found.signals |= {
        "factual": [kind is not None for kind in of],
        "ent_type": [ENT_TYPES.index(kind or "") for kind in of],
    }
    if encoding:
        found.signals["token_ids"] = encoding.ids
    return found


def words(text: str) -> list[tuple[int, int]]:
    """Words and marks, each with the white space before it."""
    return [match.span() for match in re.finditer(r"\s*(?:\w+|[^\w\s])", text)]


def labelled(folder: Path, documents: Sequence[Document], tokenizer: Tokenizer, **more: Any) -> Path:
    """A dataset as `lacy label` would write it; `more` is for `tests.stats.conftest.write`."""
    write(folder, documents, **more)
    data = tokenizer.to_str().encode()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "additional_special_tokens": [CALL]}
    write_atomic(folder / "tokenizer" / "tokenizer.json", data)
    write_atomic(folder / "tokenizer" / "tokenizer_config.json", json.dumps(settings).encode())
    told = {"name": "made", "sha256": sha256(data), "call_id": tokenizer.token_to_id(CALL)}
    whole = manifest.read_manifest(folder).model_copy(update={"tokenizer": told})
    manifest.save(folder / "manifest.json", whole)
    return folder
