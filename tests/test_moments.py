"""Half of the work, the whole result: on sizes that end within a block, with the mirror, and in parts."""
import pytest
import torch

from llmopt.calibration.second_moments import WIDTH, Gram, blocks_of, energy, row_errors

SIZES = [1, WIDTH - 1, WIDTH, WIDTH + 1, 2 * WIDTH + 40]


@pytest.fixture(params=SIZES)
def inputs(request):
    return torch.randn(70, request.param, generator=torch.Generator().manual_seed(request.param))


def test_blocks_cover_a_matrix_once():
    for size in SIZES:
        assert [i for block in blocks_of(size) for i in range(size)[block]] == list(range(size))


def test_gram_is_the_sum_over_all_tokens(inputs):
    gram, x = Gram(), inputs.double()
    gram.add(inputs[:30].bfloat16().float())
    gram.whole()                                    # a look on the way changes nothing
    gram.add(inputs[30:])
    x[:30] = inputs[:30].bfloat16().double()
    torch.testing.assert_close(gram.whole(), x.T @ x, rtol=1e-5, atol=1e-4)
    assert gram.tokens == 70 and gram.whole().dtype == torch.float64
    gram.join(inputs)
    torch.testing.assert_close(gram.whole(), x.T @ x, rtol=1e-5, atol=1e-4)


def test_row_errors_are_what_the_outputs_lose(inputs):
    change = torch.randn(9, inputs.shape[1], generator=torch.Generator().manual_seed(1))
    lost = (change.double() @ inputs.double().T).square().sum(1)
    hessian = (inputs.double().T @ inputs.double()).float()
    torch.testing.assert_close(row_errors(change, hessian).double(), lost, rtol=1e-4, atol=1e-4)
    assert energy(change, hessian) == pytest.approx(float(lost.sum()), rel=1e-4)
