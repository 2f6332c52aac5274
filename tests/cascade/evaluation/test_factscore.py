"""FActScore: the formula on judgements by hand, and the three steps with scripted models."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import lacy.cascade.evaluation
from lacy.cascade.evaluation.answers import Remembering
from lacy.cascade.evaluation.factscore import (
    MAX_FACT,
    MAX_FACTS,
    SPLIT_SCHEMA,
    VERIFY_SCHEMA,
    Fact,
    Judgement,
    Options,
    Summary,
    declines,
    factscore,
    length_penalty,
    parse_facts,
    parse_verdict,
    prompt,
    sentences,
    split,
    summary,
    verify,
)
from lacy.cascade.evaluation.knowledge import Knowledge, open_knowledge
from lacy.labelers.llm.chat import Conversation, Reply

PAGES = [
    {"id": "1", "title": "Odra Venn", "text": "Odra Venn was a Lumerian botanist, born in Port Hale in 1871. " * 3},
    {"id": "2", "title": "Port Hale", "text": "Port Hale is a harbour town where Mira Oldan kept a lighthouse."},
]
ENTITIES = ["Odra Venn", "Mira Oldan", "Jost Werrel"]
TEXTS = [
    "Odra Venn was a botanist. She was born in Port Hale.\nShe died in Sarn.",
    "Mira Oldan kept a lighthouse.",
    "I'm sorry, I do not know him.",
]


@pytest.fixture(scope="module")
def knowledge(tmp_path_factory: pytest.TempPathFactory) -> Knowledge:
    folder = tmp_path_factory.mktemp("knowledge")
    (folder / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in PAGES))
    return open_knowledge(folder / "pages.jsonl", folder, words=11)


class Scripted:
    """A chat that answers by a function of the question and whether it is asked again, and remembers its calls."""

    def __init__(self, answer: Callable[[str, bool], Reply], schema: dict[str, Any]) -> None:
        self.answer = answer
        self.schema = schema
        self.calls: list[list[str]] = []

    def ask(self, conversations: list[Conversation], schema: dict[str, Any] | None, max_tokens: int) -> list[Reply]:
        assert schema == self.schema
        assert all([message["role"] for message in each] == ["system", "user"] for each in conversations)
        questions = [each[1]["content"] for each in conversations]
        self.calls.append(questions)
        return [self.answer(question, "Your last answer" in question) for question in questions]

    def close(self) -> None: ...


def field(question: str, name: str) -> str:
    found = re.search(rf"^{name}: (.*)$", question, re.MULTILINE)
    assert found
    return found[1]


def whole(question: str, again: bool = False) -> Reply:
    """One fact a sentence: the sentence."""
    return Reply(json.dumps({"facts": [field(question, "Sentence")]}))


def literal(question: str, again: bool = False) -> Reply:
    """A claim is supported when all its words stand in the passages."""
    passages = question[: question.index("Subject:")].lower()
    words = re.findall(r"\w+", field(question, "Claim").lower())
    return Reply(json.dumps({"supported": all(word in passages or word == "she" for word in words)}))


def splitter(answer: Callable[[str, bool], Reply] = whole) -> Scripted:
    return Scripted(answer, SPLIT_SCHEMA)


def judge(answer: Callable[[str, bool], Reply] = literal) -> Scripted:
    return Scripted(answer, VERIFY_SCHEMA)


def judgement(*verdicts: bool | None, **more: Any) -> Judgement:
    facts = [Fact(text=f"fact {number}", supported=verdict) for number, verdict in enumerate(verdicts)]
    return Judgement(**({"entity": "Odra Venn", "text": "a text", "facts": facts} | more))


SAVED = [
    judgement(*[True] * 3 + [False]),  # 3/4, and exp(1 - 10/4)
    judgement(*[True] * 9 + [False] * 3),  # 9/12, long enough
    judgement(*[True] * 10),  # 1, at the edge
    judgement(*[False] * 2),  # 0
    judgement(declined=True),
    judgement(),
]


def test_the_score_is_the_formula() -> None:
    found = summary(Judgement.model_validate_json(saved.model_dump_json()) for saved in SAVED)
    scores = [0.75 * math.exp(-1.5), 0.75, 1.0, 0.0]
    assert [item.score for item in found.items] == [*map(pytest.approx, scores), None, None]
    assert [item.init_score for item in found.items] == [0.75, 0.75, 1.0, 0.0, None, None]
    assert found.figures.score == pytest.approx((0.16734762011132237 + 0.75 + 1.0) / 4, abs=1e-12)
    assert found.figures.init_score == 0.625
    assert found.figures.responded == pytest.approx(4 / 6)
    assert found.figures.facts_per_response == 7
    assert (found.figures.texts, found.figures.abstained, found.figures.unjudged) == (6, 2, 0)
    assert (found.figures.facts, found.figures.supported, found.figures.unverified) == (28, 22, 0)
    assert Summary.model_validate_json(found.model_dump_json()) == found


def test_without_penalty_both_scores_are_one() -> None:
    found = summary(SAVED, Options(gamma=0))
    assert found.figures.score == found.figures.init_score == 0.625
    assert found.gamma == 0


@pytest.mark.parametrize(
    ("facts", "gamma", "penalty"),
    [(1, 10, math.exp(-9)), (5, 10, math.exp(-1)), (9, 10, math.exp(-1 / 9)), (10, 10, 1), (11, 10, 1), (1, 0, 1)],
)
def test_the_length_penalty(facts: int, gamma: float, penalty: float) -> None:
    assert length_penalty(facts, gamma) == pytest.approx(penalty, abs=1e-15)


def test_facts_without_a_verdict_are_left_out_and_counted() -> None:
    found = summary(
        [
            judgement(True, None, False, True),  # 2/3 of those verified; 4 facts for the penalty
            judgement(None, None),
            judgement(unsplit=["A sentence."]),
            judgement(declined=True),
        ]
    )
    assert found.figures.score == pytest.approx(2 / 3 * math.exp(1 - 10 / 4))
    assert found.figures.init_score == pytest.approx(2 / 3)
    assert (found.figures.unverified, found.figures.unsplit, found.figures.unjudged) == (3, 1, 2)
    assert (found.figures.abstained, found.figures.responded) == (1, 0.75)
    assert found.figures.facts_per_response == 3


def test_repeated_facts_count_and_are_counted() -> None:
    facts = [Fact(text=text, supported=text == "a") for text in "aabac"]
    found = summary([judgement(facts=facts)], Options(gamma=0))
    assert found.figures.score == 0.6
    assert found.items[0].repeated == found.figures.repeated == 2


def test_nothing_has_no_score() -> None:
    empty = summary([])
    figures = empty.figures
    assert (figures.score, figures.init_score, figures.responded, figures.facts_per_response) == (None,) * 4
    silent = summary([judgement(declined=True), judgement()]).figures
    assert (silent.score, silent.responded, silent.abstained) == (None, 0.0, 2)


@given(st.lists(st.lists(st.sampled_from([True, False, None]), max_size=15), max_size=6), st.floats(0, 20))
def test_scores_are_shares_of_what_is_counted(verdicts: list[list[bool | None]], gamma: float) -> None:
    found = summary([judgement(*each) for each in verdicts], Options(gamma=gamma))
    assert len(found.items) == len(verdicts)
    for item, each in zip(found.items, verdicts, strict=True):
        assert item.abstained == (not each)
        assert (item.score is None) == all(verdict is None for verdict in each)
        if item.score is not None and item.init_score is not None:
            assert 0 <= item.score <= item.init_score <= 1
            assert item.init_score == each.count(True) / (each.count(True) + each.count(False))
    scored = [item.score for item in found.items if item.score is not None]
    assert (found.figures.score is None) == (not scored)
    assert found.figures.abstained + found.figures.unjudged + len(scored) == found.figures.texts


def test_texts_are_split_looked_up_and_judged(knowledge: Knowledge) -> None:
    told: list[tuple[int, int]] = []
    split_chat, judge_chat = splitter(), judge()
    found = factscore(
        split_chat, judge_chat, knowledge, ENTITIES, TEXTS, Options(batch=3), lambda *counts: told.append(counts)
    )
    assert told == [(3, 4), (4, 4)] * 2
    verdicts = [[fact.supported for fact in each.facts] for each in found.judgements]
    assert verdicts == [[True, True, False], [True], []]
    assert [each.page for each in found.judgements] == [True, False, False]
    assert [each.declined for each in found.judgements] == [False, False, True]
    assert found.figures.init_score == pytest.approx((2 / 3 + 1) / 2)
    assert found.figures.score == pytest.approx((2 / 3 * math.exp(1 - 10 / 3) + math.exp(-9)) / 2)
    assert found.figures.responded == pytest.approx(2 / 3)
    assert found.figures.without_page == 1
    assert split_chat.calls[0][0] == "Subject: Odra Venn\nSentence: Odra Venn was a botanist."
    fact = found.judgements[0].facts[1]
    assert fact.text == "She was born in Port Hale."
    assert fact.passages and all(name.startswith("1:") for name in fact.passages)
    assert found.judgements[1].facts[0].passages == ["2:0", "2:1"]


def test_the_nearest_passage_stands_next_to_the_claim(knowledge: Knowledge) -> None:
    chat = judge()
    (split_text,) = split(splitter(), ["Odra Venn"], ["Odra Venn was born in 1871."], Options())
    (judged,) = verify(chat, knowledge, [split_text], Options(passages=2))
    near, far = knowledge.search(["Odra Venn Odra Venn was born in 1871."], 2, "Odra Venn")[0]
    assert judged.facts[0].passages == [near.id, far.id]
    assert chat.calls == [
        [
            f"Passages:\n\nOdra Venn\n{far.text}\n\nOdra Venn\n{near.text}\n\nSubject: Odra Venn\n"
            "Claim: Odra Venn was born in 1871.\nDo the passages support the claim?"
        ]
    ]


def test_a_fact_of_which_nothing_is_found_is_not_supported(knowledge: Knowledge) -> None:
    chat = judge()
    found = factscore(splitter(), chat, knowledge, ["Ysolt Quane"], ["Ysolt Quane sings."])
    assert found.judgements[0].facts == [Fact(text="Ysolt Quane sings.", supported=False)]
    assert chat.calls == []
    assert found.figures.init_score == 0


def test_a_rerun_asks_nobody_anything(tmp_path: Path, knowledge: Knowledge) -> None:
    path = tmp_path / "answers.jsonl"

    def run(split_chat: Scripted, judge_chat: Scripted) -> Summary:
        split_kept = Remembering(lambda: split_chat, "s", path)
        judge_kept = Remembering(lambda: judge_chat, "j", path)
        return factscore(split_kept, judge_kept, knowledge, ENTITIES, TEXTS)

    def broken_once(question: str, again: bool) -> Reply:
        return literal(question) if again or "Sarn" not in question else Reply("It does not.")

    first = splitter(), judge(broken_once)
    expected = run(*first)
    assert sum(map(len, first[1].calls)) == 5
    second = splitter(), judge(broken_once)
    assert run(*second).model_dump_json() == expected.model_dump_json()
    assert second[0].calls == second[1].calls == []


def test_an_interrupted_run_asks_only_the_rest(tmp_path: Path, knowledge: Knowledge) -> None:
    text = " ".join(f"Odra Venn wrote book {number}." for number in range(10))
    options = Options(batch=2)

    def dies(question: str, again: bool) -> Reply:
        if "book 5" in question:
            raise RuntimeError("the engine is dead")
        return literal(question)

    def run(split_chat: Scripted, judge_chat: Scripted) -> Summary:
        split_kept = Remembering(lambda: split_chat, "m", tmp_path / "a.jsonl")
        judge_kept = Remembering(lambda: judge_chat, "m", tmp_path / "a.jsonl")
        return factscore(split_kept, judge_kept, knowledge, ["Odra Venn"], [text], options)

    with pytest.raises(RuntimeError, match="engine is dead"):
        run(splitter(), judge(dies))
    split_chat, judge_chat = splitter(), judge()
    assert run(split_chat, judge_chat).figures.facts == 10
    assert split_chat.calls == []
    assert [len(call) for call in judge_chat.calls] == [2, 2, 2]
    assert "book 4" in judge_chat.calls[0][0]


BAD_FACTS = {
    "nothing": "",
    "no JSON": "- Venn was a botanist.",
    "cut off": '{"facts":["Venn was',
    "a list": '["Venn was a botanist."]',
    "null": "null",
    "no facts": "{}",
    "facts of another type": '{"facts":"Venn"}',
    "a fact of another type": '{"facts":[1]}',
    "an empty fact": '{"facts":[""]}',
    "a long fact": json.dumps({"facts": ["a" * (MAX_FACT + 1)]}),
    "too many facts": json.dumps({"facts": ["a"] * (MAX_FACTS + 1)}),
    "an unknown field": '{"facts":[],"note":"none"}',
    "half a character": '{"facts":["\\ud800"]}',
    "half a character outside": '{"facts":[]}\ud800',
    "deep": "[" * 100_000,
    "two answers": '{"facts":[]}{"facts":[]}',
}
BAD_VERDICTS = {
    "nothing": "",
    "a word": "True",
    "a truth": "true",
    "a string": '{"supported":"true"}',
    "a number": '{"supported":1}',
    "null": '{"supported":null}',
    "no verdict": "{}",
    "an unknown field": '{"supported":true,"why":"it says so"}',
    "cut off": '{"supported":tr',
}


@pytest.mark.parametrize("case", BAD_FACTS)
def test_sentences_without_a_usable_answer_are_asked_about_once_more(case: str) -> None:
    assert parse_facts(BAD_FACTS[case]) is None
    chat = splitter(lambda question, again: Reply(BAD_FACTS[case]) if "moss" in question else whole(question))
    (found,) = split(chat, ["Odra Venn"], ["She was born. She wrote on moss."], Options())
    assert [len(call) for call in chat.calls] == [2, 1]
    assert "no complete JSON" in chat.calls[1][0]
    assert (found.facts, found.unsplit) == (["She was born."], ["She wrote on moss."])
    assert "not JSON" in found.problem
    better = splitter(lambda question, again: whole(question) if again else Reply(BAD_FACTS[case]))
    (found,) = split(better, ["Odra Venn"], ["She was born."], Options())
    assert (found.facts, found.unsplit, found.problem) == (["She was born."], [], "")


@pytest.mark.parametrize("case", BAD_VERDICTS)
def test_facts_without_a_usable_verdict_are_asked_about_once_more(case: str, knowledge: Knowledge) -> None:
    assert parse_verdict(BAD_VERDICTS[case]) is None
    chat = judge(lambda question, again: Reply(BAD_VERDICTS[case]) if "moss" in question else literal(question))
    found = factscore(splitter(), chat, knowledge, ["Odra Venn"], ["Venn was a botanist. She wrote on moss."])
    assert [len(call) for call in chat.calls] == [2, 1]
    assert [fact.supported for fact in found.judgements[0].facts] == [True, None]
    assert "not JSON" in found.judgements[0].facts[1].problem
    assert (found.figures.unverified, found.figures.init_score) == (1, 1.0)


def test_errors_are_tried_again_unchanged_and_told(knowledge: Knowledge) -> None:
    chat = judge(lambda question, again: Reply(None, "too long for the context"))
    found = factscore(splitter(), chat, knowledge, ["Odra Venn"], ["Venn was a botanist."])
    assert chat.calls[0] == chat.calls[1]
    assert len(chat.calls) == 2
    assert found.judgements[0].facts[0].problem == "too long for the context"
    assert (found.figures.score, found.figures.unjudged, found.figures.responded) == (None, 1, 1.0)
    broken = splitter(lambda question, again: Reply(None, "refused"))
    found = factscore(broken, judge(), knowledge, ["Odra Venn"], ["Venn was a botanist."])
    assert (found.figures.unsplit, found.figures.unjudged, found.figures.abstained) == (1, 1, 0)


def test_a_fact_that_a_sentence_has_twice_is_taken_once() -> None:
    answers = iter([["b", "a", "b", " "], ["a"]])
    chat = splitter(lambda question, again: Reply(json.dumps({"facts": next(answers)})))
    (found,) = split(chat, ["Odra Venn"], ["One sentence. Another sentence."], Options())
    assert found.facts == ["b", "a", "a"]


def test_text_is_never_read_as_a_template(knowledge: Knowledge) -> None:
    chat = splitter()
    text = "{{entity}} {0} \\1 %s # System {{facts}}"
    (found,) = split(chat, ["{{sentence}}"], [text], Options())
    assert chat.calls == [[f"Subject: {{{{sentence}}}}\nSentence: {text}"]]
    assert found.facts == [text]


@pytest.mark.parametrize("texts", [[], ["a", "b"]])
def test_texts_and_entities_go_together(texts: list[str]) -> None:
    with pytest.raises(ValueError, match="zip"):
        split(splitter(), ["Odra Venn"], texts, Options())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One came. Two went! Did three? Yes, three.", ["One came.", "Two went!", "Did three?", "Yes, three."]),
        (
            "Dr. J. R. Venn (b. Port Hale) met Mr. Oldan. She left.",
            ["Dr. J. R. Venn (b. Port Hale) met Mr. Oldan.", "She left."],
        ),
        ("She lived in the U.S. until 1902. then she left.", ["She lived in the U.S. until 1902. then she left."]),
        ('He said "It is moss." Then he went. "No."', ['He said "It is moss."', 'Then he went. "No."']),
        ("Early life\n\nShe was born.\n- a list item\n", ["Early life", "She was born.", "- a list item"]),
        ("3.14 is no date. Venn ate 3.5 pies.", ["3.14 is no date.", "Venn ate 3.5 pies."]),
        ("これは文です。これも文です。", ["これは文です。", "これも文です。"]),
        ("", []),
        (" \n ", []),
        ("no end", ["no end"]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@given(st.text("aB .!?\n\"'。)", max_size=80))
def test_sentences_lose_nothing(text: str) -> None:
    found = sentences(text)
    assert "".join("".join(found).split()) == "".join(text.split())
    assert all(sentence == sentence.strip() != "" for sentence in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", True),
        (" \n", True),
        ("I'm sorry, but I can't help.", True),
        ("I\u2019m sorry.", True),
        ("  I don't have any information about Odra Venn.", True),
        ("Unfortunately, I could not find her.", True),
        ("As an AI, I know nobody.", True),
        ("Sorry, no.", True),
        ("Odra Venn was a botanist. I'm sorry.", False),
        ("I, Odra Venn, was born in Port Hale.", False),
        ("Sorrytown is a harbour.", False),
    ],
)
def test_declining(text: str, expected: bool) -> None:
    assert declines(text) is expected


def test_a_text_that_declines_is_not_asked_about() -> None:
    chat = splitter()
    found = split(chat, ["Odra Venn"] * 2, ["", "I cannot tell you."], Options())
    assert [each.declined for each in found] == [True, True]
    assert chat.calls == []


def test_answers_in_a_code_fence_are_taken() -> None:
    assert parse_facts('```json\n{"facts": ["Venn lived."]}\n```\n') == ["Venn lived."]
    assert parse_verdict('```\n{"supported": false}\n```') is False
    assert parse_verdict(' {"supported": true}\n') is True


def test_the_schema_is_what_is_parsed() -> None:
    facts = SPLIT_SCHEMA["properties"]["facts"]
    most = {"facts": ["x" * facts["items"]["maxLength"]] * facts["maxItems"]}
    assert parse_facts(json.dumps(most)) is not None
    assert set(SPLIT_SCHEMA["required"]) == set(SPLIT_SCHEMA["properties"])
    assert set(VERIFY_SCHEMA["required"]) == set(VERIFY_SCHEMA["properties"])


@pytest.mark.parametrize("name", ["split", "verify"])
def test_the_prompts_are_the_files(name: Literal["split", "verify"]) -> None:
    data = (Path(lacy.cascade.evaluation.__file__).parent / f"{name}_prompt.md").read_bytes()
    assert prompt(name).sha256 == hashlib.sha256(data).hexdigest()
    assert prompt(name).text == data.decode()
    assert prompt(name).version >= 1


def test_the_examples_in_the_prompts_are_good_answers() -> None:
    examples = [line for line in prompt("split").text.splitlines() if line.startswith('{"facts"')]
    assert len(examples) == 3
    assert [len(parse_facts(example) or []) for example in examples] == [6, 5, 0]
    assert all(example == json.dumps(json.loads(example), separators=(",", ":")) for example in examples)
    verdicts = re.findall(r"\{[^{}]*\}", prompt("verify").text.partition("# User")[0])
    assert [parse_verdict(verdict) for verdict in verdicts] == [True, False]


@pytest.mark.parametrize("wrong", [{"gamma": -1}, {"gamma": math.inf}, {"passages": 0}, {"batch": 0}, {"unknown": 1}])
def test_options_must_be_possible(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Options(**wrong)
