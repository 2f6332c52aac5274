# syntax=docker/dockerfile:1
# Pretraining under torchrun: docs/docker.md.
#
#   docker build --file docker/train.Dockerfile --tag lacy-train .
#   docker run --gpus all lacy-train --nproc-per-node gpu -m lacy train DATASET --out RUN
#
# CUDA comes as the packages that torch is pinned to.

ARG PYTHON_VERSION=3.11
ARG PYTHON_IMAGE=python:${PYTHON_VERSION}-slim-bookworm

FROM ${PYTHON_IMAGE}
RUN useradd --uid 1000 --create-home lacy
WORKDIR /opt/lacy
COPY docker/install-compiler.sh docker/
RUN docker/install-compiler.sh
COPY docker/install-packages.sh docker/
COPY requirements/train.lock requirements/
RUN docker/install-packages.sh requirements/train.lock
COPY docker/install-lacy.sh docker/
RUN --mount=type=bind,target=/source,rw docker/install-lacy.sh /source
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 1000
WORKDIR /home/lacy
ENTRYPOINT ["torchrun"]
CMD ["--help"]
