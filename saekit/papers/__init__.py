"""Papers as commands: each reruns a claim at laptop scale and says whether it holds. One file and one line each.

Each names a :class:`saekit.papers.row.Row`.
"""

from saekit.registry import Registry

PAPERS = Registry(
    "paper",
    {
        "k-sparse": "saekit.papers.k_sparse:ROW",
        "matryoshka": "saekit.papers.matryoshka:ROW",
        "matching-pursuit": "saekit.papers.matching_pursuit:ROW",
        "hierarchical-topk": "saekit.papers.hierarchical_topk:ROW",
        "active-subspace": "saekit.papers.active_subspace:ROW",
        "archetypal": "saekit.papers.archetypal:ROW",
        "mdl": "saekit.papers.mdl:ROW",
        "batchtopk": "saekit.papers.batchtopk:ROW",
        "jumprelu": "saekit.papers.jumprelu:ROW",
        "gated": "saekit.papers.gated:ROW",
        "p-annealing": "saekit.papers.p_annealing:ROW",
        "synth-sae-bench": "saekit.papers.synth_sae_bench:ROW",
        "synth-sae-bench-16k": "saekit.papers.synth_sae_bench:ROW_FULL",
        "planted-peers": "saekit.papers.planted_peers:ROW",
        "sparse-but-wrong": "saekit.papers.sparse_but_wrong:ROW",
        "end-to-end": "saekit.papers.end_to_end:ROW",
        "transcoders": "saekit.papers.transcoders:ROW",
        "lorsa": "saekit.papers.lorsa:ROW",
        "crosscoder": "saekit.papers.crosscoder:ROW",
        "cross-layer-transcoder": "saekit.papers.cross_layer_transcoder:ROW",
        "codebook-features": "saekit.papers.codebook_features:ROW",
        "complete-replacement": "saekit.papers.complete_replacement:ROW",
        "mutual-regularisation": "saekit.papers.mutual_regularisation:ROW",
        "sparse-feature-circuits": "saekit.papers.sparse_feature_circuits:ROW",
        "transcoder-circuits": "saekit.papers.transcoder_circuits:ROW",
        "attribution-graphs": "saekit.papers.attribution_graphs:ROW",
        "sparse-attention-decomposition": "saekit.papers.sparse_attention_decomposition:ROW",
        "discrete-circuits": "saekit.papers.discrete_circuits:ROW",
        "attention-saes": "saekit.papers.attention_saes:ROW",
        "patch-free-othello": "saekit.papers.patch_free_othello:ROW",
        "auto-interp": "saekit.papers.auto_interp:ROW",
        "neurons-dead-ngram-positional": "saekit.papers.neurons_dead_ngram_positional:ROW",
        "topic-alignment": "saekit.papers.topic_alignment:ROW",
        "single-direction": "saekit.papers.single_direction:ROW",
    },
)
