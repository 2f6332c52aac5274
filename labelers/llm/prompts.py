"""Prompts that ship as files, and answers in JSON.

A prompt file begins with a line `version: N`, followed by three sections under `# ` headings: the system message, the
user message with its `{{fields}}`, and a reminder that is appended when an answer was not JSON of the right form.
Field values are data: nothing in them is read as a field.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from importlib import resources
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from lacy.labelers.llm.chat import Chat, Conversation

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

_FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.DOTALL)


@dataclass(frozen=True)
class Prompt:
    """A prompt file; `sha256` is that of its bytes."""

    version: int
    sha256: str
    text: str

    def conversation(self, fields: dict[str, str], *, again: bool = False) -> Conversation:
        """The messages with the fields filled in.

        again  append the reminder, after a malformed answer: greedy decoding would repeat that answer
        """
        system, user, reminder = self._sections
        content = "".join(fields[piece[2:-2]] if piece.startswith("{{") else piece for piece in user)
        if again:
            content = f"{content}\n\n{reminder}"
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    @cached_property
    def _sections(self) -> tuple[str, list[str], str]:
        """The system message, the user message split at its fields, and the reminder."""
        system, user, reminder = (part.strip() for part in re.split(r"^# .*$", self.text, flags=re.MULTILINE)[1:])
        return system, re.split(r"(\{\{\w+\}\})", user), reminder


@cache
def read_prompt(package: str, name: str) -> Prompt:
    """The prompt in the file `name` of an importable package."""
    data = resources.files(package).joinpath(name).read_bytes()
    text = data.decode()
    return Prompt(int(text.partition("\n")[0].removeprefix("version:")), sha256(data).hexdigest(), text)


def parse_answer(answer: str, form: type[M]) -> M | None:
    """An answer that is JSON of the given form, with or without a code fence around it; None for any other."""
    fenced = _FENCE.fullmatch(answer)
    try:
        return form.model_validate_json(fenced[1] if fenced else answer)
    except (ValidationError, UnicodeEncodeError):
        return None


def ask_json(
    chat: Chat,
    conversation: Callable[[int, bool], Conversation],
    count: int,
    schema: dict[str, Any],
    parse: Callable[[str], T | None],
    *,
    max_tokens: int,
    batch: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[tuple[T | None, str]]:
    """Ask `count` questions: for each the parsed answer and an empty string, or None and the reason.

    conversation  builds question i; its second argument says whether the last answer to it was malformed
    batch         questions in one call of the chat; default: all
    on_progress   gets the questions done and their total

    Questions without a usable answer are asked once more. Raises what `chat` raises.
    """
    answers: list[tuple[T | None, str]] = [(None, "")] * count
    malformed: set[int] = set()
    todo = list(range(count))
    batch = batch or max(1, count)
    done = total = 0
    for _ in range(2):
        total += len(todo)
        for start in range(0, len(todo), batch):
            portion = todo[start : start + batch]
            replies = chat.ask([conversation(i, i in malformed) for i in portion], schema, max_tokens)
            for i, reply in zip(portion, replies, strict=True):
                value = None if reply.text is None else parse(reply.text)
                if value is not None:
                    answers[i] = value, ""
                elif reply.text is None:
                    answers[i] = None, reply.error or "no answer"
                else:
                    answers[i] = None, "the answer is not JSON in the form that was asked for"
                    malformed.add(i)
            done += len(portion)
            if on_progress:
                on_progress(done, total)
        todo = [i for i in todo if answers[i][0] is None]
    return answers
