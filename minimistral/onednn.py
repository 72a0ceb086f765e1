"""Float32 products on the CPU by oneDNN: plumbing of fast_model.py and train_run.py.

Of the two libraries in PyTorch that multiply float32 matrices, the one it takes by itself is
less than half as fast as oneDNN on AMD's processors with AVX-512, whose vectors it does not
use whole. PyTorch calls oneDNN for other number formats and has it for float32, too, but under
no public name. A few rows gain nothing: their time is that of reading the weights.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

THERE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

# An operation of our own, into which the compiler does not look: its own way with this one
# takes constant weights alone (torch 2.13).
OPERATIONS = torch.library.Library("minimistral", "FRAGMENT")
OPERATIONS.define("wide_product(Tensor x, Tensor weight) -> Tensor")
OPERATIONS.impl("wide_product", lambda x, weight: torch.ops.mkldnn._linear_pointwise(
    x, weight, None, "none", [], ""), "CompositeExplicitAutograd")
torch.library.register_fake("minimistral::wide_product", lambda x, weight:
                            x.new_empty(*x.shape[:-1], len(weight)), lib=OPERATIONS)
wide_product = torch.ops.minimistral.wide_product        # F.linear(x, weight), float32


def keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def gradients(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Of x (..., in) and of the weight (out, in), from that of the result (..., out)."""
    x, weight = ctx.saved_tensors
    to_x = wide_product(grad, weight.t()) if ctx.needs_input_grad[0] else None
    rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
    to_weight = wide_product(rows.t(), columns.t()) if ctx.needs_input_grad[1] else None
    return to_x, to_weight


torch.library.register_autograd("minimistral::wide_product", gradients, setup_context=keep,
                                lib=OPERATIONS)


@contextlib.contextmanager
def wide_products(model: nn.Module) -> Iterator[None]:
    """Run the model's linear layers by oneDNN, forwards and backwards, where it is there,
    the numbers are float32 and nobody has asked for less (see quick_products)."""
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear
              and layer.bias is None and THERE and "forward" not in vars(layer)
              and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
              and torch.get_float32_matmul_precision() == "highest"]
    for layer in layers:
        layer.forward = widely(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward                                      # the class's again


def widely(layer: nn.Linear):
    def forward(x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cpu"):
            return F.linear(x, layer.weight)
        return wide_product(x, layer.weight)
    return forward
