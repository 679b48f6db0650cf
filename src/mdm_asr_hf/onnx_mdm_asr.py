# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OnnxMDMASR: `generate` on the graphs that `export_onnx` wrote, by ONNX Runtime."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import ModelOutput

from .active_window_mdm_asr import CanvasCache, KeyValue
from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .encoder_mdm_asr import WHISPER_FRAMES_PER_S, MDMASREncoderOutput
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .generation_mdm_asr import MDMASRGenerateOutput, MDMASRGenerationMixin
from .onnx_export_mdm_asr import DECODER_FILE, ENCODER_FILE, layer_names, require

SPINNING_STOP = "session.force_spinning_stop"
EXACT_SUMS = "session.x64quantprecision"


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether a folder holds the graphs of a model."""
    return (Path(folder) / DECODER_FILE).is_file()


class OnnxDecoder:
    """The decoder's graph, called as [`MDMASRDecoder`] is where `generate` calls it."""

    def __init__(self, session: Any, config: MDMASRDecoderConfig):
        self.session, self.config = session, config
        num_layers = config.num_hidden_layers
        self.kinds = {
            kind: layer_names(kind, num_layers)
            for kind in ("past_key", "past_value", "cross_key", "cross_value", "new_key", "new_value", "cross_query")
        }

    def __call__(
        self,
        input_ids: torch.LongTensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_states: tuple[KeyValue, ...] | None = None,
        position_ids: torch.LongTensor | None = None,
        canvas_cache: CanvasCache | None = None,
        places: torch.LongTensor | None = None,
        output_cross_queries: bool = False,
    ) -> dict[str, Any]:
        """
        Args:
            input_ids, position_ids (`torch.LongTensor` of shape (R, W)): a window, or, without a cache, all there is.
            encoder_hidden_states: not needed; the keys and values of the cross-attention are.
            attention_mask (`torch.Tensor` of shape (R, W), *optional*): which positions count. Of a window, the cache
                tells.
            encoder_attention_mask (`torch.Tensor` of shape (R, T), *optional*).
            places (`torch.LongTensor` of shape (C,), *optional*): those among R * W positions whose logits are needed.

        Returns:
            `logits` (C, V), and on request `cross_queries`: of every layer (R, W, heads * head_dim).
        """
        (num_rows, width), config = input_ids.shape, self.config
        if position_ids is None:
            if width > config.max_position_embeddings:
                raise ValueError(
                    f"`decoder_input_ids` have {width} tokens, but the decoder has {config.max_position_embeddings} "
                    "positions. Use a shorter canvas."
                )
            position_ids = torch.arange(width).expand(num_rows, -1)
        if canvas_cache is None:
            shape = (config.num_hidden_layers, 2, num_rows, config.num_key_value_heads, 0, config.head_dim)
            past = torch.zeros(shape)
            key_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        else:
            past, key_mask = _past(canvas_cache)
        # Of arrays, parts are cheaper than of tensors.
        past = past.numpy()
        cross_keys, cross_values = zip(*cross_attention_states, strict=True)
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones((num_rows, cross_keys[0].shape[2]))
        feed = {
            "input_ids": input_ids,
            "position_ids": position_ids,
            "key_mask": key_mask.bool(),
            "frame_mask": encoder_attention_mask.bool(),
            "places": torch.zeros(0, dtype=torch.long) if places is None else places,
        }
        for kind, tensors in (
            ("past_key", past[:, 0]),
            ("past_value", past[:, 1]),
            ("cross_key", cross_keys),
            ("cross_value", cross_values),
        ):
            feed |= zip(self.kinds[kind], tensors, strict=True)
        names = ["logits"]
        if canvas_cache is not None:
            names += self.kinds["new_key"] + self.kinds["new_value"]
        if output_cross_queries:
            names += self.kinds["cross_query"]
        outputs = run(self.session, names, feed)
        if canvas_cache is not None:
            pairs = zip(self.kinds["new_key"], self.kinds["new_value"], strict=True)
            new = torch.stack([outputs[name] for pair in pairs for name in pair])
            canvas_cache.update_all(new.unflatten(0, (-1, 2)))
        result = {"logits": outputs["logits"]}
        if output_cross_queries:
            result["cross_queries"] = [outputs[name] for name in self.kinds["cross_query"]]
        return result


def _past(cache: CanvasCache) -> tuple[torch.Tensor, torch.BoolTensor]:
    """
    Keys and values (layers, 2, R, heads, P, head_dim), in one piece, of what stands before the windows, of which the
    last begins at P, and which positions (R, P + W) count: a row's own before its window, and those of the window that
    are no padding.
    """
    starts = cache.places[:, 0]
    num_past = int(starts.max())
    is_past = torch.arange(num_past) < starts[:, None]
    is_inside = cache.places < cache.states.shape[-2] - 1
    past = cache.states[..., :num_past, :].permute(1, 2, 0, 3, 4, 5).contiguous()
    return past, torch.cat([is_past, is_inside], dim=-1)


class OnnxMDMASR(MDMASRGenerationMixin):
    """
    MDM-ASR by ONNX Runtime: the folder that `mdm-asr export` or `export_onnx` wrote, with the `generate` of
    [`MDMASRForConditionalGeneration`], its settings and its outputs. [`Transcriber`] and streaming take it as a model.

    Args:
        encoder, decoder (`onnxruntime.InferenceSession`): of the two graphs.
        config ([`MDMASRConfig`]), generation_config ([`MDMASRGenerationConfig`]): of the checkpoint.
    """

    generation_config_class = MDMASRGenerationConfig
    main_input_name = "input_features"
    # What goes in and comes out; quantised graphs, too, convert by themselves.
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, encoder: Any, decoder: Any, config: MDMASRConfig, generation_config: MDMASRGenerationConfig):
        self.config, self.generation_config = copy.deepcopy(config), generation_config
        # Windows are computed as with this one, whatever the model was trained with.
        self.config.decoder_config._attn_implementation = "sdpa"
        self.encoder, self.decoder = encoder, OnnxDecoder(decoder, self.config.decoder_config)
        self.name_or_path = ""

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, num_threads: int | None = None, providers: Sequence[Any] | None = None
    ) -> "OnnxMDMASR":
        """
        Args:
            folder: what `export_onnx` wrote.
            num_threads (`int`, *optional*): of an operation. By default, one for each core.
            providers (*optional*): ONNX Runtime's execution providers. By default, the CPU.

        Raises:
            ValueError: the folder is no such folder.
            ImportError: onnxruntime is not installed.
        """
        require("onnxruntime")
        import onnxruntime

        folder = Path(folder)
        names = (ENCODER_FILE, DECODER_FILE, "config.json", "generation_config.json")
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise ValueError(
                f"`folder` {str(folder)!r} has no {', '.join(missing)}. Write it with `mdm-asr export --model MODEL "
                "--output FOLDER`."
            )
        options = session_options(num_threads)
        providers = list(providers or ["CPUExecutionProvider"])
        try:
            sessions = [
                onnxruntime.InferenceSession(str(folder / name), options, providers=providers)
                for name in (ENCODER_FILE, DECODER_FILE)
            ]
        except Exception as error:
            # ONNX Runtime raises classes of its own, one for every kind of damage.
            raise ValueError(f"`folder` {str(folder)!r} cannot be loaded: {error}. Export it again.") from error
        model = cls(*sessions, MDMASRConfig.from_pretrained(folder), MDMASRGenerationConfig.from_pretrained(folder))
        model.name_or_path = str(folder)
        return model

    def generate(self, *args: Any, **kwargs: Any) -> torch.LongTensor | MDMASRGenerateOutput:
        """See [`MDMASRGenerationMixin.generate`]."""
        with _one_torch_thread():
            return super().generate(*args, **kwargs)

    def get_decoder(self) -> OnnxDecoder:
        return self.decoder

    def to(self, *where: Any, **more: Any) -> "OnnxMDMASR":
        """The model itself: where it runs, `providers` say, and its graphs are as they were exported."""
        for one in (*where, *more.values()):
            if (
                one is None
                or one == self.dtype
                or (not isinstance(one, torch.dtype) and torch.device(one) == self.device)
            ):
                continue
            raise ValueError(f"An ONNX model cannot be moved to {str(one)!r}. Leave it on 'cpu', in float32.")
        return self

    def eval(self) -> "OnnxMDMASR":
        return self

    def can_generate(self) -> bool:
        return True

    def encode(self, input_features: torch.Tensor, attention_mask: torch.Tensor | None = None) -> MDMASREncoderOutput:
        """Runs the encoder, and the cross-attention's keys and values with it."""
        input_features, attention_mask = self._check_features(input_features, attention_mask)
        num_layers = self.config.decoder_config.num_hidden_layers
        names = [layer_names(kind, num_layers) for kind in ("cross_key", "cross_value")]
        outputs = run(
            self.encoder,
            ["frames", "frame_mask", *names[0], *names[1]],
            {"input_features": input_features.float(), "attention_mask": attention_mask.long()},
        )
        return MDMASREncoderOutput(
            last_hidden_state=outputs["frames"],
            attention_mask=outputs["frame_mask"],
            cross_attention_states=tuple((outputs[key], outputs[value]) for key, value in zip(*names, strict=True)),
        )

    def _check_features(
        self, input_features: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the layout that the graph takes, and no longer than it takes, with their mask."""
        layout = self.encoder.get_inputs()[0].shape
        if input_features.dim() != len(layout) or (len(layout) == 3 and input_features.shape[2] != layout[2]):
            wanted = f"(B, T, {layout[2]})" if len(layout) == 3 else "(B, N)"
            raise ValueError(
                f"`input_features` of shape {tuple(input_features.shape)} must be {wanted}, as this model's own "
                "feature extractor returns them."
            )
        if attention_mask is None:
            attention_mask = torch.ones(input_features.shape[:2], dtype=torch.long)
        encoder_config = self.config.encoder_config
        if encoder_config.model_type == "whisper":
            capacity = 2 * encoder_config.max_source_positions
            longest = int(attention_mask.long().sum(dim=-1).max())
            if longest > capacity:
                raise ValueError(
                    f"`input_features` hold {longest / WHISPER_FRAMES_PER_S:.1f} s of audio, but this encoder takes "
                    f"at most {capacity / WHISPER_FRAMES_PER_S:.1f} s. Split the audio into shorter pieces."
                )
            input_features, attention_mask = input_features[:, :capacity], attention_mask[:, :capacity]
        return input_features, attention_mask

    def prepare_cross_attention(self, encoder_outputs: MDMASREncoderOutput) -> MDMASREncoderOutput:
        """The outputs of `encode`, which have the keys and values."""
        if getattr(encoder_outputs, "cross_attention_states", None) is None:
            raise ValueError("`encoder_outputs` have no `cross_attention_states`. Pass what `encode` returned.")
        return encoder_outputs

    def __call__(
        self,
        decoder_input_ids: torch.LongTensor,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        position_ids: torch.LongTensor | None = None,
        canvas_cache: CanvasCache | None = None,
        logits_to_keep: int | torch.BoolTensor = 0,
    ) -> ModelOutput:
        """Logits of one decoder evaluation, see [`MDMASRForConditionalGeneration.forward`]."""
        num_rows, width = decoder_input_ids.shape
        is_mask = isinstance(logits_to_keep, torch.Tensor)
        length = (logits_to_keep.shape[-1] if is_mask else logits_to_keep) or width
        # Shifted logits are read one position earlier, all of them where they stand.
        shift = int(self.config.shift_logits and (is_mask or logits_to_keep > 0))
        kept = logits_to_keep if is_mask else torch.ones((num_rows, length), dtype=torch.bool)
        rows, columns = kept.nonzero(as_tuple=True)
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=encoder_outputs.attention_mask,
            cross_attention_states=encoder_outputs.cross_attention_states,
            position_ids=position_ids,
            canvas_cache=canvas_cache,
            places=rows * width + columns + (width - length - shift),
        )
        logits = outputs["logits"]
        return ModelOutput(logits=logits if is_mask else logits.view(num_rows, length, -1))

    def _with_frame_mask(self, outputs: MDMASREncoderOutput) -> MDMASREncoderOutput:
        """The outputs as they are: the graph makes its mask itself."""
        return outputs


def session_options(num_threads: int | None = None) -> Any:
    """The `onnxruntime.SessionOptions` that a model's graphs run with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each graph has threads of its own, which by default go on spinning for a while after a run and keep the other
    # graph's and PyTorch's from the cores: a tenth to a third of the time of a clip.
    options.add_session_config_entry(SPINNING_STOP, "1")
    # Without VNNI, the fastest kernels for int8 cut off sums that do not fit into 16 bits (see `int8_mdm_asr`):
    # others, a tenth slower, take their place there, and only there.
    options.add_session_config_entry(EXACT_SUMS, "1")
    if num_threads is not None:
        if not isinstance(num_threads, int) or isinstance(num_threads, bool) or num_threads < 1:
            raise ValueError(f"`num_threads` must be an integer of at least 1, got {num_threads!r}.")
        options.intra_op_num_threads = num_threads
    return options


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """
    What is left to PyTorch, the sampler, takes one thread. The idle threads of two pools, which spin while they wait,
    would keep each other from the cores: more than ten times as long a step.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def run(session: Any, names: Sequence[str], feed: dict[str, torch.Tensor | np.ndarray]) -> dict[str, torch.Tensor]:
    """Runs a graph on tensors of the CPU, or arrays. No data is copied but what does not lie in one piece."""
    arrays = {
        name: np.ascontiguousarray(
            values.numpy(force=values.requires_grad) if isinstance(values, torch.Tensor) else values
        )
        for name, values in feed.items()
    }
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, arrays), strict=True)}


__all__ = ["OnnxDecoder", "OnnxMDMASR", "is_onnx_folder"]
