"""Options of a labelling run. Validated when built; those that decide bytes go to the manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from lacy.pipeline.runners.presets import Cluster, require_store
from lacy.schemas.errors import UsageError
from lacy.schemas.options import Options, option

DEFAULT_REFERENCE = "smollm2-135m"
DEFAULT_SPACY = "en_core_web_sm"
DEFAULT_BUDGET = 0.15
ROLES = ("reference", "student", "judge")

Backend = Literal["transformers", "vllm", "server"]
PolicyName = Literal["lacy", "loss", "rho", "gain", "judge", "factual", "random", "none"]
Action = Literal["delegate", "ignore"]


def _located(value: Any) -> Any:
    from lacy.schemas.manifest import at  # loads pyarrow, which --help can do without

    return at(value)


class LabelOptions(Options):
    """What `lacy label` measures, by which models, and where it puts the dataset."""

    corpus: list[str] = Field(
        min_length=1,
        description="Files, folders or globs: .jsonl .parquet .txt, MediaWiki .xml; .gz .zst .bz2; "
        "on any filesystem that Beam reads.",
        json_schema_extra={"argument": True, "metavar": "CORPUS"},
    )
    out: Annotated[Path, PlainValidator(_located)] = Field(
        description="Dataset: a new folder or URL, or one that the same command began."
    )

    reference: str | None = option(
        DEFAULT_REFERENCE,
        "Model that scores the corpus: a folder, a hub name, the embedded smollm2-135m, "
        "or none to use only the grammar.",
        panel="Models",
    )
    tokenizer: str | None = option(
        None, "Tokenizer of the small model: folder or hub name.", unset="the reference model's"
    )
    student: str | None = option(None, "Second, student-size model that scores the corpus.")
    judge: str | None = option(None, "Chat model that marks what a small model cannot infer, for --policy judge.")
    spacy: str = option(DEFAULT_SPACY, "English spaCy pipeline: package or folder.")
    trust_remote_code: bool = option(False, "Run code that comes with a model.")

    scorer: Literal["auto", "transformers", "vllm", "server"] = option(
        "auto", "Engine that scores; auto is vllm on a GPU that has it, else transformers.", panel="Engines"
    )
    server: list[str] = option(
        [], "OpenAI-compatible servers for --scorer server; LACY_API_KEY holds the key.", metavar="URL[,URL...]"
    )
    judge_server: list[str] = option([], "Servers of the judge.", metavar="URL[,URL...]", unset="vLLM here")
    concurrency: int = option(16, "Requests in flight on one server, over all workers.", ge=1)
    engines: int | None = option(None, "Processes on one machine that hold a model.", unset="one for each GPU", ge=1)
    engine_arg: dict[str, dict[str, Any]] = option(
        {}, "vLLM argument, as tensor_parallel_size=2 or judge.max_model_len=8192.", metavar="[ROLE.]KEY=VALUE"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "Precision of the models; auto is float32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", "Device of the models; auto is cuda if available.")
    window: int | None = option(
        None, "Tokens that the reference reads at once.", unset="its context, 2048 at most", ge=2
    )
    overlap: int | None = option(
        None, "Tokens that a window shares with the one before it.", unset="a quarter of the window", ge=1
    )
    batch_tokens: int | None = option(None, "Tokens in one batch of the reference.", ge=1)

    attributes: bool = option(False, "Count attributes as facts.", panel="Facts and parts")
    headings: bool = option(False, "Count words of headings as facts.")
    align: Literal["first", "last"] = option("first", "Character of a token that decides which word it belongs to.")
    text: bool = option(True, "Leave the text of the documents out of the dataset.")
    limit: int | None = option(None, "Label only the first N documents.", ge=1)
    part_bytes: int | None = option(None, "Corpus bytes in one part.", unset="1 MiB, less for a small corpus", ge=1024)
    max_bad: float = option(1.0, "Share of bad records above which the run fails.", ge=0, le=1)
    workers: int = option(1, "Worker processes.", unset="one for each core", panel="Run", ge=1)
    threads: int = option(1, "Threads of one worker; can change the last bits of a score.", ge=1)
    estimate: bool = option(False, "Label a sample, and estimate what the whole corpus takes.")

    @field_validator("reference", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return None if value == "none" else value

    @field_validator("server", "judge_server", mode="before")
    @classmethod
    def _urls(cls, value: Any) -> Any:
        """Each entry of the list may hold several URLs, separated by commas."""
        return [url.strip() for entry in value or [] for url in str(entry).split(",") if url.strip()]

    @field_validator("engine_arg", mode="before")
    @classmethod
    def _arguments(cls, value: Any) -> Any:
        """`key=value` for all roles, or `role.key=value`; a value is parsed as JSON, else kept as a string."""
        if isinstance(value, dict):
            return value
        arguments: dict[str, dict[str, Any]] = {}
        for entry in value or []:
            key, equals, text = str(entry).partition("=")
            role, dot, rest = key.partition(".")
            named = bool(dot) and role in ROLES
            name = (rest if named else key).replace("-", "_")
            if not equals or not name.isidentifier():
                raise ValueError(f"{entry!r} is not key=value")
            for one in (role,) if named else ROLES:
                arguments.setdefault(one, {})[name] = _value(text)
        return arguments

    @model_validator(mode="after")
    def _consistent(self) -> "LabelOptions":
        if self.overlap is not None and self.window is not None and self.overlap >= self.window:
            raise ValueError(f"--overlap {self.overlap} must be less than --window {self.window}")
        if self.reference is None and self.tokenizer is None:
            raise ValueError("--reference none needs --tokenizer")
        if self.reference is None:
            for name in ("student", "window", "overlap", "batch_tokens", "server"):
                if getattr(self, name):
                    raise ValueError(f"--{name.replace('_', '-')} needs a --reference, and there is none")
        if self.scorer == "server" and not self.server:
            raise ValueError("--scorer server needs --server URL")
        if self.server and self.scorer not in ("server", "auto"):
            raise ValueError(f"--server is for --scorer server, not {self.scorer}")
        if self.estimate and self.limit:
            raise ValueError("--estimate is for the whole corpus: leave out --limit")
        if self.judge_server and self.judge is None:
            raise ValueError("--judge-server needs --judge MODEL, the name that the server gives its model")
        return self

    def signals(self) -> dict[str, Any]:
        """Every option that can change a byte of the signals."""
        apart = {"corpus", "out", "workers", "max_bad", "trust_remote_code"}
        apart |= {"server", "judge_server", "concurrency", "engines", "estimate"}
        return self.model_dump(exclude=apart)


class DecideOptions(Options):
    """How labels follow from what was measured."""

    policy: PolicyName = option("lacy", "Rule that chooses tokens (docs/policies.md).", panel="Labels")
    budget: float | None = option(
        None, "Share of all tokens that may be chosen.", unset=f"{DEFAULT_BUDGET:g}", ge=0, le=1
    )
    action: Action = option("delegate", "Label of chosen tokens; ignore masks them instead.")
    name: str | None = option(None, "Name of the label set.", unset="the policy's")
    seed: int = option(0, "Random seed, for the policy random and for ties.")


def require_reach(cluster: Cluster, options: LabelOptions) -> None:
    """Raises UsageError for what the machines of a cluster cannot do or reach."""
    if options.estimate:
        raise UsageError("--estimate labels its sample on this machine: leave out --on, and see lacy plan")
    if cluster.gpu and options.scorer == "server":
        raise UsageError("--gpu is for models on the cluster's own machines: leave out --gpu, or --scorer server")
    if cluster.gpu and not (options.reference or options.judge):
        raise UsageError("--gpu needs a model, and there is none: leave it out, or pass a --reference")
    if cluster.gpu and options.device == "cpu":
        raise UsageError("--gpu and --device cpu: leave out one of them")
    require_store(cluster, str(options.out))
    here = [path for path in options.corpus if "://" not in path]
    if cluster.on == "dataflow" and here:
        raise UsageError(f"{here[0]} is on this machine, out of reach of Dataflow: copy it to gs://")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the run: what loads it, and where.

    factory    "module:function" in labelers, called with `arguments`
    tokenizer  the model's own tokenizer, where its token ids differ from the target's
    engines    processes on one machine that hold the model; 0: each worker holds it
    gpus       GPUs of each engine
    """

    role: str
    model: str
    backend: Backend
    factory: str
    arguments: dict[str, Any]
    tokenizer: str | None = None
    engines: int = 0
    gpus: int = 1


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)
