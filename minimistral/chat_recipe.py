"""How tales-chat was made:

    python -m minimistral.chat_recipe --steps 5000 --out first
    python -m minimistral.chat_recipe --steps 2000 --start first --out tales-chat

Questions about new tales are drawn, tales-dense learns to answer them, and what it answers to
questions it never saw is scored. An adapter learns; with --full all parameters do, from the
same questions in the same order. --join NAME FOLDER puts the record of another run into that
in --out.

The shipped model is the adapter. Its record holds other runs as well: "first", the one that it
went on from; "lora", an adapter after 600 steps; "full" and "full_long", all parameters after
600 and 3,000; "full_all_kinds" and "lora_all_kinds", with requests among the questions. Which of
the two long runs of the adapter ships, 1,200 other questions decided ("chosen_by"), after as many
of the 240 of the second examination were right with both: --choose FOLDER FOLDER asks them.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from pathlib import Path
from random import Random

import torch
from torch import nn

from minimistral.checkpoint import load_model, save_model
from minimistral.corpora import load_corpus
from minimistral.devices import processor_name
from minimistral.files import write_whole
from minimistral.instruct import answer_rows, answers, fine_tune, score_interval
from minimistral.lora import ATTENTION, add_lora, load_adapter, merge_lora, save_adapter
from minimistral.questions import (
    KINDS, REQUESTS, Question, as_conversation, ask, interview, is_right, shared)
from minimistral.recipes import quick_products, say
from minimistral.tokenizer import Tokenizer, load_tokenizer
from minimistral.train import TrainConfig, evaluate, validation_rows
from minimistral.train_run import matmul_attention


@dataclass(frozen=True)
class TuningRecipe:
    """A base, the questions it learns from, an adapter, and the two trainings.

    alone: the share of interviews with a single question, as in the examination
    longest, longest_answer: their tokens, at most
    each: questions of the examination for each kind and language
    validation_seed: of a second examination, by which one of several runs may be chosen;
        the first is for the run that was chosen
    """
    lora: TrainConfig
    full: TrainConfig
    base: str = "tales-dense"
    rank: int = 4
    alpha: float = 8.0
    names: tuple[str, ...] = ATTENTION
    kinds: tuple[str, ...] = KINDS
    languages: tuple[str, ...] = ("en",)
    questions: int = 6
    alone: float = 0.3
    longest: int = 210
    longest_answer: int = 60
    seed: int = 1
    each: int = 60
    examination_seed: int = 77
    validation_seed: int = 78
    val_tales: int = 300


TRAINING = TrainConfig(steps=600, batch_size=8, lr=2e-3, min_lr=0.0, warmup_steps=20,
                       weight_decay=0.0, betas=(0.9, 0.98))
RECIPE = TuningRecipe(lora=replace(TRAINING, lr=1e-2), full=TRAINING)
ALL_KINDS = replace(RECIPE, kinds=(*KINDS, *REQUESTS), longest=280, longest_answer=200)


def examination(recipe: TuningRecipe = RECIPE, seed: int | None = None) -> list[Question]:
    """The questions that score a model: as many of every kind in every language."""
    rng, found = Random(recipe.examination_seed if seed is None else seed), {}
    for kind, language in product(recipe.kinds, recipe.languages):
        count = 0
        while count < recipe.each:
            question = ask(rng, kind, language)
            count += question.prompt not in found
            found[question.prompt] = question
    return list(found.values())


def interviews(recipe: TuningRecipe, count: int, tokenizer: Tokenizer) -> list[list[Question]]:
    """What is learned from: no tale of the two examinations is among it."""
    rng, kept = Random(recipe.seed), []
    forbidden = examination(recipe) + examination(recipe, recipe.validation_seed)
    while len(kept) < count:
        count_asked = 1 if rng.random() < recipe.alone else recipe.questions
        talk = interview(rng, count_asked, rng.choice(recipe.languages), recipe.kinds)
        words = "".join(m["content"] for m in as_conversation(talk))
        if len(tokenizer.encode(words)) + 4 * len(talk) <= recipe.longest:
            kept.append(talk)
    spoiled = {id(q) for q in shared([q for talk in kept for q in talk], forbidden)}
    return [clean for talk in kept if (clean := [q for q in talk if id(q) not in spoiled])]


def examine(model: nn.Module, tokenizer: Tokenizer, recipe: TuningRecipe, seed: int
            ) -> tuple[list[Question], list[str], list[bool]]:
    """The questions of this seed, what the model says to them, and whether that is right."""
    asked = examination(recipe, seed)
    said = answers(model, tokenizer, [q.messages for q in asked], recipe.longest_answer)
    return asked, said, [is_right(*pair) for pair in zip(asked, said)]


def measure(model: nn.Module, tokenizer: Tokenizer, recipe: TuningRecipe) -> dict:
    """Right answers of all, by kind and language, with 95% intervals; and the loss on tales."""
    asked, said, right = examine(model, tokenizer, recipe, recipe.examination_seed)

    def score(of) -> dict:
        marks = [mark for question, mark in zip(asked, right) if of(question)]
        return {"right": sum(marks), "asked": len(marks), "share": sum(marks) / len(marks),
                "interval": score_interval(sum(marks), len(marks))}

    corpus = load_corpus("tales", n_tales=1, val_tales=recipe.val_tales)
    tales = tokenizer.encode_batch(corpus.val_documents, bos=True, eos=True)
    nats = evaluate(model, validation_rows(tales, max(map(len, tales))))
    return {"all": score(lambda q: True),
            "kinds": {kind: score(lambda q: q.kind == kind) for kind in recipe.kinds},
            "languages": {tongue: score(lambda q: q.language == tongue) for tongue in recipe.languages},
            "tales_nats_per_byte": nats.per_byte(len(corpus.val.encode())),
            "floor_nats_per_byte": corpus.floor,
            "samples": [[q.prompt, text] for q, text in list(zip(asked, said))[::30]]}


def choose(folders: list[str], recipe: TuningRecipe = replace(RECIPE, each=300), seed: int = 79
           ) -> dict[str, int]:
    """How many questions, drawn for the choice alone, each model answers rightly."""
    right = {}
    for folder in folders:
        model, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
        right[folder] = sum(examine(model, tokenizer, recipe, seed)[2])
        say(f"{folder}: {right[folder]} of {recipe.each * len(recipe.kinds) * len(recipe.languages)}")
    return right


def tune(out: Path, recipe: TuningRecipe = RECIPE, full: bool = False,
         start: Path | None = None) -> dict:
    """Train, measure, and write: the adapter with its tokenizer and record, or, for `full`,
    the whole model with its record. An adapter goes on from that in the folder `start`."""
    begun = time.time()
    tokenizer, model = load_tokenizer(recipe.base), load_model(recipe.base, dtype=torch.float32)
    facts = {}
    if not full:
        say("measuring the base")
        facts = {"before": measure(model, tokenizer, recipe)}
    config = recipe.full if full else recipe.lora
    say("drawing interviews")
    talks = interviews(recipe, config.steps * config.batch_size, tokenizer)
    rows = answer_rows(tokenizer, [as_conversation(talk) for talk in talks])
    torch.manual_seed(config.seed)
    if full:
        model.requires_grad_(True)
    elif start:
        load_adapter(model, start)
    else:
        add_lora(model, recipe.rank, recipe.alpha, recipe.names)
    trained = sum(w.numel() for w in model.parameters() if w.requires_grad)
    total = sum(w.numel() for w in load_model(recipe.base).parameters())
    say(f"{len(talks)} interviews; {trained:,} of {total:,} parameters learn")
    clock = time.time()
    with quick_products(), matmul_attention():
        losses = fine_tune(model, rows, config)
    minutes, every = (time.time() - clock) / 60, max(1, len(losses) // 100)
    out.mkdir(parents=True, exist_ok=True)
    if full:
        save_model(model.to(torch.bfloat16), out)
        model = model.float()
    else:
        save_adapter(model, out, recipe.base)
        model = merge_lora(model)
    tokenizer.save(out)
    say("measuring the tuned model")
    chosen_by = examine(model, tokenizer, recipe, recipe.validation_seed)[2]
    facts = {
        "name": out.name, "date": date.today().isoformat(),
        "command": "python -m minimistral.chat_recipe" + " --full" * full
                   + " --all-kinds" * (recipe.kinds != KINDS)
                   + f" --steps {config.steps}" * (config.steps != TRAINING.steps)
                   + f" --start {start and start.name}" * bool(start),
        "base": recipe.base, "chat_format": tokenizer.version,
        "adapter": None if full else {"rank": recipe.rank, "alpha": recipe.alpha,
                                      "names": recipe.names},
        "parameters": {"trained": trained, "total": total, "share": trained / total},
        "training": asdict(config), "interviews": len(talks), "questions": sum(map(len, talks)),
        "shared_with_examination": len(shared([q for talk in talks for q in talk],
                                              examination(recipe))),
        "recipe": {k: v for k, v in asdict(recipe).items() if k not in ("lora", "full")},
        **facts, "after": measure(model, tokenizer, recipe),
        "validation": {"right": sum(chosen_by), "asked": len(chosen_by)},
        "losses": {"every": every, "nats_per_token": [
            round(sum(losses[i:i + every]) / every, 4) for i in range(0, len(losses), every)]},
        "minutes_of_training": round(minutes, 2), "minutes": round((time.time() - begun) / 60, 2),
        "host": {"cpu": processor_name(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__},
    }
    write_record(out, facts)
    for name in [name for name in ("before", "after") if name in facts]:
        say(name + " " + str({kind: f"{s['share']:.3f}" for kind, s in facts[name]["kinds"].items()})
            + f" all {facts[name]['all']['share']:.3f}"
            + f" tales {facts[name]['tales_nats_per_byte']:.4f}")
    return facts


def write_record(out: Path, facts: dict) -> None:
    write_whole(out / "record.json", json.dumps(facts, indent=1, ensure_ascii=False) + "\n")


def join(out: Path, name: str, other: Path) -> None:
    """Put the record of another run into the adapter's, under a name of its own. Its recipe, and
    what the base can do, are not said twice."""
    facts, more = (json.loads((folder / "record.json").read_text(encoding="utf-8"))
                   for folder in (out, other))
    twice = [key for key in ("before", "recipe") if more.get(key) == facts[key]]
    write_record(out, {**facts, name: {key: more[key] for key in more if key not in twice}})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minimistral.chat_recipe", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder for what is made")
    parser.add_argument("--full", action="store_true", help="train the whole model")
    parser.add_argument("--steps", type=int, default=TRAINING.steps, help="of the training")
    parser.add_argument("--all-kinds", action="store_true", help="questions and requests")
    parser.add_argument("--join", nargs=2, metavar=("NAME", "FOLDER"),
                        help="add the record of another run to that in --out")
    parser.add_argument("--start", type=Path, help="folder of an adapter to go on from, with "
                                                   "other questions and half the rate")
    parser.add_argument("--choose", nargs="+", metavar="FOLDER",
                        help="score models with questions of their own, to choose one")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    if chosen.choose:
        choose(chosen.choose)
    elif not chosen.out:
        parser.error("--out FOLDER is needed")
    elif chosen.join:
        join(chosen.out, chosen.join[0], Path(chosen.join[1]))
    else:
        longer = {"steps": chosen.steps, "warmup_steps": max(20, chosen.steps // 50)}
        recipe = ALL_KINDS if chosen.all_kinds else RECIPE
        recipe = replace(recipe, lora=replace(RECIPE.lora, **longer),
                         full=replace(RECIPE.full, **longer))
        if chosen.start:
            recipe = replace(recipe, seed=recipe.seed + 1,
                             lora=replace(recipe.lora, lr=recipe.lora.lr / 2))
        tune(chosen.out, recipe, chosen.full, chosen.start)


if __name__ == "__main__":
    main()
