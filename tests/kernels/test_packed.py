"""Packed weights: every layout gives the codes of the definition back, and every way of multiplying the product."""
import pytest
import torch
import torch.nn.functional as F
from llmopt_kernels import Planes, Words, fixed, laid_out, product, quant_matmul
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
    for weight in (source, laid_out(source, dtype)):
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
    monkeypatch.setattr(product, "fastest", lambda x, ways: measured.append(len(x)) or "float32 blocks")
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
    assert product.fastest(torch.zeros(1, 1), {name: name for name in times}) == "quick"
