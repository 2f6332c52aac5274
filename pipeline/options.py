"""Options of a labelling run. Validated when built; those that decide bytes go to the manifest."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, field_validator, model_validator

from lacy.pipeline.runners.presets import Cluster, require_store
from lacy.schemas.errors import UsageError
from lacy.schemas.manifest import at

DEFAULT_REFERENCE = "smollm2-135m"
DEFAULT_SPACY = "en_core_web_sm"
ROLES = ("reference", "student", "judge")

Backend = Literal["transformers", "vllm", "server"]


class LabelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: list[str] = Field(min_length=1)
    out: Annotated[Path, PlainValidator(at)]
    tokenizer: str | None = None  # None: the reference's
    reference: str | None = DEFAULT_REFERENCE  # None: no scores, grammar only
    student: str | None = None
    scorer: Literal["auto", "transformers", "vllm", "server"] = "auto"
    server: list[str] = []  # base URLs of model servers; of the scorer "server"
    judge: str | None = None  # a chat model that marks what a small model cannot infer
    judge_server: list[str] = []  # none: the judge runs in vLLM here
    concurrency: int = Field(default=16, ge=1)  # requests in flight on one server, of all workers together
    engines: int | None = Field(default=None, ge=1)  # of each model on one machine; None: one for each GPU
    engine_arg: dict[str, dict[str, Any]] = {}  # by role: arguments of the vLLM engine
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    window: int | None = Field(default=None, ge=2)  # tokens in one forward pass; None: the context, at most 2048
    overlap: int | None = Field(default=None, ge=1)  # tokens shared with the window before; None: a quarter
    batch_tokens: int | None = Field(default=None, ge=1)
    spacy: str = DEFAULT_SPACY
    attributes: bool = False
    headings: bool = False
    align: Literal["first", "last"] = "first"
    text: bool = True
    limit: int | None = Field(default=None, ge=1)
    part_bytes: int | None = Field(default=None, ge=1024)
    max_bad: float = Field(default=1.0, ge=0, le=1)
    workers: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)  # of one worker; the last bits of a score can depend on it
    trust_remote_code: bool = False
    estimate: bool = False  # label a sample instead

    @field_validator("server", "judge_server", mode="before")
    @classmethod
    def _urls(cls, value: Any) -> Any:
        """Lists, of which each entry may hold several, divided by commas."""
        return [url.strip() for entry in value or [] for url in str(entry).split(",") if url.strip()]

    @field_validator("engine_arg", mode="before")
    @classmethod
    def _arguments(cls, value: Any) -> Any:
        """`key=value`, for all roles, or `role.key=value`; a value is JSON where it can be, else a string."""
        if isinstance(value, dict):
            return value
        found: dict[str, dict[str, Any]] = {}
        for entry in value or []:
            key, equals, text = str(entry).partition("=")
            role, dot, rest = key.partition(".")
            named = bool(dot) and role in ROLES
            name = (rest if named else key).replace("-", "_")
            if not equals or not name.isidentifier():
                raise ValueError(f"{entry!r} is not key=value")
            for one in (role,) if named else ROLES:
                found.setdefault(one, {})[name] = _value(text)
        return found

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


def require_reach(cluster: Cluster, options: LabelOptions) -> None:
    """Raises UsageError for what the machines of a cluster cannot do or reach."""
    if options.estimate:
        raise UsageError("--estimate labels its sample on this machine: leave out --on, and see lacy plan")
    if cluster.gpu and options.scorer == "server":
        raise UsageError("--gpu is for models on the cluster's own machines: leave out --gpu, or --scorer server")
    if cluster.gpu and not (options.reference or options.judge):
        raise UsageError("--gpu needs a model, and there is none: leave it out, or name a --reference")
    if cluster.gpu and options.device == "cpu":
        raise UsageError("--gpu and --device cpu: leave out one of them")
    require_store(cluster, str(options.out))
    here = [path for path in options.corpus if "://" not in path]
    if cluster.on == "dataflow" and here:
        raise UsageError(f"{here[0]} is on this machine, out of reach of Dataflow: copy it to gs://")


@dataclass(frozen=True)
class ModelSpec:
    """A model of the run: what loads it, and where.

    factory    "module:function" of labelers, called with `arguments`
    tokenizer  the model's own, where its token ids are not the target's
    engines    how many processes of one machine hold it; 0: each worker does
    gpus       of each engine
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
