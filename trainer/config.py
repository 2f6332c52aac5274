"""What a training run is asked to do: one model, from flags, a YAML file and, on resuming, the run's own record."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from lacy.schemas.errors import TrainingError
from lacy.schemas.files import write_atomic
from lacy.trainer import objectives
from lacy.trainer.paths import dataset_of


class TrainConfig(BaseModel):
    """Validated when built. Counts of tokens are targets; a step is one update of the weights, by all ranks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # what is learnt from
    dataset: str  # a folder, or a URL of an object store
    labels: str | None = None  # the label set; None: lacy, or the first
    holdout: float = Field(default=0.01, ge=0, lt=1)  # share of the documents kept for validation
    context: int | None = Field(default=None, ge=2)  # tokens of a sequence; None: the model's
    mask_documents: bool = False  # no attention from one document to another
    buffer_tokens: int = Field(default=4_000_000, ge=1)  # that are shuffled together, in each loader
    loader_workers: int = Field(default=1, ge=0)  # processes, for each rank

    # what learns
    model: str = "gpt2-334m"  # a preset, or a model folder
    objective: str = "lacy"
    budget: float = Field(default=0.15, ge=0, le=1)  # share of the tokens that may be chosen
    learn_softmax: Literal["full", "without_call", "detached"] = "full"

    # how it learns
    batch: int = Field(default=8, ge=1)  # sequences in one forward pass of one rank
    accumulate: int = Field(default=1, ge=1)  # forward passes in a step
    lr: float | None = Field(default=None, gt=0)  # None: the preset's
    min_lr: float = Field(default=0.1, ge=0, le=1)  # share of lr at the end
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int | None = Field(default=None, ge=0)  # steps; None: 200, or a tenth of the run
    decay: float = Field(default=0.2, gt=0, le=1)  # the last share of a run with wsd
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    weight_decay: float = Field(default=0.1, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)  # of a preset; a folder has its own
    clip: float = Field(default=1.0, gt=0)  # norm of the gradient
    seed: int = Field(default=0, ge=0)

    # how long: the first limit that is reached ends the run; with none it is one epoch
    max_steps: int | None = Field(default=None, ge=1)
    gt_tokens: int | None = Field(default=None, ge=1)  # tokens with the gradient of their true token
    epochs: float | None = Field(default=None, gt=0)

    # on what
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"  # auto: bf16 on a GPU that has it
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    parallel: Literal["ddp", "fsdp"] = "ddp"  # of several ranks
    checkpoint_activations: bool = False
    deterministic: bool = False  # on a GPU, at the price of speed; a CPU always is

    # what is kept and told
    out: Path
    save_every: int = Field(default=1000, ge=1)  # steps
    keep: int = Field(default=2, ge=1)  # last checkpoints
    keep_every: int | None = Field(default=None, ge=1)  # steps: checkpoints at its multiples stay
    eval_every: int = Field(default=500, ge=1)  # steps
    eval_tokens: int = Field(default=500_000, ge=1)
    log_every: int = Field(default=10, ge=1)  # steps
    tensorboard: bool = True
    wandb: str | None = None  # project

    @field_validator("objective")
    @classmethod
    def _known(cls, value: str) -> str:
        objectives.parse(value)
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("--precision tf32 is for GPUs")
        if self.mask_documents and self.dropout:
            raise ValueError("--dropout with --mask-documents: attention within documents has none")
        return self


# What may differ when a run is resumed. The limits are among them, though they bend the learning rate's schedule.
FREE = frozenset(
    {
        "dataset",
        "out",
        "device",
        "compile",
        "checkpoint_activations",
        "max_steps",
        "gt_tokens",
        "epochs",
        "save_every",
        "keep",
        "keep_every",
        "eval_every",
        "eval_tokens",
        "log_every",
        "tensorboard",
        "wandb",
    }
)


def load(flags: dict[str, Any], file: Path | None, resume: bool) -> TrainConfig:
    """Flags go before the YAML file, the file before what a resumed run has on record, that before the defaults.

    Raises TrainingError for a file that cannot be read, for a folder that is in use, and for a resumed run that is
    asked for something else than it began with; pydantic.ValidationError for a value out of range.
    """
    given = (_read(file) if file else {}) | flags
    out = Path(given["out"]) if "out" in given else None
    record = out / "config.yaml" if out else None
    if record is None or not record.exists():
        if out is not None and out.exists() and any(out.iterdir()):
            raise TrainingError(f"{out} has files in it and is no run: name a new folder with --out")
        return TrainConfig(**given)
    if not resume:
        raise TrainingError(f"{out} holds a run: go on with it by --resume, or name a new folder with --out")
    before = _read(record)
    config = TrainConfig(**(before | dataset_of(before, record.parent) | given))
    old = TrainConfig(**before)
    for name in TrainConfig.model_fields:
        if name not in FREE and getattr(config, name) != getattr(old, name):
            flag = "--" + name.replace("_", "-")
            raise TrainingError(
                f"{flag} was {getattr(old, name)} when {out} began, and is {getattr(config, name)} now: "
                f"leave it as it was, or begin a new run with another --out"
            )
    return config


def save(config: TrainConfig) -> None:
    """Write OUT/config.yaml, which `load` reads."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomic(config.out / "config.yaml", text.encode())


def _read(file: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise TrainingError(f"cannot read {file}: {reason}") from None
    if not isinstance(found, dict):
        raise TrainingError(f"{file} is not a list of `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in found.items()}
