"""What notebooks show: a feature's card, and what is active on a prompt, on rows and on images; text stays text."""

# ruff: noqa: F811 (fixtures of another file)
import base64
import dataclasses
import json
import struct
import zlib

import numpy as np
import pytest
import torch
from browser import HOSTILE, Page
from test_dashboard import POINT, chromium, many, page, run  # noqa: F401
from torch import nn

import saekit
from saekit.autointerp import explanation
from saekit.report import inline
from saekit.report.page import Explained
from saekit.report.show import Fires, Shown
from saekit.types import SaekitError


def test_fires_equals_brute_force_on_a_prompt(run, tiny_gpt2):
    d, prompt = saekit.load(run), "import os\n</script>é"
    ids = tiny_gpt2.tokenizer(prompt)["input_ids"]
    table = saekit.fires(tiny_gpt2, run, prompt, top=3)
    (batch,) = saekit.harvest(tiny_gpt2, torch.tensor([ids]), [POINT])
    dense = d.encode(batch.activations[POINT]).to_dense()[0].detach()
    said = {one.feature: one.text for one in explanation.load(run)[0]}
    rows = table.rows()
    assert "".join(row["name"] for row in rows).startswith("import os\n</script>")
    for row, value in zip(rows, dense, strict=True):
        size, order = value.abs().topk(3)
        shown = [(f["feature"], f["value"]) for f in row["features"]]
        assert [f for f, _ in shown] == order[size > 0].tolist()
        assert [v for _, v in shown] == pytest.approx(value[order[size > 0]].tolist())
        assert all(f["explanation"] == said.get(f["feature"]) for f in row["features"])
    same = saekit.fires(tiny_gpt2, d, ids, top=3, explanations=run)
    assert same.rows() == rows and repr(same) == repr(table)
    assert len(repr(table).splitlines()) == len(ids) + 1
    json.dumps(rows)
    special = [tiny_gpt2.tokenizer.eos_token_id, *ids]
    first = saekit.fires(tiny_gpt2, d, special).rows()[0]
    assert first["masked"] and first["features"] == []  # as in the dashboard


def test_fires_of_other_models_has_rows_with_names_or_images(mlp):
    d = saekit.create("topk", d_in=16, n_features=32, k=3, seed=0)
    d.reads = d.writes = ("1",)
    x = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    d.set_normalisation(mlp[:2](x).detach())
    dense = d.encode(mlp[:2](x)).to_dense().detach()
    named = saekit.fires(mlp, d, x, labels=[f"<b>{i}" for i in range(6)])
    for row, value in zip(named.rows(), dense, strict=True):
        assert row["name"] == f"<b>{row['row']}" and not row["masked"]
        assert [f["feature"] for f in row["features"]] == value.abs().topk(int((value != 0).sum())).indices.tolist()  # fmt: skip
    assert "&lt;b&gt;3" in named._repr_html_() and "<b>3" not in named._repr_html_()
    images = saekit.fires(mlp, d, x, labels=x.view(6, 2, 4))
    assert images._repr_html_().count("data:image/png;base64,") == 6
    assert "image 2x4" in repr(images) and images.rows()[0]["name"] is None
    assert saekit.fires(mlp, d, x).rows()[2]["name"] == "input 2"


def test_a_feature_of_a_model_with_positions_counts_where_it_is_strongest():
    body = nn.Sequential(nn.Identity(), nn.Linear(5, 5))
    d = saekit.create("topk", d_in=5, n_features=12, k=2, seed=0)
    d.reads = d.writes = ("0",)
    x = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    d.set_normalisation(x.flatten(0, 1))
    dense = d.encode(x).to_dense().detach()
    for row, value in zip(saekit.fires(body, d, x, top=12).rows(), dense, strict=True):
        best, at = value.abs().max(0)
        assert {f["feature"]: f["position"] for f in row["features"]} == {
            f: int(at[f]) for f in range(12) if best[f] > 0
        }


IMAGES = [
    np.arange(60, dtype=np.uint8).reshape(4, 5, 3),
    np.linspace(0, 1, 12).reshape(3, 4),
    torch.tensor([[True, False]]),
    np.zeros((1, 1, 1), dtype=np.int64),
]


@pytest.mark.parametrize("image", IMAGES)
def test_pngs_hold_the_pixels(image):
    pixels = inline.pixels_of(image, "image")
    data = inline.png(pixels)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        parts[kind] = data[at + 8 : at + 8 + size]
        (check,) = struct.unpack(">I", data[at + 8 + size : at + 12 + size])
        assert check == zlib.crc32(kind + parts[kind])
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, -1)
    assert (
        depth == 8 and colour == {1: 0, 3: 2}[pixels.shape[2]] and list(parts) == [b"IHDR", b"IDAT", b"IEND"]
    )
    assert not lines[:, 0].any() and np.array_equal(lines[:, 1:].reshape(pixels.shape), pixels)
    assert (height, width) == pixels.shape[:2] == tuple(np.shape(image)[:2])


@pytest.mark.parametrize(
    ("prompt", "options", "says"),
    [
        ("", {}, "prompt has shape"),
        ([0.5], {}, "prompt has shape .* of type torch.float32"),
        (object(), {}, "prompt .* is none; give text"),
        ("a " * 200, {}, "prompt has .* tokens and model .* reads 64"),
        (torch.ones(0, 3), {}, "prompt holds no input"),
        (torch.tensor(3), {}, "prompt holds no input"),
        ("a", {"top": 0}, "top = 0"),
        ("a", {"labels": ["a"]}, "labels name the rows"),
        (torch.ones(2, 3), {"labels": ["a"]}, "labels are 1 and the inputs 2"),
        (torch.ones(1, 3), {"labels": [np.ones((2, 2, 2))]}, r"labels\[0\] has shape \(2, 2, 2\)"),
        (torch.ones(1, 3), {"labels": [np.full((2, 2), 2.0)]}, r"labels\[0\] holds pixels from 2 to 2"),
    ],
)  # fmt: skip
def test_what_fires_cannot_take_is_named(run, tiny_gpt2, prompt, options, says):
    with pytest.raises(SaekitError, match=says):
        saekit.fires(tiny_gpt2, run, prompt, **options)


def test_a_prompt_needs_a_tokenizer_and_the_dictionary_a_place(mlp, small_dictionary):
    with pytest.raises(SaekitError, match="names no hook point"):
        saekit.fires(mlp, small_dictionary, torch.ones(1, 8))
    small_dictionary.reads = ("1",)
    with pytest.raises(SaekitError, match="prompt is text, and model 'Sequential' has no tokenizer"):
        saekit.fires(mlp, small_dictionary, "a")


def test_a_shown_feature_is_the_dashboards(run, good, page):
    one = next(one for one in page["features"] if one["index"] % 3 == 1)
    shown = saekit.show(run, one["index"], model=str(good / "model"), tokens=4096)
    assert shown.card.density == pytest.approx(one["density"])
    assert [w.source for w in shown.card.top] == [w["source"] for w in one["top"]]
    assert [f for f, _ in shown.card.nearest] == [f for f, _ in one["nearest"]]
    text = repr(shown)
    assert text.startswith(f"feature {one['index']} of topk dictionary of {POINT}")
    assert f": {one['said'][0]}" in text and "detection: balanced accuracy" in text
    html = shown._repr_html_()
    assert {"script", "iframe", "style", "link"}.isdisjoint(Page(html).tags)
    with pytest.raises(SaekitError, match="feature 64 is not in a dictionary of 64 features"):
        saekit.show(run, 64)


@pytest.mark.browser
def test_in_a_browser_what_a_notebook_shows_is_text(chromium, tmp_path):
    card = dataclasses.replace(many(4).features[1], explanations=(Explained("".join(HOSTILE[:5]), "llm"),))
    shown = Shown(card, HOSTILE[0])
    pixels = inline.pixels_of(IMAGES[0], "image")
    names = (*HOSTILE, pixels)
    table = Fires(HOSTILE[3], names, (((3, 1.5, 0), (4, -2.0, 0)),) * len(names), (False,) * len(names), {3: HOSTILE[0]})  # fmt: skip
    assert len(repr(table).splitlines()) == len(names) + 1 and repr(shown)
    file = tmp_path / "notebook.html"
    body = shown._repr_html_() + table._repr_html_()
    file.write_text(f"<!DOCTYPE html><meta charset='utf-8'><title>notebook</title><body>{body}</body>")
    chromium.open(file.as_uri())
    assert chromium.run("document.title") == "notebook"
    assert chromium.run("document.querySelectorAll('script, iframe, style').length") == 0
    assert chromium.run("[document.images.length, document.images[0].naturalWidth, document.images[0].naturalHeight]") == [1, 5, 4]  # fmt: skip
    cells = chromium.run("[...document.querySelectorAll('th')].map((one) => one.textContent)")
    assert cells[0] == HOSTILE[0] and cells[3:5] == HOSTILE[3:5] and cells[5] == HOSTILE[5]
    assert HOSTILE[0] in chromium.run("document.body.textContent")
    assert not chromium.complaints()
    assert base64.b64encode(inline.png(pixels)).decode() in body
