"""A made-up attribution graph in the JSON that graphs export, of any size, with nodes of every kind."""

import numpy as np

WORDS = ["Fact: ", "the", " capital", " of", " the", " state", " containing", " Dallas", " is", ",", " says", " a",
    " report", " from", "\n", "Texas", " and", " its", "🦊", " town", " that", " lies", " far", " from"]  # fmt: skip
LABELS = [
    "capital cities",
    "say Austin",
    "Texas",
    "US states",
    "“of” after a noun",
    "location of",
    "",
    "",
    "",
]
NEXT = [" Austin", " Dallas", " Houston", " the", " a", "\n", "Texas", " San", " not", ","]
CONTEXT = ["In", " Texas", ",", " the", "\n", " capital", "</script>", " \ud83e", "<0xE2>", " Austin"]
NAMES = {"feature": "cross layer transcoder", "attention": "lorsa", "error": "mlp reconstruction error", "token": "embedding", "position": "position embedding", "bias": "bias", "pruned": "pruned", "target": "logit"}  # fmt: skip


def made(n_nodes=60, n_links=400, tokens=WORDS[:9], n_layers=4, n_targets=3, seed=0):
    """A graph's JSON: nodes of every kind by layer and position, heavy-tailed links forwards, totals over all paths."""
    rng = np.random.default_rng(seed)
    last = len(tokens) - 1
    spots = [("token", -1, p) for p in range(last + 1)] + [("position", -1, p) for p in range(0, last + 1, 3)]
    for layer in range(n_layers):
        spots += [("bias", layer, last), ("error", layer, last), ("error", layer, int(rng.integers(last)))]
    spots.append(("pruned", n_layers - 1, last))
    for _ in range(n_nodes - n_targets - len(spots)):
        kind, skewed = ("attention", "feature")[int(rng.integers(3) > 0)], rng.beta(2.5, 1.0)
        spots.append((kind, int(rng.integers(n_layers)), round(skewed * last)))
    spots.sort(key=lambda spot: (spot[1], spot[0] != "attention"))
    spots += [("target", n_layers, last)] * n_targets
    order = np.array([layer + (kind not in ("attention", "bias")) / 2 for kind, layer, _ in spots])
    place = np.array([p for _, _, p in spots])
    takes = np.array([kind in ("feature", "attention", "target") for kind, _, _ in spots])
    can = takes[:, None] & (order < order[:, None]) & (place <= place[:, None])
    rows, columns = can.nonzero()
    some = rng.permutation(len(rows))[:n_links]
    weights = np.zeros(can.shape)
    weights[rows[some], columns[some]] = rng.standard_t(2.0, len(some)) / 4
    values = np.abs(rng.normal(size=len(spots))) + 0.2
    total = np.zeros((n_targets, len(spots)))
    total[range(n_targets), range(len(spots) - n_targets, len(spots))] = 1
    for at in reversed(range(len(spots))):  # each row's shares of its node
        size = np.abs(weights[at]).sum()
        total += total[:, [at]] * (weights[at] / size if size else 0)
    ranked = np.argsort(-np.abs(total).sum(0))
    share = np.empty(len(spots))
    share[ranked] = np.cumsum(np.abs(total).sum(0)[ranked]) / np.abs(total).sum()
    nodes = [node(at, spot, rng) for at, spot in enumerate(spots)]
    for at, one in enumerate(nodes):
        one |= {"total_effect": [float(t) for t in total[:, at]], "activation": float(values[at])}
        one["influence"] = None if spots[at][0] == "target" else float(share[at])
    names = [one["node_id"] for one in nodes]
    return {
        "metadata": {"slug": "capital-of-texas", "scan": "made-up", "prompt_tokens": tokens, "schema_version": 1,
            "prompt": "".join(tokens), "node_threshold": 0.8, "pruning_settings": {"node_threshold": 0.8, "edge_threshold": 0.98}},
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": names[c], "target": names[r], "weight": float(weights[r, c])} for r, c in zip(*weights.nonzero(), strict=True)],
        "contexts": {one["node_id"]: contexts(rng) for one in nodes if "lor" in one["node_id"] or one["feature_type"].startswith("cross")},
    }  # fmt: skip


def node(at, spot, rng):
    kind, layer, position = spot
    number = at * 7
    label = LABELS[rng.integers(len(LABELS))] if kind in ("feature", "attention") else ""
    if kind == "target":
        label = f'Output "{NEXT[at % 10]}" (p={0.45 / (1 + at % 10):.3f})'
    ids = {"feature": f"{layer}_{number}_{position}", "attention": f"{layer}_lor_{number}_{position}",
        "error": f"{layer}_-1_{position}", "token": f"E_{number}_{position}"}  # fmt: skip
    return {
        "node_id": ids.get(kind, f"{layer}_{kind}_{at}_{position}"),
        "feature": (layer + number) * (layer + number + 1) // 2 + number if layer >= 0 else position,
        "layer": "E" if layer < 0 else str(layer),
        "ctx_idx": position,
        "feature_type": NAMES[kind],
        "jsNodeId": "",
        "clerp": label,
        "token_prob": 0.45 / (1 + at % 10) if kind == "target" else 0.0,
    }


def contexts(rng):
    out = []
    for peak in sorted(3 * rng.random(4) + 1, reverse=True):
        tokens = [CONTEXT[t] for t in rng.integers(len(CONTEXT), size=24)]
        values = np.where(rng.random(24) < 0.15, peak * rng.random(24), 0)
        at = int(rng.integers(6, 18))
        values[at] = peak
        out.append({"tokens": tokens, "values": values.tolist(), "at": at})
    return out
