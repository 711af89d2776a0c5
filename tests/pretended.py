"""A pretended GPU, so that what model.py does on CUDA and on MPS is tested where there is neither.

Its tensors hold their numbers on the CPU and say that they are elsewhere. Operators are held to what such a device
asks for: all tensors in one place, no float64 on MPS, a generator of its own. What makes the host wait for the device
is written down: reading a value back, sizes that depend on values, and copies to the device that are not in the
background. So are the operators, each of them at least one launch of a kernel.
"""

import contextlib
import functools
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import varlen  # noqa: F401 (its operators)
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

import model

aten = torch.ops.aten
HERE = "pretended:0"  # what PyTorch's C++ sees; Python sees Device.named
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
PRODUCTS = {  # and which of the arguments is the first factor
    aten.mm.default: 0, aten.mm.out: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.addmm_.default: 1,
    aten.baddbmm.default: 1,
}  # fmt: skip
MASKED_FILL = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor}
NO_LAUNCH = ("empty", "new_empty", "_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "_local_scalar_dense")


def one_by_one(ends: torch.Tensor, *tensors: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """The documents in tensors (T, heads, head_dim), as (n_head, length, head_dim) float32; the first has n_head."""
    for begin, end in itertools.pairwise(ends.tolist()):
        own = [x[begin:end].transpose(0, 1).float() for x in tensors]
        yield [x.repeat_interleave(len(own[0]) // len(x), dim=0) for x in own]


def causal_probs(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT / q.size(-1) ** 0.5
    return scores.masked_fill(torch.ones_like(scores).triu(1) > 0, float("-inf")).softmax(dim=-1)


def varlen_attention(q, k, v, ends, ends_k, max_q, max_k, causal, scale, window, gqa=False) -> tuple:
    """What torch.nn.attention.varlen computes on CUDA, and asks for (PyTorch's flash_attn/flash_api.cpp)."""
    lengths = ends.diff()
    assert q.dtype in (torch.float16, torch.bfloat16) and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    assert ends.dtype == torch.int32 and ends[0] == 0 and ends[-1] == len(q) and (lengths >= 0).all()
    assert torch.equal(ends, ends_k) and lengths.max() <= min(max_q, max_k) and (gqa or q.shape == k.shape)
    assert causal and scale is None and window == [-1, 0]
    y = torch.cat([(causal_probs(q, k) @ v).transpose(0, 1) for q, k, v in one_by_one(ends, q, k, v)])
    return y.to(q.dtype), torch.zeros(q.size(1), len(q)), torch.zeros(2, dtype=torch.uint64)


def varlen_attention_backward(grad, q, k, v, out, lse, ends, *others) -> list[torch.Tensor]:
    """By hand: gradients cannot be asked for below PyTorch's autograd."""
    parts = []
    for one_q, one_k, one_v, one_grad in one_by_one(ends, q, k, v, grad):
        p, dp = causal_probs(one_q, one_k), one_grad @ one_v.mT
        ds = p * (dp - (p * dp).sum(dim=-1, keepdim=True)) / q.size(-1) ** 0.5
        parts.append([x.transpose(0, 1) for x in (ds @ one_k, ds.mT @ one_q, p.mT @ one_grad)])
    whole = [torch.cat(those) for those in zip(*parts, strict=True)]
    return [x.unflatten(1, (like.size(1), -1)).sum(2).to(q.dtype) for x, like in zip(whole, (q, k, v), strict=True)]


ON_CUDA_ALONE = {
    torch.ops.torch_attn._varlen_attn.default: varlen_attention,
    torch.ops.torch_attn._varlen_attn_backward.default: varlen_attention_backward,
}


class Device(_DummyBackendModule):
    """The one device there is, in a process: what it is called, and what was asked of it."""

    there = False
    named = torch.device("cuda", 0)
    phase = "preparing"  # "training" between two records of a log, "reporting" for one

    def reset(self, kind: str) -> None:
        self.named, self.phase = torch.device(kind, 0), "preparing"
        self.waits: dict[str, Counter] = defaultdict(Counter)  # by phase: what the host waited for, and where
        self.wide: Counter = Counter()  # where float64 came from
        self.launches: Counter = Counter()  # operators that launch kernels
        self.state = torch.Generator().get_state()  # of its random numbers

    def is_available(self) -> bool:
        return self.there

    def manual_seed_all(self, seed: int) -> None:
        self.state = torch.Generator().manual_seed(seed).get_state()

    def wait(self, what: str) -> None:
        self.waits[self.phase][f"{what} in {caller()}"] += 1

    @contextlib.contextmanager
    def random(self) -> Iterator[None]:
        """Random numbers come from this device's state."""
        host = torch.get_rng_state()
        torch.set_rng_state(self.state)
        yield
        self.state = torch.get_rng_state()
        torch.set_rng_state(host)


device = Device()


class Hooks(_DummyPrivateUse1Hook):
    """PyTorch must know of the device before its first backward pass. It is there only inside of `pretend`."""

    def is_available(self) -> bool:
        return device.there


_setup_privateuseone_for_python_backend("pretended", backend_module=device, hook=Hooks())


def caller() -> str:
    """The function of model.py that is running; PyTorch's own backward pass runs in another thread, without any."""
    frame = sys._getframe()
    while frame and frame.f_code.co_filename != model.__file__:
        frame = frame.f_back
    return frame.f_code.co_qualname if frame else "autograd"


class Pretended(torch.Tensor):
    """A tensor on the pretended device; `numbers` is the same one on the CPU."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Pretended":
        x = torch.Tensor._make_wrapper_subclass(
            cls, numbers.size(), strides=numbers.stride(), storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype, device=HERE,
        )  # fmt: skip
        x.numbers = numbers
        if numbers.dtype == torch.float64:
            if device.named.type == "mps":
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it")
            device.wide[caller()] += 1
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: device.named)

    def tolist(self) -> Any:
        device.wait("tolist")
        return self.numbers.tolist()

    def __reduce_ex__(self, protocol: Any) -> Any:
        device.wait("saving")
        return self.numbers.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return operate(func, args, kwargs or {})


def operate(func: Any, args: tuple, kwargs: dict) -> Any:
    """Run an operator on the CPU's numbers, as the device it is meant for would, or complain as that would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours, others = ([x for x in tensors if isinstance(x, Pretended) == mine] for mine in (True, False))
    to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    if not ours and to != "pretended":
        return func(*args, **kwargs)
    copies = func in (aten._to_copy.default, aten.copy_.default)
    if copies:
        check_copy(func, args, kwargs, to)
    else:
        check_places(func, args, ours, others)
    if func in PRODUCTS and device.named.type == "mps" and args[PRODUCTS[func]].size(-1) >= 32767:
        raise RuntimeError("an M1 or M2 sums beyond the end of such matrices (pytorch/pytorch#195163)")
    if launches(func):
        device.launches[func.overloadpacket.__name__] += 1
    if "found_inf" in kwargs and device.named.type == "mps":
        kwargs = {**kwargs, "found_inf": None}  # its fused optimizers do not ask for it
    plain_args, plain = tree_map(lambda x: x.numbers if isinstance(x, Pretended) else x, (args, kwargs))
    if to:
        plain = {**plain, "device": torch.device("cpu")}
    seeded = torch.Tag.nondeterministic_seeded in func.tags and plain.get("generator") is None
    with device.random() if seeded else contextlib.nullcontext():
        out = ON_CUDA_ALONE.get(func, func)(*plain_args, **plain)
    if to == "cpu" or copies and not isinstance(args[0], Pretended) and to is None:
        return args[0] if func is aten.copy_.default else out
    out = tree_map(lambda x: Pretended(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


@functools.cache
def launches(func: Any) -> bool:
    """Whether an operator runs a kernel: views and empty memory do not."""
    is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
    return not is_view and not func.overloadpacket.__name__.startswith(NO_LAUNCH)


def check_copy(func: Any, args: tuple, kwargs: dict, to: str | None) -> None:
    """CUDA copies in the background from pinned memory. MPS does, too, from any memory, but reads it later, when it may
    be something else's (https://github.com/pytorch/pytorch/issues/189690): here that is forbidden."""
    source = args[1] if func is aten.copy_.default else args[0]
    is_ours, goes = isinstance(source, Pretended), isinstance(args[0], Pretended) if to is None else to == "pretended"
    background = kwargs.get("non_blocking") or (func is aten.copy_.default and len(args) > 2 and args[2])
    if is_ours and not goes:
        device.wait("copy to the host")
    elif goes and not is_ours and background and device.named.type == "mps":
        raise RuntimeError("MPS would read memory of the host that may be freed by then")
    elif goes and not is_ours and not (background and getattr(source, "pinned", False)):
        device.wait("copy to the device")


def check_places(func: Any, args: tuple, ours: list, others: list) -> None:
    """Tensors on the CPU are taken as an index, which is copied, and as a single number, which some operators copy."""
    indices = [x for x in tree_leaves(args[1]) if x is not None] if func in INDEXING else []
    for x in others:
        if x.dim() and not any(x is i for i in indices):
            raise RuntimeError(f"Expected all tensors to be on the same device: {func} in {caller()}")
        if x.dim() or func is aten.where.self or func in INDEXING:
            device.wait(f"{func.overloadpacket.__name__} with a tensor on the CPU")
    if func in MASKED_FILL and isinstance(args[2], Pretended):
        device.wait("masked_fill with a tensor's value")
    if torch.Tag.data_dependent_output in func.tags or any(i.dtype == torch.bool for i in indices) or (
        torch.Tag.dynamic_output_shape in func.tags and func not in INDEXING
    ):  # fmt: skip
        device.wait(func.overloadpacket.__name__)


class Operators(TorchDispatchMode):
    """Operators that have no tensor of the device yet: what makes one, or copies one there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return operate(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """Calls of PyTorch that name the device, which its C++ does not know by that name, or need a real one."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        is_ours = bool(args) and isinstance(args[0], Pretended)
        if func is F.scaled_dot_product_attention and is_ours and device.named.type == "cuda":
            if kwargs.get("enable_gqa") and (args[3] is not None or args[0].dtype == torch.float32):
                raise RuntimeError("no fused kernel of CUDA takes grouped heads and a mask, or float32")
        if func is F.scaled_dot_product_attention and is_ours and args[3] is None and not args[4]:
            q, k, v = args[:3]  # one kernel, as on CUDA: flash attention
            return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, kwargs.get("is_causal", False))[0]
        if func is torch.tensor and kwargs.get("device") is not None:  # a copy from the host, in disguise
            return torch.tensor(*args, **{**kwargs, "device": None}).to(self.known(kwargs["device"]))
        if func is torch.Tensor.__getitem__ and is_ours and isinstance(args[1], list):
            args = (args[0], torch.tensor(args[1]).to(HERE))
        if func is not torch.device:
            args, kwargs = tree_map(self.known, (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def known(x: Any) -> Any:
        """The device by the name that C++ knows, anything else as it is."""
        is_ours = isinstance(x, torch.device | str) and str(x) in (device.named.type, str(device.named))
        return HERE if is_ours else x


class Generator(torch.Generator):
    """A generator of a device."""

    def __new__(cls, where: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")


@contextlib.contextmanager
def pretend(kind: str) -> Iterator[Device]:
    """There is a device, cuda or mps, in here."""
    device.reset(kind)
    module, precision = getattr(torch, kind), torch.get_float32_matmul_precision()

    def during(phase: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            before, device.phase = device.phase, phase
            try:
                return function(*args, **kwargs)
            finally:
                device.phase = before

        return call

    with pytest.MonkeyPatch.context() as patch, Functions(), Operators():
        patch.setattr(torch.backends.mps if kind == "mps" else torch.cuda, "is_available", lambda: True)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(module, "get_rng_state", lambda where=None: device.state)
        patch.setattr(module, "set_rng_state", lambda state, where=None: setattr(device, "state", state))
        if kind == "cuda":
            patch.setattr(torch.cuda, "_initialized", True)
            patch.setattr(torch.cuda, "device", contextlib.nullcontext)
            patch.setattr(torch.cuda, "get_device_capability", lambda where=None: (8, 0))
            patch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
            patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "compute_120"])
            _foreach_supported_types.append(Pretended)
        # subclasses of tensors and inference_mode do not go together
        patch.setattr(model, "generate", torch.no_grad()(model.generate.__wrapped__))
        patch.setattr(model, "fit", during("training", model.fit))
        patch.setattr(model.Run, "report", during("reporting", model.Run.report))
        try:
            device.there = True
            # p.data = x would leave p.numbers as it is
            torch.__future__.set_overwrite_module_params_on_conversion(True)
            yield device
        finally:
            device.there = False
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch.set_float32_matmul_precision(precision)
            torch.backends.cuda.enable_cudnn_sdp(True)
            if kind == "cuda":
                _foreach_supported_types.remove(Pretended)
