"""Second-order effects are what the tower's own modules say they are; directions and words come out as planted."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

import saekit
from saekit.analyses.clip_towers import Reading, Tower, clip_tower
from saekit.analyses.second_order import amounts, components, describe, effects, paths, replaced
from saekit.testbed.clip import WORDS, Clip, World, learn, neurons, plant, without

VISION = {
    "hidden_size": 24, "intermediate_size": 40, "projection_dim": 12, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_channels": 2, "image_size": 12, "patch_size": 4, "initializer_factor": 4.0,
}  # fmt: skip
TEXT = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50, "projection_dim": 12}  # fmt: skip


def _clip(seed: int = 0) -> CLIPModel:
    return CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "with projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)),
    "without": lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)),
    "both towers": _clip,
}


def made(name: str = "with projection", seed: int = 0) -> nn.Module:
    """A tower of transformers, in float64, in which no weight or bias has a value that would hide a mistake."""
    torch.manual_seed(seed)
    model = MODELS[name]().double().eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.1 * torch.randn_like(p)
    return model


def images(n: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, 2, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def embedded(model: Any, x: Tensor) -> Tensor:
    if isinstance(model, CLIPVisionModel):
        return model(pixel_values=x).pooler_output
    if isinstance(model, CLIPVisionModelWithProjection):
        return model(pixel_values=x).image_embeds
    return model.visual_projection(model.vision_model(pixel_values=x).pooler_output)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("name", list(MODELS))
def test_effects_are_what_embeddings_lose_without_the_flow(name: str, layer: int) -> None:
    """By hooks on values alone, all neurons together and each by itself."""
    model, x = made(name), images()
    root: Any = getattr(model, "vision_model", model)
    fired, w_out = neurons(model, x, layer), root.encoder.layers[layer].mlp.fc2.weight
    own, whole = effects(clip_tower(model), x, layer), embedded(model, x)
    torch.testing.assert_close(own.sum(1), whole - without(model, x, layer, fired @ w_out.T))
    for n in (0, 7, 39):
        torch.testing.assert_close(
            own[:, n], whole - without(model, x, layer, fired[..., n, None] * w_out[:, n])
        )
    assert own.abs().max() > 0.01


def test_a_tower_is_read_as_it_is() -> None:
    model, x = made(), images()
    reading, other = clip_tower(model).read(x, 1), made()
    other.vision_model.config._attn_implementation = "eager"
    patterns = other.vision_model(pixel_values=x, output_attentions=True).attentions
    theirs = torch.cat([p[:, :, 0] for p in patterns[2:]], 1)  # their softmax is in float32
    torch.testing.assert_close(reading.patterns, theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(reading.output, embedded(model, x))
    assert reading.patterns.shape == reading.scales.shape == (6, 2 * 3, 10)
    half = clip_tower(made().to(torch.bfloat16))
    assert half.w_out.dtype == torch.float32 and half.read(x.bfloat16(), 0).output.dtype == torch.float32


def test_any_tower_can_be_given_by_its_parts() -> None:
    """One layer behind, one head, one token but the class's: the formula can be written out."""
    g = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    before, after, w_out, w_v, w_o, p = drawn(2, 5), drawn(5), drawn(2, 5, 3), drawn(2, 1, 4, 5), drawn(2, 1, 5, 4), drawn(6, 5)  # fmt: skip
    fired, a, scale, last = drawn(7, 2, 3), drawn(7, 1, 2), drawn(7, 1, 2).exp(), drawn(7).exp()
    tower = Tower(
        w_out, before, w_v, w_o, after, p, lambda x, layer: Reading(fired, a, scale, last, drawn(7, 6))
    )
    found, centre = effects(tower, drawn(7, 1, 1, 1), 0), torch.eye(5).double() - 1 / 5
    for n in range(3):
        flow = p @ after.diag() @ centre @ w_o[1, 0] @ w_v[1, 0] @ before[1].diag() @ centre @ w_out[0, :, n]
        amount = sum(fired[:, i, n] * a[:, 0, i] / scale[:, 0, i] for i in range(2)) / last
        torch.testing.assert_close(found[:, n], amount[:, None] * flow)


@pytest.mark.parametrize("sizes", [[60], [4] * 15, [31, 29]])
def test_components_are_those_of_all_effects_however_images_stream(sizes: list[int]) -> None:
    tower, x = clip_tower(made()), images(60)
    found, every = components(tower, x.split(sizes), 1, top=10, share=0.05), effects(tower, x, 1)
    torch.testing.assert_close(found.mean, every.mean(0))
    between = every - every.mean(0)
    for n in range(0, 40, 3):
        norms = between[:, n].norm(dim=1)
        largest = between[norms.topk(10).indices, n]
        _, values, right = torch.linalg.svd(largest)
        sign = 1 if ((largest @ right[0]) > 0).sum() >= 5 else -1
        if int((largest @ right[0] > 0).sum()) != 5:
            torch.testing.assert_close(found.direction[n], sign * right[0], atol=1e-7, rtol=1e-6)
        torch.testing.assert_close(found.explained[n], values[0] ** 2 / values.square().sum())
        torch.testing.assert_close(found.least[n], norms.topk(3).values[-1])
    assert found.n == 60 and found.layer == 1


def test_replaced_embeddings_are_those_of_replaced_effects() -> None:
    tower, x, y = clip_tower(made()), images(50), images(20, seed=1)
    found = [components(tower, [x], layer, top=10, share=0.2) for layer in (0, 2)]
    expected = embedded(made(), y)
    for one in found:
        between = effects(tower, y, one.layer) - one.mean
        along = (between * one.direction).sum(2) * (between.norm(dim=2) >= one.least)
        assert 0 < (along != 0).double().mean() < 0.6
        expected = expected - between.sum(1) + along @ one.direction
    torch.testing.assert_close(replaced(tower, y, found), expected)
    nowhere = [replace(one, least=one.least + torch.inf) for one in found]
    kept = sum(effects(tower, y, one.layer).sum(1) - one.mean.sum(0) for one in found)
    torch.testing.assert_close(replaced(tower, y, nowhere), embedded(made(), y) - kept)


def test_a_neuron_that_writes_nothing_has_no_direction() -> None:
    model = made()
    model.vision_model.encoder.layers[1].mlp.fc2.weight[:, 3] = 0
    found = components(clip_tower(model), [images(20)], 1, top=5)
    assert not found.direction[3].any() and found.explained[3] == 0 and found.direction[4].norm() > 0.99


def test_effects_of_one_path_lie_along_it() -> None:
    """With a single head behind, one component is all: nothing is lost where it counts on all images."""
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{**VISION, "num_attention_heads": 1, "num_hidden_layers": 2})).double()  # fmt: skip
    tower, x = clip_tower(model), images(30)
    found = components(tower, [x], 0, top=10, share=1.0)
    torch.testing.assert_close(found.explained, torch.ones(40).double())
    torch.testing.assert_close(replaced(tower, x, [replace(found, least=found.least * 0)]), embedded(model, x).detach())  # fmt: skip


def texts(n: int = 30, d: int = 12, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=g) * torch.rand(n, 1, generator=g) * 9 + 1
    )  # of any lengths, off centre


def centred(x: Tensor) -> Tensor:
    units = nn.functional.normalize(x.double(), dim=1)
    return nn.functional.normalize(units - units.mean(0), dim=1)


def test_a_direction_along_each_text_is_described_by_it() -> None:
    x = texts()
    found = describe(3 * centred(x), x, 1)
    assert torch.equal(found.texts[:, 0], torch.arange(30))
    torch.testing.assert_close(found.weights[:, 0], torch.full((30,), 3.0).double())
    assert (found.explained > 1 - 1e-9).all()
    assert (describe(-centred(x), x, 1).weights < 0).all()


def test_sums_of_texts_are_told_apart_by_their_weights() -> None:
    x = texts(20, 200)
    found = describe((2 * centred(x)[3] - 5 * centred(x)[11] + centred(x)[0])[None], x, 3)
    assert found.texts[0].tolist() == [11, 3, 0]
    torch.testing.assert_close(found.weights[0], torch.tensor([-5.0, 2, 1]).double())


def test_the_first_text_is_that_of_scikit_learns_pursuit() -> None:
    from sklearn.linear_model import orthogonal_mp

    x, wanted = texts(), texts(8, seed=1)
    found, atoms = describe(wanted, x, 4), centred(x)
    theirs = orthogonal_mp(atoms.T.numpy(), wanted.double().T.numpy(), n_nonzero_coefs=4)
    ours = torch.zeros(8, 30).double().scatter(1, found.texts, found.weights)
    torch.testing.assert_close(ours, torch.from_numpy(theirs).T)


@pytest.mark.parametrize("pair", [(3, 7), (3, 25), (20, 25)])
def test_texts_of_one_embedding_are_named_whatever_is_held(pair: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setattr("saekit.analyses.second_order.BLOCK", 8)
    x = texts()
    describe(x, x, 2)
    x[pair[1]] = 2 * x[pair[0]]
    with pytest.raises(saekit.SaekitError, match=rf"texts \[{pair[0]}, {pair[1]}\] have the same embedding"):
        describe(x, x, 2)


def test_lengths_of_texts_mean_nothing() -> None:
    x, wanted = texts(), texts(8, seed=1)
    found, other = describe(wanted, x, 3), describe(wanted, x * torch.linspace(0.1, 50, 30)[:, None], 3)
    assert torch.equal(found.texts, other.texts)
    torch.testing.assert_close(found.weights, other.weights, atol=1e-5, rtol=1e-5)


def test_lengths_of_directions_are_those_of_weights_alone() -> None:
    x, wanted = texts(), texts(8, seed=1)
    found = describe(wanted, x, 3)
    for scale in (1e-20, 1e-5, 1e5):
        other = describe(scale * wanted.double(), x, 3)
        assert torch.equal(found.texts, other.texts)
        torch.testing.assert_close(found.explained, other.explained, rtol=0, atol=1e-9)
        torch.testing.assert_close(scale * found.weights, other.weights, rtol=1e-9, atol=0)
    nothing = describe(torch.zeros(1, 12), x, 3)
    assert not nothing.weights.any() and nothing.explained.tolist() == [0]


@pytest.fixture(scope="module")
def learnt() -> tuple[World, Clip]:
    """A CLIP that has hardly learnt."""
    world, model = World(0), Clip(0)
    learn(model, world, 0, steps=20)
    return world, model


def test_planted_neurons_are_described_by_their_words(learnt: tuple[World, Clip]) -> None:
    world, model = learnt
    words, x = model.vocabulary(), world.draw(300, torch.Generator().manual_seed(1)).images
    chosen, wanted = torch.tensor([3, 50, 200]), [2, 11, 20]
    own = model.layers[1].mlp.fc2.weight.clone()
    plant(model, x, 1, chosen, centred(words)[wanted].float())
    found = components(clip_tower(model.vision), x.split(100), 1, top=20)
    assert describe(found.direction[chosen], words, 3).texts[:, 0].tolist() == wanted
    now = model.layers[1].mlp.fc2.weight
    torch.testing.assert_close(now.norm(dim=0), own.norm(dim=0))
    others = torch.ones(len(found.least), dtype=torch.bool).index_fill(0, chosen, False)
    assert torch.equal(now[:, others], own[:, others])
    model.layers[1].mlp.fc2.weight.copy_(own)


def test_the_testbeds_names_are_those_of_a_stack_of_blocks(learnt: tuple[World, Clip]) -> None:
    view = saekit.load_model(learnt[1].vision)
    assert {"blocks.2.hook_resid_post", "blocks.0.hook_mlp_out", "blocks.1.mlp.activation_fn"} <= set(view.hook_points())  # fmt: skip


def test_scenes_are_what_their_words_say() -> None:
    world = World(3)
    scenes = world.draw(2000, torch.Generator().manual_seed(0))
    assert scenes.words.shape[1] == len(WORDS)
    assert torch.equal(scenes.words[:, :10].int().argmax(1), scenes.labels) and (scenes.words[:, :10].sum(1) == 1).all()  # fmt: skip
    for first, second in (("light", "dark"), ("thin", "thick"), ("left", "right"), ("above", "below")):
        a, b = (scenes.words[:, WORDS.index(word)] for word in (first, second))
        assert torch.equal(a, ~b) and 0.4 < a.float().mean() < 0.6
    again = world.draw(2000, torch.Generator().manual_seed(0))
    assert torch.equal(again.images, scenes.images)


TOWER = clip_tower(made())
CASES: dict[str, tuple[Callable[[], object], str]] = {
    "nothing behind": (lambda: effects(TOWER, images(), 3), "no attention"),
    "layer below 0": (lambda: paths(TOWER, -1), "layer = -1"),
    "images not finite": (lambda: effects(TOWER, images() / 0, 0), "images hold"),
    "fewer images than asked": (lambda: components(TOWER, [images()], 0), "top = 100 must lie in 2..6"),
    "no images": (lambda: components(TOWER, [], 0), "top = 100"),
    "share": (lambda: components(TOWER, [images()], 0, top=2, share=0.0), "share = 0.0"),
    "gone over once": (lambda: components(TOWER, iter([images()]), 0, top=2), "once only"),
    "no layers": (lambda: replaced(TOWER, images(), []), "found is of layers"),
    "width": (lambda: describe(texts(3, 11), texts(), 2), "width 11"),
    "directions not finite": (lambda: describe(texts(3) / 0, texts(), 2), "directions hold"),
    "texts not finite": (lambda: describe(texts(3), texts() / 0, 2), "texts hold"),
    "a text of 0": (lambda: describe(texts(3), texts().index_fill(0, torch.tensor(4), 0.0), 2), "text 4 has"),
    "equal texts": (lambda: describe(texts(3), texts()[[0, 1, 2, 1]] * torch.tensor([[1.0], [1], [1], [3]]), 2), r"\[1, 3\]"),
    "one text": (lambda: describe(texts(3), texts(1), 1), "tells nothing"),
    "more texts than there are": (lambda: describe(texts(3), texts(5), 6), "k = 6"),
    "not a CLIP": (lambda: clip_tower(nn.Linear(2, 2)), "Linear is not built"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_mistakes_are_named(name: str) -> None:
    call, said = CASES[name]
    with pytest.raises(saekit.SaekitError, match=said):
        call()


def test_one_layer_twice_and_other_pooling_are_refused() -> None:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    found = components(TOWER, [images()], 0, top=3)
    with pytest.raises(saekit.SaekitError, match="each once"):
        replaced(TOWER, images(), [found, found])
    sizes = {k: v for k, v in VISION.items() if k not in ("projection_dim", "initializer_factor")}
    with pytest.raises(saekit.SaekitError, match="no class token"):
        clip_tower(SiglipVisionModel(SiglipVisionConfig(**sizes)))


def test_patterns_of_another_image_give_other_effects() -> None:
    reading = TOWER.read(images(), 0)
    turned = amounts(replace(reading, patterns=reading.patterns.roll(1, 0)))
    assert (turned - amounts(reading)).abs().max() > 0.01
