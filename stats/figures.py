"""The figures of a dataset as plain models, which `lacy stats --json` prints and tables and the report show."""

from typing import Final

from pydantic import BaseModel, ConfigDict, computed_field

QUANTILES: Final = (0.05, 0.25, 0.5, 0.75, 0.95)
BUDGETS: Final = (0.05, 0.10, 0.15, 0.20, 0.30)
BIN_WIDTH: Final = 0.25  # nats
BINS: Final = 64  # the last is open: losses of (BINS - 1) * BIN_WIDTH nats and more
COUNTS: Final = ("tokens", "factual", "delegated", "ignored", "scored", "nll")  # of a Group


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Labels(_Model):
    """Decisions of a label set about the counted tokens."""

    name: str
    policy: str
    action: str  # delegate or ignore
    budget: float | None  # share of all tokens
    threshold: float | None  # the lowest score chosen
    tokens: int
    delegated: int
    ignored: int
    factual: int  # tokens that are factual and delegated or ignored


class Group(_Model):
    """Tokens with the same part of speech, entity type, or range of positions or lengths."""

    name: str  # "" for none
    tokens: int
    factual: int
    delegated: int  # by the chosen label set
    ignored: int
    scored: int  # tokens that have a reference loss
    nll: float  # sum over the scored tokens, nats

    @computed_field  # type: ignore[prop-decorator]
    @property
    def mean_nll(self) -> float | None:
        return self.nll / self.scored if self.scored else None


class Losses(_Model):
    """`ref_nll` of the tokens that have one, nats. All lists are empty when no token has a loss."""

    factual: list[float]  # at QUANTILES
    other: list[float]
    factual_bins: list[int]  # tokens in BINS bins of BIN_WIDTH nats from 0
    other_bins: list[int]


class Word(_Model):
    """A word without the punctuation around it. Its loss is the sum over its tokens."""

    word: str
    occurrences: int
    chosen: int  # occurrences with a token that is delegated or ignored
    mean_nll: float | None  # nats, over all occurrences
    mean_kept_nll: float | None  # over the occurrences that are not chosen


class Pick(_Model):
    """The choice of a policy within a budget: its candidates with the highest loss, equal losses all or none."""

    budget: float  # share of all tokens
    threshold: float | None  # the lowest loss chosen, nats; None when nothing is
    tokens: int  # chosen
    nll: float  # sum over the chosen, nats
    pos: dict[str, int]  # chosen tokens by part of speech, most first
    ent_type: dict[str, int]


class Difference(_Model):
    """Tokens of one part of speech and entity type, and how many of them two label sets label differently."""

    pos: str
    ent_type: str
    tokens: int
    different: int


class Agreement(_Model):
    """Two label sets, token by token. A token is chosen when it is delegated or ignored."""

    a: str
    b: str
    both: int  # tokens that both choose
    only_a: int
    only_b: int
    neither: int
    same: int  # tokens with the same label
    kappa: float | None  # Cohen's kappa of the labels; None when chance alone would agree always
    differences: list[Difference]  # most different tokens first


class Stats(_Model):
    dataset: str
    where: str | None  # SQL condition on the tokens that are counted
    documents: int  # with a counted token
    tokens: int
    factual: int
    bad: int  # records in deadletter/, of the whole dataset
    label_sets: list[Labels]
    labels: str | None  # the label set of the figures below; None when there is none
    pos: list[Group]  # most tokens first
    ent_type: list[Group]
    position: list[Group]  # in the document, in tokens from 0; in order
    length: list[Group]  # tokens in documents of this many tokens; in order
    by: str | None  # the column to group by
    groups: list[Group]  # its values, most tokens first
    losses: Losses
    policy: str  # the policy of `budgets`: lacy or loss
    budgets: list[Pick]  # at BUDGETS; empty without losses
    agreement: list[Agreement]  # one for each pair of label sets
    chosen_words: list[Word]  # most often chosen first
    kept_words: list[Word]  # highest mean_kept_nll first
    kept_at_least: int  # the least occurrences of each of kept_words
    notes: list[str]
