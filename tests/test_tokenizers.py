"""Tokenizers: every string comes back, and the ids are those of tiktoken and of the tokenizers package."""

import json
import re

import numpy as np
import pytest
import tiktoken
import tokenizers
from conftest import stdlib_source
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import model

KINDS = ["gpt2", "bpe", "byte", "hf"]
HARD = [
    "", " ", "\n\n \t\r\n", "a" * 5000, "ab" * 3000 + " " * 3000, "\x00\x01\x1b\x7f\x85\u2028\ufeff", "🙂",
    "👩\u200d👩\u200d👧 é e\u0301 नमस्ते", "𐍈𝔘\U0010ffff", "\ufffd\ufffd", "don't they'LL we've I'm",
    "1234567890 ³½Ⅷ一二三", "  leading", "trailing  ", "\u00a0\u3000x", "def f(x):\n\treturn x  # ok\n",
    model.EOT, f"a{model.EOT}b{model.IM_START}user\n{model.IM_END}", "<|endoftext",
]  # fmt: skip
text = st.one_of(st.text(), st.text(alphabet=" \n\t'abcdest019.é🙂\u3000", max_size=60), st.sampled_from(HARD))


def train_with_tokenizers(texts: list[str], vocab_size: int) -> tokenizers.Tokenizer:
    """GPT-2's kind of vocabulary, trained and used by the tokenizers package alone."""
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    )
    return bpe


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    return stdlib_source("argparse", "textwrap", "datetime", "tarfile", "typing").splitlines(keepends=True)


@pytest.fixture(scope="session")
def bpe(corpus):
    return model.train_bpe(corpus, 2000)


@pytest.fixture(scope="session")
def hf_folder(corpus, tmp_path_factory):
    """A Hugging Face folder: a byte-level tokenizer.json with special tokens, and its chat template."""
    folder = tmp_path_factory.mktemp("hf")
    backend = train_with_tokenizers(corpus, 1500)
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|endoftext|>"])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=KINDS)
def tokenizer(request):
    if request.param == "hf":
        return model.hf_tokenizer(request.getfixturevalue("hf_folder"))
    return model.byte_tokenizer() if request.param == "byte" else request.getfixturevalue(request.param)


# The fixtures are immutable, so that one instance serves every example.
property_based = settings(max_examples=300, suppress_health_check=list(HealthCheck))


@property_based
@given(text=text)
def test_every_string_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.n_vocab for i in ids)
    assert not set(ids) & set(tokenizer.special.values())  # special tokens in a text are text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.encode_array(text, np.dtype("<u4")).tolist() == ids
    stream = model.TextStream(tokenizer)
    assert "".join([stream(i) for i in ids] + [stream(None)]) == text


@property_based
@given(ids=st.lists(st.integers(0, 255), max_size=40))
@example(ids=[0x80] * 7 + [0xE2, 0x82, 0xAC])
@example(ids=[0xF0, 0x9F, 0x99, 0x82] * 5)
@example(ids=[0xE2] * 12 + [0x82, 0xAC, 65])
def test_streamed_pieces_join_to_the_decoded_text(ids):
    """Whatever an untrained model says: bytes that are no UTF-8 too."""
    tokenizer = model.byte_tokenizer()
    stream = model.TextStream(tokenizer)
    pieces = [stream(i) for i in ids] + [stream(None)]
    assert "".join(pieces) == bytes(ids).decode("utf-8", "replace")


def test_added_tokens_are_streamed_as_written(corpus, tmp_path):
    """Their text is text, where ordinary tokens are written with a character for each byte."""
    backend = train_with_tokenizers(corpus, 300)
    backend.add_tokens(["two words é"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = model.hf_tokenizer(tmp_path)
    ids = backend.encode("é two words é.").ids
    assert backend.token_to_id("two words é") in ids
    stream = model.TextStream(tokenizer)
    assert "".join(map(stream, ids)) + stream(None) == "é two words é."


def test_text_is_streamed_as_soon_as_it_is_whole():
    stream = model.TextStream(model.byte_tokenizer())
    assert [stream(b) for b in "aé🙂b".encode()] == ["a", "", "é", "", "", "", "🙂", "b"]


@property_based
@given(text=text)
def test_gpt2_ids_are_tiktokens(gpt2, text):
    assert gpt2.encode(text) == tiktoken.get_encoding("r50k_base").encode_ordinary(text)


def test_gpt2_vocabulary_is_the_known_one(gpt2):
    """50,256 ordinary tokens, end-of-text at 50,256 as everywhere, and ids that anyone can look up."""
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.special == {"<|endoftext|>": 50256, "<|im_start|>": 50257, "<|im_end|>": 50258}
    assert gpt2.n_vocab == 50259
    assert gpt2.decode([50256]) == "<|endoftext|>"


@property_based
@given(text=text)
def test_trained_bpe_ids_are_those_of_the_tokenizers_package(bpe, trained_elsewhere, text):
    assert bpe.encode(text) == trained_elsewhere.encode(text).ids


@pytest.fixture(scope="session")
def trained_elsewhere(corpus):
    return train_with_tokenizers(corpus, 2000 - 3)


def test_trained_bpe_on_text_it_has_not_seen(bpe, trained_elsewhere, shakespeare):
    for sample in (shakespeare[:200_000], stdlib_source("pydoc_data/topics")[:200_000], stdlib_source("inspect")):
        assert bpe.encode(sample) == trained_elsewhere.encode(sample).ids
    assert bpe.n_vocab == 2000 and bpe.name == "bpe-2000"
    assert len(bpe.encode(stdlib_source("argparse"))) < 0.5 * len(stdlib_source("argparse"))


def test_bpe_of_a_tiny_text_has_a_smaller_vocabulary():
    tokenizer = model.train_bpe(["a b"], 8192)
    assert tokenizer.n_vocab == 259 + len({"Ġb"}) and tokenizer.decode(tokenizer.encode("a b é")) == "a b é"


def test_bpe_needs_room_for_bytes_and_special_tokens():
    assert model.train_bpe(["some text"], 259).n_vocab == 259
    with pytest.raises(model.UserError, match="259"):
        model.train_bpe(["some text"], 258)


def test_decode_leaves_out_padding(tokenizer):
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, tokenizer.n_vocab, tokenizer.n_vocab + 40]) == "ab"


def test_special_tokens_are_counted_as_no_bytes(tokenizer):
    for name, i in tokenizer.special.items():
        assert tokenizer.token_bytes()[i] == 0
        assert tokenizer.decode([i]) == name
    assert len(tokenizer.token_bytes()) == tokenizer.n_vocab


def test_a_lone_surrogate_becomes_something_printable(tokenizer):
    """Not UTF-8 at all: what an argument with a stray byte looks like to Python."""
    assert tokenizer.decode(tokenizer.encode("a\udcffb")).encode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# In pieces = in one go
# ---------------------------------------------------------------------------------------------------------------------

PASSAGES = {
    "code": lambda: stdlib_source("textwrap"),
    "no white space": lambda: "x1" * 20_000,
    "white space only": lambda: " \n \t" * 5_000,
    "unicode": lambda: "Ωμέγα, नमस्ते दुनिया! 你好世界 x² ½ a\u00a0b\u2003c 🙂🙂 don't  \n\n" * 300,
    "no words": lambda: ".,;! ?\n" * 3000,
}


@pytest.mark.parametrize("passage", PASSAGES)
@pytest.mark.parametrize("piece_chars", [64, 1000])
def test_encoding_in_pieces_equals_encoding_in_one_go(tokenizer, passage, piece_chars, monkeypatch):
    monkeypatch.setattr(model, "PIECE_CHARS", piece_chars)
    whole = PASSAGES[passage]()
    blocks = [whole[i : i + piece_chars] for i in range(0, len(whole), piece_chars)]
    pieces = list(model.text_pieces(blocks))
    assert "".join(pieces) == whole
    ids = np.concatenate(list(model.encode_pieces(tokenizer, pieces, np.dtype("<u4")))).tolist()
    if passage in ("code", "unicode"):
        assert len(pieces) > len(blocks) // 4
        assert ids == tokenizer.encode(whole)  # the others have no white space after a word: cut somewhere at last
    assert tokenizer.decode(ids) == whole


@property_based
@given(text=st.text(alphabet=" \n\t'abs19.,é½³一🙂\u3000\u00a0\x85\x1c", min_size=100, max_size=300))
def test_any_cut_keeps_the_tokens(bpe, text):
    """split_point's promise, on whatever text: the two sides encode to what the whole encodes to."""
    cut = model.split_point(text)
    assert bpe.encode(text[:cut]) + bpe.encode(text[cut:]) == bpe.encode(text)


def test_documents_are_separated_by_end_of_text(bpe):
    ids = np.concatenate(list(model.encode_pieces(bpe, ["one", None, "two"], np.dtype("<u2")))).tolist()
    assert ids == [*bpe.encode("one"), bpe.eot, *bpe.encode("two")]


# ---------------------------------------------------------------------------------------------------------------------
# tokenizer.json
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_file", [False, True])
def test_a_hugging_face_tokenizer(hf_folder, as_file):
    ours = model.load_tokenizer(str(hf_folder / "tokenizer.json" if as_file else hf_folder))
    theirs = tokenizers.Tokenizer.from_file(str(hf_folder / "tokenizer.json"))
    sample = stdlib_source("inspect")[:20_000]
    assert ours.encode(sample) == theirs.encode(sample).ids
    assert ours.n_vocab == theirs.get_vocab_size()
    assert ours.special == {t: theirs.token_to_id(t) for t in (model.EOT, model.IM_START, model.IM_END)}
    assert ours.spec["chat_template"] == "{{ messages }}"
    assert ours.bos == []


def sentencepiece_like(prepend: str) -> tokenizers.Tokenizer:
    """Llama's kind: no byte level, spaces as ▁, bytes in angle brackets for what is not in the vocabulary."""
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False)
    backend.train_from_iterator(re.findall(r"\s*\S+", stdlib_source("textwrap")), trainer)  # no token spans words
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * (prepend == "normalizer"))
    post = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.post_processor = post
    # as converted Llama files have it: the byte tokens are in the vocabulary and are not special
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


@pytest.mark.parametrize("prepend", ["none", "normalizer"])
def test_a_sentencepiece_like_tokenizer(prepend, tmp_path, monkeypatch):
    backend = sentencepiece_like(prepend)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    ours = model.hf_tokenizer(tmp_path)
    sample = "Once upon a time: é🙂 def f(x)  # ok"
    ids = backend.encode(sample, add_special_tokens=False).ids
    assert ours.encode(sample) == ids and ours.decode(ids) == sample
    assert ours.bos == [1] and ours.eot == 2
    stream = model.TextStream(ours)
    assert "".join([stream(i) for i in ids] + [stream(None)]) == sample
    extra = 1 if prepend == "normalizer" else 0  # the space that the tokenizer itself puts in front
    assert ours.token_bytes()[ids].sum() == len(sample.encode()) + extra


@pytest.mark.parametrize("prepend", ["none", "normalizer"])
def test_a_sentencepiece_like_tokenizer_in_pieces(prepend, tmp_path, monkeypatch):
    """What a tokenizer puts before a text must not be put before every piece of it."""
    backend = sentencepiece_like(prepend)
    backend.save(str(tmp_path / "tokenizer.json"))
    ours = model.hf_tokenizer(tmp_path)
    monkeypatch.setattr(model, "PIECE_CHARS", 500)
    whole = stdlib_source("textwrap")
    pieces = list(model.text_pieces([whole[i : i + 500] for i in range(0, len(whole), 500)]))
    ids = np.concatenate(list(model.encode_pieces(ours, pieces, np.dtype("<u2")))).tolist()
    assert len(pieces) > 10
    assert ids == backend.encode(whole, add_special_tokens=False).ids


@pytest.mark.parametrize("content", ["", "{}", "[1, 2]", "not json", '{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer(content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(model.UserError, match="tokenizer.json"):
        model.load_tokenizer(str(tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Digests: equal for the same mapping, different for another
# ---------------------------------------------------------------------------------------------------------------------


def test_digest(bpe, corpus, hf_folder):
    same = model.train_bpe(corpus, 2000)
    copied = model.Tokenizer(json.loads(json.dumps(bpe.spec)))
    renamed = model.Tokenizer({**bpe.spec, "name": "another name"})
    assert bpe.digest == same.digest == copied.digest == renamed.digest
    different = [
        bpe,
        model.byte_tokenizer(),
        model.train_bpe(corpus, 1999),
        model.train_bpe(corpus[: len(corpus) // 2], 2000),
        model.hf_tokenizer(hf_folder),
    ]
    assert len({t.digest for t in different}) == len(different)
    assert model.byte_tokenizer().digest == model.byte_tokenizer().digest


def test_spec_is_plain_json(tokenizer):
    again = model.Tokenizer(json.loads(json.dumps(tokenizer.spec)))
    sample = stdlib_source("textwrap")
    assert again.encode(sample) == tokenizer.encode(sample)
    assert (again.n_vocab, again.special, again.digest) == (tokenizer.n_vocab, tokenizer.special, tokenizer.digest)
