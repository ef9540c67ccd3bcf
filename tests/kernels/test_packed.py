"""Packed weights: every layout gives the codes of the definition back, and every way of multiplying the product."""
import pytest
import torch
import torch.nn.functional as F
from llmopt_kernels import Int4, Int8, Planes, Words, fixed, laid_out, narrow, product, quant_matmul
from torch import Tensor

from llmopt.model.codes import Quantized, pack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def codes_of(bits: int, height: int = 70, width: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(-1 << bits - 1, 1 << bits - 1, (height, width), generator=generator, dtype=torch.int8)


def words(bits: int, height: int = 70, width: int = 40, groups: int = 5,
          zeros: bool = False) -> tuple[Words, Quantized]:
    """The same weight as the kernels hold it and as compression makes it; scales of both signs, one of them 0."""
    codes = codes_of(bits, height, width)
    scales = torch.randn(height, groups, generator=torch.Generator().manual_seed(1)).mul_(0.1).bfloat16()
    scales[3, 0] = 0
    low = codes_of(bits, height, groups) if zeros else None
    return (Words(pack(codes, bits), bits, width, scales, low),
            Quantized(codes, scales, bits, width // groups, zeros=low))


def kinds(source: Words, dtype: torch.dtype) -> list[type]:
    return [Planes, *(kind for kind in (Int4, Int8) if kind.fits(source, dtype))]


def test_fields_of_three_bits_reach_over_the_ends_of_words():
    stored = torch.tensor([[0b01_000_000_000_000_000_000_000_000_000_111, 0b1]], dtype=torch.int32)
    found = Words(stored, 3, 11, torch.ones(1, 1)).numbers(slice(0, 1))
    assert found.tolist() == [[3.0] + [-4.0] * 9 + [1.0]]           # 7 - 4, 0 - 4, and 0b101 - 4 out of two words


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("width", [24, 33, 120])
def test_layouts_give_codes_back(bits, width):
    source, made = words(bits, width=width, groups=3)
    for weight in (source, Planes(source)):
        assert torch.equal(weight.numbers(slice(0, 70)), made.codes.float())
        assert torch.equal(weight.numbers(slice(64, 70)), made.codes[64:].float())
    assert torch.equal(laid_out(source, torch.bfloat16).numbers(slice(0, 70)), made.codes.float())


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_rows_are_what_a_loader_makes(zeros, dtype):
    for bits in (2, 3, 4, 8):
        source, made = words(bits, zeros=zeros)
        for weight in (source, Planes(source)):
            assert torch.equal(weight.dense(slice(5, 70), dtype), made.dequantize(dtype)[5:])


def test_codes_of_eight_bits_may_come_as_bytes():
    source, made = words(8, width=33, groups=3)
    assert torch.equal(Words.of_bytes(made.codes, made.scales).words, source.words)


def test_where_fbgemm_is_not_parts_are_unpacked_in_torch(monkeypatch):
    source, made = words(7)
    weight = Planes(source)
    monkeypatch.setattr(product.Planes, "fast", False)
    assert torch.equal(weight.numbers(slice(0, 70)), made.codes.float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_way_gives_the_product(bits, dtype):
    source, made = words(bits, height=320, width=256, groups=4)
    dense = made.dequantize(dtype)
    for weight in (source, *(kind(source) for kind in kinds(source, dtype))):
        for rows in (1, 5, 130):
            x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(rows)).to(dtype)
            exact = x.double() @ dense.double().T
            for name, way in weight.ways(x).items():
                for bias in (None, torch.arange(320.).to(dtype)):
                    found, wanted = way(x, bias), exact if bias is None else exact + bias
                    assert found.dtype == dtype and found.shape == exact.shape
                    near = (found.double() - wanted).norm() / wanted.norm()
                    assert near < 4 * torch.finfo(dtype).eps, name


def test_blocks_of_rows_are_made_one_after_the_other(monkeypatch):
    from llmopt_kernels import words as layouts

    monkeypatch.setattr(layouts, "PIECE", 64 * 40)
    monkeypatch.setattr(layouts, "BLOCK", 128 * 40)
    source, made = words(4, height=300)
    most = []
    stock = Planes.numbers
    monkeypatch.setattr(Planes, "numbers", lambda self, rows: most.append(rows.stop - rows.start) or stock(self, rows))
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 40).to(dtype)
        assert torch.allclose(Planes(source).by_blocks(x), x @ made.dequantize(dtype).T, atol=0.05)
    assert max(most) <= 128


def test_the_gradient_reaches_the_input():
    source, made = words(4, height=300)
    x = torch.randn(2, 3, 40, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    bias, other = (torch.zeros(300, requires_grad=True) for _ in range(2))
    quant_matmul(x, Planes(source), bias).square().sum().backward()
    F.linear(twin, made.dequantize(torch.float32), other).square().sum().backward()
    assert torch.allclose(x.grad, twin.grad, rtol=1e-4, atol=1e-4)
    assert torch.allclose(bias.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert quant_matmul(torch.zeros(0, 40), Planes(source)).shape == (0, 300)


def test_the_fastest_way_is_measured_once_and_may_be_named(monkeypatch):
    measured = []
    monkeypatch.setattr(product, "_fastest", {})
    monkeypatch.setattr(product, "times", lambda x, ways: measured.append(len(x)) or [(0.0, "float32 blocks")])
    weight = Planes(words(4)[0])
    x = torch.randn(1000, 40).bfloat16()
    exact, fast = (weight.ways(x[:1])[name](x[:1], None) for name in ("blocks", "float32 blocks"))
    assert not torch.equal(exact, fast)
    for rows in (1, 1, 3, 4, 1000, 900):
        quant_matmul(x[:rows], weight)
    assert measured == [1, 3, 256]
    assert torch.equal(quant_matmul(x[:1], weight), fast)
    with fixed("blocks"):
        assert torch.equal(quant_matmul(x[:1], weight), exact)
    monkeypatch.setenv(product.VARIABLE, "no such way")
    assert torch.equal(quant_matmul(x[:1], weight), exact)


def test_the_least_time_wins(monkeypatch):
    times = {"slow": 9.0, "quick": 1.0, "steady": 2.0}
    monkeypatch.setattr(product, "_seconds", lambda way, x: times[way])
    found = product.times(torch.zeros(1, 1), {name: name for name in times})
    assert found == [(1.0, "quick"), (2.0, "steady"), (9.0, "slow")]


@pytest.mark.parametrize(("bits", "kind"), [(4, Int4), (8, Int8)])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_layouts_of_torchs_kernels_hold_the_same_weight(bits, kind, groups):
    source, made = words(bits, height=192, width=256, groups=groups)
    if kind is Int4 and not narrow.block_rows():        # a processor without AVX2
        assert not kind.fits(source, torch.bfloat16)
        return
    weight = kind(source)
    assert {"int4", "int8"} & weight.ways(torch.zeros(1, 256, dtype=torch.bfloat16)).keys()
    assert not {"int4", "int8"} & weight.ways(torch.zeros(1, 256)).keys()       # scalar code in torch
    assert torch.equal(weight.scales, made.scales) and weight.groups == groups
    for rows in (slice(0, 192), slice(64, 128), slice(5, 70)):
        assert torch.equal(weight.numbers(rows), made.codes[rows].float())
        assert torch.equal(weight.dense(rows, torch.float32), made.dequantize(torch.float32)[rows])
    assert torch.equal(weight.by_blocks(torch.eye(256)), made.dequantize(torch.float32).T)
    if groups == 2:             # of 128 columns
        assert weight.nbytes <= 1.05 * (source.words.nbytes + source.scales.nbytes)


@pytest.mark.parametrize("weight", [
    words(4, height=192, width=48, groups=3)[0],                    # groups of 16
    words(4, height=72, width=64, groups=1)[0],                     # no whole sixty-fours of rows
    words(4, height=64, width=64, groups=1, zeros=True)[0],
    words(8, width=40, groups=1)[0], words(8, width=240, groups=10)[0], words(8, width=64, groups=1, zeros=True)[0],
    words(3, height=64, width=64, groups=1)[0]])
def test_what_torchs_kernels_do_not_hold_is_left_to_others(weight):
    assert kinds(weight, torch.bfloat16) == [Planes]
    assert isinstance(laid_out(weight, torch.bfloat16), Planes)


def test_the_layout_is_measured_once_and_may_be_named(monkeypatch):
    source, asked = words(4, height=64, width=64, groups=1)[0], []
    monkeypatch.setattr(product, "_layouts", {})
    monkeypatch.setattr(narrow, "block_rows", narrow.block_rows if narrow.block_rows() else lambda: 64)
    monkeypatch.setattr(product, "times", lambda x, ways: asked.append(set(ways)) or [(1 / len(ways), "")])
    found = [type(laid_out(source, torch.bfloat16)) for _ in range(2)]
    assert len(asked) == 2 and len(set(found)) == 1
    assert kinds(source, torch.float32) == [Planes] and kinds(source, torch.bfloat16) == [Planes, Int4]
    for way, kind in (("int4", Int4), ("float32 blocks", Planes)):
        with fixed(way):
            assert isinstance(laid_out(source, torch.bfloat16), kind)


def test_an_unknown_order_of_bytes_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu",
                        lambda codes, _: (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8))
    assert narrow.block_rows.__wrapped__() == 0
