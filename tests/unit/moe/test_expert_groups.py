"""Which experts a modality may choose, in which order ranks compute them, and what is refused."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.config import CommonExpertsConfig, ExpertGroupConfig, MoEConfig
from megatron_most.errors import ConfigError
from megatron_most.moe.expert_groups import ExpertGroups


def by_size(*sizes: int, common: int = 0, order: str = "interleaved", ep: int = 1) -> ExpertGroups:
    groups = [ExpertGroupConfig(f"m{i}", size, 1) for i, size in enumerate(sizes)]
    config = MoEConfig(groups=groups, common=CommonExpertsConfig(common), expert_order=order)
    return ExpertGroups.from_config(config, ep)


def test_a_rank_computes_its_share_of_each_group_sorted_by_group():
    assert by_size(4, 4, ep=2).physical_to_logical == (0, 1, 4, 5, 2, 3, 6, 7)
    assert by_size(4, 4, ep=4).physical_to_logical == (0, 4, 1, 5, 2, 6, 3, 7)


def test_contiguous_order_gives_ranks_slices_of_the_logical_one():
    assert by_size(4, 2, order="contiguous", ep=3).physical_to_logical == (0, 1, 2, 3, 4, 5)


def test_experts_given_by_lists_keep_their_numbers():
    config = MoEConfig(
        groups=[
            ExpertGroupConfig("text", moe_router_topk=2, experts=[5, 0, 3]),
            ExpertGroupConfig("audio", moe_router_topk=1, experts=[1]),
        ],
        common=CommonExpertsConfig(experts=[4, 2]),
    )
    made = ExpertGroups.from_config(config)
    assert made.pools == {"text": (5, 0, 3), "audio": (1,), "common": (4, 2)}
    assert made.choices == ((5, 0, 3, 4, 2), (1, 4, 2))
    assert made.physical_to_logical == (5, 0, 3, 1, 4, 2)
    assert config.groups[0].size == 3


def test_common_experts_may_be_for_some_modalities_only():
    config = MoEConfig(
        groups=[ExpertGroupConfig("text", 2, 1), ExpertGroupConfig("audio", 2, 1), ExpertGroupConfig("image", 0, 1)],
        common=CommonExpertsConfig(2, modalities=["audio", "image"]),
    )
    assert ExpertGroups.from_config(config).choices == ((0, 1), (2, 3, 4, 5), (4, 5))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 3), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_expert_parallel_rank_holds_an_equal_share_of_each_pool(shares, common, ep):
    made = by_size(*(share * ep for share in shares), common=common * ep, ep=ep)
    for rank in range(ep):
        local = made.local_experts(rank)
        assert [len(experts) for experts in local.values()] == [*shares, *([common] if common else [])]
        assert (
            tuple(itertools.chain(*local.values()))
            == made.physical_to_logical[rank * len(made.physical_to_logical) // ep :][: made.num_experts // ep]
        )


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.integers(1, 5),
    st.sampled_from(["interleaved", "contiguous"]),
    st.randoms(use_true_random=False),
)
def test_pools_partition_the_experts_and_every_order_is_a_permutation(sizes, common, order, random):
    num_experts = sum(sizes) + common
    numbers = list(range(num_experts))
    random.shuffle(numbers)
    cuts = list(itertools.accumulate([*sizes, common], initial=0))
    lists = [numbers[start:stop] for start, stop in itertools.pairwise(cuts)]
    config = MoEConfig(
        groups=[ExpertGroupConfig(f"m{i}", moe_router_topk=1, experts=experts) for i, experts in enumerate(lists[:-1])],
        common=CommonExpertsConfig(experts=lists[-1]),
        expert_order=order,
    )
    for ep in (ep for ep in range(1, num_experts + 1) if num_experts % ep == 0):
        made = ExpertGroups.from_config(config, ep)
        assert sorted(made.physical_to_logical) == list(range(num_experts))
        assert sorted(itertools.chain(*made.pools.values())) == list(range(num_experts))
        logical = made.to_logical(made.allowed())
        for modality, experts in enumerate(lists[:-1]):
            assert sorted(logical[modality].nonzero().flatten().tolist()) == sorted(experts + lists[-1])


def test_to_logical_undoes_the_physical_order():
    made = by_size(2, 6, ep=2)
    physical = torch.tensor(made.physical_to_logical, dtype=torch.float)
    assert made.to_logical(physical).tolist() == list(range(8))


def text_and_audio(text: dict, audio: dict, **moe) -> MoEConfig:
    return MoEConfig(groups=[ExpertGroupConfig("text", **text), ExpertGroupConfig("audio", **audio)], **moe)


FOUR = {"size": 4, "moe_router_topk": 2}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: text_and_audio(FOUR, {"size": 2, "moe_router_topk": 3}),
            "groups[audio].moe_router_topk=3: must not exceed the 2 experts",
        ),
        (
            lambda: text_and_audio({"experts": [0, 1]}, {"experts": [1, 2]}),
            "groups.experts=[0, 1, 1, 2]: must name each expert from 0 to 3 exactly once over all groups",
        ),
        (
            lambda: text_and_audio({"experts": [0, 2]}, {"experts": [3]}),
            "must name each expert from 0 to 2 exactly once",
        ),
        (lambda: text_and_audio({"experts": [0, 0]}, FOUR), "groups[text].experts=[0, 0]: names an expert twice"),
        (lambda: text_and_audio({"experts": [0, 1]}, FOUR), "give every group (and the common experts) by size, or"),
        (
            lambda: text_and_audio({"size": 3, "experts": [0, 1]}, FOUR),
            "groups[text].size=3: must be left out or equal",
        ),
        (lambda: text_and_audio({"size": -1}, FOUR), "groups[text].size=-1: must not be negative"),
        (lambda: text_and_audio({"size": 0}, FOUR), "groups[text].moe_router_topk=6: must not exceed the 0 experts"),
        (
            lambda: text_and_audio({**FOUR, "moe_router_num_groups": 3}, FOUR),
            "groups[text].moe_router_num_groups=3: must divide the 4 experts",
        ),
        (
            lambda: text_and_audio({**FOUR, "moe_router_group_topk": 2}, FOUR),
            "moe_router_group_topk=2: must not exceed moe_router_num_groups, 1",
        ),
        (
            lambda: text_and_audio(
                {**FOUR, "moe_router_topk": 3, "moe_router_num_groups": 4, "moe_router_group_topk": 2}, FOUR
            ),
            "groups[text].moe_router_group_topk=2: leaves 2 experts for moe_router_topk=3",
        ),
        (
            lambda: text_and_audio({**FOUR, "moe_aux_loss_coeff": -1.0}, FOUR),
            "moe_aux_loss_coeff=-1.0: must not be negative",
        ),
        (
            lambda: text_and_audio(FOUR, FOUR, common=CommonExpertsConfig(2, modalities=["image"])),
            "common.modalities=['image']: must be among text, audio",
        ),
        (
            lambda: text_and_audio(FOUR, FOUR, moe_router_score_function="sigmoid", score_rule="all"),
            "score_rule='all': must be group with moe_router_score_function=sigmoid",
        ),
        (
            lambda: text_and_audio(FOUR, FOUR, moe_shared_expert_overlap=True, moe_token_dispatcher_type="allgather"),
            "moe_shared_expert_overlap=True: needs shared experts (moe_shared_expert_intermediate_size) and"
            " moe_token_dispatcher_type=alltoall",
        ),
        (
            lambda: text_and_audio(FOUR, FOUR, common=CommonExpertsConfig(modalities=["text"])),
            "common.modalities=['text']: needs common experts",
        ),
        (
            lambda: MoEConfig(groups=[ExpertGroupConfig("text", 4, 1), ExpertGroupConfig("common", 4, 1)]),
            "groups=['text', 'common']: common is the name of the common experts",
        ),
        (lambda: MoEConfig(groups=[]), "groups=[]: needs a group for each modality"),
        (
            lambda: MoEConfig(groups=[ExpertGroupConfig("text", 8)] * 2),
            "groups=['text', 'text']: names a modality twice",
        ),
    ],
)
def test_groups_that_cannot_be_are_refused_in_one_line(build, message):
    with pytest.raises(ConfigError) as caught:
        build()
    assert str(caught.value).startswith("model.moe.")
    assert message in str(caught.value) and "\n" not in str(caught.value)
