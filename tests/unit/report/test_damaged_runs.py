"""Whatever a run directory holds, its report is written: what cannot be used is left out."""

import json
import os

import pytest

from megatron_most.report.page import write_report

LINE = '{"step": 1, "time": 1.0, "loss": 2.0}\n'


def evaluation(**fields: object) -> str:
    item = {"id": "1", "reference": "a", "hypothesis": "a", **fields}
    return json.dumps({"suite": "asr", "set": "s", "wer": 0.5, "num_utterances": 1, "items": [item]})


DAMAGES = {
    "number of 400 digits": {"metrics.jsonl": LINE + '{"step": 2, "loss": ' + "9" * 400 + "}\n"},
    "number of 5000 digits": {"metrics.jsonl": LINE + '{"step": ' + "9" * 5000 + "}\n"},
    "deep": {"metrics.jsonl": LINE + "[" * 100_000 + "\n" + "[" * 900 + "]" * 900 + "\n"},
    "deep summary": {"metrics.jsonl": LINE, "summary.json": '{"a":' * 900 + "1" + "}" * 900},
    "not UTF-8": {"metrics.jsonl": LINE.encode() + b"\xff\xfe\n" + LINE.encode()},
    "deep config": {"metrics.jsonl": LINE, "config.yaml": "[" * 3000},
    "config": {"metrics.jsonl": LINE, "config.yaml": "a: !!bool x"},
    "groups": {"metrics.jsonl": LINE, "config.yaml": "model: {moe: {groups: [5]}}"},
    "size": {"metrics.jsonl": LINE, "config.yaml": "model: {moe: {groups: [{modality: a, size: 1.0e+14}]}}"},
    "infinite size": {"metrics.jsonl": LINE, "config.yaml": "model: {moe: {groups: [{modality: a, size: .inf}]}}"},
    "surrogate": {"metrics.jsonl": LINE, "evaluation/a.json": evaluation(id="\ud800")},
    "NUL": {"metrics.jsonl": LINE, "evaluation/a.json": evaluation(generated_wav="a\0b")},
    "long name": {"metrics.jsonl": LINE, "evaluation/a.json": evaluation(generated_wav="a" * 10_000)},
    "pipe": {"metrics.jsonl": LINE, "evaluation/a.json": evaluation(generated_wav="pipe")},
    "layers": {"metrics.jsonl": LINE, "routing.jsonl": '{"step":1,"layers":5}\n'},
    "junk in layers": {"metrics.jsonl": LINE, "routing.jsonl": '{"step":1,"layers":[5,null,{"layer":"x"}]}\n'},
    "environment": {"metrics.jsonl": LINE, "environment.json": '{"world_size":1e308,"device":null}'},
    "utterances": {"metrics.jsonl": LINE, "evaluation/a.json": '{"wer":0.5,"num_utterances":1e308,"items":[]}'},
    "huge step": {"metrics.jsonl": '{"step": 1e99, "loss": 3, "consumed_tokens": 1e99}\n'},
    "huge steps": {"metrics.jsonl": LINE + '{"step": 1e308, "loss": 3}\n'},
    "huge loss": {"metrics.jsonl": LINE + '{"step": 2, "loss": 1e308}\n{"step": 3, "loss": -1e308}\n'},
    "no text": {"metrics.jsonl": LINE, "evaluation/a.json": evaluation(reference="a " * 400_000)},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_run_has_a_report(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    for file, content in DAMAGES[name].items():
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "</html>" in page
