"""A pack for a room without a network: how large, how long, and does it work with the network cut off?

    python benchmarks/pack.py [--only-page]

Makes a pack for this machine in a temporary folder, installs it in another one, runs `minimistral doctor --offline`
there and chapter 2 from its first cell to its last, all three in a network namespace that has no network
(Linux's `unshare`). Writes the record and the sentences of docs/opening.md. One run; no seed: nothing is drawn.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minimistral.provenance import provenance

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "pack.json"
PAGE = ROOT / "docs" / "opening.md"
CUT = ["unshare", "-rn", "sh", "-c", 'ip link set lo up; exec "$@"', "cut"]  # loopback stays, as in a room
CHAPTER = """
from pathlib import Path
from minimistral.course.check_notebooks import run_notebook
done = run_notebook(Path("work/notebooks/02_attention.ipynb"), 900)
raise SystemExit(done.broken or "; ".join(done.errors) or 0)
"""


def megabytes(folder: Path) -> float:
    return round(sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink()) / 1e6, 1)


def timed(command: list, where: Path, environment: dict) -> float:
    began = time.monotonic()
    subprocess.run(command, cwd=where, env=environment, check=True)
    return round(time.monotonic() - began, 1)


def measure() -> dict:
    known = provenance("python benchmarks/pack.py", network="packages from a mirror nearby while packing, none after")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MINIMISTRAL_")} | {"PIP_NO_CACHE_DIR": "1"}
    if subprocess.run([*CUT, "sh", "-c", "! ip route get 192.0.2.1"], capture_output=True).returncode:
        raise SystemExit("the network cannot be cut off here")
    with tempfile.TemporaryDirectory(prefix="pack-", ignore_cleanup_errors=True) as place:
        made, room = Path(place, "pack"), Path(place, "room")
        room.mkdir()
        seconds = {"packing": timed([sys.executable, "-m", "minimistral.course.pack", made], ROOT, environment)}
        size = {"pack": megabytes(made), **{p.name: megabytes(p) for p in sorted(made.iterdir()) if p.is_dir()}}
        for name in ("PIP_FIND_LINKS", "PIP_CERT"):
            environment.pop(name, None)
        seconds["installing"] = timed([*CUT, sys.executable, made / "install.py"], room, environment)
        course = room / "minimistral"
        size["installed"] = megabytes(course)
        python = course / ".venv/bin/python"
        seconds["doctor --offline"] = timed([*CUT, python, "-m", "minimistral", "doctor", "--offline"], course, environment)
        one_thread = environment | {"OMP_NUM_THREADS": "1"}
        seconds["chapter 2"] = timed([*CUT, python, "-c", CHAPTER], course, one_thread)
        shutil.rmtree(room)
    return {"provenance": known, "seconds": seconds, "megabytes": size}


def paragraph() -> str:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    size, seconds, known = record["megabytes"], record["seconds"], record["provenance"]
    return (f"Measured (`benchmarks/pack.py`, {known['date'][:10]}): a pack for Linux and Python {known['python'][:4]}, with "
            f"PyTorch's build for the CPU, has {size['pack']:.0f} MB, of which {size['wheels']:.0f} are packages; "
            f"installed, the course takes {size['installed'] / 1000:.1f} GB. With the network cut off, installing took "
            f"{seconds['installing']:.0f} seconds, `doctor --offline` {seconds['doctor --offline']:.0f}, and "
            f"chapter 2 ran to its end, on {known['cores']} cores.")


def write_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    text = re.sub(r"(<!-- pack -->\n).*?(<!-- /pack -->)", lambda m: f"{m[1]}{paragraph()}\n{m[2]}", text, flags=re.S)
    PAGE.write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-page", action="store_true", help="measure nothing; write docs/opening.md")
    if not parser.parse_args().only_page:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8", newline="\n")
    write_page()


if __name__ == "__main__":
    main()
