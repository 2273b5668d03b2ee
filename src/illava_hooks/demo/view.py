"""What is shown: a table of costs, notes, and the picture of a merging layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from PIL import Image

from illava_hooks.engine.finding import find_family
from illava_hooks.engine.report import MergeReport, kv_bytes
from illava_hooks.tools.ask import Answer, is_small
from illava_hooks.tools.canvas import tabulate
from illava_hooks.tools.draw import SHEET_COLUMNS, MergeMap, draw

__all__ = [
    "HINT",
    "caption",
    "compared",
    "costs",
    "headline",
    "hint",
    "kv_bytes_of",
    "note",
    "picture",
    "step_names",
    "steps",
]

#: Stands where the chat will be.
HINT = "Choose an example, or upload a picture and ask. What merging does to it is shown here."
#: The same where something lies there to ask about.
READY = "A new chat about {}: ask a question. What merging does to it is shown here."
SHORT = ' class="short"'


def hint(names: Sequence[str], replaced: bool = False) -> str:
    """What stands in place of a chat that is still empty.

    Args:
        names: of the files that it is about.
        replaced: whether the last upload took the place of what lay there.
    """
    if not names:
        return HINT
    about = f"`{names[0].replace('`', '')}`" if len(names) == 1 else f"{len(names)} images"
    told = "A video comes alone, so the upload took the place of what lay there. " if replaced else ""
    return told + READY.format(about)


def note(lines: Sequence[str], failed: bool = False) -> str:
    """Lines of text as HTML; errors are told to screen readers at once."""
    if not lines:
        return ""
    role, kind = ("alert", "failed") if failed else ("status", "told")
    return f'<div class="note {kind}" role="{role}">{"<br>".join(escape(line) for line in lines)}</div>'


def headline(answers: dict[bool, Answer]) -> str:
    """By how much merging made what smaller, once it is known."""
    report = _report(answers)
    return "" if report is None else f'<p class="ratios">{escape(report.summary)}</p>'


def costs(answers: dict[bool, Answer], model: Any, runs: int = 1) -> str:
    """A table with a column for each side and, where there are two, one for their ratio, as HTML.

    Args:
        answers: the sides that were asked.
        model: which answered.
        runs: of how many measurements the times are the medians.
    """
    if not answers:
        return ""
    report, sides = _report(answers), [merge for merge in (False, True) if merge in answers]
    plain, merged = (answers.get(side, next(iter(answers.values()))) for side in (False, True))
    kept = report.kv_bytes if report is not None else (0, 0)
    if not kept[1]:  # the language model was left alone
        kept = (kv_bytes_of(model, merged.prompt_tokens), kv_bytes_of(model, plain.prompt_tokens))
    rows: list[tuple[str, str, tuple[str, str]]] = []
    if report is not None:
        rows.append(("Prefill work", _less(*report.flops), _pair(_work, report.flops)))
        rows += _stages(report)
    rows.append(("KV cache", _less(*kept), _pair(_bytes, kept)))
    rows.append(("Prompt tokens", "", (f"{plain.prompt_tokens:,}", f"{merged.prompt_tokens:,}")))
    exact = len(rows)
    firsts, others = (merged.prefill_s, plain.prefill_s), (merged.decode_s, plain.decode_s)
    rows.append(("Time to first token", _less(*firsts), _pair(_time, firsts)))
    rows.append(("Each further token", _less(*others), _pair(_time, others)))
    both = len(sides) == 2
    names = [*(["less by"] if both else []), *(("without merging", "with merging")[side] for side in sides)]
    short = is_small(model)
    body = "".join(
        _row(name, [*([ratio] if both else []), *(pair[side] for side in sides)], short and place >= exact)
        for place, (name, ratio, pair) in enumerate(rows)
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    foot = [f"Times are medians of {runs} measurements in turn."] if runs > 1 else []
    foot += ["Grey: the model is too small for its times to say anything."] if short else []
    hint = f'<p class="hint">{" ".join(foot)}</p>' if foot else ""
    kind = "costs both" if both else "costs"
    return f'<table class="{kind}"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>{hint}'


def _report(answers: dict[bool, Answer]) -> MergeReport | None:
    return next((one.report for one in answers.values() if one.report is not None), None)


def _row(name: str, cells: Sequence[str], short: bool) -> str:
    told = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr{SHORT if short else ""}><th scope="row">{escape(name)}</th>{told}</tr>'


def _less(merged: float, plain: float) -> str:
    """The ratio, and the word where merging made it more; nothing where nothing was measured."""
    if merged <= 0 or plain <= 0:
        return ""
    return f"{merged / plain:.1f}x more" if round(plain / merged, 1) < 1 else f"{plain / merged:.1f}x"


def _pair(words: Callable[[float], str], numbers: tuple[float, float]) -> tuple[str, str]:
    """Of merged and plain, as they stand in reports, the words for plain and merged, as they stand in columns."""
    return words(numbers[1]), words(numbers[0])


def kv_bytes_of(model: Any, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens in all decoder layers of an unpatched model."""
    shape = find_family(model).decoder_shape(model)
    return kv_bytes(shape, [tokens] * shape.depth, model.dtype.itemsize)


def steps(maps: Sequence[MergeMap]) -> list[tuple[str, int]]:
    """Stage and layer of each position of the slider behind the first, which is the input."""
    return list(dict.fromkeys((map.stage, map.layer) for map in maps))


def step_names(maps: Sequence[MergeMap]) -> list[str]:
    """Of every position: the input, and each merging layer."""
    return [
        "Input",
        *(f"{'Encoder' if stage == 'vision' else 'Decoder'} layer {layer}" for stage, layer in steps(maps)),
    ]


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


def _stages(report: MergeReport) -> list[tuple[str, str, tuple[str, str]]]:
    """Tokens per stage without and with merging, summed over images or frames."""
    vision = _summed([visual.vision_tokens for visual in report.visuals])
    language = _summed([visual.language_tokens for visual in report.visuals])
    prompt = sum(visual.prompt_tokens for visual in report.visuals)
    rows = [("Patches, encoder", vision[0], vision)] if vision else []
    rows.append(("Tokens, language model", prompt, language or [prompt]))
    return [(name, _less(counts[-1], whole), (f"{whole:,}", _arrows(counts))) for name, whole, counts in rows]


def _summed(counts: Sequence[Sequence[int]]) -> list[int]:
    return [sum(column) for column in zip(*counts, strict=True)]


def _arrows(counts: Sequence[int]) -> str:
    return " → ".join(f"{n:,}" for i, n in enumerate(counts) if i == 0 or n != counts[i - 1])


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds > 0 else "–"


def _work(flops: float) -> str:
    return f"{flops / 1e9:,.2f} GFLOP" if flops < 1e12 else f"{flops / 1e12:,.2f} TFLOP"


def _bytes(count: float) -> str:
    return f"{count / 1e6:,.3f} MB" if count < 1e9 else f"{count / 1e9:,.2f} GB"
