"""When two runs of a cell count as the same: one rule for the tests and for the build.

Text of every kind is compared strictly after the rules of tests/nbval_sanitize.cfg. Pictures (a PNG
output, or a PNG inside HTML or any other text) are taken out and compared at an eighth of their
scale: text is drawn a little differently by each version of Matplotlib, a changed curve is changed
at every scale.
"""

from __future__ import annotations

import base64
import io
import platform
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from minimistral.course.notebook_library import ROOT

PICTURE = re.compile(r"(data:image/png;base64,)([A-Za-z0-9+/=\s]+)")
TOLERANCE = 8.0  # of 255; another Matplotlib gives 1.5 to 3.8, a really changed plot 12 to 31
VIEW = "application/vnd.jupyter.widget-view+json"  # random ids

MADE_ON = "Linux x86_64"
DECIDES = ("torch", "numpy", "matplotlib", "ipython", "ipywidgets", "tiktoken")

Rules = Sequence[tuple[str, str]]


@cache
def why_not_compared() -> str | None:
    """None where stored outputs must be reproduced: on Linux x86-64 with constraints.txt.

    Elsewhere the first thing that differs, in words.
    """
    from packaging.requirements import Requirement
    from packaging.version import Version

    here = f"{platform.system()} {platform.machine()}"
    if here != MADE_ON:
        return f"this is {here}, they were made on {MADE_ON}"
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if not line.partition("#")[0].strip():
            continue
        pinned = Requirement(line.partition("#")[0])
        if pinned.name.lower() not in DECIDES or (pinned.marker and not pinned.marker.evaluate()):
            continue
        installed = Version(metadata.version(pinned.name)).public  # without "+cpu"
        if installed not in pinned.specifier:
            return f"{pinned.name} is {installed}, they were made with {pinned.specifier}"
    return None


def read_rules(path: Path) -> Rules:
    """The (regex, replacement) pairs of a sanitize file: adjacent lines `regex:` and `replace:`."""
    text = path.read_text(encoding="utf-8")
    return re.findall(r"^regex: (.*)\n^replace: (.*)$", text, flags=re.M)


def sanitize(text: str, rules: Rules) -> str:
    """`text` with everything that may differ between two runs replaced by a word."""
    for regex, word in rules:
        text = re.sub(regex, word, text)
    return text


def difference(stored: Sequence[Mapping], fresh: Sequence[Mapping], rules: Rules) -> str | None:
    """None if two lists of a cell's outputs count as the same, else where they differ, in words."""
    old_texts, old_pictures = _flatten(stored, rules)
    new_texts, new_pictures = _flatten(fresh, rules)
    for kind in sorted({*old_texts, *new_texts}):
        old, new = old_texts.get(kind, []), new_texts.get(kind, [])
        if len(old) != len(new):
            head = f"{kind}: {len(old)} stored outputs, {len(new)} new"
            return f"{head}\n{_short(old)}\n--- new:\n{_short(new)}"
        for a, b in zip(old, new, strict=True):
            if a != b:
                return f"{kind} differs\n--- stored:\n{_around(a, b)}\n--- new:\n{_around(b, a)}"
    if len(old_pictures) != len(new_pictures):
        return f"{len(old_pictures)} stored figures, {len(new_pictures)} new ones"
    for number, (a, b) in enumerate(zip(old_pictures, new_pictures, strict=True), start=1):
        distance = picture_distance(a, b)
        if distance > TOLERANCE:
            return f"figure {number} differs from the stored one: {distance:.1f} > {TOLERANCE}"
    return None


def picture_distance(a: bytes, b: bytes) -> float:
    """Root mean square difference (of 255) of two PNGs: grey, 8 x 8 pixels averaged.

    999 when the sizes differ.
    """
    if a == b:
        return 0.0
    import numpy as np
    from PIL import Image

    one, two = (Image.open(io.BytesIO(x)).convert("RGBA") for x in (a, b))
    if one.size != two.size:
        return 999.0
    small = (max(1, one.width // 8), max(1, one.height // 8))
    x, y = (
        np.asarray(_on_white(i).resize(small, Image.Resampling.BOX), dtype="float32")
        for i in (one, two)
    )
    return float(((x - y) ** 2).mean() ** 0.5)


def _on_white(image):
    from PIL import Image

    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L")


def _flatten(outputs: Sequence[Mapping], rules: Rules) -> tuple[dict[str, list[str]], list[bytes]]:
    """Texts by kind (stdout, a MIME type), as streams and displays may overtake each other."""
    texts: dict[str, list[str]] = defaultdict(list)
    pictures: list[bytes] = []

    def add(kind: str, text: str) -> None:
        pictures.extend(base64.b64decode(m[2]) for m in PICTURE.finditer(text))
        texts[kind].append(sanitize(PICTURE.sub(r"\1PICTURE", text), rules))

    streams: dict[str, str] = defaultdict(str)
    for out in outputs:
        if out["output_type"] == "stream":
            streams[out["name"]] += out["text"]
        elif out["output_type"] == "error":
            add("error", f"{out['ename']}: {out['evalue']}")
        else:
            for kind, value in out["data"].items():
                if kind == "image/png":
                    pictures.append(base64.b64decode(value))
                elif kind != VIEW:
                    add(kind, value if isinstance(value, str) else repr(value))
    for name, text in streams.items():
        add(name, _settled(text))
    return texts, pictures


def _settled(text: str) -> str:
    """What a terminal shows after carriage returns."""
    return re.sub(r"^.*\r(?=[^\n])", "", text, flags=re.M)


def _short(texts: list[str]) -> str:
    return "\n".join(t if len(t) < 400 else t[:400] + " ..." for t in texts)


def _around(text: str, other: str) -> str:
    """`text` near the first character where it leaves `other`."""
    pairs = enumerate(zip(text, other, strict=False))
    at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))
    return ("..." if at > 200 else "") + text[max(0, at - 200) : at + 300]
