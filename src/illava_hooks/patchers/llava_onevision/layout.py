"""Where LLaVA-OneVision's ViT tokens end in the prompt; learned by running the stock methods over indices.

Shapes: ``T`` tiles or frames of ``N`` tokens (``K`` survivors), ``P`` packed tokens of one image, ``C`` width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from illava_hooks.errors import MergeConfigError

__all__ = ["Folded", "Geometry", "compact_grid", "compact_pool", "fold_by_mass", "image_geometry", "require_square"]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What stock ``pack_image_features`` does to one image, as host tables.

    Attributes:
        source: ``(P,)`` int64, tile token shown by each packed token, -1 for a newline.
        packed: ``(T * N,)`` int64, the packed token that shows each tile token, -1 where it is cropped away.
        visible: ``(T, N)`` bool, tile tokens that reach the prompt at all.
        is_newline: ``(P,)`` bool.
        shrunk: whether the grid of tiles was interpolated (more tiles than the limit); then ``source`` and
            ``packed`` hold for the base tile only.
    """

    source: Tensor
    packed: Tensor
    visible: Tensor
    is_newline: Tensor
    shrunk: bool


def image_geometry(base: Any, num_tiles: int, num_tokens: int, image_size: Sequence[int], aspect: str) -> Geometry:
    """Runs the stock method over a tensor of indices, on the CPU.

    Args:
        base: the ``LlavaOnevisionModel``.
        num_tiles: tiles of the image, the base tile included.
        num_tokens: ``N``.
        image_size: height and width in pixels.
        aspect: ``vision_aspect_ratio``.
    """
    pack = type(base).pack_image_features
    # The gradient of the sum tells which tokens are looked at; the caller may be in inference mode.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        index = torch.arange(num_tiles * num_tokens, dtype=torch.float64).view(num_tiles, num_tokens, 1)
        traced = index.clone().requires_grad_()
        shown = pack(base, [traced], [list(image_size)], torch.tensor([-1.0]).double(), aspect)[0][0]
        (reach,) = torch.autograd.grad(shown.sum(), traced)
        values = shown.detach().flatten()
        newline = pack(base, [0 * index], [list(image_size)], torch.tensor([1.0]).double(), aspect)[0][0].flatten() > 0
        # Without its limit of tiles the stock method never interpolates.
        whole = pack(base, [index], [list(image_size)], torch.zeros(1).double(), "anyres_max_1000000")[0][0]
        shrunk = len(whole) != len(values)
        source = values.round().long()
        if shrunk:
            source[num_tokens:] = -1
        packed = torch.full((num_tiles * num_tokens,), -1)
        packed[source[source >= 0]] = (source >= 0).nonzero().flatten()
    return Geometry(source, packed, (reach != 0).squeeze(-1), newline, shrunk)


@dataclass(frozen=True, slots=True)
class Folded:
    """Interpolated tokens after as many were dropped as the encoder merged.

    Attributes:
        values: ``(F, n, C)``; a dropped token shows its holder.
        keep: ``(F, n)`` bool.
        holder: ``(F, n)`` int64.
        shares: ``(F, n)`` float32, the weight with which each token entered its holder.
    """

    values: Tensor
    keep: Tensor
    holder: Tensor
    shares: Tensor


def fold_by_mass(values: Tensor, mass: Tensor, num_kept: int, columns: int) -> Folded:
    """Keeps the tokens with the most survivors under them; the others go to their nearest kept neighbour.

    Args:
        values: ``(F, n, C)`` interpolated tokens of a grid, row-major.
        mass: ``(F, n)`` the same interpolation of the survivors' 0/1 mask.
        num_kept: tokens to keep per ``F``.
        columns: width of the grid.
    """
    frames, n = mass.shape
    order = torch.argsort(mass, dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :num_kept].sort(-1).values, order[:, num_kept:].sort(-1).values
    row_distance = (dropped // columns)[..., None] - (kept // columns)[:, None]
    column_distance = (dropped % columns)[..., None] - (kept % columns)[:, None]
    target = kept.gather(1, (row_distance**2 + column_distance**2).min(-1).indices)
    everywhere = torch.arange(n, device=mass.device).expand(frames, n)
    holder = everywhere.scatter(1, dropped, target)
    mass = mass.to(torch.promote_types(values.dtype, torch.float32))
    total = torch.zeros_like(mass).scatter_add(1, holder, mass)
    share = torch.where(total.gather(1, holder) > 0, mass / total.gather(1, holder), (holder == everywhere).to(mass))
    spread = holder[..., None].expand_as(values)
    folded = torch.zeros_like(values, dtype=mass.dtype).scatter_add(1, spread, values * share[..., None])
    return Folded(folded.gather(1, spread).to(values.dtype), holder == everywhere, holder, share.float())


def require_square(num_tokens: int) -> int:
    """The side of the square grid that ``num_tokens`` survivors of a tile form.

    Raises:
        MergeConfigError: they form none.
    """
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise MergeConfigError(
            f"layout 'compact' needs a square number of tokens per tile, vit_r leaves {num_tokens}; use layout "
            f"'aligned' or settings that leave {side * side}"
        )
    return side


def _smaller(base: Any, num_tokens: int) -> Any:
    """A stand-in for the model whose tiles are square grids of ``num_tokens``."""
    side = require_square(num_tokens)
    image_size = base.config.vision_config.image_size
    # The stock methods divide: only a fraction gives `side` exactly.
    vision = SimpleNamespace(image_size=image_size, patch_size=Fraction(image_size, side))
    return SimpleNamespace(
        config=SimpleNamespace(vision_config=vision, image_grid_pinpoints=base.config.image_grid_pinpoints)
    )


def compact_grid(
    base: Any, kept: Sequence[Tensor], image_sizes: Any, image_newline: Tensor | None, aspect: str | None = None
) -> list[Tensor]:
    """Packs survivors as the published code does: each tile a smaller square grid.

    Args:
        base: the ``LlavaOnevisionModel``.
        kept: per image ``(T, K, C)``, ``K`` a square number.
        image_sizes: per image height and width in pixels.
        image_newline: ``(C,)`` or None.
        aspect: ``vision_aspect_ratio``; None: the model's.

    Returns:
        Per image ``(P', C)``.
    """
    stand_in = _smaller(base, kept[0].shape[1])
    aspect = aspect or base.config.vision_aspect_ratio
    packed, _ = type(base).pack_image_features(stand_in, list(kept), image_sizes, image_newline, aspect)
    return list(packed)


def compact_pool(base: Any, kept: Tensor) -> Tensor:
    """Pools the survivors of video frames as the published code does: ``(T, K, C)`` to ``(T, K', C)``."""
    pooled: Tensor = type(base).apply_pooling(_smaller(base, kept.shape[1]), kept)
    return pooled
