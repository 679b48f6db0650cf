# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OnnxMDMASR: `generate` on the graphs that `export_onnx` wrote, by ONNX Runtime."""

import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.modeling_outputs import ModelOutput

from .cache_mdm_asr import KeyValue
from .configuration_mdm_asr import MDMASRConfig, MDMASRDecoderConfig
from .drafting_mdm_asr import DraftTree
from .encoder_mdm_asr import WHISPER_FRAMES_PER_S, MDMASREncoderOutput
from .generation_configuration_mdm_asr import MDMASRGenerationConfig
from .generation_mdm_asr import MDMASRGenerateOutput, MDMASRGenerationMixin

# What is in a folder.
ENCODER_FILE, DECODER_FILE, DRAFTS_FILE, EMBEDDINGS_FILE = (
    "encoder.onnx",
    "decoder.onnx",
    "drafts.onnx",
    "embeddings.npy",
)
SPINNING_STOP, EXACT_INT8 = "session.force_spinning_stop", "session.x64quantprecision"
# Slots and frames come in such numbers, and rows of text by two at least: sums then have the same order, to the bit,
# however many there are.
MULTIPLE, LEAST_ROWS = 64, 2


def require(*modules: str) -> None:
    """Raises an ImportError that says what to install, if one of the modules is missing."""
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(f'ONNX needs {module}: `pip install "mdm_asr_hf[onnx]"`.') from error


def layer_names(kind: str, layers: range) -> list[str]:
    """Names of a graph's inputs or outputs that there is one of for every layer, such as `cross_key.0`."""
    return [f"{kind}.{layer}" for layer in layers]


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether a folder holds the graphs of a model."""
    return (Path(folder) / DECODER_FILE).is_file()


class OnnxDecoder:
    """
    The decoder's graphs.

    Args:
        session, drafts (`onnxruntime.InferenceSession`): of the causal rows, and of the masks.
        embeddings (`np.ndarray` of shape (V + E, D)): of all token ids.
    """

    def __init__(self, session: Any, drafts: Any, embeddings: np.ndarray, config: MDMASRDecoderConfig):
        self.session, self.drafts, self.embeddings, self.config = session, drafts, embeddings, config
        # What the masks take of the encoder: of the layers beside which there are draft layers.
        self.first_draft_layer = config.num_hidden_layers - config.draft_layers
        layers = range(self.first_draft_layer, config.num_hidden_layers)
        self.draft_cross = ["frame_mask", *layer_names("cross_key", layers), *layer_names("cross_value", layers)]

    def __call__(
        self,
        input_ids: torch.LongTensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        cross_attention_states: tuple[KeyValue, ...] | None = None,
        columns: torch.LongTensor | None = None,
        output_cross_queries: bool = False,
    ) -> dict[str, Any]:
        """
        Args:
            input_ids (`torch.LongTensor` of shape (R, Q)): whole texts, of which there is no mask.
            encoder_hidden_states: not needed; the keys and values of the cross-attention are.
            encoder_attention_mask, cross_attention_states: as in [`MDMASRDecoder`].
            columns (`torch.LongTensor` of shape (R, N), *optional*): those whose logits are needed. Default: none.

        Returns:
            `logits` (R, N, V), and on request `cross_queries`: of every layer (R, Q, heads * head_dim).
        """
        (num_rows, width), config = input_ids.shape, self.config
        if width > config.max_position_embeddings:
            raise ValueError(
                f"`decoder_input_ids` have {width} tokens, but the decoder has {config.max_position_embeddings} "
                "positions. Use a shorter text."
            )
        places = np.broadcast_to(np.arange(width), (num_rows, width))
        keys = np.zeros(
            (config.num_hidden_layers, num_rows, config.num_key_value_heads, width, config.head_dim), np.float32
        )
        feed = cross_feed(cross_attention_states, encoder_attention_mask)
        feed |= {"embeds": self.embed(input_ids.numpy()), "position_ids": places, "slots": places}
        feed |= {"visible": np.broadcast_to(np.tri(width, dtype=bool), (num_rows, width, width))}
        feed |= {"columns": np.zeros((num_rows, 0), np.int64) if columns is None else columns.numpy()}
        names = ["logits", *(["cross_queries"] if output_cross_queries else [])]
        outputs = run(self.session, names, feed | {"keys": keys, "values": keys})
        return {name: torch.from_numpy(values) for name, values in outputs.items()}

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (..., D) of ids."""
        return self.embeddings[ids].astype(np.float32, copy=False)


class OnnxSteps:
    """
    What [`VerifiedDecoder`] asks of a model, by ONNX Runtime; see [`TorchSteps`]. What a row gives depends on its own
    tokens and frames alone, to the bit.
    """

    def __init__(self, decoder: OnnxDecoder, encoder_outputs: MDMASREncoderOutput, rows: np.ndarray, num_slots: int):
        self.decoder, self.config, self.num_rows = decoder, decoder.config, len(rows)
        self.cross = cross_feed(encoder_outputs.cross_attention_states, encoder_outputs.attention_mask)
        num_frames = _multiple(self.cross["frame_mask"].shape[1])
        are_all = np.array_equal(rows, np.arange(len(self.cross["frame_mask"])))
        for name, values in self.cross.items():
            kept = values if are_all else values[rows]
            self.cross[name] = pad(kept, num_frames, 1 if name == "frame_mask" else 2)
        # Stands for the last slot there is, whose number grows.
        self.padding_slot = num_slots
        shape = self.config.num_hidden_layers, self.num_rows, self.config.num_key_value_heads, 0, self.config.head_dim
        self.keys = self.values = np.zeros(shape, np.float32)

    def verify(self, tree: DraftTree, columns: np.ndarray) -> np.ndarray:
        """Logits (R, N, V), see [`TorchSteps.verify`]."""
        # One more, for what is padding.
        if (num_slots := _multiple(tree.visible.shape[-1] + 1)) > self.keys.shape[3]:
            self.keys, self.values = (pad(states, num_slots, 3) for states in (self.keys, self.values))
        num_slots, width = self.keys.shape[3], max(tree.ids.shape[1], LEAST_ROWS)
        slots = pad(np.where(tree.slots == self.padding_slot, num_slots - 1, tree.slots), width, 1, num_slots - 1)
        visible = pad(pad(tree.visible, num_slots, 2), width, 1)
        # Padding sees one slot, since a row without any would be NaN.
        visible[:, tree.ids.shape[1] :, 0] = True
        feed = self.cross | {"embeds": self.decoder.embed(pad(tree.ids, width, 1)), "columns": columns}
        feed |= {"position_ids": pad(tree.positions, width, 1), "slots": slots, "visible": visible}
        feed |= {"keys": self.keys, "values": self.values}
        outputs = run(self.decoder.session, ["logits", "new_keys", "new_values"], feed)
        rows = np.arange(self.num_rows)[:, None]
        for states, name in ((self.keys, "new_keys"), (self.values, "new_values")):
            states[:, rows, :, slots] = outputs[name].transpose(1, 3, 0, 2, 4)
        return outputs["logits"]

    def propose(
        self, blocks: np.ndarray, before: np.ndarray, frontiers: np.ndarray, num_drafts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and entropies (R, M), see [`TorchSteps.propose`]."""
        feed = {name: self.cross[name] for name in self.decoder.draft_cross}
        feed |= {"embeds": self.decoder.embed(blocks), "before": self.decoder.embed(before)}
        first = self.decoder.first_draft_layer
        feed |= {"frontiers": frontiers[:, None], "keys": self.keys[first:], "values": self.values[first:]}
        outputs = run(self.decoder.drafts, ["ids", "entropies"], feed)
        return outputs["ids"][:, :num_drafts], outputs["entropies"][:, :num_drafts]

    def keep_rows(self, rows: np.ndarray) -> None:
        """Keeps some rows, by their indices."""
        self.num_rows = len(rows)
        self.cross = {name: values[rows] for name, values in self.cross.items()}
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies keys and values from slots (R, N) to others (R, N)."""
        rows, last = np.arange(self.num_rows)[:, None], self.keys.shape[3] - 1
        source, target = (np.where(slots == self.padding_slot, last, slots) for slots in (source, target))
        for states in (self.keys, self.values):
            states[:, rows, :, target] = states[:, rows, :, source]


class OnnxMDMASR(MDMASRGenerationMixin):
    """
    MDM-ASR by ONNX Runtime: the folder that `mdm-asr export` or `export_onnx` wrote, with the `generate` of
    [`MDMASRForConditionalGeneration`], its settings and its outputs. [`Transcriber`] and streaming take it as a model.

    Args:
        sessions (`dict[str, onnxruntime.InferenceSession]`): by the names of the graphs' files.
        embeddings (`np.ndarray` of shape (V + E, D)): of all token ids.
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
        embeddings: np.ndarray,
        config: MDMASRConfig,
        generation_config: MDMASRGenerationConfig,
    ):
        self.config, self.generation_config = config, generation_config
        self.encoder = sessions[ENCODER_FILE]
        self.decoder = OnnxDecoder(sessions[DECODER_FILE], sessions[DRAFTS_FILE], embeddings, config.decoder_config)
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

        folder, names = Path(folder), [ENCODER_FILE, DECODER_FILE, DRAFTS_FILE]
        files = (*names, EMBEDDINGS_FILE, "config.json", "generation_config.json")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(
                f"`folder` {str(folder)!r} has no {', '.join(missing)}. Write it with `mdm-asr export --model MODEL "
                "--output FOLDER`."
            )
        config, options = MDMASRConfig.from_pretrained(folder), session_options(num_threads)
        providers = list(providers or ["CPUExecutionProvider"])
        try:
            # Of a text, a few rows are read.
            embeddings = np.load(folder / EMBEDDINGS_FILE, mmap_mode="r")
            sessions = {
                name: onnxruntime.InferenceSession(str(folder / name), options, providers=providers) for name in names
            }
        except Exception as error:
            # ONNX Runtime raises classes of its own, one for every kind of damage.
            raise ValueError(f"`folder` {str(folder)!r} cannot be loaded: {error}. Export it again.") from error
        model = cls(sessions, embeddings, config, MDMASRGenerationConfig.from_pretrained(folder))
        model.name_or_path = str(folder)
        return model

    def generate(self, *args: Any, **kwargs: Any) -> torch.LongTensor | MDMASRGenerateOutput:
        """See [`MDMASRGenerationMixin.generate`]."""
        with one_torch_thread():
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
        names = ["frames", *names[0], *names[1]]
        feed = {}
        if self.config.encoder_config.model_type == "whisper":
            silence_s = self.config.encoder_trailing_silence_s if trailing_silence_s is None else trailing_silence_s
            feed["trailing_silence"] = np.array(round(silence_s * WHISPER_FRAMES_PER_S))
        rows = []
        # One by one: a row is enough for a CPU, and padding takes time. Of no audio, a row of nothing.
        for features, length in zip(input_features.float(), attention_mask.long().sum(dim=1).tolist(), strict=True):
            rows.append(run(self.encoder, names, feed | {"input_features": features[None, : length or None]}))
        lengths = torch.tensor([row["frames"].shape[1] for row in rows])
        num_frames = _multiple(int(lengths.max()))
        axes = [1, *[2] * 2 * len(layers)]
        frames, *cross = (
            torch.from_numpy(np.concatenate([pad(row[name], num_frames, axis) for row in rows]))
            for name, axis in zip(names, axes, strict=True)
        )
        keys, values = cross[: len(layers)], cross[len(layers) :]
        return MDMASREncoderOutput(
            last_hidden_state=frames,
            attention_mask=torch.arange(num_frames) < lengths[:, None],
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

    def begin_steps(self, encoder_outputs: MDMASREncoderOutput, rows: np.ndarray, num_slots: int) -> OnnxSteps:
        """What [`VerifiedDecoder`] makes its steps by."""
        return OnnxSteps(self.decoder, encoder_outputs, rows, num_slots)

    def __call__(
        self,
        decoder_input_ids: torch.LongTensor,
        encoder_outputs: MDMASREncoderOutput | None = None,
        logits_to_keep: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        """Logits (R, N, V) of columns (R, N), by default of all; see [`MDMASRForConditionalGeneration.forward`]."""
        if logits_to_keep is None:
            logits_to_keep = torch.arange(decoder_input_ids.shape[1]).expand(len(decoder_input_ids), -1)
        outputs = self.decoder(
            decoder_input_ids,
            encoder_attention_mask=encoder_outputs.attention_mask,
            cross_attention_states=encoder_outputs.cross_attention_states,
            columns=logits_to_keep,
            **kwargs,
        )
        return ModelOutput(logits=outputs["logits"])


def cross_feed(states: tuple[KeyValue, ...], mask: torch.BoolTensor | None) -> dict[str, np.ndarray]:
    """What the decoder's graphs take of the encoder: keys and values of the frames, and which of them count."""
    keys, values = zip(*states, strict=True)
    feed = {"frame_mask": np.ones(keys[0].shape[::2], bool) if mask is None else mask.bool().numpy()}
    for kind, tensors in (("cross_key", keys), ("cross_value", values)):
        feed |= zip(layer_names(kind, range(len(states))), (one.numpy(force=True) for one in tensors), strict=True)
    return feed


def pad(values: np.ndarray, length: int, axis: int, value: float = 0) -> np.ndarray:
    """An array that is padded to a length, at least its own, along an axis."""
    if values.shape[axis] >= length:
        return values
    shape = list(values.shape)
    shape[axis] = length - shape[axis]
    return np.concatenate([values, np.full(shape, value, values.dtype)], axis=axis)


def _multiple(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE


def session_options(num_threads: int | None = None) -> Any:
    """The `onnxruntime.SessionOptions` that a model's graphs run with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Each graph has threads of its own, which by default go on spinning for a while after a run and keep the other
    # graph's and PyTorch's from the cores: a tenth to a third of the time of a clip.
    options.add_session_config_entry(SPINNING_STOP, "1")
    if not _has_vnni():
        # Sums of two products of int8 would be cut off at 16 bits.
        options.add_session_config_entry(EXACT_INT8, "1")
    if num_threads is not None:
        if not isinstance(num_threads, int) or isinstance(num_threads, bool) or num_threads < 1:
            raise ValueError(f"`num_threads` must be an integer of at least 1, got {num_threads!r}.")
        options.intra_op_num_threads = num_threads
    return options


def _has_vnni() -> bool:
    """Whether the CPU sums products of int8 in 32 bits; False also where nothing tells."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """
    What is left to PyTorch beside ONNX Runtime takes one thread. The idle threads of two pools, which spin while they
    wait, would keep each other from the cores.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def run(session: Any, names: Sequence[str], feed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Runs a graph on arrays, or tensors of the CPU. No data is copied but what does not lie in one piece."""
    arrays = {name: np.asarray(values, order="C") for name, values in feed.items()}
    return dict(zip(names, session.run(names, arrays), strict=True))


__all__ = ["OnnxDecoder", "OnnxMDMASR", "OnnxSteps", "is_onnx_folder", "layer_names", "one_torch_thread", "require"]
