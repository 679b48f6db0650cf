# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""MDMASRProcessor: audio to features, text to labels, ids to text, and all of it through a folder."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoFeatureExtractor, AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from mdm_asr_hf.configuration_mdm_asr import MDMASRConfig
from mdm_asr_hf.feature_extraction_mdm_asr import MDMASRFeatureExtractor
from mdm_asr_hf.processing_mdm_asr import MDMASRProcessor

RATE = 16_000
EOS, PAD = "<|endoftext|>", "<|pad|>"
TEMPLATE = {
    "tokens": [3, "language", "target_language", "punctuation"],
    "slots": {
        "language": {"en": 10, "de": 11},
        "target_language": {"en": 10, "de": 11},
        "punctuation": {"true": 5, "false": 6},
    },
    "defaults": {"language": "en", "target_language": "@language", "punctuation": "true"},
}


def build_tokenizer(cls=PreTrainedTokenizerFast):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[EOS, PAD], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["hello world, hello there", "the world is there"], trainer)
    return cls(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def processor(tokenizer):
    return MDMASRProcessor(MDMASRFeatureExtractor(max_duration_s=30), tokenizer, TEMPLATE, text_prefix=" ")


@pytest.fixture
def registered():
    """What importing the package does, for the classes under test alone."""
    AutoFeatureExtractor.register(MDMASRConfig, MDMASRFeatureExtractor, exist_ok=True)
    AutoProcessor.register(MDMASRConfig, MDMASRProcessor, exist_ok=True)


def speech(duration_s=0.5, rate=RATE, seed=0):
    # A mixture of tones, well below every Nyquist frequency, so that all rates hold the same signal.
    time_s = np.arange(round(duration_s * rate)) / rate
    frequencies_hz = np.random.default_rng(seed).uniform(100, 2500, size=5)
    return (0.1 * np.sin(2 * np.pi * frequencies_hz[:, None] * time_s).sum(axis=0)).astype(np.float32)


# --- audio ---


def test_every_rate_and_layout_in_any_batch_gives_the_same_features(processor, tmp_path):
    expected = processor(speech(), sampling_rate=RATE)["input_features"]
    assert expected.shape == (1, 50, 80) and expected.dtype == torch.float32

    def distance(features):
        # The filter's edges aside, and where there is energy: log-mel far below the tones shows the filter's floor.
        difference = (features - expected)[0, :, 4:-4].abs()
        return difference[expected[0, :, 4:-4] > 0.5].max()

    for rate in (8_000, 44_100, 48_000):
        assert distance(processor(speech(rate=rate), sampling_rate=rate)["input_features"]) < 0.05
        assert distance(processor({"array": speech(rate=rate), "sampling_rate": rate})["input_features"]) < 0.05
        assert distance(processor([(speech(rate=rate), rate)])["input_features"]) < 0.05
    stereo = np.stack([speech() * 2, speech() * 0])
    assert distance(processor(stereo, sampling_rate=RATE)["input_features"]) < 1e-4
    assert distance(processor(stereo.T.copy(), sampling_rate=RATE)["input_features"]) < 1e-4
    integers = np.round(speech() * 2**15).astype(np.int16)
    assert distance(processor(integers, sampling_rate=RATE)["input_features"]) < 1e-2
    assert distance(processor(speech().astype(np.float64), sampling_rate=RATE)["input_features"]) < 1e-4
    # And the distance tells another signal apart.
    assert distance(processor(speech(seed=1), sampling_rate=RATE)["input_features"]) > 0.1

    soundfile.write(tmp_path / "a.flac", speech(0.7, 8_000), 8_000)
    clips = [speech(0.3), str(tmp_path / "a.flac"), {"array": speech(1.0, 48_000), "sampling_rate": 48_000}, [0.0] * 9]
    batch = processor(clips, sampling_rate=RATE, padding="longest", return_attention_mask=True)
    assert batch["attention_mask"].sum(dim=1).tolist() == [30, 70, 100, 1]
    for row, clip in enumerate(clips):
        alone = processor(clip, sampling_rate=RATE)
        num_frames = int(alone["attention_mask"].sum())
        assert torch.equal(alone["input_features"][0, :num_frames], batch["input_features"][row, :num_frames])


def test_bad_audio_raises_one_line_that_says_what_to_do(processor, tmp_path):
    nan = speech()
    nan[7] = np.nan
    for audio, message in (
        ([speech(), nan], "Clip 1 of 2: .*NaN or infinity"),
        (tmp_path / "gone.wav", "gone.wav.*does not exist"),
        (speech(31), "lasts 31.00 s.*Split"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            processor(audio, sampling_rate=RATE)
        assert "\n" not in str(error.value)


def test_arguments_of_audio_and_text(processor):
    with pytest.raises(ValueError, match="'colour'"):
        processor(speech(), sampling_rate=RATE, colour="red")
    with pytest.raises(ValueError, match="'audios'"):
        processor(text="hello", audios=[speech()])
    with pytest.raises(ValueError, match="both None"):
        processor()
    with pytest.raises(ValueError, match="2 entries for 1 clips"):
        processor(speech(), text=["a", "b"], sampling_rate=RATE)
    for text in ([], [None], 7):
        with pytest.raises(ValueError, match="`text` must be"):
            processor(text=text)

    batch = processor(speech(), text="there", sampling_rate=RATE, padding="max_length", max_length=9_600)
    assert batch["input_features"].shape[1] == 60 and batch["labels"].shape[1] == 9_600
    batch = processor(
        speech(),
        text="there",
        audio_kwargs={"sampling_rate": RATE, "padding": "max_length", "max_length": 9_600},
        text_kwargs={"padding": "max_length", "max_length": 12},
    )
    assert batch["input_features"].shape[1] == 60 and batch["labels"].shape[1] == 12
    assert processor.decode(batch["labels"][0]) == "there"
    with pytest.raises(ValueError, match="`padding` was passed twice, in `text_kwargs`"):
        processor(text="there", padding=True, text_kwargs={"padding": True})
    with pytest.raises(ValueError, match="`text_kwargs` has 'truncation'"):
        processor(text="there", text_kwargs={"truncation": True})


# --- text ---


def test_labels_are_tokens_then_end_then_ignored(processor, tokenizer):
    hello = tokenizer.encode(" hello world", add_special_tokens=False)
    there = tokenizer.encode(" there", add_special_tokens=False)
    assert len(there) < len(hello)
    batch = processor([speech(), speech()], text=["  hello world\n", "there"], sampling_rate=RATE)
    assert set(batch) == {"input_features", "attention_mask", "labels"} == set(processor.model_input_names)
    eos = tokenizer.eos_token_id
    assert batch["labels"].tolist() == [
        [*hello, eos],
        [*there, eos] + [-100] * (len(hello) - len(there)),
    ]
    assert batch["labels"].dtype == torch.long
    # Nothing said is an end at once, and not the prefix.
    assert processor(text="  ")["labels"].tolist() == [[eos]]
    assert isinstance(processor(text="there", return_tensors="np")["labels"], np.ndarray)
    # By default a blank, which this tokenizer keeps.
    bare = MDMASRProcessor(processor.feature_extractor, tokenizer)
    assert bare(text="there")["labels"].tolist() == [[*there, eos]]
    assert bare.hotword_ids(["Quilter"]) == processor.hotword_ids(["Quilter"])
    assert bare.previous_ids("hello") == processor.previous_ids("hello")
    plain = MDMASRProcessor(processor.feature_extractor, tokenizer, text_prefix="")
    assert plain(text="there")["labels"].tolist() == [[*tokenizer.encode("there"), eos]]

    texts = ["hello world, über 100 €", "", "there  is a world"]
    labels = processor(text=texts)["labels"]
    assert processor.decode(labels) == texts
    assert processor.batch_decode(labels) == texts

    for call in (lambda: processor(text=["a", "caf\udce9"]), lambda: processor.previous_ids("caf\udce9")):
        with pytest.raises(ValueError, match="`text` holds 'caf.udce9', which is not Unicode. Pass it in UTF-8"):
            call()


def test_a_tokenizer_that_takes_a_language_gets_it(processor):
    class AggregateTokenizer(PreTrainedTokenizerFast):
        takes_language = True

        def encode(self, text, language=None, **kwargs):
            offset = {"en": 0, "de": 1000}[language]
            return [offset + i for i in super().encode(text, **kwargs)]

    tokenizer = build_tokenizer(AggregateTokenizer)
    eos = tokenizer.eos_token_id
    english = tokenizer.encode("there", language="en", add_special_tokens=False)
    german = [1000 + i for i in english]
    aggregate = MDMASRProcessor(processor.feature_extractor, tokenizer, TEMPLATE)
    assert aggregate(text="there")["labels"].tolist() == [[*english, eos]]
    assert aggregate(text="there", language="de")["labels"].tolist() == [[*german, eos]]
    both = aggregate(text=["there", "there"], language=["de", "en"])["labels"]
    assert both.tolist() == [[*german, eos], [*english, eos]]
    with pytest.raises(ValueError, match="1 values for 2 texts"):
        aggregate(text=["there", "there"], language=["de"])
    with pytest.raises(ValueError, match="needs the `language`"):
        MDMASRProcessor(processor.feature_extractor, tokenizer)(text="there")
    # One vocabulary for all languages: the argument is for the prompt, and labels do not change.
    assert processor(text="there", language="de")["labels"].equal(processor(text="there")["labels"])


def test_decode_takes_every_form_of_ids(processor, tokenizer):
    ids = [*tokenizer.encode(" hello"), tokenizer.eos_token_id, tokenizer.pad_token_id, -100]
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids)):
        assert processor.decode(form) == "hello"
    for batch in ([ids, ids[:-2]], np.array([ids, ids]), torch.tensor([ids, ids]), [torch.tensor(ids)] * 2):
        assert processor.decode(batch) == ["hello", "hello"]
        assert processor.batch_decode(batch) == ["hello", "hello"]
    assert processor.decode(SimpleNamespace(sequences=torch.tensor([ids]))) == ["hello"]
    assert processor.decode([]) == "" and processor.decode([[], ids]) == ["", "hello"]
    assert processor.decode(ids[0]) == tokenizer.decode([ids[0]]).strip()
    assert processor.decode(ids, skip_special_tokens=False) == f"hello{EOS}{PAD}"


def test_prompts(processor, tokenizer):
    assert processor.get_prompt_ids().tolist() == [[3, 10, 10, 5]]
    assert processor.get_prompt_ids(language="de", punctuation=False).tolist() == [[3, 11, 11, 6]]
    assert processor.get_prompt_ids(language=["de", "en"], target_language="en", batch_size=2).tolist() == [
        [3, 11, 10, 5],
        [3, 10, 10, 5],
    ]
    with pytest.raises(ValueError, match="language='xx'"):
        processor.get_prompt_ids(language="xx")
    with pytest.raises(ValueError, match="no `prompt_template`"):
        MDMASRProcessor(processor.feature_extractor, tokenizer).get_prompt_ids()
    with pytest.raises(ValueError, match="prompt_template"):
        MDMASRProcessor(processor.feature_extractor, tokenizer, {"tokens": ["nowhere"]})


# --- saving and loading ---


def same(one, other):
    assert one.to_dict() == other.to_dict()
    assert other.prompt_template == TEMPLATE and other.text_prefix == " "
    assert other.feature_extractor.max_duration_s == 30
    arguments = {"text": "hello there", "sampling_rate": RATE}
    for key, value in one(speech(), **arguments).items():
        assert torch.equal(value, other(speech(), **arguments)[key])


def test_saved_and_loaded(processor, tmp_path, registered):
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["prompt_template"] == TEMPLATE and saved["text_prefix"] == " "
    assert saved["feature_extractor"]["feature_extractor_type"] == "MDMASRFeatureExtractor"
    same(processor, MDMASRProcessor.from_pretrained(tmp_path))
    same(processor, AutoProcessor.from_pretrained(tmp_path))
    # The stock pipeline loads these two, and never the processor.
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert isinstance(extractor, MDMASRFeatureExtractor)
    assert extractor.to_dict() == processor.feature_extractor.to_dict()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.encode(" hello there") == processor.tokenizer.encode(" hello there")
