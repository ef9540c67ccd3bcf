"""Commands that look and change nothing: `llmopt show`, `methods`, `schema`."""
import click

from llmopt.cli import completion
from llmopt.cli.help import Command
from llmopt.cli.options import FILE, JSON


@click.command()
@click.argument("folder", type=FILE, shell_complete=completion.models)
@JSON
def show(folder, as_json) -> None:
    """What is inside a checkpoint: shapes, bits, budgets, sizes, provenance, how it can be loaded."""
    from llmopt.checkpoint.facts import check_runtime, read_facts, read_layers
    from llmopt.cli import tables

    facts, config = read_facts(folder), read_layers(folder)
    check_runtime(folder, facts)
    tables.show_folder(facts, config, as_json)


@click.command(cls=Command, examples=("llmopt methods",
                                      "llmopt methods quant.gptq      # its fields, bounds, meaning, source"))
@click.argument("name", required=False, shell_complete=completion.methods)
@JSON
def methods(name, as_json) -> None:
    """Every registered method, or one with its fields, defaults and source."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    import llmopt

    tables.show_methods([llmopt.get(name)] if name else [llmopt.get(n) for n in llmopt.names()], bool(name), as_json)


@click.command(cls=Command, examples=("llmopt schema > recipe.schema.json",))
def schema() -> None:
    """The JSON Schema of a recipe, for editors: yaml-language-server checks and completes with it."""
    from llmopt.cli import tables

    tables.quiet_libraries()
    from llmopt.recipe.schema import recipe_schema

    tables.print_json(recipe_schema())
