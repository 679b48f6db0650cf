# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Export to ONNX: an encoder graph, and a decoder graph of one evaluation of the active window."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .active_window_mdm_asr import KeyValue
from .int8_mdm_asr import needs_position_scales

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
# A file of protobuf holds at most 2 GiB: larger weights stand in a file of their own beside it.
MAX_EMBEDDED_BYTES = 1_500_000_000


def layer_names(kind: str, num_layers: int) -> list[str]:
    """Names of a graph's inputs or outputs that there is one of for every layer, such as `cross_key.0`."""
    return [f"{kind}.{layer}" for layer in range(num_layers)]


class _ConcatenatingCache:
    """
    Stands in for [`CanvasCache`] in a graph, which has no state: past keys and values come in, the window's go out.

    Attributes:
        new_keys, new_values (`list` of `torch.Tensor` of shape (R, key-value heads, W, head_dim)): one per layer.
    """

    def __init__(self, past_keys: list[torch.Tensor], past_values: list[torch.Tensor]):
        self.past_keys, self.past_values = past_keys, past_values
        self.new_keys: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []

    def update(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> KeyValue:
        self.new_keys.append(keys)
        self.new_values.append(values)
        return torch.cat([self.past_keys[layer], keys], dim=2), torch.cat([self.past_values[layer], values], dim=2)


class EncoderGraph(nn.Module):
    """The encoder, and the decoder's cross-attention keys and values of its frames."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model.prepare_cross_attention(self.model.encode(input_features, attention_mask))
        keys, values = zip(*outputs.cross_attention_states, strict=True)
        return outputs.last_hidden_state, outputs.attention_mask.bool(), *keys, *values


class DecoderGraph(nn.Module):
    """One evaluation of the decoder on a window of prompt and canvas, by the package's own decoder."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.proj_out = model.get_decoder(), model.proj_out

    def forward(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor,
        key_mask: torch.BoolTensor,
        frame_mask: torch.BoolTensor,
        places: torch.LongTensor,
        past_keys: list[torch.Tensor],
        past_values: list[torch.Tensor],
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            input_ids, position_ids (`torch.LongTensor` of shape (R, W)): the window, and where it stands.
            key_mask (`torch.BoolTensor` of shape (R, P + W)): which past positions and positions of the window count.
            frame_mask (`torch.BoolTensor` of shape (R, T)): which frames count.
            places (`torch.LongTensor` of shape (C,)): those among R * W positions that logits are computed of.
            past_keys, past_values (`list` of `torch.Tensor` of shape (R, key-value heads, P, head_dim)): of every
                layer.
            cross_keys, cross_values (`list` of `torch.Tensor` of shape (R, key-value heads, T, head_dim)).

        Returns:
            Logits (C, V); new keys and values (R, key-value heads, W, head_dim) of every layer; and of every layer the
            queries (R, W, heads * head_dim) of the cross-attention.
        """
        cache = _ConcatenatingCache(past_keys, past_values)
        outputs = self.decoder(
            input_ids,
            None,
            # Both as they are added to the scores, once for all layers.
            attention_mask=_additive(key_mask),
            encoder_attention_mask=_additive(frame_mask),
            cross_attention_states=list(zip(cross_keys, cross_values, strict=True)),
            position_ids=position_ids,
            canvas_cache=cache,
            output_cross_queries=True,
        )
        logits = self.proj_out(outputs.last_hidden_state.flatten(0, 1)[places])
        return logits, *cache.new_keys, *cache.new_values, *outputs["cross_queries"]


def _additive(mask: torch.BoolTensor) -> torch.Tensor:
    """A mask (R, K) of keys as a bias (R, 1, 1, K); of a finite number, so that no row can be NaN."""
    blank = torch.zeros(mask.shape, dtype=torch.float32)
    return blank.masked_fill(~mask, torch.finfo(torch.float32).min)[:, None, None, :]


def export_onnx(model: Any, output: str | Path, int8: bool = False, processor: Any = None) -> Path:
    """
    Writes a folder for [`OnnxMDMASR`], which needs no weights but those in its graphs:

    - encoder.onnx: `input_features` (B, T, mel bins) in fp32 and `attention_mask` (B, T), or waveforms (B, N), to
      `frames` (B, T', encoder width), `frame_mask` (B, T'), and `cross_key.0`, ..., `cross_value.0`, ... (B, key-value
      heads, T', head_dim), with the trailing silence of the configuration;
    - decoder.onnx: one evaluation of a window, see [`DecoderGraph`], with the inputs `past_key.0`, ...,
      `past_value.0`, ..., `cross_key.0`, ..., `cross_value.0`, ... and the outputs `logits`, `new_key.0`, ...,
      `new_value.0`, ..., `cross_query.0`, ...;
    - settings, tokenizer and processor, as `save_pretrained` writes them.

    Args:
        model ([`MDMASRForConditionalGeneration`], folder or id).
        output: a folder that does not exist yet, or is empty.
        int8 (`bool`): quantise the matrix products: weights per output channel, inputs as they come.
        processor ([`MDMASRProcessor`], *optional*): of a model that was not loaded from a folder.

    Raises:
        ValueError: `output` is in use, the model has no processor, or cannot be exported.
        ImportError: the extra `onnx` is not installed.
    """
    require("onnx", "onnxscript", *(["onnxruntime"] if int8 else []))
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` {str(output)!r} exists and is not an empty folder. Remove it or choose another.")
    if isinstance(model, (str, Path)):
        from .cli import load_model

        model, its_processor = load_model(str(model), device="cpu")
        processor = processor or its_processor
    elif processor is None:
        from transformers import AutoProcessor

        if not model.name_or_path:
            raise ValueError("`processor` is missing: the model was not loaded from a folder. Pass its processor.")
        processor = AutoProcessor.from_pretrained(model.name_or_path)
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a {type(model).__name__}, not a PyTorch model. Pass the one it was exported of.")
    if model.config.decoder_config.is_causal:
        raise ValueError("`is_causal=True` cannot be exported: a causal decoder has no window. Set it to False.")
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")

    output.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    processor.save_pretrained(output)
    with _quiet():
        _export_encoder(model, output / ENCODER_FILE)
        _export_decoder(model, output / DECODER_FILE)
        if int8:
            for name in (ENCODER_FILE, DECODER_FILE):
                _quantize(output / name)
    return output


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of exporter and quantiser, which are about what was chosen here on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def require(*modules: str) -> None:
    """Raises an ImportError that says what to install, if one of the modules is missing."""
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f'ONNX needs {module}: `pip install "mdm_asr_hf[onnx]"`.') from error


def _export_encoder(model: Any, path: Path) -> None:
    config, num_layers = model.config, model.config.decoder_config.num_hidden_layers
    # One second: enough for every encoder's convolutions. No two sizes are alike, lest they be taken for one.
    shape = (2, round(config.input_frames_per_s) + 1)
    is_waveform = model.get_encoder().main_input_name == "input_values"
    features = torch.randn(shape if is_waveform else (*shape, config.encoder_config.num_mel_bins))
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    _export(
        EncoderGraph(model),
        (features, torch.ones(shape, dtype=torch.long)),
        path,
        inputs=["input_features", "attention_mask"],
        outputs=[
            "frames",
            "frame_mask",
            *layer_names("cross_key", num_layers),
            *layer_names("cross_value", num_layers),
        ],
        dynamic_shapes=(dynamic, dynamic),
        about=f"encoder of type {config.encoder_config.model_type!r}",
    )


def _export_decoder(model: Any, path: Path) -> None:
    config, auto = model.config.decoder_config, torch.export.Dim.AUTO
    num_layers, heads, size = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
    # No two sizes are alike, lest they be taken for one.
    num_rows, width, num_past, num_frames, num_places = 2, 4, 3, 7, 5
    past, cross = (num_rows, heads, num_past, size), (num_rows, heads, num_frames, size)
    arguments = (
        torch.full((num_rows, width), model.config.mask_token_id),
        torch.arange(num_past, num_past + width).repeat(num_rows, 1),
        torch.ones(num_rows, num_past + width, dtype=torch.bool),
        torch.ones(num_rows, num_frames, dtype=torch.bool),
        torch.arange(num_places),
        *([torch.randn(shape) for _ in range(num_layers)] for shape in (past, past, cross, cross)),
    )
    names = [layer_names(kind, num_layers) for kind in ("past_key", "past_value", "cross_key", "cross_value")]
    outputs = [layer_names(kind, num_layers) for kind in ("new_key", "new_value", "cross_query")]
    _export(
        DecoderGraph(model),
        arguments,
        path,
        inputs=["input_ids", "position_ids", "key_mask", "frame_mask", "places", *sum(names, [])],
        outputs=["logits", *sum(outputs, [])],
        dynamic_shapes=(*[{0: auto, 1: auto}] * 4, {0: auto}, *[[{0: auto, 2: auto}] * num_layers] * 4),
        about="decoder",
    )


def _export(
    graph: nn.Module,
    arguments: tuple[Any, ...],
    path: Path,
    inputs: list[str],
    outputs: list[str],
    dynamic_shapes: tuple[Any, ...],
    about: str,
) -> None:
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in graph.parameters())
    try:
        with torch.no_grad():
            torch.onnx.export(
                graph.eval(),
                arguments,
                path,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic_shapes,
                dynamo=True,
                custom_translation_table={torch.ops.aten.scaled_dot_product_attention.default: _attention},
                external_data=num_bytes > MAX_EMBEDDED_BYTES,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise ValueError(f"The {about} cannot be exported to ONNX ({reason}). Use PyTorch for this model.") from error
    _strip(path)


def _strip(path: Path) -> None:
    """Takes out what the exporter notes of every node: where in the source, on this machine, it comes from."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for one in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del one.metadata_props[:]
        one.ClearField("doc_string")
    onnx.save(model, path)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """
    The attention of a graph, in as few nodes as it takes. In the exporter's own, every step scales and lays out anew
    the keys of all frames, and finds out their shapes for it.
    """
    from onnxscript import ir
    from onnxscript import opset20 as op

    if is_causal or enable_gqa or scale is None:
        raise NotImplementedError("attention that is causal, groups its heads or gives no scale")
    # The scale comes last: it then becomes a factor of the product of matrices.
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), op.Constant(value_float=scale))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            least = op.Constant(value_float=torch.finfo(torch.float32).min)
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), least)
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _quantize(path: Path) -> None:
    """
    Quantises, in place, the matrix products of a graph with weights, one scale per output channel, inputs as
    `int8_mdm_asr` does. Embeddings stay as they are: the tied table would be made floats again as a whole in every
    step.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(path)
    _untie_output(graph)
    _scale_positions(graph)
    is_large = graph.ByteSize() > MAX_EMBEDDED_BYTES
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    quantize_dynamic(
        graph,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=is_large,
    )


def _untie_output(model: Any) -> None:
    """
    Turns products with a transposed weight, such as the output layer's with the embeddings, into plain ones with a
    weight of their own, which can be quantised and is then laid out once.
    """
    from onnx import helper, numpy_helper

    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for place, node in reversed(list(enumerate(model.graph.node))):
        if node.op_type != "Gemm" or node.input[1] not in weights:
            continue
        if not any(attribute.name == "transB" and attribute.i for attribute in node.attribute):
            continue
        source, bias, result = node.input[0], node.input[2:], node.output[0]
        own = f"{node.input[1]}.transposed"
        weight = numpy_helper.to_array(weights[node.input[1]]).T.copy()
        model.graph.initializer.append(numpy_helper.from_array(weight, own))
        product = f"{result}.product" if bias else result
        nodes = [helper.make_node("MatMul", [source, own], [product], name=f"{node.name}.product")]
        if bias:
            nodes.append(helper.make_node("Add", [product, *bias], [result], name=f"{node.name}.sum"))
        del model.graph.node[place]
        for offset, one in enumerate(nodes):
            model.graph.node.insert(place + offset, one)
    used = {name for node in model.graph.node for name in node.input}
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in used]:
        model.graph.initializer.remove(tensor)


def _scale_positions(model: Any) -> None:
    """
    Divides the inputs of the narrowing products by each position's largest value, and multiplies their results by it:
    the quantiser's one scale per call then suits all positions, see `int8_mdm_asr`.
    """
    import numpy as np
    from onnx import helper, numpy_helper

    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    constants = {"int8.axis": np.array([-1]), "int8.least": np.array(torch.finfo(torch.float32).tiny, np.float32)}
    for place, node in reversed(list(enumerate(graph.node))):
        if (
            node.op_type != "MatMul"
            or node.input[1] not in shapes
            or not needs_position_scales(*shapes[node.input[1]])
        ):
            continue
        source, result = node.input[0], node.output[0]
        size, most, largest, small, product = (
            f"{result}.{name}" for name in ("abs", "max", "largest", "scaled", "unscaled")
        )
        node.input[0], node.output[0] = small, product
        graph.node.insert(place + 1, helper.make_node("Mul", [product, largest], [result], name=f"{result}.scale"))
        for one in (
            helper.make_node("Div", [source, largest], [small], name=small),
            helper.make_node("Max", [most, "int8.least"], [largest], name=largest),
            helper.make_node("ReduceMax", [size, "int8.axis"], [most], name=most),
            helper.make_node("Abs", [source], [size], name=size),
        ):
            graph.node.insert(place, one)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in constants.items())


__all__ = ["DecoderGraph", "EncoderGraph", "export_onnx", "layer_names", "require"]
