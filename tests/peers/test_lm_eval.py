"""`eval --tasks` against lm-eval's own `hf` model, run by lm-eval's own command line on the exported folder: the same
numbers for every kind of request. Needs lm-eval (tests/peers/requirements.txt)."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import small
from tests_conftest import save_model

RANDOM = random.Random(0)
WORDS = ["".join(RANDOM.choices(["ne", "ta", "ko", "(", "é", "ri", "s", ".", "n"], k=3)) for _ in range(600)]
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


@pytest.fixture
def tasks(workdir) -> str:
    """The names of a task of each kind, in the folder tasks, over ten questions in a jsonl file."""
    Path("tasks").mkdir()
    with open("tasks/questions.jsonl", "w", encoding="utf-8") as f:
        for i in range(10):
            choices = [text_of(10 * i + k, 1 + k) for k in range(4)]
            long = text_of(i, 15 * i + 3)  # longer than the context
            f.write(json.dumps(dict(question=text_of(20 * i, 3 + i), choices=choices, answer=i % 4, long=long)) + "\n")
    for kind, lines in KINDS.items():
        Path(f"tasks/{kind}.yaml").write_text(f"""
task: my_{kind}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {workdir}/tasks/questions.jsonl}}}}
test_split: test
{lines}
""")
    return ",".join(f"my_{kind}" for kind in KINDS)


@pytest.mark.parametrize("arch, flags", [("gpt2", []), ("qwen3", ["--limit", "5"])], ids=str)
def test_tasks_equal_lm_evals_own(cli, tasks, bpe, arch, flags):
    """By a checkpoint and by the folder exported from it, at two batch sizes; nothing but JSON is printed."""
    save_model("a_model.pt", small(arch, bpe.n_vocab), bpe)
    cli("export", "--model_path", "a_model.pt", "--output_dir", "exported").ok()
    common = ["--tasks", tasks, "--include_path", "tasks", "--device", "cpu", "--batch_size", "3", *flags]
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", *common, "--output_path", "out"]
    command += ["--model_args", "pretrained=exported,dtype=float32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = Path("out").rglob("results*.json")
    expected = json.loads(file.read_text())["results"]
    ours = cli("eval", "--model_path", "a_model.pt", "--compare", "exported", "--json", *common, "--batch_size", 4).ok()
    rows = json.loads(ours.out)
    assert [row.pop("model") for row in rows] == ["a_model.pt"] * len(KINDS) + ["exported"] * len(KINDS)
    for row in rows:
        theirs = expected[row.pop("task")]
        theirs = {k.split(",")[0]: v for k, v in theirs.items() if isinstance(v, float) and "stderr" not in k}
        assert row and row == pytest.approx(theirs, rel=1e-4)


def test_what_cannot_be_exported_says_so(cli, tasks, bpe):
    """No Hugging Face model of this architecture has this setting; and nothing is left behind."""
    save_model("a_model.pt", small("gpt2", bpe.n_vocab, pos_embd="none"), bpe)
    error = cli("eval", "--model_path", "a_model.pt", "--tasks", tasks, "--include_path", "tasks").error
    assert "pos_embd none" in error and "export" in error and "gpt2" in error
