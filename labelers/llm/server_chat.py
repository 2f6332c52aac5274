"""The chat on servers that speak the OpenAI protocol; see `lacy.labelers.llm.chat` for the protocol."""

from typing import Any

from lacy.labelers.llm.chat import Reply
from lacy.labelers.llm.servers import BadAnswerError, Body, Refused, ServerPool, pick_model

PATH = "/v1/chat/completions"


class ServerChat:
    """A chat model on servers, which call it `model` or serve only one; see `ServerPool` for the other settings.

    `context` is the smallest that the servers report, in tokens. Raises `ModelError` if the servers have another model,
    or if none answers.
    """

    def __init__(
        self,
        model: str,
        *,
        servers: list[str],
        concurrency: int = 8,
        timeout: float = 600.0,
        patience: float = 300.0,
        backoff: float = 0.5,
    ) -> None:
        self.pool = ServerPool(servers, concurrency=concurrency, timeout=timeout, patience=patience, backoff=backoff)
        try:
            self.name, self.context = pick_model(self.pool, model)
        except BaseException:
            self.pool.close()
            raise

    def ask(
        self, conversations: list[list[dict[str, str]]], schema: dict[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        plain: Body = {"model": self.name, "temperature": 0, "seed": 0, "max_tokens": max_tokens}
        if schema is not None:
            named = {"name": "answer", "schema": schema, "strict": True}
            plain["response_format"] = {"type": "json_schema", "json_schema": named}
        bodies = (plain | {"messages": conversation} for conversation in conversations)
        answers = self.pool.post_all(PATH, bodies, _read)
        return [Reply(None, answer.reason) if isinstance(answer, Refused) else Reply(answer) for answer in answers]

    def close(self) -> None:
        """Close the connections; the servers keep running. Closing twice is harmless."""
        self.pool.close()


def _read(answer: Any, _: Body) -> str:
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise BadAnswerError("no text")
    return text
