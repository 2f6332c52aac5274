"""The labelling graph: corpus ranges in, signal parts on disk out.

    ranges ----------------------------+
    streams -> cut into ranges (spool) +-> reshuffle -> read, tokenise -> grammar [-> reshuffle] -> LLMs -> write part

Descriptions of ranges cross the first shuffle, not data. A local runner fuses all steps behind it, so a part is on disk
before the next one is read, and an interrupted run loses only the parts that it was working on.

Where the LLMs have machines of their own (`Work.hints`), parts cross a second shuffle, from the machines that tag to
those that score; otherwise the runner would fuse the two, and tag on GPU machines. Writing stays with scoring, by the
same hints: a third crossing to a cheap machine would cost more than the write, which takes a core a fraction of a
second while the engine, a process of its own, scores the next part.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import apache_beam as beam
import pyarrow as pa

from lacy.labelers import tokenize
from lacy.pipeline.corpus import spool
from lacy.pipeline.corpus.deadletters import Code, dead_letter, fault, position_of
from lacy.pipeline.corpus.readers import CopyGoneError, read
from lacy.pipeline.corpus.sources import Range, Stream
from lacy.pipeline.element import Part
from lacy.pipeline.options import ModelSpec
from lacy.pipeline.runners.counts import PartCost
from lacy.pipeline.runners.heartbeat import Heartbeat
from lacy.pipeline.runners.packed import listed, pack, unpack
from lacy.pipeline.runners.submit import absolute
from lacy.pipeline.tagging import Tag
from lacy.pipeline.write import has_record, is_finished, require_admission, write_part
from lacy.schemas.manifest import PartRecord, at


@dataclass(frozen=True)
class Work:
    """What the workers need to know."""

    dataset: Path
    run: str  # the fingerprint of the manifest
    ranges: list[Range]  # not finished yet
    streams: list[Stream]
    part_bytes: int
    committed: frozenset[str]  # finished parts, for streams: their ranges are not known yet
    tokenizer: str
    spacy: str
    rule: dict[str, bool]  # options of lacy.labelers.grammar.tag
    alignment: str
    models: dict[str, ModelSpec]  # by role: reference, student, judge
    keep_text: bool
    without_torch: bool = False  # nothing needs it
    hints: dict[str, str] = field(default_factory=dict)  # Beam's resource hints for machines that score


def for_other_folders(work: Work) -> Work:
    """The same work with absolute paths, for processes that run in other folders."""

    def fixed(spec: ModelSpec) -> ModelSpec:
        if spec.backend == "server":  # a name on the server is no path
            return spec
        arguments = spec.arguments | {"model": absolute(spec.arguments["model"])}
        return replace(spec, arguments=arguments, tokenizer=spec.tokenizer and absolute(spec.tokenizer))

    return replace(
        work,
        dataset=at(absolute(str(work.dataset))),
        ranges=[replace(part, path=absolute(part.path)) for part in work.ranges],
        streams=[replace(stream, path=absolute(stream.path)) for stream in work.streams],
        tokenizer=absolute(work.tokenizer),
        spacy=absolute(work.spacy),
        models={role: fixed(spec) for role, spec in work.models.items()},
    )


def build(pipeline: beam.Pipeline, work: Work, heartbeat: Heartbeat) -> None:
    """Add the graph to a pipeline."""
    cut = (
        listed(pipeline, "streams", work.streams, Stream)
        | "spread streams" >> beam.Reshuffle()
        | "cut streams" >> beam.ParDo(_Cut(work.dataset, work.run, work.part_bytes, work.committed, heartbeat))
    )
    parts = (
        (listed(pipeline, "ranges", work.ranges, Range), cut)
        | beam.Flatten()
        | "spread parts" >> beam.Reshuffle()
        | "read" >> beam.ParDo(_Read(work.dataset, work.run, work.tokenizer, heartbeat))
        | "grammar"
        >> beam.ParDo(Tag(work.spacy, work.rule, work.alignment, work.without_torch)).with_output_types(Part)
    )
    if work.hints:
        parts |= "to the scorers" >> beam.Reshuffle()
    for name, step in _scoring(work, heartbeat).items():
        parts |= name >> step.with_output_types(Part).with_resource_hints(**work.hints)
    write = beam.ParDo(_Write(work.dataset, work.run, work.keep_text, heartbeat)).with_resource_hints(**work.hints)
    _ = parts | "write" >> write


def _scoring(work: Work, heartbeat: Heartbeat) -> dict[str, beam.PTransform]:
    if not work.models:
        return {"no reference": beam.Map(_without_scores)}
    from apache_beam.ml.inference.base import RunInference  # imports torch, in seconds

    from lacy.pipeline.handlers import JudgeHandler, ScoreHandler

    steps: dict[str, beam.PTransform] = {}
    if reference := work.models.get("reference"):
        steps["reference"] = RunInference(ScoreHandler(reference, "ref_nll", "ref_correct", heartbeat))
    else:
        steps["no reference"] = beam.Map(_without_scores)
    if student := work.models.get("student"):
        steps["student"] = RunInference(ScoreHandler(student, "student_nll", None, heartbeat))
    if judge := work.models.get("judge"):
        steps["judge"] = RunInference(JudgeHandler(judge, heartbeat))
    return steps


class _Cut(beam.DoFn):
    def __init__(self, dataset: Path, run: str, part_bytes: int, committed: frozenset[str], heartbeat: Heartbeat):
        self._dataset, self._run, self._part_bytes, self._heartbeat = dataset, run, part_bytes, heartbeat
        self._packed = pack(sorted(committed))

    def setup(self) -> None:
        self._committed = set(unpack(self._packed))
        self._heartbeat.start()

    def process(self, stream: Stream) -> Iterator[Range]:
        require_admission(self._dataset, self._run)
        for part in spool.spool(stream, self._dataset, self._part_bytes, self._committed):
            if part.name not in self._committed:
                self._heartbeat.planned(1, part.end - part.start)
                yield part


class _Read(beam.DoFn):
    """Reads a range and tokenises its documents."""

    def __init__(self, dataset: Path, run: str, tokenizer: str, heartbeat: Heartbeat):
        self._dataset, self._run, self._name, self._heartbeat = dataset, run, tokenizer, heartbeat

    def setup(self) -> None:
        self._heartbeat.start()
        self._tokenizer = tokenize.load(self._name)

    def process(self, part: Range) -> Iterator[Part]:
        started = time.monotonic()
        require_admission(self._dataset, self._run)
        if has_record(self._dataset, part.name):
            return
        try:
            documents = read(part)
        except CopyGoneError:
            if is_finished(self._dataset, part.name):
                return
            raise
        bad, seen = list(documents.bad), set()
        keep = []
        for row, doc_id in enumerate(documents.ids):
            if doc_id in seen:
                position = position_of(documents.sources[row])
                bad.append(dead_letter(part.source, position, fault(Code.DUPLICATE), doc_id))
            else:
                seen.add(doc_id)
                keep.append(row)
        texts = [documents.texts[row] for row in keep]
        tokens = tokenize.encode(self._tokenizer, texts)
        batch = pa.RecordBatch.from_pydict(
            {
                "doc_id": pa.array([documents.ids[row] for row in keep], pa.string()),
                "source": pa.array([documents.sources[row] for row in keep], pa.string()),
                "text": pa.array(texts, pa.large_string()),
                "token_ids": tokens.lists(tokens.ids),
                "token_starts": tokens.lists(tokens.starts),
                "token_ends": tokens.lists(tokens.ends),
            }
        )
        yield Part(part, batch, tuple(bad), documents.skipped, {"read": time.monotonic() - started})


class _Write(beam.DoFn):
    """Writes a part, then its record, which makes it finished."""

    def __init__(self, dataset: Path, run: str, keep_text: bool, heartbeat: Heartbeat):
        self._dataset, self._run, self._keep_text, self._heartbeat = dataset, run, keep_text, heartbeat

    def process(self, part: Part) -> Iterator[PartRecord]:
        started = time.monotonic()
        table = pa.Table.from_batches([part.batch])
        if not self._keep_text:
            table = table.drop_columns(["text"])
        require_admission(self._dataset, self._run)
        record = write_part(
            self._dataset,
            part.range.name,
            part.range.source,
            table,
            part.bad,
            skipped=part.skipped,
            scored=part.scored,
            judged=part.judged,
        )
        spool.discard(self._dataset, part.range)
        seconds = part.seconds | {"write": time.monotonic() - started}
        cost = PartCost(part.range.end - part.range.start, record.rows, record.tokens, seconds)
        self._heartbeat.finished(record.name, cost, [letter.code for letter in part.bad])
        yield record


def _without_scores(part: Part) -> Part:
    tokens = part.tokens()
    return part.with_columns(ref_nll=tokens.lists(pa.nulls(len(tokens.ids), pa.float32())))
