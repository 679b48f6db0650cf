# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of MDM-ASR (arXiv 2602.18952): any speech encoder of transformers and one masked-diffusion decoder."""

from collections.abc import Callable
from importlib import import_module

from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

POSITION_EMBEDDING_TYPES = ("sinusoidal", "learned")
_RETIRED_SETTINGS = ("ctc_characters", "ctc_hidden_size", "ctc_layers", "ctc_attention_heads")
_TOKEN_IDS = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def converter(room: str, name: str) -> Callable:
    """A function of a room of `convert/`, which does not travel with saved checkpoints: an import that transformers
    can see would make it, and what it needs, do so."""
    try:
        return getattr(import_module(f"mdm_asr_hf.convert.{room}"), name)
    except ImportError as error:
        raise ImportError(f"`{name}` needs the package: `pip install .` in a clone of this project.") from error


class MDMASRDecoderConfig(PreTrainedConfig):
    r"""
    Configuration of [`MDMASRDecoder`]. It can hold a Canary decoder (sinusoidal positions, embedding LayerNorm, ReLU,
    output bias) and a Whisper decoder (learned positions, GELU, keys without bias) without loss.

    Args:
        vocab_size (`int`): V, the number of token ids that can be predicted.
        num_input_only_tokens (`int`):
            E, the number of ids `V .. V + E - 1` that have an input embedding but no logit: the mask token, and the
            prompt tokens a shrunk vocabulary keeps. With SUBS (arXiv 2406.07524) the mask is never predicted.
        hidden_size (`int`): D, the width.
        num_key_value_heads (`int`, *optional*): defaults to `num_attention_heads`.
        head_dim (`int`, *optional*): defaults to `hidden_size // num_attention_heads`.
        position_embedding_type (`str`): `"sinusoidal"` (fixed, scaled by 1 / sqrt(D) as in NeMo) or `"learned"`.
        embedding_layernorm (`bool`): a LayerNorm on token + position embeddings.
        attention_bias (`bool`), attention_key_bias (`bool`): biases of the query, value and output projections, and
            of the key projection.
        output_bias (`bool`): a bias on the logits.
        is_causal (`bool`): the donors' causal mask. A canvas needs `False`; with drafts it is always causal.
        draft_layers (`int`): 0 is the paper's canvas. Above, the decoder's layers are the donor's, causal and exact,
            and so many layers of mask rows stand behind the last ones of them, see [`MDMASRDrafts`].
        draft_length (`int`): K, the rows of a block, a token and masks: so many tokens are drafted at once, at most.
        draft_vocab_size (`int`, *optional*): N, the ids that can be drafted, a short list that the checkpoint holds.
            None: all V.
        draft_hints (`bool`): drafts were trained, in two steps (ISCT), to see in the masks' place what was drafted
            there in the evaluation before and not accepted.
        draft_start (`bool`): drafts were trained to begin a text by the frames alone, before the first evaluation.
        draft_state_scale (`float`), draft_embedding_scale (`float`): bring the masks' final states and the donor's
            embeddings to unit scale for the sequential head.
    """

    model_type = "mdm_asr_decoder"

    vocab_size: int = 16384
    num_input_only_tokens: int = 1
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "relu"
    max_position_embeddings: int = 1024
    position_embedding_type: str = "sinusoidal"
    embedding_layernorm: bool = True
    attention_bias: bool = True
    attention_key_bias: bool = True
    output_bias: bool = True
    dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    activation_dropout: float | int = 0.0
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    is_causal: bool = False
    draft_layers: int = 0
    draft_length: int = 8
    draft_vocab_size: int | None = None
    draft_hints: bool = False
    draft_start: bool = False
    draft_state_scale: float = 1.0
    draft_embedding_scale: float = 1.0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_architecture()
        if self.draft_layers:
            self.is_causal = True
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """The one validator of the decoder's settings."""
        for name in (
            "vocab_size",
            "num_input_only_tokens",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            value = getattr(self, name)
            if value is None and name in ("num_key_value_heads", "head_dim"):
                continue
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")
        if self.num_attention_heads % (self.num_key_value_heads or 1) != 0:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads})."
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be a multiple of `num_attention_heads` "
                f"({self.num_attention_heads}), or set `head_dim`."
            )
        if self.position_embedding_type not in POSITION_EMBEDDING_TYPES:
            raise ValueError(
                f"`position_embedding_type` must be one of {POSITION_EMBEDDING_TYPES}, "
                f"got {self.position_embedding_type!r}."
            )
        if self.position_embedding_type == "sinusoidal" and self.hidden_size % 2:
            raise ValueError(f"Sinusoidal positions need an even `hidden_size`, got {self.hidden_size}.")
        self._validate_drafts()
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {getattr(self, name)}.")

    def _validate_drafts(self):
        if type(self.draft_layers) is not int or not 0 <= self.draft_layers <= self.num_hidden_layers:
            raise ValueError(
                f"`draft_layers` ({self.draft_layers!r}) must be an integer from 0 (a canvas) to the donor's "
                f"`num_hidden_layers` ({self.num_hidden_layers}): each stands behind one of its layers."
            )
        # A prompt of one token and the donor's own next one stand before the first mask.
        longest = self.max_position_embeddings - 2
        if self.draft_layers and (type(self.draft_length) is not int or not 1 <= self.draft_length <= longest):
            raise ValueError(
                f"`draft_length` ({self.draft_length!r}) must be an integer from 1 to {longest}, the positions that "
                "`max_position_embeddings` leaves. 8 is a good choice."
            )
        size = self.draft_vocab_size
        if size is not None and (type(size) is not int or not 1 <= size <= self.vocab_size):
            raise ValueError(
                f"`draft_vocab_size` ({size!r}) must be an integer from 1 to `vocab_size` ({self.vocab_size}), or "
                "None for all."
            )


class MDMASRConfig(PreTrainedConfig):
    r"""
    Configuration of [`MDMASRForConditionalGeneration`].

    Args:
        encoder_config (`PreTrainedConfig` or `dict`): any speech encoder `AutoModel` knows; `"parakeet_encoder"`
            (Canary's FastConformer) when a dict names no `model_type`.
        decoder_config ([`MDMASRDecoderConfig`] or `dict`): the masked-diffusion decoder.
        mask_token_id (`int`): the id of [MASK]; an input-only id. Defaults to the last one.
        eos_token_id (`int`): ends the text and fills the rest of the canvas.
        pad_token_id (`int`): fills rows shorter than the batch's longest in what `generate` returns.
        decoder_start_token_id (`int`): the first token of the decoder prompt.
        encoder_trailing_silence_s (`float`): seconds of silence a Whisper encoder sees after the audio, at least. 5.0
            suits a frozen donor (0 s triples its error rate); an encoder adapted to less may set less.
        encoder_min_duration_s (`float`): seconds of audio and silence together it sees at least. 15.0 suits a frozen
            Whisper: with less it is prone to repeat itself on clips of a few seconds.
        input_frames_per_s (`float`): input frames per second of audio (100 for 10 ms log-mel, the sampling rate
            for encoders that read waveforms). `generate` derives the audio's duration from it.
        shift_logits (`bool`): read the logits of canvas position i at position i - 1, the prompt's last token giving
            the first, as an autoregressive donor's weights predict (arXiv 2410.17891, 2508.15487).
    """

    model_type = "mdm_asr"
    sub_configs = {"encoder_config": AutoConfig, "decoder_config": MDMASRDecoderConfig}

    encoder_config: dict | PreTrainedConfig | None = None
    decoder_config: dict | PreTrainedConfig | None = None
    mask_token_id: int | None = None
    pad_token_id: int | None = 2
    bos_token_id: int | None = None
    eos_token_id: int | None = 3
    decoder_start_token_id: int | None = 7
    encoder_trailing_silence_s: float | int = 5.0
    encoder_min_duration_s: float | int = 0.0
    input_frames_per_s: float | int = 100.0
    shift_logits: bool = False
    initializer_range: float = 0.02
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        # Of folders saved when there was a CTC head.
        kwargs = {name: value for name, value in kwargs.items() if name not in _RETIRED_SETTINGS}
        if self.encoder_config is None:
            self.encoder_config = {"scale_input": False, "layerdrop": 0.0, "num_mel_bins": 128}
        if isinstance(self.encoder_config, dict):
            settings = dict(self.encoder_config)
            self.encoder_config = AutoConfig.for_model(settings.pop("model_type", "parakeet_encoder"), **settings)
        if self.decoder_config is None:
            self.decoder_config = {}
        if isinstance(self.decoder_config, dict):
            self.decoder_config = MDMASRDecoderConfig(**self.decoder_config)
        if self.mask_token_id is None:
            self.mask_token_id = self.num_token_ids - 1
        if not self.decoder_config.tie_word_embeddings:
            self.tie_word_embeddings = False
        super().__post_init__(**kwargs)
        self.validate_architecture()

    @property
    def has_drafts(self) -> bool:
        """Whether text is decoded by verified drafts; otherwise on the paper's canvas."""
        return self.decoder_config.draft_layers > 0

    @property
    def vocab_size(self) -> int:
        """V, the number of ids that can be predicted. Where it is set, the ids from V on, the mask's and the prompt's,
        move along."""
        return self.decoder_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int):
        before, decoder = self.vocab_size, self.decoder_config
        self.map_ids(lambda token_id: token_id + (value - before if token_id >= before else 0))
        decoder.vocab_size, decoder.draft_vocab_size = value, min(decoder.draft_vocab_size, value)

    def map_ids(self, change: Callable[[int], int]) -> None:
        """Puts what `change` makes of them in the place of all token ids."""
        for name in _TOKEN_IDS:
            if (token_id := getattr(self, name)) is not None:
                setattr(self, name, change(token_id))

    @property
    def num_token_ids(self) -> int:
        """V + E, the number of ids that have an input embedding."""
        return self.decoder_config.vocab_size + self.decoder_config.num_input_only_tokens

    def get_text_config(self, *args, **kwargs):
        return self.decoder_config

    def validate_architecture(self):
        """The one validator of the settings that span encoder and decoder."""
        if not self.vocab_size <= self.mask_token_id < self.num_token_ids:
            raise ValueError(
                f"`mask_token_id` ({self.mask_token_id}) must be an input-only id, that is in "
                f"[{self.vocab_size}, {self.num_token_ids}): the mask is never predicted. Set "
                "`decoder_config.num_input_only_tokens` to make room for it."
            )
        if self.has_drafts and self.mask_token_id != self.num_token_ids - 1:
            raise ValueError(
                f"`mask_token_id` ({self.mask_token_id}) must be the last id ({self.num_token_ids - 1}) where there "
                "are drafts. Leave it out."
            )
        if self.eos_token_id is None or not 0 <= self.eos_token_id < self.vocab_size:
            raise ValueError(
                f"`eos_token_id` ({self.eos_token_id}) must be a predictable id, that is in [0, {self.vocab_size}): "
                "the canvas is filled with it and the text ends at it."
            )
        for name in ("pad_token_id", "decoder_start_token_id"):
            value = getattr(self, name)
            if value is None or not 0 <= value < self.num_token_ids or value == self.mask_token_id:
                raise ValueError(
                    f"`{name}` ({value}) must be in [0, {self.num_token_ids}) and differ from `mask_token_id`."
                )
        for name in ("encoder_trailing_silence_s", "encoder_min_duration_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must be >= 0, got {getattr(self, name)}.")
        if self.input_frames_per_s <= 0:
            raise ValueError(f"`input_frames_per_s` must be positive, got {self.input_frames_per_s}.")
        if not self.is_encoder_decoder:
            raise ValueError("`is_encoder_decoder=False` contradicts MDM-ASR, an encoder-decoder. Leave it True.")
