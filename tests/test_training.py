"""Training: the same run however it is cut up or interrupted, the numbers it reports, and that it learns."""

import collections
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    BYTES,
    HERE,
    TINY_RUN,
    TINY_SHAPE,
    TRAIN,
    assert_same_run,
    at_each_step,
    checkpoint_of,
    contents,
    log_of,
    model_py,
    random_gpt,
    stop_at,
    tiny_config,
    write_conversations,
)

import model

# --- Stopping and resuming

INTERVALS = ("--max_iters", 13, "--log_interval", 3, "--eval_interval", 5)
DROPOUT = ("--resid_pdrop", 0.1, "--embd_pdrop", 0.1, "--attn_pdrop", 0.1)
RUNS = {
    "AdamW with dropout": DROPOUT,
    "AdamW with dropout in micro-batches": (*DROPOUT, "--grad_accum", 2),
    "Muon": ("--arch", "nanochat"),
    "Muon and GQA": ("--arch", "llama", "--n_kv_head", 1, "--optimizer", "muon", "--schedule", "linear"),
    "float16": ("--arch", "gpt_neox", "--dtype", "float16"),
    "bfloat16": ("--arch", "qwen3", "--dtype", "bfloat16", "--gradient_checkpointing"),
}


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_stopped_and_resumed_run_is_the_run_never_stopped(cli, text_file, monkeypatch, flags):
    """Stopped at its first step, at an evaluation, at a record and beside it; each time with another random state."""
    run = (*TRAIN, *INTERVALS, *flags)
    cli(*run, "--name", "whole").ok()
    stop_at(monkeypatch, 1, 4, 2, 2, 3)
    command = (*run, "--name", "parts")
    for step in (1, 5, 7, 9, 12):
        stopped = cli(*command)
        assert stopped.code == 130 and f"stopped at step {step}" in stopped.out and "--resume" in stopped.out
        assert checkpoint_of("parts")["step"] == step
        torch.manual_seed(step)
        command = ("train", "--name", "parts", "--resume")
    cli(*command).ok()
    assert_same_run("whole", "parts")


@pytest.mark.parametrize("number, step, handler, code", [
    (signal.SIGTERM, 4, signal.SIG_DFL, 128 + signal.SIGTERM),
    (signal.SIGHUP, 4, signal.SIG_DFL, 128 + signal.SIGHUP),
    (signal.SIGHUP, 4, signal.SIG_IGN, 0),  # nohup
    (signal.SIGINT, 6, signal.default_int_handler, 0),  # too late: there is nothing to go on with
])  # fmt: skip
def test_signals_save_and_leave_unless_they_are_ignored(cli, text_file, monkeypatch, number, step, handler, code):
    stop_at(monkeypatch, step, number=number)
    before = signal.signal(number, handler)
    try:
        done = cli(*TRAIN, "--max_iters", 6)
        assert done.code == code and checkpoint_of()["step"] == (4 if code else 6)
        assert ("done in" in done.out, "stopped" in done.out) == (not code, bool(code))
        assert signal.getsignal(number) == handler  # put back
    finally:
        signal.signal(number, before)


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
def test_ctrl_c_in_a_real_program(cli, text_file):
    """The program itself, stopped whenever the signal happens to arrive, then resumed; in a job of a cluster that sets
    LOCAL_RANK for one process too."""
    run = (*TRAIN, *DROPOUT, "--max_iters", 300, "--log_interval", 1, "--eval_interval", 200, "--sample_interval", -1)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(model_py(*run, "--name", "parts"), env={**os.environ, "LOCAL_RANK": "1"}, **pipes)
    log = Path("checkpoints/parts_model.jsonl")
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") > 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopped at step" in out and "Traceback" not in err, err
    assert 20 < checkpoint_of("parts")["step"] < 300
    cli("train", "--name", "parts", "--resume").ok()
    cli(*run, "--name", "whole").ok()
    assert_same_run("whole", "parts")


@pytest.mark.parametrize(
    "tear", [lambda text: text[:-20], lambda text: text + '{"step": 6, "lo', lambda text: "\x00" * 9]
)
def test_a_torn_log_does_not_stand_in_the_way(cli, text_file, monkeypatch, tear):
    """As a full disk leaves it: whole lines are kept, the run goes on, and `plot` reads what is whole."""
    stop_at(monkeypatch, 5)
    cli(*TRAIN, "--max_iters", 8, "--log_interval", 1)
    log = Path("checkpoints/7M_model.jsonl")
    log.write_text(tear(log.read_text()))
    cli("plot", "7M", "--output", "torn.png").ok()
    cli("train", "--resume").ok()
    assert [r["step"] for r in log_of()][-3:] == [6, 7, 8] and checkpoint_of()["step"] == 8


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX signals")
@pytest.mark.parametrize("env, after", [({"PYTHONIOENCODING": "ascii"}, ""), ({}, " | head -c 20")])
def test_nothing_printed_ends_a_run(text_file, workdir, env, after):
    """Not a terminal that is not UTF-8, nor one that has gone."""
    text_file.write_text("é" * 30_000, encoding="utf-8")
    command = " ".join(model_py(*TRAIN, "--max_iters", 6, "--sample_interval", 1, "--log_interval", 1)) + after
    done = subprocess.run(command, shell=True, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert checkpoint_of()["step"] == 6 and "Traceback" not in done.stderr, done.stderr


def test_nanogpt_data_can_be_resumed(cli, workdir):
    """It is known by its contents: refused are a longer training file and a validation of other text."""
    rng, contents = np.random.default_rng(0), {}
    Path("nano").mkdir()
    for name, n in (("train", 3000), ("val", 500), ("more", 500)):
        contents[name] = rng.integers(0, 200, n).astype("<u2").tobytes()
        Path(f"nano/{name}.bin").write_bytes(contents[name])
    cli("train", "--data", "nano", "--tokenizer", "byte", *TINY_RUN, "--max_iters", 4).ok()
    resume = ("train", "--resume", "--max_iters", 8)
    for name, other in (("train", contents["train"] + contents["more"]), ("val", contents["more"])):
        Path(f"nano/{name}.bin").write_bytes(other)
        assert "its contents differ" in cli(*resume).error
        Path(f"nano/{name}.bin").write_bytes(contents[name])
    cli(*resume).ok()


def test_resuming_keeps_the_precision_that_was_chosen(cli, text_file, monkeypatch):
    """A run must not change its precision because it goes on on another machine."""
    run = (*TRAIN, *INTERVALS, "--dtype", "auto")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert "in bfloat16" in cli(*run, "--name", "whole").ok().out
    stop_at(monkeypatch, 6)
    cli(*run, "--name", "parts")
    for instructions in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)
    cli("train", "--name", "parts", "--resume").ok()
    assert_same_run("whole", "parts")


def test_resuming_with_another_setting_is_refused(cli, text_file):
    cli("train", *BYTES, *TINY_SHAPE, *HERE, "--max_iters", 4).ok()
    before, resume = contents("checkpoints"), ("train", "--resume", "--max_iters", 8, "--name", "7M")
    for flags in ("--learning_rate 1e-5", "--n_layer 3", "--seed 5", "--batch_size 8", "--arch llama", "--variant 26M",
                  "--recipe published"):  # fmt: skip
        cli(*resume, *flags.split()).fails_with(f"{flags.split()[0]} differs")
    assert contents("checkpoints") == before
    cli(*resume, "--recipe", "tuned").ok()


def test_resuming_with_the_same_ids_split_or_masked_otherwise_is_refused(cli, workdir):
    """It would train on what was held out, or on other targets. Earlier checkpoints knew the ids alone."""

    def write(val_fraction: float, answer: int) -> str:
        shutil.rmtree("data", ignore_errors=True)
        talks = [([65 + i] * 10, [0] * answer + [1] * (10 - answer)) for i in range(20)]
        write_conversations(Path("data/talk"), talks, val_fraction)
        return model.Data(Path("data/talk")).ids_digest

    run = ("train", "--data", "talk", *TINY_RUN)
    ids = write(0.1, 5)
    cli(*run, "--max_iters", 4).ok()
    for otherwise in ((0.5, 5), (0.1, 2)):
        assert ids == write(*otherwise)
        assert "its contents differ" in cli("train", "--resume", "--max_iters", 6).error
    write(0.1, 5)
    content = checkpoint_of()
    assert content["data"]["digest"] != ids
    content["data"]["digest"] = ids
    model.save_checkpoint(Path("checkpoints/7M_model_last.pt"), content)
    cli("train", "--resume", "--max_iters", 6).ok()


# --- The fast path learns as the plain one


def test_bfloat16_learns_as_float32(cli, text_file):
    """Truth: float32's curve, for three seeds: the precision matters less than the seed does."""
    shape = ("--n_layer", 2, "--n_head", 2, "--n_embd", 64, "--block_size", 32, "--batch_size", 8)
    run = ("train", *BYTES, *HERE, *shape, "--max_iters", 60, "--eval_interval", 30, "--eval_tokens", 4096)
    curves: dict[str, list[list[float]]] = {"float32": [], "bfloat16": []}
    for dtype, seed in itertools.product(curves, (1, 2, 3)):
        cli(*run, "--learning_rate", 3e-3, "--dtype", dtype, "--seed", seed, "--overwrite").ok()
        curves[dtype].append([r["val_loss"] for r in log_of() if "val_loss" in r])
    plain, fast = map(np.array, curves.values())  # (seed, evaluation)
    assert plain.shape == fast.shape == (3, 2) and (plain[:, 1] < plain[:, 0]).all()
    assert (fast != plain).all()  # it was bfloat16
    assert (abs(fast - plain).max(axis=0) < np.ptp(plain, axis=0)).all()


@pytest.mark.parametrize("capability, dtype", [
    ((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16),
])  # fmt: skip
def test_old_gpus_compute_in_float16(monkeypatch, capability, dtype):
    """V100 and T4 (7.x) have no bfloat16; what PyTorch calls supported there is emulated."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args: True)
    assert model.choose_dtype("auto", torch.device("cuda")) == dtype


@pytest.mark.parametrize("capability, found", [((6, 1), "cpu"), ((7, 0), "cpu"), ((7, 5), "cuda"), ((12, 0), "cuda")])
def test_a_gpu_for_which_pytorch_was_not_built(monkeypatch, capability, found):
    """P100 and V100 are seen, and their first kernel fails: PyTorch's default build begins with 7.5."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_120", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert model.choose_device("auto").type == found
    if found == "cpu":
        with pytest.raises(model.UserError, match="is not available here, or PyTorch was not built for it"):
            model.choose_device("cuda")


def test_a_compiled_model_learns_as_the_eager_one(cli, text_file, monkeypatch):
    """Truth: the eager run. Without a C++ compiler the second is eager too, and says so."""
    run = (*TRAIN, "--arch", "llama", "--max_iters", 4, "--log_interval", 1)
    cli(*run, "--name", "eager").ok()
    compiled, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled.append(f) or compile(f))
    out = cli(*run, "--name", "compiled", "--compile", "true").ok().out
    assert len(compiled) == 2 or "no C++ compiler" in out  # a call for each block
    for a, b in zip(log_of("eager"), log_of("compiled"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert checkpoint_of("compiled")["model"].keys() == checkpoint_of("eager")["model"].keys()


# --- However a batch is cut up


def close_runs(a: list[dict], b: list[dict], rel: float = 2e-4) -> None:
    assert len(a) == 6 and a[-1]["loss"] < a[0]["loss"]
    for x, y in zip(a, b, strict=True):
        assert y == pytest.approx(x, rel=rel)


def conversation_data(folder: str) -> None:
    """Conversations of unequal length and unequal counts of targets, so that micro-batches weigh differently."""
    rng, made = np.random.default_rng(0), []
    text = " ".join(rng.choice("the quick brown fox jumps over a lazy dog and runs away".split(), 2000)).encode()
    for n in rng.integers(3, 40, 150):
        begin = int(rng.integers(0, len(text) - 50))
        made.append((list(text[begin : begin + n]), (rng.random(n) < rng.random()).astype(int)))
    write_conversations(Path(folder), made)


SIXTEEN = (*TINY_RUN, "--batch_size", 16, "--max_iters", 6, "--log_interval", 1, "--eval_interval", 3)


@pytest.mark.parametrize("arch, rel", [("gpt2", 2e-4), ("nanochat", 2e-3)])
def test_accumulation_changes_nothing(cli, workdir, arch, rel):
    """1 x 16 = 2 x 8 = 16 x 1, within float32's rounding; Muon orthogonalises in bfloat16, which rounds more."""
    conversation_data("chat")
    for grad_accum in (1, 2, 16):
        cli("train", "--data", "chat", *SIXTEEN, "--arch", arch, "--grad_accum", grad_accum, "--name", grad_accum).ok()
    for cut in ("2", "16"):
        close_runs(log_of("1"), log_of(cut), rel)


# --- Optimizers and schedules


def test_muon_equals_pytorchs_on_unfused_matrices():
    """q, k, v of a fused matrix and matrices of one shape, orthogonalised together here and one by one there."""
    torch.manual_seed(0)
    rows, columns = [[32, 8, 8], [64, 64], [32], [32]], [32, 32, 64, 64]
    fused = [torch.nn.Parameter(torch.randn(sum(parts), n) * 0.1) for parts, n in zip(rows, columns, strict=True)]
    start = [p.detach().clone() for p in fused]
    separate = [list(map(torch.nn.Parameter, p.clone().split(parts))) for p, parts in zip(start, rows, strict=True)]
    ours = model.Muon(fused, rows, lr=0.02, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.Muon(sum(separate, []), lr=0.02, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(5):
        for p, parts, sizes in zip(fused, separate, rows, strict=True):
            p.grad = torch.randn_like(p)
            for part, grad in zip(parts, p.grad.split(sizes), strict=True):
                part.grad = grad.clone()
        ours.step()
        theirs.step()
    for before, p, parts in zip(start, fused, separate, strict=True):
        moved, expected = p - before, torch.cat(list(parts)) - before
        assert (moved - expected).norm() < 0.01 * expected.norm()  # both work in bfloat16
        assert expected.norm() > 0.1


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_muon_in_float16(scale):
    """For GPUs that only emulate bfloat16: gradients may lie below float16's smallest number. Truth: float32."""
    steps = []
    for dtype in (torch.float32, torch.float16):
        p = torch.nn.Parameter(torch.zeros(64, 32))
        p.grad = scale * torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) / 32
        model.Muon([p], [[64]], lr=1.0, dtype=dtype).step()
        steps.append(p.detach())
    assert (steps[1] - steps[0]).norm() < 0.01 * steps[0].norm()


def test_normuon_by_hand():
    """Truth: PyTorch's Newton-Schulz of each part, then the rows divided by the root of a running mean of their squared
    norms, which begins where those of an orthogonal matrix are (arXiv 2510.05491, algorithm 1, but for its factor)."""
    from torch.optim._muon import _zeropower_via_newtonschulz as orthogonalised

    torch.manual_seed(0)
    p, parts = torch.nn.Parameter(torch.randn(48, 16) * 0.1), [32, 16]
    ours, w = model.Muon([p], [parts], lr=0.02, momentum=0.9, weight_decay=0.1, beta2=0.8), p.detach().clone()
    momentum, squares = torch.zeros(48, 16), torch.tensor([0.5] * 32 + [1.0] * 16)[:, None]
    for step in range(6):
        p.grad = torch.randn(48, 16) * (1 if step != 2 else math.nan)
        ours.found_inf = torch.tensor(float(step == 2))
        ours.step()
        if step == 2:  # leaves everything as it was
            continue
        momentum = 0.9 * momentum + 0.1 * p.grad
        both = (0.1 * p.grad + 0.9 * momentum).split(parts)
        update = torch.cat([orthogonalised(x, (3.4445, -4.775, 2.0315), 5, 1e-7).float() for x in both])
        squares = 0.8 * squares + 0.2 * update.square().sum(dim=1, keepdim=True)
        w = w * (1 - 0.02 * 0.1) - 0.02 * update / squares.sqrt()
        assert (p - w).norm() < 0.01 * 0.02 * update.norm()  # both work in bfloat16
    assert squares.std() > 0.01  # rows differ


def run_of(gpt: model.GPT, **settings) -> list[model.Optimizer]:
    return model.make_optimizers(gpt, model.TrainConfig(**settings))


@pytest.mark.parametrize("arch", model.ARCHS)
def test_adamw_decays_matrices_and_embeddings_only(arch):
    gpt = model.GPT(tiny_config(arch))
    (adamw,) = run_of(gpt, weight_decay=0.1, learning_rate=0.01)
    assert sum(len(g["params"]) for g in adamw.param_groups) == len(list(gpt.parameters()))
    before = {n: p.detach().clone() for n, p in gpt.named_parameters()}
    for p in gpt.parameters():
        p.grad = torch.zeros_like(p)
    adamw.step()
    for name, p in gpt.named_parameters():
        decayed = "norm" not in name and not name.endswith("bias")
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.01 * 0.1) if decayed else before[name], msg=name)


def test_three_steps_by_hand(cli, workdir):
    """Conversations: the mean over what their masks want, gradients clipped to 1, AdamW with two groups, warm-up."""
    conversation_data("chat")
    flags = ("--max_iters", 3, "--warmup_iters", 2, "--learning_rate", 1e-2, "--log_interval", 1)
    cli("train", "--data", "chat", *TINY_RUN, *flags).ok()
    split = model.Data(Path("chat")).splits["train"]
    windows = split.windows(16)
    order = np.random.default_rng((1337, 0)).permutation(len(windows))
    torch.manual_seed(1337)
    gpt = model.GPT(model.GPTConfig(**checkpoint_of()["config"]))
    matrices, others = [p for p in gpt.parameters() if p.dim() > 1], [p for p in gpt.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for step, lr in enumerate((1e-2 / 3, 2e-2 / 3, 1e-2)):
        batch = split.batch(windows, order[4 * step : 4 * step + 4], 16)
        assert (batch["targets"] == -1).any()
        logits = gpt(batch["idx"], documents=batch["documents"]).flatten(0, 1)
        loss = F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=-1)
        assert log_of()[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
    for name, value in checkpoint_of()["model"].items():
        torch.testing.assert_close(value, gpt.state_dict()[name], rtol=0, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_muon_takes_the_block_matrices():
    gpt = model.GPT(tiny_config("nanochat"))
    adamw, muon = run_of(gpt, optimizer="muon", muon_lr=0.03, learning_rate=0.1, embd_lr=0.2, head_lr=0.3)
    names = {id(p): n for n, p in gpt.named_parameters()}
    rates = {names[id(p)]: g["lr"] for o in (adamw, muon) for g in o.param_groups for p in g["params"]}
    assert rates.pop("wte.weight") == 0.2 and rates.pop("lm_head.weight") == 0.3
    assert set(rates.values()) == {0.03} and all(n.startswith("blocks.") for n in rates) and len(rates) == 8
    assert muon.params[0] is gpt.blocks[0].attn.qkv.weight and muon.rows[0] == [32, 32, 32]


@pytest.mark.parametrize("settings, expected", [
    # warm-up of 10 steps ends at the peak; then half a cosine from 1 to 0.1 over 90 steps
    (dict(schedule="cosine"), {0: 1 / 11, 9: 10 / 11, 10: 1.0, 55: 0.55, 40: 0.1 + 0.9 * 0.75, 70: 0.1 + 0.9 * 0.25}),
    (dict(schedule="cosine", min_lr_ratio=0.0), {55: 0.5}),
    (dict(schedule="linear"), {4: 5 / 11, 10: 1.0, 55: 0.5, 91: 0.1}),
    (dict(schedule="wsd"), {10: 1.0, 59: 1.0, 60: 1.0, 80: 0.5, 99: 1 / 40}),  # 40% of the run decays
    (dict(schedule="wsd", decay_fraction=0.1), {89: 1.0, 95: 0.5}),
    (dict(schedule="wsd", decay_fraction=-1.0), {60: 1.0, 80: 0.5}),  # a short run: as 0.4
    (dict(schedule="wsd", decay_fraction=-1.0, max_iters=1440), {720: 1.0, 1080: 0.5}),  # after step 720
    (dict(schedule="wsd", decay_fraction=-1.0, max_iters=10000), {4000: 1.0, 7000: 0.5}),  # 60% of the run decays
    (dict(schedule="constant"), {0: 1 / 11, 10: 1.0, 99: 1.0}),
    (dict(schedule="constant", warmup_iters=0), {0: 1.0}),
    (dict(schedule="cosine", warmup_iters=3), {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0}),
    (dict(schedule="linear", max_iters=5000), {0: 1 / 101, 99: 100 / 101, 100: 1.0, 2550: 0.5}),  # at most 100
])  # fmt: skip
def test_learning_rate_schedules(settings, expected):
    t = model.TrainConfig(**{"max_iters": 100, **settings})
    assert {step: model.lr_factor(step, t) for step in expected} == pytest.approx(expected)
    assert all(0 < model.lr_factor(step, t) <= 1 for step in range(t.max_iters))


def test_the_log(cli, text_file):
    """Steps, tokens and the learning rate of each record, as the settings say; each loss is a mean over its steps."""
    flags = ("--max_iters", 20, "--eval_interval", 10, "--learning_rate", 1e-3, "--warmup_iters", 4)
    for interval in (1, 4):
        cli(*TRAIN, *flags, "--log_interval", interval, "--name", f"every{interval}").ok()
    every, fourth = log_of("every1", timing=True), log_of("every4")
    assert [r["step"] for r in every] == list(range(1, 21)) and [r["step"] for r in fourth] == [4, 8, 10, 12, 16, 20]
    assert all(r["tokens"] == r["step"] * 4 * 16 and r["seconds"] >= 0 and r["tokens_per_s"] > 0 for r in every)
    assert [r["step"] for r in every if "val_loss" in r] == [10, 20] == [r["step"] for r in fourth if "val_loss" in r]
    assert every[0]["lr"] == pytest.approx(1e-3 / 5) and every[4]["lr"] == pytest.approx(1e-3)
    losses = [r["loss"] for r in every]
    means = [np.mean(losses[a:b]) for a, b in ((0, 4), (4, 8), (8, 10), (10, 12), (12, 16), (16, 20))]
    assert [r["loss"] for r in fourth] == pytest.approx(means, rel=1e-5)
    assert losses[0] == pytest.approx(math.log(259), abs=0.2)


def test_samples_are_shown_when_they_are_asked_for(cli, text_file):
    """Also between two records of the log, which they leave as it would be without."""
    flags = ("--max_iters", 5, "--log_interval", 3, "--eval_interval", 100)
    out = cli("train", *BYTES, *TINY_RUN, *flags, "--sample_interval", 2, "--name", "shown").ok().out
    assert re.findall(r"^--- sample at step (\d+) ---$", out, re.M) == ["2", "4", "5"]
    cli("train", *BYTES, *TINY_RUN, *flags, "--sample_interval", -1, "--name", "silent").ok()
    assert_same_run("shown", "silent")


def test_a_sample_of_conversations_is_an_answer(cli, workdir):
    """To the question of the first conversation that is held out."""
    ask, answer = [list(f"<{n}>".encode()) for n in ("What?", "That.")]
    write_conversations(Path("chat"), [([48 + i, *ask, *answer], [0] * 8 + [1] * 7) for i in range(40)])
    flags = ("--max_iters", 150, "--learning_rate", 1e-2, "--sample_interval", 150)
    out = cli("train", "--data", "chat", *TINY_RUN, *flags).ok().out
    assert "--- sample at step 150 ---\nT<What?><That.>" in out


def test_a_step_without_a_target_does_not_end_a_run(cli, workdir):
    """A window of a conversation may be all prompt."""
    write_conversations(Path("chat"), [([65] * 20, [i % 4 == 0] * 20) for i in range(40)])
    flags = ("--batch_size", 1, "--max_iters", 12, "--log_interval", 1)
    cli("train", "--data", "chat", *TINY_RUN, *flags).ok()
    assert {"loss" in r for r in log_of()} == {True, False} and checkpoint_of()["step"] == 12


def test_epochs(cli, text_file, monkeypatch):
    """54,000 bytes are 3,374 blocks of 16: half of them are 5 batches of 400. By so many steps compiling is chosen."""
    work = []
    monkeypatch.setattr(model, "compile_model", lambda gpt, t, *rest: work.append(t.max_iters))
    cli("train", *BYTES, *TINY_RUN, "--batch_size", 400, "--epochs", 0.5, "--sample_interval", -1).ok()
    assert work == [checkpoint_of()["step"]] == [5]
    for fewer in (0.5, 0.3):
        assert "step 5 of" in (error := cli("train", "--resume", "--epochs", fewer).error) and "--epochs" in error
    cli("train", "--resume", "auto", "--epochs", 0.3).ok()  # as a queue runs a finished job again
    cli("train", "--resume", "--epochs", 0.7).ok()
    assert checkpoint_of()["step"] == 6


# --- Evaluation


def test_evaluation_by_hand(cli, text_file):
    """Loss over every validation block, its exponential, and bits by the bytes of text that the targets stand for."""
    cli("tokenize", "--dataset", "d", "--txt", text_file, "--tokenizer", "bpe", "--vocab_size", 400).ok()
    cli("train", "--data", "d", *TINY_SHAPE, "--max_iters", 3, "--eval_tokens", 10**9, "--dtype", "float32").ok()
    record, data = log_of()[-1], model.Data(Path("data/d"))
    gpt = model.open_model("7M_model_last.pt").model
    ids = data.splits["val"].tokens.astype(np.int64)
    n = (len(ids) - 1) // 16 * 16
    with torch.no_grad():
        logits = gpt(torch.from_numpy(ids[:n]).view(-1, 16))
    loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(ids[1 : n + 1])).item()
    n_bytes = sum(len(data.tokenizer.tiktoken.decode_single_token_bytes(i)) for i in ids[1 : n + 1].tolist())
    assert record["val_tokens"] == n
    assert record["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert record["val_ppl"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert record["val_bpb"] == pytest.approx(loss * n / n_bytes / math.log(2), rel=1e-5)
    assert n_bytes > 1.5 * n


def test_evaluation_reads_the_same_blocks_every_time(workdir):
    """Evenly spread, as many as eval_tokens allows, and the same in a second evaluator."""
    with model.DataWriter(Path("d"), model.byte_tokenizer(), overwrite=False) as writer:
        writer.write(np.arange(20_000) % 250)
        writer.finish(0.5, "numbers")
    data = model.Data(Path("d"))
    evaluators = [model.Evaluator(data, 16, batch, 320) for batch in (4, 7)]
    starts = [[10_000 + e.windows[i] for i in e.blocks] for e in evaluators]
    assert starts[0] == starts[1] and len(set(starts[0])) == 20
    gaps = np.diff(starts[0])
    assert min(starts[0]) == 10_000 and max(starts[0]) > 19_000 and max(gaps) - min(gaps) <= 16
    gpt = random_gpt(tiny_config("llama", vocab_size=259))
    results = [e(gpt) for e in evaluators]
    assert results[0] == pytest.approx(results[1], rel=1e-5) and results[0]["tokens"] == 320


def test_the_best_model_is_kept(cli, text_file, monkeypatch):
    """Validation losses of 3, 2, 2.5, 2.1: the best file is of the second, also when the run is resumed after that."""
    losses = iter([3.0, 2.0, 2.5, 2.1])
    fake = lambda self, gpt: {"val_loss": next(losses), "val_ppl": 1.0, "val_bpb": 1.0, "val_tokens": 1}  # noqa: E731
    monkeypatch.setattr(model.Evaluator, "__call__", fake)
    cli(*TRAIN, "--max_iters", 6, "--eval_interval", 2).ok()
    assert checkpoint_of(last=False)["step"] == 4 and checkpoint_of()["step"] == 6
    out = cli("train", "--resume", "--max_iters", 8).ok().out
    assert checkpoint_of(last=False)["step"] == 4 and checkpoint_of()["step"] == 8
    assert "resuming" in out and "best val_loss 2.0000" in out
    assert "nothing to resume" in cli("train", "--resume").error


def test_the_files_of_a_run(cli, text_file):
    """The best model, whose parameters were counted, without an optimizer; two states; the log; and nothing else."""
    out = cli(*TRAIN, "--max_iters", 4).ok().out
    files = ["7M_model.jsonl", "7M_model.pt", "7M_model_last.2.pt", "7M_model_last.pt"]
    assert sorted(os.listdir("checkpoints")) == files
    best = checkpoint_of(last=False)
    assert best["format_version"] == model.FORMAT_VERSION and best["optimizer"] is None
    assert f"{sum(p.numel() for p in best['model'].values()):,} parameters" in out


# --- When numbers go wrong, and short number types


def spoil(monkeypatch, first: int, last: int, bad: float) -> dict[int, dict]:
    """Make a gradient of the embedding not finite in these steps. Returns the weights before each, as they come."""
    weights = {}

    def before(step: int, model: model.GPT, **step_arguments) -> None:
        weights[step] = {k: v.clone() for k, v in model.state_dict().items()}

    def after(step: int, model: model.GPT, **step_arguments) -> None:
        if first <= step <= last:
            model.wte.weight.grad[3] = bad

    at_each_step(monkeypatch, before, after)
    return weights


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "normuon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_skipped(cli, text_file, monkeypatch, bad, optimizer, dtype):
    """By every optimizer alike, though only one of them sees what is wrong; and it is in the log, with its blocks."""
    weights = spoil(monkeypatch, 7, 8, bad)
    run = (*TRAIN, "--dtype", dtype, "--optimizer", optimizer, "--max_iters", 12)
    cli(*run, "--log_interval", 4, "--eval_interval", 12).ok()
    assert all(torch.equal(v, weights[9][k]) and v.isfinite().all() for k, v in weights[7].items())
    assert not any(torch.equal(v, weights[11][k]) for k, v in weights[9].items() if v.dim() == 2)
    (state, *_) = checkpoint_of()["optimizer"][0]["state"].values()
    assert state["step"] == 10
    if dtype == "float16":
        assert checkpoint_of()["scaler"]["scale"] == 2**16 / 4  # halved in each of the two steps
    n_blocks = len(model.Data(Path("data/input")).splits["train"].windows(16))
    blocks = model.BlockSampler(n_blocks, 4, 1337)(7).tolist()
    told = [{k: r[k] for k in r if k.startswith("bad")} for r in log_of()]
    assert told == [{}, {"bad_steps": 2, "bad_step": 8, "bad_blocks": blocks}, {}]
    assert all(math.isfinite(r["loss"]) for r in log_of())


def test_skipped_steps_before_a_stop_are_those_of_the_run_never_stopped(cli, text_file, monkeypatch):
    """In the log, and in the row that ends a run."""
    run = (*TRAIN, "--max_iters", 8, "--log_interval", 6, "--eval_interval", 8)
    for name in ("whole", "parts"):
        with monkeypatch.context() as patch:
            spoil(patch, 1, 3, math.nan)
            if name == "parts":
                stop_at(patch, 2)
            cli(*run, "--name", name)
    with monkeypatch.context() as patch:
        spoil(patch, 1, 1, math.nan)  # the third
        assert "3 steps in a row" in cli("train", "--name", "parts", "--resume", "--max_bad_steps", 3).error
    with monkeypatch.context() as patch:
        spoil(patch, 1, 1, math.nan)
        cli("train", "--name", "parts", "--resume").ok()
    assert_same_run("whole", "parts")
    assert log_of("parts")[0]["bad_steps"] == 3


def test_a_save_by_the_clock_waits_for_a_finite_step(cli, text_file, monkeypatch):
    """The weights may be why steps are not finite: states from before are kept."""
    saved, save = set(), model.save_checkpoint
    spoil(monkeypatch, 7, 9, math.nan)
    monkeypatch.setattr(model, "save_checkpoint", lambda p, c, *more: (saved.add(c["step"]), save(p, c, *more)))
    cli(*TRAIN, "--max_iters", 12, "--eval_interval", 12, "--save_minutes", 1e-9).ok()
    assert saved == {*range(1, 13)} - {7, 8, 9}


def test_evaluations_fall_on_whole_records(cli, text_file):
    """So that the loss shown beside them is a mean of ten steps, too; but for that of the last step."""
    cli(*TRAIN, "--max_iters", 503, "--sample_interval", -1).ok()
    steps = [r["step"] for r in log_of() if "val_loss" in r]
    assert [r["step"] for r in log_of()] == [*range(10, 501, 10), 503] and steps[-1] == 503
    assert len(steps) >= 4 and not any(step % 10 for step in steps[:-1])


def test_a_record_of_skipped_steps_alone_has_no_loss(cli, text_file, monkeypatch):
    """It would be 0, better than any."""
    spoil(monkeypatch, 2, 2, math.nan)
    run = ("train", *BYTES, *TINY_RUN, "--max_iters", 3, "--log_interval", 1, "--eval_interval", 2)
    assert "step 2: loss nan, val_loss" in cli(*run).ok().out
    assert [("loss" in r, r.get("bad_step")) for r in log_of()] == [(True, None), (False, 2), (True, None)]
    assert [r["grad_norm"] is None for r in log_of()] == [False, True, False]
    assert "NaN" not in Path("checkpoints/7M_model.jsonl").read_text()  # which JSON does not have


def test_too_many_steps_that_are_not_finite_stop_the_run(cli, text_file, monkeypatch):
    """With the last good state kept, from which the run can go on."""
    run = (*TRAIN, "--max_iters", 20, "--eval_interval", 5, "--max_bad_steps", 4)
    cli(*run, "--name", "whole").ok()
    spoil(monkeypatch, 7, 10, math.nan)
    words = ("not finite in 4 steps in a row, up to step 10", "parts_model_last.pt")
    cli(*run, "--name", "parts").fails_with(*words)
    assert checkpoint_of("parts")["step"] == 5
    cli("train", "--name", "parts", "--resume").ok()
    assert_same_run("whole", "parts")


def test_a_state_that_went_wrong_is_not_saved_as_good(cli, text_file, monkeypatch):
    """A last update that ruins the weights shows in the evaluation, not in the loss of its step."""
    factor = model.lr_factor
    monkeypatch.setattr(model, "lr_factor", lambda step, t: 1e38 if step == 5 else factor(step, t))
    for interval, kept in ((2, 4), (3, 3)):
        run = (*TRAIN, "--max_iters", 6, "--eval_interval", interval, "--name", interval)
        assert "not finite at step 6" in cli(*run, "--sample_interval", -1).error
        assert checkpoint_of(interval)["step"] == kept
        assert all(p.isfinite().all() for p in checkpoint_of(interval)["model"].values())


@pytest.mark.parametrize("arch", ["gpt2", "nanochat"])
def test_float16_learns_as_float32(cli, text_file, arch):
    run = (*TRAIN, "--arch", arch, "--max_iters", 60, "--sample_interval", -1, "--learning_rate", 3e-3)
    cli(*run, "--name", "long").ok()
    assert "in float16" in cli(*run, "--name", "short", "--dtype", "float16").ok().out
    assert all(p.dtype == torch.float32 for p in checkpoint_of("short")["model"].values())
    long, short = (log_of(name)[-1]["val_loss"] for name in ("long", "short"))
    assert short == pytest.approx(long, rel=0.02) and short != long and short < 0.9 * math.log(259)


# --- Learning


@pytest.mark.parametrize("arch, flags", [
    ("gpt2", ("--max_iters", 120, "--learning_rate", 5e-3)), ("nanochat", ("--max_iters", 80)),
])  # fmt: skip
def test_a_small_text_is_learned_by_heart(cli, shakespeare, arch, flags):
    """1,000 tokens to a training loss below 0.1 nats, in about a hundred steps."""
    Path("input.txt").write_text(shakespeare[:1000], encoding="utf-8")
    shape = ("--n_layer", 2, "--n_head", 4, "--n_embd", 64, "--block_size", 64, "--batch_size", 14)
    flags += ("--dtype", "float32", "--eval_interval", 1000, "--sample_interval", -1)
    cli("train", *BYTES, *shape, *flags, "--arch", arch).ok()
    assert log_of()[-1]["loss"] < 0.1
    flags = ("--length", 34, "--temperature", 0, "--dtype", "float32")  # to the end of the first block
    text = cli("sample", "--model_checkpoint", "7M_model_last.pt", "--prompt", shakespeare[:30], *flags).ok().out
    assert text == shakespeare[:64] + "\n"


def test_architectures_learn(cli, shakespeare):
    """In 120 steps both beat what counting bytes gives, nanochat by more than gpt2."""
    Path("input.txt").write_text(shakespeare[:200_000], encoding="utf-8")
    shape = ("--n_layer", 2, "--n_head", 4, "--n_embd", 64, "--block_size", 64, "--batch_size", 12)
    flags = ("--max_iters", 120, "--dtype", "float32", "--sample_interval", -1, "--eval_interval", 120)
    losses = {}
    for arch, rate in (("gpt2", ("--learning_rate", 3e-3)), ("nanochat", ())):
        cli("train", *BYTES, *shape, *flags, "--eval_tokens", 10_000, *rate, "--arch", arch, "--name", arch).ok()
        losses[arch] = log_of(arch)[-1]["val_loss"]
    data = model.Data(Path("data/input"))
    train, val = (data.splits[name].tokens for name in ("train", "val"))
    counts = np.bincount(train, minlength=259) + 0.1
    unigram = -np.log(counts[val] / counts.sum()).mean()
    pairs = collections.Counter(zip(train[:-1].tolist(), train[1:].tolist(), strict=True))
    odds = [(pairs[a, b] + 0.1) / (counts[a] + 25.9) for a, b in zip(val[:-1], val[1:], strict=True)]
    bigram = -np.log(odds).mean()
    assert losses["gpt2"] < unigram - 0.5
    assert losses["nanochat"] < min(bigram, losses["gpt2"] - 0.1)


# --- Recipes, and runs by the clock


def test_recipes(cli, text_file):
    """The tuned one is the default; the published one is the variant's source's; flags override either."""
    short = ("train", *BYTES, *HERE, "--block_size", 16, "--max_iters", 1, "--overwrite")
    for flags, arch, optimizer, batch_size in (
        ((), "qwen3", "normuon", 16),
        (("--recipe", "published"), "gpt2", "adamw", 16),
        (("--recipe", "published", "--arch", "llama", "--batch_size", 4), "llama", "adamw", 4),
        (("--optimizer", "adamw"), "qwen3", "adamw", 16),
    ):
        out = cli(*short, *flags).ok().out
        assert f"7M, {'published' if 'published' in flags else 'tuned'} recipe: " in out
        c = checkpoint_of()
        found = c["config"]["arch"], c["train_config"]["optimizer"], c["train_config"]["batch_size"]
        assert found == (arch, optimizer, batch_size)
        assert c["config"]["n_layer"] == 4 and c["config"]["n_embd"] == 128
    assert c["train_config"]["schedule"] == "wsd"
    assert c["train_config"]["embd_lr"] > c["train_config"]["learning_rate"]
    cli(*short, "--learning_rate", 1e-3, "--arch", "nanochat").ok()
    assert checkpoint_of()["train_config"]["embd_lr"] == checkpoint_of()["train_config"]["head_lr"] == 0
    cli(*short, "--learning_rate", 1e-3).ok()  # is the embedding's too
    assert checkpoint_of()["train_config"]["embd_lr"] == 0


def test_weight_decay_by_how_often_the_data_is_seen(cli, text_file):
    """14 steps of 1,024 see 3,374 blocks 4.2 times. What is asked for or published stays; so it does on resuming."""
    short = ("train", *BYTES, *TINY_SHAPE, *HERE, "--batch_size", 1024, "--sample_interval", -1, "--overwrite")

    def decays() -> set[float]:
        return {g["weight_decay"] for state in checkpoint_of()["optimizer"] for g in state["param_groups"]}

    assert "over the data" not in cli(*short, "--max_iters", 1).ok().out and decays() == {0.0, 0.1}
    assert ", 4.2 passes over the data, with normuon" in cli(*short, "--epochs", 4).ok().out
    (chosen,) = decays() - {0.0}
    assert 0.2 < chosen < 0.3
    cli("train", "--resume", "--max_iters", 20, "--weight_decay", -1).ok()
    assert decays() == {0.0, chosen} and checkpoint_of()["step"] == 20
    for flags, asked in ((("--weight_decay", 0.15), 0.15), (("--recipe", "published"), 0.1)):
        cli(*short, "--epochs", 4, *flags).ok()
        assert decays() == {0.0, asked}
    # the best of the sweeps in tests/benchmarks/README.md
    for passes, low, high in ((0.01, 0.1, 0.1), (1, 0.1, 0.1), (4.1, 0.1, 0.3), (7.7, 0.3, 0.45), (15.8, 0.4, 0.6)):
        assert low <= model.decay_by_passes(passes) <= high


def test_a_run_of_so_many_minutes(cli, text_file):
    """The steps that are measured leave no trace: it is the run of as many steps, to the last bit."""
    run = (*TRAIN, "--optimizer", "normuon", "--weight_decay", -1, "--resid_pdrop", 0.1, "--sample_interval", -1)
    begun = time.monotonic()
    cli(*run, "--max_minutes", 0.05, "--name", "timed").ok()
    assert time.monotonic() - begun < 20
    t = checkpoint_of("timed")["train_config"]
    assert t["max_minutes"] == 0 and t["max_iters"] >= 10
    cli(*run, "--max_minutes", 0.05, "--name", "timed", "--resume", "auto").ok()  # it stands as it was fixed
    assert checkpoint_of("timed")["step"] == t["max_iters"]
    cli(*run, "--max_iters", t["max_iters"], "--name", "counted").ok()
    assert_same_run("timed", "counted")


def test_one_length_at_a_time(cli, text_file):
    assert "--epochs and --max_minutes" in cli("train", *BYTES, "--max_minutes", 1, "--epochs", 2).error
    assert "--max_iters and --epochs" in cli("finetune", *BYTES[:2], "--finetune_iters", 5, "--epochs", 2).error


def test_the_steps_that_are_timed_read_other_blocks(cli, text_file, monkeypatch):
    """As the run's steps do: with --cache_teacher the blocks of the first would be known after it."""
    asked, batches = [], model.Run.batches
    monkeypatch.setattr(model.Run, "batches", lambda run, step: asked.append(step) or batches(run, step))
    cli(*TRAIN, "--max_minutes", 0.02, "--sample_interval", -1).ok()
    run = max(i for i, step in enumerate(asked) if step == 0)  # the last step 0 is the run's first
    assert run >= 5 and asked[:run] == list(range(run))


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(model, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(model.UserError, match="this machine has 2 GPUs"):
        model.choose_device("cuda:7")
    assert model.choose_device("cuda:1") == torch.device("cuda:1")
