"""Does a model know the world? `python -m llmopt_evals.world.check [MODEL] [--json]`, exit 1 if a target is missed."""

import argparse
import json
import sys
from dataclasses import asdict, dataclass

import click
import torch
from transformers import AutoModelForCausalLM

from llmopt.model.loading import resolve

from .damage import rounded, without_channels
from .paths import reference_path
from .questions import copy_questions, fact_questions, recall_questions
from .score import accuracy, story_ratio
from .text import eval_stories


@dataclass(frozen=True)
class Result:
    """One measured figure and the bound it must keep; `least` says which side is good."""

    name: str
    value: float
    target: float
    least: bool = True

    @property
    def met(self) -> bool:
        """True if the bound is kept."""
        return self.value >= self.target if self.least else self.value <= self.target


def knowledge(model, documents: int = 24) -> list[Result]:
    """Recall, facts, copying and stories of the model as it is."""
    asked = {count: recall_questions(count, "agnostic", documents) for count in (40, 160)}
    aware = {count: recall_questions(count, "aware", documents) for count in (40, 160)}
    loss, exact = story_ratio(model, eval_stories(documents, 512))
    return [
        Result("recall of 40, agnostic", accuracy(model, asked[40]), 0.95),
        Result("recall of 40, aware", accuracy(model, aware[40]), 0.95),
        Result("recall of 160, agnostic", accuracy(model, asked[160]), 0.9),
        Result("recall of 160, aware", accuracy(model, aware[160]), 0.9),
        Result("recall of 40 without context", accuracy(model, asked[40], context=False), 0.05, least=False),
        Result("facts in the weights (8192)", accuracy(model, fact_questions()), 0.9),
        Result("copying 16 words", accuracy(model, copy_questions(200)), 0.9),
        Result("story loss / entropy", loss / exact, 1.05, least=False),
    ]


def brittleness(model) -> list[Result]:
    """Facts lost to damage, in shares of 1."""
    facts = fact_questions()
    dense = accuracy(model, facts)
    return [
        Result("facts lost at 3 bits", dense - accuracy(rounded(model, 3), facts), 0.05),
        Result("facts lost at 2 bits", dense - accuracy(rounded(model, 2), facts), dense / 2),
        Result("facts lost, FFN -25 % random", dense - accuracy(without_channels(model, 0.25), facts), 0.1),
    ]


def table(results: list[Result]) -> str:
    """The results as text."""
    lines = [f"{'':32}{'measured':>10}{'target':>12}"]
    for result in results:
        bound = f"{'>=' if result.least else '<='} {result.target:.3f}"
        lines.append(f"{result.name:32}{result.value:10.4f}{bound:>12}{'' if result.met else '  MISSED'}")
    return "\n".join(lines)


def main() -> None:
    """Entry of the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("`")[0].strip())
    parser.add_argument("model", nargs="?", default=str(reference_path()))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--documents", type=int, default=24, help="contexts and stories per figure")
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(resolve(options.model), dtype=torch.float32).eval()
    results = knowledge(model, options.documents) + brittleness(model)
    click.echo(json.dumps([asdict(r) | {"met": r.met} for r in results], indent=1) if options.json else table(results))
    sys.exit(not all(result.met for result in results))


if __name__ == "__main__":
    main()
