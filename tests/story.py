"""What the cells of a chapter's story define, for tests of its drafts."""

import ast
from functools import cache
from pathlib import Path

STORIES = Path(__file__).parents[1] / "notebooks" / "src"


@cache
def definitions(chapter: int) -> tuple[ast.stmt, ...]:
    """The functions and classes of all code cells, in the order of the story."""
    source = next(STORIES.glob(f"{chapter:02d}_*.py"))
    found = []
    for cell in source.read_text(encoding="utf-8").split("\n# %%")[1:]:
        if "[markdown]" not in cell.splitlines()[0]:
            found += ast.parse("\n".join(cell.splitlines()[1:])).body
    return tuple(node for node in found if hasattr(node, "name"))


def drafts(chapter: int, *wanted: str, **names) -> dict:
    """Functions and classes that a story's own cells define, without running the rest.

    ``names`` are what they use.
    """
    for node in definitions(chapter):
        if node.name in wanted:
            exec(compile(ast.Module([node], []), f"chapter {chapter}", "exec"), names)
    return {name: names[name] for name in wanted}
