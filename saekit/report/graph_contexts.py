"""Where the features of a graph are most active in a text, for the graph's page to show."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from saekit.dictionaries import Dictionary
from saekit.graph import Graph
from saekit.graph.export import Contexts
from saekit.harvest import harvest
from saekit.hub.native import load, origin
from saekit.models import load_model
from saekit.report.contexts import Context, ContextCollector
from saekit.report.run import codes_of
from saekit.tokens import Decode, in_text
from saekit.types import ActivationBatch, SaekitError

RADIUS = 8  # tokens on each side of a peak


def graph_contexts(
    graph: Graph,
    model: Any,
    dictionaries: Sequence[Any],
    text: Any = None,
    tokens: int = 50_000,
    n_top: int = 4,
    on_batch: Callable[[int, int], None] | None = None,
) -> Contexts:
    """The ``n_top`` contexts in which each of a graph's features peaks highest, in ``tokens`` tokens of a text.

    What :meth:`Graph.to_html` takes as ``contexts``, by (number of the dictionary, feature). ``dictionaries`` are those
    that the graph was traced with, in their order; neurons and heads among them get none. ``text``: by default what
    the first dictionary was trained on.
    """
    view = load_model(model)
    stands = [load(one) if isinstance(one, str | Path) else one for one in dictionaries]
    names = [", ".join(one.writes) if isinstance(one, Dictionary) else one.hook_point for one in stands]
    if names != list(graph.stands):
        raise SaekitError(
            f"dictionaries are of {', '.join(names) or 'nothing'} and the graph's of {', '.join(graph.stands)}; give those that it was traced with, in their order"
        )
    if view.tokenizer is None:
        raise SaekitError(f"model {view.name!r} has no tokenizer, so there is no text to show")
    shown = {i: d for i, d in enumerate(stands) if isinstance(d, Dictionary)}
    places = {i: graph.nodes.place[graph.find("feature", stand=i)] for i in shown}
    wanted = {i: sorted(set(found.tolist())) for i, found in places.items() if len(found)}
    if not wanted:
        return {}
    if text is None:
        text = origin(shown[min(wanted)].card)[1]
        if text is None:
            raise SaekitError("the dictionary was trained on text given in Python; give a text")
    within = in_text(view.tokenizer.decode, len(view.tokenizer))
    points = list(dict.fromkeys(point for i in wanted for point in shown[i].reads))
    context = max((shown[i].context or 0 for i in wanted), default=0) or None
    found: dict[int, ContextCollector] = {}
    done = 0
    for batch in harvest(view, text, points, tokens=tokens, context=context):
        for i, features in wanted.items():
            _add(found, i, features, shown[i], batch, n_top)
        done += batch.mask.numel()
        if on_batch is not None:
            on_batch(done, tokens)
    return {
        (i, feature.index): [_shown(one, within) for one in feature.top]
        for i, collector in found.items()
        for feature in collector.result()
    }


def _add(
    found: dict[int, ContextCollector], i: int, features: list[int], d: Dictionary, batch: ActivationBatch, n_top: int
) -> None:  # fmt: skip
    if i not in found:
        found[i] = ContextCollector(
            d.n_features, features, batch.mask.shape[1], n_top=n_top, n_quantile=1, per_quantile=1, radius=RADIUS, reservoir=1
        )  # fmt: skip
    assert batch.tokens is not None  # the model has a tokenizer
    found[i].add(batch.tokens, batch.documents, batch.mask, codes_of(d, batch))


def _shown(context: Context, within: Decode) -> dict[str, Any]:
    texts = [within([token]) for token in context.tokens]
    return {"tokens": texts, "values": [value or 0.0 for value in context.activations], "at": context.peak}
