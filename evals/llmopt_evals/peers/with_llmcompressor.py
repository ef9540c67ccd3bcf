"""GPTQ of llm-compressor: act-order with static scales (its default), scales searched for the squared error."""
from job import Job, carry_out
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

OBSERVER = "memoryless_mse"         # does better than the default, the range as it is


def work(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    strategy = {"strategy": "channel"} if job.group_size == -1 else {"strategy": "group", "group_size": job.group_size}
    weights = {"num_bits": job.bits, "type": "int", "symmetric": True, "observer": OBSERVER, **strategy}
    recipe = GPTQModifier(config_groups={"all": {"targets": ["Linear"], "weights": weights}}, ignore=["lm_head"])
    rows = job.rows()
    with job.solving():
        oneshot(model=model, dataset=job.loader(1), recipe=recipe, processor=AutoTokenizer.from_pretrained(job.model),
                num_calibration_samples=len(rows), max_seq_length=len(rows[0]))
    model.save_pretrained(job.out, save_compressed=True)


if __name__ == "__main__":
    carry_out(work, "llmcompressor")
