"""Where the course is published: the one setting from which every link to it is made.

Set REPOSITORY, then `python3 run.py publish`: it writes the links into README and docs/, and the copies
for Colab into a branch of their own. A fork may set MINIMISTRAL_REPOSITORY (and MINIMISTRAL_BRANCH)
instead. Without an address every function here returns an empty text, and no page shows a link.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from urllib.parse import quote, urlencode

REPOSITORY = ""  # such as https://github.com/NAME/minimistral
BRANCH = "main"

COLAB_BRANCH = "colab"  # the notebooks with their set-up cell; see colab.py
HUB = "https://hub.example.org"  # stands for the address of the reader's own JupyterHub


@dataclass(frozen=True)
class Address:
    """A public git repository and the branch that people read; both may be empty."""

    repository: str = ""
    branch: str = "main"

    def __post_init__(self):
        if self.repository and not re.fullmatch(r"https://[\w.-]+(/[\w.~-]+){2,}", self.repository):
            raise ValueError(f"{self.repository!r} is not the address of a repository; one looks like "
                             "https://github.com/NAME/minimistral")

    @property
    def on_github(self) -> tuple[str, str] | None:
        """(owner, name) of a repository on GitHub, else None."""
        match = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(\.git)?", self.repository)
        return (match[1], match[2]) if match else None

    def source(self, path: str) -> str:
        """A file as the repository's host shows it."""
        if not self.repository:
            return ""
        return f"{self.repository.removesuffix('.git')}/blob/{quote(self.branch)}/{quote(path)}"

    def colab(self, path: str) -> str:
        """A notebook in Google Colab, which opens those of GitHub alone."""
        if not self.on_github:
            return ""
        owner, name = self.on_github
        return f"https://colab.research.google.com/github/{owner}/{name}/blob/{COLAB_BRANCH}/{quote(path)}"

    def binder(self, path: str) -> str:
        """A notebook in JupyterLab on Binder."""
        if not self.repository:
            return ""
        where = "gh/" + "/".join(self.on_github) if self.on_github else f"git/{quote(self.repository, safe='')}"
        query = urlencode({"urlpath": f"lab/tree/{path}"})
        return f"https://mybinder.org/v2/{where}/{quote(self.branch, safe='')}?{query}"

    def nbgitpuller(self, path: str) -> str:
        """A link that puts the course into a learner's folder on a JupyterHub and opens a notebook."""
        if not self.repository:
            return ""
        folder = self.repository.removesuffix(".git").rpartition("/")[2]
        query = urlencode({"repo": self.repository, "branch": self.branch, "urlpath": f"lab/tree/{folder}/{path}"})
        return f"{HUB}/hub/user-redirect/git-pull?{query}"


def address() -> Address:
    """The address that is set, in the environment or above."""
    return Address((os.environ.get("MINIMISTRAL_REPOSITORY") or REPOSITORY).rstrip("/"),
                   os.environ.get("MINIMISTRAL_BRANCH") or BRANCH)


def open_links(path: str) -> list[tuple[str, str]]:
    """(label, address) of each public place that runs the notebook ``path``; none without an address."""
    here = address()
    places = (("Colab", here.colab(path)), ("Binder", here.binder(path)))
    return [(f"Open in {name}", link) for name, link in places if link]
