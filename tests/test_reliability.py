"""Runs that nothing can lose, and files that are not trusted: kills, full disks, two programs of one name, damage."""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from conftest import (
    HERE,
    ROOT,
    TRAIN,
    Cli,
    assert_same_run,
    at_each_step,
    checkpoint_of,
    contents,
    log_of,
    model_py,
    save_model,
    stdlib_source,
    stop_at,
    tiny_config,
    write_jsonl,
)

import model

RUN = (*TRAIN, "--max_iters", 12, "--eval_interval", 3, "--log_interval", 2)


def names(folder: str = "checkpoints") -> set[str]:
    return {p.name for p in Path(folder).iterdir()}


def flipped(content: bytes, position: int, bit: int = 0) -> bytes:
    return content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]


# --- Damage is noticed


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run, its data, and an export."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("input.txt").write_text(stdlib_source("textwrap", "heapq"))
        for command in (RUN, ("export", "--output_dir", "hf")):
            Cli(patch)(*command).ok()
    return folder


OPENERS = {
    "checkpoints/7M_model.pt": lambda: model.open_model("checkpoints/7M_model.pt"),
    "checkpoints/7M_model_last.pt": lambda: model.load_checkpoint(Path("checkpoints/7M_model_last.pt")),
    "data/input/data.bin": lambda: model.Data(Path("data/input")),
    "hf/model.safetensors": lambda: model.open_model("hf"),
}


@pytest.mark.parametrize("file", OPENERS)
def test_every_flipped_bit_and_every_truncation_is_noticed(made, workdir, file):
    for folder in ("checkpoints", "data", "hf"):
        shutil.copytree(made / folder, folder)
    OPENERS[file]()
    path, rng = Path(file), random.Random(0)
    whole = path.read_bytes()
    positions = [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(60))]
    cut = [whole[:n] for n in (1, 2, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(20)))]
    for content in cut + [flipped(whole, position, rng.randrange(8)) for position in positions]:
        path.write_bytes(content)
        with pytest.raises(model.UserError, match=str(path.parent)):
            OPENERS[file]()
    path.write_bytes(whole)
    OPENERS[file]()


def test_a_checkpoint_is_a_zip_archive_that_others_open(made):
    path = made / "checkpoints/7M_model.pt"
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"sha256:")
    assert torch.load(path, weights_only=True)["step"] <= 12


@pytest.mark.parametrize("file, position, words", [
    ("model_last.pt", 5000, ["digest differs", "parts_model_last.damaged", "at step 9"]),
    ("model_last.pt", -70, ["does not end in its digest", "parts_model_last.damaged", "at step 9"]),  # in the seal
    ("model.pt", 5000, ["resuming parts at step 12"]),
], ids=["a state", "its seal", "the best model"])  # fmt: skip
def test_what_is_damaged_is_made_again(cli, text_file, file, position, words):
    """From the state before a damaged one; the best model from the last state, which is the best."""
    for name in ("whole", "parts"):
        cli(*RUN, "--name", name).ok()
    damaged = Path(f"checkpoints/parts_{file}")
    damaged.write_bytes(flipped(damaged.read_bytes(), position))
    done = cli("train", "--name", "parts", "--resume", "auto").ok()
    assert not [word for word in words if word not in done.out + done.err]
    model.load_checkpoint(damaged)  # whole again, in what no run reads too
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("name, instead, words", [
    ("seal_of", Mock(side_effect=OSError(5, "Input/output error")), "Input/output error"),  # as from a network's disk
    ("seal_of", Mock(side_effect=MemoryError()), "MemoryError"),
    ("Source", dataclasses.make_dataclass("Source", [("path", str)]), "unknown field"),  # of another model.py
])  # fmt: skip
def test_a_state_that_cannot_be_read_just_now_is_not_damaged(cli, text_file, monkeypatch, name, instead, words):
    """It keeps its name."""
    cli(*RUN).ok()
    before = contents("checkpoints")
    monkeypatch.setattr(model, name, instead)
    assert words in cli("train", "--resume", "auto").error and contents("checkpoints") == before


def test_a_kill_while_a_run_is_overwritten_does_not_leave_its_best_model(cli, text_file, monkeypatch):
    """Both runs are best at one step: the new state is there, and the old model still."""
    cli(*RUN, "--max_iters", 3).ok()
    with monkeypatch.context() as patch:
        kill_at_rename(patch, 1, into="checkpoints/7M_model.pt")
        with pytest.raises(Killed):
            cli(*RUN, "--max_iters", 3, "--overwrite", "--seed", 7)
    assert [checkpoint_of(last=last)["train_config"]["seed"] for last in (True, False)] == [7, 1337]
    cli("train", "--resume", "auto").ok()
    assert checkpoint_of(last=False)["train_config"]["seed"] == 7


# --- Saving, keeping, resuming


@pytest.mark.parametrize("keep", [1, 3])
def test_the_latest_states_are_kept(cli, text_file, keep):
    cli(*RUN, "--keep", keep).ok()
    steps = [torch.load(p, weights_only=True)["step"] for p in model.RunFiles("7M", False).states()]
    assert steps == [12, 9, 6][:keep]


def test_saves_between_evaluations(cli, text_file, monkeypatch):
    """Every so many minutes."""
    monkeypatch.setattr(model.time, "monotonic", itertools.count().__next__)  # a second for each look
    save = Mock(wraps=model.save_checkpoint)
    monkeypatch.setattr(model, "save_checkpoint", save)
    run = (*TRAIN, "--max_iters", 12, "--eval_interval", 100)
    cli(*run, "--save_minutes", 4 / 60).ok()
    saved = [(call.args[0].name, call.args[1]["step"]) for call in save.call_args_list]
    steps = [step for name, step in saved if name == "7M_model_last.pt"]
    assert steps[-1] == 12 and 1 < len(steps) <= 4 and min(steps) < 8
    save.reset_mock()
    cli(*run, "--save_minutes", 0, "--name", "none").ok()
    assert [call.args[1]["step"] for call in save.call_args_list] == [12, 12]


def test_resume_auto_starts_goes_on_and_ends(cli, text_file, monkeypatch):
    cli(*RUN, "--name", "whole").ok()
    stop_at(monkeypatch, 5)
    run = (*RUN, "--name", "parts", "--resume", "auto")
    assert cli(*run).code == 128 + signal.SIGINT
    assert "at step 5" in cli(*run).ok().out and "done" in cli(*run).ok().out
    assert_same_run("whole", "parts")
    assert "learning_rate" in cli(*run, "--learning_rate", 1).error


def test_a_best_model_alone_is_nothing_to_resume(cli, text_file):
    cli(*RUN).ok()
    for state in model.RunFiles("7M", False).states():
        state.unlink()
    assert "nothing to resume" in cli(*RUN, "--resume").error
    for resume in ("false", "auto"):
        error = cli(*RUN, "--resume", resume).error
        assert "continue with" not in error and "--overwrite" in error


def save_in_the_background(monkeypatch) -> None:
    """As large models are saved."""
    monkeypatch.setattr(model, "OVERLAPPED_SAVE_BYTES", 0)
    monkeypatch.setattr(model, "available_memory", lambda: 1 << 60)


def test_a_large_model_is_saved_while_training_goes_on(cli, text_file, monkeypatch):
    """From a copy: what is written is the state of that step, whatever the steps meanwhile did."""
    cli(*RUN, "--name", "whole").ok()
    save_in_the_background(monkeypatch)
    save, at_work = model.save_checkpoint, []

    def slowly(*args):
        at_work.append(model.threading.current_thread() is not model.threading.main_thread())
        time.sleep(0.2)
        save(*args)

    monkeypatch.setattr(model, "save_checkpoint", slowly)
    cli(*RUN, "--name", "parts").ok()
    assert all(at_work)
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_disk_that_fills_up_while_saving(cli, text_file, monkeypatch, in_background):
    """One sentence, and the checkpoint of before is still whole."""
    if in_background:
        save_in_the_background(monkeypatch)
    full = OSError(28, "No space left on device", "checkpoints/7M_model_last.pt")
    monkeypatch.setattr(torch, "save", Mock(wraps=torch.save, side_effect=[DEFAULT, DEFAULT, *[full] * 9]))
    cli(*TRAIN, "--max_iters", 4, "--eval_interval", 1).fails_with("No space left on device", "7M_model_last.pt")
    assert checkpoint_of()["step"] == checkpoint_of(last=False)["step"] == 1
    assert not list(Path("checkpoints").glob(".*"))


# --- The old stays until the new exists


def test_overwriting_leaves_the_old_run_until_the_new_has_a_state(cli, text_file, monkeypatch):
    cli(*RUN).ok()
    before = contents("checkpoints")
    diverging = cli(*RUN, "--overwrite", "--learning_rate", 1e30, "--warmup_iters", 0)
    diverging.fails_with("not finite", "--learning_rate")
    assert contents("checkpoints") == before
    stop_at(monkeypatch, 2)
    cli(*RUN, "--overwrite", "--seed", 7)
    assert names() == {"7M_model.pt", "7M_model_last.pt", "7M_model.jsonl"}
    assert checkpoint_of()["train_config"]["seed"] == 7 and checkpoint_of(last=False)["step"] == 2
    assert [r["step"] for r in log_of()] == [2]
    cli(*RUN, "--name", "whole", "--seed", 7).ok()
    cli("train", "--resume").ok()
    assert_same_run("whole", "7M")


def test_finetuning_over_its_own_source(cli, text_file):
    cli(*RUN).ok()
    source = Path("checkpoints/7M_model.pt").read_bytes()
    run = ("finetune", "--model_checkpoint", "7M_model.pt", "--name", "7M", "--overwrite", "--data", "input", *HERE)
    assert "not finite" in cli(*run, "--learning_rate", 1e30, "--max_iters", 20, "--warmup_iters", 0).error
    assert Path("checkpoints/7M_model.pt").read_bytes() == source
    cli(*run, "--max_iters", 2).ok()
    assert checkpoint_of()["kind"] == "finetune"


def test_data_that_a_killed_program_had_finished_is_taken(cli, text_file, monkeypatch):
    """Killed at each of the renames that put a data folder in its place, over another or over none."""
    talks = write_jsonl("talks.jsonl", [{"utterances": ["Hi.", f"I am {i}."]} for i in range(50)])
    make = ("tokenize", "--tokenizer", "byte", "--dataset", "d", "--overwrite", "--txt")
    cli(*make, talks).ok()
    wanted = contents("data/d")
    for first in (None, "input.txt"):
        for nth in range(1, 5):
            shutil.rmtree("data")
            if first:
                cli(*make, first).ok()
            with monkeypatch.context() as patch:
                kill_at_rename(patch, nth, into="data/d/")
                with pytest.raises(Killed):
                    cli(*make, talks)
            assert model.Data(Path("data/d")).is_chat
            assert contents("data/d") == wanted and names("data") == {"d"}


class Killed(BaseException):
    pass


def kill_at_rename(monkeypatch, nth: int, into: str) -> None:
    """Die before the nth rename to a path that begins so. Nothing runs afterwards, as in a kill."""
    rmtree, calls = shutil.rmtree, []

    def dying(rename, source, target):
        if str(target).startswith(into):
            calls.append(1)
        if len(calls) >= nth:
            raise Killed
        rename(source, target)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, functools.partial(dying, getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kw: len(calls) < nth and rmtree(*args, **kw))


def test_an_export_that_is_killed_is_told_apart_and_made_again(cli, monkeypatch):
    for seed, name in ((0, "a.pt"), (1, "b.pt")):
        torch.manual_seed(seed)
        save_model(name, model.GPT(tiny_config("llama", vocab_size=259)))
    export = lambda name, *more: cli("export", "--model_path", name, "--output_dir", "out", *more)  # noqa: E731
    export("b.pt").ok()
    wanted = Path("out/model.safetensors").read_bytes()
    shutil.rmtree("out")
    export("a.pt").ok()
    whole = [model.open_model(name).model.state_dict() for name in ("a.pt", "b.pt")]
    for nth in range(1, 10):
        with monkeypatch.context() as patch:
            kill_at_rename(patch, nth, into="out/")
            try:
                assert export("b.pt", "--overwrite").code == 0
                break
            except Killed:
                pass
        try:  # the old, whole, or it is noticed
            found = model.open_model("out").model.state_dict()
            could_be = whole if nth > 2 else whole[:1]
            assert any(all(torch.equal(w[k][:259], v[:259]) for k, v in found.items()) for w in could_be)
        except model.UserError as e:
            assert "not as export wrote it" in str(e)
    export("b.pt", "--overwrite").ok()
    assert Path("out/model.safetensors").read_bytes() == wanted
    model.open_model("out")
    assert not [p for p in Path().iterdir() if p.name.startswith(".out")]


# --- Two programs of one name


HOLD = """import contextlib, pathlib, sys, model
with contextlib.ExitStack() as locks:
    for name in sys.argv[1:]:
        locks.enter_context(model.locked(pathlib.Path(name)))
    print("held", flush=True)
    input()
"""
PIPES = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_second_program_is_told_who_holds_the_name(cli, text_file):
    save_model("a.pt", model.GPT(tiny_config(vocab_size=259)))
    commands = {
        "checkpoints/7M": RUN,
        "data/d": ("tokenize", "--dataset", "d", "--txt", "input.txt", "--tokenizer", "byte"),
        "out": ("export", "--model_path", "a.pt", "--output_dir", "out"),
    }
    with subprocess.Popen([sys.executable, "-c", HOLD, *commands], **PIPES) as holder:
        assert holder.stdout.readline() == b"held\n"
        for target, command in commands.items():
            assert f"{target} is being written by process {holder.pid}" in cli(*command).error
        holder.kill()
    for command in commands.values():
        cli(*command).ok()
    assert not list(Path().rglob("*.lock"))


# --- Kills, and signals


def test_kill_9_at_random_moments(cli, text_file):
    """tests/benchmarks/reliability.py has the long form of this."""
    long = (*TRAIN, "--max_iters", 150, "--eval_interval", 10, "--log_interval", 5, "--resume", "auto")
    rng = random.Random(1)
    for _ in range(3):
        command = model_py(*long, "--name", "parts")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as run:
            next((line for line in run.stdout if b"steps of" in line), None)
            time.sleep(rng.uniform(0, 0.7))
            run.kill()
    for name in ("whole", "parts"):
        cli(*long, "--name", name).ok()
    assert_same_run("whole", "parts")
    assert [r["step"] for r in log_of("parts")] == list(range(5, 151, 5))
    assert not [n for n in names() if n.startswith(".")]


def test_a_second_ctrl_c_leaves_at_once_and_loses_nothing(cli, text_file, monkeypatch):
    cli(*RUN, "--max_iters", 6).ok()
    before = contents("checkpoints", "*.pt")
    save = torch.save

    def interrupted(content, f):
        def write(data):
            if f.tell() > 1000:
                os.kill(os.getpid(), signal.SIGINT)
            return f.write(data)

        save(content, types.SimpleNamespace(write=write, flush=f.flush))

    stop_at(monkeypatch, 2)
    monkeypatch.setattr(torch, "save", interrupted)
    done = cli("train", "--resume", "--max_iters", 12)
    assert done.code == 130 and "Traceback" not in done.err
    assert contents("checkpoints", "*.pt") == before


def test_a_folder_removed_while_running(cli, text_file, monkeypatch):
    def remove(step: int, **arguments) -> None:
        if step == 8:
            shutil.rmtree("checkpoints")

    at_each_step(monkeypatch, before=remove)
    cli(*RUN).ok()
    assert checkpoint_of()["step"] == 12 and [r["step"] for r in log_of()][-1] == 12


def test_a_log_that_cannot_be_written_does_not_stop_a_run(cli, text_file, monkeypatch):
    """A disk full for a while: the records come back from memory, none missing, none twice."""
    cli(*RUN, "--name", "whole").ok()
    original, full = open, []

    def opening(path, mode="r", *args, **kwargs):
        if str(path).endswith("parts_model.jsonl") and mode == "ab" and full:
            raise OSError(28, "No space left on device", str(path))
        return original(path, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", opening)
        at_each_step(patch, before=lambda step, **arguments: full.__setitem__(slice(None), [1] * (5 < step < 9)))
        assert "No space left" in cli(*RUN, "--name", "parts").ok().err
    assert_same_run("whole", "parts")


@pytest.fixture
def small_disk(tmp_path_factory):
    """A folder on a disk of so many bytes, which can be made larger."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs hardware: a machine on which this may mount a small disk")
    disk = tmp_path_factory.mktemp("disk")

    def mount(size: int, *options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(disk)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("needs hardware: a machine on which this may mount a small disk")
        return disk

    yield mount
    while subprocess.run(["umount", "--lazy", str(disk)], capture_output=True, check=False).returncode == 0:
        pass


def test_a_full_disk_at_every_write(cli, text_file, small_disk, monkeypatch):
    """Whatever is there is whole, one sentence names the file, and with room the run goes on to the same end."""
    cli(*RUN).ok()
    whole = checkpoint_of()["model"]
    size = sum(map(len, contents().values()))
    for fraction in (0.5, 0.85):
        disk = small_disk(int(size * fraction))
        shutil.copy(text_file, disk)
        monkeypatch.chdir(disk)
        cli(*RUN, "--resume", "auto").fails_with("No space left on device", "checkpoints/")
        for path in Path("checkpoints").glob("*.pt"):
            model.load_checkpoint(path)
        small_disk(1 << 30, "remount")
        cli(*RUN, "--resume", "auto").ok()
        torch.testing.assert_close(checkpoint_of()["model"], whole, rtol=0, atol=0)


def test_a_full_disk_for_data_and_exports(cli, workdir, text_file, small_disk, monkeypatch):
    save_model("a.pt", model.GPT(tiny_config(vocab_size=259)))
    write_jsonl("talks.jsonl", [{"text": "word " * 400}] * 60)
    data = ("tokenize", "--dataset", "d", "--tokenizer", "byte", "--txt")
    export = ("export", "--model_path", workdir / "a.pt", "--output_dir", "out")
    told = "No space left on device"
    monkeypatch.chdir(small_disk(100_000))
    cli(*data, text_file).fails_with(told, "data/.d.part")
    cli(*data, workdir / "talks.jsonl").fails_with(told, "data/.d.part")
    cli(*export).fails_with(told, "out")
    if importlib.util.find_spec("gguf"):
        cli(*export, "--format", "gguf", "--quantize", "f32").fails_with("cannot write out")
    assert not [p for p in Path().rglob("*") if p.is_file()]


def test_an_export_that_is_a_disk_of_its_own(cli, small_disk):
    """As a container's volume is."""
    save_model("a.pt", model.GPT(tiny_config(vocab_size=259)))
    disk = small_disk(1 << 20)
    for flags in ((), ("--overwrite",)):
        cli("export", "--model_path", "a.pt", "--output_dir", disk, *flags).ok()
        model.open_model(str(disk))
    assert not list(disk.parent.glob(f".{disk.name}*"))


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/meminfo")
def test_memory_is_that_of_the_container(tmp_path):
    whole = model.available_memory(tmp_path)
    assert whole > 1 << 26
    (tmp_path / "memory.current").write_text("1000\n")
    for limit, free in (("max", None), (5000, 4000), (500, 0), (1 << 60, None)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        found = model.available_memory(tmp_path)
        assert found == free if free is not None else found == pytest.approx(whole, rel=0.3)


def test_data_that_cannot_take_the_place_of_other_data(cli, text_file, monkeypatch):
    """As on Windows, where a run has the old in memory: the new is whole, and takes its place when it can."""
    tokenize, replace = ("tokenize", "--dataset", "d", "--tokenizer", "byte", "--txt"), os.replace
    cli(*tokenize, text_file).ok()
    Path("other.txt").write_text("other words " * 300, encoding="utf-8")

    def refuse(source, target):
        if Path(target) == Path("data/d/data.bin"):
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    assert "data/d/data.bin: Permission denied" in cli(*tokenize, "other.txt", "--overwrite").error
    monkeypatch.setattr(os, "replace", replace)
    assert len(model.Data(Path("data/d")).splits["train"].tokens) == 3240


# --- Files from strangers

ENDLESS_TEMPLATES = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge width": "{{ '%999999999999d' % 1 }}",
    "doubling": "{% set n = namespace(s='x') %}{% for a in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "two calls of itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "no end of its own": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
}


@pytest.mark.parametrize("kind", ENDLESS_TEMPLATES)
def test_a_template_that_never_ends(kind):
    """An error, in time and without the memory; the next template is rendered as if nothing had been."""
    begun = time.monotonic()
    with pytest.raises(model.UserError):
        model.render_template(ENDLESS_TEMPLATES[kind], {"messages": []}, seconds=1)
    assert time.monotonic() - begun < 5
    assert model.render_template("{{ messages | length }}", {"messages": [1, 2]}) == "2"


def test_replacements_that_explode(workdir):
    byte = json.loads(model.byte_tokenizer().backend.to_str())
    double = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    for n, escape, is_told in ((5, False, False), (40, False, True), (40, True, True)):
        byte["normalizer"] = {"type": "Sequence", "normalizers": [double] * n}
        text = json.dumps(byte)
        Path("tokenizer.json").write_text(text.replace("Replace", r"R\u0065place") if escape else text)
        if is_told:
            with pytest.raises(model.UserError, match="a million times"):
                model.hf_tokenizer(Path("tokenizer.json")).encode("a")
        else:
            assert len(model.hf_tokenizer(Path("tokenizer.json")).encode("a")) == 32


def test_a_prefix_of_subwords_in_a_bpe(workdir):
    """tokenizers may abort the process over it."""
    bpe = json.loads(model.byte_tokenizer().backend.to_str())
    bpe["model"]["continuing_subword_prefix"] = "##"
    for name in ("continuing", r"c\u006fntinuing"):
        Path("tokenizer.json").write_text(json.dumps(bpe).replace("continuing", name))
        with pytest.raises(model.UserError, match="continuing_subword_prefix"):
            model.hf_tokenizer(Path("tokenizer.json"))


def test_a_word_of_four_hundred_thousand_letters(cli):
    """A vocabulary is learned of it in a second; in forty if the time grew with the square of the length."""
    Path("word.txt").write_text("".join(random.Random(0).choices("abcdefgh", k=400_000)))
    begun = time.process_time()
    cli("tokenize", "--dataset", "d", "--txt", "word.txt", "--tokenizer", "bpe", "--vocab_size", 2000).ok()
    assert time.process_time() - begun < 10


DEEP = {"objects": ('{"a":', "}"), "lists": ("[\n", ""), "both": ('{"a":"\\"","b":[', "")}


@pytest.mark.parametrize("kind", DEEP)
def test_json_of_a_hundred_thousand_levels(cli, kind):
    begin, end = DEEP[kind]
    line = begin * 100_000 + "1" + end * 100_000
    Path("deep.jsonl").write_text('{"text": "[[[[{{{{"}\n' * 100 + line + "\n")
    assert "levels deep" in cli("hf_tokenize", "--hf_dataset", "deep.jsonl", "--dataset", "d").error
    assert "levels deep" in cli("tokenize", "--txt", "deep.jsonl", "--dataset", "d").error
    Path("folder/data").mkdir(parents=True)
    Path("deep.jsonl").rename("folder/data/train.jsonl")
    assert "levels deep" in cli("hf_tokenize", "--hf_dataset", "folder", "--dataset", "d").error


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's prctl")
@pytest.mark.parametrize("number, status", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_workers_end_with_the_program(workdir, number, status):
    """A terminal's Ctrl-C goes to all of them; none complains."""
    write_jsonl("many.jsonl", [{"text": "word " * 2000}] * 6000)
    flags = ("--hf_dataset", "many.jsonl", "--dataset", "d", "--num_proc", 2, "--tokenizer", "byte")
    with open("said", "w") as said:
        command = ["env", "--default-signal=INT", *model_py("hf_tokenize", *flags)]  # as a terminal starts it
        run = subprocess.Popen(command, stderr=said, start_new_session=True)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    found: list[str] = []
    while run.poll() is None and len(found) < 2:
        time.sleep(0.05)
        found = [p for p in children.read_text().split() if b"model.py" in Path(f"/proc/{p}/cmdline").read_bytes()]
    time.sleep(0.3)  # they begin with their first record
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    assert run.wait() == status and "Traceback" not in Path("said").read_text()
    deadline = time.monotonic() + 10
    while any(map(is_running, found)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: str) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    return False


@pytest.mark.skipif(sys.platform == "win32", reason="no flock")
def test_a_file_system_without_locks(monkeypatch, tmp_path):
    """Every program succeeds."""

    def flock(*args) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with model.locked(tmp_path / "x"), model.locked(tmp_path / "x", wait=True):
        pass
    assert not list(tmp_path.iterdir())
