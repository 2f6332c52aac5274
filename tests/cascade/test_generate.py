"""The cascade writes what its models would, and says who wrote what."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lacy.cascade.calls import CALL_SCORES, WINDOW
from lacy.cascade.generate import Options, Piece, generate
from lacy.cascade.partners import Amount, Answer, InProcess, Patient, Sampling
from lacy.schemas.errors import CascadeError
from tests.support import models
from tests.support.texts import TEXT

SMALL, LARGE = models.byte_level(600), models.byte_level(900, seed=2)
PROMPTS = [
    "Ada Byron was born in",
    "In 1871, Otto Lang",
    "",
    "The painter wrote 14 letters, and nobody knows what became of them. Later Mina Kerr married, left for Lyon",
    "Some people say that the weather in Turin \u2013 \u5317\u4eac",
    "x",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def slm(folder):
    return models.opened(folder / "slm", SMALL, models.gpt2(SMALL, 1))


@pytest.fixture(scope="module")
def large(folder):
    return models.opened(folder / "large", LARGE, models.llama(LARGE, 2, context=512))


KINDS = {"bytes": SMALL, "pieces": models.sentencepiece(700), "composed": models.composed(600)}


@pytest.fixture(scope="module")
def writers(folder):
    return {name: models.opened(folder / name, kind, models.gpt2(kind, 1)) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def alone(slm):
    return run(slm, None, Options(max_new_tokens=40))


@pytest.fixture(scope="module")
def copies(folder):
    """A model, the same with other ids, and what they write."""
    network = models.only_words(models.gpt2(SMALL, 3), SMALL)
    order = models.shuffled(SMALL.get_vocab_size(), 4)
    ours = models.opened(folder / "words", SMALL, network)
    theirs = models.opened(folder / "copy", models.permuted(SMALL, order), models.renumbered(network, order))
    written = run(ours, None, Options(max_new_tokens=40))
    assert len(set(" ".join(text.text for text in written).split())) > 20
    return ours, theirs, written


def run(model, partner, options, prompts=PROMPTS, **more):
    found = sorted(generate(model, prompts, partner, options, **more), key=lambda text: text.index)
    assert [text.prompt for text in found] == list(prompts)
    for text in found:
        assert "".join(token.text for token in text.tokens) == text.text
        assert text.calls >= sum(token.called for token in text.tokens) >= text.calls - text.missed - 1 or text.calls
    return found


def in_process(model, ours, options=None, amount=None, **more):
    options = options or Options()
    return InProcess(model, ours.vocabulary, amount or Amount(), options.sampling, slots=options.batch, **more)


def greedy(model, prompt: str, count: int) -> list[int]:
    """One text at a time, without any memory, by the library."""
    ids = model.begun(model.vocabulary.read(prompt)[0])
    out = model.network.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, use_cache=False, suppress_tokens=model.forbidden(),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long), pad_token_id=model.end_id,
    )  # fmt: skip
    return out[0, len(ids) :].tolist()


def test_alone_it_is_greedy_decoding(slm):
    found = run(slm, None, Options(max_new_tokens=40, batch=3))
    for text in found:
        assert [token.id for token in text.tokens] == greedy(slm, text.prompt, 40)
        assert {token.by for token in text.tokens} == {"slm"} and text.calls == 0


ANY_RULE = given(
    budget=st.floats(0, 1), score=st.sampled_from(CALL_SCORES), weight=st.floats(0, 50), batch=st.integers(1, 7)
)


@settings(max_examples=12, deadline=None)
@ANY_RULE
@example(budget=0.0, score="margin", weight=0.0, batch=4)
@example(budget=0.22, score="margin", weight=0.0, batch=4)
@example(budget=1.0, score="margin", weight=0.0, batch=4)
def test_a_copy_as_partner_changes_nothing(slm, alone, budget, score, weight, batch):
    options = Options(max_new_tokens=40, budget=budget, call_score=score, weight=weight, batch=batch)
    found = run(slm, in_process(slm, slm, options), options)
    assert [text.text for text in found] == [text.text for text in alone]
    assert [[t.id for t in text.tokens] for text in found] == [[t.id for t in text.tokens] for text in alone]
    assert all(text.calls == (text.positions if budget == 1 else 0) for text in found if budget in (0, 1))


@settings(max_examples=12, deadline=None)
@ANY_RULE
@example(budget=0.0, score="margin", weight=0.0, batch=4)
@example(budget=0.22, score="margin", weight=0.0, batch=4)
@example(budget=1.0, score="margin", weight=0.0, batch=4)
def test_a_copy_with_another_tokenizer_changes_nothing(copies, budget, score, weight, batch):
    """What it writes is cut as it was written; ids differ, so characters cross."""
    ours, theirs, alone = copies
    options = Options(max_new_tokens=40, budget=budget, call_score=score, weight=weight, batch=batch)
    partner = in_process(theirs, ours, options)
    assert not partner.by_ids
    found = run(ours, partner, options)
    assert [text.text for text in found] == [text.text for text in alone]
    assert sum(text.calls for text in found) > 0 or budget < 0.1


def test_a_budget_of_one_is_the_partner_alone(folder, slm):
    other = models.opened(folder / "other", SMALL, models.llama(SMALL, 7))
    options = Options(max_new_tokens=40, budget=1.0, batch=4)
    for text in run(slm, in_process(other, slm, options), options):
        assert [token.id for token in text.tokens] == greedy(other, text.prompt, 40)
        assert all(token.by == "partner" and token.called for token in text.tokens)
        assert text.partner_tokens == text.positions == text.calls


@pytest.mark.parametrize("amount", [Amount(), Amount(tokens=3), Amount(words=2)], ids=["token", "tokens", "words"])
@pytest.mark.parametrize(
    "rule", [{"budget": 0.4}, {"threshold": None}, {"budget": 0.3, "call_score": "uncertainty"}], ids=str
)
def test_memory_and_neighbours_change_nothing(slm, large, amount, rule):
    """Batched with memory, and one by one without: the same tokens."""
    if "threshold" in rule:
        margins = [token.margin for text in run(slm, None, Options(max_new_tokens=40)) for token in text.tokens]
        rule = {"threshold": float(np.quantile(margins, 0.6))}
    options = Options(max_new_tokens=40, batch=4, **rule)
    fast = run(slm, in_process(large, slm, options, amount), options)
    alone = options.model_copy(update={"batch": 1})
    slow = run(slm, in_process(large, slm, alone, amount, remember=False), alone, remember=False)
    calls, positions = sum(text.calls for text in fast), sum(text.positions for text in fast)
    assert 0.1 < calls / positions < 0.9
    for ours, theirs in zip(fast, slow, strict=True):
        assert [(t.id, t.by, t.called) for t in ours.tokens] == [(t.id, t.by, t.called) for t in theirs.tokens]
        assert ours.text == theirs.text


def test_sampling_depends_on_the_seed_and_the_place_alone(slm, large):
    options = Options(max_new_tokens=30, budget=0.3, temperature=1.0, top_p=0.9, seed=5, batch=6)
    texts = [text.text for text in run(slm, in_process(large, slm, options), options)]
    narrow = options.model_copy(update={"batch": 2})
    assert texts == [text.text for text in run(slm, in_process(large, slm, narrow), narrow)]
    other = options.model_copy(update={"seed": 6})
    assert texts != [text.text for text in run(slm, in_process(large, slm, other), other)]


@pytest.mark.parametrize("budget", [0.22, *(pytest.param(budget, marks=pytest.mark.slow) for budget in (0.1, 0.5))])
@pytest.mark.parametrize("score", ["margin", "uncertainty"])
def test_the_budget_is_held_on_200_prompts(slm, large, budget, score):
    random = np.random.default_rng(0)
    words = " ".join(PROMPTS).split()
    prompts = [" ".join(random.choice(words, random.integers(1, 12))) for _ in range(200)]
    options = Options(max_new_tokens=72, budget=budget, call_score=score, batch=200)
    made = called = late = late_called = 0
    for text in generate(slm, prompts, in_process(large, slm, options), options):
        made += text.positions
        called += text.calls
        decided = [token.called for token in text.tokens if token.score is not None][WINDOW:]
        late += len(decided)
        late_called += sum(decided)
    assert late > 5000
    assert called / made == pytest.approx(budget, abs=0.02)
    assert late_called / late == pytest.approx(budget, abs=0.02)


class Scripted:
    """A partner that says what it is told to: for what a model cannot be made to do."""

    name = "scripted"

    def __init__(self, *answers: Answer, by_ids: bool = False):
        self.by_ids = by_ids
        self._answers = answers
        self.heard: list[str] = []

    def answer(self, requests):
        self.heard += [request.text for request in requests]
        return [self._answers[(len(self.heard) - 1) % len(self._answers)] for _ in requests]

    def close(self):
        pass


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(
    prompt=TEXT, answers=st.lists(TEXT.filter(bool), min_size=1, max_size=4), budget=st.sampled_from([0.3, 0.7, 1.0])
)
@example(prompt="born in 19", answers=["45", "."], budget=0.7)
@example(prompt="", answers=[" Odra", "\u0301"], budget=0.7)
def test_text_in_is_text_out(writers, kind, prompt, answers, budget):
    """Whatever a partner says stands in the text where it was asked, and no character before it changes."""
    partner = Scripted(*(Answer(text=text, tokens=1) for text in answers))
    told = []
    options = Options(max_new_tokens=10, budget=budget, call_score="uncertainty")
    [text] = run(writers[kind], partner, options, [prompt], on_piece=lambda piece: told.append(piece.text))
    whole = prompt + text.text
    assert "".join(told) == text.text
    assert len(partner.heard) == text.calls > 0
    for number, heard in enumerate(partner.heard):
        assert whole.startswith(heard + answers[number % len(answers)])


def test_who_wrote_what(slm):
    partner = Scripted(Answer(text=" 19", tokens=2), Answer(text="45", tokens=1))
    [text] = run(slm, partner, Options(max_new_tokens=4, budget=1.0), ["she was born in"])
    assert text.text.startswith(" 1945 1945")
    assert {token.by for token in text.tokens} == {"partner"}
    assert partner.heard[:3] == ["she was born in", "she was born in 19", "she was born in 1945"]
    assert text.partner_tokens == sum(2 - index % 2 for index in range(text.calls))


def test_a_token_of_both(folder):
    """The partner's digits grow together with what the small model wrote."""
    read = models.read(SMALL)
    [year] = [i for i, p in enumerate(read.pieces) if p and p.startswith(b" 1") and len(p) == 5 and p[1:].isdigit()][:1]
    head, tail = read.pieces[year][:3].decode(), read.pieces[year][3:].decode()
    network = models.gpt2(SMALL, 1)
    with torch.no_grad():
        network.lm_head.weight.zero_()  # every logit alike: the first id that is allowed
        network.transformer.ln_f.bias.fill_(1.0)
        network.lm_head.weight[read.read(head)[0][0]] = 1.0
    model = models.opened(folder / "both", SMALL, network)
    assert read.read(head)[0] and len(read.read(head)[0]) == 1
    partner = Scripted(Answer(text=tail, tokens=1))
    [text] = run(model, partner, Options(max_new_tokens=1, threshold=1e9), ["born in"])
    assert text.text == head and text.calls == 0

    class Second(Scripted):
        def answer(self, requests):
            return super().answer(requests) if requests[0].text.endswith(head) else [Answer(failure="not now")]

    [text] = run(model, Second(Answer(text=tail, tokens=1)), Options(max_new_tokens=2, budget=1.0), ["born in"])
    assert text.text.startswith(head + tail)
    assert [(text.tokens[0].id, text.tokens[0].by)] == [(year, "both")]


def test_a_call_in_vain(slm):
    failing = Scripted(Answer(failure="no answer"))
    options = Options(max_new_tokens=20, budget=0.5)
    alone, found = run(slm, None, options), run(slm, failing, options)
    for without, text in zip(alone, found, strict=True):
        assert text.text == without.text
        assert text.missed == text.calls > 0
        assert text.failure == "no answer"
        assert all(token.missed == token.called and token.by == "slm" for token in text.tokens)
    empty = run(slm, Scripted(Answer()), options)
    assert all(text.missed == text.calls and text.failure == "an empty answer" for text in empty)


def test_the_partner_ends_the_text(slm):
    [text] = run(slm, Scripted(Answer(text=" 1945.", ended=True, tokens=3)), Options(budget=1.0), ["born in"])
    assert (text.text, text.finish, text.calls) == (" 1945.", "end", 1)
    assert text.tokens[-1].id == slm.end_id and text.tokens[-1].text == "" and text.tokens[-1].by == "partner"
    [text] = run(slm, Scripted(Answer(ended=True, tokens=1)), Options(budget=1.0), ["born in"])
    assert (text.text, text.finish) == ("", "end")


def test_the_small_model_ends_the_text(folder):
    network = models.gpt2(SMALL, 1)
    with torch.no_grad():
        network.lm_head.weight.zero_()
        network.transformer.ln_f.bias.fill_(1.0)
        network.lm_head.weight[SMALL.token_to_id(models.END)] = 1.0
        network.lm_head.weight[SMALL.token_to_id(models.CALL)] = 9.0  # never written, whatever it is
    model = models.opened(folder / "ends", SMALL, network)
    [text] = run(model, None, Options(), ["born in"])
    assert (text.text, text.finish, len(text.tokens)) == ("", "end", 1)


def test_the_context_is_the_end(slm):
    long = "Ada Byron was born in Dresden. " * 60
    [text] = run(slm, None, Options(max_new_tokens=1000), ["Ada Byron"])
    assert text.finish in ("context", "end")
    assert len(slm.begun(slm.vocabulary.read("Ada Byron")[0])) + len(text.tokens) == slm.context + 1
    [text] = run(slm, None, Options(), [long])
    assert (text.finish, text.tokens, text.positions) == ("context", [], 0)


def test_pieces_are_told_as_they_come(slm, large):
    told: dict[int, list[Piece]] = {}
    options = Options(max_new_tokens=30, budget=0.3, batch=2)
    found = run(
        slm, in_process(large, slm, options), options, on_piece=lambda p: told.setdefault(p.index, []).append(p)
    )
    for text in found:
        assert "".join(piece.text for piece in told[text.index]) == text.text
        counted = Counter(token.by for token in text.tokens for _ in token.text)
        assert Counter(piece.by for piece in told[text.index] for _ in piece.text)["partner"] <= (
            counted["partner"] + counted["both"]
        )


def test_a_partner_that_raises_is_survived(slm):
    class Broken(Scripted):
        def answer(self, requests):
            raise RuntimeError("the engine is dead")

    partner = Patient(Broken(), retry_seconds=0.0)
    for text in run(slm, partner, Options(max_new_tokens=10, budget=0.5)):
        assert text.failure == "the engine is dead" and text.missed == text.calls


def test_a_model_without_call(folder, monkeypatch):
    tokenizer = models.Tokenizer.from_str(SMALL.to_str().replace("<CALL>", "<other>"))
    monkeypatch.setattr(models, "CALL", "<other>")
    model = models.opened(folder / "plain", tokenizer, models.gpt2(SMALL, 1))
    assert model.call_id is None
    with pytest.raises(CascadeError, match="no <CALL>"):
        list(generate(model, ["a"], Scripted(Answer(text="b")), Options()))
    [text] = run(
        model, Scripted(Answer(text=" b", tokens=1)), Options(max_new_tokens=9, call_score="uncertainty"), ["a"]
    )
    assert json.loads(text.model_dump_json())["tokens"][0]["margin"] is None


def test_two_rules_are_one_too_many():
    with pytest.raises(ValueError, match="not by both"):
        Options(budget=0.1, threshold=0.0)


def test_no_prompt_no_text(slm):
    assert run(slm, None, Options(), []) == []


def test_sampling_options():
    assert Options(temperature=0.5, top_p=0.9, seed=3).sampling == Sampling(0.5, 0.9, 3)
