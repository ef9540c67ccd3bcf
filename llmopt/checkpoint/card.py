"""The README.md of a checkpoint: a model card made from llmopt.json alone, so it can be written again at any time."""
import shlex
from pathlib import Path

from jinja2 import Environment

from llmopt.checkpoint.facts import FILE, read_facts, read_layers
from llmopt.files.shards import write_text
from llmopt.model.architectures import SPECS, Spec

TEMPLATE = """---
{%- if base_repo %}
base_model: {{ base_repo }}
{%- endif %}
{%- if base_licence %}
license: {{ base_licence }}
{%- endif %}
library_name: transformers
tags: [llmopt, compressed]
---
# {{ repo or name.split("/")[-1] + ", compressed" }}

{{ name }}, compressed with [llmopt](https://pypi.org/project/llmopt/) {{ versions["llmopt"] }}.
{% if note %}
Compressed are the {{ note }}.
{% endif %}
{%- if per_layer %}
**This checkpoint has per-layer shapes.** Plain transformers refuses it: `import llmopt` first, or load it with
`trust_remote_code=True`.
{% endif %}
## Loading

| way | result |
|---|---|
{%- for way, result in loads_with.items() %}
| {{ way }} | {{ result }} |
{%- endfor %}

Written and checked with transformers {{ versions["transformers"] }}.
{%- if rotary_of_5 %} It takes transformers>=5: the names of older versions cannot say its rotary settings.
{%- else %} Its settings also stand under the names of transformers 4 (4.56 or newer), with which it was not checked.
{%- endif %}

```python
{{ "import llmopt\n" if needs_import }}from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{{ repo or "." }}"){{ "      # this folder" if not repo }}
```

## Made by

```
{{ local_base }}llmopt compress --recipe recipe.yaml {{ changes }}--output out
```

Steps: {{ steps | join(" -> ") }}.

Versions: {% for k, v in versions.items() %}{{ k }} {{ v }}{{ ", " if not loop.last }}{% endfor %}.
{% if table %}
## Measured

| | before | after |
|---|---|---|
{%- for row in table %}
| {{ row[0] }} | {{ row[1] }} | {{ row[2] }} |
{%- endfor %}
{% endif %}"""


def write_card(folder: Path) -> None:
    """Write README.md from the folder's llmopt.json; the folder's own name stays out, so that runs repeat."""
    write_text(folder / "README.md", render(folder))


def card_for(folder: Path, repo: str) -> str | None:
    """The card under the name `repo`; None for a folder whose README.md is not ours, or was edited."""
    mine = folder / "README.md"
    if not mine.is_file() or not (folder / FILE).is_file():
        return None
    text = mine.read_text(encoding="utf-8", errors="replace")
    return render(folder, repo) if text == render(folder) else None


def _folder_name(base_model: str) -> str:
    """A local model by the name of its folder; other names as they are."""
    local = base_model.startswith(("/", ".", "~"))
    return Path(base_model).name if local and Path(base_model).name else base_model


def render(folder: Path, repo: str | None = None) -> str:
    """The text of the card of the checkpoint in `folder`, or under the hub name `repo`."""
    facts, config = read_facts(folder), read_layers(folder)
    note = SPECS.get(str(config.get("model_type")), Spec()).note
    name = _folder_name(facts["base_model"])
    base = facts.get("base_repo", name if name == facts["base_model"] else None)    # older files do not tell
    text = Environment(autoescape=False).from_string(TEMPLATE).render(
        repo=repo, note=note, per_layer="per_layer_config" in config, table=facts.get("table", []),
        needs_import=facts["loads_with"]["transformers"] != "exact",
        changes="".join(f"{shlex.quote(word)} " for word in facts.get("changes", [])),
        steps=[record["method"] for record in facts.get("records", [])] or ["none"],
        base_repo=base, name=name, local_base="" if base else f"base_model: {name}     # not a name of the hub\n",
        rotary_of_5="rope_parameters" in config and not {"rope_theta", "rotary_emb_base"} & config.keys(),
        **{key: facts[key] for key in ("base_licence", "versions", "loads_with")})
    return text.rstrip("\n") + "\n"
