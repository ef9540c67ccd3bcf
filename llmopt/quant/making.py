"""Weight by weight: what its solver makes of it, by all processes together, and how it comes into the model."""
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from llmopt.calibration.beside import visits_beside
from llmopt.calibration.inputs import Inputs, Moments, Peak, Seen, each_weight, weights_of
from llmopt.calibration.missing import places
from llmopt.calibration.second_moments import energy
from llmopt.calibration.walk import Visit, visits
from llmopt.errors import LlmoptError, naming
from llmopt.method import Run
from llmopt.model.blocks import Projection, blocks
from llmopt.model.codes import Quantized
from llmopt.model.finite import all_finite
from llmopt.model.forms import FORMS
from llmopt.model.heap import give_back_freed
from llmopt.quant import kinds
from llmopt.quant.grid import Spec
from llmopt.quant.plan import Target
from llmopt.quant.settings import Settings
from llmopt.quant.zeros import held, live
from llmopt.scale.processes import Ranks

Wanted = Mapping[str, Sequence[Target]]         # by the name of a weight: what it is to be made into


@dataclass(frozen=True)
class Making:
    """The codes of a model's weights, as a step has them made."""

    step: Settings
    model: nn.Module
    run: Run

    def write_all(self, todo: Mapping[str, Target]) -> None:
        """The weights that `todo` names, one after the other, each from inputs behind those already written."""
        wholes, solver = kinds.Wholes(self.model, todo), self.step.solver
        if solver.inputs == "block":
            prepared = (solver.prepare(self.model, self.run), self._specs(todo)) if solver.whole else None
            for visit in self._stops(todo, edits=True):
                for projection, made in self._from_block(visit, todo, wholes):
                    self._write(todo[projection.name], projection, None, made, Ranks())
            if solver.whole:
                before, specs = prepared
                solver.finish(self.model, specs, self.run, before)
            return
        for projection, stats in each_weight(self.model, self.run, todo, self.step.name, self.collected):
            target = todo[projection.name]
            team, spec = self._team(projection, target), self._spec(projection, target, wholes)
            self._write(target, projection, stats, self._solve(projection, stats, spec, team), team)
            del stats                                       # not there while the next ones are gathered
            give_back_freed()

    def losses(self, wanted: Wanted, inputs: Inputs) -> Iterator[tuple[Target, float]]:
        """What each weight, as each of its targets, loses of its outputs as a share of all; nothing is written.

        Of its weights, where `inputs` are no moments, or the solver wants whole blocks. The dense model's inputs.
        """
        if self.step.solver.inputs == "block":
            for visit in self._stops(wanted, edits=False):
                yield from ((t, self._lost(p, None, q, Ranks())) for p, t, q in self._of_block(visit, wanted))
            return
        for p, stats in each_weight(self.model, self.run, wanted, f"{self.step.name}, trials", inputs, edits=False):
            yield from ((t, self._lost(p, stats, part, self._team(p, t)))
                        for t, part in self._variants(p, stats, wanted[p.name]))

    def trials(self, visit: Visit, wanted: Wanted) -> Iterator[tuple[Target, Quantized]]:
        """The weights of a block, visited with `data`, as each of their targets; nothing is written."""
        if self.step.solver.inputs == "block":
            yield from ((t, made) for _, t, made in self._of_block(visit, wanted))
            return
        for p, stats in weights_of(visit, self.run, wanted, self.collected):
            for target, part in self._variants(p, stats, wanted[p.name]):
                yield target, _whole(part, p, self._team(p, target))

    def _stops(self, todo: Collection[str], edits: bool) -> Iterator[Visit]:
        """The blocks and all rows, with the dense model's stream beside the edited one where the solver wants it."""
        run, dense = replace(self.run, ranks=Ranks()), self.step.solver.dense
        if edits and dense != "none":                       # else both streams are one
            seen = () if dense == "outputs" else todo
            return visits_beside(self.model, run, self.step.name, lambda b: places(b, seen, dense == "residual"))
        return visits(self.model, run, self.step.name, edits)

    @property
    def data(self) -> list[dict[str, Tensor]]:
        """The batches that this process must see for `trials`."""
        solver = self.step.solver
        return [] if solver.inputs == "none" else self.run.batches if solver.inputs == "block" else self.run.own_batches

    def _variants(self, projection: Projection, stats: Seen,
                  targets: Iterable[Target]) -> Iterator[tuple[Target, Quantized]]:
        """This process's rows of a weight as each of the targets."""
        for target in targets:
            spec = self._spec(projection, target)
            yield target, self._solve(projection, stats, spec, self._team(projection, target))

    def _of_block(self, visit: Visit, wanted: Wanted) -> Iterator[tuple[Projection, Target, Quantized]]:
        """From a solver of whole blocks: all weights at their first target, then at their second one."""
        known = [p.name for p in visit.block.projections() if p.name in wanted]
        for turn in range(max((len(wanted[name]) for name in known), default=0)):
            todo = {name: wanted[name][turn] for name in known if turn < len(wanted[name])}
            yield from ((p, todo[p.name], made) for p, made in self._from_block(visit, todo))

    def _from_block(self, visit: Visit, todo: Mapping[str, Target],
                    wholes: kinds.Wholes | None = None) -> Iterator[tuple[Projection, Quantized]]:
        """Codes from a solver of whole blocks; every process sees all rows. wholes: where the caller writes them."""
        chosen = [p for p in visit.block.projections() if p.name in todo]
        for p in chosen:
            _check_finite(p)
        with naming(visit.block.name):
            specs = {p.name: self._spec(p, todo[p.name], wholes) for p in chosen}
            for p, made in self.step.solver.quantize_block(visit, specs, self.run):
                made.figures |= held(specs[p.name].live)
                yield p, made

    def _spec(self, projection: Projection, target: Target, wholes: kinds.Wholes | None = None) -> Spec:
        """The grid of a dense weight, with the zeros that it is to keep."""
        spec = self.step.spec(target, projection.weight.dtype, wholes)
        return replace(spec, live=live(projection.weight, self.step.keep_zeros))

    def _specs(self, todo: Mapping[str, Target]) -> dict[str, Spec]:
        """The grids of all weights that `todo` names, while they are dense."""
        return {p.name: self._spec(p, todo[p.name]) for block in blocks(self.model) for p in block.projections()
                if p.name in todo}

    @property
    def collected(self) -> Inputs:
        """The statistics to collect of the inputs of each weight."""
        solver, static = self.step.solver, self.step.static
        kind = "peak" if static and solver.inputs == "none" else solver.inputs
        return Inputs(kind, peak=static, token_weights=solver.token_weights, dense=solver.dense,
                      min_tokens=self.step.min_tokens, all_experts=self.step.calibrate_all_experts)

    def _team(self, projection: Projection, target: Target) -> Ranks:
        """The processes that share the rows of this weight: all of them, or each by itself."""
        apart = self.step.solver.rowwise and FORMS[self.step.scheme_of(target).form].rows == 1
        ranks = self.run.ranks
        return ranks if apart and projection.out_features >= ranks.size else Ranks()

    @torch.no_grad()
    def _solve(self, projection: Projection, stats: Seen, spec: Spec, team: Ranks) -> Quantized:
        """This process's rows of a weight, quantized."""
        _check_finite(projection)
        with naming(projection.name):
            own = team.share(projection.weight).to(torch.float32, copy=True)
            own = own.contiguous()              # so that a row's last bits do not depend on how many others there are
            shared = replace(spec, live=None if spec.live is None else team.share(spec.live))
            made = self.step.solver.quantize(own, None if isinstance(stats, Peak) else stats, shared)
        made.figures |= held(spec.live)
        return made

    @torch.no_grad()
    def _write(self, target: Target, projection: Projection, stats: Seen, part: Quantized, team: Ranks) -> None:
        """Put the codes of which each of the team has some rows into the model, with what they cost."""
        rounded, sums = part.dequantize(projection.weight.dtype), self.step.solver.sums
        counts = {name: part.figures[name] for name in sums if name in part.figures}
        total = team.totals(counts | _energies(projection, stats, part, team))
        whole = _whole(part, projection, team)
        whole.figures |= {name: total[name] for name in sums if name in total}
        whole.figures |= stats.told if isinstance(stats, Moments) else {}
        whole.figures["weight_error"] = total["lost"] / max(total["all"], 1e-30)
        if isinstance(stats, Moments):
            whole.figures["output_error"] = total["lost output"] / max(total["all output"], 1e-30)
        kind = self.step.scheme_of(target)
        whole.inputs, whole.peak = kind.inputs, _peak(stats, projection) if kind.static else None
        projection.write(team.rows(rounded, projection.out_features))
        projection.codes = whole

    def _lost(self, projection: Projection, stats: Seen, part: Quantized, team: Ranks) -> float:
        total = team.totals(_energies(projection, stats, part, team))
        kind = " output" if isinstance(stats, Moments) else ""
        return total[f"lost{kind}"] / max(total[f"all{kind}"], 1e-30)


@torch.no_grad()
def _energies(projection: Projection, stats: Seen, part: Quantized, team: Ranks) -> dict[str, float]:
    """What this process's rows of a weight and, where there are moments, of its outputs hold, and what codes lose."""
    dense = team.share(projection.weight).float()
    change = part.dequantize(projection.weight.dtype).float() - dense
    counts = {"lost": float(change.square().sum()), "all": float(dense.square().sum())}
    if isinstance(stats, Moments):
        lost = 2 * part.figures["loss"] if "loss" in part.figures else energy(change, stats.hessian)
        counts |= {"lost output": lost, "all output": energy(dense, stats.hessian)}
    return counts


def _check_finite(projection: Projection) -> None:
    if not all_finite(projection.weight):
        raise LlmoptError(f"{projection.name}: the weight holds NaN or infinite values")


def _peak(stats: Seen, projection: Projection) -> float:
    """The largest input that was seen; raises LlmoptError where that is no number to make a range of."""
    seen = stats.largest if isinstance(stats, Moments) else stats
    peak = max((float(x.abs().max()) for x in seen if len(x)), default=0.0) if isinstance(seen, list) else seen.peak
    if not 0 < peak < float("inf"):
        raise LlmoptError(f"{projection.name}: the largest of its calibration inputs is {peak}, of which no range can "
                          "be made: more calibration data, or a scheme without a fixed range such as FP8_DYNAMIC")
    return peak


def _whole(part: Quantized, projection: Projection, team: Ranks) -> Quantized:
    """All rows of a weight of which each of the team has some."""
    codes, scales, zeros = (None if rows is None else team.rows(rows, projection.out_features)
                            for rows in (part.codes, part.scales, part.zeros))
    return replace(part, codes=codes, scales=scales, zeros=zeros)
