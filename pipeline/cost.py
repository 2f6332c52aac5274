"""`lacy plan`: the time and money that a corpus of some size takes on Dataflow.

Arithmetic on rates. Each rate has a value and its source; each can be replaced by a file, by what
`lacy label --estimate` measured, or by a finished dataset.

    tagging   tokens / (vCPUs * tokens/s of one * efficiency)
    scoring   tokens * models / (GPUs * tokens/s of one * efficiency), after the tagging: in a batch job nothing passes
              the shuffle between them until it is complete
    deciding  tokens / (vCPUs * tokens/s of one * efficiency), on the machines that tag
    money     machine hours * (vCPUs, memory, disk, GPUs), bytes through the shuffle twice, requests, a month of storage
"""

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lacy.labelers.policies import PASSES
from lacy.pipeline.corpus.sources import MAX_PART_BYTES, kind_of
from lacy.pipeline.options import ROLES
from lacy.pipeline.runners.presets import DISK_GB, GPUS, TAGGER, TAGGER_CORES, TAGGER_RAM_GB
from lacy.schemas.errors import UsageError
from lacy.schemas.manifest import at, label_sets, read_complete

TESTED_PARTS = 100_000  # largest number in one dataset that has been tested
MOST_PART_BYTES = 16 << 20  # largest default: half an hour of tagging on one core
MOST_ELEMENT_BYTES = 100 << 20
MOST_MACHINES = 2000  # in one job on Dataflow


class Rate(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float = Field(gt=0)
    source: str


Rates = dict[str, Rate]


def _rates(source: str, **values: float) -> Rates:
    return {name: Rate(value=value, source=source) for name, value in values.items()}


_PRICES = "list price of us-central1, in dollars, 2025: check it"
DEFAULTS: Rates = {
    **_rates("measured: English encyclopedia, SmolLM2's tokenizer: 3.9 to 4.3", bytes_per_token=4.1),
    **_rates("measured: one core of an AMD EPYC (docs/performance.md)", tagging_tokens_per_second=5000),
    **_rates("the paper: Rho-1 took 56 A100 hours for a billion tokens", scoring_tokens_per_second_a100=4960),
    **_rates("assumed: the A100's, by dense bf16 peaks, 121 to 312 TFLOP/s", scoring_tokens_per_second_l4=1920),
    **_rates("assumed: the A100's, by dense bf16 peaks, 989 to 312 TFLOP/s", scoring_tokens_per_second_h100=15700),
    **_rates("measured: 2.5 million without files; with them assumed", deciding_tokens_per_second=1_000_000),
    **_rates("assumed; benchmarks/scale.py measures it", efficiency=0.9),
    **_rates("assumed: machines, an image of 20 GB, a model", start_hours=0.3),
    **_rates("measured: a MiB of text and its signals, Arrow and zstd", crossing_bytes_per_token=7.4),
    **_rates("measured: 7.4 (README), and 1.4 of text", signals_bytes_per_token=8.8),
    **_rates("measured (README)", labels_bytes_per_token=5.2),
    **_rates("counted (docs/stores.md), and each pass of lacy decide", reads_per_part=5 + PASSES + 1),
    **_rates("counted (docs/stores.md)", writes_per_part=4),
    **_rates(_PRICES, vcpu_hour=0.056, memory_gb_hour=0.003557, disk_gb_hour=0.000054, shuffle_gb=0.011),
    **_rates(_PRICES, gpu_hour_l4=0.672, gpu_hour_a100=3.72, gpu_hour_h100=11.755),
    **_rates(_PRICES, storage_gb_month=0.02, million_reads=0.4, million_writes=5),
}
OPTIONAL = ("scoring_tokens_per_second",)  # of any GPU


class Cost(BaseModel):
    """Hours are wall-clock hours unless named after a core or a GPU; money is in dollars."""

    tokens: float
    corpus_bytes: float
    part_bytes: int
    parts: int
    element_bytes: float  # of a part that crosses to the machines that score
    part_minutes: float  # of one core, which an interrupted part loses at most
    tagging_core_hours: float
    scoring_gpu_hours: float
    taggers: int
    tagger: str
    scorers: int
    scorer: str
    gpus: int  # of all machines
    hours_of: dict[str, float]
    hours: float
    shuffle_bytes: float
    signals_bytes: float
    labels_bytes: float
    reads: float
    writes: float
    money_of: dict[str, float]
    money: float
    storage_month: float
    notes: list[str]


def estimate_cost(
    tokens: float,
    rates: Rates = DEFAULTS,
    *,
    models: int = 1,
    gpu: str = "l4",
    gpus: int = 1,
    hours: float = 24.0,
    taggers: int | None = None,
    scorers: int | None = None,
    part_bytes: int | None = None,
) -> Cost:
    """The cost of `tokens` tokens with `models` models that score (0: grammar alone), on machines of `gpus` GPUs.

    Numbers of machines that are not given are chosen to end after `hours`, divided evenly between tagging and scoring.
    Raises UsageError.
    """
    if gpu not in GPUS or gpus not in GPUS[gpu].machines:
        raise UsageError(f"no machine has {gpus} {gpu.upper()} GPUs: --gpu l4, a100 or h100, --gpus 1, 2, 4 or 8")
    rate = {name: entry.value for name, entry in rates.items()}
    machine = GPUS[gpu].machines[gpus]
    start, efficiency = rate["start_hours"], rate["efficiency"]
    left = (hours - start) / (2 if models else 1)
    if left <= 0:
        raise UsageError(f"--hours {hours:g} is less than the {start:g} hours that machines take to start")
    core_hours = tokens / rate["tagging_tokens_per_second"] / 3600
    speed = rate.get("scoring_tokens_per_second", rate[f"scoring_tokens_per_second_{gpu}"])
    gpu_hours = tokens * models / speed / 3600
    taggers = taggers or math.ceil(core_hours / (left * TAGGER_CORES * efficiency))
    scorers = (scorers or math.ceil(gpu_hours / (left * gpus * efficiency))) if models else 0
    deciding = tokens / rate["deciding_tokens_per_second"] / 3600
    hours_of = {
        "start": start,
        "tagging": core_hours / (taggers * TAGGER_CORES * efficiency),
        "scoring": gpu_hours / (scorers * gpus * efficiency) if models else 0.0,
        "deciding": deciding / (taggers * TAGGER_CORES * efficiency),
    }
    corpus_bytes = tokens * rate["bytes_per_token"]
    part_bytes = part_bytes or _part_bytes(corpus_bytes)
    parts = math.ceil(corpus_bytes / part_bytes)
    crossing = rate["crossing_bytes_per_token"] if models else 0.0
    signals, labels = tokens * rate["signals_bytes_per_token"], tokens * rate["labels_bytes_per_token"]
    reads, writes = parts * rate["reads_per_part"], parts * rate["writes_per_part"]

    def machine_hour(cores: int, ram_gb: int) -> float:
        memory, disk = ram_gb * rate["memory_gb_hour"], DISK_GB * rate["disk_gb_hour"]
        return cores * rate["vcpu_hour"] + memory + disk

    tagger_hours = taggers * (start + hours_of["tagging"] + hours_of["deciding"])
    scorer_hours = scorers * (start + hours_of["scoring"]) if models else 0.0
    money_of = {
        "taggers": tagger_hours * machine_hour(TAGGER_CORES, TAGGER_RAM_GB),
        "scorers": scorer_hours * machine_hour(machine.cores, machine.ram_gb),
        "GPUs": scorer_hours * gpus * rate[f"gpu_hour_{gpu}"],
        "shuffle": 2 * tokens * crossing / 1e9 * rate["shuffle_gb"],
        "requests": reads / 1e6 * rate["million_reads"] + writes / 1e6 * rate["million_writes"],
    }
    cost = Cost(
        tokens=tokens,
        corpus_bytes=corpus_bytes,
        part_bytes=part_bytes,
        parts=parts,
        element_bytes=crossing * part_bytes / rate["bytes_per_token"],
        part_minutes=part_bytes / rate["bytes_per_token"] / rate["tagging_tokens_per_second"] / 60,
        tagging_core_hours=core_hours,
        scoring_gpu_hours=gpu_hours,
        taggers=taggers,
        tagger=TAGGER,
        scorers=scorers,
        scorer=machine.name,
        gpus=scorers * gpus,
        hours_of=hours_of,
        hours=sum(hours_of.values()),
        shuffle_bytes=tokens * crossing,
        signals_bytes=signals,
        labels_bytes=labels,
        reads=reads,
        writes=writes,
        money_of=money_of,
        money=sum(money_of.values()),
        storage_month=(signals + labels) / 1e9 * rate["storage_gb_month"],
        notes=[],
    )
    return cost.model_copy(update={"notes": _notes(cost, gpu)})


def _part_bytes(corpus_bytes: float) -> int:
    """The default of `lacy label`, doubled while the dataset would have more than TESTED_PARTS parts."""
    size = MAX_PART_BYTES
    while corpus_bytes / size > TESTED_PARTS and size < MOST_PART_BYTES:
        size *= 2
    return size


def _notes(cost: Cost, gpu: str) -> list[str]:
    notes = []
    if cost.part_bytes != MAX_PART_BYTES:
        notes.append(f"pass --part-bytes {cost.part_bytes} to lacy label")
    if cost.parts > TESTED_PARTS:
        datasets = math.ceil(cost.parts / TESTED_PARTS)
        notes.append(
            f"label the corpus as {datasets} datasets: one dataset is tested with up to {TESTED_PARTS:,} parts"
        )
    if cost.element_bytes > MOST_ELEMENT_BYTES:
        notes.append(f"a part crosses the shuffle as {cost.element_bytes / 1e6:,.0f} MB: use a smaller --part-bytes")
    if cost.part_minutes > 60:
        notes.append(f"a lost machine loses {cost.part_minutes:,.0f} minutes of each core: use a smaller --part-bytes")
    if max(cost.taggers, cost.scorers) > MOST_MACHINES:
        notes.append(f"a job has at most {MOST_MACHINES:,} machines: allow more --hours, or split the corpus")
    if cost.gpus:
        notes.append(
            f"the project needs a quota of {cost.gpus:,} {gpu.upper()} and {cost.taggers * TAGGER_CORES:,} CPUs"
        )
    return notes


def amount(text: str) -> float:
    """Parse an amount: 3000000000, 3e9 or 3B, with the suffixes K, M, B (or G) and T. Raises UsageError."""
    powers = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
    try:
        value = float(text[:-1]) * powers[text[-1].upper()] if text[-1:].upper() in powers else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UsageError(f"{text!r} is not a number: write it as 3000000000, 3e9 or 3B")
    return value


def with_file(rates: Rates, path: Path) -> Rates:
    """Replace rates by those of a JSON or YAML file: name: number, or name: {value: number, source: text}.

    Raises UsageError.
    """
    import yaml

    try:
        given = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--rates {path}: {str(error).splitlines()[0]}") from None
    if not isinstance(given, dict):
        raise UsageError(f"--rates {path} must map names to numbers, as in  efficiency: 0.8")
    replaced = dict(rates)
    for name, entry in given.items():
        if name not in DEFAULTS and name not in OPTIONAL:
            raise UsageError(f"--rates {path}: no rate {name!r}; there are {', '.join([*DEFAULTS, *OPTIONAL])}")
        try:
            replaced[name] = Rate.model_validate(
                entry if isinstance(entry, dict) else {"value": entry, "source": path.name}
            )
        except ValidationError as error:
            raise UsageError(f"--rates {path}: {name}: {error.errors()[0]['msg']}") from None
    return replaced


def with_dataset(rates: Rates, dataset: str) -> tuple[Rates, int]:
    """Replace rates by the sizes of a finished dataset; returns its tokens too. Raises DatasetError."""
    folder = at(dataset)
    manifest = read_complete(folder)
    sizes = {"signals_bytes_per_token": sum(part.bytes for part in manifest.parts) / manifest.tokens}
    kinds = [kind_of(file.path) for file in manifest.corpus]
    if all(kind and kind[1] == "" for kind in kinds) and not manifest.options.get("limit"):
        sizes["bytes_per_token"] = sum(file.bytes for file in manifest.corpus) / manifest.tokens
    for labels in list(label_sets(folder).values())[:1]:
        sizes["labels_bytes_per_token"] = sum(part.bytes for part in labels.parts) / manifest.tokens
    return rates | _rates(f"measured: {dataset}", **sizes), manifest.tokens


def measured(estimate: Any) -> dict[str, dict[str, Any]]:
    """The result of `lacy.pipeline.estimate.estimate` as the content of a file for `with_file`."""
    tokens = estimate.tokens.value
    by_core = [hours.value for stage, hours in estimate.stages.items() if stage not in ROLES]
    values = {
        "bytes_per_token": estimate.corpus_bytes.value / tokens,
        "tagging_tokens_per_second": tokens / (3600 * sum(by_core)),
        "signals_bytes_per_token": estimate.signals_bytes.value / tokens,
        "labels_bytes_per_token": estimate.labels_bytes.value / tokens,
    }
    if "reference" in estimate.engines:
        values["scoring_tokens_per_second"] = tokens / (3600 * estimate.stages["reference"].value)
    source = f"measured: {estimate.sample_tokens:,} tokens of the corpus"
    return {name: {"value": value, "source": source} for name, value in values.items()}
