"""Hugging Face in and out: transformers, safetensors, tokenizers and gguf are the judges of what we write and read."""

import json
import logging
import os
import random
import shlex
import shutil
import sys
import unicodedata
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import transformers
import yaml
from conftest import TINY_RUN, program, random_gpt, random_tokens, stdlib_source, tiny_config
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import decoders, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

import model

LOGITS_DIFFER_BY_AT_MOST = 1e-4  # in float32

# Every architecture with what it leaves open: ties, activations, GQA, biases, head widths, RoPE and its scalings.
YARN = dict(rope_scaling="yarn", rope_factor=4.0)
LLAMA3 = dict(rope_scaling="llama3", rope_factor=8.0, rope_original_block_size=32)
MODELS = {
    "gpt2": ("gpt2", {}),
    "gpt2, untied, relu": ("gpt2", dict(tie_word_embeddings=False, activation="relu", norm_eps=1e-6)),
    "gpt2, exact gelu, wide MLP": ("gpt2", dict(activation="gelu", n_inner=96)),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox as Pythia": (
        "gpt_neox",
        dict(parallel_residual=True, rope_pct=0.25, activation="gelu", tie_word_embeddings=False),
    ),
    "gpt_neox, linear": ("gpt_neox", dict(rope_pct=0.5, rope_scaling="linear", rope_factor=2.0)),
    "gpt_neox, yarn": ("gpt_neox", dict(parallel_residual=True, **YARN)),
    "llama, GQA": ("llama", dict(n_kv_head=2)),
    "llama, MQA, untied, geglu": ("llama", dict(n_kv_head=1, tie_word_embeddings=False, activation="geglu")),
    "llama, attention biases": ("llama", dict(bias="attn", n_kv_head=2)),
    "llama, all biases, wide heads": ("llama", dict(bias="all", head_dim=16)),
    "llama, theta": ("llama", dict(rope_theta=1e6, norm_eps=1e-4)),
    "llama, linear": ("llama", dict(rope_scaling="linear", rope_factor=4.0)),
    "llama, ntk": ("llama", dict(rope_scaling="ntk", rope_factor=2.0)),
    "llama, yarn": ("llama", dict(n_kv_head=2, rope_theta=500.0, **YARN)),
    "llama, yarn, all its settings": (
        "llama",
        dict(rope_attention_factor=1.3, rope_beta_fast=8.0, rope_beta_slow=0.5, rope_theta=100.0, **YARN),
    ),
    "llama, llama3": ("llama", dict(n_kv_head=2, **LLAMA3)),
    "qwen2": ("qwen2", dict(n_kv_head=2, rope_theta=1e6)),
    "qwen2, untied, yarn": ("qwen2", dict(tie_word_embeddings=False, **YARN)),
    "qwen3": ("qwen3", dict(n_kv_head=2)),
    "qwen3, untied, wide heads, llama3": ("qwen3", dict(tie_word_embeddings=False, head_dim=16, **LLAMA3)),
    "nanochat": ("nanochat", {}),
    "nanochat, GQA, tied, linear": (
        "nanochat",
        dict(n_kv_head=2, tie_word_embeddings=True, rope_scaling="linear", rope_factor=2.0),
    ),
    "nanochat, no soft-cap": ("nanochat", dict(logit_softcap=0.0, activation="gelu")),
}


def small(arch: str = "llama", tokenizer: model.Tokenizer | None = None, **overrides) -> model.GPT:
    """A random model for a tokenizer; by default for bytes, whose 259 tokens are padded to 320 rows."""
    n_vocab = (tokenizer or model.byte_tokenizer()).n_vocab
    return random_gpt(tiny_config(arch, **{"vocab_size": n_vocab, "block_size": 128, **overrides}))


def save(path: str, gpt: model.GPT, tokenizer: model.Tokenizer | None = None, **extra) -> str:
    spec = (tokenizer or model.byte_tokenizer()).spec
    state = {"config": asdict(gpt.config), "model": gpt.state_dict(), "tokenizer": spec, **extra}
    model.save_checkpoint(Path(path), state)
    return path


def export(cli, gpt: model.GPT, tokenizer: model.Tokenizer | None = None, *flags, to: str = "exported") -> Path:
    """The directory that the command line makes of a model."""
    done = cli("export", "--model_path", save("a_model.pt", gpt, tokenizer), "--output_dir", to, *flags).ok()
    assert done.out.startswith(f"{to}: {gpt.config.arch}, ") and done.err == ""
    assert not [p for p in Path(".").iterdir() if p.name.startswith(f".{to}")]  # nothing half-made is left
    return Path(to)


class Complaints(logging.Handler):
    """What transformers and Python warn of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


@pytest.fixture
def complaints():
    handler, logger = Complaints(), logging.getLogger("transformers")
    logger.addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield handler.said
        handler.said += [str(w.message) for w in caught]
    logger.removeHandler(handler)
    assert not handler.said


def open_theirs(folder: Path) -> transformers.PreTrainedModel:
    """As transformers opens it, every tensor accounted for."""
    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return theirs.eval()


@torch.no_grad()
def assert_same_logits(gpt: model.GPT, theirs: transformers.PreTrainedModel, atol: float = LOGITS_DIFFER_BY_AT_MOST):
    idx = random_tokens(2, 100, vocab_size=min(gpt.config.vocab_size, theirs.config.vocab_size))
    torch.testing.assert_close(gpt(idx), theirs(idx).logits.float(), atol=atol, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Export: the model
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
def test_transformers_opens_an_export_as_its_own(cli, complaints, arch, overrides):
    """The class of the architecture, no warning, our logits, and 50 greedy tokens that are `sample`'s."""
    gpt, tokenizer = small(arch, **overrides), model.byte_tokenizer()
    folder = export(cli, gpt)
    theirs = open_theirs(folder)
    assert type(theirs).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    assert theirs.config.model_type == arch and theirs.dtype == torch.float32
    assert_same_logits(gpt, theirs)

    inputs = AutoTokenizer.from_pretrained(folder)("To be, or", return_tensors="pt")
    ids = theirs.generate(**inputs, max_new_tokens=50, do_sample=False)[0].tolist()
    new = [i for i in ids[inputs["input_ids"].shape[1] :] if i not in theirs.generation_config.eos_token_id]
    sample = ("sample", "--prompt", "To be, or", "--length", 50, "--temperature", 0, "--dtype", "float32")
    for checkpoint in ("a_model.pt", folder):
        assert cli(*sample, "--model_checkpoint", checkpoint).ok().out == f"To be, or{tokenizer.decode(new)}\n"


@pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
def test_an_export_read_back_is_the_same_model(cli, arch, overrides):
    """Bit for bit, and so is the export of the import. NTK-aware scaling comes back as the larger theta that it is."""
    gpt = small(arch, **overrides)
    folder = export(cli, gpt)
    again, tokenizer, _ = model.open_model(str(folder))
    rows = gpt.config.vocab_size
    for name, tensor in gpt.state_dict().items():
        cut = slice(rows) if name in ("wte.weight", "lm_head.weight") else slice(None)
        assert torch.equal(tensor[cut], again.state_dict()[name][cut]), name
    idx = random_tokens(1, gpt.config.context, vocab_size=rows)
    torch.testing.assert_close(gpt(idx), again(idx), atol=1e-5, rtol=0)
    cli("export", "--model_path", folder, "--output_dir", "twice").ok()
    first, second = load_file(folder / "model.safetensors"), load_file("twice/model.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    same = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    for file in same:
        assert (folder / file).read_text() == (Path("twice") / file).read_text(), file


@pytest.mark.parametrize("arch, overrides", MODELS.values(), ids=MODELS)
def test_config_says_the_same_to_transformers_4_and_5(cli, arch, overrides):
    """Version 5 reads rope_parameters and dtype, version 4 rope_theta, rope_scaling and torch_dtype."""
    config = json.loads((export(cli, small(arch, **overrides)) / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32" and config["vocab_size"] == 259
    assert config["tie_word_embeddings"] is overrides.get("tie_word_embeddings", arch != "nanochat")
    assert [config[f"{t}_token_id"] for t in ("bos", "eos", "pad")] == [256] * 3
    if arch == "gpt2":
        return
    rope = dict(config["rope_parameters"])
    assert rope.pop("rope_theta") == config["rope_theta"]
    pct = rope.pop("partial_rotary_factor", 1.0)
    if arch == "gpt_neox":
        assert (pct, config["rope_theta"]) == (config["rotary_pct"], config["rotary_emb_base"])
    assert (config["rope_scaling"] or {"rope_type": "default"}) == rope
    if rope["rope_type"] == "yarn":  # version 4 takes the factor from the two lengths
        lengths = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        assert lengths == pytest.approx(rope["factor"], rel=1e-9)


@pytest.mark.parametrize("arch", model.ARCHS)
@pytest.mark.parametrize("tied", [True, False])
def test_padding_rows_and_a_tied_head_are_left_out(cli, arch, tied):
    gpt = small(arch, tie_word_embeddings=tied)
    tensors = load_file(export(cli, gpt) / "model.safetensors")
    assert gpt.wte.weight.shape[0] == 320
    vocabulary = {name for name, tensor in tensors.items() if 320 in tensor.shape or 259 in tensor.shape}
    assert all(tensors[name].shape == (259, 32) for name in vocabulary) and len(vocabulary) == 2 - tied
    exported = sum(t.numel() for t in tensors.values())
    assert exported == model.count_parameters(gpt.config) - len(vocabulary) * (320 - 259) * 32


@pytest.mark.parametrize("size, files", [("30KB", 4), ("0.05MB", 2), (5_000, 10), ("5GB", 1)])
def test_shards(cli, complaints, size, files):
    """As save_pretrained lays them out: every tensor in one file of at most the size, an index that says in which."""
    gpt = small("qwen2")
    folder = export(cli, gpt, None, "--max_shard_size", size)
    shards = sorted(folder.glob("*.safetensors"))
    if size == "5GB":
        assert [p.name for p in shards] == ["model.safetensors"]
        assert not (folder / "model.safetensors.index.json").exists()
    else:
        assert len(shards) >= files
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        limit = {"30KB": 30_000, "0.05MB": 50_000}.get(size, size)
        found = {}
        for i, shard in enumerate(shards):
            assert shard.name == f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            tensors = load_file(shard)
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            assert total <= limit or len(tensors) == 1
            found |= {name: (shard.name, t.numel() * 4) for name, t in tensors.items()}
        assert {name: file for name, (file, _) in found.items()} == index["weight_map"]
        assert sum(n for _, n in found.values()) == index["metadata"]["total_size"]
    assert_same_logits(gpt, open_theirs(folder))
    assert_same_logits(model.open_model(str(folder))[0], open_theirs(folder))


@pytest.mark.parametrize("size", ["", "big", "-5", "5 parsecs"])
def test_a_shard_size_that_is_none(cli, size):
    save("a_model.pt", small())
    error = cli("export", "--model_path", "a_model.pt", "--output_dir", "x", f"--max_shard_size={size}").error
    assert "size" in error and not Path("x").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_export_in_half_precision(cli, complaints, dtype):
    gpt, kind = small("qwen3"), getattr(torch, dtype)
    folder = export(cli, gpt, None, "--dtype", dtype)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == dtype
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
        assert {f.get_tensor(name).dtype for name in f.keys()} == {kind}
    assert open_theirs(folder).dtype == kind
    rounded = random_gpt(gpt.config)
    rounded.load_state_dict({k: v.to(kind).float() for k, v in gpt.state_dict().items()})
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_logits(rounded.eval(), theirs)


def test_a_length_that_is_no_whole_number(cli, complaints):
    """YaRN by 1.7 of 128: transformers 4 takes the factor from the lengths, and 5 warns. Exact, or refused."""
    gpt = small(rope_scaling="yarn", rope_factor=1.7)
    save("a_model.pt", gpt)
    done = cli("export", "--model_path", "a_model.pt", "--output_dir", "x")
    if done.code:
        assert "rope_factor 1.7" in done.error
    else:
        assert_same_logits(gpt, open_theirs(Path("x")))


def test_scaling_chosen_at_export(cli, complaints):
    """--rope_scaling stretches a trained context, as `sample` does with the same flags."""
    gpt = small("llama", block_size=32)
    folder = export(cli, gpt, None, "--rope_scaling", "yarn", "--rope_factor", 4)
    gpt.extend_context("yarn", 4.0)
    theirs = open_theirs(folder)
    assert theirs.config.max_position_embeddings == 128
    assert_same_logits(gpt, theirs)


def tree() -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in Path(".").rglob("*") if p.is_file()}


@pytest.mark.parametrize("output", [".", "..", "checkpoints", "folder", "exported", "a_model.pt"])
@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_overwrite_replaces_an_export_and_nothing_else(cli, workdir, monkeypatch, output, kind):
    """Not the working folder, nor the one above it, nor one with other files in it, nor an export with a stranger."""
    Path("inner/checkpoints").mkdir(parents=True)
    monkeypatch.chdir("inner")
    for path in ("../above.txt", "precious.txt", "checkpoints/other_model.pt", "folder/notes.txt"):
        Path(path).parent.mkdir(exist_ok=True)
        Path(path).write_text("precious")
    export(cli, small(), to="exported")
    Path("exported/notes.txt").write_text("precious")
    before = tree()
    run = ("export", "--model_path", "a_model.pt", "--output_dir", output, "--format", kind, "--overwrite")
    assert "no export wrote" in cli(*run).error
    assert tree() == before and Path("../above.txt").exists()


def test_overwrite_leaves_no_file_of_the_export_before(cli):
    folder = export(cli, small(), None, "--max_shard_size", "30KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    gpt = small("gpt2")
    export(cli, gpt, None, "--overwrite")
    assert [p.name for p in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert not (folder / "model.safetensors.index.json").exists()
    assert_same_logits(gpt, open_theirs(folder))


def test_exports_to_gguf_share_a_folder(cli):
    save("a_model.pt", small())
    for quantize in ("f16", "q8_0", "f16"):
        run = ("export", "--model_path", "a_model.pt", "--output_dir", "out", "--format", "gguf", "--overwrite")
        cli(*run, "--quantize", quantize).ok()
    assert {p.name for p in Path("out").glob("*.gguf")} == {"out-f16.gguf", "out-q8_0.gguf"}


REFUSED = {  # what no class of transformers' can be: (arch, setting, value)
    "rope in gpt2": ("gpt2", "pos_embd", "rope"),
    "no positions in gpt2": ("gpt2", "pos_embd", "none"),
    "learned positions in llama": ("llama", "pos_embd", "learned"),
    "rmsnorm in gpt2": ("gpt2", "norm", "rmsnorm"),
    "layernorm in qwen3": ("qwen3", "norm", "layernorm"),
    "norm without weights": ("llama", "norm_weight", False),
    "norm with weights in nanochat": ("nanochat", "norm_weight", True),
    "post-norm": ("gpt_neox", "norm_position", "post"),
    "normed embedding": ("llama", "embd_norm", True),
    "plain embedding in nanochat": ("nanochat", "embd_norm", False),
    "QK-norm in llama": ("llama", "qk_norm", True),
    "no QK-norm in qwen3": ("qwen3", "qk_norm", False),
    "swiglu in gpt2": ("gpt2", "activation", "swiglu"),
    "relu in llama": ("llama", "activation", "relu"),
    "geglu in qwen2": ("qwen2", "activation", "geglu"),
    "gpt2 without biases": ("gpt2", "bias", "none"),
    "gpt_neox with few biases": ("gpt_neox", "bias", "attn"),
    "llama with qkv biases": ("llama", "bias", "qkv"),
    "qwen2 without biases": ("qwen2", "bias", "none"),
    "nanochat with biases": ("nanochat", "bias", "all"),
    "parallel residual in gpt2": ("gpt2", "parallel_residual", True),
    "soft-cap in llama": ("llama", "logit_softcap", 30.0),
    "GQA in gpt2": ("gpt2", "n_kv_head", 2),
    "GQA in gpt_neox": ("gpt_neox", "n_kv_head", 1),
    "wide heads in gpt2": ("gpt2", "head_dim", 16),
    "wide heads in qwen2": ("qwen2", "head_dim", 16),
    "partly rotated heads in llama": ("llama", "rope_pct", 0.5),
}


@pytest.mark.parametrize("format", ["hf", "gguf"])
@pytest.mark.parametrize("arch, setting, value", REFUSED.values(), ids=REFUSED)
def test_a_setting_that_no_architecture_has_is_refused_by_name(cli, arch, setting, value, format):
    save("a_model.pt", small(arch, **{setting: value}))
    error = cli("export", "--model_path", "a_model.pt", "--output_dir", "x", "--format", format).error
    assert error.startswith(f"{setting} {value} cannot be exported") and arch in error
    assert not Path("x").exists() and sorted(os.listdir()) == ["a_model.pt"]


def test_an_export_that_reads_back_wrong_is_not_delivered(cli, monkeypatch):
    """The check is a real one: spoil a tensor on its way to the disk, and there is no directory."""
    import safetensors.torch

    def spoiled(tensors, *args, **kwargs):
        tensors["model.layers.1.mlp.up_proj.weight"][3] += 1
        return save_file(tensors, *args, **kwargs)

    monkeypatch.setattr(safetensors.torch, "save_file", spoiled)
    save("a_model.pt", small())
    with pytest.raises(RuntimeError, match="differs from the model"):
        cli("export", "--model_path", "a_model.pt", "--output_dir", "x")
    assert sorted(os.listdir()) == ["a_model.pt"]


def test_an_output_directory_in_the_way(cli):
    save("a_model.pt", small())
    run = ("export", "--model_path", "a_model.pt", "--output_dir", "mine")
    Path("mine").mkdir()
    cli(*run).ok()  # an empty one is none
    Path("mine/notes.txt").write_text("keep me")
    assert "mine is already there" in cli(*run).error
    assert Path("mine/notes.txt").read_text() == "keep me"
    assert "notes.txt" in cli(*run, "--overwrite").error and Path("mine/notes.txt").read_text() == "keep me"
    Path("mine/notes.txt").unlink()
    cli(*run, "--overwrite").ok()
    Path("file").write_text("keep me too")
    assert "file is already there" in cli(*run[:-1], "file").error
    assert Path("file").read_text() == "keep me too"


def test_the_variant_is_checked(cli):
    save("a_model.pt", small("gpt2"))
    error = cli("export", "--variant", "7M", "--model_path", "a_model.pt", "--output_dir", "x").error
    assert "is not a 7M" in error and "n_layer" in error


def test_a_tokenizer_larger_than_the_model(cli):
    """In one of our checkpoints, and in a directory where the two do not belong together."""
    gpt, bpe = small("llama"), model.train_bpe([stdlib_source("textwrap")], 400)
    save("a_model.pt", gpt, bpe)
    error = cli("export", "--model_path", "a_model.pt", "--output_dir", "x").error
    assert "400" in error and "259" in error
    folder = export(cli, gpt)
    model.to_hf_tokenizer(bpe).save(str(folder / "tokenizer.json"))
    for command in (("sample", "--prompt", "a"), ("chat",)):
        error = cli(*command, "--model_checkpoint", folder).error
        assert "400" in error and "259" in error


# ---------------------------------------------------------------------------------------------------------------------
# Export: tokenizer, generation settings, model card
# ---------------------------------------------------------------------------------------------------------------------


def fuzzed_strings(n: int, seed: int = 0) -> list[str]:
    """Short strings of all of Unicode but lone surrogates: letters of many scripts, digits, marks, spaces, controls,
    emoji, unassigned code points, and English to join them."""
    rng = random.Random(seed)
    every = [chr(i) for i in range(0x30000) if not 0xD800 <= i < 0xE000]
    spaces = [c for c in every if c.isspace()] * 3 + list("\n\t \r\x00\x1c\x7f\u200b\ufeff")
    digits = [c for c in every if unicodedata.category(c)[0] == "N"]
    emoji = [chr(i) for i in range(0x1F300, 0x1FAFF)] + ["\u200d", "\ufe0f", "👩\u200d👧", "e\u0301"]
    words = "the don't They'LL we've I'm 's 're of 1234 x=3.14 ... --- naïve 東京 नमस्ते def __init__(self):".split()
    pools = [every, spaces, digits, emoji, list("abcdefghij  '\"<|>_.,"), words, [" "], ["\n"]]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(12))) for _ in range(n)]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return stdlib_source("argparse", "textwrap", "datetime", "typing").splitlines(keepends=True)


@pytest.fixture(scope="module")
def bpe(corpus):
    return model.train_bpe(corpus, 1000)


SYSTEM_TEMPLATE = (  # in the manner of published ones: a default system turn
    "{{ bos_token }}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def foreign_folder(corpus, tmp_path_factory) -> Path:
    """A directory with a tokenizer that is none of ours: digits one by one, other special tokens, a token put before
    every text, a chat template of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    names = ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|im_end|>")
    theirs.chat_template = SYSTEM_TEMPLATE
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(params=["gpt2", "bpe", "byte", "foreign"])
def tokenizer(request) -> model.Tokenizer:
    if request.param == "foreign":
        return model.hf_tokenizer(request.getfixturevalue("foreign_folder"))
    return model.byte_tokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


def test_exported_tokenizer_gives_our_ids(cli, tokenizer, shakespeare):
    """On 10,000 fuzzed strings, Tiny Shakespeare and code; and it decodes them to what they were."""
    theirs = AutoTokenizer.from_pretrained(export(cli, small(tokenizer=tokenizer, n_embd=8), tokenizer))
    strings = fuzzed_strings(10_000)
    ids = theirs(strings, add_special_tokens=False).input_ids
    different = [s for s, row in zip(strings, ids, strict=True) if row != tokenizer.encode(s)]
    assert not different, different[:5]
    assert theirs.batch_decode(ids) == strings
    for text in (shakespeare, stdlib_source("tarfile")):
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)


def test_exported_tokenizer_opens_texts_as_ours_opens_prompts(cli, tokenizer):
    """With what the tokenizer puts before a text, if anything; special tokens in a text are special over there only."""
    theirs = AutoTokenizer.from_pretrained(export(cli, small(tokenizer=tokenizer, n_embd=8), tokenizer))
    assert theirs("Hello 12").input_ids == tokenizer.prompt("Hello 12")
    rendered = "<|im_start|>user\n 12<|im_end|>"
    assert theirs(rendered, add_special_tokens=False).input_ids == tokenizer.encode_rendered(rendered)
    plain = AutoTokenizer.from_pretrained("exported", split_special_tokens=True)
    assert plain(rendered, add_special_tokens=False).input_ids == tokenizer.encode(rendered)
    assert theirs.convert_tokens_to_ids("<|im_end|>") == tokenizer.special["<|im_end|>"]
    assert theirs.model_max_length == 128
    assert (theirs.bos_token_id, theirs.eos_token_id) == {
        "foreign": (0, 2), "gpt2": (50256, 50256), "byte": (256, 256), "bpe-1000": (997, 997),
    }.get(tokenizer.name, (0, 2))  # fmt: skip


def test_generation_config(cli, complaints, tokenizer):
    """Generation ends at the end of a turn and at the end of a text."""
    folder = export(cli, small(tokenizer=tokenizer, n_embd=8), tokenizer)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert set(generation.eos_token_id) == {tokenizer.special[t] for t in (model.EOT, model.IM_END)}
    config = json.loads((folder / "config.json").read_text())
    assert generation.bos_token_id == config["bos_token_id"] and generation.pad_token_id == config["pad_token_id"]


@pytest.fixture
def trained(cli, text_file) -> dict:
    """A run of a few steps, its own command line, and the last record of its log."""
    prompt = ("--name", "said", "--tokenizer", "byte", "--max_iters", 4, "--eval_interval", 2)
    args = ("train", "--data", "input.txt", *TINY_RUN, *prompt)
    cli(*args).ok()
    records = [json.loads(line) for line in Path("checkpoints/said_model.jsonl").read_text().splitlines()]
    return {"args": [str(a) for a in args], "log": records}


@pytest.mark.parametrize("name", ["tiny", "7M: the best", "null", "1e3", "a 'b' \"c\" #d", "[x]", "é🙂"])
def test_model_card(cli, trained, name):
    """The hub's own reader finds what was measured, in metadata that are YAML whatever the model is called."""
    cli("export", "--model_path", "said_model.pt", "--output_dir", name).ok()
    text = (Path(name) / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(text.split("---\n")[1])
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert metadata["datasets"] == ["input"]
    results = huggingface_hub.ModelCard(text).data.eval_results
    last = trained["log"][-1]
    measured = {r.metric_type: r.metric_value for r in results}
    assert measured == {"loss": round(last["val_loss"], 4), "perplexity": round(last["val_ppl"], 4)}
    assert results[0].dataset_name == "input" and results[0].task_type == "text-generation"
    assert metadata["model-index"][0]["name"] == name
    assert f"# {name}\n" in text and f'from_pretrained("{name}")' in text.replace('\\"', '"')


def test_the_command_in_a_model_card_can_be_run_again(cli, trained, monkeypatch):
    checkpoint = model.load_checkpoint(Path("checkpoints/said_model.pt"))
    checkpoint["arguments"] = ["finetune", "--prompt", "Hello, how are you?", "--data", "my chats.jsonl"]
    model.save_checkpoint(Path("quoted.pt"), {**checkpoint, "kind": "finetune"})
    for path, args in (("said_model.pt", trained["args"]), ("quoted.pt", checkpoint["arguments"])):
        cli("export", "--model_path", path, "--output_dir", "card", "--overwrite").ok()
        text = Path("card/README.md").read_text()
        (line,) = [line for line in text.splitlines() if "python model.py" in line]
        assert shlex.split(line.split("`")[1]) == ["python", "model.py", *args]


def test_the_data_set_in_a_model_card_is_its_name(cli, text_file):
    """However --data named it."""
    cli("tokenize", "--dataset", "shakespeare", "--txt", "input.txt", "--tokenizer", "byte").ok()
    for i, data in enumerate(["shakespeare", "data/shakespeare", "data/shakespeare/data.bin"]):
        cli("train", "--data", data, *TINY_RUN, "--max_iters", 1, "--name", f"run{i}").ok()
        cli("export", "--model_path", f"run{i}_model.pt", "--output_dir", f"out{i}").ok()
        assert huggingface_hub.ModelCard.load(f"out{i}/README.md").data.datasets == ["shakespeare"]


def test_the_snippet_of_a_model_card_runs(cli, capsys):
    export(cli, small(block_size=80), to="tiny")
    snippet = Path("tiny/README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(snippet, {})
    assert capsys.readouterr().out.startswith("Once upon a time")


# ---------------------------------------------------------------------------------------------------------------------
# GGUF, read with the gguf package (llama.cpp itself runs in tests/peers)
# ---------------------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and dequantised tensors."""
    reader = gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items()}
    return fields, {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}


@pytest.mark.parametrize("quantize, tolerance", [("f32", 0), ("f16", 1e-3), ("bf16", 8e-3), ("q8_0", 2e-2)])
@pytest.mark.parametrize("arch", ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3"])
def test_gguf_holds_the_model(cli, arch, quantize, tolerance):
    """gguf's converter names, every tensor once, values within the rounding of the type, and the settings."""
    gpt = small(arch, **({} if arch.startswith("gpt") else {"n_kv_head": 2}))
    save("a_model.pt", gpt)
    done = cli(
        "export", "--model_path", "a_model.pt", "--output_dir", "out", "--format", "gguf", "--quantize", quantize
    )
    assert f"out/out-{quantize}.gguf" in done.ok().out
    metadata, tensors = read_gguf(Path(f"out/out-{quantize}.gguf"))
    name = arch.replace("_", "")
    assert metadata["general.architecture"] == name and metadata["general.name"] == "out"
    c = gpt.config
    for key, value in {
        "context_length": 128, "embedding_length": 32, "block_count": 2, "feed_forward_length": c.n_inner,
        "attention.head_count": 4, "attention.head_count_kv": c.n_kv_head,
    }.items():  # fmt: skip
        assert metadata[f"{name}.{key}"] == value, key
    assert metadata["tokenizer.ggml.tokens"][256:] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert metadata["tokenizer.chat_template"] == model.CHATML
    state = gpt.state_dict()

    def same(theirs: str, ours: torch.Tensor) -> None:
        difference = np.abs(tensors[theirs] - ours.numpy()).max()
        assert difference <= tolerance * float(ours.abs().max()), theirs

    same("token_embd.weight", state["wte.weight"][:259])
    for i in range(2):
        same(f"blk.{i}.ffn_down.weight", state[f"blocks.{i}.mlp.proj.weight"])
        same(f"blk.{i}.attn_output.weight", state[f"blocks.{i}.attn.proj.weight"])
        same(f"blk.{i}.attn_norm.weight", state[f"blocks.{i}.norm_1.weight"])
        if arch in ("gpt2", "gpt_neox"):
            same(f"blk.{i}.attn_qkv.weight", state[f"blocks.{i}.attn.qkv.weight"])
        else:
            same(f"blk.{i}.attn_v.weight", state[f"blocks.{i}.attn.qkv.weight"][48:])
            same(f"blk.{i}.ffn_gate.weight", state[f"blocks.{i}.mlp.fc.weight"][: c.n_inner])
    same("output_norm.weight", state["norm_f.weight"])


@pytest.mark.parametrize("arch, overrides", [
    ("nanochat", {}), ("gpt2", dict(activation="relu")), ("llama", dict(activation="geglu")),
    ("llama", dict(bias="all")), ("gpt_neox", dict(activation="relu")),
])  # fmt: skip
def test_what_llama_cpp_does_not_know_is_refused(cli, arch, overrides):
    save("a_model.pt", small(arch, **overrides))
    error = cli("export", "--model_path", "a_model.pt", "--output_dir", "x", "--format", "gguf").error
    assert "llama.cpp" in error and not Path("x").exists()


def test_gguf_without_the_package(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    save("a_model.pt", small())
    assert (
        "pip install gguf" in cli("export", "--model_path", "a_model.pt", "--output_dir", "x", "--format", "gguf").error
    )


# ---------------------------------------------------------------------------------------------------------------------
# Import: what transformers makes
# ---------------------------------------------------------------------------------------------------------------------

SHAPE = dict(
    vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128,
)  # fmt: skip
ROPE3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
THEIRS = {
    "GPT-2": transformers.GPT2Config(vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=4),
    "GPT-2, quick gelu in its tanh form": transformers.GPT2Config(
        vocab_size=259, n_positions=128, n_embd=32, n_layer=2, n_head=4, activation_function="gelu_pytorch_tanh"
    ),
    "Pythia": transformers.GPTNeoXConfig(**SHAPE, rotary_pct=0.25),
    "GPT-NeoX, sequential": transformers.GPTNeoXConfig(**SHAPE, use_parallel_residual=False, tie_word_embeddings=True),
    "Llama 2": transformers.LlamaConfig(**SHAPE),
    "Llama 3": transformers.LlamaConfig(**SHAPE, num_key_value_heads=2, rope_parameters=ROPE3),
    "SmolLM2": transformers.LlamaConfig(
        **SHAPE, num_key_value_heads=1, tie_word_embeddings=True, rope_parameters={"rope_theta": 1e5}
    ),
    "Llama with biases": transformers.LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "Qwen 2.5": transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, tie_word_embeddings=True),
    "Qwen 2.5, yarn": transformers.Qwen2Config(**SHAPE, num_key_value_heads=2, rope_parameters=ROPE_YARN),
    "Qwen 3": transformers.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16),
    "nanochat": transformers.NanoChatConfig(**SHAPE, num_key_value_heads=2),
}


def random_theirs(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    """One of their models with every parameter random."""
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.normal_(1.0 if "norm" in name or "ln_" in name else 0.0, 0.2)
    return theirs


def add_tokenizer(folder: Path) -> Path:
    """A tokenizer of bytes, as a tokenizer.json."""
    model.to_hf_tokenizer(model.byte_tokenizer()).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("config", THEIRS.values(), ids=THEIRS)
def test_a_model_of_transformers_opens(workdir, config):
    """save_pretrained's directory, whole and in shards: their logits, and every parameter counted."""
    theirs = random_theirs(config)
    theirs.save_pretrained("one")
    theirs.save_pretrained("shards", max_shard_size="20KB")
    assert len(list(Path("shards").glob("*.safetensors"))) > 3
    for name in ("one", "shards"):
        gpt, _, rest = model.open_model(str(add_tokenizer(Path(name))))
        assert_same_logits(gpt, theirs)
        n_tied = 2 - gpt.config.tie_word_embeddings
        padding = n_tied * (gpt.config.padded_vocab_size - 259) * 32
        assert model.count_parameters(gpt.config) == theirs.num_parameters() + padding
        assert rest["variant"] == name
    half = model.load_hf_model(Path("one"), torch.bfloat16, "cpu")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("config", [THEIRS["GPT-2"], THEIRS["Pythia"]], ids=["GPT-2", "Pythia"])
@pytest.mark.parametrize("prefix", [True, False])
def test_old_checkpoints(workdir, config, prefix):
    """Those published in 2019 to 2023 hold the causal masks and rotary tables too, and GPT-2's have no prefix."""
    theirs = random_theirs(config)
    theirs.save_pretrained("old")
    tensors = load_file("old/model.safetensors")
    for i in range(2):
        mask = torch.ones(128, 128).tril()[None, None]
        if config.model_type == "gpt2":
            tensors |= {f"transformer.h.{i}.attn.bias": mask, f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4)}
        else:
            attention = f"gpt_neox.layers.{i}.attention"
            tensors |= {f"{attention}.bias": mask.bool(), f"{attention}.masked_bias": torch.tensor(-1e9)}
            tensors[f"{attention}.rotary_emb.inv_freq"] = torch.ones(1)
    if not prefix:
        tensors = {k.removeprefix("transformer.").removeprefix("gpt_neox."): v for k, v in tensors.items()}
    save_file(tensors, "old/model.safetensors")
    assert_same_logits(model.load_hf_model(Path("old"), torch.float32, "cpu").eval(), theirs)


def test_a_tied_head_that_was_saved_too(workdir):
    theirs = random_theirs(THEIRS["SmolLM2"])
    theirs.save_pretrained("a")
    tensors = load_file("a/model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, "a/model.safetensors")
    assert_same_logits(model.load_hf_model(Path("a"), torch.float32, "cpu").eval(), theirs)


PUBLISHED = {  # config.json as transformers 4 wrote them, and what they say
    "Llama 3.2 1B": (
        {
            "model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
            "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
        dict(rope_scaling="llama3", rope_factor=32.0, rope_original_block_size=8192, rope_theta=5e5, n_kv_head=8),
        1_235_814_400,
    ),
    "Pythia 70M": (
        {
            "model_type": "gpt_neox", "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 2048,
            "num_hidden_layers": 6, "num_attention_heads": 8, "max_position_embeddings": 2048, "layer_norm_eps": 1e-05,
            "hidden_act": "gelu", "rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True,
            "tie_word_embeddings": False,
        },
        dict(rope_pct=0.25, parallel_residual=True, activation="gelu", tie_word_embeddings=False, rope_theta=1e4),
        70_426_624,
    ),
    "Qwen 2.5 0.5B": (
        {
            "model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
            "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "hidden_act": "silu",
            "max_position_embeddings": 32768, "max_window_layers": 24, "sliding_window": 32768,
            "use_sliding_window": False, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": True,
        },
        dict(bias="qkv", n_kv_head=2, rope_theta=1e6, norm_eps=1e-6, head_dim=64),
        494_032_768,
    ),
    "Qwen 3 0.6B": (
        {
            "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "hidden_act": "silu", "max_position_embeddings": 40960, "attention_bias": False, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "use_sliding_window": False,
            "tie_word_embeddings": True,
        },
        dict(qk_norm=True, head_dim=128, rope_scaling="none", rope_theta=1e6),
        596_049_920,
    ),
    "GPT-2": (
        {
            "model_type": "gpt2", "activation_function": "gelu_new", "attn_pdrop": 0.1, "embd_pdrop": 0.1,
            "layer_norm_epsilon": 1e-05, "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
            "resid_pdrop": 0.1, "vocab_size": 50257,
        },
        dict(tie_word_embeddings=True, activation="gelu_new", n_inner=3072, block_size=1024),
        124_439_808,
    ),
}  # fmt: skip


@pytest.mark.parametrize("j, expected, parameters", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs(j, expected, parameters):
    """Known models have their known sizes."""
    c = model.config_from_hf(j, Path("config.json"))
    assert {k: getattr(c, k) for k in expected} == expected
    padding = (2 - c.tie_word_embeddings) * (c.padded_vocab_size - c.vocab_size) * c.n_embd
    assert model.count_parameters(c) == parameters + padding


def test_published_names():
    """`hf` as a teacher is the GPT-2 of the variant's size."""
    sizes = {"120M": "gpt2", "300M": "gpt2-medium", "700M": "gpt2-large", "1B": "gpt2-xl"}
    assert model.HF_ALIASES == {k: f"openai-community/{v}" for k, v in sizes.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Import: what is wrong with it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["gpt2", "gpt_neox", "llama", "qwen3", "nanochat"])
def exported(request, cli) -> Path:
    return export(cli, small(request.param))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def error_of(cli, folder: Path | str, command: str = "sample") -> str:
    error = cli(command, "--model_checkpoint", folder, *(("--prompt", "a") if command == "sample" else ())).error
    assert str(folder) in error
    return error


def test_every_tensor_is_missed(cli, exported):
    """Leave out each in turn: the error names it."""
    names = list(load_file(exported / "model.safetensors"))
    whole = (exported / "model.safetensors").read_bytes()
    for name in names:
        change_tensors(exported, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(model.UserError, match=f"{name} is missing"):
            model.load_hf_model(exported, torch.float32, "cpu")
        (exported / "model.safetensors").write_bytes(whole)
    change_tensors(exported, lambda tensors: tensors.pop(names[0]))
    assert f"{names[0]} is missing" in error_of(cli, exported)


@pytest.mark.parametrize("stranger", ["lm_heads.weight", "model.layers.2.mlp.up_proj.weight", "score.weight", "x"])
def test_a_left_over_tensor(cli, exported, stranger):
    change_tensors(exported, lambda tensors: tensors.update({stranger: torch.zeros(3, 3)}))
    assert stranger in error_of(cli, exported)


@pytest.mark.parametrize("shape", [(3,), (2, 32), (320, 32), (2, 2, 2), (0,), ()], ids=str)
def test_every_misshapen_tensor(exported, shape):
    """Whatever the layout in the file (transposed, interleaved, mirrored): the error names the tensor."""
    tensors = load_file(exported / "model.safetensors")
    whole = (exported / "model.safetensors").read_bytes()
    for name, tensor in tensors.items():
        if tuple(tensor.shape) == shape:
            continue
        change_tensors(exported, lambda t, name=name: t.update({name: torch.zeros(shape)}))
        with pytest.raises(model.UserError, match=f"{name}.*shape"):
            model.load_hf_model(exported, torch.float32, "cpu")
        (exported / "model.safetensors").write_bytes(whole)


LIES = {  # config.json's words for (vocabulary, width, layers, MLP)
    "vocab_size": [258, 320, 1000], "hidden_size": [16, 64, 40], "n_embd": [16, 64, 40],
    "num_hidden_layers": [1, 3], "n_layer": [1, 3], "intermediate_size": [64, 20], "n_inner": [64, 20],
    "num_key_value_heads": [1, 2], "head_dim": [4, 16], "n_positions": [64, 256],
}  # fmt: skip


def test_a_config_that_lies_about_a_shape(cli, exported):
    config = json.loads((exported / "config.json").read_text())
    told = 0
    for name, values in LIES.items():
        for value in values if name in config else ():
            (exported / "config.json").write_text(json.dumps({**config, name: value}))
            error = error_of(cli, exported)
            assert "tensor" in error or name == "vocab_size" and "tokenizer" in error, (name, value)
            told += 1
    assert told >= 9


NONSENSE = [
    {"num_hidden_layers": "two", "n_layer": "two"}, {"hidden_size": -32, "n_embd": -32},
    {"num_attention_heads": 0, "n_head": 0}, {"num_attention_heads": 5, "n_head": 5}, {"vocab_size": None},
    {"vocab_size": 0}, {"hidden_size": 32.5, "n_embd": 32.5}, {"hidden_act": "gleu", "activation_function": "gleu"},
    {"intermediate_size": -1, "n_inner": -1}, {"max_position_embeddings": [1], "n_positions": [1]},
    {"rms_norm_eps": "small", "layer_norm_eps": "small", "layer_norm_epsilon": "small"},
]  # fmt: skip


@pytest.mark.parametrize("wrong", NONSENSE, ids=str)
def test_a_config_of_nonsense(cli, exported, wrong):
    """Every value a JSON file can hold ends in one sentence."""
    config = json.loads((exported / "config.json").read_text())
    wrong = {k: v for k, v in wrong.items() if k in config}
    (exported / "config.json").write_text(json.dumps({**config, **wrong}))
    assert cli("sample", "--prompt", "a", "--model_checkpoint", exported).error


@pytest.mark.parametrize("rope", [
    {"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "longrope", "factor": 2.0}, {"type": "su"},
    {"rope_type": "llama3", "factor": 2.0}, {"rope_type": "linear", "factor": "x"},
    {"rope_type": "linear", "factor": 0.5},
], ids=str)  # fmt: skip
def test_rope_scaling_that_we_do_not_have(cli, rope):
    folder = export(cli, small())
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps({**config, "rope_scaling": rope}))
    assert "config.json" in error_of(cli, folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"gpt2"', "\xff\xfe", "{}"])
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_json_file(cli, file, content):
    folder = export(cli, small())
    (folder / file).write_bytes(content.encode("latin-1"))
    if (file, content) == ("tokenizer_config.json", "{}"):
        cli("sample", "--prompt", "a", "--model_checkpoint", folder).ok()
    else:
        error_of(cli, folder)


@pytest.mark.parametrize("model_type", ["bert", "mamba", None, "GPT2", ["gpt2"]])
def test_an_unsupported_model_type_lists_the_supported(cli, model_type):
    folder = export(cli, small())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    error = error_of(cli, folder)
    assert repr(model_type) in error and all(arch in error for arch in model.ARCHS)


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
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    try:
        ours = model.open_model(str(folder))[0]
    except model.UserError as e:
        assert str(folder) in str(e)
        return
    assert_same_logits(ours, open_theirs(folder))


def test_pickled_weights_are_refused(cli):
    """And not opened: this pickle would leave a file behind."""

    class Bomb:
        def __reduce__(self):
            return Path.touch, (Path("exploded"),)

    folder = export(cli, small())
    (folder / "model.safetensors").unlink()
    assert "model.safetensors" in error_of(cli, folder)
    torch.save({"model.embed_tokens.weight": Bomb()}, folder / "pytorch_model.bin")
    error = error_of(cli, folder)
    assert "pytorch_model.bin" in error and "safetensors" in error and not Path("exploded").exists()


@pytest.mark.parametrize("damage", [
    lambda b: b"", lambda b: b[:4], lambda b: b[:100], lambda b: b[:-1], lambda b: b + b"\0",
    lambda b: b"\xff" * 8 + b[8:], lambda b: b[:8] + b"[" + b[9:], lambda b: (10**15).to_bytes(8, "little") + b[8:],
    lambda b: b"PK\x03\x04" + b[4:], lambda b: b.replace(b'"F32"', b'"F99"'), lambda b: b.replace(b"[0,", b"[9,", 1),
], ids=["empty", "short", "cut header", "cut data", "longer", "huge header", "no JSON", "beyond the end", "zip",
        "unknown type", "overlapping"])  # fmt: skip
def test_a_corrupt_safetensors_file(cli, damage):
    folder = export(cli, small())
    file = folder / "model.safetensors"
    damaged = damage(file.read_bytes())
    assert damaged != file.read_bytes()
    file.write_bytes(damaged)
    assert "model.safetensors" in error_of(cli, folder)


def test_a_shard_that_is_not_there(cli):
    folder = export(cli, small(), None, "--max_shard_size", "30KB")
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.rename("away")
    assert lost.name in error_of(cli, folder)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": "../../etc/passwd"}}', "[]"])
def test_a_damaged_index(cli, index):
    folder = export(cli, small(), None, "--max_shard_size", "30KB")
    (folder / "model.safetensors.index.json").write_text(index)
    error_of(cli, folder)


def test_a_directory_that_is_no_model(cli):
    Path("empty").mkdir()
    assert "config.json" in error_of(cli, "empty")
    folder = export(cli, small())
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json" in error_of(cli, folder)


# ---------------------------------------------------------------------------------------------------------------------
# The hub
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(cli, monkeypatch) -> Path:
    """The hub's cache with tiny/model in it, at two revisions: main, and v1 with other weights."""
    cache = Path("hub").resolve()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    repo = cache / "models--tiny--model"
    (repo / "refs").mkdir(parents=True)
    for seed, (revision, commit) in enumerate({"main": "a" * 40, "v1": "b" * 40}.items()):
        gpt = random_gpt(small().config, seed)
        export(cli, gpt, to=revision)
        shutil.move(revision, repo / "snapshots" / commit)
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


COMMANDS = {
    "sample": ("sample", "--prompt", "a", "--model_checkpoint", "nobody/nothing"),
    "export": ("export", "--model_path", "nobody/nothing", "--output_dir", "x"),
    "eval": ("eval", "--model_checkpoint", "nobody/nothing", "--data", "input.txt"),
    "chat": ("chat", "--model_checkpoint", "nobody/nothing"),
    "finetune": ("finetune", "--model_checkpoint", "nobody/nothing", "--data", "input.txt"),
    "distill": ("distill", "--teacher_model_path", "nobody/nothing", "--student_variant", "7M", "--data", "input.txt"),
    "hf_tokenize": ("hf_tokenize", "--hf_dataset", "nobody/nothing", "--dataset", "x", "--tokenizer", "byte"),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_without_a_network(cli, text_file, command):
    """One sentence that names what could not be had, and nothing left behind."""
    assert "nobody/nothing" in cli(*command).error
    assert set(os.listdir()) <= {"input.txt", "data", "checkpoints"}
    assert not list(Path("data").glob("*")) and not list(Path("checkpoints").glob("*"))


def test_a_hub_that_does_not_answer(workdir):
    """Not offline by choice: nothing listens where the hub should be."""
    env = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workdir / "home")}
    done = program(*COMMANDS["export"], cwd=workdir, env=env)
    assert done.returncode == 1 and b"Traceback" not in done.stderr
    assert b"nobody/nothing" in done.stderr.splitlines()[-1] and not (workdir / "x").exists()


def test_a_teacher_variant_that_gpt2_does_not_come_in(cli, text_file):
    error = cli("distill", "--teacher_model_path", "hf", "--teacher_variant", "7M", "--student_variant", "7M").error
    assert "120M, 300M, 700M, 1B" in error


# ---------------------------------------------------------------------------------------------------------------------
# NGen3's published command lines
# ---------------------------------------------------------------------------------------------------------------------

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
def stand_ins(workdir, monkeypatch, gpt2, shakespeare) -> None:
    """Everything that the published commands fetch, and variants of a size for a test."""
    import datasets

    Path("conversations.jsonl").write_text(
        "".join(json.dumps({"utterances": [f"Say {i}.", f"It is {i}, sir."]}) + "\n" for i in range(400))
    )
    teacher = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2))
    teacher.save_pretrained("openai-gpt2")
    vocabulary = json.loads(model.to_hf_tokenizer(gpt2).to_str())
    vocabulary["added_tokens"] = [t for t in vocabulary["added_tokens"] if t["content"] == model.EOT]
    Path("openai-gpt2/tokenizer.json").write_text(json.dumps(vocabulary))  # as published: no chat tokens
    for name in ("7M", "120M"):
        tiny = dict(n_layer=1 + (name == "120M"), n_head=2, n_embd=16, block_size=32, batch_size=4)
        monkeypatch.setitem(model.VARIANTS, name, {**model.VARIANTS[name], **tiny})
    load_dataset = datasets.load_dataset

    def from_file(name, *args, **kwargs):
        if name == "roskoN/dailydialog":
            return load_dataset("json", data_files="conversations.jsonl", split=kwargs["split"])
        return load_dataset(name, *args, **kwargs)

    def download(url, path, **kwargs):
        assert url.startswith("https://raw.githubusercontent.com/karpathy/")
        path.write_text(shakespeare[:100_000])

    def snapshot_download(repo, **kwargs):
        assert repo == "openai-community/gpt2"
        return "openai-gpt2"

    monkeypatch.setattr(datasets, "load_dataset", from_file)
    monkeypatch.setattr(model, "download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_published_command_lines_run_as_printed(cli, stand_ins):
    """In the order of NGen3's README; what it leaves to the reader (the conversations, distilling a 120M) is made in
    between. The variants are small here and the runs short; the words are the published ones."""
    short = ("--max_iters", 2, "--eval_tokens", 64)
    for line in PUBLISHED_COMMANDS.strip().splitlines():
        line = line.replace("_data_tinyshakespeare_", "data/tinyshakespeare")
        line = line.replace("_data_conversations_", "data/conversations").replace(" 1000 ", " 2 ")
        program, file, command, *args = shlex.split(line)
        assert (program, file) == ("python", "_model_.py")
        if command == "finetune":
            cli("tokenize", "--dataset", "conversations", "--txt", "conversations.jsonl").ok()
            student = ("--student_variant", "120M", "--data", "tinyshakespeare")
            cli("distill", "--teacher_model_path", "hf", "--teacher_variant", "120M", *student, *short).ok()
        elif command == "hf_finetune":
            Path("checkpoints/finetuned_120M_model.pt").rename("checkpoints/first.pt")
            Path("checkpoints/finetuned_120M_model_last.pt").unlink()
        done = cli(command, *args, *(short if command in ("train", "distill") else ())).ok()
        if command in ("finetune", "hf_finetune"):
            assert "before finetuning" in done.out and "after finetuning" in done.out
            assert done.out.count("Hello, how are you?") == 2
        if command == "sample":
            assert done.out.startswith(args[args.index("--prompt") + 1])
    for name in ("7M", "distilled_7M", "distilled_120M", "finetuned_120M"):
        assert Path(f"checkpoints/{name}_model.pt").exists(), name
    for name in ("tinyshakespeare", "dailydialog_train"):
        assert Path(f"data/{name}/data.bin").exists(), name
    for name in ("exported_7M", "exported_finetuned_120M"):
        assert open_theirs(Path(name)).config.vocab_size == 50259


@pytest.mark.parametrize("line", PUBLISHED_COMMANDS.strip().splitlines(), ids=lambda line: line.split()[2])
def test_published_command_lines_parse_to_what_they_say(line):
    args = shlex.split(line)[2:]
    parsed = vars(model.make_parser().parse_args(args))
    said = dict(zip(args[1::2], args[2::2], strict=True))
    for flag, value in said.items():
        kept = parsed[flag[2:]]
        assert str(kept[0] if isinstance(kept, list) else kept) == value
    assert parsed["command"] == args[0]


def test_config_round_trip():
    """config.json says all of a config that matters to the logits, whichever version's keys are read."""
    for arch, overrides in MODELS.values():
        c = small(arch, **overrides).config
        j = model.hf_config(c, model.byte_tokenizer(), "float32")
        v4 = {k: v for k, v in j.items() if k not in ("rope_parameters", "dtype")}
        v5 = {k: v for k, v in j.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "rotary_emb_base")}
        irrelevant = dict(rope_original_block_size=0, block_size=0 or 1, attn_implementation="auto", init="gpt2")
        for read in (model.config_from_hf(v4, Path()), model.config_from_hf(v5, Path())):
            if c.rope_scaling == "ntk":
                assert read.rope_theta == pytest.approx(c.rope_theta * c.rope_factor ** (c.rope_dim / (c.rope_dim - 2)))
                continue
            assert read.context == c.context
            want = replace(c, rope_attention_factor=read.rope_attention_factor, **irrelevant)
            assert replace(read, **irrelevant) == want
            assert all(torch.equal(a, b) for a, b in zip(*map(frequencies, (read, c)), strict=True))


def frequencies(c: model.GPTConfig) -> tuple[torch.Tensor, torch.Tensor]:
    if c.pos_embd != "rope":
        return torch.zeros(1), torch.zeros(1)
    freqs, factor = model.rope_frequencies(c)
    return freqs, torch.tensor(factor)
