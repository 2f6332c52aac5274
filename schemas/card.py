"""The dataset card: a README.md whose front matter lets `datasets.load_dataset` open the folder, and people read it.

It is a function of the manifest and the label sets, and quotes nothing of the corpus.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from lacy.schemas.codes import ENT_TYPES, LABELS, POS
from lacy.schemas.files import read_bytes, write_atomic
from lacy.schemas.manifest import LABEL_SET_NAME, LabelSet, Manifest, label_sets
from lacy.schemas.parts import LABELS as LABEL_SCHEMA
from lacy.schemas.parts import OPTIONAL, SIGNALS, TOKEN_COLUMNS

NAME: Final = "README.md"
MARK: Final = "<!-- LaCy replaces this file when a label set is added. Delete this line to keep your own changes. -->"

_COLUMNS: Final = {
    "doc_id": "unique in the dataset",
    "source": "corpus file and position in it",
    "text": "the document",
    "token_ids": "ids of the tokenizer in `tokenizer/`",
    "token_starts": "character offset in `text` at which a token begins",
    "token_ends": "character offset behind its end",
    "factual": "the grammar marks the token as a fact",
    "pos": "part of speech, a code",
    "ent_type": "entity type, a code",
    "ref_nll": "loss of the reference model in nats; null where there is none",
    "ref_correct": "the reference model predicts this token",
    "student_nll": "loss of the student model in nats",
    "judge": "0 to 1: how strongly the LLM judge marks the token",
    "label": "what training does with the token, a code",
}
_CARD: Final = """---
configs:
{configs}
---
{mark}

# Text labelled by LaCy

{documents:,} documents, {tokens:,} tokens of text, {factual:.1%} of them factual. LaCy decides for each token whether a
small language model should learn it or delegate it to a larger one. `signals/` holds the text, its tokens and what was
measured for them; `labels/<name>/` holds what a policy decided, document for document. `manifest.json` records the
corpus, the tokenizer, the models and all options.

{sets}
A row is a document; a list has one entry for each token. {optional} are present where they were measured.

| column | in | meaning |
|---|---|---|
{columns}

Code tables (the Parquet metadata holds them too):

- `label`: {label}
- `pos`: {pos}
- `ent_type`: {ent_type}

## Reading it

```python
datasets.load_dataset("FOLDER", "{config}")
pandas.read_parquet("FOLDER/{path}")
polars.read_parquet("FOLDER/{path}/*.parquet")
duckdb.sql("FROM 'FOLDER/{path}/*.parquet'")
lacy.connect("FOLDER").sql("FROM labels LIMIT 10")  # one row for each token, with names in place of codes
```
"""


def write_card(dataset: Path, manifest: Manifest, labels: LabelSet | None = None) -> None:
    """Write the card of a finished dataset, or leave a card that was edited and has lost its mark.

    labels: a set that is about to be recorded, beside those that are

    Raises OSError, and DatasetError for an object store that cannot be written.
    """
    with suppress(FileNotFoundError):
        if MARK.encode() not in read_bytes(dataset / NAME):
            return
    sets = label_sets(dataset) | ({labels.name: labels} if labels else {})
    write_atomic(dataset / NAME, card(manifest, sets).encode())


def card(manifest: Manifest, sets: dict[str, LabelSet]) -> str:
    """The same manifest and label sets give the same text.

    A label set whose name `lacy decide` would refuse is left out, since such a name could break the YAML.
    """
    sets = {name: found for name, found in sorted(sets.items()) if re.fullmatch(LABEL_SET_NAME, name)}
    paths = {"signals": "signals"} | {f"labels-{name}": f"labels/{name}" for name in sets}
    config, path = list(paths.items())[-1]
    return _CARD.format(
        configs="\n".join(
            f'- config_name: "{config}"\n  data_files: "{path}/*.parquet"'
            + ("\n  default: true" if config == "signals" else "")
            for config, path in paths.items()
        ),
        mark=MARK,
        documents=manifest.documents,
        tokens=manifest.tokens,
        factual=manifest.factual / max(1, manifest.tokens),
        sets="".join(
            f"- label set `{name}`: {found.share:.2%} of the tokens are not learned, but "
            f"{'delegated' if found.action == 'delegate' else 'ignored'}\n"
            for name, found in sets.items()
        ),
        columns="\n".join(
            f"| `{name}` {'list' if name in (*TOKEN_COLUMNS, 'label') else 'string'} | {_folders(name)} | {meaning} |"
            for name, meaning in _COLUMNS.items()
        ),
        optional=", ".join(f"`{name}`" for name in OPTIONAL),
        label=_table(LABELS),
        pos=_table(POS),
        ent_type=_table(ENT_TYPES),
        config=config,
        path=path,
    )


def _folders(column: str) -> str:
    places = {"signals": SIGNALS, "labels": LABEL_SCHEMA}
    return ", ".join(folder for folder, schema in places.items() if column in schema.names)


def _table(names: tuple[str, ...]) -> str:
    return ", ".join(f"{code} {name or 'none'}" for code, name in enumerate(names))
