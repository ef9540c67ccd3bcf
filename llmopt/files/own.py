"""Folders that llmopt writes: which of their entries are its own, and removing these alone."""
import os
import re
from collections.abc import Iterator
from pathlib import Path

from llmopt.errors import LlmoptError

TOKENIZER = (r"(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab|chat_template)\.json|merges\.txt|"
             r"vocab\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model|chat_template\.jinja|"
             r"additional_chat_templates/[^/]+\.jinja")
TOKENIZERS = re.compile(TOKENIZER)
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
              "chat_template.json")
LICENCES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
CHECKPOINT = re.compile(
    r"config\.json|generation_config\.json|modeling_llmopt\.py|model(-\d+-of-\d+)?\.safetensors|part-\d+|"
    r"model\.safetensors\.index\.json|recipe\.yaml|plan\.json|llmopt\.json|llmopt\.log|README\.md|PARTIAL|"
    rf"eval-(before|after)\.json|\.[\w.-]+\.partial-\d+|{TOKENIZER}|{'|'.join(map(re.escape, PROCESSORS + LICENCES))}")
PARTIAL = "PARTIAL"             # a file: what lies beside it are some blocks only, and no model
PROOFS = ("journal", "lock", "llmopt.json")
MOUNTS = Path("/proc/self/mountinfo")


def check_is_folder(place: Path) -> None:
    """Raise LlmoptError for anything at `place` that is no plain folder: a file, device, FIFO, socket, mount point."""
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        kind = "file" if place.is_file() else "link to nothing" if place.is_symlink() else "device, socket or FIFO"
        raise LlmoptError(f"{place}: is a {kind}, where a folder is to be")
    if is_mount(place):
        raise LlmoptError(f"{place}: is a mount point, which cannot be replaced; choose a folder inside it")


def is_mount(place: Path) -> bool:
    """True if a file system, or a folder of another place, is mounted at `place`."""
    if os.path.ismount(place) or not MOUNTS.is_file():
        return os.path.ismount(place)
    points = (line.split()[4] for line in MOUNTS.read_text(errors="surrogateescape").splitlines())
    return os.fspath(place.absolute()) in (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), p) for p in points)


def entries(folder: Path) -> Iterator[str]:
    """Every file, link and empty folder below `folder`, as a path from there; links are not followed."""
    for home, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(home, name))]
        for name in files + links:
            yield Path(home, name).relative_to(folder).as_posix()
        if not folders and not files and Path(home) != folder:
            yield Path(home).relative_to(folder).as_posix()


def foreign(folder: Path, known: re.Pattern) -> list[str]:
    """The entries of a folder, whose names none of llmopt's files have; folders by their own name, in order."""
    strange = (name for name in entries(folder) if not known.fullmatch(name))
    return sorted({name.partition("/")[0] for name in strange})


def remove(folder: Path, known: re.Pattern) -> None:
    """Delete the entries that `known` names, and the folders that are empty then; all others stay.

    What proves a folder to be llmopt's goes last, when no other folder is left in it: a removal that is interrupted
    anywhere can be gone on with.
    """
    names = [name for name in entries(folder) if known.fullmatch(name)]
    _delete(folder, [name for name in names if name not in PROOFS])
    _delete(folder, [name for name in names if name in PROOFS])


def _delete(folder: Path, names: list[str]) -> None:
    """Delete these files and links of a folder, and every folder that is empty then."""
    for name in names:
        if not (folder / name).is_dir() or (folder / name).is_symlink():
            (folder / name).unlink(missing_ok=True)
    for home, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(home):
            os.rmdir(home)
