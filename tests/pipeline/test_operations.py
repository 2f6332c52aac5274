"""What an operator sees of a run on any runner: Beam's metrics and the log, without any text of a document."""

import json
import logging
from pathlib import Path
from typing import Any

import apache_beam as beam
import pytest
from apache_beam.metrics import MetricsFilter
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from lacy.pipeline.corpus.sources import find_files, plan_parts
from lacy.pipeline.graph import Work, build
from lacy.pipeline.label import TOKENIZER, begin
from lacy.pipeline.options import LabelOptions
from lacy.pipeline.placement import models_of
from lacy.pipeline.runners.heartbeat import NAMESPACE, Heartbeat
from lacy.schemas.manifest import PartRecord
from tests.support import corpora

MARKER = "Zebrafinkenweibchen"
BAD = [
    f'{{"id": "a", "text": "{MARKER}"',  # cut off
    f'{{"id": "b", "text": ["{MARKER}"]}}',
    f'{{"id": "c", "text": "", "title": "{MARKER}"}}',
    f'["{MARKER}"]',
    f'{{"id": {{"{MARKER}": 1}}, "text": "{MARKER}"}}',
]


def planned(folder: Path, out: Path, small_model: Path, **given: Any) -> Work:
    """Two parts with bad and good documents, all with the marker; the dataset is begun."""
    lines = [json.dumps(row | {"text": f"{MARKER} {row['text']}"}) for row in corpora.documents(8, seed=2)]
    path = folder / "a.jsonl"
    path.write_bytes("\n".join([*BAD, *lines, lines[-1]]).encode() + b"\n" + MARKER.encode() + b"\xff\n")
    part_bytes = path.stat().st_size // 2 + 1
    options = LabelOptions(
        corpus=[str(path)],
        out=out,
        reference=str(small_model),
        scorer="transformers",
        device="cpu",
        part_bytes=part_bytes,
    )
    files = find_files(options.corpus)
    tokenizer, models = models_of(options)
    return Work(
        dataset=options.out,
        run=begin(options, files, tokenizer, models).fingerprint(),
        ranges=plan_parts(files, part_bytes),  # type: ignore[arg-type]
        streams=[],
        part_bytes=part_bytes,
        committed=frozenset(),
        tokenizer=str(options.out / TOKENIZER),
        spacy=options.spacy,
        rule={"attributes": False, "headings": False},
        alignment="first",
        models=models,
        keep_text=True,
        **given,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, small_model):
    """The whole graph, on a runner that is not asked for a heartbeat: metrics, log records, parts."""
    folder = tmp_path_factory.mktemp("operations")
    dataset = folder / "d"
    work = planned(folder, dataset, small_model)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    root = logging.getLogger()
    level, disabled = root.level, logging.root.manager.disable
    root.addHandler(handler)
    root.setLevel(logging.INFO)  # Dataflow's default
    logging.disable(logging.NOTSET)
    try:
        heartbeat = Heartbeat(None, "operations")
        pipeline = beam.Pipeline(runner=FnApiRunner())
        build(pipeline, work, heartbeat)
        result = pipeline.run()
        result.wait_until_finish()
        heartbeat.restarted()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.disable(disabled)
    found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))
    counters = {metric.key.metric.name: metric.committed for metric in found["counters"]}
    distributions = {metric.key.metric.name: metric.committed for metric in found["distributions"]}
    parts = [PartRecord.model_validate_json(file.read_text()) for file in (dataset / ".parts").glob("part-*.json")]
    return counters, distributions, records, parts, dataset


def test_counters_are_the_sums_of_the_records(run):
    counters, _, _, parts, _ = run
    assert counters["parts"] == len(parts) == 2
    assert counters["documents"] == sum(part.rows for part in parts) == 8
    assert counters["tokens"] == sum(part.tokens for part in parts)
    bad = {name: count for name, count in counters.items() if name.startswith("bad_")}
    assert sum(bad.values()) == sum(part.bad for part in parts) == 7
    assert bad == {
        "bad_not_json": 1,
        "bad_text_of_another_type": 1,
        "bad_empty": 1,
        "bad_not_an_object": 1,
        "bad_bad_id": 1,
        "bad_not_utf8": 1,
        "bad_duplicate": 1,
    }


def test_distributions_have_a_value_for_each_part_and_stage(run):
    _, distributions, _, parts, _ = run
    stages = ("read", "grammar", "reference", "write")
    assert set(distributions) == {f"{s}_{unit}" for s in stages for unit in ("milliseconds", "tokens_per_second")}
    assert all(found.count == len(parts) for found in distributions.values())
    assert distributions["grammar_milliseconds"].max > 0


def test_the_log_has_a_line_of_json_for_each_part(run):
    _, _, records, parts, _ = run
    ours = [json.loads(record.getMessage()) for record in records if record.name == "lacy.pipeline.runners.heartbeat"]
    finished = {line["part"]: line for line in ours if line["event"] == "part finished"}
    assert {name: line["tokens"] for name, line in finished.items()} == {part.name: part.tokens for part in parts}
    assert all(set(line["seconds"]) == {"read", "grammar", "reference", "write"} for line in finished.values())
    assert {"event": "engine restarted"} in ours


def test_no_word_of_a_document_is_in_a_log_record_or_a_metrics_name(run):
    counters, distributions, records, _, dataset = run
    told = [record.getMessage() + str(record.exc_text or "") + str(record.exc_info or "") for record in records]
    assert len(told) > 2
    assert not [line for line in told if MARKER in line]
    assert not [name for name in (*counters, *distributions) if MARKER in name]
    letters = "".join(file.read_text() for file in (dataset / "deadletter").iterdir())
    assert letters and MARKER not in letters


def test_parts_that_cross_to_other_machines_are_the_same_bytes(run, tmp_path, small_model):
    """A runner with two environments, between which parts are encoded and decoded."""
    *_, dataset = run
    hints = {"accelerator": "type:nvidia-l4;count:1", "min_ram": "1GB"}
    work = planned(dataset.parent, tmp_path / "d", small_model, hints=hints)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        build(pipeline, work, Heartbeat(None, "crossing"))
    for kind in ("signals", "deadletter"):
        here, there = ({file.name: file.read_bytes() for file in (d / kind).iterdir()} for d in (dataset, work.dataset))
        assert len(here) == 2
        assert there == here
