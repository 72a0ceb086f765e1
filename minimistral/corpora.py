"""Small corpora: tales drawn for you, Python's library, a classic, or your text.

A corpus is two lists of documents, one to learn from and one to be judged by. Only
the tales know the best loss that any model can reach on them: their floor.
"""

import difflib
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random

from minimistral.corpora_files import library_texts, read_texts, shakespeare_text
from minimistral.tales import LANGUAGES, log_probability, sample_tale


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to validate on.

    `floor`: -ln p of the validation documents under their true source, the end of
    each included, in nats per UTF-8 byte of `val`; None where nobody knows it.
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
        """The floor in nats per token: each document's tokens and its end token."""
        if self.floor is None:
            return None
        documents = tokenizer.encode_batch(self.val_documents)
        tokens = sum(len(ids) + 1 for ids in documents)
        return self.floor * len(self.val.encode()) / tokens


def load_corpus(name_or_path: str | Path = "tales", **options) -> Corpus:
    """A corpus by name ("tales", "python", "shakespeare"), a text file, a folder.

    Options of tales: n_tales or n_bytes, val_tales, seed, language; of python:
    max_bytes; of shakespeare: download. ValueError for an unknown name or option,
    and for a text that is too small or not UTF-8; FileNotFoundError for Shakespeare
    not there yet, ConnectionError if it cannot be fetched.
    """
    named = {"tales": tales, "python": python, "shakespeare": shakespeare}
    make = named.get(str(name_or_path))
    allowed = list(inspect.signature(make).parameters) if make else []
    for option in options:
        if option not in allowed:
            raise ValueError(
                f"corpus {str(name_or_path)!r} has no option {option!r}; "
                f"its options: {', '.join(allowed) or 'none'}")
    if make:
        return make(**options)
    path = Path(name_or_path).expanduser()
    if not path.exists():
        close = difflib.get_close_matches(str(name_or_path), named, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"corpus {str(name_or_path)!r}: neither one of "
                         f"{', '.join(named)} nor a file or folder here{hint}")
    return split(path.name, read_texts(path), every=10)


def tales(n_tales: int | None = None, n_bytes: int | None = None,
          val_tales: int = 1_000, seed: int = 0,
          language: str | None = None) -> Corpus:
    """Tales from their grammar: n_tales of them (10,000), or n_bytes and a bit.

    The tales for validation come from a random generator of their own.
    """
    sizes = {"n_tales": n_tales, "n_bytes": n_bytes, "val_tales": val_tales}
    for option, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{option} = {value}: ask for 1 or more")
    if n_tales and n_bytes:
        raise ValueError(
            f"n_tales = {n_tales} and n_bytes = {n_bytes}: give only one")
    if not n_bytes:
        n_tales = n_tales or 10_000
    rng, train, size = Random(f"tales to learn from {seed}"), [], 0
    while len(train) < n_tales if n_tales else size < n_bytes:
        train.append(sample_tale(rng, language).text)
        size += len(train[-1].encode()) + 2  # the blank line between documents
    rng = Random(f"tales to be judged by {seed}")
    val = [sample_tale(rng, language).text for _ in range(val_tales)]
    return Corpus("tales", train, val, tales_floor(val, language))


def tales_floor(documents: list[str], language: str | None = None) -> float:
    """-ln p of the tales, in nats per UTF-8 byte of their joined text.

    If all of them are in one given language, to know it costs nothing.
    """
    nats = -math.fsum(log_probability(document) for document in documents)
    if language:
        nats += len(documents) * math.log(LANGUAGES[language])
    return nats / len("\n\n".join(documents).encode())


def python(max_bytes: int | None = None) -> Corpus:
    """The running Python's standard library; every 20th file is for validation.

    Without tests, installed packages, idlelib, lib2to3 and files not in UTF-8,
    sorted by path. It differs between versions of Python: compare no numbers.
    """
    return split("python", library_texts(max_bytes), every=20)


def shakespeare(download: bool = False) -> Corpus:
    """Tiny Shakespeare: 90% of its characters to learn from, the rest to validate.

    Found as tinyshakespeare.txt in the folder that MINIMISTRAL_DATA names (else in
    ~/.cache/minimistral), or fetched there with `download`; its checksum is tested.
    """
    return split("shakespeare", [shakespeare_text(download)], every=10)


def split(name: str, documents: list[str], every: int) -> Corpus:
    """Every so many documents one is for validation, of fewer documents the last.

    One long document is cut instead: the last of `every` parts is for validation.
    """
    if len(documents) == 1:
        (text,) = documents
        cut = len(text) * (every - 1) // every
        return Corpus(name, [text[:cut]], [text[cut:]])
    chosen = set(range(every - 1, len(documents), every)) or {len(documents) - 1}
    return Corpus(name, [d for i, d in enumerate(documents) if i not in chosen],
                  [d for i, d in enumerate(documents) if i in chosen])
