"""The web edition: `python3 run.py site` makes `build/site`, pages that need no server and no network.

    python3 run.py site                       all pages; open build/site/index.html
    python3 run.py site --without-solutions   for a class
    python3 run.py site --check               build, then check links, pictures, headings, and
                                              accessibility in a browser, in light and dark

Sphinx makes the pages from what `site_pages` writes: the notebooks as they are stored (nothing runs),
the guides in docs/, README and CONTRIBUTING. Settings, style and templates are in docs/site/.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path

from minimistral.course.notebook_library import ROOT
from minimistral.course.render import browser
from minimistral.course.site_check import barriers, pages, problems
from minimistral.course.site_pages import EXTRA, Edition, write_sources
from minimistral.course.site_search import write_search_text
from minimistral.course.syllabus import CHAPTERS, chapter

MARK = ".buildinfo"  # Sphinx's own file in what it built


def build(out: Path, numbers: list[int] = (), solutions: bool = True, root: Path = ROOT) -> int:
    """Make the site in ``out``, what Sphinx reads beside it; returns Sphinx's status.

    A warning counts as an error: it is a link that leads nowhere, or a page that nobody reaches.
    Raises ValueError if ``out`` holds something else than a site.
    """
    from sphinx.cmd.build import build_main

    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        raise ValueError(f"{out} holds something else than a web edition: name an empty or a new folder")
    between = out.with_name(f".{out.name}-sphinx")
    source, doctrees = between / "source", between / "doctrees"
    chosen = tuple(chapter(n) for n in sorted(set(numbers))) or CHAPTERS
    write_sources(Edition(root, source, chosen, solutions))
    options = ["-b", "html", "-q", "-j", "2", "-W", "--keep-going", "-c", root / "docs/site", "-d", doctrees,
               "-D", f"html_extra_path={source / EXTRA}"]
    copies = out.with_name("jupyter_execute")  # where MyST-NB puts the notebooks again, which nobody needs
    theirs = copies.exists()
    status = build_main([str(one) for one in [*options, source, out]])
    if copies.exists() and not theirs:
        shutil.rmtree(copies)
    remove_old(out, source)
    write_search_text(out)
    return status


def remove_old(out: Path, source: Path) -> None:
    """Remove pages and figures of an earlier site that this one has not, such as the solutions."""
    written = {path.relative_to(source).with_suffix(".html").as_posix() for path in source.rglob("*.*")}
    figures = {path.name for path in source.glob(f"{EXTRA}/figures/*")}
    old = [out / page for page in pages(out) if page not in written | {"search.html"}]
    for path in [*old, *(path for path in out.glob("figures/*") if path.name not in figures)]:
        path.unlink()


def main(arguments: list[str] | None = None) -> int:
    """The command; 0 when the site stands, and with --check when nothing is wrong with it."""
    parser = argparse.ArgumentParser(prog="run.py site", description="Make the web edition.")
    parser.add_argument("chapters", nargs="*", type=int, help="only these (default: all)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/site", help="folder of the site")
    parser.add_argument("--without-solutions", action="store_true", help="leave the solutions out")
    parser.add_argument("--check", action="store_true", help="check every page, in a browser too")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    out = options.out.absolute()
    try:
        status = build(out, options.chapters, not options.without_solutions)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f"{out / 'index.html'}: {len(pages(out))} pages, {size:.1f} MB, "
          f"{time.monotonic() - start:.0f} seconds", flush=True)
    return status or (check(out) if options.check else 0)


def check(out: Path) -> int:
    """Print what is wrong with a site; 1 if anything is."""
    found = problems(out)
    if browser() is None:
        found.append("no Chromium or Chrome here, so accessibility was not looked at; CHROME names one")
    else:
        found += barriers(out, pages(out))
    print(*found, f"{len(found)} findings", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
