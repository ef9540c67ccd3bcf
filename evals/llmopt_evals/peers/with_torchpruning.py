"""Torch-Pruning: FFN channels by the L2 norm of all weights of a channel, its default, averaged over the group.

Only FFNs, and all layers alike: with query heads it never ends on models of Grouped-Query Attention, and what it cuts
to several widths no plain config can store. Llama's names are expected.
"""
import torch
import torch_pruning as tp
from job import Job, carry_out
from transformers import AutoModelForCausalLM


def work(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    model.config.use_cache = False              # its tracing does not know caches
    left = [module for name, module in model.named_modules()
            if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "lm_head", "embed_tokens"))]
    with job.solving():
        tp.pruner.BasePruner(model, torch.tensor([job.rows()[0][:16]]), tp.importance.GroupMagnitudeImportance(p=2),
                             pruning_ratio=job.ratio, ignored_layers=left, round_to=16,
                             output_transform=lambda out: out.logits).step()
    model.config.intermediate_size = model.model.layers[0].mlp.down_proj.in_features
    model.config.use_cache = True
    model.save_pretrained(job.out)


if __name__ == "__main__":
    carry_out(work, "torch-pruning")
