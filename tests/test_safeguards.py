"""Whisper's safeguards: what they measure, and what is decoded anew because of them."""

import math
from types import SimpleNamespace

import pytest
import torch
from tables import each
from tiny_models import VOCAB_SIZE, tiny_drafts_model
from transformers.models.whisper.generation_whisper import WhisperGenerationMixin

from mdm_asr_hf import generation_mdm_asr
from mdm_asr_hf.encoder_mdm_asr import MDMASREncoderOutput
from mdm_asr_hf.safeguards_mdm_asr import (
    compression_ratio,
    is_loop,
    is_suspicious,
    loop_length,
    mean_log_prob,
    no_speech_probability,
    repeats_itself,
    repetitions,
)

EOS, PAD, NO_SPEECH = 1, 2, 59


# --- measures ---


def test_compression_is_measured_as_transformers_does_and_probabilities_by_hand():
    for ids in [[5], [5, 6, 7, 8], [300, 7, 51000] * 30, list(range(200))]:
        for vocab_size in [200, 51864, 70000]:
            if max(ids) >= vocab_size:
                ids = [i % vocab_size for i in ids]
            expected = WhisperGenerationMixin._retrieve_compression_ratio(torch.tensor(ids), vocab_size)
            assert compression_ratio(ids, vocab_size) == expected

    # Two bytes a token; zlib makes 12 bytes of 60 zeros' runs: a text that repeats itself is far above 1.35.
    assert compression_ratio([7, 8, 9] * 40, 51864) > 10 > 1.35 > compression_ratio([7, 80, 900, 12, 4000], 51864)
    assert compression_ratio([], 51864) == 0

    assert mean_log_prob([-1.0, -2.0, -0.5]) == pytest.approx(-3.5 / 3) and mean_log_prob([]) == 0
    logits = torch.tensor([[0.0, math.log(3), -torch.inf], [0.0, 0.0, 0.0]], dtype=torch.float16)
    assert no_speech_probability(logits.numpy(), 1) == pytest.approx([3 / 4, 1 / 3], abs=1e-3)


@each(
    "ids, phrases",
    [
        ([], []),
        ([5, 6, 7], []),
        ([5, 5], [(1, 2)]),
        ([9, 5, 6, 5, 6, 5, 6, 8], [(2, 3)]),
        # A part of a phrase does not count.
        ([1, 1, 1, 5, 6, 7, 8, 5, 6, 7, 8, 5, 6], [(1, 3), (4, 2)]),
        ([5, 6, 9, 5, 6], []),
    ],
)
def test_phrases_that_follow_themselves(ids, phrases):
    assert list(repetitions(ids)) == phrases


@each(
    "phrase, times, suspicious, loop",
    [
        ([5], 2, False, False),
        ([5], 3, True, False),
        ([5], 7, True, False),
        ([5], 8, True, True),
        ([5, 6], 3, True, False),
        ([5, 6], 4, True, True),
        ([5, 6, 7], 2, False, False),
        ([5, 6, 7, 8], 2, True, False),
        ([5, 6, 7, 8], 3, True, True),
    ],
)
def test_what_looks_like_a_loop_and_what_is_one(phrase, times, suspicious, loop):
    ids = [40, *phrase * times, 41]
    assert (is_suspicious(ids), is_loop(ids)) == (suspicious, loop)
    assert repeats_itself(ids, 51864, 1.35) == loop and not repeats_itself(ids, 51864, None)
    # A longer phrase that comes twice does not hide it, and it is told from its last token on.
    assert is_loop([*ids, *range(50, 90), *range(50, 90)]) == loop
    assert loop_length(ids) == (len(ids) - 1 if loop else len(ids))


# --- decoding anew, of a scripted donor ---


class Donor:
    """
    Says scripted texts. A row is known by its features; `texts[row]` are its attempts, each `(ids, probability)`: the
    ids and how sure the donor is of each, the same of the same silence and temperature. `attempts` notes what was
    decoded: rows, silence behind them, temperature.
    """

    def __init__(self, monkeypatch, texts, no_speech=(), **settings):
        self.texts, self.no_speech, self.attempts, self.said, self.ways = texts, no_speech, [], {}, {}
        self.model = tiny_drafts_model()
        settings = dict(compression_ratio_threshold=1.35, logprob_threshold=-1.0) | settings
        for name, value in settings.items():
            setattr(self.model.generation_config, name, value)
        monkeypatch.setattr(self.model, "encode", self.encode)
        monkeypatch.setattr(self.model, "forward", self.forward)
        donor = self

        class Decoder(generation_mdm_asr.VerifiedDecoder):
            def run(self, show=None):
                frames = self.steps.encoder_outputs.last_hidden_state[:, 0]
                rows = [int(row) for row in frames[:, 0]]
                (silence,) = set(frames[:, 1].tolist())
                donor.attempts.append((rows, silence, self.temperature))
                for row in rows:
                    ways = donor.ways.setdefault(row, [])
                    if (way := (silence, self.temperature)) not in ways:
                        ways.append(way)
                    donor.said[row] = ways.index(way)
                super().run(show)

        monkeypatch.setattr(generation_mdm_asr, "VerifiedDecoder", Decoder)

    def encode(self, features, mask=None, trailing_silence_s=0.0):
        frames = torch.zeros(len(features), 2, 16, dtype=torch.float64)
        frames[:, :, 0] = features[:, :1, 0]
        frames[:, :, 1] = trailing_silence_s
        return MDMASREncoderOutput(last_hidden_state=frames)

    def forward(self, decoder_input_ids, encoder_outputs, position_ids, logits_to_keep, **kwargs):
        positions = position_ids.gather(1, logits_to_keep)
        logits = torch.zeros((*positions.shape, VOCAB_SIZE))
        for i, row in enumerate(encoder_outputs.last_hidden_state[:, 0, 0].long().tolist()):
            attempts = self.texts[row]
            ids, probability = attempts[min(self.said[row], len(attempts) - 1)]
            for column, position in enumerate(positions[i].tolist()):
                token = [*ids, EOS][position] if position <= len(ids) else EOS
                logits[i, column] = math.log((1 - probability) / (VOCAB_SIZE - 1))
                logits[i, column, token] = math.log(probability)
                if position == 0 and row in self.no_speech:
                    logits[i, column, NO_SPEECH] = -torch.inf
                    logits[i, column] += math.log(1 - self.no_speech[row]) - logits[i, column].logsumexp(dim=-1)
                    logits[i, column, NO_SPEECH] = math.log(self.no_speech[row])
        return SimpleNamespace(logits=logits, draft_hidden_states=None)

    def generate(self, rows, **kwargs):
        features = torch.zeros(len(rows), 50, 80)
        features[:, 0, 0] = torch.tensor(rows, dtype=torch.float)
        features[:, 1:] = torch.arange(49.0)[:, None]
        self.said, self.attempts, self.ways = {}, [], {}
        return self.model.generate(
            features, torch.ones(len(rows), 50), draft_branches=[], return_dict_in_generate=True, **kwargs
        )


def text_of(output, row):
    return [i for i in output.sequences[row].tolist() if i != PAD]


SOUND, LOOP = [10, 30, 20, 50, 40], [5, 6, 7] * 20
# Nothing is drawn at these but the most probable token.
TEMPERATURES = [0.0, 1e-3, 2e-3, 3e-3]
TEXTS = {
    # Accepted at once.
    3: [(SOUND, 0.9)],
    # Repeats itself, and does not with 30 s.
    4: [(LOOP, 0.9), (SOUND[:3], 0.9)],
    # Improbable both times; e^-1 is 0.368.
    5: [(SOUND, 0.3), (SOUND, 0.36), (SOUND[:2], 0.9)],
    # Repeats itself up to the second temperature.
    6: [(LOOP, 0.9), (LOOP, 0.9), (LOOP, 0.9), (SOUND[:4], 0.9)],
    # Says twice what may be said twice, also with 30 s.
    7: [([10, 11, 12, 13] * 2, 0.9), ([10, 11, 12, 13] * 2, 0.8)],
}


def test_what_is_refused_is_decoded_anew(monkeypatch):
    donor = Donor(monkeypatch, TEXTS, temperature=TEMPERATURES)
    output = donor.generate([3, 4, 5, 6, 7])
    # Once with 30 s of audio and silence, then, what repeats itself, at rising temperatures.
    assert donor.attempts == [
        ([3, 4, 5, 6, 7], 0.0, 0.0),
        ([4, 5, 6, 7], 30.0, 0.0),
        ([6], 30.0, 1e-3),
        ([6], 30.0, 2e-3),
    ]
    said = [SOUND, SOUND[:3], SOUND, SOUND[:4], [10, 11, 12, 13] * 2]
    assert [text_of(output, row) for row in range(5)] == [[*ids, EOS] for ids in said]
    # All attempts count.
    # A loop is told from its twelfth token on, and looked for after every eight evaluations.
    assert output.nfe.tolist() == [6, 16 + 4, 6 + 6, 3 * 16 + 5, 9 + 9] and output.no_speech is None
    confidences = [0.9, 0.9, 0.36, 0.9, 0.8]
    torch.testing.assert_close(output.confidence[:, 0], torch.tensor(confidences))
    # Each row has its own attempts.
    for place, row in enumerate((3, 4, 5, 6, 7)):
        alone = donor.generate([row])
        assert text_of(alone, 0) == text_of(output, place) and alone.nfe[0] == output.nfe[place]


def test_without_thresholds_or_temperatures_the_first_text_stays(monkeypatch):
    donor = Donor(monkeypatch, TEXTS, temperature=TEMPERATURES)
    off = donor.generate([4, 5, 7], compression_ratio_threshold=None, logprob_threshold=None)
    assert len(donor.attempts) == 1 and text_of(off, 0) == [*LOOP, EOS]
    donor.generate([4, 5, 7], logprob_threshold=None)
    assert [rows for rows, *_ in donor.attempts] == [[4, 5, 7], [4, 7]]
    donor.generate([4, 5, 7], compression_ratio_threshold=None)
    assert [rows for rows, *_ in donor.attempts] == [[4, 5, 7], [5]]
    # One temperature: 30 s are tried, no more. What goes in a circle there, too, is written to its end.
    output = donor.generate([4, 6], temperature=0.0)
    assert donor.attempts == [([4, 6], 0.0, 0.0), ([4, 6], 30.0, 0.0), ([6], 30.0, 0.0)]
    assert text_of(output, 1) == [*LOOP, EOS] and output.nfe[1] == 16 + 16 + 61
    # Where nothing is tried again, at once.
    frames = donor.encode(torch.tensor([4.0])[:, None, None].expand(1, 1, 80))
    donor.said, donor.attempts, donor.ways = {}, [], {}
    output = donor.model.generate(
        encoder_outputs=frames, attention_mask=torch.ones(1, 1), draft_branches=[], temperature=0.0
    )
    assert output.tolist() == [[*LOOP, EOS]] and len(donor.attempts) == 1


def test_frames_of_the_caller_are_not_encoded_anew(monkeypatch):
    texts = {4: [(LOOP, 0.9), (SOUND[:3], 0.9)], 5: [(SOUND, 0.3)], 6: TEXTS[6]}
    donor = Donor(monkeypatch, texts, temperature=TEMPERATURES)
    features = torch.tensor([4.0, 5.0, 6.0])[:, None, None].expand(3, 1, 80)
    output = donor.model.generate(
        encoder_outputs=donor.encode(features), attention_mask=torch.ones(3, 1), draft_branches=[]
    )
    # What is only improbable would be no better.
    assert donor.attempts == [
        ([4, 5, 6], 0.0, 0.0),
        ([4, 6], 0.0, 1e-3),
        ([6], 0.0, 2e-3),
        ([6], 0.0, 3e-3),
    ]
    assert output[0, :4].tolist() == [*SOUND[:3], EOS] and output[2, :5].tolist() == [*SOUND[:4], EOS]


OTHER_LOOP = [8, 9] * 20


@each("given", [{}, dict(compression_ratio_threshold=1.35)])
@each(
    "texts, stays",
    [
        # The first that does not repeat itself, however improbable.
        ([(LOOP, 0.9), (LOOP, 0.95), (SOUND, 0.2), (SOUND, 0.9)], (SOUND, 0.2)),
        # Of those that do, the most probable.
        ([(LOOP, 0.9), (OTHER_LOOP, 0.95), (LOOP, 0.92), (LOOP, 0.8), (LOOP, 0.7)], (OTHER_LOOP, 0.95)),
        ([(LOOP, 0.9), (LOOP, 0.8), (OTHER_LOOP, 0.8), (LOOP, 0.7), (LOOP, 0.7)], (LOOP, 0.9)),
    ],
)
def test_of_refused_texts_the_best_stays(monkeypatch, given, texts, stays):
    donor = Donor(monkeypatch, {6: texts}, temperature=TEMPERATURES)
    if given:
        # The threshold of the call holds, not that of the checkpoint.
        donor.model.generation_config.compression_ratio_threshold = None
    output = donor.generate([6], **given)
    ids, probability = stays
    assert text_of(output, 0) == [*ids, EOS]
    torch.testing.assert_close(output.confidence[0, : len(ids)], torch.full((len(ids),), probability))
    # Loops are left where they are seen to be some; one that stays after all is written once more, to its end.
    taken = [16 if one == LOOP else 8 if one == OTHER_LOOP else len(one) + 1 for one, _ in texts]
    again = len(ids) + 1 if ids in (LOOP, OTHER_LOOP) else 0
    assert output.nfe[0] == sum(taken[: len(donor.attempts) - (again > 0)]) + again


def test_silence_has_no_text_and_is_not_written(monkeypatch):
    texts = {row: [(SOUND, probability)] for row, probability in ((3, 0.3), (4, 0.9), (5, 0.3))}
    donor = Donor(
        monkeypatch,
        texts,
        no_speech={3: 0.7, 4: 0.7, 5: 0.5},
        no_speech_threshold=0.6,
        no_speech_token_id=NO_SPEECH,
        suppress_tokens=[NO_SPEECH],
        temperature=0.0,
    )
    output = donor.generate([3, 4, 5])
    # Nobody speaks in two; the text of the third is improbable, and tried again.
    assert [rows for rows, *_ in donor.attempts] == [[3, 4, 5], [5]]
    assert [text_of(output, row) for row in range(3)] == [[EOS], [EOS], [*SOUND, EOS]]
    torch.testing.assert_close(output.no_speech, torch.tensor([0.7, 0.7, 0.5]))
    # One evaluation, in which the donor says so.
    assert output.nfe.tolist() == [1, 1, 12] and output.confidence[:2].tolist() == [[0] * 6] * 2
    # The probability is of what follows the start; what is suppressed has no say in that of the text.
    torch.testing.assert_close(output.confidence[2, :6], torch.full((6,), 0.3 / (1 - 0.7 / 59)))
    # Without the threshold nothing is silence, but how likely it is, is told.
    spoken = donor.generate([4], no_speech_threshold=None)
    assert text_of(spoken, 0) == [*SOUND, EOS] and spoken.no_speech[0] == pytest.approx(0.7)
