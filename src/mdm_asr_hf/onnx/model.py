# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""OnnxMDMASR: `generate` on the graphs that `export_onnx` wrote, by ONNX Runtime and NumPy, without PyTorch."""

import json
import math
import platform
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..cores import free_cores
from ..drafting_mdm_asr import DraftTree, to_numpy
from ..generation_configuration_mdm_asr import MDMASRGenerationConfig, check_number
from ..generation_mdm_asr import GenerationMixin

# What is in a folder.
ENCODER_FILE, DECODER_FILE, DRAFTS_FILE, EMBEDDINGS_FILE = (
    "encoder.onnx",
    "decoder.onnx",
    "drafts.onnx",
    "embeddings.npy",
)
WHISPER_FRAMES_PER_S = 100
SPINNING_STOP, EXACT_INT8 = "session.force_spinning_stop", "session.x64quantprecision"
SHARED_MEMORY = "session.use_env_allocators"
# Slots and frames come in such numbers, and rows of text by two at least: sums then have the same order, to the bit,
# however many there are.
MULTIPLE, LEAST_ROWS = 64, 2


def require(*modules: str, extra: str = "onnx") -> None:
    """Raises an ImportError that says which of the package's extras to install, if one of the modules is missing."""
    for module in modules:
        try:
            __import__(module)
        except ImportError as error:
            raise ImportError(
                f'ONNX needs {module}: `pip install ".[{extra}]"` in a clone of this project.'
            ) from error


def layer_names(kind: str, layers: range) -> list[str]:
    """Names of a graph's inputs or outputs that there is one of for every layer, such as `cross_key.0`."""
    return [f"{kind}.{layer}" for layer in layers]


def is_onnx_folder(folder: str | Path) -> bool:
    """Whether a folder holds the graphs of a model."""
    return (Path(folder) / DECODER_FILE).is_file()


@dataclass
class OnnxEncoderOutput:
    """
    What the encoder gives for B utterances.

    Attributes:
        last_hidden_state (`np.ndarray` of shape (B, T, encoder width)): the acoustic frames.
        attention_mask (`np.ndarray` of shape (B, T)): which frames count.
        cross_attention_states: keys and values of the cross-attention by the graphs' names for them: `cross_key.0`
            (B, heads, T, head_dim) and so on. Of a model in int8 keys are (B, heads, head_dim, T), and there are
            scales beside both.
    """

    last_hidden_state: np.ndarray
    attention_mask: np.ndarray
    cross_attention_states: dict[str, np.ndarray]


class OnnxSteps:
    """
    What [`VerifiedDecoder`] asks of a model, by ONNX Runtime; see [`TorchSteps`]. What a row gives depends on its own
    tokens and frames alone, to the bit.
    """

    def __init__(
        self,
        model: "OnnxMDMASR",
        encoder_outputs: OnnxEncoderOutput,
        rows: np.ndarray,
        num_slots: int,
        may_spend: bool = False,
    ):
        self.model, self.config, self.num_rows = model, model.config.decoder_config, len(rows)
        self.cross = cross_feed(encoder_outputs)
        # Rows that end are overwritten by others, unless they may be read again: a copy of a batch's keys takes new
        # memory, which is slower than the copying.
        is_whole = np.array_equal(rows, np.arange(len(encoder_outputs.attention_mask)))
        self.is_own = may_spend or not is_whole
        if not is_whole:
            self.cross = {name: values[rows] for name, values in self.cross.items()}
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
        feed = self.cross | {"embeds": self.model.embed(pad(tree.ids, width, 1)), "columns": columns}
        feed |= {"position_ids": pad(tree.positions, width, 1), "slots": slots, "visible": visible}
        feed |= {"keys": self.keys, "values": self.values}
        outputs = run(self.model.decoder, ["logits", "new_keys", "new_values"], feed)
        rows = np.arange(self.num_rows)[:, None]
        for states, name in ((self.keys, "new_keys"), (self.values, "new_values")):
            states[:, rows, :, slots] = outputs[name].transpose(1, 3, 0, 2, 4)
        return outputs["logits"]

    def propose(
        self, blocks: np.ndarray, before: np.ndarray, frontiers: np.ndarray, num_drafts: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids and entropies (R, M), see [`TorchSteps.propose`]."""
        feed = {name: self.cross[name] for name in self.model.draft_cross}
        feed |= {"embeds": self.model.embed(blocks), "before": self.model.embed(before)}
        first = self.model.first_draft_layer
        feed |= {"frontiers": frontiers[:, None], "keys": self.keys[first:], "values": self.values[first:]}
        outputs = run(self.model.drafts, ["ids", "entropies"], feed)
        return outputs["ids"][:, :num_drafts], outputs["entropies"][:, :num_drafts]

    def keep_rows(self, rows: np.ndarray) -> None:
        """Keeps some rows, by their indices."""
        self.num_rows = len(rows)
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        if not self.is_own:
            self.cross, self.is_own = {name: values[rows] for name, values in self.cross.items()}, True
            return
        for name, values in self.cross.items():
            # Most rows stay where they are, and are too large to be copied without need.
            for place in np.flatnonzero(rows != np.arange(len(rows))):
                values[place] = values[rows[place]]
            self.cross[name] = values[: len(rows)]

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copies keys and values from slots (R, N) to others (R, N)."""
        rows, last = np.arange(self.num_rows)[:, None], self.keys.shape[3] - 1
        source, target = (np.where(slots == self.padding_slot, last, slots) for slots in (source, target))
        for states in (self.keys, self.values):
            states[:, rows, :, target] = states[:, rows, :, source]


class OnnxMDMASR(GenerationMixin):
    """
    MDM-ASR by ONNX Runtime: the folder that `mdm-asr export` or `export_onnx` wrote, with the `generate` of
    [`MDMASRForConditionalGeneration`], its settings and its outputs, as arrays of NumPy. [`Transcriber`] and streaming
    take it as a model.

    Args:
        sessions (`dict[str, onnxruntime.InferenceSession]`): by the names of the graphs' files.
        embeddings (`np.ndarray` of shape (V + E, D)): of all token ids.
        config: what the checkpoint's config.json holds.
        generation_config ([`MDMASRGenerationConfig`]): of the checkpoint.
    """

    # What is exported is worth exporting.
    has_trained_drafts = True
    # Where arrays lie, and what they are; quantised graphs convert by themselves.
    device, dtype = "cpu", "float32"

    def __init__(
        self,
        sessions: dict[str, Any],
        embeddings: np.ndarray,
        config: SimpleNamespace,
        generation_config: MDMASRGenerationConfig,
    ):
        self.config, self.generation_config = config, generation_config
        self.encoder, self.decoder, self.drafts = (
            sessions[name] for name in (ENCODER_FILE, DECODER_FILE, DRAFTS_FILE)
        )
        self.embeddings, self.workers, self.name_or_path = embeddings, None, ""
        # What the masks take of the encoder: of the layers beside which there are draft layers.
        self.first_draft_layer = config.decoder_config.num_hidden_layers - config.decoder_config.draft_layers
        names = [one.name for one in self.drafts.get_inputs()]
        self.draft_cross = [name for name in names if name == "frame_mask" or name.startswith("cross_")]
        # Memory of the last batch, for the next one.
        self.spent: list[np.ndarray] = []

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, num_threads: int | None = None, providers: Sequence[Any] | None = None
    ) -> "OnnxMDMASR":
        """
        Args:
            folder: what `export_onnx` wrote.
            num_threads (`int`, *optional*): of an operation. By default, one for each core that is free.
            providers (*optional*): ONNX Runtime's execution providers. By default, the CPU.

        Raises:
            ValueError: the folder is no such folder.
            ImportError: onnxruntime is not installed.
        """
        require("onnxruntime")
        import onnxruntime

        num_threads = free_cores() if num_threads is None else num_threads
        folder, names = Path(folder), [ENCODER_FILE, DECODER_FILE, DRAFTS_FILE]
        files = (*names, EMBEDDINGS_FILE, "config.json", "generation_config.json")
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise ValueError(
                f"`folder` {str(folder)!r} has no {', '.join(missing)}. Write it with `mdm-asr export --model MODEL "
                "--output FOLDER`."
            )
        options = session_options(num_threads)
        providers = list(providers or ["CPUExecutionProvider"])
        try:
            # Of a text, a few rows are read.
            embeddings = np.load(folder / EMBEDDINGS_FILE, mmap_mode="r")
            sessions = {
                name: onnxruntime.InferenceSession(str(folder / name), options, providers=providers) for name in names
            }
            config = json.loads(
                (folder / "config.json").read_text("utf-8"), object_hook=lambda one: SimpleNamespace(**one)
            )
            config.vocab_size, config.has_drafts = config.decoder_config.vocab_size, True
            settings = MDMASRGenerationConfig(**json.loads((folder / "generation_config.json").read_text("utf-8")))
        except Exception as error:
            # ONNX Runtime raises classes of its own, one for every kind of damage.
            raise ValueError(f"`folder` {str(folder)!r} cannot be loaded: {error}. Export it again.") from error
        model = cls(sessions, embeddings, config, settings)
        model.name_or_path = str(folder)
        if num_threads > 1 and providers == ["CPUExecutionProvider"]:
            model.workers = Workers(partial(cls.from_pretrained, folder, 1, providers), num_threads)
        return model

    def encode(
        self, input_features: Any, attention_mask: Any = None, trailing_silence_s: float | None = None
    ) -> OnnxEncoderOutput:
        """Runs the encoder on features (B, T, mel bins) or (B, N), with so much silence behind the audio, by default
        the configuration's, and the cross-attention's keys and values with it."""
        input_features, lengths = self._check_features(input_features, attention_mask)
        names, feed = [one.name for one in self.encoder.get_outputs()], {}
        if self.config.encoder_config.model_type == "whisper":
            silence_s = self.config.encoder_trailing_silence_s if trailing_silence_s is None else trailing_silence_s
            feed["trailing_silence"] = np.array(round(silence_s * WHISPER_FRAMES_PER_S))
        # One by one, since padding takes time. Of no audio, a row of nothing.
        feeds = [
            feed | {"input_features": features[None, : length or None]}
            for features, length in zip(input_features, lengths, strict=True)
        ]
        if len(feeds) == 1 or self.workers is None:
            rows = [run(self.encoder, names, one) for one in feeds]
        else:
            rows = list(self.workers.map(partial(run, self.workers.model.encoder, names), feeds))
        lengths = np.array([row["frames"].shape[1] for row in rows])
        num_frames = _multiple(int(lengths.max()))
        memory = self._take_memory(rows[0], len(rows), num_frames)
        joined = {name: _join(name, [row.pop(name) for row in rows], memory[name]) for name in names}
        return OnnxEncoderOutput(
            last_hidden_state=joined.pop("frames"),
            attention_mask=np.arange(num_frames) < lengths[:, None],
            cross_attention_states=joined,
        )

    def _check_features(self, input_features: Any, attention_mask: Any) -> tuple[np.ndarray, list[int]]:
        """Features of the layout that the graph takes, and no longer than it takes, with their lengths."""
        input_features = to_numpy(input_features).astype(np.float32, copy=False)
        layout = self.encoder.get_inputs()[0].shape
        if input_features.ndim != len(layout) or (len(layout) == 3 and input_features.shape[2] != layout[2]):
            wanted = f"(B, T, {layout[2]})" if len(layout) == 3 else "(B, N)"
            raise ValueError(
                f"`input_features` of shape {input_features.shape} must be {wanted}, as this model's own feature "
                "extractor returns them."
            )
        lengths = np.full(len(input_features), input_features.shape[1])
        if attention_mask is not None:
            lengths = to_numpy(attention_mask).astype(bool).sum(axis=-1)
        encoder_config = self.config.encoder_config
        if encoder_config.model_type == "whisper":
            capacity = 2 * encoder_config.max_source_positions
            if lengths.max() > capacity:
                raise ValueError(
                    f"`input_features` hold {lengths.max() / WHISPER_FRAMES_PER_S:.1f} s of audio, but this encoder "
                    f"takes at most {capacity / WHISPER_FRAMES_PER_S:.1f} s. Split the audio into shorter pieces."
                )
            input_features = input_features[:, :capacity]
        return input_features, lengths.tolist()

    # What `generate` asks of a model, see [`GenerationMixin`].

    def prepare_cross_attention(self, encoder_outputs: OnnxEncoderOutput) -> OnnxEncoderOutput:
        """The outputs of `encode`, which have the keys and values."""
        if not isinstance(encoder_outputs, OnnxEncoderOutput):
            raise ValueError("`encoder_outputs` must be what this model's `encode` returned.")
        return encoder_outputs

    def _take_memory(self, row: dict[str, np.ndarray], num_rows: int, num_frames: int) -> dict[str, np.ndarray]:
        """For each output of a row, which has T frames or none, an array for all of them (B, ...) and `num_frames`, in
        memory of an earlier batch where there is some that is large enough: to be given new memory takes longer than
        to fill it."""
        shapes = {name: [num_rows, *values.shape[1:]] for name, values in row.items()}
        for name, values in row.items():
            if (axis := _frames_axis(name, values)) is not None:
                shapes[name][axis] = num_frames
        # Each begins at a multiple of 64 bytes.
        sizes = [_multiple(math.prod(shape) * row[name].itemsize) for name, shape in shapes.items()]
        try:
            memory = self.spent.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < sum(sizes):
            memory = np.empty(sum(sizes), np.uint8)
        parts = dict(zip(row, np.split(memory, np.cumsum(sizes)), strict=False))
        return {
            name: parts[name][: math.prod(shape) * row[name].itemsize].view(row[name].dtype).reshape(shape)
            for name, shape in shapes.items()
        }

    def spend(self, encoder_outputs: OnnxEncoderOutput) -> None:
        """Takes the memory of outputs that nobody reads any more."""
        memory = encoder_outputs.last_hidden_state.base
        if not self.spent and memory is not None:
            self.spent.append(memory)

    def take_rows(self, encoder_outputs: OnnxEncoderOutput, rows: np.ndarray) -> OnnxEncoderOutput:
        """The encoder's outputs for some rows, by their indices, which may repeat."""
        return OnnxEncoderOutput(
            encoder_outputs.last_hidden_state[rows],
            encoder_outputs.attention_mask[rows],
            {name: values[rows] for name, values in encoder_outputs.cross_attention_states.items()},
        )

    def audio_duration_s(self, input_features: Any, attention_mask: Any) -> np.ndarray | None:
        """Seconds of audio in each row (B,), or None if nothing tells."""
        if input_features is None and attention_mask is None:
            return None
        mask = np.ones(input_features.shape[:2]) if attention_mask is None else to_numpy(attention_mask)
        return mask.sum(axis=-1) / self.config.input_frames_per_s

    def begin_steps(
        self, encoder_outputs: OnnxEncoderOutput, rows: np.ndarray, num_slots: int, may_spend: bool = False
    ) -> OnnxSteps:
        """What [`VerifiedDecoder`] makes its steps by; `may_spend` says that nobody reads the outputs again."""
        return OnnxSteps(self, encoder_outputs, rows, num_slots, may_spend)

    def write_rows(
        self,
        write: Callable[["OnnxMDMASR", np.ndarray], None],
        is_open: np.ndarray,
        encoder_outputs: OnnxEncoderOutput,
    ) -> None:
        """Has open rows (B,) written in as many groups as there are threads, the long ones spread among them."""
        rows = is_open.nonzero()[0]
        num_groups = 1 if self.workers is None else min(self.workers.num_threads, len(rows))
        if num_groups < 2:
            write(self, is_open)
            return
        ranked = rows[np.argsort(-encoder_outputs.attention_mask[rows].sum(axis=1), kind="stable")]
        groups = [np.isin(np.arange(len(is_open)), ranked[first::num_groups]) for first in range(num_groups)]
        list(self.workers.map(partial(write, self.workers.model), groups))

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """Embeddings (..., D) of ids."""
        return self.embeddings[ids].astype(np.float32, copy=False)

    def _run_text(
        self, input_ids: np.ndarray, encoder_outputs: OnnxEncoderOutput, columns: np.ndarray, name: str
    ) -> np.ndarray:
        """
        One output of the decoder's graph for whole texts.

        Args:
            input_ids (`np.ndarray` of shape (R, Q)), columns (R, N): those whose logits are computed.
            name (`str`): `logits` (R, N, V), or `cross_queries` (layers, R, Q, heads * head_dim).
        """
        (num_rows, width), config = input_ids.shape, self.config.decoder_config
        if width > config.max_position_embeddings:
            raise ValueError(
                f"`decoder_input_ids` have {width} tokens, but the decoder has {config.max_position_embeddings} "
                "positions. Use a shorter text."
            )
        places = np.broadcast_to(np.arange(width), (num_rows, width))
        keys = np.zeros(
            (config.num_hidden_layers, num_rows, config.num_key_value_heads, width, config.head_dim), np.float32
        )
        feed = cross_feed(encoder_outputs)
        feed |= {"embeds": self.embed(input_ids), "position_ids": places, "slots": places}
        feed |= {"visible": np.broadcast_to(np.tri(width, dtype=bool), (num_rows, width, width))}
        return run(self.decoder, [name], feed | {"columns": columns, "keys": keys, "values": keys})[name]

    def prompt_logits(self, prompt_ids: np.ndarray, encoder_outputs: OnnxEncoderOutput) -> np.ndarray:
        """Logits (B, V) behind prompts (B, P)."""
        last = np.full((len(prompt_ids), 1), prompt_ids.shape[1] - 1)
        return self._run_text(prompt_ids, encoder_outputs, last, "logits")[:, 0]

    def cross_attention(
        self, input_ids: np.ndarray, visible: None, encoder_outputs: OnnxEncoderOutput, layers: Iterable[int]
    ) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], np.ndarray]:
        """Queries and keys of texts (B, S) by layers, and which frames count, see [`MDMASRGenerationMixin`]."""
        none = np.zeros((len(input_ids), 0), dtype=np.int64)
        queries = self._run_text(input_ids, encoder_outputs, none, "cross_queries")
        read = {layer: (queries[layer], _keys(encoder_outputs.cross_attention_states, layer)) for layer in layers}
        return read, encoder_outputs.attention_mask

    def to_output(self, values: Any, encoder_outputs: OnnxEncoderOutput | None = None) -> Any:
        """An array, or an output of arrays, as it is."""
        return values


class Workers:
    """
    Does parts of the work side by side, a thread for each. That is faster than all threads for each operation in turn:
    nobody waits between operations, nor in those that are too small to share.

    Args:
        load (`Callable`): makes a model of one thread; called for the first batch, which may never come.
        num_threads (`int`)
    """

    def __init__(self, load: Callable[[], OnnxMDMASR], num_threads: int):
        self.load, self.num_threads = load, num_threads
        self._model, self._lock = None, threading.Lock()
        # What a function gives of each part, in their order. What is left when nobody waits any more is not begun.
        self.map = ThreadPoolExecutor(num_threads).map

    @property
    def model(self) -> OnnxMDMASR:
        """The model of one thread, which all share."""
        with self._lock:
            self._model = self._model or self.load()
        return self._model


def cross_feed(encoder_outputs: OnnxEncoderOutput) -> dict[str, np.ndarray]:
    """What the decoder's graphs take of the encoder: keys and values of the frames, and which of them count."""
    return {"frame_mask": encoder_outputs.attention_mask, **encoder_outputs.cross_attention_states}


def _frames_axis(name: str, values: np.ndarray) -> int | None:
    """Which axis of an output of the encoder its frames stand along; of scales none."""
    if "_scale." in name:
        return None
    return values.ndim - (1 if name.startswith("cross_key.") and values.dtype == np.int8 else 2)


def _keys(states: dict[str, np.ndarray], layer: int) -> np.ndarray:
    """A layer's keys (B, heads, T, head_dim) in fp32."""
    keys, scale = states[f"cross_key.{layer}"], states.get(f"cross_key_scale.{layer}")
    return keys if scale is None else (keys * scale).swapaxes(2, 3)


def _join(name: str, rows: list[np.ndarray], joined: np.ndarray) -> np.ndarray:
    """Puts rows (1, ...) of any numbers of frames into an array (B, ...), with zeros behind them."""
    axis = _frames_axis(name, joined) or 1
    for place, row in zip(np.moveaxis(joined, axis, 1), rows, strict=True):
        frames = np.moveaxis(row[0], axis - 1, 0)
        place[: len(frames)], place[len(frames) :] = frames, 0
    return joined


def pad(values: np.ndarray, length: int, axis: int, value: float = 0) -> np.ndarray:
    """An array that is padded to a length, at least its own, along an axis."""
    if values.shape[axis] >= length:
        return values
    shape = list(values.shape)
    shape[axis] = length - shape[axis]
    return np.concatenate([values, np.full(shape, value, values.dtype)], axis=axis)


def _multiple(number: int) -> int:
    return -(-number // MULTIPLE) * MULTIPLE


def session_options(num_threads: int) -> Any:
    """The `onnxruntime.SessionOptions` that a model's graphs run with."""
    import onnxruntime

    check_number("num_threads", num_threads, lowest=1, is_integer=True)
    options = onnxruntime.SessionOptions()
    # Each graph has threads of its own, which by default go on spinning for a while after a run and keep the other
    # graph's and PyTorch's from the cores: a tenth to a third of the time of a clip.
    options.add_session_config_entry(SPINNING_STOP, "1")
    _share_memory()
    options.add_session_config_entry(SHARED_MEMORY, "1")
    if not _has_vnni():
        # Sums of two products of int8 would be cut off at 16 bits.
        options.add_session_config_entry(EXACT_INT8, "1")
    options.intra_op_num_threads = num_threads
    return options


@cache
def _share_memory() -> None:
    """Lets the graphs of this process take their memory from one place: they run one after the other, and each would
    keep what the largest batch took."""
    import onnxruntime as ort

    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(cpu, None)
    except Exception:
        # Another part of the program did so, with an exception of ONNX Runtime's own.
        return


def _has_vnni() -> bool:
    """Whether the CPU sums products of int8 in 32 bits; False also where nothing tells."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    try:
        return "vnni" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def run(session: Any, names: Sequence[str], feed: dict[str, Any]) -> dict[str, np.ndarray]:
    """Runs a graph on arrays. No data is copied but what does not lie in one piece."""
    arrays = {name: np.asarray(values, order="C") for name, values in feed.items()}
    return dict(zip(names, session.run(names, arrays), strict=True))
