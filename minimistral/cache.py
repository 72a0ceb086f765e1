"""The key/value cache: what attention has computed once, it keeps.

A layer with a window keeps the last W positions only, in a ring: position p lives
in slot p mod W. The buffer keeps each key's position beside it, so that nothing
depends on the order of the slots (Mistral 7B, section 2, "rolling buffer cache").
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_SLOTS = 64                        # of a cache that grows by doubling


class LayerCache:
    """Keys, values and positions of one layer: (B, S, K, D), (B, S, K, D), (B, S).
    An empty slot holds zeros and position -1."""

    def __init__(self, shape: tuple[int, int, int, int], ring: bool, device, dtype):
        self.ring = ring
        self.used = shape[1]                    # slots that may hold something
        self.row = torch.arange(shape[0], device=device)[:, None]           # (B, 1)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.full(shape[:2], -1, device=device)

    def update(self, k: Tensor, v: Tensor, positions: Tensor
               ) -> tuple[Tensor, Tensor, Tensor]:
        """Store a chunk and return all keys, values and positions that its queries
        may need: k, v (B, T, K, D), positions (B, T) -> (B, S', K, D) twice
        and (B, S').

        Into a ring, a chunk of several tokens is written after it is read: its
        first queries still need keys that its last tokens overwrite.
        """
        n = self.used
        if self.ring and positions.shape[1] > 1:
            before = self.keys[:, :n], self.values[:, :n], self.positions[:, :n]
            seen = tuple(torch.cat(pair, dim=1)
                         for pair in zip(before, (k, v, positions)))
            self.write(k, v, positions)
            return seen
        self.write(k, v, positions)
        return self.keys[:, :n], self.values[:, :n], self.positions[:, :n]

    def write(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Put each real token into slot position mod S; of a chunk longer than the
        buffer only the last S. Padding (position -1) is never written."""
        slots = self.keys.shape[1]
        row, slot = self.row, positions % slots
        if positions.shape[1] > 1 or positions.min() < 0:       # else all are kept
            newest = positions.amax(dim=1, keepdim=True)
            keep = (positions >= 0) & (positions > newest - slots)
            row, col = torch.where(keep)
            k, v, positions, slot = (x[row, col] for x in (k, v, positions, slot))
        self.keys[row, slot] = k.detach().to(self.keys.dtype)
        self.values[row, slot] = v.detach().to(self.values.dtype)
        self.positions[row, slot] = positions

    def make_room(self, end: int) -> None:
        """Prepare for positions below `end`: a ring rolls, another buffer grows."""
        slots = self.keys.shape[1]
        if slots < end and not self.ring:
            self.grow(max(2 * slots, end))
        self.used = min(end, self.keys.shape[1])

    def grow(self, slots: int) -> None:
        """Lengthen the buffer to this many slots, the contents kept."""
        more = slots - self.keys.shape[1]
        self.keys, self.values = (
            F.pad(kept, (0, 0, 0, 0, 0, more)) for kept in (self.keys, self.values))
        self.positions = F.pad(self.positions, (0, more), value=-1)


class KVCache:
    """The caches of all layers, and how many tokens each row of the batch has seen.

    A layer with a window holds min(W, max_length) positions and never grows; one
    without holds max_length, or doubles as needed when that is None.

    .layers  one LayerCache per layer
    .length  int64 (B,): tokens seen per row, which is the next token's position
    .nbytes  bytes of keys and values held now
    """

    def __init__(self, config, batch_size: int = 1, max_length: int | None = None,
                 device=None, dtype=None):
        for name, value in [("batch_size", batch_size), ("max_length", max_length)]:
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.max_length = max_length
        self.limit = None                      # positions that fit, None: no limit
        self.end = 0                           # no position seen so far reaches it
        self.length = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.layers = []
        for layer in range(config.n_layers):
            window = config.window(layer)
            slots = min(filter(None, (window, max_length)), default=FIRST_SLOTS)
            if max_length is not None and slots != window:
                self.limit = max_length            # this layer can't roll beyond it
            shape = (batch_size, slots, config.n_kv_heads, config.head_dim)
            self.layers.append(LayerCache(shape, window is not None, device, dtype))

    @property
    def nbytes(self) -> int:
        return sum(c.keys.nbytes + c.values.nbytes for c in self.layers)

    def reset(self) -> None:
        """Forget everything; the memory is kept."""
        self.end = 0
        self.length.zero_()
        for layer in self.layers:
            layer.keys.zero_()
            layer.values.zero_()
            layer.positions.fill_(-1)

    def make_room(self, end: int) -> None:
        """Prepare for positions below `end`. Raises ValueError, with nothing
        changed, if a cache without a window is too short for them."""
        if self.limit is not None and end > self.limit:
            raise ValueError(
                f"the text reaches position {end - 1}, but the cache ends at "
                f"max_length={self.limit} and has no window to roll: make "
                f"max_length larger, or None to let it grow")
        self.end = max(self.end, end)
        for layer in self.layers:
            layer.make_room(self.end)

    def advance(self, positions: Tensor) -> None:
        """Count the real tokens of a chunk that every layer has stored: (B, T)."""
        self.length += (positions >= 0).sum(dim=1)
