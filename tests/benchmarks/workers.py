"""What bench.py measures, each in a process of its own: python workers.py NAME '{"argument": ...}' prints a JSON line.

Nothing heavy is imported at the top, so that a process holds only what it measures (peak memory counts).
"""

import contextlib
import functools
import importlib.util
import io
import json
import os
import resource
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
GPT2_VOCABULARY = 50257


def load(folder: str | Path = ROOT):
    """The module model.py of a folder: ours, or nanoGPT's."""
    spec = importlib.util.spec_from_file_location("model", Path(folder) / "model.py")
    module = sys.modules["model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peak_mb() -> float:
    """Peak resident memory of this process. Linux counts the parent's from before exec in, so bench.py stays small."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def versions() -> dict:
    import torch

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    python = sys.version.split()[0]
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "python": python, "cuda": cuda}


def gpu_mb() -> float:
    """The most GPU memory that tensors of this process held at once."""
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else 0.0


def program(file: str, arguments: list[str], folder: str) -> dict:
    """Run a Python program in a folder, here, so that its GPU memory can be asked for; returns what it printed."""
    os.chdir(folder)
    sys.argv, output = [file, *arguments], io.StringIO()
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
        runpy.run_path(file, run_name="__main__")
    return {"output": output.getvalue(), "gpu_mb": gpu_mb()}


def random_tokens(folder: str, n: int) -> dict:
    """nanoGPT's train.bin and val.bin of random ids of GPT-2."""
    import numpy as np

    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(("train.bin", "val.bin")):
        ids = np.random.default_rng(i).integers(GPT2_VOCABULARY, size=n // (1 + 9 * i)).astype("<u2")
        ids.tofile(Path(folder) / name)
    return {}


def limits() -> dict:
    """What the machine can do: matrix products of 2048 x 2048, and reading 1 GiB."""
    import torch

    fast = load().choose_dtype("auto", torch.device("cpu")) == torch.bfloat16

    def best(f: Callable) -> float:
        times = []
        for _ in range(8):
            begin = time.perf_counter()
            f()
            times.append(time.perf_counter() - begin)
        return min(times)

    found = {}
    for dtype in (torch.bfloat16, torch.float32) if fast else (torch.float32,):  # emulated, one product takes a minute
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in "ab")
        out = torch.empty_like(a)
        name = str(dtype).removeprefix("torch.")
        found[f"{name}_gflops"] = 2 * 2048**3 / best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)) / 1e9
    x = torch.ones(2**28)
    return {**found, "memory_gb_per_s": 4 * x.numel() / best(x.sum) / 1e9}


# ----------------------------------------------------------------------------------------------------------------------
# Training
# ----------------------------------------------------------------------------------------------------------------------


def time_steps(step: Callable, steps: int, warmup: int, tokens: int) -> dict:
    """Median seconds of step(i), tokens/s and peak memory."""
    seconds = []
    for i in range(warmup + steps):
        begin = time.perf_counter()
        step(i)
        seconds.append(time.perf_counter() - begin)
    median = statistics.median(seconds[warmup:])
    return {"step_seconds": median, "tokens_per_s": tokens / median, "peak_mb": peak_mb()}


def random_batches(n: int, batch_size: int, block_size: int, vocab_size: int) -> list:
    """n pairs of tokens and targets, (batch_size, block_size) each; the same in every process."""
    import torch

    shape, generator = (batch_size, block_size + 1), torch.Generator().manual_seed(0)
    windows = [torch.randint(vocab_size, shape, generator=generator) for _ in range(n)]
    return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows]


def ours_for_training(
    variant: str, vocab_size: int = GPT2_VOCABULARY, block_size: int | None = None, batch_size: int | None = None
):
    """model.py, a variant's TrainConfig and its GPTConfig, as `model.py train --recipe published` makes them."""
    model = load()
    overrides = {"block_size": block_size} if block_size else {}
    arguments = ["train", "--variant", variant, "--recipe", "published"]
    arguments += ["--batch_size", str(batch_size)] if batch_size else []
    # our GPT-2 tokenizer has two special tokens more
    c = model.make_config(variant, vocab_size + 2, overrides, "published")
    t = model.train_config(model.parse(arguments)[1], variant, c)
    return model, t, c


def train_ours(steps: int, warmup: int, variant: str = "7M", **sizes: int) -> dict:
    """The steps of model.fit: the same functions in the same order, on random tokens."""
    model, t, c = ours_for_training(variant, **sizes)
    import torch

    model.keep_freed_memory()
    net = model.set_precision(model.GPT(c), t.dtype, training=True).train()
    optimizers, run = model.make_optimizers(net, t), model.Run.__new__(model.Run)
    run.model, run.loss_fn, run.scaler = net, model.language_modelling, torch.amp.GradScaler("cpu", enabled=False)
    model.compile_model(net, t, net.config.block_size)
    params = list(net.parameters())
    batches = random_batches(warmup + steps, t.batch_size, c.block_size, c.vocab_size - 2)
    n_targets = torch.tensor(float(t.batch_size * c.block_size))

    def step(i: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        batch = dict(zip(("idx", "targets"), batches[i], strict=True))
        run.accumulate_gradients([batch], n_targets)
        torch.nn.utils.clip_grad_norm_(params, t.grad_clip)
        for optimizer in optimizers:
            optimizer.step()

    result = time_steps(step, steps, warmup, t.batch_size * c.block_size)
    return {**result, "flops_per_token": model.training_flops_per_token(c), "dtype": str(net.compute_dtype)}


def training_memory(variant: str, steps: int, warmup: int, **sizes: int) -> dict:
    """Whether these steps fit into the memory that is free now."""
    model, t, c = ours_for_training(variant, **sizes)
    needed = model.training_memory_bytes(c, t.batch_size)
    free = model.available_memory() or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {"needed": needed, "free": free, "fits": needed + 2e9 < free}


def shape_of(variant: str) -> dict:
    """n_layer, n_head, n_embd and block_size of one of our gpt2 variants."""
    shape = load().VARIANTS[variant]
    return {name: shape[name] for name in ("n_layer", "n_head", "n_embd", "block_size")}


SHAPE_7M = dict(n_layer=4, n_head=4, n_embd=128, block_size=128)  # train_* do not load our model.py: memory counts
PADDED_VOCABULARY = 50304  # nanoGPT's own


def time_plain_steps(net, optimizer, loss_of: Callable, steps: int, warmup: int) -> dict:
    """Steps of loss_of(tokens, targets) as plain PyTorch takes them."""
    import torch

    batches = random_batches(warmup + steps, 16, 128, GPT2_VOCABULARY)

    def step(i: int) -> None:
        loss_of(*batches[i]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return time_steps(step, steps, warmup, 16 * 128)


def train_nanogpt(steps: int, warmup: int, folder: str) -> dict:
    """nanoGPT as --device=cpu --compile=False set it up: float32, with its train.py's optimizer and clipping."""
    nano = load(folder)
    net = nano.GPT(nano.GPTConfig(**SHAPE_7M, vocab_size=PADDED_VOCABULARY, dropout=0.0, bias=False)).train()
    optimizer = net.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    return time_plain_steps(net, optimizer, lambda idx, targets: net(idx, targets)[1], steps, warmup)


def gpt2_of_transformers(shape: dict):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], vocab_size=PADDED_VOCABULARY)
    no_dropout = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, n_positions=shape["block_size"], eos_token_id=None))


def train_transformers(steps: int, warmup: int) -> dict:
    """GPT2LMHeadModel with torch's AdamW, float32."""
    import torch

    net = gpt2_of_transformers(SHAPE_7M).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    loss_of = lambda idx, _: net(input_ids=idx, labels=idx).loss  # noqa: E731  (shifts the labels itself)
    return time_plain_steps(net, optimizer, loss_of, steps, warmup)


def nanogpt_val_loss(folder: str) -> dict:
    """The loss of the checkpoint that nanoGPT's Shakespeare run left, over its whole validation split."""
    import numpy as np
    import torch

    nano = load(folder)
    checkpoint = torch.load(next(Path(folder).glob("out*/ckpt.pt")), weights_only=False)
    config = nano.GPTConfig(**checkpoint["model_args"])
    with contextlib.redirect_stdout(sys.stderr):
        net = nano.GPT(config).eval()
    net.load_state_dict(checkpoint["model"])
    tokens = torch.from_numpy(np.fromfile(Path(folder) / "data/shakespeare_char/val.bin", np.uint16).astype(np.int64))
    T = config.block_size
    n = (len(tokens) - 1) // T
    idx, targets = tokens[: n * T].view(n, T), tokens[1 : n * T + 1].view(n, T)
    with torch.no_grad():
        losses = [net(x, y)[1].item() * len(x) for x, y in zip(idx.split(64), targets.split(64), strict=True)]
    return {"val_loss": sum(losses) / n, "parameters": sum(p.numel() for p in net.parameters())}


# ----------------------------------------------------------------------------------------------------------------------
# Generation. Every generator tells when each token was there: times[0] is its start, times[i] token i.
# ----------------------------------------------------------------------------------------------------------------------


def speeds(times: list[float]) -> dict:
    decoded = max(len(times) - 2, 1)  # the first token is the prompt's
    rate = decoded / (times[-1] - times[1]) if len(times) > 2 else 0.0
    return {"first_seconds": times[1] - times[0], "tokens_per_s": rate, "tokens": len(times) - 1}


def stamps(tokens, n: int) -> list[float]:
    """Draw n tokens from an iterator."""
    times = [time.perf_counter()]
    for _, token in zip(range(n), tokens, strict=False):
        getattr(token, "tolist", int)()  # waits for a GPU; llama.cpp gives numbers
        times.append(time.perf_counter())
    return times


def warmed_up(times_of: Callable[[int], list[float]], n: int, cold: bool = False) -> list[float]:
    """times_of(n), after a run of a few tokens unless it is to be cold."""
    if not cold:
        times_of(4)
    return times_of(n)


def times_of_ours(model, net, prompt: list[int], n: int) -> list[float]:
    return stamps(model.generate(net, [prompt], n, model.SamplingSettings(temperature=1.0, min_p=0.0)), n)


class Clock:
    """A streamer for transformers' generate: the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def times_of_transformers(net, idx, n: int, **options) -> list[float]:
    import torch

    clock, begin = Clock(), time.perf_counter()
    with torch.inference_mode():
        options.update(max_new_tokens=n, min_new_tokens=n, attention_mask=torch.ones_like(idx), pad_token_id=0)
        net.generate(idx, streamer=clock, **options)
    return [begin, *clock.times[1:]]


SHORT_PROMPT = list(range(1000, 1008))


def generate_ours(variant: str, n: int, device: str = "cpu") -> dict:
    model = load()
    import torch

    torch.manual_seed(0)
    net = model.GPT(model.make_config(variant, GPT2_VOCABULARY + 2, {}, "published")).eval().to(device)
    model.prepare_generation(net, "auto")
    measured = speeds(warmed_up(functools.partial(times_of_ours, model, net, SHORT_PROMPT), n))
    return {**measured, "dtype": str(net.compute_dtype), "peak_mb": peak_mb(), "gpu_mb": gpu_mb()}


def generate_nanogpt(variant: str, n: int, folder: str) -> dict:
    """nanoGPT's model.generate, float32; it has no stream, so a hook on the forward pass tells the time."""
    import torch

    shape = shape_of(variant)
    nano = load(folder)
    torch.manual_seed(0)
    net = nano.GPT(nano.GPTConfig(**shape, vocab_size=PADDED_VOCABULARY, dropout=0.0, bias=True)).eval()
    prompt, times = torch.tensor([SHORT_PROMPT]), []
    net.register_forward_hook(lambda *_: times.append(time.perf_counter()))

    def times_of(n: int) -> list[float]:
        times[:] = [time.perf_counter()]
        net.generate(prompt, n)
        return times

    return {**speeds(warmed_up(times_of, n)), "peak_mb": peak_mb()}


def generate_transformers(variant: str, n: int, device: str = "cpu") -> dict:
    """float32 on a CPU, bfloat16 on a GPU."""
    import torch

    net, prompt = gpt2_of_transformers(shape_of(variant)).eval(), torch.tensor([SHORT_PROMPT], device=device)
    net = net.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    times_of = functools.partial(times_of_transformers, net, prompt, do_sample=True, top_k=0)
    measured = speeds(warmed_up(times_of, n))
    return {**measured, "peak_mb": peak_mb(), "gpu_mb": gpu_mb()}


def sample_ours(folder: str, prompt: str, n: int, flags: tuple = (), cold: bool = False) -> dict:
    """`model.py sample` as a user types it, with a clock around its generator. Warm: after a run of a few tokens."""
    model, times, weight_bytes = load(), [], []
    plain, prepare = model.generate, model.prepare_generation

    def weighed(net, *arguments):
        prepare(net, *arguments)
        matrices = [net.head_weight, *(getattr(*place).weight for block in net.blocks for place in block.linears())]
        weight_bytes[:] = [sum(w.nbytes for w in matrices)]  # read for each token

    def clocked(net, *arguments, **options):
        times[:] = [time.perf_counter()]
        for token in plain(net, *arguments, **options):
            times.append(time.perf_counter())
            yield token

    model.generate, model.prepare_generation = clocked, weighed

    def times_of(n: int) -> list[float]:
        sample = ["sample", "--model_checkpoint", folder, "--prompt", prompt, "--temperature", 0, "--length", n]
        sys.argv = ["model.py", *map(str, sample), *flags]
        with contextlib.suppress(SystemExit):
            model.main()
        return times

    warmed_up(times_of, n, cold)
    print()
    return {**speeds(times), "weight_bytes": weight_bytes[0], "peak_mb": peak_mb()}


def quality(folder: str, text: str, n: int = 512) -> dict:
    """What a lower precision costs: the loss over the first n tokens of a text, read as one prompt, and the divergence
    KL(float32 || it), both in nats a token."""
    model = load()
    import torch

    results, exact = {}, None
    for label, options in {"float32": ("float32",), "bfloat16": ("bfloat16",), "auto": ("auto",),
                           "int8": ("auto", "int8")}.items():  # fmt: skip
        if label == "bfloat16" and model.choose_dtype("auto", torch.device("cpu")) != torch.bfloat16:
            continue
        opened = model.open_model(folder)
        net, tokenizer = opened.model, opened.tokenizer
        ids = torch.tensor(tokenizer.encode(Path(text).read_text(encoding="utf-8")[: 10 * n])[:n])
        model.prepare_generation(net, *options)
        with torch.inference_mode():
            log_q = net(ids[None, :-1])[0].log_softmax(dim=-1)
        exact = log_q if exact is None else exact
        results[f"{label}_loss"] = -log_q.gather(1, ids[1:, None]).mean().item()
        results[f"{label}_kl"] = (exact.exp() * (exact - log_q)).sum(dim=-1).mean().item()
    return results


def sample_transformers(folder: str, prompt: str, n: int, cold: bool = False) -> dict:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    dtype = load().choose_dtype("auto", torch.device("cpu"))
    net = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    idx = tokenizer(prompt, return_tensors="pt").input_ids
    times = warmed_up(functools.partial(times_of_transformers, net, idx, do_sample=False), n, cold)
    return {**speeds(times), "peak_mb": peak_mb()}


def sample_llama_cpp(folder: str, prompt: str, n: int, file: str, cold: bool = False, repack: bool = True) -> dict:
    import llama_cpp

    if not repack:  # llama-cpp-python's Llama has no argument for it
        params = llama_cpp.llama_model_default_params()
        params.use_extra_bufts = False
        llama_cpp.llama_cpp.llama_model_default_params = lambda: params
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    llm = llama_cpp.Llama(file, n_ctx=512, n_threads=cores, n_threads_batch=cores, verbose=False)
    tokens = llm.tokenize(prompt.encode())

    def times_of(n: int) -> list[float]:
        llm.reset()  # else the prompt would be found in the cache
        return stamps(llm.generate(tokens, temp=0.0, top_k=1), n)

    return {**speeds(warmed_up(times_of, n, cold)), "peak_mb": peak_mb()}


CONTEXT_SHAPE = dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=256, n_inner=768)


def windows(times: list[float], n_windows: int = 32) -> dict:
    """(context, tokens/s) over the run."""
    size = max(1, (len(times) - 1) // n_windows)
    ends = range(size + 1, len(times), size)
    return {"curve": [(i - size // 2, size / (times[i] - times[i - size])) for i in ends], **speeds(times)}


def context_ours(tokens: int, block_size: int) -> dict:
    """Generation from one token to a full context, by a small llama."""
    model = load()
    net = model.GPT(model.make_config("26M", 8192, dict(CONTEXT_SHAPE, block_size=block_size))).eval()
    model.prepare_generation(net, "auto")
    return windows(warmed_up(functools.partial(times_of_ours, model, net, [1]), tokens))


def context_transformers(tokens: int, block_size: int) -> dict:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = CONTEXT_SHAPE
    config = LlamaConfig(
        vocab_size=8192, hidden_size=s["n_embd"], intermediate_size=s["n_inner"], num_hidden_layers=s["n_layer"],
        num_attention_heads=s["n_head"], num_key_value_heads=s["n_kv_head"], max_position_embeddings=block_size,
        tie_word_embeddings=True, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    net, prompt = LlamaForCausalLM(config).eval(), torch.tensor([[1]])
    times_of = functools.partial(times_of_transformers, net, prompt, do_sample=True, top_k=0)
    return windows(warmed_up(times_of, tokens))


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing
# ----------------------------------------------------------------------------------------------------------------------


def tokenize_ours(file: str) -> dict:
    """model.tokenize_text: reading, encoding, writing the data folder. The vocabulary is loaded before."""
    model = load()
    import tempfile

    tokenizer = model.load_tokenizer("gpt2")
    tokenizer.encode_array("warm", "int64")
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        meta = model.tokenize_text(Path(scratch) / "data", [file], tokenizer)
        seconds = time.perf_counter() - begin
    size = os.path.getsize(file) / 1e6
    return {"mb_per_s": size / seconds, "tokens": meta.n_tokens, "mb": size, "peak_mb": peak_mb()}


def tokenize_tiktoken(file: str) -> dict:
    import tiktoken

    encoding, text = tiktoken.get_encoding("r50k_base"), Path(file).read_text(encoding="utf-8")
    encoding.encode_ordinary("warm")
    begin = time.perf_counter()
    n = len(encoding.encode_ordinary(text))
    seconds, size = time.perf_counter() - begin, os.path.getsize(file) / 1e6
    return {"mb_per_s": size / seconds, "tokens": n, "mb": size, "peak_mb": peak_mb()}


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](**json.loads(sys.argv[2]))))
