"""Exports in mlx-lm, which Macs use; its arithmetic runs on other processors too."""

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import MODELS, small
from tests_conftest import random_tokens, save_model, stdlib_source

import model

OPENED = {k: v for k, v in MODELS.items() if v[0] in ("llama", "qwen2", "qwen3")}  # others it wants under other names
OPENED |= {
    "llama_untied": ("llama", dict(tie_word_embeddings=False)),
    "llama_linear": ("llama", dict(rope_scaling="linear", rope_factor=4.0)),
    "qwen3_wide_heads": ("qwen3", dict(head_dim=32, n_kv_head=1)),
}


@pytest.mark.parametrize("arch, overrides", OPENED.values(), ids=OPENED)
def test_mlx_opens_an_export(cli, bpe, arch, overrides):
    """Logits, greedy tokens and ids, by AutoTokenizer, are ours."""
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    gpt, idx = small(arch, bpe.n_vocab, **overrides).eval(), random_tokens(1, 60, vocab_size=bpe.n_vocab)
    save_model("ours.pt", gpt, bpe)
    cli("export", "--model_path", "ours.pt", "--output_dir", "exported").ok()
    theirs, tokenizer = load("exported")
    logits = np.array(theirs(mx.array(idx.numpy())).astype(mx.float32))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), gpt(idx), atol=2e-4, rtol=1e-4)
    text = stdlib_source("bisect")
    assert tokenizer.encode(text) == bpe.encode(text)
    prompt = bpe.encode("def bisect(a, x):")
    greedy = model.SamplingSettings(temperature=0)
    ours = [int(t) for t in model.generate(gpt, [prompt], 20, greedy)]
    assert [token for token, _ in generate_step(mx.array(prompt), theirs, max_tokens=20)] == ours
