"""Makes the relative links of README.md absolute, in place, since PyPI shows it where they lead nowhere.

``python .github/absolute_links.py https://github.com/OWNER/NAME v0.2.0``
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import urljoin

#: ``[text](target)``, ``![text](target)`` and a target that is inside another link's text.
LINK = re.compile(r"(!?)(\[(?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*\])\(([^)\s]+)\)")


def absolute(text: str, repository: str, tag: str) -> str:
    """The text with links to files of that tag; pictures are linked as files, not as pages about them.

    Args:
        text: Markdown whose targets are relative to the repository's root.
        repository: its address, without a slash at the end.
        tag: of the release.
    """

    def written(found: re.Match[str]) -> str:
        mark, name, target = found.groups()
        inner = LINK.sub(written, name[1:-1])
        if not re.match(r"[a-z]+:|#", target):
            target = urljoin(f"{repository}/{'raw' if mark else 'blob'}/{tag}/", target)
        return f"{mark}[{inner}]({target})"

    return LINK.sub(written, text)


if __name__ == "__main__":
    readme = Path(__file__).parents[1] / "README.md"
    readme.write_text(absolute(readme.read_text(), *sys.argv[1:]))
