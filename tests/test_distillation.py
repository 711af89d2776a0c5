"""Distillation: its losses and gradients against autograd in float64, its runs against `train` and against themselves,
and speculative decoding against the distribution it must not change."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, random_gpt, random_tokens, tiny_config, write_conversations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import Distillation, DistillConfig, DistillLoss, SamplingSettings

BYTES = 259  # tokens of the byte tokenizer
GREEDY = SamplingSettings(temperature=0)
DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0))]


# ---------------------------------------------------------------------------------------------------------------------
# Losses and gradients, in float64
# ---------------------------------------------------------------------------------------------------------------------


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def plain_divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float) -> torch.Tensor:
    """Of a teacher's log p and a student's log q, by torch's kl_div; a jsd's ends are the two KLs."""
    if kind == "forward_kl" or kind == "jsd" and beta == 0:
        return kl(log_p, log_q)
    if kind == "reverse_kl" or kind == "jsd" and beta == 1:
        return kl(log_q, log_p)
    log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def plain_loss(logits, targets, log_p: torch.Tensor, d: DistillConfig) -> torch.Tensor:
    """alpha T^2 divergence + (1 - alpha) cross-entropy, summed over the targets that count, of full logits."""
    n = log_p.size(-1)
    log_q = (logits[:, :n] / d.temperature).log_softmax(-1)
    value = plain_divergence(log_p, log_q, d.divergence, d.beta)[targets >= 0].sum()
    cross_entropy = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    return d.alpha * d.temperature**2 * value + (1 - d.alpha) * cross_entropy


def with_gradients(loss, h: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    """A loss and its gradients by the hidden states and the head, in that order."""
    return [loss.detach(), *torch.autograd.grad(loss, (h, weight))]


def assert_equal_float64(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> None:
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


class Case:
    """A head of 100 tokens, padded to 128, and 192 rows of hidden states, a fifth of which are not targets."""

    def __init__(self, teacher_vocab: int = 100, **config) -> None:
        self.gpt = random_gpt(tiny_config(**config)).double()
        self.n = min(teacher_vocab, 100)
        generator = torch.Generator().manual_seed(0)
        self.h = torch.randn(2, 96, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        self.teacher_logits = 2 * torch.randn(192, teacher_vocab, generator=generator, dtype=torch.float64)
        self.targets = random_tokens(192, vocab_size=self.n)
        self.targets[torch.rand(192, generator=generator) < 0.2] = -1

    def logits(self) -> torch.Tensor:
        cap, logits = self.gpt.config.logit_softcap, self.h.flatten(0, 1) @ self.gpt.head_weight[:100].T
        return cap * torch.tanh(logits / cap) if cap else logits

    def teacher(self, temperature: float) -> torch.Tensor:
        return (self.teacher_logits[:, : self.n] / temperature).log_softmax(-1)

    def ours(self, d: DistillConfig, teacher_logp) -> list[torch.Tensor]:
        objective = DistillLoss(d, self.targets.view(2, 96), teacher_logp, self.n)
        return with_gradients(model.linear_loss(self.h, self.gpt, objective), self.h, self.gpt.head_weight)

    def plain(self, d: DistillConfig) -> list[torch.Tensor]:
        loss = plain_loss(self.logits(), self.targets, self.teacher(d.temperature), d)
        return with_gradients(loss, self.h, self.gpt.head_weight)


def chunks_of(monkeypatch, rows: int) -> None:
    monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", rows * 128)  # of the padded vocabulary


@pytest.mark.parametrize("rows", [64, 80, 192], ids="chunks of {}".format)
@pytest.mark.parametrize("alpha, temperature", [(0.0, 2.0), (0.5, 2.0), (1.0, 1.0), (0.3, 0.5)])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_loss_and_gradients_equal_autograd(monkeypatch, kind, beta, alpha, temperature, rows):
    """Truth: plain PyTorch with full logits. 64 divides the 192 rows, 80 does not."""
    chunks_of(monkeypatch, rows)
    case, d = Case(), DistillConfig(temperature, alpha, kind, beta)
    log_p = case.teacher(temperature)
    assert_equal_float64(case.ours(d, lambda rows: log_p[rows]), case.plain(d))


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
@pytest.mark.parametrize(
    "variation",
    [
        {"logit_softcap": 5.0},
        {"tie_word_embeddings": False},
        {"teacher_vocab": 90},  # a student with tokens of its own
        {"teacher_vocab": 150},  # a teacher padded further than the student
        {"teacher_vocab": 90, "logit_softcap": 5.0, "tie_word_embeddings": False},
    ],
    ids=str,
)
def test_soft_cap_and_other_paddings_equal_autograd(monkeypatch, variation, kind, beta):
    """Truth: plain PyTorch. The divergence is over the tokens that both have."""
    chunks_of(monkeypatch, 80)
    case, d = Case(**variation), DistillConfig(2.0, 0.5, kind, beta)
    log_p = case.teacher(2.0)
    assert_equal_float64(case.ours(d, lambda rows: log_p[rows]), case.plain(d))


@pytest.mark.parametrize(
    "p, q, kind, beta, expected",
    [
        ((0.75, 0.25), (0.25, 0.75), "jsd", 0.5, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ((0.5, 0.5), (1.0, 0.0), "jsd", 0.25, 0.2034834),  # m = (7/8, 1/8): 0.25 * 0.4133393 + 0.75 * 0.1335314
        ((0.5, 0.5), (1.0, 0.0), "reverse_kl", 0.5, math.log(2)),
        ((1.0, 0.0), (0.5, 0.5), "forward_kl", 0.5, math.log(2)),
        ((0.75, 0.25), (0.5, 0.5), "forward_kl", 0.5, 0.1308120),
        ((0.3, 0.7), (0.3, 0.7), "jsd", 0.5, 0.0),
    ],
)
def test_divergence_of_two_coins(p, q, kind, beta, expected):
    """Truth: numbers worked out by hand, with outcomes that cannot happen among them."""
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    value, gradient = model.divergence(log_p, log_q, kind, beta, 1.0)
    assert value.item() == pytest.approx(expected, abs=1e-7)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("K", [1, 7, 99])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_the_tail_is_one_more_outcome(monkeypatch, kind, beta, K):
    """Truth: autograd through its plain definition, the K tokens' probabilities and one minus their sum."""
    chunks_of(monkeypatch, 80)
    case, d = Case(), DistillConfig(2.0, 0.5, kind, beta)
    p, index = case.teacher(2.0).exp().topk(K)
    log_p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), dim=1).log()
    ours = case.ours(d, lambda rows: (index[rows], log_p[rows]))

    logits = case.logits()
    q = (logits / 2.0).softmax(-1)
    top = q.gather(1, index)
    log_q = torch.cat((top, (q.sum(-1) - top.sum(-1))[:, None]), dim=1).log()
    value = plain_divergence(log_p, log_q, kind, beta)[case.targets >= 0].sum()
    cross_entropy = F.cross_entropy(logits, case.targets, ignore_index=-1, reduction="sum")
    plain = with_gradients(0.5 * 4.0 * value + 0.5 * cross_entropy, case.h, case.gpt.head_weight)
    assert_equal_float64(ours, plain)


def test_lumping_the_tail_never_raises_the_divergence():
    """Truth: the data-processing inequality, and that equal distributions have no divergence."""
    case = Case()
    q = case.teacher(1.0)
    for K, (kind, beta) in itertools.product((1, 10, 50), DIVERGENCES):
        d = DistillConfig(1.0, 1.0, kind, beta)
        full = DistillLoss(d, case.targets, lambda rows: q[rows], 100)
        log_p = case.teacher(3.0)
        top, index = log_p.topk(K)
        lumped = torch.cat((top, (1 - top.exp().sum(-1, keepdim=True)).log()), dim=1)
        value, _ = full.with_tail(q, index, lumped)
        assert (value <= plain_divergence(log_p, q, kind, beta) + 1e-12).all()
        same = torch.cat((q.gather(1, index), (1 - q.gather(1, index).exp().sum(-1, keepdim=True)).log()), dim=1)
        torch.testing.assert_close(
            full.with_tail(q, index, same)[0], torch.zeros(192, dtype=torch.float64), atol=1e-9, rtol=0
        )


# ---------------------------------------------------------------------------------------------------------------------
# The objective: teacher and student together
# ---------------------------------------------------------------------------------------------------------------------


def pair(**config) -> tuple[model.GPT, model.GPT]:
    return random_gpt(tiny_config(**config), 1), random_gpt(tiny_config(n_layer=1, **config), 2)


def batch_of(B: int = 4, T: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    rows = random_tokens(B, T + 1, seed=seed)
    return {"idx": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def loss_and_gradients(objective, student: model.GPT, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss = objective(student, batch)
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad.clone() for name, p in student.named_parameters()}}


def assert_close_all(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float) -> None:
    """Each tensor by its own largest element."""
    for name in a:
        error = (a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)
        assert error < rtol, (name, error)


@pytest.mark.parametrize("segments", [False, True], ids=["text", "packed documents"])
@pytest.mark.parametrize("teacher_vocab, teacher_cap", [(100, 0.0), (90, 0.0), (150, 5.0)])
def test_a_live_teacher_equals_two_plain_forward_passes(teacher_vocab, teacher_cap, segments):
    """Truth: both models' full logits, plain PyTorch, down to the gradients of every weight of the student."""
    teacher = random_gpt(tiny_config("nanochat", vocab_size=teacher_vocab, logit_softcap=teacher_cap), 1)
    student = random_gpt(tiny_config(n_layer=1), 2)
    n, batch, d = min(teacher_vocab, 100), batch_of(), DistillConfig(3.0, 0.7, "jsd", 0.3)
    batch = {k: v % n for k, v in batch.items()}
    if segments:
        batch["segments"] = (torch.arange(32) // 9).repeat(4, 1)
        batch["targets"][:, 8::9] = -1

    def plain(student, batch):
        with torch.no_grad():
            log_p = (teacher(batch["idx"], segments=batch.get("segments"))[..., :n] / d.temperature).log_softmax(-1)
        logits = student(batch["idx"], segments=batch.get("segments")).flatten(0, 1)
        return plain_loss(logits, batch["targets"].flatten(), log_p.flatten(0, 1), d)

    ours = loss_and_gradients(Distillation(teacher, d, n), student, batch)
    assert_close_all(ours, loss_and_gradients(plain, student, batch), 1e-5)
    assert all(p.grad is None for p in teacher.parameters())


class VocabularyRows(TorchDispatchMode):
    """The most rows of any tensor whose last dimension is a vocabulary, weights aside."""

    def __init__(self, widths: set[int]) -> None:
        super().__init__()
        self.widths, self.most = widths, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and x.dim() and x.size(-1) in self.widths:
                self.most = max(self.most, x.numel() // x.size(-1))
        return out


@pytest.mark.parametrize("B", [4, 16])
def test_full_logits_never_exist(monkeypatch, B):
    """Truth: every tensor that PyTorch makes in a step, forward and backward: none has more rows than a chunk."""
    monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", 64 * 192)
    teacher, student = pair(vocab_size=150)
    with VocabularyRows({150, 192}) as seen:
        loss_and_gradients(Distillation(teacher, DistillConfig(), 150), student, batch_of(B))
    assert seen.most == 64


def test_dropout_and_mode_of_the_models():
    """The teacher never drops anything; the student, in training, does."""
    teacher, student = pair(resid_pdrop=0.5)
    objective = Distillation(teacher.train(), DistillConfig(alpha=1.0), 100)
    assert not teacher.training
    losses = {objective(student.eval(), batch_of()).item() for _ in range(2)}
    assert len(losses) == 1
    assert len(losses | {objective(student.train(), batch_of()).item() for _ in range(2)}) == 3


def test_the_log_gets_the_parts_per_target():
    """Truth: loss = alpha T^2 divergence + (1 - alpha) cross-entropy, over batches of different numbers of targets."""
    teacher, student = pair()
    d, total, n = DistillConfig(2.0, 0.3), 0.0, 0
    objective = Distillation(teacher, d, 100)
    for seed in range(3):
        batch = batch_of(seed=seed)
        batch["targets"][:, : 10 * seed] = -1
        total += objective(student, batch).item()
        n += int((batch["targets"] >= 0).sum())
    parts = objective.take_parts()
    assert 0.3 * 4 * parts["divergence"] + 0.7 * parts["cross_entropy"] == pytest.approx(total / n, rel=1e-5)
    assert objective.take_parts() == {"divergence": 0.0, "cross_entropy": 0.0}  # taken


# ---------------------------------------------------------------------------------------------------------------------
# On-policy: what the student writes
# ---------------------------------------------------------------------------------------------------------------------


def on_policy_batch(objective: Distillation, student: model.GPT, batch: dict) -> tuple[torch.Tensor, dict]:
    """The loss of a batch, and the batch that the student wrote for it."""
    written, original = [], objective.student_writes
    objective.student_writes = lambda *args: written.append(original(*args)) or written[-1]
    loss = objective(student, batch)
    return loss, written[0]


@pytest.mark.parametrize("T", [32, 31])
def test_the_second_half_is_the_students_own(T):
    """Truth: a student so sure of itself that drawing is taking the most likely token, one full pass per token."""
    teacher, student = pair(tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight *= 1e6
    batch, keep = batch_of(T=T), T // 2
    _, written = on_policy_batch(Distillation(teacher, DistillConfig(on_policy=1.0), 100), student.train(), batch)
    assert student.training and not written["idx"].is_inference()
    ids = batch["idx"][:, :keep]
    while ids.size(1) <= T:
        ids = torch.cat((ids, student(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(written["idx"], ids[:, :-1])
    assert torch.equal(written["targets"][:, keep - 1 :], ids[:, keep:])
    assert (written["targets"][:, : keep - 1] == -1).all()
    assert not torch.equal(written["idx"], batch["idx"])


def test_the_students_text_differs_from_draw_to_draw():
    teacher, student = pair()
    objective = Distillation(teacher, DistillConfig(on_policy=1.0), 100)
    batch = batch_of(B=8)
    first, second = (objective.student_writes(student, batch)["idx"] for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first[:, :16], second[:, :16])
    assert len({tuple(row) for row in first[:, 16:].tolist()}) == 8


@pytest.mark.parametrize("kind, beta", [("forward_kl", 0.5), ("jsd", 0.9)])
def test_an_on_policy_batch_is_scored_by_the_teacher_alone(kind, beta):
    """Truth: the plain divergence at the student's own tokens, with nothing of the cross-entropy, whatever alpha is."""
    teacher, student = pair()
    d = DistillConfig(2.0, 0.3, kind, beta, on_policy=1.0)
    objective = Distillation(teacher, d, 100)
    loss, written = on_policy_batch(objective, student, batch_of())
    with torch.no_grad():
        log_p, log_q = ((m(written["idx"]) / 2.0).log_softmax(-1) for m in (teacher, student))
    value = plain_divergence(log_p, log_q, kind, beta)[:, 15:]
    assert objective.take_parts()["divergence"] == pytest.approx(value.mean().item(), rel=1e-5)
    # the caller divides by the targets of the data, and the student wrote about half as many
    assert loss.item() / written["idx"].numel() == pytest.approx(4 * value.mean().item(), rel=1e-5)


def test_on_policy_is_a_fraction_of_the_batches(monkeypatch):
    """Truth: the binomial distribution: 400 draws at 0.25 lie within 100 +- 4 standard deviations of 8.7."""
    teacher, student = pair()
    objective, written = Distillation(teacher, DistillConfig(on_policy=0.25), 100), []
    monkeypatch.setattr(objective, "student_writes", lambda student, batch: written.append(1) or batch)
    torch.manual_seed(0)
    for _ in range(400):
        objective(student, batch_of(1, 2))
    assert 65 <= len(written) <= 135


# ---------------------------------------------------------------------------------------------------------------------
# The teacher's cache
# ---------------------------------------------------------------------------------------------------------------------

META = {"teacher": "a1", "data": "b2", "temperature": 2.0, "block_size": 32, "top_k": 8, "format_version": 1}


def cached_objective(folder: Path, teacher: model.GPT, d: DistillConfig, K: int, n_blocks: int = 8) -> Distillation:
    return Distillation(teacher, d, 100, model.TeacherCache(folder, META, n_blocks, 32, K))


def count_rows(teacher: model.GPT, monkeypatch) -> list[int]:
    """How many rows the teacher reads, call by call."""
    rows, original = [], teacher.hidden
    monkeypatch.setattr(teacher, "hidden", lambda idx, **kw: rows.append(len(idx)) or original(idx, **kw))
    return rows


def with_blocks(batch: dict, *blocks: int) -> dict:
    return {**batch, "blocks": torch.tensor(blocks)}


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_a_cache_of_the_whole_vocabulary_is_the_live_teacher(tmp_path, kind, beta):
    """Truth: the live teacher, up to float16's rounding of its probabilities (0.05% each)."""
    teacher, student = pair()
    with torch.no_grad():
        teacher.wte.weight *= 0.3  # no probability so small that float16 loses it
        student.wte.weight *= 0.3
    d, batch = DistillConfig(2.0, 0.7, kind, beta), batch_of()
    live = loss_and_gradients(Distillation(teacher, d, 100), student, batch)
    objective = cached_objective(tmp_path / "cache", teacher, d, 100)
    for _ in range(2):  # the run that fills it, and one that reads it
        cached = loss_and_gradients(objective, student, with_blocks(batch, 3, 0, 5, 7))
        assert_close_all(cached, live, 3e-3)


def test_the_cache_holds_the_teachers_most_likely_tokens(tmp_path):
    """Truth: the softmax of the teacher's logits at the temperature, sorted; and files of the documented layout."""
    teacher, student = pair()
    batch = batch_of()
    cached_objective(tmp_path / "c", teacher, DistillConfig(2.0), 8)(student, with_blocks(batch, 6, 1, 2, 4))
    ids = np.fromfile(tmp_path / "c" / "ids.bin", "<u4").reshape(8, 32, 8)
    probs = np.fromfile(tmp_path / "c" / "probs.bin", "<f2").reshape(8, 32, 8)
    assert np.fromfile(tmp_path / "c" / "done.bin", "u1").tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    with torch.no_grad():
        expected = (teacher(batch["idx"]) / 2.0).softmax(-1).topk(8)
    assert np.array_equal(ids[[6, 1, 2, 4]], expected.indices.numpy())
    np.testing.assert_allclose(probs[[6, 1, 2, 4]], expected.values.numpy(), rtol=1e-3)


def test_a_cache_goes_on_where_it_was_left(tmp_path, monkeypatch):
    """Truth: the rows that the teacher reads: each block once, in this process and in the next, in any order."""
    teacher, student = pair()
    rows, d, batch = count_rows(teacher, monkeypatch), DistillConfig(2.0), batch_of()
    objective = cached_objective(tmp_path / "c", teacher, d, 8)
    first = objective(student, with_blocks(batch, 0, 1, 2, 3)).item()
    swapped = {k: v[[1, 0]] for k, v in batch.items()}
    objective(student, with_blocks(swapped, 1, 5))  # one of the two is new
    assert rows == [4, 1]
    again = cached_objective(tmp_path / "c", teacher, d, 8)
    assert again(student, with_blocks(batch, 0, 1, 2, 3)).item() == first
    backwards = {k: v.flip(0) for k, v in batch.items()}
    assert again(student, with_blocks(backwards, 3, 2, 1, 0)).item() == pytest.approx(first, rel=1e-5)
    assert rows == [4, 1]


@pytest.mark.parametrize(
    "key, value", [("teacher", "z9"), ("data", "z9"), ("temperature", 1.0), ("block_size", 16), ("top_k", 4)]
)
def test_a_cache_of_something_else_is_refused_by_name(tmp_path, key, value):
    model.TeacherCache(tmp_path / "c", META, 8, 32, 8)
    with pytest.raises(model.UserError, match=f"another {key.replace('_', ' ')}") as e:
        model.TeacherCache(tmp_path / "c", {**META, key: value}, 8, 32, 8)
    assert str(META[key]) in str(e.value) and str(value) in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Runs of the command line
# ---------------------------------------------------------------------------------------------------------------------

STUDENT = ("--student_variant", "7M", *TINY_RUN, "--sample_interval", -1)
TEACHER = ("--variant", "7M", *TINY_RUN, "--n_embd", 64, "--batch_size", 16, "--sample_interval", -1)
DROPOUT = ("--resid_pdrop", 0.1, "--embd_pdrop", 0.1, "--attn_pdrop", 0.1)


def save_model(path: str, gpt: model.GPT, tokenizer: model.Tokenizer | None = None) -> str:
    tokenizer = tokenizer or model.byte_tokenizer()
    content = {"config": model.asdict(gpt.config), "model": gpt.state_dict(), "tokenizer": tokenizer.spec}
    model.save_checkpoint(Path(path), content)
    return path


def byte_gpt(seed: int = 1, **config) -> model.GPT:
    """A small model of bytes; its logits are mild, as a trained model's are."""
    gpt = random_gpt(tiny_config(**{"vocab_size": BYTES, "n_embd": 64, **config}), seed)
    with torch.no_grad():
        gpt.head_weight.mul_(0.5)
    return gpt


@pytest.fixture
def distill(cli, text_file):
    """distill(*flags): a run of a tiny student after the teacher in teacher.pt, on text in data/text."""
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    save_model("teacher.pt", byte_gpt())
    return lambda *flags: cli("distill", "--teacher_model_path", "teacher.pt", "--data", "text", *flags)


def weights_of(name: str, last: bool = True) -> dict[str, torch.Tensor]:
    return torch.load(f"checkpoints/{name}_model{'_last' if last else ''}.pt", weights_only=True)["model"]


def log_of(name: str) -> list[dict]:
    records = [json.loads(line) for line in Path(f"checkpoints/{name}_model.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_s")} for r in records]


def assert_same_weights(a: str, b: str) -> None:
    for last in (True, False):
        first, second = weights_of(a, last), weights_of(b, last)
        assert first.keys() == second.keys()
        assert not [k for k in first if not torch.equal(first[k], second[k])]


@pytest.mark.parametrize("flags", [DROPOUT, ("--grad_accum", 2), ("--arch", "llama", "--seed", 7)], ids=str)
def test_alpha_0_is_train_bit_for_bit(distill, cli, flags):
    """Truth: `train` itself, of the same variant with the same seed: weights, and every number of its log."""
    run = ("--max_iters", 6, "--log_interval", 2, "--eval_interval", 4, *flags)
    distill(*STUDENT, *run, "--alpha", 0, "--name", "distilled").ok()
    cli("train", "--variant", "7M", *STUDENT[2:], *run, "--data", "text", "--name", "trained").ok()
    assert_same_weights("distilled", "trained")
    ours, theirs = log_of("distilled"), log_of("trained")
    assert [{k: r[k] for k in t} for r, t in zip(ours, theirs, strict=True)] == theirs


RUNS = {
    "forward KL with dropout": DROPOUT,
    "jsd in micro-batches": ("--divergence", "jsd", "--beta", 0.3, "--grad_accum", 2, *DROPOUT),
    "cached teacher": ("--cache_teacher", 8, *DROPOUT),
    "on-policy": ("--on_policy", 0.5, *DROPOUT),
    "half the teacher's layers": ("--init_from_teacher", "--n_embd", 64, "--n_head", 4, "--n_layer", 1),
}


def stop_at(monkeypatch, step: int) -> None:
    """Send this process Ctrl-C, once, while this step is being computed."""
    original, calls = model.train_step, []

    def train_step(*args):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(model, "train_step", train_step)


def whole_and_in_parts(distill, monkeypatch, *flags) -> None:
    """A run of nine steps, and the same run stopped at the fourth and resumed."""
    run = (*STUDENT, "--max_iters", 9, "--log_interval", 3, "--eval_interval", 6, *flags, "--name")
    distill(*run, "whole").ok()
    stop_at(monkeypatch, 4)
    assert "stopped at step 4" in distill(*run, "parts").out
    assert "step 4" in distill("--resume", "--name", "parts").ok().out


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_run_never_stopped(distill, monkeypatch, flags):
    """Truth: the uninterrupted run, bit for bit."""
    whole_and_in_parts(distill, monkeypatch, *flags)
    assert_same_weights("whole", "parts")
    assert [r["loss"] for r in log_of("whole")] == [r["loss"] for r in log_of("parts")]


def test_a_resumed_run_has_the_same_log(distill, monkeypatch):
    """Truth: the uninterrupted run's log: a record's parts of the loss are from before the stop and after it."""
    whole_and_in_parts(distill, monkeypatch)
    assert log_of("parts") == log_of("whole")


@pytest.mark.parametrize(
    "change", [("--alpha", 0.9), ("--temperature", 3.0), ("--divergence", "jsd"), ("--on_policy", 1.0)]
)
def test_resume_does_not_take_other_settings_of_the_loss(distill, change):
    distill(*STUDENT, "--max_iters", 2, "--name", "run").ok()
    error = distill("--resume", "--max_iters", 4, "--name", "run", *change).error
    assert change[0] in error


def test_resume_does_not_take_another_teacher(distill, cli):
    distill(*STUDENT, "--max_iters", 2, "--name", "run").ok()
    save_model("other.pt", byte_gpt(seed=5))
    resume = ("--resume", "--max_iters", 4, "--name", "run", "--data", "text")
    assert "teacher" in cli("distill", "--teacher_model_path", "other.pt", *resume).error


def test_resume_notices_a_teacher_that_was_replaced(distill):
    distill(*STUDENT, "--max_iters", 2, "--name", "run").ok()
    save_model("teacher.pt", byte_gpt(seed=5))
    assert "teacher.pt" in distill("--resume", "--max_iters", 4, "--name", "run").error


def test_the_students_own_text_is_not_for_conversations(distill, cli):
    write_conversations(Path("data/talks"), [([72, 105, 10] * 8, [0, 1, 1] * 8)] * 20)
    run = (*STUDENT, "--max_iters", 2, "--on_policy", 0.5)
    error = cli("distill", "--teacher_model_path", "teacher.pt", "--data", "talks", *run).error
    assert "--on_policy" in error and "conversations" in error


def test_a_teacher_cache_opened_twice_keeps_what_is_in_it(workdir, monkeypatch):
    """As by two processes that start at once: the second had looked for the files before the first made them."""
    meta, ids = {"teacher": "x"}, torch.arange(8).view(4, 2)
    first = model.TeacherCache(workdir / "cache", meta, 3, 4, 2)
    first.write(1, ids, torch.ones(4, 2))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    second = model.TeacherCache(workdir / "cache", meta, 3, 4, 2)
    assert second.done.tolist() == [0, 1, 0] and (second.ids[1] == ids.numpy()).all()


@pytest.mark.parametrize(
    "flags, scale, rest",
    [
        (("--alpha", 0.3, "--temperature", 3.0), 0.3 * 9, 0.7),
        (("--alpha", 1.0), 4, 0),
        (("--alpha", 0.0), 0, 1),
        (("--on_policy", 1.0), 4, 0),  # the student's own text has no cross-entropy
    ],
    ids=str,
)
def test_the_log_shows_the_parts_of_the_loss(distill, flags, scale, rest):
    """Truth: in each record the parts make up the loss."""
    distill(*STUDENT, "--max_iters", 6, "--log_interval", 2, "--eval_interval", 6, *flags, "--name", "run").ok()
    records = log_of("run")
    assert [r["step"] for r in records] == [2, 4, 6]
    for r in records:
        assert r["loss"] == pytest.approx(scale * r["divergence"] + rest * r["cross_entropy"], rel=1e-4)


def test_an_evaluation_between_records_has_the_parts_too(distill):
    """Truth: as above, in the record that an evaluation makes, and in the one after it."""
    distill(*STUDENT, "--max_iters", 4, "--log_interval", 2, "--eval_interval", 3, "--name", "run").ok()
    records = log_of("run")
    assert [r["step"] for r in records] == [2, 3, 4]
    for r in records:
        assert r["loss"] == pytest.approx(2 * r["divergence"] + 0.5 * r["cross_entropy"], rel=1e-4)


def test_the_cross_entropy_of_the_log_is_per_token_of_the_data(distill):
    """Truth: a student that knows nothing yet is at ln 259, however many batches it wrote itself meanwhile."""
    run = ("--max_iters", 6, "--log_interval", 6, "--eval_interval", 6, "--on_policy", 0.5, "--name", "run")
    distill(*STUDENT, *run).ok()
    assert log_of("run")[0]["cross_entropy"] == pytest.approx(math.log(BYTES), rel=0.1)


def test_micro_batches_add_up_to_the_batch(distill):
    """Truth: the batch in one piece, within float32's rounding."""
    run = (*STUDENT, "--max_iters", 4, "--log_interval", 1, "--name")
    distill(*run, "whole").ok()
    distill(*run, "parts", "--grad_accum", 4).ok()
    for a, b in zip(log_of("whole"), log_of("parts"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("flags", [(), ("--cache_teacher", 64)], ids=str)
def test_two_processes_equal_one(distill, flags):
    """Truth: the run of one process: the log, the parts of the loss in it, and the teacher's cache."""
    run = (*STUDENT, "--max_iters", 3, "--log_interval", 1, *flags)
    distill(*run, "--name", "one").ok()
    cached = {p.name: p.read_bytes() for p in Path("data/text").glob("teacher_cache/*")}
    for path in Path("data/text").glob("teacher_cache/*"):
        path.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", model.__file__]
    command += ["distill", "--teacher_model_path", "teacher.pt", "--data", "text", *map(str, run), "--name", "two"]
    two = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert two.returncode == 0, two.stderr
    for a, b in zip(log_of("one"), log_of("two"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert {p.name: p.read_bytes() for p in Path("data/text").glob("teacher_cache/*")} == cached


def test_a_student_becomes_its_teacher(distill):
    """Truth: a teacher of noise, which the text says nothing about: only by listening does the student get close."""
    run = ("--n_embd", 64, "--n_head", 4, "--max_iters", 240, "--learning_rate", 1e-2, "--alpha", 1, "--name", "run")
    distill(*STUDENT, *run).ok()
    first, *_, last = [r["divergence"] for r in log_of("run") if "divergence" in r]
    assert last < 0.45 * first


def test_cached_and_live_teacher_train_alike(distill, cli):
    """Truth: the live run, within 1% all along the curve; and the second run reads the cache instead of the teacher."""
    cli("train", *TEACHER, "--data", "text", "--max_iters", 150, "--learning_rate", 3e-3, "--name", "teacher").ok()
    run = (*STUDENT, "--max_iters", 20, "--log_interval", 2, "--teacher_model_path", "teacher_model.pt", "--name")
    distill(*run, "live").ok()
    out = distill(*run, "cached", "--cache_teacher", 64).ok().out
    live, cached = ([r["loss"] for r in log_of(name)] for name in ("live", "cached"))
    assert cached == pytest.approx(live, rel=0.01)
    folder = Path("data/text/teacher_cache")
    size = sum((folder / name).stat().st_size for name in ("ids.bin", "probs.bin"))
    assert f"{size / 1e6:,.1f} MB" in out and str(folder) in out
    done = np.fromfile(folder / "done.bin", "u1")
    assert done.sum() == min(20 * 4, len(done))


def test_the_second_student_does_not_run_the_teacher(distill, monkeypatch):
    """Truth: the teacher's passes in a second run over the same blocks, counted: none."""
    run = (*STUDENT, "--max_iters", 4, "--cache_teacher", 8, "--name")
    distill(*run, "first").ok()
    monkeypatch.setattr(Distillation, "live", lambda *args: pytest.fail("the teacher was run"))
    assert "MB when full" not in distill(*run, "second").ok().out
    assert_same_weights("first", "second")


@pytest.mark.parametrize("flags, named", [(("--temperature", 3), "temperature"), (("--block_size", 8), "block size"),
                                          (("--cache_teacher", 4), "top k")])  # fmt: skip
def test_a_run_refuses_the_cache_of_another(distill, flags, named):
    run = (*STUDENT, "--max_iters", 1, "--cache_teacher", 8)
    distill(*run, "--name", "first").ok()
    error = distill(*run, *flags, "--name", "second").error
    assert f"another {named}" in error and "teacher_cache" in error


def test_a_run_refuses_the_cache_of_another_teacher_or_data(distill, text_file):
    run = (*STUDENT, "--max_iters", 1, "--cache_teacher", 8, "--name")
    distill(*run, "first").ok()
    save_model("teacher.pt", byte_gpt(seed=9))
    assert "another teacher" in distill(*run, "second").error
    save_model("teacher.pt", byte_gpt())
    text_file.write_text(text_file.read_text() + "and more.")
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte", overwrite=True)
    assert "another data" in distill(*run, "second").error


def test_the_published_command(cli, text_file):
    """The command as the issue prints it, on a local teacher of the 120M shape; one step instead of thousands."""
    model.tokenize_text(Path("data/NAME"), [str(text_file)], "byte")
    torch.manual_seed(0)
    save_model("checkpoints/120M_model.pt", model.GPT(model.make_config("120M", BYTES, {})))
    published = "distill --teacher_model_path checkpoints/120M_model.pt --teacher_variant 120M --student_variant 7M "
    published += "--data data/NAME/data.bin --temperature 2.0 --alpha 0.5"
    out = cli(*published.split(), "--max_iters", 1, "--batch_size", 2, "--eval_tokens", 256).ok().out
    assert "teacher checkpoints/120M_model.pt" in out and "alpha 0.5, temperature 2.0, forward_kl" in out
    config = torch.load("checkpoints/distilled_7M_model.pt", weights_only=True)["config"]
    assert (config["n_layer"], config["n_embd"], config["block_size"]) == (4, 128, 128)
    assert "distilled_7M_model.pt" in cli("sample", "--length", 5, "--prompt", "a").ok().err


def test_a_text_file_is_tokenized_as_the_teacher_does(cli, text_file):
    """`--data FILE` needs no tokenize before it: its tokenizer is the teacher's."""
    bpe = model.train_bpe([text_file.read_text()], 300)
    save_model("teacher.pt", byte_gpt(vocab_size=300), bpe)
    cli("distill", "--teacher_model_path", "teacher.pt", *STUDENT, "--data", text_file, "--max_iters", 1).ok()
    checkpoint = torch.load("checkpoints/distilled_7M_model.pt", weights_only=True)
    assert model.Tokenizer(checkpoint["tokenizer"]).digest == bpe.digest


def test_a_teacher_from_a_hugging_face_directory(distill, cli):
    """An exported teacher is the teacher: the same run to the last bit."""
    cli("export", "--model_path", "teacher.pt", "--output_dir", "hf_teacher", "--dtype", "float32").ok()
    run = (*STUDENT, "--max_iters", 3, "--data", "text", "--name")
    distill(*run, "ours").ok()
    cli("distill", "--teacher_model_path", "hf_teacher", *run, "theirs").ok()
    assert_same_weights("ours", "theirs")


# ---------------------------------------------------------------------------------------------------------------------
# Where a student starts
# ---------------------------------------------------------------------------------------------------------------------


def layers_of(teacher: model.GPT, student: model.GPT) -> list[int]:
    """Which of the teacher's layers each layer of the student is, by content."""
    found = []
    for block in student.blocks:
        ours = block.state_dict()
        same = [
            i for i, b in enumerate(teacher.blocks) if all(torch.equal(ours[k], v) for k, v in b.state_dict().items())
        ]
        found += same or [-1]
    return found


@pytest.mark.parametrize("arch", ["gpt2", "llama", "nanochat"])
@pytest.mark.parametrize("n_teacher, n_student", [(12, 6), (8, 4), (6, 2), (5, 5), (7, 3), (4, 1)])
def test_every_kth_layer(arch, n_teacher, n_student):
    """Truth: evenly spread, first and last kept; a student of equal depth is the teacher."""
    teacher = random_gpt(tiny_config(arch, n_layer=n_teacher, n_embd=16), 1)
    student = random_gpt(tiny_config(arch, n_layer=n_student, n_embd=16), 2)
    model.every_kth_layer(teacher, student)
    chosen = layers_of(teacher, student)
    assert chosen[0] == 0 and len(chosen) == n_student
    if n_student > 1:
        assert chosen[-1] == n_teacher - 1
        gaps = np.diff(chosen)
        assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1
    if n_teacher == n_student:
        idx = random_tokens(2, 20)
        assert torch.equal(teacher(idx), student(idx))


def test_a_student_of_the_teachers_layers_has_a_smaller_table(distill):
    """Fewer positions and a vocabulary without the teacher's padding: the rows they share are the teacher's."""
    teacher, student = byte_gpt(block_size=64), byte_gpt(2, n_layer=1, block_size=32)
    model.every_kth_layer(teacher, student)
    assert torch.equal(student.wpe.weight, teacher.wpe.weight[:32])
    teacher, student = byte_gpt(vocab_size=400), byte_gpt(2, n_layer=1)
    model.every_kth_layer(teacher, student)
    assert torch.equal(student.wte.weight, teacher.wte.weight[:320])


def test_init_from_teacher_without_a_variant_halves_the_depth(distill):
    run = ("--dtype", "float32", "--device", "cpu", "--max_iters", 1, "--batch_size", 2, "--eval_tokens", 64)
    distill("--init_from_teacher", *run, "--learning_rate", 1e-9, "--sample_interval", -1, "--name", "half").ok()
    checkpoint = torch.load("checkpoints/half_model.pt", weights_only=True)
    assert checkpoint["config"]["n_layer"] == 1 and checkpoint["config"]["n_embd"] == 64
    torch.testing.assert_close(checkpoint["model"]["wte.weight"], byte_gpt().wte.weight.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "arch, change",
    [
        ("gpt2", {"n_embd": 16}),
        ("gpt2", {"n_embd": 64}),
        ("gpt2", {"n_inner": 64}),
        ("gpt2", {"n_inner": 256}),
        ("gpt2", {"n_head": 2}),  # every shape agrees, and no head does
        ("llama", {"n_kv_head": 2}),  # the student's values would be the teacher's keys
        ("llama", {"n_kv_head": 4, "n_head": 8}),
        ("qwen3", {"head_dim": 4}),
    ],
    ids=str,
)
def test_layers_of_other_widths_are_refused(arch, change):
    teacher, student = random_gpt(tiny_config(arch)), random_gpt(tiny_config(arch, **{"n_layer": 1, **change}))
    with pytest.raises(model.UserError, match="widths must agree"):
        model.every_kth_layer(teacher, student)


def test_layers_of_another_architecture_are_refused(distill):
    error = distill(*STUDENT, "--n_embd", 64, "--n_head", 4, "--arch", "qwen3", "--init_from_teacher").error
    assert "--init_from_teacher" in error and "teacher" in error


def test_a_student_can_start_from_a_checkpoint(distill):
    """Truth: with a rate of next to nothing, what comes out is what went in."""
    start = byte_gpt(3, n_layer=1)
    save_model("student.pt", start)
    run = (*TINY_RUN[8:], "--block_size", 16, "--batch_size", 2, "--max_iters", 1, "--learning_rate", 1e-9)
    distill("--student_checkpoint", "student.pt", *run, "--name", "run").ok()
    for name, tensor in start.state_dict().items():
        torch.testing.assert_close(weights_of("run")[name], tensor, atol=1e-6, rtol=0)


def test_a_student_checkpoint_takes_dropout_and_nothing_of_a_new_shape(distill):
    """No flag is silently ignored: what can change does, and what cannot is an error that names it."""
    save_model("student.pt", byte_gpt(3, n_layer=1))
    run = ("--student_checkpoint", "student.pt", *TINY_RUN[8:], "--batch_size", 2, "--max_iters", 1, "--name")
    distill(*run, "dropout", "--resid_pdrop", 0.5).ok()
    assert torch.load("checkpoints/dropout_model.pt", weights_only=True)["config"]["resid_pdrop"] == 0.5
    for flags in (("--n_layer", 5), ("--arch", "llama"), ("--student_variant", "7M"), ("--init_from_teacher",)):
        assert flags[0] in distill(*run, "refused", *flags).error


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, value", [
    ("alpha", -0.1), ("alpha", 1.1), ("alpha", "nan"), ("temperature", 0), ("temperature", -1), ("temperature", "nan"),
    ("temperature", "inf"), ("beta", 2), ("on_policy", 1.5), ("cache_teacher", -1),
])  # fmt: skip
def test_settings_out_of_range(cli, flag, value):
    """Refused by name before anything is opened: there is no teacher here."""
    error = cli("distill", "--teacher_model_path", "nowhere.pt", f"--{flag}", value).error
    assert error.startswith(f"{flag} is") and "must be" in error


@pytest.mark.parametrize("flags, words", [
    (("--cache_teacher", 8, "--on_policy", 0.5), ["cache_teacher", "on_policy"]),
    (("--cache_teacher", 300), ["cache_teacher is 300", "259"]),
    (("--block_size", 64), ["teacher's context is 32", "block is 64", "--block_size"]),
    (("--divergence", "euclid"), ["--divergence", "forward_kl"]),
    (("--data", "nothing"), ["nothing", "text"]),
])  # fmt: skip
def test_bad_combinations(distill, flags, words):
    error = distill(*STUDENT, *flags).error
    assert all(word in error for word in words), error


def test_a_student_must_be_named(distill):
    error = distill().error
    assert "--student_variant" in error and "--student_checkpoint" in error and "--init_from_teacher" in error


def last_line(result) -> str:
    """The error after a word on what was tried, checked."""
    assert result.code == 1 and "Traceback" not in result.err
    return result.err.strip().splitlines()[-1].split(": error: ")[1]


@pytest.mark.parametrize("path", ["nowhere.pt", "./nowhere", "checkpoints/nowhere", "nowhere"])
def test_an_unreachable_teacher(distill, cli, path):
    """A path that leads nowhere is no hub id: nothing is fetched."""
    Path("checkpoints").mkdir()
    result = cli("distill", "--teacher_model_path", path, "--data", "text", *STUDENT)
    assert path in result.error and "hub" not in result.err.lower()


def test_an_unreachable_hub(distill, cli):
    """The tests are offline."""
    distill = ("distill", "--data", "text", *STUDENT, "--teacher_model_path")
    assert "no-such-owner/no-such-model" in last_line(cli(*distill, "no-such-owner/no-such-model"))
    assert "openai-community/gpt2" in last_line(cli(*distill, "hf", "--teacher_variant", "120M"))
    error = cli(*distill, "hf").error
    assert "--teacher_variant" in error and "120M" in error


def test_a_student_checkpoint_smaller_than_the_block(distill):
    save_model("student.pt", byte_gpt(3, n_layer=1, block_size=16))
    error = distill("--student_checkpoint", "student.pt", "--block_size", 32, "--batch_size", 2, "--max_iters", 1).error
    assert "student" in error and "--block_size" in error


def test_a_student_checkpoint_of_another_tokenizer(distill):
    save_model("student.pt", byte_gpt(), model.train_bpe(["some text"], BYTES))
    error = distill("--student_checkpoint", "student.pt").error
    assert "byte (259 tokens)" in error and "bpe-259 (259 tokens)" in error


def test_a_larger_student_is_warned_about(distill):
    larger = distill(*STUDENT, "--n_embd", 128, "--max_iters", 1, "--name", "larger").ok()
    smaller = distill(*STUDENT, "--max_iters", 1, "--name", "smaller").ok()
    assert "warning: the student" in larger.err and "larger than the teacher" in larger.err
    assert "warning" not in smaller.err


def test_a_teacher_of_another_variant(distill):
    """As everywhere else, a variant that is named is checked."""
    error = distill(*STUDENT, "--teacher_variant", "120M", "--max_iters", 1).error
    assert "teacher.pt" in error and "120M" in error and "n_layer" in error


def swapped_bytes(a: int, b: int) -> model.Tokenizer:
    """The bytes as a bpe, with two of its tokens in each other's place."""
    tokens = [bytes([i]) for i in range(256)]
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return model.with_special_tokens("bpe", "swapped", tokens)


@pytest.mark.parametrize("other", [
    pytest.param(lambda: swapped_bytes(65, 66), id="letters swapped"),
    pytest.param(lambda: swapped_bytes(0xC3, 0xE2), id="bytes swapped that are no characters alone"),
    pytest.param(lambda: model.train_bpe(["a"], BYTES), id="another order"),
])  # fmt: skip
def test_a_vocabulary_of_the_same_size_is_not_the_same(distill, other):
    """Refused by content: both tokenizers are named, and what makes matching data."""
    other = other()
    assert other.n_vocab == BYTES
    save_model("teacher.pt", byte_gpt(), other)
    error = distill(*STUDENT, "--max_iters", 1).error
    assert other.describe() in error and "byte (259 tokens)" in error and "tokenize --tokenizer teacher.pt" in error


def test_the_same_vocabulary_under_another_name_and_padding(distill, cli):
    """Accepted by content: a Hugging Face form of the same tokens, and a teacher with more rows than tokens."""
    save_model("wide.pt", byte_gpt(vocab_size=300))
    cli("export", "--model_path", "wide.pt", "--output_dir", "exported", "--dtype", "float32").ok()
    assert model.hf_tokenizer(Path("exported")).digest != model.byte_tokenizer().digest
    cli("distill", "--teacher_model_path", "exported", *STUDENT, "--data", "text", "--max_iters", 1).ok()


def test_matching_data_is_made_with_the_teachers_tokenizer(cli, text_file):
    """The remedy that the error names works."""
    bpe = model.train_bpe([text_file.read_text()], 300)
    save_model("teacher.pt", byte_gpt(vocab_size=300), bpe)
    cli("tokenize", "--dataset", "match", "--txt", text_file, "--tokenizer", "teacher.pt").ok()
    cli("distill", "--teacher_model_path", "teacher.pt", *STUDENT, "--data", "match", "--max_iters", 1).ok()


# ---------------------------------------------------------------------------------------------------------------------
# Speculative decoding
# ---------------------------------------------------------------------------------------------------------------------


def four_token_gpt(seed: int) -> model.GPT:
    return random_gpt(tiny_config(vocab_size=4, n_layer=1, n_head=1, n_embd=16, block_size=16), seed)


def chi_squared_p_value(observed: list[float], expected: list[float]) -> float:
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def settings_by_hand(logits: torch.Tensor, s: SamplingSettings) -> torch.Tensor:
    """The distribution over the next token, (B, vocab)."""
    logits = logits.double() / s.temperature
    if s.top_k:
        logits[logits < logits.sort(-1, descending=True).values[:, s.top_k - 1 : s.top_k]] = -math.inf
    return logits.softmax(-1)


@pytest.mark.parametrize("settings, n_draft, n_samples", [
    (SamplingSettings(), 2, 10_000),
    (SamplingSettings(temperature=0.7, top_k=3), 4, 3_000),
], ids=["plain", "temperature and top_k"])  # fmt: skip
def test_speculation_leaves_the_distribution_alone(settings, n_draft, n_samples):
    """Truth: the exact probability of each of the 64 sequences of three tokens under the teacher, by enumeration."""
    teacher, draft = four_token_gpt(1), four_token_gpt(2)
    sequences = torch.tensor(list(itertools.product(range(4), repeat=3)))
    exact = torch.ones(64, dtype=torch.float64)
    distance = 0.0
    for i in range(3):
        rows = torch.cat((torch.zeros(64, 1, dtype=torch.int64), sequences[:, :i]), dim=1)
        with torch.no_grad():
            p, q = (settings_by_hand(m(rows)[:, -1], settings) for m in (teacher, draft))
        exact *= p.gather(1, sequences[:, i : i + 1])[:, 0]
        distance += (p - q).abs().sum(-1).mean().item() / 6
    assert 0.1 < distance < 0.9  # the draft is wrong often enough for the test to mean something

    generator, counts, stats = torch.Generator().manual_seed(0), torch.zeros(64), {}
    for _ in range(n_samples):
        a, b, c = model.speculative_generate(teacher, draft, stats, [[0]], 3, settings, generator, n_draft)
        counts[16 * int(a) + 4 * int(b) + int(c)] += 1
    assert counts[exact == 0].sum() == 0
    likely = exact * n_samples >= 5  # the chi-squared test's condition; the rest as one class
    observed = [*counts[likely].tolist(), counts[~likely].sum().item()]
    expected = [*(exact[likely] * n_samples).tolist(), exact[~likely].sum().item() * n_samples]
    if expected[-1] < 1e-9:
        observed, expected = observed[:-1], expected[:-1]
    assert chi_squared_p_value(observed, expected) > 1e-3


@pytest.mark.parametrize("length", [1, 2, 9, 25])
@pytest.mark.parametrize("n_draft", [1, 3, 7])
@pytest.mark.parametrize("arch", ["gpt2", "llama", "nanochat"])
def test_greedy_speculation_is_greedy(arch, n_draft, length):
    """Truth: generate, by the teacher alone."""
    teacher, draft = (random_gpt(tiny_config(arch, n_layer=n, block_size=64), n) for n in (2, 1))
    prompts, stats = random_tokens(1, 5).tolist(), {}
    alone = [int(t) for t in model.generate(teacher, prompts, length, GREEDY)]
    together = model.speculative_generate(teacher, draft, stats, prompts, length, GREEDY, n_draft=n_draft)
    assert [int(t) for t in together] == alone


def test_a_repetition_penalty_is_the_same_with_a_draft():
    teacher, draft = (random_gpt(tiny_config(n_layer=n, block_size=64), n) for n in (2, 1))
    settings = SamplingSettings(temperature=0, repetition_penalty=9.0)
    alone = [int(t) for t in model.generate(teacher, [[1, 2, 3]], 30, settings)]
    assert [int(t) for t in model.speculative_generate(teacher, draft, {}, [[1, 2, 3]], 30, settings)] == alone
    assert alone != [int(t) for t in model.generate(teacher, [[1, 2, 3]], 30, GREEDY)]


def opposite(gpt: model.GPT) -> model.GPT:
    """The model whose most likely token is the other's least likely one."""
    other = random_gpt(gpt.config)
    other.load_state_dict(gpt.state_dict())
    with torch.no_grad():
        other.lm_head.weight.neg_()
    return other


@pytest.mark.parametrize("draft, expected", [
    (lambda teacher: teacher, {"proposed": 10, "accepted": 10}),  # 4 + 1, then two proposals more: 6 + 1
    (opposite, {"proposed": 4 + 3 + 2 + 8 * 1 + 0, "accepted": 0}),  # one token a pass, each round one proposal less
], ids=["itself", "opposite"])  # fmt: skip
def test_acceptance_is_counted(draft, expected):
    """Truth: counted by hand for the draft that is always right and the one that never is."""
    teacher = random_gpt(tiny_config(tie_word_embeddings=False))
    stats: dict[str, int] = {}
    tokens = list(model.speculative_generate(teacher, draft(teacher), stats, [[1]], 12, GREEDY, n_draft=4))
    assert len(tokens) == 12 and stats == expected


@pytest.fixture
def saved_pair(workdir):
    save_model("teacher.pt", byte_gpt(1, block_size=64))
    save_model("draft.pt", byte_gpt(2, n_layer=1, block_size=64))
    return ("sample", "--model_checkpoint", "teacher.pt", "--prompt", "def ", "--device", "cpu", "--dtype", "float32")


@pytest.mark.parametrize("settings", [("--temperature", 0), ("--temperature", 0, "--stop", "\x07")], ids=str)
def test_sample_with_a_draft(cli, saved_pair, settings):
    alone = cli(*saved_pair, *settings, "--length", 40).ok()
    together = cli(*saved_pair, *settings, "--length", 40, "--draft_checkpoint", "draft.pt").ok()
    assert together.out == alone.out and "accepted" not in alone.err
    accepted, proposed = (int(w) for w in together.err.split() if w.isdigit())
    assert "drafted tokens" in together.err and 0 <= accepted <= proposed and proposed > 0


@pytest.mark.parametrize("flags, words", [
    (("--num_samples", 2), ["--draft_checkpoint", "--num_samples"]),
    (("--length", 60), ["context", "--length"]),
], ids=str)  # fmt: skip
def test_a_draft_asks_too_much(cli, saved_pair, flags, words):
    error = cli(*saved_pair, "--draft_checkpoint", "draft.pt", *flags).error
    assert all(word in error for word in words), error


def test_a_draft_with_another_tokenizer(cli, saved_pair):
    save_model("draft.pt", byte_gpt(), swapped_bytes(65, 66))
    error = cli(*saved_pair, "--draft_checkpoint", "draft.pt", "--length", 5).error
    assert "swapped (259 tokens)" in error and "byte (259 tokens)" in error
