# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Export to ONNX: encoder, donor's decoder, and what drafts, as graphs for [`OnnxMDMASR`]."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..decoder_mdm_asr import KeyValue, entropy
from ..encoder_mdm_asr import WHISPER_FRAMES_PER_S
from .model import DECODER_FILE, DRAFTS_FILE, EMBEDDINGS_FILE, ENCODER_FILE, layer_names, require
from .processing import MEL_FILE

# A file of protobuf holds at most 2 GiB: larger weights stand in a file of their own beside it.
MAX_EMBEDDED_BYTES = 1_500_000_000
DYNAMIC = torch.export.Dim.DYNAMIC
CROSS_NAMES = "cross_key.", "cross_value."
INT8_MAX = 127
# Of what is multiplied with the int8 of another input, half the range: then no sum of two products is cut off, on any
# CPU. Probabilities take two such numbers.
HALF_MAX = INT8_MAX // 2


class _SlotCache:
    """
    Stands in for [`DraftingCache`] in a graph, which has no state: all slots' keys and values (layers, R, key-value
    heads, S, head_dim) come in, and the causal rows' own go out.

    Attributes:
        new_keys, new_values (`list` of `torch.Tensor` of shape (R, key-value heads, Q, head_dim)): one per layer.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.LongTensor):
        self.keys, self.values = keys.unbind(), values.unbind()
        _, num_heads, _, head_dim = self.keys[0].shape
        self.slots = slots[:, None, :, None].expand(-1, num_heads, -1, head_dim)
        self.new_keys: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> KeyValue:
        self.new_keys.append(keys)
        self.new_values.append(values)
        # To their slots: where a key stands in a sum may not depend on when it was computed.
        return (
            self.keys[layer_idx].scatter(2, self.slots, keys),
            self.values[layer_idx].scatter(2, self.slots, values),
        )


class EncoderGraph(nn.Module):
    """
    The encoder on one utterance, of features (1, T, mel bins) or a waveform (1, N) in fp32, and of Whisper a number of
    input frames of silence: frames (1, T', encoder width), and the decoder's cross-attention keys and values of these
    (1, key-value heads, T', head_dim), layer by layer.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, input_features: torch.Tensor, trailing_silence: int | None = None) -> tuple[torch.Tensor, ...]:
        silence_s = None if trailing_silence is None else trailing_silence / WHISPER_FRAMES_PER_S
        outputs = self.model.encode(input_features, trailing_silence_s=silence_s)
        keys, values = zip(*self.model.prepare_cross_attention(outputs).cross_attention_states, strict=True)
        return outputs.last_hidden_state, *keys, *values


class DecoderGraph(nn.Module):
    """One evaluation of the donor's causal rows, by the package's own decoder."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.proj_out = model.get_decoder(), model.proj_out

    def forward(
        self,
        embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        slots: torch.LongTensor,
        visible: torch.BoolTensor,
        frame_mask: torch.BoolTensor,
        columns: torch.LongTensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            embeds (`torch.Tensor` of shape (R, Q, D)), position_ids (R, Q): the rows' tokens, and where they stand.
            slots (`torch.LongTensor` of shape (R, Q)): where their keys and values are kept.
            visible (`torch.BoolTensor` of shape (R, Q, S)): the slots that each sees.
            frame_mask (`torch.BoolTensor` of shape (R, T)): which frames count.
            columns (`torch.LongTensor` of shape (R, N)): those among Q that logits are computed of.
            keys, values (`torch.Tensor` of shape (layers, R, key-value heads, S, head_dim)): of all slots.
            cross_keys, cross_values (`list` of `torch.Tensor` of shape (R, key-value heads, T, head_dim)).

        Returns:
            Logits (R, N, V); new keys and values (layers, R, key-value heads, Q, head_dim); and the queries of the
            cross-attention (layers, R, Q, heads * head_dim).
        """
        cache = _SlotCache(keys, values, slots)
        outputs = self.decoder(
            position_ids,
            None,
            # Both as they are added to the scores, once for all layers.
            attention_mask=_additive(visible),
            encoder_attention_mask=_additive(frame_mask)[:, None, None],
            cross_attention_states=list(zip(cross_keys, cross_values, strict=True)),
            token_embeds=embeds,
            position_ids=position_ids,
            past_key_values=cache,
            output_cross_queries=True,
        )
        states = outputs.last_hidden_state
        logits = self.proj_out(states.gather(1, columns[..., None].expand(-1, -1, states.shape[-1])))
        return logits, *(torch.stack(list(x)) for x in (cache.new_keys, cache.new_values, outputs["cross_queries"]))


class DraftsGraph(nn.Module):
    """Drafts by a block behind each row's frontier: the token that the donor said there, and masks."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder = model.get_decoder()
        weight, bias, embeddings = (
            None if values is None else nn.Parameter(values.detach().clone(), requires_grad=False)
            for values in model.short_list_output()
        )
        self.weight, self.bias = weight, bias
        # Once in the file where they are tied.
        self.embeddings = weight if model.config.tie_word_embeddings else embeddings

    def forward(
        self,
        embeds: torch.Tensor,
        before: torch.Tensor,
        frontiers: torch.LongTensor,
        frame_mask: torch.BoolTensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            embeds (`torch.Tensor` of shape (R, K, D)): of the block's token and masks.
            before (`torch.Tensor` of shape (R, D)): embedding of the token before the block's.
            frontiers (`torch.LongTensor` of shape (R, 1)): the position behind which the block stands, and the last
                slot that it sees.
            frame_mask (`torch.BoolTensor` of shape (R, T)): which frames count.
            keys, values (`torch.Tensor` of shape (draft layers, R, key-value heads, S, head_dim)): the donor's.
            cross_keys, cross_values (`list` of `torch.Tensor` of shape (R, key-value heads, T, head_dim)): of the
                layers beside which there are draft layers.

        Returns:
            Ids and entropies (R, K), see [`MDMASRDrafts`].
        """
        decoder = self.decoder
        states = decoder.embed_blocks(embeds[:, None], frontiers)
        seen = torch.arange(keys.shape[3]) <= frontiers[..., None]
        visible = _additive(decoder._block_mask(seen, embeds.shape[1]))[:, None]
        frames = _additive(frame_mask)[:, None, None]
        pairs = zip(cross_keys, cross_values, keys, values, strict=True)
        for layer, (cross_key, cross_value, *past) in zip(decoder.drafts.layers, pairs, strict=True):
            states, *_ = layer(states, cross_key, cross_value, visible, frames, None, *past)
        known = torch.stack([embeds[:, 0], before], dim=1)
        output = self.weight, self.bias, self.embeddings
        ids, log_probs = decoder.drafts.draft(decoder.drafts.layer_norm(states), known, *output)
        return ids, entropy(log_probs)


def _additive(mask: torch.BoolTensor) -> torch.Tensor:
    """A mask of keys as what is added to the scores; of a finite number, so that no row can be NaN."""
    blank = torch.zeros(mask.shape, dtype=torch.float32)
    return blank.masked_fill(~mask, torch.finfo(torch.float32).min)


def export_onnx(model: Any, output: str | Path, int8: bool = False, processor: Any = None) -> Path:
    """
    Writes a folder for [`OnnxMDMASR`], which needs no other weights, of a checkpoint with drafts: the three graphs of
    this module, token embeddings (V + E, D), in fp16 beside int8 graphs, settings, tokenizer and processor, and of
    Whisper the filters (frequencies, mel bins) of its features. docs/deployment.md has inputs and outputs.

    Args:
        model ([`MDMASRForConditionalGeneration`], folder or id).
        output: a folder that does not exist yet, or is empty.
        int8 (`bool`): quantise the matrix products: a scale for each output of a layer, and for each row of inputs.
        processor ([`MDMASRProcessor`], *optional*): of a model that was not loaded from a folder.

    Raises:
        ValueError: `output` is in use, the model has no processor, decodes on a canvas, or cannot be exported.
        ImportError: the extra `export` is not installed.
    """
    require("onnx", "onnxscript", extra="export")
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"`output` {str(output)!r} exists and is not an empty folder. Remove it or choose another.")
    if isinstance(model, (str, Path)):
        from ..loading import load_model

        model, its_processor = load_model(str(model), device="cpu")
        processor = processor or its_processor
    elif processor is None:
        from transformers import AutoProcessor

        if not model.name_or_path:
            raise ValueError("`processor` is missing: the model was not loaded from a folder. Pass its processor.")
        processor = AutoProcessor.from_pretrained(model.name_or_path)
    if not isinstance(model, nn.Module):
        raise ValueError(f"`model` is a {type(model).__name__}, not a PyTorch model. Pass the one it was exported of.")
    if not model.config.has_drafts:
        raise ValueError(
            "`draft_layers=0`: a model that decodes on a canvas cannot be exported to ONNX. Use PyTorch for it, or "
            "convert the donor with draft layers."
        )
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa")

    output.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(output)
    model.generation_config.save_pretrained(output)
    processor.save_pretrained(output)
    if model.config.encoder_config.model_type == "whisper":
        np.save(output / MEL_FILE, processor.feature_extractor.frontend.mel_filters.astype(np.float32))
    decoder = model.get_decoder()
    embeddings = torch.cat([decoder.embed_tokens.weight, decoder.input_only_embeddings.weight]).detach().numpy()
    np.save(output / EMBEDDINGS_FILE, embeddings.astype(np.float16) if int8 else embeddings)
    # A graph that is traced under autocast has its types.
    with _quiet(), torch.autocast("cpu", enabled=False):
        _export_encoder(model, output / ENCODER_FILE)
        _export_decoder(model, output / DECODER_FILE)
        _export_drafts(model, output / DRAFTS_FILE)
        if int8:
            config = model.config.decoder_config
            # Keys that heads share are repeated before they are multiplied, which int8 ones cannot be.
            has_groups = config.num_key_value_heads < config.num_attention_heads
            for path in output.glob("*.onnx"):
                _quantize_file(path, frames=not has_groups)
    return output


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks, which are about what was chosen here on purpose."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# In the examples that are traced no two sizes are alike, lest they be taken for one.
NUM_ROWS, NUM_FRAMES, NUM_SLOTS = 2, 7, 9


def _export_encoder(model: Any, path: Path) -> None:
    config, layers = model.config, range(model.config.decoder_config.num_hidden_layers)
    # One second: enough for every encoder's convolutions.
    shape = (1, round(config.input_frames_per_s) + 1)
    is_waveform = model.get_encoder().main_input_name == "input_values"
    features = torch.randn(shape if is_waveform else (*shape, config.encoder_config.num_mel_bins))
    has_silence = config.encoder_config.model_type == "whisper"
    _export(
        EncoderGraph(model),
        (features, *([70] if has_silence else [])),
        path,
        inputs=["input_features", *(["trailing_silence"] if has_silence else [])],
        outputs=["frames", *layer_names("cross_key", layers), *layer_names("cross_value", layers)],
        dynamic_shapes=({1: DYNAMIC}, *([DYNAMIC] if has_silence else [])),
        about=f"encoder of type {config.encoder_config.model_type!r}",
    )
    _fuse_attention(path)


def _export_decoder(model: Any, path: Path) -> None:
    config, width, num_columns = model.config.decoder_config, 4, 5
    places = torch.arange(width).repeat(NUM_ROWS, 1)
    inputs = {
        "embeds": (torch.randn(NUM_ROWS, width, config.hidden_size), 2),
        "position_ids": (places, 2),
        "slots": (places.clone(), 2),
        "visible": (torch.ones(NUM_ROWS, width, NUM_SLOTS, dtype=torch.bool), 3),
        "frame_mask": (torch.ones(NUM_ROWS, NUM_FRAMES, dtype=torch.bool), 2),
        "columns": (torch.zeros(NUM_ROWS, num_columns, dtype=torch.long), 2),
    }
    outputs = ["logits", "new_keys", "new_values", "cross_queries"]
    _export_with_states(DecoderGraph(model), path, range(config.num_hidden_layers), inputs, outputs)


def _export_drafts(model: Any, path: Path) -> None:
    config = model.config.decoder_config
    inputs = {
        "embeds": (torch.randn(NUM_ROWS, config.draft_length, config.hidden_size), 1),
        "before": (torch.randn(NUM_ROWS, config.hidden_size), 1),
        "frontiers": (torch.arange(NUM_ROWS)[:, None], 1),
        "frame_mask": (torch.ones(NUM_ROWS, NUM_FRAMES, dtype=torch.bool), 2),
    }
    layers = range(config.num_hidden_layers - config.draft_layers, config.num_hidden_layers)
    _export_with_states(DraftsGraph(model), path, layers, inputs, ["ids", "entropies"])


def _export_with_states(
    graph: nn.Module, path: Path, layers: range, inputs: dict[str, tuple[torch.Tensor, int]], outputs: list[str]
) -> None:
    """Exports a graph that takes layers' keys and values, of all slots and of the frames, behind inputs of its own: of
    each an example, and how many of its axes, from the first one on, have any size."""
    heads, size = graph.decoder.config.num_key_value_heads, graph.decoder.config.head_dim
    past, cross = (len(layers), NUM_ROWS, heads, NUM_SLOTS, size), (NUM_ROWS, heads, NUM_FRAMES, size)
    examples = [example for example, _ in inputs.values()]
    of_past, of_cross = {1: DYNAMIC, 3: DYNAMIC}, {0: DYNAMIC, 2: DYNAMIC}
    _export(
        graph,
        (*examples, torch.randn(past), torch.randn(past), *([torch.randn(cross) for _ in layers] for _ in range(2))),
        path,
        inputs=[*inputs, "keys", "values", *layer_names("cross_key", layers), *layer_names("cross_value", layers)],
        outputs=outputs,
        dynamic_shapes=(
            *(dict.fromkeys(range(num_axes), DYNAMIC) for _, num_axes in inputs.values()),
            *(of_past, of_past, *[[of_cross] * len(layers)] * 2),
        ),
        about=path.stem,
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
                custom_translation_table={
                    torch.ops.aten.scaled_dot_product_attention.default: _attention,
                    # Of seconds to frames.
                    round: _round,
                },
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

    if is_causal or enable_gqa:
        raise NotImplementedError("attention that is causal or groups its heads")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    # The scale comes last: it then becomes a factor of the product of matrices.
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), op.Constant(value_float=scale))
    if attn_mask is not None:
        if attn_mask.dtype == ir.DataType.BOOL:
            least = op.Constant(value_float=torch.finfo(torch.float32).min)
            attn_mask = op.Where(attn_mask, op.Constant(value_float=0.0), least)
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


def _fuse_attention(path: Path) -> None:
    """Makes one node, in place, of each attention without a mask, which then never holds the scores of all pairs."""
    import onnx
    from onnx import numpy_helper
    from onnx.helper import make_node

    model = onnx.load(path, load_external_data=False)
    graph, fused = model.graph, {}
    makers = {output: node for node in graph.node for output in node.output}
    users = {name: node for node in graph.node for name in node.input}
    numbers = {one.name: numpy_helper.to_array(one) for one in graph.initializer if not one.dims}
    shapes = {one.name: [dim.dim_value for dim in one.type.tensor_type.shape.dim] for one in graph.value_info}
    for softmax in graph.node:
        if softmax.op_type != "Softmax":
            continue
        scores, scale, product = makers.get(softmax.input[0]), 1.0, users.get(softmax.output[0])
        if scores is not None and scores.op_type == "Mul" and scores.input[1] in numbers:
            scores, scale = makers[scores.input[0]], float(numbers[scores.input[1]])
        if scores is None or product is None or scores.op_type != "MatMul" or product.op_type != "MatMul":
            continue
        name, (_, num_heads, _, head_dim) = product.output[0], shapes[scores.input[0]]
        # As the node takes them, all of them (B, T, heads * head_dim).
        turns = {scores.input[0]: [0, 2, 1, 3], scores.input[1]: [0, 3, 1, 2], product.input[1]: [0, 2, 1, 3]}
        fused[name] = []
        for i, (states, perm) in enumerate(turns.items()):
            fused[name] += [
                make_node("Transpose", [states], [f"{name}.{i}.turned"], perm=perm),
                make_node("Reshape", [f"{name}.{i}.turned", f"{name}.width"], [f"{name}.{i}"]),
            ]
        inputs, settings = [f"{name}.{i}" for i in range(3)], {"num_heads": num_heads, "scale": scale}
        fused[name] += [
            make_node("MultiHeadAttention", inputs, [f"{name}.joined"], domain="com.microsoft", **settings),
            make_node("Reshape", [f"{name}.joined", f"{name}.heads"], [f"{name}.split"]),
            make_node("Transpose", [f"{name}.split"], [name], perm=[0, 2, 1, 3]),
        ]
        for end, shape in (("width", [0, 0, num_heads * head_dim]), ("heads", [0, 0, num_heads, head_dim])):
            graph.initializer.append(numpy_helper.from_array(np.array(shape), f"{name}.{end}"))
    _replace_nodes(model, [one for node in graph.node for one in fused.get(node.output[0], [node])])
    onnx.save(model, path)


def _replace_nodes(model: Any, nodes: list[Any]) -> None:
    """Gives a graph other nodes, ONNX Runtime's own among them, and takes out what none of them uses any more."""
    from onnx.helper import make_opsetid

    graph = model.graph
    used, kept = {one.name for one in graph.output}, []
    for node in reversed(nodes):
        if used.intersection(node.output):
            used.update(node.input)
            kept.append(node)
    initializers = [one for one in graph.initializer if one.name in used]
    for field, values in ((graph.node, reversed(kept)), (graph.initializer, initializers)):
        del field[:]
        field.extend(values)
    if all(one.domain != "com.microsoft" for one in model.opset_import):
        model.opset_import.append(make_opsetid("com.microsoft", 1))


def _round(value: Any, ndigits: None = None) -> Any:
    """Python's `round` of a number that depends on an input, which the exporter does not know."""
    from onnxscript import ir
    from onnxscript import opset20 as op

    return op.Cast(op.Round(value), to=ir.DataType.INT64)


def _quantize_file(path: Path, frames: bool) -> None:
    """Puts a graph in int8 in the place of another, and of its weights; those of a large one stand in a file beside
    it. With `frames`, their keys and values become int8, too."""
    import onnx

    model = onnx.load(path)
    # Of drafts nothing depends but how many of them are right.
    is_exact = path.name != DRAFTS_FILE
    _quantize(model, is_exact)
    if frames:
        _quantize_frames(model, is_exact)
    is_large = model.ByteSize() > MAX_EMBEDDED_BYTES
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    onnx.save(model, path, save_as_external_data=is_large, location=f"{path.name}.data")


class _Rewriting:
    """The constants that a graph gets, and the nodes that it is to have, in their order."""

    def __init__(self, graph: Any):
        self.graph, self.nodes, self.constants = graph, [], set()

    def constant(self, name: str, value: np.ndarray) -> str:
        from onnx import numpy_helper

        self.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        self.constants.add(name)
        return name

    def add(self, kind: str, inputs: list[str], outputs: list[str], **settings: Any) -> None:
        from onnx.helper import make_node

        self.nodes.append(make_node(kind, inputs, outputs, **settings))


def _quantize(model: Any, is_exact: bool) -> None:
    """
    Quantises, in place, the matrix products of a graph with weights: a scale for each output, and `is_exact` one for
    each row of activations, so that what a row gives does not depend on the others of the call; else one for all of
    them, in fewer steps, the bias among them. Embeddings become fp16.
    """
    from onnx import TensorProto, numpy_helper

    graph, rewriting = model.graph, _Rewriting(model.graph)
    add, constant = rewriting.add, rewriting.constant
    tables = {one.name: one for one in graph.initializer if len(one.dims) == 2}
    # A product's weights, or where another node takes them the other way about, these transposed.
    weights = {name: (one, False) for name, one in tables.items()}
    weights |= {
        node.output[0]: (tables[node.input[0]], True)
        for node in graph.node
        if node.op_type == "Transpose" and node.input[0] in tables
    }
    quantised, added = set(), set()
    # Weights of the whole range have to be rewritten for some CPUs, which ONNX Runtime does for those of a single
    # product only.
    largest = INT8_MAX if is_exact else HALF_MAX

    step, zero = constant("int8.step", np.float32(1 / INT8_MAX)), constant("int8.zero", np.uint8(128))
    last = constant("int8.last", np.array([-1]))
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in tables:
            name, gathered = f"{node.input[0]}.fp16", f"{node.output[0]}.fp16"
            if name not in rewriting.constants:
                constant(name, numpy_helper.to_array(tables[node.input[0]]).astype(np.float16))
            add("Gather", [name, node.input[1]], [gathered], axis=0)
            add("Cast", [gathered], [node.output[0]], to=TensorProto.FLOAT)
            continue
        if node.op_type != "MatMul" or node.input[1] not in weights:
            if node.output[0] not in added:
                rewriting.nodes.append(node)
            continue
        weight, is_transposed = weights[node.input[1]]
        name, output = node.input[1], node.output[0]
        if f"{name}.int8" not in rewriting.constants:
            values = numpy_helper.to_array(weight)
            values = values.T if is_transposed else values
            scale = np.maximum(np.abs(values).max(axis=0), 1e-30) / largest
            constant(f"{name}.int8", np.rint(values / scale).astype(np.int8))
            constant(f"{name}.int8.scale", scale.astype(np.float32))
        weight = [f"{name}.int8", f"{name}.int8.scale"]
        if not is_exact:
            inputs = [node.input[0], *weight]
            if bias := _bias_of(graph, output):
                output, bias = bias
                added.add(output)
                inputs += ["", bias]
            add("DynamicQuantizeMatMul", inputs, [output], domain="com.microsoft")
            continue
        rows = f"{node.input[0]}.int8"
        if rows not in quantised:
            quantised.add(rows)
            # A row of zeros has no scale, but what it gives is nought times something.
            add("Abs", [node.input[0]], [f"{rows}.abs"])
            add("ReduceMax", [f"{rows}.abs", last], [f"{rows}.scale"], keepdims=1)
            add("Div", [node.input[0], f"{rows}.scale"], [f"{rows}.unit"])
            add("QuantizeLinear", [f"{rows}.unit", step, zero], [rows])
        inputs = [rows, weight[0], step, weight[1], zero]
        add("MatMulIntegerToFloat", inputs, [f"{output}.unit"], domain="com.microsoft")
        add("Mul", [f"{output}.unit", f"{rows}.scale"], [output])
    _replace_nodes(model, rewriting.nodes)


def _bias_of(graph: Any, product: str) -> tuple[str, str] | None:
    """If nothing is done with a product but that a bias is added: the name of the sum, and the bias's."""
    vectors = {one.name for one in graph.initializer if len(one.dims) == 1}
    users = [node for node in graph.node if product in node.input]
    if len(users) == 1 and users[0].op_type == "Add" and (biases := vectors.intersection(users[0].input)):
        return users[0].output[0], biases.pop()
    return None


def _quantize_frames(model: Any, is_exact: bool) -> None:
    """
    Makes int8 of the frames' keys and values, in place: where audio is long they are as large as the weights, and read
    anew in each evaluation. Keys (1, heads, head_dim, T) have a scale for each head (1, heads, 1, 1), values (1,
    heads, T, head_dim) one for each channel (1, heads, 1, head_dim); the rows that they are multiplied with have their
    own, so that what a row gives depends on nothing else. Probabilities have 13 bits, or seven if not `is_exact`.
    """
    from onnx import TensorProto, numpy_helper
    from onnx.helper import make_tensor_value_info

    graph, rewriting = model.graph, _Rewriting(model.graph)
    add, constant = rewriting.add, rewriting.constant
    used_by = {name: node for node in graph.node for name in node.input}
    numbers = {one.name: numpy_helper.to_array(one) for one in graph.initializer if not one.dims}

    least, one = constant("frames.least", np.float32(1e-30)), constant("frames.one", np.float32(1))
    zero, middle = constant("frames.zero", np.int8(0)), constant("frames.middle", np.uint8(HALF_MAX + 1))
    step, fine = np.float32(1 / HALF_MAX), np.float32(1 / HALF_MAX / (2 * HALF_MAX))
    step, fine = constant("frames.step", step), constant("frames.fine", fine)
    last, full = constant("frames.last", np.array([-1])), constant("frames.full", np.float32(INT8_MAX))
    share, none = constant("frames.share", np.float32(1 / INT8_MAX)), constant("frames.none", np.uint8(0))

    def quantise_output(name: str, is_key: bool) -> None:
        """Of an output of the encoder: its int8, and their scales."""
        axes = constant(f"{name}.axes", np.array([2, 3] if is_key else [2]))
        integers = f"{name}.int8" if is_key else name
        add("ReduceMax", [f"{name}.exact", axes], [f"{name}.highest"])
        add("ReduceMin", [f"{name}.exact", axes], [f"{name}.lowest"])
        add("Neg", [f"{name}.lowest"], [f"{name}.lowest.neg"])
        add("Max", [f"{name}.highest", f"{name}.lowest.neg", least], [f"{name}.largest"])
        add("Div", [f"{name}.largest", full], [_scale_name(name)])
        add("Div", [f"{name}.exact", _scale_name(name)], [f"{name}.unit"])
        add("QuantizeLinear", [f"{name}.unit", one, zero], [integers])
        if is_key:
            add("Transpose", [integers], [name], perm=[0, 1, 3, 2])

    def multiply_keys(query: str, key: str, scores: str, factor: float) -> None:
        """Queries in int8 by keys."""
        # A division: of a product of two scales ONNX Runtime takes the first to be one number.
        divisor = constant(f"{scores}.divisor", np.float32(HALF_MAX / factor))
        add("Abs", [query], [f"{scores}.abs"])
        add("ReduceMax", [f"{scores}.abs", last], [f"{scores}.largest"], keepdims=1)
        add("Div", [query, f"{scores}.largest"], [f"{scores}.unit"])
        add("QuantizeLinear", [f"{scores}.unit", step, middle], [f"{scores}.query"])
        add("MatMulInteger", [f"{scores}.query", key, middle], [f"{scores}.sum"])
        add("Cast", [f"{scores}.sum"], [f"{scores}.float"], to=TensorProto.FLOAT)
        add("Mul", [f"{scores}.largest", _scale_name(key)], [f"{scores}.wide"])
        add("Div", [f"{scores}.wide", divisor], [f"{scores}.scale"])
        add("Mul", [f"{scores}.float", f"{scores}.scale"], [scores])

    def multiply_values(probabilities: str, value: str, output: str) -> None:
        """Probabilities by values: most of them are small, and of 13 bits therefore, in two rows of int8 each."""
        add("ReduceMax", [probabilities, last], [f"{output}.largest"], keepdims=1)
        add("Div", [probabilities, f"{output}.largest"], [f"{output}.shares"])
        add("Mul", [f"{output}.largest", _scale_name(value)], [f"{output}.scale"])
        if not is_exact:
            add("QuantizeLinear", [f"{output}.shares", share, none], [f"{output}.high"])
            add("MatMulInteger", [f"{output}.high", value, none], [f"{output}.sum"])
            add("Cast", [f"{output}.sum"], [f"{output}.float"], to=TensorProto.FLOAT)
            add("Mul", [f"{output}.float", share], [f"{output}.unit"])
            add("Mul", [f"{output}.unit", f"{output}.scale"], [output])
            return
        add("QuantizeLinear", [f"{output}.shares", step, middle], [f"{output}.high"])
        add("DequantizeLinear", [f"{output}.high", step, middle], [f"{output}.coarse"])
        add("Sub", [f"{output}.shares", f"{output}.coarse"], [f"{output}.rest"])
        add("QuantizeLinear", [f"{output}.rest", fine, middle], [f"{output}.low"])
        add("Concat", [f"{output}.high", f"{output}.low"], [f"{output}.both"], axis=2)
        add("MatMulInteger", [f"{output}.both", value, middle], [f"{output}.sum"])
        add("Cast", [f"{output}.sum"], [f"{output}.float"], to=TensorProto.FLOAT)
        add("Split", [f"{output}.float"], [f"{output}.0", f"{output}.1"], axis=2, num_outputs=2)
        add("Mul", [f"{output}.0", step], [f"{output}.steps"])
        add("Mul", [f"{output}.1", fine], [f"{output}.fine"])
        add("Add", [f"{output}.steps", f"{output}.fine"], [f"{output}.unit"])
        add("Mul", [f"{output}.unit", f"{output}.scale"], [output])

    turned, scaled = {}, set()
    for node in graph.node:
        frames = [name for name in [*node.input, *node.output] if name.startswith(CROSS_NAMES)]
        if node.op_type == "Shape" and node.input[0] in frames:
            # The exporter reads a size of any input that has it. Of these two only values keep their layout.
            node.input[0] = node.input[0].replace(*CROSS_NAMES)
            rewriting.nodes.append(node)
        elif node.op_type == "Transpose" and node.input[0] in frames:
            turned[node.output[0]] = node.input[0]
        elif node.op_type == "MatMul" and node.input[1] in turned:
            # What scales the scores is a factor of their scale.
            scale = used_by[node.output[0]]
            scaled.add(scale.output[0])
            multiply_keys(node.input[0], turned[node.input[1]], scale.output[0], float(numbers[scale.input[1]]))
        elif node.op_type == "MatMul" and node.input[1] in frames:
            multiply_values(*node.input, node.output[0])
        elif node.output[0] in frames:
            # The encoder's.
            name, node.output[0] = node.output[0], f"{node.output[0]}.exact"
            rewriting.nodes.append(node)
            quantise_output(name, is_key=name.startswith(CROSS_NAMES[0]))
        elif node.output[0] not in scaled:
            rewriting.nodes.append(node)
    for infos in (graph.input, graph.output):
        for info in [one for one in infos if one.name.startswith(CROSS_NAMES)]:
            is_key = info.name.startswith(CROSS_NAMES[0])
            rows, heads, length, size = (dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim)
            shape = [rows, heads, size, length] if is_key else [rows, heads, length, size]
            scales = [rows, heads, 1, 1 if is_key else size]
            info.CopyFrom(make_tensor_value_info(info.name, TensorProto.INT8, shape))
            infos.append(make_tensor_value_info(_scale_name(info.name), TensorProto.FLOAT, scales))
    del graph.value_info[:]
    _replace_nodes(model, rewriting.nodes)


def _scale_name(name: str) -> str:
    """The name of the scales of a layer's keys or values, such as `cross_key_scale.0`."""
    kind, layer = name.split(".")
    return f"{kind}_scale.{layer}"
