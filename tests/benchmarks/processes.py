"""What each process of a training run holds and does: with 1, 2 and 4 of them, on the CPU.

python tests/benchmarks/processes.py memory --variant 300M     the most memory of a process in a step
python tests/benchmarks/processes.py speed --variant 7M        tokens per second of all of them, one thread each

Of memory it prints the anonymous part, which is the process's own: weights, gradients, AdamW's moments, activations.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def rank_main(arguments: list[str]) -> None:
    """One process: model.py with these arguments, and at its end the most memory since its second step."""
    sys.path.insert(0, str(ROOT))
    import model

    update, most = model.Run.update, [0.0]

    def measured(run: "model.Run", sums: dict) -> None:
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        most[0] = max(most[0], int(status.split()[0]) / 2**20 if run.step else 0)
        update(run, sums)

    model.Run.update = measured
    sys.argv = ["model.py", *arguments]
    model.main()
    print(f"memory {os.environ.get('RANK', 0)} {most[0]:.2f}", flush=True)


def run_of(n: int, arguments: list[str], folder: str) -> str:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(n), __file__]
    command = [*(start if n > 1 else start[:1] + start[-1:]), "rank", *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr)
    return run.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "speed"))
    parser.add_argument("--variant", default="300M")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("".join(chr(97 + i * i % 26) for i in range(100_000)))
        size = ["--block_size", "128", "--batch_size", "4", "--max_iters", "3"]
        if a.what == "speed":
            size = ["--batch_size", "16", "--max_iters", "40"]
        fixed = ["--data", "text.txt", "--tokenizer", "byte", "--recipe", "published", "--dtype", "float32", "--device",
                 "cpu", "--compile", "false", "--log_interval", str(int(size[-1]) // 2 or 1), "--eval_interval", "1000",
                 "--eval_tokens", "1", "--sample_interval", "-1", "--overwrite"]  # fmt: skip
        for n in a.processes:
            for fsdp in ("false", "true")[: 1 + (n > 1)]:
                more = ["--variant", a.variant, "--optimizer", a.optimizer, "--fsdp", fsdp]
                out = run_of(n, ["train", *fixed, *size, *more], folder)
                held = [float(line.split()[2]) for line in out.splitlines() if line.startswith("memory ")]
                speed = out.split(" tokens/s")[-2].split()[-1]
                print(f"{n} processes, fsdp {fsdp}: {max(held):.2f} GiB, {speed} tokens/s", flush=True)


if __name__ == "__main__":
    rank_main(sys.argv[2:]) if sys.argv[1:2] == ["rank"] else main()
