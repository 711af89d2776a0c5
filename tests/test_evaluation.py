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
from conftest import N_BYTES, TINY_RUN, byte_gpt, log_of, random_tokens, save_model, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

import model

TEXT = "Ein naïver Café-Besucher zählt: one, two,  three.\n" * 4
TEXT_BYTES, TEXT_WORDS = 4 * 53, 4 * 7


def uniform(vocab_size: int = N_BYTES, **config) -> model.GPT:
    """A model to which every token is equally likely: its loss is the logarithm of the vocabulary."""
    gpt = model.GPT(tiny_config(vocab_size=vocab_size, tie_word_embeddings=False, **config))
    torch.nn.init.zeros_(gpt.lm_head.weight)
    return gpt


def export(gpt: model.GPT, folder: str) -> str:
    Path(folder).mkdir()
    opened = model.Opened(gpt, model.byte_tokenizer(), Path("model.pt"), "", None)
    model.export_hf(opened, Path(folder), torch.float32, "1GB", "")
    return folder


@torch.no_grad()
def loss_of_one_pass(gpt: model.GPT, ids: torch.Tensor):
    return pytest.approx(F.cross_entropy(gpt(ids[None, :-1])[0], ids[1:]).item(), rel=1e-5)


@pytest.fixture
def evaluate(cli, workdir):
    """evaluate(*flags): the rows of eval --json. text.txt has TEXT."""
    Path("text.txt").write_text(TEXT, encoding="utf-8")

    def run(*flags) -> list[dict]:
        return json.loads(cli("eval", "--json", "--device", "cpu", *flags).ok().out)

    return run


@pytest.fixture
def score(evaluate):
    """score(gpt, data, *flags, tokenizer=...): the row of one checkpoint, model.pt."""

    def run(gpt: model.GPT, data: str, *flags, tokenizer: model.Tokenizer | None = None) -> dict:
        save_model("model.pt", gpt, tokenizer)
        (row,) = evaluate("--model_checkpoint", "model.pt", "--data", data, *flags)
        return row

    return run


# --- Perplexity, against transformers


@torch.no_grad()
def loss_of_transformers(hf, ids: torch.Tensor, context: int, stride: int) -> float:
    """The recipe of transformers' documentation (perplexity.md): of each window count the tokens that none before it
    had. A window the length of the stride would leave its first token out: there each block of `context` tokens
    predicts the `context` that follow."""
    total, previous_end = 0.0, 1
    for begin in range(0, len(ids) - 1, stride):
        end = min(begin + context + (stride == context), len(ids))
        losses = F.cross_entropy(hf(ids[None, begin : end - 1]).logits[0], ids[begin + 1 : end], reduction="none")
        total += losses[previous_end - begin - 1 :].sum().item()
        previous_end = end
    return total / (len(ids) - 1)


@pytest.mark.parametrize("context, stride", [
    (32, 32), (32, 31), (32, 8), (32, 1), (16, 16), (17, 5), (300, 300), (300, 7),
])  # fmt: skip
def test_perplexity_is_transformers(workdir, context, stride):
    """Truth: transformers' own model, with windows that divide the text, that do not, and one that has it all."""
    gpt, ids = byte_gpt(block_size=max(32, context)), random_tokens(131, vocab_size=N_BYTES, seed=3)
    hf = AutoModelForCausalLM.from_pretrained(export(gpt, "hf"))
    expected = loss_of_transformers(hf, ids, context, stride) * 130
    for batch_tokens in (1, 100, 16384):
        batches = model.sliding_windows(ids.numpy(), context, stride, batch_tokens)
        found = model.measure(gpt, batches, np.full(N_BYTES, 2))
        assert (found["loss"] * 130, found["tokens"]) == (pytest.approx(expected, rel=1e-5), 130)
        assert found["bits_per_byte"] * 260 == pytest.approx(expected / math.log(2), rel=1e-5)


@pytest.mark.parametrize("arch, flags, context, stride", [
    ("gpt2", "", 32, 32), ("gpt_neox", "--stride 8", 32, 8), ("qwen3", "--block_size 20 --stride 10", 20, 10),
    ("nanochat", "--block_size 20", 20, 20),
])  # fmt: skip
def test_eval_is_transformers(evaluate, arch, flags, context, stride):
    """Truth: transformers on the exported directory; and eval gives one number for it and for the checkpoint."""
    gpt = byte_gpt(arch)
    hf = AutoModelForCausalLM.from_pretrained(export(gpt, "hf"))
    save_model("model.pt", gpt)
    ours, exported = evaluate("--model_checkpoint", "model.pt", "--compare", "hf", "--data", "text.txt", *flags.split())
    expected = loss_of_transformers(hf, torch.tensor([*TEXT.encode()]), context, stride)
    for row in (ours, exported):
        assert row["loss"] == pytest.approx(expected, rel=1e-5)
        assert row["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert row["tokens"] == TEXT_BYTES - 1
    assert ours["bits_per_byte"] == pytest.approx(exported["bits_per_byte"], rel=1e-6)


def test_eval_finds_the_loss_that_training_reported(cli, evaluate):
    """Truth: the log of the run; its validation split is a whole number of blocks and one token more."""
    Path("input.txt").write_text("".join(map(chr, range(32, 127))) * 169, encoding="utf-8")  # 16,055: 1,605 + 14,450
    meta = model.tokenize_text(Path("data/text"), ["input.txt"], "byte", val_fraction=1601.5 / 16055)
    assert meta.n_tokens - meta.val_start == 1601
    cli("train", "--variant", "7M", *TINY_RUN, "--data", "text", "--max_iters", 8, "--eval_tokens", 10_000).ok()
    reported = log_of()[-1]
    assert reported["val_tokens"] == 1600
    (row,) = evaluate("--model_checkpoint", "7M_model.pt", "--data", "text")
    assert row["loss"] == pytest.approx(reported["val_loss"], rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(reported["val_bpb"], rel=1e-5)
    assert row["tokens"] == 1600


# --- The other numbers, by hand


def test_numbers_of_a_uniform_model(score):
    """Truth: ln 259 a byte, 7 words in 53 bytes; the first byte follows from nothing and is not scored."""
    row = score(uniform(), "text.txt", "--stride", 16)
    assert row["loss"] == pytest.approx(math.log(N_BYTES))
    assert row["perplexity"] == pytest.approx(N_BYTES)
    assert row["bits_per_byte"] == pytest.approx(math.log2(N_BYTES))
    assert row["word_perplexity"] == pytest.approx(N_BYTES ** ((TEXT_BYTES - 1) / TEXT_WORDS))
    assert (row["tokens"], row["context"], row["stride"]) == (TEXT_BYTES - 1, 32, 16)
    assert (row["model"], row["data"]) == ("model.pt", "text.txt")


def test_bits_per_byte_compare_across_tokenizers(evaluate):
    """Truth: by hand: each model by its own tokens; one that is a whole word has as many bytes as its UTF-8, é two."""
    tokens = [bytes([b]) for b in range(256)] + ["é".encode(), b" c", b" ca", b" caf", " café".encode()]
    words = model.from_ranks("bpe", tokens, "mine")
    assert words.encode("un café") == [*b"un", 260]
    Path("short.txt").write_text("un café", encoding="utf-8")
    save_model("bytes.pt", uniform())
    save_model("words.pt", uniform(words.n_vocab), words)
    of_bytes, of_words = evaluate(
        "--model_checkpoint", "bytes.pt", "--compare", "words.pt", "--data", "short.txt", "--stride", 8
    )
    assert (of_bytes["tokens"], of_words["tokens"]) == (7, 2)
    assert of_bytes["bits_per_byte"] == pytest.approx(math.log2(259))
    assert of_words["bits_per_byte"] == pytest.approx(2 * math.log2(264) / 7)  # of n and 6 bytes of café
    assert of_words["perplexity"] == of_words["word_perplexity"] == pytest.approx(264)


def test_a_beginning_of_text_token_lets_every_byte_be_scored(evaluate):
    """Truth: by hand: a tokenizer.json whose post-processor puts a token before the text."""
    from tokenizers import processors

    hf = model.byte_tokenizer().backend
    hf.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 257)])
    export(uniform(arch="llama"), "hf")
    hf.save("hf/tokenizer.json")
    (row,) = evaluate("--model_checkpoint", "hf", "--data", "text.txt", "--stride", 16)
    assert row["tokens"] == TEXT_BYTES
    assert row["bits_per_byte"] == pytest.approx(math.log2(N_BYTES))


def test_an_end_of_text_is_no_part_of_a_word(score):
    """Truth: by hand: two documents of two words each, and the token between them, which has a loss and no bytes."""
    Path("a.txt").write_text("one two")
    Path("b.txt").write_text("three four")
    model.tokenize_text(Path("data/two"), ["a.txt", "b.txt"], "byte", val_fraction=0.99)
    row = score(uniform(), "two", "--stride", 8)
    n = row["tokens"]
    assert n == 7 + 1 + 10 - 1 - 1  # one byte is training data, and one not scored
    assert row["bits_per_byte"] == pytest.approx(n * math.log2(N_BYTES) / (n - 1))
    assert row["word_perplexity"] == pytest.approx(N_BYTES ** (n / 4))


def test_the_validation_split_of_a_data_set(score, text_file):
    """Truth: the same text as a file: the last tenth of the data, and nothing of the rest."""
    text = text_file.read_text()
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    Path("val.txt").write_text(text[-(len(text) // 10) :])
    where = ("text", "data/text", "data/text/data.bin", "val.txt")
    rows = [score(byte_gpt(), data, "--block_size", 32, "--stride", 31) for data in where]
    assert len({row.pop("data") for row in rows}) == 3  # a data set's file is the data set
    assert all(row == rows[-1] for row in rows)
    assert rows[0]["tokens"] == len(text) // 10 - 1


# --- Tables and JSON


def test_models_side_by_side(evaluate, cli):
    """Truth: each model on its own; the table says what the JSON says, a line each, in the order asked for."""
    for i, arch in enumerate(("gpt2", "llama", "qwen3")):
        save_model(f"{i}.pt", byte_gpt(arch))
    common = ("--data", "text.txt", "--stride", 16)
    rows = evaluate("--model_checkpoint", "2.pt", "--compare", "0.pt", "1.pt", *common)
    assert rows == [evaluate("--model_checkpoint", f"{i}.pt", *common)[0] for i in (2, 0, 1)]
    flags = ("--model_checkpoint", "2.pt", "--compare", "0.pt", "1.pt", "--device", "cpu", *common)
    head, *lines = cli("eval", *flags).ok().out.splitlines()
    assert head.split() == list(rows[0])
    assert [line.split() for line in lines] == [
        [f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows
    ]
    starts = [head.index(f" {name}") for name in list(rows[0])[1:]]
    assert all(line[at] == " " != line[at + 1] for line in lines for at in starts)  # columns are aligned


def test_nothing_but_json_is_printed(cli, evaluate, text_file):
    """With no --data the newest data set is taken, and saying so must not spoil the JSON."""
    model.tokenize_text(Path("data/text"), [str(text_file)], "byte")
    save_model("checkpoints/7M_model.pt", byte_gpt())
    (row,) = evaluate("--stride", 31)
    assert row["data"] == "data/text" and row["model"] == "checkpoints/7M_model.pt"


# --- Beyond the trained context

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


def test_a_checkpoint_and_its_export_reach_further_alike(evaluate):
    """The export names yarn's factor on cos and sin for 2, which is not that for 4. Truth: the full pass of a model
    made with 4; and a factor of its own stays where the context does."""
    made = byte_gpt("llama", block_size=64, rope_scaling="yarn", rope_factor=2.0)
    save_model("model.pt", made)
    export(made, "hf")
    further = byte_gpt("llama", block_size=64, rope_scaling="yarn", rope_factor=4.0)
    expected = loss_of_one_pass(further, torch.tensor([*TEXT.encode()]))
    both = ("--model_checkpoint", "model.pt", "--compare", "hf", "--data", "text.txt", "--rope_scaling", "yarn")
    rows = evaluate(*both, "--rope_factor", 4)
    assert [row["loss"] for row in rows] == [expected, expected]
    own = byte_gpt("llama", rope_scaling="yarn", rope_factor=2.0, rope_attention_factor=1.3)
    own.extend_context(rope_scaling="yarn", rope_factor=2.0)
    assert own.config.rope_attention_factor == 1.3


def test_int8_weights(score, workdir):
    """Truth: the model whose matrices are rounded by hand, the tied head apart from the embedding."""
    gpt = byte_gpt("llama")
    tensors, state = gpt.state_dict(), {"lm_head.weight": gpt.wte.weight.detach()}
    for name, w in {**tensors, **state}.items():
        if name.startswith("blocks.") and w.dim() == 2 or name == "lm_head.weight":
            scale = w.abs().amax(dim=1, keepdim=True) / 127
            state[name] = (w / scale).round() * scale
        else:
            state[name] = w.half().float() if w.dim() == 2 else w
    rounded = byte_gpt("llama", tie_word_embeddings=False)
    rounded.load_state_dict(state)
    expected, exact = score(rounded, "text.txt"), score(gpt, "text.txt")
    found = score(gpt, "text.txt", "--quantize", "int8")
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert abs(found["loss"] - exact["loss"]) > 1e-4


def test_no_positions_have_no_end(score):
    """Truth: one plain pass over the whole text by a model that adds no positions at all."""
    gpt = byte_gpt(pos_embd="none")
    assert score(gpt, "text.txt", "--block_size", 300)["loss"] == loss_of_one_pass(gpt, torch.tensor([*TEXT.encode()]))


# --- Mistakes


@pytest.fixture
def saved(evaluate):
    save_model("model.pt", byte_gpt())
    return ("eval", "--model_checkpoint", "model.pt")


@pytest.mark.parametrize("flags, words", [
    (("--stride", 33), ["stride is 33", "32"]), (("--block_size", 64), ["learned", "64"]),
    (("--rope_scaling", "yarn", "--rope_factor", 2), ["learned", "yarn"]),
    (("--rope_factor", 4), ["--rope_scaling"]),
    (("--data", "empty.txt"), ["empty.txt"]), (("--data", "nowhere.txt"), ["nowhere.txt"]),
    (("--data", "one.txt"), ["one.txt", "token"]),  # with no token that follows from another
    (("--data", "latin.txt"), ["latin.txt", "utf-8"]),
    (("--compare", "nowhere.pt"), ["nowhere.pt"]),
    (("--data", "all"), ["data/all", "validation"]),
    (("--data", "bpe"), ["bpe-270 (270 tokens)", "byte (259 tokens)", "text file"]),
], ids=str)  # fmt: skip
def test_mistakes(cli, saved, flags, words):
    for name, content in (("empty", b""), ("one", b"a"), ("latin", b"caf\xe9 au lait")):
        Path(f"{name}.txt").write_bytes(content)
    model.tokenize_text(Path("data/all"), ["text.txt"], "byte", val_fraction=0)
    model.tokenize_text(Path("data/bpe"), ["text.txt"], "bpe", vocab_size=270)
    cli(*saved, "--data", "text.txt", *flags).fails_with(*words)


# --- lm-eval: what happens around it (what happens in it is in peers/)


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
    return results


def test_an_unknown_task_names_a_near_one(cli, saved, harness):
    for asked, near in (("helaswag", "hellaswag"), ("piqa,winogrand", "winogrande"), ("mmlu_anatomi", "mmlu_anatomy")):
        cli(*saved, "--tasks", asked).fails_with(repr(asked.split(",")[-1]), f"did you mean {near}?")
    assert "did you mean" not in cli(*saved, "--tasks", "zzzzzzzz").error


def test_lm_eval_is_not_installed(cli, saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install lm-eval" in cli(*saved, "--tasks", "piqa").error


@pytest.mark.parametrize("flags", ["--quantize int8", "--data text.txt", "--block_size 16", "--stride 8"])
def test_what_tasks_would_ignore_is_refused(cli, saved, harness, flags):
    assert flags.split()[0] in cli(*saved, "--tasks", "piqa", *flags.split()).error


def test_rows_of_tasks(evaluate, saved, harness):
    """A row a task with its metrics; the standard errors stay out, and a metric under two filters stays two."""
    harness["piqa"] = {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.25,
                       "acc_norm_stderr,none": 0.1}  # fmt: skip
    harness["mmlu"] = {"alias": "m", "exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.3}
    piqa, mmlu = evaluate(*saved[1:], "--tasks", "piqa,mmlu")
    assert piqa == {"model": "model.pt", "task": "piqa", "acc": 0.5, "acc_norm": 0.25}
    assert (mmlu["model"], mmlu["task"]) == ("model.pt", "mmlu")
    assert sorted(v for v in mmlu.values() if isinstance(v, float)) == [0.1, 0.3]


def test_conversations_that_are_cut_are_told(cli, workdir):
    """Of a longer one only the first block is measured."""
    turns = [["Hi", "Hello."], ["Hi", "Hello. " * 30]]
    Path("talks.jsonl").write_text("".join(json.dumps({"utterances": t}) + "\n" for t in turns), encoding="utf-8")
    save_model("model.pt", uniform(block_size=64))
    line = ("eval", "--model_checkpoint", "model.pt", "--data", "talks.jsonl", "--device", "cpu")
    assert "talks.jsonl: 1 of 2 conversations are longer than the context, 64, and are cut" in cli(*line).ok().err
