"""Tiny random models of every supported family, made from configs."""
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)      # two workers share two cores; results must not depend on the machine's


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also the slow tier: clean wheel install, every pair")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--full"):
        return
    skip = pytest.mark.skip(reason="full tier: run with --full")
    for item in items:
        if "full" in item.keywords:
            item.add_marker(skip)
