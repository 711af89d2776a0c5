"""The GPT against independent truths: transformers' RoPE (its logits: test_huggingface.py), plain PyTorch, numerical
derivatives, closed forms."""

import copy
import functools
import itertools
import math
import os
import platform
import shutil
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import mean_error, random_gpt, random_tokens, save_model, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model

ARCHS = list(model.ARCHS)


# --- RoPE


ROPE = {
    "linear": dict(rope_scaling="linear", rope_factor=8.0, rope_theta=1e4),
    "Qwen2.5's yarn": dict(rope_scaling="yarn", rope_factor=4.0, rope_theta=1e6, rope_original_block_size=32768),
    "yarn of a tiny context": dict(rope_scaling="yarn", rope_factor=2.0, rope_original_block_size=8),
    "yarn, factor 1": dict(rope_scaling="yarn", rope_factor=1.0, rope_original_block_size=2048),
    "Llama 3.1's": dict(rope_scaling="llama3", rope_factor=8.0, rope_theta=5e5, rope_original_block_size=8192),
    "Llama 3.2's": dict(rope_scaling="llama3", rope_factor=32.0, rope_theta=5e5, rope_original_block_size=8192),
    "ntk": dict(rope_scaling="ntk", rope_factor=8.0),
    "ntk of theta 1e6": dict(rope_scaling="ntk", rope_factor=2.5, rope_theta=1e6),
}


@pytest.mark.parametrize("rope_pct", [1.0, 0.25])
@pytest.mark.parametrize("overrides", ROPE.values(), ids=ROPE)
def test_rope_frequencies_equal_transformers(overrides, rope_pct):
    """At the sizes of published models: head_dim 128, contexts of thousands."""
    c = tiny_config("llama", n_embd=512, block_size=2048, rope_pct=rope_pct, **overrides)
    rope, length = {**model.hf_rope(c), "partial_rotary_factor": rope_pct}, c.context
    rope.pop("attention_factor", None)  # so that transformers finds it itself
    if c.rope_scaling == "ntk":  # its `dynamic` with factor 1, of a longer input
        rope, length = {**rope, "rope_type": "dynamic", "rope_theta": c.rope_theta, "factor": 1.0}, c.block_size
    theirs = transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=length
    )
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, "cpu", seq_len=c.context)
    freqs, factor = model.rope_frequencies(c)
    torch.testing.assert_close(freqs, expected, rtol=1e-6, atol=0)
    assert factor == pytest.approx(attention_factor, rel=1e-12)


# --- Single settings


def test_post_norm_equals_pytorch_encoder_layers():
    """torch.nn.TransformerEncoderLayer with norm_first=False is the original transformer's block."""
    c = tiny_config("gpt2", norm_position="post")
    gpt, idx = random_gpt(c), random_tokens(2, 20)
    x, gelu = gpt.wte(idx) + gpt.wpe.weight[:20], functools.partial(F.gelu, approximate="tanh")
    for block in gpt.blocks:
        layer = torch.nn.TransformerEncoderLayer(c.n_embd, c.n_head, c.n_inner, 0.0, gelu, batch_first=True).eval()
        names = {
            "self_attn.in_proj_": "attn.qkv.", "self_attn.out_proj.": "attn.proj.", "linear1.": "mlp.fc.",
            "linear2.": "mlp.proj.", "norm1.": "norm_1.", "norm2.": "norm_2.",
        }  # fmt: skip
        state = block.state_dict()
        layer.load_state_dict({f"{a}{p}": state[f"{b}{p}"] for a, b in names.items() for p in ("weight", "bias")})
        x = layer(x, src_mask=torch.nn.Transformer.generate_square_subsequent_mask(20), is_causal=True)
    torch.testing.assert_close(gpt(idx), x @ gpt.wte.weight[: c.vocab_size].T, atol=1e-4, rtol=0)


@torch.no_grad()
def test_no_norm_is_none():
    """Blocks that add nothing leave the embedding as it is, to the head."""
    gpt, idx = random_gpt(tiny_config("llama", norm="none")), random_tokens(2, 8)
    assert not [name for name in gpt.state_dict() if "norm" in name]
    for block in gpt.blocks:
        block.attn.proj.weight.zero_()
        block.mlp.proj.weight.zero_()
    weight = gpt.wte.weight
    torch.testing.assert_close(gpt(idx), (weight[idx] @ weight.T)[..., : gpt.config.vocab_size])


def test_without_learned_positions_a_context_takes_no_memory():
    """16M positions of this width would be 4 TB."""
    wide = dict(pos_embd="none", block_size=1 << 24, n_embd=1 << 16, n_head=1, head_dim=1, n_inner=1)
    assert model.GPT(tiny_config("gpt2", **wide)).wpe is None


@pytest.mark.parametrize("name", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_dropout_is_active_in_training_only(name, kernel):
    plain, gpt = random_gpt(tiny_config()), random_gpt(tiny_config(attn_implementation=kernel, **{name: 0.5}))
    idx = random_tokens(2, 16)
    torch.testing.assert_close(gpt.eval()(idx), plain(idx), atol=1e-5, rtol=0)
    gpt.train()
    assert (gpt(idx) - gpt(idx)).abs().max() > 0.1


# --- Fast and plain agree: kernels, the cache, packing


def has_compiler() -> bool:
    """Whether a C compiler with OpenMP is here, found out without C_SOURCE, whose faults must not skip its tests."""
    command = [os.environ.get("CC", "cc"), "-fopenmp", "-x", "c", "-", "-o", os.devnull]
    try:
        return subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode == 0
    except OSError:
        return False


needs_compiler = pytest.mark.skipif(not has_compiler(), reason="needs a C compiler with OpenMP")
needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs x86 hardware")
IN_C = [  # on processors with AVX2 and without, too
    pytest.param(*case, marks=[needs_compiler, *[needs_x86] * (case[0] != "native")])
    for case in (("native", 1), ("native", 3), ("x86-64-v3", 3), ("x86-64", 3))
]


def compile_for(monkeypatch: pytest.MonkeyPatch, march: str, threads: int = 1) -> None:
    """The C is that of another processor, and runs in so many threads."""
    original = model.c_library
    monkeypatch.setattr(model, "c_library", lambda cpu="native", *options: original(march, *options))
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)


DECODED = [
    *((arch, {}) for arch in ARCHS),
    ("gpt2", dict(norm_position="post", pos_embd="none", bias="none", embd_norm=True)),
    ("gpt2", dict(logit_softcap=5.0, activation="geglu")),
    ("gpt2", dict(n_embd=36, n_inner=50, activation="gelu", n_kv_head=2)),  # no multiple of a vector's length
    ("gpt_neox", dict(rope_pct=0.5, parallel_residual=True, activation="relu")),
    ("llama", dict(n_kv_head=1, n_embd=40, head_dim=18, rope_scaling="yarn", rope_factor=2.0)),
    ("llama", dict(norm_position="post", n_kv_head=2, tie_word_embeddings=False)),
    ("llama", dict(norm="none", n_kv_head=2)),
    ("qwen3", dict(n_kv_head=2, rope_pct=0.5)),
    ("nanochat", dict(n_kv_head=2)),
]


def half_gpt(arch: str, **overrides) -> model.GPT:
    """A random GPT whose matrices are numbers that float16 has."""
    gpt = random_gpt(tiny_config(arch, **overrides))
    for p in gpt.parameters():
        p.data = p.data.half().float()
    return gpt


def assert_close_each(ours: list[torch.Tensor], plain: list[torch.Tensor], tolerance: float = 1e-5) -> None:
    """Within so much of the largest number of each, all in one comparison, which is quicker."""
    largest = [b.abs().max().clamp(min=1e-30) for b in plain]
    one, other = (torch.cat([(x / m).flatten() for x, m in zip(xs, largest, strict=True)]) for xs in (ours, plain))
    torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance)


class SameCache:
    """The keys and values in another cache, for a pass that comes after; its own must be those, rounded to float16."""

    def __init__(self, cache: model.KVCache, length: int) -> None:
        self.cache, self.length, self.max_length, self.pad = cache, length, cache.max_length, cache.pad

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kv = self.cache.kv[layer, :, :, : self.length + k.size(2)].float()
        half_a_place = 2**-11 if self.cache.kv.dtype == torch.float16 else 0
        for row, pad in enumerate([0] * len(k) if self.pad is None else self.pad.tolist()):
            real = slice(max(pad - self.length, 0), None)  # what padding holds is read by padding alone
            new = kv[row, :, self.length :][:, real], torch.cat((k, v), dim=1)[row, :, real]
            torch.testing.assert_close(*new, rtol=half_a_place + 1e-5, atol=1e-5)
        return kv.chunk(2, dim=1)


def read(gpt: model.GPT, idx: torch.Tensor, cache: model.KVCache, tolerance: float = 1e-5) -> torch.Tensor:
    """The logits, which must be what PyTorch's operators make of the keys and values that come to be in the cache."""
    logits, engine, gpt.engine = gpt(idx, cache), gpt.engine, None
    expected = gpt(idx, SameCache(cache, cache.length - idx.size(1)))
    real = slice(None) if cache.pad is None else cache.length > cache.pad
    assert_close_each([logits[real, -1]], [expected[real, -1]], tolerance)
    gpt.engine = engine
    return logits


@pytest.mark.parametrize("how, threads, quantize", [
    ("eager", 1, None), ("auto", 1, None),
    *(pytest.param(*c.values, q, marks=c.marks) for c in IN_C for q in (None, "int8")),
])  # fmt: skip
@pytest.mark.parametrize("arch, overrides", DECODED)
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(arch, overrides, how, threads, quantize, monkeypatch):
    """Prompts are read in two goes, then token by token: each row is what it is in one pass of the same weights. In C,
    whose cache is float16, it is also what PyTorch makes of the keys and values in the cache."""
    in_c = how not in ("eager", "auto")
    gpt = half_gpt(arch, attn_implementation="auto" if in_c else how, **overrides)
    plain, c, rows = half_gpt(arch, **overrides), gpt.config, random_tokens(3, 24)
    if in_c:
        compile_for(monkeypatch, how, threads)
        for each in (gpt, plain):
            model.prepare_generation(each, "auto", quantize)
        assert isinstance(gpt.engine, model.CEngine) == (c.norm_position == "pre" and c.norm != "none")
        plain.engine = None
    expected, tolerance = plain(rows), 1e-2 if isinstance(gpt.engine, model.CEngine) else 1e-5
    for lengths in ((5,), (3, 1, 5), (3, 1, 9)):  # the plain pass reads the last 3 x 7 tokens of a prompt
        prompts = [row[:n].tolist() for row, n in zip(rows, lengths, strict=False)]
        new, pad = model.left_pad(prompts, torch.device("cpu"))
        cache = model.KVCache(gpt, len(lengths), 24, pad)
        assert cache.kv.numel() == 2 * c.n_layer * len(lengths) * c.n_kv_head * 24 * c.head_dim  # GQA's is smaller
        logits = torch.cat((read(gpt, new[:, :2], cache), read(gpt, new[:, 2:], cache)), dim=1)[:, -1]
        each_row, last = torch.arange(len(lengths)), torch.tensor(lengths) - 1
        for _ in range(max(lengths), 24):
            torch.testing.assert_close(logits, expected[each_row, last], atol=tolerance, rtol=tolerance)
            last += 1
            logits = read(gpt, rows[each_row, last][:, None], cache)[:, 0]


@needs_compiler
@torch.no_grad()
def test_keys_and_values_beyond_float16_are_its_largest_however_they_are_read():
    """Prompts of more than 16 tokens are read by PyTorch, whose conversion would make them infinite."""
    gpt, idx = half_gpt("llama"), random_tokens(1, 20)
    qkv, proj = (m.weight for m in (gpt.blocks[0].attn.qkv, gpt.blocks[0].attn.proj))
    qkv.mul_(2.0**18).clamp_(-60_000, 60_000)
    proj.mul_(2.0**-18)
    model.prepare_generation(gpt, "auto")
    caches = [model.KVCache(gpt, 1, 20) for _ in range(2)]
    at_once, one_by_one = gpt(idx, caches[0])[:, -1], [gpt(token, caches[1])[:, -1] for token in idx.T[:, :, None]][-1]
    assert (caches[0].kv.abs() == 65504).any() and at_once.isfinite().all()
    torch.testing.assert_close(at_once, one_by_one, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="21 tokens are more than the cache's"):
        gpt(idx[:, :1], caches[1])


@torch.no_grad()
def test_what_the_c_does_not_know_is_generated_without_it():
    """An activation or an attention kernel that was added to the tables, wherever it stands in them."""
    known = dict(model.ACTIVATIONS)
    model.ACTIVATIONS.clear()
    model.ACTIVATIONS.update({"tanh": torch.tanh, **known})
    try:
        for activation, tolerance in (("tanh", 1e-3), ("relu2", 2e-3)):  # in C, float16 keys and values
            gpt, idx = half_gpt("gpt2", activation=activation), random_tokens(1, 12)
            expected = gpt(idx)
            model.prepare_generation(gpt, "auto")
            torch.testing.assert_close(read(gpt, idx, model.KVCache(gpt, 1, 12)), expected, atol=tolerance, rtol=0)
    finally:
        del model.ACTIVATIONS["tanh"]
    gpt.config.attn_implementation = "window"
    model.prepare_generation(gpt, "auto")
    assert gpt.engine is None


def loss_and_gradients(gpt: model.GPT, documents: torch.Tensor | None) -> list[torch.Tensor]:
    idx = random_tokens(3, 25, vocab_size=gpt.config.vocab_size)
    gpt.zero_grad()
    loss = gpt.loss(idx[:, :-1], idx[:, 1:], documents) / idx[:, 1:].numel()
    loss.backward()
    return [loss.detach(), *(p.grad for p in gpt.parameters())]


TRAINED = [
    *((arch, {}) for arch in ARCHS),
    ("qwen3", dict(n_kv_head=2, rope_pct=0.5, gradient_checkpointing=True)),
    ("llama", dict(n_embd=36, n_head=3, head_dim=10, n_inner=50, rope_scaling="yarn", rope_factor=4.0)),
    ("nanochat", dict(n_kv_head=1, norm_weight=True, n_embd=72, head_dim=18)),
    ("gpt2", dict(norm="rmsnorm", norm_position="post", n_kv_head=2)),
]


@pytest.mark.parametrize("march, threads", IN_C)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("arch, overrides", TRAINED)
def test_training_in_c_equals_the_plain_operators(arch, overrides, packed, march, threads, monkeypatch):
    compile_for(monkeypatch, march, threads)
    gpt = random_gpt(tiny_config(arch, **overrides)).train()
    documents = torch.tensor([9, 9, 6] * 3) if packed else None
    ours, again = loss_and_gradients(gpt, documents), loss_and_gradients(gpt, documents)
    model.set_precision(gpt, "bfloat16", training=True)
    short = loss_and_gradients(gpt, documents)
    monkeypatch.setattr(model, "training_library", lambda x: None)
    plain_short = loss_and_gradients(gpt, documents)
    model.set_precision(gpt, "float32", training=True)
    plain = loss_and_gradients(gpt, documents)
    assert not all(map(torch.equal, ours, plain))  # it was not the plain pass
    assert all(map(torch.equal, ours, again))  # the same sums in the same order
    assert_close_each(ours, plain)
    assert mean_error(short, plain) <= 1.5 * mean_error(plain_short, plain)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_in_c_hides_no_fault(dtype):
    """What is not finite, and a target outside the vocabulary, give a loss that is not a number; -1 gives none."""
    for target, logit, expected in ((1, 0.0, math.log(10)), (1, math.nan, math.nan), (1, math.inf, math.nan),
                                    (10, 0.0, math.nan), (-1, math.nan, 0.0)):  # fmt: skip
        logits = torch.zeros(1, 10, dtype=dtype)
        logits[0, 3] = logit
        loss, grad = model.CrossEntropy(torch.tensor([target]))(logits, slice(0, 1), True)
        assert loss.item() == pytest.approx(expected, nan_ok=True)
        assert grad is logits  # in their memory: it was the C


@needs_compiler
@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-4), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("kind, march", [
    ("forward_kl", "native"), ("reverse_kl", "native"), pytest.param("reverse_kl", "x86-64", marks=needs_x86),
])  # fmt: skip
def test_the_divergence_in_c(kind, march, dtype, rtol, monkeypatch):
    """Truth: kl_div in float64. 100 tokens, padded to 128, 90 the teacher's, one impossible; a third do not count."""
    compile_for(monkeypatch, march)
    student, teacher, targets = 3 * torch.randn(40, 128), 3 * torch.randn(40, 90), random_tokens(40, vocab_size=90)
    student[:, 100:], targets[::3] = -math.inf, -1
    if kind == "forward_kl":
        teacher[:, 7] = -math.inf
    student = student.to(dtype)
    objective = model.Distillation(torch.nn.Identity(), model.DistillConfig(2.0, 1.0, kind), 90)
    chunk_loss = objective.chunk_loss(objective.d, targets, lambda rows: teacher[rows], torch.zeros(2))
    monkeypatch.setattr(model, "by_autograd", lambda *inputs: pytest.fail("it was not the C"))
    loss, grad = chunk_loss(student, slice(0, 40), True)
    assert chunk_loss(student, slice(0, 40), False) == (loss, None)

    logits = student.double().requires_grad_()
    log_p, log_q = teacher.double().log_softmax(-1), (logits[:, :90] / 2).log_softmax(-1)
    pair = (log_q, log_p.exp()) if kind == "forward_kl" else (log_p, log_q.exp())  # kl_div(log b, a) is KL(a || b)
    plain = 4 * F.kl_div(*pair, reduction="none")[targets >= 0].sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    torch.testing.assert_close(grad.double(), logits.grad, atol=1e-6, rtol=rtol)


@pytest.fixture
def fresh_library(monkeypatch):
    monkeypatch.setattr(model, "c_library", functools.cache(model.c_library.__wrapped__))


@needs_compiler
def test_the_decoder_is_compiled_once(tmp_path, monkeypatch, fresh_library):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model.c_library("native", "-O0") is not None
    model.c_library.cache_clear()
    monkeypatch.setattr(model.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    assert model.c_library("native", "-O0") is not None
    assert [p.suffix for p in (tmp_path / "model.py").iterdir()] == [".so"]


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
@torch.no_grad()
def test_without_a_compiler(compiler, tmp_path, monkeypatch, capsys, fresh_library):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    gpt, idx = half_gpt("llama"), random_tokens(1, 24)
    expected = gpt(idx)
    for quantize, tolerance in ((None, 1e-5), ("int8", 0.5)):
        model.prepare_generation(gpt, "auto", quantize)
        assert not isinstance(gpt.engine, model.CEngine)
        torch.testing.assert_close(gpt(idx), expected, atol=tolerance, rtol=0)
    assert capsys.readouterr().err.count("without a C compiler") == 1


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("arch", ARCHS)
@torch.no_grad()
def test_packed_documents_are_as_if_alone(arch, kernel):
    gpt, idx = random_gpt(tiny_config(arch, attn_implementation=kernel)), random_tokens(2, 24)
    plain = random_gpt(tiny_config(arch))
    cuts = [(0, 7, 8, 24), (0, 13, 20, 24)]
    packed = gpt(idx, documents=torch.tensor(cuts).diff().flatten())
    for row, cut in enumerate(cuts):
        for begin, end in itertools.pairwise(cut):
            alone = plain(idx[row : row + 1, begin:end])[0]
            torch.testing.assert_close(packed[row, begin:end], alone, atol=1e-5, rtol=0)


# --- Gradients


def gradients(gpt: model.GPT) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in gpt.named_parameters()}


@pytest.mark.parametrize("overrides", [{}, dict(logit_softcap=4.0, norm_position="post")])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradient_of_the_loss_is_the_numerical_derivative(arch, overrides):
    """Central differences in double precision, at random coordinates of every parameter; float32 must agree too."""
    n_kv_head = 0 if arch in ("gpt2", "gpt_neox") else 1
    size = dict(vocab_size=20, block_size=8, n_layer=2, n_embd=8, n_head=2, n_kv_head=n_kv_head, n_inner=12)
    gpt, idx = random_gpt(tiny_config(arch, **size, **overrides), seed=1), random_tokens(2, 9, vocab_size=20)
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, 3:5] = -1
    gpt.loss(x, y).backward()
    double = copy.deepcopy(gpt).double()
    double.compute_dtype = torch.float64
    double.zero_grad()
    double.loss(x, y).backward()
    rng, h = torch.Generator().manual_seed(2), 1e-5
    for (name, p), single in zip(double.named_parameters(), gpt.parameters(), strict=True):
        torch.testing.assert_close(single.grad, p.grad.float(), rtol=1e-3, atol=1e-4)
        flat = p.data.view(-1)
        for i in torch.randint(flat.numel(), (12,), generator=rng).tolist():
            value, f = flat[i].item(), []
            for step in (h, -h):
                flat[i] = value + step
                with torch.no_grad():
                    f.append(double.loss(x, y).item())
            flat[i] = value
            numerical = pytest.approx((f[0] - f[1]) / (2 * h), rel=1e-5, abs=1e-7)
            assert p.grad.view(-1)[i].item() == numerical, f"{name}[{i}]"


@pytest.mark.parametrize("fused", [None, model.fusible_cross_entropy])
@pytest.mark.parametrize("rows", [64, 80, 99, 160, 1000])
@pytest.mark.parametrize("overrides", [
    {}, dict(tie_word_embeddings=False), dict(logit_softcap=3.0), dict(logit_softcap=3.0, tie_word_embeddings=False),
])  # fmt: skip
def test_fused_loss_equals_cross_entropy_of_full_logits(overrides, rows, fused, monkeypatch):
    """In chunks that divide 160 rows or not, by hand and as a GPU compiles it; neither -1 nor padding counts."""
    monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", rows * 128)
    gpt, idx = random_gpt(tiny_config("llama", block_size=80, **overrides)), random_tokens(2, 81)
    x, y = idx[:, :-1], idx[:, 1:].clone()
    y[0, :5] = y[1, -1] = -1
    reference = copy.deepcopy(gpt)
    expected = F.cross_entropy(reference(x).flatten(0, 1), y.flatten(), ignore_index=-1, reduction="sum")
    (expected / 7).backward()
    gpt.compiled_loss = fused
    loss = gpt.loss(x, y)
    (loss / 7).backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients(gpt), gradients(reference), rtol=1e-4, atol=1e-5)
    assert gpt.config.padded_vocab_size == 128 and not gpt.head_weight.grad[100:].any()
    with torch.no_grad():
        torch.testing.assert_close(gpt.loss(x, y), expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_the_compiled_loss(monkeypatch):
    """Truth: the plain loss. One graph for each size of a chunk, 64 and 32 rows, and none after the first step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(model, "LOSS_CHUNK_ELEMENTS", 64 * 128)
    gpt, compiler = random_gpt(tiny_config("nanochat")), CompileCounterWithBackend("inductor")
    compiled = torch.compile(model.fusible_cross_entropy, dynamic=False, fullgraph=True, backend=compiler)
    for step in range(3):
        h, targets = torch.randn(2, 80, 32, requires_grad=True), random_tokens(2, 80, seed=step) - 1
        found = []
        for fused in (None, compiled):
            gpt.compiled_loss = fused
            loss = model.linear_loss(h, gpt, model.CrossEntropy(targets))
            found.append((loss.detach(), *torch.autograd.grad(loss, (h, gpt.head_weight))))
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert compiler.frame_count == 2


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "qwen3", "nanochat"])  # llama and qwen2 add no part of their own
def test_a_block_is_one_graph(arch):
    """What torch.compile sees of a block in training has no break: fullgraph raises at one."""
    gpt = random_gpt(tiny_config(arch)).train()
    x, positions = torch.randn(2, 16, 32, requires_grad=True), slice(16)
    rope = None if gpt.rope_cos is None else (gpt.rope_cos[positions], gpt.rope_sin[positions])
    block = gpt.blocks[0]
    compiled = torch.compile(block.forward, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, rope, None, None), block(x, rope, None, None))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_no_memory_beyond_a_tensor_is_read(arch, training):
    """What is called by hand with too long a text, a token of another vocabulary or too few targets is told so."""
    gpt = random_gpt(tiny_config(arch)).train(training)  # 100 tokens, a context of 32
    idx = random_tokens(1, 40)
    with pytest.raises(model.UserError, match="40 tokens are more than the context of 32"):
        gpt(idx)
    with pytest.raises(model.UserError, match="40 tokens are more than the context of 32"):
        gpt.loss(idx, idx)
    idx, targets = idx[:, :32], idx[:, 1:33].clone()
    with pytest.raises(model.UserError, match=r"\(1, 31\) and tokens \(1, 32\)"):
        gpt.loss(idx, targets[:, :31])
    for wrong in (100, 127, 5000):
        targets[0, 3] = wrong
        with pytest.raises(model.UserError, match=f"target {wrong} is not in the vocabulary of 100"):
            gpt.loss(idx, targets)
    targets[0, 3] = 99
    assert gpt.loss(idx, targets).isfinite()


@pytest.mark.parametrize("training", [False, True])
def test_hooks_see_every_module(training):
    """So that what a block puts out can be looked at: each, once, and the last is what the head reads."""
    gpt, seen = random_gpt(tiny_config("llama")).train(training), []
    modules = {module: name for name, module in gpt.named_modules() if not isinstance(module, torch.nn.ModuleList)}
    for module in modules:
        module.register_forward_hook(lambda module, inputs, output: seen.append((modules[module], output)))
    logits = gpt(random_tokens(1, 8))
    assert sorted(name for name, _ in seen) == sorted(modules.values())
    assert torch.equal(gpt.logits(gpt.norm_f(dict(seen)["blocks.1"])), logits)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "nanochat"])
def test_gradient_checkpointing_gives_the_same_gradients(arch):
    """With dropout as well: the recomputed pass must drop the same elements."""
    found = []
    for checkpointing in (False, True):
        gpt = random_gpt(tiny_config(arch, gradient_checkpointing=checkpointing, resid_pdrop=0.2, attn_pdrop=0.2))
        idx = random_tokens(2, 17)
        torch.manual_seed(3)
        gpt.train().loss(idx[:, :-1], idx[:, 1:]).backward()
        found.append(gradients(gpt))
    assert all(g.abs().max() > 0 for g in found[0].values())
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


# --- Sizes and initial weights


# DESIGN.md's table: millions of parameters with GPT-2's vocabulary (26M with its own 6,400 tokens)
PUBLISHED = {"7M": 7.2, "26M": 25.8, "50M": 50.9, "120M": 63.6, "300M": 303, "500M": 497, "700M": 690, "1B": 1010}


@pytest.mark.parametrize("variant", model.VARIANTS)
def test_variant_sizes(variant):
    n_vocab = 6400 if variant == "26M" else 50259
    published = model.count_parameters(model.make_config(variant, n_vocab, {}, "published"))
    assert published / 1e6 == pytest.approx(PUBLISHED[variant], rel=0.008)
    assert model.PARAMETERS[variant] == model.count_parameters(model.make_config(variant, n_vocab, {}))
    assert model.PARAMETERS[variant] == pytest.approx(published, rel=0.02)


@settings(max_examples=150)
@given(
    arch=st.sampled_from(ARCHS),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)]),
    overrides=st.fixed_dictionaries({}, optional={
        name: st.sampled_from(values) for name, values in dict(
            pos_embd=["none", "learned", "rope"], rope_pct=[0.0, 0.5, 1.0], norm=["layernorm", "rmsnorm", "none"],
            norm_weight=[False, True], norm_position=["pre", "post"], embd_norm=[False, True], qk_norm=[False, True],
            activation=sorted(model.ACTIVATIONS), bias=["none", "qkv", "attn", "all"], parallel_residual=[False, True],
            tie_word_embeddings=[False, True], head_dim=[0, 8, 20], n_inner=[0, 33, 64], n_layer=[1, 2, 3],
            vocab_size=[63, 64, 65, 300],
        ).items()
    }),
)  # fmt: skip
def test_any_combination_in_c_and_in_plain_pytorch(arch, heads, overrides):
    """Its size; training in C against the plain operators; tokens one by one, in C, against the full pass."""
    shape = dict(n_head=heads[0], n_kv_head=heads[1], n_embd=24 * heads[0])
    gpt = half_gpt(arch, **{**shape, **overrides}).train()
    if gpt.config.norm == "none":  # else numbers grow from block to block, and with them what rounding does
        for p in gpt.parameters():
            p.data = (p.data / 3).half().float()
    assert model.count_parameters(gpt.config) == sum(p.numel() for p in gpt.parameters())
    ours = loss_and_gradients(gpt, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "training_library", lambda x: None)
        plain = loss_and_gradients(gpt, None)
    assert_close_each(ours, plain, 1e-4)
    with torch.no_grad():
        idx = random_tokens(2, 13, vocab_size=gpt.config.vocab_size)
        expected = gpt.eval()(idx)
        model.prepare_generation(gpt, "auto")
        cache = model.KVCache(gpt, 2, 13)
        logits = torch.cat([read(gpt, token, cache, 1e-4) for token in idx.split(1, dim=1)], dim=1)
    assert_close_each([logits], [expected], 1e-2)


def test_flops_per_token_of_gpt2_small():
    """PaLM's appendix B by hand: 6 N without positions, and 12 L H Q T."""
    c = model.GPTConfig(**model.ARCHS["gpt2"], vocab_size=50304)
    weights = 12 * (12 * 768**2 + 13 * 768) + 2 * 768 + 50304 * 768
    assert model.training_flops_per_token(c) == 6 * weights + 12 * 12 * 12 * 64 * 1024


@pytest.mark.parametrize("arch", ARCHS)
def test_initial_weights(arch):
    """gpt2: GPT-2 paper 2.3 and nanoGPT; the others: transformers' initializer_range 0.02; nanochat: its gpt.py."""
    torch.manual_seed(0)
    c = tiny_config(arch, n_layer=3, n_embd=128, vocab_size=512, block_size=128)
    gpt = model.GPT(c)
    for name, p in gpt.named_parameters():
        if p.dim() == 1:
            assert torch.all(p == (0 if name.endswith("bias") else 1)), name
            continue
        expected = 0.02
        if arch == "gpt2" and name.endswith("proj.weight"):
            expected = 0.02 / math.sqrt(6)
        if arch == "nanochat":
            kind = name.split(".")[-2]
            expected = {"wte": 1.0, "lm_head": 0.001, "proj": 0.0}.get(kind, 128**-0.5)
        assert p.std().item() == pytest.approx(expected, rel=0.03), name
    if arch == "nanochat":
        assert gpt.blocks[0].mlp.fc.weight.abs().max() <= math.sqrt(3 / 128)  # uniform, not normal


@pytest.mark.parametrize("vocab_size", [100, 1000, 50_259])
@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
def test_bfloat16_loss_is_that_of_the_same_logits_in_float32(vocab_size, scale):
    """Summed over 99 rows, likely and unlikely targets; gradients within the rounding."""
    rng = torch.Generator().manual_seed(0)
    logits = (torch.randn(99, vocab_size, generator=rng) * scale).bfloat16()
    targets = torch.randint(vocab_size, (99,), generator=rng)
    targets[::3] = logits[::3].argmax(dim=-1)
    targets[::7] = -1
    reference = logits.float().requires_grad_()
    expected = F.cross_entropy(reference, targets, ignore_index=-1, reduction="sum")
    expected.backward()
    loss, grad = model.CrossEntropy(targets)(logits.clone(), slice(0, 99), True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(grad.float(), reference.grad, rtol=1e-2, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch, n_kv_head", [*((arch, 4) for arch in ARCHS), ("llama", 2), ("nanochat", 1)])
def test_half_precision_is_close_to_float32(arch, n_kv_head, dtype):
    """Logits and gradients, for which attention has a way of its own when a CPU trains in bfloat16."""
    plain, gpt = (random_gpt(tiny_config(arch, n_kv_head=n_kv_head)) for _ in range(2))
    idx = random_tokens(2, 17)
    gpt.compute_dtype = dtype
    expected, half = plain(idx), gpt(idx)
    assert half.dtype == torch.float32 and gpt.wte.weight.dtype == torch.float32
    assert 0 < (half - expected).abs().max() < 0.06 * expected.abs().max()
    for each in (plain, gpt):
        each.loss(idx[:, :-1], idx[:, 1:]).backward()
    for (name, p), q in zip(gpt.named_parameters(), plain.parameters(), strict=True):
        assert p.grad.dtype == torch.float32
        assert F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0) > 0.98, name


def test_flash_attention_where_it_cannot_be(monkeypatch, workdir):
    """In float32 and on a CPU it is PyTorch's kernel; and what was trained with it opens where it is not installed."""
    q, k, v = torch.randn(3, 2, 4, 10, 8).unbind()
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=None))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(model.flash_attention_2(q, k, v, None, 0.0), expected)
    gpt = random_gpt(tiny_config("llama", vocab_size=259, attn_implementation="flash_attention_2"))
    save_model("flash.pt", gpt)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: None)
    idx = random_tokens(1, 20)
    torch.testing.assert_close(model.open_model("flash.pt").model.eval()(idx), gpt(idx))
