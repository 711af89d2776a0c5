"""Conversations: from the forms people have to tokens, targets, finetuning and a chat in the terminal."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, program, random_gpt, stdlib_source, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, pre_tokenizers, trainers

import model

BYTES = ("--tokenizer", "byte")


def turns(*contents: str, system: str | None = None) -> list[dict]:
    """user, assistant, user, ..."""
    first = [{"role": "system", "content": system}] if system is not None else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def write_jsonl(path: str | Path, records: list[dict]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read(name: str) -> tuple[str, str]:
    """The text of a data folder, and what of it is a target: `_` stands for every other token."""
    data = model.Data(Path("data") / name)
    text = data.tokenizer.decode(data.tokens.tolist())
    if data.mask is None:
        return text, text
    shown = [data.tokenizer.decode([t]) if m else "_" for t, m in zip(data.tokens.tolist(), data.mask, strict=True)]
    return text, "".join(shown)


def tokenized(cli, *records: dict, flags: tuple = ()) -> tuple[str, str]:
    write_jsonl("records.jsonl", list(records))
    cli("tokenize", "--dataset", "made", "--txt", "records.jsonl", *BYTES, "--overwrite", *flags).ok()
    return read("made")


# ---------------------------------------------------------------------------------------------------------------------
# Rendering and the mask
# ---------------------------------------------------------------------------------------------------------------------

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


FORMS = {
    "messages": {"messages": MESSAGES[1:]},
    "sharegpt": {"conversations": [
        {"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4\n\nfour"},
    ]},
    "sharegpt, other names": {"conversations": [
        {"from": "user", "value": "Hi!"}, {"from": "assistant", "value": "Hello."},
        {"from": "human", "value": "2 + 2?"}, {"from": "chatgpt", "value": "4\n\nfour"},
    ]},
    "utterances": {"utterances": ["Hi!", "Hello.", "2 + 2?", "4\n\nfour"], "emotions": [0, 1, 2, 3]},
}  # fmt: skip
SHORT_FORMS = {
    "messages with a system turn": (
        {"messages": turns("Hi!", "Hello.", system="Be kind.")}, turns("Hi!", "Hello.", system="Be kind.")
    ),
    "sharegpt with a system turn": (
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi!"},
                           {"from": "gpt", "value": "Hello."}]},
        turns("Hi!", "Hello.", system="Be kind."),
    ),
    "alpaca": ({"instruction": "Add.", "input": "2 and 2", "output": "4"}, turns("Add.\n\n2 and 2", "4")),
    "alpaca, no input": ({"instruction": "Add.", "input": "", "output": "4"}, turns("Add.", "4")),
    "alpaca, input left out": ({"instruction": "Add.", "output": "4", "text": "x"}, turns("Add.", "4")),
    "prompt and completion": ({"prompt": "Hi!", "completion": "Hello."}, turns("Hi!", "Hello.")),
    "prompt and response": ({"prompt": "Hi!", "response": "Hello.", "score": 3}, turns("Hi!", "Hello.")),
}  # fmt: skip
ALL_FORMS = {name: (record, MESSAGES[1:]) for name, record in FORMS.items()} | SHORT_FORMS


@pytest.mark.parametrize("record, messages", ALL_FORMS.values(), ids=ALL_FORMS)
def test_every_form_of_conversation(cli, record, messages):
    """Recognised by its columns, and the same conversation as in the plainest form."""
    expected = tokenized(cli, {"messages": messages})
    assert tokenized(cli, record) == expected
    assert model.messages_of(record) == messages


@pytest.mark.parametrize("chat_format, wanted", [
    ("messages", turns("a", "b")), ("sharegpt", turns("c", "d")), ("utterances", turns("e", "f")),
    ("alpaca", turns("g\n\nh", "i")), ("prompt", turns("j", "k")), (None, turns("a", "b")),
])  # fmt: skip
def test_chat_format_says_which_columns_count(cli, chat_format, wanted):
    record = {
        "messages": turns("a", "b"), "utterances": ["e", "f"], "instruction": "g", "input": "h", "output": "i",
        "conversations": [{"from": "human", "value": "c"}, {"from": "gpt", "value": "d"}],
        "prompt": "j", "completion": "k", "text": "l",
    }  # fmt: skip
    flags = () if chat_format is None else ("--chat_format", chat_format)
    expected = tokenized(cli, {"messages": wanted})
    assert tokenized(cli, record, flags=flags) == expected
    run = ("hf_tokenize", "--hf_dataset", "records.jsonl", *BYTES, *flags)
    cli(*run, "--dataset", "hub").ok()
    assert read("hub") == expected
    if chat_format is not None:
        write_jsonl("records.jsonl", [{"text": "no conversation"}])
        assert chat_format in cli(*run, "--dataset", "none").error


@pytest.mark.parametrize("column, record", [("utterances", FORMS["utterances"]), ("messages", FORMS["messages"]),
                                            ("conversations", FORMS["sharegpt"])])  # fmt: skip
def test_a_column_of_turns_by_any_name(cli, column, record):
    """--hf_text_column may name turns, whatever the column is called."""
    expected = tokenized(cli, {"messages": MESSAGES[1:]})
    write_jsonl("named.jsonl", [{"talk": record[column], "messages": "not these"}])
    cli("hf_tokenize", "--hf_dataset", "named.jsonl", "--hf_text_column", "talk", "--dataset", "x", *BYTES).ok()
    assert read("x") == expected


WRONG = {
    "assistant first": ({"messages": turns("a", "b")[1:]}, "turn 1 is 'assistant'"),
    "user twice": ({"messages": [*turns("a", "b"), *turns("c", "d")[::-1]]}, "turn 3 is 'assistant'"),
    "assistant twice": ({"messages": [*turns("a", "b"), *turns("c", "d")[1:]]}, "turn 3 is 'assistant'"),
    "late system turn": ({"messages": [*turns("a", "b"), {"role": "system", "content": "c"}]}, "turn 3 is 'system'"),
    "two system turns": ({"messages": [{"role": "system", "content": "c"}] * 2}, "turn 2 is 'system'"),
    "unknown role": ({"messages": [{"role": "narrator", "content": "c"}]}, "'narrator'"),
    "no role": ({"messages": [{"content": "c"}]}, "None"),
    "sharegpt roles": ({"conversations": [{"from": "gpt", "value": "a"}]}, "turn 1 is 'assistant'"),
    "content of a number": ({"messages": [{"role": "user", "content": 3}]}, "int"),
    "content missing": ({"messages": [{"role": "user"}]}, "not text"),
    "content in parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}, "not text"),
    "utterance of a number": ({"utterances": [1, 2]}, "int"),
    "answer missing": ({"prompt": "a", "completion": None}, "not text"),
    "question missing": ({"instruction": None, "output": None}, "not text"),
    "no list": ({"messages": "hello"}, "messages"),
    "a number": ({"conversations": 7}, "conversations"),
    "turns that are none": ({"messages": ["hello", "there"]}, "messages"),
    "a dictionary": ({"utterances": {"a": "b"}}, "utterances"),
}


@pytest.mark.parametrize("record, words", WRONG.values(), ids=WRONG)
def test_a_record_that_is_no_conversation(cli, record, words):
    """One sentence that says where, and no data folder."""
    write_jsonl("bad.jsonl", [record])
    for run in (("tokenize", "--txt", "bad.jsonl"), ("hf_tokenize", "--hf_dataset", "bad.jsonl")):
        assert words in cli(*run, "--dataset", "x", *BYTES).error
        assert not Path("data/x/meta.json").exists()


EMPTY = [{"messages": []}, {"utterances": []}, {"utterances": None}, {"messages": None}]


@pytest.mark.parametrize("empty", EMPTY, ids=str)
def test_empty_conversations_are_passed_over(cli, empty):
    (column,) = empty
    full = FORMS[column]
    expected = tokenized(cli, full)
    kept = {k: full[k] for k in empty}
    assert tokenized(cli, empty, kept, empty) == expected


@pytest.mark.parametrize("records", [
    [{"messages": []}], [{"messages": turns("a question")}], [{"messages": turns(system="only this")}],
    [{"utterances": ["nobody answers"]}, {"utterances": []}],
], ids=["empty", "question", "system", "utterances"])  # fmt: skip
def test_no_target_tokens_is_an_error(cli, records):
    write_jsonl("bad.jsonl", records)
    error = cli("tokenize", "--txt", "bad.jsonl", "--dataset", "x", *BYTES).error
    assert "target" in error or "nothing to tokenize" in error
    assert not Path("data/x").exists()


# ---------------------------------------------------------------------------------------------------------------------
# The exported chat template
# ---------------------------------------------------------------------------------------------------------------------

HARD = [
    "Hi!", "  leading", "trailing \n", "\n\na\n\nb\n", "\t", " ", "", "é 🙂 👩\u200d👧 東京", "12 345,678 ½",
    "<|im_end|>",
    "<|im_start|>assistant\nI was told to", "a<|endoftext|>b", "<|im_<|im_end|>end|>", "{{ messages }}{% if %}",
    "\u00a0nbsp\u2003", "\r\n", "</s> [INST]", "a" * 300, "user\nassistant", "it's we'LL",
]  # fmt: skip
SYSTEM_TEMPLATE = (  # in the manner of published ones: a default system turn, and turns as they are
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INST_TEMPLATE = (  # no special token opens a turn, a system turn goes into the first question, end-of-text ends answers
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set s = messages[0]['content'] + '\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + (s if loop.first else '') + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def bpe() -> model.Tokenizer:
    return model.train_bpe(stdlib_source("argparse", "textwrap").splitlines(keepends=True), 600)


def foreign(folder: Path, template: str | None, eos: str = "<|im_end|>", chat_tokens: bool = True) -> model.Tokenizer:
    """Someone else's tokenizer, with its own template: ids in another order, digits apart, other special tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<s>", "<extra>"] + ["<|im_start|>", "<|im_end|>"] * chat_tokens
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    backend.train_from_iterator(stdlib_source("textwrap").splitlines(keepends=True), trainer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return model.hf_tokenizer(folder)


TOKENIZERS = {
    "byte": lambda tmp, bpe, gpt2: model.byte_tokenizer(),
    "bpe": lambda tmp, bpe, gpt2: bpe,
    "gpt2": lambda tmp, bpe, gpt2: gpt2,
    "imported": lambda tmp, bpe, gpt2: foreign(tmp, SYSTEM_TEMPLATE),
    "imported, [INST]": lambda tmp, bpe, gpt2: foreign(tmp, INST_TEMPLATE, "<|endoftext|>", chat_tokens=False),
}


@pytest.fixture(params=TOKENIZERS.values(), ids=TOKENIZERS)
def tokenizer(request, tmp_path_factory, bpe, gpt2) -> model.Tokenizer:
    return request.param(tmp_path_factory.mktemp("tokenizer"), bpe, gpt2)


def save_model(path: str, tokenizer: model.Tokenizer, **overrides) -> model.GPT:
    """A random model of a tokenizer as a checkpoint."""
    config = tiny_config("llama", **{"vocab_size": tokenizer.n_vocab, "block_size": 256, "n_embd": 16, **overrides})
    gpt = random_gpt(config)
    state = {"config": asdict(config), "model": gpt.state_dict(), "tokenizer": tokenizer.spec, "variant": "tiny"}
    model.save_checkpoint(Path(path), state)
    return gpt


def without(names: list[str], text: str) -> str:
    """Text in which none of the names is left, however they are nested."""
    while any(name in text for name in names):
        for name in names:
            text = text.replace(name, "")
    return text


def test_the_exported_template_gives_the_ids_of_training(cli, tokenizer):
    """apply_chat_template of the export = data.bin, conversation by conversation: white space, line breaks, emoji,
    digits; and what spells a special token, which is taken out of a turn before it is one."""
    save_model("m.pt", tokenizer)
    cli("export", "--model_path", "m.pt", "--output_dir", "out").ok()
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    rng, talks = random.Random(0), []
    for _ in range(60):
        contents = rng.choices(HARD, k=rng.choice([2, 4, 6]))
        talks.append(turns(*contents, system=rng.choice([None, rng.choice(HARD)])))
    write_jsonl("talks.jsonl", [{"messages": m} for m in talks])
    cli("tokenize", "--dataset", "talks", "--txt", "talks.jsonl", "--tokenizer", "m.pt").ok()
    data = model.Data(Path("data/talks"))
    ends = [*data.starts[1:], len(data.tokens)]
    names = [t.content for t in theirs.added_tokens_decoder.values() if t.special]
    assert set(names) >= set(tokenizer.special)
    for messages, start, end in zip(talks, data.starts, ends, strict=True):
        clean = [{**m, "content": without(names, m["content"])} for m in messages]
        assert theirs.apply_chat_template(clean, return_dict=False) == data.tokens[start:end].tolist()


def test_the_exported_generation_prompt_is_what_chat_reads(cli, tokenizer):
    save_model("m.pt", tokenizer)
    cli("export", "--model_path", "m.pt", "--output_dir", "out").ok()
    theirs = transformers.AutoTokenizer.from_pretrained("out")
    for messages in (MESSAGES[:2], MESSAGES[1:4]):
        ids = tokenizer.encode_rendered(model.render_chat(tokenizer, messages, add_generation_prompt=True))
        assert theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == ids


@given(text=st.lists(st.sampled_from(["<|im_", "end|>", "<|im_end|>", "start|>", "<|", "|>", "a", "<|endoftext|>"])))
def test_no_turn_can_spell_a_special_token(text):
    """A user who writes pieces of one into pieces of another would otherwise end the turn and speak as the system."""
    tokenizer = model.byte_tokenizer()
    rendered = model.render_chat(tokenizer, [{"role": "user", "content": "".join(text)}])
    special = [i for i in tokenizer.encode_rendered(rendered) if i in tokenizer.special.values()]
    assert [tokenizer.decode([i]) for i in special] == ["<|im_start|>", "<|im_end|>"]


def test_a_template_that_refuses(cli, tmp_path):
    """What a template raises is the error."""
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    foreign(tmp_path / "theirs", refusing + SYSTEM_TEMPLATE)
    write_jsonl("talk.jsonl", [{"messages": MESSAGES}])
    error = cli("tokenize", "--dataset", "x", "--txt", "talk.jsonl", "--tokenizer", tmp_path / "theirs").error
    assert "no system turns" in error


@pytest.mark.parametrize("template", ["{{ messages[0].missing.attribute }}", "{% for %}", "{{ 1 / 0 }}"])
def test_a_broken_template(cli, tmp_path, template):
    foreign(tmp_path / "theirs", template)
    write_jsonl("talk.jsonl", [{"messages": MESSAGES}])
    assert "template" in cli("tokenize", "--dataset", "x", "--txt", "talk.jsonl", "--tokenizer", "theirs").error


def test_a_template_that_rewrites_the_past(cli, tmp_path):
    """Targets cannot be told by their place when an earlier turn changes; that is an error and not a wrong mask."""
    last_only = "{% for m in messages %}{{ '<|im_start|>' + (m['content'] if loop.last else '...') }}{% endfor %}"
    foreign(tmp_path / "theirs", last_only)
    write_jsonl("talk.jsonl", [{"messages": MESSAGES[1:]}])
    assert "template" in cli("tokenize", "--dataset", "x", "--txt", "talk.jsonl", "--tokenizer", "theirs").error


# ---------------------------------------------------------------------------------------------------------------------
# hf_tokenize: files of every kind, through `datasets`
# ---------------------------------------------------------------------------------------------------------------------

DOCUMENTS = ["First document.", "Second: 2 lines\nof text", "", "éß🙂 <|endoftext|>", "last one "]
JOINED = "<|endoftext|>".join(filter(None, DOCUMENTS))


def write_documents(kind: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    columns = {"text": DOCUMENTS, "id": list(range(5))}
    table = datasets.Dataset.from_dict(columns)
    if kind == "arrow folder":
        return table.save_to_disk(folder)
    path = str(folder / f"part.{kind}")
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "arrow":
        with datasets.arrow_writer.ArrowWriter(path=path) as writer:
            writer.write_table(table.data.table)
            writer.finalize()
    elif kind == "jsonl":
        write_jsonl(path, [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])
    else:
        Path(path).write_text(json.dumps([{"text": t} for t in DOCUMENTS]))


@pytest.mark.parametrize("flags", [(), ("--streaming",), ("--num_proc", 2)], ids=["plain", "streaming", "2 processes"])
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json", "csv", "arrow", "arrow folder"])
def test_text_in_every_kind_of_file(cli, kind, flags):
    """Documents are parted by end-of-text; a folder and a file in it are the same; empty documents leave no trace."""
    if flags == ("--num_proc", 2) and kind != "jsonl":
        return  # starting processes takes seconds, and they see no files
    write_documents(kind, Path("local"))
    for i, source in enumerate(["local"] if kind == "arrow folder" else ["local", *Path("local").iterdir()]):
        cli("hf_tokenize", "--hf_dataset", source, "--dataset", f"x{i}", *BYTES, "--val_fraction", 0, *flags).ok()
        data = model.Data(Path(f"data/x{i}"))
        assert read(f"x{i}")[0] == JOINED and data.mask is None
        assert (data.tokens == 256).sum() == 3  # the one that a document spells is text


@pytest.mark.parametrize("flags", [(), ("--streaming",)], ids=["plain", "streaming"])
def test_text_files(cli, flags):
    """A file is a document, with its line breaks."""
    Path("local").mkdir()
    for i, text in enumerate(["One file.\n\nTwo paragraphs.\n", "Another\n"]):
        Path(f"local/{i}.txt").write_text(text)
    cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES, *flags).ok()
    assert read("x")[0] == "One file.\n\nTwo paragraphs.\n<|endoftext|>Another\n"


def test_splits(cli):
    """As the hub lays them out."""
    for split in ("train", "validation"):
        write_jsonl(f"local/{split}.jsonl", [{"text": f"this is {split}"}])
    for split in ("train", "validation"):
        cli("hf_tokenize", "--hf_dataset", "local", "--hf_split", split, "--dataset", split, *BYTES).ok()
        assert read(split)[0] == f"this is {split}"
    error = cli("hf_tokenize", "--hf_dataset", "local", "--hf_split", "test", "--dataset", "x", *BYTES).error
    assert "test" in error and "validation" in error


def test_max_tokens(cli):
    write_jsonl("many.jsonl", [{"text": "ten letter"} for _ in range(3000)])
    for flags in ((), ("--streaming",)):
        run = ("hf_tokenize", "--hf_dataset", "many.jsonl", "--dataset", "x", *BYTES, "--overwrite", *flags)
        cli(*run, "--max_tokens", 500).ok()
        assert 500 <= len(model.Data(Path("data/x")).tokens) < 511


@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe"])
def test_other_tokenizers(cli, tokenizer, gpt2):
    """A bpe is learned from the records themselves, text or conversations."""
    write_jsonl("local/a.jsonl", [{"text": line} for line in stdlib_source("textwrap").splitlines()])
    flags = ("--tokenizer", tokenizer, "--vocab_size", 400)
    cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *flags).ok()
    lines = [line for line in stdlib_source("textwrap").splitlines() if line]
    assert read("x")[0] == "<|endoftext|>".join(lines)
    assert model.Data(Path("data/x")).tokenizer.n_vocab == {"gpt2": 50259, "bpe": 400}[tokenizer]
    talks = [{"utterances": [f"What is {i}?", f"It is {i}."]} for i in range(50)]
    write_jsonl("talks/a.jsonl", talks)
    cli("hf_tokenize", "--hf_dataset", "talks", "--dataset", "y", *flags).ok()
    data = model.Data(Path("data/y"))
    learned = data.tokenizer.decode(data.tokens[data.mask == 1].tolist())
    assert learned == "".join(f"It is {i}.<|im_end|>" for i in range(50))


def test_a_missing_column_lists_those_there_are(cli):
    write_jsonl("local/a.jsonl", [{"body": "a", "title": "b"}])
    for flags in ((), ("--hf_text_column", "text"), ("--hf_text_column", "text", "--streaming")):
        error = cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES, *flags).error
        assert "'text'" in error and "body, title" in error
        assert not Path("data/x").exists()
    cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES, "--hf_text_column", "body").ok()


@pytest.mark.parametrize("value, kind", [(3, "int"), (2.5, "float"), ({"a": 1}, "dict"), ([1], "list"), (True, "bool")])
def test_a_column_of_another_type(cli, value, kind):
    write_jsonl("local/a.jsonl", [{"text": value}])
    error = cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES).error
    assert "'text'" in error and kind in error and not Path("data/x").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b"])
def test_a_data_set_is_a_plain_name(cli, name):
    write_jsonl("local/a.jsonl", [{"text": "abc"}])
    assert "--dataset" in cli("hf_tokenize", "--hf_dataset", "local", "--dataset", name, *BYTES).error


@pytest.mark.parametrize("content", [b"{", b'{"text": "a"}\n{"text"', b"\x00\x01", b""])
@pytest.mark.parametrize("flags", [(), ("--streaming",)], ids=["plain", "streaming"])
def test_a_damaged_file(cli, content, flags):
    """Told once the data set is opened or, when it streams, when the damage is met."""
    Path("local").mkdir()
    Path("local/a.jsonl").write_bytes(content)
    error = cli("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES, *flags).error
    assert "local" in error and not Path("data/x/meta.json").exists()


def test_a_data_set_in_the_way(cli):
    write_jsonl("local/a.jsonl", [{"text": "first"}])
    run = ("hf_tokenize", "--hf_dataset", "local", "--dataset", "x", *BYTES)
    cli(*run).ok()
    write_jsonl("local/a.jsonl", [{"text": "second, longer"}])
    assert "--overwrite" in cli(*run).error and read("x")[0] == "first"
    cli(*run, "--overwrite").ok()
    assert read("x")[0] == "second, longer"


@pytest.mark.parametrize("kind, flags", [("text", ("--streaming",)), ("conversations", ())])
def test_a_killed_run_goes_on_where_it_stopped(workdir, kind, flags):
    """SIGKILL once some of it is saved; the same command again gives the files of a run that nobody stopped."""
    rng, n = random.Random(1), 6000
    lines = stdlib_source("argparse", "tarfile", "inspect").splitlines()
    texts = [" ".join(rng.choices(lines, k=12)) for _ in range(n)]
    records = [{"text": t} if kind == "text" else {"utterances": [t[:20], t[20:200]]} for t in texts]
    write_jsonl("big.jsonl", records)
    slow = f"""
import itertools, sys, time, types
sys.path.insert(0, {str(ROOT)!r})
import model
save = model.DataWriter.save_progress
model.DataWriter.save_progress = lambda *args: (save(*args), time.sleep(0.05))
clock = itertools.count(0, 3).__next__  # it saves every two seconds
model.time = types.SimpleNamespace(**{{**vars(time), "monotonic": clock}})
model.main()
"""
    run = ["hf_tokenize", "--hf_dataset", "big.jsonl", *BYTES, *flags, "--dataset", "killed"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", slow, *run], cwd=workdir, **quiet)
    progress = workdir / "data/killed/.progress.json"
    while not progress.exists() or json.loads(progress.read_text())["records"] < 1000:
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stopped = json.loads(progress.read_text())["records"]
    assert 1000 <= stopped < n and not (workdir / "data/killed/meta.json").exists()
    resumed = program(*run, cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert f"going on after record {stopped:,}".encode() in resumed.stdout
    parts = model.RecordEncoder(model.byte_tokenizer().spec, None, None, False)(records)
    files = {p.name: p.read_bytes() for p in (workdir / "data/killed").iterdir()}
    if kind == "text":
        assert files.keys() == {"data.bin", "meta.json"}
        whole = np.concatenate([[256, *ids] for ids, _ in parts])[1:]
    else:
        assert files.keys() == {"data.bin", "meta.json", "mask.bin", "starts.bin"}
        whole = np.concatenate([ids for ids, _ in parts])
        assert files["mask.bin"] == np.concatenate([mask for _, mask in parts]).tobytes()
        assert files["starts.bin"] == np.cumsum([0] + [len(ids) for ids, _ in parts[:-1]]).astype("<u8").tobytes()
    assert files["data.bin"] == whole.astype("<u2").tobytes()


def test_another_run_of_the_same_name_starts_anew(workdir):
    """Progress of other data is not gone on from."""
    write_jsonl("a.jsonl", [{"text": "aaa"}])
    tokenizer = model.byte_tokenizer()
    writer = model.DataWriter(Path("data/x"), tokenizer, False, "another key")
    writer.write(np.array([1, 2, 3]))
    writer.save_progress(1)
    model.tokenize_records(Path("data/x"), "a.jsonl", tokenizer, val_fraction=0.0)
    assert read("x")[0] == "aaa"


# ---------------------------------------------------------------------------------------------------------------------
# Finetuning
# ---------------------------------------------------------------------------------------------------------------------

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
    """A random model of bytes and the conversations, mixed so that the last tenth is a fair sample."""
    random.Random(0).shuffle(talks := list(TALKS))
    write_jsonl("talks.jsonl", talks)
    torch.manual_seed(0)
    config = tiny_config("llama", vocab_size=259, block_size=128, n_embd=64)
    state = {"config": asdict(config), "model": model.GPT(config).state_dict(), "variant": "tiny"}
    model.save_checkpoint(Path("base.pt"), {**state, "tokenizer": model.byte_tokenizer().spec})
    return "base.pt"


def test_packed_conversations_do_not_see_each_other(cli, base):
    """The loss over all windows is that of every conversation alone: each target once, none across a border."""
    cli("tokenize", "--dataset", "talks", "--txt", "talks.jsonl", *BYTES, "--val_fraction", 0).ok()
    data, gpt = model.Data(Path("data/talks")), model.open_model(base)[0]
    batch = data.batch("train", data.windows("train", 128), 128)
    assert all(len(row.unique()) > 1 for row in batch["segments"][:-1])  # several in each window
    with torch.no_grad():
        packed, alone, n = gpt.loss(**batch).item(), 0.0, 0
        for talk in {json.dumps(t): t for t in TALKS}.values():
            ids, mask = model.encode_conversation(data.tokenizer, model.messages_of(talk), False)
            targets = torch.from_numpy(np.where(mask[1:] == 1, ids[1:], -1))[None]
            alone += 3 * gpt.loss(torch.from_numpy(ids[:-1])[None], targets).item()
            n += 3 * int((targets >= 0).sum())
    assert n == int((batch["targets"] >= 0).sum()) == int(data.mask.sum())
    assert packed == pytest.approx(alone, rel=1e-5)


def val_losses(out: str) -> list[float]:
    return [float(x) for x in re.findall(r"val_loss ([\d.]+),", out)]


@pytest.mark.parametrize("flags", [(), ("--lora_rank", 8)], ids=["all weights", "lora"])
def test_finetuning_lowers_the_held_out_loss(cli, base, flags):
    """On answers it has not seen: from some 5.5 nats (knowing nothing is ln 259) to where the form has been learned."""
    answers = ("--prompt", "What is red and big?", "--sample_length", 20, "--sample_temperature", 0)
    run = ("finetune", "--model_checkpoint", base, "--data", "talks.jsonl", *FINETUNE, *flags, *answers)
    out = cli(*run, "--finetune_iters", 150, "--eval_interval", 50).ok().out
    losses = val_losses(out)
    assert len(losses) == 3 and losses == sorted(losses, reverse=True)
    assert losses[-1] < (5.0 if flags else 0.7)  # adapters cannot mend random embeddings
    before, after = (out.split(f"--- {when} finetuning ---\n")[1].split("\n---")[0] for when in ("before", "after"))
    assert before != after and all(t.startswith("What is red and big?\n") for t in (before, after))
    if not flags:
        assert after == "What is red and big?\nThe big apples."
    gpt, tokenizer, checkpoint = model.open_model("finetuned_tiny_model.pt")
    assert checkpoint["kind"] == "finetune" and not [k for k in gpt.state_dict() if "lora" in k]
    assert tokenizer.digest == model.byte_tokenizer().digest
    said = cli("chat", "--model_checkpoint", "finetuned_tiny_model.pt", "--temperature", 0, "--length", 20,
               stdin=b"What is red and big?\n")  # fmt: skip
    assert said.ok().out.startswith(after.split("\n")[1][:3])


def test_lora_trains_adapters_only(cli, base):
    """What is saved to go on from holds the base's weights bit for bit; what is saved to use is W + 2 B A; and the
    two models say the same."""
    run = ("finetune", "--model_checkpoint", base, "--data", "talks.jsonl", *FINETUNE, "--lora_rank", 4)
    out = cli(*run, "--finetune_iters", 20, "--eval_interval", 20).ok().out
    first = model.load_checkpoint(Path(base))["model"]
    last = torch.load("checkpoints/finetuned_tiny_model_last.pt", weights_only=True)
    merged = model.load_checkpoint(Path("checkpoints/finetuned_tiny_model.pt"))["model"]
    assert merged.keys() == first.keys()
    adapted = {n.removesuffix("lora_a") + "weight" for n in last["model"] if n.endswith("lora_a")}
    layers = [f"blocks.{i}.{n}.weight" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc", "mlp.proj")]
    assert adapted == set(layers)
    for name, tensor in first.items():
        assert torch.equal(last["model"][name], tensor), name
        if name not in adapted:
            assert torch.equal(merged[name], tensor), name
            continue
        a, b = (last["model"][name.replace("weight", f"lora_{x}")] for x in "ab")
        assert a.shape[0] == b.shape[1] == 4 and b.abs().max() > 0
        torch.testing.assert_close(merged[name], tensor + 2 * b @ a)
    n_adapters = sum(t.numel() for k, t in last["model"].items() if "lora" in k)
    n_all = sum(t.numel() for t in first.values())
    assert f"training {n_adapters:,} of {n_all:,} parameters" in out and out.count(" GB") == 2

    gpt = model.add_lora(model.GPT(model.GPTConfig(**last["config"])), 4)
    assert sum(p.numel() for p in gpt.parameters() if p.requires_grad) == n_adapters
    gpt.load_state_dict(last["model"])
    idx = torch.randint(259, (2, 100))
    ours = model.open_model("finetuned_tiny_model.pt")[0](idx)
    torch.testing.assert_close(gpt.eval()(idx), ours, atol=1e-4, rtol=0)


def test_a_new_adapter_changes_nothing(base):
    gpt = model.open_model(base)[0]
    idx = torch.randint(259, (2, 100))
    expected = gpt(idx)
    assert torch.equal(model.add_lora(gpt, 4)(idx), expected)
    saved = model.load_checkpoint(Path(base))["model"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in model.merged_state(gpt).items())


def stop_after(monkeypatch, step: int) -> None:
    """Ctrl-C while this step is being computed, once."""
    original, calls = model.train_step, [0]

    def train_step(*args, **kwargs):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **kwargs)

    monkeypatch.setattr(model, "train_step", train_step)


@pytest.mark.parametrize("resume", ["by name", "by the same command"])
@pytest.mark.parametrize("flags", [(), ("--lora_rank", 4)], ids=["all weights", "lora"])
@pytest.mark.parametrize("command", ["finetune", "hf_finetune"])
def test_a_stopped_finetune_is_resumed(cli, base, monkeypatch, command, flags, resume):
    """Bit for bit the run that was never stopped."""
    data = {"finetune": "--data", "hf_finetune": "--hf_dataset"}[command], "talks.jsonl"
    run = (command, "--model_checkpoint", base, *data, *FINETUNE, *flags, "--finetune_iters", 12, "--eval_interval", 6)
    run += ("--resid_pdrop", 0.1)
    cli(*run, "--name", "whole").ok()
    stop_after(monkeypatch, 5)
    assert cli(*run).code == 130
    assert torch.load("checkpoints/finetuned_tiny_model_last.pt", weights_only=True)["step"] == 5
    named = (command, *(data if command == "hf_finetune" else ()), "--name", "finetuned_tiny")
    cli(*(run if resume == "by the same command" else named), "--resume").ok()
    for suffix in ("", "_last"):
        whole, parts = (
            torch.load(f"checkpoints/{n}_model{suffix}.pt", weights_only=True) for n in ("whole", "finetuned_tiny")
        )
        assert whole["step"] == parts["step"]
        assert all(torch.equal(whole["model"][k], parts["model"][k]) for k in whole["model"])


def test_finetuning_can_be_resumed_for_longer(cli, base):
    run = ("finetune", "--model_checkpoint", base, "--data", "talks.jsonl", *FINETUNE, "--variant", "7M")
    Path("checkpoints").mkdir()
    shape = model.VARIANTS["7M"]
    config = model.make_config("7M", 259, {"arch": "gpt2"})
    state = {"config": asdict(config), "model": model.GPT(config).state_dict(), "variant": "7M"}
    model.save_checkpoint(Path(base), {**state, "tokenizer": model.byte_tokenizer().spec})
    assert config.n_layer == shape["n_layer"]
    cli(*run, "--finetune_iters", 2).ok()
    assert Path("checkpoints/finetuned_7M_model.pt").exists()
    cli("finetune", "--variant", "7M", "--resume", "--finetune_iters", 3).ok()
    assert torch.load("checkpoints/finetuned_7M_model_last.pt", weights_only=True)["step"] == 3


def test_hf_finetune_makes_its_data_once_and_of_what_was_named(cli, base):
    """Two data sets of one name are not mistaken for each other, nor two columns, nor yesterday's contents."""
    run = ("hf_finetune", "--model_checkpoint", base, *FINETUNE, "--finetune_iters", 1, "--overwrite")
    write_jsonl("a/talks/x.jsonl", TALKS[:30])
    write_jsonl("b/talks/x.jsonl", [{"utterances": ["Really other", "words here."], "more": ["c", "d"]}] * 40)

    def trained_on(*flags) -> str:
        cli(*run, *flags).ok()
        path = model.load_checkpoint(Path("checkpoints/finetuned_tiny_model.pt"))["data"]["path"]
        return model.byte_tokenizer().decode(model.Data(Path(path)).tokens[:200].tolist())

    assert "What is red" in trained_on("--hf_dataset", "a/talks")
    assert "Really other" in trained_on("--hf_dataset", "b/talks")
    assert "user\nc<" in trained_on("--hf_dataset", "b/talks", "--hf_text_column", "more")
    write_jsonl("a/talks/x.jsonl", [{"utterances": ["Something new", "today."]}] * 40)
    assert "Something new" in trained_on("--hf_dataset", "a/talks")


def test_hf_finetune_does_not_replace_a_run_unasked(cli, base):
    """Not when it makes new data either; and a changed file is new data."""
    write_jsonl("talks.jsonl", TALKS[:40])
    run = ("hf_finetune", "--model_checkpoint", base, "--hf_dataset", "talks.jsonl", *FINETUNE, "--finetune_iters", 1)
    cli(*run).ok()
    first = Path("checkpoints/finetuned_tiny_model.pt").read_bytes()
    write_jsonl("talks.jsonl", [{"utterances": ["Something new", "today."]}] * 40)
    assert "--overwrite" in cli(*run).error
    assert Path("checkpoints/finetuned_tiny_model.pt").read_bytes() == first
    cli(*run, "--name", "second").ok()
    path = model.load_checkpoint(Path("checkpoints/second_model.pt"))["data"]["path"]
    assert b"Something new" in bytes(model.Data(Path(path)).tokens[:40].clip(0, 255).astype(np.uint8))


def test_finetuning_with_another_tokenizers_data(cli, base):
    cli("tokenize", "--dataset", "other", "--txt", "talks.jsonl", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    error = cli("finetune", "--model_checkpoint", base, "--data", "other", *FINETUNE).error
    assert "bpe-300" in error and "byte" in error and "base.pt" in error
    cli("tokenize", "--dataset", "same", "--txt", "talks.jsonl", "--tokenizer", base).ok()
    cli("finetune", "--model_checkpoint", base, "--data", "same", *FINETUNE, "--finetune_iters", 1).ok()


def test_finetuning_on_plain_text(cli, base, text_file):
    out = cli("finetune", "--model_checkpoint", base, "--data", "input.txt", *FINETUNE, "--finetune_iters", 30,
              "--eval_interval", 15, "--prompt", "def ", "--sample_length", 5).ok().out  # fmt: skip
    assert val_losses(out)[1] < val_losses(out)[0] and "longer than a block" not in out


def test_conversations_longer_than_a_block_are_counted(cli, base):
    long = {"utterances": ["Why?", "Because " + "so " * 100]}
    write_jsonl("long.jsonl", [*TALKS[:40], long, long, *TALKS[:5]])
    run = ("finetune", "--model_checkpoint", base, "--data", "long.jsonl", *FINETUNE, "--finetune_iters", 1)
    out = cli(*run).ok().out
    assert "2 of 47 conversations are longer than a block of 128 and will be cut: raise --block_size" in out
    out = cli(*run, "--block_size", 64, "--overwrite").ok().out
    assert "longer than a block of 64" in out and "4 x 64 tokens a step" in out
    error = cli(*run[:-2], "--block_size", 129, "--overwrite").error
    assert "129" in error and "128" in error


def test_a_base_model_of_someone_elses(cli, tmp_path, monkeypatch):
    """A Hugging Face directory without chat tokens: they are added, learned, and exported with the rest."""
    tokenizer = foreign(tmp_path / "theirs", None, "<|endoftext|>", chat_tokens=False)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.n_vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained("theirs")
    write_jsonl("talks.jsonl", TALKS)
    assert "chat" in cli("chat", "--model_checkpoint", "theirs", stdin=b"hello\n").error
    run = ("finetune", "--model_checkpoint", "theirs", "--data", "talks.jsonl", *FINETUNE, "--finetune_iters", 60)
    losses = val_losses(cli(*run, "--eval_interval", 30).ok().out)
    assert losses[1] < losses[0]
    cli("export", "--model_path", "finetuned_theirs_model.pt", "--output_dir", "out").ok()
    again = transformers.AutoTokenizer.from_pretrained("out")
    assert again.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [600, 601]
    exported = transformers.AutoModelForCausalLM.from_pretrained("out")
    assert exported.config.vocab_size == 602
    messages = turns("What is red and big?", "The big apples.")
    gpt, ours, _ = model.open_model("finetuned_theirs_model.pt")
    ids = again.apply_chat_template(messages, return_dict=False)
    assert ids == model.encode_conversation(ours, messages, False)[0].tolist()
    with torch.no_grad():
        idx = torch.tensor([ids])
        torch.testing.assert_close(gpt(idx), exported(idx).logits, atol=1e-4, rtol=0)
    cli("chat", "--model_checkpoint", "out", "--length", 5, stdin=b"What is red and big?\n").ok()


# ---------------------------------------------------------------------------------------------------------------------
# Chat
# ---------------------------------------------------------------------------------------------------------------------

GREEDY = model.SamplingSettings(temperature=0)


@pytest.fixture
def chatty(cli, bpe) -> model.GPT:
    return save_model("chatty.pt", bpe, n_embd=32, block_size=512)


def fresh_answer(gpt, tokenizer, messages: list[dict], length: int, settings: model.SamplingSettings) -> str:
    """The whole conversation read again, by a full pass for every token."""
    ids = tokenizer.encode_rendered(model.render_chat(tokenizer, messages, add_generation_prompt=True))
    new: list[int] = []
    while len(new) < length:
        with torch.no_grad():
            idx = torch.tensor([ids + new])
            probs = model.next_token_probs(gpt(idx)[:, -1], settings, idx)
        token = int(probs.argmax())
        if token in (tokenizer.special[model.EOT], tokenizer.special[model.IM_END]):
            break
        new.append(token)
    return tokenizer.decode(new)


@pytest.mark.parametrize("settings", [GREEDY, model.SamplingSettings(temperature=0, repetition_penalty=1.3)],
                         ids=["greedy", "repetition penalty"])  # fmt: skip
def test_the_cache_changes_no_answer(chatty, bpe, settings):
    """Turn after turn, the answer is that of reading everything again; and only what is new is read."""
    session, read_lengths = model.ChatSession(chatty, bpe, settings, 12, 0), []
    original = chatty.hidden

    def hidden(idx, *args, **kwargs):
        read_lengths.append(idx.shape[1])
        return original(idx, *args, **kwargs)

    messages = []
    for text in ("Hello", "And you?", "  12 + 7\n", "", "Hello"):
        messages.append({"role": "user", "content": text})
        expected = fresh_answer(chatty, bpe, messages, 12, settings)
        chatty.hidden = hidden
        read_lengths.clear()
        assert session.answer(text, lambda piece: None) == expected
        chatty.hidden = original
        new = model.render_chat(bpe, messages[-2:], add_generation_prompt=True)  # the last answer, which was text since
        assert read_lengths[0] <= len(bpe.encode_rendered(new)) and set(read_lengths[1:]) <= {1}
        messages.append({"role": "assistant", "content": expected})
    assert session.messages == messages


def test_answers_are_streamed(chatty, bpe):
    pieces = []
    answer = model.ChatSession(chatty, bpe, GREEDY, 20, 0).answer("Hello", pieces.append)
    assert "".join(pieces) == answer and len([p for p in pieces if p]) > 3


def test_the_oldest_turns_make_room(chatty, bpe):
    """A conversation of any length goes on; its system turn stays."""
    session = model.ChatSession(chatty, bpe, GREEDY, 30, 0)
    session.messages = [{"role": "system", "content": "Be kind."}]
    for i in range(30):
        session.answer(f"Question number {i} of this long conversation?", lambda piece: None)
        assert session.cache.length <= 512
    seen = bpe.decode(session.cached)
    assert seen.startswith("<|im_start|>system\nBe kind.") and "number 29" in seen and "number 0 " not in seen


def chat(cli, *lines: str, flags: tuple = ()):
    stdin = "".join(line + "\n" for line in lines).encode()
    return cli("chat", "--model_checkpoint", "chatty.pt", "--temperature", 0, "--length", 12, *flags, stdin=stdin)


def saved(path: str) -> list[list[dict]]:
    return [json.loads(line)["messages"] for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_chat_in_the_terminal(cli, chatty, bpe):
    """/system, /reset and /save, from standard input; a saved conversation is one that `finetune` reads."""
    said = chat(cli, "Hello", "And you?", "/save one.jsonl", "/system Be kind.", "Hello", "/save one.jsonl", "/reset",
                "Hello", "/save two.jsonl", "/help", "/quit", "never read").ok()  # fmt: skip
    first, second = saved("one.jsonl")
    assert [m["content"] for m in first[::2]] == ["Hello", "And you?"]
    assert [m["role"] for m in second] == ["system", "user", "assistant"] and second[0]["content"] == "Be kind."
    assert saved("two.jsonl") == [second]  # reset keeps the system turn, and greedy says the same again
    for messages in (first[:2], first, second):
        assert messages[-1]["content"] == fresh_answer(chatty, bpe, messages[:-1], 12, GREEDY)
        assert messages[-1]["content"] in said.out
    assert "/reset, /system TEXT, /save FILE" in said.out and "never read" not in said.out
    cli("tokenize", "--dataset", "x", "--txt", "one.jsonl", *BYTES).ok()
    flagged = chat(cli, "Hello", flags=("--system", "Be kind.")).ok()
    assert flagged.out.startswith(second[-1]["content"])


def test_chat_goes_on_after_a_message_too_long(cli, chatty):
    """It says so, and forgets the message and not the conversation."""
    done = chat(cli, "Hello", "word " * 2000, "/save kept.jsonl", "And you?").ok()
    assert "512" in done.out + done.err and "Traceback" not in done.err
    (kept,) = saved("kept.jsonl")
    assert [m["content"] for m in kept if m["role"] == "user"] == ["Hello"]


def test_chat_goes_on_where_a_file_cannot_be_written(cli, chatty):
    done = chat(cli, "Hello", "/save no/such/folder/x.jsonl", "/save kept.jsonl").ok()
    assert "no/such/folder" in done.out + done.err and len(saved("kept.jsonl")) == 1


def test_saving_keeps_the_turns_that_were_dropped(cli, chatty):
    """What the model can no longer see was still said."""
    lines = [f"Question number {i} of this very long conversation of ours?" for i in range(20)]
    chat(cli, *lines, "/save all.jsonl", flags=("--length", 40)).ok()
    (messages,) = saved("all.jsonl")
    assert [m["content"] for m in messages if m["role"] == "user"] == lines


def test_ctrl_c_stops_the_answer_and_not_the_program(chatty, bpe):
    """What was said stays in the conversation and in the cache: the next answer is right."""
    session = model.ChatSession(chatty, bpe, GREEDY, 12, 0)
    pieces = []

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 4:
            raise KeyboardInterrupt

    assert session.answer("Hello", interrupted) == "".join(pieces)
    messages = [*session.messages, {"role": "user", "content": "And you?"}]
    assert session.answer("And you?", lambda piece: None) == fresh_answer(chatty, bpe, messages, 12, GREEDY)


def test_a_model_without_chat_tokens_cannot_chat(cli):
    spec = {**model.byte_tokenizer().spec, "special": {model.EOT: 256}}
    save_model("base.pt", model.Tokenizer(spec))
    error = cli("chat", "--model_checkpoint", "base.pt", stdin=b"hello\n").error
    assert "no chat" in error and "finetune" in error
