"""The delegation evaluation by hand, and against a plain float64 pass over each token."""

import io
import json
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score
from transformers import GPT2Config, GPT2LMHeadModel

from lacy.cascade.calls import Fitted, Scores, read_fitted
from lacy.cascade.evaluation import results
from lacy.cascade.evaluation.delegation import (
    SHARES,
    TARGETS,
    Options,
    Tokens,
    curves,
    evaluate,
    figures,
    fit_weight,
    half,
    measure,
    settle,
    statistics,
    table,
)
from lacy.cascade.language_model import open_model, results_folder
from lacy.schemas.errors import CascadeError
from lacy.trainer.config import TrainConfig, save
from lacy.trainer.data import NothingHeldOutError
from lacy.trainer.model import tokenizer_files
from lacy.trainer.shards import open_labels
from tests.support.datasets import CALL, make

EOS, CALL_ID = 0, 1
ROWS = 64  # of the embedding, some behind the vocabulary
CONTEXT = 24
HOLDOUT = 0.4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("made") / "dataset", vocabulary=50, parts=2, documents=30, length=(3, 40))


@pytest.fixture(scope="module")
def labels(dataset):
    return open_labels(str(dataset), None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, labels) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "gpt2", labels)


def write_model(folder: Path, labels, without_call: bool = False) -> Path:
    """A GPT-2 with weights at random, large enough that it has opinions; it likes to end texts."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=ROWS, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=EOS, eos_token_id=EOS,
        initializer_range=0.4,
    )  # fmt: skip
    network = GPT2LMHeadModel(config)
    network.transformer.wte.weight.data[EOS] *= 2
    network.save_pretrained(folder)
    files = {name: json.loads(content) for name, content in tokenizer_files(labels, 32).items()}
    tokenizer = files["tokenizer.json"]
    tokenizer["decoder"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if without_call:
        tokenizer["added_tokens"] = [token for token in tokenizer["added_tokens"] if token["content"] != CALL]
        del tokenizer["model"]["vocab"][CALL], files["tokenizer_config.json"]["additional_special_tokens"]
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


@pytest.fixture
def run(tmp_path, dataset, labels) -> Path:
    """A run with a checkpoint, that kept a share of the documents."""
    out = tmp_path / "run"
    save(TrainConfig(dataset=str(dataset), out=out, holdout=HOLDOUT, context=CONTEXT, model="tiny"))
    folder = write_model(out / "checkpoints" / "step-00000007", labels)
    state = {"ranks": [{"loader": {"geometry": {"fingerprint": labels.fingerprint}}}]}
    (folder / "training").mkdir()
    (folder / "training" / "state.json").write_text(json.dumps(state))
    return out


def held_documents(dataset: Path, holdout: float) -> list[tuple[list[int], list[bool]]]:
    """Ids and factual of the held-out documents, read without the trainer."""
    found = []
    for path in sorted((dataset / "labels" / "lacy").glob("*.parquet")):
        for row in pq.read_table(path).to_pylist():
            digest = int.from_bytes(blake2b(row["doc_id"].encode(), digest_size=8).digest(), "big")
            if digest < holdout * 2**64:
                found.append((row["token_ids"], row["factual"]))
    return found


def plainly(model, dataset, *, masked: bool = False, call_id: int | None = CALL_ID) -> list[tuple[float, ...]]:
    """document, margin, uncertainty, factual, correct, nll of each token, from all logits, in float64."""
    network = GPT2LMHeadModel.from_pretrained(model.folder, dtype=torch.float64, attn_implementation="eager").eval()
    stream: list[tuple[int, int, bool]] = []  # document, id, factual
    for number, (ids, factual) in enumerate(held_documents(dataset, HOLDOUT)):
        stream += [(number, EOS, False), *((number, *token) for token in zip(ids, factual, strict=True))]
    found = []
    for first in range(0, len(stream) - 1, CONTEXT):
        inputs = stream[first : first + CONTEXT]
        targets = stream[first + 1 : first + CONTEXT + 1]
        pieces = [[token for token in inputs if token[0] == number] for number in dict.fromkeys(t[0] for t in inputs)]
        if not masked:
            pieces = [inputs]
        with torch.no_grad():
            logits = torch.cat([network(torch.tensor([[token[1] for token in piece]])).logits[0] for piece in pieces])
        for row, (number, target, factual) in zip(logits, targets, strict=False):
            if target == EOS:
                continue
            words = [index for index in range(ROWS) if index != call_id]
            lse = row[words].logsumexp(0)
            best = max(words, key=lambda index: float(row[index]))
            margin = 0.0 if call_id is None else float(row[call_id] - lse)
            uncertainty = 1 - float((row[best] - lse).exp())
            found.append((number, margin, uncertainty, factual, best == target, float(lse - row[target])))
    return found


def same(tokens: Tokens, expected: list[tuple[float, ...]]) -> None:
    document, margin, uncertainty, factual, correct, nll = (np.array(column) for column in zip(*expected, strict=True))
    assert np.array_equal(tokens.document, document)
    assert np.array_equal(tokens.factual, factual)
    assert np.array_equal(tokens.correct, correct)
    np.testing.assert_allclose(tokens.uncertainty, uncertainty, atol=1e-5)
    np.testing.assert_allclose(tokens.nll, nll, rtol=1e-4, atol=1e-5)
    if tokens.margin is not None:
        np.testing.assert_allclose(tokens.margin, margin, rtol=1e-4, atol=1e-5)
    floats = {"margin", "uncertainty", "nll"} - ({"margin"} if tokens.margin is None else set())
    assert {name: getattr(tokens, name).dtype for name in floats} == dict.fromkeys(floats, np.dtype(np.float32))
    assert (tokens.document.dtype, tokens.factual.dtype, tokens.correct.dtype) == (np.int32, bool, bool)


def hand_made() -> Tokens:
    """Eight tokens of two documents; the margin has ties."""
    return Tokens(
        document=np.array([1, 1, 1, 1, 3, 3, 3, 3], np.int32),
        margin=np.array([5, 4, 4, 3, 2, 2, 1, 0], np.float32),
        uncertainty=np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6], np.float32),
        factual=np.array([1, 1, 0, 1, 0, 0, 1, 0], bool),
        correct=np.array([0, 0, 1, 1, 0, 1, 0, 1], bool),
        nll=np.arange(8, dtype=np.float32),
    )


def test_figures_by_hand():
    found = figures(hand_made(), None)
    assert (found["tokens"], found["documents"]) == (8, 2)
    assert found["accuracy"] == 0.5
    assert (found["nll.factual"], found["nll.other"]) == ((0 + 1 + 3 + 6) / 4, (2 + 4 + 5 + 7) / 4)
    shares = {"factual": 4 / 8, "wrong": 4 / 8, "factual_wrong": 3 / 8, "wrong_among_factual": 3 / 4}
    assert {name: found[f"share.{name}"] for name in TARGETS} == shares
    # Factual: 5, 4, 3, 1 against 4, 2, 2, 0. Of the 16 pairs they win 4, 3 and a tie, 3, and 1.
    assert found["auc.margin.factual"] == pytest.approx((4 + 3.5 + 3 + 1) / 16)
    # Precision at 5, at 4 (with the other 4), at 3, and at 1.
    assert found["ap.margin.factual"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4 + 4 / 7) / 4)
    # Wrong: 5, 4, 2, 1 against 4, 3, 2, 0.
    assert found["auc.margin.wrong"] == pytest.approx((4 + 3.5 + 1.5 + 1) / 16)
    # Factual and wrong: 5, 4, 1 against 4, 3, 2, 2, 0.
    assert found["auc.margin.factual_wrong"] == pytest.approx((5 + 4.5 + 1) / 15)
    assert found["ap.margin.factual_wrong"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 7) / 3)
    # Wrong among factual: 5, 4, 1 against 3; by uncertainty .1, .9, .4 against .8.
    assert found["auc.margin.wrong_among_factual"] == pytest.approx(2 / 3)
    assert found["auc.uncertainty.wrong_among_factual"] == pytest.approx(1 / 3)
    assert found["ap.uncertainty.wrong_among_factual"] == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)


def test_kept_accuracy_by_hand():
    """By margin, of the scores 5, 4 4, 3, 2 2, 1, 0, right are one of the two 4, 3, one of the two 2, and 0."""
    found = curves(hand_made().margin, hand_made(), np.array([0, 1 / 8, 2 / 8, 3 / 8, 0.22, 5 / 8, 1]))
    # The tie of the second and third token: half a right one is called with the first of them.
    kept = [4 / 8, 4 / 7, 3.5 / 6, 3 / 5, (4 - 0.76 / 2) / 6.24, 1.5 / 3, None]
    assert found["kept_accuracy"] == pytest.approx(kept)
    right = [4, 4 + 1, 3.5 + 2, 3 + 3, 4 - 0.76 / 2 + 1.76, 1.5 + 5, 8]
    assert found["cascade_accuracy"] == pytest.approx([count / 8 for count in right])
    assert found["covered"] == pytest.approx([0, 1 / 3, 1.5 / 3, 2 / 3, (1 + 0.76 / 2) / 3, 2 / 3, 1])
    named = figures(hand_made(), None)
    assert named["kept_accuracy.margin.0.22"] == pytest.approx(kept[4])
    assert named["cascade_accuracy.margin.0"] == 0.5
    assert named["covered.uncertainty.0.5"] == pytest.approx(1 / 3)  # .9 .8 .7 .6 are called
    assert named["kept_accuracy.uncertainty.0.5"] == pytest.approx(1 / 4)


def test_ties_do_not_depend_on_the_order():
    rng = np.random.default_rng(0)
    tokens = planted(weight=1.0, seed=3)
    score = rng.integers(4, size=len(tokens.document)).astype(np.float32)
    order = rng.permutation(len(score))
    shares = np.linspace(0, 1, 41)
    one, other = curves(score, tokens, shares), curves(score[order], tokens.where(order), shares)
    for name in one:
        assert one[name][:-1] == pytest.approx(other[name][:-1])
    flat = curves(np.zeros_like(score), tokens, shares)
    assert flat["kept_accuracy"][:-1] == pytest.approx([tokens.correct.mean()] * 40)


def test_statistics_are_those_of_the_figures():
    tokens = planted(weight=2.0, seed=1)
    named = figures(tokens, 2.0)
    built = statistics(tokens, 2.0)
    assert set(built) == {name for name in named if name.startswith(("auc.", "ap."))}
    once = np.ones((1, len(np.unique(tokens.document))), np.int32)
    for name, statistic in built.items():
        assert statistic(once)[0] == pytest.approx(named[name]), name


def test_nothing_to_count_is_none():
    tokens = replace(hand_made(), correct=np.ones(8, bool))
    found = figures(tokens, None)
    assert found["auc.margin.wrong"] is None and found["ap.margin.factual_wrong"] is None
    assert found["covered.margin.0.22"] is None
    assert found["auc.margin.factual"] is not None
    found = figures(replace(hand_made(), factual=np.zeros(8, bool)), None)
    assert found["share.wrong_among_factual"] is None and found["nll.factual"] is None
    assert found["auc.margin.wrong_among_factual"] is None


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_tokens_are_those_of_a_plain_pass(dataset, labels, model_folder, masked, batch):
    """End tokens and padding are left out, the first token of each document is not."""
    model = open_model(model_folder, device="cpu")
    options = Options(holdout=HOLDOUT, context=CONTEXT, mask_documents=masked, batch=batch)
    told = []
    tokens = measure(model, labels, options, lambda event, facts: told.append((event, facts)))
    expected = plainly(model, dataset, masked=masked)
    same(tokens, expected)
    documents = held_documents(dataset, HOLDOUT)
    assert np.bincount(tokens.document).tolist() == [len(ids) for ids, _ in documents]
    assert 0 < tokens.correct.mean() < 1 and 0 < tokens.factual.mean() < 1
    assert told[-1] == ("measure", {"tokens": len(expected), "done": pytest.approx(1, abs=0.3)})
    assert len(told) > 1


def test_documents_may_be_seen_by_others(dataset, labels, model_folder):
    """Else the test above would not tell masked documents from others."""
    model = open_model(model_folder, device="cpu")
    one, other = plainly(model, dataset), plainly(model, dataset, masked=True)
    assert not np.allclose([row[5] for row in one], [row[5] for row in other], atol=1e-2)


def test_a_model_without_call_has_its_uncertainty_alone(tmp_path, dataset, labels):
    model = open_model(write_model(tmp_path / "plain", labels, without_call=True), device="cpu")
    assert model.call_id is None
    tokens = measure(model, labels, Options(holdout=HOLDOUT, context=CONTEXT))
    assert tokens.margin is None
    same(tokens, plainly(model, dataset, call_id=None))
    assert list(tokens.scores(None)) == list(tokens.scores(3.0)) == ["uncertainty"]
    with pytest.raises(CascadeError, match="without <CALL>"):
        fit_weight(tokens)
    options = Options(dataset=str(dataset), holdout=HOLDOUT, context=CONTEXT)
    result = evaluate(model.folder, options)
    assert "auc.uncertainty.wrong" in result.figures and "auc.margin.wrong" not in result.figures
    assert results.read(results_folder(model.folder), "delegation")[1].column_names == [
        "document", "uncertainty", "factual", "correct",
    ]  # fmt: skip
    assert printed(result)


def test_no_more_than_max_tokens(dataset, labels, model_folder):
    model = open_model(model_folder, device="cpu")
    whole = measure(model, labels, Options(holdout=HOLDOUT, context=CONTEXT))
    some = measure(model, labels, Options(holdout=HOLDOUT, context=CONTEXT, max_tokens=100))
    ends = int(some.document[-1])  # targets, of those 100
    assert len(some.document) == 100 - ends
    np.testing.assert_allclose(some.nll, whole.nll[: len(some.nll)], atol=1e-4)
    with pytest.raises(CascadeError, match="two or more"):
        measure(model, labels, Options(holdout=HOLDOUT, context=CONTEXT, max_tokens=2))
    with pytest.raises(NothingHeldOutError):
        measure(model, labels, Options(holdout=1e-6, context=CONTEXT))


def test_models_that_cannot_be_measured(tmp_path, labels, model_folder):
    model = open_model(model_folder, device="cpu")
    biased = torch.nn.Linear(16, ROWS)
    torch.nn.init.normal_(biased.bias)
    model.network.lm_head = biased
    with pytest.raises(CascadeError, match="not a plain projection"):
        measure(model, labels, Options(holdout=HOLDOUT))
    other = open_labels(str(make(tmp_path / "other", vocabulary=60)), None)
    with pytest.raises(CascadeError, match="another tokenizer"):
        measure(open_model(model_folder, device="cpu"), other, Options(holdout=HOLDOUT))


def planted(weight: float, seed: int, n: int = 6000) -> Tokens:
    """Tokens that are factual and wrong where margin + weight * uncertainty is high, but for noise."""
    rng = np.random.default_rng(seed)
    margin = rng.normal(-3, 2, n).astype(np.float32)
    uncertainty = rng.beta(5, 2, n).astype(np.float32)
    wanted = margin + weight * uncertainty + rng.normal(0, 0.3, n) > np.quantile(margin + weight * uncertainty, 0.8)
    return Tokens(
        document=np.sort(rng.integers(60, size=n)).astype(np.int32),
        margin=margin,
        uncertainty=uncertainty,
        factual=wanted | (rng.random(n) < 0.05),
        correct=~wanted & (rng.random(n) < 0.6),
        nll=rng.exponential(2, n).astype(np.float32),
    )


@pytest.mark.parametrize("weight", [0.7, 5.0, 40.0])
def test_a_planted_weight_is_found(weight):
    tokens = planted(weight, seed=0)
    fitted = fit_weight(half(tokens, reported=False))
    assert fitted.weight == pytest.approx(weight, rel=0.25)
    assert fitted.tokens == int((tokens.document % 2 == 0).sum())
    mine = half(tokens)
    assert set(mine.document % 2) == {1}
    scores = Scores(mine.margin, mine.uncertainty)
    wanted = mine.factual_wrong
    best = average_precision_score(wanted, scores.of("combined", weight))
    assert average_precision_score(wanted, scores.of("combined", fitted.weight)) > best - 0.005
    assert best > max(average_precision_score(wanted, score) for score in scores)


def test_the_weight_goes_to_its_ends():
    """Where uncertainty says nothing, or margin does not."""
    tokens = planted(0.0, seed=2)
    assert fit_weight(tokens).weight < 0.5
    noise = replace(tokens, margin=np.random.default_rng(1).normal(size=len(tokens.document)).astype(np.float32))
    noise = replace(noise, factual=np.ones_like(tokens.factual), correct=tokens.uncertainty < 0.7)
    assert roc_auc_score(noise.factual_wrong, noise.scores(fit_weight(noise).weight)["combined"]) > 0.99
    constant = replace(tokens, uncertainty=np.full_like(tokens.uncertainty, 0.5))
    assert fit_weight(constant).weight == 0
    with pytest.raises(CascadeError, match="larger --holdout"):
        fit_weight(replace(tokens, factual=np.zeros_like(tokens.factual)))


def printed(result) -> str:
    console = Console(width=100, file=io.StringIO())
    console.print(table(result))
    return console.file.getvalue()


def test_a_result_is_saved_and_used_again(run):
    options = Options(batch=4)
    result = evaluate(run, options)
    assert (result.kind, result.checkpoint) == ("delegation", "step-00000007")
    folder = run / "eval" / "step-00000007"
    saved, units = results.read(folder, "delegation")
    assert saved == result
    assert set(units["document"].to_numpy() % 2) == {1}
    assert units.num_rows == result.figures["tokens"]
    tokens = Tokens(*(units[name].to_numpy() for name in units.column_names), np.zeros(units.num_rows, np.float32))
    again = figures(tokens, None)
    assert {
        name: value for name, value in again.items() if not name.startswith("nll")
    }.items() <= result.figures.items()
    low, high = result.details["intervals"]["auc.uncertainty.wrong"]
    assert low <= result.figures["auc.uncertainty.wrong"] <= high
    assert len(result.details["shares"]) == len(result.details["curves"]["margin"]["kept_accuracy"]) == 101
    assert result.details["curves"]["margin"]["kept_accuracy"][22] == result.figures["kept_accuracy.margin.0.22"]

    (run / "checkpoints" / "step-00000007" / "model.safetensors").unlink()  # it can be measured no more
    assert evaluate(run, options) == result
    assert evaluate(run / "checkpoints" / "step-00000007", options.model_copy(update={"batch": 2})) == result
    for asked in ({"again": True}, {"fit": True}):
        with pytest.raises(CascadeError, match="cannot open"):
            evaluate(run, options, **asked)
    with pytest.raises(CascadeError, match="cannot open"):
        evaluate(run, Options(max_tokens=100))
    (folder / "delegation.json").write_text("{")
    with pytest.raises(CascadeError, match="cannot open"):  # and not that its result is damaged
        evaluate(run, options)


def test_a_fitted_weight_is_written_and_used(run, labels):
    """The figures are of the same documents with a fit and without."""
    checkpoint = run / "checkpoints" / "step-00000007"
    before = evaluate(run)
    assert before.options["weight"] is None and "auc.combined.wrong" not in before.figures
    (checkpoint / "call.json").write_text("{")  # damaged: a fit writes it again
    with pytest.raises(CascadeError, match="write it again with lacy eval delegation --fit"):
        evaluate(run)
    fitted = evaluate(run, fit=True)
    written = read_fitted(checkpoint)
    assert isinstance(written, Fitted) and fitted.options["weight"] == written.weight
    tokens = measure(open_model(run, device="cpu"), labels, settle(checkpoint, Options())[0])
    assert written == fit_weight(half(tokens, reported=False))
    assert written.tokens + fitted.figures["tokens"] == len(tokens.document)
    assert before.figures.items() <= fitted.figures.items()
    assert {f"auc.combined.{target}" for target in TARGETS} <= fitted.figures.keys()
    assert {f"kept_accuracy.combined.{share:g}" for share in SHARES} <= fitted.figures.keys()
    low, high = fitted.details["differences"]["auc.combined-margin.factual_wrong"]
    gained = fitted.figures["auc.combined.factual_wrong"] - fitted.figures["auc.margin.factual_wrong"]
    assert low <= gained <= high
    assert evaluate(run) == evaluate(run, fit=True) == fitted  # the saved one
    (checkpoint / "call.json").write_text(json.dumps({"version": 1, "weight": 3.5, "tokens": 10}))
    assert evaluate(run).options["weight"] == 3.5
    lines = printed(fitted).splitlines()
    assert max(map(len, lines)) < 100
    assert any(line.startswith("combined") for line in lines)
    assert f"{fitted.figures['kept_accuracy.margin.0.22']:.1%}" in printed(fitted)


def test_documents_that_a_run_has_seen_are_refused(run, dataset, tmp_path):
    folder = run / "checkpoints" / "step-00000007"
    settled, found = settle(folder, Options())
    assert (settled.dataset, settled.labels, settled.holdout) == (str(dataset), "lacy", HOLDOUT)
    assert (settled.context, settled.mask_documents) == (CONTEXT, False)
    assert found.name == "lacy"
    assert settle(folder, Options(holdout=0.1))[0].holdout == 0.1  # fewer of them
    with pytest.raises(CascadeError, match=r"--holdout 0\.5 has documents that .* was trained on"):
        settle(folder, Options(holdout=0.5))
    moved = dataset.parent / "elsewhere"
    moved.symlink_to(dataset)
    try:
        with pytest.raises(CascadeError, match="was trained on"):
            settle(folder, Options(dataset=str(moved), holdout=0.5))
    finally:
        moved.unlink()
    other = make(tmp_path / "other", vocabulary=50, seed=1)
    assert settle(folder, Options(dataset=str(other), holdout=1))[0].holdout == 1


def test_what_must_be_named(run, dataset, model_folder):
    for given in ({}, {"dataset": str(dataset)}, {"holdout": 0.1}):
        with pytest.raises(CascadeError, match="not trained on, with --dataset and --holdout"):
            settle(model_folder, Options(**given))
    settled, _ = settle(model_folder, Options(dataset=str(dataset), holdout=0.1))
    assert (settled.labels, settled.mask_documents) == ("lacy", False)
    folder, record = run / "checkpoints" / "step-00000007", run / "config.yaml"
    text = record.read_text()
    record.write_text(text.replace(f"holdout: {HOLDOUT}", "holdout: 0.0"))
    with pytest.raises(CascadeError, match="trained on all documents"):
        settle(folder, Options())
    record.write_text(text.replace(str(dataset), str(dataset / "gone")))
    with pytest.raises(CascadeError, match="pass its new path with --dataset"):
        settle(folder, Options())
    record.write_text("holdout: [")
    with pytest.raises(CascadeError, match=r"config\.yaml cannot be read"):
        settle(folder, Options())
