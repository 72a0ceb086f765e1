"""The notebooks as Colab needs them, in a branch of their own.

Colab shows a notebook without the repository around it. So the copies begin with a cell that fetches
the course, and their links to other notebooks lead to Colab again. Nobody else meets that cell: the
notebooks in the main branch stay as they are. The branch holds the whole course beside the copies, so
that a copy always runs with the library it was written for.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path, PurePosixPath

from minimistral.course.address import COLAB_BRANCH, Address
from minimistral.course.syllabus import EXERCISES, NOTEBOOKS, SOLUTIONS

HOME = "/content/minimistral"
SET_UP = """\
#@title Run this first: it fetches the course (once per session) {{ display-mode: "form" }}
import sys

if "google.colab" in sys.modules:
    ![ -d {home} ] || git clone -q --depth 1 --branch {branch} {repository} {home}
    !{{sys.executable}} {home}/minimistral/course/colab_setup.py
    %cd -q {home}/{folder}
    sys.path.insert(0, "{home}")"""
LINK = re.compile(r"(\]\()([^)\s:#]+)(#[^)\s]*)?(\))")


def copy_for_colab(notebook: dict, path: str, here: Address) -> dict:
    """A notebook's JSON with the set-up cell in front, and with links that lead somewhere in Colab."""
    folder = str(PurePosixPath(path).parent)
    cell = {
        "cell_type": "code", "execution_count": None, "id": "set-up", "outputs": [],
        "metadata": {"cellView": "form", "tags": ["set-up"], "jupyter": {"source_hidden": True}},
        "source": SET_UP.format(home=HOME, branch=COLAB_BRANCH, repository=here.repository, folder=folder),
    }

    def relinked(match: re.Match) -> str:
        target = os.path.normpath(PurePosixPath(folder) / match[2]).replace(os.sep, "/")
        link = here.colab(target) if target.endswith(".ipynb") else here.source(target)
        return f"{match[1]}{link}{match[3] or ''}{match[4]}"

    cells = []
    for one in notebook["cells"]:
        if one["cell_type"] == "markdown":
            one = {**one, "source": LINK.sub(relinked, "".join(one["source"]))}
        cells.append(one)
    return {**notebook, "cells": [cell, *cells]}


def write_branch(root: Path, here: Address) -> str:
    """Commit the course with its copies to the branch `colab`; returns the commit's name.

    Works on what is committed, and touches neither the files nor the index of the checkout. Raises
    ValueError where the address is none that Colab can open.
    """
    if not here.on_github:
        raise ValueError("Colab opens notebooks from GitHub alone; set such an address in "
                         "minimistral/course/address.py")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "GIT_INDEX_FILE": str(Path(folder, "index"))}

        def git(*command: str, text: str | None = None) -> str:
            done = subprocess.run(["git", *command], cwd=root, env=environment, input=text, check=True,
                                  capture_output=True, encoding="utf-8")
            return done.stdout.strip()

        git("read-tree", "HEAD")
        listed = git("ls-tree", "-r", "--name-only", "HEAD", NOTEBOOKS, EXERCISES, SOLUTIONS).splitlines()
        entries = []
        for path in (name for name in listed if name.endswith(".ipynb")):
            notebook = json.loads(git("show", f"HEAD:{path}"))
            text = json.dumps(copy_for_colab(notebook, path, here), indent=1, ensure_ascii=False) + "\n"
            entries.append(f"100644 {git('hash-object', '-w', '--stdin', text=text)}\t{path}")
        git("update-index", "--index-info", text="\n".join(entries) + "\n")
        message = f"The notebooks for Colab, from {git('rev-parse', '--short', 'HEAD')}"
        commit = git("commit-tree", git("write-tree"), "-p", "HEAD", "-m", message)
        git("update-ref", f"refs/heads/{COLAB_BRANCH}", commit)
    return commit
