"""Our folders and logits against Mistral's own code, on the CPU in float32, where the
package mistral-inference is installed (it is not among the test requirements).

Its attention kernel has no CPU version, so that one function is replaced by the formula;
the masks, caches, positions and weights stay its own. It is always given a cache:
without one it attends in both directions.
"""

import pytest
import torch

pytest.importorskip("mistral_inference")

import mistral_inference.transformer_layers as reference_layers         # noqa: E402
from mistral_inference.cache import BufferCache                         # noqa: E402
from mistral_inference.transformer import Transformer as Reference      # noqa: E402
from oracles import TEXT, TOLERANCE, random_config, unit_scale          # noqa: E402

from minimistral.cache import KVCache                                   # noqa: E402
from minimistral.checkpoint import save_model                           # noqa: E402
from minimistral.config import ModelConfig, MoEConfig                   # noqa: E402

PATTERN = ModelConfig(dim=32, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=12,
                      hidden_dim=56, vocab_size=128, rope_theta=12345.0,
                      sliding_window=(None, 7))
CONFIGS = [random_config(seed) for seed in range(24)] + [PATTERN]


def formula(q, k, v, bias=None):
    """Attention on [1, S, H, D] with xformers' own mask, written out."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if bias is not None:
        scores = scores + bias.materialize(scores.shape[-2:], dtype=scores.dtype)
    return (torch.softmax(scores.float(), -1).to(v.dtype) @ v).transpose(1, 2).contiguous()


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    monkeypatch.setattr(reference_layers, "memory_efficient_attention", formula)


def reference(model, folder):
    """Mistral's model, loaded by Mistral's code from a folder that we wrote, and a
    function that feeds it chunks of unequal texts with its own rolling cache."""
    save_model(model, folder)
    oracle = Reference.from_folder(folder, max_batch_size=3, device="cpu",
                                   dtype=torch.float32).eval()
    args = oracle.args
    cache = BufferCache(args.n_layers, 3, 3 * TEXT, args.n_kv_heads, args.head_dim,
                        args.sliding_window).to("cpu", torch.float32)
    for buffer in (*cache.cache_k.values(), *cache.cache_v.values()):
        buffer.zero_()          # its kernel never reads empty slots; the formula times 0
    return lambda rows: oracle(torch.cat(rows), [len(row) for row in rows], cache)


@torch.no_grad()
@pytest.mark.parametrize("number", range(len(CONFIGS)))
def test_logits_of_folders_that_we_write(tmp_path, number, record_property):
    config = CONFIGS[number]
    model = unit_scale(config, number)
    ids = torch.randint(config.vocab_size, (2, TEXT),
                        generator=torch.Generator().manual_seed(number))
    whole = model(ids)
    assert 0.5 < whole.std() < 2
    for name, sizes in [("at once", [TEXT]), ("chunks", [13, 5, 13, 9]),
                        ("prompt, then tokens", [25] + [1] * (TEXT - 25))]:
        ask = reference(model, tmp_path)
        theirs = torch.cat([ask(list(chunk)).view(2, -1, config.vocab_size)
                            for chunk in ids.split(sizes, dim=1)], dim=1)
        difference = (whole - theirs).abs().max().item()
        record_property(name, difference)
        assert difference < TOLERANCE, name


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIGS[4], CONFIGS[8], CONFIGS[3], PATTERN])
def test_unequal_texts_with_both_caches(tmp_path, config):
    model = unit_scale(config, 0)
    ids = torch.randint(config.vocab_size, (3, TEXT),
                        generator=torch.Generator().manual_seed(0))
    lengths = [TEXT - 5, 9, 1]
    positions = torch.full((3, TEXT - 5), -1)
    for row, n in enumerate(lengths):
        positions[row, :n] = torch.arange(n)
    ask = reference(model, tmp_path)
    cache = KVCache(config, batch_size=3)
    theirs = ask([ids[row, :n] for row, n in enumerate(lengths)])
    ours = model(ids[:, :TEXT - 5], cache, positions)
    ours = torch.cat([ours[row, :n] for row, n in enumerate(lengths)])
    assert (ours - theirs).abs().max() < TOLERANCE
    for step in range(5):
        new = ids[:, TEXT - 5 + step]
        theirs = ask(list(new[:, None]))
        assert (model(new[:, None], cache)[:, 0] - theirs).abs().max() < TOLERANCE


def test_the_mixtures_are_among_them():
    assert any(config.moe for config in CONFIGS)
    assert MoEConfig(4, 4) in [config.moe for config in CONFIGS]
