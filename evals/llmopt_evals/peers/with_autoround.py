"""AutoRound with so many iterations, all else as it is by default."""
import compressed_tensors  # noqa: F401  what it saves needs it, which it would find out at its end, an hour later
from auto_round import AutoRound
from job import Job, carry_out
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 8


def work(job: Job) -> None:
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
    rows = job.rows()
    rounding = AutoRound(model, tokenizer=AutoTokenizer.from_pretrained(job.model), dataset=job.loader(BATCH),
                         bits=job.bits, group_size=job.group_size, sym=True, iters=job.iterations, batch_size=BATCH,
                         nsamples=len(rows), seqlen=len(rows[0]), enable_torch_compile=False, device_map="cpu")
    with job.solving():
        rounding.quantize()
    rounding.save_quantized(job.out, format="llm_compressor")


if __name__ == "__main__":
    carry_out(work, "auto-round")
