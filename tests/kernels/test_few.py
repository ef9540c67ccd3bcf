"""A few queries over many keys: products and fused call give what is defined, on any number of threads."""
import pytest
import torch
from llmopt_kernels import Rule, few, few_queries
from llmopt_kernels.reference import attention
from torch.testing import assert_close


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1), (2, 3)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_both_ways_are_attention(shape, count, threads, monkeypatch):
    threads(count)
    rows, keys, values = noise(*shape, 4, 8), noise(*shape, 120, 8, seed=1)[:, :, :101], noise(*shape, 101, 6, seed=2)
    rows[..., 1, :] *= 100                                          # logits of some hundreds
    want = attention(rows.flatten(1, 2).unsqueeze(2), keys, values, None, Rule(0.3)).view(*shape, 4, 6)
    fused = []
    real = few.scaled_dot_product_attention
    monkeypatch.setattr(few, "scaled_dot_product_attention", lambda *args, **of: fused.append(1) or real(*args, **of))
    for long, calls in ((few.LONG, 1), (101 * 8 * 4, 1)):
        monkeypatch.setattr(few, "LONG", long)
        assert_close(few_queries(rows, keys, values, None, 0.3), want, atol=1e-5, rtol=1e-5)
        assert len(fused) == calls


def test_products_are_for_long_lanes_of_fp32_without_a_mask(monkeypatch):
    monkeypatch.setattr(few, "LONG", 1)
    monkeypatch.setattr(few, "_lanes", lambda *args: pytest.fail("products"))
    monkeypatch.setattr(few, "_lane", lambda *args: pytest.fail("products"))
    rows, keys = noise(1, 2, 4, 8), noise(1, 2, 9, 8, seed=1)
    seen = torch.arange(9).expand(1, 1, 1, 9) < 5
    cut = few_queries(rows, keys[:, :, :5], keys[:, :, :5], seen[..., :5], 0.3)
    assert_close(few_queries(rows, keys, keys, seen, 0.3), cut)
    half = few_queries(rows.bfloat16(), keys.bfloat16(), keys.bfloat16(), None, 0.3)
    assert half.dtype == torch.bfloat16
