"""Texts from files: the learner's own, Python's library, and a download that is checked."""

import hashlib
import os
import sysconfig
import urllib.error
import urllib.request
from pathlib import Path

SMALLEST = 1_000  # bytes; less than this teaches nothing

SHAKESPEARE_FILE = "tinyshakespeare.txt"
SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages",
                   "idlelib", "lib2to3", "__pycache__"}


def read_text(path: Path) -> str:
    """The text of a file; ValueError with the offset of the first byte that is not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte 0x{raw[error.start]:02x} at offset {error.start} is not UTF-8. "
            "Save the file as UTF-8 in your editor; if it is Latin-1: "
            "path.write_text(path.read_text('latin-1'), 'utf-8')") from None
    return text.replace("\r\n", "\n")


def read_texts(path: Path) -> list[str]:
    """The text of a file, or of each .txt file of a folder, sorted by path.

    ValueError if there is none, if one is not UTF-8, or if they are too small together.
    """
    files = [path]
    if path.is_dir():
        files = sorted(path.rglob("*.txt"), key=lambda file: file.as_posix())
        if not files:
            raise ValueError(f"{path}: no .txt file in this folder; is the text in files "
                             "with another ending?")
    texts = [text for text in map(read_text, files) if text.strip()]
    size = sum(len(text.strip().encode()) for text in texts)
    if size < SMALLEST:
        raise ValueError(f"{path}: {size} bytes of text are too little to learn from; "
                         f"give {SMALLEST} bytes or more")
    return texts


def library_texts(max_bytes: int | None = None) -> list[str]:
    """The files of the running Python's library, sorted by path, at most `max_bytes`."""
    root = Path(sysconfig.get_path("stdlib"))
    files, texts, size = [], [], 0
    for folder, below, names in os.walk(root):
        below[:] = set(below) - NOT_THE_LIBRARY  # os.walk goes only where this says
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        raw = path.read_bytes()
        if max_bytes is not None and size + len(raw) > max_bytes:
            break
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue  # a few old files declare another encoding
        if text.strip():
            texts.append(text.replace("\r\n", "\n"))
            size += len(raw)
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} files of Python's library in {root} within "
                         f"max_bytes = {max_bytes}: give 200000 or more, or use a Python "
                         "that keeps its library as .py files")
    return texts


def shakespeare_text(download: bool = False) -> str:
    """Tiny Shakespeare, checked, from the folder that MINIMISTRAL_DATA names or the cache."""
    folder = os.environ.get("MINIMISTRAL_DATA") or "~/.cache/minimistral"
    path = Path(folder).expanduser() / SHAKESPEARE_FILE
    if not path.exists():
        if not download:
            raise FileNotFoundError(
                f"{path} is not there. With a network: load_corpus('shakespeare', "
                f"download=True). Without one: bring {SHAKESPEARE_URL} as this file, or "
                "set MINIMISTRAL_DATA to a folder that has it")
        fetch_file(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"{path}: these {len(raw)} bytes are not the {SHAKESPEARE_BYTES} "
                         "of tiny Shakespeare (another checksum): delete the file and "
                         "load it again with download=True")
    return raw.decode("utf-8")


def fetch_file(url: str, path: Path, sha256: str) -> None:
    """Download to `path`: into path.part, from where an earlier try stopped; checked; renamed.

    ConnectionError without a network (what came is kept), ValueError for other content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers),
                                    timeout=30) as reply:
            if have and reply.status != 206:  # a server that cannot go on starts again
                have = 0
            expected = reply.length
            with part.open("ab" if have else "wb") as file:
                while block := reply.read(1 << 16):
                    file.write(block)
        if expected is not None and part.stat().st_size - have < expected:
            raise OSError(f"only {part.stat().st_size - have} of {expected} bytes came")
    except OSError as error:
        if getattr(error, "code", None) != 416:  # 416: everything was here already
            raise ConnectionError(
                f"{url}: {error}. What came is kept, and the next try goes on from "
                f"there; without a network, bring the file as {path}") from error
    if hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise ValueError(f"{url}: what came has another checksum and was deleted; "
                         "try again, or bring the file from elsewhere")
    os.replace(part, path)
