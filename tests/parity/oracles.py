"""What the parity tests share: random configurations, unit-scale weights, and the
same model as a transformers class."""

import math
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from minimistral.checkpoint import hf_name, permute_rotary, rotary_heads
from minimistral.config import ModelConfig, MoEConfig
from minimistral.model import Transformer

TEXT = 40                       # tokens of a text
TOLERANCE = 2e-5                # of logits at unit scale, float32


def choose(generator, *values):
    return values[int(torch.randint(len(values), (), generator=generator))]


def random_config(seed: int) -> ModelConfig:
    """The seed's configuration. What must not be left to chance goes by turns: the
    window (none, 1, 2, odd, several windows per text, longer than the text), the key
    heads (one, as many as query heads, between), dense and mixture."""
    g = torch.Generator().manual_seed(seed)
    heads, kv_heads = [(4, 1), (4, 4), (4, 2), (6, 3), (6, 2)][seed % 5]
    head_dim = choose(g, 8, 12, 16)
    moe = [None, (4, 2), None, (8, 2), None, (3, 1), (4, 4)][seed % 7]
    return ModelConfig(
        dim=choose(g, 24, 32, 40), n_layers=choose(g, 2, 3), n_heads=heads,
        n_kv_heads=kv_heads, head_dim=head_dim, hidden_dim=choose(g, 40, 56, 64),
        vocab_size=choose(g, 61, 128, 200), norm_eps=choose(g, 1e-5, 1e-6),
        rope_theta=choose(g, 1e4, 1e6, 12345.0),
        sliding_window=[None, 1, 2, 7, 16, TEXT + 9][seed % 6],
        moe=MoEConfig(*moe) if moe else None)


def unit_scale(config: ModelConfig, seed: int) -> Transformer:
    """A model whose residual stream and logits have a scale of about 1, so that each
    part of it is felt in the logits, and whose norms are not all ones."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:
                weight.uniform_(0.5, 1.5)
            else:
                weight.normal_(std=1 / math.sqrt(weight.shape[1]))
        model.tok_embeddings.weight.normal_(
            std=1 / math.sqrt(config.dim) if config.tied_embeddings else 1)
    return model


def hf_config(config: ModelConfig):
    """transformers' configuration for the same model, spelt out by hand: nothing of the
    library's own conversion is used."""
    from transformers import MinistralConfig, MistralConfig, MixtralConfig
    values = dict(
        hidden_size=config.dim, num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, intermediate_size=config.hidden_dim,
        vocab_size=config.vocab_size, rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        sliding_window=config.sliding_window, pad_token_id=None, eos_token_id=None,
        tie_word_embeddings=config.tied_embeddings)
    if config.moe:
        return MixtralConfig(num_local_experts=config.moe.num_experts,
                             num_experts_per_tok=config.moe.num_experts_per_tok, **values)
    if isinstance(config.sliding_window, tuple):
        windows = [config.window(layer) for layer in range(config.n_layers)]
        values["sliding_window"] = max(w for w in windows if w)
        return MinistralConfig(layer_types=["sliding_attention" if w else "full_attention"
                                            for w in windows], **values)
    return MistralConfig(**values)


def as_hf(model: Transformer):
    """The same weights in transformers' class, in memory."""
    from transformers import AutoModelForCausalLM
    oracle = AutoModelForCausalLM.from_config(
        hf_config(model.config), attn_implementation="eager").eval()
    weights = {}
    for name, weight in model.state_dict().items():
        if heads := rotary_heads(name, model.config):
            weight = permute_rotary(weight, heads)
        weights[hf_name(name)] = weight
    if model.config.tied_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if moe := model.config.moe:                  # transformers 5 packs experts in memory
        for i in range(model.config.n_layers):
            old, new = f"model.layers.{i}.block_sparse_moe", f"model.layers.{i}.mlp"
            weights[f"{new}.gate.weight"] = weights.pop(f"{old}.gate.weight")
            take = [[weights.pop(f"{old}.experts.{e}.{w}.weight")
                     for w in ("w1", "w3", "w2")] for e in range(moe.num_experts)]
            weights[f"{new}.experts.gate_up_proj"] = torch.stack(
                [torch.cat((w1, w3)) for w1, w3, _ in take])
            weights[f"{new}.experts.down_proj"] = torch.stack([w2 for _, _, w2 in take])
    oracle.load_state_dict(weights)
    return oracle
