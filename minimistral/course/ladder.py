"""The ladder: one scoreboard on tales from chapter 1 to 9, falling towards a known floor.

Everything that predicts the next token can climb it: anything callable that takes token ids
(B, T) and gives logits (B, T, V), of which those at t depend on ids up to t alone. All rows
come from one standard run: the same tales, tokenizer, number of steps, judgement and prompt.

    model = ...                          # an nn.Module
    ladder.fit(model)                    # the standard training, some 10 seconds
    ladder.run("attention only", model, chapter=2)
    ladder()
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minimistral.files import write_whole

from .panel import Panel, wrapped
from .progress import load_progress, update_progress

RECORDED = Path(__file__).parent.parent / "assets" / "ladder.json"
LONGEST_SENTENCE = 200  # characters; no sentence of the tales is as long
SHIPPED = "the shipped "  # how the rows of the two models begin that come with the course


@dataclass(frozen=True)
class Standard:
    """What all rows have in common."""

    n_tales: int = 2_000
    val_tales: int = 100
    data_seed: int = 7
    tokenizer: str = "tales-dense"
    steps: int = 120
    batch_size: int = 16
    seq_len: int = 96  # tokens; nearly every tale fits
    learning_rate: float = 3e-3
    samples: int = 200
    longest: int = 200  # tokens of a sampled tale
    prompt: str = "The old lantern\n"


@dataclass(frozen=True)
class Row:
    """One line of the scoreboard. Losses are nats per UTF-8 byte of the validation tales."""

    name: str
    chapter: int
    loss: float
    floor: float
    parses: float  # share of the sampled tales that the grammar accepts
    sample: str
    provenance: dict | None = None  # recorded rows: when, where, how

    @property
    def above_floor(self) -> float:
        return self.loss - self.floor


class Ladder:
    """``ladder()`` shows the scoreboard; ``fit`` trains, ``run`` measures and adds a row."""

    def __init__(self, standard: Standard = Standard(), tokenizer=None):
        self.standard = standard
        self._tokenizer = tokenizer

    @cached_property
    def tokenizer(self):
        from minimistral.tokenizer import load_tokenizer

        return self._tokenizer or load_tokenizer(self.standard.tokenizer)

    @cached_property
    def corpus(self):
        from minimistral.corpora import load_corpus

        s = self.standard
        return load_corpus("tales", n_tales=s.n_tales, val_tales=s.val_tales, seed=s.data_seed)

    @cached_property
    def tokens(self):
        """The training tales, encoded: ``.ids`` is one long tensor, for models that only count."""
        from minimistral.train import encode_documents

        return encode_documents(self.tokenizer, self.corpus.train_documents)

    # ------------------------------------------------------------ the standard run

    def fit(self, model: torch.nn.Module, *, seed: int = 0, steps: int | None = None) -> list[float]:
        """Train with AdamW for the standard number of steps; returns the loss of each, in nats
        per token."""
        from minimistral.train import IGNORE, TrainConfig, learning_rate, next_token_nats, training_batch

        s = self.standard
        config = TrainConfig(
            steps=steps or s.steps, batch_size=s.batch_size, seq_len=s.seq_len, lr=s.learning_rate,
            warmup_steps=(steps or s.steps) // 10, seed=seed, at_starts=True,
        )
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05, betas=(0.9, 0.95))
        losses = []
        model.train()
        for step in range(config.steps):
            inputs, targets = training_batch(self.tokens, step, config)
            loss = next_token_nats(model(inputs), targets) / (targets != IGNORE).sum()
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        model.eval()
        return losses

    def run(self, name: str, model: Callable[[Tensor], Tensor], *, chapter: int) -> Panel:
        """Measure ``model``, put it on the scoreboard as the learner's own row, show the board.

        A row of the same name is replaced. What later chapters find is not shown yet.
        """
        row = self.measure(name, model, chapter=chapter)

        def change(data):
            data["ladder"] = [old for old in data["ladder"] if old.get("name") != name]
            data["ladder"].append(asdict(row))

        update_progress(change)
        return self(chapter)

    @torch.no_grad()
    def measure(self, name: str, model: Callable[[Tensor], Tensor], *, chapter: int) -> Row:
        """The standard judgement of a model, without putting it anywhere."""
        loss = self.nats_per_byte(model)
        tales = self.write(model, [""] * self.standard.samples)
        from minimistral.tales import score_tales

        parses, _ = score_tales(tales)
        sample = self.write(model, [self.standard.prompt])[0]
        return Row(name, chapter, loss, self.corpus.floor, parses, sample)

    def nats_per_byte(self, model) -> float:
        """The loss on the validation tales, as the scoreboard counts it."""
        return self.validation_nats(model) / len(self.corpus.val.encode())

    @torch.no_grad()
    def validation_nats(self, model) -> float:
        """-ln p of all validation tales, their ends included, in nats."""
        from minimistral.train import next_token_nats, validation_rows

        documents = self.tokenizer.encode_batch(self.corpus.val_documents, bos=True, eos=True)
        rows = validation_rows(documents, max(map(len, documents)))
        parts = zip(rows.inputs.split(32), rows.targets.split(32))
        return sum(float(next_token_nats(model(inputs), targets)) for inputs, targets in parts)

    @torch.no_grad()
    def write(self, model, prompts: list[str], *, seed: int = 0) -> list[str]:
        """Continue each prompt at temperature 1, without cuts, to the model's own end.

        What is no tale any more is not continued: a sample is given up when a stretch longer
        than any sentence cannot be read. The prompts must be of equal length in tokens.
        """
        from minimistral.generate import generate
        from minimistral.model import Transformer

        tokenizer, longest = self.tokenizer, self.standard.longest
        starts = tokenizer.encode_batch(prompts, bos=True)
        if isinstance(model, Transformer):  # has a cache
            news = generate(model, starts, longest, temperature=1.0, seed=seed, stop_ids=(tokenizer.eos_id,))
            return [prompt + tokenizer.decode(new) for prompt, new in zip(prompts, news)]
        return [tokenizer.decode(ids) for ids in self._draw(model, torch.tensor(starts), longest, seed)]

    def _draw(self, model, ids: Tensor, longest: int, seed: int) -> list[list[int]]:
        from minimistral.sampling import draw

        random = torch.Generator().manual_seed(seed)
        done: dict[int, list[int]] = {}
        rows = torch.arange(len(ids))  # the samples that go on
        for step in range(longest):
            uniforms = torch.rand(len(ids), generator=random)  # for all: none depends on another
            if not len(rows):
                break
            chosen = draw(model(ids[rows])[:, -1].softmax(-1), uniforms[rows])
            column = torch.full((len(ids), 1), self.tokenizer.eos_id)
            column[rows, 0] = chosen
            ids = torch.cat([ids, column], 1)
            ended = chosen == self.tokenizer.eos_id
            if step % 10 == 9:
                ended |= torch.tensor([self._lost(ids[row].tolist()) for row in rows.tolist()])
            for row in rows[ended].tolist():
                done[row] = ids[row].tolist()
            rows = rows[~ended]
        done |= {row: ids[row].tolist() for row in rows.tolist()}
        return [done[row] for row in range(len(ids))]

    def _lost(self, ids: list[int]) -> bool:
        from minimistral.tales import parse_tale

        text = self.tokenizer.decode(ids)
        error_at = parse_tale(text).error_at
        return error_at is not None and len(text) - error_at > LONGEST_SENTENCE

    # ------------------------------------------------------------ the scoreboard

    def rows(self) -> list[tuple[Row, bool]]:
        """(row, is it the learner's) in the order of the chapters, recorded ones first."""
        recorded = [(Row(**entry), False) for entry in _recorded()]
        own = []
        for entry in load_progress()["ladder"]:
            try:
                own.append((Row(**entry), True))
            except TypeError:  # written by another version
                continue
        return sorted(recorded + own, key=lambda pair: (pair[0].chapter, pair[1]))

    def __call__(self, chapter: int | None = None) -> Panel:
        """The scoreboard, with the newest sample of the learner below it.

        With a chapter, rows on record from later ones are left out, as those chapters ask for a
        guess first; the shipped models, which everybody has met, stay.
        """
        rows = [(row, mine) for row, mine in self.rows()
                if mine or chapter is None or row.chapter <= chapter or row.name.startswith(SHIPPED)]
        own = load_progress()["ladder"]
        newest = own[-1]["name"] if own else None
        table = [
            (str(row.chapter), row.name, "yours" if mine else "recorded", f"{row.loss:.4f}",
             f"{row.above_floor:.4f}", f"{100 * row.parses:.0f}%")
            for row, mine in rows
        ]
        header = ("Chapter", "Model", "From", "Loss (nats per byte)", "Above the floor", "Tales that parse")
        marked = next((n for n, (row, mine) in enumerate(rows) if mine and row.name == newest), None)
        lines = ["The floor is what the tales' own grammar leaves open; no model can go below it."]
        if not rows:
            lines.append("No row yet.")
        shown = rows[marked] if marked is not None else (rows[-1] if rows else None)
        code = f"{shown[0].name} writes:\n{wrapped(shown[0].sample)}" if shown else ""
        return Panel("The ladder", lines, table=(header, table), marked_row=marked, code=code)

    def record(self, row: Row, command: str, path: Path = RECORDED) -> None:
        """Keep a row with its provenance in the package, for everybody. For maintainers."""
        provenance = {
            "date": date.today().isoformat(),
            "command": command,
            "standard": asdict(self.standard),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, "
                       f"{torch.get_num_threads()} threads",
        }
        entries = [entry for entry in _recorded(path) if entry["name"] != row.name]
        entries.append({**asdict(row), "provenance": provenance})
        write_whole(path, json.dumps({"rows": entries}, indent=1, ensure_ascii=False) + "\n")


def _recorded(path: Path = RECORDED) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


ladder = Ladder()
