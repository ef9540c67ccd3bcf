"""llmopt as the other scripts of this folder run their tools: in a process of its own, from the same job."""
from job import Job, carry_out

import llmopt
from llmopt.model.computing import choose
from llmopt.model.loading import load_dense
from llmopt.specs import ModelSpec


def work(job: Job) -> None:
    model, tokenizer = load_dense(ModelSpec(id=job.model))
    choose(model, "auto", "cpu")
    with job.solving():
        report = llmopt.compress(model, job.steps, job.rows(), job.seed, tokenizer=tokenizer)
    report.save(job.out)


if __name__ == "__main__":
    carry_out(work, "llmopt")
