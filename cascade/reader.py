"""A model that reads several texts, each at its own pace, and caches what it has read.

Keys and values of a text are in a slot of its own, at the positions of its tokens. So a text can be continued,
shortened (when tokens change after a join) or replaced by another without affecting its neighbours, and any set of
slots can be read together. What is in a slot beyond its text is never attended to.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from lacy.cascade.language_model import Model
from lacy.schemas.errors import CascadeError

GROW = 128  # positions by which slots grow, at least
PADDING = 4  # positions of padding that cost less than another forward pass


class Reader:
    """`slots` texts and the model's cache of them; without `remember` it reads everything again each time.

    Raises CascadeError for a model whose cache is not a list of keys and values.
    """

    def __init__(self, model: Model, slots: int, *, remember: bool = True):
        self.model = model
        self._config = model.network.config.get_text_config()
        self._remember = remember
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._call = _Call()
        kinds = set(getattr(self._config, "layer_types", None) or ["full_attention"])
        if getattr(model.network, "_is_stateful", False) or not kinds <= {"full_attention", "sliding_attention"}:
            raise CascadeError(f"{model.folder} has layers without keys and values: run it in vLLM or on a server")
        self._cache = Cache(layers=[_Layer(self._call, slots) for _ in range(self._config.num_hidden_layers)])

    def read(self, slots: Sequence[int], texts: Sequence[list[int]], last: int = 1) -> torch.Tensor:
        """Logits (len(slots), last, V) float32 at the last tokens of texts, given whole, as ids with their begin.

        What a slot has already read of its text is not read again. For shorter texts, the first of `last` are NaN.
        """
        known = [self._known(slot, ids, last) for slot, ids in zip(slots, texts, strict=True)]
        new = [len(ids) - start for ids, start in zip(texts, known, strict=True)]
        rows: dict[int, torch.Tensor] = {}
        for group in _alike(new):
            logits = self._forward(
                [slots[i] for i in group], [texts[i] for i in group], [known[i] for i in group], last
            )
            rows |= zip(group, logits, strict=True)
        return torch.stack([rows[i] for i in range(len(slots))])

    @torch.inference_mode()
    def _forward(self, slots: list[int], texts: list[list[int]], known: list[int], last: int) -> torch.Tensor:
        """As `read`, in one pass; the first `known` tokens of each text are in its slot."""
        most = max(len(ids) - start for ids, start in zip(texts, known, strict=True))
        device = self.model.device
        pad = torch.tensor([most - (len(ids) - start) for ids, start in zip(texts, known, strict=True)])
        block = [[0] * n + ids[start:] for n, ids, start in zip(pad.tolist(), texts, known, strict=True)]
        target = torch.arange(most) + (torch.tensor(known) - pad)[:, None]  # (b, Q)
        target = target.where(torch.arange(most) >= pad[:, None], -1).to(device)
        self._call.slots = torch.tensor(slots, device=device)
        self._call.every = slots == list(range(len(self._ids)))
        self._call.positions, self._call.length = target, max(map(len, texts))
        position = target.clamp(min=0)
        for slot in slots:
            self._ids[slot] = []  # in case this fails
        out = self.model.network(
            input_ids=torch.tensor(block, device=device),
            attention_mask=self._mask(position, self._call.length),
            position_ids=position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=min(last, most),
        )
        for slot, ids in zip(slots, texts, strict=True):
            self._ids[slot] = list(ids) if self._remember else []
        logits = out.logits.float()
        blank = torch.arange(most - logits.shape[1], most) < pad[:, None]
        logits = logits.masked_fill(blank.to(device)[..., None], torch.nan)
        missing = logits.new_full((len(slots), last - logits.shape[1], logits.shape[2]), torch.nan)
        return torch.cat([missing, logits], dim=1)

    def _known(self, slot: int, ids: list[int], last: int) -> int:
        """The number of first tokens that need not be read; at least the last one must be, for its logits."""
        before = self._ids[slot]
        most = min(len(before), len(ids) - last if last == 1 else 0)
        if before[:most] == ids[:most]:
            return most
        return next(i for i in range(most) if before[i] != ids[i])

    def _mask(self, position: torch.Tensor, length: int) -> Any:
        """What each position may attend to: (b, 1, Q, length) bool; a dict by kind of layer if there are several."""
        key = torch.arange(length, device=position.device)
        full = key <= position[..., None]
        window = getattr(self._config, "sliding_window", None)
        kinds = getattr(self._config, "layer_types", None)
        near = full & (key > position[..., None] - window) if window else full
        if kinds:
            masks = {"full_attention": full[:, None], "sliding_attention": near[:, None]}
            return masks if "sliding_attention" in kinds else masks["full_attention"]
        return near[:, None]


class _Call:
    """What the layers need to know of the current forward pass."""

    slots: torch.Tensor  # (b,)
    every: bool  # whether these are all slots, in order
    positions: torch.Tensor  # (b, Q), -1 for padding
    length: int  # of the longest text


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, positions + 1, width); padding goes to the last position."""

    is_sliding = False

    def __init__(self, call: _Call, slots: int):
        super().__init__()
        self._call, self._slots = call, slots

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_zeros(self._slots, key_states.shape[1], 1, key_states.shape[-1])
        self.values = value_states.new_zeros(self._slots, value_states.shape[1], 1, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None, "initialized"
        call = self._call
        self.keys, self.values = _grown(self.keys, call.length), _grown(self.values, call.length)
        rows = call.slots[:, None]
        self.keys[rows, :, call.positions] = key_states.transpose(1, 2)
        self.values[rows, :, call.positions] = value_states.transpose(1, 2)
        if call.every:
            return self.keys[:, :, : call.length], self.values[:, :, : call.length]
        return self.keys[call.slots, :, : call.length], self.values[call.slots, :, : call.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._call.length, 0

    def get_seq_length(self) -> int:
        return self._call.length - self._call.positions.shape[1]

    def get_max_length(self) -> int:
        return -1


def _alike(new: list[int]) -> Iterator[list[int]]:
    """Indices of texts with about as much to read, so that little of a pass is padding."""
    group: list[int] = []
    for index in sorted(range(len(new)), key=new.__getitem__):
        if group and new[index] > 2 * new[group[0]] + PADDING:
            yield group
            group = []
        group.append(index)
    yield group


def _grown(memory: torch.Tensor, length: int) -> torch.Tensor:
    """The memory with room for `length` positions, and one for padding."""
    have = memory.shape[2] - 1
    if have >= length:
        return memory
    more = max(length, have + have // 2, have + GROW) - have
    return torch.cat([memory, memory.new_zeros(*memory.shape[:2], more, memory.shape[3])], dim=2)
