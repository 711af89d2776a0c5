"""The long campaigns behind tests/RELIABILITY.md: kills, damage, hostile inputs, and an hour of training.

python tests/benchmarks/reliability.py kill --trials 200      kill -9 of a training run at random moments
python tests/benchmarks/reliability.py aimed                  ... before every rename and fsync that it makes
python tests/benchmarks/reliability.py commands --trials 50   ... of tokenize, hf_tokenize, distill, export and finetune
python tests/benchmarks/reliability.py damage --trials 200    flipped bits and truncations of every kind of file
python tests/benchmarks/reliability.py fuzz --trials 2000     damaged and hostile files and command lines
python tests/benchmarks/reliability.py guided --trials 1000   the same, guided by coverage (pip install atheris)
python tests/benchmarks/reliability.py long --minutes 60      memory and open files of a run that saves every minute
python tests/benchmarks/reliability.py chat --trials 500      memory of a conversation

Each prints what was counted, and ends with status 1 if a promise was broken. All of it in a temporary folder.
"""

import argparse
import contextlib
import hashlib
import io
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

SHAPE = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 16 --batch_size 4 --dtype float32 --device cpu "
         "--compile false --eval_tokens 256 --sample_interval -1").split()  # fmt: skip
BEGIN = ["train", "--data", "input.txt", "--tokenizer", "byte", *SHAPE, "--max_iters", "400", "--eval_interval", "20",
         "--log_interval", "5"]  # fmt: skip
TRAIN = [*BEGIN, "--name", "run", "--resume", "auto"]
DISTILL = ["distill", "--teacher_model_path", "checkpoints/teacher_model.pt", "--student_variant", "7M", "--data",
           "input", *SHAPE, "--cache_teacher", "8", "--max_iters", "150", "--eval_interval", "20", "--name", "student",
           "--resume", "auto"]  # fmt: skip
FINETUNE = ["finetune", "--model_checkpoint", "teacher_model.pt", "--data", "talks", *SHAPE[6:], "--block_size", "64",
            "--max_iters", "150", "--eval_interval", "20", "--name", "tuned", "--resume", "auto"]  # fmt: skip
COMMANDS = {  # name -> (the command, what it makes)
    "tokenize": (["tokenize", "--dataset", "made", "--txt", "input.txt", "--tokenizer", "bpe", "--vocab_size", "600",
                  "--overwrite"], "data/made"),
    "hf_tokenize": (["hf_tokenize", "--dataset", "made", "--hf_dataset", "talks.jsonl", "--tokenizer", "byte",
                     "--streaming", "true", "--overwrite"], "data/made"),
    "distill": (DISTILL, "checkpoints/student*"),
    "export": (["export", "--model_path", "teacher_model.pt", "--output_dir", "out", "--overwrite"], "out"),
    "finetune": (FINETUNE, "checkpoints/tuned*"),
}  # fmt: skip


def command(args: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "model.py"), *args]


def prepare(folder: Path) -> None:
    """Text, conversations, and a model."""
    source = Path(sysconfig.get_paths()["stdlib"])
    (folder / "input.txt").write_text("\n".join((source / f"{m}.py").read_text() for m in ("textwrap", "heapq", "ast")))
    talks = ({"utterances": [f"What is {i}?", f"It is {i}, and then {i + 1}."]} for i in range(3000))
    (folder / "talks.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    finish(folder, [*BEGIN, "--name", "teacher", "--max_iters", "20", "--block_size", "64"])
    finish(folder, ["tokenize", "--dataset", "talks", "--txt", "talks.jsonl", "--tokenizer", "byte"])


def finish(folder: Path, args: list[str]) -> float:
    """The seconds that a command takes to its end."""
    begun = time.monotonic()
    done = subprocess.run(command(args), cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{args}: {done.stderr[-2000:]}"
    return time.monotonic() - begun


def fingerprint(folder: Path, pattern: str) -> dict[str, str]:
    """What stands there, but for the times it took."""
    import torch

    found = {}
    for top in sorted(folder.glob(pattern)):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_dir() or path.match("*_last.*.pt"):  # earlier states: which there are depends on the kills
                continue
            content = path.read_bytes()
            if path.suffix == ".jsonl":
                records = [json.loads(line) for line in content.splitlines()]
                content = repr([(r["step"], r["loss"], r.get("val_loss")) for r in records]).encode()
            elif path.suffix == ".pt":
                c = torch.load(path, weights_only=True)
                states = [c["optimizer"][0]["state"], c["scaler"]] if c["optimizer"] else []
                content = repr((c["step"], c["metrics"]["best_val_loss"])).encode()
                buffer = io.BytesIO()
                torch.save([c["model"], states], buffer)
                content += buffer.getvalue()
            found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def clear(folder: Path, *patterns: str) -> None:
    for path in [path for pattern in patterns for path in folder.glob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def finish_and_count(folder: Path, args: list[str], pattern: str, wanted: dict, count: Counter, name: str = "") -> None:
    """Run a command to its end; count whether what it made differs, and what was left over."""
    finish(folder, args)
    count[f"{name}differ"] += fingerprint(folder, pattern) != wanted
    count[f"{name}left over"] += sum(p.is_file() or p.is_dir() for p in folder.rglob(".*"))


def kill_at_random(folder: Path, args: list[str], seconds: float, rng: random.Random) -> bool:
    """Start a command and kill it within so many seconds. Returns whether it was still running."""
    run = subprocess.Popen(command(args), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        run.wait(rng.uniform(0, seconds))
        return False
    except subprocess.TimeoutExpired:
        run.kill()
        run.wait()
        return True


def kill(trials: int, folder: Path) -> Counter:
    """A run is killed again and again until it is done, then compared with one that was not, and begun anew."""
    prepare(folder)
    seconds, pattern = finish(folder, TRAIN), "checkpoints/run*"
    wanted, rng, count = fingerprint(folder, pattern), random.Random(0), Counter()
    while count["kills"] < trials:
        clear(folder, pattern)
        for _ in range(rng.randrange(2, 8)):
            count["kills"] += kill_at_random(folder, TRAIN, seconds, rng)
        finish_and_count(folder, TRAIN, pattern, wanted, count)
        count["runs"] += 1
    return count


AIMED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import model
nth, calls, counted = {nth}, 0, (os.replace, os.fsync)
def at(function):
    def call(*args):
        global calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call
os.replace, os.fsync = map(at, counted)
sys.argv = ["model.py", *{args!r}]
model.main()
print("calls", calls)
"""


def aimed(trials: int, folder: Path) -> Counter:
    """A kill before the first, second, ... rename or fsync that a run makes, until none is left."""
    prepare(folder)
    args, pattern, count = [*TRAIN, "--max_iters", "60"], "checkpoints/run*", Counter()
    finish(folder, args)
    wanted = fingerprint(folder, pattern)
    for nth in itertools.count(1):
        clear(folder, pattern)
        code = AIMED.format(root=str(ROOT), nth=nth, args=args)
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return count
        assert done.returncode == -signal.SIGKILL, done.stderr
        count["kills"] += 1
        finish_and_count(folder, args, pattern, wanted, count)


def commands(trials: int, folder: Path) -> Counter:
    prepare(folder)
    count, rng = Counter(), random.Random(0)
    for name, (args, pattern) in COMMANDS.items():
        seconds, wanted = finish(folder, args), fingerprint(folder, pattern)
        for trial in range(trials):
            if trial % 2:  # else over what stands there
                clear(folder, pattern, "data/input/teacher_cache")
            count[f"{name}: kills"] += kill_at_random(folder, args, seconds, rng)
            finish_and_count(folder, args, pattern, wanted, count, f"{name}: ")
        print(name, dict(count), flush=True)
    return count


def openers() -> dict[str, Callable]:
    import model

    return {
        "checkpoints/teacher_model.pt": lambda: model.open_model("checkpoints/teacher_model.pt"),
        "checkpoints/teacher_model_last.pt": lambda: model.load_checkpoint(Path("checkpoints/teacher_model_last.pt")),
        "data/input/data.bin": lambda: model.Data(Path("data/input")),
        "data/talks/mask.bin": lambda: model.Data(Path("data/talks")),
        "data/talks/starts.bin": lambda: model.Data(Path("data/talks")),
        "out/model.safetensors": lambda: model.open_model("out"),
    }


def damage(trials: int, folder: Path) -> Counter:
    import model

    prepare(folder)
    finish(folder, COMMANDS["export"][0])
    os.chdir(folder)
    count, rng = Counter(), random.Random(0)
    for file, open_it in openers().items():
        path = Path(file)
        whole = path.read_bytes()
        for trial in range(trials + trials // 2):
            if trial < trials:
                content = bytearray(whole)
                content[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            else:
                content = whole[: rng.randrange(len(whole))]
            path.write_bytes(content)
            try:
                open_it()
                count[f"{file}: unnoticed, differ"] += 1
            except model.UserError as e:
                count[f"{file}: told"] += str(path.parent) in str(e)
        path.write_bytes(whole)
        open_it()
    return count


HOSTILE = ["9" * 400, "-1", "nan", "inf", "1e309", "\0", "\ud800", "../../x", "/etc/passwd", "[" * 5000, "{{",
           "%s" * 99, "", " ", "true", "null", "0x10", "a" * 70000, "http://127.0.0.1:9/x", "ftp://x", "-",
           "--", "\n"]  # fmt: skip


def mutate(content: bytes, rng: random.Random) -> bytes:
    """A file with a few bytes, tokens or pieces changed, doubled, left out or replaced by something hostile."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        i = rng.randrange(len(content) + 1)
        j = min(len(content), i + rng.choice((1, 1, 4, 50, 5000)))
        kind = rng.randrange(5)
        if kind == 0 and i < len(content):
            content[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del content[i:j]
        elif kind == 2:
            content[i:i] = content[i:j]
        elif kind == 3:
            content[i:j] = rng.choice(HOSTILE).encode("utf-8", "replace")
        else:
            content = content[:i]
    return bytes(content)


def fuzz_targets() -> dict[str, list[list[str]]]:
    """Files, and the commands that read each."""
    sample = ["sample", "--prompt", "a", "--length", "2", "--device", "cpu", "--model_checkpoint"]
    tokenize = ["tokenize", "--dataset", "d", "--tokenizer", "byte", "--overwrite", "--txt"]
    run = [*SHAPE, "--max_iters", "1", "--name", "x", "--overwrite"]
    return {
        "checkpoints/teacher_model.pt": [[*sample, "teacher_model.pt"]],
        "data/input/meta.json": [["train", "--data", "input", *run]],
        "data/talks/meta.json": [["train", "--data", "talks", *run]],
        "data/talks/starts.bin": [["train", "--data", "talks", *run]],
        "input.txt": [[*tokenize, "input.txt"], ["eval", "--model_path", "teacher_model.pt", "--data", "input.txt"]],
        "talks.jsonl": [[*tokenize, "talks.jsonl"], ["hf_tokenize", *tokenize[1:-1], "--hf_dataset", "talks.jsonl"]],
        "talks.csv": [[*tokenize, "talks.csv"]],
        "talks.parquet": [[*tokenize, "talks.parquet"]],
        "nano/train.bin": [["train", "--data", "nano", "--tokenizer", "byte", *run]],
        "checkpoints/teacher_model.jsonl": [["plot", "teacher"]],
        **{f"out/{name}": [[*sample, "out"]] for name in (
            "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
            "export.json")},
    }  # fmt: skip


def prepare_for_fuzz(folder: Path) -> None:
    prepare(folder)
    finish(folder, COMMANDS["export"][0])
    (folder / "nano").mkdir()
    (folder / "nano/train.bin").write_bytes(bytes(b for i in range(3000) for b in (i % 256, 0)))
    make = "import datasets; d = datasets.load_dataset('json', data_files='talks.jsonl', split='train'); " \
           "d.to_parquet('talks.parquet'); d.to_csv('talks.csv')"  # fmt: skip
    subprocess.run([sys.executable, "-c", make], cwd=folder, check=True, capture_output=True)


def fuzz(trials: int, folder: Path) -> Counter:
    """Cases run in child processes, so that one that crashes or hangs is counted and the next goes on."""
    prepare_for_fuzz(folder)
    count, seed = Counter(), 0
    while seed < trials:
        child = [sys.executable, __file__, "fuzz_from", "--trials", str(min(100, trials - seed)), "--seed", str(seed)]
        run = subprocess.Popen(child, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for line in run.stdout:
            outcome, told = line.rstrip("\n").split("\t")
            count[outcome] += 1
            seed += 1
            if outcome not in ("refused", "opened"):
                print(seed - 1, outcome, told, flush=True)
        if run.wait():
            count[f"differ: the process died of {run.returncode}"] += 1
            print(seed, "died", run.returncode, flush=True)
            seed += 1
    return count


def outcome_of(args: list[str]) -> str:
    """What a command line came to in this process; a traceback is raised."""
    import model

    sys.argv = ["model.py", *args]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            model.main()
    except SystemExit as e:
        sentence = ": error: " in err.getvalue() and e.code in (1, 2) or not e.code
        return "refused" if sentence else f"differ: exit status {e.code}"
    return "opened"


def guided(trials: int, folder: Path) -> Counter:
    """Every text file that commands read, changed by libFuzzer towards lines of model.py that no input has reached."""
    prepare_for_fuzz(folder)
    count, whole = Counter(), {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in fuzz_targets():
        if Path(name).suffix in (".pt", ".bin", ".parquet", ".safetensors"):
            continue
        for path, content in whole.items():
            path.write_bytes(content)
        command = [sys.executable, __file__, "guided_on", "--file", name, "--trials", str(trials)]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        count["inputs"] += trials
        count["differ"] += run.returncode != 0
        lines = run.stderr.splitlines()
        print(name, next((line for line in reversed(lines) if "cov:" in line), "")[:90], flush=True)
        if run.returncode:
            print("\n".join(lines[-40:]), flush=True)
    return count


def guided_on(name: str, trials: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["model"]):
        import model
    model.progress_bar = lambda **kwargs: tqdm(disable=True, **kwargs)
    file, commands, seeds = Path(name), fuzz_targets()[name], Path("seeds")
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir()
    shutil.copy(file, seeds)
    inputs = itertools.count()

    def one(content: bytes) -> None:
        file.write_bytes(content)
        if file.name != "export.json":
            Path("out/export.json").unlink(missing_ok=True)  # whose digests would refuse all that is changed
        outcome = outcome_of(commands[next(inputs) % len(commands)])
        if outcome.startswith("differ"):
            raise AssertionError(outcome)

    limits = ["-timeout=10", "-rss_limit_mb=2048", "-max_len=100000"]
    atheris.Setup([name, f"-runs={trials}", *limits, str(seeds)], one)
    atheris.Fuzz()


def fuzz_from(trials: int, seed: int) -> None:
    """Run cases in this process, a line for each."""
    import model

    targets = fuzz_targets()
    known = {*Path().rglob("*"), *map(Path, targets)}
    outcomes = sys.stdout

    def too_slow(*_):
        raise TimeoutError("more than 10 s")

    signal.signal(signal.SIGALRM, too_slow)
    model.progress_bar = lambda **kwargs: tqdm(disable=True, **kwargs)
    for case in range(seed, seed + trials):
        rng = random.Random(case)
        file = Path(rng.choice(list(targets)))
        args = list(rng.choice(targets[str(file)]))
        whole = file.read_bytes() if file.exists() else b""
        if rng.random() < 0.15:  # a hostile command line
            args[rng.randrange(1, len(args))] = rng.choice(HOSTILE)
        else:
            file.write_bytes(mutate(whole, rng))
            if file.name != "export.json" and rng.random() < 0.7:
                Path("out/export.json").unlink(missing_ok=True)
        signal.alarm(10)
        try:
            outcome = outcome_of(args)
        except BaseException as e:
            outcome = f"differ: {type(e).__name__}: {e}"
        finally:
            signal.alarm(0)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 2 << 20:
            outcome = "differ: more than 2 GB"
        for path in (Path("data/d"), Path("loss.png")):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        for path in [p for p in Path().rglob("*") if p not in known]:
            if path.parts[0] not in ("data", "checkpoints") and path.exists():
                outcome = f"differ: wrote {path}"
        if whole:
            file.write_bytes(whole)
        told = " ".join(arg[:40] for arg in args).replace("\n", " ").encode("utf-8", "replace").decode()
        print(f"{outcome[:200]}\t{file}: {told}", file=outcomes, flush=True)


def long(minutes: float, folder: Path) -> Counter:
    """Memory and open files after five minutes and at the end."""
    prepare(folder)
    forever = ["--max_iters", "100000000", "--eval_interval", "2000", "--log_interval", "100", "--save_minutes", "1"]
    run = subprocess.Popen(command([*TRAIN, *forever]), cwd=folder, stdout=subprocess.DEVNULL)
    measured, begun = [], time.monotonic()
    while time.monotonic() - begun < 60 * minutes:
        time.sleep(10)
        assert run.poll() is None
        status = Path(f"/proc/{run.pid}/status").read_text()
        rss = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")))
        measured.append((time.monotonic() - begun, rss, len(os.listdir(f"/proc/{run.pid}/fd"))))
    run.send_signal(signal.SIGTERM)
    run.wait()
    first, last = next(m for m in measured if m[0] >= min(300, 30 * minutes)), measured[-1]
    for seconds, rss, files in (first, last):
        print(f"after {seconds:.0f} s: {rss:,} kB, {files} files")
    return Counter({"differ": int(abs(last[1] / first[1] - 1) > 0.02 or last[2] != first[2]), "exit": run.returncode})


def chat(trials: int, folder: Path) -> Counter:
    """Rounds of one conversation, whose oldest turns fall out of the context."""
    import model

    shape = dict(vocab_size=259, block_size=512, n_layer=2, n_head=4, n_embd=64)
    gpt = model.GPT(model.GPTConfig(**model.ARCHS["llama"], arch="llama", **shape))
    session = model.ChatSession(gpt, model.byte_tokenizer(), model.SamplingSettings(), 30)
    sizes = []
    for i in range(trials):
        session.answer(f"round {i}", lambda text: None)
        sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"peak after {trials // 10} rounds {sizes[trials // 10]:,} kB, after {trials}: {sizes[-1]:,} kB")
    return Counter({"rounds": trials, "differ": int(sizes[-1] > 1.02 * sizes[trials // 10])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    campaigns = {f.__name__: f for f in (kill, aimed, commands, damage, fuzz, guided, long, chat)}
    parser.add_argument("campaign", choices=[*campaigns, "fuzz_from", "guided_on"])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="")
    a = parser.parse_args()
    if a.campaign == "fuzz_from":
        return fuzz_from(a.trials, a.seed)
    if a.campaign == "guided_on":
        return guided_on(a.file, a.trials)
    with tempfile.TemporaryDirectory() as folder:
        count = campaigns[a.campaign](a.minutes if a.campaign == "long" else a.trials, Path(folder))
    print(a.campaign, json.dumps(dict(count), indent=1))
    sys.exit(any(n for what, n in count.items() if "differ" in what or "left over" in what))


if __name__ == "__main__":
    main()
