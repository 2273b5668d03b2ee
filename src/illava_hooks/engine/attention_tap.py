"""Hearing queries and keys where an attention layer calls its back-end.

Stock attention layers look their back-end up by ``self.config._attn_implementation`` and call it with queries and
keys as the layer made them: with its own norms, gates, biases, adapters and rotary embedding, and with the keys of
the cache. A tapped layer has a ``TappedConfig``, which names this module's back-end while an ``AttentionTap`` is
open in the same thread or task, and stock's otherwise. So a score is taken from what the layer really uses, whatever
its projections look like, and nothing runs in calls that are not tapped.

Shapes: ``S`` segments, ``H`` query heads, ``G`` key heads, ``N`` tokens, ``D`` head width, ``P`` tokens of all
segments.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextvars import ContextVar, Token
from threading import Lock
from typing import Any, Protocol
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from illava_hooks.engine.regions import ATTENTION, region
from illava_hooks.errors import PatchStateError
from illava_hooks.merge.attention import SizeBias, as_mask, attend_and_receive, attend_with_lse
from illava_hooks.merge.kernels.devices import takes
from illava_hooks.merge.scores import Score, received_attention
from illava_hooks.merge.segments import Segments, host_table

__all__ = [
    "Attention",
    "AttentionTap",
    "EncoderTap",
    "Listener",
    "TappedConfig",
    "close_tap",
    "current_tap",
    "open_tap",
]

#: In front of the name of a stock back-end; what is behind it stays readable for those who look for "flash".
PREFIX = "illava|"

#: Weak: only the call itself keeps its tap, since PyTorch runs no hook after Ctrl-C that could close it.
_open: ContextVar[ReferenceType[AttentionTap] | None] = ContextVar("illava_tap", default=None)

#: Scores are made in float32: tables of these types lose nothing.
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

Attention = Callable[..., tuple[Tensor, Tensor | None]]


class Listener(Protocol):
    """Stands between an attention layer and its back-end."""

    def attend(
        self, attention: Attention, module: nn.Module, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Calls ``attention(module, query, key, value, mask, ...)``, or something that gives the same."""
        ...


class TappedConfig:
    """An attention layer's configuration, whose back-end can be listened to."""

    def __init__(self, stock: Any) -> None:
        """Stands in front of ``stock``."""
        self.stock = stock

    def __getattr__(self, name: str) -> Any:
        """Everything else as in stock's, also what changes there later."""
        if name == "stock" or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)  # copies and pickles ask before anything is there
        return getattr(self.stock, name)

    @property
    def _attn_implementation(self) -> str:
        stock: str = self.stock._attn_implementation
        tap = current_tap()
        return stock if tap is None else tap.name_of(stock)

    @staticmethod
    def stock_of_copy(config: TappedConfig) -> Any:
        """What stood here before: for those who take copies of a patched module back."""
        return config.stock


class AttentionTap:
    """Open while one attention layer runs."""

    def __init__(self, listener: Listener) -> None:
        """Hands the layer's call to ``listener``."""
        self.listener, self.calls = listener, 0
        self._names: set[str] = set()
        self._token: Token[ReferenceType[AttentionTap] | None] | None = None

    def __enter__(self) -> AttentionTap:
        """Opens it for this thread or task."""
        self._token = _open.set(ref(self))
        return self

    def __exit__(self, *error: Any) -> None:
        """Closes it; a layer that never called a back-end was not heard.

        Raises:
            PatchStateError: the layer has an attention of its own making.
        """
        if self._token is not None:
            _open.reset(self._token)
        self.close()
        if not self.calls and (not error or error[0] is None):
            raise PatchStateError(
                "an attention layer did not call transformers' attention interface, so its tokens cannot be ranked; "
                "unpatch the model, or use layers whose attention is stock"
            )

    def name_of(self, stock: str) -> str:
        """The name under which transformers finds the listening back-end, as long as some tap is open that asked."""
        name = PREFIX + stock
        with _lock:
            if name not in self._names:
                self._names.add(name)
                _users[name] += 1
                AttentionInterface.register(name, _Tapped(stock))
        return name

    def __del__(self) -> None:
        """Nobody closed it: an error came in between that no hook was told of."""
        self.close()

    def close(self) -> None:
        """Takes the names out of transformers' registry that nobody else uses now: nothing of ours stays there."""
        with _lock:
            for name in self._names:
                _users[name] -= 1
                if not _users[name]:
                    AttentionInterface._global_mapping.pop(name, None)
            self._names.clear()


_lock = Lock()
#: How many open taps use each registered name.
_users: Counter[str] = Counter()


def current_tap() -> AttentionTap | None:
    """The tap that is open in this thread or task."""
    tap = _open.get()
    return None if tap is None else tap()


def open_tap(tap: AttentionTap) -> None:
    """Opens a tap for what runs next in this thread or task, until ``close_tap``: hooks have no ``with``."""
    _open.set(ref(tap))


def close_tap() -> None:
    """Closes the tap that is open in this thread or task, if any."""
    if _open.get() is not None:  # a compiled decode step reads the variable, but could not trace that it is set
        _forget()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _forget() -> None:
    if (tap := current_tap()) is not None:
        tap.close()
    _open.set(None)


class _Tapped:
    """A back-end in the registry of transformers: hands the call to the open tap."""

    def __init__(self, stock: str) -> None:
        self.stock = stock

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # scores look at tensors in ways that break graphs
    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        tap, attention = current_tap(), stock_attention(module, self.stock)
        # Flash attention reads the back-end's name from the configuration again: it must find stock's.
        token = _open.set(None)
        try:
            if tap is None:
                return attention(module, *args, **kwargs)
            tap.calls += 1
            return tap.listener.attend(attention, module, *args, **kwargs)
        finally:
            _open.reset(token)


def stock_attention(module: nn.Module, name: str) -> Attention:
    """The back-end that a stock layer would find under a name.

    Raises:
        PatchStateError: the module that defines the layer has no eager attention.
    """
    if name != "eager":
        found: Attention = ALL_ATTENTION_FUNCTIONS[name.removeprefix("paged|") if name != "paged|eager" else name]
        return found
    for kind in type(module).__mro__:
        eager: Attention | None = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if eager is not None:
            return eager
    raise PatchStateError(f"{type(module).__name__} has no eager attention; use model.set_attn_implementation('sdpa')")


class EncoderTap:
    """Listens to the attention of an encoder layer: for queries and keys, and for what scores are made of.

    Attributes:
        sizes: what is added to the logits of each key, or None. Every back-end can be weighed: one that takes no
            bias gives way to SDPA in this layer.
        received: for each call that the blocked attention answered, ``(S, N)`` float32 received attention.
        scale: factor of the attention logits, as the layer gave it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        ranks: bool,
        score: Score | None = None,
        sizes: SizeBias | None = None,
    ) -> None:
        """Listens to a layer.

        Args:
            lengths: tokens of each segment, in order.
            ranks: whether queries and keys are asked for afterwards; else they are not kept alive.
            score: one of ``ATTENTION_SCORES`` that shall fall out of the attention itself, where it can; else None.
            sizes: as the attribute.
        """
        self.lengths, self.ranks, self.score, self.sizes = lengths, ranks, score, sizes
        self.received: list[Tensor] = []
        self.scale = 1.0
        self._heard: list[tuple[Tensor, Tensor]] = []
        self._lse: list[Tensor] = []
        self._seen = self._segment = 0

    @property
    def bias(self) -> Tensor | None:
        """``(P,)``, as the attention added it: in half precision rounded."""
        return None if self.sizes is None else self.sizes.flat(self._heard[0][1])

    def row_lse(self) -> Tensor | None:
        """``(H, P)`` float32 of all tokens; None: some call was answered by an attention that gives none."""
        if not self._lse or sum(table.shape[1] for table in self._lse) != sum(self.lengths):
            return None  # who only hears what another engine attends with knows no lengths
        lse = self._lse[0] if len(self._lse) == 1 else torch.cat(self._lse, 1)
        return lse.contiguous()

    def heads(self) -> tuple[Tensor, Tensor]:
        """Queries ``(P, H, D)`` and keys ``(P, G, D)`` of all tokens, rotated."""
        if len(self._heard) > 1:  # scores ask, and rules by similarity again
            queries, keys = zip(*self._heard, strict=True)
            self._heard = [(_joined(queries), _joined(keys))]
        (query, key), *_ = self._heard
        return query.transpose(1, 2).flatten(0, 1), key.transpose(1, 2).flatten(0, 1)

    def keys(self) -> Tensor:
        """``(P, G, D)`` keys of all tokens, for rules that compare them."""
        return self.heads()[1]

    def hear(self, query: Tensor, key: Tensor, scale: float) -> None:
        """Takes down one call of the attention.

        Args:
            query: ``(s, H, n, D)``, rotated.
            key: ``(s, G, n, D)``.
            scale: factor of the logits.
        """
        self.scale = scale
        if self.ranks:
            self._heard.append((query.detach(), key.detach()))

    def attend(
        self,
        attention: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``Listener``; calls come in the order of the segments."""
        self.hear(query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
        plain = attention is sdpa_attention_forward and _is_plain(module, query, key, value, attention_mask, **kwargs)
        bias = None if self.sizes is None else self._bias(self.sizes, key)
        # In training the first pass of a reentrant checkpoint has no gradients, and must compute what its replay will.
        if self.score is not None and plain and not module.training:
            mixed = self._attend_for(self.score, query, key, value, bias)
            if mixed is not None:
                return mixed.transpose(1, 2).contiguous(), None
        if bias is None:
            return attention(module, query, key, value, attention_mask, **kwargs)
        borders = kwargs.get("cu_seq_lens_q")
        if borders is not None and len(borders) == len(self.lengths) + 1:
            return self._by_segments(module, query, key, value, bias), None
        if borders is not None:
            return self._by_windows(module, query, key, value, bias, borders, int(kwargs["max_length_q"])), None
        takes_bias = (
            attention is sdpa_attention_forward or getattr(attention, "__name__", "") == "eager_attention_forward"
        )
        attention = attention if takes_bias else sdpa_attention_forward
        weighed = as_mask(bias)
        mask = weighed
        if attention_mask is not None:
            shut = attention_mask.dtype == torch.bool
            mask = (
                weighed.masked_fill(~attention_mask, torch.finfo(weighed.dtype).min)
                if shut
                else attention_mask + weighed
            )
        return attention(module, query, key, value, mask, **kwargs)

    def _attend_for(
        self, score: Score, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """SDPA's output ``(S, H, N, D)``; what the score is made of is left here. None: SDPA keeps that to itself."""
        if score is received_attention and not takes(query.device):
            with region(ATTENTION, query, key, value, self.scale):
                mixed, received = attend_and_receive(query, key, value, self.scale, bias)
            self.received.append(received)
            return mixed
        found = attend_with_lse(query, key, value, self.scale, bias)
        if found is None:
            return None
        mixed, lse = found
        self._lse.append(lse.transpose(0, 1).flatten(1))
        return mixed

    def _bias(self, sizes: SizeBias, key: Tensor) -> Tensor:
        """``(S, N)``: the next tokens' logarithms of sizes, in the type of the keys."""
        calls, num = len(key), key.shape[2]
        first, self._seen = self._seen, self._seen + calls * num
        segment, self._segment = self._segment, self._segment + calls
        if list(self.lengths[segment : self._segment]) == [num] * calls:
            return sizes.rows(key)[segment : self._segment, :num]
        bias = sizes.flat(key)[first : self._seen].view(calls, num)
        # A mask of such a length is taken as it lies, and kernels want it to begin at a word: `SizeBias.rows`.
        return bias.clone() if first % 16 and not num % 16 else bias

    def _by_segments(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        """``(1, P, H, D)``: SDPA of all segments in one call, for rows that a flash back-end would cut by lengths."""
        segments = Segments.packed(self.lengths, query.device)
        query, key, value = (segments.take(table[0].transpose(0, 1)).transpose(1, 2) for table in (query, key, value))
        mask = segments.take(bias[0])
        if segments.valid is not None:
            mask = mask.masked_fill(~segments.valid, -torch.inf)
        mixed, _ = sdpa_attention_forward(
            module, query, key, value, mask[:, None, None], scaling=self.scale, is_causal=False
        )
        longest = mixed.shape[1]
        places = [segment * longest + i for segment, length in enumerate(self.lengths) for i in range(length)]
        return mixed.flatten(0, 1)[host_table(places, query.device)][None]

    def _by_windows(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, borders: Tensor, longest: int
    ) -> Tensor:
        """The same for windows, whose borders only the device knows; one may be empty, none exceeds ``longest``."""
        first, size = borders[:-1].long(), borders.diff()
        column = torch.arange(longest, device=query.device)
        valid = column < size[:, None]
        rows = torch.where(valid, first[:, None] + column, 0)
        query, key, value = (table[0].transpose(0, 1)[rows].transpose(1, 2) for table in (query, key, value))
        # An empty window has no key at all: infinity would make its rows, which nobody reads, spoil gradients.
        mask = bias[0][rows].masked_fill(~valid, torch.finfo(query.dtype).min)
        mixed, _ = sdpa_attention_forward(
            module, query, key, value, mask[:, None, None], scaling=self.scale, is_causal=False
        )
        place = torch.arange(bias.shape[1], device=query.device)
        window = torch.searchsorted(borders.long(), place, right=True) - 1
        return mixed[window, place - first[window]][None]


def _joined(tables: Sequence[Tensor]) -> Tensor:
    """``(s, H, n, D)`` of some segments after the other as one row, ``(1, H, P, D)``."""
    return torch.cat([table.transpose(1, 2).flatten(0, 1) for table in tables]).transpose(0, 1)[None]


def _is_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> bool:
    """Whether a call of SDPA is attention of all tokens to all that nobody will derive."""
    tables = (query, key, value)
    return (
        attention_mask is None
        and all(kwargs.get(name) is None for name in ("position_bias", "softcap"))
        and not dropout
        and not (getattr(module, "is_causal", True) if is_causal is None else is_causal)
        and all(table.shape == query.shape and table.dtype == query.dtype for table in tables)
        and query.dtype in _TYPES
        and not (torch.is_grad_enabled() and any(table.requires_grad for table in tables))
    )
