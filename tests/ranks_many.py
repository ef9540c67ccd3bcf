"""What several processes compute together against what each computes alone; run by torchrun from test_ranks.py.

Prints one JSON line: {check: what differs}, empty where nothing does.
"""
import json
import sys

import torch

from llmopt.attention import AShape
from llmopt.calibration.factor import inverse_factor
from llmopt.calibration.inputs import Inputs, Moments, each_weight
from llmopt.calibration.second_moments import WIDTH, Gram, row_errors
from llmopt.heads import Gradient, Span
from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.prune import OBS, Depth, Fisher, Fuse, Heal, Magnitude, Tyr, Wanda
from llmopt.quant import GPTQ, RTN, Tune
from llmopt.run import pipeline
from llmopt.scale import launch, processes
from tests import tiny

GROUPS = {"group_size": 16}
PLANS = {
    "rtn": [RTN(bits=4, **GROUPS)],
    "zd": [RTN(bits=3.5, allocate="zd", **GROUPS)],
    "gptq": [GPTQ(bits=4, **GROUPS)],
    "unordered": [GPTQ(bits=3, act_order=False, static_groups=False, symmetric=False, **GROUPS)],
    "lim": [Magnitude(ratio=0.3), GPTQ(bits=3.5, allocate="lim", sweeps=0, **GROUPS)],
    "narrow": [Fisher(ratio=0.3, units=["ffn"]), GPTQ(bits=4, **GROUPS)],
    "widths": [Wanda(ratio=0.3, scope={"measured": {"shares": [0.5], "plans": 1}}),
               Magnitude(refit=False, scope={"ecoflap": {"draws": 1}})],
    "blocks": [Depth(ratio=0.34), Heal(epochs=1)],
    "zeros": [OBS(ratio=0.5, units=["weights"])],
    "fused": [Fuse(ratio=0.34, epochs=1, rank=2)],
    "mixed": [Tyr(ratio=0.3, iterations=1, generations=1, offspring=2, tokens=[48], survivors=[], levels=3)],
    "tune": [Tune(bits=3, iterations=2, **GROUPS)],
    "fp8": [RTN(scheme="FP8")],
    "nvfp4": [GPTQ(scheme="NVFP4A16")],
    "searched": [AShape(sinks=1, density=0.6, rows=1, min_length=0)],
    "sensitivity": [Span(), Gradient(), GPTQ(bits=3.5, allocate="sensitivity", sweeps=0, **GROUPS)],
}
FEW = "rtn", "lim", "blocks", "zeros", "searched"           # without the word --all


def batches(rows: int, size: int) -> list[dict]:
    ids, mask = tiny.ids(rows, 24), torch.ones(rows, 24, dtype=torch.long)
    mask[0, 11:] = 0
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(size), mask.split(size), strict=True)]


def made(family: str, plan: str, data: list[dict], team: processes.Ranks) -> tuple[dict, list]:
    """(weights, records) of a tiny model that `team` has compressed."""
    model = tiny.make(family)
    report = pipeline.apply_steps(model, PLANS[plan], Run(data, ranks=team))
    return model.state_dict(), report.records


def unlike(family: str, plan: str, data: list[dict], team: processes.Ranks) -> list[str]:
    """Tensors whose bits differ, and figures that differ by more than 1e-5."""
    (mine, alone), (ours, together) = (made(family, plan, data, t) for t in (processes.Ranks(), team))
    return [name for name in mine if not torch.equal(mine[name], ours[name])] + figures(alone, together)


def worse(family: str, plan: str, data: list[dict], team: processes.Ranks) -> list[str]:
    """Where a batch has to be cut, its sums come in other parts: a Hessian's last bit turns a code, and act_order many
    after it. Each weight's outputs must lose as much, and the model answer as near to the dense one's.
    """
    (mine, alone), (ours, together) = (made(family, plan, data, t) for t in (processes.Ranks(), team))
    lost = [{name: entry["output_error"] for name, entry in records[-1]["meta"]["modules"].items()}
            for records in (alone, together)]
    wrong = [f"{name}: {one} {lost[1][name]}" for name, one in lost[0].items() if abs(lost[1][name] / one - 1) > 0.1]
    one, two = (apart(family, state, data) for state in (mine, ours))
    return wrong + ([] if abs(two / one - 1) < 0.1 else [f"logits are {one} and {two} from the dense ones"])


@torch.no_grad()
def apart(family: str, state: dict, data: list[dict]) -> float:
    """How far the logits of a tiny model with these weights are from the dense model's."""
    model = tiny.make(family)
    dense = model(data[0]["input_ids"]).logits
    model.load_state_dict(state)
    return float((model(data[0]["input_ids"]).logits - dense).norm())


def figures(one, other, where: str = "") -> list[str]:
    if isinstance(one, (dict, list)):
        pairs = one.items() if isinstance(one, dict) else enumerate(one)
        return [wrong for key, value in pairs for wrong in figures(value, other[key], f"{where}.{key}")]
    close = abs(one - other) <= 1e-5 * abs(one) if isinstance(one, float) else one == other
    return [] if close else [f"{where}: {one} {other}"]


def moments(team: processes.Ranks) -> list[str]:
    """Second moments of odd shares, one of them empty, against all tokens at once."""
    x = torch.randn(101, WIDTH + 40, generator=torch.Generator().manual_seed(0))
    whole, part, gram = Moments(size=True), Moments(team, size=True), Gram(team)
    whole.add(x)
    for own in (part, gram):
        if team.is_main:
            own.add(x)
        own.join(torch.empty(8, WIDTH + 40))
    wrong = [] if part.tokens == gram.tokens == 101 else ["tokens"]
    for name, found in (("hessian", part.hessian), ("gram", gram.whole() * 2 / 101)):
        if (found - whole.hessian).norm() > 1e-5 * whole.hessian.norm():
            wrong.append(name)
    return wrong + ([] if torch.allclose(part.size, x.abs().mean(0)) else ["size"])


def rows(data: list[dict], team: processes.Ranks) -> list[str]:
    """Every process sees the rows of all, in the order of the data."""
    model = tiny.make("llama")
    names = [p.name for p in blocks(model)[1].projections()]
    alone, ours = ([rows for _, rows in each_weight(model, Run(data, ranks=r), names, "x", Inputs("rows"), False)]
                   for r in (processes.Ranks(), team))
    same = all(torch.equal(a, b) for one, two in zip(alone, ours, strict=True) for a, b in zip(one, two, strict=True))
    return [] if same and len(alone) == 7 else ["rows"]


def factor(team: processes.Ranks) -> list[str]:
    """Three block columns and a bit; a matrix that is not positive definite is refused by all."""
    x = torch.randn(3000, 3 * WIDTH + 17, generator=torch.Generator().manual_seed(1))
    hessian = x.T @ x
    alone, ours = inverse_factor(hessian, 0.01)[0], inverse_factor(hessian, 0.01, team)[0]
    damped = hessian.double() + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian))
    wrong = [] if torch.equal(alone, ours) else ["bits"]
    if ((ours.double().T @ ours.double() @ damped) - torch.eye(len(hessian))).abs().max() > 1e-3:
        wrong.append("inverse")
    hessian[-1, -1] = -1e9
    return wrong + ([] if inverse_factor(hessian, 0.01, team)[0] is None else ["indefinite"])


def solve(team: processes.Ranks) -> list[str]:
    """With the same Hessian, sharing the rows of a weight leaves every bit as it is."""
    stats = Moments()
    x = torch.randn(600, 192, generator=torch.Generator().manual_seed(2))
    stats.add(x @ torch.randn(192, 192, generator=torch.Generator().manual_seed(3)))
    weight, step, wrong = torch.randn(101, 192, generator=torch.Generator().manual_seed(4)), GPTQ(bits=3, **GROUPS), []
    spec = step.spec(step.chosen(tiny.make("llama"))[0], torch.bfloat16)
    alone, part = (step.quantize(rows.clone(), stats, spec) for rows in (weight, team.share(weight)))
    for name in ("codes", "scales"):
        if not torch.equal(getattr(alone, name), team.rows(getattr(part, name), 101)):
            wrong.append(name)
    return wrong + ([] if row_errors(weight, stats.hessian).isfinite().all() else ["errors"])


def main() -> None:
    team, data = processes.join(), batches(9, 3)
    found = {"moments": moments(team), "factor": factor(team), "solve": solve(team), "rows": rows(data, team)}
    wide = "--all" in sys.argv
    found |= {plan: unlike("llama", plan, data, team) for plan in (PLANS if wide else FEW)}
    found |= {family: unlike(family, "narrow", data, team) for family in ("gpt2", "gpt_neox", "opt")[:3 if wide else 1]}
    found["experts"] = unlike("qwen3_moe", "gptq", data, team)
    found["a batch that is cut"] = worse("llama", "gptq", batches(8, 8)[:1], team)
    odd = [{name: t[1:] for name, t in batches(2, 2)[0].items()}]
    found["more processes than rows"] = unlike("qwen3", "lim", odd, team)
    together = {name: [w for part in team.gather(wrong) for w in part] for name, wrong in found.items()}
    if team.is_main:
        sys.stdout.write(json.dumps(together) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with launch.one_voice():
        main()
