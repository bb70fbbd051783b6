"""What self-contained pages are made with: data that no parser takes for markup, and hashes for their policy."""

import base64
import hashlib
import json
import math
import re
from typing import Any

# control characters, bidirectional overrides and lone surrogates: shown as escapes, never sent as they are
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with what can't be seen as escapes."""
    return UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def finite(data: Any) -> Any:
    """The same data with NaN and infinities as null: JSON has neither."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def script_json(data: Any) -> str:
    """JSON for a script element: no "<", so no tag and no comment can begin in it."""
    return json.dumps(finite(data), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def sha256(text: str) -> str:
    """A hash as content security policies write it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
