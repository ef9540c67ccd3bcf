"""Other tools beside llmopt: the same model, the same token ids, each in an environment of its own.

`with_NAME.py` is a script that an environment's own Python runs; it knows nothing of llmopt (with_llmopt.py, which runs
ours in the same way, apart). job.py is what they are asked and answer, launch.py starts them.
"""
