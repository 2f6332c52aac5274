"""The transformers scorer against a float64 brute force, on tiny random models."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from lacy.labelers.llm import load as loading
from lacy.labelers.llm.scorer import Span
from lacy.labelers.llm.transformers_scorer import TransformersScorer, token_batches
from lacy.schemas.errors import ModelError

VOCABULARY = 97
CONTEXT = 48

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.5,  # far from uniform predictions
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gpt2": GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
}
POST_PROCESSING: dict[str, PreTrainedConfig] = {
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=1.5),
    "cohere": CohereConfig(**SHAPE, logit_scale=0.25),
    "granite": GraniteConfig(**SHAPE, logits_scaling=4.0),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, config in (CONFIGS | POST_PROCESSING).items():
        torch.manual_seed(7)
        made[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(made[name])
    return made


def load(folder: Path, **settings: object) -> TransformersScorer:
    scorer = loading.scorer("transformers", str(folder), device="cpu", **settings)  # type: ignore[arg-type]
    assert isinstance(scorer, TransformersScorer)
    return scorer


def documents(*lengths: int, seed: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


def brute_force(folder: Path, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """NLL and argmax correctness of `prompt[1:]` in float64, from the full logits of one unpadded document."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    ids = torch.tensor(prompt, dtype=torch.int64)
    with torch.inference_mode():
        logits = model(ids[None]).logits[0, :-1]
    nll = -logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    return nll.numpy(), (logits.argmax(-1) == ids[1:]).numpy()


@pytest.mark.parametrize("name", [*CONFIGS, *POST_PROCESSING])
def test_equals_a_float64_brute_force(folders: dict[str, Path], name: str) -> None:
    scorer = load(folders[name], max_batch_tokens=64)
    assert scorer.plain_head == (name in CONFIGS)
    texts = documents(30, 5, CONTEXT, 2, 17, 30, 31)
    for document, scores in zip(texts, scorer.score(texts), strict=True):
        nll, correct = brute_force(folders[name], document)
        assert scores.error is None
        assert scores.correct is not None
        assert scores.nll.dtype == np.float32
        assert scores.nll.shape == scores.correct.shape == document.shape
        assert np.isnan(scores.nll[0])
        assert not scores.correct[0]
        np.testing.assert_allclose(scores.nll[1:], nll, atol=1e-4)
        np.testing.assert_array_equal(scores.correct[1:], correct)


def test_predictions_are_sometimes_correct(folders: dict[str, Path]) -> None:
    scorer = load(folders["llama"])
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    greedy = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=20, do_sample=False, eos_token_id=None)
    (scores,) = scorer.score([greedy[0].numpy().astype(np.int32)])
    assert scores.correct is not None
    assert scores.correct[3:].all()


def test_windows_read_only_their_overlap(folders: dict[str, Path]) -> None:
    window, overlap = 12, 4
    scorer = load(folders["llama"], window=window, overlap=overlap)
    (document,) = documents(50)
    (scores,) = scorer.score([document])
    for begin, end, score_from in [(0, 12, 1), (8, 20, 12), (16, 28, 20), (24, 36, 28), (32, 44, 36), (40, 50, 44)]:
        nll, _ = brute_force(folders["llama"], document[begin:end])
        np.testing.assert_allclose(scores.nll[score_from:end], nll[score_from - begin - 1 :], atol=1e-4)


def test_bos_stands_before_every_window_and_not_in_the_output(folders: dict[str, Path]) -> None:
    bos, window, overlap = 1, 9, 3
    scorer = load(folders["llama"], window=window, overlap=overlap, bos=bos)
    (document,) = documents(18)
    (scores,) = scorer.score([document])
    assert scores.nll.shape == document.shape
    assert np.isnan(scores.nll[0])
    for begin, end, score_from in [(0, 8, 1), (5, 13, 8), (10, 18, 13)]:
        nll, _ = brute_force(folders["llama"], np.concatenate([[bos], document[begin:end]]))
        np.testing.assert_allclose(scores.nll[score_from:end], nll[score_from - begin :], atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_batch_tokens", [1, 40, 100, 10_000])
def test_batching_changes_nothing(folders: dict[str, Path], name: str, max_batch_tokens: int) -> None:
    texts = documents(3, 30, 48, 70, 8, 8, 21, 5, 2, 44)
    alone = load(folders[name], max_batch_tokens=1).score(texts)
    together = load(folders[name], max_batch_tokens=max_batch_tokens).score(texts)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.nll, other.nll, atol=1e-5)


def test_equal_calls_give_equal_bytes(folders: dict[str, Path]) -> None:
    texts = documents(3, 30, 48, 70, 8)
    scorer = load(folders["llama"])
    runs = [[scores.nll.tobytes() for scores in scorer.score(texts)] for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.get_num_threads() == 1


def test_a_bad_document_has_an_error_and_spares_the_others(folders: dict[str, Path]) -> None:
    scorer = load(folders["gpt2"])
    good = documents(20, 11)
    bad = [
        np.array([1, 2, VOCABULARY], np.int32),
        np.array([1, -1, 2], np.int32),
        np.array([0.5, 1.0]),
        np.array([[1, 2], [3, 4]], np.int32),
    ]
    got = scorer.score([good[0], *bad, good[1]])
    for scores, document in zip(got[1:-1], bad, strict=True):
        assert scores.error
        assert scores.correct is None
        assert scores.nll.shape == (document.size,)
        assert np.isnan(scores.nll).all()
    assert "97 at position 2" in str(got[1].error)
    assert "-1 at position 1" in str(got[2].error)
    for scores, wanted in zip([got[0], got[-1]], scorer.score(good), strict=True):
        assert scores.error is None
        np.testing.assert_array_equal(scores.nll, wanted.nll)


def test_scores_that_are_not_finite_are_an_error(folders: dict[str, Path]) -> None:
    scorer = load(folders["llama"])
    texts = documents(6, 6)
    texts[0][:], texts[1][:] = 4, 5
    with torch.no_grad():
        scorer.model.get_input_embeddings().weight[4] = torch.nan
    bad, good = scorer.score(texts)
    assert "nan nats at position 1" in str(bad.error)
    assert good.error is None


def test_empty_and_single_token_documents(folders: dict[str, Path]) -> None:
    empty, single = load(folders["llama"]).score([np.array([], np.int32), np.array([3], np.int32)])
    assert empty.error is None
    assert empty.nll.shape == (0,)
    assert single.error is None
    assert np.isnan(single.nll).tolist() == [True]
    assert single.correct is not None
    assert single.correct.tolist() == [False]
    assert load(folders["llama"]).score([]) == []


def test_a_batch_that_does_not_fit_in_memory_is_split(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = load(folders["llama"])
    texts = documents(20, 20, 20, 20, 20)
    wanted = scorer.score(texts)
    real = scorer._score_batch

    def small_memory(documents: list[np.ndarray], batch: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        if len(batch) > 2:
            raise torch.OutOfMemoryError
        return real(documents, batch)

    monkeypatch.setattr(scorer, "_score_batch", small_memory)
    for scores, expected in zip(scorer.score(texts), wanted, strict=True):
        np.testing.assert_allclose(scores.nll, expected.nll, atol=1e-5)


def test_settings_are_checked(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than the model's context of 48"):
        load(folders["llama"], window=CONTEXT + 1)
    with pytest.raises(ValueError, match="overlap"):
        load(folders["llama"], window=8, overlap=8)
    with pytest.raises(ValueError, match="too short"):
        load(folders["llama"], window=2, bos=1)
    with pytest.raises(ValueError, match="BOS id 97"):
        load(folders["llama"], bos=VOCABULARY)
    with pytest.raises(ValueError, match="dtype"):
        load(folders["llama"], dtype="float31")
    with pytest.raises(TypeError, match="unexpected keyword argument 'block_size'"):
        load(folders["llama"], block_size=16)
    with pytest.raises(ValueError, match="no scorer"):
        loading.scorer("abacus", "model")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="cannot load the model"):
        load(tmp_path)
    scorer = load(folders["llama"])
    assert (scorer.window, scorer.overlap) == (CONTEXT, CONTEXT // 4)


def test_token_batches_are_even_and_bounded() -> None:
    lengths = [3, 10, 4, 10, 9, 1, 30]
    spans = [Span(document, 5, 5 + length, 6) for document, length in enumerate(lengths)]
    batches = [[span.document for span in batch] for batch in token_batches(spans, 20)]
    assert batches == [[6], [1, 3], [4, 2], [0, 5]]


def test_loading_is_silent(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    load(folders["llama"]).score(documents(5))
    assert capfd.readouterr() == ("", "")
