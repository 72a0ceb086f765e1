"""The web edition's pages as Sphinx reads them: the notebooks without what needs a kernel, the guides
in docs/, README and CONTRIBUTING, a front page, and which page follows which.

Links between files of the repository become links between pages. A link to a file that is no page
becomes plain words, or one to the public address where there is one.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path, PurePosixPath

import nbformat
from nbformat.v4 import new_markdown_cell, new_output

from minimistral.course.address import address, open_links
from minimistral.course.sections import joined
from minimistral.course.syllabus import (
    CHAPTERS, EXERCISES, NOTEBOOKS, SOLUTIONS, Chapter, chapter, readme_table,
)

PARTS = (
    ("Begin", range(0, 1)),
    ("A plain model", range(1, 7)),
    ("Mistral's three ideas", range(7, 10)),
    ("The real thing", range(10, 15)),
)
GUIDES = (  # a page of docs/ that is not named here comes last
    ("While you learn", ("opening", "glossary", "mistakes")),
    ("For instructors", ("instructors", "exercises", "grading", "hub")),
    ("The project", ("README.md", "CONTRIBUTING.md", "testing", "report", "site", "CHANGELOG.md")),
)
OWN = {"README.md": "Install and use", "CONTRIBUTING.md": "Taking part", "CHANGELOG.md": "What changed"}
EXTRA = "extra"  # what below it is copied into the site as it is
FRAME = 16  # pixels of white around a figure, both sides together

LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)
PICTURE = re.compile(r'<img src="data:image/png;base64,([^"]+)"([^>]*)>')
HREF = re.compile(r'<a href="([^"]+)">(.*?)</a>', re.DOTALL)


@dataclass(frozen=True)
class Edition:
    """What a site is made of. ``root`` is the checkout, ``source`` the folder that Sphinx reads."""

    root: Path
    source: Path
    chapters: tuple[Chapter, ...] = CHAPTERS
    solutions: bool = True

    @property
    def folders(self) -> tuple[str, ...]:
        return (NOTEBOOKS, EXERCISES, SOLUTIONS) if self.solutions else (NOTEBOOKS, EXERCISES)

    @property
    def guides(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "docs").glob("*.md"))

    @property
    def pages(self) -> dict[str, str]:
        """File of the repository -> page, both relative."""
        pages = {c.path(f): c.path(f) for f in self.folders for c in self.chapters}
        pages |= {f"docs/{name}.md": f"docs/{name}.md" for name in self.guides}
        return pages | {name: name.lower() for name in OWN if (self.root / name).exists()}

    @property
    def run_it(self) -> str:
        """The page that says where a chapter can be run."""
        return "docs/opening.md" if "opening" in self.guides else "README.md#start"


def write_sources(edition: Edition) -> list[Path]:
    """Write all that Sphinx reads, and remove what belongs to no page; returns the files.

    A file that would stay the same is not touched, so that Sphinx reads it only once.
    """
    files: dict[str, str | bytes] = {}
    files["index.md"] = front_page(edition, files)
    if edition.solutions:
        files[f"{SOLUTIONS}/index.md"] = solutions_page(edition)
    for name, page in edition.pages.items():
        path = edition.root / name
        if path.suffix == ".ipynb":
            files[page] = notebook_page(edition, path, files)
        else:
            text = path.read_text(encoding="utf-8")
            if name in OWN:
                text = re.sub("^# .*", f"# {OWN[name]}", text, count=1, flags=re.MULTILINE)
            files[page] = relinked(edition, text, name, page, files)
    for name, content in files.items():
        path = edition.source / name
        content = content.encode("utf-8") if isinstance(content, str) else content
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    for path in edition.source.rglob("*"):
        if path.is_file() and path.relative_to(edition.source).as_posix() not in files:
            path.unlink()
    return [edition.source / name for name in files]


# ---------------------------------------------------------------- links


def relinked(edition: Edition, text: str, name: str, page: str, files: dict) -> str:
    """Markdown of the file ``name`` as Markdown of its page; pictures are added to ``files``."""

    def replaced(match: re.Match) -> str:
        mark, label, target = match.groups()
        label = LINK.sub(replaced, label)
        if re.match(r"\w+:|#", target):
            return f"{mark}[{label}]({target})"
        path = edition.root / PurePosixPath(name).parent / target.partition("#")[0]
        if mark and path.is_file():
            picture = os.path.relpath(path, edition.root).replace(os.sep, "/")
            files[picture] = path.read_bytes()
            return f"![{label}]({between(page, picture)})"
        there = moved(edition, target, name, page)
        return f"[{label}]({there})" if there else label

    parts, end = [], 0
    for code in FENCE.finditer(text):
        parts += [LINK.sub(replaced, text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, LINK.sub(replaced, text[end:])])


def moved(edition: Edition, target: str, name: str, page: str) -> str:
    """The address, seen from ``page``, of what the file ``name`` calls ``target``.

    Empty if that is a file without a page and without a public address; the target itself if there
    is no such file, so that Sphinx complains.
    """
    path, _, anchor = target.partition("#")
    wanted = os.path.normpath(PurePosixPath(name).parent / path).replace(os.sep, "/")
    if wanted in edition.pages:
        return between(page, edition.pages[wanted]) + (f"#{anchor}" if anchor else "")
    if not (edition.root / wanted).exists():
        return target
    return "" if wanted.startswith(f"{SOLUTIONS}/") else address().source(wanted)


def between(page: str, other: str) -> str:
    """The way from one page to another."""
    return os.path.relpath(other, PurePosixPath(page).parent).replace(os.sep, "/")


# ---------------------------------------------------------------- notebooks


def notebook_page(edition: Edition, path: Path, files: dict) -> str:
    """A notebook as a page: a line on top that says what it is, and nothing that needs a kernel."""
    notebook = nbformat.read(path, 4)
    name = path.relative_to(edition.root).as_posix()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = relinked(edition, cell.source, name, name, files)
        elif cell.cell_type == "code":
            if cell.metadata.get("jupyter", {}).get("source_hidden"):
                cell.metadata.tags = [*cell.metadata.get("tags", []), "hide-input"]
                cell.metadata.mystnb = {"code_prompt_show": "Show what the next cell imports",
                                        "code_prompt_hide": "Fold it again"}
            cell.outputs = [readable(edition, output, name, files) for output in joined(cell.outputs)]
    folder, number = path.parent.name, int(path.name[:2])
    first = notebook.cells[0]
    title, _, rest = first.source.partition("\n")
    if folder == SOLUTIONS:
        title = title.replace("# Exercises", "# Solutions")
    note = relinked(edition, top_note(edition, folder, chapter(number)), name, name, files)
    first.source = f"{title}\n\n:::{{container}} top-note {folder}\n{note}\n:::\n{rest}"
    if folder == NOTEBOOKS:
        below = f"```{{toctree}}\n:hidden:\n\nExercises <../{EXERCISES}/{path.stem}>\n```"
        notebook.cells.append(new_markdown_cell(below, id="exercises-below"))
    return nbformat.writes(notebook, 4)


def top_note(edition: Edition, folder: str, its: Chapter) -> str:
    """What stands below a page's title: what one reads here, and where the rest is."""
    places = [f"[Run it yourself](../{edition.run_it})"]
    places += [f"[{label.lower()}]({link})" for label, link in open_links(its.path(folder))]
    run_it = " or ".join(places)
    story, exercises, solutions = (
        f"[{word}](../{its.path(where)})"
        for word, where in [("chapter", NOTEBOOKS), ("exercises", EXERCISES), ("solutions", SOLUTIONS)]
    )
    if folder == NOTEBOOKS:
        return (f"The chapter as it ran, to be read. {run_it} to write its pieces and to move its "
                f"sliders. Afterwards come the {exercises}.")
    if folder == EXERCISES:
        after = f" Afterwards compare with the {solutions}." if edition.solutions else ""
        return f"Exercises on the {story}. {run_it}: the checks answer what you write.{after}"
    return f"Solutions, to be read after one's own attempt. Here are the {exercises} without them, and the {story}."


def readable(edition: Edition, output, name: str, files: dict):
    """One output without what only a running page can show."""
    if output.output_type not in ("display_data", "execute_result"):
        return output
    if "text/html" in output.data:
        return page_output(page_html(edition, output.data["text/html"], name, files))
    plain = output.data.get("text/plain", "")
    if plain.startswith("explorer: "):
        first = "Sliders and buttons stand here when the chapter runs. They begin with "
        return page_output(f'<p class="needs-kernel">{first}{escape(plain[10:])}.</p>')
    if plain.startswith("a chat with "):
        return page_output('<p class="needs-kernel">A chat with buttons stands here when the chapter runs.</p>')
    return output


def page_output(html: str):
    return new_output("display_data", data={"text/html": html})


def page_html(edition: Edition, html: str, name: str, files: dict) -> str:
    """HTML of a cell for a page: pictures as files with their sizes; they and tables in a box that
    scrolls; links between pages; no live regions, as nothing changes here."""

    def as_file(match: re.Match) -> str:
        data = base64.b64decode(match[1])
        picture = f"figures/{hashlib.sha256(data).hexdigest()[:20]}.png"
        files[f"{EXTRA}/{picture}"] = data
        width, height = (int.from_bytes(data[at : at + 4], "big") + FRAME for at in (16, 20))
        sizes = f'width="{width}" height="{height}"'
        return f'<div class="wide"><img src="{between(name, picture)}" {sizes}{match[2]}></div>'

    def as_page(match: re.Match) -> str:
        there = moved(edition, match[1], name, name)
        if ":" not in there:
            there = there.replace(".ipynb", ".html")
        return f'<a href="{there}">{match[2]}</a>' if there else match[2]

    html = HREF.sub(as_page, PICTURE.sub(as_file, html))
    html = html.replace('<div role="status" style="', '<div class="panel" style="')
    return html.replace("<table", '<div class="wide"><table').replace("</table>", "</table></div>")


# ---------------------------------------------------------------- pages of our own


def front_page(edition: Edition, files: dict) -> str:
    """The landing page: README's own words around the table of chapters, and all pages in order."""
    readme = (edition.root / "README.md").read_text(encoding="utf-8")
    template = (edition.root / "docs/site/index.md").read_text(encoding="utf-8")
    head, *sections = readme.split("\n## ")
    _, _, about = head.partition("\n")
    (audience,) = (s.partition("\n")[2] for s in sections if s.startswith("Who it is for\n"))
    filled = {"about": about.strip(), "chapters": readme_table(), "audience": audience.strip(),
              "run_it": edition.run_it}
    for word, text in filled.items():
        template = template.replace(f"[{word}]", text)
    return relinked(edition, f"{template}\n{contents(edition)}", "README.md", "index.md", files)


def contents(edition: Edition) -> str:
    """What the bar at the side lists, and in which order one page follows another."""
    its = {c.number: c.path() for c in edition.chapters}
    parts = [(title, [its[n] for n in numbers if n in its]) for title, numbers in PARTS]
    guides = {name: f"docs/{name}" for name in edition.guides}
    guides |= {name: name.lower() for name in OWN if name in edition.pages}
    last = [name for name in guides if not any(name in names for _, names in GUIDES)]
    for title, names in GUIDES:
        there = [guides[name] for name in [*names, *last * (title == GUIDES[-1][0])] if name in guides]
        parts.append((title, there))
        if title == GUIDES[0][0] and edition.solutions:
            there.append(f"{SOLUTIONS}/index")
    return "\n".join(toctree(pages, title) for title, pages in parts if pages)


def solutions_page(edition: Edition) -> str:
    """The page above all solutions."""
    pages = [f"Chapter {c.number}: {c.title} <{c.name}>" for c in edition.chapters]
    return ("# Solutions\n\nFor afterwards: a piece that one wrote wrong and repaired stays longer in the "
            "memory than one that was read. Several ways are right, and the checks take them all; here is "
            f"one for each exercise, with why.\n\n{toctree(pages, hidden=False)}")


def toctree(pages: Sequence[str], caption: str = "", hidden: bool = True) -> str:
    options = [f":caption: {caption}"] * bool(caption) + [":hidden:"] * hidden + [":titlesonly:"]
    return "\n".join(["```{toctree}", *options, "", *pages, "```", ""])
