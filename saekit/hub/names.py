"""Hook points by TransformerLens's names, which SAELens, circuit-tracer and OpenMOSS look for in their models."""

import re
from collections.abc import Mapping
from typing import Any

PLACE = re.compile(
    r"(?:blocks|transformer\.h|model\.layers|gpt_neox\.layers|h|layers)\.(\d+)(?:\.(mlp|attn|self_attn|attention))?(?::(in|out))?"
)
LENS = {
    "": {"in": "hook_resid_pre", "out": "hook_resid_post"},
    "mlp": {"in": "ln2.hook_normalized", "out": "hook_mlp_out"},
    "attn": {"out": "hook_attn_out"},
}
POST_NORMS = ("Gemma2", "Gemma3", "Olmo2")  # there TransformerLens's outputs of halves are behind a norm


def lens(point: str, card: Mapping[str, Any]) -> str:
    """TransformerLens's name of a place that has one, else the name as it is; ``card`` says of which model it is."""
    found = PLACE.fullmatch(point)
    if found is None:
        return point
    layer, half, side = found[1], found[2] or "", found[3] or "out"
    own = LENS[half if half in ("", "mlp") else "attn"].get(side)
    kind = str(card.get("data", {}).get("model", {}).get("class", ""))
    if own is None or (half and side == "out" and kind.startswith(POST_NORMS)):
        return point
    return f"blocks.{layer}.{own}"
