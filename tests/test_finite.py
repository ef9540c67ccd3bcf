import pytest
import torch

from llmopt.errors import LlmoptError
from llmopt.model.finite import all_finite, check_finite


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 777, 1999])
def test_one_bad_value_is_seen_wherever_it_is(dtype, bad, place):
    tensor = torch.linspace(-3, 3, 2000).to(dtype)
    assert all_finite(tensor) and all_finite(tensor.view(40, 50).T)
    tensor[place] = bad
    assert not all_finite(tensor) and not all_finite(tensor.view(40, 50).T)
    with pytest.raises(LlmoptError, match="here: tensor w holds 1 NaN or Inf values"):
        check_finite({"v": torch.ones(2), "w": tensor}, "here")


def test_nothing_and_integers_are_finite():
    assert all_finite(torch.zeros(0)) and all_finite(torch.tensor([2**31 - 1], dtype=torch.int32))
    assert all_finite(torch.full((3,), torch.finfo(torch.float32).max))
