"""`mambadsl train` as it is typed: what is wrong is said in a sentence, once, and before anything is done."""

from __future__ import annotations

import io
import json
import signal

import pytest
from click.testing import CliRunner

pytest.importorskip("torch")

from train_faults import TEXT, Typed, run, words

from mambadsl.cli.commands import cli
from mambadsl.cli.train import run as command
from mambadsl.train.log import Log
from mambadsl.train.save import newest

MODEL = TEXT.replace("\n", " ")


@pytest.fixture
def typed(tmp_path):
    """The words of a run of four steps, and more."""
    data = str(words(tmp_path))

    def make(*more: str, folder: str = "run", data: str | None = data) -> tuple[str, ...]:
        given = ("--data", data) if data is not None else ()
        usual = ("--length", "16", "--batch", "4", "--steps", "4", "--save-every", "2", "--device", "cpu")
        return "train", "-e", TEXT, *given, *usual, "-o", str(tmp_path / folder), *more

    return make


def of(ranks: int, **other: str) -> dict[str, str]:
    usual = {"RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    return {**usual, **other}


@pytest.mark.parametrize("more, environment, said", [
    (["--data", "nowhere.txt"], {}, "there is no file or folder `nowhere.txt`"),
    (["--data", ""], {}, "'--data': it is empty: this folder is `.`"),
    (["-o", ""], {}, "it is empty: this folder is `.`"),
    (["--tokenizer", "nowhere.json"], {}, "there is no tokenizer file `nowhere.json`"),
    (["--eod", "</s>"], {}, "documents of bytes cannot end with `</s>`: 256 ids are the bytes alone"),
    (["--weights", "nowhere"], {}, "there is no folder `nowhere`"),
    (["--length", "99999"], {}, "longer than the corpus"),
    (["--microbatch", "3"], {}, "4 rows a rank cannot be cut into microbatches of 3: 2 would do"),
    (["--warmup", "9"], {}, "do not fit into 4 steps"),
    (["--lr", "nan"], {}, "lr is a number from 0 to 1e+15, not nan"),
    (["--weight-decay", "1e38"], {}, "weight_decay is a number from 0 to 1e+15"),
    (["--batch", "999999999999"], {}, "a batch of 8,388,608 would do"),
    (["--length", "999999999999"], {}, "shorter rows would do"),
    (["--seed", "9" * 30], {}, "seeds are from 0"),
    (["--virtual", "2"], {}, "virtual stages are of a pipeline"),
    (["--device", "nope"], {}, "device `nope` cannot be used"),
    (["--device", "nope", "--dry-run"], {}, "training runs on cpu or cuda, not on `nope`"),
    (["--device", "h200"], {}, "not on `h200`; --plan-device h200 plans for one"),
    (["--weights", "nowhere", "--dry-run"], {}, "there is no folder `nowhere`"),
    (["--device", "meta"], {}, "training runs on cpu or cuda"),
    (["--stages", "2", "--set", "meta_tokens=4"], of(2), "with meta_tokens = 4 rows are longer"),
    (["--stages", "2", "--set", "meta_tokens=4", "--dry-run", "--ranks", "2"], {}, "train with --stages 1"),
    (["--stages", "2"], {}, "1 process cannot be shared by 2 stages"),
    (["--tensor", "2"], of(3), "3 processes cannot be shared by 2 tensor ranks"),
    (["--stages", "2", "--batch", "5"], of(4), "a batch of 5 rows cannot be shared by 2 data ranks"),
    (["--stages", "9", "--batch", "18"], of(9), "error[E8"),
    (["--stages", "2", "--plan-device", "zx"], of(2), "there is no device `zx`"),
    ([], {"RANK": "0"}, "has RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
    ([], of(2, WORLD_SIZE="two"), "WORLD_SIZE in the environment is `two`"),
    ([], of(2, RANK="2"), "RANK is 2 of WORLD_SIZE 2"),
    ([], of(2, MASTER_PORT="99999"), "MASTER_PORT in the environment is 99999; ports are up to 65535"),
    ([], {"LOCAL_RANK": "1", "RANK": "1"}, "has RANK, LOCAL_RANK but not"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_wrong(typed, tmp_path, more, environment, said):
    result = CliRunner().invoke(cli, typed(*more), env=environment)
    assert result.exit_code in (1, 2) and said in result.output, result.output
    assert "bug" not in result.output and not isinstance(result.exception, Exception)
    assert not list((tmp_path / "run").glob("step-*"))


def test_a_dry_run_tells_of_experts_and_of_ends(typed, tmp_path):
    text = "model m { vocab = 300 d_model = 16 } layer E = moe(d_ff=8) stack { E E(router=sigmoid, bias_rate=0.01) E }"
    line = ("-e", text, "--eod", "299", "--dry-run")
    result = CliRunner().invoke(cli, typed(*line))
    assert result.exit_code == 0
    for note in (
        "documents end with the id 299", "experts of E (2 times) are balanced by nothing: `aux_loss` does it",
        "experts of E are balanced by bias_rate=0.01",
    ):
        assert f"note    {note}" in result.output
    assert len(json.loads(CliRunner().invoke(cli, typed(*line, "--json")).stdout)["notes"]) == 3


def test_nothing_to_predict(typed, tmp_path):
    (tmp_path / "one.txt").write_text("a")
    result = CliRunner().invoke(cli, typed("--length", "1", data=str(tmp_path / "one.txt")))
    assert result.exit_code == 2 and "every document of the data has 1 token" in result.output


def test_what_is_said_of_a_run_that_saves_nothing(typed, tmp_path):
    result = CliRunner().invoke(cli, typed("--keep", "0", folder="a run"))
    assert result.exit_code == 0 and "done: 4 steps; nothing was saved (--keep 0)" in result.output
    result = CliRunner().invoke(cli, typed(folder="a run"))
    assert f"`mambadsl export run '{tmp_path / 'a run'}' -o DIR`" in result.output
    at = str(tmp_path / "a run" / "step-00000004")
    result = CliRunner().invoke(cli, ["export", "run", at, "-o", str(tmp_path / "out")])
    assert result.exit_code == 2 and "is a save: give its run" in result.output and "--step 4" in result.output


class Gone(io.StringIO):
    """Whoever read from here."""

    def write(self, words: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stderr", [None, Gone()])
def test_words_that_nobody_reads_end_no_run(tmp_path, monkeypatch, stderr):
    with monkeypatch.context() as patch:
        patch.setattr("sys.stderr", stderr)
        with Log(tmp_path, steps=2, start=0) as log:
            for step in 1, 2:
                log.step(step, dict(loss=1.0, grad_norm=1.0, tokens_per_s=1.0))
                log.held_out(step, 1.0)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_torchrun_leaves_us_our_options():
    """Python 3.11 looks for torchrun's own, or what they begin with, in all words of the line."""
    from torch.distributed.run import get_args_parser

    theirs = get_args_parser()._option_string_actions
    for option in command.params:
        name = (option.opts or [""])[0]
        assert sum(their.startswith(name) for their in theirs if name.startswith("--")) < 2, name


def test_a_dry_run_tells_what_tensor_ranks_share(typed):
    text = "model m {{ vocab = {vocab} d_model = 16 }} layer F = mlp(d_ff=8) layer P = linear() stack {{ F P F }}"
    for vocab, note in (
        (300, "150 of 300 ids on each tensor rank, and the loss over these parts"),
        (301, "whole on every tensor rank: P (linear), the vocabulary (301 ids are no multiple of 2)"),
    ):
        line = ("-e", text.format(vocab=vocab), "--tensor", "2", "--dry-run", "--ranks", "2")
        result = CliRunner().invoke(cli, typed(*line))
        assert result.exit_code == 0 and f"note    {note}" in result.output, result.output


def test_data_given_twice(typed, tmp_path):
    result = CliRunner().invoke(cli, typed("--data", str(tmp_path / "." / "words.txt")))
    assert result.exit_code == 2 and "is given twice" in result.output


@pytest.mark.parametrize("number, times, code", [
    (signal.SIGTERM, 1, 143), (signal.SIGTERM, 2, 143), (signal.SIGHUP, 1, 129),
    (signal.SIGINT, 1, 130), (signal.SIGINT, 2, 130),
])
def test_signals(typed, tmp_path, number, times, code):
    done = run(Typed(typed(), fault=("step", 2, "signal", int(number), times)), tmp_path)
    assert done.code == code and "Traceback" not in done.said[0]
    if number == signal.SIGHUP:
        assert newest(tmp_path / "run")[0].step == 3
        return
    at_once = number == signal.SIGINT and times == 2
    assert ("ended at once" if at_once else f"stopped by {number.name} at step 3 of 4") in done.said[0]


def test_what_all_processes_refuse_is_said_once(typed, tmp_path):
    for line in (typed(data="nowhere.txt"), typed("-e", "M Q"), typed("--microbatch", "3"), typed("--parts", "fusd")):
        done = run(Typed(line), tmp_path, ranks=2)
        assert done.codes[0] == done.codes[1] in (1, 2)
        assert "rror" in done.said[0] and not done.said[1]


def test_a_lost_rank_is_a_sentence(typed, tmp_path):
    done = run(Typed(typed(), fault=("step", 3, "exit"), faulty=1), tmp_path, ranks=2)
    assert done.codes == (1, 9)
    assert "another process of the run is gone" in done.said[0] and "Traceback" not in done.said[0]


def test_what_one_rank_finds_in_a_step_it_says(typed, tmp_path):
    """As of a file of data that was changed; the save that was being written is completed."""
    done = run(Typed(typed(), fault=("step", 3, "refuse", "`words.txt` was changed"), faulty=1), tmp_path, ranks=2)
    assert done.codes == (1, 1) and "rank 1, step 4: `words.txt` was changed" in done.said[1]
    assert not any("Traceback" in said or "bug" in said for said in done.said)


def test_a_run_its_weights_and_a_run_from_them(typed, tmp_path):
    invoke = CliRunner().invoke
    result = invoke(cli, typed("--json"))
    told = json.loads(result.stdout)
    assert told["ok"] and (told["step"], told["ended"], told["unsaved"]) == (4, "done", None)
    again = json.loads(invoke(cli, typed("--json")).stdout)
    assert (again["step"], again["loss"]) == (4, None)
    for step in ("2", "4"):
        out = tmp_path / step
        assert invoke(cli, ["export", "run", str(tmp_path / "run"), "-o", str(out), "--step", step]).exit_code == 0
        given = [str(out / "model.mdl"), "--weights", str(out)]
        assert invoke(cli, ["generate", *given, "--prompt", "ten", "--max-tokens", "3"]).exit_code == 0
    begun = json.loads(invoke(cli, typed("--weights", str(out), "--json", folder="more")).stdout)
    first = [json.loads(line)["loss"] for line in (tmp_path / "more" / "log.jsonl").read_text().splitlines()][0]
    assert begun["step"] == 4 and first < told["loss"] + 0.2
    resumed = invoke(cli, typed("--weights", "not looked at", folder="more"))
    assert resumed.exit_code == 0 and "is not read again" in resumed.output


def test_what_is_no_number_is_named(typed, tmp_path):
    """The first layer that gives it; or the weight that has it, with its layer."""
    from safetensors.torch import load_file, save_file

    invoke = CliRunner().invoke
    result = invoke(cli, typed("--lr", "1e15", "--clip", "0", "--save-every", "1"))
    assert result.exit_code == 1 and "step 2: the loss is nan\nthe first output that is not finite" in result.output
    assert "in layer `stack.0` (`M`)\n  used at <text>:6:9" in result.output
    assert invoke(cli, ["export", "run", str(tmp_path / "run"), "-o", str(tmp_path / "w")]).exit_code == 0
    tensors = load_file(tmp_path / "w" / "weights.safetensors")
    tensors["stack.3.mixer.down_proj.weight"][2, 1] = float("nan")
    save_file(tensors, tmp_path / "w" / "weights.safetensors")
    result = invoke(cli, typed("--weights", str(tmp_path / "w"), folder="more"))
    assert result.exit_code == 1 and "the weight `stack.3.mixer.down_proj.weight` is not finite" in result.output
    assert "in layer `stack.3` (`F`)" in result.output


@pytest.mark.parametrize("args, said", [
    (["nowhere", "-o", "out"], "there is no folder `nowhere`"),
    ([".", "-o", "out"], "has no save of a run"),
    (["."], "-o FOLDER says where"),
    ([".", "-o", "out", "--tp", "2"], "--tp goes with megatron"),
    (["-e", "M", "-o", "out"], "FILE is the folder of the run"),
])
def test_export_of_no_run(tmp_path, monkeypatch, args, said):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, ["export", "run", *args])
    assert result.exit_code == 2 and said in result.output
