"""What is shown: a table of costs, notes, and the picture of a merging layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from PIL import Image

from illava_hooks.engine.finding import find_family
from illava_hooks.engine.report import MergeReport, kv_bytes
from illava_hooks.tools.ask import Answer
from illava_hooks.tools.canvas import tabulate
from illava_hooks.tools.draw import SHEET_COLUMNS, MergeMap, draw

__all__ = ["HINT", "caption", "compared", "costs", "headline", "kv_bytes_of", "note", "picture", "steps"]

#: Stands where answers will be.
HINT = '<p class="hint">Choose an example, or upload a picture and ask. What merging does to it is shown here.</p>'
#: Parameters of a model below which its times say nothing of merging.
SMALL = 100_000_000
SHORT = ' class="short"'


def note(lines: Sequence[str], failed: bool = False) -> str:
    """Lines of text as HTML; errors are told to screen readers at once."""
    if not lines:
        return ""
    role, kind = ("alert", "failed") if failed else ("status", "told")
    return f'<div class="note {kind}" role="{role}">{"<br>".join(escape(line) for line in lines)}</div>'


def headline(question: str, answers: dict[bool, Answer]) -> str:
    """The question that was asked and, once it is known, by how much merging made what smaller."""
    told = [f'<p class="asked">{escape(question)}</p>'] if question else []
    report = next((one.report for one in answers.values() if one.report is not None), None)
    if report is not None:
        told.append(f'<p class="ratios">{escape(report.summary)}</p>')
    return "".join(told) or HINT


def costs(answers: dict[bool, Answer], model: Any) -> str:
    """A table with a column for each side, as HTML."""
    if not answers:
        return ""
    report = next((one.report for one in answers.values() if one.report is not None), None)
    sides = [merge for merge in (False, True) if merge in answers]
    rows = [
        ("Time to first token", [f"{answers[side].prefill_s * 1e3:.1f} ms" for side in sides]),
        ("Each further token", [_further(answers[side]) for side in sides]),
        ("Prompt tokens", [f"{answers[side].prompt_tokens:,}" for side in sides]),
    ]
    rows += [(name, [pair[side] for side in sides]) for name, pair in _stages(report)]
    plain = kv_bytes_of(model, next(iter(answers.values())).prompt_tokens)
    merged = report.kv_bytes[0] if report is not None else plain
    rows.append(("KV cache", [_bytes((plain, merged)[side]) for side in sides]))
    if report is not None and len(sides) == 2:
        rows.append(("FLOPs of the prefill", [f"{flops / 1e9:,.3f} G" for flops in reversed(report.flops)]))
    names = ("without merging", "with merging")
    head = "".join(f'<th scope="col">{names[side]}</th>' for side in sides)
    short = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    body = "".join(
        f'<tr{SHORT if short and place < 2 else ""}><th scope="row">{escape(name)}</th>'
        f"{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
        for place, (name, cells) in enumerate(rows)
    )
    foot = '<p class="hint">Grey: the model is too small for its times to say anything.</p>' if short else ""
    return f'<table class="costs"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>{foot}'


def kv_bytes_of(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in all decoder layers of an unpatched model."""
    shape = find_family(model).decoder_shape(model)
    return kv_bytes(shape, [tokens] * shape.depth, model.dtype.itemsize)


def steps(maps: Sequence[MergeMap]) -> list[tuple[str, int]]:
    """Stage and layer of each position of the slider behind the first, which is the input."""
    return list(dict.fromkeys((map.stage, map.layer) for map in maps))


def caption(maps: Sequence[MergeMap], step: int) -> str:
    """What a position of the slider shows."""
    if not maps or step == 0:
        return "The input, as the model sees it." if maps else ""
    stage, layer = steps(maps)[step - 1]
    here = [map for map in maps if (map.stage, map.layer) == (stage, layer)]
    kept, total = sum(map.kept for map in here), sum(map.total for map in here)
    place, unit = ("Vision encoder, after", "patches") if stage == "vision" else ("Language model, from", "tokens")
    return f"{place} layer {layer}: {kept:,} of {total:,} {unit} are left ({kept / total:.0%})."


def picture(maps: Sequence[MergeMap], step: int, colours: bool = False) -> Image.Image | None:
    """All images, or all frames of a video, at one position of the slider; None where nothing merged."""
    if not maps:
        return None
    place = steps(maps)[max(0, step - 1)]
    here = [map for map in maps if (map.stage, map.layer) == place]
    dim, tint = (0.25, colours) if step else (1.0, False)
    sheets = []
    for map in here:
        columns = min(SHEET_COLUMNS // 2, len(map.frames))
        drawn = draw(map, dim, tint, columns)
        sheets.append(drawn[0] if columns == 1 else tabulate(drawn, columns))
    if len(sheets) == 1:
        return sheets[0]
    height = max(sheet.height for sheet in sheets)
    return tabulate([_as_high(sheet, height) for sheet in sheets], min(2, len(sheets)))


def compared(maps: Sequence[MergeMap], step: int, colours: bool) -> tuple[Image.Image, Image.Image] | None:
    """The input, and one position of the slider, to be laid on each other; None where nothing merged."""
    before, after = picture(maps, 0), picture(maps, step, colours)
    return None if before is None or after is None else (before, after)


def _as_high(sheet: Image.Image, height: int) -> Image.Image:
    """With white below."""
    canvas = Image.new("RGB", (sheet.width, height), "white")
    canvas.paste(sheet)
    return canvas


def _further(one: Answer) -> str:
    return f"{one.decode_s * 1e3:.1f} ms" if one.new_tokens > 1 else "–"


def _stages(report: MergeReport | None) -> list[tuple[str, tuple[str, str]]]:
    """Tokens per stage without and with merging, summed over images or frames."""
    if report is None:
        return []
    vision = _summed([visual.vision_tokens for visual in report.visuals])
    language = _summed([visual.language_tokens for visual in report.visuals])
    prompt = sum(visual.prompt_tokens for visual in report.visuals)
    rows = [("Patches in the encoder", (f"{vision[0]:,}", _arrows(vision)))] if vision else []
    return [*rows, ("Visual tokens in the language model", (f"{prompt:,}", _arrows(language)))]


def _summed(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts, strict=True)]


def _arrows(counts: Sequence[int]) -> str:
    return " → ".join(f"{n:,}" for i, n in enumerate(counts) if i == 0 or n != counts[i - 1])


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.3f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
