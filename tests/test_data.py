"""From text to data folders to batches: what goes in comes out, once, whole, in a known order."""

import contextlib
import http.server
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, program, random_gpt, stdlib_source, tiny_config, write_conversations

import model


def tokens_of(folder: Path) -> list[int]:
    return np.fromfile(folder / "data.bin", "<u2").tolist()


def nothing_left(folder: Path) -> bool:
    """No half-written files, no scratch folders."""
    return not folder.exists() or not [p for p in folder.rglob("*") if p.is_file() or p.name.startswith(".")]


# ---------------------------------------------------------------------------------------------------------------------
# tokenize
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_becomes_its_bytes(cli, workdir):
    text = "Café 🙂\r\nsecond line\n" * 50
    Path("in.txt").write_bytes(text.encode())
    out = cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte").ok().out
    assert bytes(tokens_of(workdir / "data/d")) == text.encode()
    meta = json.loads(Path("data/d/meta.json").read_text())
    n = len(text.encode())
    assert meta["n_tokens"] == n and meta["val_start"] == n - n // 10
    assert meta["format_version"] == 1 and meta["dtype"] == "uint16"
    assert meta["source"][0]["path"] == str(workdir / "in.txt") and meta["source"][0]["bytes"] == n
    assert (
        f"{n:,} tokens" in out
        and "1.00 bytes per token" in out
        and f"validation begins at token {n - n // 10:,}" in out
    )
    assert {p.name for p in Path("data/d").iterdir()} == {"data.bin", "meta.json"}


def test_a_bpe_folder_decodes_to_the_text(cli, workdir, text_file):
    cli("tokenize", "--dataset", "d", "--txt", text_file, "--tokenizer", "bpe", "--vocab_size", 1000).ok()
    data = model.Data(Path("data/d"))
    assert data.tokenizer.n_vocab == 1000 and data.tokenizer.decode(data.tokens.tolist()) == text_file.read_text()


def test_gpt2_is_the_default_tokenizer(cli, workdir, text_file, gpt2):
    cli("tokenize", "--dataset", "d", "--txt", text_file).ok()
    data = model.Data(Path("data/d"))
    assert data.tokenizer.digest == gpt2.digest and data.tokens.tolist() == gpt2.encode(text_file.read_text())


def test_several_files_are_separated_by_end_of_text(cli):
    for name, text in (("b.txt", "second"), ("a.txt", "first")):
        Path(name).write_text(text)
    cli("tokenize", "--dataset", "d", "--txt", "a.txt", "b.txt", "--tokenizer", "byte").ok()
    assert tokens_of(Path("data/d")) == [*b"first", 256, *b"second"]


def test_a_folder_gives_every_text_file_below_it(cli):
    contents = {"x/a.txt": b"alpha", "x/deep/er/b.md": b"beta", "x/c": b"gamma", "x/.hidden": b"no", "x/.git/d": b"no",
                "x/binary.txt": b"\x00\x01", "x/empty.txt": b""}  # fmt: skip
    for name, content in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    cli("tokenize", "--dataset", "d", "--txt", "x", "--tokenizer", "byte").ok()
    documents = "".join(chr(t) if t < 256 else "|" for t in tokens_of(Path("data/d"))).split("|")
    assert sorted(documents) == ["alpha", "beta", "gamma"]


def test_standard_input(cli):
    cli("tokenize", "--dataset", "d", "--txt", "-", "--tokenizer", "byte", stdin="é from a pipe".encode()).ok()
    assert bytes(tokens_of(Path("data/d"))).decode() == "é from a pipe"


def test_a_real_pipe_and_a_real_program(workdir):
    run = program("tokenize", "--dataset", "d", "--txt", "-", "--tokenizer", "byte", cwd=workdir, input=b"abc" * 100)
    assert run.returncode == 0 and run.stderr == b""  # quiet where it is not a terminal
    assert bytes(tokens_of(workdir / "data/d")) == b"abc" * 100


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8", "UTF-8", "cp1252"])
def test_encodings(cli, encoding):
    Path("in.txt").write_bytes("naïve café".encode(encoding))
    cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte", "--encoding", encoding).ok()
    assert bytes(tokens_of(Path("data/d"))).decode() == "naïve café"


def test_a_byte_order_mark_is_not_text(cli):
    Path("in.txt").write_bytes(b"\xef\xbb\xbfabc")
    cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte").ok()
    assert bytes(tokens_of(Path("data/d"))) == b"abc"


@pytest.mark.parametrize("encoding", [None, "utf-8", "UTF-8", "utf8"])
@pytest.mark.parametrize("before", [b"", "é".encode() * 7, b"\xef\xbb\xbf", b"\xef\xbb\xbf" + "aé".encode() * 40])
def test_the_offset_of_a_byte_that_is_no_text(cli, monkeypatch, before, encoding):
    """The offset in the file: over blocks whose ends cut characters in two, and after a byte order mark."""
    monkeypatch.setattr(model, "PIECE_CHARS", 16)
    content = before + "x€".encode() * 30 + b"abc\xff" + b"and more" * 9
    Path("in.txt").write_bytes(content)
    flags = ["--encoding", encoding] if encoding else []
    error = cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte", *flags).error
    assert f"byte {content.index(0xFF)} (0xff)" in error and "--encoding" in error and "in.txt" in error
    assert nothing_left(Path("data"))
    cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte", "--errors", "replace", *flags).ok()
    text = content.decode("utf-8-sig" if encoding is None else "utf-8", "replace")
    assert bytes(tokens_of(Path("data/d"))).decode() == text


def test_the_offset_right_after_a_byte_order_mark(cli):
    Path("in.txt").write_bytes(b"\xef\xbb\xbfab\xff")
    assert "byte 5 (0xff)" in cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte").error


@pytest.mark.parametrize("bad", [b"ab\xe2\x82", b"ab\xf0\x9f\x99"])
def test_a_text_that_ends_within_a_character(cli, bad):
    Path("in.txt").write_bytes(bad)
    assert "byte 2 " in cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte").error


@pytest.mark.parametrize("encoding", ["no-such", "hex", "rot13"])
def test_an_encoding_that_is_none(cli, text_file, encoding):
    error = cli("tokenize", "--dataset", "d", "--txt", text_file, "--tokenizer", "byte", "--encoding", encoding).error
    assert encoding in error


def test_a_failed_overwrite_keeps_the_old_data(cli):
    Path("good.txt").write_text("good text " * 30)
    Path("bad.txt").write_bytes(b"fine at first " * 10 + b"\xff")
    cli("tokenize", "--dataset", "d", "--txt", "good.txt", "--tokenizer", "byte").ok()
    assert "--overwrite" in cli("tokenize", "--dataset", "d", "--txt", "good.txt", "--tokenizer", "byte").error
    cli("tokenize", "--dataset", "d", "--txt", "bad.txt", "--tokenizer", "byte", "--overwrite").error  # noqa: B018
    data = model.Data(Path("data/d"))
    assert data.tokenizer.decode(data.tokens.tolist()) == "good text " * 30


def test_overwrite_replaces(cli):
    for text in ("old text " * 30, "new text " * 10):
        Path("in.txt").write_text(text)
        cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte", "--overwrite").ok()
    assert bytes(tokens_of(Path("data/d"))).decode() == "new text " * 10


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", ""])
def test_a_dataset_is_a_plain_name(cli, text_file, name):
    before = sorted(Path.cwd().rglob("*"))
    assert "plain name" in cli("tokenize", "--dataset", name, "--txt", text_file, "--tokenizer", "byte").error
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("fraction, val", [(0.0, 0), (0.5, 500), (0.1, 100)])
def test_validation_fraction(cli, fraction, val):
    Path("in.txt").write_text("x" * 1000)
    cli("tokenize", "--dataset", "d", "--txt", "in.txt", "--tokenizer", "byte", "--val_fraction", fraction).ok()
    assert json.loads(Path("data/d/meta.json").read_text())["val_start"] == 1000 - val


def test_digest_and_token_width(workdir):
    """The digest is of the ids; 65,536 tokens fit in two bytes, one more does not."""
    assert model.token_dtype(65536) == np.dtype("<u2") and model.token_dtype(65537) == np.dtype("<u4")
    metas = [write_conversations(workdir / str(i), [([1, 2, i // 2] * 9, [1] * 27)] * 2) for i in range(3)]
    assert metas[0]["digest"] == metas[1]["digest"] != metas[2]["digest"]


# ---------------------------------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------------------------------

PAGE = ("A page of text, é. " * 2000).encode()  # 40,000 bytes


class Handler(http.server.BaseHTTPRequestHandler):
    """/page: whole. /flaky: an error twice, then whole. /short, /cut: fewer bytes than promised. /slow: nothing."""

    requests: list[str] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        count = self.requests.count(self.path)
        if self.path in ("/missing.txt", "/forbidden.txt"):
            return self.send_error(404 if "missing" in self.path else 403)
        if self.path == "/broken.txt" or self.path == "/flaky.txt" and count < 3:
            return self.send_error(503)
        self.send_response(200)
        if self.path == "/cut.txt":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ffff\r\n" + PAGE[:1000])  # a chunk that never ends
        elif self.path == "/short.txt" or self.path == "/healing.txt" and count < 3:
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE[:-1])
        elif self.path == "/slow.txt":
            self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            time.sleep(1)
        else:
            if self.path != "/no_length.txt":
                self.send_header("Content-Length", str(len(PAGE)))
            self.end_headers()
            self.wfile.write(PAGE)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A web server on this machine; the pauses between retries are skipped."""
    Handler.requests = []
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


@pytest.mark.parametrize("path, requests", [
    ("/page.txt", 1), ("/page.txt?raw=1", 1), ("/no_length.txt", 1), ("/", 1), ("/flaky.txt", 3), ("/healing.txt", 3),
])  # fmt: skip
def test_a_url_is_fetched_whole(cli, server, path, requests):
    cli("tokenize", "--dataset", "d", "--txt", server + path, "--tokenizer", "byte").ok()
    assert bytes(tokens_of(Path("data/d"))) == PAGE
    assert len(Handler.requests) == requests
    assert [p.name for p in Path("data").iterdir()] == ["d"]


@pytest.mark.parametrize("path, words, requests", [
    ("/missing.txt", "Not Found", 1),
    ("/forbidden.txt", "Forbidden", 1),
    ("/broken.txt", "Service Unavailable", 3),
    ("/short.txt", "39,999 of 40,000", 3),
    ("/cut.txt", "", 3),
])  # fmt: skip
def test_a_url_that_cannot_be_had(cli, server, path, words, requests):
    """A part of a file is never taken for the whole; what may pass is tried again, what may not is not."""
    error = cli("tokenize", "--dataset", "d", "--txt", server + path, "--tokenizer", "byte").error
    assert server + path in error and words in error
    assert len(Handler.requests) == requests
    assert nothing_left(Path("data"))


def test_a_silent_server_times_out(server, workdir, monkeypatch):
    with pytest.raises(model.UserError, match="slow.txt"):
        model.download(f"{server}/slow.txt", workdir / "x", retries=1, timeout=0.2)
    assert nothing_left(workdir)


@pytest.mark.parametrize("url", [
    "http://127.0.0.1:1/x.txt", "http://no-such-host.invalid/x", "ftp://example.org/x", "http://127.0.0.1:port/x",
])  # fmt: skip
def test_an_unreachable_url(cli, monkeypatch, url):
    monkeypatch.setattr(model.time, "sleep", lambda seconds: None)
    assert url in cli("tokenize", "--dataset", "d", "--txt", url, "--tokenizer", "byte").error
    assert nothing_left(Path("data"))


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------

MEASURE = """
import resource, subprocess, sys
code = subprocess.call([sys.executable, *sys.argv[1:]])
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's ru_maxrss")
def test_memory_does_not_grow_with_the_text(workdir):
    """300 MB of text in less than 500 MB, PyTorch's own share included."""
    line = ("The quick brown fox jumps over the lazy dog, and não se cansa. " * 16 + "\n").encode()
    with open("big.txt", "wb") as f:
        for _ in range(300):
            f.write(line * (1_000_000 // len(line)))
    size = Path("big.txt").stat().st_size
    command = [str(ROOT / "model.py"), "tokenize", "--dataset", "big", "--txt", "big.txt", "--tokenizer", "byte"]
    run = subprocess.run([sys.executable, "-c", MEASURE, *command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak = int(run.stdout.split("peak ")[1])
    assert peak < 500, f"{peak} MB"
    assert (workdir / "data/big/data.bin").stat().st_size == 2 * size


# ---------------------------------------------------------------------------------------------------------------------
# Reading: blocks, order, nanoGPT's files
# ---------------------------------------------------------------------------------------------------------------------


def text_data(folder: Path, n: int, val_fraction: float = 0.1) -> model.Data:
    """A folder whose token at index i is i % 250."""
    writer = model.DataWriter(folder, model.byte_tokenizer(), overwrite=False)
    writer.write(np.arange(n) % 250)
    writer.finish(val_fraction, "numbers")
    return model.Data(folder)


@pytest.mark.parametrize("n, block_size", [(1000, 16), (1000, 7), (177, 16), (178, 16), (176, 16)])
def test_blocks_cover_each_split_and_keep_apart(workdir, n, block_size):
    """By hand: every target of the training split that fits in whole blocks is seen once, and none of validation."""
    data = text_data(workdir / "d", n)
    val_start = n - n // 10
    for split, low, high in (("train", 0, val_start), ("val", val_start, n)):
        blocks = (high - low - 1) // block_size
        if not blocks:
            with pytest.raises(model.UserError, match="split"):
                data.windows(split, block_size)
            continue
        batch = data.batch(split, np.array(data.windows(split, block_size)), block_size)
        positions = np.arange(low, low + blocks * block_size).reshape(blocks, block_size)
        assert np.array_equal(batch["idx"], positions % 250)
        assert np.array_equal(batch["targets"], (positions + 1) % 250)
        assert batch["targets"].dtype == batch["idx"].dtype == torch.int64


@pytest.mark.parametrize("n_blocks, batch_size", [(12, 4), (10, 4), (7, 16), (1, 3)])
def test_every_block_of_an_epoch_is_seen_once(n_blocks, batch_size):
    sampler = model.BlockSampler(n_blocks, batch_size, seed=5)
    seen = np.concatenate([sampler(step) for step in range(3 * n_blocks)])
    epochs = seen[: len(seen) // n_blocks * n_blocks].reshape(-1, n_blocks)
    assert len(epochs) == 3 * batch_size
    assert all(sorted(epoch) == list(range(n_blocks)) for epoch in epochs)
    if n_blocks > 5:
        assert len({tuple(e) for e in epochs}) == len(epochs)  # each epoch in an order of its own


def test_the_order_depends_on_seed_and_epoch_only():
    stream = lambda batch, seed: np.concatenate([model.BlockSampler(50, batch, seed)(s) for s in range(200 // batch)])  # noqa: E731
    assert np.array_equal(stream(4, 1), stream(8, 1)) and np.array_equal(stream(4, 1), stream(20, 1))
    assert not np.array_equal(stream(4, 1), stream(4, 2))
    late = model.BlockSampler(50, 4, 1)
    assert np.array_equal(late(37), stream(4, 1)[37 * 4 : 38 * 4])  # asked out of order, after a restart
    assert not np.array_equal(stream(4, 1)[:50], np.arange(50))


def test_nanogpt_files(workdir, cli):
    """nanoGPT's train.bin and val.bin: uint16, no header; each is a split of its own."""
    Path("nano").mkdir()
    (np.arange(300) % 200).astype("<u2").tofile("nano/train.bin")
    (np.arange(100) % 50).astype("<u2").tofile("nano/val.bin")
    for spec in ("nano", "nano/train.bin"):
        data = model.find_data(spec, "byte")
        assert len(data.windows("train", 16)) == 18 and len(data.windows("val", 16)) == 6
        assert data.batch("val", np.array([0, 16]), 16)["idx"].tolist() == [list(range(16)), list(range(16, 32))]
        assert data.batch("train", np.array([160]), 16)["targets"].tolist() == [list(range(161, 177))]
    alone = Path("alone.bin")
    np.full(1000, 7, "<u2").tofile(alone)
    assert model.find_data("alone.bin", "byte").val_start == 900


def test_text_in_data_is_made_once_and_found_again(cli, text_file):
    first = model.find_data("input.txt", "byte")
    made = Path("data/input/meta.json").stat().st_mtime_ns
    again = model.find_data("input.txt", "byte")
    assert Path("data/input/meta.json").stat().st_mtime_ns == made and again.digest == first.digest
    assert model.find_data("input").digest == model.find_data("data/input").digest == first.digest
    assert model.find_data("data/input/data.bin").digest == first.digest
    assert model.find_data(None).path == Path("data/input")  # the newest
    text_file.write_text("something else " * 100)
    with pytest.raises(model.UserError, match="in the way"):
        model.find_data("input.txt", "byte")


# ---------------------------------------------------------------------------------------------------------------------
# Conversations
# ---------------------------------------------------------------------------------------------------------------------

# (ids, mask): 3 + 4 + 2 tokens fill a window of 8 + 1; the fourth is longer than a window; the rest validate
CONVERSATIONS = [
    ([10, 11, 12], [0, 1, 1]),
    ([20, 21, 22, 23], [0, 0, 1, 0]),
    ([30, 31], [1, 1]),
    (list(range(100, 115)), [0] + [1] * 14),
    ([50, 51, 52, 53, 54, 55], [0, 1, 0, 1, 0, 1]),
    ([60, 61, 62, 63], [0, 1, 1, 1]),
    ([70, 71, 72], [0, 0, 1]),
]


@pytest.fixture
def conversations(workdir) -> model.Data:
    meta = write_conversations(workdir / "chat", CONVERSATIONS, val_fraction=0.1)
    assert (meta["n_tokens"], meta["val_start"]) == (37, 34)  # not within a conversation
    return model.Data(workdir / "chat")


def test_conversations_are_packed_whole(conversations):
    starts = conversations.windows("train", 8)
    assert starts.tolist() == [0, 9, 24, 30]  # 9 = 3 + 4 + 2 fit exactly; 15 do not; 6 and 4 do not fit together
    assert conversations.windows("val", 8).tolist() == [34]
    batch = conversations.batch("train", starts, 8)
    idx, targets, segments = (batch[k].tolist() for k in ("idx", "targets", "segments"))
    assert idx[0] == [10, 11, 12, 20, 21, 22, 23, 30]
    assert targets[0] == [11, 12, -1, -1, 22, -1, -1, 31]  # never a first token, never where the mask is 0
    assert segments[0] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert idx[1] == list(range(100, 108)) and targets[1] == list(range(101, 109)) and len(set(segments[1])) == 1
    assert idx[2][:6] == [50, 51, 52, 53, 54, 55] and targets[2] == [51, -1, 53, -1, 55, -1, -1, -1]
    assert idx[3][:4] == [60, 61, 62, 63] and targets[3] == [61, 62, 63, -1, -1, -1, -1, -1]  # validation is not in it
    val = conversations.batch("val", np.array([34]), 8)
    assert val["idx"][0, :3].tolist() == [70, 71, 72] and val["targets"][0].tolist() == [-1, 72] + [-1] * 6


def test_the_loss_of_packed_conversations_is_that_of_each_alone(conversations):
    """The whole way from starts.bin and mask.bin to the loss, against one conversation at a time."""
    gpt = random_gpt(tiny_config("llama", vocab_size=259, block_size=16))
    batch = conversations.batch("train", conversations.windows("train", 16), 16)
    alone = 0.0
    for ids, mask in CONVERSATIONS[:-1]:
        targets = torch.tensor([[i if m else -1 for i, m in zip(ids, mask, strict=True)]])[:, 1:]
        alone += gpt.loss(torch.tensor([ids])[:, :-1], targets)
    torch.testing.assert_close(gpt.loss(**batch), alone, rtol=1e-5, atol=0)


def test_random_conversations_are_all_seen_once(workdir):
    """Every wanted token of conversations that fit a window is a target exactly once, over all windows."""
    rng = np.random.default_rng(0)
    made = [(rng.integers(0, 256, n), rng.integers(0, 2, n)) for n in rng.integers(2, 18, 200)]
    write_conversations(workdir / "chat", made, val_fraction=0.2)
    data = model.Data(workdir / "chat")
    expected, n_targets = [], 0
    for ids, mask in made:
        expected += ids[1:][mask[1:] == 1].tolist()
    found = []
    for split in ("train", "val"):
        targets = data.batch(split, data.windows(split, 17), 17)["targets"].flatten()
        found += targets[targets >= 0].tolist()
        n_targets += int((targets >= 0).sum())
    assert found == expected and n_targets > 500


# ---------------------------------------------------------------------------------------------------------------------
# Damaged folders
# ---------------------------------------------------------------------------------------------------------------------


def damage(name: str, folder: Path) -> None:
    meta, data = folder / "meta.json", folder / "data.bin"
    content = json.loads(meta.read_text())
    if name == "truncated":
        data.write_bytes(data.read_bytes()[:-10])
    elif name == "odd":
        data.write_bytes(data.read_bytes()[:-1])
    elif name == "emptied":
        data.write_bytes(b"")
    elif name == "gone":
        data.unlink()
    elif name == "newer":
        meta.write_text(json.dumps({**content, "format_version": 2}))
    elif name == "not json":
        meta.write_text("{")
    elif name == "a list":
        meta.write_text("[]")
    elif name == "foreign json":
        meta.write_text('{"title": "my notes"}')
    elif name == "no tokenizer":
        meta.write_text(json.dumps({**content, "tokenizer": {}}))


@pytest.mark.parametrize("name, words", [
    ("truncated", "truncated"), ("odd", "truncated"), ("emptied", "empty"), ("gone", "no such file"),
    ("newer", "newer"), ("not json", "JSON"), ("a list", "meta.json"), ("foreign json", "meta.json"),
    ("no tokenizer", "meta.json"),
])  # fmt: skip
def test_a_damaged_data_folder(cli, name, words):
    text_data(Path("data/d"), 5000)
    damage(name, Path("data/d"))
    assert words in cli("train", "--data", "d").error
    assert not list(Path("checkpoints").glob("*")) if Path("checkpoints").exists() else True


def test_an_interrupted_tokenize_leaves_no_folder_that_looks_whole(workdir, monkeypatch):
    Path("in.txt").write_text(stdlib_source("textwrap"))

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.DataWriter, "write", interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        model.tokenize_text(Path("data/d"), ["in.txt"], "byte")
    assert nothing_left(Path("data"))
