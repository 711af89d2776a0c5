"""plot: what is drawn is what the logs say, in pictures and in the terminal, without PyTorch."""

import io
import json
import math
import os
import pickle
import re
import sys
import time
import zipfile
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest
from conftest import TRAIN, program

import model


def write_log(name: str, n: int = 80, scale: float = 1.0) -> list[dict]:
    """A log of n records 10 steps apart, validation at each fourth, loss 8 / sqrt(step)."""
    records = []
    for step in range(10, 10 * n + 1, 10):
        loss = scale * 8 / math.sqrt(step)
        records.append({"step": step, "tokens": 64 * step, "seconds": step / 4, "loss": loss, "lr": 1e-3})
        records[-1] |= {"val_loss": loss + 0.5} if step % 40 == 0 else {}
    Path("checkpoints").mkdir(exist_ok=True)
    Path(f"checkpoints/{name}_model.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return records


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that are saved from here on."""
    saved, savefig = [], matplotlib.figure.Figure.savefig

    def save(figure, *args, **kwargs):
        saved.append(figure)
        return savefig(figure, *args, **kwargs)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)
    return saved


@pytest.fixture
def legend(cli, figures):
    """legend(NAMES and flags): the labels in the legend of their picture."""

    def plot(*words) -> list[str]:
        cli("plot", *words, "--out", "x.png").ok()
        return [text.get_text() for text in figures[-1].legends[0].get_texts()]

    return plot


def test_picture(cli, figures, legend):
    """The raw curve, the smoothed one and validation, of each run, on the axes asked for."""
    records = write_log("a")
    write_log("b", scale=1.5)
    assert cli("plot", "a", "b", "--x", "tokens", "--log", "both", "--out", "x.png").ok().out == "wrote x.png\n"
    assert Path("x.png").read_bytes().startswith(b"\x89PNG")
    axes = figures[0].axes[0]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    raw, smooth, val = axes.lines[:3]
    validated = [r for r in records if "val_loss" in r]
    np.testing.assert_array_equal(raw.get_xydata(), [(r["tokens"], r["loss"]) for r in records])
    np.testing.assert_array_equal(val.get_xydata(), [(r["tokens"], r["val_loss"]) for r in validated])
    loss = [r["loss"] for r in records]
    means = [np.mean(loss[i - 2 : i + 3]) for i in range(2, 78)]  # 80 / 40 to each side
    np.testing.assert_allclose(np.delete(smooth.get_ydata(), [1, 78]), [loss[0], *means, loss[-1]])
    assert raw.get_alpha() < 0.5 and smooth.get_linewidth() > raw.get_linewidth()
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in (val, axes.lines[6])}
    assert len({c for c, _, _ in looks}) == len({s for _, s, _ in looks}) == len({m for _, _, m in looks}) == 2
    best = min(r["val_loss"] for r in validated)
    assert legend("a", "b")[0] == f"a (best {best:.3f})"
    cli("plot", "a", "--y", "lr", "--output", "x.svg").ok()
    assert "<svg" in Path("x.svg").read_text() and set(figures[-1].axes[0].lines[0].get_ydata()) == {1e-3}
    Path("a").mkdir()  # say, an export of that name
    assert legend("a", "--y", "val_loss") == [f"a (best {best:.3f})"]
    write_log("_b")  # which a legend that finds its labels leaves out
    assert legend("_b") == [f"_b (best {best:.3f})"]


def test_legend_has_the_settings_that_differ(cli, text_file, legend):
    for name, rate, seed in (("a", 1e-3, 1), ("b", 3e-2, 1), ("c", 3e-2, 2)):
        cli(*TRAIN, "--max_iters", 3, "--name", name, "--learning_rate", rate, "--seed", seed).ok()
    found = [label.split(", ", 1)[1] for label in legend("a", "b", "c")]
    assert found == [f"learning_rate {rate}, seed {seed})" for rate, seed in ((0.001, 1), (0.03, 1), (0.03, 2))]
    assert [label.rpartition(", ")[2] for label in legend("b", "c")] == ["seed 1)", "seed 2)"]
    cli(*TRAIN, "--max_iters", 3, "--name", "d", "--n_embd=64", "--seed=5").ok()
    typed_first = ", n_embd 64, learning_rate 0.0003, seed 5, head_dim 32)"  # before what follows from it
    assert legend("c", "d")[1].endswith(typed_first)
    for path in Path("checkpoints").glob("c_*.pt"):
        path.unlink()  # as before the first save
    _, with_states, without = legend("a", "b", "c")
    assert "rate 0.03" in with_states and "rate" not in without


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_what_a_checkpoint_would_run_is_not_run(cli, legend):
    write_log("a")
    with zipfile.ZipFile("checkpoints/a_model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"variant": Hostile()}))
    assert legend()[0].startswith("a (best") and not Path("hacked").exists()


def test_without_pytorch(workdir):
    """Also in a job of one process of a cluster that sets WORLD_SIZE for all jobs."""
    write_log("a")
    (workdir / "torch.py").write_text("raise SystemExit('PyTorch was imported')")
    env = {**os.environ, "PYTHONPATH": str(workdir), "WORLD_SIZE": "1"}
    run = program("plot", "--out", "x.png", cwd=workdir, env=env)
    assert run.returncode == 0 and run.stdout == b"wrote x.png\n", run.stderr


@pytest.mark.parametrize("columns, rows", [(80, 24), (160, 45)])
@pytest.mark.parametrize("log", ["none", "both"])
def test_chart_fits_the_terminal(cli, monkeypatch, columns, rows, log):
    """A falling curve falls, from its largest value at the left to its smallest at the right."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(rows))
    records = write_log("a")
    lines = cli("plot", "a", "--log", log).ok().out.splitlines()
    assert len(lines) == rows - 1 and max(map(len, lines)) == columns
    assert lines[0].strip() == "loss over step" and lines[-1].startswith("o a (best ")
    frame = [line.partition("┤")[2] or line.partition("│")[2] for line in lines if line.endswith("│")]
    drawn = [[i for i, row in enumerate(frame) if row[x] not in " │o"] for x in range(len(frame[0]) - 1)]
    top = [rows[0] for rows in drawn if rows]
    assert len(top) > 0.9 * len(frame[0]) and top == sorted(top) and top[-1] - top[0] > 0.5 * len(frame)
    ticks = [float(line.partition("┤")[0]) for line in lines if "┤" in line]
    values = [r["val_loss"] for r in records if "val_loss" in r] + model.smoothed([r["loss"] for r in records])
    assert ticks[0] == pytest.approx(max(values), rel=0.01) and ticks[-1] == pytest.approx(min(values), rel=0.01)
    assert lines[-2].split()[0] == "10" and lines[-2].split()[-1] == "800"


def test_a_long_line_of_the_legend_goes_on_in_the_next(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "24")
    names = ["a_run_with_a_name_of_its_own", "another_which_is_longer_than_the_whole_terminal"]
    for name in names:
        write_log(name)
    lines = cli("plot", *names).ok().out.splitlines()
    assert len(lines) == 23 and max(map(len, lines)) == 40
    legend = "".join(line.strip() for line in lines[-5:])
    assert all(name in legend for name in names) and legend.count("(best") == 2 and legend.endswith(")")


@pytest.mark.parametrize("coloured", [False, True])
def test_every_run_of_a_chart_can_be_told(cli, monkeypatch, coloured):
    """By its mark, which is in the legend as in the curve; in colour, by the colour of line and mark, too."""
    names = "abcdefgh"
    for i, name in enumerate(names):
        write_log(name, scale=1 + i)
    terminal = type("Terminal", (io.StringIO,), {"isatty": lambda self: coloured})
    monkeypatch.setattr(io, "StringIO", terminal)
    monkeypatch.setenv("LINES", "45")
    for y in ("loss", "lr"):
        lines = cli("plot", *names, "--y", y).ok().out.splitlines()
        looks = [line.partition(" ")[0] for line in lines[-len(names) :]]
        assert len(set(looks)) == len(names) and any("\x1b[" in look for look in looks) == coloured
        assert [line.split()[1] for line in lines[-len(names) :]] == list(names)
        if y == "loss":
            for look in looks:
                shown = look.removesuffix("\x1b[0m")
                colour, mark = re.escape(shown[:-1]), re.escape(shown[-1])
                assert re.search(rf"{colour}[^\x1b]*{mark}", "\n".join(lines[1 : -len(names)]))


def test_follow_draws_a_run_as_it_goes_on(cli, monkeypatch):
    naps = []

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            raise KeyboardInterrupt
        write_log("a", 90)

    monkeypatch.setattr(time, "sleep", sleep)
    for words in (("a", "--follow"), ("--follow", "a"), ("--follow", "true", "a")):
        write_log("a", 0)  # it has logged nothing yet
        naps.clear()
        run = cli("plot", *words)
        assert run.code == 130 and run.err == ""
        first, second = run.out.split("\x1b[H\x1b[J")[1:]
        assert "800" not in first and "900" in second.splitlines()[-2]


@pytest.mark.parametrize("name", ["a", "a_model.jsonl", "checkpoints/a_model.jsonl"])
def test_a_log_goes_by_the_name_of_its_run_or_file(cli, figures, name):
    write_log("a")
    cli("plot", name, "--out", "x.png").ok()
    assert len(figures[0].axes[0].lines[0].get_xdata()) == 80


def test_mistakes(cli, monkeypatch):
    assert "no logs" in cli("plot").error
    write_log("a")
    assert "did you mean val_loss?" in cli("plot", "--y", "val_los", "--out", "x.png").error
    assert "cannot write x.abc" in cli("plot", "--out", "x.abc").error
    assert "wrote x.png" in cli("plot", "--out", "x").ok().out and Path("x.png").exists()
    Path("no_log.pt").write_bytes(b"PK\x03\x04 and so on")
    assert "no_log.pt is not a log: it has no records" in cli("plot", "no_log.pt", "--out", "y.png").error
    cli("plot", "aa").fails_with("there is no log of aa: neither aa nor checkpoints/aa_model.jsonl", "did you mean a?")
    write_log("b")
    assert "wrote x.png" in cli("plot", "a", "--out", "x.png", "b").ok().out  # names on both sides of a flag
    monkeypatch.setitem(sys.modules, "plotext", None)
    assert "pip install" in cli("plot").error
