"""Matryoshka: nested prefixes keep parents' features from being absorbed by their children's (2503.17547)."""

from typing import Any

from saekit.papers.claims import Claim, Reproduction, Tell, bars
from saekit.papers.controls import FROZEN, RANDOM, untrained
from saekit.papers.forest import standing, trained
from saekit.papers.row import Found, Row
from saekit.testbed.forest import Forest, ForestConfig

STEPS = 4000


def measure(seed: int, tell: Tell) -> Found:
    """An L1 dictionary with and without random prefixes on Nabeshima's tree."""
    forest = Forest(ForestConfig())
    # L1 alone reaches its L0 only by absorption, which needs fewer codes; see the note
    nested = {"objective": ("matryoshka", "l1"), "random": True, "levels": 10, "k": forest.l0}
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "L1": ("relu", {"coefficient": 0.5}),
        "Matryoshka": ("relu", nested),
        FROZEN: ("frozen", {"k": round(forest.l0)}),
    }
    found: Found = {}
    for j, (name, (preset, options)) in enumerate(kinds.items()):
        d = trained(forest, preset, seed, {"steps": STEPS, "lr": 3e-3}, **options)
        found[name] = standing(forest, d)
        tell(j + 1, len(kinds), name)
    found[RANDOM] = standing(forest, untrained(d))  # the last of them is the frozen one
    return found


def judge(found: Found) -> Reproduction:
    """How far parents are absorbed with prefixes and without."""
    of = {key: {name: values[key] for name, values in found.items()} for key in found["L1"]}
    ours, plain = ({key: rows[name] for key, rows in of.items()} for name in ("Matryoshka", "L1"))
    shown = {name: {key: of[key][name] for key in ("absorption", "recall", "matched")} for name in found}
    return Reproduction(
        title="Matryoshka dictionaries do not absorb parents into children",
        source="Bussmann, Nabeshima, Karvonen and Nanda 2025, arXiv 2503.17547",
        setting=f"Nabeshima's tree: 20 features in 20 dimensions, 3 parents with 3 exclusive children, 8 singles; 20 latents, {STEPS} steps of 200 rows, "
        "10 prefixes drawn each step; L1 dictionaries on both sides",
        claims=[
            Claim("parent's direction in the child's latents (cosine)", "about 0 in the paper's toy (figure)", ours["absorption"], "<=", 0.1, plain["absorption"], "plain L1"),
            Claim("parent's latent is on when a child is (recall)", "always on in the paper's toy (figure)", ours["recall"], ">=", 0.95, plain["recall"], "plain L1"),
            Claim("plain L1: the parent is inside the child's latent", "1/sqrt(2) = 0.707, the sum of two unit vectors", plain["absorption"], ">=", 0.6),
            Claim("plain L1: the parent's latent is off when a child is on (recall)", "absorbed (figure)", plain["recall"], "<=", 0.1),
        ],
        figure=bars("Absorption on a tree of planted features", "cosine, or share of rows", shown),
        notes=[
            f"L0: Matryoshka {sum(ours['l0']) / len(ours['l0']):.2f}, plain L1 {sum(plain['l0']) / len(plain['l0']):.2f}, the truth {Forest(ForestConfig()).l0:.2f}. "
            "Plain L1 has a lower L0 because absorption saves the parent's code; its coefficient is fixed at 0.5."
        ],
        controls=of,
    )  # fmt: skip


ROW = Row(measure, judge)
