"""The plans of the instructor's guide, read from its tables."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .notebook_library import ROOT
from .syllabus import Chapter, chapter

GUIDE = ROOT / "docs" / "instructors.md"
PLAN = re.compile(r"^## Plan: .*?\((\d+) minutes\)$", re.M)
ROW = re.compile(r"^\| *(\d+) *\| *([^|]*?) *\| *([^|]*?) *\| *([^|]*?) *\|$", re.M)
NAMES = re.compile(r"“([^”]+)”")


@dataclass(frozen=True)
class Step:
    """One row: minutes, the chapter (None for breaks and words), its sections, what happens."""

    minutes: int
    chapter: Chapter | None
    sections: tuple[str, ...]
    what: str


@dataclass(frozen=True)
class Plan:
    """A plan of the guide; ``minutes`` is what its heading promises."""

    title: str
    minutes: int
    steps: tuple[Step, ...]

    def by_chapter(self) -> dict[Chapter, set[str]]:
        """The sections of each chapter, in the plan's order."""
        found: dict[Chapter, set[str]] = {}
        for step in self.steps:
            if step.chapter is not None:
                found.setdefault(step.chapter, set()).update(step.sections)
        return found


def read_plans(guide: str) -> list[Plan]:
    """Every table below a heading "## Plan: ... (90 minutes)": minutes, chapter, section, what happens."""
    plans = []
    heads = list(PLAN.finditer(guide))
    for head in heads:
        end = guide.find("\n## ", head.end())
        body = guide[head.end(): end if end > 0 else len(guide)]
        steps = tuple(
            Step(int(minutes), chapter(int(number)) if number.isdigit() else None, tuple(NAMES.findall(names)), what)
            for minutes, number, names, what in ROW.findall(body)
        )
        plans.append(Plan(head[0].removeprefix("## "), int(head[1]), steps))
    return plans
