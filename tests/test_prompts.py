"""What is shown of windows, with every mark to be seen, and what tokens say within a text or raise in the logits."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import saekit
from saekit.autointerp.explain import promoted
from saekit.autointerp.firings import Writer
from saekit.autointerp.prompts import Reader, reader_of
from saekit.autointerp.scorers.fuzzing import Fuzzing
from saekit.autointerp.scorers.intruder import Intruder
from saekit.autointerp.windows import Windows
from saekit.models import Model
from saekit.report.cards import _logits, speller
from saekit.report.steering import direct_effects
from saekit.types import Codes, SaekitError


def test_windows_are_shown_on_one_line_with_marks_around_words() -> None:
    words = [" the", " un", "happi", "ness", " of\n", " «it»", "\tit"]
    own = Reader(lambda ids: "".join(words[i] for i in ids), len(words))
    tokens = np.arange(len(words))
    marked = np.isin(tokens, [1, 2, 3, 4])
    assert own.line(tokens, marked) == "the «unhappiness» «of↵» ‹it›⇥it"
    assert own.line(tokens, tokens == 2) == "the un«happi»ness of↵ ‹it›⇥it"
    assert own.line(tokens) == "the unhappiness of↵ ‹it›⇥it"


def test_marked_white_space_is_shown() -> None:
    words = [" the", "    ", "it", "  \n", "\r", " "]
    own = Reader(lambda ids: "".join(words[i] for i in ids), len(words))
    tokens = np.arange(len(words))
    assert own.line(tokens, np.isin(tokens, [1, 3, 4, 5])) == "the«····»it  «↵»«∅»«·»"
    assert own.line(tokens, tokens == 0) == "«the»    it  ↵"


def test_no_mark_is_unseen_by_which_silent_windows_would_be_known(code_lm: Model, tmp_path: Path) -> None:
    """Of a feature on spaces; blind judges count the marks that are shown."""
    own, g = reader_of(code_lm), np.random.default_rng(0)
    blank = own.texts.index("    ")
    tokens = torch.from_numpy(g.integers(300, 900, (200, 32)))
    tokens[::2, 5] = blank
    documents = torch.arange(200)[:, None].expand(200, 32).contiguous()
    writer = Writer(tmp_path, 1)
    codes = Codes.from_dense((tokens == blank).float()[..., None])
    writer.add(tokens, documents, torch.ones_like(tokens, dtype=torch.bool), codes)
    windows = Windows(writer.close({}), 32, texts=own.texts)
    trials = Fuzzing().trials(windows, 0, "score", 20, 0)
    assert trials is not None and len(trials.truth) == 40
    for line, marks in zip(Fuzzing().lines(trials, own), trials.marks, strict=True):
        assert line.count("«") == marks.sum() == 1
    asked = Intruder().trials(windows, 0, "score", 20, 0)
    blind = Intruder().blind(None, asked, own)
    assert asked is not None and blind["number of marks"] == pytest.approx((asked.truth == 0).mean())


SENTENCE = "the quick brown fox jumps over the lazy dog"


def spaced(kind: str) -> PreTrainedTokenizerFast:
    """A small tokenizer whose decoder takes the first space from a text, as Llama's does; or writes words, as BERT's does."""
    if kind == "llama":
        own = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        own.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
        own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])  # fmt: skip
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", "<0xC3>", "<0x30>"])
    else:
        own = Tokenizer(models.WordPiece(unk_token="<unk>"))
        own.pre_tokenizer, own.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["<unk>"])
    own.train_from_iterator([SENTENCE] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=own)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_tokens_keep_the_space_that_decoders_take_from_a_texts_first(kind: str) -> None:
    tokenizer = spaced(kind)
    own, spell = Reader(tokenizer.decode, len(tokenizer)), speller(tokenizer)
    ids = tokenizer(SENTENCE)["input_ids"]
    words = [f" {word}" for word in SENTENCE.split()]
    assert [own.texts[i] for i in ids] == words and list(map(spell, ids)) == words
    tokens = np.array(ids)
    assert own.line(tokens) == SENTENCE
    marked = "the quick brown «fox» «jumps» over the lazy «dog»"
    assert own.line(tokens, np.isin(np.arange(9), [3, 4, 8])) == marked
    if kind == "llama":  # a byte that would make another character of the one in front of it
        assert own.within(tokenizer.convert_tokens_to_ids(["<0xC3>"])) == "\ufffd"
        assert spell(tokenizer.convert_tokens_to_ids("<0xC3>")) == "<0xC3>"


def test_promoted_tokens_are_those_that_raise_the_models_logits(tiny_gpt2: Model) -> None:
    """Of a whitened dictionary, by explanations, cards and steering alike; none of one whose features write no one direction."""
    own, g = reader_of(tiny_gpt2), torch.Generator().manual_seed(0)
    width = tiny_gpt2.module.config.n_embd
    x = torch.randn(4000, width, generator=g) @ torch.randn(width, width, generator=g)
    d = saekit.create("topk", d_in=width, n_features=8, k=2, normalise="whiten")
    d.set_normalisation(x)
    with torch.no_grad():
        step = d.decode(Codes.from_dense(torch.eye(8))) - d.decode(Codes.from_dense(torch.zeros(8, 8)))
        norm, head = tiny_gpt2.module.transformer.ln_f, tiny_gpt2.module.lm_head
        logits = ((step - step.mean(-1, keepdim=True)) * norm.weight) @ head.weight.T
    effects = direct_effects(tiny_gpt2, d, range(8))
    torch.testing.assert_close(effects, logits - logits.mean(-1, keepdim=True), rtol=1e-3, atol=1e-4)
    shown = _logits(d, tiny_gpt2, range(8), speller(tiny_gpt2.tokenizer))
    for feature, (most, _) in enumerate(shown):
        wanted = logits[feature].topk(10)
        said = promoted(d, tiny_gpt2, own, feature)
        assert said is not None and said[0] == [own.texts[i] for i in wanted.indices.tolist()]
        torch.testing.assert_close(torch.tensor([v for _, v in most]), effects[feature].topk(10).values)
    maps = saekit.create("molt", d_in=width, n_features=8, k=2)
    assert promoted(maps, tiny_gpt2, own, 3) is None
    assert _logits(maps, tiny_gpt2, [3], str) == [([], [])]
    with pytest.raises(SaekitError, match="writes no directions"):
        direct_effects(tiny_gpt2, maps, [3])
