"""A real pretrained model, SmolLM2-135M-Instruct: opened, continued, talked with, exported, finetuned."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests_conftest import stdlib_source

import model

GREEDY = ("--temperature", 0, "--dtype", "float32")


@pytest.fixture(scope="module")
def opened(smollm2):
    return model.open_model(str(smollm2))


@pytest.fixture(scope="module")
def theirs(smollm2):
    return transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def their_tokenizer(smollm2):
    return transformers.AutoTokenizer.from_pretrained(smollm2)


@torch.no_grad()
def test_logits_equal_transformers(opened, theirs, their_tokenizer):
    """Within 2e-3 in float32, on the source of the standard library and on its English."""
    gpt, tokenizer = opened.model, opened.tokenizer
    worst = 0.0
    for text in (stdlib_source("argparse"), stdlib_source("pydoc_data/topics")[5000:]):
        ids = tokenizer.encode(text[:8000])
        assert ids == their_tokenizer(text[:8000]).input_ids
        idx = torch.tensor([ids[:512], ids[512:1024]])
        worst = max(worst, (gpt(idx) - theirs(idx).logits).abs().max().item())
    print(f"logits differ from transformers' by at most {worst:.1e}")
    assert worst <= 2e-3


def test_sample_knows_the_capital_of_france(cli, smollm2):
    out = cli("sample", "--model_checkpoint", smollm2, "--prompt", "The capital of France is", "--length", 5, *GREEDY)
    assert out.ok().out.startswith("The capital of France is Paris")


def test_sample_continues_as_transformers_does(cli, smollm2, theirs, their_tokenizer):
    """40 greedy tokens."""
    prompt = "Once upon a time, in a small village,"
    ids = theirs.generate(**their_tokenizer(prompt, return_tensors="pt"), max_new_tokens=40, do_sample=False)[0]
    out = cli("sample", "--model_checkpoint", smollm2, "--prompt", prompt, "--length", 40, *GREEDY).ok().out
    assert out == their_tokenizer.decode(ids, skip_special_tokens=True) + "\n"


def test_chat_answers(cli, smollm2, theirs, their_tokenizer):
    """With the model's own template, default system turn included, and with what was said before."""
    lines = b"What is the capital of France?\nAnd of Italy?\n/save talk.jsonl\n"
    out = cli("chat", "--model_checkpoint", smollm2, "--length", 40, *GREEDY, stdin=lines).ok().out
    first, second = out.split("\n")[:2]
    assert "Paris" in first and "Rome" in out
    messages = json.loads(Path("talk.jsonl").read_text())["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2 and messages[1]["content"] == first

    as_prompt = dict(add_generation_prompt=True, return_dict=True, return_tensors="pt")
    inputs = their_tokenizer.apply_chat_template(messages[:3], **as_prompt)
    ids = theirs.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert their_tokenizer.decode(ids, skip_special_tokens=True) == messages[3]["content"]


def test_an_export_of_the_import_is_the_same_model(cli, smollm2, their_tokenizer):
    """Tensor for tensor, bit for bit; tokenizer and template too."""
    cli("export", "--model_path", smollm2, "--output_dir", "again", "--dtype", "bfloat16").ok()
    first, again = load_file(smollm2 / "model.safetensors"), load_file("again/model.safetensors")
    assert first.keys() == again.keys()
    assert all(first[k].dtype == again[k].dtype and torch.equal(first[k], again[k]) for k in first)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained("again", output_loading_info=True)
    assert not any(info.values()) and theirs.config.rope_parameters["rope_theta"] == 100000.0
    messages = [{"role": "user", "content": "Hi 12"}, {"role": "assistant", "content": " Yes\n"}]
    again = transformers.AutoTokenizer.from_pretrained("again")
    ids, again_ids = (
        [t("It's 1234.").input_ids, t.apply_chat_template(messages), t.eos_token_id, t.bos_token_id, t.pad_token_id]
        for t in (their_tokenizer, again)
    )
    assert ids == again_ids


def test_shards_open_too(cli, smollm2, opened):
    size = ("--dtype", "bfloat16", "--max_shard_size", "60MB")
    cli("export", "--model_path", smollm2, "--output_dir", "shards", *size).ok()
    assert len(list(Path("shards").glob("*.safetensors"))) == 5
    again = model.open_model("shards").model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in opened.model.state_dict().items())


@torch.no_grad()
def assistant_loss(gpt: model.GPT, talks: list[list[dict]], tokenizer: model.Tokenizer) -> float:
    """Nats per token of what the assistant says."""
    total, n = 0.0, 0
    for messages in talks:
        ids, mask = model.encode_conversation(tokenizer, messages, False)
        targets = torch.from_numpy(np.where(mask[1:] == 1, ids[1:], -1))[None]
        total += gpt.loss(torch.from_numpy(ids[:-1])[None], targets).item()
        n += int((targets >= 0).sum())
    return total / n


@torch.no_grad()
def text_loss(gpt: model.GPT, tokenizer: model.Tokenizer) -> float:
    """Nats per token of English from Python's documentation."""
    ids = torch.tensor(tokenizer.encode(stdlib_source("pydoc_data/topics")[20_000:60_000])[: 16 * 513])
    rows = ids[: len(ids) // 513 * 513].view(-1, 513)
    return gpt.loss(rows[:, :-1], rows[:, 1:]).item() / rows[:, 1:].numel()


@pytest.mark.parametrize("flags", [(), ("--lora_rank", 16)], ids=["all weights", "lora"])
def test_finetuning_on_real_conversations(cli, smollm2, conversations, opened, flags):
    """100 steps on chatterbot-corpus: what the assistant says becomes likelier on conversations that were held out, and
    plain text hardly less likely."""
    gpt, tokenizer = opened.model, opened.tokenizer
    lines = conversations.read_text(encoding="utf-8").splitlines()
    cut = int(0.92 * len(lines))
    Path("seen.jsonl").write_text("\n".join(lines[:cut]), encoding="utf-8")
    held_out = [model.messages_of(json.loads(line)) for line in lines[cut:]][:60]
    before = assistant_loss(gpt, held_out, tokenizer), text_loss(gpt, tokenizer)
    run = ("finetune", "--model_checkpoint", smollm2, "--data", "seen.jsonl", "--finetune_iters", 100, *flags)
    small_steps = ("--block_size", 128, "--batch_size", 2, "--eval_interval", 50, "--eval_tokens", 2048)
    out = cli(*run, *small_steps, "--prompt", "Are you a robot?", "--sample_length", 30, "--name", "tuned").ok().out
    tuned = model.open_model("tuned_model.pt").model
    after = assistant_loss(tuned, held_out, tokenizer), text_loss(tuned, tokenizer)
    print(out)
    print(f"assistant's turns, held out: {before[0]:.3f} -> {after[0]:.3f} nats per token")
    print(f"plain text: {before[1]:.3f} -> {after[1]:.3f} nats per token")
    assert after[0] < before[0] - 0.2
    assert after[1] < before[1] + 0.15
