"""Comparisons of results made by hand, against means and rank statistics computed by hand."""

import io
import json
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from lacy.cascade.evaluation import bootstrap, results
from lacy.cascade.evaluation.compare import COLUMNS, compare, names, page, show
from lacy.cascade.evaluation.results import Result
from lacy.schemas.errors import CascadeError

AUC = "delegation.auc.margin.factual_wrong"
STEP = "step-00000020"


def run_folder(path: Path, **settings: object) -> Path:
    """A run with a checkpoint of which nobody reads the weights."""
    (path / "checkpoints" / STEP / "training").mkdir(parents=True)
    (path / "checkpoints" / STEP / "config.json").write_text("{}")
    (path / "config.yaml").write_text(yaml.safe_dump({"dataset": "made", "out": str(path)} | settings))
    steps = [{"step": step, "loss": 1.0, "gt_tokens": 1000 * step} for step in (10, 20, 30)]
    (path / "log.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    return path


def save(run: Path, kind: str, units: dict, details: dict | None = None) -> None:
    result = Result(kind=kind, checkpoint=STEP, options={}, figures={}, details=details or {})
    results.save(run / "eval" / STEP, result, pa.table(units))


def tokens(seed: int, documents: int = 12, shift: float = 1.0) -> dict:
    """The same documents and facts for every seed, with another model's scores."""
    facts = np.random.default_rng(0)
    document = np.repeat(2 * np.arange(documents) + 1, facts.integers(5, 30, documents)).astype(np.int32)
    factual = facts.random(len(document)) < 0.3
    rng = np.random.default_rng(seed)
    correct = rng.random(len(document)) < 0.5
    margin = (rng.normal(size=len(document)) + shift * (factual & ~correct)).astype(np.float32)
    return {"document": document, "margin": margin, "uncertainty": margin, "factual": factual, "correct": correct}


def prompts(seed: int, count: int = 60) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "prompt": np.arange(count, dtype=np.int32),
        "contained": rng.random(count) < 0.4,
        "calls": rng.integers(0, 8, count).astype(np.int32),
        "tokens": rng.integers(8, 24, count).astype(np.int32),
    }


def questions(seed: int, docs: int = 20) -> dict:
    value = np.random.default_rng(seed).random(docs + 5) < 0.5
    task = ["lumeria"] * docs + ["valleys"] * 5
    return {"task": task, "doc": [*map(str, range(docs)), *map(str, range(5))], "value": value.astype(float)}


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    """Two runs with all kinds of results, of the same documents, prompts, entities and questions."""
    made = []
    shares = [0.0, 0.25, 0.5, 0.75, 1.0]
    for seed, objective in enumerate(("standard", "lacy"), start=1):
        run = run_folder(tmp_path / f"run-{objective}", objective=objective)
        curve = {"kept_accuracy": [0.4, 0.45 + seed / 100, 0.5, 0.6, None], "covered": shares}
        save(run, "delegation", tokens(seed, shift=seed), {"shares": shares, "curves": {"margin": curve}})
        save(run, "leakage", prompts(seed))
        save(run, "containment", prompts(seed + 10) | {"document": [f"d{number // 3:02}" for number in range(60)]})
        score = pa.array([0.5, None, 0.25 * seed, 0.1])
        save(
            run,
            "factscore",
            {"entity": ["Odra Venn", "Mira Oldan", "Jost", "Tarn"], "facts": [2, 0, 4, 10], "score": score},
        )
        save(run, "nlu", questions(seed))
        made.append(run)
    return made


def by_hand(seed: int) -> dict[str, float]:
    made = tokens(seed, shift=seed)
    wanted = made["factual"] & ~made["correct"]
    pairs = list(product(made["margin"][wanted], made["margin"][~wanted]))
    asked = questions(seed)["value"]
    contained = prompts(seed + 10)
    return {
        AUC: sum(a > b for a, b in pairs) / len(pairs),
        "leakage.contained": prompts(seed)["contained"].mean(),
        "containment.contained": contained["contained"].mean(),
        "containment.called": contained["calls"].sum() / contained["tokens"].sum(),
        "factscore.score": (0.5 + 0.25 * seed + 0.1) / 3,
        "nlu.average": (asked[:20].mean() + asked[20:].mean()) / 2,
    }


def printed(runs: list[Path], **console: object) -> str:
    file = io.StringIO()
    show(compare(runs), Console(file=file, **console))
    return file.getvalue()


def test_figures_are_those_of_the_units(runs) -> None:
    found = compare(runs)
    assert [row.name for row in found.rows] == ["run-standard", "run-lacy"]
    assert [row.objective for row in found.rows] == ["standard", "lacy"]
    assert [row.learnt_tokens for row in found.rows] == [20_000, 20_000]  # up to the checkpoint, not to the log's end
    for seed, row in enumerate(found.rows, start=1):
        assert {name: figure.value for name, figure in row.figures.items()} == pytest.approx(by_hand(seed))
        assert all(figure.low <= figure.value <= figure.high for figure in row.figures.values())
        assert (row.missing, row.hints) == ([], [])


def test_intervals_resample_the_clusters(runs) -> None:
    row = compare(runs).rows[0]
    contained = prompts(1)["contained"].astype(float)
    rng = np.random.default_rng(0)
    means = [contained[rng.integers(60, size=60)].mean() for _ in range(bootstrap.RESAMPLES)]
    leaked = row.figures["leakage.contained"]
    assert (leaked.low, leaked.high) == pytest.approx(np.quantile(means, [0.025, 0.975]))
    document = np.arange(60) // 3
    totals = np.bincount(document, prompts(11)["contained"])
    means = [
        totals[drawn].sum() / 60 for drawn in np.random.default_rng(0).integers(20, size=(bootstrap.RESAMPLES, 20))
    ]
    held = row.figures["containment.contained"]
    assert (held.low, held.high) == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_differences_to_the_first_run_are_paired(runs) -> None:
    first, second = compare(runs).rows
    assert set(first.differences.values()) == {None}
    expected = {name: by_hand(2)[name] - by_hand(1)[name] for name in by_hand(1)}
    assert {name: found.value for name, found in second.differences.items()} == pytest.approx(expected)
    ours, theirs = (prompts(seed)["contained"].astype(float) for seed in (2, 1))
    rng = np.random.default_rng(0)
    drawn = [rng.integers(60, size=60) for _ in range(bootstrap.RESAMPLES)]
    expected = np.quantile([(ours[rows] - theirs[rows]).mean() for rows in drawn], [0.025, 0.975])
    leaked = second.differences["leakage.contained"]
    assert (leaked.low, leaked.high) == pytest.approx(expected)


def test_a_run_less_itself_is_nothing(runs) -> None:
    again = compare([runs[0], runs[0]]).rows[1]
    assert {(found.value, found.low, found.high) for found in again.differences.values()} == {(0, 0, 0)}
    assert not any(found.clear for found in again.differences.values())


def test_other_documents_are_not_subtracted(runs) -> None:
    save(runs[1], "delegation", tokens(2, documents=13))
    save(runs[1], "leakage", prompts(2) | {"prompt": np.arange(60) + 1})
    save(runs[1], "containment", prompts(2) | {"document": [f"other{number // 3}" for number in range(60)]})
    save(runs[1], "nlu", questions(2, docs=19))
    row = compare(runs).rows[1]
    assert all(row.figures.values())
    assert {name for name, found in row.differences.items() if found} == {"factscore.score"}
    assert "not measured on the same documents" in printed(runs)


def test_what_was_not_evaluated_is_a_dash_and_a_command(runs, tmp_path) -> None:
    bare = run_folder(tmp_path / "bare run")
    (bare / "config.yaml").unlink()
    found = compare([*runs, bare])
    assert set(found.rows[2].figures.values()) == {None}
    assert found.rows[2].objective is None
    assert f"lacy eval nlu '{bare}' --task TASK" in found.rows[2].hints
    text = printed([*runs, bare])
    found_lines = [line.split() for line in text.splitlines() if line.startswith("bare run")]
    assert found_lines == 2 * [["bare", "run", *"------"]]
    uncalled = tokens(3)
    del uncalled["margin"]
    save(bare, "delegation", uncalled)  # of a model without <CALL>
    row = compare([bare]).rows[0]
    assert row.figures[AUC] is None
    assert "delegation" not in row.missing


def test_tables_fit_in_100_columns_and_are_plain_where_there_is_no_terminal(runs) -> None:
    text = printed(runs)
    table = text.split("call AUC:")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\x1b" in printed(runs, force_terminal=True, width=100, color_system="standard")
    assert f"{by_hand(1)['leakage.contained']:.1%}".replace("%", " %") in table
    assert "minus run-standard" in table


def test_the_page_is_whole_and_the_same_each_time(runs) -> None:
    found = page(compare(runs))
    assert found == page(compare(runs))
    assert "http" not in found.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "<script" not in found
    assert found.count("<svg") == 3  # the curves, and a line for each run in the legend
    for label in ("share of tokens called", "accuracy of the tokens kept"):
        assert f">{label}</text>" in found
    assert f"{by_hand(2)[AUC]:.3f}" in found
    ids = Ids()
    ids.feed(found)
    assert len(ids.found) == len(set(ids.found)) > 0


class Ids(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name == "id" and value]


def test_names_are_text(runs, tmp_path) -> None:
    name = "<script>alert(1)<b>'\"&{{ 7 * 7 }} $x_1$ \x1b[31m_"
    evil = runs[1].rename(tmp_path / name)
    html = page(compare([evil, runs[0]]))
    assert "<script" not in html
    assert "<b>" not in html
    assert "\x1b" not in html
    assert "&lt;script&gt;alert(1)&lt;b&gt;&#39;&#34;&amp;{{ 7 * 7 }} $x_1$" in html
    assert "\x1b" not in printed([evil, runs[0]])
    assert "<script>alert(1)<b>" in printed([evil, runs[0]], width=400).replace("\n", "")


def test_runs_are_named_by_what_tells_them_apart(tmp_path) -> None:
    folders = [run_folder(tmp_path / name) for name in ("a/run", "b/run", "other")]
    step = folders[2] / "checkpoints" / STEP
    assert names([*folders, step]) == ["a/run", "b/run", "other", f"other/{STEP}"]
    assert names([folders[0], folders[0]]) == ["run", "run (2)"]


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_units_that_lack_a_column_are_damaged(tmp_path, column) -> None:
    run = run_folder(tmp_path / "run")
    save(run, column.kind, {"margin": [0.5]})
    with pytest.raises(CascadeError, match=rf"the {column.kind} units of .*: rerun lacy eval"):
        compare([run])


def test_no_run_is_said(tmp_path) -> None:
    with pytest.raises(CascadeError, match="neither a run with a checkpoint"):
        compare([tmp_path])
