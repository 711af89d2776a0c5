"""The largest variant on an ordinary machine: 24 GB hold its weights, gradients and AdamW's moments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STEP = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import torch, model
torch.manual_seed(0)
config = model.make_config("1B", 50259, {"gradient_checkpointing": True}, "published")
gpt = model.GPT(config).train()
(adamw,) = model.make_optimizers(gpt, model.TrainConfig(learning_rate=2e-4))
idx = torch.randint(config.vocab_size, (1, 17))
loss = gpt.loss(idx[:, :-1], idx[:, 1:]) / 16
loss.backward()
adamw.step()
adamw.zero_grad()
with torch.no_grad():
    after = gpt.loss(idx[:, :-1], idx[:, 1:]) / 16
print(loss.item(), after.item(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def memory_gb() -> float:
    """Of this machine, or of the container that this runs in."""
    limit = Path("/sys/fs/cgroup/memory.max")
    limit = limit.read_text().strip() if limit.exists() else "max"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, int(limit) if limit.isdigit() else total) / 2**30


@pytest.mark.skipif(sys.platform != "linux" or memory_gb() < 22, reason="needs hardware: 22 GB of memory, and Linux")
def test_the_1b_variant_takes_an_adamw_step_on_24_gb(capsys):
    """The first loss is about a uniform guess's, ln(50259) = 10.8; a step lowers it on the text it was taken on."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    run = subprocess.run(
        [sys.executable, "-c", STEP, str(ROOT)], capture_output=True, text=True, env=environment, check=False
    )
    assert run.returncode == 0, run.stderr
    loss, after, peak = map(float, run.stdout.split())
    with capsys.disabled():
        print(f"\n1B: loss {loss:.2f} -> {after:.2f} in one step, peak memory {peak:.1f} GB")
    assert 10 < loss < 12.5 and after < loss - 0.5
    assert 15 < peak < 22  # 16 bytes a parameter, and little more
