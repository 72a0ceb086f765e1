"""run.py, the files it reads, and the learner's folder. Nothing is installed here."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from minimistral import lab

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run.py as a module whose checkout and environment are folders of this test."""
    spec = importlib.util.spec_from_file_location("run_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "constraints.txt"):
        (checkout / name).write_text(f"# {name}", encoding="utf-8")
    monkeypatch.setattr(module, "ROOT", checkout)
    monkeypatch.setattr(module, "ENV", checkout / ".venv")
    monkeypatch.setattr(module, "PYTHON", checkout / ".venv/bin/python")
    return module


@pytest.fixture
def calls(run, monkeypatch):
    """The commands that run.py would have started; `calls.status` is what they would return."""

    class Calls(list):
        status = 0

    made = Calls()

    def call(command, **options):
        made.append([str(part) for part in command])
        return made.status

    def create(folder, **options):
        made.append(["venv", folder])
        run.PYTHON.parent.mkdir(parents=True, exist_ok=True)
        run.PYTHON.touch()
        (run.ENV / "pyvenv.cfg").touch()

    monkeypatch.setattr(run.subprocess, "call", call)
    monkeypatch.setattr(run.venv, "create", create)
    return made


def installs(calls):
    return [call for call in calls if call[1:4] == ["-m", "pip", "install"]]


# --- run.py: which Python

@pytest.mark.parametrize("version", [(3, 11, 0), (3, 12, 4), (3, 13, 9)])
def test_supported_python(run, version):
    run.check_python(version)


@pytest.mark.parametrize("version", [(2, 7, 18), (3, 10, 14), (3, 14, 0)])
def test_other_python_is_refused_with_the_way_out(run, version, monkeypatch):
    monkeypatch.setattr(run, "other_python", lambda: None)
    with pytest.raises(run.Problem, match=r"3\.11, 3\.12 or 3\.13.*python\.org"):
        run.check_python(version)
    monkeypatch.setattr(run, "other_python", lambda: "python3.12")
    monkeypatch.setattr(sys, "argv", ["run.py", "test"])
    with pytest.raises(run.Problem, match=r"python3\.12 run\.py test$"):
        run.check_python(version)


def test_an_old_python_can_read_run_py():
    source = (ROOT / "run.py").read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 6))
    imported = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


# --- run.py: installing once

def test_first_start_creates_and_installs_pinned(run, calls):
    run.ready("course")
    assert ["venv", str(run.ENV)] in calls
    (install,) = installs(calls)
    assert install[-4:] == ["-c", "constraints.txt", "-e", ".[course]"]


def test_a_folder_that_cannot_be_written_is_told(run, calls, monkeypatch):
    def refuse(folder, **options):
        raise OSError(30, "Read-only file system", folder)

    monkeypatch.setattr(run.venv, "create", refuse)
    with pytest.raises(run.Problem, match="Read-only file system.*may write to"):
        run.ready("course")


def test_second_start_does_nothing(run, calls):
    run.ready("course")
    calls.clear()
    run.ready("course")
    assert calls == []


def test_tests_bring_all_that_the_lab_needs_but_not_the_other_way(run, calls):
    run.ready("course")
    run.ready("test")
    assert [call[-1] for call in installs(calls)] == [".[course]", ".[test]"]
    run.stamp("course").unlink()
    calls.clear()
    run.ready("course")
    assert calls == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(run, calls, name):
    run.ready("test")
    (run.ROOT / name).write_text("changed", encoding="utf-8")
    calls.clear()
    run.ready("test")
    assert len(installs(calls)) == 1


def test_environment_of_another_checkout_is_installed_again(run, calls, tmp_path, monkeypatch):
    run.ready("course")
    other = tmp_path / "other"
    shutil.copytree(run.ROOT, other, ignore=shutil.ignore_patterns(".venv"))
    monkeypatch.setattr(run, "ROOT", other)
    calls.clear()
    run.ready("course")
    assert len(installs(calls)) == 1


def test_failed_installation_is_said_and_tried_again(run, calls, capsys):
    calls.status = 1
    with pytest.raises(run.Problem, match="Run the same command again"):
        run.ready("course")
    calls.status = 0
    calls.clear()
    run.ready("course")
    assert len(installs(calls)) == 1


def test_half_installed_packages_are_removed_before_the_next_try(run, calls):
    site = run.ENV / "lib/python3.11/site-packages"
    for name in ("whole-1.dist-info", "half-1.dist-info", "~orch"):
        (site / name).mkdir(parents=True)
        (site / name / "METADATA").touch()
    (site / "whole-1.dist-info" / "RECORD").touch()
    (run.ENV / "pyvenv.cfg").touch()
    run.ready("course")
    assert sorted(path.name for path in site.iterdir()) == ["whole-1.dist-info"]


def test_a_folder_that_is_no_environment_is_left_alone(run, calls):
    package = run.ENV / "lib/python3.11/site-packages/theirs-1.dist-info"
    package.mkdir(parents=True)
    with pytest.raises(run.Problem, match="MINIMISTRAL_VENV"):
        run.ready("course")
    assert package.exists() and calls == []


def test_real_environment_with_broken_pip_is_repaired(run, monkeypatch):
    """A venv interrupted before pip was there: no network is needed to finish it."""
    real = run.ENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    monkeypatch.setattr(run, "PYTHON", real)
    run.venv.create(run.ENV, with_pip=False, symlinks=os.name != "nt")
    assert not run.pip_works()
    run.make_environment()
    assert run.pip_works()


# --- run.py: what is started

@pytest.fixture
def chapter_eight(run):
    for name in ("notebooks/08_window", "solutions/08_window", "exercises/08_window", "notebooks/02_other"):
        path = run.ROOT / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return run


def test_one_chapter(chapter_eight):
    run = chapter_eight
    paths = ["notebooks/08_window.ipynb", "solutions/08_window.ipynb", "exercises/08_window.ipynb"]
    command = run.command_line("test", ["08", "-x"])
    assert command == ["-m", "pytest", "-n", "2", "--dist", "loadfile", *paths, "-x"]
    assert run.command_line("test", ["8", "-x"]) == command
    own_tests = run.ROOT / "tests/chapters/test_08_window.py"
    own_tests.parent.mkdir(parents=True)
    own_tests.touch()
    assert "tests/chapters/test_08_window.py" in run.command_line("test", ["08"])


def test_unknown_chapter_is_named_with_those_that_are_there(chapter_eight):
    with pytest.raises(chapter_eight.Problem, match=r"no chapter 09 .*02, 08"):
        chapter_eight.command_line("test", ["9"])


def test_options_go_through(run):
    assert run.command_line("test", ["-n", "4"]) == ["-m", "pytest", "--dist", "loadfile", "-n", "4"]
    assert run.command_line("lab", ["--no-browser"]) == ["-m", "minimistral", "lab", "--no-browser"]
    assert run.command_line("build", ["02"]) == ["-m", "minimistral.course.build", "02"]
    assert run.command_line("report", ["--quick"]) == ["-m", "minimistral.course.report", "--quick"]


def test_status_of_the_command_is_run_pys(run, calls, capsys):
    run.ready("test")
    calls.status = 1
    assert run.main(["test"]) == 1
    assert run.main(["unheard-of"]) == 2
    assert "run.py lab" in capsys.readouterr().out


def test_a_problem_is_one_message_without_traceback(run, calls, capsys):
    assert run.main(["test", "77"]) == 2
    error = capsys.readouterr().err
    assert "no chapter 77" in error and "Traceback" not in error


# --- the files beside it

def test_constraints_pin_everything_and_name_no_host():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pin = re.compile(r"[a-z0-9-]+==[0-9][0-9.]*(b[0-9]+)?( ; .+)?")  # some publish betas alone
    assert [line for line in lines if not pin.fullmatch(line)] == []
    names = {line.split("==")[0] for line in lines}
    assert "torch==2.13.0" in lines and "setuptools" not in names
    wanted = project()["dependencies"] + sum(project()["optional-dependencies"].values(), [])
    needed = {re.match(r"[\w-]+", one)[0].lower() for one in wanted} - {"minimistral"}
    assert needed <= names


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_python_versions_agree(run):
    oldest, newest = run.OLDEST, run.NEWEST
    assert project()["requires-python"] == f">={oldest[0]}.{oldest[1]},<3.{newest[1] + 1}"


@pytest.mark.skipif(os.name == "nt", reason="bash is Linux's and macOS's")
def test_ci_script_installs_anew_and_runs_the_readmes_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text(encoding="utf-8")
    assert "mktemp -d" in text and "run.py test" in text
    assert ".ci/run" in (ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8")


# --- the learner's folder

@pytest.fixture
def course(tmp_path):
    course = tmp_path / "course"
    for folder in lab.FOLDERS:
        (course / folder).mkdir(parents=True)
        (course / folder / "00_start_here.ipynb").write_text(f"{folder} v1", encoding="utf-8")
    return course, tmp_path / "work"


def texts(work):
    return {
        path.relative_to(work).as_posix(): path.read_text(encoding="utf-8")
        for path in work.rglob("*.ipynb")
    }


def test_first_copy_keeps_the_folders_so_that_links_hold(course):
    lab.copy_course(*course)
    assert texts(course[1]) == texts(course[0])


def test_second_copy_writes_nothing(course):
    lab.copy_course(*course)
    assert lab.copy_course(*course) == []


def test_untouched_copies_follow_the_originals(course):
    original, work = course
    lab.copy_course(original, work)
    (original / "notebooks/00_start_here.ipynb").write_text("v2", encoding="utf-8")
    assert lab.copy_course(original, work) == [Path("notebooks/00_start_here.ipynb")]
    assert texts(work) == texts(original)


def test_a_learners_file_is_never_overwritten(course):
    original, work = course
    lab.copy_course(original, work)
    theirs = work / "exercises/00_start_here.ipynb"
    theirs.write_text("my answer", encoding="utf-8")
    assert lab.copy_course(original, work) == []  # the original did not change: nothing to tell

    upstream = original / "exercises/00_start_here.ipynb"
    upstream.write_text("v2", encoding="utf-8")
    beside = Path("exercises/00_start_here.new.ipynb")
    assert lab.copy_course(original, work) == [beside]
    assert lab.copy_course(original, work) == []
    assert theirs.read_text("utf-8") == "my answer"
    assert (work / beside).read_text("utf-8") == "v2"

    upstream.write_text("v3", encoding="utf-8")  # the untouched .new follows
    assert lab.copy_course(original, work) == [beside]
    (work / beside).write_text("my second answer", encoding="utf-8")
    upstream.write_text("v4", encoding="utf-8")  # a changed .new does not
    assert lab.copy_course(original, work) == [Path("exercises/00_start_here.new2.ipynb")]
    assert theirs.read_text("utf-8") == "my answer"
    assert (work / beside).read_text("utf-8") == "my second answer"


def test_files_that_were_there_before_are_the_learners(course):
    original, work = course
    (work / "notebooks").mkdir(parents=True)
    (work / "notebooks/00_start_here.ipynb").write_text("from elsewhere", encoding="utf-8")
    lab.copy_course(original, work)
    assert (work / "notebooks/00_start_here.ipynb").read_text("utf-8") == "from elsewhere"
    assert (work / "notebooks/00_start_here.new.ipynb").read_text("utf-8") == "notebooks v1"


def test_deleting_is_respected_for_updates_and_undone_for_chapters(course):
    original, work = course
    lab.copy_course(original, work)
    theirs = work / "notebooks/00_start_here.ipynb"
    theirs.write_text("mine", encoding="utf-8")
    (original / "notebooks/00_start_here.ipynb").write_text("v2", encoding="utf-8")
    lab.copy_course(original, work)
    (work / "notebooks/00_start_here.new.ipynb").unlink()
    assert lab.copy_course(original, work) == []
    theirs.unlink()
    assert lab.copy_course(original, work) == [Path("notebooks/00_start_here.ipynb")]


def test_the_greeting_never_stands_in_the_way(capsys):
    lab.greet("no-such-model")
    assert "could not greet you" in capsys.readouterr().out


def test_a_chapter_begun_anew_keeps_what_was_there(course):
    original, work = course
    lab.copy_course(original, work)
    changed, fresh = work / "exercises" / "00_start_here.ipynb", "exercises v1"
    for n, kept in enumerate(("00_start_here.old.ipynb", "00_start_here.old2.ipynb")):
        changed.write_text(f"mine {n}", encoding="utf-8")
        done = dict(lab.reset_chapter(original, work, 0))
        assert done[Path("exercises/00_start_here.ipynb")] == Path("exercises") / kept
        assert done[Path("notebooks/00_start_here.ipynb")] is None
        assert changed.read_text("utf-8") == fresh
        assert (changed.parent / kept).read_text("utf-8") == f"mine {n}"
    assert lab.copy_course(original, work) == []  # it counts as copied, and nothing is to tell
    with pytest.raises(ValueError, match="no chapter 7"):
        lab.reset_chapter(original, work, 7)


def test_lab_opens_the_first_chapter_of_the_learners_folder(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(lab, "course_work_folder", lambda: tmp_path / "work")
    monkeypatch.setattr(lab, "greet", lambda: None)
    monkeypatch.setattr(
        lab.subprocess, "call", lambda command, cwd: started.update(command=command, cwd=cwd) or 0
    )
    course = tmp_path / "course"
    (course / "notebooks").mkdir(parents=True)
    (course / "notebooks/00_start_here.ipynb").touch()
    monkeypatch.setattr(lab, "course_folder", lambda: course)
    assert lab.main(browser=False, options=[]) == 0
    assert started["cwd"] == tmp_path / "work"
    assert (tmp_path / "work" / lab.FIRST).exists()
    assert f"--LabApp.default_url=/lab/tree/{lab.FIRST}" in started["command"]
    assert f"--ServerApp.root_dir={tmp_path / 'work'}" in started["command"]
    assert "--no-browser" in started["command"]


# --- the README

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readmes_table_is_the_syllabus():
    from minimistral.course.syllabus import readme_table

    table = README.split("<!-- syllabus -->\n")[1].split("\n<!-- /syllabus -->")[0]
    assert table == readme_table(), "put minimistral.course.syllabus.readme_table() between the marks"


def test_readmes_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)", README)
    assert targets and [target for target in targets if not (ROOT / target).exists()] == []


def test_readmes_examples_run(capsys):
    checked, example, in_a_notebook = re.findall(r"```python\n(.*?)```", README, re.S)
    exec(compile(checked, "<a cell>", "exec"), {})
    answer = README.split(f"{checked}```\n\n```\n")[1].split("```")[0]
    assert answer.split() == capsys.readouterr().out.split()
    exec(compile(in_a_notebook, "README.md", "exec"), {})
    capsys.readouterr()
    exec(compile(example, "README.md", "exec"), {})
    tale, parameters, cache = capsys.readouterr().out.strip().rsplit("\n", 2)
    assert len(tale) > 40
    assert (parameters, cache) == ("7,241,732,096 parameters", "128 KiB of cache per token")


def test_readmes_commands_exist():
    from minimistral.cli import build_parser

    said = set(re.findall(r"^(?:\S*bin/|uv run --no-sync )?minimistral (.+)$", README, re.M))
    assert len(said) >= 5
    for command in said:
        build_parser().parse_args(re.findall(r'"[^"]*"|\S+', command))
    assert README.index("python3 run.py lab") < README.index("python3 run.py test")
    assert "not affiliated with or endorsed by Mistral AI" in README
