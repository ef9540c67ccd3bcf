"""Train the reference model: `python -m llmopt_evals.world.train --output DIR --steps N [--resume]`.

Muon for the matrices inside blocks, each expert's among them, AdamW for embeddings, norms and routers, which also learn
to give all experts work; a curriculum (see curriculum.py). The run is a
function of seed, steps, device and thread count; a resumed run ends in the same bytes as an undisturbed one.
"""

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
import torch
from rich.progress import MofNCompleteColumn, Progress
from torch.nn.functional import cross_entropy

from .attention import use_blocked_attention
from .curriculum import Place, batch, loss_weights
from .documents import KINDS
from .model import ARCHS, build, export

MUON, ADAM = 0.02, 3e-3  # learning rates
WARMUP, DECAY = 50, 0.45  # steps of linear rise; last share of all steps, falling linearly to zero


@dataclass
class Settings:
    """Everything the result depends on, and where it goes."""

    output: Path
    steps: int
    arch: str = "llama"
    device: str = "cpu"
    seed: int = 0
    tokens: int = 4096
    bf16: bool = True
    every: int = 200  # steps between checkpoints
    stop: int | None = None  # leave after this step, as a crash would
    shape: dict = field(default_factory=dict)


class Trainer:
    """Model, optimizers, place in the curriculum and log; `run` goes to the last step."""

    def __init__(self, settings: Settings, resume: bool = False, report=lambda line: None, tick=lambda step: None):
        self.settings, self.report, self.tick = settings, report, tick
        self.model = build(settings.arch, settings.seed, **settings.shape).to(settings.device)
        if settings.device == "cpu":
            use_blocked_attention(self.model)
        self.stacks = stacks(self.model)
        self.optimizers = optimizers(self.model, self.stacks)
        self.place, self.step, self.log, self.seconds = Place(), 0, [], 0.0
        self.sums = torch.zeros(3, len(KINDS), dtype=torch.float64)
        if resume and self.file.exists():
            self.load()

    @property
    def file(self) -> Path:
        """The resumable checkpoint."""
        return self.settings.output / "checkpoint.pt"

    def run(self) -> None:
        """Train to the last step, keeping checkpoints; then export."""
        began = time.perf_counter() - self.seconds
        last = self.settings.stop or self.settings.steps
        while self.step < last:
            self.one_step()
            self.tick(self.step)
            self.seconds = time.perf_counter() - began
            if self.step % self.settings.every == 0 or self.step == self.settings.steps:
                self.note()
                self.save()
        if self.step >= self.settings.steps:
            export(self.model, self.settings.output / "model", self.log)

    def one_step(self) -> None:
        """One batch, one update, one look at whether the curriculum moves on."""
        rows = batch(self.place, self.settings.seed, self.step, self.settings.tokens)
        ids = torch.tensor([row.ids for row in rows], device=self.settings.device)  # [B, T]
        kinds = torch.tensor([row.kinds for row in rows], device=self.settings.device)[:, 1:]
        routed = {"output_router_logits": True} if self.model.config.model_type == "qwen3_moe" else {}
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.bf16):
            out = self.model(input_ids=ids, use_cache=False, **routed)
        logits = out.logits[:, :-1]
        losses = cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weights = torch.tensor(loss_weights(self.place.stage), device=ids.device)[kinds.flatten()]
        loss = (losses * weights).sum() / weights.sum()
        (loss + self.model.config.router_aux_loss_coef * out.aux_loss if routed else loss).backward()
        self.update()
        right = (logits.argmax(-1) == ids[:, 1:]).flatten()
        self.judge(losses.detach(), right, kinds.flatten())
        self.step += 1

    def update(self) -> None:
        """Clip, set the learning rates of this step, step both optimizers."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        scale = schedule(self.step, self.settings.steps)
        for optimizer, rate in zip(self.optimizers, (MUON, ADAM), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
        for stack, experts in self.stacks:
            for expert, gradient in zip(experts, stack.grad, strict=True):
                expert.grad = gradient
            stack.grad = None
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def judge(self, losses, right, kinds) -> None:
        """Add to the sums per kind and tell the curriculum how recall went."""
        for index, values in enumerate((torch.ones_like(losses), losses, right.float())):
            self.sums[index] += torch.bincount(kinds, values.double(), minlength=len(KINDS)).cpu()
        asked = kinds == 1
        if asked.any() and self.place.update(right[asked].float().mean().item()):
            self.note()

    def note(self) -> None:
        """Write one line of the log: step, place, and per kind the loss and accuracy since the last line."""
        count, loss, right = self.sums
        entry = {"step": self.step, **asdict(self.place), "seconds": round(self.seconds)}
        for index, kind in enumerate(KINDS):
            if count[index]:
                entry[kind] = [round((loss[index] / count[index]).item(), 4)]
                entry[kind].append(round((right[index] / count[index]).item(), 4))
        self.sums.zero_()
        self.log.append(entry)
        self.report(json.dumps(entry))

    def save(self) -> None:
        """Checkpoint everything the next step depends on, atomically."""
        self.settings.output.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        state |= {"place": asdict(self.place), "step": self.step, "log": self.log, "seconds": self.seconds}
        state["sums"] = self.sums
        torch.save(state, self.file.with_suffix(".tmp"))
        os.replace(self.file.with_suffix(".tmp"), self.file)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.file, map_location=self.settings.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.place, self.step, self.log = Place(**state["place"]), state["step"], state["log"]
        self.seconds, self.sums = state["seconds"], state["sums"].cpu()


Stacks = list[tuple[torch.nn.Parameter, list[torch.nn.Parameter]]]


def stacks(model: torch.nn.Module) -> Stacks:
    """Every stack of experts [E, ..., ...], and its matrices as parameters of their own, in the same memory."""
    return [(p, [torch.nn.Parameter(matrix) for matrix in p.data]) for p in model.parameters() if p.ndim == 3]


def optimizers(model: torch.nn.Module, split: Stacks) -> list[torch.optim.Optimizer]:
    """Muon for matrices inside blocks, AdamW for embeddings, norms and routers."""
    named = [(name, p) for name, p in model.named_parameters() if p.ndim != 3]
    inside = [p for name, p in named if p.ndim == 2 and "embed" not in name and not name.endswith("mlp.gate.weight")]
    outside = [p for name, p in named if all(p is not other for other in inside)]
    inside += [expert for _, experts in split for expert in experts]
    muon = torch.optim.Muon(inside, lr=MUON, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    return [muon, torch.optim.AdamW(outside, lr=ADAM, betas=(0.9, 0.98), weight_decay=0.0)]


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate at `step`: rise, constant, linear fall to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--arch", choices=sorted(ARCHS), default="llama")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step")
    parser.add_argument("--every", type=int, default=200, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--float32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--resume", action="store_true")
    return parser.parse_args(arguments)


def main() -> None:
    """Entry of the command."""
    options = parse()
    torch.set_num_threads(options.threads)
    names = ("output", "steps", "arch", "device", "seed", "tokens", "every")
    settings = Settings(**{name: getattr(options, name) for name in names}, bf16=not options.float32)
    if not sys.stdout.isatty():
        Trainer(settings, options.resume, click.echo).run()
        return
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as bar:
        task = bar.add_task("training", total=settings.steps)
        Trainer(settings, options.resume, bar.console.print, lambda step: bar.update(task, completed=step)).run()


if __name__ == "__main__":
    main()
