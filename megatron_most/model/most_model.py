"""MoST on Megatron-Core's language module.

Shape letters: b micro-batch rows, s positions, n of them in all rows that have a target, h hidden size, C codebooks,
V ids (padded), K codes (padded).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel import ColumnParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_most.config.model import VOCAB_MULTIPLE
from megatron_most.data.loading.batch import Targets
from megatron_most.model.codebooks import CodebookEmbeddings, CodebookHeads
from megatron_most.model.key_value_cache import KeyValueCache
from megatron_most.model.packed_row import PackedRow
from megatron_most.model.rotary import Rotations
from megatron_most.model.target_rows import cross_entropy, put_rows, take_rows
from megatron_most.moe.token_planes import pack_planes
from megatron_most.vocab import NO_CODE, VocabLayout


def padded(size: int) -> int:
    """``size`` rounded up to :data:`~megatron_most.config.model.VOCAB_MULTIPLE`."""
    return -(-size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class MoSTModel(LanguageModule):
    """One pipeline stage of a MoST model.

    It extends ``LanguageModule``, not ``GPTModel``, which Megatron maintains for critical fixes only. Modules have the
    names they have in ``GPTModel``, so that checkpoints have the same keys.

    Args:
        vocab: the id space. Layout ``frame`` adds codebook embeddings to the first stage and heads to the last.
        max_sequence_length: positions of the longest row.
        rotary: the rotary embeddings of all layers.
        shares_weights: whether one matrix is both the embedding of ids and their output head. The last stage then has a
            copy of it, if it is not the first.
    """

    def __init__(
        self,
        config: TransformerConfig,
        transformer_layer_spec: TransformerBlockSubmodules,
        vocab: VocabLayout,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        rotary: Rotations,
        shares_weights: bool = False,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config)
        # Attributes that Megatron's schedules and gradient reductions read.
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = shares_weights
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.max_sequence_length = max_sequence_length
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded(vocab.size),
                max_sequence_length=max_sequence_length,
                position_embedding_type="none",
                tp_group=self.pg_collection.tp,
            )
        # Built last, but registered in the order of the forward pass, in which gradient buffers and the gathering of
        # updated weights expect parameters.
        self.register_module("codebook_embeddings", None)
        self.decoder = TransformerBlock(
            config=config,
            spec=transformer_layer_spec,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=self.pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded(vocab.size),
                config=config,
                init_method=config.init_method,
                bias=False,
                # forward() gathers the sequence once for all heads; the backward of that reduces the gradients.
                disable_grad_reduce=True,
                skip_weight_param_allocation=pre_process and shares_weights,
                tp_group=self.pg_collection.tp,
            )
            self.output_layer.sequence_parallel = False
        self.setup_embeddings_and_output_layer()
        self.vocab = vocab
        self.rotary = rotary
        codebooks = (config, vocab.num_codebooks, padded(vocab.codebook_size), self.pg_collection)
        uses_codes = vocab.codec_layout.uses_side_codes
        self.codebook_embeddings = CodebookEmbeddings(*codebooks) if uses_codes and pre_process else None
        self.codebook_heads = CodebookHeads(*codebooks) if uses_codes and post_process else None

    def set_input_tensor(self, input_tensor: list[torch.Tensor | None]) -> None:
        """Set the hidden states ``[s, b, h]`` received from the previous stage. Called by Megatron's schedules."""
        (hidden,) = input_tensor
        self.decoder.set_input_tensor(hidden)

    # Nine arguments: the stage's whole input, under the names that Megatron's models and its inference give it.
    def forward(
        self,
        ids: torch.Tensor,
        modality: torch.Tensor,
        is_padding: torch.Tensor,
        codes: torch.Tensor | None = None,
        targets: Targets | None = None,
        attention_mask: torch.Tensor | None = None,
        packed_seq_params: PackedRow | None = None,
        inference_context: KeyValueCache | None = None,
        logit_ids: range | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Run this stage. All stages get the same batch and use what they need.

        Args:
            ids: ``[b, s]``.
            modality: ``[b, s]``, :class:`~megatron_most.vocab.Modality` of each input position.
            is_padding: ``[b, s]`` bool; padding is routed to no expert.
            codes: ``[b, s, C]``, ``NO_CODE`` where a position has no visible frame (layout ``frame`` only). None: no
                position has a frame, and no codes are predicted.
            targets: the labels and their positions.
            attention_mask: as in :meth:`~megatron_most.model.core_attention.PortableCoreAttention.forward`.
            packed_seq_params: the documents of a packed row. Positions restart at their boundaries, and attention does
                not cross them.
            inference_context: key-value cache.
            logit_ids: return the logits of these ids only. None: of all ids.

        Returns:
            Not the last stage: hidden states ``[s, b, h]``. Last stage with targets: losses ``[b, s, 1 + C]`` fp32
            (main head, then each codebook; ``[b, s, 1]`` in layout ``flat``), 0 where there is no target. Without
            targets: logits ``[b, s, V]`` fp32 and codebook logits ``[b, s, C, K]`` fp32 (None without ``codes``). With
            an ``inference_context``, logits are those of the last position only.
        """
        hidden = self.decoder(
            hidden_states=self._embed(ids, codes) if self.pre_process else None,
            attention_mask=attention_mask,
            inference_context=inference_context,
            rotary_pos_emb=self.rotary(ids.shape[1], packed_seq_params, inference_context),
            packed_seq_params=packed_seq_params,
            padding_mask=self._local_planes(modality, is_padding),
        )
        if not self.post_process:
            return hidden
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=self.pg_collection.tp
            )
        if targets is None:
            if inference_context is not None:
                hidden = hidden[-1:]  # generation continues from the last position only
            code_logits = None if codes is None or self.codebook_heads is None else self.codebook_heads.logits(hidden)
            return self._logits(hidden, logit_ids), code_logits
        return self.losses(hidden, targets)

    def losses(self, hidden: torch.Tensor, targets: Targets) -> torch.Tensor:
        """``hidden [s, b, h]`` of the whole sequence -> losses ``[b, s, 1 + C]``. Heads run on targets only."""
        length, batch_size, _ = hidden.shape
        rows, tensor_group = hidden.flatten(0, 1), self.pg_collection.tp
        logits = self.output_layer(take_rows(rows, targets.index), weight=self._tied_weight())[0]
        losses = put_rows(cross_entropy(logits, targets.labels, tensor_group)[:, None], targets.index, len(rows))
        if self.codebook_heads is not None:
            assert targets.code_index is not None and targets.code_labels is not None
            logits = self.codebook_heads(take_rows(rows, targets.code_index))
            # With delayed codebooks, a position may have labels for some codebooks only.
            has_label, labels = targets.code_labels != NO_CODE, targets.code_labels.clamp(min=0)
            of_codes = cross_entropy(logits, labels, tensor_group) * has_label
            losses = torch.cat([losses, put_rows(of_codes, targets.code_index, len(rows))], dim=-1)
        return losses.unflatten(0, (length, batch_size)).transpose(0, 1)

    def _embed(self, ids: torch.Tensor, codes: torch.Tensor | None) -> torch.Tensor:
        embeddings = self.embedding(input_ids=ids, position_ids=None)
        if self.codebook_embeddings is None or codes is None:
            return embeddings
        return embeddings + self.codebook_embeddings(codes)

    def _logits(self, hidden: torch.Tensor, ids: range | None) -> torch.Tensor:
        """``[s, b, h]`` -> ``[b, s, V]`` fp32."""
        if ids is None or self.pg_collection.tp.size() > 1:
            logits, _ = self.output_layer(hidden, weight=self._tied_weight(), runtime_gather_output=True)
            logits = logits if ids is None else logits[..., ids.start : ids.stop]
        else:
            tied = self._tied_weight()
            weight = self.output_layer.weight if tied is None else tied
            logits = F.linear(hidden, weight[ids.start : ids.stop])
        return logits.float().transpose(0, 1)

    def _tied_weight(self) -> torch.Tensor | None:
        """The output head where it is the embedding; None if the output layer has its own."""
        return self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None

    def _local_planes(self, modality: torch.Tensor, is_padding: torch.Tensor) -> torch.Tensor:
        """This rank's planes under sequence parallelism. Megatron shards ``padding_mask`` on the first stage only."""
        planes = pack_planes(modality, is_padding, len(self.vocab.modality_names))
        if self.config.sequence_parallel:
            tensor_group = self.pg_collection.tp
            planes = planes.chunk(tensor_group.size(), dim=1)[tensor_group.rank()].contiguous()
        return planes
