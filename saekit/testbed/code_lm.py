"""Train code-lm, the small language model that ships with saekit, and measure what its card states.

    python -m saekit.testbed.code_lm train --out build/code-lm --minutes 90
    python -m saekit.testbed.code_lm card --out build/code-lm

A GPT-2 (4 layers, 256 wide, context 512, tied embeddings) with a byte-level BPE tokenizer of 4096
tokens, trained on the training side of :mod:`saekit.stdlib`. Hidden matrices are trained with Muon,
the rest with AdamW. Each row of a batch is ``<|endoftext|>`` followed by packed documents; a share
of the rows is a random sequence repeated, so that induction heads form early.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from saekit import stdlib

VOCAB, CONTEXT, WIDTH, LAYERS, HEADS = 4096, 512, 256, 4, 8
ROWS = 16  # rows of CONTEXT tokens in a step
REPEATED = 0.08  # share of rows that are a repeated random sequence
EOT = "<|endoftext|>"


def build_tokenizer(texts):
    """Byte-level BPE as GPT-2's, with digits and runs of spaces kept short; id 0 is the separator."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    # words (with one leading space), single digits, punctuation runs, newline with its indentation
    pattern = r" ?[A-Za-z]+|\d|\n[ \t]*| ?[^\sA-Za-z\d]+|[ \t]+|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer, out):
    """Write tokenizer.json and a config that loads it as it is (GPT2Tokenizer would rebuild the splitting)."""
    from transformers import PreTrainedTokenizerFast

    special = dict.fromkeys(("bos_token", "eos_token"), EOT)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **special).save_pretrained(
        out
    )


def encode_corpus(tokenizer, split):
    """All documents of one side of the split as one array, each preceded by the separator."""
    docs = list(stdlib.documents(split))
    encoded = tokenizer.encode_batch([d.text for d in docs], add_special_tokens=False)
    ids = np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in encoded])
    return ids, sum(len(d.text.encode()) for d in docs), docs


def build_model():
    """A freshly initialised GPT-2 of code-lm's shape."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        activation_function="gelu_pytorch_tanh",  # GPT-2's own function, by torch's fused kernel
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return GPT2LMHeadModel(config)


class Batches:
    """Rows of the corpus in a seeded order, a new random offset every epoch, plus repeated rows."""

    def __init__(self, ids, seed=0):
        self.ids, self.rng, self.queue = ids, np.random.default_rng(seed), np.empty(0, dtype=np.int64)

    def next(self):
        """``(input ids, labels)``, both [ROWS, CONTEXT]; a label of -100 is not trained on."""
        rows, labels = np.zeros((ROWS, CONTEXT), dtype=np.int64), None
        n_repeated = self.rng.binomial(ROWS, REPEATED)
        body = CONTEXT - 1
        while len(self.queue) < ROWS:
            starts = np.arange(self.rng.integers(body), len(self.ids) - body, body)
            self.queue = np.concatenate([self.queue, self.rng.permutation(starts)])
        for i in range(ROWS - n_repeated):
            rows[i, 1:] = self.ids[self.queue[i] : self.queue[i] + body]
        self.queue = self.queue[ROWS - n_repeated :]
        labels = rows.copy()
        for i in range(ROWS - n_repeated, ROWS):
            period = int(self.rng.integers(16, body // 2 + 1))
            unit = self.rng.integers(1, VOCAB, period)
            rows[i, 1:] = np.resize(unit, body)
            labels[i] = rows[i]
            labels[i, : period + 1] = -100  # the first copy is noise: nothing to learn
        return torch.from_numpy(rows), torch.from_numpy(labels)


def loss_fn(model, x, y):
    """Mean next-token cross-entropy in nats over the labels that are not -100."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        logits = model(input_ids=x).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten(), ignore_index=-100)


def save(model, out):
    """Write config.json and fp16 weights as a Hugging Face folder."""
    state = {
        name: tensor.half() for name, tensor in model.state_dict().items() if name != "lm_head.weight"
    }  # tied
    model.save_pretrained(out, state_dict=state)


def train(out, minutes, seed=0, device="cpu", compiled=True, peak_lr=0.02):
    """Train for a fixed time; the learning rate falls linearly to zero over the last 60 % of it."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(d.text for d in stdlib.documents("train"))
    save_tokenizer(tokenizer, out)
    ids, n_bytes, docs = encode_corpus(tokenizer, "train")
    print(f"{len(docs)} files, {n_bytes / 1e6:.1f} MB, {len(ids) / 1e6:.2f}M tokens", flush=True)
    model = build_model().to(device)
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." in n]
    embeds = [p for n, p in model.named_parameters() if p.ndim == 2 and ".h." not in n]
    small = [p for n, p in model.named_parameters() if p.ndim < 2]
    muon = torch.optim.Muon(hidden, lr=peak_lr, momentum=0.95, weight_decay=0.05)
    adam = torch.optim.AdamW(
        [{"params": embeds, "lr": 3e-3}, {"params": small, "lr": 3e-3}],
        betas=(0.9, 0.95), weight_decay=0.0,
    )  # fmt: skip
    base = [(g, g["lr"]) for opt in (muon, adam) for g in opt.param_groups]
    loss_of = torch.compile(loss_fn) if compiled else loss_fn
    batches, start, step, log = Batches(ids, seed), time.time(), 0, []
    while (done := (time.time() - start) / (60 * minutes)) < 1:
        scale = min(1.0, (step + 1) / 100, max(0.02, (1 - done) / 0.6))
        for group, lr in base:
            group["lr"] = lr * scale
        x, y = (t.to(device) for t in batches.next())
        loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in (muon, adam):
            opt.step()
            opt.zero_grad(set_to_none=True)
        step += 1
        log.append(loss.item())
        if step % 50 == 0:
            rate = step * ROWS * CONTEXT / (time.time() - start)
            print(f"step {step} done {done:.3f} loss {np.mean(log[-50:]):.4f} {rate:.0f} tok/s", flush=True)
        if step % 500 == 0:
            save(model, out)
    save(model, out)
    tokens = step * ROWS * CONTEXT
    (out / "training.json").write_text(
        json.dumps({"steps": step, "tokens": tokens, "minutes": minutes, "seed": seed})
    )


def token_losses(model, ids, device="cpu"):
    """Loss in nats of every token after the first: windows of CONTEXT, each token scored once.

    Windows overlap by half, so that a token has at least CONTEXT / 2 tokens of context, and begin
    with the separator as in training.
    """
    body, half = CONTEXT - 1, CONTEXT // 2
    losses = np.zeros(len(ids) - 1)
    starts = list(range(0, max(1, len(ids) - half + 1), half))
    for group in range(0, len(starts), ROWS):
        rows = np.zeros((min(ROWS, len(starts) - group), CONTEXT), dtype=np.int64)
        for i, start in enumerate(starts[group : group + ROWS]):
            part = ids[start : start + body]
            rows[i, 1 : len(part) + 1] = part
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(rows).to(device)).logits.float()
        targets = torch.from_numpy(rows)[:, 1:].to(device)
        found = F.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none").cpu().numpy()
        for i, start in enumerate(starts[group : group + ROWS]):
            # found[i, j] is the loss of ids[start + j]; the first window scores all, later ones their second half
            first = 1 if start == 0 else body - half
            end = min(body, len(ids) - start)
            losses[start + first - 1 : start + end - 1] = found[i, first:end]
    return losses


def induction(model, n=64, period=128, seed=1):
    """Losses in nats on the second copy of a repeated random sequence, and on the same copy shuffled."""
    rng = np.random.default_rng(seed)
    units = rng.integers(1, VOCAB, (n, period))
    shuffled = rng.permuted(units, axis=1)
    losses = []
    for second in (units, shuffled):
        rows = torch.from_numpy(np.concatenate([np.zeros((n, 1), dtype=np.int64), units, second], 1))
        with torch.no_grad():
            logits = model(input_ids=rows).logits.float()
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), rows[:, 1:], reduction="none")
        losses.append(loss[:, period:].mean().item())
    return losses


def measure(folder):
    """Everything that the card states, measured on the fp16 weights as they ship."""
    from saekit.models import load_model
    from saekit.testbed.ngram import KneserNey

    view = load_model(folder)
    train_ids, train_bytes, _ = encode_corpus(view.tokenizer.backend_tokenizer, "train")
    ids, n_bytes, docs = encode_corpus(view.tokenizer.backend_tokenizer, "held_out")
    losses = token_losses(view.module, ids.astype(np.int64))
    text = ids[1:] != 0  # separators are no text

    baseline = -np.log(KneserNey(train_ids, VOCAB).probabilities(ids))
    copied, shuffled = induction(view.module)
    per_byte = 1 / (math.log(2) * n_bytes)
    return {
        "training": json.loads((Path(folder) / "training.json").read_text()),
        "train_bytes": train_bytes, "train_tokens": len(train_ids),
        "held_out_bytes": n_bytes, "held_out_tokens": int(text.sum()), "held_out_files": len(docs),
        "bits_per_byte": losses[text].sum() * per_byte,
        "five_gram_bits_per_byte": baseline[text[3:]].sum() * per_byte,
        "induction_copied": copied, "induction_shuffled": shuffled,
        "parameters": sum(p.numel() for p in view.module.parameters()),
        "families": sorted({hashlib.sha256(stdlib.family(d.name).encode()).hexdigest()[:12] for d in docs}),
    }  # fmt: skip


CARD = """# code-lm

A small GPT-2 over Python source: {LAYERS} layers, {WIDTH} wide, {HEADS} heads, context {CONTEXT}, byte-level BPE of
{VOCAB} tokens, {parameters:,} parameters, fp16. It ships with saekit so that everything runs offline.

| measured | value |
|---|---|
| bits per byte on held-out files | **{bits_per_byte:.3f}** |
| interpolated Kneser-Ney 5-gram, same tokens and training text | {five_gram_bits_per_byte:.3f} ({above:.0%} above) |
| induction: loss on the second copy of a repeated random sequence | {induction_copied:.2f} nats |
| the same second copy, shuffled | {induction_shuffled:.2f} nats |

**Data.** The source of the Python {python} standard library, {train_bytes:,} bytes ({train_tokens:,} tokens) for training.
Held out: {held_out_files} files, {held_out_bytes:,} bytes, of the module families whose SHA-256 is 0 modulo {share}
(`saekit/stdlib.py`; a module, its private twin and its tests are one family; machine-made tables such as the code
pages are in neither side). First 12 digits of their hashes:
{families}.

**Training.** {steps:,} steps of {rows} rows, {tokens:,} tokens in {minutes:.0f} minutes, Muon and AdamW, bf16 autocast, seed
{seed}; {repeated:.0%} of the rows are a random sequence repeated, which is where the induction comes from. Rows begin with
`<|endoftext|>`; documents are packed and attention crosses them. Script: `python -m saekit.testbed.code_lm train`.

**Bits per byte**: windows of {CONTEXT} tokens that overlap by half, each token scored once, separators left out.
**Induction**: 64 sequences of 128 random tokens, uniform over the vocabulary. **Licence**: Apache-2.0 for the weights; the
text they were trained on is under the PSF licence.
"""


def write_card(folder):
    """Measure, and write README.md and card.json beside the weights."""
    import platform

    folder = Path(folder)
    m = measure(folder)
    (folder / "card.json").write_text(json.dumps(m, indent=1))
    shapes = {
        "LAYERS": LAYERS,
        "WIDTH": WIDTH,
        "HEADS": HEADS,
        "CONTEXT": CONTEXT,
        "VOCAB": VOCAB,
        "rows": ROWS,
    }
    text = CARD.format(
        **{**m, **m["training"], **shapes, "families": ", ".join(m["families"])}, repeated=REPEATED,
        above=m["five_gram_bits_per_byte"] / m["bits_per_byte"] - 1, python=platform.python_version(), share=stdlib.HELD_OUT_SHARE,
    )  # fmt: skip
    (folder / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["train", "card"])
    parser.add_argument("--out", type=Path, default=Path("build/code-lm"))
    parser.add_argument("--minutes", type=float, default=90)
    args = parser.parse_args()
    if args.verb == "train":
        train(args.out, args.minutes)
    else:
        write_card(args.out)
