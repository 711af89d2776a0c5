"""Hugging Face in and out: transformers, safetensors, tokenizers and gguf are the judges of what we write and read."""

import functools
import json
import logging
import os
import random
import re
import shlex
import shutil
import sys
import unicodedata
from pathlib import Path
from unittest.mock import Mock

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
import yaml
from conftest import (
    SYSTEM_TEMPLATE,
    TINY_RUN,
    TRAIN,
    Result,
    byte_level_bpe,
    contents,
    log_of,
    random_gpt,
    random_tokens,
    save_foreign,
    save_model,
    stdlib_source,
    tiny_config,
    write_jsonl,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import model

# Every architecture with what it leaves open: ties, activations, GQA, biases, head widths, RoPE and its scalings.
LINEAR = dict(rope_scaling="linear", rope_factor=2.0)
YARN = dict(rope_scaling="yarn", rope_factor=4.0)
LLAMA3 = dict(rope_scaling="llama3", rope_factor=8.0, rope_original_block_size=32)
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied, relu": ("gpt2", dict(tie_word_embeddings=False, activation="relu", norm_eps=1e-6)),
    "gpt2, exact gelu, wide MLP": ("gpt2", dict(activation="gelu", n_inner=96)),
    "gpt2, silu, narrow MLP": ("gpt2", dict(activation="silu", n_inner=40, norm_eps=1e-2)),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox as Pythia": ("gpt_neox", dict(parallel_residual=True, rope_pct=0.25, activation="gelu",
                                            tie_word_embeddings=False)),
    "gpt_neox, linear": ("gpt_neox", dict(rope_pct=0.5, rope_theta=1e6, **LINEAR)),
    "gpt_neox, yarn": ("gpt_neox", dict(parallel_residual=True, rope_pct=0.5, **YARN)),
    "llama, GQA, theta": ("llama", dict(n_kv_head=2, rope_theta=1e6, norm_eps=1e-4)),
    "llama, MQA, untied, geglu": ("llama", dict(n_kv_head=1, tie_word_embeddings=False, activation="geglu")),
    "llama, attention biases, linear": ("llama", dict(bias="attn", n_kv_head=2, **LINEAR)),
    "llama, all biases, wide heads": ("llama", dict(bias="all", head_dim=16, n_kv_head=2)),
    "llama, ntk": ("llama", dict(rope_scaling="ntk", rope_factor=2.0)),
    "llama, yarn": ("llama", dict(n_kv_head=2, rope_theta=500.0, **YARN)),
    "llama, yarn, all its settings": ("llama", dict(rope_attention_factor=1.3, rope_beta_fast=8.0, rope_beta_slow=0.5,
                                                    rope_theta=100.0, **YARN)),
    "llama, llama3": ("llama", dict(n_kv_head=2, **LLAMA3)),
    "qwen2": ("qwen2", dict(n_kv_head=2, rope_theta=1e6)),
    "qwen2, untied, geglu, yarn": ("qwen2", dict(tie_word_embeddings=False, activation="geglu", **YARN)),
    "qwen3": ("qwen3", dict(n_kv_head=2)),
    "qwen3, untied, wide heads, llama3": ("qwen3", dict(tie_word_embeddings=False, head_dim=16, **LLAMA3)),
    "qwen3, MQA, yarn": ("qwen3", dict(n_kv_head=1, **YARN)),
    "nanochat": ("nanochat", {}),
    "nanochat, MQA, yarn": ("nanochat", dict(n_kv_head=1, **YARN)),  # rotates, then normalises
    "nanochat, GQA, tied, linear": ("nanochat", dict(n_kv_head=2, tie_word_embeddings=True, **LINEAR)),
    "nanochat, no soft-cap": ("nanochat", dict(logit_softcap=0.0, activation="gelu")),
}  # fmt: skip
every_model = pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
EXPORT = ("export", "--model_path", "a_model.pt", "--output_dir")
GGUF = ("--format", "gguf")


def small(arch: str = "llama", tokenizer: model.Tokenizer | None = None, **overrides) -> model.GPT:
    """A random model for a tokenizer; by default for bytes, whose 259 tokens are padded to 320 rows."""
    n_vocab = (tokenizer or model.byte_tokenizer()).n_vocab
    return random_gpt(tiny_config(arch, **{"vocab_size": n_vocab, "block_size": 128, **overrides}))


save = functools.partial(save_model, "a_model.pt")


def export(cli, gpt: model.GPT, *flags, tokenizer: model.Tokenizer | None = None, to: str = "exported") -> Path:
    """The directory that the command line makes of a model."""
    save(gpt, tokenizer)
    done = cli(*EXPORT, to, *flags).ok()
    assert done.out.startswith(f"{to}: {gpt.config.arch}, ") and done.err == ""
    assert not list(Path(".").glob(f".{to}*"))  # nothing half-made is left
    assert len({file.stat().st_mode for file in Path(to).iterdir()}) == 1  # who may read one may read the weights
    return Path(to)


def refused(cli, gpt: model.GPT, *flags, tokenizer: model.Tokenizer | None = None) -> Result:
    """An export that fails leaves nothing behind."""
    save(gpt, tokenizer)
    done = cli(*EXPORT, "x", *flags)
    assert os.listdir() == ["a_model.pt"]
    return done


def config_of(folder: Path, **changes) -> dict:
    """The content of a config.json, after changes to it."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    if changes:
        (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.fixture
def complaints(caplog, recwarn):
    """Neither transformers nor Python has anything to warn of."""
    transformers.utils.logging.enable_propagation()
    yield
    transformers.utils.logging.disable_propagation()
    said = [r.getMessage() for r in caplog.get_records("call") if r.levelno >= logging.WARNING]
    assert not said + [str(w.message) for w in recwarn if not issubclass(w.category, DeprecationWarning)]


def open_theirs(folder: Path) -> transformers.PreTrainedModel:
    """As transformers opens it, every tensor accounted for."""
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


@torch.no_grad()
def assert_same_logits(gpt: model.GPT, theirs: transformers.PreTrainedModel):
    idx = random_tokens(2, 100, vocab_size=min(gpt.config.vocab_size, theirs.config.vocab_size))
    torch.testing.assert_close(gpt(idx), theirs(idx).logits.float(), atol=1e-4, rtol=0)


# --- Export: the model


@every_model
def test_transformers_opens_an_export_as_its_own(cli, complaints, arch, overrides):
    """Its class, no warning, our logits and greedy tokens; read back it is the model bit for bit, as is its export."""
    gpt = small(arch, **overrides)
    folder = export(cli, gpt)
    theirs = open_theirs(folder)
    assert [type(theirs).__name__] == config_of(folder)["architectures"]
    assert theirs.config.model_type == arch and theirs.dtype == torch.float32
    assert_same_logits(gpt, theirs)
    assert gpt(random_tokens(2, 100)).std() > 0.5  # else any two models would agree
    inputs = AutoTokenizer.from_pretrained(folder)("To be, or", return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=50, do_sample=False)[0].tolist()
    new = [i for i in ids[inputs["input_ids"].shape[1] :] if i not in theirs.generation_config.eos_token_id]
    sample = ("sample", "--prompt", "To be, or", "--length", 50, "--temperature", 0, "--dtype", "float32")
    for checkpoint in ("a_model.pt", folder):
        out = cli(*sample, "--model_checkpoint", checkpoint).ok().out
        assert out == f"To be, or{model.byte_tokenizer().decode(new)}\n"

    written, tables = load_file(folder / "model.safetensors"), 2 - gpt.config.tie_word_embeddings
    padding = tables * (320 - 259) * 32  # rows of the embedding and, if it is another, the head
    assert sum(t.numel() for t in written.values()) == model.count_parameters(gpt.config) - padding
    again, rows = model.open_model(str(folder)).model, gpt.config.vocab_size
    for name, tensor in gpt.state_dict().items():
        cut = slice(rows) if name in ("wte.weight", "lm_head.weight") else slice(None)
        assert torch.equal(tensor[cut], again.state_dict()[name][cut]), name
    idx = random_tokens(1, gpt.config.context, vocab_size=rows)
    torch.testing.assert_close(gpt(idx), again(idx), atol=1e-5, rtol=0)
    cli("export", "--model_path", folder, "--output_dir", "twice").ok()
    for file in folder.iterdir():
        first, second = file.read_bytes(), (Path("twice") / file.name).read_bytes()
        assert first == second or file.name == "README.md", file


@every_model
def test_config_says_the_same_to_transformers_4_and_5(arch, overrides):
    """Version 5 reads rope_parameters and dtype, version 4 rope_theta, rope_scaling and torch_dtype."""
    c = small(arch, **overrides).config
    j = model.hf_config(c, model.byte_tokenizer(), "float32")
    only_4, only_5 = {"rope_theta", "rope_scaling", "torch_dtype", "rotary_emb_base", "rotary_pct"}, {"rope_parameters"}
    parts = [{k: v for k, v in j.items() if k not in left_out} for left_out in ((), only_4, only_5)]
    read, *others = (model.config_from_hf(part, Path()) for part in parts)
    assert others == [read] * 2 and read.context == c.context
    rope = j.get("rope_parameters", {})
    if rope.get("rope_type") == "yarn":  # version 4 takes the factor from the two lengths
        lengths = j["max_position_embeddings"] / rope["original_max_position_embeddings"]
        assert lengths == pytest.approx(rope["factor"], rel=1e-9)


@pytest.mark.parametrize("size, limit, files", [("30KB", 30_000, 4), ("0.05MB", 50_000, 2), (5_000, 5_000, 10)])
def test_shards(cli, complaints, size, limit, files):
    """Files of at most the size, and an index that says which tensor is in which."""
    gpt = small("qwen2")
    folder = export(cli, gpt, "--max_shard_size", size)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) >= files
    for shard in map(load_file, shards):
        assert sum(t.nbytes for t in shard.values()) <= limit or len(shard) == 1
    assert_same_logits(gpt, open_theirs(folder))
    assert_same_logits(model.open_model(str(folder)).model, open_theirs(folder))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_half_precision(cli, complaints, dtype):
    gpt, kind = small("qwen3"), getattr(torch, dtype)
    folder = export(cli, gpt, "--dtype", dtype)
    assert config_of(folder)["dtype"] == config_of(folder)["torch_dtype"] == dtype
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert {f.get_tensor(name).dtype for name in f.keys()} == {kind}
    assert open_theirs(folder).dtype == kind
    gpt.load_state_dict({k: v.to(kind).float() for k, v in gpt.state_dict().items()})
    assert_same_logits(gpt, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_weights_as_stored_generate_the_same(cli, quantize):
    """As `sample` and `chat` open them: also with a matrix made of tensors of several dtypes."""
    folder = export(cli, small("qwen3"), "--dtype", "bfloat16")
    k, v = (f"model.layers.0.self_attn.{x}_proj.weight" for x in "kv")
    change_tensors(folder, lambda t: t.update({k: t[k].float() * 1.001, v: t[v].half() * 1.001}))
    q, down = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    change_tensors(folder, lambda t: t.update({q: t[q].to(torch.float8_e4m3fn), down: (t[down] * 50).to(torch.int8)}))
    plain, stored = (model.load_hf_model(folder, as_stored=how) for how in (False, True))
    dtypes = {name: p.dtype for name, p in stored.named_parameters() if p.dtype != torch.bfloat16}
    in_float32 = "blocks.0.attn.qkv.weight", "blocks.1.attn.qkv.weight", "blocks.1.mlp.proj.weight"
    assert dtypes == dict.fromkeys(in_float32, torch.float32)
    for gpt in (plain, stored):
        model.prepare_generation(gpt.eval(), "auto", quantize)
    for ours, theirs in zip(stored.state_dict().values(), plain.state_dict().values(), strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_scaling_chosen_at_export(cli, complaints):
    """--rope_scaling stretches a trained context, as `sample` does with the same flags."""
    gpt = small("llama", block_size=32)
    folder = export(cli, gpt, "--rope_scaling", "yarn", "--rope_factor", 4)
    gpt.extend_context(rope_scaling="yarn", rope_factor=4.0)
    theirs = open_theirs(folder)
    assert theirs.config.max_position_embeddings == 128
    assert_same_logits(gpt, theirs)


def test_overwrite_replaces_an_export_and_nothing_else(cli, workdir, monkeypatch):
    """Not the working folder, nor the one above it, nor one with other files in it, nor an export with a stranger."""
    Path("inner/checkpoints").mkdir(parents=True)
    monkeypatch.chdir("inner")
    export(cli, small())
    for path in ("../above.txt", "precious.txt", "checkpoints/other_model.pt", "folder/a.txt", "exported/notes.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("precious")
    before = contents("..")
    for output in (".", "..", "checkpoints", "folder", "exported", "a_model.pt"):
        for flags in ((), ("--overwrite",), GGUF, (*GGUF, "--overwrite")):
            error = cli(*EXPORT, output, *flags).error
            assert "no export wrote" in error and "add --overwrite" not in error
    assert contents("..") == before


@pytest.mark.parametrize("kind, weights", [("hf", "model.safetensors"), ("gguf", "empty-f16.gguf")])
def test_an_empty_folder_is_filled(cli, workdir, monkeypatch, kind, weights):
    """The working folder, or one that goes by another name."""
    save(small())
    Path("empty").mkdir()
    Path("link").symlink_to("empty")
    cli(*EXPORT, "link", "--format", kind).ok()
    assert Path("empty", weights).exists() and Path("link").is_symlink()
    shutil.rmtree("empty")
    Path("empty").mkdir()
    Path("empty/.DS_Store").touch()  # a Mac has shown the folder
    monkeypatch.chdir("empty")
    cli("export", "--model_path", "../a_model.pt", "--output_dir", ".", "--format", kind).ok()
    assert Path(weights).exists() and Path("../empty", weights).exists()


def test_overwrite_leaves_no_file_of_the_export_before(cli):
    Path("exported").mkdir()  # an empty folder is free
    folder = export(cli, small(), "--max_shard_size", "30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    (folder / "desktop.ini").touch()  # Windows has
    gpt = small("gpt2")
    export(cli, gpt, "--overwrite")
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert_same_logits(gpt, open_theirs(folder))


def test_exports_to_gguf_share_a_folder(cli):
    save(small())
    for quantize in ("f16", "q8_0", "f16"):
        cli(*EXPORT, "out", *GGUF, "--overwrite", "--quantize", quantize).ok()
    assert {p.name for p in Path("out").glob("*.gguf")} == {"out-f16.gguf", "out-q8_0.gguf"}


REFUSED = [  # what no class of transformers' can be
    ("gpt2", "pos_embd", "rope"), ("gpt2", "pos_embd", "none"), ("llama", "pos_embd", "learned"),
    ("gpt2", "norm", "rmsnorm"), ("qwen3", "norm", "layernorm"), ("llama", "norm", "none"),
    ("llama", "norm_weight", False),
    ("nanochat", "norm_weight", True), ("gpt_neox", "norm_position", "post"), ("llama", "embd_norm", True),
    ("nanochat", "embd_norm", False), ("llama", "qk_norm", "before_rope"), ("qwen3", "qk_norm", "none"),
    ("qwen3", "qk_norm", "after_rope"), ("gpt2", "activation", "swiglu"), ("llama", "activation", "relu"),
    ("nanochat", "activation", "swiglu"), ("gpt2", "bias", "none"), ("gpt_neox", "bias", "attn"),
    ("llama", "bias", "qkv"), ("qwen2", "bias", "none"), ("nanochat", "bias", "all"), ("llama", "rope_pct", 0.5),
    ("gpt2", "parallel_residual", True), ("llama", "logit_softcap", 30.0), ("gpt2", "n_kv_head", 2),
    ("gpt_neox", "n_kv_head", 1), ("gpt2", "head_dim", 16), ("qwen2", "head_dim", 16),
]  # fmt: skip


@pytest.mark.parametrize("arch, setting, value", REFUSED)
def test_a_setting_that_no_architecture_has_is_refused_by_name(cli, arch, setting, value):
    for flags in ((), GGUF):
        refused(cli, small(arch, **{setting: value}), *flags).fails_with(setting, str(value), arch)


@pytest.mark.parametrize("arch, overrides, flags, words", [
    *[("llama", {}, (f"--max_shard_size={size}",), ["size"]) for size in ("", "big", "-5", "5 parsecs")],
    ("gpt2", {}, ("--variant", "7M"), ["is not a 7M", "n_layer"]),
    ("llama", dict(rope_scaling="yarn", rope_factor=1.7), (), ["rope_factor 1.7"]),  # of 128 is no whole number
    ("nanochat", {}, GGUF, ["llama.cpp"]), ("qwen2", dict(activation="geglu"), GGUF, ["llama.cpp", "geglu"]),
    ("gpt2", dict(activation="relu"), GGUF, ["llama.cpp", "relu"]), ("llama", dict(bias="all"), GGUF, ["llama.cpp"]),
    ("gpt_neox", dict(activation="relu"), GGUF, ["llama.cpp", "relu"]),
    ("llama", {}, ("--model_checkpoint", "b_model.pt"), ["a_model.pt", "b_model.pt"]),  # one flag by two names
    ("llama", {}, ("--quantize", "q8_0"), ["--quantize is for --format gguf"]),
    ("llama", dict(n_embd=33, head_dim=8), (), ["n_embd 33 is not divisible by n_head"]),  # transformers' own rule
    ("llama", {}, (*GGUF, "--dtype", "float32"), ["--dtype is for --format hf"]),
])  # fmt: skip
def test_what_is_not_exported(cli, arch, overrides, flags, words):
    refused(cli, small(arch, **overrides), *flags).fails_with(*words)


def test_gguf_without_the_package(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install gguf" in refused(cli, small(), *GGUF).error


def test_an_export_that_reads_back_wrong_is_not_delivered(cli, monkeypatch):
    """The check is a real one: spoil a tensor on its way to the disk, and there is no directory."""
    import safetensors.torch

    def spoiled(tensors, *args, **kwargs):
        tensors["model.layers.1.mlp.up_proj.weight"][3] += 1
        return save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", spoiled)
    save(small())
    with pytest.raises(RuntimeError, match="differs from the model"):
        cli(*EXPORT, "x")
    assert os.listdir() == ["a_model.pt"]


def test_a_tokenizer_larger_than_the_model(cli):
    """In one of our checkpoints, and in a directory where the two do not belong together."""
    gpt, bpe = small("llama"), model.train_bpe([stdlib_source("textwrap")], 400)
    errors = [refused(cli, gpt, tokenizer=bpe).error]
    folder = export(cli, gpt)
    (folder / "tokenizer.json").write_text(bpe.backend.to_str())
    errors += [error_of(cli, folder, command) for command in ("sample", "chat")]
    assert all("400" in error and "259" in error for error in errors)


# --- Export: tokenizer, generation settings, model card


@functools.cache
def fuzzed_strings(n: int, seed: int = 0) -> list[str]:
    """All of Unicode but lone surrogates: scripts, digits, marks, spaces, controls, emoji, unassigned, and English."""
    rng = random.Random(seed)
    every = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    spaces = [c for c in every if c.isspace()] * 3 + list("\n\t \r\x00\x1c\x7f\u200b\ufeff")
    digits = [c for c in every if unicodedata.category(c)[0] == "N"]
    emoji = [chr(i) for i in range(0x1F300, 0x1FAFF)] + ["\u200d", "\ufe0f", "👩\u200d👧", "e\u0301"]
    words = "the don't They'LL we've I'm 's 're of 1234 x=3.14 ... --- naïve 東京 नमस्ते def __init__(self):".split()
    pools = [every, spaces, digits, emoji, list("abcdefghij  '\"<|>_.,"), words, [" "], ["\n"]]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(12))) for _ in range(n)]


@pytest.fixture(scope="module")
def foreign_folder(tmp_path_factory) -> Path:
    names = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    folder = tmp_path_factory.mktemp("foreign")
    return save_foreign(folder, names, before="<s>", bos_token="<s>", eos_token="<|im_end|>")


@pytest.fixture(params=["gpt2", "bpe", "byte", "foreign"])
def tokenizer(request) -> model.Tokenizer:
    if request.param == "foreign":
        return model.hf_tokenizer(request.getfixturevalue("foreign_folder"))
    return model.byte_tokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


def test_exported_tokenizer_is_ours(cli, complaints, tokenizer, shakespeare):
    """Our ids, of prompts too, and they are decoded to what they were; special tokens in a text are special over there
    only. Generation ends at the end of a turn and at the end of a text."""
    folder = export(cli, small(tokenizer=tokenizer, n_embd=8, block_size=1 << 18), tokenizer=tokenizer)
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.model_max_length == 1 << 18
    strings = [*fuzzed_strings(10_000), shakespeare[:200_000], stdlib_source("tarfile")]
    ids = theirs(strings, add_special_tokens=False).input_ids
    different = [s for s, row in zip(strings, ids, strict=True) if row != tokenizer.encode(s)]
    assert not different, different[:5]
    assert theirs.batch_decode(ids) == strings

    assert theirs("Hello 12").input_ids == tokenizer.prompt("Hello 12", 8)
    rendered = "<|im_start|>user\n 12<|im_end|>"
    assert theirs(rendered, add_special_tokens=False).input_ids == tokenizer.encode_rendered(rendered)
    plain = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert plain(rendered, add_special_tokens=False).input_ids == tokenizer.encode(rendered)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.special["<|im_end|>"]
    ids = {"gpt2": (50256,) * 3, "byte": (256,) * 3, "bpe": (1997,) * 3, "hf": (0, 2, 2)}[tokenizer.kind]
    generation, config = transformers.GenerationConfig.from_pretrained(folder), config_of(folder)
    assert set(generation.eos_token_id) == {tokenizer.special[t] for t in (model.EOT, model.IM_END)}
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == ids
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == ids
    assert (generation.bos_token_id, generation.pad_token_id) == (ids[0], ids[2])


@pytest.mark.parametrize("arch", model.ARCHS)
@pytest.mark.parametrize("kind", ["bpe", "foreign"])
def test_exported_tokenizer_is_ours_beside_every_architecture(cli, complaints, arch, kind, bpe, foreign_folder):
    """transformers has tokenizers of its own for some, which split and compose texts in their own way."""
    tokenizer = bpe if kind == "bpe" else model.hf_tokenizer(foreign_folder)
    theirs = AutoTokenizer.from_pretrained(export(cli, small(arch, tokenizer), tokenizer=tokenizer))
    strings = ["12 x=56789", "e\u0301a\u0308 \u2126", "They'LL", "a\r\n\n  b\t\tc ", "½³一二 123", *fuzzed_strings(500)]
    assert theirs(strings).input_ids == [tokenizer.bos + tokenizer.encode(s) for s in strings]


def test_special_ids_and_the_template_come_back(cli):
    """SmolLM2's: what ends a turn ends and pads a text too. Of several templates, as of old, the default counts."""
    tokens = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>", unk_token="<|endoftext|>")
    source = save_foreign(Path("source"), ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], **tokens)
    first = AutoTokenizer.from_pretrained(source)
    (source / "chat_template.jinja").unlink()
    config = json.loads((source / "tokenizer_config.json").read_text())
    templates = [{"name": n, "template": t} for n, t in (("tool_use", "no"), ("default", SYSTEM_TEMPLATE))]
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": templates}))
    tokenizer = model.hf_tokenizer(source)
    shutil.rmtree(source)
    folder = export(cli, small(tokenizer=tokenizer), tokenizer=tokenizer)
    again = AutoTokenizer.from_pretrained(folder)
    for name, i in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 2)):
        assert getattr(first, name) == getattr(again, name) == config_of(folder)[name] == i
    assert again.chat_template == SYSTEM_TEMPLATE and again.unk_token == "<|endoftext|>"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, [2, 0], 2)


def test_model_card(cli, text_file):
    """The hub's own reader finds what was measured, whatever the model is called; its command can be run again."""
    args = (*TRAIN, "--name", "it's said", "--max_iters", 4, "--eval_interval", 2)
    cli(*args).ok()
    last = log_of("it's said")[-1]
    for name in ("tiny", "7M: the best", "null", "1e3", "a 'b' \"c\" #d", "[x]", "é🙂"):
        cli("export", "--model_path", "it's said_model.pt", "--output_dir", name).ok()
        text = (Path(name) / "README.md").read_text(encoding="utf-8")
        metadata = yaml.safe_load(text.split("---\n")[1])
        assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
        assert metadata["datasets"] == ["input"] and metadata["model-index"][0]["name"] == name
        results = huggingface_hub.ModelCard(text).data.eval_results
        measured = {r.metric_type: r.metric_value for r in results}
        assert measured == {"loss": round(last["val_loss"], 4), "perplexity": round(last["val_ppl"], 4)}
        assert results[0].task_type == "text-generation"
        assert f"# {name}\n" in text and f'from_pretrained("{name}")' in text.replace('\\"', '"')
        (command,) = [line.split("`")[1] for line in text.splitlines() if "python model.py" in line]
        assert shlex.split(command) == ["python", "model.py", *map(str, args)]


@pytest.mark.parametrize("data, names", [
    (["one"], ["one"]), (["data/one"], ["one"]), (["data/one/data.bin"], ["one"]), (["my notes (1)"], ["my notes (1)"]),
    (["été"], ["été"]), (["one:0.3", "data/two 2/data.bin"], ["one", "two 2"]),
], ids=str)  # fmt: skip
def test_the_data_sets_in_a_model_card(cli, text_file, data, names):
    """However --data named them, one by one; and spelt as the hub wants them, or it refuses the card and the push."""
    for name in names:
        cli("tokenize", "--dataset", name, "--txt", "input.txt", "--tokenizer", "byte").ok()
    cli("train", "--data", *data, *TINY_RUN, "--max_iters", 1).ok()
    cli("export", "--output_dir", "out").ok()
    card = huggingface_hub.ModelCard.load("out/README.md").data
    as_on_the_hub = re.compile(r"[\w.-]+", re.ASCII).fullmatch
    for written, name in zip(card.datasets, names, strict=True):
        assert written == name if as_on_the_hub(name) else as_on_the_hub(written)
    assert as_on_the_hub(card.eval_results[0].dataset_type)
    assert card.eval_results[0].dataset_name == " + ".join(names)


def test_the_snippet_of_a_model_card_runs(cli, capsys):
    export(cli, small(block_size=80), to="tiny")
    snippet = Path("tiny/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# --- GGUF, read with the gguf package (llama.cpp itself runs in tests/peers)


@pytest.mark.parametrize(
    "quantize, tolerance", [("f32", 0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2), ("q5_0", 0.07), ("q4_0", 0.14)]
)
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_gguf_holds_the_model(cli, arch, quantize, tolerance):
    """gguf's converter names, every tensor once, values within the rounding of the type, and the settings."""
    gpt = small(arch, **({} if arch.startswith("gpt") else {"n_kv_head": 2}))
    save(gpt)
    assert f"out/out-{quantize}.gguf" in cli(*EXPORT, "out", *GGUF, "--quantize", quantize).ok().out
    reader = gguf.GGUFReader(f"out/out-{quantize}.gguf")
    metadata = {k.removeprefix(f"{arch.replace('_', '')}."): f.contents() for k, f in reader.fields.items()}
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    c, state = gpt.config, gpt.state_dict()
    expected = {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": c.n_inner,
        "attention.head_count": 4, "attention.head_count_kv": c.n_kv_head, "general.name": "out",
        "general.architecture": arch.replace("_", ""), "tokenizer.chat_template": model.CHATML,
    }  # fmt: skip
    assert {k: metadata[k] for k in expected} == expected
    assert metadata["tokenizer.ggml.tokens"][256:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    same = {"token_embd": state["wte.weight"][:259], "output_norm": state["norm_f.weight"]}
    for i in range(2):
        block = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        same |= {f"blk.{i}.ffn_down": block["mlp.proj.weight"], f"blk.{i}.attn_output": block["attn.proj.weight"]}
        same[f"blk.{i}.attn_norm"], qkv = block["norm_1.weight"], block["attn.qkv.weight"]
        if arch in ("gpt2", "gpt_neox"):
            same[f"blk.{i}.attn_qkv"] = qkv
        else:
            same |= {f"blk.{i}.attn_v": qkv[48:], f"blk.{i}.ffn_gate": block["mlp.fc.weight"][: c.n_inner]}
    for name, ours in same.items():
        difference = np.abs(tensors[f"{name}.weight"] - ours.numpy()).max()
        assert difference <= tolerance * float(ours.abs().max()), name


def test_gguf_says_which_tokens_are_found_before_a_text_is_split(corpus, tmp_path, capsys):
    """Qwen's <tool_call>, Pythia's runs of spaces: as normal tokens they are never found, and written as nothing."""
    backend = byte_level_bpe(corpus, 300, ["<|endoftext|>"])
    backend.add_tokens(["<tool_call>", "    "])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = model.hf_tokenizer(tmp_path)
    tokenizer.fields.ends = [tokenizer.vocab["<tool_call>"]]
    keys = model.gguf_tokenizer(tokenizer, small(tokenizer=tokenizer).config)
    assert keys["eot_token_id"] == tokenizer.fields.ends[0]
    types = dict(zip(keys["token_list"], keys["token_types"], strict=True))
    assert types["<tool_call>"] == types["    "] == gguf.TokenType.USER_DEFINED
    assert types["<|endoftext|>"] == gguf.TokenType.CONTROL and types["a"] == gguf.TokenType.NORMAL
    assert not capsys.readouterr().err
    backend.add_tokens([AddedToken("<|user|>", rstrip=True)])  # Phi 3's; llama.cpp leaves the spaces after it
    backend.save(str(tmp_path / "tokenizer.json"))
    model.gguf_tokenizer(model.hf_tokenizer(tmp_path), small(tokenizer=tokenizer).config)
    assert "ids beside '<|user|>' may differ" in capsys.readouterr().err


@pytest.mark.parametrize("normalizer, refused", [
    (normalizers.Lowercase(), True), (normalizers.Sequence([normalizers.NFKC()]), True), (normalizers.NFC(), False),
], ids=["Lowercase", "Sequence", "NFC"])  # fmt: skip
def test_gguf_has_no_normalizer(cli, corpus, workdir, normalizer, refused):
    """But for Qwen's NFC, which its GGUFs do without."""
    backend = byte_level_bpe(corpus, 300, ["<|endoftext|>"])
    backend.normalizer = normalizer
    backend.save("tokenizer.json")
    tokenizer = model.hf_tokenizer(workdir)
    save(small(tokenizer=tokenizer), tokenizer)
    done = cli(*EXPORT, "out", *GGUF)
    assert "normalizer" in done.error if refused else done.ok()


def filled_in(template: str, messages: list[dict[str, str]]) -> str:
    """A template of Ollama's over messages, by the rules of Go's text/template: a tag's - eats the spaces beside it."""
    template = re.sub(r"\s*\{\{-", "{{", re.sub(r"-\}\}\s*", "}}", template))
    before, body, after = re.fullmatch(r"(.*)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    turns = [body.replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return before + "".join(turns) + after


def test_modelfile(cli):
    """Ollama's file names the GGUF, renders conversations as we do, and stops where they do."""
    save(small())
    cli(*EXPORT, "out", *GGUF, "--quantize", "q8_0").ok()
    text = Path("out/Modelfile").read_text()
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', text, re.S | re.M)
    said = (("system", "Be brief."), ("user", "Hi\n{{x}}"), ("assistant", "Ho"))
    messages = [{"role": role, "content": content} for role, content in said]
    rendered = model.render_chat(model.byte_tokenizer(), messages, add_generation_prompt=True)
    assert filled_in(template, messages) == rendered
    assert text.startswith("FROM ./out-q8_0.gguf\n") and Path("out/out-q8_0.gguf").exists()
    assert re.findall(r'^PARAMETER stop "(.*)"$', text, re.M) == ["<|im_end|>", "<|endoftext|>"]


def test_modelfile_leaves_other_templates_to_the_gguf(foreign_folder):
    assert "TEMPLATE" not in model.modelfile(model.hf_tokenizer(foreign_folder), "x.gguf")


# --- The hub, which is a fake


@pytest.fixture
def hub(monkeypatch) -> list:
    """What is asked of the hub."""
    asked = []

    class Api:
        def create_repo(self, repo, **options):
            asked.append((repo, options))

        def upload_folder(self, *, repo_id, folder_path, ignore_patterns, delete_patterns=None):
            """What the repository holds then."""
            earlier = asked[-2][1] if len(asked) > 1 else set()
            earlier -= set(huggingface_hub.utils.filter_repo_objects(earlier, allow_patterns=delete_patterns or []))
            asked.append((repo_id, earlier | {p.name for p in Path(folder_path).iterdir()} - set(ignore_patterns)))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return asked


@pytest.mark.parametrize("flags, private", [((), True), (("--private", "false"), False)])
def test_push_to_hub(cli, hub, flags, private):
    """A repository that only its owner sees, unless told otherwise, with what transformers opens."""
    save(small())
    out = cli(*EXPORT, "out", "--push_to_hub", "me/tiny", *flags).ok().out
    files = {p.name for p in Path("out").iterdir()} - {"export.json"}
    assert hub == [("me/tiny", {"private": private, "exist_ok": True}), ("me/tiny", files)]
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
    assert out.endswith("pushed to https://huggingface.co/me/tiny\n")
    assert 'from_pretrained("me/tiny")' in Path("out/README.md").read_text()  # what others open


def test_a_push_again(cli, hub):
    """What this one lacks is gone: transformers would prefer one file to shards, and take an old template."""
    save(small())
    cli(*EXPORT, "out", "--push_to_hub", "me/tiny").ok()
    base = model.Tokenizer({"kind": "byte", "name": "byte", "special": {model.EOT: 256}})  # without chat tokens
    save(small(tokenizer=base), base)
    for flags in (("--max_shard_size", "30KB"), ()):
        cli(*EXPORT, "out", "--push_to_hub", "me/tiny", "--overwrite", *flags).ok()
        assert hub[-1][1] == {p.name for p in Path("out").iterdir()} - {"export.json"}
    cli(*EXPORT, "gguf", "--push_to_hub", "me/tiny", "--format", "gguf").ok()
    assert {"model.safetensors", "gguf-f16.gguf"} < hub[-1][1]


def test_a_push_that_fails(cli, hub, monkeypatch):
    """If sending fails, what was written is there."""
    save(small())
    failing = Mock(side_effect=ConnectionError("the network is gone"))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", failing)
    cli(*EXPORT, "out", "--push_to_hub", "me/tiny").fails_with("out is written", "is gone")
    assert Path("out/model.safetensors").exists()


@pytest.mark.parametrize("name, words", [("me/tiny", "offline"), ("a b/c/d", "Repo id")])
def test_the_real_hub_offline(cli, name, words):
    refused(cli, small(), "--push_to_hub", name).fails_with(f"cannot create {name} on the Hub", words)


# --- Import: what transformers makes

SHAPE = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128,
)  # fmt: skip
ROPE_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
ROPE_DEEPSEEK = {**ROPE_YARN, "mscale": 1.0, "mscale_all_dim": 0.5}


@every_model
def test_what_transformers_saves_opens(cli, arch, overrides):
    """In shards, and then in one file, beside the index of the shards that it leaves there and does not read."""
    theirs = open_theirs(export(cli, small(arch, **overrides)))
    for size in ("20KB", "5GB"):
        theirs.save_pretrained("theirs", max_shard_size=size)
        assert Path("theirs/model.safetensors").exists() is (size == "5GB")
        assert_same_logits(model.load_hf_model(Path("theirs")).eval(), theirs)
    assert Path("theirs/model.safetensors.index.json").exists()


@pytest.mark.parametrize("arch, setting, name", [
    ("gpt2", "activation_function", "gelu_pytorch_tanh"), ("gpt2", "activation_function", "gelu_fast"),
    ("llama", "hidden_act", "swish"),
])  # fmt: skip
def test_an_activation_by_another_name(cli, arch, setting, name):
    folder = export(cli, small(arch))
    config_of(folder, **{setting: name})
    assert_same_logits(model.load_hf_model(folder).eval(), open_theirs(folder))


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox"])
@pytest.mark.parametrize("prefix", [True, False])
def test_old_checkpoints(cli, arch, prefix):
    """Those published in 2019 to 2023 hold the causal masks and rotary tables too, and GPT-2's have no prefix."""
    folder = export(cli, small(arch))
    theirs = open_theirs(folder)
    tensors = load_file(folder / "model.safetensors")
    gpt2, mask = arch == "gpt2", torch.ones(128, 128).tril()[None, None]
    for i in range(2):
        attention = f"transformer.h.{i}.attn" if gpt2 else f"gpt_neox.layers.{i}.attention"
        tensors[f"{attention}.bias"] = mask.clone() if gpt2 else mask.bool()
        tensors[f"{attention}.masked_bias"] = torch.tensor(-1e9)
        tensors |= {} if gpt2 else {f"{attention}.rotary_emb.inv_freq": torch.ones(1)}
    if not prefix:
        tensors = {k.removeprefix("transformer.").removeprefix("gpt_neox."): v for k, v in tensors.items()}
    change_tensors(folder, lambda t: (t.clear(), t.update(tensors)))
    assert_same_logits(model.load_hf_model(folder).eval(), theirs)


@pytest.mark.parametrize("own", [False, True], ids=["the embedding again", "another matrix"])
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama"])
def test_a_head_in_the_weights_of_a_tied_model(cli, arch, own):
    """transformers 5 believes the weights, whatever config.json says of ties."""
    gpt = small(arch)
    folder = export(cli, gpt)
    head = "embed_out.weight" if arch == "gpt_neox" else "lm_head.weight"
    matrix = torch.randn(259, 32) if own else gpt.wte.weight[:259].detach().clone()
    change_tensors(folder, lambda t: t.update({head: matrix}))
    ours = model.load_hf_model(folder).eval()
    assert ours.config.tie_word_embeddings is not own
    assert_same_logits(ours, AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("arch", model.ARCHS)
def test_what_a_config_leaves_out_means_what_transformers_means(arch):
    """Each setting in turn: it is what their class fills in, rms_norm_eps 1e-6 for one, or ours asks for it."""
    gpt = small(arch, n_embd=256, n_head=32, rope_theta=5e5)
    whole = model.hf_config(gpt.config, model.byte_tokenizer(), "float32")
    rope = [name for name in whole if name.startswith(("rope", "rotary"))]
    newer = [name for name in rope if name.startswith("rope")]  # without these, rotary_emb_base and rotary_pct say it
    for left_out in [rope, newer, *([name] for name in whole.keys() - {"model_type", *rope})]:
        said = {k: v for k, v in whole.items() if k not in left_out}
        filled_in = transformers.AutoConfig.for_model(**said).to_dict()
        try:
            read = model.config_from_hf(said, Path())
        except model.UserError as e:
            assert left_out[0] in str(e)
        else:
            assert read == model.config_from_hf(filled_in, Path()), left_out
            assert read.norm_eps == 1e-6 or "rms_norm_eps" not in left_out


SCALES = [  # DeepSeek's two count together or not at all
    {}, {"mscale": 0.707}, {"mscale_all_dim": 0.707}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"attention_factor": 1.3},
    {"mscale": 0.707, "mscale_all_dim": 0.707}, {"mscale": 1.0, "mscale_all_dim": 0.5, "attention_factor": 1.3},
]  # fmt: skip


@pytest.mark.parametrize("said", [
    *({"rope_parameters": {**ROPE_YARN, **scales}} for scales in SCALES),
    # rope_scaling that someone adds to a newer config.json counts
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_scaling": ROPE_YARN},
    {"rope_parameters": ROPE_LLAMA3, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5},
    # the original length may stand outside
    {"rope_parameters": ROPE_LLAMA3, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16},
    # YaRN's factor may be left to the two lengths
    {"rope_parameters": {**ROPE_YARN, "factor": None}}, {"rope_parameters": {**ROPE_DEEPSEEK, "factor": None}},
], ids=str)  # fmt: skip
def test_rope_is_read_as_transformers_reads_it(said):
    theirs = transformers.LlamaConfig(**SHAPE, **json.loads(json.dumps(said)))
    expected, factor = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu")
    freqs, ours = model.rope_frequencies(model.config_from_hf({"model_type": "llama", **SHAPE, **said}, Path()))
    torch.testing.assert_close(freqs, expected, rtol=1e-6, atol=0)
    assert ours == pytest.approx(factor, rel=1e-9)


PUBLISHED = {  # config.json as transformers 4 wrote them, and the known sizes
    "Llama 3.2 1B": ({
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "mlp_bias": False,
        "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "hidden_act": "silu", "attention_bias": False,
        "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }, 1_235_814_400),
    "Qwen 2.5 0.5B": ({
        "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
        "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768,
        "use_sliding_window": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
    }, 494_032_768),
    "Qwen 3 0.6B": ({
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 40960, "attention_bias": False, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
        "tie_word_embeddings": True,
    }, 596_049_920),
    "GPT-2": ({
        "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1, "n_ctx": 1024,
        "layer_norm_epsilon": 1e-05, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "vocab_size": 50257,
    }, 124_439_808),
}  # fmt: skip


@pytest.mark.parametrize("published, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs(published, parameters):
    c = model.config_from_hf(published, Path())
    assert c == model.config_from_hf(transformers.AutoConfig.for_model(**published).to_dict(), Path())
    context = published.get("max_position_embeddings", 1024)  # Llama 3.2 does not reach the 262,144 of its factor
    written = model.hf_config(c, model.byte_tokenizer(), "float32")
    assert context == c.context == written.get("max_position_embeddings", written.get("n_positions"))
    padding = (2 - c.tie_word_embeddings) * (c.padded_vocab_size - c.vocab_size) * c.n_embd
    assert model.count_parameters(c) == parameters + padding


# --- Import: what is wrong with it


@pytest.fixture
def llama(cli) -> Path:
    return export(cli, small())


def change_tensors(folder: Path, change) -> None:
    (folder / "export.json").unlink(missing_ok=True)  # whose digest would notice first
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def error_of(cli, folder: Path | str, command: str = "sample") -> str:
    error = cli(command, "--model_checkpoint", folder, *(("--prompt", "a") if command == "sample" else ())).error
    assert str(folder) in error
    return error


@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "qwen3", "nanochat"])
def test_tensors_that_do_not_fit(cli, arch):
    """Each in turn is left out or misshapen, whatever its layout; or there is one too many: the error names it."""
    exported = export(cli, small(arch, n_layer=1))
    file = exported / "model.safetensors"
    whole, shapes = file.read_bytes(), [(3,), (2, 32), (320, 32), (2, 2, 2), (0,), ()]
    for name, tensor in load_file(file).items():
        for shape in [None, *(shape for shape in shapes if shape != tuple(tensor.shape))]:
            new = {} if shape is None else {name: torch.zeros(shape)}
            change_tensors(exported, lambda t, name=name, new=new: (t.pop(name), t.update(new)))
            with pytest.raises(model.UserError, match=f"{name}.*shape" if new else f"{name} is missing"):
                model.load_hf_model(exported)
            file.write_bytes(whole)
    for stranger in ("lm_heads.weight", "model.layers.2.mlp.up_proj.weight", "score.weight", "x"):
        change_tensors(exported, lambda t, stranger=stranger: t.update({stranger: torch.zeros(3, 3)}))
        assert stranger in error_of(cli, exported)
        file.write_bytes(whole)


UNKNOWN_ROPE = [
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0}, {"type": "su"},
    {"rope_type": "llama3", "factor": 2.0}, {"rope_type": "linear", "factor": "x"},
    {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0.5}, {**ROPE_YARN, "truncate": False},
]  # fmt: skip


@pytest.mark.parametrize("settings, words", [
    *[({"model_type": name}, [repr(name), *model.ARCHS]) for name in ("bert", None, "GPT2")],
    *[({"rope_scaling": rope, "rope_parameters": None}, []) for rope in UNKNOWN_ROPE],
    ({"rope_scaling": {"rope_type": ["yarn"]}}, ["RoPE scaling {'rope_type': ['yarn']", "not supported"]),
    ({"hidden_act": "gleu"}, ["activation 'gleu'"]),
    ({"mlp_bias": True}, ["bias is 'of the MLP alone'", "none, qkv, attn, all"]),
], ids=str)  # fmt: skip
def test_a_config_of_what_we_do_not_have(cli, llama, settings, words):
    config_of(llama, **settings)
    error = error_of(cli, llama)
    assert all(word in error for word in ["config.json", *words])


@pytest.mark.parametrize("settings", [
    {"use_sliding_window": True, "sliding_window": 4}, {"scale_attn_by_inverse_layer_idx": True},
    {"reorder_and_upcast_attn": True}, {"scale_attn_weights": False}, {"attention_bias": True}, {"mlp_bias": True},
    {"hidden_act": "gelu"}, {"rms_norm_eps": 0.5}, {"rope_theta": 5.0}, {"n_inner": None},
    {"tie_word_embeddings": False},
], ids=lambda s: next(iter(s)))  # fmt: skip
@pytest.mark.parametrize("arch", ["gpt2", "llama", "qwen2", "qwen3"])
def test_settings_that_would_change_the_logits_are_not_passed_over(cli, arch, settings):
    """Whatever a config.json says besides, ours computes what their class computes with it, or refuses."""
    folder = export(cli, small(arch))
    config_of(folder, **settings)
    try:
        ours = model.open_model(str(folder)).model
    except model.UserError as e:
        assert str(folder) in str(e)
    else:
        assert_same_logits(ours, open_theirs(folder))


def test_pickled_weights_are_refused(cli, llama):
    """And not opened: this pickle would leave a file behind."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    (llama / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(cli, llama)
    torch.save({"model.embed_tokens.weight": Bomb()}, llama / "pytorch_model.bin")
    error = error_of(cli, llama)
    assert "pytorch_model.bin" in error and "safetensors" in error and not Path("exploded").exists()


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:4], lambda b: b[:100], lambda b: b[:-1], lambda b: b + b"\0",
    lambda b: b"\xff" * 8 + b[8:], lambda b: b[:8] + b"[" + b[9:], lambda b: (10**15).to_bytes(8, "little") + b[8:],
    lambda b: b"PK\x03\x04" + b[4:], lambda b: b.replace(b'"F32"', b'"F99"'), lambda b: b.replace(b"[0,", b"[9,", 1),
], ids=["empty", "short", "cut header", "cut data", "longer", "huge header", "no JSON", "beyond the end", "zip",
        "unknown type", "overlapping"])  # fmt: skip
def test_a_corrupt_safetensors_file(cli, llama, damage):
    (llama / "export.json").unlink()  # whose digest would notice first
    file = llama / "model.safetensors"
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    assert "model.safetensors" in error_of(cli, llama)


def test_damaged_shards(cli):
    """An index that says nothing, or leads out of the folder; and a shard that is not there."""
    shards = export(cli, small(), "--max_shard_size", "30KB")
    index, lost = shards / "model.safetensors.index.json", sorted(shards.glob("*.safetensors"))[1]
    whole = index.read_text()
    for content in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}', "[]"):
        index.write_text(content)
        assert index.name in error_of(cli, shards)
    index.write_text(whole)
    lost.rename("away")
    assert lost.name in error_of(cli, shards)


def test_a_directory_that_is_no_model(cli, llama):
    Path("empty").mkdir()
    assert "config.json" in error_of(cli, "empty")
    (llama / "tokenizer.json").unlink()
    assert "tokenizer.json" in error_of(cli, llama)


# --- The hub


@pytest.fixture
def hub_cache(cli, monkeypatch) -> Path:
    """The hub's cache with tiny/model at two revisions: main, and v1 with other weights, both made of links."""
    cache = Path("hub").resolve()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--tiny--model"
    for folder in ("refs", "blobs"):
        (repo / folder).mkdir(parents=True)
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        export(cli, random_gpt(small().config, seed), to=revision)
        shutil.move(revision, repo / "blobs" / commit)
        (repo / "snapshots" / commit).mkdir(parents=True)
        for file in (repo / "blobs" / commit).iterdir():
            (repo / "snapshots" / commit / file.name).symlink_to(file)
        (repo / "refs" / revision).write_text(commit)
    return repo


def test_a_hub_id_and_its_revisions(cli, hub_cache):
    """Found in the cache, without a network."""
    sample = ("sample", "--prompt", "a", "--length", 20, "--temperature", 0, "--dtype", "float32", "--model_checkpoint")
    main, v1 = (cli(*sample, hub_cache / "snapshots" / (c * 40)).ok().out for c in "ab")
    assert main != v1
    assert cli(*sample, "tiny/model").ok().out == cli(*sample, "tiny/model@main").ok().out == main
    assert cli(*sample, "tiny/model@v1").ok().out == cli(*sample, f"tiny/model@{'b' * 40}").ok().out == v1
    assert "tiny/model@v2" in cli(*sample, "tiny/model@v2").error


def test_what_is_made_of_a_hub_model_is_named_after_it(cli, hub_cache, text_file):
    """Not after the directory of the cache, which is a commit's hash."""
    small_run = ("--finetune_iters", 1, "--block_size", 16, "--batch_size", 2, "--eval_tokens", 64)
    cli("finetune", "--model_checkpoint", "tiny/model", "--data", "input.txt", *small_run).ok()
    assert Path("checkpoints/finetuned_model_model.pt").exists(), os.listdir("checkpoints")
    assert Path("data/input_model/meta.json").exists(), os.listdir("data")


def test_a_partly_cached_model_is_fetched_whole(cli, hub_cache, monkeypatch):
    """Another program may have fetched the tokenizer only."""
    (folder,) = hub_cache.glob("snapshots/a*")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    fetched = []

    def snapshot_download(repo, *, local_files_only=False, **kwargs):
        if not local_files_only:
            fetched.append(repo)
            (folder / "model.safetensors").write_bytes(weights)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model.open_model("tiny/model")
    assert fetched == ["tiny/model"]


@pytest.mark.parametrize("command", [
    "sample --prompt a --model_checkpoint", "export --output_dir x --model_path", "chat --model_checkpoint",
    "eval --data input.txt --model_checkpoint", "finetune --data input.txt --model_checkpoint",
    "distill --student_variant 7M --data input.txt --teacher_model_path",
    "hf_tokenize --dataset x --tokenizer byte --hf_dataset",
], ids=lambda line: line.split()[0])  # fmt: skip
def test_without_a_network(cli, text_file, command):
    """One sentence that names what could not be had, and nothing left behind."""
    assert "nobody/nothing" in cli(*command.split(), "nobody/nothing").error
    assert set(os.listdir()) <= {"input.txt", "data", "checkpoints"}
    assert not list(Path("data").glob("*")) and not list(Path("checkpoints").glob("*"))


def test_a_hub_that_does_not_answer(cli, monkeypatch):
    """Not offline by choice: nothing listens where the hub should be."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    cli("export", "--output_dir", "x", "--model_path", "nobody/nothing").fails_with("nobody/nothing", "refused")
    assert not Path("x").exists()


# --- NGen3's published command lines

PUBLISHED_COMMANDS = """
python _model_.py tokenize --dataset tinyshakespeare --txt "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
python _model_.py hf_tokenize --hf_dataset roskoN/dailydialog --hf_split train --hf_text_column utterances --dataset dailydialog_train
python _model_.py train --variant 7M --data _data_tinyshakespeare_/data.bin
python _model_.py sample --variant 7M --model_checkpoint 7M_model.pt --prompt "To be, or not to be" --length 100 --temperature 1.0
python _model_.py export --variant 7M --model_path 7M_model.pt --output_dir exported_7M
python _model_.py distill --teacher_model_path hf --teacher_variant 120M --student_variant 7M --data _data_tinyshakespeare_/data.bin --temperature 2.0 --alpha 0.5
python _model_.py finetune --variant 120M --model_checkpoint distilled_120M_model.pt --data _data_conversations_/data.bin --finetune_iters 1000 --prompt "Hello, how are you?" --sample_length 100 --sample_temperature 1.0
python _model_.py hf_finetune --variant 120M --model_checkpoint distilled_120M_model.pt --hf_dataset roskoN/dailydialog --hf_split train --hf_text_column utterances --finetune_iters 1000 --prompt "Hello, how are you?" --sample_length 100 --sample_temperature 1.0
python _model_.py sample --variant 120M --model_checkpoint finetuned_120M_model.pt --prompt "What do you think about AI?" --length 100 --temperature 1.0
python _model_.py export --variant 120M --model_path finetuned_120M_model.pt --output_dir exported_finetuned_120M
"""  # noqa: E501


@pytest.fixture
def stand_ins(cli, monkeypatch, shakespeare) -> None:
    """All that the published commands fetch, by its name, with bytes for GPT-2's vocabulary; and small variants."""
    monkeypatch.setattr(model, "gpt2_tokenizer", model.byte_tokenizer)
    export(cli, small("gpt2"), to="openai-community/gpt2")
    talks = [{"utterances": [f"Say {i}.", f"It is {i}, sir."]} for i in range(400)]
    for file in ("roskoN/dailydialog/train.jsonl", "conversations.jsonl"):
        write_jsonl(file, talks)
    for name, n_layer in (("7M", 1), ("120M", 2)):
        tiny = dict(n_layer=n_layer, n_head=2, n_embd=16, block_size=64, batch_size=4)
        monkeypatch.setitem(model.VARIANTS, name, {**model.VARIANTS[name], **tiny})
    pages = {"https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt": shakespeare}
    monkeypatch.setattr(model, "download", lambda url, path, **kwargs: path.write_text(pages[url]))


def test_published_command_lines_run_as_printed(cli, stand_ins):
    """In the order of NGen3's README; what it leaves to the reader is made in between."""
    short = ("--max_iters", 2, "--eval_tokens", 64)
    for line in PUBLISHED_COMMANDS.strip().splitlines():
        line = line.replace("_data_tinyshakespeare_", "data/tinyshakespeare")
        command, *args = shlex.split(line.replace("_data_conversations_", "data/conversations"))[2:]
        if command == "finetune":
            cli("tokenize", "--dataset", "conversations", "--txt", "conversations.jsonl").ok()
            student = ("--student_variant", "120M", "--data", "tinyshakespeare")
            cli("distill", "--teacher_model_path", "hf", "--teacher_variant", "120M", *student, *short).ok()
        args = ["2" if word == "1000" else word for word in args]
        done = cli(command, *args, *(short if command in ("train", "distill") else ())).ok()
        if "finetune" in command:
            assert "before finetuning" in done.out and "after finetuning" in done.out
            assert done.out.count("Hello, how are you?") == 2
        if command == "sample":
            assert done.out.startswith(args[args.index("--prompt") + 1])
    made = [f"checkpoints/{name}_model.pt" for name in ("7M", "distilled_120M", "finetuned_120M", "hf_finetuned_120M")]
    made += [f"data/{name}/data.bin" for name in ("tinyshakespeare", "dailydialog_train")]
    assert all(Path(file).exists() for file in made)
    for name in ("exported_7M", "exported_finetuned_120M"):
        assert open_theirs(Path(name)).config.vocab_size == 259


def test_a_factor_that_reaches_less_than_the_context_is_refused():
    gpt = model.GPT(tiny_config("llama", block_size=128, **LLAMA3))
    with pytest.raises(model.UserError, match="already reaches 128 tokens"):
        gpt.extend_context(rope_scaling="yarn", rope_factor=2.0)
    gpt.extend_context(rope_scaling="yarn", rope_factor=16.0)
    assert gpt.config.context == 512
