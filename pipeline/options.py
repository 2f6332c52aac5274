"""What a labelling run is asked to do. Validated when built; the part of it that decides bytes goes to the manifest."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_REFERENCE = "smollm2-135m"


class LabelOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    corpus: list[str] = Field(min_length=1)
    out: Path
    tokenizer: str | None = None  # None: the reference's
    reference: str | None = DEFAULT_REFERENCE  # None: no scores, grammar only
    student: str | None = None
    scorer: Literal["auto", "transformers", "vllm"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    window: int | None = Field(default=None, ge=2)  # tokens in one forward pass; None: the context, at most 2048
    overlap: int | None = Field(default=None, ge=1)  # tokens shared with the window before; None: a quarter
    batch_tokens: int | None = Field(default=None, ge=1)
    spacy: str = "en_core_web_sm"
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

    @model_validator(mode="after")
    def _consistent(self) -> "LabelOptions":
        if self.overlap is not None and self.window is not None and self.overlap >= self.window:
            raise ValueError(f"--overlap {self.overlap} must be less than --window {self.window}")
        if self.reference is None and self.tokenizer is None:
            raise ValueError("--reference none needs --tokenizer")
        if self.reference is None and self.student is not None:
            raise ValueError("--student needs a --reference")
        return self

    def signals(self) -> dict[str, Any]:
        """Every option that can change a byte of the signals."""
        apart = {"corpus", "out", "workers", "max_bad", "trust_remote_code"}
        return self.model_dump(exclude=apart)


@dataclass(frozen=True)
class ScorerSpec:
    """Which model scores, and how; what `labelers.reference.load` needs, and its tokenizer."""

    model: str
    scorer: Literal["transformers", "vllm"]
    arguments: dict[str, Any]
    tokenizer: str | None  # None: the target's own
