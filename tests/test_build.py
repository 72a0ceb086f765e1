"""The build of the notebooks: what it puts in, what it refuses, what it leaves as it was."""

import ast
import base64
import io
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.figure
import nbformat
import pytest

from minimistral.course import build
from minimistral.course.notebook_compare import (
    difference,
    picture_distance,
    read_rules,
    why_not_compared,
)
from minimistral.course.notebook_library import needed, shown
from minimistral.course.notebook_source import SourceError, choose, read_source

ROOT = Path(__file__).resolve().parents[1]
TRIAL = ROOT / "tests" / "fixtures" / "trial"
RULES = read_rules(ROOT / "tests" / "nbval_sanitize.cfg")


def text(code: str) -> str:
    return textwrap.dedent(code).strip("\n") + "\n"


# ------------------------------------------------------------------ the project's own notebooks


@pytest.mark.parametrize("target", build.targets(), ids=lambda t: t.name)
def test_a_notebook_is_what_its_source_says(target):
    assert build.stale(target) is None, f"{target.name}: run.py build {target.source.stem}"


def test_every_notebook_has_a_source():
    made = {t.notebook for t in build.targets()}
    stored = {p for f in ("notebooks", "solutions", "exercises") for p in ROOT.glob(f"{f}/*.ipynb")}
    assert stored == made


# ------------------------------------------------------------------ a trial course


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    """The trial's sources and its three notebooks, built."""
    root = tmp_path_factory.mktemp("trial") / "course"
    shutil.copytree(TRIAL, root)
    targets = build.targets(root)
    for target in targets:
        target.notebook.parent.mkdir(exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(build.build, targets))
    assert [(name, error) for name, _, error in results] == [(t.name, "") for t in targets]
    return root


def cells(root: Path, folder: str) -> list:
    return nbformat.read(root / folder / "99_trial.ipynb", 4).cells


def test_three_notebooks_come_from_two_sources(trial):
    names = [t.name for t in build.targets(trial)]
    assert names == [f"{f}/99_trial.ipynb" for f in ("notebooks", "solutions", "exercises")]
    assert [t.name for t in build.targets(trial, ["exercises/99"])] == ["exercises/99_trial.ipynb"]
    assert len(build.targets(trial, ["99"])) == 3
    with pytest.raises(SystemExit, match="no source is called 98; there are: 99_trial"):
        build.targets(trial, ["98"])


def test_the_library_cell_is_the_library(trial):
    before, cell = next(
        (a, b) for a, b in zip(cells(trial, "notebooks"), cells(trial, "notebooks")[1:])
        if "library" in b.metadata.get("tags", [])
    )
    code = (ROOT / "minimistral" / "layers.py").read_text(encoding="utf-8")
    assert cell.source.startswith("# minimistral/layers.py\nclass RMSNorm")
    assert cell.source.partition("\n")[2] in code
    assert before.metadata == {"tags": ["imports"], "jupyter": {"source_hidden": True}}
    assert "from torch import Tensor, nn" in before.source
    assert "import torch\n" not in before.source, "an earlier cell has imported torch"


def test_a_rebuild_changes_no_byte(trial):
    target = build.targets(trial, ["notebooks/99"])[0]
    before = target.notebook.read_bytes()
    assert b"hash(object())" in before, "the trial has an output that changes with every run"
    assert build.build(target)[2] == ""
    assert target.notebook.read_bytes() == before
    assert build.build(target, fresh=True)[2] == ""
    changed = target.notebook.read_bytes()
    target.notebook.write_bytes(before)
    assert changed != before, "only a fresh build takes the new output of an uncompared cell"


def test_stored_outputs_hold_no_chance_and_no_machine(trial):
    raw = (trial / "notebooks" / "99_trial.ipynb").read_text(encoding="utf-8")
    assert "widget-view" not in raw and "\\u001b" not in raw and str(ROOT) not in raw
    counts = [c.execution_count for c in cells(trial, "notebooks") if c.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("data:image/png" in str(c.get("outputs")) for c in cells(trial, "notebooks"))


def test_exercises_are_blanked_and_run(trial):
    given = cells(trial, "exercises")
    code = "\n".join(c.source for c in given)
    assert "raise NotImplementedError" in code and "answer = ..." in code
    assert "middle = sum(x)\n" in code
    assert "SOLUTION" not in code and "STUB" not in code and "12.5" not in code
    assert "One line is enough." not in code, "a cell tagged solution"
    outputs = str([c.get("outputs") for c in given])
    assert "not written yet" in outputs and "not answered yet" in outputs
    solved = "\n".join(c.source for c in cells(trial, "solutions"))
    assert "SOLUTION" not in solved and "STUB" not in solved and "middle = sum(x)\n" not in solved
    assert "12.5" in solved and "One line is enough." in solved


def test_what_was_touched_is_stale(trial, tmp_path):
    root = tmp_path / "course"
    shutil.copytree(trial, root)
    story, solution, exercise = build.targets(root)
    assert [build.stale(t) for t in build.targets(root)] == [None] * 3
    source = solution.source.read_text(encoding="utf-8")
    solution.source.write_text(source.replace("12.5", "12.6"), encoding="utf-8")
    assert build.stale(solution) and build.stale(exercise) is None
    solution.source.write_text(f'{source}\n\n# %%\ncheck("no_such_name", 1)\n', encoding="utf-8")
    assert "no exercise is called" in build.stale(solution), "said, and the others are looked at, too"
    notebook = nbformat.read(story.notebook, 4)
    notebook.cells[0].source += "\nA hand was here."
    build.write(notebook, story.notebook)
    assert build.stale(story)
    exercise.notebook.unlink()
    assert build.stale(exercise) == "not built yet"


def test_a_changed_library_makes_its_chapter_stale(tmp_path):
    library, source = tmp_path / "minimistral" / "toy.py", tmp_path / "01_toy.py"
    library.parent.mkdir()
    source.write_text("# %%\n# minimistral/toy.py\n# show: double\n", encoding="utf-8")
    library.write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    one = read_source(source, root=tmp_path).metadata
    library.write_text("def double(x):\n    return x + x\n", encoding="utf-8")
    build_module_cache_clear()
    assert read_source(source, root=tmp_path).metadata != one


def build_module_cache_clear():
    from minimistral.course.notebook_library import read_module

    read_module.cache_clear()


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import sys\nprint('careful', file=sys.stderr)", "wrote to stderr"),
        ("import warnings\nwarnings.warn('old')", "wrote to stderr"),
        ("# %% tags=['raises-exception']\nprint('fine')", "does not raise"),
    ],
    ids=["raises", "stderr", "warns", "does not raise"],
)
def test_a_notebook_that_went_wrong_is_not_written(tmp_path, cell, message):
    source = tmp_path / "notebooks" / "src" / "01_wrong.py"
    source.parent.mkdir(parents=True)
    head = "" if cell.startswith("# %%") else "# %%\n"
    source.write_text(f"# %% [markdown]\n# # Wrong\n\n{head}{cell}\n".replace("'", '"'), "utf-8")
    target = build.targets(tmp_path)[0]
    error = build.build(target)[2]
    assert message in error and cell.splitlines()[-1].replace("'", '"') in error
    assert not target.notebook.exists()


# ------------------------------------------------------------------ the markup


def test_a_solution_region_gives_a_stub_or_the_part_given_for_it():
    function = text("""
        def f(x):
            ### BEGIN SOLUTION
            y = 2 * x
            return y
            ### END SOLUTION
    """)
    stub = "def f(x):\n    # your code here\n    raise NotImplementedError\n"
    assert choose(function, exercise=True) == stub
    assert choose(function, exercise=False) == "def f(x):\n    y = 2 * x\n    return y\n"
    given = text("""
        def f(x):
            ### BEGIN SOLUTION
            return [i for i in x if i]
            ### STUB
            # found = []
            # for i in x:
            #     ...
            #
            # return found
            ### END SOLUTION
    """)
    lines = "    found = []\n    for i in x:\n        ...\n\n    return found\n"
    assert choose(given, exercise=True) == f"def f(x):\n{lines}"
    assert choose(given, exercise=False) == "def f(x):\n    return [i for i in x if i]\n"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("### BEGIN SOLUTION\nx = 1\n### END SOLUTION\n", "needs a '### STUB'"),
        ("### BEGIN SOLUTION\nx = 1\n", "without its partner"),
        ("### BEGIN SOLUTION\nx = 1\n### STUB\nx = 2\n### END SOLUTION\n", "is a comment"),
        ("### STUB\n# x = 1\n", "without its partner"),
    ],
)
def test_wrong_markup_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        choose(wrong, exercise=True)


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("# NBVAL_IGNORE_OUTPUT\nprint(1)", "say why"),
        ("# minimistral/layers.py\n# show: RMSNorm\nprint(1)", "is two lines"),
        ("# minimistral/layers.py\n# show: Nothing", "has no 'Nothing'; it has RMSNorm"),
        ("# minimistral/nowhere.py\n# show: Nothing", "nowhere.py"),
    ],
)
def test_an_error_in_a_source_names_file_and_cell(tmp_path, cell, message):
    path = tmp_path / "01_wrong.py"
    path.write_text(f"# %%\n{cell}\n", encoding="utf-8")
    with pytest.raises(SourceError, match=message) as error:
        read_source(path)
    assert "01_wrong.py" in str(error.value) and cell.splitlines()[0] in str(error.value)


TOY = text('''
    """A module."""
    from __future__ import annotations

    import math
    import torch.nn.functional as F
    from torch import Tensor, nn

    from .layers import RMSNorm

    SCALE = 3
    LIMIT = SCALE + 1


    def _helper(x):
        return min(LIMIT, math.sqrt(x))


    def other(x):
        return x


    @staticmethod
    def shown(x: Tensor) -> RMSNorm:
        """One line.

        And more.
        """
        return F.relu(_helper(other(x)))


    class Uses:
        def run(self):
            return shown(1), other(2)
''')


@pytest.fixture
def toy(tmp_path):
    (tmp_path / "minimistral").mkdir()
    (tmp_path / "minimistral" / "toy.py").write_text(TOY, encoding="utf-8")
    return lambda f, *rest: f("minimistral/toy.py", *rest, tmp_path)


def test_a_definition_is_shown_verbatim_with_its_decorator(toy):
    source = toy(shown, ["shown"])
    assert source.startswith("# minimistral/toy.py\n@staticmethod\ndef shown(")
    assert source.partition("\n")[2] in TOY


def test_what_a_definition_needs_comes_before_it(toy):
    known: set = set()
    assert toy(needed, ["shown"], known) == text("""
        from __future__ import annotations
        import math
        from torch import Tensor
        import torch.nn.functional as F
        from minimistral.layers import RMSNorm
        from minimistral.toy import other

        SCALE = 3

        LIMIT = SCALE + 1

        def _helper(x):
            return min(LIMIT, math.sqrt(x))
    """).rstrip("\n")
    assert toy(needed, ["Uses"], known) == "", "the notebook has all of it by now"


def test_wide_imports_are_wrapped(tmp_path):
    (tmp_path / "minimistral").mkdir()
    names = [f"a_helper_with_a_long_name_{n}" for n in range(6)]
    helpers = "".join(f"def {name}():\n    return 1\n\n\n" for name in names)
    body = " + ".join(f"{name}()" for name in names[:2])
    more = "".join(f"    x += {name}()\n" for name in names[2:])
    path = tmp_path / "minimistral" / "wide.py"
    path.write_text(f"{helpers}def f():\n    x = {body}\n{more}    return x\n", encoding="utf-8")
    source = needed("minimistral/wide.py", ["f"], set(), tmp_path)
    assert max(map(len, source.splitlines())) <= 84, source
    [statement] = ast.parse(source).body
    assert statement.module == "minimistral.wide" and [a.name for a in statement.names] == names
    assert source.startswith("from minimistral.wide import (\n")


def test_too_much_at_once_is_refused(tmp_path):
    (tmp_path / "minimistral").mkdir()
    path = tmp_path / "minimistral" / "toy.py"
    body = "".join(f"    x += {n}\n" for n in range(45))
    docstring = '    """' + "Long.\n" * 30 + '    """\n'
    path.write_text(f"def f(x):\n{docstring}{body}", encoding="utf-8")
    with pytest.raises(ValueError, match="46 lines without docstrings"):
        shown("minimistral/toy.py", ["f"], tmp_path)
    build_module_cache_clear()
    path.write_text(f"def f(x):\n    return x{' + 1' * 20}\n", encoding="utf-8")
    with pytest.raises(ValueError, match="over 84 columns"):
        shown("minimistral/toy.py", ["f"], tmp_path)


# ------------------------------------------------------------------ what counts as the same


def plot(heights, title="a title", size=(4, 3)) -> bytes:
    figure = matplotlib.figure.Figure(figsize=size)
    axes = figure.subplots()
    axes.bar(range(len(heights)), heights)
    axes.set_title(title)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def shown_figure(png: bytes, alt: str = "Three bars.") -> list:
    picture = base64.b64encode(png).decode()
    page = f'<img alt="{alt}" src="data:image/png;base64,{picture}">'
    data = {"text/html": page, "text/plain": "<IPython.core.display.HTML object>"}
    return [nbformat.v4.new_output("display_data", data=data)]


def test_a_changed_figure_is_told_and_another_letter_is_not():
    old = plot([1, 2, 3])
    assert picture_distance(old, plot([1, 2, 3])) == 0
    assert 0 < picture_distance(old, plot([1, 2, 3], "a tit1e")) < 8
    assert picture_distance(old, plot([3, 2, 1])) > 8
    assert picture_distance(old, plot([1, 2, 3], size=(4, 4))) == 999
    assert difference(shown_figure(old), shown_figure(plot([1, 2, 3])), RULES) is None
    assert "figure 1 differs" in difference(shown_figure(old), shown_figure(plot([3, 2, 1])), RULES)
    assert "text/html" in difference(shown_figure(old), shown_figure(old, "Four bars."), RULES)
    assert "stored outputs" in difference(shown_figure(old), [], RULES)


def stream(words: str, name: str = "stdout") -> list:
    return [nbformat.v4.new_output("stream", name=name, text=words)]


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("loss 1.2345", "loss 1.2345", True),
        ("loss 1.2345", "loss 1.2346", False),
        ("took 1.23 s", "took 12 s", True),
        ("took 1.23 s", "took long", False),
        ("<W at 0x7f0011223344>", "<W at 0x55aabbccddee>", True),
        ("1 steps", "2 steps", False),
        ("10%\r20%\n", "20%\n", True),
    ],
)
def test_text_is_compared_strictly_but_for_times_and_addresses(old, new, same):
    assert (difference(stream(old), stream(new), RULES) is None) == same


def test_streams_may_be_split_but_not_renamed():
    assert difference(stream("a") + stream("b"), stream("ab"), RULES) is None
    assert difference(stream("a"), stream("a", "stderr"), RULES)


# ------------------------------------------------------------------ nbval, as this project runs it


def test_nbval_catches_a_changed_figure_and_a_changed_word(tmp_path):
    """A notebook is run as `run.py test` runs it: true cells pass, doctored ones fail."""
    if why_not_compared():
        pytest.skip(why_not_compared())
    code = text("""
        import base64
        from IPython.display import HTML, display

        def draw(png):
            display(HTML(f'<img alt="Three bars." src="data:image/png;base64,{png}">'));
    """)
    good, bad = plot([1, 2, 3]), plot([3, 2, 1])
    figures = f"old = {base64.b64encode(good).decode()!r}\n"
    (tmp_path / "figures.py").write_text(figures, encoding="utf-8")
    made = [
        (code + "import figures", []),
        ("draw(figures.old)", shown_figure(good)),  # 1 true
        ("draw(figures.old)", shown_figure(bad)),  # 2 doctored
        ("print('one')", stream("one\n")),  # 3 true
        ("print('one')", stream("two\n")),  # 4 doctored
        ("4;", []),  # 5 a semicolon
        ("import os\nprint(os.environ['MINIMISTRAL_TESTING'])", stream("1\n")),  # 6
        ("print(os.listdir(os.environ['MINIMISTRAL_WORK']))", stream("[]\n")),  # 7 fresh
    ]
    notebook = nbformat.v4.new_notebook()
    for source, outputs in made:
        cell = nbformat.v4.new_code_cell(source, outputs=outputs, execution_count=1)
        notebook.cells.append(cell)
    nbformat.write(notebook, tmp_path / "doctored.ipynb")
    options = ["-p", "conftest", "-c", "pyproject.toml", "--rootdir", ".", "-rA", "--color=no"]
    command = [sys.executable, "-m", "pytest", *options, tmp_path / "doctored.ipynb"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    failed = {x.split("Cell ")[1][0] for x in done.stdout.splitlines() if x.startswith("FAILED")}
    passed = {x.split("Cell ")[1][0] for x in done.stdout.splitlines() if x.startswith("PASSED")}
    assert (passed, failed) == (set("013567"), set("24")), done.stdout + done.stderr
    assert "figure 1 differs from the stored one" in done.stdout
