"""`compress --dry-run`: what a recipe will do, how large its checkpoint will be, what that takes of memory and of time.

Sizes follow from shapes. Time and memory are measured: each step works on one of the model's blocks for real, with the
recipe's own calibration data, under the memory gauge; what comes of it is saved and verified in a temporary folder that
is gone afterwards. The other blocks take as long, and leave as much behind.
"""
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from llmopt.calibration import data
from llmopt.calibration.head_scores import check_known
from llmopt.checkpoint import save as checkpoint
from llmopt.checkpoint.streamed import StreamedWeights
from llmopt.errors import BudgetError, LlmoptError, naming
from llmopt.files import shards
from llmopt.forecast.memory import Peak, advice, code_bytes, held_bytes, private_bytes
from llmopt.forecast.sampling import Foretaste
from llmopt.forecast.size import Prediction, predict
from llmopt.forecast.times import Loops, Span, Times, Watch, timed
from llmopt.method import UNCHANGED, Method, Run
from llmopt.model import levels, state
from llmopt.model.blocks import blocks, layer_list
from llmopt.model.computing import computing
from llmopt.model.head_numbers import HeadNumbers
from llmopt.model.heap import give_back_freed
from llmopt.model.loading import local_folder
from llmopt.model.usable import check_numbers
from llmopt.model.ways import view
from llmopt.model.weights import coded
from llmopt.recipe.reader import Recipe
from llmopt.run.calibrating import load_batches, needs_data
from llmopt.run.foretold import Foretold
from llmopt.run.opening import Streaming, cut_short, open_model, refuse_whole
from llmopt.run.pipeline import streamed_saving
from llmopt.runtime.attach import attached
from llmopt.runtime.rehearsal import cache_bytes_per_token
from llmopt.scale.available import available
from llmopt.scale.gauge import Gauge
from llmopt.scale.journal import Journal, checksum
from llmopt.scale.stream import Streamed
from llmopt.specs import ModelSpec

INFLATED = 3        # a byte of a weight that is packed, and inflated to be verified, takes the time of so many others


def dry_run(recipe: Recipe, streaming: Streaming = Streaming()) -> Foretold:     # noqa: B008  frozen
    """All that `compress --dry-run` prints, ready for JSON; nothing that is written remains."""
    if needs_data(recipe.steps):
        data.check_source(recipe.data)
    free = available()
    with TemporaryDirectory(prefix="llmopt-dry-run-") as folder, Gauge() as gauge:
        watch = Watch()
        room = streaming.room(recipe.model)
        model, tokenizer, memory = open_model(recipe.model, recipe.format, Journal(Path(folder)), streaming)
        streamed = isinstance(memory, Streamed)
        refuse_whole(model, recipe.steps, recipe.data, 0 if streamed else room)
        sampler = Foretaste(model, tokenizer)
        batches = load_batches(recipe.data, recipe.steps, recipe.model, sampler)
        run = Run(batches, seed=recipe.seed, tokenizer=tokenizer, memory=memory)
        told = predict(model, list(recipe.steps), recipe.format, run, recipe.max_shard_size)
        dense, level = shards.file_bytes(state.plain_state(model)), levels.described(model)
        rehearsal = Rehearsal(recipe.steps, model, run, told, gauge)
        rehearsal.note("load", watch.read(), "measured")
        if sampler.spent.high:
            rehearsal.times.add("sampling calibration rows", sampler.spent, "first tokens of them, measured")
        with computing(model):
            rehearsal.play(recipe.model, recipe.format, recipe.max_shard_size)
    peaks, seconds = rehearsal.peaks, rehearsal.times
    highest = max(peaks, key=lambda peak: peak.private)
    return Foretold({
            "model": recipe.model.id, "level": level, "streamed": streamed, "steps": told.steps, "dense_bytes": dense,
            "predicted_bytes": told.bytes, "predicted_memory": highest.private, "available_memory": free,
            "predicted_seconds": seconds.total, "peaks": [list(peak) for peak in peaks], "seconds": seconds.parts,
            "advice": [*told.needs, *advice(highest, free, streamed, bool(run.batches))]})


class Rehearsal:
    """The parts of a run one after the other, on one block of its model; `play` cuts the others off.

    elsewhere: private bytes of the blocks that are not there, as the steps so far would have left them. A part takes
    what it was seen to take, and that. left: private bytes that steps have added to all blocks, those there included.
    alone: the block that is there makes a model of its kind, which can be saved and verified.
    """

    def __init__(self, steps: Sequence[Method], model: nn.Module, run: Run, told: Prediction, gauge: Gauge):
        self.steps, self.model, self.run, self.told, self.gauge = steps, model, run, told, gauge
        self.streamed = isinstance(run.memory, Streamed)
        self.elsewhere, self.left, self.times, self.peaks, self.alone = 0, 0, Times(), [], True

    def note(self, part: str, spent: Span, origin: str, more: int = 0) -> None:
        """Add a part that has just been done; more: bytes that it would take for the blocks that are not there."""
        self.times.add(part, spent, origin)
        self.peaks.append(Peak(part, self.gauge.lap().private + self.elsewhere + more))

    def play(self, spec: ModelSpec, format: str, max_shard_size: str) -> None:
        """Note all parts but loading; format, max_shard_size: of the checkpoint."""
        model, steps = self.model, list(enumerate(self.steps))
        self.note("checksums of the model", *_summing(view.files(local_folder(spec))))
        self.note("cache before and after", timed(cache_bytes_per_token, model) * 2, "measured")
        forward = timed(check_numbers, model)
        self.note("check", forward, "measured")
        check_known(self.steps, self.run, model)
        acting = self._on_all_blocks(steps)
        weights, block = _block_bytes(model), _typical(model, self.told)
        self._cut(block)
        forwards = forward.high / max(timed(check_numbers, model).high, 1e-9)
        by_block = [(i, step) for i, step in steps if step.stage != "runtime" and not _needs_all(step)]
        for last in (False, True):          # steps that take whole parts come last: the others need all of the block
            for i, step in by_block:
                if self.told.takes_parts(i) == last:
                    self._one_block(i, step, forwards)
            if not last:
                spent = self._saved(weights, block, format, max_shard_size)
                if self.streamed:
                    more = streamed_saving(model, spec, self.told, max_shard_size)
                else:
                    more = self._inflated(format)
                self.note("save and verify", spent, "of one block, measured; the others by their bytes", more)
        self.peaks += [Peak(part, private + self.left) for part, private in acting]

    def _on_all_blocks(self, steps: list[tuple[int, Method]]) -> list[Peak]:
        """Rehearse the steps that look at all blocks; peaks of those that act at run time, which come behind all edits.

        Scores that go block by block are taken too, not noted: a step behind them may read those of all blocks.
        """
        acting, last = [], max((i for i, step in steps if _needs_all(step)), default=-1)
        for i, step in steps[:last + 1]:
            if _needs_all(step):
                self._whole(i, step)
                if step.stage == "runtime":
                    acting.append(self.peaks.pop())
            elif step.stage == "score":
                self._applied(i, step, step.sample(self.run).run)
            if step.stage == "score" and step.sample(self.run).times == 1:      # of a part they may be others
                check_known(self.steps, self.run, self.model)
        return acting

    def _whole(self, index: int, step: Method) -> None:
        """A step on the whole model, by a part of its data; what it attaches comes off again."""
        sample = step.sample(self.run)
        with attached(self.model):
            spent = self._applied(index, step, sample.run)
        if sample.run.replays is not self.run.replays:              # one text stands for all
            self.run.replays = sample.run.replays * round(sample.times)
        self.note(f"steps.{index} {step.name}", spent * sample.times, f"{sample.what}, measured")

    def _cut(self, block: int) -> None:
        """Leave one block, and its part of what the run knows."""
        before, self.run.layers = private_bytes(self.model), len(layer_list(self.model))
        numbers = HeadNumbers.of(block.heads for block in blocks(self.model))
        self.run.heads = HeadNumbers(numbers.before, numbers.left[block:block + 1])
        self.alone = cut_short(self.model, [block], self.streamed)
        self.run.scores = {name: scores[block:block + 1] for name, scores in self.run.scores.items()}
        self.elsewhere = before - private_bytes(self.model)
        give_back_freed()                           # by steps on all blocks: it is not the next step's
        self.gauge.lap()

    def _one_block(self, index: int, step: Method, forwards: float) -> None:
        """A step on the block that is there. forwards: what one of the whole model takes, in those of this block."""
        count, layers = len(self.told.layers[index]), layer_list(self.model)
        before, codes = sum(map(private_bytes, layers)), sum(map(code_bytes, layers))
        loops = self.run.progress = Loops(lambda: self.gauge.lap().private)
        spent = self._applied(index, step, self.run, self.told.takes_parts(index))
        loops.look()
        added = sum(map(private_bytes, layers)) - before
        stays = (count - 1) * added
        codes = (count - 1) * (sum(map(code_bytes, layers)) - codes)        # hung on the blocks after all trials
        spent, part = loops.scaled(spent, count, forwards), f"steps.{index} {step.name}"
        streams = 0 if self.streamed else (count - 1) * max(0, loops.high_trials - loops.high)
        trials = loops.high_trials + max(0, stays - codes) + streams        # the hidden states of each block's trials
        self.times.add(part, spent, f"one of {count} blocks, measured")
        held = 0 if self.streamed else (count - 1) * held_bytes(step, self.model, self.run.batches)
        self.peaks.append(Peak(part, self.elsewhere + max(loops.high + max(0, stays) + held, trials)))
        self.elsewhere, self.left = self.elsewhere + stays, self.left + added + stays

    def _applied(self, index: int, step: Method, run: Run, parts: bool = False) -> Span:
        """The time a step takes; parts: it removes whole parts of the model, which one block may not have to spare."""
        run.ahead = self.steps[index + 1:]
        at = len(layer_list(self.model)) * len(self.steps) + index
        run.memory.begin(at)                        # what was decided for all blocks, or all data, is not for this one
        watch = Watch()
        with naming(f"steps.{index} {step.name}"):
            if step.needs_data and not run.batches:
                raise LlmoptError("needs calibration data, and none was given")
            with suppress(LlmoptError if parts else BudgetError):
                step.apply(self.model, run)
        return watch.read()

    def _saved(self, dense: list[int], block: int, format: str, max_shard_size: str) -> Span:
        """The time of saving and verifying the block, and the others by their bytes; dense: see _block_bytes."""
        folder = self.run.memory.journal.folder / "saved"
        streamed = StreamedWeights(self.model, self.run.memory) if self.streamed else None
        weights = streamed or checkpoint.Weights(self.model, format)
        slow = INFLATED if state.packs(self.model, format) else 1
        if self.alone:
            spent = timed(lambda: checkpoint.save(self.model, folder, max_shard_size=max_shard_size, weights=weights))
        else:
            folder.mkdir()
            spent = timed(weights.write, folder, max_shard_size) * 2                # and read back
        rest, *layers = dense
        scale = (rest + slow * sum(layers)) / (rest + slow * layers[block])
        if self.streamed:                       # compared as bytes
            scale = self.told.bytes / shards.written_bytes(folder)
        return spent * scale

    def _inflated(self, format: str) -> int:
        """Bytes that saving takes for the blocks that are not there: in memory, what the fresh model inflates."""
        found = [weight for layer in layer_list(self.model) for weight in coded(layer)]
        inflated = sum(weight.weight.nbytes for weight in found) if state.packs(self.model, format) else 0
        return (len(self.told.layers[-1]) - 1) * inflated


def _typical(model: nn.Module, told: Prediction) -> int:
    """Of the blocks that most steps reshape the first of the kind that most are of: some begin with another one."""
    kinds = [tuple((name, p.shape) for name, p in layer.named_parameters()) for layer in layer_list(model)]
    cuts = [[old != new for old, new in zip(before, after, strict=True)]
            for step, (before, after) in enumerate(pairwise(told.layers))
            if len(before) == len(kinds) and not told.takes_parts(step)]
    return max(range(len(kinds)), key=lambda index: (sum(own[index] for own in cuts), kinds.count(kinds[index])))


def _block_bytes(model: nn.Module) -> list[int]:
    """Bytes of the weights outside the blocks, then of each block."""
    layers = [shards.tensor_bytes(dict(layer.named_parameters())) for layer in layer_list(model)]
    return [shards.tensor_bytes(dict(model.named_parameters())) - sum(layers), *layers]


def _summing(files: list[Path]) -> tuple[Span, str]:
    """(seconds, origin) of going through the bytes of all files, from the first."""
    sizes = [file.stat().st_size for file in files]
    return timed(checksum, files[0]) * (sum(sizes) / sizes[0]), f"first of {len(files)} files, measured"


def _needs_all(step: Method) -> bool:
    """True for a step that looks at all blocks and changes none."""
    return step.needs_whole and step.stage in UNCHANGED
