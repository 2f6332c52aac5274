"""Options of the evaluations; light enough for --help."""

from typing import Annotated, Final, Literal

from pydantic import Field

from lacy.cascade.options import DEVICE, DTYPE, Device, Dtype, PartnerOptions
from lacy.schemas.options import Options, option

LEAST_BEFORE: Final = 16  # tokens of text before a fact


class LeakagePartner(PartnerOptions):
    """The partner whose cascade is measured; none: the small model alone, with calls forbidden."""

    partner: str = option(
        "none", PartnerOptions.model_fields["partner"].description or "", panel="Partner", metavar="MODEL|URL|none"
    )


class DelegationOptions(Options):
    """Held-out documents to measure on; None stands for what the run was trained with."""

    dataset: str | None = option(None, "Labelled dataset: folder or URL.", unset="the run's", panel="Data")
    labels: str | None = option(None, "Label set.", unset="the run's")
    holdout: float | None = option(None, "Share of its documents held out.", unset="the run's", gt=0, le=1)
    max_tokens: int = option(500_000, "Held-out tokens, at most.", ge=1)
    context: int | None = Field(default=None, ge=2)  # tokens; never more than the model's
    mask_documents: bool | None = None  # block attention from one document to another
    batch: int = option(8, "Sequences in one forward pass.", panel="Hardware", ge=1)
    device: Device = DEVICE
    dtype: Dtype = DTYPE


class LeakageOptions(Options):
    """Which facts to ask for, and how much text stands before them."""

    dataset: str | None = option(None, "Labelled dataset: folder or URL.", unset="the run's", panel="Data")
    holdout: float | None = option(None, "Share of its documents held out.", unset="the run's", gt=0, le=1)
    documents: Literal["trained", "held-out"] | None = option(
        None, "Documents whose facts are asked for.", unset="trained, and held-out with a partner"
    )
    pairs: int = option(500, "Facts to ask for.", ge=1)
    per_document: int = Field(3, ge=1)
    prefix: int = option(128, "Tokens of text before a fact, at most.", ge=LEAST_BEFORE)
    new_tokens: int = option(24, "Tokens to write.", ge=1)


class FactscoreOptions(Options):
    """What a score depends on beside the texts, the models and the knowledge source."""

    gamma: Annotated[float, Field(allow_inf_nan=False)] = option(
        10, "Facts below which a text is penalised for its length; 0 for no penalty.", panel="Score", ge=0
    )
    passages: int = option(5, "Passages that a fact is checked against.", ge=1)
    split_tokens: Annotated[int, Field(ge=16)] = 768  # of the facts of a sentence, at most
    verify_tokens: Annotated[int, Field(ge=8)] = 32  # of a verdict, at most
    batch: Annotated[int, Field(ge=1)] = 64  # conversations that a model is asked at once; changes no answer


class FactscoreModels(Options):
    """The chat models that split texts into facts and verify them."""

    judge: str = option(description="Chat model that verifies facts.", panel="Judge")
    judge_server: list[str] = option([], "Servers of the judge.", metavar="URL[,URL...]", unset="vLLM here")
    splitter: str | None = option(None, "Chat model that splits texts into facts.", unset="the judge")
    splitter_server: list[str] = option([], "Servers of the splitter.", metavar="URL[,URL...]", unset="the judge's")


class NluOptions(Options):
    """Tasks of lm-evaluation-harness, and how their questions are asked."""

    num_fewshot: int | None = option(None, "Examples before a question.", unset="the task's", panel="Tasks", ge=0)
    limit: int | None = option(None, "Only the first N questions of a task.", ge=1)
    seed: int = option(0, "Seed of the choice of examples.")
    offline: bool = option(False, "Use local files only.")
    batch: int = option(16, "Sequences in one forward pass.", panel="Hardware", ge=1)
