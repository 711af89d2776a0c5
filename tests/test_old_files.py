"""Files made by the first version of the format (tests/old_files, written in November 2026) open, say what they said
then, and their runs go on as they would have gone on then."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import log_of, text_of

import model

OLD = Path(__file__).with_name("old_files")
EXPECTED = json.loads((OLD / "expected.json").read_text())  # what that version said and reached


@pytest.fixture
def old_files(cli, workdir) -> Path:
    shutil.copytree(OLD, workdir, dirs_exist_ok=True)
    return workdir


@pytest.mark.parametrize("name", ["muon_model_last.pt", "qwen3_model.pt", "student_model_last.pt", "exported"])
def test_a_model_says_what_it_said(cli, old_files, name):
    flags = ("--prompt", "def wrap", "--length", 20, "--temperature", 0, "--dtype", "float32")
    expected = EXPECTED[{"exported": "qwen3"}.get(name, name.split("_")[0])]["text"]
    assert cli("sample", "--model_checkpoint", name, *flags).ok().out == expected


@pytest.mark.parametrize("command, name, flags", [
    ("train", "muon", ()), ("finetune", "lora", ()), ("distill", "student", ("--teacher_model_path", "qwen3_model.pt")),
])  # fmt: skip
def test_a_run_goes_on(cli, old_files, command, name, flags):
    """Truth: the last record of the same run resumed by the version that began it."""
    cli(command, "--name", name, *flags, "--resume", "--max_iters", 8).ok()
    expected = {k: v for k, v in EXPECTED[name]["resumed"].items() if k not in ("seconds", "tokens_per_s", "lr")}
    record = log_of(name)[-1]
    assert {k: record[k] for k in expected} == pytest.approx(expected, rel=2e-3)


def test_data_folders(cli, old_files):
    text, talks = (model.open_data(name) for name in ("text", "talks"))
    read = text_of(text)
    assert read.startswith('"""Text wrapping') and hashlib.sha256(read.encode()).hexdigest()[:16] == "a3d350c93307b3ba"
    assert text.tokenizer.name == "bpe-300" and [len(text.splits[s].tokens) for s in ("train", "val")] == [3529, 392]
    assert sum(len(split.starts) for split in talks.splits.values()) == 60
    said = [split.tokens[split.mask == 1].tolist() for split in talks.splits.values()]
    assert talks.tokenizer.decode(said[0] + said[1]) == "".join(f"It is {i}.<|im_end|>" for i in range(60))
