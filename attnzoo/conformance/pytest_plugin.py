"""A fixture for the tests of your own attention.

In conftest.py:  pytest_plugins = ["attnzoo.conformance.pytest_plugin"]
In a test:       def test_mine(attnzoo_conformance): attnzoo_conformance(mine, like="standard")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from attnzoo.conformance.checking import check
from attnzoo.conformance.findings import Report


@pytest.fixture
def attnzoo_conformance() -> Callable[..., Report]:
    """`attnzoo.conformance.check`, which fails the test with its table where a rule fails or none
    holds."""

    def hold(function: Callable[..., Any], like: str | None = None, **settings: Any) -> Report:
        report = check(function, like, **settings)
        if not report.holds:
            pytest.fail(str(report), pytrace=False)
        return report

    return hold
