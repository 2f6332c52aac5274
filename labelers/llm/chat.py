"""Asking a chat model: conversations in, one reply for each out.

Who asks never sees an engine or a server: what cannot be answered is said in the reply. Backends are loaded by `load`;
vLLM is not imported before that.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol


@dataclass(frozen=True)
class Reply:
    """What the model said, or why it said nothing: one of the two is None.

    text   the answer as the model wrote it; cut off in mid-word where it reached `max_tokens`
    error  one line
    """

    text: str | None
    error: str | None = None


class Chat(Protocol):
    """A loaded chat model."""

    @property
    def context(self) -> int | None:
        """Tokens of prompt and answer together; None where unknown."""
        ...

    def ask(
        self, conversations: list[list[dict[str, str]]], schema: dict[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        """One `Reply` per conversation, in order; a conversation is a list of `{"role", "content"}`.

        schema      JSON schema that answers follow as far as the backend can see to it, or None for free text
        max_tokens  most tokens of an answer

        A conversation that cannot be answered (too long for the context, refused by the server) has its `error` set,
        and does not touch the others. What concerns the model and not a conversation raises.
        """
        ...

    def close(self) -> None:
        """Free the model; the chat cannot be used after it. Closing twice is harmless."""
        ...


def load(chat: Literal["vllm", "server"], model: str, **settings: Any) -> Chat:
    """Load `model` for chatting; `settings` are those of `VllmChat` and of `ServerChat`.

    "vllm" runs the model in this process; "server" asks servers that speak the OpenAI protocol.

    Raises `ModelError` when the model, the server or the backend's package is missing, `ValueError` for another chat
    and for settings that cannot be.
    """
    if chat == "vllm":
        from lacy.labelers.llm.vllm_chat import VllmChat

        return VllmChat(model, **settings)
    if chat == "server":
        from lacy.labelers.llm.server_chat import ServerChat

        return ServerChat(model, **settings)
    raise ValueError(f"no chat {chat!r}; known: vllm, server")
