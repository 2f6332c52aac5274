"""Options of a training run, merged from flags, a YAML file and, when a run is resumed, the run's own record."""

from pathlib import Path
from typing import Any, Final, Literal, Self, get_args

from pydantic import Field, model_validator

from lacy.schemas.errors import UsageError
from lacy.schemas.options import Options, option
from lacy.trainer.paths import dataset_of

ObjectiveName = Literal[
    "standard", "lacy", "lacy-static", "loss", "rho", "judge", "random",
    "ignore-lacy", "ignore-lacy-static", "ignore-loss", "ignore-rho", "ignore-judge", "ignore-random",
]  # fmt: skip
LearnSoftmax = Literal["full", "without_call", "detached"]
OBJECTIVES: Final[tuple[str, ...]] = get_args(ObjectiveName)
LEARN_SOFTMAX: Final[tuple[str, ...]] = get_args(LearnSoftmax)


class TrainConfig(Options):
    """Validated when built. A step is one update of the weights, by all ranks together."""

    dataset: str = Field(
        description="Folder that lacy label wrote, or its URL.",
        json_schema_extra={"argument": True, "metavar": "DATASET"},
    )
    out: Path = Field(description="Run: a new folder, or one to resume.", json_schema_extra={"panel": "Run"})

    labels: str | None = option(None, "Label set.", unset="lacy, or the first", panel="Data")
    holdout: float = option(0.01, "Share of the documents kept for validation.", ge=0, lt=1)
    context: int | None = option(None, "Tokens in one sequence.", unset="the model's context", ge=2)
    mask_documents: bool = option(False, "Block attention from one document to another.")
    buffer_tokens: int = option(4_000_000, "Tokens shuffled together by each loader.", ge=1)
    loader_workers: int = option(1, "Loader processes of each rank.", ge=0)

    model: str = option(
        "gpt2-334m",
        "Preset (gpt2-334m, gpt2-1.3b, llama-334m, llama-1.3b or tiny) or model folder.",
        panel="Model and objective",
        metavar="PRESET|FOLDER",
    )
    objective: ObjectiveName = option("lacy", "Rule that gives each position its target.")
    budget: float = option(0.15, "Share of the tokens that may be chosen.", ge=0, le=1)
    learn_softmax: LearnSoftmax = option("full", "Softmax used where the target is the true token.")
    dropout: float = option(0.0, "Dropout of a preset; a model folder has its own.", ge=0, lt=1)

    max_steps: int | None = option(
        None, "Updates of the weights. The first limit reached ends the run.", panel="Length of the run", ge=1
    )
    gt_tokens: int | None = option(None, "Tokens trained on their true token.", ge=1)
    epochs: float | None = option(None, "Passes over the data.", unset="1 if no limit is given", gt=0)

    batch: int = option(8, "Sequences in one forward pass of one rank.", panel="Optimizer", ge=1)
    accumulate: int = option(1, "Forward passes in one step.", ge=1)
    lr: float | None = option(None, "Peak learning rate.", unset="the preset's", gt=0)
    min_lr: float = option(0.1, "Learning rate at the end, as a share of the peak.", ge=0, le=1)
    schedule: Literal["cosine", "wsd", "constant"] = option("cosine", "Schedule of the learning rate.")
    warmup: int | None = option(None, "Warm-up steps.", unset="200, a tenth of the run at most", ge=0)
    decay: float = option(0.2, "Share of a run with wsd in which the learning rate decays.", gt=0, le=1)
    beta1: float = option(0.9, "First beta of AdamW.", ge=0, lt=1)
    beta2: float = option(0.95, "Second beta of AdamW.", ge=0, lt=1)
    weight_decay: float = option(0.1, "Weight decay of matrices.", ge=0)
    clip: float = option(1.0, "Norm to which gradients are clipped.", gt=0)
    seed: int = option(0, "Seed of weights, order and random choice.", ge=0)

    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device.", panel="Hardware")
    precision: Literal["auto", "fp32", "tf32", "bf16"] = option(
        "auto", "Arithmetic; auto is bf16 on a GPU that has it, else fp32."
    )
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile; auto is on for a GPU.")
    parallel: Literal["ddp", "fsdp"] = option("ddp", "Parallelism of several ranks.")
    checkpoint_activations: bool = option(False, "Recompute activations: less memory, a third more time.")
    deterministic: bool = option(False, "Deterministic GPU kernels: slower; a CPU is always deterministic.")

    save_every: int = option(1000, "Steps between checkpoints.", panel="Checkpoints and logs", ge=1)
    keep: int = option(2, "Number of latest checkpoints to keep.", ge=1)
    keep_every: int | None = option(
        None, "Also keep every checkpoint whose step is a multiple of this.", unset="none", ge=1
    )
    eval_every: int = option(500, "Steps between validations.", ge=1)
    eval_tokens: int = option(500_000, "Maximum tokens per validation.", ge=1)
    log_every: int = option(10, "Steps between lines of log.jsonl.", ge=1)
    tensorboard: bool = option(True, "Write OUT/tensorboard.")
    wandb: str | None = option(None, "Weights & Biases project to log to.", metavar="PROJECT")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.precision == "tf32" and self.device == "cpu":
            raise ValueError("--precision tf32 is for GPUs")
        if self.mask_documents and self.dropout:
            raise ValueError("--dropout with --mask-documents: attention within documents has none")
        return self


# Options that may change when a run is resumed. The limits are among them, though they bend the schedule.
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


def load(flags: dict[str, Any], file: Path | None = None, resume: bool = False) -> TrainConfig:
    """Merge options: flags override the YAML file, which overrides the record of a resumed run, then the defaults.

    Raises UsageError for a file that cannot be read, for a folder in use, and for a resumed run whose options differ
    from those that it began with; pydantic.ValidationError for a value out of range.
    """
    given = (_read(file) if file else {}) | flags
    out = Path(given["out"]) if "out" in given else None
    record = out / "config.yaml" if out else None
    if record is None or not record.exists():
        if out is not None and out.exists() and any(out.iterdir()):
            raise UsageError(f"{out} has files in it and is not a run: choose a new folder with --out")
        return TrainConfig(**given)
    if not resume:
        raise UsageError(f"{out} holds a run: resume it with --resume, or choose a new folder with --out")
    before = _read(record)
    config = TrainConfig(**(before | dataset_of(before, record.parent) | given))
    old = TrainConfig(**before)
    for name in TrainConfig.model_fields:
        if name not in FREE and getattr(config, name) != getattr(old, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} was {getattr(old, name)} when {out} began, and is {getattr(config, name)} now: "
                f"leave it as it was, or begin a new run with another --out"
            )
    return config


def save(config: TrainConfig) -> None:
    """Write OUT/config.yaml, which `load` reads."""
    import yaml

    from lacy.schemas.files import write_atomic

    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    write_atomic(config.out / "config.yaml", text.encode())


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        options = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise UsageError(f"cannot read {file}: {reason}") from None
    if not isinstance(options, dict):
        raise UsageError(f"{file} does not consist of `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in options.items()}
