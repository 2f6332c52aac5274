"""Compact descriptions of work as a Beam collection: they are part of a job's request, whose size services limit."""

import pickle
import zlib
from collections.abc import Sequence
from typing import Any

import apache_beam as beam

PACKED = 1000  # descriptions in one element; services accept requests of up to 10 MB


def listed(pipeline: beam.Pipeline, name: str, items: Sequence[Any], kind: type) -> beam.PCollection:
    """The items as a collection of elements of type `kind`."""
    packed = [pack(items[at : at + PACKED]) for at in range(0, len(items), PACKED)]
    return pipeline | name >> beam.Create(packed) | f"unpack {name}" >> beam.FlatMap(unpack).with_output_types(kind)


def pack(items: Sequence[Any]) -> bytes:
    return zlib.compress(pickle.dumps(items))


def unpack(packed: bytes) -> list[Any]:
    return pickle.loads(zlib.decompress(packed))
