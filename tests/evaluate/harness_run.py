"""Run by an interpreter that has lm_eval: a task that is defined here, on a checkpoint, through our adapter.

python harness_run.py DIR DATA OUT.json    DATA: a folder to write the task and its documents to
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: ["{{right}}", "{{wrong}}"]
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/generate.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<|end|>"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: DATA/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


def main() -> None:
    folder, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (data / f"{name}.yaml").write_text(text.replace("DATA", str(data)))
    import lm_eval
    from lm_eval.tasks import TaskManager

    import jqserve.evaluate.harness as harness
    from jqserve.errors import JqserveError

    found = lm_eval.simple_evaluate(
        model="jqserve",
        model_args={"pretrained": folder, "dtype": "float32", "max_length": 64},
        tasks=["local_choice", "local_generate", "local_rolling"],
        task_manager=TaskManager(include_path=str(data), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    try:
        harness.JqserveLM(folder, quantization="int4", batch_size=1)
    except JqserveError as error:
        assert "quantization not known; there are pretrained" in str(error)
    else:
        raise AssertionError("an argument that does nothing was taken")
    rolling = [float(sample["filtered_resps"][0]) for sample in found["samples"]["local_rolling"]]
    choice = []  # what was really asked, and the answer
    for sample in found["samples"]["local_choice"]:
        choice += [[*args[:2], float(x[0])] for args, x in zip(sample["arguments"], sample["filtered_resps"])]
    out.write_text(json.dumps({"results": found["results"], "rolling": rolling, "choice": choice}))


if __name__ == "__main__":
    main()
