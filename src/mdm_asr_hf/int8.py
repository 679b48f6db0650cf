# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
8-bit integers on a CPU: linear layers with int8 weights, one scale per output channel, and activations quantised as
they come. Everything else stays in fp32.

Each position's activations have a scale of their own (as in arXiv 2206.01861), so that what a layer gives for one
position does not depend on the others of the call. The attention, in fp32, sums in an order that depends on their
number, which 8 bits can enlarge to another token where two are nearly as probable.
Nor do the few positions that hold values tens of times as large as all others' round those away.

CPUs without VNNI add products in pairs, in 16 bits, where two of an 8-bit activation and an 8-bit weight do not fit:
the sum is cut off. There, activations have 7 bits, so that every sum fits.

An evaluation of a few positions takes as long as reading the decoder's weights does, so that a quarter of the bytes
counts more there than the faster arithmetic.
"""

import warnings
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

logger = logging.get_logger(__name__)

QUANT_METHOD = "mdm_asr_int8"
PARTS = ("encoder", "decoder")
# Those of x86 CPUs.
FIXED_STEPS_ENGINES = ("x86", "fbgemm", "onednn")


def _pack(weight: torch.Tensor) -> Any:
    """The kernel's own form of an fp32 weight (out_features, in_features) in int8, symmetric."""
    # A row of zeros takes any scale.
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    zero_points = torch.zeros(len(weight), dtype=torch.long)
    with warnings.catch_warnings():
        # The kernel takes no other tensors, and has no successor that is as fast without compiling.
        warnings.filterwarnings("ignore", message="torch.quantize_per_tensor", category=UserWarning)
        quantized = torch.quantize_per_channel(weight, scales.double(), zero_points, 0, torch.qint8)
    return torch.ops.quantized.linear_prepack(quantized, None)


def _check_parts(parts: Any) -> None:
    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"`parts` must be of {list(PARTS)}, got {list(parts)}.")


@cache
def cuts_sums() -> bool:
    """Whether this CPU's kernel cuts off sums of products of 8-bit activations: asked of the kernel itself."""
    size = 64
    # All are at the ends of their ranges, 255 x 127.
    product = torch.ops.quantized.linear_dynamic(torch.ones(1, size), _pack(torch.ones(size, size)), False)
    return bool((product < 0.99 * size).any())


class Int8Linear(nn.Linear):
    """
    A linear layer (..., in_features) -> (..., out_features) with packed int8 weights, for inference on a CPU. It is an
    `nn.Linear` for whoever looks for those, but has no `weight`.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        bias = None if linear.bias is None else linear.bias.detach().float()
        # It comes last, behind the scale of the position.
        self.register_buffer("late_bias", bias, persistent=False)
        self.packed = _pack(linear.weight.detach().float())
        self.num_steps = 63 if cuts_sums() else 127

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # Left out in silence, the weights would be missing from the checkpoint.
        raise ValueError(
            f"int8 layers such as {prefix.rstrip('.')!r} cannot be saved. Save the model in fp32, and load that in "
            "int8."
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.numel() == 0:
            return states.new_zeros((*states.shape[:-1], self.out_features))
        # The kernels take no other type, which autocast gives what comes from layers that are not int8.
        states = states.float()
        largest = states.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        product = self._multiply(states / largest)
        return product * largest if self.late_bias is None else torch.addcmul(self.late_bias, product, largest)

    def _multiply(self, states: torch.Tensor) -> torch.Tensor:
        """The product for states of [-1, 1], all of them quantised in the same steps."""
        if torch.backends.quantized.engine in FIXED_STEPS_ENGINES:
            multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
            return multiply(states, 1 / self.num_steps, self.num_steps + 1, self.packed)
        # The kernels of other CPUs choose the steps by the least and the largest value: a position more holds them.
        rows = states.flatten(0, -2)
        ends = rows.new_zeros((1, self.in_features))
        ends[0, :2] = torch.tensor([-1.0, 1.0])[: self.in_features]
        product = torch.ops.quantized.linear_dynamic(torch.cat([rows, ends]), self.packed, self.num_steps < 127)
        return product[:-1].view(*states.shape[:-1], self.out_features)


def _quantize_linears(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, Int8Linear(child))
        else:
            _quantize_linears(child)


def quantize_int8(model: nn.Module, parts: tuple[str, ...] = PARTS) -> nn.Module:
    """
    Puts int8 layers in the place of the linear ones, in place, and returns the model.

    Args:
        model ([`MDMASRForConditionalGeneration`]): in fp32, on the CPU.
        parts (`tuple[str, ...]`): of "encoder" and "decoder". The output layer and what drafts belong to the
            decoder.

    Raises:
        ValueError: unknown parts, another precision, weights that are not on the CPU, or an output layer that is not
            tied to the embeddings.
    """
    _check_parts(parts)
    devices = {str(parameter.device) for parameter in model.parameters()}
    if devices - {"cpu"}:
        raise ValueError(f"int8 runs on CPUs, but the model is on {sorted(devices)}. Load it with `device_map='cpu'`.")
    if model.dtype != torch.float32:
        raise ValueError(f"int8 needs a model in fp32, got {model.dtype}. Load it with `dtype=torch.float32`.")
    if "decoder" in parts and not model.config.tie_word_embeddings:
        raise ValueError(
            "`tie_word_embeddings=False`: int8 needs an output layer that is tied to the embeddings. Pass "
            "`parts=('encoder',)`."
        )
    if "encoder" in parts:
        _quantize_linears(model.model.encoder)
    if "decoder" in parts:
        _quantize_linears(model.model.decoder)
        if model.model.encoder_projection is not None:
            model.model.encoder_projection = Int8Linear(model.model.encoder_projection)
        # Tied to the embedding, which is read row by row and stays as it is.
        model.proj_out = Int8Linear(model.proj_out)
    # As transformers notes it on quantized models.
    model.is_quantized, model.quantization_method = True, QUANT_METHOD
    return model


def is_int8(model: nn.Module) -> bool:
    """Whether `quantize_int8` made the model, or a part of it, what it is."""
    return getattr(model, "quantization_method", None) == QUANT_METHOD


@register_quantization_config(QUANT_METHOD)
@dataclass
class MDMASRInt8Config(QuantizationConfigMixin):
    """
    For `from_pretrained(..., quantization_config=MDMASRInt8Config())`: int8 on a CPU, see this module.

    Args:
        parts (`list[str]`): of "encoder" and "decoder".
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    quant_method: Any = QUANT_METHOD

    def __post_init__(self):
        _check_parts(self.parts)


@register_quantizer(QUANT_METHOD)
class MDMASRInt8Quantizer(HfQuantizer):
    """Quantises a model behind the loading of its weights."""

    requires_calibration = False

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype:
        if dtype not in (None, torch.float32):
            logger.info(f"`dtype={dtype}`: what int8 leaves is loaded in fp32.")
        return torch.float32

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
        if {str(device) for device in devices} - {"cpu", "None"}:
            raise ValueError(f"int8 runs on CPUs, got `device_map={device_map!r}`. Load with `device_map='cpu'`.")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs) -> nn.Module:
        return quantize_int8(model, tuple(self.quantization_config.parts))

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
