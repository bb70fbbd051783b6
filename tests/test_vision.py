"""Dictionaries of vision models: folders of images, where in an image a feature is, and the figures of it."""

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import Browser, Page
from PIL import Image
from torch import Tensor, nn

import saekit
from saekit.analyses.vision import Grid, grid_of, strongest_images
from saekit.images import image_files
from saekit.models import Model
from saekit.report.concepts import SIDE
from saekit.types import ActivationBatch, SaekitError

POINT = "blocks.0.hook_resid_post"


class Detector(nn.Module):
    """A convolution whose channel c is the mean of colour c over each 4 x 4 cell."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 3, 4, 4, bias=False)
        with torch.no_grad():
            self.cells.weight.copy_(torch.eye(3)[:, :, None, None].expand(3, 3, 4, 4) / 16)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.cells(pixels).mean((2, 3))


def detecting() -> saekit.Dictionary:
    """A dictionary whose features are the three channels, above a half."""
    d = saekit.create("relu", d_in=3, n_features=3, normalise="none", atoms="free")
    with torch.no_grad():
        d.encoder.copy_(torch.eye(3))
        d.atoms.weight.copy_(torch.eye(3))
        d.b_enc.fill_(-0.5)
    d.reads = d.writes = ("cells",)
    return d


def spotted(n: int, height: int = 16, width: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images with one bright cell of one colour each, [n, 3, height, width], and its (colour, row, column)."""
    g = torch.Generator().manual_seed(seed)
    place = torch.stack([torch.randint(m, (n,), generator=g) for m in (3, height // 4, width // 4)], 1)
    bright = 0.6 + 0.4 * torch.rand(n, generator=g)
    x = 0.2 * torch.rand(n, 3, height, width, generator=g)
    for i, (c, row, column) in enumerate(place.tolist()):
        x[i, c, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = bright[i]
    return x, place


def test_a_feature_is_found_in_the_images_and_at_the_places_where_it_is() -> None:
    x, place = spotted(50)
    d, view = detecting(), saekit.load_model(Detector())
    seen = strongest_images(d, saekit.harvest(view, x, ["cells"], outlier=1e9), [2, 0], 5, aspect=16 / 24)
    assert seen.grid == Grid(4, 6) and seen.n_images == 50
    for i, colour in enumerate((2, 0)):
        own = (place[:, 0] == colour).nonzero()[:, 0]
        bright = torch.stack([x[n, colour].max() for n in own])
        assert seen.images[i].tolist() == own[bright.argsort(descending=True)][:5].tolist()
        for image, value, heat in zip(seen.images[i], seen.values[i], seen.maps[i], strict=True):
            assert value == heat.max() and heat.count_nonzero() == 1
            assert divmod(int(heat.argmax()), 6) == tuple(place[image, 1:].tolist())
        assert seen.share[i] == pytest.approx(len(own) / 50)
        assert seen.rate[i] == pytest.approx(len(own) / 50 / 24)
        assert seen.energy[i] == pytest.approx(float((bright - 0.5).sum() / 50), rel=1e-4)


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_it_is_what_all_images_at_once_give(batch: int) -> None:
    g = torch.Generator().manual_seed(1)
    codes, mask = torch.randn(50, 13, 3, generator=g), torch.rand(50, 13, generator=g) < 0.8
    codes[20:] = codes[:30].clone()  # equal values: the first images count
    parts = zip(codes.split(batch), mask.split(batch), strict=True)
    seen = strongest_images(
        detecting(), [ActivationBatch({"cells": c}, m) for c, m in parts], [0, 1, 2], 60, (3, 4)
    )
    dense = torch.where(mask[..., None], (codes - 0.5).relu(), 0.0)[:, 1:]
    best = dense.amax(1).T
    order = best.sort(dim=1, descending=True, stable=True).indices
    fires = best.gather(1, order) > 0
    assert seen.grid == Grid(3, 4, 1) and seen.images.shape == (3, 50)
    assert torch.equal(seen.images, torch.where(fires, order, -1))
    assert torch.equal(seen.values, best.gather(1, order))
    for f in range(3):
        assert torch.equal(seen.maps[f][fires[f]], dense[order[f], :, f].view(50, 3, 4)[fires[f]])


@pytest.mark.parametrize(
    ("positions", "aspect", "found"),
    [
        (196, 1.0, Grid(14, 14)),  # a convolution's
        (197, 1.0, Grid(14, 14, 1)),  # ViT-B/16
        (50, 1.0, Grid(7, 7, 1)),
        (198, 1.0, Grid(14, 14, 2)),  # DeiT, distilled
        (261, 1.0, Grid(16, 16, 5)),  # DINOv2 with registers
        (24, 16 / 24, Grid(4, 6)),
        (25, 24 / 16, Grid(6, 4, 1)),
        (2, 1.0, Grid(1, 1, 1)),
    ],
)
def test_positions_lie_in_a_grid(positions: int, aspect: float, found: Grid) -> None:
    assert grid_of(positions, aspect) == found


def test_bad_input_is_refused() -> None:
    d, x = detecting(), torch.rand(4, 13, 3)
    mask = torch.ones(4, 13, dtype=torch.bool)

    def found(features: list[int], rows: Tensor = x, **options: object) -> None:
        strongest_images(
            d, [ActivationBatch({"cells": r[None]}, torch.ones(1, len(r)).bool()) for r in rows] if rows.ndim == 3
            else [], features, **options,
        )  # fmt: skip

    with pytest.raises(SaekitError, match=r"features \[3\] are not in a dictionary of 3"):
        found([3])
    with pytest.raises(SaekitError, match="top = 0"):
        found([0], top=0)
    with pytest.raises(SaekitError, match=r"positions = 13 are no grid.*give grid="):
        found([0], aspect=100.0)
    with pytest.raises(SaekitError, match=r"grid = \(4, 4\) has 16 places and an image gives 13"):
        found([0], grid=(4, 4))
    with pytest.raises(SaekitError, match="there is no image"):
        found([0], torch.zeros(0))
    with pytest.raises(SaekitError, match="images of one size"):
        strongest_images(d, [ActivationBatch({"cells": x[:, :n]}, mask[:, :n]) for n in (9, 4)], [0])
    with pytest.raises(SaekitError, match="hold NaN"):
        found([0], x.clone().index_fill_(0, torch.tensor([2]), torch.nan), grid=(3, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 small images in two folders, and what isn't one."""
    path = tmp_path_factory.mktemp("images")
    x, _ = spotted(120, 16, 16)
    for i, image in enumerate(x):
        name = path / ("a" if i % 2 else "b") / f"{i:03d}.{'png' if i % 3 else 'JPG'}"
        name.parent.mkdir(exist_ok=True)
        Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(name, "PNG")
    (path / "notes.txt").write_text("no image")
    (path / ".hidden").mkdir()
    (path / ".hidden" / "x.png").write_bytes(b"")
    return path


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small vision transformer with its image processor, as it comes from a hub: random weights."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    path = str(tmp_path_factory.mktemp("vit"))
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    ViTForImageClassification(config).save_pretrained(path)
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return path


def test_a_folder_of_images_is_read_by_name_and_split(folder: Path) -> None:
    names = [p.relative_to(folder).as_posix() for p in image_files(folder)]
    assert len(names) == 120 and names == sorted(names) and all(n[0] in "ab" for n in names)
    sides = [set(image_files(folder, split)) for split in ("train", "held_out")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 120 and len(sides[1]) > 5


def test_a_folder_gives_what_its_images_as_tensors_give(folder: Path, vit: str) -> None:
    view = saekit.load_model(vit)
    assert view.processor is not None
    files = image_files(folder, "train")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB"))) for f in files])
    pixels = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    ours = list(saekit.harvest(view, str(folder), [POINT], batch_rows=16))
    theirs = list(saekit.harvest(view, pixels, [POINT], batch_rows=16))
    assert sum(len(b.mask) for b in ours) == len(files) and ours[0].mask.shape == (16, 17)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.activations[POINT], b.activations[POINT], atol=1e-5)


def test_any_module_reads_a_folder_with_a_processor(folder: Path) -> None:
    def processor(images: list[Image.Image]) -> Tensor:
        return torch.stack([torch.from_numpy(np.array(i)).permute(2, 0, 1) / 255 for i in images])

    view = saekit.load_model(Detector(), processor=processor)
    d = detecting()
    found = saekit.concepts(d, [0, 1], model=view, images=str(folder), top=3)
    _, place = spotted(120, 16, 16)
    files = image_files(folder, "train")
    for i in range(2):
        for image, heat in zip(found.seen.images[i].tolist(), found.seen.maps[i], strict=True):
            colour, *cell = place[int(files[image].stem)].tolist()
            assert colour == i and divmod(int(heat.argmax()), 4) == tuple(cell)
    with pytest.raises(SaekitError, match="no image processor; give processor="):
        saekit.harvest(Detector(), str(folder), ["cells"])


def test_a_broken_image_is_named(tmp_path: Path, vit: str) -> None:
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(SaekitError, match=r"image '.*x.png' can't be read .*mend it or take it away"):
        list(saekit.harvest(vit, str(tmp_path), [POINT], split="all"))
    with pytest.raises(SaekitError, match=r"no image on the (train|held_out) side of the split"):
        for split in ("train", "held_out"):
            saekit.harvest(vit, str(tmp_path), [POINT], split=split)


@pytest.fixture(scope="module")
def run(folder: Path, vit: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dictionary of the transformer, trained on the folder through a store."""
    path = tmp_path_factory.mktemp("trained")
    store = saekit.harvest(vit, str(folder), [POINT], out=path / "acts")
    d = saekit.create("topk", d_in=32, n_features=64, k=4, seed=0)
    d.reads = d.writes = (POINT,)
    saekit.train(d, store, 60, 128, out=path / "run")
    return path / "run"


def test_the_dashboard_of_a_vision_model_shows_images(run: Path, browser: Browser) -> None:
    page = saekit.dashboard(run, features=[3, 5])
    text = page.read_text()
    Page(text)
    browser.open(page.as_uri())
    shown = browser.run
    assert shown("document.querySelectorAll('#features article').length") == 2
    assert shown("[...document.images].every(i => i.complete && i.naturalHeight > 0)")
    found = saekit.concepts(run, [3, 5])
    n = int((found.seen.images >= 0).sum())
    assert n > 0 and shown("document.images.length") == 2 * n  # as they are, and with the map
    assert not shown(
        "performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length"
    )


def test_figures_are_text_html_and_a_page(run: Path, folder: Path, tmp_path: Path) -> None:
    found = saekit.concepts(run, [7], top=2)
    assert found.seen.grid == Grid(4, 4, 1) and "7: on " in repr(found)
    sources = re.findall(r'src="data:image/png;base64,([^"]+)"', found._repr_html_())
    plain = [np.array(Image.open(io.BytesIO(base64.b64decode(s)))) for s in sources[::2]]
    files = image_files(folder, "train")
    for image, pixels in zip(found.seen.images[0].tolist(), plain, strict=True):
        own = np.array(Image.open(files[image]).convert("RGB")).astype(float)
        own = (own - own.min()) / (own.max() - own.min()) * 255
        assert pixels.shape == (SIDE, SIDE, 3) and np.abs(pixels[3::6, 3::6] - own).max() <= 1
    Page(found.save(tmp_path / "figures.html").read_text())
    with pytest.raises(SaekitError, match=r"end it in .html"):
        found.save(tmp_path / "figures.png")
    shown = [np.full((2, 3), 0.5)] * found.seen.n_images
    assert found.pictures.keys() == saekit.concepts(run, [7], top=2, shown=shown).pictures.keys()
    with pytest.raises(SaekitError, match="shown holds 1 images and"):
        saekit.concepts(run, [7], shown=shown[:1])


def test_a_text_model_has_no_concept_figures(tiny_gpt2: Model) -> None:
    d = saekit.create("topk", d_in=32, n_features=64, k=4, seed=0)
    d.reads = d.writes = ("blocks.0.hook_resid_post",)
    with pytest.raises(SaekitError, match=r"no tensor \[batch, channels, height, width\]"):
        saekit.concepts(d, [0], model=tiny_gpt2, images="stdlib")


def test_the_store_says_which_images_it_is_of(folder: Path, run: Path) -> None:
    manifest = json.loads((run.parent / "acts" / "manifest.json").read_text())
    assert manifest["text"]["name"] == str(folder) and manifest["text"]["split"] == "train"
