"""What comes to a tokenizer from outside: its file (ours, Tekken's, SentencePiece's) and texts.

Both come from anywhere, so they are checked before they are used: a damaged or mistaken file is
a ValueError that names the file and says what is wrong with it.
"""

import base64
import binascii
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tiktoken

from minimistral.files import write_whole

if TYPE_CHECKING:
    from minimistral.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

# tiktoken's splitter overflows its stack, and panics, on more blanks than this in one run.
LONGEST_BLANK = 900_000


def check_text(text: str) -> None:
    """Raise ValueError if `text` is no string, or one that can't be written or split."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text (str), got {type(text).__name__}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"character {error.start} of the text is {text[error.start]!r}, one half of a"
            " surrogate pair, which UTF-8 cannot write: was the text decoded with"
            " errors='surrogateescape', or cut within an escape like \\ud83d\\ude00?"
        ) from None
    if len(text) > LONGEST_BLANK:
        longest = max(map(len, re.findall(r"[^\S\r\n]+", text)), default=0)
        if longest > LONGEST_BLANK:
            raise ValueError(
                f"the text has {longest:,} blanks in one run, at most {LONGEST_BLANK:,} can be"
                " split into words: is it text?"
            )


# Which file ------------------------------------------------------------------------------------


def model_file_version(path: Path) -> int | None:
    """The number in a SentencePiece file's suffix, `tokenizer.model.v7m1` -> 7; else None."""
    found = re.search(r"\.model\.v(\d+)(m\d+)?$", path.name)
    return int(found[1]) if found else None


def find_tokenizer_file(folder: str | Path) -> tuple[Path, str]:
    """The tokenizer's file in a model's folder, and why that one.

    The newest generation wins: tekken.json, then tokenizer.model.vN by N, then tokenizer.model.
    """
    folder = Path(folder)
    tekken = [p for p in (folder / "tekken.json",) if p.is_file()]
    models = [p for p in folder.glob("*.model*") if re.search(r"\.model(\.v\d+(m\d+)?)?$", p.name)]
    models.sort(key=lambda p: (model_file_version(p) or 0, p.name), reverse=True)
    files = tekken + models
    if not files:
        reason = "no tekken.json and no tokenizer.model, tokenizer.model.v1, .v2, .v3 or .v7"
        if (folder / "tokenizer.json").exists():
            reason += (
                "; tokenizer.json is Hugging Face's format, which isn't read here: put the"
                " tekken.json or tokenizer.model of the same model beside it"
            )
        raise ValueError(f"{folder}: {reason}")
    if len(files) == 1:
        return files[0], "the only tokenizer file in the folder"
    others = ", ".join(p.name for p in files[1:])
    return files[0], f"{files[0].name} is newer than {others}"


def load(path: str | Path, tokenizer_class: type["Tokenizer"]) -> "Tokenizer":
    """Read a tokenizer from a file, or from the newest tokenizer file of a folder.

    Raises FileNotFoundError if there is nothing, ValueError if what is there is no tokenizer.
    """
    path = Path(path)
    if path.is_dir():
        path, reason = find_tokenizer_file(path)
        logger.info("tokenizer: %s (%s)", path, reason)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such tokenizer file or folder")
    if path.suffix == ".json":
        return tokenizer_class(**read_tekken(path))
    if re.search(r"\.model(\.|$)", path.name):
        from minimistral.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(path)
    raise ValueError(
        f"{path}: a tokenizer's file is named tekken.json, tokenizer.model or tokenizer.model.vN"
    )


# Tekken ----------------------------------------------------------------------------------------


def read_tekken(path: Path) -> dict[str, Any]:
    """Check a tekken.json and return what `Tokenizer(...)` takes.

    The file holds `config` (pattern, sizes, version), `vocab` (rank, base64 bytes, text or null)
    and from version 11 on `special_tokens` (rank, name). Its vocab is longer than what is used:
    default_vocab_size - default_num_special_tokens entries count. Raises ValueError.
    """
    from minimistral.tokenizer import CONTROL_TOKENS  # here, since that module imports this one

    data = _read_json(path)
    config, vocab = _field(path, data, "config", dict), _field(path, data, "vocab", list)
    pattern = _field(path, config, "pattern", str)
    version = _field(path, config, "version", str)
    n_control = _field(path, config, "default_num_special_tokens", int)
    n_ranks = _field(path, config, "default_vocab_size", int) - n_control
    if not 256 <= n_ranks <= len(vocab):
        raise ValueError(
            f"{path}: default_vocab_size - default_num_special_tokens = {n_ranks}, but it must lie"
            f" between 256 (one token per byte) and the {len(vocab)} entries of vocab"
        )
    if data.get("special_tokens") is None:
        if re.fullmatch(r"v[1-7]", version) is None:
            raise ValueError(f"{path}: version {version} needs special_tokens, there are none")
        names = list(CONTROL_TOKENS)
    else:
        names = _special_names(path, _field(path, data, "special_tokens", list))
    if len(names) > n_control:
        raise ValueError(
            f"{path}: {len(names)} special tokens, but default_num_special_tokens = {n_control}"
        )
    names += [f"<SPECIAL_{i}>" for i in range(len(names), n_control)]
    if len(set(names)) < len(names) or not {"<s>", "</s>"} <= set(names):
        raise ValueError(f"{path}: special tokens need distinct names, <s> and </s> among them")
    ranks = _ranks(path, vocab[:n_ranks])
    _check_pattern(path, pattern)
    return {"ranks": ranks, "pattern": pattern, "control_names": names, "version": version}


def _read_json(path: Path) -> dict[str, Any]:
    raw = path.read_bytes()
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({what_it_is(raw) or error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(data).__name__}")
    if "config" not in data and isinstance(data.get("model"), dict):
        raise ValueError(
            f"{path}: this is Hugging Face's tokenizer.json, not a tekken.json;"
            " the same model's tekken.json or tokenizer.model is needed"
        )
    return data


def what_it_is(raw: bytes) -> str | None:
    """Name the usual things that arrive in place of a tokenizer's file, or None."""
    start = raw[:200].lstrip().lower()
    if not start:
        return "the file is empty"
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page: the download was answered by a login or error page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer: run `git lfs pull` in the model's folder"
    return None


def _field(path: Path, record: dict[str, Any], key: str, kind: type) -> Any:
    """record[key], which must be there and be of this type (a bool is no int)."""
    if key not in record:
        raise ValueError(f"{path}: {key!r} is missing")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{path}: {key!r} must be of type {kind.__name__}, found {type(value).__name__}"
        )
    return value


def _special_names(path: Path, records: list[Any]) -> list[str]:
    """The names of `special_tokens`, which must stand in the order of their ranks 0, 1, 2 ..."""
    names = []
    for i, record in enumerate(records):
        if not isinstance(record, dict) or record.get("rank") != i:
            raise ValueError(f"{path}: special_tokens[{i}] must be a record with rank {i}")
        names.append(_field(path, record, "token_str", str))
    return names


def _ranks(path: Path, records: list[Any]) -> dict[bytes, int]:
    """{bytes: rank} of `vocab`: ranks dense and in order, bytes distinct, single bytes first."""
    ranks: dict[bytes, int] = {}
    for i, record in enumerate(records):
        if not isinstance(record, dict) or record.get("rank") != i:
            found = record.get("rank") if isinstance(record, dict) else record
            raise ValueError(f"{path}: vocab[{i}] must have rank {i}, found {found!r}")
        encoded = _field(path, record, "token_bytes", str)
        try:
            token = base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ValueError(f"{path}: token_bytes of rank {i} is no base64 ({error})") from None
        if i < 256 and token != bytes([i]):
            raise ValueError(f"{path}: rank {i} must be the byte {bytes([i])!r}, is {token!r}")
        if not token or token in ranks:
            raise ValueError(f"{path}: rank {i} repeats the bytes {token!r} or has none")
        ranks[token] = i
    return ranks


def _check_pattern(path: Path, pattern: str) -> None:
    try:
        tiktoken.Encoding("check", pat_str=pattern, mergeable_ranks={b"a": 0}, special_tokens={})
    except ValueError as error:
        raise ValueError(f"{path}: config's pattern is no regular expression ({error})") from None


def save_tekken(tokenizer: "Tokenizer", path: str | Path) -> Path:
    """Write `tokenizer` as a tekken.json that mistral-common reads too; return the file's path.

    path: a file named *.json, else a folder, made if needed, which gets a tekken.json. Written
    whole or not at all.
    """
    named = [
        {"rank": i, "token_str": name, "is_control": True}
        for name, i in tokenizer.control_tokens.items()
        if name != f"<SPECIAL_{i}>"  # those are filled in by the reader
    ]
    config = {
        "pattern": tokenizer.pattern,
        "num_vocab_tokens": len(tokenizer.ranks),
        "default_vocab_size": tokenizer.vocab_size,
        "default_num_special_tokens": tokenizer.n_control,
        "version": tokenizer.version,
    }
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": _text(token)}
        for token, rank in tokenizer.ranks.items()
    ]
    data = {"config": config, "special_tokens": named, "vocab": vocab}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        path = path / "tekken.json"
    return write_whole(path, text)


def _text(token: bytes) -> str | None:
    """A token's text, None for part of a character: for human readers of the file only."""
    try:
        return token.decode("utf-8")
    except UnicodeDecodeError:
        return None
