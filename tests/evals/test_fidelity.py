"""KL, agreement and perplexity against the dense model: the definitions, the errors, what is in force, bad input."""
import copy
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import psutil
import pytest
import torch
from llmopt_evals import fidelity, readout
from llmopt_evals.fidelity import compare, figures, over_rows

import llmopt
from llmopt.calibration import data
from llmopt.errors import LlmoptError
from llmopt.scale.processes import Ranks
from tests import tiny

IDS = tiny.ids(5, 24)


def rows(ids=IDS, size: int = 2):
    """A source of rows that is asked of the dense model."""
    return lambda model, tokenizer: data.as_batches(ids if isinstance(ids, list) else ids.tolist(), tiny.VOCABULARY,
                                                    size)


def both(dense, compressed, place, draw=None, **options):
    return compare(nullcontext((dense, None)), nullcontext((compressed, None)), draw or rows(), place, **options)


def compressed(*steps, family: str = "llama"):
    model = tiny.make(family)
    llmopt.compress(model, list(steps), batches=IDS)
    return model


@torch.no_grad()
def tables(model, ids):
    return model(ids).logits.double().log_softmax(-1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_figures_are_those_of_the_definitions(family, tmp_path, monkeypatch):
    monkeypatch.setattr(readout, "CHUNK", 5 * 96 * 12)                      # five positions at a time
    dense = tiny.make(family)
    other = tiny.make(family)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    _, found = figures(both(dense, other, tmp_path, batch_size=2))
    p, q = (tables(model, IDS)[:, 12:23] for model in (dense, other))
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    wanted = IDS[:, 13:24, None]
    assert found["kl"][0] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl"][1] == pytest.approx(float(kl.mean(1).std() / 5 ** 0.5), rel=1e-2)
    assert found["kl_max"][0] == pytest.approx(float(kl.max()), rel=1e-2)
    assert found["agreement"][0] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    change = (q.gather(2, wanted) - p.gather(2, wanted))[..., 0]
    assert found["loglikelihood_change"] == (pytest.approx(float(change.mean()), abs=1e-5),
                                             pytest.approx(float(change.mean(1).std() / 5 ** 0.5), rel=1e-3))
    logp = q.gather(2, wanted)[..., 0]
    assert found["perplexity"] == (pytest.approx(float((-logp.mean()).exp()), rel=1e-4), pytest.approx(
        float((-logp.mean()).exp() * logp.mean(1).std() / 5 ** 0.5), rel=1e-3))


def test_a_model_is_no_distance_from_itself(tmp_path):
    before, after = figures(both(tiny.make("qwen3"), tiny.make("qwen3"), tmp_path))
    assert after["kl_max"][0] < 2e-6                                        # float16 in the file
    assert after["agreement"] == (1, 0) and after["loglikelihood_change"] == (0, 0)
    assert after["perplexity"] == before["perplexity"]


@pytest.mark.parametrize("method", [llmopt.kv.SnapKV(ratio=0.5, window=2), llmopt.kv.Streaming(budget=6, every=1),
                                    llmopt.kv.Streaming(budget=6, every=3), llmopt.attention.AShape(
                                        min_length=0, sinks=1, window=3)], ids=str)
@torch.no_grad()
def test_what_is_in_force_is_what_decoding_token_by_token_sees(method, tmp_path):
    model = compressed(method)
    prompt, rest = IDS[:, :12], IDS[:, 12:23]
    cache, steps = model(prompt, use_cache=True).past_key_values, []
    for token in rest.split(1, 1):
        steps.append(model(token, past_key_values=cache, use_cache=True).logits)
    q, p = torch.cat(steps, 1).double().log_softmax(-1), tables(tiny.make("llama"), IDS)[:, 12:23]
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    _, found = figures(both(tiny.make("llama"), model, tmp_path))
    assert expected > 1e-3 and found["kl"][0] == pytest.approx(expected, rel=1e-3)


def test_the_error_is_that_of_means_over_rows_whose_tokens_are_alike():
    generator = torch.Generator().manual_seed(0)
    means, errors = [], []
    for _ in range(400):
        lengths = torch.randint(4, 12, (24,), generator=generator).tolist()
        draws = [torch.randn(1, generator=generator) + 0.3 * torch.randn(n, generator=generator) for n in lengths]
        mean, error = over_rows(draws)
        means.append(mean)
        errors.append(error)
    assert torch.tensor(errors).mean() == pytest.approx(float(torch.tensor(means).std()), rel=0.1)
    assert over_rows([torch.ones(7)]) == (1, None)


def test_rows_of_every_length_are_scored_without_padding(tmp_path):
    ids = [IDS[0].tolist(), IDS[1, :9].tolist(), IDS[2].tolist(), IDS[3, :3].tolist(), IDS[4, :4].tolist()]
    dense, other = tiny.make("llama"), compressed(llmopt.quant.RTN(bits=3, group_size=32))
    found = both(dense, other, tmp_path, rows(ids, 5))
    assert [len(row.kl) for row in found] == [11, 4, 11, 1]                 # three tokens are no prompt and a rest
    alone = both(dense, other, tmp_path, rows([ids[1]]))
    assert torch.allclose(alone[0].kl, found[1].kl, atol=1e-5)


def test_processes_divide_the_rows(tmp_path):
    class Share(Ranks):
        def gather(self, value):
            return [value]

        def agree(self, value):
            return rows()(None, None)

    dense, other = tiny.make("llama"), compressed(llmopt.quant.RTN(bits=3, group_size=32))
    whole = both(dense, other, tmp_path)
    parts = [both(dense, other, tmp_path, ranks=Share(rank, 2)) for rank in (0, 1)]
    assert [len(part) for part in parts] == [2, 3]
    for row, expected in zip([*parts[0], *parts[1]], whole, strict=True):
        assert torch.allclose(row.kl, expected.kl, atol=1e-5)


def test_a_large_vocabulary_takes_fewer_positions_and_the_file_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(fidelity, "BYTES", 5 * 4 * 96 * 2)                  # four positions of every row
    found = both(tiny.make("llama"), tiny.make("llama"), tmp_path)
    assert [len(row.kl) for row in found] == [4] * 5
    whole = tables(tiny.make("llama"), IDS)[0, [12, 15, 19, 22]].gather(1, IDS[0, [13, 16, 20, 23], None])[:, 0]
    assert torch.allclose(found[0].after, whole, atol=1e-4)
    assert not list(tmp_path.iterdir())


def test_the_dense_model_is_gone_before_the_compressed_one_comes(tmp_path):
    alive = []

    @contextmanager
    def opened(watch):
        model = tiny.make("llama")
        model.itself = [model]                                              # a circle, as hooks make them
        alive.append(weakref.ref(model))
        if watch:
            assert alive[0]() is None
        yield model, None

    compare(opened(False), opened(True), rows(), tmp_path)
    assert len(alive) == 2


def test_bad_input_is_told(tmp_path, monkeypatch):
    dense, ids = tiny.make("qwen3"), IDS.clamp(max=80)
    damaged, ids[1, 15] = copy.deepcopy(dense), 90
    with torch.no_grad():
        damaged.get_input_embeddings().weight[90] = float("nan")        # token 15, and through 0 * NaN all of its half
    with pytest.raises(LlmoptError, match="the compressed model: row 1, position 12: computes NaN"):
        both(dense, damaged, tmp_path, rows(ids))
    with pytest.raises(LlmoptError, match="the dense model: row 1, position 12: computes NaN"):
        both(damaged, dense, tmp_path, rows(ids))
    with pytest.raises(LlmoptError, match=r"has a vocabulary of 90 tokens, the dense one of 96"):
        both(dense, tiny.make("llama", vocab_size=90), tmp_path, rows(tiny.ids(2, 8) % 90))
    with pytest.raises(LlmoptError, match=r"rows of at least 4 tokens are needed, the longest of 5 has 3"):
        both(dense, dense, tmp_path, rows(IDS[:, :3]))
    monkeypatch.setattr(psutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(LlmoptError, match="GB of disk are needed"):
        both(dense, dense, tmp_path)
