"""The page of an attribution graph: one HTML file to walk it, made from the JSON that the graph exports.

The file opens offline and asks for nothing: script, style and data lie inside, and a content security policy admits
those only. Text of tokens is data from arbitrary corpora. It reaches the page as JSON and is put there as text nodes,
never as markup.
"""

import html
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saekit.pages import printable, script_json, sha256
from saekit.types import SaekitError

SCRIPTS = ("model.js", "drawing.js", "pinned.js", "detail.js", "page.js")
KINDS = {  # what of feature_type says the kind, first match first; everything else is a feature
    "error": "error",
    "pruned": "pruned",
    "position": "position",
    "embedding": "token",
    "bias": "bias",
    "logit": "target",
    "target": "target",
}


def page(data: Mapping[str, Any]) -> str:
    """The page as HTML, of a graph in the JSON of circuit-tracer's frontend and Neuronpedia.

    ``data`` has ``metadata`` (``prompt_tokens``), ``nodes``, ``links`` and ``qParams`` (what is pinned, grouped and
    labelled when the page opens). Some keys are ours: a node's ``total_effect``, what it adds to every target over all
    paths, in the order of the target nodes; its ``position``, -1 for none; its ``stand``, a number in ``saekit.stands``,
    which says of what dictionary it is; and ``contexts``, which maps a node's id to texts on which its feature is most
    active, {"tokens": [...], "values": [...], "at": index of the peak}.
    """
    _check(data)
    here = Path(__file__).parent
    # the policy's hashes are taken over what a parser reads, which knows no \r\n
    style = (here / "page.css").read_text("utf-8")
    script = "\n".join((here / name).read_text("utf-8") for name in SCRIPTS)
    named = data["metadata"].get("title_prefix", "") + data["metadata"].get("slug", "")
    title = data.get("saekit", {}).get("title") or named or "Attribution graph"
    parts = {
        "title": html.escape(printable(title)),
        "style_hash": sha256(style),
        "script_hash": sha256(script),
        "style": style,
        "script": script,
        "data": script_json({**_content(data), "title": title}),
    }
    template = (here / "page.html").read_text("utf-8")
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], template)


def _check(data: Mapping[str, Any]) -> None:
    for key in ("metadata", "nodes", "links", "qParams"):
        if key not in data:
            raise SaekitError(f"data has no {key!r}; give the JSON that a graph exports")
    n_tokens = len(data["metadata"].get("prompt_tokens", ()))
    seen: dict[str, int] = {}
    for number, node in enumerate(data["nodes"]):
        missing = [key for key in ("node_id", "layer", "ctx_idx", "feature_type") if key not in node]
        if missing:
            raise SaekitError(f"nodes[{number}] has no {missing[0]!r}; give the JSON that a graph exports")
        name, layer, position = node["node_id"], str(node["layer"]), node["ctx_idx"]
        if name in seen:
            raise SaekitError(
                f"node_id {name!r} is not unique: nodes[{seen[name]}] and nodes[{number}] have it; give every node its own"
            )
        seen[name] = number
        if not re.fullmatch(r"E|-1|\d+", layer):
            raise SaekitError(
                f"node {name!r} has layer {layer!r}; write a number, E for embeddings, or -1 for none"
            )
        if position is not None and not -1 <= position < n_tokens:
            raise SaekitError(
                f"node {name!r} has ctx_idx {position}, but metadata.prompt_tokens has {n_tokens} tokens; give all of the prompt's"
            )
    _check_links(data["links"], seen)
    _check_pinned(data["qParams"], seen)
    n_targets = sum(_kind(node) == "target" for node in data["nodes"])
    for node in data["nodes"]:
        given = len(node.get("total_effect") or ())
        if given not in (0, n_targets):
            raise SaekitError(
                f"node {node['node_id']!r} has {given} total effects for {n_targets} target nodes; give one for each"
            )
    for name in data.get("contexts", {}):
        if name not in seen:
            raise SaekitError(f"contexts has {name!r}, which is no node_id; take it out")


def _check_links(links: Sequence[Mapping[str, Any]], names: Mapping[str, int]) -> None:
    for number, link in enumerate(links):
        for end in ("source", "target"):
            if link[end] not in names:
                raise SaekitError(
                    f"links[{number}].{end} is {link[end]!r}, which is no node_id; take the link out"
                )
        if not math.isfinite(link["weight"]):
            raise SaekitError(f"links[{number}].weight is {link['weight']}; give a finite number")


def _check_pinned(q: Mapping[str, Any], names: Mapping[str, int]) -> None:
    groups = [name for group in q.get("supernodes") or () for name in group[1:]]
    for key, given in (("pinnedIds", q.get("pinnedIds") or ()), ("supernodes", groups)):
        for name in given:
            if name not in names:
                raise SaekitError(f"qParams.{key} has {name!r}, which is no node_id; take it out")


def _content(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script reads: links as columns of node numbers, every text of a context once."""
    at = {node["node_id"]: number for number, node in enumerate(data["nodes"])}
    cantor = bool(data["metadata"].get("schema_version"))
    texts: dict[str, int] = {}
    windows: dict[str, int] = {}  # one feature's contexts stand at each of its positions

    def window(one: Mapping[str, Any]) -> dict[str, Any]:
        tokens = [texts.setdefault(token, len(texts)) for token in one["tokens"]]
        return {"tokens": tokens, "values": [_rounded(v) for v in one["values"]], "at": one["at"]}

    contexts = {
        at[name]: windows.setdefault(json.dumps([window(one) for one in given]), len(windows))
        for name, given in data.get("contexts", {}).items()
    }
    facts = {k: v for k, v in data["metadata"].items() if isinstance(v, str | int | float) and v != ""}
    for settings in ("generation_settings", "pruning_settings", "scores"):
        facts |= data["metadata"].get(settings) or {}
    return {
        "facts": {k: v for k, v in facts.items() if k not in ("slug", "title_prefix", "schema_version")},
        "tokens": list(data["metadata"].get("prompt_tokens", ())),
        "nodes": [_node(node, cantor, data.get("saekit", {}).get("stands", ())) for node in data["nodes"]],
        "source": [at[link["source"]] for link in data["links"]],
        "target": [at[link["target"]] for link in data["links"]],
        "weight": [_rounded(link["weight"]) for link in data["links"]],
        "texts": list(texts),
        "windows": [json.loads(one) for one in windows],
        "contexts": contexts,
        "q": dict(data["qParams"]),
    }


def _node(node: Mapping[str, Any], cantor: bool, stands: Sequence[str]) -> dict[str, Any]:
    kind, stand = _kind(node), node.get("stand", -1)
    # viewers need a place to draw a node at; ours says where it is, if anywhere
    layer, position, feature = str(node["layer"]), node.get("position", node["ctx_idx"]), node.get("feature")
    number = feature
    if kind == "feature" and cantor and feature is not None:
        diagonal = (math.isqrt(8 * feature + 1) - 1) // 2
        number = feature - diagonal * (diagonal + 1) // 2
    effects = [_rounded(effect) for effect in node.get("total_effect") or ()]
    return {
        "id": node["node_id"],
        "kind": kind,
        "type": stands[stand] if 0 <= stand < len(stands) else node["feature_type"],
        "layer": None if layer == "E" or int(layer) < 0 else int(layer),
        "position": None if position is None or position < 0 else position,
        "feature": feature,
        "number": number,
        "label": node.get("clerp") or "",
        "influence": _rounded(node.get("influence")),
        "activation": _rounded(node.get("activation")),
        "prob": _rounded(node.get("token_prob")),
        "effects": effects,
    }


def _kind(node: Mapping[str, Any]) -> str:
    return next((kind for word, kind in KINDS.items() if word in node["feature_type"]), "feature")


def _rounded(value: float | None) -> float | None:
    """Six digits: what is shown has fewer, and the page is half as long. What is no number becomes null."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
