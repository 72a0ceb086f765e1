"""Tiny Shakespeare by the character: our recipe beside nanoGPT's, on one machine, in one run.

    python benchmarks/shakespeare.py --nanogpt FOLDER [--seeds 0 1 2] [--threads 2] [--fresh]
                                     [--only ROW ...]

The budget is that of nanoGPT's published recipe for a CPU: at most 0.80 million parameters, 2,000
steps of 12 rows of 64 characters, the first 90% of the text to learn from. Whoever takes larger
steps takes fewer, so that all see the same number of characters. All contestants are judged alike:
-ln p of every character of the validation text but its first, read in rows of 64. Each training is
a process of its own and its wall time is that of the whole process, start and its own evaluations
included. FOLDER is a checkout of nanoGPT; its train.py runs as it is, with the
published flags, and with its one seed moved by --seeds. The text must be there already:
load_corpus("shakespeare", download=True) fetches it.

Our recipe comes in steps, so that each gain has a row. A run that is in the file already is not
repeated, unless --fresh.
"""

import argparse
import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import replace
from pathlib import Path

import torch

import minimistral as mm
from minimistral.course.chapters import ch05_training as ch05
from minimistral.provenance import commit_of, provenance
from minimistral.train import next_token_nats

ROW = 64
# what nanoGPT's README gives for a laptop's CPU
PUBLISHED = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
             "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 "
             "--lr_decay_iters=2000 --dropout=0.0").split()
KEEP_LAST = ["--always_save_checkpoint=True"]      # judge the model that 2,000 steps end with

MODEL = mm.ModelConfig(dim=128, n_layers=4, n_heads=4, n_kv_heads=4, head_dim=32,
                       hidden_dim=336, vocab_size=65)
THEIR_OPTIMISER = mm.TrainConfig(steps=2000, batch_size=12, seq_len=ROW, lr=1e-3,
                                 warmup_steps=100, betas=(0.9, 0.99))
HIGHER_RATE = replace(THEIR_OPTIMISER, lr=3e-3, betas=(0.9, 0.95))
MUON = replace(HIGHER_RATE, optimizer="muon", lr=6e-3)
TO_ZERO = replace(MUON, min_lr=0.02)
SMALLER = replace(MODEL, hidden_dim=192)
LARGER_STEPS = replace(TO_ZERO, steps=1200, batch_size=20, warmup_steps=60, lr=7e-3)
# name: what is trained, and how; each row changes one thing of the row above
OURS = {
    "our model, nanoGPT's rates": (MODEL, THEIR_OPTIMISER),
    "the rate three times as high": (MODEL, HIGHER_RATE),
    "Muon for the matrices": (MODEL, MUON),
    "the rate falls to 2%": (MODEL, TO_ZERO),
    "a feed-forward of 192": (SMALLER, TO_ZERO),
    "20 rows in 1,200 steps": (SMALLER, LARGER_STEPS),
}
RECIPE = list(OURS)[-1]


# ------------------------------------------------------------ the text, and the judge


def characters() -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation text as the numbers of their characters."""
    corpus = mm.load_corpus("shakespeare")
    numbers = {sign: i for i, sign in enumerate(sorted(set(corpus.train + corpus.val)))}
    train, val = (torch.tensor([numbers[sign] for sign in text])
                  for text in (corpus.train, corpus.val))
    assert len(numbers) == MODEL.vocab_size
    return train, val


@torch.no_grad()
def judge(logits_of, val: torch.Tensor) -> float:
    """Nats per character over the whole text, in rows of 64 that begin anew."""
    whole = (len(val) - 1) // ROW * ROW
    inputs, targets = val[:whole].view(-1, ROW), val[1:whole + 1].view(-1, ROW)
    parts = list(zip(inputs.split(64), targets.split(64)))
    if whole + 1 < len(val):
        parts.append((val[whole:-1][None], val[whole + 1:][None]))
    nats = sum(float(next_token_nats(logits_of(x), y)) for x, y in parts)
    assert sum(y.numel() for _, y in parts) == len(val) - 1
    return nats / (len(val) - 1)


# ------------------------------------------------------------ one training of each kind


def train_ours(name: str, seed: int, out: Path) -> None:
    """In a process of its own: train one of our rows and keep its weights."""
    config, plan = OURS[name]
    torch.manual_seed(seed)
    model = mm.Transformer(config)
    mm.train(model, characters()[0], replace(plan, seed=seed), progress=False)
    torch.save(model.state_dict(), out)


def ours(name: str, seed: int, threads: int, folder: Path) -> tuple[float, float, int]:
    """(nats per character, seconds, parameters) of one of our rows."""
    out = folder / "ours.pt"
    command = [sys.executable, __file__, "--one", name, "--seeds", str(seed), "--out", str(out)]
    seconds = run(command, threads, Path.cwd())
    model = mm.Transformer(OURS[name][0])
    model.load_state_dict(torch.load(out, weights_only=True))
    count = sum(weight.numel() for weight in model.parameters())
    return judge(model, characters()[1]), seconds, count


SEEDED = ("import runpy, sys, torch; sys.path.insert(0, ''); first = torch.manual_seed; "
          "torch.manual_seed = lambda n: first(n + {seed}); runpy.run_path('train.py', "
          "run_name='__main__')")


def nanogpt(checkout: Path, seed: int, threads: int, folder: Path) -> tuple[float, float, int]:
    """(nats per character, seconds, parameters) of nanoGPT's own script."""
    work = folder / f"nanogpt-{seed}"
    names = ("train.py", "model.py", "configurator.py", "config/train_shakespeare_char.py")
    for name in names:
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes((checkout / name).read_bytes())
    data = work / "data" / "shakespeare_char"
    data.mkdir(parents=True)
    for name, ids in zip(("train", "val"), characters()):
        (data / f"{name}.bin").write_bytes(array("H", ids.tolist()).tobytes())
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": MODEL.vocab_size}))
    flags = ["config/train_shakespeare_char.py", *PUBLISHED, *KEEP_LAST]
    seconds = run([sys.executable, "-c", SEEDED.format(seed=seed), *flags], threads, work)

    spec = importlib.util.spec_from_file_location("nanogpt_model", work / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = torch.load(work / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    assert kept["iter_num"] == 2000, kept["iter_num"]
    model = module.GPT(module.GPTConfig(**kept["model_args"]))
    model.load_state_dict(kept["model"])
    model.eval()
    count = sum(weight.numel() for weight in model.parameters())

    def logits_of(x):                       # with targets it gives the logits of all places
        return model(x, x)[0]
    return judge(logits_of, characters()[1]), seconds, count


def run(command: list[str], threads: int, folder: Path) -> float:
    """Seconds of the process; CalledProcessError with its last words if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start


# ------------------------------------------------------------ the record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=["nanoGPT", *OURS], metavar="ROW")
    parser.add_argument("--fresh", action="store_true", help="forget the runs of before")
    parser.add_argument("--one", choices=list(OURS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=ch05.SHAKESPEARE)
    arguments = parser.parse_args()
    if arguments.one:
        return train_ours(arguments.one, arguments.seeds[0], arguments.out)
    if arguments.nanogpt is None or not (arguments.nanogpt / "train.py").exists():
        parser.error("--nanogpt must name a checkout of nanoGPT, with its train.py")

    out = arguments.out
    old = json.loads(out.read_text(encoding="utf-8"))["runs"] if out.exists() else []
    runs = [] if arguments.fresh else old
    done = {(entry["name"], entry["seed"]) for entry in runs}
    wanted = [(name, seed) for seed in arguments.seeds for name in ("nanoGPT", *reversed(OURS))
              if name in (arguments.only or (name,))]
    for name, seed in wanted:
        if (name, seed) in done:
            continue
        with tempfile.TemporaryDirectory() as folder:
            if name == "nanoGPT":
                result = nanogpt(arguments.nanogpt, seed, arguments.threads, Path(folder))
            else:
                result = ours(name, seed, arguments.threads, Path(folder))
        loss, seconds, count = result
        runs.append({"name": name, "seed": seed, "nats_per_character": loss, "parameters": count,
                     "wall_seconds": round(seconds, 1),
                     "provenance": provenance(
                         "python benchmarks/shakespeare.py --nanogpt FOLDER",
                         nanogpt_commit=commit_of(arguments.nanogpt), threads=arguments.threads)})
        print(f"{name:30} seed {seed}  {loss:.4f} nats per character  {seconds:.0f} s", flush=True)
        result = {"what": "tiny Shakespeare, characters, 2,000 steps of 12 rows of 64, or as many "
                          "characters in larger steps",
                  "names": ["nanoGPT", *OURS], "runs": runs}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
