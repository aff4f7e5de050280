"""Owns sequence parallelism: rows that are split over several processes in training. Chooses no row and no loss."""

from collections.abc import Mapping

from tinyr1_utils.packing import IGNORED


def check_splittable(config, size: int) -> None:
    """ValueError where rows of a model of this configuration can not be split over `size` processes."""
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    if heads % size or shared % size:
        raise ValueError(
            f"sequence_parallel_size {size} must divide the model's {heads} attention and {shared} key-value heads"
        )
    if size > 1 and set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError("sequence_parallel_size above 1 needs full attention in every layer; this model has others")


def isolate_by_position() -> None:
    """Let transformers' sdpa isolate packed samples by positions: Ulysses hands on a row's positions, never a mask."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import find_packed_sequence_indices
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attend(module, query, key, value, attention_mask, position_ids=None, **kwargs):
        if attention_mask is None and position_ids is not None:
            sample = find_packed_sequence_indices(position_ids)
            if sample is not None:
                attention_mask = (sample[:, None, :, None] == sample[:, None, None, :]).tril()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = attend


def split_attention(model, size: int, rows: int, backend: str) -> None:
    """From here on the model's attention sees whole rows, of which each of `size` processes holds a piece.

    Every process calls this once, before the trainer is made. By DeepSpeed's Ulysses (Jacobs et al. 2023): processes
    exchange heads for tokens around the attention. accelerate's own way to it was measured on CPU to drop the mask of
    isolated samples with sdpa, to scale ZeRO-2's gradients by `size`, and to refuse to resume.
    """
    import deepspeed
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

    deepspeed.init_distributed(backend)
    attention = model.config._attn_implementation
    if attention == "sdpa":
        isolate_by_position()
    UlyssesSPAttentionHF.register_with_transformers(
        model, attention, sequence_parallel_size=size, micro_batch_size=rows, disable_in_eval=True
    )


def piece(batch: Mapping, size: int, index: int) -> dict:
    """Piece `index` of `size` of every row, padded on the right to a multiple of `size`; labels already shifted."""
    import torch
    from torch.nn.functional import pad

    rows, tokens = batch["input_ids"].shape
    missing = -tokens % size
    tail = torch.arange(missing, device=batch["position_ids"].device).expand(rows, -1)
    shifted = pad(batch["labels"][:, 1:], (0, missing + 1), value=IGNORED)
    whole = {
        "input_ids": pad(batch["input_ids"], (0, missing)),
        "position_ids": torch.cat([batch["position_ids"], tail], dim=1),
        "labels": shifted,  # what the trainer counts
        "shift_labels": shifted,  # what the loss takes as they are
    }
    return {name: tensor.chunk(size, dim=1)[index].contiguous() for name, tensor in whole.items()}


def trainer_class(size: int):
    """TRL's SFTTrainer; for `size` above 1 that many processes in a row train on the same rows, a piece each.

    TRL's loss is the sum over a process's tokens over the number of tokens of all processes, so nothing else has to
    know of the pieces: gradients are averaged as between processes with rows of their own. Held-out rows stay whole.
    """
    from trl import SFTTrainer

    if size == 1:
        return SFTTrainer

    class SplitRowsTrainer(SFTTrainer):
        def get_train_dataloader(self):
            loader = super().get_train_dataloader()
            loader.batch_sampler.num_processes //= size  # accelerate's BatchSamplerShard
            loader.batch_sampler.process_index //= size
            return loader

        def get_batch_samples(self, epoch_iterator, num_batches, device):
            index = self.accelerator.process_index % size
            pieces = (piece(batch, size, index) for batch in epoch_iterator)
            return super().get_batch_samples(pieces, num_batches, device)

    return SplitRowsTrainer
