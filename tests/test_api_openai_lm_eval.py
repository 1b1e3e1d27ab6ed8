"""EleutherAI's lm-eval with a local task over /v1/completions: its loglikelihoods are those of the model in one process.

lm-eval is a program of its own (it pins other versions of packages that the kit needs): SPACEMOE_LM_EVAL names it where it is not on PATH.
It works offline: a task of this test's own, and the bundle's tokenizer. The reference for each request is trunk.Sequence.prefill alone, on
one node and without a codec. Shards are fp32: those of 8 bits round their inputs, so that the last bit of a sum, in another order on
several nodes, may move a log probability by some hundredths.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from api_rig import api
from conftest import lacking

from ground_station import evaluate
from ground_station.decode import Decoder
from ground_station.dispatch import Table
from ground_station.local import LocalExperts
from ground_station.placement import round_robin
from ground_station.text import Text
from node_agent import shard
from quantize.pipeline import quantize

CHECKPOINT = Path(__file__).resolve().parent.parent / "quantize" / "reference" / "checkpoint"
TASK = """
task: spacemoe_local
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
"""
ROWS = [
    ("The sun rises in the", [" east", " west", " morning"]),
    ("def add(a, b):\n    return", [" a + b", " None", " the sum of both numbers"]),
    ("In the beginning", [" was the word", " of the"]),
    ("naïve 日本語 question:", [" yes", " ¿no?"]),
    (" ".join("abcdefg" * 60), [" a b", " z"]),  # over a chunk of the prefill
]


def program() -> str:
    found = os.environ.get("SPACEMOE_LM_EVAL") or shutil.which("lm_eval") or shutil.which("lm-eval")
    if not found:
        lacking(
            "lm-eval",
            "python -m venv lm && lm/bin/pip install 'lm-eval[api]' 'transformers<4.58', then SPACEMOE_LM_EVAL=lm/bin/lm_eval",
        )
    return found


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bundle") / "fp32"
    quantize(CHECKPOINT, root, precisions=("fp32",), rtn=True, progress=False)
    return root


def scores(folder: Path, bundle: Path, url: str) -> list[dict]:
    """lm-eval's requests with what it made of their answers."""
    (folder / "tokenizer").mkdir(parents=True)
    shutil.copy(bundle / "tokenizer.json", folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"})
    )
    data = folder / "rows.jsonl"
    rows = [{"question": question, "choices": choices, "answer": 0} for question, choices in ROWS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "local.yaml").write_text(TASK % data)
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HOME": str(folder / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "OPENAI_API_KEY": "none",
        "no_proxy": "127.0.0.1",
    }
    name = shard.read_manifest(bundle).name
    model = f"model={name},base_url={url}/completions,tokenizer={folder / 'tokenizer'},num_concurrent=4,max_length=2000"
    done = subprocess.run(
        [program(), "--model", "local-completions", "--model_args", model + ",tokenizer_backend=huggingface",
         "--include_path", folder / "tasks", "--tasks", "spacemoe_local", "--batch_size", "3", "--log_samples",
         "--output_path", folder / "out"],
        env=environment, capture_output=True, text=True, timeout=240, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (samples,) = (folder / "out").rglob("samples_*.jsonl")
    return [json.loads(line) for line in samples.read_text().splitlines()]


def alone(decoder: Decoder, text: Text, context: str, continuation: str) -> tuple[float, int]:
    """(loglikelihood, tokens) of the continuation in one pass; tokens as lm-eval divides them: the context's first, then the rest."""
    whole = text.encode(context + continuation)
    start = len(text.encode(context))
    logits = decoder.trunk.sequence(len(whole)).prefill(whole, decoder.moe, every_position=True).astype(np.float64)
    rows = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    targets = np.arange(start, len(whole))
    return float(rows[targets - 1, np.array(whole)[targets]].sum()), len(targets)


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["fp32", "fp16"])
def test_loglikelihoods_are_those_of_the_model_in_one_process(bundle, tmp_path, codec):
    """Within 1e-3 per request with fp32; with fp16, which rounds what goes to the nodes, within 1e-3 per token over all of them."""
    manifest = shard.read_manifest(bundle)
    decoder, text = evaluate.model(bundle, manifest, "fp32", 1), Text(bundle, manifest)
    table = Table(round_robin(manifest, dict.fromkeys(("node-1", "node-2", "node-3"), 1 << 40), "fp32"))

    def over_codec(codec: str) -> Decoder:
        experts = LocalExperts(bundle, manifest, table, codec)
        return Decoder(decoder.trunk, decoder.policy, experts, decoder.eos_ids)

    with api(bundle, over_codec(codec)) as (url, engine):
        samples = scores(tmp_path, bundle, url)
        assert engine.rows > sum(len(question) // 8 for question, _ in ROWS)  # it was asked for these
    asked = [
        (ROWS[sample["doc_id"]][0], choice, float(said))
        for sample in samples
        for choice, (said, _greedy) in zip(ROWS[sample["doc_id"]][1], sample["filtered_resps"], strict=True)
    ]
    assert len(asked) == sum(len(choices) for _, choices in ROWS)
    wanted = [alone(decoder, text, question, choice) for question, choice, _ in asked]
    tokens = sum(count for _, count in wanted)

    def away(found: list[float]) -> tuple[float, float]:
        """(most of a request, of a token over all requests)."""
        apart = [abs(one - other) for one, (other, _) in zip(found, wanted)]
        return max(apart), sum(apart) / tokens

    request, token = away([said for *_, said in asked])
    assert (request if codec == "fp32" else token) < 1e-3
    # negative control: with 8 bits per value on the way the same comparison fails
    coarse = over_codec("q8")
    assert away([alone(coarse, text, question, choice)[0] for question, choice, _ in asked])[1] > 1e-3
    print(f"{codec}: at most {request:.1e} per request, {token:.1e} per token")
