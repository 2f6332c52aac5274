"""The scorer and the chat on a real vLLM server, against the transformers scorer in float32."""

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from lacy.labelers.judge import passages
from lacy.labelers.llm import load, model_folders
from lacy.labelers.llm.scorer import Scores
from lacy.labelers.llm.server_scorer import ServerScorer
from lacy.schemas.errors import ModelError
from tests.conftest import LACY, run_lacy
from tests.e2e.test_label import digests, rows
from tests.support import corpora
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.forks import Forks
from tests.support.vllm_server import vllm_server

CONTEXT, WINDOW, OVERLAP = 160, 128, 32
LENGTHS = (1, 2, 17, 60, 300)
TOLERANCE = 0.02  # nats, mean absolute difference


@pytest.fixture(scope="session")
def model() -> Path:
    try:
        return model_folders.get_model()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def server(model: Path) -> Iterator[str]:
    alone = ("--max-num-seqs", "1")  # else what runs beside a prompt can change the last bits of its scores
    with vllm_server(model, context=CONTEXT, served_name="served", extra=alone) as url:
        yield url


@pytest.fixture(scope="module")
def texts(model: Path) -> list[np.ndarray]:
    """The README, cut up."""
    readme = Path(__file__).parents[3] / "README.md"
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(readme.read_text()).ids
    starts = np.cumsum([0, *LENGTHS])
    assert starts[-1] <= len(ids)
    return [np.array(ids[begin : begin + size], np.int32) for begin, size in zip(starts, LENGTHS, strict=False)]


@pytest.fixture(scope="module")
def exact(model: Path, texts: list[np.ndarray]) -> list[Scores]:
    scorer = load.scorer(
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
    asker = load.chat("server", "served", servers=[server])
    question = [{"role": "user", "content": "Paris is the capital of France: fact or opinion?"}]
    good, long = asker.ask([question, [{"role": "user", "content": "a b " * CONTEXT}]], schema, 24)
    asker.close()
    assert asker.context == CONTEXT
    assert good.error is None
    assert json.loads(str(good.text))["kind"] in ("fact", "opinion")
    assert long.text is None
    assert "HTTP 400" in str(long.error)


def test_a_run_survives_its_servers_and_writes_the_same_bytes(
    server: str, model: Path, tmp_path: Path, labeller: Forks
) -> None:
    """Two ways to the real server: one breaks down in mid-run for a while, the other answers with every fault."""
    corpus = corpora.write(tmp_path / "c.jsonl", corpora.documents(12, seed=7, sentences=3))
    command = ["label", corpus, "--reference", model, "--window", WINDOW, "--part-bytes", 1024, "--workers", 1]
    done = labeller(*command, "--out", tmp_path / "calm", "--server", server)
    assert done.returncode == 0, done.stderr
    trouble = map(Fault, ("status", "reset", "truncate", "other_ids", "drop", "close", "garbage"))
    faults = [fault for kind in trouble for fault in (kind, None)]
    stops = [None] * 3 + [Fault("stop", seconds=3.0)]
    with FaultyProxy(server, [None, *faults]) as odd, FaultyProxy(server, stops) as dying:
        done = labeller(*command, "--out", tmp_path / "rough", "--server", f"{odd.url},{dying.url}/v1/")
        assert len(odd.requests) > 6
        assert len(dying.requests) > len(stops)
    assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "rough") == digests(tmp_path / "calm")
    manifest = json.loads((tmp_path / "rough" / "manifest.json").read_text())
    assert manifest["bad"] == 0
    assert {part["scored"]["reference"] for part in manifest["parts"]} == {"server prompt_logprobs"}


def test_a_document_that_no_server_takes_is_a_dead_letter(
    server: str, model: Path, tmp_path: Path, labeller: Forks
) -> None:
    texts = corpora.documents(6, seed=9, sentences=1)
    corpus = corpora.write(tmp_path / "c.jsonl", texts)
    ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(texts[3]["text"]).ids[:20]

    def fault(body: Any) -> Fault | None:
        """For requests that hold the fourth document, behind a BOS or not."""
        return Fault("status") if any(ids in (prompt[:20], prompt[1:21]) for prompt in body["prompt"]) else None

    with FaultyProxy(server, fault) as proxy:
        more = ("--reference", model, "--window", WINDOW, "--workers", 1, "--server", proxy.url)
        done = labeller("label", corpus, "--out", tmp_path / "d", *more)
    assert done.returncode == 0, done.stderr
    (letter,) = [json.loads(line) for line in next((tmp_path / "d" / "deadletter").iterdir()).open()]
    assert letter["doc_id"] == texts[3]["id"]
    assert "HTTP 500" in letter["reason"]
    assert [row["doc_id"] for row in rows(tmp_path / "d")] == [row["id"] for row in texts if row != texts[3]]


@pytest.mark.slow
def test_a_judge_on_a_server_that_cannot_take_its_prompt_is_counted(server: str, model: Path, tmp_path: Path) -> None:
    texts = corpora.documents(3, seed=8)
    corpus = corpora.write(tmp_path / "c.jsonl", texts)
    judge = ("--judge", "served", "--judge-server", server, "--policy", "judge")
    done = run_lacy("label", corpus, "--out", tmp_path / "d", "--reference", "none", "--tokenizer", model, *judge)
    assert done.returncode == 0, done.stderr
    windows = sum(len(passages(row["text"])) for row in texts)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert manifest["judged"] == {"windows_judged": 0, "windows_unjudged": windows, "spans": 0, "spans_dropped": 0}
    assert f"0 windows judged, {windows} not" in done.stderr
    assert {score for row in rows(tmp_path / "d") for score in row["judge"]} == {None}


@pytest.mark.slow
def test_one_of_two_real_servers_is_killed(model: Path, small_model: Path, tmp_path: Path) -> None:
    corpus = corpora.write(tmp_path / "c.jsonl", corpora.documents(200, seed=7))
    command = ["label", corpus, "--reference", small_model, "--window", 200, "--part-bytes", 2048, "--workers", 1]
    alone = ("--max-num-seqs", "1")
    with vllm_server(small_model, context=256, extra=alone) as one:
        long = [np.random.default_rng(0).integers(0, 800, size).astype(np.int32) for size in (6000, 1, 255, 256)]
        ours = ServerScorer(str(small_model), servers=[one]).score(long)
        exact = load.scorer("transformers", str(small_model), device="cpu", window=255).score(long)
        for mine, theirs in zip(ours, exact, strict=True):
            assert mine.error is None
            np.testing.assert_allclose(mine.nll, theirs.nll, atol=1e-3)
        with vllm_server(small_model, context=256, extra=alone) as two:
            done = run_lacy(*command, "--out", tmp_path / "calm", "--server", f"{one},{two}")
            assert done.returncode == 0, done.stderr
            run = [str(word) for word in [LACY, *command, "--out", tmp_path / "rough", "--server", f"{two},{one}"]]
            process = subprocess.Popen(run, stderr=subprocess.PIPE, text=True)
            while len(list((tmp_path / "rough" / ".parts").glob("*.json"))) < 5:
                assert process.poll() is None
                time.sleep(0.02)
        _, stderr = process.communicate(timeout=300)  # the second server has ended with its block
    assert process.returncode == 0, stderr
    assert digests(tmp_path / "rough") == digests(tmp_path / "calm")
