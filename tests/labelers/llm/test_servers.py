"""The pool of servers and the scorer on it, against servers that fail in every way that is known."""

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from lacy.labelers.llm.chat import Reply
from lacy.labelers.llm.client import base_url
from lacy.labelers.llm.server_chat import ServerChat
from lacy.labelers.llm.server_scorer import REQUEST_PROMPTS, REQUEST_TOKENS, ServerScorer
from lacy.labelers.llm.servers import BadAnswerError, Refused, ServerPool
from lacy.schemas.errors import ModelError
from tests.support.faulty_proxy import Fault, FaultyProxy, wait_until

VOCABULARY, WINDOW, OVERLAP = 500, 32, 8
POISON = 499  # the fake fails on prompts with this id
QUICK = {"backoff": 0.02, "patience": 5.0, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LACY_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def logprob(before: int, token: int) -> float:
    return -((before * 31 + token * 17) % 1000) / 100


def expected(document: np.ndarray) -> np.ndarray:
    nll = [-logprob(before, token) for before, token in itertools.pairwise(document.tolist())]
    return np.array([np.nan, *nll][: len(document)], dtype=np.float32)


class Fake:
    """Completions by a formula: the log-probability of a token depends on it and on the one before."""

    def __init__(
        self, *, delay: float = 0.0, ways: tuple[str, ...] = ("prompt_logprobs", "echo"), models: Any = ("fake",)
    ) -> None:
        self.delay, self.ways = delay, ways
        self.models = [{"id": name, "max_model_len": WINDOW + 1} for name in models]

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, {}
        if path == "/v1/models":
            return 200, {"data": self.models}
        if body["model"] not in [model["id"] for model in self.models]:
            return 404, {"error": {"message": "no such model"}}
        time.sleep(self.delay)
        if path == "/v1/chat/completions":
            return 200, {"choices": [{"message": {"content": body["messages"][-1]["content"].upper()}}]}
        if any(POISON in prompt for prompt in body["prompt"]):
            return 500, {"error": {"message": "poison"}}
        choices = [self.choice(index, prompt, body) for index, prompt in enumerate(body["prompt"])]
        return 200, {"choices": choices[::-1]}

    def choice(self, index: int, prompt: list[int], body: Any) -> Any:
        values = [None, *(logprob(*pair) for pair in itertools.pairwise(prompt))]
        choice: dict[str, Any] = {"index": index, "text": ""}
        if "prompt_logprobs" in body and "prompt_logprobs" in self.ways:
            choice["prompt_logprobs"] = [
                value if value is None else {str(token): {"logprob": value, "rank": 1 + token % 2}}
                for token, value in zip(prompt, values, strict=True)
            ]
        if body.get("echo") and "echo" in self.ways:
            named = body.get("return_tokens_as_token_ids")
            choice["logprobs"] = {
                "token_logprobs": values,
                "tokens": [f"token_id:{token}" if named else "x" for token in prompt],
                "top_logprobs": [None, *({"a": value, "b": -5.0} for value in values[1:])],
            }
        return choice


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultyProxy]]:
    with ExitStack() as stack:
        yield lambda upstream=None, faults=(): stack.enter_context(FaultyProxy(upstream or Fake(), faults))


@pytest.fixture
def load() -> Iterator[Callable[..., ServerScorer]]:
    with ExitStack() as stack:

        def made(*proxies: FaultyProxy, **settings: Any) -> ServerScorer:
            arguments = {"servers": [proxy.url for proxy in proxies], "vocabulary": VOCABULARY, "overlap": OVERLAP}
            scorer = ServerScorer("fake", **(arguments | QUICK | settings))  # type: ignore[arg-type]
            stack.callback(scorer.close)
            return scorer

        yield made


def documents(*lengths: int) -> list[np.ndarray]:
    generator = np.random.default_rng(3)
    return [generator.integers(0, POISON, length).astype(np.int32) for length in lengths]


def check(scorer: ServerScorer, texts: list[np.ndarray]) -> None:
    counted: list[int] = []
    for document, scores in zip(texts, scorer.score(texts, counted.append), strict=True):
        assert scores.error is None
        np.testing.assert_array_equal(scores.nll, expected(document))
        assert scores.nll.dtype == np.float32
    assert sum(counted) == sum(max(len(document) - 1, 0) for document in texts)


LENGTHS = (200, 1, 0, 2, WINDOW, WINDOW + 1, 5, 77, 40, 300, 9)
FAULTS = {
    "500": Fault("status"),
    "503 with Retry-After": Fault("status", status=503, retry_after="0"),
    "429 with Retry-After": Fault("status", status=429, retry_after="0.05"),
    "429 with a date": Fault("status", status=429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429": Fault("status", status=429),
    "408": Fault("status", status=408),
    "hang": Fault("hang", seconds=5),
    "close": Fault("close"),
    "reset": Fault("reset"),
    "truncate": Fault("truncate"),
    "drop": Fault("drop"),
    "other ids": Fault("other_ids"),
    "garbage": Fault("garbage"),
    "stop": Fault("stop", seconds=0.2),
}


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_scores_are_those_of_the_formula(serve: Any, load: Any, way: str) -> None:
    scorer = load(proxy := serve(Fake(ways=(way,))))
    assert (scorer.window, scorer.path) == (WINDOW, f"server {way}")
    check(scorer, documents(*LENGTHS))
    for _, body in proxy.requests:
        assert len(body["prompt"]) <= REQUEST_PROMPTS
        assert sum(map(len, body["prompt"])) <= REQUEST_TOKENS
        assert all(len(prompt) <= WINDOW for prompt in body["prompt"])
    assert len(proxy.requests) < len(LENGTHS)


def test_the_most_likely_tokens_are_told_in_both_ways(serve: Any, load: Any) -> None:
    (document,) = documents(50)
    ((ranked,), (topped,)) = (
        load(serve(Fake(ways=(way,))), bos=7).score([document]) for way in ("prompt_logprobs", "echo")
    )
    assert ranked.correct.tolist() == [False, *(document[1:] % 2 == 0)]
    assert topped.correct.tolist() == [False, *(topped.nll[1:] <= 5)]


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_fault_changes_no_score(serve: Any, load: Any, monkeypatch: pytest.MonkeyPatch, fault: Fault) -> None:
    monkeypatch.setattr("lacy.labelers.llm.server_scorer.REQUEST_TOKENS", 100)
    script = [None, None, fault, None, fault, fault]
    scorer = load(proxy := serve(Fake(), script), timeout=0.3, concurrency=2)
    check(scorer, documents(*LENGTHS))
    assert len(proxy.requests) > len(script)


@pytest.mark.parametrize("fault", ["truncate", "drop", "other ids", "close"])
def test_a_fault_changes_no_score_of_an_echo(serve: Any, load: Any, fault: str) -> None:
    scorer = load(proxy := serve(Fake(ways=("echo",)), [None, None, FAULTS[fault], FAULTS[fault]]))
    check(scorer, documents(*LENGTHS))
    assert len(proxy.requests) > 4


def test_only_the_document_that_always_fails_has_an_error(serve: Any, load: Any) -> None:
    texts = documents(*LENGTHS)
    texts[7][50] = POISON
    scores = load(serve(), serve()).score(texts)
    assert "4 tries failed, the last with: http://127.0.0.1:" in scores[7].error
    assert scores[7].error.endswith("answered HTTP 500: poison")
    assert np.isnan(scores[7].nll).all()
    for index, document in enumerate(texts):
        if index != 7:
            assert scores[index].error is None
            np.testing.assert_array_equal(scores[index].nll, expected(document))


def test_neighbours_of_what_kills_the_server_are_spared(serve: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lacy.labelers.llm.server_scorer.REQUEST_TOKENS", 40)
    texts = documents(*[WINDOW] * 12)
    texts[5][9] = POISON

    def deadly(body: Any) -> Fault | None:
        return Fault("stop", seconds=0.1) if any(POISON in prompt for prompt in body["prompt"]) else None

    scores = load(serve(Fake(delay=0.05), deadly), concurrency=6).score(texts)
    assert [index for index, score in enumerate(scores) if score.error] == [5]
    assert "4 tries failed" in scores[5].error


def test_what_a_server_says_of_a_request_is_one_line(serve: Any, load: Any) -> None:
    def picky(body: Any) -> Fault | None:
        return Fault("status", status=400, message="too\n  odd") if any(13 in ids for ids in body["prompt"]) else None

    odd, even = np.array([1, 13, 2]), np.array([1, 2])
    scorer = load(proxy := serve(Fake(), picky))
    first, second = scorer.score([odd, even])
    assert first.error == "the server answered HTTP 400: too odd"
    assert second.error is None
    assert len(proxy.requests) == 4  # the trial, both, each


def test_an_impossible_token_is_an_error(serve: Any, load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.logprob", lambda before, token: -9999.0 if token == 3 else -1.0)
    bad, good = load(serve()).score([np.array([1, 2, 3]), np.array([1, 2])])
    assert bad.error == "the reference gives inf nats at position 2"
    assert good.nll[1] == 1


def test_a_bad_document_is_never_sent(serve: Any, load: Any) -> None:
    bad, good = load(serve()).score([np.array([1, VOCABULARY]), np.array([1, 2])])
    assert "500 at position 1" in bad.error
    assert good.error is None


def test_a_server_that_stops_is_left_out_and_comes_back(serve: Any, load: Any, caplog: Any) -> None:
    steady, flaky = serve(Fake(delay=0.01)), serve(Fake(delay=0.01))
    scorer = load(steady, flaky, concurrency=2)
    with ThreadPoolExecutor(1) as executor:
        checked = executor.submit(check, scorer, documents(20000))
        wait_until(lambda: len(flaky.requests) > 2)
        flaky.stop()
        seen = len(flaky.requests), len(steady.requests)
        wait_until(lambda: len(steady.requests) > seen[1] + 3)
        flaky.start()
        checked.result()
    wait_until(lambda: f"{flaky.url} is back" in caplog.text)
    assert f"{flaky.url} is out of the pool for now" in caplog.text
    check(scorer, documents(20000))
    assert len(flaky.requests) > seen[0] + 1


def test_all_gone_is_an_error_within_patience(serve: Any, load: Any) -> None:
    scorer = load(proxy := serve(), patience=0.5)
    proxy.stop()
    began = time.monotonic()
    with pytest.raises(ModelError, match=f"no server answers: no connection to {proxy.url}"):
        scorer.score(documents(100))
    assert 0.4 < time.monotonic() - began < 3
    with pytest.raises(ModelError, match="no server answers"):
        load(proxy, patience=0.2)
    proxy.start()
    check(load(proxy), documents(100))


def test_one_server_is_enough_to_start(serve: Any, load: Any) -> None:
    gone, steady = serve(), serve()
    gone.stop()
    check(load(gone, steady), documents(100))


def test_the_key_comes_from_the_environment_and_stays_there(
    serve: Any, load: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "other")
    monkeypatch.setenv("LACY_API_KEY", "sk-secret")
    load(proxy := serve()).score(documents(9))
    assert {headers["authorization"] for headers in proxy.headers} == {"Bearer sk-secret"}
    loud = load(serve(Fake(), [None, *[Fault("status", status=400, message="what is sk-secret?")] * 9]))
    assert loud.score(documents(9))[0].error.endswith("what is ***?")
    with pytest.raises(ModelError, match="refused the key: set LACY_API_KEY"):
        load(serve(Fake(), [Fault("status", status=401, message="sk-secret is no key")]))
    monkeypatch.delenv("LACY_API_KEY")
    load(proxy := serve())
    assert proxy.headers[0]["authorization"] == "Bearer other"
    monkeypatch.delenv("OPENAI_API_KEY")
    load(proxy := serve())
    assert "authorization" not in proxy.headers[0]
    assert "secret" not in caplog.text


def test_no_more_requests_are_in_flight_than_allowed(serve: Any, load: Any) -> None:
    proxies = [serve(Fake(delay=0.02)) for _ in range(2)]
    scorer = load(*proxies, concurrency=3)
    check(scorer, documents(60000))
    assert [proxy.peak for proxy in proxies] == [3, 3]
    assert all(len(proxy.requests) > 3 for proxy in proxies)


def test_bodies_are_made_as_they_are_needed(serve: Any) -> None:
    made: list[int] = []

    def bodies() -> Iterator[dict[str, Any]]:
        for number in range(50):
            made.append(number)
            yield {"model": "fake", "messages": [{"content": str(number)}]}

    waiting: list[int] = []
    pool = ServerPool([serve().url], concurrency=2)
    answers = pool.post_all(
        "/v1/chat/completions",
        bodies(),
        lambda answer, body: body["messages"][0]["content"],
        lambda index, answer: waiting.append(len(made) - len(waiting)),
    )
    assert answers == [str(number) for number in range(50)]
    assert waiting[0] <= 4
    pool.close()
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.post_all("/v1/chat/completions", [{}], lambda answer, body: None)


def test_what_the_caller_raises_ends_the_call_and_not_the_pool(serve: Any) -> None:
    body = {"model": "fake", "messages": [{"content": "a"}]}
    pool = ServerPool([serve().url], backoff=0.01)

    def stop(index: int, answer: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pool.post_all("/v1/chat/completions", [body] * 20, lambda answer, _: 1, stop)
    assert pool.post_all("/v1/chat/completions", [body], lambda answer, _: 1) == [1]

    def reject(answer: Any, body: Any) -> None:
        raise BadAnswerError("never\ngood")

    (refused,) = pool.post_all("/v1/chat/completions", [body], reject)
    assert isinstance(refused, Refused)
    assert refused.reason.endswith("gave a wrong answer: never good")
    pool.close()


def test_the_model_is_the_one_that_the_servers_have(serve: Any, load: Any) -> None:
    only, several = serve(Fake(models=["served"])), serve(Fake(models=["a", "b"]))
    assert load(only).name == "served"
    assert load(several, served_name="b").name == "b"
    with pytest.raises(ModelError, match="has no model 'fake': use one of a, b"):
        load(several)
    with pytest.raises(ModelError, match="has no model 'c': use one of served"):
        load(only, served_name="c")
    scorer = load(proxy := serve(fake := Fake()))
    fake.models = [{"id": "new"}]
    with pytest.raises(ModelError, match=f"{proxy.url} has no model 'fake': use one of new"):
        scorer.score(documents(9))


def test_the_window_fits_the_servers(serve: Any, load: Any) -> None:
    assert load(serve(), window=20).window == 20
    with pytest.raises(ModelError, match=r"window 33 does not fit: .* set the window to 32 or less"):
        load(serve(), window=33)


def test_a_server_without_logprobs_of_prompts_is_named(serve: Any, load: Any) -> None:
    with pytest.raises(ModelError, match="no server returns log-probabilities of a prompt: serve the model with vLLM"):
        load(serve(Fake(ways=())))


@pytest.mark.parametrize("url", ["ftp://host", "host:8000", "http://", "http://me:secret@host", "http://host?a=secret"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ModelError) as raised:
        ServerPool([url])
    assert "secret" not in str(raised.value)


def test_urls_are_taken_with_and_without_version() -> None:
    for url in ("http://host:1/x", "http://host:1/x/", "http://host:1/x/v1", "http://host:1/x/v1/"):
        assert base_url(url) == "http://host:1/x"


def test_chat(serve: Any) -> None:
    def picky(body: Any) -> Fault | None:
        return Fault("status", status=400, message="too long") if body["messages"][0]["content"] == "b" else None

    chat = ServerChat("fake", servers=[(proxy := serve(Fake(), picky)).url], **QUICK)
    schema = {"type": "object"}
    first, second, third = chat.ask([[{"role": "user", "content": text}] for text in "abc"], schema, 7)
    assert (first, third) == (Reply("A"), Reply("C"))
    assert second == Reply(None, "the server answered HTTP 400: too long")
    body = proxy.requests[0][1]
    assert (body["temperature"], body["seed"], body["max_tokens"]) == (0, 0, 7)
    assert body["response_format"]["json_schema"] == {"name": "answer", "schema": schema, "strict": True}
    assert chat.context == WINDOW + 1
    chat.ask([[{"role": "user", "content": "d"}]], None, 7)
    assert "response_format" not in proxy.requests[-1][1]
    chat.close()
    chat.close()
