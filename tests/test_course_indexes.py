"""Glossary, search, mistakes, answer keys, and the pages made from the records."""

import re

import pytest

from minimistral import cli
from minimistral.course import glossary, mistakes, search
from minimistral.course.answers import answer_key, asked
from minimistral.course.exercises import all_exercises, chapter_exercises
from minimistral.course.glossary import terms
from minimistral.course.indexes import pages, plain
from minimistral.course.search import find_sections
from minimistral.course.sections import read_sections, section_of
from minimistral.course.syllabus import CHAPTERS, chapter


def test_the_pages_are_what_the_records_say():
    stale = [path.name for path, text in pages().items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    assert stale == [], "python -m minimistral.course.indexes writes them anew"


def test_the_exercises_page_has_every_exercise_with_its_question_and_mistakes():
    text = next(t for path, t in pages().items() if path.name == "exercises.md")
    for e in all_exercises():
        assert f"\n`{e.name}` · " in text and plain(" ".join(e.hints[0].text.split())) in text
        assert plain(e.misconceptions[0].message) in text


def test_the_mistakes_page_has_every_mistake():
    text = next(t for path, t in pages().items() if path.name == "mistakes.md")
    assert all(plain(m.message) in text for e in all_exercises() for m in e.misconceptions)
    assert text.count("<details>") == text.count("</details>") == len(all_exercises())


def test_markdown_signs_in_messages_are_escaped():
    assert plain("a * b < [c] `d * e`") == r"a \* b \< \[c\] `d * e`"


def test_every_exercise_is_found_in_a_section():
    assert [e.key for e in all_exercises() if section_of(e.name, chapter(e.chapter)) is None] == []


# ---------------------------------------------------------------- glossary


def new_words(chapter) -> tuple[str, ...]:
    """The terms that a chapter's recap names, in its order."""
    text = "\n\n".join(part.text for section in read_sections(chapter) for part in section.parts
                       if part.kind == "markdown")
    named = re.search(r"^New words: (.*?\.)$", text, re.M | re.S)
    return tuple(word.replace("\n", " ") for word in re.findall(r"\*([^*]+)\*", named[1])) if named else ()


def test_the_glossary_has_every_new_word_of_every_recap():
    known = {(number, name) for t in terms() for number in t.chapters for name in (t.word, t.plain)}
    missing = [(c.number, word) for c in CHAPTERS for word in new_words(c) if (c.number, word) not in known]
    assert missing == []
    assert len(new_words(chapter(14))) == 8  # a list over two lines is read whole


def test_a_word_is_defined_once_and_shortly():
    names = [t.term for t in terms()]
    assert len(names) == len(set(names)) and names == sorted(names, key=str.casefold)
    for t in terms():
        assert t.definition.endswith(".") and 4 <= len(t.definition.split()) <= 45, t.term
        assert t.word.casefold() not in t.definition.casefold().split()[:2], f"{t.term} is defined by itself"


def test_two_senses_of_a_word_are_both_told():
    text = str(glossary("Block"))
    assert "chapter 4" in text and "chapter 8" in text
    assert "chapter 9" in str(glossary("active parameters"))


def test_an_unknown_word_gets_a_suggestion():
    with pytest.raises(ValueError, match="did you mean cache"):
        glossary("chache")


# ---------------------------------------------------------------- search


@pytest.mark.parametrize("words, number, title", [
    ("rolling buffer", 8, "The ring"),
    ("temperature", 6, "Temperature"),
    ("why divide square root", 2, "Why divide by a square root"),
    ("LoRA", 13, "Two narrow matrices"),
    ("logit lens", 4, "When does it know?"),
    ("def rotate", 3, "Your turn: the rotation"),
])
def test_the_best_hit_is_the_section_about_it(words, number, title):
    best = find_sections(words)[0]
    assert (best.section.chapter.number, best.section.title) == (number, title)


def test_all_words_are_wanted_and_beginnings_are_enough():
    assert find_sections("rolling zebra") == []
    whole, beginnings = ({(h.section.path, h.section.title) for h in find_sections(words)}
                         for words in ("rolling buffer", "roll buff"))
    assert whole and whole <= beginnings


def test_a_snippet_shows_a_word_and_is_short():
    for hit in find_sections("softmax axis"):
        assert len(hit.snippet) <= 160 and re.search("softmax|axis", hit.snippet, re.I)


def test_a_result_links_to_the_heading(monkeypatch, tmp_path):
    folder = tmp_path / "exercises"
    folder.mkdir()
    monkeypatch.chdir(folder)
    page = search("rolling buffer")._repr_html_()
    assert 'href="../notebooks/08_sliding_window.ipynb#The-ring"' in page


def test_solutions_are_not_searched():
    assert {h.section.folder for h in find_sections("return")} == {"notebooks", "exercises"}


def test_mistakes_of_a_chapter_an_exercise_and_a_word():
    assert "ring not wiped between texts" in str(mistakes(8))
    listed = str(mistakes("attend"))
    assert all(m.name in listed for e in chapter_exercises(2) if e.name == "attend" for m in e.misconceptions)
    found = str(mistakes("NaN"))
    assert "ch02.stable_softmax" in found and "squares in float16" in found
    assert str(mistakes("zebra")).endswith("Try fewer, or only their beginnings.")


@pytest.mark.parametrize("command, expected", [
    (["search", "rolling", "buffer"], "Chapter 8"), (["glossary", "stop", "token"], "ends the text"),
    (["mistakes", "3"], "chapter 3"), (["glossary"], "window"),
])
def test_commands(command, expected, capsys):
    assert cli.main(command) == 0
    assert expected in capsys.readouterr().out


def test_a_wrong_word_is_one_line(capsys):
    assert cli.main(["glossary", "zebra"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# ---------------------------------------------------------------- answers


def test_every_prediction_of_a_core_has_its_answer():
    assert [(c.number, q.question) for c in CHAPTERS for q in asked(c) if not q.answer] == []
    first = asked(chapter(8))[0]
    assert first.answer == "C false" and "Mistral's innovation" in first.question and len(first.options) == 4


def test_the_key_spells_orders_and_names_the_library_cell():
    key = answer_key(chapter(8))
    order = next(e for e in chapter_exercises(8) if e.kind == "order")
    assert f"`{order.spell(order.right_orders[0])}`" in key and "minimistral.cache.LayerCache.write" in key


def test_sections_keep_every_cell():
    import nbformat

    from minimistral.lab import course_folder

    path = course_folder() / chapter(0).path()  # has headings in the middle of cells
    n_code = sum(c.cell_type == "code" for c in nbformat.read(path, 4).cells)
    assert sum(len(s.cells) for s in read_sections(chapter(0))) == n_code
