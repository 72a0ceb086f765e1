"""The mutation report: mutants, the record that is kept, the pages made from it."""

import ast
import copy
import dataclasses
import json

import pytest
import torch
from course_examples import WEIGHTS, weights_of

from minimistral.course import mutation, report, report_page
from minimistral.course.exercises import all_exercises, find_exercise
from minimistral.course.mutation import Program, build, mutants, program_of, tried
from minimistral.course.survivors import SAME

RENEW = "renew it with: python3 run.py report --quick {:02d}"
RECORD = json.loads(report.RECORD.read_text(encoding="utf-8"))


def softened(x, n=2):
    """Two is a number here, and 3 in this docstring is none."""
    if n > 2:
        x = x.float()
    total = x[1:n] + 1.5
    total += n
    return torch.sub(total, n)


def program(function) -> Program:
    tree = mutation.tree_of(function).body[0]
    return Program(tree, globals(), frozenset(range(1, 100)))


def test_each_mutant_differs_in_one_place_and_has_a_name_of_its_own():
    made = mutants(program(softened))
    names = [m.name for m in made]
    assert len(set(names)) == len(names)
    assert names == [m.name for m in mutants(program(softened))], "always the same, in the same order"
    for change in ("n > 2 -> n >= 2  in  if n > 2:", "2 -> 3  in  if n > 2:", "if n > 2: -> if True:",
                   "x.float() -> x  in  x = x.float()", "x[1:n] + 1.5 -> x[1:n] - 1.5  in  total = x[1:n] + 1.5",
                   "1.5 -> 3.0  in  total = x[1:n] + 1.5", "1:n -> :n  in  total = x[1:n] + 1.5",
                   "total += n -> nothing", "total += n -> total -= n",
                   "torch.sub(total, n) -> torch.sub(n, total)  in  return torch.sub(total, n)"):
        assert change in names, names
    assert not any("docstring" in name for name in names), "a text is no code, and a default is not written"
    plain = ast.unparse(program(softened).tree)
    texts = {ast.unparse(m.tree) for m in made}
    assert plain not in texts and len(texts) == len(made)


def test_a_mutant_runs():
    wrong = next(m for m in mutants(program(softened)) if m.name == "total += n -> total -= n")
    x = torch.tensor([1.0, 4.0])
    assert build(program(softened).tree, globals())(x).item() == 5.5
    assert build(wrong.tree, globals())(x).item() == 1.5


def test_mutants_go_through_the_check_and_a_weak_fixture_lets_one_pass():
    def square():
        return (torch.eye(3),)

    exercise = dataclasses.replace(WEIGHTS, chapter=98, reference=weights_of)
    assert [m.name for m, result in tried(exercise) if result.passed] == []
    weak = dataclasses.replace(exercise, fixtures=(square,))
    passed = [m.name for m, result in tried(weak) if result.passed]
    line = "return torch.softmax(scores, -1)"
    assert passed == [f"1 -> 2  in  {line}", f"1 -> 0  in  {line}"], "rows and columns are alike"


@pytest.mark.parametrize("key", ["ch02.causal", "ch02.stable_softmax", "ch08.within_window"])
def test_a_sample_of_the_mutants_is_refused(key):
    passed = [m.name for m, result in tried(find_exercise(key)) if result.passed]
    assert passed == list(SAME.get(key, {}))


def test_every_program_is_found():
    without = {e.key for e in all_exercises() if e.kind not in report.TYPED and not program_of(e)}
    without -= {"ch00.share_of_tales"}  # a line in the story of chapter 0
    assert not without, f"no function of this name in solutions/src: {without}"


@pytest.mark.parametrize("key", SAME)
def test_every_reason_belongs_to_a_mutant(key):
    names = {m.name for m in mutants(program_of(find_exercise(key)))}
    assert not SAME[key].keys() - names, f"no longer a mutant of {key}: drop the reason, or write it anew"


# ---------------------------------------------------------------- the record


def test_the_record_tells_what_stands_on_record_now():
    for exercise in all_exercises():
        row = RECORD["exercises"].get(exercise.key, {})
        now = report.on_record(exercise)
        assert {k: row.get(k) for k in now} == now, RENEW.format(exercise.chapter)
    gone = RECORD["exercises"].keys() - {e.key for e in all_exercises()}
    assert not gone, f"{gone} are gone; {RENEW.format(min(RECORD['exercises'][k]['chapter'] for k in gone))}"


def test_the_record_has_every_notebook():
    names = {target.name for target in report.build.targets()}
    assert RECORD["notebooks"].keys() == names, "renew it with: python3 run.py report"


def test_every_row_says_where_it_was_measured():
    for row in RECORD["exercises"].values():
        assert {"command", "date", "processor", "python", "torch"} <= set(RECORD["runs"][row["run"]])


def test_the_page_is_made_from_the_record():
    made = report.PAGE.read_text(encoding="utf-8")
    assert made == report_page.markdown(RECORD), "make it with: python3 run.py report --pages"


def test_new_rows_replace_old_ones_and_the_seconds_of_a_notebook_stay():
    name, key = "notebooks/02_attention.ipynb", "ch02.attend"
    old = {**copy.deepcopy(RECORD), "runs": {"then": {}, "long ago": {}}}
    old["notebooks"][name] |= {"seconds": 7.5, "run": "then"}
    new = {"runs": {"now": {}}, "exercises": {key: {**RECORD["exercises"][key], "seconds": 1, "run": "now"}},
           "notebooks": {name: {**report.stored(report.ROOT / name), "chapter": 2}}}
    made = report.merged(old, new)
    assert made["exercises"][key]["seconds"] == 1 and made["notebooks"][name]["seconds"] == 7.5
    assert set(made["runs"]) == {"then", "now"}, "what no row names any more is dropped"
    assert list(made["exercises"]) == [e.key for e in all_exercises() if e.key in RECORD["exercises"]]


# ---------------------------------------------------------------- what falls short


def worse(change) -> list[str]:
    record = copy.deepcopy(RECORD)
    change(record["exercises"]["ch02.attend"], record["notebooks"]["notebooks/02_attention.ipynb"])
    return [s for s in report_page.shortfalls(record) if s not in report_page.shortfalls(RECORD)]


@pytest.mark.parametrize("change, words", [
    (lambda e, n: e.update(refused=e["refused"] - 1), "1 misconceptions pass"),
    (lambda e, n: e.update(diagnosed=0), "not told with their own message"),
    (lambda e, n: e.update(accepted=e["accepted"] - 2), "2 right solutions are refused"),
    (lambda e, n: e["survivors"].update({"1 -> 2": None}), "a mutant passes: 1 -> 2"),
    (lambda e, n: e.update(problems=["no hint"]), "ch02.attend: no hint"),
    (lambda e, n: n.update(ignored=["times"] * n["outputs"]), "0 of"),
    (lambda e, n: n.update(slowest_cell_seconds=11), "a cell takes 11 seconds"),
    (lambda e, n: n.update(seconds=61), "chapter 2: its notebooks take"),
])
def test_what_falls_short_is_said(change, words):
    assert any(words in sentence for sentence in worse(change))


def test_the_html_page_marks_what_falls_short_and_asks_nobody_else():
    record = copy.deepcopy(RECORD)
    record["exercises"]["ch02.attend"]["survivors"]["a < b -> a <= b"] = None
    page = report_page.html(record)
    assert "a &lt; b -&gt; a &lt;= b" in page and 'class="short"' in page
    assert "http" not in page and "src=" not in page and "@import" not in page
