"""Runs in an environment with eai-delphi 0.1.3: the windows that its LatentDataset makes of our cache and of its own."""

import json
import sys
from pathlib import Path

import torch
from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
from delphi.latents import LatentCache, LatentDataset
from delphi.latents.cache import InMemoryCache
from safetensors.torch import load_file, save_file


class Words:
    """What the dataset asks of a tokenizer."""

    def batch_decode(self, ids):
        """Numbers for words."""
        return [str(int(one)) for one in ids]


def windows(raw, point, latents=None):
    """Tokens and activations of all windows in which each latent fires, the strongest first."""
    constructor = ConstructorConfig(min_examples=1, n_non_activating=1, example_ctx_len=32)
    dataset = LatentDataset(
        raw, SamplerConfig(), constructor, tokenizer=Words(), modules=[point], latents=latents
    )
    out = {}
    for record in dataset:
        name = record.latent.latent_index
        out[f"{name}.tokens"] = torch.stack([one.tokens for one in record.examples])
        out[f"{name}.activations"] = torch.stack([one.activations for one in record.examples]).float()
    return out


def write(dense, tokens, out, point, n_splits):
    """The cache that delphi writes of dense codes."""
    cache = LatentCache.__new__(LatentCache)  # its constructor wants a model
    cache.width, cache.cache = dense.shape[-1], InMemoryCache(batch_size=len(dense))
    cache.cache.add(dense, tokens, 0, point)
    cache.cache.save()
    cache.save_splits(n_splits, out)
    cache.save_config(out, CacheConfig(n_splits=n_splits), "toy")


def main(run, point):
    """``run`` holds our cache and what it is of; windows go into ``windows.*``, delphi's own cache into ``theirs``."""
    run = Path(run)
    given = load_file(run / "given")
    tokens, dense, n_splits = given["tokens"], given["dense"], int(given["n_splits"])
    theirs = run / "theirs" / "latents"
    crashes = False
    try:
        write(dense, tokens, theirs, point, n_splits)
    except ValueError:
        crashes = True  # at a shard in which nothing fires
        write(dense, tokens, theirs, point, 1)
        for file in (theirs / point).glob("*.safetensors"):
            if file.name != f"0_{dense.shape[-1] - 1}.safetensors":
                file.unlink()
    save_file(windows(theirs, point), run / "windows.theirs")
    save_file(windows(run / "latents", point), run / "windows.ours")
    fires = dense.abs().sum((0, 1)).nonzero()[:, 0]
    save_file(windows(run / "latents", point, {point: fires[::6]}), run / "windows.some")
    (run / "writer.json").write_text(json.dumps({"empty shards crash it": crashes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
