"""The progress page: text, HTML and widget, and what it says comes next."""

import builtins
import json

import pytest

from minimistral import cli
from minimistral.course import bet, progress_page, verdict
from minimistral.course.exercises import all_exercises, chapter_exercises, find_exercise
from minimistral.course.progress_page import as_html, as_text, choose, next_step, read_page


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.delenv("MINIMISTRAL_TESTING", raising=False)
    monkeypatch.setenv("MINIMISTRAL_WORK", str(tmp_path))
    return tmp_path


def save(work, exercises=(), **rest):
    entries = {key: {"status": status, "attempts": 3, "hints": 0, "misconceptions": met}
               for key, status, met in exercises}
    data = {"version": 1, "exercises": entries, "predictions": {}, "ladder": [], **rest}
    (work / "progress.json").write_text(json.dumps(data), "utf-8")


def test_at_the_beginning_chapter_0_comes_next(work):
    text = as_text()
    assert "Next: Open chapter 0" in text and "notebooks/00_start_here.ipynb" in text
    assert as_html().count("<details") == 0 and not [line for line in read_page() if line.begun]


def test_what_passed_what_was_met_and_the_ladder_are_told(work):
    row = {"name": "mine", "chapter": 2, "loss": 0.5432}
    save(work, [("ch02.attend", "try again", {"no scale": 2}), ("ch02.causal", "pass", {"strictly before": 1})],
         ladder=[row])
    text, page = as_text(), as_html()
    line = next(line for line in text.splitlines() if line.startswith("2 Attention"))
    assert line.split()[2:5] == ["1", "of", "10"] and "0.5432" in line
    message = next(m.message for m in find_exercise("attend").misconceptions if m.name == "no scale")
    assert message in text and "twice" in text and "passed since" in text
    assert page.count("<details") == 1 and "met twice" in page and 'scope="col"' in page and 'scope="row"' in page


def test_a_bet_is_won_only_once_its_verdict_was_shown(work):
    save(work)
    bet(21, answer="B")
    assert "1 open" in as_text()
    verdict(21, "true with a condition")
    assert "1 of 1" in as_text()
    bet(21, answer="C")
    assert "0 of 1" in as_text()


def test_a_verdict_without_a_bet_writes_nothing(work):
    verdict(21, "true with a condition")
    assert not (work / "progress.json").exists()


def test_the_next_step_is_an_essential_exercise_of_the_newest_chapter(work):
    save(work, [("ch02.causal", "pass", {})])
    said, where = next_step(read_page())
    assert "(attend)" in said and where == "notebooks/02_attention.ipynb"
    save(work, [(e.key, "pass", {}) for e in chapter_exercises(2) if e.piece])
    said, where = next_step(read_page())
    assert where == "exercises/02_attention.ipynb"
    save(work, [(e.key, "pass", {}) for e in chapter_exercises(2) if e.importance == "essential"])
    said, where = next_step(read_page())
    assert "chapter 3" in said and where == "notebooks/03_positions.ipynb"


def test_the_end_of_the_course(work):
    last = [(e.key, "pass", {}) for e in chapter_exercises(14)]
    save(work, last)
    assert "Chapter 0 has open exercises" in next_step(read_page())[0]
    save(work, [(e.key, "pass", {}) for e in all_exercises()])
    assert next_step(read_page())[0] == "Everything has passed."


def test_the_choice_of_chapters(work):
    save(work, [(e.key, "pass", {}) for e in chapter_exercises(0)])
    lines = read_page()
    assert [line.chapter.number for line in choose(lines, "begun")] == [0]
    assert [line.chapter.number for line in choose(lines, "not finished")] == list(range(1, 15))
    assert len(choose(lines, "all chapters")) == 15


def test_the_widget_follows_the_file_and_the_choice(work):
    page = progress_page()
    choice, again, html = page.children
    assert html.value.count("<tr>") == 16
    save(work, [("ch02.causal", "pass", {})])
    again.click()
    assert "1 of 10" in html.value
    choice.value = "begun"
    assert html.value.count("<tr>") == 2 and repr(page).count("Attention") == 1


def test_without_widgets_the_page_is_plain(work, monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    page = progress_page()
    assert "<table" in page._repr_html_() and "Your progress" in repr(page)


def test_links_lead_from_a_notebook_to_its_neighbours(work, monkeypatch, tmp_path):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert 'href="../notebooks/08_sliding_window.ipynb"' in as_html()


def test_the_command_prints_the_page(work, capsys):
    assert cli.main(["progress"]) == 0
    assert "Next: Open chapter 0" in capsys.readouterr().out
