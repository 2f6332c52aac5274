"""How well labels find facts that someone has marked.

    python benchmarks/gold.py DATASET GOLD.jsonl[.gz]

GOLD has one JSON object a line: `id`, `text`, `gold` (half-open character spans of factual values) and `covered` (the
spans that whoever marked them has seen). A token is gold when the characters of it that are no white space overlap a
gold span; tokens of white space alone, and tokens outside `covered`, do not count. Hard gold: the reference's most
likely token was another; unknown where the scorer does not tell. Prints a table, and last one JSON object.
"""

import argparse
import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from lacy.schemas.codes import LEARN
from lacy.schemas.manifest import labels_path, read_complete, signals_path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("gold", type=Path)
    arguments = parser.parse_args()
    result = measure(arguments.dataset, load(arguments.gold))
    policies = result.pop("policies")
    print(" | ".join(f"{name} {value:,}" for name, value in result.items()))
    print(f"\n{'labels':12} {'share':>7} {'gold':>7} {'hard gold':>10}")
    for name, row in policies.items():
        hard = "" if row["hard_gold"] is None else f"{row['hard_gold']:.1%}"
        print(f"{name:12} {row['share']:7.1%} {row['gold']:7.1%} {hard:>10}")
    print(json.dumps(result | {"policies": policies}))


def load(path: Path) -> dict[str, dict]:
    data = path.read_bytes()
    rows = map(json.loads, (gzip.decompress(data) if path.suffix == ".gz" else data).splitlines())
    return {row["id"]: row for row in rows}


def measure(dataset: Path, gold: dict[str, dict]) -> dict:
    """Shares over the tokens that count; `flagged_all` over all tokens."""
    chosen: dict[str, list[np.ndarray]] = {}
    parts = [record.name for record in read_complete(dataset).parts if record.rows]
    names = sorted(path.parent.name for path in (dataset / "labels").glob("*/_policy.json"))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("factual", "gold", "hard", "all")}
    for part in parts:
        signals = pq.read_table(signals_path(dataset, part)).to_pylist()
        labels = {name: pq.read_table(labels_path(dataset, name, part))["label"].to_pylist() for name in names}
        for row, document in enumerate(signals):
            marked = gold[document["doc_id"]]
            starts, ends = np.array(document["token_starts"]), np.array(document["token_ends"])
            core = np.array([first_solid(marked["text"], *span) for span in zip(starts, ends, strict=True)])
            counts = (core < ends) & overlaps(core, ends, marked["covered"])
            hit = overlaps(core, ends, marked["gold"])[counts]
            columns["all"].append(np.array(document["factual"]))
            columns["factual"].append(np.array(document["factual"])[counts])
            columns["gold"].append(hit)
            correct = np.array(document.get("ref_correct") or np.ones(len(core)), bool)[counts]
            columns["hard"].append(hit & ~correct)
            for name in names:
                chosen.setdefault(name, []).append((np.array(labels[name][row]) != LEARN)[counts])
    found = {name: np.concatenate(values) for name, values in columns.items()}
    picked = {name: np.concatenate(values) for name, values in chosen.items()}
    is_gold, hard, factual = found["gold"], found["hard"], found["factual"]
    return {
        "documents": len(columns["all"]),
        "tokens": len(factual),
        "flagged_all": round(float(found["all"].mean()), 4),
        "recall": round(float(factual[is_gold].mean()), 4),
        "precision": round(float(is_gold[factual].mean()), 4),
        "policies": {
            name: {
                "share": round(float(picked[name].mean()), 4),
                "gold": round(float(picked[name][is_gold].mean()), 4),
                "hard_gold": round(float(picked[name][hard].mean()), 4) if hard.any() else None,
            }
            for name in names
        },
    }


def first_solid(text: str, start: int, end: int) -> int:
    while start < end and text[start].isspace():
        start += 1
    return start


def overlaps(starts: np.ndarray, ends: np.ndarray, spans: list[list[int]]) -> np.ndarray:
    """(T,) bool: which half-open [start, end) overlap one of the spans."""
    hit = np.zeros(len(starts), bool)
    for begin, finish in spans:
        hit |= (starts < finish) & (ends > begin)
    return hit


if __name__ == "__main__":
    main()
