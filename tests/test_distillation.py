"""Distillation: its losses and gradients against autograd in float64, its runs against `train` and each other."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    N_BYTES,
    TINY_RUN,
    Torchrun,
    assert_same_weights,
    byte_gpt,
    checkpoint_of,
    contents,
    log_of,
    random_gpt,
    random_tokens,
    save_model,
    stop_at,
    tiny_config,
    write_conversations,
)  # fmt: skip
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model
from model import Distillation, DistillConfig

DIVERGENCES = [("forward_kl", 0.5), ("reverse_kl", 0.5), *(("jsd", beta) for beta in (0.0, 0.1, 0.5, 0.9, 1.0))]


# --- Losses and gradients, in float64


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


def plain_parts(logits, targets, log_p: torch.Tensor, d: DistillConfig, index=None) -> list[torch.Tensor]:
    """Divergence and cross-entropy of full logits, summed. With an index, log_p is of these tokens and of any other."""
    q = (logits[:, : 100 if index is not None else log_p.size(-1)] / d.temperature).softmax(-1)
    if index is not None:
        top = q.gather(1, index)
        q = torch.cat((top, (q.sum(-1) - top.sum(-1))[:, None]), dim=1)
    value = plain_divergence(log_p, q.log(), d.divergence, d.beta)[targets >= 0].sum()
    return [value, F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")]


def total(parts, d: DistillConfig):
    return d.alpha * d.temperature**2 * parts[0] + (1 - d.alpha) * parts[1]


class Case:
    """A head of 100 tokens, padded to 128, and 192 rows of hidden states, a fifth of which are not targets."""

    def __init__(self, monkeypatch, chunk: int, teacher_vocab: int = 100, **config) -> None:
        monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", chunk * 128)  # of the padded vocabulary
        self.gpt = random_gpt(tiny_config(**config)).double()
        self.n = min(teacher_vocab, 100)
        generator = torch.Generator().manual_seed(0)
        self.h = torch.randn(2, 96, 32, generator=generator, dtype=torch.float64, requires_grad=True)
        self.teacher_logits = 2 * torch.randn(192, teacher_vocab, generator=generator, dtype=torch.float64)
        self.targets = random_tokens(192, vocab_size=self.n)
        self.targets[torch.rand(192, generator=generator) < 0.2] = -1

    def check(self, d: DistillConfig, K: int = 0) -> None:
        """Ours equals plain PyTorch with full logits: the loss, its parts, its gradients by hidden states and head.
        With K: of the teacher's K likeliest tokens and, as one more outcome, all others."""
        log_p, index = (self.teacher_logits[:, : self.n] / d.temperature).log_softmax(-1), None
        if K:
            p, index = log_p.exp().topk(K)
            log_p = torch.cat((p, 1 - p.sum(-1, keepdim=True)), dim=1).log()
        sums, by = torch.zeros(2, dtype=torch.float64), (self.h, self.gpt.head_weight)
        objective = Distillation(torch.nn.Identity(), d, self.n)
        teacher = (lambda rows: log_p[rows]) if index is None else lambda rows: (index[rows], log_p[rows])
        chunk_loss = objective.chunk_loss(d, self.targets.view(2, 96), teacher, sums)
        loss = model.linear_loss(self.h, self.gpt, chunk_loss)
        ours = [loss.detach(), *sums.clone(), *torch.autograd.grad(loss, by)]
        assert model.linear_loss(self.h.detach(), self.gpt.requires_grad_(False), chunk_loss).item() == loss.item()

        self.gpt.requires_grad_(True)
        cap, logits = self.gpt.config.logit_softcap, self.h.flatten(0, 1) @ self.gpt.head_weight[:100].T
        parts = plain_parts(cap * torch.tanh(logits / cap) if cap else logits, self.targets, log_p, d, index)
        loss = total(parts, d)
        plain = [loss, parts[0], parts[1] * (d.alpha < 1), *torch.autograd.grad(loss, by)]
        for a, b in zip(ours, plain, strict=True):
            torch.testing.assert_close(a, b.detach(), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind, beta", DIVERGENCES)
@pytest.mark.parametrize("alpha, temperature, chunk, variation, K", [
    *((*weights, chunk, {}, 0) for weights in ((0.0, 2.0), (0.5, 2.0), (1.0, 1.0), (0.3, 0.5)) for chunk in (64, 192)),
    *((0.5, 2.0, 80, variation, 0) for variation in (  # 80 does not divide the 192 rows
        {}, {"logit_softcap": 5.0}, {"tie_word_embeddings": False},
        {"teacher_vocab": 90},  # a student with tokens of its own: the divergence is over those that both have
        {"teacher_vocab": 150},  # a teacher padded further than the student
        {"teacher_vocab": 90, "logit_softcap": 5.0, "tie_word_embeddings": False},
    )),
    *((0.5, 2.0, 80, {}, K) for K in (1, 7, 99)),
])  # fmt: skip
def test_loss_and_gradients_equal_autograd(monkeypatch, kind, beta, alpha, temperature, chunk, variation, K):
    Case(monkeypatch, chunk, **variation).check(DistillConfig(temperature, alpha, kind, beta), K)


def test_small_gradients_of_float16_are_kept():
    """At a high temperature each is less than float16 can hold, until it is squared in. Truth: float64."""
    generator, rows = torch.Generator().manual_seed(0), slice(0, 4)
    student = torch.randn(4, 20_000, generator=generator).half()
    teacher = (student.double() + 0.5 * torch.randn(4, 20_000, generator=generator)) / 20
    objective = Distillation(torch.nn.Identity(), DistillConfig(20.0, 1.0), 20_000)

    def grad(logits: torch.Tensor) -> torch.Tensor:
        chunk_loss = objective.chunk_loss(objective.d, torch.zeros(4), lambda rows: teacher, torch.zeros(2))
        return chunk_loss(logits, rows, True)[1].double()

    truth = grad(student.double())
    assert (grad(student.clone()) - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("K", [0, 7])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
def test_the_divergence_is_one_graph(monkeypatch, kind, K):
    """What torch.compile sees of it, and of its gradient, has no break: fullgraph raises at one. 80 rows, then 32."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.divergence_loss, dynamic=False, fullgraph=True, backend=compiler)
    monkeypatch.setattr(model, "divergence_loss", compiled)
    Case(monkeypatch, 80).check(DistillConfig(2.0, 0.5, kind), K)
    assert compiler.frame_count == 4  # both sizes, with the gradient and without


@pytest.mark.parametrize("p, q, kind, beta, expected", [
    ((0.5, 0.5), (1.0, 0.0), "jsd", 0.25, 0.2034834),  # m = (7/8, 1/8): 0.25 * 0.4133393 + 0.75 * 0.1335314
    ((0.5, 0.5), (1.0, 0.0), "reverse_kl", 0.5, math.log(2)),
    ((1.0, 0.0), (0.5, 0.5), "forward_kl", 0.5, math.log(2)),
])  # fmt: skip
def test_divergence_of_coins_with_one_side(p, q, kind, beta, expected):
    """Truth: numbers worked out by hand. What cannot happen makes neither them nor their gradient infinite."""
    log_p, log_q = (torch.tensor([x], dtype=torch.float64).log() for x in (p, q))
    value = model.divergence(log_p, log_q.requires_grad_(), DistillConfig(divergence=kind, beta=beta).skew)
    assert value.item() == pytest.approx(expected, abs=1e-7)
    assert torch.autograd.grad(value, log_q)[0].isfinite().all()


# --- The objective: teacher and student together


def pair(**config) -> tuple[model.GPT, model.GPT]:
    return random_gpt(tiny_config(**config), 1), random_gpt(tiny_config(n_layer=1, **config), 2)


def batch_of(B: int = 4, T: int = 32, seed: int = 0) -> dict[str, torch.Tensor]:
    rows = random_tokens(B, T + 1, seed=seed)
    return {"idx": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}


def loss_and_gradients(objective, student: model.GPT, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss, parts = objective(student, batch)
    loss.backward()
    return {"loss": loss.detach(), **parts, **{name: p.grad.clone() for name, p in student.named_parameters()}}


def assert_close_all(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], rtol: float) -> None:
    """Each tensor by its own largest element."""
    assert a.keys() == b.keys()
    for name in a:
        error = (a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)
        assert error < rtol, (name, error)


@pytest.mark.parametrize("packed", [False, True], ids=["text", "packed documents"])
@pytest.mark.parametrize("teacher_vocab, teacher_cap", [(100, 0.0), (90, 0.0), (150, 5.0)])
def test_a_live_teacher_equals_two_plain_forward_passes(teacher_vocab, teacher_cap, packed):
    """Truth: full logits in plain PyTorch: gradients of every weight, the loss's parts and their numbers of targets."""
    teacher = random_gpt(tiny_config("nanochat", vocab_size=teacher_vocab, logit_softcap=teacher_cap), 1)
    student = random_gpt(tiny_config(n_layer=1), 2)
    n, batch, d = min(teacher_vocab, 100), batch_of(), DistillConfig(3.0, 0.7, "jsd", 0.3)
    batch = {k: v % n for k, v in batch.items()}
    if packed:
        batch["documents"] = torch.tensor([9, 9, 9, 5] * 4)
        batch["targets"][:, 8::9] = -1

    def plain(student, batch):
        with torch.no_grad():
            log_p = (teacher(batch["idx"], documents=batch.get("documents"))[..., :n] / d.temperature).log_softmax(-1)
        logits = student(batch["idx"], documents=batch.get("documents")).flatten(0, 1)
        parts = plain_parts(logits, batch["targets"].flatten(), log_p.flatten(0, 1), d)
        pairs = [torch.stack((x.detach(), (batch["targets"] >= 0).sum())) for x in parts]
        return total(parts, d), dict(zip(("divergence", "cross_entropy"), pairs, strict=True))

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


def test_full_logits_never_exist(monkeypatch):
    """Truth: every tensor that PyTorch makes in a step, forward and backward: none has more rows than a chunk."""
    monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", 64 * 192)
    teacher, student = pair(vocab_size=150)
    with VocabularyRows({150, 192}) as seen:
        loss_and_gradients(Distillation(teacher, DistillConfig(), 150), student, batch_of(16))
    assert seen.most == 64


def test_dropout_and_mode_of_the_models():
    """The teacher never drops anything; the student, in training, does."""
    teacher, student = pair(resid_pdrop=0.5)
    objective = Distillation(teacher.train(), DistillConfig(alpha=1.0), 100)
    losses = {objective(student.eval(), batch_of())[0].item() for _ in range(2)}
    assert len(losses) == 1
    assert len(losses | {objective(student.train(), batch_of())[0].item() for _ in range(2)}) == 3


# --- On-policy: what the student writes


@pytest.mark.parametrize("T", [32, 31, 1])
def test_the_second_half_is_the_students_own(T):
    """Truth: the likeliest tokens, by full passes of a student that is sure. A block of one token is all prompt."""
    teacher, student = pair(tie_word_embeddings=False)
    with torch.no_grad():
        student.lm_head.weight *= 1e6
    batch, keep = batch_of(T=T), T // 2 or 1
    written = Distillation(teacher, DistillConfig(on_policy=1.0), 100).student_writes(student.train(), batch)
    assert student.training and not written["idx"].is_inference()
    ids = batch["idx"][:, :keep]
    while ids.size(1) <= T:
        ids = torch.cat((ids, student(ids)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(written["idx"], ids[:, :-1])
    assert torch.equal(written["targets"][:, keep - 1 :], ids[:, keep:])
    assert (written["targets"][:, : keep - 1] == -1).all()
    assert torch.equal(written["idx"], batch["idx"]) == (T == 1)


def test_the_students_text_is_drawn_from_its_own_distribution():
    """Truth: one token is as likely as all others: half of 272, +- 4 standard deviations of 8.2; each draw anew."""
    teacher, student = pair(tie_word_embeddings=False)
    with torch.no_grad():
        for p in (student.norm_f.weight, student.norm_f.bias, student.lm_head.weight):
            p.zero_()
        student.norm_f.bias[0], student.lm_head.weight[7, 0] = 1.0, math.log(99)
    objective = Distillation(teacher, DistillConfig(on_policy=1.0), 100)
    first, second = (objective.student_writes(student, batch_of(16))["targets"][:, 15:] for _ in range(2))
    assert len({tuple(row) for row in (*first.tolist(), *second.tolist())}) == 32
    assert 136 - 33 <= (first == 7).sum() <= 136 + 33


@pytest.mark.parametrize("kind, beta", [("forward_kl", 0.5), ("jsd", 0.9)])
def test_an_on_policy_batch_is_scored_by_the_teacher_alone(monkeypatch, kind, beta):
    """Truth: the plain divergence at the student's own tokens, with nothing of the cross-entropy, whatever alpha is."""
    teacher, student = pair()
    objective, batch = Distillation(teacher, DistillConfig(2.0, 0.3, kind, beta, on_policy=1.0), 100), batch_of()
    written = objective.student_writes(student, batch)
    monkeypatch.setattr(objective, "student_writes", lambda *args: written)
    loss, parts = objective(student, batch)
    with torch.no_grad():
        log_p, log_q = ((m(written["idx"]) / 2.0).log_softmax(-1) for m in (teacher, student))
    value = plain_divergence(log_p, log_q, kind, beta)[:, 15:]
    assert parts["divergence"].tolist() == pytest.approx([value.sum().item(), value.numel()], rel=1e-5)
    assert parts["cross_entropy"].tolist() == [0, 0]
    # the caller divides by the targets of the data, and the student wrote about half as many
    assert loss.item() / batch["idx"].numel() == pytest.approx(4 * value.mean().item(), rel=1e-5)


def test_on_policy_is_a_fraction_of_the_steps(monkeypatch):
    """Truth: 400 draws at 0.25 are 100 +- 4 standard deviations of 8.7. All processes and micro-batches draw alike."""
    teacher, student = pair()
    objective, written = Distillation(teacher, DistillConfig(on_policy=0.25), 100), []
    monkeypatch.setattr(objective, "student_writes", lambda student, batch: written.append(seed) or batch)
    monkeypatch.setattr(objective, "teacher_answers", lambda batch: None)
    monkeypatch.setattr(student, "loss", lambda *args: torch.zeros(()))  # the models have no say in it
    for step in range(400):
        for rank in (0, 1, 1023):
            torch.manual_seed(seed := (1337 * 1_000_003 + step) * 4096 + rank)  # as fit does
            for _ in range(2):
                objective(student, batch_of(1, 2))
                torch.rand(3 + rank % 5)
    steps = [seed // 4096 for seed in written]
    assert 65 <= len(set(steps)) <= 135
    assert [steps.count(step) for step in set(steps)] == [6] * len(set(steps))


# --- The teacher's cache


def cached_objective(folder: Path, teacher: model.GPT, K: int, *divergence, alpha: float = 0.5) -> Distillation:
    """At temperature 2, over eight blocks of 32 tokens."""
    cache = model.TeacherCache(folder, {}, 8, 32, K, 100)
    return Distillation(teacher, DistillConfig(2.0, alpha, *divergence), 100, cache)


def with_blocks(batch: dict, *blocks: int) -> dict:
    return {**batch, "blocks": torch.tensor(blocks)}


@pytest.mark.parametrize("packed", [False, True], ids=["text", "packed documents"])
@pytest.mark.parametrize("kind, beta", DIVERGENCES)
def test_a_cache_of_the_whole_vocabulary_is_the_live_teacher(tmp_path, kind, beta, packed):
    """Truth: the live teacher, up to the rounding of its probabilities (half of a 127th of their span)."""
    teacher, student = pair()
    with torch.no_grad():
        teacher.wte.weight *= 0.3
        student.wte.weight *= 0.3
    batch = batch_of() | ({"documents": torch.tensor([32, 9, 23, 0, 5, 5, 22, 31, 1])} if packed else {})
    live = loss_and_gradients(Distillation(teacher, DistillConfig(2.0, 0.7, kind, beta), 100), student, batch)
    objective = cached_objective(tmp_path / "cache", teacher, 100, kind, beta, alpha=0.7)
    objective(student, {"idx": batch["idx"][:1], "targets": batch["targets"][:1], "blocks": torch.tensor([3])})
    for _ in range(2):  # the run that fills the rest of it, and one that reads it
        cached = loss_and_gradients(objective, student, with_blocks(batch, 3, 0, 5, 7))
        assert_close_all(cached, live, 3e-3)


def test_the_cache_holds_the_teachers_most_likely_tokens(tmp_path):
    """Truth: the softmax of the teacher's logits at the temperature, sorted."""
    teacher, student = pair()
    batch = batch_of()
    cached_objective(tmp_path, teacher, 8)(student, with_blocks(batch, 6, 1, 2, 4))
    cache = model.TeacherCache(tmp_path, {}, 8, 32, 8, 100)
    assert cache.done.tolist() == [0, 1, 1, 0, 1, 0, 1, 0]
    with torch.no_grad():
        expected = (teacher(batch["idx"]) / 2.0).softmax(-1).topk(8)
    ids, log_p = cache.read([6, 1, 2, 4])
    order = expected.indices.flatten(0, 1).sort(dim=1)
    assert torch.equal(ids, order.values)
    truth = expected.values.flatten(0, 1).gather(1, order.indices)
    tail, span = 1 - truth.sum(1), (truth.max(1).values / truth.min(1).values).log()
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(128))
    assert ((log_p[:, 8].exp() / (1 - log_p[:, 8].exp()) * (1 - tail) / tail).log().abs() < 1 / 16 + 1e-4).all()
    relative = log_p[:, :8] - log_p[:, :8].amax(1, keepdim=True) - (truth / truth.amax(1, keepdim=True)).log()
    assert (relative.abs().max(1).values < (span + 0.25) / 127 / 2 + 1e-4).all()  # half of a 127th of the span


def test_the_layout_of_a_position_in_the_cache(tmp_path):
    """Truth: a position written out by hand, bit by bit. With 64 of GPT-2's tokens it has 150 bytes."""
    cache = model.TeacherCache(tmp_path, {}, 1, 1, 2, 16)  # 16 / 2 tokens: three low bits, and one high
    cache.write(0, torch.tensor([[13, 6]]), torch.tensor([[math.log(0.4), math.log(0.1)]]))
    low, high = "110" + "101", "1" + "0" + "1"  # of 6 = 0|110 and 13 = 1|101: a one for each, a zero between
    span = math.ceil(4 * math.log(4))  # quarters of a nat
    below = [round(math.log(4) * 127 * 4 / span), 0]
    bits = low + high + "".join(f"{x:07b}" for x in below) + f"{span - 1:06b}" + f"{8 * 12:08b}"  # as likely as not
    assert "".join(f"{byte:08b}" for byte in (tmp_path / "answers.bin").read_bytes()) == bits.ljust(40, "0")
    assert cache.read([0])[0].tolist() == [[6, 13]]
    assert cache.read([0])[1].exp()[0].tolist() == pytest.approx([0.1, 0.4, 0.5], rel=0.01)
    for n_vocab in (49_152, 50_259):
        cache = model.TeacherCache(tmp_path / str(n_vocab), {}, 1, 1, 64, n_vocab)
        ids = torch.randperm(n_vocab, generator=torch.Generator().manual_seed(1))[None, :64]
        cache.write(0, ids, torch.full((1, 64), -9.0))  # nearly all of the probability lies elsewhere
        assert torch.equal(cache.read([0])[0], ids.sort(dim=1).values)
        assert cache.read([0])[1].exp()[0, :64].tolist() == pytest.approx([math.exp(-9)] * 64, rel=0.07)
        assert (tmp_path / str(n_vocab) / "answers.bin").stat().st_size == 150


def test_a_damaged_cache_is_told(tmp_path):
    """As a machine that lost its power leaves it: the mark is there, and the answers are not, or are of another file,
    or with ids that the vocabulary lacks. What is not a number is not stored."""
    cache = model.TeacherCache(tmp_path, {}, 2, 4, 8, 100)
    cache.done[1] = 1
    ids, log_p = torch.arange(8).expand(4, 8), torch.full((4, 8), -3.0)
    model.TeacherCache(tmp_path / "other", {}, 2, 4, 8, 120).write(1, ids + 112, log_p)
    for answers in (0, 255, np.fromfile(tmp_path / "other/answers.bin", np.uint8).reshape(2, 4, -1)[1, :, :15]):
        cache.answers[1] = answers
        with pytest.raises(model.UserError, match="is damaged: delete it"):
            cache.read([1])
    with pytest.raises(model.UserError, match="not numbers"):
        cache.write(0, ids, log_p.clone().fill_(math.nan))
    assert not cache.done[0]
    for meta in ("[1]", '"text"', "7"):
        (tmp_path / "meta.json").write_text(meta)
        with pytest.raises(model.UserError, match="is damaged: delete it"):
            model.TeacherCache(tmp_path, {}, 2, 4, 8, 100)


def test_a_cache_goes_on_where_it_was_left(tmp_path, monkeypatch):
    """Truth: the rows that the teacher reads: each block once, in this process and in the next, in any order."""
    teacher, student = pair()
    rows, original, batch = [], teacher.hidden, batch_of()
    monkeypatch.setattr(teacher, "hidden", lambda idx, **kw: rows.append(len(idx)) or original(idx, **kw))
    objective = cached_objective(tmp_path / "c", teacher, 8)
    first = objective(student, with_blocks(batch, 0, 1, 2, 3))[0].item()
    objective(student, with_blocks({k: v[[1, 0]] for k, v in batch.items()}, 1, 5))  # one of the two is new
    assert rows == [4, 1]
    again = cached_objective(tmp_path / "c", teacher, 8)
    assert again(student, with_blocks(batch, 0, 1, 2, 3))[0].item() == first
    backwards = with_blocks({k: v.flip(0) for k, v in batch.items()}, 3, 2, 1, 0)
    assert again(student, backwards)[0].item() == pytest.approx(first, rel=1e-5)
    assert rows == [4, 1]


def test_a_teacher_cache_opened_twice_keeps_what_is_in_it(tmp_path, monkeypatch):
    """As by two processes that start at once: the second had looked for the files before the first made them."""
    meta, ids = {"teacher": "x"}, torch.arange(8).view(4, 2)
    first = model.TeacherCache(tmp_path / "cache", meta, 3, 4, 2, 100)
    first.write(1, ids, torch.full((4, 2), -1.0))
    monkeypatch.setattr(Path, "exists", lambda path: False)
    second = model.TeacherCache(tmp_path / "cache", meta, 3, 4, 2, 100)
    assert second.done.tolist() == [0, 1, 0] and torch.equal(second.read([1])[0], ids)


# --- Runs of the command line

STUDENT = ("--student_variant", "7M", *TINY_RUN, "--sample_interval", -1)
DROPOUT = ("--resid_pdrop", 0.1, "--embd_pdrop", 0.1, "--attn_pdrop", 0.1)


def mild_gpt(seed: int = 1, **config) -> model.GPT:
    """A small model of bytes; its logits are mild, as a trained model's are."""
    gpt = byte_gpt(seed=seed, **{"n_embd": 64, **config})
    with torch.no_grad():
        gpt.head_weight.mul_(0.5)
    return gpt


@pytest.fixture
def distill(cli, text_file):
    """distill(*flags): a run of a tiny student after the teacher in teacher.pt, on text in data/text."""
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    save_model("teacher.pt", mild_gpt())
    data = ("--data", "text")  # given twice it would be a mixture
    return lambda *flags: cli("distill", "--teacher_model_path", "teacher.pt", *data * ("--data" not in flags), *flags)


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


@pytest.mark.parametrize("flags", RUNS.values(), ids=RUNS)
def test_a_resumed_run_is_the_run_never_stopped(distill, monkeypatch, flags):
    """Bit for bit, and in its log, where the parts of a record's loss are from before the stop and after it."""
    run = (*STUDENT, "--max_iters", 9, "--log_interval", 3, "--eval_interval", 6, *flags, "--name")
    distill(*run, "whole").ok()
    stop_at(monkeypatch, 4)
    assert "stopped at step 4" in distill(*run, "parts").out
    assert "step 4" in distill("--resume", "--name", "parts").ok().out
    assert_same_weights("whole", "parts")
    assert log_of("parts") == log_of("whole")


def test_resume_takes_no_other_settings_teacher_or_data(distill, cli, text_file):
    distill(*STUDENT, "--max_iters", 2, "--name", "run").ok()
    resume = ("--resume", "--max_iters", 4, "--name", "run")
    changes = [("--alpha", 0.9), ("--temperature", 3.0), ("--divergence", "jsd"), ("--on_policy", 1.0)]
    for change in (*changes, ("--student_variant", "26M"), ("--student_checkpoint", "student.pt")):
        assert f"{change[0]} differs" in distill(*resume, *change).error
    save_model("other.pt", mild_gpt(seed=5))
    assert "--teacher_model_path differs" in distill(*resume, "--teacher_model_path", "other.pt").error
    text_file.write_text(text_file.read_text()[::-1])
    model.tokenize_text(Path("data/other"), [str(text_file)], "byte")
    distill(*resume, "--data", "other").fails_with("data/other", "data/text")
    Path("other.pt").replace("teacher.pt")
    assert "teacher.pt" in distill(*resume).error
    assert checkpoint_of("run")["step"] == 2


def test_a_run_that_is_resumed_knows_its_teacher(distill, cli):
    """As the sentence of a stopped run says it, and that of a teacher whose path is written otherwise: leave it out."""
    distill(*STUDENT, "--max_iters", 2, "--name", "run").ok()
    resume = ("distill", "--resume", "--max_iters", 4, "--name", "run")
    cli(*resume, "--teacher_model_path", "./teacher.pt").fails_with("--teacher_model_path differs", "leave it out")
    cli(*resume).ok()
    assert checkpoint_of("run")["step"] == 4
    cli("distill", "--resume", "--name", "none").fails_with("nothing to resume")
    for flags in ((), ("--resume", "auto"), ("--resume", "false")):
        cli("distill", *STUDENT, *flags, "--name", "new").fails_with("--teacher_model_path is required")


def test_the_students_own_text_is_not_for_conversations(distill):
    write_conversations(Path("data/talks"), [([72, 105, 10] * 8, [0, 1, 1] * 8)] * 20)
    distill(*STUDENT, "--on_policy", 0.5, "--data", "talks").fails_with("--on_policy", "conversations")


@pytest.mark.parametrize("flags, scale, rest", [
    (("--alpha", 0.3, "--temperature", 3.0), 0.3 * 9, 0.7),
    (("--alpha", 1.0), 4, 0),
    (("--alpha", 0.0), 0, 1),
    (("--on_policy", 1.0), 4, 0),  # the student's own text has no cross-entropy
], ids=str)  # fmt: skip
def test_the_log_shows_the_parts_of_the_loss(distill, flags, scale, rest):
    """Truth: in each record the parts make up the loss, also in one that an evaluation makes, and after it."""
    distill(*STUDENT, "--max_iters", 6, "--log_interval", 2, "--eval_interval", 3, *flags, "--name", "run").ok()
    assert [r["step"] for r in log_of("run")] == [2, 3, 4, 6]
    for r in log_of("run"):
        assert r["loss"] == pytest.approx(scale * r["divergence"] + rest * r["cross_entropy"], rel=1e-4)


def test_two_processes_equal_one(distill):
    """In the log, the parts of the loss, and the teacher's cache, which the two make, as they make the data."""
    run = (*STUDENT, "--max_iters", 3, "--log_interval", 1, "--cache_teacher", 64)
    distill(*run, "--name", "one").ok()
    cached = contents("data/text/teacher_cache").values()
    shutil.rmtree("data")
    shutil.move("input.txt", "text.txt")
    two = ("--data", "text.txt", *run, "--grad_accum", 2, "--name", "two")
    Torchrun("distill", "--teacher_model_path", "teacher.pt", *two).result().ok()
    for a, b in zip(log_of("one"), log_of("two"), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    assert sorted(contents("data/text_byte/teacher_cache").values()) == sorted(cached)


@pytest.mark.parametrize("name", ["run_model.pt", "run_model_last.pt"])
def test_a_student_does_not_replace_its_teacher(distill, name):
    Path("checkpoints").mkdir()
    teacher = shutil.copy("teacher.pt", f"checkpoints/{name}")
    before = Path(teacher).read_bytes()
    flags = ("--max_iters", 1, "--overwrite", "--teacher_model_path", name)
    distill(*STUDENT, *flags, "--name", "run").fails_with(name, "choose another --name")
    assert Path(teacher).read_bytes() == before
    distill(*STUDENT, *flags, "--name", "other").ok()


def test_a_student_becomes_its_teacher(distill):
    """Truth: a teacher of noise, which the text says nothing about: only by listening does the student get close."""
    shape, rates = ("--arch", "gpt2", "--n_embd", 64, "--n_head", 4), ("--learning_rate", 0.02, "--optimizer", "muon")
    distill(*STUDENT, *shape, *rates, "--max_iters", 60, "--alpha", 1, "--name", "run").ok()
    first, *_, last = [r["divergence"] for r in log_of("run")]
    assert last < 0.45 * first


def test_cached_and_live_teacher_train_alike(distill, monkeypatch):
    """Within 1% all along the curve; for a second student of the same blocks the teacher is not run."""
    teacher = mild_gpt()
    with torch.no_grad():
        teacher.head_weight.mul_(8)  # as sure as a trained one
    save_model("teacher.pt", teacher)
    run = (*STUDENT, "--max_iters", 20, "--log_interval", 2, "--name")
    cached = ("--cache_teacher", 64)
    distill(*run, "live").ok()
    out = distill(*run, "first", *cached).ok().out
    folder = Path("data/text/teacher_cache")
    assert f"{(folder / 'answers.bin').stat().st_size / 1e6:,.1f} MB when full" in out and str(folder) in out
    assert np.fromfile(folder / "done.bin", "u1").sum() == 20 * 4
    monkeypatch.setattr(Distillation, "live", lambda *args: pytest.fail("the teacher was run"))
    assert "MB when full" not in distill(*run, "second", *cached).ok().out
    assert_same_weights("first", "second")
    losses = {name: [r["loss"] for r in log_of(name)] for name in ("first", "live")}
    assert losses["first"] == pytest.approx(losses["live"], rel=0.01)


def test_a_run_refuses_the_cache_of_another(distill, text_file):
    """By name, with what the cache was made for and what this run is."""
    run = (*STUDENT, "--max_iters", 1, "--cache_teacher", 8, "--name")
    distill(*run, "first").ok()
    for flags, words in ((("--temperature", 3), "temperature (2.0, now 3.0"),
                         (("--block_size", 8), "block size (16, now 8"),
                         (("--cache_teacher", 4), "top k (8, now 4")):  # fmt: skip
        distill(*run, "second", *flags).fails_with(f"another {words}", "teacher_cache")
    meta = Path("data/text/teacher_cache/meta.json")
    whole = meta.read_text()
    meta.write_text(whole.replace('"format": 3,', ""))  # as before answers were packed
    assert "another format (None, now 3): delete it" in distill(*run, "second").error
    meta.write_text(whole)
    save_model("teacher.pt", mild_gpt(seed=9))
    assert "another teacher" in distill(*run, "second").error
    save_model("teacher.pt", mild_gpt())
    text_file.write_text(text_file.read_text() + "and more.")
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte", overwrite=True)
    assert "another data" in distill(*run, "second").error
    model.tokenize_text(Path("data/more"), [str(text_file)], "byte")
    mixture = (*run[:-1], "--data", "more", "text", "--name")
    distill(*mixture, "third").ok()
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte", val_fraction=0.5, overwrite=True)
    assert "another data" in distill(*mixture, "fourth").error  # it would answer for other blocks of the same texts


def test_a_cache_of_conversations_is_of_one_split(distill):
    """The last window, packed with what precedes the split, holds more once the split has moved."""
    run = (*STUDENT, "--max_iters", 1, "--cache_teacher", 8, "--data", "talk", "--name")
    for name, val_fraction in (("first", 0.5), ("second", 0.1)):
        Path("data/talk/meta.json").unlink(missing_ok=True)
        write_conversations(Path("data/talk"), [([65 + i] * 5, [0, 0, 1, 1, 1]) for i in range(20)], val_fraction)
        found = distill(*run, name)
    found.fails_with("another data", "delete it")


def test_the_teachers_own_tokenizer(cli, text_file):
    """`--data FILE` is tokenized as the teacher does, and so is data made as the error about another one says."""
    bpe = model.train_bpe([text_file.read_text()], 300)
    save_model("teacher.pt", mild_gpt(vocab_size=300), bpe)
    cli("tokenize", "--dataset", "match", "--txt", text_file, "--tokenizer", "teacher.pt").ok()
    for name, data in (("file", text_file), ("made", "match")):
        run = ("--data", data, "--max_iters", 1, "--name", name)
        cli("distill", "--teacher_model_path", "teacher.pt", *STUDENT, *run).ok()
        assert model.Tokenizer(checkpoint_of(name)["tokenizer"]).digest == bpe.digest


def test_a_teacher_from_a_hugging_face_directory(distill, cli):
    """Under another name, and with rows that are no tokens: it is the same teacher, bit for bit."""
    teacher, wide = mild_gpt(), mild_gpt(vocab_size=300)
    teacher.load_state_dict(wide.state_dict())
    save_model("teacher.pt", teacher)
    save_model("wide.pt", wide)
    cli("export", "--model_path", "wide.pt", "--output_dir", "hf_teacher", "--dtype", "float32").ok()
    run = (*STUDENT, "--max_iters", 3, "--name")
    distill(*run, "ours").ok()
    distill(*run, "theirs", "--teacher_model_path", "hf_teacher").ok()
    assert_same_weights("ours", "theirs")


# --- Where a student starts


@pytest.mark.parametrize("arch", ["gpt2", "llama", "nanochat"])
@pytest.mark.parametrize("n_teacher, chosen", [
    (12, [0, 2, 4, 7, 9, 11]), (8, [0, 2, 5, 7]), (7, [0, 3, 6]), (6, [0, 5]), (4, [0]), (3, [0, 1, 2]),
])  # fmt: skip
def test_every_kth_layer(arch, n_teacher, chosen):
    """Truth: by hand, evenly spread, first and last kept; and all that belongs to no layer."""
    teacher = random_gpt(tiny_config(arch, n_layer=n_teacher, n_embd=16), 1)
    student = random_gpt(tiny_config(arch, n_layer=len(chosen), n_embd=16), 2)
    model.every_kth_layer(teacher, student)
    teacher.blocks = torch.nn.ModuleList(teacher.blocks[i] for i in chosen)
    torch.testing.assert_close(student.state_dict(), teacher.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("change, name, rows", [({"block_size": 64}, "wpe", 32), ({"vocab_size": 400}, "wte", 320)])
def test_a_student_of_the_teachers_layers_has_a_smaller_table(change, name, rows):
    """Fewer positions, or a vocabulary without the teacher's padding."""
    teacher, student = mild_gpt(**change), mild_gpt(2, n_layer=1)
    model.every_kth_layer(teacher, student)
    assert torch.equal(getattr(student, name).weight, getattr(teacher, name).weight[:rows])


# With a rate of next to nothing, what comes out is what the student started as.
ONE_STEP = (*TINY_RUN[8:], "--batch_size", 2, "--max_iters", 1, "--learning_rate", 1e-9, "--sample_interval", -1)


@pytest.mark.parametrize("tied, n_vocab", [(True, 257), (False, 250)])  # with 250 the tables are shorter, too
def test_a_student_without_a_variant_is_the_teacher_with_half_its_layers(distill, tied, n_vocab):
    """And with rows for the data's chat tokens, which the teacher lacks: the checkpoint has the data's tokenizer."""
    teacher = mild_gpt(vocab_size=n_vocab, tie_word_embeddings=tied)
    spec = json.loads(model.byte_tokenizer().backend.to_str())
    spec["model"]["vocab"] = {token: i for token, i in spec["model"]["vocab"].items() if i < n_vocab - 1}
    spec["added_tokens"] = [{**spec["added_tokens"][0], "id": n_vocab - 1}]
    plain = {"kind": "hf", "name": "plain", "json": json.dumps(spec), "special": {model.EOT: n_vocab - 1}}
    save_model("teacher.pt", teacher, model.Tokenizer(plain))
    distill("--init_from_teacher", *ONE_STEP, "--name", "half").ok()
    student = model.open_model("half_model.pt").model
    assert (student.config.n_layer, student.config.n_embd, student.config.vocab_size) == (1, 64, N_BYTES)
    for ours, theirs in ((student.wte.weight, teacher.wte.weight), (student.head_weight, teacher.head_weight)):
        torch.testing.assert_close(ours[:n_vocab], theirs[:n_vocab], atol=1e-6, rtol=0)


@pytest.mark.parametrize("arch, change", [
    ("gpt2", {"n_embd": 16}), ("gpt2", {"n_embd": 64}), ("gpt2", {"n_inner": 64}), ("gpt2", {"n_inner": 256}),
    ("gpt2", {"n_head": 2}),  # every shape agrees, and no head does
    ("llama", {"n_kv_head": 2}),  # the student's values would be the teacher's keys
    ("llama", {"n_kv_head": 4, "n_head": 8}), ("qwen3", {"head_dim": 4}),
], ids=str)  # fmt: skip
def test_layers_of_other_widths_are_refused(arch, change):
    teacher, student = random_gpt(tiny_config(arch)), random_gpt(tiny_config(arch, **{"n_layer": 1, **change}))
    with pytest.raises(model.UserError, match="widths must agree"):
        model.every_kth_layer(teacher, student)


STUDENT_CHECKPOINT = ("--student_checkpoint", "student.pt", *ONE_STEP)


def test_a_student_can_start_from_a_checkpoint(distill):
    start = mild_gpt(3, n_layer=1)
    save_model("student.pt", start)
    distill(*STUDENT_CHECKPOINT, "--block_size", 16, "--name", "run").ok()
    torch.testing.assert_close(checkpoint_of("run")["model"], dict(start.state_dict()), atol=1e-6, rtol=0)


def test_a_student_checkpoint_takes_dropout_and_nothing_of_a_new_shape(distill):
    """No flag is silently ignored: what can change does, and what cannot is an error that names it."""
    save_model("student.pt", mild_gpt(3, n_layer=1, block_size=16))
    distill(*STUDENT_CHECKPOINT, "--name", "dropout", "--resid_pdrop", 0.5).ok()
    assert checkpoint_of("dropout")["config"]["resid_pdrop"] == 0.5
    for flags in (("--n_layer", 5), ("--arch", "llama"), ("--student_variant", "7M"), ("--init_from_teacher",),
                  ("--tie_word_embeddings", "false"), ("--n_kv_head", 0), ("--block_size", 32)):  # fmt: skip
        assert flags[0] in distill(*STUDENT_CHECKPOINT, "--name", "refused", *flags).error


def test_a_student_checkpoint_of_another_tokenizer(distill):
    save_model("student.pt", mild_gpt(), model.train_bpe(["some text"], N_BYTES))
    distill(*STUDENT_CHECKPOINT).fails_with("byte (259 tokens)", "bpe-259 (259 tokens)")


# --- Mistakes


@pytest.mark.parametrize("flags, words", [
    (("--cache_teacher", 8, "--on_policy", 0.5), ["cache_teacher", "on_policy"]),
    (("--cache_teacher", 300), ["cache_teacher is 300", "259"]),
    (("--block_size", 64), ["teacher's context is 32", "block is 64", "--block_size"]),
    (("--divergence", "euclid"), ["divergence", "forward_kl"]),
    (("--data", "nothing"), ["nothing", "text"]),
    (("--n_embd", 64, "--n_head", 4, "--arch", "qwen3", "--init_from_teacher"), ["--init_from_teacher", "teacher"]),
    (("--teacher_variant", "120M"), ["teacher.pt", "120M", "n_layer"]),
    (("--teacher_model_path", "hf"), ["--teacher_variant", "120M"]),
    (("--teacher_model_path", "hf", "--teacher_variant", "7M"), ["120M, 300M, 700M, 1B"]),
])  # fmt: skip
def test_bad_combinations(distill, flags, words):
    distill(*STUDENT, *flags).fails_with(*words)


def test_a_student_must_be_named(distill):
    distill().fails_with("--student_variant", "--student_checkpoint", "--init_from_teacher")


@pytest.mark.parametrize("path", ["nowhere.pt", "./nowhere", "checkpoints/nowhere", "nowhere"])
def test_an_unreachable_teacher(cli, path):
    """A path that leads nowhere is no hub id: nothing is fetched."""
    Path("checkpoints").mkdir()
    result = cli("distill", "--teacher_model_path", path, *STUDENT)
    assert path in result.error and "hub" not in result.err.lower()


def test_a_larger_student_is_warned_about(distill):
    larger = distill(*STUDENT, "--n_embd", 128, "--max_iters", 1, "--name", "larger").ok()
    smaller = distill(*STUDENT, "--max_iters", 1, "--name", "smaller").ok()
    assert "warning: the student" in larger.err and "larger than the teacher" in larger.err
    assert "warning" not in smaller.err
    assert "teacher teacher.pt: " in smaller.out and "alpha 0.5, temperature 2.0, forward_kl" in smaller.out


def swapped_bytes(a: int, b: int) -> model.Tokenizer:
    """The bytes as a bpe, with two of its tokens in each other's place."""
    tokens = [bytes([i]) for i in range(256)]
    tokens[a], tokens[b] = tokens[b], tokens[a]
    return model.from_ranks("bpe", tokens, "swapped")


@pytest.mark.parametrize("other", [
    lambda: swapped_bytes(65, 66), lambda: swapped_bytes(0xC3, 0xE2), lambda: model.train_bpe(["a"], N_BYTES),
], ids=["letters swapped", "bytes swapped that are no characters alone", "another order"])  # fmt: skip
def test_a_vocabulary_of_the_same_size_is_not_the_same(distill, other):
    """Refused by content: both tokenizers are named, and what makes matching data."""
    other = other()
    assert other.n_vocab == N_BYTES
    save_model("teacher.pt", mild_gpt(), other)
    distill(*STUDENT).fails_with(other.describe(), "byte (259 tokens)", "tokenize --tokenizer teacher.pt")
