"""Cache layers that hold fewer keys than the sequence has tokens.

Outside, a cache speaks of the *logical* length: ``get_seq_length()`` is what it would be without merging, so
``generate``, RoPE and multi-turn continuation stay right. Inside, each layer holds its own *physical* number of
keys, with padding where the samples of a batch kept different numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticLayer

from illava_hooks.errors import PatchStateError
from illava_hooks.runtime.releases import CACHE

__all__ = ["MergedLayer", "cache_layer", "check_layers", "is_merged", "physical_lengths"]


_merged_classes: dict[type, type] = {}


class MergedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # by the base class
    """Mixin over a cache layer's own class.

    Attributes:
        num_merged: tokens of the sequence that have no key here.
        key_valid: ``(B, V)`` bool, which of the first ``V`` keys are real; None for all. Later keys are real.
        history: for each prefill that merged, the numbers of real tokens per sample; layers with equal history
            have equal ``key_valid``.
        croppable: how many of the last keys may be cropped, all of them text.
        shared: one dict for all layers of a cache; its ``"merged"`` tells whether some of them merged.
    """

    num_merged: int
    key_valid: Tensor | None
    history: tuple[tuple[int, ...], ...]
    croppable: int
    shared: dict[str, bool]
    _pending: int

    def begin(self) -> None:
        """Starts the bookkeeping on a layer that has not merged yet."""
        self.num_merged, self.key_valid, self.history, self.croppable, self._pending = 0, None, (), 0, 0
        self.shared["merged"] = False

    def admit(
        self, past: int, kept: int, lengths: tuple[int, ...], logical: int, valid: Tensor | None, tail: int
    ) -> None:
        """Announces ``kept`` new keys that stand for ``logical`` tokens.

        Args:
            past: physical keys before.
            kept: physical keys to come.
            lengths: real tokens among them, per sample.
            logical: tokens that they stand for.
            valid: ``(B, kept)`` bool or None.
            tail: trailing keys that are text.
        """
        self.num_merged += logical - kept
        self.shared["merged"] |= logical != kept
        self.history = (*self.history, lengths)
        self.croppable, self._pending = tail, kept
        self.extend_validity(past, valid)

    def extend_validity(self, past: int, valid: Tensor | None) -> None:
        """Appends the validity of new keys behind ``past`` old ones; None means all real."""
        if valid is None:
            return
        self.key_valid = torch.cat([self.validity(past, valid.shape[0], valid.device), valid], dim=1)

    def validity(self, length: int, batch_size: int, device: torch.device) -> Tensor:
        """``(B, length)`` bool of the first ``length`` keys."""
        known = (
            torch.ones(batch_size, 0, dtype=torch.bool, device=device) if self.key_valid is None else self.key_valid
        )
        known = known[:, :length].to(device)
        return torch.nn.functional.pad(known, (0, length - known.shape[1]), value=True)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Stores new keys; text that follows a merge may be cropped again."""
        if self._pending:
            self._pending = 0
        else:
            self.croppable += key_states.shape[-2]
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[safe-super]

    def get_seq_length(self) -> Any:
        """The logical length."""
        length = super().get_seq_length()  # type: ignore[safe-super]  # the stock layer comes next in line
        # A layer without keys has not begun: announced merges do not count yet.
        return length + self.num_merged if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The length of the buffer, or of the keys with ``query_length`` new ones; and offset 0.

        Raises:
            PatchStateError: a growing layer with merged tokens was asked; patched models never do.
        """
        if isinstance(self, StaticLayer):
            return self.max_cache_len, 0
        if self.shared["merged"] or self.key_valid is not None:
            raise PatchStateError(
                f"{CACHE} holds merged tokens, which only a patched model can continue; patch this model, or "
                "start from a new cache"
            )
        return super().get_seq_length() + query_length, 0  # type: ignore[safe-super]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last tokens, as far as they are text."""
        if abs(tokens_to_remove) > self.croppable:
            raise PatchStateError(
                f"cannot crop {abs(tokens_to_remove)} tokens: only the last {self.croppable} came after merged visual "
                "tokens; start from a new cache"
            )
        super().crop(tokens_to_remove)  # type: ignore[misc]  # a method of the stock layers, not of their base
        self.croppable -= abs(tokens_to_remove)
        if self.key_valid is not None:
            self.key_valid = self.key_valid[:, : self.get_seq_length() - self.num_merged]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles and copies by the stock class: this one is made at run time."""
        return _restore, (type(self).__mro__[2], dict(self.__dict__))

    def reset(self) -> None:
        """Forgets everything, merges too."""
        super().reset()
        self.begin()

    def reorder_cache(self, beam_idx: Any) -> None:
        """Reorders the samples for beam search."""
        super().reorder_cache(beam_idx)
        if self.key_valid is not None:
            self.key_valid = self.key_valid.index_select(0, beam_idx.to(self.key_valid.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each sample."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        if self.key_valid is not None:
            self.key_valid = self.key_valid.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps some samples."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        if self.key_valid is not None:
            self.key_valid = self.key_valid[indices]


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
    was = merged.shared.get("merged", False)
    merged.begin()
    merged.shared["merged"] = was
    return merged


def is_merged(cache: Any) -> bool:
    """Whether some layer of the cache holds fewer keys than tokens, or padding of our own."""
    return any(isinstance(layer, MergedLayer) for layer in getattr(cache, "layers", ()))


def physical_lengths(cache: Cache | None, num_layers: int) -> list[int]:
    """Keys that each layer holds; one transfer to the host at most (static caches count on the device)."""
    lengths: list[Any] = [0] * num_layers
    layers: Any = () if cache is None else cache.layers[:num_layers]
    for index, layer in enumerate(layers):
        if getattr(layer, "is_initialized", False):
            lengths[index] = layer.get_seq_length() - getattr(layer, "num_merged", 0)
    on_device = [n for n in lengths if isinstance(n, Tensor)]
    if on_device:
        known = iter(torch.stack([n.reshape(()) for n in on_device]).tolist())
        lengths = [next(known) if isinstance(n, Tensor) else n for n in lengths]
    return lengths
