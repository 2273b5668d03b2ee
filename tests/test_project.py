"""What stands around the code: workflows, forms and hooks name only what is there."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = [file for file in sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")) if file.stem != "config"]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Path) -> list[str]:
    """Every command of a workflow, once for each value of its matrix."""
    found = []
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in job["steps"]:
            names = re.findall(r"\$\{\{ matrix\.(\w+) \}\}", step.get("run", "")) or [None]
            for name in names:
                for value in matrix.get(name, [None]):
                    found.append(step.get("run", "").replace(f"${{{{ matrix.{name} }}}}", str(value)))
    return found


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_name_targets_that_there_are(workflow: Path) -> None:
    commands = [command for command in steps(workflow) if command]
    assert commands
    asked = [word for command in commands if command.startswith("make ") for word in command.split()[1:]]
    assert {word for word in asked if "=" not in word} <= targets(), asked
    scripts = [command.split()[1] for command in commands if command.startswith("bash ")]
    assert all((ROOT / script).is_file() for script in scripts)


def test_python_versions_are_those_that_are_promised() -> None:
    promised = {kind.rpartition(" ")[2] for kind in PROJECT["project"]["classifiers"] if "Python :: 3." in kind}
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())["jobs"]["newest"]
    assert set(job["strategy"]["matrix"]["python"]) == {min(promised, key=_number), max(promised, key=_number)}
    assert PROJECT["project"]["requires-python"] == f">={min(promised, key=_number)}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


@pytest.mark.parametrize("form", FORMS, ids=lambda file: file.stem)
def test_issue_forms(form: Path) -> None:
    """What the forms' schema asks for: a name, a description, and fields with labels and different ids."""
    content = yaml.safe_load(form.read_text())
    assert content["name"] and content["description"]
    assert all(field["attributes"]["label"] for field in content["body"])
    ids = [field["id"] for field in content["body"]]
    assert len(ids) == len(set(ids)) >= 1


def test_a_release_is_published_without_a_token() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text())["jobs"]
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (ROOT / ".github" / "workflows" / "release.yml").read_text()


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_pre_commit_runs_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    linted = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert linted is not None
    named = {hook["entry"].removesuffix(" --fix") for hook in hooks}
    assert named == {each.removesuffix(" .").removesuffix(" --check") for each in re.findall(r"-m (.+)", linted[1])}


TARGETS = re.compile(r"\]\(([^)\s]+)\)")


def absolute_links() -> Any:
    """What the release runs, as a module."""
    spec = importlib.util.spec_from_file_location("absolute_links", ROOT / ".github" / "absolute_links.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_links_of_a_release_work_outside_the_repository() -> None:
    """On PyPI's page: a target is a heading, or absolute, of the release's tag, and names a file that there is."""
    readme, home = (ROOT / PROJECT["project"]["readme"]).read_text(), "https://example.org/owner/name"
    before, after = TARGETS.findall(readme), TARGETS.findall(absolute_links().absolute(readme, home, "v1.2"))
    assert len(before) == len(after) > 20
    assert [target for target in after if not target.startswith(("https://", "#"))] == []
    own = [target.removeprefix(f"{home}/") for target in after if target.startswith(home)]
    assert len(own) == len([target for target in before if "://" not in target and not target.startswith("#")])
    files = {target.partition("#")[0] for target in own if not target.startswith("actions/")}
    assert all(re.match(r"(blob|raw)/v1\.2/", file) for file in files)
    assert all((ROOT / file.split("/", 2)[2]).is_file() for file in files), files
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", readme)
    assert {f"raw/v1.2/{picture}" for picture in pictures if not picture.startswith("..")} <= files


def test_absolute_links() -> None:
    text = "![a](docs/a.png) [b](b.md#c) [d](#d) [e](https://x.org/e.md) [![f](../../f.svg)](../../f)"
    assert absolute_links().absolute(text, "https://h/o/n", "v1") == (
        "![a](https://h/o/n/raw/v1/docs/a.png) [b](https://h/o/n/blob/v1/b.md#c) [d](#d) [e](https://x.org/e.md) "
        "[![f](https://h/o/n/f.svg)](https://h/o/n/f)"
    )


def test_a_release_writes_its_links_before_it_builds() -> None:
    commands = steps(ROOT / ".github" / "workflows" / "release.yml")
    (written,) = [place for place, command in enumerate(commands) if "absolute_links.py" in command]
    assert written < commands.index("python -m build")
