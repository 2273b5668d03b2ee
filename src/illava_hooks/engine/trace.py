"""What a finished forward leaves behind: the report, and the provenance chained through both stages.

Provenance is only computed with ``track=True``; its matrices are sparse and live on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.engine.cache import Past
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.prompt import CompactPrompt
from illava_hooks.engine.provenance import (
    Provenance,
    StageProvenance,
    TokenProvenance,
    merge_matrix,
    product,
    selection,
    sparse,
    take_rows,
)
from illava_hooks.engine.records import VisualRecord, vision_provenance
from illava_hooks.engine.regions import in_region
from illava_hooks.engine.report import (
    DecoderShape,
    EncoderShape,
    MergeReport,
    VisualReport,
    encoder_flops,
    kv_bytes,
    llm_flops,
    projector_flops,
    window_flops,
)
from illava_hooks.engine.session import MergeSession

__all__ = ["Finish", "finish_vision", "token_sources", "vision_tracks"]


@dataclass(frozen=True, slots=True)
class Finish:
    """Stores report and provenance of one prefill in its session when called."""

    session: MergeSession
    shapes: tuple[EncoderShape, DecoderShape]
    run: DecoderRun
    prompt: CompactPrompt
    past: Past
    masks: tuple[Tensor | None, Sequence[Tensor | None]]
    value_bytes: int

    @in_region("illava::report")
    def __call__(self) -> None:
        """Runs after the text model."""
        provenance = _chain(self.run, self.prompt) if self.session.config.track else None
        self.session.finish(self._report(), provenance)

    def _report(self) -> MergeReport:
        encoder, decoder = self.shapes
        stages = [self.run.merges_through(layer) for layer in range(decoder.depth)]
        counts = [self.run.counts[stage] for stage in stages]
        records, samples = self.prompt.records, range(len(self.prompt.prompt_lengths))
        visuals = tuple(
            VisualReport(
                record.modality,
                sample,
                _patches(record, encoder.depth),
                record.num_tokens,
                tuple(count.visual_lengths[index] for count in counts),
            )
            for index, (record, sample) in enumerate(zip(records, self.prompt.sample_of, strict=True))
        )
        # Beams and return sequences share the features of one run of the encoder.
        once = list({id(record): record for record in records}.values())
        lengths = [[count.lengths[b] for count in counts] for b in samples]
        full = [[n] * decoder.depth for n in self.prompt.prompt_lengths]
        held, logical = self._past(len(samples), decoder.depth)
        encoder_work, projector_work = _vision_flops(encoder, once)
        return MergeReport(
            visuals=visuals,
            sequence_tokens=tuple(count.lengths for count in counts),
            prompt_tokens=self.prompt.prompt_lengths,
            past_tokens=tuple(row[0] for row in logical),
            encoder_flops=encoder_work,
            projector_flops=projector_work,
            llm_flops=(
                sum(llm_flops(decoder, n, p) for n, p in zip(lengths, held, strict=True)),
                sum(llm_flops(decoder, n, p) for n, p in zip(full, logical, strict=True)),
            ),
            kv_bytes=(
                sum(kv_bytes(decoder, n, self.value_bytes, p) for n, p in zip(lengths, held, strict=True)),
                sum(kv_bytes(decoder, n, self.value_bytes, p) for n, p in zip(full, logical, strict=True)),
            ),
        )

    def _past(self, batch: int, depth: int) -> tuple[list[list[int]], list[list[int]]]:
        """For each sample the real keys of the past at each layer, merged and unmerged; one transfer if padded."""
        mask, valid = self.masks
        merged = [[keys] * batch for keys in self.past.keys]
        whole = [self.past.logical] * batch
        if self.past.logical:
            tables = [table for table in {id(t): t for t in valid if t is not None}.values()]
            known = dict(zip(map(id, tables), _real(tables, self.past.keys, valid), strict=True))
            merged = [known[id(t)] if t is not None else row for t, row in zip(valid, merged, strict=True)]
            if mask is not None:
                whole = mask[:, : self.past.logical].sum(1).tolist()
        return [list(row) for row in zip(*merged, strict=True)], [[n] * depth for n in whole]


def finish_vision(session: MergeSession, encoder: EncoderShape, records: Sequence[VisualRecord]) -> None:
    """Stores report and provenance of a run of the encoder whose language model is left alone."""
    encoder_work, projector_work = _vision_flops(encoder, records)
    visuals = tuple(
        VisualReport(record.modality, index, _patches(record, encoder.depth), record.num_tokens, ())
        for index, record in enumerate(records)
    )
    whole = [(record.modality, visual.vision_tokens[0]) for record, visual in zip(records, visuals, strict=True)]
    session.tell_missed(whole, [visual.vision_tokens[-1] for visual in visuals])
    report = MergeReport(visuals, (), (), encoder_work, projector_work, (0, 0), (0, 0))
    session.finish(report, vision_provenance(records) if session.config.track else None)


def _vision_flops(encoder: EncoderShape, records: Sequence[VisualRecord]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of encoder and projector, each merged and unmerged."""
    merged = [segment for record in records for segment in _per_layer(record, encoder.depth)]
    whole = [(segment[0],) * len(segment) for segment in merged]
    own = [segment for record in records if record.projected is None for segment in _per_layer(record, encoder.depth)]
    unmerged = [(segment[0],) * len(segment) for segment in own]
    pooled = encoder.projector_flops * sum(record.projected or 0 for record in records)
    pairs = _pairs_per_layer(records, encoder)
    in_windows = (
        sum(window_flops(encoder, p) for p in pairs),
        sum(window_flops(encoder, p[:1] * len(p)) for p in pairs),
    )
    return (
        (
            sum(encoder_flops(encoder, s) for s in merged) + in_windows[0],
            sum(encoder_flops(encoder, s) for s in whole) + in_windows[1],
        ),
        (
            sum(projector_flops(encoder, s) for s in (own if encoder.projects_survivors else unmerged)) + pooled,
            sum(projector_flops(encoder, s) for s in unmerged) + pooled,
        ),
    )


def _patches(record: VisualRecord, depth: int) -> tuple[int, ...]:
    """Patches of an image or video at the entry of each encoder layer, and after the last."""
    return tuple(sum(column) for column in zip(*_per_layer(record, depth), strict=True))


def _real(tables: list[Tensor], keys: Sequence[int], valid: Sequence[Tensor | None]) -> list[list[int]]:
    """How many of the past keys each table calls real, per sample."""
    past = {id(table): held for table, held in zip(valid, keys, strict=True) if table is not None}
    return [table[:, : past[id(table)]].sum(1).tolist() for table in tables]


def _per_layer(record: VisualRecord, depth: int) -> list[tuple[int, ...]]:
    """For each encoder segment its patches at the entry of each layer, and after the last."""
    # A layer merges behind its attention: its entry still counts what it will merge away.
    before = [sum(merging < layer for merging in record.layers) for layer in range(depth + 1)]
    return [tuple(segment[merges] for merges in before) for segment in record.segments]


def _pairs_per_layer(records: Sequence[VisualRecord], encoder: EncoderShape) -> list[list[int]]:
    """Of each record its pairs within windows at each encoder layer; one transfer, where there are windows.

    How many survivors a window has is only known where they were chosen.
    """
    windowed = [record for record in records if record.window_pairs is not None] if encoder.windowed else []
    tables = [record.window_pairs for record in windowed if record.window_pairs is not None]
    if not tables:
        return []
    known = torch.stack([table.to(tables[0].device) for table in tables]).tolist()
    return [
        [pairs[sum(merging < layer for merging in record.layers)] for layer in range(encoder.depth)]
        for record, pairs in zip(windowed, known, strict=True)
    ]


# ---------------------------------------------------------------------- the vision stage


def vision_tracks(run: EncoderRun, first: int, last: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Origins and patch weights of the survivors of segments ``first .. last - 1`` after each merge, by layer."""
    unit = run.traits.patches_per_unit
    start, stop = _columns(run, 0, first, last)
    order = _picture_order(run, first, last)
    tracks = {}
    for merges, layer_idx in enumerate(run.layers[: len(run.plans)], start=1):
        low, high = _columns(run, merges, first, last)
        weights = _units(run, merges, first, last)
        row, column = weights.indices()
        lane = torch.arange(unit).repeat(row.numel())
        origins = run.states[merges].origins + _row_offset(run)
        patches = (origins.flatten()[low:high, None].cpu() - start) * unit + torch.arange(unit)
        table = sparse(
            row.repeat_interleave(unit) * unit + lane,
            order[column.repeat_interleave(unit) * unit + lane],
            weights.values().repeat_interleave(unit),
            ((high - low) * unit, (stop - start) * unit),
        )
        tracks[layer_idx] = (order[patches.flatten()], table)
    return tracks


def token_sources(run: EncoderRun, first: int, last: int, tokens: Tensor) -> Tensor:
    """Source patches of the visual tokens that one image gives to the language model.

    Args:
        run: the finished run of the encoder.
        first: the image's first segment.
        last: one past its last.
        tokens: sparse ``(n, K')`` weights of the image's surviving units in each token.

    Returns:
        Sparse ``(n, patches)``.
    """
    unit = run.traits.patches_per_unit
    weights = product(tokens, _units(run, len(run.plans), first, last))
    row, column = weights.indices()
    lane = torch.arange(unit).repeat(row.numel())
    return sparse(
        row.repeat_interleave(unit),
        _picture_order(run, first, last)[column.repeat_interleave(unit) * unit + lane],
        weights.values().repeat_interleave(unit) / unit,
        (weights.shape[0], weights.shape[1] * unit),
    )


def _picture_order(run: EncoderRun, first: int, last: int) -> Tensor:
    """``(patches,)`` int64, the place in the picture of each patch of some segments, as the encoder has them."""
    start, stop = (n * run.traits.patches_per_unit for n in _columns(run, 0, first, last))
    if run.traits.order is None:
        return torch.arange(stop - start)
    width = run.states[0].kept_at.shape[1] * run.traits.patches_per_unit
    places = torch.arange(start, stop)
    return run.traits.order.cpu()[places % width] + places // width * width - start


def _columns(run: EncoderRun, merges: int, first: int, last: int) -> tuple[int, int]:
    lengths = run.segments[merges].lengths
    return sum(lengths[:first]), sum(lengths[:last])


def _row_offset(run: EncoderRun) -> Tensor:
    origins = run.states[0].origins
    return torch.arange(origins.shape[0], device=origins.device)[:, None] * origins.shape[1]


def _units(run: EncoderRun, merges: int, first: int, last: int) -> Tensor:
    """Sparse weights of an image's original units in its survivors."""
    low, high = _columns(run, merges, first, last)
    start, stop = _columns(run, 0, first, last)
    sources = run.states[merges].sources
    if sources is None:
        return selection(torch.arange(stop - start), stop - start)
    rows = take_rows(sources, torch.arange(low, high))
    index = rows.indices()
    return sparse(index[0], index[1] - start, rows.values(), (high - low, stop - start))


# ---------------------------------------------------------------------- both stages


def _chain(run: DecoderRun, prompt: CompactPrompt) -> Provenance:
    """Provenance of the encoder merges, of the entry (layer 0) and of every merge of the language model."""
    found = vision_provenance(prompt.records)
    matrix: Tensor | None = None
    # All matrices lead from the compact sequence at the entry; the encoder's own sources come in front of it.
    entry = [_rows_of(run, 0, index) for index in range(len(prompt.records))]
    for merges, layer_idx in enumerate((0, *run.layers)):
        if merges:
            step = merge_matrix(run.plans[merges - 1])
            matrix = step if matrix is None else product(step, matrix)
        state = run.states[merges]
        images = []
        for index, record in enumerate(prompt.records):
            rows, start = _rows_of(run, merges, index), entry[index]
            weights = _restrict(matrix, rows, start)
            origins = run.states[0].origins.flatten().cpu()[start]
            sources = (
                selection(origins, record.num_tokens) if record.sources is None else take_rows(record.sources, origins)
            )
            images.append(TokenProvenance(state.origins.flatten().cpu()[rows], product(weights, sources)))
        found.merges["language", layer_idx] = StageProvenance(images)
    return found


def _rows_of(run: DecoderRun, merges: int, index: int) -> Tensor:
    """Flat compact columns of one image or video, on the CPU."""
    return (run.states[merges].visual.flatten().cpu() == index).nonzero().flatten()


def _restrict(matrix: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """The part of a sparse matrix that leads from ``columns`` to ``rows``."""
    if matrix is None:
        return selection(torch.arange(len(rows)), len(columns))
    part = take_rows(matrix, rows)
    index = part.indices()
    position = torch.full((matrix.shape[1],), -1)
    position[columns] = torch.arange(len(columns))
    return sparse(index[0], position[index[1]], part.values(), (len(rows), len(columns)))
