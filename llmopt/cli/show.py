"""Commands that look and change nothing: `llmopt show`, `methods`, `schema`."""
import click

from llmopt.cli import completion
from llmopt.cli.help import Command
from llmopt.cli.options import JSON, ways


@click.command(cls=Command, examples=("llmopt show llmopt/reference", "llmopt show out", "llmopt show out --json"))
@click.argument("model", shell_complete=completion.models)
@click.option("--revision", help="Branch, tag or commit of a hub name.")
@ways
@JSON
def show(model, revision, as_json, **opened) -> None:
    """What is inside a folder or hub model: shapes, bits, sizes, provenance, how it loads, what can be done to it.

    Of a hub model only its small files are fetched, and a GGUF file.
    """
    from llmopt.cli.tables import quiet_libraries

    quiet_libraries()
    from llmopt.checkpoint.facts import check_runtime, read_facts
    from llmopt.checkpoint.look import checkpoint_facts, checkpoint_folder, dense_facts
    from llmopt.cli import contents
    from llmopt.specs import ModelSpec

    spec = ModelSpec(id=model, revision=revision, **opened)
    folder = checkpoint_folder(spec)
    if folder is None:
        contents.show_dense(dense_facts(spec), as_json)
        return
    facts = read_facts(folder)
    found = checkpoint_facts(folder, facts)
    check_runtime(folder, facts, spec)
    contents.show_checkpoint(found, as_json)


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
