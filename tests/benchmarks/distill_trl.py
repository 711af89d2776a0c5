"""A step of distillation beside TRL's (trl.experimental.gkd, its loss on both models' whole logits), with the same
teacher, student, batch, vocabulary and AdamW. Contenders take turns, each in a process of its own. In bfloat16, which
both take where the processor has it, TRL's student runs under autocast, as by its Trainer, its teacher in bfloat16.

pip install trl transformers accelerate
python tests/benchmarks/distill_trl.py --model DIR        a Hugging Face directory, whose student has every second layer
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
TEMPERATURE = 2.0


def ours(folder: str, idx, dtype: str):
    import torch

    import model

    model.keep_freed_memory()
    teacher = model.open_model(folder).model
    student = model.GPT(replace(teacher.config, n_layer=teacher.config.n_layer // 2))
    model.every_kth_layer(teacher, student)
    model.set_precision(student, dtype, training=True)
    teacher.to(student.compute_dtype).compute_dtype = student.compute_dtype
    settings = model.DistillConfig(temperature=TEMPERATURE, alpha=1.0)
    loss_of = model.Distillation(teacher, settings, teacher.config.vocab_size)
    (optimizer,) = model.make_optimizers(student.train(), model.TrainConfig(learning_rate=1e-4))
    batch = {"idx": idx[:, :-1], "targets": idx[:, 1:]}

    def step() -> torch.Tensor:
        loss = loss_of(student, batch)[0] / batch["targets"].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def trl(folder: str, idx, dtype: str):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    config = AutoConfig.from_pretrained(folder, dtype="float32")
    last, config.num_hidden_layers = config.num_hidden_layers - 1, config.num_hidden_layers // 2
    config.layer_types = None
    student = AutoModelForCausalLM.from_config(config).train()
    source = [round(i * last / (config.num_hidden_layers - 1)) for i in range(config.num_hidden_layers)]
    for part in ("embed_tokens", "norm"):
        getattr(student.model, part).load_state_dict(getattr(teacher.model, part).state_dict())
    for layer, i in zip(student.model.layers, source, strict=True):
        layer.load_state_dict(teacher.model.layers[i].state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4, fused=True)

    def step() -> torch.Tensor:
        with torch.no_grad():
            teacher_logits = teacher(input_ids=idx[:, :-1]).logits
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits = student(input_ids=idx[:, :-1]).logits.float()
        loss = GKDTrainer.generalized_jsd_loss(logits, teacher_logits, idx[:, 1:], beta=0, temperature=TEMPERATURE)
        (TEMPERATURE**2 * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return TEMPERATURE**2 * loss

    return step


def worker(who: str, folder: str, batch: int, block: int, steps: int, dtype: str) -> dict[str, float]:
    import torch

    idx = torch.randint(49152, (batch, block + 1), generator=torch.Generator().manual_seed(1))
    step = {"ours": ours, "trl": trl}[who](folder, idx, dtype)
    losses, times = [], []
    for _ in range(steps + 1):
        begun = time.perf_counter()
        losses.append(step().item())
        times.append(time.perf_counter() - begun)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"first loss": losses[0], "seconds": statistics.median(times[1:]), "MB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--block", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--worker", choices=("ours", "trl"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.model, args.batch[0], args.block, args.steps, args.dtype)))
        return
    for batch in args.batch:
        found = {"ours": [], "trl": []}
        for _ in range(args.rounds):
            for who, runs in found.items():
                options = ["--model", args.model, "--batch", str(batch), "--block", str(args.block)]
                options += ["--dtype", args.dtype]
                command = [sys.executable, __file__, "--worker", who, "--steps", str(args.steps), *options]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
        ours, peer = ({k: statistics.median(r[k] for r in runs) for k in runs[0]} for runs in found.values())
        for who, m in (("ours", ours), ("TRL", peer)):
            print(f"{batch} x {args.block}, {who}: " + ", ".join(f"{k} {v:,.4g}" for k, v in m.items()))
        print(f"{batch} x {args.block}: ratio {peer['seconds'] / ours['seconds']:.2f}")


if __name__ == "__main__":
    main()
