"""Checkpoints in and out: two layouts, old ones, and everything that can be wrong."""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minimistral import checkpoint, shipped
from minimistral.checkpoint import (
    HF_NAMES, hf_name, load_model, permute_rotary, save_model, unpermute_rotary)
from minimistral.config import ModelConfig, MoEConfig
from minimistral.lora import add_lora, save_adapter
from minimistral.model import Transformer
from minimistral.quantize import quantize_model
from minimistral.quantize_files import save_quantized
from minimistral.train import TrainConfig, train

DENSE = ModelConfig(dim=24, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=8,
                    hidden_dim=40, vocab_size=61, rope_theta=123456.0)
MIXTURE = replace(DENSE, moe=MoEConfig(4, 2), sliding_window=5)
KINDS = {
    "dense": DENSE,
    "window": replace(DENSE, sliding_window=6),
    "pattern": replace(DENSE, sliding_window=(None, 6)),
    "mixture": MIXTURE,
    "tied": replace(DENSE, tied_embeddings=True),
}


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    return Transformer(config).to(dtype)


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    """A dense model in Mistral's layout, to be damaged."""
    save_model(make(DENSE), tmp_path / "model")
    return tmp_path / "model"


def edit(folder, change):
    """Apply `change` to the dictionary of weights in a folder."""
    file = folder / "consolidated.safetensors"
    weights = load_file(file)
    change(weights)
    file.unlink()
    save_file(weights, file)


# ------------------------------------------------------------ names and order


def test_names_of_the_two_layouts_are_one_to_one():
    assert len(set(HF_NAMES.values())) == len(HF_NAMES)
    assert hf_name("layers.3.attention.wq.weight") == (
        "model.layers.3.self_attn.q_proj.weight")
    assert hf_name("layers.11.feed_forward.experts.7.w2.weight") == (
        "model.layers.11.block_sparse_moe.experts.7.w2.weight")
    for config in KINDS.values():
        names = list(Transformer(config).state_dict())
        assert len({hf_name(name) for name in names}) == len(names)


def test_permutation_takes_even_rows_first_and_is_undone():
    weight = torch.arange(16)[:, None] * torch.ones(1, 3)
    moved = permute_rotary(weight, n_heads=2)
    assert moved[:, 0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]
    assert torch.equal(unpermute_rotary(moved, n_heads=2), weight)


# ------------------------------------------------------------ round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["mistral", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_equal(tmp_path, kind, layout, dtype):
    model = make(KINDS[kind], dtype)
    save_model(model, tmp_path / "m", layout=layout)
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert same_weights(loaded, model)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_mistral_folder_has_the_published_names_and_shapes(tmp_path):
    save_model(make(MIXTURE), tmp_path / "m")
    stored = {name: tuple(w.shape) for name, w in
              load_file(tmp_path / "m" / "consolidated.safetensors").items()}
    wanted = {"tok_embeddings.weight": (61, 24), "norm.weight": (24,),
              "output.weight": (61, 24)}
    for i in range(4):
        wanted |= {f"layers.{i}.attention_norm.weight": (24,),
                   f"layers.{i}.ffn_norm.weight": (24,),
                   f"layers.{i}.attention.wq.weight": (32, 24),
                   f"layers.{i}.attention.wk.weight": (16, 24),
                   f"layers.{i}.attention.wv.weight": (16, 24),
                   f"layers.{i}.attention.wo.weight": (24, 32),
                   f"layers.{i}.feed_forward.gate.weight": (4, 24)}
        for e in range(4):
            expert = f"layers.{i}.feed_forward.experts.{e}"
            wanted |= {f"{expert}.w1.weight": (40, 24), f"{expert}.w2.weight": (24, 40),
                       f"{expert}.w3.weight": (40, 24)}
    assert stored == wanted
    params = json.loads((tmp_path / "m" / "params.json").read_text(encoding="utf-8"))
    assert params["moe"] == {"num_experts": 4, "num_experts_per_tok": 2}
    assert params["sliding_window"] == 5


def test_dtype_and_device_are_as_asked(tmp_path):
    save_model(make(DENSE, torch.bfloat16), tmp_path / "m")
    wide = load_model(tmp_path / "m", dtype=torch.float32, device="cpu")
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert same_weights(wide.to(torch.bfloat16), load_model(tmp_path / "m"))
    assert load_model(tmp_path / "m", device="meta").device.type == "meta"
    with pytest.raises(ValueError, match="torch.int8"):
        load_model(tmp_path / "m", dtype=torch.int8)


def test_shipped_names(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    monkeypatch.setattr(shipped, "SHIPPED", tmp_path)
    save_model(make(DENSE, torch.bfloat16), tmp_path / "tiny-tales")
    assert load_model("tiny-tales").norm.weight.dtype == torch.float32
    kept = load_model("tiny-tales", dtype=torch.bfloat16)
    assert kept.norm.weight.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="mistral-7b-v0.1.*tiny-tales.*downloaded"):
        load_model("mistral-7b-v0.1")


def test_training_a_loaded_model_leaves_its_file_alone(saved):
    before = files(saved)
    model = load_model(saved)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert files(saved) == before
    assert not same_weights(load_model(saved), model)


# ------------------------------------------------------------ other folders


def split(weights, n):
    names = sorted(weights)
    return [{name: weights[name] for name in names[i::n]} for i in range(n)]


@pytest.mark.parametrize("with_index", [True, False])
def test_sharded_mistral_folder(saved, with_index):
    whole = load_model(saved)
    weights = load_file(saved / "consolidated.safetensors")
    (saved / "consolidated.safetensors").unlink()
    index = {}
    for i, part in enumerate(split(weights, 3), start=1):
        name = f"consolidated-{i:05}-of-00003.safetensors"
        save_file(part, saved / name)
        index |= dict.fromkeys(part, name)
    index_file = saved / "consolidated.safetensors.index.json"
    if with_index:
        index_file.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert same_weights(load_model(saved), whole)
    (saved / "consolidated-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="00002.*missing" if with_index else "2 of 3"):
        load_model(saved)
    if with_index:
        outside = index_file.read_text(encoding="utf-8").replace(
            "consolidated-00002", "../consolidated-00002")
        index_file.write_text(outside, encoding="utf-8")
        with pytest.raises(ValueError, match="not beside it"):
            load_model(saved)


@pytest.mark.parametrize("suffix, count", [("pth", 1), ("pt", 2)])
@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_folders(saved, suffix, count, zipped):
    whole = load_model(saved)
    weights = load_file(saved / "consolidated.safetensors")
    (saved / "consolidated.safetensors").unlink()
    for i, part in enumerate(split(weights, count)):
        torch.save(part, saved / f"consolidated.{i:02}.{suffix}",
                   _use_new_zipfile_serialization=zipped)
    assert same_weights(load_model(saved), whole)


def test_first_mixtral_with_stacked_experts(tmp_path):
    model = make(MIXTURE)
    weights = model.state_dict()
    for i in range(4):
        moe, old = f"layers.{i}.feed_forward", f"layers.{i}.block_sparse_moe"
        weights[f"{old}.gate.weight"] = weights.pop(f"{moe}.gate.weight")
        for matrix in ("w1", "w2", "w3"):
            parts = [weights.pop(f"{moe}.experts.{e}.{matrix}.weight") for e in range(4)]
            parts = [part.T for part in parts] if matrix == "w2" else parts
            weights[f"{old}.{matrix}"] = torch.cat(parts)             # (E * hidden, dim)
    for i, part in enumerate(split(weights, 8)):
        torch.save(part, tmp_path / f"consolidated.{i:02}.pt")
    MIXTURE.to_json(tmp_path / "params.json")
    assert same_weights(load_model(tmp_path), model)


def test_a_folder_of_both_layouts_is_read_once(tmp_path):
    save_model(make(DENSE), tmp_path)
    save_model(make(MIXTURE), tmp_path, layout="hf")
    assert load_model(tmp_path).config == DENSE
    (tmp_path / "consolidated.safetensors").unlink()        # params.json alone is left
    assert load_model(tmp_path).config == MIXTURE


# ------------------------------------------------------------ config.json


def hf_folder(tmp_path, config=DENSE, **changes):
    save_model(make(config), tmp_path, layout="hf")
    file = tmp_path / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    values = {name: value for name, value in values.items() if value != "gone"}
    file.write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_both_spellings_of_rope_theta(tmp_path):
    old = hf_folder(tmp_path / "old", rope_parameters="gone")
    new = hf_folder(tmp_path / "new", rope_theta="gone")
    assert load_model(old).config == load_model(new).config == DENSE


def test_what_config_json_leaves_out_is_what_transformers_assumes(tmp_path):
    silent = hf_folder(tmp_path, rope_parameters="gone", rope_theta="gone",
                       rms_norm_eps="gone", sliding_window="gone", head_dim=None)
    with pytest.raises(ValueError, match=r"shape \(32, 24\).*\(24, 24\)"):
        load_model(silent)                                    # head_dim = 24 / 4
    hf_folder(tmp_path, rope_parameters="gone", rope_theta="gone",
              rms_norm_eps="gone", sliding_window="gone")
    config = load_model(silent).config
    assert (config.norm_eps, config.rope_theta, config.sliding_window) == (1e-6, 1e4, 4096)


@pytest.mark.parametrize("changes, match", [
    ({"model_type": "llama"}, "'llama' is not built"),
    ({"model_type": "mistral3"}, "'mistral3' is not built"),
    ({"hidden_act": "gelu"}, "gelu"),
    ({"quantization_config": {"bits": 4}}, "unquantized"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4}}, "yarn"),
    ({"rope_parameters": "gone", "rope_scaling": {"type": "linear", "factor": 2}}, "linear"),
    ({"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 4},
     "ministral"),
    ({"layer_types": ["chunked_attention"] * 4}, "chunked"),
    ({"hidden_size": "gone"}, "lacks 'hidden_size'"),
    ({"num_attention_heads": 0}, "config.json"),
    ({"hidden_size": "wide"}, "config.json"),
    ({"num_hidden_layers": 10**9}, "parameters"),
])
def test_config_json_that_is_not_built_or_wrong(tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        load_model(hf_folder(tmp_path, **changes))


@pytest.mark.parametrize("config, match", [
    (replace(MIXTURE, sliding_window=(None, 4)), "no class for a mixture"),
    (replace(DENSE, sliding_window=(3, 4)), r"windows of 2 sizes, \[3, 4\]"),
])
def test_hf_layout_refuses_what_transformers_cannot_be(tmp_path, config, match):
    with pytest.raises(ValueError, match=match):
        save_model(make(config), tmp_path / "m", layout="hf")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------ damaged and hostile


def test_wrong_names_of_folders(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no model.*params.json"):
        load_model(tmp_path)
    (tmp_path / "params.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds no model.*\['params.json'\]"):
        load_model(tmp_path)


@pytest.mark.parametrize("params, match", [
    ("{", "not JSON"),
    ("[]", "not a JSON object"),
    ({"n_heads": 3}, "params.json: n_heads=3 is not a multiple"),
    ({"yarn": {"factor": 4}}, "params.json.*yarn"),
    ({"n_layers": 5}, "lacks tensor 'layers.4.attention_norm.weight'"),
    ({"n_layers": 3}, "consolidated.safetensors: tensor 'layers.3"),
    ({"hidden_dim": 48}, r"w1.weight' has shape \(40, 24\).*\(48, 24\)"),
    ({"vocab_size": 62}, r"tok_embeddings.weight' has shape \(61, 24\).*\(62, 24\)"),
    ({"n_layers": 10**9}, "params.json describes a model of"),
    ({"dim": 10**30}, "params.json describes a model of"),
    ({"dim": "wide"}, "params.json"),
    ({"moe": 4}, "params.json"),
    ({"moe": {"num_experts": 10**12, "num_experts_per_tok": 2}}, "params.json describes"),
    ({"tied_embeddings": True}, "'output.weight' has no place"),
])
def test_params_that_do_not_fit(saved, params, match):
    file = saved / "params.json"
    if isinstance(params, dict):
        params = json.dumps(json.loads(file.read_text(encoding="utf-8")) | params)
    file.write_text(params, encoding="utf-8")
    with pytest.raises(ValueError, match=match):
        load_model(saved)


def nan_in(name):
    def change(weights):
        weights[name].view(-1)[-1] = float("nan")
    return change


@pytest.mark.parametrize("change, match", [
    (lambda w: w.pop("layers.2.ffn_norm.weight"), "lacks tensor 'layers.2.ffn_norm.weight'"),
    (lambda w: w.update(extra=torch.ones(2)), "tensor 'extra' has no place"),
    (lambda w: w.update({"norm.weight": torch.ones(25)}), r"'norm.weight' has shape \(25,\)"),
    (lambda w: w.update({"norm.weight": torch.ones(24, dtype=torch.int8)}),
     "'norm.weight' is stored as I8.*quantized"),
    (lambda w: w.update({"output.weight": w["output.weight"].to(torch.float8_e4m3fn)}),
     "'output.weight' is stored as F8_E4M3"),
    (nan_in("layers.1.attention.wq.weight"), "'layers.1.attention.wq.weight' holds NaN"),
    (lambda w: w["norm.weight"].fill_(float("inf")), "'norm.weight' holds NaN or infinity"),
])
def test_weights_that_do_not_fit(saved, change, match):
    edit(saved, change)
    with pytest.raises(ValueError, match=match) as error:
        load_model(saved)
    assert str(saved) in str(error.value)


@pytest.mark.parametrize("keep", [0, 5, 100, 3000, -1])
def test_truncated_safetensors(saved, keep):
    file = saved / "consolidated.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="consolidated.safetensors is damaged or cut short"):
        load_model(saved)


def test_corrupted_header(saved):
    file = saved / "consolidated.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = (1 << 60).to_bytes(8, "little")                # a header of an exabyte
    file.write_bytes(content)
    with pytest.raises(ValueError, match="consolidated.safetensors is damaged"):
        load_model(saved)


class Hostile:
    """Unpickling this creates the file `trace`."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickle_is_refused_and_not_run(saved, tmp_path, zipped):
    trace = tmp_path / "executed"
    weights = load_file(saved / "consolidated.safetensors")
    (saved / "consolidated.safetensors").unlink()
    file = saved / "consolidated.00.pth"
    torch.save(weights | {"norm.weight": Hostile(str(trace))}, file,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="consolidated.00.pth.*nothing in it was run"):
        load_model(saved)
    assert not trace.exists()
    torch.load(file, weights_only=False)                  # the charge was a live one
    assert trace.exists()


@pytest.mark.parametrize("content, match", [
    (b"", "consolidated.00.pth is damaged"),
    (b"PK\x03\x04 not a zip", "consolidated.00.pth is damaged"),
    ([1, 2], "holds a list"),
    ({"model": {"norm.weight": torch.ones(24)}}, "'model' is a dict.*training"),
    ({"norm.weight": torch.ones(24).to_sparse()}, "not a plain tensor"),
    ({"norm.weight": torch.ones(24, dtype=torch.int64)}, "int64"),
])
def test_pickles_that_hold_something_else(saved, content, match):
    (saved / "consolidated.safetensors").unlink()
    file = saved / "consolidated.00.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=match):
        load_model(saved)


# ------------------------------------------------------------ whole or not at all


def test_saving_again_replaces_and_keeps_other_files(tmp_path):
    (tmp_path / "tekken.json").write_text("mine", encoding="utf-8")
    save_model(make(DENSE), tmp_path, layout="hf", max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert same_weights(load_model(tmp_path), make(DENSE))
    save_model(make(MIXTURE), tmp_path, layout="hf")
    assert sorted(files(tmp_path)) == ["config.json", "model.safetensors", "tekken.json"]
    assert same_weights(load_model(tmp_path), make(MIXTURE))
    save_model(make(DENSE), tmp_path, layout="hf", max_shard_bytes=40000)
    assert same_weights(load_model(tmp_path), make(DENSE))


def test_shards_keep_to_their_size(tmp_path):
    save_model(make(MIXTURE), tmp_path, layout="hf", max_shard_bytes=9000)
    sizes = [sum(w.nbytes for w in load_file(file).values())
             for file in tmp_path.glob("*.safetensors")]
    assert max(sizes) <= 9000 and len(sizes) > 5
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text("utf-8"))
    assert index["metadata"]["total_size"] == sum(sizes)


def test_nothing_is_saved_of_a_broken_model(saved):
    before = files(saved)
    model = make(DENSE)
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="'layers.1.attention.wo.weight' holds NaN"):
        save_model(model, saved)
    with pytest.raises(ValueError, match="layout='onnx'"):
        save_model(make(DENSE), saved, layout="onnx")
    (saved.parent / "taken").write_text("a file", encoding="utf-8")
    with pytest.raises(ValueError, match="taken is a file"):
        save_model(make(DENSE), saved.parent / "taken")
    assert files(saved) == before
    assert sorted(path.name for path in saved.parent.iterdir()) == ["model", "taken"]


@pytest.mark.skipif(sys.platform == "win32", reason="no modes there")
def test_files_of_weights_may_be_read_like_others(tmp_path):
    """safetensors by itself writes for the owner alone."""
    model, before = make(DENSE), os.umask(0o022)
    try:
        save_model(model, tmp_path / "mistral")
        save_model(model, tmp_path / "hf", layout="hf", max_shard_bytes=20_000)
        save_quantized(quantize_model(model, 8), tmp_path / "quantized")
        save_adapter(add_lora(make(DENSE), 2), tmp_path / "adapter")
        train(make(DENSE), torch.arange(60), TrainConfig(
            steps=1, batch_size=1, seq_len=8, warmup_steps=0, folder=str(tmp_path / "run")), progress=False)
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.glob("*/*")}
    assert len(modes) > 8 and set(modes.values()) == {"0o644"}, modes


def test_a_configuration_is_written_whole_or_not_at_all(saved, monkeypatch):
    def fail(_):
        raise OSError("no space left")

    before = files(saved)
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        MIXTURE.to_json(saved / "params.json")
    assert files(saved) == before


@pytest.fixture
def full_disk():
    """No file may grow beyond 20,000 bytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_full_disk_leaves_the_old_files(saved, tmp_path, full_disk, layout):
    before = files(saved)
    large = make(replace(DENSE, hidden_dim=400))
    for folder in (saved, tmp_path / "new"):
        with pytest.raises(OSError, match=f"{folder.name} was not saved.*untouched"):
            save_model(large, folder, layout=layout)
    assert files(saved) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ------------------------------------------------------------ memory and time


def test_loading_imports_no_compiler(saved):
    """Drawing weights on the meta device would cost seconds of imports."""
    code = ("import sys; from minimistral.checkpoint import load_model; "
            "load_model(sys.argv[1]); "
            "print('sympy' in sys.modules)")
    told = subprocess.run([sys.executable, "-c", code, saved], capture_output=True, text=True)
    assert told.stdout.split()[-1] == "False", told.stderr



def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(re.search(key + r":\s+(\d+)", status)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("layout, dtype", [("mistral", torch.bfloat16),
                                           ("hf", torch.float32)])
def test_peak_of_memory_is_the_model_and_one_tensor(tmp_path, layout, dtype):
    config = ModelConfig(dim=1024, n_layers=4, n_heads=8, n_kv_heads=8, head_dim=128,
                         hidden_dim=2048, vocab_size=1024)
    with torch.device("meta"):
        model = Transformer(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.5)
    save_model(model, tmp_path, layout=layout)
    del model
    ctypes.CDLL(None).malloc_trim(0)       # else freed memory is used again, and not counted
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")    # forget the peak
    before = memory("VmRSS")
    model = load_model(tmp_path, dtype=dtype)
    peak = memory("VmHWM") - before
    size = sum(parameter.nbytes for parameter in model.parameters())
    largest = max(parameter.nbytes for parameter in model.parameters())
    # Beside the tensor being read there may be its converted copy; 8 MB are the
    # allocator's own.
    assert 0.9 * size < peak < size + 2 * largest + 8e6
