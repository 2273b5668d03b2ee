"""A file of JSON lines that one run writes and goes on with: a header with its fingerprint, then what was measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from illava_hooks.errors import InputError
from illava_hooks.tools.evaluate.fingerprint import Fingerprint, differences

__all__ = ["add_line", "header_of", "is_begun", "parsed"]


def is_begun(file: Path, form: tuple[str, int], mine: Fingerprint, tell: Callable[[str], None]) -> bool:
    """Makes a file ready for more lines.

    Args:
        file: its path; where there is none, it is begun. A last line that an interrupted run left unfinished is taken
            away.
        form: name and version of what the file holds.
        mine: the fingerprint of the run that wants to write.
        tell: is told what was taken away.

    Returns:
        Whether it may hold lines already.

    Raises:
        InputError: it holds lines of another run, or something else.
    """
    header = _line({"format": form[0], "version": form[1], **mine})
    if not file.exists() or not file.stat().st_size:
        file.write_text(header, encoding="utf-8")
        return False
    theirs = header_of(file, form)
    if theirs is None:
        raise InputError(
            f"{str(file)!r} does not say what its rows were measured with (an earlier version wrote it, or its first "
            "line is damaged); give "
            "another file, or delete it to measure anew"
        )
    data = file.read_bytes()
    other = differences(mine, theirs)
    if other and not data.partition(b"\n")[2].strip():
        tell(f"{file.name}: a run that ended before its first row left it; it is begun anew")
        file.write_text(header, encoding="utf-8")
        return False
    if other:
        raise InputError(
            f"{str(file)!r} holds rows of another run ({'; '.join(other)}); give another file, or delete it to "
            "measure anew"
        )
    whole, _, rest = data.rpartition(b"\n")  # bytes: a line can be cut within a letter
    if rest and parsed(rest.decode(errors="replace")) is None:
        tell(f"{file.name}: its last line was cut off and is measured anew")
        file.write_bytes(whole + b"\n")
    elif rest:
        with file.open("a", encoding="utf-8") as lines:
            lines.write("\n")
    return True


def add_line(file: Path, body: dict[str, Any]) -> None:
    """Appends a line."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(_line(body))


def header_of(file: Path, form: tuple[str, int]) -> dict[str, Any] | None:
    """The fingerprint of the run that wrote a file; None where it has no such header.

    Raises:
        InputError: a later version wrote it.
    """
    with file.open(encoding="utf-8", errors="replace") as lines:
        header = parsed(lines.readline())
    if not isinstance(header, dict) or header.get("format") != form[0]:
        return None
    if header.get("version") != form[1]:
        raise InputError(
            f"{file.name} is of version {header.get('version')!r} and this one reads {form[1]}; update illava-hooks, "
            "or give a new file"
        )
    return header


def parsed(line: str) -> Any:
    """What a line holds; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _line(body: dict[str, Any]) -> str:
    return json.dumps(body, ensure_ascii=False) + "\n"
