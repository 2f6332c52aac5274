"""Loading a scorer or a chat model by the name of its backend; a backend's library is not imported before that.

Engine processes load their model through these functions (`lacy.labelers.llm.engines.EngineSpec.factory`).
"""

from typing import Any, Literal

from lacy.labelers.llm.chat import Chat
from lacy.labelers.llm.scorer import Scorer


def scorer(backend: Literal["transformers", "vllm", "server"], model: str, **settings: Any) -> Scorer:
    """Load `model` (a folder, a Hub name, or the name of an embedded model) for scoring.

    settings  those of the backend's class: `TransformersScorer`, `VllmScorer`, `ServerScorer`. All have:

        window   tokens per forward pass; default: the model's context, at most 2048
        overlap  least context of a token after the first window; default: a quarter of the window
        bos      id put in front of each window, for models that were trained with one; it is never in the output

    Raises `ModelError` if the model or the backend's package is missing, `ValueError` for an unknown backend or
    impossible settings, TypeError for settings that the backend does not have.
    """
    if backend == "transformers":
        from lacy.labelers.llm.transformers_scorer import TransformersScorer

        return TransformersScorer(model, **settings)
    if backend == "vllm":
        from lacy.labelers.llm.vllm_scorer import VllmScorer

        return VllmScorer(model, **settings)
    if backend == "server":
        from lacy.labelers.llm.server_scorer import ServerScorer

        return ServerScorer(model, **settings)
    raise ValueError(f"no scorer {backend!r}; known: transformers, vllm, server")


def chat(backend: Literal["vllm", "server"], model: str, **settings: Any) -> Chat:
    """Load `model` for chatting: "vllm" runs it in this process, "server" asks servers that speak the OpenAI protocol.

    settings  those of the backend's class: `VllmChat`, `ServerChat`

    Raises `ModelError` if the model, the server or the backend's package is missing, `ValueError` for an unknown
    backend or impossible settings.
    """
    if backend == "vllm":
        from lacy.labelers.llm.vllm_chat import VllmChat

        return VllmChat(model, **settings)
    if backend == "server":
        from lacy.labelers.llm.server_chat import ServerChat

        return ServerChat(model, **settings)
    raise ValueError(f"no chat {backend!r}; known: vllm, server")
