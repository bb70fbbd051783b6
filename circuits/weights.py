"""Transformers as plain tensors: embeddings, blocks and unembedding, and what a prompt makes of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.attention import Attention
from saekit.layers import attention_of
from saekit.models import ATTENTION, MLP, Model, load_model
from saekit.types import SaekitError

PROBE = 64  # positions of random tokens on which the record is compared with its model
TOLERANCES = {
    torch.float64: 1e-5,  # some norms compute in fp32 whatever the model is in
    torch.float32: 1e-4,
}  # of the logits' norm; half precision: the model's rounding
# names of a block's norms, of an MLP's projections and of what stands behind the blocks, in the known families
BEFORE_ATTENTION = ("ln_1", "input_layernorm")
BEFORE_MLP = ("ln_2", "post_attention_layernorm")
LINEARS = (("c_fc", "c_proj"), ("dense_h_to_4h", "dense_4h_to_h"), ("up_proj", "down_proj"), ("fc1", "fc2"))
ACTIVATIONS = ("act", "act_fn", "activation_fn")
POSITIONS = ("wpe", "embed_positions")
LAST = ("ln_f", "final_layer_norm", "norm")


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / size * weight + bias``; a root-mean-square norm takes no mean off."""

    weight: Float[Tensor, " d"]
    bias: Float[Tensor, " d"]
    eps: float
    centred: bool

    def size(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape 1"]:
        """What a row is divided by."""
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def __call__(self, x: Float[Tensor, "*shape d"]) -> Float[Tensor, "*shape d"]:
        size = self.size(x)
        return (x - x.mean(-1, keepdim=True) if self.centred else x) / size * self.weight + self.bias

    def back(
        self, gradient: Float[Tensor, "*batch d"], size: Float[Tensor, "*rows 1"],
        x: Float[Tensor, "*rows d"] | None = None,
    ) -> Float[Tensor, "*batch d"]:  # fmt: skip
        """The gradient at the input, with the sizes as they are; with ``x``, what was normalised, through its size too."""
        gradient = gradient * (self.weight / size)
        if x is not None:
            unit = (x - x.mean(-1, keepdim=True) if self.centred else x) / size
            gradient = gradient - unit * (gradient * unit).mean(-1, keepdim=True)
        return gradient.sub_(gradient.mean(-1, keepdim=True)) if self.centred else gradient


@dataclass(frozen=True)
class Mlp:
    """``W_out (act(W_in x + b_in)) + b_out``; with a gate ``W_out (act(W_gate x + b_gate) * (W_in x + b_in)) + b_out``."""

    W_in: Float[Tensor, "neuron d_in"]
    b_in: Float[Tensor, " neuron"]
    W_out: Float[Tensor, "d_out neuron"]
    b_out: Float[Tensor, " d_out"]
    act: Callable[[Tensor], Tensor]
    gate: "tuple[Float[Tensor, 'neuron d_in'], Float[Tensor, ' neuron']] | None" = None

    def slopes(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape neuron"]:
        """What each neuron multiplies ``W_in x + b_in`` by: the gate's activation, or the secant ``act(u) / u``."""
        if self.gate is not None:
            return self.act(x @ self.gate[0].T + self.gate[1])
        u = x @ self.W_in.T + self.b_in
        u = torch.where(u.abs() < 1e-9, 1e-9, u)  # the slope at 0
        return self.act(u) / u

    def __call__(self, x: Float[Tensor, "*shape d_in"]) -> Float[Tensor, "*shape d_out"]:
        u = x @ self.W_in.T + self.b_in
        made = self.act(u) if self.gate is None else self.act(x @ self.gate[0].T + self.gate[1]) * u
        return made @ self.W_out.T + self.b_out


@dataclass(frozen=True)
class Block:
    """A block's parts; None stands for one that is not there. ``places`` names its sites by module path and side."""

    before_attention: Norm | None
    attention: Attention
    after_attention: Norm | None
    before_mlp: Norm | None
    mlp: Mlp | None
    after_mlp: Norm | None
    parallel: bool
    places: dict[str, str]


@dataclass(frozen=True)
class Weights:
    """A decoder-only transformer. ``W_U`` [vocabulary, d] writes the logits, ``W_E`` [vocabulary, d] the tokens."""

    W_E: Float[Tensor, "vocabulary d"]
    W_pos: Float[Tensor, "position d"] | None
    blocks: tuple[Block, ...]
    norm: Norm | None
    W_U: Float[Tensor, "vocabulary d"]
    b_U: Float[Tensor, " vocabulary"]
    context: int | None

    @cached_property
    def places(self) -> dict[str, tuple[int, str]]:
        """Layer and site of every named place (``path:side``)."""
        return {place: (i, site) for i, b in enumerate(self.blocks) for place, site in b.places.items()}

    @torch.no_grad()
    def run(
        self, tokens: Int[Tensor, " seq"]
    ) -> "tuple[list[dict[str, Tensor]], Float[Tensor, 'seq vocabulary']]":
        """What each block has at each of its sites [seq, d], and the logits."""
        x = self.W_E[tokens]
        x = (x if self.W_pos is None else x + self.W_pos[: len(tokens)])[None]
        seen: list[dict[str, Tensor]] = []
        for block in self.blocks:
            at = {"resid_pre": x[0]}

            def keep(site: str, value: Tensor, at: dict[str, Tensor] = at) -> Tensor:
                at[site] = value[0]
                return value

            x = run_block(block, x, keep)
            seen.append(at)
        x = x[0]
        last = x if self.norm is None else self.norm(x)
        return seen, last @ self.W_U.T + self.b_U


def run_block(
    block: Block, x: Float[Tensor, "batch seq d"], see: Callable[[str, Tensor], Tensor]
) -> Float[Tensor, "batch seq d"]:
    """The stream behind a block; differentiable.

    ``see(site, value)`` is called at every site behind the input, and at "patterns", and gives what goes on from there.
    """

    def normed(norm: Norm | None, value: Tensor) -> Tensor:
        return value if norm is None else norm(value)

    patterns, z = block.attention.gather(see("attn_in", normed(block.before_attention, x)))
    see("patterns", patterns)
    out = see("attn_out", block.attention.write(see("z", z)))
    middle = see("resid_mid", x + see("attn_add", normed(block.after_attention, out)))
    if block.mlp is None:
        return see("resid_post", middle)
    read = see("mlp_in", normed(block.before_mlp, x if block.parallel else middle))
    added = see("mlp_add", normed(block.after_mlp, see("mlp_out", block.mlp(read))))
    return see("resid_post", middle + added)


def weights(model: "Model | str | nn.Module") -> Weights:
    """The tensors of a model, checked against it on random tokens.

    Known are GPT-2, GPT-NeoX, Llama and what is built like them; a model that computes anything else is refused.
    The tensors are the model's own where it has them in fp32 or fp64, and fp32 copies otherwise.
    """
    model = load_model(model)
    try:
        record = _weights(model)
    except (AttributeError, KeyError, StopIteration, RuntimeError, TypeError) as error:
        raise SaekitError(
            f"model {model.name!r} ({type(model.module).__name__}) is not built as GPT-2, GPT-NeoX or Llama are ({error!r}), and no circuit can be traced in it; choose another model"
        ) from error
    _check(model, record)
    return record


def _check(model: Model, record: Weights) -> None:
    """Raise unless the record computes what the model does."""
    length = min(PROBE, model.context or PROBE)
    tokens = torch.randint(len(record.W_E), (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.logits(model.inputs(tokens, torch.ones_like(tokens, dtype=torch.bool)))[0]
    mine = record.run(tokens[0].to(model.device))[1]
    off = ((mine - theirs).norm() / theirs.norm()).item()
    tolerance = TOLERANCES.get(theirs.dtype, 3e-2)
    if not off < tolerance:
        raise SaekitError(
            f"model {model.name!r} ({type(model.module).__name__}) differs by {off:.2g} of its logits' norm from a plain transformer with its weights ({tolerance:g} is allowed): it computes something else (softcaps, scaled embeddings, experts?); choose another model"
        )


def _weights(model: Model) -> Weights:
    path = model.block_path
    if path is None:
        raise AttributeError("it has no stack of blocks")
    modules = dict(model.module.named_modules())
    stem = path.rpartition(".")[0]
    behind = dict(modules[stem].named_children())
    embed: Any = model.module.get_input_embeddings()  # type: ignore[operator]
    positions = _first(behind, POSITIONS)
    unembed = _unembedding(model.module)
    W_U = _full(unembed.weight)
    scale = float(getattr(embed, "embed_scale", 1.0))
    if scale == 1.0 and type(modules[stem]).__name__ == "GemmaModel":
        scale = W_U.shape[1] ** 0.5
    bias = getattr(unembed, "bias", None)
    return Weights(
        _full(embed.weight) * scale if scale != 1.0 else _full(embed.weight),
        None if positions is None else _full(positions.weight),
        tuple(_block(model, f"{path}.{i}") for i in range(len(list(modules[path].children())))),
        _norm(final_norm(model)),
        W_U,
        torch.zeros_like(W_U[:, 0]) if bias is None else _full(bias),
        model.context,
    )


def final_norm(model: Model) -> nn.Module | None:
    """The module behind a model's blocks that normalises, if there is one."""
    stem = (model.block_path or "").rpartition(".")[0]
    return _first(dict(dict(model.module.named_modules())[stem].named_children()), LAST)


def _unembedding(module: nn.Module) -> Any:
    found = getattr(module, "get_output_embeddings", lambda: None)()
    return found if found is not None else next(m for n, m in module.named_modules() if n.endswith("lm_head"))


def _block(model: Model, path: str) -> Block:
    block = dict(model.module.named_modules())[path]
    children = dict(block.named_children())
    post = "post_feedforward_layernorm" in children
    names = {
        "before_attention": _name(children, BEFORE_ATTENTION),
        "after_attention": "post_attention_layernorm" if post else None,
        "before_mlp": _name(children, ("pre_feedforward_layernorm",) if post else BEFORE_MLP),
        "after_mlp": "post_feedforward_layernorm" if post else None,
    }
    attention, mlp = _name(children, ATTENTION), _name(children, MLP)
    if attention is None:
        raise AttributeError(f"{path} has no attention")
    places = {f"{path}:in": "resid_pre", f"{path}:out": "resid_post"}
    parallel = bool(getattr(block, "use_parallel_residual", False))
    middle = "resid_pre" if parallel else "resid_mid"
    ends = {"before_attention": ("resid_pre", "attn_in"), "after_attention": ("attn_out", "attn_add"), "before_mlp": (middle, "mlp_in"), "after_mlp": ("mlp_out", "mlp_add")}  # fmt: skip
    for part, name in names.items():
        for side, site in zip(("in", "out"), ends[part], strict=True):
            places |= {f"{path}.{name}:{side}": site} if name else {}
    for name, part in ((attention, "attn"), (mlp, "mlp")):
        places |= {f"{path}.{name}:{side}": f"{part}_{side}" for side in ("in", "out")} if name else {}
    o_proj = next((n for n in ("c_proj", "dense", "o_proj") if hasattr(children[attention], n)), None)
    places |= {f"{path}.{attention}.{o_proj}:in": "z"} if o_proj else {}
    norms = {part: _norm(children.get(name or "")) for part, name in names.items()}
    return Block(
        norms["before_attention"], attention_of(model, f"{path}.{attention}"), norms["after_attention"],
        norms["before_mlp"], _mlp(children.get(mlp or "")), norms["after_mlp"], parallel, places,
    )  # fmt: skip


def _norm(module: Any) -> Norm | None:
    if module is None or isinstance(module, nn.Identity):
        return None
    centred = isinstance(module, nn.LayerNorm)
    weight = _full(module.weight)
    if "Gemma" in type(module).__name__:
        weight = weight + 1
    bias = getattr(module, "bias", None)
    eps = next(getattr(module, n) for n in ("variance_epsilon", "eps") if hasattr(module, n))
    return Norm(weight, torch.zeros_like(weight) if bias is None else _full(bias), float(eps), centred)


def _mlp(module: Any) -> Mlp | None:
    if module is None or not list(module.parameters()):
        return None  # adds nothing
    into, out = next(pair for pair in LINEARS if hasattr(module, pair[0]))
    act = getattr(module, next(n for n in ACTIVATIONS if hasattr(module, n)))
    gate = getattr(module, "gate_proj", None)
    return Mlp(
        *_linear(getattr(module, into)), *_linear(getattr(module, out)), act, None if gate is None else _linear(gate)
    )  # fmt: skip


def _linear(module: Any) -> tuple[Tensor, Tensor]:
    """Weight [out, in] and bias of a projection."""
    weight = _full(module.weight)
    weight = weight if isinstance(module, nn.Linear) else weight.T  # of GPT-2: [in, out]
    return weight, torch.zeros_like(weight[:, 0]) if module.bias is None else _full(module.bias)


def _full(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _name(children: dict[str, nn.Module], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in children), None)


def _first(children: dict[str, nn.Module], names: tuple[str, ...]) -> Any:
    name = _name(children, names)
    return None if name is None else children[name]
