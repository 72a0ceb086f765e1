"""The web edition: a small one of two chapters is built here; `run.py site --check` looks at all pages."""

import json
import re
import runpy
from pathlib import Path

import nbformat
import pytest

from minimistral.course import site, site_pages
from minimistral.course.render import FLAGS, browser
from minimistral.course.site_check import Reading, barriers, pages, problems
from minimistral.course.site_pages import Edition
from minimistral.course.syllabus import chapter

pytest.importorskip("myst_nb")
pytestmark = pytest.mark.filterwarnings("ignore:.*Check CHANGES for Sphinx API:Warning")  # MyST's own

ROOT = Path(__file__).parents[1]
CHAPTERS = (0, 8)
STORY, EXERCISES, ANSWERS = (chapter(8).path(f) for f in ("notebooks", "exercises", "solutions"))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A site of two chapters and all guides, and Sphinx's status."""
    out = tmp_path_factory.mktemp("web") / "site"
    return out, site.build(out, CHAPTERS)


@pytest.fixture
def small(built):
    return built[0]


def html(small, notebook):
    return (small / notebook.replace(".ipynb", ".html")).read_text(encoding="utf-8")


# --- the small site

def test_no_warning_of_sphinx(built):
    assert built[1] == 0, "what is wrong stands in the output: a link that leads nowhere, a page nobody reaches"


def test_nothing_is_wrong_with_links_pictures_and_headings(small):
    assert problems(small) == []
    there = set(pages(small))
    assert {"index.html", "readme.html", "search.html", "solutions/index.html"} <= there
    for folder in ("notebooks", "exercises", "solutions"):
        assert {f"{chapter(n).path(folder)[:-6]}.html" for n in CHAPTERS} <= there
    assert {f"docs/{path.stem}.html" for path in (ROOT / "docs").glob("*.md")} <= there


def test_every_figure_of_a_chapter_is_there_with_its_words_and_its_numbers(small):
    stored = "".join(
        output.get("data", {}).get("text/html", "")
        for cell in nbformat.read(ROOT / STORY, 4).cells for output in cell.get("outputs", ())
    )
    page = html(small, STORY)
    alts = re.findall(r'<img [^>]*alt="([^"]{30,})"', stored)
    assert len(alts) > 10 and re.findall(r'<img src="../figures/[^>]*alt="([^"]{30,})"', page) == alts
    assert page.count("<summary>The numbers of this figure</summary>") == \
        stored.count("<summary>The numbers of this figure</summary>") > 5
    assert "base64" not in page


def test_what_needs_a_kernel_says_so(small):
    page = html(small, STORY)
    assert page.count('class="needs-kernel"') == 2  # two explorers
    assert "window=5, prompt=0" in page and "settings as pictures" in page
    assert 'role="status"' not in page


def test_formulas_are_mathml_and_code_and_folds_stay(small):
    page = html(small, STORY)
    assert "<math" in page and "$$" not in page
    folded = (ROOT / STORY).read_text(encoding="utf-8").count('"imports"')
    assert page.count("Show what the next cell imports") == folded > 0
    assert "within_window" in page


def test_one_page_follows_another(small):
    def neighbours(page):
        found = re.findall(r'<a class="(left|right)-(?:prev|next)"\s+href="([^"]+)"', html(small, page))
        return dict(found)

    assert neighbours(STORY) == {"left": "../exercises/00_start_here.html", "right": "../exercises/08_sliding_window.html"}
    assert neighbours(EXERCISES)["left"] == "../notebooks/08_sliding_window.html"
    nav = html(small, ANSWERS).partition('aria-label="The course"')[2].partition("</nav>")[0]
    parts = re.findall(r'class="caption-text">([^<]+)<', nav)
    assert parts[:3] == ["Begin", "Mistral's three ideas", "While you learn"]


def test_solutions_are_named_so_and_the_exercises_hold_none(small):
    assert "<h1>Solutions 8: The sliding window" in html(small, ANSWERS)
    stub, solved = html(small, EXERCISES), html(small, ANSWERS)
    assert "NOT WRITTEN YET" in stub and "PASS" not in stub
    assert "PASS" in solved and "NOT WRITTEN YET" not in solved


def test_the_index_for_the_search_stands_in_a_script(small):
    text = (small / "searchindex.js").read_text(encoding="utf-8")
    index = json.loads(text.removeprefix("Search.setIndex(").removesuffix(")"))
    names = set()
    for found in (index["titleterms"]["window"], index["terms"]["window"]):  # one number, or several
        names |= {index["docnames"][n] for n in (found if isinstance(found, list) else [found])}
    assert {STORY.removesuffix(".ipynb"), "docs/glossary"} <= names


# --- without a build

def test_an_edition_without_solutions(tmp_path):
    edition = Edition(ROOT, tmp_path, (chapter(8),), solutions=False)
    names = {path.relative_to(tmp_path).as_posix() for path in site_pages.write_sources(edition)}
    assert STORY in names and not [name for name in names if name.startswith("solutions")]
    text = "".join((tmp_path / n).read_text("utf-8") for n in names if n.endswith((".md", ".ipynb")))
    assert not re.search(r"\]\([^)]*solutions/", text)


def test_what_an_earlier_site_had_goes_and_another_folder_is_left_alone(tmp_path):
    out, source = tmp_path / "site", tmp_path / "site-source"
    for name in ("site/index.html", "site/search.html", "site/notebooks/a.html", "site/solutions/a.html", "site/figures/1.png",
                 "site/figures/2.png", "site/_static/b.html", "site-source/index.md", "site-source/notebooks/a.ipynb",
                 "site-source/extra/figures/1.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="something else"):
        site.build(out)
    site.remove_old(out, source)
    left = {path.relative_to(out).as_posix() for path in out.rglob("*.*")}
    assert left == {"index.html", "search.html", "notebooks/a.html", "figures/1.png", "_static/b.html"}


def test_sources_that_stay_the_same_are_not_written_again_and_old_ones_go(tmp_path):
    edition = Edition(ROOT, tmp_path, (chapter(0),))
    first = {path: path.stat().st_mtime_ns for path in site_pages.write_sources(edition)}
    (tmp_path / "old.md").write_text("old", encoding="utf-8")
    site_pages.write_sources(edition)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    assert not (tmp_path / "old.md").exists()


@pytest.mark.parametrize("before, after", [
    ("[a](CONTRIBUTING.md)", "[a](../contributing.md)"),
    ("[a](docs/other.md#place)", "[a](../docs/other.md#place)"),
    ("[`a`](run.py) and [b](#there)", "`a` and [b](#there)"),
    ("[a](https://example.org/x)", "[a](https://example.org/x)"),
    ("```\n[a](run.py)\n```\n[a](run.py)", "```\n[a](run.py)\n```\na"),
    ("[a](missing.py)", "[a](missing.py)"),
    ("[![words](docs/p.svg)](https://example.org)", "[![words](../docs/p.svg)](https://example.org)"),
])
def test_links_lead_to_pages_or_become_words(tmp_path, before, after, monkeypatch):
    monkeypatch.delenv("MINIMISTRAL_REPOSITORY", raising=False)
    monkeypatch.setattr("minimistral.course.address.REPOSITORY", "")
    (tmp_path / "docs").mkdir()
    for name in ("CONTRIBUTING.md", "docs/other.md", "run.py", "docs/p.svg"):
        (tmp_path / name).touch()
    files = {}
    edition = Edition(tmp_path, tmp_path / "source", ())
    assert site_pages.relinked(edition, before, "README.md", "deep/page.md", files) == after
    assert list(files) == re.findall(r"docs/p\.svg", before)
    if "run.py" in before:
        monkeypatch.setenv("MINIMISTRAL_REPOSITORY", "https://github.com/name/course")
        text = site_pages.relinked(edition, before, "README.md", "deep/page.md", files)
        assert "(https://github.com/name/course/blob/main/run.py)" in text


def test_every_formula_of_the_course_can_be_drawn():
    mathml = runpy.run_path(str(ROOT / "docs/site/conf.py"))["mathml"]
    found = 0
    for path in ROOT.glob("*/[0-9][0-9]_*.ipynb"):
        for cell in nbformat.read(path, 4).cells:
            if cell.cell_type == "markdown":
                for block, tex in re.findall(r"(\$\$?)([^$]+)\$\$?", cell.source):
                    found += mathml(tex, len(block) == 2).startswith("<math")
    assert found > 50


@pytest.mark.parametrize("body, said", [
    ('<h1>A</h1><a href="b.html">b</a>', "leads nowhere: b.html"),
    ('<h1>A</h1><a href="#there">b</a>', "not there: #there"),
    ('<h1>A</h1><a href="../a.html">b</a>', "leads nowhere: ../a.html"),
    ('<h1>A</h1><h3>B</h3>', "level 3 below one of level 1"),
    ('<h2>A</h2>', "headings of these levels"),
    ('<h1>A</h1><img src="data:,">', "a picture without a text"),
    ('<h1>A</h1><figure><img src="data:," alt="too short"></figure>', "'too short'"),
    ('<h1>A</h1><script src="https://example.org/x.js"></script>', "loads https://example.org/x.js"),
    ('<h1>A</h1><img src="x.png" alt="x">', "loads x.png"),
    ('<h1 id="a">A</h1><p id="a"></p>', "the id a stands here twice"),
    ('<h1>A</h1><iframe srcdoc="x"></iframe>', "a frame without a title"),
])
def test_each_fault_of_a_page_is_found(tmp_path, body, said):
    site_folder = tmp_path / "site"
    site_folder.mkdir()
    (site_folder / "a.html").write_text(f'<html lang="en"><body>{body}</body></html>', encoding="utf-8")
    (found,) = problems(site_folder)
    assert found.startswith("a.html: ") and said in found


def test_a_page_without_fault(tmp_path):
    good = '<html lang="en"><h1 id="a b">A</h1><h2>B</h2><a href="#a%20b">a</a><a href="https://example.org">b</a></html>'
    (tmp_path / "a.html").write_text(good, encoding="utf-8")
    assert problems(tmp_path) == [] and Reading(good).language == "en"


# --- in a browser

@pytest.fixture
def tab(tmp_path):
    sync_api = pytest.importorskip("playwright.sync_api")
    if browser() is None:
        pytest.skip("no Chromium or Chrome here; CHROME names one")
    with sync_api.sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=browser(), args=FLAGS)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        chromium.close()


def test_no_serious_barrier_in_light_dark_and_on_a_narrow_screen(small):
    pytest.importorskip("axe_playwright_python")
    if browser() is None:
        pytest.skip("no Chromium or Chrome here; CHROME names one")
    assert list(barriers(small, ["index.html", "exercises/00_start_here.html"])) == []


def test_a_barrier_is_found(tmp_path):
    pytest.importorskip("axe_playwright_python")
    if browser() is None:
        pytest.skip("no Chromium or Chrome here; CHROME names one")
    page = '<html lang="en"><title>a</title><main><h1>A</h1><p style="color:#aaa;background:#fff">pale</p></main></html>'
    (tmp_path / "a.html").write_text(page, encoding="utf-8")
    (found,) = barriers(tmp_path, ["a.html"], views=[("light", 1280, {})])
    assert "color-contrast, serious" in found


def test_search_from_a_file(small, tab):
    tab.goto((small / "search.html").as_uri() + "?q=window")
    tab.locator("#search-results li a").first.wait_for()
    links = tab.locator("#search-results li a").all_inner_texts()
    assert "The sliding window" in links[0] and len(links) > 3
    quoted = tab.locator("#search-results ul.search > li").first.locator("ul > li")
    quoted.first.wait_for()
    assert "window" in quoted.first.locator("mark").inner_text().lower()
    quoted.get_by_role("link").last.click()
    tab.wait_for_url("**/notebooks/08_sliding_window.html#*")


def test_a_search_finds_stories_first(small, tab):
    tab.goto((small / "search.html").as_uri() + "?q=loss")
    tab.get_by_text("Search finished").wait_for()
    found = tab.locator("#search-results ul.search > li > a").all_inner_texts()
    equals = found[found.index("0. Start here"):][:4]  # after those with the word in a heading
    assert equals == ["0. Start here", "8. The sliding window", "Exercises 8: The sliding window",
                      "Solutions 8: The sliding window"]


def test_what_a_search_quotes_is_the_text_of_each_section(small):
    text = (small / "searchtext.js").read_text(encoding="utf-8")
    sections = json.loads(text.removeprefix("window.courseText = ").rstrip(";\n"))[STORY.replace("ipynb", "html")]
    places = {id: (heading, text) for id, heading, text in sections}
    heading, text = places["a-text-that-does-not-end"]
    assert heading == "A text that does not end" and "twenty tales" in text
    assert "#" not in "".join(heading for heading, _ in places.values())
    ids = Reading(html(small, STORY)).ids
    assert len(places) > 15 and set(places) <= ids


def test_keyboard_first_to_the_text_and_then_through_the_bar(small, tab):
    tab.goto((small / "index.html").as_uri())
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#main-content"
    fold = tab.locator(".bd-docs-nav summary").first
    fold.focus()
    tab.keyboard.press("Enter")
    below = tab.get_by_role("link", name="Exercises", exact=True).first
    assert below.is_visible()
    below.focus()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/exercises/00_start_here.html")


def test_paper_shows_what_is_folded_and_no_navigation(small, tab):
    tab.goto((small / "notebooks/08_sliding_window.html").as_uri())
    tab.emulate_media(media="print")
    folded = tab.locator("article details:not([open])").count()
    assert folded > 5
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.locator("article details:not([open])").count() == 0
    assert not tab.locator("#pst-primary-sidebar").is_visible()
    assert not tab.locator("#pst-header").is_visible()
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("article details:not([open])").count() == folded
