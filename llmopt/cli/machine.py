"""What `llmopt doctor` looks at: one function a subject, each a generator of findings.

A finding is good news (ok), worth knowing (note), or in the way of a run (problem), in one line.
"""
from __future__ import annotations

import importlib.metadata as metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from llmopt.scale.available import available

ROOM = 5_000_000_000            # free bytes below which a folder for models is worth a note
GIVES = {"triton": "compiles the product with packed weights for GPUs; the CPU needs none",
         "flash-attn": "transformers' attn_implementation='flash_attention_2' on GPUs; the CPU needs none"}
SETS = (("AVX2", "avx2"), ("AVX-512", "avx512_f"), ("bf16", "avx512_bf16"), ("AMX", "amx_tile"))
OPENMP = re.compile(r"\S*/lib(?:gomp|iomp5|omp)(?:-\w+)?\.(?:so|dylib)[\w.]*$", re.MULTILINE)


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "note", "problem"]
    subject: str
    fact: str


def examined() -> list[Finding]:
    """Everything; what cannot be looked at is a problem of its own."""
    return [finding for look in (system, processor, cores, memory, devices, dependencies, accelerators, folders, hub,
                                 openmp, script) for finding in _guarded(look)]


def _guarded(look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    try:
        yield from look()
    except (ImportError, OSError, RuntimeError) as error:       # a torch that does not start, say
        yield Finding("problem", look.__name__, f"cannot be looked at: {error}")


def system() -> Iterator[Finding]:
    """Python and the operating system."""
    wanted, found = SpecifierSet(_described().get("Requires-Python") or ""), platform.python_version()
    yield Finding("ok" if found in wanted else "problem", "Python", f"{found}, {wanted} wanted, {sys.executable}")
    yield Finding("ok", "platform", f"{platform.system()} {platform.release()}, {platform.machine()}")


def processor() -> Iterator[Finding]:
    """The instruction sets that decide how fast this CPU computes, and in which type."""
    import torch

    flags = torch.cpu.get_capabilities()
    there = [name for name, flag in SETS if flags.get(flag)] or [
        name for name in ("neon", "sve", "bf16", "fp16") if flags.get(name)]
    uses = torch.backends.cpu.get_cpu_capability()
    yield Finding("ok", "CPU", f"{', '.join(there) or 'none that torch names'}; torch uses {uses}")
    if not any(flags.get(flag) for flag in ("avx512_bf16", "amx_bf16", "bf16")):
        yield Finding("note", "CPU", "no bf16 arithmetic: bf16 models compute in float32 (compute_dtype: auto)")


def cores() -> Iterator[Finding]:
    """How many threads a run takes, and how many it can have."""
    import torch

    return threads_fit(torch.get_num_threads(), usable_cores(), psutil.getloadavg()[0])


def threads_fit(threads: int, usable: float, load: float) -> Iterator[Finding]:
    """Findings on torch's threads; load: of the whole machine, in processes that want to run."""
    yield Finding("ok", "cores", f"{usable:g} to be used, {threads} threads (OMP_NUM_THREADS), load {load:.1f}")
    if threads > usable:
        yield Finding("problem", "threads", f"{threads} threads share {usable:g} cores and wait for each other; "
                      f"OMP_NUM_THREADS={max(1, int(usable))} is faster")
    elif threads > 1 and load > usable / 2:
        yield Finding("note", "threads", f"the machine is busy (load {load:.1f}): {threads} threads will wait for the "
                      f"slowest; OMP_NUM_THREADS={max(1, int(usable - load))} may be faster")


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """The cores that this process may run on: by its affinity, and by the quota of its container."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = quota.read_text().split() if quota.is_file() else ["max"]
    return mine if words[0] == "max" else min(mine, int(words[0]) / int(words[1]))


def memory() -> Iterator[Finding]:
    """What a run can take before it is streamed."""
    from llmopt.cli.tables import human

    total, swap = psutil.virtual_memory().total, psutil.swap_memory().total
    yield Finding("ok", "memory", f"{human(available())} available of {human(total)}, swap {human(swap)}; models that "
                  "take more are streamed")


def devices() -> Iterator[Finding]:
    """GPUs that torch can use, and one that it cannot."""
    import torch

    from llmopt.cli.tables import human

    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"cuda:{i}", f"{about.name}, {human(about.total_memory)}, compute capability "
                      f"{about.major}.{about.minor}")
    if torch.backends.mps.is_available():
        yield Finding("note", "mps", "there, and never tried with llmopt")
    if not torch.cuda.device_count():
        yield from without_gpu(torch.__version__, torch.version.cuda, Path("/dev/nvidiactl").exists())


def without_gpu(version: str, cuda: str | None, there: bool) -> Iterator[Finding]:
    """Findings where torch sees no GPU; cuda: what torch was built for, there: the machine has one all the same."""
    if there and cuda is None:
        yield Finding("problem", "devices", f"this machine has an NVIDIA GPU, and torch {version} is built for the CPU "
                      "alone: install torch from https://download.pytorch.org/whl/")
    elif there:
        yield Finding("problem", "devices", f"this machine has an NVIDIA GPU that torch {version} (CUDA {cuda}) cannot "
                      "use: look at nvidia-smi and CUDA_VISIBLE_DEVICES")
    else:
        yield Finding("ok", "devices", "cpu alone")


def _described() -> metadata.PackageMetadata:
    try:
        return metadata.metadata("llmopt")
    except metadata.PackageNotFoundError:
        raise ImportError("llmopt is not installed (pip install -e . in its folder)") from None


def dependencies() -> Iterator[Finding]:
    """The versions that are installed against what llmopt's own metadata ask for."""
    return held_against(map(Requirement, _described().get_all("Requires-Dist") or ()))


def held_against(wanted: Iterable[Requirement],
                 installed: Callable[[str], str] = metadata.version) -> Iterator[Finding]:
    """A finding for each requirement that no extra asks for."""
    for one in (one for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})):
        try:
            found = installed(one.name)
        except metadata.PackageNotFoundError:
            yield Finding("problem", one.name, f"is missing: pip install '{one.name}{one.specifier}'")
            continue
        fits = one.specifier.contains(found, prereleases=True)
        yield Finding("ok" if fits else "problem", one.name, f"{found}, {one.specifier or 'any'} wanted" + (
            "" if fits else f": pip install '{one.name}{one.specifier}'"))


def accelerators() -> Iterator[Finding]:
    """Packages that are never needed."""
    for name, gives in GIVES.items():
        try:
            yield Finding("ok", name, f"{metadata.version(name)}: {gives}")
        except metadata.PackageNotFoundError:
            yield Finding("note", name, f"not installed: {gives}")


def folders() -> Iterator[Finding]:
    """Where models, scores and temporary files go."""
    import tempfile

    from huggingface_hub import constants

    from llmopt.files.cache import VARIABLE, folder

    yield place("hub cache", Path(constants.HF_HUB_CACHE), "HF_HOME")
    yield place("scores", folder("scores"), VARIABLE)
    yield place("temporary files", Path(tempfile.gettempdir()), "TMPDIR")


def place(subject: str, folder: Path, variable: str) -> Finding:
    """A finding on a folder that need not be there yet; variable: what moves it elsewhere."""
    from llmopt.cli.tables import human

    above = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        return Finding("problem", subject, f"{folder}: cannot be written to; {variable} moves it")
    free = shutil.disk_usage(above).free
    return Finding("ok" if free > ROOM else "note", subject, f"{folder}: {human(free)} free" + (
        "" if free > ROOM else f", little for models; {variable} moves it"))


def hub() -> Iterator[Finding]:
    """How the hub is asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "hub", "HF_HUB_OFFLINE is set: only what is in the cache is found")
    else:
        yield Finding("ok", "hub", f"{constants.ENDPOINT}, {'logged in' if get_token() else 'not logged in'}")


def openmp() -> Iterator[Finding]:
    """OpenMP runtimes in this process, once those libraries are loaded that bring one."""
    import numpy  # noqa: F401
    import torch  # noqa: F401

    maps = Path("/proc/self/maps")
    if maps.is_file():
        yield one_runtime(maps.read_text(errors="surrogateescape"))


def one_runtime(maps: str) -> Finding:
    """A finding on the OpenMP libraries that are mapped; several take turns at the cores, or stop each other."""
    there = sorted({found[0].strip() for found in re.finditer(OPENMP, maps)})
    if len(there) < 2:
        return Finding("ok", "OpenMP", Path(there[0]).name if there else "none loaded")
    return Finding("note", "OpenMP", f"{len(there)} runtimes in one process ({', '.join(there)}), each with threads of "
                   "its own; OMP_NUM_THREADS bounds each of them")


def script() -> Iterator[Finding]:
    """The `llmopt` that a shell finds, against the Python that runs here."""
    found = shutil.which("llmopt")
    if found is None:
        yield Finding("note", "llmopt", f"not on the PATH; `{sys.executable} -m llmopt` works too")
    elif Path(found).parent.resolve() != Path(sys.executable).parent.resolve():
        yield Finding("note", "llmopt", f"{found} is of another Python than {sys.executable}")
    else:
        yield Finding("ok", "llmopt", f"{metadata.version('llmopt')}, {found}")
