"""Keys around the mean of their run: which entries make a run, what comes back, and that runs stay in one piece."""
import pytest
import torch
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.kv.centres import RUN
from llmopt.kv.codes import Codes, Form
from llmopt.kv.mixed import Mixed
from llmopt.kv.quant import packed
from tests.tiny import ids, make

FORM = Form(4, 16, centre=True)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pack(x, before=None, source=None, dense=0):
    """x [G, T, D] in codes but for the newest; source: the place of each in `before`."""
    old = torch.ones(x.shape[:2], dtype=torch.bool)
    old[:, x.shape[1] - dense:] = False
    return packed(x, old, torch.full(old.shape, -1) if source is None else source, before, FORM)


def flat(mixed):
    return mixed[torch.ones(mixed.shape, dtype=torch.bool)]


def grown(x, sizes):
    """x [1, T, D] packed part by part: the runs, and the centres."""
    mixed, length = None, 0
    for size in sizes:
        source = torch.arange(length + size)[None]
        part = torch.cat([x[:, :0] if mixed is None else mixed.dense()[None], x[:, length:length + size]], 1)
        mixed = flat(pack(part, mixed, torch.where(source < length, source, -1)))
        length += size
    return mixed.codes.runs.tolist(), mixed.codes.centres.float()


def test_the_first_entry_is_alone_and_runs_behind_it_are_of_about_equal_length():
    x = noise(2, 400, 16) + 5
    codes = pack(x).codes
    assert codes.runs.tolist() == [1, 133, 133, 133] * 2 and codes.centres.dtype == torch.bfloat16
    assert_close(codes.centres[:2].float(), torch.stack([x[0, 0], x[0, 1:134].mean(0)]), atol=0.03, rtol=0)
    assert_close(codes.dense().view(2, 400, 16)[:, 0], x[:, 0], atol=1e-3, rtol=1e-3)
    assert pack(x[:, :1]).codes.runs.tolist() == [1, 1] and len(pack(x, dense=400).codes.centres) == 0


def test_what_was_dropped_has_no_part_in_it():
    """Holes anywhere, as an evictor leaves them."""
    x, old = noise(1, 60, 16), torch.arange(60)[None] % 3 == 1
    x[~old] = torch.inf
    codes = packed(x, old, torch.full(old.shape, -1), None, FORM).codes
    assert codes.runs.tolist() == [1, 19]
    assert_close(codes.centres[1].float(), x[0, 4::3].mean(0), atol=0.01, rtol=0)


def test_few_more_join_the_last_run_until_it_is_full_and_a_short_one_has_the_mean_of_half_a_run():
    x = noise(1, 400, 16) + 5
    assert grown(x, [100, 28, 20, 64, 10])[0] == [1, 147, 74]
    assert grown(x, [1, 1, 3, 5])[0] == [1, 1, 8]                       # nobody joins one that is alone
    runs, centres = grown(x, [RUN + 1, 2])
    assert runs == [1, RUN, 2]
    assert_close(centres[2], x[0, RUN + 3 - RUN // 2:RUN + 3].mean(0), atol=0.2, rtol=0)


def test_what_all_entries_have_in_common_costs_nothing():
    x = noise(1, 200, 16)
    far = x + 40 * noise(16, seed=1)
    error = [float((flat(pack(y)).dense() - y[0]).square().mean()) for y in (x, far)]
    without = Codes.of(far[0], Form(4, 16)).dense() - far[0]
    assert error[1] < 1.2 * error[0] and error[1] < without.square().mean() / 50


def test_entries_packed_again_among_others_join_their_run():
    """Every third entry has changed, as a merge does, and twenty are new."""
    x = noise(2, 100, 16) + 5
    before = flat(pack(x[:, :80]))
    source = torch.arange(160).view(2, 80).clone()
    source[:, ::3] = -1
    entries = torch.cat([before.dense().view(2, 80, 16), x[:, 80:]], 1)
    codes = pack(entries, before, torch.cat([source, torch.full((2, 20), -1)], 1)).codes
    assert codes.runs.tolist() == [1, 99] * 2
    kept = source.flatten() >= 0
    same = torch.cat([source, torch.full((2, 20), -1)], 1).flatten() >= 0
    assert torch.equal(codes.words[same], before.codes.words[kept])
    assert_close(codes.dense(), entries.flatten(0, 1), atol=0.3, rtol=0)


@pytest.mark.parametrize("form", [FORM, Form(3, 8, centre=True), Form(3, 16, lloyd=True, centre=True)], ids=str)
def test_logits_get_the_centres_back_whichever_entries_are_left(form):
    """Runs that are cut by lanes, by slices and masks, and rows that come twice."""
    x, rows = noise(1, 60, 16) + 5, noise(3, 2, 16)
    of = torch.tensor([0] * 7 + [1] * 25 + [2] * 28)[None]
    centres = (noise(3, 16, seed=2) + 5).bfloat16()
    codes = Codes.of(x[0] - centres[of[0]].float(), form).around(of[0], centres)
    assert_close(codes.dense(), x[0], atol=1.5, rtol=0)
    mixed = Mixed.of(torch.ones(60, dtype=torch.bool), codes, x[0, :0])
    twice = torch.arange(5, 25).repeat(3)
    for some in (mixed, mixed[3:33], mixed[torch.arange(60) % 2 == 0], mixed[twice], mixed[twice][10:40]):
        want = rows @ some.dense().view(3, -1, 16).transpose(1, 2)
        assert_close(some.products(rows), want, atol=1e-4, rtol=1e-4)
        assert_close(some.dense(), mixed.dense()[_index(some, mixed)])
    assert mixed[3:33].codes.runs.tolist() == [4, 25, 1] and mixed[twice].codes.runs.tolist() == [2, 18] * 3


def _index(some, mixed):
    """Where the entries of a selection lie, found by their bytes and values."""
    return torch.stack([(mixed.dense() - entry).abs().amax(1).argmin() for entry in some.dense()])


def test_beams_of_one_head_and_a_fork_keep_their_centres():
    model, tokens = make("llama", num_key_value_heads=1), ids(2, 40)
    with runtime.attached(model, kv.Knorm(budget=20), kv.Quant(residual=4, every=4)), torch.no_grad():
        cache = model(tokens[:1, :30], use_cache=True).past_key_values
        alone = model(tokens[:1, 30:31], past_key_values=cache.fork()).logits
        cache.batch_repeat_interleave(3)
        held = cache.layers[0].kept.keys
        assert held.codes.centres.shape[0] == len(held.codes.runs) and len(held.codes.runs) % 3 == 0
        three = model(tokens[:1, 30:31].expand(3, 1), past_key_values=cache).logits
    assert_close(three, alone.expand_as(three), atol=1e-5, rtol=1e-4)


def test_a_long_answer_in_small_steps_holds_few_centres():
    """Entries packed one by one, the oldest dropped: as many runs as half of them would fill, and their bytes told."""
    model, tokens = make("llama"), ids(1, 260)
    methods = kv.Streaming(budget=100, sinks=4, every=1), kv.Quant(residual=0, every=1)
    with runtime.attached(model, *methods), torch.no_grad():
        cache = model(tokens[:, :60], use_cache=True).past_key_values
        for at in range(60, 260):
            model(tokens[:, at:at + 1], past_key_values=cache)
    codes = cache.layers[0].kept.keys.codes
    assert len(codes.runs) <= 2 * 4 and int(codes.runs.sum()) == len(codes)
    assert any(t is codes.centres for t in cache.layers[0].entries())
