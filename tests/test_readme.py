"""Every command of the README runs as it is written there, one after the other in one folder: the variants are small
ones, runs have two steps, and what a user would have, or fetch from the Hub, stands in the folder."""

import json
import re
import shlex
import shutil
import socket
from pathlib import Path

import pytest
from conftest import ROOT, Torchrun, random_gpt, save_model, stdlib_source, tiny_config

import model

SMALL = dict(n_layer=2, n_head=4, n_embd=32, block_size=64, batch_size=4)


def commands() -> list[list[str]]:
    """The words of each command in the README's blocks, without what they install."""
    found = re.findall(r"^```(\w*)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    blocks = [block for language, block in found if not language]
    text = "".join(block for block in blocks if "#!" not in block).replace("\\\n", " ")
    text = text.replace("pip install -r requirements.txt && ", "")
    lines = [re.sub(r"\(pip install .*\)$", "", line.strip()) for line in text.splitlines()]
    return [shlex.split(line) for line in lines if " model.py" in line]


def short(words: list[str]) -> list[str]:
    """The flags of a command, and those that make a run short."""
    name, *flags = words[words.index("model.py") + 1 :]
    if name in ("train", "distill", "finetune", "hf_finetune"):
        flags = [f for i, f in enumerate(flags) if "--finetune_iters" not in flags[max(i - 1, 0) : i + 1]]
        flags += ["--max_iters", "2", "--eval_tokens", "64", "--device", "cpu", "--overwrite"]
    return [name, *flags]


def test_the_map_of_the_file_names_what_is_there():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("| to add | change |")[1].split("\n\n")[0]
    source = (ROOT / "model.py").read_text(encoding="utf-8")
    names = {name for code in re.findall("`(.+?)`", table) for name in re.findall(r"\w+", code)}
    assert len(names) > 20 and [name for name in names if not re.search(rf"\b{name}\b", source)] == []


@pytest.fixture
def small(workdir, monkeypatch, gpt2) -> None:
    """Small variants, and the files that the README's commands name."""
    for row in model.VARIANTS.values():
        for key in ("n_kv_head", "n_inner"):
            monkeypatch.delitem(row, key, raising=False)
        for key, value in SMALL.items():
            monkeypatch.setitem(row, key, value)
    for i, module in enumerate(("input", "corpus", "test")):
        Path(f"{module}.txt").write_text(stdlib_source("textwrap")[1000 * i : 1000 * i + 12000], encoding="utf-8")
    turns = {"utterances": ["Hi", "Hello.", "Are you well?", "Yes, thank you."]}
    for file in ("conversations.jsonl", "roskoN/dailydialog/train.jsonl"):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).write_text((json.dumps(turns) + "\n") * 40, encoding="utf-8")


@pytest.fixture
def hub(small, cli, gpt2) -> None:
    """Checkpoints, and small models under the names that the Hub's have."""
    Path("checkpoints").mkdir()
    llama = tiny_config("llama", vocab_size=259, block_size=64)
    for name in ("26M", "distilled_120M"):
        save_model(f"checkpoints/{name}_model.pt", random_gpt(llama))
    cli("export", "--model_path", "26M_model.pt", "--output_dir", "HuggingFaceTB/SmolLM2-135M").ok()
    save_model("gpt2.pt", random_gpt(tiny_config("gpt2", vocab_size=gpt2.n_vocab, block_size=64)), gpt2)
    cli("export", "--model_path", "gpt2.pt", "--output_dir", "openai-community/gpt2").ok()


def test_every_command_runs(hub, cli):
    done = set()
    for words in commands():
        name, *flags = short(words)
        if words[0] == "torchrun" or "--tasks" in flags:  # below; and tests/peers has lm-eval
            continue
        if not done:  # the first one would read all of Python's library
            cli("tokenize", "--dataset", model.STDLIB_DATA, "--txt", "corpus.txt", "--tokenizer", "byte").ok()
        if "120M_model.pt" in flags:  # torchrun's
            cli(*short(shlex.split("model.py train --variant 120M --data corpus.txt"))).ok()
        result = cli(name, *flags, stdin=b"Hello\n/quit\n")
        assert result.code == 0, f"{shlex.join(words)}\n{result.out}\n{result.err}"
        done.add(name)
    assert done >= {"tokenize", "train", "sample", "finetune", "hf_finetune", "chat", "export", "distill", "eval"}


def start(words: list[str], folder: str, port: int, processes: int) -> Torchrun:
    """A torchrun command of the README, with fewer processes, on a machine that is a folder."""
    Path(folder).mkdir()
    shutil.copy("corpus.txt", folder)
    flags = [{"HOST": "127.0.0.1", "29500": port, "8": processes}.get(w, w) for w in words[1 : words.index("model.py")]]
    patch = f"[row.update({SMALL}) for row in model.VARIANTS.values()]"
    return Torchrun(*short(words), flags=flags, patch=patch, cwd=folder)


def test_every_torchrun_command_runs(small):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    one, *two = [words for words in commands() if words[0] == "torchrun"]
    assert "--standalone" in one and [words[words.index("--node_rank") + 1] for words in two] == ["0", "1"]
    start(one, "one", port, 2).result().ok()
    for run in [start(words, f"two {i}", port, 1) for i, words in enumerate(two)]:
        run.result().ok()
