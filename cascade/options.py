"""Options of generation and of the partner that answers calls; light enough for --help."""

from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import model_validator

from lacy.schemas.options import Options, option

BUDGET: Final = 0.22  # the paper's
CallScore = Literal["margin", "uncertainty", "combined"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DEVICE = option("auto", "Device; auto is cuda if available.", panel="Hardware")
DTYPE = option("auto", "Precision; auto is float32 for a model with <CALL>.", panel="Hardware")


@dataclass(frozen=True)
class Sampling:
    """How a model picks its next token: greedily at temperature 0."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class PartnerOptions(Options):
    """The partner that answers calls, and how much it writes for each."""

    partner: str = option(
        "smollm2-135m",
        "Partner that answers calls: model folder, hub name, OpenAI-compatible server, or none.",
        panel="Partner",
        metavar="MODEL|URL|none",
    )
    partner_engine: Literal["transformers", "vllm"] = option("transformers", "Engine of a partner in this process.")
    partner_model: str | None = option(None, "Model of a server that has several.", metavar="NAME")
    partner_tokenizer: str | None = option(
        None,
        "Tokenizer of a server's model; if it matches the small model's, token ids are sent.",
        metavar="FOLDER",
    )
    partner_tokens: int = option(1, "Tokens that the partner writes for one call.", ge=1)
    partner_words: int | None = option(None, "Whole words that the partner writes for one call, not tokens.", ge=1)
    partner_timeout: float = option(30.0, "Seconds to wait for one answer of a server.", gt=0)
    trust_remote_code: bool = option(False, "Run code that comes with a model.")

    @property
    def identity(self) -> dict[str, Any]:
        """What the answers depend on."""
        return self.model_dump(exclude={"partner_timeout", "trust_remote_code"})


class GenerateOptions(Options):
    """How texts are written, and where the small model calls."""

    max_new_tokens: int = option(256, "Tokens to write, at most.", panel="Generation", flag="--new-tokens", ge=1)
    temperature: float = option(0.0, "Sampling temperature; 0 takes the likeliest token.", ge=0, allow_inf_nan=False)
    top_p: float = option(1.0, "Probability mass of the likeliest tokens to sample from.", gt=0, le=1)
    seed: int = option(0, "Seed of sampling.")
    call_score: CallScore = option("margin", "Score that decides calls.", panel="Calls")
    weight: float = option(
        0.0,
        "Weight of uncertainty in the combined score.",
        unset="as fitted by lacy eval delegation --fit",
        allow_inf_nan=False,
    )
    budget: float | None = option(
        None, "Share of positions that may call, by a running quantile.", unset=str(BUDGET), ge=0, le=1
    )
    threshold: float | None = option(None, "Score above which to call, in place of a budget.", allow_inf_nan=False)
    batch: int = option(16, "Texts written side by side.", panel="Hardware", ge=1)

    @model_validator(mode="after")
    def _one_rule(self) -> "GenerateOptions":
        if self.budget is not None and self.threshold is not None:
            raise ValueError("calls are decided by --budget or by --threshold, not by both")
        return self

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed)


class DeviceOptions(Options):
    """Where the small model runs."""

    device: Device = DEVICE
    dtype: Dtype = DTYPE
