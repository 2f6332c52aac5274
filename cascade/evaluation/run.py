"""Evaluations from beginning to end: open the models, measure, save the result, or return the one saved before.

Each takes `tell(step, done, total)`, which hears how far a step is.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from lacy.cascade.evaluation import factscore as scoring
from lacy.cascade.evaluation import leakage as leaking
from lacy.cascade.evaluation import results
from lacy.cascade.evaluation.answers import Remembering
from lacy.cascade.evaluation.knowledge import open_knowledge
from lacy.cascade.evaluation.options import FactscoreModels, FactscoreOptions, LeakageOptions, NluOptions
from lacy.cascade.evaluation.results import Result
from lacy.cascade.generate import generate, require_answered
from lacy.cascade.language_model import Model, open_model, results_folder
from lacy.cascade.opening import open_cascade, open_partner, open_slm
from lacy.cascade.options import DeviceOptions, GenerateOptions, PartnerOptions
from lacy.cascade.prompts import read_lines
from lacy.labelers.llm.model_folders import fingerprint
from lacy.schemas.errors import UsageError
from lacy.schemas.files import write_atomic

PATIENCE = 60.0  # seconds without any server of a judge
Tell = Callable[[str, int, int], None]


def leakage(
    run: Path,
    options: LeakageOptions,
    who: PartnerOptions,
    how: GenerateOptions,
    device: DeviceOptions,
    *,
    again: bool,
    tell: Tell,
) -> Result:
    """Which facts the small model, or with a partner the cascade, writes when it is asked for them."""
    with open_cascade(str(run), who, how, device) as (model, partner, settled):
        step = "containment" if partner else "leakage"
        return leaking.evaluate(
            model,
            partner,
            options,
            settled,
            identity=who.identity,
            again=again,
            tell=lambda done, total: tell(step, done, total),
        )


def factscore(
    run: Path,
    entities: Path,
    knowledge: Path,
    options: FactscoreOptions,
    models: FactscoreModels,
    who: PartnerOptions,
    how: GenerateOptions,
    device: DeviceOptions,
    *,
    template: str,
    index: Path | None,
    again: bool,
    tell: Tell,
) -> Result:
    """FActScore: write about entities, split the texts into facts, verify them.

    entities   file with one name per line
    knowledge  what facts are checked against: a dataset, or .jsonl or .parquet files
    template   prompt, with {} for the name
    index      folder of the knowledge's index; None: beside the results

    Texts and answers of the chat models are kept on disk, so that a rerun asks only what is new.
    """
    names = [line.strip() for line in read_lines(entities) if line.strip()]
    if not names:
        raise UsageError(f"{entities} has no names: write one name per line")
    if "{}" not in template:
        raise UsageError("--template has no {} for the name")
    model, settled = open_slm(str(run), who, how, device)
    folder = results_folder(model.folder.absolute())
    splitter_name = models.splitter or models.judge
    splitter_servers = models.splitter_server or ([] if models.splitter else models.judge_server)
    asked = {
        "entities": names,
        "template": template,
        "knowledge": _identity(knowledge),
        "splitter": splitter_name,
        "judge": models.judge,
        "prompts": {name: scoring.prompt(name).sha256 for name in ("split", "verify")},
        **who.identity,
        "generating": settled.model_dump(exclude={"batch"}),
        **options.model_dump(exclude={"batch"}),
    }
    saved = None if again else results.read(folder, "factscore")
    if saved is not None and saved[0].options == asked:
        return saved[0]
    source = open_knowledge(
        knowledge, index or folder.parent / "knowledge", tell=lambda done, total: tell("passages", done, total)
    )
    texts, calls = _write_texts(model, who, settled, names, template, folder / "factscore.texts.json", tell)

    def open_chat(name: str, servers: list[str]) -> Remembering:
        identity = name if servers else json.dumps(fingerprint(name), sort_keys=True)
        answers = folder / "factscore.answers.jsonl"
        return Remembering(lambda: _chat(name, servers, who.trust_remote_code), identity, answers)

    splitter = open_chat(splitter_name, splitter_servers)
    try:
        splits = scoring.split(splitter, names, texts, options, tell=lambda done, total: tell("split", done, total))
    finally:
        splitter.close()  # two models in this process might not fit side by side
    judge = open_chat(models.judge, models.judge_server)
    try:
        judgements = scoring.verify(
            judge, source, splits, options, tell=lambda done, total: tell("verify", done, total)
        )
    finally:
        judge.close()
    summary = scoring.summary(judgements, options)
    result = Result(
        kind="factscore",
        checkpoint=model.folder.name,
        options=asked,
        figures=summary.figures.model_dump() | calls,
        details={"judgements": [judgement.model_dump() for judgement in summary.judgements], "texts": texts},
    )
    results.save(folder, result, pa.Table.from_pylist([item.model_dump() for item in summary.items]))
    return result


def nlu(run: Path, tasks: Sequence[str], options: NluOptions, device: DeviceOptions) -> Result:
    """Language understanding, with <CALL> forbidden."""
    from lacy.cascade.evaluation import nlu as understanding

    model = open_model(run.absolute(), **device.model_dump())
    result, units = understanding.evaluate(model, tasks, **options.model_dump())
    results.save(results_folder(model.folder), result, units)
    return result


def _write_texts(
    model: Model, who: PartnerOptions, how: GenerateOptions, names: list[str], template: str, file: Path, tell: Tell
) -> tuple[list[str], dict[str, float]]:
    """What the cascade writes about each name, and its calls; kept in a file, as a judge may fail hours later."""
    prompts = [template.replace("{}", name) for name in names]
    asked = {"prompts": prompts, "who": who.identity, "how": how.model_dump(exclude={"batch"})}
    try:
        before = json.loads(file.read_bytes())
        if before["asked"] == asked:
            return before["texts"], before["calls"]
    except (OSError, ValueError, LookupError, TypeError):
        pass  # there is no such file yet, or an incomplete one
    written = []
    with open_partner(model, who, how) as partner:
        for text in generate(model, prompts, partner, how):
            written.append(text)
            tell("generate", len(written), len(prompts))
    require_answered(written)
    texts = [text.text for text in sorted(written, key=lambda text: text.index)]
    positions = sum(text.positions for text in written)
    calls = {
        "called": sum(text.calls for text in written) / max(1, positions),
        "missed": float(sum(text.missed for text in written)),
    }
    write_atomic(file, json.dumps({"asked": asked, "texts": texts, "calls": calls}).encode())
    return texts, calls


def _identity(source: Path) -> list[Any]:
    """Names, sizes and times of the files of a source."""
    files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.exists()]


def _chat(model: str, servers: list[str], trust_remote_code: bool) -> Any:
    from lacy.labelers.llm.load import chat

    if servers:
        return chat("server", model, servers=[url for given in servers for url in given.split(",")], patience=PATIENCE)
    return chat("vllm", model, trust_remote_code=trust_remote_code)
