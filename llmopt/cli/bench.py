"""`llmopt bench`: what the figures of the README are measured with."""
from pathlib import Path

import click

from llmopt.cli import completion, log
from llmopt.cli.help import Group
from llmopt.cli.options import COUNT, FILE, JSON, SEED
from llmopt.errors import LlmoptError


@click.group(cls=Group, examples=("llmopt bench scale --quick", "llmopt bench kv --quick"))
def bench() -> None:
    """Measure llmopt itself: the figures of the README, each with the command that gives it."""


@bench.command(examples=("llmopt bench scale --quick",
                         "llmopt bench scale --shape llama-1b --blocks 4,8"))
@log.verbosity
@click.option("--shape", default="qwen3-0.6b", show_default=True, help="Whose memory: qwen3-0.6b, llama-1b, llama-7b.")
@click.option("--blocks", default="4,8,16,32", show_default=True, help="How many of them, one run each.")
@click.option("--recipe", "recipe_name", help="Recipe of these runs; default: quant.rtn at 4 bits.")
@click.option("--solve", default="llama-1b", show_default=True, help="Shape on which one and two processes run GPTQ.")
@click.option("--quick", is_flag=True, help="Two small runs instead of four, and less calibration data.")
@JSON
def scale(shape, blocks, recipe_name, solve, quick, as_json) -> None:
    """Memory, time and the journal's cost against the number of blocks; two processes against one."""
    from llmopt.cli import measured, tables

    tables.quiet_libraries()
    from llmopt_evals.bench.scale import QUICK, Plan, measure

    counts = _numbers("--blocks", blocks, "4,8,16,32")
    with log.progress() as progress:
        found = measure(QUICK if quick else Plan(shape, counts, recipe_name, solve), progress)
    measured.show_scale(found, as_json)


@bench.command(examples=("llmopt bench kv --quick", "llmopt bench kv --lengths 16384 --dims 128 --threads 1"))
@log.verbosity
@click.option("--lengths", default="1024,4096,16384", show_default=True, help="Tokens of the prompt.")
@click.option("--dims", default="64,128", show_default=True, help="Head dimensions, of 64 and 128.")
@click.option("--threads", default="1,2", show_default=True, help="Numbers of threads.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="The fastest of so many counts.")
@click.option("--part", type=click.Choice(["decoding", "scoring", "all"]), default="all", show_default=True,
              help="Tokens from compressed caches, or what scorers take of a prompt's reading.")
@click.option("--quick", is_flag=True, help="Short prompts on a model of one block.")
@JSON
def kv(lengths, dims, threads, rounds, part, quick, as_json) -> None:
    """Decoding with compressed caches against transformers' own: attention, the whole step, the memory's bandwidth.
    Then the share of a prompt's reading that each scorer takes, in prompts of 1,024 and 4,096 tokens.
    """
    from llmopt.cli import measured, tables

    tables.quiet_libraries()
    from llmopt_evals.bench import kv, scoring

    plan = kv.Plan(_numbers("--lengths", lengths, "1024,16384"), _numbers("--dims", dims, "64,128"),
                   _numbers("--threads", threads, "1,2"), rounds=rounds)
    scored = scoring.QUICK if quick else scoring.Plan(threads=plan.threads[0], rounds=rounds)
    with log.progress() as progress:
        found = [] if part == "scoring" else kv.measure(kv.QUICK if quick else plan, progress)
        shares = [] if part == "decoding" else scoring.measure(scored, progress)
    measured.show_speeds(found, shares, as_json)


@bench.command(examples=("llmopt bench quant --quick",
                         "llmopt bench quant MODEL quant.gptq --bits 3 --group-size 32 --samples 8 --length 64"))
@log.verbosity
@click.argument("model", default="llmopt/reference", shell_complete=completion.models)
@click.argument("methods", nargs=-1)
@click.option("--bits", default="4,3,2", show_default=True, help="Of methods that do not say.")
@click.option("--group-size", default="32", show_default=True, help="Inputs that share a scale; -1: all of a row.")
@click.option("--data", default="self", show_default=True, help="A file, self (sampled from the model), world, ...")
@click.option("--samples", type=COUNT, default=48, show_default=True, help="Rows of calibration data.")
@click.option("--length", type=COUNT, default=192, show_default=True, help="Tokens of a row.")
@SEED
@click.option("--rows", type=click.IntRange(2), default=64, show_default=True, help="Rows that are scored.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=PYTHON", help="llmcompressor, gptqmodel or autoround "
              "beside ours, by the Python of an environment that has it; repeatable.")
@click.option("--iterations", type=COUNT, default=200, show_default=True, help="Of autoround.")
@click.option("--keep", type=FILE, help="Folder for the checkpoints; what it holds is not made again.")
@click.option("--quick", is_flag=True, help="The first of the bits, and little data.")
@JSON
def quant(model, methods, bits, group_size, data, samples, length, seed, rows, peers, iterations, keep, quick,
          as_json) -> None:
    """Quantizers beside each other: distance to the dense model, bytes of the file, CPU seconds.

    METHODS are entries of a recipe's `steps`, or lists of them; without any, rounding and GPTQ with and without what
    llmopt adds to it.
    """
    from llmopt.cli import measured, tables

    tables.quiet_libraries()
    from llmopt_evals.bench import quant
    from llmopt_evals.peers.launch import QUANTIZERS, peer

    from llmopt.recipe.sources import source
    from llmopt.specs import DataSpec

    beside = tuple(peer(word, QUANTIZERS) for word in peers)
    plan = quant.Plan(model, tuple(zip(methods, methods, strict=True)) or tuple(quant.METHODS.items()),
                      _numbers("--bits", bits, "4,3"), _numbers("--group-size", group_size, "32,-1", (-1,)),
                      DataSpec(**source(data), samples=samples, length=length, seed=seed), rows, beside, iterations,
                      keep)
    with log.progress() as progress:
        found = quant.measure(plan.quick() if quick else plan, progress)
    measured.show_quantizers(found, as_json)


@bench.command(examples=("llmopt bench prune --quick",
                         "llmopt bench prune MODEL prune.wanda --ratios 0.1 --samples 8 --length 64"))
@log.verbosity
@click.argument("model", default="llmopt/reference", shell_complete=completion.models)
@click.argument("methods", nargs=-1)
@click.option("--ratios", default="0.1,0.2,0.3", show_default=True, help="Of methods that do not say.")
@click.option("--units", default="ffn", show_default=True, help="Of methods that do not say.")
@click.option("--data", default="self", show_default=True, help="A file, self (sampled from the model), world, ...")
@click.option("--score", help="Where the rows that are scored come from; default: as --data, other rows.")
@click.option("--samples", type=COUNT, default=48, show_default=True, help="Rows of calibration data.")
@click.option("--length", type=COUNT, default=192, show_default=True, help="Tokens of a row.")
@SEED
@click.option("--rows", type=click.IntRange(2), default=64, show_default=True, help="Rows that are scored.")
@click.option("--peer", "peers", multiple=True, metavar="NAME=PYTHON", help="torchpruning beside ours, by the Python "
              "of an environment that has it.")
@click.option("--keep", type=FILE, help="Folder for what is measured; what it holds is not measured again.")
@click.option("--part", type=click.Choice(["quality", "speed"]), default="quality", show_default=True,
              help="What pruners cost, or how much faster pruned shapes are than their operations promise.")
@click.option("--quick", is_flag=True, help="The last of the ratios, and little data.")
@JSON
def prune(model, methods, ratios, units, data, score, samples, length, seed, rows, peers, keep, part, quick,
          as_json) -> None:
    """Pruners beside each other: nats a token added, parameters, CPU seconds. Or the speed of what is left.

    METHODS are entries of a recipe's `steps`, or lists of them, experts.* among them; without any, every criterion with
    and without a refit.
    """
    from llmopt.cli import measured, tables

    tables.quiet_libraries()
    from llmopt_evals.bench import lean, prune
    from llmopt_evals.peers.launch import PRUNERS, peer

    from llmopt.recipe.sources import source
    from llmopt.specs import DataSpec

    with log.progress() as progress:
        if part == "speed":
            measured.show_lean(lean.measure(lean.QUICK if quick else lean.Plan(), progress), as_json)
            return
        given = DataSpec(**source(data), samples=samples, length=length, seed=seed)
        plan = prune.Plan(model, methods or prune.METHODS, _shares("--ratios", ratios), tuple(units.split(",")), given,
                          DataSpec(**source(score), samples=1, length=length, seed=seed) if score else None, rows,
                          tuple(peer(word, PRUNERS) for word in peers), keep)
        found = prune.measure(plan.quick() if quick else plan, progress)
    measured.show_pruners(found, as_json)


@bench.command(examples=("llmopt bench attention --quick",
                         'llmopt bench attention "attention.a_shape: {ratio: 0.9}" --lengths 1024 --dims 64',
                         "llmopt bench attention attention.anchor --part recall --length 128 --rows 1",
                         'llmopt bench attention "attention.anchor: {min_length: 0}" --part answers --rows 1'))
@log.verbosity
@click.argument("methods", nargs=-1)
@click.option("--part", type=click.Choice(["speed", "recall", "answers"]), default="speed", show_default=True,
              help="Times dense attention, on noise; what is read of the attention of a model; what the model answers, "
                   "and its time to the first token.")
@click.option("--lengths", default="4096,16384", show_default=True, help="Tokens of the prompt (speed).")
@click.option("--dims", default="64,128", show_default=True, help="Head dimensions (speed).")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="The fastest of so many (speed).")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
              help="What is computed in.")
@click.option("--flex", is_flag=True, help="Time torch's flex_attention on the same block lists, too (speed); it is "
                                           "compiled, by a C++ compiler.")
@click.option("--model", default="llmopt/reference", show_default=True, shell_complete=completion.models,
              help="Whose attention (recall, answers).")
@click.option("--data", default="self", show_default=True,
              help="A file, self, world, ...: what it reads (recall); what head scores are measured on.")
@click.option("--text", help="The file to plant facts in (answers); default: documents of the embedded world.")
@click.option("--length", type=COUNT, default=512, show_default=True, help="Tokens of a row (recall, answers).")
@click.option("--rows", type=COUNT, default=2, show_default=True, help="Rows of data, or texts (recall, answers).")
@click.option("--plot", "target", type=FILE, help="Draw it against the share of the pairs: .png, .pdf or .svg (recall, "
                                                  "answers).")
@click.option("--quick", is_flag=True, help="One short prompt.")
@JSON
def attention(methods, part, lengths, dims, rounds, dtype, flex, model, data, text, length, rows, target, quick,
              as_json) -> None:
    """Sparse prefill against torch's dense attention, selection included; how much of the attention it reads; what a
    model still answers.

    METHODS are entries of a recipe's `steps`, of selectors (attention.*); without any, some of them.
    """
    from llmopt.cli import measured, tables

    tables.quiet_libraries()
    from llmopt_evals.bench import answers, attention, plots, recall

    from llmopt.recipe.sources import source
    from llmopt.specs import DataSpec

    plots.check(target)
    chosen = recall.selectors(methods or attention.METHODS)
    with log.progress() as progress:
        if part == "speed":
            plan = attention.Plan(_numbers("--lengths", lengths, "4096"), _numbers("--dims", dims, "64"), rounds, dtype,
                                  flex)
            found = attention.measure(attention.QUICK if quick else plan, chosen, progress)
        else:
            loaded = recall.Loaded.of(model, DataSpec(**source(data), samples=rows, length=length), chosen, progress,
                                      dtype)
            found = (recall.measure(loaded.model, loaded.rows, chosen, loaded.run) if part == "recall" else
                     answers.measure(loaded.model, loaded.texts(text, length, rows), chosen, loaded.run))
    if target and part != "speed":
        plots.draw(found, target)
    show = {"speed": measured.show_sparse, "recall": measured.show_recall, "answers": measured.show_answers}[part]
    show(found, as_json)


@bench.command(examples=("llmopt bench packed --quick", "llmopt bench packed --model SMALL --dense MODEL"))
@log.verbosity
@click.option("--size", type=click.IntRange(32), default=4096, show_default=True, help="Of the square weight.")
@click.option("--bits", default="8,4,3,2", show_default=True, help="Widths of the codes.")
@click.option("--rows", default="1,16,128", show_default=True, help="Rows of what is multiplied.")
@click.option("--group", default=128, show_default=True, help="Columns that share a scale; -1: all.")
@click.option("--rounds", type=click.IntRange(1), default=12, show_default=True, help="The fastest of so many counts.")
@click.option("--model", help="A packed checkpoint: what it takes of the memory, packed and inflated, instead.")
@click.option("--dense", help="The model before, beside it.")
@click.option("--quick", is_flag=True, help="A small weight, in 4 and 3 bits.")
@JSON
def packed(size, bits, rows, group, rounds, model, dense, quick, as_json) -> None:
    """Products with packed weights against dense ones, on one thread; or the memory that a packed model takes."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt_evals.bench import packed

    if model:
        _show_models(packed.models(_folder(model), _folder(dense) if dense else None), as_json)
        return
    plan = packed.Plan(size, _numbers("--bits", bits, "8,4"), _numbers("--rows", rows, "1,16"), group, rounds)
    with log.progress() as progress:
        found = packed.measure(packed.QUICK if quick else plan, progress)
    _show_products(found, as_json)


def _folder(given: str) -> Path:
    if not (Path(given).expanduser() / "config.json").is_file():
        raise LlmoptError(f"{given}: a model folder expected")
    return Path(given).expanduser()


def _show_products(found: list[dict], as_json: bool) -> None:
    """A row for each kind of weight, then the machine."""
    import torch

    from llmopt.cli.tables import print_json, print_table
    from llmopt.progress import human

    if as_json:
        print_json(found)
        return
    rows = [(row["rows"], row["bits"], row["type"], row["way"], human(row["bytes"]), f"{1000 * row['seconds']:.2f} ms",
             *(f"{row.get(f'against_{name}', 0):.2f}" for name in ("fp32", "bf16")), f"{row['of_bandwidth']:.0%}")
            for row in sorted(found, key=lambda row: (row["rows"], -row["bits"]))]
    print_table("one product, one thread", ["rows", "bits", "x", "way", "weight", "CPU time", "faster than fp32",
                                            "than bf16", "of bandwidth"], rows)
    click.echo(f"memory is read at {found[0]['bandwidth'] / 1e9:.1f} GB/s; "
               f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}")


def _show_models(found: list[dict], as_json: bool) -> None:
    from llmopt.cli.tables import print_json, print_table
    from llmopt.progress import human

    if as_json:
        print_json(found)
        return
    rows = [(row["model"], human(row["file"]), human(row["tensors"]), human(row["resident"]),
             f"{1000 * row['token']:.1f} ms") for row in found]
    print_table("a model in a process of its own", ["", "file", "tensors", "resident memory", "CPU time of a token"],
                rows)


def _numbers(option: str, given: str, example: str, others: tuple[int, ...] = ()) -> tuple[int, ...]:
    """(4, 8) from "4,8"; raises LlmoptError for anything but positive whole numbers and those of `others`."""
    from llmopt.recipe.assign import values

    counts = values([f"numbers=[{given}]"])["numbers"]
    if not counts or not all(type(count) is int and (count > 0 or count in others) for count in counts):
        raise LlmoptError(f"{option}: {given!r} given, numbers such as {example} expected")
    return tuple(counts)


def _shares(option: str, given: str) -> tuple[float, ...]:
    """(0.1, 0.2) from "0.1,0.2"; raises LlmoptError for anything but numbers from 0 to below 1."""
    from llmopt.recipe.assign import values

    shares = values([f"numbers=[{given}]"])["numbers"]
    if not shares or not all(type(share) in (int, float) and 0 <= share < 1 for share in shares):
        raise LlmoptError(f"{option}: {given!r} given, shares such as 0.1,0.2 expected")
    return tuple(map(float, shares))
