"""`python3 run.py publish`: write the links to the public address, and the branch for Colab.

    python3 run.py publish           README.md and docs/ get their links; the branch `colab` is made anew
    python3 run.py publish --check   write nothing; exit 1 if a link is not what the address says

The address is the one setting in minimistral/course/address.py. What is written stands between two marks
in each page, so everything else in it stays the author's.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from minimistral.course.address import COLAB_BRANCH, Address, address
from minimistral.course.notebook_library import ROOT
from minimistral.course.syllabus import CHAPTERS, EXERCISES
from minimistral.files import write_whole

FIRST = CHAPTERS[0].path()


def badges(here: Address) -> str:
    """README's way in without an installation."""
    links = [
        f"[![Open chapter 0 in {name}](docs/open-{name.lower()}.svg)]({link})"
        for name, link in (("Colab", here.colab(FIRST)), ("Binder", here.binder(FIRST))) if link
    ]
    return f"Without installing anything: {' '.join(links)}" if links else ""


def chapter_table(here: Address) -> str:
    """Every chapter and its exercises in Colab and on Binder."""
    if not here.repository:
        return ("This copy of the course has no public address, so there are no links here yet. Whoever "
                "publishes it sets one (`CONTRIBUTING.md`, *Publishing*).")
    rows = ["| | Chapter | Colab | Binder |", "|---|---|---|---|"]
    for chapter in CHAPTERS:
        cells = []
        for place in (here.colab, here.binder):
            links = [("story", place(chapter.path()))]
            if chapter.number:
                links.append(("exercises", place(chapter.path(EXERCISES))))
            cells.append(", ".join(f"[{label} {chapter.number}]({link})" for label, link in links if link))
        rows.append(f"| {chapter.number} | {chapter.title} | {' | '.join(cells)} |")
    return "\n".join(rows)


def pull_link(here: Address) -> str:
    """The link that an administrator hands out."""
    link = here.nbgitpuller(FIRST)
    if not link:
        return ("This copy of the course has no public address yet. With one, the link stands here; without, "
                "fill in the address of your own copy of the repository:\n\n```\n"
                f"{Address('https://git.example.org/NAME/minimistral').nbgitpuller(FIRST)}\n```")
    return f"```\n{link}\n```"


BLOCKS = (  # page, name of the mark, what stands there
    ("README.md", "open", badges),
    ("docs/opening.md", "chapters", chapter_table),
    ("docs/hub.md", "pull", pull_link),
)


def filled(text: str, name: str, block: str) -> str:
    """A page with ``block`` between the marks ``name``. Raises ValueError if they are not there once."""
    inside = f"\n{block}\n" if block else "\n"
    pattern = re.compile(rf"(<!-- {name} -->)\n.*?(<!-- /{name} -->)", re.S)
    text, count = pattern.subn(lambda m: m[1] + inside + m[2], text)
    if count != 1:
        raise ValueError(f"{count} places between <!-- {name} --> and <!-- /{name} -->, not one")
    return text


def pages(root: Path, here: Address) -> dict[Path, str]:
    """Each page with the links that the address makes."""
    return {root / page: filled((root / page).read_text(encoding="utf-8"), name, block(here))
            for page, name, block in BLOCKS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="run.py publish", description="Write the links to the public address.")
    parser.add_argument("--check", action="store_true", help="write nothing, name what differs")
    options = parser.parse_args(arguments)
    here = address()
    changed = {path: text for path, text in pages(ROOT, here).items()
               if path.read_text(encoding="utf-8") != text}
    for path, text in changed.items():
        print(f"{'differs' if options.check else 'written'}: {path.relative_to(ROOT).as_posix()}")
        if not options.check:
            write_whole(path, text)
    if options.check:
        return int(bool(changed))
    if not here.repository:
        print("No address is set (minimistral/course/address.py): no page has links.")
        return 0
    print("Commit these pages before you go on." if changed else "The pages' links are as the address says.")
    if here.on_github and not changed:
        from minimistral.course.colab import write_branch

        print(f"{COLAB_BRANCH}: {write_branch(ROOT, here)[:10]}. Now: git push origin {here.branch} +{COLAB_BRANCH}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
