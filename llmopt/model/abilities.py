"""What of llmopt works on an architecture: the table of the README, from the same entries that refuse the rest."""
from llmopt.model.architectures import NORMS_KEPT, SPECS, UNITS, UNTURNED


def abilities(kind: str) -> dict[str, str | None]:
    """{a family, a transform, a unit of pruning, or what may differ by layer: None where it works, else why not}.

    kind: one of SPECS.
    """
    spec = SPECS[kind]
    no = spec.refuse
    return {"heads.*": None, "kv.*": None, "attention.*": None, "quant.*": no.get("packed"),
            "transform.fold_norms": NORMS_KEPT.get(spec.form),
            "transform.smoothquant": NORMS_KEPT.get(spec.form),
            "transform.rotate": UNTURNED.get(spec.form, no.get("ffn")), **{unit: no.get(unit) for unit in UNITS},
            "widths by layer": no.get("ffn", no.get("per_layer_shapes")),
            "heads by layer": no.get("kv_groups", no.get("per_layer_heads", no.get("per_layer_shapes")))}
