"""What a check found, rule by rule: as a table, as JSON, as JUnit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal
from xml.etree import ElementTree

from attnzoo.results.table import Column, Table

Status = Literal["holds", "fails", "refused", "not applicable"]


@dataclass(frozen=True)
class Finding:
    """What is known of one rule.

    rule, says: its name, and what it says
    status: holds; fails; refused (the callable raised an error on every call); not applicable
    found: why, or what was measured
    trial: the smallest call that fails, with its seed
    calls: how many calls were tried
    """

    rule: str
    says: str
    status: Status
    found: str = ""
    trial: str = ""
    calls: int = 0


@dataclass(frozen=True)
class Report:
    """What a check found.

    subject: the callable, by name
    like: what it was checked against; "" where nothing says
    dialect: how it was called
    findings: one for every rule
    """

    subject: str
    like: str
    dialect: str
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        """Whether no rule fails, and at least one holds."""
        kinds = {one.status for one in self.findings}
        return "fails" not in kinds and "holds" in kinds

    def of(self, rule: str) -> Finding:
        """What was found of one rule. Raises KeyError where it was not asked."""
        return {one.rule: one for one in self.findings}[rule]

    def table(self) -> Table:
        """A row for every rule."""
        columns = [
            Column(key, key, words=True) for key in ("rule", "status", "found", "smallest call")
        ]
        rows = [
            {
                "rule": one.rule,
                "status": one.status,
                "found": one.found,
                "smallest call": one.trial,
            }
            for one in self.findings
        ]
        against = f" against {self.like}" if self.like else ""
        return Table(
            "check",
            f"{self.subject}{against}, called as {self.dialect}",
            "",
            tuple(columns),
            tuple(rows),
        )

    def __str__(self) -> str:
        lines = [self.table().title]
        wide = max(len(one.rule) for one in self.findings)
        for one in self.findings:
            line = f"  {one.rule:<{wide}}  {one.status:<14}  {one.found}".rstrip()
            lines.append(line + (f" [{one.trial}]" if one.trial else ""))
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        return json.dumps({**asdict(self), "holds": self.holds}, indent=2)

    def to_junit(self) -> str:
        """A test suite of one case a rule; what is refused or not applicable is skipped."""
        counts = {kind: sum(one.status == kind for one in self.findings) for kind in ("fails",)}
        skipped = sum(one.status in ("refused", "not applicable") for one in self.findings)
        suite = ElementTree.Element(
            "testsuite",
            name=self.table().title,
            tests=str(len(self.findings)),
            failures=str(counts["fails"]),
            skipped=str(skipped),
        )
        for one in self.findings:
            case = ElementTree.SubElement(suite, "testcase", classname=self.subject, name=one.rule)
            if one.status == "fails":
                failure = ElementTree.SubElement(case, "failure", message=one.found)
                failure.text = one.trial
            elif one.status != "holds":
                ElementTree.SubElement(case, "skipped", message=f"{one.status}: {one.found}")
        return ElementTree.tostring(suite, encoding="unicode")
