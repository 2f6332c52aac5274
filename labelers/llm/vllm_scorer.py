"""The scorer on vLLM: the choice for a GPU, and the same code on a CPU.

vLLM is used as a pure scorer: token ids go in, no tokenizer is loaded and nothing is decoded. The prefix cache is off,
as it makes scores depend on the order of documents. One token is generated per window, the fewest that vLLM can
generate, so a window is at least one token shorter than the model's context.

There are two ways to ask for the scores of a prompt. If the engine supports it (its second model runner, on GPUs), the
request names the ids to score, and one float comes back for each. Otherwise `prompt_logprobs=0` also returns the ids
that were scored, which are checked against the prompt, and their ranks, which tell whether each was the most likely
token.

On a GPU the engine runs in a process of its own, as vLLM does by default. On a CPU it runs in this process, with this
process's threads; a process can hold only one such engine at a time.
"""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lacy.labelers.llm.model_folders import resolve, text_config
from lacy.labelers.llm.scorer import (
    GPU_MEMORY_SHARE,
    MAX_DEFAULT_WINDOW,
    Scores,
    Span,
    fault_of,
    finish,
    plan_spans,
    settle_window,
)
from lacy.labelers.llm.windows import slices
from lacy.schemas.errors import ModelError

CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 4096  # the first model runner holds 6 bytes per token and vocabulary entry that it does not plan for
CPU_CACHE_BYTES = 2 << 30
SLICE_TOKENS = 1 << 18  # in one call of the engine, which keeps all answers of a call until the last is done
CPU_SLICE_TOKENS = 1 << 15  # small enough to show progress
QUIET = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}  # unless the environment says otherwise


class VllmScorer:
    """An LLM in vLLM; see `lacy.labelers.llm.scorer.Scorer` for the protocol.

    dtype             "auto" is float32 on a CPU and bfloat16 on a GPU; else the name of a torch dtype
    window, overlap   tokens, as `lacy.labelers.llm.load.scorer` explains
    max_batch_tokens  tokens per scheduler step; the default suits the device
    threads           CPU threads
    bos               id put in front of each window
    engine            further arguments of `vllm.LLM`

    Raises `ModelError` if the model or vLLM is missing, `ValueError` for impossible settings.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        window: int | None = None,
        overlap: int | None = None,
        max_batch_tokens: int | None = None,
        threads: int = 1,
        bos: int | None = None,
        trust_remote_code: bool = False,
        **engine: Any,
    ) -> None:
        self.on_cpu = prepare()
        self.slice_tokens = CPU_SLICE_TOKENS if self.on_cpu else SLICE_TOKENS
        config = text_config(model, trust_remote_code=trust_remote_code)
        context = getattr(config, "max_position_embeddings", None)
        if context is not None and (window is None or window == context):
            window = min(window or MAX_DEFAULT_WINDOW, context - 1)
        self.window, self.overlap = settle_window(context, window, overlap, bos)
        self.bos = bos
        self.vocabulary: int = config.vocab_size
        if bos is not None and not 0 <= bos < self.vocabulary:
            raise ValueError(f"BOS id {bos} is outside the model's {self.vocabulary} tokens")
        max_batch_tokens = max_batch_tokens or (CPU_BATCH_TOKENS if self.on_cpu else GPU_BATCH_TOKENS)
        settings: dict[str, Any] = {
            "max_model_len": self.window + 1,
            "max_num_batched_tokens": max_batch_tokens,
            "max_num_seqs": min(256, max_batch_tokens),
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
        }
        if not self.on_cpu:
            settings |= {"gpu_memory_utilization": GPU_MEMORY_SHARE}
        self.llm = open_engine(resolve(model), dtype, threads, trust_remote_code, settings | engine)
        self.by_ids = self._scores_by_ids()
        self.path = "vllm prompt_logprob_token_ids" if self.by_ids else "vllm prompt_logprobs"

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        faults = [fault_of(document, self.vocabulary) for document in documents]
        nll = [np.full(document.size, np.nan, dtype=np.float32) for document in documents]
        correct = None if self.by_ids else [np.zeros(document.size, dtype=bool) for document in documents]
        planned = plan_spans(documents, faults, self.window, self.overlap, self.bos)
        for begin, end in slices([span.end - span.begin for span in planned], self.slice_tokens):
            spans = planned[begin:end]
            prompts = [self._prompt(documents[span.document], span) for span in spans]
            for span, answer in zip(spans, self._ask(prompts), strict=True):
                if isinstance(answer, str):
                    faults[span.document] = answer
                    continue
                nll[span.document][span.score_from : span.end] = answer.nll
                if correct is not None and answer.top is not None:
                    correct[span.document][span.score_from : span.end] = answer.top
            if on_tokens:
                on_tokens(sum(span.end - span.score_from for span in spans))
        return finish(nll, correct, faults)

    def close(self) -> None:
        """Free the engine, so that this process can load another. Closing twice is harmless."""
        if self.llm is not None:
            close_engine(self.llm)
            self.llm = None

    def _prompt(self, document: np.ndarray, span: Span) -> "_Prompt":
        ids = document[span.begin : span.end].tolist()
        lead = [] if self.bos is None else [self.bos]
        return _Prompt(lead + ids, len(lead) + span.score_from - span.begin)

    def _ask(self, prompts: list["_Prompt"]) -> list["_Answer | str"]:
        """An answer for each prompt, or why there is none. An answer for other ids is asked for once more.

        The engine reads the ids from memory that it may have reused by then (vLLM pull request 44106).
        """
        answers = [_read(prompt, output) for prompt, output in zip(prompts, self._generate(prompts), strict=True)]
        for index, answer in enumerate(answers):
            if answer is None:
                (output,) = self._generate([prompts[index]])
                answers[index] = _read(prompts[index], output)
        return ["vLLM returned scores of other tokens" if answer is None else answer for answer in answers]

    def _generate(self, prompts: list["_Prompt"]) -> list[Any]:
        from vllm import SamplingParams

        plain: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
        parameters: Any
        if self.by_ids:
            parameters = [
                SamplingParams(
                    **plain,
                    prompt_logprob_start=prompt.score_from - 1,
                    prompt_logprob_token_ids=np.array(prompt.ids[prompt.score_from :], dtype=np.int32)[:, None],
                )
                for prompt in prompts
            ]
        else:
            parameters = SamplingParams(**plain, prompt_logprobs=0, flat_logprobs=True)
        inputs: Any = [{"prompt_token_ids": prompt.ids} for prompt in prompts]
        return self.llm.generate(inputs, parameters, use_tqdm=False)

    def _scores_by_ids(self) -> bool:
        """Whether the engine scores ids named in the request, tried on two tokens; older ones lack the parameter."""
        from vllm.exceptions import VLLMValidationError

        self.by_ids = True
        prompt = _Prompt([0, 1], 1)
        try:
            (output,) = self._generate([prompt])
            return isinstance(_read(prompt, output), _Answer)
        except (AttributeError, TypeError, ValueError, VLLMValidationError):
            return False


@dataclass(frozen=True)
class _Prompt:
    ids: list[int]
    score_from: int  # index of the first scored token, at least 1


@dataclass(frozen=True)
class _Answer:
    nll: np.ndarray  # of the scored tokens
    top: np.ndarray | None  # whether each was the most likely one


def _read(prompt: _Prompt, output: Any) -> _Answer | None:
    """The scores in a RequestOutput of vLLM; None if they are not the prompt's."""
    scored = len(prompt.ids) - prompt.score_from
    by_ids = getattr(output, "prompt_token_id_logprobs", None)
    if by_ids is not None:
        by_ids = np.asarray(by_ids, dtype=np.float32)
        return _Answer(-by_ids[:, 0], None) if by_ids.shape == (scored, 1) else None
    flat = output.prompt_logprobs  # no entry for the first token, then one for each
    if flat is None or list(flat.token_ids) != prompt.ids[1:]:
        return None
    nll = -np.array(flat.logprobs[prompt.score_from - 1 :], dtype=np.float32)
    return _Answer(nll, np.array(flat.ranks[prompt.score_from - 1 :]) == 1)


def prepare() -> bool:
    """Prepare the import of vLLM. Returns whether it will run on a CPU. Raises ModelError if it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ModelError("vLLM is not installed: pip install 'lacy[vllm]'")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def open_engine(model: str, dtype: str, threads: int, trust_remote_code: bool, settings: dict[str, Any]) -> Any:
    """A `vllm.LLM` for a model folder or name, with the settings that all uses share. Raises ModelError."""
    on_cpu = prepare()
    import torch

    shared: dict[str, Any] = {
        "dtype": ("float32" if on_cpu else "bfloat16") if dtype == "auto" else dtype,
        "generation_config": "vllm",
        "trust_remote_code": trust_remote_code,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        shared |= {"enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        torch.set_num_threads(threads)
    set_num_threads = torch.set_num_threads
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from vllm import LLM

            hide_from_kernel_search()
            return LLM(model, **shared | settings)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise ModelError(f"vLLM cannot load {model!r}: {' '.join(str(error).split())[:300]}") from error
        finally:
            torch.set_num_threads = set_num_threads  # a CPU engine replaces it with a function that does nothing


def close_engine(llm: Any) -> None:
    llm.llm_engine.engine_core.shutdown()
    if os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
        from vllm.distributed import cleanup_dist_env_and_memory

        cleanup_dist_env_and_memory()


def hide_from_kernel_search() -> None:
    """Let vLLM's CPU platform load after numba.

    It searches the `__dict__` of every object in every module for a kernel, and llvmlite's library answers to any
    attribute name, including this one, with a function. The library looks into its table of known functions first.
    """
    if ffi := sys.modules.get("llvmlite.binding.ffi"):
        ffi.lib._fntab.setdefault("__dict__", {})
