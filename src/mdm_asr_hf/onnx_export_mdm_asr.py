# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Export to ONNX: encoder, donor's decoder, and what drafts, as graphs for [`OnnxMDMASR`]."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .cache_mdm_asr import BehindDonor, KeyValue
from .drafting_mdm_asr import NUM_CANDIDATES
from .encoder_mdm_asr import WHISPER_FRAMES_PER_S

ENCODER_FILE, DECODER_FILE = "encoder.onnx", "decoder.onnx"
DRAFTS_FILE, CANDIDATES_FILE, HEAD_FILE = "drafts.onnx", "draft_candidates.onnx", "draft_head.onnx"
TOKENS_FILE = "tokens.safetensors"
# A file of protobuf holds at most 2 GiB: larger weights stand in a file of their own beside it.
MAX_EMBEDDED_BYTES = 1_500_000_000
DYNAMIC = torch.export.Dim.DYNAMIC
# Weights that share a scale; and ONNX Runtime's level at which it multiplies integers, not floats.
INT8_BLOCK, INT8_ARITHMETIC = 64, 4


def layer_names(kind: str, layers: range) -> list[str]:
    """Names of a graph's inputs or outputs that there is one of for every layer, such as `cross_key.0`."""
    return [f"{kind}.{layer}" for layer in layers]


class _ConcatenatingCache:
    """
    Stands in for [`DraftingCache`] in a graph, which has no state: past keys and values (layers, R, P, key-value
    heads, head_dim) come in, the causal rows' own go out.

    Attributes:
        new_keys, new_values (`list` of `torch.Tensor` of shape (R, Q, key-value heads, head_dim)): one per layer.
    """

    def __init__(self, past_keys: torch.Tensor, past_values: torch.Tensor):
        self.past_keys, self.past_values = past_keys, past_values
        self.new_keys: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int) -> KeyValue:
        self.new_keys.append(keys.transpose(1, 2))
        self.new_values.append(values.transpose(1, 2))
        past = self.past_keys[layer_idx].transpose(1, 2), self.past_values[layer_idx].transpose(1, 2)
        return torch.cat([past[0], keys], dim=2), torch.cat([past[1], values], dim=2)


class EncoderGraph(nn.Module):
    """The encoder, and the decoder's cross-attention keys and values of its frames."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor, trailing_silence: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        silence_s = None if trailing_silence is None else trailing_silence / WHISPER_FRAMES_PER_S
        outputs = self.model.encode(input_features, attention_mask, trailing_silence_s=silence_s)
        keys, values = zip(*self.model.prepare_cross_attention(outputs).cross_attention_states, strict=True)
        return outputs.last_hidden_state, outputs.attention_mask.bool(), *keys, *values


class DecoderGraph(nn.Module):
    """One evaluation of the donor's causal rows, by the package's own decoder."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder, self.proj_out = model.get_decoder(), model.proj_out

    def forward(
        self,
        embeds: torch.Tensor,
        position_ids: torch.LongTensor,
        visible: torch.BoolTensor,
        frame_mask: torch.BoolTensor,
        columns: torch.LongTensor,
        past_keys: torch.Tensor,
        past_values: torch.Tensor,
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """
        Args:
            embeds (`torch.Tensor` of shape (R, Q, D)), position_ids (R, Q): the rows' tokens, and where they stand.
            visible (`torch.BoolTensor` of shape (R, Q, P + Q)): what each sees of the past and of the rows themselves.
            frame_mask (`torch.BoolTensor` of shape (R, T)): which frames count.
            columns (`torch.LongTensor` of shape (R, N)): those among Q that logits are computed of.
            past_keys, past_values (`torch.Tensor` of shape (layers, R, P, key-value heads, head_dim)).
            cross_keys, cross_values (`list` of `torch.Tensor` of shape (R, key-value heads, T, head_dim)).

        Returns:
            Logits (R, N, V); new keys and values (layers, R, Q, key-value heads, head_dim); and the queries of the
            cross-attention (layers, R, Q, heads * head_dim).
        """
        cache = _ConcatenatingCache(past_keys, past_values)
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
    """A block behind each row's frontier: the token that the donor said there, and masks."""

    def __init__(self, model: Any):
        super().__init__()
        self.decoder = model.get_decoder()

    def forward(
        self,
        embeds: torch.Tensor,
        frontiers: torch.LongTensor,
        visible: torch.BoolTensor,
        frame_mask: torch.BoolTensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        cross_keys: list[torch.Tensor],
        cross_values: list[torch.Tensor],
    ) -> torch.Tensor:
        """
        Args:
            embeds (`torch.Tensor` of shape (R, K, D)): of the block's tokens and masks.
            frontiers (`torch.LongTensor` of shape (R, 1)): the position behind which the block stands.
            visible (`torch.BoolTensor` of shape (R, K, S + K)): what each sees of the donor's slots, and of the block.
            frame_mask (`torch.BoolTensor` of shape (R, T)): which frames count.
            keys, values (`torch.Tensor` of shape (draft layers, R, S, key-value heads, head_dim)): the donor's.
            cross_keys, cross_values (`list` of `torch.Tensor` of shape (R, key-value heads, T, head_dim)): of the
                layers beside which there are draft layers.

        Returns:
            Normalised states (R, K, D).
        """
        decoder, behind = self.decoder, BehindDonor()
        layers = decoder.drafts.layers
        of_donor = [(key.transpose(1, 2), value.transpose(1, 2)) for key, value in zip(keys, values, strict=True)]
        behind.of_donor = [None] * layers[0].index + of_donor
        states = decoder.embed_blocks(embeds[:, None], frontiers)
        visible, frames = _additive(visible)[:, None], _additive(frame_mask)[:, None, None]
        for layer, *cross in zip(layers, cross_keys, cross_values, strict=True):
            states = layer(states, tuple(cross), behind, visible, frames)
        return decoder.drafts.layer_norm(states)


class CandidatesGraph(nn.Module):
    """The places on the short list (R, K, C) of what the states of a block (R, K, D) find most probable."""

    def __init__(self, model: Any):
        super().__init__()
        weight, bias = model.short_list_output()
        self.output = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        self.output.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        if bias is not None:
            self.output.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, states: torch.Tensor) -> torch.LongTensor:
        return self.output(states).topk(min(NUM_CANDIDATES, self.output.out_features), dim=-1).indices


class HeadGraph(nn.Module):
    """The sequential head: logits (R, 1, C) of candidates, from their embeddings (R, C, D), see
    [`MDMASRSequentialHead`]."""

    def __init__(self, model: Any):
        super().__init__()
        self.head = model.get_decoder().drafts.head

    def forward(
        self, states: torch.Tensor, before: torch.Tensor, before_that: torch.Tensor, candidates: torch.Tensor
    ) -> torch.Tensor:
        return self.head(states, before, before_that) @ candidates.transpose(1, 2)


def _additive(mask: torch.BoolTensor) -> torch.Tensor:
    """A mask of keys as what is added to the scores; of a finite number, so that no row can be NaN."""
    blank = torch.zeros(mask.shape, dtype=torch.float32)
    return blank.masked_fill(~mask, torch.finfo(torch.float32).min)


def export_onnx(model: Any, output: str | Path, int8: bool = False, processor: Any = None) -> Path:
    """
    Writes a folder for [`OnnxMDMASR`], which needs no other weights. For a checkpoint with drafts, B utterances, R
    rows of text:

    - encoder.onnx: `input_features` (B, T, mel bins) in fp32, `attention_mask` (B, T), and of Whisper
      `trailing_silence`, a number of input frames; or waveforms (B, N); to `frames` (B, T', encoder width),
      `frame_mask` (B, T'), and `cross_key.0`, ..., `cross_value.0`, ... (B, key-value heads, T', head_dim);
    - decoder.onnx: the donor's causal rows, see [`DecoderGraph`];
    - drafts.onnx: a block's states, see [`DraftsGraph`];
    - draft_candidates.onnx: what may stand at each place of a block, see [`CandidatesGraph`];
    - draft_head.onnx: a draft, see [`HeadGraph`];
    - tokens.safetensors: `embeddings` (V + E, D), `draft_ids` (N,), the ids of the short list, and where the output
      layer has one `draft_bias` (N,);
    - settings, tokenizer and processor, as `save_pretrained` writes them.

    Args:
        model ([`MDMASRForConditionalGeneration`], folder or id).
        output: a folder that does not exist yet, or is empty.
        int8 (`bool`): quantise the matrix products: weights by blocks of 64, each position's inputs by its own.
        processor ([`MDMASRProcessor`], *optional*): of a model that was not loaded from a folder.

    Raises:
        ValueError: `output` is in use, the model has no processor, decodes on a canvas, or cannot be exported.
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
    _save_tokens(model, output / TOKENS_FILE)
    with _quiet():
        _export_encoder(model, output / ENCODER_FILE)
        _export_decoder(model, output / DECODER_FILE)
        _export_drafts(model, output / DRAFTS_FILE)
        _export_candidates(model, output / CANDIDATES_FILE)
        _export_head(model, output / HEAD_FILE)
        if int8:
            for path in output.glob("*.onnx"):
                _quantize(path)
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


def _save_tokens(model: Any, path: Path) -> None:
    decoder = model.get_decoder()
    tensors = {
        "embeddings": torch.cat([decoder.embed_tokens.weight, decoder.input_only_embeddings.weight]).detach(),
        "draft_ids": decoder.drafts.head.token_ids,
    }
    if (bias := model.short_list_output()[1]) is not None:
        tensors["draft_bias"] = bias.detach().clone()
    save_file(tensors, path)


# In the examples that are traced no two sizes are alike, lest they be taken for one.


def _export_encoder(model: Any, path: Path) -> None:
    config, layers = model.config, range(model.config.decoder_config.num_hidden_layers)
    # One second: enough for every encoder's convolutions.
    shape = (2, round(config.input_frames_per_s) + 1)
    is_waveform = model.get_encoder().main_input_name == "input_values"
    features = torch.randn(shape if is_waveform else (*shape, config.encoder_config.num_mel_bins))
    dynamic = {0: DYNAMIC, 1: DYNAMIC}
    has_silence = config.encoder_config.model_type == "whisper"
    _export(
        EncoderGraph(model),
        (features, torch.ones(shape, dtype=torch.long), *([70] if has_silence else [])),
        path,
        inputs=["input_features", "attention_mask", *(["trailing_silence"] if has_silence else [])],
        outputs=["frames", "frame_mask", *layer_names("cross_key", layers), *layer_names("cross_value", layers)],
        dynamic_shapes=(dynamic, dynamic, *([DYNAMIC] if has_silence else [])),
        about=f"encoder of type {config.encoder_config.model_type!r}",
    )


def _export_decoder(model: Any, path: Path) -> None:
    config = model.config.decoder_config
    layers, heads, size = range(config.num_hidden_layers), config.num_key_value_heads, config.head_dim
    num_rows, width, num_past, num_frames, num_columns = 2, 4, 3, 7, 5
    past, cross = (len(layers), num_rows, num_past, heads, size), (num_rows, heads, num_frames, size)
    arguments = (
        torch.randn(num_rows, width, config.hidden_size),
        torch.arange(num_past, num_past + width).repeat(num_rows, 1),
        torch.ones(num_rows, width, num_past + width, dtype=torch.bool),
        torch.ones(num_rows, num_frames, dtype=torch.bool),
        torch.zeros(num_rows, num_columns, dtype=torch.long),
        torch.randn(past),
        torch.randn(past),
        *([torch.randn(cross) for _ in layers] for _ in range(2)),
    )
    inputs = ["embeds", "position_ids", "visible", "frame_mask", "columns", "past_keys", "past_values"]
    of_rows, of_past = {0: DYNAMIC, 1: DYNAMIC}, {1: DYNAMIC, 2: DYNAMIC}
    _export(
        DecoderGraph(model),
        arguments,
        path,
        inputs=[*inputs, *layer_names("cross_key", layers), *layer_names("cross_value", layers)],
        outputs=["logits", "new_keys", "new_values", "cross_queries"],
        dynamic_shapes=(
            *(of_rows, of_rows, {0: DYNAMIC, 1: DYNAMIC, 2: DYNAMIC}, of_rows, of_rows, of_past, of_past),
            *[[{0: DYNAMIC, 2: DYNAMIC}] * len(layers)] * 2,
        ),
        about="decoder",
    )


def _export_drafts(model: Any, path: Path) -> None:
    config = model.config.decoder_config
    layers = range(config.num_hidden_layers - config.draft_layers, config.num_hidden_layers)
    heads, size = config.num_key_value_heads, config.head_dim
    num_rows, num_slots, num_frames, length = 2, 5, 7, config.draft_length
    past, cross = (len(layers), num_rows, num_slots, heads, size), (num_rows, heads, num_frames, size)
    arguments = (
        torch.randn(num_rows, length, config.hidden_size),
        torch.arange(num_rows)[:, None],
        torch.ones(num_rows, length, num_slots + length, dtype=torch.bool),
        torch.ones(num_rows, num_frames, dtype=torch.bool),
        torch.randn(past),
        torch.randn(past),
        *([torch.randn(cross) for _ in layers] for _ in range(2)),
    )
    inputs = ["embeds", "frontiers", "visible", "frame_mask", "keys", "values"]
    of_rows, of_past = {0: DYNAMIC}, {1: DYNAMIC, 2: DYNAMIC}
    _export(
        DraftsGraph(model),
        arguments,
        path,
        inputs=[*inputs, *layer_names("cross_key", layers), *layer_names("cross_value", layers)],
        outputs=["states"],
        dynamic_shapes=(
            *(of_rows, of_rows, {0: DYNAMIC, 2: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}, of_past, of_past),
            *[[{0: DYNAMIC, 2: DYNAMIC}] * len(layers)] * 2,
        ),
        about="draft layers",
    )


def _export_candidates(model: Any, path: Path) -> None:
    config = model.config.decoder_config
    _export(
        CandidatesGraph(model),
        (torch.randn(2, config.draft_length, config.hidden_size),),
        path,
        inputs=["states"],
        outputs=["candidates"],
        dynamic_shapes=({0: DYNAMIC},),
        about="output layer of the short list",
    )


def _export_head(model: Any, path: Path) -> None:
    width, dynamic = model.config.decoder_config.hidden_size, {0: DYNAMIC}
    _export(
        HeadGraph(model),
        (*(torch.randn(2, 1, width) for _ in range(3)), torch.randn(2, 5, width)),
        path,
        inputs=["states", "before", "before_that", "candidates"],
        outputs=["logits"],
        dynamic_shapes=(*(dynamic,) * 3, {0: DYNAMIC, 1: DYNAMIC}),
        about="sequential head",
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


def _round(value: Any, ndigits: None = None) -> Any:
    """Python's `round` of a number that depends on an input, which the exporter does not know."""
    from onnxscript import ir
    from onnxscript import opset20 as op

    return op.Cast(op.Round(value), to=ir.DataType.INT64)


def _quantize(path: Path) -> None:
    """
    Quantises, in place, the matrix products of a graph with weights, in blocks of a channel's inputs. Activations get
    a scale for each block of each position, so that what one position gives does not depend on the others of the call.
    Embeddings stay as they are: the tied table would be made floats again as a whole in every step.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(path)
    is_large = graph.ByteSize() > MAX_EMBEDDED_BYTES
    quantizer = MatMulNBitsQuantizer(
        graph, bits=8, block_size=INT8_BLOCK, is_symmetric=True, accuracy_level=INT8_ARITHMETIC
    )
    quantizer.process()
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    quantizer.model.save_model_to_file(str(path), use_external_data_format=is_large)


__all__ = [
    "CandidatesGraph",
    "DecoderGraph",
    "DraftsGraph",
    "EncoderGraph",
    "HeadGraph",
    "export_onnx",
    "layer_names",
    "require",
]
