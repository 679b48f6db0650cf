# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OnnxMDMASR: `generate` on the graphs that `export_onnx` wrote, by ONNX Runtime."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers.modeling_outputs import ModelOutput

from .cache_mdm_asr import DraftingCache, KeyValue
from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .decoder_mdm_asr import MDMASRDecoder
from .encoder_mdm_asr import WHISPER_FRAMES_PER_S, MDMASREncoderOutput
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .generation_mdm_asr import MDMASRGenerateOutput, MDMASRGenerationMixin
from .onnx_export_mdm_asr import (
    CANDIDATES_FILE,
    DECODER_FILE,
    DRAFTS_FILE,
    ENCODER_FILE,
    HEAD_FILE,
    TOKENS_FILE,
    layer_names,
    require,
)

SPINNING_STOP = "session.force_spinning_stop"


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether a folder holds the graphs of a model."""
    return (Path(folder) / DECODER_FILE).is_file()


class OnnxDecoder:
    """
    The decoder's graphs, called as [`MDMASRDecoder`] is.

    Args:
        session, drafts (`onnxruntime.InferenceSession`): of the causal rows, and of the masks.
        embeddings (`torch.Tensor` of shape (V + E, D)): of all token ids.
    """

    _block_mask = MDMASRDecoder._block_mask

    def __init__(self, session: Any, drafts: Any, embeddings: torch.Tensor, config: MDMASRDecoderConfig):
        self.session, self.drafts, self.embeddings, self.config = session, drafts, embeddings, config

    def __call__(
        self,
        input_ids: torch.LongTensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.BoolTensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_states: tuple[KeyValue, ...] | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: DraftingCache | None = None,
        frontiers: torch.LongTensor | None = None,
        frontier_mask: torch.BoolTensor | None = None,
        block_ids: torch.LongTensor | None = None,
        columns: torch.LongTensor | None = None,
        output_cross_queries: bool = False,
    ) -> dict[str, Any]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (R, Q)): causal rows; Q may be 0 where only masks are wanted.
            encoder_hidden_states: not needed; the keys and values of the cross-attention are.
            attention_mask (`torch.BoolTensor` of shape (R, Q, S), *optional*), position_ids, past_key_values,
                frontiers, frontier_mask, block_ids: as in [`MDMASRDecoder`]; one block a row, which needs a cache.
            columns (`torch.LongTensor` of shape (R, N), *optional*): those whose logits are needed. Default: none.

        Returns:
            `logits` (R, N, V), `draft_hidden_states` (R, 1, K, D) where there are frontiers, and on request
            `cross_queries`: of every layer (R, Q, heads * head_dim).
        """
        layers = range(self.config.num_hidden_layers)
        cross_keys, cross_values = zip(*cross_attention_states, strict=True)
        if encoder_attention_mask is None:
            encoder_attention_mask = torch.ones(cross_keys[0].shape[::2])
        cross = {"frame_mask": encoder_attention_mask.bool()}
        cross |= zip(layer_names("cross_key", layers), cross_keys, strict=True)
        cross |= zip(layer_names("cross_value", layers), cross_values, strict=True)
        result, cache = {"logits": None, "draft_hidden_states": None}, past_key_values
        if input_ids.shape[1]:
            names = ["logits", "new_keys", "new_values", *(["cross_queries"] if output_cross_queries else [])]
            past = self._past(input_ids, position_ids, attention_mask, cache)
            columns = input_ids.new_zeros((len(input_ids), 0)) if columns is None else columns
            outputs = run(self.session, names, cross | past | {"columns": columns})
            if cache is not None:
                for layer in layers:
                    cache.update(*(outputs[name][layer].transpose(1, 2) for name in names[1:3]), layer)
            result |= {name: outputs[name] for name in ("logits", *names[3:])}
        if frontiers is not None:
            first = len(layers) - self.config.draft_layers
            unused = {f"{kind}.{layer}" for kind in ("cross_key", "cross_value") for layer in range(first)}
            feed = {name: values for name, values in cross.items() if name not in unused}
            feed |= {"embeds": self.embeddings[block_ids[:, 0]], "frontiers": frontiers}
            feed |= {"visible": self._block_mask(frontier_mask, block_ids.shape[-1])}
            feed |= {"keys": cache.keys[first:, :, : cache.num_keys]}
            feed |= {"values": cache.values[first:, :, : cache.num_keys]}
            result["draft_hidden_states"] = run(self.drafts, ["states"], feed)["states"][:, None]
        return result

    def _past(
        self,
        input_ids: torch.LongTensor,
        position_ids: torch.LongTensor | None,
        visible: torch.BoolTensor | None,
        cache: DraftingCache | None,
    ) -> dict[str, torch.Tensor]:
        """What the graph takes of causal rows: the slots before them, and behind those the rows themselves."""
        (num_rows, width), config = input_ids.shape, self.config
        if position_ids is None:
            if width > config.max_position_embeddings:
                raise ValueError(
                    f"`decoder_input_ids` have {width} tokens, but the decoder has {config.max_position_embeddings} "
                    "positions. Use a shorter text."
                )
            position_ids = torch.arange(width).expand(num_rows, -1)
        if cache is None:
            num_past = 0
            past = torch.zeros(config.num_hidden_layers, num_rows, 0, config.num_key_value_heads, config.head_dim)
            keys, values = past, past
            visible = torch.ones(width, width, dtype=torch.bool).tril().expand(num_rows, -1, -1)
        else:
            slots, num_slots = cache.slots, cache.num_keys
            if visible is None:
                visible = torch.ones(num_rows, width, num_slots, dtype=torch.bool)
            # Before a row's first slot all is past; from there on it sees the rows, or nothing.
            first = slots.amin(dim=1)
            num_past = int(first.max())
            is_past = torch.arange(num_past) < first[:, None]
            places = slots.clamp(max=num_slots - 1)[:, None].expand(-1, width, -1)
            own = visible.gather(2, places) & (slots < num_slots)[:, None]
            visible = torch.cat([visible[..., :num_past] & is_past[:, None], own], dim=-1)
            keys, values = cache.keys[:, :, :num_past], cache.values[:, :, :num_past]
        return {
            "embeds": self.embeddings[input_ids],
            "position_ids": position_ids,
            "visible": visible,
            "past_keys": keys,
            "past_values": values,
        }


class OnnxMDMASR(MDMASRGenerationMixin):
    """
    MDM-ASR by ONNX Runtime: the folder that `mdm-asr export` or `export_onnx` wrote, with the `generate` of
    [`MDMASRForConditionalGeneration`], its settings and its outputs. [`Transcriber`] and streaming take it as a model.

    Args:
        sessions (`dict[str, onnxruntime.InferenceSession]`): by the names of the graphs' files.
        tokens (`dict[str, torch.Tensor]`): what tokens.safetensors holds, see `export_onnx`.
        config ([`MDMASRConfig`]), generation_config ([`MDMASRGenerationConfig`]): of the checkpoint.
    """

    generation_config_class = MDMASRGenerationConfig
    # What is exported is worth exporting.
    has_trained_drafts = True
    main_input_name = "input_features"
    # What goes in and comes out; quantised graphs, too, convert by themselves.
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(
        self,
        sessions: dict[str, Any],
        tokens: dict[str, torch.Tensor],
        config: MDMASRConfig,
        generation_config: MDMASRGenerationConfig,
    ):
        self.config, self.generation_config = config, generation_config
        self.encoder, self.candidates, self.head = (sessions[f] for f in (ENCODER_FILE, CANDIDATES_FILE, HEAD_FILE))
        self.draft_ids, self.draft_bias = tokens["draft_ids"], tokens.get("draft_bias")
        self.decoder = OnnxDecoder(
            sessions[DECODER_FILE], sessions[DRAFTS_FILE], tokens["embeddings"], config.decoder_config
        )
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

        folder, names = Path(folder), [ENCODER_FILE, DECODER_FILE, DRAFTS_FILE, CANDIDATES_FILE, HEAD_FILE]
        files = (*names, TOKENS_FILE, "config.json", "generation_config.json")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(
                f"`folder` {str(folder)!r} has no {', '.join(missing)}. Write it with `mdm-asr export --model MODEL "
                "--output FOLDER`."
            )
        config, options = MDMASRConfig.from_pretrained(folder), session_options(num_threads)
        providers = list(providers or ["CPUExecutionProvider"])
        try:
            tokens = load_file(folder / TOKENS_FILE)
            sessions = {
                name: onnxruntime.InferenceSession(str(folder / name), options, providers=providers) for name in names
            }
        except Exception as error:
            # ONNX Runtime and safetensors raise classes of their own, one for every kind of damage.
            raise ValueError(f"`folder` {str(folder)!r} cannot be loaded: {error}. Export it again.") from error
        model = cls(sessions, tokens, config, MDMASRGenerationConfig.from_pretrained(folder))
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

    def encode(
        self,
        input_features: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        trailing_silence_s: float | None = None,
    ) -> MDMASREncoderOutput:
        """Runs the encoder, with so much silence behind the audio, by default the configuration's, and the
        cross-attention's keys and values with it."""
        input_features, attention_mask = self._check_features(input_features, attention_mask)
        layers = range(self.config.decoder_config.num_hidden_layers)
        names = [layer_names(kind, layers) for kind in ("cross_key", "cross_value")]
        names = ["frames", "frame_mask", *names[0], *names[1]]
        feed = {}
        if self.config.encoder_config.model_type == "whisper":
            silence_s = self.config.encoder_trailing_silence_s if trailing_silence_s is None else trailing_silence_s
            feed["trailing_silence"] = np.array(round(silence_s * WHISPER_FRAMES_PER_S))
        rows = []
        # One by one: a row is enough for a CPU, and padding takes time.
        for features, mask in zip(input_features.float(), attention_mask.long(), strict=True):
            # Of no audio, a row of nothing.
            length = int(mask.sum()) or len(mask)
            row = {"input_features": features[None, :length], "attention_mask": mask[None, :length]}
            rows.append(run(self.encoder, names, feed | row))
        # The dimension of the frames.
        dims = [0, 0, *[-2] * 2 * len(layers)]
        outputs = [_stack([row[name][0] for row in rows], dim) for name, dim in zip(names, dims, strict=True)]
        frames, frame_mask, *cross = outputs
        keys, values = cross[: len(layers)], cross[len(layers) :]
        return MDMASREncoderOutput(
            last_hidden_state=frames,
            attention_mask=frame_mask,
            cross_attention_states=tuple(zip(keys, values, strict=True)),
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

    def short_list_output(self) -> None:
        """Nothing: the output layer of the short list is in the graph."""

    @property
    def draft_token_ids(self) -> torch.LongTensor:
        """The N ids that can be drafted."""
        return self.draft_ids

    def draft_candidates(self, states: torch.Tensor, output: None = None) -> torch.LongTensor:
        """Places on the short list (R, K, C), see [`~MDMASRForConditionalGeneration.draft_candidates`]."""
        return run(self.candidates, ["candidates"], {"states": states})["candidates"]

    def draft_logits(
        self,
        states: torch.Tensor,
        before: torch.LongTensor,
        before_that: torch.LongTensor,
        candidates: torch.LongTensor,
        output: None = None,
    ) -> torch.Tensor:
        """Logits (R, C) of places on the short list, see [`~MDMASRForConditionalGeneration.draft_logits`]."""
        embeddings = self.decoder.embeddings
        feed = {"before": embeddings[before][:, None], "before_that": embeddings[before_that][:, None]}
        feed |= {"states": states[:, None], "candidates": embeddings[self.draft_ids[candidates]]}
        logits = run(self.head, ["logits"], feed)["logits"][:, 0]
        return logits if self.draft_bias is None else logits + self.draft_bias[candidates]

    def __call__(
        self,
        decoder_input_ids: torch.LongTensor,
        decoder_attention_mask: torch.BoolTensor | None = None,
        encoder_outputs: MDMASREncoderOutput | None = None,
        logits_to_keep: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (R, N, V) of columns (R, N), by default of all, and the states of masks, of one evaluation; see
        [`MDMASRForConditionalGeneration.forward`]."""
        if logits_to_keep is None:
            logits_to_keep = torch.arange(decoder_input_ids.shape[1]).expand(len(decoder_input_ids), -1)
        outputs = self.decoder(
            decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_attention_mask=encoder_outputs.attention_mask,
            cross_attention_states=encoder_outputs.cross_attention_states,
            columns=logits_to_keep,
            **kwargs,
        )
        return ModelOutput(logits=outputs["logits"], draft_hidden_states=outputs["draft_hidden_states"])


def _stack(rows: list[torch.Tensor], dim: int) -> torch.Tensor:
    """Rows that are padded by zeros (or False) to the longest one along a dimension."""
    longest = max(row.shape[dim] for row in rows)
    padded = []
    for row in rows:
        shape = list(row.shape)
        shape[dim] = longest - shape[dim]
        padded.append(torch.cat([row, row.new_zeros(shape)], dim=dim) if shape[dim] else row)
    return torch.stack(padded)


def session_options(num_threads: int | None = None) -> Any:
    """The `onnxruntime.SessionOptions` that a model's graphs run with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each graph has threads of its own, which by default go on spinning for a while after a run and keep the other
    # graph's and PyTorch's from the cores: a tenth to a third of the time of a clip.
    options.add_session_config_entry(SPINNING_STOP, "1")
    if num_threads is not None:
        if not isinstance(num_threads, int) or isinstance(num_threads, bool) or num_threads < 1:
            raise ValueError(f"`num_threads` must be an integer of at least 1, got {num_threads!r}.")
        options.intra_op_num_threads = num_threads
    return options


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """
    What is left to PyTorch, the choice of tokens, takes one thread. The idle threads of two pools, which spin while
    they wait, would keep each other from the cores: more than ten times as long a step.
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
        name: np.asarray(
            values.numpy(force=values.requires_grad) if isinstance(values, torch.Tensor) else values, order="C"
        )
        for name, values in feed.items()
    }
    return {name: torch.from_numpy(array) for name, array in zip(names, session.run(names, arrays), strict=True)}


__all__ = ["OnnxDecoder", "OnnxMDMASR", "is_onnx_folder"]
