"""The command line: the published commands work, and every mistake ends in one sentence with nothing lost."""

import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import timeit
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
from conftest import BYTES, ROOT, TINY_RUN, TRAIN, Cli, checkpoint_of, contents, model_py, program, text_of

import model


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The files of a short run, RoPE, bytes, a context of 16: data/ and checkpoints/."""
    folder = tmp_path_factory.mktemp("trained")
    text = (ROOT / "model.py").read_text()[:20_000]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("input.txt").write_text(text)
        Cli(patch)(*TRAIN, "--arch", "llama", "--max_iters", 4).ok()
    return folder


@pytest.fixture
def run_files(trained, workdir) -> Path:
    """A copy of that run in the current folder."""
    shutil.copytree(trained, workdir, dirs_exist_ok=True)
    return workdir


@pytest.fixture
def refused(cli):
    """Run a command that must fail: its sentence. No file may be changed, lost or left half-written."""

    def run(*args) -> str:
        before = contents()
        error = cli(*args).error
        assert before.items() <= contents().items()
        assert not list(Path().rglob(".*"))  # what is being written has a hidden name
        assert len(error) > 15 and "\n" not in error
        return error

    return run


# --- What works


def test_the_quickstart(cli, workdir, monkeypatch):
    """train with nothing at hand makes data of Python's library (here a part of it), and sample works right after."""
    library = Path("library")
    (library / "site-packages").mkdir(parents=True)
    for name in ("argparse", "textwrap", "tempfile"):
        shutil.copy(Path(os.__file__).with_name(f"{name}.py"), library)
    (library / "site-packages" / "other.py").write_text("never_this = 1\n" * 100)
    (library / "latin.py").write_bytes(b"# caf\xe9\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    short = ("--max_iters", 3, "--batch_size", 2, "--eval_tokens", 128)
    out = cli("train", "--variant", "7M", *short).ok().out
    data = model.Data(Path("data/python_stdlib"))
    text = text_of(data)
    assert out.count("no --data given") == 1 and "python_stdlib" in out
    assert "class ArgumentParser" in text and "never_this" not in text and data.tokenizer.kind == "bpe"
    sampled = cli("sample", "--prompt", "def ", "--length", 20).ok()
    assert sampled.out.startswith("def ") and "7M_model.pt" in sampled.err
    made = Path("data/python_stdlib/meta.json").stat().st_mtime_ns
    cli("train", *TINY_RUN, "--max_iters", 1, "--name", "second").ok()
    assert Path("data/python_stdlib/meta.json").stat().st_mtime_ns == made


def test_sample(cli, run_files):
    flags = ("--length", 20, "--dtype", "float32", "--temperature", 0.7, "--seed", 3)
    first = cli("sample", "--prompt", "ab", *flags).ok().out
    assert first == cli("sample", "--prompt", "ab", *flags).ok().out
    assert first == cli("sample", *flags, stdin=b"ab").ok().out  # standard input is the prompt
    assert first != cli("sample", "--prompt", "ab", *flags[:-1], 4).ok().out
    assert first == cli("sample", "--prompt", "ab", *flags, "--model_checkpoint", "checkpoints/7M_model.pt").ok().out
    assert cli("sample", "--prompt", "ab", *flags, "--num_samples", 3).ok().out.count("ab") >= 3
    cli("sample", "--prompt", "", "--length", 3).ok()
    long = ("--length", 100, "--rope_scaling", "yarn", "--rope_factor", 8)
    cli("sample", "--prompt", "x" * 100, *long).ok()  # six times the trained context


def test_sample_takes_the_newest_checkpoint(cli, run_files):
    shutil.copy("checkpoints/7M_model.pt", "checkpoints/other_model.pt")
    os.symlink("gone.pt", "checkpoints/dead_link_model.pt")  # of a model that was removed or is on another disk
    assert cli("sample", "--model_checkpoint", "other", "--prompt", "a", "--length", 2).ok()
    for old, new in (("7M", "other"), ("other", "7M")):
        os.utime(f"checkpoints/{old}_model.pt", (1, 1))
        os.utime(f"checkpoints/{new}_model.pt")
        assert f"{new}_model.pt" in cli("sample", "--prompt", "a", "--length", 2).ok().err


def test_requirements_are_the_script_metadata():
    """`uv run model.py` and `pip install -r requirements.txt` install the same, for the Pythons that README names."""
    head = re.match(r"# /// script\n(.*?)# ///\n", (ROOT / "model.py").read_text(), re.S).group(1)
    toml = "".join(line[2:] + "\n" for line in head.splitlines())
    dependencies = re.findall(r'^\s+"(.+)",$', toml.split("dependencies = [")[1], re.M)
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert dependencies == requirements and all("==" in r for r in requirements)
    oldest = re.search(r'requires-python = ">=(.+)"', toml).group(1)
    assert f"needs Python {oldest} or newer" in (ROOT / "README.md").read_text()
    assert f"py{oldest.replace('.', '')}" in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("command", model.COMMANDS)
def test_help_ends_with_an_example(cli, command):
    result = cli(command, "--help").ok()
    assert cli("help", command).ok().out == result.out
    assert cli("--help_all", command).ok().out == cli(command, "--help_all").ok().out
    last = result.out.rstrip().splitlines()[-1]
    examples = result.out.split("examples:\n")[1].replace("\\\n", " ")
    assert last.strip() in examples and f"model.py {command}" in examples
    used = {f for line in examples.splitlines() for f in re.findall(r"(?<![\w-])--(\w+)", line.split("model.py")[-1])}
    lines = [line for line in result.out.splitlines() if re.match(r"\s+-", line)]
    assert used <= {flag for line in lines for flag in re.findall(r"--(\w+)", line)}


def test_help_lists_the_variants_with_their_sizes(cli):
    text = cli("train", "--help").ok().out
    for variant, shape in model.VARIANTS.items():
        (line,) = [x for x in text.splitlines() if x.startswith(f"{variant} ")]
        size = model.count_parameters(model.make_config(variant, 6400 if variant == "26M" else 50259, {}))
        assert f"{size / 1e6:.1f}M" in line and f" {shape['n_embd']} " in line and "GB" in line


@pytest.mark.parametrize("shown, busy", [("0.0 0.0 0.0 1/77 5", False), ("0.0 0.0 0.0 3/77 5", True), ("", False)])
def test_whether_other_programs_are_at_work(monkeypatch, shown, busy):
    """The fourth word of Linux's /proc/loadavg begins with how many threads run now, the asking one among them."""
    monkeypatch.setattr(model.Path, "read_text", lambda path: shown)
    assert model.others_at_work() == busy


def test_a_closed_pipe_is_no_error(run_files):
    """sample | head: no traceback, no complaint."""
    command = f'"{sys.executable}" "{ROOT / "model.py"}" sample --prompt abc --length 400 | head -c 2'
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert run.stdout == "ab"
    assert "error" not in run.stderr.lower() and "Traceback" not in run.stderr, run.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/full")
def test_words_for_a_full_disk_are_one_error(run_files):
    """Not a second one from Python's shutdown, with an exit status of its own."""
    with open("/dev/full", "w") as full:
        env = {**os.environ, "PYTHONUNBUFFERED": ""}
        run = program("sample", "--prompt", "abc", cwd=".", capture_output=False, stdout=full, stderr=-1, env=env)
    said = run.stderr.decode().splitlines()
    assert run.returncode == 1 and said[-1].startswith("model.py sample: error: [Errno 28]"), said


@pytest.mark.parametrize("nowhere", ["> /dev/full", ">&-", "2>&-", ">&- 2>&-"])
def test_a_run_whose_words_nobody_can_read_goes_on(run_files, nowhere):
    """Its disk is full, or its terminal is closed."""
    words = ("train", "--data", "input", "--name", "new", *map(str, TINY_RUN), "--max_iters", "2", "--device", "cpu")
    command = f"{shlex.join([sys.executable, str(ROOT / 'model.py'), *words])} {nowhere}"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    assert checkpoint_of("new")["step"] == 2


WHAT_COMES_LATE = """
import os, sys
class Late:
    def __del__(self, abort=os.abort):
        abort()
late = Late() if "train" in sys.orig_argv and "-m" not in sys.orig_argv else None  # not in torchrun itself
"""
REPORTER = """
import atexit
Html = str
def init(**settings):
    atexit.register(print, "the reporter has finished")
    return type("Client", (), {"log": lambda *values, **more: None})
"""


@pytest.mark.parametrize("by", [(), ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")])
def test_python_is_not_taken_apart_after_a_run(run_files, by):
    """What aborts by then makes no failure of a run that is done; exit functions have been called, as a reporter's, and
    their words arrive."""
    Path("sitecustomize.py").write_text(WHAT_COMES_LATE)
    Path("trackio.py").write_text(REPORTER)
    train = ("train", "--data", "input", "--name", "new", *TINY_RUN, "--max_iters", 2, "--report_to", "trackio")
    command = [sys.executable, *by, *model_py(*train)[1:]]
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "PYTHONUNBUFFERED": ""}
    done = subprocess.run(command, env=env, check=True, timeout=120, stdout=subprocess.PIPE, text=True)
    assert done.stdout.endswith("\nthe reporter has finished\n")


def test_a_program_that_runs_this_one_ends_as_it_likes(workdir):
    """A profiler, IPython or a script of one's own, whose exit status is not that of its last command."""
    code = f"import runpy; runpy.run_path({str(ROOT / 'model.py')!r}, run_name='__main__'); raise SystemExit(3)"
    assert subprocess.run([sys.executable, "-c", code, "variants"], check=False, timeout=120).returncode == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no such signals")
def test_ctrl_c_while_the_program_starts(workdir):
    """It ends at once, without a traceback."""
    foreground = "import os, signal, typing\nsignal.signal(2, signal.default_int_handler)\n"  # as a terminal starts it
    interrupt = "typing.dataclass_transform = lambda **options: os.kill(os.getpid(), 2)\n"
    Path("sitecustomize.py").write_text(foreground + interrupt)
    run = program("train", cwd=workdir, env={**os.environ, "PYTHONPATH": str(workdir)}, text=True)
    assert run.returncode == -signal.SIGINT and run.stderr == ""


def test_debug_shows_the_traceback(cli):
    result = cli("sample", "--model_checkpoint", "nope.pt", "--debug")
    assert result.code == 1 and "Traceback" in result.err


# --- Wrong text and data


@pytest.fixture
def wrong_files(workdir) -> None:
    """Text, and files that are none."""
    files = {
        "input.txt": b"text " * 1000, "ten.txt": b"x" * 10, "two_hundred.txt": b"x" * 200, "empty.txt": b"",
        "image/image.png": b"\x89PNG\x00\x00", "empty.bin": b"", "odd.bin": b"\x01\x00" * 500 + b"\x01",
        "random.bin": np.random.default_rng(0).bytes(4000) + b"\xff\xff",
        "300.bin": np.array([1, 2, 300, 4] * 500, "<u2").tobytes(),
    }  # fmt: skip
    Path("folder/sub").mkdir(parents=True)
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)


TOKENIZE = "tokenize --dataset d --txt"
WRONG_DATA = [  # --tokenizer byte, unless it names another
    (f"{TOKENIZE} nope.txt", ["nope.txt"]), ("train --data nope.txt", ["nope.txt"]),
    (f"{TOKENIZE} empty.txt", ["empty"]), ("train --data empty.txt", ["empty"]),
    (f"{TOKENIZE} -", ["empty"]),  # nor is there anything in standard input
    (f"{TOKENIZE} folder", ["directory without text"]), (f"{TOKENIZE} image", ["directory without text"]),
    ("train --data folder", ["neither meta.json nor train.bin"]),
    ("train --data image", ["neither meta.json nor train.bin"]),
    ("train --data ten.txt --block_size 32", ["the training split", "--block_size"]),
    ("train --data two_hundred.txt --block_size 32", ["the validation split", "--block_size"]),
    ("train --data 300.bin", ["300", "258", "--tokenizer"]), ("train --data odd.bin", ["truncated"]),
    ("train --data empty.bin", ["empty"]), ("train --data random.bin", ["another tokenizer"]),
    (f"{TOKENIZE} input.txt --tokenizer nope", ["nope"]),
    (f"{TOKENIZE} input.txt --tokenizer ./nope/tokenizer.json", ["nope"]),
    (f"{TOKENIZE} input.txt --tokenizer bpe --vocab_size 100", ["259"]),
    ("train --data input.txt --tokenizer byte --vocab_size 300", ["--vocab_size is for --tokenizer bpe"]),
]  # fmt: skip


@pytest.mark.parametrize("command, words", WRONG_DATA, ids=[command for command, _ in WRONG_DATA])
def test_wrong_text_and_data(refused, wrong_files, command, words):
    error = refused(*command.split(), *(() if "--tokenizer" in command else ("--tokenizer", "byte")))
    assert all(word in error for word in words), error
    if "--block_size" in command:  # it is data all the same, but too little for a run
        assert not list(Path("checkpoints").iterdir())
    else:
        assert not Path("checkpoints").exists() and not list(Path().rglob("meta.json"))


def test_a_name_that_is_no_data_set_lists_those_there_are(refused, run_files):
    assert "input" in refused("train", "--data", "nope", "--name", "new")


def test_asking_for_another_tokenizer_than_the_datas(cli, refused, run_files):
    """Not silently trained with the one that the data has."""
    Path("theirs").mkdir()
    model.train_bpe(["some text"], 300).backend.save("theirs/tokenizer.json")
    for name in ("gpt2", "theirs"):
        error = refused("train", "--data", "input", "--tokenizer", name, *TINY_RUN, "--max_iters", 1, "--name", "new")
        assert "byte" in error and name in error
    assert "unknown tokenizer 'gtp2'" in refused("train", "--data", "input", "--tokenizer", "gtp2", "--name", "new")
    cli("train", "--data", "input", "--tokenizer", "7M_model.pt", *TINY_RUN, "--max_iters", 1, "--name", "new").ok()


def test_resuming_with_other_data_or_another_tokenizer(cli, refused, run_files):
    """Not silently with the ones that the run has."""
    resume = ("train", "--resume", "--max_iters", 9)
    Path("other.txt").write_text("other text " * 500)
    cli("tokenize", "--dataset", "other", "--txt", "other.txt", "--tokenizer", "byte").ok()
    assert "contents differ" in refused(*resume, "--data", "other")
    cli("tokenize", "--dataset", "bpe", "--txt", "input.txt", "--tokenizer", "bpe", "--vocab_size", 300).ok()
    error = refused(*resume, "--data", "bpe")
    assert "bpe-300" in error and "byte" in error
    assert "gpt2" in refused(*resume, "--tokenizer", "gpt2")
    cli(*resume, "--tokenizer", "byte").ok()


# --- Wrong settings

WRONG = [
    ("--n_head 7", "n_head 7"), ("--n_head 4 --n_kv_head 3", "n_kv_head 3"),
    ("--rope_scaling yarn --rope_factor 2", "rope"), ("--arch llama --rope_pct 0.1", "rope_pct"),
    ("--arch llama --head_dim 2 --rope_scaling ntk --rope_factor 2", "rope"),
    ("--arch llama --rope_theta 1 --rope_scaling yarn --rope_factor 2", "rope_theta"),
    ("--arch llama --rope_scaling yarn --rope_factor 2 --rope_beta_fast 1e308", "rope_beta_fast"),
    ("--logit_softcap 1e308", "logit_softcap"),
    ("--batch_size 6 --grad_accum 4", "grad_accum"), ("--device meta", "device meta is not available here"),
    ("--device cuda:x", "unknown device 'cuda:x': choose auto, cpu, cuda, cuda:1 or mps"),
    ("--attn_implementation flash_attention_2", "flash-attn"), ("--name a/b", "name"), ("--name ../x", "name"),
     ("--name ..", "name"),
]  # fmt: skip


@pytest.mark.parametrize("flags, word", WRONG, ids=[flags for flags, _ in WRONG])
def test_wrong_settings(refused, text_file, flags, word):
    """Found before data is made or a run is begun."""
    assert word in refused(*TRAIN, "--max_iters", 1, *flags.split())
    assert not list(Path().rglob("*.pt")) and not list(Path().rglob("*.jsonl"))


HUGE = 99999999999999999999
OUT_OF_RANGE = {
    "train": dict(
        n_layer=[0, 10**9], n_head=[0], n_kv_head=[-1], n_embd=[-32, 10**9], head_dim=[-8], n_inner=[-4],
        block_size=[0, 10**9], vocab_size=[10**9], rope_pct=[-1, 2], rope_theta=[0], rope_factor=[0.5], norm_eps=[-1],
        resid_pdrop=[1.0], attn_pdrop=[-0.1], logit_softcap=[-1], batch_size=[0, 10**9], grad_accum=[0],
        max_iters=[0, -5, HUGE], epochs=[-1, "inf"], learning_rate=[-1, "nan", "inf"], beta2=[1.5], grad_clip=[-1],
        weight_decay=[-2, -0.1], warmup_iters=[-7], decay_fraction=[2, -0.4], eval_interval=[-1], eval_tokens=[-1],
        log_interval=[0], seed=[-1, HUGE],
    ),
    "distill --teacher_model_path nowhere.pt": dict(
        alpha=[-0.1, 1.1, "nan"], temperature=[0, -1, "nan", "inf"], beta=[2], on_policy=[1.5], cache_teacher=[-1],
    ),
    "finetune": dict(lora_rank=[-2]),
    "tokenize --dataset d --txt x": dict(val_fraction=[-1, -0.1, 1.0, 2, "nan"]),
    "hf_tokenize --dataset d --hf_dataset x": dict(num_proc=[10**6]),
    "sample --prompt a": dict(
        temperature=[-0.5, "nan"], top_k=[-1], top_p=[0, 1.5], min_p=[-0.1, 2], repetition_penalty=[0], length=[0, -1],
        num_samples=[0], rope_factor=[0.5], seed=[HUGE],
    ),
    "eval": dict(stride=[0, -1], block_size=[0, -4]),
}  # fmt: skip


@pytest.mark.parametrize("command, name, value", [
    (command, name, value) for command, names in OUT_OF_RANGE.items() for name, values in names.items()
    for value in values
])  # fmt: skip
def test_numbers_out_of_range(cli, command, name, value):
    """Before anything is opened or made: none of the files that these commands would read is there."""
    error = cli(*command.split(), f"--{name}", value).error
    assert error.startswith(f"{name} is ") and "must be" in error
    assert not list(Path().iterdir())


@pytest.mark.parametrize("flags, words", [
    ("--variant 8M", ["8M", *model.VARIANTS]), ("--arch bert", ["bert"]), ("--pos_embd alibi", ["alibi"]),
    ("--n_layer two", ["two"]), ("--tie_word_embeddings perhaps", ["perhaps"]), ("--dtype int8", ["int8"]),
    ("--no_such_flag 1", ["no_such_flag"]), ("8M", ["'8M' does not belong to a flag (did you mean --data 8M?)"]),
    ("7M", ["(did you mean --variant 7M?)"]),
    ("--lr 1", ["--lr (did you mean --learning_rate?)"]),
    ("--n_head=2 --n_layr=2", ["--n_layr=2 (did you mean --n_layer?)"]),
])  # fmt: skip
def test_wrong_usage_is_exit_status_2(cli, flags, words):
    assert "(the command comes first)" in cli("--variant", "7M", "train").err
    assert "-p (did you mean --prompt?)" in cli("sample", "-p", "Hello").error
    assert "(did you mean --model_checkpoint a.pt?)" in cli("eval", "a.pt").error
    assert cli("train", "--zzzqqq", "3").error == "unknown flag --zzzqqq"
    result = cli("train", *flags.split())
    assert all(word in result.error for word in words) and result.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("command", ["train --data input --name new", "sample --prompt a"])
def test_a_device_that_is_not_there(refused, run_files, command):
    assert "--device cpu" in refused(*command.split(), "--device", "cuda")
    if not torch.backends.mps.is_available():
        assert "mps" in refused(*command.split(), "--device", "mps")


# --- Checkpoints


def test_a_run_in_the_way(cli, refused, run_files):
    error = refused("train", "--data", "input", *TINY_RUN, "--max_iters", 4)
    assert all(word in error for word in ("7M_model", "--resume", "--overwrite", "--name"))
    cli("train", "--data", "input", *TINY_RUN, "--max_iters", 2, "--overwrite").ok()
    assert checkpoint_of()["step"] == 2


def test_a_run_is_replaced_or_gone_on_with(refused, run_files):
    error = refused("train", "--data", "input", *TINY_RUN, "--max_iters", 9, "--resume", "auto", "--overwrite")
    assert "--resume" in error and "--overwrite" in error
    assert "plain name" in refused("train", "--data", "input", "--name", "a\udcff", *TINY_RUN)


def test_a_text_that_was_moved_with_its_data_is_known(cli, run_files):
    """The fixture has moved them."""
    assert "tokenizer byte; validation" not in cli(*TRAIN, "--max_iters", 1, "--name", "new").ok().out
    Path("input.txt").write_text("another text " * 1000)
    assert "made from other data than input.txt" in cli(*TRAIN, "--max_iters", 1, "--name", "other").error


def test_nothing_to_go_on_with(refused, text_file):
    assert "nothing to resume" in refused("train", *BYTES, "--resume")
    assert "train" in refused("sample", "--prompt", "a")
    assert "nope.pt" in refused("sample", "--prompt", "a", "--model_checkpoint", "nope.pt")
    assert "is not a checkpoint" in refused("sample", "--prompt", "a", "--model_checkpoint", "input.txt")
    assert not Path("checkpoints").exists()


class Malicious:
    """Unpickling it makes a file."""

    def __reduce__(self):
        return (open, ("owned.txt", "w"))


def altered(part: str, key: str, value=None):
    """A good checkpoint with another value in a part of it, or without one."""

    def make(path: Path, good: dict) -> None:
        good[part][key] = value
        if value is None:
            del good[part][key]
        model.save_checkpoint(path, good)

    return make


THEIRS = {"model": {"w": torch.ones(3)}, "model_args": {}, "iter_num": 5}
NEWER = {"format_version": model.FORMAT_VERSION + 1}
BAD = {  # how the file is made, perhaps of a good checkpoint's content, and what is said of it
    "text": (lambda path, good: path.write_text("this is no checkpoint"), "not a checkpoint"),
    "empty": (lambda path, good: path.write_bytes(b""), "not a checkpoint"),
    "random": (lambda path, good: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not a checkpoint"),
    "zip": (lambda path, good: shutil.move(shutil.make_archive("archive", "zip", "data"), path), "not a checkpoint"),
    "folder": (lambda path, good: path.mkdir(), "bad.pt"),
    "a pickle that runs code": (lambda path, good: path.write_bytes(pickle.dumps(Malicious())), "not a checkpoint"),
    "a checkpoint that runs code": (lambda path, good: torch.save(good | {"x": Malicious()}, path), "not a checkpoint"),
    "another program's": (lambda path, good: torch.save(THEIRS, path), "lacks"),
    "a state dictionary": (lambda path, good: torch.save(good["model"], path), "lacks"),
    "a tensor": (lambda path, good: torch.save(torch.ones(3), path), "holds Tensor"),
    "a newer version": (lambda path, good: model.save_checkpoint(path, NEWER | {"weights": {}}), "newer"),
    "a missing tensor": (altered("model", "blocks.1.mlp.fc.weight"), "blocks.1.mlp.fc.weight"),
    "an extra tensor": (altered("model", "blocks.2.mlp.fc.weight", torch.ones(2)), "blocks.2.mlp.fc.weight"),
    "a misshapen tensor": (altered("model", "wte.weight", torch.ones(2, 2)), "size mismatch for wte.weight"),
    "an unknown setting": (altered("config", "n_experts", 4), "bad.pt"),
    "an impossible setting": (altered("config", "n_head", 7), "n_head 7"),
    "no tokenizer": (lambda path, good: model.save_checkpoint(path, good | {"tokenizer": {}}), "bad.pt"),
}


@pytest.mark.parametrize("make, words", BAD.values(), ids=BAD)
def test_a_bad_checkpoint(refused, run_files, make, words):
    make(Path("bad.pt"), checkpoint_of(last=False))
    assert words in refused("sample", "--prompt", "a", "--model_checkpoint", "bad.pt")
    assert not Path("owned.txt").exists()


@pytest.mark.parametrize("kind", ["empty", "a checkpoint that runs code", "a newer version", "a missing tensor"])
def test_resuming_from_a_bad_checkpoint(refused, run_files, kind):
    Path("checkpoints/7M_model_last.2.pt").unlink()
    make, _ = BAD[kind]
    make(Path("checkpoints/7M_model_last.pt"), checkpoint_of())
    assert "7M_model_last.pt" in refused("train", "--resume", "--max_iters", 9)
    assert not Path("owned.txt").exists()


def test_the_wrong_variant(refused, run_files):
    error = refused("sample", "--prompt", "a", "--variant", "7M")
    assert "n_layer is 2" in error and "7M" in error


# --- Sampling


@pytest.mark.parametrize("stop", ["\n", "\\n"])
def test_a_stop_string_as_a_shell_passes_it(cli, run_files, monkeypatch, stop):
    """--stop "\\n", as the help shows it, reaches a program as a backslash and an n."""
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: iter(torch.tensor([[b] for b in b"one\ntwo"])))
    assert cli("sample", "--prompt", "a ", "--stop", stop).ok().out == "a one\n"


def test_a_prompt_longer_than_the_context(cli, run_files):
    result = cli("sample", "--prompt", "a" * 17)
    assert "17 tokens" in result.error and "context is 16" in result.error and "--rope_scaling" in result.error
    cli("sample", "--prompt", "a" * 16, "--length", 3).ok()


def test_a_prompt_that_is_not_utf8(cli, run_files):
    """Bytes that are no text: as Python makes them of an argument, and from standard input."""
    for flags, typed in (("--prompt", os.fsdecode(b"a\xffb")), b""), ((), b"a\xffb"):
        assert cli("sample", "--length", 3, *flags, stdin=typed).ok().out.startswith("a")


# --- Places that cannot be written, a vocabulary that cannot be had


def test_no_permission_to_write(refused, text_file):
    """A file where a folder should be stops even the superuser."""
    Path("data").write_text("")
    assert "data" in refused("tokenize", "--dataset", "d", "--txt", text_file, "--tokenizer", "byte")
    assert "data" in refused(*TRAIN)
    Path("data").unlink()
    Path("checkpoints").write_text("")
    assert "checkpoints" in refused(*TRAIN, "--max_iters", 1)


def test_no_vocabulary_and_no_network(refused, text_file, monkeypatch):
    """Files are looked at before the vocabulary that they would need."""

    def unreachable(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    assert "--tokenizer bpe" in refused("tokenize", "--dataset", "d", "--txt", text_file)
    Path("empty.txt").write_text("")
    for source in ("empty.txt", "nope.txt"):
        assert source in refused("tokenize", "--dataset", "d", "--txt", source)
    Path("folder").mkdir()
    assert "neither meta.json nor train.bin" in refused("train", "--data", "folder")
    assert not Path("data/d").exists()


def test_variants(cli, monkeypatch):
    """A billion tokens take what their FLOPs take at the speed that is printed: for the 7M by hand, 6 FLOPs a weight of
    its matrices, 12 x 4 layers x 128 wide x 128 tokens of attention."""
    measure = timeit.repeat
    monkeypatch.setattr(timeit, "repeat", lambda work, **times: measure(work, repeat=1, number=1))
    out = cli("variants").ok().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    speed, share, peak = (int(n.replace(",", "")) for n in re.findall(r"([\d,]+)(?: GFLOP/s|%| that a)", out))
    assert speed > 0 and peak > 0 and abs(share - 100 * speed / peak) < 4
    flops = 6 * (50304 * 128 + 4 * (4 * 128 * 128 + 3 * 128 * 384)) + 12 * 4 * 128 * 128
    for name, factor in (("7M", 1.0), ("300M", 2.08e9 / flops)):
        amount, unit = re.findall(r"([\d.,]+) (hours|days)$", lines[name])[0]
        hours = float(amount.replace(",", "")) * {"hours": 1, "days": 24}[unit]
        expected = factor * flops * 1e9 / (speed * 1e9) / 3600
        assert abs(hours - expected) < max(0.05 * expected, 13 if unit == "days" else 0.1)
