"""A pytest plugin that writes what became of every test as JSON; of a test with subtests, the worst counts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Outcomes"]

_ORDER = ("passed", "skipped", "failed")

Outcomes = dict[str, dict[str, Any]]

_found: Outcomes = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Notes one phase of a test, or one subtest."""
    name = "::".join(report.nodeid.split("::")[1:])
    test = _found.setdefault(name, {"outcome": "passed", "message": "", "seconds": 0.0, "patched": 0, "merged": 0})
    test["seconds"] += report.duration
    subtest = type(report) is not pytest.TestReport
    outcome = "passed" if subtest and report.outcome == "skipped" else report.outcome
    if _ORDER.index(outcome) > _ORDER.index(test["outcome"]):
        test["outcome"], test["message"] = outcome, _message(report)
    test.update({key: value for key, value in report.user_properties if key in ("patched", "merged")})


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the file, in the process that collects the reports of all workers."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["HF_SUITE_REPORT"]).write_text(json.dumps(_found, indent=1, sort_keys=True))


def _message(report: pytest.TestReport) -> str:
    """The error's last line, or why the test was skipped."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(getattr(crash, "message", report.longrepr))
