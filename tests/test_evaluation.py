"""Evaluation: its numbers against transformers' on the same ids and against what is worked out by hand."""

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_RUN, random_gpt, random_tokens, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

import model

BYTES = 259  # tokens of the byte tokenizer
TEXT = "Ein naïver Café-Besucher zählt: one, two,  three.\n" * 4
TEXT_BYTES, TEXT_WORDS = 4 * 53, 4 * 7


def save_model(path: str, gpt: model.GPT, tokenizer: model.Tokenizer) -> str:
    content = {"config": model.asdict(gpt.config), "model": gpt.state_dict(), "tokenizer": tokenizer.spec}
    model.save_checkpoint(Path(path), content)
    return path


def byte_gpt(arch: str = "gpt2", seed: int = 0, **config) -> model.GPT:
    return random_gpt(tiny_config(arch, **{"vocab_size": BYTES, **config}), seed)


def uniform(vocab_size: int = BYTES, **config) -> model.GPT:
    """A model to which every token is equally likely: its loss is the logarithm of the vocabulary."""
    gpt = model.GPT(tiny_config(vocab_size=vocab_size, tie_word_embeddings=False, **config))
    torch.nn.init.zeros_(gpt.lm_head.weight)
    return gpt


def export(gpt: model.GPT, folder: str, tokenizer: model.Tokenizer | None = None) -> str:
    Path(folder).mkdir()
    model.export_hf(gpt, tokenizer or model.byte_tokenizer(), Path(folder), torch.float32, 10**9, "")
    return folder


@pytest.fixture
def evaluate(cli, workdir):
    """evaluate(*flags): the rows of eval --json. text.txt has TEXT."""
    Path("text.txt").write_text(TEXT, encoding="utf-8")

    def run(*flags) -> list[dict]:
        return json.loads(cli("eval", "--json", "--device", "cpu", "--dtype", "float32", *flags).ok().out)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Perplexity, against transformers
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss_of_transformers(hf, ids: torch.Tensor, context: int, stride: int) -> float:
    """The recipe of transformers' documentation (perplexity.md), with each window's loss weighted by the labels that it
    is the mean of. A window the length of the stride would leave its first token out: there each block of `context`
    tokens predicts the `context` that follow."""
    total, n, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids) - 1, stride):
        if stride == context:
            rows = ids[None, begin : begin + context + 1]
            total += F.cross_entropy(hf(rows[:, :-1]).logits[0], rows[0, 1:], reduction="sum").item()
            n += rows.size(1) - 1
            continue
        end = min(begin + context, len(ids))
        rows = ids[None, begin:end]
        labels = rows.clone()
        labels[:, : -(end - previous_end)] = -100
        counted = int((labels[:, 1:] != -100).sum())
        total += hf(rows, labels=labels).loss.item() * counted
        n, previous_end = n + counted, end
        if end == len(ids):
            break
    assert n == len(ids) - 1  # all of the text but its first token, each once
    return total / n


@pytest.mark.parametrize(
    "context, stride", [(32, 32), (32, 31), (32, 8), (32, 1), (16, 16), (17, 5), (300, 300), (300, 7)]
)
@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_perplexity_is_transformers(workdir, arch, context, stride):
    """Truth: transformers' own model, with windows that divide the text, that do not, and one that has it all."""
    gpt, ids = byte_gpt(arch, block_size=max(32, context)), random_tokens(131, vocab_size=BYTES, seed=3)
    hf = AutoModelForCausalLM.from_pretrained(export(gpt, "hf"))
    total, n = model.perplexity(gpt, ids.numpy(), context, stride)
    assert n == 130
    assert total / n == pytest.approx(loss_of_transformers(hf, ids, context, stride), rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 100, 16384])
def test_perplexity_does_not_depend_on_the_batch(batch_tokens):
    gpt, ids = byte_gpt(), random_tokens(131, vocab_size=BYTES).numpy()
    total, _ = model.perplexity(gpt, ids, 32, 10, batch_tokens)
    assert total == pytest.approx(model.perplexity(gpt, ids, 32, 10)[0], rel=1e-6)


@pytest.mark.parametrize("flags", [(), ("--stride", 8), ("--block_size", 20, "--stride", 10)], ids=str)
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "qwen3", "nanochat"])
def test_eval_is_transformers(evaluate, arch, flags):
    """Truth: transformers on the exported directory; and eval gives one number for it and for the checkpoint."""
    gpt = byte_gpt(arch)
    hf = AutoModelForCausalLM.from_pretrained(export(gpt, "hf"))
    save_model("model.pt", gpt, model.byte_tokenizer())
    ours, exported = evaluate("--model_checkpoint", "model.pt", "--compare", "hf", "--data", "text.txt", *flags)
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    context = options.get("--block_size", 32)
    expected = loss_of_transformers(hf, torch.tensor([*TEXT.encode()]), context, options.get("--stride", context))
    for row in (ours, exported):
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert row["tokens"] == TEXT_BYTES - 1
    assert ours["bits_per_byte"] == pytest.approx(exported["bits_per_byte"], rel=1e-6)


def test_eval_finds_the_loss_that_training_reported(cli, evaluate):
    """Truth: the log of the run; its validation split is a whole number of blocks and one token more."""
    Path("input.txt").write_text("".join(map(chr, range(32, 127))) * 169, encoding="utf-8")  # 16,055: 1,605 + 14,450
    meta = model.tokenize_text(Path("data/text"), ["input.txt"], "byte", val_fraction=1601.5 / 16055)
    assert meta["n_tokens"] - meta["val_start"] == 1601
    cli("train", "--variant", "7M", *TINY_RUN, "--data", "text", "--max_iters", 8, "--eval_tokens", 10_000).ok()
    reported = json.loads(Path("checkpoints/7M_model.jsonl").read_text().splitlines()[-1])
    assert reported["val_tokens"] == 1600
    (row,) = evaluate("--model_checkpoint", "7M_model.pt", "--data", "text")
    assert row["loss"] == pytest.approx(reported["val_loss"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(reported["val_bpb"], rel=1e-5)
    assert row["tokens"] == 1600


# ---------------------------------------------------------------------------------------------------------------------
# The other numbers, by hand
# ---------------------------------------------------------------------------------------------------------------------


def test_numbers_of_a_uniform_model(evaluate):
    """Truth: ln 259 a byte, 7 words in 53 bytes; the first byte follows from nothing and is not scored."""
    save_model("model.pt", uniform(), model.byte_tokenizer())
    (row,) = evaluate("--model_checkpoint", "model.pt", "--data", "text.txt", "--stride", 16)
    assert row["loss"] == pytest.approx(math.log(BYTES))
    assert row["perplexity"] == pytest.approx(BYTES)
    assert row["bits_per_byte"] == pytest.approx(math.log2(BYTES))
    assert row["word_perplexity"] == pytest.approx(BYTES ** ((TEXT_BYTES - 1) / TEXT_WORDS))
    assert (row["tokens"], row["context"], row["stride"]) == (TEXT_BYTES - 1, 32, 16)
    assert (row["model"], row["data"]) == ("model.pt", "text.txt")


def test_bits_per_byte_counts_the_bytes_of_tokens(evaluate):
    """Truth: by hand: a token that is a whole word has as many bytes as its UTF-8, é two."""
    tokens = [bytes([b]) for b in range(256)] + ["é".encode(), b" caf", " café".encode()]
    bpe = model.with_special_tokens("bpe", "mine", tokens)
    assert bpe.encode("un café") == [*b"un", 258]
    save_model("model.pt", uniform(bpe.n_vocab), bpe)
    Path("short.txt").write_text("un café", encoding="utf-8")
    (row,) = evaluate("--model_checkpoint", "model.pt", "--data", "short.txt", "--stride", 8)
    assert row["tokens"] == 2
    assert row["bits_per_byte"] == pytest.approx(2 * math.log2(262) / 7)  # of n and 6 bytes of café
    assert row["word_perplexity"] == pytest.approx(262 ** (2 / 2))


def test_a_beginning_of_text_token_lets_every_byte_be_scored(evaluate):
    """Truth: by hand: a tokenizer.json whose post-processor puts a token before the text."""
    from tokenizers import processors

    hf = model.to_hf_tokenizer(model.byte_tokenizer())
    hf.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    export(uniform(arch="llama"), "hf")
    hf.save("hf/tokenizer.json")
    (row,) = evaluate("--model_checkpoint", "hf", "--data", "text.txt", "--stride", 16)
    assert row["tokens"] == TEXT_BYTES
    assert row["bits_per_byte"] == pytest.approx(math.log2(BYTES))


def test_an_end_of_text_is_no_part_of_a_word(evaluate):
    """Truth: by hand: two documents of two words each, and the token between them, which has a loss and no bytes."""
    Path("a.txt").write_text("one two")
    Path("b.txt").write_text("three four")
    model.tokenize_text(Path("data/two"), ["a.txt", "b.txt"], "byte", val_fraction=0.99)
    save_model("model.pt", uniform(), model.byte_tokenizer())
    (row,) = evaluate("--model_checkpoint", "model.pt", "--data", "two", "--stride", 8)
    n = row["tokens"]
    assert n == 7 + 1 + 10 - 1 - 1  # one byte is training data, and one not scored
    assert row["bits_per_byte"] == pytest.approx(n * math.log2(BYTES) / (n - 1))
    assert row["word_perplexity"] == pytest.approx(BYTES ** (n / 4))


def test_the_validation_split_of_a_data_set(evaluate, text_file):
    """Truth: the same text as a file: the last tenth of the data, and nothing of the rest."""
    text = text_file.read_text()
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    Path("val.txt").write_text(text[-(len(text) // 10) :])
    save_model("model.pt", byte_gpt(), model.byte_tokenizer())
    common = ("--model_checkpoint", "model.pt", "--block_size", 32, "--stride", 31, "--data")
    rows = [evaluate(*common, where)[0] for where in ("text", "data/text", "data/text/data.bin", "val.txt")]
    assert len({row.pop("data") for row in rows}) == 3  # a data set's file is the data set
    assert all(row == rows[-1] for row in rows)
    assert rows[0]["tokens"] == len(text) // 10 - 1


def test_a_validation_file_of_nanogpts(evaluate, gpt2):
    """Truth: val.bin's own ids, through the model in one pass."""
    Path("data/nano").mkdir(parents=True)
    ids = np.arange(1000, 1020, dtype="<u2")
    np.arange(5000, 5200, dtype="<u2").tofile("data/nano/train.bin")
    ids.tofile("data/nano/val.bin")
    gpt = random_gpt(tiny_config(vocab_size=gpt2.n_vocab, n_embd=8, n_head=1, n_layer=1))
    save_model("model.pt", gpt, gpt2)
    (row,) = evaluate("--model_checkpoint", "model.pt", "--data", "nano")
    rows = torch.from_numpy(ids.astype(np.int64))
    with torch.no_grad():
        assert row["loss"] == pytest.approx(F.cross_entropy(gpt(rows[None, :-1])[0], rows[1:]).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Tables and JSON
# ---------------------------------------------------------------------------------------------------------------------


def test_models_side_by_side(evaluate, cli):
    """Truth: each model on its own; the table says what the JSON says, a line each, in the order asked for."""
    for i, arch in enumerate(("gpt2", "llama", "qwen3")):
        save_model(f"{i}.pt", byte_gpt(arch), model.byte_tokenizer())
    common = ("--data", "text.txt", "--stride", 16)
    rows = evaluate("--model_checkpoint", "2.pt", "--compare", "0.pt", "1.pt", *common)
    assert rows == [evaluate("--model_checkpoint", f"{i}.pt", *common)[0] for i in (2, 0, 1)]
    flags = ("--model_checkpoint", "2.pt", "--compare", "0.pt", "1.pt", "--device", "cpu", "--dtype", "float32")
    head, *lines = cli("eval", *flags, *common).ok().out.splitlines()
    assert head.split() == list(rows[0])
    assert [line.split() for line in lines] == [
        [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    starts = [head.index(f" {name}") for name in list(rows[0])[1:]]
    assert all(line[at] == " " != line[at + 1] for line in lines for at in starts)  # columns are aligned


def test_models_of_different_vocabularies_share_a_text(evaluate):
    """Bits per byte compare across tokenizers: uniform over 259 bytes or over 300 tokens."""
    bpe = model.train_bpe([TEXT], 300)
    save_model("bytes.pt", uniform(), model.byte_tokenizer())
    save_model("bpe.pt", uniform(300), bpe)
    a, b = evaluate("--model_checkpoint", "bytes.pt", "--compare", "bpe.pt", "--data", "text.txt", "--stride", 8)
    assert (a["perplexity"], b["perplexity"]) == (pytest.approx(259), pytest.approx(300))
    first = len(bpe.decode(bpe.encode(TEXT)[:1]).encode())
    assert b["bits_per_byte"] == pytest.approx(b["tokens"] * math.log2(300) / (TEXT_BYTES - first))


def test_nothing_but_json_is_printed(cli, evaluate, text_file):
    """With no --data the newest data set is taken, and saying so must not spoil the JSON."""
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    save_model("checkpoints/7M_model.pt", byte_gpt(), model.byte_tokenizer())
    (row,) = evaluate("--stride", 31)
    assert row["data"] == "data/text" and row["model"] == "checkpoints/7M_model.pt"


# ---------------------------------------------------------------------------------------------------------------------
# Beyond the trained context
# ---------------------------------------------------------------------------------------------------------------------

ROPE = {"rope_theta": 10000.0}
SCALED = {  # in transformers' words; NTK-aware scaling is a larger base, 2^(d / (d - 2)) of it for heads of d = 8
    "none": {**ROPE, "rope_type": "default"},
    "linear": {**ROPE, "rope_type": "linear", "factor": 2.0},
    "ntk": {"rope_theta": 10000.0 * 2.0 ** (8 / 6), "rope_type": "default"},
    "yarn": {**ROPE, "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("scaling", SCALED)
def test_a_longer_context_is_transformers(evaluate, scaling):
    """Truth: transformers' rope_parameters, at twice the context that the model was made for."""
    gpt = byte_gpt("llama")
    config = AutoConfig.from_pretrained(export(gpt, "hf"))
    config.rope_parameters, config.max_position_embeddings = SCALED[scaling], 64
    hf = AutoModelForCausalLM.from_pretrained("hf", config=config)
    flags = () if scaling == "none" else ("--rope_scaling", scaling, "--rope_factor", 2)
    common = ("--model_checkpoint", "hf", "--data", "text.txt", "--stride", 20)
    (row,) = evaluate(*common, "--block_size", 64, *flags)
    expected = loss_of_transformers(hf, torch.tensor([*TEXT.encode()]), 64, 20)
    assert row["loss"] == pytest.approx(expected, rel=1e-5) and row["context"] == 64
    if flags:  # the context follows from the factor
        assert evaluate(*common, *flags) == [row]
    assert row["loss"] != pytest.approx(evaluate(*common)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("flags", [("--block_size", 64), ("--rope_scaling", "yarn", "--rope_factor", 2)], ids=str)
def test_learned_positions_end_where_they_end(cli, evaluate, flags):
    save_model("model.pt", byte_gpt(), model.byte_tokenizer())
    error = cli("eval", "--model_checkpoint", "model.pt", "--data", "text.txt", *flags).error
    assert "learned" in error and (str(flags[1]) in error)


def test_no_positions_have_no_end(evaluate):
    """Truth: one plain pass over the whole text by a model that adds no positions at all."""
    gpt = byte_gpt(pos_embd="none")
    save_model("model.pt", gpt, model.byte_tokenizer())
    (row,) = evaluate("--model_checkpoint", "model.pt", "--data", "text.txt", "--block_size", 300)
    ids = torch.tensor([*TEXT.encode()])
    with torch.no_grad():
        assert row["loss"] == pytest.approx(F.cross_entropy(gpt(ids[None, :-1])[0], ids[1:]).item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(evaluate):
    save_model("model.pt", byte_gpt(), model.byte_tokenizer())
    return ("eval", "--model_checkpoint", "model.pt")


@pytest.mark.parametrize("flag, value", [
    ("--stride", 0), ("--stride", -1), ("--stride", 33), ("--block_size", 0), ("--block_size", -4),
])  # fmt: skip
def test_windows_that_cannot_be(cli, saved, flag, value):
    error = cli(*saved, "--data", "text.txt", flag, value).error
    assert flag in error and str(value) in error


@pytest.mark.parametrize("content, word", [(b"", "empty"), (b"a", "token"), (b"caf\xe9 au lait", "utf-8")], ids=str)
def test_texts_with_nothing_to_score(cli, saved, content, word):
    """A text of one token has no token that follows from another."""
    Path("short.txt").write_bytes(content)
    error = cli(*saved, "--data", "short.txt").error
    assert "short.txt" in error and word in error


def test_a_data_set_without_a_validation_split(cli, saved):
    model.tokenize_text(Path("data/all"), ["text.txt"], "byte", val_fraction=0)
    error = cli(*saved, "--data", "all").error
    assert "data/all" in error and "validation" in error


def test_data_of_another_tokenizer(cli, saved):
    """Named both, with the way out."""
    model.tokenize_text(Path("data/bpe"), ["text.txt"], "bpe", vocab_size=270)
    error = cli(*saved, "--data", "bpe").error
    assert "bpe-270 (270 tokens)" in error and "byte (259 tokens)" in error and "text file" in error


@pytest.mark.parametrize("flags", [("--data", "nowhere.txt"), ("--data", "text.txt", "--compare", "nowhere.pt")])
def test_what_is_not_there(cli, saved, flags):
    assert flags[-1] in cli(*saved, "--stride", 16, *flags).error


# ---------------------------------------------------------------------------------------------------------------------
# lm-eval: what happens around it (what happens in it is in peers/)
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch):
    """A stand-in for lm-eval that knows five tasks and returns these results."""
    package, tasks = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.tasks")
    names = ["hellaswag", "piqa", "winogrande", "mmlu", "mmlu_anatomy"]
    tasks.TaskManager = lambda include_path=None: types.SimpleNamespace(all_tasks=names)
    results = {}
    package.simple_evaluate = lambda *args, **kwargs: {"results": results}
    monkeypatch.setitem(sys.modules, "lm_eval", package)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", tasks)
    monkeypatch.setattr(model, "lm_eval_adapter", lambda *args: None)
    return results


@pytest.mark.parametrize(
    "asked, near", [("helaswag", "hellaswag"), ("piqa,winogrand", "winogrande"), ("mmlu_anatomi", "mmlu_anatomy")]
)
def test_an_unknown_task_lists_near_names(cli, saved, harness, asked, near):
    error = cli(*saved, "--tasks", asked).error
    assert f"{asked.split(',')[-1]!r}" in error and near in error
    assert "near" not in cli(*saved, "--tasks", "zzzzzzzz").error


def test_lm_eval_is_not_installed(cli, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in cli(*saved, "--tasks", "piqa").error


def test_rows_of_tasks(evaluate, saved, harness):
    """A row a task with its metrics; the standard errors stay out, and a metric under two filters stays two."""
    harness["piqa"] = {
        "alias": "piqa",
        "acc,none": 0.5,
        "acc_stderr,none": "N/A",
        "acc_norm,none": 0.25,
        "acc_norm_stderr,none": 0.1,
    }
    harness["mmlu"] = {"alias": "m", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.3}
    piqa, mmlu = evaluate(*saved[1:], "--tasks", "piqa,mmlu")
    assert piqa == {"model": "model.pt", "task": "piqa", "acc": 0.5, "acc_norm": 0.25}
    assert (mmlu["model"], mmlu["task"]) == ("model.pt", "mmlu")
    assert sorted(v for v in mmlu.values() if isinstance(v, float)) == [0.1, 0.3]
