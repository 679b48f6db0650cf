# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
How much `generate` computes, whatever the machine: multiply-accumulates, decoder positions and decoder evaluations.

    with count_work(model) as work:
        model.generate(**inputs)
    print(work.macs["decoder"], work.positions, work.evaluations)

The multiply-accumulates are those of matrix products, convolutions and attention, as PyTorch counts them operation by
operation while they run; activations, norms and softmax are not counted.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

# Where `generate` spends its time, in the order of a transcription.
STAGES = ("encoder", "cross keys", "decoder", "output layer", "sampler")
ATTENTION_OPERATIONS = ("attention", "bmm")


@contextmanager
def replaced(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Puts `make(what was there)` in the place of an object's or module's attribute for a while."""
    was_own = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


@contextmanager
def watch_stages(
    model: Any,
    around: Callable[[str], AbstractContextManager],
    on_evaluation: Callable[[int], None] = lambda num_positions: None,
) -> Iterator[None]:
    """
    Enters `around(stage)` about every call of a stage of `generate`, see `STAGES`, and tells `on_evaluation` of every
    decoder evaluation how many positions (rows times width, padding included) it computes. A stage that is called
    within another belongs to that one. Of an export in ONNX Runtime the encoder has the cross keys in it, and the
    decoder the output layer.
    """
    targets = [("encoder", model, "encode"), ("cross keys", model, "prepare_cross_attention")]
    if hasattr(model, "proj_out"):
        targets += [("decoder", model.get_decoder(), "forward"), ("output layer", model.proj_out, "forward")]
    else:
        # Python looks a call up in the class.
        targets.append(("decoder", type(model.get_decoder()), "__call__"))
    # Not imported by name: a checkpoint that brings its code has a module of its own.
    generation = sys.modules[type(model)._denoise.__module__]
    targets += [("sampler", generation, "propose_tokens"), ("sampler", generation, "sampler_step")]
    active: list[str] = []

    def wrap(stage: str) -> Callable[[Any], Any]:
        def make(call: Any) -> Any:
            def watched(*args, **kwargs):
                if active:
                    return call(*args, **kwargs)
                if stage == "decoder":
                    on_evaluation(_num_positions(args, kwargs))
                active.append(stage)
                try:
                    with around(stage):
                        return call(*args, **kwargs)
                finally:
                    active.pop()

            return watched

        return make

    with ExitStack() as stack:
        for stage, owner, name in targets:
            stack.enter_context(replaced(owner, name, wrap(stage)))
        yield


def _num_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Of a call of the decoder, with ids by name or as the first of the tensors."""
    ids = kwargs["input_ids"] if "input_ids" in kwargs else next(one for one in args if hasattr(one, "numel"))
    return ids.numel()


@dataclass
class Work:
    """
    What was computed, for all rows together.

    Attributes:
        macs (`dict`): multiply-accumulates of each stage, and of what is in none as "rest".
        decoder_attention_macs (`int`): those of "decoder" that are products of queries and keys, and of weights and
            values. They grow with frames and canvas; all others are the same for every position.
        positions (`int`): of decoder evaluations, rows times width, padding included.
        evaluations (`int`): calls of the decoder, each for one row or more.
    """

    macs: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*STAGES, "rest"), 0))
    decoder_attention_macs: int = 0
    positions: int = 0
    evaluations: int = 0

    def per_utterance(self, num_utterances: int) -> dict[str, Any]:
        """The numbers as a dict, divided, rounded to 0.01; MACs rounded to whole ones."""
        values = asdict(self)
        macs = {stage: round(count / num_utterances) for stage, count in values.pop("macs").items()}
        attention_macs = round(values.pop("decoder_attention_macs") / num_utterances)
        rest = {name: round(value / num_utterances, 2) for name, value in values.items()}
        return {"macs": macs, "decoder_attention_macs": attention_macs, **rest}


@contextmanager
def count_work(model: Any) -> Iterator[Work]:
    """Counts what the model computes meanwhile; read the [`Work`] behind the block. It slows the model down."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    # PyTorch has no formulas for these kernels of CPUs.
    formulas = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.quantized.linear_dynamic: _int8_linear_flops,
    }
    work = Work()
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:

        def count() -> tuple[int, int]:
            """All MACs so far, and those of attention."""
            flops = counter.get_flop_counts().get("Global", {})
            attention = sum(n for name, n in flops.items() if any(one in str(name) for one in ATTENTION_OPERATIONS))
            return sum(flops.values()) // 2, attention // 2

        @contextmanager
        def around(stage: str) -> Iterator[None]:
            before = count()
            yield
            after = count()
            work.macs[stage] += after[0] - before[0]
            if stage == "decoder":
                work.decoder_attention_macs += after[1] - before[1]

        def on_evaluation(num_positions: int) -> None:
            work.positions += num_positions
            work.evaluations += 1

        with watch_stages(model, around, on_evaluation):
            yield work
        work.macs["rest"] = count()[0] - sum(work.macs.values())


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of shapes (B, heads, L, head_dim) and (B, heads, K, head_dim)."""
    batch_size, num_heads, length, head_dim = query
    return 2 * batch_size * num_heads * length * key[2] * (head_dim + value[3])


def _int8_linear_flops(states: Any, packed: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Of a shape (..., in_features); those of packed weights cannot be seen."""
    return 2 * math.prod(states) * out_shape[-1]


__all__ = ["STAGES", "Work", "count_work", "replaced", "watch_stages"]
