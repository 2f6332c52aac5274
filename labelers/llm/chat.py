"""The chat protocol: conversations in, one reply for each out.

Callers never see an engine or a server: the reply says why a conversation has no answer. `lacy.labelers.llm.load.chat`
loads a backend.
"""

from dataclasses import dataclass
from typing import Any, Protocol

Conversation = list[dict[str, str]]  # messages, each with "role" and "content"


@dataclass(frozen=True)
class Reply:
    """The model's answer, or the reason why there is none: one of the two is None.

    text   the answer as the model wrote it; cut off in mid-word where it reached `max_tokens`
    error  one line
    """

    text: str | None
    error: str | None = None


class Chat(Protocol):
    """A loaded chat model."""

    def ask(self, conversations: list[Conversation], schema: dict[str, Any] | None, max_tokens: int) -> list[Reply]:
        """One `Reply` per conversation, in order.

        schema      JSON schema that answers follow as far as the backend can enforce it, or None for free text
        max_tokens  of one answer, at most

        A conversation that cannot be answered (too long for the context, refused by the server) has its `error` set
        and does not affect the others. Faults of the model itself raise.
        """
        ...

    def close(self) -> None:
        """Free the model; the chat cannot be used after it. Closing twice is harmless."""
        ...
