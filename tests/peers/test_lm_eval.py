"""The lm-eval adapter against lm-eval's own `hf` model on the exported directory: the same numbers for every kind of
request, at every batch size, and the same table from the command line. Needs lm-eval (tests/peers/requirements.txt)."""

import json
import logging
import random
from pathlib import Path

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

import model

CONTEXT = 64
RANDOM = random.Random(0)
WORDS = [
    "".join(RANDOM.choices(["ne", "ta", "ko", "(", "é", "ri", "s", ".", "n"], k=RANDOM.randint(1, 4)))
    for _ in range(3000)
]
TEXT = " ".join(WORDS)
KINDS = {
    "multiple_choice": """
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]""",
    "loglikelihood": """
doc_to_text: "{{question}}"
doc_to_target: " {{choices[3]}}"
metric_list: [{metric: perplexity}, {metric: acc}]""",
    "loglikelihood_rolling": """
doc_to_text: ""
doc_to_target: "{{long}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]""",
    "generate_until": """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: exact_match}]
generation_kwargs: {until: ["e", "xyz"], max_gen_toks: 12, do_sample: false}""",
}


def text_of(begin: int, n: int) -> str:
    return " ".join(WORDS[begin : begin + n])


def sharp_gpt(arch: str, vocab_size: int) -> model.GPT:
    """A small model with opinions: its most likely tokens are likely, and change with the text."""
    torch.manual_seed(0)
    shape = dict(vocab_size=vocab_size, block_size=CONTEXT, n_layer=2, n_head=4, n_embd=32)
    gpt = model.GPT(model.GPTConfig(**{**model.ARCHS[arch], **shape, "arch": arch}))
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(torch.randn_like(p), alpha=0.25)
    return gpt.eval()


@pytest.fixture(scope="module", params=["gpt2", "llama", "llama with a beginning of text"])
def pair(request, tmp_path_factory):
    """(folder of an export, what lm_eval_adapter takes, the `hf` model of a batch size)."""
    folder = tmp_path_factory.mktemp("exported")
    tokenizer = model.train_bpe([TEXT], 400)
    gpt = sharp_gpt(request.param.split()[0], tokenizer.n_vocab)
    model.export_hf(gpt, tokenizer, folder, torch.float32, 10**9, "")
    if "beginning" in request.param:
        hf = model.to_hf_tokenizer(tokenizer)
        bos = ("<|im_start|>", tokenizer.special["<|im_start|>"])
        hf.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[bos])
        hf.save(str(folder / "tokenizer.json"))
        config = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": bos[0]}))
    opened, tokenizer, _ = model.open_model(str(folder))
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3, max_length=CONTEXT)
    return folder, opened, tokenizer, theirs


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_loglikelihood(pair, batch_size):
    """Contexts empty, short and too long; continuations of one token and of many; a special token in the text."""
    _, gpt, tokenizer, theirs = pair
    pairs = [
        (text_of(7 * i, n), " " + text_of(50 * i, m))
        for i, (n, m) in enumerate([(1, 1), (5, 2), (30, 3), (80, 4), (3, 9)])
    ]
    pairs += [("", text_of(9, 4)), ("def f( ", "x):"), ("A<|endoftext|>B", " C"), ("né", "e ça"), ("x", "y")]
    for i in range(200):  # what the model itself would say, where that is a token of the joint text too
        context = text_of(i, 1 + i % 5)
        ids = theirs.tok_encode(context)
        with torch.no_grad():
            best = gpt(torch.tensor([ids]))[0, -1].argmax().item()
        if theirs.tok_encode(context + tokenizer.decode([best])) == [*ids, best]:
            pairs.append((context, tokenizer.decode([best])))
    ours = model.lm_eval_adapter(gpt, tokenizer, batch_size).loglikelihood(
        requests("loglikelihood", pairs), disable_tqdm=True
    )
    expected = theirs.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    assert [value for value, _ in ours] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in ours} == {True, False}


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihood_rolling(pair, batch_size):
    """Texts of less than a window, of about one, and of many."""
    _, gpt, tokenizer, theirs = pair
    texts = [(text_of(i, n),) for i, n in enumerate([1, 2, 10, 19, 20, 21, 22, 23, 24, 200])]
    ours = model.lm_eval_adapter(gpt, tokenizer, batch_size).loglikelihood_rolling(
        requests("loglikelihood_rolling", texts)
    )
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert ours == pytest.approx(expected, rel=1e-4)


def generated(pair, kinds: list[dict], batch_size: int = 4) -> tuple[list[str], list[str]]:
    """18 continuations, by ours and by theirs."""
    _, gpt, tokenizer, theirs = pair
    asked = [(text_of(11 * i, 1 + 5 * i), kinds[i % len(kinds)]) for i in range(18)]
    ours = model.lm_eval_adapter(gpt, tokenizer, batch_size).generate_until(requests("generate_until", asked))
    return ours, theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generate_until(pair, batch_size):
    """Prompts of different lengths in one batch, some too long; stop strings that come and that do not."""
    kinds = [
        {"until": ["e", "\n\n"], "max_gen_toks": 20},
        {"until": " ", "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 8, "do_sample": False},
        {"until": ["never to be seen"], "max_gen_toks": 30, "temperature": 0.0},
    ]
    ours, theirs = generated(pair, kinds, batch_size)
    assert ours == theirs
    assert len(set(ours)) > 9


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_other_names_of_max_gen_toks(pair, name):
    ours, theirs = generated(pair, [{"until": ["never"], name: 9}])
    assert ours == theirs


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task of each kind, over ten questions in a jsonl file."""
    with open(tmp_path / "questions.jsonl", "w", encoding="utf-8") as f:
        for i in range(10):
            choices = [text_of(10 * i + k, 1 + k) for k in range(4)]
            record = {
                "question": text_of(20 * i, 3 + i),
                "choices": choices,
                "answer": i % 4,
                "long": text_of(i, 5 * i + 3),
            }
            f.write(json.dumps(record) + "\n")
    for kind, lines in KINDS.items():
        (tmp_path / f"{kind}.yaml").write_text(f"""
task: my_{kind}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path}/questions.jsonl}}}}
test_split: test
{lines}
""")
    return tmp_path


def evaluate(lm, tasks: Path, **options) -> dict[str, dict]:
    """lm-eval's results, the standard errors and names left out."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    names = [f"my_{kind}" for kind in KINDS]
    results = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **options)["results"]
    return {
        task: {k: v for k, v in values.items() if isinstance(v, float) and "stderr" not in k}
        for task, values in results.items()
    }


@pytest.mark.parametrize("options", [{}, {"num_fewshot": 2, "limit": 5}], ids=str)
def test_tasks_of_every_kind(pair, tasks, options):
    """Tasks defined by local YAML files and a jsonl file, with and without examples in the prompt."""
    _, gpt, tokenizer, theirs = pair
    if options:  # the examples need documents that are not asked about
        for file in tasks.glob("*.yaml"):
            file.write_text(file.read_text().replace("test_split: test\n", "test_split: test\nfewshot_split: test\n"))
    ours = evaluate(model.lm_eval_adapter(gpt, tokenizer, 4), tasks, **options)
    expected = evaluate(theirs, tasks, **options)
    assert ours.keys() == expected.keys() == {f"my_{kind}" for kind in KINDS}
    for task in ours:
        assert ours[task] == pytest.approx(expected[task], rel=1e-4), task


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)  # lm-eval takes seconds to read its own tasks
def test_the_command_line(pair, tasks, cli):
    """eval --tasks prints what lm-eval computes with its own model, and nothing else on standard output."""
    folder, _, _, theirs = pair
    flags = ("--model_checkpoint", folder, "--include_path", tasks, "--device", "cpu", "--dtype", "float32")
    names = ",".join(f"my_{kind}" for kind in KINDS)
    rows = json.loads(cli("eval", *flags, "--tasks", names, "--json", "--batch_size", 4).ok().out)
    expected = evaluate(theirs, tasks)
    assert [row.pop("model") for row in rows] == [str(folder)] * len(KINDS)
    for row in rows:
        values = {k.split(",")[0]: v for k, v in expected[row.pop("task")].items()}
        assert {k: row[k] for k in values} == pytest.approx(values, rel=1e-4)
        assert row.keys() == values.keys()


@pytest.mark.parametrize("pair", ["gpt2"], indirect=True)
def test_an_unknown_task(pair, cli):
    folder, *_ = pair
    error = cli("eval", "--model_checkpoint", folder, "--tasks", "helaswag").error
    assert "'helaswag'" in error and "hellaswag" in error
