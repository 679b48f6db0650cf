import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tables import each
from tiny_models import ENCODERS, PAD, START, VOCAB_SIZE, generate, tiny_drafts_model, tiny_inputs, tiny_model
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from mdm_asr_hf import MDMASRGenerateOutput, MDMASRGenerationConfig
from mdm_asr_hf.sampling_mdm_asr import SAMPLERS, ConfTopKSampler, EBConfSampler, PBEBConfSampler

EOS, MASK = 1, VOCAB_SIZE + 1


@pytest.fixture(scope="module")
def model():
    return tiny_model("whisper")


@pytest.fixture(scope="module")
def drafter():
    return tiny_drafts_model("whisper")


class ScriptedModel:
    """Replaces the decoder of a canvas by a script: the logits of every step are given, the calls are recorded."""

    def __init__(self, model, monkeypatch, texts, confidence=50.0):
        self.calls, self.open_rows, self.frames = [], [], None
        length = 10
        self.logits = torch.zeros(len(texts), length, VOCAB_SIZE)
        for row, text in enumerate(texts):
            for i in range(length):
                self.logits[row, i, text[i] if i < len(text) else EOS] = confidence
        monkeypatch.setattr(model, "forward", self)

    def __call__(self, decoder_input_ids, decoder_attention_mask, encoder_outputs, logits_to_keep):
        frames = encoder_outputs.last_hidden_state[:, 0]
        self.frames = frames if self.frames is None else self.frames
        rows = [int((self.frames == its).all(dim=-1).nonzero()[0]) for its in frames]
        self.calls.append((decoder_input_ids[:, :1].clone(), decoder_input_ids[:, 1:].clone()))
        self.open_rows.append(rows)
        return SimpleNamespace(logits=self.logits[rows, : logits_to_keep.shape[1]][logits_to_keep])


# --- rows, EOS and counting, on scripted logits ---


def test_rows_eos_and_counting_by_script(monkeypatch):
    model = tiny_model("whisper")
    script = ScriptedModel(model, monkeypatch, [[5, 6, 7], [8]])
    out = generate(model, canvas_length=8, gamma=0.0)
    assert out.sequences.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD]]
    # gamma = 0 commits one token a step, left to right under PBEB: the text and its EOS.
    assert out.nfe.tolist() == [4, 2] and out.num_steps == len(script.calls) == 4
    assert isinstance(out, MDMASRGenerateOutput)
    torch.testing.assert_close(out.confidence, torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]]))
    prompt, first = script.calls[0]
    assert prompt.tolist() == [[START]] * 2 and (first == MASK).all() and first.shape == (2, 8)
    # The finished row costs no decoder evaluation any more.
    assert script.open_rows == [[0, 1], [0, 1], [0], [0]]

    model = tiny_model("whisper")
    ScriptedModel(model, monkeypatch, [[5, 6, 7], [8]])
    out = generate(model, canvas_length=8, gamma=float("inf"))
    assert out.sequences.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD]] and out.nfe.tolist() == [1, 1]

    model = tiny_model("whisper")
    # Without position bias the sure EOS at position 3 is committed first; 4 to 7 stay masked and are cut.
    script = ScriptedModel(model, monkeypatch, [[5, 6, 7]], confidence=5.0)
    script.logits[0, 3, EOS] = 50.0
    script.logits[0, 4:] = 0.0
    out = generate(model, seconds=(1.0,), canvas_length=8, sampler="eb_conf", gamma=0.0)
    assert out.sequences.tolist() == [[5, 6, 7, EOS]] and out.nfe.tolist() == [4]
    assert script.calls[1][1].tolist() == [[MASK] * 3 + [EOS] + [MASK] * 4]

    model = tiny_model("whisper")
    ScriptedModel(model, monkeypatch, [[5, 6, 7, 8, 9, 10]])
    out = generate(model, seconds=(1.0,), canvas_length=8, gamma=0.0, max_denoising_steps=3)
    assert out.sequences.tolist() == [[5, 6, 7, 8, 9, 10, EOS]] and out.nfe.tolist() == [3]

    model = tiny_model("whisper")
    script = ScriptedModel(model, monkeypatch, [[5, 6]])
    script.logits[0, 1] = torch.zeros(VOCAB_SIZE).index_fill(0, torch.tensor([6, 7]), 20.0) + torch.eye(VOCAB_SIZE)[6]
    out = generate(model, seconds=(1.0,), canvas_length=3, gamma=0.0)
    # softmax(21, 20) = 1 / (1 + e^-1) = 0.7311
    assert out.sequences.tolist() == [[5, 6, EOS]]
    torch.testing.assert_close(out.confidence[0, 1], torch.tensor(0.7311), atol=1e-4, rtol=0)


def test_a_full_canvas_or_text_warns_with_the_remedy(monkeypatch, caplog, drafter):
    model = tiny_model("whisper")
    ScriptedModel(model, monkeypatch, [[5, 6, 7, 8], [8]])
    out = generate(model, canvas_length=4)
    assert "1 of 2 canvases" in caplog.text and "`canvas_length`" in caplog.text
    assert out.sequences.tolist() == [[5, 6, 7, 8], [8, EOS, PAD, PAD]]

    out = generate(drafter, seconds=(1.0, 0.6, 0.35), max_new_tokens=11)
    assert "2 of 3 texts filled up" in caplog.text and "`max_new_tokens`" in caplog.text
    assert out.sequences.shape == (3, 11) and out.sequences[1, -1] == EOS and not (out.sequences[::2] == EOS).any()


class Streamer(BaseStreamer):
    def __init__(self):
        self.drafts, self.counts, self.values, self.ended = [], [], [], False

    def put(self, value):
        self.values.append(value.tolist())

    def put_draft(self, value, num_committed=None):
        self.drafts.append(value.tolist())
        self.counts.append(None if num_committed is None else num_committed.tolist())

    def end(self):
        self.ended = True


def test_streamers_see_canvases_committed_texts_and_drafts(monkeypatch, drafter):
    model = tiny_model("whisper")
    ScriptedModel(model, monkeypatch, [[5, 6, 7]])
    streamer = Streamer()
    generate(model, seconds=(1.0,), canvas_length=5, gamma=0.0, streamer=streamer)
    assert streamer.drafts == [
        [[5, MASK, MASK, MASK, MASK]],
        [[5, 6, MASK, MASK, MASK]],
        [[5, 6, 7, MASK, MASK]],
        [[5, 6, 7, EOS, MASK]],
    ]
    assert streamer.values == [[[START]], [[5, 6, 7, EOS]]] and streamer.ended and streamer.counts == [None] * 4

    streamer = Streamer()
    out = generate(drafter, seconds=(1.0, 0.6, 0.35), streamer=streamer)
    assert streamer.values == [[[START]] * 3, out.sequences.tolist()] and streamer.ended
    assert len(streamer.drafts) == out.num_steps
    for step, (ids, counts) in enumerate(zip(streamer.drafts, streamer.counts, strict=True), start=1):
        for row in range(3):
            committed = int(((out.commit_steps[row] > 0) & (out.commit_steps[row] <= step)).sum())
            assert counts[row] == committed and ids[row][:committed] == out.sequences[row, :committed].tolist()
            drafts = [i for i in ids[row][committed:] if i != PAD]
            assert len(drafts) <= 3 and not (step >= int(out.nfe[row]) and drafts)
    # Some of what was shown as a draft came to be the text.
    assert out.accepted_drafts.sum() > 0 and any(
        len(ids[0]) > counts[0] for ids, counts in zip(streamer.drafts, streamer.counts, strict=True)
    )


def test_tokens_per_evaluation_and_who_said_them(drafter):
    out = generate(drafter, seconds=(1.0, 0.6, 0.35))
    kept = out.commit_steps > 0
    torch.testing.assert_close(out.tokens_per_evaluation, kept.sum(dim=1) / out.nfe)
    # No hypothesis here; each token is the donor's own or an accepted draft of the masks.
    assert out.token_branches.unique().tolist() == [0, 1]
    assert (out.token_branches == 1).sum(dim=1).tolist() == out.accepted_drafts[:, 0].tolist()
    for row, struck in enumerate(out.struck_drafts):
        assert sum(len(ids) for _, _, ids in struck) == int(out.rejected_drafts[row, 0])
        for place, branch, ids in struck:
            wrong = ids[0] != out.sequences[row, place]
            assert branch == 0 and wrong
    alone = generate(drafter, seconds=(1.0, 0.6, 0.35), draft_branches=[])
    assert torch.equal(alone.sequences, out.sequences) and alone.nfe.tolist() == kept.sum(dim=1).tolist()
    torch.testing.assert_close(alone.confidence, out.confidence)


# --- the canvas ---


def test_the_canvas_adapts_to_each_rows_duration(model):
    settings = MDMASRGenerationConfig(canvas_tokens_per_s=7.0, canvas_extra_tokens=10)
    # ceil(7 * 1.0) + 10, ceil(7 * 0.6 = 4.2) + 10, ceil(2.45) + 10
    assert model.canvas_lengths(torch.tensor([1.0, 0.6, 0.35]), 3, 1, settings) == [17, 15, 13]
    settings.canvas_length = 256
    assert model.canvas_lengths(None, 2, 1, settings) == [256, 256]
    settings.max_new_tokens = 100
    assert model.canvas_lengths(None, 2, 1, settings) == [100, 100]
    settings.max_length = 50  # prompt included
    assert model.canvas_lengths(None, 2, 4, settings) == [46, 46]

    settings = MDMASRGenerationConfig(canvas_tokens_per_s=7.0)
    with pytest.raises(ValueError, match="canvas of 437 tokens.*positions for 299.*Split the audio"):
        model.canvas_lengths(torch.tensor([61.0]), 1, 1, settings)
    with pytest.raises(ValueError, match="canvas of 400 tokens.*shorter `canvas_length`"):
        generate(model, canvas_length=400)


# --- batch and single ---


@each("encoder", sorted(ENCODERS))
@each("sampler", ["conf_top_k", "eb_conf", "pbeb_conf"])
def test_a_batch_and_its_utterances_give_the_same_tokens(encoder, sampler):
    model = tiny_model(encoder)
    seconds = (1.0, 0.6, 0.35)
    features, mask = tiny_inputs(encoder, seconds=seconds)
    batch = model.generate(features, attention_mask=mask, sampler=sampler, return_dict_in_generate=True)
    assert len(set(batch.sequences.flatten().tolist())) >= 3
    for row, length in enumerate(mask.sum(-1).tolist()):
        alone = model.generate(
            features[row : row + 1, :length],
            attention_mask=mask[row : row + 1, :length],
            sampler=sampler,
            return_dict_in_generate=True,
        )
        width = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == batch.sequences[row, :width].tolist()
        assert (batch.sequences[row, width:] == PAD).all()
        assert alone.nfe[0] == batch.nfe[row]
        torch.testing.assert_close(alone.confidence[0], batch.confidence[row, :width], atol=1e-4, rtol=1e-3)


@settings(max_examples=15)
@given(st.lists(st.floats(0.1, 2.0), min_size=1, max_size=4), st.integers(0, 2**31), st.integers(0, 40))
def test_whatever_the_padding(model, seconds, seed, extra):
    features, mask = tiny_inputs("whisper", seconds=tuple(seconds), seed=seed)
    padded = torch.nn.functional.pad(features, (0, 0, 0, extra), value=3.0)
    padded_mask = torch.nn.functional.pad(mask, (0, extra))
    generate = functools.partial(model.generate, max_denoising_steps=8)
    expected = generate(features, attention_mask=mask)
    assert torch.equal(generate(padded, attention_mask=padded_mask), expected)
    order = torch.arange(len(seconds)).flip(0)
    assert torch.equal(generate(features[order], attention_mask=mask[order]), expected[order])


@each("name", sorted(SAMPLERS))
def test_every_sampler_ends_within_the_limit(model, name):
    out = generate(model, sampler=name, max_denoising_steps=4, generator=torch.Generator().manual_seed(0))
    assert (out.nfe <= 4).all() and (out.nfe >= 1).all() and not (out.sequences == MASK).any()


@each("settings", [dict(temperature=1.0), dict(sampler="random"), dict(sampler="dfm", temperature=0.7)])
def test_sampling_is_seeded_and_a_row_samples_alike_in_every_batch(model, settings):
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))

    def sample(rows, seeds):
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        return model.generate(features[rows], attention_mask=mask[rows], generator=generators, **settings)

    both = sample([0, 1], [1, 2])
    assert torch.equal(both, sample([0, 1], [1, 2]))
    alone = sample([1], [2])
    assert alone[0].tolist() == both[1, : alone.shape[1]].tolist()
    assert not torch.equal(both, sample([0, 1], [3, 4]))
    one_seed = [
        model.generate(features, attention_mask=mask, generator=torch.Generator().manual_seed(7), **settings)
        for _ in "ab"
    ]
    assert torch.equal(*one_seed)
    with pytest.raises(ValueError, match="`generator` has 1 entries for a batch of 2"):
        sample([0, 1], [1])


# --- settings and their sources ---


def test_settings_of_the_file_and_of_the_call(model, tmp_path):
    features, mask = tiny_inputs()
    assert isinstance(model.generate(features, attention_mask=mask), torch.Tensor)
    model = tiny_model()
    model.generation_config.sampler = PBEBConfSampler(gamma=0.7, lambda_=0.4).to_dict()
    model.generation_config.max_denoising_steps = 3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert isinstance(loaded.generation_config, MDMASRGenerationConfig)
    assert loaded.generation_config.sampler_config == PBEBConfSampler(gamma=0.7, lambda_=0.4)
    out = loaded.generate(features, attention_mask=mask, return_dict_in_generate=True)
    assert out.num_steps <= 3
    assert torch.equal(out.sequences, model.generate(features, attention_mask=mask))

    before = model.generation_config.to_dict()
    model.generate(
        features, attention_mask=mask, gamma=1.0, lambda_=0.5, max_denoising_steps=2, canvas_length=9, language=None
    )
    assert model.generation_config.to_dict() == before
    settings, _ = model._settle_generation_config(None, dict(sampler="conf_top_k", k=3, max_denoising_steps=5), set())
    assert settings.sampler == ConfTopKSampler(k=3) and settings.max_denoising_steps == 5
    mine = MDMASRGenerationConfig(sampler="eb_conf", max_denoising_steps=7)
    settings, _ = model._settle_generation_config(mine, dict(gamma=0.4), set())
    assert settings.sampler == EBConfSampler(gamma=0.4) and settings.max_denoising_steps == 7
    assert mine.sampler.gamma == 0.05

    expected = model.generate(features, attention_mask=mask)
    stock = dict(labels=torch.tensor([[1]]), synced_gpus=False, max_new_tokens=256, num_beams=5, pad_token_id=PAD)
    assert torch.equal(model.generate(input_features=features, attention_mask=mask, **stock), expected)
    plain = GenerationConfig(max_length=200, num_beams=3)
    assert torch.equal(model.generate(features, attention_mask=mask, generation_config=plain), expected)
    assert torch.equal(model.generate(input_values=features, attention_mask=mask), expected)


@each(
    "arguments, message",
    [
        (dict(gama=0.1), "gama.*not arguments"),
        (dict(top_p=0.9), "top_p.*not arguments"),
        (dict(sampler="random", gamma=0.5), "gamma.*not settings of the sampler 'random'"),
        (dict(language="en"), "`language='en'` has no place.*fixed"),
        (dict(max_denoising_steps=0), "`max_denoising_steps`"),
        (dict(eos_token_id=7), "`eos_token_id=7` contradicts"),
        (dict(decoder_input_ids=torch.ones(2, 3, dtype=torch.long)), "`decoder_input_ids` of shape"),
        (dict(temperature=[0.0, 0.2]), "`temperature` must be one number"),
        *(
            (argument, f"'{next(iter(argument))}'.* for checkpoints with drafts, .* decodes with a canvas")
            for argument in (
                dict(draft_branches=["masks"]),
                dict(draft_length=2),
                dict(no_speech_threshold=0.5),
                dict(compression_ratio_threshold=1.3),
                dict(logprob_threshold=-1.0),
                dict(previous_ids=[5]),
                dict(prefix_ids=[[5]] * 3),
                dict(draft_ids=[[5]] * 3),
                dict(hotword_ids=[[5, 6]]),
            )
        ),
    ],
)
def test_what_a_canvas_cannot_use_raises(model, arguments, message):
    features, mask = tiny_inputs()
    with pytest.raises(ValueError, match=message):
        model.generate(features, attention_mask=mask, **arguments)


@each(
    "arguments, message",
    [
        (dict(max_denoising_steps=4), "'max_denoising_steps'.* for checkpoints with a canvas, .* decodes with drafts"),
        (dict(canvas_length=9, canvas_tokens_per_s=3.0), "'canvas_length', 'canvas_tokens_per_s'"),
        (dict(canvas_extra_tokens=9), "'canvas_extra_tokens'"),
        (dict(sampler="dfm"), "`sampler` .*dfm.* cannot be used by a checkpoint with drafts"),
        (dict(lambda_=0.2), "`sampler` .* `lambda_` None"),
        (dict(draft_length=4), "`draft_length` .4. must be at most the checkpoint's 3"),
        (dict(draft_branches=["beams"]), "`draft_branches`"),
        (dict(prefix_ids=[[5]]), "`prefix_ids` must be a list of 3 lists"),
        (dict(prefix_ids=[5, 6, 7]), "`prefix_ids` must be a list of 3 lists"),
        (dict(prefix_ids=[[5], [], [60]]), "`prefix_ids` must be token ids below 60"),
        (dict(prefix_ids=[[5] * 299, [], []]), "`prefix_ids` have 300 tokens, .* at most 300 fit. Shorten"),
        (dict(prefix_ids=[[5] * 4, [], []], max_new_tokens=4), "`prefix_ids` have 5 tokens, .* at most 5 fit"),
        (dict(draft_ids=[[5], [-100], []]), "`draft_ids` must be token ids below 60"),
        (dict(draft_ids=[[5], []]), "`draft_ids` must be a list of 3 lists"),
        (dict(previous_ids=[[5], [6]]), "`previous_ids` must be a list of 3 lists"),
        (dict(previous_ids=[5, 6]), "`previous_ids`: this model's prompt has no place"),
    ],
)
def test_what_drafts_cannot_use_raises(drafter, arguments, message):
    features, mask = tiny_inputs()
    with pytest.raises(ValueError, match=message) as error:
        drafter.generate(features, attention_mask=mask, **arguments)
    assert "\n" not in str(error.value)


def test_suppressed_tokens_are_never_predicted(model, drafter):
    features, mask = tiny_inputs()
    used = [i for i in model.generate(features, attention_mask=mask).unique().tolist() if i not in (EOS, PAD)]
    assert used
    out = model.generate(features, attention_mask=mask, suppress_tokens=used)
    assert not set(used) & set(out.unique().tolist())

    tokens = generate(drafter).sequences[0, :2]
    begin = generate(drafter, begin_suppress_tokens=tokens.tolist()).sequences
    assert not torch.isin(begin[:, 0], tokens).any()
    # Further on they may stand again.
    assert torch.isin(begin, tokens).any()
    assert not torch.isin(generate(drafter, suppress_tokens=tokens.tolist()).sequences, tokens).any()


def test_prompts_and_encoder_outputs_can_be_given(model):
    model = tiny_model()
    model.generation_config.prompt_template = {
        "tokens": [START, "language"],
        "slots": {"language": {"en": 10, "de": 11}},
        "defaults": {"language": "en"},
    }
    features, mask = tiny_inputs()
    english = model.generate(features, attention_mask=mask)
    german = model.generate(features, attention_mask=mask, language="de")
    assert torch.equal(english, model.generate(features, attention_mask=mask, language="en"))
    assert english.tolist() != german.tolist()
    mixed = model.generate(features, attention_mask=mask, language=["en", "de", "en"])
    assert mixed[1, : german.shape[1]].tolist()[:3] == german[1, : mixed.shape[1]].tolist()[:3]
    ids = torch.tensor([[START, 11]])
    assert torch.equal(model.generate(features, attention_mask=mask, decoder_input_ids=ids), german)
    with pytest.raises(ValueError, match="both set the prompt"):
        model.generate(features, attention_mask=mask, decoder_input_ids=ids, language="de")

    frames = model.encode(features, mask)
    expected = model.generate(features, attention_mask=mask)
    assert torch.equal(model.generate(encoder_outputs=frames, attention_mask=mask), expected)
    with pytest.raises(ValueError, match="canvas needs"):
        model.generate(encoder_outputs=frames)


# --- no speech, and input that is none ---


def test_silence_and_too_short_clips_give_an_empty_text_beside_speech(model):
    for encoder in sorted(ENCODERS):
        model = tiny_model(encoder)
        features, mask = tiny_inputs(encoder, seconds=(1.0, 0.6, 1.0, 0.03))
        features[2] = -1.5
        batch = model.generate(features, attention_mask=mask, return_dict_in_generate=True)
        assert batch.nfe.tolist()[2:] == [0, 0] and (batch.nfe[:2] > 0).all()
        assert batch.sequences[2:, 0].tolist() == [EOS, EOS]
        length = int(mask[1].sum())
        alone = model.generate(features[1:2, :length], attention_mask=mask[1:2, :length])
        assert alone[0].tolist() == batch.sequences[1, : alone.shape[1]].tolist()
        silent = model.generate(features[2:3], return_dict_in_generate=True)
        assert silent.sequences.tolist() == [[EOS]] and silent.nfe.tolist() == [0] and silent.num_steps == 0

    features, mask = tiny_inputs()
    mask[1] = 0
    out = model.generate(features, attention_mask=mask, return_dict_in_generate=True)
    assert out.sequences[1, 0] == EOS and out.nfe[1] == 0 and out.confidence.isfinite().all()


def test_features_that_are_missing_misshapen_or_not_finite_raise(model):
    for value in [float("nan"), float("inf")]:
        features, mask = tiny_inputs()
        features[0, 3, 3] = value
        with pytest.raises(ValueError, match="NaN or infinity"):
            model.generate(features, attention_mask=mask)

    with pytest.raises(ValueError, match="needs `input_features`"):
        model.generate()
    with pytest.raises(ValueError, match="T or N at least 1"):
        model.generate(torch.zeros(1, 0, 80))
    with pytest.raises(ValueError, match="`attention_mask` of shape"):
        model.generate(torch.randn(1, 100, 80), attention_mask=torch.ones(1, 90))
    with pytest.raises(ValueError, match="31.0 s of audio"):
        model.generate(torch.randn(1, 3100, 80))
