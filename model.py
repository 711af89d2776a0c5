# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "tiktoken==0.14.0",
#   "tokenizers==0.23.3",
#   "datasets==5.2.0",
#   "tqdm==4.70.1",
#   "safetensors==0.8.0",
# ]
# ///
"""Small language models from 7M to 1B parameters, in one file: the data, the GPT, its training and its use.

python model.py train --variant 7M                                     train (with no data: on Python's own library)
python model.py sample --prompt "def "                                 generate text with the newest checkpoint
python model.py tokenize --dataset shakespeare --txt input.txt         text, folders or URLs -> data/shakespeare/
python model.py train --variant 26M --data shakespeare --max_iters 5000

Read from top to bottom: configuration, the GPT, tokenizers, data, generation, checkpoints, training, distillation,
evaluation, Hugging Face in and out, the subcommands, the parser.
"""

import argparse
import base64
import codecs
import ctypes
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

FORMAT_VERSION = 1  # of checkpoints and of data folders; a reader refuses what is newer than itself
DATA_DIR = Path("data")
CHECKPOINT_DIR = Path("checkpoints")


class UserError(Exception):
    """A mistake of the user's, told in one sentence that names the thing and the remedy; never shown as a traceback."""


# ----------------------------------------------------------------------------------------------------------------------
# Configuration: settings, architectures, variants
# ----------------------------------------------------------------------------------------------------------------------


def setting(default: Any, help: str, choices: tuple = (), type: Callable | None = None) -> Any:
    """A dataclass field that is also a command-line flag: its name, type, default and meaning are declared here
    once."""
    return field(default=default, metadata={"help": help, "choices": choices, "type": type})


@dataclass
class GPTConfig:
    """What a GPT is made of. `--arch` fills in a row of these and every one of them can be overridden on its own."""

    arch: str = "gpt2"
    vocab_size: int = 50259  # tokens of the tokenizer; the embedding is padded to a multiple of 64 rows
    block_size: int = setting(1024, "context length, in tokens")
    n_layer: int = setting(12, "number of transformer blocks")
    n_head: int = setting(12, "number of query heads")
    n_kv_head: int = setting(0, "number of key/value heads: fewer than n_head is GQA, 1 is MQA (0: n_head)")
    n_embd: int = setting(768, "width of the residual stream")
    head_dim: int = setting(0, "width of a head (0: n_embd / n_head)")
    n_inner: int = setting(0, "width of the MLP (0: 4 n_embd; 8/3 n_embd rounded up to 64 for swiglu and geglu)")
    pos_embd: str = setting("learned", "position information", ("none", "learned", "rope"))
    rope_theta: float = setting(10000.0, "base of RoPE's wavelengths")
    rope_pct: float = setting(1.0, "fraction of each head that RoPE rotates")
    rope_scaling: str = setting("none", "RoPE context extension", ("none", "linear", "ntk", "yarn", "llama3"))
    rope_factor: float = setting(1.0, "how many times rope_scaling extends the context")
    rope_original_block_size: int = setting(0, "context length before rope_scaling (0: block_size)")
    rope_attention_factor: float = setting(0.0, "YaRN's factor on cos and sin (0: 0.1 ln(rope_factor) + 1)")
    rope_beta_fast: float = setting(32.0, "YaRN: dimensions with more rotations than this are not interpolated")
    rope_beta_slow: float = setting(1.0, "YaRN: dimensions with fewer rotations than this are fully interpolated")
    rope_low_freq_factor: float = setting(1.0, "llama3 scaling: below this many rotations, interpolate")
    rope_high_freq_factor: float = setting(4.0, "llama3 scaling: above this many rotations, leave alone")
    norm: str = setting("layernorm", "normalisation", ("layernorm", "rmsnorm"))
    norm_weight: bool = setting(True, "norms have learned weights")
    norm_eps: float = setting(1e-5, "epsilon of the norms")
    norm_position: str = setting("pre", "norm before (pre) or after (post) each residual addition", ("pre", "post"))
    embd_norm: bool = setting(False, "normalise the token embedding too")
    qk_norm: bool = setting(False, "RMSNorm on queries and keys (with weights: before RoPE; without: after it)")
    activation: str = setting(
        "gelu_new", "MLP activation", ("gelu", "gelu_new", "relu", "relu2", "silu", "swiglu", "geglu")
    )
    bias: str = setting("all", "which linear layers have biases", ("none", "qkv", "attn", "all"))
    parallel_residual: bool = setting(False, "attention and MLP read the same input and are added together")
    tie_word_embeddings: bool = setting(True, "the head shares the token embedding's weights")
    logit_softcap: float = setting(0.0, "logits become c tanh(logits / c) (0: off)")
    init: str = setting("gpt2", "weight initialisation of this source", ("gpt2", "normal", "nanochat"))
    resid_pdrop: float = setting(0.0, "dropout on each residual branch")
    embd_pdrop: float = setting(0.0, "dropout on the embeddings")
    attn_pdrop: float = setting(0.0, "dropout on the attention weights")
    attn_implementation: str = setting("auto", "attention kernel", ("auto", "eager", "sdpa", "flash_attention_2"))
    gradient_checkpointing: bool = setting(
        False, "recompute each block in the backward pass: less memory, a third slower"
    )

    def __post_init__(self) -> None:
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head < 1 or self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if not self.head_dim:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
            self.head_dim = self.n_embd // self.n_head
        if not self.n_inner:
            self.n_inner = round_up(self.n_embd * 8 / 3, 64) if self.is_glu else 4 * self.n_embd
        if not 0 <= self.rope_pct <= 1:
            raise UserError(f"rope_pct is {self.rope_pct}: it must be between 0 and 1")
        if self.rope_scaling == "ntk" and self.rope_dim < 4:
            raise UserError(
                f"rope_scaling ntk needs at least 4 rotated dimensions, and these heads have {self.rope_dim}"
            )
        if self.pos_embd == "rope" and self.rope_dim % 2:
            raise UserError(f"rope_pct {self.rope_pct} of head_dim {self.head_dim} is not an even number of dimensions")
        if self.rope_scaling != "none" and self.pos_embd != "rope":
            raise UserError(
                f"rope_scaling {self.rope_scaling} needs --pos_embd rope, and this model has {self.pos_embd}"
            )
        if self.rope_factor < 1:
            raise UserError(f"rope_factor is {self.rope_factor}: it must be at least 1")
        for name in ("block_size", "n_layer", "n_embd", "vocab_size", "n_kv_head", "head_dim", "n_inner"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("rope_theta", "norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name} is {getattr(self, name)}: it must be above 0")
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 0 and below 1")

    @property
    def is_glu(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, 64)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope_pct)

    @property
    def context(self) -> int:
        """The longest sequence the positions reach, in tokens: block_size, or what rope_scaling makes of it."""
        if self.rope_scaling == "none":
            return self.block_size
        return max(self.block_size, int((self.rope_original_block_size or self.block_size) * self.rope_factor))


def round_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


# What `--arch` means. The names are Hugging Face model types, so that every export is native.
ARCHS: dict[str, dict[str, Any]] = {
    "gpt2": dict(pos_embd="learned", norm="layernorm", activation="gelu_new", bias="all", init="gpt2"),
    "gpt_neox": dict(pos_embd="rope", norm="layernorm", activation="gelu_new", bias="all", init="normal"),
    "llama": dict(pos_embd="rope", norm="rmsnorm", norm_eps=1e-5, activation="swiglu", bias="none", init="normal"),
    "qwen2": dict(pos_embd="rope", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias="qkv", init="normal"),
    "qwen3": dict(
        pos_embd="rope", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias="none", qk_norm=True, init="normal"
    ),
    "nanochat": dict(
        pos_embd="rope",
        norm="rmsnorm",
        norm_weight=False,
        norm_eps=1e-6,
        embd_norm=True,
        qk_norm=True,
        activation="relu2",
        bias="none",
        tie_word_embeddings=False,
        logit_softcap=15.0,
        init="nanochat",
    ),
}

# How an architecture is trained where that differs from the variant's own recipe.
ARCH_RECIPES: dict[str, dict[str, Any]] = {
    "nanochat": dict(optimizer="muon", schedule="wsd", weight_decay=0.0, embd_lr=0.2, beta1=0.8)
}

# Shapes and recipes. The published ones (NGen3, NGen4, TransformerLM) stand as published.
VARIANTS: dict[str, dict[str, Any]] = {
    "7M": dict(arch="gpt2", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, learning_rate=3e-4),
    "26M": dict(
        arch="llama", n_layer=8, n_head=8, n_kv_head=2, n_embd=512, n_inner=1408, block_size=512, rope_theta=1e6,
        batch_size=32, learning_rate=5e-4,
    ),
    "50M": dict(
        arch="gpt_neox", n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=32, learning_rate=5e-5,
        schedule="linear",
    ),
    "120M": dict(arch="gpt2", n_layer=12, n_head=8, n_embd=512, block_size=256, batch_size=32, learning_rate=3e-4),
    "300M": dict(arch="gpt2", n_layer=20, n_head=16, n_embd=1024, block_size=1024, batch_size=16, learning_rate=3e-4),
    "500M": dict(arch="gpt2", n_layer=22, n_head=20, n_embd=1280, block_size=1024, batch_size=16, learning_rate=2.5e-4),
    "700M": dict(arch="gpt2", n_layer=26, n_head=22, n_embd=1408, block_size=1024, batch_size=16, learning_rate=2.5e-4),
    "1B": dict(arch="gpt2", n_layer=28, n_head=26, n_embd=1664, block_size=1024, batch_size=16, learning_rate=2e-4),
}  # fmt: skip


def make_config(variant: str, vocab_size: int, overrides: dict[str, Any]) -> GPTConfig:
    """The GPTConfig of a variant: its architecture's row, then its shape, then the user's own settings."""
    if variant not in VARIANTS:
        raise UserError(f"unknown variant {variant!r}: choose one of {', '.join(VARIANTS)}")
    shape = VARIANTS[variant]
    arch = overrides.get("arch") or shape["arch"]
    if arch not in ARCHS:
        raise UserError(f"unknown architecture {arch!r}: choose one of {', '.join(ARCHS)}")
    names = {f.name for f in fields(GPTConfig)}
    values = {**ARCHS[arch], **{k: v for k, v in shape.items() if k in names}, **overrides}
    return GPTConfig(**{**values, "arch": arch, "vocab_size": vocab_size})


def count_parameters(c: GPTConfig) -> int:
    """Number of parameters by the closed formula; equals the sum over the built model (tested)."""
    norm = c.n_embd * (c.norm_weight + (c.norm_weight and c.norm == "layernorm"))
    q, kv = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    attention = c.n_embd * (q + 2 * kv) + q * c.n_embd
    attention += (q + 2 * kv) * (c.bias != "none") + c.n_embd * (c.bias in ("attn", "all"))
    attention += 2 * c.head_dim * (c.qk_norm and c.norm_weight)
    fan_out = c.n_inner * (1 + c.is_glu)
    mlp = c.n_embd * fan_out + c.n_inner * c.n_embd + (fan_out + c.n_embd) * (c.bias == "all")
    total = c.n_layer * (attention + mlp + 2 * norm) + norm * ((c.norm_position == "pre") + c.embd_norm)
    total += c.padded_vocab_size * c.n_embd * (2 - c.tie_word_embeddings)
    return total + c.block_size * c.n_embd * (c.pos_embd == "learned")


def training_flops_per_token(c: GPTConfig) -> float:
    """FLOPs of a forward and backward pass per token: 6 per matmul parameter and 12 L H Q T for attention (PaLM,
    arXiv 2204.02311, appendix B). The embedding is a look-up and costs nothing; the head is a matmul."""
    lookups = (c.padded_vocab_size * (not c.tie_word_embeddings) + c.block_size * (c.pos_embd == "learned")) * c.n_embd
    return 6 * (count_parameters(c) - lookups) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def training_memory_bytes(c: GPTConfig, micro_batch_size: int) -> float:
    """Estimated bytes that training takes: weights, gradients and AdamW's two moments in float32, and the bfloat16
    activations that the backward pass reads (18 widths and two MLP widths a token and block)."""
    activations = micro_batch_size * c.block_size * c.n_layer * (10 * c.n_embd + (2 + 2 * c.is_glu) * c.n_inner) * 2
    if c.gradient_checkpointing:
        activations = activations / c.n_layer + micro_batch_size * c.block_size * c.n_layer * c.n_embd * 2
    return 16 * count_parameters(c) + activations


# ----------------------------------------------------------------------------------------------------------------------
# The GPT
# ----------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer whose weights follow the activations' dtype. Mixed precision without autocast: master weights stay
    in float32, and what is multiplied is decided by the dtype of the embedding's output."""

    def reset_parameters(self) -> None:
        """GPT.init_weights does it."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), cast to x's dtype, plus bias."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def embedding(n: int, dim: int) -> nn.Embedding:
    """A table (n, dim) that GPT.init_weights fills. nn.Embedding's own way imports torch._dynamo on the
    meta device, which takes 1.5 s."""
    return nn.Embedding(n, dim, _weight=torch.empty(n, dim))


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without learned weights."""

    def __init__(self, config: GPTConfig, dim: int, kind: str | None = None) -> None:
        super().__init__()
        self.dim, self.eps, self.kind = (dim,), config.norm_eps, kind or config.norm
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_weight else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_weight and self.kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.dim, weight, self.eps)
        return F.layer_norm(x, self.dim, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)


def rope_frequencies(c: GPTConfig) -> tuple[Tensor, float]:
    """RoPE's angle per position for each pair of dimensions, (rope_dim / 2,), and the factor on cos and sin.

    linear: positions are divided by the factor. ntk: theta grows by factor^(d / (d - 2)), so that the longest
    wavelength is stretched by the factor and the shortest not at all. yarn: fast dimensions stay, slow ones are
    divided by the factor, a ramp between, and attention is sharpened (arXiv 2309.00071, section 3; transformers'
    modeling_rope_utils). llama3: as yarn with Llama 3.1's thresholds.
    """
    d, theta, factor = c.rope_dim, c.rope_theta, c.rope_factor
    original = c.rope_original_block_size or c.block_size
    if c.rope_scaling == "ntk":
        theta *= factor ** (d / (d - 2))
    freqs = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    if c.rope_scaling == "linear":
        return freqs / factor, 1.0
    if c.rope_scaling == "yarn":

        def dimension(rotations: float) -> float:  # the dimension that turns this often over the original context
            return d * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension(c.rope_beta_fast)), 0)
        high = min(math.ceil(dimension(c.rope_beta_slow)), d - 1)
        ramp = ((torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return freqs * (1 - ramp) + freqs / factor * ramp, c.rope_attention_factor or 0.1 * math.log(factor) + 1
    if c.rope_scaling == "llama3":
        rotations = original * freqs / (2 * math.pi)
        keep = (rotations - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
        keep = keep.clamp(0, 1)
        return freqs * keep + freqs / factor * (1 - keep), 1.0
    return freqs, 1.0


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x's first d dimensions. x (B, T, heads, head_dim); cos and sin (T, 1, d), or
    (B, T, 1, d), hold the angle of each pair twice, and sin its sign: minus in the first half."""
    d = cos.size(-1)
    if d < x.size(-1):
        return torch.cat((apply_rope(x[..., :d], cos, sin), x[..., d:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(d // 2, dims=-1), sin)


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    return F.dropout(x, p) if training and p else x


def causal_mask(T_q: int, T_k: int, device: torch.device) -> Tensor:
    """(T_q, T_k), true where query i, one of the last T_q positions, may see key j."""
    return torch.ones(T_q, T_k, dtype=torch.bool, device=device).tril(T_k - T_q)


# Attention kernels: q (B, n_head, T_q, head_dim), k and v (B, n_kv_head, T_k, head_dim) -> as q. Causal, with queries
# aligned to the last keys, unless a boolean mask (B or 1, 1, T_q, T_k) says what each query sees.


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """The readable reference."""
    groups = q.size(1) // k.size(1)  # GQA: each key/value head serves this many query heads
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    mask = causal_mask(q.size(2), k.size(2), q.device) if mask is None else mask
    att = (q @ k.mT) * q.size(-1) ** -0.5  # (B, n_head, T_q, T_k)
    att = att.masked_fill(~mask, float("-inf")).float().softmax(dim=-1).to(q.dtype)
    return F.dropout(att, dropout_p) @ v


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """PyTorch's fused kernel, its flash kernel where the device has one."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and mask is None and q.size(2) <= 1024:
        return bmm_attention(q, k, v, dropout_p)
    if mask is None and 1 < q.size(2) < k.size(2):
        mask = causal_mask(q.size(2), k.size(2), q.device)
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=mask is None and q.size(2) > 1, enable_gqa=q.size(1) != k.size(1)
    )


def bmm_attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float) -> Tensor:
    """Plain batched products, for training in bfloat16 on a CPU: there the backward pass of PyTorch's fused kernel
    takes four times as long at 128 tokens and twice as long at 512."""
    B, n_head, T, head_dim = q.shape
    groups = n_head // k.size(1)
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q, k, v = (x.reshape(B * n_head, T, head_dim) for x in (q, k, v))
    bias = torch.zeros(T, T, dtype=q.dtype).masked_fill(~causal_mask(T, T, q.device), float("-inf"))
    att = torch.baddbmm(bias, q, k.mT, alpha=head_dim**-0.5).softmax(dim=-1)  # (B n_head, T, T)
    return torch.bmm(F.dropout(att, dropout_p), v).view(B, n_head, T, head_dim)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """The flash-attn package. Its interface has no masks, so padded or packed batches go to PyTorch's kernel."""
    if mask is not None:
        return sdpa_attention(q, k, v, mask, dropout_p)
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=True).transpose(1, 2)


ATTENTION = {"eager": eager_attention, "sdpa": sdpa_attention, "flash_attention_2": flash_attention_2}


def choose_attention(name: str) -> Callable:
    if name == "flash_attention_2":
        try:
            import flash_attn  # noqa: F401
        except ImportError:
            raise UserError(
                "attn_implementation flash_attention_2 needs the flash-attn package (pip install flash-attn) and a "
                "CUDA GPU; --attn_implementation sdpa uses PyTorch's own flash kernel"
            ) from None
    return ATTENTION["sdpa" if name == "auto" else name]


class KVCache:
    """Keys and values of the tokens seen so far, preallocated: kv (n_layer, B, 2 n_kv_head, max_length, head_dim), the
    heads of k before those of v.

    `pad` (B,) counts the padding tokens at the left of each row, for batches of prompts of different lengths.
    """

    def __init__(self, c: GPTConfig, batch_size: int, max_length: int, like: Tensor, pad: Tensor | None = None) -> None:
        shape = (c.n_layer, batch_size, 2 * c.n_kv_head, max_length, c.head_dim)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.length, self.max_length, self.pad = 0, max_length, pad

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, n_kv_head, T, head_dim) to a layer; returns all of its keys and values so far."""
        end, heads = self.length + k.size(2), self.kv[layer].chunk(2, dim=1)
        for memory, new in zip(heads, (k, v), strict=True):
            memory[:, :, self.length : end] = new
        return heads[0][:, :, :end], heads[1][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, c.n_head, c.n_kv_head, c.head_dim
        widths = [c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_kv_head * c.head_dim]
        self.qkv = Linear(c.n_embd, sum(widths), bias=c.bias != "none")
        self.qkv.weight.parts = widths  # Muon orthogonalises each of the fused matrices on its own
        self.proj = Linear(widths[0], c.n_embd, bias=c.bias in ("attn", "all"))
        self.qk_norm = c.qk_norm
        if c.qk_norm:
            self.q_norm, self.k_norm = (Norm(c, c.head_dim, "rmsnorm") for _ in "qk")
        self.norm_first = c.norm_weight  # Qwen 3 normalises, then rotates; nanochat rotates, then normalises
        self.kernel = choose_attention(c.attn_implementation)
        self.attn_pdrop, self.resid_pdrop = c.attn_pdrop, c.resid_pdrop

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, cache: KVCache | None, mask: Tensor | None
    ) -> Tensor:
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.head_dim)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)  # (B, T, heads, head_dim)
        if self.qk_norm and self.norm_first:
            qk = self.normalise(qk)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        if self.qk_norm and not self.norm_first:
            qk = self.normalise(qk)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, head_dim)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.kernel(q, k, v, mask, self.attn_pdrop if self.training else 0.0)
        return dropout(self.proj(y.transpose(1, 2).reshape(B, T, -1)), self.resid_pdrop, self.training)

    def normalise(self, qk: Tensor) -> Tensor:
        """QK-norm of queries and keys (B, T, n_head + n_kv_head, head_dim)."""
        if self.q_norm.weight is None:
            return self.q_norm(qk)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        return torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)


ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
    "swiglu": F.silu,  # of the gate
    "geglu": F.gelu,
}


class MLP(nn.Module):
    """Two linear layers with an activation between; for GLUs the gate and the value come from one matrix."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.is_glu, self.activation = c.is_glu, ACTIVATIONS[c.activation]
        self.fc = Linear(c.n_embd, c.n_inner * (1 + c.is_glu), bias=c.bias == "all")
        self.fc.weight.parts = [c.n_inner] * (1 + c.is_glu)
        self.proj = Linear(c.n_inner, c.n_embd, bias=c.bias == "all")
        self.resid_pdrop = c.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.is_glu:
            gate, value = x.chunk(2, dim=-1)
            x = self.activation(gate) * value
        else:
            x = self.activation(x)
        return dropout(self.proj(x), self.resid_pdrop, self.training)


class Block(nn.Module):
    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm_1, self.attn = Norm(c, c.n_embd), Attention(c, layer)
        self.norm_2, self.mlp = Norm(c, c.n_embd), MLP(c)
        self.pre_norm, self.parallel = c.norm_position == "pre", c.parallel_residual

    def linears(self) -> list[tuple[nn.Module, str]]:
        """Where the linear layers hang: (module, name of its attribute)."""
        return [(self.attn, "qkv"), (self.attn, "proj"), (self.mlp, "fc"), (self.mlp, "proj")]

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        if self.pre_norm and self.parallel:  # Pythia
            return x + self.attn(self.norm_1(x), *attention_inputs) + self.mlp(self.norm_2(x))
        if self.pre_norm:
            x = x + self.attn(self.norm_1(x), *attention_inputs)
            return x + self.mlp(self.norm_2(x))
        x = self.norm_1(x + self.attn(x, *attention_inputs))
        return self.norm_2(x + self.mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer with every architecture of ARCHS and every override of GPTConfig."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.wte = embedding(c.padded_vocab_size, c.n_embd)
        self.wpe = embedding(c.block_size, c.n_embd) if c.pos_embd == "learned" else None
        self.embd_norm = Norm(c, c.n_embd) if c.embd_norm else None
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm_f = Norm(c, c.n_embd) if c.norm_position == "pre" else None
        self.lm_head = None if c.tie_word_embeddings else Linear(c.n_embd, c.padded_vocab_size, bias=False)
        self.compute_dtype = torch.float32  # of the activations
        self.compiled: Callable | None = None  # `hidden` as torch.compile made it, for training
        self.decoder: Decoder | None = None  # the blocks and the head for a few tokens, see prepare_generation
        self.build_rope()
        if self.wte.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """gpt2: N(0, 0.02), residual projections divided by sqrt(2 n_layer) (GPT-2 paper, section 2.3). normal: N(0,
        0.02) throughout (transformers' GPT-NeoX, Llama, Qwen). nanochat: unit embedding, uniform matrices of variance
        1 / n_embd, zero projections and a head near zero (nanochat's gpt.py)."""
        c = self.config
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                p.zero_()
            elif p.dim() < 2:
                p.fill_(1.0)
            elif c.init == "gpt2" and "proj" in name:
                p.normal_(0.0, 0.02 / math.sqrt(2 * c.n_layer))
            elif c.init != "nanochat" or "wpe" in name:
                p.normal_(0.0, 0.02)
            elif "wte" in name:
                p.normal_(0.0, 0.02 if c.tie_word_embeddings else 1.0)
            elif "lm_head" in name:
                p.normal_(0.0, 0.001)
            elif "proj" in name:
                p.zero_()
            else:
                p.uniform_(-((3 / c.n_embd) ** 0.5), (3 / c.n_embd) ** 0.5)

    def build_rope(self) -> None:
        """Tables of cos and sin for apply_rope, (context, 1, rope_dim) float32; built again when the scaling is
        changed."""
        self.rope_cos = self.rope_sin = None
        device = self.wte.weight.device
        if self.config.pos_embd == "rope" and device.type != "meta":
            freqs, factor = rope_frequencies(self.config)
            angles = torch.outer(torch.arange(self.config.context, dtype=torch.float32), freqs)[:, None]
            cos, sin = torch.cos(angles) * factor, torch.sin(angles) * factor
            self.rope_cos = torch.cat((cos, cos), dim=-1).to(device)
            self.rope_sin = torch.cat((-sin, sin), dim=-1).to(device)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> "GPT":
        super()._apply(fn, *args, **kwargs)
        if self.rope_cos is not None:  # follows the device and not the dtype
            self.rope_cos, self.rope_sin = (x.to(self.wte.weight.device) for x in (self.rope_cos, self.rope_sin))
        return self

    def extend_context(self, rope_scaling: str, rope_factor: float, block_size: int = 0) -> None:
        """Change the RoPE scaling of a trained model, which reaches rope_factor times its context from then on."""
        c = self.config
        original = c.rope_original_block_size or c.block_size
        self.config = replace(
            c,
            rope_scaling=rope_scaling,
            rope_factor=rope_factor,
            rope_original_block_size=original,
            block_size=block_size or c.block_size,
        )
        self.build_rope()

    @property
    def head_weight(self) -> Tensor:
        """(padded_vocab_size, n_embd)"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, idx: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """The final hidden states (B, T, n_embd) of tokens idx (B, T).

        With a cache, idx continues what the cache holds, and is appended to it. `segments` (B, T) numbers the documents
        packed into each row: none sees another, and each has its own positions from 0.
        """
        T, c = idx.size(1), self.config
        start = cache.length if cache is not None else 0
        positions, mask = slice(start, start + T), None
        if segments is not None:
            index = torch.arange(T, device=idx.device)
            first = segments != F.pad(segments, (1, 0), value=-1)[:, :-1]  # true at the first token of each document
            positions = index - (index * first).cummax(dim=1).values
            mask = ((segments[:, :, None] == segments[:, None, :]) & causal_mask(T, T, idx.device))[:, None]
        elif cache is not None and cache.pad is not None:
            index = torch.arange(start + T, device=idx.device)
            positions = (index[start:] - cache.pad[:, None]).clamp(min=0)
            # padding sees itself, so that no row of the softmax is empty
            mask = (index >= cache.pad[:, None, None]) | (index == index[start:, None])
            mask = (mask & causal_mask(T, start + T, idx.device))[:, None]

        x = self.wte(idx).to(self.compute_dtype)
        if self.wpe is not None:
            x = x + self.wpe.weight[positions].to(x.dtype)
        if self.embd_norm is not None:
            x = self.embd_norm(x)
        x = dropout(x, c.embd_pdrop, self.training)
        if self.decoder is not None and cache is not None and idx.numel() <= self.decoder.max_rows:
            x = self.decoder(x, cache)
        else:
            x = self.apply_blocks(x, positions, cache, mask)
        if cache is not None:
            cache.length += T
        return x if self.norm_f is None else self.norm_f(x)

    def apply_blocks(self, x: Tensor, positions: Any, cache: KVCache | None, mask: Tensor | None) -> Tensor:
        rope = None
        if self.rope_cos is not None:
            rope = self.rope_cos[positions].to(x.dtype), self.rope_sin[positions].to(x.dtype)
        for block in self.blocks:
            if self.config.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, cache, mask, use_reentrant=False)
            else:
                x = block(x, rope, cache, mask)
        return x

    def trunk(self, idx: Tensor, segments: Tensor | None = None) -> Tensor:
        """hidden, compiled where that was asked for. Evaluation and generation, whose shapes vary, are not."""
        return (self.compiled if self.training and self.compiled else self.hidden)(idx, segments=segments)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> logits (..., vocab_size), float32; padding rows of the head are left out."""
        if self.decoder is not None and x.numel() <= self.decoder.max_rows * x.size(-1):
            logits = self.decoder.head(x)
        elif isinstance(self.lm_head, Int8Linear):
            logits = self.lm_head(x)[..., : self.config.vocab_size]
        else:
            logits = linear(x, self.head_weight[: self.config.vocab_size]).float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx: Tensor, cache: KVCache | None = None, segments: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab_size), float32."""
        return self.logits(self.hidden(idx, cache, segments))

    def loss(self, idx: Tensor, targets: Tensor, segments: Tensor | None = None) -> Tensor:
        """Sum of the cross-entropy, in nats, of targets (B, T) given tokens idx (B, T); a target of -1 does not
        count."""
        return linear_loss(self.trunk(idx, segments), self, CrossEntropy(targets))


# The head and the loss together. A vocabulary of 50,000 makes the logits the largest tensor of a small model's step by
# far, so they never exist at once: tokens go through the head in chunks, and each chunk's gradient is taken right away.


class CrossEntropy:
    """Objective of linear_loss: the sum of -log p(target) over targets (any shape) that are not -1."""

    chunk_divisor = 1

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets.flatten()

    def __call__(self, logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        """logits (rows, vocab) -> the sum of the loss, and its gradient by the logits if wanted. May overwrite
        logits."""
        targets = self.targets[rows]
        counted, row = targets >= 0, torch.arange(len(targets), device=targets.device)
        targets = targets.clamp(min=0)
        if logits.dtype == torch.bfloat16 and logits.device.type == "cpu":
            loss, probs = softmax_and_loss_bfloat16(logits, row, targets)
        else:
            probs = logits.float().log_softmax(dim=-1) if logits.dtype != torch.float64 else logits.log_softmax(dim=-1)
            loss = -probs[row, targets]
            probs = probs.exp_() if with_grad else probs
        total = (loss * counted).sum()
        if not with_grad:
            return total, None
        probs[row, targets] = torch.expm1(-loss).to(probs.dtype)  # p - 1, without cancellation
        return total, probs.mul_(counted[:, None]).to(logits.dtype)


def softmax_and_loss_bfloat16(logits: Tensor, row: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log p(target) (rows,) float32, and the softmax of bfloat16 logits in their own memory: one pass over them, where
    a float32 log-softmax takes four times as long on a CPU. log(sum(exp)) is logit - log p in any column; over 256 of
    them the rounding of p averages out."""
    columns = slice(None, None, max(1, logits.size(1) // 256))
    few, target = logits[:, columns].float(), logits[row, targets].float()
    torch.softmax(logits, dim=-1, out=logits)
    p = logits[:, columns].float()
    usable = p > 1e-30  # neither underflown nor padding
    logsumexp = torch.where(usable, few - p.log(), 0.0).sum(dim=-1) / usable.sum(dim=-1).clamp(min=1)
    return logsumexp - target, logits


class FusedLinearLoss(torch.autograd.Function):
    """objective(h @ weight.T) in chunks of rows, with the gradients taken chunk by chunk in the forward pass
    (as Liger Kernel's fused linear cross-entropy does, arXiv 2410.10989, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, objective: Callable, c: GPTConfig, with_grad: bool) -> Tensor:
        w, N, V = weight.to(h.dtype), h.size(0), weight.size(0)
        chunk = min(N, max(64, LOSS_CHUNK_ELEMENTS // (V * objective.chunk_divisor)))
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32
        loss = torch.zeros((), device=h.device, dtype=wide)
        grad_h = torch.empty_like(h) if with_grad else None
        grad_w = torch.zeros(weight.shape, dtype=wide, device=h.device) if with_grad and weight.requires_grad else None
        memory, product = h.new_empty(chunk, V), None
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            x = h[rows]
            logits = torch.mm(x, w.T, out=memory[: len(x)])
            if c.logit_softcap:
                tanh = torch.tanh(logits / c.logit_softcap)
                logits = c.logit_softcap * tanh
            logits[:, c.vocab_size :] = float("-inf")  # padding
            part, grad_logits = objective(logits, rows, with_grad)
            loss += part
            if not with_grad:
                continue
            if c.logit_softcap:
                grad_logits *= 1 - tanh.square()
            torch.mm(grad_logits, w, out=grad_h[rows])
            if grad_w is None:  # a frozen head
                continue
            if h.dtype == wide:
                grad_w.addmm_(grad_logits.T, x)
            else:  # products of a chunk in the short type, their sum in the long one
                product = torch.empty_like(w) if product is None else product
                grad_w += torch.mm(grad_logits.T, x, out=product)
        ctx.gradients = grad_h, grad_w
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        grad_h, grad_w = ctx.gradients
        del ctx.gradients  # so that autograd takes them over without a copy
        grad_h = grad_h.mul_(grad_output.to(grad_h.dtype))
        return grad_h, None if grad_w is None else grad_w.mul_(grad_output), None, None, None


LOSS_CHUNK_ELEMENTS = 512 * 50304  # of logits: 512 rows of GPT-2's vocabulary were fastest among 64 ... 1024 on a CPU


def linear_loss(h: Tensor, model: GPT, objective: Callable) -> Tensor:
    """The sum of an objective over hidden states h (B, T, n_embd), through the model's head. Scalar, differentiable."""
    h, c, weight = h.flatten(0, -2), model.config, model.head_weight
    with_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    return FusedLinearLoss.apply(h, weight, objective, c, with_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------

EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # tiktoken's r50k


@functools.cache
def byte_to_unicode() -> dict[int, str]:
    """GPT-2's printable character for each byte, in which tokenizer.json writes byte-level vocabularies."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


@functools.cache
def unicode_to_byte() -> dict[str, int]:
    return {c: b for b, c in byte_to_unicode().items()}


class Tokenizer:
    """Text to token ids and back. `gpt2`, `bpe` and `byte` are tiktoken encodings with different ranks; `hf` is a
    tokenizer.json served by the tokenizers package. Special tokens are never recognised in text.

    n_vocab: number of token ids. special: name -> id of the special tokens. bos: ids that open every prompt. A caller
    that has opened an `hf` spec's tokenizer.json already hands it over as backend.
    """

    def __init__(self, spec: dict[str, Any], backend: Any = None) -> None:
        self.spec, self.kind, self.name = spec, spec["kind"], spec["name"]
        self.special: dict[str, int] = spec["special"]
        self.bos: list[int] = spec.get("bos", [])
        if self.kind == "hf":
            import tokenizers

            self.backend = backend or tokenizers.Tokenizer.from_str(spec["json"])
            self.backend.encode_special_tokens = True  # as text, not as special tokens
            self.backend.no_truncation()
            self.middle = without_prefix(spec["json"], self.backend)
            self.n_vocab = max(self.backend.get_vocab().values()) + 1
        else:
            import tiktoken

            if self.kind == "byte":
                ranks = {bytes([b]): b for b in range(256)}
            else:
                ranks = {base64.b64decode(token): rank for rank, token in enumerate(spec["ranks"].split())}
            pattern = r"[\s\S]" if self.kind == "byte" else GPT2_PATTERN
            self.backend = tiktoken.Encoding(
                self.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.special
            )
            self.n_vocab = self.backend.n_vocab

    @property
    def eot(self) -> int | None:
        """The id that ends a document."""
        return self.special.get(EOT)

    @functools.cached_property
    def digest(self) -> str:
        """Of what it does, not of its name: two tokenizers with one digest map the same text to the same ids."""
        content = {k: v for k, v in self.spec.items() if k in ("kind", "ranks", "json", "special")}
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text; if it continues another, without what a tokenizer may put before the first word."""
        if self.kind == "byte":
            return list(text.encode("utf-8", "replace"))
        if self.kind == "hf":
            backend = self.middle if continues else self.backend
            return backend.encode(text.encode("utf-8", "replace").decode(), add_special_tokens=False).ids
        return self.backend.encode_ordinary(text)

    def prompt(self, text: str) -> list[int]:
        """The ids that a model continues: never none."""
        return self.bos + self.encode(text) or ([self.eot] if self.eot is not None else self.encode("\n"))

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered chat template, in which special tokens are special."""
        if self.kind != "hf":
            return self.backend.encode(text, allowed_special="all")
        self.backend.encode_special_tokens = False
        ids = self.backend.encode(text, add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        return ids

    def without_special(self, text: str) -> str:
        """Text with the names of special tokens taken out, for what a user wrote into a chat template."""
        while any(name in text for name in self.control_tokens):  # taking one out may put another together
            for name in self.control_tokens:
                text = text.replace(name, "")
        return text

    @functools.cached_property
    def control_tokens(self) -> list[str]:
        if self.kind != "hf":
            return list(self.special)
        return [t.content for t in self.backend.get_added_tokens_decoder().values() if t.special]

    @functools.cached_property
    def begins_with_space(self) -> Tensor:
        """(n_vocab,), true for the tokens whose text begins with a space."""
        return torch.tensor([self.decode([i]).startswith(" ") for i in range(self.n_vocab)])

    def encode_array(self, text: str, dtype: np.dtype, continues: bool = False) -> np.ndarray:
        """encode, as an array."""
        if self.kind == "byte":
            return np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(dtype)
        if self.kind != "hf":
            with suppress(UnicodeEncodeError):  # half a surrogate pair, which encode mends
                # no Python list: while one is made, no other thread runs
                return self.backend.encode_to_numpy(text, disallowed_special=()).astype(dtype)
        return np.array(self.encode(text, continues), dtype)

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids that are only padding are left out."""
        ids = [i for i in ids if i < self.n_vocab]
        if self.kind == "hf":
            return self.backend.decode(ids, skip_special_tokens=False)
        return self.backend.decode_bytes(ids).decode("utf-8", "replace")

    @functools.cached_property
    def is_bytes(self) -> bool:
        """Whether tokens are sequences of bytes, as in all vocabularies but SentencePiece's."""
        return self.kind != "hf" or type(self.backend.decoder).__name__ == "ByteLevel"

    @functools.cached_property
    def added_tokens(self) -> dict[int, bytes]:
        return {i: t.content.encode() for i, t in self.backend.get_added_tokens_decoder().items()}

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for, where is_bytes."""
        if self.kind != "hf":
            return self.backend.decode_single_token_bytes(token)
        if token in self.added_tokens:
            return self.added_tokens[token]
        chars, to_byte = self.backend.id_to_token(token) or "", unicode_to_byte()
        return bytes(to_byte[c] for c in chars) if to_byte.keys() >= set(chars) else b""

    def token_text(self, i: int) -> str | None:
        """A token as tokenizer.json writes it: for byte-level vocabularies a character for each byte."""
        if self.kind == "hf":
            return self.backend.id_to_token(i)
        char = byte_to_unicode()
        return "".join(char[b] for b in self.backend.decode_single_token_bytes(i))

    def token_bytes(self) -> np.ndarray:
        """(n_vocab,) bytes of text that each token stands for; 0 for the special ones. For bits per byte."""
        if self.kind != "hf":
            tokens = [self.backend.decode_single_token_bytes(i) for i in range(self.n_vocab - len(self.special))]
            return np.array([len(t) for t in tokens] + [0] * len(self.special), np.int32)
        lengths = np.zeros(self.n_vocab, np.int32)
        byte_level = '"ByteLevel"' in self.spec["json"]
        added = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            is_byte = len(token) == 6 and token.startswith("<0x")  # SentencePiece's byte fallback
            length = len(token) if byte_level else 1 if is_byte else len(token.replace("▁", " ").encode())
            lengths[i] = 0 if i in added else length
        return lengths

    def describe(self) -> str:
        return f"{self.name} ({self.n_vocab:,} tokens)"


def without_prefix(text: str, backend: Any) -> Any:
    """The tokenizers.Tokenizer of a tokenizer.json, for text that continues other text: SentencePiece's kind puts a
    space before each text it is given. The backend itself where there is no such thing."""
    import tokenizers

    if '"Prepend"' not in text and '"prepend_scheme"' not in text:
        return backend

    def strip(node: Any) -> Any:
        if isinstance(node, dict):
            node = {k: strip(v) for k, v in node.items() if not (isinstance(v, dict) and v.get("type") == "Prepend")}
            return {**node, "prepend_scheme": "never"} if "prepend_scheme" in node else node
        if isinstance(node, list):
            return [strip(v) for v in node if not (isinstance(v, dict) and v.get("type") == "Prepend")]
        return node

    spec = json.loads(text)
    spec.update({k: strip({k: spec.get(k)}).get(k) for k in ("normalizer", "pre_tokenizer")})
    made = tokenizers.Tokenizer.from_str(json.dumps(spec))
    made.encode_special_tokens = True
    made.no_truncation()
    return made


def with_special_tokens(kind: str, name: str, tokens: list[bytes]) -> Tokenizer:
    """One of our own tokenizers, from its ordinary tokens in the order of their ids."""
    special = {t: len(tokens) + i for i, t in enumerate((EOT, IM_START, IM_END))}
    spec = {"kind": kind, "name": name, "special": special}
    if kind != "byte":
        spec["ranks"] = "\n".join(base64.b64encode(t).decode() for t in tokens)
    return Tokenizer(spec)


def gpt2_tokenizer() -> Tokenizer:
    import tiktoken

    try:
        ranks = tiktoken.get_encoding("r50k_base")._mergeable_ranks
    except Exception as e:  # requests, urllib3 and tiktoken each have their own
        raise UserError(
            f"GPT-2's vocabulary is not on this machine and could not be fetched ({type(e).__name__}): go online "
            "once, or use --tokenizer bpe, which learns a vocabulary from your text, or --tokenizer byte"
        ) from None
    return with_special_tokens("gpt2", "gpt2", sorted(ranks, key=ranks.get))


def byte_tokenizer() -> Tokenizer:
    return with_special_tokens("byte", "byte", [bytes([b]) for b in range(256)])


def train_bpe(texts: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """A byte-level BPE of vocab_size tokens, special ones included, learned from texts with GPT-2's split pattern."""
    import tokenizers

    if vocab_size < 259:
        raise UserError(f"vocab_size is {vocab_size}: a bpe needs 256 bytes and 3 special tokens, so at least 259")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 3, initial_alphabet=alphabet, show_progress=progress, special_tokens=[]
    )
    bpe.train_from_iterator(texts, trainer)
    to_byte = unicode_to_byte()
    vocab = bpe.get_vocab()
    tokens = [bytes(to_byte[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    return with_special_tokens("bpe", f"bpe-{len(tokens) + 3}", tokens)


def hf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or a tokenizer.json itself with the tokenizer_config.json beside
    it."""
    import tokenizers

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{path} has no tokenizer.json")
    try:
        text = file.read_text(encoding="utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the Rust side raises plain Exception
        raise UserError(f"{file} is not a Hugging Face tokenizer.json: {e}") from None
    config = read_json_object(file.with_name("tokenizer_config.json"), {})
    eos = config.get("eos_token") or EOT
    eos = eos["content"] if isinstance(eos, dict) else eos
    special = {t: backend.token_to_id(t) for t in (EOT, IM_START, IM_END) if backend.token_to_id(t) is not None}
    if backend.token_to_id(eos) is not None and (EOT not in special or eos != IM_END):
        special[EOT] = backend.token_to_id(eos)
    template = file.with_name("chat_template.jinja")
    spec = {"kind": "hf", "name": file.parent.name, "json": text, "special": special}
    spec["bos"] = backend.encode("").ids  # what its post-processor puts before a text
    spec["eos_token"] = eos
    bos = config.get("bos_token")
    spec["bos_token"] = bos["content"] if isinstance(bos, dict) else bos
    spec["chat_template"] = template.read_text(encoding="utf-8") if template.is_file() else config.get("chat_template")
    return Tokenizer(spec, backend)


def load_tokenizer(name: str) -> Tokenizer:
    """A tokenizer by the name that --tokenizer takes, `bpe` aside, which must be trained."""
    if name == "gpt2":
        return gpt2_tokenizer()
    if name == "byte":
        return byte_tokenizer()
    for path in (Path(name), CHECKPOINT_DIR / name):
        if path.exists():
            return Tokenizer(load_checkpoint(path)["tokenizer"]) if path.suffix == ".pt" else hf_tokenizer(path)
    raise UserError(
        f"unknown tokenizer {name!r}: gpt2, bpe, byte, a checkpoint, or a folder or file with a tokenizer.json"
    )


class TextStream:
    """Token ids in, text out as soon as it is whole: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.ids, self.start, self.shown = tokenizer, [], 0, 0
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int | None) -> str:
        """The text that a token completes; None flushes what is left."""
        if self.tokenizer.is_bytes:
            known = token is not None and token < self.tokenizer.n_vocab
            return self.utf8.decode(self.tokenizer.bytes_of(token) if known else b"", final=token is None)
        if token is not None:
            self.ids.append(token)
        before = self.tokenizer.decode(self.ids[self.start : self.shown])
        after = self.tokenizer.decode(self.ids[self.start :])
        if after.endswith("\ufffd") and token is not None and len(self.ids) - self.shown < 8:
            return ""
        self.start, self.shown = self.shown, len(self.ids)
        return after[len(before) :]


# ----------------------------------------------------------------------------------------------------------------------
# Data: text sources, tokenization, data folders, batches
# ----------------------------------------------------------------------------------------------------------------------

PIECE_CHARS = 1 << 20  # text goes to the tokenizer in pieces of about this length


def read_json(path: Path, default: Any = None) -> Any:
    """The contents of a JSON file, or the default if there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if default is None:
            raise
        return default
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from None


def read_json_object(path: Path, default: Any = None) -> dict[str, Any]:
    content = read_json(path, default)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__} and should hold an object: {{...}}")
    return content


@contextmanager
def atomic_write(path: Path) -> Iterator[io.BufferedWriter]:
    """A binary file that appears under its name when it is whole and on the disk, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def download(url: str, path: Path, retries: int = 3, timeout: float = 30.0) -> None:
    """Fetch a URL into a file, which appears only when whole. Raises UserError when it cannot be had."""
    import http.client
    import urllib.error
    import urllib.request

    for attempt in range(retries):
        try:
            request = urllib.request.Request(url, headers={"User-Agent": "model.py"})
            with urllib.request.urlopen(request, timeout=timeout) as response, atomic_write(path) as f:
                total, received = int(response.headers.get("Content-Length") or 0), 0
                with progress_bar(total=total or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                    while block := response.read(1 << 16):
                        f.write(block)
                        received += len(block)
                        bar.update(len(block))
                if total and received != total:
                    raise OSError(f"the connection ended after {received:,} of {total:,} bytes")
            return
        except (OSError, ValueError, http.client.HTTPException) as e:  # URLError and time-outs are OSErrors
            reason = getattr(e, "reason", None) or e
            permanent = isinstance(e, (ValueError, http.client.InvalidURL))
            permanent = permanent or (isinstance(e, urllib.error.HTTPError) and e.code < 500)
            if permanent or attempt == retries - 1:
                raise UserError(f"cannot download {url}: {reason}") from None
            time.sleep(2**attempt)


def looks_binary(path: Path) -> bool:
    with open(path, "rb") as f:
        return b"\0" in f.read(8192)


def text_files(sources: list[str], scratch: Path) -> list[Path]:
    """The files that --txt names: files, folders (every text file below, in an order that mixes the subfolders, so that
    the last tenth is a fair validation split), URLs, and - for standard input (both fetched into scratch first)."""
    files = []
    for i, source in enumerate(sources):
        path = Path(source)
        if source == "-":
            path = scratch / "standard_input.txt"
            with atomic_write(path) as f:
                while block := sys.stdin.buffer.read(1 << 20):
                    f.write(block)
        elif "://" in source:
            if not source.startswith(("http://", "https://")):
                raise UserError(f"{source}: only http and https URLs can be fetched")
            path = scratch / f"{i}_{source.rstrip('/').rsplit('/', 1)[-1].split('?')[0] or 'download.txt'}"
            download(source, path)
        elif path.is_dir():
            found = [
                p
                for p in path.rglob("*")
                if p.is_file() and not any(q.startswith(".") for q in p.relative_to(path).parts)
            ]
            found = [p for p in found if p.stat().st_size and not looks_binary(p)]
            if not found:
                raise UserError(f"{source} is a directory without text files")
            files += sorted(found, key=lambda p: hashlib.md5(p.relative_to(path).as_posix().encode()).digest())
            continue
        elif not path.exists():
            raise UserError(f"{source}: no such file, folder or URL")
        files.append(path)
    if not any(p.stat().st_size for p in files):
        raise UserError(f"{', '.join(sources)}: there is no text in it, the source is empty")
    return files


def read_text(path: Path, encoding: str, errors: str, bar: tqdm | None = None) -> Iterator[str]:
    """The text of a file in blocks. Raises UserError with the byte offset of what is not in the encoding."""
    try:
        if not codecs.lookup(encoding)._is_text_encoding:
            raise LookupError(f"{encoding} is not an encoding of text")
        decoder = codecs.getincrementaldecoder(encoding)(errors)
    except LookupError as e:
        raise UserError(f"--encoding: {e}") from None
    offset = 0
    with open(path, "rb") as f:
        while True:
            block = f.read(PIECE_CHARS)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                at = offset + len(block) - len(e.object) + e.start  # e.object ends where the block does
                raise UserError(
                    f"{path}: byte {at:,} (0x{e.object[e.start]:02x}) is not {encoding}: name the right one with "
                    "--encoding (for example latin-1), or use --errors replace"
                ) from None
            if text:
                yield text
            if not block:
                return
            offset += len(block)
            if bar is not None:
                bar.update(len(block))


def split_point(text: str) -> int:
    """Where text may be cut without changing its tokens: before the last white space that follows a letter or digit,
    which ends a piece in GPT-2's split pattern and in every other in common use. 0 if there is none near the end."""
    for i in range(len(text) - 1, max(len(text) - PIECE_CHARS // 4, 0), -1):
        if text[i] in " \n\t\r" and text[i - 1].isalnum():
            return i
    return 0


def text_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Regroup a document into pieces of about PIECE_CHARS that can be tokenized one by one."""
    text = ""
    for block in blocks:
        text += block
        if len(text) >= PIECE_CHARS:
            cut = split_point(text)
            if not cut and len(text) >= 16 * PIECE_CHARS:  # no white space for megabytes: cut anywhere
                cut = len(text)
            if cut:
                yield text[:cut]
                text = text[cut:]
    if text:
        yield text


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[str | None], dtype: np.dtype) -> Iterator[np.ndarray]:
    """Token ids of pieces, in order, tokenized on all cores (tiktoken and tokenizers release the GIL); None, the end of
    a document, becomes the end-of-text token."""
    end = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype)

    def encode(piece: str | None, continues: bool) -> np.ndarray:
        return end if piece is None else tokenizer.encode_array(piece, dtype, continues)

    workers, continues = os.cpu_count() or 1, False
    with ThreadPoolExecutor(workers) as pool:
        pending = []
        for piece in pieces:
            pending.append(pool.submit(encode, piece, continues))
            continues = piece is not None
            if len(pending) > workers:  # bounded: a corpus of any size passes through a few megabytes
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def token_dtype(n_vocab: int) -> np.dtype:
    return np.dtype("<u2" if n_vocab <= 65536 else "<u4")


class DataWriter:
    """Writes a data folder. data.bin: token ids, little-endian uint16 or uint32, no header. For conversations also
    mask.bin (one byte a token: 1 where it is a target) and starts.bin (uint64 index of each conversation's first
    token). meta.json comes last, so a folder that has one is whole.

    With a key, which says what is being written, save_progress makes what was written so far a state that a later
    writer of the same key goes on from; `records` counts what the caller had put in by then.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, overwrite: bool, key: str | None = None) -> None:
        check_data_folder_free(folder, overwrite)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.tokenizer, self.dtype, self.key = folder, tokenizer, token_dtype(tokenizer.n_vocab), key
        progress = read_json(folder / ".progress.json", {}) if key else {}
        progress = progress if progress.get("key") == key else {}
        self.records, self.n_tokens = progress.get("records", 0), progress.get("n_tokens", 0)
        n_masked, n_starts = progress.get("n_masked", 0), progress.get("n_starts", 0)
        sizes = {"data.bin": self.n_tokens * self.dtype.itemsize, "mask.bin": n_masked, "starts.bin": n_starts * 8}
        self.files = {}
        for name, size in sizes.items():
            self.files[name] = f = open(folder / f".{name}.tmp", "r+b" if progress else "wb")
            f.truncate(size)
            f.seek(size)

    def write(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append ids; with a mask, they are a conversation."""
        self.files["data.bin"].write(ids.astype(self.dtype, copy=False).tobytes())
        if mask is not None:
            self.files["starts.bin"].write(np.uint64(self.n_tokens).tobytes())
            self.files["mask.bin"].write(mask.astype(np.uint8).tobytes())
        self.n_tokens += len(ids)

    def save_progress(self, records: int) -> None:
        """Make all that was written so far what a later writer goes on from."""
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
        state = {"key": self.key, "records": records, "n_tokens": self.n_tokens}
        state.update(n_masked=self.files["mask.bin"].tell(), n_starts=self.files["starts.bin"].tell() // 8)
        with atomic_write(self.folder / ".progress.json") as f:
            f.write(json.dumps(state).encode())

    def finish(self, val_fraction: float, source: Any) -> dict[str, Any]:
        """Close the files, give them their names and write meta.json, which is returned."""
        if not self.n_tokens:
            raise UserError(f"{source}: there is nothing to tokenize in it")
        val_start = self.n_tokens - min(int(self.n_tokens * val_fraction), 10_000_000)
        (self.folder / "meta.json").unlink(missing_ok=True)  # from here to the new one the folder is not whole
        for name, f in self.files.items():
            f.flush()
            os.fsync(f.fileno())
            f.close()
            os.replace(f.name, self.folder / name)
        starts = np.fromfile(self.folder / "starts.bin", "<u8")
        if len(starts):  # validation begins with a conversation
            val_start = (
                starts[min(np.searchsorted(starts, val_start), len(starts) - 1)] if val_fraction else self.n_tokens
            )
        else:
            (self.folder / "mask.bin").unlink()
            (self.folder / "starts.bin").unlink()
        with open(self.folder / "data.bin", "rb") as f:
            digest = hashlib.blake2b(digest_size=16)
            while block := f.read(1 << 20):
                digest.update(block)
        meta = {
            "format_version": FORMAT_VERSION,
            "dtype": self.dtype.name,
            "n_tokens": self.n_tokens,
            "val_start": int(val_start),
            "digest": digest.hexdigest(),
            "source": source,
            "tokenizer": self.tokenizer.spec,
        }
        with atomic_write(self.folder / "meta.json") as f:
            f.write(json.dumps(meta, indent=1).encode())
        (self.folder / ".progress.json").unlink(missing_ok=True)
        return meta

    def discard(self) -> None:
        """Remove what was written, after an error."""
        for f in self.files.values():
            f.close()
            Path(f.name).unlink(missing_ok=True)
        (self.folder / ".progress.json").unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def check_data_folder_free(folder: Path, overwrite: bool) -> None:
    """Raise UserError if a data set is there and must not be replaced."""
    if (folder / "meta.json").exists():
        if not overwrite:
            raise UserError(f"{folder} is already there: choose another --dataset or add --overwrite")


def tokenize_text(
    folder: Path,
    sources: list[str],
    tokenizer: str | Tokenizer = "gpt2",
    vocab_size: int = 8192,
    encoding: str = "utf-8-sig",
    errors: str = "strict",
    val_fraction: float = 0.1,
    overwrite: bool = False,
    source: Any = None,
) -> dict[str, Any]:
    """Make a data folder of text sources (see text_files). Returns its meta.json and n_bytes. Memory does not grow with
    the text. `source` is what meta.json says of where the text is from, if not the list of sources."""
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}: it must be at least 0 and below 1")
    check_data_folder_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".tokenize-", dir=folder.parent))
    try:
        files = text_files(sources, scratch)
        total = sum(p.stat().st_size for p in files)
        if tokenizer == "bpe":
            made = train_bpe(bpe_sample(files, total, encoding, errors), vocab_size)
        else:
            made = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        writer = DataWriter(folder, made, overwrite)
        try:
            with progress_bar(total=total, unit="B", unit_scale=True, desc="tokenize") as bar:

                def pieces() -> Iterator[str | None]:
                    for i, path in enumerate(files):
                        if i:
                            yield None
                        yield from text_pieces(read_text(path, encoding, errors, bar))

                for ids in encode_pieces(made, pieces(), writer.dtype):
                    writer.write(ids)
            meta = writer.finish(val_fraction, source or describe_sources(sources))
        except BaseException:
            writer.discard()
            raise
        return {**meta, "n_bytes": total}
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def describe_sources(sources: list[str]) -> list[dict[str, Any]]:
    """Where data came from; size and time tell whether a file is still the one that was read."""
    described = []
    for source in sources:
        entry: dict[str, Any] = {"path": source}
        if Path(source).is_file():
            stat = Path(source).stat()
            entry.update(path=str(Path(source).resolve()), bytes=stat.st_size, mtime_ns=stat.st_mtime_ns)
        described.append(entry)
    return described


def bpe_sample(files: list[Path], total: int, encoding: str, errors: str, limit: int = 100_000_000) -> Iterator[str]:
    """The text that a vocabulary is learned from: all of it, or evenly spread pieces of about `limit` bytes in all."""
    keep, owed = min(1.0, limit / max(total, 1)), 0.0
    with progress_bar(total=total, unit="B", unit_scale=True, desc="learn vocabulary") as bar:
        for path in files:
            for piece in text_pieces(read_text(path, encoding, errors, bar)):
                owed += keep
                if owed >= 1 or keep == 1:
                    owed -= 1
                    yield piece


CHAT_FORMATS = ("messages", "sharegpt", "utterances", "alpaca", "prompt")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "model": "assistant",
}


def messages_of(record: dict[str, Any], chat_format: str | None = None) -> list[dict[str, str]] | None:
    """The turns of a record, as role and content, by the form its keys show or chat_format says; None if it has none.

    messages: role, content. sharegpt: conversations of from, value. utterances: strings, user first, in turn.
    alpaca: instruction, input, output. prompt: prompt with completion or response.
    """
    keys = record.keys()
    forms = {
        "messages": "messages" in keys, "sharegpt": "conversations" in keys, "utterances": "utterances" in keys,
        "alpaca": {"instruction", "output"} <= keys, "prompt": "prompt" in keys and bool({"completion",
        "response"} & keys),
    }  # fmt: skip
    form = chat_format or next((name for name, found in forms.items() if found), None)
    if form is None:
        return None
    if not forms[form]:
        raise UserError(f"a record has no {form} conversation: its columns are {', '.join(keys)}")
    column = {"sharegpt": "conversations"}.get(form, form)
    turns = record.get(column) or []
    if form in ("messages", "sharegpt", "utterances"):
        kind = str if form == "utterances" else dict
        wrong = next((t for t in turns if not isinstance(t, kind)), None) if isinstance(turns, list) else turns
        if wrong is not None:
            raise UserError(f"column {column} holds {type(wrong).__name__} {str(wrong)[:60]!r} where {form} has a list "
                            f"of {'strings' if kind is str else 'turns'}")  # fmt: skip
    if form in ("messages", "sharegpt"):
        messages = [{"role": t.get("role", t.get("from")), "content": t.get("content", t.get("value"))} for t in turns]
        messages = [{**m, "role": ROLES.get(m["role"], m["role"])} for m in messages]
    elif form == "utterances":
        messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    elif form == "alpaca":
        question = "\n\n".join(filter(None, (record["instruction"], record.get("input"))))
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": record["output"]}]
    else:
        answer = record["completion"] if "completion" in record else record["response"]
        messages = [{"role": "user", "content": record["prompt"]}, {"role": "assistant", "content": answer}]
    for m in messages:
        if not isinstance(m["content"], str):
            raise UserError(f"a turn's content is {type(m['content']).__name__} and not text: {str(m)[:100]}")
    system = 1 if messages and messages[0]["role"] == "system" else 0
    for i, m in enumerate(messages[system:]):
        if m["role"] != ("user", "assistant")[i % 2]:
            raise UserError(
                f"roles are out of order: turn {i + system + 1} is {m['role']!r}, and user and assistant must take "
                "turns"
            )
    return messages


@functools.lru_cache(maxsize=4)
def compiled_template(template: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # as transformers compiles them; torch brings jinja2

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise UserError(f"the chat template refuses this conversation: {message}")

    environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
    environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
    return environment.from_string(template)


def render_template(template: str, **variables: Any) -> str:
    try:
        return compiled_template(template).render(**variables)
    except UserError:
        raise
    except Exception as e:  # a template is a program, and raises what it likes
        raise UserError(f"the chat template cannot be used: {type(e).__name__}: {e}") from None


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """A conversation as the model's chat template writes it. What looks like a special token in a turn is taken out."""
    template = chat_template(tokenizer)
    if template is None:
        raise UserError(
            f"tokenizer {tokenizer.name} has no chat template and no chat tokens: finetune the model on conversations "
            "first"
        )
    clean = [{**m, "content": tokenizer.without_special(m["content"])} for m in messages]
    tokens = {k: tokenizer.spec.get(k) or "" for k in ("bos_token", "eos_token")}
    return render_template(template, messages=clean, add_generation_prompt=add_generation_prompt, **tokens)


def encode_conversation(
    tokenizer: Tokenizer, messages: list[dict[str, str]], train_on_all: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids of a rendered conversation, as apply_chat_template gives them, and the mask of targets: what the
    assistant says and its end of turn, or everything."""
    ids: list[int] = []
    mask: list[int] = []
    rendered = ""
    specials = set(tokenizer.special.values())
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: i + 1])
        if not (before.startswith(rendered) and after.startswith(before)):
            raise UserError(
                "this chat template changes earlier turns as the conversation grows: training on it is not supported"
            )
        turn = tokenizer.encode_rendered(after[len(rendered) :])
        opening = tokenizer.encode_rendered(before[len(rendered) :])
        n = next((k for k, (a, b) in enumerate(zip(opening, turn, strict=False)) if a != b), len(opening))
        end = max((k + 1 for k, token in enumerate(turn) if token in specials and k >= n), default=len(turn))
        ids += turn
        mask += [0] * n + [1] * (end - n) + [0] * (len(turn) - end)
        rendered = after
    array = np.array(ids, np.int64)
    return array, np.ones(len(ids), np.uint8) if train_on_all else np.array(mask, np.uint8)


def open_records(
    source: str, split: str = "train", config: str | None = None, revision: str | None = None, streaming: bool = False
) -> Any:
    """A `datasets` data set: of the hub, or a local folder or file of parquet, json, jsonl, csv, text or arrow."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    path = Path(source)
    kinds = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv", ".txt": "text", ".arrow": "arrow"}
    try:
        if path.is_dir() and (path / "state.json").exists():
            return datasets.load_from_disk(str(path))
        if path.is_file():
            if path.suffix not in kinds:
                raise UserError(f"{path}: a local data set is one of {', '.join(kinds)}, or a folder of them")
            options = {"sample_by": "document"} if path.suffix == ".txt" else {}
            kind, files = kinds[path.suffix], str(path)
            return datasets.load_dataset(kind, data_files=files, split="train", streaming=streaming, **options)
        if path.is_dir() and {p.suffix for p in path.iterdir() if p.is_file()} == {".txt"}:  # a file is a document
            options = {"data_dir": str(path), "sample_by": "document"}
            return datasets.load_dataset("text", split=split, streaming=streaming, **options)
        return datasets.load_dataset(source, config, split=split, revision=revision, streaming=streaming)
    except UserError:
        raise
    except Exception as e:  # datasets, huggingface_hub, pyarrow and httpx each have their own
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        where = (
            f"cannot read {path}"
            if path.exists()
            else f"{source} is neither a local data set nor to be had from the hub"
        )
        raise UserError(f"{where}: {reason[:300]}") from None


RECORD_FILES = (".parquet", ".json", ".jsonl", ".csv", ".arrow")


def record_tokenizer(name: str, vocab_size: int, source: str, column: str | None = None, **options: Any) -> Tokenizer:
    """The tokenizer that --tokenizer names; a bpe is learned from the first 100 MB of the records' text."""
    if name != "bpe":
        return load_tokenizer(name)

    def texts() -> Iterator[str]:
        size = 0
        for record in open_records(source, streaming=True, **options):
            value = record[column] if column in record else None
            messages = (
                None if isinstance(value, str) else messages_of(record if value is None else {"utterances": value})
            )
            parts = [m["content"] for m in messages] if messages else [value or record.get("text") or ""]
            yield from parts
            size += sum(map(len, parts))
            if size > 100_000_000:
                return

    return train_bpe(texts(), vocab_size)


class RecordEncoder:
    """Turns records into token ids, in the main process or in workers."""

    def __init__(self, spec: dict[str, Any], column: str | None, chat_format: str | None, train_on_all: bool) -> None:
        self.spec, self.column, self.chat_format, self.train_on_all = spec, column, chat_format, train_on_all

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer(self.spec)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "tokenizer"}  # each process builds its own

    def __call__(self, records: list[dict[str, Any]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """(ids, mask) of each record; the mask is None where the record is text and not a conversation."""
        return [self.encode(record) for record in records]

    def encode(self, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None]:
        column = self.column
        if column is None:
            messages = messages_of(record, self.chat_format)
            if messages is not None:
                return encode_conversation(self.tokenizer, messages, self.train_on_all)
            column = "text"
        if column not in record:
            raise UserError(
                f"there is no column {column!r}: the columns are {', '.join(record)}; choose one with --hf_text_column"
            )
        value = record[column]
        if isinstance(value, str):
            return self.tokenizer.encode_array(value, np.int64), None
        if isinstance(value, list) and value and isinstance(value[0], (str, dict)):
            form = "utterances" if isinstance(value[0], str) else "messages" if "role" in value[0] else "sharegpt"
            key = {"sharegpt": "conversations"}.get(form, form)
            return encode_conversation(self.tokenizer, messages_of({key: value}, form), self.train_on_all)
        if value is None or value == []:
            return np.empty(0, np.int64), None
        raise UserError(
            f"column {column!r} holds {type(value).__name__}, and text or a list of turns is needed: "
            f"{str(value)[:60]!r}"
        )


def tokenize_records(
    folder: Path,
    source: str,
    tokenizer: Tokenizer,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    num_proc: int = 1,
    max_tokens: int = 0,
    chat_format: str | None = None,
    train_on_all: bool = False,
    val_fraction: float = 0.1,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make a data folder of a `datasets` data set. Returns its meta.json. An interrupted run goes on where it
    stopped."""
    check_data_folder_free(folder, overwrite)
    records = open_records(source, split, config, revision, streaming)
    described = {"dataset": source, "split": split, "config": config, "revision": revision, "column": column}
    described.update(files=describe_sources([source]) if Path(source).exists() else None)
    key = json.dumps([described, tokenizer.digest, chat_format, train_on_all, max_tokens])
    writer = DataWriter(folder, tokenizer, overwrite, key)
    encode = RecordEncoder(tokenizer.spec, column, chat_format, train_on_all)
    try:
        encode_records(writer, records, encode, streaming, num_proc, max_tokens, source)
        return writer.finish(val_fraction, described)
    except UserError:
        writer.discard()
        raise


def encode_records(
    writer: DataWriter,
    records: Any,
    encode: RecordEncoder,
    streaming: bool,
    num_proc: int,
    max_tokens: int,
    source: str,
) -> None:
    """Write the records that a writer does not have yet, in order, saving its progress every two seconds."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    tokenizer = writer.tokenizer
    total = None if streaming else len(records)
    if writer.records:
        say(f"going on after record {writer.records:,}, {writer.n_tokens:,} tokens")
    remaining = records.skip(writer.records) if streaming else records.select(range(writer.records, total))
    batches = readable(remaining.iter(batch_size=256), source)
    workers = ProcessPoolExecutor(num_proc, get_context("spawn")) if num_proc > 1 else ThreadPoolExecutor(1)
    separator = np.array([] if tokenizer.eot is None else [tokenizer.eot])
    n_records, saved_at, targets = writer.records, time.monotonic(), 0
    with workers, progress_bar(total=total, initial=n_records, unit=" records", desc="tokenize") as bar:
        pending: list[Any] = []
        full = False
        while not full:
            while len(pending) <= num_proc and (batch := next(batches, None)) is not None:
                rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
                pending.append(workers.submit(encode, rows))
            if not pending:
                break
            for ids, mask in pending.pop(0).result():
                n_records += 1
                if mask is None and writer.n_tokens and len(ids):
                    ids = np.concatenate((separator, ids))
                if len(ids):
                    writer.write(ids, mask)
                targets += len(ids) if mask is None else int(mask.sum())
                if max_tokens and writer.n_tokens >= max_tokens:
                    full = True
                    break
            bar.update(n_records - bar.n)
            if time.monotonic() - saved_at > 2:
                writer.save_progress(n_records)
                saved_at = time.monotonic()
        for future in pending:
            future.cancel()
    if writer.n_tokens and not targets and not writer.records:
        raise UserError(
            f"{source}: not one token is a target; conversations need assistant turns, or use --train_on_all"
        )


def readable(batches: Iterable, source: str) -> Iterator:
    """What `datasets` yields, its errors (a damaged file, a lost connection) as UserErrors."""
    try:
        yield from batches
    except Exception as e:  # datasets, pyarrow, pandas and httpx each have their own
        reason = str(e).strip().splitlines()[0][:300] if str(e).strip() else type(e).__name__
        raise UserError(f"cannot read {source}: {reason}") from None


def progress_bar(**kwargs: Any) -> tqdm:
    """tqdm on standard error, silent where that is not a terminal, and on all ranks but the first."""
    return tqdm(disable=None if rank() == 0 else True, dynamic_ncols=True, file=sys.stderr, **kwargs)


class Data:
    """A data folder, or a .bin file of nanoGPT's, opened for reading. Nothing is read before it is needed.

    tokens: memory map of all ids. val_start: where validation begins in it; val_tokens: a file of its own for
    validation (nanoGPT's val.bin), else None. mask, starts: of conversations, else None.
    """

    def __init__(self, path: Path, tokenizer: "str | Tokenizer" = "gpt2") -> None:
        self.path = path
        folder = path if path.is_dir() else path.parent
        self.mask = self.starts = self.val_tokens = None
        if (folder / "meta.json").exists() and (path.is_dir() or path.name == "data.bin"):
            meta = read_json(folder / "meta.json")
            if not isinstance(meta, dict):
                raise UserError(f"{folder / 'meta.json'} is not a data folder's meta.json")
            if meta.get("format_version", 0) > FORMAT_VERSION:
                raise UserError(
                    f"{folder} has format version {meta['format_version']}, made by a newer model.py: update this one"
                )
            try:
                dtype, n_tokens, self.val_start = np.dtype(meta["dtype"]), meta["n_tokens"], meta["val_start"]
                self.tokenizer, self.digest = Tokenizer(meta["tokenizer"]), meta["digest"]
            except (KeyError, TypeError) as e:
                raise UserError(
                    f"{folder / 'meta.json'} is not a data folder's meta.json: {e} is missing or wrong"
                ) from None
            self.tokens = map_tokens(folder / "data.bin", dtype)
            if len(self.tokens) != n_tokens:
                raise UserError(
                    f"{folder / 'data.bin'} has {len(self.tokens):,} tokens and should have {n_tokens:,}: it is "
                    "truncated or not the file that was written; run tokenize again"
                )
            if (folder / "starts.bin").exists():
                self.starts = np.fromfile(folder / "starts.bin", "<u8").astype(np.int64)
                self.mask = np.memmap(folder / "mask.bin", np.uint8, "r")
            return
        # nanoGPT: train.bin and val.bin of uint16, GPT-2's ids unless said otherwise
        if path.is_dir():
            if not (path / "train.bin").exists():
                raise UserError(
                    f"{path} is not a data folder: it has neither meta.json nor train.bin; make one with tokenize"
                )
            path = path / "train.bin"
        train = map_tokens(path, np.dtype("<u2"))
        self.tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else load_tokenizer(tokenizer)
        val = path.with_name("val.bin")
        self.tokens, self.val_start = train, len(train) - min(len(train) // 10, 10_000_000)
        if path.name == "train.bin" and val.exists():
            self.val_tokens, self.val_start = map_tokens(val, np.dtype("<u2")), len(train)
        largest = max(int(tokens.max()) for tokens in (self.tokens, self.val_tokens) if tokens is not None)
        if largest >= self.tokenizer.n_vocab:
            raise UserError(
                f"{path} has token id {largest} and tokenizer {self.tokenizer.describe()} ends at "
                f"{self.tokenizer.n_vocab - 1}: it was made with another tokenizer (name it with --tokenizer) or is "
                "not a file of uint16 token ids"
            )
        self.digest = hashlib.blake2b(np.ascontiguousarray(self.tokens[:1_000_000]), digest_size=16).hexdigest()

    def windows(self, split: str, block_size: int) -> np.ndarray | range:
        """The first token of every block of a split. Text is cut into consecutive blocks. Conversations are packed
        whole: a window ends before the first conversation that does not fit, and one longer than a block is cut."""
        low, high = (0, self.val_start) if split == "train" else (self.val_start, len(self.tokens))
        if split == "val" and self.val_tokens is not None:
            low, high = 0, len(self.val_tokens)
        if self.starts is None:
            blocks = range(low, high - block_size, block_size)
        else:
            starts, blocks, begin = self.starts[(self.starts >= low) & (self.starts < high)], [], None
            for start, end in zip(starts, np.append(starts[1:], high), strict=True):
                if begin is None or end - begin > block_size + 1:
                    begin = start
                    blocks.append(start)
            blocks = np.array(blocks, np.int64)
        if not len(blocks):
            raise UserError(
                f"the {'training' if split == 'train' else 'validation'} split of {self.path} has {high - low:,} "
                f"tokens, fewer than a block of {block_size} and its target: use a smaller --block_size or more text"
            )
        return blocks

    def batch(self, split: str, starts: np.ndarray, block_size: int) -> dict[str, Tensor]:
        """Windows of a split as tensors (B, block_size) int64: idx, targets (-1: not a target), and segments for
        conversations."""
        T = block_size
        if self.starts is None:
            tokens = self.tokens if split == "train" or self.val_tokens is None else self.val_tokens
            rows = np.stack([tokens[s : s + T + 1] for s in starts]).astype(np.int64)
            rows = torch.from_numpy(rows)
            return {"idx": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
        ids, wanted = np.zeros((len(starts), T + 1), np.int64), np.zeros((len(starts), T + 1), bool)
        segments = np.zeros((len(starts), T + 1), np.int64)
        for i, s in enumerate(starts):
            limit = self.val_start if s < self.val_start else len(self.tokens)
            j = np.searchsorted(self.starts, s)
            ends = np.append(self.starts[j + 1 : j + T + 2], len(self.tokens))
            whole = ends[ends <= min(s + T + 1, limit)]  # the conversations that fit
            end = int(whole[-1]) if len(whole) else min(int(ends[0]), s + T + 1)
            n = end - s
            ids[i, :n], wanted[i, :n] = self.tokens[s:end], self.mask[s:end] == 1
            segments[i] = np.searchsorted(ends, s + np.arange(T + 1), side="right")
        wanted[:, 1:] &= segments[:, 1:] == segments[:, :-1]  # a conversation's first token follows from nothing
        targets = np.where(wanted, ids, -1)[:, 1:]
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in
                (("idx", ids[:, :-1]), ("targets", targets), ("segments", segments[:, :-1]))}  # fmt: skip


def map_tokens(path: Path, dtype: np.dtype) -> np.ndarray:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    size = path.stat().st_size
    if not size:
        raise UserError(f"{path} is empty")
    if size % dtype.itemsize:
        raise UserError(
            f"{path} has {size:,} bytes, not a whole number of {dtype.name} token ids: truncated or not a .bin file"
        )
    return np.memmap(path, dtype, "r")


def block_order(n_blocks: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch sees its blocks: a pure function of seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(n_blocks)


class BlockSampler:
    """Which blocks a step reads: a pure function of (seed, step, batch size), so a resumed run is the same run."""

    def __init__(self, n_blocks: int, batch_size: int, seed: int) -> None:
        self.n_blocks, self.batch_size, self.seed = n_blocks, batch_size, seed
        self.order = functools.lru_cache(maxsize=2)(functools.partial(block_order, n_blocks, seed))

    def __call__(self, step: int) -> np.ndarray:
        """Indices (batch_size,) of the blocks of a step; epochs follow one another without a gap."""
        positions = step * self.batch_size + np.arange(self.batch_size)
        return np.array([self.order(int(p // self.n_blocks))[p % self.n_blocks] for p in positions])


STDLIB_DATA = "python_stdlib"


def python_stdlib_data() -> Path:
    """The data set of the quickstart: the source of Python's standard library, which every machine has."""
    import sysconfig

    folder = DATA_DIR / STDLIB_DATA
    if (folder / "meta.json").exists():
        return folder
    root = Path(sysconfig.get_paths()["stdlib"])
    say(f"no --data given: making {folder} from the source of Python's standard library in {root}")
    left_out = {"site-packages", "dist-packages", "encodings", "pydoc_data"}  # other people's; tables, not programs
    files = [p for p in root.rglob("*.py") if not left_out & set(p.parts) and is_utf8(p)]
    files.sort(key=lambda p: hashlib.md5(p.relative_to(root).as_posix().encode()).digest())
    if not files:
        raise UserError(f"there are no Python sources in {root}: name a text with --data FILE")
    meta = tokenize_text(folder, [str(p) for p in files], tokenizer="bpe", vocab_size=8192, source=str(root))
    say(describe_meta(folder, meta))
    return folder


def is_utf8(path: Path) -> bool:
    try:
        return bool(path.read_bytes().decode("utf-8").strip())
    except UnicodeDecodeError:
        return False


def describe_meta(folder: Path, meta: dict[str, Any]) -> str:
    n, val = meta["n_tokens"], meta["n_tokens"] - meta["val_start"]
    bytes_per_token = f", {meta['n_bytes'] / n:.2f} bytes per token" if "n_bytes" in meta else ""
    return (
        f"{folder}: {n:,} tokens{bytes_per_token}, tokenizer {meta['tokenizer']['name']}; validation begins at token "
        f"{meta['val_start']:,} ({val:,} tokens)"
    )


def find_data(spec: str | None, tokenizer: str | Tokenizer = "gpt2", vocab_size: int = 8192) -> Data:
    """Open what --data names: a name under data/, a folder, a .bin file, or a file of text or records, which is
    tokenized first. Without a name: the newest data set under data/, or Python's standard library."""
    if spec is None:
        made = sorted(DATA_DIR.glob("*/meta.json"), key=lambda p: p.stat().st_mtime)
        if made:
            say(f"no --data given: using {made[-1].parent}", file=sys.stderr)
        return Data(made[-1].parent if made else python_stdlib_data())
    for path in (Path(spec), DATA_DIR / spec):
        if path.is_dir() or path.suffix == ".bin" and path.is_file():
            return Data(path, tokenizer)
        if path.is_file():
            folder = DATA_DIR / (path.stem if isinstance(tokenizer, str) else f"{path.stem}_{tokenizer.name}")
            if (folder / "meta.json").exists():
                source = read_json(folder / "meta.json").get("source")
                if (source.get("files") if isinstance(source, dict) else source) != describe_sources([str(path)]):
                    raise UserError(
                        f"{folder} is in the way of {path}: it was made from something else; tokenize it under "
                        "another name"
                    )
                return Data(folder)
            say(describe_meta(folder, tokenize_file(folder, path, tokenizer, vocab_size)))
            return Data(folder)
    names = ", ".join(p.parent.name for p in sorted(DATA_DIR.glob("*/meta.json")))
    raise UserError(
        f"no data at {spec} or {DATA_DIR / spec}" + (f"; there is: {names}" if names else "; make it with tokenize")
    )


def tokenize_file(folder: Path, path: Path, tokenizer: str | Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Make a data folder of one file, of text or of records."""
    if path.suffix not in RECORD_FILES:
        return tokenize_text(folder, [str(path)], tokenizer, vocab_size)
    if isinstance(tokenizer, str):
        tokenizer = record_tokenizer(tokenizer, vocab_size, str(path))
    return tokenize_records(folder, str(path), tokenizer)


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class SamplingSettings:
    """How the next token is chosen from the logits."""

    temperature: float = setting(1.0, "divides the logits; 0 is greedy: always the most likely token")
    top_k: int = setting(0, "sample among the k most likely tokens (0: all)")
    top_p: float = setting(1.0, "sample among the most likely tokens that have this probability together")
    min_p: float = setting(0.0, "leave out tokens less likely than this fraction of the most likely one")
    repetition_penalty: float = setting(1.0, "above 1: lower the logits of tokens already in the text")

    def __post_init__(self) -> None:
        checks = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")


def next_token_probs(logits: Tensor, s: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """The distribution that is sampled from, (B, vocab) float32, of logits (B, vocab). Filters apply in the order
    repetition penalty (arXiv 1909.05858, section 4.1; seen (B, n) are the tokens so far), temperature, top_k, top_p
    (arXiv 1904.09751), min_p (arXiv 2407.01082), as in transformers. Greedy is the distribution with one token."""
    if s.repetition_penalty != 1 and seen is not None:
        score = logits.gather(1, seen)
        score = torch.where(score < 0, score * s.repetition_penalty, score / s.repetition_penalty)
        logits = logits.scatter(1, seen, score)
    if s.temperature == 0:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    if s.temperature != 1:
        logits = logits / s.temperature
    if s.top_k:
        kth = logits.topk(min(s.top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    probs = logits.softmax(dim=-1)
    if s.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True)
        before = ordered.cumsum(dim=-1) - ordered  # the mass of all that is more likely
        probs = probs.scatter(1, index, ordered.masked_fill(before >= s.top_p, 0.0))
    if s.min_p:
        probs = probs.masked_fill(probs < s.min_p * probs.max(dim=-1, keepdim=True).values, 0.0)
    return probs


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index (B,) from each row of unnormalised probabilities (B, n), by inversion of the cumulative distribution.
    In float32, since MPS has no float64: u < 1 times the total never rounds up to the total, so that the index is of a
    token that has a probability."""
    cumulative = probs.float().cumsum(dim=-1)
    u = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].clamp(max=probs.size(-1) - 1)


def sample_token(logits: Tensor, s: SamplingSettings, seen: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """The next token (B,) from logits (B, vocab)."""
    if s.temperature == 0 and s.repetition_penalty == 1:
        return logits.argmax(dim=-1)
    return draw(next_token_probs(logits, s, seen), generator)


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as a matrix (B, longest), padded at the left, and how much padding each has (None if none)."""
    longest = max(map(len, prompts))
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    idx = torch.tensor([p[:1] * (longest - len(p)) + p for p in prompts], device=device)
    return idx, pad if int(pad.max()) else None


# On a CPU one token is limited by memory: every weight is read once for it. So weights are held in 16 or 8 bits, and
# the blocks run in C, where PyTorch would spend as long between the products as on them. A few tokens at a time go
# this way; a long prompt, and a machine without a C compiler, take the plain one.


def prepare_generation(model: GPT, dtype: str, quantize: str | None = None) -> None:
    """Hold a model's weights as they generate fastest. On a CPU, `auto` is float16 weights and float32 activations
    with the blocks in C (see Decoder), where there is a C compiler; int8 weights are for the asking."""
    c, on_cpu = model.config, model.wte.weight.device.type == "cpu"
    if quantize == "int8" and not on_cpu:
        raise UserError("--quantize int8 is for the CPU: leave it out, or add --device cpu")
    in_c = on_cpu and dtype == "auto" and c.attn_implementation != "eager" and decoder_library() is not None
    if not in_c and quantize is None:
        set_precision(model, dtype)
        return
    model.compute_dtype = torch.float32
    if quantize == "int8":
        if model.lm_head is None:
            model.lm_head = Int8Linear(model.head_weight.data, None)
        for place in [(model, "lm_head"), *(place for block in model.blocks for place in block.linears())]:
            layer = getattr(*place)
            if not isinstance(layer, Int8Linear):
                setattr(*place, Int8Linear(layer.weight.data, layer.bias))
    for p in model.parameters():
        p.data = p.data.to(torch.float16 if p.dim() > 1 else torch.float32).contiguous()
    if in_c:
        model.decoder = Decoder(model)


class Int8Linear(nn.Module):
    """A linear layer for generation, its weights in 8 bits with one scale a row (the largest is 127)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        scale = weight.abs().amax(dim=1).float().clamp(min=1e-12) / 127  # (out,)
        self.weight, self.scale, self.bias = torch.round(weight.float() / scale[:, None]).to(torch.int8), scale, bias

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight) * self.scale
        return y if self.bias is None else y + self.bias


DECODER_C = r"""
// The blocks of a GPT for a few tokens, each with a cache of the keys and values before it. All threads run `blocks`
// from top to bottom, share the rows of each product and wait for each other after it (`omp for`); each has its own x.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { const void *weight; const float *scale, *bias; } Matrix;  // (out, in), float16; int8 if scale (out)
typedef struct { const float *weight, *bias; } Norm;
typedef struct { Norm norm_1, norm_2, q_norm, k_norm; Matrix qkv, proj, fc, mlp_proj; } Layer;
typedef struct {
    long n_layer, n_embd, n_head, n_kv_head, head_dim, rope_dim, n_inner;
    long layernorm, pre_norm, parallel, qk_norm, norm_before_rope, activation, is_glu;
} Shape;

// Vectors of LANES floats, and how to load them; compilers vectorise these conversions badly by themselves.
#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
typedef __m512 vec;
static vec load(const float *x) { return _mm512_loadu_ps(x); }
static vec load_half(const void *w) { return _mm512_cvtph_ps(_mm256_loadu_si256(w)); }
static vec load_int8(const void *w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(w))); }
static float total(vec x) { return _mm512_reduce_add_ps(x); }
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define LANES 8
typedef __m256 vec;
static vec load(const float *x) { return _mm256_loadu_ps(x); }
static vec load_half(const void *w) { return _mm256_cvtph_ps(_mm_loadu_si128(w)); }
static vec load_int8(const void *w) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(w))); }
static float total(vec x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}
#else
#define LANES 4
typedef float vec __attribute__((vector_size(16)));
static vec load(const float *x) { return (vec){x[0], x[1], x[2], x[3]}; }
static float from_half(uint16_t half) {
    int32_t bits = ((int32_t)((uint32_t)half << 16) >> 3) & (int32_t)0x8fffffff;  // of half / 2^112, as a float
    float x;
    memcpy(&x, &bits, sizeof x);
    return x * 0x1p112f;
}
static vec load_half(const uint16_t *w) {
    return (vec){from_half(w[0]), from_half(w[1]), from_half(w[2]), from_half(w[3])};
}
static vec load_int8(const int8_t *w) { return (vec){w[0], w[1], w[2], w[3]}; }
static float total(vec x) { return x[0] + x[1] + x[2] + x[3]; }
#endif

// w (n) times x (n). One running sum: with two or four, 16-bit weights came a quarter slower from memory.
#define DOT(NAME, TYPE, LOAD)                                                      \
    static float NAME(const TYPE *w, const float *x, long n) {                     \
        vec sum = {0};                                                             \
        long i = 0;                                                                \
        for (; i + LANES <= n; i += LANES) sum += LOAD(w + i) * load(x + i);       \
        if (i < n) {                                                               \
            TYPE w_rest[LANES] = {0};                                              \
            float x_rest[LANES] = {0};                                             \
            memcpy(w_rest, w + i, (n - i) * sizeof *w);                            \
            memcpy(x_rest, x + i, (n - i) * sizeof *x);                            \
            sum += LOAD(w_rest) * load(x_rest);                                    \
        }                                                                          \
        return total(sum);                                                         \
    }
DOT(dot, float, load)
DOT(dot_half, uint16_t, load_half)
DOT(dot_int8, int8_t, load_int8)

// y (rows, out) = x (rows, in) times the matrix, plus its bias.
static void product(Matrix m, long out, long in, const float *x, long rows, float *y) {
    const uint16_t *half = m.weight;
    const int8_t *int8 = m.weight;
    #pragma omp for
    for (long o = 0; o < out; o++)
        for (long r = 0; r < rows; r++) {
            const float *row = x + r * in;
            float sum = m.scale ? dot_int8(int8 + o * in, row, in) * m.scale[o] : dot_half(half + o * in, row, in);
            y[r * out + o] = m.bias ? sum + m.bias[o] : sum;
        }
}

// y (rows, n) may be x.
static void normalise(Norm norm, long layernorm, float eps, const float *x, long rows, long n, float *y) {
    for (long r = 0; r < rows; r++, x += n, y += n) {
        float mean = 0, square = 0;
        #pragma omp simd reduction(+ : mean)
        for (long i = 0; i < n; i++) mean += x[i];
        mean = layernorm ? mean / n : 0;
        #pragma omp simd reduction(+ : square)
        for (long i = 0; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        float scale = 1 / sqrtf(square / n + eps);
        for (long i = 0; i < n; i++) y[i] = (x[i] - mean) * scale;
        if (norm.weight) for (long i = 0; i < n; i++) y[i] *= norm.weight[i];
        if (norm.bias) for (long i = 0; i < n; i++) y[i] += norm.bias[i];
    }
}

static void rotate(float *x, const float *cos, const float *sin, long d) {
    for (long i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2];
        x[i] = a * cos[i] + b * sin[i];
        x[i + d / 2] = b * cos[i + d / 2] + a * sin[i + d / 2];
    }
}

// Softmax attention of q (d) to n keys and values (n, d).
static void attend(const float *q, const float *k, const float *v, long n, long d, float *p, float *y) {
    float scale = 1 / sqrtf(d), max = -INFINITY, sum = 0;
    for (long s = 0; s < n; s++) {
        p[s] = dot(q, k + s * d, d) * scale;
        max = fmaxf(max, p[s]);
    }
    for (long s = 0; s < n; s++) sum += p[s] = expf(p[s] - max);
    memset(y, 0, d * sizeof *y);
    for (long s = 0; s < n; s++, v += d) {
        float share = p[s] / sum;
        for (long i = 0; i < d; i++) y[i] += share * v[i];
    }
}

static float activate(long kind, float x) {  // in the order of ACTIVATIONS
    switch (kind) {
        case 0: return 0.5f * x * (1 + erff(x * 0.70710678f));
        case 1: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        case 2: return fmaxf(x, 0);
        case 3: return fmaxf(x, 0) * fmaxf(x, 0);
        default: return x / (1 + expf(-x));
    }
}

static void add(float *x, const float *y, long n) { for (long i = 0; i < n; i++) x[i] += y[i]; }

// x (batch, T, n_embd): of tokens start to start + T of each sequence, before the blocks and after them. kv (n_layer,
// batch, 2 n_kv_head, max_length, head_dim): the cache. pad (batch): how many of its first tokens are padding.
// rope_cos, rope_sin (context, rope_dim): as in apply_rope, or NULL.
void blocks(const Shape *c, const Layer *layers, const float *rope_cos, const float *rope_sin, float *x, float *kv,
            const int64_t *pad, long batch, long T, long start, long max_length, float eps, int threads) {
    const long rows = batch * T, n = c->n_embd, d = c->head_dim, n_q = c->n_head, n_kv = c->n_kv_head;
    const long heads = n_q + 2 * n_kv, fan_out = c->n_inner * (1 + c->is_glu);
    float *qkv = malloc(rows * (heads * d + n_q * d + n + fan_out + c->n_inner) * sizeof *qkv);  // shared
    float *attended = qkv + rows * heads * d, *delta = attended + rows * n_q * d;
    float *fan = delta + rows * n, *inner = fan + rows * fan_out;

    #pragma omp parallel num_threads(threads)
    {
        float *mine = malloc((2 * rows * n + start + T) * sizeof *mine), *h = mine + rows * n, *p = h + rows * n;
        memcpy(mine, x, rows * n * sizeof *x);
        for (long l = 0; l < c->n_layer; l++) {
            const Layer *layer = layers + l;
            float *cache = kv + l * batch * 2 * n_kv * max_length * d;
            const float *input = mine;
            if (c->pre_norm) normalise(layer->norm_1, c->layernorm, eps, mine, rows, n, h), input = h;
            product(layer->qkv, heads * d, n, input, rows, qkv);
            #pragma omp for
            for (long i = 0; i < rows * heads; i++) {  // norm and RoPE of q and k; k and v go to the cache
                long b = i / heads / T, t = start + i / heads % T, head = i % heads;
                long at = t * c->rope_dim;  // RoPE is relative: it does not matter that padding counts
                float *y = qkv + i * d;
                Norm norm = head < n_q ? layer->q_norm : layer->k_norm;
                if (head < n_q + n_kv) {
                    if (c->qk_norm && c->norm_before_rope) normalise(norm, 0, eps, y, 1, d, y);
                    if (rope_cos) rotate(y, rope_cos + at, rope_sin + at, c->rope_dim);
                    if (c->qk_norm && !c->norm_before_rope) normalise(norm, 0, eps, y, 1, d, y);
                }
                if (head >= n_q)
                    memcpy(cache + ((b * 2 * n_kv + head - n_q) * max_length + t) * d, y, d * sizeof *y);
            }
            #pragma omp for
            for (long i = 0; i < rows * n_q; i++) {
                long row = i / n_q, head = i % n_q, b = row / T, t = start + row % T, from = pad[b] < t ? pad[b] : t;
                const float *k = cache + ((b * 2 * n_kv + head / (n_q / n_kv)) * max_length + from) * d;
                const float *q = qkv + (row * heads + head) * d, *v = k + n_kv * max_length * d;
                attend(q, k, v, t + 1 - from, d, p, attended + i * d);
            }
            product(layer->proj, n, n_q * d, attended, rows, delta);
            input = mine;
            if (c->parallel) normalise(layer->norm_2, c->layernorm, eps, mine, rows, n, h), input = h;
            add(mine, delta, rows * n);
            if (!c->pre_norm) normalise(layer->norm_1, c->layernorm, eps, mine, rows, n, mine);
            else if (!c->parallel)
                normalise(layer->norm_2, c->layernorm, eps, mine, rows, n, h), input = h;
            product(layer->fc, fan_out, n, input, rows, fan);
            #pragma omp for
            for (long i = 0; i < rows * c->n_inner; i++) {
                const float *y = fan + i / c->n_inner * fan_out + i % c->n_inner;
                inner[i] = activate(c->activation, y[0]) * (c->is_glu ? y[c->n_inner] : 1);
            }
            product(layer->mlp_proj, n, c->n_inner, inner, rows, delta);
            add(mine, delta, rows * n);
            if (!c->pre_norm) normalise(layer->norm_2, c->layernorm, eps, mine, rows, n, mine);
        }
        #pragma omp single
        memcpy(x, mine, rows * n * sizeof *x);
        free(mine);
    }
    free(qkv);
}

// y (rows, out) = x (rows, in) times the matrix.
void head(const Matrix *m, long out, long in, const float *x, long rows, float *y, int threads) {
    #pragma omp parallel num_threads(threads)
    product(*m, out, in, x, rows, y);
}
"""


@functools.cache
def decoder_library(march: str = "native") -> ctypes.CDLL | None:
    """DECODER_C, compiled for this processor and kept in the user's cache folder; None where there is no C compiler
    with OpenMP."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    command = [*compiler.split(), "-O3", f"-march={march}", "-fopenmp", "-fPIC", "-shared"]
    processor = platform.processor()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        processor = next((line for line in f if line.startswith(("flags", "Features"))), processor)
    key = hashlib.sha256("\0".join((DECODER_C, *command, platform.machine(), processor)).encode()).hexdigest()
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model.py"
        path = folder / f"decoder-{key[:16]}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                source, library = Path(scratch) / "decoder.c", Path(scratch) / "decoder.so"
                source.write_text(DECODER_C, encoding="utf-8")
                subprocess.run([*command, str(source), "-o", str(library), "-lm"], check=True, capture_output=True)
                library.replace(path)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # no compiler, or none that works; no home folder
        say("without a C compiler (gcc, with OpenMP) generation on a CPU is several times slower", file=sys.stderr)
        return None
    pointer, long = ctypes.c_void_p, ctypes.c_long
    library.blocks.argtypes = [pointer] * 7 + [long] * 4 + [ctypes.c_float, ctypes.c_int]
    library.head.argtypes = [pointer, long, long, pointer, long, pointer, ctypes.c_int]
    return library


def addresses(module: nn.Module | None, *names: str) -> list[int | None]:
    """Where the tensors of these names lie in memory; None for one that the module lacks."""
    tensors = [getattr(module, name, None) for name in names]
    return [None if t is None else t.data_ptr() for t in tensors]


class Decoder:
    """The blocks and the head of a model for a few tokens at a time, by DECODER_C. It reads the model's weights where
    they lie, matrices in float16 or an Int8Linear's, all else in float32."""

    max_rows = 16  # with 32 tokens the plain pass is as fast

    def __init__(self, model: GPT) -> None:
        self.library, self.model, c = decoder_library(), model, model.config
        pointers = []
        for block in model.blocks:
            attn = block.attn
            for norm in (block.norm_1, block.norm_2, getattr(attn, "q_norm", None), getattr(attn, "k_norm", None)):
                pointers += addresses(norm, "weight", "bias")
            for place in block.linears():
                pointers += addresses(getattr(*place), "weight", "scale", "bias")
        self.layers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.head_matrix = (ctypes.c_void_p * 3)(*addresses(model.lm_head or model.wte, "weight", "scale", "bias"))
        pre_norm, activation = c.norm_position == "pre", list(ACTIVATIONS.values()).index(ACTIVATIONS[c.activation])
        shape = (
            *(c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.rope_dim, c.n_inner),
            *(c.norm == "layernorm", pre_norm, pre_norm and c.parallel_residual),
            *(c.qk_norm, c.norm_weight, activation, c.is_glu),
        )
        self.shape = (ctypes.c_long * len(shape))(*shape)

    def __call__(self, x: Tensor, cache: KVCache) -> Tensor:
        """x (B, T, n_embd), float32, through the blocks. Its keys and values go to the cache, whose length stays."""
        x, (B, T, _), model = x.contiguous(), x.shape, self.model
        pad = torch.zeros(B, dtype=torch.int64) if cache.pad is None else cache.pad
        rope = addresses(model, "rope_cos", "rope_sin")
        memory = x.data_ptr(), cache.kv.data_ptr(), pad.data_ptr()
        sizes = B, T, cache.length, cache.max_length
        threads = torch.get_num_threads()
        self.library.blocks(self.shape, self.layers, *rope, *memory, *sizes, model.config.norm_eps, threads)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> logits (..., vocab_size) before the soft-cap, float32."""
        x, sizes = x.contiguous(), (self.model.config.vocab_size, x.size(-1))
        y, rows = torch.empty(*x.shape[:-1], sizes[0]), x.numel() // sizes[1]
        self.library.head(self.head_matrix, *sizes, x.data_ptr(), rows, y.data_ptr(), torch.get_num_threads())
        return y


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    settings: SamplingSettings,
    generator: torch.Generator | None = None,
    cache: KVCache | None = None,
    first: Tensor | None = None,
    seen: list[int] | None = None,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt, (B,) int64, up to max_new_tokens times; close the iterator to stop earlier.

    The work per token is constant: a preallocated cache holds the keys and values so far. When the text outgrows the
    context, its last half is read again into an empty cache and generation goes on from there. With a cache of the
    caller's, prompts continue what it holds, and generation ends when it is full. `first` (vocab,) says which tokens
    may come first; `seen` are the tokens in a caller's cache, which the repetition penalty counts too.
    """
    context, device = model.config.context, model.wte.weight.device
    idx, pad = left_pad(prompts, device)
    if idx.size(1) > context:
        raise UserError(
            f"the prompt has {idx.size(1):,} tokens and the model's context is {context:,}: shorten it"
            + (", or extend the context with --rope_scaling yarn --rope_factor N" if model.rope_cos is not None else "")
        )
    own_cache, new = cache is None, idx
    if seen:
        idx = torch.cat((torch.tensor([seen], device=device), idx), dim=1)
    for i in range(max_new_tokens):
        if cache is None or cache.length + new.size(1) > cache.max_length:
            if not own_cache:
                return
            if cache is not None:  # full
                new = idx[:, -(context // 2 or 1) :]
                pad = None if pad is None else (pad - (idx.size(1) - new.size(1))).clamp(min=0)
            size = min(context, new.size(1) + max_new_tokens - i)
            like = torch.empty(0, dtype=model.compute_dtype, device=device)
            cache = KVCache(model.config, idx.size(0), size, like, pad)
        logits = model.logits(model.hidden(new, cache)[:, -1])
        if first is not None and i == 0:
            logits = logits.masked_fill(~first, float("-inf"))
        new = sample_token(logits, settings, idx, generator)[:, None]
        idx = torch.cat((idx, new), dim=1)
        yield new[:, 0]


@torch.inference_mode()
def speculative_generate(
    model: GPT,
    draft: GPT,
    stats: dict[str, int],
    prompts: list[list[int]],
    max_new_tokens: int,
    settings: SamplingSettings,
    generator: torch.Generator | None = None,
    n_draft: int = 4,
) -> Iterator[Tensor]:
    """generate for one prompt, with a small model's proposals: the same distribution, fewer passes of the large one
    (arXiv 2211.17192, algorithm 1). The draft proposes n_draft tokens, the model scores them in one pass, each is kept
    with probability min(1, p / q), and the first that is not is drawn again from max(p - q, 0). The next round has two
    proposals more if all were kept, else one less, as in transformers. stats counts `proposed` and `accepted`."""
    (prompt,) = prompts
    device, limit = model.wte.weight.device, len(prompt) + max_new_tokens
    for m in (model, draft):
        if limit + n_draft > m.config.context:
            raise UserError(
                f"prompt and --length need {limit + n_draft:,} tokens and a context is {m.config.context:,}: shorten "
                "them, or leave --draft_checkpoint out"
            )
    caches = []
    for m in (model, draft):
        like = torch.empty(0, dtype=m.compute_dtype, device=device)
        caches.append(KVCache(m.config, 1, limit + n_draft, like))
    ids = torch.tensor([prompt], device=device)
    n_vocab = min(model.config.vocab_size, draft.config.vocab_size)
    stats.update(proposed=0, accepted=0)

    def last_probs(m: GPT, cache: KVCache, n: int) -> list[Tensor]:
        """The distributions (1, n_vocab) after each of the last n tokens of ids."""
        hidden = m.hidden(ids[:, cache.length :], cache)[:, -n:]
        logits = m.logits(hidden)[..., :n_vocab]
        length = ids.size(1)
        return [next_token_probs(logits[:, i], settings, ids[:, : length - n + 1 + i]) for i in range(n)]

    while ids.size(1) < limit:
        before = ids.size(1)
        q = []
        for _ in range(min(n_draft, limit - before - 1)):
            q += last_probs(draft, caches[1], 1)
            ids = torch.cat((ids, draw(q[-1], generator)[:, None]), dim=1)
        p = last_probs(model, caches[0], len(q) + 1)
        kept = 0
        while kept < len(q):
            token = ids[0, before + kept]
            u = torch.rand((), device=device, generator=generator)
            if u * q[kept][0, token] >= p[kept][0, token]:
                break
            kept += 1
        stats["proposed"] += len(q)
        stats["accepted"] += kept
        n_draft = n_draft + 2 if kept == len(q) else max(1, n_draft - 1)
        rest = p[kept] if kept == len(q) else (p[kept] - q[kept]).clamp(min=0)
        ids = torch.cat((ids[:, : before + kept], draw(rest, generator)[:, None]), dim=1)
        for cache in caches:  # forget what was not kept
            cache.length = min(cache.length, ids.size(1) - 1)
        for i in range(before, ids.size(1)):
            yield ids[:, i]


def generate_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: list[int],
    length: int,
    settings: SamplingSettings,
    num_samples: int = 1,
    seed: int = 1337,
    stop: Iterable[str] = (),
    on_text: Callable[[str], None] = lambda text: None,
    tokens_from: Callable[..., Iterator[Tensor]] | None = None,
    generator: torch.Generator | None = None,
    heal: bool = False,
) -> list[str]:
    """Continuations of a prompt of token ids, drawn as one batch; each ends at `length` tokens, at the end-of-text
    token, or before one of the `stop` strings. The first one is handed to on_text as it grows. tokens_from stands in
    for generate.

    heal: a prompt that ends in a space, "def ", is continued from before that space by tokens that begin with one,
    since that is how the model has seen words ("def" and " name")."""
    ends = {tokenizer.special.get(t) for t in (EOT, IM_END)} - {None}
    device = model.wte.weight.device
    generator = generator or torch.Generator(device).manual_seed(seed)
    streams = [TextStream(tokenizer) for _ in range(num_samples)]
    texts, done = [""] * num_samples, [False] * num_samples
    held = max((len(s) for s in stop), default=1) - 1  # characters that may turn out to be the start of a stop string
    shown = 0
    was_training = model.training
    model.eval()
    space = heal and tokens_from is None and len(prompt) > 1 and tokenizer.decode(prompt[-1:]) == " "
    if space and (first := tokenizer.begins_with_space).sum() > 1:
        prompt, tokens_from = (
            prompt[:-1],
            functools.partial(
                generate, model, first=F.pad(first, (0, model.config.vocab_size - len(first))).to(device)
            ),
        )
    else:
        space, tokens_from = False, tokens_from or functools.partial(generate, model)
    for tokens in tokens_from([prompt] * num_samples, length, settings, generator):
        for i, token in enumerate(tokens.tolist()):
            if done[i]:
                continue
            if token in ends:
                done[i] = True
            texts[i] += streams[i](None if done[i] else token).removeprefix(" " if space and not texts[i] else "")
            found = [at for at in (texts[i].find(s) for s in stop) if at >= 0]
            if found:
                texts[i], done[i] = texts[i][: min(found)], True
        safe = len(texts[0]) if done[0] else max(len(texts[0]) - held, shown)
        on_text(texts[0][shown:safe])
        shown = safe
        if all(done):
            break
    for i in range(num_samples):
        texts[i] += "" if done[i] else streams[i](None)
    on_text(texts[0][shown:])
    model.train(was_training)
    return texts


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def save_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a dictionary of plain containers and tensors; whole, or not at all."""
    with atomic_write(path) as f:
        torch.save({"format_version": FORMAT_VERSION, **checkpoint}, f)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint. Only tensors and plain containers are unpickled, so a file that would run code is refused."""
    import pickle

    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
        if getattr(e, "filename", None):
            raise
        reason = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(f"{path} is not a checkpoint of this program, or is damaged ({reason[:150]})") from None
    version = checkpoint.get("format_version", 0) if isinstance(checkpoint, dict) else 0
    if version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, made by a newer model.py (this one reads up to {FORMAT_VERSION}): "
            "update model.py"
        )
    if not isinstance(checkpoint, dict) or not {"format_version", "config", "model", "tokenizer"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of this program: it lacks the model, its config or its tokenizer")
    unknown = checkpoint["config"].keys() - {f.name for f in fields(GPTConfig)}
    if unknown or not {"kind", "name", "special"} <= checkpoint["tokenizer"].keys():
        raise UserError(
            f"{path} is damaged, or of another model.py: {', '.join(unknown) or 'its tokenizer'} is unknown"
        )
    return checkpoint


def find_checkpoint(spec: str | None) -> Path:
    """The path of what --model_checkpoint names: a path, or a file name under checkpoints/; else the newest there."""
    if spec is not None:
        for path in (Path(spec), CHECKPOINT_DIR / spec):
            if path.exists():
                return path
        raise UserError(f"no checkpoint at {spec} or {CHECKPOINT_DIR / spec}")
    made = sorted(CHECKPOINT_DIR.glob("*_model.pt"), key=lambda p: p.stat().st_mtime)
    if not made:
        raise UserError(
            f"there is no checkpoint under {CHECKPOINT_DIR}/ yet: train one, or name one with --model_checkpoint"
        )
    return made[-1]


def open_model(
    spec: str | None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **overrides: Any
) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """Open a model: one of our checkpoints, a Hugging Face directory, or a hub id, `owner/name` or
    `owner/name@revision`. Returns it in eval mode with weights and activations in dtype, its tokenizer, and the rest
    of its checkpoint."""
    is_hub_id = spec is not None and re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", spec) and not spec.endswith(".pt")
    is_hub_id = is_hub_id and Path(spec).parent != CHECKPOINT_DIR  # a run of that name is missing
    local = spec is not None and any(p.exists() for p in (Path(spec), CHECKPOINT_DIR / spec))
    path = hub_directory(spec) if is_hub_id and not local else find_checkpoint(spec)
    if path.is_dir():
        model, tokenizer = load_hf_model(path, dtype, device, **overrides), hf_tokenizer(path)
        if tokenizer.n_vocab > model.config.vocab_size:
            raise UserError(
                f"{path}: its tokenizer has {tokenizer.n_vocab:,} tokens and its model only "
                f"{model.config.vocab_size:,}: they do not belong together"
            )
        name = spec.partition("@")[0].rsplit("/", 1)[-1] if is_hub_id and not local else path.resolve().name
        return model.eval(), tokenizer, {"path": path, "variant": name}
    checkpoint = load_checkpoint(path)
    model = build_model(GPTConfig(**{**checkpoint["config"], **overrides}), checkpoint["model"], path).to(dtype)
    model.compute_dtype = dtype
    rest = {k: v for k, v in checkpoint.items() if k not in ("model", "optimizer")}
    return model.to(device).eval(), Tokenizer(checkpoint["tokenizer"]), {**rest, "path": path}


def build_model(config: GPTConfig, state: dict[str, Tensor], path: Path) -> GPT:
    """A GPT that takes over the tensors of a state dictionary, which must fit it exactly."""
    with torch.device("meta"):
        model = GPT(config)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in expected.keys() | state.keys():
        if name not in state:
            raise UserError(f"{path}: tensor {name} is missing")
        if name not in expected:
            raise UserError(f"{path}: tensor {name} does not belong to a model of its config")
        if tuple(state[name].shape) != expected[name]:
            raise UserError(
                f"{path}: tensor {name} has shape {tuple(state[name].shape)}, its config says {expected[name]}"
            )
    parts = {name: p.parts for name, p in model.named_parameters() if hasattr(p, "parts")}
    model.load_state_dict(state, strict=True, assign=True)
    for name, p in model.named_parameters():
        p.requires_grad_(True)
        if name in parts:
            p.parts = parts[name]
    model.build_rope()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Training: one loop for train, distill and finetune
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """How a model is trained. A batch is what one optimizer step sees: over all micro-batches and processes."""

    max_iters: int = setting(2000, "optimizer steps")
    epochs: float = setting(0.0, "passes over the training data, instead of max_iters")
    batch_size: int = setting(16, "sequences per optimizer step, over all micro-batches and processes")
    grad_accum: int = setting(1, "micro-batches that a batch is cut into: less memory, the same result")
    learning_rate: float = setting(3e-4, "peak learning rate (AdamW's)")
    min_lr_ratio: float = setting(0.1, "the last learning rate, as a fraction of the peak (0 for wsd and linear)")
    warmup_iters: int = setting(-1, "steps of linear warm-up (-1: a tenth of the run, at most 100)")
    schedule: str = setting("cosine", "learning rate over time", ("cosine", "linear", "wsd", "constant"))
    decay_fraction: float = setting(0.4, "wsd (warmup-stable-decay): the part of the run that decays")
    optimizer: str = setting("adamw", "muon: Muon for the block matrices, AdamW for the rest", ("adamw", "muon"))
    muon_lr: float = setting(0.02, "Muon's learning rate")
    embd_lr: float = setting(0.0, "AdamW's rate for the token embedding (0: learning_rate)")
    head_lr: float = setting(0.0, "AdamW's rate for an untied head (0: learning_rate)")
    weight_decay: float = setting(0.1, "decoupled weight decay of matrices and embeddings")
    beta1: float = setting(0.9, "AdamW's first moment")
    beta2: float = setting(0.95, "AdamW's second moment")
    grad_clip: float = setting(1.0, "clip the gradient's global norm (0: off)")
    eval_interval: int = setting(0, "steps between evaluations, each of which saves (0: a tenth of the run)")
    eval_tokens: int = setting(65536, "tokens of the validation split in an evaluation: always the same blocks")
    log_interval: int = setting(10, "steps between records of the log")
    sample_interval: int = setting(0, "steps between text samples (0: a quarter of the run; -1: none)")
    seed: int = setting(1337, "of the initial weights, the data order and dropout")
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "of the computation; weights stay float32", ("auto", "float32", "bfloat16", "float16"))
    compile: str = setting("auto", "torch.compile the blocks (auto: where it pays)", ("auto", "true", "false"))

    def __post_init__(self) -> None:
        for name in ("batch_size", "grad_accum", "log_interval"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        rules = {
            "at least 0": (
                0,
                math.inf,
                (
                    "epochs",
                    "learning_rate",
                    "muon_lr",
                    "embd_lr",
                    "head_lr",
                    "weight_decay",
                    "grad_clip",
                    "eval_interval",
                    "eval_tokens",
                ),
            ),
            "at least -1": (-1, math.inf, ("warmup_iters", "sample_interval")),
            "between 0 and 1": (0, 1, ("min_lr_ratio", "decay_fraction")),
            "at least 0 and below 1": (0, 1 - 1e-12, ("beta1", "beta2")),
            "between 0 and 2**31": (0, 2**31, ("seed",)),
        }
        for rule, (low, high, names) in rules.items():
            for name in names:
                if not low <= getattr(self, name) <= high:
                    raise UserError(f"{name} is {getattr(self, name)}: it must be {rule}")
        if self.batch_size % (self.grad_accum * world_size()):
            raise UserError(
                f"batch_size {self.batch_size} is not divisible by grad_accum {self.grad_accum} times {world_size()} "
                "processes"
            )
        if self.max_iters < 1 and self.epochs <= 0:
            raise UserError("max_iters must be at least 1")


def rank() -> int:
    return (
        torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
    )


def world_size() -> int:
    return (
        torch.distributed.get_world_size()
        if torch.distributed.is_available() and torch.distributed.is_initialized()
        else 1
    )


@contextmanager
def first_process_first() -> Iterator[None]:
    """The other processes wait until the first has been here: what it makes or clears away, they find so."""
    if rank() > 0:
        torch.distributed.barrier()
    try:
        yield
    finally:
        if rank() == 0 and world_size() > 1:
            torch.distributed.barrier()


def say(text: str, file: Any = None) -> None:
    """Print a line from the first process, above any progress bar."""
    if rank() == 0:
        tqdm.write(text, file=file or sys.stdout)
        (file or sys.stdout).flush()


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU. Under torchrun each process gets its own GPU."""
    if name == "auto":
        mps = getattr(torch.backends, "mps", None)
        name = "cuda" if torch.cuda.is_available() else "mps" if mps is not None and mps.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
        there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not there.get(device.type, False):
            raise UserError(f"device {name} was asked for, and PyTorch sees none here: use --device cpu or auto")
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: auto, cpu, cuda, cuda:1 or mps") from None
    return device


@functools.lru_cache
def cpu_bfloat16_pays(width: int) -> bool:
    """Whether this processor has bfloat16 matrix instructions and a quick timing (a few milliseconds) says they pay."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, width, dtype=dtype), torch.ones(width, 4096, dtype=dtype)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
        return min(times)

    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


def choose_dtype(name: str, device: torch.device, width: int) -> torch.dtype:
    """`auto`: bfloat16 where the device computes it fast, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # is_bf16_supported() also counts GPUs that emulate it, ten times slower than float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    if device.type == "cpu" and cpu_bfloat16_pays(width):
        return torch.bfloat16
    return torch.float32


def set_precision(model: GPT, name: str) -> None:
    """Hold a model's weights in the precision it is used in. On a CPU, `auto` is bfloat16 for models that are wide
    enough to be limited by memory, and float32 for small ones, which are limited by the overhead of each call."""
    device, width = model.wte.weight.device, model.config.n_embd
    dtype = (
        torch.float32 if name == "auto" and device.type == "cpu" and width < 384 else choose_dtype(name, device, 512)
    )
    model.to(dtype).compute_dtype = dtype


def lr_factor(step: int, t: TrainConfig) -> float:
    """The learning rate of a step as a fraction of its peak."""
    warmup = min(100, t.max_iters // 10) if t.warmup_iters < 0 else t.warmup_iters
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(t.max_iters - warmup, 1)  # 0 ... 1
    if t.schedule == "cosine":
        return t.min_lr_ratio + (1 - t.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done))
    if t.schedule == "linear":
        return 1 - done
    if t.schedule == "wsd":
        return min(1.0, (t.max_iters - step) / max(t.decay_fraction * t.max_iters, 1))
    return 1.0


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Orthogonalise a stack of matrices (n, rows, cols): singular values go to about 1 (Muon, Keller Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.bfloat16()
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (https://kellerjordan.github.io/posts/muon/), for matrices.

    The same update as torch.optim.Muon (tested), but matrices of one shape are orthogonalised as one batch, and a fused
    matrix, whose `parts` are the row counts of what it is made of, part by part."""

    def __init__(self, params: Iterable, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[tuple, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                buffer.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(buffer, momentum)  # Nesterov
                p.mul_(1 - lr * group["weight_decay"])
                parts = getattr(p, "parts", [p.size(0)])
                for part in zip(p.split(parts), update.split(parts), strict=True):
                    by_shape.setdefault(part[0].shape, []).append(part)
            for (rows, cols), pairs in by_shape.items():
                updates = newton_schulz(torch.stack([u for _, u in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update, alpha=-lr * max(1, rows / cols) ** 0.5)


def make_optimizers(model: GPT, t: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, with decay for matrices and embeddings only, and Muon for the block matrices if asked."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in named if t.optimizer == "muon" and n.startswith("blocks.") and p.dim() == 2]
    chosen = {id(p) for p in muon}
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, p in named:
        if id(p) not in chosen:
            lr = {"wte.weight": t.embd_lr, "lm_head.weight": t.head_lr}.get(name) or t.learning_rate
            groups.setdefault((lr, t.weight_decay if p.dim() >= 2 else 0.0), []).append(p)
    adamw = [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(adamw, betas=(t.beta1, t.beta2), fused=True)]
    if muon:
        optimizers.append(Muon(muon, lr=t.muon_lr, weight_decay=t.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


LORA_SCALE = 2.0  # alpha / rank


class LoRALinear(Linear):
    """A frozen linear layer plus a trained low-rank term: y = x W^T + 2 (x A^T) B^T (arXiv 2106.09685)."""

    def __init__(self, base: Linear, lora_rank: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        like = {"device": base.weight.device, "dtype": torch.float32}
        self.lora_a = nn.Parameter(torch.empty(lora_rank, base.in_features, **like).normal_(0, base.in_features**-0.5))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, lora_rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        low_rank = F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype))
        return super().forward(x) + LORA_SCALE * low_rank


def add_lora(model: GPT, lora_rank: int) -> GPT:
    """Freeze a model and give each linear layer of its blocks a trainable low-rank term."""
    model.requires_grad_(False)
    for block in model.blocks:
        for parent, name in block.linears():
            setattr(parent, name, LoRALinear(getattr(parent, name), lora_rank))
    return model


def merged_state(model: GPT) -> dict[str, Tensor]:
    """The state dictionary with low-rank terms added to the weights they belong to."""
    state = model.state_dict()
    for name in [n for n in state if n.endswith(".lora_a")]:
        a, b = state.pop(name), state.pop(name[:-1] + "b")
        weight = name.removesuffix("lora_a") + "weight"
        state[weight] = state[weight] + (LORA_SCALE * b @ a).to(state[weight].dtype)
    return state


@dataclass
class RunFiles:
    """What a run writes: the best model, the state to go on from, and the log."""

    model: Path
    last: Path
    log: Path

    @classmethod
    def named(cls, name: str) -> "RunFiles":
        if Path(name).name != name:
            raise UserError(f"--name {name!r} must be a plain name: that of files under {CHECKPOINT_DIR}/")
        return cls(*(CHECKPOINT_DIR / f"{name}_model{end}" for end in (".pt", "_last.pt", ".jsonl")))

    def check_free(self, overwrite: bool) -> None:
        """Raise UserError if a run of this name is there and must not be overwritten."""
        there = [p for p in (self.model, self.last) if p.exists()]
        if there and not overwrite:
            raise UserError(
                f"{there[0]} is already there: go on with --resume, replace it with --overwrite, or choose a --name"
            )

    def clear(self) -> None:
        """Remove an earlier run of this name. A missing permission shows now, not after the first hour."""
        if world_size() > 1:
            torch.distributed.barrier()  # all have checked
        if rank() == 0:
            with atomic_write(self.log):  # an empty log
                pass
            for p in (self.model, self.last):
                p.unlink(missing_ok=True)


class Evaluator:
    """Loss on a fixed set of validation blocks, spread evenly over the split."""

    def __init__(self, data: Data, block_size: int, batch_size: int, eval_tokens: int) -> None:
        windows = data.windows("val", block_size)
        n = min(len(windows), max(1, eval_tokens // block_size))
        self.starts = np.array([windows[i * len(windows) // n] for i in range(n)])
        self.data, self.block_size, self.batch_size = data, block_size, batch_size
        self.token_bytes = torch.from_numpy(data.tokenizer.token_bytes())

    @torch.no_grad()
    def __call__(self, model: GPT) -> dict[str, float]:
        """val_loss (nats per token), val_ppl, val_bpb (bits per byte of text), val_tokens."""
        device = model.wte.weight.device
        was_training = model.training
        model.eval()
        total = torch.zeros(3, dtype=torch.float64)  # loss, tokens, bytes
        batches = [self.starts[i : i + self.batch_size] for i in range(0, len(self.starts), self.batch_size)]
        for starts in batches[rank() :: world_size()]:
            batch = self.data.batch("val", starts, self.block_size)
            targets = batch["targets"][batch["targets"] >= 0]
            loss = model.loss(**{k: v.to(device) for k, v in batch.items()})
            total += torch.tensor(
                [loss.item(), targets.numel(), int(self.token_bytes[targets].sum())], dtype=torch.float64
            )
        model.train(was_training)
        total = all_reduce(total.to(device if device.type == "cuda" else "cpu")).tolist()
        loss = total[0] / max(total[1], 1)
        bpb = total[0] / math.log(2) / max(total[2], 1)
        return {"val_loss": loss, "val_ppl": math.exp(min(loss, 700)), "val_bpb": bpb, "val_tokens": int(total[1])}


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT and SIGTERM while a run is in progress; the second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    previous = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def compile_model(model: GPT, t: TrainConfig, device: torch.device) -> None:
    """torch.compile the blocks where asked, or where the work ahead pays for it: on a GPU from 200 steps on. Two CPU
    cores gain a tenth, nothing with narrow models, for half a minute at the start: from 1e15 FLOPs, an hour there."""
    c = model.config
    flops = training_flops_per_token(c) * t.max_iters * t.batch_size * c.block_size
    pays = t.max_iters >= 200 if device.type == "cuda" else device.type == "cpu" and c.n_embd >= 512 and flops > 1e15
    if t.compile == "false" or t.compile == "auto" and not pays:
        return
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        say("no C++ compiler here: going on without torch.compile")
        return
    say("compiling the model: the first step can take a minute")
    if t.compile == "auto":
        torch._dynamo.config.suppress_errors = True  # where it fails, go on without
    model.compiled = torch.compile(model.hidden)


def train_step(
    model: GPT,
    batches: Iterable[dict[str, Tensor]],
    n_targets: Tensor,
    objective: Callable,
    scaler: torch.amp.GradScaler,
) -> Tensor:
    """Forward and backward over the micro-batches of a step; returns the loss summed over targets, divided by the count
    of targets in the whole batch. Gradients add up in p.grad."""
    total = torch.zeros((), device=n_targets.device)
    for batch in batches:
        loss = objective(model, batch) / n_targets
        scaler.scale(loss).backward()
        total += loss.detach()
    return total


def fit(
    model: GPT,
    data: Data,
    t: TrainConfig,
    files: RunFiles,
    extra: dict[str, Any],
    objective: Callable[[GPT, dict[str, Tensor]], Tensor] = lambda model, batch: model.loss(**batch),
    resume: dict[str, Any] | None = None,
    prompt: str = "\n",
    block_size: int = 0,
) -> dict[str, float]:
    """Train a model and leave its checkpoints and log; returns the last evaluation.

    objective(model, batch) is the loss summed over a micro-batch; its `parts`, if it has any, are what the log shows
    besides. Windows have block_size tokens (0: the model's). `extra` goes into the checkpoints (variant, arguments).
    Everything random is a function of (seed, step), so a resumed run is bit for bit the run that was never stopped.
    """
    device, tokenizer, block_size = model.wte.weight.device, data.tokenizer, block_size or model.config.block_size
    windows = data.windows("train", block_size)
    if t.epochs:
        t = replace(t, max_iters=max(1, math.ceil(t.epochs * len(windows) / t.batch_size)), epochs=0.0)
    eval_interval = t.eval_interval or max(1, t.max_iters // 10)
    sample_interval = t.sample_interval or max(1, t.max_iters // 4)
    micro_batch_size = t.batch_size // (t.grad_accum * world_size())
    sampler = BlockSampler(len(windows), t.batch_size, t.seed)
    evaluate = Evaluator(data, block_size, micro_batch_size, t.eval_tokens)
    optimizers = make_optimizers(model, t)
    scaler = torch.amp.GradScaler(device.type, enabled=model.compute_dtype == torch.float16)
    params = [p for p in model.parameters() if p.requires_grad]
    start_step, logged_step, seconds, best, results = 0, 0, 0.0, math.inf, {}
    running = torch.zeros((), device=device)  # loss since the last record of the log
    has_parts = hasattr(objective, "take_parts")
    if resume is not None:
        metrics, start_step = resume["metrics"], resume["step"]
        seconds, best, results = metrics["seconds"], metrics["best_val_loss"], metrics["last"]
        logged_step = metrics["logged_step"]
        running += metrics["running_loss"]
        if has_parts:
            objective.sums, objective.counts = map(torch.tensor, metrics["running_parts"])
        for optimizer, state in zip(optimizers, resume["optimizer"], strict=True):
            optimizer.load_state_dict(state)
        scaler.load_state_dict(resume["scaler"])
        trim_log(files.log, start_step)
    compile_model(model, t, device)

    def micro_batches(step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This process's share of a step, on its way to the device, and the number of targets in the whole batch."""
        mine = np.array_split(sampler(step), world_size())[rank()]
        parts = np.array_split(mine, t.grad_accum)
        batches = [data.batch("train", np.array([windows[i] for i in part]), block_size) for part in parts]
        if getattr(objective, "cache", None) is not None:
            batches = [{**batch, "blocks": torch.from_numpy(part)} for batch, part in zip(batches, parts, strict=True)]
        n_targets = torch.tensor(float(sum(int((b["targets"] >= 0).sum()) for b in batches)), device=device)
        if device.type == "cuda":
            batches = [{k: v.pin_memory().to(device, non_blocking=True) for k, v in b.items()} for b in batches]
        else:
            batches = [{k: v.to(device) for k, v in b.items()} for b in batches]
        return batches, all_reduce(n_targets).clamp(min=1)

    def save(path: Path, step: int, state: bool) -> None:
        if rank() == 0:
            save_checkpoint(path, {
                **extra,
                "config": asdict(model.config),
                "model": model.state_dict() if state else merged_state(model),
                "tokenizer": tokenizer.spec,
                "step": step,
                "train_config": asdict(replace(t, dtype=str(model.compute_dtype).removeprefix("torch."))),
                "block_size": block_size,
                "data": {"path": str(data.path), "digest": data.digest},
                "metrics": {
                    "seconds": seconds,
                    "best_val_loss": best,
                    "last": results,
                    "logged_step": logged_step,
                    "running_loss": running.item(),
                    "running_parts": [objective.sums.tolist(), objective.counts.tolist()] if has_parts else None,
                },
                "optimizer": [o.state_dict() for o in optimizers] if state else None,
                "scaler": scaler.state_dict() if state else None,
            })  # fmt: skip

    model.train()
    tokens_per_step = t.batch_size * block_size
    timed_step, timed_at = start_step, time.perf_counter()
    first_bad = torch.full((), math.inf, device=device)  # the first step whose loss or gradient was not finite
    pending = micro_batches(start_step) if start_step < t.max_iters else None
    with stop_signals() as stop, progress_bar(total=t.max_iters, initial=start_step, unit="step", desc="train") as bar:
        for step in range(start_step, t.max_iters):
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * lr_factor(step, t)
                optimizer.zero_grad(set_to_none=True)
            torch.manual_seed((t.seed * 1_000_003 + step) * 4096 + rank())  # dropout
            batches, n_targets = pending
            loss = train_step(model, batches, n_targets, objective, scaler)
            if step + 1 < t.max_iters:
                pending = micro_batches(step + 1)  # while a GPU is still at work on this step
            loss = all_reduce(loss)
            if world_size() > 1:
                for work in [torch.distributed.all_reduce(p.grad, async_op=True) for p in params if p.grad is not None]:
                    work.wait()
            for optimizer in optimizers:
                scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(params, t.grad_clip or math.inf)
            watched = loss if scaler.is_enabled() else loss + grad_norm
            first_bad = torch.where(watched.isfinite(), first_bad, first_bad.clamp(max=step + 1))
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            running += loss
            bar.update()

            done = step + 1
            last = done == t.max_iters
            log_now, eval_now = done % t.log_interval == 0 or last, done % eval_interval == 0 or last
            stopping = bool(stop)
            if world_size() > 1:  # all processes together, and without a synchronisation in every step
                stopping = log_now and bool(all_reduce(torch.tensor(float(len(stop)), device=device)))
            if not (log_now or eval_now or stopping):
                continue
            loss_sum = running.item()  # waits for a GPU, so that what follows is not timed
            elapsed = time.perf_counter() - timed_at
            seconds += elapsed
            speed = (done - timed_step) * tokens_per_step / elapsed
            if eval_now:
                results = evaluate(model)
                if not math.isfinite(results["val_loss"]):
                    first_bad = first_bad.clamp(max=done)
            if math.isfinite(first_bad.item()):
                kept = (
                    f"the last good checkpoint is {files.last}"
                    if files.last.exists()
                    else "no checkpoint was written yet"
                )
                raise UserError(
                    f"the loss or its gradient is not finite at step {int(first_bad)}: {kept}; try a lower "
                    "--learning_rate, a longer --warmup_iters or --dtype float32"
                )
            lr = optimizers[0].param_groups[0]["lr"]
            record = {
                "step": done,
                "tokens": done * tokens_per_step,
                "seconds": round(seconds, 2),
                "loss": loss_sum / (done - logged_step),
                "lr": lr,
                "grad_norm": grad_norm.item(),
                "tokens_per_s": round(speed),
            }
            bar.set_postfix_str(f"loss {record['loss']:.3f}, lr {lr:.2e}, {speed:,.0f} tokens/s")
            if (log_now or eval_now) and hasattr(objective, "take_parts"):
                record.update(objective.take_parts())
            if eval_now:
                record.update(results)
                say(
                    f"step {done}: loss {record['loss']:.4f}, val_loss {results['val_loss']:.4f}, perplexity "
                    f"{results['val_ppl']:.2f}, {results['val_bpb']:.4f} bits per byte, {speed:,.0f} tokens/s"
                )
                improved, best = results["val_loss"] < best, min(best, results["val_loss"])
                if improved:
                    save(files.model, done, state=False)
            if log_now or eval_now:
                if rank() == 0:
                    with open(files.log, "a", encoding="utf-8") as f:
                        f.write(json.dumps(record) + "\n")
                running, logged_step = torch.zeros((), device=device), done
            if eval_now or stopping:
                save(files.last, done, state=True)
                if stopping and not files.model.exists():
                    save(files.model, done, state=False)
            if sample_interval > 0 and (done % sample_interval == 0 or last) and rank() == 0:
                text = generate_text(
                    model,
                    tokenizer,
                    tokenizer.prompt(prompt),
                    min(100, block_size),
                    SamplingSettings(0.8, top_k=50),
                    heal=True,
                )[0]
                say(f"--- sample at step {done} ---\n{prompt}{text}\n---")
            if stopping:
                bar.close()
                say(f"stopped at step {done}: saved {files.last}; go on with --resume")
                raise SystemExit(128 + stop[0])
            timed_step, timed_at = done, time.perf_counter()
    return {**results, "best_val_loss": best, "seconds": seconds}


def trim_log(path: Path, step: int) -> None:
    """Drop the records after a step, which a resumed run will write again."""
    if rank() == 0 and path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        with atomic_write(path) as f:
            f.write("".join(line + "\n" for line in lines).encode())


# ----------------------------------------------------------------------------------------------------------------------
# Distillation
# ----------------------------------------------------------------------------------------------------------------------


def divergence(log_p: Tensor, log_q: Tensor, kind: str, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The divergence (rows,) between a teacher's log p and a student's log q, both (rows, n) and at the temperature,
    and its gradient (rows, n) by the student's logits before the temperature.

    forward_kl: KL(p || q) (arXiv 1503.02531). reverse_kl: KL(q || p) (arXiv 2306.08543). jsd: the generalised
    Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (arXiv 2306.13649,
    equation 1), which at beta 0 is the forward and at beta 1 the reverse KL, as in TRL.
    """
    if kind == "jsd" and beta in (0.0, 1.0):
        kind = "reverse_kl" if beta else "forward_kl"
    p = log_p.exp()
    if kind == "forward_kl":
        value = (log_p - log_q).masked_fill_(p == 0, 0.0).mul_(p).sum(-1)
        return value, log_q.exp().sub_(p).div_(temperature)
    q = log_q.exp()
    if kind == "reverse_kl":
        inner = (log_q - log_p).where(q > 0, 0.0)
        value = (q * inner).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        inner = (1 - beta) * (log_q - log_m).where(q > 0, 0.0)
        value = beta * (p * (log_p - log_m).where(p > 0, 0.0)).sum(-1) + (q * inner).sum(-1)
    return value, q * (inner - (q * inner).sum(-1, keepdim=True)) / temperature


@dataclass
class DistillConfig:
    """What a student learns from its teacher: alpha T^2 divergence + (1 - alpha) cross-entropy (arXiv 1503.02531)."""

    temperature: float = setting(2.0, "softens teacher and student alike")
    alpha: float = setting(0.5, "weight of the teacher; the rest is the cross-entropy with the text")
    divergence: str = setting("forward_kl", "between teacher and student", ("forward_kl", "reverse_kl", "jsd"))
    beta: float = setting(0.5, "of jsd: 0 is forward_kl, 1 is reverse_kl")
    cache_teacher: int = setting(
        0, "keep the teacher's K most likely tokens per position beside the data (0: run it live)"
    )
    on_policy: float = setting(0.0, "fraction of the batches that the student writes and the teacher scores")

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "on_policy"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be between 0 and 1")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}: it must be above 0 and finite")
        if self.cache_teacher < 0:
            raise UserError(f"cache_teacher is {self.cache_teacher}: it must be at least 0")
        if self.cache_teacher and self.on_policy:
            raise UserError(
                "cache_teacher and on_policy exclude each other: the student's own text is new in each step"
            )


class DistillLoss:
    """Objective of linear_loss for a chunk of tokens: the teacher's logits are made from its hidden states here, chunk
    by chunk, so that neither model's full logits ever exist."""

    chunk_divisor = 4  # for it holds two distributions, and the products in between, where CrossEntropy holds one

    def __init__(self, d: DistillConfig, targets: Tensor, teacher_logp: Callable[[slice], Any], n_vocab: int) -> None:
        self.d, self.teacher_logp, self.n_vocab = d, teacher_logp, n_vocab
        self.cross_entropy, self.counted = CrossEntropy(targets), targets.flatten() >= 0
        self.parts = torch.zeros(2, device=targets.device)  # divergence, cross-entropy

    def __call__(self, logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor]:
        d, counted = self.d, self.counted[rows]
        wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
        log_q = (logits[:, : self.n_vocab].to(wide) / d.temperature).log_softmax(dim=-1)
        teacher = self.teacher_logp(rows)
        if isinstance(teacher, tuple):
            value, grad = self.with_tail(log_q, *teacher)
        else:
            value, grad = divergence(teacher, log_q, d.divergence, d.beta, d.temperature)
        del log_q, teacher
        scale = d.alpha * d.temperature**2
        grad = F.pad(grad.mul_(counted[:, None]).mul_(scale), (0, logits.size(1) - self.n_vocab))
        cross_entropy = torch.zeros((), dtype=wide, device=logits.device)
        if d.alpha < 1:
            cross_entropy, grad_ce = self.cross_entropy(logits, rows, True)
            grad.add_(grad_ce, alpha=1 - d.alpha)
        value = (value * counted).sum()
        self.parts += torch.stack((value, cross_entropy)).to(self.parts.dtype)
        return scale * value + (1 - d.alpha) * cross_entropy, grad.to(logits.dtype) if with_grad else None

    def with_tail(self, log_q: Tensor, index: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence over the teacher's K most likely tokens, index (rows, K), and one more outcome, "any other
        token", whose mass is what they leave: log_p (rows, K + 1). Lumping outcomes can only lower a divergence
        (data-processing inequality), it stays 0 for equal distributions, and the student keeps its own ranking within
        the tail, where spreading the mass evenly or cutting it off would teach it something false."""
        d = self.d
        top = log_q.gather(1, index)
        if index.size(1) == log_q.size(1):  # no tail
            log_p = log_p[:, :-1].log_softmax(dim=1)
            value, grad = divergence(log_p, top, d.divergence, d.beta, d.temperature)
            return value, torch.zeros_like(grad).scatter(1, index, grad)
        tail = log_q.scatter(1, index, float("-inf")).logsumexp(dim=-1, keepdim=True)
        value, grad = divergence(log_p, torch.cat((top, tail), dim=1), d.divergence, d.beta, d.temperature)
        within = (log_q - tail).exp()  # the tail's gradient, shared out by the student's own probabilities
        return value, (within * grad[:, -1:]).scatter(1, index, grad[:, :-1])


class TeacherCache:
    """A teacher's top K probabilities of each position of each training block, made the first time a block is read.

    Beside the data, in teacher_cache/: ids.bin (uint32) and probs.bin (float16), (blocks, block_size, K); done.bin, a
    byte a block; meta.json, which says for which teacher, data, temperature and shape. Files are sparse until filled.
    """

    def __init__(self, folder: Path, meta: dict[str, Any], n_blocks: int, block_size: int, K: int) -> None:
        shape = (n_blocks, block_size, K)
        there = read_json(folder / "meta.json", {})
        wrong = next((k for k in meta if there and there.get(k) != meta[k]), None)
        if wrong:
            raise UserError(
                f"{folder} was made for another {wrong.replace('_', ' ')} ({there.get(wrong)}, and this is "
                f"{meta[wrong]}): delete it, or run without --cache_teacher"
            )
        folder.mkdir(parents=True, exist_ok=True)
        if not there:
            say(f"teacher cache {folder}: {n_blocks * block_size * K * 6 / 1e6:,.1f} MB when full")
            with atomic_write(folder / "meta.json") as f:
                f.write(json.dumps(meta, indent=1).encode())

        def open_array(name: str, dtype: str, shape: tuple[int, ...]) -> np.memmap:
            path = folder / name
            with open(path, "ab") as f:  # leaves alone what another process has begun
                f.truncate(math.prod(shape) * np.dtype(dtype).itemsize)
            return np.memmap(path, dtype, "r+", shape=shape)

        self.ids, self.probs = open_array("ids.bin", "<u4", shape), open_array("probs.bin", "<f2", shape)
        self.done = open_array("done.bin", "u1", (n_blocks,))

    def write(self, block: int, ids: Tensor, probs: Tensor) -> None:
        """ids and probs (block_size, K) of a block. The mark that it is done comes last."""
        self.ids[block], self.probs[block] = ids.cpu().numpy(), probs.cpu().numpy()
        self.done[block] = 1


class Distillation:
    """Objective of fit: what a student's loss on a batch is, given its teacher."""

    def __init__(self, teacher: GPT, d: DistillConfig, n_vocab: int, cache: TeacherCache | None = None) -> None:
        self.teacher, self.d, self.n_vocab, self.cache = teacher.eval().requires_grad_(False), d, n_vocab, cache
        self.sums, self.counts = torch.zeros(2), torch.zeros(2)  # of the divergence and of the cross-entropy

    def __call__(self, student: GPT, batch: dict[str, Tensor]) -> Tensor:
        d, batch, share = self.d, dict(batch), 1.0
        n = int((batch["targets"] >= 0).sum())
        blocks = batch.pop("blocks", None)
        if d.alpha == 0 and not d.on_policy:  # exactly train
            value = student.loss(**batch)
            self.sums += torch.tensor([0.0, value.item()])
            self.counts += torch.tensor([0, n])
            return value
        loss = d
        if d.on_policy and torch.rand(()).item() < d.on_policy:
            batch, loss = self.student_writes(student, batch), replace(d, alpha=1.0)
            n_written = int((batch["targets"] >= 0).sum())
            n, share = n_written, n / n_written  # the caller divides by the number of targets in the data
        idx, targets, segments = batch["idx"], batch["targets"], batch.get("segments")
        if self.cache is None:
            teacher_logp = self.live(idx, segments)
        else:
            teacher_logp = self.cached(idx, segments, blocks)
        objective = DistillLoss(loss, targets, teacher_logp, self.n_vocab)
        value = linear_loss(student.trunk(idx, segments), student, objective)
        self.sums += objective.parts.cpu()
        self.counts += torch.tensor([n, n * (loss.alpha < 1)])
        return value * share

    def take_parts(self) -> dict[str, float]:
        """The divergence and the cross-entropy per target since the last call, for the log."""
        totals = torch.stack((self.sums, self.counts)).to(self.teacher.wte.weight.device)
        sums, counts = all_reduce(totals).cpu()  # over all processes: each calls this at the same steps
        divergence, cross_entropy = (sums / counts.clamp(min=1)).tolist()
        self.sums, self.counts = torch.zeros(2), torch.zeros(2)
        return {"divergence": divergence, "cross_entropy": cross_entropy}

    @torch.no_grad()
    def live(self, idx: Tensor, segments: Tensor | None) -> Callable[[slice], Tensor]:
        """The teacher's log-probabilities, as a function of the rows wanted."""
        hidden = self.teacher.hidden(idx, segments=segments).flatten(0, 1)

        def teacher_logp(rows: slice) -> Tensor:
            logits = self.teacher.logits(hidden[rows])[:, : self.n_vocab]
            return logits.div_(self.d.temperature).log_softmax(dim=-1)

        return teacher_logp

    @torch.no_grad()
    def cached(self, idx: Tensor, segments: Tensor | None, blocks: Tensor) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Token ids (rows, K) and log-probabilities (rows, K + 1), the last of them the tail's, from the cache."""
        numbers, K, T = blocks.tolist(), self.cache.ids.shape[2], idx.size(1)
        missing = [i for i, block in enumerate(numbers) if not self.cache.done[block]]
        if missing:
            rows = torch.tensor(missing, device=idx.device)
            teacher_logp = self.live(idx[rows], None if segments is None else segments[rows])
            for j, i in enumerate(missing):
                log_p, ids = teacher_logp(slice(j * T, (j + 1) * T)).topk(K)
                self.cache.write(numbers[i], ids, log_p.exp())
        ids = torch.from_numpy(np.concatenate([self.cache.ids[b] for b in numbers]).astype(np.int64))
        probs = torch.from_numpy(np.concatenate([self.cache.probs[b] for b in numbers]).astype(np.float32))
        tail = (1 - probs.sum(dim=1, keepdim=True)).clamp(min=1e-6)
        log_p = torch.cat((probs, tail), dim=1).clamp(min=1e-12).log().log_softmax(dim=1)
        ids, log_p = ids.to(idx.device), log_p.to(idx.device)
        return lambda rows: (ids[rows], log_p[rows])

    @torch.no_grad()
    def student_writes(self, student: GPT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """A batch whose second half is the student's own continuation of the first (arXiv 2306.13649, algorithm 1)."""
        idx = batch["idx"]
        keep = idx.size(1) // 2
        was_training = student.training
        student.eval()
        prompts, seed = idx[:, :keep].tolist(), int(torch.randint(2**31, ()))
        generator = torch.Generator(idx.device).manual_seed(seed)
        new = list(generate(student, prompts, idx.size(1) + 1 - keep, SamplingSettings(), generator))
        student.train(was_training)
        rows = torch.cat((idx[:, :keep], torch.stack(new, dim=1).clone()), dim=1)
        targets = rows[:, 1:].clone()
        targets[:, : keep - 1] = -1  # only what the student wrote
        return {"idx": rows[:, :-1].contiguous(), "targets": targets}


def every_kth_layer(teacher: GPT, student: GPT) -> None:
    """Start a student as the teacher with only every k-th of its layers (as DistilGPT2 was made, arXiv 1910.01108)."""
    for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_inner"):
        ours, theirs = getattr(student.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise UserError(
                f"--init_from_teacher: {name} is {ours} in the student and {theirs} in the teacher: widths must agree"
            )
    chosen = [
        round(i * (len(teacher.blocks) - 1) / max(len(student.blocks) - 1, 1)) for i in range(len(student.blocks))
    ]
    ours, theirs = student.state_dict(), teacher.state_dict()
    for name, tensor in ours.items():
        source = name
        if name.startswith("blocks."):
            _, i, rest = name.split(".", 2)
            source = f"blocks.{chosen[int(i)]}.{rest}"
        value = theirs.get(source)
        if (
            value is None
            or value.shape[1:] != tensor.shape[1:]
            or (value.dim() and value.size(0) < tensor.size(0) and "w" not in source[:2])
        ):
            raise UserError(
                f"--init_from_teacher: {name} is {tuple(tensor.shape)} in the student and "
                f"{'not in the teacher' if value is None else str(tuple(value.shape)) + ' in the teacher'}: widths "
                "must agree"
            )
        rows = min(len(tensor), len(value))  # vocabulary and learned positions may be shorter
        tensor[:rows].copy_(value[:rows])


def weights_digest(model: GPT) -> str:
    digest = hashlib.blake2b(json.dumps(asdict(model.config), sort_keys=True).encode(), digest_size=8)
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation
# ----------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexity(
    model: GPT, tokens: np.ndarray, context: int, stride: int, batch_tokens: int = 16384
) -> tuple[float, int]:
    """The sum of -log p in nats of all tokens but the first, and their number. Windows of `context` tokens move on by
    `stride`; each token is scored once, in the first window that has it, with all of that window before it. At a
    stride of `context` a window has one token more, its last target, for a window's first token is not scored in it."""
    device, n = model.wte.weight.device, len(tokens)
    jobs = []  # (begin, end, first target that is scored)
    scored = 1
    for begin in range(0, max(n - 1, 1), stride):
        end = min(begin + context + (stride == context), n)
        if end > scored:
            jobs.append((begin, end, scored))
            scored = end
        if end == n:
            break
    total, batch_size = 0.0, max(1, batch_tokens // context)
    with progress_bar(total=n - 1, unit=" tokens", desc="eval") as bar:
        for i in range(0, len(jobs), batch_size):
            group = jobs[i : i + batch_size]
            longest = max(end - begin for begin, end, _ in group)
            idx = torch.zeros(len(group), longest - 1, dtype=torch.int64)
            targets = torch.full((len(group), longest - 1), -1)
            for row, (begin, end, first) in enumerate(group):
                ids = torch.from_numpy(tokens[begin:end].astype(np.int64))
                idx[row, : len(ids) - 1] = ids[:-1]
                targets[row, first - begin - 1 : len(ids) - 1] = ids[first - begin :]
            total += model.loss(idx.to(device), targets.to(device)).item()
            bar.update(sum(end - first for _, end, first in group))
    return total, n - 1


def evaluate_text(
    model: GPT, tokenizer: Tokenizer, tokens: np.ndarray, context: int, stride: int, where: str = "the text"
) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte, word_perplexity (words parted by white space), tokens."""
    if len(tokens) < 2:
        raise UserError(f"{where} has {len(tokens)} token(s): at least 2 are needed, one to follow from the other")
    total, n = perplexity(model, tokens, context, stride)
    text_bytes = int(tokenizer.token_bytes()[tokens[1:].astype(np.int64)].sum())
    special = np.isin(tokens, list(tokenizer.special.values()))  # between documents
    documents = np.split(tokens, np.flatnonzero(special))
    words = sum(len(tokenizer.without_special(tokenizer.decode(d.tolist())).split()) for d in documents)
    return {
        "loss": total / n, "perplexity": math.exp(min(total / n, 700)),
        "bits_per_byte": total / math.log(2) / max(text_bytes, 1),
        "word_perplexity": math.exp(min(total / max(words, 1), 700)), "tokens": n,
    }  # fmt: skip


def lm_eval_adapter(model: GPT, tokenizer: Tokenizer, batch_size: int) -> Any:
    """The model as EleutherAI's lm-eval takes it: loglikelihood, loglikelihood_rolling and generate_until."""
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM

    device, context = model.wte.weight.device, model.config.context

    class Adapter(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eot if tokenizer.eot is not None else tokenizer.special[IM_END]

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.bos[0] if tokenizer.bos else self.eot_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            ids = tokenizer.encode_rendered(string)
            if add_special_tokens is False or ids[: len(tokenizer.bos)] == tokenizer.bos:
                return ids
            return tokenizer.bos + ids

        @torch.no_grad()
        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            results: list[Any] = [None] * len(requests)
            order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1]) - len(requests[i][2]))
            for begin in progress_range(0, len(order), batch_size, "loglikelihood"):
                group = order[begin : begin + batch_size]
                rows = [(requests[i][1] + requests[i][2])[-(context + 1) :][:-1] for i in group]
                idx = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
                for k, row in enumerate(rows):
                    idx[k, : len(row)] = torch.tensor(row)  # padded at the right, which causal attention never sees
                hidden = model.hidden(idx.to(device))
                for k, i in enumerate(group):
                    target = torch.tensor(requests[i][2], device=device)[-context:]
                    logits = model.logits(hidden[k, len(rows[k]) - len(target) : len(rows[k])])
                    log_p = logits.log_softmax(dim=-1).gather(1, target[:, None])
                    results[i] = (log_p.sum().item(), bool((logits.argmax(dim=-1) == target).all()))
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
            return results

        def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
            totals = []
            for request in requests:
                windows = utils.get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, max_seq_len=context, context_len=1
                )
                pairs = [(None, *utils.make_disjoint_window(w)) for w in windows]
                totals.append(sum(value for value, _ in self._loglikelihood_tokens(pairs, disable_tqdm=True)))
            return totals

        def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
            results: list[Any] = [None] * len(requests)
            groups: dict[str, list[int]] = {}
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            for members in groups.values():
                options = dict(requests[members[0]].args[1])
                until = options.get("until") or []
                until = [until] if isinstance(until, str) else list(until)
                aliases = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
                length = next((int(options[k]) for k in aliases if options.get(k) is not None), 256)
                temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
                for begin in range(0, len(members), batch_size):
                    group = members[begin : begin + batch_size]
                    prompts = [self.tok_encode(requests[i].args[0])[-max(context - length, 1) :] for i in group]
                    settings = SamplingSettings(temperature=temperature)
                    for i, text in zip(
                        group, complete(model, tokenizer, prompts, length, settings, until), strict=True
                    ):
                        results[i] = text
            return results

    return Adapter()


def complete(
    model: GPT, tokenizer: Tokenizer, prompts: list[list[int]], length: int, s: SamplingSettings, until: list[str]
) -> list[str]:
    """Continuations of different prompts as one batch, each up to `length` tokens, the end of text or one of
    `until`."""
    ends = {tokenizer.special.get(t) for t in (EOT, IM_END)} - {None}
    special = set(tokenizer.special.values())
    ids: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for tokens in generate(model, prompts, length, s):
        for i, token in enumerate(tokens.tolist()):
            if not done[i]:
                done[i] = token in ends
                ids[i] += [] if done[i] or token in special else [token]
                done[i] = done[i] or any(stop in tokenizer.decode(ids[i][-64:]) for stop in until)
        if all(done):
            break
    texts = [tokenizer.decode(row) for row in ids]
    return [text[: min((text.find(stop) for stop in until if stop in text), default=len(text))] for text in texts]


def progress_range(begin: int, end: int, step: int, desc: str) -> Iterator[int]:
    with progress_bar(total=end - begin, desc=desc) as bar:
        for i in range(begin, end, step):
            yield i
            bar.update(min(step, end - i))


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face in and out
# ----------------------------------------------------------------------------------------------------------------------


def hf_tensors(c: GPTConfig) -> list[tuple[str, str, slice, str]]:
    """How an architecture's tensors are laid out in transformers: (its name, our name, the rows of ours, how they
    differ).

    `transpose`: stored as (in, out) (GPT-2's Conv1D). `interleave`: q, k and v of a head lie together (GPT-NeoX).
    `mirror`: rotated by -theta instead of theta, so the second half of each head is negated (nanochat).
    """
    q, kv, everything = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, slice(None)
    q_rows, k_rows, v_rows = slice(0, q), slice(q, q + kv), slice(q + kv, q + 2 * kv)
    rows = slice(0, c.vocab_size)
    out: list[tuple[str, str, slice, str]] = []

    def add(theirs: str, ours: str, rows: slice = everything, how: str = "", bias: bool = False) -> None:
        out.append((f"{theirs}.weight", f"{ours}.weight", rows, how))
        if bias:
            out.append((f"{theirs}.bias", f"{ours}.bias", rows, "" if how == "transpose" else how))

    if c.arch == "gpt2":
        add("transformer.wte", "wte", rows)
        add("transformer.wpe", "wpe")
        for i in range(c.n_layer):
            for theirs, ours in (("ln_1", "norm_1"), ("ln_2", "norm_2")):
                add(f"transformer.h.{i}.{theirs}", f"blocks.{i}.{ours}", bias=True)
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                ours = part.replace("c_attn", "qkv").replace("c_", "")
                add(f"transformer.h.{i}.{part}", f"blocks.{i}.{ours}", how="transpose", bias=True)
        add("transformer.ln_f", "norm_f", bias=True)
    elif c.arch == "gpt_neox":
        add("gpt_neox.embed_in", "wte", rows)
        for i in range(c.n_layer):
            for theirs, ours in (
                ("input_layernorm", "norm_1"), ("post_attention_layernorm", "norm_2"), ("attention.dense", "attn.proj"),
                ("mlp.dense_h_to_4h", "mlp.fc"), ("mlp.dense_4h_to_h", "mlp.proj"),
            ):  # fmt: skip
                add(f"gpt_neox.layers.{i}.{theirs}", f"blocks.{i}.{ours}", bias=True)
            theirs, ours = f"gpt_neox.layers.{i}.attention.query_key_value", f"blocks.{i}.attn.qkv"
            add(theirs, ours, how="interleave", bias=True)
        add("gpt_neox.final_layer_norm", "norm_f", bias=True)
    else:  # llama, qwen2, qwen3, nanochat
        add("model.embed_tokens", "wte", rows)
        mirror = "mirror" if c.arch == "nanochat" else ""
        for i in range(c.n_layer):
            theirs, ours = f"model.layers.{i}", f"blocks.{i}"
            if c.norm_weight:
                add(f"{theirs}.input_layernorm", f"{ours}.norm_1")
                add(f"{theirs}.post_attention_layernorm", f"{ours}.norm_2")
            qkv_bias, mlp_bias = c.bias != "none", c.bias == "all"
            add(f"{theirs}.self_attn.q_proj", f"{ours}.attn.qkv", q_rows, mirror, qkv_bias)
            add(f"{theirs}.self_attn.k_proj", f"{ours}.attn.qkv", k_rows, mirror, qkv_bias)
            add(f"{theirs}.self_attn.v_proj", f"{ours}.attn.qkv", v_rows, "", qkv_bias)
            add(f"{theirs}.self_attn.o_proj", f"{ours}.attn.proj", bias=c.bias in ("attn", "all"))
            if c.qk_norm and c.norm_weight:
                add(f"{theirs}.self_attn.q_norm", f"{ours}.attn.q_norm")
                add(f"{theirs}.self_attn.k_norm", f"{ours}.attn.k_norm")
            if c.is_glu:
                add(f"{theirs}.mlp.gate_proj", f"{ours}.mlp.fc", slice(0, c.n_inner), bias=mlp_bias)
                add(f"{theirs}.mlp.up_proj", f"{ours}.mlp.fc", slice(c.n_inner, 2 * c.n_inner), bias=mlp_bias)
                add(f"{theirs}.mlp.down_proj", f"{ours}.mlp.proj", bias=mlp_bias)
            else:
                add(f"{theirs}.mlp.fc1", f"{ours}.mlp.fc")
                add(f"{theirs}.mlp.fc2", f"{ours}.mlp.proj")
        if c.norm_weight:
            add("model.norm", "norm_f")
    if not c.tie_word_embeddings:
        out.append(("embed_out.weight" if c.arch == "gpt_neox" else "lm_head.weight", "lm_head.weight", rows, ""))
    return out


def hf_layout(x: Tensor, how: str, c: GPTConfig, back: bool = False) -> Tensor:
    """Our tensor as transformers stores it (see hf_tensors), or `back`."""
    if how == "transpose":
        return x.T
    if how == "interleave":  # (3, heads, head_dim, ...) <-> (heads, 3, head_dim, ...)
        first = (c.n_head, 3) if back else (3, c.n_head)
        return x.unflatten(0, (*first, c.head_dim)).transpose(0, 1).flatten(0, 2)
    if how == "mirror":
        sign = torch.ones(c.head_dim, dtype=x.dtype)
        sign[c.head_dim // 2 :] = -1
        return x * sign.repeat(x.size(0) // c.head_dim).view(-1, *[1] * (x.dim() - 1))
    return x


# Settings that an architecture leaves open, besides shape and dropout; all others must be as in ARCHS to be exported.
HF_FREE = {
    "gpt2": {"activation", "tie_word_embeddings"},
    "gpt_neox": {"activation", "tie_word_embeddings", "parallel_residual", "rope"},
    "llama": {"activation", "tie_word_embeddings", "bias", "n_kv_head", "head_dim", "rope"},
    "qwen2": {"tie_word_embeddings", "n_kv_head", "rope"},
    "qwen3": {"tie_word_embeddings", "n_kv_head", "head_dim", "rope"},
    "nanochat": {"activation", "tie_word_embeddings", "n_kv_head", "logit_softcap", "rope"},
}
HF_ACTIVATIONS = {
    "gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu", "relu2": "relu2", "silu": "silu", "swiglu": "silu",
    "geglu": "gelu",
}  # fmt: skip


def check_exportable(c: GPTConfig) -> None:
    """Raise UserError, naming the setting, if transformers' class of this architecture cannot express the config."""
    free, row = HF_FREE[c.arch], {**asdict(GPTConfig()), **ARCHS[c.arch]}
    fixed = [
        "pos_embd", "norm", "norm_weight", "norm_position", "embd_norm", "qk_norm", "activation", "bias",
        "parallel_residual",
        "logit_softcap",
    ]  # fmt: skip
    for name in fixed:
        if name not in free and getattr(c, name) != row[name]:
            raise UserError(
                f"{name} {getattr(c, name)} cannot be exported: a Hugging Face {c.arch} has {name} {row[name]}"
            )
    if "activation" in free and c.is_glu != (row["activation"] in ("swiglu", "geglu")):
        raise UserError(
            f"activation {c.activation} cannot be exported: a Hugging Face {c.arch} has one like {row['activation']}"
        )
    if c.bias == "qkv" and c.arch != "qwen2":
        raise UserError(f"bias qkv cannot be exported: a Hugging Face {c.arch} has no such choice")
    if "n_kv_head" not in free and c.n_kv_head != c.n_head:
        raise UserError(f"n_kv_head {c.n_kv_head} cannot be exported: a Hugging Face {c.arch} has as many as n_head")
    if "head_dim" not in free and c.head_dim * c.n_head != c.n_embd:
        raise UserError(f"head_dim {c.head_dim} cannot be exported: a Hugging Face {c.arch} has n_embd / n_head")
    original = c.rope_original_block_size or c.block_size
    if c.rope_scaling == "yarn" and c.context != original * c.rope_factor:
        raise UserError(
            f"rope_factor {c.rope_factor} cannot be exported: times {original} positions it must give the context, "
            f"{c.context}"
        )
    if c.rope_pct != 1 and c.arch != "gpt_neox":
        raise UserError(
            f"rope_pct {c.rope_pct} cannot be exported: a Hugging Face {c.arch} rotates whole heads (gpt_neox can)"
        )


def hf_rope(c: GPTConfig) -> dict[str, Any]:
    """transformers' rope_parameters. NTK-aware scaling is a larger theta and needs no scaling there."""
    theta, original = c.rope_theta, c.rope_original_block_size or c.block_size
    if c.rope_scaling == "ntk":
        theta *= c.rope_factor ** (c.rope_dim / (c.rope_dim - 2))
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if c.rope_scaling in ("linear", "yarn", "llama3"):
        rope.update(rope_type=c.rope_scaling, factor=c.rope_factor)
    if c.rope_scaling == "yarn":
        rope.update(beta_fast=c.rope_beta_fast, beta_slow=c.rope_beta_slow, original_max_position_embeddings=original)
        rope["attention_factor"] = rope_frequencies(c)[1]
    if c.rope_scaling == "llama3":
        rope.update(low_freq_factor=c.rope_low_freq_factor, high_freq_factor=c.rope_high_freq_factor)
        rope["original_max_position_embeddings"] = original
    if c.rope_pct != 1:
        rope["partial_rotary_factor"] = c.rope_pct
    return rope


HF_CLASSES = {
    "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "nanochat": "NanoChatForCausalLM",
}  # fmt: skip


def hf_config(c: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json, for transformers 5 (rope_parameters, dtype) and 4 (rope_theta, rope_scaling, torch_dtype) alike."""
    eos = tokenizer.eot if tokenizer.eot is not None else tokenizer.special.get(IM_END)
    config: dict[str, Any] = {
        "architectures": [HF_CLASSES[c.arch]], "model_type": c.arch, "dtype": dtype, "torch_dtype": dtype,
        "vocab_size": c.vocab_size, "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": tokenizer.bos[0] if tokenizer.bos else eos, "eos_token_id": eos, "pad_token_id": eos,
        "initializer_range": 0.02, "use_cache": True,
    }  # fmt: skip
    if c.arch == "gpt2":
        config.update(
            n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.n_inner,
            activation_function=HF_ACTIVATIONS[c.activation], layer_norm_epsilon=c.norm_eps, resid_pdrop=c.resid_pdrop,
            embd_pdrop=c.embd_pdrop, attn_pdrop=c.attn_pdrop,
        )  # fmt: skip
        return config
    rope = hf_rope(c)
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    config.update(
        hidden_size=c.n_embd, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, intermediate_size=c.n_inner,
        hidden_act=HF_ACTIVATIONS[c.activation], max_position_embeddings=c.context, attention_dropout=c.attn_pdrop,
        rope_parameters=rope, rope_theta=rope["rope_theta"],
        rope_scaling=None if rope["rope_type"] == "default" else scaling,
    )  # fmt: skip
    if c.arch == "gpt_neox":
        config.update(
            layer_norm_eps=c.norm_eps, use_parallel_residual=c.parallel_residual, rotary_pct=c.rope_pct,
            rotary_emb_base=rope["rope_theta"], hidden_dropout=c.resid_pdrop, attention_bias=True,
        )  # fmt: skip
        return config
    config.update(num_key_value_heads=c.n_kv_head, rms_norm_eps=c.norm_eps, attention_bias=c.bias in ("attn", "all"))
    if c.arch in ("llama", "qwen3"):
        config["head_dim"] = c.head_dim
    if c.arch == "llama":
        config["mlp_bias"] = c.bias == "all"
    if c.arch == "qwen2":
        config.update(use_sliding_window=False)
        del config["attention_bias"]
    if c.arch == "nanochat":
        config["final_logit_softcapping"] = c.logit_softcap or None
    return config


def config_from_hf(j: dict[str, Any], path: Path) -> GPTConfig:
    """The GPTConfig of a transformers config.json. Raises UserError for what this GPT cannot be."""
    try:
        return read_hf_config(j, path)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, OverflowError) as e:
        raise UserError(f"{path} has a value that makes no sense: {type(e).__name__}: {e}") from None
    except UserError as e:
        raise e if str(path) in str(e) else UserError(f"{path}: {e}") from None


def read_hf_config(j: dict[str, Any], path: Path) -> GPTConfig:
    arch = j.get("model_type")
    if not isinstance(arch, str) or arch not in ARCHS:
        raise UserError(f"{path}: model_type {arch!r} is not supported; those that are: {', '.join(ARCHS)}")
    attention = ("use_sliding_window", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")
    if any(j.get(name) for name in attention) or not j.get("scale_attn_weights", True):
        raise UserError(f"{path}: sliding windows and GPT-2's attention variants are not supported")
    if j.get("attention_bias") and arch in ("qwen3", "nanochat") or j.get("mlp_bias") and not j.get("attention_bias"):
        raise UserError(f"{path}: a {arch} with these biases is not supported")

    def get(*names: str) -> int:
        for name in names:
            if j.get(name) is not None:
                if not isinstance(j[name], int) or j[name] < 1:
                    raise UserError(f"{name} is {j[name]!r}: it must be a whole number, at least 1")
                return j[name]
        raise UserError(f"config.json has no {names[0]}")

    values: dict[str, Any] = {**ARCHS[arch], "arch": arch, "vocab_size": get("vocab_size")}
    values["tie_word_embeddings"] = bool(j.get("tie_word_embeddings", arch == "gpt2"))
    ours = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
    default = {"gpt2": "gelu_new", "gpt_neox": "gelu", "nanochat": "relu2"}.get(arch, "silu")
    activation = j.get("activation_function") or j.get("hidden_act") or default
    activation = ours.get(activation, activation)
    if values["activation"] == "swiglu":
        activation = {"silu": "swiglu", "gelu": "geglu"}.get(activation, activation)
    if activation not in ACTIVATIONS:
        raise UserError(f"{path}: activation {activation!r} is not supported")
    values["activation"] = activation
    if arch == "gpt2":
        values.update(
            block_size=get("n_positions", "n_ctx"), n_embd=get("n_embd"), n_layer=get("n_layer"), n_head=get("n_head"),
            n_inner=get("n_inner") if j.get("n_inner") is not None else 0,
            norm_eps=float(j.get("layer_norm_epsilon", 1e-5)),
            resid_pdrop=j.get("resid_pdrop", 0.1), embd_pdrop=j.get("embd_pdrop", 0.1), attn_pdrop=j.get("attn_pdrop",
            0.1),
        )  # fmt: skip
        return GPTConfig(**values)
    rope = {**(j.get("rope_scaling") or {}), **(j.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UserError(f"{path}: RoPE scaling {kind!r} is not supported; those that are: linear, yarn, llama3")
    context = get("max_position_embeddings")
    theta = rope.get("rope_theta") or j.get("rope_theta") or j.get("rotary_emb_base") or 10000.0
    values.update(
        n_embd=get("hidden_size"), n_layer=get("num_hidden_layers"), n_head=get("num_attention_heads"),
        n_inner=get("intermediate_size"), block_size=context, rope_theta=float(theta),
        attn_pdrop=j.get("attention_dropout", 0.0),
        norm_eps=float(j.get("layer_norm_eps" if arch == "gpt_neox" else "rms_norm_eps", values.get("norm_eps", 1e-5))),
    )  # fmt: skip
    if kind != "default":
        factor = float(rope.get("factor") or 1.0)
        original = rope.get("original_max_position_embeddings") or (
            int(context / factor) if kind == "linear" else context
        )
        values.update(rope_scaling=kind, rope_factor=float(factor), rope_original_block_size=original)
        if kind == "yarn":
            values.update(
                rope_attention_factor=rope.get("attention_factor") or 0.0,
                rope_beta_fast=float(rope.get("beta_fast") or 32), rope_beta_slow=float(rope.get("beta_slow") or 1),
            )  # fmt: skip
        if kind == "llama3":
            missing = {"low_freq_factor", "high_freq_factor"} - rope.keys()
            if missing:
                raise UserError(f"{path}: RoPE scaling llama3 needs {min(missing)}")
            values.update(rope_low_freq_factor=rope["low_freq_factor"], rope_high_freq_factor=rope["high_freq_factor"])
    if arch == "gpt_neox":
        values.update(
            rope_pct=rope.get("partial_rotary_factor") or j.get("rotary_pct", 0.25),
            resid_pdrop=j.get("hidden_dropout", 0.0),
            parallel_residual=j.get("use_parallel_residual", True),
        )  # fmt: skip
        return GPTConfig(**values)
    values["n_kv_head"] = j.get("num_key_value_heads") or 0
    values["head_dim"] = j.get("head_dim") or (128 if arch == "qwen3" else 0)
    if arch == "llama":
        values["bias"] = "none" if not j.get("attention_bias") else "all" if j.get("mlp_bias") else "attn"
    if arch == "nanochat":
        values["logit_softcap"] = j.get("final_logit_softcapping", 15.0) or 0.0
    return GPTConfig(**values)


HF_ALIASES = {
    "120M": "openai-community/gpt2", "300M": "openai-community/gpt2-medium", "700M": "openai-community/gpt2-large",
    "1B": "openai-community/gpt2-xl",
}  # fmt: skip


def hub_directory(name: str) -> Path:
    """The local copy of a hub model, `owner/name` or `owner/name@revision`, fetched if it is not there yet."""
    import huggingface_hub

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    get = functools.partial(huggingface_hub.snapshot_download, repo, revision=revision or None, allow_patterns=wanted)
    try:
        folder = Path(get(local_files_only=True))
        files = [folder / "config.json", folder / "tokenizer.json", *safetensors_files(folder)]
        if all(file.exists() for file in files):
            return folder
    except Exception:  # not there, or not whole
        pass
    try:
        return Path(get())  # with its own progress bar
    except Exception as e:  # httpx, requests, the hub's own
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise UserError(
            f"{name} is neither a local checkpoint nor to be had from the Hugging Face hub: {reason[:200]}"
        ) from None


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face directory: one, or the shards of its index."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(Path(str(f)).name == f for f in weight_map.values()):
            raise UserError(f"{index} has no weight_map that names the files beside it")
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if (folder / "pytorch_model.bin").exists():
        raise UserError(
            f"{folder} has only pickled weights (pytorch_model.bin), which can run code: convert them to safetensors"
        )
    raise UserError(f"{folder} has no model.safetensors")


HF_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def load_hf_model(folder: Path, dtype: torch.dtype, device: str, **overrides: Any) -> GPT:
    """A GPT with the weights of a Hugging Face directory, read tensor by tensor into place."""
    from safetensors import SafetensorError, safe_open

    config = replace(config_from_hf(read_json_object(folder / "config.json"), folder / "config.json"), **overrides)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in GPT(config).state_dict().items()}
    state = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    for name in state.keys() & {"wte.weight", "lm_head.weight"}:
        state[name][config.vocab_size :] = 0
    wanted = {theirs: (state[ours][rows], how) for theirs, ours, rows, how in hf_tensors(config)}
    prefix = {"gpt2": "transformer.", "gpt_neox": "gpt_neox."}.get(config.arch, "model.")
    for file in safetensors_files(folder):
        try:
            with safe_open(file, framework="pt") as f:
                for name in f.keys():
                    key = name if name in wanted or name.startswith((prefix, "lm_head", "embed_out")) else prefix + name
                    if key.endswith(HF_BUFFERS) or (
                        config.tie_word_embeddings and key in ("lm_head.weight", "embed_out.weight")
                    ):
                        continue
                    if key not in wanted:
                        raise UserError(f"{file}: tensor {name} has no place in a {config.arch} of this config.json")
                    target, how = wanted.pop(key)
                    shape = list(target.T.shape if how == "transpose" else target.shape)
                    if f.get_slice(name).get_shape() != shape:
                        raise UserError(
                            f"{file}: tensor {name} has shape {tuple(f.get_slice(name).get_shape())}, config.json "
                            f"says {tuple(shape)}"
                        )
                    target.copy_(hf_layout(f.get_tensor(name), how, config, back=True))
        except (SafetensorError, FileNotFoundError) as e:
            raise UserError(f"{file} cannot be read as safetensors: {e}") from None
    if wanted:
        raise UserError(f"{folder}: tensor {next(iter(wanted))} is missing from the weights ({len(wanted)} are)")
    model = build_model(config, state, folder)
    model.compute_dtype = dtype
    return model


def add_chat_tokens(model: GPT, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with <|im_start|> and <|im_end|>, which a base model of the hub may lack. Their embeddings, and the
    head's rows, start as the mean of all others."""
    if chat_template(tokenizer) is not None:
        return tokenizer
    backend = tokenizer.backend
    backend.add_special_tokens([t for t in (IM_START, IM_END) if backend.token_to_id(t) is None])
    special = {**tokenizer.special, **{t: backend.token_to_id(t) for t in (IM_START, IM_END)}}
    made = Tokenizer({**tokenizer.spec, "json": backend.to_str(), "special": special})
    old, c = model.config.vocab_size, replace(model.config, vocab_size=max(model.config.vocab_size, made.n_vocab))
    model.config = c
    for module in (model.wte, model.lm_head):
        if module is not None:
            weight = module.weight.data
            rows = weight[:old].mean(dim=0, keepdim=True).repeat(c.padded_vocab_size, 1)
            rows[:old] = weight[:old]
            module.weight = nn.Parameter(rows)
    return made


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + "
    "'<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def to_hf_tokenizer(tokenizer: Tokenizer) -> Any:
    """A tokenizers.Tokenizer that gives the ids of one of ours."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

    if tokenizer.kind == "hf":
        return tokenizers.Tokenizer.from_str(tokenizer.spec["json"])
    char = byte_to_unicode()
    ranks = tokenizer.backend._mergeable_ranks
    merges = []
    for token in sorted(ranks, key=ranks.get):  # tiktoken merges any two tokens whose bytes are a token: list them all
        splits = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += sorted(splits, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    text = {token: "".join(char[b] for b in token) for token in ranks}
    hf = tokenizers.Tokenizer(
        models.BPE(vocab={text[t]: rank for t, rank in ranks.items()}, merges=[(text[a], text[b]) for a, b in merges])
    )
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=tokenizer.kind != "byte")
    hf.decoder = decoders.ByteLevel()
    hf.post_processor = processors.ByteLevel(trim_offsets=False)
    hf.add_special_tokens([AddedToken(t, special=True) for t in sorted(tokenizer.special, key=tokenizer.special.get)])
    return hf


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja template that renders conversations for a model; None for one without chat tokens."""
    own = tokenizer.spec.get("chat_template")
    return own or (CHATML if {IM_START, IM_END} <= tokenizer.special.keys() else None)


def export_hf(
    model: GPT, tokenizer: Tokenizer, folder: Path, dtype: torch.dtype, max_shard_bytes: int, card: str
) -> None:
    """Write a directory that transformers opens by itself. The folder appears when it is whole and verified."""
    from safetensors.torch import save_file

    c = model.config
    check_exportable(c)
    state = model.state_dict()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for theirs, ours, rows, how in hf_tensors(c):
        tensor = hf_layout(state[ours][rows].to(dtype), how, c).contiguous().clone()
        n_bytes = tensor.numel() * tensor.element_size()
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][theirs] = tensor
        size += n_bytes
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(t.numel() * t.element_size() for shard in shards for t in shard.values())
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_json(
            folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    config = hf_config(c, tokenizer, str(dtype).removeprefix("torch."))
    write_json(folder / "config.json", config)
    ends = [i for i in (tokenizer.special.get(IM_END), tokenizer.eot) if i is not None]
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": ends, "pad_token_id": config["pad_token_id"]}
    write_json(folder / "generation_config.json", generation)
    to_hf_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
    name_of = {i: t for t, i in tokenizer.special.items()}
    eos = tokenizer.spec.get("eos_token") or name_of.get(config["eos_token_id"])
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": tokenizer.spec.get("bos_token") or eos,
        "eos_token": eos,
        "pad_token": eos, "unk_token": eos, "model_max_length": c.context, "clean_up_tokenization_spaces": False,
    })  # fmt: skip
    if template := chat_template(tokenizer):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def verify_export(model: GPT, folder: Path, dtype: torch.dtype) -> float:
    """Read an export back and return the largest difference between its logits and the model's at that precision."""
    again = load_hf_model(folder, torch.float32, "cpu").eval()
    same = GPT(model.config).eval()
    same.load_state_dict({k: v.to(dtype).float() for k, v in model.state_dict().items()})
    c = model.config
    idx = torch.arange(min(64, c.block_size)).remainder(c.vocab_size)[None]
    with torch.no_grad():
        return (again(idx) - same(idx)).abs().max().item()


def model_card(checkpoint: dict[str, Any], name: str, c: GPTConfig) -> str:
    """The README.md of an export, with the metadata that the hub reads."""
    metrics, data = checkpoint.get("metrics", {}).get("last", {}), checkpoint.get("data", {}).get("path")
    import shlex

    data = data and Path(data)
    data = data.parent if data and data.suffix == ".bin" else data
    dataset, quoted = json.dumps(data.name if data else "unknown"), json.dumps(name, ensure_ascii=False)
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if data:
        head += ["datasets:", f"- {dataset}"]
    if "val_loss" in metrics:
        head += [
            "model-index:", f"- name: {quoted}", "  results:", "  - task:", "      type: text-generation",
            "    dataset:",
            f"      name: {dataset}", f"      type: {dataset}", "    metrics:", "    - name: validation loss",
            "      type: loss",
            f"      value: {metrics['val_loss']:.4f}", "    - name: perplexity", "      type: perplexity",
            f"      value: {metrics['val_ppl']:.4f}",
        ]  # fmt: skip
    command = shlex.join(["python", "model.py", checkpoint.get("kind", ""), *checkpoint.get("arguments", [])[1:]])
    trained = f"Trained with `{command}`" if "kind" in checkpoint else ""
    measured = (
        f": validation loss {metrics['val_loss']:.4f}, perplexity {metrics['val_ppl']:.2f}"
        if "val_loss" in metrics
        else ""
    )
    return (
        "\n".join(head)
        + f"""
---

# {name}

A {c.arch} language model of {count_parameters(c):,} parameters: {c.n_layer} layers, {c.n_head} heads,
width {c.n_embd}, context {c.context}. {trained}{measured}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
    )


def export_gguf(model: GPT, tokenizer: Tokenizer, path: Path, kind: str, name: str) -> None:
    """Write one GGUF file for llama.cpp, by the gguf package. Matrices are f32, f16, bf16 or q8_0; vectors stay f32."""
    try:
        import gguf
    except ImportError:
        raise UserError("export --format gguf needs the gguf package: pip install gguf") from None
    c = model.config
    check_exportable(c)
    arch = {"gpt_neox": "gptneox"}.get(c.arch, c.arch)
    if (
        c.arch == "nanochat"
        or c.activation == "geglu"
        or (c.arch == "gpt2" and c.activation not in ("gelu", "gelu_new"))
    ):
        raise UserError(
            f"llama.cpp has no {c.arch} with activation {c.activation}: it knows gpt2, gpt_neox, llama, qwen2 and qwen3"
        )
    if c.arch == "gpt_neox" and c.activation not in ("gelu", "gelu_new"):
        raise UserError(f"llama.cpp's gpt_neox has gelu and not {c.activation}")
    if c.bias == "all" and c.arch == "llama":
        raise UserError("llama.cpp's llama has no biases in the MLP")
    if c.rope_scaling == "llama3" and c.arch != "llama":
        raise UserError(f"llama.cpp's {c.arch} has no rope_scaling llama3")
    for beta, own in (("rope_beta_fast", 32.0), ("rope_beta_slow", 1.0)):
        if c.rope_scaling == "yarn" and getattr(c, beta) != own:
            raise UserError(f"{beta} {getattr(c, beta)} cannot be written: llama.cpp takes {own} unless told otherwise")
    w = gguf.GGUFWriter(None, arch)
    w.add_name(name)
    w.add_context_length(c.context)
    w.add_embedding_length(c.n_embd)
    w.add_block_count(c.n_layer)
    w.add_feed_forward_length(c.n_inner)
    w.add_head_count(c.n_head)
    w.add_head_count_kv(c.n_kv_head)
    w.add_vocab_size(c.vocab_size)
    if c.norm == "layernorm":
        w.add_layer_norm_eps(c.norm_eps)
    else:
        w.add_layer_norm_rms_eps(c.norm_eps)
        w.add_key_length(c.head_dim)
        w.add_value_length(c.head_dim)
    if c.pos_embd == "rope":
        rope = hf_rope(c)
        w.add_rope_dimension_count(c.rope_dim)
        w.add_rope_freq_base(rope["rope_theta"])
        if rope["rope_type"] in ("linear", "yarn"):
            w.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
            w.add_rope_scaling_factor(c.rope_factor)
        if rope["rope_type"] == "yarn":
            w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            own = 0.1 * math.log(c.rope_factor) + 1  # llama.cpp multiplies by this itself
            w.add_rope_scaling_attn_factors(rope["attention_factor"] / own)
    if c.arch == "gpt_neox":
        w.add_parallel_residual(c.parallel_residual)
    kinds = gguf.GGMLQuantizationType
    quantization = {"f32": kinds.F32, "f16": kinds.F16, "bf16": kinds.BF16, "q8_0": kinds.Q8_0}[kind]
    w.add_file_type({"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}[kind])
    add_gguf_tokenizer(w, tokenizer, c)

    def put(key: str, x: Tensor) -> None:
        array = x.float().contiguous().numpy()
        small = array.ndim == 1 or (kind == "q8_0" and array.shape[-1] % 32)
        q = kinds.F32 if small else quantization
        w.add_tensor(key, gguf.quants.quantize(array, q), raw_dtype=q)

    names = gguf.get_tensor_name_map(
        gguf.MODEL_ARCH_NAMES and {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], c.n_layer
    )
    state = model.state_dict()
    for theirs, ours, rows, how in hf_tensors(c):
        x = state[ours][rows]
        if c.arch == "gpt_neox" and how == "interleave":
            how = ""  # llama.cpp keeps q, k and v apart, as we do
        if c.arch == "llama" and theirs.split(".")[-2] in (
            "q_proj",
            "k_proj",
        ):  # its llama rotates neighbours (2i, 2i + 1)
            x = x.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        put(names.get_name(theirs, try_suffixes=(".weight", ".bias")), x)  # as (out, in), which `transpose` already is
    if c.arch == "gpt_neox" and c.tie_word_embeddings:  # llama.cpp's has no ties
        put("output.weight", state["wte.weight"][: c.vocab_size])
    if c.rope_scaling == "llama3":  # what each frequency is divided by
        factors = rope_frequencies(replace(c, rope_scaling="none"))[0] / rope_frequencies(c)[0]
        w.add_tensor("rope_freqs.weight", factors.numpy())
    w.write_header_to_file(path)
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GGUF_SPLITS = {  # how a text is split before merging -> llama.cpp's name for it
    ("GPT-2",): "gpt-2", ("digits", "GPT-2"): "smollm", (WORDS + r"\p{N}" + SPACES,): "qwen2",
    (WORDS + r"\p{N}{1,3}" + SPACES,): "llama-bpe",
}  # fmt: skip


def gguf_split(tokenizer: Tokenizer, pre_tokenizer: dict[str, Any] | None) -> str:
    if tokenizer.kind != "hf":
        return "gpt-2"
    steps = []
    for p in (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}]):
        if p.get("type") == "ByteLevel":
            steps += ["GPT-2"] if p.get("use_regex", True) and not p["add_prefix_space"] else []
        elif p.get("type") == "Digits" and p["individual_digits"]:
            steps.append("digits")
        else:
            steps.append(p.get("pattern", {}).get("Regex", ""))
    if tuple(steps) not in GGUF_SPLITS:
        raise UserError(f"tokenizer {tokenizer.name} splits text in a way that llama.cpp has no name for: {steps}")
    return GGUF_SPLITS[tuple(steps)]


def add_gguf_tokenizer(w: Any, tokenizer: Tokenizer, c: GPTConfig) -> None:
    """The vocabulary, merges, special tokens and chat template, from the tokenizer.json form."""
    import gguf

    j = json.loads(to_hf_tokenizer(tokenizer).to_str())
    if j["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(j):
        raise UserError(
            f"tokenizer {tokenizer.name} is not a byte-level BPE, the only kind that export --format gguf writes"
        )
    token_of = {i: t for t, i in j["model"]["vocab"].items()} | {a["id"]: a["content"] for a in j["added_tokens"]}
    control = {a["id"] for a in j["added_tokens"] if a["special"]}
    types = gguf.TokenType
    tokens = [token_of.get(i, f"[PAD{i}]") for i in range(c.vocab_size)]
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(gguf_split(tokenizer, j["pre_tokenizer"]))
    w.add_token_list(tokens)
    w.add_token_types(
        [
            types.CONTROL if i in control else types.UNUSED if i not in token_of else types.NORMAL
            for i in range(c.vocab_size)
        ]
    )
    merges = [m if isinstance(m, str) else " ".join(m) for m in j["model"]["merges"]]
    w.add_token_merges(merges or ["☃ ☃"])  # llama.cpp wants some: these characters stand for no byte
    eot, im_end = tokenizer.eot, tokenizer.special.get(IM_END)
    if eot is not None:
        w.add_bos_token_id(tokenizer.bos[0] if tokenizer.bos else eot)
        w.add_eos_token_id(eot)
    if im_end is not None:
        w.add_eot_token_id(im_end)
    w.add_add_bos_token(bool(tokenizer.bos))
    if template := chat_template(tokenizer):
        w.add_chat_template(template)


# ----------------------------------------------------------------------------------------------------------------------
# Subcommands
# ----------------------------------------------------------------------------------------------------------------------


def chosen(args: argparse.Namespace, cls: type, only: tuple[str, ...] = ()) -> dict[str, Any]:
    """The settings of a dataclass that the user gave on the command line."""
    names = only or [f.name for f in fields(cls) if "help" in f.metadata or f.name == "arch"]
    return {name: getattr(args, name) for name in names if getattr(args, name, None) is not None}


def data_folder(name: str) -> Path:
    """The folder under data/ of a data set that is to be made."""
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"--dataset {name!r} must be a plain name: that of the folder under {DATA_DIR}/")
    return DATA_DIR / name


def cmd_tokenize(args: argparse.Namespace) -> None:
    folder = data_folder(args.dataset)
    if Path(args.txt[0]).suffix in RECORD_FILES:
        if len(args.txt) > 1:
            raise UserError("one file of records at a time: for several, put them into a folder and use hf_tokenize")
        check_data_folder_free(folder, args.overwrite)
        if not Path(args.txt[0]).exists():
            raise UserError(f"{args.txt[0]}: no such file")
        tokenizer = record_tokenizer(args.tokenizer, args.vocab_size, args.txt[0])
        meta = tokenize_records(
            folder, args.txt[0], tokenizer, None, chat_format=args.chat_format, train_on_all=args.train_on_all,
            val_fraction=args.val_fraction, overwrite=args.overwrite,
        )  # fmt: skip
        return say(describe_meta(folder, meta))
    meta = tokenize_text(
        folder, args.txt, args.tokenizer, args.vocab_size, args.encoding, args.errors, args.val_fraction, args.overwrite
    )
    say(describe_meta(folder, meta))


def init_distributed(device: str) -> None:
    """Join the process group that torchrun set up, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.distributed.is_initialized():
        kind = choose_device(device)
        if kind.type == "cuda":
            torch.cuda.set_device(kind)
        torch.distributed.init_process_group("nccl" if kind.type == "cuda" else "gloo")


def train_config(args: argparse.Namespace, variant: str, arch: str, n_embd: int) -> TrainConfig:
    """TrainConfig of a variant: its own recipe, then its architecture's, then the user's settings."""
    names = {f.name for f in fields(TrainConfig)}
    recipe = {k: v for k, v in VARIANTS[variant].items() if k in names} if variant in VARIANTS else {}
    recipe.update(ARCH_RECIPES.get(arch, {}))
    if arch == "nanochat":  # AdamW's rate falls with the square root of the width (nanochat's gpt.py)
        scale = (n_embd / 768) ** -0.5
        recipe.update(learning_rate=0.004 * scale, head_lr=0.004 * scale)
    return TrainConfig(**{**recipe, **chosen(args, TrainConfig)})


def prepare(model: GPT, t: TrainConfig) -> GPT:
    """Put a model on the device and choose its precision."""
    device = choose_device(t.device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    model.compute_dtype = choose_dtype(t.dtype, device, model.config.n_embd)
    return model.to(device)


def cmd_train(args: argparse.Namespace) -> None:
    init_distributed(args.device or "auto")
    files = RunFiles.named(args.name or args.variant)
    if args.resume:
        return resume_training(args, files)
    overrides = {**chosen(args, GPTConfig)}
    make_config(args.variant, 50259, overrides)  # a wrong setting shows before any data is made
    with first_process_first():
        data = find_data(args.data, args.tokenizer or "gpt2", args.vocab_size)
    kinds = {"gpt2": "gpt2", "byte": "byte", "bpe": "bpe"}
    if args.tokenizer and data.tokenizer.kind != kinds.get(args.tokenizer, data.tokenizer.kind):
        raise UserError(
            f"{data.path} was made with tokenizer {data.tokenizer.describe()}, and --tokenizer asks for "
            f"{args.tokenizer}: leave it out, or tokenize the text under another name"
        )
    config = make_config(args.variant, data.tokenizer.n_vocab, overrides)
    t = train_config(args, args.variant, config.arch, config.n_embd)
    data.windows("train", config.block_size), data.windows("val", config.block_size)
    files.check_free(args.overwrite)
    torch.manual_seed(t.seed)
    model = prepare(GPT(config), t)
    files.clear()
    announce(model, data, t, args.variant, model.config.block_size)
    extra = {"kind": "train", "variant": args.variant, "arguments": sys.argv[1:]}
    finish_run(fit(model, data, t, files, extra, prompt=sample_prompt(data)), files)


def resume_training(args: argparse.Namespace, files: RunFiles) -> None:
    """Go on with a run from its last state, with its own settings; max_iters, epochs and device may be changed."""
    if not files.last.exists():
        raise UserError(f"nothing to resume: there is no {files.last}")
    checkpoint = load_checkpoint(files.last)
    if checkpoint["kind"] != args.command:
        raise UserError(f"{files.last} was made by {checkpoint['kind']}: resume it with that command")
    t = TrainConfig(**checkpoint["train_config"])
    changed = chosen(args, TrainConfig)
    if getattr(args, "finetune_iters", None):
        changed["max_iters"] = args.finetune_iters
    free = {"max_iters", "epochs", "device", "compile", "log_interval", "sample_interval", "grad_accum"}
    fixed = [k for k, v in changed.items() if k not in free and getattr(t, k) != v and (k, v) != ("dtype", "auto")]
    fixed += [k for k, v in chosen(args, GPTConfig).items() if k != "vocab_size" and checkpoint["config"][k] != v]
    if "distill" in checkpoint:
        fixed += [k for k, v in chosen(args, DistillConfig).items() if checkpoint["distill"][k] != v]
        if args.teacher_model_path != checkpoint["teacher"]["path"]:
            fixed.append("teacher_model_path")
    if fixed:
        raise UserError(
            f"--resume goes on with the run's own settings, and --{fixed[0]} differs: leave it out, or start anew "
            "with --overwrite"
        )
    t = replace(t, **{k: v for k, v in changed.items() if k in free})
    if checkpoint["step"] >= t.max_iters and not t.epochs:
        raise UserError(
            f"nothing to resume: {files.last} has reached step {checkpoint['step']} of {t.max_iters}; raise --max_iters"
        )
    own, path = Tokenizer(checkpoint["tokenizer"]), Path(checkpoint["data"]["path"])
    given = getattr(args, "data", None) if args.command == "train" else None  # the others make theirs of what is given
    if given and Path(given).is_file() and Path(given).suffix != ".bin":  # a text: as train opened it
        data = find_data(given, args.tokenizer or "gpt2")
    else:
        data = find_data(given or str(path), own)
    if data.tokenizer.digest != own.digest:
        raise UserError(
            f"{data.path} was made with tokenizer {data.tokenizer.describe()} and {files.last} was trained with "
            f"{own.describe()}: give the run its own data"
        )
    if data.digest != checkpoint["data"]["digest"]:
        raise UserError(
            f"{data.path} is not the data that {files.last} was trained on ({checkpoint['data']['path']}): its "
            "contents differ"
        )
    config = GPTConfig(**checkpoint["config"])
    if lora_rank := checkpoint.get("lora_rank"):
        model = add_lora(GPT(config), lora_rank)
        model.load_state_dict(checkpoint["model"])
    else:
        model = build_model(config, checkpoint["model"], files.last)
    model = prepare(model, t)
    options: dict[str, Any] = {}
    if "distill" in checkpoint:
        spec = checkpoint["teacher"]
        teacher, _, _ = open_teacher(spec["path"], spec["variant"], model.wte.weight.device)
        digest, d = weights_digest(teacher), DistillConfig(**checkpoint["distill"])
        if digest != spec.get("digest", digest):
            raise UserError(
                f"the teacher {spec['path']} has other weights than when {files.last} was made: bring it back"
            )
        teacher = teacher_like(teacher, model)
        options["objective"] = make_distillation(teacher, digest, d, data, checkpoint["block_size"])
    say(f"resuming {files.last} at step {checkpoint['step']}")
    announce(model, data, t, checkpoint["variant"], checkpoint["block_size"])
    kept = ("kind", "variant", "arguments", "lora_rank", "distill", "teacher")
    extra = {k: checkpoint[k] for k in kept if k in checkpoint}
    options.update(resume=checkpoint, prompt=sample_prompt(data), block_size=checkpoint["block_size"])
    finish_run(fit(model, data, t, files, extra, **options), files)


def sample_prompt(data: Data) -> str:
    return "def " if data.path.name == STDLIB_DATA else "\n"


def announce(model: GPT, data: Data, t: TrainConfig, variant: str, block_size: int) -> None:
    """What is about to be trained, on what, and how, in two lines."""
    c = model.config
    device = model.wte.weight.device
    train, val = data.val_start, len(data.tokens if data.val_tokens is None else data.val_tokens)
    val -= 0 if data.val_tokens is not None else data.val_start
    say(
        f"{variant} ({c.arch}): {count_parameters(c):,} parameters with a vocabulary of {c.vocab_size:,}; data "
        f"{data.path}: {train:,} training and {val:,} validation tokens"
    )
    length = f"{t.epochs:g} epochs" if t.epochs else f"{t.max_iters:,} steps"
    dtype = str(model.compute_dtype).removeprefix("torch.")
    say(f"{length} of {t.batch_size} x {block_size} tokens a step with {t.optimizer}, on {device} in {dtype}")


def finish_run(results: dict[str, float], files: RunFiles) -> None:
    say(
        f"done in {results['seconds']:.0f} s: best val_loss {results['best_val_loss']:.4f} in {files.model}; try: "
        f"python model.py sample --model_checkpoint {files.model.name}"
    )


def cmd_sample(args: argparse.Namespace) -> None:
    settings = SamplingSettings(**chosen(args, SamplingSettings))
    if not 0 <= args.seed < 2**63:
        raise UserError(f"seed is {args.seed}: it must be at least 0 and below 2**63")
    if args.length < 1 or args.num_samples < 1:
        raise UserError("--length and --num_samples must be at least 1")
    device = choose_device(args.device)
    model, tokenizer, checkpoint = open_model(args.model_checkpoint, device)
    path = checkpoint["path"]
    if args.variant is not None:
        check_variant(args.variant, model.config, path)
    prepare_generation(model, args.dtype, args.quantize)
    if args.rope_factor and not args.rope_scaling:
        raise UserError("--rope_factor needs --rope_scaling: linear, ntk, yarn or llama3")
    if args.rope_scaling:
        model.extend_context(args.rope_scaling, args.rope_factor or 1.0)
    prompt = args.prompt
    if prompt is None:
        prompt = "" if sys.stdin.isatty() else sys.stdin.read()
    out = lambda text: print(text, end="", flush=True)  # noqa: E731
    if args.model_checkpoint is None:
        say(f"using {path}", file=sys.stderr)
    tokens_from, stats = None, {}
    if args.draft_checkpoint:
        if args.num_samples > 1:
            raise UserError("--draft_checkpoint works on one sample at a time: leave --num_samples out")
        draft, draft_tokenizer, _ = open_model(args.draft_checkpoint, device)
        prepare_generation(draft, args.dtype, args.quantize)
        if draft_tokenizer.digest != tokenizer.digest:
            raise UserError(
                f"the draft has tokenizer {draft_tokenizer.describe()} and the model {tokenizer.describe()}: they "
                "must be the same"
            )
        tokens_from = functools.partial(speculative_generate, model, draft, stats)
    out(prompt)
    texts = generate_text(
        model,
        tokenizer,
        tokenizer.prompt(prompt),
        args.length,
        settings,
        args.num_samples,
        args.seed,
        [s.replace("\\n", "\n").replace("\\t", "\t") for s in args.stop or ()],
        out,
        tokens_from,
        heal=True,
    )
    out("\n")
    if stats:
        say(f"accepted {stats['accepted']} of {stats['proposed']} drafted tokens", file=sys.stderr)
    for text in texts[1:]:
        out(f"---\n{prompt}{text}\n")


EXPORT_LIST = "export.json"  # names the files of an export, which --overwrite may replace


def replaceable_export(folder: Path, overwrite: bool) -> set[str]:
    """The files of the export that a folder holds, none if it is free. Raises UserError if something else is there."""
    if not folder.exists() or folder.is_dir() and not any(folder.iterdir()):
        return set()
    if not overwrite:
        raise UserError(f"{folder} is already there: choose another --output_dir or add --overwrite")
    files = read_json(folder / EXPORT_LIST, []) if folder.is_dir() else []
    files = {f for f in files if isinstance(f, str) and Path(f).name == f} if isinstance(files, list) else set()
    if strangers := sorted({p.name for p in folder.iterdir()} - files if folder.is_dir() else [folder.name]):
        raise UserError(
            f"{folder} holds {strangers[0]}, which no export wrote: --overwrite only replaces an earlier export; "
            "choose another --output_dir"
        )
    return files


def cmd_export(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    replaced = replaceable_export(output, args.overwrite)
    model, tokenizer, checkpoint = open_model(args.model_path or args.model_checkpoint)
    if args.variant:
        check_variant(args.variant, model.config, checkpoint["path"])
    if args.rope_scaling:
        model.extend_context(args.rope_scaling, args.rope_factor or 1.0)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise UserError(
            f"tokenizer {tokenizer.describe()} is larger than the model's vocabulary of {model.config.vocab_size:,}"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    scratch.chmod(0o755)
    try:
        if args.format == "gguf":
            name = f"{output.name}-{args.quantize}.gguf"
            export_gguf(model, tokenizer, scratch / name, args.quantize, output.name)
            done = f"{output / name}: {(scratch / name).stat().st_size / 1e6:,.1f} MB"
        else:
            dtype = getattr(torch, args.dtype)
            card = model_card(checkpoint, output.name, model.config)
            export_hf(model, tokenizer, scratch, dtype, parse_size(args.max_shard_size), card)
            difference = verify_export(model, scratch, dtype)
            if not difference <= 1e-3:
                raise RuntimeError(f"the export read back differs from the model by {difference} in its logits")
            done = f"{output}: {model.config.arch}, {args.dtype}; read back, logits differ by at most {difference:.1e}"
        output.mkdir(exist_ok=True)
        written = {file.name for file in scratch.iterdir()} | {EXPORT_LIST}
        kept = replaced if args.format == "gguf" else set()
        write_json(scratch / EXPORT_LIST, sorted(written | kept))
        for name in written:
            os.replace(scratch / name, output / name)
        for name in replaced - written - kept:
            (output / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    say(done)


def parse_size(text: str) -> int:
    """5GB, 200MB or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise UserError(f"{text!r} is not a size: write 5GB, 200MB or a number of bytes")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


def cmd_hf_tokenize(args: argparse.Namespace) -> None:
    folder = data_folder(args.dataset)
    check_data_folder_free(folder, args.overwrite)
    say(describe_meta(folder, tokenize_hub_data(args, folder, None)))


def tokenize_hub_data(
    args: argparse.Namespace, folder: Path, tokenizer: Tokenizer | None, overwrite: bool = False
) -> dict[str, Any]:
    """Make a data folder of what the --hf_ flags name."""
    where = {"split": args.hf_split, "config": args.hf_config, "revision": args.hf_revision}
    if tokenizer is None:
        tokenizer = record_tokenizer(args.tokenizer, args.vocab_size, args.hf_dataset, args.hf_text_column, **where)
    return tokenize_records(
        folder,
        args.hf_dataset,
        tokenizer,
        args.hf_text_column,
        **where,
        streaming=args.streaming,
        num_proc=args.num_proc,
        max_tokens=args.max_tokens,
        chat_format=args.chat_format,
        train_on_all=args.train_on_all,
        val_fraction=args.val_fraction,
        overwrite=overwrite or args.overwrite,
    )


def cmd_finetune(args: argparse.Namespace) -> None:
    init_distributed(args.device or "auto")
    variant = args.variant or variant_of(args.model_checkpoint)
    files = RunFiles.named(args.name or f"finetuned_{variant}")
    if args.resume:
        return resume_training(args, files)
    files.check_free(args.overwrite)
    device = choose_device(args.device or "auto")
    model, tokenizer, checkpoint = open_model(
        args.model_checkpoint, device, **chosen(args, GPTConfig, FINETUNE_SETTINGS)
    )
    if args.variant and "config" in checkpoint:
        check_variant(args.variant, model.config, checkpoint["path"])
    tokenizer = add_chat_tokens(model, tokenizer) if tokenizer.kind == "hf" else tokenizer
    if args.rope_scaling:
        model.extend_context(args.rope_scaling, args.rope_factor or 1.0)
    if args.command == "hf_finetune":
        folder = DATA_DIR / f"{Path(args.hf_dataset).name}_{args.hf_split}_{tokenizer.name}"
        wanted = {
            "dataset": args.hf_dataset,
            "split": args.hf_split,
            "config": args.hf_config,
            "revision": args.hf_revision,
            "column": args.hf_text_column,
            "files": describe_sources([args.hf_dataset]) if Path(args.hf_dataset).exists() else None,
        }
        made = read_json(folder / "meta.json", {}).get("source")
        if made is None or args.overwrite or any(made.get(k) != v for k, v in wanted.items()):
            say(describe_meta(folder, tokenize_hub_data(args, folder, tokenizer, overwrite=True)))
        data = Data(folder)
    else:
        data = find_data(args.data, tokenizer)
    if data.tokenizer.digest != tokenizer.digest:
        raise UserError(
            f"{data.path} was made with tokenizer {data.tokenizer.describe()} and the model has "
            f"{tokenizer.describe()}: make the data with tokenize --tokenizer {checkpoint['path']}"
        )
    block_size = args.block_size or min(512, model.config.context)
    if block_size > model.config.context:
        raise UserError(f"--block_size {block_size} is more than the model's context of {model.config.context}")
    recipe = {
        "max_iters": 1000,
        "batch_size": 8,
        "learning_rate": 1e-3 if args.lora_rank else 1e-4,
        "weight_decay": 0.01,
    }
    given = chosen(args, TrainConfig)
    if args.finetune_iters:
        given["max_iters"] = args.finetune_iters
    t = TrainConfig(**{**recipe, **given, "sample_interval": -1})
    torch.manual_seed(t.seed)
    full = count_parameters(model.config)
    if args.lora_rank:
        add_lora(model, args.lora_rank)
    model = prepare(model, t)
    announce(model, data, t, variant, block_size)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(
        f"training {trained:,} of {full:,} parameters: weights, gradients and AdamW's moments take "
        f"{(4 * full + 12 * trained) / 2**30:.2f} GB"
        + (f" ({16 * full / 2**30:.2f} GB without LoRA)" if args.lora_rank else "")
    )
    report_long_conversations(data, block_size)
    show_sample(args, model, tokenizer, data, "before")
    extra = {"kind": args.command, "variant": variant, "arguments": sys.argv[1:], "lora_rank": args.lora_rank}
    files.clear()
    results = fit(model, data, t, files, extra, block_size=block_size)
    show_sample(args, model, tokenizer, data, "after")
    finish_run(results, files)


def variant_of(spec: str | None) -> str:
    """What a model is called in the names of runs that start from it."""
    name = Path(spec.partition("@")[0]).name if spec else None
    if name is None or name.endswith(".pt"):
        path = find_checkpoint(spec)
        return load_checkpoint(path).get("variant") or path.stem.removesuffix("_model")
    return name


FINETUNE_SETTINGS = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attn_implementation", "gradient_checkpointing")


def report_long_conversations(data: Data, block_size: int) -> None:
    if data.starts is not None:
        lengths = np.diff(np.append(data.starts, len(data.tokens)))
        if n := int((lengths > block_size + 1).sum()):
            say(
                f"{n:,} of {len(lengths):,} conversations are longer than a block of {block_size} and will be cut: "
                "raise --block_size"
            )


def show_sample(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, data: Data, when: str) -> None:
    """Print the answer to --prompt: as a turn of a conversation where the data is conversations."""
    if args.prompt is None or rank():
        return
    prompt = tokenizer.prompt(args.prompt)
    if data.starts is not None:
        rendered = render_chat(tokenizer, [{"role": "user", "content": args.prompt}], add_generation_prompt=True)
        prompt = tokenizer.encode_rendered(rendered)
    settings = SamplingSettings(temperature=args.sample_temperature)
    text = generate_text(model, tokenizer, prompt, args.sample_length, settings)[0]
    say(f"--- {when} finetuning ---\n{args.prompt}\n{text}\n---")


def cmd_distill(args: argparse.Namespace) -> None:
    init_distributed(args.device or "auto")
    name = args.name or f"distilled_{args.student_variant or 'student'}"
    files = RunFiles.named(name)
    if args.resume:
        return resume_training(args, files)
    d = DistillConfig(**chosen(args, DistillConfig))
    device = choose_device(args.device or "auto")
    teacher, tokenizer, teacher_checkpoint = open_teacher(args.teacher_model_path, args.teacher_variant, device)
    data = find_data(args.data, tokenizer)
    check_same_vocabulary(tokenizer, data, args.teacher_model_path)
    student = make_student(args, teacher, teacher_checkpoint, data)
    block_size = args.block_size or min(
        student.config.block_size, 512 if args.student_variant is None else student.config.block_size
    )
    if student.config.context < block_size:
        raise UserError(
            f"the student's context is {student.config.context} and the block is {block_size}: use a smaller "
            "--block_size"
        )
    if teacher.config.context < block_size:
        raise UserError(
            f"the teacher's context is {teacher.config.context} and the block is {block_size}: use a smaller "
            "--block_size"
        )
    n_teacher, n_student = count_parameters(teacher.config), count_parameters(student.config)
    if n_student > n_teacher:
        say(
            f"warning: the student ({n_student:,} parameters) is larger than the teacher ({n_teacher:,})",
            file=sys.stderr,
        )
    variant = args.student_variant or "7M"
    t = train_config(args, variant if args.student_variant else "", student.config.arch, student.config.n_embd)
    files.check_free(args.overwrite)
    teacher_spec = {
        "path": args.teacher_model_path, "variant": args.teacher_variant, "digest": weights_digest(teacher),
    }  # fmt: skip
    student = prepare(student, t)
    announce(student, data, t, args.student_variant or "student", block_size)
    say(
        f"teacher {teacher_checkpoint['path']}: {n_teacher:,} parameters; alpha {d.alpha}, temperature "
        f"{d.temperature}, {d.divergence}"
    )
    objective = make_distillation(teacher_like(teacher, student), teacher_spec["digest"], d, data, block_size)
    extra = {
        "kind": "distill",
        "variant": args.student_variant or "student",
        "arguments": sys.argv[1:],
        "distill": asdict(d),
        "teacher": teacher_spec,
    }
    files.clear()
    finish_run(fit(student, data, t, files, extra, objective, prompt=sample_prompt(data), block_size=block_size), files)


def open_teacher(path: str, variant: str | None, device: torch.device) -> tuple[GPT, Tokenizer, dict[str, Any]]:
    """The teacher that --teacher_model_path names; `hf` is the GPT-2 of --teacher_variant's size."""
    if path == "hf":
        if variant not in HF_ALIASES:
            raise UserError(
                f"--teacher_model_path hf needs a --teacher_variant that names a GPT-2: {', '.join(HF_ALIASES)}"
            )
        return open_model(HF_ALIASES[variant], device)
    teacher, tokenizer, checkpoint = open_model(path, device)
    if variant is not None:
        check_variant(variant, teacher.config, checkpoint["path"])
    return teacher, tokenizer, checkpoint


def teacher_like(teacher: GPT, student: GPT) -> GPT:
    """The teacher in the student's precision: it is only read."""
    teacher.to(student.compute_dtype).compute_dtype = student.compute_dtype
    return teacher


def check_same_vocabulary(tokenizer: Tokenizer, data: Data, teacher_path: str) -> None:
    """Raise UserError unless the data's ids mean the same tokens to the teacher: by content, not by size or name."""
    if tokenizer.digest == data.tokenizer.digest:
        return
    ours, theirs = data.tokenizer, tokenizer
    n = min(ours.n_vocab, theirs.n_vocab)
    differ = [
        i
        for i in range(n)
        if ours.token_text(i) != theirs.token_text(i) and i not in (*ours.special.values(), *theirs.special.values())
    ]
    if differ or abs(ours.n_vocab - theirs.n_vocab) > 64:
        raise UserError(
            f"the teacher has tokenizer {theirs.describe()} and {data.path} was made with {ours.describe()}: make "
            f"matching data with tokenize --tokenizer {teacher_path}"
        )


def make_student(args: argparse.Namespace, teacher: GPT, teacher_checkpoint: dict[str, Any], data: Data) -> GPT:
    """The student: from --student_checkpoint, or new, or new with the teacher's layers (--init_from_teacher)."""
    overrides = chosen(args, GPTConfig)
    overrides.pop("block_size", None) if args.student_variant is None else None
    if args.student_checkpoint:
        fixed = [k for k in overrides if k not in (*FINETUNE_SETTINGS, "block_size")]
        fixed += [k for k in ("student_variant", "init_from_teacher") if getattr(args, k)]
        if fixed:
            raise UserError(f"--student_checkpoint brings its own shape: leave --{fixed[0]} out")
        student, tokenizer, _ = open_model(args.student_checkpoint, **chosen(args, GPTConfig, FINETUNE_SETTINGS))
        if tokenizer.digest != data.tokenizer.digest:
            raise UserError(
                f"the student has tokenizer {tokenizer.describe()} and {data.path} has {data.tokenizer.describe()}"
            )
        return student
    if args.student_variant is None:
        if not args.init_from_teacher:
            raise UserError("name the student: --student_variant, --student_checkpoint, or --init_from_teacher")
        config = replace(teacher.config, **{"n_layer": max(1, teacher.config.n_layer // 2), **overrides})
    else:
        config = make_config(args.student_variant, data.tokenizer.n_vocab, overrides)
    torch.manual_seed(1337 if args.seed is None else args.seed)
    student = GPT(config)
    if args.init_from_teacher:
        every_kth_layer(teacher, student)
    return student


def make_distillation(teacher: GPT, digest: str, d: DistillConfig, data: Data, block_size: int) -> Distillation:
    """digest: of the teacher's weights, in the precision they are stored in."""
    if d.on_policy and data.starts is not None:
        raise UserError(f"--on_policy is for text, and {data.path} holds conversations: leave it out")
    n_vocab = min(data.tokenizer.n_vocab, teacher.config.vocab_size)
    cache = None
    if d.cache_teacher:
        if d.cache_teacher > n_vocab:
            raise UserError(f"cache_teacher is {d.cache_teacher}: the vocabulary has only {n_vocab:,} tokens")
        folder = (data.path if data.path.is_dir() else data.path.parent) / "teacher_cache"
        meta = {
            "teacher": digest, "data": data.digest, "temperature": d.temperature,
            "block_size": block_size,
            "top_k": d.cache_teacher, "format_version": FORMAT_VERSION,
        }  # fmt: skip
        cache = TeacherCache(folder, meta, len(data.windows("train", block_size)), block_size, d.cache_teacher)
    return Distillation(teacher, d, n_vocab, cache)


def cmd_eval(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    rows = []
    for spec in [args.model_checkpoint, *args.compare]:
        model, tokenizer, checkpoint = open_model(spec, device)
        set_precision(model, args.dtype)
        if args.rope_scaling:
            model.extend_context(args.rope_scaling, args.rope_factor or 1.0)
        name = str(checkpoint["path"])
        if args.tasks:
            rows += evaluate_tasks(model, tokenizer, name, args)
            continue
        context = model.config.context if args.block_size is None else args.block_size
        if context < 1:
            raise UserError(f"--block_size is {context}: it must be at least 1")
        if context > model.config.context and model.wpe is not None:
            raise UserError(
                f"--block_size {context} is more than the context of {name}, {model.config.context}, and its "
                "positions are learned"
            )
        if context > model.config.context:  # RoPE goes on, untrained
            model.config = replace(
                model.config,
                block_size=context,
                rope_original_block_size=model.config.rope_original_block_size or model.config.block_size,
            )
            model.build_rope()
        stride = context if args.stride is None else args.stride
        if not 1 <= stride <= context:
            raise UserError(f"--stride is {stride}: it must be between 1 and the context, {context}")
        where, tokens = evaluation_tokens(args.data, tokenizer, name)
        rows.append(
            {
                "model": name,
                "data": where,
                "context": context,
                "stride": stride,
                **evaluate_text(model, tokenizer, tokens, context, stride, where),
            }
        )
    print_rows(rows, args.json)


def evaluation_tokens(spec: str | None, tokenizer: Tokenizer, name: str) -> tuple[str, np.ndarray]:
    """What eval runs on: a text file, in the model's own tokens, or the validation split of a data set."""
    path = Path(spec) if spec else None
    if path is not None and path.is_file() and path.suffix != ".bin":
        text = "".join(read_text(path, "utf-8-sig", "strict"))
        if not text:
            raise UserError(f"{path} is empty")
        return str(path), np.array(tokenizer.bos + tokenizer.encode(text))
    data = find_data(spec)
    if data.tokenizer.digest != tokenizer.digest:
        raise UserError(
            f"{data.path} was made with tokenizer {data.tokenizer.describe()} and {name} has {tokenizer.describe()}: "
            "give eval a text file"
        )
    tokens = data.tokens[data.val_start :] if data.val_tokens is None else data.val_tokens
    if not len(tokens):
        raise UserError(f"{data.path} has no validation split: give eval a text file")
    return str(data.path), tokens


def evaluate_tasks(model: GPT, tokenizer: Tokenizer, name: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of lm-eval's results on --tasks."""
    import difflib

    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError("eval --tasks needs EleutherAI's harness: pip install lm-eval") from None
    manager = TaskManager(include_path=args.include_path)
    tasks = args.tasks.split(",")
    for task in tasks:
        if task not in manager.all_tasks:
            near = difflib.get_close_matches(task, manager.all_tasks, 5)
            raise UserError(f"lm-eval has no task {task!r}" + (f"; near: {', '.join(near)}" if near else ""))
    adapter = lm_eval_adapter(model, tokenizer, args.batch_size)
    results = lm_eval.simple_evaluate(adapter, tasks=tasks, task_manager=manager, limit=args.limit, bootstrap_iters=0)[
        "results"
    ]
    rows = []
    for task, values in results.items():
        metrics = {k: v for k, v in values.items() if "," in k and "stderr" not in k and isinstance(v, (int, float))}
        names = [k.split(",")[0] for k in metrics]  # metric,filter: the filter where there are several
        metrics = {k.split(",")[0] if names.count(k.split(",")[0]) == 1 else k: v for k, v in metrics.items()}
        rows.append({"model": name, "task": task, **metrics})
    return rows


def print_rows(rows: list[dict[str, Any]], as_json: bool) -> None:
    """A table on standard output, or JSON."""
    if as_json:
        print(json.dumps(rows))
        return
    columns = list(dict.fromkeys(k for row in rows for k in row))
    cells = [columns] + [
        [f"{v:.4f}" if isinstance(v, float) else str(v) for v in (row.get(k, "") for k in columns)] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def cmd_chat(args: argparse.Namespace) -> None:
    settings = SamplingSettings(**{"temperature": 0.7, "top_p": 0.95, **chosen(args, SamplingSettings)})
    device = choose_device(args.device)
    model, tokenizer, checkpoint = open_model(args.model_checkpoint, device)
    prepare_generation(model, args.dtype, args.quantize)
    render_chat(tokenizer, [{"role": "user", "content": ""}])  # a model without a chat template shows now
    session = ChatSession(model, tokenizer, settings, args.length, args.seed)
    if args.system:
        session.messages = [{"role": "system", "content": args.system}]
    say(
        f"chatting with {checkpoint['path']}: /reset, /system TEXT, /save FILE, /quit; Ctrl-C stops an answer",
        file=sys.stderr,
    )
    interactive = sys.stdin.isatty()
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        word, _, rest = line.partition(" ")
        if word == "/quit":
            break
        elif word == "/reset":
            session.messages = [m for m in session.messages if m["role"] == "system"]
        elif word == "/system":
            session.messages = [{"role": "system", "content": rest}] if rest else []
        elif word == "/save":
            target = Path(rest or "conversation.jsonl")
            try:
                with open(target, "a", encoding="utf-8") as f:
                    f.write(json.dumps({"messages": session.messages}, ensure_ascii=False) + "\n")
                print(f"saved to {target}")
            except OSError as e:
                print(f"cannot save to {target}: {e.strerror}")
        elif word.startswith("/"):
            print("there is /reset, /system TEXT, /save FILE and /quit")
        elif line:
            try:
                session.answer(line, lambda text: print(text, end="", flush=True))
                print()
            except UserError as e:  # too long a message: the conversation goes on without it
                print(e)


class ChatSession:
    """A conversation whose keys and values stay in the cache from turn to turn: only what is new is read."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SamplingSettings, length: int, seed: int) -> None:
        self.model, self.tokenizer, self.settings, self.length = model, tokenizer, settings, length
        self.messages: list[dict[str, str]] = []
        self.generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
        self.context = min(model.config.context, 8192)  # of memory for the cache, whatever the model could take
        like = torch.empty(0, dtype=model.compute_dtype, device=model.wte.weight.device)
        self.cache = KVCache(model.config, 1, self.context, like)
        self.cached: list[int] = []  # the tokens in the cache

    def answer(self, text: str, on_text: Callable[[str], None]) -> str:
        """The assistant's next turn, streamed to on_text. The oldest turns are left out when the context is full."""
        self.messages.append({"role": "user", "content": text})
        visible = list(self.messages)
        while True:
            rendered = render_chat(self.tokenizer, visible, add_generation_prompt=True)
            ids = self.tokenizer.encode_rendered(rendered)
            if len(ids) + min(self.length, self.context // 2) <= self.context:
                break
            system = 1 if visible[0]["role"] == "system" else 0
            if len(visible) <= system + 1:
                self.messages.pop()
                raise UserError(
                    f"the message has more tokens than the context of {self.context} has room for: shorten it"
                )
            del visible[system : system + 2]
        same = next(
            (i for i, (a, b) in enumerate(zip(ids, self.cached, strict=False)) if a != b),
            min(len(ids), len(self.cached)),
        )
        self.cache.length = min(same, len(ids) - 1)
        new: list[int] = []

        def tokens_from(*args: Any) -> Iterator[Tensor]:
            n = self.cache.length
            for token in generate(self.model, [ids[n:]], *args[1:], cache=self.cache, seen=ids[:n]):
                new.append(int(token))
                yield token

        parts: list[str] = []

        def show(piece: str) -> None:
            parts.append(piece)
            on_text(piece)

        try:
            generate_text(
                self.model, self.tokenizer, ids, self.length, self.settings,
                on_text=show, tokens_from=tokens_from, generator=self.generator,
            )  # fmt: skip
        except KeyboardInterrupt:
            pass
        self.cached = (ids + new)[: self.cache.length]
        self.messages.append({"role": "assistant", "content": "".join(parts)})
        return "".join(parts)


def cmd_plot(args: argparse.Namespace) -> None:
    try:
        import matplotlib
    except ImportError:
        raise UserError("plot needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    paths = [Path(p) for p in args.logs] or sorted(CHECKPOINT_DIR.glob("*_model.jsonl"))
    figure, axes = plt.subplots(figsize=(8, 5))
    for path in paths:
        path = path if path.exists() else CHECKPOINT_DIR / f"{path}_model.jsonl"
        if not path.exists():
            raise UserError(f"no log at {path}: name a .jsonl file or a run under {CHECKPOINT_DIR}/")
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        label = path.stem.removesuffix("_model")
        (line,) = axes.plot([r[args.x] for r in records], [r["loss"] for r in records], alpha=0.35)
        scored = [r for r in records if "val_loss" in r]
        best = f" (best {min(r['val_loss'] for r in scored):.3f})" if scored else ""
        axes.plot(
            [r[args.x] for r in scored], [r["val_loss"] for r in scored], color=line.get_color(), label=label + best
        )
    if not paths:
        raise UserError(f"there are no logs under {CHECKPOINT_DIR}/ yet: train something first")
    axes.set(
        xlabel={"step": "step", "tokens": "tokens", "seconds": "seconds of training"}[args.x],
        ylabel="loss (nats per token)",
    )
    axes.grid(alpha=0.3)
    axes.legend(title="validation (pale: training)")
    figure.tight_layout()
    figure.savefig(args.output, dpi=120)
    say(f"wrote {args.output}")


def check_variant(variant: str, c: GPTConfig, path: Path) -> None:
    """Raise UserError unless a checkpoint has the shape of a variant."""
    shape = VARIANTS[variant]
    wrong = [k for k in ("n_layer", "n_head", "n_embd") if getattr(c, k) != shape[k]]
    if wrong:
        raise UserError(
            f"{path} is not a {variant}: it has {wrong[0]} {getattr(c, wrong[0])} and {variant} has "
            f"{shape[wrong[0]]}; leave --variant out or name another checkpoint"
        )


# ----------------------------------------------------------------------------------------------------------------------
# The parser
# ----------------------------------------------------------------------------------------------------------------------


def parse_bool(text: str) -> bool:
    if text.lower() in ("true", "1", "yes", "on"):
        return True
    if text.lower() in ("false", "0", "no", "off"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


def add_settings(parser: argparse.ArgumentParser, title: str, cls: type, only: tuple[str, ...] = ()) -> None:
    """A flag for every setting() of a dataclass. Flags not given stay None, so that variants and recipes can fill
    them."""
    group = parser.add_argument_group(title)
    for f in fields(cls):
        if "help" not in f.metadata or (only and f.name not in only):
            continue
        kind = f.metadata["type"] or (f.type if isinstance(f.type, type) else type(f.default))
        options: dict[str, Any] = {"type": parse_bool, "nargs": "?", "const": True} if kind is bool else {"type": kind}
        if f.metadata["choices"]:
            options["choices"] = f.metadata["choices"]
        else:
            options["metavar"] = {bool: "BOOL", int: "N", float: "X", str: "NAME"}[kind]
        group.add_argument(
            f"--{f.name}", help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"), **options
        )


def variants_table() -> str:
    """The variants with their true parameter counts, training memory and FLOPs per token, GPT-2's vocabulary."""
    rows = ["variant  arch      layers heads (kv) width block batch  parameters  training memory  FLOPs per token"]
    for name, v in VARIANTS.items():
        c = make_config(name, 6400 if name == "26M" else 50259, {})
        memory = training_memory_bytes(c, v["batch_size"]) / 2**30
        rows.append(
            f"{name:<8} {c.arch:<9} {c.n_layer:>6} {f'{c.n_head} ({c.n_kv_head})':>10} {c.n_embd:>5} "
            f"{c.block_size:>5} {v['batch_size']:>5}"
            f"  {count_parameters(c) / 1e6:>8.1f} M  {memory:>12.1f} GB  {training_flops_per_token(c):>15.2e}"
        )
    return "\n".join(rows) + "\n(GPT-2's vocabulary, 26M with its own 6,400 tokens; memory in bfloat16 at this batch)"


def make_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="model.py", description=__doc__, formatter_class=raw)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, help: str, examples: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.\n\n{description}",
            epilog=f"examples:\n{examples}",
            formatter_class=raw,
        )
        sub.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )
        sub.set_defaults(run=run)
        return sub

    def tokenizer_flags(sub: argparse.ArgumentParser, default: str | None = "gpt2") -> None:
        sub.add_argument(
            "--tokenizer",
            default=default,
            help="gpt2, bpe, byte, or a folder or file with a tokenizer.json (default: gpt2)",
        )
        sub.add_argument("--vocab_size", type=int, default=8192, help="tokens of --tokenizer bpe (default: 8192)")

    def model_flag(sub: argparse.ArgumentParser, required: bool = False) -> None:
        sub.add_argument(
            "--model_checkpoint", metavar="CHECKPOINT", required=required,
            help="a checkpoint, a Hugging Face directory or a hub id (default: the newest under checkpoints/)",
        )  # fmt: skip
        sub.add_argument("--variant", choices=VARIANTS, help="check that the checkpoint is of this shape")

    def device_flags(sub: argparse.ArgumentParser, dtype: str = "auto", quantize: bool = True) -> None:
        dtypes = ("auto", "float32", "bfloat16", "float16")
        sub.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
        held = ": on a CPU float16 weights and float32 activations" if quantize else ""
        help = f"of the computation (default: {dtype}{held})"
        sub.add_argument("--dtype", default=dtype, choices=dtypes, help=help)
        if quantize:
            sub.add_argument(
                "--quantize", choices=("int8",), help="int8 weights, on a CPU: faster, a little less exact"
            )

    def run_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--name", help="of the run: checkpoints/NAME_model.pt")
        sub.add_argument("--resume", action="store_true", help="go on with the run of this name")
        sub.add_argument("--overwrite", action="store_true", help="replace the run, and data, of this name")

    def conversation_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--chat_format",
            choices=CHAT_FORMATS,
            help="the form of the conversations, where their columns do not show it",
        )
        sub.add_argument(
            "--train_on_all",
            action="store_true",
            help="every token of a conversation is a target, not only the assistant's",
        )

    def hub_flags(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--hf_dataset",
            required=True,
            metavar="ID",
            help="a data set of the hub, or a local folder or file of parquet, json, jsonl, csv, text or arrow",
        )
        sub.add_argument("--hf_split", default="train", help="default: train")
        sub.add_argument("--hf_text_column", metavar="COLUMN", help="text or turns (default: what the columns show)")
        sub.add_argument("--hf_config", help="configuration of the data set")
        sub.add_argument("--hf_revision", help="branch, tag or commit of the data set")
        sub.add_argument("--streaming", action="store_true", help="read it as it comes, without a copy on the disk")
        sub.add_argument("--num_proc", type=int, default=1, help="processes that tokenize (default: 1)")
        sub.add_argument("--max_tokens", type=int, default=0, help="stop after about this many (default: 0, all)")
        sub.add_argument(
            "--val_fraction",
            type=float,
            default=0.1,
            help="the last part, for validation, at most 10M tokens (default: 0.1)",
        )
        conversation_flags(sub)

    sub = command(
        "tokenize", cmd_tokenize, "turn text into a data folder",
        "  python model.py tokenize --dataset shakespeare --txt input.txt\n"
        "  python model.py tokenize --dataset notes --txt ~/notes more.txt --tokenizer bpe --vocab_size 4096\n"
        "  zcat corpus.gz | python model.py tokenize --dataset corpus --txt - --tokenizer byte",
    )  # fmt: skip
    sub.add_argument("--dataset", required=True, metavar="NAME", help="the folder under data/ to make")
    sub.add_argument(
        "--txt",
        required=True,
        nargs="+",
        metavar="SOURCE",
        help="files, folders, http(s) URLs, or - for standard input",
    )
    tokenizer_flags(sub)
    sub.add_argument(
        "--encoding", default="utf-8-sig", help="of the text (default: UTF-8, with or without a byte order mark)"
    )
    sub.add_argument(
        "--errors",
        default="strict",
        choices=("strict", "ignore", "replace"),
        help="what to do with bytes outside the encoding",
    )
    sub.add_argument(
        "--val_fraction",
        type=float,
        default=0.1,
        help="the last part of the text that is for validation, at most 10M tokens (default: 0.1)",
    )
    sub.add_argument("--overwrite", action="store_true", help="replace a data folder of this name")
    conversation_flags(sub)

    sub = command(
        "train", cmd_train, "train a model",
        "  python model.py train --variant 7M\n"
        "  python model.py train --variant 7M --data input.txt --tokenizer byte --arch nanochat --max_iters 500\n"
        "  python model.py train --variant 26M --data shakespeare --epochs 3 --name shakespeare_26M\n"
        "  torchrun --nproc_per_node 4 model.py train --variant 300M --data corpus\n"
        "  python model.py train --variant 7M --resume",
        variants_table(),
    )  # fmt: skip
    sub.add_argument("--variant", default="7M", choices=VARIANTS, help="shape and recipe (default: 7M)")
    sub.add_argument("--arch", choices=ARCHS, help="how the shape is built (default: the variant's)")
    sub.add_argument(
        "--data",
        help="a name under data/, a folder, a .bin or a text file "
        "(default: the newest under data/, else Python's own library)",
    )
    tokenizer_flags(sub, None)
    sub.add_argument("--name", help="of the run: checkpoints/NAME_model.pt (default: the variant)")
    sub.add_argument("--resume", action="store_true", help="go on with the run of this name")
    sub.add_argument("--overwrite", action="store_true", help="replace the run of this name")
    add_settings(sub, "training (the variant's recipe comes before these defaults)", TrainConfig)
    add_settings(sub, "architecture (the variant and --arch come before these defaults)", GPTConfig)

    sub = command(
        "sample", cmd_sample, "generate text",
        '  python model.py sample --prompt "def "\n'
        '  python model.py sample --model_checkpoint 7M_model.pt --prompt "To be" --temperature 0.8 --top_k 50\n'
        '  echo "Once upon" | python model.py sample --num_samples 3 --stop "\\n"',
    )  # fmt: skip
    model_flag(sub)
    sub.add_argument("--prompt", help="the text to go on from (default: standard input, if it is not a terminal)")
    sub.add_argument("--length", type=int, default=100, help="tokens to generate (default: 100)")
    add_settings(sub, "sampling", SamplingSettings)
    sub.add_argument("--num_samples", type=int, default=1, help="continuations, drawn as one batch (default: 1)")
    sub.add_argument("--seed", type=int, default=1337, help="of the random choices (default: 1337)")
    sub.add_argument("--stop", nargs="+", metavar="TEXT", help=r"end before any of these (\n is a line end)")
    device_flags(sub)
    sub.add_argument(
        "--draft_checkpoint", metavar="CHECKPOINT", help="a small model that drafts for this one (speculative decoding)"
    )
    add_settings(sub, "beyond the trained context", GPTConfig, only=("rope_scaling", "rope_factor"))

    sub = command(
        "export", cmd_export, "write a model for transformers, vLLM or llama.cpp",
        "  python model.py export --variant 7M --model_path 7M_model.pt --output_dir exported_7M\n"
        "  python model.py export --model_path finetuned_7M_model.pt --output_dir chat_7M --dtype bfloat16\n"
        "  python model.py export --model_path 26M_model.pt --output_dir gguf_26M --format gguf --quantize q8_0",
    )  # fmt: skip
    sub.add_argument(
        "--model_path",
        metavar="CHECKPOINT",
        help="a checkpoint, a Hugging Face directory or a hub id (default: the newest under checkpoints/)",
    )
    model_flag(sub)
    sub.add_argument("--output_dir", required=True, metavar="DIR")
    sub.add_argument("--format", default="hf", choices=("hf", "gguf"), help="default: hf")
    sub.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of --format hf (default: float32)",
    )
    sub.add_argument(
        "--quantize", default="f16", choices=("f32", "f16", "bf16", "q8_0"), help="of --format gguf (default: f16)"
    )
    sub.add_argument("--max_shard_size", default="5GB", help="a larger model becomes several files (default: 5GB)")
    sub.add_argument("--overwrite", action="store_true", help="replace what is in the directory")
    add_settings(sub, "beyond the trained context", GPTConfig, only=("rope_scaling", "rope_factor"))

    sub = command(
        "hf_tokenize", cmd_hf_tokenize, "turn a Hugging Face data set into a data folder",
        "  python model.py hf_tokenize --hf_dataset roskoN/dailydialog --hf_split train --hf_text_column utterances "
        "--dataset dailydialog_train\n"
        "  python model.py hf_tokenize --hf_dataset ./parquet_folder --hf_text_column text --dataset corpus "
        "--num_proc 2\n"
        "  python model.py hf_tokenize --hf_dataset HuggingFaceFW/fineweb-edu --hf_config sample-10BT --streaming "
        "--max_tokens 100000000 --dataset fineweb",
    )  # fmt: skip
    sub.add_argument("--dataset", required=True, metavar="NAME", help="the folder under data/ to make")
    hub_flags(sub)
    tokenizer_flags(sub)
    sub.add_argument("--overwrite", action="store_true", help="replace a data folder of this name")

    def finetune_flags(sub: argparse.ArgumentParser) -> None:
        model_flag(sub)
        sub.add_argument("--finetune_iters", type=int, help="optimizer steps (default: 1000)")
        sub.add_argument(
            "--lora_rank",
            type=int,
            default=0,
            help="train low-rank adapters of this rank and merge them on save (default: 0, all weights)",
        )
        sub.add_argument("--prompt", help="show an answer to this before and after")
        sub.add_argument("--sample_length", type=int, default=100, help="tokens of that answer (default: 100)")
        sub.add_argument("--sample_temperature", type=float, default=0.8, help="default: 0.8")
        run_flags(sub)
        add_settings(
            sub, "training (defaults here: 1000 steps of 8, learning_rate 1e-4, or 1e-3 with LoRA)", TrainConfig
        )
        sub.add_argument(
            "--block_size", type=int, help="tokens of a training window (default: the context, at most 512)"
        )
        add_settings(sub, "model", GPTConfig, only=(*FINETUNE_SETTINGS, "rope_scaling", "rope_factor"))

    sub = command(
        "finetune", cmd_finetune, "finetune a model on conversations or text",
        "  python model.py finetune --variant 7M --model_checkpoint 7M_model.pt --data conversations.jsonl "
        "--finetune_iters 1000\n"
        '  python model.py finetune --model_checkpoint HuggingFaceTB/SmolLM2-135M --data chats.jsonl --lora_rank 16',
    )  # fmt: skip
    sub.add_argument(
        "--data",
        help="conversations as .jsonl, .json, .parquet or .csv, a text file, "
        "or a data folder made with the model's tokenizer",
    )
    finetune_flags(sub)

    sub = command(
        "hf_finetune", cmd_finetune, "finetune a model on a Hugging Face data set",
        "  python model.py hf_finetune --variant 120M --model_checkpoint distilled_120M_model.pt --hf_dataset "
        "roskoN/dailydialog \\\n"
        '    --hf_split train --hf_text_column utterances --finetune_iters 1000 --prompt "Hello, how are you?"',
    )  # fmt: skip
    hub_flags(sub)
    finetune_flags(sub)

    sub = command(
        "distill", cmd_distill, "train a small model with the help of a large one",
        "  python model.py distill --teacher_model_path hf --teacher_variant 120M --student_variant 7M --data "
        "data/shakespeare/data.bin \\\n"
        "    --temperature 2.0 --alpha 0.5\n"
        "  python model.py distill --teacher_model_path 120M_model.pt --student_variant 7M --data shakespeare "
        "--cache_teacher 64\n"
        "  python model.py distill --teacher_model_path HuggingFaceTB/SmolLM2-135M --init_from_teacher --data "
        "corpus.txt",
    )  # fmt: skip
    sub.add_argument(
        "--teacher_model_path",
        required=True,
        metavar="CHECKPOINT",
        help="a checkpoint, a Hugging Face directory, a hub id, or hf: the GPT-2 of --teacher_variant",
    )
    sub.add_argument(
        "--teacher_variant",
        choices=VARIANTS,
        help="with hf: " + ", ".join(f"{k} is {v}" for k, v in HF_ALIASES.items()),
    )
    sub.add_argument(
        "--student_variant",
        choices=VARIANTS,
        help="shape of the student (default with --init_from_teacher: the teacher's, half as deep)",
    )
    sub.add_argument("--student_checkpoint", metavar="CHECKPOINT", help="go on from this model")
    sub.add_argument("--init_from_teacher", action="store_true", help="start with every k-th layer of the teacher")
    sub.add_argument("--arch", choices=ARCHS, help="how the student is built (default: the variant's)")
    sub.add_argument("--data", help="a data set made with the teacher's tokenizer, or a text file")
    run_flags(sub)
    add_settings(sub, "distillation", DistillConfig)
    add_settings(sub, "training (the variant's recipe comes before these defaults)", TrainConfig)
    add_settings(sub, "architecture of the student", GPTConfig)

    sub = command(
        "eval", cmd_eval, "measure a model",
        "  python model.py eval --model_checkpoint 7M_model.pt --data shakespeare\n"
        "  python model.py eval --model_checkpoint 7M_model.pt --compare distilled_7M_model.pt --data test.txt "
        "--stride 64\n"
        "  python model.py eval --model_checkpoint 26M_model.pt --data book.txt --block_size 2048 --rope_scaling "
        "yarn --rope_factor 4\n"
        "  python model.py eval --model_checkpoint HuggingFaceTB/SmolLM2-135M --tasks hellaswag,piqa --json",
    )  # fmt: skip
    model_flag(sub)
    sub.add_argument("--compare", nargs="+", default=[], metavar="CHECKPOINT", help="more models for the same table")
    sub.add_argument(
        "--data", help="a data set, for its validation split, or a text file (default: the newest under data/)"
    )
    sub.add_argument("--block_size", type=int, help="context of the evaluation (default: the model's)")
    sub.add_argument(
        "--stride",
        type=int,
        help="tokens that a window moves on (default: the context; less gives each token more before it)",
    )
    sub.add_argument("--tasks", help="tasks of lm-eval, by commas: hellaswag,piqa,winogrande,mmlu")
    sub.add_argument("--include_path", metavar="DIR", help="with your own lm-eval tasks")
    sub.add_argument("--limit", type=float, help="examples of each task")
    sub.add_argument("--batch_size", type=int, default=16, help="of --tasks (default: 16)")
    sub.add_argument("--json", action="store_true", help="print JSON")
    device_flags(sub, dtype="float32", quantize=False)
    add_settings(sub, "beyond the trained context", GPTConfig, only=("rope_scaling", "rope_factor"))

    sub = command(
        "chat", cmd_chat, "talk with a model in the terminal",
        "  python model.py chat --model_checkpoint finetuned_7M_model.pt\n"
        '  python model.py chat --model_checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --system "You are brief."',
    )  # fmt: skip
    model_flag(sub)
    sub.add_argument("--system", help="the system turn")
    sub.add_argument("--length", type=int, default=512, help="tokens of an answer at most (default: 512)")
    sub.add_argument("--seed", type=int, default=1337, help="of the random choices (default: 1337)")
    device_flags(sub)
    add_settings(sub, "sampling (defaults here: temperature 0.7, top_p 0.95)", SamplingSettings)

    sub = command(
        "plot", cmd_plot, "draw the loss curves of runs",
        "  python model.py plot\n  python model.py plot 7M distilled_7M --x seconds --output curves.png",
    )  # fmt: skip
    sub.add_argument(
        "logs", nargs="*", metavar="LOG", help=".jsonl logs, or names of runs (default: all under checkpoints/)"
    )
    sub.add_argument("--x", default="step", choices=("step", "tokens", "seconds"), help="default: step")
    sub.add_argument("--output", default="loss.png", help="default: loss.png")
    return parser


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step. By default it gives those above 32 MB back to the system each
    time, and the page faults of getting them again took half of a training step with GPT-2's vocabulary."""
    if sys.platform == "linux":
        with suppress(OSError):
            libc = ctypes.CDLL("libc.so.6")
            M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
            libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
            libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)


def main() -> None:
    args = make_parser().parse_args()
    keep_freed_memory()
    try:
        args.run(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that Python's last flush is quiet
        sys.exit(1)
    except (UserError, OSError) as e:
        if args.debug:
            raise
        reason = str(e) if isinstance(e, UserError) or not e.filename else f"{e.filename}: {e.strerror}"
        print(f"model.py {args.command}: error: {reason}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
