"""GGUF exports in llama.cpp (llama-cpp-python is its Python build): the same tokens in and out."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from conftest import fuzzed_strings, random_tokens, save, small, stdlib_source
from llama_cpp import GGML_TYPE_F32, Llama
from tokenizers import decoders, pre_tokenizers, trainers

import model

YARN = dict(rope_scaling="yarn", rope_factor=4.0)
LLAMA3 = dict(rope_scaling="llama3", rope_factor=8.0, rope_original_block_size=32)
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox as Pythia": ("gpt_neox", dict(parallel_residual=True, rope_pct=0.5, tie_word_embeddings=False)),
    "gpt_neox, linear": ("gpt_neox", dict(rope_scaling="linear", rope_factor=2.0)),
    "llama, GQA": ("llama", dict(n_kv_head=2)),
    "llama, MQA, untied": ("llama", dict(n_kv_head=1, tie_word_embeddings=False)),
    "llama, attention biases": ("llama", dict(bias="attn", n_kv_head=2)),
    "llama, wide heads": ("llama", dict(head_dim=32)),
    "llama, odd width": ("llama", dict(n_embd=40, n_inner=72, head_dim=16)),
    "llama, linear": ("llama", dict(rope_scaling="linear", rope_factor=2.0)),
    "llama, ntk": ("llama", dict(rope_scaling="ntk", rope_factor=2.0)),
    "llama, yarn": ("llama", dict(rope_theta=500.0, **YARN)),
    "llama, yarn, attention factor": ("llama", dict(rope_attention_factor=1.3, **YARN)),
    "llama, llama3": ("llama", LLAMA3),
    "qwen2": ("qwen2", dict(n_kv_head=2)),
    "qwen2, untied, yarn": ("qwen2", dict(tie_word_embeddings=False, **YARN)),
    "qwen3": ("qwen3", dict(n_kv_head=2)),
    "qwen3, untied, wide heads": ("qwen3", dict(tie_word_embeddings=False, head_dim=32)),
}


def open_gguf(path: Path, **options) -> Llama:
    """float32 keys and values, as ours. Token by token where weights are int8: llama.cpp's kernels for more at once
    need AMX, which some virtual machines announce and do not let run."""
    if "-q" in path.name:
        options.update(n_batch=1, n_ubatch=1)
    options = {"n_ctx": 256, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "verbose": False, **options}
    return Llama(str(path), **options)


def export(cli, gpt: model.GPT, tokenizer: model.Tokenizer, quantize: str) -> Path:
    run = ("export", "--model_path", save("a_model.pt", gpt, tokenizer), "--output_dir", "out", "--format", "gguf")
    cli(*run, "--quantize", quantize, "--overwrite").ok()
    return Path(f"out/out-{quantize}.gguf")


def greedy(llama: Llama, prompt: list[int], n: int) -> list[int]:
    llama.reset()
    tokens = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(n)]


@pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
def test_llama_cpp_says_what_sample_says(cli, bpe, arch, overrides):
    """In float32: our logits (its GELU is a table in half precision), and 30 greedy tokens."""
    gpt = small(arch, bpe.n_vocab, **overrides)
    gpt.head_weight.data[list(bpe.special.values())] = 0  # logits of 0, never the largest: they would end the text
    llama = open_gguf(export(cli, gpt, bpe, "f32"), logits_all=True)
    idx = random_tokens(1, 120, vocab_size=bpe.n_vocab)
    llama.eval(idx[0].tolist())
    with torch.no_grad():
        ours = gpt(idx)[0]
    theirs = torch.from_numpy(np.array(llama.scores[: idx.shape[1]]))
    torch.testing.assert_close(ours, theirs, atol=1e-2 if arch.startswith("gpt") else 2e-4, rtol=0)

    prompt = "def f(x):\n    return"
    new = greedy(llama, bpe.encode(prompt), 30)
    sample = ("sample", "--model_checkpoint", "a_model.pt", "--temperature", 0, "--dtype", "float32", "--length", 30)
    assert cli(*sample, "--prompt", prompt).ok().out == f"{prompt}{bpe.decode(new)}\n"


@pytest.mark.parametrize("arch, overrides, words", [
    ("qwen3", LLAMA3, "rope_scaling llama3"), ("gpt_neox", LLAMA3, "rope_scaling llama3"),
    ("llama", dict(rope_beta_fast=8.0, **YARN), "rope_beta_fast"),
    ("llama", dict(rope_beta_slow=0.5, **YARN), "rope_beta_slow"),
])  # fmt: skip
def test_what_llama_cpp_would_read_wrong_is_refused(cli, bpe, arch, overrides, words):
    """It does not open these, or opens them and takes the values from its own command line."""
    save("a_model.pt", small(arch, bpe.n_vocab, **overrides), bpe)
    error = cli("export", "--model_path", "a_model.pt", "--output_dir", "x", "--format", "gguf").error
    assert words in error


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
def test_llama_cpp_tokenizes_as_we_do(cli, kind, request):
    """10,000 fuzzed strings; special tokens are text unless asked for, and the chat template is there."""
    tokenizer = model.byte_tokenizer() if kind == "byte" else request.getfixturevalue(kind)
    llama = open_gguf(export(cli, small("llama", tokenizer.n_vocab, n_embd=32), tokenizer, "f16"))
    strings = fuzzed_strings(10_000)
    different = [s for s in strings if llama.tokenize(s.encode(), add_bos=False) != tokenizer.encode(s)]
    assert not different, (len(different), different[:5])
    for text in strings[:100]:
        assert llama.detokenize(tokenizer.encode(text)).decode() == text
    rendered = "<|im_start|>user\nHi 12<|im_end|>\n"
    assert llama.tokenize(rendered.encode(), add_bos=False, special=True) == tokenizer.encode_rendered(rendered)
    assert llama.tokenize(rendered.encode(), add_bos=False, special=False) == tokenizer.encode(rendered)
    assert llama.metadata["tokenizer.chat_template"] == model.CHATML
    assert llama.token_eos() == tokenizer.eot and llama.n_vocab() == tokenizer.n_vocab


REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # how published byte-level vocabularies split a text before merging
    "GPT-2": None,
    "Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST,
    "Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST,
    "SmolLM": "digits",
    "one of its own": r"\d+|\D{1,5}",
}


def imported(folder: Path, pattern: str | None) -> model.Tokenizer:
    """A vocabulary trained with a split pattern, as a tokenizer.json."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern in (None, "digits"))
    if pattern is None:
        backend.pre_tokenizer = byte_level
    else:
        split = pre_tokenizers.Digits(True)
        if pattern != "digits":
            split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    options = {"initial_alphabet": alphabet, "special_tokens": special, "show_progress": False}
    numbers = [f"{i} {i * i}, it's {i}'S we'LL\r\n\n" for i in range(2000)]
    texts = [*stdlib_source("datetime", "tarfile").splitlines(keepends=True), *numbers]
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1500, **options))
    backend.save(str(folder / "tokenizer.json"))
    return model.hf_tokenizer(folder)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_imported_tokenizers(cli, tmp_path, pattern):
    """llama.cpp knows split patterns by name: each is recognised, and one that has no name is refused."""
    tokenizer = imported(tmp_path, pattern)
    gpt = small("llama", tokenizer.n_vocab, n_embd=32)
    if pattern == PATTERNS["one of its own"]:
        save("a_model.pt", gpt, tokenizer)
        run = ("export", "--model_path", "a_model.pt", "--output_dir", "out", "--format", "gguf")
        assert "tokenizer" in cli(*run).error
        return
    llama = open_gguf(export(cli, gpt, tokenizer, "f16"))
    different = [s for s in fuzzed_strings(10_000) if llama.tokenize(s.encode(), add_bos=False) != tokenizer.encode(s)]
    assert not different, (len(different), different[:5])


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("quantize, error", [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1), ("q5_0", 0.4), ("q4_0", 0.7)])
def test_smaller_numbers(cli, bpe, arch, quantize, error):
    """The logits move by the rounding of the weights, here compared in root mean square, and text comes out."""
    gpt = small(arch, bpe.n_vocab)
    llama = open_gguf(export(cli, gpt, bpe, quantize), logits_all=True)
    idx = random_tokens(1, 100, vocab_size=bpe.n_vocab)
    llama.eval(idx[0].tolist())
    with torch.no_grad():
        ours = gpt(idx)[0]
    theirs = torch.from_numpy(np.array(llama.scores[:100]))
    assert theirs.isfinite().all()
    assert (ours - theirs).square().mean().sqrt() < error * ours.square().mean().sqrt()
    assert len(greedy(llama, bpe.encode("def f(x):"), 20)) == 20


def test_smollm2(cli, smollm2):
    """The imported model: its tokenizer splits digits, its template has a system turn, and it knows Paris."""
    cli("export", "--model_path", smollm2, "--output_dir", "out", "--format", "gguf", "--quantize", "bf16").ok()
    llama = open_gguf(Path("out/out-bf16.gguf"), n_ctx=512)
    tokenizer = model.hf_tokenizer(smollm2)
    strings = fuzzed_strings(10_000)
    different = [s for s in strings if llama.tokenize(s.encode(), add_bos=False) != tokenizer.encode(s)]
    assert not different, (len(different), different[:5])
    assert llama("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"].startswith(" Paris")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    answer = llama.create_chat_completion(messages, max_tokens=30, temperature=0)["choices"][0]["message"]["content"]
    assert "Paris" in answer
    cli("export", "--model_path", smollm2, "--output_dir", "q8", "--format", "gguf", "--quantize", "q8_0").ok()
    q8 = Path("q8/q8-q8_0.gguf")
    assert q8.stat().st_size < 0.56 * Path("out/out-bf16.gguf").stat().st_size
    assert "Paris" in open_gguf(q8)("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"]


MESSAGES = [{"role": "user", "content": "Hello there"}]


def rendered(tokenizer: model.Tokenizer) -> str:
    return model.render_chat(tokenizer, MESSAGES, add_generation_prompt=True)


@pytest.fixture
def server(cli, bpe):
    """llama-cpp-python's HTTP server on an exported chat model; returns its address."""
    gpt = small("llama", bpe.n_vocab, tie_word_embeddings=False)
    with torch.no_grad():  # the head's row of <|im_end|> looks for what comes out of this conversation, and not of code
        h, other = (gpt.hidden(torch.tensor([ids]))[0, -1] for ids in
                    (bpe.encode_rendered(rendered(bpe)), bpe.encode("def f(x):")))  # fmt: skip
        gpt.lm_head.weight[bpe.special["<|im_end|>"]] = 5 * (h - (h @ other) / (other @ other) * other)
    path = export(cli, gpt, bpe, "f32")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(path), "--port", str(port), "--n_ctx", "256"]
    process = subprocess.Popen([*command, "--n_threads", "1", "--verbose", "false"], stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert process.poll() is None, "the server ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(30)


def ask(address: str, **request) -> dict:
    body = json.dumps({"temperature": 0, "repeat_penalty": 1.0, "top_k": 1, **request}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def test_server(server, bpe):
    """Over HTTP: a prompt goes on as `sample` has it; a conversation goes through our template and special tokens, and
    the answer, which this model ends at once, ends there."""
    gpt, prompt = model.open_model("a_model.pt").model, "def f(x):"
    greedy, chat = model.SamplingSettings(temperature=0.0), bpe.encode_rendered(rendered(bpe))
    for path, wanted, ids in (
        ("completions", {"prompt": prompt}, bpe.encode(prompt)),
        ("chat/completions", {"messages": MESSAGES}, chat),
    ):
        answer = ask(f"{server}/{path}", max_tokens=12, **wanted)
        (choice,) = answer["choices"]
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        (expected,) = model.generate_text(gpt, bpe, ids, 12, greedy)
        assert text == expected.replace("\ufffd", "")  # it leaves out what is no whole character
        assert text if wanted == {"prompt": prompt} else (text, choice["finish_reason"]) == ("", "stop")
        assert answer["usage"]["prompt_tokens"] == len(ids)
