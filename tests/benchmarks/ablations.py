"""TransformerLM's ablations on a small scale: a llama of 1.1 million parameters on bytes of text, three seeds.

python tests/benchmarks/ablations.py --text input.txt            run what is missing, then show and draw all of it
python tests/benchmarks/ablations.py --show                      show and draw what there is

Each run is `model.py train` in a process with one thread; --jobs of them at a time. Results are written to
ablations.json, beside this file, as they come, and what is there is not run again: stop it, and go on, as you like.
What the project published is quoted from its README (github.com/xc2450/TransformerLM).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEEDS, TOKENS, BLOCK = (1, 2, 3), 300 * 8 * 128, 128
BASE = {
    "recipe": "published", "variant": "26M", "arch": "llama", "data": "text", "n_layer": 5, "n_embd": 128,
    "n_inner": 384, "n_head": 8, "n_kv_head": 8, "rope_theta": 10000, "block_size": BLOCK, "batch_size": 8,
    "learning_rate": 3e-3, "eval_tokens": 32768, "sample_interval": -1, "device": "cpu", "dtype": "float32",
    "compile": "false", "keep": 1, "save_minutes": 0,
}  # fmt: skip
RATES, BATCHES, HEADS, FACTORS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (2, 4, 8, 16, 32), (8, 4, 2, 1), (2, 4, 8)
FIFTH = {"norm_position": "post", "learning_rate": BASE["learning_rate"] / 5}

# The groups: what was published, and their cells by the names in the picture, each as what it changes in BASE.
GROUPS = {
    "learning rate": ("a figure only", {f"{rate:g}": {"learning_rate": rate} for rate in RATES}),
    "batch size": ("a figure only", {f"{size}": {"batch_size": size} for size in BATCHES}),
    "norm": (
        "RMSNorm stabilizes training, and reaches a lower loss than none",
        {"RMSNorm": {}, "LayerNorm": {"norm": "layernorm"}, "none": {"norm": "none"}},
    ),
    "norm position": (
        "post-norm needs a fifth of the rate to be stable; pre-norm allows more",
        {"pre": {}, "post": {"norm_position": "post"}, "post, rate / 5": FIFTH},
    ),
    "positions": (
        "RoPE reaches a lower loss than no positions",
        {"RoPE": {}, "learned": {"pos_embd": "learned"}, "none": {"pos_embd": "none"}},
    ),
    "MLP": ("a figure only", {"SwiGLU": {}, "SiLU": {"activation": "silu", "n_inner": 576}}),  # 3 x 384 = 2 x 576
    "KV heads": (
        "an eighth of the cache without worse perplexity",
        {f"{heads}": {"n_kv_head": heads} for heads in HEADS},
    ),
}
YARN = "longer contexts"  # by name of the context's factor: no scaling, YaRN, YaRN and a short finetuning


def name_of(changes: dict) -> str:
    """A run's name: what it changes. Cells that change the same thing are one run."""
    real = {k: v for k, v in changes.items() if BASE.get(k) != v}
    return "-".join(f"{k}_{v}" for k, v in real.items()).replace(".", "p") or "base"


class Campaign:
    def __init__(self, a: argparse.Namespace) -> None:
        self.a, self.lock = a, threading.Lock()
        self.results = json.loads(a.results.read_text()) if a.results.exists() else {}

    def model_py(self, *words: object) -> str:
        """What a command of model.py prints. Raises CalledProcessError with its error."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(self.a.model_py), *map(str, words)]
        return subprocess.run(command, cwd=self.a.work, env=env, check=True, capture_output=True, text=True).stdout

    def record(self, key: str, result: dict) -> None:
        with self.lock:
            self.results[key] = result
            scratch = self.a.results.with_suffix(".tmp")
            lines = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(self.results.items()))
            scratch.write_text("{\n" + ",\n".join(lines) + "\n}\n")
            scratch.replace(self.a.results)
            print(f"{len(self.results)}: {key}: {result.get('loss', result)}", flush=True)

    def train(self, changes: dict, seed: int) -> None:
        settings = {**BASE, **changes, "seed": seed}
        steps = TOKENS // (settings["batch_size"] * BLOCK)
        settings |= {"max_iters": steps, "eval_interval": steps, "log_interval": max(1, steps // 20)}
        name = f"{name_of(changes)}-seed{seed}"
        words = [word for k, v in settings.items() for word in (f"--{k}", v)]
        command = f"train {' '.join(f'--{k} {v}' for k, v in settings.items() if BASE.get(k) != v)}"
        try:
            self.model_py("train", *words, "--name", name, "--overwrite")
        except subprocess.CalledProcessError as e:
            if "not finite" not in e.stderr:
                raise
            return self.record(name, {"loss": None, "command": command})
        log = (self.a.work / "checkpoints" / f"{name}_model.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in log]
        curve = [[r["step"], round(r["loss"], 4)] for r in records]
        last = records[-1]
        result = {"loss": round(last["val_loss"], 4), "seconds": last["seconds"], "command": command, "curve": curve}
        self.record(name, result)
        if name_of(changes) != "base":
            for path in (self.a.work / "checkpoints").glob(f"{name}_model*"):
                path.unlink()

    def extend(self, factor: int, seed: int) -> None:
        """Loss of the base model of a seed at a longer context: as it is, with YaRN, with YaRN and 40 more steps."""
        base, name, context = f"base-seed{seed}_model.pt", f"yarn{factor}-seed{seed}", factor * BLOCK
        yarn = ("--rope_scaling", "yarn", "--rope_factor", factor)
        tune = ("--finetune_iters", 40, "--batch_size", 8 // factor, "--learning_rate", 3e-4, "--seed", seed)
        reporting = ("--eval_interval", 40, "--eval_tokens", 8192, "--sample_interval", -1, "--keep", 1)
        here = ("--device", "cpu", "--dtype", "float32", "--compile", "false", "--name", name, "--overwrite")
        self.model_py("finetune", "--model_checkpoint", base, "--data", "text", "--block_size", context, *yarn, *tune,
                      *reporting, *here)  # fmt: skip

        def loss(*words: object) -> float:
            words = ("--data", "test.txt", "--block_size", context, "--dtype", "float32", "--json", *words)
            return round(math.log(json.loads(self.model_py("eval", *words))[0]["perplexity"]), 4)

        self.record(name, {
            "plain": loss("--model_checkpoint", base), "yarn": loss("--model_checkpoint", base, *yarn),
            "finetuned": loss("--model_checkpoint", f"{name}_model.pt"),
            "command": f"finetune {' '.join(map(str, (*yarn, *tune)))} --block_size {context}",
        })  # fmt: skip

    def run(self) -> None:
        a = self.a
        (a.work / "checkpoints").mkdir(parents=True, exist_ok=True)
        text = a.text.read_text(encoding="utf-8")
        (a.work / "text.txt").write_text(text, encoding="utf-8")
        (a.work / "test.txt").write_text(text[-32768:], encoding="utf-8")  # of the last tenth, which is not trained on
        if not (a.work / "data" / "text" / "meta.json").exists():
            self.model_py("tokenize", "--dataset", "text", "--txt", "text.txt", "--tokenizer", "byte")
        cells = {name_of(c): c for _, cells in GROUPS.values() for c in cells.values()}  # once each
        wanted = [(c, seed) for seed in SEEDS for c in cells.values()]
        missing = [(c, s) for c, s in wanted if f"{name_of(c)}-seed{s}" not in self.results]
        further = [(f, s) for s in SEEDS for f in FACTORS if f"yarn{f}-seed{s}" not in self.results]
        lacking = {s for _, s in further if not (a.work / "checkpoints" / f"base-seed{s}_model.pt").exists()}
        lacking -= {s for c, s in missing if name_of(c) == "base"}
        missing += [({}, s) for s in sorted(lacking)]  # another folder than before
        print(f"{len(missing)} trainings and {len(further)} extensions to go", flush=True)
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda job: self.train(*job), missing))
            list(pool.map(lambda job: self.extend(*job), further))

    def losses(self, changes: dict) -> list[float | None]:
        """Of the seeds there are; None for one that diverged."""
        found = (self.results.get(f"{name_of(changes)}-seed{seed}") for seed in SEEDS)
        return [r["loss"] for r in found if r]

    def extended(self, factor: int, how: str) -> list[float]:
        found = (self.results.get(f"yarn{factor}-seed{seed}") for seed in SEEDS)
        return [r[how] for r in found if r]


def shown(losses: list[float | None]) -> str:
    """Mean and spread over the seeds."""
    whole = [x for x in losses if x is not None]
    text = f"{statistics.mean(whole):.3f}" if whole else ""
    text += f" ± {statistics.stdev(whole):.3f}" if len(whole) > 1 else ""
    lost = len(losses) - len(whole)
    return text + f" ({lost} of {len(losses)} diverged)" * bool(lost) or "not run yet"


def lower(a: list, b: list) -> str:
    """Whether a is lower than b, as seeds have it: paired, and by more than twice the difference's standard error."""
    if len(a) < 2 or len(a) != len(b):
        return "?"
    pairs = [(math.inf if y is None else y) - (math.inf if x is None else x) for x, y in zip(a, b, strict=True)]
    if math.inf in pairs:
        return "yes"
    mean, error = statistics.mean(pairs), statistics.stdev(pairs) / math.sqrt(len(pairs))
    return "yes" if mean > 2 * error else "no, the other is lower" if mean < -2 * error else "no difference seen"


def verdicts(c: Campaign) -> dict[str, str]:
    """Whether what was published holds here, by group."""
    of = {group: {name: c.losses(changes) for name, changes in cells.items()} for group, (_, cells) in GROUPS.items()}
    norm, position, positions = of["norm"], of["norm position"], of["positions"]
    base, yarn = c.losses({}), [c.extended(8, how) for how in ("plain", "yarn", "finetuned")]
    return {
        "norm": f"RMSNorm lower than none: {lower(norm['RMSNorm'], norm['none'])}; than LayerNorm: "
        f"{lower(norm['RMSNorm'], norm['LayerNorm'])}",
        "norm position": "post-norm lower at a fifth of the rate: "
        f"{lower(position['post, rate / 5'], position['post'])}; pre-norm lower than that: "
        f"{lower(position['pre'], position['post, rate / 5'])}",
        "positions": f"RoPE lower than none: {lower(positions['RoPE'], positions['none'])}; than learned: "
        f"{lower(positions['RoPE'], positions['learned'])}",
        "MLP": f"SwiGLU lower: {lower(of['MLP']['SwiGLU'], of['MLP']['SiLU'])}",
        "KV heads": f"8 heads lower than 1: {lower(base, of['KV heads']['1'])}",
        YARN: f"at 8 times the context YaRN lower than RoPE as it is: {lower(yarn[1], yarn[0])}; finetuned lower than "
        f"that: {lower(yarn[2], yarn[1])}",
    }


def cache_kb(heads: int) -> float:
    """kB of keys and values a token, in 16 bits."""
    return 2 * BASE["n_layer"] * heads * (BASE["n_embd"] // BASE["n_head"]) * 2 / 1000


def show(c: Campaign) -> None:
    """Markdown: a table for each group."""
    verdict = verdicts(c)
    for group, (published, cells) in GROUPS.items():
        print(f"\n**{group}**. Published: {published}. Here: {verdict.get(group, 'see the table')}.\n")
        cache = " cache, kB a token |" if group == "KV heads" else ""
        print(f"| | validation loss |{cache}\n|---|---|{'---|' * bool(cache)}")
        for name, changes in cells.items():
            print(f"| {name} | {shown(c.losses(changes))} |" + (f" {cache_kb(int(name)):.2f} |" if cache else ""))
    published = "YaRN (arXiv 2309.00071) extends the context, best after a short finetuning"
    print(f"\n**{YARN}**. Published: {published}. Here: {verdict[YARN]}.\n")
    print("| context | RoPE as it is | YaRN | YaRN, 40 steps more |\n|---|---|---|---|")
    for f in FACTORS:
        columns = [shown(c.extended(f, how)) for how in ("plain", "yarn", "finetuned")]
        print(f"| {f * BLOCK} | {' | '.join(columns)} |")
    seconds = sum(r.get("seconds", 0) for r in c.results.values())
    print(f"\n{len(c.results)} results, {seconds / 3600:.1f} hours of training in all.")


def draw(c: Campaign, path: Path) -> None:
    """A panel for each group: a point a seed, a bar at the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blue, orange, green = "#0072B2", "#D55E00", "#009E73"
    figure, axes = plt.subplots(2, 4, figsize=(13, 6.2), layout="constrained")
    for ax, (group, (_, cells)) in zip(axes.flat, GROUPS.items(), strict=False):
        for i, changes in enumerate(cells.values()):
            losses = c.losses(changes)
            whole = [x for x in losses if x is not None]
            ax.plot([i] * len(whole), whole, "o", color=blue, alpha=0.6, markersize=5)
            if whole:
                ax.hlines(statistics.mean(whole), i - 0.25, i + 0.25, color=blue, linewidth=2)
            if len(whole) < len(losses):
                ax.text(i, 0.97, "diverged", transform=ax.get_xaxis_transform(), ha="center", va="top", color=orange)
        names = [f"{n}\n{cache_kb(int(n)):.2f} kB" if group == "KV heads" else n.replace(", ", ",\n") for n in cells]
        ax.set_xticks(range(len(cells)), names)
        ax.set_xlim(-0.6, len(cells) - 0.4)
        ax.set_title(group + " (and cache a token)" * (group == "KV heads"), fontsize=10)
    ax = axes.flat[-1]
    for how, label, colour, mark in (("plain", "RoPE as it is", orange, "s--"), ("yarn", "YaRN", blue, "o-"),
                                     ("finetuned", "YaRN, 40 steps more", green, "^-.")):  # fmt: skip
        points = [(f * BLOCK, statistics.mean(c.extended(f, how))) for f in FACTORS if c.extended(f, how)]
        if points:
            ax.plot(*zip(*points, strict=True), mark, color=colour, label=label, markersize=5)
            ax.legend(frameon=False, fontsize=8)
    ax.set_xscale("log", base=2)
    ax.set_xticks([f * BLOCK for f in FACTORS], [str(f * BLOCK) for f in FACTORS])
    ax.minorticks_off()
    ax.set_title(f"{YARN} than the trained {BLOCK}", fontsize=10)
    for ax in axes.flat:
        ax.grid(alpha=0.25, axis="y")
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    for ax in axes[:, 0]:
        ax.set_ylabel("validation loss, nats per byte")
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text in UTF-8: Tiny Shakespeare, or another megabyte")
    parser.add_argument("--work", type=Path, default=Path("ablations"), help="folder for data and checkpoints")
    parser.add_argument("--results", type=Path, default=HERE / "ablations.json")
    parser.add_argument("--picture", type=Path, default=Path("ablations.png"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--model_py", type=Path, default=HERE.parents[1] / "model.py")
    parser.add_argument("--show", action="store_true", help="run nothing")
    a = parser.parse_args()
    if not (a.show or a.text):
        parser.error("--text FILE is needed, or --show")
    a.work, a.model_py = a.work.resolve(), a.model_py.resolve()
    campaign = Campaign(a)
    if not a.show:
        campaign.run()
    show(campaign)
    draw(campaign, a.picture)


if __name__ == "__main__":
    main()
