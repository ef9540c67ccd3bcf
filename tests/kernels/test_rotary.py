"""Rotation against complex numbers, and back."""
import torch
from llmopt_kernels import rotate, unrotate
from torch.testing import assert_close


def test_rotation_is_a_complex_product_and_its_inverse_undoes_it():
    g = torch.Generator().manual_seed(0)
    x, angle = torch.randn(2, 3, 10, generator=g), torch.randn(2, 3, 4, generator=g) * 50
    cos, sin = (torch.cat([f(angle)] * 2, -1) * 1.3 for f in (torch.cos, torch.sin))       # scaled, as YaRN does
    turned = rotate(x, cos, sin)
    want = torch.complex(x[..., :4], x[..., 4:8]) * torch.polar(torch.full_like(angle, 1.3), angle)
    assert_close(turned, torch.cat([want.real, want.imag, x[..., 8:]], -1))                # the last two stay
    assert_close(unrotate(turned, cos, sin), x, atol=1e-5, rtol=1e-5)
