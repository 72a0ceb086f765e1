"""Writing: read the prompt into the cache, then add one token at a time."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from minimistral.cache import KVCache
from minimistral.fast_model import AllCores
from minimistral.model import Transformer, check_ids
from minimistral.sampling import check_sampling, draw, next_distribution


def generate(model: Transformer, prompt_ids, max_new_tokens: int, *,
             temperature: float = 0.0, top_k: int | None = None,
             top_p: float | None = None, seed: int | None = None,
             stop_ids: Sequence[int] = (), prefill_chunk: int | None = None):
    """Continue a prompt, or a list of prompts at once.

    prompt_ids     token ids, or a list of such lists (of any lengths)
    temperature    0 takes the likeliest token; above 0 tokens are drawn
    top_k, top_p   draw from the likeliest tokens only (see sampling.py)
    seed           row i of a batch draws with seed + i, as it would alone
    stop_ids       a row ends when one of these is chosen
    prefill_chunk  read the prompt in pieces of this many tokens, to save memory
    Returns the new ids, the stop id not included; a list of lists for a list of
    prompts.
    """
    prompts, alone = as_prompts(prompt_ids)
    rows: list[list[int]] = [[] for _ in prompts]
    for chosen in decode(model, prompts, max_new_tokens, temperature, top_k, top_p,
                         seed, stop_ids, prefill_chunk):
        for row, token in zip(rows, chosen):
            if token is not None:
                row.append(token)
    return rows[0] if alone else rows


def stream(model: Transformer, prompt_ids, max_new_tokens: int, *,
           temperature: float = 0.0, top_k: int | None = None,
           top_p: float | None = None, seed: int | None = None,
           stop_ids: Sequence[int] = (), prefill_chunk: int | None = None
           ) -> Iterator[int]:
    """The same as `generate` for one prompt, each id as soon as it is chosen."""
    prompts, alone = as_prompts(prompt_ids)
    if not alone:
        raise ValueError(f"stream continues one prompt, not {len(prompts)}: "
                         f"use generate for a list of prompts")
    for (token,) in decode(model, prompts, max_new_tokens, temperature, top_k,
                           top_p, seed, stop_ids, prefill_chunk):
        if token is not None:
            yield token


def decode(model, prompts: list[list[int]], max_new_tokens: int, temperature: float,
           top_k, top_p, seed, stop_ids, prefill_chunk
           ) -> Iterator[list[int | None]]:
    """Choose a token for every row, step by step; None for a row that has ended."""
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be None or 1 up")
    generators = [row_generator(seed, row) for row in range(len(prompts))]
    cache = KVCache(model.config, len(prompts), device=model.device,
                    dtype=model.tok_embeddings.weight.dtype)
    shared = AllCores(model)                                         # chapter 11
    logits = read_prompts(model, prompts, cache, prefill_chunk)          # (B, V)
    ended = [False] * len(prompts)
    for step in range(max_new_tokens):
        tokens = choose(logits, temperature, top_k, top_p, generators)   # (B,)
        chosen = tokens.tolist()
        ended = [e or token in stop_ids for e, token in zip(ended, chosen)]
        yield [None if e else token for e, token in zip(ended, chosen)]
        if all(ended) or step == max_new_tokens - 1:
            return
        positions = None
        if any(ended):       # their rows become padding: position -1, never written
            over = torch.tensor(ended, device=model.device)
            positions = cache.length.masked_fill(over, -1)[:, None]
        with torch.inference_mode(), shared:                         # chapter 11
            ids = tokens.to(model.device)[:, None]                       # (B, 1)
            logits = model(ids, cache, positions)[:, -1]                 # (B, V)


@torch.no_grad()
def read_prompts(model, prompts: list[list[int]], cache: KVCache,
                 chunk: int | None = None) -> Tensor:
    """Run all prompts through the model, `chunk` tokens at a time, filling the
    cache. Shorter prompts are padded on the right with position -1.

    Returns the logits after each prompt's last token, (B, V).
    """
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    positions = torch.full((len(prompts), longest), -1)
    for row, prompt in enumerate(prompts):
        ids[row, :len(prompt)] = torch.tensor(prompt)
        positions[row, :len(prompt)] = torch.arange(len(prompt))
    check_ids(ids, model.config.vocab_size)
    last = torch.zeros(len(prompts), model.config.dim, device=model.device,
                       dtype=model.tok_embeddings.weight.dtype)
    for start in range(0, longest, chunk or longest):
        part = slice(start, start + (chunk or longest))
        x = model.features(ids[:, part].to(model.device), cache,
                           positions[:, part].to(model.device))        # (B, t, dim)
        row, = torch.where((lengths > part.start) & (lengths <= part.stop))
        last[row] = x[row, lengths[row] - 1 - start]
    return model.logits(last)


def choose(logits: Tensor, temperature: float, top_k, top_p, generators) -> Tensor:
    """The next token of each row, (B, V) -> int64 (B,), on the CPU, so that a seed
    gives the same draws on every device."""
    logits = logits.float().cpu()
    if logits.isnan().any():
        raise ValueError("the model's logits are NaN: its weights hold NaN or are "
                         "too large for their dtype; load it anew, or in float32")
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = next_distribution(logits, temperature, top_k, top_p)
    uniforms = torch.stack([torch.rand((), generator=g) for g in generators])
    return draw(probabilities, uniforms)


def row_generator(seed: int | None, row: int) -> torch.Generator | None:
    """The source of chance of one row; None is torch's own, global one."""
    return None if seed is None else torch.Generator().manual_seed(seed + row)


def as_prompts(prompt_ids) -> tuple[list[list[int]], bool]:
    """A list of prompts, and whether there was only one, given by itself."""
    if isinstance(prompt_ids, Tensor):
        prompt_ids = prompt_ids.tolist()
    if isinstance(prompt_ids, str):
        raise ValueError("prompt_ids must be token ids, not text: encode it first")
    prompt_ids = list(prompt_ids)
    alone = not prompt_ids or not isinstance(prompt_ids[0], list | tuple)
    prompts = [prompt_ids] if alone else [list(p) for p in prompt_ids]
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {row} is empty: a text begins with <s>, so "
                             f"give at least [tokenizer.bos_id]")
    return prompts, alone
