"""How much faster sparse attention is said to be."""
import pytest
import torch
from llmopt_kernels import Rule, Stripes, gain, worth

T, D = 256, 8
Q, K = torch.zeros(4, T, D), torch.zeros(2, T, D)
CAUSAL = T * (T + 1) / 2
BAND = sum(min(i + 1, 16) for i in range(T))


def test_pieces_of_torch_kernel_by_hand():
    band = Stripes(0, 16)
    assert gain(Q, K, K, band, Rule(1.0)) == pytest.approx(CAUSAL / BAND / 1.6)
    half = [x.bfloat16() for x in (Q, K, K)]
    assert gain(*half, band, Rule(1.0)) == pytest.approx(CAUSAL / BAND / 2.9)
    blocks = Stripes(0, start=torch.arange(0, T, 64), blocks=torch.zeros(1, 4, 1, dtype=torch.int64), tile=64)
    pairs = 4 * 64 * 65 / 2 + 4 * 64 * 64                           # the first tile's block is counted, too
    assert gain(Q, K, K, blocks, Rule(1.0)) == pytest.approx(CAUSAL / (2.2 * pairs + 4 * 60_000))


def test_rows_that_are_no_whole_tile_count_once():
    few = Stripes(0, start=torch.tensor([T - 64]), blocks=torch.tensor([[[0]]]), tile=128)
    pairs = 64 * 65 / 2 + 64 * 64
    assert gain(Q[:, -64:], K, K, few, Rule(1.0)) == pytest.approx(
        (64 * T - 64 * 63 / 2) / (2.2 * pairs + 60_000 / 2))


def test_the_long_way_by_hand():
    band = Stripes(0, 16)
    assert gain(Q.double(), K.double(), K.double(), band, Rule(1.0)) == pytest.approx(CAUSAL / BAND / 5)
    assert gain(Q, K, K, band, Rule(1.0, softcap=30.0)) == pytest.approx(CAUSAL / BAND / 0.9)      # dense goes it, too
    assert gain(Q, K, K, band, Rule(1.0, window=128)) == pytest.approx(1.2 * T * T / BAND / 5)     # dense skips nothing
    far = Stripes(0, 1, diagonals=torch.tensor([[3, 9]]), tile=32)
    before = sum(min(9, begin) for begin in range(0, T, 32)) * 32              # 1 to 9 places before a tile, by rows
    assert gain(Q.double(), K.double(), K.double(), far, Rule(1.0)) == pytest.approx(CAUSAL / (9 * (T + before)))


def test_lines_by_hand():
    lines = Stripes(0, start=torch.arange(0, T, 64), tile=64, verticals=torch.tensor([[3, 100, -1], [7, 9, 9]]))
    pairs = 4 * 64 * 65 / 2 + ((T - 3) + (T - 100) + (T - 7) + 2 * (T - 9)) / 2
    assert gain(Q, K, K, lines, Rule(1.0)) == pytest.approx(CAUSAL / (2.8 * pairs + 300 * T))
    far = Stripes(0, start=torch.arange(0, T, 64), tile=64, diagonals=torch.tensor([[100, -1]]))
    pairs = 4 * 64 * 65 / 2 + 64 * sum(max(0, min(100, begin) - 36) for begin in range(0, T, 64))
    assert gain(Q, K, K, far, Rule(1.0)) == pytest.approx(CAUSAL / (2.8 * pairs))


def test_it_does_not_hang_on_gradients():
    band = Stripes(0, 16)
    assert gain(Q.clone().requires_grad_(), K, K, band, Rule(1.0)) == gain(Q, K, K, band, Rule(1.0))


def test_every_type_that_the_kernel_takes_has_its_costs():
    from llmopt_kernels.flash import TYPES
    assert set(TYPES) == set(worth.PAIR) == set(worth.LISTED) == set(worth.TILE) == set(worth.ROW) == set(worth.LINES)
