"""What of llmopt works on an architecture or a model, from the same entries and looks that refuse the rest."""
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmopt.errors import LlmoptError
from llmopt.model.architectures import CONV1D, NORMS_KEPT, SPECS, UNITS, UNTURNED
from llmopt.model.blocks import blocks, spec_of
from llmopt.model.experts import experts_of, told_count
from llmopt.model.levels import lacking
from llmopt.model.shapes import check_droppable


def abilities(kind: str) -> dict[str, str | None]:
    """{a family, a transform, a unit of pruning, or what may differ by layer: None where it works, else why not}.

    kind: one of SPECS.
    """
    spec = SPECS[kind]
    no = spec.refuse
    return {"heads.*": None, "kv.*": None, "attention.*": None, "quant.*": no.get("packed"),
            "transform.fold_norms": NORMS_KEPT.get(spec.form),
            "transform.smoothquant": NORMS_KEPT.get(spec.form),
            "transform.rotate": UNTURNED.get(spec.form, no.get("ffn")), **_leaves(no)}


def _leaves(no: dict[str, str]) -> dict[str, str | None]:
    """What pruning may take, and whether layers may differ; no: what an entry refuses."""
    return {**{unit: no.get(unit) for unit in UNITS}, "widths by layer": no.get("ffn", no.get("per_layer_shapes")),
            "heads by layer": no.get("kv_groups", no.get("per_layer_heads", no.get("per_layer_shapes")))}


def abilities_of(model: nn.Module) -> dict[str, str | None]:
    """As `abilities`, of a model that no table need describe; one without weights will do."""
    if spec_of(model).known:
        return abilities(model.config.model_type)
    running = lacking(model)["run time"]
    no = spec_of(model).refuse
    return dict.fromkeys(abilities(next(iter(SPECS))), no["mlp"]) | {
        "heads.*": running, "kv.*": running, "attention.*": running, "quant.*": _unpackable(model),
        **_leaves(no), "blocks": _without_one(model)}


def abilities_of_experts(model: nn.Module) -> dict[str, str | None]:
    """As `abilities_of`, of a model's experts; nothing where it has none."""
    try:
        found = [experts for block in blocks(model) if (experts := experts_of(block.module, block.name))]
    except LlmoptError as error:
        return dict.fromkeys(("prune.experts", "experts.*"), str(error))
    if not found:
        return {}
    return {"prune.experts": _uncounted(model, found[0].count), "experts.*": lacking(model)["run time"]}


def _uncounted(model: nn.Module, count: int) -> str | None:
    """Why its config cannot say that some of its experts have left; None: it can."""
    try:
        told_count(model.config, count)
    except LlmoptError as error:
        return str(error)
    return None


def _unpackable(model: nn.Module) -> str | None:
    """Why compressed-tensors cannot hold all that is quantized; None: it can."""
    views = blocks(model)
    if any(isinstance(p.module, Conv1D) for block in views for p in block.projections()):
        return CONV1D
    return None


def _without_one(model: nn.Module) -> str | None:
    """Why the model cannot do without the block in its middle; None: it can."""
    count = len(blocks(model))
    try:
        check_droppable(model, [index for index in range(count) if index != count // 2])
    except LlmoptError as error:
        return str(error).rpartition("blocks cannot be pruned: ")[2]
    return None
