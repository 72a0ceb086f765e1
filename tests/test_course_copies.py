"""Slides, and the copies for students and instructors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimistral.course.copies import make_copies
from minimistral.course.slides import code, formula, make_slides, markdown, page, shortened, taught, write_slides
from minimistral.course.syllabus import CHAPTERS, chapter
from minimistral.lab import course_folder


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("class")
    return {folder.name: folder for folder in make_copies(out, [2])}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_the_student_has_stories_and_exercises_and_no_solutions(copies):
    found = files(copies["student"])
    assert {"notebooks/02_attention.ipynb", "exercises/02_attention.ipynb", "run.py", "README.md",
            "minimistral/assets/models/tales-dense/consolidated.safetensors"} <= found
    assert not [name for name in found if "solution" in name or name.startswith(("docs/", "answers/", "slides/"))]
    assert not [name for name in found if "__pycache__" in name or name.startswith("notebooks/03")]


def test_the_instructor_has_all_that_and_more(copies):
    student, instructor = files(copies["student"]), files(copies["instructor"])
    assert student <= instructor
    assert {"solutions/02_attention.ipynb", "slides/02_attention.html", "answers/02_attention.md",
            "docs/instructors.md", "docs/exercises.md"} <= instructor


def test_no_exercise_of_the_student_shows_an_answer(copies):
    for path in (copies["student"] / "exercises").glob("*.ipynb"):
        for cell in json.loads(path.read_text("utf-8"))["cells"]:
            assert "PASS ·" not in json.dumps(cell.get("outputs", []), ensure_ascii=False)
            assert "BEGIN SOLUTION" not in "".join(cell["source"])


def test_the_links_of_all_pages_lead_somewhere(copies):
    for page in (page for folder in copies.values() for page in [*folder.glob("*.md"), *folder.glob("docs/*.md")]):
        for target, place in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")):
            aim = page.parent / target if target else page
            assert aim.exists(), f"{page.name}: {target}"
            if place and aim.suffix == ".md":
                headings = re.findall("^#+ (.*)", aim.read_text("utf-8"), re.M)
                assert place in [re.sub(r"[^\w -]", "", h).replace(" ", "-").lower() for h in headings], (page, place)


def test_hint_check_and_search_work_in_the_student_s_copy(copies, tmp_path):
    code = ("import minimistral; from minimistral.course import check, hint, search; "
            "print(minimistral.__file__); print(hint('causal')); print(check('causal', lambda q, k: k < q)); "
            "print(search('softmax axis'))")
    environment = dict(os.environ, PYTHONPATH=str(copies["student"]), MINIMISTRAL_WORK=str(tmp_path))
    environment.pop("MINIMISTRAL_TESTING", None)
    done = subprocess.run([sys.executable, "-c", code], cwd=copies["student"] / "exercises", env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert str(copies["student"]) in done.stdout.splitlines()[0]
    assert "Hint 1 of 3" in done.stdout and "TRY AGAIN" in done.stdout and "Chapter 2" in done.stdout


def test_a_copy_is_never_written_over(copies):
    with pytest.raises(FileExistsError, match="student exists"):
        make_copies(copies["student"].parent, [0])


def test_an_exercise_with_a_passed_check_is_refused(tmp_path):
    from minimistral.course.copies import _refuse_answers

    cell = {"cell_type": "code", "metadata": {}, "outputs": [{"text": "PASS · Who may look at whom"}]}
    path = tmp_path / "02_attention.ipynb"
    path.write_text(json.dumps({"cells": [cell]}), encoding="utf-8")
    with pytest.raises(ValueError, match="shows an answer"):
        _refuse_answers(path)


def test_the_student_s_copy_opens_as_the_learner_s_folder(copies, tmp_path):
    from minimistral.lab import copy_course

    written = {p.as_posix() for p in copy_course(copies["student"], tmp_path)}
    assert written == {f"{folder}/{chapter(n).name}.ipynb" for folder in ("notebooks", "exercises") for n in (0, 2)}


# ---------------------------------------------------------------- slides


@pytest.fixture(scope="module")
def slides():
    return make_slides(2)


def test_every_section_of_the_core_opens_with_a_slide(slides):
    from minimistral.course.sections import read_sections

    opened = [s.title for s in slides if s.kind in ("title", "opening")]
    assert opened == [s.title for s in read_sections(chapter(2)) if not s.further]


def test_predictions_figures_and_pieces_are_slides_and_library_cells_are_not(slides):
    kinds = [s.kind for s in slides]
    assert kinds.count("predict") == 8 and kinds.count("reveal") == 8
    assert kinds.count("turn") == 2 and kinds.count("figure") >= 8 and kinds.count("short") >= 6
    assert not any("minimistral/attention.py" in s.body for s in slides)
    pictures = sum(s.body.count("<img") for s in slides if s.kind == "figure")
    assert pictures == kinds.count("figure") and all("alt=" in s.body for s in slides if s.kind == "figure")


def test_an_answer_stands_below_its_question(slides):
    bodies = [s.body for s in slides if s.kind == "reveal"]
    assert all("<p class=asked>" in body for body in bodies)
    assert "“" in bodies[-1]  # the verdict repeats the headline
    asked = [s.body for s in make_slides(3) if "We put 100 words in front" in s.body]
    assert len(asked) == 2  # a question with a number that the cell computes


def test_what_folds_stands_open_in_the_notes():
    assert "<details open>" in page(chapter(10), make_slides(10, further=True))
    assert "<details>" not in page(chapter(10), make_slides(10, further=True))


def test_a_function_stays_on_one_slide(slides):
    codes = [re.sub("<[^>]+>", "", s.body) for s in slides if s.kind == "code"]
    (maps,) = (code for code in codes if "def attention_maps" in code)
    assert "return torch.stack(kept)" in maps


def test_no_heading_stands_alone(slides):
    opened = {s.title: s.body for s in slides if s.kind == "opening"}
    assert opened["The verdict on the headline"].count("<p class=asked>“") == 1
    assert not [title for title, body in opened.items() if body.endswith("</h2>")]


def test_no_slide_is_too_full(slides):
    for slide in slides:
        code = sum(len(block.splitlines()) for block in re.findall("<pre.*?</pre>", slide.body, re.S))
        text = re.sub(r"<[^>]+>", " ", re.sub(r"<(table|pre).*?</\1>", "", slide.body, flags=re.S))
        assert code <= 20 and len(text.split()) <= 90, slide.title


def test_prose_is_kept_in_the_notes(slides):
    notes = " ".join(note for slide in slides for note in slide.notes)
    assert "Nobody told it *where* the" in notes and "**Ask:**" in notes


def test_the_page_asks_for_nothing(slides):
    text = page(chapter(2), slides)
    assert not re.findall(r"""(?:src|href)=["']?(?!data:)[\w/.:]+""", text)
    assert "https://" not in re.sub(r"<aside.*?</aside>", "", text, flags=re.S) and '<html lang="en">' in text


def test_every_formula_of_the_stories_becomes_a_picture():
    from minimistral.course.sections import read_sections
    from minimistral.course.slides import MATH

    wanted = [(m[1] or m[2]).strip() for c in CHAPTERS for s in read_sections(c) for p in s.parts if p.kind == "markdown"
              for m in MATH.finditer(p.text)]
    assert len(wanted) > 40
    assert [tex for tex in dict.fromkeys(wanted) if not formula(tex, display=True).startswith("<img")] == []


def test_code_is_shown_without_asserts_and_questions():
    cell = 'x = 1                      # a number\nassert x == 1\npredict("a", "what?",\n        ["1"], answer="")\nprint(x)'
    assert taught(cell) == ["x = 1  # a number", "print(x)"]
    assert taught("abc = 1    # one\nx = 2          # two") == ["abc = 1  # one", "x = 2    # two"]
    assert taught("x = 1    # one\n" + 60 * "y" + " = 2  # a longer comment") == [
        "x = 1  # one", 60 * "y" + " = 2  # a longer comment"]
    assert taught("with swap():\n    assert f() == 3\ny = 1") == ["y = 1"]


def test_code_is_as_large_as_its_lines_allow():
    assert "font-size:30px" in code(["x = 1"]) and "font-size:30px" not in code(["x = 1"], beside=60 * ["x"])
    assert "font-size:23px" in code([79 * "x"]) and "font-size:20px" in code([90 * "x"])
    assert taught("for x in y:\n    print(x)\n    assert x\nif x:\n    assert y") == ["for x in y:", "    print(x)"]
    assert taught("not python (") == ["not python ("]


def test_links_between_notebooks_become_words():
    assert markdown("See [chapter 2](02_attention.ipynb).") == "<p>See chapter 2.</p>"


def test_further_is_left_out_unless_asked_for(tmp_path):
    short, n_short = write_slides(0, tmp_path)
    assert short == tmp_path / "00_start_here.html" and n_short > 15
    assert len(make_slides(2, further=True)) > len(make_slides(2))
    with pytest.raises(ValueError, match="no chapter 99"):
        write_slides(99, tmp_path)


def test_a_cell_may_be_left_out_by_its_tag(tmp_path):
    root = course_folder()
    path = root / chapter(0).path()
    notebook = json.loads(path.read_text("utf-8"))
    for cell in notebook["cells"]:
        if "".join(cell["source"]).startswith("models = ch00.shipped()"):
            cell["metadata"]["tags"] = ["slide-skip"]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / chapter(0).path()).write_text(json.dumps(notebook), "utf-8")
    assert len(make_slides(0, root=tmp_path)) == len(make_slides(0)) - 1  # its code with what it prints


@pytest.mark.parametrize("lengths, whole, shown", [
    ((5, 5, 5, 5), 3, 17),  # the fourth would stop after one line
    ((14, 4, 4), 2, 19),    # the empty line comes just behind the last that fits
    ((13, 9), 1, 13),       # the farthest that is near
    ((12, 9), 1, 19),       # too far: six lines of the second are worth more
    ((30,), 0, 19),
])
def test_long_output_is_cut_between_paragraphs_if_one_ends_near(lengths, whole, shown):
    paragraphs = ["\n".join(f"{name}, line {n}" for n in range(length)) for name, length in zip("abcd", lengths)]
    lines = "\n\n".join(paragraphs).splitlines()
    *kept, mark = shortened(lines)
    told = "\n".join(kept).rstrip("\n")
    assert mark == "…" and len(told.splitlines()) == shown and lines[:len(kept)] == kept
    assert told.startswith("\n\n".join(paragraphs[:whole]))
    assert shortened(lines[:20]) == lines[:20]  # a mark would take as much room as the last line


def test_the_first_slide_with_tales_shows_whole_ones():
    (cut,) = (s.body for s in make_slides(0) if s.body.endswith("\n…</pre>"))
    assert cut.endswith(". \n\n…</pre>") and cut.count("\n\n") == 3
