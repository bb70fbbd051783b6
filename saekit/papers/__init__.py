"""Papers as commands: each reruns a claim at laptop scale and says whether it holds. One file and one line each.

A row is a function ``reproduce(seeds, tell) -> Reproduction``; ``tell(done, total, note)`` draws progress.
One that compares with other toolkits also takes ``peers``, the python of an environment they are in.
"""

from saekit.registry import Registry

PAPERS = Registry(
    "paper",
    {
        "k-sparse": "saekit.papers.k_sparse:reproduce",
        "matryoshka": "saekit.papers.matryoshka:reproduce",
        "matching-pursuit": "saekit.papers.matching_pursuit:reproduce",
        "hierarchical-topk": "saekit.papers.hierarchical_topk:reproduce",
        "active-subspace": "saekit.papers.active_subspace:reproduce",
        "archetypal": "saekit.papers.archetypal:reproduce",
        "mdl": "saekit.papers.mdl:reproduce",
        "batchtopk": "saekit.papers.batchtopk:reproduce",
        "jumprelu": "saekit.papers.jumprelu:reproduce",
        "gated": "saekit.papers.gated:reproduce",
        "p-annealing": "saekit.papers.p_annealing:reproduce",
        "synth-sae-bench": "saekit.papers.synth_sae_bench:reproduce",
        "synth-sae-bench-16k": "saekit.papers.synth_sae_bench:reproduce_full",
        "planted-peers": "saekit.papers.planted_peers:reproduce",
        "sparse-but-wrong": "saekit.papers.sparse_but_wrong:reproduce",
        "end-to-end": "saekit.papers.end_to_end:reproduce",
        "transcoders": "saekit.papers.transcoders:reproduce",
        "lorsa": "saekit.papers.lorsa:reproduce",
        "crosscoder": "saekit.papers.crosscoder:reproduce",
        "cross-layer-transcoder": "saekit.papers.cross_layer_transcoder:reproduce",
        "codebook-features": "saekit.papers.codebook_features:reproduce",
        "complete-replacement": "saekit.papers.complete_replacement:reproduce",
        "mutual-regularisation": "saekit.papers.mutual_regularisation:reproduce",
    },
)
