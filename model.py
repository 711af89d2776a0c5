# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0",
#   "numpy==2.4.6",
#   "tiktoken==0.14.0",
#   "tokenizers==0.23.3",
#   "datasets==5.2.0",
#   "filelock==4.3.1",
#   "tqdm==4.70.1",
#   "safetensors==0.8.0",
# ]
# ///
"""Small language models, 7M to 1B parameters, in one file: train them, use them.

python model.py train --variant 7M        train, by default on Python's library
python model.py sample --prompt "def "    generate with the newest checkpoint
python model.py tokenize --dataset poems --txt poems.txt  text -> data/poems/
python model.py train --variant 26M --data poems --max_iters 5000
"""

# Reads from top to bottom: settings, the GPT, tokenizers, data, conversations, generation, checkpoints, processes and
# devices, training, distillation, evaluation, Hugging Face import and export, commands, parser; the appendix in C can
# be left out.

import argparse
import atexit
import base64
import bisect
import codecs
import ctypes
import difflib
import errno
import functools
import gc
import glob
import hashlib
import html
import importlib.util
import inspect
import io
import itertools
import json
import math
import mmap
import operator
import os
import pickle
import platform
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import timeit
import types
import typing
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until main is ready, Ctrl-C just ends the program


class Later(type):
    """Metaclass of a placeholder for modules: any attribute is the placeholder, its instances are no-op decorators."""

    def __getattr__(cls, name: str) -> type:
        return later


later = Later("later", (), {"__init__": lambda self, *args, **kwargs: None, "__call__": lambda self, x: x})

if __name__ == "__main__":  # parse the command line before the slow imports; see main
    np = torch = nn = F = Tensor = later
else:
    import numpy as np
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from torch import Tensor

FORMAT_VERSION = 3  # of checkpoints and data folders; 3 added digests; a newer version than this is refused
DATA_DIR = Path("data")
CHECKPOINT_DIR = Path("checkpoints")


class UserError(Exception):
    """An error that the user can fix: what is wrong and what to do, in one sentence; shown without a traceback."""


@contextmanager
def told_as(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's exceptions, all or only these kinds, into a UserError that says what failed and why."""
    caught = kinds or (Exception,)
    try:
        yield
    except caught as e:
        if isinstance(e, UserError) and UserError not in kinds:
            raise
        # DatasetGenerationError itself says only that there was an error
        said = str(e.__cause__ or e if type(e).__name__ == "DatasetGenerationError" else e).split()
        raise UserError(f"{what}: {' '.join(said)[:300] or type(e).__name__}") from e


def need(package: str, what: str, install: str = "") -> Any:
    """Import an optional package, or raise a UserError that says how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{what} needs the {package} package: pip install {install or package}") from None


# ----------------------------------------------------------------------------------------------------------------------
# Settings, architectures, variants
# ----------------------------------------------------------------------------------------------------------------------


def setting(
    default: Any, help: str, choices: Iterable = (), *, rare=False, alias="", required=False, special=None, **bounds
) -> Any:
    """A dataclass field that is also a command-line flag: its name, type, default, meaning and bounds (ge, gt, le, lt),
    declared once. `special` is allowed outside of the bounds, `rare` flags are shown by --help_all only, `alias` is a
    second name; without help, it is no flag."""
    metadata = dict(help=help, choices=choices, bounds=bounds, special=special)
    metadata |= dict(rare=rare, alias=alias, required=required)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # as the module operator names them
TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "an object"}


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value has an annotated type, inside containers too. An int is also a float, a bool never a number."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return True
    if origin is types.UnionType:
        return any(is_a(value, a) for a in args)
    if isinstance(value, bool):
        return origin is bool
    if not isinstance(value, (int, float) if origin is float else origin):
        return False
    parts = (value.keys(), value.values()) if origin is dict else (value,)
    return all(is_a(x, arg) for arg, part in zip(args, parts, strict=False) for x in part)


# What other programs call our flags.
SYNONYMS = {
    "lr": "learning_rate", "bs": "batch_size", "steps": "max_iters", "iters": "max_iters", "gpu": "device",
    "cpu": "device", "wandb": "report_to", "dropout": "resid_pdrop", "seq_len": "block_size", "context": "block_size",
    "hidden_size": "n_embd", "layers": "n_layer", "heads": "n_head", "max_new_tokens": "length",
    "ckpt": "model_checkpoint", "max_tokens": "length", "p": "prompt", "output_dir": "name", "out_dir": "name",
}  # fmt: skip


def nearest(name: Any, options: Iterable[str]) -> str:
    """What a mistyped name may have meant, as the end of a sentence."""
    other = f"--{SYNONYMS.get(str(name).lstrip('-'))}"
    found = [other] if other in options else difflib.get_close_matches(str(name), list(options), 1, 0.5)
    return f" (did you mean {found[0]}?)" if found else ""


@typing.dataclass_transform(field_specifiers=(setting, field))
class Settings:
    """Base class that makes its subclasses dataclasses, which check on creation that each field fits its type, choices
    and bounds; NaN never does. Raises UserError."""

    def __init_subclass__(cls) -> None:
        dataclass(cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices, bounds = getattr(self, f.name), f.metadata.get("choices"), f.metadata.get("bounds", {})
            special = f.metadata.get("special")
            if not is_a(value, f.type):
                wanted = TYPE_NAMES.get(typing.get_origin(f.type) or f.type, f.type)
            elif value is not None and choices and value not in choices:
                wanted = f"one of {', '.join(choices)}{nearest(value, choices)}"
            elif value not in (None, special) and not all(getattr(operator, k)(value, x) for k, x in bounds.items()):
                wanted = " and ".join(f"{BOUNDS[kind]} {bound}" for kind, bound in bounds.items())
                wanted += f", or {special}" * (special is not None)
            elif isinstance(value, float) and not math.isfinite(value):
                wanted = "a finite number"
            else:
                continue
            raise UserError(f"{f.name} is {value!r:.60}: it must be {wanted}")


def from_dict(cls: type, content: Any, where: Any) -> Any:
    """A dataclass, the one schema of a file, from the file's content. Raises UserError, naming the file and the field,
    for missing or unknown fields, wrong types, and files written by a newer model.py."""
    if not isinstance(content, dict):
        raise UserError(f"{where} holds {type(content).__name__} but should hold an object: {{...}}")
    if is_a(version := content.get("format_version"), int) and version > FORMAT_VERSION:
        raise UserError(f"{where} has format version {version}, made by a newer model.py: update this one")
    known = {f.name: f for f in fields(cls)}
    required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(required - content.keys()):
        raise UserError(f"{where} lacks {', '.join(missing)}: damaged, or not written by this program")
    if unknown := sorted(map(str, content.keys() - known.keys())):
        raise UserError(f"{where} has an unknown field {unknown[0]}: damaged, or made by another model.py")
    with told_as(str(where), UserError):
        return cls(**content)


DTYPES = ("auto", "float32", "bfloat16", "float16")
ACTIVATIONS: dict[str, Callable] = {
    "gelu": F.gelu, "gelu_new": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(), "silu": F.silu, "swiglu": F.silu, "geglu": F.gelu,  # GLUs: the gate's
}  # fmt: skip

C_ACTIVATIONS = [ACTIVATIONS[name] for name in ("gelu", "gelu_new", "relu", "relu2", "silu")]  # in C_SOURCE's order

# What `--arch` means. The names are Hugging Face model types, so that every export is native.
# fmt: off
ARCHS: dict[str, dict[str, Any]] = {
    "gpt2": dict(pos_embd="learned", norm="layernorm", activation="gelu_new", bias="all", init="gpt2"),
    "gpt_neox": dict(pos_embd="rope", norm="layernorm", activation="gelu_new", bias="all", init="normal"),
    "llama": dict(pos_embd="rope", norm="rmsnorm", activation="swiglu", bias="none", init="normal"),
    "qwen2": dict(pos_embd="rope", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias="qkv", init="normal"),
    "qwen3": dict(pos_embd="rope", norm="rmsnorm", norm_eps=1e-6, activation="swiglu", bias="none", init="normal",
                  qk_norm="before_rope"),
    "nanochat": dict(pos_embd="rope", norm="rmsnorm", norm_eps=1e-6, activation="relu2", bias="none", init="nanochat",
                     qk_norm="after_rope", norm_weight=False, embd_norm=True, tie_word_embeddings=False,
                     logit_softcap=15.0),
}
# How an architecture is trained where that differs from the variant's own recipe.
ARCH_RECIPES = {
    "nanochat": dict(optimizer="muon", schedule="wsd", weight_decay=0.0, embd_lr=0.2, beta1=0.8, beta2=0.95),
}

# Shapes, with the recipes that their sources (NGen3, NGen4, TransformerLM) published, for --recipe published.
VARIANTS: dict[str, dict[str, Any]] = {
    "7M": dict(arch="gpt2", n_layer=4, n_head=4, n_embd=128, block_size=128, batch_size=16, learning_rate=3e-4),
    "26M": dict(arch="llama", n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=32, learning_rate=5e-4,
                n_kv_head=2, n_inner=1408, rope_theta=1e6),
    "50M": dict(arch="gpt_neox", n_layer=8, n_head=8, n_embd=512, block_size=512, batch_size=32, learning_rate=5e-5,
                schedule="linear"),
    "120M": dict(arch="gpt2", n_layer=12, n_head=8, n_embd=512, block_size=256, batch_size=32, learning_rate=3e-4),
    "300M": dict(arch="gpt2", n_layer=20, n_head=16, n_embd=1024, block_size=1024, batch_size=16, learning_rate=3e-4),
    "500M": dict(arch="gpt2", n_layer=22, n_head=20, n_embd=1280, block_size=1024, batch_size=16, learning_rate=2.5e-4),
    "700M": dict(arch="gpt2", n_layer=26, n_head=22, n_embd=1408, block_size=1024, batch_size=16, learning_rate=2.5e-4),
    "1B": dict(arch="gpt2", n_layer=28, n_head=26, n_embd=1664, block_size=1024, batch_size=16, learning_rate=2e-4),
}
# fmt: on
# The default recipe: the fastest learner found in sweeps (tests/benchmarks/README.md), with the gpt2 variants built as
# qwen3. AdamW's learning rates, for the embedding and the norms, fall with the square root of the width.
TUNED = dict(optimizer="normuon", muon_lr=0.02, beta2=0.98, schedule="wsd", decay_fraction=-1.0, weight_decay=-1.0)
PARAMETERS = {  # with GPT-2's vocabulary (26M: with its own 6,400 tokens), for --help, which does not load PyTorch
    "7M": 7292288, "26M": 25829888, "50M": 50975744, "120M": 64305152, "300M": 304524800, "500M": 500591616,
    "700M": 691777664, "1B": 1020117120,
}  # fmt: skip


class GPTConfig(Settings):
    """architecture"""

    # a name only: make_config, or **ARCHS[arch], gives the settings that go with it
    arch: str = setting("gpt2", "model family, by Hugging Face's name", ARCHS)
    vocab_size: int = setting(50259, "", ge=1, le=1 << 24)  # tokens; the embedding is padded to a multiple of 64 rows
    block_size: int = setting(1024, "context length, in tokens", ge=1, le=1 << 24)
    n_layer: int = setting(12, "number of transformer blocks", ge=1, le=1000)
    n_head: int = setting(12, "number of query heads", ge=1, le=4096)
    n_kv_head: int = setting(0, "number of key/value heads (GQA; 0: n_head)", ge=0, le=4096)
    n_embd: int = setting(768, "width of the residual stream", ge=1, le=65536)
    head_dim: int = setting(0, "width of a head (0: n_embd / n_head)", ge=0, le=65536)
    n_inner: int = setting(0, "width of the MLP (0: 4 n_embd; 8/3 n_embd for GLUs)", ge=0, le=1 << 20)
    pos_embd: str = setting("learned", "position encoding", ("none", "learned", "rope"))
    rope_theta: float = setting(10000.0, "base of RoPE's wavelengths", gt=0)
    rope_pct: float = setting(1.0, "fraction of each head that RoPE rotates", ge=0, le=1)
    rope_scaling: str = setting("none", "RoPE context extension", ("none", "linear", "ntk", "yarn", "llama3"))
    rope_factor: float = setting(1.0, "factor by which rope_scaling extends the context", ge=1, le=1e6)
    rope_original_block_size: int = setting(0, "context before rope_scaling (0: block_size)", ge=0, rare=True)
    rope_attention_factor: float = setting(0.0, "YaRN: factor on cos, sin (0: derived)", ge=0, le=1e6, rare=True)
    rope_beta_fast: float = setting(32.0, "YaRN: do not interpolate above this many rotations", gt=0, le=1e6, rare=True)
    rope_beta_slow: float = setting(1.0, "YaRN: fully interpolate below this many rotations", gt=0, le=1e6, rare=True)
    rope_low_freq_factor: float = setting(1.0, "llama3 scaling: interpolate below this many rotations", gt=0, rare=True)
    rope_high_freq_factor: float = setting(4.0, "llama3 scaling: keep above this many rotations", gt=0, rare=True)
    norm: str = setting("layernorm", "normalisation", ("layernorm", "rmsnorm", "none"))
    norm_weight: bool = setting(True, "norms have learned weights", rare=True)
    norm_eps: float = setting(1e-5, "epsilon of the norms", gt=0, rare=True)
    norm_position: str = setting("pre", "norm before each sublayer or after its residual addition", ("pre", "post"))
    embd_norm: bool = setting(False, "normalise the token embedding too", rare=True)
    qk_norm: str = setting("none", "RMSNorm of queries, keys", ("none", "before_rope", "after_rope", "true", "false"))
    activation: str = setting("gelu_new", "MLP activation", ACTIVATIONS)
    bias: str = setting("all", "which linear layers have biases", ("none", "qkv", "attn", "all"), rare=True)
    parallel_residual: bool = setting(False, "attention and MLP read the same input and are added together", rare=True)
    tie_word_embeddings: bool = setting(True, "the head shares the token embedding's weights")
    logit_softcap: float = setting(0.0, "logits become c tanh(logits / c) (0: off)", ge=0, le=1e6, rare=True)
    init: str = setting("gpt2", "weight initialization scheme", ("gpt2", "normal", "nanochat"), rare=True)
    resid_pdrop: float = setting(0.0, "dropout on each residual branch", ge=0, lt=1)
    embd_pdrop: float = setting(0.0, "dropout on the embeddings", ge=0, lt=1)
    attn_pdrop: float = setting(0.0, "dropout on the attention weights", ge=0, lt=1)
    attn_implementation: str = setting("auto", "attention kernel", ("auto", "eager", "sdpa", "flash_attention_2"))
    gradient_checkpointing: bool = setting(False, "recompute blocks in the backward pass: less memory, a third slower")

    def __post_init__(self) -> None:
        # format 1 checkpoints and a bare --qk_norm only say whether; norm_weight then decides where
        places = {"true": "before_rope" if self.norm_weight else "after_rope", "false": "none"}
        self.qk_norm = places.get(str(self.qk_norm).lower(), self.qk_norm)
        super().__post_init__()
        self.n_kv_head = self.n_kv_head or self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        self.n_inner = self.n_inner or (round_up(self.n_embd * 8 / 3, 64) if self.is_glu else 4 * self.n_embd)
        if self.rope_scaling != "none" and self.pos_embd != "rope":
            raise UserError(f"rope_scaling {self.rope_scaling} needs pos_embd rope; this model has {self.pos_embd}")
        if self.rope_scaling == "ntk" and self.rope_dim < 4:
            raise UserError(f"rope_scaling ntk needs at least 4 rotated dimensions; these heads have {self.rope_dim}")
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise UserError(f"rope_scaling yarn needs a rope_theta above 1; this model has {self.rope_theta}")
        if self.rope_dim % 2:
            raise UserError(f"rope_pct {self.rope_pct} of head_dim {self.head_dim} is not an even number of dimensions")

    @property
    def is_glu(self) -> bool:
        return self.activation in ("swiglu", "geglu")

    @property
    def padded_vocab_size(self) -> int:
        return round_up(self.vocab_size, 64)

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope_pct) if self.pos_embd == "rope" else 0

    @property
    def context(self) -> int:
        """The longest sequence the positions support, in tokens: block_size, or what rope_scaling extends it to."""
        original = self.rope_original_block_size or self.block_size
        if self.rope_scaling == "none" or self.rope_scaling == "llama3" and original < self.block_size:
            return self.block_size  # Llama 3.2 reaches half of what its factor gives
        return max(self.block_size, int(original * self.rope_factor))


def round_up(n: float, multiple: int) -> int:
    return math.ceil(n / multiple) * multiple


def make_config(variant: str, vocab_size: int, overrides: dict[str, Any], recipe: str = "tuned") -> GPTConfig:
    """The GPTConfig of a variant: its architecture's row, then its shape, then the user's own settings."""
    shape = {k: v for k, v in VARIANTS[variant].items() if k in {f.name for f in fields(GPTConfig)}}
    if recipe == "tuned" and shape["arch"] == "gpt2":
        shape["arch"] = "qwen3"
    arch = overrides.get("arch", shape["arch"])
    return GPTConfig(**{**ARCHS[arch], **shape, **overrides, "vocab_size": vocab_size})


# ----------------------------------------------------------------------------------------------------------------------
# The GPT
# ----------------------------------------------------------------------------------------------------------------------


class Linear(nn.Linear):
    """A linear layer that casts its weights to the activations' dtype: mixed precision without autocast. Master weights
    stay in float32, and the dtype of the embedding's output sets that of every matmul."""

    def reset_parameters(self) -> None:
        """Left to GPT.init_weights."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), cast to x's dtype, plus bias."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Norm(nn.Module):
    """LayerNorm or RMSNorm, with or without learned weights; or none."""

    def __init__(self, config: GPTConfig, dim: int, kind: str | None = None) -> None:
        super().__init__()
        self.dim, self.eps, self.kind = (dim,), config.norm_eps, kind or config.norm
        self.weight = nn.Parameter(torch.ones(dim)) if config.norm_weight and self.kind != "none" else None
        self.bias = nn.Parameter(torch.zeros(dim)) if config.norm_weight and self.kind == "layernorm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "none":
            return x
        if self.training and self.kind == "rmsnorm" and training_library(x):
            rows = x.reshape(1, -1, 1, x.size(-1))  # as the queries of one head, without keys
            return HeadsInC.apply(rows, None, self.weight, None, 0, "before_rope", self.eps)[0].view(x.shape)
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.kind == "rmsnorm":
            return F.rms_norm(x, self.dim, weight, self.eps)
        return F.layer_norm(x, self.dim, weight, None if self.bias is None else self.bias.to(x.dtype), self.eps)


def rope_frequencies(c: GPTConfig) -> tuple[Tensor, float]:
    """RoPE's angle per position for each pair of dimensions, (rope_dim / 2,), and the factor on cos and sin. linear:
    positions are divided by the factor. ntk: theta grows by factor^(d / (d - 2)): the longest wavelength is stretched
    by the factor and the shortest not at all. yarn: fast dimensions stay, slow ones are divided by the factor, a ramp
    between, and attention is sharpened (arXiv 2309.00071, section 3; transformers' modeling_rope_utils). llama3: like
    yarn, with Llama 3.1's thresholds."""
    d, theta, factor = c.rope_dim, c.rope_theta, c.rope_factor
    original = c.rope_original_block_size or c.block_size
    if c.rope_scaling == "ntk":
        theta *= factor ** (d / (d - 2))
    freqs = 1.0 / theta ** (torch.arange(0, d, 2, dtype=torch.float32) / d)
    attention_factor, keep = 1.0, torch.ones(d // 2)  # keep: how much of a frequency is not divided by the factor
    if c.rope_scaling == "linear":
        keep = torch.zeros(d // 2)
    elif c.rope_scaling == "yarn":
        betas = c.rope_beta_fast, c.rope_beta_slow  # low and high: the dimensions that turn so often in the original
        low, high = (d * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in betas)
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        keep = 1 - (torch.arange(d // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)
        attention_factor = c.rope_attention_factor or 0.1 * math.log(factor) + 1
    elif c.rope_scaling == "llama3":
        rotations = original * freqs / (2 * math.pi)
        keep = (rotations - c.rope_low_freq_factor) / (c.rope_high_freq_factor - c.rope_low_freq_factor)
    keep = keep.clamp(0, 1)
    return freqs * keep + freqs / factor * (1 - keep), attention_factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + d/2) of x's first d dimensions. x (B, T, heads, head_dim); cos and sin (T, 1, d), or
    (B, T, 1, d), hold the values of each pair twice, with sin negated in the first half."""
    d = cos.size(-1)
    if d < x.size(-1):
        return torch.cat((apply_rope(x[..., :d], cos, sin), x[..., d:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(d // 2, dims=-1), sin)


def causal_mask(T_q: int, T_k: int, device: torch.device) -> Tensor:
    """(T_q, T_k), true where query i, one of the last T_q positions, may see key j."""
    return torch.ones(T_q, T_k, dtype=torch.bool, device=device).tril(T_k - T_q)


# Attention kernels: q (B, n_head, T_q, head_dim), k and v (B, n_kv_head, T_k, head_dim) -> as q. Causal, with queries
# aligned to the last keys, unless a boolean mask (B or 1, 1, T_q, T_k) says what each query sees.
# document_attention is given the ends of documents in place of a mask.


def ungrouped(x: Tensor, n_head: int) -> Tensor:
    """GQA: repeat keys or values to as many heads as the queries have."""
    return x if x.size(1) == n_head else x.repeat_interleave(n_head // x.size(1), dim=1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """Plain batched products: the readable reference, and the fast path for training in bfloat16 on a CPU, where the
    backward pass of PyTorch's fused kernel takes four times as long at 128 tokens and twice as long at 512."""
    B, n_head, T, head_dim = q.shape
    k, v = ungrouped(k, n_head), ungrouped(v, n_head)
    mask = causal_mask(T, k.size(2), q.device) if mask is None else mask.expand(B, n_head, -1, -1).flatten(0, 1)
    bias = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, float("-inf"))
    q, k, v = (x.reshape(B * n_head, -1, head_dim) for x in (q, k, v))
    att = torch.baddbmm(bias, q, k.mT, alpha=head_dim**-0.5).softmax(dim=-1)  # (B n_head, T_q, T_k)
    return torch.bmm(F.dropout(att, dropout_p), v).view(B, n_head, T, head_dim)


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """PyTorch's fused kernel, its flash kernel where the device has one."""
    if mask is not None and mask.dim() == 1:
        return document_attention(q, k, v, mask)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad and mask is None and q.size(2) <= 1024:
        return eager_attention(q, k, v, mask, dropout_p)
    if mask is None and 1 < q.size(2) < k.size(2):
        mask = causal_mask(q.size(2), k.size(2), q.device)
    if q.size(1) != k.size(1) and q.device.type == "cuda":
        if q.size(2) == 1:  # the queries of a group can pass as that many positions
            grouped = q.reshape(q.size(0), k.size(1), -1, q.size(3))
            return F.scaled_dot_product_attention(grouped, k, v, mask, dropout_p).reshape(q.shape)
        # the flash kernel supports GQA, but no mask and only 16-bit types, on GPUs with bfloat16; the other fused one
        # does not support GQA (PyTorch's sdp_utils.cpp), which would leave the plain kernel
        if mask is not None or q.dtype != torch.bfloat16:
            k, v = ungrouped(k, q.size(1)), ungrouped(v, q.size(1))
    return F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=mask is None and q.size(2) > 1, enable_gqa=q.size(1) != k.size(1)
    )


def document_attention(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's flash kernel, which takes no mask, on packed documents: ends (n + 1,) int32 is 0, and where each ends
    in the rows laid end to end."""
    from torch.nn.attention.varlen import varlen_attn

    B, _, T, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    y = varlen_attn(q, k, v, ends, ends, T, T, window_size=(-1, 0), enable_gqa=q.size(1) != k.size(1))
    return y.unflatten(0, (B, T)).transpose(1, 2)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float) -> Tensor:
    """The flash-attn package. It supports no masks, and only 16-bit types on a GPU: everything else goes to PyTorch's
    kernel."""
    if mask is not None or q.device.type != "cuda" or q.dtype == torch.float32:
        return sdpa_attention(q, k, v, mask, dropout_p)
    from flash_attn import flash_attn_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flash_attn_func(q, k, v, dropout_p=dropout_p, causal=True).transpose(1, 2)


ATTENTION = {
    "auto": sdpa_attention, "sdpa": sdpa_attention, "eager": eager_attention, "flash_attention_2": flash_attention_2,
}  # fmt: skip


class KVCache:
    """Keys and values of the tokens seen so far, preallocated: kv (n_layer, B, 2 n_kv_head, max_length, head_dim), the
    heads of k before those of v. `pad` (B,) counts the padding tokens at the left of each row, for prompts of different
    lengths."""

    def __init__(self, model: "GPT", batch_size: int, max_length: int, pad: Tensor | None = None) -> None:
        c = model.config
        shape = (c.n_layer, batch_size, 2 * c.n_kv_head, max_length, c.head_dim)
        in_c = isinstance(model.engine, CEngine) and batch_size <= CEngine.max_rows  # float16: half as much to read
        dtype = torch.float16 if in_c else model.compute_dtype
        self.kv = torch.zeros(shape, dtype=dtype, device=model.device)
        self.length, self.max_length, self.pad = 0, max_length, pad
        self.steps: dict[int, OneToken] = {}  # for CUDAGraphs

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v (B, n_kv_head, T, head_dim) to a layer; returns all of its keys and values so far."""
        kv, new = self.kv[layer, :, :, : self.length + k.size(2)], torch.cat((k, v), dim=1)
        if kv.dtype != new.dtype:  # float16, in which large numbers become its largest, as by to_half in C
            new = new.clamp(-torch.finfo(kv.dtype).max, torch.finfo(kv.dtype).max)
        kv[:, :, self.length :] = new
        return kv.to(k.dtype).chunk(2, dim=1)


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values come from one matrix."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.n_kv_head, self.head_dim = layer, c.n_head, c.n_kv_head, c.head_dim
        self.qkv = Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.bias != "none")
        self.proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=c.bias in ("attn", "all"))
        self.eps, self.qk_norm = c.norm_eps, c.qk_norm  # Qwen 3 normalises, then rotates; nanochat the other way round
        if c.qk_norm != "none":
            self.q_norm, self.k_norm = (Norm(c, c.head_dim, "rmsnorm") for _ in "qk")
        self.kernel = ATTENTION[c.attn_implementation]
        if self.kernel is flash_attention_2:
            need("flash_attn", "attn_implementation flash_attention_2 (sdpa is PyTorch's own)", "flash-attn")
        self.attn_pdrop, self.resid_pdrop = c.attn_pdrop, c.resid_pdrop

    def forward(self, x: Tensor, rope: Any, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        q, k, v = self.heads(self.qkv(x).view(B, T, -1, self.head_dim), rope)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        y = self.kernel(q, k, v, mask, self.attn_pdrop if self.training else 0.0)
        return F.dropout(self.proj(y.transpose(1, 2).reshape(B, T, -1)), self.resid_pdrop, self.training)

    def heads(self, qkv: Tensor, rope: tuple[Tensor, Tensor] | None) -> Iterable[Tensor]:
        """qkv (B, T, heads, head_dim) -> queries, keys and values (B, heads, T, head_dim), normalised and rotated."""
        if self.training and training_library(qkv):
            weights = (None, None) if self.qk_norm == "none" else (self.q_norm.weight, self.k_norm.weight)
            return HeadsInC.apply(qkv, rope, *weights, self.n_kv_head, self.qk_norm, self.eps)
        qk, v = qkv.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm == "before_rope":
            qk = self.normalise(qk)
        if rope is not None:
            qk = apply_rope(qk, *rope)
        if self.qk_norm == "after_rope":
            qk = self.normalise(qk)
        return (x.transpose(1, 2) for x in (*qk.split((self.n_head, self.n_kv_head), dim=2), v))

    def normalise(self, qk: Tensor) -> Tensor:
        """QK-norm of queries and keys (B, T, n_head + n_kv_head, head_dim)."""
        if self.q_norm.weight is None:
            return self.q_norm(qk)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        return torch.cat((self.q_norm(q), self.k_norm(k)), dim=2)


class MLP(nn.Module):
    """Two linear layers with an activation between; for GLUs the gate and the value come from one matrix."""

    def __init__(self, c: GPTConfig) -> None:
        super().__init__()
        self.is_glu, self.activation = c.is_glu, ACTIVATIONS[c.activation]
        self.fc = Linear(c.n_embd, c.n_inner * (1 + c.is_glu), bias=c.bias == "all")
        self.proj = Linear(c.n_inner, c.n_embd, bias=c.bias == "all")
        self.resid_pdrop = c.resid_pdrop

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x)
        if self.training and self.activation is F.silu and self.is_glu and training_library(x):
            x = SwiGLUInC.apply(x)
        elif self.is_glu:
            gate, value = x.chunk(2, dim=-1)
            x = self.activation(gate) * value
        else:
            x = self.activation(x)
        return F.dropout(self.proj(x), self.resid_pdrop, self.training)


class Block(nn.Module):
    """One transformer layer: attention and MLP, each with its norm and its residual addition."""

    def __init__(self, c: GPTConfig, layer: int) -> None:
        super().__init__()
        self.norm_1, self.attn = Norm(c, c.n_embd), Attention(c, layer)
        self.norm_2, self.mlp = Norm(c, c.n_embd), MLP(c)
        self.pre_norm, self.parallel = c.norm_position == "pre", c.parallel_residual

    def linears(self) -> list[tuple[nn.Module, str]]:
        """The linear layers, as (parent module, attribute name)."""
        return [(self.attn, "qkv"), (self.attn, "proj"), (self.mlp, "fc"), (self.mlp, "proj")]

    def forward(self, x: Tensor, *attention_inputs: Any) -> Tensor:
        if not self.pre_norm:
            x = self.norm_1(x + self.attn(x, *attention_inputs))
            return self.norm_2(x + self.mlp(x))
        attended = x + self.attn(self.norm_1(x), *attention_inputs)
        return attended + self.mlp(self.norm_2(x if self.parallel else attended))  # parallel: Pythia


class CUDAGraphs:
    """Generation on a GPU, which is limited by kernel launches, some 140 per token with 12 layers: those of the blocks
    are recorded once and launched as one. Prompts take the plain pass, as does everything if recording fails."""

    def __init__(self, model: "GPT") -> None:
        self.model, self.head = model, model.head

    def run_blocks(self, x: Tensor, rope: Any, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        if cache is None or x.size(1) > 1:
            return self.model.run_blocks(x, rope, mask, cache)
        reach = min(max(256, 1 << cache.length.bit_length()), cache.max_length)
        if reach not in cache.steps:
            try:
                cache.steps[reach] = OneToken(self.model, cache, reach, x, rope)
            except RuntimeError as e:
                say(f"continuing without CUDA graphs: {e}", sys.stderr)
                self.model.engine = None
                return self.model.run_blocks(x, rope, mask, cache)
        cache.steps[reach].position.fill_(cache.length)
        return cache.steps[reach].replay(x, *(rope or ())).clone()


class OneToken:
    """The blocks on one token per row, where only the contents of tensors change, all of which are kept here. It stands
    in for the cache: the token sees the first `reach` positions, except later ones and padding."""

    def __init__(self, model: "GPT", cache: KVCache, reach: int, x: Tensor, rope: Any) -> None:
        self.model, self.kv, self.index = model, cache.kv[..., :reach, :], torch.arange(reach, device=x.device)
        self.position = torch.full((1,), cache.length, device=x.device)
        self.seen = self.index[None, None, None] >= (0 if cache.pad is None else cache.pad[:, None, None, None])
        with torch.accelerator.device_index(x.device.index):
            inputs = tuple(y.clone() for y in (x, *(rope or ())))
            self.replay = torch.cuda.make_graphed_callables(self.run, inputs)

    @torch.no_grad()
    def run(self, x: Tensor, *rope: Tensor) -> Tensor:
        return self.model.run_blocks(x, rope or None, self.seen & (self.index <= self.position), self)

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.kv[layer].index_copy_(2, self.position, torch.cat((k, v), dim=1)).chunk(2, dim=1)


class GPT(nn.Module):
    """A decoder-only transformer with every architecture of ARCHS and every override of GPTConfig."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = c = config
        # on the meta device, nn.Embedding's own initialization would import torch._dynamo, which takes 1.5 s
        embedding = functools.partial(nn.Embedding.from_pretrained, freeze=False)
        self.wte = embedding(torch.empty(c.padded_vocab_size, c.n_embd))
        self.wpe = embedding(torch.empty(c.block_size, c.n_embd)) if c.pos_embd == "learned" else None
        self.embd_norm = Norm(c, c.n_embd) if c.embd_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm_f = Norm(c, c.n_embd) if c.norm_position == "pre" else nn.Identity()
        self.lm_head = None if c.tie_word_embeddings else Linear(c.n_embd, c.padded_vocab_size, bias=False)
        self.compute_dtype = torch.float32  # of the activations; see set_precision
        self.engine: Any = None  # runs the blocks and the head in generation: CEngine, CUDAGraphs or, if None, self
        self.compiled_loss: Callable | None = None  # stands in for CrossEntropy in training; see compile_model
        self.sharded: list[Any] = []  # the modules whose parameters are sharded over processes; see shard_model
        self.new_tokens: list[int] = []  # if any, only these rows of the embedding and the head are trained
        self.build_rope()
        if self.device.type != "meta":
            self.init_weights()

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(padded_vocab_size, n_embd)"""
        if isinstance(self.lm_head, Int8Linear):
            return self.lm_head.weight * self.lm_head.scale[:, None]
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    @torch.no_grad()
    def init_weights(self) -> None:
        """gpt2: N(0, 0.02), residual projections divided by sqrt(2 n_layer) (GPT-2 paper, section 2.3). normal: N(0,
        0.02) throughout (transformers' GPT-NeoX, Llama, Qwen). nanochat: unit embedding, uniform matrices of variance
        1 / n_embd, zero projections and a head near zero (nanochat's gpt.py)."""
        c, bound = self.config, (3 / self.config.n_embd) ** 0.5
        stds = {"gpt2": {"proj": 0.02 / math.sqrt(2 * c.n_layer)}, "normal": {}}
        stds["nanochat"] = {"wte": 0.02 if c.tie_word_embeddings else 1.0, "lm_head": 0.001, "proj": 0.0}
        for name, p in self.named_parameters():
            part = name.split(".")[-2]
            std = stds[c.init].get(part, 0.02)
            if p.dim() < 2 or std == 0:
                p.fill_(1.0 if "norm" in part and name.endswith("weight") else 0.0)
            elif c.init == "nanochat" and part in ("qkv", "fc"):
                p.uniform_(-bound, bound)
            else:
                p.normal_(0.0, std)

    def fused_rows(self) -> dict[str, list[int]]:
        """The stacked matrices, and how many rows each of their parts has: Muon orthogonalises the parts separately."""
        c, d = self.config, self.config.head_dim
        parts = {"attn.qkv": [c.n_head * d, c.n_kv_head * d, c.n_kv_head * d], "mlp.fc": [c.n_inner] * (1 + c.is_glu)}
        return {f"blocks.{i}.{k}.weight": rows for i in range(c.n_layer) for k, rows in parts.items()}

    def build_rope(self) -> None:
        """Tables of cos and sin for apply_rope, (context, 1, rope_dim) float32; rebuilt when the scaling changes."""
        self.rope_cos = self.rope_sin = None
        if self.config.pos_embd == "rope" and self.device.type != "meta":
            freqs, factor = rope_frequencies(self.config)
            angles = torch.outer(torch.arange(self.config.context, dtype=torch.float32), freqs)[:, None]
            cos, sin = torch.cos(angles) * factor, torch.sin(angles) * factor
            self.rope_cos = torch.cat((cos, cos), dim=-1).to(self.device)
            self.rope_sin = torch.cat((-sin, sin), dim=-1).to(self.device)

    def _apply(self, fn: Callable, *args: Any, **kwargs: Any) -> "GPT":
        super()._apply(fn, *args, **kwargs)
        if self.rope_cos is not None:  # follows the device but not the dtype
            self.rope_cos, self.rope_sin = self.rope_cos.to(self.device), self.rope_sin.to(self.device)
        return self

    def extend_context(self, **changes: Any) -> None:
        """Extend a trained model's context by changing rope_scaling and rope_factor, or block_size."""
        original, context = self.config.rope_original_block_size or self.config.block_size, self.config.context
        if "rope_factor" in changes and (reach := int(original * changes["rope_factor"])) < context:
            raise UserError(f"the model already reaches {context:,} tokens, and would reach only {reach:,} with this "
                            f"--rope_factor: leave it out, or use a larger one")  # fmt: skip
        if changes.get("rope_factor", self.config.rope_factor) != self.config.rope_factor:
            changes["rope_attention_factor"] = 0.0  # the model's own, which exports always have, fits the old factor
        self.config = replace(self.config, rope_original_block_size=original, **changes)
        self.build_rope()

    @property
    def flash_by_document(self) -> bool:
        """Whether attention takes packed documents by their ends: PyTorch's flash kernel, from Ampere on."""
        c = self.config
        if self.device.type != "cuda" or torch.version.hip or not torch.backends.cuda.is_flash_attention_available():
            return False
        supported = c.attn_implementation != "eager" and c.head_dim % 8 == 0 and c.head_dim <= 128
        supported = supported and not (self.training and c.attn_pdrop) and self.compute_dtype == torch.bfloat16
        return supported and choose_dtype("auto", self.device) == torch.bfloat16

    def positions_and_mask(self, idx: Tensor, cache: KVCache | None, documents: Tensor | None) -> tuple[Any, Any]:
        """Each token's position, a slice or (B, T), and the attention mask: None if each token sees all before it; for
        flash_by_document the ends of the documents. Raises UserError beyond the context, ValueError beyond a cache."""
        start, context = 0 if cache is None else cache.length, self.config.context
        end = start + idx.size(1)
        if end > context and documents is None and self.config.pos_embd != "none":
            raise UserError(f"{end} tokens are more than the context of {context}: shorten them, or see extend_context")
        if cache is not None and end > cache.max_length:
            raise ValueError(f"{end} tokens are more than the cache's max_length of {cache.max_length}")
        if documents is None and (cache is None or cache.pad is None):
            return slice(start, end), None
        if documents is None:  # the padding is a document of its own
            documents = torch.stack((cache.pad, end - cache.pad), dim=1).flatten()
        ends, index = documents.cumsum(dim=0), torch.arange(len(idx) * end, device=idx.device)
        own = torch.searchsorted(ends, index, right=True)  # the document of each token
        positions = (index - (ends - documents)[own]).view(-1, end)[:, start:]
        if not start and self.flash_by_document:
            return positions, F.pad(ends, (1, 0)).int()
        own = own.view(-1, end)
        same = own[:, start:, None] == own[:, None, :]
        return positions, (same & causal_mask(end - start, end, idx.device))[:, None]

    def hidden(self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """The final hidden states (B, T, n_embd) of tokens idx (B, T). With a cache, idx continues what it holds and
        is appended to it. `documents` (n,) are the lengths of the documents packed into the rows, which they fill, row
        after row: none sees another, and each has its own positions from 0."""
        positions, mask = self.positions_and_mask(idx, cache, documents)
        x, rope = self.wte(idx).to(self.compute_dtype), None
        if self.wpe is not None:
            x = x + self.wpe.weight[positions].to(x.dtype)
        if self.rope_cos is not None:
            rope = self.rope_cos[positions].to(x.dtype), self.rope_sin[positions].to(x.dtype)
        x = F.dropout(self.embd_norm(x), self.config.embd_pdrop, self.training)
        x = (self.engine or self).run_blocks(x, rope, mask, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return self.norm_f(x)

    def run_blocks(self, x: Tensor, rope: Any, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        """x (B, T, n_embd) through all blocks."""
        c = self.config
        if x.device.type == "mps" and self.training and c.gradient_checkpointing and c.resid_pdrop + c.attn_pdrop:
            # torch.utils.checkpoint restores the random state of CUDA but not of MPS (looks for torch.mps._initialized)
            raise UserError("on a Mac, gradient_checkpointing and dropout do not go together: leave one of them out")
        for block in self.blocks:
            # bypasses the sharding or compilation of a block: lengths change from call to call
            if not self.training and (self.sharded or "forward" in vars(block)):
                x = Block.forward(block, x, rope, mask, cache)
            elif c.gradient_checkpointing:
                x = torch.utils.checkpoint.checkpoint(block, x, rope, mask, cache, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache)
        return x

    def head(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> logits before the soft-cap, (..., padded_vocab_size)."""
        return linear(x, self.wte.weight) if self.lm_head is None else self.lm_head(x)

    def logits(self, x: Tensor) -> Tensor:
        """Hidden states (..., n_embd) -> logits (..., vocab_size), float32; padding rows of the head are left out."""
        logits = (self.engine or self).head(x)[..., : self.config.vocab_size].float()
        cap = self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx: Tensor, cache: KVCache | None = None, documents: Tensor | None = None) -> Tensor:
        """Tokens (B, T) -> logits (B, T, vocab_size), float32."""
        return self.logits(self.hidden(idx, cache, documents))

    def loss(
        self, idx: Tensor, targets: Tensor, documents: Tensor | None = None, chunk_loss: Callable | None = None,
        distributions: int = 1,
    ) -> Tensor:  # fmt: skip
        """Sum of the cross-entropy, in nats, of targets (B, T) given tokens idx (B, T), or of another chunk loss (see
        linear_loss); a target of -1 does not count."""
        if targets.shape != idx.shape:
            raise UserError(f"targets are {tuple(targets.shape)} and tokens {tuple(idx.shape)}: each token needs one")
        if targets.device.type == "cpu" and (beyond := targets >= self.config.vocab_size).any():  # C does not check it
            raise UserError(f"target {targets[beyond][0]} is not in the vocabulary of {self.config.vocab_size}")
        h = self.hidden(idx, documents=documents)
        return linear_loss(h, self, chunk_loss or CrossEntropy(targets), distributions)


def parameter_shapes(c: GPTConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in GPT(c).named_parameters()}


def count_parameters(c: GPTConfig) -> int:
    return sum(shape.numel() for shape in parameter_shapes(c).values())


def training_flops_per_token(c: GPTConfig, n_parameters: int = 0) -> float:
    """FLOPs of a forward and backward pass per token: 6 per matmul parameter and 12 L H Q T for attention (PaLM,
    arXiv 2204.02311, appendix B). The embedding is a look-up and costs nothing; the head is a matmul."""
    lookups = (c.padded_vocab_size * (not c.tie_word_embeddings) + c.block_size * (c.pos_embd == "learned")) * c.n_embd
    return 6 * ((n_parameters or count_parameters(c)) - lookups) + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size


def training_memory_bytes(c: GPTConfig, micro_batch_size: int, n_parameters: int = 0) -> float:
    """Estimated bytes that training takes: weights, gradients and AdamW's two moments in float32, and the bfloat16
    activations that the backward pass reads (18 widths and two MLP widths per token and block)."""
    activations = micro_batch_size * c.block_size * c.n_layer * (10 * c.n_embd + (2 + 2 * c.is_glu) * c.n_inner) * 2
    if c.gradient_checkpointing:
        activations = activations / c.n_layer + micro_batch_size * c.block_size * c.n_layer * c.n_embd * 2
    return 16 * (n_parameters or count_parameters(c)) + activations


# The head and the loss together. A vocabulary of 50,000 makes the logits the largest tensor of a small model's step by
# far, so they never exist in full: tokens go through the head in chunks, and each chunk's gradient is taken right away.
# A chunk loss is called with (logits (rows, padded_vocab_size), rows: a slice of the tokens, with_grad), and returns
# the sum of its loss over these rows and, if with_grad, the gradient of the logits, whose memory it may reuse.

LOSS_CHUNK_ELEMENTS = 512 * 50304  # 512 rows of GPT-2's vocabulary: the fastest of 64 ... 1024 on a CPU
MPS_LONGEST_SUM = 32704  # products over 32,767 and more are wrong on M1 and M2 (pytorch/pytorch#195163, fixed in 2.14)
CUDA_LOSS_CHUNK_ELEMENTS = 1 << 27  # 256 MiB in 16 bits; 1.3 GiB with the plain loss's 32-bit temporaries


class CrossEntropy:
    """The chunk loss of language modelling: the sum of -log p(target) over targets (any shape) that are not -1."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets.flatten()

    def __call__(self, logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        targets = self.targets[rows]
        if logits.is_contiguous() and (library := training_library(logits)):
            losses, targets = torch.empty(len(targets)), targets.long().contiguous()
            run_in_c(library.cross_entropy, *logits.shape, with_grad, targets, logits, losses)
            return losses.sum(), logits if with_grad else None
        log_probs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)
        losses = F.nll_loss(log_probs, targets, ignore_index=-1, reduction="none")
        if not with_grad:
            return losses.sum(), None
        probs = log_probs.exp_()
        probs[torch.arange(len(targets), device=targets.device), targets] = torch.expm1(-losses)  # p - 1, exactly
        return losses.sum(), probs.mul_((targets >= 0)[:, None]).to(logits.dtype)


def fusible_cross_entropy(logits: Tensor, targets: Tensor, n_vocab: int, softcap: float) -> tuple[Tensor, Tensor]:
    """CrossEntropy as linear_loss calls it, with soft-cap and gradient, in pure functions: torch.compile fuses them in
    two passes over the logits, where stores into parts of a tensor would need another tensor of that size."""
    column, target, counted = torch.arange(logits.size(1), device=logits.device), targets[:, None], targets >= 0
    tanh = torch.tanh(logits.float() / softcap) if softcap else None
    x = softcap * tanh if softcap else logits.float()
    logp = x.masked_fill(column >= n_vocab, float("-inf")).log_softmax(dim=-1)
    loss = -logp.gather(1, target.clamp(min=0))[:, 0]
    grad = torch.where(column == target, torch.expm1(-loss)[:, None], logp.exp()) * counted[:, None]
    return (loss * counted).sum(), (grad * (1 - tanh.square()) if softcap else grad).to(logits.dtype)


def by_autograd(loss_of: Callable[[Tensor], Tensor], logits: Tensor, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The value of a differentiable function at logits, and its gradient if with_grad. For plain cross-entropy a
    hand-written one is 1.4 to 1.9 times faster; for a divergence between two distributions it is not."""
    with torch.set_grad_enabled(with_grad):
        logits = logits.detach().requires_grad_(with_grad)
        loss = loss_of(logits)
    return loss.detach(), torch.autograd.grad(loss, logits)[0] if with_grad else None


class FusedLinearLoss(torch.autograd.Function):
    """chunk_loss(h @ weight.T) in chunks of rows, with the gradients taken chunk by chunk in the forward pass
    (as Liger Kernel's fused linear cross-entropy does, arXiv 2410.10989, section 3.2)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, chunk_loss: Callable, chunk: int, with_grad: bool):
        w, N = weight.to(h.dtype), h.size(0)
        wide = torch.promote_types(h.dtype, torch.float32)  # float64 if h is
        loss = torch.zeros((), device=h.device, dtype=wide)
        grad_h = torch.zeros_like(h) if with_grad else None
        grad_w = torch.zeros(weight.shape, dtype=wide, device=h.device) if with_grad and weight.requires_grad else None
        memory, product = h.new_empty(min(N, chunk), weight.size(0)), None
        longest = MPS_LONGEST_SUM if h.device.type == "mps" else len(w)
        for start in range(0, N, chunk):
            rows = slice(start, start + chunk)
            x = h[rows]
            logits = torch.mm(x, w.T, out=memory[: len(x)])
            part, grad_logits = chunk_loss(logits, rows, with_grad)
            loss += part
            for i in range(0, len(w) if with_grad else 0, longest):
                grad_h[rows].addmm_(grad_logits[:, i : i + longest], w[i : i + longest])
            if grad_w is None:  # a frozen head
                continue
            if h.dtype == wide:
                grad_w.addmm_(grad_logits.T, x)
            else:  # multiply chunks in the short type, sum them in the wide one
                product = torch.mm(grad_logits.T, x, out=product)
                if library := training_library(product):  # PyTorch would first copy it to the wide type
                    run_in_c(library.accumulate, product.numel(), product, grad_w)
                else:
                    grad_w += product
        ctx.gradients = grad_h, grad_w
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        grad_h, grad_w = ctx.gradients
        del ctx.gradients  # so that autograd takes them over without a copy
        grad_h = grad_h.mul_(grad_output.to(grad_h.dtype))
        return grad_h, None if grad_w is None else grad_w.mul_(grad_output), None, None, None


def linear_loss(h: Tensor, model: GPT, chunk_loss: Callable, distributions: int = 1) -> Tensor:
    """The sum of a chunk loss over hidden states h (B, T, n_embd), through the model's head. Scalar, differentiable.
    distributions: how many tensors of the logits' size the loss holds at once; chunks shrink by that factor."""
    h, weight, c = h.flatten(0, -2), model.head_weight, model.config
    with_grad = torch.is_grad_enabled() and (h.requires_grad or weight.requires_grad)
    elements = CUDA_LOSS_CHUNK_ELEMENTS if h.device.type == "cuda" else LOSS_CHUNK_ELEMENTS
    chunk = max(64, elements // (weight.size(0) * distributions))
    if h.device.type == "cuda":
        chunk = 1 << chunk.bit_length() - 1  # divides most batches: all chunks alike, and aligned
    elif h.device.type == "mps":
        chunk = min(chunk, MPS_LONGEST_SUM)

    def of_products(products: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
        if model.compiled_loss is not None and with_grad and isinstance(chunk_loss, CrossEntropy):
            return model.compiled_loss(products, chunk_loss.targets[rows], c.vocab_size, c.logit_softcap)
        tanh = torch.tanh(products / c.logit_softcap) if c.logit_softcap else None
        logits = c.logit_softcap * tanh if c.logit_softcap else products
        logits[:, c.vocab_size :] = float("-inf")  # the padding
        loss, grad = chunk_loss(logits, rows, with_grad)
        return loss, grad.mul_(1 - tanh.square()) if with_grad and c.logit_softcap else grad

    return FusedLinearLoss.apply(h, weight, of_products, chunk, with_grad)


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers
# ----------------------------------------------------------------------------------------------------------------------

EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # tiktoken's r50k
# GPT-2's printable character for each byte: tokenizer.json writes byte-level vocabularies in these.
PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
BYTE_TO_UNICODE = {b: chr(b) for b in PRINTABLE} | {b: chr(256 + i) for i, b in enumerate(OTHERS)}
UNICODE_TO_BYTE = {c: b for b, c in BYTE_TO_UNICODE.items()}


class TokenizerSpec(Settings):
    """A whole tokenizer in plain values, as data folders and checkpoints store it."""

    kind: str = setting("", "", ("gpt2", "bpe", "byte", "hf"))  # hf: someone else's
    name: str = ""
    ranks: str = ""  # gpt2 and bpe: the ordinary tokens in id order, one line of base64 each
    json: str = ""  # hf: a tokenizer.json
    special: dict[str, int] = field(default_factory=dict)  # the ids of EOT, IM_START and IM_END, if it has them
    bos: list[int] = field(default_factory=list)  # ids that open every prompt
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    unk_token: str | None = None
    chat_template: str | None = None
    ends: list[int] = field(default_factory=list)  # hf: other ids that end a text, such as an end of turn


class Tokenizer:
    """Text to token ids and back: by tiktoken for our own vocabularies, which are then a quarter as large and open
    five times faster, else by tokenizers. Special tokens are never recognised in text."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.fields = s = from_dict(TokenizerSpec, spec, "the tokenizer")
        self.kind, self.name, self.special, self.bos, self.is_ours = s.kind, s.name, s.special, s.bos, s.kind != "hf"
        if self.is_ours:
            from tiktoken import Encoding

            with told_as(f"tokenizer {s.name} has no valid ranks"):
                tokens = [base64.b64decode(t) for t in s.ranks.split()] or [bytes([b]) for b in range(256)]
                ranks = {token: rank for rank, token in enumerate(tokens)}
                self.n_vocab, pattern = len(tokens) + len(s.special), r"[\s\S]" if s.kind == "byte" else GPT2_PATTERN
                if {*ranks.values(), *s.special.values()} != set(range(self.n_vocab)):
                    raise ValueError("tokens without an id, or two with the same id")
                self.tiktoken = Encoding(s.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=s.special)
        else:
            self.n_vocab = max(self.vocab.values(), default=-1) + 1
            self.added = self.backend.get_added_tokens_decoder()
        self.byte_level = self.is_ours or '"ByteLevel"' in s.json
        if not self.n_vocab or not all(0 <= i < self.n_vocab for i in (*s.special.values(), *s.bos)):
            raise UserError(f"tokenizer {s.name} is empty, or has special tokens outside its vocabulary")

    @property
    def spec(self) -> dict[str, Any]:
        return {k: v for k, v in asdict(self.fields).items() if v}

    def __reduce__(self) -> tuple:  # to pickle it for another process
        return Tokenizer, (self.spec,)

    @property
    def eot(self) -> int | None:
        """The id that ends a document."""
        return self.special.get(EOT)

    @functools.cached_property
    def ends(self) -> list[int]:
        """The ids that end a text: the end of a turn, that of a document, and others of the model's own."""
        ids = self.special.get(IM_END), self.eot, *self.fields.ends
        return [*dict.fromkeys(i for i in ids if i is not None)]

    @property
    def control(self) -> dict[str, int]:
        """Control tokens, name -> id: some tokenizers do not mark their chat tokens as special."""
        if self.is_ours:
            return self.special
        return {t.content: i for i, t in self.added.items() if t.special or i in self.special.values()}

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the mapping: two tokenizers with one digest map the same text to the same ids."""
        content = [self.kind, self.fields.ranks, self.fields.json, self.special]
        return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def backend(self) -> Any:
        """The tokenizers.Tokenizer that gives the same ids. It reads special tokens as text, and never cuts or pads."""
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers, processors

        if self.is_ours:  # tiktoken merges any two tokens whose bytes form a token, so all such pairs are listed
            ids = {"".join(map(BYTE_TO_UNICODE.get, t)): i for t, i in self.tiktoken._mergeable_ranks.items()}
            merges = []
            for token in ids:
                pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ids and token[i:] in ids]
                merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
            backend = Backend(models.BPE(vocab=ids, merges=merges))
            backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.kind != "byte")
            backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=False)
            backend.add_special_tokens(sorted(self.special, key=self.special.get))
        else:
            with told_as(f"tokenizer {self.name} has no valid tokenizer.json"):  # the Rust side raises plain Exception
                text = self.fields.json
                if re.search(r"\\u00[4-7]", text):  # escaped letters
                    text = json.dumps(json.loads(text))
                if re.search(r'"continuing_subword_prefix":\s*"[^"]', text) and re.search(r'"type":\s*"BPE"', text):
                    raise ValueError("a BPE with a continuing_subword_prefix")  # can abort the process
                if '"Replace"' in text and growth(json.loads(text)) > 1e6:
                    raise ValueError("its replacements can make a text a million times longer")
                backend = Backend.from_str(self.fields.json)
        backend.encode_special_tokens = True
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        return self.backend.get_vocab()

    def encode(self, text: str) -> list[int]:
        return self.encode_array(text).tolist()

    def encode_array(self, text: str, dtype: Any = np.int64, continues: bool = False) -> np.ndarray:
        """Token ids of a text. If it continues another, it is encoded as if after a word or a line, without what the
        tokenizer may put before a text. Other threads run while tiktoken and tokenizers are at work."""
        text = valid(text)
        if self.kind == "byte":
            return np.frombuffer(text.encode(), np.uint8).astype(dtype)
        if self.is_ours:
            with suppress(ValueError):  # its regex fails on a million white spaces in a row
                return self.tiktoken.encode_to_numpy(text, disallowed_special=()).astype(dtype)
        encode = functools.partial(self.backend.encode, add_special_tokens=False)
        with told_as(f"tokenizer {self.name} cannot encode {text[:40]!r}"):  # if it has no unknown token
            if continues:
                before = "a" if text[:1].isspace() else "\n"
                known, ids = encode(before).ids, encode(before + text).ids
                if ids[: len(known)] == known:
                    return np.array(ids[len(known) :], dtype)
            return np.array(encode(text).ids, dtype)

    def prompt(self, text: str, context: int) -> list[int]:
        """The ids that a model continues, never empty. With our own tokenizers a single token begins a line, if it
        fits: training cuts text anywhere, so alone it is ambiguous ("def" may end another word)."""
        ids = self.bos + self.encode(text)
        if self.is_ours and len(self.encode(text.strip())) < 2 and len(begun := self.encode(f"\n{text}")) <= context:
            ids = begun
        return ids or ([self.eot] if self.eot is not None else self.encode("\n") or [0])

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of a rendered chat template, with special tokens recognised."""
        if self.is_ours:
            with suppress(ValueError):  # as in encode_array
                return self.tiktoken.encode(valid(text), allowed_special="all")
        self.backend.encode_special_tokens = False
        ids = self.backend.encode(valid(text), add_special_tokens=False).ids
        self.backend.encode_special_tokens = True
        return ids

    def without_special(self, text: str) -> str:
        """Text without the names of special tokens, for a user's turns in a chat template."""
        names = "|".join(map(re.escape, self.control))
        while (clean := re.sub(names, "", text)) != text:  # removing one may form another
            text = clean
        return text

    def decode(self, ids: list[int]) -> str:
        """Bytes that are not UTF-8 become U+FFFD; ids that are only padding are left out."""
        ids = [i for i in ids if i < self.n_vocab]
        if self.is_ours:
            return self.tiktoken.decode_bytes(ids).decode("utf-8", "replace")
        return self.backend.decode(ids, skip_special_tokens=False)

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token; none if it is only padding."""
        if token >= self.n_vocab:
            return b""
        if self.is_ours:
            return self.tiktoken.decode_single_token_bytes(token)
        added = self.added.get(token)
        text = added.content if added else self.backend.id_to_token(token) or ""
        if added and self.byte_level:
            return text.encode()
        if self.byte_level:
            return bytes(UNICODE_TO_BYTE[c] for c in text) if UNICODE_TO_BYTE.keys() >= set(text) else b""
        if re.fullmatch("<0x[0-9A-F]{2}>", text):  # SentencePiece's byte fallback
            return bytes([int(text[3:5], 16)])
        if (decoder := self.backend.decoder) is None:  # a text is its tokens joined by spaces
            return f" {text}".encode()
        if type(decoder).__name__ == "BPEDecoder":  # a space after what ends a word
            return decoder.decode([text, "a"])[:-1].encode()
        return decoder.decode(["a", text])[1:].encode()  # a space before what begins a word

    def token_bytes(self) -> np.ndarray:
        """(n_vocab,) bytes of text that each token stands for; 0 for the special ones. For bits per byte."""
        special = set(self.control.values())
        return np.array([0 if i in special else len(self.bytes_of(i)) for i in range(self.n_vocab)], np.int32)

    @functools.cached_property
    def begins_with_space(self) -> Tensor:
        """(n_vocab,), true for the tokens whose text begins with a space."""
        return torch.tensor([self.bytes_of(i).startswith(b" ") for i in range(self.n_vocab)])

    def describe(self) -> str:
        return f"{self.name} ({self.n_vocab:,} tokens)"


def valid(text: str) -> str:
    """Text without lone surrogates, which Python makes of invalid bytes in an argument."""
    return text.encode("utf-8", "replace").decode()


def growth(node: Any) -> float:
    """An upper bound on how many times longer a tokenizer.json's replacements make a text."""
    if not isinstance(node, (dict, list)):
        return 1.0
    own = 1 + len(node["content"]) if isinstance(node, dict) and node.get("type") == "Replace" else 1
    inner = (v for k, v in node.items() if k not in ("vocab", "merges")) if isinstance(node, dict) else node
    return min(own * math.prod(map(growth, inner)), 1e12)


def same_tokenizer(a: Tokenizer, a_is: Any, b: Tokenizer, b_is: Any, remedy: str) -> None:
    """Raise UserError, which names both, unless two tokenizers map the same text to the same ids."""
    if a.digest != b.digest:
        other = b.describe() if a.describe() != b.describe() else "another of that name"
        raise UserError(f"{a_is} has tokenizer {a.describe()} but {b_is} has {other}: {remedy}")


def from_ranks(kind: str, tokens: list[bytes], name: str = "") -> Tokenizer:
    """One of our own tokenizers, from its ordinary tokens in id order."""
    special = {t: len(tokens) + i for i, t in enumerate((EOT, IM_START, IM_END))}
    ranks = "" if kind == "byte" else "\n".join(base64.b64encode(t).decode() for t in tokens)
    return Tokenizer({"kind": kind, "name": name or kind, "ranks": ranks, "special": special})


def gpt2_tokenizer() -> Tokenizer:
    import tiktoken

    with told_as("cannot fetch GPT-2's vocabulary (go online once, or use --tokenizer bpe or --tokenizer byte)"):
        ranks = tiktoken.get_encoding("r50k_base")._mergeable_ranks
    return from_ranks("gpt2", sorted(ranks, key=ranks.get))


def byte_tokenizer() -> Tokenizer:
    return from_ranks("byte", [bytes([b]) for b in range(256)])


def bounded_words(texts: Iterable[str], longest: int = 4096) -> Iterator[str]:
    """Texts, cut if they hold words of megabytes, from which learning a vocabulary would take hours."""
    for text in texts:
        whole = max(map(len, text.split()), default=0) <= longest
        yield from [text] if whole else (text[i : i + longest] for i in range(0, len(text), longest))


def train_bpe(texts: Iterable[str], vocab_size: int | None) -> Tokenizer:
    """A byte-level BPE of vocab_size tokens, special ones included, learned from texts with GPT-2's split pattern."""
    import tokenizers

    vocab_size = vocab_size or 8192
    if vocab_size < 259:
        raise UserError(f"vocab_size is {vocab_size}: a bpe needs 256 bytes and 3 special tokens, so at least 259")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    options = dict(initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size - 3, **options)
    with ExitStack() as afterwards:
        in_main = threading.current_thread() is threading.main_thread()  # others cannot set a handler
        if in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # else Ctrl-C would wait until all is learned
            afterwards.callback(signal.signal, signal.SIGINT, signal.default_int_handler)
        bpe.train_from_iterator(bounded_words(texts), trainer)
    vocab = bpe.get_vocab()
    tokens = [bytes(UNICODE_TO_BYTE[c] for c in token) for token in sorted(vocab, key=vocab.get)]
    return from_ranks("bpe", tokens, f"bpe-{len(tokens) + 3}")


def hf_tokenizer(path: Path, name: str = "") -> Tokenizer:
    """The tokenizer of a Hugging Face directory, or of a tokenizer.json and the files beside it."""
    file = path / "tokenizer.json" if path.is_dir() else path
    name = name or Path(os.path.abspath(file)).parent.name  # links are not followed: the Hub's cache has blobs/
    text, jinja = read_file(file), file.with_name("chat_template.jinja")
    stems = ("tokenizer_config", "special_tokens_map", "generation_config", "config")
    config, older, *others = (read_json(file.with_name(f"{stem}.json"), {}) for stem in stems)
    with told_as(f"{file} and the files beside it are not a Hugging Face tokenizer", Exception, UserError):
        if not config.get("added_tokens_decoder"):  # before transformers 4.34, another file defined the special tokens
            config |= {k: v for k, v in older.items() if v}
        if jinja.is_file():
            config["chat_template"] = read_file(jinja)
        elif isinstance(several := config.get("chat_template"), list):
            config["chat_template"] = next((t for t in several if t["name"] == "default"), several[0])["template"]
        known = {k: config.get(k) for k in ("bos_token", "eos_token", "pad_token", "unk_token", "chat_template")}
        spec = {k: v["content"] if isinstance(v, dict) else v for k, v in known.items()}
        made = Tokenizer({**spec, "kind": "hf", "name": name, "json": text})
        eos, special = made.fields.eos_token or EOT, made.special
        special.update({t: made.vocab[t] for t in (EOT, IM_START, IM_END) if t in made.vocab})
        if eos in made.vocab and (EOT not in special or eos != IM_END):
            special[EOT] = made.vocab[eos]
        # Llama 3's eos_token is not its end of turn
        ends = next((c["eos_token_id"] for c in others if c.get("eos_token_id") is not None), [])
        ends = ends if isinstance(ends, list) else [ends]
        made.fields.ends = [i for i in made.added if i in ends and i not in special.values()]
    plain, whole = made.encode("a"), made.backend.encode("a").ids  # what its post-processor puts before a text
    made.bos += next((whole[:i] for i in range(len(whole)) if whole[i : i + len(plain)] == plain), [])
    return made


def load_tokenizer(name: str | Tokenizer) -> Tokenizer:
    """A tokenizer, or the one that --tokenizer names, except `bpe`, which must be trained."""
    if isinstance(name, Tokenizer):
        return name
    if name in ("gpt2", "byte"):
        return gpt2_tokenizer() if name == "gpt2" else byte_tokenizer()
    for path in (Path(name), CHECKPOINT_DIR / name, CHECKPOINT_DIR / f"{name}_model.pt", DATA_DIR / name):
        if path.is_file() or (path / "tokenizer.json").is_file():
            return Tokenizer(load_checkpoint(path).tokenizer) if path.suffix == ".pt" else hf_tokenizer(path)
        if (path / "meta.json").is_file():
            return Data(path).tokenizer
    if name == "bpe":
        raise UserError("a bpe is learned from text, but this data is tokenized already: name its tokenizer")
    raise UserError(f"unknown tokenizer {name!r}: gpt2, bpe, byte, a checkpoint, data, or a folder with tokenizer.json")


# ----------------------------------------------------------------------------------------------------------------------
# Data: text sources, tokenization, data folders, batches
# ----------------------------------------------------------------------------------------------------------------------

PIECE_CHARS = 1 << 20  # text goes to the tokenizer in pieces of about this length


def read_file(path: Path) -> str:
    with told_as(f"{path} cannot be read as text", UnicodeDecodeError):
        return path.read_text(encoding="utf-8")


def read_json(path: Path, default: Any = None) -> Any:
    """The content of a JSON file, or the default, if one is given, where there is no such file."""
    if default is not None and not path.exists():
        return default
    with told_as(f"{path} is not valid JSON", ValueError, RecursionError):
        return json.loads(read_file(path))


def read_schema(cls: type, path: Path, default: Any = None) -> Any:
    """A dataclass from those fields of a JSON file that it declares; others are ignored."""
    content = read_json(path, default)
    if isinstance(content, dict):
        content = {f.name: content[f.name] for f in fields(cls) if f.name in content}
    return from_dict(cls, content, path)


@contextmanager
def atomic_write(path: Path) -> Iterator[io.BufferedWriter]:
    """Write a file atomically: it appears under its name only once it is complete and on the disk. The next write
    replaces what a killed one left."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        replace_file(temporary, path)
    except OSError as e:
        raise naming(path, e) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    with atomic_write(path) as f:
        f.write((json.dumps(content, indent=2) + "\n").encode())


def replace_file(source: Path, target: Path) -> None:
    """os.replace, on the disk too, and retried for five seconds on Windows, where a virus scanner may have the file."""
    for _ in range(50 if os.name == "nt" else 0):
        with suppress(PermissionError):
            return os.replace(source, target)
        time.sleep(0.1)
    os.replace(source, target)
    with suppress(OSError):  # where a folder cannot be opened, as on Windows
        fd = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def naming(path: Path, e: OSError) -> OSError:
    """The error with the file's name, which that of a full disk lacks."""
    return e if e.filename or not e.errno else OSError(e.errno, e.strerror, str(path))


def beside(target: Path, what: str) -> Path:
    """A hidden path beside a file or folder, for what belongs to it; works for any form of its path, even "."."""
    whole = target.resolve()
    return whole.parent / f".{whole.name}.{what}"


@contextmanager
def locked(target: Path, wait: bool = False, lock: str = "lock") -> Iterator[None]:
    """Be the only program that writes `target`, by a lock that a crash releases. Raises UserError, naming the holder,
    if another program has it. On a file system without locks every program succeeds."""
    from filelock import FileLock, Timeout

    path = beside(target, lock)
    mine = FileLock(path, fallback_to_soft=False)
    try:
        mine.acquire(timeout=0.1)
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody else read a locked file
            holder = path.read_text()
        busy = f"{target} is being written by {holder or 'another program'}"
        if not wait:
            raise UserError(f"{busy}: wait for it, or choose another name") from None
        say(f"{busy}: waiting for it")
        mine.acquire()
    except OSError as e:
        if e.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP):  # Macs tell the last two apart
            raise
    try:
        with suppress(OSError):
            path.write_text(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M')}")
        yield
    finally:
        with suppress(OSError):  # Windows keeps an open file; filelock removes it there
            path.unlink()
        mine.release()


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, which is locked. What a killed program left there is removed."""
    scratch = beside(target, "scratch")
    with locked(target):
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def file_digest(path: Path) -> str:
    """BLAKE2b of a file, 16 bytes in hexadecimal."""
    digest, what = hashlib.blake2b(digest_size=16), dict(total=path.stat().st_size, desc=f"check {path.name}", delay=2)
    with open(path, "rb") as f, progress_bar(unit="B", unit_scale=True, **what) as bar:
        while block := f.read(1 << 24):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


MAX_DOWNLOAD = 100e9  # bytes


def download(url: str, path: Path, retries: int = 2, timeout: float = 30.0) -> None:
    """Fetch an http or https URL into a file. Raises UserError if the download fails, is incomplete, is larger than
    MAX_DOWNLOAD or the free disk space, or is slower than 1 kB/s."""
    import requests  # a dependency of tiktoken and datasets
    import urllib3

    get = functools.partial(requests.get, stream=True, timeout=timeout, headers={"Accept-Encoding": "identity"})
    try:
        with get(url) as response, open(path, "wb") as f:
            response.raise_for_status()
            length = int(response.headers.get("Content-Length") or 0)
            limit, begun = min(MAX_DOWNLOAD, shutil.disk_usage(path.parent).free), time.monotonic()
            read = getattr(response.raw, "read1", response.raw.read)  # urllib3 before 2.1 has no read1
            with progress_bar(total=length or None, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1]) as bar:
                while max(length, f.tell()) <= limit and (block := read(1 << 20)):
                    bar.update(f.write(block))
                    if (seconds := time.monotonic() - begun) > 2 * timeout and f.tell() < 1000 * seconds:
                        raise ValueError(f"the server sends less than 1 kB/s: gave up after {seconds:.0f} s")
            if max(length, f.tell()) > limit:
                raise ValueError(f"it is larger than {limit / 1e9:,.1f} GB, the limit or the free disk space")
            if f.tell() < length:
                raise urllib3.exceptions.ProtocolError(f"got only {f.tell()} of {length} bytes")
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as e:
        status = getattr(getattr(e, "response", None), "status_code", 500)
        if isinstance(e, ValueError) or status < 500 and status != 429 or not retries:  # 429: too many requests
            reason = str(getattr(e.args[0], "reason", e.args[0])).partition(" for url")[0]
            raise UserError(f"cannot download {url}: {reason}") from None
        time.sleep(2)
        download(url, path, retries=retries - 1, timeout=timeout)


def text_files(sources: list[str], scratch: Path, encoding: str) -> list[tuple[Path, str]]:
    """The files that --txt names, and what to call them: files, folders (every text file below, but no records), URLs,
    pipes, and - for standard input (all three fetched into scratch first)."""
    files: list[tuple[Path, str]] = []
    for i, source in enumerate(sources):
        path, fetched = Path(source), scratch / f"{i}.txt"
        if path.is_dir():
            files += [(p, str(p)) for p in folder_files(path, encoding)]
            continue
        if source == "-" or path.is_fifo():
            with open(fetched, "wb") as f:
                shutil.copyfileobj(sys.stdin.buffer if source == "-" else open(path, "rb"), f)
        elif "://" in source:
            if not source.lower().startswith(("http://", "https://")):
                raise UserError(f"{source}: only http and https URLs can be fetched")
            download(source, fetched)
        elif not path.exists():
            raise UserError(f"{source}: no such file, folder or URL")
        files.append((fetched if fetched.exists() else path, "standard input" if source == "-" else source))
    if not (files := [(p, name) for p, name in files if p.stat().st_size]):
        raise UserError(f"{', '.join(sources)}: the source is empty, there is no text in it")
    return files


def folder_files(folder: Path, encoding: str) -> list[Path]:
    """The text files below a folder."""
    visible = (p for p in folder.rglob("*") if not any(q.startswith(".") for q in p.relative_to(folder).parts))
    there = [p for p in visible if p.is_file() and p.stat().st_size]
    found = [p for p in there if p.suffix.lower() not in RECORD_FILES and not looks_binary(p, encoding)]
    if not found:
        raise UserError(f"{folder} is a directory without text files; for records: hf_tokenize --hf_dataset {folder}")
    if skipped := len(there) - len(found):  # where there is text, datasets reads the most common kind alone
        records = any(p.suffix.lower() in RECORD_FILES for p in there)
        hint = "; records need hf_tokenize and a folder of their own" * records
        say(f"{folder}: skipped {skipped:,} of {len(there):,} files, which are not text{hint}", sys.stderr)
    return in_mixed_order(found, folder)


def looks_binary(path: Path, encoding: str) -> bool:
    with open(path, "rb") as f, suppress(LookupError, UnicodeError):  # no encoding: read_text will say so
        return "\0" in f.read(8192).decode(encoding, "ignore")
    return False


def in_mixed_order(files: list[Path], root: Path) -> list[Path]:
    """An order that mixes the subfolders, so that the last tenth is a fair validation split."""
    return sorted(files, key=lambda p: hashlib.md5(p.relative_to(root).as_posix().encode()).digest())


def read_text(path: Path, encoding: str, errors: str, bar: Any = None, name: str = "") -> Iterator[str]:
    """The text of a file in blocks. Raises UserError, naming the file (or what to call it) and the line, for what is
    not in the encoding."""
    try:
        with told_as("--encoding", LookupError), open(path, encoding=encoding, errors=errors, newline="") as f:
            while block := f.read(PIECE_CHARS):
                yield block
                if bar is not None:
                    bar.update(len(block))
    except UnicodeError as e:
        line, decoder = 1, codecs.getincrementaldecoder(encoding)()
        with open(path, "rb") as f, suppress(UnicodeError):
            for data in f:
                line += decoder.decode(data).count("\n")
        what = str(e)  # UTF-16 or UTF-32 without a BOM, before Python 3.13
        if isinstance(e, UnicodeDecodeError):
            what = f"byte 0x{e.object[e.start]:02x} is not {e.encoding}"
        remedy = "tokenize it with its --encoding (perhaps cp1252), or --errors replace"
        if looks_binary(path, "latin-1"):
            remedy = "it is compressed or binary, or needs --encoding utf-16 or utf-16-le"
        raise UserError(f"{name or path}, line {line}: {what}: {remedy}") from None


def split_point(text: str) -> int:
    """Where text can be cut without changing its tokens: before the last white space that follows a letter or digit,
    which ends a piece in GPT-2's split pattern and all others in common use. 0 if there is none near the end."""
    for i in range(len(text) - 1, max(len(text) - PIECE_CHARS // 4, 0), -1):
        if text[i] in " \n\t\r" and text[i - 1].isalnum():
            return i
    return 0


def text_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Regroup a document into pieces of about PIECE_CHARS that can be tokenized one by one."""
    text = ""
    for block in blocks:
        text += block
        cut = split_point(text) if len(text) >= PIECE_CHARS else 0
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

    workers, pending = os.cpu_count() or 1, []
    with ThreadPoolExecutor(workers) as pool:
        for previous, piece in itertools.pairwise(itertools.chain([None], pieces)):
            pending.append(pool.submit(encode, piece, previous is not None))
            if len(pending) > workers:  # bounded: a corpus of any size passes through a few megabytes
                yield pending.pop(0).result()
        for future in pending:
            yield future.result()


def token_dtype(n_vocab: int) -> np.dtype:
    return np.dtype("<u2" if n_vocab <= 65536 else "<u4")


class Meta(Settings):
    """meta.json of a data folder."""

    dtype: str = setting("uint16", "", ("uint16", "uint32"))
    n_tokens: int = setting(0, "", ge=1)
    val_start: int = setting(0, "", ge=0)  # index of the first validation token
    digest: str = ""  # of the ids
    source: Any = None  # where the text is from, and the options it was tokenized with
    tokenizer: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # names in the folder -> digests
    format_version: int = setting(FORMAT_VERSION, "", ge=1)


DATA_FILES = ("data.bin", "mask.bin", "starts.bin")


class DataWriter(AbstractContextManager):
    """Writes a data folder. data.bin: token ids, little-endian uint16 or uint32, no header. For conversations also
    mask.bin (one byte per token: 1 where it is a target) and starts.bin (uint64 index of each conversation's first
    token). All is written beside the folder, under its lock; meta.json comes last, so a folder with one is complete.

    With a key, which identifies what is being written, save_progress marks a point from which a later writer with the
    same key resumes; `state` is what the caller saved with it, None at the start.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer, overwrite: bool, key: str | None = None) -> None:
        self.folder, self.part, self.key = folder, beside(folder, "part"), key
        settle(folder)
        if (folder / "meta.json").exists() and not overwrite:
            raise UserError(f"{folder} already exists: choose another --dataset or add --overwrite")
        self.tokenizer, self.dtype = tokenizer, token_dtype(tokenizer.n_vocab)
        saved = read_json(self.part / "progress.json", {}) if key else {}
        if not key or saved.get("key") != key:
            saved = {}
            shutil.rmtree(self.part, ignore_errors=True)
        self.part.mkdir(parents=True, exist_ok=True)
        self.state, self.n_tokens, self.n_targets = saved.get("counted", (None, 0, 0))
        self.files = {name: open(self.part / name, "ab") for name in DATA_FILES}
        for name, f in self.files.items():
            f.truncate(saved.get(name, 0))
            f.seek(0, os.SEEK_END)  # else tell() is where the file ended before

    def close(self) -> None:
        for f in self.files.values():
            f.close()

    def __exit__(self, kind: type | None, error: Exception | None, *traceback: Any) -> None:
        with suppress(OSError):  # it flushes what could not be written
            self.close()
        # a complete folder is put in place later; one with progress is resumed by a later writer
        if kind is None or not any((self.part / name).exists() for name in ("meta.json", "progress.json")):
            shutil.rmtree(self.part, ignore_errors=True)
        if isinstance(error, OSError):
            raise naming(self.part, error) from None

    def write(self, ids: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append ids; with a mask, they form a conversation."""
        self.files["data.bin"].write(ids.astype(self.dtype, copy=False).tobytes())
        if mask is not None:
            self.files["starts.bin"].write(np.uint64(self.n_tokens).tobytes())
            self.files["mask.bin"].write(mask.astype(np.uint8).tobytes())
        self.n_tokens += len(ids)
        self.n_targets += len(ids) if mask is None else int(mask.sum())

    def flush(self) -> None:
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())

    def save_progress(self, state: Any) -> None:
        """Mark the end of all that was written so far as the point where a later writer resumes."""
        self.flush()
        sizes = {name: f.tell() for name, f in self.files.items()}
        counted = state, self.n_tokens, self.n_targets
        write_json(self.part / "progress.json", {"key": self.key, "counted": counted, **sizes})

    def finish(self, val_fraction: float, source: Any, n_bytes: int = 0) -> Meta:
        """Move the files into the folder, report what was made from n_bytes, and return what meta.json holds."""
        if not self.n_targets:
            name = source["hf_dataset"] if isinstance(source, dict) else self.folder
            raise UserError(f"{name}: empty, or no token is a target: conversations need assistant turns")
        self.flush()
        val_start = self.n_tokens - min(int(self.n_tokens * val_fraction), 10_000_000)
        starts = np.fromfile(self.part / "starts.bin", "<u8")
        if len(starts) and val_fraction:  # validation begins at a conversation
            val_start = int(starts[min(np.searchsorted(starts, val_start), len(starts) - 1)])
        digests = {name: file_digest(self.part / name) for name, f in self.files.items() if f.tell()}
        self.close()
        spec = self.tokenizer.spec
        meta = Meta(self.dtype.name, self.n_tokens, val_start, digests["data.bin"], source, spec, digests)
        write_json(self.part / "meta.json", asdict(meta))
        settle(self.folder)
        per_token = f", {n_bytes / self.n_tokens:.2f} bytes per token" if n_bytes else ""
        say(f"{self.folder}: {self.n_tokens:,} tokens{per_token}, tokenizer {self.tokenizer.name}; validation begins "
            f"at token {val_start:,} ({self.n_tokens - val_start:,} tokens)")  # fmt: skip
        return meta


def settle(folder: Path) -> None:
    """Move what was written for a data folder into place, if it is complete, even if a killed program left it."""
    part = beside(folder, "part")
    if not (part / "meta.json").exists():
        return
    wanted = set(DATA_FILES) & read_schema(Meta, part / "meta.json").files.keys()
    folder.mkdir(exist_ok=True)
    for name in ("meta.json", *set(DATA_FILES) - wanted):  # until the new meta.json is there it is incomplete
        (folder / name).unlink(missing_ok=True)
    for name in (*wanted, "meta.json"):
        if (part / name).exists():
            replace_file(part / name, folder / name)
    shutil.rmtree(part, ignore_errors=True)


def tokenize_text(
    folder: Path, sources: list[str], tokenizer: str | Tokenizer = "gpt2", vocab_size: int | None = None,
    encoding: str = "utf-8-sig", errors: str = "strict", val_fraction: float = 0.1, overwrite: bool = False,
    source: Any = None,
) -> Meta:  # fmt: skip
    """Make a data folder from text sources (see text_files). Memory does not grow with the text.
    `source` is what meta.json records as the text's origin, if not the list of sources."""
    with scratch_folder(folder) as scratch:
        files = text_files(sources, scratch, encoding)
        total = sum(p.stat().st_size for p, _ in files)

        def pieces(desc: str) -> Iterator[str | None]:
            with progress_bar(total=total, unit="B", unit_scale=True, desc=desc) as bar:
                for i, (path, name) in enumerate(files):
                    if i:
                        yield None  # between two documents
                    yield from text_pieces(read_text(path, encoding, errors, bar, name))

        sample = evenly(filter(None, pieces("learn vocabulary")), total)
        tokenizer = train_bpe(sample, vocab_size) if tokenizer == "bpe" else load_tokenizer(tokenizer)
        with DataWriter(folder, tokenizer, overwrite) as writer:
            for ids in encode_pieces(tokenizer, pieces("tokenize"), writer.dtype):
                writer.write(ids)
            return writer.finish(val_fraction, source or [*map(describe_source, sources)], total)


def evenly(pieces: Iterable[str], total: int, limit: int = 100_000_000) -> Iterator[str]:
    """The text that a vocabulary is learned from: all of it, or evenly spread pieces of about `limit` bytes in all."""
    keep = min(1.0, limit / max(total, 1))
    return (piece for i, piece in enumerate(pieces) if int((i + 1) * keep) > int(i * keep))


def describe_source(source: str) -> dict[str, Any]:
    """Where data came from; size and time tell whether a file is still the one that was read."""
    if not (path := Path(source)).is_file():
        return {"path": source}
    stat = path.stat()
    return {"path": str(path.resolve()), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def map_tokens(path: Path, dtype: str, n: int | None = None) -> np.ndarray:
    """A file of numbers, n of them if known, as a memory map."""
    kind, size = np.dtype(dtype).newbyteorder("<"), path.stat().st_size if path.is_file() else -1
    if size < 0:
        raise UserError(f"{path}: no such file")
    if not size or size % kind.itemsize or n not in (None, size // kind.itemsize):
        wanted = f"{'whole' if n is None else f'{n:,}'} {dtype} numbers"
        raise UserError(f"{path} has {size:,} bytes, not {wanted}: empty, truncated or replaced; make it again")
    return np.memmap(path, kind, "r")


def digest_of(*values: Any) -> str:
    return hashlib.blake2b(repr([*values]).encode(), digest_size=16).hexdigest()


@dataclass
class Split:
    """A part of a data set: token ids in a memory map; for conversations also the index of each one's first token
    (starts), and one byte per token, 1 where it is a target (mask)."""

    name: str
    tokenizer: Tokenizer
    tokens: np.ndarray
    starts: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.tokens)
        self.bounds = None if self.starts is None else np.append(self.starts, n)  # of the conversations
        for i in range(0, n, max(4096, n // 1000)):  # a sample, 8 MB of 17 GB; batches check their own
            self.check(self.tokens[i : i + 4096])

    def check(self, ids: np.ndarray) -> None:
        """Raise UserError if the tokenizer lacks one of these ids, which would crash a GPU without an explanation."""
        if (largest := int(ids.max(initial=0))) >= self.tokenizer.n_vocab:
            what = f"the {self.name} has token id {largest}, but tokenizer {self.tokenizer.describe()} ends at"
            raise UserError(f"{what} {self.tokenizer.n_vocab - 1}: name another tokenizer with --tokenizer")

    def windows(self, block_size: int) -> np.ndarray | range:
        """The first token of every block. Text is cut into consecutive blocks. Conversations are packed whole: a window
        ends before the first conversation that does not fit, and one longer than a block is cut."""
        n, windows = len(self.tokens), range(0, len(self.tokens) - block_size, block_size)
        if self.starts is not None:
            windows, bounds, i = [], self.bounds.tolist(), 0
            while i < len(self.starts):
                windows.append(bounds[i])
                i = max(i + 1, bisect.bisect_right(bounds, bounds[i] + block_size + 1) - 1)
            windows = np.array(windows, np.int64)
        if not len(windows):
            state = f"has {n:,} tokens, fewer than a block of {block_size} and its target" if n else "is empty"
            more = "text" if self.starts is None else "conversations"
            remedy = f"tokenize again, with more {more} or another --val_fraction"
            remedy += ", or use a smaller --block_size" * (n > 0)
            raise UserError(f"the {self.name} {state}: {remedy}")
        return windows

    def longer_than(self, block_size: int) -> int:
        """How many conversations do not fit into a block, of which the rest is cut off."""
        return int((np.diff(self.bounds) > block_size + 1).sum())

    def batch(self, windows: np.ndarray | range, blocks: Iterable[int], block_size: int) -> dict[str, Tensor]:
        """Windows as tensors (B, block_size) int64: idx, targets (-1: not a target); for conversations the lengths of
        the documents in them (n,). blocks (B,) are the numbers of the windows."""
        T, blocks = block_size, np.asarray(blocks)
        begins = [int(windows[i]) for i in blocks]
        if self.starts is None:
            ids = np.stack([self.tokens[s : s + T + 1] for s in begins]).astype(np.int64)
            arrays = {"idx": ids[:, :-1], "targets": ids[:, 1:]}
        else:
            ids, own = np.zeros((2, len(begins), T + 1), np.int64)  # own: the conversation that a token belongs to
            wanted = np.zeros((len(begins), T + 1), bool)
            for i, s in enumerate(begins):
                whole = int(self.bounds[np.searchsorted(self.bounds, s + T + 1, side="right") - 1])
                end = whole if whole > s else s + T + 1  # of the conversations that fit, or of a part of the first
                ids[i, : end - s], wanted[i, : end - s] = self.tokens[s:end], self.mask[s:end] == 1
                own[i] = np.searchsorted(self.bounds, s + np.arange(T + 1), side="right")
            first = np.diff(own, prepend=-1) != 0
            wanted &= ~first  # nothing precedes a conversation's first token
            lengths = np.diff(np.flatnonzero(first[:, :-1]), append=len(begins) * T)
            arrays = {"idx": ids[:, :-1], "targets": np.where(wanted, ids, -1)[:, 1:], "documents": lengths}
        self.check(ids)
        return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in {**arrays, "blocks": blocks}.items()}


class Data:
    """A data folder, whose digests are checked, or a nanoGPT .bin file: splits["train"] and splits["val"], both memory
    maps. digest identifies all of it, ids_digest only the ids, as the first checkpoints stored it."""

    source: Any = None  # of a data folder, from its meta.json
    parts: tuple = ()  # of a Mixture

    def __init__(self, path: Path, tokenizer: str | Tokenizer = "gpt2") -> None:
        self.path, self.folder = path, path if path.is_dir() else path.parent
        if path.is_dir() and beside(path, "part").exists():  # it may be complete, or still being written
            with suppress(UserError, OSError), locked(path):
                settle(path)
        if (self.folder / "meta.json").exists() and (path.is_dir() or path.name == "data.bin"):
            train, val = self.read_folder()
        else:
            train, val = self.read_nanogpt(path / "train.bin" if path.is_dir() else path, tokenizer)
        self.splits = {
            "train": Split(f"training split of {path}", self.tokenizer, *train),
            "val": Split(f"validation split of {path}", self.tokenizer, *val),
        }
        self.is_chat = self.splits["train"].starts is not None  # whether it holds conversations

    def read_folder(self) -> list[tuple[np.ndarray, ...]]:
        """The tokens of each split; for conversations also their starts and mask."""
        where = self.folder / "meta.json"
        meta = from_dict(Meta, read_json(where), where)
        with told_as(str(where), UserError):
            self.tokenizer = Tokenizer(meta.tokenizer)
        self.ids_digest, self.source = meta.digest, meta.source
        self.digest = digest_of(meta.digest, sorted(meta.files.items()), meta.val_start)
        tokens = map_tokens(self.folder / "data.bin", meta.dtype, meta.n_tokens)
        for name in DATA_FILES if PREPARES else ():
            known = {"data.bin": meta.digest, **meta.files}.get(name)
            if known and file_digest(self.folder / name) != known:
                raise UserError(f"{self.folder / name} is damaged: its digest differs; run tokenize again")
        bounds = (0, meta.val_start), (meta.val_start, meta.n_tokens)
        if not (self.folder / "starts.bin").exists():
            return [(tokens[a:b],) for a, b in bounds]
        starts = map_tokens(self.folder / "starts.bin", "uint64").astype(np.int64)
        mask = map_tokens(self.folder / "mask.bin", "uint8", meta.n_tokens)
        return [(tokens[a:b], starts[(starts >= a) & (starts < b)] - a, mask[a:b]) for a, b in bounds]

    def read_nanogpt(self, file: Path, tokenizer: str | Tokenizer) -> list[tuple[np.ndarray]]:
        """train.bin and the val.bin beside it, or another file with its last tenth held out: uint16, GPT-2's ids by
        default."""
        if not file.exists():
            raise UserError(f"{self.path} has neither meta.json nor train.bin: make it with tokenize or hf_tokenize")
        tokens, val = map_tokens(file, "uint16"), file.with_name("val.bin")
        self.tokenizer = load_tokenizer(tokenizer)
        parts = np.split(tokens, [len(tokens) - min(len(tokens) // 10, 10_000_000)])
        if file.name == "train.bin" and val.exists():
            parts = [tokens, map_tokens(val, "uint16")]
        first = [np.ascontiguousarray(x[:1_000_000]) for x in (tokens, *parts)]  # these files may be large
        self.ids_digest, *begins = (hashlib.blake2b(x, digest_size=16).hexdigest() for x in first)
        self.digest = digest_of(begins, [len(part) for part in parts])
        return [(part,) for part in parts]


class MixedSplit:
    """A split of several data sets, each with its share of the blocks; shares sum to 1. An epoch sees every block, and
    repeats those of a data set that is too small for its share; the order is BlockSampler's."""

    def __init__(self, splits: list[Split], shares: list[float]) -> None:
        self.splits, self.shares, self.name = splits, shares, " and the ".join(s.name for s in splits)
        self.begins = np.cumsum([0, *(len(s.tokens) for s in splits)])  # of the splits, laid end to end
        self.tokens, self.starts = range(self.begins[-1]), None

    def windows(self, block_size: int) -> np.ndarray:
        parts = [np.asarray(split.windows(block_size)) for split in self.splits]
        n_blocks = max(len(part) / share for part, share in zip(parts, self.shares, strict=True))
        shared = zip(parts, self.shares, self.begins[:-1], strict=True)
        return np.concatenate([begin + np.resize(part, round(share * n_blocks)) for part, share, begin in shared])

    def batch(self, windows: np.ndarray, blocks: Iterable[int], block_size: int) -> dict[str, Tensor]:
        """Like Split.batch. Beside conversations, a block of text counts as one document."""
        rows, chat = [], any(split.starts is not None for split in self.splits)
        for begin in windows[blocks := np.asarray(blocks)]:
            i = int(np.searchsorted(self.begins, begin, side="right")) - 1
            rows.append(self.splits[i].batch([begin - self.begins[i]], [0], block_size))
            if chat:
                rows[-1].setdefault("documents", torch.tensor([block_size]))
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0]} | {"blocks": torch.from_numpy(blocks)}


class Mixture(Data):
    """Several data sets with one tokenizer, as one; `parts` is how --data names them."""

    def __init__(self, data: list[Data], weights: list[float]) -> None:
        for other in data[1:]:
            remedy = f"a mixture needs the same one; tokenize with --tokenizer {data[0].path}"
            same_tokenizer(data[0].tokenizer, data[0].path, other.tokenizer, other.path, remedy)
        self.tokenizer, self.folder, self.is_chat = data[0].tokenizer, data[0].folder, any(d.is_chat for d in data)
        self.parts = [f"{d.path}:{w}" for d, w in zip(data, weights, strict=True)]
        self.path = Path("+".join(Path(part).name for part in self.parts))
        self.digest = self.ids_digest = digest_of(weights, [d.digest for d in data])
        shares = [w / sum(weights) for w in weights]
        self.splits = {name: MixedSplit([d.splits[name] for d in data], shares) for name in ("train", "val")}


class BlockSampler:
    """Which blocks a step reads: a pure function of (seed, step, batch size), so a resumed run is the same run. Every
    epoch is a permutation, itself a pure function of (seed, epoch); epochs follow one another without a gap."""

    def __init__(self, n_blocks: int, batch_size: int, seed: int) -> None:
        self.n_blocks, self.batch_size, self.seed = n_blocks, batch_size, seed
        rng, kind = np.random.default_rng, np.min_scalar_type(n_blocks)  # four bytes a block, or fewer
        self.table = functools.lru_cache(1)(lambda epoch: rng((seed, epoch)).permutation(n_blocks).astype(kind))

    def order(self, epoch: int, places: np.ndarray) -> np.ndarray:
        """The blocks at these places of an epoch, without a table if that would take more than 64 MiB."""
        if self.n_blocks <= 1 << 24:
            return self.table(epoch)[places].astype(np.int64)
        return permuted(places, self.n_blocks, (self.seed, epoch))

    def __call__(self, step: int) -> np.ndarray:
        """Numbers (batch_size,) of the blocks of a step."""
        epochs, places = np.divmod(step * self.batch_size + np.arange(self.batch_size), self.n_blocks)
        return np.concatenate([self.order(epoch, places[epochs == epoch]) for epoch in np.unique(epochs).tolist()])


def permuted(places: np.ndarray, n: int, key: tuple[int, int]) -> np.ndarray:
    """Where a random permutation of 0 ... n - 1, one for each key, takes these places; it is never stored. A Feistel
    network of six rounds permutes the numbers with that many bits; a result of n or more goes through it again until it
    is below n (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002, section 4)."""
    half = np.uint64((max(n - 1, 1).bit_length() + 1) // 2)
    mask, round_keys = (np.uint64(1) << half) - np.uint64(1), np.random.SeedSequence(key).generate_state(6, np.uint64)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for round_key in round_keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)  # as splitmix64 mixes
            mixed = (mixed ^ mixed >> np.uint64(32)) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ (mixed >> np.uint64(32) & mask)
        return left << half | right

    x = network(places.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = network(x[outside])
    return x.astype(np.int64)


STDLIB_DATA = "python_stdlib"


def existing_data(folder: Path) -> Data | None:
    return Data(folder) if (folder / "meta.json").exists() else None


def found_or_made(folder: Path, find: Callable[[Path], Data | None], make: Callable[[Path], Any]) -> Data:
    """Existing data, or data made in a folder by one program while others, on other machines too, wait for it."""
    if found := find(folder):
        return found
    with locked(folder, wait=True, lock="opening"):
        if not (found := find(folder)):
            make(folder)
        return found or Data(folder)


def tokenize_python_stdlib(folder: Path) -> None:
    """The data set of the quickstart: the source of Python's standard library, which every machine has."""
    import sysconfig

    root = Path(sysconfig.get_paths()["stdlib"])
    say(f"no --data given: making {folder} from the source of Python's standard library in {root}")
    left_out = {"site-packages", "dist-packages", "encodings", "pydoc_data"}  # other people's; tables, not programs
    files = [p for p in root.rglob("*.py") if not left_out & set(p.parts) and p.stat().st_size]
    in_utf8 = [p for p in files if (text := p.read_bytes()).decode(errors="ignore").encode() == text]
    if not (files := in_mixed_order(in_utf8, root)):
        raise UserError(f"there are no Python sources in {root}: name a text with --data FILE")
    # a model with a small vocabulary learns more in minutes: its head takes less of a step (tests/benchmarks/README.md)
    tokenize_text(folder, [str(p) for p in files], tokenizer="bpe", vocab_size=2048, source=str(root))


def open_data(spec: str | None, tokenizer: str | Tokenizer = "gpt2", vocab_size: int | None = None) -> Data:
    """Open what --data names: a name under data/, a folder, a .bin file, or a file of text or records, which is
    tokenized first. Without a name: the newest data set under data/, or Python's standard library."""
    made = sorted(DATA_DIR.glob("[!.]*/meta.json"), key=lambda p: p.stat().st_mtime)  # none that is being written
    if spec is None and made:
        say(f"no --data given: using {made[-1].parent}", file=sys.stderr)
        return Data(made[-1].parent)
    if spec is None:
        return found_or_made(DATA_DIR / STDLIB_DATA, existing_data, tokenize_python_stdlib)
    spec = re.sub(r"^_data_(\w+)_(?=/|$)", rf"{DATA_DIR}/\1", spec)  # as the published commands write it
    places = [Path(spec), DATA_DIR / spec]
    if all(path.is_dir() for path in places):  # a folder of text may have the name of the data made from it
        places.sort(key=lambda path: not any((path / name).exists() for name in ("meta.json", "train.bin")))
    for path in places:
        if path.is_dir() or path.suffix == ".bin" and path.is_file():
            return Data(path, tokenizer)
        if path.is_file():
            return data_of_file(path, tokenizer, vocab_size)
    there = f"there is: {', '.join(p.parent.name for p in made)}" if made else "make it with tokenize"
    raise UserError(f"no data at {spec} or {DATA_DIR / spec}; {there}")


def open_all(specs: list[str], tokenizer: str | Tokenizer = "gpt2", vocab_size: int | None = None) -> Data:
    """Open one data set or the default, as open_data does, or a mixture of several, each NAME or NAME:WEIGHT."""
    if len(specs) < 2:
        return open_data(specs[0] if specs else None, tokenizer, vocab_size)
    data, weights = [], []
    for spec in specs:
        name, weight = re.fullmatch(r"(.*?)(?::(\d+|\d*\.\d+))?", spec, re.DOTALL).groups()
        if weight and not 1e-4 <= float(weight) <= 1e4:  # the order of all blocks is in memory
            raise UserError(f"--data {spec}: a weight must lie between 0.0001 and 10000")
        data.append(open_data(name, data[0].tokenizer if data else tokenizer, vocab_size))
        weights.append(float(weight or 1))
    return Mixture(data, weights)


def data_of_file(path: Path, tokenizer: str | Tokenizer, vocab_size: int | None) -> Data:
    """The data folder for one file of text or records, made if it does not exist yet."""
    name = path.stem if isinstance(tokenizer, str) else f"{path.stem}_{tokenizer.name}"
    wanted = [{**describe_source(str(path)), "path": path.name}]  # it may have been moved since

    def find(folder: Path) -> Data | None:
        for data in filter(None, map(existing_data, (DATA_DIR / path.stem, folder))):
            files = data.source.get("files") if isinstance(data.source, dict) else data.source
            files = files if is_a(files, list[dict[str, Any]]) else []
            same = [{**f, "path": Path(str(f.get("path"))).name} for f in files] == wanted
            if not isinstance(tokenizer, str):
                same_template = not data.is_chat or chat_template(data.tokenizer) == chat_template(tokenizer)
                same = same and data.tokenizer.digest == tokenizer.digest and same_template
            if same:
                return data
            if data.folder == folder:
                other = f"{folder} was made from other data than {path}, or with another tokenizer or chat template"
                raise UserError(f"{other}: remove the folder, or give the file another name")

    def make(folder: Path) -> None:
        if path.suffix.lower() in RECORD_FILES:
            tokenize_records(folder, Records(hf_dataset=str(path)), tokenizer, vocab_size)
        else:
            tokenize_text(folder, [str(path)], tokenizer, vocab_size)

    return found_or_made(DATA_DIR / name, find, make)


# ----------------------------------------------------------------------------------------------------------------------
# Conversations and records
# ----------------------------------------------------------------------------------------------------------------------

RECORD_FILES = {f".{k}": k for k in ("parquet", "json", "csv", "arrow")} | {".jsonl": "json", ".ndjson": "json"}
ROLES = {"human": "user", **dict.fromkeys(("gpt", "chatgpt", "bot", "bing", "model"), "assistant")}
FORMS: dict[str, tuple[tuple[str, ...], Callable]] = {  # of conversations: the columns that identify one, its turns
    "messages": (("messages",), lambda r: [(t.get("role"), t.get("content")) for t in r["messages"] or []]),
    "sharegpt": (("conversations",), lambda r: [(t.get("from", t.get("role")), t.get("value", t.get("content")))
                                                for t in r["conversations"] or []]),
    "utterances": (("utterances",), lambda r: list(zip(itertools.cycle(("user", "assistant")), r["utterances"] or []))),
    "alpaca": (("instruction", "output"), lambda r: [
        ("user", paragraphs(r["instruction"], r.get("input"))), ("assistant", r["output"])]),
    "prompt": (("prompt", "completion"), lambda r: [("user", r["prompt"]), ("assistant", r["completion"])]),
    "question": (("question", "answer"), lambda r: [
        ("user", paragraphs(r["context"] if isinstance(r.get("context"), str) else None, r["question"])),
        ("assistant", r["answer"])]),
}  # fmt: skip


def messages_of(record: dict[str, Any], chat_format: str | None = None) -> list[dict[str, str]] | None:
    """The turns of a record, in the form that its columns show or chat_format names; None if it has none."""
    if "response" in record:
        record = {"completion": record["response"], **record}
    form = chat_format or next((name for name, (columns, _) in FORMS.items() if record.keys() >= set(columns)), None)
    if form is None:
        return None
    columns, turns_of = FORMS[form]
    if not record.keys() >= set(columns):
        raise UserError(f"a record has no {form} conversation: its columns are {', '.join(record)}")
    with told_as(f"column {columns[0]} is not a list of turns", AttributeError, TypeError):
        if len(columns) == 1 and not isinstance(record[columns[0]], list | None):
            raise TypeError(f"it is {type(record[columns[0]]).__name__}")
        turns = [(ROLES.get(role, role), joined(content)) for role, content in turns_of(record)]
    if (said := record.get("system")) and isinstance(said, str) and turns and turns[0][0] != "system":
        turns.insert(0, ("system", said))  # from a column of its own
    expected = itertools.cycle(("user", "assistant"))
    for i, (role, content) in enumerate(turns, 1):
        if not isinstance(content, str):
            raise UserError(f"a turn's content is {type(content).__name__}, not text: {str(content)[:100]}")
        if (i, role) != (1, "system") and role != next(expected):
            raise UserError(f"roles are out of order: turn {i} is {role!r}, but user and assistant must alternate")
    return [{"role": role, "content": content} for role, content in turns]


def joined(content: Any) -> Any:
    """The text of a turn, which may be a number, or a list of parts, [{"type": "text", "text": ...}, ...], as in
    OpenAI's format."""
    if isinstance(content, (int, float)) and content == content:  # not NaN, which stands for a missing one
        return str(content)
    if not is_a(content, list[dict[str, Any]]) or any(p.get("type") != "text" for p in content):
        return content
    return "".join(part.get("text") for part in content)


def paragraphs(*parts: Any) -> str:
    return "\n\n".join(filter(None, map(joined, parts)))


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def chat_template(tokenizer: Tokenizer) -> str | None:
    """The Jinja template that renders conversations for a model; None for one without chat tokens."""
    return tokenizer.fields.chat_template or (CHATML if {IM_START, IM_END} <= tokenizer.special.keys() else None)


# A stranger's template is a program that may never end, so a separate process renders it, in a sandbox as transformers
# does (jinja2 comes with torch). One line of JSON per conversation.
RENDERER = """
import functools, json, sys, time
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

if sys.platform == "linux":
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))

def raise_exception(message):
    raise ValueError(f"it refuses this conversation: {message}")

class Generation(Extension):  # {% generation %} marks what the assistant says: its contents
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)

extensions = [Generation, "jinja2.ext.loopcontrols"]
environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
environment.globals.update(raise_exception=raise_exception, strftime_now=time.strftime)
environment.filters["tojson"] = lambda x, **kwargs: json.dumps(x, ensure_ascii=False, **kwargs)
compiled = functools.lru_cache(maxsize=4)(environment.from_string)
for line in sys.stdin:
    try:
        template, values = json.loads(line)
        answer = [compiled(template).render(**values), None]
    except BaseException as e:
        answer = [None, str(e) or type(e).__name__]
    print(json.dumps(answer), flush=True)
"""


@functools.lru_cache(maxsize=1)
def renderer(pid: int) -> subprocess.Popen:
    """The rendering process of the process pid."""
    command = [sys.executable, "-c", RENDERER]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8")
    apart = dict(start_new_session=True, creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0))
    return subprocess.Popen(command, **pipes, **apart)  # it must not get a terminal's Ctrl-C


def render_template(template: str, values: dict[str, Any], seconds: float = 10.0) -> str:
    """The text that a template renders. Raises UserError if it fails or takes too long."""
    if template == CHATML:
        turns = [f"{IM_START}{m['role']}\n{m['content'].strip()}{IM_END}\n" for m in values["messages"]]
        return "".join(turns) + f"{IM_START}assistant\n" * values["add_generation_prompt"]
    child = renderer(os.getpid())
    timer = threading.Timer(seconds, child.kill)
    timer.start()
    try:
        child.stdin.write(json.dumps([template, values]) + "\n")
        child.stdin.flush()
        answer = child.stdout.readline()
    except OSError:  # it has ended
        answer = ""
    finally:
        timer.cancel()
    if not answer.endswith("\n"):
        renderer.cache_clear()
        raise UserError(f"it takes more than {seconds:g} seconds or 1 GB")
    text, error = json.loads(answer)
    if error is not None:
        raise UserError(error)
    return text


def render_chat(tokenizer: Tokenizer, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """A conversation as the model's chat template renders it. Names of special tokens are removed from its turns."""
    template = chat_template(tokenizer)
    if template is None:
        raise UserError(f"{tokenizer.name} has no chat template: finetune the model on conversations first")
    clean = [{**m, "content": tokenizer.without_special(m["content"])} for m in messages]
    # what there is not must be undefined: templates test for it
    tokens = {k: token for k, token in vars(tokenizer.fields).items() if k.endswith("_token") and token}
    values = {"messages": clean, "add_generation_prompt": add_generation_prompt, "tools": None, "documents": None}
    with told_as("the chat template cannot be used", Exception, UserError):  # it can raise anything
        return render_template(template, values | tokens)


def encode_conversation(tokenizer: Tokenizer, messages: list[dict[str, str]], train_on_all: bool) -> list[np.ndarray]:
    """Token ids of a rendered conversation, as apply_chat_template gives them, and the target mask: what the
    assistant says and its end of turn, or everything. If a template rewrites earlier answers (Qwen 3's drops their
    thinking) only the last one counts."""
    ids, mask, specials = [], [], set(tokenizer.special.values())
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for i in answers:
        before = render_chat(tokenizer, messages[:i], add_generation_prompt=True)
        after = render_chat(tokenizer, messages[: i + 1])
        if not after.startswith(before):
            raise UserError("a chat template that changes earlier turns when they are answered cannot be trained on")
        whole = tokenizer.encode_rendered(after)  # encoded alone, a turn may get the space that begins a text
        n = common_prefix(tokenizer.encode_rendered(before), whole)
        k = min(common_prefix(ids, whole), n)
        end = max((j + 1 for j in range(n, len(whole)) if whole[j] in specials), default=len(whole))
        mask = mask[:k] + [0] * (n - k) + [1] * (end - n) + [0] * (len(whole) - end)
        ids = whole
    return [np.array(ids, np.int64), np.array([1] * len(ids) if train_on_all else mask, np.uint8)]


def common_prefix(a: list[int], b: list[int]) -> int:
    """The length of the common prefix of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class ChatFormat(Settings):
    """conversations"""

    chat_format: str | None = setting(None, "form of the conversations (default: detected from the columns)", FORMS)
    train_on_all: bool = setting(False, "every token of a conversation is a target, not only the assistant's")
    skip_bad: bool = setting(False, "skip unusable records, and report how many")


class Records(ChatFormat):
    """Hugging Face data set"""

    hf_dataset: str = setting("", "a data set on the Hub, or a local folder or file (parquet, json, csv, text, arrow)")
    hf_split: str = setting("train", "split of the data set")
    hf_text_column: str | None = setting(None, "column of text or turns (default: detected from the columns)")
    hf_config: str | None = setting(None, "configuration of the data set")
    hf_revision: str | None = setting(None, "branch, tag or commit of the data set")
    streaming: bool = setting(False, "read records as they arrive, without a copy on disk")
    num_proc: int = setting(1, "number of tokenizing processes", ge=1, le=1024)
    max_tokens: int = setting(0, "stop after about this many (0: all)", ge=0)
    val_fraction: float = setting(0.1, "fraction held out for validation, at most 10M tokens", ge=0, lt=1)

    def describe(self) -> dict[str, Any]:
        """What the ids are made from, for meta.json: the options that affect them, and the files."""
        options = {f.name: getattr(self, f.name) for f in fields(Records) if f.name not in ("streaming", "num_proc")}
        path = Path(self.hf_dataset)
        files = [self.hf_dataset, *map(str, sorted(path.rglob("*")))]  # those of a folder, one by one
        return {**options, "files": [*map(describe_source, files)] if path.exists() else None}

    def open(self) -> Any:
        """The `datasets` data set."""
        import datasets

        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        path, kinds = Path(self.hf_dataset), {**RECORD_FILES, ".txt": "text"}
        kind = kinds.get(path.suffix.lower())
        if kind and not path.exists():
            remedy = ": records cannot be read from a URL, so download it first" * ("://" in self.hf_dataset)
            raise UserError(f"{self.hf_dataset}: no such file{remedy}")
        if path.is_file() and not kind:
            raise UserError(f"{path}: a local data set must be one of {', '.join(kinds)}, or a folder")
        what, lacks = ("file", ("hf_config", "hf_revision")) if path.is_file() else ("folder", ("hf_revision",))
        if path.exists() and (wrong := next((k for k in lacks if getattr(self, k)), None)):
            raise UserError(f"{path} is a {what}, which has no {wrong[3:]}: leave --{wrong} out")
        for file in (path, *path.rglob("*")):
            if file.is_file() and RECORD_FILES.get(file.suffix.lower()) == "json":
                check_nesting(file)
        options = {"split": self.hf_split, "streaming": self.streaming}
        own: dict[str, dict[str, Any]] = {
            "text": {"sample_by": "document", "encoding": "utf-8-sig"},  # a file is a document
            "csv": {"keep_default_na": False},  # NA and None are text
            "json": {"chunksize": 1 << 26},  # the first chunk decides which fields there are
        }
        # datasets, huggingface_hub, pyarrow and httpx each have exceptions of their own
        with told_as(f"cannot read {path}" + ", which is not a local data set, from the Hub" * (not path.exists())):
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():  # by save_to_disk
                table = datasets.load_from_disk(str(path))
                splits = table if isinstance(table, dict) else {self.hf_split.partition("[")[0]: table}
                if self.hf_split not in splits:
                    raise ValueError(f"there is no split {self.hf_split!r}, only {', '.join(splits)}")
                table = splits[self.hf_split]
                return table.to_iterable_dataset() if self.streaming else table
            if path.is_file():  # it serves as any split
                file = {self.hf_split.partition("[")[0]: glob.escape(str(path))}
                return datasets.load_dataset(kind, data_files=file, **options, **own.get(kind, {}))
            where = dict(path=self.hf_dataset, name=self.hf_config, revision=self.hf_revision)
            kind = datasets.load_dataset_builder(**where).name  # of files of several kinds, the most common
            return datasets.load_dataset(**where, **options, **(own.get(kind, {}) if path.exists() else {}))

    def content(self, record: dict[str, Any]) -> str | list[dict[str, str]]:
        """A record's text, or its conversation."""
        column = self.hf_text_column or "text"
        if self.hf_text_column is None:
            messages = messages_of(record, self.chat_format)
            if messages or messages is not None and not record.get("text"):
                return messages
        if column not in record:
            raise UserError(f"no column {column!r}, only {', '.join(record)}: hf_tokenize --hf_text_column names one")
        value = record[column]
        if isinstance(value, list) and value and isinstance(value[0], (str, dict)):
            form = "utterances" if isinstance(value[0], str) else "sharegpt"  # which reads messages too
            return messages_of({FORMS[form][0][0]: value}, form)
        if isinstance(value, str) or value is None or value == []:
            return value or ""
        raise UserError(f"column {column!r} must be text or a list of turns, not {type(value).__name__} {value!r:.60}")

    def texts(self, limit: int = 100_000_000) -> Iterator[str]:
        """What a vocabulary is learned from: the first 100 MB."""
        for record in readable(self.open(), self.hf_dataset):
            content: Any = ""
            with suppress(UserError):  # its error is reported when it is encoded
                content = self.content(record)
            for text in [content] if isinstance(content, str) else [m["content"] for m in content]:
                yield text
                limit -= len(text)
            if limit < 0:
                return


def check_nesting(path: Path, deepest: int = 200) -> None:
    """Raise UserError for JSON nested so deeply that pyarrow's reader would crash."""
    depth = 0
    with open(path, "rb") as f:
        while block := b"".join(f.readlines(1 << 24)):
            bare = np.frombuffer(re.sub(rb'"(?:[^"\\]|\\.)*"', b"", block), np.uint8)
            opened, closed = (np.isin(bare, list(brackets)) for brackets in (b"[{", b"]}"))
            depths = depth + np.cumsum(opened.astype(np.int8) - closed, dtype=np.int32)
            if depths.max(initial=0) > deepest:
                raise UserError(f"{path} is JSON nested more than {deepest} levels deep")
            depth = max(int(depths[-1]) if len(depths) else depth, 0)


@functools.cache
def workers_end_with_program() -> None:
    """On Linux, make the processes that `datasets` forks end when the program is killed, and leave Ctrl-C to it."""
    if sys.platform == "linux":
        libc, PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
        os.register_at_fork(after_in_child=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))


def encode_record(r: Records, tokenizer: Tokenizer, record: dict[str, Any]) -> dict[str, Any]:
    """Token ids of a record, its target mask if it is a conversation, or its error: `datasets` may run this in another
    process, from which a UserError would come back as another class."""
    row: dict[str, Any] = {"ids": np.array([], np.int64), "mask": None, "error": None}
    content = None
    try:
        if isinstance(content := r.content(record), str):
            row["ids"] = tokenizer.encode_array(content)
        else:
            row["ids"], row["mask"] = encode_conversation(tokenizer, content, r.train_on_all)
    except UserError as e:
        if isinstance(content, list) and chat_template(tokenizer) is None:  # no fault of the record
            raise
        text = json.dumps({**record}, ensure_ascii=False, default=str)  # as it may stand in the record's file
        row["error"] = f"{e} (in the record {text[:100]}{' ...' * (len(text) > 100)})"
    return row


def tokenize_records(
    folder: Path, r: Records, tokenizer: str | Tokenizer, vocab_size: int | None = None, overwrite: bool = False
) -> Meta:
    """Make a data folder from a `datasets` data set. With streaming, an interrupted run resumes where it stopped."""
    from datasets import Features, Value

    if r.streaming and r.num_proc > 1:
        raise UserError("--num_proc is for records on disk: leave it out, or leave --streaming out")
    tokenizer = train_bpe(r.texts(), vocab_size) if tokenizer == "bpe" else load_tokenizer(tokenizer)
    source, encode = r.describe(), functools.partial(encode_record, r, tokenizer)
    key = json.dumps([source, digest_of(tokenizer.spec)]) if r.streaming else None
    separator = np.array([] if tokenizer.eot is None else [tokenizer.eot], np.int64)
    saved_at, n_bad, first_bad, n_empty = time.monotonic(), 0, "", 0
    bar = progress_bar(unit=" records", desc="tokenize")
    with locked(folder), DataWriter(folder, tokenizer, overwrite, key) as writer, bar:
        records = r.open()
        rows = map(encode, () if r.streaming else readable(records, r.hf_dataset))
        telling = (row for row in rows if len(row["ids"]) or row["error"] and not r.skip_bad)
        if next(telling, {"mask": None})["mask"] is not None:
            # conversations are often sorted by subject, so the last tenth, held out, would differ from the rest
            records = records.shuffle(seed=0, keep_in_memory=True)
        if writer.state is not None:
            say(f"resuming after {writer.n_tokens:,} tokens")
            position, n_bad, first_bad, n_empty = writer.state
            records.load_state_dict(position)
        rows = map(encode, records)
        if r.num_proc > 1:
            workers_end_with_program()
            kind = Features(ids=[Value("int64")], mask=[Value("uint8")], error=Value("string"))
            try:
                rows = records.map(encode, num_proc=r.num_proc, remove_columns=records.column_names, features=kind)
            except Exception as e:
                if isinstance(e.__context__, KeyboardInterrupt):  # Ctrl-C, which it turns into a TimeoutError
                    raise KeyboardInterrupt from e
                raise
        for row in readable(rows, r.hf_dataset):
            ids, mask = np.asarray(row["ids"], np.int64), row["mask"]
            if row["error"]:
                if not r.skip_bad:
                    raise UserError(f"{row['error']}: fix it, or use tokenize, hf_tokenize or hf_finetune --skip_bad")
                n_bad, first_bad = n_bad + 1, first_bad or row["error"]
            elif not len(ids):
                n_empty += 1
            elif writer.n_tokens and (mask is None) != (writer.files["starts.bin"].tell() == 0):
                raise UserError(f"{r.hf_dataset} mixes conversations and other text: make a data set of each")
            elif mask is None:
                writer.write(np.concatenate((separator, ids)) if writer.n_tokens else ids)
            else:
                writer.write(ids, np.asarray(mask))
            bar.update()
            if r.max_tokens and writer.n_tokens >= r.max_tokens:
                break
            if r.streaming and time.monotonic() - saved_at > 2:
                writer.save_progress((records.state_dict(), n_bad, first_bad, n_empty))
                saved_at = time.monotonic()
        if n_bad:
            say(f"skipped {n_bad:,} unusable record(s); the first: {first_bad}", sys.stderr)
        if n_empty and writer.n_tokens:
            say(f"{n_empty:,} record(s) without text or an assistant turn", sys.stderr)
        return writer.finish(r.val_fraction, source)


def readable(records: Iterable, source: str) -> Iterator[dict[str, Any]]:
    """The records that `datasets` yields, with its errors (a damaged file, a lost connection) as UserErrors."""
    with told_as(f"cannot read {source}"):  # datasets, pyarrow, pandas and httpx each have their own
        yield from records


# ----------------------------------------------------------------------------------------------------------------------
# Generation
# ----------------------------------------------------------------------------------------------------------------------


class SamplingSettings(Settings):
    """sampling"""

    temperature: float = setting(0.9, "divides the logits; 0 is greedy: always the most likely token", ge=0)
    top_k: int = setting(0, "sample among the k most likely tokens (0: all)", ge=0)
    top_p: float = setting(1.0, "sample among the most likely tokens whose probabilities add up to this", gt=0, le=1)
    min_p: float = setting(0.05, "drop tokens less likely than this fraction of the most likely one", ge=0, le=1)
    repetition_penalty: float = setting(1.0, "above 1: lower the logits of tokens already in the text", gt=0)
    seed: int = setting(1337, "random seed", ge=0, lt=2**63)


def next_token_probs(logits: Tensor, s: SamplingSettings, seen: Tensor | None = None) -> Tensor:
    """The distribution to sample from, (B, vocab) float32, given logits (B, vocab). Filters apply in the order
    repetition penalty (arXiv 1909.05858, section 4.1; seen (B, n) are the tokens so far), temperature, top_k, top_p
    (arXiv 1904.09751), min_p (arXiv 2407.01082), as in transformers. Greedy puts all probability on one token."""
    if s.repetition_penalty != 1 and seen is not None:
        score = logits.gather(1, seen)
        score = torch.where(score < 0, score * s.repetition_penalty, score / s.repetition_penalty)
        logits = logits.scatter(1, seen, score)
    if s.temperature < 1e-30:  # 0, or so little that the division would overflow
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
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
    return probs / probs.sum(dim=-1, keepdim=True)


def draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index (B,) from each row of unnormalised probabilities (B, n), by inversion of the cumulative distribution.
    In float32, since MPS has no float64: u < 1 times the total never rounds up to the total, so the index is always
    that of a token with some probability."""
    cumulative = probs.float().cumsum(dim=-1)
    u = torch.rand(probs.size(0), 1, device=probs.device, generator=generator)
    return torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)[:, 0].clamp(max=probs.size(-1) - 1)


def left_pad(prompts: list[list[int]] | Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Prompts as a matrix (B, longest), padded on the left, and how much padding each has (None if none). A matrix of
    prompts is returned as it is."""
    if isinstance(prompts, Tensor):
        return prompts, None
    longest = max(map(len, prompts))
    pad = [longest - len(p) for p in prompts]
    idx = torch.tensor([p[:1] * n + p for p, n in zip(prompts, pad, strict=True)], device=device)
    return idx, torch.tensor(pad, device=device) if any(pad) else None


@torch.inference_mode()
def generate(
    model: GPT, prompts: list[list[int]] | Tensor, max_new_tokens: int, settings: SamplingSettings,
    generator: torch.Generator | None = None, cache: KVCache | None = None, first: Tensor | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yield the next token of every prompt, (B,) int64, up to max_new_tokens times; close the iterator to stop earlier.

    The work per token is constant: a preallocated cache holds the keys and values so far. When the text outgrows the
    context, its last half is read again into an empty cache and generation goes on from there. The model must be in
    eval mode, see evaluating. With the caller's own cache, which holds the beginning of the prompts, the rest of them
    is read, and generation ends when it is full. `first` (vocab,) says which tokens may come first.
    """
    context, device = model.config.context, model.device
    idx, pad = left_pad(prompts, device)
    if idx.size(1) > context:
        longer = ", or extend the context with --rope_scaling yarn --rope_factor N" * (model.rope_cos is not None)
        raise UserError(f"the prompt has {idx.size(1):,} tokens but the context is {context:,}: shorten it{longer}")
    own_cache, new = cache is None, idx if cache is None else idx[:, cache.length :]
    for i in range(max_new_tokens):
        if cache is None or cache.length + new.size(1) > cache.max_length:
            if not own_cache:
                return
            if cache is not None:  # full
                new = idx[:, -(context // 2 or 1) :]
                pad = None if pad is None else (pad - (idx.size(1) - new.size(1))).clamp(min=0)
            cache = KVCache(model, idx.size(0), min(context, new.size(1) + max_new_tokens - i), pad)
        logits = model.logits(model.hidden(new, cache)[:, -1])
        if first is not None and i == 0:
            logits = logits.masked_fill(~first, float("-inf"))
        greedy = settings.temperature == 0 and settings.repetition_penalty == 1  # the short way
        token = logits.argmax(dim=-1) if greedy else draw(next_token_probs(logits, settings, idx), generator)
        new = token[:, None]
        idx = torch.cat((idx, new), dim=1)
        yield token


@contextmanager
def evaluating(model: GPT) -> Iterator[None]:
    """Put the model in eval mode, and restore it afterwards. Processes that share its shards enter together, and each
    holds all of it meanwhile. cuDNN's attention is off: on an H100 it plans for half a second for each length."""
    was_training, cudnn = model.training, torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    model.eval()
    for part in model.sharded:
        part.unshard()
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        model.train(was_training)
        for part in model.sharded:
            part.reshard()


def generate_text(
    model: GPT, tokenizer: Tokenizer, prompt: list[int], length: int, settings: SamplingSettings,
    num_samples: int = 1, stop: Iterable[str] = (), on_text: Callable[[str], None] = lambda text: None,
) -> list[str]:  # fmt: skip
    """Continuations of a prompt of token ids, drawn as one batch, of at most `length` tokens; see read_tokens. Only in
    the first process: the others help gather the model, and get no text. A prompt that ends in a space, "def ", is
    continued from before it by tokens that begin with one, as the model saw words in training ("def" and " name")."""
    first = None
    if len(prompt) > 1 and tokenizer.bytes_of(prompt[-1]) == b" " and tokenizer.begins_with_space.sum() > 1:
        first, prompt = tokenizer.begins_with_space, prompt[:-1]
        first = F.pad(first, (0, model.config.vocab_size - len(first))).to(model.device)
    generator = torch.Generator(model.device).manual_seed(settings.seed)
    with evaluating(model):
        if rank() > 0:
            return [""] * num_samples
        tokens = generate(model, [prompt] * num_samples, length, settings, generator, first=first)
        return read_tokens(tokens, tokenizer, num_samples, stop, on_text, skip_space=first is not None)


def read_tokens(
    tokens: Iterable[Tensor], tokenizer: Tokenizer, num_samples: int, stop: Iterable[str],
    on_text: Callable[[str], None], skip_space: bool = False,
) -> list[str]:  # fmt: skip
    """The texts of generated tokens (num_samples,), read until each reaches a token that ends a text or one of the
    `stop` strings, which are left out. The first text is passed to on_text as it grows."""
    stop = [s for s in stop if s]
    # incremental, since a character may be spread over several tokens
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(num_samples)]
    texts, done, shown = [""] * num_samples, [False] * num_samples, 0
    held = max(map(len, stop), default=1) - 1  # characters that may turn out to be the start of a stop string
    for step, column in enumerate(tokens):
        for i, token in enumerate(column.tolist()):
            if done[i]:
                continue
            done[i] = token in tokenizer.ends
            piece = decoders[i].decode(b"" if done[i] else tokenizer.bytes_of(token), final=done[i])
            texts[i] += piece.removeprefix(" ") if skip_space and step == 0 else piece
            if found := [at for at in (texts[i].find(s) for s in stop) if at >= 0]:
                texts[i], done[i] = texts[i][: min(found)], True
        safe = len(texts[0]) if done[0] else max(len(texts[0]) - held, shown)
        on_text(texts[0][shown:safe])
        shown = safe
        if all(done):
            break
    texts = [text if done[i] else text + decoders[i].decode(b"", final=True) for i, text in enumerate(texts)]
    on_text(texts[0][shown:])
    return texts


def prepare_generation(model: GPT, dtype: str, quantize: str | None = None) -> None:
    """Store a model's weights for the fastest generation. A CPU is limited by memory bandwidth, as each token reads
    every weight: `auto` is float16 weights, or int8 on request, and float32 activations, with the blocks in C, and a
    float16 cache (see CEngine), if there is a C compiler. A GPU is limited by kernel launches: see CUDAGraphs."""
    c, on_cpu = model.config, model.device.type == "cpu"
    if quantize and not on_cpu:
        raise UserError("--quantize int8 is for the CPU: leave it out, or add --device cpu")
    if quantize and dtype not in ("auto", "float32"):
        raise UserError(f"--quantize int8 computes in float32: leave --dtype {dtype} out")
    in_c = on_cpu and dtype == "auto" and c.attn_implementation in ("auto", "sdpa", "flash_attention_2")
    in_c = in_c and c.norm_position == "pre" and c.norm != "none" and ACTIVATIONS[c.activation] in C_ACTIVATIONS
    in_c = in_c and c_library() is not None
    if not in_c and not quantize:
        set_precision(model, dtype)
        model.engine = CUDAGraphs(model) if model.device.type == "cuda" else None
        return
    model.compute_dtype = torch.float32
    if quantize:
        model.lm_head = Int8Linear(model.lm_head or model.wte)
        for place in (place for block in model.blocks for place in block.linears()):
            setattr(*place, Int8Linear(getattr(*place)))
    for p in model.parameters():
        if p.dim() > 1 and p.dtype == torch.bfloat16:
            p.data = p.data.view(torch.float16).copy_(p.data)  # in place: new memory takes longer than the conversion
        p.data = p.data.to(torch.float16 if p.dim() > 1 else torch.float32).contiguous()
    if in_c:
        model.engine = CEngine(model)


class Int8Linear(nn.Module):
    """A linear layer for generation, with int8 weights and one scale per row (the row's largest becomes 127)."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight, self.bias = layer.weight.data.float(), getattr(layer, "bias", None)  # (out, in)
        self.scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        self.weight = torch.round(weight / self.scale[:, None]).to(torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.weight) * self.scale
        return y if self.bias is None else y + self.bias


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ----------------------------------------------------------------------------------------------------------------------


class Source(Settings):
    """The data or the teacher of a run, and what identifies it."""

    path: str
    digest: str | None = None
    variant: str | None = None
    parts: list[str] = field(default_factory=list)  # of a mixture
    is_chat: bool | None = None  # whether the data is conversations


class Checkpoint(Settings):
    """What a checkpoint holds: plain containers and tensors, which torch.load(..., weights_only=True) opens."""

    config: dict[str, Any]
    model: dict[str, Tensor]
    tokenizer: dict[str, Any]
    format_version: int = FORMAT_VERSION
    kind: str = ""  # the command that wrote it, and its arguments
    arguments: list[str] = field(default_factory=list)
    variant: str = ""
    step: int = 0
    block_size: int = 0  # of the training windows
    train_config: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)  # a Source
    metrics: dict[str, Any] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)  # the run's records so far; the log file is a copy
    optimizer: list[dict[str, Any]] | None = None  # this and the scaler: only in states to resume from
    scaler: dict[str, Any] | None = None
    lora_rank: int = setting(0, "", ge=0)
    new_tokens: list[int] = field(default_factory=list)  # whose embeddings LoRA trains too
    distill: dict[str, Any] | None = None
    teacher: dict[str, Any] | None = None  # a Source


SEAL = b"sha256:"  # with the digest, the comment at the end of a checkpoint, which is a zip archive


def seal_of(path: Path, size: int) -> bytes:
    """The seal of the first `size` bytes of a file: an archive that ends in the length of its comment, two bytes that
    are filled in later, and so count as 0."""
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as m:
        with memoryview(m) as view, view[: size - 2] as content:
            digest = hashlib.sha256(content)
    digest.update(b"\0\0")
    return SEAL + digest.hexdigest().encode()


def save_checkpoint(path: Path, checkpoint: dict[str, Any], before: Callable[[], None] = lambda: None) -> None:
    """Write a checkpoint atomically; `before` is called when it is complete and about to replace an earlier one."""
    with atomic_write(path) as f:
        try:
            torch.save({"format_version": FORMAT_VERSION, **checkpoint}, f)
        except RuntimeError as e:  # PyTorch raises it for a full disk or a second Ctrl-C
            raise e.__context__ or e from None
        f.flush()
        seal = seal_of(Path(f.name), f.tell())
        f.seek(-2, os.SEEK_END)
        f.write(len(seal).to_bytes(2, "little") + seal)
        before()


def load_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint, verified by its digest from format 3 on. Only tensors and plain containers are unpickled, so a file
    that would run code is refused."""
    with told_as(f"{path} is not a checkpoint of this program, or is damaged"):
        with zipfile.ZipFile(path) as archive:
            seal = archive.comment
        if seal.startswith(SEAL) and seal != seal_of(path, path.stat().st_size - len(seal)):
            raise ValueError("its digest differs")
        in_place = os.name != "nt"  # Windows cannot replace a file that is mapped into memory
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=in_place)
        version = content.get("format_version") if isinstance(content, dict) else None
        if not seal.startswith(SEAL) and version in range(3, FORMAT_VERSION + 1):
            raise ValueError("it does not end in its digest")
    c = from_dict(Checkpoint, content, path)
    schemas = dict(config=GPTConfig, train_config=TrainConfig, distill=DistillConfig, data=Source, teacher=Source)
    for name, cls in schemas.items():
        if part := getattr(c, name):
            from_dict(cls, part, path)
    if c.format_version == 1:
        with told_as(f"{path} is damaged"):
            sums, m = c.metrics.pop("running_parts", None) or [(), ()], c.metrics
            m["sums"] = dict(zip(("divergence", "cross_entropy"), zip(*sums, strict=True), strict=False))
            m["sums"]["loss"] = m.pop("running_loss", 0.0), c.step - m.pop("logged_step", 0)
            (c.teacher or {}).pop("digest", None)  # it included settings of that format
    return c


def find_checkpoint(spec: str | None) -> Path:
    """The path that --model_checkpoint names: a path, or a name under checkpoints/; by default the newest there."""
    where, ours = CHECKPOINT_DIR.resolve(), filter(Path.exists, CHECKPOINT_DIR.glob("*_model.pt"))  # no dead links
    ours = sorted(ours, key=lambda p: p.stat().st_mtime)
    if spec is None and not ours:
        raise UserError(f"there is no checkpoint under {where} yet: train one, or name one with --model_checkpoint")
    found = [ours[-1]] if spec is None else [Path(spec), CHECKPOINT_DIR / spec, CHECKPOINT_DIR / f"{spec}_model.pt"]
    if path := next((p for p in found if p.exists()), None):
        return path
    raise UserError(f"no checkpoint at {spec} or {CHECKPOINT_DIR / spec}{nearest(spec, [p.name for p in ours])}")


@dataclass
class Opened:
    """A model opened for use, in eval mode and float32, and where it came from."""

    model: GPT
    tokenizer: Tokenizer
    path: Path
    name: str  # its variant, or that of its file or folder
    checkpoint: Checkpoint | None  # None for a Hugging Face model


def open_model(
    spec: str | None, device: torch.device | str = "cpu", variant: str | None = None, as_stored: bool = False,
    **overrides: Any,
) -> Opened:  # fmt: skip
    """Open a model: one of our checkpoints, a Hugging Face directory, or a Hub id, `owner/name` or
    `owner/name@revision`; its weights in float32, or as they are stored. Raises UserError unless it has the shape of
    the variant, if one is named."""
    is_hub_id = re.fullmatch(rf"(?!{CHECKPOINT_DIR}/)\w[\w.-]*/[\w.-]+(@[\w./-]+)?(?<!\.pt)", spec or "")
    is_hub_id = is_hub_id and not Path(spec).exists() and not (CHECKPOINT_DIR / spec).exists()
    path = hub_directory(spec) if is_hub_id else find_checkpoint(spec)
    if path.is_dir():
        name = spec.partition("@")[0].rsplit("/", 1)[-1] if is_hub_id else path.resolve().name
        opened = Opened(load_hf_model(path, device, as_stored, **overrides), hf_tokenizer(path, name), path, name, None)
    else:
        c = load_checkpoint(path)
        config = {**c.config, "attn_implementation": "auto", **overrides}  # how it was trained is not part of the model
        model = build_model(GPTConfig(**config), c.model, path).float().to(device)
        c.model, c.optimizer = {}, None
        with told_as(str(path), UserError):
            opened = Opened(model, Tokenizer(c.tokenizer), path, c.variant or path.stem.removesuffix("_model"), c)
    c, n_vocab = opened.model.config, opened.tokenizer.n_vocab
    if n_vocab > c.vocab_size:
        raise UserError(f"{path}: tokenizer ({n_vocab:,} tokens) and model ({c.vocab_size:,}) do not belong together")
    for k in ("n_layer", "n_head", "n_embd") if variant else ():
        if (own := getattr(c, k)) != (named := VARIANTS[variant][k]):
            raise UserError(f"{path} is not a {variant}: its {k} is {own}, not {named}; leave --variant out")
    opened.model.eval()
    return opened


DESKTOP_FILES = {".DS_Store", "desktop.ini", "Thumbs.db"}  # where macOS and Windows store a folder's view
EXPORT_LIST = "export.json"  # the files of an export, which --overwrite may replace, and their digests


def export_digests(folder: Path) -> dict[str, str]:
    """The files of an export, name -> digest; format 2 has no digests."""
    listed = read_json(folder / EXPORT_LIST, {})
    listed = dict.fromkeys(listed, "") if is_a(listed, list[str]) else listed
    return {k: v for k, v in listed.items() if Path(k).name == k} if is_a(listed, dict[str, str]) else {}


def build_model(config: GPTConfig, state: dict[str, Tensor], path: Path, lora_rank: int = 0) -> GPT:
    """A GPT that takes over the tensors of a state dictionary, which must fit exactly. Low-rank terms are merged unless
    lora_rank gives the GPT its own."""
    with torch.device("meta"):
        model = GPT(config)
        if lora_rank:
            add_lora(model, lora_rank)
    with told_as(f"{path} does not fit its config", RuntimeError, KeyError):
        model.load_state_dict(state if lora_rank else merged(state), strict=True, assign=True)
    model.build_rope()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Processes, devices, precision
# ----------------------------------------------------------------------------------------------------------------------


def world_size() -> int:
    started = torch is not later and torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if started else 1


def rank() -> int:
    return torch.distributed.get_rank() if world_size() > 1 else 0


def from_first(make: Callable[[], Any]) -> Any:
    """Call make in the first process and give its result to all; the others get only the shapes of its tensors."""
    if world_size() == 1:
        return make()
    found = make() if rank() == 0 else None
    sent = [copied_to(found, "meta")]
    torch.distributed.broadcast_object_list(sent)
    return found if rank() == 0 else sent[0]


torch.utils._pytree.register_dataclass(Checkpoint)


def copied_to(x: Any, device: str) -> Any:
    """A copy of nested containers of tensors on another device; on "meta", of their shapes only."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda tensor: tensor.detach().to(device, copy=True), x)


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if world_size() > 1:
        torch.distributed.all_reduce(x)
    return x


def shard_model(model: GPT, fsdp: bool) -> None:
    """Shard a model by FSDP2: each process owns some rows of every parameter, of its gradient and of its optimizer
    state. A block's parameters are gathered for its passes and kept until the backward one, or (fsdp) not at all."""
    if world_size() == 1:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    for tensor in model.state_dict().values():  # so that nothing depends on equal random numbers
        torch.distributed.broadcast(tensor, 0)
    mesh = torch.distributed.init_device_mesh(model.device.type, (world_size(),))
    policy = MixedPrecisionPolicy(model.compute_dtype, torch.float32, cast_forward_inputs=False)
    model.sharded, model.fsdp = [*model.blocks, model], fsdp
    for part in model.sharded:
        fully_shard(part, mesh=mesh, reshard_after_forward=fsdp, mp_policy=policy)
        part.set_gradient_divide_factor(1.0)  # sums, as the loss is divided by the targets of all processes
        part.set_force_sum_reduction_for_comms(True)
    for p in model.parameters():
        p.shard = p.detach().to_local()
    plain = model.loss
    register_fsdp_forward_method(model, "loss")
    hooked, model.loss = model.loss, lambda *inputs: (hooked if model.training else plain)(*inputs)


def own_shard(p: Tensor) -> Tensor:
    """The rows of a parameter that this process owns, sharing its memory; all rows if it is the only process."""
    return getattr(p, "shard", p)


def part_of_rows(whole: Tensor, process: int) -> Tensor:
    """The rows that a process owns, split as FSDP2 does: chunks of one size, the last ones smaller or empty."""
    size = math.ceil(len(whole) / world_size())
    return whole[process * size : (process + 1) * size]


def gathered(shard: Tensor, p: Tensor) -> Tensor | None:
    """A tensor gathered from shards that are split like parameter p (a number is not): on the CPU in the first process,
    None in the others."""
    if world_size() == 1 or not shard.dim():
        return shard
    whole = p.from_local(shard, p.device_mesh, p.placements, shape=(len(p), *shard.shape[1:]), stride=shard.stride())
    whole = whole.full_tensor()
    return whole.cpu() if rank() == 0 else None


def scattered(whole: Tensor, p: Tensor) -> Tensor:
    """The first process's tensor, sent to all: each keeps its own rows, split like those of parameter p."""
    if world_size() == 1:
        return whole
    device = own_shard(p).device
    whole = whole.to(device) if rank() == 0 else torch.empty_like(whole, device=device)
    torch.distributed.broadcast(whole, 0)
    return part_of_rows(whole, rank()).clone() if whole.dim() else whole


def exchange(outgoing: list[list[Tensor]], shapes: list[list[torch.Size]], none: Tensor) -> list[list[Tensor]]:
    """Send a list of tensors to each process; what arrives, by sender, has these shapes. Lists may be empty, so `none`,
    an empty tensor, gives the dtype and the device."""
    sent = torch.cat([none, *(x.flatten() for xs in outgoing for x in xs)])
    sizes = [sum(shape.numel() for shape in those) for those in shapes]
    received = none.new_empty(sum(sizes))
    torch.distributed.all_to_all_single(received, sent, sizes, [sum(x.numel() for x in xs) for xs in outgoing])
    arrived = iter(received.split([shape.numel() for those in shapes for shape in those]))
    return [[next(arrived).view(shape) for shape in those] for those in shapes]


# One process on each machine prepares the models, data and caches needed there; the others follow once they exist. As
# data may take hours to make, they wait through torchrun's key-value store: collectives have time limits, so none is
# used from `wait_for(f"prepared on {MACHINE}")` to the end of all_prepared.
MACHINE = os.environ.get("GROUP_RANK", platform.node())  # torchrun's number for it
# whether this process does it; a cluster may set LOCAL_RANK for a process that is alone
PREPARES = os.environ.get("LOCAL_RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", 1)) == 1


def store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def meet() -> dict[str, Any]:
    """Arguments of init_process_group, with a part of the store for this start only: that of one before has addresses
    that gloo and NCCL would call (pytorch/pytorch#167288). Each process posts a key; the first reposts all it sees, its
    own first, until each process has seen its key there."""
    whole, rank, n = next(torch.distributed.rendezvous("env://"))
    own, part = os.urandom(8).hex(), None
    whole.set(f"key {rank}", own)
    while part is None or rank == 0 and part.add("met", 0) < n:
        if rank == 0:
            whole.set("keys", " ".join([own, *(whole.get(f"key {i}").decode() for i in range(1, n))]))
        keys = whole.get("keys").decode().split()
        if part is None and own in keys:
            part = torch.distributed.PrefixStore(keys[0], whole)
            part.add("met", 1)
        time.sleep(0.02)
    return {"store": part, "rank": rank, "world_size": n}


def wait_for(*keys: str) -> None:
    """Wait until these keys are in the store. Raises UserError if a process has failed, with its message."""
    while not store().check(list(keys)):
        if store().check(["failed"]):
            raise UserError(store().get("failed").decode())
        time.sleep(0.1)


def all_prepared(**same: Any) -> None:
    """Let the other processes of this machine prepare too, and wait until all have; collectives may be used from here
    on. Raises UserError unless `same` is the same in all."""
    if world_size() == 1:
        return
    if PREPARES:
        store().set(f"prepared on {MACHINE}", "")
    store().set(f"prepared {rank()}", json.dumps([platform.node(), same]))
    wait_for(*(f"prepared {i}" for i in range(world_size())))
    name, first = json.loads(store().get("prepared 0"))
    if differs := next((what for what, value in json.loads(json.dumps(same)).items() if value != first[what]), None):
        raise UserError(f"machine {MACHINE} ({platform.node()}) and the first ({name}) differ in their {differs}")


@contextmanager
def processes() -> Iterator[None]:
    """Join the processes that torchrun started, if it did. An error in any of them ends all, and one process on each
    machine reports it: the first error, as the others only follow from it."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    with told_as("WORLD_SIZE is set, but the processes cannot find each other: start them with torchrun"):
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", **meet())
    try:
        yield
    except (Exception, KeyboardInterrupt) as e:
        end_all(e)
    finally:
        torch.distributed.destroy_process_group()


def end_all(e: BaseException) -> None:
    """End this process, so that the others end too; at once, as gloo would wait for them during Python's shutdown."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it when another has ended: report the error first
    if isinstance(e, torch.distributed.DistError) or type(e) is RuntimeError and "gloo" in str(e):  # of the other end
        reason = " ".join(str(e).split())[:300]
        e = UserError(f"a process was lost, killed or with its machine: continue with --resume auto ({reason})")
    told, words = isinstance(e, KeyboardInterrupt), str(e) or type(e).__name__
    with suppress(RuntimeError):  # the store is gone too
        first = store().compare_set("failed", "", words).decode()
        e = e if first == words else UserError(first)
        told = told or store().add(f"told on {MACHINE}", 1) > 1
    if told:
        time.sleep(1)  # until the one that reports it has
    else:
        tell(e)
    os._exit(130 if isinstance(e, KeyboardInterrupt) else 1)


def tell(e: BaseException) -> None:
    """Show an error: one that the user can fix as a sentence, a bug with its traceback."""
    if not isinstance(e, (UserError, OSError)) or "--debug" in sys.argv:
        return sys.excepthook(type(e), e, e.__traceback__)
    reason = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else str(e)
    print(f"model.py {sys.argv[1]}: error: {reason}", file=sys.stderr, flush=True)


def say(text: str, file: Any = None) -> None:
    """Print a line from the first process, above any progress bar. A closed pipe (train | head) does not stop the
    program."""
    from tqdm import tqdm

    file = file or sys.stdout
    try:
        if rank() == 0:
            tqdm.write(text, file=file)
            file.flush()
    except OSError:  # of a pipe, a terminal that is closed, a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def progress_bar(**kwargs: Any) -> Any:
    """tqdm on standard error, silent where that is not a terminal, and on all ranks but the first."""
    from tqdm import tqdm

    return tqdm(disable=None if rank() == 0 else True, dynamic_ncols=True, file=sys.stderr, **kwargs)


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA, then MPS, then the CPU. Under torchrun each process gets its own GPU."""
    there = {"cuda": has_gpu, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, found in there.items() if found())
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(name)
    except RuntimeError:  # PyTorch's message lists every kind of device
        raise UserError(f"unknown device {name!r}: choose auto, cpu, cuda, cuda:1 or mps") from None
    if device.type not in there or not there[device.type]():
        raise UserError(f"device {name} is not available here, or PyTorch was not built for it: use --device cpu")
    if device.type == "cuda" and device.index is not None and device.index >= (n := torch.cuda.device_count()):
        raise UserError(f"no device {name}: this machine has {n} GPUs; name one of them, or start fewer processes")
    return device


def has_gpu() -> bool:
    """Whether there is a GPU that PyTorch was built for: its default builds do not support old ones."""
    if not torch.cuda.is_available():
        return False
    built = [int(n) for n in re.findall(r"sm_(\d+)", " ".join(torch.cuda.get_arch_list()))]
    return not built or torch.cuda.get_device_capability() >= divmod(min(built), 10)


def send(x: Tensor, device: torch.device) -> Tensor:
    """Send a host tensor to a device. CUDA copies pinned memory in the background; MPS might read memory that has been
    freed by then (https://github.com/pytorch/pytorch/issues/189690), so there the host waits."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 where the device computes it fast, float16 on older GPUs, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        # is_bf16_supported() also counts GPUs that emulate it, ten times slower than float16
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # twice as fast as float32
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def set_precision(model: GPT, name: str, training: bool = False) -> GPT:
    """Choose the precision of a model's activations on its device and, except in training, of its weights too.
    For generation on a CPU, `auto` is bfloat16 for models wide enough to be limited by memory bandwidth, and float32
    for small ones, which are limited by the overhead of each call."""
    small = name == "auto" and model.device.type == "cpu" and model.config.n_embd < 384
    dtype = torch.float32 if small and not training else choose_dtype(name, model.device)
    if not training:
        model.to(dtype)
    elif model.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    model.compute_dtype = dtype
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Training: one loop for train, distill and finetune
# ----------------------------------------------------------------------------------------------------------------------


class Optimization(Settings):
    """optimizer"""

    batch_size: int = setting(16, "sequences per step, over all micro-batches and processes", ge=1, le=1 << 20)
    grad_accum: int = setting(1, "micro-batches per batch: less memory, the same result", ge=1, le=1 << 20)
    optimizer: str = setting("adamw", "for the block matrices; the rest by AdamW", ("adamw", "muon", "normuon"))
    learning_rate: float = setting(3e-4, "peak learning rate (AdamW's)", ge=0)
    muon_lr: float = setting(0.02, "Muon's learning rate", ge=0)
    embd_lr: float = setting(0.0, "AdamW's rate for the token embedding (0: learning_rate)", ge=0, rare=True)
    head_lr: float = setting(0.0, "AdamW's rate for an untied head (0: learning_rate)", ge=0, rare=True)
    weight_decay: float = setting(
        0.1, "decoupled, on matrices and embeddings (-1: by passes over the data)", ge=0, special=-1
    )
    beta1: float = setting(0.9, "AdamW's first moment", ge=0, lt=1, rare=True)
    beta2: float = setting(0.95, "AdamW's second moment", ge=0, lt=1, rare=True)
    grad_clip: float = setting(1.0, "clip the gradient's global norm (0: off)", ge=0)


class Schedule(Settings):
    """schedule"""

    max_iters: int = setting(2000, "optimizer steps", ge=1, le=1 << 40, alias="finetune_iters")
    epochs: float = setting(0.0, "passes over the training data, instead of max_iters", ge=0, le=1e6)
    max_minutes: float = setting(0.0, "as many steps as this machine does in this many minutes", ge=0, le=1e6)
    schedule: str = setting("cosine", "learning rate over time", ("cosine", "linear", "wsd", "constant"))
    warmup_iters: int = setting(-1, "steps of linear warm-up (-1: a tenth of the run, at most 100)", ge=-1)
    min_lr_ratio: float = setting(0.1, "cosine: the last rate as a fraction of the peak", ge=0, le=1)
    decay_fraction: float = setting(
        0.4, "wsd (warmup-stable-decay): part of the run that decays (-1: 0.4, up to 0.6 in longer runs)",
        ge=0, le=1, special=-1,
    )  # fmt: skip


class Reporting(Settings):
    """evaluation and log"""

    eval_interval: int = setting(0, "steps between evaluations, which also save (0: 4 to 10 per run)", ge=0)
    eval_tokens: int = setting(65536, "validation tokens per evaluation, always the same blocks", ge=0)
    log_interval: int = setting(10, "steps between log records", ge=1)
    sample_interval: int = setting(0, "steps between samples (0: at about four evaluations; -1: off)", ge=-1)
    save_minutes: float = setting(10.0, "minutes between saves, besides those at evaluations (0: off)", ge=0)
    keep: int = setting(2, "number of latest states to keep, besides the best model", ge=1, le=1000)
    report_to: str = setting("", "log to tensorboard, trackio, wandb (comma-separated): metrics, samples, settings")
    max_bad_steps: int = setting(10, "stop after this many steps in a row with a non-finite loss (skipped)", ge=1)


class Machine(Settings):
    """machine"""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "dtype of the computation; weights stay float32", DTYPES)
    compile: str = setting("auto", "torch.compile the blocks (auto: where it pays off)", ("auto", "true", "false"))
    fsdp: bool = setting(False, "with torchrun: keep weights sharded within a step too: less memory, more time")
    seed: int = setting(1337, "random seed for weights, data order and dropout", ge=0, le=2**31)


class TrainConfig(Optimization, Schedule, Reporting, Machine):
    """How a model is trained. A batch is what one optimizer step sees: over all micro-batches and processes."""


def in_steps(t: TrainConfig, n_blocks: int) -> TrainConfig:
    """The same length of a run on so many blocks, as max_iters."""
    n = max(1, math.ceil(t.epochs * n_blocks / t.batch_size))
    return replace(t, max_iters=n, epochs=0.0) if t.epochs else t


def lr_factor(step: int, t: TrainConfig) -> float:
    """The learning rate of a step as a fraction of its peak."""
    warmup = min(100, t.max_iters // 10) if t.warmup_iters < 0 else t.warmup_iters
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(t.max_iters - warmup, 1)  # 0 ... 1
    # the longer a run, the more of it may decay (tests/benchmarks/README.md)
    decay = min(max(0.4, 1 - 720 / t.max_iters), 0.6) if t.decay_fraction < 0 else t.decay_fraction
    return {
        "cosine": t.min_lr_ratio + (1 - t.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "wsd": min(1.0, (t.max_iters - step) / max(decay * t.max_iters, 1)),
        "constant": 1.0,
    }[t.schedule]


def decay_by_passes(passes: float) -> float:
    """The weight decay that learns best from data seen this many times (tests/benchmarks/README.md): repeated data is
    memorized."""
    return 0.1 * min(max(1.0, passes) ** 0.65, 5.0)


def newton_schulz(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Orthogonalise a stack of matrices (n, rows, cols): singular values go to about 1 (Muon, Keller Jordan 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g.to(torch.float32 if dtype == torch.float16 else dtype)  # gradients may be too small for float16
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    tall = x.size(1) > x.size(2)
    for _ in range(5):
        gram = torch.bmm(x.mT, x) if tall else torch.bmm(x, x.mT)  # the smaller of the two
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a)
    return x.to(g.dtype)


class Optimizer:
    """What is needed of torch.optim.Optimizer; creating one of those imports torch._dynamo, a second of every start.
    Its state_dict is the same, with tensors passed through change(tensor, its parameter). Initial learning rates are
    the schedule's peaks. As in PyTorch's fused optimizers, a found_inf of 1 skips a step, without telling the host."""

    def __init__(self, param_groups: list[dict[str, Any]]) -> None:
        self.param_groups = [{**group, "peak_lr": group["lr"]} for group in param_groups]
        self.params = [p for group in param_groups for p in group["params"]]
        self.state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in self.params}
        self.found_inf = torch.zeros((), device=self.params[0].device)

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self, change: Callable = lambda x, p: x) -> dict[str, Any]:
        number = {p: i for i, p in enumerate(self.params)}
        groups = [{**group, "params": [number[p] for p in group["params"]]} for group in self.param_groups]
        state = {number[p]: {k: change(x, p) for k, x in kept.items()} for p, kept in self.state.items() if kept}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, saved: dict[str, Any], change: Callable = lambda x, p: x) -> None:
        for group, kept in zip(self.param_groups, saved["param_groups"], strict=True):
            group.update({k: v for k, v in kept.items() if k != "params"})
        for p, state in ((self.params[i], state) for i, state in saved["state"].items()):
            self.state[p] = {k: change(x, p).to(p.device) for k, x in state.items()}


class AdamW(Optimizer):
    """torch.optim.AdamW (arXiv 1711.05101, algorithm 2), by its fused kernel."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            for p in params:
                if not self.state[p]:
                    moments = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
                    self.state[p] = {"step": torch.zeros((), device=p.device), **moments}
            steps, means, squares = ([self.state[p][k] for p in params] for k in ("step", "exp_avg", "exp_avg_sq"))
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_(
                params, [p.grad for p in params], means, squares, [], steps, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=1e-8, amsgrad=False, maximize=False,
                found_inf=self.found_inf,
            )  # fmt: skip
            torch._foreach_sub_(steps, [self.found_inf] * len(steps))


class Muon(Optimizer):
    """Momentum orthogonalised by Newton-Schulz (https://kellerjordan.github.io/posts/muon/), for matrices: as
    torch.optim.Muon (tested), but those of one shape as one batch, and a fused matrix part by part, of these `rows`.
    With beta2 it is NorMuon (arXiv 2510.05491): each row is divided by the root of a running mean of its squared norm,
    where Muon divides by the norm it has in an orthogonal matrix. Processes, which own some rows of every matrix, send
    them to the process that orthogonalises it and get theirs back, so the work is divided among them."""

    def __init__(
        self, params: list[Tensor], rows: list[list[int]], lr: float, momentum: float = 0.95, weight_decay: float = 0.0,
        beta2: float = 1.0, dtype: torch.dtype = torch.bfloat16,
    ) -> None:  # fmt: skip
        super().__init__([dict(params=params, lr=lr, momentum=momentum, weight_decay=weight_decay)])
        self.rows, self.beta2, self.dtype, n = rows, beta2, dtype, world_size()
        squares = [  # the squared norm of each row in an orthogonal matrix, (rows, 1)
            torch.cat([torch.full((part, 1), min(1.0, p.size(1) / part)) for part in parts])
            for p, parts in zip(params, rows, strict=True)
        ]
        self.squares = [part_of_rows(x, rank()).to(params[0].device) for x in squares]
        whole = [torch.empty(sum(parts), p.size(1), device="meta") for p, parts in zip(params, rows, strict=True)]
        self.shapes = [[part_of_rows(x, process).shape for x in whole] for process in range(n)]  # of shards
        cost = [p.size(1) * sum(x) * min(p.size(1), max(x)) for p, x in zip(params, rows, strict=True)]
        self.work: list[list[int]] = [[] for _ in range(n)]  # the indices of the matrices that each process handles
        for i in sorted(range(len(params)), key=lambda i: -cost[i]):
            min(self.work, key=lambda work: sum(cost[j] for j in work)).append(i)

    @torch.no_grad()
    def step(self) -> None:
        bad, (group,) = self.found_inf > 0, self.param_groups
        lr, momentum = group["lr"], group["momentum"]
        new, kept = torch.where(bad, 0.0, 1 - momentum), torch.where(bad, 1.0, 1 - lr * group["weight_decay"])
        updates, squares, sizes = [], self.squares, list(map(len, self.squares))
        for p, first in zip(self.params, self.squares, strict=True):
            if not self.state[p]:
                self.state[p] = {"momentum_buffer": torch.zeros_like(p)}
                self.state[p] |= {"squares": first.clone()} if self.beta2 < 1 else {}
            buffer, grad = self.state[p]["momentum_buffer"], p.grad.masked_fill(bad, 0.0)
            buffer.lerp_(grad, new)
            updates.append(grad.lerp(buffer, momentum))  # Nesterov
            p.mul_(kept)
        self.orthogonalise(updates)
        if self.beta2 < 1:
            squares, new = [self.state[p]["squares"] for p in self.params], torch.where(bad, 0.0, 1 - self.beta2)
            found = torch.cat([torch.linalg.vector_norm(update, dim=1, keepdim=True) for update in updates]).square()
            torch._foreach_mul_(squares, 1 - new)
            torch._foreach_add_(squares, (found * new).split(sizes))
        scales = torch.cat(squares).clamp(min=1e-12).rsqrt() * torch.where(bad, 0.0, -lr)
        for p, update, scale in zip(self.params, updates, scales.split(sizes), strict=True):
            p.addcmul_(update, scale)

    def orthogonalise(self, updates: list[Tensor]) -> None:
        """Orthogonalise in place; each update is this process's rows of a matrix."""
        n, mine = world_size(), self.work[rank()]
        sent = torch.bfloat16 if self.dtype == torch.float16 else self.dtype  # see newton_schulz
        matrices, none = [updates[i] for i in mine], updates[0].new_empty(0, dtype=sent)
        if n > 1:
            shapes = [[those[i] for i in mine] for those in self.shapes]
            arrived = exchange([[updates[i].to(sent) for i in work] for work in self.work], shapes, none)
            matrices = [torch.cat(pieces) for pieces in zip(*arrived, strict=True)]
        by_shape = defaultdict(list)
        for i, matrix in zip(mine, matrices, strict=True):
            for part in matrix.split(self.rows[i]):
                by_shape[part.shape].append(part)
        for parts in by_shape.values():
            torch._foreach_copy_(parts, list(newton_schulz(torch.stack(parts), self.dtype)))
        if n > 1:
            shapes = [[updates[i].shape for i in work] for work in self.work]
            arrived = exchange([[part_of_rows(m, process) for m in matrices] for process in range(n)], shapes, none)
            torch._foreach_copy_([updates[i] for work in self.work for i in work], list(itertools.chain(*arrived)))


def make_optimizers(model: GPT, t: TrainConfig, passes: float = 1.0) -> list[Optimizer]:
    """AdamW, with decay for matrices and embeddings only, and Muon or NorMuon for the block matrices if chosen, for a
    run of this many passes over its data. Their states hold the decay, so a run that is resumed and extended keeps
    it."""
    weight_decay = decay_by_passes(passes) if t.weight_decay < 0 else t.weight_decay
    groups, muon, fused = defaultdict(list), {}, model.fused_rows()
    own_lr = {"wte.weight": t.embd_lr, "lm_head.weight": t.head_lr}
    for name, p in model.named_parameters():
        in_block = name.startswith("blocks.")
        if t.optimizer in ("muon", "normuon") and in_block and p.dim() == 2 and p.requires_grad:
            muon[own_shard(p)] = fused.get(name, [p.size(0)])
        elif p.requires_grad:
            decays = p.dim() >= 2 and (in_block or not model.new_tokens)
            groups[own_lr.get(name) or t.learning_rate, weight_decay * decays].append(own_shard(p))
    betas = t.beta1, t.beta2
    adamw = [dict(params=params, lr=lr, weight_decay=decay, betas=betas) for (lr, decay), params in groups.items()]
    optimizers: list[Optimizer] = [AdamW(adamw)] if adamw else []
    if muon:
        # many CPUs and GPUs only emulate bfloat16, ten times slower
        dtype = model.compute_dtype if model.device.type == "cpu" else choose_dtype("auto", model.device)
        beta2 = 0.95 if t.optimizer == "normuon" else 1.0
        optimizers.append(Muon(list(muon), list(muon.values()), t.muon_lr, 0.95, weight_decay, beta2, dtype))
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
        return super().forward(x) + LORA_SCALE * linear(linear(x, self.lora_a), self.lora_b)


def add_lora(model: GPT, lora_rank: int) -> GPT:
    """Freeze a model and give each linear layer of its blocks a trainable low-rank term."""
    model.requires_grad_(False)
    for block in model.blocks:
        for parent, name in block.linears():
            setattr(parent, name, LoRALinear(getattr(parent, name), lora_rank))
    return model


def train_tokens(model: GPT, tokens: list[int]) -> None:
    """Train only the rows of these tokens in the embedding and the head of a frozen model: tokens newly added to it
    have no meaning yet."""
    model.new_tokens = tokens
    for p in {model.wte.weight, model.head_weight} if tokens else ():
        p.requires_grad_(True)


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dictionary with low-rank terms added to the weights they belong to."""
    state = dict(state)
    for name in [n for n in state if n.endswith(".lora_a")]:
        a, b = state.pop(name), state.pop(name[:-1] + "b")
        weight = name.removesuffix("lora_a") + "weight"
        state[weight] = state[weight] + (LORA_SCALE * b @ a).to(state[weight].dtype)
    return state


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM and SIGHUP (a closed terminal) while a run is in progress; the second Ctrl-C
    interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield received
    except Exception:
        if world_size() > 1:  # torchrun's SIGTERM, sent when another has ended, must not preempt end_all's report
            previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


def compile_model(model: GPT, t: TrainConfig, block_size: int, loss_fn: Callable | None = None) -> None:
    """torch.compile each block, which is as fast as the whole model and compiles only once, and on a GPU the loss; if
    asked for, or if it pays for its time at the start: two CPU cores gain a tenth, with narrow models nothing."""
    c, kind = model.config, model.device.type
    flops = training_flops_per_token(c) * t.max_iters * t.batch_size * block_size
    long = flops > 1e15  # an hour on two cores
    pays = t.max_iters >= 200 if kind == "cuda" else kind == "cpu" and c.n_embd >= 512 and long
    if t.compile == "false" or t.compile == "auto" and not pays:
        return
    if kind == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        return say("no C++ compiler found: continuing without torch.compile")
    if kind == "cuda" and t.compile == "auto" and not importlib.util.find_spec("triton"):  # Windows
        return say("no Triton found (pip install triton-windows): continuing without torch.compile")
    say("compiling the model: the first step can take a minute")
    if t.compile == "auto":
        torch._dynamo.config.suppress_errors = True  # if it fails, continue without
    for block in model.blocks:
        block.forward = torch.compile(block.forward)
    if kind == "cuda":
        model.compiled_loss = torch.compile(fusible_cross_entropy, dynamic=False)
        if isinstance(loss_fn, Distillation):
            loss_fn.divergence_loss = torch.compile(divergence_loss, dynamic=False)


class RunFiles:
    """The files of a run: the best model, the latest states to resume from, and the log."""

    def __init__(self, name: str, overwrite: bool) -> None:
        if Path(name).name != name or name == ".." or name[:1] == "-" or not name.isprintable():
            raise UserError(f"--name {name!r} must be a plain name, for files under {CHECKPOINT_DIR}/")
        self.overwrite, self.run, ends = overwrite, CHECKPOINT_DIR / name, (".pt", "_last.pt", ".jsonl")
        self.model, self.last, self.log = (CHECKPOINT_DIR / f"{name}_model{end}" for end in ends)

    def states(self) -> list[Path]:
        """The states to resume from, the newest first: NAME_model_last.pt, NAME_model_last.2.pt, ..."""
        name = re.compile(re.escape(self.last.stem) + r"(?:\.(\d+))?\.pt")
        found = {int(m[1] or 1): path for path in CHECKPOINT_DIR.glob("*.pt") if (m := name.fullmatch(path.name))}
        return [found[i] for i in sorted(found)]

    def check_free(self) -> None:
        """Raise UserError if a run of this name exists and must not be overwritten."""
        states = self.states()
        if not self.overwrite and (there := next((p for p in (self.model, *states) if p.exists()), None)):
            go_on = "continue with --resume, " if states else "it has no state to resume from; "
            raise UserError(f"{there} already exists: {go_on}--overwrite it, or choose a --name")

    def latest(self, resume: str) -> tuple[Path, Checkpoint] | None:
        """The newest undamaged state to resume from; None if a new run starts, for which the name must be free."""
        if resume == "false" or resume == "auto" and not self.states():
            return self.check_free()
        for path in self.states():
            try:
                return path, load_checkpoint(path)
            except UserError as e:
                # what may pass, and what another model.py wrote: a newer format, unknown fields or values
                whole = e.__cause__ is None or isinstance(e.__cause__, (OSError, MemoryError, UserError))
                if path == self.states()[-1] or whole:
                    raise
                aside = path.with_suffix(".damaged")
                say(f"{e}; renamed it to {aside.name}, using the state before it", sys.stderr)
                os.replace(path, aside)
        raise UserError(f"nothing to resume: there is no {self.last}")

    def rotate(self, keep: int) -> None:
        """Make room for a new state, so that `keep` are kept in all."""
        states = self.states()
        for path in states[max(keep - 1, 1) :]:
            path.unlink()
        for i, path in reversed([*enumerate(states[: keep - 1], start=2)]):
            replace_file(path, self.last.with_suffix(f".{i}.pt"))


def language_modelling(model: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss function of train and finetune. A loss function returns the loss of a micro-batch, summed over its
    targets, and the other values to log, by name: each as (sum, number of targets)."""
    return model.loss(batch["idx"], batch["targets"], batch.get("documents")), {}


def check_targets(split: Split, windows: np.ndarray | range, blocks: Iterable[int], block_size: int) -> None:
    """Raise UserError if none of these blocks of a split has a target."""
    if not any((split.batch(windows, [i], block_size)["targets"] >= 0).any() for i in blocks):
        raise UserError(f"the {split.name} has no target in blocks of {block_size} tokens: raise --block_size")


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete records of a log: a line cut short by a full disk or a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [r for r in records if isinstance(r, dict) and is_a(r.get("step"), int)]


def reporters_in(names: str | None) -> list[str]:
    """The names in --report_to. Raises UserError for one that is unknown or not installed."""
    known, kinds = ("tensorboard", "trackio", "wandb"), names.split(",") if names else []
    if wrong := next((kind for kind in kinds if kind not in known), None):
        raise UserError(f"report_to is {wrong!r}: choose among {', '.join(known)}{nearest(wrong, known)}")
    for kind in kinds:
        need(kind, f"--report_to {kind}")
    return kinds


def reporter(kind: str, run: str, settings: dict[str, Any], step: int) -> Callable[[dict[str, float | str], int], None]:
    """A function that sends a step's numbers and texts, by name, to a dashboard, for a run that starts or resumes at
    this step. No network or account is needed: without them wandb keeps the run for `wandb sync`."""
    module = importlib.import_module(kind)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(CHECKPOINT_DIR / kind / run, purge_step=step)

        def log(values: dict[str, float | str], step: int) -> None:
            for name, value in values.items():
                if isinstance(value, str):
                    writer.add_text(name, "    " + value.replace("\n", "\n    "), step)  # Markdown for verbatim text
                else:
                    writer.add_scalar(name, value, step)
            writer.flush()

        log({"settings": "\n".join(f"{k}: {v}" for k, v in settings.items())}, step)
        return log
    begin = functools.partial(module.init, project="model.py", name=run, config=settings, resume="allow")
    if kind == "wandb":
        begin = functools.partial(begin, id=run, dir=str(CHECKPOINT_DIR))
        mode = os.environ.get("WANDB_MODE") or ("online" if module.api.api_key else "offline")
        try:
            client = begin(mode=mode, settings=module.Settings(init_timeout=20))
        except module.errors.CommError:  # no network
            module.teardown()
            client = begin(mode="offline")
    else:
        client = begin()

    def log(values: dict[str, float | str], step: int) -> None:
        texts = {k: module.Html(f"<pre>{html.escape(v)}</pre>") for k, v in values.items() if isinstance(v, str)}
        client.log({**values, **texts}, step=step)

    return log


OVERLAPPED_SAVE_BYTES = 4 * 300_000_000  # of trained weights: from this size on, saving overlaps the next steps


@dataclass(eq=False)
class Run:
    """A run in progress: its files, its state, and what it records."""

    model: GPT
    data: Data
    t: TrainConfig
    files: RunFiles
    block_size: int
    loss_fn: Callable
    about: dict[str, Any]  # stored in its checkpoints
    step: int = 0
    seconds: float = 0.0
    best: float = math.inf  # validation loss
    best_step: int = 0
    results: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    sums: dict[str, Tensor] = field(default_factory=dict)  # since the last record, (sum, count) by name
    records: list[str] = field(default_factory=list)  # of the log
    written: int = 0  # how many of them are in the log file
    saving: threading.Thread | None = None
    failed: Exception | None = None  # the error that ended it

    def __post_init__(self) -> None:
        model, self.split = self.model, self.data.splits["train"]
        self.windows = self.split.windows(self.block_size)
        t = in_steps(self.t, len(self.windows))
        self.passes = t.max_iters * t.batch_size / len(self.windows)
        self.t, self.sampler = t, BlockSampler(len(self.windows), t.batch_size, t.seed)
        check_targets(self.split, self.windows, range(len(self.windows)), self.block_size)
        micro_batch = t.batch_size // (t.grad_accum * world_size())
        self.evaluate = Evaluator(self.data, self.block_size, micro_batch, t.eval_tokens)
        self.optimizers = make_optimizers(model, t, self.passes)
        self.reporters = dict.fromkeys(reporters_in(t.report_to) if rank() == 0 else ())  # None: not open yet
        scaler = torch.amp.GradScaler
        if world_size() > 1:  # it changes the scale in all processes together
            from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler as scaler
        self.scaler = scaler(model.device.type, enabled=model.compute_dtype == torch.float16)
        # the shards that this process trains -> their parameters
        self.params, self.trained_rows = {own_shard(p): p for p in model.parameters() if p.requires_grad}, {}
        for p in {model.wte.weight, model.head_weight} if model.new_tokens else ():
            rows = torch.zeros(len(p), 1)
            rows[model.new_tokens] = 1
            self.trained_rows[own_shard(p)] = part_of_rows(rows, rank()).to(model.device)
        # skipped steps: in a row now, the longest row, the count, the last one; the latter three since the last record
        self.bad = torch.zeros(4, dtype=torch.int64, device=model.device)
        # an evaluation costs a third of a step on as many tokens: a twelfth of the run, unless it is short
        n = min(10, max(4, t.max_iters * t.batch_size // (4 * len(self.evaluate.blocks))))
        every = math.ceil(t.max_iters / n)
        if every > 5 * t.log_interval:  # at a whole record of the log: its loss is the mean since the one before
            every = round_up(every, t.log_interval)
        evaluate = t.eval_interval or every
        sample = t.sample_interval or evaluate * max(1, round(t.max_iters / evaluate / 4))
        self.intervals = {"record": t.log_interval, "evaluate": evaluate, "sample": sample}
        self.saved_at, self.replaces = time.monotonic(), self.files.model.exists() or bool(self.files.states())

    def resume(self, c: Checkpoint) -> None:
        """Return to where a checkpoint was saved; later records of the log are dropped, as they will come again."""
        self.replaces = False  # an earlier run of this name
        self.step, m = c.step, c.metrics
        self.seconds, self.best, self.results = m["seconds"], m["best_val_loss"], m["last"]
        self.best_step = m.get("best_step", 0)
        self.bad = torch.tensor(m.get("bad", [0] * 4), device=self.model.device)
        for optimizer, state in zip(self.optimizers, c.optimizer, strict=True):
            optimizer.load_state_dict(state, lambda x, shard: scattered(x, self.params[shard]))
        self.scaler.load_state_dict(c.scaler)
        if rank() > 0:
            return
        self.sums = {name: torch.tensor(pair, device=self.model.device) for name, pair in m["sums"].items()}
        self.records = c.log
        if c.format_version < 3 and self.files.log.exists():
            self.records = [json.dumps(r) for r in read_log(self.files.log) if r["step"] <= self.step]

    def mend_files(self, c: Checkpoint) -> None:
        """Bring the log, and the best model if this state is it, up to this state: a kill may have separated them."""
        if rank() > 0:
            return
        self.write_log()
        if self.best_step == self.step:
            with suppress(UserError):  # it is missing, or damaged, or of an earlier run
                best = load_checkpoint(self.files.model)
                if (best.step, best.log) == (c.step, c.log):
                    return
            save_checkpoint(self.files.model, self.checkpoint(merged(c.model), c.metrics["sums"]))

    def batches(self, step: int) -> tuple[list[dict[str, Tensor]], Tensor]:
        """This process's share of a step, on its way to the device, and the number of targets in the whole batch."""
        mine, device = np.array_split(self.sampler(step), world_size())[rank()], self.model.device
        parts = np.array_split(mine, self.t.grad_accum)
        batches = [self.split.batch(self.windows, blocks, self.block_size) for blocks in parts]
        n_targets = torch.full((), float(sum(int((b["targets"] >= 0).sum()) for b in batches)), device=device)
        # the block indices stay on the host
        on_device = [{k: v if k == "blocks" else send(v, device) for k, v in b.items()} for b in batches]
        return on_device, all_reduce(n_targets)

    def start(self) -> None:
        """Send the first batch on its way, and time steps from here on; reports are not timed."""
        self.model.train()
        self.ahead, self.timed = self.batches(self.step), (self.step, time.perf_counter())

    def accumulate_gradients(self, batches: list[dict[str, Tensor]], n_targets: Tensor) -> dict[str, Tensor]:
        """Forward and backward over the micro-batches of a step, with n_targets targets over all processes; gradients
        add up in p.grad. Returns the loss as (mean over these targets, 1; 0 if there are none), and its other parts."""
        model, sums = self.model, {"loss": torch.stack((torch.zeros_like(n_targets), (n_targets > 0) / world_size()))}
        for i, batch in enumerate(batches):
            if model.sharded:  # weights and gradients stay whole until the last, unless memory is short (fsdp)
                model.set_requires_gradient_sync(model.fsdp or i == len(batches) - 1)
                model.set_reshard_after_backward(model.fsdp or i == len(batches) - 1)
            loss, parts = self.loss_fn(model, batch)
            loss = loss / n_targets.clamp(min=1)
            self.scaler.scale(loss).backward()
            sums["loss"][0] += loss.detach()
            sums |= {name: sums.get(name, 0) + part for name, part in parts.items()}
        return sums

    def train_step(self, factor: float) -> None:
        """A step at this fraction of the peak learning rates. Nothing here waits for a GPU."""
        self.factor = factor
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak_lr"] * factor
        torch.manual_seed((self.t.seed * 1_000_003 + self.step) * 4096 + rank())  # dropout; see also Distillation
        sums = self.accumulate_gradients(*self.ahead)
        if self.step + 1 < self.t.max_iters:
            self.ahead = self.batches(self.step + 1)  # while a GPU is still at work on this step
        self.update(sums)

    def fit_into(self, minutes: float) -> None:
        """Set the number of steps so that the run takes about this long on this machine: the time of a step is
        measured on some that change nothing, as their learning rates are 0."""
        self.t = replace(self.t, max_iters=1 << 40)  # for now: a step sends the next batch on its way if one follows
        ends: list[float] = []  # end times of the steps, the first two of which warm up
        self.start()
        # by one clock: a process that takes one step more would wait in it for the others
        while from_first(lambda: len(ends) < 5 or ends[-1] - ends[1] < 0.02 * 60 * minutes):
            self.train_step(0.0)
            self.grad_norm.item()  # waits for a GPU
            ends.append(time.perf_counter())
        step = (ends[-1] - ends[1]) / (len(ends) - 2)
        total, evaluation = 0.96 * 60 * minutes / step, len(self.evaluate.blocks) / (3 * self.t.batch_size)  # in steps
        steps = from_first(lambda: min(total / (1 + 1 / 12), total - 4 * evaluation))
        self.t, self.step, self.sums = replace(self.t, max_iters=max(10, int(steps) // 10 * 10), max_minutes=0.0), 0, {}
        self.__post_init__()  # with fresh optimizers

    def update(self, sums: dict[str, Tensor]) -> None:
        """Apply the gradients of a step and count it."""
        for shard, p in self.params.items():
            if shard is not p and p.grad is not None:
                shard.grad, p.grad = p.grad.to_local(), None
        for shard, rows in self.trained_rows.items():
            shard.grad.mul_(rows)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = nn.utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        if world_size() > 1:
            self.grad_norm = all_reduce(self.grad_norm.square()).sqrt()
        nn.utils.clip_grads_with_norm_(self.params, self.t.grad_clip or math.inf, self.grad_norm)
        bad = ~(self.grad_norm + all_reduce(sums["loss"][0].clone())).isfinite()
        for p in self.params if bad.device.type == "mps" else ():  # whose fused AdamW ignores found_inf
            p.grad = None if p.grad is None else p.grad.masked_fill(bad, 0.0)
        for optimizer in self.optimizers:
            optimizer.found_inf = bad.float()  # over all processes, so that none goes ahead alone
            optimizer.step()
            optimizer.zero_grad()
        self.scaler.update()
        self.step += 1
        row = (self.bad[0] + 1) * bad
        last = torch.where(bad, self.step, self.bad[3])
        self.bad = torch.stack((row, torch.maximum(row, self.bad[1]), self.bad[2] + bad, last))
        self.sums = {name: self.sums.get(name, 0) + torch.where(bad, 0.0, pair) for name, pair in sums.items()}

    def due(self, stop: list[int]) -> set[str]:
        """What to do after this step: any of record, evaluate, sample, save and stop. The processes agree whether to
        stop, by which signal, and whether to save, from CPU to CPU, without waiting for a GPU."""
        t = self.t
        late = rank() == 0 and 0 < 60 * t.save_minutes < time.monotonic() - self.saved_at
        answer = torch.tensor([stop[0] if stop else 0, int(late)])
        if world_size() > 1:
            torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
        self.signal, save = answer.tolist()
        due = {what for what, n in self.intervals.items() if n > 0 and (self.step % n == 0 or self.step == t.max_iters)}
        return due | ({"stop"} if self.signal else set()) | ({"save"} if save else set())

    def report(self, due: set[str], bar: Any, prompt: str) -> None:
        """Do what is due. Between two steps, only this makes the host wait for a GPU."""
        t, files, (since, begun) = self.t, self.files, self.timed
        totals = {name: all_reduce(pair.clone()).tolist() for name, pair in self.sums.items()}
        elapsed = time.perf_counter() - begun
        self.seconds += elapsed
        if evaluated := "evaluate" in due:
            names = ("val_loss", "val_ppl", "val_bpb", "val_tokens")
            self.results = dict(zip(names, self.evaluate(self.model).values(), strict=True))
        bad = self.check_finite()
        if evaluated or "record" in due:
            means = {name: total / max(n, 1) for name, (total, n) in totals.items()} if totals["loss"][1] else {}
            record = {
                "step": self.step, "tokens": self.step * t.batch_size * self.block_size,
                "seconds": round(self.seconds, 2), **means,
                "lr": t.learning_rate * self.factor, "grad_norm": self.grad_norm.item(),
                **({"muon_lr": t.muon_lr * self.factor} if t.optimizer in ("muon", "normuon") else {}),
                "tokens_per_s": round((self.step - since) * t.batch_size * self.block_size / elapsed),
                **bad, **(self.results if evaluated else {}),
            }  # fmt: skip
            totals, self.sums = {}, {}
            self.bad[1:] = 0
            shown = {"loss": math.nan, **record}  # if no step counted
            bar.set_postfix_str("loss {loss:.3f}, {tokens_per_s:,} tokens/s".format_map(shown))
            finite = {k: v if not is_a(v, float) or math.isfinite(v) else None for k, v in record.items()}
            self.records.append(json.dumps(finite))
            self.write_log()
            self.publish({k: v for k, v in record.items() if is_a(v, float) and k != "step"})
        if evaluated:
            say("step {step}: loss {loss:.4f}, val_loss {val_loss:.4f}, perplexity {val_ppl:.2f}, {val_bpb:.4f} bits "
                "per byte, {tokens_per_s:,} tokens/s".format_map(shown))  # fmt: skip
        if improved := evaluated and self.results["val_loss"] < self.best:
            self.best, self.best_step = self.results["val_loss"], self.step
        if evaluated or "stop" in due or "save" in due and not self.bad[0]:  # bad steps may come from bad weights
            has_model = files.model.exists() and not self.replaces
            self.save(improved or "stop" in due and not has_model, totals)
        if "sample" in due:
            self.sample(prompt)
        self.timed = self.step, time.perf_counter()

    def sample(self, prompt: str) -> None:
        """Show how the model continues a text or, for conversations, what it answers in the first validation one."""
        tokenizer, length = self.data.tokenizer, min(100, self.block_size)
        ids, e = tokenizer.prompt(prompt, self.model.config.context), self.evaluate
        if self.data.is_chat:
            held_out = e.split.batch(e.windows, e.blocks[:1], self.block_size)
            ids = held_out["idx"][0, : 1 + int((held_out["targets"][0] >= 0).int().argmax())].tolist()
            prompt = tokenizer.decode(ids)
        (text,) = generate_text(self.model, tokenizer, ids, length, SamplingSettings(seed=self.step))
        say(f"--- sample at step {self.step} ---\n{prompt}{text}\n---")
        self.publish({"sample": prompt + text})

    def check_finite(self) -> dict[str, Any]:
        """The log's entries on skipped steps. Raises UserError if there are too many, or if the model is not finite."""
        _, longest, count, last = self.bad.tolist()
        kept = self.files.last
        kept = "no checkpoint is saved yet" if self.replaces or not kept.exists() else f"the last good one is {kept}"
        remedy = f"{kept}; restart with a lower --learning_rate, a longer --warmup_iters or --dtype float32"
        if longest >= self.t.max_bad_steps:
            in_a_row = f"the loss or its gradient was not finite in {longest} steps in a row, up to step {last}"
            raise UserError(f"{in_a_row}: {remedy}")
        if not math.isfinite(self.results.get("val_loss", 0.0)):
            raise UserError(f"the validation loss is not finite at step {self.step}: {remedy}")
        if not count:
            return {}
        blocks = self.sampler(last - 1).tolist()
        if not self.scaler.is_enabled():  # which finds its scale by skipping steps
            say(f"skipped {count} step(s), the last at step {last}: non-finite loss or gradient (data blocks {blocks})")
        return {"bad_steps": count, "bad_step": last, "bad_blocks": blocks}

    def publish(self, values: dict[str, float | str]) -> None:
        """Send numbers or a text of this step to the --report_to programs; a failure does not stop the run. A run is
        identified by its name and first record: a resumed run is the same, an overwritten one is another."""
        for kind in list(self.reporters) if self.records else ():
            try:
                if self.reporters[kind] is None:
                    first = hashlib.blake2b("".join(self.records[:1]).encode(), digest_size=4).hexdigest()
                    settings = {**self.about, "data": str(self.data.path)}
                    settings |= {**asdict(self.model.config), **asdict(self.t)}
                    self.reporters[kind] = reporter(kind, f"{self.files.run.name}-{first}", settings, self.step)
                self.reporters[kind](values, self.step)
            except Exception as e:
                say(f"--report_to {kind}: {e}; continuing without it", sys.stderr)
                del self.reporters[kind]

    def write_log(self) -> None:
        """Bring the log file up to date. Checkpoints hold the records too, so a file that cannot be written does not
        stop the run."""
        if rank() > 0 or self.replaces:
            return
        try:
            with open(self.files.log, "ab") if self.written else atomic_write(self.files.log) as f:
                f.write("".join(record + "\n" for record in self.records[self.written :]).encode())
            self.written = len(self.records)
        except OSError as e:
            say(f"{self.files.log}: {e.strerror}; continuing without it", sys.stderr)
            self.written = 0

    def checkpoint(self, state: dict[str, Tensor], sums: dict, optimizers: list | None = None) -> dict[str, Any]:
        """The content of a checkpoint: with the optimizers, all that the run needs to resume; else a model to use."""
        model, data = self.model, self.data
        return {
            **self.about, "config": asdict(model.config), "model": state, "tokenizer": data.tokenizer.spec,
            "step": self.step, "block_size": self.block_size, "log": list(self.records),
            "train_config": asdict(replace(self.t, dtype=str(model.compute_dtype).removeprefix("torch."))),
            "data": {"path": str(data.path), "digest": data.digest, "is_chat": data.is_chat, "parts": [*data.parts]},
            "metrics": {
                "seconds": self.seconds, "best_val_loss": self.best, "best_step": self.best_step,
                "bad": self.bad.tolist(), "last": self.results, "sums": sums,
            },
            "optimizer": optimizers, "scaler": self.scaler.state_dict() if optimizers else None,
        }  # fmt: skip

    def save(self, best: bool, sums: dict[str, list[float]]) -> None:
        """Save the state to resume from, and the model if it is the best. From 300M parameters on this overlaps the
        next steps, if there is memory for a copy; the next save, and the end, wait for it."""
        state = {name: gathered(own_shard(p).detach(), p) for name, p in self.model.named_parameters()}
        whole = [o.state_dict(lambda x, shard: gathered(x, self.params[shard])) for o in self.optimizers]
        if rank() > 0:
            return
        self.wait_for_save()
        files, contents = self.files, {self.files.last: self.checkpoint(state, sums, whole)}
        if best:
            contents[files.model] = self.checkpoint(merged(state), sums)

        def write() -> None:
            try:
                stale = {*files.states(), files.model} if self.replaces else set()
                save_checkpoint(files.last, contents[files.last], lambda: None if stale else files.rotate(self.t.keep))
                if best:
                    save_checkpoint(files.model, contents[files.model])
                for path in stale - contents.keys():
                    path.unlink(missing_ok=True)
                self.replaces = False
            except Exception as e:
                self.failed = e

        n_bytes = 4 * sum(p.numel() for p in self.params.values())
        if n_bytes >= OVERLAPPED_SAVE_BYTES and available_memory() > 6 * n_bytes:
            contents = copied_to(contents, "cpu")
            self.saving = threading.Thread(target=write, daemon=True)
            self.saving.start()
        else:
            write()
            self.wait_for_save()
        self.saved_at = time.monotonic()

    def wait_for_save(self) -> None:
        if self.saving:
            self.saving.join()
        self.saving, error, self.failed = None, self.failed, None
        if isinstance(error, OSError):
            room = "make room, and " * (not isinstance(error, PermissionError))
            whole = next((f"; {p} is intact: {room}continue with --resume" for p in self.files.states()), "")
            raise UserError(f"cannot save {error.filename} at step {self.step}: {error.strerror}{whole}") from error
        if error:
            raise error
        self.write_log()


def available_memory(container: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of memory available in the system, or in the container that this runs in; 0 if unknown."""
    found = 0
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # without a limit it says "max"
        limit, used = (int((container / f"memory.{what}").read_text()) for what in ("max", "current"))
        found = min(found, max(limit - used, 0))
    return found


def fit(run: Run, prompt: str = "\n") -> None:
    """Train a model and write its checkpoints and log. Everything random is a function of (seed, step), so a resumed
    run is bit for bit the same as one that was never stopped."""
    t = run.t
    run.start()
    with stop_signals() as stop, progress_bar(total=t.max_iters, initial=run.step, unit="step", desc="train") as bar:
        while run.step < t.max_iters:
            run.train_step(lr_factor(run.step, t))
            bar.update()
            if due := run.due(stop):
                run.report(due, bar, prompt)
            if "stop" in due and run.step < t.max_iters:  # else it is finished
                bar.close()
                from_first(run.wait_for_save)  # when one process has ended, torchrun ends the others
                go_on = f"continue with --name {shlex.quote(run.files.run.name)} --resume"
                say(f"stopped at step {run.step}: saved {run.files.last}; {go_on}")
                raise SystemExit(128 + run.signal)
        run.wait_for_save()


# ----------------------------------------------------------------------------------------------------------------------
# Distillation
# ----------------------------------------------------------------------------------------------------------------------


class DistillConfig(Settings):
    """distillation: alpha T^2 divergence + (1 - alpha) cross-entropy (arXiv 1503.02531)"""

    temperature: float = setting(2.0, "softens both teacher and student", gt=0)
    alpha: float = setting(0.5, "weight of the teacher; the rest goes to the text's cross-entropy", ge=0, le=1)
    divergence: str = setting("forward_kl", "between teacher and student", ("forward_kl", "reverse_kl", "jsd"))
    beta: float = setting(0.5, "for jsd: 0 is forward_kl, 1 is reverse_kl", ge=0, le=1)
    cache_teacher: int = setting(0, "cache the teacher's top K tokens beside the data (0: run it live)", ge=0)
    on_policy: float = setting(0.0, "fraction of batches that the student writes and the teacher scores", ge=0, le=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cache_teacher and self.on_policy:
            raise UserError("cache_teacher and on_policy exclude each other: the student's own text is always new")

    @property
    def skew(self) -> float:
        """The beta of the divergence: forward and reverse KL are the ends of jsd."""
        return {"forward_kl": 0.0, "reverse_kl": 1.0}.get(self.divergence, self.beta)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a || b) (rows,) of log-probabilities (rows, n); where a is 0 the term is 0, whatever b is."""
    a = log_a.exp()
    return (a * (log_a - log_b).masked_fill(a == 0, 0.0)).sum(-1)


def divergence(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    """The divergence (rows,) between a teacher's log p and a student's log q, both (rows, n) and at the temperature:
    the generalised Jensen-Shannon divergence beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q
    (arXiv 2306.13649, equation 1), and its limits: at beta 0 the forward KL(p || q) (arXiv 1503.02531), at beta 1 the
    reverse KL(q || p) (arXiv 2306.08543), as in TRL."""
    if beta in (0, 1):
        return kl(log_q, log_p) if beta else kl(log_p, log_q)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def to_bits(x: Tensor, n: int) -> Tensor:
    """Integers (rows, m) as n bits each, (rows, m n), highest bit first."""
    return (x[..., None] >> torch.arange(n).flip(0) & 1).flatten(1).to(torch.uint8)


def from_bits(bits: Tensor, m: int, n: int) -> Tensor:
    """The integers (rows, m) that to_bits made into these bits (rows, m n)."""
    return (bits.reshape(len(bits), m, n).long() << torch.arange(n).flip(0)).sum(dim=-1)


class TeacherCache:
    """A teacher's top K probabilities at each position of each training block, computed when a block is first read.

    Beside the data, in teacher_cache/: answers.bin, (blocks, block_size, bytes), the bits of each position; done.bin,
    one byte per block; meta.json, with what it is for. A position has its K ids in ascending order in Elias-Fano
    coding, 2 + log2(n_vocab / K) bits each: the low bits, then the high ones in unary. Then 7 bits per id, how far its
    log-probability lies below the top one, in 127ths of the span; the span (6 bits, quarters of a nat); and the
    log-odds of all other tokens, the tail (8 bits, eighths of a nat from -12 on)."""

    def __init__(self, folder: Path, meta: dict, n_blocks: int, block_size: int, K: int, n_vocab: int) -> None:
        self.folder, self.K, self.n_vocab, meta = folder, K, n_vocab, {"format": 3, **meta}
        self.n_low = int(math.log2(n_vocab / K))
        self.widths = [K * self.n_low, K + (n_vocab - 1 >> self.n_low), 7 * K, 6, 8]
        shape = n_blocks, block_size, math.ceil(sum(self.widths) / 8)
        remedy = "delete it, or run without --cache_teacher"
        with locked(folder, wait=True):
            there = read_json(folder / "meta.json", {})
            if not isinstance(there, dict):
                raise UserError(f"{folder} is damaged: {remedy}")
            if wrong := next((k for k in meta if there and there.get(k) != meta[k]), None):
                other = f"another {wrong.replace('_', ' ')} ({there.get(wrong)}, now {meta[wrong]})"
                raise UserError(f"{folder} was made with {other}: {remedy}")
            folder.mkdir(parents=True, exist_ok=True)
            if not there:
                say(f"teacher cache {folder}: {math.prod(shape) / 1e6:,.1f} MB when full, {shape[2]} bytes per token")
                write_json(folder / "meta.json", meta)
            self.answers, self.done = self.open_array("answers.bin", *shape), self.open_array("done.bin", n_blocks)

    def open_array(self, name: str, *shape: int) -> np.memmap:
        path, n_bytes = self.folder / name, math.prod(shape)
        with open(path, "ab") as f:  # keeps what another process has written
            if hasattr(os, "posix_fallocate"):  # a full disk raises here; writing a memory map would be fatal
                try:
                    os.posix_fallocate(f.fileno(), 0, n_bytes)
                except OSError as e:
                    raise naming(path, e) from None
            f.truncate(n_bytes)
        return np.memmap(path, "u1", "r+", shape=shape)

    def write(self, block: int, ids: Tensor, log_p: Tensor) -> None:
        """Store ids and log-probabilities (block_size, K) of a block. It is marked done last."""
        if log_p.isnan().any():
            raise UserError("the teacher's logits are not numbers: its weights are damaged, or too large for its dtype")
        ids, order = ids.cpu().sort(dim=1)
        log_p = log_p.cpu().double().gather(1, order)
        below = log_p.amax(dim=1, keepdim=True) - log_p
        span = (4 * below.amax(dim=1, keepdim=True)).ceil().clamp(1, 64)
        below, top = (below * 4 / span * 127).round().clamp(max=127), log_p.exp().sum(dim=1, keepdim=True)
        tail = (8 * (12 + ((1 - top).clamp(min=1e-9) / top).log())).round().clamp(0, 255)
        high = torch.zeros(len(ids), self.widths[1], dtype=torch.uint8)
        high.scatter_(1, (ids >> self.n_low) + torch.arange(self.K), 1)
        low, *rest = (to_bits(x.long(), n) for x, n in ((ids, self.n_low), (below, 7), (span - 1, 6), (tail, 8)))
        self.answers[block] = np.packbits(torch.cat((low, high, *rest), dim=1).numpy(), axis=1)
        self.done[block] = 1

    def read(self, blocks: list[int]) -> tuple[Tensor, Tensor]:
        """Token ids (rows, K) and log-probabilities (rows, K + 1), the tail's last, of whole blocks."""
        packed = self.answers[blocks].reshape(-1, self.answers.shape[2])
        bits = torch.from_numpy(np.unpackbits(packed, axis=1, count=sum(self.widths)))
        low, high, below, span, tail = bits.split(self.widths, dim=1)
        if (high.sum(dim=1) == self.K).all():
            ids = high.nonzero()[:, 1].view(-1, self.K) - torch.arange(self.K) << self.n_low
            ids += from_bits(low, self.K, self.n_low)
            if ids.max() < self.n_vocab:
                below = from_bits(below, self.K, 7) * (1 + from_bits(span, 1, 6)) / (4 * 127)
                tail = from_bits(tail, 1, 8) / 8 - 12
                top = below.neg().log_softmax(dim=1) + F.logsigmoid(-tail)
                return ids, torch.cat((top, F.logsigmoid(tail)), dim=1)
        raise UserError(f"{self.folder} is damaged: delete it, or run without --cache_teacher")


def divergence_loss(logits: Tensor, teacher: Any, counted: Tensor, temperature: float, beta: float) -> Tensor:
    """The sum over the counted rows of the divergence between a student's logits (rows, n) and the teacher's answers
    (see Distillation.chunk_loss). A pure function, which torch.compile fuses into few passes."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_q, log_p = (logits.to(wide) / temperature).log_softmax(dim=-1), teacher
    if isinstance(teacher, tuple):
        index, log_p = teacher
        if index.size(1) == logits.size(1):  # no tail
            log_q, log_p = log_q.gather(1, index), log_p[:, :-1]
        else:  # lump it to one outcome: spreading its mass evenly, or cutting it off, would teach something false
            tail = log_q.scatter(1, index, float("-inf")).logsumexp(dim=-1, keepdim=True)
            log_q = torch.cat((log_q.gather(1, index), tail), dim=1)
    return (divergence(log_p.log_softmax(dim=-1), log_q, beta) * counted).sum()


@dataclass(eq=False)
class Distillation:
    """The loss function of a student, given its teacher. The teacher's logits are computed from its hidden states chunk
    by chunk, so neither model's full logits ever exist."""

    teacher: GPT
    d: DistillConfig
    n_vocab: int  # tokens that both have
    cache: TeacherCache | None = None

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)
        self.divergence_loss = divergence_loss

    def __call__(self, student: GPT, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The summed loss of a batch; its divergence and cross-entropy, each as (sum, number of targets)."""
        d, n_data = self.d, (batch["targets"] >= 0).sum()
        # depends on the step alone (see fit), or processes would wait for one that generates
        if d.on_policy and random.Random(torch.initial_seed() // 4096).random() < d.on_policy:
            batch, d = self.student_writes(student, batch), replace(d, alpha=1.0)
        idx, targets, documents = batch["idx"], batch["targets"], batch.get("documents")
        n, sums = (targets >= 0).sum(), torch.zeros(2, device=idx.device)
        if d.alpha == 0:  # exactly train
            value = student.loss(idx, targets, documents)
            sums[1] = value.detach()
        else:
            chunk_loss = self.chunk_loss(d, targets, self.teacher_answers(batch), sums)
            value = student.loss(idx, targets, documents, chunk_loss, 3 if self.in_c(d, student.wte.weight) else 8)
        share = n_data / n.clamp(min=1)  # the caller divides by the number of targets in the data
        parts = torch.stack((sums, torch.stack((n * (d.alpha > 0), n * (d.alpha < 1)))), dim=1)
        return value * share, {"divergence": parts[0], "cross_entropy": parts[1]}

    def in_c(self, d: DistillConfig, x: Tensor) -> ctypes.CDLL | None:
        """The library that computes the divergence in C, for logits like x."""
        return training_library(x) if self.cache is None and d.skew in (0, 1) else None

    def chunk_loss(self, d: DistillConfig, targets: Tensor, teacher: Callable[[slice], Any], sums: Tensor) -> Callable:
        """See linear_loss. teacher(rows) gives its logits divided by the temperature (rows, n_vocab), or what
        TeacherCache.read returns; sums (2,) receives the divergence and the cross-entropy."""
        counted, cross_entropy = targets.flatten() >= 0, CrossEntropy(targets)

        def chunk_loss(logits: Tensor, rows: slice, with_grad: bool) -> tuple[Tensor, Tensor | None]:
            def divergence_of(logits: Tensor) -> Tensor:
                given = logits[:, : self.n_vocab], teacher(rows), counted[rows], d.temperature, d.skew
                return d.temperature**2 * self.divergence_loss(*given)  # not later: small gradients vanish in float16

            if library := self.in_c(d, logits):
                losses, grad = torch.empty(len(logits)), torch.empty_like(logits) if with_grad else None
                given = targets.flatten()[rows].long(), teacher(rows).contiguous(), logits, grad, losses
                sizes = len(logits), self.n_vocab, logits.size(1), d.skew == 1
                run_in_c(library.kl_divergence, *sizes, *given, d.temperature)
                loss = losses.sum()
            else:
                loss, grad = by_autograd(divergence_of, logits, with_grad)
            sums[0] += loss / d.temperature**2
            total, grad = d.alpha * loss, grad.mul_(d.alpha) if with_grad else None
            if d.alpha < 1:
                loss, more = cross_entropy(logits, rows, with_grad)  # last, as it overwrites the logits
                sums[1] += loss
                total, grad = total + (1 - d.alpha) * loss, grad.add_(more, alpha=1 - d.alpha) if with_grad else None
            return total, grad

        return chunk_loss

    @torch.no_grad()
    def teacher_answers(self, batch: dict[str, Tensor]) -> Callable[[slice], Any]:
        """The teacher's answers for chunk_loss, live or through the cache."""
        if self.cache is None:
            return self.live(batch)
        blocks, T = batch["blocks"].tolist(), batch["idx"].size(1)
        if missing := [i for i, block in enumerate(blocks) if not self.cache.done[block]]:
            new = {"idx": batch["idx"][missing]}
            if (lengths := batch.get("documents")) is not None:
                rows = (lengths.cumsum(dim=0) - 1) // T
                new["documents"] = lengths[torch.isin(rows, torch.tensor(missing, device=rows.device))]
            live = self.live(new)
            for j, i in enumerate(missing):
                log_p, ids = live(slice(j * T, (j + 1) * T)).log_softmax(dim=-1).topk(self.cache.K)
                self.cache.write(blocks[i], ids, log_p)
        ids, log_p = (send(x, batch["idx"].device) for x in self.cache.read(blocks))
        return lambda rows: (ids[rows], log_p[rows])

    def live(self, batch: dict[str, Tensor]) -> Callable[[slice], Tensor]:
        hidden = self.teacher.hidden(batch["idx"], documents=batch.get("documents")).flatten(0, 1)
        return lambda rows: self.teacher.logits(hidden[rows])[:, : self.n_vocab].div_(self.d.temperature)

    @torch.no_grad()
    def student_writes(self, student: GPT, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch with its second half replaced by the student's continuation (arXiv 2306.13649, algorithm 1)."""
        idx = batch["idx"]
        keep = idx.size(1) // 2 or 1
        generator = torch.Generator(idx.device).manual_seed(int(torch.randint(2**31, ())))
        settings = SamplingSettings(temperature=1.0, min_p=0.0)  # its own distribution
        with evaluating(student):
            new = list(generate(student, idx[:, :keep], idx.size(1) + 1 - keep, settings, generator))
        rows = torch.cat((idx[:, :keep], torch.stack(new, dim=1).clone()), dim=1)
        targets = rows[:, 1:].clone()
        targets[:, : keep - 1] = -1  # only what the student wrote
        return {"idx": rows[:, :-1].contiguous(), "targets": targets}


def every_kth_layer(teacher: GPT, student: GPT) -> None:
    """Initialise a student with every k-th layer of the teacher (as DistilGPT2 was made, arXiv 1910.01108)."""
    for name in ("n_embd", "n_head", "n_kv_head", "head_dim", "n_inner"):
        if (ours := getattr(student.config, name)) != (theirs := getattr(teacher.config, name)):
            raise UserError(f"--init_from_teacher: widths must agree: {name} is {theirs}, the student's {ours}")
    weights, last = teacher.state_dict(), (len(teacher.blocks) - 1, max(len(student.blocks) - 1, 1))
    for name, tensor in student.state_dict().items():
        source = re.sub(r"(?<=^blocks\.)\d+", lambda i: str(round(int(i[0]) * last[0] / last[1])), name)
        value = weights.get(source)
        if value is None or value.shape[1:] != tensor.shape[1:] or len(value) < len(tensor) and name[0] not in "wl":
            raise UserError(f"--init_from_teacher: the teacher has no match for {name}: architectures must agree")
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


def measure(model: GPT, batches: Iterable[dict[str, Tensor]], token_bytes: np.ndarray) -> dict[str, float]:
    """loss (nats per token), perplexity, bits_per_byte and tokens (that are targets) of batches, over all processes,
    each of which takes its share."""
    total = torch.zeros(3, dtype=torch.float64)
    with evaluating(model), torch.no_grad():
        for batch in itertools.islice(batches, rank(), None, world_size()):
            targets = batch["targets"][batch["targets"] >= 0]
            batch = {k: v.to(model.device) for k, v in batch.items()}
            loss = language_modelling(model, batch)[0].item()
            total += torch.tensor([loss, len(targets), token_bytes[targets.numpy()].sum()], dtype=torch.float64)
    nats, n, n_bytes = all_reduce(total).tolist()
    bits = nats / math.log(2)
    return {
        "loss": nats / n, "perplexity": perplexity(nats, n), "bits_per_byte": bits / max(n_bytes, 1), "tokens": int(n),
    }  # fmt: skip


def perplexity(nats: float, n: float) -> float:
    return math.exp(min(nats / max(n, 1), 700))


class Evaluator:
    """Loss on a fixed set of validation blocks, spread evenly over the split."""

    def __init__(self, data: Data, block_size: int, batch_size: int, eval_tokens: int) -> None:
        self.split, self.block_size, self.batch_size = data.splits["val"], block_size, batch_size
        self.windows, self.token_bytes = self.split.windows(block_size), data.tokenizer.token_bytes()
        n = min(len(self.windows), max(1, eval_tokens // block_size))
        self.blocks = [i * len(self.windows) // n for i in range(n)]
        check_targets(self.split, self.windows, self.blocks, block_size)

    def __call__(self, model: GPT) -> dict[str, float]:
        """What measure returns."""
        groups = (self.blocks[i : i + self.batch_size] for i in range(0, len(self.blocks), self.batch_size))
        batches = (self.split.batch(self.windows, blocks, self.block_size) for blocks in groups)
        return measure(model, batches, self.token_bytes)


def sliding_windows(tokens: np.ndarray, context: int, stride: int, batch_tokens: int = 16384) -> Iterator[dict]:
    """Batches in which each token but the first is a target once. Windows of `context` tokens advance by `stride`; a
    token is scored in the first window that holds it, given all of that window before it. At a stride of `context`, a
    window has one more token, its last target, as a window's first token is not scored in it."""
    width, n = context + (stride == context), len(tokens)
    # (begin, end, first target that is scored)
    jobs = [(i, min(i + width, n), i + width - stride if i else 1) for i in range(0, n - 1, stride)]
    jobs = [job for job in jobs if job[1] > job[2]]
    batch_size = max(1, batch_tokens // context)
    with progress_bar(total=n - 1, unit=" tokens", desc="eval") as bar:
        for group in (jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)):
            rows = [torch.from_numpy(tokens[begin:end].astype(np.int64)) for begin, end, _ in group]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
            idx, targets = padded[:, :-1].clamp(min=0), padded[:, 1:]
            for row, (begin, _, first) in zip(targets, group, strict=True):
                row[: first - begin - 1] = -1
            yield {"idx": idx, "targets": targets}
            bar.update(sum(end - first for _, end, first in group))


def evaluate_text(opened: Opened, tokens: np.ndarray, context: int, stride: int, where: str) -> dict[str, float]:
    """What measure returns, and word_perplexity (words split at white space)."""
    if len(tokens) < 2:
        raise UserError(f"{where} has {len(tokens)} token(s): at least 2 are needed, one to predict the other from")
    tokenizer = opened.tokenizer
    found = measure(opened.model, sliding_windows(tokens, context, stride), tokenizer.token_bytes())
    documents = np.split(tokens, np.flatnonzero(np.isin(tokens, list(tokenizer.special.values()))))
    words = sum(len(tokenizer.without_special(tokenizer.decode(d.tolist())).split()) for d in documents)
    tokens = found.pop("tokens")
    return {**found, "word_perplexity": perplexity(found["loss"] * tokens, words), "tokens": tokens}


def evaluate_tasks(opened: Opened, tasks: list[str], a: Any) -> list[dict[str, Any]]:
    """Result rows of EleutherAI's lm-eval, whose own Hugging Face model opens an export of ours."""
    lm_eval = need("lm_eval", "eval --tasks", "lm-eval transformers accelerate")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=a.include_path)
    if wrong := next((task for task in tasks if task not in manager.all_tasks), None):
        raise UserError(f"lm-eval has no task {wrong!r}{nearest(wrong, manager.all_tasks)}")
    with tempfile.TemporaryDirectory(prefix="model.py-") as folder:
        export_hf(opened, Path(folder), torch.float32, "100GB", "")
        options = dict(batch_size=a.batch_size, device=str(opened.model.device), limit=a.limit, bootstrap_iters=0)
        arguments = f"pretrained={folder},dtype={a.dtype}"
        results = lm_eval.simple_evaluate("hf", arguments, tasks=tasks, task_manager=manager, **options)["results"]
    rows = []
    for task, values in results.items():
        values = {k: v for k, v in values.items() if "," in k and "stderr" not in k and isinstance(v, (int, float))}
        names = [k.split(",")[0] for k in values]  # of metric,filter: with the filter if there are several
        keys = [name if names.count(name) == 1 else key for name, key in zip(names, values, strict=True)]
        rows.append({"model": str(opened.path), "task": task, **dict(zip(keys, values.values(), strict=True))})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Hugging Face in and out
# ----------------------------------------------------------------------------------------------------------------------

# Our GPT in transformers' terms; every table is used in both directions. Settings: our name, theirs, and the default
# where config.json lacks it (None: it is required).

HF_ROTARY = dict(
    n_embd=("hidden_size", None), n_layer=("num_hidden_layers", None), n_head=("num_attention_heads", None),
    n_inner=("intermediate_size", None), block_size=("max_position_embeddings", None),
    attn_pdrop=("attention_dropout", 0.0), tie_word_embeddings=("tie_word_embeddings", False),
)  # fmt: skip
HF_LLAMA = HF_ROTARY | dict(
    n_kv_head=("num_key_value_heads", 0), norm_eps=("rms_norm_eps", 1e-6), activation=("hidden_act", "silu"),
    rope_theta=("rope_theta", 10000.0),
)  # fmt: skip
HF_SETTINGS = {
    "gpt2": dict(
        block_size=("n_positions", None), n_embd=("n_embd", None), n_layer=("n_layer", None), n_head=("n_head", None),
        n_inner=("n_inner", 0), activation=("activation_function", "gelu_new"), norm_eps=("layer_norm_epsilon", 1e-5),
        resid_pdrop=("resid_pdrop", 0.1), embd_pdrop=("embd_pdrop", 0.1), attn_pdrop=("attn_pdrop", 0.1),
        tie_word_embeddings=("tie_word_embeddings", True),
    ),
    "gpt_neox": HF_ROTARY | dict(
        activation=("hidden_act", "gelu"), norm_eps=("layer_norm_eps", 1e-5), resid_pdrop=("hidden_dropout", 0.0),
        parallel_residual=("use_parallel_residual", True), rope_theta=("rotary_emb_base", 10000.0),
        rope_pct=("rotary_pct", 0.25),
    ),
    "llama": HF_LLAMA | dict(head_dim=("head_dim", 0)),
    "qwen2": HF_LLAMA,
    "qwen3": HF_LLAMA | dict(head_dim=("head_dim", 128)),
    "nanochat": HF_LLAMA | dict(activation=("hidden_act", "relu2"), logit_softcap=("final_logit_softcapping", 15.0)),
}  # fmt: skip
HF_FIXED = {  # their settings that must have this value, or the model is refused
    "gpt2": dict(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, reorder_and_upcast_attn=False),
    "gpt_neox": dict(attention_bias=True), "llama": {}, "qwen2": dict(use_sliding_window=False),
    "qwen3": dict(attention_bias=False, use_sliding_window=False), "nanochat": dict(attention_bias=False),
}  # fmt: skip
HF_CLASSES = {
    "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "nanochat": "NanoChatForCausalLM",
}  # fmt: skip
HF_BIASES = {(False, False): "none", (True, False): "attn", (True, True): "all"}  # llama's (attention_bias, mlp_bias)
HF_GATED = {"swiglu": "silu", "geglu": "gelu"}  # a GLU is named after the activation of its gate
HF_ROPE = {  # rope_type -> its keys, which are our settings without rope_
    "default": (), "linear": ("factor",), "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip

# Tensors: our name and theirs, in gpt2, gpt_neox, the llama family and nanochat; {} is the block, and a bias goes with
# its weight. After a colon, how theirs differs. T: stored as (in, out) (GPT-2's Conv1D); heads: q, k and v of a head
# are adjacent; neg: rotated by -theta, so the second half of each head is negated; q, k, v, gate, up: these rows of our
# fused matrix.
HF_TENSORS = """
{}              transformer.h     gpt_neox.layers                     model.layers           model.layers
wte             transformer.wte   gpt_neox.embed_in                   model.embed_tokens     model.embed_tokens
wpe             transformer.wpe   -                                   -                      -
{}.norm_1       {}.ln_1           {}.input_layernorm                  {}.input_layernorm     -
{}.attn.qkv     {}.attn.c_attn:T  {}.attention.query_key_value:heads  {}.self_attn.q_proj:q  {}.self_attn.q_proj:q:neg
{}.attn.qkv     -                 -                                   {}.self_attn.k_proj:k  {}.self_attn.k_proj:k:neg
{}.attn.qkv     -                 -                                   {}.self_attn.v_proj:v  {}.self_attn.v_proj:v
{}.attn.q_norm  -                 -                                   {}.self_attn.q_norm    -
{}.attn.k_norm  -                 -                                   {}.self_attn.k_norm    -
{}.attn.proj    {}.attn.c_proj:T  {}.attention.dense                  {}.self_attn.o_proj    {}.self_attn.o_proj
{}.norm_2       {}.ln_2           {}.post_attention_layernorm         {}.post_attention_layernorm  -
{}.mlp.fc       {}.mlp.c_fc:T     {}.mlp.dense_h_to_4h                {}.mlp.gate_proj:gate  {}.mlp.fc1
{}.mlp.fc       -                 -                                   {}.mlp.up_proj:up      -
{}.mlp.proj     {}.mlp.c_proj:T   {}.mlp.dense_4h_to_h                {}.mlp.down_proj       {}.mlp.fc2
norm_f          transformer.ln_f  gpt_neox.final_layer_norm           model.norm             -
lm_head         lm_head           embed_out                           lm_head                lm_head
"""


def hf_tensors(c: GPTConfig) -> Iterator[tuple[str, str, slice, list[str]]]:
    """Every tensor of a model: its name in transformers, ours, the rows of ours, and how their layouts differ."""
    q, kv, n, shapes = c.n_head * c.head_dim, c.n_kv_head * c.head_dim, c.n_inner, parameter_shapes(c)
    rows = {"q": slice(q), "k": slice(q, q + kv), "v": slice(q + kv, None), "gate": slice(n), "up": slice(n, None)}
    rows |= {"wte": slice(c.vocab_size), "lm_head": slice(c.vocab_size)}
    column = {"gpt2": 1, "gpt_neox": 2, "nanochat": 4}.get(c.arch, 3)
    (_, block), *lines = [(words[0], words[column]) for words in map(str.split, HF_TENSORS.strip().splitlines())]
    for ours, theirs in lines:
        theirs, *how = theirs.split(":")
        part = rows.get(how[0] if how else ours, slice(None))
        for i, kind in itertools.product(range(c.n_layer if "{}" in ours else 1), ("weight", "bias")):
            if theirs != "-" and (name := f"{ours}.{kind}".format(f"blocks.{i}")) in shapes:
                yield f"{theirs}.{kind}".format(f"{block}.{i}"), name, part, how


def hf_layout(x: Tensor, how: list[str], c: GPTConfig, back: bool = False) -> Tensor:
    """Our tensor in transformers' layout (see HF_TENSORS), or `back` in ours."""
    if "T" in how:
        return x.t()
    if "heads" in how:  # (3, heads, head_dim, ...) <-> (heads, 3, head_dim, ...)
        first = (c.n_head, 3) if back else (3, c.n_head)
        return x.unflatten(0, (*first, c.head_dim)).transpose(0, 1).flatten(0, 2)
    if "neg" in how:
        first, second = x.unflatten(0, (-1, 2, c.head_dim // 2)).unbind(1)
        return torch.stack((first, -second), 1).flatten(0, 2)
    return x


def hf_rope(c: GPTConfig) -> dict[str, Any]:
    """transformers' rope_parameters. NTK-aware scaling is a larger theta and needs no scaling there."""
    kind = c.rope_scaling if c.rope_scaling in HF_ROPE else "default"
    growth = c.rope_factor ** (c.rope_dim / (c.rope_dim - 2)) if c.rope_scaling == "ntk" else 1.0
    rope = {"rope_type": kind, "rope_theta": c.rope_theta * growth}
    rope |= {key: getattr(c, f"rope_{key}") for key in HF_ROPE[kind]}
    if kind in ("yarn", "llama3"):
        rope["original_max_position_embeddings"] = c.rope_original_block_size or c.block_size
    if kind == "yarn":
        rope["attention_factor"] = rope_frequencies(c)[1]
    if c.arch == "gpt_neox":
        rope["partial_rotary_factor"] = c.rope_pct
    return rope


def rope_from_hf(j: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Our RoPE settings from a config.json of any transformers version; `values` holds all but the scaling."""
    rope = {"rope_theta": values["rope_theta"], "partial_rotary_factor": values.get("rope_pct")}
    said = j.get("rope_scaling") or j.get("rope_parameters") or {}  # given both, transformers 4 and 5 use the first
    rope.update({k: v for k, v in said.items() if v is not None})
    kind = rope.get("rope_type", rope.get("type", "default"))  # of any JSON type, hence the list below
    if kind not in [*HF_ROPE] or kind != "yarn" and {*HF_ROPE[kind]} - rope.keys() or not rope.get("truncate", True):
        raise UserError(f"RoPE scaling {said} is not supported: only linear, yarn (truncated) and llama3, in full, are")
    block_size = values["block_size"]
    original = j.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if kind == "yarn":
        rope.setdefault("factor", block_size / (original or block_size))  # null: the ratio of the two lengths
        if rope.get("mscale") and rope.get("mscale_all_dim"):  # DeepSeek's
            over, under = (0.1 * rope[k] * math.log(rope["factor"]) + 1 for k in ("mscale", "mscale_all_dim"))
            rope.setdefault("attention_factor", over / under)
    ours = {f"rope_{k}": rope[k] for k in HF_ROPE[kind] if k in rope} | {"rope_theta": rope["rope_theta"]}
    if kind != "default":
        context = int(block_size / rope["factor"]) if kind == "linear" else block_size
        ours.update(rope_scaling=kind, rope_original_block_size=original or context)
    return ours | ({"rope_pct": rope["partial_rotary_factor"]} if "rope_pct" in values else {})


def hf_config(c: GPTConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json for both transformers 5 (rope_parameters, dtype) and 4 (rope_theta, rope_scaling, torch_dtype)."""
    rope, activation = hf_rope(c), HF_GATED.get(c.activation, c.activation)
    values = vars(c) | dict(block_size=c.context, activation=activation, rope_theta=rope["rope_theta"])
    values["logit_softcap"] = c.logit_softcap or None
    config = {
        "architectures": [HF_CLASSES[c.arch]], "model_type": c.arch, "dtype": dtype, "torch_dtype": dtype,
        "vocab_size": c.vocab_size, "initializer_range": 0.02, "use_cache": True, **special_ids(tokenizer),
        **{theirs: values[ours] for ours, (theirs, _) in HF_SETTINGS[c.arch].items()}, **HF_FIXED[c.arch],
    }  # fmt: skip
    if c.arch == "llama":
        config.update(attention_bias=c.bias in ("attn", "all"), mlp_bias=c.bias == "all")
    if c.arch != "gpt2":
        scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
        config.update(rope_parameters=rope, rope_theta=rope["rope_theta"])
        config["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    return config


def config_from_hf(j: Any, path: Path) -> GPTConfig:
    """The GPTConfig of a transformers config.json. Raises UserError for what this GPT does not support."""
    arch = j.get("model_type") if isinstance(j, dict) else None
    if arch not in list(ARCHS):
        raise UserError(f"{path}: model_type {arch!r} is not supported: only {', '.join(ARCHS)} are")
    with told_as(str(path), Exception, UserError):
        j = {"n_positions": j.get("n_ctx"), **j}
        values = {**ARCHS[arch], "arch": arch, "vocab_size": j.get("vocab_size")}
        for ours, (theirs, default) in HF_SETTINGS[arch].items():
            value = j.get(theirs, default)
            if value is None and default is None:
                raise UserError(f"it has no {theirs}")
            values[ours] = 0 if value is None else value  # null: from the width, or off
        for theirs, fixed in HF_FIXED[arch].items():
            if j.get(theirs, fixed) != fixed:
                raise UserError(f"{theirs} {j[theirs]} is not supported")
        if set(j.get("layer_types") or []) - {"full_attention"}:
            raise UserError("sliding windows are not supported")
        named, gated = values["activation"], ARCHS[arch]["activation"] in HF_GATED
        same = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}.get(named, named)
        known = [a for a in ACTIVATIONS if HF_GATED.get(a, a) == same and (a in HF_GATED) == gated]
        if not known:
            raise UserError(f"activation {named!r} is not supported in a {arch}")
        values["activation"] = known[0]
        if arch == "llama":
            values["bias"] = HF_BIASES.get((bool(j.get("attention_bias")), bool(j.get("mlp_bias"))), "of the MLP alone")
        return GPTConfig(**{**values, **(rope_from_hf(j, values) if arch != "gpt2" else {})})


def check_exportable(c: GPTConfig, tokenizer: Tokenizer) -> None:
    """Raise UserError, naming the setting, if transformers' class of this architecture cannot represent this model,
    that is, if its config.json does not round-trip. Training settings may differ, and how RoPE's scaling is written."""
    back = config_from_hf(hf_config(c, tokenizer, "float32"), Path(f"a Hugging Face {c.arch}"))
    if c.arch == "llama" and c.n_embd % c.n_head:  # transformers' class refuses it
        raise UserError(f"n_embd {c.n_embd} is not divisible by n_head {c.n_head}, as a Hugging Face llama must be")
    for name, ours in vars(c).items():
        free = name in ("block_size", "init", *LOOP) or name.startswith("rope_") and name != "rope_pct"
        if not free and ours != (theirs := getattr(back, name)):
            raise UserError(f"{name} {ours} cannot be exported: Hugging Face's {c.arch} has {name} {theirs}")
    if c.rope_scaling == "yarn" and c.context != (c.rope_original_block_size or c.block_size) * c.rope_factor:
        # transformers 4 takes the factor from the two lengths
        raise UserError(f"rope_scaling yarn with rope_factor {c.rope_factor} cannot be exported")


HF_ALIASES = {
    "120M": "openai-community/gpt2", "300M": "openai-community/gpt2-medium", "700M": "openai-community/gpt2-large",
    "1B": "openai-community/gpt2-xl",
}  # fmt: skip


def hub_directory(name: str) -> Path:
    """The local copy of a Hub model, `owner/name` or `owner/name@revision`, fetched if there is none yet."""
    import huggingface_hub

    repo, _, revision = name.partition("@")
    wanted = ["*.json", "*.safetensors", "*.jinja"]
    get = functools.partial(huggingface_hub.snapshot_download, repo, revision=revision or None, allow_patterns=wanted)
    with suppress(Exception):  # missing, or incomplete
        folder = Path(get(local_files_only=True))
        if all(p.exists() for p in (folder / "config.json", folder / "tokenizer.json", *safetensors_files(folder))):
            return folder
    with told_as(f"{name} is not a local checkpoint, and could not be downloaded from the Hub"):
        return Path(get())  # with its own progress bar


def safetensors_files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face directory: one, or the shards of its index."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists():  # as in transformers, which leaves an index of earlier shards beside it
        return [whole]
    if index.exists():
        content = read_json(index)
        shards = content.get("weight_map") if isinstance(content, dict) else None
        if not is_a(shards, dict[str, str]) or not all(Path(name).name == name for name in shards.values()):
            raise UserError(f"{index} has no weight_map that names the files beside it")
        return [folder / name for name in sorted(set(shards.values()))]
    pickled = "; pytorch_model.bin is pickled and can run code: convert it to safetensors"
    raise UserError(f"{folder} has no {whole.name}{pickled * (folder / 'pytorch_model.bin').exists()}")


HF_BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def load_hf_model(folder: Path, device: torch.device | str = "cpu", as_stored: bool = False, **overrides: Any) -> GPT:
    """A GPT with the weights of a Hugging Face directory, read tensor by tensor into place, in float32 or, those of 16
    bits, as they are stored. A head among them that differs from the embedding is used, whatever config.json says of
    ties, as in transformers 5."""
    from safetensors import SafetensorError, safe_open

    said = replace(config_from_hf(read_json(folder / "config.json"), folder / "config.json"), **overrides)
    config, digests = replace(said, tie_word_embeddings=False), export_digests(folder)
    state, shapes, wanted = {}, parameter_shapes(config), {theirs: rest for theirs, *rest in hf_tensors(config)}
    prefix = next(iter(wanted)).partition(".")[0]  # missing in checkpoints of the bare transformer
    for file in safetensors_files(folder):
        if digests.get(file.name) and file.exists() and file_digest(file) != digests[file.name]:
            raise UserError(f"{file} is not as export wrote it: damaged, or, if you changed it, remove {EXPORT_LIST}")
        with told_as(f"cannot read {file}", SafetensorError, FileNotFoundError), safe_open(file, "pt") as f:
            for name in f.keys():
                if name.endswith(HF_BUFFERS):
                    continue
                key = name if name in wanted else f"{prefix}.{name}"
                if key not in wanted:
                    raise UserError(f"{file}: tensor {name} does not belong in a {config.arch} with this config.json")
                ours, rows, how = wanted.pop(key)
                expected = list(hf_layout(torch.empty(shapes[ours], device="meta")[rows], how, config).shape)
                if expected != (theirs := f.get_slice(name).get_shape()):
                    raise UserError(f"{file}: tensor {name} has shape {theirs}, but config.json says {expected}")
                part = f.get_tensor(name)
                kept = as_stored and part.dtype in (torch.float16, torch.bfloat16)  # not float8, not integers
                dtype = part.dtype if kept else torch.float32
                if ours not in state:  # allocate only what is present; padding rows stay 0
                    state[ours] = torch.zeros(shapes[ours], dtype=dtype, device=device)
                state[ours] = state[ours].to(torch.promote_types(state[ours].dtype, dtype))
                state[ours][rows].copy_(hf_layout(part, how, config, back=True))
    tied = said.tie_word_embeddings
    if missing := [name for name, (ours, *_) in wanted.items() if not (tied and ours == "lm_head.weight")]:
        raise UserError(f"{folder}: tensor {missing[0]} is missing from the weights ({len(missing)} in all)")
    if tied and ("lm_head.weight" not in state or torch.equal(state["lm_head.weight"], state["wte.weight"])):
        state.pop("lm_head.weight", None)
        config = said
    return build_model(config, state, folder)


def add_chat_tokens(model: GPT, tokenizer: Tokenizer) -> tuple[Tokenizer, list[int]]:
    """The tokenizer with <|im_start|> and <|im_end|>, which a base model from the Hub may lack, and the new ids. Their
    rows in the embedding and the head start near the mean of all others, each a little different."""
    if chat_template(tokenizer) is not None:
        return tokenizer, []
    backend, new = tokenizer.backend, [t for t in (IM_START, IM_END) if t not in tokenizer.vocab]
    backend.add_special_tokens(new)
    special = {**tokenizer.special, **{t: backend.token_to_id(t) for t in (IM_START, IM_END)}}
    made = Tokenizer({**tokenizer.spec, "json": backend.to_str(), "special": special})
    ids, old = [special[t] for t in new], model.config.vocab_size
    if taken := sorted(t for t, i in tokenizer.vocab.items() if i in ids):
        raise UserError(f"{tokenizer.name} cannot have chat tokens: its ids have gaps, and {taken[0]!r} is in the way")
    model.config = c = replace(model.config, vocab_size=max(old, made.n_vocab))
    for module in filter(None, (model.wte, model.lm_head)):
        known = module.weight.data[:old]
        mean, std = known.mean(dim=0), known.std(dim=0)
        rows = torch.cat([known, mean.expand(c.padded_vocab_size - old, -1)])
        rows[ids] = mean + 0.1 * std * torch.randn(len(ids), c.n_embd, device=rows.device)
        module.weight = nn.Parameter(rows)
    return made, ids


def special_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    """bos, eos and pad ids for config.json."""
    s, vocab = tokenizer.fields, tokenizer.vocab
    eos = vocab.get(s.eos_token, tokenizer.special.get(EOT, tokenizer.special.get(IM_END)))
    bos = vocab.get(s.bos_token, tokenizer.bos[0] if tokenizer.bos else eos)
    return {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": vocab.get(s.pad_token, eos)}


def export_tokenizer(tokenizer: Tokenizer, folder: Path, c: GPTConfig) -> None:
    """Write tokenizer.json and the files that go with it."""
    ids, s = special_ids(tokenizer), tokenizer.fields
    (folder / "tokenizer.json").write_text(s.json or tokenizer.backend.to_str(), encoding="utf-8", newline="\n")
    bos, eos, pad = (None if i is None else tokenizer.backend.id_to_token(i) for i in ids.values())
    if not (tokenizer.is_ours or s.bos_token or tokenizer.bos):
        bos = None  # templates test for it
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, "pad_token": pad,
        "unk_token": s.unk_token or (eos if tokenizer.is_ours else None), "model_max_length": c.context,
        "clean_up_tokenization_spaces": False,
        # without this, transformers 5 opens every qwen2 with Qwen's own split and NFC instead of the tokenizer.json
        **({"trust_remote_code": True} if c.arch == "qwen2" else {}),
    })  # fmt: skip
    write_json(folder / "generation_config.json", {**ids, "eos_token_id": tokenizer.ends})
    if template := chat_template(tokenizer):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="\n")


def export_hf(opened: Opened, folder: Path, dtype: torch.dtype, max_shard_size: str, name: str) -> float:
    """Write a directory that transformers opens natively, read it back, and return the largest difference between its
    logits and the model's at that precision."""
    import huggingface_hub

    tokenizer, c, state = opened.tokenizer, opened.model.config, opened.model.state_dict()
    check_exportable(c, tokenizer)
    tensors = {
        theirs: hf_layout(state[ours][rows].to(dtype), how, c).clone(memory_format=torch.contiguous_format)
        for theirs, ours, rows, how in hf_tensors(c)
    }
    with told_as(f"max_shard_size {max_shard_size!r} is not a size: write 5GB, 200MB or a number of bytes", ValueError):
        size = int(max_shard_size) if max_shard_size.isdigit() else max_shard_size
        huggingface_hub.save_torch_state_dict(tensors, folder, max_shard_size=size)
    write_json(folder / "config.json", hf_config(c, tokenizer, str(dtype).removeprefix("torch.")))
    for file in folder.glob("*.safetensors"):  # safetensors makes them readable only by their owner
        shutil.copymode(folder / "config.json", file)
    export_tokenizer(tokenizer, folder, c)
    (folder / "README.md").write_text(model_card(opened, name), encoding="utf-8", newline="\n")
    rounded = {k: v.to(dtype).float() for k, v in state.items()}
    again, same = load_hf_model(folder).eval(), build_model(c, rounded, folder).eval()
    idx = torch.arange(min(64, c.block_size)).remainder(c.vocab_size)[None]
    with torch.no_grad():
        difference = (again(idx) - same(idx)).abs().max().item()
    if wide := next((name for name, x in tensors.items() if not x.isfinite().all()), None):
        raise UserError(f"{wide} has values that {str(dtype)[6:]} cannot hold: use --dtype bfloat16 or float32")
    if not difference <= 1e-3:
        raise RuntimeError(f"the export read back differs from the model by {difference} in its logits")
    return difference


def model_card(opened: Opened, name: str) -> str:
    """The README.md of an export, with the metadata that the Hub reads."""
    from huggingface_hub import EvalResult, ModelCardData

    c, checkpoint, quoted, trained = opened.model.config, opened.checkpoint, json.dumps(name, ensure_ascii=False), ""
    card = ModelCardData(library_name="transformers", pipeline_tag="text-generation")
    if checkpoint and checkpoint.data:
        parts = [part.rpartition(":")[0] for part in checkpoint.data.get("parts", [])]  # of a mixture: PATH:WEIGHT
        paths = [Path(path) for path in parts or [checkpoint.data["path"]]]
        names = [(path.parent if path.suffix == ".bin" else path).name for path in paths]
        card.datasets = [re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII) for name in names]  # all that the Hub accepts
        dataset, metrics = " + ".join(names), checkpoint.metrics.get("last", {})
        trained = f"Trained with `{shlex.join(['python', 'model.py', *checkpoint.arguments])}`"
        if "val_loss" in metrics:
            loss, ppl = round(metrics["val_loss"], 4), round(metrics["val_ppl"], 4)
            trained += f": validation loss {loss:.4f}, perplexity {ppl:.2f}"
            about = dict(task_type=card.pipeline_tag, dataset_type="-".join(card.datasets), dataset_name=dataset)
            card.model_name, card.eval_results = name, [
                EvalResult(**about, metric_type="loss", metric_name="validation loss", metric_value=loss),
                EvalResult(**about, metric_type="perplexity", metric_name="perplexity", metric_value=ppl),
            ]  # fmt: skip
    return f"""---
{card.to_yaml()}
---

# {name}

A {c.arch} language model of {count_parameters(c):,} parameters: {c.n_layer} layers, {c.n_head} heads,
width {c.n_embd}, context {c.context}. {trained}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({quoted})
model = AutoModelForCausalLM.from_pretrained({quoted})
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""


GGUF_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q5_0": 8, "bf16": 32}  # llama.cpp's numbers of file types


def export_gguf(opened: Opened, path: Path, kind: str, name: str) -> None:
    """Write one GGUF file for llama.cpp with the gguf package. Matrices are stored as `kind`; vectors stay f32."""
    gguf = need("gguf", "export --format gguf")
    tokenizer, c, state = opened.tokenizer, opened.model.config, opened.model.state_dict()
    check_exportable(c, tokenizer)
    yarn = c.rope_scaling == "yarn"
    refused = {
        f"activation {c.activation}": c.arch == "nanochat" or c.activation not in ("gelu", "gelu_new", "swiglu"),
        "biases in the MLP": c.arch == "llama" and c.bias == "all",
        f"rope_pct {c.rope_pct}": c.pos_embd == "rope" and not c.rope_dim,  # it never returns
        "rope_scaling llama3": c.arch != "llama" and c.rope_scaling == "llama3",
        "rope_beta_fast, rope_beta_slow other than 32, 1": yarn and (c.rope_beta_fast, c.rope_beta_slow) != (32, 1),
    }
    if wrong := next((what for what, is_so in refused.items() if is_so), None):
        raise UserError(f"llama.cpp has no {c.arch} with {wrong}")
    keys = dict(
        name=name, context_length=c.context, embedding_length=c.n_embd, block_count=c.n_layer,
        feed_forward_length=c.n_inner, head_count=c.n_head, head_count_kv=c.n_kv_head, vocab_size=c.vocab_size,
        key_length=c.head_dim, value_length=c.head_dim,
    )  # fmt: skip
    keys["layer_norm_eps" if c.norm == "layernorm" else "layer_norm_rms_eps"] = c.norm_eps
    rope = hf_rope(c)
    if c.pos_embd == "rope":
        keys.update(rope_dimension_count=c.rope_dim, rope_freq_base=rope["rope_theta"])
    if c.rope_scaling in ("linear", "yarn"):
        keys["rope_scaling_type"], keys["rope_scaling_factor"] = gguf.RopeScalingType(c.rope_scaling), c.rope_factor
    if yarn:  # llama.cpp multiplies by 0.1 ln(factor) + 1 itself
        keys["rope_scaling_orig_ctx_len"] = rope["original_max_position_embeddings"]
        keys["rope_scaling_attn_factors"] = rope["attention_factor"] / (0.1 * math.log(c.rope_factor) + 1)
    if c.arch == "gpt_neox":
        keys["parallel_residual"] = c.parallel_residual
    keys.update(file_type=GGUF_TYPES[kind], **gguf_tokenizer(tokenizer, c))
    arch = gguf.MODEL_ARCH[c.arch.replace("_", "").upper()]
    w = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    for key, value in keys.items():
        getattr(w, f"add_{key}")(value)

    def put(key: str, x: Tensor) -> None:
        small = x.dim() == 1 or (kind.startswith("q") and x.size(-1) % 32)
        q = gguf.GGMLQuantizationType["F32" if small else kind.upper()]
        w.add_tensor(key, gguf.quants.quantize(x.float().contiguous().numpy(), q), raw_dtype=q)

    names = gguf.get_tensor_name_map(arch, c.n_layer)
    for theirs, ours, rows, how in hf_tensors(c):  # (out, in), with q, k and v apart, as ours
        x = state[ours][rows]
        if c.arch == "llama" and how in (["q"], ["k"]):  # its llama rotates neighbours (2i, 2i + 1)
            x = x.unflatten(0, (-1, 2, c.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        put(names.get_name(theirs, try_suffixes=(".weight", ".bias")), x)
    if c.arch == "gpt_neox" and c.tie_word_embeddings:  # llama.cpp's is never tied
        put("output.weight", state["wte.weight"][: c.vocab_size])
    if c.rope_scaling == "llama3":  # what each frequency is divided by
        put("rope_freqs.weight", rope_frequencies(replace(c, rope_scaling="none"))[0] / rope_frequencies(c)[0])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


# ChatML as a Go template, which Ollama fills in.
OLLAMA_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
"""


def modelfile(tokenizer: Tokenizer, gguf: str) -> str:
    """Ollama's Modelfile for a GGUF file beside it, for `ollama create NAME -f Modelfile`. Chat templates other than
    ChatML are left for Ollama to find in the GGUF."""
    template = f'TEMPLATE """{OLLAMA_CHATML}"""\n' if chat_template(tokenizer) == CHATML else ""
    stops = "".join(f'PARAMETER stop "{tokenizer.bytes_of(i).decode()}"\n' for i in tokenizer.ends)
    sampling = "".join(f"PARAMETER {k} {getattr(SamplingSettings, k)}\n" for k in ("temperature", "min_p"))
    return f"FROM ./{gguf}\n{template}{stops}{sampling}"


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GGUF_SPLITS = {  # how a text is split before merging -> llama.cpp's name for it
    ("GPT-2",): "gpt-2", ("digits", "GPT-2"): "smollm", (WORDS + r"\p{N}" + SPACES,): "qwen2",
    (WORDS + r"\p{N}{1,3}" + SPACES,): "llama-bpe", (): "gpt-2",
}  # fmt: skip


def gguf_tokenizer(tokenizer: Tokenizer, c: GPTConfig) -> dict[str, Any]:
    """The vocabulary, merges, special tokens and chat template, as arguments of GGUFWriter's add_... methods."""
    import gguf

    j, types = json.loads(tokenizer.backend.to_str()), gguf.TokenType
    if j["model"]["type"] != "BPE" or not tokenizer.byte_level:
        raise UserError(f"tokenizer {tokenizer.name} is not a byte-level BPE, the only kind that export writes to GGUF")
    if (j["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # Qwen's, which llama.cpp skips
        raise UserError(f"tokenizer {tokenizer.name} has a normalizer, {j['normalizer']['type']}; llama.cpp has none")
    added = {} if tokenizer.is_ours else tokenizer.added  # found in a text before it is split, and kept as they are
    if odd := next((t.content for t in added.values() if t.lstrip or t.rstrip or t.single_word), None):
        say(f"warning: llama.cpp ignores lstrip, rstrip, single_word: ids beside {odd!r} may differ", sys.stderr)
    steps, split = [], j["pre_tokenizer"] or {"pretokenizers": []}
    for p in split.get("pretokenizers", [split]):
        if p["type"] != "ByteLevel":
            steps.append("digits" if p.get("individual_digits") else p.get("pattern", {}).get("Regex", ""))
        elif p["use_regex"] and not p["add_prefix_space"]:
            steps.append("GPT-2")
    if tuple(steps) not in GGUF_SPLITS or not steps and tokenizer.kind != "byte":
        raise UserError(f"tokenizer {tokenizer.name} splits text in a way that llama.cpp does not support: {steps}")
    token_of, bos = {i: t for t, i in tokenizer.vocab.items()}, special_ids(tokenizer)["bos_token_id"]
    type_of = dict.fromkeys(token_of, types.NORMAL) | dict.fromkeys(added, types.USER_DEFINED)
    type_of |= dict.fromkeys(tokenizer.control.values(), types.CONTROL)
    keys = dict(
        tokenizer_model="gpt2", tokenizer_pre=GGUF_SPLITS[tuple(steps)],
        token_list=[token_of.get(i, f"[PAD{i}]") for i in range(c.vocab_size)],
        token_types=[type_of.get(i, types.UNUSED) for i in range(c.vocab_size)],
        token_merges=[" ".join(pair) for pair in j["model"]["merges"]] or ["☃ ☃"],  # it needs some: not of bytes
        bos_token_id=None if tokenizer.eot is None else bos, eos_token_id=tokenizer.eot,
        eot_token_id=next((i for i in tokenizer.ends if i != tokenizer.eot), None), add_bos_token=bool(tokenizer.bos),
        chat_template=chat_template(tokenizer),
    )  # fmt: skip
    return {key: value for key, value in keys.items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# Commands, each with its flags
# ----------------------------------------------------------------------------------------------------------------------

COMMANDS: dict[str, types.SimpleNamespace] = {}


def command(purpose: str, **recipe: Any) -> Callable:
    """Make a function a command. Its docstring is its help and, a line each, its examples. Its flags are the fields of
    its argument's dataclass, grouped by the docstrings of the bases that declare them; `recipe` holds its own defaults
    for settings declared elsewhere. Those of the purpose "train" begin a run, see run_training."""

    def register(run: Callable) -> Callable:
        about, *examples = inspect.cleandoc(run.__doc__).splitlines()
        known = dict(args=run.__annotations__["a"], purpose=purpose, about=about, examples=examples, recipe=recipe)
        called = functools.partial(run_training, run) if purpose == "train" else run
        COMMANDS[run.__name__] = types.SimpleNamespace(run=called, **known)
        return run

    return register


def optional(cls: type, *only: str, title: str = "") -> type:
    """Settings as optional flags: None if not given, for variants and recipes to fill in."""
    bases = []
    for base in cls.__mro__:
        flags = [(f.name, f.type | None, field(default=None, metadata={**f.metadata, "default": f.default}))
                 for f in fields(cls) if f.name in inspect.get_annotations(base)
                 and f.metadata["help"] and (not only or f.name in only)]  # fmt: skip
        if flags:
            bases.append(make_dataclass(f"{base.__name__}Flags", flags, namespace={"__doc__": title or base.__doc__}))
    return type("Flags", (*bases, Settings), {"__doc__": cls.__doc__})


def chosen(a: Any, cls: type) -> dict[str, Any]:
    """The settings of a dataclass that were given on the command line."""
    return {f.name: v for f in fields(cls) if (v := getattr(a, f.name, None)) is not None}


class TokenizerArgs(Settings):
    """data"""

    tokenizer: str | None = setting(None, "gpt2, bpe, byte, or a checkpoint, data or folder with one (default: gpt2)")
    vocab_size: int | None = setting(None, "vocabulary size for --tokenizer bpe (default: 8192)", ge=1, le=1 << 24)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vocab_size and self.tokenizer != "bpe":
            raise UserError("--vocab_size is for --tokenizer bpe: add that, or leave --vocab_size out")


class ModelArgs(Settings):
    """model"""

    model_checkpoint: str | None = setting(None, "a checkpoint, folder or Hub id (default: newest)", alias="model_path")
    variant: str | None = setting(None, "check that the model has this shape", VARIANTS)


GPTFlags, TrainFlags = optional(GPTConfig), optional(TrainConfig)
ContextArgs = optional(GPTConfig, "rope_scaling", "rope_factor", title="beyond the trained context")


def open_named_model(a: Any, device: torch.device | str = "cpu", spec: str | None = None, **overrides: Any) -> Opened:
    """Open the model that the command line names, with its context extended if asked for."""
    if a.rope_factor and not a.rope_scaling:
        raise UserError("--rope_factor needs --rope_scaling: linear, ntk, yarn or llama3")
    opened = open_model(spec or a.model_checkpoint, device, None if spec else a.variant, **overrides)
    if a.rope_scaling:
        opened.model.extend_context(rope_scaling=a.rope_scaling, rope_factor=a.rope_factor or 1.0)
    return opened


class DeviceArgs(Settings):
    """machine"""

    device: str = setting("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", "precision (auto on a CPU: float16 weights, float32 activations)", DTYPES)
    quantize: str | None = setting(None, "8-bit weights, CPU only, slightly less accurate", ("int8",))


# --- make data


class DatasetArgs(TokenizerArgs):
    """data"""

    dataset: str = setting("", "name of the folder to make under data/", required=True)
    overwrite: bool = setting(False, "replace an existing data folder of this name")

    @property
    def folder(self) -> Path:
        folder = DATA_DIR / self.dataset
        if folder.name != self.dataset or self.dataset.startswith("."):
            raise UserError(f"--dataset {self.dataset!r} must be a plain name, for a folder under {DATA_DIR}/")
        if (folder / "meta.json").exists() and not self.overwrite:
            raise UserError(f"{folder} already exists: choose another --dataset or add --overwrite")
        return folder


class TokenizeArgs(DatasetArgs, ChatFormat):
    """text"""

    txt: list[str] = setting([], "files, folders, http(s) URLs, - for stdin, or one file of records", required=True)
    encoding: str = setting("utf-8-sig", "encoding of the text (utf-8-sig: with or without a BOM)")
    errors: str = setting("strict", "what to do with bytes outside the encoding", ("strict", "ignore", "replace"))
    val_fraction: float = setting(0.1, "fraction held out for validation, at most 10M tokens", ge=0, lt=1)


@command("make data")
def tokenize(a: TokenizeArgs) -> None:
    """turn text or conversations into a data folder
    tokenize --dataset shakespeare --txt input.txt
    tokenize --dataset notes --txt ~/notes more.txt --tokenizer bpe --vocab_size 4096
    tokenize --dataset corpus --txt - --tokenizer byte < corpus.txt"""
    folder, tokenizer = a.folder, a.tokenizer or "gpt2"
    names = [source.partition("?")[0] if "://" in source else source for source in a.txt]  # without ?download=true
    if not any(Path(name).suffix.lower() in RECORD_FILES for name in names):
        tokenize_text(folder, a.txt, tokenizer, a.vocab_size, a.encoding, a.errors, a.val_fraction, a.overwrite)
        return
    if a.encoding.lower() not in ("utf-8", "utf8", "utf-8-sig") or a.errors != "strict":
        raise UserError("--encoding and --errors are for text: records must be UTF-8")
    if len(a.txt) > 1:
        raise UserError("only one file of records at a time: put several into a folder and use hf_tokenize")
    records = Records(a.chat_format, a.train_on_all, a.skip_bad, names[0], val_fraction=a.val_fraction)
    tokenize_records(folder, records, tokenizer, a.vocab_size, a.overwrite)


class HFTokenizeArgs(DatasetArgs, Records):
    """Hugging Face data set"""


@command("make data")
def hf_tokenize(a: HFTokenizeArgs) -> None:
    """turn a Hugging Face data set into a data folder
    hf_tokenize --hf_dataset roskoN/dailydialog --hf_text_column utterances --dataset dailydialog_train
    hf_tokenize --hf_dataset ./parquet_folder --hf_text_column text --dataset corpus --num_proc 2
    hf_tokenize --hf_dataset HuggingFaceFW/fineweb-edu --streaming --max_tokens 100000000 --dataset fineweb"""
    if not a.hf_dataset:
        raise UserError("hf_tokenize needs --hf_dataset: a data set on the Hub, or a local folder or file")
    tokenize_records(a.folder, a, a.tokenizer or "gpt2", a.vocab_size, a.overwrite)


# --- train


class RunArgs(Settings):
    """run"""

    data: list[str] = setting([], "names under data/, folders or files (default: newest); a mixture: NAME:WEIGHT ...")
    name: str | None = setting(None, "checkpoints/NAME_model.pt (default: named after the variant or model)")
    resume: str = setting("false", "continue the run of this --name (auto: if it exists)", ("false", "true", "auto"))
    overwrite: bool = setting(False, "replace an existing run of this name")

    def data_in(self, tokenizer: Tokenizer) -> Data:
        """Open the data that the command line names, with a tokenizer."""
        return open_all(self.data, tokenizer)


def default_name(a: Any, kind: str) -> str:
    """The name of a run without --name."""
    if kind == "train":
        return a.variant or "7M"
    if kind == "distill":
        return f"distilled_{a.student_variant or 'student'}"
    name, spec = a.variant, a.model_checkpoint
    if not name and spec and not spec.endswith(".pt"):
        name = Path(spec.partition("@")[0]).absolute().name
    if not name:
        name = find_checkpoint(spec).stem.removesuffix("_model")
        if not spec and a.resume != "false":  # the newest may be what the run itself has saved
            name = re.sub("^(hf_)?finetuned_", "", name)
    return f"{kind}d_{name}"


@processes()
def run_training(begin: Callable[[Any], dict[str, Any]], a: Any) -> None:
    """Run a training command, in the processes that torchrun set up, if any: the function that begins it returns the
    arguments of start_run, unless --resume finds them in the run's last state."""
    device, kind = choose_device(a.device or "auto"), begin.__name__
    reporters_in(a.report_to)  # reports mistakes before data is made
    if a.overwrite and a.resume != "false":
        raise UserError("--resume continues a run and --overwrite replaces it: give one of them")
    if len(lengths := [f"--{k}" for k in ("max_iters", "epochs", "max_minutes") if getattr(a, k)]) > 1:
        raise UserError(f"{' and '.join(lengths)} each set how long to train: give only one")
    if world_size() > 1 and device.type == "mps":
        raise UserError("several processes need NVIDIA GPUs or --device cpu: on a Mac, do not use torchrun")
    if world_size() > 1 and device.type == "cuda":
        torch.cuda.set_device(device)
    files = RunFiles(a.name or default_name(a, kind), a.overwrite)
    state = from_first(lambda: files.latest(a.resume))
    if not PREPARES:
        wait_for(f"prepared on {MACHINE}")
    known = resumed(a, kind, *state) if state else dict(begin(a), kind=kind, arguments=sys.argv[1:])
    block_size = known["block_size"]
    for who, gpt in (("model", known["model"]), ("teacher", known.get("teacher_model"))):
        if gpt is not None and (context := gpt.config.context) < block_size:
            raise UserError(f"the {who}'s context is {context} but the block is {block_size}: lower --block_size")
    if isinstance(a, FinetuneArgs) and not state:
        a.show_answer(known["model"], known["data"], "before")
    start_run(files, **known)
    if isinstance(a, FinetuneArgs):
        a.show_answer(known["model"], known["data"], "after")


def start_run(
    files: RunFiles, model: GPT, data: Data, t: TrainConfig, block_size: int, teacher_model: GPT | None = None,
    state: Checkpoint | None = None, recipe: str | None = None, **about: Any,
) -> None:  # fmt: skip
    """Train a new run, replacing one of this name, or resume from `state`. `about` is stored in checkpoints."""
    device, n = choose_device(t.device), world_size()
    micro_batch, rest = divmod(t.batch_size, t.grad_accum * n)
    if rest:
        raise UserError(f"batch_size {t.batch_size} is not divisible by grad_accum {t.grad_accum} times {n} processes")
    if device.type == "mps" and micro_batch * block_size > MPS_LONGEST_SUM:
        raise UserError(f"{micro_batch} x {block_size} tokens at once give wrong gradients on Macs: raise --grad_accum")
    if device.type == "cuda":  # cuDNN's attention gives non-finite gradients with masks (pytorch#196678)
        torch.backends.cuda.enable_cudnn_sdp(not data.is_chat)
    set_precision(model.to(device), t.dtype, training=True)
    loss_fn, teacher = language_modelling, (about.get("teacher") or {}).get("digest")
    if teacher_model is not None:
        teacher_model.to(model.compute_dtype).compute_dtype = model.compute_dtype
        loss_fn = make_distillation(teacher_model, data, block_size, teacher, about["distill"])
    all_prepared(data=[data.digest, data.tokenizer.digest], model=vars(model.config), settings=vars(t), teacher=teacher)
    shard_model(model, t.fsdp)
    with locked(files.run) if rank() == 0 else nullcontext():
        if state is None and rank() == 0:
            files.check_free()  # once more: the first check was before the data was made
        for path in (files.model, files.last, files.log) if rank() == 0 else ():  # what a kill left
            path.with_name(f".{path.name}.tmp").unlink(missing_ok=True)
        run = Run(model, data, t, files, block_size, loss_fn, {k: v for k, v in about.items() if v})
        if state is not None:
            with told_as(f"{files.last} is damaged, or was made by another model.py"):
                run.resume(state)
            run.mend_files(state)
            say(f"resuming {files.run.name} at step {state.step}")
        c, (train, val) = model.config, (len(data.splits[name].tokens) for name in ("train", "val"))
        name = f"{about['variant']}, {recipe} recipe" if recipe else about["variant"]
        say(f"{name}: {count_parameters(c):,} parameters ({c.arch}, vocabulary of {c.vocab_size:,})")
        say(f"data {data.path}: {train:,} tokens to train on, {val:,} held out for validation")
        how = f"{t.optimizer} on {model.device} in {str(model.compute_dtype).removeprefix('torch.')}"
        compile_model(model, run.t, block_size, loss_fn)
        if run.t.max_minutes:
            say(f"measuring how many steps fit into {t.max_minutes:g} min")
            run.fit_into(t.max_minutes)
        again = f", {run.passes:,.1f} passes over the data," * (run.passes > 1)
        say(f"{run.t.max_iters:,} steps of {t.batch_size} x {block_size} tokens{again} with {how}")
        fit(run, "def " if data.path.name == STDLIB_DATA else "")
    use = ["python", sys.argv[0], "chat" if data.is_chat else "sample", "--model_checkpoint", files.model.name]
    say(f"done in {run.seconds:.0f} s: best val_loss {run.best:.4f} in {files.model}; try: {shlex.join(use)}")


# What may change when a run is resumed, as it does not affect what is computed.
FREE = {"max_iters", "epochs", "device", "compile", "fsdp", "grad_accum", *Reporting.__annotations__}
FREE -= {"eval_interval", "eval_tokens"}  # they decide which model is the best


def resumed(a: RunArgs, kind: str, last: Path, c: Checkpoint) -> dict[str, Any]:
    """The arguments of start_run that continue a run from its last state, with its own settings."""
    if c.kind != kind or c.optimizer is None or not c.data:
        raise UserError(f"{last} was made by {c.kind}: resume it with that command")
    config, t, teacher = GPTConfig(**c.config), TrainConfig(**c.train_config), c.teacher or {}
    ours = {**asdict(config), **asdict(t), **(c.distill or {}), "block_size": c.block_size, "lora_rank": c.lora_rank}
    ours |= {"teacher_model_path": teacher.get("path"), "teacher_variant": teacher.get("variant")}
    ours |= {"variant": c.variant, "student_variant": c.variant}
    # settings not in the checkpoint are looked up in the run's original command line, as a word or after --FLAG=
    said = {"tuned", *c.arguments, *(word.partition("=")[2] for word in c.arguments)}
    ours |= {k: None for k in ("recipe", "model_checkpoint", "student_checkpoint") if getattr(a, k, None) not in said}
    theirs = {k: v for k, v in vars(a).items() if v not in (None, "") and k not in {*FREE, "vocab_size", "max_minutes"}}
    theirs |= {k: v for k, v in asdict(replace(config, **chosen(a, GPTConfig))).items() if k in theirs}  # 0: derived
    if wrong := next((k for k, v in theirs.items() if v not in (ours.get(k, v), "auto")), None):
        raise UserError(f"--{wrong} differs from what {last} was made with: leave it out, or --overwrite the run")
    t = replace(t, **{k: v for k, v in chosen(a, TrainConfig).items() if k in FREE})
    if a.max_minutes:
        say(f"--max_minutes is ignored: the run has had a fixed number of steps since its start, {t.max_iters:,}")
    own = Tokenizer(c.tokenizer)
    a.data = a.data or c.data.get("parts") or [c.data["path"]]
    data = a.data_in(own)
    same_tokenizer(data.tokenizer, data.path, own, last, "give the run its own data")
    if c.data["digest"] not in (data.digest, data.ids_digest):
        raise UserError(f"{data.path} is not what {last} was trained on ({c.data['path']}): its contents differ")
    if t.epochs:
        t = in_steps(t, len(data.splits["train"].windows(c.block_size)))
    if c.step >= t.max_iters and a.resume != "auto":
        remedy = f"raise --{'epochs' if a.epochs else 'max_iters'}"
        raise UserError(f"nothing to resume: {last} has reached step {c.step} of {t.max_iters}; {remedy}")
    weights = c.model if rank() == 0 else {name: torch.empty_like(x, device="cpu") for name, x in c.model.items()}
    model, teacher_model = build_model(config, weights, last, c.lora_rank), None
    train_tokens(model, c.new_tokens)
    if teacher:
        opened = open_teacher(teacher["path"], teacher["variant"], choose_device(t.device))
        teacher_model, digest = opened.model, weights_digest(opened.model)
        if teacher.setdefault("digest", digest) != digest:
            raise UserError(f"the teacher {opened.path} has other weights than when {last} was made: restore it")
    kept = ("block_size", "kind", "arguments", "variant", "lora_rank", "new_tokens", "distill", "teacher")
    return dict({k: getattr(c, k) for k in kept}, model=model, data=data, t=t, teacher_model=teacher_model, state=c)


def train_config(a: Any, variant: str | None, c: GPTConfig) -> TrainConfig:
    """The TrainConfig of a variant: the chosen recipe, then its architecture's, then the user's settings."""
    names, recipe, given = {f.name for f in fields(TrainConfig)}, {}, chosen(a, TrainConfig)
    if variant:
        recipe = {k: v for k, v in VARIANTS[variant].items() if k in names}
        if a.recipe == "tuned":
            scale = (c.n_embd / 128) ** -0.5
            recipe |= {**TUNED, "learning_rate": 3e-3 * scale, "embd_lr": 5e-3 * scale}
        recipe |= ARCH_RECIPES.get(c.arch, {})
        if c.arch == "nanochat":  # AdamW's rate falls with the square root of the width (nanochat's gpt.py)
            recipe |= dict.fromkeys(("learning_rate", "head_lr"), 0.004 * (c.n_embd / 768) ** -0.5)
        if "learning_rate" in given:  # a given rate applies to these too
            recipe |= {"embd_lr": 0.0, "head_lr": 0.0}
    return TrainConfig(**{**recipe, **given})


class RecipeArgs(RunArgs):
    """run"""

    recipe: str = setting("tuned", "tuned: learns fastest; published: as in the source", ("tuned", "published"))


class TrainArgs(RecipeArgs, TokenizerArgs, TrainFlags, GPTFlags):
    """run"""

    variant: str | None = setting(None, "shape and recipe (default: 7M)", VARIANTS)

    def data_in(self, tokenizer: str | Tokenizer) -> Data:
        """As in RunArgs. Raises UserError if a tokenizer is asked for and the data has another."""
        data, asked = open_all(self.data, tokenizer, self.vocab_size), self.tokenizer
        ours, own = asked in ("gpt2", "byte", "bpe"), data.tokenizer
        if asked and (own.kind != asked if ours else own.digest != load_tokenizer(asked).digest):
            made = f"{data.path} was made with tokenizer {own.describe()}"
            raise UserError(f"{made}, but --tokenizer asks for {asked}: leave it out, or tokenize under another name")
        return data


@command("train")
def train(a: TrainArgs) -> dict[str, Any]:
    """train a model (on several GPUs: under torchrun)
    train --variant 7M
    train --variant 7M --data input.txt --tokenizer byte --arch nanochat --max_iters 500
    train --variant 26M --data shakespeare --epochs 3 --name shakespeare_26M
    train --variant 7M --resume"""
    if not (a.data or a.max_iters or a.epochs or a.max_minutes):
        a.max_minutes = 3.0  # the quickstart
    variant = a.variant or "7M"
    config = make_config(variant, 50259, chosen(a, GPTConfig), a.recipe)  # reports mistakes before data is made
    t = train_config(a, variant, config)
    data = a.data_in(a.tokenizer or "gpt2")
    config = replace(config, vocab_size=data.tokenizer.n_vocab)
    torch.manual_seed(t.seed)
    return dict(model=GPT(config), data=data, t=t, block_size=config.block_size, recipe=a.recipe, variant=variant)


LOOP = ("resid_pdrop", "embd_pdrop", "attn_pdrop", "attn_implementation", "gradient_checkpointing")
LoopArgs = optional(GPTConfig, *LOOP, title="dropout and memory")


class FinetuneArgs(ModelArgs, RunArgs, TrainFlags, LoopArgs, ContextArgs):
    """finetuning"""

    lora_rank: int | None = setting(None, "train adapters of this rank (rate 1e-3), merged on save", ge=0, le=65536)
    block_size: int | None = setting(None, "tokens per training window (default: the context, at most 512)", ge=1)
    prompt: str | None = setting(None, "show the model's answer to this before and after finetuning")
    sample_length: int = setting(100, "length of that answer, in tokens", ge=1)
    sample_temperature: float = setting(SamplingSettings.temperature, "temperature of that answer", ge=0)

    def show_answer(self, model: GPT, data: Data, when: str) -> None:
        """Print the answer to --prompt, as a conversation turn if the data holds conversations."""
        if self.prompt is None:
            return
        prompt = data.tokenizer.prompt(self.prompt, model.config.context)
        settings = SamplingSettings(self.sample_temperature)
        if data.is_chat:
            turns = [{"role": "user", "content": self.prompt}]
            prompt = data.tokenizer.encode_rendered(render_chat(data.tokenizer, turns, add_generation_prompt=True))
        (text,) = generate_text(model, data.tokenizer, prompt, self.sample_length, settings)
        say(f"--- {when} finetuning ---\n{self.prompt}\n{text}\n---")


class HFFinetuneArgs(Records, FinetuneArgs):
    """finetuning"""

    def data_in(self, tokenizer: Tokenizer) -> Data:
        if not self.hf_dataset:
            return super().data_in(tokenizer)
        split = re.sub(r"[^\w.-]", "-", self.hf_split)  # "train[:10%]" is not a valid file name everywhere
        made_of = digest_of(self.describe(), tokenizer.spec)[:8]
        folder = DATA_DIR / f"{Path(self.hf_dataset).name}_{split}_{tokenizer.name}_{made_of}"
        return found_or_made(folder, existing_data, lambda folder: tokenize_records(folder, self, tokenizer))


FINETUNE_RECIPE = dict(max_iters=1000, batch_size=8, learning_rate=1e-4, weight_decay=0.01, sample_interval=-1)


@command("train", **FINETUNE_RECIPE)
def finetune(a: FinetuneArgs) -> dict[str, Any]:
    """finetune a model on conversations or text
    finetune --variant 7M --model_checkpoint 7M_model.pt --data conversations.jsonl --finetune_iters 1000
    finetune --model_checkpoint HuggingFaceTB/SmolLM2-135M --data chats.jsonl --lora_rank 16"""
    recipe = FINETUNE_RECIPE | (dict(learning_rate=1e-3) if a.lora_rank else {})
    t = TrainConfig(**{**recipe, **chosen(a, TrainConfig)})
    opened = open_named_model(a, choose_device(t.device), **chosen(a, LoopArgs))
    model = opened.model
    torch.manual_seed(t.seed)
    tokenizer, new_tokens = add_chat_tokens(model, opened.tokenizer)
    remedy = f"make the data with tokenize --tokenizer {opened.path}"
    if new_tokens:  # no other command has this tokenizer
        remedy = "give --data the file itself, as chat tokens have been added to the model's tokenizer"
    data = a.data_in(tokenizer)
    same_tokenizer(data.tokenizer, data.path, tokenizer, opened.path, remedy)
    block_size = a.block_size or min(512, model.config.context)
    torch.manual_seed(t.seed)
    if a.lora_rank:
        add_lora(model, a.lora_rank)
        train_tokens(model, new_tokens)
    full, trained = count_parameters(model.config), sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = f"{(4 * full + 12 * trained) / 2**30:.3g} GB for weights, gradients and AdamW's moments"
    without = f" ({16 * full / 2**30:.3g} GB without LoRA)" * bool(a.lora_rank)
    say(f"training {trained:,} of {full:,} parameters: {memory}{without}")
    splits = [split for split in data.splits.values() if split.starts is not None]
    if block_size <= model.config.context and (n := sum(split.longer_than(block_size) for split in splits)):
        advice = "raise --block_size"
        if block_size == model.config.context:
            advice = f"this is the model's context{', --rope_scaling extends it' * (model.wpe is None)}"
        all_of = f"{sum(len(split.starts) for split in splits):,} conversations"
        say(f"{n:,} of {all_of} are longer than a block of {block_size} and will be cut: {advice}")
    about = dict(variant=a.variant or opened.name, lora_rank=a.lora_rank, new_tokens=model.new_tokens)
    return dict(about, model=model, data=data, t=t, block_size=block_size)


@command("train", **FINETUNE_RECIPE)
def hf_finetune(a: HFFinetuneArgs) -> dict[str, Any]:
    """finetune a model on a Hugging Face data set
    hf_finetune --model_checkpoint distilled_120M_model.pt --hf_dataset roskoN/dailydialog --hf_text_column utterances
    hf_finetune --hf_dataset roskoN/dailydialog --prompt "Hello, how are you?" --finetune_iters 1000"""
    if bool(a.hf_dataset) == bool(a.data):
        raise UserError("hf_finetune needs --hf_dataset: a data set on the Hub, or a local folder or file (or --data)")
    return finetune(a)


class DistillArgs(RecipeArgs, optional(DistillConfig), TrainFlags, GPTFlags):
    """teacher and student"""

    teacher_model_path: str = setting("", "a checkpoint, folder or Hub id, or hf: by --teacher_variant", required=True)
    teacher_variant: str | None = setting(None, f"its shape; for hf, a GPT-2's ({', '.join(HF_ALIASES)})", VARIANTS)
    student_variant: str | None = setting(None, "shape of the student", VARIANTS)
    student_checkpoint: str | None = setting(None, "start from this model")
    init_from_teacher: bool = setting(False, "start with every k-th layer of the teacher (default shape: half as deep)")


@command("train")
def distill(a: DistillArgs) -> dict[str, Any]:
    """train a small model with the help of a large one
    distill --teacher_model_path hf --teacher_variant 120M --student_variant 7M --data shakespeare --alpha 0.5
    distill --teacher_model_path 120M_model.pt --student_variant 7M --data shakespeare --cache_teacher 64
    distill --teacher_model_path HuggingFaceTB/SmolLM2-135M --init_from_teacher --data corpus.txt"""
    d = DistillConfig(**chosen(a, DistillConfig))
    opened = open_teacher(a.teacher_model_path, a.teacher_variant, choose_device(a.device or "auto"))
    files = RunFiles(a.name or default_name(a, "distill"), a.overwrite)
    if opened.path.resolve() in [p.resolve() for p in (files.model, *files.states())]:
        raise UserError(f"the student would replace its teacher, {opened.path}: choose another --name")
    data = a.data_in(opened.tokenizer)
    check_same_vocabulary(opened.tokenizer, data, opened.path)
    student = make_student(a, opened.model, data)
    t = train_config(a, a.student_variant, student.config)
    block_size = a.block_size or min(student.config.block_size, 1 << 24 if a.student_variant else 512)
    large, small = count_parameters(opened.model.config), count_parameters(student.config)
    say(f"teacher {opened.path}: {large:,} parameters; alpha {d.alpha}, temperature {d.temperature}, {d.divergence}")
    if small > large:
        say(f"warning: the student ({small:,} parameters) is larger than the teacher ({large:,})", sys.stderr)
    teacher = {"path": a.teacher_model_path, "variant": a.teacher_variant, "digest": weights_digest(opened.model)}
    recipe, variant = a.student_variant and a.recipe, a.student_variant or "student"
    about = dict(block_size=block_size, recipe=recipe, variant=variant, distill=asdict(d), teacher=teacher)
    return dict(about, model=student, data=data, t=t, teacher_model=opened.model)


def open_teacher(path: str, variant: str | None, device: torch.device) -> Opened:
    """The teacher that --teacher_model_path names; `hf` is the GPT-2 of --teacher_variant's size."""
    if path != "hf":
        return open_model(path, device, variant)
    if variant not in HF_ALIASES:
        raise UserError(f"--teacher_model_path hf needs the --teacher_variant of a GPT-2: {', '.join(HF_ALIASES)}")
    return open_model(HF_ALIASES[variant], device)


def check_same_vocabulary(teacher: Tokenizer, data: Data, path: Path) -> None:
    """Raise UserError unless the data's ids mean the same tokens to the teacher: by content, not by size or name."""
    ours = data.tokenizer
    shared = set(range(min(ours.n_vocab, teacher.n_vocab))) - {*ours.special.values(), *teacher.special.values()}
    if abs(ours.n_vocab - teacher.n_vocab) > 64 or any(ours.bytes_of(i) != teacher.bytes_of(i) for i in shared):
        same_tokenizer(teacher, "the teacher", ours, data.path, f"make matching data with tokenize --tokenizer {path}")


def make_student(a: DistillArgs, teacher: GPT, data: Data) -> GPT:
    """The student: from --student_checkpoint, or new, or new with the teacher's layers (--init_from_teacher)."""
    overrides = chosen(a, GPTConfig)
    if a.student_checkpoint:
        asked = [*(k for k in ("student_variant", "init_from_teacher") if getattr(a, k)), *overrides]
        if shape := next((k for k in asked if k not in {*LOOP, "block_size"}), None):
            raise UserError(f"--student_checkpoint brings its own shape: leave --{shape} out")
        opened = open_model(a.student_checkpoint, **chosen(a, LoopArgs))
        same_tokenizer(opened.tokenizer, "the student", data.tokenizer, data.path, "they must be the same")
        return opened.model
    if a.student_variant:
        config = make_config(a.student_variant, data.tokenizer.n_vocab, overrides, a.recipe)
    elif a.init_from_teacher:
        overrides.pop("block_size", None)  # that of the training windows
        shape = {"n_layer": max(1, teacher.config.n_layer // 2), **overrides}
        # the student has the data's tokenizer, which may have chat tokens that the teacher lacks
        config = replace(teacher.config, vocab_size=max(teacher.config.vocab_size, data.tokenizer.n_vocab), **shape)
    else:
        raise UserError("name the student: --student_variant, --student_checkpoint, or --init_from_teacher")
    torch.manual_seed(1337 if a.seed is None else a.seed)
    student = GPT(config)
    if a.init_from_teacher:
        every_kth_layer(teacher, student)
    return student


def make_distillation(teacher: GPT, data: Data, block_size: int, digest: str, distill: dict[str, Any]) -> Distillation:
    """The loss function of a student. digest: that of the teacher's weights as stored."""
    d = DistillConfig(**distill)
    if d.on_policy and data.is_chat:
        raise UserError(f"--on_policy is for text, but {data.path} holds conversations: leave it out")
    n_vocab, K, cache = min(data.tokenizer.n_vocab, teacher.config.vocab_size), d.cache_teacher, None
    if K > n_vocab:
        raise UserError(f"cache_teacher is {K}: the vocabulary has only {n_vocab:,} tokens")
    if K:
        same = data.digest if data.is_chat else data.ids_digest  # where a split ends changes the last window of talks
        meta = dict(teacher=digest, data=same, temperature=d.temperature, block_size=block_size, top_k=K)
        n_blocks = len(data.splits["train"].windows(block_size))
        cache = TeacherCache(data.folder / "teacher_cache", meta, n_blocks, block_size, K, n_vocab)
    return Distillation(teacher, d, n_vocab, cache)


# --- use


class SampleArgs(ModelArgs, SamplingSettings, DeviceArgs, ContextArgs):
    """text"""

    prompt: str | None = setting(None, "the text to continue (default: standard input, if it is not a terminal)")
    length: int = setting(100, "tokens to generate", ge=1)
    num_samples: int = setting(1, "continuations, drawn as one batch", ge=1, le=1 << 16)
    stop: list[str] = setting([], r"end before any of these (\n is a line break)")


@command("use")
def sample(a: SampleArgs) -> None:
    r"""generate text
    sample --prompt "def "
    sample --model_checkpoint 7M_model.pt --prompt "To be" --temperature 0.8 --top_k 50
    sample --num_samples 3 --stop "\n" < prompt.txt"""
    opened = open_named_model(a, choose_device(a.device), as_stored=True)
    model, tokenizer = opened.model, opened.tokenizer
    prepare_generation(model, a.dtype, a.quantize)
    prompt = a.prompt if a.prompt is not None else "" if sys.stdin.isatty() else sys.stdin.read()
    ids = tokenizer.prompt(prompt, model.config.context)
    if a.model_checkpoint is None:
        say(f"using {opened.path}", sys.stderr)
    out = functools.partial(print, end="", flush=True)
    out(prompt)
    stop = [s.replace("\\n", "\n").replace("\\t", "\t") for s in a.stop]
    texts = generate_text(model, tokenizer, ids, a.length, a, a.num_samples, stop, on_text=out)
    out("\n")
    for text in texts[1:]:
        out(f"---\n{prompt}{text}\n")


class ChatArgs(ModelArgs, SamplingSettings, DeviceArgs):
    """conversation"""

    system: str | None = setting(None, "the system message")
    length: int = setting(512, "maximum tokens per answer", ge=1)


@command("use")
def chat(a: ChatArgs) -> None:
    """talk with a model in the terminal
    chat --model_checkpoint finetuned_7M_model.pt
    chat --system "You are brief." --model_checkpoint HuggingFaceTB/SmolLM2-135M-Instruct"""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (lines can be edited, and are not cut at 4,095 bytes)
    opened = open_model(a.model_checkpoint, choose_device(a.device), a.variant, as_stored=True)
    prepare_generation(opened.model, a.dtype, a.quantize)
    render_chat(opened.tokenizer, [{"role": "user", "content": ""}])  # raises now if the model has no chat template
    session = ChatSession(opened.model, opened.tokenizer, a, a.length)
    session.messages = [{"role": "system", "content": a.system}] if a.system else []
    if opened.checkpoint and opened.checkpoint.data.get("is_chat") is False:
        say("this model was trained on text, not on conversations: finetune teaches it to answer", sys.stderr)
    say(f"chatting with {opened.path}: /reset, /system TEXT, /save FILE, /quit; Ctrl-C stops an answer", sys.stderr)
    while True:
        try:
            line = input("> " * sys.stdin.isatty()).strip()
            word, _, rest = line.partition(" ")
            if word == "/quit" or line in ("exit", "quit"):
                break
            elif word == "/reset":
                session.messages = [m for m in session.messages if m["role"] == "system"]
            elif word == "/system":
                session.messages = [{"role": "system", "content": rest}] if rest else []
            elif word == "/save":
                target = Path(rest.strip() or "conversation.jsonl").expanduser()
                with told_as(f"cannot save to {target}", OSError, ValueError), open(target, "a", encoding="utf-8") as f:
                    print(json.dumps({"messages": session.messages}, ensure_ascii=False), file=f)
                print(f"saved to {target}")
            elif word.startswith("/"):
                print("the commands are /reset, /system TEXT, /save FILE and /quit")
            elif line:
                session.answer(line, functools.partial(print, end="", flush=True))
                print()
        except (EOFError, KeyboardInterrupt) as e:
            if isinstance(e, EOFError) or not sys.stdin.isatty():
                break
            print("\n/quit or Ctrl-D ends the chat")  # the Ctrl-C may have been meant for an answer that has just ended
        except UserError as e:  # the conversation continues without the failed turn
            print(e)


class ChatSession:
    """A conversation whose keys and values stay in the cache from turn to turn: only new tokens are read."""

    def __init__(self, model: GPT, tokenizer: Tokenizer, settings: SamplingSettings, length: int) -> None:
        self.model, self.tokenizer, self.settings, self.length = model, tokenizer, settings, length
        self.messages: list[dict[str, str]] = []
        self.generator = torch.Generator(model.device).manual_seed(settings.seed)
        self.cache = KVCache(model, 1, min(model.config.context, 8192))  # to limit memory, whatever the model's context
        self.cached: list[int] = []  # the tokens in the cache

    def answer(self, text: str, on_text: Callable[[str], None]) -> str:
        """The assistant's next turn, streamed to on_text. The oldest turns are left out when the context is full."""
        context, parts, new = self.cache.max_length, [], []
        messages = [*self.messages, {"role": "user", "content": text}]
        system = [m for m in messages[:1] if m["role"] == "system"]
        for i in range(len(system), len(messages), 2):
            rendered = render_chat(self.tokenizer, system + messages[i:], add_generation_prompt=True)
            ids = self.tokenizer.encode_rendered(rendered)
            if len(ids) + min(self.length, context // 2) <= context:
                break
        else:
            raise UserError(f"the message does not fit into the context of {context} tokens: shorten it")
        self.cache.length = min(common_prefix(ids, self.cached), len(ids) - 1)

        def tokens() -> Iterator[Tensor]:
            for token in generate(self.model, [ids], self.length, self.settings, self.generator, self.cache):
                new.append(int(token))
                yield token

        with suppress(KeyboardInterrupt), evaluating(self.model):
            read_tokens(tokens(), self.tokenizer, 1, (), lambda piece: (parts.append(piece), on_text(piece)))
        self.cached = (ids + new)[: self.cache.length]
        self.messages = [*messages, {"role": "assistant", "content": "".join(parts)}]
        return "".join(parts)


class ExportArgs(ModelArgs, ContextArgs):
    """export"""

    output_dir: str = setting("", "the folder to create", required=True)
    format: str = setting("hf", "hf: for transformers and vLLM; gguf: for llama.cpp", ("hf", "gguf"))
    dtype: str | None = setting(None, "for --format hf (default: float32)", ("float32", "bfloat16", "float16"))
    quantize: str | None = setting(None, "for --format gguf (default: f16)", tuple(GGUF_TYPES))
    max_shard_size: str = setting("5GB", "split larger models into several files")
    overwrite: bool = setting(False, "replace an earlier export")
    push_to_hub: str | None = setting(None, "also upload to OWNER/NAME on the Hugging Face Hub")
    private: bool = setting(True, "make a new --push_to_hub repository private")


@command("use")
def export(a: ExportArgs) -> None:
    """write a model for transformers, vLLM or llama.cpp
    export --variant 7M --model_path 7M_model.pt --output_dir exported_7M
    export --model_path finetuned_7M_model.pt --output_dir chat_7M --dtype bfloat16
    export --model_path 26M_model.pt --output_dir gguf_26M --format gguf --quantize q8_0
    export --model_path 26M_model.pt --output_dir hub_26M --push_to_hub me/my-26M"""
    from safetensors import SafetensorError

    output, gguf, dtype, quantize = Path(a.output_dir), a.format == "gguf", a.dtype or "float32", a.quantize or "f16"
    if a.dtype if gguf else a.quantize:
        raise UserError("--dtype is for --format hf, --quantize is for --format gguf: change --format, or leave it out")
    there = {p.name for p in (output.iterdir() if output.is_dir() else [output]) if p.exists()} - DESKTOP_FILES
    earlier = set(export_digests(output))
    if stranger := min(there - earlier, default=None):
        raise UserError(f"{output}: no export wrote {stranger}, so none replaces it: choose another --output_dir")
    if there and not a.overwrite:
        raise UserError(f"{output} already exists: choose another --output_dir or add --overwrite")
    if a.push_to_hub:
        import huggingface_hub

        hub = huggingface_hub.HfApi()
        with told_as(f"cannot create {a.push_to_hub} on the Hub, which needs a network and `hf auth login`"):
            hub.create_repo(a.push_to_hub, private=a.private, exist_ok=True)
    opened, name = open_named_model(a), output.resolve().name
    with told_as(f"cannot write {output}", OSError, SafetensorError), scratch_folder(output) as scratch:
        if gguf:
            file = scratch / f"{name}-{quantize}.gguf"
            export_gguf(opened, file, quantize, name)
            (scratch / "Modelfile").write_text(modelfile(opened.tokenizer, file.name), encoding="utf-8", newline="\n")
            done = f"{output / file.name}: {file.stat().st_size / 1e6:,.1f} MB"
        else:
            difference = export_hf(opened, scratch, getattr(torch, dtype), a.max_shard_size, a.push_to_hub or name)
            done = f"{output}: {opened.model.config.arch}, {dtype}; read back, logits differ by <= {difference:.1e}"
        weights = (".safetensors", ".gguf")  # the rest is text, which may be edited
        written = {file.name: file_digest(file) if file.suffix in weights else "" for file in scratch.iterdir()}
        kept = export_digests(output) if gguf else {}  # quantizations lie side by side
        digests = {**kept, **written, EXPORT_LIST: ""}
        if not output.exists():
            write_json(scratch / EXPORT_LIST, digests)
            replace_file(scratch, output)  # all at once
        else:  # files that a kill leaves from here on are known by their digests, and may be replaced
            write_json(output / EXPORT_LIST, {**dict.fromkeys(earlier, ""), **digests})
            for file in written:
                shutil.move(scratch / file, output / file)  # even to another disk
            for file in earlier - digests.keys():
                (output / file).unlink(missing_ok=True)
            write_json(output / EXPORT_LIST, digests)
    say(done)
    if a.push_to_hub:
        # files of an earlier push; quantizations lie side by side there too
        stale = None if gguf else ["model.safetensors*", "model-*-of-*.safetensors", "chat_template.jinja"]
        options = dict(folder_path=output, ignore_patterns=[EXPORT_LIST], delete_patterns=stale)
        with told_as(f"{output} is written, but could not be sent to {a.push_to_hub}"):
            hub.upload_folder(repo_id=a.push_to_hub, **options)
        say(f"pushed to https://huggingface.co/{a.push_to_hub}")


# --- inspect


class EvalArgs(ModelArgs, DeviceArgs, ContextArgs):
    """evaluation"""

    compare: list[str] = setting([], "more models to add to the table")
    data: list[str] = setting([], "data sets (their validation split) or files of text or records (default: newest)")
    block_size: int | None = setting(None, "context of the evaluation (default: the model's)", ge=1, le=1 << 24)
    stride: int | None = setting(None, "tokens each window advances (default: the context; fewer: more context)", ge=1)
    tasks: str | None = setting(None, "lm-eval tasks, comma-separated: hellaswag,piqa,winogrande,mmlu")
    include_path: str | None = setting(None, "folder of your own lm-eval tasks")
    limit: float | None = setting(None, "examples per task")
    batch_size: int = setting(16, "batch size of --tasks", ge=1)
    json: bool = setting(False, "print JSON")
    dtype: str = setting("float32", "dtype of the computation", DTYPES)


@command("inspect")
def eval(a: EvalArgs) -> None:
    """measure a model: loss, perplexity, bits per byte, lm-eval tasks
    eval --model_checkpoint 7M_model.pt --data shakespeare
    eval --model_checkpoint 7M_model.pt --compare distilled_7M_model.pt --data test.txt --stride 64
    eval --model_checkpoint 26M_model.pt --data book.txt --block_size 2048 --rope_scaling yarn --rope_factor 4
    eval --model_checkpoint HuggingFaceTB/SmolLM2-135M --tasks hellaswag,piqa --json"""
    if ignored := next((k for k in ("quantize", "data", "block_size", "stride") if a.tasks and getattr(a, k)), None):
        raise UserError(f"--tasks measures an export on its own data: leave --{ignored} out")
    rows = []
    for spec in [None, *a.compare]:
        opened = open_named_model(a, choose_device(a.device), spec)
        model, name = opened.model, str(opened.path)
        if a.quantize:
            prepare_generation(model, a.dtype, a.quantize)
        else:
            set_precision(model, a.dtype)
        if a.tasks:
            rows += evaluate_tasks(opened, a.tasks.split(","), a)
            continue
        own = model.config.context
        context = a.block_size or own
        stride = a.stride or context
        if context > own and model.wpe is not None:
            raise UserError(f"--block_size {context} exceeds the context of {name}, {own}: its positions are learned")
        if context > own:  # RoPE extrapolates, untrained
            model.extend_context(block_size=context)
        if stride > context:
            raise UserError(f"--stride is {stride}: it must be between 1 and the context, {context}")
        for data in a.data or [None]:
            where, found = evaluation_data(data, opened)
            if not isinstance(found, Data):
                measured = evaluate_text(opened, found, context, stride, where)
            elif a.stride:
                raise UserError(f"--stride is for text, but {where} holds conversations: leave it out")
            else:  # as in training: only what the assistant says
                if cut := (split := found.splits["val"]).longer_than(context):
                    longer = f"{cut:,} of {len(split.starts):,} conversations are longer than the context"
                    say(f"{where}: {longer}, {context}, and are cut", sys.stderr)
                measured = Evaluator(found, context, max(1, 16384 // context), 1 << 40)(model)
            rows.append({"model": name, "data": where, "context": context, "stride": stride, **measured})
    print(json.dumps(rows) if a.json else table(rows))


def evaluation_data(spec: str | None, opened: Opened) -> tuple[str, np.ndarray | Data]:
    """The name of what eval runs on, and its content: the tokens of a file of text or records, or of a data set's
    validation split; for conversations, data with these as its validation split."""
    path, tokenizer = Path(spec or ""), opened.tokenizer
    if path.is_file() and path.suffix.lower() not in (".bin", *RECORD_FILES):
        ids = tokenizer.encode_array("".join(read_text(path, "utf-8-sig", "strict")))
        return str(path), np.append(np.array(tokenizer.bos, np.int64), ids)
    if path.is_file() and path.suffix.lower() in RECORD_FILES:  # all of them, as of a text file
        with tempfile.TemporaryDirectory(prefix="model.py-") as folder:
            with redirect_stdout(io.StringIO()):  # with --json, only that is printed
                tokenize_records(Path(folder) / path.stem, Records(hf_dataset=spec, val_fraction=0.0), tokenizer)
            data = Data(Path(folder) / path.stem)
            split = data.splits["val"] = data.splits["train"]
            split.tokens, split.mask = np.array(split.tokens), None if split.mask is None else np.array(split.mask)
        return spec, data if data.is_chat else split.tokens
    data = open_data(spec)
    same_tokenizer(data.tokenizer, data.path, tokenizer, opened.path, "give eval a text file")
    if not len(tokens := data.splits["val"].tokens):
        raise UserError(f"{data.path} has no validation split: give eval a text file")
    data.splits["val"].check(tokens)
    return str(data.path), data if data.is_chat else tokens


def table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(k for row in rows for k in row))
    shown = [[row.get(k, "") for k in columns] for row in rows]
    cells = [columns, *([f"{v:.4f}" if isinstance(v, float) else str(v) for v in row] for row in shown)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


class PlotArgs(Settings):
    """plot"""

    logs: list[str] = setting([], ".jsonl logs, or run names (default: all under checkpoints/)")
    x: str = setting("step", "horizontal axis", ("step", "tokens", "seconds"))
    y: str = setting("loss", "value from the log: loss, val_bpb, lr, grad_norm, tokens_per_s, ...")
    log: str = setting("none", "logarithmic axes", ("none", "x", "y", "both"))
    out: str | None = setting(None, "image to write, png or svg (default: a chart in the terminal)", alias="output")
    follow: bool = setting(False, "redraw every three seconds, until Ctrl-C")


@command("inspect")
def plot(a: PlotArgs) -> None:
    """draw the curves of runs, finished or not
    plot 7M
    plot 7M --y tokens_per_s --follow
    plot 7M distilled_7M --x seconds --log y --out curves.svg"""
    draw = draw_picture if a.out else draw_text
    draw(a, curves(a))
    while a.follow:
        time.sleep(3)
        draw(a, curves(a))


def curves(a: PlotArgs) -> list[tuple[str, list, list]]:
    """Each run's label, and its points (x, y) to draw: for training, and for validation."""
    paths = []
    for name in a.logs:
        files = [Path(name), CHECKPOINT_DIR / name, CHECKPOINT_DIR / f"{name}_model.jsonl"]
        if not (found := [p for p in files if p.exists() and not p.is_dir()]):
            runs = [p.name.removesuffix("_model.jsonl") for p in CHECKPOINT_DIR.glob("*_model.jsonl")]
            raise UserError(f"there is no log of {name}: neither {files[0]} nor {files[2]}{nearest(name, runs)}")
        paths.append(found[0])
    if not (paths := paths or sorted(CHECKPOINT_DIR.glob("*_model.jsonl"))):
        raise UserError(f"there are no logs under {CHECKPOINT_DIR.resolve()} yet: train something first")
    runs, known = [], {}

    def drawable(axis: str, value: Any) -> bool:
        return is_a(value, float) and math.isfinite(value) and (value > 0 or a.log not in (axis, "both"))

    for path, settings in zip(paths, differences(paths), strict=True):
        records = read_log(path)
        if not records and path.suffix != ".jsonl":
            raise UserError(f"{path} is not a log: it has no records")
        known |= {k: None for r in records for k, v in r.items() if is_a(v, float)}
        names = (None, a.y) if a.y.startswith("val_") else (a.y, f"val_{a.y}")  # training's, validation's
        points = [[(r.get(a.x), r.get(name)) for r in records] for name in names]
        train, val = ([(x, y) for x, y in curve if drawable("x", x) and drawable("y", y)] for curve in points)
        about = ([f"best {min(y for _, y in val):.3f}"] if val else []) + settings
        runs.append((path.stem.removesuffix("_model") + f" ({', '.join(about)})" * bool(about), train, val))
    if known and not any(train or val for _, train, val in runs):  # a run that has just begun has an empty log
        raise UserError(f"nothing to draw for --y {a.y}{nearest(a.y, known)}: the logs have {', '.join(known)}")
    return runs


def differences(logs: list[Path]) -> list[list[str]]:
    """The settings in which runs differ, at most four per run, those from the command line first; from the checkpoints
    beside the logs. These are read without PyTorch: only plain data, and nothing that a pickle names is called."""

    class PlainData(pickle.Unpickler):
        find_class = staticmethod(lambda module, name: lambda *args: {})
        persistent_load = staticmethod(lambda storage: None)

    def settings(log: Path) -> dict[str, str]:
        for path in (log.with_name(f"{log.stem}_last.pt"), log.with_suffix(".pt")):
            with suppress(Exception), zipfile.ZipFile(path) as archive:  # a run may have none yet
                name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
                c = PlainData(archive.open(name)).load()
                found = {"variant": c["variant"], "data": c["data"]["path"], **c["config"], **c["train_config"]}
                typed.extend(word.lstrip("-").partition("=")[0] for word in c["arguments"])
                shown = {k: v for k, v in found.items() if k not in Reporting.__annotations__}
                return {k: f"{v:g}" if isinstance(v, float) else str(v) for k, v in shown.items()}
        return {}

    typed: list[str] = []
    found = [settings(log) for log in logs]
    varied = [k for k in dict.fromkeys(k for s in found for k in s) if len({s.get(k) for s in found if s}) > 1]
    varied.sort(key=lambda k: typed.index(k) if k in typed else len(typed))
    return [[f"{k} {s[k]}" for k in varied if k in s][:4] for s in found]


def smoothed(y: list[float]) -> list[float]:
    """The mean over a fortieth of a curve on each side; over less near its ends, so that it does not bend there."""
    n, sums = len(y), [0.0, *itertools.accumulate(y)]
    reach = [min(i, n - 1 - i, n // 40) for i in range(n)]
    return [(sums[i + k + 1] - sums[i - k]) / (2 * k + 1) for i, k in enumerate(reach)]


# Okabe and Ito's colours, which the colour-blind can tell apart; line styles and marks differ too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "ox+#*%ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # in a terminal


def as_tick(value: float, *_: Any) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def draw_picture(a: PlotArgs, runs: list) -> None:
    need("matplotlib", "plot --out").use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    (figure, axes), handles = plt.subplots(figsize=(8, 5 + 0.2 * len(runs)), layout="constrained"), []
    for i, (_, train, val) in enumerate(runs):
        look = {"color": COLOURS[i % 7], "linestyle": ("-", "--", "-.", ":")[i % 4]}
        marked = {**look, "marker": "os^Dv"[i % 5], "markersize": 4.5, "linewidth": 1}
        if train:
            x, y = zip(*train, strict=True)
            axes.plot(x, y, color=look["color"], alpha=0.25, linewidth=0.8)
            axes.plot(x, smoothed(y), linewidth=1.7, **look)
        if val:
            axes.plot(*zip(*val, strict=True), **marked)
        handles += axes.plot([], [], **(marked if val else look))
    for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
        if a.log in (name, "both"):
            getattr(axes, f"set_{name}scale")("log")
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_minor_formatter(ticker.NullFormatter())
        axis.set_major_formatter(as_tick)
    axes.set(xlabel=a.x, ylabel=a.y + " (nats per token)" * a.y.endswith("loss"))
    axes.grid(alpha=0.25, which="both")
    labels, title = [label for label, *_ in runs], "pale: as logged; strong: smoothed; marks: validation"
    figure.legend(handles, labels, loc="outside lower center", frameon=False, title=title)
    out = a.out if Path(a.out).suffix else f"{a.out}.png"
    with told_as(f"cannot write {out}", ValueError):
        figure.savefig(out, dpi=120)
    plt.close(figure)
    say(f"wrote {out}")


def draw_text(a: PlotArgs, runs: list) -> None:
    """A chart that fills the terminal; the marks in its legend are those of validation."""
    plotext = need("plotext", "plot without --out", '"plotext>=6"')
    (columns, rows), coloured, figure = shutil.get_terminal_size(), sys.stdout.isatty(), plotext.figure
    labels = [textwrap.fill(f" {label}", max(columns - 1, 8), subsequent_indent="  ") for label, *_ in runs]
    figure.clear()
    figure.theme("colorless").plot_size(columns, max(rows - sum(s.count("\n") + 1 for s in labels) - 1, 8))
    scales, drawn, legend = [math.log10 if a.log in (axis, "both") else float for axis in "xy"], [], []
    for i, (_, train, val) in enumerate(runs):
        mark, colour = MARKS[i % len(MARKS)], tuple(bytes.fromhex(COLOURS[i % 6][1:]))  # black may be the terminal's
        in_dots = len(runs) == 1 or coloured and i < 6
        legend.append("\x1b[38;2;{};{};{}m{}\x1b[0m".format(*colour, mark) if coloured else mark)
        legend[-1] += labels[i]
        smooth = zip((x for x, _ in train), smoothed([y for _, y in train]), strict=True)
        for is_line, points in ((True, smooth), (False, val)):
            points = [[scale(v) for scale, v in zip(scales, point, strict=True)] for point in points]
            marker = plotext.marker("braille" if is_line and in_dots else mark, colour)
            if points:
                figure.draw(figure.signal(*zip(*points, strict=True), marker=marker).lines(is_line))
            drawn += points
    for axis, scale, values in zip("xy", scales, zip(*drawn or [(0.0, 0.0)], strict=True), strict=True):
        at = [min(values) + (max(values) - min(values)) * i / 5 for i in range(6)]
        figure.ruler(axis).ticks(at, [as_tick(v if scale is float else 10**v) for v in at])
    chart = figure.title(f"{a.y} over {a.x}").build().string(colorless=not coloured)
    print("\x1b[H\x1b[J" * a.follow + "\n".join([chart.rstrip("\n"), *legend]), flush=True)


VariantsArgs = optional(Machine, "device")


@command("inspect")
def variants(a: VariantsArgs) -> None:
    """list the variants: parameters, memory, training time here
    variants"""
    device = choose_device(a.device or "auto")
    name, n = ("7M", 1024) if device.type == "cpu" else ("120M", 8192)  # what keeps it busy
    c, t = make_config(name, 50259, {}), TrainConfig(**TUNED)
    model = set_precision(GPT(c).to(device), "auto", training=True).train()
    optimizers, square = make_optimizers(model, t), torch.ones(n, n, dtype=model.compute_dtype, device=device)
    idx = torch.randint(c.vocab_size, (t.batch_size, c.block_size), device=device)

    def step() -> Tensor:
        loss = model.loss(idx, idx)
        (loss / idx.numel()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def rate(flops: float, work: Callable[[], Tensor]) -> float:
        """FLOP/s of the fastest of four runs, waiting for a GPU."""
        return flops / min(timeit.repeat(lambda: work().sum().item(), repeat=4, number=1))

    peak = rate(2 * n**3, lambda: square @ square)
    real = rate(training_flops_per_token(c) * idx.numel(), step)
    print(variants_table(real))
    share = f"{real / peak:.0%} of the {peak / 1e9:,.0f} that a product of {n} x {n} matrices reaches"
    print(f"times: at the {real / 1e9:,.0f} GFLOP/s just measured in steps of the {name} on this {device}, {share}")


def variants_table(flops_per_s: float = 0.0) -> str:
    """The variants with their true parameter counts, training memory and FLOPs per token, with GPT-2's vocabulary; and
    the time that a billion tokens take, if a speed is given."""
    rows = []
    for name, v in VARIANTS.items():
        c, n, batch = make_config(name, 6400 if name == "26M" else 50259, {}), PARAMETERS[name], v["batch_size"]
        flops = training_flops_per_token(c, n)
        rows.append({
            "": name, "arch": c.arch, "layers": c.n_layer, "heads": f"{c.n_head} ({c.n_kv_head})",
            "width": c.n_embd, "block": c.block_size, "batch": batch,
            "params": f"{n / 1e6:.1f}M", "memory": f"{training_memory_bytes(c, batch, n) / 2**30:.2g} GB",
            "FLOPs": f"{flops:.1e}",
        })  # fmt: skip
        if flops_per_s:
            hours = flops * 1e9 / flops_per_s / 3600
            rows[-1]["1e9 tokens"] = f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.0f} days"
    return table(rows) + "\n(GPT-2's vocabulary, 26M its own of 6,400 tokens; bfloat16; FLOPs per token)"


# ----------------------------------------------------------------------------------------------------------------------
# The parser
# ----------------------------------------------------------------------------------------------------------------------

VARIED = {name for table in (VARIANTS, ARCHS, ARCH_RECIPES, {"": TUNED}) for row in table.values() for name in row}
# A word without a flag may be the value of the first of these that the command has.
MAIN_FLAGS = ("variant", "txt", "hf_dataset", "teacher_model_path", "data", "prompt", "model_checkpoint")
BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def overview() -> str:
    """The commands, grouped by purpose."""
    lines = [__doc__.strip()]
    for purpose, those in itertools.groupby(COMMANDS.items(), lambda item: item[1].purpose):
        lines += ["", f"{purpose}:", *(f"  {name:<14}{c.about}" for name, c in those)]
    return "\n".join([*lines, "", "python model.py COMMAND --help lists a command's flags and gives examples."])


def parse_bool(text: str) -> bool:
    if text.lower() not in BOOLS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return BOOLS[text.lower()]


def add_flag(group: Any, f: Field, default: Any, show_all: bool) -> None:
    """Add a dataclass field as a flag. A flag that is not given is not stored; the dataclass checks the values."""
    m, many = f.metadata, typing.get_origin(f.type) is list
    kind = next(k for k in typing.get_args(f.type) or [f.type] if k is not types.NoneType)
    choices = ", ".join(m["choices"])
    help = m["help"] + (f": {choices}" if 0 < len(choices) < 65 else "")
    told = default in (None, MISSING, False, "") or "(default" in help or f"({default}:" in help
    help += "" if told else f" (default: {default})"
    help = argparse.SUPPRESS if m["rare"] and not show_all else help.replace("%", "%%")
    options: dict[str, Any] = {"help": help, "default": argparse.SUPPRESS, "type": parse_bool if kind is bool else kind}
    options["metavar"] = {bool: "BOOL", int: "N", float: "X", str: "NAME"}[kind]
    if f.name == "logs":  # the only positional argument
        group.add_argument(f.name, nargs="*", **options)
        return
    if kind is bool or "true" in m["choices"]:  # may be given without a value
        options |= {"nargs": "?", "const": True if kind is bool else "true"}
    group.add_argument(f"--{f.name}", **(options | {"nargs": "+", "action": "extend"} if many else options))
    if m["alias"]:
        group.add_argument(f"--{m['alias']}", **options | {"help": f"the same as --{f.name}"})


def make_parser(name: str, words: list[str]) -> argparse.ArgumentParser:
    """The parser of a command, with a group of flags for each dataclass that its own is built from, in this order."""
    c, show_all = COMMANDS[name], "--help_all" in words
    table = f"\n\n{variants_table()}" if name == "train" and {"-h", "--help", "--help_all"} & set(words) else ""
    parser = argparse.ArgumentParser(
        prog=f"model.py {name}", usage=f"python model.py {name} [flags]",
        description=f"{c.about[0].upper()}{c.about[1:]}.{table}",
        epilog="\n".join(["examples:", *(f"  python model.py {example}" for example in c.examples)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--help_all", action="help", help="show the rarely used flags too")
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks of errors")
    groups = defaultdict(list)
    home = {n: base for base in c.args.__mro__ for n in inspect.get_annotations(base)}  # first declared in
    for f in sorted(fields(c.args), key=lambda f: c.args.__mro__.index(home[f.name])):
        if f.metadata.get("help"):
            groups[home[f.name].__doc__.split("\n")[0]].append(f)
    for title, flags in groups.items():
        varied = [f for f in flags if f.name in VARIED and "default" in f.metadata and not c.recipe]
        group = parser.add_argument_group(title + ": where no default is shown, it is the variant's" * bool(varied))
        for f in flags:
            default = c.recipe.get(f.name, f.metadata.get("default", f.default))
            add_flag(group, f, None if f in varied else default, show_all)
    return parser


def parse(argv: list[str]) -> tuple[str, Any]:
    """The command's name and its flags, as its dataclass."""
    name, *words = [w for w in argv if w != "--debug"] or ["help"]
    if name in ("-h", "--help", "--help_all", "help") and words[:1] and words[0] in COMMANDS:
        name, words = words[0], ["--help_all" if name == "--help_all" else "--help"]
    if name in ("-h", "--help", "--help_all", "help"):
        print(overview())
        sys.exit(0)
    if name not in COMMANDS:
        commands = ", ".join(COMMANDS)
        near = " (the command comes first)" if name[:1] == "-" else nearest(name, COMMANDS)
        print(f"model.py: error: there is no command {name!r}{near}: {commands}", file=sys.stderr)
        sys.exit(2)
    cls, parser = COMMANDS[name].args, make_parser(name, words)
    for i, (flag, word) in enumerate(itertools.pairwise(words)):
        if flag == "--follow" and word.lower() not in BOOLS:  # but a run's name
            words[i] = "--follow=true"
    given, unknown = parser.parse_known_intermixed_args(words)  # log names may come between flags
    if unknown:
        word = unknown[0]
        flags = [f for f in parser._option_string_actions if f != "-h"]
        fits = {"variant": word in VARIANTS, "data": name != "eval"}  # which is first of all given a model
        main = [f"--{f}" for f in MAIN_FLAGS if f"--{f}" in flags and fits.get(f, True)]
        near = nearest(word.partition("=")[0], flags)
        if not near and main and word[:1] != "-":
            near = f" (did you mean {main[0]} {shlex.quote(word)}?)"
        parser.error(f"unknown flag {word}{near}" if word[:1] == "-" else f"{word!r} does not belong to a flag{near}")
    values = vars(given)
    for f in fields(cls):
        alias = f.metadata.get("alias")
        if alias in values:
            other = values.pop(alias)
            if values.setdefault(f.name, other) != other:
                parser.error(f"--{f.name} {values[f.name]} and --{alias} {other} are the same flag, given twice")
        if f.metadata.get("required") and f.name not in values and values.get("resume") != "true":  # a run has its own
            parser.error(f"--{f.name} is required: {f.metadata['help']}")
    try:
        return name, cls(**values)
    except UserError as e:
        parser.error(str(e))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks for the next step. By default it returns those above 32 MB, and the page faults of
    getting them back took half of a training step with GPT-2's vocabulary. Not for one of many processes: with what
    fully_shard frees, kept blocks came to more than the weights of a model apart."""
    with suppress(OSError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def others_at_work() -> bool:
    """Whether other programs are keeping a processor busy right now; known on Linux only."""
    running = []
    with suppress(OSError, IndexError, ValueError):
        for _ in range(5):
            running.append(int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0]) - 1)  # without this one
            time.sleep(0.002)
    return bool(running) and sorted(running)[len(running) // 2] > 0


def with_torch() -> types.ModuleType:
    """Run the compiled code of this file again, as a module with PyTorch. GNU OpenMP counts how long waiting threads
    spin before they sleep: 10,000 turns made small steps a third faster than 2,000, but half as fast beside other
    programs, to which they leave no room."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000" if others_at_work() else "10000")
    spec = importlib.util.spec_from_file_location("model", __file__)
    sys.modules["model"] = module = importlib.util.module_from_spec(spec)
    gc.disable()  # PyTorch's modules are no garbage: an eighth of the time of their import
    exec(PROGRAM.f_code, vars(module))
    gc.freeze()
    gc.enable()
    return module


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """End the program, unless it failed, before Python's shutdown: with PyTorch that takes 0.3 s, and sometimes aborts
    in one of its threads, and torchrun would call the run failed. Entered before other libraries register their exit
    functions, it leaves after them."""
    done: list[bool] = []

    @atexit.register
    def leave() -> None:
        if done:
            sys.stdout.flush()  # what exit functions printed
            sys.stderr.flush()
            os._exit(0)

    yield
    done.append(True)


def main() -> None:
    sys.stdin = sys.stdin or open(os.devnull)  # if it is closed
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        with suppress(AttributeError):
            # what cannot be decoded, or shown in a terminal, becomes ?; pipes are UTF-8 on Windows too
            ansi = os.name == "nt" and not stream.isatty() and "PYTHONIOENCODING" not in os.environ
            stream.reconfigure(encoding="utf-8" if ansi else None, errors="replace")
    try:
        name, a = parse(sys.argv[1:])
        if torch is later and name != "plot":
            with nullcontext() if PROGRAM.f_back else leaving_at_once():  # whatever runs this one, as runpy, goes on
                return with_torch().main()
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if os.environ.get("WORLD_SIZE", "1") == "1":
            keep_freed_memory()
        if COMMANDS[name].purpose == "train" or os.environ.get("RANK", "0") == "0":  # only in torchrun's first process
            COMMANDS[name].run(a)
        sys.stdout.flush()
        sys.stderr.flush()
    except (UserError, OSError) as e:
        if not isinstance(e, BrokenPipeError):
            tell(e)
        try:
            sys.stdout.flush()
        except OSError:  # so that Python's last flush is quiet
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


# ----------------------------------------------------------------------------------------------------------------------
# Appendix: the blocks in C
# ----------------------------------------------------------------------------------------------------------------------

# On a CPU, generation is limited by memory bandwidth, and PyTorch would spend as long between the products as on them:
# SmolLM2 makes 86 tokens/s this way, 27 in plain PyTorch. The same goes for training small models, where norms, RoPE,
# SwiGLU and the loss in C save a third of a step. Nobody has to read this; tests compare it to the plain operators.

C_SOURCE = r"""
// The blocks of a GPT for a few tokens, each with a cache of the keys and values before it. All threads run `blocks`
// from top to bottom, share the rows of each product and wait for each other after it (`omp for`).
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

int omp_get_thread_num(void);  // from omp.h, which Macs lack

// A matrix (out, in) in float16, or int8 if it has a scale (out); or a norm, whose weight is float.
typedef struct { const void *weight; const float *scale, *bias; } Module;
typedef struct { Module norm_1, norm_2, q_norm, k_norm, qkv, proj, fc, mlp_proj; } Layer;
typedef struct {
    long n_layer, n_embd, n_head, n_kv_head, head_dim, rope_dim, n_inner;
    long layernorm, parallel, norm_before_rope, norm_after_rope, activation, is_glu;
} Shape;

// float16 and back. Moved up by 13 places, its bits are those of a float 2^112 times smaller. to_half rounds to the
// nearest; numbers beyond float16's range become its largest.
typedef union { uint32_t bits; float value; } Bits;
static float half(uint16_t x) { return (Bits){(uint32_t)((int16_t)x * 8192) & 0x8fffffff}.value * 0x1p112f; }
static uint16_t to_half(float x) {
    uint32_t bits = (Bits){.value = x * 0x1p-112f}.bits, y = ((bits & 0x7fffffff) + 0xfff + (bits >> 13 & 1)) >> 13;
    return (bits >> 16 & 0x8000) | (y < 0x7bff ? y : 0x7bff);
}

// Vectors, and how to load them from other types, which compilers do badly by themselves.
#if defined(__AVX512F__)
#include <immintrin.h>
typedef __m512 vec;
static vec from_half(const void *w) { return _mm512_cvtph_ps(_mm256_loadu_si256(w)); }
static vec from_int8(const void *w) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(w))); }
#elif defined(__AVX2__) && defined(__F16C__)
#include <immintrin.h>
typedef __m256 vec;
static vec from_half(const void *w) { return _mm256_cvtph_ps(_mm_loadu_si128(w)); }
static vec from_int8(const void *w) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(w))); }
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
typedef float32x4_t vec;
static vec from_half(const void *w) { return vcvt_f32_f16(vld1_f16(w)); }
static vec from_int8(const void *w) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vld1_dup_s32(w))))));
}
#else
typedef float vec __attribute__((vector_size(16)));
static vec from_half(const void *w) {
    const uint16_t *x = w;
    int32_t __attribute__((vector_size(16))) bits = {x[0], x[1], x[2], x[3]};
    return (vec)(bits << 16 >> 3 & (int32_t)0x8fffffff) * 0x1p112f;
}
static vec from_int8(const void *w) { const int8_t *x = w; return (vec){x[0], x[1], x[2], x[3]}; }
#endif
enum { LANES = sizeof(vec) / sizeof(float) };
static vec from_float(const void *w) { vec x; memcpy(&x, w, sizeof x); return x; }
static float total(vec x) {
    float __attribute__((vector_size(16))) *part = (void *)&x, sum = part[0];
    for (long i = 1; i < LANES / 4; i++) sum += part[i];
    return sum[0] + sum[1] + (sum[2] + sum[3]);
}

// w (n numbers of `size` bytes) times x (n), in running sums: with one, each addition waits for the one before it. But
// with AVX-512, 16-bit weights were up to a quarter slower from memory with two or four; int8 was a tenth faster with
// two. Inlined into each caller, with its constants.
static inline __attribute__((always_inline)) float dot_of(
    vec load(const void *), const char *w, long size, const float *x, long n, long sums) {
    vec sum[8] = {0};
    long i = 0;
    for (; i + sums * LANES <= n; i += sums * LANES)
        for (long s = 0, at = i; s < sums; s++, at += LANES) sum[s] += load(w + at * size) * from_float(x + at);
    for (; i + LANES <= n; i += LANES) sum[0] += load(w + i * size) * from_float(x + i);
    if (i < n) {
        char w_rest[sizeof(vec)] = {0}, x_rest[sizeof(vec)] = {0};  // as char, they may be read as any type
        memcpy(w_rest, w + i * size, (n - i) * size);
        memcpy(x_rest, x + i, (n - i) * sizeof *x);
        sum[0] += load(w_rest) * from_float(x_rest);
    }
    for (long s = 1; s < sums; s++) sum[0] += sum[s];
    return total(sum[0]);
}
static float dot(const float *w, const float *x, long n) { return dot_of(from_float, (void *)w, 4, x, n, 1); }

// y (rows, out) = x (rows, in) times the matrix, plus its bias; or that is added to y.
static void product(Module m, long out, long in, const float *x, long rows, float *y, long added) {
    const char *w = m.weight;
    #pragma omp for
    for (long o = 0; o < out; o++)
        for (long r = 0; r < rows; r++) {
            float sum = m.scale ? dot_of(from_int8, w + o * in, 1, x + r * in, in, 32 / LANES) * m.scale[o]
                                : dot_of(from_half, w + 2 * o * in, 2, x + r * in, in, 16 / LANES);
            if (m.bias) sum += m.bias[o];
            y[r * out + o] = added ? y[r * out + o] + sum : sum;
        }
}

// y (rows, n) may be x.
static void normalise(Module norm, long layernorm, float eps, const float *x, long rows, long n, float *y) {
    const float *weight = norm.weight, *bias = norm.bias;
    for (long r = 0; r < rows; r++, x += n, y += n) {
        float mean = 0;
        if (layernorm)
            #pragma omp simd reduction(+ : mean)
            for (long i = 0; i < n; i++) mean += x[i] * (1.0f / n);
        #pragma omp simd
        for (long i = 0; i < n; i++) y[i] = x[i] - mean;
        float scale = 1 / sqrtf(dot(y, y, n) / n + eps);
        #pragma omp simd
        for (long i = 0; i < n; i++) y[i] = y[i] * scale * (weight ? weight[i] : 1) + (bias ? bias[i] : 0);
    }
}

// RoPE on one head, as in apply_rope; by the opposite angles if direction is -1.
static void rotate(float *x, const float *cos, const float *sin, long d, float direction) {
    for (long i = 0; i < d / 2; i++) {
        float a = x[i], b = x[i + d / 2];
        x[i] = a * cos[i] + direction * b * sin[i];
        x[i + d / 2] = b * cos[i] + direction * a * sin[i + d / 2];
    }
}

// exp as in Cephes, in a form that compilers vectorise; below -87.7 it is 0, above 88 exp(88).
static inline float exponential(float x) {
    float y = x < -88 ? -88 : x > 88 ? 88 : x, k = rintf(y * 1.44269504f);  // from -127 to 127
    float r = y - k * 0.693359375f + k * 2.12194440e-4f, p = 1.9875691500e-4f;
    p = ((((p * r + 1.3981999507e-3f) * r + 8.3334519073e-3f) * r + 4.1665795894e-2f) * r + 1.6666665459e-1f) * r;
    p = (p + 0.5f) * r * r + r + 1;
    return p * (Bits){((int32_t)k + 127) * (1 << 23)}.value;  // 2^k; 0 if k is -127
}

static float log_sum_exp(const float *x, long n) {
    float max = -INFINITY, sum = 0;
    #pragma omp simd reduction(max : max)
    for (long i = 0; i < n; i++) max = x[i] > max ? x[i] : max;
    #pragma omp simd reduction(+ : sum)
    for (long i = 0; i < n; i++) sum += exponential(x[i] - max);
    return max + logf(sum);
}

// y (vectors * LANES) = the sum of p[s] times row s of v, over n rows that begin d numbers apart.
static inline __attribute__((always_inline)) void mix(
    const float *p, const uint16_t *v, long n, long d, float *y, long vectors) {
    vec sum[4] = {0};
    for (long s = 0; s < n; s++)
        for (long j = 0; j < vectors; j++) sum[j] += p[s] * from_half(v + s * d + j * LANES);
    memcpy(y, sum, vectors * sizeof *sum);
}

// Softmax attention of q (d) to n keys and values (n, d).
static void attend(const float *q, const uint16_t *k, const uint16_t *v, long n, long d, float *p, float *y) {
    const float scale = 1 / sqrtf(d);
    for (long s = 0; s < n; s++) p[s] = dot_of(from_half, (void *)(k + s * d), 2, q, d, 1) * scale;
    float log_sum = log_sum_exp(p, n);
    #pragma omp simd
    for (long s = 0; s < n; s++) p[s] = exponential(p[s] - log_sum);
    long i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) mix(p, v + i, n, d, y + i, 4);
    for (; i + LANES <= d; i += LANES) mix(p, v + i, n, d, y + i, 1);
    for (; i < d; i++) {
        y[i] = 0;
        for (long s = 0; s < n; s++) y[i] += p[s] * half(v[s * d + i]);
    }
}

static float activate(long kind, float x) {  // in the order of C_ACTIVATIONS
    switch (kind) {
        case 0: return 0.5f * x * (1 + erff(x * 0.70710678f));
        case 1: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
        case 2: return fmaxf(x, 0);
        case 3: return fmaxf(x, 0) * fmaxf(x, 0);
        default: return x / (1 + expf(-x));
    }
}

// x (batch, T, n_embd): tokens start to start + T of each sequence, before the blocks and after them. kv (n_layer,
// batch, 2 n_kv_head, max_length, head_dim): the cache, float16. pad (batch): how many of its first tokens are padding.
// rope_cos, rope_sin (context, rope_dim): as in apply_rope; NULL if rope_dim is 0.
void blocks(const Shape *c, const Layer *layers, const float *rope_cos, const float *rope_sin, float *x, uint16_t *kv,
            const int64_t *pad, long batch, long T, long start, long max_length, float eps, int threads) {
    const long rows = batch * T, n = c->n_embd, d = c->head_dim, n_q = c->n_head, n_kv = c->n_kv_head;
    const long heads = n_q + 2 * n_kv, fan_out = c->n_inner * (1 + c->is_glu);
    float *qkv = malloc(rows * (heads * d + n_q * d + fan_out + c->n_inner) * sizeof *qkv);  // shared, as x is
    float *attended = qkv + rows * heads * d, *fan = attended + rows * n_q * d, *inner = fan + rows * fan_out;

    #pragma omp parallel num_threads(threads)
    {
        float *h_1 = malloc((2 * rows * n + start + T) * sizeof *h_1), *h_2 = h_1 + rows * n, *p = h_2 + rows * n;
        for (long l = 0; l < c->n_layer; l++) {
            const Layer *layer = layers + l;
            uint16_t *cache = kv + l * batch * 2 * n_kv * max_length * d;
            normalise(layer->norm_1, c->layernorm, eps, x, rows, n, h_1);
            if (c->parallel) normalise(layer->norm_2, c->layernorm, eps, x, rows, n, h_2);
            product(layer->qkv, heads * d, n, h_1, rows, qkv, 0);
            #pragma omp for
            for (long i = 0; i < rows * heads; i++) {  // norm and RoPE of q and k; k and v go to the cache
                long b = i / heads / T, t = start + i / heads % T, head = i % heads;
                long at = (t > pad[b] ? t - pad[b] : 0) * c->rope_dim;  // any position will do for padding
                float *y = qkv + i * d;
                Module norm = head < n_q ? layer->q_norm : layer->k_norm;
                if (head < n_q + n_kv) {
                    if (c->norm_before_rope) normalise(norm, 0, eps, y, 1, d, y);
                    rotate(y, rope_cos + at, rope_sin + at, c->rope_dim, 1);
                    if (c->norm_after_rope) normalise(norm, 0, eps, y, 1, d, y);
                }
                for (long j = 0; head >= n_q && j < d; j++)
                    cache[((b * 2 * n_kv + head - n_q) * max_length + t) * d + j] = to_half(y[j]);
            }
            #pragma omp for
            for (long i = 0; i < rows * n_q; i++) {
                long row = i / n_q, head = i % n_q, b = row / T, t = start + row % T, from = pad[b] < t ? pad[b] : t;
                const uint16_t *k = cache + ((b * 2 * n_kv + head / (n_q / n_kv)) * max_length + from) * d;
                const uint16_t *v = k + n_kv * max_length * d;
                attend(qkv + (row * heads + head) * d, k, v, t + 1 - from, d, p, attended + i * d);
            }
            product(layer->proj, n, n_q * d, attended, rows, x, 1);
            if (!c->parallel) normalise(layer->norm_2, c->layernorm, eps, x, rows, n, h_2);
            product(layer->fc, fan_out, n, h_2, rows, fan, 0);
            #pragma omp for
            for (long i = 0; i < rows * c->n_inner; i++) {
                const float *y = fan + i / c->n_inner * fan_out + i % c->n_inner;
                inner[i] = activate(c->activation, y[0]) * (c->is_glu ? y[c->n_inner] : 1);
            }
            product(layer->mlp_proj, n, c->n_inner, inner, rows, x, 1);
        }
        free(h_1);
    }
    free(qkv);
}

// y (rows, out) = x (rows, in) times the matrix.
void head(const Module *m, long out, long in, const float *x, long rows, float *y, int threads) {
    #pragma omp parallel num_threads(threads)
    product(*m, out, in, x, rows, y, 0);
}

// For training: the operators between the products, forward and backward, in the type of the activations.
#ifdef BFLOAT16
typedef uint16_t real;
static inline float get(real x) { return (Bits){(uint32_t)x << 16}.value; }
static inline real put(float x) {
    uint32_t bits = (Bits){.value = x}.bits;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to nearest, ties to even
}
#else
typedef float real;
static inline float get(real x) { return x; }
static inline real put(float x) { return x; }
#endif

// Turn the gradient g (n) of RMSNorm's output into that of its input x (n), in place; the weight's is added to dw.
static void normalise_backward(float *g, const float *x, const float *weight, long n, float eps, float *dw) {
    float scale = 1 / sqrtf(dot(x, x, n) / n + eps);
    #pragma omp simd
    for (long i = 0; i < n; i++) {
        dw[i] += g[i] * x[i] * scale;
        g[i] *= weight[i];
    }
    float share = dot(g, x, n) * scale * scale / n;
    #pragma omp simd
    for (long i = 0; i < n; i++) g[i] = scale * (g[i] - share * x[i]);
}

typedef struct { long batch, T, n_q, n_kv, d, rope_dim, norm_before, norm_after, rope_rows; } Heads;

// qkv (batch, T, n_q + 2 n_kv, d) -> q (batch, n_q, T, d), k and v (batch, n_kv, T, d), with RMSNorm of q and k by
// weights w (d) and RoPE as Heads says. backward: dqkv from the gradients of q, k and v; dw (threads, 2, d), with a sum
// for each thread, so that results are deterministic.
void heads(const Heads *c, const float *cos, const float *sin, const float *w_q, const float *w_k, float eps,
           long backward, const real *qkv, real *q, real *k, real *v, real *dqkv, float *dw, int threads) {
    const long n = c->n_q + 2 * c->n_kv, d = c->d, first[] = {0, c->n_q, c->n_q + c->n_kv};
    #pragma omp parallel for num_threads(threads)
    for (long row = 0; row < c->batch * c->T; row++)
        for (long head = 0, b = row / c->T, t = row % c->T, at = row % c->rope_rows * c->rope_dim; head < n; head++) {
            long i = row * n + head, kind = (head >= first[1]) + (head >= first[2]);  // of q, k or v
            long above = b * (kind ? c->n_kv : c->n_q) + head - first[kind];
            real *apart = (kind == 0 ? q : kind == 1 ? k : v) + (above * c->T + t) * d;
            if (kind == 2) {
                memcpy(backward ? dqkv + i * d : apart, backward ? apart : qkv + i * d, d * sizeof *apart);
                continue;
            }
            Module norm = {kind ? w_k : w_q, 0, 0};
            float x[d], g[d];
            for (long j = 0; j < d; j++) x[j] = get(qkv[i * d + j]);
            if (!backward) {
                if (c->norm_before) normalise(norm, 0, eps, x, 1, d, x);
                rotate(x, cos + at, sin + at, c->rope_dim, 1);
                if (c->norm_after) normalise(norm, 0, eps, x, 1, d, x);
                for (long j = 0; j < d; j++) apart[j] = put(x[j]);
                continue;
            }
            float *sums = dw + (2 * omp_get_thread_num() + kind) * d;
            for (long j = 0; j < d; j++) g[j] = get(apart[j]);
            if (c->norm_after) {
                rotate(x, cos + at, sin + at, c->rope_dim, 1);
                normalise_backward(g, x, norm.weight, d, eps, sums);
            }
            rotate(g, cos + at, sin + at, c->rope_dim, -1);
            if (c->norm_before) normalise_backward(g, x, norm.weight, d, eps, sums);
            for (long j = 0; j < d; j++) dqkv[i * d + j] = put(g[j]);
        }
}

// losses (rows): -log softmax of logits (rows, n) at the targets, of which -1 does not count; with_grad: the logits
// become the gradient of their sum.
void cross_entropy(long rows, long n, long with_grad, const int64_t *targets, real *logits, float *losses,
                   int threads) {
    #pragma omp parallel num_threads(threads)
    {
        float *power = malloc(n * sizeof *power);
        #pragma omp for
        for (long r = 0; r < rows; r++) {
            real *x = logits + r * n;
            float max = -INFINITY, sum = 0;
            losses[r] = targets[r] < n ? 0 : NAN;
            if (targets[r] < 0 || targets[r] >= n) {
                if (with_grad) memset(x, 0, n * sizeof *x);
                continue;
            }
            #pragma omp simd reduction(max : max)
            for (long i = 0; i < n; i++) max = get(x[i]) > max ? get(x[i]) : max;
            #pragma omp simd reduction(+ : sum)
            for (long i = 0; i < n; i++) sum += power[i] = exponential(get(x[i]) - max);
            float loss = losses[r] = max + logf(sum) - get(x[targets[r]]);
            if (!with_grad) continue;
            float share = 1 / sum;
            #pragma omp simd
            for (long i = 0; i < n; i++) x[i] = put(power[i] * share);
            x[targets[r]] = put(expm1f(-loss));  // p - 1, without cancellation
        }
        free(power);
    }
}

// losses (rows): KL(p || q), or KL(q || p) if reverse, of a teacher's distribution p, the softmax of teacher (rows, n),
// and a student's q, that of student / T (rows, n), whose rows lie `stride` apart; rows with a target below 0 do not
// count. grad, unless NULL: the gradient of the student's logits, 0 from n to stride.
void kl_divergence(long rows, long n, long stride, long reverse, const int64_t *targets, const float *teacher,
                   const real *student, real *grad, float *losses, float T, int threads) {
    #pragma omp parallel num_threads(threads)
    {
        float *a = malloc(2 * n * sizeof *a), *b = a + n;
        #pragma omp for
        for (long r = 0; r < rows; r++) {
            const float *x = teacher + r * n;
            float loss = losses[r] = 0;
            if (grad) memset(grad + r * stride, 0, stride * sizeof *grad);
            if (targets[r] < 0) continue;
            for (long i = 0; i < n; i++) b[i] = get(student[r * stride + i]) * (1 / T);
            float log_sum_p = log_sum_exp(x, n), log_sum_q = log_sum_exp(b, n);
            #pragma omp simd reduction(+ : loss)
            for (long i = 0; i < n; i++) {
                float log_p = x[i] - log_sum_p, log_q = b[i] - log_sum_q;
                float p = exponential(log_p), q = exponential(log_q), share = reverse ? q : p;
                float part = share == 0 ? 0 : share * (reverse ? log_q - log_p : log_p - log_q);
                loss += part;
                a[i] = reverse ? part : q;
                b[i] = share;
            }
            losses[r] = loss * T * T;
            if (!grad) continue;
            #pragma omp simd
            for (long i = 0; i < n; i++) grad[r * stride + i] = put((a[i] - b[i] * (reverse ? loss : 1)) * T);
        }
        free(a);
    }
}

// total (n) += x (n).
void accumulate(long n, const real *x, float *total, int threads) {
    #pragma omp parallel for simd num_threads(threads)
    for (long i = 0; i < n; i++) total[i] += get(x[i]);
}

// y (rows, n) = SiLU(gate) * value of x (rows, 2 n), gate before value; backward: dx from the gradient y.
void swiglu(long rows, long n, long backward, const real *x, real *y, real *dx, int threads) {
    #pragma omp parallel for num_threads(threads)
    for (long r = 0; r < rows; r++)
        #pragma omp simd
        for (long i = 0; i < n; i++) {
            long at = r * 2 * n + i;
            float gate = get(x[at]), value = get(x[at + n]), s = 1 / (1 + exponential(-gate)), g = get(y[r * n + i]);
            if (backward) {
                dx[at] = put(g * value * s * (1 + gate * (1 - s)));
                dx[at + n] = put(g * gate * s);
            } else {
                y[r * n + i] = put(gate * s * value);
            }
        }
}
"""


@functools.cache
def c_library(cpu: str = "native", *options: str) -> ctypes.CDLL | None:
    """C_SOURCE, compiled for this processor and kept in the user's cache folder; None if there is no C compiler with
    OpenMP."""
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "cc")
    on_arm, on_mac = platform.machine() in ("aarch64", "arm64"), sys.platform == "darwin"
    # on x86, vectors as wide as the registers; compilers for Arm accept native only as -mcpu
    target = [f"-mcpu={cpu}"] if on_arm else [f"-march={cpu}", "-mprefer-vector-width=512", "-falign-loops=64"]
    # Apple's compiler comes without the OpenMP library, but PyTorch has loaded it
    openmp = ["-Xclang", "-fopenmp", "-undefined", "dynamic_lookup"] if on_mac else ["-fopenmp"]
    # without traps for faults in float arithmetic, loops with conditions are vectorised on AVX2 too
    command = [*compiler.split(), *target, *openmp, "-O3", "-fno-trapping-math", "-fPIC", "-shared", *options]
    processor = platform.processor()
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        processor = next((line for line in f if line.startswith(("flags", "Features"))), processor)
    key = hashlib.sha256("\0".join((C_SOURCE, *command, platform.machine(), processor)).encode()).hexdigest()
    try:
        if os.name == "nt":
            raise OSError("no compiler there has PyTorch's OpenMP")
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "model.py"
        path = folder / f"blocks-{key[:16]}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "blocks.so"
                command += ["-x", "c", "-", "-o", str(made), "-lm"]
                subprocess.run(command, input=C_SOURCE.encode(), check=True, capture_output=True)
                made.replace(path)
        library = ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.CalledProcessError):  # no compiler, or none that works; no home folder
        advice = "gcc, with OpenMP; on a Mac, xcode-select --install brings one; on Windows, use WSL"
        say(f"without a C compiler ({advice}), training on a CPU is slower, generation several times", sys.stderr)
        return None
    for name, declared in re.findall(r"^void (\w+)\((.*?)\) {", C_SOURCE, re.MULTILINE | re.DOTALL):
        kinds = [ctypes.c_void_p if "*" in p else getattr(ctypes, f"c_{p.split()[0]}") for p in declared.split(",")]
        getattr(library, name).argtypes = kinds
    return library


def c_array(kind: type, *values: Any) -> ctypes.Array:
    return (kind * len(values))(*values)


def run_in_c(function: Callable, *arguments: Any) -> None:
    """Call a function of C_SOURCE with the addresses of tensors and, last, the number of threads."""
    given = (a.data_ptr() if isinstance(a, Tensor) else a for a in arguments)
    function(*given, torch.get_num_threads())


def addresses(module: nn.Module | None) -> list[int | None]:
    """Module in C_SOURCE: the addresses of its tensors, None for one that it lacks."""
    tensors = [getattr(module, name, None) for name in ("weight", "scale", "bias")]
    return [None if t is None else t.data_ptr() for t in tensors]


class CEngine:
    """The blocks and the head for a few tokens at a time, by C_SOURCE. It reads the weights in place, matrices in
    float16 or as Int8Linear has them, all else in float32. Pre-norm architectures only."""

    max_rows = 16  # with 32 tokens the plain pass is as fast

    def __init__(self, model: GPT) -> None:
        self.library, self.model, c, pointers = c_library(), model, model.config, []
        for block in model.blocks:
            qk_norms = (getattr(block.attn, name, None) for name in ("q_norm", "k_norm"))
            for module in (block.norm_1, block.norm_2, *qk_norms, *(getattr(*place) for place in block.linears())):
                pointers += addresses(module)
        self.layers = c_array(ctypes.c_void_p, *pointers)
        self.head_matrix = c_array(ctypes.c_void_p, *addresses(model.lm_head or model.wte))
        sizes = c.n_layer, c.n_embd, c.n_head, c.n_kv_head, c.head_dim, c.rope_dim, c.n_inner
        kinds = c.norm == "layernorm", c.parallel_residual, c.qk_norm == "before_rope", c.qk_norm == "after_rope"
        activation = C_ACTIVATIONS.index(ACTIVATIONS[c.activation])
        self.shape = c_array(ctypes.c_long, *sizes, *kinds, activation, c.is_glu)

    def run_blocks(self, x: Tensor, rope: Any, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, _ = x.shape
        if cache is None or cache.kv.dtype != torch.float16 or B * T > self.max_rows:
            return self.model.run_blocks(x, rope, mask, cache)
        x, pad = x.contiguous(), torch.zeros(B, dtype=torch.int64) if cache.pad is None else cache.pad
        tables, sizes = (self.model.rope_cos, self.model.rope_sin), (B, T, cache.length, cache.max_length)
        eps = self.model.config.norm_eps
        run_in_c(self.library.blocks, self.shape, self.layers, *tables, x, cache.kv, pad, *sizes, eps)
        return x

    def head(self, x: Tensor) -> Tensor:
        n_vocab, n = self.model.config.vocab_size, x.size(-1)
        if (rows := x.numel() // n) > self.max_rows:
            return self.model.head(x)
        x, y = x.contiguous(), torch.empty(*x.shape[:-1], n_vocab)
        run_in_c(self.library.head, self.head_matrix, n_vocab, n, x, rows, y)
        return y


def training_library(x: Tensor) -> ctypes.CDLL | None:
    """The library for training with activations like x; None if the plain operators are needed."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.bfloat16) or torch.compiler.is_compiling():
        return None
    return c_library("native", *["-DBFLOAT16"] * (x.dtype == torch.bfloat16))


class HeadsInC(torch.autograd.Function):
    """Attention.heads: q (B, n_head, T, head_dim), k and v (B, n_kv_head, T, head_dim) of qkv (B, T, heads, head_dim).
    The backward pass recomputes the inputs of the norms, so only qkv is kept."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rope: Any, w_q: Tensor | None, w_k: Tensor | None, n_kv: int, qk_norm: str, eps: float
    ) -> tuple[Tensor, ...]:
        B, T, n, d = qkv.shape
        cos, sin = (None, None) if rope is None else (x.float().contiguous() for x in rope)
        rope_dim, rows = (0, 1) if rope is None else (cos.size(-1), math.prod(cos.shape[:-1]))
        norms = qk_norm == "before_rope", qk_norm == "after_rope"
        shape = c_array(ctypes.c_long, B, T, n - 2 * n_kv, n_kv, d, rope_dim, *norms, rows)
        weights = (torch.ones(d) if w is None else w.float() for w in (w_q, w_q if w_k is None else w_k))
        ctx.fixed = shape, cos, sin, *weights, eps
        ctx.save_for_backward(qkv := qkv.contiguous())
        parts = [qkv.new_empty(B, heads, T, d) for heads in (n - 2 * n_kv, n_kv, n_kv)]
        run_in_c(training_library(qkv).heads, *ctx.fixed, False, qkv, *parts, None, None)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        (qkv,) = ctx.saved_tensors
        dqkv, dw = torch.empty_like(qkv), torch.zeros(torch.get_num_threads(), 2, qkv.size(-1))
        run_in_c(training_library(qkv).heads, *ctx.fixed, True, qkv, *(g.contiguous() for g in grads), dqkv, dw)
        d_q, d_k = (w if needed else None for w, needed in zip(dw.sum(dim=0), ctx.needs_input_grad[2:4], strict=True))
        return dqkv, None, d_q, d_k, None, None, None


class SwiGLUInC(torch.autograd.Function):
    """SiLU(gate) * value (..., n) of x (..., 2 n), gate before value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x := x.contiguous())
        n = x.size(-1) // 2
        y = x.new_empty(*x.shape[:-1], n)
        run_in_c(training_library(x).swiglu, y.numel() // n, n, False, x, y, None)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,), n = ctx.saved_tensors, grad.size(-1)
        dx = torch.empty_like(x)
        run_in_c(training_library(x).swiglu, grad.numel() // n, n, True, x, grad.contiguous(), dx)
        return dx


if __name__ == "__main__":
    PROGRAM = sys._getframe()  # this file's
    main()
