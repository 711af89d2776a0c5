"""Files with a field missing, or of another type or size: whatever a reader meets, it opens the file or says one
sentence that names it."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

import model

OLD = Path(__file__).with_name("old_files")
MISSING = object()
WRONG = [MISSING, None, "x", "", -1, 0, 10**9, 2.5, math.inf, True, [], [1], {}, {"a": 1}]
NO_OBJECT = [(f"the file: {content}", content) for content in (b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b"{}")]


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch):
    """Thousands of files, which no crash has to spare."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def changes(content: dict, part: str | None = None) -> list[tuple[str, dict]]:
    """The content with each of its fields, or of the fields of a part of it, left out or given each wrong value."""
    if part is not None:
        return [(what, {**content, part: changed}) for what, changed in changes(content[part])]
    made = []
    for key in content:
        for value in WRONG:
            changed = {k: v for k, v in content.items() if k != key} | ({} if value is MISSING else {key: value})
            made.append((f"{key}: {value!r:.20}", changed))
    return made


def write(path: Path, content) -> None:
    """A file that is whole, whatever it holds."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content))
    elif isinstance(content, dict):
        model.save_checkpoint(path, content)
    else:
        torch.save(content, path)


def count_told(path: Path, good: dict, cases: list[tuple[str, dict | bytes]], open_it) -> int:
    """In how many cases the file, or the folder that it is in, does not open: anything but a UserError that names it
    is a fault. With the good content it opens."""
    told = 0
    for what, content in [*cases, ("good", good)]:
        write(path, content)
        try:
            open_it()
        except model.UserError as e:
            assert path.parts[0] in str(e) and "\n" not in str(e) and content is not good, (what, str(e))
            told += 1
    return told


@pytest.mark.parametrize("part", [None, "config", "tokenizer", "train_config"])
def test_checkpoints(workdir, part):
    good = torch.load(OLD / "checkpoints/qwen3_model.pt", weights_only=True)
    good = {**good, "format_version": model.FORMAT_VERSION}
    good["metrics"]["sums"] = {"loss": [0.0, 1.0]}
    cases = changes(good, part)
    assert count_told(Path("bad.pt"), good, cases, lambda: model.open_model("bad.pt")) > len(cases) / 3


@pytest.mark.parametrize(
    "part", ["metrics", "data", "optimizer", "scaler", "lora_rank", "new_tokens", "distill", "teacher"]
)
def test_what_a_run_goes_on_from(cli, part):
    """One sentence, exit status 1, and the checkpoint as it was."""
    shutil.copytree(OLD, ".", dirs_exist_ok=True)
    path = Path("checkpoints/muon_model_last.pt")
    good = torch.load(path, weights_only=True)
    for value in [v for v in WRONG if v is not MISSING]:
        model.save_checkpoint(path, {**good, part: value})
        before = path.read_bytes()
        done = cli("train", "--name", "muon", "--resume", "--max_iters", 5)
        assert done.code == 0 or done.error and path.read_bytes() == before, value


def test_meta_json(workdir):
    shutil.copytree(OLD / "data/text", "text")
    path, good = Path("text/meta.json"), json.loads(Path("text/meta.json").read_text())
    cases = changes(good) + changes(good, "tokenizer") + NO_OBJECT
    assert count_told(path, good, cases, lambda: model.Data(Path("text"))) > len(cases) / 3


def test_a_mask_of_another_length(workdir):
    """Folders of format 1 have no digest of it."""
    shutil.copytree(OLD / "data/talks", "talks")
    mask = Path("talks/mask.bin")
    mask.write_bytes(mask.read_bytes()[:-300])
    with pytest.raises(model.UserError, match="mask.bin has .* truncated or replaced"):
        model.Data(Path("talks"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_of_an_export(workdir, file):
    shutil.copytree(OLD / "exported", "exported")
    path, good = Path("exported") / file, json.loads((OLD / "exported" / file).read_text())
    cases = changes(good) + (changes(good, "model") if file == "tokenizer.json" else []) + NO_OBJECT
    if file == "tokenizer_config.json":  # which holds the template where no file of its own does
        Path("exported/chat_template.jinja").unlink()
        cases += [("a template's name", {**good, "chat_template": [{"name": [], "template": "x"}]})]
    assert count_told(path, good, cases, lambda: model.open_model("exported")) > 15


RECORDS = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"utterances": ["a", "b"]}, {"instruction": "a", "input": "", "output": "b"}, {"prompt": "a", "completion": "b"},
]  # fmt: skip


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: next(iter(r)))
def test_conversations(record):
    """A record either is a conversation or is told; nothing else happens to it."""
    cases = changes(record)
    turns = next(iter(record.values()))
    if isinstance(turns, list) and isinstance(turns[0], dict):
        cases += [(w, {next(iter(record)): [turn, *turns[1:]]}) for w, turn in changes(turns[0])]
    for what, changed in cases:
        try:
            messages = model.messages_of(changed)
        except model.UserError as e:
            assert "\n" not in str(e), what
        else:
            assert messages is None or all(isinstance(m["content"], str) for m in messages), what


def test_a_vocabulary_with_gaps():
    spec = model.byte_tokenizer().spec
    for ids in ((256, 258, 259), (256, 256, 257), (255, 256, 257), (256, 258, 258)):
        with pytest.raises(model.UserError):
            model.Tokenizer({**spec, "special": dict(zip(spec["special"], ids, strict=True))})


def test_the_folder_itself_as_data(cli, monkeypatch):
    """By the names that have no name in them."""
    shutil.copytree(OLD, ".", dirs_exist_ok=True)
    monkeypatch.chdir("data/text")
    for name in (".", "../text", "../talks/../text"):
        assert len(model.open_data(name).splits["train"].tokens) == 3529
    assert "meta.json" in cli("eval", "--model_checkpoint", "../../checkpoints/qwen3_model.pt", "--data", "..").error
