"""What a finished prefill leaves behind: the report, and the provenance chained through both stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.patchers.language.placement import Placement
from illava_hooks.patchers.language.run import DecoderPass
from illava_hooks.patchers.vision.tracking import selection
from illava_hooks.runtime.provenance import (
    Provenance,
    StageProvenance,
    TokenProvenance,
    merge_matrix,
    product,
    sparse,
    take_rows,
)
from illava_hooks.runtime.report import (
    DecoderShape,
    EncoderShape,
    MergeReport,
    VisualReport,
    encoder_flops,
    kv_bytes,
    llm_flops,
)
from illava_hooks.runtime.session import MergeSession, VisualRecord, vision_provenance

__all__ = ["Finish"]


@dataclass(frozen=True, slots=True)
class Finish:
    """Stores report and provenance of one prefill in its session when called."""

    session: MergeSession
    shapes: tuple[EncoderShape, DecoderShape]
    run: DecoderPass
    placed: Placement
    value_bytes: int

    def __call__(self) -> None:
        """Runs after the text model."""
        provenance = chain(self.run, self.placed) if self.session.config.track else None
        self.session.finish(self._report(), provenance)

    def _report(self) -> MergeReport:
        encoder, decoder = self.shapes
        layouts = [self.run.layouts[self.run.ordinal(layer)] for layer in range(decoder.depth)]
        records, samples = self.placed.records, range(len(self.placed.prompt_lengths))
        visuals = tuple(
            VisualReport(
                record.modality,
                sample,
                tuple(sum(column) for column in zip(*_per_layer(record, encoder.depth), strict=True)),
                record.num_tokens,
                tuple(layout.span_lengths[index] for layout in layouts),
            )
            for index, (record, sample) in enumerate(zip(records, self.placed.sample_of, strict=True))
        )
        # Beams and return sequences share the features of one run of the encoder.
        once = {id(record): record for record in records}.values()
        merged = [segment for record in once for segment in _per_layer(record, encoder.depth)]
        whole = [(segment[0],) * len(segment) for segment in merged]
        lengths = [[layout.lengths[b] for layout in layouts] for b in samples]
        full = [[n] * decoder.depth for n in self.placed.prompt_lengths]
        per_token = encoder.projector_flops
        return MergeReport(
            visuals=visuals,
            sequence_tokens=tuple(layout.lengths for layout in layouts),
            prompt_tokens=self.placed.prompt_lengths,
            encoder_flops=(
                sum(encoder_flops(encoder, s) for s in merged),
                sum(encoder_flops(encoder, s) for s in whole),
            ),
            projector_flops=(
                sum(s[-1] // encoder.patches_per_unit * per_token for s in merged),
                sum(s[-1] // encoder.patches_per_unit * per_token for s in whole),
            ),
            llm_flops=(sum(llm_flops(decoder, n) for n in lengths), sum(llm_flops(decoder, n) for n in full)),
            kv_bytes=(
                sum(kv_bytes(decoder, n, self.value_bytes) for n in lengths),
                sum(kv_bytes(decoder, n, self.value_bytes) for n in full),
            ),
        )


def _per_layer(record: VisualRecord, depth: int) -> list[tuple[int, ...]]:
    """For each encoder segment its patches at the entry of each layer, and after the last."""
    before = [sum(merging < layer for merging in record.layers) for layer in range(depth + 1)]
    return [tuple(segment[ordinal] for ordinal in before) for segment in record.segments]


def chain(run: DecoderPass, placed: Placement) -> Provenance:
    """Provenance of the encoder merges, of the entry (layer 0) and of every merge of the language model."""
    found = vision_provenance(placed.records)
    matrix: Tensor | None = None
    entry = [_rows_of(run, 0, index) for index in range(len(placed.records))]
    for ordinal, layer_idx in enumerate((0, *run.layers)):
        if ordinal:
            step = merge_matrix(run.plans[ordinal - 1])
            matrix = step if matrix is None else product(step, matrix)
        state = run.states[ordinal]
        images = []
        for index, record in enumerate(placed.records):
            rows, start = _rows_of(run, ordinal, index), entry[index]
            weights = _restrict(matrix, rows, start)
            seats = run.states[0].seats.flatten().cpu()[start]
            sources = (
                selection(seats, record.num_tokens) if record.sources is None else take_rows(record.sources, seats)
            )
            images.append(TokenProvenance(state.seats.flatten().cpu()[rows], product(weights, sources)))
        found.merges["language", layer_idx] = StageProvenance(images)
    return found


def _rows_of(run: DecoderPass, ordinal: int, index: int) -> Tensor:
    """Flat compact columns of one image or video, on the CPU."""
    return (run.states[ordinal].span.flatten().cpu() == index).nonzero().flatten()


def _restrict(matrix: Tensor | None, rows: Tensor, columns: Tensor) -> Tensor:
    """The part of a sparse matrix that leads from ``columns`` to ``rows``."""
    if matrix is None:
        return selection(torch.arange(len(rows)), len(columns))
    part = take_rows(matrix, rows)
    index = part.indices()
    position = torch.full((matrix.shape[1],), -1)
    position[columns] = torch.arange(len(columns))
    return sparse(index[0], position[index[1]], part.values(), (len(rows), len(columns)))
