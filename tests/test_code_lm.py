"""The bundled language model is what its card says, and the split holds nothing of the training side."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from saekit import stdlib
from saekit.models import CODE_LM
from saekit.testbed import code_lm as lab


@pytest.fixture(scope="module")
def card() -> dict:
    return json.loads((CODE_LM / "card.json").read_text())


def test_the_card_meets_its_demands(card: dict) -> None:
    assert card["bits_per_byte"] <= 1.10
    assert card["five_gram_bits_per_byte"] >= 1.25 * card["bits_per_byte"]
    assert card["induction_shuffled"] - card["induction_copied"] >= 1.5
    text = (CODE_LM / "README.md").read_text()
    for value in (
        f"{card['bits_per_byte']:.3f}",
        f"{card['five_gram_bits_per_byte']:.3f}",
        *card["families"],
    ):
        assert value in text


def test_the_shipped_weights_do_what_the_card_says(code_lm, card: dict) -> None:
    """A sample of the held-out text, measured again by hand."""
    losses, n_bytes = 0.0, 0
    for document in list(stdlib.documents("held_out"))[3:60:6]:
        ids = code_lm.tokenizer(document.text[:6000], add_special_tokens=False)["input_ids"][:511]
        rows = torch.tensor([[0, *ids]])
        with torch.no_grad():
            logits = code_lm.module(input_ids=rows).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="sum").item()
        n_bytes += len(code_lm.tokenizer.decode(ids).encode())
    assert losses / np.log(2) / n_bytes == pytest.approx(card["bits_per_byte"], rel=0.25)


def test_it_copies_a_repeated_random_sequence(code_lm) -> None:
    copied, shuffled = lab.induction(code_lm.module, n=8, period=64, seed=5)
    assert shuffled - copied >= 1.5


def test_windows_score_every_token_once(code_lm) -> None:
    """Scores of a text longer than the context equal those of each token's own window."""
    ids = np.array(
        code_lm.tokenizer("".join(d.text for d in list(stdlib.documents("held_out"))[:12]))["input_ids"]
    )[:1300]
    scores = lab.token_losses(code_lm.module, ids)
    assert (scores > 0).all() and len(scores) == len(ids) - 1
    for at in (1, 300, 510, 511, 766, 767, 1298, 1299):
        start = 0 if at <= 510 else (at - 255) // 256 * 256
        window = np.array([0, *ids[start : start + 511]])
        with torch.no_grad():
            logits = code_lm.module(input_ids=torch.from_numpy(window[None])).logits[0]
        expected = -logits[at - start].log_softmax(-1)[ids[at]].item()
        assert scores[at - 1] == pytest.approx(expected, rel=1e-3, abs=1e-4), at


def test_the_tokenizer_is_lossless(code_lm) -> None:
    text = "def f(x):\n\treturn 'é漢😀' + str(1234567)  # \x00 \r\n"
    assert code_lm.tokenizer.decode(code_lm.tokenizer(text)["input_ids"]) == text


def test_the_weights_are_small() -> None:
    assert sum(f.stat().st_size for f in CODE_LM.iterdir() if f.is_file()) < 15e6


def test_the_split_keeps_families_whole_and_shares_no_text() -> None:
    held_out, train = stdlib.files("held_out"), stdlib.files("train")
    assert held_out and not set(held_out) & set(train)
    assert sorted(held_out + train) == stdlib.files("all")
    assert not {stdlib.family(n) for n in held_out} & {stdlib.family(n) for n in train}
    assert stdlib.family("test/test_json/test_dump.py") == stdlib.family("json/decoder.py") == "json"
    assert stdlib.family("_pydecimal.py") == stdlib.family("test/test_decimal.py")
    assert not [n for n in stdlib.files("all") if n.startswith("encodings")]  # the code-page tables

    def pairs(name: str) -> set[tuple[str, str]]:
        lines = [line.strip() for line in (stdlib.root() / name).read_text(errors="replace").splitlines()]
        return set(pairwise(line for line in lines if len(line) > 20))

    seen = set().union(*map(pairs, train))
    for name in held_out:
        own = pairs(name)
        assert len(own) < 50 or len(own & seen) < 0.25 * len(own), name
