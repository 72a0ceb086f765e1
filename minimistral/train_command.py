"""`minimistral train`: from a text to a folder with a model, its tokenizer and its record.

Plumbing around `train.py`. The folder holds params.json, consolidated.safetensors, tekken.json
and record.json; while the run goes on also settings.json and training/, from which it resumes.
"""

import argparse
import copy
import json
import os
import platform
import shutil
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

import minimistral as mm
from minimistral.devices import pick_device
from minimistral.files import write_whole
from minimistral.onednn import wide_products
from minimistral.train import encode_documents, validation_rows
from minimistral.train_run import process_device

# What a run is; where it runs (device) and when it is interrupted (resume) may change.
SETTINGS = (
    "corpus", "download", "dim", "layers", "heads", "kv_heads", "hidden", "experts", "window", "vocab_size",
    "steps", "batch_size", "seq_len", "lr", "seed", "dtype",
)


def run(arguments: argparse.Namespace) -> None:
    """Trains as the command line says, saves everything and prints a sample."""
    out = Path(arguments.out)
    if arguments.recipe:
        return run_recipe(out, arguments)
    claim_folder(out, arguments)
    device = training_device(arguments.device)
    config = model_config(arguments)
    training = mm.TrainConfig(  # before the minutes that a corpus and a tokenizer can take
        steps=2 if arguments.steps is None else arguments.steps, batch_size=arguments.batch_size,
        seq_len=arguments.seq_len, lr=arguments.lr, balance=0.01 if config.moe else 0.0,
        seed=arguments.seed, dtype=arguments.dtype, folder=str(out / "training"),
    )
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes:g} must be above 0")
    corpus = mm.load_corpus(arguments.corpus, **({"download": True} if arguments.download else {}))
    if arguments.resume:
        tokenizer = mm.Tokenizer.load(out / "tekken.json")
    else:
        tokenizer = mm.Tokenizer.train(corpus.train_documents, arguments.vocab_size)
    torch.manual_seed(arguments.seed)
    model = mm.Transformer(config).to(device)
    tokens = encode_documents(tokenizer, corpus.train_documents)
    held_out = tokenizer.encode_batch(list(corpus.val_documents), bos=True, eos=True)
    describe(corpus, model, tokens, device)
    if arguments.steps is None:
        arguments.steps = steps_within(arguments, model, tokens)
    training = replace(training, steps=arguments.steps, eval_every=max(250, arguments.steps // 8),
                       warmup_steps=min(100, arguments.steps // 10))
    remember(out, tokenizer, arguments)
    try:
        with wide_products(model):
            record = mm.train(
                model, tokens, training,
                val_rows=validation_rows(held_out, arguments.seq_len),
                floor=corpus.floor_per_token(tokenizer),
            )
    except KeyboardInterrupt as stop:
        where = str(stop).partition(";")[0] or "stopped"
        raise KeyboardInterrupt(f"{where}; minimistral train --out {out} --resume goes on") from None
    if is_first_process():
        mm.save_model(model, out)
        facts = json.loads(record.to_json())
        facts["about"] = about(corpus, tokenizer, tokens, held_out, device)
        write_whole(out / "record.json", json.dumps(facts) + "\n")
        shutil.rmtree(out / "training")
        print(f"Saved in {out}. It writes:\n")
        show_sample(model, tokenizer, arguments.seed)
        print(f'More: minimistral generate --model {out} --prompt "..."')


def run_recipe(out: Path, arguments: argparse.Namespace) -> None:
    """Makes a shipped model again; the same command goes on with a run that was stopped."""
    from minimistral.recipes import RECIPES, train_recipe

    if arguments.recipe not in RECIPES:
        raise ValueError(f"--recipe {arguments.recipe}: there are {', '.join(sorted(RECIPES))}")
    fixed = [name for name in SETTINGS if name != "steps"] + ["device", "resume"]
    given = [name for name in fixed if getattr(arguments, name) != arguments.defaults[name]]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise ValueError(f"{option} does not go with --recipe, which fixes all but --steps or --minutes")
    if (out / "params.json").exists():
        raise ValueError(f"--out {out} holds a model: name a new folder")
    train_recipe(
        arguments.recipe, out, out / "training", steps=arguments.steps, minutes=arguments.minutes
    )


def claim_folder(out: Path, arguments: argparse.Namespace) -> None:
    """Refuses a folder that holds something else; with --resume takes the settings from it.

    Raises ValueError with what to do instead. Only one process of several does this.
    """
    settings = out / "settings.json"
    if arguments.resume:
        if not settings.exists():
            raise ValueError(f"--resume: {out} holds no run that was stopped; leave --resume out to begin one")
        vars(arguments).update(json.loads(settings.read_text("utf-8")))
        if (out / "params.json").exists() and not (out / "training").exists():
            raise ValueError(f"--resume: the run in {out} is finished; name another folder to begin one")
        return
    place = next(one for one in (out.absolute(), *out.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ValueError(f"--out {out}: {place} is no folder that can be written; name another")
    if is_first_process() and out.exists() and any(out.iterdir()):
        raise ValueError(f"--out {out} is not empty: --resume goes on with the run in it, or name a new folder")


def remember(out: Path, tokenizer: mm.Tokenizer, arguments: argparse.Namespace) -> None:
    """Writes down the tokenizer and what this run is, for --resume."""
    if is_first_process() and not arguments.resume:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
        kept = {name: getattr(arguments, name) for name in SETTINGS}
        write_whole(out / "settings.json", json.dumps(kept, indent=1) + "\n")


def model_config(arguments: argparse.Namespace) -> mm.ModelConfig:
    """The model that the options describe; ValueError where they cannot be true together."""
    dim, heads = arguments.dim, arguments.heads
    if heads < 1 or dim % heads:
        raise ValueError(f"--dim {dim} is not a multiple of --heads {heads}: did you swap them?")
    experts = arguments.experts
    if experts is not None and experts < 2:
        raise ValueError(f"--experts {experts} must be 2 or more; leave it out for a dense model")
    return mm.ModelConfig(
        dim=dim, n_layers=arguments.layers, n_heads=heads, n_kv_heads=arguments.kv_heads or heads,
        head_dim=dim // heads, vocab_size=arguments.vocab_size, sliding_window=arguments.window,
        # two thirds of 4 dim: as many parameters as a plain feed-forward layer of 4 dim
        hidden_dim=arguments.hidden or max(1, round(8 * dim / 3 / 16)) * 16,
        moe=mm.MoEConfig(experts, 2) if experts else None,
    )


def training_device(name: str | None) -> torch.device:
    if "LOCAL_RANK" in os.environ and name is None:
        return process_device()  # torchrun: each process on its own
    return pick_device(name)


def steps_within(arguments: argparse.Namespace, model, tokens) -> int:
    """How many steps fit into --minutes, from the speed of a few on a copy of the model."""
    minutes = 10.0 if arguments.minutes is None else arguments.minutes
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--minutes measures one process: give several of them --steps")
    trial = mm.TrainConfig(
        steps=2, batch_size=arguments.batch_size, seq_len=arguments.seq_len, dtype=arguments.dtype
    )
    copied = copy.deepcopy(model)
    with wide_products(copied):
        mm.train(copied, tokens, trial, progress=False)  # warm-up
        record = mm.train(copied, tokens, replace(trial, steps=5), progress=False)
    return max(1, round(minutes * 60 * 5 / record.seconds))


def describe(corpus, model, tokens, device: torch.device) -> None:
    if is_first_process():
        count = mm.count_parameters(model.config)
        active = f" ({count.active:,} active)" if count.active != count.total else ""
        print(
            f"{corpus.name}: {len(tokens.ids):,} tokens; {count.total:,} parameters{active} on {device}",
            file=sys.stderr,
        )


def about(corpus, tokenizer, tokens, held_out: list[list[int]], device: torch.device) -> dict:
    """What a record of losses does not say: the text, by its name alone, and what ran where.

    frequencies: nats per token of the held-out text for somebody who knows nothing but how often
    each token occurs in the training text.
    """
    counts = torch.bincount(tokens.ids, minlength=tokenizer.vocab_size).double()
    counts[tokenizer.bos_id] = 0  # begins every text and is never predicted
    surprise = -((counts + 1) / (counts + 1).sum()).log()
    targets = torch.tensor([token for ids in held_out for token in ids[1:]])
    return {
        "corpus": corpus.name,
        "train_bytes": len(corpus.train.encode()), "train_tokens": len(tokens.ids),
        "val_bytes": len(corpus.val.encode()), "val_tokens": len(targets),
        "frequencies": surprise[targets].mean().item(),
        "device": str(device), "date": date.today().isoformat(),
        "versions": {"minimistral": mm.__version__, "python": platform.python_version(),
                     "torch": torch.__version__},
    }


def show_sample(model, tokenizer, seed: int) -> None:
    model.eval()
    ids = mm.stream(
        model, [tokenizer.bos_id], 100, temperature=0.8, seed=seed, stop_ids=[tokenizer.eos_id]
    )
    print(tokenizer.decode(ids) + "\n")


def is_first_process() -> bool:
    return int(os.environ.get("RANK", 0)) == 0
