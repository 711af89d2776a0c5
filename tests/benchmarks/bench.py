"""How fast model.py is, beside what else there is and beside what the machine can do.

python tests/benchmarks/bench.py train --nanogpt ../nanoGPT                          one row of the README's table
python tests/benchmarks/bench.py shakespeare --nanogpt ../nanoGPT --text input.txt   Tiny Shakespeare, whole commands
python tests/benchmarks/bench.py smollm2 --model DIR --text input.txt                a Hugging Face directory
python tests/benchmarks/bench.py gpu --nanogpt ../nanoGPT                            on a machine with CUDA
python tests/benchmarks/bench.py all --nanogpt ../nanoGPT --text input.txt --model DIR --json results.json

Each measurement is a process of its own, and contenders take turns (A B A B ...), so that a machine that slows down
slows all of them. Numbers are medians over the rounds. The limits of the machine are measured in the same rounds. This
file holds the rows and the table; workers.py holds what runs in the processes.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODEL_PY = ROOT / "model.py"

# nanoGPT's documented CPU run on Tiny Shakespeare (its README, "I only have a macbook").
NANOGPT_SHAKESPEARE = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
).split()
NANOGPT_LOSS = 1.88  # what that run reaches

# Ours, of the same shape: the fewest steps that reach nanoGPT's loss, and the best recipe for nanoGPT's time.
OURS_FAST = dict(
    tokenizer="byte", variant="7M", n_layer=4, n_head=4, n_embd=128, n_inner=320, learning_rate=1e-2, seed=2,
    block_size=64, batch_size=16, max_iters=210, eval_tokens=10**9, eval_interval=10**9, sample_interval=-1,
)  # fmt: skip
OURS_LONG = dict(OURS_FAST, batch_size=32, muon_lr=0.012, max_iters=1150)  # max_iters is fitted to nanoGPT's time

PROMPT = "The history of computing begins with"
SMOLLM2_BARS = {  # of ours and a peer: bar and aim
    ("ours", "transformers"): ("3", ""),
    ("ours", "llama.cpp bf16"): ("", "1"),
    ("ours int8", "llama.cpp q8_0"): ("", "1"),
}


class Row:
    """One row of the table: its lines for the README and all it measured for the JSON."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.lines, self.data = args, [], {}

    def in_turn(self, contenders: dict[str, tuple[str, dict]], rounds: int = 0) -> dict[str, dict[str, float]]:
        """Run workers, {label: (worker, its arguments)}, in turn; returns the median of each number they print."""
        runs: dict[str, list[dict]] = {label: [] for label in contenders}
        for i in range(rounds or self.args.rounds):
            for label, (name, arguments) in contenders.items():
                runs[label].append(worker(name, **arguments))
                brief = {k: v for k, v in runs[label][-1].items() if isinstance(v, (int, float))}
                note(f"round {i + 1}, {label}: " + ", ".join(f"{k} {v:.4g}" for k, v in brief.items()))
        self.data.update(runs)
        return {label: medians(results) for label, results in runs.items()}

    def line(self, work: str, ours: str, peer: str, ratio: float | str = "", bar: str = "", aim: str = "") -> None:
        self.lines.append([work, ours, peer, f"{ratio:.2f}" if isinstance(ratio, float) else ratio, bar, aim])

    def limits_line(self, m: dict[str, float]) -> None:
        peaks = " and ".join(f"{m[k]:.0f} GFLOP/s in {k.split('_')[0]}" for k in m if k.endswith("_gflops"))
        self.line("limits of the machine", f"torch.mm {peaks}; memory {m['memory_gb_per_s']:.1f} GB/s", "")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def medians(results: list[dict]) -> dict[str, float]:
    numbers = [k for k, v in results[0].items() if isinstance(v, (int, float))]
    return {k: statistics.median(r[k] for r in results) for k in numbers}


def worker(name: str, **arguments) -> dict:
    """Run a function of workers.py in a fresh process; returns what it returns and `process_seconds`."""
    begin = time.perf_counter()
    output = command(HERE / "workers.py", name, json.dumps(arguments))
    return {**json.loads(output.splitlines()[-1]), "process_seconds": time.perf_counter() - begin}


def works(name: str, **arguments) -> bool:
    """Whether a worker comes to its end."""
    arguments = [sys.executable, HERE / "workers.py", name, json.dumps(arguments)]
    return subprocess.run(arguments, capture_output=True).returncode == 0


def command(*arguments: object, cwd: Path | None = None) -> str:
    """Run Python with these arguments; returns its standard output."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        what = " ".join(map(str, arguments))
        sys.exit(f"{what}: exit status {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def timed(*arguments: object, cwd: Path | None = None) -> tuple[float, str]:
    begin = time.perf_counter()
    output = command(*arguments, cwd=cwd)
    return time.perf_counter() - begin, output


def need(args: argparse.Namespace, row: str, *options: str) -> None:
    for option in options:
        if getattr(args, option) is None:
            sys.exit(f"row {row} needs --{option}")


# ----------------------------------------------------------------------------------------------------------------------
# The rows
# ----------------------------------------------------------------------------------------------------------------------


def train(row: Row) -> None:
    """A training step of the 7M variant with GPT-2's vocabulary, batch 16 x 128, on the same random tokens."""
    need(row.args, "train", "nanogpt")
    steps = dict(steps=2, warmup=1) if row.args.quick else dict(steps=10, warmup=3)
    peers = {
        "nanoGPT": ("train_nanogpt", dict(steps, folder=row.args.nanogpt)),
        "transformers": ("train_transformers", steps),
    }
    m = row.in_turn({"limits": ("limits", {}), "ours": ("train_ours", steps), **peers})
    ours, nano, limits = m["ours"], m["nanoGPT"], m["limits"]
    kind = "bfloat16" if "bfloat16_gflops" in limits else "float32"
    for label in peers:
        bar = ("2.5", "3.5") if label == "nanoGPT" else ("", "")
        ratio = m[label]["step_seconds"] / ours["step_seconds"]
        a, b = (f"{x['tokens_per_s']:,.0f} tokens/s ({x['step_seconds']:.3f} s a step)" for x in (ours, m[label]))
        row.line("train 7M, 16 x 128", a, f"{label} {b}", ratio, *bar)
    memory = [f"{x['peak_mb']:,.0f} MB" for x in (ours, nano)]
    row.line("its peak memory", memory[0], f"nanoGPT {memory[1]}", ours["peak_mb"] / nano["peak_mb"], "<= 0.45", "0.35")
    flops = ours["flops_per_token"]
    mfu = [x["tokens_per_s"] * flops / (limits[f"{kind}_gflops"] * 1e9) for x in (ours, nano)]
    row.line(f"its share of {kind}'s peak", f"{mfu[0]:.0%}", f"nanoGPT {mfu[1]:.0%}", "", "45 %", "60 %")
    row.limits_line(m["limits"])


def shakespeare(row: Row) -> None:
    """Tiny Shakespeare by whole commands: the time to nanoGPT's loss, and the loss at nanoGPT's time."""
    need(row.args, "shakespeare", "nanogpt", "text")
    quick = dict(max_iters=20) if row.args.quick else {}
    rounds: dict[str, list[dict]] = {"nanoGPT": [], "ours, fast": [], "ours, long": []}
    long_iters = OURS_LONG["max_iters"]
    for i in range(row.args.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            nano = nanogpt_shakespeare(row.args, Path(scratch) / "nanoGPT")
        fast = ours_shakespeare(row.args.text, {**OURS_FAST, **quick})
        if i == 0:  # training time grows with the tokens; what comes before and after does not
            per_token = fast["train_seconds"] / (fast["steps"] * OURS_FAST["batch_size"] * OURS_FAST["block_size"])
            left = nano["seconds"] - (fast["seconds"] - fast["train_seconds"])
            long_iters = left / (per_token * OURS_LONG["batch_size"] * OURS_LONG["block_size"])
        long = ours_shakespeare(row.args.text, {**OURS_LONG, "max_iters": max(1, int(long_iters))})
        long_iters = max(1, int(long_iters)) * nano["seconds"] / long["seconds"]  # the next round comes closer
        for label, result in zip(rounds, (nano, fast, long), strict=True):
            rounds[label].append(result)
            note(f"round {i + 1}, {label}: {result}")
    row.data.update(rounds, flags={"fast": OURS_FAST, "long": OURS_LONG})
    nano, fast, long = map(medians, rounds.values())
    work = f"whole command to validation loss {NANOGPT_LOSS}"
    reached = "" if fast["val_loss"] <= NANOGPT_LOSS else ": NOT REACHED"
    ours = f"{fast['seconds']:.1f} s (loss {fast['val_loss']:.3f}{reached}; {fast['parameters']:,.0f} parameters)"
    peer = f"nanoGPT {nano['seconds']:.1f} s (loss {nano['val_loss']:.3f}; {nano['parameters']:,.0f} parameters)"
    row.line(work, ours, peer, nano["seconds"] / fast["seconds"], "4", "6")
    ours = f"{long['val_loss']:.3f} in {long['seconds']:.1f} s ({long['steps']:.0f} steps)"
    peer = f"nanoGPT {nano['val_loss']:.3f} in {nano['seconds']:.1f} s"
    row.line("validation loss at nanoGPT's time", ours, peer, "", "<= 1.62", "1.55")


def nanogpt_shakespeare(args: argparse.Namespace, folder: Path) -> dict:
    """nanoGPT's run in a copy of the checkout; its prepare.py is not counted. val_loss is over the whole split."""
    shutil.copytree(args.nanogpt, folder, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
    data = folder / "data" / "shakespeare_char"
    shutil.copyfile(args.text, data / "input.txt")
    command("prepare.py", cwd=data)
    flags = [*NANOGPT_SHAKESPEARE, *(["--max_iters=20", "--eval_interval=10"] if args.quick else [])]
    seconds, output = timed(*flags, cwd=folder)
    printed = float(re.findall(r"val loss ([\d.]+)", output)[-1])
    return {"seconds": seconds, "printed_val_loss": printed, **worker("nanogpt_val_loss", folder=str(folder))}


def ours_shakespeare(text: str, flags: dict) -> dict:
    """One `model.py train` in an empty folder: tokenizing, training, loss over the whole validation split, saving."""
    arguments = [part for name, value in flags.items() for part in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = [MODEL_PY, "train", "--data", Path(text).resolve(), "--name", "run", *arguments]
        seconds, output = timed(*arguments, cwd=Path(scratch))
        last = json.loads((Path(scratch) / "checkpoints" / "run_model.jsonl").read_text().splitlines()[-1])
    parameters = int(re.search(r"([\d,]+) parameters", output)[1].replace(",", ""))
    steps = {"train_seconds": last["seconds"], "steps": last["step"]}
    return {"seconds": seconds, "val_loss": last["val_loss"], "parameters": parameters, **steps}


def generate(row: Row) -> None:
    """Generation by our 7M and 120M, random weights, batch 1, without compiling."""
    need(row.args, "generate", "nanogpt")
    n = 10 if row.args.quick else 100
    contenders = {"limits": ("limits", {})}
    variants = ("7M",) if row.args.quick else ("7M", "120M")
    for v in variants:
        contenders[f"ours {v}"] = ("generate_ours", dict(variant=v, n=n))
        contenders[f"nanoGPT {v}"] = ("generate_nanogpt", dict(variant=v, n=n, folder=row.args.nanogpt))
        contenders[f"transformers {v}"] = ("generate_transformers", dict(variant=v, n=n))
    m = row.in_turn(contenders)
    for v in variants:
        for peer, bar in (("nanoGPT", ("4", "8")), ("transformers", ("", ""))):
            a, b = m[f"ours {v}"], m[f"{peer} {v}"]
            ratio = a["tokens_per_s"] / b["tokens_per_s"]
            row.line(f"generate {v}, {n} tokens", decoding(a), f"{peer} {decoding(b)}", ratio, *bar)
    row.limits_line(m["limits"])


def decoding(m: dict[str, float]) -> str:
    return f"{m['tokens_per_s']:.0f} tokens/s (first token {1000 * m['first_seconds']:.0f} ms)"


def smollm2(row: Row) -> None:
    """Greedy decoding with a real model: tokens/s, time to first token and the time of the whole command."""
    need(row.args, "smollm2", "model")
    folder, n = str(Path(row.args.model).resolve()), 8 if row.args.quick else 128
    shared = dict(folder=folder, prompt=PROMPT, n=n)
    contenders = {"limits": ("limits", {}), "ours": ("sample_ours", shared)}
    if "--quantize" in command(MODEL_PY, "sample", "--help"):
        contenders["ours int8"] = ("sample_ours", dict(shared, flags=["--quantize", "int8"]))
    contenders["transformers"] = ("sample_transformers", shared)
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("q8_0",) if row.args.quick else ("bf16", "f32", "q8_0"):
            out = Path(scratch) / kind
            flags = ["--model_path", folder, "--output_dir", out, "--format", "gguf", "--quantize", kind]
            command(MODEL_PY, "export", *flags)
            arguments = dict(shared, file=str(next(out.glob("*.gguf"))))
            if not works("sample_llama_cpp", **arguments):  # 0.3.36 crashes on q8_0 where there is AMX
                note(f"llama.cpp crashes with {kind}: going on without its repacked weights, as its --no-repack does")
                arguments["repack"] = False
                row.line(f"llama.cpp {kind}", "", "without repacked weights, with which it crashes here")
            contenders[f"llama.cpp {kind}"] = ("sample_llama_cpp", arguments)
        m = row.in_turn(contenders)
        # the whole command: from the start of Python to its end, cold
        whole = {label: (name, dict(arguments, cold=True)) for label, (name, arguments) in contenders.items()}
        whole.pop("limits")
        measured, row.data = row.data, {}
        runs = row.in_turn(whole, rounds=min(3, row.args.rounds))
        seconds = {label: run["process_seconds"] for label, run in runs.items()}
        row.data = {**measured, "cold": row.data}
    for ours in [label for label in m if label.startswith("ours")]:
        for peer in [label for label in m if not label.startswith(("ours", "limits"))]:
            ratio = m[ours]["tokens_per_s"] / m[peer]["tokens_per_s"]
            bar = SMOLLM2_BARS.get((ours, peer), ("", ""))
            a, b = (f"{decoding(m[x])}, whole command {seconds[x]:.1f} s" for x in (ours, peer))
            row.line(f"SmolLM2-135M, {n} tokens", f"{ours} {a}", f"{peer} {b}", ratio, *bar)
    if row.args.text:
        row.data["quality"] = q = worker("quality", folder=folder, text=str(Path(row.args.text).resolve()))
        for label, name in (("auto", "float16"), ("int8", "int8"), ("bfloat16", "bfloat16")):
            if f"{label}_loss" not in q:
                continue
            ours = f"{name}: loss {q[f'{label}_loss']:.4f}, KL {q[f'{label}_kl']:.1e}"
            row.line("what precision costs, nats a token", ours, f"float32: loss {q['float32_loss']:.4f}")
    share = m["ours"]["tokens_per_s"] * m["ours"]["weight_bytes"] / 1e9 / m["limits"]["memory_gb_per_s"]
    row.line("its share of the memory bandwidth", f"{share:.0%}", "")
    row.limits_line(m["limits"])


def tokenize(row: Row) -> None:
    """GPT-2's vocabulary over 50 MB of Python sources, read from and written to disk, against one call of tiktoken."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "text.txt"
        write_sources(file, 1_000_000 if row.args.quick else 50_000_000)
        m = row.in_turn({name: (name, dict(file=str(file))) for name in ("tokenize_ours", "tokenize_tiktoken")})
    a, b = (m[f"tokenize_{x}"]["mb_per_s"] for x in ("ours", "tiktoken"))
    peer = f"tiktoken.encode_ordinary {b:.1f} MB/s"
    row.line("tokenize, GPT-2's vocabulary", f"{a:.1f} MB/s", peer, a / b, "1.8", "2")


def write_sources(file: Path, size: int) -> None:
    """Python sources, the standard library first, again from the start if they are fewer bytes than `size`."""
    with open(file, "wb") as out:
        while out.tell() < size:
            for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
                try:
                    out.write(path.read_text(encoding="utf-8").encode()[: size - out.tell()])
                except (OSError, UnicodeDecodeError):
                    continue
    file.write_bytes(file.read_bytes().decode(errors="ignore").encode())  # not cut inside a character


def help(row: Row) -> None:
    """The time until `--help` is on the screen, against the import of torch alone."""
    seconds: dict[str, list[float]] = {"ours": [], "import torch": []}
    for _ in range(row.args.rounds):
        seconds["ours"].append(timed(MODEL_PY, "--help")[0])
        seconds["import torch"].append(timed("-c", "import torch")[0])
    row.data.update(seconds)
    a, b = map(statistics.median, seconds.values())
    row.line("python model.py --help", f"{a:.2f} s", f"import torch {b:.2f} s", f"{a - b:+.2f} s", "", "+0.3 s")


def scaling(row: Row) -> None:
    """How cost grows with batch, block, vocabulary, variant and, in generation, context; draws two pictures."""
    quick = row.args.quick
    axes = {
        "batch": [1, 4] if quick else [1, 2, 4, 8, 16, 32, 64],
        "block": [64, 128] if quick else [128, 256, 512, 1024],
        "vocabulary": [256, 1000] if quick else [256, 1000, 4000, 16000, 50257, 100000, 150000],
        "variant": ["7M"] if quick else ["7M", "26M", "50M", "120M", "300M", "500M", "700M", "1B"],
    }
    names = {"batch": "batch_size", "block": "block_size", "vocabulary": "vocab_size", "variant": "variant"}
    base = dict(steps=2, warmup=1) if quick else dict(steps=5, warmup=2)
    if quick:
        base["vocab_size"] = 1000
    contenders = {}
    large = {}  # minutes each, so once
    for axis, values in axes.items():
        for value in values:
            arguments = {**base, names[axis]: value}
            if axis != "variant":
                contenders[f"{axis} {value}"] = ("train_ours", arguments)
                continue
            arguments.update(dict(batch_size=1) if value in ("300M", "500M", "700M", "1B") else {}, steps=2, warmup=1)
            if worker("training_memory", **arguments)["fits"]:
                large[f"{axis} {value}"] = ("train_ours", arguments)
    m = row.in_turn(contenders, rounds=min(3, row.args.rounds)) | row.in_turn(large, rounds=1)
    curve = dict(tokens=100 if quick else 8190, block_size=128 if quick else 8192)
    row.in_turn({x: (f"context_{x}", curve) for x in ("ours", "transformers")}, rounds=min(3, row.args.rounds))
    curves = {x: median_curve(row.data[x]) for x in ("ours", "transformers")}
    training = {axis: [(v, m[f"{axis} {v}"]) for v in values if f"{axis} {v}" in m] for axis, values in axes.items()}
    row.data = {"training": training, "generation": curves}
    for axis, points in training.items():
        speed = ", ".join(f"{value}: {x['tokens_per_s']:,.0f}" for value, x in points)
        memory = ", ".join(f"{value}: {x['peak_mb']:,.0f}" for value, x in points)
        row.line(f"train 7M over {axis}" if axis != "variant" else "train", f"tokens/s {speed}", f"peak MB {memory}")
    first, last = curves["ours"][0][1], curves["ours"][-1][1]
    ours, peer = f"last part {last:.0f} tokens/s", f"first part {first:.0f} tokens/s"
    row.line("generate over the context", ours, peer, last / first)
    assets = Path(row.args.assets)
    assets.mkdir(parents=True, exist_ok=True)
    command(HERE / "plots.py", json.dumps(row.data), assets)
    note(f"wrote {assets / 'throughput.png'} and {assets / 'generation.png'}")


GPT2_SMALL = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12)  # 124M, as nanoGPT trains it


def gpu(row: Row) -> None:
    """Whole commands on one GPU: training GPT-2 small, both compiled, on the same file of tokens; then generation."""
    if not worker("versions")["cuda"]:
        return note("row gpu needs a GPU: PyTorch sees no CUDA device here, so there is nothing to measure")
    need(row.args, "gpu", "nanogpt")
    steps, n = (20, 20) if row.args.quick else (300, 120)  # with the prompt the 7M's context
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "nanoGPT"
        shutil.copytree(row.args.nanogpt, folder, ignore=shutil.ignore_patterns(".git", "out*", "*.bin"))
        runs: dict[str, list[dict]] = {"ours": [], "nanoGPT": []}
        for _ in range(min(3, row.args.rounds)):
            runs["ours"].append(train_on_gpu_ours(folder, steps))
            runs["nanoGPT"].append(train_on_gpu_nanogpt(folder, steps))
    ours, nano = map(medians, runs.values())
    a, b = (f"{m['tokens_per_s']:,.0f} tokens/s, {m['peak_mb']:,.0f} MB" for m in (ours, nano))
    row.line("train GPT-2 small, 12 x 1024, compiled", a, f"nanoGPT {b}", ours["tokens_per_s"] / nano["tokens_per_s"])
    contenders = {}
    for v in ("120M",) if row.args.quick else ("7M", "120M", "1B"):
        contenders[f"ours {v}"] = ("generate_ours", dict(variant=v, n=n, device="cuda"))
        contenders[f"transformers {v}"] = ("generate_transformers", dict(variant=v, n=n, device="cuda"))
    m = row.in_turn(contenders, rounds=min(3, row.args.rounds))
    row.data.update(training=runs)
    for ours in [label for label in m if label.startswith("ours")]:
        a, b = m[ours], m[ours.replace("ours", "transformers")]
        texts = [f"{decoding(x)}, {x['gpu_mb']:,.0f} MB" for x in (a, b)]
        work = f"generate {ours.split()[1]}, {n} tokens"
        row.line(work, texts[0], f"transformers {texts[1]}", a["tokens_per_s"] / b["tokens_per_s"])


def train_on_gpu_ours(folder: Path, steps: int) -> dict:
    """`model.py train` on the tokens of data/random/, which are made if they are not there."""
    worker("random_tokens", folder=str(folder / "data" / "random"), n=2_000_000)
    arguments = [part for k, v in GPT2_SMALL.items() for part in (f"--{k}", str(v))]
    arguments += ["--variant", "120M", "--recipe", "published", "--bias", "none", "--data", "data/random"]
    arguments += ["--max_iters", str(steps), "--eval_interval", str(10**9), "--sample_interval", "-1"]
    arguments += ["--compile", "true", "--name", "gpu", "--overwrite", "true"]
    result = worker("program", file=str(MODEL_PY), arguments=["train", *arguments], folder=str(folder))
    log = (folder / "checkpoints" / "gpu_model.jsonl").read_text().splitlines()
    speeds = [json.loads(line)["tokens_per_s"] for line in log]
    return {"tokens_per_s": statistics.median(speeds[len(speeds) // 2 :]), "peak_mb": result["gpu_mb"]}


def train_on_gpu_nanogpt(folder: Path, steps: int) -> dict:
    """nanoGPT's train.py on the same tokens; it prints the time of each tenth step."""
    arguments = [f"--{k}={v}" for k, v in GPT2_SMALL.items()]
    arguments += ["--dataset=random", f"--max_iters={steps}", f"--lr_decay_iters={steps}", "--eval_iters=1"]
    arguments += [f"--eval_interval={10**9}", "--gradient_accumulation_steps=1"]
    result = worker("program", file="train.py", arguments=arguments, folder=str(folder))
    seconds = [float(x) / 1000 for x in re.findall(r"^iter \d+: .*time ([\d.]+)ms", result["output"], re.M)]
    median = statistics.median(seconds[len(seconds) // 2 :])
    tokens = GPT2_SMALL["batch_size"] * GPT2_SMALL["block_size"]
    return {"tokens_per_s": tokens / median, "peak_mb": result["gpu_mb"]}


def median_curve(runs: list[dict]) -> list[tuple[float, float]]:
    """(context, tokens/s) in windows, the median over rounds."""
    same_place = zip(*(run["curve"] for run in runs), strict=True)
    return [(points[0][0], statistics.median(speed for _, speed in points)) for points in same_place]


ROWS = {f.__name__: f for f in (train, shakespeare, generate, smollm2, tokenize, help, scaling, gpu)}


def machine() -> dict:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": cpu, "cores": cores, "date": time.strftime("%Y-%m-%d %H:%M"), **worker("versions")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="+", choices=[*ROWS, "all"], metavar="ROW", help=", ".join([*ROWS, "all"]))
    parser.add_argument("--nanogpt", metavar="DIR", type=os.path.abspath, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--model", metavar="DIR", help="a Hugging Face model directory, SmolLM2-135M for the table")
    parser.add_argument("--text", metavar="FILE", help="Tiny Shakespeare's input.txt")
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender runs (default: 5)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there; other rows in the file are kept")
    parser.add_argument("--assets", metavar="DIR", default=ROOT / "assets", help="where pictures go (default: assets)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it work? The numbers mean nothing")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    where, table = machine(), []
    for name in ROWS if "all" in args.rows else args.rows:
        note(f"--- {name}")
        row = Row(args)
        ROWS[name](row)
        table += row.lines
        if args.json:
            file = Path(args.json)
            results = json.loads(file.read_text()) if file.exists() else {}
            results[name] = {"machine": where, "rounds": args.rounds, "table": row.lines, "measured": row.data}
            file.write_text(json.dumps(results, indent=1) + "\n")
    print(", ".join(f"{k}: {v}" for k, v in where.items()) + "\n")
    for line in (["work", "ours", "peer", "ratio", "bar", "aim"], ["---"] * 6, *table):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    main()
