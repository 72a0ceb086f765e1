"""Where a model runs: which device, which numbers, and whether to trust them."""

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pick_device(device=None) -> torch.device:
    """The device asked for, or else the fastest that is there: an NVIDIA GPU, an
    Apple GPU that passes `gives_the_same_as_the_cpu`, the CPU.

    Raises ValueError for a device that this machine or this PyTorch lacks.
    """
    apple = torch.backends.mps.is_available()
    if device in (None, "auto"):
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        if apple and gives_the_same_as_the_cpu("mps"):
            return torch.device("mps")
        return torch.device("cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is unknown: 'cpu', 'cuda', 'cuda:1', "
                         f"'mps' are devices, 'auto' takes the fastest") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(apple)}
    if (wanted.index or 0) >= there.get(wanted.type, 0):
        raise ValueError(f"device={str(device)!r} is not there: this PyTorch sees "
                         f"{there['cuda']} CUDA devices and {there['mps']} MPS "
                         f"devices; device='auto' takes the fastest one")
    if wanted.type == "mps" and not gives_the_same_as_the_cpu("mps"):
        warnings.warn("this Mac's GPU gives other numbers than its CPU in the "
                      "self-test: do not trust what it writes", stacklevel=2)
    return wanted


def pick_dtype(dtype) -> torch.dtype | None:
    """float32 or bfloat16, by name or as PyTorch's own; None stays None."""
    known = DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and known is None:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}, or "
                         f"None for the model's own; 8 and 4 bits: quantize.py")
    return known


@torch.no_grad()
def gives_the_same_as_the_cpu(device) -> bool:
    """A self-test: the operations of a decoding step, on the device and on the CPU,
    agree to 4 digits. Kernels of young devices have been wrong before."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=g)
    weight = torch.randn(96, 64, generator=g)
    slot = torch.tensor([[5], [0], [6]]).expand(3, 64)[:, None]

    def run(x, weight, slot):
        keys = torch.zeros(3, 7, 64, device=x.device).scatter_(1, slot, x[:, None])
        scores = (keys @ x[:, :, None]).squeeze(-1)
        scores = scores.masked_fill(keys[..., 0] == 0, -9e9).softmax(-1)
        seen = (keys[..., :1] != 0).mT & (x[:, :1, None] > x[:, :1, None].min())
        look = F.scaled_dot_product_attention(x[:, None], keys, keys, seen)[:, 0]
        hidden = F.silu(F.linear(x + look, weight))
        first = hidden.topk(2).values
        return torch.cat((scores, hidden, first, hidden.cumsum(-1)), dim=1)

    try:
        there = run(*(t.to(device) for t in (x, weight, slot))).cpu()
    except (RuntimeError, NotImplementedError):
        return False
    return torch.allclose(there, run(x, weight, slot), rtol=1e-4, atol=1e-4)


def describe_device(device=None, dtype=None) -> dict[str, str]:
    """What would really be used, for people to read: device, numbers, kernels."""
    device, dtype = pick_device(device), pick_dtype(dtype) or torch.float32
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        name = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
        kernels = (f"CUDA {torch.version.cuda}, cuBLAS, "
                   f"compute {about.major}.{about.minor}")
    elif device.type == "mps":
        name, kernels = f"Apple GPU of {platform.machine()}", "Metal"
    else:
        name = f"{processor_name()}, {torch.get_num_threads()} threads"
        parts = [("MKL", torch.backends.mkl), ("oneDNN", torch.backends.mkldnn)]
        parts = [name for name, backend in parts if backend.is_available()]
        kernels = " + ".join([*parts, torch.backends.cpu.get_cpu_capability()])
    return {"device": str(device), "name": name, "kernels": kernels,
            "dtype": str(dtype).removeprefix("torch."), "torch": torch.__version__}


def processor_name() -> str:
    """What the processor calls itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine() or f"{os.cpu_count()} cores"


@contextmanager
def memory_explained(estimate: str, knobs: str) -> Iterator[None]:
    """Turn PyTorch's out-of-memory errors into one sentence with our own estimate
    of what was needed and the knobs that make it less."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "memory" not in str(error).lower():
            raise
        raise MemoryError(f"out of memory: {estimate}. What helps: {knobs}"
                          ) from error
