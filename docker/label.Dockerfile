# syntax=docker/dockerfile:1
# Beam's workers that label, on Dataflow, Flink and other runners; a launcher of Flex Templates; the command lacy.
# Arguments: docs/docker.md.
#
#   docker build --file docker/label.Dockerfile --target cpu --tag lacy-label:cpu .
#   docker build --file docker/label.Dockerfile --target gpu --tag lacy-label:gpu .
#
# CUDA comes as the packages that torch and vLLM are pinned to. A base image with CUDA would bring a second one that
# nothing loads, and another Python than that of the target cpu, which launches what the target gpu runs.

ARG PYTHON_VERSION=3.11
ARG BEAM_VERSION=2.77.0
ARG PYTHON_IMAGE=python:${PYTHON_VERSION}-slim-bookworm
ARG BEAM_IMAGE=apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION}
ARG LAUNCHER_IMAGE=gcr.io/dataflow-templates-base/python311-template-launcher-base:20230622_RC00

FROM ${BEAM_IMAGE} AS beam
FROM ${LAUNCHER_IMAGE} AS launcher

FROM ${PYTHON_IMAGE} AS base
RUN useradd --uid 1000 --create-home lacy
WORKDIR /opt/lacy
COPY --from=beam /opt/apache/beam /opt/apache/beam
COPY --from=launcher /opt/google/dataflow/python_template_launcher /opt/google/dataflow/
COPY docker/install-packages.sh docker/
# 1: no run downloads what was not baked in.
ARG HF_HUB_OFFLINE=1
# Threads: the runner starts one process for each core. Home: models, baked in or fetched from a bucket.
ENV HF_HUB_OFFLINE=${HF_HUB_OFFLINE} \
    HF_HOME=/opt/lacy/home/hub \
    LACY_HOME=/opt/lacy/home \
    OMP_NUM_THREADS=1 \
    OPENBLAS_NUM_THREADS=1 \
    MKL_NUM_THREADS=1 \
    RAYON_NUM_THREADS=1 \
    RUN_PYTHON_SDK_IN_DEFAULT_ENVIRONMENT=1 \
    FLEX_TEMPLATE_PYTHON_PY_FILE=/opt/lacy/docker/template.py
# As root, since Dataflow mounts folders of root's for Beam's boot to write to. Nothing else needs it: where the engine
# lets you choose (docker run --user, runAsUser), choose lacy, 1000.
ENTRYPOINT ["/opt/apache/beam/boot"]

FROM base AS packages-cpu
# An index with torch for CPUs alone. Without it, torch brings CUDA along, which is ten times the size.
ARG PIP_EXTRA_INDEX_URL=
COPY requirements/label.lock requirements/
RUN docker/install-packages.sh requirements/label.lock

FROM base AS packages-gpu
# For the runtime that hands GPUs to containers, and where Dataflow puts the driver.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
COPY docker/install-compiler.sh docker/
RUN docker/install-compiler.sh
COPY requirements/gpu.lock requirements/
RUN docker/install-packages.sh requirements/gpu.lock

# Only the models are copied from here, so that a change in the source that leaves them alone costs no layer.
FROM packages-cpu AS baked
# Names that lacy label --reference takes, divided by spaces; empty: none.
ARG REFERENCE=smollm2-135m
ENV HF_HOME=/baked/home/hub \
    LACY_HOME=/baked/home
COPY docker/models /baked/home/models
COPY docker/bake-models.sh docker/
COPY schemas schemas
COPY labelers labelers
COPY lacy/__init__.py lacy/
RUN --mount=type=secret,id=hf_token HF_TOKEN_PATH=/run/secrets/hf_token docker/bake-models.sh "${REFERENCE}"

FROM packages-cpu AS cpu
COPY --from=baked /baked /opt/lacy
COPY docker/install-lacy.sh docker/template.py docker/template.json docker/
RUN --mount=type=bind,target=/source,rw docker/install-lacy.sh /source

FROM packages-gpu AS gpu
COPY --from=baked /baked /opt/lacy
COPY docker/install-lacy.sh docker/template.py docker/template.json docker/
RUN --mount=type=bind,target=/source,rw docker/install-lacy.sh /source
