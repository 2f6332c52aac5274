"""Prompts with their fields, and answers in JSON, with a scripted chat."""

from typing import Any

import pytest
from pydantic import BaseModel

from lacy.labelers.llm.chat import Conversation, Reply
from lacy.labelers.llm.prompts import Prompt, ask_json, parse_answer

PROMPT = Prompt(1, "", "version: 1\n\n# System\n\nBe brief.\n\n# User\n\nName: {{name}}\n\n# Again\n\nJSON, please.\n")


class Count(BaseModel):
    count: int


class Scripted:
    """Answers question i with the i-th list of replies, one after the other."""

    def __init__(self, replies: list[list[Reply]]) -> None:
        self.replies = replies
        self.calls: list[list[str]] = []

    def ask(self, conversations: list[Conversation], schema: dict[str, Any] | None, max_tokens: int) -> list[Reply]:
        questions = [conversation[-1]["content"] for conversation in conversations]
        self.calls.append(questions)
        return [self.replies[int(question.split()[1])].pop(0) for question in questions]

    def close(self) -> None: ...


def ask(chat: Scripted, count: int, **more: Any) -> list[tuple[Count | None, str]]:
    return ask_json(
        chat,
        lambda i, again: PROMPT.conversation({"name": str(i)}, again=again),
        count,
        Count.model_json_schema(),
        lambda answer: parse_answer(answer, Count),
        max_tokens=8,
        **more,
    )


def test_field_values_are_data() -> None:
    system, user = PROMPT.conversation({"name": "{{name}} # User \\1"})
    assert system == {"role": "system", "content": "Be brief."}
    assert user == {"role": "user", "content": "Name: {{name}} # User \\1"}
    assert PROMPT.conversation({"name": "x"}, again=True)[1]["content"] == "Name: x\n\nJSON, please."


@pytest.mark.parametrize(
    "answer", ['{"count": 3}', ' {"count": 3}\n', '```json\n{"count": 3}\n```', '```\n{"count": 3}```']
)
def test_answers_with_and_without_a_code_fence(answer: str) -> None:
    assert parse_answer(answer, Count) == Count(count=3)


@pytest.mark.parametrize("answer", ["", "3", '{"count": "many"}', '{"count": 3', "\ud800"])
def test_other_answers_are_none(answer: str) -> None:
    assert parse_answer(answer, Count) is None


def test_unusable_answers_are_asked_for_once_more() -> None:
    good = Reply('{"count": 1}')
    chat = Scripted([[good], [Reply("one"), good], [Reply(None, "too long")] * 2, [Reply("one")] * 2])
    progress: list[tuple[int, int]] = []
    answers = ask(chat, 4, batch=3, on_progress=lambda done, total: progress.append((done, total)))
    malformed = "the answer is not JSON in the form that was asked for"
    assert answers == [(Count(count=1), ""), (Count(count=1), ""), (None, "too long"), (None, malformed)]
    reminded = [f"Name: {i}\n\nJSON, please." for i in (1, 3)]
    assert chat.calls == [["Name: 0", "Name: 1", "Name: 2"], ["Name: 3"], [reminded[0], "Name: 2", reminded[1]]]
    assert progress == [(3, 4), (4, 4), (7, 7)]


def test_without_questions_nothing_is_asked() -> None:
    chat = Scripted([])
    assert ask(chat, 0) == []
    assert chat.calls == []
