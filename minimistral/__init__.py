"""minimistral: the Mistral family of language models, built piece by piece in plain PyTorch.

`import minimistral as mm` offers everything in the table below. A name is imported at its first
use, so that the command line starts at once and `minimistral doctor` works where torch is missing.
"""

import importlib
import sys
import types

__version__ = "0.1.0"

_HOME = {  # public name: the module that defines it
    "ModelConfig": "config",
    "MoEConfig": "config",
    "MODELS": "config",
    "count_parameters": "config",
    "weight_bytes": "config",
    "cache_bytes_per_token": "config",
    "Tokenizer": "tokenizer",
    "load_tokenizer": "tokenizer",
    "Transformer": "model",
    "KVCache": "cache",
    "load_corpus": "corpora",
    "TrainConfig": "train",
    "train": "train",
    "generate": "generate",
    "stream": "generate",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
    "Engine": "engine",
    "describe_device": "devices",
    "quantize_model": "quantize",
    "use_kernels": "quantize",
    "save_quantized": "quantize_files",
    "load_quantized": "quantize_files",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'minimistral' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(types.ModuleType):
    """Two functions bear the name of their module: `mm.train` and `mm.generate`.

    Python binds a submodule to its package when it is first imported. Here that is refused for
    the public names, so that `mm.train` is always the function. `from minimistral.train import
    TrainConfig` and `importlib.import_module("minimistral.train")` reach the module.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOME and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
