"""What a server writes for eight clients at once, against what it writes for one.

    python benchmarks/serving.py [--threads 1] [--rounds 5] [--models tales-dense S M] [--out FILE]

Every client is an HTTP connection on loopback that asks for one completion and reads it as a stream;
all of them live in another process than the server.
The shapes S and M are those of benchmarks/inference.py, with random weights; S and M run compiled, as
`minimistral serve` runs them; tales-dense does not, as in the notebook. One client and eight take turns, and
all samples are kept. Before anything is measured, eight greedy texts written at once must be those
written one by one; a different choice is forgiven where the two logits are nearer than TIE. Beside the
rates stand the times from a request to its first piece of text.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import torch

import minimistral as mm
from minimistral.devices import describe_device
from minimistral.provenance import provenance
from minimistral.serve import LocalServer

sys.path.insert(0, str(Path(__file__).parent))
from inference import CONFIGS, SEED, TIE, lively  # noqa: E402

OUT = Path(__file__).parent / "results" / "serving.json"
CLIENTS, PROMPT, TOKENS, WARM_UP = 8, 32, {"tales-dense": 150, "S": 150, "M": 40}, 1


class Bytes:
    """A tokenizer for random weights: every token is one letter, and none ends a text."""
    version, eos_id, bos_id = "v3", -1, 1

    def id_to_bytes(self, token: int) -> bytes:
        return bytes([97 + token % 26])


async def ask(port: int, body: bytes) -> tuple[list[float], str]:
    """Seconds from the request to each event with text, and the text: a client as light as can be."""
    began, times, text = time.perf_counter(), [], ""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body)
    async for line in reader:
        if line.startswith(b"data: {"):
            if piece := json.loads(line[6:])["choices"][0]["text"]:
                times.append(time.perf_counter() - began)
                text += piece
    writer.close()
    return times, text


async def all_at_once(port: int, bodies: list[bytes]) -> dict:
    """One run: all clients at once, until the last text is whole."""
    began = time.perf_counter()
    answers = await asyncio.gather(*(ask(port, body) for body in bodies))
    return {"seconds": time.perf_counter() - began,
            "first_piece": [times[0] for times, _ in answers],
            "pieces": [len(times) for times, _ in answers], "texts": [text for _, text in answers]}


def be_the_clients() -> None:
    """The process of the clients: a line with the port and the requests in, a line with the run out."""
    for line in sys.stdin:
        port, bodies = json.loads(line)
        run = asyncio.run(all_at_once(port, [json.dumps(body).encode() for body in bodies]))
        print(json.dumps(run), flush=True)


def same_ids(model, prompts: list[list[int]], tokens: int) -> dict:
    """Are the ids of eight at once those of each alone? (The server tells letters: here are the ids.)"""
    from minimistral.engine import Engine
    engine = Engine(model, CLIENTS, 512, compile=False, progress=False)
    together = engine.generate(prompts, tokens)
    equal, ties = 0, []
    for prompt, ids in zip(prompts, together):
        alone = mm.generate(model, prompt, tokens)
        at = next((i for i, pair in enumerate(zip(ids, alone)) if pair[0] != pair[1]), None)
        if at is None:
            equal += 1
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + alone[:at]]))[0, -1]
        ties.append(abs(float(logits[alone[at]] - logits[ids[at]])))
        if ties[-1] > TIE:
            raise SystemExit(f"a text in a batch differs from itself alone: logits {ties[-1]:.5f} apart")
    return {"texts_equal": equal, "of": len(prompts), "tied_by": ties}


def measure(name: str, rounds: int) -> dict:
    tokens = TOKENS[name]
    model = mm.load_model(name) if name == "tales-dense" else lively(CONFIGS[name])
    tokenizer = Bytes()
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(3, model.config.vocab_size, (PROMPT,), generator=generator).tolist()
               for _ in range(CLIENTS)]
    gate = same_ids(model, prompts, min(tokens, 40))
    compiled = name != "tales-dense"
    samples = {1: [], CLIENTS: []}
    bodies = [{"model": name, "prompt": prompt, "max_tokens": tokens, "temperature": 0,
               "stream": True} for prompt in prompts]
    crowd = subprocess.Popen([sys.executable, __file__, "--be-the-clients"], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with crowd, LocalServer(model, tokenizer, name=name, batch_size=CLIENTS, max_length=512,
                            compile="auto" if compiled else False, progress=False) as server:
        port = int(server.address.rpartition(":")[2])
        for turn in range(WARM_UP + rounds):
            for clients in samples:
                crowd.stdin.write(json.dumps([port, bodies[:clients]]) + "\n")
                crowd.stdin.flush()
                run = json.loads(crowd.stdout.readline())
                if turn >= WARM_UP:
                    samples[clients].append(run)
        steps = server.app.state.engine.describe()["steps"]
        crowd.stdin.close()
    rates = {clients: [clients * tokens / run["seconds"] for run in runs]
             for clients, runs in samples.items()}
    one, many = (median(rates[clients]) for clients in (1, CLIENTS))
    first = {clients: median(t for run in runs for t in run["first_piece"])
             for clients, runs in samples.items()}
    longest = [max(run["first_piece"]) for run in samples[CLIENTS]]
    texts = samples[CLIENTS][0]["texts"]
    return {
        "tokens_each": tokens, "prompt": PROMPT, "steps": steps, "gate": gate,
        "tokens_per_second": {"1": one, str(CLIENTS): many}, "ratio": many / one,
        "median_first_piece_ms": {str(k): 1000 * v for k, v in first.items()},
        "longest_first_piece_ms": 1000 * max(longest),
        "the_same_texts_in_every_round": all(run["texts"] == texts for run in samples[CLIENTS]),
        "pieces_per_text": {str(k): median(n for run in runs for n in run["pieces"])
                            for k, runs in samples.items()},
        "rate_samples": {str(k): v for k, v in rates.items()},
        "first_piece_samples": {str(k): [run["first_piece"] for run in runs] for k, runs in samples.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, metavar="N",
                        help="of the model; the server and the clients need a core, too")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--models", nargs="+", choices=list(TOKENS), default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    parser.add_argument("--be-the-clients", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be_the_clients:
        return be_the_clients()
    torch.set_num_threads(arguments.threads)
    old = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    rows = old.get("rows", {})
    for name in arguments.models:
        key = f"{name}, {arguments.threads} thread{'s' * (arguments.threads > 1)}"
        about = provenance(" ".join(["python benchmarks/serving.py", *sys.argv[1:]]), seed=SEED,
                           warm_up_rounds=WARM_UP, **describe_device("cpu"))
        rows[key] = {"provenance": about, **measure(name, arguments.rounds)}
        row = rows[key]
        print(f"{key}: one client {row['tokens_per_second']['1']:.0f} tokens a second, {CLIENTS} clients "
              f"{row['tokens_per_second'][str(CLIENTS)]:.0f}: {row['ratio']:.2f} times; {row['steps']}")
        arguments.out.write_text(json.dumps({"clients": CLIENTS, "rows": rows}, indent=1) + "\n",
                                 encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
