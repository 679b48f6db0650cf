"""Languages of donors, tiny and random: prompts against transformers' and NeMo's own, detection, labels, training."""

import copy
import json
import shutil
import subprocess

import canary_donors
import numpy as np
import pytest
import run_train
import soundfile
import torch
import whisper_donors
from canary_donors import needs_parakeet_features, nemo_settings, nemo_vocab_size, nemo_weights, write_nemo
from tables import each
from tiny_data import save_model
from tiny_sentencepiece import ENGLISH, GERMAN, train
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    CanaryProcessor,
    ParakeetFeatureExtractor,
    PreTrainedTokenizerFast,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE
from whisper_donors import GREEDY, needs_released_whisper, save_released

import mdm_asr_hf
from mdm_asr_hf.convert.canary import _prompt_template, canary_processor, from_canary
from mdm_asr_hf.evaluate.evaluation import evaluate_model
from mdm_asr_hf.evaluate.scoring import normaliser
from mdm_asr_hf.prompt_mdm_asr import build_prompt_ids, detect_languages, with_prompt_defaults
from mdm_asr_hf.train.collator import DataCollatorForMDMASR
from mdm_asr_hf.transcribe.transcript import token_texts

RATE_HZ = 16_000
NUM_MEL_BINS = whisper_donors.NUM_MEL_BINS
# All of Whisper's own, in its order.
WHISPER_TOKENS = [
    *("<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), "<|translate|>"),
    *("<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"),
]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A multilingual donor with all languages: its folder, model and tokenizer."""
    folder = tmp_path_factory.mktemp("whisper") / "donor"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whisper_donors, "SPECIALS", WHISPER_TOKENS)
        donor, tokenizer = whisper_donors.save_donor(folder, multilingual=True)
    return folder, donor, tokenizer


@pytest.fixture(scope="module")
def converted(whisper):
    """Model and processor of it that see the same 30 seconds as the donor, of clips of 1.5 s."""
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(whisper[0], encoder_trailing_silence_s=28.5)
    return model, mdm_asr_hf.MDMASRProcessor.from_whisper(whisper[0])


def clips(number, seconds=1.5, seed=0):
    """Noises of several colours that end in 50 ms of silence, so that padding changes no frame of the signal."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        noise = rng.normal(size=round(seconds * RATE_HZ))
        clip = np.convolve(noise, np.hanning(2 + 7 * i), mode="same") * 0.9**i
        clip[-800:] = 0
        made.append(clip.astype(np.float32))
    return made


def stock_features(audio):
    extractor = WhisperFeatureExtractor(feature_size=NUM_MEL_BINS)
    return extractor(audio, sampling_rate=RATE_HZ, return_tensors="pt")["input_features"]


def stock_prompts(donor, features, **options):
    """The decoder's input of the donor's own `generate`: its prompts (B, P)."""
    seen = []
    hook = donor.model.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    try:
        donor.generate(features, max_new_tokens=1, **options)
    finally:
        hook.remove()
    # The first of more than the start token: that one alone is looked at to detect the language.
    return next(ids for ids in seen if ids.shape[1] > 1).tolist()


# Whisper's prompt


def test_whisper_prompts_equal_those_of_tokenizer_and_generate(whisper, converted):
    for task in ["transcribe", "translate"]:
        tokenizer, (model, processor) = whisper[2], converted
        start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
        names = [*LANGUAGES, *TO_LANGUAGE_CODE]
        expected = []
        for name in names:
            forced = tokenizer.get_decoder_prompt_ids(task=task, language=name)
            expected.append([start, *(token for _, token in forced)])
        assert processor.get_prompt_ids(language=names, task=task, batch_size=len(names)).tolist() == expected
        assert processor.prompt_template == model.generation_config.prompt_template
        # The same in other spellings.
        for spell in (str.upper, str.title, "<|{}|>".format, "{}-XX".format, "{}_xx".format, " {} ".format):
            spelled = [spell(code) for code in LANGUAGES]
            ids = processor.get_prompt_ids(language=spelled, task=task, batch_size=len(spelled))
            assert ids.tolist() == expected[: len(LANGUAGES)]

    donor, (model, _) = whisper[1], converted
    features = stock_features(clips(3))
    template = model.generation_config.prompt_template
    for options in (
        dict(language="de"),
        dict(language="german", task="translate"),
        dict(language=["yue", "Spanish", "en"], task="transcribe"),
        dict(language=["haw", "<|fr|>", "flemish"], task="translate"),
    ):
        assert build_prompt_ids(template, 3, **options).tolist() == stock_prompts(donor, features, **options), options


def test_whisper_translates_into_english_alone(converted):
    _, processor = converted
    prompt = processor.get_prompt_ids
    assert prompt("de", "en").equal(prompt("de", task="translate"))
    assert prompt("de", "German").equal(prompt("de", task="transcribe"))
    assert prompt("en", "en").equal(prompt("en", task="transcribe"))
    mixed = prompt(["de", "en", "fr"], ["English", "en", None], batch_size=3)
    tasks = ["translate", "transcribe", "transcribe"]
    assert mixed.equal(prompt(["de", "en", "fr"], task=tasks, batch_size=3))
    assert prompt("de", "en", task="translate").equal(prompt("de", "en"))
    with pytest.raises(ValueError, match=r"`target_language='fr'`: .* into \['en'\] only, not from 'de' into 'fr'"):
        prompt("de", "French")
    with pytest.raises(ValueError, match="`task='transcribe'` contradicts `language='de'` with `target_language='en'"):
        prompt("de", "en", task="transcribe")
    with pytest.raises(ValueError, match="`task='translate'` contradicts"):
        prompt("de", "de", task="translate")
    with pytest.raises(ValueError, match="`target_language='klingon'` is not known"):
        prompt("de", "klingon")

    with pytest.raises(ValueError, match="`timestamp=True` has no place .* set `return_token_timestamps`"):
        converted[0].generate(torch.randn(1, 100, NUM_MEL_BINS), timestamp=True)

    model, processor = converted
    inputs = processor(clips(8), sampling_rate=RATE_HZ)
    prompts, output = prompts_of(model, inputs, language="auto", target_language="en")
    assert prompts == processor.get_prompt_ids(output.languages, "en", batch_size=8).tolist()
    assert any(language != "en" for language in output.languages)
    with pytest.raises(ValueError, match="from a language yet to be detected into 'fr'"):
        model.generate(**inputs, language="auto", target_language="fr")


# Detection


def test_detected_languages_equal_the_donors(whisper, converted):
    donor, (model, processor) = whisper[1], converted
    audio = clips(8)
    features = stock_features(audio)
    expected = [token[2:-2] for token in whisper[2].convert_ids_to_tokens(donor.detect_language(features))]
    assert len(set(expected)) > 1  # else a constant would do
    inputs = processor(audio, sampling_rate=RATE_HZ)
    # Its settings suppress all tokens of languages: that is for texts, as in transformers.
    assert set(donor.generation_config.lang_to_id.values()) <= set(model.generation_config.suppress_tokens)
    # Without a language it is detected, as by the donor.
    for options in ({}, {"language": "auto"}):
        output = model.generate(**inputs, **options, **GREEDY, max_new_tokens=2, return_dict_in_generate=True)
        assert output.languages == expected
        assert output.num_steps <= 2 and int(output.nfe.max()) == output.num_steps  # detection is not among them
    detected = detect_languages(model, model.encode(**inputs))
    assert detected.languages == expected and detected.codes == list(LANGUAGES)
    # Over the language tokens alone, as they stand behind the start of the donor's prompt.
    start = torch.full((8, 1), donor.generation_config.decoder_start_token_id)
    with torch.no_grad():
        logits = donor(input_features=features, decoder_input_ids=start).logits[:, -1]
    of_languages = logits[:, list(donor.generation_config.lang_to_id.values())]
    np.testing.assert_allclose(detected.probabilities, of_languages.softmax(-1), rtol=0, atol=1e-5)
    # And so do the prompts of the donor's own `generate`, which detects where no language is given.
    template = model.generation_config.prompt_template
    prompts = build_prompt_ids(template, 8, language=expected).tolist()
    assert stock_prompts(donor, features, task="transcribe") == prompts


def prompts_of(model, inputs, **options):
    """The prompts a `generate` lays, and its output."""
    seen = []

    class Streamer:
        def put(self, value):
            seen.append(value)

        def end(self):
            pass

    greedy = GREEDY if model.config.has_drafts else {}
    output = model.generate(
        **inputs, **options, **greedy, streamer=Streamer(), return_dict_in_generate=True, max_new_tokens=2
    )
    return seen[0].tolist(), output


def test_given_and_detected_languages_in_one_batch(converted):
    model, processor = converted
    audio = clips(6)
    inputs = processor(audio, sampling_rate=RATE_HZ)
    detected = detect_languages(model, model.encode(**inputs)).languages
    given = ["German", "auto", None, "AUTO", "zh-TW", "auto"]
    expected = ["de", detected[1], detected[2], detected[3], "zh", detected[5]]
    prompts, output = prompts_of(model, inputs, language=given)
    assert output.languages == expected
    assert prompts == processor.get_prompt_ids(expected, batch_size=6).tolist()
    # Each alone as in the batch.
    for i, one in enumerate(audio):
        alone = processor(one, sampling_rate=RATE_HZ)
        prompt, single = prompts_of(model, alone, language=given[i])
        assert single.languages == [expected[i]] and prompt == prompts[i : i + 1]
        length = int((output.confidence[i] > 0).sum())
        assert torch.equal(output.sequences[i, :length], single.sequences[0, :length])

    inputs = processor(clips(3), sampling_rate=RATE_HZ)
    options = {**GREEDY, "temperature": 1.0, "num_return_sequences": 2, "return_dict_in_generate": True}
    output = model.generate(**inputs, language=["de", "fr", "auto"], **options)
    assert output.languages[:4] == ["de", "de", "fr", "fr"]
    assert output.languages[4:] == detect_languages(model, model.encode(**inputs)).languages[2:] * 2


def test_without_a_default_and_after_saving_the_language_is_detected(converted, tmp_path):
    model, processor = copy.copy(converted[0]), converted[1]
    inputs = processor(clips(3), sampling_rate=RATE_HZ)
    expected = detect_languages(model, model.encode(**inputs)).languages
    template = model.generation_config.prompt_template
    assert template["defaults"]["language"] == "auto"
    without = {**template, "defaults": {"task": "transcribe"}}
    for changed in (without, with_prompt_defaults(with_prompt_defaults(template, language="de"), language="auto")):
        settings = copy.deepcopy(model.generation_config)
        settings.prompt_template = changed
        _, output = prompts_of(model, inputs, generation_config=settings)
        assert output.languages == expected
        with pytest.raises(ValueError, match="needs a `language`: only `generate` can detect it"):
            build_prompt_ids(changed)

    # JSON files are written with sorted keys: codes must not come from their order.
    model, processor = converted
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, its_processor = (
        AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    )
    inputs = its_processor(clips(4), sampling_rate=RATE_HZ)
    options = dict(**GREEDY, language=["auto"] * 3 + ["castilian"], max_new_tokens=1, return_dict_in_generate=True)
    output = loaded.generate(**inputs, **options)
    assert output.languages == model.generate(**inputs, **options).languages and output.languages[3] == "es"


def test_the_donor_that_comes_back_detects_and_transcribes(whisper, converted):
    donor, model, features = whisper[1], copy.copy(converted[0]), stock_features(clips(8))
    back = model.to_whisper()
    expected = stock_prompts(donor, features, task="transcribe")
    assert stock_prompts(back, features) == expected and len({tuple(prompt) for prompt in expected}) > 1
    options = dict(language=["fr", "de"] * 4, task="translate")
    assert stock_prompts(back, features, **options) == stock_prompts(donor, features, **options)
    model.generation_config = copy.copy(model.generation_config)
    template = with_prompt_defaults(model.generation_config.prompt_template, language="de", task="translate")
    model.generation_config.prompt_template = template
    expected = stock_prompts(donor, features, language="de", task="translate")
    assert stock_prompts(model.to_whisper(), features) == expected


def test_where_each_position_predicts_itself_the_mask_is_read(whisper, converted):
    from_whisper = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper
    features = stock_features(clips(4)).transpose(1, 2)
    # With drafts it is the donor's next token, whatever a canvas would be.
    model = from_whisper(whisper[0], shift_logits=False)
    theirs = detect_languages(converted[0], converted[0].encode(features)).probabilities
    np.testing.assert_allclose(
        detect_languages(model, model.encode(features)).probabilities, theirs, rtol=1e-5, atol=1e-6
    )
    model = from_whisper(whisper[0], shift_logits=False, draft_layers=0)
    ids = torch.tensor([[model.config.decoder_start_token_id, model.config.mask_token_id]] * 4)
    with torch.no_grad():
        logits = model(input_features=features, decoder_input_ids=ids).logits[:, 1]
    of_languages = logits[:, list(model.generation_config.prompt_template["slots"]["language"].values())]
    detected = detect_languages(model, model.encode(features))
    np.testing.assert_allclose(detected.probabilities, of_languages.softmax(-1), rtol=1e-5, atol=1e-6)
    assert detected.languages == [list(LANGUAGES)[i] for i in of_languages.argmax(-1).tolist()]


def test_models_that_cannot_detect(whisper, tmp_path):
    whisper_donors.save_donor(tmp_path / "english", multilingual=False)
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(tmp_path / "english")
    features = torch.randn(2, 100, NUM_MEL_BINS)
    for language in ("auto", ["auto", None]):
        with pytest.raises(ValueError, match="`language=.*auto.*cannot detect the language. Leave the argument out"):
            model.generate(features, language=language)
    with pytest.raises(ValueError, match="cannot detect the language; only those made of a multilingual Whisper"):
        detect_languages(model, model.encode(features))
    assert model.generate(features, **GREEDY, return_dict_in_generate=True).languages is None
    shrunk = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(whisper[0], vocab_size=260, draft_layers=0)
    with pytest.raises(ValueError, match="vocabulary was shrunk to text.*never predicted .261 ids are"):
        shrunk.generate(features, language="auto")
    assert shrunk.generate(features, language="fr", return_dict_in_generate=True).languages == ["fr", "fr"]


# A real donor, where it can be had

SAID = {
    "de": "Die Katze sitzt auf dem Tisch und schläft den ganzen Tag.",
    "es": "El perro corre por la playa con los niños.",
}


@needs_released_whisper
@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_texts_of_a_released_donor_equal_transformers(tmp_path):
    """Speech in two languages: language given, detected, and translated."""
    save_released("base", tmp_path / "donor")
    for code, text in SAID.items():
        subprocess.run(["espeak-ng", "-v", code, "-s", "140", "-w", tmp_path / f"{code}.wav", text], check=True)
    donor = WhisperForConditionalGeneration.from_pretrained(tmp_path / "donor", dtype=torch.float32).eval()
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(tmp_path / "donor")
    processor = mdm_asr_hf.MDMASRProcessor.from_whisper(tmp_path / "donor")
    with torch.no_grad():
        encoded = model.encode(**processor([str(tmp_path / f"{code}.wav") for code in SAID]))
    # The stock class knows no mask: all clips fill the least duration of 15 seconds.
    assert encoded.attention_mask.all() and encoded.last_hidden_state.shape[1] == 750
    stock_encoded = BaseModelOutput(last_hidden_state=encoded.last_hidden_state)
    eos = model.config.eos_token_id

    def texts(language, task):
        options = {"task": task, "max_new_tokens": 24}
        expected = donor.generate(encoder_outputs=stock_encoded, language=language, **options)
        output = model.generate(
            encoder_outputs=encoded, language=language, **options, **GREEDY, return_dict_in_generate=True
        )
        # transformers leaves out the last end of text.
        ours, theirs = ([[i for i in row if i != eos] for row in ids.tolist()] for ids in (output.sequences, expected))
        assert ours == theirs
        return processor.batch_decode(output.sequences), output.languages

    given, codes = texts(list(SAID), "transcribe")
    assert codes == list(SAID) and "sitzt auf dem Tisch" in given[0] and "por la playa" in given[1]
    # Both detect, and lay the same prompts: the texts are those of before.
    assert texts(None, "transcribe") == (given, list(SAID))
    translated, _ = texts(list(SAID), "translate")
    assert "on the table" in translated[0]


# Canary's prompt

LANGUAGE_TOKENS = ["<|en|>", "<|de|>", "<|fr|>"]
CANARY_TOKENS = [
    *(token for token in canary_donors.SPECIAL_TOKENS if token not in LANGUAGE_TOKENS),
    *("<|emo:neutral|>", "<|emo:happy|>", *LANGUAGE_TOKENS),
]


def nemo_prompt(slots):
    """NeMo's canary2 format, `canary2.py` of nemo.collections.common.prompts, with an empty decoder context."""
    text = "<|startofcontext|><|startoftranscript|>|emotion||source_lang||target_lang||pnc||itn||timestamp||diarize|"
    optional = {"emotion": "<|emo:undefined|>", "pnc": True, "itn": False, "timestamp": False, "diarize": False}
    for name, value in {**optional, **slots}.items():
        if isinstance(value, bool):
            value = f"<|{name}|>" if value else f"<|no{name}|>"
        text = text.replace(f"|{name}|", value if value.startswith("<|") else f"<|{value}|>")
    return [f"<|{token}|>" for token in text[2:-2].split("|><|")]


def nemo_archive(folder, prompt_format="canary2"):
    spm_models = {
        "spl_tokens": train([" ".join(CANARY_TOKENS)], len(CANARY_TOKENS) + 2, CANARY_TOKENS),
        "en": train(ENGLISH, 40),
        "de": train(GERMAN, 43),
    }
    settings = nemo_settings(spm_models) | {"prompt_format": prompt_format}
    return write_nemo(folder / "canary-tiny.nemo", settings, nemo_weights(nemo_vocab_size(spm_models)), spm_models)


@pytest.fixture(scope="module")
def nemo(tmp_path_factory):
    path = nemo_archive(tmp_path_factory.mktemp("nemo"))
    return from_canary(mdm_asr_hf.MDMASRForConditionalGeneration, path), canary_processor(path)


OPTIONS = [
    ({}, {"source_lang": "en", "target_lang": "en"}),
    ({"language": "de"}, {"source_lang": "de", "target_lang": "de"}),
    ({"language": "German", "target_language": "English"}, {"source_lang": "de", "target_lang": "en"}),
    ({"target_language": "de-DE"}, {"source_lang": "en", "target_lang": "de"}),
    ({"punctuation": False, "itn": True}, {"source_lang": "en", "target_lang": "en", "pnc": False, "itn": True}),
    ({"punctuation": "no", "itn": "yes"}, {"source_lang": "en", "target_lang": "en", "pnc": False, "itn": True}),
    ({"timestamp": True}, {"source_lang": "en", "target_lang": "en", "timestamp": True}),
    ({"diarize": True}, {"source_lang": "en", "target_lang": "en", "diarize": True}),
    ({"emotion": "happy"}, {"source_lang": "en", "target_lang": "en", "emotion": "<|emo:happy|>"}),
]


@needs_parakeet_features
def test_canary_prompts_equal_nemos(nemo):
    for options, slots in OPTIONS:
        ids = nemo[1].get_prompt_ids(**options)
        assert ids.tolist() == [nemo[1].tokenizer.convert_tokens_to_ids(nemo_prompt(slots))]

    model, processor = nemo
    names = sorted({name for options, _ in OPTIONS for name in options})
    per_row = {name: [options.get(name) for options, _ in OPTIONS] for name in names}
    expected = [processor.tokenizer.convert_tokens_to_ids(nemo_prompt(slots)) for _, slots in OPTIONS]
    inputs = processor([np.sin(np.arange(8000) * (i + 1) / 50) for i in range(len(OPTIONS))], sampling_rate=RATE_HZ)
    prompts, output = prompts_of(model, inputs, **per_row)
    assert prompts == expected
    assert output.languages == [slots["source_lang"] for _, slots in OPTIONS]
    # No emotion of which the vocabulary has no token.
    with pytest.raises(ValueError, match=r"`emotion='sad'` .* one of \['happy', 'neutral', 'undefined'\]"):
        model.generate(**inputs, emotion="sad")
    with pytest.raises(ValueError, match=r"cannot detect the language. Pass one of \['de', 'en'\]"):
        model.generate(**inputs, language="auto")
    with pytest.raises(ValueError, match=r"`task='translate'` has no place .*'target_language'"):
        model.generate(**inputs, task="translate")


def test_the_task_of_the_first_format_follows_from_the_languages(tmp_path):
    model = from_canary(mdm_asr_hf.MDMASRForConditionalGeneration, nemo_archive(tmp_path, "canary"))
    vocab = {token: 1 + i for i, token in enumerate(CANARY_TOKENS)}  # behind <unk>

    def tokens(**slots):
        (ids,) = build_prompt_ids(model.generation_config.prompt_template, **slots).tolist()
        return [token[2:-2] for i in ids for token in vocab if vocab[token] == i]

    assert tokens(language="de") == ["startoftranscript", "de", "transcribe", "de", "pnc"]
    translation = ["startoftranscript", "de", "translate", "en", "pnc"]
    assert tokens(language="de", target_language="en") == translation
    assert tokens(language="de", target_language="en", task="translate") == translation
    assert model.config.decoder_start_token_id == vocab["<|startoftranscript|>"]
    with pytest.raises(ValueError, match="`task='translate'` contradicts `language='de'`"):
        tokens(language="de", task="translate")


@needs_parakeet_features
def test_canary_prompts_equal_those_of_its_processor(tmp_path):
    """CanaryProcessor.apply_transcription_request, with the prompt that canary-1b-v2's chat template spells."""
    vocab = {token: i for i, token in enumerate(["<unk>", *CANARY_TOKENS, "hello"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<|startoftranscript|>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        additional_special_tokens=[token for token in CANARY_TOKENS if token not in names.values()],
        **names,
    )
    chat_template = (
        "{%- for part in messages[0]['content'] if part['type'] == 'text' -%}"
        "<|startofcontext|><|startoftranscript|><|emo:undefined|><|{{ part['source_language'] }}|>"
        "<|{{ part['target_language'] }}|>{{ '<|pnc|>' if part['punctuation'] else '<|nopnc|>' }}"
        "<|noitn|><|notimestamp|><|nodiarize|>{%- endfor -%}"
    )
    extractor = ParakeetFeatureExtractor(feature_size=canary_donors.NUM_MEL_BINS)
    stock = CanaryProcessor(extractor, tokenizer, chat_template=chat_template)
    template = _prompt_template(tokenizer, "canary2")
    audio = [np.sin(np.arange(8000) / 30).astype(np.float32)] * 3
    for source, target, punctuation in (
        ("en", None, True),
        ("German", "English", False),
        (["fr", "de", "en"], ["fr", "en", "French"], True),
    ):
        expected = stock.apply_transcription_request(
            audio, source_language=source, target_language=target, punctuation=punctuation
        )["decoder_input_ids"]
        ids = build_prompt_ids(template, 3, language=source, target_language=target, punctuation=punctuation)
        assert np.array_equal(ids, expected)


# Texts


@needs_parakeet_features
def test_texts_of_several_languages_in_one_batch(nemo):
    _, processor = nemo
    tokenizer = processor.tokenizer
    texts = ["the cat and the dog", "der hund und die katze", "a day in the sun", "die sonne"]
    labels = processor(text=texts, language=["English", "de-DE", None, "<|de|>"])["labels"]
    for row, text, code in zip(labels, texts, ("en", "de", "en", "de"), strict=True):
        ids = [i for i in row.tolist() if i >= 0]
        assert ids == [*tokenizer(text, language=code).input_ids, tokenizer.eos_token_id]
        assert "".join(token_texts(tokenizer, ids[:-1])) == text
    assert processor.decode(labels) == processor.batch_decode(labels) == texts
    # A translation is written with the pieces of its own language.
    translated = processor(text=["the cat"] * 2, language="de", target_language=["en", None])["labels"]
    assert processor.decode(translated[0]) == "the cat"
    english = tokenizer("the cat", language="en").input_ids
    assert translated[0].tolist()[: len(english)] == english != translated[1].tolist()[: len(english)]
    with pytest.raises(ValueError, match="`target_language` has 1 values for 2 texts"):
        processor(text=["a", "b"], target_language=["en"])


@needs_parakeet_features
@each(
    "slots, column, codes",
    [
        ({"language": "de"}, None, [("de", "de")] * 3),
        ({"language": "de"}, "language", [("en", "en"), ("de", "de"), ("de", "de")]),
        ({"target_language": "en"}, "language", [("en", "en"), ("de", "en"), ("en", "en")]),
        ({}, "language", [("en", "en"), ("de", "de"), ("en", "en")]),
    ],
)
def test_prompt_and_labels_of_a_row_speak_one_language(nemo, slots, column, codes):
    _, processor = nemo
    audio = (np.sin(np.arange(8000) / 30).astype(np.float32), RATE_HZ)
    rows = [{"audio": audio, "text": "die sonne", "language": one} for one in ("English", "DE", None)]
    batch = DataCollatorForMDMASR(processor, language_column=column, **slots)(rows)
    for ids, label, (source, target) in zip(batch["prompt_ids"], batch["labels"], codes, strict=True):
        assert processor.tokenizer.convert_ids_to_tokens(ids[3:5].tolist()) == [f"<|{source}|>", f"<|{target}|>"]
        text = processor.tokenizer("die sonne", language=target).input_ids
        assert label[label >= 0].tolist() == [*text, processor.tokenizer.eos_token_id]


# Training and evaluation


def write_data(folder, languages):
    folder.mkdir()
    lines = []
    for i, (clip, language) in enumerate(zip(clips(len(languages), seconds=0.5), languages, strict=True)):
        soundfile.write(folder / f"{i}.wav", clip, RATE_HZ)
        row = {"file_name": f"{i}.wav", "text": "the cat"} | ({} if language is None else {"language": language})
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_fine_tuning_keeps_the_language(whisper, tmp_path, monkeypatch):
    """The prompts of training, of its evaluation and of the saved model are the same, by one code path."""
    model = mdm_asr_hf.MDMASRForConditionalGeneration.from_whisper(whisper[0], encoder_trailing_silence_s=0.5)
    processor = mdm_asr_hf.MDMASRProcessor.from_whisper(whisper[0])
    save_model(tmp_path / "model", model, processor)
    trained, generated = set(), set()
    forward, generate = type(model).forward, type(model).generate

    def spied_forward(self, *args, **kwargs):
        if kwargs.get("prompt_ids") is not None:
            trained.update(map(tuple, kwargs["prompt_ids"].tolist()))
        return forward(self, *args, **kwargs)

    def spied_generate(self, *args, **kwargs):
        generated.update(map(tuple, kwargs["decoder_input_ids"].tolist()))
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", spied_forward)
    monkeypatch.setattr(type(model), "generate", spied_generate)
    data = write_data(tmp_path / "data", ["German", None, "fr"])
    run_train.main(
        [
            *("--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out"), "--language", "es"),
            *("--train_sources", str(data), "--eval_sources", str(data), "--predict_with_generate", "true"),
            *("--max_steps", "1", "--per_device_train_batch_size", "3", "--use_cpu", "true", "--report_to", "none"),
            *("--save_strategy", "no", "--disable_tqdm", "true"),
        ]
    )
    monkeypatch.undo()
    expected = set(map(tuple, processor.get_prompt_ids(["de", "es", "fr"], batch_size=3).tolist()))
    assert trained == generated == expected
    saved = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "out")
    its_processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = its_processor(clips(1), sampling_rate=RATE_HZ)
    prompts, output = prompts_of(saved, inputs)
    assert output.languages == ["es"]
    assert prompts == its_processor.get_prompt_ids().tolist() == processor.get_prompt_ids("es").tolist()


def test_evaluation_of_several_languages(converted, tmp_path):
    for language in [None, "en", "EN", "eng", "English", "en-GB", "en_us"]:
        assert normaliser(language)("It's a colour, uh") == normaliser("en")("It is a colour")
        assert normaliser("eu")("It's a colour, uh") == normaliser("German")("it s a colour uh")

    model, processor = converted
    data = write_data(tmp_path / "data", ["German", None, "fr"])
    settings = copy.deepcopy(model.generation_config)
    settings.max_new_tokens = 1
    for name, value in GREEDY.items():
        setattr(settings, name, value)
    detected = detect_languages(model, model.encode(**processor(str(data / "1.wav")))).languages
    for language, expected in (("auto", *detected), (None, *detected), ("es", "es")):
        rows = evaluate_model(model, processor, data, settings=settings, language=language)
        assert [row["language"] for row in rows] == ["German", expected, "fr"]
    template = with_prompt_defaults(settings.prompt_template, language="de")
    settings.prompt_template = {key: value for key, value in template.items() if key != "detectable"}
    with pytest.raises(ValueError, match="`language='auto'`: this model cannot detect"):
        evaluate_model(model, processor, data, settings=settings, language="auto")
