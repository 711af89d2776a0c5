"""Peak memory and time of a distillation step: head and loss in chunks (model.py) against full logits (plain PyTorch).

    python tests/benchmarks/distill_memory.py
    python tests/benchmarks/distill_memory.py --vocab_sizes 50304 --batch_sizes 16 --block_size 1024 --chunk_rows 64 512

Each line is a process of its own: forward and backward of a two-layer student after a two-layer teacher, in float32 on
the CPU. `peak` is the process's largest resident memory (getrusage) less what it had before its first step, when both
models were there; it includes the gradients. `seconds` is the best of the steps after the first. The command line lets
glibc keep freed memory, which is faster and larger; --keep_freed does so here. The parent does not import torch, for a
child reports its parent's memory where that is the larger.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DISTRIBUTIONS = 4  # that the loss of a chunk holds at once, as Distillation tells linear_loss


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def plain_loss(teacher, student, batch, d):
    """The same loss from full logits, by autograd."""
    import torch
    import torch.nn.functional as F

    with torch.no_grad():
        log_p = (teacher(batch["idx"]) / d.temperature).log_softmax(dim=-1)
    logits = student(batch["idx"])
    log_q = (logits / d.temperature).log_softmax(dim=-1)
    divergence = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    cross_entropy = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    return d.alpha * d.temperature**2 * divergence + (1 - d.alpha) * cross_entropy


def measure(
    method: str, vocab_size: int, batch_size: int, block_size: int, n_embd: int, rows: int, steps: int, keep: bool
) -> dict:
    """In the child: take the steps and say what they cost."""
    sys.path.insert(0, str(ROOT))
    import torch

    import model

    if keep:
        model.keep_freed_memory()
    torch.manual_seed(0)
    shape = dict(vocab_size=vocab_size, block_size=block_size, n_layer=2, n_head=4)
    teacher = model.GPT(model.GPTConfig(**shape, n_embd=2 * n_embd)).eval()
    student = model.GPT(model.GPTConfig(**shape, n_embd=n_embd))
    d = model.DistillConfig()
    objective = model.Distillation(teacher, d, vocab_size)
    row = student.config.padded_vocab_size * DISTRIBUTIONS
    if rows:
        model.LOSS_CHUNK_ELEMENTS = rows * row
    tokens = torch.randint(vocab_size, (batch_size, block_size + 1))
    batch = {"idx": tokens[:, :-1].contiguous(), "targets": tokens[:, 1:].contiguous()}
    before, seconds = peak_bytes(), []
    for _ in range(1 + steps):
        student.zero_grad()
        begin = time.perf_counter()
        loss = plain_loss(teacher, student, batch, d) if method == "plain" else objective(student, batch)[0]
        loss.backward()
        seconds.append(time.perf_counter() - begin)
    n, chunk = batch_size * block_size, max(64, model.LOSS_CHUNK_ELEMENTS // row)
    at_once, peak = n if method == "plain" else min(n, chunk), peak_bytes() - before
    return {"rows_at_once": at_once, "peak_mb": peak / 1e6, "seconds": min(seconds[1:]), "loss": loss.item() / n}


def available_bytes() -> float:
    """Memory that can be had without swapping; infinite where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[8192, 50304, 150016])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--block_size", type=int, default=256)
    parser.add_argument("--n_embd", type=int, default=128, help="of the student; the teacher's is twice as wide")
    parser.add_argument(
        "--chunk_rows", type=int, nargs="+", default=[0], help="tokens of a chunk (0: model.py's choice)"
    )
    parser.add_argument("--steps", type=int, default=2, help="timed steps")
    parser.add_argument("--keep_freed", action="store_true", help="allocate as the command line does")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(**json.loads(args.measure))))

    results = []
    if not args.json:
        print("vocabulary  batch x block  method   rows at once  full logits MB   peak MB  seconds    loss")
    for vocab_size in args.vocab_sizes:
        for batch_size in args.batch_sizes:
            for method, rows in [("plain", 0), *(("chunked", rows) for rows in args.chunk_rows)]:
                case = dict(method=method, vocab_size=vocab_size, batch_size=batch_size, block_size=args.block_size)
                logits_mb = vocab_size * batch_size * args.block_size * 4 / 1e6
                needed_gb = logits_mb / 1000 * (15 if args.keep_freed else 7)  # as measured on smaller cases
                line = f"{vocab_size:>10,}  {f'{batch_size} x {args.block_size}':>13}  {method:<7}"
                if method == "plain" and needed_gb * 1e9 > available_bytes():
                    results.append({**case, "error": "not enough memory"})
                    print(f"{line}  left out: it needs about {needed_gb:.0f} GB") if not args.json else None
                    continue
                child = dict(case, n_embd=args.n_embd, rows=rows, steps=args.steps, keep=args.keep_freed)
                command = [sys.executable, __file__, "--measure", json.dumps(child)]
                made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                results.append({**case, "logits_mb": logits_mb, **made})
                line += f"  {made['rows_at_once']:>12,}  {logits_mb:>14,.0f}  {made['peak_mb']:>8,.0f}"
                line += f"  {made['seconds']:>7.2f}  {made['loss']:.4f}"
                print(line, flush=True) if not args.json else None
    if args.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
