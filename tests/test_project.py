"""What stands around the code: workflows, forms and hooks name only what is there."""

from __future__ import annotations

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
