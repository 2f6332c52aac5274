"""The vLLM scorer on a real engine, against the transformers scorer in float32."""

import gzip
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lacy.labelers.llm import load, model_folders
from lacy.labelers.llm.scorer import Scores
from lacy.labelers.llm.vllm_scorer import VllmScorer, _Answer, _Prompt, _read
from lacy.schemas.errors import ModelError
from tests.support.llama import tiny_llama

VOCABULARY, CONTEXT, OVERLAP = 160, 64, 6
WINDOW = CONTEXT - 1  # the longest that vLLM can score
TOLERANCE = 0.02  # nats, mean absolute difference

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("llama")
    tiny_llama(VOCABULARY, CONTEXT, seed=5, initializer_range=0.3).save_pretrained(made)
    return made


def load_vllm(folder: Path, dtype: str = "float32", **settings: object) -> VllmScorer:
    scorer = load.scorer(
        "vllm",
        str(folder),
        dtype=dtype,
        kv_cache_memory_bytes=1 << 28,
        **settings,  # type: ignore[arg-type]
    )
    assert isinstance(scorer, VllmScorer)
    return scorer


@pytest.fixture(scope="session")
def engine(folder: Path) -> Iterator[VllmScorer]:
    """The one engine of the session, but for the slow test, which comes after it; numba was there before it."""
    pytest.importorskip("numba")
    scorer = load_vllm(folder, window=CONTEXT, overlap=OVERLAP, max_batch_tokens=50)  # so that prompts are cut up
    assert scorer.window == WINDOW
    yield scorer
    scorer.close()


def documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths]


def agreement(ours: list[Scores], theirs: list[Scores]) -> tuple[float, float]:
    """Mean absolute difference in nats over all scored tokens, and the share of tokens with equal `correct`."""
    assert [scores.error for scores in ours] == [scores.error for scores in theirs] == [None] * len(ours)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.isnan(one.nll), np.isnan(other.nll))
    difference = np.concatenate([np.abs(a.nll - b.nll)[1:] for a, b in zip(ours, theirs, strict=True)])
    if any(scores.correct is None for scores in ours):
        return float(difference.mean()), 1.0
    same = np.concatenate([a.correct == b.correct for a, b in zip(ours, theirs, strict=True)])
    return float(difference.mean()), float(same.mean())


@needs_vllm
@pytest.mark.parametrize("bos", [None, 3])
def test_agrees_with_transformers_over_several_windows(
    engine: VllmScorer, folder: Path, bos: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "bos", bos)
    texts = documents(200, WINDOW, WINDOW + 1, WINDOW - 1, CONTEXT + 1, 2, 1, 0, 40, 77, 6000)
    exact = load.scorer("transformers", str(folder), window=WINDOW, overlap=OVERLAP, bos=bos, device="cpu")
    ours = engine.score(texts)
    difference, same = agreement(ours, exact.score(texts))
    print(f"mean absolute difference {difference:.2g} nats, {same:.2%} equally correct")
    assert difference < TOLERANCE
    assert same > 0.99
    assert ours[0].nll.dtype == np.float32
    assert ours[0].nll.shape == (200,)


@needs_vllm
def test_the_order_of_documents_changes_nothing(engine: VllmScorer) -> None:
    texts = documents(30, 150, 12, 24, 55)
    forward, backward = engine.score(texts), engine.score(texts[::-1])[::-1]
    for one, other in zip(forward, backward, strict=True):
        np.testing.assert_allclose(one.nll, other.nll, atol=1e-4)


@needs_vllm
def test_a_bad_document_has_an_error_and_spares_the_others(engine: VllmScorer) -> None:
    good = documents(30, 9)
    bad = np.array([1, VOCABULARY], np.int32)
    first, middle, last = engine.score([good[0], bad, good[1]])
    assert "160 at position 1" in str(middle.error)
    assert np.isnan(middle.nll).all()
    for scores, expected in zip([first, last], engine.score(good), strict=True):
        assert scores.error is None
        np.testing.assert_allclose(scores.nll, expected.nll, atol=1e-4)


@needs_vllm
def test_many_small_slices_are_one_result(engine: VllmScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(30, 150, 12, 40)
    whole = engine.score(texts)
    monkeypatch.setattr(engine, "slice_tokens", 65)
    for one, other in zip(whole, engine.score(texts), strict=True):
        np.testing.assert_allclose(one.nll, other.nll, atol=1e-4)


@needs_vllm
def test_threads_can_be_set_after_loading(engine: VllmScorer) -> None:
    assert torch.get_num_threads() == 1
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


@needs_vllm
@pytest.mark.usefixtures("engine")
def test_settings_are_checked(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="longer than the model's context of 64"):
        load_vllm(folder, window=CONTEXT + 1)
    with pytest.raises(ModelError, match="cannot load the model"):
        load_vllm(tmp_path)


def test_without_vllm_the_error_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install 'lacy\\[vllm\\]'"):
        load_vllm(folder)


def test_scores_of_other_tokens_are_not_taken() -> None:
    def output(token_ids: list[int]) -> SimpleNamespace:
        return SimpleNamespace(
            prompt_logprobs=SimpleNamespace(token_ids=token_ids, logprobs=[-1.0, -2.0, -3.0], ranks=[1, 2, 1])
        )

    prompt = _Prompt([7, 8, 9, 5], 2)
    answer = _read(prompt, output([8, 9, 5]))
    assert isinstance(answer, _Answer)
    assert answer.nll.tolist() == [2.0, 3.0]
    assert answer.top is not None
    assert answer.top.tolist() == [False, True]
    assert _read(prompt, output([8, 8, 5])) is None


def test_scores_by_ids() -> None:
    prompt = _Prompt([7, 8, 9, 5], 2)
    answer = _read(prompt, SimpleNamespace(prompt_token_id_logprobs=np.array([[-2.0], [-3.0]])))
    assert isinstance(answer, _Answer)
    assert answer.nll.tolist() == [2.0, 3.0]
    assert answer.top is None
    assert _read(prompt, SimpleNamespace(prompt_token_id_logprobs=np.array([[-2.0]]))) is None


@needs_vllm
def test_requests_by_ids_name_the_scored_tokens(engine: VllmScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No CPU engine takes ids; this one checks the request as vLLM defines it, and scores a token by its id."""

    def generate(inputs: list[dict], parameters: list, use_tqdm: bool) -> list[SimpleNamespace]:
        answers = []
        for prompt, wanted in zip(inputs, parameters, strict=True):
            ids, start = prompt["prompt_token_ids"], wanted.prompt_logprob_start
            rows = wanted.prompt_logprob_token_ids
            assert rows.shape == (len(ids) - 1 - start, 1)
            assert rows[:, 0].tolist() == ids[start + 1 :]
            answers.append(SimpleNamespace(prompt_token_id_logprobs=-rows.astype(np.float32)))
        return answers

    monkeypatch.setattr(engine, "llm", SimpleNamespace(generate=generate))
    monkeypatch.setattr(engine, "by_ids", True)
    for bos in (None, 3):
        monkeypatch.setattr(engine, "bos", bos)
        texts = documents(200, WINDOW, 2, 1, 0)
        for document, scores in zip(texts, engine.score(texts), strict=True):
            assert scores.error is None
            assert scores.correct is None
            np.testing.assert_array_equal(scores.nll[1:], document[1:])


MEMORY = """
import resource, sys
import numpy as np
from lacy.labelers.llm import load

scorer = load.scorer("vllm", sys.argv[1], dtype="float32", kv_cache_memory_bytes=1 << 28)
generator = np.random.default_rng(0)
size = scorer.window - 1
for slices in (4, 16):
    for _ in range(slices):
        documents = generator.integers(0, scorer.vocabulary, (scorer.slice_tokens // size, size)).astype(np.int32)
        assert not any(scores.error for scores in scorer.score(list(documents)))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@needs_vllm
@pytest.mark.slow
def test_host_memory_is_flat(folder: Path) -> None:
    """The peak after 20 slices, against that after 4."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(folder)], capture_output=True, text=True, timeout=500, check=True
    )
    after_4, after_20 = map(int, done.stdout.split()[-2:])
    print(f"peak {after_4 / 1024:,.0f} MiB after 4 slices, {after_20 / 1024:,.0f} MiB after 20")
    assert after_20 <= 1.15 * after_4


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance", "alike"), [("float32", TOLERANCE, 0.99), ("bfloat16", 0.05, 0.97)])
def test_the_real_model_on_real_documents(
    dev_data: Path, request: pytest.FixtureRequest, dtype: str, tolerance: float, alike: float
) -> None:
    """50 documents of several windows; minutes on a CPU."""
    from tokenizers import Tokenizer

    try:
        model = model_folders.get_model()
    except ModelError as error:
        pytest.skip(str(error))
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with gzip.open(dev_data / "dwiki-dev.jsonl.gz", "rt") as lines:
        texts = [json.loads(line)["text"] for line, _ in zip(lines, range(50), strict=False)]
    ids = [np.array(tokenizer.encode(text).ids[:170], np.int32) for text in texts]

    settings = {"window": 64, "overlap": 16}
    exact = load.scorer("transformers", str(model), device="cpu", **settings)  # type: ignore[arg-type]
    theirs = exact.score(ids)
    exact.close()
    request.getfixturevalue("engine").close()  # a process has one CPU engine at a time
    scorer = load_vllm(model, dtype, **settings)
    ours = scorer.score(ids)
    scorer.close()
    difference, same = agreement(ours, theirs)
    print(f"{sum(map(len, ids))} tokens: mean absolute difference {difference:.2g} nats, {same:.2%} equally correct")
    assert difference <= tolerance
    assert same > alike
