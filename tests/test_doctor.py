"""The doctor: one line per requirement, a repair on each that is not met, offline."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import nbformat
import pytest

from minimistral import doctor
from minimistral.course import offline


def only(findings):
    (finding,) = findings
    return finding


def test_report_of_this_machine_is_offline_and_its_status_is_the_verdict():
    program = textwrap.dedent("""
        import sys

        def no_network(event, arguments):
            if event in ("socket.connect", "socket.getaddrinfo"):
                raise AssertionError(f"{event} {arguments}")

        sys.addaudithook(no_network)
        from minimistral.cli import main
        sys.exit(main(["doctor"]))
    """)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    *lines, empty, verdict = done.stdout.splitlines()
    words = [line.split()[0] for line in lines]
    assert set(words) <= {"OK", "WARN", "MISSING", "OPTIONAL"} and not empty
    assert done.returncode == ("MISSING" in words), done.stdout + done.stderr
    assert verdict.startswith("Ready." if done.returncode == 0 else f"{words.count('MISSING')} missing")
    for topic in ("Python", "torch", "device", "memory", "disk", "kernel", "widgets", "work folder",
                  "shipped models", "sentencepiece", "Chromium"):
        assert sum(f"  {topic}:" in line for line in lines) == 1, topic


def test_only_missing_things_fail(monkeypatch, capsys):
    findings = [doctor.Finding("a", doctor.WARN, "x", "Do this"), doctor.Finding("b", doctor.OPTIONAL, "y")]
    monkeypatch.setattr(doctor, "CHECKS", (lambda: iter(findings),))
    assert doctor.main() == 0
    assert "WARN      a: x. Do this.\n" in capsys.readouterr().out
    findings.append(doctor.Finding("c", doctor.MISSING, "z", "Do that"))
    assert doctor.main() == 1
    assert "1 missing" in capsys.readouterr().out


def test_other_python(monkeypatch):
    assert only(doctor.python()).status == doctor.OK
    monkeypatch.setattr(sys, "version_info", (3, 14, 0))
    finding = only(doctor.python())
    assert finding.status == doctor.MISSING and "3.11, 3.12 or 3.13" in finding.repair


def test_broken_library_is_reported_and_not_raised(monkeypatch):
    real = doctor.importlib.import_module

    def broken(name):
        if name == "torch":
            raise OSError("libtorch.so: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    finding = next(doctor.libraries())
    assert (finding.name, finding.status) == ("torch", doctor.MISSING)
    assert "libtorch.so" in finding.detail and "pip install torch" in finding.repair
    assert only(doctor.device()).status == doctor.MISSING


def test_old_torch(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "2.8.1")
    finding = next(doctor.libraries())
    assert finding.status == doctor.MISSING and "torch>=2.9" in finding.repair


def test_memory(monkeypatch):
    assert doctor.total_memory() > doctor.GIB // 2
    for size, status in ((2 * doctor.GIB, doctor.WARN), (8 * doctor.GIB, doctor.OK), (None, doctor.WARN)):
        monkeypatch.setattr(doctor, "total_memory", lambda size=size: size)
        assert only(doctor.memory()).status == status


@pytest.fixture
def kernels(tmp_path, monkeypatch):
    """A machine whose kernel python3 starts the given command; without one it has none."""
    import jupyter_core.paths

    monkeypatch.setattr(jupyter_core.paths, "jupyter_path", lambda name: [str(tmp_path)])

    def start(command: str) -> None:
        (tmp_path / "python3").mkdir(exist_ok=True)
        spec = json.dumps({"argv": [command, "-m", "ipykernel_launcher"]})
        (tmp_path / "python3" / "kernel.json").write_text(spec, encoding="utf-8")

    return start


@pytest.mark.parametrize("command", ["python", sys.executable, str(Path(sys.executable).with_name("python3"))])
def test_kernel_of_this_python(kernels, command):
    kernels(command)
    assert [finding.status for finding in doctor.jupyter()] == [doctor.OK, doctor.OK]


def test_kernel_of_another_python(kernels, tmp_path):
    kernels(str(tmp_path / "other" / "bin" / "python"))
    *_, kernel = doctor.jupyter()
    assert kernel.status == doctor.MISSING and "other" in kernel.detail
    assert "ipykernel install --sys-prefix" in kernel.repair


def test_no_kernel(kernels):
    *_, kernel = doctor.jupyter()
    assert kernel.status == doctor.MISSING and kernel.repair


def test_widgets_need_the_browsers_half(monkeypatch, tmp_path):
    assert only(doctor.widgets()).status == doctor.OK
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    finding = only(doctor.widgets())
    assert finding.status == doctor.MISSING and "jupyterlab_widgets" in finding.repair


def test_without_the_course_extra(monkeypatch):
    monkeypatch.setattr(doctor, "_has", lambda module: False)
    for check in (doctor.jupyter, doctor.widgets, doctor.figures):
        for finding in check():
            assert finding.status == doctor.MISSING and "minimistral[course]" in finding.repair
    for finding in list(doctor.options())[:4]:
        assert finding.status == doctor.OPTIONAL and "pip install" in finding.repair


def test_work_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMISTRAL_WORK", str(tmp_path / "not" / "yet"))
    assert only(doctor.work()).status == doctor.OK
    assert not (tmp_path / "not").exists()

    def read_only(dir):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", read_only)
    finding = only(doctor.work())
    assert finding.status == doctor.MISSING and "MINIMISTRAL_WORK" in finding.repair


def test_models(monkeypatch):
    monkeypatch.setattr(doctor, "NAMES", ("no-such-model",))
    finding = only(doctor.models())
    assert finding.status == doctor.MISSING and "no-such-model" in finding.detail


def test_real_checkpoint(monkeypatch, tmp_path):
    monkeypatch.delenv("MINIMISTRAL_CHECKPOINT", raising=False)
    assert doctor._checkpoint().status == doctor.OPTIONAL
    monkeypatch.setenv("MINIMISTRAL_CHECKPOINT", str(tmp_path))
    assert doctor._checkpoint().status == doctor.WARN
    (tmp_path / "params.json").touch()
    assert doctor._checkpoint().status == doctor.OK


# --- doctor --offline

def tiny(path: Path, *sources: str) -> Path:
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_models_and_corpora_are_tried_without_a_network(monkeypatch):
    found = list(offline.models_and_corpora())
    assert [finding.status for finding in found] == [doctor.OK] * 5
    monkeypatch.setattr(offline, "TRY_MODELS", "import socket; socket.create_connection(('192.0.2.1', 9))")
    finding = only(offline.models_and_corpora())
    assert finding.status == doctor.MISSING and "refused" in finding.detail


def test_the_front_end_comes_from_this_machine():
    found = list(offline.front_end())
    assert [(finding.name, finding.status) for finding in found] == [
        ("JupyterLab's page", doctor.OK), ("widgets in the browser", doctor.OK), ("formulas", doctor.OK)]


def test_a_page_that_loads_from_elsewhere_is_seen():
    page = """<script id="jupyter-config-data" type="application/json">
              {"federated_extensions": [{"name": "@a/b", "load": "static/entry.js"}]}</script>
              <link rel="icon" href="/static/i.ico"><script defer src="https://cdn.example.org/x.js"></script>"""
    links = offline.Links(page, "http://127.0.0.1:9/")
    assert links.all == ["http://127.0.0.1:9/static/i.ico", "https://cdn.example.org/x.js"]
    assert links.extensions == {"@a/b": "http://127.0.0.1:9/lab/extensions/@a/b/static/entry.js"}


def test_a_server_that_does_not_start_is_said(monkeypatch):
    monkeypatch.setattr(offline.lab, "lab_arguments", lambda folder: ["--no-such-option-at-all=1", "--version"])
    finding = only(offline.front_end())
    assert finding.status == doctor.MISSING and "did not start" in finding.detail


def test_a_notebook_that_asks_another_machine_is_found_out(tmp_path):
    good = tiny(tmp_path / "good.ipynb", "print(1)")
    bad = tiny(tmp_path / "bad.ipynb", "import urllib.request", "urllib.request.urlopen('http://192.0.2.1/')")
    assert offline._run(good).status == doctor.OK
    finding = offline._run(bad)
    assert finding.status == doctor.MISSING and "code cell 2" in finding.detail


def test_cells_that_would_download_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(offline.lab, "course_folder", lambda: tmp_path)
    monkeypatch.setattr(offline, "_run", lambda path: doctor.Finding("run", doctor.OK, ""))
    tiny(tmp_path / "notebooks/01_a.ipynb", "x = 1  # download=True fetches it", "nn.Embedding.from_pretrained(w)")
    assert [finding.status for finding in offline.notebooks()] == [doctor.OK, doctor.OK]
    for bad in ("load_corpus('shakespeare', download=True)", "%pip install x", "tiktoken.get_encoding('gpt2')",
                "AutoModel.from_pretrained('x')"):
        tiny(tmp_path / "exercises/02_b.ipynb", bad)
        finding = next(offline.notebooks())
        assert finding.status == doctor.MISSING and "exercises/02_b.ipynb" in finding.detail, bad


def test_a_pack_is_compared_where_one_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert list(offline.pack()) == []
    (tmp_path / "pack.json").write_text("{}", encoding="utf-8")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of "{}"
    (tmp_path / "SHA256SUMS").write_text(f"{digest}  pack.json\n", encoding="utf-8")
    assert only(offline.pack()).status == doctor.OK
    (tmp_path / "pack.json").write_text("{ }", encoding="utf-8")
    assert only(offline.pack()).status == doctor.MISSING


def test_offline_adds_its_checks(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "CHECKS", ())
    monkeypatch.setattr(offline, "CHECKS", (lambda: iter([doctor.Finding("pack", doctor.MISSING, "torn")]),))
    assert doctor.main() == 0 and doctor.main(offline=True) == 1
    assert "MISSING   pack: torn" in capsys.readouterr().out
