"""A file written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A neighbour of `path` to write to, which takes its name when it is complete on the disk.

    Its folder is made if needed. Whoever writes, the mode is that of any new file: safetensors
    by itself shuts out all but the owner. If anything fails, the old file is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.touch()
        mode = draft.stat().st_mode
        yield draft
        draft.chmod(mode)
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all; text becomes UTF-8. Returns the path; raises OSError."""
    if isinstance(content, str):
        content = content.encode("utf-8")
    with draft_of(path) as draft:
        draft.write_bytes(content)
    return path
