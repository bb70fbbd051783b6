"""Features of a vision dictionary as pictures: the images each is strongest on, and where in them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from saekit.analyses.vision import Seen, strongest_images
from saekit.dictionaries import Dictionary
from saekit.harvest import Stream, harvest
from saekit.hub import dictionary_of
from saekit.report import inline
from saekit.report.cards import Reading, density_over, explained, reading, spread
from saekit.report.charts import number, percent
from saekit.report.inline import SOFT, escaped, tag
from saekit.report.page import Explained
from saekit.trainers import read_config
from saekit.types import SaekitError

Pixels = UInt8[ndarray, "height width channels"]
SIDE = 96  # pixels of the longer side, as shown
FEATURES, TOP = 12, 6
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
HEAD = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
GLOW = np.array([245, 133, 20])


@dataclass(frozen=True, repr=False)
class Concepts:
    """Concept figures: printed they are text, in a notebook images above the maps of where the feature is active.

    ``pictures`` holds the images that are shown, by number; each as the model is given it, its contrast stretched.
    """

    title: str
    seen: Seen
    pictures: Mapping[int, Pixels]
    explanations: Mapping[int, Sequence[Explained]]

    def __repr__(self) -> str:
        lines = [f"{self.title}: {len(self.seen.features)} features on {self.seen.n_images:,} images"]
        for i, feature in enumerate(self.seen.features):
            shown = ", ".join(f"{image} ({value:.3g})" for image, value, _ in self._of(i))
            lines.append(f"{feature}: {self._facts(i)}; strongest on images {shown or 'none'}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return tag("div", [tag("div", escaped(self.title), SOFT), *self.figures()])

    def figures(self) -> list[str]:
        """The figure of each feature, as HTML."""
        return [self._figure(i) for i in range(len(self.seen.features))]

    def _of(self, i: int) -> Iterator[tuple[int, float, ndarray]]:
        """Number, activation and map of the images that a feature is strongest on."""
        found = zip(
            self.seen.images[i].tolist(), self.seen.values[i].tolist(), self.seen.maps[i], strict=True
        )
        return ((image, value, heat.numpy()) for image, value, heat in found if image >= 0)

    def _facts(self, i: int) -> str:
        share, rate = self.seen.share[i].item(), self.seen.rate[i].item()
        return f"on {percent(share)} of images, at {percent(rate)} of places"

    def _figure(self, i: int) -> str:
        feature = self.seen.features[i]
        head = tag("b", f"Feature {feature}") + " " + tag("span", self._facts(i), SOFT)
        said = [
            tag("div", f"{escaped(one.method)}: {escaped(one.text)}")
            for one in self.explanations.get(feature, ())
        ]
        most = max((abs(value) for _, value, _ in self._of(i)), default=0.0)
        columns = [self._column(image, value, heat / most) for image, value, heat in self._of(i)]
        row = tag("div", columns or "fires on none", "display:flex;flex-wrap:wrap;gap:.4em;margin:.3em 0 1em")
        return tag("div", [head, *said, row], "text-align:left;line-height:1.4")

    def _column(self, image: int, value: float, heat: ndarray) -> str:
        """An image above its map."""
        own = self.pictures[image]
        both = [tag("div", inline.picture(one, len(own))) for one in (own, glowing(own, heat))]
        amount = tag("div", number(value), f"{SOFT};text-align:center")
        return tag("div", [*both, amount], title=f"image {image}: {value:.4g}")

    def save(self, path: "str | Path") -> Path:
        """Write them as one self-contained page."""
        from saekit.activations import write_atomic

        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            raise SaekitError(f"path {str(path)!r} is no name of an HTML file; end it in .html")
        body = tag("h1", escaped(self.title)) + "".join(self.figures())
        body = tag("body", body, "font-family:system-ui,sans-serif;max-width:60em;margin:1em auto")
        page = f'<!DOCTYPE html><html lang="en"><head>{HEAD}{tag("title", escaped(self.title))}</head>{body}</html>'
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page.encode())
        return path


def concepts(
    dictionary: "Dictionary | str | Path",
    features: Sequence[int] | None = None,
    *,
    model: Any = None,
    images: Any = None,
    shown: Sequence[Any] | None = None,
    top: int = TOP,
    grid: "tuple[int, int] | None" = None,
    positions: int = 1_000_000,
    explanations: Any = None,
    device: "str | torch.device | None" = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Concepts:
    """Concept figures of a dictionary of a vision model: any Hugging Face one, or any ``nn.Module`` of Python.

    ``features`` are by default ``FEATURES`` of those that fire, from dense to rare. ``images`` are a folder, or what the
    model takes (pixels, or mappings of keyword arguments, as :func:`saekit.harvest` reads them), by default those that a
    folder's dictionary was trained on; ``positions`` of them are read. ``shown`` are images to show, one for each input
    (see :func:`saekit.fires`), by default the inputs themselves. ``grid`` is height and width of an image in positions,
    where it isn't that of the inputs.
    """
    d, folder = (
        dictionary_of(dictionary, device),
        None if isinstance(dictionary, Dictionary) else Path(dictionary),
    )
    file = folder / "config.json" if folder is not None else None
    config = read_config(file) if file is not None and file.is_file() else {}
    source = reading(d, model, images, positions, config, device)
    said = explained(explanations, folder, d)
    return of_reading(source, features, FEATURES, said, shown, top, grid, on_batch)


def of_reading(
    source: Reading,
    features: Sequence[int] | None,
    n_features: int,
    said: Mapping[int, Sequence[Explained]],
    shown: Sequence[Any] | None = None,
    top: int = TOP,
    grid: "tuple[int, int] | None" = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> Concepts:
    """Figures of ``features``, or of ``n_features`` of those that fire, explained ones first."""
    d, view = source.dictionary, source.view
    if source.text is None:
        raise SaekitError("this dictionary was trained on inputs given in Python; give images=")
    if features is None:
        features = spread(density_over(d, source), n_features, said)
    stream = harvest(view, source.text, d.reads, tokens=source.tokens, split=source.split, batch_rows=16)
    first = next(iter(_pixels(stream)), None)
    if first is None:
        raise SaekitError(
            f"images give no tensor [batch, channels, height, width] to model {view.name!r}, of which to show places; see saekit.fires"
        )
    seen = strongest_images(d, _told(source, on_batch), features, top, grid, first.shape[1] / first.shape[2])
    title = f"{d.config.selection[0]} dictionary of {', '.join(d.reads)} in {view.name}"
    wanted = set(seen.images[seen.images >= 0].tolist())
    if shown is not None:
        if len(shown) < seen.n_images:
            raise SaekitError(
                f"shown holds {len(shown)} images and {seen.n_images} were read; give one for each"
            )
        pictures = {i: fitted(inline.pixels_of(shown[i], f"shown[{i}]")) for i in wanted}
    else:
        pictures = {
            i: fitted(stretched(one))
            for i, one in enumerate(_pixels(stream, max(wanted, default=0)))
            if i in wanted
        }
    return Concepts(title, seen, pictures, said)


def _told(source: Reading, on_batch: Callable[[int, int], None] | None) -> Iterator[Any]:
    done = 0
    for batch in source:
        yield batch
        done += batch.mask.numel()
        if on_batch is not None:
            on_batch(done, source.tokens)


def _pixels(stream: Stream, last: int | None = None) -> Iterator[Float[Tensor, "channels height width"]]:
    """The images of a stream's inputs up to number ``last``, as the model is given them."""
    n = 0
    for given, _ in stream.inputs():
        parts: Iterable[Any] = given.values() if isinstance(given, Mapping) else (given,)
        own = next(
            (t for t in parts if isinstance(t, Tensor) and t.ndim == 4 and t.is_floating_point()), None
        )
        for image in () if own is None else own:
            if last is not None and n > last:
                return
            yield image
            n += 1


def stretched(image: Float[Tensor, "channels height width"]) -> Pixels:
    """What a model is given of an image as pixels, its least value black and its largest white; 1 or 3 channels."""
    x = image.detach().float().cpu()
    x = x if len(x) in (1, 3) else x.mean(0, keepdim=True)
    low, high = x.min(), x.max()
    return ((x - low) / (high - low).clamp_min(1e-12) * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()


def fitted(pixels: Pixels) -> UInt8[ndarray, "shown_height shown_width channels"]:
    """The image with ``SIDE`` pixels on its longer side."""
    height, width, _ = pixels.shape
    share = SIDE / max(height, width)
    size = (max(1, round(height * share)), max(1, round(width * share)))
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    mode: Any = {"mode": "area"} if share < 1 else {"mode": "nearest"}
    out = torch.nn.functional.interpolate(x, size, **mode)
    return out[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def glowing(pixels: Pixels, heat: Float[ndarray, "rows columns"]) -> UInt8[ndarray, "height width 3"]:
    """The image in grey, glowing where ``heat``, of magnitude 0 to 1, is large."""
    grey = pixels.mean(-1, keepdims=True).repeat(3, -1)
    size = tuple(pixels.shape[:2])
    wide = torch.nn.functional.interpolate(
        torch.from_numpy(np.abs(heat))[None, None].float(), size, mode="bilinear", align_corners=False
    )
    amount = 0.85 * wide[0, 0].clamp(0, 1).numpy()[..., None]
    return np.round(grey * (1 - amount) * 0.8 + GLOW * amount).astype(np.uint8)
