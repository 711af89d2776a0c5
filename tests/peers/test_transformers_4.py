"""Exports in the last transformers 4, which reads the version 4 keys of config.json, in its own virtual environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import LLAMA3, MODELS, TALK, YARN, fuzzed_strings, small
from tests_conftest import random_tokens, save_model, stdlib_source

import model

# nanochat came with transformers 5; NTK-aware scaling is a larger theta
YARN_ALL = dict(rope_attention_factor=1.3, rope_beta_fast=8.0, rope_beta_slow=0.5, rope_theta=100.0, **YARN)
PYTHIA = dict(parallel_residual=True, rope_pct=0.25, activation="gelu", tie_word_embeddings=False)
MODELS = {
    **MODELS,
    "gpt2_untied_relu": ("gpt2", dict(tie_word_embeddings=False, activation="relu")),
    "gpt_neox_as_Pythia": ("gpt_neox", PYTHIA),
    "gpt_neox_linear": ("gpt_neox", dict(rope_scaling="linear", rope_factor=2.0, rope_theta=500.0)),
    "llama_untied_geglu": ("llama", dict(n_kv_head=1, tie_word_embeddings=False, activation="geglu")),
    "llama_all_biases": ("llama", dict(bias="all")),
    "llama_wide_heads": ("llama", dict(head_dim=32, rope_theta=1e6)),
    "llama_linear": ("llama", dict(rope_scaling="linear", rope_factor=4.0)),
    "llama_yarn_all_its_settings": ("llama", YARN_ALL),
    "qwen3_untied_wide_heads": ("qwen3", dict(tie_word_embeddings=False, head_dim=32, **LLAMA3)),
}
SCRIPT = """
import json, logging, sys, warnings
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
logging.getLogger("transformers").addHandler(logging.StreamHandler(sys.stdout))  # a warning is a line on stdout
warnings.simplefilter("default")
idx, strings, talk = np.load("idx.npy"), json.load(open("strings.json")), json.load(open("talk.json"))
for name in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, dtype="auto")
    assert not any(info.values()), (name, info)
    assert type(model).__name__ in json.load(open(f"{name}/config.json"))["architectures"]
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(idx)).logits.numpy()
        prompt = torch.from_numpy(idx[:1, :9])
        tokens = model.generate(prompt, attention_mask=prompt * 0 + 1, max_new_tokens=30, do_sample=False)[0, 9:]
    tokenizer = AutoTokenizer.from_pretrained(name)
    ids = tokenizer(strings, add_special_tokens=False, verbose=False).input_ids
    chat = tokenizer.apply_chat_template(talk) if tokenizer.chat_template else []
    lengths = [len(x) for x in ids]
    np.savez(f"{name}.npz", logits=logits, tokens=tokens.numpy(), ids=np.concatenate(ids), lengths=lengths, chat=chat)
"""


@pytest.fixture(scope="module")
def strings() -> list[str]:
    return [*fuzzed_strings(5000), stdlib_source("tarfile")]


def in_transformers_4(python: str, names: list[str], strings: list[str]) -> dict[str, dict]:
    """What it makes of directories in the current folder: logits, 30 greedy tokens, ids of the strings."""
    np.save("idx.npy", random_tokens(2, 100, vocab_size=900).numpy())
    Path("strings.json").write_text(json.dumps(strings))
    Path("talk.json").write_text(json.dumps(TALK))
    done = subprocess.run([python, "-c", SCRIPT, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not done.stdout, done.stdout
    return {name: dict(np.load(f"{name}.npz")) for name in names}


def ours_of(gpt: model.GPT) -> tuple[np.ndarray, list[int]]:
    idx = torch.from_numpy(np.load("idx.npy"))
    with torch.no_grad():
        logits = gpt(idx).numpy()
    tokens = model.generate(gpt, [idx[0, :9].tolist()], 30, model.SamplingSettings(temperature=0))
    return logits, [int(t) for t in tokens]


def test_every_architecture(cli, python_4, bpe, strings):
    """No warning, logits within 1e-4, the same 30 greedy tokens."""
    models = {name: small(arch, bpe.n_vocab, **overrides) for name, (arch, overrides) in MODELS.items()}
    for name, gpt in models.items():
        cli("export", "--model_path", save_model("a_model.pt", gpt, bpe), "--output_dir", name).ok()
    found = in_transformers_4(python_4, list(models), strings[:100])
    for name, gpt in models.items():
        logits, tokens = ours_of(gpt)
        difference = float(np.abs(logits - found[name]["logits"]).max())
        print(f"{name}: logits differ by at most {difference:.1e}")
        assert difference <= 1e-4, name
        end = next((i for i, t in enumerate(tokens) if t in bpe.special.values()), 30)
        assert found[name]["tokens"].tolist()[:end] == tokens[:end], name


def test_every_tokenizer(cli, python_4, bpe, gpt2, strings, smollm2):
    """The ids of fuzzed strings and of a file of code, and of a conversation by the chat template."""
    made = {"bpe": bpe, "gpt2": gpt2, "byte": model.byte_tokenizer(), "imported": model.hf_tokenizer(smollm2)}
    for name, tokenizer in made.items():
        gpt = small("llama", max(tokenizer.n_vocab, 900), n_embd=16)
        cli("export", "--model_path", save_model("a_model.pt", gpt, tokenizer), "--output_dir", name).ok()
    found = in_transformers_4(python_4, list(made), strings)
    for name, tokenizer in made.items():
        theirs = np.split(found[name]["ids"], np.cumsum(found[name]["lengths"])[:-1])
        different = [s for s, ids in zip(strings, theirs, strict=True) if tokenizer.encode(s) != ids.tolist()]
        assert not different, (name, different[:5])
        rendered = model.render_chat(tokenizer, TALK)
        assert found[name]["chat"].tolist() == tokenizer.encode_rendered(rendered), name
