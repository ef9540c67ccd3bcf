"""A run that was cut off, at any moment and in any way, goes on where it was and ends in the same bytes."""
import json
import random
import re
from pathlib import Path

import pytest
import torch
from llmopt_evals import report
from transformers import AutoModelForCausalLM

from llmopt import recipe
from llmopt.checkpoint import save as checkpoint
from llmopt.errors import LlmoptError
from llmopt.files.shards import DiskFull
from llmopt.heads import Gradient
from llmopt.model import computing
from llmopt.quant import measured as trials
from llmopt.quant import tune
from llmopt.quant.making import Making
from llmopt.run import pipeline
from llmopt.run.opening import Streaming
from llmopt.scale.journal import Interrupted, Journal, difference
from tests import tiny, warm
from tests.command import ROOT, call, command
from tests.conftest import mount
from tests.plans import contents, dense

STEPS = """
  - prune.magnitude: {ratio: 0.2, scope: global, units: [ffn]}
  - quant.gptq: {bits: 3, group_size: 16, allocate: lim, sweeps: 0, clip: false}
  - kv.snapkv: {ratio: 0.5, window: 8}
"""
WORK = "out.llmopt-work"


@pytest.fixture
def made(tmp_path) -> Path:
    """A recipe file: a model of four blocks through pruning, quantization and a cache method."""
    model, rows = dense(tmp_path, "llama", num_hidden_layers=4), tiny.ids(8, 24).tolist()
    (tmp_path / "ids.jsonl").write_text("\n".join(map(str, rows)))
    file = tmp_path / "r.yaml"
    file.write_text(f"model: {{id: {model}}}\ndata: {{name: ids, path: {tmp_path / 'ids.jsonl'}, batch_size: 3}}\n"
                    f"max_shard_size: 30KB\nsteps:{STEPS}")
    return file


def run(file: Path, output: str = "out", stream: bool = False, resume: bool = True, sets: tuple = ()):
    return pipeline.run(recipe.load(str(file), sets), file.parent / output, streaming=Streaming(stream), resume=resume)


def cut_off(monkeypatch, at: int, error: BaseException) -> None:
    """Let the `at`-th solution from now on raise `error`, once."""
    solve, left = Making._solve, [at]

    def cut(self, *args):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return solve(self, *args)

    monkeypatch.setattr(Making, "_solve", cut)


def stop() -> None:
    raise KeyboardInterrupt


def counted(monkeypatch, cls: object, name: str) -> list:
    """A list that grows with every call of a method."""
    calls, method = [], getattr(cls, name)

    def wrapped(*args, **kwargs):
        calls.append(args)
        return method(*args, **kwargs)

    monkeypatch.setattr(cls, name, wrapped)
    return calls


# ------------------------------------------------------------------------------------------------ SIGKILL

def killed(made: Path, jobs: list[dict]) -> list[list[int]]:
    """Exit codes of the jobs, the first of which is an undisturbed run into `whole`."""
    jobs = [{"recipe": str(made), **job, "output": str(made.parent / job["output"])}
            for job in [{"output": "whole", "stream": False}, *jobs]]
    _, environment = command()
    done = warm.run(ROOT / "tests" / "kill_many.py", env=environment, text=json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    for job, ended in zip(jobs, codes, strict=True):
        assert ended[-1] == 0, done.stderr
        assert contents(Path(job["output"])) == contents(made.parent / "whole"), job
    assert not [path.name for path in made.parent.iterdir() if "work" in path.name or path.name.startswith(".")]
    return codes


@pytest.mark.parametrize("stream", [pytest.param(False, marks=pytest.mark.full), True])
def test_sigkill_between_any_two_writes(stream, made):
    """Each attempt dies a few writes further on: in the journal's lines, in blocks' files, in the checkpoint's."""
    chain = {"output": "chain", "stream": stream, "kills": [6] * 9}
    saving = [{"output": f"saving{n}", "stream": stream, "kills": [n]} for n in (38, 44)]
    codes = killed(made, [chain, *saving])
    assert sum(code == -9 for ended in codes for code in ended) >= 10


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.full)])
def test_sigkill_while_blocks_leave_and_others_learn(stream, made):
    """The rounds of the search, repaired and fused blocks, the states of what learns."""
    steps = """
  - prune.depth: {ratio: 0.25, score: bi}
  - prune.fuse: {ratio: 0.67, epochs: 2, rank: 2, protect: false}
""" + "  - prune.heal: {epochs: 3, minutes: null}\n" * (not stream)
    made.write_text(made.read_text().replace(STEPS, steps))
    kills = [9] * 5 if stream else [20] * 2
    codes = killed(made, [{"output": "chain", "stream": stream, "kills": kills}])
    assert codes[1].count(-9) == len(kills)


@pytest.mark.full
def test_sigkill_at_random_moments(made):
    """Moments drawn evenly over a run's duration, three in a row; every second run is streamed."""
    draw = random.Random(0)
    jobs = [{"output": f"random{i}", "stream": i % 2 == 0, "kills": [{"seconds": draw.random() / 2} for _ in range(3)]}
            for i in range(20)]
    codes = killed(made, jobs)
    assert sum(code == -9 for ended in codes for code in ended) >= 20


# ------------------------------------------------------------------------------------- what is kept, and what is done

@pytest.mark.parametrize("stream", [False, True])
def test_ctrl_c_keeps_what_is_finished(made, stream, monkeypatch, capsys):
    words = ("compress", "--recipe", made, "--no-eval", "--stream" if stream else "--no-stream", "--output")
    assert call(monkeypatch, *words, made.parent / "whole") == 0
    words = (*words, made.parent / "out")
    with monkeypatch.context() as patch:
        cut_off(patch, 16, KeyboardInterrupt())
        assert call(patch, *words) == 130
    work = made.parent / WORK
    assert f"what is finished is kept in {work}, --resume goes on with it" in capsys.readouterr().err
    assert not (made.parent / "out").exists()
    with pytest.raises(ValueError, match="config.json"):
        AutoModelForCausalLM.from_pretrained(work)
    before = {file.name: file.read_bytes() for file in work.iterdir() if file.is_file()}
    assert call(monkeypatch, *words) == 2
    assert "an unfinished run of" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in work.iterdir() if file.is_file()} == before
    solved = counted(monkeypatch, Making, "_solve")
    assert call(monkeypatch, *words, "--resume") == 0
    assert len(solved) == 14                                   # seven weights of each of the last two blocks
    assert contents(made.parent / "out") == contents(made.parent / "whole")
    assert not work.exists()


def test_a_run_begun_in_memory_goes_on_streamed_and_back(made, monkeypatch):
    run(made, "whole")
    for at, stream in ((9, False), (9, True), (9, False)):
        with monkeypatch.context() as patch:
            cut_off(patch, at, KeyboardInterrupt())
            with pytest.raises(Interrupted):
                run(made, stream=stream)
    solved = counted(monkeypatch, Making, "_solve")
    run(made, stream=True)
    assert len(solved) == 7
    assert contents(made.parent / "out") == contents(made.parent / "whole")


def test_a_block_damaged_on_disk_is_found_and_done_anew(made, monkeypatch):
    run(made, "whole")
    with monkeypatch.context() as patch:
        cut_off(patch, 24, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            run(made)
    for name in ("step-0/1-00002", "step-1/1-00001"):
        file = made.parent / WORK / name
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    solved = counted(monkeypatch, Making, "_solve")
    report = run(made)
    assert len(solved) == 14
    assert [line for line in report.messages if "damaged" in line] == [
        f"step-{place} was damaged on disk and is done anew" for place in ("0/1-00002", "1/1-00001")]
    assert contents(made.parent / "out") == contents(made.parent / "whole")


def test_a_full_disk_is_one_line_and_more_room_is_enough(made, small_disk, monkeypatch):
    whole, file = run(made, "whole"), small_disk / "r.yaml"
    assert not whole.messages
    mount(small_disk, "140k", "remount")
    file.write_text(made.read_text())
    for stream in (False, True):
        with pytest.raises(DiskFull, match=f"disk: the disk is full; what is finished is kept in .*{WORK}, --resume"):
            run(file, stream=stream)
        assert not (small_disk / "out").exists()
    mount(small_disk, "2m", "remount")
    assert run(file).messages
    assert contents(small_disk / "out") == contents(made.parent / "whole")


def test_decisions_are_not_made_twice(made, monkeypatch):
    steps = """
  - heads.gradient: {}
  - quant.gptq: {bits: 3.5, group_size: 32, allocate: sensitivity, widths: [3, 4], sweeps: 0,
               plans: 1, clip: false}
"""
    made.write_text(made.read_text().replace(STEPS, steps))
    with monkeypatch.context() as patch:
        solved = counted(patch, Making, "_solve")
        run(made, "whole")
    with monkeypatch.context() as patch:
        cut_off(patch, len(solved) - 28 + 9, KeyboardInterrupt())           # the trials are behind it, and 8 weights
        with pytest.raises(Interrupted):
            run(made)
    scored, measured = counted(monkeypatch, Gradient, "measure"), counted(monkeypatch, trials, "allocation")
    run(made)
    assert (scored, measured) == ([], [])
    assert contents(made.parent / "out") == contents(made.parent / "whole")


@pytest.mark.parametrize(("stream", "objective", "at"), [
    (True, "block", 3), pytest.param(False, "block", 3, marks=pytest.mark.full), (False, "logits", 5)])
def test_tuned_blocks_are_gone_on_with(stream, objective, at, made, monkeypatch):
    """Cut off in a block, gains and all; or, logits, in what follows the last of the four."""
    steps = f"\n  - quant.tune: {{bits: 3, group_size: 16, iterations: 2, objective: {objective}}}\n"
    made.write_text(made.read_text().replace(STEPS, steps))
    run(made, "whole")
    calls = counted(monkeypatch, tune, "descend")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(tune, "descend", lambda *args, go=tune.descend: go(*args) if len(calls) + 1 < at else stop())
        run(made, stream=stream)
    before = len(calls)
    run(made, stream=stream)
    assert before == at - 1 and len(calls) == 4 + (objective == "logits")
    assert contents(made.parent / "out") == contents(made.parent / "whole")


def test_an_error_that_would_come_again_leaves_nothing(made, monkeypatch):
    cut_off(monkeypatch, 9, LlmoptError("no"))
    with pytest.raises(LlmoptError, match="^steps.1 quant.gptq: no$"):
        run(made)
    assert not list(made.parent.glob("*out*"))


def test_an_error_behind_the_last_step_loses_nothing(made, monkeypatch):
    run(made, "whole")
    with monkeypatch.context() as patch, pytest.raises(LlmoptError, match="in the way; what is finished is kept in "):
        patch.setattr(checkpoint, "_copy_companions", lambda *_: (_ for _ in ()).throw(LlmoptError("in the way")))
        run(made)
    assert [path.name for path in made.parent.glob("*out*")] == [WORK]
    solved = counted(monkeypatch, Making, "_solve")
    run(made)
    assert solved == []
    assert contents(made.parent / "out") == contents(made.parent / "whole")


# ------------------------------------------------------------------------------------------------ whose work it is

def other_ids(made: Path, patch) -> tuple:
    (made.parent / "ids.jsonl").write_text("\n".join(map(str, tiny.ids(8, 24, seed=2).tolist())))
    return ()


def other_weights(made: Path, patch) -> tuple:
    file = sorted((made.parent / "dense").glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    return ()


def other_version(made: Path, patch) -> tuple:
    patch.setattr(checkpoint, "versions", lambda: {"torch": "1.0"})
    return ()


CHANGES = {
    "recipe.steps.1.quant.gptq.bits was 3, is 4": lambda made, patch: ("steps.1.bits=4",),
    "recipe.seed was 0, is 5": lambda made, patch: ("seed=5",),
    "data was [0-9a-f]{64}, is [0-9a-f]{64}": other_ids,
    r"files.model-\d+-of-\d+.safetensors.1 was \d+, is \d+": other_weights,
    "versions.llmopt was .*, is None": other_version,
}


@pytest.mark.parametrize("said", CHANGES)
def test_the_work_of_another_run_is_refused_with_the_difference(made, said, monkeypatch):
    with monkeypatch.context() as patch:
        cut_off(patch, 9, KeyboardInterrupt())
        with pytest.raises(Interrupted):
            run(made)
    journal = (made.parent / WORK / "journal").read_bytes()
    with monkeypatch.context() as patch:
        sets = CHANGES[said](made, patch)
        with pytest.raises(LlmoptError, match=f"{WORK}: holds the unfinished work of another run: {said}"):
            run(made, sets=sets)
    assert (made.parent / WORK / "journal").read_bytes() == journal


def test_two_runs_do_not_share_a_folder(tmp_path):
    with Journal(tmp_path / WORK).opened({}), pytest.raises(LlmoptError, match="in use by another run"), \
            Journal(tmp_path / WORK).opened({}):
        pass


def test_difference_is_the_first_place():
    old = {"a": 1, "b": [1, {"c": 2}]}
    assert difference(old, old) is None
    assert difference(old, {"a": 1, "b": [1, {"c": 3}]}) == "b.1.c was 2, is 3"
    assert difference(old, {"a": 1}) == "b was [1, {'c': 2}], is None"
    assert difference([1, 2], [1]) == " was [1, 2], is [1]"


def test_a_line_cut_short_is_as_if_never_written(tmp_path):
    work = tmp_path / WORK
    journal = Journal(work)
    with pytest.raises(Interrupted), journal.opened({"a": 1}):
        journal.remember(0, "one", lambda: {"x": .1})
        journal.remember(0, "two", lambda: {"x": .2})
        raise KeyboardInterrupt
    text = (work / "journal").read_bytes()
    for length in range(len(text)):
        (work / "journal").write_bytes(text[:length])
        again = Journal(work)
        with pytest.raises(Interrupted), again.opened({"a": 1}):
            whole = text[:length].count(b"\n")
            assert len(again.entries) == max(0, whole - 1)
            again.remember(0, "three", dict)
            raise KeyboardInterrupt
        assert len(Journal(work)._read()) == max(1, whole) + 1


# ------------------------------------------------------------------------------------------------ a finished run

def other_model(made: Path) -> None:
    other_weights(made, None)


def other_generation(made: Path) -> None:
    file = made.parent / "dense" / "generation_config.json"
    file.write_text('{"eos_token_id": 2, "do_sample": true, "temperature": 0.5}')


def other_template(made: Path) -> None:
    (made.parent / "dense" / "chat_template.jinja").write_text("{{ messages[0].content }}")


OTHERS = [(other_model, r"files.model-\d+-of-\d+.safetensors.1 was \d+, is \d+"),
          (other_generation, r"files.generation_config.json.[01] was"),
          (other_template, r"files.chat_template.jinja was None"),
          (lambda made: other_ids(made, None), "data was [0-9a-f]{64}, is [0-9a-f]{64}")]


@pytest.mark.parametrize(("change", "said", "finished"), [
    pytest.param(*other, finished, marks=[] if (number + finished) % 2 else pytest.mark.full)
    for number, other in enumerate(OTHERS) for finished in (False, True)])
def test_another_model_is_never_taken_for_the_same(made, change, said, finished, monkeypatch, capsys):
    """Finished or cut off; with --overwrite a finished output is made anew."""
    words = ("compress", "--recipe", made, "--output", made.parent / "out", "--no-eval", "--resume")
    with monkeypatch.context() as patch:
        if not finished:
            cut_off(patch, 9, KeyboardInterrupt())
        assert call(monkeypatch, *words) == (0 if finished else 130)
    if finished:
        assert call(monkeypatch, *words) == 0                   # the same: nothing is done
    capsys.readouterr()
    change(made)
    assert call(monkeypatch, *words) == 2
    assert re.search(said, capsys.readouterr().err)
    if finished:
        before = (made.parent / "out" / "llmopt.json").read_text()
        assert call(monkeypatch, *words, "--overwrite") == 0
        assert (made.parent / "out" / "llmopt.json").read_text() != before


@pytest.mark.parametrize("last", ["write_card", "write_text"])
def test_card_and_facts_of_a_run_cut_off_at_its_very_end(last, made, monkeypatch):
    words = ["compress", "--recipe", made, "--no-eval", "--output"]
    assert call(monkeypatch, *words, whole := made.parent / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(report, last, lambda *_: stop())
        assert call(monkeypatch, *words, output := made.parent / "out") == 130
    (output / ".README.md.partial-1").touch()                   # as SIGKILL leaves it
    assert call(monkeypatch, *words, output, "--resume") == 0
    assert contents(output) == contents(whole)


def test_a_run_is_not_gone_on_with_in_another_type(made, monkeypatch, capsys):
    """`compute_dtype: auto` may choose differently on another machine: two types would meet in one checkpoint."""
    words = ("compress", "--recipe", made, "--output", made.parent / "out", "--no-eval", "--resume")
    with monkeypatch.context() as patch:
        cut_off(patch, 9, KeyboardInterrupt())
        assert call(monkeypatch, *words) == 130
    monkeypatch.setattr(computing, "fast_type", lambda stored, device: torch.float64)
    capsys.readouterr()
    assert call(monkeypatch, *words) == 2
    assert "computes in was torch.float32, is torch.float64" in capsys.readouterr().err
