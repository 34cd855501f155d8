"""Run by an interpreter that has lm_eval: a task that is defined here, on a checkpoint, through our adapter.

python harness_run.py DIR DATA OUT.json    DATA: a folder to write the task and its documents to
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def asked_directly(lm: Any) -> dict[str, Any]:
    """What lm_eval asks for where a context is empty, a task stops at a text, or begins the answer."""

    def request(*args: Any) -> SimpleNamespace:
        return SimpleNamespace(args=args)

    empty = lm.loglikelihood([request("", " The file"), request("", "<|bos|> The file"), request("The", "")])
    question = "<|bos|><|user|>What is 463 + 88?<|end|><|assistant|>"
    stops = [request(question, {"until": until, "max_gen_toks": 8}) for until in ("51", ["<|end|>", "nothing"])]
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So "}]
    begun = lm.apply_chat_template(chat, add_generation_prompt=False)
    asked = lm.apply_chat_template(chat[:1])
    return {"empty": empty, "stopped": lm.generate_until(stops), "begun": begun, "asked": asked}


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
    lm = harness.JqserveLM(folder, dtype="float32", max_length=64)
    direct = asked_directly(lm)
    kwargs = {"temperature": 0.7, "top_k": 5, "max_tokens": 9, "until": "x"}
    sampled, greedy = (harness.sampling_of({**kwargs, **more}, 9) for more in ({}, {"do_sample": False}))
    assert (sampled.temperature, sampled.top_k, sampled.stop) == (0.7, 5, ("x",)) and greedy.temperature == 0.0
    assert (harness.limit_of(kwargs, 256), harness.limit_of({}, 256)) == (9, 256)
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
    out.write_text(json.dumps({"results": found["results"], "rolling": rolling, "choice": choice, "direct": direct}))


if __name__ == "__main__":
    main()
