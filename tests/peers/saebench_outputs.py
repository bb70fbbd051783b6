"""A result, read by SAEBench 0.6's own classes: ``python -P tests/peers/saebench_outputs.py FILE``."""

import json
import sys
from pathlib import Path

from pydantic import TypeAdapter
from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
from sae_bench.evals.ravel.eval_output import RAVELEvalOutput
from sae_bench.evals.scr_and_tpp.eval_output import ScrEvalOutput, TppEvalOutput
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput

OUTPUTS = {
    "absorption_first_letter": AbsorptionEvalOutput, "scr": ScrEvalOutput, "tpp": TppEvalOutput,
    "sparse_probing": SparseProbingEvalOutput, "ravel": RAVELEvalOutput,
}  # fmt: skip

if __name__ == "__main__":
    data = json.loads(Path(sys.argv[1]).read_text())
    found = TypeAdapter(OUTPUTS[data["eval_type_id"]]).validate_python(data)
    assert found.eval_type_id == data["eval_type_id"]
    print(found.eval_result_metrics)
