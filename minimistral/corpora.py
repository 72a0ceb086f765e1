"""Small corpora: tales that are drawn, Python's own library, a classic, or your text.

A corpus is two lists of documents, one to learn from and one to be judged by. Only the
tales know the best loss that any model can reach on them: their floor.
"""

import difflib
import hashlib
import inspect
import math
import os
import sysconfig
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from minimistral.tales import LANGUAGES, log_probability, sample_tale

SMALLEST = 1_000  # bytes; less than this teaches nothing

SHAKESPEARE_URL = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/"
                   "data/tinyshakespeare/input.txt")
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = "tinyshakespeare.txt"

NOT_THE_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages",
                   "idlelib", "lib2to3", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to validate on.

    `floor`: -ln p of the validation documents under their true source, the end of each
    included, in nats per UTF-8 byte of `val`; None where nobody knows it.
    """

    name: str
    train_documents: list[str]
    val_documents: list[str]
    floor: float | None = None

    @cached_property
    def train(self) -> str:
        return "\n\n".join(self.train_documents)

    @cached_property
    def val(self) -> str:
        return "\n\n".join(self.val_documents)

    def floor_per_token(self, tokenizer) -> float | None:
        """The same floor in nats per token: each document's tokens and its end token."""
        if self.floor is None:
            return None
        encoded = tokenizer.encode_batch(self.val_documents)
        tokens = sum(len(ids) + 1 for ids in encoded)
        return self.floor * len(self.val.encode()) / tokens


def load_corpus(name_or_path: str | Path = "tales", **options) -> Corpus:
    """A corpus by name ("tales", "python", "shakespeare") or from a text file or folder.

    Options: tales (n_tales or n_bytes, val_tales, seed, language), python (max_bytes),
    shakespeare (download). Raises ValueError for an unknown name or option, and for a
    text that is too small or not UTF-8; FileNotFoundError for Shakespeare not there yet.
    """
    name = str(name_or_path)
    build = {"tales": tales, "python": python_library, "shakespeare": shakespeare}.get(name)
    allowed = list(inspect.signature(build).parameters) if build else []
    for option in options:
        if option not in allowed:
            raise ValueError(f"corpus {name!r} has no option {option!r}; "
                             f"it takes: {', '.join(allowed) or 'none'}")
    return build(**options) if build else text_corpus(Path(name_or_path))


def tales(n_tales: int | None = None, n_bytes: int | None = None, val_tales: int = 1_000,
          seed: int = 0, language: str | None = None) -> Corpus:
    """Tales drawn from their grammar: n_tales of them (10,000), or n_bytes and a bit.

    Validation tales have a generator of their own, which `seed` starts as well.
    """
    for option, value in (("n_tales", n_tales), ("n_bytes", n_bytes),
                          ("val_tales", val_tales)):
        if value is not None and value < 1:
            raise ValueError(f"{option} = {value}: ask for at least 1")
    if n_tales and n_bytes:
        raise ValueError(f"n_tales = {n_tales} and n_bytes = {n_bytes}: give one of them")
    if n_bytes is None:
        n_tales = n_tales or 10_000
    rng, train, size = Random(f"tales to learn from {seed}"), [], 0
    while len(train) < n_tales if n_tales else size < n_bytes:
        train.append(sample_tale(rng, language).text)
        size += len(train[-1].encode()) + 2
    rng = Random(f"tales to be judged by {seed}")
    val = [sample_tale(rng, language).text for _ in range(val_tales)]
    return Corpus("tales", train, val, tales_floor(val, language))


def tales_floor(documents: list[str], language: str | None = None) -> float:
    """-ln p of the tales, in nats per UTF-8 byte of their joined text.

    Where the language was given, it cost nothing to guess it.
    """
    nats = -math.fsum(log_probability(document) for document in documents)
    if language:
        nats += len(documents) * math.log(LANGUAGES[language])
    return nats / len("\n\n".join(documents).encode())


def python_library(max_bytes: int | None = None) -> Corpus:
    """The running Python's standard library; every 20th file is for validation.

    Without tests, site-packages, idlelib, lib2to3 and files that are not UTF-8, sorted
    by path. It differs between versions of Python. At most `max_bytes` of source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in root.rglob("*.py")
             if not NOT_THE_LIBRARY & set(path.relative_to(root).parts)]
    documents, size = [], 0
    for path in sorted(files, key=lambda path: path.relative_to(root).as_posix()):
        raw = path.read_bytes()
        if max_bytes is not None and size + len(raw) > max_bytes:
            break
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append(text.replace("\r\n", "\n"))
            size += len(raw)
    if len(documents) < 2:
        raise ValueError(f"{len(documents)} files of Python's library in {root} within "
                         f"max_bytes = {max_bytes}: give at least 200000, or install a "
                         "Python that keeps its library as .py files")
    return split("python", documents, every=20)


def split(name: str, documents: list[str], every: int) -> Corpus:
    """Every so many documents one is for validation; of fewer documents, the last."""
    chosen = set(range(every - 1, len(documents), every)) or {len(documents) - 1}
    return Corpus(name, [d for i, d in enumerate(documents) if i not in chosen],
                  [documents[i] for i in sorted(chosen)])


def halves(name: str, text: str, share: float = 0.9) -> Corpus:
    """One long text: its first 90% of characters to learn from, the rest to validate."""
    cut = int(len(text) * share)
    return Corpus(name, [text[:cut]], [text[cut:]])


def text_corpus(path: Path) -> Corpus:
    """A text file, or a folder of .txt files of which every 10th is for validation."""
    if path.is_dir():
        files = sorted(path.rglob("*.txt"), key=lambda file: file.as_posix())
        if not files:
            raise ValueError(f"{path}: no .txt file in this folder")
        texts = [text for text in map(read_text, files) if text.strip()]
    elif path.is_file():
        texts = [read_text(path)]
    else:
        close = difflib.get_close_matches(str(path), ["tales", "python", "shakespeare"], 1)
        raise ValueError(f"corpus {str(path)!r}: neither tales, python, shakespeare nor a "
                         "text file or folder"
                         + (f"; did you mean {close[0]!r}?" if close else ""))
    size = sum(len(text.encode()) for text in texts)
    if size < SMALLEST or not any(map(str.strip, texts)):
        raise ValueError(f"{path}: {size} bytes of text is too little to learn from; "
                         f"give {SMALLEST} bytes or more")
    return split(path.name, texts, every=10) if len(texts) > 1 else halves(path.name, *texts)


def read_text(path: Path) -> str:
    """The text of a file; ValueError with the offset of the first byte not UTF-8."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + 3 * raw.startswith(b"\xef\xbb\xbf")
        raise ValueError(f"{path}: byte 0x{raw[offset]:02x} at offset {offset} is not "
                         "UTF-8. Save the file as UTF-8 in your editor; if it is Latin-1: "
                         "path.write_text(path.read_text('latin-1'), 'utf-8')") from None
    return text.replace("\r\n", "\n")


def shakespeare(download: bool = False) -> Corpus:
    """Tiny Shakespeare: the first 90% of its characters to learn from, the rest to validate.

    Looked for in the folder that MINIMISTRAL_DATA names (or ~/.cache/minimistral), as
    tinyshakespeare.txt; with `download` it is fetched there.
    """
    folder = Path(os.environ.get("MINIMISTRAL_DATA") or "~/.cache/minimistral").expanduser()
    path = folder / SHAKESPEARE_FILE
    if not path.exists():
        if not download:
            raise FileNotFoundError(
                f"{path} is not there. With a network: load_corpus('shakespeare', "
                f"download=True). Without one: bring {SHAKESPEARE_URL} as this file, or "
                "set MINIMISTRAL_DATA to a folder that has it")
        fetch_file(SHAKESPEARE_URL, path, SHAKESPEARE_SHA256)
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != SHAKESPEARE_SHA256:
        raise ValueError(f"{path}: {len(raw)} bytes with another checksum than the "
                         f"{SHAKESPEARE_BYTES} bytes of tiny Shakespeare: delete it and "
                         "load it again with download=True")
    return halves("shakespeare", raw.decode("utf-8"))


def fetch_file(url: str, path: Path, sha256: str) -> None:
    """Download into path.part, going on where an earlier try stopped; then check, then
    rename. ConnectionError without a network, ValueError for another content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as reply:
            with part.open("ab" if reply.status == 206 else "wb") as file:
                while block := reply.read(1 << 16):
                    file.write(block)
    except OSError as error:  # no network, a refusal, a break in the middle
        whole = isinstance(error, urllib.error.HTTPError) and error.code == 416
        if not whole:  # 416: everything was here already
            raise ConnectionError(f"{url}: {error}. What came is kept and the next try "
                                  f"goes on from there; without a network, bring the "
                                  f"file as {path}") from error
    if hashlib.sha256(part.read_bytes()).hexdigest() != sha256:
        part.unlink()
        raise ValueError(f"{url}: what came has another checksum; it was deleted, try again")
    os.replace(part, path)
