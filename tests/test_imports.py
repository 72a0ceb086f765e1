"""The library stands alone: four packages, no classroom, no network."""

import ast
import importlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import minimistral as mm

PACKAGE = Path(mm.__file__).parent
GLUE = {"cli", "doctor", "lab", "__main__", "__init__"}  # plumbing: may call the classroom, lazily
EXTRAS = {"serve"}  # modules that say themselves which extra they need
ROOMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem not in GLUE | EXTRAS)

# Refuses every installed package but the four, what those require, and minimistral's library.
GATE = textwrap.dedent("""
    import importlib.metadata as metadata, re, sys

    def name_of(requirement):
        return re.sub(r"[-_.]+", "-", re.match(r"[\\w.-]+", requirement)[0]).lower()

    allowed, waiting = set(), ["torch", "numpy", "safetensors", "tiktoken"]
    while waiting:
        name = waiting.pop()
        if name in allowed:
            continue
        allowed.add(name)
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # a requirement of another platform
        waiting += [name_of(need) for need in needs if "extra ==" not in need]

    refused = {
        module for module, owners in metadata.packages_distributions().items()
        if not {name_of(owner) for owner in owners} & (allowed | {"minimistral"})
    } - set(sys.stdlib_module_names)
    assert {"pytest", "nbval"} <= refused and not refused & {"torch", "numpy", "regex"}

    class Gate:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in refused or name.startswith("minimistral.course"):
                raise ModuleNotFoundError(f"refused: {name}", name=name)

    sys.meta_path.insert(0, Gate())

    def no_network(event, arguments):
        if event in ("socket.connect", "socket.getaddrinfo"):
            raise AssertionError(f"{event} {arguments}")

    sys.addaudithook(no_network)
""")


def test_library_imports_behind_the_gate():
    program = GATE + textwrap.dedent(f"""
        import importlib, minimistral as mm
        for room in {ROOMS!r}:
            importlib.import_module("minimistral." + room)
        for name in mm.__all__:
            getattr(mm, name)
        print("all in")
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "all in", done.stderr


def test_the_gate_refuses():
    """The test above could not fail if the gate let everything in."""
    program = GATE + "import minimistral.course"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "refused: minimistral.course" in done.stderr


def test_package_starts_without_torch():
    program = "import sys, minimistral, minimistral.cli, minimistral.doctor; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_mentions_the_classroom(room):
    tree = ast.parse((PACKAGE / f"{room}.py").read_text(encoding="utf-8"))
    imported = [name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names]
    imported += [
        f"{node.module}.{name.name}"
        for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for name in node.names
    ]
    assert not [name for name in imported if name.startswith("minimistral.course")]


def test_public_face_is_complete():
    promised = """ModelConfig MoEConfig MODELS count_parameters Transformer KVCache generate stream load_model
        load_tokenizer save_model Tokenizer load_corpus train TrainConfig""".split()
    assert set(promised) <= set(mm.__all__) <= set(dir(mm))
    with pytest.raises(AttributeError, match="no attribute 'tarin'"):
        mm.tarin


@pytest.mark.parametrize("module_first", [True, False])
def test_function_and_module_of_one_name(module_first):
    """Whatever is imported first, the package offers the function and the module stays in reach."""
    program = textwrap.dedent(f"""
        import importlib, sys, types, minimistral
        for name in ("train", "generate"):
            if {module_first}:
                exec(f"from minimistral.{{name}} import {{name}} as inner; from minimistral import {{name}} as outer")
            else:
                exec(f"from minimistral import {{name}} as outer; from minimistral.{{name}} import {{name}} as inner")
            module = importlib.import_module(f"minimistral.{{name}}")
            assert isinstance(module, types.ModuleType)
            assert inner is outer is getattr(minimistral, name) is getattr(module, name)
            assert callable(outer)
    """)
    subprocess.run([sys.executable, "-c", program], check=True)


def test_every_public_name_is_defined_where_the_table_says():
    for name, home in mm._HOME.items():
        module = importlib.import_module(f"minimistral.{home}")
        assert getattr(mm, name) is getattr(module, name)
        assert getattr(getattr(mm, name), "__module__", module.__name__) == module.__name__


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_import_is_used(path):
    """But for those of a package's __init__, which are there for others, and those that say noqa."""
    text = path.read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.splitlines()
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    said = " ".join(n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    unused = [
        alias.asname or alias.name
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        if getattr(node, "module", "") != "__future__" and "noqa" not in lines[node.lineno - 1]
        for alias in node.names
        if (name := (alias.asname or alias.name).split(".")[0]) not in names and name not in said
    ]
    assert path.name == "__init__.py" or not unused, f"{path.name} imports {unused} for nothing"
