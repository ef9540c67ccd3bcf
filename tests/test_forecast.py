"""What a dry run says of memory and time is what a run takes; it really works, on one block, and leaves nothing."""
import json
import mmap
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
import torch
from llmopt_evals.synthetic import write
from transformers import LlamaConfig

import llmopt
from llmopt import progress, recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.errors import LlmoptError
from llmopt.forecast import times
from llmopt.forecast.memory import Peak, advice, held_bytes, private_bytes, whole_bytes
from llmopt.heads import Gradient, Hess
from llmopt.kv import SnapKV
from llmopt.kv.fisher import CHUNK, Fisher
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.model.codes import Quantized
from llmopt.model.loading import load_dense
from llmopt.progress import Clock
from llmopt.prune import Magnitude, Taylor
from llmopt.quant import RTN
from llmopt.run.dry_run import Rehearsal, dry_run
from llmopt.run.foresight import Foresight
from llmopt.run.opening import Streaming, _works
from llmopt.scale import pages
from llmopt.scale.gauge import Gauge, Taken, taken
from llmopt.specs import ModelSpec
from tests import plans, tiny
from tests.command import llmopt as command
from tests.test_contract import FIELDS, family_for, own_fields

ROWS = tiny.ids(16, 96).tolist()


@pytest.fixture(scope="module")
def middling(tmp_path_factory):
    """A folder with a model of one block whose Hessians are what counts, and calibration rows."""
    folder = tmp_path_factory.mktemp("middling")
    write(LlamaConfig(vocab_size=4000, hidden_size=512, intermediate_size=3072, num_hidden_layers=1,
                      num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512), folder / "model")
    (folder / "ids.jsonl").write_text("\n".join(map(str, ROWS)))
    (folder / "r.yaml").write_text(f"model: {{id: {folder / 'model'}}}\ndata: {{name: ids, path: {folder / 'ids.jsonl'}"
                                   "}\nsteps: [quant.gptq: {bits: 4, clip: false}]\n")
    return folder


@pytest.mark.full          # it measures a process
@pytest.mark.parametrize("way", ["--stream", "--no-stream"])
def test_memory_is_what_was_predicted(way, middling, tmp_path):
    run = command("compress", "--recipe", middling / "r.yaml", "--output", tmp_path / "out", way, "--json")
    assert run.returncode == 0, run.stderr
    predicted, measured = json.loads(run.stdout)["predictions"]["memory"]
    assert predicted == pytest.approx(measured, rel=0.25)
    told = command("compress", "--recipe", middling / "r.yaml", "--dry-run", way, "--json")
    assert json.loads(told.stdout)["predicted_memory"] == pytest.approx(measured, rel=0.25)
    assert f"memory: {predicted:,} predicted, {measured:,} measured" in (tmp_path / "out/llmopt.log").read_text()
    assert "predictions" not in (tmp_path / "out/llmopt.json").read_text()


def test_a_gauge_sees_what_comes_and_goes():
    with Gauge() as gauge:
        before = taken(psutil.Process())
        block = torch.ones(50_000_000)
        time.sleep(0.2)
        del block
        assert abs(gauge.look().private - 200_000_000) < 20_000_000
        assert taken(psutil.Process()).private - before.private < 20_000_000


def test_large_tensors_lie_on_pages_of_their_own():
    """torch reads the setting when it makes its first tensor: importing llmopt must not make one."""
    code = ("import llmopt.cli; from llmopt.scale.gauge import whole_pages; whole_pages(); import torch; "
            "print([torch.ones(n).data_ptr() % 4096 for n in (2**20, 2**22)])")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[0, 0]\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: clock[0]."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(("lasts", "seconds"), [([3, 9, 9, 9], 12), ([5], 5), ([], 0)])
def test_the_first_item_foretells_its_loop(clock, lasts, seconds):
    pace = Clock()
    for last in pace(lasts, "items"):
        clock[0] += last
    assert pace.seconds == seconds


STEPS = ("[heads.gradient: {}, prune.magnitude: {ratio: 0.3, units: [ffn]}, "
         "quant.gptq: {bits: 3.5, group_size: 8, allocate: lim, clip: false}, kv.snapkv: {ratio: 0.5, window: 8}]")
CASES = [*((family, STEPS) for family in ("llama", "gemma3_text", "phi3", "gpt2")),
         *((family, "[quant.rtn: {group_size: 8}]") for family in ("mixtral", "qwen2_moe")),
         *(("llama", f"[prune.magnitude: {{ratio: 0.4, units: [{unit}], scope: {scope}}}]") for unit, scope in
           (("blocks", "local"), ("attention, mlp", "local"), ("ffn", "global"))),
         *(pytest.param(family_for(name, "llama"), json.dumps([
             *({before: given} for before, given in own_fields(name, "BEFORE").items()), {name: FIELDS.get(name, {})}]),
                        marks=pytest.mark.full if number % 5 else [])
           for number, name in enumerate(llmopt.names()))]


ONE_BLOCK_TOO_FEW = ("prune.depth", "prune.fuse")                   # of one block none may leave, and nothing is timed


@pytest.mark.parametrize(("family", "steps"), CASES)
def test_a_dry_run_works_on_one_block_and_leaves_nothing(family, steps, tmp_path, monkeypatch):
    model = checkpoint.save(tiny.make(family), tmp_path / "model", max_shard_size="60KB")
    (tmp_path / "ids.jsonl").write_text("\n".join(map(str, tiny.ids(8, 24).tolist())))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    plan = recipe.parse(f"model: {{id: {model}}}\ndata: {{name: ids, path: {tmp_path / 'ids.jsonl'}}}\n"
                        f"format: {'dense' if family == 'gpt2' else 'portable'}\nsteps: {steps}\n", "test.yaml")
    for streamed in {False, not any(step.needs_whole for step in plan.steps)}:
        told = dry_run(plan, Streaming(streamed))
        spent = {part.split()[1]: seconds for part, _, seconds, _ in told["seconds"] if part.startswith("steps.")}
        assert spent.keys() == {step.name for step in plan.steps if step.stage != "runtime" or step.needs_whole}
        assert all(seconds > 0 for name, seconds in spent.items() if name not in ONE_BLOCK_TOO_FEW)
        assert told["predicted_seconds"] == pytest.approx([sum(part[which] for part in told["seconds"])
                                                           for which in (1, 2)])
        assert told["predicted_seconds"][0] <= told["predicted_seconds"][1]
        assert told["predicted_memory"] == max(private for _, private in told["peaks"])
    assert list(scratch.iterdir()) == []


def test_what_one_block_cannot_do_is_told_from_a_fault_of_ours():
    def foreign():
        raise KeyError("layers.1")

    def refused():
        raise LlmoptError("one layer is too few")

    assert [_works(do) for do in (foreign, refused, dict)] == [False, False, True]
    with pytest.raises(AttributeError):
        _works(private_bytes, None)


def test_too_little_memory_is_said_with_what_helps():
    told = Peak("steps.0 quant.gptq", 5 * 10**9)
    assert advice(told, 5 * 10**9, streamed=False, batches=True) == []
    said, = advice(told, 4 * 10**9, streamed=False, batches=True)
    assert said == ("steps.0 quant.gptq will take 5.0 GB, 4.0 GB are available; what helps: --stream, fewer "
                    "data.samples, a smaller data.batch_size or data.length, a machine with more memory")
    assert "--activation-memory" in advice(told, 4 * 10**9, streamed=True, batches=False)[0]


def test_a_lap_forgets_the_peaks_before_it(monkeypatch):
    levels = iter([Taken(100), Taken(900), Taken(300), Taken(200), Taken(250)])
    monkeypatch.setattr("llmopt.scale.gauge.taken", lambda process: next(levels))
    gauge = Gauge()
    gauge.start = Taken(100)
    gauge.look()
    gauge.look()
    assert (gauge.lap(), gauge.peak) == (Taken(800), Taken(800))
    assert (gauge.lap(), gauge.peak) == (Taken(100), Taken(800))
    assert gauge.lap() == Taken(150)


def test_weights_are_private_once_they_are_no_longer_their_file_s(tmp_path):
    model, _ = load_dense(ModelSpec(str(checkpoint.save(tiny.make("llama"), tmp_path / "model"))))
    first, second = (block.projections()[0] for block in blocks(model)[:2])
    size = first.weight.nbytes
    before = private_bytes(model)                           # norms that share a page with something else
    assert before < 2000
    first.weight[32:33] += 1                                  # not counted by torch
    assert 0 < private_bytes(first.module) < size or mmap.PAGESIZE > 4096
    first.write(first.weight.clone())                       # the same values on pages of its own
    assert private_bytes(first.module) == size
    second.keep(rows=torch.arange(32))
    assert private_bytes(second.module) == size / 2
    first.codes = Quantized(torch.zeros(5, dtype=torch.int8), torch.zeros(3), 4, -1)
    assert private_bytes(first.module) == size + 5 + 12
    assert private_bytes(model) - before == pytest.approx(1.5 * size + 17, abs=2000)
    assert private_bytes(model.to("meta")) == 5 + 12


def test_where_the_system_does_not_tell_all_is_private(monkeypatch, tmp_path):
    monkeypatch.setattr(pages, "PAGEMAP", tmp_path / "none")
    assert pages.private_bytes(12345, 678) == 678


@pytest.fixture
def plan(tmp_path):
    """A recipe of one RTN step on a model of 3 blocks."""
    model = checkpoint.save(tiny.make("llama"), tmp_path / "model")
    return recipe.parse(f"model: {{id: {model}}}\nsteps: [quant.rtn: {{group_size: 16}}]\n", "r.yaml")


@pytest.mark.parametrize("streamed", [False, True])
def test_memory_that_no_author_declared_is_seen_in_a_dry_run(plan, streamed, monkeypatch):
    plain, seen = RTN.quantize, []

    def hungry(self, weight, *rest):
        block = torch.ones(40_000_000)
        time.sleep(0.05)
        del block
        return plain(self, weight, *rest)

    monkeypatch.setattr(RTN, "quantize", hungry)
    play = Rehearsal.play
    monkeypatch.setattr(Rehearsal, "play", lambda self, *rest: (seen.append(self), play(self, *rest)))
    told = dry_run(plan, Streaming(streamed))
    assert dict(told["peaks"])["steps.0 quant.rtn"] == pytest.approx(160_000_000, rel=0.2)
    layer = blocks(tiny.make("llama"))[0]
    weights = sum(p.weight.nbytes + p.weight.numel() * (1 + 2 / 16) for p in layer.projections())
    assert seen[0].elsewhere == (0 if streamed else pytest.approx(2 * weights, rel=0.02))   # the other two blocks
    assert seen[0].left == (0 if streamed else 1.5 * seen[0].elsewhere)
    dense = sum(p.weight.nbytes for p in layer.projections())
    assert streamed or seen[0]._inflated("portable") == 2 * dense       # what the fresh model inflates


def test_what_a_cache_method_learns_is_seen_on_one_of_its_texts(plan, tmp_path, monkeypatch):
    """Of the 4 texts that heads.replay reads, one stands for all; scores that go block by block may come before."""
    plain = Fisher.gains

    def hungry(*given):
        block = torch.ones(40_000_000)
        time.sleep(0.2)
        del block
        return plain(*given)

    monkeypatch.setattr(Fisher, "gains", hungry)
    (tmp_path / "ids.jsonl").write_text("\n".join(map(str, ROWS)))
    steps = recipe.parse(f"data: {{name: ids, path: {tmp_path / 'ids.jsonl'}}}\nsteps: [heads.replay: {{length: 384}}, "
                         "heads.span: {}, quant.rtn: {group_size: 16}, kv.kvzap: {ratio: 0.5, allocate: fisher}]", "r")
    told = dry_run(replace(plan, steps=steps.steps, data=steps.data))
    part, _, high, origin = next(row for row in told["seconds"] if row[0] == "steps.3 kv.kvzap")
    assert 0.8 < high < 8 and origin == "first of 4 texts, measured"
    assert dict(told["peaks"])[part] == pytest.approx(160_000_000, rel=0.2) == told["predicted_memory"]
    with pytest.raises(LlmoptError, match="steps.0 kv.kvzap: kv.kvzap needs the step heads.replay before it"):
        dry_run(replace(plan, steps=steps.steps[3:], data=steps.data))


def test_a_part_takes_what_was_seen_and_what_the_other_blocks_would_add():
    rehearsal = Rehearsal.__new__(Rehearsal)
    rehearsal.__dict__ |= {"gauge": Ticks(), "elsewhere": 4, "times": times.Times(), "peaks": []}
    rehearsal.note("saving", times.Span(1, 2.0004), "measured", more=3)
    assert rehearsal.peaks == [("saving", 57)] and rehearsal.times.parts == [["saving", 1, 2, "measured"]]


def test_a_step_that_takes_whole_parts_leaves_them_to_the_others(plan):
    plan = replace(plan, steps=(Magnitude(ratio=0.4, units=["mlp"]), *plan.steps))
    parts = [part for part, *_ in dry_run(plan)["seconds"]]
    assert parts[-3:] == ["steps.1 quant.rtn", "save and verify", "steps.0 prune.magnitude"]


class Ticks:
    """A gauge, and the model, in a run whose every block leaves 10 bytes, and 100 while it is at work."""

    def __init__(self):
        self.left, self.high = 50, 0

    def work(self):
        self.high, self.left = max(self.high, self.left + 100), self.left + 10

    def lap(self):
        found, self.high = max(self.high, self.left), 0
        return Taken(found)

    def now(self):
        return Taken(self.left)


def test_the_first_block_of_a_run_foretells_the_memory_of_all(caplog, monkeypatch):
    caplog.set_level("INFO", "llmopt")
    ticks, told = Ticks(), []
    monkeypatch.setattr("llmopt.run.foresight.private_bytes", lambda ticks: ticks.left)
    monkeypatch.setattr("llmopt.run.foresight.FLOOR", 100)
    sight = Foresight(progress.silent, ticks, ticks, 7)
    assert sight.peak == 57
    for _ in sight(range(4), "first"):
        ticks.work()
        told.append(sight.peak)
    assert told == [57, 180, 180, 180] and ticks.left == 90             # 50 + 100, and 10 for each of three more
    for _ in sight(range(1), "second"):
        ticks.work()
    assert sight.peak == 190
    sight.saving = 1000
    list(sight(range(2), "third"))
    assert sight.peak == 1100
    assert [line.getMessage().partition(":")[0] for line in caplog.records] == ["first", "third"]


def test_a_time_is_a_range_from_the_processor_s_to_the_clock_s(clock, monkeypatch):
    monkeypatch.setattr(times.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(times.time, "process_time", lambda: 3 * clock[0] / 4)
    watch, loops = times.Watch(), times.Loops()
    clock[0] = 8
    assert watch.read() == times.Span(3, 8) == times.Span(1, 2) + times.Span(1, 3) * 2
    for items in ([4], [4, 4]):                             # a loop over the block, one over what is tried on all
        for last in loops(items, "loop"):
            clock[0] += last
    assert (loops.block, loops.trials) == (times.Span(1.5, 4), times.Span(3, 8))
    assert loops.scaled(times.Span(5, 13), 10, 3) == times.Span(0.5 + 15 + 60, 1 + 40 + 160)
    for _ in loops([4], "loop"):                            # with trials inside
        clock[0] += 4
        for last in loops([4, 4], "trials"):
            clock[0] += last
    assert (loops.block, loops.trials) == (times.Span(3, 8), times.Span(6, 16))


def test_trials_of_the_whole_model_grow_with_the_square_of_its_blocks(plan, monkeypatch):
    rehearsal = Rehearsal.__new__(Rehearsal)
    gauge = SimpleNamespace(lap=lambda: Taken(next(highest)))
    rehearsal.__dict__ |= {"elsewhere": 1000, "left": 0, "gauge": gauge, "times": times.Times(), "peaks": [],
                           "run": Run(), "told": SimpleNamespace(layers=[[None] * 5], takes_parts=lambda i: False)}

    def applied(index, step, run, parts):
        for items in ([1], [1, 2]):                 # a loop over the block, one over what is tried
            list(run.progress(items, "loop"))
        codes = Quantized(torch.zeros(2, 4, dtype=torch.int8), torch.ones(2, 1), 4, 4)              # of 8 + 8 bytes
        blocks(rehearsal.model)[0].projections()[0].codes = codes
        run.progress.block, run.progress.trials = times.Span(7, 16), times.Span(2, 3)
        return times.Span(10, 20)

    highest = iter([5, 30, 300, 40, 5, 500, 300, 40])       # before each loop, at the trials' end, at the end
    monkeypatch.setattr(rehearsal, "_applied", applied)
    for streamed in (False, True):
        rehearsal.streamed, rehearsal.elsewhere = streamed, 1000
        rehearsal.model = tiny.make("llama", num_hidden_layers=1)
        rehearsal._one_block(0, RTN(), 4.0)
    spans = [tuple(part[1:3]) for part in rehearsal.times.parts]
    assert spans == [(1 + 5 * (7 + 2 * 2.5), 1 + 5 * (16 + 3 * 2.5))] * 2           # a trial runs through half of them
    assert [peak.private for peak in rehearsal.peaks] == [1000 + 300 + 4 * (300 - 40), 1000 + 4 * 16 + 500]


def test_what_a_step_on_the_whole_model_takes_is_bounded_from_shapes():
    model = tiny.make("llama")
    few, more = (whole_bytes(Gradient(), model, rows, 50) for rows in (2, 4))
    assert more == 2 * few > 100 * 12 * tiny.VOCABULARY
    assert whole_bytes(Hess(), model, 2, 100) == few                # a row at a time
    chunks = [whole_bytes(SnapKV(ratio=0.5, allocate=name), model, 9, 100) for name in ("fisher", "captured")]
    assert chunks == [pytest.approx(few * CHUNK / 100, rel=1e-9), 0]


def test_a_step_that_goes_back_block_by_block_holds_what_each_reads():
    model, batches = tiny.make("llama"), [{"input_ids": tiny.ids(rows, 24)} for rows in (2, 5)]
    assert held_bytes(Taylor(), model, batches) == 5 * 24 * 64 * 4
    assert held_bytes(Magnitude(), model, batches) == held_bytes(Gradient(), model, batches) == 0
    assert held_bytes(Taylor(), model, None) == 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("family", "steps", "among"), [
    ("llama", "[quant.rtn: {group_size: 16, overrides: {'model.layers.2.mlp': {bits: 8}}, ignore: [layers.1]}]", None),
    ("glm4_moe", "[prune.experts: {ratio: 0.5}, quant.rtn: {group_size: 16, ignore: [self_attn]}]", "experts")])
def test_the_block_that_is_worked_on_stands_for_the_others(family, steps, among, streamed, tmp_path):
    """Names mean blocks that are gone, too; of a model whose first blocks have no experts, one that has is taken."""
    plan = plans.plan(tmp_path, plans.dense(tmp_path, family), steps)
    seen, apply = [], RTN.apply
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RTN, "apply", lambda self, model, run: seen.append(
            [p.name for block in blocks(model) for p in block.of_experts()]) or apply(self, model, run))
        told = dry_run(plan, Streaming(streamed))
    assert [len(names) for names in seen] == [4 if among else 0]            # two matrices of each of two experts
    spent = [part for part in told["seconds"] if part[0].startswith("steps.")]
    assert [part[3] for part in spent] == ["one of 3 blocks, measured"] * len(plan.steps) and spent[-1][1] > 0
