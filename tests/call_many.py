"""Runs several `llmopt` commands in one process, as where the environment is read at import: HF_ENDPOINT.

python call_many.py RESULTS.json < [["compress", ...], {"HF_TOKEN": "x"}, ["push", ...]]; a mapping changes os.environ,
a word alone is a file to be made.
"""
import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

from llmopt.cli.commands import main

RESULTS = sys.argv[1]


def call(words: list[str]) -> dict:
    """Exit code, output and seconds of one command."""
    sys.argv, out, err, start = ["llmopt", *words], io.StringIO(), io.StringIO(), time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as leave:
            code = leave.code
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - start}


results = []
for entry in json.load(sys.stdin):
    if isinstance(entry, dict):
        os.environ.update(entry)
    elif isinstance(entry, str):
        Path(entry).write_text("secret")
    else:
        results.append(call(entry))
with open(RESULTS, "w") as file:
    json.dump(results, file)
