"""What --on fills in, and what it refuses."""

import pytest
from apache_beam.options.pipeline_options import (
    DebugOptions,
    FlinkRunnerOptions,
    GoogleCloudOptions,
    PipelineOptions,
    PortableOptions,
    SetupOptions,
    WorkerOptions,
)
from pydantic import ValidationError

from lacy.pipeline.options import LabelOptions, require_reach
from lacy.pipeline.placement import _best_backend, _engines
from lacy.pipeline.runners.presets import GPUS, Cluster, beam_options, require_store
from lacy.schemas.errors import UsageError

DATAFLOW = {"on": "dataflow", "project": "my-project", "region": "us-central1", "image": "host/lacy/label:gpu"}


def options(**given) -> LabelOptions:
    return LabelOptions(**{"corpus": ["gs://b/c"], "out": "gs://b/d"} | given)


def test_dataflow():
    cluster = Cluster(**DATAFLOW, max_workers=30)
    filled = PipelineOptions(beam_options(cluster, "label", "gs://bucket/runs/Wiki_1"), save_main_session=False)
    cloud, workers = filled.view_as(GoogleCloudOptions), filled.view_as(WorkerOptions)
    assert (cloud.project, cloud.region, cloud.temp_location) == ("my-project", "us-central1", "gs://bucket/lacy-temp")
    assert cloud.job_name == "lacy-label-bucket-runs-wiki-1"
    assert (workers.sdk_container_image, workers.max_num_workers) == ("host/lacy/label:gpu", 30)
    assert filled.view_as(DebugOptions).number_of_worker_harness_threads == 1
    assert filled.view_as(SetupOptions).sdk_location == "container"
    assert not filled.view_as(SetupOptions).save_main_session


def test_the_options_of_the_user_come_later_and_win():
    filled = beam_options(Cluster(**DATAFLOW), "label", "gs://b/d")
    both = PipelineOptions([*filled, "--machine_type=c3-standard-44", "--experiments=mine"])
    assert both.view_as(WorkerOptions).machine_type == "c3-standard-44"
    assert "mine" in both.view_as(DebugOptions).experiments


def test_flink():
    cluster = Cluster(on="flink", flink_master="flink:8081", image="host/lacy/label:cpu")
    filled = PipelineOptions(beam_options(cluster, "label", "s3://b/d"))
    assert filled.view_as(FlinkRunnerOptions).flink_master == "flink:8081"
    portable = filled.view_as(PortableOptions)
    assert (portable.environment_type, portable.environment_config) == ("DOCKER", "host/lacy/label:cpu")
    assert portable.sdk_worker_parallelism == "0"
    assert cluster.hints() == {}


def test_portable_with_a_pool_of_workers():
    cluster = Cluster(on="portable", job_endpoint="jobs:8099", worker_pool="pool:50000", gpu="a100", gpus=4)
    portable = PipelineOptions(beam_options(cluster, "decide", "/shared/d")).view_as(PortableOptions)
    assert portable.job_endpoint == "jobs:8099"
    assert (portable.environment_type, portable.environment_config) == ("EXTERNAL", "pool:50000")
    assert cluster.hints() == {}  # such runners know no kinds of machines: a break would cost and bring nothing


@pytest.mark.parametrize(
    "gpu,count,accelerator,machine",
    [
        ("l4", 1, "nvidia-l4", "g2-standard-8"),
        ("a100", 8, "nvidia-tesla-a100", "a2-highgpu-8g"),
        ("h100", 8, "nvidia-h100-80gb", "a3-highgpu-8g"),
    ],
)
def test_hints_of_a_gpu(gpu, count, accelerator, machine):
    hints = Cluster(**DATAFLOW, gpu=gpu, gpus=count).hints()
    assert hints["accelerator"] == f"type:{accelerator};count:{count};machine_type:{machine};install-nvidia-driver"
    assert hints["min_ram"] == f"{GPUS[gpu].machines[count].ram_gb}GB"


def test_engines_are_those_of_the_cluster_and_not_of_the_launcher(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("the launcher's GPUs were counted"))
    cluster = Cluster(**DATAFLOW, gpu="l4", gpus=4)
    assert _best_backend(options(), cluster) == "vllm"
    assert _engines(options(), cluster, "vllm", "reference") == (4, 1)
    sharded = options(engine_arg=["tensor_parallel_size=2"])
    assert _engines(sharded, cluster, "vllm", "reference") == (2, 2)
    assert _engines(options(), cluster, "transformers", "reference") == (4, 1)
    bare = Cluster(**DATAFLOW)
    assert _best_backend(options(), bare) == "transformers"
    assert _engines(options(), bare, "transformers", "reference") == (0, 1)


@pytest.mark.parametrize(
    "given,message",
    [
        ({"on": "dataflow"}, "--on dataflow needs --project"),
        ({"on": "dataflow", "project": "p"}, "needs --region"),
        ({"on": "dataflow", "project": "p", "region": "r"}, "needs --image"),
        ({"on": "flink"}, "--on flink needs --flink-master"),
        ({"on": "portable"}, "--on portable needs --job-endpoint"),
        ({"on": "flink", "flink_master": "h:1", "region": "r"}, "--region is for --on dataflow, not --on flink"),
        ({"on": "portable", "job_endpoint": "h:1", "flink_master": "h:2"}, "--flink-master is for --on flink"),
        (DATAFLOW | {"worker_pool": "h:1"}, "--worker-pool is for --on flink or portable"),
        (DATAFLOW | {"gpus": 2}, "--gpus needs --gpu"),
        (DATAFLOW | {"gpu": "h100", "gpus": 3}, "no machine has 3 H100 GPUs: use --gpus 1, 2, 4, 8"),
        (DATAFLOW | {"gpu": "t4"}, "Input should be 'l4', 'a100' or 'h100'"),
        ({"on": "portable", "job_endpoint": "h:1", "worker_pool": "h:2", "image": "i"}, "leave out --image"),
    ],
)
def test_what_a_cluster_lacks_is_one_line(given, message):
    with pytest.raises(ValidationError) as error:
        Cluster(**given)
    assert message in error.value.errors()[0]["msg"]


@pytest.mark.parametrize(
    "cluster,given,message",
    [
        ({}, {"out": "labelled"}, "labelled is on this machine"),
        ({}, {"corpus": ["gs://b/c", "corpus"]}, "corpus is on this machine"),
        ({}, {"out": "s3://b/d"}, "needs --temp-location"),
        ({"gpu": "l4"}, {"scorer": "server", "server": ["http://h:8000"]}, "leave out --gpu, or --scorer server"),
        ({"gpu": "l4"}, {"reference": None, "tokenizer": "t"}, "there is none"),
        ({"gpu": "l4"}, {"device": "cpu"}, "leave out one"),
        ({}, {"estimate": True}, "see lacy plan"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_line(cluster, given, message):
    with pytest.raises(UsageError, match=message):
        require_reach(Cluster(**DATAFLOW | cluster), options(**given))


def test_other_runners_may_share_a_folder():
    require_reach(Cluster(on="portable", job_endpoint="h:1"), options(corpus=["corpus"], out="labelled"))
    require_store(Cluster(on="flink", flink_master="h:1"), "labelled")
