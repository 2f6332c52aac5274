"""The path of the dataset in a run's record, which is valid from any folder and after both have moved together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def absolute(location: str) -> str:
    """A path without reference to the current folder; a URL as it is."""
    return location if "://" in location else os.path.abspath(location)


def dataset_of(record: Mapping[str, Any], run: Path) -> dict[str, str]:
    """Find the dataset of a run, as an update of its record, by the absolute path or relative to the run's folder.

    The recorded path stays where neither leads to a dataset. Empty for a record that lacks its paths.
    """
    dataset, out = record.get("dataset"), record.get("out")
    if not isinstance(dataset, str) or not isinstance(out, str):
        return {}
    if "://" not in dataset and not os.path.exists(os.path.join(dataset, "manifest.json")):
        moved = os.path.normpath(run.absolute() / os.path.relpath(dataset, out))
        if os.path.exists(os.path.join(moved, "manifest.json")):
            return {"dataset": moved}
    return {"dataset": dataset}
