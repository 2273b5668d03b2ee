"""What a forward did, from shapes alone: tokens, FLOPs and KV bytes, with and without merging.

The formulas are those of the ceiling: 2 FLOPs per multiply-add, causal attention at half cost. Encoder layer
with ``n_a`` tokens in attention and ``n_m`` in the MLP, class tokens too: ``8 n_a d^2 + 4 n_a^2 d + 2 m n_m d f``,
where the MLP has ``m`` matrices, two or three; where attention stays within windows, the sum of their squares is in
place of ``n_a^2``. Decoder layer: ``4 n d d_q + 4 n d d_kv + 2 n^2 d_q + 6 n d f``, and ``4 n p d_q`` behind ``p``
keys of a cache; ``d_q`` is ``d`` where heads have no width of their own. KV bytes: ``2 n d_kv`` values per layer.
A recurrent layer (``RecurrentShape``) has its own terms in place of the first three, whatever the cache holds, and no
keys; its state does not grow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "DecoderShape",
    "EncoderShape",
    "MergeReport",
    "RecurrentShape",
    "VisualReport",
    "encoder_flops",
    "kv_bytes",
    "llm_flops",
    "projector_flops",
    "window_flops",
]


@dataclass(frozen=True, slots=True)
class EncoderShape:
    """Width ``d`` and MLP width ``f`` of a vision encoder, its depth, patches per token unit, projector FLOPs.

    Attributes:
        depth: its layers.
        width: ``d``.
        mlp_width: ``f``.
        patches_per_unit: patches of one token of the projector.
        projector_flops: of one such token.
        projects_survivors: whether the projector sees survivors only; False: as many tokens as without merging.
        projected_behind: layers behind which units go through a projector as well, of the same size (DeepStack).
        mlp_matrices: 2, or 3 of a gated MLP.
        windowed: layers whose attention stays within windows.
        prefix: tokens in front of the patches of each segment, which cost as much as a patch and reach no projector.
    """

    depth: int
    width: int
    mlp_width: int
    patches_per_unit: int
    projector_flops: int
    projects_survivors: bool = True
    projected_behind: tuple[int, ...] = ()
    mlp_matrices: int = 2
    windowed: frozenset[int] = frozenset()
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class RecurrentShape:
    """What the recurrent layers of a decoder cost beside their MLPs.

    Attributes:
        layers: which they are.
        token_flops: of one token: projections and convolution.
        chunk: tokens that are worked on at a time.
        chunk_flops: of one chunk, full or not.
        sequence_flops: of one sequence, however long: what the convolution does beyond its ends.
    """

    layers: frozenset[int]
    token_flops: int
    chunk: int
    chunk_flops: int
    sequence_flops: int = 0

    def flops(self, tokens: int) -> int:
        """Of one layer and one sequence; an empty one costs nothing."""
        chunks = -(-tokens // self.chunk)
        return tokens * self.token_flops + chunks * self.chunk_flops + bool(tokens) * self.sequence_flops


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Depth, width ``d``, MLP width ``f``, key width ``d_kv`` (all key heads).

    Attributes:
        query_width: ``d_q`` (all query heads); None: ``d``.
        mlp_flops: per token, of each layer, where the MLPs are not plain gated ones of width ``f``; empty: they are.
        gate_width: of a gate on what attention puts out, which is projected beside the queries.
        recurrent: layers without attention; None: there are none.
    """

    depth: int
    width: int
    mlp_width: int
    kv_width: int
    query_width: int | None = None
    mlp_flops: tuple[int, ...] = ()
    gate_width: int = 0
    recurrent: RecurrentShape | None = None

    def attends(self, layer: int) -> bool:
        """Whether a layer has keys."""
        return self.recurrent is None or layer not in self.recurrent.layers


@dataclass(frozen=True, slots=True)
class VisualReport:
    """One image or video.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        sample: row of the batch.
        vision_tokens: patches at each encoder layer's entry, and after the last.
        prompt_tokens: visual tokens that the unpatched language model gets.
        language_tokens: visual tokens at each decoder layer; empty where the language model is left alone.
    """

    modality: str
    sample: int
    vision_tokens: tuple[int, ...]
    prompt_tokens: int
    language_tokens: tuple[int, ...]

    @property
    def kept_fraction(self) -> float:
        """Visual tokens left at the last decoder layer, of those the unpatched model has there."""
        return self.left / max(1, self.prompt_tokens)

    @property
    def left(self) -> int:
        """Visual tokens at the last decoder layer."""
        return self.language_tokens[-1] if self.language_tokens else self.prompt_tokens


@dataclass(frozen=True, slots=True, repr=False)
class MergeReport:
    """The last forward that introduced visual tokens.

    Attributes:
        visuals: one entry per image or video, images first.
        sequence_tokens: real tokens per sample at each decoder layer, ``[layer][sample]``; empty where the language
            model is left alone.
        prompt_tokens: real tokens per sample without merging; empty likewise.
        encoder_flops: vision encoder, merged and unmerged; 0 where features came ready-made.
        projector_flops: projector or patch merger, merged and unmerged.
        llm_flops: prefill of the decoder layers, merged and unmerged; 0 where the language model is left alone, as
            are its ``kv_bytes``.
        kv_bytes: keys and values of the prompt and of what was in the cache before it, merged and unmerged (padding
            of the prompt not counted).
        past_tokens: real tokens that the cache stood for before this forward, per sample.
    """

    visuals: tuple[VisualReport, ...]
    sequence_tokens: tuple[tuple[int, ...], ...]
    prompt_tokens: tuple[int, ...]
    encoder_flops: tuple[int, int]
    projector_flops: tuple[int, int]
    llm_flops: tuple[int, int]
    kv_bytes: tuple[int, int]
    past_tokens: tuple[int, ...] = ()

    @property
    def images(self) -> tuple[VisualReport, ...]:
        """The entries of images, in prompt order."""
        return tuple(v for v in self.visuals if v.modality == "image")

    @property
    def videos(self) -> tuple[VisualReport, ...]:
        """The entries of videos, in prompt order."""
        return tuple(v for v in self.visuals if v.modality == "video")

    @property
    def kept_fraction(self) -> float:
        """Visual tokens left at the last decoder layer, of those the unpatched model has there."""
        whole = sum(v.prompt_tokens for v in self.visuals)
        return sum(v.left for v in self.visuals) / max(1, whole)

    @property
    def flops(self) -> tuple[int, int]:
        """Prefill FLOPs in all, merged and unmerged."""
        stages = (self.encoder_flops, self.projector_flops, self.llm_flops)
        return sum(s[0] for s in stages), sum(s[1] for s in stages)

    @property
    def summary(self) -> str:
        """One line: by how much merging made what smaller; stages that were left alone are not named."""
        ranked = [v for v in self.visuals if v.language_tokens]
        whole, left = sum(v.prompt_tokens for v in ranked), sum(v.left for v in ranked)
        parts = [
            (whole, left, "fewer visual tokens"),
            (self.flops[1], self.flops[0], "less prefill work" if self.llm_flops[1] else "less work in the encoder"),
            (self.kv_bytes[1], self.kv_bytes[0], "smaller KV cache"),
        ]
        said = [f"{before / max(1, after):.1f}x {what}" for before, after, what in parts if before]
        return ", ".join(said) or "nothing was measured"

    def __str__(self) -> str:
        """The summary, what each image and video lost in which layer, and a table of work and memory."""
        lines = [self.summary]
        lines += [f"{name}: {_path(visual)}" for name, visual in self._named()]
        lines.append(f"kept fraction of visual tokens: {self.kept_fraction:.3f}")
        for name, unit, merged, whole, ratio in self._costs():
            lines.append(f"{name:<15} {merged:12.3f} of {whole:12.3f} {unit} ({ratio:.3f})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        """The summary; ``str`` and ``print`` tell all."""
        return f"<MergeReport: {self.summary}>"

    def _repr_html_(self) -> str:
        """What notebooks show."""
        visuals = "".join(f"<tr><td>{name}</td><td>{_path(visual)}</td></tr>" for name, visual in self._named())
        costs = "".join(
            f"<tr><td>{name}</td><td>{merged:.3f}</td><td>{whole:.3f}</td><td>{unit}</td><td>{ratio:.3f}</td></tr>"
            for name, unit, merged, whole, ratio in self._costs()
        )
        head = "<tr><th></th><th>with merging</th><th>without</th><th></th><th>ratio</th></tr>"
        visuals = visuals.replace("->", "&rarr;")
        return f"<p><b>{self.summary}</b></p><table>{visuals}</table><table>{head}{costs}</table>"

    def _named(self) -> list[tuple[str, VisualReport]]:
        """Images and videos, numbered from 1 through the batch, and with the row where there are several rows."""
        several = len({visual.sample for visual in self.visuals}) > 1 or len(self.prompt_tokens) > 1
        return [
            (f"{visual.modality} {number}" + (f" (row {visual.sample})" if several else ""), visual)
            for of_kind in (self.images, self.videos)
            for number, visual in enumerate(of_kind, 1)
        ]

    def _costs(self) -> list[tuple[str, str, float, float, float]]:
        """Name, unit, with merging, without, ratio; nothing of a stage that did not run."""
        rows = {"encoder": self.encoder_flops, "projector": self.projector_flops, "language model": self.llm_flops}
        if self.llm_flops[1]:
            rows["prefill in all"] = self.flops
        costs = [(name, "GFLOPs", 1e9, *pair) for name, pair in rows.items()]
        costs.append(("KV cache", "MB", 1e6, *self.kv_bytes))
        return [
            (name, unit, merged / scale, whole / scale, merged / whole)
            for name, unit, scale, merged, whole in costs
            if whole
        ]


def _path(visual: VisualReport) -> str:
    """The counts of one image or video, each with the layer that made it smaller."""
    said = []
    if visual.vision_tokens:
        first, *behind = visual.vision_tokens  # the merge of encoder layer i shows at the entry of the next
        said.append(f"patches {first}" + _steps(first, behind, "encoder layer"))
    tokens = f"visual tokens {visual.prompt_tokens}"
    if visual.language_tokens:
        entry = visual.language_tokens[0]
        tokens += f" -> {entry} (encoder)" if entry != visual.prompt_tokens else ""
        tokens += _steps(entry, visual.language_tokens, "decoder layer")
    return "; ".join([*said, tokens])


def _steps(first: int, counts: Sequence[int], layer: str) -> str:
    """Every change of a count, and the layer in which it changed."""
    before = [first, *counts[:-1]]
    return "".join(f" -> {n} ({layer} {i})" for i, n in enumerate(counts) if n != before[i])


def encoder_flops(shape: EncoderShape, segment: Sequence[int]) -> int:
    """FLOPs of one encoder segment, but for attention within windows.

    Args:
        shape: the encoder.
        segment: patches at the entry of each layer and after the last, ``depth + 1`` numbers.
    """
    d, mlp = shape.width, 2 * shape.mlp_matrices * shape.width * shape.mlp_width
    segment = [n + shape.prefix for n in segment]
    return sum(
        8 * n_a * d * d + (0 if layer in shape.windowed else 4 * n_a * n_a * d) + n_m * mlp
        for layer, (n_a, n_m) in enumerate(zip(segment[:-1], segment[1:], strict=True))
    )


def projector_flops(shape: EncoderShape, segment: Sequence[int]) -> int:
    """FLOPs of the projector on one encoder segment; ``segment`` as in ``encoder_flops``."""
    patches = segment[-1] + sum(segment[layer + 1] for layer in shape.projected_behind)
    return patches // shape.patches_per_unit * shape.projector_flops


def window_flops(shape: EncoderShape, pairs: Sequence[int]) -> int:
    """FLOPs of attention within windows.

    Args:
        shape: the encoder.
        pairs: of tokens that see each other in a window, at each layer.
    """
    return sum(4 * pairs[layer] * shape.width for layer in shape.windowed)


def llm_flops(shape: DecoderShape, tokens: Sequence[int], past: Sequence[int] | None = None) -> int:
    """Prefill FLOPs of one sample.

    Args:
        shape: the decoder.
        tokens: its length at each decoder layer.
        past: keys of the cache at each layer; None: none.
    """
    d, kv = shape.width, shape.kv_width
    q = d if shape.query_width is None else shape.query_width
    mlps = shape.mlp_flops or (6 * d * shape.mlp_width,) * len(tokens)
    flops = 0
    for layer, (n, p, mlp) in enumerate(zip(tokens, past or [0] * len(tokens), mlps, strict=True)):
        if shape.recurrent is not None and not shape.attends(layer):
            flops += shape.recurrent.flops(n) + n * mlp
        else:
            projected = 4 * n * d * q + 4 * n * d * kv + 2 * n * d * shape.gate_width
            flops += projected + 2 * n * n * q + 4 * n * p * q + n * mlp
    return flops


def kv_bytes(shape: DecoderShape, tokens: Sequence[int], value_bytes: int, past: Sequence[int] | None = None) -> int:
    """Bytes of one sample's keys and values; ``tokens`` and ``past`` as in ``llm_flops``."""
    held = (n for count in (tokens, past or ()) for layer, n in enumerate(count) if shape.attends(layer))
    return sum(2 * n * shape.kv_width * value_bytes for n in held)
