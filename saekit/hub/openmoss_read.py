"""Readers of OpenMOSS' format, one for each type of dictionary; what the format means is in :mod:`saekit.hub.openmoss`."""

import math
from typing import Any

import torch
from torch import Tensor

from saekit.dictionaries import Dictionary
from saekit.hub.assembled import cross_layer, rewired
from saekit.hub.openmoss_stored import CONFIG, OFF, Stored
from saekit.hub.record import Record, to_dictionary
from saekit.types import SaekitError


def _domain(stored: Stored) -> str:
    return "norm" if stored.config["sparsity_include_decoder_norm"] else "pre"


def _factor(stored: Stored, hook: str) -> float | None:
    value = stored.average(hook)
    return None if value is None else value / math.sqrt(stored.d)


def _sae(stored: Stored) -> Dictionary:
    c, d, n = stored.config, stored.d, stored.n_features
    if c["use_glu_encoder"]:
        raise SaekitError(
            f"{stored.where} has a GLU encoder, a product of two maps of the input, and features of saekit read by one; there is no way to convert it"
        )
    (read,), (write,) = stored.hooks
    selection, options, threshold = stored.selection(n)
    threshold = stored.drifted(threshold, _factor(stored, write if _domain(stored) == "norm" else read))
    if c["norm_activation"] == "token-wise" and read != write:
        stored.told.append(
            "outputs are in units in which every row at the hook point written has the norm sqrt(d)"
        )
    return to_dictionary(
        Record(
            encoder=stored.take("W_E", d, n).T,
            atoms=stored.take("W_D", n, d),
            b_enc=stored.take("b_E", n),
            b_dec=stored.bias("b_D", d),
            selection=selection,
            options=options,
            threshold=threshold,
            wiring="autoencoder" if read == write else "transcoder",
            domain=_domain(stored),
            scale_in=stored.scale(read),
            scale_out=stored.scale(write),
            per_row="row_norm" if c["norm_activation"] == "token-wise" else "none",
            card=stored.card(),
        )
    )


def _clt(stored: Stored) -> Dictionary:
    d, n, (reads, writes) = stored.d, stored.n_features, stored.hooks
    layers = len(reads)
    if len(writes) != layers or not layers:
        raise SaekitError(
            f"{stored.where} reads {layers} hook points and writes {len(writes)}; a clt has as many of both"
        )
    selection, options, threshold = stored.selection(layers, n)
    encoders, biases = stored.take("W_E", layers, d, n), stored.take("b_E", layers, n)
    targets = [stored.take(f"W_D.{t}", t + 1, n, d) for t in range(layers)]
    atoms = [torch.stack([targets[t][source] for t in range(source, layers)], 1) for source in range(layers)]
    threshold = stored.drifted(threshold, _clt_factor(stored, atoms))
    b_dec = [stored.bias(f"b_D.{t}", d) for t in range(layers)]
    scales = torch.tensor([stored.scale(hook) for hook in writes])
    card = stored.card()
    parts: list[Any] = [
        to_dictionary(
            Record(
                encoder=encoders[at].T,
                atoms=rows.flatten(1),
                b_enc=biases[at],
                b_dec=torch.zeros(rows[0].numel()),
                selection=selection,
                options=options,
                threshold=None if threshold is None else threshold[at],
                wiring="transcoder",
                domain=_domain(stored),
                scale_in=stored.scale(reads[at]),
                card=card,
            )
        )
        for at, rows in enumerate(atoms)
    ]
    with torch.no_grad():
        for at, part in enumerate(parts):
            # ranks and thresholds look at norms as they are stored; only then come the units of the targets
            part.atoms.weight.div_(scales[at:].repeat_interleave(d))
    return cross_layer(parts, torch.cat(b_dec) / scales.repeat_interleave(d))


def _clt_factor(stored: Stored, atoms: list[Tensor]) -> Tensor | None:
    """What thresholds of training are, of stored ones [layer, feature]: folding divided them by the input's factor alone."""
    reads, writes = stored.hooks
    if _domain(stored) == "pre":
        return torch.ones(())
    read, written = ([_factor(stored, hook) for hook in side] for side in (reads, writes))
    if None in (*read, *written):
        return None
    out = []
    for at, rows in enumerate(atoms):
        lengths = torch.linalg.vector_norm(rows, dim=2)
        units = torch.tensor([1 / float(f or 1) for f in written[at:]])
        before = torch.linalg.vector_norm(lengths * units, dim=1) * float(read[at] or 1)
        out.append(torch.linalg.vector_norm(lengths, dim=1) / before)
    return torch.stack(out).nan_to_num(1.0)


def _crosscoder(stored: Stored) -> Dictionary:
    d, n, (hooks, _) = stored.d, stored.n_features, stored.hooks
    heads = len(hooks)
    selection, options, threshold = stored.selection(n)
    scales = torch.tensor([stored.scale(hook) for hook in hooks])
    encoder = stored.take("W_E", heads, d, n) * scales[:, None, None]
    bias, b_dec = stored.take("b_E", heads, n).sum(0), stored.take("b_D", heads, d)
    atoms = stored.take("W_D", heads, n, d)
    factors = [_factor(stored, hook) for hook in hooks]
    known = [factor for factor in factors if factor is not None]
    alike = len(known) == heads and max(known) < min(known) * (1 + OFF)
    threshold = stored.drifted(threshold, known[0] if alike else None)
    norms = torch.linalg.vector_norm(atoms, dim=2)
    rows = encoder.permute(2, 0, 1).flatten(1)
    if stored.heads == "each":
        if selection == "topk":
            raise SaekitError(
                f"{stored.where} is topk, which ranks every head by itself, and saekit's ranks all features of a row; there is no way to convert it"
            )
        rows, bias = rows.repeat(heads, 1), bias.repeat(heads)
        written = torch.block_diag(*atoms)
        threshold = None if threshold is None else (threshold / norms.clamp(min=1e-30)).flatten()
    else:
        spread = float((norms / norms.mean(0)).sub(1).abs().max())
        # a ReLU looks at signs; all else looks at norms, which one code can only follow where heads agree
        if selection != "relu" and (spread > 1e-6 or selection == "topk"):
            way = (
                "read features of each head by themselves with heads = 'each'"
                if selection == "jumprelu"
                else "there is no way to convert it"
            )
            raise SaekitError(
                f"{stored.where} is a crosscoder of act_fn {stored.config['act_fn']!r}, which turns a feature on for each head by the norm it has there, and saekit's features are on for all; {way}"
            )
        written = atoms.permute(1, 0, 2).flatten(1)
        threshold = None if threshold is None else threshold / norms[0]
    made = Record(
        encoder=rows, atoms=written / scales.repeat_interleave(d), b_enc=bias,
        b_dec=b_dec.flatten() / scales.repeat_interleave(d), selection=selection, options=options, threshold=threshold,
        card=stored.card(),
    )  # fmt: skip
    return rewired(to_dictionary(made), "crosscoder", d_in=(d,) * heads)


def _lorsa(stored: Stored) -> Dictionary:
    c, d, n, ((read,), (write,)) = stored.config, stored.d, stored.n_features, stored.hooks
    selection, options, threshold = stored.selection(n)
    threshold = stored.drifted(threshold, _factor(stored, write) if _domain(stored) == "norm" else 1.0)
    scale = stored.scale(read)
    rows = to_dictionary(
        Record(
            encoder=stored.take("W_V", n, d),
            atoms=stored.take("W_O", n, d),
            b_enc=stored.take("b_V", n),
            b_dec=stored.bias("b_D", d),
            selection=selection,
            options=options,
            threshold=threshold,
            wiring="transcoder",
            domain=_domain(stored),
            scale_in=scale,
            scale_out=stored.scale(write),
            card=stored.card(),
        )
    )
    heads, d_qk, turns = c["n_qk_heads"], c["d_qk_head"], c["positional_embedding_type"] == "rotary"
    if turns and c["rotary_scale"] != 1:
        raise SaekitError(
            f"{stored.where} has rotary_scale = {c['rotary_scale']}, which repeats dimensions of queries and keys; read are those of 1"
        )
    settings: dict[str, Any] = {
        "n_qk": heads, "d_qk": d_qk, "attn_scale": 1 / (c["attn_scale"] or d_qk**0.5), "qk_norm": c["use_post_qk_ln"],
        "eps": c["eps"], "rotary": c["rotary_dim"] if turns else 0, "rotary_base": float(c["rotary_base"]),
        "rotary_pairs": "neighbours" if c["rotary_adjacent_pairs"] else "halves",
    }  # fmt: skip
    out: Any = rewired(rows, "lorsa", d_in=d, d_out=d, **settings)
    patterns = out.wiring.patterns
    with torch.no_grad():
        for side in "QK":
            kept = stored.tensors.get(f"W_{side}", torch.zeros(heads)).shape[0] or 1
            if heads % kept:
                raise SaekitError(
                    f"{stored.where} has {kept} QK heads, and {CONFIG} says {heads}; get the files again"
                )
            weight, bias = stored.take(f"W_{side}", kept, d, d_qk), stored.take(f"b_{side}", kept, d_qk)
            getattr(patterns, f"W_{side}").copy_((weight.mT * scale).repeat_interleave(heads // kept, 0))
            getattr(patterns, f"b_{side}").copy_(bias.repeat_interleave(heads // kept, 0))
            if c["use_post_qk_ln"]:
                _set_norm(
                    stored, getattr(patterns, f"norm_{side.lower()}"), f"ln_{side.lower()}.w", kept, d_qk
                )
        if turns:
            _set_turns(stored, patterns)
    for name in ("mask", "IGNORE", "rotary_sin", "rotary_cos"):
        stored.tensors.pop(name, None)
    return out


def _set_norm(stored: Stored, weight: Tensor, name: str, heads: int, d_qk: int) -> None:
    given = stored.take(name, heads, d_qk)
    if stored.config["normalization_type"] != "RMS" or (given - given[:1]).abs().max() > 0:
        raise SaekitError(
            f"{stored.where} normalises queries and keys by weights of each head's own ({name!r}), and saekit's heads share theirs; there is no way to convert it"
        )
    weight.copy_(given[0])


def _set_turns(stored: Stored, patterns: Any) -> None:
    """The angles by which queries and keys turn; compared with the file's own tables."""
    c, frequencies = stored.config, patterns.frequencies
    if c["use_NTK_by_parts_rope"]:  # Peng et al. 2023 (2309.00071), section 3.2, as Llama 3.1 has it
        length, low, high = (
            c["old_context_len"],
            c["NTK_by_parts_low_freq_factor"],
            c["NTK_by_parts_high_freq_factor"],
        )
        turns = length * frequencies / (2 * math.pi)  # of the old context
        share = ((turns - low) / (high - low)).clamp(0, 1) if high != low else (turns > low).float()
        frequencies.copy_(frequencies * (share + (1 - share) / c["NTK_by_parts_factor"]))
    for name, function in (("rotary_sin", torch.sin), ("rotary_cos", torch.cos)):
        if name in stored.tensors:
            table = stored.take(name, c["n_ctx"], c["rotary_dim"])
            angles = torch.arange(c["n_ctx"])[:, None] * frequencies
            both = angles.repeat_interleave(2, 1) if c["rotary_adjacent_pairs"] else angles.repeat(1, 2)
            if (function(both) - table).abs().max() > 1e-2:  # those of bfloat16 are that coarse
                raise SaekitError(
                    f"{stored.where} holds a {name!r} that is not what {CONFIG} says of positions; get the files again"
                )


def _molt(stored: Stored) -> Dictionary:
    c, d, n, ((read,), (write,)) = stored.config, stored.d, stored.n_features, stored.hooks
    counts = {
        int(rank): count
        for rank, count in c["rank_counts"].items()
        if rank.isdigit() and int(rank) and count > 0
    }
    if len(counts) != len(c["rank_counts"]) or not counts:
        raise SaekitError(
            f"{stored.where} has rank_counts = {str(c['rank_counts'])[:60]}; expected how many maps there are of each rank"
        )
    ranks = tuple(sorted(counts))
    selection, options, threshold = stored.selection(n)
    norm = _domain(stored) == "norm"
    threshold = stored.drifted(threshold, _factor(stored, write if norm else read))
    U = {r: stored.take(f"U_matrices.{r}", counts[r], d, r) for r in ranks}
    V = {r: stored.take(f"V_matrices.{r}", counts[r], r, d) for r in ranks}
    encoder, bias = stored.take("W_E", d, n).T, stored.take("b_E", n)
    if norm and selection != "relu":
        norms = torch.cat([torch.linalg.matrix_norm(U[r] @ V[r]) for r in ranks]).clamp(min=1e-30)
        if threshold is not None:
            threshold = threshold / norms
        else:
            encoder, bias = encoder * norms[:, None], bias * norms
            U = {
                r: u / part[:, None, None]
                for (r, u), part in zip(U.items(), norms.split([counts[r] for r in ranks]), strict=True)
            }
            stored.told.append(
                "the encoder was multiplied by the maps' norms, by which features were ranked, and the maps divided: codes are pre-activations times norms"
            )
    scale, scale_out = stored.scale(read), stored.scale(write)
    record = Record(
        encoder=encoder, atoms=torch.zeros(n, d), b_enc=bias, b_dec=stored.bias("b_D", d), selection=selection,
        options=options, threshold=threshold, wiring="transcoder", scale_in=scale, scale_out=scale_out, card=stored.card(),
    )  # fmt: skip
    out: Any = rewired(
        to_dictionary(record), "molt", d_in=d, d_out=d, ranks=ranks, counts=tuple(counts[r] for r in ranks)
    )
    with torch.no_grad():
        out.V.copy_(torch.cat([V[r].flatten(0, 1) for r in ranks]) * scale)
        out.atoms.weight.copy_(torch.cat([U[r].mT.flatten(0, 1) for r in ranks]) / scale_out)
    return out


READERS = {"sae": _sae, "clt": _clt, "crosscoder": _crosscoder, "lorsa": _lorsa, "molt": _molt}
