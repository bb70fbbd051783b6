"""What is read: files, folders, data sets, chats, token rows, pixels."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_harvest import POINT, by_hand, rows_of_tokens
from torch import nn

from saekit import stdlib
from saekit.harvest import harvest
from saekit.models import Model, load_model
from saekit.tokens import Special, documents
from saekit.types import SaekitError

CHAT_TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>\n{{ m['content'] }}\n{% endfor %}"


SNIPPETS = [
    "import os\nprint(os.sep)\n",
    "class A:\n    x = 1\n",
    "def f(a, b):\n    return a + b\n",
    "for i in range(9):\n    pass\n",
]


def write_file(folder: Path) -> Any:
    (folder / "text.py").write_text(SNIPPETS[0])
    return folder / "text.py", SNIPPETS[:1]


def write_folder(folder: Path) -> Any:
    for i, text in enumerate(SNIPPETS):
        (folder / "src" / f"d{i}").mkdir(parents=True)
        (folder / "src" / f"d{i}" / "a.py").write_text(text)
    (folder / "src" / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (folder / "src" / ".hidden").write_text("not this")
    return folder / "src", SNIPPETS


def write_saved_dataset(folder: Path) -> Any:
    import datasets

    datasets.Dataset.from_dict({"id": [1, 2, 3, 4], "text": SNIPPETS}).save_to_disk(folder / "data")
    return str(folder / "data"), SNIPPETS


def write_jsonl(folder: Path) -> Any:
    (folder / "data.jsonl").write_text(
        "".join(json.dumps({"n": i, "text": t}) + "\n" for i, t in enumerate(SNIPPETS))
    )
    return str(folder / "data.jsonl"), SNIPPETS


def write_csv(folder: Path) -> Any:
    (folder / "data.csv").write_text("n,code\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(SNIPPETS)))
    return str(folder / "data.csv"), SNIPPETS


@pytest.mark.parametrize(
    "write", [lambda _: (SNIPPETS, SNIPPETS), lambda _: (iter(SNIPPETS), SNIPPETS), write_file, write_folder, write_saved_dataset, write_jsonl, write_csv],
    ids=["list", "iterator", "file", "folder", "saved data set", "jsonl", "csv"],
)  # fmt: skip
def test_every_kind_of_text_is_read_whole_one_document_per_row(
    tiny_gpt2: Model, tmp_path: Path, write: Callable[[Path], Any]
) -> None:
    text, expected = write(tmp_path)
    stream = harvest(tiny_gpt2, text, POINT, isolate=True, split="all", context=32, outlier=1e9, batch_rows=3)
    rows = [(b.tokens[r], b.documents[r], b.mask[r]) for b in stream for r in range(len(b.mask))]
    assert len(rows) == len(expected)
    found = [tiny_gpt2.tokenizer.decode(tokens[mask]) for tokens, _, mask in rows]
    assert sorted(found) == sorted(expected)
    for i, (_tokens, owners, mask) in enumerate(rows):
        assert set(owners[mask].tolist()) == {i}
        assert set(owners.tolist()) <= {i, -1}


def test_packed_rows_hold_several_documents_and_lose_nothing_between_them(tiny_gpt2: Model) -> None:
    docs = [d.text[:2000] for d in itertools.islice(documents("stdlib", "train"), 12)]
    stream = harvest(tiny_gpt2, docs, POINT, context=64, tokens=None)
    tokens = torch.cat([b.tokens for b in stream])
    owners = torch.cat([b.documents for b in stream])
    special = Special.of(tiny_gpt2.tokenizer)
    assert (tokens[:, 0] == special.prefix[0]).all()
    packed = tokens[:, 1:].reshape(-1).tolist()
    expected: list[int] = []
    for doc in docs:
        expected += [
            *tiny_gpt2.tokenizer(doc, add_special_tokens=False, verbose=False)["input_ids"],
            *special.separator,
        ]
    assert packed == expected[: len(packed)]
    assert len(expected) - len(packed) < 63  # at most one row is not filled
    assert (owners[:, 1:].reshape(-1).diff() >= 0).all()
    assert any(len(set(row.tolist())) > 1 for row in owners)


def test_tokens_limits_what_is_read_to_whole_rows(tiny_gpt2: Model) -> None:
    for wanted, rows in ((1, 1), (64, 1), (65, 2), (64 * 21, 21)):
        stream = harvest(tiny_gpt2, "stdlib", POINT, tokens=wanted, context=64, batch_rows=8)
        assert sum(len(b.mask) for b in stream) == rows


def test_the_split_of_a_named_text_is_a_partition_that_does_not_depend_on_the_way_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": f"document {i}"}) for i in range(200)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    sides = {}
    for name in ("data.jsonl", "./data.jsonl", str(tmp_path / "data.jsonl")):
        sides[name] = [[d.text for d in documents(name, split)] for split in ("train", "held_out", "all")]
    train, held_out, every = sides["data.jsonl"]
    assert sorted(train + held_out) == sorted(every) == sorted(f"document {i}" for i in range(200))
    assert 3 <= len(held_out) <= 30  # one in sixteen
    assert all(side == sides["data.jsonl"] for side in sides.values())


def test_the_standard_library_is_split_by_family() -> None:
    train, held_out = stdlib.files("train"), stdlib.files("held_out")
    assert sorted(train + held_out) == stdlib.files("all")
    assert len(train) > 5 * len(held_out) > 0
    assert not {stdlib.family(n) for n in train} & {stdlib.family(n) for n in held_out}
    assert not [n for n in train + held_out if "site-packages" in n]


CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "import what?"}, {"role": "assistant", "content": "import os"}],
    [{"role": "user", "content": "user"}, {"role": "assistant", "content": "x = 1"}, {"role": "user", "content": "and"}, {"role": "assistant", "content": "y = 2"}],
]  # fmt: skip


@pytest.fixture
def chatty(tiny_gpt2: Model) -> Model:
    """The tiny GPT-2 with a tokenizer that has a chat template."""
    tokenizer = copy.deepcopy(tiny_gpt2.tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return load_model(tiny_gpt2.module, tokenizer=tokenizer, name="chatty")


@pytest.mark.parametrize("roles", [None, ("assistant",), ("user", "system")])
@pytest.mark.parametrize("source", ["list", "data set"])
def test_of_a_chat_only_the_roles_asked_for_count(
    chatty: Model, tmp_path: Path, roles: tuple[str, ...] | None, source: str
) -> None:
    text: Any = CHATS
    if source == "data set":
        text = tmp_path / "chats.jsonl"
        text.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    stream = harvest(chatty, text, POINT, roles=roles, isolate=True, split="all", outlier=1e9)
    rows = [(b.tokens[r], b.mask[r]) for b in stream for r in range(len(b.mask))]
    for chat, (tokens, mask) in zip(CHATS, rows, strict=True):
        said = [f"<{m['role']}>\n{m['content']}\n" for m in chat if roles is None or m["role"] in roles]
        assert chatty.tokenizer.decode(tokens[mask]) == "".join(said)
        whole = chatty.tokenizer.decode(tokens, skip_special_tokens=True)
        assert whole == "".join(f"<{m['role']}>\n{m['content']}\n" for m in chat)  # the model reads it all


def test_one_chat_by_itself_is_a_text_and_a_bad_one_is_refused(chatty: Model, tiny_gpt2: Model) -> None:
    (batch,) = harvest(chatty, CHATS[0], POINT, roles=["assistant"], isolate=True, outlier=1e9)
    assert chatty.tokenizer.decode(batch.tokens[0][batch.mask[0]]) == "<assistant>\nimport os\n"
    with pytest.raises(SaekitError, match="no chat template"):
        list(harvest(tiny_gpt2, CHATS, POINT))
    chatty.tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}LAST {% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(SaekitError, match="writes message 1 of a chat differently"):
        list(harvest(chatty, CHATS, POINT, roles=["user"]))
    chatty.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(SaekitError, match="no system message"):
        list(harvest(chatty, CHATS, POINT))


@pytest.mark.parametrize("form", ["tensor", "list of batches", "list of rows"])
def test_token_rows_are_taken_as_they_are(tiny_gpt2: Model, form: str) -> None:
    ids = rows_of_tokens(6, "none")["input_ids"]
    ids[2, 3] = 0
    text: Any = {"tensor": ids, "list of batches": [ids[:4], ids[4:]], "list of rows": list(ids)}[form]
    batches = list(harvest(tiny_gpt2, text, POINT, batch_rows=4))
    assert [len(b.mask) for b in batches] == ([1] * 6 if form == "list of rows" else [4, 2])
    assert torch.equal(torch.cat([b.tokens for b in batches]), ids)
    assert torch.equal(torch.cat([b.mask for b in batches]), ids != 0)
    for b in batches:
        expected, _ = by_hand(tiny_gpt2, "transformer.h.1", "out", {"input_ids": b.tokens})
        assert torch.equal(b.activations[POINT], expected)
    assert torch.equal(torch.cat([b.documents for b in batches])[:, 0], torch.arange(6))


def test_pixels_are_taken_as_they_are(tmp_path: Path) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    vit = ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
        )
    ).eval()
    pixels = torch.randn(6, 3, 16, 16)
    with torch.no_grad():
        states = vit(pixels, output_hidden_states=True).hidden_states
    stream = harvest(vit, pixels, ["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre"], batch_rows=6)
    (batch,) = stream
    for x in batch.activations.values():
        assert torch.equal(x, states[1])
    assert batch.mask.shape == (6, 17) and batch.mask.all() and batch.tokens is None
    assert torch.equal(batch.documents, torch.arange(6)[:, None].expand(6, 17))
    store = harvest(vit, [pixels[:3], pixels[3:]], "blocks.0.hook_resid_post", out=tmp_path / "acts")
    back = torch.cat([b.activations["blocks.0.hook_resid_post"] for b in store.sequences()])
    assert torch.allclose(back, states[1], atol=1e-6)


def test_rows_of_different_lengths_do_not_go_into_one_store(tiny_gpt2: Model, tmp_path: Path) -> None:
    texts = [torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64)]
    assert [b.mask.shape[1] for b in harvest(tiny_gpt2, texts, POINT)] == [8, 9]
    with pytest.raises(SaekitError, match="9 positions and the rows before it 8"):
        harvest(tiny_gpt2, texts, POINT, out=tmp_path / "acts")


def test_an_endless_text_is_read_no_further_than_asked(tiny_gpt2) -> None:
    read = 0

    def lines():
        nonlocal read
        while True:
            read += 1
            yield f"def f{read}(x):\n    return x + {read}\n" * 20

    stream = harvest(tiny_gpt2, lines(), POINT, tokens=256, context=64)
    first, again = ([batch.tokens for batch in stream] for _ in range(2))
    assert sum(t.numel() for t in first) == 256
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert read < 300


@pytest.mark.parametrize("kind", ["dataset", "iterable", "dict"])
def test_data_set_objects_are_texts(kind: str, tiny_gpt2, tmp_path: Path) -> None:
    import datasets

    texts = [f"import os  # {i}\n" * 30 for i in range(40)]
    data = datasets.Dataset.from_dict({"id": list(range(40)), "text": texts})
    given = {
        "dataset": data,
        "iterable": data.to_iterable_dataset(),
        "dict": datasets.DatasetDict(train=data),
    }
    same = harvest(tiny_gpt2, texts, POINT, tokens=512, context=64)
    mine = harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64)
    for a, b in zip(same, mine, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.activations[POINT], b.activations[POINT])
    store = harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts")
    assert store.manifest["complete"]
    if kind == "iterable":  # what has no fingerprint can't be told from another
        with pytest.raises(SaekitError, match="can't be compared"):
            harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts")
        return
    assert (
        harvest(tiny_gpt2, given[kind], POINT, tokens=512, context=64, out=tmp_path / "acts").n_rows
        == store.n_rows
    )


def test_a_mapping_is_one_input_of_the_model(tiny_gpt2) -> None:
    encoded = tiny_gpt2.tokenizer(["import os"] * 2, return_tensors="pt", return_token_type_ids=False)
    (batch,) = harvest(tiny_gpt2, encoded, POINT)
    assert torch.equal(batch.tokens, encoded["input_ids"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (5, "text is of type int"),
        (["a", 5], "text item 1 is of type int"),
        ([], "is empty"),
        (iter([]), "is empty"),
    ],
)
def test_what_is_no_text_is_refused(text: Any, words: str, tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=words):
        harvest(tiny_gpt2, text, POINT)


@pytest.mark.parametrize(("ids", "said"), [([[1, 2, 3]], "that of a list"), (torch.tensor([1, 2]), r"\[2\]")])
def test_token_ids_are_tensors_of_rows(ids: Any, said: str, tiny_gpt2) -> None:
    with pytest.raises(
        SaekitError, match=rf"input_ids of text item 0 have shape {said}; give a tensor \[batch, seq\]"
    ):
        next(iter(harvest(tiny_gpt2, [{"input_ids": ids}], POINT)))


def test_a_text_without_rows_leaves_no_folder(tiny_gpt2, tmp_path: Path) -> None:
    (tmp_path / "b.py").write_text("import os\n")
    with pytest.raises(SaekitError, match="side of its split"):
        harvest(tiny_gpt2, tmp_path / "b.py", POINT, split="held_out", out=tmp_path / "acts")
    assert not (tmp_path / "acts").exists()


def test_tensors_are_read_no_further_than_asked_and_not_kept(mlp: nn.Module, tmp_path: Path) -> None:
    read = []

    def rows():
        for i in itertools.count():
            read.append(i)
            yield torch.randn(16, 8)

    store = harvest(mlp, rows(), ["0"], tokens=100, out=tmp_path / "acts")
    assert sum(entry["tokens"] for entry in store.manifest["shards"]) == 112 and len(read) <= 9


def test_the_text_column_is_never_guessed_among_several(tiny_gpt2, tmp_path: Path) -> None:
    import datasets

    rows = {"id": ["a", "b"], "content": ["import os\n" * 60] * 2}
    same = list(harvest(tiny_gpt2, rows["content"], POINT, tokens=64, context=64))
    mine = list(harvest(tiny_gpt2, datasets.Dataset.from_dict(rows), POINT, tokens=64, context=64))
    assert torch.equal(same[0].tokens, mine[0].tokens)
    listed = list(harvest(tiny_gpt2, [{"text": t} for t in rows["content"]], POINT, tokens=64, context=64))
    assert torch.equal(same[0].tokens, listed[0].tokens)
    for columns, words in (
        ({"a": ["x"], "b": ["y"]}, "several text columns"),
        ({"text": [["x"]]}, "row 0 of the data set given has a list"),
    ):
        with pytest.raises(SaekitError, match=words):
            list(harvest(tiny_gpt2, datasets.Dataset.from_dict(columns), POINT))
    blank = datasets.Dataset.from_dict({"text": [None, *rows["content"]]})
    assert torch.equal(
        next(iter(harvest(tiny_gpt2, blank, POINT, tokens=64, context=64))).tokens, same[0].tokens
    )


def test_integers_are_no_activations(tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=r"gives torch.int64, no activations"):
        list(harvest(tiny_gpt2, ["import os\n" * 60], "transformer.wte:in", tokens=64))


def test_roles_choose_among_chats(tiny_gpt2) -> None:
    with pytest.raises(SaekitError, match=r"roles = \['user'\] choose among the messages"):
        list(harvest(tiny_gpt2, ["import os\n" * 60], POINT, tokens=64, roles="user"))
