"""Measure how fast the plain path and the engine write, beside what one would take instead.

    python benchmarks/inference.py [--only decode-S prefill-S] [--threads 2] [--out FILE]

Every row is one run in which all contestants take turns (A B A B ...) with the same weights on the
same machine, after a gate: in float32 their greedy ids must agree. Medians and ratios are made from
the samples, all of which are kept. A row that is measured again replaces its old one in the file.
Rows: decode-S decode-M decode-M-bfloat16 decode-M-8-bit decode-M-4-bit decode-X position-S
prefill-S-4096 prefill-S-16384 prefill-memory-S moe-X batch-S speculation
speculation-grown
"""

import argparse
import copy
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from minimistral.cache import KVCache
from minimistral.checkpoint import load_model, save_model
from minimistral.config import ModelConfig, MoEConfig, count_parameters
from minimistral.course.chapters.ch11_grown import grown
from minimistral.devices import describe_device
from minimistral.engine import Engine
from minimistral.fast_model import FastExperts, FastSwiGLU
from minimistral.generate import generate, read_prompts
from minimistral.layers import SwiGLU
from minimistral.model import Transformer
from minimistral.moe import MoE
from minimistral.provenance import provenance
from minimistral.quantize import QuantizedLinear, quantize_model, use_kernels
from minimistral.speculative import DraftModel, PromptLookup, Speculation, speculate

SEED, WARM_UP = 0, 1
TIE = 1e-3                      # logits nearer than this may be chosen in either order
CONFIGS = {
    "S": ModelConfig(256, 6, 8, 2, 32, 768, 4096, sliding_window=256),
    "M": ModelConfig(768, 12, 12, 4, 64, 2048, 32000, sliding_window=1024),
    "X": ModelConfig(512, 8, 8, 2, 64, 1024, 8192, sliding_window=512, moe=MoEConfig(8, 2)),
    "tiny": ModelConfig(32, 2, 4, 2, 8, 48, 96, sliding_window=16),
}


def lively(config: ModelConfig, dtype=torch.float32) -> Transformer:
    """Random weights, large enough that the choices vary from token to token."""
    torch.manual_seed(SEED)
    model = Transformer(config).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return model.requires_grad_(False).to(dtype)


def some_ids(config: ModelConfig, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, config.vocab_size, (length,), generator=generator).tolist()


# ---------------------------------------------------------------- contestants


def in_transformers(model: Transformer):
    """The same weights in transformers' own class, with its default attention (SDPA)."""
    if importlib.util.find_spec("transformers") is None:
        return None
    from transformers import AutoModelForCausalLM, logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_model(model, Path(folder) / "hf", layout="hf")
        theirs = AutoModelForCausalLM.from_pretrained(
            Path(folder) / "hf", dtype=model.tok_embeddings.weight.dtype)
    theirs.generation_config.eos_token_id = None            # all write to the same length
    return theirs.eval()


def writers(model: Transformer, theirs, engine: Engine) -> dict[str, Callable]:
    """Contestant: a function of a prompt and a number of tokens that returns new ids."""
    def transformers(cache):
        def write(prompt, n):
            ids = torch.tensor([prompt])
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                                      min_new_tokens=n, do_sample=False, pad_token_id=0,
                                      cache_implementation=cache, disable_compile=True)
            return out[0, len(prompt):].tolist()
        return write

    found = {"plain": lambda prompt, n: generate(model, prompt, n), "engine": engine.generate}
    if theirs is not None:
        found["transformers"] = transformers(None)
        found["transformers, static"] = transformers("static")
    return found


def gate(model: Transformer, prompt: list[int], texts: dict[str, list[int]],
         exact: bool = True) -> dict:
    """Do the greedy ids agree? A different choice is forgiven where the two logits are
    nearer than TIE, after which texts have nothing in common any more. Not `exact`, with
    numbers rounded to bfloat16 on the way, it is written down and not judged."""
    expected, found = texts["plain"], {}
    for name, ids in texts.items():
        same = next((i for i, (a, b) in enumerate(zip(ids, expected)) if a != b), len(expected))
        tied = None
        if same < len(expected):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + expected[:same]]))[0, -1]
            tied = abs(float(logits[expected[same]] - logits[ids[same]]))
        found[name] = {"equal_ids": same, "of": len(expected), "tied_by": tied}
        if exact and tied is not None and tied > TIE:
            raise SystemExit(f"{name} writes another text than the plain path: token {same}, "
                             f"logits {tied:.5f} apart. Nothing was measured.")
    return found


# ---------------------------------------------------------------- rows


def take_turns(contestants: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, all contestants in each round; the first rounds do not count."""
    seconds = {name: [] for name in contestants}
    for turn in range(WARM_UP + rounds):
        for name, run in contestants.items():
            begun = time.perf_counter()
            run()
            if turn >= WARM_UP:
                seconds[name].append(round(time.perf_counter() - begun, 6))
    return seconds


def summed_up(seconds: dict[str, list[float]], amount: float, unit: str) -> dict:
    """Samples, medians in the row's unit, and how many times faster than the best of
    transformers' ways."""
    medians = {name: statistics.median(s) for name, s in seconds.items()}
    theirs = [m for name, m in medians.items() if name.startswith("transformers")]
    row = {"unit": unit, "seconds": seconds,
           "median": {name: round(amount / m if unit.endswith("/s") else m * amount, 4)
                      for name, m in medians.items()}}
    if theirs:
        row["times_faster_than_transformers"] = {
            name: round(min(theirs) / m, 3) for name, m in medians.items()}
    return row


def decode_row(name: str, dtype=torch.float32, new: int = 256, rounds: int = 5,
               bits: int | None = None) -> dict:
    """Tokens per second of writing after a prompt of 64, by everybody's own generate. With
    `bits` ours have few bits, and transformers keeps its floats: it writes another text."""
    config = CONFIGS[name]
    model = lively(config, dtype)
    theirs = in_transformers(model)
    if bits:
        quantize_model(model, bits, None if bits == 8 else 128)
        use_kernels(model, output=True)
    moved = copy.deepcopy(model)          # an engine moves weights; the plain page's stay put
    engine = Engine(moved, progress=False)
    prompt, found = some_ids(config, min(64, config.vocab_size)), writers(model, theirs, engine)
    texts = {way: write(prompt, new) for way, write in found.items()
             if not (bits and way.startswith("transformers"))}
    if bits == 8:                              # without the kernel's rounding of inputs
        exact = copy.deepcopy(model)
        for layer in exact.modules():
            if isinstance(layer, QuantizedLinear):
                layer.kernel = False
        texts["plain"] = generate(exact, prompt, new)
    agreed = gate(model, prompt, texts, exact=dtype == torch.float32 and not bits)
    if not bits:
        eager = Engine(moved, compile=False)
        found["engine, not compiled"] = eager.generate
    seconds = take_turns({way: lambda w=write: w(prompt, new) for way, write in found.items()},
                         rounds)
    used = count_parameters(config).active - config.vocab_size * config.dim
    stored = sum(weight.nbytes for key, weight in model.state_dict().items()
                 if "tok_embeddings" not in key)
    numbers = f"{bits} bits" if bits else str(dtype)
    return {"what": f"{name}, {numbers}: prompt 64, {new} new tokens", "gate": agreed,
            "bytes_of_weights_per_token": stored if bits else used * dtype.itemsize, "engine": engine.describe(),
            **summed_up(seconds, new, "tokens/s")}


def position_row(name: str, places=(1024, 8192, 32768), new: int = 24, rounds: int = 7) -> dict:
    """Milliseconds per token at positions far into a text, read in chunks of 512."""
    config = CONFIGS[name]
    model = lively(config)
    theirs = in_transformers(model)
    engine = Engine(copy.deepcopy(model), progress=False)
    text = some_ids(config, places[-1] + len(places) * (WARM_UP + rounds) * new)
    cache = KVCache(config)
    contestants = {"plain": lambda part, at: model(torch.tensor([part]), cache),
                   "engine": lambda part, at: (engine.read(0, part, at) if len(part) > 1 else
                                               engine.run([part], [[at]]))}
    if theirs is not None:
        from transformers import DynamicCache
        their_cache = DynamicCache(config=theirs.config)
        contestants["transformers"] = lambda part, at: theirs(
            torch.tensor([part]), past_key_values=their_cache, logits_to_keep=1)
    rows, at = {}, 0
    with torch.no_grad():
        for place in places:
            for way, run in contestants.items():
                for start in range(at, place, 512):
                    run(text[start:min(start + 512, place)], start)
            at = place
            seconds = {way: [] for way in contestants}
            for turn in range(WARM_UP + rounds):
                for way, run in contestants.items():
                    begun = time.perf_counter()
                    for i in range(at, at + new):
                        run(text[i:i + 1], i)
                    if turn >= WARM_UP:
                        seconds[way].append(round(time.perf_counter() - begun, 6))
                at += new
            rows[str(place)] = summed_up(seconds, 1000 / new, "ms/token")
    first, *_, last = (row["median"]["engine"] for row in rows.values())
    return {"what": f"{name}: {new} tokens from each position on", "positions": rows,
            "engine_last_over_first": round(last / first, 3),
            "cache_bytes": {"plain": cache.nbytes, "engine": engine.fast.nbytes}}


def prefill_row(name: str, length: int, rounds: int, whole_rounds: int | None = None) -> dict:
    """Seconds to read a prompt. transformers reads it whole, as its default does, and in
    chunks of 512; the quadratic way is measured in fewer rounds."""
    config = CONFIGS[name]
    model = lively(config)
    theirs = in_transformers(model)
    engine = Engine(copy.deepcopy(model), compile=False)      # reading is not compiled
    text = some_ids(config, length)
    last = {}

    def plain():
        last["plain"] = read_prompts(model, [text], KVCache(config), 512)[0]

    def fast():
        engine.fast.forget(0)
        last["engine"] = engine.read(0, text)

    def chunked(size, way):
        from transformers import DynamicCache
        cache = DynamicCache(config=theirs.config)
        for part in torch.tensor([text]).split(size, dim=1):
            out = theirs(part, past_key_values=cache, logits_to_keep=1)
        last[way] = out.logits[0, -1]

    contestants = {"plain": plain, "engine": fast}
    if theirs is not None:
        contestants["transformers, chunks of 512"] = lambda: chunked(
            512, "transformers, chunks of 512")
    with torch.no_grad():
        seconds = take_turns(contestants, rounds)
        if theirs is not None:
            seconds |= take_turns({"transformers, whole": lambda: chunked(
                length, "transformers, whole")}, whole_rounds or rounds)
    differ = {way: float((logits - last["plain"]).abs().max()) for way, logits in last.items()}
    if max(differ.values()) > 0.01:
        raise SystemExit(f"the logits after the prompt differ: {differ}. Nothing was measured.")
    return {"what": f"{name}: a prompt of {length}", "logits_differ_by": differ,
            **summed_up(seconds, 1, "s")}


MEASURE_READING = """
import json, sys, time
from pathlib import Path
import torch
from benchmarks.inference import CONFIGS, lively, some_ids
from minimistral.engine import Engine
def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(key)).split()[1])
name, threads, *lengths = sys.argv[1:]
torch.set_num_threads(int(threads))
engine = Engine(lively(CONFIGS[name]), compile=False)
engine.read(0, some_ids(CONFIGS[name], 8))              # what is set up once
Path("/proc/self/clear_refs").write_text("5")
rows, before = {}, memory("VmRSS")
for length in map(int, lengths):
    text = some_ids(CONFIGS[name], length)
    engine.fast.forget(0)
    begun = time.perf_counter()
    engine.read(0, text)
    rows[length] = {"seconds": round(time.perf_counter() - begun, 4),
                    "extra_peak_bytes": memory("VmHWM") - before}
print(json.dumps(rows))
"""


def prefill_memory_row(name: str, lengths=(4096, 16384, 65536)) -> dict:
    """Seconds and extra memory at most, beyond an engine that has read 8 tokens, while it reads
    one prompt after the other, in a process of its own; Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("the peak of memory is read from /proc, which is not here")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_READING, name, str(torch.get_num_threads()),
         *map(str, lengths)], cwd=Path(__file__).parents[1], check=True, capture_output=True,
        text=True)
    rows = json.loads(done.stdout)
    first, last = rows[str(lengths[0])], rows[str(lengths[-1])]
    growth = last["seconds"] / first["seconds"] * lengths[0] / lengths[-1]
    return {"what": f"{name}: the engine reads prompts, once each", "prompts": rows,
            "seconds_per_token_last_over_first": round(growth, 3),
            "median": {f"{length}, extra MiB": round(row["extra_peak_bytes"] / 2**20, 1)
                       for length, row in rows.items()}}


@torch.no_grad()
def moe_row(name: str, counts=(1, 16, 256, 4096), rounds: int = 5) -> dict:
    """Milliseconds of one mixture layer, and of a dense layer of equal active size."""
    config = CONFIGS[name]
    torch.manual_seed(SEED)
    moe = MoE(config.dim, config.hidden_dim, config.moe).requires_grad_(False)
    twin = SwiGLU(config.dim, config.hidden_dim * config.moe.num_experts_per_tok)
    twin = twin.requires_grad_(False)
    theirs = in_transformers(lively(config))
    block = theirs.model.layers[0].mlp if theirs is not None else None
    if block is not None:
        block.gate.weight.copy_(moe.gate.weight)
        block.experts.gate_up_proj.copy_(torch.stack(
            [torch.cat((e.w1.weight, e.w3.weight)) for e in moe.experts]))
        block.experts.down_proj.copy_(torch.stack([e.w2.weight for e in moe.experts]))
    fast, fast_twin = FastExperts(moe), FastSwiGLU(twin)
    rows = {}
    for count in counts:
        x = torch.randn(1, count, config.dim)
        step = torch.compile(fast.__call__, dynamic=False) if count <= 64 else fast
        ways = {"plain": moe, "engine": step, "dense of equal active size": twin,
                "dense of equal active size, engine's products": fast_twin}
        if block is not None:
            ways["transformers"] = block
        for way, run in ways.items():
            if not way.startswith("dense"):
                torch.testing.assert_close(run(x), moe(x), rtol=1e-3, atol=1e-4)
        repeat = max(1, 200 // count)
        seconds = take_turns({way: lambda r=run: [r(x) for _ in range(repeat)]
                              for way, run in ways.items()}, rounds)
        rows[str(count)] = summed_up(seconds, 1000 / repeat, "ms")
    return {"what": f"one mixture layer of {name}", "tokens": rows}


def batch_row(name: str, places: int = 8, new: int = 256, rounds: int = 5) -> dict:
    """Tokens per second of eight texts, one after the other and all at once, in an engine of
    eight places."""
    config = CONFIGS[name]
    model = lively(config)
    engine = Engine(model, places, progress=False)
    prompt = some_ids(config, 64)
    prompts = [prompt[i:] + prompt[:i] for i in range(places)]
    expected = [generate(model, p, new) for p in prompts]
    agreed = gate(model, prompts[0], {"plain": expected[0],
                                      "engine": engine.generate(prompts, new)[0]})
    seconds = take_turns({"one text": lambda: [engine.generate(p, new) for p in prompts],
                          "eight texts": lambda: engine.generate(prompts, new)}, rounds)
    row = summed_up(seconds, new * places, "tokens/s")
    row["eight_over_one"] = round(row["median"]["eight texts"] / row["median"]["one text"], 3)
    return {"what": f"{name}: {new} new tokens in each place", "gate": agreed, **row}


def speculation_row(new: int = 200, rounds: int = 5, drafts: int = 4) -> dict:
    """Tokens per second with proposals: by looking up, and by the model itself, whose proposals
    are all right and cost as much as they save. Greedy, so that all write the same text."""
    tales = load_model("tales-dense").requires_grad_(False)
    ids = generate(tales, [0], 120, temperature=1.0, seed=SEED)
    repeated = [0, *ids, *ids[:40]]
    engine = Engine(tales, spare=drafts, progress=False)
    draft = Engine(load_model("tales-dense"), spare=drafts, progress=False)
    ways = {"engine": None, "look-up": PromptLookup(), "the model itself": DraftModel(draft)}
    about, texts = {}, {}
    for way, proposer in ways.items():
        if proposer is None:
            texts[way] = texts["plain"] = engine.generate(repeated, new)
            continue
        done = speculate(engine, repeated, new, proposer, drafts=drafts)
        texts[way] = done.ids
        about[way] = {"acceptance": round(done.acceptance, 4), "steps": done.steps,
                      "tokens_per_step": round(done.tokens_per_step, 3)}
    agreed = gate(tales, repeated, texts)
    seconds = take_turns(
        {way: (lambda: engine.generate(repeated, new)) if p is None else
         lambda p=p: speculate(engine, repeated, new, p, drafts=drafts)
         for way, p in ways.items()}, rounds)
    return {"what": f"tales-dense: a tale begun twice, {new} new tokens, {drafts} proposals",
            "gate": agreed, "proposals": about, **summed_up(seconds, new, "tokens/s")}


def grown_speculation_row(noise: float = 0.1, texts: int = 4, new: int = 80, rounds: int = 5,
                          drafts: int = 4) -> dict:
    """Tokens per second of a model of M's shape that knows the tales (chapters/ch11_grown.py),
    with proposals of tales-dense. Greedy, from beginnings of 12 tokens."""
    small = load_model("tales-dense").requires_grad_(False)
    config = replace(CONFIGS["M"], vocab_size=small.config.vocab_size, sliding_window=None)
    large = grown(small, config, noise)
    prompts = [[0, *generate(small, [0], 11, temperature=1.0, seed=SEED + i)]
               for i in range(texts)]
    room = len(prompts[0]) + new
    engine = Engine(copy.deepcopy(large), 1, room, spare=drafts, progress=False)
    draft = DraftModel(Engine(small, 1, room, spare=drafts, progress=False))

    def proposing(proposer) -> list[Speculation]:
        return [speculate(engine, prompt, new, proposer, drafts=drafts) for prompt in prompts]

    done = {"look-up": proposing(PromptLookup()), "tales-dense drafts": proposing(draft)}
    written = {"plain": generate(large, prompts, new), "engine": engine.generate(prompts, new),
               **{way: [text.ids for text in told] for way, told in done.items()}}
    agreed = [gate(large, prompt, {way: ids[i] for way, ids in written.items()})
              for i, prompt in enumerate(prompts)]
    about = {}
    for way, told in done.items():
        steps = sum(text.steps for text in told)
        about[way] = {"acceptance": round(sum(text.accepted for text in told)
                                          / sum(text.proposed for text in told), 4),
                      "steps": steps, "tokens_per_step": round(new * texts / steps, 3)}
    seconds = take_turns({"engine": lambda: [engine.generate(p, new) for p in prompts],
                          "look-up": lambda: proposing(PromptLookup()),
                          "tales-dense drafts": lambda: proposing(draft)}, rounds)
    row = summed_up(seconds, new * texts, "tokens/s")
    row["draft_over_engine"] = round(
        row["median"]["tales-dense drafts"] / row["median"]["engine"], 3)
    return {"what": f"{count_parameters(config).total / 1e6:.0f}M parameters grown from tales-dense, "
                    f"noise {noise}: {new} new tokens of {texts} tales, {drafts} proposals",
            "gate": agreed, "proposals": about, **row}


ROWS: dict[str, Callable[[], dict]] = {
    "decode-S": lambda: decode_row("S"),
    "decode-M": lambda: decode_row("M", new=64, rounds=3),
    "decode-M-bfloat16": lambda: decode_row("M", torch.bfloat16, new=64, rounds=3),
    "decode-M-8-bit": lambda: decode_row("M", new=64, rounds=3, bits=8),
    "decode-M-4-bit": lambda: decode_row("M", new=64, rounds=3, bits=4),
    "decode-X": lambda: decode_row("X", new=64, rounds=3),
    "position-S": lambda: position_row("S"),
    "prefill-S-4096": lambda: prefill_row("S", 4096, 3),
    "prefill-S-16384": lambda: prefill_row("S", 16384, 3, whole_rounds=1),
    "prefill-memory-S": lambda: prefill_memory_row("S"),
    "moe-X": lambda: moe_row("X"),
    "batch-S": lambda: batch_row("S"),
    "speculation": speculation_row,
    "speculation-grown": grown_speculation_row,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--note", help="what a reader must know about this run")
    parser.add_argument("--out", type=Path,
                        default=Path(__file__).parent / "results" / "inference.json")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    theirs = None
    if importlib.util.find_spec("transformers"):
        theirs = importlib.metadata.version("transformers")
    for name in chosen.only:
        begun = provenance(f"python benchmarks/inference.py --only {name} --threads {chosen.threads}",
                           seed=SEED, warm_up_rounds=WARM_UP, note=chosen.note,
                           transformers=theirs, **describe_device("cpu"))
        print(name, "...", flush=True)
        row = ROWS[name]() | {"provenance": begun}
        found = {"what": "speed of writing and reading, everybody with the same weights",
                 "rows": {}}
        if chosen.out.exists():
            found = json.loads(chosen.out.read_text(encoding="utf-8"))
        found["rows"][name] = row
        found["not_measured"] = {"litgpt, llama.cpp": "see benchmarks/others.py",
                                 "GPU": "see benchmarks/gpu.py"}
        chosen.out.parent.mkdir(parents=True, exist_ok=True)
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")
        said = row.get("times_faster_than_transformers") or row.get("median") or {
            key: value["median"] for key, value in
            (row.get("positions") or row.get("tokens")).items()}
        print(name, json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
