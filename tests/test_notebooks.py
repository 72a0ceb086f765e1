"""The laws that every notebook keeps; nbval runs them, here their stored form is read."""

import ast
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from minimistral.course import syllabus
from minimistral.course.exercises import DIFFICULTIES, IMPORTANCES
from minimistral.course.notebook_source import REGION

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("notebooks", "solutions", "exercises")
NOTEBOOKS = [p for folder in FOLDERS for p in sorted(ROOT.glob(f"{folder}/[0-9][0-9]_*.ipynb"))]
STORIES = [p for p in NOTEBOOKS if p.parent.name == "notebooks"]
CHAPTERS = [p for p in STORIES if not p.stem.startswith("00")]  # 0 is exempt from the measures
SOLUTIONS = [p for p in NOTEBOOKS if p.parent.name == "solutions"]
EXERCISES = [p for p in NOTEBOOKS if p.parent.name == "exercises"]

ACTS = {"predict", "your-turn", "try", "recall"}
ACTING_CALLS = {"predict", "check", "bet", "recall"}
MACHINE = re.compile(
    r"(?<![\w.~/-])/(?:work|root|home|tmp|Users)/\w|\bshared/|\b[A-Z]:\\Users|site-packages"
)


def every(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda p: f"{p.parent.name}/{p.stem}")


def cells(path: Path, kind: str | None = None) -> list:
    found = nbformat.read(path, 4).cells
    return [c for c in found if kind in (None, c.cell_type)]


def tags(cell) -> set[str]:
    return set(cell.metadata.get("tags", []))


def first(cell) -> str:
    return repr(cell.source.splitlines()[0] if cell.source else "")


def headings(cell) -> list[tuple[int, str]]:
    """(level, text) of a markdown cell's headings."""
    text = re.sub(r"^```.*?^```", "", cell.source, flags=re.M | re.S)
    return [(len(m[1]), m[2].strip()) for m in re.finditer(r"^(#{1,6}) +(.+)$", text, re.M)]


def core(path: Path) -> list:
    """A chapter's cells up to the optional sections, which begin with the heading Further."""
    found = cells(path)
    for number, cell in enumerate(found):
        if cell.cell_type == "markdown" and any(t.startswith("Further") for _, t in headings(cell)):
            return found[:number]
    return found


def html_of(cell) -> str:
    return "\n".join(o.get("data", {}).get("text/html", "") for o in cell.get("outputs", []))


def test_every_chapter_has_its_notebooks():
    for chapter in syllabus.CHAPTERS:
        for folder in FOLDERS if chapter.number else FOLDERS[:1]:
            assert (ROOT / chapter.path(folder)).exists(), f"{chapter.path(folder)} is missing"


def test_every_notebook_belongs_to_a_chapter():
    chapters = {c.name for c in syllabus.CHAPTERS}
    strays = [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.stem not in chapters]
    assert not strays, f"the syllabus has no chapters for {strays}"


# ------------------------------------------------------------------ what was run


@every(NOTEBOOKS)
def test_every_cell_was_run_in_order(path):
    counts = [c.execution_count for c in cells(path, "code")]
    assert counts == list(range(1, len(counts) + 1)), "nbval compares nothing in a cell not run"


@every(NOTEBOOKS)
def test_errors_are_on_purpose_and_nothing_warns(path):
    for cell in cells(path, "code"):
        raised = any(o.output_type == "error" for o in cell.outputs)
        assert raised == ("raises-exception" in tags(cell)), f"{first(cell)}: raises {raised}"
        streams = {o.name for o in cell.outputs if o.output_type == "stream"}
        assert "stderr" not in streams, f"{first(cell)} writes to stderr"


@every(NOTEBOOKS)
def test_a_cell_that_is_not_compared_says_why(path):
    for cell in cells(path, "code"):
        assert "nbval-skip" not in tags(cell), f"{first(cell)}: every cell is run"
        if "nbval-ignore-output" in tags(cell):
            assert len(cell.metadata.get("not_compared", "")) >= 10, f"{first(cell)}: no reason"


def compared(paths: list[Path]) -> tuple[int, int]:
    """How many cells with output are compared, and how many there are."""
    found = [c for p in paths for c in cells(p, "code") if c.outputs]
    return sum("nbval-ignore-output" not in tags(c) for c in found), len(found)


@every(NOTEBOOKS)
def test_most_outputs_are_compared(path):
    some, all_ = compared([path])
    print(f"{some} of {all_} cells with output are compared")
    assert some >= 0.6 * all_, f"only {some} of {all_} cells with output are compared"


@every(NOTEBOOKS)
def test_nothing_names_a_machine(path):
    for cell in cells(path):
        texts = [cell.source, *map(str, cell.get("outputs", []))]
        for text in texts:
            text = re.sub(r"base64,[A-Za-z0-9+/=\s]+", "", text)
            assert not (m := MACHINE.search(text)), f"{first(cell)}: {text[m.start():][:60]!r}"


# ------------------------------------------------------------------ what is seen


class Pictures(HTMLParser):
    """The alt texts of a page's pictures."""

    def __init__(self):
        super().__init__()
        self.alts: list[str] = []

    def handle_starttag(self, tag, attrs):
        said = dict(attrs)
        if tag == "img":
            self.alts.append(said.get("alt") or "")
        elif tag == "svg" and said.get("aria-hidden") != "true":
            self.alts.append(said.get("aria-label") or "")


@every(NOTEBOOKS)
def test_every_figure_has_an_alt_text(path):
    for cell in cells(path):
        bare = [k for o in cell.get("outputs", []) for k in o.get("data", {}) if "image/" in k]
        assert not bare, f"{first(cell)} shows {bare}: use show(fig, alt=...)"
        page = Pictures()
        page.feed(html_of(cell))
        if cell.cell_type == "markdown":
            page.feed(cell.source)
            page.alts += re.findall(r"!\[([^\]]*)\]\(", cell.source)
        for alt in page.alts:
            assert len(alt) >= 30, f"{first(cell)}: the alt text {alt!r} does not say the finding"


@every(NOTEBOOKS)
def test_headings_have_one_top_and_no_gap(path):
    found = [h for c in cells(path, "markdown") for h in headings(c)]
    levels = [level for level, _ in found]
    assert levels[:1] == [1] and levels.count(1) == 1, f"one level-1 heading, the first: {found}"
    for (above, _), (level, text) in zip(found, found[1:]):
        assert level <= above + 1, f"{text!r} skips a level"


def anchors(path: Path) -> set[str]:
    """JupyterLab's anchors: the heading's text with hyphens for spaces."""
    texts = [text for c in cells(path, "markdown") for _, text in headings(c)]
    return {re.sub(r"[`*_]", "", text).replace(" ", "-").lower() for text in texts}


@every(NOTEBOOKS)
def test_links_lead_somewhere_and_say_where(path):
    for cell in cells(path, "markdown"):
        text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.S)
        links = re.findall(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)[^)]*\)", text)
        links += [(b, a) for a, b in re.findall(r'<a [^>]*href="([^"]+)"[^>]*>(.*?)</a>', text)]
        for label, target in links:
            assert label.strip().lower() not in {"here", "this", "link", "click here"}, target
            if re.match(r"https?://|mailto:", target):
                continue
            file, _, anchor = unquote(target).partition("#")
            aim = (path.parent / file).resolve() if file else path
            assert aim.exists(), f"{first(cell)}: the link {target} leads nowhere"
            if anchor:
                assert anchor.lower() in anchors(aim), f"{first(cell)}: {aim.name} has no #{anchor}"


# ------------------------------------------------------------------ how much at once


@every(NOTEBOOKS)
def test_cells_are_short(path):
    """At most 25 lines, and at most one cell in ten over 15; the library's have their own limit."""
    mine = [c for c in cells(path, "code") if not tags(c) & {"library", "imports"}]
    lengths = {first(c): len(c.source.splitlines()) for c in mine}
    assert not {k: n for k, n in lengths.items() if n > 25}
    longer = {k: n for k, n in lengths.items() if n > 15}
    assert len(longer) <= len(mine) / 10, f"{len(longer)} of {len(mine)} have over 15: {longer}"


@every(NOTEBOOKS)
def test_lines_are_narrow(path):
    for cell in cells(path, "code"):
        wide = [line for line in cell.source.splitlines() if len(line) > 84]
        assert not wide, f"over 84 columns: {wide[0]!r}"


def words(text: str) -> int:
    """Words of prose: no code blocks, no displayed formulas, no targets of links, no tags."""
    text = re.sub(r"^```.*?^```|\$\$.*?\$\$|<[^>]+>", " ", text, flags=re.M | re.S)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    return len(re.findall(r"\w[\w'’.,-]*", text))


@every(NOTEBOOKS)
def test_prose_comes_in_small_pieces(path):
    row = 0
    for cell in cells(path):
        row = row + 1 if cell.cell_type == "markdown" else 0
        assert row <= 2, f"{first(cell)} is the third markdown cell in a row"
        if cell.cell_type == "markdown":
            assert words(cell.source) <= 120, f"{first(cell)} has {words(cell.source)} words"


@every(STORIES)
def test_the_core_has_its_size(path):
    code = [c for c in core(path) if c.cell_type == "code" and "imports" not in tags(c)]
    low, high = (1, 15) if path not in CHAPTERS else (25, 40)
    assert low <= len(code) <= high, f"{len(code)} code cells in the core, not {low} to {high}"


def acts(cell) -> bool:
    if tags(cell) & ACTS:
        return True
    plain = "\n".join(x for x in cell.source.splitlines() if x.lstrip()[:1] not in ("%", "!"))
    calls = (n.func for n in ast.walk(ast.parse(plain)) if isinstance(n, ast.Call))
    return any(getattr(f, "id", getattr(f, "attr", None)) in ACTING_CALLS for f in calls)


@every(CHAPTERS)
def test_the_learner_acts_every_five_cells(path):
    watching = 0
    for cell in core(path):
        if cell.cell_type != "code" or "imports" in tags(cell):
            continue
        watching = 0 if acts(cell) else watching + 1
        assert watching <= 5, f"the learner only watches for {watching} cells up to {first(cell)}"


# ------------------------------------------------------------------ exercises


def sections(path: Path) -> list[tuple[str, list]]:
    """(heading, cells) of every exercise: from a heading that begins with Exercise to the next."""
    found: list[tuple[str, list]] = []
    for cell in cells(path):
        title = headings(cell)[:1] if cell.cell_type == "markdown" else []
        if title and title[0][0] == 2:
            found.append((title[0][1], []))
        if found:
            found[-1][1].append(cell)
    return [(title, inside) for title, inside in found if title.startswith("Exercise")]


@every([p for p in SOLUTIONS + EXERCISES if not p.stem.startswith("00")])
def test_a_chapter_has_five_to_eight_exercises(path):
    assert 5 <= len(sections(path)) <= 8, [title for title, _ in sections(path)]


@every(SOLUTIONS + EXERCISES)
def test_every_exercise_has_its_header_and_its_check(path):
    for title, inside in sections(path):
        header = inside[0].source.lower()
        for said, choices in (("difficulty", DIFFICULTIES), ("importance", IMPORTANCES)):
            assert re.search(rf"\b({'|'.join(choices)})\b", header), f"{title}: no {said} {choices}"
        assert re.search(r"\d+ min", header), f"{title}: no minutes"
        calls = [c for c in inside if c.cell_type == "code" and re.search(r"\bcheck\(", c.source)]
        assert calls, f"{title}: nothing checks it"


def said(inside: list) -> str:
    """What the cells of a section show, in lower case."""
    return "\n".join(str(o) for c in inside for o in c.get("outputs", [])).lower()


@every(EXERCISES)
def test_a_stub_never_frightens_and_never_passes(path):
    for title, inside in sections(path):
        words_ = said(inside)
        waits = [w for w in ("not written yet", "not answered yet", "try again") if w in words_]
        assert waits, f"{title}: unchanged, the check must say 'not written yet' or the like"


@every(SOLUTIONS)
def test_a_solution_passes(path):
    for title, inside in sections(path):
        for wrong in ("not written yet", "not answered yet", "try again"):
            assert wrong not in said(inside), f"{title}: the solution is told {wrong!r}"
        assert re.search(r"\bpass\b", said(inside)), f"{title}: no check passes"


def squeezed(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


@every(EXERCISES)
def test_no_solution_is_left_in_an_exercise(path):
    source = (ROOT / "solutions" / "src" / f"{path.stem}.py").read_text(encoding="utf-8")
    regions = [squeezed(m["solution"]) for m in REGION.finditer(source)]
    text = squeezed("\n".join(c.source for c in cells(path)))
    assert regions, "no solution is marked"
    assert "BEGIN SOLUTION" not in text and "END SOLUTION" not in text
    left = [r for r in regions if r in text]
    assert not left, f"a solution can still be read: {left[0][:80]!r}"


@every(EXERCISES)
def test_an_exercise_is_its_solution_with_holes(path):
    """Every other cell is the same, in the same order."""
    solution = [c.source for c in cells(ROOT / "solutions" / path.name)]
    given = [c.source for c in cells(path)]
    shared = [text for text in given if text in solution]
    assert shared == [text for text in solution if text in given]
    assert len(given) <= len(solution)
