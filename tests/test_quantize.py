"""quantize.py: few bits, packed; the kernels agree with the plain path; whole models and files."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import minimistral as mm
from minimistral import quantize as library
from minimistral.moe import MoE
from minimistral.quantize import (
    Int4Linear, QuantizedLinear, dequantize, fast_int4, fast_int8, fast_int8_fits, pack, quantize,
    unpack)


def random(*shape, seed=0):
    """Rows of different size, with a mean that is not zero."""
    chance = torch.Generator().manual_seed(seed)
    rows = 0.2 + torch.rand((*shape[:-1], 1), generator=chance)
    return rows * torch.randn(shape, generator=chance) + 0.05


def small(moe=None, tied=False, dim=64, hidden=96):
    torch.manual_seed(0)
    config = mm.ModelConfig(dim=dim, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16,
                            hidden_dim=hidden, vocab_size=80, moe=moe, tied_embeddings=tied)
    return mm.Transformer(config).eval()


def ids(*shape):
    return torch.randint(80, shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- numbers


def test_by_hand():
    weight = torch.tensor([[0.7, -0.2, 0.04, 0.0], [-1.4, 1.0, 0.35, 2.8]])
    numbers, scales = quantize(weight, 4)
    assert numbers.tolist() == [[7, -2, 0, 0], [-4, 2, 1, 7]] or numbers.tolist() == [
        [7, -2, 0, 0], [-3, 2, 1, 7]]                    # 1.4 / 0.4 lies on the half
    assert scales.float().flatten().tolist() == pytest.approx([0.1, 0.4], rel=4e-3)
    assert numbers.dtype == torch.int8 and scales.dtype == torch.bfloat16


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("group", [None, 32, 8])
def test_no_weight_moves_further_than_half_a_step(bits, group):
    weight = random(7, 96)
    numbers, scales = quantize(weight, bits, group)
    assert scales.shape == (7, 96 // (group or 96))
    most = 2 ** (bits - 1) - 1
    assert numbers.abs().max() == most
    steps = scales.float().repeat_interleave(group or 96, dim=1)
    # half a step, and for the largest of a group what bfloat16 took from its scale
    slack = 0.5 + most * 2**-8
    assert ((dequantize(numbers, scales) - weight).abs() <= slack * steps).all()


def test_groups_follow_their_own_row():
    """One large weight spoils its own group and no other number."""
    weight = random(3, 64)
    large = weight.clone()
    large[1, 40] = 50.0
    before, after = (dequantize(*quantize(w, 4, 32)) for w in (weight, large))
    changed = before != after
    assert changed[1, 32:].any() and not changed[[0, 2]].any() and not changed[1, :32].any()


def test_a_row_of_zeros_stays_zero_and_tiny_weights_give_no_nan():
    weight = random(4, 32)
    weight[1], weight[2] = 0.0, 1e-38
    again = dequantize(*quantize(weight, 4))
    assert (again[1] == 0).all() and again.isfinite().all()


def test_every_byte_and_every_pair_of_numbers_survive_packing():
    left, right = torch.meshgrid(torch.arange(-8, 8), torch.arange(-8, 8), indexing="ij")
    pairs = torch.stack([left, right], -1).reshape(16, 32).to(torch.int8)
    packed = pack(pairs)
    assert packed.shape == (16, 16) and packed.dtype == torch.uint8
    assert packed.unique().numel() == 256
    assert torch.equal(unpack(packed), pairs) and unpack(packed).dtype == torch.int8
    assert pack(torch.tensor([[-7, 7]], dtype=torch.int8)).item() == 0x1F


def test_16_bit_weights_give_the_same_as_their_float32():
    weight = random(5, 64).bfloat16()
    for one, two in zip(quantize(weight, 8, 32), quantize(weight.float(), 8, 32)):
        assert torch.equal(one, two)


# ---------------------------------------------------------------- layers


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, None), (4, 32), (4, 128)])
def test_a_layer_computes_with_the_weights_that_it_stands_for(bits, group):
    weight, x = random(48, 256), random(2, 5, 256, seed=1)
    layer = QuantizedLinear.of(weight, bits, group)
    wanted = F.linear(x, dequantize(*quantize(weight, bits, group)))
    layer.kernel = False
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
    assert layer.packed.nbytes == 48 * 256 * bits // 8 and layer.scales.nbytes == 2 * (
        48 * 256 // (group or 256))


def test_blocks_of_rows_change_nothing(monkeypatch):
    weight = random(50, 64)
    whole = QuantizedLinear.of(weight, 4, 32)
    monkeypatch.setattr(library, "BLOCK", 64 * 7)
    parts = QuantizedLinear.of(weight, 4, 32)
    assert torch.equal(whole.packed, parts.packed) and torch.equal(whole.scales, parts.scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_the_8_bit_kernel_gives_the_plain_result(dtype, rows):
    layer, x = QuantizedLinear.of(random(48, 96), 8, None), random(rows, 96, seed=1).to(dtype)
    if not layer.kernel:
        pytest.skip("this torch has no 8-bit kernel for the CPU")
    plain = F.linear(x.float(), layer.weight)
    for given in (layer(x), fast_int8(x, layer.packed, layer.scales)):
        assert given.dtype == dtype and given.shape == (rows, 48)
        assert (given.float() - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_4_bit_kernel_gives_the_plain_result(dtype, group):
    layer, x = QuantizedLinear.of(random(48, 128), 4, group), random(2, 3, 128, seed=1).to(dtype)
    ordered = fast_int4(layer)
    if ordered is None:
        pytest.skip("this torch has no 4-bit kernel for the CPU")
    plain, given = F.linear(x.float(), layer.weight), ordered(x)
    assert given.dtype == dtype and (given.float() - plain).norm() < 0.01 * plain.norm()


@pytest.mark.parametrize("shape", [(48, 17), (5, 32), (3, 1), (17, 66), (48, 40)])
def test_shapes_that_the_kernels_refuse_or_misread_stay_plain(shape):
    """With 17 columns the 8-bit kernel of torch 2.13 reads past its rows and may crash."""
    eight = QuantizedLinear.of(random(*shape), 8, None)
    x = random(2, shape[1], seed=1)
    assert not eight.kernel and not fast_int8_fits(eight)
    torch.testing.assert_close(eight(x), F.linear(x, eight.weight))
    if shape[1] % 2 == 0:
        assert fast_int4(QuantizedLinear.of(random(*shape), 4, None)) is None


def test_an_absent_or_wrong_kernel_is_not_used(monkeypatch):
    def wrong(x, numbers, scales):
        return x @ numbers.to(x.dtype).T

    def absent(*_):
        raise NotImplementedError("no kernel")

    weight = random(32, 64)
    for kernel in (wrong, absent):
        monkeypatch.setattr(torch, "_weight_int8pack_mm", kernel)
        assert not QuantizedLinear.of(weight, 8, None).kernel
    monkeypatch.setattr(torch, "_weight_int4pack_mm_for_cpu", absent)
    assert fast_int4(QuantizedLinear.of(weight, 4, 32)) is None


def test_gradients_reach_the_input():
    layer, x = QuantizedLinear.of(random(32, 64), 8, None), random(2, 64).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32), (4, None)])
@pytest.mark.parametrize("kind", ["dense", "tied", "mixture"])
def test_a_quantized_model_is_the_model_of_its_dequantized_weights(kind, bits, group):
    model = small(mm.MoEConfig(5, 2) if kind == "mixture" else None, tied=kind == "tied")
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for name, layer in wanted.named_modules():
            if isinstance(layer, nn.Linear) and not name.endswith("gate"):
                layer.weight.copy_(dequantize(*quantize(layer.weight, bits, group)))
    assert mm.quantize_model(model, bits, group) is model
    for layer in model.modules():
        if isinstance(layer, QuantizedLinear):
            layer.kernel = False
    left = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert left == ({"layers.0.feed_forward.gate", "layers.1.feed_forward.gate"}
                    if kind == "mixture" else set())
    with torch.no_grad():
        torch.testing.assert_close(model(ids(2, 9)), wanted(ids(2, 9)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantized_model_writes(dtype, bits):
    model = mm.quantize_model(small(mm.MoEConfig(5, 2)).to(dtype), bits, 32 if bits == 4 else None)
    plain = mm.generate(model, [1, 2, 3], 12)
    assert len(plain) == 12
    mm.use_kernels(model)
    both = mm.generate(model, [[1, 2, 3], [4, 5]], 12)
    assert [len(row) for row in both] == [12, 12]


def test_a_model_follows_to_another_dtype():
    model = mm.quantize_model(small(), 4, 32).to(torch.bfloat16)
    assert model.output.weight.dtype == torch.bfloat16
    assert model(ids(1, 5)).isfinite().all()
    assert model.float()(ids(1, 5)).dtype == torch.float32


def test_skip_leaves_kinds_and_single_layers():
    model = mm.quantize_model(small(), 8, skip=("w2", "layers.1.attention.wq", "output"))
    left = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert left == {"layers.0.feed_forward.w2", "layers.1.feed_forward.w2",
                    "layers.1.attention.wq", "output"}
    assert mm.quantize_model(small(), 8, skip="output").output.__class__ is nn.Linear


def test_use_kernels_says_how_many_and_leaves_the_output_layer():
    model = mm.quantize_model(small(), 4, 32)
    plain = model(ids(2, 5))
    count = mm.use_kernels(model)
    kinds = [type(layer) for layer in model.modules()]
    assert count == kinds.count(Int4Linear) and type(model.output) is QuantizedLinear
    with torch.no_grad():
        given = model(ids(2, 5))
    assert (given - plain).norm() < 0.02 * plain.norm()
    if count:
        assert mm.use_kernels(model, output=True) == 1 and type(model.output) is Int4Linear
    eight = mm.quantize_model(small(), 8)
    assert mm.use_kernels(eight) == sum(x.kernel for x in eight.modules()
                                        if isinstance(x, QuantizedLinear))


@pytest.mark.parametrize(("values", "said"), [
    ({"bits": 3}, "bits=3 must be 8 or 4"),
    ({"bits": 16}, "must be 8 or 4"),
    ({"bits": "4"}, "must be 8 or 4"),
    ({"group": 33}, "group=33 must be None (one scale for each row), 32 or 128"),
    ({"group": 0}, "32 or 128"),
    ({"bits": 4, "group": 128}, "no multiple of group=128: take another group of (None, 32, 128)"),
    ({"skip": ("w9",)}, "skip=['w9'] names no linear layer"),
])
def test_wrong_numbers_are_named_before_anything_changes(values, said):
    model = small()
    with pytest.raises(ValueError) as error:
        mm.quantize_model(model, **values)
    assert said in str(error.value)
    assert not any(isinstance(layer, QuantizedLinear) for layer in model.modules())


def test_other_wrong_input_has_one_clear_error():
    for call, said in [
        (lambda: quantize(random(3, 33), 4, 32), "group=32 does not divide the 33 columns"),
        (lambda: quantize(random(3, 32), 9), "whole number from 2 to 8"),
        (lambda: quantize(torch.tensor([[1.0, float("nan")]]), 8), "NaN or infinity"),
        (lambda: pack(torch.zeros(2, 3, dtype=torch.int8)), "3 columns can't be packed"),
        (lambda: mm.quantize_model(nn.Sequential(nn.Linear(4, 3)), 8), "bias"),
        (lambda: mm.quantize_model(small(hidden=97), 4), "97 columns, no multiple of 2"),
    ]:
        with pytest.raises(ValueError) as error:
            call()
        assert said in str(error.value)


# ---------------------------------------------------------------- memory


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_besides_the_result_one_float_tensor_is_held(tmp_path):
    """In place, and on the way in from a checkpoint, scaled down to 170 MB of floats."""
    model = small(dim=1024, hidden=4096)
    floats = sum(weight.nbytes for weight in model.parameters())
    largest = model.layers[0].feed_forward.w1.weight.nbytes            # 16 MiB
    work = 5 * 4 * library.BLOCK                                       # a block and its steps
    mm.save_model(model, tmp_path)
    for convert in (lambda: mm.quantize_model(model, 8), lambda: mm.load_quantized(tmp_path, 8)):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forget the peak
        before = memory("VmRSS")
        made = convert()
        peak = memory("VmHWM") - before
        result = sum(tensor.nbytes for tensor in made.state_dict().values())
        assert result < 0.3 * floats
        # in place the floats go as the result comes; a file's pages count like a copy
        assert peak < result + largest + work < 0.8 * floats


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(("bits", "group"), [(8, None), (8, 32), (4, 32), (4, None)])
@pytest.mark.parametrize("moe", [None, mm.MoEConfig(5, 2)])
def test_what_is_saved_is_what_is_loaded(tmp_path, bits, group, moe):
    model = mm.quantize_model(small(moe), bits, group, skip="wo")
    mm.save_quantized(model, tmp_path / "q")
    again = mm.load_quantized(tmp_path / "q")
    assert again.config == model.config and not again.training
    for (name, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items()):
        assert torch.equal(one, two) and one.dtype == two.dtype, name
    with torch.no_grad():
        assert torch.equal(model(ids(2, 9)), again(ids(2, 9)))
    half = mm.load_quantized(tmp_path / "q", dtype=torch.bfloat16)
    assert half.norm.weight.dtype == torch.bfloat16 and half(ids(1, 3)).isfinite().all()


@pytest.mark.parametrize("layout", ["mistral", "hf"])
def test_a_checkpoint_is_quantized_on_the_way_in(tmp_path, layout):
    model = small(mm.MoEConfig(5, 2))
    mm.save_model(model, tmp_path, layout=layout)
    loaded = mm.load_quantized(tmp_path, 4, 32, skip="wo")
    wanted = mm.quantize_model(model, 4, 32, skip="wo").state_dict()
    assert all(torch.equal(w, wanted[name]) for name, w in loaded.state_dict().items())
    assert len(loaded.state_dict()) == len(wanted)


def test_whole_numbers_are_no_dtype_for_what_stays_a_float(tmp_path):
    mm.save_model(small(), tmp_path)
    with pytest.raises(ValueError, match="must be a floating-point type"):
        mm.load_quantized(tmp_path, dtype=torch.int8)


def test_load_model_names_who_reads_a_quantized_folder(tmp_path):
    mm.save_quantized(mm.quantize_model(small(), 8), tmp_path / "q")
    with pytest.raises(ValueError, match="load_quantized reads it"):
        mm.load_model(tmp_path / "q")


def test_a_kernels_order_and_an_unquantized_model_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no layer of this model is quantized"):
        mm.save_quantized(small(), tmp_path)
    model = mm.quantize_model(small(), 4, 32)
    if mm.use_kernels(model):
        with pytest.raises(ValueError, match="before use_kernels"):
            mm.save_quantized(model, tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    mm.save_quantized(mm.quantize_model(small(), 4, 32), tmp_path)
    file = tmp_path / "quantized.safetensors"
    good = load_file(file)
    layer = "layers.0.attention.wq"
    wrong = {
        "lacks tensor 'layers.0.attention.wq.scales'": {k: v for k, v in good.items()
                                                        if k != f"{layer}.scales"},
        "lacks tensor 'norm.weight'": {k: v for k, v in good.items() if k != "norm.weight"},
        "has no place": good | {"layers.9.attention.wq.weight": torch.zeros(2)},
        "uint8 of shape": good | {f"{layer}.packed": good[f"{layer}.packed"][:, :5].clone()},
        "don't share out": good | {f"{layer}.scales": torch.ones(64, 5)},
        "holds NaN": good | {"norm.weight": torch.full((64,), float("nan"))},
        "scales hold NaN": good | {f"{layer}.scales": torch.full((64, 2), float("inf"))},
        "of shape (63,)": good | {"norm.weight": torch.ones(63)},
    }
    for said, tensors in wrong.items():
        save_file(tensors, file)
        with pytest.raises(ValueError) as error:
            mm.load_quantized(tmp_path)
        assert said in str(error.value) and "quantized.safetensors" in str(error.value), said
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        mm.load_quantized(tmp_path)


# ---------------------------------------------------------------- the shipped models


def test_the_shipped_model_keeps_its_loss_in_8_bits_and_nearly_in_4():
    from minimistral.course import ladder

    model = mm.load_model("tales-dense")
    size = len(ladder.corpus.val.encode())
    loss = ladder.validation_nats(model) / size
    eight = ladder.validation_nats(mm.quantize_model(copy.deepcopy(model), 8)) / size
    four = ladder.validation_nats(mm.quantize_model(model, 4, 32)) / size
    assert abs(eight - loss) < 0.002 and loss < four < loss + 0.1


def test_the_mixture_keeps_its_router_and_writes():
    model = mm.load_quantized("tales-moe", 4, 32)
    gates = [layer.gate for layer in model.modules() if isinstance(layer, MoE)]
    assert gates and all(type(gate) is nn.Linear for gate in gates)
    assert len(mm.generate(model, [1], 10)) == 10


def test_an_adapter_is_merged_before_it_is_quantized():
    model, loaded = mm.load_model("tales-chat"), mm.load_quantized("tales-chat", 8)
    ids = torch.tensor([[1, 50, 60, 70]])
    expected = mm.quantize_model(model, 8)(ids)
    assert torch.equal(loaded(ids), expected)
    assert not torch.allclose(expected, mm.load_quantized("tales-dense", 8)(ids), atol=0.1)
