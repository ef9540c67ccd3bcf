"""The README.md of a checkpoint: a model card made from llmopt.json alone, so it can be written again at any time."""
import json
from pathlib import Path

from jinja2 import Environment

TEMPLATE = """---
base_model: {{ base_model }}
{%- if base_licence %}
license: {{ base_licence }}
{%- endif %}
library_name: transformers
tags: [llmopt, compressed]
---
# {{ name }}

{{ base_model }}, compressed with [llmopt](https://pypi.org/project/llmopt/) {{ versions["llmopt"] }}.
{% if per_layer %}
**This checkpoint has per-layer shapes.** Plain transformers refuses it: `import llmopt` first, or load it with
`trust_remote_code=True`.
{% endif %}
## Loading

| way | result |
|---|---|
{%- for way, result in loads_with.items() %}
| {{ way }} | {{ result }} |
{%- endfor %}

```python
{{ "import llmopt\n" if needs_import }}from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{{ name }}")
```

## Made by

```
llmopt compress --recipe recipe.yaml --output {{ name }}
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


def write_card(folder: Path, name: str) -> None:
    """Write README.md from the folder's llmopt.json."""
    facts = json.loads((folder / "llmopt.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = Environment(autoescape=False).from_string(TEMPLATE).render(
        name=name, per_layer="per_layer_config" in config, table=facts.get("table", []),
        needs_import=facts["loads_with"]["transformers"] != "exact",
        steps=[record["method"] for record in facts.get("records", [])] or ["none"],
        **{key: facts[key] for key in ("base_model", "base_licence", "versions", "loads_with")})
    (folder / "README.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
