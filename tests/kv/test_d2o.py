"""D2O's merging: a threshold on likeness, which is a moving average over compressions."""
from dataclasses import replace

import torch
from llmopt_kernels import NONE
from torch.testing import assert_close

from llmopt import kv, runtime
from llmopt.runtime.cache_layer import Entries
from tests.kv.mergers import assert_padded_rows_equal_rows_alone, assert_same_entries_as_evicted, at_random
from tests.tiny import make


def test_by_hand_over_two_compressions():
    """Likenesses .8 (to the first) and .936 (to the fourth), mean .868: the latter is merged. Then .6 alone."""
    keys = torch.tensor([[[1., 0.], [0.8, 0.6], [0.28, -0.96], [0.6, -0.8], [1., 0.]]])
    values = torch.tensor([[[1., 0.], [0., 1.], [5., 5.], [2., 0.], [9., 9.]]])
    given = Entries(keys, values, torch.tensor([[0, 1, 2, 3, NONE]]))
    first = kv.D2O(merge_keys=False).reduce(None, given, torch.tensor([[True, False, False, True, False]]), None)
    assert first.positions.tolist() == [[0, NONE, NONE, 3, NONE]]
    assert_close(first.carried["d2o"][0, 0], torch.tensor(1.868))
    assert_close(first.values[0, [0, 3]], torch.tensor([[1., 0.], [(2 + 0.936 * 5) / 1.936, 0.936 * 5 / 1.936]]))
    tau = float(first.carried["d2o"][0, 0]) - 1
    for rate, merged in ((0.5, False), (1.0, True)):            # half of the old threshold is more than .6, none is not
        left = kv.D2O(rate=rate).reduce(None, first, torch.tensor([[True, False, False, False, False]]), None)
        assert_close(left.carried["d2o"][0, 0], torch.tensor(1 + (1 - rate) * tau + rate * 0.6))
        assert torch.equal(left.values[0, 0], first.values[0, 0]) != merged
    assert_close(left.keys[0, 0], torch.tensor([(1 + 0.6 * 0.6) / 1.6, -0.6 * 0.8 / 1.6]))


def test_a_head_that_drops_nothing_keeps_its_threshold_and_equal_entries_stay_what_they_are():
    given, keep, scores = at_random()
    everything = torch.ones_like(keep)
    left = kv.D2O().reduce(None, given, everything, scores)
    assert torch.equal(left.keys, given.keys) and left.carried["d2o"].unique().tolist() == [0.0]
    once = kv.D2O().reduce(None, given, keep, scores)
    again = kv.D2O().reduce(None, once, once.positions != NONE, scores)
    assert_close(again.carried["d2o"], once.carried["d2o"])
    same = replace(given, keys=given.keys[:, :1].expand(-1, 40, -1), values=given.values[:, :1].expand(-1, 40, -1))
    left = kv.D2O().reduce(None, same, keep, scores)
    assert_close(left.keys, same.keys)
    assert_close(left.values, same.values)


def test_padded_rows_equal_rows_alone_and_memory_is_freed():
    assert_padded_rows_equal_rows_alone(kv.H2O(budget=12, sinks=2, reduce="d2o"))
    assert_same_entries_as_evicted(kv.H2O(budget=12, sinks=2, reduce="d2o"), keys=False)
    assert_same_entries_as_evicted(kv.H2O(budget=12, sinks=2, reduce={"d2o": {"merge_keys": False}}))


def test_one_entry_at_a_time_while_decoding():
    """With one entry dropped a token, its own likeness alone would always pass; the carried threshold stops some."""
    ids, texts = torch.arange(40).view(1, -1), []
    for rate in (0.1, 1.0):
        with runtime.attached(make("llama"), kv.H2O(budget=12, every=1, reduce={"d2o": {"rate": rate}})) as model:
            out = model.generate(ids, max_new_tokens=9, min_new_tokens=9, do_sample=False, pad_token_id=0,
                                 output_logits=True, return_dict_in_generate=True)
            texts.append(torch.stack(out.logits))
    assert not torch.allclose(texts[0], texts[1])
