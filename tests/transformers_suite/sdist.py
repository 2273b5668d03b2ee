"""transformers' own common model tests, out of its source distribution: the wheel does not carry them."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
from pathlib import Path

__all__ = ["PACKAGE", "unpack"]

#: The package as which the tests are unpacked: their imports of each other are relative.
PACKAGE = "transformers_tests"

_COMMON = "test_modeling_common.py"


def unpack(version: str, build: Path) -> Path:
    """Downloads the source distribution of a version once and takes out of it what the common tests need.

    Args:
        version: of transformers.
        build: a folder to keep things in.

    Returns:
        The folder to import ``PACKAGE`` from.
    """
    root = build / version
    package = root / PACKAGE
    if not (package / _COMMON).exists():
        archive = build / f"transformers-{version}.tar.gz"
        if not archive.exists():
            build.mkdir(parents=True, exist_ok=True)
            wanted = ["--no-deps", "--no-binary", ":all:", f"transformers=={version}"]
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            subprocess.run([*pip, *wanted, "--dest", str(build)], check=True)
        with tarfile.open(archive) as tar:
            members = {member.name: member for member in tar if member.isfile()}
            prefix = f"transformers-{version}/tests/"
            for name, source in _needed(prefix, members, tar).items():
                path = package / name
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / "__init__.py").touch()
                path.write_text(source)
    return root


def _needed(prefix: str, members: dict[str, tarfile.TarInfo], tar: tarfile.TarFile) -> dict[str, str]:
    """Sources by path: the common tests last, before them all that they import from beside them.

    Mixins that the distribution leaves out, such as those for ``generate``, are empty classes.
    """
    found: dict[str, str] = {}

    def add(name: str, asked: list[str]) -> None:
        if name in found:
            return
        member = members.get(prefix + name)
        if member is None:
            found[name] = "".join(f"class {each}:\n    pass\n\n\n" for each in asked)
            return
        stream = tar.extractfile(member)
        assert stream is not None
        source = stream.read().decode()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                add(node.module.replace(".", "/") + ".py", [alias.name for alias in node.names])
        found[name] = source

    add(_COMMON, [])
    return found
