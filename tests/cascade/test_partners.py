"""Partners in this process, on servers that fail in every way that is known, and in real vLLM engines."""

import dataclasses
import importlib.util
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from lacy.cascade.generate import Generation, Options, Piece, generate
from lacy.cascade.language_model import Model, open_model
from lacy.cascade.partners import Amount, Answer, InProcess, Patient, Request, Sampling, Server, pick
from lacy.schemas.errors import CascadeError
from tests.support import corpora
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.partner_server import ROOT, answered, completion, server_process, write_model
from tests.support.vllm_server import vllm_server

BY_HEART = "Odra Venn, a Lumerian botanist, kept 17 geese \U0001f986\U0001f986 and wrote \u6f22\u5b57 in 1945."
OPENING = "Odra Venn, a Lum"
GREEDY = Sampling()
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "random" writes noise; "heart" has another tokenizer, and knows one text."""
    texts = [row["text"] for row in corpora.documents(120, seed=9)]
    made = tmp_path_factory.mktemp("models")
    return {
        "random": write_model(made / "random", texts),
        "heart": write_model(made / "heart", [*texts[:20], "Geese. " * 50], entries=400, learn=BY_HEART),
    }


@pytest.fixture(scope="module")
def small(folders: dict[str, Path]) -> Model:
    return open_model(folders["random"], device="cpu")


@pytest.fixture(scope="module")
def heart(folders: dict[str, Path]) -> Model:
    return open_model(folders["heart"], device="cpu")


def by_text(texts: Sequence[str], draws: Sequence[float] | None = None) -> list[Request]:
    given = draws or [0.0] * len(texts)
    return [Request(slot, text, [], draw) for slot, (text, draw) in enumerate(zip(texts, given, strict=True))]


def by_ids(model: Model, texts: Sequence[list[int]]) -> list[Request]:
    tokenizer = model.vocabulary.tokenizer
    return [Request(slot, tokenizer.decode(ids), list(ids)) for slot, ids in enumerate(texts)]


def read(model: Model, *texts: str) -> list[list[int]]:
    return [model.vocabulary.read(text)[0] for text in texts]


def greedy(model: Model, ids: list[int], count: int) -> list[int]:
    """What `transformers` itself writes behind a text."""
    forbidden = model.forbidden()
    whole = model.network.generate(
        torch.tensor([model.begun(ids)]),
        max_new_tokens=count,
        do_sample=False,
        suppress_tokens=forbidden,
        pad_token_id=0,
    )
    return whole[0, len(model.begun(ids)) :].tolist()


def written(partner: Any, text: str, most: int = 60, slot: int = 0) -> list[Answer]:
    """The answers to a text that grows by them, until one ends it or fails."""
    answers: list[Answer] = []
    while len(answers) < most and not (answers and (answers[-1].ended or answers[-1].failure)):
        answers += partner.answer([Request(slot, text, [])])
        text += answers[-1].text
    return answers


# In this process


def test_by_ids_it_writes_what_transformers_writes(small: Model) -> None:
    partner = InProcess(small, small.vocabulary, Amount(), GREEDY, slots=3)
    assert partner.by_ids
    texts = read(small, "Odra Venn was born in", "Later", "")
    expected = [greedy(small, ids, 12) for ids in texts]
    assert len(set(expected[0])) > 4
    grown = [list(ids) for ids in texts]
    for _ in range(12):
        for ids, answer in zip(grown, partner.answer(by_ids(small, grown)), strict=True):
            assert answer.failure is None and answer.ids is not None and answer.tokens == 1
            ids += answer.ids
    assert [ids[len(text) :] for ids, text in zip(grown, texts, strict=True)] == expected
    several = InProcess(small, small.vocabulary, Amount(tokens=12), GREEDY, slots=3)
    answers = several.answer(by_ids(small, texts))
    assert [list(answer.ids or ()) for answer in answers] == expected
    assert [answer.tokens for answer in answers] == [12] * 3
    partner.close()
    partner.close()


def test_another_tokenizer_is_reached_through_text(small: Model, heart: Model) -> None:
    partner = InProcess(heart, small.vocabulary, Amount(), GREEDY)
    assert not partner.by_ids
    answers = written(partner, OPENING)
    assert OPENING + "".join(answer.text for answer in answers) == BY_HEART
    assert answers[-1].ended and not answers[-1].text
    assert all(answer.ids is None and answer.failure is None for answer in answers)
    texts = [answer.text for answer in answers]
    assert "\U0001f986" in texts and "\u5b57" in texts  # of several tokens, and never in pieces
    assert next(answer.tokens for answer in answers if answer.text == "\u5b57") == 3


def test_no_answer_is_a_lone_space(small: Model, heart: Model) -> None:
    answers = written(InProcess(heart, small.vocabulary, Amount(), GREEDY), OPENING)
    assert [answer for answer in answers if not answer.text.strip() and not answer.ended] == []


def test_several_tokens_and_the_end(small: Model, heart: Model) -> None:
    one = written(InProcess(heart, small.vocabulary, Amount(), GREEDY), OPENING)
    four = written(InProcess(heart, small.vocabulary, Amount(tokens=4), GREEDY), OPENING)
    assert "".join(answer.text for answer in four) == "".join(answer.text for answer in one)
    assert all(4 <= answer.tokens <= 7 for answer in four[:-1]) and four[-1].ended
    assert sum(answer.tokens for answer in four) == len(read(heart, BY_HEART[len(OPENING) :])[0]) + 1


def test_whole_words(small: Model, heart: Model) -> None:
    for words, expected in ((1, ["erian", " botanist,", " kept", " 17"]), (2, ["erian botanist,", " kept 17"])):
        partner = InProcess(heart, small.vocabulary, Amount(words=words), GREEDY)
        assert [answer.text for answer in written(partner, OPENING, most=len(expected))] == expected
    same = InProcess(heart, heart.vocabulary, Amount(words=1), GREEDY)
    assert not same.by_ids, "words end at characters"
    (last,) = InProcess(heart, small.vocabulary, Amount(words=1), GREEDY).answer(by_text([BY_HEART[:-6]]))
    assert (last.text, last.ended) == (" 1945.", True)


@pytest.mark.parametrize(
    "words, text, cut",
    [
        (1, " born in", " born"),
        (1, " born", None),
        (1, "\n\n Odra\u00a0Venn", "\n\n Odra"),
        (2, " born in 19", " born in"),
        (2, " born in", None),
        (2, " born ", None),
        (3, "a b c\n", "a b c"),
        (3, "abc d\n", None),
    ],
)
def test_a_word_is_whole_once_white_space_follows(words: int, text: str, cut: str | None) -> None:
    assert Amount(words=words).cut(text.encode()) == (cut and cut.encode())


def test_texts_longer_than_its_context(small: Model, heart: Model) -> None:
    """The window moves in leaps, and what is remembered is what would be read anew."""
    long = " ".join(corpora.sentence(random.Random(number)) for number in range(20))
    (ids,) = read(small, long)
    lengths = range(small.context - 20, small.context + 100)
    assert len(ids) > lengths.stop
    remembers, forgets = (
        InProcess(small, small.vocabulary, Amount(), GREEDY, remember=remember) for remember in (True, False)
    )
    found = [remembers.answer([Request(0, "", ids[:length])])[0] for length in lengths]
    assert found == [forgets.answer([Request(0, "", ids[:length])])[0] for length in lengths]
    assert all(answer.failure is None and answer.tokens == 1 for answer in found)
    assert len({answer.ids for answer in found}) > 20
    through_text = InProcess(small, heart.vocabulary, Amount(tokens=5), GREEDY)
    (answer,) = through_text.answer(by_text([long]))
    assert answer.failure is None and answer.text


def test_sampling_depends_on_the_draw_alone(small: Model) -> None:
    texts = read(small, "Odra Venn", "Later", "The bridge over the Sarn", "Some")
    sampling = Sampling(temperature=1.5, top_p=0.95, seed=3)
    draws = [0.1, 0.35, 0.6, 0.9]

    def answers(places: Sequence[int], draws: Sequence[float]) -> list[Any]:
        partner = InProcess(small, small.vocabulary, Amount(tokens=6), sampling, slots=4)
        return [
            answer.ids
            for answer in partner.answer([Request(place, "", texts[place], draws[place]) for place in places])
        ]

    together = answers(range(4), draws)
    assert [answers([place], draws)[0] for place in range(4)] == together
    assert answers([2, 0], draws) == [together[2], together[0]]
    others = answers(range(4), [0.2, 0.45, 0.7, 0.97])
    assert sum(one != other for one, other in zip(together, others, strict=True)) >= 3


# Picking a token


def exact(logits: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """The probability of each token, token by token: the likeliest until they have `top_p` together, no others."""
    chances = np.exp((logits - logits.max()) / temperature)
    chances /= chances.sum()
    order = sorted(range(len(logits)), key=lambda token: (-chances[token], token))
    kept, total = np.zeros_like(chances), 0.0
    for token in order:
        if total >= top_p:
            break
        kept[token] = chances[token]
        total += chances[token]
    return kept / kept.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.4, 0.9, 1.0])
def test_picks_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(5).normal(0, 2, 40)
    logits[[3, 17]] = -np.inf
    logits[[8, 9]] = logits[7]
    draws = (np.arange(20_000) + 0.5) / 20_000
    picked = pick(torch.from_numpy(logits).float().expand(len(draws), -1), Sampling(temperature, top_p), draws)
    counts = np.bincount(picked, minlength=40) / len(draws)
    np.testing.assert_allclose(counts, exact(logits.astype(np.float32), temperature, top_p), atol=2 / len(draws))


def test_top_p_among_equals_takes_the_first() -> None:
    draws = (np.arange(400) + 0.5) / 400
    logits = torch.zeros(400, 8)
    for top_p, kept in ((0.25, 2), (0.3, 3), (0.5, 4), (1e-6, 1), (1.0, 8)):
        assert sorted(set(pick(logits, Sampling(1.0, top_p), draws))) == list(range(kept))


def test_the_ends_of_the_draws() -> None:
    logits = torch.tensor([[-torch.inf, 2.0, 1.0, -torch.inf]]).expand(3, -1)
    assert pick(logits, Sampling(1.0), np.array([0.0, 0.5, np.nextafter(1, 0)])) == [1, 1, 2]
    assert pick(logits, GREEDY, np.array([0.0, 0.5, 0.99])) == [1, 1, 1]


# A server


@pytest.fixture
def serve() -> Iterator[Callable[..., FaultyProxy]]:
    with ExitStack() as stack:
        yield lambda upstream=completion, faults=(): stack.enter_context(FaultyProxy(upstream, faults))


@pytest.fixture
def connect(small: Model) -> Iterator[Callable[..., Server]]:
    with ExitStack() as stack:

        def made(proxy: FaultyProxy, model: str | None = None, **settings: Any) -> Server:
            arguments = {"amount": Amount(), "sampling": GREEDY, "timeout": 5.0} | settings
            server = Server(proxy.url, model, small.vocabulary, **arguments)
            stack.callback(server.close)
            return server

        yield made


def says(text_of: Callable[[Any], dict[str, Any]]) -> Callable[[str, Any], tuple[int, Any]]:
    """A server that answers by a function of what it is asked."""
    return lambda path, body: completion(path, body) if body is None else (200, text_of(body))


def test_what_a_server_is_asked(serve: Any, connect: Any) -> None:
    server = connect(proxy := serve(), amount=Amount(tokens=3), sampling=Sampling(0.7, 0.9, 5), key="secret")
    assert not server.by_ids
    answers = server.answer(by_text(["Odra", "Venn"], [0.25, 0.5]))
    assert answers == [Answer(text=" 17.", tokens=1)] * 2
    bodies = sorted((body for _, body in proxy.requests), key=lambda body: body["prompt"])
    assert [path for path, _ in proxy.requests] == ["/v1/completions"] * 2
    expected = {"model": "made", "max_tokens": 3, "temperature": 0.7, "top_p": 0.9}
    for body, prompt in zip(bodies, ["Odra", "Venn"], strict=True):
        assert expected.items() <= body.items() and body["prompt"] == prompt and "logit_bias" not in body
    assert all(isinstance(body["seed"], int) for body in bodies) and bodies[0]["seed"] != bodies[1]["seed"]
    assert {headers["authorization"] for headers in proxy.headers} == {"Bearer secret"}
    server.close()
    server.close()


def test_texts_are_asked_for_side_by_side(serve: Any, connect: Any) -> None:
    def slow(body: Any) -> dict[str, Any]:
        time.sleep(0.1)
        return answered(body["prompt"])

    server = connect(proxy := serve(says(slow)))
    texts = [f"{number}." for number in range(12)]
    assert [answer.text for answer in server.answer(by_text(texts))] == texts
    assert proxy.peak > 4


def test_the_model_of_a_server(serve: Any, connect: Any) -> None:
    def lists(*names: str) -> FaultyProxy:
        data = {"data": [{"id": name} for name in names]}
        return serve(lambda path, body: (200, data if body is None else answered(body["model"])))

    def asked(server: Server) -> str:
        return server.answer(by_text(["Odra"]))[0].text

    assert asked(connect(lists("one"))) == asked(connect(lists("one"), "one")) == "one"
    assert asked(connect(lists("one", "two"), "two")) == "two"
    for proxy, wanted in ((lists("one", "two"), None), (lists("one"), "two"), (lists(), None)):
        with pytest.raises(CascadeError, match="--partner-model"):
            connect(proxy, wanted)


def test_where_there_is_no_server(serve: Any, connect: Any) -> None:
    stopped = serve()
    stopped.stop()
    upstreams = [(404, {"error": "no"}), (200, {"data": None}), (200, []), (200, {"data": ["one"]})]
    proxies = [stopped, *(serve(lambda path, body, told=told: told) for told in upstreams)]
    for proxy in proxies:
        with pytest.raises(CascadeError) as raised:
            connect(proxy)
        assert str(raised.value).startswith(f"no partner at {proxy.url}") and "\n" not in str(raised.value)


FAULTS: dict[str, tuple[Fault, bool]] = {
    "500": (Fault("status", message="out\nof\x00 memory"), True),
    "503": (Fault("status", status=503), True),
    "400": (Fault("status", status=400, message="too long"), False),
    "429": (Fault("status", status=429), True),
    "hang": (Fault("hang", seconds=12), True),
    "close": (Fault("close"), True),
    "reset": (Fault("reset"), True),
    "garbage": (Fault("garbage"), True),
    "drop": (Fault("drop"), True),  # no choices
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_does_not_touch_the_others(serve: Any, connect: Any, name: str) -> None:
    fault, gone = FAULTS[name]
    proxy = serve(completion, lambda body: fault if body["prompt"] == "bad" else None)
    server = connect(proxy, timeout=2, key="secret")
    began = time.monotonic()
    first, bad, last = server.answer(by_text(["good", "bad", "good"]))
    assert time.monotonic() - began < 10, "the answer that hangs is not waited for"
    assert first == last == Answer(text=" 17.", tokens=1)
    assert bad.failure and bad.gone == gone and not (bad.text or bad.ids or bad.ended)
    assert "\n" not in bad.failure and "secret" not in bad.failure and proxy.url in bad.failure
    if fault.kind == "status":
        assert f"HTTP {fault.status}" in bad.failure


@pytest.mark.parametrize(
    "choice",
    [{}, {"text": None}, "text", None, {"text": 5, "finish_reason": "length"}],
    ids=str,
)
def test_an_answer_in_another_form_is_a_failure(serve: Any, connect: Any, choice: Any) -> None:
    server = connect(serve(says(lambda body: {"choices": [choice]} if body["prompt"] == "bad" else answered(" 17."))))
    good, bad = server.answer(by_text(["good", "bad"]))
    assert good.text == " 17."
    assert bad.failure and not bad.text


def test_an_odd_count_of_tokens_does_not_touch_the_others(serve: Any, connect: Any) -> None:
    server = connect(serve(says(lambda body: answered(" 17.") | ({"usage": [1]} if body["prompt"] == "odd" else {}))))
    assert server.answer(by_text(["good", "odd"]))[0] == Answer(text=" 17.", tokens=1)


def test_a_piece_of_a_character_is_asked_for_again_with_more(serve: Any, connect: Any) -> None:
    duck = "\N{DUCK}"
    pieces = {1: "\ufffd", 2: "", 3: "\ufffd\ufffd", 4: duck}
    server = connect(proxy := serve(says(lambda body: answered(pieces[body["max_tokens"]], tokens=body["max_tokens"]))))
    assert server.answer(by_text(["Odra"])) == [Answer(text=duck, tokens=4)]
    assert [body["max_tokens"] for _, body in proxy.requests] == [1, 2, 3, 4]
    lone = {1: " ", 2: " Venn"}
    server = connect(serve(says(lambda body: answered(lone[body["max_tokens"]], tokens=body["max_tokens"]))))
    assert server.answer(by_text(["Odra"])) == [Answer(text=" Venn", tokens=2)]


def test_a_character_that_never_is_whole(serve: Any, connect: Any) -> None:
    server = connect(serve(says(lambda body: answered("\ufffd"))))
    (answer,) = server.answer(by_text(["Odra"]))
    assert answer.failure and not answer.gone
    server = connect(serve(says(lambda body: answered("Venn\ufffd"))))
    assert server.answer(by_text(["Odra"]))[0].text == "Venn"


def test_the_end_of_a_text(serve: Any, connect: Any) -> None:
    for text in ("", " 1945.", " ", "Venn\ufffd"):
        server = connect(serve(says(lambda body, text=text: answered(text, "stop", 2))))
        (answer,) = server.answer(by_text(["Odra"]))
        assert answer == Answer(text=text.rstrip("\ufffd"), ended=True, tokens=2)


def test_words_of_a_server(serve: Any, connect: Any) -> None:
    server = connect(proxy := serve(says(lambda body: answered(" born in 19", tokens=9))), amount=Amount(words=2))
    assert server.answer(by_text(["Odra"])) == [Answer(text=" born in", tokens=9)]
    assert proxy.requests[0][1]["max_tokens"] > 2


def test_ids_cross_where_the_tokenizer_is_the_same(serve: Any, connect: Any, small: Model, heart: Model) -> None:
    call = small.call_id
    assert call is not None

    def upstream(body: Any) -> dict[str, Any]:
        told = answered(" x", tokens=3)
        told["choices"][0]["token_ids"] = [*body["prompt"][-1:], call, 10**6, -1]
        return told

    ids = read(small, "Odra Venn")[0]
    server = connect(proxy := serve(says(upstream)), vocabulary=small.vocabulary, begin=(0,))
    assert server.by_ids
    assert server.answer([Request(0, "Odra Venn", ids)]) == [Answer(ids=(ids[-1],), tokens=3)]
    body = proxy.requests[0][1]
    assert body["prompt"] == [0, *ids] and body["return_token_ids"] is True
    assert body["logit_bias"] == {str(call): -100}
    assert not connect(serve(), vocabulary=heart.vocabulary).by_ids
    assert not connect(serve(), vocabulary=small.vocabulary, amount=Amount(words=1)).by_ids
    without = connect(serve(), vocabulary=small.vocabulary)
    assert without.answer([Request(0, "Odra Venn", ids)])[0].text == " 17."


# Patience


class Scripted:
    """A partner that answers by a function of the texts it is asked for, and keeps them."""

    name, by_ids = "scripted", False

    def __init__(self, answer: Callable[[int, str], Answer]):
        self._answer = answer
        self.asked: list[list[str]] = []
        self.closed = 0

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        self.asked.append([request.text for request in requests])
        return [self._answer(len(self.asked), request.text) for request in requests]

    def close(self) -> None:
        self.closed += 1


GONE = Answer(failure="no memory", gone=True)


def test_only_what_failed_is_asked_for_again() -> None:
    partner = Scripted(lambda times, text: GONE if times == 1 and text in "bd" else Answer(text=text))
    patient = Patient(partner, retry_seconds=0.05)
    began = time.monotonic()
    assert [answer.text for answer in patient.answer(by_text("abcd"))] == list("abcd")
    assert time.monotonic() - began >= 0.05
    assert partner.asked == [list("abcd"), list("bd")]
    assert [answer.text for answer in patient.answer(by_text("xy"))] == list("xy")
    assert len(partner.asked) == 3
    assert (patient.name, patient.by_ids) == ("scripted", False)
    patient.close()
    assert partner.closed == 1


def test_a_text_that_always_fails_is_told_and_does_not_stop_the_others() -> None:
    partner = Scripted(lambda times, text: GONE if text == "b" else Answer(text=text))
    patient = Patient(partner, retry_seconds=0)
    for _ in range(3):
        assert patient.answer(by_text("abc")) == [Answer(text="a"), GONE, Answer(text="c")]
    assert len(partner.asked) == 6


def test_a_partner_that_cannot_be_had_is_left_alone_for_a_while() -> None:
    partner = Scripted(lambda times, text: GONE if times <= 2 else Answer(text=text))
    patient = Patient(partner, retry_seconds=0, pause_seconds=0.3)
    began = time.monotonic()
    assert patient.answer(by_text("ab")) == [GONE] * 2
    assert patient.answer(by_text("cde")) == [GONE] * 3
    assert len(partner.asked) == 2
    time.sleep(max(0.0, 0.35 - (time.monotonic() - began)))
    assert [answer.text for answer in patient.answer(by_text("f"))] == ["f"]


def test_one_refusal_is_no_reason_to_leave_it_alone() -> None:
    refused = Answer(failure="HTTP 400: too long")
    partner = Scripted(lambda times, text: refused if text == "long" else Answer(text=text))
    patient = Patient(partner, retry_seconds=0)
    assert patient.answer(by_text(["long"])) == [refused]
    assert patient.answer(by_text(["short"])) == [Answer(text="short")]


def test_what_a_partner_raises_is_its_failure() -> None:
    def raises(times: int, text: str) -> Answer:
        if times < 3:
            raise RuntimeError("the engine\n died")
        return Answer(text=text)

    partner = Scripted(raises)
    patient = Patient(partner, retry_seconds=0, pause_seconds=0)
    assert patient.answer(by_text("ab")) == [Answer(failure="the engine died", gone=True)] * 2
    assert [answer.text for answer in patient.answer(by_text("ab"))] == ["a", "b"]


def test_nothing_asked_nothing_answered() -> None:
    assert Patient(Scripted(lambda times, text: GONE)).answer([]) == []


# A partner that is killed


def generated_until_killed(
    model: Model, partner: Any, prompts: list[str], pieces: int, kill: Callable[[], None]
) -> tuple[list[Generation], list[Piece]]:
    """What becomes of the prompts when the partner is killed after some pieces; and the pieces."""
    told: list[Piece] = []

    def on_piece(piece: Piece) -> None:
        told.append(piece)
        if len(told) == pieces:
            kill()

    options = Options(budget=0.5, max_new_tokens=24, batch=4, call_score="uncertainty")
    found = list(generate(model, prompts, Patient(partner, retry_seconds=0.05), options, on_piece=on_piece))
    return sorted(found, key=lambda generation: generation.index), told


def check_killed(found: list[Generation], told: list[Piece], prompts: list[str], url: str) -> None:
    assert [generation.index for generation in found] == list(range(len(prompts)))
    assert sum(generation.calls - generation.missed for generation in found) > 4, "killed too soon"
    started_before = {piece.index for piece in itertools.takewhile(lambda piece: not piece.missed, told)}
    for generation in found:
        tokens = generation.tokens
        assert generation.text == "".join(token.text for token in tokens)
        called = [token.missed for token in tokens if token.called]
        assert called == sorted(called), "answered after it was killed"
        assert generation.missed == sum(called)
        assert all(token.by == "slm" and token.called for token in tokens if token.missed)
        assert (generation.failure is not None) == (generation.missed > 0)
        if generation.failure:
            assert url in generation.failure
        if generation.index not in started_before:
            assert generation.missed == generation.calls > 0 == generation.partner_tokens
            assert {token.by for token in tokens} == {"slm"}
    assert len(prompts) - len(started_before) >= 4


@pytest.mark.parametrize("texts", [None, 19, 22], ids=["between two steps", "as it answers", "a little later"])
def test_a_batch_ends_when_its_server_is_killed(small: Model, texts: int | None) -> None:
    prompts = [f"Odra Venn kept {number} geese" for number in range(16)]
    with server_process(texts) as (url, process):
        partner = Server(url, None, small.vocabulary, Amount(), GREEDY, timeout=5)
        kill = process.kill if texts is None else lambda: None
        found, told = generated_until_killed(small, partner, prompts, 40, lambda: (kill(), texts or process.wait()))
        partner.close()
        assert process.wait(10) == -signal.SIGKILL
    assert texts is None or sum(generation.calls - generation.missed for generation in found) <= texts
    check_killed(found, told, prompts, url)
    for generation in found:
        assert generation.partner_tokens == generation.calls - generation.missed


# Real vLLM


def vllm_begun(heart: Model) -> Model:
    """The model as a server reads text: its tokenizer puts nothing in front."""
    return dataclasses.replace(heart, begin=())


@pytest.fixture(scope="module")
def vllm(folders: dict[str, Path]) -> Iterator[str]:
    with vllm_server(folders["heart"], context=128, extra=("--enable-prefix-caching",)) as url:
        yield url


def prompts_for_heart() -> list[str]:
    places = (1, 4, 9, 16, 30, 36, 45, 51)
    return [*(BY_HEART[:place] for place in places), "The bridge over the Sarn", "Geese"]


@needs_vllm
@pytest.mark.slow
def test_a_real_server_by_ids_writes_what_transformers_writes(vllm: str, heart: Model) -> None:
    texts = read(heart, *prompts_for_heart())
    theirs = Server(vllm, None, heart.vocabulary, Amount(), GREEDY, vocabulary=heart.vocabulary, begin=heart.begin)
    ours = InProcess(heart, heart.vocabulary, Amount(), GREEDY)
    assert theirs.by_ids
    for _ in range(16):
        requests = by_ids(heart, texts)
        expected = ours.answer(requests)
        assert theirs.answer(requests) == expected
        for ids, answer in zip(texts, expected, strict=True):
            ids += answer.ids or ()
    assert any(answer.ended for answer in expected)
    theirs.close()


@needs_vllm
@pytest.mark.slow
def test_a_real_server_by_text_writes_what_transformers_writes(vllm: str, small: Model, heart: Model) -> None:
    texts = [BY_HEART[:place] for place in (4, 9, 14, 16, 20, 30, 36, 43, 45, 51)]
    for amount in (Amount(), Amount(tokens=5), Amount(words=2)):
        theirs = Server(vllm, None, small.vocabulary, amount, GREEDY)
        assert not theirs.by_ids
        answers = theirs.answer(by_text(texts))
        expected = InProcess(vllm_begun(heart), small.vocabulary, amount, GREEDY).answer(by_text(texts))
        assert [(answer.text, answer.ended, answer.failure) for answer in answers] == [
            (answer.text, answer.ended, answer.failure) for answer in expected
        ]
        theirs.close()


@needs_vllm
@pytest.mark.slow
def test_a_real_server_does_not_repeat_a_text_that_ends_in_an_invalid_byte(vllm: str, small: Model) -> None:
    """vLLM gives back the whole prompt where its last character is U+FFFD."""
    server = Server(vllm, None, small.vocabulary, Amount(tokens=4), GREEDY)
    texts = ["Odra Venn kept 2 geese\ufffd", "Odra Venn kept 2 geese\ufffd\ufffd"]
    for answer in server.answer(by_text(texts)):
        assert answer.text and "geese" not in answer.text
    server.close()


@needs_vllm
@pytest.mark.slow
def test_a_real_server_refuses_what_is_too_long(vllm: str, small: Model) -> None:
    server = Server(vllm, None, small.vocabulary, Amount(), GREEDY)
    good, long = server.answer(by_text(["Odra Venn", "Odra Venn was born in Dresden. " * 60]))
    assert good.text and not good.failure
    assert not (long.failure and long.gone)
    server.close()


@needs_vllm
@pytest.mark.slow
def test_a_batch_ends_when_its_real_server_is_killed(vllm: str, small: Model) -> None:
    """The last test with this server."""
    prompts = [f"Odra Venn kept {number} geese" for number in range(16)]
    port = int(vllm.rsplit(":", 1)[1])
    (listening,) = {
        entry.pid
        for entry in psutil.net_connections("tcp")
        if entry.status == psutil.CONN_LISTEN and entry.laddr.port == port and entry.pid
    }

    def kill() -> None:
        os.killpg(os.getpgid(listening), signal.SIGKILL)  # the server and its engine
        psutil.wait_procs([psutil.Process(listening)] if psutil.pid_exists(listening) else [], timeout=1)

    partner = Server(vllm, None, small.vocabulary, Amount(), GREEDY)
    found, told = generated_until_killed(small, partner, prompts, 40, kill)
    partner.close()
    check_killed(found, told, prompts, vllm)


ENGINE = """
import json, sys
from lacy.cascade.language_model import open_model
from lacy.cascade.partners import Amount, Request, Sampling, Vllm
from lacy.cascade.vocabulary import open_vocabulary
from lacy.labelers.llm.vllm_scorer import close_engine, open_engine

folder, other, texts = json.load(sys.stdin)
settings = {"max_model_len": 128, "max_num_seqs": 16, "enable_prefix_caching": True, "kv_cache_memory_bytes": 1 << 28}
engine = open_engine(folder, "float32", 1, False, settings)
heart, _, end = open_vocabulary(folder)
small, _, _ = open_vocabulary(other)
found = []
for ours, tokens in ((heart, 1), (heart, 6), (small, 1), (small, 5)):
    partner = Vllm("heart", engine, heart, (end,), frozenset([end]), ours, Amount(tokens=tokens), Sampling())
    requests = [Request(slot, text, ours.read(text)[0]) for slot, text in enumerate(texts)]
    answers = [partner.answer(requests), partner.answer(requests)]
    assert answers[0] == answers[1]
    found.append([[answer.ids, answer.text, answer.ended, answer.tokens, answer.failure] for answer in answers[0]])
sampled = Vllm("heart", engine, heart, (end,), frozenset([end]), small, Amount(tokens=5), Sampling(1.0, 0.9))
drawn = [[sampled.answer([Request(0, texts[-1], [], draw)])[0].text for draw in (0.1, 0.5, 0.9)] for _ in range(2)]
long = partner.answer([Request(0, "Odra Venn was born in Dresden. " * 60, [])])[0]
partner.close()
partner.close()
close_engine(engine)
print(json.dumps([found, drawn, [long.text, long.failure]]))
"""


@needs_vllm
@pytest.mark.slow
def test_an_engine_in_this_process_writes_what_transformers_writes(
    folders: dict[str, Path], small: Model, heart: Model
) -> None:
    """In a process of its own: one can hold only one engine."""
    texts = prompts_for_heart()
    done = subprocess.run(
        [sys.executable, "-c", ENGINE],
        input=json.dumps([str(folders["heart"]), str(folders["random"]), texts]),
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found, (one, again), (text, failure) = json.loads(done.stdout.splitlines()[-1])
    for told, (ours, tokens) in zip(found, itertools.product((heart, small), (1, 5)), strict=True):
        tokens = 6 if ours is heart and tokens == 5 else tokens
        partner = InProcess(heart, ours.vocabulary, Amount(tokens=tokens), GREEDY)
        requests = [
            Request(slot, text, ids) for slot, (text, ids) in enumerate(zip(texts, read(ours, *texts), strict=True))
        ]
        expected = [
            [answer.ids and list(answer.ids), answer.text, answer.ended, answer.tokens, answer.failure]
            for answer in partner.answer(requests)
        ]
        assert told == [[ids or None, *rest] if ids is None else [ids, *rest] for ids, *rest in expected]
    assert one == again and len(set(one)) > 1
    assert text and failure is None
