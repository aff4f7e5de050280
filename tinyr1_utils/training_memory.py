"""Owns what a training step of a branch SFT holds in memory: closed forms in bytes, by part and moment. Runs nothing.

They follow the code that trains here: transformers 5.19, TRL 1.16, DeepSpeed 0.19.8. benchmarks/memory_plan.py holds
them against measured peaks on CPU; what is for GPUs alone is read from source, not measured.
"""

from dataclasses import dataclass

from tinyr1_utils.config import SftParameters

GIB = 2**30
# TRL's fused head (trl/kernels/chunked_logprob.py) makes logits in tiles, with Liger or without, and never all of them.
TILE_TOKENS, TILE_WORDS = 4096, 32768
CPU_TILES = 7.75  # float32 copies of a tile that its torch version holds at once; on CUDA a kernel works in place
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters, sub_group_size.
BUCKET, LIVE, SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
CUDA_BYTES = 2 * GIB  # assumed: context, NCCL, what the allocator can not use
PARTS = ("gradients", "activations", "logits and loss", "bfloat16 copies of weights")


@dataclass(frozen=True)
class Shape:
    """A dense decoder as its config.json describes it, counted in elements; widths are elements per token."""

    parameters: int
    linear_parameters: int  # those of the decoder layers
    lora_parameters: int  # per rank, on every linear layer
    layers: int
    hidden: int
    heads: int
    queries: int  # heads x head size
    keys: int  # heads of keys x head size
    intermediate: int
    vocabulary: int
    head_norms: bool  # queries and keys are normalised, as in Qwen3


def autocast(parameters: SftParameters) -> bool:
    """Whether float32 weights are cast to bfloat16 for each matrix product, as they are without ZeRO."""
    return parameters.precision == "bfloat16" and not parameters.zero_stage


def weight_bytes(parameters: SftParameters) -> int:
    """Bytes of a weight and of an element between layers: 2 where ZeRO keeps a float32 master copy, else 4."""
    return 2 if parameters.precision == "bfloat16" and parameters.zero_stage else 4


def compute_bytes(parameters: SftParameters) -> int:
    """Bytes of an element inside a layer."""
    return 2 if parameters.precision == "bfloat16" else 4


def pass_tokens(parameters: SftParameters) -> int:
    """Tokens of one forward pass in one process."""
    return parameters.per_device_batch_size * parameters.max_seq_tokens // parameters.sequence_parallel_size


def trained_parameters(parameters: SftParameters, shape: Shape) -> int:
    """Elements that the optimizer changes."""
    return shape.parameters if parameters.method == "full" else parameters.lora_rank * shape.lora_parameters


def layer_bytes(parameters: SftParameters, shape: Shape) -> int:
    """Bytes per token that one layer saves for its backward pass.

    A test counts them with torch's saved_tensors_hooks. Not so with flash_attention_2 and Liger's kernels: theirs are
    read from source (attention keeps keys and values unrepeated; a norm saves its input alone, the MLP no activation).
    """
    stream, inner, liger = weight_bytes(parameters), compute_bytes(parameters), parameters.use_liger_kernel

    def norm(width: int, size: int) -> int:
        return width * (size if liger else 4 + size)  # the input in float32, and the normalised input

    # Under autocast q, k, v, gate and up each save a copy of their input; else those behind a norm share one.
    saved = 2 * norm(shape.hidden, stream) + (5 if autocast(parameters) else 2) * inner * shape.hidden
    if shape.head_norms:
        saved += norm(shape.queries + shape.keys, inner)
    if parameters.attention == "flash_attention_2":
        saved += 2 * inner * (shape.queries + shape.keys) + 4 * shape.heads
    elif parameters.attention == "sdpa":  # keys and values repeated for all heads, and a mask of its own in each layer
        saved += 4 * inner * shape.queries + 4 * shape.heads + inner * parameters.max_seq_tokens
    else:  # eager: the softmax in float32, and again in bfloat16
        saved += 4 * inner * shape.queries + (4 if inner == 4 else 6) * shape.heads * parameters.max_seq_tokens
    return saved + (3 if liger else 4) * inner * shape.intermediate


def activation_bytes(parameters: SftParameters, shape: Shape) -> tuple[int, int]:
    """Bytes that a forward pass saves, and bytes at work while one layer is gone through backwards."""
    tokens, stream = pass_tokens(parameters), weight_bytes(parameters)
    layer = layer_bytes(parameters, shape)
    last = (4 + 2 * stream) * shape.hidden  # the last norm and what it hands to the head
    working = 3 * compute_bytes(parameters) * shape.intermediate + 4 * stream * shape.hidden
    if parameters.gradient_checkpointing:  # keeps the input of each layer, and computes one layer at a time again
        return (shape.layers * stream * shape.hidden + last) * tokens, (layer + working) * tokens
    return (shape.layers * layer + last) * tokens, working * tokens


def loss_bytes(parameters: SftParameters, shape: Shape, device: str) -> float:
    """Bytes at work in TRL's fused head: a tile of logits, the last states' gradient, and the head's.

    Gradients are summed in float32, and copied where weights are bfloat16. A LoRA leaves the head as it is.
    """
    tokens = pass_tokens(parameters)
    rows = min(tokens, TILE_TOKENS)
    if device == "cpu":
        tile = CPU_TILES * 4 * rows * min(shape.vocabulary, TILE_WORDS)
    else:
        tile = compute_bytes(parameters) * rows * TILE_WORDS
    head = (4 if weight_bytes(parameters) == 4 else 6) * shape.vocabulary * shape.hidden
    return tile + (4 + weight_bytes(parameters)) * tokens * shape.hidden + (head if parameters.method == "full" else 0)


def state_bytes(parameters: SftParameters, shape: Shape) -> dict[str, float]:
    """Bytes of weights, gradients, AdamW's state and of communication, in one process.

    ZeRO-2 shares out gradients and optimizer, ZeRO-3 the weights too; the optimizer then holds the weights in float32.
    """
    stage, processes, size = parameters.zero_stage, parameters.num_processes, weight_bytes(parameters)
    trained = trained_parameters(parameters, shape)
    share = trained / processes if stage else trained
    buffers = size * trained if processes > 1 else 0  # DDP's copy of all gradients
    if stage == 2:  # two buckets, since overlap_comm is on
        buffers = 2 * size * min(BUCKET, trained)
    elif stage == 3:  # gathered weights, the bucket, and its copy in the order of the processes
        buffers = size * (min(LIVE, shape.parameters) + 2 * min(BUCKET, trained))
    return {
        "weights": size * shape.parameters / (processes if stage == 3 else 1),
        "optimizer": (12 if stage else 8) * share,
        "communication": buffers,
        "gradients": size * share,
    }


def moments(parameters: SftParameters, shape: Shape, device: str) -> dict[str, dict[str, float]]:
    """Bytes by part at four moments of a step, on `cuda` or `cpu`.

    A backward pass fills gradients as it frees activations, so the two are not whole at once, unless gradients stay
    from the pass before (gradient_accumulation) or lie in a buffer (ZeRO-3).
    """
    states, stage = state_bytes(parameters, shape), parameters.zero_stage
    gradients = states.pop("gradients")
    states |= {"CUDA and NCCL": CUDA_BYTES} if device == "cuda" else {}
    kept = gradients if parameters.gradient_accumulation > 1 or stage == 3 else 0
    saved, layer = activation_bytes(parameters, shape)
    head = weight_bytes(parameters) * shape.vocabulary * shape.hidden if parameters.method == "full" else 0
    casts = 2 * shape.linear_parameters if autocast(parameters) else 0
    held = casts / shape.layers if parameters.gradient_checkpointing else casts
    # The step makes a flat copy of the gradients and one in float32; ZeRO-3 does so for a group of them at a time.
    share = gradients / weight_bytes(parameters)
    step = (4 + weight_bytes(parameters)) * (min(share, SUB_GROUP) if stage == 3 else share) if stage else 0
    found = {
        "loss": (kept, saved, loss_bytes(parameters, shape, device), casts),
        "last layer backward": (kept + head, saved + layer, 0, held),
        "first layer backward": (gradients, saved / shape.layers + layer, 0, casts / shape.layers),
        "optimizer step": (gradients + step, 0, 0, 0),
    }
    return {moment: states | dict(zip(PARTS, parts, strict=True)) for moment, parts in found.items()}


def peak_gib(held: dict[str, dict[str, float]]) -> float:
    """The largest sum of the moments."""
    return max(sum(parts.values()) for parts in held.values()) / GIB
