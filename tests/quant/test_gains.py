"""What of an error in a weight its block loses, against running the blocks by hand."""
import pytest
import torch

from llmopt.method import Run
from llmopt.model.blocks import blocks
from llmopt.quant import GPTQ
from llmopt.quant.gains import gains
from tests.quant.quant_data import batches
from tests.tiny import ids, make


def coarse(projection):
    return (projection.weight * 4).round() / 4


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_gains_are_those_of_blocks_run_by_hand(family):
    model = make(family)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    batch = {"input_ids": ids(2, 12), "attention_mask": mask}
    found = gains(model, Run([batch]), coarse)
    block = blocks(model)[1]
    for group in block.groups():
        seen = {}

        def see(name, seen=seen):
            def hook(module, args, out):
                seen[name] = args[0], out[0] if isinstance(out, tuple) else out
            return hook

        handles = [block.module.register_forward_hook(see("block")), *(
            p.module.register_forward_hook(see(p.name)) for p in group)]
        with torch.no_grad():
            model(**batch)
            dense, before = dict(seen), [p.weight.clone() for p in group]
            for p in group:
                p.write(coarse(p))
            model(**batch)
            for p, weight in zip(group, before, strict=True):
                p.write(weight)
        for handle in handles:
            handle.remove()
        real = mask.bool()
        energy = [sum(float(part[real].square().sum()) for part in parts) for parts in (
            [dense[p.name][0] @ p.weight.T for p in group], [seen[p.name][1] - dense[p.name][1] for p in group])]
        old, new = dense["block"][1][real], seen["block"][1][real]
        behind = float(((new - old).square().sum(-1) / old.square().sum(-1)).mean())
        assert found[group[0].name] == pytest.approx(behind * energy[0] / energy[1], rel=1e-3)


def test_a_reader_whose_errors_go_nowhere_gets_the_fewest_bits():
    model = make("llama")
    block = model.model.layers[1]
    block.mlp.gate_proj.weight.data.zero_()                 # silu(0) = 0: what up_proj writes is multiplied by 0
    block.self_attn.q_proj.weight.data.mul_(1e-3)           # attention is even, whatever q and k are
    block.self_attn.v_proj.weight.data.mul_(1e-3)
    told = GPTQ(bits=3, group_size=32, allocate="hessian", widths=(2, 3, 4)).apply(model, Run(batches())).meta
    scores = told["allocation"]["scores"]
    assert max(scores["model.layers.1.mlp.gate_proj"].values()) < 1e-6
    assert told["modules"]["model.layers.1.mlp.up_proj"]["bits"] == 2
    assert max(entry["bits"] for entry in told["modules"].values()) > 2
