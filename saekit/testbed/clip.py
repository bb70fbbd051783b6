"""A small CLIP: scenes with one handwritten digit among clutter, bags of words about them, and two encoders to one space.

The image encoder is transformers' own CLIP tower, with 16 patches and 3 layers, so that what reads it reads users' towers.

What is known of large CLIPs (2406.04341) is put into it, since digits alone need none of it: neurons matter where attention
picks them up. A patch shows a digit whole, in one of 8 looks that no linear map sees through, so neurons have to recognise it
where it lies; neurons begin rare (``BIAS``, ``GAIN``); and ``DIRECT`` in the loss keeps the MLPs' outputs at the class token about
the same for all images. :func:`without` is the effect of neurons through later attention, by its definition.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saekit.hooks import Site, capture, intervene
from saekit.testbed.digits import digits

CELL, GRID, WIDTH, LAYERS, HEADS, NEURONS, JOINT = 8, 4, 64, 3, 2, 384, 32
CLUTTER = 3  # cells whose ink is a digit's in a random order
STEPS, ROWS, RATE, DECAY = 600, 128, 2e-3, 0.1
DIRECT = 10.0  # weight of the variance of what the MLPs write to the class token
BIAS, GAIN = -2.5, 2.0  # neurons' biases at the start, and by how much their weights are larger than usual
SAID = 0.5  # chance of a word that is true of an image to be in its caption
NOISE = 0.1  # of pixels
FIRING = 8  # images that a planted neuron is fitted to
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OF_DIGITS = {"loop": (0, 6, 8, 9), "open": (1, 2, 3, 5, 7), "round": (0, 3, 6, 8), "straight": (1, 4, 7), "corner": (2, 4, 5, 7)}  # fmt: skip
TEXTURES = ("plain", "striped", "barred", "chequered")  # ink turns its sign with the row, the column, both
OF_SCENES = (("light", "dark"), ("thin", "thick"), ("left", "right"), ("above", "below"))
WORDS = (*NAMES, *OF_DIGITS, *TEXTURES, *(word for pair in OF_SCENES for word in pair))


class Scenes(NamedTuple):
    """Images in about -1..1, the digit in each, and which of ``WORDS`` are true of it."""

    images: Float[Tensor, "scene 1 32 32"]
    labels: Int[Tensor, " scene"]
    words: Bool[Tensor, "scene word"]


class World:
    """Scenes of the digits of a split: those to learn from hold its training digits, and those ``held_out`` the others."""

    def __init__(self, seed: int):
        data = digits(seed)
        self.learnt = data.train, data.train_labels
        self.others = data.test, data.test_labels
        self.ink = data.train.sum(1).median()  # more is thick

    def draw(self, n: int, g: torch.Generator, held_out: bool = False) -> Scenes:
        """Scenes of a digit in one of 16 cells, in one of the textures, light or dark, with ``CLUTTER`` in other cells."""
        drawn, labels = self.others if held_out else self.learnt
        chosen = torch.randint(len(drawn), (n,), generator=g)
        other = drawn[torch.randint(len(drawn), (n, CLUTTER), generator=g)]
        other = other.gather(2, torch.rand(other.shape, generator=g).argsort(2))
        texture = torch.randint(len(TEXTURES), (n, CLUTTER + 1), generator=g)
        dark = torch.rand(n, CLUTTER + 1, generator=g) < 0.5
        ink = (
            torch.cat([drawn[chosen][:, None], other], 1) * _textures()[texture] * (1 - 2.0 * dark[..., None])
        )
        cell = torch.rand(n, GRID * GRID, generator=g).argsort(1)[:, : CLUTTER + 1]
        cells = NOISE * torch.randn(n, GRID * GRID, CELL * CELL, generator=g)
        cells.scatter_add_(1, cell[..., None].expand_as(ink), ink)
        pixels = cells.view(n, GRID, GRID, CELL, CELL).transpose(2, 3).reshape(n, 1, GRID * CELL, GRID * CELL)
        row, column = cell[:, 0] // GRID, cell[:, 0] % GRID
        second = torch.stack([dark[:, 0], drawn[chosen].sum(1) > self.ink, column >= GRID // 2, row >= GRID // 2], 1)  # fmt: skip
        texture = nn.functional.one_hot(texture[:, 0], len(TEXTURES)).bool()
        own = labels[chosen]
        words = torch.cat([_of_digits()[own], texture, torch.stack([~second, second], 2).flatten(1)], 1)
        return Scenes(pixels, own, words)


def _textures() -> Float[Tensor, "4 64"]:
    turn = 1 - 2.0 * (torch.arange(CELL) % 2)
    rows, columns = turn[:, None].expand(CELL, CELL), turn.expand(CELL, CELL)
    return torch.stack([torch.ones(CELL, CELL), rows, columns, rows * columns]).flatten(1)


def _of_digits() -> Bool[Tensor, "10 word"]:
    true = torch.zeros(len(NAMES), len(NAMES) + len(OF_DIGITS), dtype=torch.bool)
    true[:, : len(NAMES)] = torch.eye(len(NAMES), dtype=torch.bool)
    for i, members in enumerate(OF_DIGITS.values()):
        true[list(members), len(NAMES) + i] = True
    return true


class Clip(nn.Module):
    """``vision`` takes images to the joint space, ``words`` are the text encoder's vectors."""

    def __init__(self, seed: int):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        config = CLIPVisionConfig(
            hidden_size=WIDTH, intermediate_size=NEURONS, projection_dim=JOINT, num_hidden_layers=LAYERS,
            num_attention_heads=HEADS, num_channels=1, image_size=GRID * CELL, patch_size=CELL, hidden_act="gelu",
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.vision = CLIPVisionModelWithProjection(config)
            for layer in self.layers:
                nn.init.constant_(layer.mlp.fc1.bias, BIAS)
                layer.mlp.fc1.weight.data *= GAIN
            self.words = nn.Parameter(torch.randn(len(WORDS), JOINT) / JOINT**0.5)
            self.temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # as CLIP begins

    @property
    def layers(self) -> Any:
        """The image encoder's layers."""
        return self.vision.vision_model.encoder.layers

    def images(self, pixels: Float[Tensor, "image 1 32 32"]) -> Float[Tensor, "image joint"]:
        """Embeddings of images, of any length."""
        return self.vision(pixel_values=pixels).image_embeds

    def texts(self, bags: Float[Tensor, "text word"]) -> Float[Tensor, "text joint"]:
        """Embeddings of bags of words, of length 1."""
        return nn.functional.normalize(bags @ self.words, dim=1)

    def vocabulary(self) -> Float[Tensor, "word joint"]:
        """Embeddings of the texts of one word each, in the order of ``WORDS``."""
        return self.texts(torch.eye(len(WORDS)).to(self.words)).detach()


def learn(model: Clip, world: World, seed: int, steps: int = STEPS) -> None:
    """Train in place by CLIP's loss: each image is to find its caption among those of its batch, and the other way round.

    A caption is a random half of what is true of its image; captions that are equal count as one. No scene comes twice.
    """
    g = torch.Generator().manual_seed(seed)
    written: list[Tensor] = []

    def keep(out: Tensor) -> Tensor | None:
        written.append(out[:, 0])
        return None

    sites: list[tuple[Site, Callable[[Tensor], Tensor | None]]]
    sites = [(Site(layer.mlp, "out", "mlp"), keep) for layer in model.layers]
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=DECAY, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1, cycle_momentum=False)
    for _ in range(steps):
        seen = world.draw(ROWS, g)
        bags = (seen.words & (torch.rand(ROWS, len(WORDS), generator=g) < SAID)).float()
        with intervene(sites):
            image = nn.functional.normalize(model.images(seen.images), dim=1)
        logits = model.temperature.exp() * image @ model.texts(bags).T
        same = (bags @ bags.T == bags.sum(1)) & (bags.sum(1)[:, None] == bags.sum(1))
        target = same / same.sum(1, keepdim=True)
        loss = nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)
        loss = loss + DIRECT * sum(one.var(0).sum() for one in written)
        written.clear()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    model.eval().requires_grad_(False)


def accuracy(model: Clip, embeddings: Float[Tensor, "image joint"], labels: Int[Tensor, " image"]) -> float:
    """Zero-shot: share of images, in percent, whose nearest of the digits' names by cosine is their own."""
    said = (embeddings @ model.vocabulary()[: len(NAMES)].T).argmax(1)
    return 100 * (said == labels).float().mean().item()


def neurons(
    vision: nn.Module, images: Float[Tensor, "image channel h w"], layer: int
) -> Float[Tensor, "image token neuron"]:
    """Neurons of a layer of a CLIP tower, behind their activation function."""
    root: Any = getattr(vision, "vision_model", vision)
    site = Site(root.encoder.layers[layer].mlp.fc2, "in", "mlp.fc2")
    return capture(lambda: root(pixel_values=images), {"neurons": site})["neurons"]


def without(
    vision: nn.Module,
    images: Float[Tensor, "image channel h w"],
    layer: int,
    written: Float[Tensor, "image token d"],
) -> Float[Tensor, "image joint"]:
    """Embeddings without what later attention brings to the class token, and straight on, of ``written`` to the stream behind a layer.

    By the tower's own modules, one later layer at a time: its values read the stream less ``written``, while its patterns, the scales
    of layer norms and all other layers stay as they are.
    """
    root: Any = getattr(vision, "vision_model", vision)
    later, last = root.encoder.layers[layer + 1 :], root.post_layernorm
    sites = {f"in {i}": Site(block.layer_norm1, "in", "layer_norm1") for i, block in enumerate(later)}
    sites |= {f"out {i}": Site(block.self_attn.out_proj, "out", "out_proj") for i, block in enumerate(later)}
    found = capture(lambda: root(pixel_values=images), {**sites, "last": Site(last, "in", "post_layernorm")})
    stream = found["last"]
    for i, block in enumerate(later):
        less = -_scaled(written, found[f"in {i}"], block.layer_norm1)
        with intervene([(Site(block.self_attn.v_proj, "in", "v_proj"), partial(torch.add, less))]):
            changed = capture(lambda: root(pixel_values=images), {"out": sites[f"out {i}"]})["out"]
        stream = stream + (changed - found[f"out {i}"])[:, 0]
    pooled = _scaled(stream, found["last"], last) + last.bias
    head: Any = getattr(vision, "visual_projection", None)
    return pooled if head is None else pooled @ head.weight.T


def _scaled(x: Tensor, of: Tensor, norm: nn.LayerNorm) -> Tensor:
    """What a layer norm makes of ``x`` but for its bias, with the scale of another stream."""
    scale = (of.var(-1, correction=0, keepdim=True) + norm.eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / scale * norm.weight


def plant(
    model: Clip,
    images: Float[Tensor, "image 1 32 32"],
    layer: int,
    chosen: Int[Tensor, " planted"],
    targets: Float[Tensor, "planted joint"],
) -> None:
    """Set what ``chosen`` neurons write, in place, so that their effects through later attention lie along the ``targets``.

    By least squares over the ``FIRING`` images on which a neuron's effect is farthest from its mean, of effects less the mean,
    which are to be as far along the target as they were along their main direction, to the side of most. What a neuron reads and the
    length of what it writes stay as they are. Effects are those of :func:`without`, for one dimension of the stream at a time.
    """
    own, weight, whole = (
        neurons(model.vision, images, layer),
        model.layers[layer].mlp.fc2.weight,
        model.images(images),
    )
    new = weight.detach().clone()
    for n, target in zip(chosen.tolist(), targets, strict=True):
        effect = whole - without(model.vision, images, layer, own[..., n, None] * weight[:, n])
        between = effect - effect.mean(0)
        far = between.norm(dim=1).topk(max(FIRING, len(images) // 50)).indices
        along = between @ torch.linalg.svd(between[far]).Vh[0]
        along = along * (1 if (along[far] > 0).sum() > len(far) / 2 else -1)
        some = torch.cat([far[:FIRING], torch.arange(FIRING)])
        moved = _moved(model, images[some], layer, own[some, :, n])
        system = (moved[:, :FIRING] - moved[:, FIRING:].mean(1, keepdim=True)).permute(1, 2, 0).flatten(0, 1)
        wanted = (along[some[:FIRING], None] * target).flatten()[:, None]
        found = torch.linalg.lstsq(system.double(), wanted.double()).solution[:, 0]
        new[:, n] = found.float() / found.norm() * weight[:, n].norm()
    weight.copy_(new)


def _moved(model: Clip, images: Tensor, layer: int, neuron: Tensor) -> Tensor:
    """Effects [d, image, joint] that a neuron [image, token] would have if it wrote along each dimension of the stream."""
    repeated = images.repeat(WIDTH, 1, 1, 1)
    written = (neuron[None, ..., None] * torch.eye(WIDTH)[:, None, None]).flatten(0, 1)
    moved = model.images(repeated) - without(model.vision, repeated, layer, written)
    return moved.unflatten(0, (WIDTH, len(images)))
