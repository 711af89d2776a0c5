"""--report_to: what TensorBoard's own reader finds is what the log says."""

import sys
from pathlib import Path

import pytest
from conftest import TRAIN, at_each_step, log_of
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

RUN = (*TRAIN, "--max_iters", 12, "--log_interval", 2)


def read_events() -> EventAccumulator:
    (folder,) = Path("checkpoints/tensorboard").iterdir()
    return EventAccumulator(str(folder)).Reload()


def text(events: EventAccumulator, tag: str) -> list[str]:
    return [e.tensor_proto.string_val[0].decode() for e in events.Tensors(f"{tag}/text_summary")]


def test_tensorboard_shows_the_log(cli, text_file, monkeypatch):
    """Numbers, samples and settings; a resumed run goes on in the same place, and nothing is there twice."""
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        at_each_step(patch, before=lambda step, **_: 1 // (step != 7))  # the last state is that of step 4
        cli(*RUN, "--report_to", "tensorboard", "--eval_interval", 4)
    assert read_events().Scalars("loss")[-1].step == 6
    cli("train", "--resume").ok()
    events, records = read_events(), log_of(timing=True)
    numbers = {k for r in records for k, v in r.items()} - {"step"}
    assert set(events.Tags()["scalars"]) == numbers and {"loss", "val_loss", "lr", "grad_norm"} < numbers
    for name in numbers:
        found = [(e.step, e.value) for e in events.Scalars(name)]
        assert found == [(r["step"], pytest.approx(r[name])) for r in records if name in r]
    samples = text(events, "sample")
    assert len(samples) == 3 and all(s.startswith("    ") for s in samples)
    settings = text(events, "settings")[0]
    assert "    learning_rate: 0.0003\n" in settings and "    n_layer: 2\n" in settings
    cli(*RUN, "--report_to", "tensorboard", "--overwrite").ok()
    assert len(list(Path("checkpoints/tensorboard").iterdir())) == 2


def test_samples_are_shown_as_they_are(cli, text_file):
    out = cli(*RUN, "--report_to", "tensorboard").ok().out
    shown = [part.split("\n---")[0] for part in out.split(" ---\n")[1:]]
    assert shown == [sample.removeprefix("    ").replace("\n    ", "\n") for sample in text(read_events(), "sample")]


def test_runs_are_told_apart_though_a_sample_comes_first(cli, text_file):
    """Their first records say which is which: the sample before them is shown on the screen alone."""
    for seed in (1, 2):
        cli(*RUN, "--report_to", "tensorboard", "--sample_interval", 1, "--overwrite", "--seed", seed).ok()
    assert len(list(Path("checkpoints/tensorboard").iterdir())) == 2


def test_a_report_that_fails_does_not_stop_the_run(cli, text_file):
    Path("checkpoints").mkdir()
    Path("checkpoints/tensorboard").write_text("in the way")
    run = cli(*RUN, "--report_to", "tensorboard").ok()
    assert run.err.count("continuing without it") == 1 and "done in" in run.out


def test_mistakes(cli, text_file, monkeypatch):
    assert "did you mean tensorboard?" in cli(*RUN, "--report_to", "wandb,tensorbord").error.replace("trackio", "")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in cli(*RUN, "--report_to", "wandb").error
    assert not list(Path("checkpoints").glob("*_model*"))
