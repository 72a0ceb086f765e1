"""How the shipped models were made: python -m minimistral.recipes tales-dense --out folder

One command draws the tales, trains the tokenizer and the model, measures the stored
weights, and writes them with a record of where they come from. A run that is stopped
goes on when the same command is given again.
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy
import torch

from minimistral.checkpoint import load_model, save_model
from minimistral.config import ModelConfig, MoEConfig, count_parameters
from minimistral.corpora import Corpus, load_corpus
from minimistral.devices import processor_name
from minimistral.files import write_whole
from minimistral.generate import generate
from minimistral.model import Transformer
from minimistral.tales import score_tales
from minimistral.tokenizer import Tokenizer, load_tokenizer
from minimistral.train import (TrainConfig, evaluate, join_documents, train,
                               validation_rows)

LONGEST_TALE = 400                  # tokens; longer samples are cut and do not parse


@dataclass(frozen=True)
class Recipe:
    """A model, its training, the tales it reads, and how they become tokens.

    The polish is a second run from the weights of the first: larger batches, and a low
    rate that ends at 0, so that the last steps average out what single batches want.
    """
    model: ModelConfig
    training: TrainConfig
    polish: TrainConfig
    n_tales: int = 150_000
    val_tales: int = 1_000
    tokenizer_tales: int = 20_000
    framed: float = 0.04            # share of tales framed by control tokens
    samples: int = 1_000            # tales drawn to measure the model


DENSE = ModelConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32,
                    hidden_dim=192, vocab_size=960)
TRAINING = TrainConfig(steps=9_000, batch_size=24, seq_len=200, lr=6e-3, min_lr=0.02,
                       optimizer="muon", warmup_steps=300, weight_decay=0.05, at_starts=True,
                       compile=True, eval_every=500, save_every=250)
POLISH = replace(TRAINING, steps=900, batch_size=64, lr=2e-3, min_lr=0.0, warmup_steps=50, seed=1)
RECIPES = {
    "tales-dense": Recipe(DENSE, TRAINING, POLISH),
    "tales-moe": Recipe(replace(DENSE, hidden_dim=96, sliding_window=64, moe=MoEConfig(6, 2)),
                        replace(TRAINING, steps=8_000, balance=0.01), replace(POLISH, balance=0.01)),
}


def frame(ids: list[int], turn: int, control: dict[str, int]) -> list[int]:
    """A tale with a chat template's control tokens around it, so that their embeddings
    are trained. It does not begin with <s>, so what follows <s> stays undisturbed."""
    tale = ids[1:-1]
    half = len(tale) // 2
    frames = (
        [control["[INST]"], *tale, control["[/INST]"]],
        [control["[SYSTEM_PROMPT]"], *tale, control["[/SYSTEM_PROMPT]"]],
        [control["[INST]"], *tale[:half], control["[/INST]"], *tale[half:]],
    )
    return [*frames[turn % len(frames)], control["</s>"]]


def training_documents(tokenizer: Tokenizer, corpus: Corpus, framed: float) -> list[list[int]]:
    """The tales as tokens, every 1 / framed-th one framed by control tokens."""
    documents = tokenizer.encode_batch(corpus.train_documents, bos=True, eos=True)
    every = round(1 / framed) if framed else len(documents) + 1
    for turn, i in enumerate(range(every - 1, len(documents), every)):
        documents[i] = frame(documents[i], turn, tokenizer.control_tokens)
    return documents


def evaluate_shipped(model: Transformer, tokenizer: Tokenizer, corpus: Corpus,
                     samples: int = 1_000, seed: int = 0) -> dict:
    """Measure a model of tales: its loss beside the floor, in nats per byte of the
    validation text, and of `samples` tales drawn at temperature 1 from <s> alone,
    without cuts, the share that parses and the share that is consistent as well."""
    documents = tokenizer.encode_batch(corpus.val_documents, bos=True, eos=True)
    rows = validation_rows(documents, max(map(len, documents)))
    n_bytes = len(corpus.val.encode())
    loss = evaluate(model, rows).per_byte(n_bytes)
    texts = []
    for begin in range(0, samples, 250):
        ids = generate(model, [[tokenizer.bos_id]] * min(250, samples - begin), LONGEST_TALE,
                       temperature=1.0, seed=seed + begin, stop_ids=(tokenizer.eos_id,))
        texts += [tokenizer.decode(row) for row in ids]
    parses, consistent = score_tales(texts)
    return {"val_nats_per_byte": loss, "floor_nats_per_byte": corpus.floor,
            "loss_over_floor": loss / corpus.floor, "val_tales": len(corpus.val_documents),
            "samples": samples, "sample_seed": seed, "parse": parses,
            "parse_and_consistent": consistent, "sample": texts[0]}


def train_recipe(name: str, out: Path, scratch: Path, *, steps: int | None = None,
                 minutes: float | None = None, tokenizer: Path | None = None) -> dict:
    """Make a shipped model in `out`; `scratch` keeps the checkpoints of the run.

    steps, or minutes of training on this machine, instead of the recipe's own number;
    tokenizer: another shipped model's, instead of a new one.
    """
    recipe = RECIPES[name]
    say(f"drawing {recipe.n_tales} tales")
    corpus = load_corpus("tales", n_tales=recipe.n_tales, val_tales=recipe.val_tales)
    vocabulary = (load_tokenizer(tokenizer) if tokenizer else Tokenizer.train(
        corpus.train_documents[:recipe.tokenizer_tales], recipe.model.vocab_size))
    documents = training_documents(vocabulary, corpus, recipe.framed)
    tokens = join_documents(documents)
    val = vocabulary.encode_batch(corpus.val_documents, bos=True, eos=True)
    config = replace(recipe.training, folder=str(scratch))
    rows = validation_rows(val[:300], config.seq_len)
    steps = planned_steps(recipe, config, tokens, scratch, steps, minutes)
    config = replace(config, steps=steps)
    model = new_model(recipe, config)
    floor = corpus.floor_per_token(vocabulary)
    say(f"{count_parameters(recipe.model)}, {len(tokens.ids):,} tokens a round, "
        f"{steps} steps, floor {floor:.4f} nats per token")
    polish = replace(recipe.polish, folder=str(scratch / "polish"))
    with quick_products():
        records = [train(model, tokens, run, val_rows=rows, floor=floor)
                   for run in (config, polish)]
    save_model(model.to(torch.bfloat16), out)
    vocabulary.save(out)
    say("measuring the stored weights")
    stored = load_model(out, dtype=torch.float32)
    measured = evaluate_shipped(stored, load_tokenizer(out), corpus, recipe.samples)
    return write_record(name, recipe, records, measured, out)


def new_model(recipe: Recipe, config: TrainConfig) -> Transformer:
    torch.manual_seed(config.seed)
    return Transformer(recipe.model)


@contextmanager
def quick_products() -> Iterator[None]:
    """Let the processor round the factors of float32 matrix products to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def planned_steps(recipe: Recipe, config: TrainConfig, tokens, scratch: Path,
                  steps: int | None, minutes: float | None) -> int:
    """How many steps to take: as told, or as many as fit into `minutes`, measured once
    and then kept with the checkpoints."""
    if minutes is None:
        return steps or config.steps
    plan = scratch / "steps.txt"
    if not plan.exists():
        trial = replace(config, steps=40, folder=None, warmup_steps=20)
        model = new_model(recipe, trial)
        with quick_products():
            train(model, tokens, trial, progress=False)           # compiles and warms up
            pace = train(model, tokens, trial, progress=False).seconds / trial.steps
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_text(str(max(1, int(minutes * 60 / pace))), encoding="utf-8")
    return int(plan.read_text(encoding="utf-8"))


def write_record(name: str, recipe: Recipe, records: list, measured: dict, out: Path) -> dict:
    """The provenance of a shipped model: record.json beside its weights."""
    record, polish = records
    losses = record.losses + polish.losses
    every = max(1, len(losses) // 200)
    seconds = record.seconds + polish.seconds
    facts = {
        "name": name, "date": date.today().isoformat(),
        "command": f"python -m minimistral.recipes {name}",
        "measured_on_stored_weights": measured,
        "model": json.loads(recipe.model.to_json()),
        "parameters": count_parameters(recipe.model)._asdict(),
        "training": {**record.config, "folder": None},
        "polish": {**polish.config, "folder": None},
        "tales": {"n_tales": recipe.n_tales, "val_tales": recipe.val_tales,
                  "tokenizer_tales": recipe.tokenizer_tales, "framed": recipe.framed},
        "steps": len(losses), "tokens": record.tokens + polish.tokens,
        "minutes_of_training": round(seconds / 60, 2),
        "tokens_per_second": round((record.tokens + polish.tokens) / seconds),
        "floor_nats_per_token": record.floor,
        "losses": {"every": every, "nats_per_token": [
            round(sum(losses[i:i + every]) / every, 5)
            for i in range(0, len(losses) - every + 1, every)]},
        "evaluations": record.evaluations + [
            (step + len(record.losses), loss) for step, loss in polish.evaluations],
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "numpy": numpy.__version__},
        "host": {"cpu": processor_name(), "threads": torch.get_num_threads(),
                 "system": platform.system(), "machine": platform.machine()},
    }
    write_whole(out / "record.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    say(json.dumps(measured, indent=1, ensure_ascii=False))
    return facts


def measure_again(name: str, out: Path) -> None:
    """Measure the stored weights once more, and write the figures into their record."""
    corpus = load_corpus("tales", n_tales=1, val_tales=RECIPES[name].val_tales)
    measured = evaluate_shipped(load_model(out, dtype=torch.float32), load_tokenizer(out),
                                corpus, RECIPES[name].samples)
    record = out / "record.json"
    facts = json.loads(record.read_text(encoding="utf-8"))
    facts["measured_on_stored_weights"] = measured
    write_whole(record, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    say(json.dumps(measured, indent=1, ensure_ascii=False))


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minimistral.recipes", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES))
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints (build/<name>)")
    parser.add_argument("--steps", type=int, help="another number of steps")
    parser.add_argument("--minutes", type=float, help="as many steps as fit into this time")
    parser.add_argument("--tokenizer", type=Path, help="take the tokenizer of this folder")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (1)")
    parser.add_argument("--measure", action="store_true",
                        help="measure the model in --out again and update its record")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.measure:
        return measure_again(chosen.name, chosen.out)
    scratch = chosen.scratch or Path("build") / chosen.name
    train_recipe(chosen.name, chosen.out, scratch, steps=chosen.steps,
                 minutes=chosen.minutes, tokenizer=chosen.tokenizer)


if __name__ == "__main__":
    main()
