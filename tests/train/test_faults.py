"""However a run ends, the next start goes on from the last complete save and gives the same bits, or says what is wrong
and touches nothing."""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from ranks import begun, ended
from train_faults import KILLED, REFUSED, STEPS, TEXT, WORDS, Launched, Start, in_turn, listing, outcome, run

from mambadsl.train.save import newest

WHOLE = [f"step-{step:08d}" for step in (4, 6)]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """(the folder of a run, what a kill before each of its requests to the disk would have left)."""
    base = tmp_path_factory.mktemp("never")
    assert run(Start(base / "run", fault=("copies", str(base / "run"), str(base / "copies")))).result["ended"] == "done"
    return base / "run", sorted((base / "copies").iterdir())


@pytest.fixture
def stopped(never_stopped, tmp_path):
    """A copy of that run as it was after four steps of six."""
    folder = tmp_path / "run"
    shutil.copytree(never_stopped[0], folder)
    shutil.rmtree(folder / WHOLE[1])
    return folder


def clean(folder: Path) -> bool:
    """What a run leaves; `compared.json` where it had steps to time."""
    return {f.name for f in folder.iterdir()} - {"compared.json"} == {*WHOLE, "log.jsonl", ".lock"}


def test_killed_before_any_request_to_the_disk(never_stopped, tmp_path):
    whole, copies = never_stopped
    assert len(copies) > 25
    truth, starts = outcome(whole), []
    for copy in copies:
        folder = tmp_path / copy.name / "run"
        shutil.copytree(copy / "run", folder)
        starts.append(Start(folder, data=(whole.parent / "words.txt",)))
    done = in_turn(starts, tmp_path)
    assert done.code == 0, done.said[0][-2000:]
    for start in starts:
        assert outcome(start.folder) == truth, start.folder
        assert clean(start.folder), start.folder


def test_killed_at_any_time(never_stopped, tmp_path):
    """Truly killed, at moments that nobody chose."""
    draw, start = random.Random(5), Start(tmp_path / "run")
    for _ in range(8):
        [(process, _)] = running = begun(start, tmp_path)
        process.join(draw.uniform(0.2, 1.2))
        process.kill()
        ended(running)
    assert run(start).result["ended"] == "done"
    assert outcome(start.folder) == outcome(never_stopped[0]) and clean(start.folder)


def test_a_rank_that_is_lost(tmp_path):
    assert run(Start(tmp_path / "whole"), ranks=2).result["ended"] == "done"
    lost = run(Start(tmp_path / "run", fault=("step", 5, "exit"), faulty=1), ranks=2)
    assert lost.codes[1] == KILLED and lost.codes[0] not in (0, None) and lost.seconds < 30
    # The save of step 4 was being written, or was not begun.
    assert newest(tmp_path / "run")[0].step in (2, 4)
    assert run(Start(tmp_path / "run"), ranks=2).result["ended"] == "done"
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole") and clean(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_stops_all_after_the_step(tmp_path, never_stopped, number):
    ranks = 2 if number == signal.SIGTERM else 1
    done = run(Start(tmp_path / "run", fault=("step", 2, "signal", int(number)), faulty=ranks - 1), ranks=ranks)
    assert done.codes == (0,) * ranks
    assert (done.result["ended"], done.result["step"]) == (number.name, 3)
    assert newest(tmp_path / "run")[0].step == 3
    assert run(Start(tmp_path / "run")).result["ended"] == "done"
    if ranks == 1:
        assert outcome(tmp_path / "run") == outcome(never_stopped[0])


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    done = run(Start(tmp_path / "run", fault=("step", 5, "signal", int(signal.SIGINT), 2)))
    assert done.code == 70 and "KeyboardInterrupt" in done.said[0]
    assert newest(tmp_path / "run")[0].step in (2, 4)


def test_a_full_disk(never_stopped, tmp_path):
    folder = tmp_path / "run"
    done = run(Start(folder, fault=("full",)))
    assert done.result["step"] == STEPS and "step 6 failed" in done.result["unsaved"]
    assert {f.name for f in folder.iterdir()} - {"compared.json"} == {"step-00000002", "log.jsonl", ".lock"}
    assert run(Start(folder)).result["unsaved"] is None
    assert outcome(folder) == outcome(never_stopped[0])


def truncated(folder: Path) -> None:
    [file] = folder.glob("*.distcp")
    os.truncate(file, file.stat().st_size - 1)


def gone(folder: Path) -> None:
    (folder / ".metadata").unlink()


def half_a_list(folder: Path) -> None:
    file = folder / "run.json"
    os.truncate(file, file.stat().st_size // 2)


def no_list(folder: Path) -> None:
    (folder / "run.json").unlink()


@pytest.mark.parametrize("harm", [truncated, gone, half_a_list, no_list])
def test_a_damaged_save(never_stopped, tmp_path, harm):
    """The one before it is gone on from; with none before it, nothing is touched."""
    folder = tmp_path / "run"
    shutil.copytree(never_stopped[0], folder)
    harm(folder / WHOLE[1])
    assert newest(folder)[0].folder.name == WHOLE[0]
    assert run(Start(folder, data=(never_stopped[0].parent / "words.txt",))).result["ended"] == "done"
    assert outcome(folder) == outcome(never_stopped[0]) and clean(folder)
    for name in WHOLE:
        harm(folder / name)
    before = listing(folder)
    refused = run(Start(folder))
    assert refused.code == REFUSED and "no save of" in refused.said[0] and WHOLE[0] in refused.said[0]
    assert listing(folder) == before


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_a_save_with_other_bytes_of_the_same_size(stopped, file):
    there = stopped / WHOLE[0] / file
    there.write_bytes(bytes(there.stat().st_size))
    before = listing(stopped)
    refused = run(Start(stopped))
    assert refused.code == REFUSED and "cannot be read" in refused.said[0] and WHOLE[0] in refused.said[0]
    assert listing(stopped) == before


def test_a_log_that_is_half_written(never_stopped, stopped):
    with open(stopped / "log.jsonl", "ab") as log:
        log.write(b'{"step": 7, "lo')
    assert run(Start(stopped)).result["ended"] == "done"
    assert outcome(stopped) == outcome(never_stopped[0])


@pytest.mark.parametrize("other, words", [
    ({"settings": {"lr": 2e-2}}, "lr was 0.01, is 0.02"),
    ({"settings": {"batch": 8}}, "batch was 4, is 8"),
    ({"settings": {"steps": 9}}, "steps was 6, is 9"),
    ({"text": TEXT.replace("heads=2", "heads=4")}, "`stack.2` heads was 2, is 4"),
    ({"text": TEXT.replace("M F A F }", "M F A F M }")}, "`stack.4` is no layer of the save"),
    ({"text": TEXT.replace("d_ff=32", "d_ff=32, act=gelu")}, "`stack.1` act was"),
    ({"text": TEXT.replace("tie_embeddings = true", "tie_embeddings = false")}, "tie_embeddings was True, is False"),
    ({"data": "other words, as many as it takes to fill a row " * 3}, "data: tokens was"),
    ({"data": WORDS.replace("green", "brown")}, f"data: as many tokens, {len(WORDS):,}, but others"),
], ids=str)
def test_another_run(stopped, other, words):
    if "data" in other:
        (stopped.parent / "other.txt").write_text(other["data"])
        other = {"data": (stopped.parent / "other.txt",)}
    before = listing(stopped)
    refused = run(Start(stopped, **other))
    assert refused.code == REFUSED and words in refused.said[0], refused.said[0]
    assert listing(stopped) == before


def test_what_does_not_change_the_run_may_differ(never_stopped, stopped):
    """Layers' names, how fast it is computed, and a schedule whose past is the same."""
    changes = {"layer M": "layer Mix", "M F A F": "Mix | F A F", "d_ff=32": "d_ff=32, recompute=true"}
    text = functools.reduce(lambda text, old: text.replace(old, changes[old]), changes, TEXT)
    assert run(Start(stopped, text=text, settings={"microbatch": 2})).result["ended"] == "done"
    steady = Start(stopped.parent / "steady", settings={"schedule": "constant", "steps": 2})
    assert run(steady).result["step"] == 2
    longer = Start(steady.folder, settings={"schedule": "wsd", "steps": 4, "decay": 0.25, "floor": 0.0})
    assert run(longer).result["step"] == 4


def test_a_folder_that_another_run_has(stopped):
    running = begun(Start(stopped, fault=("step", 5, "signal", int(signal.SIGSTOP))), stopped.parent)
    try:
        while len((stopped / "log.jsonl").read_text().splitlines()) != 5:
            time.sleep(0.05)
        refused = run(Start(stopped))
        assert refused.code == REFUSED and "another process is training in" in refused.said[0]
    finally:
        os.kill(running[0][0].pid, signal.SIGCONT)
    assert ended(running).codes == (0,)


def test_what_is_not_a_runs_stays(tmp_path):
    """Other files of the folder; a log of somebody else's is refused."""
    for name in "film.part", "step-final.old":
        (tmp_path / "run" / name).mkdir(parents=True)
    log = tmp_path / "run" / "log.jsonl"
    log.write_text('{"step": 9, "accuracy": 1}\n' * 2)
    refused = run(Start(tmp_path / "run"))
    assert refused.code == REFUSED and f"`{log}` is no log of a run (line 1)" in refused.said[0]
    assert len(log.read_text().splitlines()) == 2
    log.unlink()
    start = Start(tmp_path / "run", {"steps": 1})
    assert run(start).result["ended"] == "done" and (tmp_path / "run" / "film.part").is_dir()
    assert (tmp_path / "run" / "step-final.old").is_dir()
    inside = run(replace(start, data=(tmp_path,)))
    assert inside.code == REFUSED and "which is read as data" in inside.said[0]


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused = run(Start(tmp_path / "file"))
    assert refused.code == REFUSED and "cannot be written" in refused.said[0]


def test_what_one_rank_refuses_all_refuse(tmp_path):
    """None waits for the others."""
    done = run(Start(tmp_path / "run", fault=("data", str(tmp_path / "nowhere.txt")), faulty=1), ranks=2)
    assert done.codes == (REFUSED, REFUSED) and done.seconds < 30
    assert all("there is no file or folder" in said for said in done.said)


def test_torchrun_starts_again(tmp_path):
    """With the very command that was started: nothing of what the lost processes said is taken for new."""
    start = Start(tmp_path / "run", fault=("attempt", "step", 5, "exit"), faulty=1)
    assert run(Launched(start), tmp_path).codes == (0,)
    assert sorted((tmp_path / "attempts").read_text().split()) == ["0", "0", "1", "1"]
    assert run(Start(tmp_path / "whole"), ranks=2).result["ended"] == "done"
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
