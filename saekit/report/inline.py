"""HTML without script for notebooks: shaded tokens, small histograms, images as data. All text is escaped."""

import base64
import html
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from saekit.pages import printable
from saekit.types import SaekitError

SIGNS = {"\n": "↵", "\t": "⇥", "\r": "\\r"}
SOFT = "opacity:.7"
MONO = "font-family:ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap"


def escaped(text: str) -> str:
    """Text for HTML: markup escaped, what can't be seen spelled out; line breaks, tabs and mere spaces as signs."""
    if not text.strip(" "):
        return "·" * len(text) or "∅"
    signed = "".join(SIGNS.get(sign, sign) for sign in text)
    return html.escape(printable(signed))


def tag(name: str, content: "str | Iterable[str]", style: str = "", title: str = "") -> str:
    """An element; ``content`` is HTML already, ``title`` is text."""
    more = (f' style="{html.escape(style)}"' if style else "") + (
        f' title="{escaped(title)}"' if title else ""
    )
    return f"<{name}{more}>{content if isinstance(content, str) else ''.join(content)}</{name}>"


def shade(value: "float | None", largest: float) -> str:
    """Style of a background as strong as the value: orange, blue where it is negative; legible on light and dark."""
    if not value or not largest:
        return ""
    colour = "245,133,20" if value > 0 else "66,140,240"
    return f"background:rgba({colour},{0.08 + 0.62 * min(1, abs(value) / largest):.2f})"


def token(text: str, value: "float | None", largest: float, outlined: bool = False) -> str:
    """A token shaded by its activation; None is a masked one, struck out."""
    style = shade(value, largest)
    if outlined:
        style += ";outline:1.5px solid;border-radius:2px"
    if value is None:
        style += ";text-decoration:line-through;opacity:.6"
    says = "masked" if value is None else f"{value:.4g}"
    return tag("span", escaped(text), style.lstrip(";"), f"{text!r}: {says}")


def histogram(counts: Sequence[int], low: float, high: float) -> str:
    """Bars of log counts between two values."""
    if not counts:
        return ""
    top = np.log1p(max(counts))
    bars = (
        f'<rect x="{at}.05" y="{40 - h:.1f}" width="0.9" height="{h:.1f}" fill="rgb(214,116,24)"/>'
        for at, h in enumerate(40 * np.log1p(counts) / top)
    )
    svg = f'<svg viewBox="0 0 {len(counts)} 40" preserveAspectRatio="none" width="200" height="60" role="img" aria-label="Histogram of nonzero activations, log counts">{"".join(bars)}</svg>'
    ends = tag("div", f"<span>{low:.3g}</span><span>{high:.3g}</span>", f"display:flex;justify-content:space-between;width:200px;{SOFT}")  # fmt: skip
    return tag("div", svg + ends, "line-height:1.2")


def png(pixels: UInt8[ndarray, "height width channels"]) -> bytes:
    """An image file of grey (one channel) or RGB (three) pixels."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = np.concatenate([np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)], 1)  # 0: no filter
    head = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def pixels_of(image: Any, name: str) -> UInt8[ndarray, "height width channels"]:
    """An image as bytes: [height, width], or with 1 or 3 channels last; integers 0 to 255 or numbers 0 to 1."""
    array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[-1] not in (1, 3) or 0 in array.shape:
        raise SaekitError(
            f"{name} has shape {np.shape(image)}; give text, or an image [height, width] or [height, width, 3]"
        )
    whole = np.issubdtype(array.dtype, np.integer) or array.dtype == bool
    top = 1 if array.dtype == bool else 255 if whole else 1
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= top):
        raise SaekitError(
            f"{name} holds pixels from {low:.4g} to {high:.4g}; give integers 0 to 255, or numbers 0 to 1"
        )
    return np.round(array * (255 / top)).astype(np.uint8)


def picture(pixels: UInt8[ndarray, "height width channels"], size: int = 64) -> str:
    """The image in the page itself, ``size`` pixels high."""
    data = base64.b64encode(png(pixels)).decode()
    return (
        f'<img alt="" src="data:image/png;base64,{data}" style="height:{size}px;image-rendering:pixelated"/>'
    )
