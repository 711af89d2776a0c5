"""--report_to trackio and wandb, without a network or an account: their own readers find what the log says."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests_conftest import TRAIN, log_of, model_py, stdlib_source

RUN = (*TRAIN, "--log_interval", 2, "--eval_interval", 4)


@pytest.fixture
def log(workdir, monkeypatch):
    """Train 8 steps, and resume up to 12, in processes of their own; returns the records of the log, by step."""
    monkeypatch.setenv("TRACKIO_DIR", str(workdir / "trackio"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    Path("input.txt").write_text(stdlib_source("argparse")[:30_000], encoding="utf-8")

    def train(kind: str) -> dict[int, dict]:
        for words in ((*RUN, "--max_iters", 8, "--report_to", kind), ("train", "--resume", "--max_iters", 12)):
            subprocess.run(model_py(*words), check=True, timeout=300)
        return {r.pop("step"): r for r in log_of(timing=True)}

    return train


def test_trackio(log):
    records = log("trackio")
    code = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; (run,) = S.get_runs('model.py');"
        "print(json.dumps([run, S.get_run_config('model.py', run), S.get_logs('model.py', run)], default=str))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    name, config, logs = json.loads(out.splitlines()[-1])
    assert name.startswith("7M-") and config["learning_rate"] == 3e-4 and config["n_layer"] == 2
    for step, record in records.items():
        (found,) = [r for r in logs if r["step"] == step and "loss" in r]
        assert {k: found[k] for k in record} == pytest.approx(record)
    assert [r["step"] for r in logs if "sample" in r] == [4, 8, 12]


def entries(content: bytes) -> Iterator[bytes]:
    """The entries of a .wandb file: after 7 bytes, LevelDB's log format, blocks of 32 kB, in which a part of an
    entry has a checksum (4 bytes), a length (2) and a type: 1 whole, 2 first, 3 middle, 4 last."""
    at, entry = 7, b""
    while at < len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        entry = (b"" if kind in (1, 2) else entry) + content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield entry


def test_wandb(log):
    """Two offline parts of one run, which `wandb sync` puts together by its id."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = log("wandb")
    found, ids, settings = {}, set(), {}
    for path in sorted(Path("checkpoints/wandb").glob("offline-run-*/*.wandb")):
        for data in entries(path.read_bytes()):
            record = Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                settings |= {item.key: item.value_json for item in record.run.config.update}
            elif record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
                found.setdefault(values["_step"], {}).update(values)
    assert len(ids) == 1 and next(iter(ids)).startswith("7M-")
    assert settings["learning_rate"] == "0.0003" and settings["n_layer"] == "2"
    for step, record in records.items():
        assert {k: found[step][k] for k in record} == pytest.approx(record)
    assert [step for step, values in found.items() if "sample" in values] == [4, 8, 12]


def test_wandb_with_an_account_and_no_network(log, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens
    assert log("wandb") and len(list(Path("checkpoints/wandb").glob("offline-run-*/*.wandb"))) == 2
