"""The Triton kernel for packed words, under Triton's interpreter: it must be told before Triton is imported."""
import os
import subprocess
import sys

CODE = """
import torch
from llmopt_kernels import Words, on_gpu
from llmopt.model.codes import pack

for bits in (2, 3, 4, 8):
    for dtype, zeros in ((torch.float32, True), (torch.bfloat16, False)):
        torch.manual_seed(bits)
        codes, low = (torch.randint(-1 << bits - 1, 1 << bits - 1, (40, n), dtype=torch.int8) for n in (72, 3))
        weight = Words(pack(codes, bits), bits, 72, torch.randn(40, 3).to(dtype), low if zeros else None)
        x, bias = torch.randn(18, 72).to(dtype), torch.randn(40).to(dtype)
        expected = x.float() @ weight.dense(slice(0, 40), torch.float32).T + bias.float()
        found = on_gpu.product(x, weight, bias, exact=True)
        assert found.dtype == dtype
        near = (found.float() - expected).norm() / expected.norm()
        assert near < 4 * torch.finfo(dtype).eps, (bits, dtype, near)
print("all alike")
"""


def test_the_kernel_computes_what_the_definition_does():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True,
                          env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.stdout == "all alike\n", done.stderr
