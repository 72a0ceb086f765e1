"""Measure how fast litgpt and llama.cpp write beside the engine, with the same weights.

    python benchmarks/others.py --litgpt PYTHON --llama-cpp PYTHON [--only S M] [--threads 2]

PYTHON is the interpreter of an environment of their own: one with litgpt 0.5 and this torch, one
with llama-cpp-python and gguf. Each runs this file as a process that waits for its turn (A B A B
...), after a gate: the greedy ids must be those of our plain path. Neither of them applies a
sliding window to a model of this kind, so prompt and text stay below the window.
"""

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NEW, PROMPT, WARM_UP = {"S": 128, "M": 64}, 64, 1
OUT = Path(__file__).parent / "results" / "others.json"


# ------------------------------------------------- in an environment of their own


def litgpt_writer(folder: Path, threads: int):
    """litgpt's model and its own generate, not compiled, as its command does by default."""
    import importlib.metadata
    import torch
    from litgpt import GPT, Config
    from litgpt.generate.base import generate
    about = json.loads((folder / "shape.json").read_text())
    torch.set_num_threads(threads)
    config = Config(
        name="mistral", n_layer=about["n_layers"], n_embd=about["dim"], n_head=about["n_heads"],
        n_query_groups=about["n_kv_heads"], head_size=about["head_dim"],
        intermediate_size=about["hidden_dim"], vocab_size=about["vocab_size"],
        padded_vocab_size=about["vocab_size"], block_size=about["length"], bias=False,
        parallel_residual=False, rotary_percentage=1.0, rope_base=int(about["rope_theta"]),
        norm_class_name="RMSNorm", norm_eps=about["norm_eps"], mlp_class_name="LLaMAMLP")
    weights = {name: torch.from_numpy(w) for name, w in read_weights(folder).items()}

    def halves(w):                        # neighbouring pairs of numbers become two halves
        heads = w.view(-1, about["head_dim"] // 2, 2, w.shape[1])
        return heads.transpose(1, 2).reshape(w.shape)

    names = {"transformer.wte.weight": weights["tok_embeddings.weight"],
             "transformer.ln_f.weight": weights["norm.weight"],
             "lm_head.weight": weights["output.weight"]}
    for i in range(about["n_layers"]):
        def ours(name, i=i):
            return weights[f"layers.{i}.{name}.weight"]
        qkv = torch.cat((halves(ours("attention.wq")), halves(ours("attention.wk")),
                         ours("attention.wv")))
        for name, weight in [
                ("norm_1", ours("attention_norm")), ("norm_2", ours("ffn_norm")),
                ("attn.qkv", qkv), ("attn.proj", ours("attention.wo")),
                ("mlp.fc_1", ours("feed_forward.w1")), ("mlp.fc_2", ours("feed_forward.w3")),
                ("mlp.proj", ours("feed_forward.w2"))]:
            names[f"transformer.h.{i}.{name}.weight"] = weight
    model = GPT(config).eval()
    model.load_state_dict(names)
    with torch.no_grad():
        model.set_kv_cache(batch_size=1)

    def write(prompt: list[int], new: int) -> list[int]:
        ids = generate(model, torch.tensor(prompt), len(prompt) + new, temperature=0.0,
                       top_p=0.0, include_prompt=False)
        return ids.tolist()
    return write, f"litgpt {importlib.metadata.version('litgpt')}, torch {torch.__version__}"


def llama_cpp_writer(folder: Path, threads: int):
    """llama.cpp through llama-cpp-python, from a float32 file that gguf writes."""
    import gguf
    import llama_cpp
    about = json.loads((folder / "shape.json").read_text())
    file = folder / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(about["n_layers"])
    writer.add_context_length(about["length"])
    writer.add_embedding_length(about["dim"])
    writer.add_feed_forward_length(about["hidden_dim"])
    writer.add_head_count(about["n_heads"])
    writer.add_head_count_kv(about["n_kv_heads"])
    writer.add_key_length(about["head_dim"])
    writer.add_value_length(about["head_dim"])
    writer.add_rope_dimension_count(about["head_dim"])
    writer.add_rope_freq_base(about["rope_theta"])
    writer.add_layer_norm_rms_eps(about["norm_eps"])
    writer.add_vocab_size(about["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    parts = {"attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
             "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
             "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
             "feed_forward.w3": "ffn_up"}
    whole = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output"}
    for name, weight in read_weights(folder).items():
        name = name.removesuffix(".weight")
        if name.startswith("layers."):
            _, i, part = name.split(".", 2)
            name = f"blk.{i}.{parts[part]}"
        else:
            name = whole[name]
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = llama_cpp.Llama(str(file), n_ctx=about["length"], n_threads=threads,
                            n_threads_batch=threads, verbose=False)

    def write(prompt: list[int], new: int) -> list[int]:
        model.reset()                     # else it would not read a prompt that it knows
        ids = []
        for token in model.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(token)
            if len(ids) == new:
                return ids
    return write, f"llama-cpp-python {llama_cpp.__version__}, float32"


def read_weights(folder: Path) -> dict:
    import numpy
    with numpy.load(folder / "weights.npz") as stored:
        return {name: stored[name] for name in stored}


WRITERS = {"litgpt": litgpt_writer, "llama.cpp": llama_cpp_writer}


def wait_for_turns(name: str, folder: Path, threads: int) -> None:
    """Answer each line of input, a prompt and a number, with ids and seconds."""
    write, about = WRITERS[name](folder, threads)
    print(json.dumps({"about": about}), flush=True)
    for line in sys.stdin:
        prompt, new = json.loads(line)
        begun = time.perf_counter()
        ids = write(prompt, new)
        print(json.dumps({"seconds": time.perf_counter() - begun, "ids": ids}), flush=True)


# ------------------------------------------------- here


class Guest:
    """A contestant in a process of its own."""

    def __init__(self, name: str, python: str, folder: Path, threads: int):
        self.process = subprocess.Popen(
            [python, __file__, "--serve", name, str(folder), str(threads)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder)
        self.about = self.answer()["about"]

    def answer(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise SystemExit(f"{self.process.args} ended without an answer")

    def __call__(self, prompt: list[int], new: int) -> dict:
        self.process.stdin.write(json.dumps([prompt, new]) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


def measure(name: str, pythons: dict[str, str], threads: int, rounds: int) -> dict:
    import numpy
    from benchmarks.inference import CONFIGS, gate, lively, some_ids

    from minimistral.engine import Engine
    from minimistral.generate import generate
    config, new = CONFIGS[name], NEW[name]
    if PROMPT + new > config.sliding_window:
        raise SystemExit("beyond the window they compute something else")
    model = lively(config)
    prompt = some_ids(config, PROMPT)
    shape = json.loads(config.to_json()) | {
        key: getattr(config, key) for key in (
            "dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size",
            "norm_eps", "rope_theta")} | {"length": 256 + new}
    engine = Engine(copy.deepcopy(model), progress=False)  # it moves weights; the plain page's stay

    def here(write):
        def run(prompt, new):
            begun = time.perf_counter()
            ids = write(prompt, new)
            return {"seconds": time.perf_counter() - begun, "ids": ids}
        return run

    ways = {"plain": here(lambda *a: generate(model, *a)), "engine": here(engine.generate)}
    with tempfile.TemporaryDirectory() as scratch:
        for guest, python in pythons.items():
            folder = Path(scratch) / guest
            folder.mkdir()
            (folder / "shape.json").write_text(json.dumps(shape))
            numpy.savez(folder / "weights.npz",
                        **{key: w.numpy() for key, w in model.state_dict().items()})
            ways[guest] = Guest(guest, python, folder, threads)
        texts = {way: run(prompt, new)["ids"] for way, run in ways.items()}
        agreed = gate(model, prompt, texts)
        seconds = {way: [] for way in ways}
        for turn in range(WARM_UP + rounds):
            for way, run in ways.items():
                found = run(prompt, new)["seconds"]
                if turn >= WARM_UP:
                    seconds[way].append(round(found, 6))
        about = {way: run.about for way, run in ways.items() if isinstance(run, Guest)}
        for run in ways.values():
            if isinstance(run, Guest):
                run.close()
    median = {way: round(new / statistics.median(s), 2) for way, s in seconds.items()}
    return {"what": f"{name}, float32: prompt {PROMPT}, {new} new tokens, below the window",
            "unit": "tokens/s", "gate": agreed, "guests": about, "seconds": seconds,
            "median": median, "times_faster": {
                way: round(median["engine"] / median[way], 3) for way in about}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--litgpt", metavar="PYTHON")
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    parser.add_argument("--only", nargs="+", choices=NEW, default=list(NEW))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    import torch

    from minimistral.devices import describe_device
    from minimistral.provenance import provenance
    torch.set_num_threads(chosen.threads)
    pythons = {name: python for name, python in
               (("litgpt", chosen.litgpt), ("llama.cpp", chosen.llama_cpp)) if python}
    if not pythons:
        parser.error("give --litgpt, --llama-cpp or both: the Python of their environment")
    for name in chosen.only:
        about = provenance(
            f"python benchmarks/others.py --only {name} --threads {chosen.threads} "
            + " ".join(f"--{guest.replace('.', '-')} PYTHON" for guest in pythons),
            warm_up_rounds=WARM_UP, **describe_device("cpu"))
        row = measure(name, pythons, chosen.threads, chosen.rounds) | {"provenance": about}
        found = json.loads(chosen.out.read_text(encoding="utf-8")) if chosen.out.exists() else {
            "what": "speed of writing beside litgpt and llama.cpp, with the same weights",
            "rows": {}}
        found["rows"][name] = row
        chosen.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8", newline="\n")
        print(name, row["median"], flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        wait_for_turns(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        main()
