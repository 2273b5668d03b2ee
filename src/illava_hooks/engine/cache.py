"""Cache layers that hold fewer keys than the sequence has tokens, and the masks that fit them.

Outside, a cache speaks of the *logical* length: ``get_seq_length()`` is what it would be without merging, so
``generate``, RoPE and multi-turn continuation stay right. Inside, each layer holds its own *physical* number of
keys. A ledger knows the logical column of each of them, so that what a call's attention mask says of the sequence
can be read for the keys, each time anew.

Shapes: ``B`` samples, ``V`` keys that a ledger knows, ``L`` columns of a mask over logical tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer
from transformers.masking_utils import create_causal_mask

from illava_hooks.engine.compat import CACHE
from illava_hooks.errors import PatchStateError

__all__ = [
    "Ledger",
    "MergedLayer",
    "Past",
    "cache_layer",
    "check_layers",
    "key_length",
    "layer_mask",
    "logical_mask",
    "past_of",
    "read_mask",
    "real_tokens",
    "touches",
]


@dataclass(frozen=True, slots=True)
class Ledger:
    """What the keys of one layer stand for.

    Attributes:
        num_merged: tokens of the sequence that have no key here.
        columns: ``(B, V)`` int64, the logical column of each of the first ``V`` keys, -1 for padding of our own. Later
            keys stand for a token each: key ``i`` for column ``i + num_merged``. None: nothing merged, no padding.
        valid: ``(B, V')`` bool, which of the first ``V'`` keys the mask that was read last calls real; None: all.
        history: for each prefill that merged, the numbers of real tokens per sample; layers with equal history and
            past have equal masks.
        knows_mask: whether the ``generate`` that runs has shown its mask: later ones of it only grow by real tokens.
    """

    num_merged: int = 0
    columns: Tensor | None = None
    valid: Tensor | None = None
    history: tuple[tuple[int, ...], ...] = ()
    knows_mask: bool = False

    def known_columns(self, length: int, batch_size: int, device: torch.device) -> Tensor:
        """``(B, length)`` int64, the logical column of each of the first ``length`` keys."""
        columns = self.columns
        if columns is None:
            columns = torch.empty(batch_size, 0, dtype=torch.int64, device=device)
        behind = torch.arange(columns.shape[1], length, device=device) + self.num_merged
        return torch.cat([columns.to(device), behind.expand(batch_size, -1)], 1)[:, :length]

    def read(self, mask: Tensor, length: int) -> Tensor:
        """``(B, length)`` bool: which keys a mask over logical tokens, ``(B, L)`` bool, calls real.

        As in stock, what a mask does not reach is padding.
        """
        columns = self.known_columns(length, mask.shape[0], mask.device)
        inside = (columns >= 0) & (columns < mask.shape[1])
        return mask.gather(1, columns.clamp(0, mask.shape[1] - 1)) & inside

    def validity(self, length: int, device: torch.device) -> Tensor | None:
        """``(B, length)`` bool as it was read last; later keys are real. None: all real."""
        if self.valid is None:
            return None
        valid = self.valid.to(device)[:, :length]
        return torch.nn.functional.pad(valid, (0, length - valid.shape[1]), value=True)

    def with_prefill(
        self, past: int, columns: Tensor, lengths: tuple[int, ...], num_logical: int, valid: Tensor | None
    ) -> Ledger:
        """The ledger behind a prefill that merged.

        Args:
            past: keys before it.
            columns: ``(B, kept)`` int64, the logical column of each new key; -1 for padding of our own.
            lengths: real tokens among them, per sample.
            num_logical: tokens of the call that they stand for.
            valid: ``(B, past + kept)`` bool, which keys are real; None: all.
        """
        before = [self.known_columns(past, len(columns), columns.device)] if past else []
        return Ledger(
            num_merged=self.num_merged + num_logical - columns.shape[1],
            columns=torch.cat([*before, columns], 1) if past else columns,
            valid=valid,
            history=(*self.history, lengths),
            knows_mask=True,
        )

    def rows(self, index: Tensor) -> Ledger:
        """The ledger of some samples, also repeated or reordered."""
        columns = None if self.columns is None else self.columns[index.to(self.columns.device)]
        valid = None if self.valid is None else self.valid[index.to(self.valid.device)]
        return replace(self, columns=columns, valid=valid)

    def cropped(self, length: int) -> Ledger:
        """The ledger after the last keys were removed: ``length`` are left."""
        return replace(
            self,
            columns=None if self.columns is None else self.columns[:, :length],
            valid=None if self.valid is None else self.valid[:, :length],
        )


_merged_classes: dict[type, type] = {}


class MergedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # by the base class
    """Mixin over a cache layer's own class.

    Attributes:
        ledger: what the keys stand for; layers of equal history share one.
        text_begins: the number of keys behind which all are text that may be cropped; of a static layer that has not
            merged a tensor.
        shared: one dict for all layers of a cache; its ``"differs"`` tells whether some of them merged, so that the
            masks of stock, which asks one layer, are wrong for others.
    """

    ledger: Ledger
    text_begins: Any
    shared: dict[str, bool]

    def start(self) -> None:
        """Opens the ledger of a layer that has not merged yet."""
        self.ledger, self.text_begins = Ledger(), self.num_keys() + 0
        self.shared["differs"] = False

    @property
    def trailing_text(self) -> int:
        """How many of the last keys may be cropped, all of them text; asks the device where it counts them."""
        return max(0, int(self.num_keys() - self.text_begins))

    def announce(self, ledger: Ledger, num_keys: int, trailing_text: int, *, differs: bool) -> None:
        """Says what the next keys will stand for.

        Args:
            ledger: what this layer's keys stand for once they are here (``Ledger.with_prefill``).
            num_keys: how many there will be then.
            trailing_text: trailing keys that are text.
            differs: whether some keys stand elsewhere than in the logical sequence, seen from the right, or for more
                than one token.
        """
        self.ledger, self.text_begins = ledger, num_keys - trailing_text
        if differs:
            self.shared["differs"] = True

    def forget_mask(self) -> None:
        """Another ``generate`` begins, whose mask is not known yet."""
        self.ledger = replace(self.ledger, knows_mask=False)

    def num_keys(self) -> Any:
        """The physical length: keys that are held; of a static layer a tensor."""
        # The stock layer comes next in line. One without keys has not begun: announced merges do not count yet.
        return super().get_seq_length() if self.is_initialized else 0  # type: ignore[safe-super]

    def get_seq_length(self) -> Any:
        """The logical length: that of the sequence."""
        return self.num_keys() + self.ledger.num_merged if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length of the buffer, or of the keys with ``query_length`` new ones; and offset 0.

        Raises:
            PatchStateError: a growing layer with merged tokens was asked; patched models never do.
        """
        if isinstance(self, StaticLayer):
            return self.max_cache_len, 0
        if self.shared["differs"]:
            raise PatchStateError(
                f"{CACHE} holds merged tokens, which only a patched model can continue; patch this model, or "
                "start from a new cache"
            )
        return self.num_keys() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, as far as they are text."""
        removed = abs(tokens_to_remove)
        if removed > self.trailing_text:
            raise PatchStateError(
                f"cannot crop {removed} tokens: only the last {self.trailing_text} came after merged visual "
                "tokens; start from a new cache"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]  # a method of the stock layers, not of their base
        self.ledger = self.ledger.cropped(self.num_keys())

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies by the stock class: this one is made at run time."""
        return _restore, (type(self).__mro__[2], dict(self.__dict__))

    def reset(self) -> None:
        """Forgets everything, merges too."""
        super().reset()
        self.start()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorders the samples for beam search."""
        super().reorder_cache(beam_idx)
        self.ledger = self.ledger.rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample, for beams and return sequences."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if (known := self.ledger.columns) is not None:
            self.ledger = self.ledger.rows(torch.arange(len(known), device=known.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some samples, also repeatedly."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.ledger = self.ledger.rows(indices)


def _merged_class(stock: type) -> type:
    """A subclass of a cache layer's class; ``_layer_type`` None keeps it out of transformers' registries."""
    if stock not in _merged_classes:  # torch.compile warns of functools.cache
        parts = {"_layer_type": None, "__module__": __name__}
        _merged_classes[stock] = type(f"Merged{stock.__name__}", (MergedLayer, stock), parts)
    return _merged_classes[stock]


def _restore(stock: type, state: dict[str, Any]) -> MergedLayer:
    layer: MergedLayer = object.__new__(_merged_class(stock))
    layer.__dict__.update(state)
    return layer


def check_layers(cache: Cache | None) -> None:
    """Refuses a cache that cannot hold merged tokens, before anything is stored in it.

    Raises:
        PatchStateError: a layer keeps a sliding window.
    """
    for layer_idx, layer in enumerate(cache.layers if cache is not None else ()):
        if getattr(layer, "is_sliding", False):
            raise PatchStateError(
                f"{CACHE} has a {type(layer).__name__} at layer {layer_idx}; merging needs full-attention "
                "caches; use DynamicCache or StaticCache"
            )


def cache_layer(cache: Cache, layer_idx: int) -> MergedLayer:
    """The cache's layer, turned into one that can hold merged tokens."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[layer_idx]
    if isinstance(layer, MergedLayer):
        return layer
    layer.__class__ = _merged_class(type(layer))
    merged: MergedLayer = layer
    others = (other.shared for other in cache.layers if isinstance(other, MergedLayer) and other is not layer)
    merged.shared = next(others, {})
    differs = merged.shared.get("differs", False)
    merged.start()
    merged.shared["differs"] = differs
    return merged


def touches(cache: Any) -> bool:
    """Whether some layer of the cache holds fewer keys than tokens, or padding of our own."""
    return any(isinstance(layer, MergedLayer) and layer.shared["differs"] for layer in getattr(cache, "layers", ()))


@dataclass(frozen=True, slots=True)
class Past:
    """What a cache holds before a call.

    Attributes:
        keys: physical keys of each layer; 0 where a layer carries a state along.
        logical: tokens that they stand for.
    """

    keys: tuple[int, ...]
    logical: int


def past_of(cache: Cache | None, num_layers: int) -> Past:
    """What a cache holds; one transfer to the host at most (static caches count on the device)."""
    lengths: list[Any] = [0] * num_layers
    layers: Any = () if cache is None else cache.layers[:num_layers]
    for index, layer in enumerate(layers):
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized:
            lengths[index] = layer.num_keys() if isinstance(layer, MergedLayer) else layer.get_seq_length()
    on_device = [n for n in lengths if isinstance(n, Tensor)]
    if on_device:
        known = iter(torch.stack([n.reshape(()) for n in on_device]).tolist())
        lengths = [next(known) if isinstance(n, Tensor) else n for n in lengths]
    held = ((n, getattr(layer, "ledger", Ledger())) for n, layer in zip(lengths, layers, strict=False) if n)
    return Past(tuple(lengths), next((n + ledger.num_merged for n, ledger in held), 0))


# ---------------------------------------------------------------------- masks


@dataclass(frozen=True, slots=True)
class _PhysicalCache:
    """Answers the mask functions' questions about a cache with physical lengths.

    A real cache reports its logical length as query offset, which would let queries see the future.
    """

    past_length: int | Tensor
    key_length: int
    is_compileable: bool

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.past_length

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        return self.past_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.key_length, 0


def causal_mask(
    config: Any,
    embeds: Tensor,
    past_length: int | Tensor,
    key_length: int,
    valid: Tensor | None,
    compileable: bool = False,
) -> Any:
    """The mask of one stage for the model's attention back-end, by transformers' own functions.

    Args:
        config: the text model's config.
        embeds: ``(B, N, C)`` queries; read for batch size, length, dtype and device.
        past_length: keys before the queries, physical.
        key_length: keys in all, physical (the buffer's length for a static cache).
        valid: ``(B, key_length)`` bool, or None where the host knows that nothing is padded.
        compileable: whether the cache is static.
    """
    cache: dict[str, Any] = {CACHE: _PhysicalCache(past_length, key_length, compileable)}
    return create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=valid,
        # Gaps in positions would be read as packed sequences.
        position_ids=None,
        # With a mask the skip would look at its values, which synchronises with the host.
        allow_is_causal_skip=valid is None,
        **cache,
    )


def key_length(layer: Any, past: Any, num_new: int) -> Any:
    """How many keys a mask has: a static layer's whole buffer, or those held and the new ones."""
    return layer.max_cache_len if getattr(layer, "is_compileable", False) else past + num_new


def layer_mask(config: Any, queries: Tensor, layer: Any, past: int | Tensor, valid: Tensor | None) -> Any:
    """The mask of new queries behind what a cache layer holds.

    Args:
        config: the text model's config.
        queries: ``(B, N, C)``.
        layer: the cache layer, or None.
        past: its keys.
        valid: ``(B, past + N)`` bool (longer is cut, shorter is real), or None: all keys are real.
    """
    length = key_length(layer, past, queries.shape[1])
    if valid is not None:
        valid = torch.nn.functional.pad(valid[:, :length], (0, max(0, length - valid.shape[1])), value=True)
    return causal_mask(config, queries, past, length, valid, getattr(layer, "is_compileable", False))


def read_mask(layer: MergedLayer, mask: Tensor, past: int | Tensor, num_new: int, may_ask: bool) -> None:
    """Notes in a layer's ledger what a mask over logical tokens says of its keys, and of new ones behind them.

    Args:
        layer: the layer.
        mask: ``(B, L)`` bool.
        past: its keys.
        num_new: tokens to come.
        may_ask: whether the device may be asked for the mask's values: without padding, decoding is faster.
    """
    length = key_length(layer, past, num_new)
    valid = layer.ledger.read(mask, length)
    if isinstance(layer, StaticLayer):  # the mask hides what the buffer does not hold yet, but that is not padding
        valid = valid | (torch.arange(length, device=valid.device) >= past + num_new)
    padded = not (may_ask and bool(valid.all()))
    layer.ledger = replace(layer.ledger, valid=valid if padded else None, knows_mask=True)


def logical_mask(attention_mask: Any, prepared: bool) -> Tensor | None:
    """Which logical tokens are real, past ones included: ``(B, L)`` bool, or None for all.

    Args:
        attention_mask: what a text model accepts: None, a 2-D padding mask, a 4-D mask as ``generate`` prepares it for
            static caches, or a dict of those.
        prepared: whether a 4-D mask was made by ``generate`` (causal, plus padding) rather than by the user.

    Returns:
        As many columns as the mask has: longer masks are of buffers that are not full yet.

    Raises:
        PatchStateError: a mask from which padding cannot be told.
    """
    if isinstance(attention_mask, dict):
        if set(attention_mask) - {"linear_attention"} != {"full_attention"}:
            raise PatchStateError(
                f"attention_mask has the entries {sorted(attention_mask)}; merging supports full attention only; "
                "use merging(model, False) for this call"
            )
        attention_mask = attention_mask["full_attention"]
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask.bool()
    if prepared and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        last = attention_mask[:, 0, -1]  # the last query sees all that is real, of the sequence and of the buffer
        return last if last.dtype == torch.bool else last == 0
    shape = getattr(attention_mask, "shape", None)
    raise PatchStateError(
        f"attention_mask is a {type(attention_mask).__name__} of shape {tuple(shape) if shape else None}; merging "
        "needs a 2-D padding mask (batch, length) or none; use merging(model, False) for this call"
    )


def real_tokens(mask: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """``(B, N)`` bool, which of a call's new tokens are real; as in stock, what the mask does not reach is padding.

    Args:
        mask: over logical tokens, past ones included; None: all are real.
        past: logical tokens before the call.
        embeds: ``(B, N, C)`` of the new tokens.
    """
    batch, width = embeds.shape[:2]
    if mask is None:
        return torch.ones(batch, width, dtype=torch.bool, device=embeds.device)
    new = mask[:, past : past + width].to(embeds.device)
    return torch.nn.functional.pad(new, (0, width - new.shape[1]), value=False)
