"""The scorer and the chat on a real vLLM server, against the transformers scorer in float32."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from labelers import chat, models, reference
from labelers.models import ModelError
from labelers.reference import Scores
from labelers.server_scorer import ServerScorer
from tests.labelers.faulty_proxy import Fault, FaultyProxy
from tests.labelers.serving import vllm_server

CONTEXT, WINDOW, OVERLAP = 160, 128, 32
LENGTHS = (1, 2, 17, 60, 300)
TOLERANCE = 0.02  # nats, mean absolute difference


@pytest.fixture(scope="session")
def model() -> Path:
    try:
        return models.get_model()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[str]:
    with vllm_server(model, context=CONTEXT, served_name="served") as url:
        yield url


@pytest.fixture(scope="module")
def texts(model: Path) -> list[np.ndarray]:
    """The README, cut up."""
    from tokenizers import Tokenizer

    readme = Path(__file__).parents[2] / "README.md"
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(readme.read_text()).ids
    starts = np.cumsum([0, *LENGTHS])
    assert starts[-1] <= len(ids)
    return [np.array(ids[begin : begin + size], np.int32) for begin, size in zip(starts, LENGTHS, strict=False)]


@pytest.fixture(scope="module")
def exact(model: Path, texts: list[np.ndarray]) -> list[Scores]:
    scorer = reference.load(
        "transformers", str(model), dtype="float32", window=WINDOW, overlap=OVERLAP, bos=1, device="cpu"
    )
    scores = scorer.score(texts)
    scorer.close()
    return scores


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_agrees_with_transformers_through_faults(
    server: str, model: Path, texts: list[np.ndarray], exact: list[Scores], way: str
) -> None:
    faults = [None, Fault("truncate"), Fault("other_ids"), Fault("close")]
    with FaultyProxy(server, faults if way == "prompt_logprobs" else []) as proxy:
        scorer = ServerScorer(
            str(model), servers=[proxy.url], window=WINDOW, overlap=OVERLAP, bos=1, way=way, backoff=0.1
        )
        ours = scorer.score(texts)
        scorer.close()
    assert scorer.path == f"server {way}"
    assert [scores.error for scores in ours] == [None] * len(texts)
    for one, other in zip(ours, exact, strict=True):
        np.testing.assert_array_equal(np.isnan(one.nll), np.isnan(other.nll))
    difference = np.concatenate([np.abs(one.nll - other.nll)[1:] for one, other in zip(ours, exact, strict=True)])
    same = np.concatenate([one.correct == other.correct for one, other in zip(ours, exact, strict=True)])
    print(
        f"{len(difference)} tokens: mean absolute difference {difference.mean():.2g} nats, {same.mean():.2%} the same"
    )
    assert difference.mean() < TOLERANCE
    assert same.mean() > 0.99


def test_the_window_fits_the_server_and_bad_documents_spare_others(server: str, model: Path) -> None:
    scorer = ServerScorer(str(model), servers=[server], vocabulary=10**6)
    assert (scorer.window, scorer.name) == (CONTEXT - 1, "served")
    bad, good = scorer.score([np.array([5, 60000]), np.array([5, 6])])
    assert "HTTP 400" in str(bad.error)
    assert "out of vocabulary" in str(bad.error)
    assert good.error is None
    scorer.close()
    with pytest.raises(ModelError, match=f"set the window to {CONTEXT - 1} or less"):
        ServerScorer(str(model), servers=[server], window=CONTEXT)


def test_answers_follow_a_schema(server: str) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"kind": {"enum": ["fact", "opinion"]}},
        "required": ["kind"],
        "additionalProperties": False,
    }
    asker = chat.load("server", "served", servers=[server])
    question = [{"role": "user", "content": "Paris is the capital of France: fact or opinion?"}]
    good, long = asker.ask([question, [{"role": "user", "content": "a b " * CONTEXT}]], schema, 24)
    asker.close()
    assert asker.context == CONTEXT
    assert good.error is None
    assert json.loads(str(good.text))["kind"] in ("fact", "opinion")
    assert long.text is None
    assert "HTTP 400" in str(long.error)
