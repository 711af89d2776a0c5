"""Choosing the next token, against transformers' logits processors; generating, against recomputing everything."""

import contextlib
import types
import weakref

import pytest
import torch
from conftest import byte_gpt, random_gpt, random_tokens, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.generation import logits_process as theirs

import model
from model import SamplingSettings

GREEDY = SamplingSettings(temperature=0)


def probs_of_transformers(logits: torch.Tensor, s: SamplingSettings, seen: torch.Tensor) -> torch.Tensor:
    """Its processors in the order in which its generate() applies them."""
    if s.repetition_penalty != 1:
        logits = theirs.RepetitionPenaltyLogitsProcessor(s.repetition_penalty)(seen, logits)
    if s.temperature != 1:
        logits = theirs.TemperatureLogitsWarper(s.temperature)(seen, logits)
    if s.top_k:
        logits = theirs.TopKLogitsWarper(s.top_k)(seen, logits)
    if s.top_p < 1:
        logits = theirs.TopPLogitsWarper(s.top_p)(seen, logits)
    if s.min_p:
        logits = theirs.MinPLogitsWarper(s.min_p)(seen, logits)
    return logits.softmax(dim=-1)


@given(
    settings=st.fixed_dictionaries({}, optional={
        "temperature": st.sampled_from([0.1, 0.8, 1.0, 1.5, 5.0]),
        "top_k": st.sampled_from([0, 1, 2, 5, 20, 40, 1000]),
        "top_p": st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99, 1.0]),
        "min_p": st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.2, 3.0]),
    }),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_next_token_probs_equal_transformers(settings, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 40, generator=generator) * 3
    seen = torch.randint(40, (4, 12), generator=generator)  # with repeats
    s = SamplingSettings(**settings)
    ours = model.next_token_probs(logits, s, seen)
    torch.testing.assert_close(ours, probs_of_transformers(logits, s, seen), atol=1e-6, rtol=1e-5)


def test_greedy_is_the_most_likely_token():
    logits = torch.randn(5, 30)
    for s in (GREEDY, SamplingSettings(temperature=1e-40)):
        assert torch.equal(model.next_token_probs(logits, s).argmax(dim=-1), logits.argmax(dim=-1))
    best, second = logits.abs().topk(2)[1].T  # of numbers above 0 a penalised one is the smallest
    penalty = SamplingSettings(temperature=0, repetition_penalty=1e6)
    assert torch.equal(model.next_token_probs(logits.abs(), penalty, best[:, None]).argmax(dim=-1), second)


def chi_squared(counts: torch.Tensor, probs: torch.Tensor) -> float:
    expected = probs * counts.sum()
    return ((counts - expected)[probs > 0].square() / expected[probs > 0]).sum().item()


def test_draws_follow_the_distribution():
    """Chi-squared of 100,000 draws; 22.5 is exceeded by chance once in a thousand for 6 degrees of freedom."""
    weights = torch.tensor([0.0, 3.0, 0.5, 0.0, 1.0, 0.05, 2.0, 0.2, 0.25, 0.0])  # not normalised
    generator = torch.Generator().manual_seed(0)
    drawn = model.draw(weights.expand(100_000, -1), generator)
    counts = drawn.bincount(minlength=10).double()
    assert not counts[weights == 0].any()
    assert chi_squared(counts, (weights / weights.sum()).double()) < 22.5


@pytest.mark.parametrize("allowed", [[0], [49_999], [3, 40, 700]])
@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_a_token_without_probability_is_never_drawn(allowed, u, monkeypatch):
    """At both ends of what a generator gives, of 50,000 tokens whose cumulative weights are rounded."""
    probs = torch.zeros(1, 50_000)
    probs[0, allowed] = torch.tensor([1e-3, 0.4, 3.0])[: len(allowed)]
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.full(size, u))
    assert model.draw(probs, None).item() in allowed


def test_generated_tokens_follow_the_models_distribution():
    """4,000 first tokens of one prompt against the softmax of the full pass, top_k 8: 24.3 for 7 degrees of freedom."""
    gpt, prompt = random_gpt(tiny_config("llama")), [5, 17, 80]
    generator = torch.Generator().manual_seed(3)
    settings = SamplingSettings(temperature=2.0, top_k=8)
    tokens = next(model.generate(gpt, [prompt] * 4000, 1, settings, generator))
    logits = gpt(torch.tensor([prompt]))[0, -1].detach() / 2.0
    probs = logits.masked_fill(logits < logits.topk(8).values[-1], float("-inf")).softmax(dim=-1).double()
    counts = tokens.bincount(minlength=100).double()
    assert not counts[probs == 0].any() and (counts > 0).sum() > 3
    assert chi_squared(counts, probs) < 24.3


def generated(gpt: model.GPT, prompts: list[list[int]], n: int, *settings) -> list[list[int]]:
    """A row of new tokens for each prompt, greedily unless told otherwise."""
    return torch.stack(list(model.generate(gpt, prompts, n, *(settings or [GREEDY]))), dim=1).tolist()


@torch.no_grad()
def recomputed(gpt: model.GPT, prompts: list[list[int]], n: int, s: SamplingSettings = GREEDY) -> list[list[int]]:
    """Greedy generation without a cache, a row at a time: the window starts as the longest prompt and grows; when it
    has filled the context, its last half goes on."""
    context, longest = gpt.config.context, max(map(len, prompts))
    rows = []
    for prompt in prompts:
        columns, window = [None] * (longest - len(prompt)) + prompt, longest
        for _ in range(n):
            visible = [t for t in columns[-window:] if t is not None]
            logits = gpt(torch.tensor([visible]))[:, -1]
            seen = torch.tensor([[t for t in columns if t is not None]])
            columns.append(model.next_token_probs(logits, s, seen).argmax().item())
            window = window + 1 if window < context else context // 2
        rows.append(columns[longest:])
    return rows


@pytest.mark.parametrize("arch, overrides", [
    *((arch, {}) for arch in model.ARCHS), ("llama", dict(rope_scaling="yarn", rope_factor=2.0)),
])  # fmt: skip
def test_greedy_generation_beyond_the_context_equals_recomputing(arch, overrides):
    """32 tokens of context, or 64 by yarn, prompts of different lengths, 90 new tokens: the window moves several times.
    The penalty keeps the random model from saying one thing for ever."""
    gpt, s = random_gpt(tiny_config(arch, **overrides)), SamplingSettings(temperature=0, repetition_penalty=1.5)
    prompts = [random_tokens(n, seed=n).tolist() for n in (1, 20, 7)]
    rows = generated(gpt, prompts, 90, s)
    assert rows == recomputed(gpt, prompts, 90, s) and len(set().union(*rows)) > 30


class Recording(TorchDispatchMode):
    """A CUDA graph on a CPU: operators, run again on the very tensors that they had, knowing of nothing else. It keeps
    those that it made, and no others: who records has to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.made = [], {}

    def __torch_dispatch__(self, function, _, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, tree_map_only(torch.Tensor, self.refer, (args, kwargs or {})), result))
        self.made.update((id(x), x) for x in tree_leaves(result))
        return result

    def refer(self, x: torch.Tensor):
        return (lambda: x) if id(x) in self.made else weakref.ref(x)

    def replay(self) -> None:
        for function, references, result in self.calls:
            args, kwargs = tree_map_only((weakref.ref, types.FunctionType), lambda x: x(), references)
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recordings(monkeypatch) -> list[Recording]:
    """Recordings in place of CUDA graphs, for PyTorch's own make_graphed_callables."""
    made = []

    def graph(recording, pool):
        made.append(recording)
        return recording

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    for name in ("synchronize", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


@pytest.mark.parametrize("arch, size, lengths, n, expected", [
    *((arch, dict(block_size=32), (1, 20, 7), 90, 6) for arch in model.ARCHS),  # six windows
    ("llama", dict(block_size=560, n_layer=1), (250,), 310, 3),  # one, in which the reach grows twice
])  # fmt: skip
def test_recorded_steps_generate_as_the_plain_pass(arch, size, lengths, n, expected, recordings):
    gpt, s = random_gpt(tiny_config(arch, **size)), SamplingSettings(temperature=0.9)
    prompts = [random_tokens(length, seed=length).tolist() for length in lengths]
    found = []
    for engine in (None, model.CUDAGraphs(gpt)):
        gpt.engine = engine
        found.append(generated(gpt, prompts, n, s, torch.Generator().manual_seed(1)))
    assert found[0] == found[1] and len(recordings) == expected


@pytest.mark.parametrize(
    "overrides", [{}, dict(n_kv_head=2), dict(norm_position="post"), dict(attn_implementation="eager")]
)
@torch.no_grad()
def test_recorded_steps_after_the_cache_went_back(overrides, recordings):
    """As a conversation does whose end was left out. Truth: the full pass."""
    gpt, idx = random_gpt(tiny_config("qwen3", **overrides)), random_tokens(2, 24)
    gpt.engine, cache = model.CUDAGraphs(gpt), model.KVCache(gpt, 2, 24)
    gpt(random_tokens(2, 20, seed=1), cache)
    cache.length = 0
    gpt(idx[:, :5], cache)
    for token in random_tokens(9, 2, 1, seed=2):
        gpt(token, cache)
    cache.length = 5
    kept = [gpt.hidden(idx[:, i : i + 1], cache) for i in range(5, 24)]  # each stays what it was
    torch.testing.assert_close(gpt.logits(torch.cat(kept, dim=1)), gpt(idx)[:, 5:], atol=2e-4, rtol=1e-4)
    assert len(recordings) == 1


def test_generation_where_nothing_can_be_recorded(monkeypatch, capsys):
    """Here there is no CUDA."""
    gpt, prompt = random_gpt(tiny_config("gpt2")), random_tokens(4).tolist()
    monkeypatch.setattr(model.GPT, "device", property(lambda self: torch.device("cuda")))
    model.prepare_generation(gpt, "float32")
    objective = model.Distillation(torch.nn.Identity(), model.DistillConfig(), 100)
    model.compile_model(gpt, model.TrainConfig(compile="true"), 16, objective)
    assert isinstance(gpt.engine, model.CUDAGraphs) and gpt.compiled_loss
    assert objective.divergence_loss is not model.divergence_loss
    monkeypatch.undo()
    assert generated(gpt, [prompt], 5) == recomputed(gpt, [prompt], 5)
    assert gpt.engine is None and capsys.readouterr().err.count("continuing without CUDA graphs") == 1


@pytest.mark.parametrize("length", [1, 31, 32])
def test_prompts_up_to_the_context(length):
    gpt, prompt = random_gpt(tiny_config()), random_tokens(length).tolist()
    assert generated(gpt, [prompt], 5) == recomputed(gpt, [prompt], 5)


def test_a_prompt_longer_than_the_context():
    for arch, hint in (("gpt2", False), ("llama", True)):
        with pytest.raises(model.UserError, match="33 tokens.*context is 32") as e:
            next(model.generate(random_gpt(tiny_config(arch)), [[1] * 33], 5, GREEDY))
        assert ("--rope_scaling" in str(e.value)) == hint  # learned positions cannot be extended


# --- Text


def text_of(gpt: model.GPT | None = None, **kwargs) -> list[str]:
    values = dict(length=40, settings=SamplingSettings(seed=1), num_samples=1, stop=())
    return model.generate_text(gpt or byte_gpt(), model.byte_tokenizer(), list(b"ab"), **{**values, **kwargs})


def scripted(monkeypatch, *texts: bytes | list[int]) -> None:
    """Make the model say these tokens, one row each, padded with x."""
    rows = [list(t) for t in texts]
    n = max(map(len, rows))
    columns = torch.tensor([row + [120] * (n - len(row)) for row in rows]).T
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: iter(columns))


def test_stop_strings(monkeypatch):
    """Text ends before the first of them, whether within one token or over several, and none of it is shown; before an
    empty one it does not. The first text is shown as it comes."""
    scripted(monkeypatch, b"one. two; three", b"none of them.xx", b";directly. and", "é\u20ac.".encode())
    pieces = []
    texts = text_of(num_samples=4, stop=[". t", "", ";"], on_text=pieces.append)
    assert texts == ["one", "none of them.xx", "", "é€." + "x" * 9]
    assert [piece for piece in pieces if piece] == ["o", "n", "e"]


@pytest.mark.parametrize("said, text", [
    (b"ends with STO", "ends with STO"),  # not the stop string
    ("ab🙂".encode()[:-1], "ab\ufffd"),  # a character cut off by the length is marked
])  # fmt: skip
def test_what_was_held_back_is_shown_at_last(monkeypatch, said, text):
    scripted(monkeypatch, said)
    pieces = []
    assert text_of(stop=["STOP"], on_text=pieces.append) == ["".join(pieces)] == [text]


@pytest.mark.parametrize("token", [model.EOT, model.IM_END])
def test_text_ends_with_the_document(monkeypatch, token):
    end = model.byte_tokenizer().special[token]
    scripted(monkeypatch, [*b"first", end, *b"never"], [*b"second goes on", end, *b"x"])
    assert text_of(num_samples=2) == ["first", "second goes on"]


def test_generation_leaves_the_model_as_it_was():
    gpt = byte_gpt()
    for mode in (True, False):
        text_of(gpt.train(mode), length=3)
        assert gpt.training == mode


def test_healing_takes_no_space_but_its_own(gpt2, monkeypatch):
    """GPT-2 writes two spaces before a comment as " " and " #": the second is text."""
    gpt = random_gpt(tiny_config("gpt2", vocab_size=gpt2.n_vocab))
    tokens = [gpt2.encode(" ")[0], gpt2.encode(" #")[0]]
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: iter(torch.tensor(tokens)[:, None]))
    prompt = gpt2.encode("x = 1 ")
    assert model.generate_text(gpt, gpt2, prompt, 2, SamplingSettings()) == [" #"]
