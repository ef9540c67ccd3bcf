"""The quantization step: which weights, at how many bits, the walk over blocks, the figures. A solver does the rest."""
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from llmopt.calibration.beside import visits_beside
from llmopt.calibration.missing import places
from llmopt.calibration.inputs import Inputs, Moments, Peak, Seen, each_weight
from llmopt.calibration.second_moments import energy
from llmopt.calibration.trial import Change, Trial, sample
from llmopt.calibration.walk import visits
from llmopt.errors import FieldError, LlmoptError, naming
from llmopt.files.json_shapes import finite
from llmopt.method import Method, Record, Run
from llmopt.model.blocks import Projection, blocks, spec_of
from llmopt.model.codes import DTYPES, Quantized
from llmopt.model.finite import all_finite
from llmopt.model.rounded_inputs import round_inputs
from llmopt.model.weights import coded
from llmopt.parts import Several
from llmopt.quant import floats, kinds, scores
from llmopt.quant.allocate import around, at_most, exact, two_level
from llmopt.quant.grid import Spec, round_to_nearest
from llmopt.quant.plan import DENSE, Share, Target, average_bits, effective_bits, targets, undecided
from llmopt.quant.solver import Solver
from llmopt.scale.gauge import give_back_freed
from llmopt.scale.processes import Ranks
from llmopt.specs import Dtype

Allocation = Literal["uniform", "lim", "zd", "sensitivity"]
Width = Annotated[int, Field(ge=2, le=8)] | Literal[16]
GroupSize = Annotated[int, Field(ge=1)] | Literal[-1]


class Override(TypedDict, total=False):
    """An entry of `overrides`, for the weights that a name matches."""

    bits: Annotated[Width, Field(description="16: as it is")]
    group_size: Annotated[GroupSize, Field(description="-1: one scale per output channel")]


@dataclass(frozen=True)
class Quantizer(Method):
    """Weights of the decoder blocks on grids of few numbers; embeddings and the output head stay as they are."""

    stage: ClassVar = "quant"
    place: ClassVar = "quantization step"
    meta_shape: ClassVar = {"bits": finite, "modules": {str: {"bits": finite, str: object}}, str: object}

    bits: int | float = Field(4, description="average over all weights quantized; a fraction: see allocate; 16: as is",
                              json_schema_extra={"minimum": 2, "maximum": DENSE})       # check() tells more
    group_size: GroupSize = Field(128, description="input columns that share a scale; -1: one scale per output channel")
    symmetric: bool = Field(True, description="no zero points")
    scheme: kinds.Name | None = Field(None, description="these three by a name, or small floats, rounded inputs")
    clip: bool = Field(True, description="search each scale for the least error (norm 2.4)")
    scale_dtype: Dtype | None = Field(None, description="null: the model's; in float32 float16, but for zero points")
    ignore: Several[str] = Field((), description="names, globs or endings of names that stay as they are")
    overrides: dict[str, Override] = Field(default_factory=dict, description="NAME: {bits: ..., group_size: ...}")
    allocate: Allocation = Field("uniform", description="who decides the bits of each block")
    widths: Several[Width] = Field((2, 3, 4, 8), description="bits to choose from; lim and zd take two around `bits`")
    seed: int = Field(0, description="picks the calibration rows on which `sensitivity` is measured")

    @model_validator(mode="before")
    @classmethod
    def _of_scheme(cls, given: Any) -> Any:
        return kinds.spelt_out(given)

    def check(self) -> None:
        kinds.check_fields(self)
        if self.bits == int(self.bits):
            object.__setattr__(self, "bits", int(self.bits))
        if self.allocate == "uniform":
            _check_width(self.bits)
        elif not self.widths or not min(self.widths) <= self.bits <= max(self.widths):
            raise FieldError("bits", self.bits, f"an average within the widths {list(self.widths)}")
        for name, given in self.overrides.items():
            if not given:
                raise FieldError(f"overrides.{name}", given, "a mapping of bits and/or group_size")

    @property
    def needs_data(self) -> bool:
        return self.solver.inputs != "none" or self.allocate in ("lim", "sensitivity") or self._static

    @property
    def multiple(self) -> int:
        scheme = kinds.of(self.scheme)[0]
        return max(1 if scheme is None or scheme.plain else kinds.KERNEL, self.group_size)

    @property
    def _static(self) -> bool:
        scheme = kinds.of(self.scheme)[0]
        return scheme is not None and scheme.static

    @property
    def needs_whole(self) -> bool:
        return self.allocate == "sensitivity"

    @property
    def solver(self) -> Solver:
        """The solver that chooses the codes. A step named after its solver has the solver's fields among its own."""
        return self

    def spec(self, target: Target, dtype: torch.dtype, wholes: kinds.Wholes | None = None) -> Spec:
        """The grid for one weight of type `dtype`. wholes: of the model, for scales that are e4m3 numbers."""
        form = kinds.of(self.scheme)[1]
        return Spec(target.bits, target.group_size, self.symmetric, self.clip, dtype,
                    self._scale_type(dtype), form,
                    wholes[target.name] if wholes and form.scales == "e4m3" else 1.0)

    def _scale_type(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which scales that are not numbers of the scheme's own are stored, for a model of type `dtype`."""
        if self.scale_dtype:
            return DTYPES[self.scale_dtype]
        short = dtype == torch.float32 and self.symmetric and not kinds.of(self.scheme)[1].is_float
        return torch.float16 if short else dtype                    # zero points: loaders multiply in the scales' type

    def chosen(self, model: nn.Module) -> list[Target]:
        """The weights this step quantizes; their bits are decided where names alone decide them."""
        fixed = self.scheme if self.scheme and not kinds.of(self.scheme)[0].plain else None
        found = targets(model, self.ignore, self.overrides, -1 if fixed else self.group_size)
        if fixed:
            kinds.check_widths(found, fixed)
            found = [replace(target, group_size=self.group_size) for target in found]
        return [t.at(self.bits) for t in found] if self.allocate == "uniform" else found

    def _planned(self, model: nn.Module) -> list[Target]:
        """The targets with bits as far as names and shapes tell, fractions where only data will.

        lim and zd: two widths, as many blocks of each as there will be, if not the same ones.
        """
        found = self.chosen(model)
        if self.allocate == "uniform" or all(t.fixed for t in found):
            return found
        share = undecided(found, self.bits, attrgetter("block"))
        if self.allocate == "sensitivity":
            return [t.at(share.target) for t in found]
        bits = self._two_level(share, [0.0] * len(share.units))
        return [t.at(bits[t.block]) if not t.fixed else t for t in found]

    def _two_level(self, share: Share, importance: list[float]) -> dict[str, int]:
        bits = two_level(importance, share.params, *around(self.widths, share.target), share.target)
        return dict(zip(share.units, bits, strict=True))

    def rounders(self, model: nn.Module) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """At the average of its bits where only data will decide."""
        def to_grid(weight: torch.Tensor, spec: Spec) -> torch.Tensor:
            whole = floats.whole(float(weight.abs().max())) if spec.form.scales == "e4m3" else 1.0
            return round_to_nearest(weight.float(), replace(spec, whole=whole)).dequantize(spec.dtype)

        return {t.name: partial(to_grid, spec=self.spec(replace(t, bits=round(t.bits)), model.dtype))
                for t in self._planned(model) if t.bits != DENSE}

    def sketch(self, skeleton: nn.Module, run: Run, source: nn.Module | None = None) -> str:
        """Hangs codes without values on the weights, at fractions of bits where only data will decide."""
        found, weights = self._planned(skeleton), {p.name: p for block in blocks(skeleton) for p in block.projections()}
        if not found:
            raise LlmoptError("nothing is left to quantize")
        scheme, form = kinds.of(self.scheme)
        scale = torch.float32 if form.through_bfloat16 else self._scale_type(skeleton.dtype)
        for t in found:
            if t.bits != DENSE:
                empty = partial(torch.empty, t.out, device="meta")
                scales = empty(t.groups, dtype=scale)
                weights[t.name].codes = Quantized(empty(t.columns, dtype=torch.int8), scales, t.bits, t.group_size,
                                                  None if self.symmetric else torch.empty_like(scales), form=form,
                                                  inputs=scheme and scheme.inputs, peak=1.0 if self._static else None)
        kind = f" ({self.scheme})" if self.scheme else ""
        return (f"{len(found)} weights at {self.bits:g} bits{kind}, "
                + ("one scale per channel" if self.group_size == -1 else f"groups of {self.group_size}")
                + (f", bits by {self.allocate}" if self.allocate != "uniform" else "")
                + (f" ({note})" if (note := spec_of(skeleton).note) else ""))

    def apply(self, model: nn.Module, run: Run) -> Record:
        if self.needs_data and not run.batches:
            raise LlmoptError("this step needs calibration data and there is none")
        decided, allocation = self._decide(model, run, self.chosen(model))
        todo = {t.name: t for t in decided if t.bits != DENSE}
        wholes = kinds.Wholes(model, todo)
        if self.solver.inputs == "block":
            for projection, made in self._from_blocks(model, run, todo, wholes):
                self._write(projection, None, made, Ranks())
        else:
            for projection, stats in each_weight(model, run, todo, self.name, self._collected()):
                team = self._team(projection, run)
                spec = self.spec(todo[projection.name], projection.weight.dtype, wholes)
                self._write(projection, stats, self._solve(projection, stats, spec, team), team)
                give_back_freed()
        round_inputs(model)
        return Record(meta=self._meta(model, decided) | allocation)

    def _decide(self, model: nn.Module, run: Run, found: list[Target]) -> tuple[list[Target], dict]:
        """The targets with their bits, and what the allocation was based on."""
        if self.allocate == "uniform":
            return found, {}
        unit = attrgetter("group" if self.allocate == "sensitivity" else "block")
        share = undecided(found, self.bits, unit)
        if not share.units:
            return found, {}
        made = run.memory.remember("allocation", lambda: self._allocation(model, run, found, share))
        return [t if t.fixed else t.at(made["bits"][unit(t)]) for t in found], {"allocation": made}

    def _allocation(self, model: nn.Module, run: Run, found: list[Target], share: Share) -> dict[str, Any]:
        if self.allocate == "sensitivity":
            ranked, chosen = self._measure(model, run, found, share)
        else:
            score = scores.lim(model, run) if self.allocate == "lim" else scores.zd(model, run)
            names = [block.name for block in blocks(model)]
            ranked = {name: value for name, value in zip(names, score, strict=True) if name in share.units}
            chosen = self._two_level(share, [s if self.allocate == "lim" else -s for s in ranked.values()])
        return {"by": self.allocate, "scores": _texts(ranked), "bits": chosen}

    @torch.no_grad()
    def _measure(self, model: nn.Module, run: Run, found: list[Target], share: Share) -> tuple[dict, dict]:
        """({unit: {bits: KL}}, {unit: bits}) with weights that this very method made from the dense model's inputs.

        The least damage by the table, unless the widest uniform choice that fits does less in fact.
        """
        free = {t.name: t for t in found if not t.fixed}
        choices: dict[str, dict[int, list[Change]]] = {unit: {w: [] for w in self.widths} for unit in share.units}
        for p, width, codes in self._at_all_widths(model, run, free):
            choices[free[p.name].group][width].append((p, partial(codes.dequantize, p.weight.dtype)))
        background, level = around(self.widths, share.target)[0], at_most(self.widths, share.target)
        rows = sample(run.batches, self.seed, model.get_output_embeddings().weight.shape[0])
        trial = Trial(model, rows, choices)
        try:
            table = scores.sensitivity(trial, self.widths, background, run)
            least = exact(list(table.values()), share.params, share.target)
            plans = [dict(zip(choices, least, strict=True)), dict.fromkeys(choices, level)]
            return table, run.ranks.agree(min(plans, key=trial.of))
        finally:
            trial.restore()

    def _at_all_widths(self, model: nn.Module, run: Run,
                       free: dict[str, Target]) -> Iterator[tuple[Projection, int, Quantized]]:
        """Each weight at each width below DENSE, made from the dense model's inputs."""
        widths = [w for w in self.widths if w != DENSE]
        if self.solver.inputs == "block":
            for width in widths:
                todo = {name: target.at(width) for name, target in free.items()}
                yield from ((p, width, made) for p, made in self._from_blocks(model, run, todo))
            return
        label = f"{self.name} at {len(self.widths)} widths"
        for p, stats in each_weight(model, run, free, label, self._collected(), edits=False):
            team = self._team(p, run)
            yield from ((p, w, _whole(self._solve(p, stats, self.spec(free[p.name].at(w), p.weight.dtype), team), p,
                                      team)) for w in widths)

    def _from_blocks(self, model: nn.Module, run: Run, todo: dict[str, Target],
                     wholes: kinds.Wholes | None = None) -> Iterator[tuple[Projection, Quantized]]:
        """Codes from a solver of whole blocks, one block after the other; every process sees all rows.

        wholes: where the caller writes them into the block.
        """
        run = replace(run, ranks=Ranks())
        if wholes is not None:
            stops = visits_beside(model, run, self.name, lambda b: places(b, todo, self.solver.dense == "residual"))
        else:
            stops = visits(model, run, self.name, edits=False)
        for visit in stops:
            chosen = [p for p in visit.block.projections() if p.name in todo]
            for p in chosen:
                _check_finite(p)
            with naming(visit.block.name):
                yield from self.solver.quantize_block(
                    visit, {p.name: self.spec(todo[p.name], p.weight.dtype, wholes) for p in chosen}, run)

    def _collected(self) -> Inputs:
        """The statistics to collect of the inputs of each weight."""
        kind = "peak" if self._static and self.solver.inputs == "none" else self.solver.inputs
        return Inputs(kind, peak=self._static, token_weights=self.solver.token_weights,
                      dense=self.solver.dense)

    def _team(self, projection: Projection, run: Run) -> Ranks:
        """The processes that share the rows of this weight: all of them, or each by itself."""
        apart = self.solver.rowwise and kinds.of(self.scheme)[1].rows == 1
        return run.ranks if apart and projection.out_features >= run.ranks.size else Ranks()

    @torch.no_grad()
    def _solve(self, projection: Projection, stats: Seen, spec: Spec, team: Ranks) -> Quantized:
        """This process's rows of a weight, quantized."""
        _check_finite(projection)
        with naming(projection.name):
            own = team.share(projection.weight).to(torch.float32, copy=True)
            own = own.contiguous()              # so that a row's last bits do not depend on how many others there are
            return self.solver.quantize(own, None if isinstance(stats, Peak) else stats, spec)

    @torch.no_grad()
    def _write(self, projection: Projection, stats: Seen, part: Quantized, team: Ranks) -> None:
        """Put the codes of which each of the team has some rows into the model, with what they cost."""
        dense = team.share(projection.weight).float()
        rounded = part.dequantize(projection.weight.dtype)
        change = rounded.float() - dense
        counts = {name: part.figures[name] for name in self.solver.sums if name in part.figures}
        counts |= {"lost": float(change.square().sum()), "all": float(dense.square().sum())}
        if isinstance(stats, Moments):
            lost = 2 * part.figures["loss"] if "loss" in part.figures else energy(change, stats.hessian)
            counts |= {"lost output": lost, "all output": energy(dense, stats.hessian)}
        total, whole = team.totals(counts), _whole(part, projection, team)
        whole.figures |= {name: total[name] for name in self.solver.sums if name in total}
        whole.figures["weight_error"] = total["lost"] / max(total["all"], 1e-30)
        if isinstance(stats, Moments):
            whole.figures["output_error"] = total["lost output"] / max(total["all output"], 1e-30)
        scheme = kinds.of(self.scheme)[0]
        whole.inputs, whole.peak = scheme and scheme.inputs, _peak(stats, projection) if self._static else None
        projection.write(team.rows(rounded, projection.out_features))
        projection.codes = whole

    def _meta(self, model: nn.Module, decided: list[Target]) -> dict:
        figures = {weight.name: weight.codes.figures for weight in coded(model)}
        form = kinds.of(self.scheme)[1]
        scale = 8 if form.through_bfloat16 else torch.finfo(self._scale_type(model.dtype)).bits
        modules = {t.name: {"bits": t.bits, "group_size": t.group_size,
                            **({} if t.bits == DENSE else figures[t.name])} for t in decided}
        return {"bits": average_bits(decided),
                "effective_bits": effective_bits(decided, scale, self.symmetric, form.rows),
                "weights": sum(t.size for t in decided), "modules": modules}


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


def _texts(table: dict) -> dict:
    """A table as JSON holds it: keys are text."""
    return {str(k): _texts(v) if isinstance(v, dict) else v for k, v in table.items()}


def _whole(part: Quantized, projection: Projection, team: Ranks) -> Quantized:
    """All rows of a weight of which each of the team has some."""
    codes, scales, zeros = (None if rows is None else team.rows(rows, projection.out_features)
                            for rows in (part.codes, part.scales, part.zeros))
    return replace(part, codes=codes, scales=scales, zeros=zeros)


def _check_width(bits: int | float) -> None:
    """Raise FieldError unless the bits of all weights alike are such as one weight can have."""
    if bits not in (*range(2, 9), DENSE):
        fraction = isinstance(bits, float) and 2 <= bits <= 8
        raise FieldError("bits", bits, "an integer from 2 to 8 (or 16: dense)" if not fraction else
                         "an integer from 2 to 8, or a fraction with allocate: lim, zd or sensitivity")
