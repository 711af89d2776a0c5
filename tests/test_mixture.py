"""--data with several data sets: blocks by the weights, an order that nothing but the seed and the step decides."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, assert_same_run, checkpoint_of, stdlib_source, stop_at, write_conversations

import model

RUN = ("train", *TINY_RUN, "--max_iters", 9, "--log_interval", 1)


@pytest.fixture
def texts(cli) -> None:
    """Two data sets that no byte has in common, of 3,000 and 1,000 bytes, in the same tokenizer."""
    rng = np.random.default_rng(0)
    for name, low, n in (("low", 32, 3000), ("high", 80, 1000)):
        Path(f"{name}.txt").write_bytes(bytes(rng.integers(low, low + 40, n, np.uint8)))
        cli("tokenize", "--dataset", name, "--txt", f"{name}.txt", "--tokenizer", "byte").ok()


@pytest.mark.parametrize(
    "specs, share", [(("low:0.7", "high:0.3"), 0.3), (("low", "high"), 0.5), (("low:1", "high:3"), 0.75)]
)
def test_an_epoch_has_each_block_and_each_its_share(texts, specs, share):
    split = model.open_all(list(specs)).splits["train"]
    windows = split.windows(16)
    seen = Counter(tuple(split.batch(windows, [i], 16)["idx"][0].tolist()) for i in range(len(windows)))
    for name in ("low", "high"):
        part = model.open_data(name).splits["train"]
        begins = part.windows(16)
        blocks = {tuple(part.tokens[b : b + 16].tolist()) for b in begins}
        counts = [seen.pop(block) for block in blocks]
        expected = len(windows) * (share if name == "high" else 1 - share)
        assert len(blocks) == len(begins) and abs(sum(counts) - expected) <= 1
        assert max(counts) - min(counts) <= 1 and min(counts) >= 1
    assert not seen


def test_a_batch_is_that_of_its_parts(texts):
    """Each row with the targets that follow in its own data; in every step about its share comes from each."""
    split = model.open_all(["low:0.25", "high:0.75"]).splits["train"]
    windows = split.windows(16)
    sampler, high = model.BlockSampler(len(windows), 8, 3), []
    for step in range(40):
        batch = split.batch(windows, sampler(step), 16)
        assert torch.equal(batch["idx"][:, 1:], batch["targets"][:, :-1])
        assert batch["blocks"].tolist() == sampler(step).tolist()
        rows = torch.cat((batch["idx"], batch["targets"]), dim=1)
        is_high = (rows >= 80).all(dim=1)
        assert (is_high | (rows < 72).all(dim=1)).all()
        high.append(is_high.float().mean().item())
    assert 0.65 < np.mean(high) < 0.85


def test_a_mixture_is_resumed_bit_for_bit(cli, texts, monkeypatch):
    mixed = ("--data", "low:0.7", "--data", "high:0.3")
    assert "low:0.7+high:0.3" in cli(*RUN, *mixed, "--name", "whole").ok().out
    stop_at(monkeypatch, 5)
    assert cli(*RUN, *mixed, "--name", "parts").code == 130
    cli("train", "--resume", "--name", "parts").ok()
    assert_same_run("whole", "parts")
    assert checkpoint_of("parts")["data"]["parts"] == ["data/low:0.7", "data/high:0.3"]
    again = ("train", "--resume", "--name", "whole", "--max_iters", 12)
    assert "its contents differ" in cli(*again, "--data", "low:0.6", "high:0.4").error
    cli("tokenize", "--dataset", "high", "--txt", "low.txt", "--tokenizer", "byte", "--overwrite").ok()
    assert "its contents differ" in cli(*again).error


def test_text_and_conversations(cli, texts):
    """Conversations keep their masks and do not see each other; text is all targets, one document a block."""
    write_conversations(Path("data/talk"), [([65 + i] * 10, [0] * 5 + [1] * 5) for i in range(20)])
    data = model.open_all(["talk", "low"])
    split, alone = data.splits["train"], model.open_data("talk").splits["train"]
    windows = split.windows(32)
    n = len(alone.windows(32))
    ours, theirs = split.batch(windows, [1, len(windows) - 1], 32), alone.batch(alone.windows(32), [1 % n], 32)
    for key in ("idx", "targets"):
        assert torch.equal(ours[key][:1], theirs[key])
    assert ours["documents"].tolist() == [*theirs["documents"].tolist(), 32]
    assert (ours["targets"][1] >= 0).all() and data.is_chat
    cli(*RUN, "--block_size", 32, "--data", "talk", "low:2").ok()


def test_files_share_the_first_tokenizer(cli, workdir):
    for name, module in (("a", "argparse"), ("b", "textwrap")):
        Path(f"{name}.txt").write_text(stdlib_source(module)[:20_000])
    cli(*RUN, "--data", "a.txt", "b.txt", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    first, second = (Path(part.rpartition(":")[0]) for part in checkpoint_of()["data"]["parts"])
    assert model.Data(first).tokenizer.digest == model.Data(second).tokenizer.digest


def test_text_gets_the_tokenizer_of_other_data(cli, workdir):
    """By the data's name, as the sentence about two tokenizers says it, or by the name of a run that has it."""
    for name, module in (("a", "argparse"), ("b", "textwrap")):
        Path(f"{name}.txt").write_text(stdlib_source(module)[:20_000])
    cli("tokenize", "--dataset", "a", "--txt", "a.txt", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    cli("tokenize", "--dataset", "bytes", "--txt", "b.txt", "--tokenizer", "byte").ok()
    cli(*RUN, "--data", "a", "bytes").fails_with("needs the same one", "tokenize with --tokenizer data/a")
    cli("tokenize", "--dataset", "b", "--txt", "b.txt", "--tokenizer", "data/a").ok()
    cli(*RUN, "--data", "a", "b", "--name", "mixed").ok()
    for i, name in enumerate(("a", "mixed", "mixed_model.pt")):
        cli("tokenize", "--dataset", f"b{i}", "--txt", "b.txt", "--tokenizer", name).ok()
        assert model.Data(Path(f"data/b{i}")).digest == model.Data(Path("data/b")).digest
    for name in (".", "checkpoints", "data/none"):
        cli("tokenize", "--dataset", "c", "--txt", "b.txt", "--tokenizer", name).fails_with("unknown tokenizer", name)


def test_mistakes(cli, texts):
    Path("other.txt").write_text(stdlib_source("textwrap"))
    cli("tokenize", "--dataset", "other", "--txt", "other.txt", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    error = cli(*RUN, "--data", "low:0.5", "other:0.5").error
    assert "data/low" in error and "data/other" in error and "needs the same one" in error
    for weight in ("0", "0.000000000001", "20000", "1" + 320 * "0"):
        assert "between 0.0001 and 10000" in cli(*RUN, "--data", f"low:{weight}", "high").error
    assert "no data at hig" in cli(*RUN, "--data", "low", "hig").error
    assert "neither meta.json nor train.bin" in cli(*RUN, "--data", "low", "").error  # as of a variable that is not set
