"""SAEBench's evaluations on dictionaries with planted faults: what is measured is what was planted (2503.09532)."""

from statistics import fmean

import torch

from saekit.evaluate.absorption import concept, measures, probed
from saekit.evaluate.core import controls_for
from saekit.evaluate.labelled import Labelled, Texts, atoms_of
from saekit.evaluate.probing import told
from saekit.evaluate.ravel import COORDINATES, WHOLE, disentanglement
from saekit.evaluate.scr_tpp import ABLATED as SIZES
from saekit.evaluate.scr_tpp import RANDOM as DRAWN
from saekit.evaluate.scr_tpp import mended, perturbed, scr_measures, tpp_measures
from saekit.evaluate.unlearning import unlearning
from saekit.models import load_model
from saekit.papers.claims import Claim, Reproduction, Tell, figure
from saekit.papers.controls import RANDOM
from saekit.papers.row import Found, Row
from saekit.testbed.facts import ATTRIBUTES, ENTITIES, facts
from saekit.testbed.labelled import CLASSES, CONCEPTS, WORDS, World, absorbing, classes, spurious

ROWS = 8000
RATES = (0.0, 0.25, 0.5, 1.0)
ABLATED = "5"  # features: the attributes have two, or four with both, and the others do nothing to probes
MET = 200  # entities of whom some are forgotten: of fewer, a value of another attribute may be theirs alone by chance
FEW, MANY = ("2", "5"), ("20", "50", "100")  # random ones, among which those of the classes are rare, or not


@torch.no_grad()
def _read(world: World, seed: int) -> dict[str, Labelled]:
    """What the planted dictionary and a random one make of a world's rows."""
    codes = world.dictionary.encode(world.x)
    random = controls_for(world.dictionary, codes, seed)["random"]
    return {
        "": Labelled(world.dictionary, world.x, codes),
        RANDOM: Labelled(random, world.x, random.encode(world.x)),
    }


def _absorption(seed: int) -> Found:
    out: Found = {"planted": {}, RANDOM: {}, "fraction": {}}
    for rate in RATES:
        world = absorbing(rate, ROWS, seed)
        of = probed(world.x, world.labels[0], seed)
        found = {
            name: [concept(one, atoms_of(one.dictionary, "absorption"), of, seed)]
            for name, one in _read(world, seed).items()
        }
        said = measures(found, seed)
        out["planted"][str(rate)] = float(said["absorption_full"])
        out["fraction"][str(rate)] = float(said["absorption_fraction"])
        out[RANDOM][str(rate)] = said["absorption_full"].control[RANDOM]
    return out


def _removal(seed: int) -> Found:
    out: Found = {}
    for name, entangled in (("isolated", False), ("entangled", True)):
        world = spurious(entangled, ROWS, seed)
        pair = (world.labels[0], world.labels[1])
        runs = {
            key: mended(one, atoms_of(one.dictionary, "scr"), pair, seed)
            for key, one in _read(world, seed).items()
        }
        said = scr_measures(runs, seed)
        each = {str(n): float(said[f"scr_{n}"]) for n in SIZES}
        out[name] = {
            "planted": each[ABLATED],
            RANDOM: said[f"scr_{ABLATED}"].control[RANDOM],
            "by size": each,
        }
    return out


def _perturbation(seed: int) -> Found:
    world = classes(ROWS // 2, seed)
    read = _read(world, seed)
    runs = {
        key: perturbed(one, atoms_of(one.dictionary, "tpp"), world.labels, seed) for key, one in read.items()
    }
    runs[DRAWN] = perturbed(read[""], atoms_of(world.dictionary, "tpp"), world.labels, seed, drawn=True)
    said = tpp_measures(runs, seed)
    few, many = (max(abs(said[f"tpp_{n}"].control[DRAWN]) for n in sizes) for sizes in (FEW, MANY))
    return {
        "planted": float(said["tpp_2"]),
        RANDOM: said["tpp_2"].control[RANDOM],
        DRAWN: few,
        "many drawn": many,
    }


def _probing(seed: int) -> Found:
    world = classes(ROWS // 2, seed)
    found = {}
    for name, one in _read(world, seed).items():
        hits = told(one, world.labels[0], seed)
        found[name or "planted"] = hits["features_1"].double().mean().item()
        found["one coordinate"] = hits["coordinates_1"].double().mean().item()
    return found


def _disentangling(seed: int) -> Found:
    world = facts(seed)
    lines, model = world.lines(), load_model(world.model, tokenizer=world.tokenizer)
    names = [name for name in lines[0] if name != "text"]
    attributes = {name: [line[name] for line in lines] for name in names}
    texts = Texts("facts", [line["text"] for line in lines], attributes)
    said = {
        name: disentanglement(d, model, texts, "a0", seed=seed)["disentanglement"]
        for name, d in (("values", world.of_values()), ("entities", world.of_entities()))
    }
    own = said["values"].control
    beside = {RANDOM: own["random"], COORDINATES: own[COORDINATES], WHOLE: own[WHOLE]}
    return {**{name: float(one) for name, one in said.items()}, **beside}


def _forgetting(seed: int) -> Found:
    """Texts of the entities with the commonest value of an attribute; chosen features are judged on other entities."""
    world = facts(seed, MET)
    lines, model = world.lines(), load_model(world.model, tokenizer=world.tokenizer)
    own = {f"e{i}": str(v) for i, v in enumerate(world.values[:, 0].tolist())}
    texts = Texts(
        "facts", [line["text"] + line["answer"] for line in lines],
        {"a0": [own[line["entity"]] for line in lines]}, [line["entity"] for line in lines],
    )  # fmt: skip
    out: Found = {}
    for name, d in (("values", world.of_values()), ("entities", world.of_entities())):
        said = unlearning(d, model, texts, "a0", seed=seed)
        out[name] = {key: float(said[key]) for key in ("forget", "retain")}
        out[name][RANDOM] = said["forget"].control["random"]
        clamped = list(said.about["clamped"])
        out[name]["own"] = float(
            clamped == [said.about["value"]]
        )  # the first features are the attribute's values
    return out


def measure(seed: int, tell: Tell) -> Found:
    """Each evaluation on a world of its own."""
    parts = {
        "absorption": _absorption,
        "SCR": _removal,
        "TPP": _perturbation,
        "probing": _probing,
        "RAVEL": _disentangling,
        "unlearning": _forgetting,
    }
    out: Found = {}
    for i, (name, part) in enumerate(parts.items()):
        tell(i, len(parts), name)
        out[name] = part(seed)
    return out


def judge(found: Found) -> Reproduction:
    """What each evaluation says, beside a random dictionary, and how far it is from what was planted."""
    absorbed, scr, tpp, probing, ravel, unlearnt = (
        found[name] for name in ("absorption", "SCR", "TPP", "probing", "RAVEL", "unlearning")
    )

    off = [max(abs(absorbed["planted"][str(r)][i] - r) for r in RATES) for i in range(len(tpp["planted"]))]
    return Reproduction(
        title="SAEBench's evaluations find what was planted in dictionaries",
        source="Karvonen et al. 2025, arXiv 2503.09532",
        setting=f"ReLU dictionaries with planted weights, a world a seed, {ROWS} rows: {CONCEPTS} concepts of {WORDS} words each, some absorbed; two attributes with features of their own or one for each pair of values; {CLASSES} classes; {ENTITIES} entities of {ATTRIBUTES} attributes, {MET} for unlearning. Probes are judged on a fifth of the rows; {ABLATED} features are ablated for SCR, 2 for TPP",
        claims=[
            Claim("absorption: how far it is from the planted rate, the worst of 0, .25, .5 and 1", "-", off, "<=", 0.05, absorbed[RANDOM]["0.5"], f"{RANDOM}'s absorption at .5"),
            Claim("SCR where the spurious attribute has features of its own", "1 is best", scr["isolated"]["planted"], ">=", 0.95, scr["isolated"][RANDOM], RANDOM),
            Claim("SCR where every feature is of a pair of values", "no part of the bias can be removed", scr["entangled"]["planted"], "<=", 0.05, scr["entangled"][RANDOM], RANDOM),
            Claim("TPP where classes have features of their own", "probes of one class fall to chance", tpp["planted"], ">=", 0.4, tpp[RANDOM], RANDOM),
            Claim("TPP of random features, the larger size of 2 and of 5", "none", tpp[DRAWN], "<=", 0.02, tpp["planted"], "features of the classes"),
            Claim("TPP of random features, the largest size of 20, 50 and 100", "none", tpp["many drawn"], "<=", 0.02, tpp["planted"], "features of the classes"),
            Claim("sparse probing: accuracy of the best single feature", "-", probing["planted"], ">=", 0.95, probing["one coordinate"], "one coordinate"),
            Claim("RAVEL where values of attributes have features of their own", "1 is best", ravel["values"], ">=", 0.95, ravel[COORDINATES], "a mask of bare coordinates"),
            Claim("RAVEL where every feature is of an entity", "attributes can't be told apart", ravel["entities"], "<=", 0.6, ravel[WHOLE], "the whole activation"),
            Claim("unlearning a value: nats per token that its entities' texts lose, where it has a feature of its own", "-", unlearnt["values"]["forget"], ">=", 1.0, unlearnt["values"][RANDOM], RANDOM),
            Claim("what other texts lose", "spared", unlearnt["values"]["retain"], "<=", 0.01, unlearnt["values"]["own"], "share of worlds in which just that feature is clamped"),
            Claim("the same where every feature is of an entity, and texts are of other entities", "nothing can be forgotten", unlearnt["entities"]["forget"], "<=", 0.01, unlearnt["entities"][RANDOM], RANDOM),
        ],
        figure=figure("Absorption, planted and found", "planted rate", "found", {"full": (list(RATES), [fmean(absorbed["planted"][str(r)]) for r in RATES]), "fraction": (list(RATES), [fmean(absorbed["fraction"][str(r)]) for r in RATES]), RANDOM: (list(RATES), [fmean(absorbed[RANDOM][str(r)]) for r in RATES])}),
        notes=[f"SCR of the attribute with features of its own by how many are ablated: {', '.join(f'{n}: {fmean(own):.2f}' for n, own in scr['isolated']['by size'].items())}. Two are its own; ablating many more takes away what is asked for as well.", "Formulas are SAEBench's own to 1e-6 on the same tensors (tests/test_labelled_suites.py, with the package beside), but for its negatives of TPP, which are drawn anew for each accuracy.", "A mask of bare coordinates swaps attributes nearly as well as features of values do, where entities are few and attributes linear: RAVEL's score of a dictionary says little without it. Where features are of pairs, ablating them takes the probe to chance, which is why SCR falls so far below 0."],
        controls={
            "absorption at rate .5": {"planted": absorbed["planted"]["0.5"], RANDOM: absorbed[RANDOM]["0.5"]},
            "SCR": {"isolated": scr["isolated"]["planted"], "entangled": scr["entangled"]["planted"], RANDOM: scr["isolated"][RANDOM]},
            "TPP": {"planted": tpp["planted"], RANDOM: tpp[RANDOM], DRAWN: tpp[DRAWN]},
            "accuracy of one feature": probing,
            "RAVEL": ravel,
            "nats a forgotten value costs": {name: unlearnt[name]["forget"] for name in ("values", "entities")} | {RANDOM: unlearnt["values"][RANDOM]},
        },
    )  # fmt: skip


ROW = Row(measure, judge)
