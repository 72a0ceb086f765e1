"""Where the course is opened: every link from one address, copies for Colab, files for Binder and VS Code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from minimistral.course import address as setting
from minimistral.course import colab, colab_setup, publish
from minimistral.course.address import Address, open_links
from minimistral.course.syllabus import CHAPTERS, EXERCISES

ROOT = Path(__file__).parents[1]
FAKE = "https://github.com/example-school/our-course"
HERE = Address(FAKE, "main")


@pytest.fixture
def unset(monkeypatch):
    for name in ("MINIMISTRAL_REPOSITORY", "MINIMISTRAL_BRANCH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setting, "REPOSITORY", "")


# --- the address

def test_without_an_address_nothing_is_linked(unset):
    assert setting.address() == Address()
    assert open_links("notebooks/02_attention.ipynb") == []
    for text in publish.pages(ROOT, Address()).values():
        assert not re.search(r"mybinder\.org/v2|colab\.research", text)
    assert "no public address" in publish.chapter_table(Address())


def test_a_fork_sets_its_address_in_the_environment(unset, monkeypatch):
    monkeypatch.setenv("MINIMISTRAL_REPOSITORY", FAKE + "/")
    monkeypatch.setenv("MINIMISTRAL_BRANCH", "spring")
    assert setting.address() == Address(FAKE, "spring")
    (_, in_colab), (_, in_binder) = open_links("notebooks/02_attention.ipynb")
    assert in_colab.endswith("/example-school/our-course/blob/colab/notebooks/02_attention.ipynb")
    assert "/gh/example-school/our-course/spring?" in in_binder


@pytest.mark.parametrize("wrong", ["example-school/our-course", "http://github.com/a/b", "git@github.com:a/b", "https://x"])
def test_what_is_no_address_is_refused(wrong):
    with pytest.raises(ValueError, match="one looks like"):
        Address(wrong)


def test_an_address_elsewhere_has_binder_but_no_colab():
    here = Address("https://git.example.org/school/course", "main")
    assert here.colab("notebooks/00_start_here.ipynb") == "" and here.on_github is None
    assert "/v2/git/https%3A%2F%2Fgit.example.org%2Fschool%2Fcourse/main?" in here.binder("x.ipynb")
    assert "Colab" not in publish.badges(here) and "Binder" in publish.badges(here)


def test_every_link_of_every_page_names_the_address_and_a_file_that_is_there():
    links = [link for text in publish.pages(ROOT, HERE).values()
             for link in re.findall(r"https://[^\s)\"]+", text) if "example" in link]
    links = [link for link in links if not link.startswith("https://hub.example.org/hub/user-redirect/git-pull")
             or "example-school" in link]
    assert len(links) > 4 * len([c for c in CHAPTERS if c.number])
    for link in links:
        parts = urlparse(link)
        if parts.hostname == "colab.research.google.com":
            start, path = parts.path.split("/blob/colab/")
            assert start == "/github/example-school/our-course"
        elif parts.hostname == "mybinder.org":
            assert parts.path == "/v2/gh/example-school/our-course/main"
            path = parse_qs(parts.query)["urlpath"][0].removeprefix("lab/tree/")
        else:
            asked = parse_qs(parts.query)
            assert (parts.hostname, asked["repo"], asked["branch"]) == ("hub.example.org", [FAKE], ["main"])
            path = asked["urlpath"][0].removeprefix("lab/tree/our-course/")
        assert (ROOT / unquote(path)).is_file(), link


def test_the_pages_are_as_the_address_says():
    assert publish.main(["--check"]) == 0, "run: python3 run.py publish"


def test_badges_show_pictures_that_are_here():
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", publish.badges(HERE))
    assert [alt for alt, _ in pictures] == ["Open chapter 0 in Colab", "Open chapter 0 in Binder"]
    assert all((ROOT / picture).is_file() for _, picture in pictures)


def test_marks_must_be_there_once():
    page = "a\n<!-- open -->\nold\n<!-- /open -->\nb"
    assert publish.filled(page, "open", "new") == "a\n<!-- open -->\nnew\n<!-- /open -->\nb"
    assert publish.filled(publish.filled(page, "open", "new"), "open", "") == "a\n<!-- open -->\n<!-- /open -->\nb"
    with pytest.raises(ValueError, match="0 places"):
        publish.filled("nothing", "open", "new")


def test_no_other_file_names_a_public_place_of_the_course():
    """Outside of the marks, only address.py knows how links to the course are made."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.md", "*.toml", "*.ipynb", "*.yml", "*.json"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout.split()
    if not listed:
        pytest.skip("no git checkout")
    place = re.compile(r"colab\.research\.google\.com/github|mybinder\.org/v2|github\.com/[\w.-]+/minimistral\b")
    knowing = {"minimistral/course/address.py", "tests/test_publish.py"}
    blocks = {page: name for page, name, _ in publish.BLOCKS}
    for name in (n for n in listed if n not in knowing and (ROOT / n).is_file()):
        text = (ROOT / name).read_text(encoding="utf-8")
        if name in blocks:
            text = publish.filled(text, blocks[name], "")
        assert not place.search(text), f"{name} names {place.search(text)[0]}"


# --- the copies for Colab

def notebook(path: str) -> dict:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda c: c.name)
def test_a_copy_is_the_notebook_with_one_cell_before_it_and_links_that_lead_on(chapter):
    path = chapter.path()
    copy, original = colab.copy_for_colab(notebook(path), path, HERE), notebook(path)
    nbformat.validate(nbformat.from_dict(copy))
    first, *rest = copy["cells"]
    assert first["metadata"]["cellView"] == "form" and len(rest) == len(original["cells"])
    for new, old in zip(rest, original["cells"]):
        if old["cell_type"] == "code":
            assert new == old
    text = "\n".join("".join(c["source"]) for c in rest if c["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        assert re.match(r"https://", target), f"{target} leads nowhere in Colab"


def test_links_of_a_copy():
    cell = {"cell_type": "markdown", "metadata": {}, "source": [
        "[b](02_attention.ipynb#Heads), [e](../exercises/00_start_here.ipynb), [r](../README.md), ",
        "[own](#here), [far](https://example.org/x)"]}
    copy = colab.copy_for_colab({"cells": [cell]}, "notebooks/01_tokens.ipynb", HERE)
    start = "https://colab.research.google.com/github/example-school/our-course/blob/colab"
    assert copy["cells"][1]["source"] == (
        f"[b]({start}/notebooks/02_attention.ipynb#Heads), [e]({start}/exercises/00_start_here.ipynb), "
        f"[r]({FAKE}/blob/main/README.md), [own](#here), [far](https://example.org/x)")


def test_the_cell_does_nothing_elsewhere_and_fetches_the_course_in_colab(monkeypatch):
    source = colab.copy_for_colab({"cells": []}, "notebooks/x.ipynb", HERE)["cells"][0]["source"]
    code = compile(TransformerManager().transform_cell(source), "cell", "exec")
    asked = []

    class Shell:
        def system(self, command):
            asked.append(command)

        def run_line_magic(self, name, line):
            asked.append(f"%{name} {line}")

    def run():
        exec(code, {"get_ipython": Shell})

    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    run()
    assert asked == []
    monkeypatch.setitem(sys.modules, "google.colab", object())
    monkeypatch.setattr(sys, "path", list(sys.path))
    run()
    clone, install, into = asked
    assert clone.endswith(f"git clone -q --depth 1 --branch colab {FAKE} /content/minimistral")
    assert (ROOT / install.split("/content/minimistral/")[1]).is_file()
    assert into == "%cd -q /content/minimistral/notebooks" and sys.path[0] == "/content/minimistral"


def test_what_is_installed_in_colab_leaves_its_own_packages(monkeypatch):
    monkeypatch.setattr(colab_setup, "version", lambda name: {"torch": "2.10.0+cu128", "ipywidgets": "7.7.1"}[name])
    monkeypatch.setattr(colab_setup, "KEPT", ("torch", "ipywidgets"))
    assert colab_setup.kept() == ["torch==2.10.0+cu128", "ipywidgets==7.7.1"]
    monkeypatch.undo()
    names = {colab_setup.name_of(one) for one in colab_setup.wanted(ROOT)}
    assert {"tiktoken", "safetensors", "starlette", "uvicorn"} <= names
    assert not names & {"torch", "numpy", "ipywidgets", "jupyterlab", "minimistral"}


def test_colabs_installation_runs_once_and_says_when_it_failed(monkeypatch, capsys):
    calls, status = [], [0]
    monkeypatch.setattr(colab_setup, "installed", lambda: False)
    monkeypatch.setattr(colab_setup.subprocess, "call", lambda command: calls.append(command) or status[0])
    assert colab_setup.main() == 0 and len(calls) == 2
    assert "-c" in calls[0] and calls[1][-3:] == ["--no-deps", "-e", str(ROOT)]
    status[0] = 1
    assert colab_setup.main() == 1 and "Run this cell again" in capsys.readouterr().out
    monkeypatch.setattr(colab_setup, "installed", lambda: True)
    calls.clear()
    assert colab_setup.main() == 0 and not calls


def test_the_branch_holds_the_copies_and_touches_no_file(tmp_path):
    def git(*command):
        done = subprocess.run(["git", *command], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    chapter = CHAPTERS[1]
    for path in (chapter.path(), chapter.path(EXERCISES), "solutions/01_tokens.ipynb"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((ROOT / path).read_bytes())
    (tmp_path / "library.py").write_text("x = 1\n", encoding="utf-8")
    git("init", "-q", "-b", "main")
    git("config", "user.email", "someone@example.org")
    git("config", "user.name", "Someone")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    head = git("rev-parse", "HEAD")
    commit = colab.write_branch(tmp_path, HERE)
    assert git("rev-parse", "colab") == commit and git("rev-parse", "colab^", "HEAD").split() == [head, head]
    assert git("status", "--porcelain") == "" and git("branch", "--show-current") == "main"
    assert git("show", "colab:library.py") == "x = 1"
    copy = json.loads(git("show", f"colab:{chapter.path(EXERCISES)}"))
    assert FAKE in copy["cells"][0]["source"]
    with pytest.raises(ValueError, match="GitHub alone"):
        colab.write_branch(tmp_path, Address("https://git.example.org/a/b"))


# --- Binder, VS Code, a container

def test_binders_files():
    oldest, newest = (3, 11), (3, 13)
    python = (ROOT / ".binder/runtime.txt").read_text(encoding="utf-8").strip()
    assert oldest <= tuple(map(int, python.removeprefix("python-").split("."))) <= newest
    assert (ROOT / ".binder/requirements.txt").read_text(encoding="utf-8").split() == ["uv"]
    script = (ROOT / ".binder/postBuild").read_text(encoding="utf-8")
    assert "-c constraints.txt" in script and '".[course]"' in script and "--torch-backend" in script


@pytest.mark.skipif(os.name == "nt", reason="bash is Linux's and macOS's")
def test_binders_scripts_run():
    for name in ("postBuild", "start"):
        assert os.access(ROOT / ".binder" / name, os.X_OK)
        subprocess.run(["bash", "-n", ROOT / ".binder" / name], check=True)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    shown = subprocess.run([ROOT / ".binder/start", "printenv", "OMP_NUM_THREADS"], env=environment,
                           capture_output=True, text=True, check=True)
    assert shown.stdout == "1\n"


def test_vs_code_and_container_are_readable():
    wanted = json.loads((ROOT / ".vscode/extensions.json").read_text(encoding="utf-8"))["recommendations"]
    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    assert container["customizations"]["vscode"]["extensions"] == wanted
    assert (ROOT / ".binder/postBuild").as_posix().endswith(
        re.search(r"bash (\S+)", container["postCreateCommand"])[1])
