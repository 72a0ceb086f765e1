"""The README's figures are those of the JSON files."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


figures, picture = script("figures"), script("picture")
first_text, memory, pack = script("first_text"), script("memory"), script("pack")


def test_the_picture_of_the_course_shows_the_recorded_ladder():
    remedy = "run: python benchmarks/picture.py"
    assert picture.picture() == picture.PICTURE.read_text(encoding="utf-8"), remedy
    assert f"![{picture.alt()}](benchmarks/course.svg)" in picture.README.read_text(encoding="utf-8"), remedy


def test_readme_and_chart_show_what_was_measured():
    remedy = "run: python benchmarks/figures.py"
    assert figures.section() in (ROOT / "README.md").read_text(encoding="utf-8"), remedy
    assert figures.chart() == figures.CHART.read_text(encoding="utf-8"), remedy


def test_a_row_without_a_record_is_said_to_be_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    made = figures.lines()
    assert all(ours == figures.NO for _, ours, *_ in made)
    assert len(made) > 15 and not figures.bars()
    assert figures.table().endswith(figures.NO)


def test_the_rows_that_stand_open_exist():
    assert figures.FIRST <= {what for what, *_ in figures.lines()}


def test_every_command_names_a_script_and_a_row_that_exist():
    known = (ROOT / "benchmarks" / "inference.py").read_text(encoding="utf-8")
    for *_, command in figures.lines():
        script, *options = command.split()
        assert (ROOT / "benchmarks" / script).exists(), command
        if script == "inference.py":
            assert f'"{options[-1]}":' in known, command


def test_readme_says_what_the_first_start_took():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"<!-- first text -->\n{first_text.sentence()}\n<!-- /first text -->" in text, (
        "run: python benchmarks/first_text.py --only-readme")


def test_the_page_for_hubs_says_what_a_learner_needs():
    page = memory.PAGE.read_text(encoding="utf-8")
    assert f"<!-- memory -->\n{memory.table()}\n<!-- /memory -->" in page, "run: python benchmarks/memory.py --only-page"


def test_the_limit_for_a_learner_leaves_a_fifth():
    rows = {"a": {"peak": 300}, "b": {"peak": 1600}}
    assert memory.limit(100, rows) == 2 and memory.limit(140, rows) == 3


def test_the_page_about_opening_says_what_a_pack_takes():
    page = pack.PAGE.read_text(encoding="utf-8")
    assert f"<!-- pack -->\n{pack.paragraph()}\n<!-- /pack -->" in page, "run: python benchmarks/pack.py --only-page"
