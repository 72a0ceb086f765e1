"""What does a mixture of experts gain, and what does it cost? The measurements of chapter 9.

    python benchmarks/mixture.py [--parts quality balance code speed] [--seeds 0 1 2]
                                 [--steps 400] [--out FILE]

quality   the mixture against dense models of equal active and of equal total parameters, on tales
balance   the same mixture with the balance loss off, and too strong
code      a mixture and its dense twin on the Python library of this machine
speed     a mixture's layer against a dense feed-forward of equal active parameters

Every part can be run by itself. A run that is in the file already is not repeated; with --again
the chosen parts are measured anew. The ladder's own length is --steps 120.
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch

import minimistral as mm
from minimistral.course import ladder
from minimistral.course.chapters import ch09_mixture_of_experts as ch09
from minimistral.layers import SwiGLU
from minimistral.moe import MoE, all_experts, chosen_experts, route
from minimistral.provenance import provenance
from minimistral.train import encode_documents, evaluate

PARTS = ("quality", "balance", "code", "speed")
TALES = {"n_tales": 6_400, "val_tales": 200, "seed": 7}  # 400 steps read each of them once
DIM, HIDDEN = 512, 1024             # of the layers that are timed
COUNTS = (1, 4, 16, 64, 256, 4096)  # tokens


# ---------------------------------------------------------------- what it gains


def trained(name: str, seed: int, balance: float, steps: int, corpus, tokenizer) -> dict:
    """One training and its judgement. Losses do not depend on the machine's speed."""
    model = ch09.small_model(name, seed, tokenizer.vocab_size)
    tokens = encode_documents(tokenizer, corpus.train_documents)
    start = time.perf_counter(), time.process_time()
    ch09.learn(model, tokens, balance=balance, seed=seed, steps=steps)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    rows = ch09.held_out_rows(tokenizer, corpus.val_documents, longest=256)
    count = mm.count_parameters(model.config)
    run = {
        "model": name, "seed": seed, "steps": steps, "balance": balance,
        "total_parameters": count.total, "active_parameters": count.active,
        "nats_per_byte": evaluate(model, rows).per_byte(len(corpus.val.encode())),
        "floor": corpus.floor, "documents": len(corpus.train_documents),
        "wall_seconds": round(seconds[0], 1), "cpu_seconds": round(seconds[1], 1),
    }
    if model.config.moe:
        chosen = ch09.choices(model, rows.inputs, rows.positions)
        run["shares"] = [ch09.shares(c, ch09.EXPERTS).tolist() for c in chosen]
        run["distinct"] = {str(b): [ch09.distinct(c, b) for c in chosen] for b in (1, 2, 4, 8, 16)}
    return run


def tales(steps: int):
    """The ladder's own tales for a run as short as the ladder's; else enough for new ones."""
    short = steps <= ladder.standard.steps
    return (ladder.corpus if short else mm.load_corpus("tales", **TALES)), ladder.tokenizer


def quality(seeds: list[int], steps: int):
    """Three models, each with every seed."""
    corpus, tokenizer = tales(steps)
    for seed in seeds:
        for name in ch09.QUALITY:
            balance = ch09.BALANCE if name == "mixture" else 0.0
            key = {"model": name, "seed": seed, "balance": balance, "steps": steps}
            yield key, lambda: trained(**run_of(key), corpus=corpus, tokenizer=tokenizer)


def balance(seeds: list[int], steps: int):
    """The mixture of `quality`, with the balance loss off and too strong."""
    corpus, tokenizer = tales(steps)
    for seed in seeds:
        for weight in (0.0, ch09.TOO_STRONG):
            key = {"model": "mixture", "seed": seed, "balance": weight, "steps": steps}
            yield key, lambda: trained(**run_of(key), corpus=corpus, tokenizer=tokenizer)


def run_of(key: dict) -> dict:
    return {**{name: key[name] for name in ("seed", "balance", "steps")}, "name": key["model"]}


def code(seeds: list[int], steps: int):
    """Python's own library, cut into functions and classes: it differs between versions."""
    whole = mm.load_corpus("python")
    learned, held_out = ([piece for text in files for piece in text.split("\n\n\n")]
                         for files in (whole.train_documents[:100], whole.val_documents[:8]))
    corpus = SimpleNamespace(train_documents=learned, val_documents=held_out, floor=None,
                             val="".join(held_out))
    tokenizer = mm.Tokenizer.train(whole.train_documents[:40], 960)
    for name in ("dense, equal active", "mixture"):
        balance = ch09.BALANCE if name == "mixture" else 0.0
        key = {"model": name, "seed": 0, "balance": balance, "steps": steps}
        yield key, lambda: trained(**run_of(key), corpus=corpus, tokenizer=tokenizer)


# ---------------------------------------------------------------- what it costs


def speed(seeds: list[int], steps: int, repeats: int = 9):
    """Processor seconds of each way for some numbers of tokens, taken in turns."""
    torch.manual_seed(0)
    layer = MoE(DIM, HIDDEN, mm.MoEConfig(ch09.EXPERTS, ch09.CHOSEN))
    dense = SwiGLU(DIM, ch09.CHOSEN * HIDDEN)
    for count in COUNTS:
        yield {"tokens": count}, lambda: timed(layer, dense, count, repeats)


@torch.no_grad()
def timed(layer: MoE, dense: SwiGLU, count: int, repeats: int) -> dict:
    x = torch.randn(count, DIM, generator=torch.Generator().manual_seed(count))
    weights, chosen = route(layer.gate(x), layer.k)
    ways = {"dense": lambda: dense(x),
            "chosen experts": lambda: chosen_experts(layer.experts, x, weights, chosen),
            "router and chosen experts": lambda: layer(x),
            "all experts": lambda: all_experts(layer.experts, x, weights, chosen)}
    samples = {name: [] for name in ways}
    repeats = repeats if count > 1000 else 5 * repeats
    for turn in range(repeats + 1):                     # the first is to warm up
        for name, way in ways.items():
            if name == "all experts" and turn > 5:
                continue
            began = time.process_time()
            way()
            if turn:
                samples[name].append(time.process_time() - began)
    medians = {name: sorted(values)[len(values) // 2] for name, values in samples.items()}
    return {"tokens": count, "dim": DIM, "hidden_dim": HIDDEN, "experts": ch09.EXPERTS,
            "chosen": ch09.CHOSEN, "distinct": chosen.unique().numel(), "warm_up": 1,
            "medians": medians, "seconds": samples}


# ---------------------------------------------------------------- the file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ch09.RECORDED)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--again", action="store_true", help="forget these parts first")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for part in arguments.parts:
        if arguments.again:
            write(arguments.out, read(arguments.out) | {part: []})
        for key, measure in globals()[part](arguments.seeds, arguments.steps):
            if any(key.items() <= run.items() for run in read(arguments.out)[part]):
                continue
            run = measure() | {"provenance": provenance(f"python benchmarks/mixture.py --parts {part}")}
            keep(arguments.out, part, run)
            print(part, key, f"{run.get('nats_per_byte', run.get('medians'))}", flush=True)


def read(out: Path) -> dict:
    empty = {"what": "mixtures of experts against dense feed-forwards"} | {p: [] for p in PARTS}
    return json.loads(out.read_text(encoding="utf-8")) if out.exists() else empty


def keep(out: Path, part: str, run: dict) -> None:
    """Add one run; what another process has written meanwhile stays."""
    result = read(out)
    result[part].append(run)
    write(out, result)


def write(out: Path, result: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = out.with_suffix(".part")
    draft.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    draft.replace(out)


if __name__ == "__main__":
    main()
