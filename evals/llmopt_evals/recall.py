"""Facts of a text asked after its cache was made smaller: every text is read once, for all methods and all ratios.

    python -m llmopt_evals.recall MODEL --text FILE --lengths 2500 --ratios .75,.9 heads.replay \
        "kv.kvzap: {allocate: captured}" "[kv.snapkv: {window: 16}, kv.quant: {bits: 4}]" FOLDER

A text is one of `needles`, or with --world one of `world_recall`. It is read with all kept that a method may ask for;
each method then makes a copy of that cache smaller, which leaves what a prefill under the method would have left
(llmopt/runtime/copies.py), and answers are teacher-forced on it. Words are entries of a recipe's `steps`, lists of
such entries, or folders of checkpoints, whose methods are taken with what they have learned. Head scores among them
run first; `ratio` is added where an entry has none. A scorer learns once, for all ratios and all allocators.

`agnostic` asks all questions of one finished cache, `aware` reads each question before its cache is made smaller. For
each setting: exact answers, nats a token of the answers, bytes of keys and values as part of the dense cache's
(positions apart), and CPU seconds of making the cache smaller as part of those of reading the text.
"""
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import torch
from torch import nn

from llmopt.cli.options import COUNT, DATA, FILE, MODEL_GROUP, check_target, model_options
from llmopt.errors import LlmoptError
from llmopt.model.computing import computing
from llmopt.recipe.sources import source
from llmopt.run.pipeline import score_heads
from llmopt.runtime import copies, keeps_states
from llmopt.specs import DataSpec, ModelSpec
from llmopt_evals import contexts, entries, needles
from llmopt_evals.answers import Answers
from llmopt_evals.contexts import FORMS, Context, Question
from llmopt_evals.entries import DENSE, Setting
from llmopt_evals.texts import documents
from llmopt_evals.world import speaks_world

PLOTS = (".png", ".pdf", ".svg")


@dataclass(kw_only=True)
class Tally(Answers):
    """What was asked of one setting in one form. seconds: CPU, of compressing; reading: of reading."""

    form: str
    setting: str
    ratio: float | None
    seconds: float = 0.0
    reading: float = 0.0

    def row(self) -> dict[str, str | float | None]:
        """The figures by name."""
        return {"form": self.form, "setting": self.setting, "ratio": self.ratio, "exact": self.exact,
                "asked": self.asked, "nats": self.nats, "held": self.part,
                "cost": self.seconds / max(1e-9, self.reading)}


@torch.no_grad()
def measure(model: nn.Module, texts: Iterable[Context], settings: list[Setting], forms: tuple[str, ...]) -> list[Tally]:
    """The dense cache and every setting, in every form, over all texts."""
    settings = [DENSE, *settings]
    found = [[Tally(form=form, setting=setting.words, ratio=setting.ratio) for setting in settings] for form in forms]
    with copies.keeping(model):
        for text in texts:
            for prompt in prompts(model, text, forms):
                for setting, tally in zip(settings, found[forms.index(prompt.form)], strict=True):
                    prompt.ask(setting, tally)
    return [tally for tallies in found for tally in tallies]


@dataclass
class Prompt:
    """What was read, its last token, what is asked of it, and the CPU seconds that reading took.

    again: CPU seconds of methods that read it again, which is done for one of their settings and holds for all.
    """

    form: str
    whole: copies.Whole
    last: int
    questions: list[Question]
    reading: float
    again: dict[str, float] = field(default_factory=dict)

    def ask(self, setting: Setting, tally: Tally) -> None:
        """Make a copy smaller, and ask it all questions."""
        start = time.process_time()
        with self.whole.compressed(*setting.parts) as cache:
            tally.seconds += self._in_all(setting, time.process_time() - start)
            tally.reading += self.reading
            tally.hold(cache)
            if cache.states is None:
                cache = cache.without_last()            # so that the first answer comes out of what was kept
            for question in self.questions:
                ids, count = [self.last, *question.asked, *question.answer], len(question.answer)
                logits = self.whole.model(torch.tensor([ids[:-1]]), past_key_values=cache.fork()).logits[0, -count:]
                tally.count(logits, torch.tensor(question.answer))

    def _in_all(self, setting: Setting, seconds: float) -> float:
        """The seconds that a setting takes by itself."""
        for name in (method.name for method, _ in setting.parts if getattr(method, "replays", False)):
            seconds = self.again[name] = max(seconds, self.again.get(name, 0.0))
        return seconds


def prompts(model: nn.Module, text: Context, forms: tuple[str, ...]) -> Iterator[Prompt]:
    """The text, with all questions about it, and the text with each question behind it."""
    start, left = time.process_time(), int(keeps_states(model))         # the last token, which no state takes back
    whole = copies.read(model, torch.tensor([text.ids[:len(text.ids) - left]]))
    reading = time.process_time() - start
    if "agnostic" in forms:
        yield Prompt("agnostic", whole, text.ids[-1], text.questions["agnostic"], reading)
    for question in text.questions["aware"] if "aware" in forms else []:
        start = time.process_time()
        rest = [*text.ids[len(text.ids) - left:], *question.asked]
        prompt = whole.further(torch.tensor([rest[:len(rest) - left]]))
        yield Prompt("aware", prompt, question.asked[-1], [Question([], question.answer)],
                     reading + time.process_time() - start)


# --------------------------------------------------------------------------------------------------------- the command


def show(rows: list[dict]) -> None:
    """A table for each form."""
    for form in dict.fromkeys(row["form"] for row in rows):
        click.echo(f"{form:<10}{'answers':>9}{'nats':>8}{'held':>9}{'cost':>8}  setting")
        for row in (row for row in rows if row["form"] == form):
            ratio = "" if row["ratio"] is None else f"  ratio {row['ratio']:g}"
            click.echo(f"{'':<10}{row['exact']:>5}/{row['asked']:<3}{row['nats']:>8.3f}{row['held']:>9.2%}"
                       f"{row['cost']:>8.1%}  {row['setting']}{ratio}")


def plot(rows: list[dict], path: Path) -> None:
    """Draw the share of exact answers against the bytes held, a line for each setting, a panel for each form."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    forms, settings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("form", "setting"))
    figure = Figure(figsize=(6.5 * len(forms), 5 + 0.17 * len(settings)), layout="constrained")
    for form, axes in zip(forms, figure.subplots(1, len(forms), squeeze=False)[0], strict=True):
        for number, setting in enumerate(settings):
            points = sorted((row["held"], row["exact"] / row["asked"]) for row in rows
                            if (row["form"], row["setting"]) == (form, setting))
            axes.plot(*zip(*points, strict=True), marker="os^v"[number // 20 % 4], label=setting,
                      color=colormaps["tab20"](number % 20))
        axes.set(xscale="log", xlabel="bytes of keys and values held, part of the dense cache's", title=form,
                 ylabel="exact answers", ylim=(-0.03, 1.03))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize="x-small")
    figure.savefig(path, dpi=120)


def texts_of(model: nn.Module, tokenizer, text: str | None, plan: needles.Plan, forms: tuple[str, ...],
             statements: int) -> Iterator[Context]:
    """What is read: documents of the world where no text is given; a model of other words needs one."""
    if text is not None:
        limit = model.config.get_text_config().max_position_embeddings
        return contexts.of_text(documents(text), tokenizer, plan, limit, forms)
    if not speaks_world(tokenizer):
        raise LlmoptError("--text FILE is needed: this model does not speak the embedded world's language")
    return contexts.of_world(statements, plan.documents, plan.needles, forms, plan.seed)


def ratios_of(given: str) -> list[float]:
    """Numbers between 0 and 1, with commas between them."""
    try:
        found = [float(part) for part in given.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 <= ratio < 1 for ratio in found):
        raise LlmoptError(f"--ratios: {given!r} given, numbers from 0 to below 1 such as .75,.9 expected")
    return found


@click.command()
@click.argument("model")
@click.argument("steps", nargs=-1)
@click.option("--text", help="The file to plant facts in; default: documents of the embedded world.")
@click.option("--ratios", default=".5,.75,.9,.95", show_default=True, help="Parts that go.")
@click.option("--form", type=click.Choice([*FORMS, "both"]), default="agnostic", show_default=True,
              help="Questions after the cache is made smaller, or before.")
@click.option("--lengths", default=str(needles.DEFAULT_LENGTH), show_default=True,
              help="Tokens of a document (--text).")
@click.option("--documents", default=4, show_default=True, help="How many of each length.")
@click.option("--needles", default=8, show_default=True, help="Questions about each document.")
@click.option("--facts", default="codes", show_default=True, help="What answers are: codes, words or mixed (--text).")
@click.option("--statements", type=click.IntRange(1, 256), default=160, show_default=True,
              help="Of a document of the world.")
@click.option("--seed", default=0, show_default=True)
@DATA
@click.option("--samples", type=COUNT, default=64, show_default=True, help="Rows that methods learn from.")
@click.option("--length", type=COUNT, help="Tokens of a row; default: 512, or the model's maximum.")
@click.option("--json", "as_json", is_flag=True)
@click.option("--plot", "target", type=FILE, help="Draw answers against bytes held: .png, .pdf or .svg.")
@model_options
def main(model, steps, text, ratios, form, lengths, statements, data, samples, length, as_json, target, **options):
    """Read texts of facts once, and ask what is left of them under STEPS, at several ratios."""
    from llmopt.cli import log, tables

    tables.quiet_libraries()
    loading = {key: options.pop(key) for key in MODEL_GROUP}
    try:
        check_plot(target)
        forms, wanted = FORMS if form == "both" else (form,), ratios_of(ratios)
        plan = needles.Plan(needles.lengths_of(lengths), **options)
        heads, rest, needed = entries.divided(steps)
        rows = DataSpec(**(source(data) if data is not None else {}), samples=samples, length=length)
        with log.progress() as progress:
            loaded, run, _ = score_heads(ModelSpec(id=model, **loading), heads, rows, progress, calibrated=needed)
            with computing(loaded):
                settings = [*entries.settings(rest, wanted, loaded, run)]
                texts = texts_of(loaded, run.tokenizer, text, plan, forms, statements)
                found = [tally.row() for tally in measure(loaded, texts, settings, forms)]
        click.echo(json.dumps(found, indent=1)) if as_json else show(found)
        if target:
            plot(found, target)
    except LlmoptError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)


def check_plot(target: Path | None) -> None:
    """Raise LlmoptError, before any work, for a file that no plot can be written to."""
    check_target(target)
    if target and target.suffix not in PLOTS:
        raise LlmoptError(f"{target}: a plot is a {', '.join(PLOTS)} file")


if __name__ == "__main__":
    main()
