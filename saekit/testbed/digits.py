"""Handwritten digits, 8 x 8 pixels: the images that scikit-learn carries along."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Digits(NamedTuple):
    """Pixels in 0..1 as rows of 64, and the digit of each, split at random into 70 % and 30 %."""

    train: Float[Tensor, "rows 64"]
    train_labels: Int[Tensor, " rows"]
    test: Float[Tensor, "held_out 64"]
    test_labels: Int[Tensor, " held_out"]


def digits(seed: int) -> Digits:
    """The split of a seed; classes keep their shares."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.3, random_state=seed, stratify=labels)
    train, test, train_labels, test_labels = (torch.from_numpy(p) for p in parts)
    return Digits(train.float(), train_labels, test.float(), test_labels)


def classification_error(
    train: Float[Tensor, "rows d"],
    labels: Int[Tensor, " rows"],
    test: Float[Tensor, "held_out d"],
    truth: Int[Tensor, " held_out"],
) -> float:
    """Share of held-out digits that a logistic regression on these features gets wrong, in percent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    model.fit(train.numpy(), labels.numpy())
    return 100 * (1 - model.score(test.numpy(), truth.numpy()))
