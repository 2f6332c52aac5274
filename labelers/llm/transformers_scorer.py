"""The scorer on `transformers`: exact, deterministic, and the sensible choice on a CPU.

It is faster than a loop over `model(**batch)`, without changing a number, because

- windows are sorted by length and batched by tokens, so little of a batch is padding;
- padding is on the right and no attention mask is passed: a causal model does not see what comes later, and attention
  takes its fast path without a mask;
- only the hidden states of scored positions go through the output layer, some rows at a time, in a buffer that is
  reused: the logits of a whole batch never exist.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from lacy.labelers.llm.model_folders import resolve
from lacy.labelers.llm.scorer import Scores, Span, fault_of, finish, plan_spans, settle_window
from lacy.schemas.errors import ModelError

log = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 1024  # a few percent faster than 2048 to 8192, and takes less memory
GPU_BATCH_TOKENS = 32768
LOGITS_BYTES = 128 << 20  # of one chunk of float32 logits
CACHED_ROWS = 8  # rows of logits reduced together on a CPU, few enough to stay in its cache


class TransformersScorer:
    """A causal language model of `transformers`; see `lacy.labelers.llm.scorer.Scorer` for the protocol.

    dtype             "auto" is float32 on a CPU and bfloat16 on a GPU; else the name of a torch dtype
    window, overlap   tokens, as `lacy.labelers.llm.load.scorer` explains
    max_batch_tokens  tokens per forward pass over all documents, padding included; the default suits the device
    device            "auto" is "cuda" if there is one, else "cpu"
    threads           CPU threads; with one, equal calls give equal bytes whatever else the machine does
    bos               id put in front of each window

    Raises `ModelError` if the model cannot be loaded, `ValueError` for impossible settings.
    """

    path = "transformers"

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        window: int | None = None,
        overlap: int | None = None,
        max_batch_tokens: int | None = None,
        device: str = "auto",
        threads: int = 1,
        bos: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            torch.set_num_threads(threads)  # of this process
        if dtype == "auto":
            dtype = "float32" if on_cpu else "bfloat16"
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"no torch dtype {dtype!r}")
        path = resolve(model)
        try:
            with _quiet():
                loaded = AutoModelForCausalLM.from_pretrained(
                    path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
                )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the model {model!r}: {' '.join(str(error).split())[:300]}") from error
        self.model = loaded.eval()
        self.model.to(self.device)
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        self.window, self.overlap = settle_window(context, window, overlap, bos)
        self.bos = bos
        self.max_batch_tokens = max_batch_tokens or (CPU_BATCH_TOKENS if on_cpu else GPU_BATCH_TOKENS)
        self.vocabulary = self.model.get_input_embeddings().num_embeddings
        if bos is not None and not 0 <= bos < self.vocabulary:
            raise ValueError(f"BOS id {bos} is outside the model's {self.vocabulary} tokens")
        self.head = self.model.get_output_embeddings()
        self.buffer = torch.empty(0)
        self.plain_head = self._head_is_plain()
        if not self.plain_head:
            log.info("%s post-processes its logits: windows are scored one by one", model)

    def score(self, documents: list[np.ndarray], on_tokens: Callable[[int], None] | None = None) -> list[Scores]:
        faults = [fault_of(document, self.vocabulary) for document in documents]
        nll = [np.full(document.size, np.nan, dtype=np.float32) for document in documents]
        correct = [np.zeros(document.size, dtype=bool) for document in documents]
        spans = plan_spans(documents, faults, self.window, self.overlap, self.bos)
        todo = token_batches(spans, self.max_batch_tokens)[::-1]
        while todo:
            batch = todo.pop()
            try:
                batch_nll, batch_correct = self._score_batch(documents, batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                todo += [batch[len(batch) // 2 :], batch[: len(batch) // 2]]
                continue
            first = 0
            for span in batch:
                last = first + span.end - span.score_from
                nll[span.document][span.score_from : span.end] = batch_nll[first:last]
                correct[span.document][span.score_from : span.end] = batch_correct[first:last]
                first = last
            if on_tokens:
                on_tokens(first)
        return finish(nll, correct, faults)

    def close(self) -> None:
        self.model, self.head, self.buffer = None, None, torch.empty(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _score_batch(self, documents: list[np.ndarray], batch: list[Span]) -> tuple[np.ndarray, np.ndarray]:
        """NLL (float32) and correctness (bool) of the scored tokens of a batch of spans, concatenated in order.

        The model reads each span without its last token, whose prediction is not needed.
        """
        lead = int(self.bos is not None)
        length = max(lead + span.end - 1 - span.begin for span in batch)
        ids = np.zeros((len(batch), length), dtype=np.int64)  # (B, L)
        sources, targets = [], []  # for each scored token: index of its prediction in the flat batch, and its id
        for row, span in enumerate(batch):
            document = documents[span.document]
            if self.bos is not None:
                ids[row, 0] = self.bos
            ids[row, lead : lead + span.end - 1 - span.begin] = document[span.begin : span.end - 1]
            first = row * length + lead - 1 - span.begin
            sources.append(np.arange(first + span.score_from, first + span.end))
            targets.append(document[span.score_from : span.end])
        input_ids = torch.from_numpy(ids).to(self.device)
        source = torch.from_numpy(np.concatenate(sources)).to(self.device)  # (N,)
        target = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(self.device)  # (N,)

        if self.plain_head:
            hidden = self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
            hidden = hidden.flatten(0, 1)[source]  # (N, H)
            rows = max(1, LOGITS_BYTES // (4 * self.vocabulary))
            parts = [_reduce(self._logits(h), t) for h, t in zip(hidden.split(rows), target.split(rows), strict=True)]
        else:
            parts = []
            for row in range(len(batch)):
                mine = source.div(length, rounding_mode="floor") == row
                span = batch[row]
                used = lead + span.end - 1 - span.begin
                logits = self.model(input_ids=input_ids[row : row + 1, :used], use_cache=False).logits[0]  # (L, V)
                parts.append(_reduce(logits[source[mine] - row * length].float(), target[mine]))
        nll, correct = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
        return nll, correct

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits (N, V) of hidden states (N, H); on a CPU in a buffer, valid until the next call."""
        if hidden.device.type != "cpu" or hidden.dtype != torch.float32 or type(self.head) is not nn.Linear:
            return self.head(hidden).float()
        vocabulary = self.head.out_features
        if len(self.buffer) < len(hidden):
            self.buffer = torch.empty(len(hidden), vocabulary)
        out = self.buffer[: len(hidden)]
        if self.head.bias is None:
            return torch.mm(hidden, self.head.weight.t(), out=out)
        return torch.addmm(self.head.bias, hidden, self.head.weight.t(), out=out)

    @torch.inference_mode()
    def _head_is_plain(self) -> bool:
        """Whether the logits are the output layer's on the last hidden states, tried on a short prompt.

        Some architectures scale or cap them afterwards (Cohere, Granite, Gemma 2).
        """
        if self.head is None or self.model.base_model is self.model:
            return False
        prompt = torch.arange(16, device=self.device)[None] * (self.vocabulary // 16)
        logits = self.model(input_ids=prompt, use_cache=False).logits[0].float()
        product = self._logits(self.model.base_model(input_ids=prompt, use_cache=False).last_hidden_state[0])
        if product.shape != logits.shape:
            return False
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 2e-2
        return bool((product - logits).abs().max() <= tolerance * logits.abs().max())


def token_batches(spans: list[Span], max_tokens: int) -> list[list[Span]]:
    """Batches of spans of similar length, longest first; padded to its longest span, a batch has up to `max_tokens`.

    A longer span is a batch of its own. Spans of equal length keep their order.
    """
    batches: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: span.begin - span.end):
        if batches and (len(batches[-1]) + 1) * (batches[-1][0].end - batches[-1][0].begin) <= max_tokens:
            batches[-1].append(span)
        else:
            batches.append([span])
    return batches


def _reduce(logits: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL (N,) float32 in nats from logits (N, V) float32 and targets (N,), and whether no token is more likely."""
    wanted = logits.gather(1, target[:, None])[:, 0]
    blocks = logits.split(CACHED_ROWS) if logits.device.type == "cpu" else (logits,)
    total = torch.cat([block.logsumexp(-1) for block in blocks])
    top = torch.cat([block.amax(-1) for block in blocks])
    return total - wanted, wanted >= top


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and advice of `transformers`."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
