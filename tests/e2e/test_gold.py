"""The grammar finds the facts that someone marked in real Wikipedia text."""

import gzip
import json

from benchmarks.gold import load, measure


def test_flagged_share_recall_and_precision(dev_data, small_model, tmp_path, labeller):
    gold = load(dev_data / "dwiki-dev.jsonl.gz")
    first = list(gold.values())[:200]
    with gzip.open(tmp_path / "gold.jsonl.gz", "wt") as lines:
        lines.writelines(json.dumps({"id": row["id"], "text": row["text"]}) + "\n" for row in first)
    grammar_alone = ("--reference", "none", "--tokenizer", small_model, "--policy", "factual", "--workers", 1)
    done = labeller("label", tmp_path / "gold.jsonl.gz", "--out", tmp_path / "d", *grammar_alone)
    assert done.returncode == 0, done.stderr
    found = measure(tmp_path / "d", gold)
    assert found["documents"] == 200
    assert 0.20 < found["flagged_all"] < 0.28
    assert found["recall"] > 0.70
    assert found["precision"] > 0.40
    assert found["policies"]["factual"]["gold"] == found["recall"]
