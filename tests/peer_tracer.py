"""Runs in an environment with circuit-tracer 0.5: its graph of the toy whose tensors are given, and its times."""

import json
import statistics
import sys
import time

import torch
from circuit_tracer import attribute
from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformerConfig


class Words:
    """What the tracer asks of a tokenizer."""

    all_special_ids = (1,)
    bos_token_id = pad_token_id = eos_token_id = 1
    padding_side = "right"
    vocab_size = 256

    def decode(self, ids):
        """Numbers for words."""
        return str(ids)


def main(given: str, out: str) -> None:
    """``given``: safetensors of the model, the transcoders and the prompt; ``out``: its edges and times."""
    tensors = load_file(given)
    tokens = tensors.pop("tokens")
    shape = {name: int(value) for name, value in zip(("layers", "d", "heads", "d_head", "d_mlp", "vocabulary", "context"), tensors.pop("shape"), strict=True)}  # fmt: skip
    transcoders = {}
    for layer in range(shape["layers"]):
        w_enc = tensors.pop(f"transcoders.{layer}.W_enc")
        one = SingleLayerTranscoder(shape["d"], len(w_enc), torch.relu, layer, dtype=torch.float32)
        rest = {name: tensors.pop(f"transcoders.{layer}.{name}") for name in ("W_dec", "b_enc", "b_dec")}
        one.load_state_dict({"W_enc": w_enc, **rest})
        transcoders[layer] = one
    config = HookedTransformerConfig(
        n_layers=shape["layers"], d_model=shape["d"], n_ctx=shape["context"], d_head=shape["d_head"],
        n_heads=shape["heads"], d_mlp=shape["d_mlp"], d_vocab=shape["vocabulary"], act_fn="relu",
        normalization_type="LN", device="cpu",
    )  # fmt: skip
    model = TransformerLensReplacementModel.from_config(
        config, TranscoderSet(transcoders, "mlp.hook_in", "mlp.hook_out")
    )
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, tensor in tensors.items():
        own = next(
            n
            for n in (
                name,
                name.replace("mlp.", "mlp.old_mlp."),
                name.replace("unembed.", "unembed.old_unembed."),
            )
            if n in names
        )
        names[own].data.copy_(tensor)
    model.tokenizer = Words()
    torch.set_num_threads(2)
    seconds = {}
    for batch in (8, 16, 32, 64):
        took = []
        for _ in range(3):
            start = time.perf_counter()
            graph = attribute(tokens, model, batch_size=batch, max_n_logits=3, desired_logit_prob=1.0)
            took.append(time.perf_counter() - start)
        seconds[batch] = statistics.median(took)
    save_file({"active": graph.active_features.contiguous(), "edges": graph.adjacency_matrix.contiguous(),
               "selected": graph.selected_features.contiguous()}, out)  # fmt: skip
    print(json.dumps(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
