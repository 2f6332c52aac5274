"""benchmarks/stats.py on a dataset of one part: what it generates is a dataset, and its last line is its answer."""

import json
import subprocess
import sys
from pathlib import Path

from lacy.schemas.manifest import label_sets, read_complete
from lacy.stats.compute import compute

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "stats.py"


def test_the_benchmark(tmp_path):
    command = [sys.executable, SCRIPT, "--tokens", "1e5", "--rounds", "1", "--folder", tmp_path / "d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == {"stats_vs_duckdb", "stats_seconds", "lookup_seconds", "peak_gb"}
    assert all(value > 0 for value in found.values()) and found["lookup_seconds"] < found["stats_seconds"]
    whole, stats = read_complete(tmp_path / "d"), compute(tmp_path / "d")
    assert (stats.documents, stats.tokens, stats.factual) == (whole.documents, whole.tokens, whole.factual)
    assert {of.name: of.delegated for of in stats.label_sets} == {
        name: of.chosen for name, of in label_sets(tmp_path / "d").items()
    }
    assert stats.chosen_words and stats.kept_words
