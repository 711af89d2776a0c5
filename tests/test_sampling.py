"""Choosing the next token, against transformers' logits processors; generating, against recomputing everything."""

import types
import weakref

import pytest
import torch
from conftest import random_gpt, random_tokens, tiny_config
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
    ours = ours / ours.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(ours, probs_of_transformers(logits, s, seen), atol=1e-6, rtol=1e-5)


def test_greedy_is_the_most_likely_token():
    logits = torch.randn(5, 30)
    assert torch.equal(model.sample_token(logits, GREEDY, None, None), logits.argmax(dim=-1))
    for s in (GREEDY, SamplingSettings(temperature=1e-40)):
        assert torch.equal(model.next_token_probs(logits, s).argmax(dim=-1), logits.argmax(dim=-1))
    best, second = logits.abs().topk(2)[1].T  # of numbers above 0 a penalised one is the smallest
    penalty = SamplingSettings(temperature=0, repetition_penalty=1e6)
    assert torch.equal(model.sample_token(logits.abs(), penalty, best[:, None], None), second)


@pytest.mark.parametrize("wrong", [
    dict(temperature=-0.1), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1), dict(min_p=1.5),
    dict(repetition_penalty=0.0), dict(temperature=float("nan")),
])  # fmt: skip
def test_settings_that_make_no_sense(wrong):
    with pytest.raises(model.UserError, match=next(iter(wrong))):
        SamplingSettings(**wrong)


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


def test_drawing_needs_no_float64(monkeypatch):
    """MPS has none: every tensor that drawing makes is of a type that it has."""

    class Types(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            assert all(x.dtype != torch.float64 for x in tree_leaves(out)), func
            return out

    logits, generator = torch.randn(4, 100), torch.Generator().manual_seed(0)
    with Types():
        for s in (SamplingSettings(), SamplingSettings(0.7, 5, 0.9, 0.1, 1.3)):
            model.sample_token(logits, s, torch.zeros(4, 2, dtype=torch.int64), generator)


def test_a_token_without_probability_is_never_drawn():
    """One token of 50,000 may come, at the front or at the end, or three of very different weight."""
    generator = torch.Generator().manual_seed(0)
    for allowed in ([0], [49_999], [3, 40, 700]):
        probs = torch.zeros(1, 50_000)
        probs[0, allowed] = torch.tensor([1e-3, 0.4, 3.0])[: len(allowed)]
        assert set(model.draw(probs.expand(3000, -1), generator).tolist()) <= set(allowed)


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


@pytest.mark.parametrize("arch", model.ARCHS)
def test_greedy_generation_beyond_the_block_equals_recomputing(arch):
    """32 tokens of context, prompts of different lengths, 90 new tokens: the window moves several times. The penalty
    keeps the random model from saying one thing for ever."""
    gpt, s = random_gpt(tiny_config(arch)), SamplingSettings(temperature=0, repetition_penalty=1.5)
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
    """Recordings in place of CUDA graphs."""
    made = []

    def record(run, device):
        run()
        with Recording() as recording:
            result = run()
        made.append(recording)
        return lambda: recording.replay() or result

    monkeypatch.setattr(model, "record", record)
    return made


@pytest.mark.parametrize("arch", model.ARCHS)
def test_recorded_steps_generate_as_the_plain_pass(arch, recordings):
    """Rows of different lengths over six windows of 32; one row from 250 to 560 places, where the reach grows twice."""
    for block_size, prompts, n, expected in ((32, (1, 20, 7), 90, 6), (560, (250,), 310, 3)):
        gpt, s = random_gpt(tiny_config(arch, block_size=block_size)), SamplingSettings(temperature=0.9)
        rows = [random_tokens(length, seed=length).tolist() for length in prompts]
        found = []
        for engine in (None, model.CUDAGraphs(gpt)):
            gpt.engine = engine
            found.append(generated(gpt, rows, n, s, torch.Generator().manual_seed(1)))
        assert found[0] == found[1] and len(recordings) == expected
        recordings.clear()


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
    model.compile_model(gpt, model.TrainConfig(compile="true"), 16)
    assert isinstance(gpt.engine, model.CUDAGraphs) and gpt.compiled_loss
    monkeypatch.undo()
    assert generated(gpt, [prompt], 5) == recomputed(gpt, [prompt], 5)
    assert gpt.engine is None and capsys.readouterr().err.count("going on without CUDA graphs") == 1


@pytest.mark.parametrize("length", [1, 31, 32])
def test_prompts_up_to_the_context(length):
    gpt, prompt = random_gpt(tiny_config()), random_tokens(length).tolist()
    assert generated(gpt, [prompt], 5) == recomputed(gpt, [prompt], 5)


def test_a_prompt_longer_than_the_context():
    for arch, hint in (("gpt2", False), ("llama", True)):
        with pytest.raises(model.UserError, match="33 tokens.*context is 32") as e:
            next(model.generate(random_gpt(tiny_config(arch)), [[1] * 33], 5, GREEDY))
        assert ("--rope_scaling" in str(e.value)) == hint  # learned positions cannot be extended


def test_rope_scaling_reaches_further():
    """With yarn x 2 the context is 64: 60 tokens come from one window."""
    gpt, prompt = random_gpt(tiny_config("llama")), random_tokens(4).tolist()
    gpt.extend_context(rope_scaling="yarn", rope_factor=2.0)
    (new,) = generated(gpt, [prompt], 60)
    with torch.no_grad():
        assert gpt(torch.tensor([prompt + new[:-1]]))[0, 3:].argmax(dim=-1).tolist() == new


def test_padding_rows_are_never_drawn():
    """The 28 rows that pad 100 tokens to 128, made the most likely by far."""
    gpt = random_gpt(tiny_config("llama", tie_word_embeddings=False))
    with torch.no_grad():
        gpt.lm_head.weight[100:] = gpt.lm_head.weight[:28] * 50
    assert gpt(random_tokens(1, 5)).shape == (1, 5, 100)
    assert max(map(max, generated(gpt, [[1], [2]], 40, SamplingSettings(temperature=10.0)))) < 100


# --- Text


@pytest.fixture
def byte_gpt() -> model.GPT:
    return random_gpt(tiny_config("llama", vocab_size=259))


def text_of(byte_gpt: model.GPT, **kwargs) -> list[str]:
    values = dict(length=40, settings=SamplingSettings(), num_samples=1, seed=1, stop=())
    return model.generate_text(byte_gpt, model.byte_tokenizer(), list(b"ab"), **{**values, **kwargs})


def test_the_same_seed_gives_the_same_text(byte_gpt):
    first = text_of(byte_gpt, num_samples=3)
    assert first == text_of(byte_gpt, num_samples=3) != text_of(byte_gpt, num_samples=3, seed=2)
    assert len(set(first)) == 3
    assert len(set(text_of(byte_gpt, num_samples=3, settings=GREEDY))) == 1


def test_what_is_streamed_is_the_result(byte_gpt):
    pieces = []
    texts = text_of(byte_gpt, num_samples=2, on_text=pieces.append, length=60)
    assert "".join(pieces) == texts[0] and len(pieces) > 20


def scripted(monkeypatch, *texts: bytes | list[int]) -> None:
    """Make the model say these tokens, one row each, padded with x."""
    rows = [list(t) for t in texts]
    n = max(map(len, rows))
    columns = torch.tensor([row + [120] * (n - len(row)) for row in rows]).T
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: iter(columns))


def test_stop_strings(byte_gpt, monkeypatch):
    """Text ends before the first of them, whether within one token or over several, and none of it is shown;
    before an empty one it does not."""
    scripted(monkeypatch, b"one. two; three", b"none of them.xx", b";directly. and", "é\u20ac.".encode())
    pieces = []
    texts = text_of(byte_gpt, num_samples=4, stop=[". t", "", ";"], on_text=pieces.append)
    assert texts == ["one", "none of them.xx", "", "é€." + "x" * 9]
    assert "".join(pieces) == "one"


@pytest.mark.parametrize("said, text", [
    (b"ends with STO", "ends with STO"),  # not the stop string
    ("ab🙂".encode()[:-1], "ab\ufffd"),  # a character cut off by the length is marked
])  # fmt: skip
def test_what_was_held_back_is_shown_at_last(byte_gpt, monkeypatch, said, text):
    scripted(monkeypatch, said)
    pieces = []
    assert text_of(byte_gpt, stop=["STOP"], on_text=pieces.append) == ["".join(pieces)] == [text]


@pytest.mark.parametrize("token", [model.EOT, model.IM_END])
def test_text_ends_with_the_document(byte_gpt, monkeypatch, token):
    end = model.byte_tokenizer().special[token]
    scripted(monkeypatch, [*b"first", end, *b"never"], [*b"second goes on", end, *b"x"])
    assert text_of(byte_gpt, num_samples=2) == ["first", "second goes on"]


def test_generation_leaves_the_model_as_it_was(byte_gpt):
    for mode in (True, False):
        byte_gpt.train(mode)
        text_of(byte_gpt, length=3)
        assert byte_gpt.training == mode


def test_healing_takes_no_space_but_its_own(gpt2, monkeypatch):
    """GPT-2 writes two spaces before a comment as " " and " #": the second is text."""
    gpt = random_gpt(tiny_config("gpt2", vocab_size=gpt2.n_vocab))
    tokens = [gpt2.encode(" ")[0], gpt2.encode(" #")[0]]
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: iter(torch.tensor(tokens)[:, None]))
    prompt = gpt2.encode("x = 1 ")
    assert model.generate_text(gpt, gpt2, prompt, 2, SamplingSettings(), heal=True) == [" #"]
