"""The README's two pictures: python plots.py MEASURED FOLDER, with what bench.py's row `scaling` measured, as JSON."""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

BLUE, GREY, ORANGE = "#1f5fa8", "#9a9a9a", "#d9722b"
plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10})
TITLES = {
    "batch": "batch size\n(block 128, GPT-2 vocabulary)",
    "block": "block size\n(batch 16, GPT-2 vocabulary)",
    "vocabulary": "vocabulary\n(batch 16, block 128)",
    "variant": "variant\n(own batch and block; from 300M batch 1)",
}


def throughput(training: dict, path: Path) -> None:
    """Tokens/s above, peak memory below, one column for each thing that grows."""
    figure, axes = plt.subplots(2, len(training), figsize=(13, 5.4), sharex="col", sharey="row")
    for column, (axis, points) in zip(axes.T, training.items(), strict=True):
        values = [value for value, _ in points]
        numeric = axis != "variant"
        x = values if numeric else range(len(values))
        for ax, key, scale, colour in ((column[0], "tokens_per_s", 1, BLUE), (column[1], "peak_mb", 1024, ORANGE)):
            ax.plot(x, [m[key] / scale for _, m in points], "o-", color=colour, markersize=4)
            ax.set_yscale("log")
            ax.grid(alpha=0.25, which="both", axis="y")
        if numeric:
            column[1].set_xscale("log", base=2 if axis != "vocabulary" else 10)
        ticks = values if axis != "vocabulary" else [v for v in values if v in (256, 4000, 50257)] or values
        column[1].set_xticks(ticks if numeric else list(x), [f"{v:,}" if numeric else v for v in ticks])
        column[1].minorticks_off()
        column[1].set_xlabel(TITLES[axis])
    axes[0, 0].set_ylabel("training, tokens/s")
    axes[1, 0].set_ylabel("peak memory, GiB")
    for ax in axes.flat:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}")
    axes[1, -1].tick_params("x", labelsize=8)
    figure.suptitle("A training step of the 7M variant as one size grows, and of every variant")
    save(figure, path)


def generation(curves: dict, path: Path) -> None:
    figure, ax = plt.subplots(figsize=(7.5, 4))
    for (label, points), colour in zip(curves.items(), (BLUE, GREY), strict=True):
        ax.plot(*zip(*points, strict=True), color=colour, label={"ours": "model.py"}.get(label, label), linewidth=2)
    ax.set(ylim=(0, None), xlim=(0, None), xlabel="tokens in the context", ylabel="tokens/s, batch 1")
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    ax.set_title("Generation speed over context: a llama of 4 layers, width 256")
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    plt.close(figure)


if __name__ == "__main__":
    measured, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    throughput(measured["training"], folder / "throughput.png")
    generation(measured["generation"], folder / "generation.png")
