"""CUDA and MPS, pretended: nothing is left on the wrong device, nothing waits that need not, the numbers are the CPU's.

The truth is the same command on the CPU; what it chooses otherwise there (see `plain`) is chosen alike for it. Real
devices add in another order, so equal here says that the same is computed, not how exactly.
"""

import contextlib
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import (
    byte_gpt,
    log_of,
    mean_error,
    random_gpt,
    random_tokens,
    save_model,
    stop_at,
    tiny_config,
    write_conversations,
)
from pretended import pretend

import model

DEVICES = ("cuda", "mps")
SHAPE = ("--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--recipe", "published")
STEPS = ("--batch_size", 4, "--max_iters", 4, "--log_interval", 2, "--eval_interval", 4, "--eval_tokens", 64)
STEPS += ("--compile", "false", "--sample_interval", -1, "--warmup_iters", 0, "--learning_rate", 3e-3)
DROPOUT = ("--embd_pdrop", 0.1, "--resid_pdrop", 0.1, "--attn_pdrop", 0.1)
RECOMPUTED = ("--gradient_checkpointing", "true", "--grad_accum", 2)


@pytest.fixture
def files(workdir, text_file) -> None:
    """Text, conversations, and two models of bytes."""
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    talk = [([72, 105, 10 + i, *[65] * (i % 7)] * 2, [0, 1, 1, *[1] * (i % 7)] * 2) for i in range(60)]
    write_conversations(Path("data/talks"), talk)
    for name, arch in (("base.pt", "qwen3"), ("teacher.pt", "llama")):
        save_model(name, byte_gpt(arch, n_kv_head=2))


@pytest.fixture
def plain(monkeypatch) -> None:
    """The CPU computes as other devices do: by the plain operators, with Newton-Schulz in bfloat16."""
    original = model.make_optimizers

    def make_optimizers(*args):
        made = original(*args)
        for muon in made[1:]:
            muon.dtype = torch.bfloat16
        return made

    monkeypatch.setattr(model, "make_optimizers", make_optimizers)
    monkeypatch.setattr(model, "training_library", lambda x: None)


def run_on(where: str, cli, *command, name: str | None = None, stdin: bytes | None = None):
    """A command on the CPU, or on a pretended device: (its output, the device)."""
    name = ("--name", name or where) if command[0] in ("train", "finetune", "distill") else ()
    with pretend(where) if where in DEVICES else contextlib.nullcontext() as device:
        return cli(*command, *name, "--device", where, stdin=stdin).ok().out, device


def check_waits(device, copies: int, fills_cache: bool = False) -> None:
    """Between two records the host waits for nothing, but on MPS for its batches (see model.send), and for what the
    teacher's cache is to keep."""
    waits = device.waits["training"]
    of_cache = sum(n for what, n in waits.items() if "Cache.write" in what or "teacher_answers" in what)
    assert bool(of_cache) == fills_cache
    assert sum(waits.values()) - of_cache == copies * (device.named.type == "mps"), waits
    assert copies == 0 or device.named.type == "cuda" or waits["copy to the device in send"] == copies
    # a scale is inverted in float64, by PyTorch, and the sum of an evaluation goes to other processes in it
    assert set(device.wide) <= {"Run.update", "measure"}


TRAIN = ("train", "--variant", "7M", "--data", "text", *SHAPE, *STEPS)
FINETUNE = ("finetune", "--model_checkpoint", "base.pt", "--data", "talks", "--block_size", 32, *STEPS)
DISTILL = ("distill", "--teacher_model_path", "teacher.pt", "--student_variant", "7M", "--data", "text", *SHAPE, *STEPS)
RUNS = {  # command, tensors that a step sends to the device, how equal
    "gpt2": ((*TRAIN, "--dtype", "float32", "--grad_accum", 2), 4, 1e-5),
    "qwen3 in bfloat16": ((*TRAIN, "--arch", "qwen3", "--n_kv_head", 1, "--dtype", "bfloat16"), 2, 5e-3),
    "nanochat with muon": ((*TRAIN, "--arch", "nanochat", "--optimizer", "muon", "--dtype", "float32"), 2, 1e-4),
    "float16 with normuon": ((*TRAIN, "--arch", "llama", "--optimizer", "normuon", "--dtype", "float16"), 2, 5e-3),
    "dropout recomputed": ((*TRAIN, *DROPOUT, *RECOMPUTED, "--dtype", "float32"), 4, 1e-5),
    "conversations": ((*FINETUNE, "--dtype", "float32", "--resid_pdrop", 0.1), 3, 1e-5),
    "conversations in bfloat16": ((*FINETUNE, "--dtype", "bfloat16", "--grad_accum", 2), 6, 5e-3),
    "lora in float16": ((*FINETUNE, "--dtype", "float16", "--lora_rank", 4, "--grad_accum", 2), 6, 5e-3),
    "distill": ((*DISTILL, "--dtype", "float32", "--divergence", "jsd"), 2, 1e-5),
    "distill in bfloat16": ((*DISTILL, "--dtype", "bfloat16", "--alpha", 1), 2, 2e-2),
    "on-policy": ((*DISTILL, "--dtype", "float32", "--on_policy", 0.5, "--seed", 2), 2, 1e-5),  # its steps 1 and 4
    "cached teacher": ((*DISTILL, "--dtype", "float32", "--cache_teacher", 8), 4, 1e-5),
}  # fmt: skip


@pytest.mark.parametrize("command, copies, rel", RUNS.values(), ids=RUNS)
def test_a_run_is_that_of_the_cpu_and_waits_for_nothing(files, plain, cli, command, copies, rel):
    run_on("cpu", cli, *command)
    for where in DEVICES[:1] if set(RECOMPUTED + DROPOUT) <= set(command) else DEVICES:
        _, device = run_on(where, cli, *command)
        check_waits(device, copies * 4)
        for ours, theirs in zip(log_of(where), log_of("cpu"), strict=True):
            assert ours == pytest.approx(theirs, rel=rel)


@pytest.mark.parametrize("where", DEVICES)
def test_a_teachers_cache_is_filled_and_read(files, cli, where):
    """Filling it takes the teacher's probabilities to the host, once for each block."""
    command = (*DISTILL, "--dtype", "float32", "--cache_teacher", 8)
    _, device = run_on(where, cli, *command, name="first")
    check_waits(device, 4 * 4, fills_cache=True)
    done = sum(Path("data/text/teacher_cache/done.bin").read_bytes())
    assert done == 4 * 4 and device.waits["training"]["copy to the host in TeacherCache.write"] == 2 * done
    _, device = run_on(where, cli, *command, name="second")
    check_waits(device, 4 * 4)
    assert log_of("first") == log_of("second")


@pytest.mark.parametrize("where, dtype", [("cuda", "float16"), ("mps", "float32")])
def test_a_run_goes_on_where_it_stopped_on_a_device(files, cli, monkeypatch, where, dtype):
    command = (*TRAIN, "--arch", "nanochat", "--optimizer", "muon", "--resid_pdrop", 0.1, "--dtype", dtype)
    run_on(where, cli, *command, name="whole")
    stop_at(monkeypatch, 2)
    with pretend(where):
        assert "stopped at step 2" in cli(*command, "--device", where, "--name", "parts").out
    _, device = run_on(where, cli, "train", "--resume", "true", name="parts")
    check_waits(device, 2 * 2)
    assert log_of("parts") == log_of("whole")


@pytest.mark.parametrize("where", DEVICES)
def test_a_step_without_a_finite_loss_is_skipped_on_a_device(files, plain, cli, monkeypatch, where):
    """MPS's fused AdamW does not ask whether to skip a step: weights stay finite all the same."""
    loss = model.language_modelling

    def broken(gpt, batch):
        value, parts = loss(gpt, batch)
        return value * (float("nan") if next(calls) == 1 else 1.0), parts

    for name in ("cpu", where):
        calls = iter(range(100))
        monkeypatch.setattr(model, "language_modelling", broken)
        run_on(name, cli, *TRAIN, "--dtype", "float32", "--eval_interval", 2)
    ours, theirs = log_of(where), log_of("cpu")
    assert [r["bad_step"] for r in ours if "bad_step" in r] == [2]
    assert ours == theirs if where == "cuda" else [r["val_loss"] for r in ours] == pytest.approx(
        [r["val_loss"] for r in theirs], rel=0.1)  # fmt: skip


FILTERS = (
    ("--temperature", 0), ("--temperature", 0, "--repetition_penalty", 1.3), ("--top_k", 5, "--min_p", 0),
    ("--top_p", 0.9), ("--min_p", 0.2), ("--repetition_penalty", 1.3, "--top_k", 9, "--top_p", 0.8),
)  # fmt: skip


@pytest.mark.parametrize("flags", FILTERS, ids=str)
def test_text_is_that_of_the_cpu_and_each_token_is_read_once(files, cli, flags):
    """20 tokens from a prompt beyond half of the context, so that the cache is filled anew on the way."""
    command = ("sample", "--model_checkpoint", "base.pt", "--prompt", "def long(x): # a", "--num_samples", 2,
               "--length", 20, "--dtype", "float32", *flags)  # fmt: skip
    expected, _ = run_on("cpu", cli, *command)
    for where in DEVICES:
        text, device = run_on(where, cli, *command)
        assert text == expected
        loading = {what: n for what, n in device.waits["preparing"].items() if "_apply" not in what}
        assert loading == {"copy to the device in left_pad": 1, "tolist in read_tokens": 20}


@pytest.mark.parametrize("where, arch, n_kv_head", [("cuda", "llama", 2), ("cuda", "gpt2", 4), ("mps", "gpt2", 4)])
def test_unequal_prompts_make_one_batch_on_a_device(where, arch, n_kv_head):
    gpt, prompts = random_gpt(tiny_config(arch, n_kv_head=n_kv_head)), [[1, 2, 3, 4, 5], [6], [7, 8]]
    s = model.SamplingSettings(repetition_penalty=1.2, top_k=20)
    expected = torch.stack(list(model.generate(gpt, prompts, 40, s, torch.Generator().manual_seed(1)))).tolist()
    with pretend(where) as device:
        gpt.to(where)
        tokens = list(model.generate(gpt, prompts, 40, s, torch.Generator(where).manual_seed(1)))
        assert device.waits["preparing"].pop("copy to the device in left_pad") == 2
        assert set(device.waits["preparing"]) == {"copy to the device in GPT._apply"}
        assert torch.stack(tokens).tolist() == expected


@pytest.mark.parametrize("arch, overrides", [("llama", dict(n_kv_head=2)), ("gpt2", {}), ("qwen3", {})])
def test_packed_documents_take_no_mask_on_a_gpu(arch, overrides):
    """The flash kernel takes them, and padding, by where each ends, from Ampere on and in 16 bits."""
    gpt, idx = random_gpt(tiny_config(arch, **overrides)), random_tokens(2, 25)
    documents, pad = torch.tensor([7, 1, 16, 13, 0, 11]), torch.tensor([5, 0])

    def computed(gpt: model.GPT, where: str, dtype: str = "float32") -> list[torch.Tensor]:
        model.set_precision(gpt, dtype, training=True).zero_grad()
        gpt.loss(*(x.to(where) for x in (idx[:, :-1], idx[:, 1:], documents))).backward()
        with torch.no_grad(), model.evaluating(gpt):
            prompt = gpt(idx.to(where), model.KVCache(gpt, 2, 30, pad.to(where)))
        return [x.to("cpu", copy=True) for x in (prompt[0, 5:], prompt[1], *(p.grad for p in gpt.parameters()))]

    plain, plain_short = computed(gpt, "cpu"), computed(gpt, "cpu", "bfloat16")
    with pretend("cuda") as device:
        short = computed(gpt.to("cuda"), "cuda", "bfloat16")
        assert device.launches["_varlen_attn"] == 2 * len(gpt.blocks) and not device.launches["tril"]
        model.set_precision(gpt, "float32", training=True)
        assert not gpt.flash_by_document
    assert mean_error(short, plain) <= 1.2 * mean_error(plain_short, plain)


def test_chat_and_eval_are_those_of_the_cpu(files, cli):
    bpe = model.train_bpe([Path("input.txt").read_text(encoding="utf-8")], 300)
    save_model("chatty.pt", random_gpt(tiny_config("llama", vocab_size=bpe.n_vocab, block_size=128)), bpe)
    chat = ("chat", "--model_checkpoint", "chatty.pt", "--length", 12, "--dtype", "float32")
    evaluate = ("eval", "--model_checkpoint", "base.pt", "--data", "text", "--json", "--dtype", "float32")
    for command, typed in ((chat, b"Hi\nWho?\n"), (evaluate, None)):
        on_cpu, on_cuda, on_mps = (run_on(where, cli, *command, stdin=typed)[0] for where in ("cpu", *DEVICES))
        assert on_cpu == on_cuda == on_mps


@pytest.mark.parametrize("where", DEVICES)
def test_the_gradient_through_a_large_vocabulary(where):
    """Its product with the head sums over the vocabulary, and over the tokens of a chunk: on some Macs not too many."""
    gpt, idx = random_gpt(tiny_config("llama", vocab_size=40_000, n_layer=1)), random_tokens(2, 9, vocab_size=40_000)
    found = []
    with pretend(where):
        for place in ("cpu", where):
            gpt.to(place).zero_grad()
            gpt.loss(*(x.to(place) for x in (idx[:, :-1], idx[:, 1:]))).backward()
            found.append([p.grad.to("cpu", copy=True) for p in gpt.parameters()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


def test_a_macs_micro_batch_is_bounded(files, cli):
    with pretend("mps"):
        error = cli(*TRAIN, "--device", "mps", "--batch_size", 2048, "--grad_accum", 1).error
    assert "2048 x 16 tokens" in error and "--grad_accum" in error


def test_a_macs_dropout_is_not_recomputed(files, cli):
    """PyTorch would drop other elements the second time."""
    with pretend("mps"):
        error = cli(*TRAIN, "--device", "mps", *DROPOUT, *RECOMPUTED).error
    assert "gradient_checkpointing and dropout" in error


@pytest.mark.parametrize("data, on", [("text", True), ("talks", False)])
def test_where_cudnns_attention_is_used(files, cli, monkeypatch, data, on):
    """In training without masks. It plans anew for each length, as generation has them."""
    found, loss = defaultdict(set), model.language_modelling

    def spy(gpt, batch):
        found[gpt.training].add(torch.backends.cuda.cudnn_sdp_enabled())
        return loss(gpt, batch)

    monkeypatch.setattr(model, "language_modelling", spy)
    run_on("cuda", cli, "finetune", "--model_checkpoint", "base.pt", "--data", data, "--block_size", 32, *STEPS)
    assert found == {True: {on}, False: {False}}
