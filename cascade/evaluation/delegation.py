"""Does the model call where it would be wrong about a fact? Measured on held-out labelled documents.

At each token, with the true text before it, each call score gives a rank. For four targets the results contain the area
under its ROC curve and its average precision:

    factual              factual tokens, among all
    wrong                tokens that the model would not write by itself, among all
    factual_wrong        tokens that are both, among all: where a call pays
    wrong_among_factual  tokens that the model would not write, among the factual ones

And if the tokens with the highest scores, a share of all, are called: the accuracy on the tokens kept, the accuracy on
all tokens if the partner were always right, and the share of factual_wrong tokens that the calls cover.

Documents are numbered in order and split by parity. `fit_weight` sees the even ones; all figures are of the odd ones,
with or without a fit. So figures are comparable between scores, checkpoints and runs, and no fitted weight has seen the
reported documents. Intervals are over documents (`lacy.cascade.evaluation.bootstrap`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import torch
from pydantic import ValidationError
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers.modeling_utils import PreTrainedModel

from lacy.cascade.calls import CALL_SCORES, CallScore, Fitted, Scores, read_fitted, write_fitted
from lacy.cascade.evaluation import bootstrap, results
from lacy.cascade.evaluation.options import DelegationOptions as Options
from lacy.cascade.evaluation.results import Result
from lacy.cascade.language_model import Model, checkpoint, open_model, results_folder
from lacy.schemas.errors import CascadeError, DatasetError, UsageError
from lacy.trainer import shards
from lacy.trainer.checkpoint import data_of
from lacy.trainer.config import TrainConfig, load
from lacy.trainer.data import held_out
from lacy.trainer.head import Measures
from lacy.trainer.model import Learner, plain_head
from lacy.trainer.shards import Labels, open_labels

KIND: Final = "delegation"
TARGETS: Final = ("factual", "wrong", "factual_wrong", "wrong_among_factual")
SHARES: Final = (0.0, 0.05, 0.1, 0.15, 0.22, 0.3, 0.4, 0.5)  # called; 0.22 is the paper's
CURVE: Final = 101  # shares of the curves, from 0 to 1
RESAMPLES: Final = 400
CONTEXT: Final = 1024  # tokens, unless the options or a run say otherwise
# Weights that `fit_weight` tries, in units of the standard deviation of margin over that of uncertainty: steps of 9 %.
_WEIGHTS: Final = np.r_[0, 2 ** np.arange(-6, 8.01, 0.125)]

Tell = Callable[[str, dict[str, Any]], None]  # gets "measure" and {"tokens": so far, "done": approximate share}


@dataclass(frozen=True)
class Tokens:
    """N tokens of held-out documents, without end tokens.

    document     (N,) int32, the number of the token's document among those held out
    margin       (N,) float32; None for a model without <CALL>
    uncertainty  (N,) float32
    factual      (N,) bool
    correct      (N,) bool: the most likely token other than <CALL> is the true one
    nll          (N,) float32 nats, over the softmax without <CALL>
    """

    document: np.ndarray
    margin: np.ndarray | None
    uncertainty: np.ndarray
    factual: np.ndarray
    correct: np.ndarray
    nll: np.ndarray

    def where(self, chosen: np.ndarray) -> "Tokens":
        """The tokens of a mask (N,) bool."""
        margin = None if self.margin is None else self.margin[chosen]
        others = self.uncertainty, self.factual, self.correct, self.nll
        return Tokens(self.document[chosen], margin, *(values[chosen] for values in others))

    @property
    def factual_wrong(self) -> np.ndarray:
        return self.factual & ~self.correct

    def target(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(N,) bool each: the tokens among which a target of TARGETS is to be detected, and the target itself."""
        among = self.factual if name == "wrong_among_factual" else np.ones(len(self.factual), bool)
        wanted = {"factual": self.factual, "factual_wrong": self.factual_wrong}.get(name, ~self.correct)
        return among, wanted

    def scores(self, weight: float | None) -> dict[CallScore, np.ndarray]:
        """(N,) float32 each: the scores that this model has; "combined" if there is a weight."""
        if self.margin is None:
            return {"uncertainty": self.uncertainty}
        both = Scores(self.margin, self.uncertainty)
        return {kind: both.of(kind, weight or 0.0) for kind in CALL_SCORES if kind != "combined" or weight is not None}


def evaluate(
    run: Path, options: Options | None = None, *, fit: bool = False, again: bool = False, tell: Tell | None = None
) -> Result:
    """Measure the newest checkpoint of a run, or another model folder; save and return the result.

    fit    first fit the weight of the combined score, and write it to the checkpoint's call.json
    again  measure even if there is a result for the same options and weight

    Raises CascadeError, and DatasetError for labels that cannot be read.
    """
    folder = checkpoint(run.absolute())
    settled, labels = settle(folder, options or Options())
    weight = _weight(folder, fit)
    asked = settled.model_dump(exclude={"batch", "device"}) | {"fingerprint": labels.fingerprint}
    saved = None if again else _saved(folder, asked | {"weight": weight}, fit)
    if saved is not None:
        return saved
    model = open_model(folder, device=settled.device, dtype=settled.dtype)
    tokens = measure(model, labels, settled, tell)
    if fit:
        fitted = fit_weight(half(tokens, reported=False))
        write_fitted(folder, fitted)
        weight = fitted.weight
    if model.call_id is None:
        weight = None
    tokens = half(tokens)
    result = Result(
        kind=KIND,
        checkpoint=folder.name,
        options=asked | {"weight": weight, "fit": fit},
        figures=figures(tokens, weight),
        details=_details(tokens, weight),
    )
    results.save(results_folder(folder), result, _units(tokens))
    return result


def settle(folder: Path, options: Options) -> tuple[Options, Labels]:
    """The options with the settings of a checkpoint's run in place of None, and the labels that they name.

    Raises CascadeError if they include documents that the run was trained on, and for a model folder outside of a run
    if the options leave the dataset or the holdout open. `context` may stay None.
    """
    config = _run(folder)
    dataset = options.dataset or (config.dataset if config else None)
    if dataset is None or (config is None and options.holdout is None):
        raise CascadeError(
            f"{folder} is not in a run: use documents that it was not trained on, with --dataset and --holdout",
            usage=True,
        )
    if config is None:
        labels = open_labels(dataset, options.labels)
        return options.model_copy(
            update={"labels": labels.name, "mask_documents": bool(options.mask_documents)}
        ), labels
    same_path = Path(dataset).absolute() == Path(config.dataset).absolute()
    try:
        labels = open_labels(dataset, options.labels or (config.labels if same_path else None))
    except DatasetError as error:
        hint = "; if it has moved, pass its new path with --dataset" if options.dataset is None else ""
        raise CascadeError(f"{error}{hint}", usage=error.exit_code == UsageError.exit_code) from None
    trained_on = data_of(folder)
    same_data = same_path or labels.fingerprint == trained_on.get("fingerprint")
    kept = float(trained_on.get("holdout", config.holdout)) if same_data else config.holdout
    holdout = kept if options.holdout is None else options.holdout
    if holdout == 0:
        raise CascadeError(
            f"{folder} was trained on all documents: pass others with --dataset and --holdout", usage=True
        )
    if holdout > kept and same_data:
        raise CascadeError(
            f"--holdout {holdout:g} has documents that {folder} was trained on: use at most {kept:g}", usage=True
        )
    masked = config.mask_documents if options.mask_documents is None else options.mask_documents
    known = {
        "dataset": dataset,
        "labels": labels.name,
        "holdout": holdout,
        "context": options.context or config.context,
        "mask_documents": masked,
    }
    return options.model_copy(update=known), labels


def measure(model: Model, labels: Labels, options: Options, tell: Tell | None = None) -> Tokens:
    """The model's scores at each token of the held-out documents, packed as in training, in corpus order.

    The options come from `settle`. Raises CascadeError for a model with another tokenizer, or whose logits are not a
    plain projection, and if fewer than two documents are held out; NothingHeldOutError if none is.
    """
    assert options.holdout is not None, "set by settle()"
    _same_vocabulary(model, labels)
    if not plain_head(model.network):
        raise CascadeError(
            f"{model.folder} cannot be measured: its logits are not a plain projection (scaled, capped, or with a bias)"
        )
    context = min(model.context, options.context or CONTEXT)
    batches = held_out(
        labels,
        batch=options.batch,
        context=context,
        columns={"factual"},
        holdout=options.holdout,
        positions=bool(options.mask_documents),
        max_tokens=options.max_tokens,
    )
    expected = max(1.0, min(options.max_tokens, options.holdout * labels.tokens))
    columns: list[tuple[np.ndarray, ...]] = []
    documents = tokens = 0
    for batch in batches:
        targets = batch["ids"][:, 1:].flatten()
        ends = targets == labels.eos_id
        kept = batch["real"].flatten() & ~ends
        numbers = documents + ends.cumsum(0)
        documents = int(numbers[-1])
        values = (numbers.int(), *_scored(model, batch), batch["factual"].flatten())
        columns.append(tuple(column.cpu()[kept].numpy() for column in values))
        tokens += int(kept.sum())
        if tell is not None:
            tell("measure", {"tokens": tokens, "done": min(1.0, tokens / expected)})
    document, margin, uncertainty, correct, nll, factual = (np.concatenate(c) for c in zip(*columns, strict=True))
    if len(document) == 0 or document[-1] == 0:
        raise CascadeError(
            f"--holdout {options.holdout:g} of {labels.root} is one document: use two or more", usage=True
        )
    return Tokens(document, None if model.call_id is None else margin, uncertainty, factual, correct, nll)


def half(tokens: Tokens, reported: bool = True) -> Tokens:
    """The tokens of odd documents, which figures report; else those of even ones, which weights are fitted on."""
    return tokens.where(tokens.document % 2 == (1 if reported else 0))


def fit_weight(tokens: Tokens) -> Fitted:
    """The weight of combined = margin + weight * uncertainty that best detects factual_wrong tokens.

    It has the highest average precision in a grid from 0, margin alone, to where margin hardly counts. Mean figures of
    three small models trained with <CALL> and two halves of 46 held-out documents, on the half that was not fitted on:

        fitted by                   AP factual_wrong   AUC factual_wrong   AUC wrong   AUC wrong_among_factual
        (margin alone)                         .5511               .8273       .6087                     .6349
        logistic regression                    .5556               .8282       .6279                     .6413
        AUC, over the grid                     .5556               .8282       .6275                     .6407
        average precision, grid                .5564               .8279       .6397                     .6472

    The ratio of a logistic regression's coefficients also fails if margin carries no information, as in a model that
    was not trained to call: a negative coefficient of margin reverses the score (AUC .36; uncertainty alone has .62).

    Raises CascadeError for a model without <CALL>, and if there is no token of either kind.
    """
    if tokens.margin is None:
        raise CascadeError("a model without <CALL> has no margin to combine: leave out --fit", usage=True)
    wanted = tokens.factual_wrong
    if wanted.all() or not wanted.any():
        raise CascadeError("--fit needs factual tokens that the model gets wrong, and others: use a larger --holdout")
    margin, uncertainty = tokens.margin, tokens.uncertainty
    spread = float(uncertainty.std(dtype=np.float64))
    weights = _WEIGHTS * (float(margin.std(dtype=np.float64)) / spread) if spread else np.zeros(1)
    scores = Scores(margin, uncertainty)
    precisions = [average_precision_score(wanted, scores.of("combined", weight)) for weight in weights]
    return Fitted(weight=float(weights[int(np.argmax(precisions))]), tokens=len(wanted))


def figures(tokens: Tokens, weight: float | None) -> dict[str, float | None]:
    """All numbers by name; None if there is nothing to count.

    tokens, documents, accuracy, nll.factual, nll.other (means, nats)
    share.TARGET                   of the tokens among which it is detected: the average precision of random calls
    auc.SCORE.TARGET, ap.SCORE.TARGET
    kept_accuracy.SCORE.SHARE      accuracy on the tokens not called, if SHARE (of SHARES) of all are
    cascade_accuracy.SCORE.SHARE   accuracy on all tokens if the partner were always right
    covered.SCORE.SHARE            share of the factual_wrong tokens that are called
    """
    numbers: dict[str, float | None] = {
        "tokens": len(tokens.document),
        "documents": len(np.unique(tokens.document)),
        "accuracy": _mean(tokens.correct),
        "nll.factual": _mean(tokens.nll[tokens.factual]),
        "nll.other": _mean(tokens.nll[~tokens.factual]),
    }
    for target in TARGETS:
        among, wanted = tokens.target(target)
        numbers[f"share.{target}"] = _mean(wanted[among])
    for kind, score in tokens.scores(weight).items():
        for target in TARGETS:
            among, wanted = tokens.target(target)
            both = among.any() and wanted[among].any() and not wanted[among].all() and np.isfinite(score).all()
            pair = wanted[among], score[among]
            numbers[f"auc.{kind}.{target}"] = float(roc_auc_score(*pair)) if both else None
            numbers[f"ap.{kind}.{target}"] = float(average_precision_score(*pair)) if both else None
        for name, values in curves(score, tokens, np.array(SHARES)).items():
            numbers |= {f"{name}.{kind}.{share:g}": value for share, value in zip(SHARES, values, strict=True)}
    return numbers


def curves(score: np.ndarray, tokens: Tokens, shares: np.ndarray) -> dict[str, list[float | None]]:
    """kept_accuracy, cascade_accuracy and covered (see `figures`) for each of some shares called, 0 to 1.

    The values are expectations: tokens of equal scores are called at random, as is the last token if the share is not
    a whole number of tokens.
    """
    count = len(score)
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.r_[True, np.diff(score[order]) != 0, True]) if count else np.zeros(1, np.int64)
    called = shares * count

    def among_called(kind: np.ndarray) -> np.ndarray:
        return np.interp(called, ends, np.r_[0, np.cumsum(kind[order])][ends])

    right = tokens.correct.sum() - among_called(tokens.correct)  # of those kept
    with np.errstate(invalid="ignore", divide="ignore"):
        values = {
            "kept_accuracy": right / (count - called),
            "cascade_accuracy": (right + called) / count,
            "covered": among_called(tokens.factual_wrong) / tokens.factual_wrong.sum(),
        }
    return {name: [float(x) if np.isfinite(x) else None for x in curve] for name, curve in values.items()}


def statistics(tokens: Tokens, weight: float | None) -> dict[str, bootstrap.Statistic]:
    """auc.SCORE.TARGET and ap.SCORE.TARGET of `figures` for `lacy.cascade.evaluation.bootstrap`.

    Clusters are the documents with tokens, in order.
    """
    document = np.unique(tokens.document, return_inverse=True)[1]
    by_name: dict[str, bootstrap.Statistic] = {}
    for kind, score in tokens.scores(weight).items():
        for target in TARGETS if np.isfinite(score).all() else ():
            among, wanted = tokens.target(target)
            units = document[among], score[among], wanted[among]
            by_name[f"auc.{kind}.{target}"] = bootstrap.auc(*units)
            by_name[f"ap.{kind}.{target}"] = bootstrap.average_precision(*units)
    return by_name


def table(result: Result) -> Table:
    """The main figures of a result, in less than 100 columns."""
    numbers = result.figures
    kinds = [kind for kind in CALL_SCORES if f"auc.{kind}.wrong" in numbers]
    pieces: list[RenderableType] = [_headline(result)]
    for name, title in (("auc", "AUC"), ("ap", "average precision")):
        ranks = _table(title, *_HEADINGS)
        for kind in kinds:
            ranks.add_row(kind, *(_ranged(result, f"{name}.{kind}.{target}") for target in TARGETS))
        chance = [0.5 if name == "auc" else numbers[f"share.{target}"] for target in TARGETS]
        ranks.add_row("random", *map(_number, chance), style="dim")
        pieces.append(ranks)
    for name, title in (
        ("kept_accuracy", "correct, kept"),
        ("cascade_accuracy", "correct, all"),
        ("covered", "covered"),
    ):
        shares = _table(title, *(f"{share:.0%}" for share in SHARES))
        for kind in kinds:
            shares.add_row(kind, *(_percent(numbers[f"{name}.{kind}.{share:g}"]) for share in SHARES))
        pieces.append(shares)
    pieces.append(
        Text(
            "By share of tokens called: right among those kept; right among all, given a perfect partner;\n"
            f"called among those factual and wrong. In brackets: {bootstrap.LEVEL:.0%} intervals over documents.",
            style="dim",
        )
    )
    whole = Table.grid()
    for number, piece in enumerate(pieces):
        if number:
            whole.add_row()
        whole.add_row(piece)
    return whole


def _run(folder: Path) -> TrainConfig | None:
    """The configuration of a checkpoint's run; None for a model folder outside of a run."""
    run = folder.parent.parent
    if folder.parent.name != "checkpoints" or not (run / "config.yaml").is_file():
        return None
    try:
        return load({"out": run}, None, resume=True)
    except (UsageError, ValidationError):
        raise CascadeError(f"{run / 'config.yaml'} cannot be read: copy it from where the run was made") from None


def _weight(folder: Path, fit: bool) -> float | None:
    """The weight in call.json; a damaged file does not matter if it is to be written again."""
    try:
        fitted = read_fitted(folder)
    except CascadeError:
        if not fit:
            raise
        return None
    return fitted.weight if fitted else None


def _saved(folder: Path, asked: dict[str, Any], fit: bool) -> Result | None:
    """The saved result that a new measurement would repeat; None if there is none, or a damaged one."""
    try:
        saved = results.read(results_folder(folder), KIND)
    except CascadeError:
        return None
    if saved is None:
        return None
    options = dict(saved[0].options)
    fitted = options.pop("fit", False)
    return saved[0] if options == asked and (fitted or not fit) else None


def _same_vocabulary(model: Model, labels: Labels) -> None:
    """Raise CascadeError unless the labels' tokens have the same ids in the model; a model may lack <CALL>."""
    ids = model.vocabulary.tokenizer.get_vocab(with_added_tokens=True)
    lacking = model.call_id is None
    expected = shards.vocabulary(labels.tokenizer_json).items()
    if any(ids.get(token) != index for token, index in expected if not (lacking and index == labels.call_id)):
        raise CascadeError(f"{model.folder} has another tokenizer than {labels.root}: use labels made with its own")


@torch.inference_mode()
def _scored(model: Model, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """margin, uncertainty, correct and nll of the B*T targets of a batch, on the CPU."""
    network = model.network
    ids = batch["ids"].to(model.device)
    positions = batch["positions"].to(model.device) if "positions" in batch else None
    # Without <CALL> in the vocabulary another token takes its place, and is then put back among the words.
    call_id = 0 if model.call_id is None else model.call_id
    lse, target, call, top, correct = _measures(network, call_id, ids, positions)
    if model.call_id is None:
        correct = torch.where(call >= top, ids[:, 1:].flatten() == call_id, correct)
        lse, top = torch.logaddexp(lse, call), torch.maximum(top, call)
    columns = ((call - lse).float(), (1 - (top - lse).exp()).float(), correct, (lse - target).float())
    return tuple(column.cpu() for column in columns)


def _measures(network: PreTrainedModel, call_id: int, ids: torch.Tensor, positions: torch.Tensor | None) -> Measures:
    measures = Learner(network, call_id)(ids, positions, measure=True)
    assert isinstance(measures, Measures)
    return measures


def _details(tokens: Tokens, weight: float | None) -> dict[str, Any]:
    """Curves, intervals of AUC and AP, and paired differences between the combined score and each other score."""
    documents = len(np.unique(tokens.document))
    values = {
        name: bootstrap.resampled(documents, statistic, resamples=RESAMPLES)
        for name, statistic in statistics(tokens, weight).items()
        if documents > 1
    }
    differences = {}
    for name, combined in values.items():
        figure, kind, target = name.split(".")
        if kind == "combined":
            for other in ("margin", "uncertainty"):
                bounds = bootstrap.bounds(combined - values[f"{figure}.{other}.{target}"])
                differences[f"{figure}.combined-{other}.{target}"] = bounds and list(bounds)
    shares = np.linspace(0, 1, CURVE)
    return {
        "intervals": {name: bounds and list(bounds) for name in values for bounds in [bootstrap.bounds(values[name])]},
        "differences": differences,
        "shares": [round(float(share), 4) for share in shares],
        "curves": {kind: curves(score, tokens, shares) for kind, score in tokens.scores(weight).items()},
    }


def _units(tokens: Tokens) -> pa.Table:
    columns = ("document", "margin", "uncertainty", "factual", "correct")
    values = {name: getattr(tokens, name) for name in columns}
    return pa.table({name: pa.array(column) for name, column in values.items() if column is not None})


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None


_HEADINGS: Final = ("factual", "wrong", "factual, wrong", "wrong if factual")  # of TARGETS
_TITLE: Final = 17  # columns


def _headline(result: Result) -> Text:
    numbers, weight = result.figures, result.options["weight"]
    shares = {"factual": "share.factual", "correct": "accuracy", "factual and wrong": "share.factual_wrong"}
    summary = ", ".join(f"{_percent(numbers[name])} {word}" for word, name in shares.items())
    fitted = "" if weight is None else f"; combined = margin + {weight:.3f} * uncertainty"
    tokens, documents = _count(numbers["tokens"]), _count(numbers["documents"])
    return Text(f"{result.checkpoint}: {tokens} held-out tokens of {documents} documents\n{summary}{fitted}")


def _table(title: str, *names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(title, no_wrap=True, min_width=_TITLE)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _ranged(result: Result, name: str) -> str:
    bounds = result.details["intervals"].get(name)
    return _number(result.figures[name]) + (" [{:.3f} {:.3f}]".format(*bounds).replace("0.", ".") if bounds else "")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _count(value: float | None) -> str:
    return f"{int(value or 0):,}"
