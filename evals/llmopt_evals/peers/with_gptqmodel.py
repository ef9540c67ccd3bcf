"""GPTQ of GPTQModel, all as it is by default; but for scales of whole channels, which its own order refuses: act-order.

Its checkpoint loads in no plain transformers; so its weights are written once more, unpacked by its own kernel's code,
to be scored like all others.
"""
import os

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")         # with fewer cores it gives up otherwise

import torch
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
from job import Job, carry_out
from transformers import AutoModelForCausalLM


def work(job: Job) -> None:
    order = {} if job.group_size > 0 else {"act_group_aware": False, "desc_act": True}
    model = GPTQModel.load(job.model, GPTQConfig(bits=job.bits, group_size=job.group_size, sym=True, device="cpu",
                                                 offload_to_disk=False, **order))
    rows = [{"input_ids": torch.tensor([row]), "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
            for row in job.rows()]
    with job.solving():
        model.quantize(rows, batch_size=1, backend=BACKEND.AUTO)
    model.save(job.out)
    job.plain = unpacked(job)


@torch.no_grad()
def unpacked(job: Job) -> str:
    """Write the weights that its own reader makes of the checkpoint into a plain folder, in float32."""
    packed = GPTQModel.load(job.out, device="cpu", backend=BACKEND.GPTQ_TORCH).model
    plain = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    for name, module in packed.named_modules():
        if hasattr(module, "dequantize_weight"):
            plain.get_submodule(name).weight.copy_(module.dequantize_weight().T)
    folder = f"{job.out}-plain"
    plain.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    carry_out(work, "gptqmodel")
