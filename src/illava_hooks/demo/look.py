"""How the page looks: system fonts and a few rules; nothing comes from another host."""

from __future__ import annotations

__all__ = ["CSS", "FONTS", "MONO", "READABLE", "WORDS"]

FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]

#: What gradio names and does not translate: of a button, and for screen readers.
WORDS = {"common.upload": "Upload more", "common.complete": "Complete"}

#: The theme's own grey is hard to read on white, and so is white on its own teal.
READABLE = {
    f"{name}{dark}": color
    for name, light, night in (
        ("body_text_color_subdued", "*neutral_600", "*neutral_300"),
        ("block_info_text_color", "*neutral_600", "*neutral_300"),
        ("button_primary_background_fill", "*primary_700", "*primary_700"),
        ("button_primary_background_fill_hover", "*primary_800", "*primary_800"),
    )
    for dark, color in (("", light), ("_dark", night))
}

CSS = """
.gradio-container { width: 100% !important; max-width: 1240px !important; margin: 0 auto !important; }
#title h1 { font-size: 1.35rem; margin: 0 0 .15rem; }
#title p { margin: 0; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#examples { display: grid; grid-template-columns: repeat(4, 1fr); gap: .5rem; }
#examples button { min-width: 0; height: 2.4rem; white-space: nowrap; }
#notes:not(:has(.note)), #headline:not(:has(p)), #costs:not(:has(table)) { display: none; }
.note { border-radius: 6px; padding: .55rem .75rem; border-left: 4px solid var(--primary-500);
  background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.note.failed { border-left-color: #dc2626; }
table.costs { width: 100%; margin: 0; border-collapse: collapse; font-variant-numeric: tabular-nums; }
table.costs, table.costs * { border: 0 !important; }
table.costs :is(th, td) { padding: .38rem .55rem; text-align: right; font-weight: 400; vertical-align: top; }
table.costs tr { border-bottom: 1px solid var(--border-color-primary) !important; }
table.costs :is(th[scope=row], thead td) { text-align: left; color: var(--body-text-color-subdued); }
table.costs thead th { font-weight: 600; }
#preview :is(.gallery-container, .grid-wrap) { min-height: 0; height: auto; max-height: 9.5rem; }
#preview .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
table.costs tr.short :is(th, td) { opacity: .65; }
.hint { color: var(--body-text-color-subdued); margin: .3rem 0; }
#headline .ratios { font-size: 1.15rem; font-weight: 600; margin: 0; }
@media (max-width: 900px) {
  #examples { grid-template-columns: repeat(2, 1fr); }
  table.costs { font-size: .86rem; }
  table.costs :is(th, td) { padding: .3rem; }
}
#chat .message { padding: .4rem .75rem; }
#chat .message-wrap { padding: .6rem; }
#chat :is(.placeholder, .placeholder-content) { background: none; }
#chat .placeholder { padding: 1rem; text-align: center; }
#chat .message-row { margin: .25rem 0; }
:is(#notes, #headline, #costs) .html-container { padding: 0; }
#chat button[aria-label="Clear"] { display: none; }
#chat [data-testid="status-tracker"]:has(.error) { display: none; } /* of what was stopped; faults are told below */
#buttons { gap: .5rem; flex-wrap: nowrap; }
#buttons button { min-width: 0; white-space: nowrap; }
#positions { align-items: center; gap: .5rem; flex-wrap: wrap; }
#step { flex: 1 1 300px; min-width: 0; }
#step label { padding: .25rem .5rem; }
#map { gap: .75rem; }
#map-caption textarea { font-variant-numeric: tabular-nums; }
@media (max-width: 640px) {
  table.costs td:not(:last-child) { white-space: nowrap; }
  #sides-of-the-page > * { display: contents; }
  #sides-of-the-page > * > * { flex: 1 1 100%; min-width: 0; }
  #costs { order: 1; } /* below the chat and the map, which come behind the pictures */
  #knobs { order: 2; }
}
"""
