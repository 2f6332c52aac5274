"""The chat on vLLM, in this process.

Conversations become token ids here and not in the engine, so that one that is too long, or that the model's template
refuses, is noticed before the engine sees it. Answers are greedy. The prefix cache is on: common beginnings of prompts
are read once.

As with the scorer, a process can have only one engine on a CPU at a time.
"""

from typing import Any

from lacy.labelers.llm.chat import Reply
from lacy.labelers.llm.model_folders import resolve, text_config
from lacy.labelers.llm.vllm_scorer import CPU_BATCH_TOKENS, close_engine, open_engine, prepare

MAX_DEFAULT_CONTEXT = 4096  # tokens; the cache must have room for one conversation of this length


class VllmChat:
    """A chat model in vLLM; see `lacy.labelers.llm.chat` for the protocol.

    dtype             "auto" is float32 on a CPU and bfloat16 on a GPU; else the name of a torch dtype
    max_batch_tokens  tokens per scheduler step; the default suits the device
    threads           CPU threads
    window            tokens of prompt and answer together; default: the model's context, at most 4096
    engine            further arguments of `vllm.LLM`

    Raises `ModelError` if the model or vLLM is missing, `ValueError` if the window is longer than the context.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        max_batch_tokens: int | None = None,
        threads: int = 1,
        trust_remote_code: bool = False,
        window: int | None = None,
        **engine: Any,
    ) -> None:
        on_cpu = prepare()
        config = text_config(model, trust_remote_code=trust_remote_code)
        longest = getattr(config, "max_position_embeddings", None)
        self.context: int = window or min(longest or MAX_DEFAULT_CONTEXT, MAX_DEFAULT_CONTEXT)
        if longest is not None and self.context > longest:
            raise ValueError(f"window {window} is longer than the model's context of {longest} tokens")
        settings: dict[str, Any] = {
            "max_model_len": self.context,
            "seed": 0,
            # a model that may write any white space between two fields can go on doing so until it is cut off
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        }
        if on_cpu:
            max_batch_tokens = max_batch_tokens or CPU_BATCH_TOKENS
        if max_batch_tokens:
            settings |= {"max_num_batched_tokens": max_batch_tokens, "max_num_seqs": min(256, max_batch_tokens)}
        self.llm = open_engine(resolve(model), dtype, threads, trust_remote_code, settings | engine)
        self.tokenizer = self.llm.get_tokenizer()

    def ask(
        self, conversations: list[list[dict[str, str]]], schema: dict[str, Any] | None, max_tokens: int
    ) -> list[Reply]:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        form = None if schema is None else StructuredOutputsParams(json=schema)
        parameters = SamplingParams(temperature=0.0, seed=0, max_tokens=max_tokens, structured_outputs=form)
        prompts = [self._prompt(conversation) for conversation in conversations]
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts if isinstance(prompt, list)]
        outputs = iter(self.llm.generate(inputs, parameters, use_tqdm=False) if inputs else [])
        return [
            Reply(None, prompt) if isinstance(prompt, str) else Reply(next(outputs).outputs[0].text)
            for prompt in prompts
        ]

    def close(self) -> None:
        """Free the engine, so that this process can load another. Closing twice is harmless."""
        if self.llm is not None:
            close_engine(self.llm)
            self.llm = None

    def _prompt(self, conversation: list[dict[str, str]]) -> list[int] | str:
        """The token ids of a conversation, or why it cannot be asked."""
        try:
            ids = self._ids(conversation)
        except Exception as error:  # templates are programs, which may raise anything
            return f"the conversation cannot be tokenized: {_line(error)}"
        if len(ids) >= self.context:
            return f"the conversation has {len(ids)} tokens, and the model reads {self.context}, including the answer"
        return ids

    def _ids(self, conversation: list[dict[str, str]]) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            return self.tokenizer.encode("\n\n".join(message["content"] for message in conversation) + "\n\n")
        try:
            return self._templated(conversation)
        except Exception:
            if conversation[0]["role"] != "system" or len(conversation) == 1:
                raise
            return self._templated(without_system(conversation))  # some templates do not know this role

    def _templated(self, conversation: list[dict[str, str]]) -> list[int]:
        return self.tokenizer.apply_chat_template(
            conversation,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=False,  # for templates that ask; others ignore it
        )


def without_system(conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same conversation with the system message's text at the beginning of the message after it."""
    system, first, *rest = conversation
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
