"""Image files as inputs of a model: a folder is read in the order of its names, through the model's own image processor."""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from saekit.tokens import is_held_out
from saekit.types import SaekitError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# PIL images to what the model takes: pixels [images, channels, height, width], or keyword arguments
Processor = Callable[[list[Any]], "Tensor | Mapping[str, Tensor]"]


def image_files(path: "str | os.PathLike", split: str = "all") -> list[Path]:
    """Image files of a folder, its folders' too (or the file itself), on one side of the split by their names."""
    path = Path(path)
    if path.is_file():
        return [path] if path.suffix.lower() in SUFFIXES else []
    own = ((p, p.relative_to(path)) for p in sorted(path.rglob("*")) if p.suffix.lower() in SUFFIXES)
    return [
        p
        for p, name in own
        if not any(part.startswith(".") for part in name.parts)
        and (split == "all" or is_held_out(name.as_posix()) == (split == "held_out"))
    ]


def read_image(path: Path) -> Any:
    """A file as an RGB image of PIL, upright."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        why = " ".join(str(error).split())
        raise SaekitError(f"image {str(path)!r} can't be read ({why}); mend it or take it away") from None


class ImageFolder:
    """The images of a folder as inputs of a model, ``batch`` of them at a time; iterating begins anew."""

    def __init__(self, path: "str | os.PathLike", processor: Processor, batch: int, split: str = "all"):
        self.files, self.processor, self.batch = image_files(path, split), processor, batch
        if not self.files:
            raise SaekitError(
                f"folder {os.fspath(path)!r} holds no image on the {split} side of the split; give more images, or split = 'all'"
            )

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.files) // self.batch)

    def __iter__(self) -> Iterator["Tensor | Mapping[str, Tensor]"]:
        """What the model takes of each batch of images."""
        for start in range(0, len(self.files), self.batch):
            yield self.processor([read_image(file) for file in self.files[start : start + self.batch]])
