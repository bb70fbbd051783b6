"""``saekit trace``: the attribution graph of a prompt."""

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from saekit.errors import SaekitError
from saekit.verbs.console import Device, Json, Seed, progress, result, say

ID = re.compile(r"\s*\d+([\s,]+\d+)*\s*")


def _tokens(prompt: str | None, tokens: str | None) -> Any:
    """A prompt's text or ids; raises unless exactly one is given."""
    if (prompt is None) == (tokens is None):
        raise SaekitError("give the prompt either as text (--prompt) or as token ids (--tokens '0 5 7')")
    if tokens is None:
        return prompt
    if not ID.fullmatch(tokens):
        raise SaekitError(f"tokens = {tokens!r} must be ids with spaces or commas between, as '0 5 7'")
    return [int(token) for token in re.split(r"[\s,]+", tokens.strip())]


def _targets(targets: list[str]) -> Any:
    """What ``--target`` names: ids, differences of ids (``12-9``), or text that is one token; quoted text is text."""
    from saekit.circuits.targets import Logit

    out: list[Any] = []
    for given in targets:
        pair = re.fullmatch(r"(\d+)-(\d+)", given)
        if pair:
            out.append(Logit(int(pair[1])) - Logit(int(pair[2])))
        elif len(given) > 2 and given[0] == given[-1] and given[0] in "'\"":
            out.append(given[1:-1])
        else:
            out.append(int(given) if given.isdecimal() else given)
    return out or None


def _stands(dictionaries: list[Any], model: Any, neurons: bool, heads: bool) -> list[Any]:
    """The dictionaries, and the neurons and heads of every layer, where they are asked for."""
    from saekit.circuits.places import Heads, Neurons, site_of
    from saekit.circuits.weights import weights

    out: list[Any] = [d.to(model.device) for d in dictionaries]
    w = weights(model)
    taken = {site_of(w, model, point) for d in out for point in d.writes}
    for kind, asked, half in (
        (Neurons, neurons or not (out or heads), "mlp"),
        (Heads, heads, "attn"),
    ):
        for layer, block in enumerate(w.blocks):
            place = next((p for p, site in block.places.items() if site == f"{half}_out"), None)
            free = (layer, f"{half}_out") not in taken  # a dictionary stands in for the others
            if asked and place and free and (block.mlp or kind is Heads):
                short = f"blocks.{layer}.{half}"
                out.append(kind(short if short in model.hook_points() else place))
    return out


def trace(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            help="Dictionaries or finished runs; none: the model's own neurons.", metavar="[DICTIONARY]..."
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Prompt as text.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Prompt as token ids, as '0 5 7'.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model; default: the one that the dictionaries were harvested from.")
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Token (id or text; digits in quotes are text) or a difference of ids (12-9); again for more; default: the likeliest."
        ),
    ] = None,
    neurons: Annotated[
        bool, typer.Option(help="Also the neurons of every MLP that no dictionary writes.")
    ] = False,
    heads: Annotated[
        bool, typer.Option(help="Also the heads of every attention layer that no dictionary writes.")
    ] = False,
    scores: Annotated[
        str,
        typer.Option(help="How effects go through attention scores: by their 'slope', or as a 'whole'."),
    ] = "slope",
    budget: Annotated[
        int, typer.Option(help="Features that get inputs of their own, by influence.", min=1)
    ] = 8192,
    nodes: Annotated[
        float, typer.Option(help="Share of the influence to keep in nodes.", min=0, max=1)
    ] = 0.8,
    edges: Annotated[
        float, typer.Option(help="Share of the influence to keep in edges.", min=0, max=1)
    ] = 0.98,
    contexts: Annotated[
        int,
        typer.Option(help="Tokens of text to search for the features' top contexts; 0: show none.", min=0),
    ] = 50_000,
    verify: Annotated[int, typer.Option(help="Ablate this many nodes and as many random ones.", min=0)] = 0,
    out: Annotated[
        str,
        typer.Option(
            help="Folder for the whole graph, and the pruned one as graph.html and graph.circuit.json."
        ),
    ] = "graph",
    device: Device = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Trace what makes the model say what it says: a graph of features, errors, tokens and biases that adds up.

    Example: `saekit trace --model code-lm --prompt "def main(self" --out graph`
    """
    from saekit.circuits.trace import WAYS
    from saekit.circuits.trace import trace as run
    from saekit.graph.export import drawn
    from saekit.harvest import check_writable
    from saekit.hub import load
    from saekit.hub.native import origin
    from saekit.models import load_model

    given, named, folder = _tokens(prompt, tokens), _targets(target or []), Path(out)
    if scores not in WAYS:
        raise SaekitError(f"scores = {scores!r} must be one of {', '.join(WAYS)}")
    if any((folder / name).is_file() for name in ("card.json", "manifest.json")):
        raise SaekitError(f"out {out!r} holds a dictionary or a store; name a folder of the graph's own")
    check_writable(folder)
    dictionaries = [load(path) for path in paths or []]
    labels = _labels(paths or [], dictionaries)
    source = model or (origin(dictionaries[0].card)[0] if dictionaries else "code-lm")
    loaded = load_model(source, device=device) if device else load_model(source)
    stands = _stands(dictionaries, loaded, neurons, heads)
    say(f"tracing {source} with {len(stands)} {'dictionary' if len(stands) == 1 else 'dictionaries'}")
    with progress("rows", "features") as draw:
        graph = run(
            loaded,
            stands,
            given,
            named,
            budget=budget,
            scores=scores,
            on_rows=lambda done, total: draw(done, total, ""),
        )
    closed = graph.check()
    graph.save(folder)
    if verify:
        graph = graph.verify(loaded, stands, top=verify, seed=seed, target=named)
        graph.save(folder)
    small = drawn(graph.prune(nodes, edges))
    small.to_json(folder / "graph.circuit.json")
    shown = _contexts(small, loaded, stands, contexts)
    small.to_html(folder / "graph.html", labels=labels, contexts=shown)
    result(_summary(graph, small, closed, folder), as_json, _text(graph, small, closed, folder))


def _labels(paths: list[str], dictionaries: list[Any]) -> dict[tuple[int, int], str]:
    """Explanations that lie beside the dictionaries, by (dictionary, feature)."""
    from saekit.autointerp.explanation import FILE, load_of

    beside = [(i, Path(path), d) for i, (path, d) in enumerate(zip(paths, dictionaries, strict=True))]
    found = {i: load_of(d, path) for i, path, d in beside if (path / FILE).is_file()}
    return {(i, one.feature): one.label for i, listed in found.items() for one in listed}


def _contexts(graph: Any, model: Any, stands: list[Any], tokens: int) -> Any:
    """Top contexts of the features that the page shows."""
    from saekit.dictionaries import Dictionary
    from saekit.report import graph_contexts

    if not tokens or not any(isinstance(stand, Dictionary) for stand in stands):
        return None
    with progress("contexts", "tokens") as draw:
        return graph_contexts(
            graph, model, stands, tokens=tokens, on_batch=lambda done, total: draw(done, total, "")
        )


def _summary(graph: Any, small: Any, closed: dict[str, float], folder: Path) -> dict[str, Any]:
    from dataclasses import asdict

    totals = graph.total_effects()
    return {
        "out": str(folder.resolve()), "closure": closed, "scores": asdict(graph.scores()),
        "pruned": {"nodes": len(small.nodes), "edges": int(small.rows.nnz), "scores": asdict(small.scores())},
        "targets": [
            {"target": small.output(i), "share": small.weights[i], "top": [
                {"node": graph.label(n), "total_effect": float(totals[i, n])} for n in _strongest(graph, totals[i])
            ]} for i in range(len(small.targets))
        ],
        **({"verified": graph.about["verified"]} if "verified" in graph.about else {}),
    }  # fmt: skip


def _strongest(graph: Any, totals: Any, n: int = 8) -> list[int]:
    import numpy as np

    free = np.flatnonzero(~graph.of_kind("target", "pruned"))
    return [int(i) for i in free[np.argsort(-np.abs(totals[free]), kind="stable")[:n]]]


def _text(graph: Any, small: Any, closed: dict[str, float], folder: Path) -> str:
    scores, totals = graph.scores(), graph.total_effects()
    lines = [
        f"{len(graph.nodes):,} nodes, {graph.rows.nnz:,} edges; rows close to {closed['row']:.1g}",
        f"replacement {scores.replacement:.3f}, completeness {scores.completeness:.3f}; pruned to {len(small.nodes):,} nodes and {small.rows.nnz:,} edges: {small.scores().replacement:.3f}, {small.scores().completeness:.3f}",
    ]
    for i in range(min(len(small.targets), 3)):
        lines.append(f"\n{small.output(i)!r} ({small.weights[i]:.0%}): total effects")
        lines += [f"  {totals[i, n]:+8.3f}  {graph.label(n)}" for n in _strongest(graph, totals[i])]
    if found := graph.about.get("verified"):
        lines.append(
            f"\nSpearman of total effects with ablation: frozen {found['frozen']:.3f}, free {found['free']:.3f}, through attention scores {found['free, through scores']:.3f}; mean effect of the {found['nodes']} strongest {found['mean effect']:.3g}, of random nodes {found['mean effect of random nodes']:.3g}"
        )
    return "\n".join([*lines, "", str((folder / "graph.html").resolve())])
