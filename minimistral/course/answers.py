"""Answer keys: what a story asks, with the answer it gives later, and what the exercises want.

Both are read from the executed notebook and the records; nothing is run.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

from .exercises import Exercise, chapter_exercises
from .sections import Part, output_text, read_sections
from .syllabus import CHAPTERS, Chapter

BET = "in our words: “"


@dataclass(frozen=True)
class Asked:
    """One prediction or bet; ``answer`` is "" where the notebook shows none."""

    section: str
    question: str
    options: tuple[str, ...]
    answer: str = ""
    why: str = ""


def asked(chapter: Chapter, root: Path | None = None) -> list[Asked]:
    """Everything that a chapter's core lets people predict, in order, with the answers."""
    questions: dict[str, Asked] = {}
    answers: dict[str, tuple[str, str]] = {}
    for section in read_sections(chapter, root=root):
        if section.further:
            break
        for part in section.parts:
            if part.kind == "code":
                for name, lines in _outputs(part, "Predict · ", "predict", "bet"):
                    options = tuple(re.sub("  ", " ", line, count=1) for line in lines if re.match("[A-Z]  ", line))
                    questions[name] = Asked(section.title, lines[0].removeprefix("Predict · "), options)
                for name, lines in _outputs(part, "What happened", "reveal", "verdict"):
                    said = next(line for line in lines if re.match("It is(:| [A-Z]:) ", line))
                    why = " ".join(lines[lines.index(said) + 1:])
                    answers[name] = (re.sub("^([A-Z]):", r"\1", said.removeprefix("It is").lstrip(": ")), why)
    return [Asked(q.section, q.question, q.options, *answers.get(name, ())) for name, q in questions.items()]


def _outputs(part: Part, beginning: str, *functions: str) -> list[tuple[str, list[str]]]:
    """(name, lines) of the panels that a cell's calls of these functions have shown, in their order."""
    shown = [text.splitlines() for output in part.outputs
             if (text := output_text(output)).startswith(beginning)]
    if not shown:
        return []
    calls = [n for n in ast.walk(ast.parse(part.text)) if isinstance(n, ast.Call)
             and isinstance(n.func, ast.Name) and n.func.id in functions]
    calls.sort(key=lambda n: (n.lineno, n.col_offset))
    names = [_name(n) for n in calls]
    found = []
    for number, lines in enumerate(shown):
        name = names[number] if len(names) == len(shown) else None
        found.append((_headline(lines[0]) or name or f"{part.cell}.{number}", lines))
    return found


def _name(call: ast.Call) -> str | None:
    first = call.args[0] if call.args else None
    if not isinstance(first, ast.Constant):
        return None
    return f"headline {first.value}" if call.func.id in ("bet", "verdict") else str(first.value)


def _headline(question: str) -> str | None:
    """The name of a bet, from its question: bets may be placed in a loop."""
    if BET not in question:
        return None
    claim = question.split(BET)[1].rstrip("”")
    return next((f"headline {h.number}" for c in CHAPTERS for h in c.headlines if h.text == claim), None)


def right_answer(exercise: Exercise) -> str:
    """What to type, or where the solution stands."""
    if exercise.kind == "order":
        return " or ".join(f"`{exercise.spell(order)}`" for order in exercise.right_orders)
    if exercise.kind == "answer":
        return f"`{exercise.reference}`"
    if exercise.piece:
        return f"in the story: the library cell below it (`minimistral.{exercise.piece}`)"
    return "in the solutions"


def answer_key(chapter: Chapter, root: Path | None = None) -> str:
    """One chapter's key as Markdown."""
    lines = [f"# Answers: {chapter.number}. {chapter.title}\n", "## Predictions, in the order of the story\n"]
    for number, one in enumerate(asked(chapter, root), start=1):
        lines.append(f"{number}. *{one.section}.* {one.question}")
        lines += [f"   - {option}" for option in one.options]
        lines.append(f"   - **{one.answer or 'left open'}** {one.why}".rstrip())
    lines += ["\n## Exercises\n", "| Exercise | Minutes | Answer |", "|---|---|---|"]
    lines += [f"| {e.title} (`{e.name}`) | {e.minutes} | {right_answer(e)} |" for e in chapter_exercises(chapter.number)]
    return "\n".join(lines) + "\n"
