"""The routing section, from lines made for the case: as they are written now, and as older runs wrote them."""

import pytest

from megatron_most.report.pools import read_pools
from megatron_most.report.routing import routing_view
from megatron_most.report.run_files import RunFiles, read_run
from tests.unit.report.fake_run import make_run

CONFIG = {"model": {"moe": {"groups": [{"modality": "text", "size": 2}, {"modality": "audio", "size": 2}]}}}


def line(step, text, audio, outside=0, layer=2, **statistics):
    counts = {"pairs": {"text": text, "audio": audio}} if statistics else {"text": text, "audio": audio}
    return {"step": step, "layers": [{"layer": layer, **counts, "outside_group": outside, **statistics}]}


def view_of(lines, config=CONFIG, metrics=()):
    run = RunFiles(None, routing=lines, config=config, metrics=list(metrics))
    return routing_view(run), run


def kinds(one):
    return [cell.kind for cell in one.cells]


@pytest.mark.parametrize("statistics", [{}, {"tokens": {"text": 20, "audio": 10}}], ids=["older", "now"])
def test_the_map_shows_shares_of_the_last_quarter(statistics):
    early = [line(step, [100, 0, 0, 0], [0, 0, 100, 0], **statistics) for step in (1, 2, 3)]
    view, run = view_of([*early, line(4, [30, 10, 0, 0], [0, 0, 20, 0], **statistics)])
    text, audio = view.maps
    assert (view.first_step, view.last_step) == (4, 4)
    assert [cell.share for cell in text.cells] == [0.75, 0.25, 0, 0]
    assert kinds(text) == ["used", "used", "closed", "closed"]
    assert kinds(audio) == ["closed", "closed", "used", "dead"]
    assert [(head, texts) for head, _, texts in text.numbers] == [("max/mean", ["1.50×"]), ("dead", ["0"])]
    assert [(head, texts) for head, _, texts in audio.numbers] == [("max/mean", ["2.00×"]), ("dead", ["1"])]
    assert text.even == 0.5
    assert text.cells[1].title == "layer 2, expert 1 (text): 25.00% (10 pairs)"
    assert text.cells[2].title == "layer 2, expert 2 (audio): not open to this modality"
    assert len(text.borders) == 1
    assert (view.pairs, view.outside) == (660, 0)
    assert run.notes == []


def test_scores_and_entropy_are_means_over_the_tokens_of_the_intervals_shown():
    lines = [
        line(
            step,
            [tokens, tokens, 0, 0],
            [0, 0, 1, 1],
            tokens={"text": tokens, "audio": 1},
            mean_score={"text": [score, 1 - score, 0.0, 0.0], "audio": [0, 0, 0.5, 0.5]},
            entropy={"text": entropy, "audio": 0.25},
        )
        for step, tokens, score, entropy in ((1, 10, 0.5, 0.6), (2, 10, 0.5, 0.6), (7, 30, 0.2, 0.4), (8, 10, 0.6, 0.8))
    ]
    view, _ = view_of([*lines[:2]] + [line(step, [1, 1, 0, 0], [0, 0, 1, 1]) for step in (3, 4, 5, 6)] + lines[2:])
    assert (view.first_step, view.last_step) == (7, 8)
    text = view.maps[0]
    assert text.cells[0].title.endswith("(40 pairs), mean score 0.3")
    assert text.numbers[2][0::2] == ("entropy", ["0.50"])


def test_pairs_outside_their_group_are_counted_over_the_whole_run():
    lines = [line(1, [5, 5, 2, 0], [0, 0, 5, 5], outside=2)]
    lines += [line(step, [5, 5, 0, 0], [0, 0, 5, 5]) for step in range(2, 9)]
    view, _ = view_of(lines)
    assert view.outside == 2
    assert view.pairs == 22 + 7 * 20
    leaking, _ = view_of(lines[:1])
    assert kinds(leaking.maps[0]) == ["used", "used", "leak", "closed"]
    assert "outside the choice" in leaking.maps[0].cells[2].title


def test_expert_load_is_the_busiest_over_the_mean_of_the_choice():
    both = line(10, [30, 10, 0, 0], [0, 0, 0, 0])
    both["layers"] += line(10, [20, 20, 0, 0], [0, 0, 0, 0], layer=3)["layers"]
    view, _ = view_of([both])
    values = {curve.series.label: curve.series.points for curve in view.charts[0].curves}
    assert values == {"text, mean over layers": [(10, 1.25)], "text, worst layer": [(10, 1.5)]}
    assert [one.modality for one in view.maps] == ["text"]


def test_without_group_sizes_the_map_has_no_borders_and_a_note():
    view, run = view_of([line(1, [1, 1, 0, 0], [0, 0, 1, 1])], config={})
    assert view.maps[0].borders == []
    assert set(kinds(view.maps[0])) == {"used", "dead"}
    assert any("sizes of the expert groups are unknown" in note for note in run.notes)


@pytest.mark.parametrize(
    "layers",
    [
        None,
        [],
        [3],
        [{"layer": 2}],
        [{"layer": 2, "text": [1], "audio": "x"}],
        [{"layer": 2, "text": [], "audio": []}],
        [{"layer": 2, "pairs": {}}],
        [{"layer": 2, "pairs": {"text": [1, "x"]}}],
    ],
)
def test_routing_without_counts_is_no_map(layers):
    view, run = view_of([{"step": 1, "layers": layers}])
    assert view is None
    assert run.notes


def test_common_experts_and_groups_by_list_stand_pool_by_pool():
    groups = [{"modality": "text", "experts": [0, 2]}, {"modality": "audio", "experts": [3]}, {"modality": "image"}]
    moe = {"groups": groups, "common": {"experts": [1, 4], "modalities": ["text", "image"]}}
    pools = read_pools({"model": {"moe": moe}})
    assert pools.columns == [0, 2, 3, 1, 4]
    assert pools.choices == {"text": (0, 2, 1, 4), "audio": (3,), "image": (1, 4)}

    counts = {"text": [8, 4, 0, 0, 4], "audio": [0, 0, 0, 6, 0], "image": [0, 2, 0, 0, 2]}
    routing = [{"step": 1, "layers": [{"layer": 2, "pairs": counts, "outside_group": 0}]}]
    view, _ = view_of(routing, config={"model": {"moe": moe}})
    text, audio, image = view.maps
    assert [head for head, _ in text.heads] == ["text experts", "audio", "common experts"]
    assert [label for label, _ in text.columns] == ["0", "2", "3", "1", "4"]
    assert kinds(text) == ["used", "dead", "closed", "used", "used"]
    assert kinds(image) == ["closed", "closed", "closed", "used", "used"]
    assert audio.even == 1.0
    assert len({text.color, audio.color, image.color}) == 3


@pytest.mark.parametrize(
    "config", [{}, {"model": 3}, {"model": {"moe": {"groups": [{"modality": "text", "experts": [7]}]}}}]
)
def test_a_configuration_that_names_no_pools(config):
    assert read_pools(config) is None


def test_charts_show_what_was_recorded(tmp_path):
    now = routing_view(read_run(make_run(tmp_path / "now", steps=40)))
    assert [chart.title for chart in now.charts] == [
        "Expert load: busiest over the mean of the choice",
        "Entropy of the routing distribution",
        "Expert-parallel ranks: busiest over the mean",
        "Balance loss, before its coefficient",
    ]
    assert now.dead == [("text", 0, 4), ("audio", 0, 4)]
    older = routing_view(read_run(make_run(tmp_path / "older", steps=40, before_statistics=True)))
    assert [chart.title for chart in older.charts] == [now.charts[0].title, now.charts[3].title]
    assert older.dead == []


def test_dead_experts_and_outside_mass_have_a_chart_where_there_are_any():
    keys = ("routing/text/dead_experts/max", "routing/text/outside_mass/mean", "z_loss")
    metrics = [{"step": step, **dict.fromkeys(keys, step)} for step in (1, 2)]
    view, _ = view_of([line(1, [1, 1, 0, 0], [0, 0, 1, 1])], metrics=metrics)
    titles = [chart.title for chart in view.charts]
    assert titles[1:] == [
        "Dead experts: chosen by no token",
        "Score outside the choice",
        "Router z-loss, before its coefficient",
    ]
    assert view.dead == [("text", 2, 2)]
