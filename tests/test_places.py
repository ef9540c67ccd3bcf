"""Where an output may go: only a folder that is new, empty or llmopt's own is written to, nothing else is touched."""
import os
import shutil
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import llmopt
from llmopt.checkpoint.place import prepare_output
from llmopt.errors import LlmoptError
from llmopt.files import own
from llmopt.scale.journal import OWN, Interrupted, Journal
from tests import tiny
from tests.command import call
from tests.conftest import mount

RTN = "steps:\n  - quant.rtn: {bits: 8, group_size: 16}\n"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """A dense model, and a checkpoint of llmopt."""
    folder = tmp_path_factory.mktemp("places")
    tiny.make("llama").save_pretrained(folder / "m")
    (folder / "r.yaml").write_text(RTN)
    with pytest.MonkeyPatch.context() as patch:
        assert call(patch, "compress", "--recipe", folder / "r.yaml", "--model", folder / "m", "--output",
                    folder / "done", "--no-eval") == 0
    return folder


@pytest.fixture
def compress(monkeypatch, capfd, pristine, tmp_path):
    """The error of a run into a place of `tmp_path`, which changes nothing there."""

    def run(output: Path, *words) -> str:
        before = snapshot(tmp_path)
        code = call(monkeypatch, "compress", "--recipe", pristine / "r.yaml", "--model", pristine / "m", "--output",
                    output, "--no-eval", *words)
        err = capfd.readouterr().err
        assert code == 2, err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1, err
        assert snapshot(tmp_path) == before
        return err

    return run


def snapshot(folder: Path) -> dict[str, tuple]:
    """Kind and content of everything below a folder."""
    return {str(p): (stat.S_IFMT(p.lstat().st_mode), p.read_bytes() if p.is_file() else None)
            for p in folder.rglob("*")}


def device(place: Path) -> None:
    try:
        os.mknod(place, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making devices is forbidden here")


def unix_socket(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(place))


def link_to_fifo(place: Path) -> None:
    os.mkfifo(place.with_name("fifo"))
    place.symlink_to(place.with_name("fifo"))


def link_in_circle(place: Path) -> None:
    place.symlink_to(place)


@pytest.mark.parametrize("make", [device, os.mkfifo, unix_socket, link_to_fifo, link_in_circle, Path.touch])
@pytest.mark.parametrize("where", ["out", "out.llmopt-work"])
def test_what_is_no_folder_stays_what_it_is(compress, tmp_path, make, where):
    make(tmp_path / where)
    for words in ((), ("--overwrite",), ("--resume",)):
        assert str(tmp_path) in compress(tmp_path / "out", *words)


@pytest.mark.parametrize("make", [device, os.mkfifo])
def test_results_are_not_written_over_a_device(monkeypatch, capfd, tmp_path, make):
    make(tmp_path / "out")
    kind = stat.S_IFMT((tmp_path / "out").lstat().st_mode)
    for words in (("eval", "llmopt/reference", "--tasks", "world_ppl"), ("heads", "llmopt/reference")):
        assert call(monkeypatch, *words, "--output", tmp_path / "out") == 2
        assert "not a file" in capfd.readouterr().err
    assert stat.S_IFMT((tmp_path / "out").lstat().st_mode) == kind


def test_a_mount_point_is_refused_before_the_work(compress, tmp_path):
    (tmp_path / "out").mkdir()
    mount(tmp_path / "out", "1m")
    try:
        assert "is a mount point" in compress(tmp_path / "out")
        assert "is a mount point" in compress(tmp_path / "out", "--overwrite")
    finally:
        subprocess.run(["umount", "-l", str(tmp_path / "out")], check=True)


def test_mount_points_are_known_by_the_systems_list(tmp_path, monkeypatch):
    """A bind mount has the device of its parent, so os.path.ismount misses it."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "list").write_text(f"1 2 0:3 / {str(tmp_path / 'a b').replace(' ', chr(92) + '040')} rw - x y rw\n")
    monkeypatch.setattr(own, "MOUNTS", tmp_path / "list")
    assert own.is_mount(tmp_path / "a b")
    assert not own.is_mount(tmp_path)


def test_a_dense_model_with_its_training_state_is_kept(compress, pristine, tmp_path):
    shutil.copytree(pristine / "m", tmp_path / "out")
    (tmp_path / "out" / "optimizer.pt").write_text("months of work")
    for words in ((), ("--overwrite",), ("--overwrite", "--resume")):
        assert "not a checkpoint made by llmopt" in compress(tmp_path / "out", *words)


@pytest.mark.parametrize("name", ["optimizer.pt", "checkpoint-5/model.safetensors", "model-best.safetensors", ".git/x"])
def test_what_a_user_put_into_a_checkpoint_is_named_and_kept(compress, pristine, tmp_path, name):
    shutil.copytree(pristine / "done", tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    assert f"holds {name.split('/')[0]}, which llmopt did not write" in compress(tmp_path / "out", "--overwrite")


def test_weights_trained_further_are_kept(compress, pristine, tmp_path):
    shutil.copytree(pristine / "done", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    save_file(load_file(file) | {"more": load_file(file)["model.norm.weight"]}, file)
    assert "its weights are not those that llmopt wrote" in compress(tmp_path / "out", "--overwrite")


def test_a_checkpoint_without_a_valid_llmopt_json_is_kept(compress, pristine, tmp_path):
    shutil.copytree(pristine / "done", tmp_path / "out")
    (tmp_path / "out" / "llmopt.json").write_text("{}")
    assert "is not replaced" in compress(tmp_path / "out", "--overwrite")


@pytest.mark.parametrize("name", ["thesis.txt", "journal", "step-100/optimizer.pt", "output/model.safetensors"])
def test_a_foreign_work_folder_is_kept(compress, pristine, tmp_path, monkeypatch, capfd, name):
    file = tmp_path / "out.llmopt-work" / name
    file.parent.mkdir(parents=True)
    file.write_text("precious\n")
    for words in ((), ("--resume",), ("--overwrite",), ("--overwrite", "--resume")):
        assert "not the work folder of a run of llmopt" in compress(tmp_path / "out", *words)
    shutil.copytree(pristine / "done", tmp_path / "out")           # a finished run cleans up behind itself
    assert call(monkeypatch, "compress", "--recipe", pristine / "r.yaml", "--model", pristine / "m", "--output",
                tmp_path / "out", "--no-eval", "--resume") == 0
    assert file.read_text() == "precious\n"


def test_what_a_user_put_into_a_work_folder_outlives_the_run(tmp_path):
    journal = Journal(tmp_path / "out.llmopt-work")
    with pytest.raises(Interrupted), journal.opened({}):
        journal.remember(0, "one", dict)
        raise KeyboardInterrupt
    (journal.folder / "thesis.txt").write_text("precious")
    with pytest.raises(LlmoptError, match="it holds thesis.txt"), journal.opened({}):
        pass
    (journal.folder / "thesis.txt").rename(tmp_path / "thesis.txt")
    with journal.opened({}):
        (tmp_path / "thesis.txt").rename(journal.folder / "thesis.txt")
    assert [file.name for file in journal.folder.iterdir()] == ["thesis.txt"]


def test_folders_that_only_look_like_leftovers_are_kept(tmp_path):
    (tmp_path / ".out.llmopt-old-7").mkdir()
    (tmp_path / ".out.llmopt-old-7" / "thesis.txt").write_text("precious")
    llmopt.save(tiny.make("llama"), tmp_path / "out")
    shutil.copytree(tmp_path / "out", tmp_path / ".out.llmopt-old-8")          # of a killed run
    llmopt.save(tiny.make("llama"), tmp_path / "out", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.llmopt-old-7", "out"]


def test_an_empty_folder_and_a_link_to_one_are_outputs(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "there")
    assert prepare_output(tmp_path / "out", None, overwrite=False) == tmp_path / "there"
    with pytest.raises(LlmoptError):
        prepare_output(Path("~nobody-of-this-name/out"), None, overwrite=False)


@pytest.mark.parametrize("when", range(9))
def test_a_removal_cut_off_anywhere_can_be_gone_on_with(tmp_path, monkeypatch, when):
    work = tmp_path / "out.llmopt-work"
    for name in ("journal", "lock", "step-0/0-0.safetensors", "step-1/0-0.safetensors", "output/README.md"):
        (work / name).parent.mkdir(exist_ok=True, parents=True)
        (work / name).write_text("")
    left = iter(range(when))

    def cut(plain):
        def act(place, *args, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            plain(place, *args, **kwargs)
        return act

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", cut(Path.unlink))
        patch.setattr(os, "rmdir", cut(os.rmdir))
        with pytest.raises(KeyboardInterrupt):
            own.remove(work, OWN)
    Journal(work).remove()
    assert not work.exists()
