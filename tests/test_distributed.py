"""Several processes, as torchrun starts them: one of each machine prepares, all stop together, none is left hanging.

A machine is a torchrun in a folder of its own."""

import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
from conftest import BYTES, HERE, TWO, Torchrun, checkpoint_of, log_of, write_jsonl
from test_training import SIXTEEN, close_runs, conversation_data

import model

RUN = ("train", *BYTES, *SIXTEEN)
SILENT = (*RUN, "--log_interval", 1000, "--eval_interval", 1000, "--sample_interval", -1)
# Data takes a while to make, and nobody waits for it in a collective, which would give up after ten minutes.
SLOW_DATA = """
finish, prepared, dist = model.DataWriter.finish, model.all_prepared, model.torch.distributed
collectives = {name: getattr(dist, name) for name in ("all_reduce", "barrier", "broadcast")}
def too_early(*args, **kwargs):
    raise AssertionError("a collective, while data is made")
for name in collectives:
    setattr(dist, name, too_early)
def all_prepared(**same):
    prepared(**same)
    for name in collectives:
        setattr(dist, name, collectives[name])
model.all_prepared = all_prepared
model.DataWriter.finish = lambda *args: (time.sleep(1), print("made"), finish(*args))[-1]
"""


def in_step_2(of_the_second: str) -> str:
    """A patch: what the second process does before its step 2."""
    return f"before_step = lambda step: (step, rank) == (2, 1) and {of_the_second}"


def assert_close_weights(a: dict, b: dict, atol: float = 5e-4) -> None:  # a few of Adam's steps of 3e-4
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def ends(folder: str = ".") -> set[str]:
    """Exit status and steps of each process."""
    return {path.read_text() for path in Path(folder).glob("*.end")}


@pytest.fixture
def one(cli, text_file) -> list[dict]:
    """The log of the run of one process, which is in checkpoints/one_*; its data is no longer there."""
    cli(*RUN, "--name", "one").ok()
    shutil.rmtree("data")
    return log_of("one")


def test_two_processes_equal_one_and_a_restart_changes_nothing(one, cli):
    """From a text that is not tokenized yet, and over a run of the same name, which both processes find. Then with a
    process that is killed in step 5: torchrun starts both again, which go on from step 3."""
    cli(*RUN, "--name", "two", "--seed", 3).ok()
    shutil.rmtree("data")
    two = Torchrun(*RUN, "--name", "two", "--overwrite", patch=SLOW_DATA).result().ok()
    assert two.out.count("step 3:") == two.out.count("made\n") == 1  # only the first process speaks, and makes data
    close_runs(one, log_of("two"))
    assert_close_weights(checkpoint_of("one")["model"], checkpoint_of("two")["model"])

    # the other learns of it, and is slow on its way out, where torchrun's SIGTERM finds it
    kill = "unlink = model.Path.unlink\n"
    kill += "model.Path.unlink = lambda p, **k: (time.sleep(p.suffix == '.lock'), unlink(p, **k))\n"
    kill += "before_step = lambda step: (step, rank, attempt) == (5, 1, 0) and os.kill(os.getpid(), signal.SIGKILL)"
    run = Torchrun(*RUN, "--name", "killed", "--resume", "auto", flags=(*TWO, "--max_restarts", 1), patch=kill)
    killed = run.result().ok()
    assert "resuming killed at step 3" in killed.out
    assert killed.err.count("a process was lost, killed") == killed.err.count("model.py train: error:") == 1
    assert "Traceback" not in killed.err
    assert log_of("killed") == log_of("two")
    assert_close_weights(checkpoint_of("killed")["model"], checkpoint_of("two")["model"], atol=0)


def test_two_processes_fit_their_steps_into_a_time(workdir):
    """The first process's clock decides how long is measured, and the number of steps of both: by the second's, which
    is a thousand times slower here, neither would end."""
    conversation_data("chat")
    slow = "clock = time.perf_counter; time.perf_counter = lambda: clock() / 1000**rank"
    run = ("train", "--data", "chat", *SIXTEEN[: SIXTEEN.index("--max_iters")], "--max_minutes", 0.03)
    Torchrun(*run, patch=slow).result().ok()
    assert log_of("7M")[-1]["step"] == checkpoint_of("7M")["train_config"]["max_iters"] >= 10


def test_two_processes_share_unequal_work(cli, workdir):
    """Conversations: losses divide by the targets of the whole batch, not of each process's part."""
    conversation_data("chat")
    cli("train", "--data", "chat", *SIXTEEN, "--name", "one").ok()
    Torchrun("train", "--data", "chat", *SIXTEEN, "--name", "two", "--grad_accum", 2).result().ok()
    close_runs(log_of("one"), log_of("two"))


def test_a_state_of_two_goes_on_in_three_and_in_one(cli, text_file):
    """Shares that do not come out even: 32, 96 and 320 rows among three. Muon's matrices travel to be orthogonalised;
    weights stay apart within a step, are recomputed, and gradients add up over micro-batches. Truth: one process, to
    float32's rounding, also in the optimizers' states."""
    own = ("--batch_size", 12, "--arch", "qwen3", "--optimizer", "normuon", "--schedule", "constant")
    run = ("train", *BYTES, *SIXTEEN, *own)
    cli(*run, "--name", "one").ok()
    apart = ("--fsdp", "--gradient_checkpointing", "--grad_accum", 2)
    Torchrun(*run, "--name", "three", "--max_iters", 3, *apart).result().ok()
    for path in Path("checkpoints").glob("three_*"):
        shutil.copy(path, path.with_name(path.name.replace("three", "alone")))
    three = ("--standalone", "--nproc_per_node", 3)
    Torchrun("train", "--name", "three", "--resume", "--max_iters", 6, flags=three).result().ok()
    cli("train", "--name", "alone", "--resume", "--max_iters", 6).ok()
    expected = checkpoint_of("one")
    for name in ("three", "alone"):
        close_runs(log_of("one"), log_of(name))
        found = checkpoint_of(name)
        assert_close_weights(expected["model"], found["model"], atol=1e-5)
        for ours, theirs in zip(found["optimizer"], expected["optimizer"], strict=True):
            assert_close_weights(ours["state"], theirs["state"], atol=1e-6)


MUON_OF_EACH = """
make = model.make_optimizers
def make_optimizers(gpt, t, passes):
    *adamw, muon = make(gpt, t)
    of_one = lambda p, rows: model.Muon([p], [rows], t.muon_lr, weight_decay=t.weight_decay, dtype=muon.dtype)
    return [*adamw, *map(of_one, muon.params, muon.rows)]
model.make_optimizers = make_optimizers
"""


def test_adapters_by_muon_in_two_processes(cli, workdir):
    """Where there are more processes than matrices, too: here each matrix has a Muon of its own."""
    conversation_data("chat")
    cli("train", "--data", "chat", *SIXTEEN, "--block_size", 64, "--name", "base").ok()
    run = ("finetune", "--model_checkpoint", "base_model.pt", "--data", "chat", *SIXTEEN[-8:], *HERE)
    run += ("--block_size", 16, "--lora_rank", 3, "--optimizer", "muon")
    cli(*run, "--name", "one").ok()
    two = Torchrun(*run, "--name", "two", "--fsdp", "--prompt", "a", patch=MUON_OF_EACH).result().ok()
    assert two.out.count("after finetuning") == 1
    close_runs(log_of("one"), log_of("two"))
    assert_close_weights(checkpoint_of("one")["model"], checkpoint_of("two")["model"], atol=1e-5)


def test_a_signal_to_torchrun_stops_all_at_one_step(one, cli):
    """In slow steps, and long before the next record of the log."""
    signalled = """
def before_step(step):
    if step == 2 and rank == 1:
        os.kill(os.getppid(), signal.SIGINT)
    time.sleep(1 if step > 1 else 0)
"""
    Torchrun(*SILENT, "--name", "two", patch=signalled).result()
    (end,) = ends()
    code, steps = end.split()
    assert code == str(128 + signal.SIGINT) and 2 <= int(steps) < 5
    assert checkpoint_of("two")["step"] == int(steps)
    cli(*SILENT, "--name", "two", "--resume").ok()
    assert_close_weights(checkpoint_of("one")["model"], checkpoint_of("two")["model"])


def test_an_error_in_one_process_ends_all(cli, text_file):
    """While the other waits for it in a collective."""
    patch = """
def green():
    raise model.UserError("the loss is green")
"""
    run = Torchrun(*RUN, patch=patch + in_step_2("green()")).result(timeout=60)
    assert run.code == 1 and run.err.count("the loss is green") == run.err.count("model.py train: error:") == 1
    assert "RuntimeError" not in run.err  # of the connection that the other lost


def test_tokenize_under_torchrun_is_done_once(workdir):
    write_jsonl("chats.jsonl", [{"utterances": ["How are you?", "Fine, and you?"]}] * 200)
    made = ("--hf_dataset", "chats.jsonl", "--dataset", "chats", "--tokenizer", "byte")
    run = Torchrun("hf_tokenize", *made).result().ok()
    assert run.out.count("data/chats: ") == 1 and run.err.count("rror") == 0
    assert model.Data(Path("data/chats")).is_chat


# --- Two machines, with disks of their own


def on_two_machines(*args, patch: str = "") -> list:
    """What torchrun says on each, in the folders 0 and 1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    meet = ("--nnodes", 2, "--nproc_per_node", 1, "--master_addr", "127.0.0.1", "--master_port", port)
    runs = [Torchrun(*args, flags=(*meet, "--node_rank", i), patch=patch, cwd=str(i)) for i in range(2)]
    return [run.result(timeout=60) for run in runs]


@pytest.fixture
def two_folders(text_file) -> None:
    for i in range(2):
        Path(str(i)).mkdir()
        shutil.copy("input.txt", str(i))


def test_two_machines_prepare_and_stop_together(one, two_folders):
    """Each makes its own data, the second one later. A signal to one stops both; the state is on the first's disk,
    which hands it out when they go on."""
    signalled = in_step_2("os.kill(os.getpid(), signal.SIGTERM)")
    on_two_machines(*SILENT, "--name", "two", patch=f"{SLOW_DATA}time.sleep(rank)\n{signalled}")
    assert ends("0") == ends("1") == {f"{128 + signal.SIGTERM} 2"}
    assert [Path(folder, "checkpoints/two_model_last.pt").exists() for folder in "01"] == [True, False]
    assert Path("0/data/input/data.bin").read_bytes() == Path("1/data/input/data.bin").read_bytes()
    for run in on_two_machines(*SILENT, "--name", "two", "--resume"):
        run.ok()
    two = torch.load("0/checkpoints/two_model_last.pt", weights_only=True)["model"]
    assert_close_weights(checkpoint_of("one")["model"], two)


@pytest.mark.parametrize("change, words", [
    (lambda text: text[::-1], ["machine 1 (", "differ in their data"]), (lambda text: b"caf\xe9", ["input.txt"]),
], ids=["other data", "no text"])  # fmt: skip
def test_an_error_of_one_machine_is_told_on_both(two_folders, change, words):
    text = Path("1/input.txt")
    text.write_bytes(change(text.read_bytes()))
    for run in on_two_machines(*RUN):
        assert run.code == 1 and {run.err.count(word) for word in (*words, "model.py train: error:")} == {1}
