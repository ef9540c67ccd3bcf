"""The Triton kernel of sparse attention, under Triton's interpreter: it must be told before Triton is imported."""
import os
import subprocess
import sys

import pytest

CODE = """
from dataclasses import replace

import torch
from llmopt_kernels import NONE, Rule, Stripes, sparse, sparse_on_gpu
from llmopt_kernels.sparse import by_gathering

torch.manual_seed(0)
TOTAL, TILES = 70, 3
columns = torch.stack([torch.randperm(TOTAL)[:9] for _ in range(4 * TILES)]).view(4, TILES, 9)
columns[:, :, 2], columns[:, 1, 4] = NONE, columns[:, 1, 3]
blocks = torch.stack([torch.randperm(7)[:3] for _ in range(2 * TILES)]).view(2, TILES, 3)
blocks[1, :, 0] = NONE
start = torch.tensor([[0, 12, 40], [3, 20, 33]])
CASES = [
    (Stripes(3, 9, tile=20), 0, None), (Stripes(5, torch.tensor([4, 30]), columns=columns, tile=20), 11, None),
    (Stripes(2, start=start[0], tile=20, columns=columns, blocks=blocks, block=10), 10, 30),
    (Stripes(0, start=start, tile=20, blocks=blocks, block=10), 10, None),
    (Stripes(4, start=start, tile=20, blocks=blocks, block=10, diagonals=torch.tensor([[3, 44, NONE, 9]] * 2)), 10, 25),
]
for stripes, offset, window in CASES:
    offset = max(offset, TOTAL - 60)
    query, keys, values = torch.randn(4, TOTAL - offset, 16), torch.randn(2, TOTAL, 16), torch.randn(2, TOTAL, 16)
    rule = Rule(0.3, window=window)
    for dtype in (torch.float32, torch.bfloat16):
        given = [x.to(dtype) for x in (query, keys, values)]
        assert sparse_on_gpu.fits(*given, stripes, rule)
        want, pairs = by_gathering(*(x.float() for x in given), stripes, rule)
        base = replace(stripes, columns=None, blocks=None, diagonals=None)
        done, _ = by_gathering(*(x.float() for x in given), base, rule)
        for one in (stripes, replace(stripes, done=done)):
            got, count = sparse_on_gpu.triton_partial(*given, one, rule, exact=True)
            assert got.out.dtype == dtype and count.tolist() == pairs.tolist(), (count, pairs)
            near = (got.out.float() - want.out).norm() / want.out.norm()
            assert near < 4 * torch.finfo(dtype).eps, (dtype, near)
            assert torch.allclose(got.lse, want.lse, atol=1e-4)
assert not sparse_on_gpu.fits(query, keys, values, stripes, Rule(0.3, softcap=5.0))
assert not sparse_on_gpu.fits(query[..., :12], keys[..., :12], values[..., :12], stripes, Rule(0.3))
called, kernel = [], sparse_on_gpu.triton_partial
sparse._for_triton, sparse_on_gpu.triton_partial = lambda query: True, lambda *given: called.append(1) or kernel(*given)
softcap = Rule(0.3, softcap=5.0)
for rule, times in ((Rule(0.3), 1), (softcap, 1)):
    got, want = sparse.sparse_attention(query, keys, values, CASES[0][0], rule)[0], by_gathering(
        query, keys, values, CASES[0][0], rule)[0].out
    assert torch.allclose(got, want, atol=1e-5) and len(called) == times
print("all alike")
"""


TO_PTX = """
from llmopt_kernels import sparse_on_gpu
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernel = sparse_on_gpu._stripes
for done, windows in ((False, False), (True, True)):
    fixed = dict(TILE=128, BLOCK=128, WINDOWS=windows, DONE=done, EXACT=False, BM=128, BN=64, D=128)
    kinds = dict(query="*bf16", keys="*bf16", values="*bf16", out="*bf16", lse="*fp32", scaling="fp32")
    lists = ("pairs", "local", "columns", "column_counts", "blocks", "block_counts")
    kinds |= dict.fromkeys(fixed, "constexpr") | dict.fromkeys(lists, "*i32")
    names = kernel.arg_names
    source = ASTSource(kernel, {name: kinds.get(name, "i32") for name in names},
                       {(names.index(name),): value for name, value in fixed.items()},
                       {(names.index(name),): [["tt.divisibility", 16]] for name in names
                        if kinds.get(name, "").startswith("*") or name.startswith("stride")})
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 2})
    assert "wgmma" in made.asm["ptx"] and made.metadata.shared < 227 * 1024
print("compiled")
"""


@pytest.mark.full
def test_it_compiles_for_an_h200():
    """Which needs no GPU: its matrix products become wgmma, and a program fits into shared memory."""
    done = subprocess.run([sys.executable, "-c", TO_PTX], capture_output=True, text=True)
    assert done.stdout == "compiled\n", done.stderr


def test_the_kernel_computes_what_the_definition_does():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.stdout == "all alike\n", done.stderr
