"""transform.rotate: its matrices, what it leaves as it was, what it is good for, streamed, cut off, refused."""
import pytest
import torch
from transformers import AutoModelForCausalLM, OPTConfig

from llmopt.checkpoint.save import load
from llmopt.errors import LlmoptError
from llmopt.forecast.size import predict
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.links import Norm
from llmopt.model.outside import Outside
from llmopt.quant import RTN
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from llmopt.scale.journal import Interrupted
from llmopt.transform import FoldNorms, Rotate
from llmopt.transform.rotation import Rotation
from tests import tiny
from tests.plans import contents, dense, plan
from tests.test_architectures import wild
from tests.test_inputs import batches
from tests.transform.test_fold_norms import cut_off

# powers of two, by Paley's first and second construction, without a known Hadamard matrix, odd
SIZES = (1, 2, 64, 12, 36, 576, 960, 344, 9)


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_orthogonal_and_flat(size, mean):
    q = Rotation(size, seed=1, mean=mean)(torch.eye(size))
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if mean:
        torch.testing.assert_close(q.sum(1), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-10)
    elif size not in (344, 9):
        torch.testing.assert_close(q.abs(), torch.full_like(q, size ** -0.5), rtol=0, atol=1e-12)
    other = Rotation(size, seed=2, mean=mean)(torch.eye(size))
    assert size < 9 or not torch.allclose(q, other, atol=1e-3)


def test_parts_are_turned_by_themselves():
    x = torch.randn(3, 32)
    turned = Rotation(8, seed=0)(x)
    torch.testing.assert_close(turned.unflatten(-1, (4, 8)).norm(dim=-1), x.double().unflatten(-1, (4, 8)).norm(dim=-1))
    torch.testing.assert_close(turned[:, 8:16], Rotation(8, seed=0)(x[:, 8:16]))


@torch.no_grad()
def logits(model):
    return model(tiny.ids(2, 24)).logits


@pytest.mark.parametrize("fields", [{"channels": 16}, {"heads": False}, {"stream": False}])
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "gemma3_text"])
def test_any_of_its_parts_leaves_the_logits(family, fields):
    if family == "gemma3_text" and fields != {"stream": False}:
        return
    model = tiny.make(family, norms=True)
    before, expected = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    Rotate(**fields).apply(model, Run())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)
    moved = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert moved and ("embed" in " ".join(moved) or "wte" in " ".join(moved)) == fields.get("stream", True)


@pytest.mark.parametrize("name", ["opt-no-bias", "neox-serial-partial", "neox-tied", "llama-bias",
                                  "qwen3-bias-sliding"])
def test_biases_norms_without_gains_and_serial_blocks(name):
    model = wild(name, torch.float32)
    expected = logits(model)
    Rotate().apply(model, Run())
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)


def plant(model, by: float = 16.0) -> None:
    """Four channels whose readers have large weights and whose norms make up for it: the same function."""
    for block in blocks(model):
        for link in block.links():
            if isinstance(link.producer, Norm):
                factor = torch.ones(64)
                factor[[3, 17, 40, 61]] = 1 / by
                link.scale_(factor)


def test_planted_outliers_do_no_harm_after_a_rotation():
    """Rotated, the model with outliers is the one without: at 3 and 4 bits a fifth of the error and less."""
    plain, planted = (tiny.make("llama", norms=True, num_hidden_layers=1) for _ in range(2))
    plant(planted)
    expected = logits(plain)
    torch.testing.assert_close(logits(planted), expected, rtol=0, atol=1e-4)
    for bits in (3, 4):
        error = {}
        for rotated in (False, True):
            model = tiny.make("llama", norms=True, num_hidden_layers=1)
            plant(model)
            for step in [Rotate()] * rotated + [RTN(bits=bits, group_size=-1)]:
                step.apply(model, Run())
            error[rotated] = float((logits(model) - expected).square().mean())
        assert error[True] < error[False] / 5
    for model in (plain, planted):
        Rotate().apply(model, Run())
    for a, b in zip(plain.parameters(), planted.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def lost_to_int8(*steps) -> float:
    """Squared error of the logits in W8A8, behind `steps`, of a model with four inputs sixteen times as large."""
    model, data = tiny.make("llama", norms=True, num_hidden_layers=1), Run(batches())
    plant(model, 1 / 16)
    expected = logits(model)
    for step in (*steps, RTN(scheme="W8A8")):
        step.apply(model, data)
    return float((logits(model) - expected).square().mean())


def test_planted_outliers_of_activations_do_no_harm_after_a_rotation():
    assert lost_to_int8(Rotate()) < lost_to_int8() / 5


@pytest.mark.parametrize(("family", "format"), [("llama", "portable"), ("gpt2", "dense")])
def test_streamed_and_cut_off_it_writes_the_same_bytes(family, format, tmp_path, monkeypatch):
    """A tied head, a table of positions; Ctrl-C in the second block in memory, then around the blocks, streamed."""
    steps = "[transform.rotate: {seed: 3}, quant.rtn: {bits: 4, group_size: 16}]"
    made = plan(tmp_path, dense(tmp_path, family, norms=True), steps, f"format: {format}\n")
    pipeline.run(made, tmp_path / "memory", streaming=Streaming(False))
    for stream, (cls, name, at) in zip((False, True), [(Rotate, "block", 2), (Rotate, "outside", 1)], strict=True):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            cut_off(patch, cls, name, at)
            pipeline.run(made, tmp_path / "streamed", streaming=Streaming(stream), resume=True)
    pipeline.run(made, tmp_path / "streamed", streaming=Streaming(True), resume=True)
    assert contents(tmp_path / "memory") == contents(tmp_path / "streamed")
    fresh, _ = load(tmp_path / "memory")
    assert not fresh.config.tie_word_embeddings


def test_the_forecast_counts_the_head_that_is_untied():
    model = tiny.make("llama")
    size, told = predict(model, [Rotate()]).bytes, predict(model, [Rotate()]).steps[0][1]
    assert "gives the head 6,144 weights of its own" in told
    assert size == predict(model, [FoldNorms()]).bytes
    assert predict(model, [Rotate(stream=False)]).bytes < size


def test_the_record_says_what_was_done():
    record = Rotate().apply(tiny.make("gpt_neox"), Run())
    assert record.meta["blocks"] == [{"folded": ["attn_in", "ffn_in"], "heads": 4}] * 3


@pytest.mark.parametrize(("family", "fields", "said"), [
    ("gemma2", {}, "gemma2: its residual stream cannot be rotated: norms with gains stand between its writers and"),
    ("olmo2", {}, "olmo2: its residual stream cannot be rotated: .* stream: false rotates the value heads alone"),
    ("mixtral", {}, "mixtral: its residual stream cannot be rotated: .* experts"),
    ("llama", {"channels": 48}, "channels: 48 given, a divisor of the 64 channels of the residual stream expected")])
def test_what_cannot_be_rotated_is_named_before_the_work(family, fields, said):
    with pytest.raises(LlmoptError, match=said):
        predict(tiny.make(family), [Rotate(**fields)])


def test_maps_around_the_blocks_and_norms_on_the_stream_are_named():
    for post, said in ((True, "its norms normalise the residual stream itself"), (False, "differ in width")):
        config = OPTConfig(**tiny.BASE, ffn_dim=96, word_embed_proj_dim=32, do_layer_norm_before=not post)
        with pytest.raises(LlmoptError, match=said):
            predict(AutoModelForCausalLM.from_config(config), [Rotate()])


def test_a_final_norm_with_a_bias_and_no_gain_is_named():
    model = tiny.make("gpt2", norms=True)
    Outside(model).final_norm.module.weight.data[5] = 0
    with pytest.raises(LlmoptError, match=r"transformer\.ln_f: has a bias on channels with almost no gain"):
        Rotate().apply(model, Run())


def test_nothing_to_rotate_is_refused():
    with pytest.raises(LlmoptError, match="heads"):
        Rotate(stream=False, heads=False)
