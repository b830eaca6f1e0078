"""The page as a whole: every section, nothing from outside, nothing unescaped, small, honest about what is missing."""

import html.parser
import json
import re

import pytest

from megatron_most.errors import ConfigError, DataError
from megatron_most.report import write_report
from tests.unit.report.fake_run import make_run

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{ 7919 * 7907 }}"


class Page(html.parser.HTMLParser):
    """Collects elements and visible text; complains about elements that are not closed."""

    VOID = {"meta", "link", "img", "br", "input"}

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.texts, self.scripts = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] in ("script", "style") else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(run_dir):
    return Page(write_report(run_dir).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "quickstart", steps=200)


@pytest.fixture(scope="module")
def page(whole):
    return page_of(whole)


def test_every_section_is_filled(page):
    for wanted in (
        "ASR word error rate 0.0%",
        "TTS word error rate, hard set 11.8%",
        "training time 5 min 1 s",
        "parameters 4.51M",
        "Loss by modality",
        "Loss by task",
        "Gradient norm, before clipping",
        "Throughput tokens/s",
        "Model FLOP/s FLOP/s",
        "Peak memory of rank 0 GiB",
        "routed pairs left its group.",
        "Text tokens share of their (token, expert) pairs; even would be 25.0%",
        "Expert load",
        "word error rate ASR TTS codec round trip original recording",
        "the recognizer heard: the small count seven red stones",
        "megatron-core 0.19.2",
        "num_layers: 4",
        "2 ranks · 200 steps",
    ):
        assert wanted in page.text, wanted
    assert "absent" not in {attributes.get("class") for attributes in page.all("p")}
    assert "Missing or left out" not in page.text
    assert len(page.all("audio")) == 12


def test_any_modalities_common_experts_and_lists_make_a_page(tmp_path):
    names = ("text", "audio", "image")
    page = page_of(make_run(tmp_path / "run", steps=40, modalities=names, common=2, by_list=True))
    for wanted in (
        "Image tokens share of their (token, expert) pairs; even would be 16.7%",
        "✓ Every expert had tokens of every modality it is open to",
        "common",
        "Entropy of the routing distribution",
    ):
        assert wanted in page.text, wanted


def test_the_routing_of_older_runs_is_drawn(tmp_path):
    page = page_of(make_run(tmp_path / "run", steps=40, before_statistics=True))
    assert "Text tokens share of their (token, expert) pairs; even would be 25.0%" in page.text
    assert "Entropy" not in page.text


def test_errors_are_marked_by_more_than_color(page, whole):
    text = write_report(whole).read_text()
    assert re.search(r'class="word substitute">.*?instead of .*?<s>two</s> → ten', text)
    assert "−boys" in page.text
    assert "+and" in page.text


def test_nothing_is_loaded_from_outside(page):
    sources = [
        attributes[key] for _, attributes in page.elements for key in ("src", "href", "data") if key in attributes
    ]
    assert sources
    assert all(source.startswith(("#", "data:audio/wav;base64,")) for source in sources)
    assert not page.all("link")
    code = "".join(page.scripts)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest|import\(", code)
    (policy,) = [meta["content"] for meta in page.all("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")


def test_the_curves_answer_a_pointer_with_their_own_values(whole):
    text = write_report(whole).read_text()
    data = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    charts = [one for one in data if "views" in one]
    assert len(charts) == text.count("data-chart>") == 13
    by_steps, by_tokens = charts[0]["views"]
    losses = {one["label"]: one["points"] for one in by_steps["series"]}
    assert set(losses) == {"all targets", "text", "audio"}
    assert losses["text"][-1][0] == 200
    assert by_steps["axis"] == "step"
    assert by_tokens["axis"] == "tokens"
    moved = {one["label"]: one["points"] for one in by_tokens["series"]}
    assert [(x, value) for x, value, *_ in moved["text"]] == [(1500 * x, value) for x, value, *_ in losses["text"]]


def test_every_chart_can_be_downloaded_as_picture_and_as_numbers(page, whole):
    figures = page.all("figure")
    buttons = [attributes.get("data-download") for attributes in page.all("button")]
    assert buttons == ["svg", "csv"] * len(figures)
    assert len(figures) == 13 + 2
    text = write_report(whole).read_text()
    data = [json.loads(one) for one in re.findall(r'<script type="application/json">(.*?)</script>', text)]
    (text_map, _) = [one["table"] for one in data if "table" in one]
    assert text_map["columns"] == ["layer", "expert", "kind", "share of pairs"]
    assert len(text_map["rows"]) == 3 * 8
    by_layer = [sum(share for layer, _, _, share in text_map["rows"] if layer == wanted) for wanted in (2, 3, 4)]
    assert by_layer == pytest.approx([1.0] * 3, abs=1e-4)


def test_what_was_before_training_stands_away_from_the_results(page):
    titles = ("Results", "For comparison", "Training")
    ends = [page.text.index(title, page.text.index("Configuration")) for title in titles]
    results, comparison = page.text[ends[0] : ends[1]], page.text[ends[1] : ends[2]]
    assert "before training" not in results
    assert "98.5%" not in results
    assert "ASR word error rate before training 98.5%" in comparison
    assert "the recognizer on the originals 1.0%" in comparison


def test_rates_have_intervals_and_name_their_column_on_narrow_screens(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    path = run_dir / "evaluation" / "asr_heldout_s.json"
    result = json.loads(path.read_text()) | {"wer_interval": [0.0123, 0.091]}
    result["items"][2] |= {"at_limit": True}
    result["items"][3] |= {"hypothesis": "", "failed": "a prompt that is too long"}
    path.write_text(json.dumps(result))
    page = page_of(run_dir)
    assert "5.0% (1.2% to 9.1%) of 6" in page.text
    assert "failed: a prompt that is too long" in page.text
    assert "reached its limit, so the end may be missing" in page.text
    labels = [attributes["data-label"] for attributes in page.all("td") if "data-label" in attributes]
    assert labels == ["ASR", "TTS", "codec round trip", "original recording"] * 2


def test_a_run_on_a_known_gpu_has_its_utilization(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    path = run_dir / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": "NVIDIA H100 80GB HBM3"}))
    page = page_of(run_dir)
    assert "Model FLOPs utilization (MFU) %" in page.text
    assert "Model FLOP/s FLOP/s" not in page.text


def test_without_tokens_charts_are_by_steps_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 1.5}\n')
    page = page_of(tmp_path)
    assert "x axis of the charts" not in page.text
    assert not [one for one in page.all("svg") if "by-tokens" in one.get("class", "")]


def test_charts_and_maps_have_labels(page):
    images = [attributes for attributes in page.all("svg") if attributes.get("role") == "img"]
    assert len(images) == 2 * 13 + 2
    assert all(attributes["aria-label"] for attributes in images)
    assert all(attributes.get("aria-label") for attributes in page.all("audio"))


def test_hostile_text_stays_text(tmp_path):
    run_dir = make_run(tmp_path / "run <b>", steps=40)
    (run_dir / "environment.json").write_text(json.dumps({"device": HOSTILE, "versions": {HOSTILE: HOSTILE}}))
    (run_dir / "config.yaml").write_text(f"a: |\n  {HOSTILE}\n")
    (run_dir / "summary.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    line = {"step": 1, "loss": 1.0, f"validation/{HOSTILE.replace('/', '|')}/loss": 2.0}
    (run_dir / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    items = [{"id": HOSTILE, "reference": HOSTILE, "hypothesis": f"{HOSTILE} <i>x</i>", "generated_wav": HOSTILE}]
    for suite in ("asr", HOSTILE):
        result = {"suite": suite, "set": HOSTILE, "wer": 1.0, "items": items}
        (run_dir / "evaluation" / f"{len(suite)}.json").write_text(json.dumps(result))
    before = page_of(make_run(tmp_path / "plain", steps=40))
    page = page_of(run_dir)
    assert "{{ 7919 * 7907 }}" in page.text
    assert "62615533" not in page.text  # the product, which no time, version or size on the page can hold
    assert not page.all("img")
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    executable = [one for one in page.all("script") if "type" not in one]
    assert len(executable) == len([one for one in before.all("script") if "type" not in one]) == 1


def test_metrics_alone_make_a_page_that_says_what_is_missing(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5, "lr": 0.001}\n{"step": 20, "loss": 1.5}\n')
    page = page_of(tmp_path)
    assert "loss at the last line 1.5" in page.text
    for wanted in (
        "summary.json is missing",
        "No routing was recorded.",
        "Nothing was evaluated",
        "No speech samples were kept.",
        "Neither configuration nor versions were recorded.",
    ):
        assert wanted in page.text


@pytest.mark.parametrize("name", ["metrics.jsonl", "routing.jsonl", "config.yaml", "environment.json", "summary.json"])
def test_any_file_may_be_missing_or_torn(tmp_path, name):
    run_dir = make_run(tmp_path / "run", steps=40)
    path = run_dir / name
    path.write_bytes(path.read_bytes()[:-25])
    page_of(run_dir)
    path.unlink()
    assert f"{name} is missing" in page_of(run_dir).text


def test_a_leak_between_groups_is_shown(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    lines = (run_dir / "routing.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    last["layers"][0]["pairs"]["text"][5] = 3
    last["layers"][0]["outside_group"] = 3
    (run_dir / "routing.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    page = page_of(run_dir)
    assert re.search(r"✕ 3 of [\d,]+ routed pairs left their group", page.text)
    assert "layer 2, expert 5 (audio), outside the choice" in page.text


def test_the_page_of_a_large_long_run_stays_small(tmp_path):
    run_dir = make_run(tmp_path / "large", steps=3000, layers=26, group=32, top_k=6)
    output = write_report(run_dir, tmp_path / "pages" / "large.html")
    assert output == tmp_path / "pages" / "large.html"
    assert output.stat().st_size < 5_000_000


def test_a_directory_that_is_no_run_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(DataError, match="holds no run"):
        write_report(tmp_path, tmp_path / "out.html")
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_cannot_be_written_is_named(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(ConfigError, match="folder: cannot be written"):
        write_report(run_dir, target)
    assert list(target.iterdir()) == []
    assert not list(tmp_path.glob(".*"))


def test_dead_experts_are_told(tmp_path):
    run_dir = make_run(tmp_path / "run", steps=40)
    with open(run_dir / "metrics.jsonl", "a") as stream:
        stream.write(json.dumps({"step": 41, "routing/audio/dead_experts/max": 3}) + "\n")
    page = page_of(run_dir)
    assert "✕ In some layer 3 of the 4 experts open to audio had no audio token" in page.text
    assert "Every expert had tokens" not in page.text
