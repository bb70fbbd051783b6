"""Encodings by row blocks in plain torch, on any device and in any dtype."""

import torch

BLOCK = 1 << 22  # pre-activations held at a time


def largest(keys, k):
    """Places of the k largest of each row, by falling key, exact ties to the lowest place.

    torch.topk promises no order among equal keys, so rows with a tie at or above the k-th place
    are redone with a stable sort; on real activations there are hardly any.
    """
    if k == keys.shape[-1]:
        return torch.sort(keys, dim=-1, descending=True, stable=True).indices
    values, places = keys.topk(k + 1, dim=-1)
    tied = (values[..., 1:] == values[..., :-1]).any(-1)
    places = places[..., :k].contiguous()
    if tied.any():
        places[tied] = torch.sort(keys[tied], dim=-1, descending=True, stable=True).indices[:, :k]
    return places


def _blocks(x, weight, bias):
    """Pre-activations, block of rows by block of rows."""
    size = max(1, BLOCK // len(weight))
    for start in range(0, len(x), size):
        pre = torch.addmm(bias, x[start : start + size], weight.T)
        if not torch.isfinite(pre).all():
            for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
                bad = (
                    (~torch.isfinite(tensor)).flatten(1).any(-1)
                    if tensor.ndim > 1
                    else ~torch.isfinite(tensor)
                )
                if bad.any():
                    raise ValueError(f"{name} holds NaN or Inf in row {int(bad.nonzero()[0])}; remove it")
            raise ValueError("x and weight are so large that their products overflow; scale them down")
        yield start, pre


def topk(x, weight, bias, k, group, absolute, dead, k_aux, shortlist):
    """Values and indices of the k largest per row and group; and of the k_aux largest dead ones per row."""
    n = len(weight)
    widths = [k * (n // group)] + ([k_aux] if dead is not None else [])
    out = [
        (x.new_empty(len(x), w), torch.empty(len(x), w, dtype=torch.int32, device=x.device)) for w in widths
    ]
    first = torch.arange(0, n, group, device=x.device)
    for start, pre in _blocks(x, weight, bias):
        part = slice(start, start + len(pre))
        keys = (pre.abs() if absolute else pre).unflatten(-1, (-1, group))
        places = (largest(keys, k) + first[:, None]).flatten(1)
        out[0][0][part], out[0][1][part] = pre.gather(-1, places), places
        if dead is not None:
            masked = pre.masked_fill(~dead, -torch.inf)
            places = largest(masked, k_aux)
            values = masked.gather(-1, places)
            out[1][0][part], out[1][1][part] = values, places.masked_fill(values == -torch.inf, 0)
    return tuple(tensor for pair in out for tensor in pair)


def batchtopk(x, weight, bias, k, shortlist):
    """CSR of the k * rows largest entries of the batch; exact ties go to the first row, then feature.

    No row can have more than all n entries among them, so after each block only the k * rows
    largest met so far are kept.
    """
    most, n = k * len(x), len(weight)
    values, places = x.new_empty(0), torch.empty(0, dtype=torch.int64, device=x.device)
    for start, pre in _blocks(x, weight, bias):
        values = torch.cat([values, pre.flatten()])
        places = torch.cat([places, torch.arange(start * n, start * n + pre.numel(), device=x.device)])
        if len(values) > most:  # places rise, so the lower one stands first among equal values
            chosen = torch.sort(values, descending=True, stable=True).indices[:most].sort().values
            values, places = values[chosen], places[chosen]
    return _rows(places // n, places % n, values, len(x))


def threshold(x, weight, bias, lower, shortlist):
    """CSR of the entries above their feature's ``lower``."""
    rows, features, values = [x.new_empty(0).long()], [x.new_empty(0).long()], [x.new_empty(0)]
    for start, pre in _blocks(x, weight, bias):
        r, f = (pre > lower).nonzero(as_tuple=True)
        rows.append(r + start)
        features.append(f)
        values.append(pre[r, f])
    return _rows(torch.cat(rows), torch.cat(features), torch.cat(values), len(x))


def _rows(rows, features, values, n_rows):
    offsets = torch.zeros(n_rows + 1, dtype=torch.int64, device=values.device)
    offsets[1:] = torch.bincount(rows, minlength=n_rows).cumsum(0)
    return offsets, features.int(), values
