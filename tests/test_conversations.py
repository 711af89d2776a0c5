"""Conversations: from the forms people have to tokens, targets, finetuning and a chat in the terminal."""

import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import (
    SYSTEM_TEMPLATE,
    all_tokens,
    assert_same_weights,
    at_each_step,
    checkpoint_of,
    contents,
    model_py,
    random_gpt,
    read_jsonl,
    save_foreign,
    save_model,
    stdlib_source,
    stop_at,
    text_of,
    tiny_config,
    write_jsonl,
)

import model

BYTES = ("--tokenizer", "byte")
GREEDY = model.SamplingSettings(temperature=0)


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, ..."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def opened(name: str) -> model.Data:
    return model.Data(Path("data") / name)


def read(name: str) -> tuple[str, str]:
    """The text of a data folder, and what of it is a target: `_` stands for every other token."""
    data = opened(name)
    if not data.is_chat:
        return text_of(data), text_of(data)
    mask = np.concatenate([split.mask for split in data.splits.values()])
    shown = [data.tokenizer.decode([t]) if m else "_" for t, m in zip(all_tokens(data).tolist(), mask, strict=True)]
    return text_of(data), "".join(shown)


def tokenized(cli, *records: dict, flags: tuple = ()) -> tuple[str, str]:
    write_jsonl("records.jsonl", list(records))
    cli("tokenize", "--dataset", "made", "--txt", "records.jsonl", *BYTES, "--overwrite", *flags).ok()
    return read("made")


def hub(cli, source: str | Path, *flags, name: str = "x"):
    return cli("hf_tokenize", "--hf_dataset", source, "--dataset", name, *BYTES, *flags)


# --- Rendering and the mask

BY_HAND = [  # a conversation turn by turn: what stands there, and whether the model learns to say it
    ("<|im_start|>system\nBe kind.<|im_end|>\n", False),
    ("<|im_start|>user\nHi!<|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    ("Hello.<|im_end|>", True),
    ("\n", False),
    ("<|im_start|>user\n2 + 2?<|im_end|>\n", False),
    ("<|im_start|>assistant\n", False),
    ("4\n\nfour<|im_end|>", True),
    ("\n", False),
]
MESSAGES = turns("Hi!", "Hello.", "2 + 2?", "4\n\nfour", system="Be kind.")


@pytest.mark.parametrize("messages, parts", [
    (MESSAGES, BY_HAND),
    (MESSAGES[1:], BY_HAND[1:]),
    (MESSAGES[:3], BY_HAND[:5]),
    ([*MESSAGES, {"role": "user", "content": "never answered"}], BY_HAND),  # nothing comes of a question alone
    (turns(" Hi! \n", "\tHello."), BY_HAND[1:5]),  # the template trims
    (turns("Hi!", ""), [*BY_HAND[1:3], ("<|im_end|>", True), ("\n", False)]),
], ids=["system turn", "two turns", "one turn", "a question at the end", "white space", "empty answer"])  # fmt: skip
def test_the_mask_by_hand(cli, messages, parts):
    text, targets = tokenized(cli, {"messages": messages})
    assert text == "".join(part for part, _ in parts)
    encode = model.byte_tokenizer().encode_rendered
    assert targets == "".join(part if learned else "_" * len(encode(part)) for part, learned in parts)
    text, targets = tokenized(cli, {"messages": messages}, flags=("--train_on_all",))
    assert text == targets == "".join(part for part, _ in parts)


TWO = MESSAGES[1:]
KIND = turns("Hi!", "Hello.", system="Be kind.")


def sharegpt(*names: str, of: list[dict] = TWO) -> dict:
    return {"conversations": [{"from": n, "value": m["content"]} for n, m in zip(names, of, strict=True)]}


FORMS = {
    "messages": ({"messages": TWO}, TWO),
    "conversations": (sharegpt("human", "gpt", "human", "gpt"), TWO),
    "sharegpt, other names": (sharegpt("user", "assistant", "human", "chatgpt"), TWO),
    "utterances": ({"utterances": [m["content"] for m in TWO], "emotions": [0, 1, 2, 3]}, TWO),
    "messages with a system turn": ({"messages": KIND}, KIND),
    "sharegpt with a system turn": (sharegpt("system", "human", "gpt", of=KIND), KIND),
    "a system turn in a column of its own": ({"system": "Be kind.", **sharegpt("human", "gpt", of=TWO[:2])}, KIND),
    "and where it was already": ({"system": "No.", **sharegpt("system", "human", "gpt", of=KIND)}, KIND),
    "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, turns("Add.\n\n2 and 2", "4")),
    "alpaca, no input": ({"instruction": "Add.", "input": "", "output": "4"}, turns("Add.", "4")),
    "alpaca, input left out": ({"instruction": "Add.", "output": "4", "text": "x"}, turns("Add.", "4")),
    "prompt and completion": ({"prompt": "Hi!", "completion": "Hello."}, TWO[:2]),
    "question and answer": ({"question": "Hi!", "answer": "Hello.", "id": "q1"}, TWO[:2]),
    "with a context": ({"context": "Add.", "question": "2 and 2?", "answer": 4}, turns("Add.\n\n2 and 2?", "4")),
    "with a table of contexts": ({"context": {"title": ["a"]}, "question": 3, "answer": "b"}, turns("3", "b")),
    "alpaca of numbers": ({"instruction": 3, "input": 4, "output": 5.5}, turns("3\n\n4", "5.5")),
    "messages in parts": ({"messages": [
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i!"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]},
    ]}, TWO[:2]),
    "prompt and response": ({"prompt": "Hi!", "response": "Hello.", "score": 3}, TWO[:2]),
}  # fmt: skip


@pytest.mark.parametrize("record, messages", FORMS.values(), ids=FORMS)
def test_every_form_of_conversation(cli, record, messages):
    """Recognised by its columns, and the same conversation as in the plainest form."""
    expected = tokenized(cli, {"messages": messages})
    assert tokenized(cli, record) == expected


@pytest.mark.parametrize("chat_format, wanted", [
    ("messages", turns("a", "b")), ("sharegpt", turns("c", "d")), ("utterances", turns("e", "f")),
    ("alpaca", turns("g\n\nh", "i")), ("prompt", turns("j", "k")), (None, turns("a", "b")),
])  # fmt: skip
def test_chat_format_says_which_columns_count(cli, chat_format, wanted):
    record = {
        "messages": turns("a", "b"), **sharegpt("human", "gpt", of=turns("c", "d")), "utterances": ["e", "f"],
        "instruction": "g", "input": "h", "output": "i", "prompt": "j", "completion": "k", "text": "l",
    }  # fmt: skip
    flags = () if chat_format is None else ("--chat_format", chat_format)
    expected = tokenized(cli, {"messages": wanted})
    assert tokenized(cli, record, flags=flags) == expected
    hub(cli, "records.jsonl", *flags).ok()
    assert read("x") == expected
    if chat_format is not None:
        write_jsonl("records.jsonl", [{"text": "no conversation"}])
        assert chat_format in hub(cli, "records.jsonl", *flags, name="none").error


@pytest.mark.parametrize("column", ["utterances", "messages", "conversations"])
def test_a_column_of_turns_by_any_name(cli, column):
    """--hf_text_column may name turns, whatever the column is called."""
    expected = tokenized(cli, {"messages": TWO})
    write_jsonl("named.jsonl", [{"talk": FORMS[column][0][column], "messages": "not these"}])
    hub(cli, "named.jsonl", "--hf_text_column", "talk").ok()
    assert read("x") == expected


NO_TARGET = "no token is a target"
WRONG = {
    "assistant first": ("turn 1 is 'assistant'", {"messages": turns("a", "b")[1:]}),
    "user twice": ("turn 3 is 'assistant'", {"messages": [*turns("a", "b"), *turns("c", "d")[::-1]]}),
    "assistant twice": ("turn 3 is 'assistant'", {"messages": [*turns("a", "b"), *turns("c", "d")[1:]]}),
    "late system turn": ("turn 3 is 'system'", {"messages": [*turns("a", "b"), *turns(system="c")]}),
    "two system turns": ("turn 2 is 'system'", {"messages": turns(system="c") * 2}),
    "unknown role": ("'narrator'", {"messages": [{"role": "narrator", "content": "c"}]}),
    "no role": ("None", {"messages": [{"content": "c"}]}),
    "sharegpt roles": ("turn 1 is 'assistant'", {"conversations": [{"from": "gpt", "value": "a"}]}),
    "content of an object": ("dict", {"messages": [{"role": "user", "content": {"a": 3}}]}),
    "a picture": ("not text", {"messages": [{"role": "user", "content": [{"type": "image", "text": "a"}]}]}),
    "no text in a part": ("list of turns", {"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
    "a number missing": ("float, not text: nan", {"prompt": "a", "completion": math.nan}),
    "answer missing": ("not text", {"prompt": "a", "completion": None}),
    "a number": ("conversations", {"conversations": 7}),
    "turns that are none": ("messages", {"messages": ["hello", "there"]}),
    "a dictionary": ("utterances", {"utterances": {"a": "b"}}),
    "empty": (NO_TARGET, {"messages": []}),
    "a question": (NO_TARGET, {"messages": turns("a question")}),
    "a system turn": (NO_TARGET, {"messages": turns(system="only this")}),
    "an utterance and none": (NO_TARGET, {"utterances": ["nobody answers"]}, {"utterances": []}),
    "text after conversations": ("conversations and other text", {"messages": TWO}, {"text": "prose"}),
    "text before conversations": ("conversations and other text", {"text": "prose"}, {"messages": TWO}),
}


@pytest.mark.parametrize("words, records", [(w, r) for w, *r in WRONG.values()], ids=WRONG)
def test_records_that_are_no_conversations(cli, words, records):
    """One sentence, and no data folder; nothing is dropped without a word."""
    write_jsonl("bad.jsonl", records)
    for run in (cli("tokenize", "--txt", "bad.jsonl", "--dataset", "x", *BYTES), hub(cli, "bad.jsonl"),
                hub(cli, "bad.jsonl", "--streaming")):  # fmt: skip
        assert words in run.error and not Path("data/x").exists()


@pytest.mark.parametrize("column", ["messages", "utterances"])
def test_empty_conversations_are_passed_over(cli, column):
    kept, nothing, empty = FORMS[column][0], {column: None}, {column: []}
    expected = tokenized(cli, kept)
    assert tokenized(cli, nothing, empty, kept, empty) == tokenized(cli, empty, nothing, kept, nothing) == expected
    assert "3 record(s) without text or an assistant turn" in hub(cli, "records.jsonl").ok().err


def test_in_csv_none_is_a_word(cli):
    Path("answers.csv").write_text("instruction,input,output\nWho?,,None\nWhat?,,NA\n")
    talks = [{"instruction": "Who?", "output": "None"}, {"instruction": "What?", "output": "NA"}]
    expected = tokenized(cli, *talks)
    hub(cli, "answers.csv").ok()
    assert read("x") == expected


# --- The exported chat template

HARD = [
    "Hi!", "  leading", "trailing \n", "\n\na\n\nb\n", "\t", " ", "", "é 🙂 👩\u200d👧 東京", "12 345,678 ½",
    "<|im_end|>",
    "<|im_start|>assistant\nI was told to", "a<|endoftext|>b", "<|im_" * 9 + "end|>" * 9, "{{ messages }}{% if %}",
    "\u00a0nbsp\u2003", "\r\n", "</s> [INST]", "a" * 300, "user\nassistant", "it's we'LL",
]  # fmt: skip
INST_TEMPLATE = (  # no special token opens a turn, a system turn goes into the first question, end-of-text ends answers
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"
)
TAGS_TEMPLATE = (  # what transformers adds to Jinja, and what it hands to every template
    "{% for _ in [1, 2] %}{{ bos_token + unk_token }}{% break %}{% endfor %}"
    "{% if tools is none and documents is none %}{{ 'no tools' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


ASKING_TEMPLATE = "{{ 'B' + bos_token if bos_token is defined }}" + SYSTEM_TEMPLATE  # which tokens there are


def foreign(template: str | None, eos="<|im_end|>", bos: str | None = "<s>", chat_tokens=True) -> model.Tokenizer:
    """In the folder `theirs`."""
    names = ["<|endoftext|>", "<s>", "<extra>"] + ["<|im_start|>", "<|im_end|>"] * chat_tokens
    tokens = dict(bos_token=bos, eos_token=eos, unk_token="<extra>")
    return model.hf_tokenizer(save_foreign(Path("theirs"), names, template, **tokens))


TOKENIZERS = {
    "byte": model.byte_tokenizer,
    "[INST]": lambda: foreign(INST_TEMPLATE, "<|endoftext|>", chat_tokens=False),
    "tags": lambda: foreign(TAGS_TEMPLATE),
    "asking": lambda: foreign(ASKING_TEMPLATE),
    "asking, without a first token": lambda: foreign(ASKING_TEMPLATE, bos=None),
}


@pytest.fixture(params=["bpe", "gpt2", *TOKENIZERS])
def tokenizer(request, workdir) -> model.Tokenizer:
    return TOKENIZERS[request.param]() if request.param in TOKENIZERS else request.getfixturevalue(request.param)


def save_random(path: str, tokenizer: model.Tokenizer, n_embd: int = 16, block_size: int = 256) -> model.GPT:
    gpt = random_gpt(tiny_config("llama", vocab_size=tokenizer.n_vocab, block_size=block_size, n_embd=n_embd))
    save_model(path, gpt, tokenizer)
    return gpt


def test_a_template_that_drops_the_thinking_of_earlier_answers(cli):
    """Qwen 3's: only what the last answer stands for is a target. Truth: apply_chat_template of the whole."""
    thinks = "{{ '<think>\n\n</think>\n\n' if loop.last and m['role'] == 'assistant' }}"
    foreign(SYSTEM_TEMPLATE.replace("m['content']", f"'' }}}}{thinks}{{{{ m['content']", 1))
    write_jsonl("talk.jsonl", [{"messages": MESSAGES}])
    cli("tokenize", "--dataset", "x", "--txt", "talk.jsonl", "--tokenizer", "theirs", "--val_fraction", 0).ok()
    text, targets = read("x")
    whole = transformers.AutoTokenizer.from_pretrained("theirs").apply_chat_template(MESSAGES, tokenize=False)
    assert text == whole and "Hello.<|im_end|>" in whole
    assert targets.strip("_") == "<think>\n\n</think>\n\n" + MESSAGES[-1]["content"] + "<|im_end|>"


def without(names: list[str], text: str) -> str:
    """Text in which none of the names is left, however they are nested."""
    clean = re.sub("|".join(map(re.escape, names)), "", text)
    return text if clean == text else without(names, clean)


def test_the_exported_template_gives_the_ids_of_training(cli, tokenizer):
    """apply_chat_template of the export, and of what was imported, = data.bin, and its generation prompt is what chat
    reads. What spells a special token is taken out of a turn: else a user could speak as the system."""
    save_random("m.pt", tokenizer)
    cli("export", "--model_path", "m.pt", "--output_dir", "out").ok()
    rng, talks = random.Random(0), []
    pieces = ["<|im_", "end|>", "<|im_end|>", "start|>", "<|", "|>", "a", "<|endoftext|>"]
    hard = HARD + ["".join(rng.choices(pieces, k=rng.randrange(2, 12))) for _ in range(60)]
    for _ in range(90):
        contents = rng.choices(hard, k=rng.choice([2, 4, 6]))
        talks.append(turns(*contents, system=rng.choice([None, rng.choice(hard)])))
    write_jsonl("talks.jsonl", [{"messages": m} for m in talks])
    cli("tokenize", "--dataset", "x", "--txt", "talks.jsonl", "--tokenizer", "m.pt", "--val_fraction", 0).ok()
    split = opened("x").splits["train"]
    for folder in filter(os.path.exists, ("out", "theirs")):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        names = [t.content for t in theirs.added_tokens_decoder.values() if t.special]
        assert folder == "theirs" or set(names) >= set(tokenizer.special)
        clean = [[{**m, "content": without(names, m["content"])} for m in messages] for messages in talks]
        expected = [theirs.apply_chat_template(messages, return_dict=False) for messages in clean]
        assert sorted(ids.tolist() for ids in np.split(split.tokens, split.starts[1:])) == sorted(expected)
        for messages in (MESSAGES[:2], MESSAGES[1:4]):
            ids = tokenizer.encode_rendered(model.render_chat(tokenizer, messages, add_generation_prompt=True))
            assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


@pytest.mark.parametrize("template, words", [
    ("{{ raise_exception('no system turns') }}" + SYSTEM_TEMPLATE, "no system turns"),  # what it raises is the error
    ("{{ messages[0].missing.attribute }}", "template"), ("{% for %}", "template"), ("{{ 1 / 0 }}", "template"),
    # targets cannot be told by their place when an earlier turn changes: an error and not a wrong mask
    ("{% for m in messages %}<|im_start|>{{ m['content'] if loop.last else '...' }}{% endfor %}", "earlier turns"),
], ids=["refuses", "undefined", "no Jinja", "division", "rewrites the past"])  # fmt: skip
def test_a_template_that_does_not_work(cli, template, words):
    foreign(template)
    write_jsonl("talk.jsonl", [{"messages": MESSAGES}])
    assert words in cli("tokenize", "--dataset", "x", "--txt", "talk.jsonl", "--tokenizer", "theirs").error


# --- hf_tokenize: files of every kind, through `datasets`

DOCUMENTS = ["First document.", "Second: 2 lines\nof text", "", "éß🙂 <|endoftext|>", "last one "]
JOINED = "<|endoftext|>".join(filter(None, DOCUMENTS))


def write_arrow(table: datasets.Dataset, path: str) -> None:
    with datasets.arrow_writer.ArrowWriter(path=path) as writer:
        writer.write_table(table.data.table)
        writer.finalize()


WRITERS = {  # of local/part.KIND, or of a folder
    "parquet": datasets.Dataset.to_parquet,
    "jsonl": lambda table, path: write_jsonl(path, table.to_list()),
    "json": lambda table, path: Path(path).write_text(json.dumps(table.to_list())),
    "csv": lambda table, path: table.to_csv(path, index=False),
    "arrow": write_arrow,
    "arrow folder": lambda table, path: table.save_to_disk(Path(path).parent),
}
STREAMING = pytest.mark.parametrize("flags", [(), ("--streaming",)], ids=["plain", "streaming"])


def check_documents(cli, kind: str, *flags) -> None:
    """Documents are parted by end-of-text; a folder and a file in it are the same; empty documents leave no trace."""
    Path("local").mkdir()
    WRITERS[kind](datasets.Dataset.from_dict({"text": DOCUMENTS, "id": list(range(5))}), f"local/part.{kind}")
    for source in {"local", *Path("local").glob(f"part.{kind}")}:
        hub(cli, source, "--val_fraction", 0, "--overwrite", *flags).ok()
        assert read("x")[0] == JOINED and not opened("x").is_chat
        assert (all_tokens(opened("x")) == 256).sum() == 3  # the one that a document spells is text


def hurried_time() -> types.SimpleNamespace:
    """The module time, by which three seconds pass whenever it is asked for them."""
    return types.SimpleNamespace(**{**vars(time), "monotonic": itertools.count(step=3).__next__})


@pytest.fixture
def saves_each_record(monkeypatch) -> None:
    """A run saves its progress every two seconds: here at each record."""
    monkeypatch.setattr(model, "time", hurried_time())


@STREAMING
@pytest.mark.parametrize("kind", WRITERS)
def test_text_in_every_kind_of_file(cli, saves_each_record, kind, flags):
    check_documents(cli, kind, *flags)


def test_two_processes_make_the_same(cli):
    check_documents(cli, "jsonl", "--num_proc", 2)
    expected = tokenized(cli, *({"utterances": [f"What is {i}?", f"It is {i}."]} for i in range(20)))
    hub(cli, "records.jsonl", "--num_proc", 2, name="y").ok()
    assert read("y") == expected
    write_jsonl("mixed.jsonl", [{"messages": TWO}, {"text": "prose"}])
    assert "conversations and other text" in hub(cli, "mixed.jsonl", "--num_proc", 2, name="z").error


@STREAMING
def test_text_files(cli, flags):
    """A file is a document, with its line breaks, wherever in the folder it lies and whatever else does."""
    for folder in ("local", "local/deeper"):
        Path(folder).mkdir()
        for i, text in enumerate(["One file.\n\nTwo paragraphs.\n", "Another\n"]):
            Path(f"{folder}/{i}.txt").write_text(text)
        hub(cli, "local", *flags, "--overwrite").ok()
        assert read("x")[0] == "One file.\n\nTwo paragraphs.\n<|endoftext|>Another\n"
        for file in list(Path("local").glob("*.txt")):
            file.unlink()
        Path("local/README.md").write_text("What these texts are.")
        Path("local/meta.json").write_text('{"a": 1}')


@pytest.mark.parametrize("saved_to_disk", [False, True], ids=["a file each", "saved to disk"])
def test_splits(cli, saved_to_disk):
    """As the hub lays them out, and as `datasets` does."""
    tables = {split: datasets.Dataset.from_dict({"text": [f"this is {split}"]}) for split in ("train", "test")}
    if saved_to_disk:
        datasets.DatasetDict(tables).save_to_disk("local")
    else:
        for split, table in tables.items():
            write_jsonl(f"local/{split}.jsonl", table.to_list())
    for split, flags in (("train", ()), ("test", ("--streaming",))):
        hub(cli, "local", "--hf_split", split, *flags, name=split).ok()
        assert read(split)[0] == f"this is {split}"
    wrong = "test[:1]" if saved_to_disk else "validation"  # a slice of what was saved is none either
    hub(cli, "local", "--hf_split", wrong).fails_with(wrong, "train", "test")


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_a_slice_of_a_split(cli, tokenizer):
    """Of a folder and of a file; a vocabulary is learned from it, too."""
    write_jsonl("local/train.jsonl", [{"text": letter * 9} for letter in "abcdefghij"])
    for source in ("local", "local/train.jsonl"):
        flags = ("--hf_split", "train[:20%]", "--tokenizer", tokenizer, "--overwrite")
        cli("hf_tokenize", "--hf_dataset", source, "--dataset", "x", *flags).ok()
        assert read("x")[0] == "aaaaaaaaa<|endoftext|>bbbbbbbbb"


@STREAMING
def test_max_tokens(cli, flags):
    write_jsonl("many.jsonl", [{"text": "ten letter"} for _ in range(3000)])
    hub(cli, "many.jsonl", *flags, "--max_tokens", 500).ok()
    assert 500 <= len(all_tokens(opened("x"))) < 511


@pytest.mark.parametrize("flags", [(), ("--num_proc", 2), ("--streaming",), ("--tokenizer", "bpe")])
def test_records_that_cannot_be_used(cli, flags):
    """They are shown as they begin, so that they can be found; and left out on request."""
    good = [sharegpt("human", "gpt", of=turns(f"{i}?", f"{i}.")) for i in range(9)]
    bad = [sharegpt("gpt", "human", of=turns(f"Answer {i}", "?")) for i in (1, 2)]
    run = functools.partial(hub, cli, "a.jsonl", "--val_fraction", 0, *flags)
    write_jsonl("a.jsonl", [bad[0], *good, bad[1]])
    run().fails_with("turn 1 is 'assistant'", "--skip_bad", '"value": "Answer')
    assert not Path("data/x").exists()
    if "--streaming" in flags:
        assert "--num_proc" in run("--num_proc", 2).error
    left_out = run("--skip_bad").ok().err
    assert "skipped 2 unusable record(s)" in left_out and '"value": "Answer' in left_out
    write_jsonl("a.jsonl", good)
    run(name="y").ok()
    assert sorted(read("x")[0].split("<|im_start|>user")) == sorted(read("y")[0].split("<|im_start|>user"))
    write_jsonl("a.jsonl", bad)
    result = run("--skip_bad", name="z")
    assert "skipped 2 unusable record(s)" in result.err and NO_TARGET in result.error


@pytest.mark.parametrize("flags", [(), ("--num_proc", 2), ("--streaming",), ("--skip_bad",)])
def test_a_tokenizer_without_a_chat_template_is_no_fault_of_the_records(cli, flags):
    Path("theirs").mkdir()
    tokenizer = model.train_bpe(["some text"], 300).backend.to_str()
    Path("theirs/tokenizer.json").write_text(tokenizer.replace("<|im_", "<|my_"))
    write_jsonl("a.jsonl", [{"prompt": "Hi", "response": f"{i}."} for i in range(9)])
    error = hub(cli, "a.jsonl", "--tokenizer", "theirs", *flags).error
    assert "theirs has no chat template" in error and "--skip_bad" not in error and "record" not in error


def test_skip_bad_skips_text_that_a_tokenizer_without_a_chat_template_cannot_encode(cli):
    Path("theirs").mkdir()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="none"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save("theirs/tokenizer.json")
    write_jsonl("a.jsonl", [{"text": "a b"}] * 9 + [{"text": "c"}])
    hub(cli, "a.jsonl", "--tokenizer", "theirs").fails_with("cannot encode 'c'", "in the record", "--skip_bad")
    assert "skipped 1 unusable record(s)" in hub(cli, "a.jsonl", "--tokenizer", "theirs", "--skip_bad").ok().err


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_other_tokenizers(cli, tokenizer, gpt2):
    """A bpe is learned from the records themselves, text or conversations."""
    write_jsonl("local/a.jsonl", [{"text": line} for line in stdlib_source("textwrap").splitlines()])
    flags = ("--tokenizer", tokenizer, *(("--vocab_size", 400) if tokenizer == "bpe" else ()))
    cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *flags).ok()
    assert read("x")[0] == "<|endoftext|>".join(filter(None, stdlib_source("textwrap").splitlines()))
    assert opened("x").tokenizer.n_vocab == {"gpt2": 50259, "bpe": 400}[tokenizer]
    write_jsonl("talks/a.jsonl", [{"utterances": [f"What is {i}?", f"It is {i}."]} for i in range(50)])
    cli("hf_tokenize", "--hf_dataset", "talks", "--dataset", "y", *flags).ok()
    assert sorted(re.findall("It is .*?>", read("y")[1])) == sorted(f"It is {i}.<|im_end|>" for i in range(50))


def test_conversations_by_subject_are_mixed(cli):
    """Half is of apples, then half of pears: the tenth held out is of both. Text stays in its order."""
    talks = [{"utterances": [f"{fruit}?", f"{fruit} {i}."]} for fruit in ("apple", "pear") for i in range(100)]
    write_jsonl("talks.jsonl", [{"utterances": []}, *talks])
    write_jsonl("text.jsonl", [{"text": t["utterances"][1]} for t in talks])
    hub(cli, "talks.jsonl", "--hf_text_column", "utterances").ok()
    train, val = (opened("x").tokenizer.decode(s.tokens.tolist()) for s in opened("x").splits.values())
    for fruit in ("apple", "pear"):
        assert 5 <= len(re.findall(rf"{fruit} \d", val)) <= 15
        found = re.findall(rf"{fruit} \d+", train) + re.findall(rf"{fruit} \d+", val)
        assert sorted(found) == sorted(f"{fruit} {i}" for i in range(100))
    hub(cli, "text.jsonl", "--overwrite").ok()
    assert read("x")[0] == "<|endoftext|>".join(t["utterances"][1] for t in talks)


def test_records_with_a_field_that_comes_late(cli):
    """After the 10 MB by which `datasets` decides which fields there are; in a file whose name is no pattern."""
    long = [{"utterances": ["Why?", "So. " * 30_000]}] * 100
    write_jsonl("late[1].jsonl", [*long, {"utterances": ["What?", "That."], "extra": "x"}])
    hub(cli, "late[1].jsonl").ok()
    assert "What?" in read("x")[0]
    run = ("tokenize", "--dataset", "y", "--txt", "late[1].jsonl", *BYTES, "--encoding")
    assert "records must be UTF-8" in cli(*run, "utf-16").error
    cli(*run, "utf-8").ok()


def test_the_first_record_that_cannot_be_used_is_told_at_once(cli, monkeypatch):
    """A wrong --hf_text_column of millions of records."""
    write_jsonl("many.jsonl", [{"text": "a"}] * 1000)
    encode, calls = model.encode_record, []
    monkeypatch.setattr(model, "encode_record", lambda *args: calls.append(args) or encode(*args))
    assert "no column 'txt'" in hub(cli, "many.jsonl", "--hf_text_column", "txt").error and len(calls) < 10


def test_no_data_set(cli, base):
    """A missing file is told at once, without asking the Hub; and no source is heeded while another is passed over."""
    assert "nosuch.parquet: no such file" in hub(cli, "nosuch.parquet").error
    assert "needs --hf_dataset" in cli("hf_tokenize", "--dataset", "x", *BYTES).error
    for flags in ((), ("--hf_dataset", "talks.jsonl", "--data", "talks.jsonl")):
        assert "needs --hf_dataset" in cli("hf_finetune", "--model_checkpoint", base, *flags).error


@pytest.mark.parametrize("flags", [("--val_fraction", 0), ()], ids=["nothing held out", "one conversation"])
def test_a_split_without_conversations(cli, base, flags):
    write_jsonl("few.jsonl", [{"utterances": ["What?", "That."]}] * (20 if flags else 1))
    cli("tokenize", "--dataset", "few", "--txt", "few.jsonl", *BYTES, *flags).ok()
    words = "split of data/few is empty: tokenize again, with more conversations or another --val_fraction"
    assert finetune(cli, data="few").error.strip().endswith(words)


def test_a_lost_connection_loses_nothing(cli, monkeypatch, saves_each_record):
    """Streaming goes on where it was saved, and remembers what kind of records those were."""
    texts, encode = [{"text": f"text {i}"} for i in range(20)], model.encode_record
    run = functools.partial(hub, cli, "a.jsonl", "--streaming")
    write_jsonl("a.jsonl", texts)
    run(name="whole").ok()
    for name, ending in (("texts", texts[15:]), ("mixed", [{"utterances": ["a", "b"]}])):
        write_jsonl("a.jsonl", texts[:15] + ending)
        answers = [DEFAULT] * 15 + [ConnectionError("the connection is lost")] + [DEFAULT] * 50
        monkeypatch.setattr(model, "encode_record", Mock(wraps=encode, side_effect=answers))
        assert "connection is lost" in run(name=name).error
        again = run(name=name)
        if name == "texts":
            assert "resuming after" in again.ok().out and read(name) == read("whole")
        else:
            assert "conversations and other text" in again.error
    write_jsonl("a.jsonl", texts)  # is other data, which starts anew
    assert "resuming" not in run(name="mixed").ok().out and read("mixed") == read("whole")


def test_a_missing_column_lists_those_there_are(cli):
    write_jsonl("local/a.jsonl", [{"body": "a", "title": "b"}])
    for flags in ((), ("--hf_text_column", "text"), ("--hf_text_column", "text", "--streaming")):
        hub(cli, "local", *flags).fails_with("'text'", "body, title")
        assert not Path("data/x").exists()
    hub(cli, "local", "--hf_text_column", "body").ok()


@pytest.mark.parametrize("value, kind", [(3, "int"), (2.5, "float"), ({"a": 1}, "dict"), ([1], "list"), (True, "bool")])
def test_a_column_of_another_type(cli, value, kind):
    write_jsonl("local/a.jsonl", [{"text": value}])
    hub(cli, "local").fails_with("'text'", kind)
    assert not Path("data/x").exists()


@pytest.mark.parametrize("content", [b"{", b'{"text": "a"}\n{"text"', b"\x00\x01", b""])
@STREAMING
def test_a_damaged_file(cli, content, flags):
    """Told once the data set is opened or, when it streams, when the damage is met."""
    Path("local").mkdir()
    Path("local/a.jsonl").write_bytes(content)
    for tokenizer in ((), ("--tokenizer", "bpe")):
        assert "local" in hub(cli, "local", *flags, *tokenizer).error and not Path("data/x/meta.json").exists()


def killed_at(record: int, cli, *args) -> None:
    """Run a command in a process that saves each record, and that kill -9 ends when it has written so many."""
    write, written = model.DataWriter.write, itertools.count(1)

    def write_and_die(self, *ids_and_mask) -> None:
        write(self, *ids_and_mask)
        if next(written) == record:
            self.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        model.DataWriter.write, model.time = write_and_die, hurried_time()
        cli(*args)

    child = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["text", "conversations"])
@STREAMING
def test_a_killed_run_does_not_stand_in_the_way(cli, kind, flags):
    """The same command again gives the files of a run that nobody stopped; streaming goes on where it was saved."""
    lines = [f"{i}: {line}" for i, line in enumerate(stdlib_source("argparse").splitlines()[:60])]
    write_jsonl("big.jsonl", [{"text": t} if kind == "text" else {"utterances": [t, t[::-1]]} for t in lines])
    run = ("hf_tokenize", "--hf_dataset", "big.jsonl", *BYTES, *flags, "--dataset")
    killed_at(40, cli, *run, "killed")
    assert not Path("data/killed").exists()
    again = cli(*run, "killed").ok()
    assert [p.name for p in Path("data").iterdir()] == ["killed"]
    cli(*run, "whole").ok()
    parts, whole = ({p.name: p.read_bytes() for p in Path("data", n).iterdir()} for n in ("killed", "whole"))
    assert parts == whole and opened("whole").is_chat == (kind == "conversations")
    resumed = re.search(r"resuming after ([\d,]+) tokens", again.out)
    assert bool(resumed) == bool(flags)
    if resumed:  # all but the last record was saved, with the end-of-text tokens between texts
        data = opened("whole")
        ends = data.splits["train"].starts if data.is_chat else np.flatnonzero(all_tokens(data) == 256)
        assert int(resumed[1].replace(",", "")) == ends[39 if data.is_chat else 38]


# --- Finetuning

ANSWERS = {"red": "apples", "green": "pears", "blue": "plums", "white": "onions", "black": "olives", "brown": "nuts"}
TALKS = [
    {"utterances": [f"What is {color} and {size}?", f"The {size} {fruit}."]}
    for size in ("big", "small", "old", "new", "sweet", "sour", "round", "long", "soft", "hard")
    for color, fruit in ANSWERS.items()
] * 3
FINETUNE = (
    "--block_size", 128, "--batch_size", 4, "--dtype", "float32", "--device", "cpu", "--compile", "false",
    "--learning_rate", 3e-3,
)  # fmt: skip


@pytest.fixture
def base(cli) -> str:
    """A random model of bytes, and the conversations."""
    write_talks()
    torch.manual_seed(0)
    gpt = model.GPT(tiny_config("llama", vocab_size=259, block_size=128, n_embd=64))
    return save_model("base.pt", gpt, variant="tiny")


def write_talks() -> None:
    """Mixed, so that the last tenth is a fair sample."""
    random.Random(0).shuffle(talks := list(TALKS))
    write_jsonl("talks.jsonl", talks)


def finetune(cli, *flags, data: str = "talks.jsonl", start: str = "base.pt", iters: int = 1, command: str = "finetune"):
    source = {"finetune": "--data", "hf_finetune": "--hf_dataset"}[command]
    return cli(command, "--model_checkpoint", start, source, data, *FINETUNE, "--finetune_iters", iters, *flags)


def val_losses(out: str) -> list[float]:
    return [float(x) for x in re.findall(r"val_loss ([\d.]+),", out)]


def test_finetuning_lowers_the_held_out_loss(cli, base):
    """On answers it has not seen: from some 5.5 nats (knowing nothing is ln 259) to where the form has been learned."""
    answers = ("--prompt", "What is red and big?", "--sample_length", 20, "--sample_temperature", 0)
    out = finetune(cli, *answers, "--learning_rate", 6e-3, "--eval_interval", 40, iters=120).ok().out
    losses = val_losses(out)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True) and losses[-1] < 0.7
    before, after = (out.split(f"--- {when} finetuning ---\n")[1].split("\n---")[0] for when in ("before", "after"))
    assert before.startswith("What is red and big?\n") and before != after
    assert after == "What is red and big?\nThe big apples."
    said = cli("chat", "--model_checkpoint", "finetuned_base_model.pt", "--temperature", 0, "--length", 20,
               stdin=b"What is red and big?\n")  # fmt: skip
    assert said.ok().out == "The big apples.\n" and "trained on text" not in said.err
    Path("text.txt").write_text("The apples are red and big. " * 100)
    out = finetune(cli, "--name", "text", "--eval_interval", 5, data="text.txt", iters=10).ok().out
    assert val_losses(out)[1] < val_losses(out)[0] and "longer than a block" not in out
    assert "trained on text" in cli("chat", "--model_checkpoint", "text_model.pt", stdin=b"").ok().err


def test_lora_trains_adapters_only(cli, base):
    """The last state has the base's weights bit for bit; the model to use is W + 2 B A; the two say the same."""
    out = finetune(cli, "--lora_rank", 4, "--eval_interval", 20, iters=20).ok().out
    first, last = model.load_checkpoint(Path(base)).model, checkpoint_of("finetuned_base")["model"]
    adapters = {name: tensor for name, tensor in last.items() if "lora" in name}
    torch.testing.assert_close({name: last[name] for name in first}, first, rtol=0, atol=0)
    expected = dict(first)
    for layer in [f"blocks.{i}.{name}." for i in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")]:
        a, b = (last[f"{layer}lora_{x}"] for x in "ab")
        assert a.shape[0] == b.shape[1] == 4 and b.abs().max() > 0
        expected[f"{layer}weight"] = first[f"{layer}weight"] + 2 * b @ a
    torch.testing.assert_close(checkpoint_of("finetuned_base", last=False)["model"], expected, rtol=0, atol=0)
    assert len(adapters) == 16 and last.keys() == first.keys() | adapters.keys()
    n_adapters, n_all = (sum(tensor.numel() for tensor in part.values()) for part in (adapters, first))
    assert f"training {n_adapters:,} of {n_all:,} parameters" in out and out.count(" GB") == 2

    gpt, idx = model.open_model(base).model, torch.randint(259, (2, 100))
    unadapted = gpt(idx)
    assert torch.equal(model.add_lora(gpt, 4)(idx), unadapted)  # a new adapter changes nothing
    gpt.load_state_dict(last)
    for path in ("finetuned_base_model.pt", "finetuned_base_model_last.pt"):  # which is a model to use, too
        torch.testing.assert_close(gpt.eval()(idx), model.open_model(path).model(idx), atol=1e-4, rtol=0)


@pytest.mark.parametrize("command, start, lora, by_name", [
    ("finetune", "theirs", 4, True), ("finetune", "base.pt", 0, False),
    ("hf_finetune", "base.pt", 4, True), ("hf_finetune", "base.pt", 0, False),
])  # fmt: skip
def test_a_stopped_finetune_is_resumed(cli, base, monkeypatch, command, start, lora, by_name):
    """Bit for bit the run that was never stopped; by its name alone, or by the same command."""
    if start == "theirs":
        save_theirs()
    flags = (*(("--lora_rank", lora) if lora else ()), "--eval_interval", 3, "--resid_pdrop", 0.1)
    run, parts = dict(start=start, iters=6, command=command), f"{command}d_{start.removesuffix('.pt')}"
    finetune(cli, *flags, "--name", "whole", **run).ok()
    stop_at(monkeypatch, 2)
    assert finetune(cli, *flags, **run).code == 130
    assert checkpoint_of(parts)["step"] == 2
    resume = ("--resume", "--prompt", "What is red?")
    again = cli(command, "--name", parts, *resume) if by_name else finetune(cli, *flags, *resume, **run)
    assert "--- after finetuning ---\nWhat is red?\n" in again.ok().out
    assert_same_weights("whole", parts)


@pytest.mark.parametrize("command", ["finetune", "hf_finetune"])
@pytest.mark.parametrize("resume", ["true", "auto"])
def test_a_finetune_of_the_newest_model_is_resumed(cli, base, command, resume):
    """By the same command, though the newest is then the one that it has made."""
    Path("checkpoints").mkdir(exist_ok=True)
    shutil.copy("base.pt", "checkpoints/small_model.pt")
    source = ("--data" if command == "finetune" else "--hf_dataset", "talks.jsonl")
    for step, more in (2, ()), (3, ("--resume", resume)):
        cli(command, *source, *FINETUNE, "--finetune_iters", step, *more).ok()
        assert checkpoint_of(f"{command}d_small")["step"] == step


def test_a_resumed_finetune_is_that_of_another_model(cli, base, monkeypatch):
    """Which has the same name, as models of the hub may have."""
    for owner in ("mine=1", "theirs"):
        Path(owner).mkdir()
        cli("export", "--model_path", "base.pt", "--output_dir", f"{owner}/small").ok()
    stop_at(monkeypatch, 1)
    finetune(cli, start="mine=1/small", iters=2)
    assert "--model_checkpoint differs" in finetune(cli, "--resume", "auto", start="theirs/small", iters=2).error
    finetune(cli, "--resume", "auto", start="mine=1/small", iters=2).ok()


def test_a_flag_by_two_names(cli, base):
    error = finetune(cli, "--max_iters", 3, iters=2).error
    assert "--finetune_iters" in error and "--max_iters" in error and not Path("checkpoints").exists()
    finetune(cli, "--max_iters", 2, iters=2).ok()


def test_a_run_from_the_current_folder_is_named_after_it(cli, base, monkeypatch):
    save_theirs()
    monkeypatch.chdir("theirs")
    finetune(cli, data="../talks.jsonl", start=".").ok()
    assert Path("checkpoints/finetuned_theirs_model.pt").exists()


def test_hf_finetune_makes_its_data_once_and_of_what_was_named(cli, base):
    """Other data of that name, another column and new contents are told apart; no run is replaced unasked."""
    write_jsonl("a/talks/x.jsonl", TALKS[:30])
    write_jsonl("b/talks/x.jsonl", [{"utterances": ["Really other", "words here."], "more": ["c", "d"]}] * 40)

    def trained_on(data: str, *flags) -> tuple[str, int]:
        finetune(cli, "--overwrite", *flags, data=data, command="hf_finetune").ok()
        path = Path(checkpoint_of("hf_finetuned_base")["data"]["path"])
        return text_of(model.Data(path)), (path / "data.bin").stat().st_mtime_ns

    first = trained_on("a/talks")
    assert "What is red" in first[0] and trained_on("a/talks") == first
    write_jsonl("a/talks/x.jsonl", [{"utterances": ["Something new", "today."]}] * 40)
    kept = contents("checkpoints")
    assert "--overwrite" in finetune(cli, data="a/talks", command="hf_finetune").error
    assert contents("checkpoints") == kept
    assert "Something new" in trained_on("a/talks")[0]
    assert "Really other" in trained_on("b/talks")[0]
    assert "user\nc<" in trained_on("b/talks", "--hf_text_column", "more")[0]


def test_hf_finetune_heeds_every_flag_of_its_data(cli, base):
    """Where a data folder is already there too, and as hf_tokenize heeds it."""
    write_jsonl("both.jsonl", [{**talk, "prompt": f"Is it {i}?", "completion": "Yes."} for i, talk in enumerate(TALKS)])
    for flags in ((), ("--train_on_all",), ("--chat_format", "prompt"), ("--max_tokens", 900), ("--val_fraction", 0.5)):
        finetune(cli, "--overwrite", *flags, data="both.jsonl", command="hf_finetune").ok()
        hub(cli, "both.jsonl", "--overwrite", *flags).ok()
        made = model.Data(Path(checkpoint_of("hf_finetuned_base")["data"]["path"]))
        for name, split in opened("x").splits.items():
            assert np.array_equal(made.splits[name].tokens, split.tokens), flags
            assert np.array_equal(made.splits[name].mask, split.mask), flags


def test_hf_finetune_replaces_no_data(cli, base, monkeypatch):
    """Another data set of the same name leaves a run that was stopped its own; another tokenizer of one name has its
    own: two vocabularies of 300 tokens are both called bpe-300."""
    for name, n in (("a", 40), ("b", 50)):
        write_jsonl(f"{name}/talks.jsonl", [{"utterances": [f"What is {name}{i}?", "That."]} for i in range(n)])
    stop_at(monkeypatch, 1)
    assert finetune(cli, "--name", "a", data="a/talks.jsonl", command="hf_finetune", iters=2).code == 130
    finetune(cli, "--name", "b", data="b/talks.jsonl", command="hf_finetune").ok()
    cli("hf_finetune", "--name", "a", "--resume").ok()
    for name, module in (("c", "argparse"), ("d", "tarfile")):
        save_random(f"{name}.pt", model.train_bpe([stdlib_source(module)], 300))
        finetune(cli, "--name", name, start=f"{name}.pt", command="hf_finetune").ok()


def test_a_file_rendered_by_another_template_is_other_data(workdir):
    write_talks()
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    first, second = (foreign(text) for text in (template, "Now: " + template))
    made = model.data_of_file(Path("talks.jsonl"), first, 0)
    assert model.data_of_file(Path("talks.jsonl"), first, 0).path == made.path
    with pytest.raises(model.UserError, match="remove the folder, or give the file another name"):
        model.data_of_file(Path("talks.jsonl"), second, 0)


def test_finetuning_with_another_tokenizers_data(cli, base):
    cli("tokenize", "--dataset", "other", "--txt", "talks.jsonl", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    finetune(cli, data="other").fails_with("bpe-300", "byte", "base.pt")
    cli("tokenize", "--dataset", "same", "--txt", "talks.jsonl", "--tokenizer", base).ok()
    finetune(cli, data="same").ok()


def test_conversations_longer_than_a_block_are_counted(cli, base):
    long = {"utterances": ["Why?", "Because " + "so " * 100]}
    write_jsonl("long.jsonl", [*TALKS[:40], long, long, *TALKS[:5]])
    out = finetune(cli, data="long.jsonl").ok().out
    assert "2 of 47 conversations are longer than a block of 128 and will be cut: this is the model's context" in out
    out = finetune(cli, "--block_size", 64, "--overwrite", data="long.jsonl").ok().out
    assert "longer than a block of 64 and will be cut: raise --block_size" in out and "4 x 64 tokens" in out
    refused = finetune(cli, "--block_size", 129, "--overwrite", "--prompt", "Why?", data="long.jsonl")
    refused.fails_with("129", "128", "lower --block_size")
    assert "raise --block_size" not in refused.out and "before finetuning" not in refused.out


def test_eval_of_conversations_is_trainings(cli, base):
    """Truth: the loss that finetuning reported of the model it kept. A file is measured whole, as a text is."""
    out = finetune(cli, "--eval_tokens", 10**9, "--name", "a run", iters=3).ok().out
    assert "try: python model.py chat --model_checkpoint 'a run_model.pt'" in out
    line = ("eval", "--model_checkpoint", "a run", "--block_size", 128, "--json", "--data", "talks_byte")
    (row,) = json.loads(cli(*line).ok().out.splitlines()[-1])
    assert row["loss"] == pytest.approx(val_losses(out)[-1], abs=1e-4)
    there = sorted(Path("data").iterdir())
    (row,) = json.loads(cli(*line[:-1], "talks.jsonl").ok().out)
    encoded = [model.encode_conversation(model.byte_tokenizer(), model.messages_of(talk), False) for talk in TALKS]
    assert row["tokens"] == sum(int(mask.sum()) for _, mask in encoded) and row["data"] == "talks.jsonl"
    assert sorted(Path("data").iterdir()) == there
    assert "--stride is for text" in cli(*line, "--stride", 64).error
    Path("text.txt").write_text("some words " * 50)
    rows = json.loads(cli(*line, "--data", "text.txt").ok().out.splitlines()[-1])  # both, not the last alone
    assert [Path(r["data"]).name for r in rows] == ["talks_byte", "text.txt"]


@pytest.mark.parametrize("short", [0, 200], ids=["in no block", "in none of the evaluation's"])
def test_blocks_without_a_target_are_an_error(cli, base, short):
    """And not a loss of 0; it is told before the first step."""
    write_jsonl("long.jsonl", [*TALKS[:short], *[{"utterances": ["Why? " * 60, "So."]}] * 60])
    hub(cli, "long.jsonl", "--streaming", name="long").ok()  # in their order: the short ones are trained on
    done = finetune(cli, data="long", iters=2)
    assert "no target" in done.error and "--block_size" in done.error and "steps of" not in done.out


def save_theirs(steps: int = 0, tie: bool = True) -> None:
    """The conversations, and a Hugging Face directory without chat tokens that has seen their words for some steps."""
    tokenizer = foreign(None, "<|endoftext|>", chat_tokens=False)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=tokenizer.n_vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=tie,
    ))  # fmt: skip
    optimizer = torch.optim.AdamW(theirs.parameters(), 1e-2)
    ids = torch.tensor(tokenizer.encode("\n".join("\n".join(t["utterances"]) for t in TALKS)))  # as turns begin
    for _ in range(steps):
        idx = torch.stack([ids[i : i + 64] for i in torch.randint(len(ids) - 64, (8,))])
        theirs(input_ids=idx, labels=idx).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs.save_pretrained("theirs")
    write_talks()


def test_a_base_model_of_someone_elses(cli):
    """Chat tokens are added, learned, and exported with the rest."""
    save_theirs()
    cli("chat", "--model_checkpoint", "theirs", stdin=b"hello\n").fails_with("no chat", "finetune")
    Path("text.txt").write_text("some words " * 500)
    cli("tokenize", "--dataset", "old", "--txt", "text.txt", "--tokenizer", "theirs").ok()
    assert "give --data the file itself" in finetune(cli, data="old", start="theirs").error
    losses = val_losses(finetune(cli, "--eval_interval", 10, start="theirs", iters=20).ok().out)
    assert losses[1] < losses[0]
    cli("export", "--model_path", "finetuned_theirs_model.pt", "--output_dir", "out").ok()
    again = transformers.AutoTokenizer.from_pretrained("out")
    assert again.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [600, 601]
    assert transformers.AutoModelForCausalLM.from_pretrained("out").config.vocab_size == 602
    tokenizer, messages = model.open_model("finetuned_theirs_model.pt").tokenizer, turns("What is red?", "The apples.")
    ids = again.apply_chat_template(messages, return_dict=False)
    assert ids == model.encode_conversation(tokenizer, messages, False)[0].tolist()
    cli("chat", "--model_checkpoint", "out", "--length", 5, stdin=b"What is red and big?\n").ok()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_lora_trains_the_rows_of_the_chat_tokens_it_adds(cli, monkeypatch, tie):
    """And no others."""
    save_theirs(tie=tie)
    start: dict[str, torch.Tensor] = {}

    def rows(model: model.GPT) -> dict[str, torch.Tensor]:
        return {k: v.clone() for k, v in model.state_dict().items() if k in ("wte.weight", "lm_head.weight")}

    at_each_step(monkeypatch, before=lambda step, model, **_: start or start.update(rows(model)))
    finetune(cli, "--lora_rank", 4, start="theirs", iters=5).ok()
    end = rows(model.open_model("finetuned_theirs_model.pt").model)
    assert len(end) == 2 - tie
    for name, table in end.items():
        assert torch.equal(table[:600], start[name][:600]) and torch.equal(table[602:], start[name][602:])
        assert ((table - start[name])[600:602].abs().amax(dim=1) > 1e-3).all() and (table[600] != table[601]).all()


def test_an_answer_of_a_lora_finetuned_base_ends_by_itself(cli):
    save_theirs(steps=100)
    finetune(cli, "--lora_rank", 16, "--learning_rate", 1e-2, "--eval_interval", 100, start="theirs", iters=100).ok()
    made = model.open_model("finetuned_theirs_model.pt")
    for color in ANSWERS:
        question = model.render_chat(made.tokenizer, turns(f"What is {color} and big?"), add_generation_prompt=True)
        prompt = made.tokenizer.encode_rendered(question)
        answer = [int(t) for t in model.generate(made.model, [prompt], 60, GREEDY)]
        assert 601 in answer[5:30] and answer.index(601) >= 5, made.tokenizer.decode(answer)


# --- Chat


@pytest.fixture
def chatty(cli, bpe) -> model.GPT:
    return save_random("chatty.pt", bpe, n_embd=32, block_size=512)


def fresh_answer(gpt, tokenizer, messages: list[dict], settings: model.SamplingSettings = GREEDY) -> str:
    """The whole conversation read again, by a full pass for every token."""
    ids = tokenizer.encode_rendered(model.render_chat(tokenizer, messages, add_generation_prompt=True))
    new: list[int] = []
    while len(new) < 12:
        with torch.no_grad():
            idx = torch.tensor([ids + new])
            new.append(int(model.next_token_probs(gpt(idx)[:, -1], settings, idx).argmax()))
        if new[-1] in (tokenizer.special[model.EOT], tokenizer.special[model.IM_END]):
            return tokenizer.decode(new[:-1])
    return tokenizer.decode(new)


@pytest.mark.parametrize("settings", [GREEDY, model.SamplingSettings(temperature=0, repetition_penalty=1.3)],
                         ids=["greedy", "repetition penalty"])  # fmt: skip
def test_the_cache_changes_no_answer(chatty, bpe, monkeypatch, settings):
    """Turn after turn, the answer is that of reading everything again, in pieces; and only what is new is read."""
    session, hidden, messages = model.ChatSession(chatty, bpe, settings, 12), Mock(wraps=chatty.hidden), []
    monkeypatch.setattr(chatty, "hidden", hidden)
    for text in ("Hello", "And you?", "  12 + 7\n", "", "Hello"):
        messages.append({"role": "user", "content": text})
        expected, pieces = fresh_answer(chatty, bpe, messages, settings), []
        hidden.reset_mock()
        assert session.answer(text, pieces.append) == "".join(pieces) == expected
        assert len(list(filter(None, pieces))) > 3
        new = model.render_chat(bpe, messages[-2:], add_generation_prompt=True)  # the last answer, which was text since
        first, *rest = [call.args[0].shape[1] for call in hidden.call_args_list]
        assert first <= len(bpe.encode_rendered(new)) and set(rest) <= {1}
        messages.append({"role": "assistant", "content": expected})
    assert session.messages == messages


def test_the_oldest_turns_make_room(chatty, bpe):
    """A conversation of any length goes on; its system turn stays, and what the model no longer sees was still said."""
    session = model.ChatSession(chatty, bpe, GREEDY, 30)
    session.messages = [{"role": "system", "content": "Be kind."}]
    questions = [f"Question number {i} of this long conversation?" for i in range(15)]
    for question in questions:
        session.answer(question, lambda piece: None)
        assert session.cache.length <= 512
    seen = bpe.decode(session.cached)
    assert seen.startswith("<|im_start|>system\nBe kind.") and questions[-1] in seen and questions[0] not in seen
    assert [m["content"] for m in session.messages if m["role"] != "assistant"] == ["Be kind.", *questions]


def chat(cli, *lines: str, flags: tuple = ()):
    stdin = "".join(line + "\n" for line in lines).encode()
    return cli("chat", "--model_checkpoint", "chatty.pt", "--temperature", 0, "--length", 12, *flags, stdin=stdin)


def saved(path: str) -> list[list[dict]]:
    return [record["messages"] for record in read_jsonl(path)]


def test_chat_in_the_terminal(cli, chatty, bpe):
    """/system, /reset and /save, from standard input; a saved conversation is one that `finetune` reads."""
    said = chat(cli, "Hello", "And you?", "/save one.jsonl", "/system Be kind.", "Hello", "/save one.jsonl", "/reset",
                "Hello", "/save two.jsonl", "/help", "/quit", "never read").ok()  # fmt: skip
    first, second = saved("one.jsonl")
    assert [m["content"] for m in first[::2]] == ["Hello", "And you?"]
    assert [m["role"] for m in second] == ["system", "user", "assistant"] and second[0]["content"] == "Be kind."
    assert saved("two.jsonl") == [second]  # reset keeps the system turn, and greedy says the same again
    for messages in (first[:2], first, second):
        assert messages[-1]["content"] == fresh_answer(chatty, bpe, messages[:-1])
        assert messages[-1]["content"] in said.out
    assert "/reset, /system TEXT, /save FILE" in said.out and "never read" not in said.out
    cli("tokenize", "--dataset", "x", "--txt", "one.jsonl", *BYTES).ok()
    chat(cli, "quit", "/save never.jsonl").ok()
    assert not Path("never.jsonl").exists()
    flagged = chat(cli, "Hello", flags=("--system", "Be kind.")).ok()
    assert flagged.out.startswith(second[-1]["content"])


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_long_line_typed_into_a_terminal(workdir):
    """The terminal by itself cuts it at 4,095 bytes, and has arrow keys write what they send."""
    import pty

    owner, terminal = pty.openpty()
    save_random("m.pt", model.byte_tokenizer(), block_size=8192)
    words = model_py("chat", "--model_checkpoint", "m.pt", "--length", 4, "--device", "cpu")
    left, typed = b"\x1b[D", b"word " * 1000 + b"ED"
    with subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal) as run:
        os.close(terminal)
        screen = b""
        while b"> " not in screen:
            screen += os.read(owner, 65536)
        lines = typed + left + b"N\n/save long.jsonl\n/quit\n"
        threading.Thread(target=os.write, args=(owner, lines), daemon=True).start()
        with contextlib.suppress(OSError):  # it has ended
            while os.read(owner, 65536):
                pass
        assert run.wait(60) == 0
    os.close(owner)
    assert saved("long.jsonl")[0][0]["content"] == "word " * 1000 + "END"


def test_chat_goes_on_after_a_mistake(cli, chatty):
    """It says so, and forgets the message that is too long and not the conversation."""
    done = chat(cli, "Hello", "word " * 2000, "/save no/such/folder/x.jsonl", "/save kept.jsonl", "And you?").ok()
    assert "512" in done.out + done.err and "no/such/folder" in done.out + done.err and "Traceback" not in done.err
    (kept,) = saved("kept.jsonl")
    assert [m["content"] for m in kept if m["role"] == "user"] == ["Hello"]


@pytest.mark.parametrize("command", [("tokenize", "--txt"), ("hf_tokenize", "--hf_dataset")], ids=lambda c: c[0])
def test_a_line_that_is_not_json_is_told(cli, command):
    """With what is wrong in it, and not only that something is."""
    line = json.dumps({"utterances": ["Hello", "Hello to you"]})
    Path("talks.jsonl").write_text(f"{line}\n" * 40 + line.replace(",", " ") + f"\n{line}\n")
    cli(*command, "talks.jsonl", "--dataset", "x", *BYTES).fails_with("talks.jsonl", "Missing a comma", "in row 40")


def test_the_renderer_of_templates_outlives_ctrl_c():
    """A terminal sends it to all processes of its session, of which the renderer is none."""
    assert os.getsid(model.renderer(os.getpid()).pid) != os.getsid(0)


def test_ctrl_c_stops_the_answer_and_not_the_program(chatty, bpe):
    """What was said stays in the conversation and in the cache: the next answer is right."""
    session, shown = model.ChatSession(chatty, bpe, GREEDY, 12), Mock(side_effect=[None] * 3 + [KeyboardInterrupt])
    assert session.answer("Hello", shown) == "".join(call.args[0] for call in shown.call_args_list) != ""
    messages = [*session.messages, {"role": "user", "content": "And you?"}]
    assert session.answer("And you?", lambda piece: None) == fresh_answer(chatty, bpe, messages)


@pytest.mark.parametrize("terminal", [True, False])
def test_ctrl_c_just_after_an_answer(chatty, monkeypatch, capsys, terminal):
    """It does not cost the conversation; what comes from a pipe it ends."""

    class Typed(io.StringIO):
        def isatty(self) -> bool:
            return terminal

        def readline(self, *args) -> str:
            if (line := super().readline(*args)) == "^C\n":
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(sys, "stdin", Typed("Hello\n^C\nAnd you?\n/save kept.jsonl\n/quit\nnever read\n"))
    monkeypatch.setattr(sys, "argv", ["model.py", "chat", "--model_checkpoint", "chatty.pt", "--length", "12"])
    model.main()
    assert ("/quit or Ctrl-D ends the chat" in capsys.readouterr().out) == terminal == Path("kept.jsonl").exists()
    if terminal:
        assert [m["content"] for m in saved("kept.jsonl")[0][::2]] == ["Hello", "And you?"]
