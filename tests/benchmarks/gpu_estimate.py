"""How long a training step should take on an H100, worked out and not measured: python tests/benchmarks/gpu_estimate.py

From the FLOPs, the bytes and the launches of a step with --compile, one after the other; what overlaps is a reserve.
The assumptions are the constants below.
"""

import sys

from workers import GPT2_VOCABULARY, load

# One H100 SXM: dense bfloat16, HBM3, NVLink in one direction (900 GB/s in both).
PEAK_FLOPS, MEMORY, NVLINK = 989e12, 3.35e12, 450e9
# The shares of them that are reached: by products of matrices; by PyTorch's attention, FlashAttention-2 (arXiv
# 2407.08608, abstract: 35 % on this GPU); by fused element-wise kernels; by NCCL.
PRODUCTS, ATTENTION, ELEMENTWISE, NCCL = 0.6, 0.35, 0.85, 0.75
LAUNCH = 5e-6  # seconds that a kernel takes the host, from compiled code
LAUNCHES = 30, 8, 60  # of a layer, forward and back; of a chunk of the loss; of all else
# Bytes of a weight and step: AdamW reads four float32 and writes three; the norm, the clipping (12); the weight to
# bfloat16 (6) and its gradient back (6).
WEIGHT_BYTES = 28 + 12 + 6 + 6

RUNS = (("26M", 32), ("300M", 16), ("1B", 16))  # variant, sequences a GPU


def estimate(model, variant: str, batch_size: int) -> dict[str, float]:
    """Seconds of the parts of a step on one GPU, and what else the table shows."""
    vocabulary = 6400 if variant == "26M" else GPT2_VOCABULARY + 2
    c = model.make_config(variant, vocabulary, {}, "published")
    n, tokens, V = model.count_parameters(c), batch_size * c.block_size, c.padded_vocab_size
    attention = 12 * c.n_layer * c.n_head * c.head_dim * c.block_size * tokens  # without the half that is masked
    products = model.training_flops_per_token(c, n) * tokens - attention
    # element-wise kernels read and write, in a forward pass: two norms (2 widths each), two residuals (3), RoPE of
    # queries and keys, the activation; backwards twice as much
    rope = 2 * (c.n_head + c.n_kv_head) * c.head_dim * (c.pos_embd == "rope")
    elements = 10 * c.n_embd + rope + (2 + c.is_glu) * c.n_inner
    # the loss reads the products twice and writes their gradient; each chunk adds to the head's in float32
    rows = min(tokens, 1 << (model.CUDA_LOSS_CHUNK_ELEMENTS // V).bit_length() - 1)
    chunks = -(-tokens // rows)
    loss_bytes = 3 * 2 * tokens * V + chunks * 12 * V * c.n_embd
    parts = {
        "products": products / (PRODUCTS * PEAK_FLOPS),
        "attention": attention / 2 / (ATTENTION * PEAK_FLOPS),
        "elementwise": 3 * 2 * elements * c.n_layer * tokens / (ELEMENTWISE * MEMORY),
        "loss": loss_bytes / (ELEMENTWISE * MEMORY),
        "weights": WEIGHT_BYTES * n / (ELEMENTWISE * MEMORY),
    }
    layer, chunk, rest = LAUNCHES
    launches = layer * c.n_layer + chunk * chunks + rest
    step = max(sum(parts.values()), launches * LAUNCH)
    return {
        **parts, "launches": launches, "step": step, "tokens": tokens, "flops": products + attention,
        "reduce": 2 * 7 / 8 * 4 * n / (NCCL * NVLINK), "memory": model.training_memory_bytes(c, batch_size, n),
    }  # fmt: skip


def main() -> None:
    model, parts = load(), ("products", "attention", "elementwise", "loss", "weights")
    columns = ["variant", "batch", *parts, "launches", "one H100", "of the peak", "memory", "eight", "if overlapped"]
    rows = [columns, ["---"] * len(columns)]
    for variant, batch_size in RUNS:
        e = estimate(model, variant, batch_size)
        speed = [f"{1000 * s:.1f} ms, {k * e['tokens'] / s / 1e6:.2f} M tokens/s" for k, s in (
            (1, e["step"]), (8, e["step"] + e["reduce"]), (8, max(e["step"], e["reduce"]))
        )]  # fmt: skip
        share = f"{e['flops'] / e['step'] / PEAK_FLOPS:.0%}"
        shape = f"{batch_size} x {e['tokens'] // batch_size}"
        rows.append([variant, shape, *(f"{1000 * e[part]:.1f}" for part in parts), f"{e['launches']:.0f}"])
        rows[-1] += [speed[0], share, f"{e['memory'] / 1e9:.0f} GB", *speed[1:]]
    print("\n".join(f"| {' | '.join(row)} |" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
