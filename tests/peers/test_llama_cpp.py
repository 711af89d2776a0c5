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
import torch
from conftest import LLAMA3, MODELS, YARN, fuzzed_strings, small
from llama_cpp import GGML_TYPE_F32, Llama
from tests_conftest import byte_level_bpe, random_tokens, save_model, stdlib_source
from tokenizers import Regex, pre_tokenizers

import model

MODELS = {
    **MODELS,
    "gpt2_untied": ("gpt2", dict(tie_word_embeddings=False)),
    "gpt_neox_as_Pythia": ("gpt_neox", dict(parallel_residual=True, rope_pct=0.5, tie_word_embeddings=False)),
    "gpt_neox_linear": ("gpt_neox", dict(rope_scaling="linear", rope_factor=2.0)),
    "llama_MQA_untied": ("llama", dict(n_kv_head=1, tie_word_embeddings=False)),
    "llama_attention_biases": ("llama", dict(bias="attn", n_kv_head=2)),
    "llama_wide_heads": ("llama", dict(head_dim=32)),
    "llama_odd_width": ("llama", dict(n_embd=40, n_inner=72, head_dim=16)),
    "llama_linear": ("llama", dict(rope_scaling="linear", rope_factor=2.0)),
    "llama_yarn_attention_factor": ("llama", dict(rope_attention_factor=1.3, **YARN)),
    "qwen3_untied_wide_heads": ("qwen3", dict(tie_word_embeddings=False, head_dim=32)),
}


def open_gguf(path: Path, **options) -> Llama:
    """float32 keys and values, as ours. Token by token where weights are int8: llama.cpp's kernels for more at once
    need AMX, which some virtual machines announce and do not let run."""
    if "-q" in path.name:
        options.update(n_batch=1, n_ubatch=1)
    options = {"n_ctx": 256, "type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "verbose": False, **options}
    return Llama(str(path), **options)


def exported(cli, gpt: model.GPT, tokenizer: model.Tokenizer, quantize: str):
    """What comes of an export to out/out-{quantize}.gguf."""
    save_model("a_model.pt", gpt, tokenizer)
    flags = ("--model_path", "a_model.pt", "--output_dir", "out", "--format", "gguf", "--quantize", quantize)
    return cli("export", *flags, "--overwrite")


def export(cli, gpt: model.GPT, tokenizer: model.Tokenizer, quantize: str) -> Path:
    exported(cli, gpt, tokenizer, quantize).ok()
    return Path(f"out/out-{quantize}.gguf")


def greedy(llama: Llama, prompt: list[int], n: int) -> list[int]:
    llama.reset()
    tokens = llama.generate(prompt, temp=0.0, repeat_penalty=1.0)
    return [next(tokens) for _ in range(n)]


@torch.no_grad()
def logits_of(gpt: model.GPT, llama: Llama, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and theirs, of the same n tokens."""
    idx = random_tokens(1, n, vocab_size=gpt.config.vocab_size)
    llama.eval(idx[0].tolist())
    return gpt(idx)[0], torch.from_numpy(np.array(llama.scores[:n]))


def assert_same_tokens(llama: Llama, tokenizer: model.Tokenizer) -> None:
    """Of 10,000 fuzzed strings."""
    different = [s for s in fuzzed_strings(10_000) if llama.tokenize(s.encode(), add_bos=False) != tokenizer.encode(s)]
    assert not different, (len(different), different[:5])


@pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
def test_llama_cpp_says_what_sample_says(cli, bpe, arch, overrides):
    """In float32: our logits (its GELU is a table in half precision), and 30 greedy tokens."""
    gpt = small(arch, bpe.n_vocab, **overrides)
    gpt.head_weight.data[list(bpe.special.values())] = 0  # logits of 0, never the largest: they would end the text
    llama = open_gguf(export(cli, gpt, bpe, "f32"), logits_all=True)
    torch.testing.assert_close(*logits_of(gpt, llama, 120), atol=1e-2 if arch.startswith("gpt") else 2e-4, rtol=0)

    prompt = "def f(x):\n    return"
    new = greedy(llama, bpe.encode(prompt), 30)
    sample = ("sample", "--model_checkpoint", "a_model.pt", "--temperature", 0, "--dtype", "float32", "--length", 30)
    assert cli(*sample, "--prompt", prompt).ok().out == f"{prompt}{bpe.decode(new)}\n"


@pytest.mark.parametrize("arch, overrides, words", [
    ("qwen3", LLAMA3, "rope_scaling llama3"), ("gpt_neox", LLAMA3, "rope_scaling llama3"),
    ("llama", dict(rope_beta_fast=8.0, **YARN), "rope_beta_fast"),
    ("llama", dict(rope_beta_slow=0.5, **YARN), "rope_beta_slow"),
    ("gpt_neox", dict(rope_pct=0.0), "rope_pct 0.0"),
])  # fmt: skip
def test_what_llama_cpp_would_read_wrong_is_refused(cli, bpe, arch, overrides, words):
    """It does not open these, or opens them and takes the values from its own command line."""
    assert words in exported(cli, small(arch, bpe.n_vocab, **overrides), bpe, "f16").error


@pytest.mark.parametrize("kind", ["gpt2", "bpe", "byte"])
def test_llama_cpp_tokenizes_as_we_do(cli, kind, request):
    """10,000 fuzzed strings; special tokens are text unless asked for, and the chat template is there."""
    tokenizer = model.byte_tokenizer() if kind == "byte" else request.getfixturevalue(kind)
    llama = open_gguf(export(cli, small("llama", tokenizer.n_vocab, n_embd=32), tokenizer, "f16"))
    assert_same_tokens(llama, tokenizer)
    for text in fuzzed_strings(100):
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
    "SmolLM": "digits",  # one by one; then as GPT-2
    "one of its own": r"\d+|\D{1,5}",
}


def imported(folder: Path, pattern: str | None) -> model.Tokenizer:
    """A vocabulary trained with a split pattern, as a tokenizer.json."""
    as_gpt2 = {None: None, "digits": pre_tokenizers.Digits(True)}
    split = as_gpt2[pattern] if pattern in as_gpt2 else pre_tokenizers.Split(Regex(pattern), "isolated")
    numbers = [f"{i} {i * i}, it's {i}'S we'LL\r\n\n" for i in range(2000)]
    texts = [*stdlib_source("datetime", "tarfile").splitlines(keepends=True), *numbers]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = byte_level_bpe(texts, 1500, special, split, use_regex=pattern in as_gpt2)
    backend.save(str(folder / "tokenizer.json"))
    return model.hf_tokenizer(folder)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_imported_tokenizers(cli, tmp_path, pattern):
    """llama.cpp knows split patterns by name: each is recognised, and one that has no name is refused."""
    tokenizer = imported(tmp_path, pattern)
    gpt = small("llama", tokenizer.n_vocab, n_embd=32)
    if pattern == PATTERNS["one of its own"]:
        assert "tokenizer" in exported(cli, gpt, tokenizer, "f16").error
    else:
        assert_same_tokens(open_gguf(export(cli, gpt, tokenizer, "f16")), tokenizer)


@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("quantize, error", [("f16", 0.02), ("bf16", 0.1), ("q8_0", 0.1), ("q5_0", 0.4), ("q4_0", 0.7)])
def test_smaller_numbers(cli, bpe, arch, quantize, error):
    """The logits move by the rounding of the weights, here compared in root mean square, and text comes out."""
    gpt = small(arch, bpe.n_vocab)
    llama = open_gguf(export(cli, gpt, bpe, quantize), logits_all=True)
    ours, theirs = logits_of(gpt, llama, 100)
    assert theirs.isfinite().all()
    assert (ours - theirs).square().mean().sqrt() < error * ours.square().mean().sqrt()
    assert len(greedy(llama, bpe.encode("def f(x):"), 20)) == 20


def test_smollm2(cli, smollm2):
    """The imported model: its tokenizer splits digits, its template has a system turn, and it knows Paris."""
    cli("export", "--model_path", smollm2, "--output_dir", "out", "--format", "gguf", "--quantize", "bf16").ok()
    llama = open_gguf(Path("out/out-bf16.gguf"), n_ctx=512)
    tokenizer = model.hf_tokenizer(smollm2)
    assert_same_tokens(llama, tokenizer)
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
