"""What does a sliding window cost and save? Time per token, time to read a prompt, memory.

    python benchmarks/window.py [--parts decoding prefill memory] [--rounds 60] [--out FILE]

The shipped tales-dense with a window of 256, and without one. Decoding: one more token after 1,024,
8,192 and 65,536 tokens, the places in turns (A B C A B C). Pre-fill: prompts of 8,192 and 16,384
tokens in chunks of 256, and 8,192 at once, in turns. Memory: a process of its own for each case
really reads that many tokens and says how much it held at most. All samples are kept.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import minimistral as mm
from minimistral.course.chapters import ch08_sliding_window as ch08
from minimistral.provenance import provenance

WINDOW, CHUNK = 256, 256
MODELS = {"window": WINDOW, "no window": None}


def models() -> dict[str, mm.Transformer]:
    """The same weights, with and without a window."""
    model = mm.load_model("tales-dense")
    return {name: ch08.with_window(model, window) for name, window in MODELS.items()}


def decoding(rounds: int) -> list[dict]:
    """Milliseconds for one more token; one sample is the mean of eight tokens."""
    rows, made = [], models()
    places = {"window": (1024, 8192, 65536), "no window": (1024, 8192)}
    for name, model in made.items():
        samples = ch08.milliseconds_per_token(model, places[name], rounds)
        for place, values in samples.items():
            cache = mm.KVCache(model.config, device="meta")
            cache.make_room(place)
            rows.append({"model": name, "position": place, "cache_bytes": cache.nbytes,
                         "median_ms": statistics.median(values), "least_ms": min(values),
                         "samples_ms": [round(v, 4) for v in values]})
    return rows


def read(model: mm.Transformer, tokens: int, chunk: int | None) -> float:
    """Seconds of the processor to read a prompt of that many tokens."""
    cache = mm.KVCache(model.config)
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=chance)
    began = time.process_time()
    with torch.no_grad():
        for part in ids.split(chunk or tokens, dim=1):
            model.features(part, cache)
    return time.process_time() - began


def prefill(rounds: int) -> dict[str, dict]:
    """Seconds to read a prompt with the window, in chunks and at once, in turns."""
    model = models()["window"]
    cases = {"8192 in chunks": (8192, CHUNK), "16384 in chunks": (16384, CHUNK),
             "8192 at once": (8192, None)}
    samples: dict[str, list[float]] = {name: [] for name in cases}
    read(model, 1024, CHUNK)                                # warm
    for n in range(rounds):
        for name, case in cases.items():
            if case[1] or n == 0:                           # the slow one only once
                samples[name].append(read(model, *case))
    return {name: {"median_s": statistics.median(v), "least_s": min(v),
                   "samples_s": [round(x, 4) for x in v]} for name, v in samples.items()}


def peak(name: str, tokens: int, chunk: int) -> int:
    """In this process: read `tokens` tokens; the most memory it ever held, in bytes."""
    read(models()[name], tokens, chunk or None)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would count what the parent held before exec
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peaks() -> list[dict]:
    """The same, each case in a process of its own."""
    rows = []
    cases = [("window", 1024, CHUNK), ("window", 8192, CHUNK), ("window", 65536, CHUNK),
             ("no window", 1024, CHUNK), ("no window", 8192, CHUNK), ("window", 8192, 0)]
    for name, tokens, chunk in cases:
        done = subprocess.run([sys.executable, __file__, "--peak", name, str(tokens), str(chunk)],
                              capture_output=True, text=True, check=True)
        rows.append({"model": name, "tokens": tokens, "chunk": chunk or "at once",
                     "peak_bytes": int(done.stdout)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ch08.SPEED)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--parts", nargs="+", default=["decoding", "prefill", "memory"])
    parser.add_argument("--peak", nargs=3, metavar=("MODEL", "TOKENS", "CHUNK"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        name, tokens, chunk = arguments.peak
        print(peak(name, int(tokens), int(chunk)))
        return
    parts = {"decoding": lambda: decoding(arguments.rounds),
             "prefill": lambda: prefill(max(3, arguments.rounds // 8)), "memory": peaks}
    out = arguments.out
    result = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    result |= {
        "what": "tales-dense with a window of 256 and without one: milliseconds for a token and "
                "seconds to read a prompt, both of the processor; peak memory of a process",
        "window": WINDOW, "chunk": CHUNK, "seed": 0,
        "warm-up": "one token at each place, one prompt of 1,024 tokens",
    }
    for name in arguments.parts:
        before = provenance("python benchmarks/window.py")
        result[name] = parts[name]()
        result.setdefault("provenance", {})[name] = before
        out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8", newline="\n")
    for row in result["decoding"]:
        print(row["model"], row["position"], round(row["median_ms"], 3), "ms")
    for name, row in result["prefill"].items():
        print(name, round(row["median_s"], 3), "s")
    for row in result["memory"]:
        print(row["model"], row["tokens"], row["chunk"], f"{row['peak_bytes'] / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
