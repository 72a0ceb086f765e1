"""The instructor's plans name what exists, and their minutes add up."""

import json
import re

import pytest

from minimistral.course import plans
from minimistral.course.exercises import chapter_exercises
from minimistral.course.indexes import MEASURED, minutes_of_sections
from minimistral.course.sections import read_sections
from minimistral.course.syllabus import CHAPTERS, chapter

GUIDE = plans.GUIDE.read_text(encoding="utf-8")
PLANS = plans.read_plans(GUIDE)
each_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda p: str(p.minutes))


def titles(number: int) -> list[str]:
    return [section.title for section in read_sections(chapter(number))]


def test_there_are_three_plans():
    assert [plan.minutes for plan in PLANS] == [90, 240, 840]


@each_plan
def test_minutes_add_up(plan):
    assert sum(step.minutes for step in plan.steps) == plan.minutes


@each_plan
def test_every_section_exists_and_stands_once_in_the_story_s_order(plan):
    for one in {step.chapter for step in plan.steps if step.chapter}:
        named = [name for step in plan.steps if step.chapter == one for name in step.sections]
        order = titles(one.number)
        assert [name for name in named if name not in order] == [], f"chapter {one.number}"
        assert named == sorted(set(named), key=order.index), f"chapter {one.number}: twice, or out of order"


@each_plan
def test_every_exercise_exists_in_its_chapter_and_fits_its_step(plan):
    for step in plan.steps:
        if step.chapter is None:
            continue
        known = {e.name: e for e in chapter_exercises(step.chapter.number)}
        names = re.findall(r"`(\w+)`", step.what)
        assert [name for name in names if name not in known] == [], step
        shown = [name for name in names if f"you show `{name}`" not in step.what]
        assert sum(known[name].minutes for name in shown) <= step.minutes, step
        assert step.sections or names, f"a step without a section or an exercise: {step}"


@each_plan
def test_a_piece_is_named_with_its_own_section(plan):
    from minimistral.course.sections import section_of

    for step in plan.steps:
        if step.chapter and step.sections:
            for name in re.findall(r"`(\w+)`", step.what):
                section = section_of(name, step.chapter)
                assert section.title in step.sections or "you show" in step.what, (name, section.title)


def test_the_two_days_hold_every_core_piece_of_chapters_0_to_11():
    named = {(s.chapter.number, n) for s in PLANS[2].steps if s.chapter for n in re.findall(r"`(\w+)`", s.what)}
    core = {(e.chapter, e.name) for n in range(12) for e in chapter_exercises(n) if e.piece}
    further = {(5, "accumulate_gradients")}  # written under Further
    assert core - named == further
    assert {step.chapter.number for step in PLANS[2].steps if step.chapter} == set(range(12))


def test_the_other_plans_have_their_chapters():
    assert [[c.number for c in plan.by_chapter()] for plan in PLANS[:2]] == [[0, 2, 8], [2, 6, 7, 8]]


def test_cut_lists_and_predictions_name_sections_that_exist():
    every = {t for c in CHAPTERS for t in titles(c.number)}
    parts = re.findall(r"\*\*Late\?.*?(?=\n## )", GUIDE, re.S)
    assert len(parts) == 3
    for part in parts:
        assert [name for name in re.findall("“([^”]+)”", part) if name not in every] == []
    table = GUIDE.split("## Predictions")[1].split("## What to say")[0]
    for number, name in re.findall(r"^\| (\d+) \| “([^”]+)” \|", table, re.M):
        assert name in titles(int(number))


def test_exercises_in_where_people_get_stuck_exist():
    table = GUIDE.split("## Where people get stuck")[1].split("\n## ")[0]
    for name, number in re.findall(r"^\| `(\w+)`, chapter (\d+) \|", table, re.M):
        assert name in [e.name for e in chapter_exercises(int(number))]


def test_minutes_of_sections_add_up_to_the_core():
    for one in CHAPTERS:
        assert sum(minutes_of_sections(one).values()) == one.core_minutes


def test_every_story_is_measured_with_its_sections_of_today():
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))["chapters"]
    for one in CHAPTERS:
        rows = measured[one.name]
        assert [row["section"] for row in rows["sections"]] == titles(one.number), (
            f"chapter {one.number}'s headings changed: python benchmarks/sections.py {one.number}")
        assert rows["provenance"]["cores"] and rows["provenance"]["date"]


@pytest.mark.parametrize("number", range(15))
def test_a_story_says_the_minutes_of_the_syllabus(number):
    told = read_sections(chapter(number))[0].parts[0].text
    minutes = chapter(number).core_minutes
    assert ("takes ten minutes" if number == 0 else f"The core takes {minutes} minutes") in told


def machine_seconds(measured: dict, step: plans.Step) -> float:
    """Seconds that the machine works on a step's sections, their own subsections included."""
    rows = measured["chapters"][step.chapter.name]["sections"] if step.chapter else []
    total, inside = 0.0, False
    for row in rows:
        inside = row["section"] in step.sections or (inside and row["level"] == 3)
        total += row["seconds"] if inside else 0.0
    return total


@each_plan
def test_the_machine_leaves_most_of_each_step_to_the_people(plan):
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    for step in plan.steps:
        assert machine_seconds(measured, step) <= 0.5 * 60 * step.minutes, step


def test_every_plan_was_walked_through_with_its_chapters_of_today():
    walks = json.loads(MEASURED.read_text(encoding="utf-8"))["walks"]
    for plan in PLANS:
        walked = [row["chapter"] for row in walks[str(plan.minutes)]["chapters"]]
        assert walked == [one.number for one in plan.by_chapter()], (
            f"python benchmarks/sections.py --walk {plan.minutes}")
