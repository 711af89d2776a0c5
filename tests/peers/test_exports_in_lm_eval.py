"""An exported directory in EleutherAI's harness, as anyone would run it: by its own command line."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from conftest import save, small, stdlib_source

import model

TASK = """
task: choices
output_type: multiple_choice
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


def test_lm_eval_runs_on_an_export(cli, bpe):
    """Its accuracy is that of the likelihoods which our own model gives the choices."""
    gpt = small("qwen3", bpe.n_vocab)
    cli("export", "--model_path", save("a_model.pt", gpt, bpe), "--output_dir", "exported").ok()
    words = stdlib_source("textwrap").split()
    questions = [
        {"question": " ".join(words[9 * i : 9 * i + 5]), "choices": words[50 + i : 54 + i], "answer": i % 4}
        for i in range(20)
    ]
    Path("questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    Path("choices.yaml").write_text(TASK)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "choices", "--include_path", "."]
    command += ["--model_args", "pretrained=exported,dtype=float32", "--device", "cpu", "--output_path", "out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = Path("out").rglob("results*.json")
    accuracy = json.loads(file.read_text())["results"]["choices"]["acc,none"]

    right = 0
    for q in questions:
        question, scores = bpe.encode(q["question"]), []
        for choice in q["choices"]:
            ids = bpe.encode(q["question"] + " " + choice)
            assert ids[: len(question)] == question
            with torch.no_grad():
                targets = torch.tensor([ids[1:]]).clone()
                targets[:, : len(question) - 1] = -1
                scores.append(-gpt.loss(torch.tensor([ids[:-1]]), targets).item())
        right += scores.index(max(scores)) == q["answer"]
    assert accuracy == right / len(questions)
    assert model.open_model("exported")[1].digest != bpe.digest  # read as a tokenizer.json
