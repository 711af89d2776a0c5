"""How many kernels a training step launches, as eager PyTorch on a GPU: for each variant, on a pretended one.

    python tests/benchmarks/launches.py 26M 120M --optimizer muon

Neither the width nor the batch changes the number, so both are tiny here. What is counted is operators that are no
views: at least one kernel each on CUDA. Attention and RMSNorm count as the fused operators that they are there, what
takes lists of tensors (AdamW, the norm of the gradients) as one, though large models take several launches for it.
"""

import argparse
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pretended import Pretended, device, pretend  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

import model  # noqa: E402


class FusedRMSNorm(torch.autograd.Function):
    """One operator forward and one backward, as on CUDA; elsewhere PyTorch makes it of several."""

    @staticmethod
    def forward(ctx, x, shape, weight, eps):
        device.launches["rms_norm"] += 1
        ctx.inputs = [t.numbers.detach().requires_grad_() for t in (x, weight) if t is not None]
        with torch.enable_grad():
            ctx.y = F.rms_norm(ctx.inputs[0], shape, *(ctx.inputs[1:] or [None]), eps)
        return Pretended(ctx.y.detach())

    @staticmethod
    def backward(ctx, grad):
        device.launches["rms_norm_backward"] += 1
        grads = [Pretended(g) for g in torch.autograd.grad(ctx.y, ctx.inputs, grad.numbers)]
        return grads[0], None, grads[1] if len(grads) > 1 else None, None


class Fused(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.rms_norm:
            return FusedRMSNorm.apply(args[0], args[1], kwargs["weight"], kwargs["eps"])
        return func(*args, **kwargs)


def launches_of_a_step(variant: str, optimizer: str, recipe: str) -> Counter:
    """Operators by name, in forward and backward pass and in the update, of the second step in bfloat16."""
    config = model.make_config(variant, 300, {}, recipe)
    config = replace(config, n_embd=8 * config.n_head, head_dim=8, n_inner=32, block_size=16)
    with pretend("cuda"), Fused():
        gpt = model.set_precision(model.GPT(config).to("cuda"), "bfloat16", training=True).train()
        t = model.TrainConfig(optimizer=optimizer, batch_size=2)
        run = model.Run.__new__(model.Run)
        run.model, run.t, run.step, run.sums, run.trained_rows = gpt, t, 0, {}, {}
        run.params, run.optimizers = {p: p for p in gpt.parameters()}, model.make_optimizers(gpt, t)
        run.scaler, run.loss_fn = torch.amp.GradScaler("cuda", enabled=False), model.language_modelling
        run.bad = torch.zeros(4, dtype=torch.int64, device="cuda")
        batch = {k: torch.randint(300, (2, 16)).to("cuda") for k in ("idx", "targets")}
        for _ in range(2):
            device.launches.clear()
            run.update(run.accumulate_gradients([batch], torch.full((), 32.0, device="cuda")))
        return Counter(device.launches)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("variants", nargs="*", default=["26M", "120M"])
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon", "normuon"])
    parser.add_argument("--recipe", default="published", choices=["published", "tuned"])
    a = parser.parse_args()
    for variant in a.variants:
        counted = launches_of_a_step(variant, a.optimizer, a.recipe)
        most = ", ".join(f"{n} {name}" for name, n in counted.most_common(8))
        print(f"{variant}: {sum(counted.values()):,} launches a step ({most}, ...)")
