"""A cache on disk of a language model's answers, so that no question is asked twice.

The file has one JSON object per line, `{"key", "name", "text"}`, and is only appended to. A key is a digest of all that
determines a greedy answer: the model's name, the conversation, the schema and the limit of tokens. A line that was cut
off by a kill or a full disk is skipped, and its question is asked again.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from lacy.labelers.llm.chat import Chat, Conversation, Reply
from lacy.schemas.errors import CascadeError
from lacy.schemas.files import sha256

PORTION: Final = 64  # conversations; an interruption loses at most the answers of one portion


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    key: str
    name: str
    text: str


class Remembering:
    """A chat that keeps every answer in the file `path`, and asks the model only what is not in there.

    load     loads the model; called for the first question that is not in the file, so that a complete rerun loads none
    name     the model's name; each name has its own answers in the file
    portion  conversations in one call of the model; their answers are on disk before the next call

    `asked` counts the conversations that went to the model. Raises CascadeError if the file cannot be read, or is not a
    file of answers.
    """

    def __init__(self, load: Callable[[], Chat], name: str, path: Path, *, portion: int = PORTION) -> None:
        if portion < 1:
            raise ValueError(f"{portion} conversations cannot be asked at once")
        self.asked = 0
        self._load = load
        self._chat: Chat | None = None
        self._name = name
        self._path = path
        self._portion = portion
        self._known, self._cut_off = _read(path)

    def ask(self, conversations: list[Conversation], schema: dict[str, Any] | None, max_tokens: int) -> list[Reply]:
        """One answer per conversation, in order; equal conversations are asked once.

        An error of a single conversation is in its reply, and is not kept. Raises what the model raises, after keeping
        its earlier answers, and CascadeError if the file cannot be written.
        """
        keys = [_key(self._name, conversation, schema, max_tokens) for conversation in conversations]
        missing = {
            key: conversation for key, conversation in zip(keys, conversations, strict=True) if key not in self._known
        }
        waiting = list(missing)
        errors: dict[str, str | None] = {}
        for start in range(0, len(waiting), self._portion):
            portion = waiting[start : start + self._portion]
            if self._chat is None:
                self._chat = self._load()
            replies = self._chat.ask([missing[key] for key in portion], schema, max_tokens)
            self.asked += len(portion)
            answered = {key: reply.text for key, reply in zip(portion, replies, strict=True) if reply.text is not None}
            errors |= {key: reply.error for key, reply in zip(portion, replies, strict=True) if reply.text is None}
            self._keep(answered)
        return [Reply(self._known[key]) if key in self._known else Reply(None, errors[key]) for key in keys]

    def close(self) -> None:
        """Close the model if it is loaded. The next question that is not in the file loads it again."""
        if self._chat is not None:
            self._chat.close()
            self._chat = None

    def _keep(self, answered: dict[str, str]) -> None:
        if not answered:
            return
        lines = [json.dumps({"key": key, "name": self._name, "text": text}) + "\n" for key, text in answered.items()]
        data = ("\n" if self._cut_off else "") + "".join(lines)
        self._cut_off = True
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "ab", buffering=0) as file:
                view = memoryview(data.encode())
                while view:
                    view = view[file.write(view) :]
                os.fsync(file.fileno())
        except OSError as error:
            raise CascadeError(f"{self._path} cannot be written ({error.strerror}): make room for answers") from None
        self._cut_off = False
        self._known |= answered


def _key(name: str, conversation: Conversation, schema: dict[str, Any] | None, max_tokens: int) -> str:
    return sha256(json.dumps([name, conversation, schema, max_tokens], sort_keys=True).encode())


def _read(path: Path) -> tuple[dict[str, str], bool]:
    """The answers by key, and whether the last line is cut off. Without a file: no answers."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return {}, False
    except OSError as error:
        raise CascadeError(f"{path} cannot be read ({error.strerror}): fix its permissions, or delete it") from None
    *lines, last = data.split(b"\n")
    known = {}
    damaged = 0
    for line in [*lines, last] if last else lines:
        try:
            record = _Record.model_validate(json.loads(line))  # pydantic's own parser refuses lone surrogates
            known[record.key] = record.text
        except (ValueError, RecursionError):
            damaged += line is not last and bool(line)
    if damaged and not known:
        raise CascadeError(f"{path} is not a file of answers: move it away or remove it")
    return known, bool(last)
