import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_most.config import ExpertGroupConfig, MoEConfig
from megatron_most.errors import ConfigError
from megatron_most.moe.expert_groups import ExpertGroups
from megatron_most.vocab import Modality


def groups(text: int, audio: int, order: str = "interleaved", top_k: int = 1) -> ExpertGroups:
    config = MoEConfig(
        groups=[ExpertGroupConfig("text", text, top_k), ExpertGroupConfig("audio", audio, top_k)], expert_order=order
    )
    return ExpertGroups.from_config(config)


def test_interleaved_order_alternates_equal_groups():
    assert groups(4, 4).physical_to_logical == (0, 4, 1, 5, 2, 6, 3, 7)


def test_contiguous_order_is_the_logical_one():
    assert groups(4, 2, "contiguous").physical_to_logical == (0, 1, 2, 3, 4, 5)


@given(st.integers(1, 8), st.integers(1, 8), st.sampled_from([1, 2, 4, 8, 16]))
def test_every_expert_parallel_rank_holds_an_equal_share_of_each_group(text, audio, ep_size):
    order = torch.tensor(groups(text * ep_size, audio * ep_size).physical_to_logical)
    is_text = order.view(ep_size, -1) < text * ep_size
    assert is_text.sum(dim=1).tolist() == [text] * ep_size


@given(st.integers(1, 20), st.integers(1, 20), st.sampled_from(["interleaved", "contiguous"]))
def test_groups_partition_the_experts(text, audio, order):
    made = groups(text, audio, order)
    assert sorted(made.physical_to_logical) == list(range(text + audio))
    allowed = made.allowed()
    assert allowed.sum(dim=0).tolist() == [1] * (text + audio)
    assert allowed.sum(dim=1).tolist() == [text, audio]


def test_to_logical_undoes_the_physical_order():
    made = groups(3, 6)
    physical = torch.tensor(made.physical_to_logical, dtype=torch.float)
    assert made.to_logical(physical).tolist() == list(range(9))


def test_group_of_audio_comes_after_text():
    assert groups(3, 5).logical_range(Modality.AUDIO) == range(3, 8)


def test_top_k_above_the_group_size_is_refused():
    with pytest.raises(ConfigError, match=r"groups\[audio\].top_k=3: must not exceed the group's size, 2"):
        groups(4, 2, top_k=3)


def test_a_modality_without_experts_is_refused():
    with pytest.raises(ConfigError, match="needs exactly one group for each modality"):
        MoEConfig(groups=[ExpertGroupConfig("text", 4, 1)])
