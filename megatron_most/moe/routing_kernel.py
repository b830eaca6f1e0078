"""Routing from logits as one Triton kernel each way: mask, scores, top-k, probs, and sums over tokens by modality.

It computes what the operators of :mod:`~megatron_most.moe.router` compute, with sums in another order. Import it only
where :func:`megatron_most.platform.can_run_triton` is true.

A program takes T consecutive tokens of one sequence. Sums over tokens are written by program and then added, so that
the result does not depend on which program ends first. The backward pass computes scores again from the logits.

Shape letters: s positions, b micro-batch rows, n = s * b tokens, E experts (physical order), M modalities, W matrices
of the router (1, or M), B sequences (b, or 1 for all tokens together; token i belongs to sequence i % B), K largest
top_k. X = E padded to a power of two, P programs of a sequence.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from megatron_most.config import MoEConfig
from megatron_most.moe.expert_groups import ExpertGroups

_ELEMENTS = 1024
"""Logits of a program: T * X."""


class Routed(NamedTuple):
    """The result of :class:`RoutingKernel`.

    probs, routing_map: ``[n, E]`` fp32 and bool.
    counted: ``[B, M, 3 * E + 1]``: pairs, scores, p log p by expert, and tokens. It has no gradient.
    prob_sums: ``[B, M, E]``, the distribution over each token's choice, summed over tokens.
    squared_logsumexp: ``[B, M]``, of the input of the score function, summed over tokens.
    """

    probs: torch.Tensor
    routing_map: torch.Tensor
    counted: torch.Tensor
    prob_sums: torch.Tensor
    squared_logsumexp: torch.Tensor


class RoutingKernel:
    """The routing of one router, without group-limited routing.

    Args:
        mask: ``[M + 1, E]`` fp32, for each plane 0 for the experts of its choice and -inf for others.
    """

    def __init__(self, moe: MoEConfig, groups: ExpertGroups, mask: torch.Tensor) -> None:
        assert not moe.is_group_limited
        self.mask = mask
        self.top_k = torch.tensor([*groups.top_k, 0], dtype=torch.int32, device=mask.device)
        self.options = {
            "NUM_EXPERTS": groups.num_experts,
            "PADDED": triton.next_power_of_2(groups.num_experts),
            "NUM_MODALITIES": len(groups.choices),
            "MAX_TOP_K": moe.max_top_k,
            "SCALE": float(moe.moe_router_topk_scaling_factor),
            "NORMALIZES": moe.norm_topk_prob,
            "IS_SIGMOID": moe.moe_router_score_function == "sigmoid",
            "SCORES_ALL": moe.score_rule == "all",
            "NUM_MATRICES": len(groups.choices) if moe.router_weights == "per_modality" else 1,
        }

    def __call__(
        self, logits: torch.Tensor, planes: torch.Tensor, bias: torch.Tensor | None, num_sequences: int
    ) -> Routed:
        """Route the tokens of a micro-batch.

        Args:
            logits: ``[s, b, W * E]`` fp32.
            planes: ``[s, (M + 1) * b]`` bool, see :mod:`~megatron_most.moe.token_planes`.
            bias: ``[M + 1, E]``, added to the scores for the top-k alone. None: logits are compared.
            num_sequences: B.
        """
        return Routed(*_Route.apply(logits, planes.view(torch.uint8), bias, num_sequences, self))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        planes: torch.Tensor,
        bias: torch.Tensor | None,
        num_sequences: int,
        kernel: RoutingKernel,
    ) -> tuple[torch.Tensor, ...]:
        logits = logits.contiguous()
        num_tokens, num_experts = logits.shape[0] * logits.shape[1], kernel.mask.shape[1]
        num_modalities = len(kernel.mask) - 1
        probs = logits.new_empty(num_tokens, num_experts)
        routing_map = torch.empty_like(probs, dtype=torch.bool)
        grid, arguments, options = _launch(logits, planes, num_sequences, kernel)
        partial = logits.new_empty(num_sequences, grid[0], num_modalities, 4 * num_experts + 2)
        _forward_kernel[grid](
            logits,
            *arguments,
            logits if bias is None else bias,
            probs,
            routing_map.view(torch.uint8),
            partial,
            HAS_BIAS=bias is not None,
            **options,
        )
        sums = partial.sum(dim=1)
        counted, prob_sums, squares = sums.split([3 * num_experts + 1, num_experts, 1], dim=-1)
        ctx.save_for_backward(logits, planes, routing_map)
        ctx.num_sequences, ctx.kernel = num_sequences, kernel
        ctx.mark_non_differentiable(routing_map, counted)
        return probs, routing_map, counted, prob_sums, squares.squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, planes, routing_map = ctx.saved_tensors
        probs, _, _, prob_sums, squares = (gradient.contiguous() for gradient in gradients)
        grid, arguments, options = _launch(logits, planes, ctx.num_sequences, ctx.kernel)
        # Of several matrices, a token reads only its own.
        result = torch.empty_like(logits) if options["NUM_MATRICES"] == 1 else torch.zeros_like(logits)
        options.pop("MAX_TOP_K")
        _backward_kernel[grid](
            logits, *arguments, routing_map.view(torch.uint8), probs, prob_sums, squares, result, **options
        )
        return result, None, None, None, None


def _launch(
    logits: torch.Tensor, planes: torch.Tensor, num_sequences: int, kernel: RoutingKernel
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The grid, the arguments that both kernels take after the logits, and the compile-time options."""
    per_sequence = logits.shape[0] * logits.shape[1] // num_sequences
    block = max(1, _ELEMENTS // kernel.options["PADDED"])
    arguments = (planes, kernel.mask, kernel.top_k, per_sequence, *planes.stride())
    sizes = {"NUM_ROWS": logits.shape[1], "NUM_SEQUENCES": num_sequences, "BLOCK": block}
    return (triton.cdiv(per_sequence, block), num_sequences), arguments, {**kernel.options, **sizes}


@triton.jit
def _tokens(planes, per_sequence, position_stride, plane_stride, M: tl.constexpr, b: tl.constexpr,
            B: tl.constexpr, T: tl.constexpr):  # fmt: skip
    """This program's tokens ``[T]``, which of them exist, and their planes."""
    place = tl.program_id(0) * T + tl.arange(0, T)
    is_token = place < per_sequence
    token = place * B + tl.program_id(1)
    plane = tl.zeros([T], dtype=tl.int32)
    for number in tl.static_range(1, M + 1):
        address = planes + token // b * position_stride + (number * b + token % b) * plane_stride
        plane += number * tl.load(address, mask=is_token, other=0).to(tl.int32)
    return token, is_token, plane


@triton.jit
def _softmax(x):
    """Softmax ``[T, X]`` and logsumexp ``[T]``."""
    largest = tl.max(x, axis=1)
    powers = tl.exp(x - largest[:, None])
    total = tl.sum(powers, axis=1)
    return powers * (1 / total)[:, None], largest + tl.log(total)


@triton.jit
def _scores(logits, mask, token, is_token, plane, expert, E: tl.constexpr, M: tl.constexpr, W: tl.constexpr,
            IS_SIGMOID: tl.constexpr, SCORES_ALL: tl.constexpr):  # fmt: skip
    """Of each token: bounds, masked logits, scores, distribution over the choice, what divides scores to give it, the
    softmax of the input of the score function, and its logsumexp; and where its logits are."""
    is_expert = expert[None, :] < E
    inside = is_token[:, None] & is_expert
    if W == 1:
        address = token[:, None] * E + expert[None, :]
    else:
        address = (token * W + tl.minimum(plane, W - 1))[:, None] * E + expert[None, :]
    x = tl.where(is_expert, tl.load(logits + address, mask=inside, other=0.0), float("-inf"))
    bound = tl.load(mask + plane[:, None] * E + expert[None, :], mask=inside, other=0.0)
    group = x + bound
    of_group, logsumexp = _softmax(group)
    of_input = of_group
    total = tl.sum(of_group, axis=1)
    if IS_SIGMOID:
        scores = 1 / (1 + tl.exp(-group))
        total = tl.sum(scores, axis=1)
        total += tl.where(total == 0, 1.0, 0.0)
        distribution = scores * (1 / total)[:, None]
    elif SCORES_ALL:
        of_input, logsumexp = _softmax(x)
        scores = of_input
        distribution = of_group
    else:
        scores = of_group
        distribution = of_group
    return bound, group, scores, distribution, total, of_input, logsumexp, address


@triton.jit
def _forward_kernel(
    logits, planes, mask, top_k, per_sequence, position_stride, plane_stride,
    bias, probs, routing_map, partial,
    NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, NUM_MODALITIES: tl.constexpr, MAX_TOP_K: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZES: tl.constexpr, IS_SIGMOID: tl.constexpr, SCORES_ALL: tl.constexpr,
    NUM_MATRICES: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Write probs and routing map ``[n, E]`` and this program's part of the sums ``[B, P, M, 4 * E + 2]``."""
    token, is_token, plane = _tokens(
        planes, per_sequence, position_stride, plane_stride, NUM_MODALITIES, NUM_ROWS, NUM_SEQUENCES, BLOCK
    )
    expert = tl.arange(0, PADDED)
    bound, group, scores, distribution, _, _, logsumexp, _ = _scores(
        logits, mask, token, is_token, plane, expert, NUM_EXPERTS, NUM_MODALITIES, NUM_MATRICES, IS_SIGMOID, SCORES_ALL
    )
    is_expert = expert[None, :] < NUM_EXPERTS
    inside = is_token[:, None] & is_expert
    ranking = group
    if HAS_BIAS:
        added = tl.load(bias + plane[:, None] * NUM_EXPERTS + expert[None, :], mask=inside, other=0.0)
        ranking = tl.where(is_expert, scores + added + bound, float("-inf"))

    limit = tl.load(top_k + plane, mask=is_token, other=0)
    taken = tl.zeros([BLOCK, PADDED], dtype=tl.int1)
    total = tl.zeros([BLOCK], dtype=tl.float32)  # of the scores taken, added from the best on
    for place in range(MAX_TOP_K):
        is_best = expert[None, :] == tl.argmax(ranking, axis=1)[:, None]
        is_taken = is_best & (place < limit)[:, None]
        taken = taken | is_taken
        total += tl.sum(tl.where(is_taken, scores, 0.0), axis=1)
        ranking = tl.where(is_best, float("-inf"), ranking)
    gates = tl.where(taken, scores, 0.0)
    if NORMALIZES:
        gates = gates / (total + tl.where(total == 0, 1.0, 0.0))[:, None]
    place = token[:, None] * NUM_EXPERTS + expert[None, :]
    tl.store(probs + place, gates * SCALE, mask=inside)
    tl.store(routing_map + place, taken.to(tl.uint8), mask=inside)

    p_log_p = distribution * tl.log(tl.where(distribution > 0, distribution, 1.0))
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for modality in range(NUM_MODALITIES):
        is_mine = is_token & (plane == modality)
        row = partial + (program * NUM_MODALITIES + modality) * (4 * NUM_EXPERTS + 2)
        column, is_column = row + expert, expert < NUM_EXPERTS
        mine = is_mine[:, None]
        tl.store(column, tl.sum((taken & mine).to(tl.float32), axis=0), mask=is_column)
        tl.store(column + NUM_EXPERTS, tl.sum(tl.where(mine, scores, 0.0), axis=0), mask=is_column)
        tl.store(column + 2 * NUM_EXPERTS, tl.sum(tl.where(mine, p_log_p, 0.0), axis=0), mask=is_column)
        tl.store(row + 3 * NUM_EXPERTS, tl.sum(is_mine.to(tl.float32), axis=0))
        tl.store(column + 3 * NUM_EXPERTS + 1, tl.sum(tl.where(mine, distribution, 0.0), axis=0), mask=is_column)
        tl.store(row + 4 * NUM_EXPERTS + 1, tl.sum(tl.where(is_mine, logsumexp * logsumexp, 0.0), axis=0))


@triton.jit
def _backward_kernel(
    logits, planes, mask, top_k, per_sequence, position_stride, plane_stride,
    routing_map, grad_probs, grad_prob_sums, grad_squares, grad_logits,
    NUM_EXPERTS: tl.constexpr, PADDED: tl.constexpr, NUM_MODALITIES: tl.constexpr,
    SCALE: tl.constexpr, NORMALIZES: tl.constexpr, IS_SIGMOID: tl.constexpr, SCORES_ALL: tl.constexpr,
    NUM_MATRICES: tl.constexpr, NUM_ROWS: tl.constexpr, NUM_SEQUENCES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the logits."""
    token, is_token, plane = _tokens(
        planes, per_sequence, position_stride, plane_stride, NUM_MODALITIES, NUM_ROWS, NUM_SEQUENCES, BLOCK
    )
    expert = tl.arange(0, PADDED)
    _, _, scores, distribution, divisor, of_input, logsumexp, address = _scores(
        logits, mask, token, is_token, plane, expert, NUM_EXPERTS, NUM_MODALITIES, NUM_MATRICES, IS_SIGMOID, SCORES_ALL
    )
    inside = is_token[:, None] & (expert[None, :] < NUM_EXPERTS)
    place = token[:, None] * NUM_EXPERTS + expert[None, :]
    taken = tl.load(routing_map + place, mask=inside, other=0) != 0
    of_scores = tl.where(taken, tl.load(grad_probs + place, mask=inside, other=0.0) * SCALE, 0.0)
    if NORMALIZES:
        chosen = tl.where(taken, scores, 0.0)
        total = tl.sum(chosen, axis=1)
        total += tl.where(total == 0, 1.0, 0.0)
        mean = tl.sum(of_scores * chosen, axis=1) / total
        of_scores = tl.where(taken, (of_scores - mean[:, None]) / total[:, None], 0.0)

    is_valid = is_token & (plane < NUM_MODALITIES)
    sums = tl.program_id(1) * NUM_MODALITIES + plane
    of_distribution = tl.load(
        grad_prob_sums + sums[:, None] * NUM_EXPERTS + expert[None, :], mask=inside & is_valid[:, None], other=0.0
    )
    of_logsumexp = 2 * logsumexp * tl.load(grad_squares + sums, mask=is_valid, other=0.0)
    if IS_SIGMOID:
        mean = tl.sum(of_distribution * distribution, axis=1)
        of_scores += (of_distribution - mean[:, None]) / divisor[:, None]
        result = of_scores * scores * (1 - scores)
    elif SCORES_ALL:
        result = scores * (of_scores - tl.sum(of_scores * scores, axis=1)[:, None])
        result += distribution * (of_distribution - tl.sum(of_distribution * distribution, axis=1)[:, None])
    else:
        of_distribution += of_scores
        result = distribution * (of_distribution - tl.sum(of_distribution * distribution, axis=1)[:, None])
    tl.store(grad_logits + address, result + of_logsumexp[:, None] * of_input, mask=inside)
