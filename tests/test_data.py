"""From text to data folders to batches: what goes in comes out, once, whole, in a known order."""

import contextlib
import functools
import gzip
import http.server
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_RUN, all_tokens, save_model, text_of, tiny_config, write_conversations

import model


@pytest.fixture
def tokenize(cli):
    """tokenize(ARGUMENT, ..., content=): --txt ARGUMENTS, or in.txt with that content, as bytes into data/d."""

    def tokenize(*args, content: bytes | None = None, stdin: bytes | None = None):
        if content is not None:
            Path("in.txt").write_bytes(content)
            args = ("in.txt", *args)
        return cli("tokenize", "--dataset", "d", "--tokenizer", "byte", "--txt", *args, stdin=stdin)

    return tokenize


def made() -> bytes:
    """The text in data/d; end-of-text is a |."""
    return bytes(t if t < 256 else ord("|") for t in np.fromfile("data/d/data.bin", "<u2").tolist())


def nothing_left() -> bool:
    """No half-written files, no scratch folders."""
    return not [p for p in Path("data").rglob("*") if p.is_file() or p.name.startswith(".")]


def test_a_file_becomes_its_bytes(tokenize, workdir):
    text = ("Café 🙂\r\nsecond line\n" * 50).encode()
    out, n = tokenize(content=text).ok().out, len(text)
    assert made() == text and {p.name for p in Path("data/d").iterdir()} == {"data.bin", "meta.json"}
    meta = json.loads(Path("data/d/meta.json").read_text())
    assert meta["n_tokens"] == n and meta["val_start"] == n - n // 10 and meta["dtype"] == "uint16"
    assert meta["source"][0]["path"] == str(workdir / "in.txt") and meta["source"][0]["bytes"] == n
    for words in (f"{n:,} tokens", "1.00 bytes per token", f"validation begins at token {n - n // 10:,}"):
        assert words in out


@pytest.mark.parametrize("flags", [("--tokenizer", "bpe", "--vocab_size", 1000), ()])
def test_a_bpe_folder_decodes_to_the_text(cli, text_file, flags, gpt2):
    cli("tokenize", "--dataset", "d", "--txt", text_file, *flags).ok()
    data, text = model.Data(Path("data/d")), text_file.read_text()
    assert text_of(data) == text and data.tokenizer.n_vocab == (1000 if flags else gpt2.n_vocab)
    if not flags:  # GPT-2's is the default
        assert data.tokenizer.digest == gpt2.digest and all_tokens(data).tolist() == gpt2.encode(text)


def test_several_files_are_separated_by_end_of_text(tokenize):
    for name, text in (("b.txt", "second"), ("a.txt", "first")):
        Path(name).write_text(text)
    tokenize("a.txt", "b.txt").ok()
    assert np.fromfile("data/d/data.bin", "<u2").tolist() == [*b"first", 256, *b"second"]


def test_a_folder_gives_every_text_file_below_it(tokenize):
    contents = {"x/a.txt": b"alpha", "x/deep/er/b.md": b"beta", "x/c": b"gamma", "x/.hidden": b"no", "x/.git/d": b"no",
                "x/binary.txt": b"\x00\x01", "x/empty.txt": b"", "x/talks.jsonl": b'{"a": 1}'}  # fmt: skip
    for name, content in contents.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)
    said = tokenize("x").ok().err
    assert sorted(made().split(b"|")) == [b"alpha", b"beta", b"gamma"]
    assert "skipped 2 of 5 files, which are not text; records need hf_tokenize and a folder of their own" in said


def test_data_of_the_name_of_its_text(tokenize):
    """The folder of text is not the data made of it; a folder of data in its place is."""
    Path("d").mkdir()
    Path("d/a.txt").write_text("alpha " * 9)
    tokenize("d").ok()
    assert text_of(model.open_data("d")) == "alpha " * 9 == text_of(model.open_data("data/d"))
    np.zeros(1000, "<u2").tofile("d/train.bin")
    assert model.open_data("d", "byte").folder == Path("d")


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes")
def test_pipes_are_read(tokenize):
    """As a shell's <(zcat text.gz) hands them over."""
    os.mkfifo("pipe")
    threading.Thread(target=Path("pipe").write_bytes, args=["é from a pipe".encode()], daemon=True).start()
    tokenize("pipe").ok()
    assert made().decode() == "é from a pipe"


def test_standard_input(tokenize):
    done = tokenize("-", stdin="é from a pipe".encode()).ok()
    assert made().decode() == "é from a pipe" and done.err == ""  # quiet where it is not a terminal
    tokenize("-", "--overwrite", stdin=b"fine\ncaf\xe9").fails_with("standard input, line 2: byte 0xe9")


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1", "utf-8", "UTF-8", "cp1252"])
def test_encodings(tokenize, encoding):
    tokenize("--encoding", encoding, content="naïve café".encode(encoding)).ok()
    assert made().decode() == "naïve café"
    Path("texts").mkdir()
    shutil.move("in.txt", "texts")
    Path("texts/binary").write_bytes(bytes(100))
    tokenize("texts", "--encoding", encoding, "--overwrite").ok()
    assert made().decode() == "naïve café"


@pytest.mark.parametrize("flags", [(), ("--encoding", "UTF-8")])
@pytest.mark.parametrize("before", ["", "\ufeff", "é" * 7, "aé\n" * 40, "x€\r\n" * 30_000])
@pytest.mark.parametrize("bad", [b"\xff", b"\xff and more\n" * 9, b"\xe2\x82", b"\xf0\x9f\x99\nx"])
def test_the_line_of_a_byte_that_is_no_text(tokenize, before, bad, flags):
    """Over blocks whose ends cut characters in two, after a byte order mark, and where a character is cut short."""
    content = before.encode() + bad
    error = tokenize(*flags, content=content).error
    words = f"in.txt, line {content[: len(before.encode())].count(10) + 1}: byte 0x{bad[0]:02x} is not "
    assert words in error and "--encoding" in error and nothing_left()
    tokenize("--errors", "replace", *flags, content=content).ok()
    assert made().decode() == content.decode("utf-8" if flags else "utf-8-sig", "replace")


@pytest.mark.parametrize("encoding, content, words", [
    ("utf-16", "naïve".encode("utf-16-le"), ["in.txt", "--encoding"]),  # without its mark
    ("utf-16", b"no mark, either\n" + b"\xd8" * 9, ["in.txt, line 1: byte 0xd8 is not utf-16", "--encoding"]),
    ("no-such", b"text", ["no-such"]), ("hex", b"text", ["hex"]), ("rot13", b"text", ["rot13"]),
])  # fmt: skip
def test_an_encoding_that_is_not_the_texts_or_none(tokenize, encoding, content, words):
    tokenize("--encoding", encoding, content=content).fails_with(*words)
    Path("texts").mkdir()
    shutil.move("in.txt", "texts")
    tokenize("texts", "--encoding", encoding).fails_with(*words)


def test_a_compressed_file_is_no_latin_1(tokenize):
    for content in (gzip.compress(b"some text " * 99), "naïve".encode("utf-16")):
        error = tokenize(content=content).error
        assert "compressed" in error and "--encoding utf-16" in error and "cp1252" not in error
    assert "perhaps cp1252" in tokenize(content="“naïve”".encode("cp1252")).error


def test_only_overwrite_replaces_and_a_failed_one_keeps_the_old_data(tokenize):
    good = b"good text " * 30
    tokenize(content=good).ok()
    assert "--overwrite" in tokenize(content=b"new text").error
    assert "0xff" in tokenize("--overwrite", content=b"fine at first " * 10 + b"\xff").error
    assert text_of(model.Data(Path("data/d"))).encode() == good
    tokenize("--overwrite", content=b"new text " * 10).ok()
    assert made() == b"new text " * 10


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", ""])
def test_a_dataset_is_a_plain_name(cli, text_file, name):
    before = sorted(Path.cwd().rglob("*"))
    assert "plain name" in cli("tokenize", "--dataset", name, "--txt", text_file, "--tokenizer", "byte").error
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("fraction, val", [(0.0, 0), (0.5, 500)])
def test_validation_fraction(tokenize, fraction, val):
    tokenize("--val_fraction", fraction, content=b"x" * 1000).ok()
    assert json.loads(Path("data/d/meta.json").read_text())["val_start"] == 1000 - val


def test_an_interrupted_tokenize_leaves_nothing(tokenize, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.DataWriter, "write", interrupt)
    assert tokenize(content=b"some text").code == 130 and nothing_left()


def test_digest_and_token_width(workdir):
    """The digest is of the ids; 65,536 tokens fit in two bytes, one more does not."""
    assert model.token_dtype(65536) == np.dtype("<u2") and model.token_dtype(65537) == np.dtype("<u4")
    metas = [write_conversations(workdir / str(i), [([1, 2, i // 2] * 9, [1] * 27)] * 2) for i in range(3)]
    assert metas[0].digest == metas[1].digest != metas[2].digest


PAGE = ("A page of text, é. " * 2000).encode()  # 40,000 bytes


class Handler(http.server.BaseHTTPRequestHandler):
    """/flaky, /busy: an error twice, then whole. /short, /cut, /healing (twice): fewer bytes than promised. /slow:
    none. /endless, /dripping: without end. /huge: by its header. /to_ftp, /to_file: elsewhere."""

    requests: list[str] = []

    def do_GET(self) -> None:
        name = self.path.strip("/").split(".")[0]
        self.requests.append(name)
        early = self.requests.count(name) < 3
        if status := {"missing": 404, "forbidden": 403, "broken": 503, "flaky": 503 if early else 0,
                      "busy": 429 if early else 0}.get(name):  # fmt: skip
            return self.send_error(status)
        if name.startswith("to_"):
            self.send_response(302)
            self.send_header("Location", {"to_ftp": "ftp://127.0.0.1/x", "to_file": "file:///etc/hosts"}[name])
            return self.end_headers()
        self.send_response(200)
        if name == "cut":  # a chunk that never ends
            self.send_header("Transfer-Encoding", "chunked")
        elif name == "huge":
            self.send_header("Content-Length", str(10**15))
        elif name not in ("no_length", "endless", "dripping"):
            self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        if name == "slow":
            threading.Event().wait(1)  # not time.sleep, which is skipped
        elif name in ("endless", "dripping"):
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(PAGE if name == "endless" else b"x")
                    threading.Event().wait(0.02)
        elif name == "cut":
            self.wfile.write(b"ffff\r\n" + PAGE[:1000])
        else:
            page = b"\xe9" * len(PAGE) if name == "latin1" else PAGE
            self.wfile.write(page[:-1] if name == "short" or name == "healing" and early else page)

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
    ("/page.txt", 1), ("/page.txt?raw=1", 1), ("/no_length.txt", 1), ("/", 1), ("/flaky.txt", 3), ("/busy.txt", 3),
    ("/healing.txt", 3),
])  # fmt: skip
def test_a_url_is_fetched_whole(tokenize, server, path, requests):
    tokenize(server.replace("http", "HTTP") + path).ok()
    assert made() == PAGE and len(Handler.requests) == requests
    assert [p.name for p in Path("data").iterdir()] == ["d"]


@pytest.mark.parametrize("path, words, requests", [
    ("/missing.txt", "Not Found", 1),
    ("/forbidden.txt", "Forbidden", 1),
    ("/broken.txt", "Service Unavailable", 3),
    ("/latin1.txt", "latin1.txt, line 1: byte 0xe9", 1),
    ("/short.txt", "39999 bytes read, 1 more expected", 3),
    ("/cut.txt", "", 3),
    ("http://127.0.0.1:1/x.txt", "", 0), ("http://no-such-host.invalid/x", "", 0),
    ("ftp://example.org/x", "only http", 0), ("http://127.0.0.1:port/x", "", 0),
    ("/endless.txt", "larger than 0.0 GB", 1), ("/huge.txt", "larger than 0.0 GB", 1),
    ("/dripping.txt", "less than 1 kB", 1), ("/slow.txt", "timed out", 3),
    ("/to_file.txt", "adapters were found for 'file://", 1), ("/to_ftp.txt", "adapters were found for 'ftp://", 1),
])  # fmt: skip
def test_a_url_that_cannot_be_had(tokenize, server, monkeypatch, path, words, requests):
    """A part of a file is never taken for the whole; what may pass is tried again, what may not is not."""
    url = path if "://" in path else server + path
    monkeypatch.setattr(model, "MAX_DOWNLOAD", 1e6)
    monkeypatch.setattr(model, "download", functools.partial(model.download, timeout=0.2))
    tokenize(url).fails_with(url, words)
    assert len(Handler.requests) == requests and nothing_left()


def test_records_are_not_read_from_a_url(cli, tokenize, server):
    url = f"{server}/talks.jsonl"
    for made in (tokenize(url), cli("hf_tokenize", "--dataset", "d", "--hf_dataset", url)):
        made.fails_with(url, "download it first")
    tokenize(f"{url}?download=true").fails_with(url, "download it first")  # as the Hub links to it
    assert not Handler.requests


def test_a_file_of_records_has_no_revision(cli, workdir):
    Path("texts.jsonl").write_text('{"text": "some text"}\n' * 9)
    run = ("hf_tokenize", "--dataset", "d", "--hf_dataset", "texts.jsonl")
    for flag in ("--hf_config", "--hf_revision"):
        cli(*run, flag, "x").fails_with("texts.jsonl", f"leave {flag} out")
    Path("folder").mkdir()
    shutil.move("texts.jsonl", "folder")
    cli(*run[:-1], "folder", "--hf_revision", "x").fails_with("folder", "leave --hf_revision out")


def test_memory_does_not_grow_with_the_text(tokenize, monkeypatch):
    """50 MB of it in less than 45 MB, most of which check the files that were written."""
    monkeypatch.setattr(model.os, "cpu_count", lambda: 2)  # each works on a piece of its own
    text = ("The quick brown fox jumps over the lazy dog, and não se cansa. " * 16 + "\n").encode() * 50_000
    Path("big.txt").write_bytes(text)
    tracemalloc.start()
    tokenize("big.txt").ok()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(text) > 50e6 and peak < 45e6
    assert Path("data/d/data.bin").stat().st_size == 2 * len(text)


def text_data(folder: Path, n: int) -> model.Data:
    """A folder whose token at index i is i % 250."""
    folder.parent.mkdir(exist_ok=True)
    with model.DataWriter(folder, model.byte_tokenizer(), overwrite=False) as writer:
        writer.write(np.arange(n) % 250)
        writer.finish(0.1, "numbers")
    return model.Data(folder)


def every_window(data: model.Data, split: str, block_size: int) -> dict[str, torch.Tensor]:
    windows = data.splits[split].windows(block_size)
    return data.splits[split].batch(windows, range(len(windows)), block_size)


@pytest.mark.parametrize("n, block_size", [(1000, 16), (1000, 7), (177, 16), (178, 16), (176, 16)])
def test_blocks_cover_each_split_and_keep_apart(workdir, n, block_size):
    """By hand: every target of the training split that fits in whole blocks is seen once, and none of validation."""
    data = text_data(workdir / "d", n)
    val_start = n - n // 10
    for split, low, high in (("train", 0, val_start), ("val", val_start, n)):
        blocks = (high - low - 1) // block_size
        if not blocks:
            with pytest.raises(model.UserError, match="validation split"):
                data.splits[split].windows(block_size)
            continue
        batch = every_window(data, split, block_size)
        positions = np.arange(low, low + blocks * block_size).reshape(blocks, block_size)
        assert np.array_equal(batch["idx"], positions % 250)
        assert np.array_equal(batch["targets"], (positions + 1) % 250)
        assert batch["targets"].dtype == batch["idx"].dtype == torch.int64
        assert batch["blocks"].tolist() == list(range(blocks)) and not data.is_chat


@pytest.mark.parametrize("n_blocks, batch_size", [(12, 4), (10, 4), (7, 16), (1, 3)])
def test_every_block_of_an_epoch_is_seen_once(n_blocks, batch_size):
    sampler = model.BlockSampler(n_blocks, batch_size, seed=5)
    epochs = np.concatenate([sampler(step) for step in range(3 * n_blocks)]).reshape(-1, n_blocks)
    assert len(epochs) == 3 * batch_size and all(sorted(epoch) == list(range(n_blocks)) for epoch in epochs)
    if n_blocks > 5:
        assert len({tuple(e) for e in epochs}) == len(epochs)  # each epoch in an order of its own


def test_the_order_depends_on_seed_and_epoch_only():
    def stream(batch: int, seed: int = 1) -> list[int]:
        return np.concatenate([model.BlockSampler(50, batch, seed)(s) for s in range(200 // batch)]).tolist()

    assert stream(4) == stream(8) == stream(20) and stream(4) != stream(4, seed=2)
    assert model.BlockSampler(50, 4, 1)(37).tolist() == stream(4)[37 * 4 : 38 * 4]  # out of order, after a restart
    assert stream(4)[:50] != list(range(50))


def test_the_order_of_more_blocks_than_a_table_should_hold():
    """Truth: each number once, and chances. Places that follow one another lead anywhere, alike in no two epochs."""
    for n in (1, 2, 3, 17, 1000, 4096, 4097):
        order = model.permuted(np.arange(n), n, (1337, 0))
        assert sorted(order) == list(range(n))
        assert np.array_equal(order[::7], model.permuted(np.arange(n)[::7], n, (1337, 0)))  # of each place alone
    n, places = 10**9, np.arange(40_000)
    orders = [model.permuted(places, n, key) for key in ((1, 0), (1, 1), (2, 0))]
    for order in orders:
        assert len(set(order)) == len(order) and order.min() >= 0 and order.max() < n
        for values in (order * 16 // n, order % 16):  # chi-square of 15 degrees of freedom: 45 once in 10,000
            assert ((np.bincount(values, minlength=16) - 2500) ** 2 / 2500).sum() < 45
        jumps = (np.diff(order) % n) * 16 // n
        assert ((np.bincount(jumps, minlength=16) - 2500) ** 2 / 2500).sum() < 45
        assert abs(np.corrcoef(places, order)[0, 1]) < 0.025  # five standard deviations
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 3 and abs(np.corrcoef(a, b)[0, 1]) < 0.025
    fixed = [sum(model.permuted(np.arange(50), 50, (s, 0)) == np.arange(50)) for s in range(400)]
    assert 0.75 < np.mean(fixed) < 1.25  # a random permutation has one fixed point, give or take 1


def test_a_sampler_of_a_billion_blocks_keeps_no_table():
    tracemalloc.start()
    sampler = model.BlockSampler(10**9, 512, seed=5)
    steps = [sampler(step) for step in (0, 1, 10**9 // 512, 10**12)]  # the third spans two epochs
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()
    blocks = np.concatenate(steps)
    assert blocks.dtype == np.int64 and len(set(blocks)) > 2040 and blocks.min() >= 0 and blocks.max() < 10**9
    assert np.array_equal(sampler(1)[:256], model.BlockSampler(10**9, 256, seed=5)(2))


def test_the_order_of_many_blocks():
    """As older runs have it, which must go on the same: np.random.default_rng((1, 0)).permutation(1 << 24)[:4]. What is
    kept of it takes four bytes a block."""
    tracemalloc.start()
    sampler = model.BlockSampler(1 << 24, 4, 1)
    blocks = sampler(0)
    assert tracemalloc.get_traced_memory()[0] < (4 << 24) + 1e6
    tracemalloc.stop()
    assert blocks.dtype == np.int64 and blocks.tolist() == [11646880, 8472321, 7121213, 7752414]


def test_nanogpt_files(workdir):
    """nanoGPT's train.bin and val.bin: uint16, no header; each is a split of its own."""
    Path("nano").mkdir()
    (np.arange(300) % 200).astype("<u2").tofile("nano/train.bin")
    (np.arange(100) % 50).astype("<u2").tofile("nano/val.bin")
    for spec in ("nano", "nano/train.bin"):
        train, val = every_window(data := model.open_data(spec, "byte"), "train", 16), every_window(data, "val", 16)
        assert len(train["idx"]) == 18 and len(val["idx"]) == 6
        assert val["idx"][:2].tolist() == [list(range(16)), list(range(16, 32))]
        assert train["targets"][10].tolist() == list(range(161, 177))
    np.full(1000, 7, "<u2").tofile("alone.bin")
    assert len(model.open_data("alone.bin", "byte").splits["train"].tokens) == 900
    with pytest.raises(model.UserError, match="learned from text"):
        model.open_data("alone.bin", "bpe")


def test_ids_that_the_tokenizer_lacks(cli, gpt2):
    """Told when the data is opened if they are in its sample, of each 5,000 tokens here the first 4,096; the others
    before a model reads them."""
    Path("data/nano").mkdir(parents=True)
    tokens = np.arange(5_000_000, dtype="<u2") % 250
    tokens[:9000].tofile("data/nano/train.bin")
    tokens[4_200] = 60_000
    tokens.tofile("data/nano/val.bin")
    split, lacks = model.Data(Path("data/nano")).splits["val"], "token id 60000, but .* ends at 50258"
    split.batch(range(0, 10**6, 100), [1, 40, 43], 100)
    with pytest.raises(model.UserError, match=lacks):
        split.batch(range(0, 10**6, 100), [1, 41, 43], 100)  # as a target
    save_model("gpt2.pt", model.GPT(tiny_config(vocab_size=gpt2.n_vocab, n_embd=4)), gpt2)
    assert re.search(lacks, cli("eval", "--model_checkpoint", "gpt2.pt", "--data", "nano", "--device", "cpu").error)

    tokens[4_200], tokens[4_999_000] = 0, 60_000
    tokens.tofile("data/nano/val.bin")
    words = "the validation split of data/nano has token id 60000, but tokenizer gpt2 .* ends at 50258: .*--tokenizer"
    assert re.fullmatch(words, cli("train", "--data", "nano", *TINY_RUN, "--max_iters", 1).error)


def test_text_in_data_is_made_once_and_found_again(workdir, text_file):
    first = model.open_data("input.txt", "byte")
    made_at = Path("data/input/meta.json").stat().st_mtime_ns
    for spec in ("input.txt", "input", "data/input", "data/input/data.bin", None):  # without a name: the newest
        again = model.open_data(spec, "byte")
        assert again.digest == first.digest and again.folder == Path("data/input")
    assert Path("data/input/meta.json").stat().st_mtime_ns == made_at
    text_file.write_text("something else " * 100)
    with pytest.raises(model.UserError, match="made from other data"):
        model.open_data("input.txt", "byte")


def test_the_newest_data_is_none_that_is_being_written(workdir):
    """A kill just before the files go into place leaves all of them beside the folder."""
    text_data(Path("data/d"), 5000)
    shutil.copytree("data/d", "data/.e.part")
    Path("data/.e.part/meta.json").touch()
    assert model.open_data(None).folder == Path("data/d")


def test_the_data_of_published_commands(workdir):
    """--data _data_NAME_/data.bin is data/NAME/."""
    for folder in (Path("data/d"), Path("data/two_words")):
        text_data(folder, 5000)
        for spec in (f"_data_{folder.name}_/data.bin", f"_data_{folder.name}_"):
            assert model.open_data(spec).folder == folder


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
    assert (meta.n_tokens, meta.val_start) == (37, 34)  # not within a conversation
    return model.Data(workdir / "chat")


def test_conversations_are_packed_whole(conversations):
    assert conversations.is_chat
    # 9 = 3 + 4 + 2 fit exactly; 15 do not; 6 and 4 do not fit together
    assert conversations.splits["train"].windows(8).tolist() == [0, 9, 24, 30]
    assert conversations.splits["val"].windows(8).tolist() == [0]
    batch = every_window(conversations, "train", 8)
    idx, targets, documents = (batch[k].tolist() for k in ("idx", "targets", "documents"))
    assert idx[0] == [10, 11, 12, 20, 21, 22, 23, 30]
    assert targets[0] == [11, 12, -1, -1, 22, -1, -1, 31]  # never a first token, never where the mask is 0
    assert idx[1] == list(range(100, 108)) and targets[1] == list(range(101, 109))
    assert documents[:4] == [3, 4, 1, 8] and sum(documents) == 4 * 8  # of the first two rows, and of all
    assert idx[2][:6] == [50, 51, 52, 53, 54, 55] and targets[2] == [51, -1, 53, -1, 55, -1, -1, -1]
    assert idx[3][:4] == [60, 61, 62, 63] and targets[3] == [61, 62, 63, -1, -1, -1, -1, -1]  # validation is not in it
    val = every_window(conversations, "val", 8)
    assert val["idx"][0, :3].tolist() == [70, 71, 72] and val["targets"][0].tolist() == [-1, 72] + [-1] * 6


def test_random_conversations_are_all_seen_once(workdir):
    """Every wanted token of conversations that fit a window is a target exactly once, over all windows."""
    rng = np.random.default_rng(0)
    conversations = [(rng.integers(0, 256, n), rng.integers(0, 2, n)) for n in rng.integers(2, 18, 200)]
    write_conversations(workdir / "chat", conversations, val_fraction=0.2)
    targets = [every_window(model.Data(workdir / "chat"), split, 17)["targets"].flatten() for split in ("train", "val")]
    found, expected = torch.cat(targets), np.concatenate([ids[1:][mask[1:] == 1] for ids, mask in conversations])
    assert found[found >= 0].tolist() == expected.tolist() and len(expected) > 500


def with_changes(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize("name, damage, words", [
    ("data.bin", lambda content: content[:-10], "truncated"),
    ("data.bin", lambda content: content + b"\1\0", "truncated or replaced"),
    ("data.bin", lambda content: b"", "empty"),
    ("data.bin", None, "no such file"),
    ("meta.json", with_changes(format_version=model.FORMAT_VERSION + 1), "newer"),
    ("meta.json", lambda content: b"{", "JSON"),
    ("meta.json", lambda content: b"[]", "meta.json"),
    ("meta.json", lambda content: b'{"title": "my notes"}', "meta.json"),
    ("meta.json", with_changes(tokenizer={}), "meta.json"),
])  # fmt: skip
def test_a_damaged_data_folder(cli, name, damage, words):
    text_data(Path("data/d"), 5000)
    file = Path("data/d") / name
    file.write_bytes(damage(file.read_bytes())) if damage else file.unlink()
    assert words in cli("train", "--data", "d", *TINY_RUN, "--max_iters", 1).error
    assert not list(Path("checkpoints").glob("*"))


def test_two_programs_that_open_one_text_make_its_data_once(cli, text_file, monkeypatch):
    """The second comes while the first is at work."""
    made, working, finish = [], threading.Event(), model.DataWriter.finish

    def slow(*args):
        made.append(args)
        working.set()
        time.sleep(0.3)
        return finish(*args)

    monkeypatch.setattr(model.DataWriter, "finish", slow)
    first = threading.Thread(target=model.open_data, args=("input.txt", "byte"))
    first.start()
    assert working.wait(10) and not Path("data/input/meta.json").exists()
    assert text_of(model.open_data("input.txt", "byte")) == text_file.read_text()
    first.join()
    assert len(made) == 1 and [p.name for p in Path("data").iterdir()] == ["input"]


def test_progress_is_saved_again_before_anything_new_is_written(tmp_path):
    """A writer that was killed after its last progress, twice: the second has added nothing."""
    folder, tokenizer = tmp_path / "twice", model.byte_tokenizer()
    for new in (range(10), (), range(10, 15)):
        writer = model.DataWriter(folder, tokenizer, False, "key")
        writer.write(np.array(new, np.int64))
        writer.save_progress(None)
        writer.write(np.arange(100))
        writer.close()
    with model.DataWriter(folder, tokenizer, False, "key") as writer:
        writer.finish(0.0, "twice")
    assert model.Data(folder).splits["train"].tokens.tolist() == [*range(15)]
