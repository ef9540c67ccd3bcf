"""What a run has finished, on disk, so that a run that was cut off goes on where it was.

    OUT.llmopt-work/
      journal             a line for each finished block or decision: checksum, JSON; the first says whose work this is
      step-K/P-INDEX      what pass P of step K made of a block; P-outside: of all that belongs to no block
      step-K/kept-NAME    tensors that step K wants to find again
      output/             the checkpoint while it is written

A file is written and synced before its line is, and a line counts only with its checksum: a crash at any moment loses
at most the block at work. Checksums (CRC-32) are against accidents, not against forgery; no file's name is ever taken
from the journal.
"""
import errno
import json
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from llmopt.errors import LlmoptError
from llmopt.files import own, shards
from llmopt.files.checks import parse_json
from llmopt.files.json_shapes import check_shape
from llmopt.files.shards import DiskFull
from llmopt.scale.processes import Ranks

OWN = re.compile(r"journal|lock|step-\d+(/[\w.-]+)?|\d+-activations|"
                 rf"output(/({own.CHECKPOINT.pattern}))?")
TORN = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} [^\n]*")        # the first line of a run that died while it was written
CHUNK = 1 << 22                     # bytes read at a time
Key = tuple[int, int | str, int | str]      # step, pass over the blocks, block; or step, "kept", name
HEADER = {"marks": {str: object}}
ENTRY = {"key": str, "checksum": range(2**32), "record": {str: object}}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with what becomes of the work done so far."""


class Journal:
    """The work folder of one run, which the first of its processes writes.

    seconds: what keeping it has cost. messages: what a user should know of it, such as files found damaged.
    keep_on_error: after the last step even a refused checkpoint leaves the finished blocks, so that saving can be tried
    again.
    """

    def __init__(self, folder: Path, ranks: Ranks = Ranks()):        # noqa: B008  frozen
        self.folder, self.file = folder, folder / "journal"
        self.ranks, self.writes = ranks, ranks.is_main
        self.entries: dict[str, dict[str, Any]] = {}
        self.messages: list[str] = []
        self.seconds, self.keep_on_error = 0.0, False

    def check(self, resume: bool) -> None:
        """Raise LlmoptError if somebody else's files are here, or an earlier run's that is not to be gone on with."""
        if not os.path.lexists(self.folder):
            return
        own.check_is_folder(self.folder)
        strange = own.foreign(self.folder, OWN)
        if strange or self.folder.is_symlink() or not self._is_own():
            found = ", ".join(strange[:9]) or "nothing that says so"
            raise LlmoptError(f"{self.folder}: not the work folder of a run of llmopt (it holds {found}); move it "
                              "away, or choose another output")
        if resume:
            return
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.folder.stat().st_mtime))
        raise LlmoptError(f"{self.folder}: an unfinished run of {when}, {max(0, len(self._read()) - 1)} parts done; "
                          "give --resume (resume=True in Python) to go on with it, or remove the folder")

    def _is_own(self) -> bool:
        """True if the folder is empty, or has been a run's: its lock is there, or a journal's first line."""
        if (self.folder / "lock").exists() or self._read() or not any(self.folder.iterdir()):
            return True
        return self.file.is_file() and self.file.stat().st_size < CHUNK and bool(TORN.fullmatch(self.file.read_bytes()))

    @contextmanager
    def opened(self, marks: dict[str, Any]) -> Iterator[None]:
        """The folder, for as long as a run needs it.

        It is gone afterwards if the run is done, or is one that can never be done; else what is finished is kept.
        marks: what makes this run this run. Raises LlmoptError naming the first difference to what the folder holds.
        """
        if not self.writes:
            self.ranks.wait()
            self.entries = {entry["key"]: entry for entry in map(_entry, self._read()[1:])}
            yield
            return
        self.check(resume=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            self._take_up(json.loads(json.dumps(marks)))
            self.ranks.wait()
            try:
                with self._keeping():
                    yield
            finally:
                if not self.entries:
                    self.remove()

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt as error:
            raise Interrupted(f"interrupted; {self._left()}") from error
        except (OSError, DiskFull) as error:
            number = errno.ENOSPC if isinstance(error, DiskFull) else error.errno
            if number not in shards.FULL:
                raise
            fact = str(error).partition(";")[0] if isinstance(error, DiskFull) else \
                f"{self.folder.parent}: {shards.FULL[number]}"
            raise DiskFull(f"{fact}; {self._left()}") from error
        except MemoryError as error:
            raise MemoryError(f"out of memory; {self._left()}") from error
        except LlmoptError as error:
            if self.keep_on_error:
                error.args = (f"{error}; {self._left()}",)
            else:
                self.remove()                           # the same again would end the same way
            raise
        else:
            self.remove()

    def remove(self) -> None:
        """Forget the run; what it did not write stays."""
        with suppress(OSError):
            if not self.folder.is_symlink() and self._is_own():
                own.remove(self.folder, OWN)

    def found(self, key: Key) -> tuple[Path, dict[str, Any]] | None:
        """(file, record) of a finished block; None if there is none, or one that is not whole any more."""
        entry, file = self.entries.get(_text(key)), self.path(key)
        if entry is None:
            return None
        with self._timed():
            if file.is_file() and checksum(file) == entry["checksum"]:
                return file, entry["record"]
        self.messages.append(f"{file.relative_to(self.folder)} was damaged on disk and is done anew")
        return None

    def commit(self, key: Key, tensors: dict[str, Tensor], record: dict[str, Any]) -> Path:
        """Make it known that a block is done; the file that now holds `tensors`."""
        with self._timed():
            file = self.write(self.path(key), tensors)
            if self.writes:
                shards.sync(file.parent, [file])
                self._append({"key": _text(key), "checksum": checksum(file), "record": record})
        return file

    def remember(self, step: int, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of `compute` in every process, plain JSON data; an earlier run's answer if there is one."""
        key = f"{step}.{name}"
        if key not in self.entries:
            entry = {"key": key, "checksum": 0, "record": compute()}
            if self.writes:
                with self._timed():
                    self._append(entry)
            else:
                self.entries[key] = _entry(_line(entry))
        return self.entries[key]["record"]

    def path(self, key: Key) -> Path:
        """The file for the tensors of a block."""
        step, sweep, place = key
        return self.folder / f"step-{step}" / f"{sweep}-{_file_name(place)}"

    def write(self, file: Path, tensors: dict[str, Tensor]) -> Path:
        """One file, whole or not there; tensors of an older file of this name stay mapped."""
        if self.writes:
            file.parent.mkdir(parents=True, exist_ok=True)
            with shards.full_disks():
                shards.save(tensors, beside := file.with_name(f"{file.name}.partial"))
            os.replace(beside, file)
        self.ranks.wait()               # all have read what the layer was, and can read what it is
        return file

    def _append(self, entry: dict[str, Any]) -> None:
        line = _line(entry)
        with self.file.open("ab") as stream:
            stream.write(line)
            stream.flush()
            os.fsync(stream.fileno())
        self.entries[entry["key"]] = _entry(line)

    def _take_up(self, marks: dict[str, Any]) -> None:
        """Go on with what is there, or begin."""
        lines = self._read()
        if not lines:
            self.file.write_bytes(_line({"marks": marks}))
            shards.sync(self.folder, [self.file])
            return
        if found := difference(_body(lines[0], HEADER)["marks"], marks):
            raise LlmoptError(f"{self.folder}: holds the unfinished work of another run: {found}. Go on with that run, "
                              "or remove the folder")
        self.entries = {entry["key"]: entry for entry in map(_entry, lines[1:])}
        os.truncate(self.file, sum(map(len, lines)))
        if self.entries:
            self.messages.append(f"resumed: {len(self.entries)} parts were done")

    def _read(self) -> list[bytes]:
        """The lines up to the first that is not whole."""
        whole: list[bytes] = []
        try:
            for line in self.file.read_bytes().splitlines(keepends=True):
                _body(line, ENTRY if whole else HEADER)
                whole.append(line)
        except (OSError, LlmoptError):
            pass
        return whole

    def _left(self) -> str:
        if not self.entries:
            return "nothing was finished yet and nothing is left"
        return f"what is finished is kept in {self.folder}, --resume goes on with it"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Raise LlmoptError if another process is at work here."""
        lock = FileLock(self.folder / "lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise LlmoptError(f"{self.folder}: in use by another run") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - start


def _file_name(place: int | str) -> str:
    """Part of a file's name: a block's number, or a name with its checksum where it holds what a file's should not."""
    if isinstance(place, int):
        return f"{place:05d}"
    plain = re.sub(r"[^\w.-]", "-", place, flags=re.ASCII)[:80]
    return plain if plain == place else f"{plain}-{zlib.crc32(place.encode()):08x}"


def _text(key: Key) -> str:
    return ".".join(map(str, key))


def _line(content: dict[str, Any]) -> bytes:
    body = json.dumps(content, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(body), body)


def _body(line: bytes, shape: dict) -> dict[str, Any]:
    """The content of a line; raises LlmoptError unless it is whole and of this shape."""
    check, _, body = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or check != b"%08x" % zlib.crc32(body):
        raise LlmoptError("a damaged line")
    content = parse_json(body, "journal")
    check_shape(content, shape, "journal")
    return content


def _entry(line: bytes) -> dict[str, Any]:
    return _body(line, ENTRY)


def checksum(file: Path) -> int:
    """CRC-32 of a file's bytes."""
    value = 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def difference(old: Any, new: Any, path: str = "") -> str | None:
    """The first place where two JSON values differ, in words; None if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = dict.fromkeys([*old, *new])
        return next((found for key in keys if (found := difference(old.get(key), new.get(key), f"{path}.{key}"))), None)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return next((found for i, (a, b) in pairs if (found := difference(a, b, f"{path}.{i}"))), None)
    return None if old == new else f"{path.strip('.')} was {str(old)[:100]}, is {str(new)[:100]}"
