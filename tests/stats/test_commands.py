"""`lacy stats` and `lacy report` as commands: their options arrive, and a mistake is one line."""

import json

import pytest

from lacy.stats.compute import compute
from tests.stats.test_report import unpacked
from tests.support.forks import Forks


@pytest.fixture(scope="module")
def lacy(tmp_path_factory):
    forks = Forks(
        tmp_path_factory.mktemp("forks"), ("lacy.stats.report", "lacy.stats.show", "lacy.stats.tables", "lacy.progress")
    )
    yield forks
    forks.close()


def test_stats_as_tables(dataset, lacy):
    done = lacy("stats", dataset)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"{dataset}: 24 documents, ")
    assert "delegated by lacy" in done.stdout and "\x1b" not in done.stdout
    other = lacy("stats", dataset, "--labels", "a 'quoted' set", "--by", "part").stdout
    assert "By part: tokens, how many are factual or ignored by a 'quoted' set" in other


def test_stats_as_json(dataset, lacy):
    options = {"labels": "a 'quoted' set", "where": "pos = 'NOUN' OR ref_nll > 6", "by": "ent_type"}
    done = lacy("stats", dataset, "--json", *(part for name in options for part in (f"--{name}", options[name])))
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout) == json.loads(compute(dataset, **options).model_dump_json())


def test_report_has_what_is_asked_for(dataset, documents, lacy, tmp_path):
    out = tmp_path / "report.html"

    def reported(*options):
        done = lacy("report", dataset, "--out", out, *options)
        assert done.returncode == 0 and done.stderr.startswith(f"{out}: ") and done.stdout == ""
        data = unpacked(out)
        return data["sets"][data["chosen"]]["name"], [of["id"] for of in data["documents"]]

    ids = [documents[8].doc_id, documents[2].doc_id]
    assert reported("--document", ids[0], "--document", ids[1]) == ("lacy", ids)
    name, found = reported("--labels", "a 'quoted' set", "--documents", 3)
    assert name == "a 'quoted' set" and len(found) == 3
    assert reported("--where", "source LIKE '%:2'")[1] == [of.doc_id for of in documents if of.source.endswith(":2")]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["stats", "{d}", "--where", "nonsense > 1"], 2, 'column "nonsense" not found'),
        (["stats", "{d}", "--where", ""], 2, "--where is empty"),
        (["stats", "{d}", "--by", "nonsense"], 2, 'column "nonsense" not found'),
        (["stats", "{d}", "--labels", "x"], 2, "no label set 'x': it has a 'quoted' set, lacy"),
        (["report", "{d}", "--out", "{d}/r.html"], 2, "is in the dataset"),
        (["report", "{d}", "--out", "{t}"], 2, "is a folder"),
        (["report", "{d}", "--out", "{t}/r.html", "--document", "x"], 2, "no document 'x'"),
        (["report", "{t}", "--out", "{t}/r.html"], 2, "is not a dataset"),
        (["show", "{d}", "x", "--color", "hue"], 2, "--color: 'hue' is not one of 'label', 'loss'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line(dataset, lacy, tmp_path, arguments, code, says):
    done = lacy(*(part.format(d=dataset, t=tmp_path) for part in arguments))
    assert done.returncode == code and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("lacy: ") and done.stderr.count("\n") == 1 and says in done.stderr
