"""Answers are kept: nothing is asked twice, and an interruption loses no more than a portion."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lacy.cascade.evaluation.answers import Remembering
from lacy.labelers.llm.chat import Conversation, Reply
from lacy.schemas.errors import CascadeError

SCHEMA = {"type": "object"}


class Scripted:
    """A chat that answers by a function of the last message, and remembers what it was asked."""

    def __init__(self, answer: Callable[[str], str | None] = str.upper) -> None:
        self.answer = answer
        self.calls: list[list[str]] = []
        self.closed = 0

    def ask(self, conversations: list[Conversation], schema: dict[str, Any] | None, max_tokens: int) -> list[Reply]:
        questions = [conversation[-1]["content"] for conversation in conversations]
        self.calls.append(questions)
        answers = [self.answer(question) for question in questions]
        return [Reply(text, None if text is not None else "too long") for text in answers]

    def close(self) -> None:
        self.closed += 1


def say(*questions: str) -> list[Conversation]:
    return [[{"role": "user", "content": question}] for question in questions]


def never() -> Scripted:
    raise AssertionError("the model was loaded")


def texts(answers: list[Reply]) -> list[str | None]:
    return [answer.text for answer in answers]


def test_a_rerun_asks_nothing_and_loads_nothing(tmp_path: Path) -> None:
    chat = Scripted()
    first = Remembering(lambda: chat, "m", tmp_path / "new" / "answers.jsonl", portion=2)
    questions = say("a", "b", "a", "東 🌉\n", "c", "\ud800")
    expected = ["A", "B", "A", "東 🌉\n", "C", "\ud800"]
    assert texts(first.ask(questions, SCHEMA, 8)) == expected
    assert chat.calls == [["a", "b"], ["東 🌉\n", "c"], ["\ud800"]]
    assert texts(first.ask(questions, SCHEMA, 8)) == expected
    assert first.asked == 5
    first.close()
    first.close()
    assert chat.closed == 1
    again = Remembering(never, "m", tmp_path / "new" / "answers.jsonl")
    assert texts(again.ask(questions, SCHEMA, 8)) == expected
    assert again.ask([], SCHEMA, 8) == []
    assert again.asked == 0
    again.close()


@pytest.mark.parametrize(("name", "schema", "max_tokens"), [("n", SCHEMA, 8), ("m", None, 8), ("m", SCHEMA, 9)])
def test_what_decides_an_answer_is_in_its_key(
    tmp_path: Path, name: str, schema: dict[str, Any] | None, max_tokens: int
) -> None:
    path = tmp_path / "answers.jsonl"
    Remembering(Scripted, "m", path).ask(say("a"), SCHEMA, 8)
    chat = Scripted(lambda question: "other")
    assert texts(Remembering(lambda: chat, name, path).ask(say("a"), schema, max_tokens)) == ["other"]
    assert texts(Remembering(never, "m", path).ask(say("a"), SCHEMA, 8)) == ["A"]
    system = [{"role": "system", "content": "a"}]
    Remembering(lambda: chat, "m", path).ask([system], SCHEMA, 8)
    assert chat.calls == [["a"], ["a"]]


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    questions = [f"question {number}" for number in range(10)]

    def dies(question: str) -> str:
        if question == "question 7":
            raise RuntimeError("the engine is dead")
        return question.upper()

    with pytest.raises(RuntimeError, match="engine is dead"):
        Remembering(lambda: Scripted(dies), "m", path, portion=3).ask(say(*questions), SCHEMA, 8)
    chat = Scripted()
    resumed = Remembering(lambda: chat, "m", path, portion=3)
    assert texts(resumed.ask(say(*questions), SCHEMA, 8)) == [question.upper() for question in questions]
    assert chat.calls == [questions[6:9], questions[9:]]
    assert resumed.asked == 4


@pytest.mark.parametrize("lost", [1, 2, 20, 95])
def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "answers.jsonl"
    Remembering(Scripted, "m", path).ask(say("a", "b", "c"), SCHEMA, 8)
    whole = path.read_bytes()
    path.write_bytes(whole[:-lost])
    chat = Scripted()
    resumed = Remembering(lambda: chat, "m", path)
    assert texts(resumed.ask(say("a", "b", "c", "d"), SCHEMA, 8)) == ["A", "B", "C", "D"]
    assert chat.calls == [["d"] if lost == 1 else ["c", "d"]]
    assert texts(Remembering(never, "m", path).ask(say("d", "c", "b", "a"), SCHEMA, 8)) == ["D", "C", "B", "A"]


def test_a_file_of_nothing_but_a_cut_off_line_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_bytes(b'{"key": "0')
    assert texts(Remembering(Scripted, "m", path).ask(say("a"), SCHEMA, 8)) == ["A"]
    assert texts(Remembering(never, "m", path).ask(say("a"), SCHEMA, 8)) == ["A"]


def test_errors_are_told_and_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    chat = Scripted(lambda question: None if question == "long" else question)
    asked = Remembering(lambda: chat, "m", path).ask(say("long", "a", "long"), SCHEMA, 8)
    assert asked == [Reply(None, "too long"), Reply("a"), Reply(None, "too long")]
    assert chat.calls == [["long", "a"]]
    better = Scripted()
    assert texts(Remembering(lambda: better, "m", path).ask(say("long", "a"), SCHEMA, 8)) == ["LONG", "a"]
    assert better.calls == [["long"]]


def test_an_empty_answer_is_an_answer(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Remembering(lambda: Scripted(lambda question: ""), "m", path).ask(say("a"), SCHEMA, 8)
    assert Remembering(never, "m", path).ask(say("a"), SCHEMA, 8) == [Reply("")]


def test_answers_can_be_read_by_others(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    Remembering(Scripted, "m", path).ask(say("é", "b"), SCHEMA, 8)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["name"], line["text"]) for line in lines] == [("m", "É"), ("m", "B")]
    assert len({line["key"] for line in lines}) == 2


@pytest.mark.parametrize(
    "content", [b"a text\nof two lines\n", b"\x80\x00\n\x01", b'{"key": 1}\n', b"[" * 100_000 + b"\n"]
)
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(CascadeError, match="is not a file of answers"):
        Remembering(never, "m", path)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CascadeError, match="cannot be read"):
        Remembering(never, "m", tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CascadeError, match=r"cannot be (read|written)"):
        Remembering(Scripted, "m", tmp_path / "file" / "answers.jsonl").ask(say("a"), SCHEMA, 8)
    with pytest.raises(ValueError, match="at once"):
        Remembering(Scripted, "m", tmp_path / "file", portion=0)


def test_a_model_that_answers_too_few_is_not_believed(tmp_path: Path) -> None:
    class Short(Scripted):
        def ask(self, conversations: list[Conversation], schema: Any, max_tokens: int) -> list[Reply]:
            return [Reply("A")]

    path = tmp_path / "answers.jsonl"
    with pytest.raises(ValueError, match="zip"):
        Remembering(Short, "m", path).ask(say("a", "b"), SCHEMA, 8)
    assert not path.exists()
