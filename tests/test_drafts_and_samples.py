"""What a caller can give beside the audio: earlier text, a beginning, a hypothesis; and several samples."""

import numpy as np
import pytest
import torch
from tables import each
from tiny_models import PAD, START, generate, tiny_drafts_model, tiny_inputs, tiny_model

from mdm_asr_hf.generation_mdm_asr import utterance_confidence

SECONDS = (1.0, 0.6, 0.35)


@pytest.fixture(scope="module")
def drafter():
    return tiny_drafts_model()


def rows_of(output):
    return [row[: row.index(PAD)] if PAD in row else row for row in output.sequences.tolist()]


# --- a beginning, a hypothesis ---


def test_a_text_goes_on_behind_its_prefix_and_a_hypothesis_is_verified(drafter):
    plain = rows_of(generate(drafter, SECONDS))
    prefixes = [plain[0][:5], [], [plain[2][0]]]
    out = generate(drafter, SECONDS, prefix_ids=prefixes)
    assert rows_of(out) == plain
    given = torch.tensor([5, 0, 1])[:, None] > torch.arange(out.sequences.shape[1])
    assert (out.confidence[given] == 1).all() and (out.commit_steps[given] == 0).all()
    assert (out.commit_steps[~given & (out.sequences != PAD)] > 0).all()
    # Of a beginning that the model would not have said, the rest is another.
    other = rows_of(generate(drafter, SECONDS, prefix_ids=[[40, 41], [], []]))
    assert other[0][:2] == [40, 41] and other[1:] == plain[1:]
    assert other[0] == [40, 41, *rows_of(generate_after(drafter, [40, 41]))[0]]

    plain = generate(drafter, SECONDS)
    texts = rows_of(plain)
    # The text itself with its end or without, one with a wrong and a missing token, and none at all.
    wrong = [*texts[1][:4], 55, *texts[1][6:]]
    out = generate(drafter, SECONDS, draft_ids=[texts[0], wrong, []], draft_branches=["hypothesis"])
    assert torch.equal(out.sequences, plain.sequences)
    assert out.nfe[0] < 10 < len(texts[0]) and out.accepted_drafts[0, 1] > 15
    assert out.rejected_drafts[0].tolist() == [0, 0] and out.rejected_drafts[1, 1] > 0
    assert set(out.token_branches.unique().tolist()) == {0, 2}
    tensor = torch.tensor([texts[0]])
    one = generate(drafter, SECONDS[:1], draft_ids=tensor, draft_branches=["hypothesis"])
    assert torch.equal(one.nfe, out.nfe[:1])


def generate_after(model, prefix):
    """The first clip, with the prefix in the prompt instead."""
    features, mask = tiny_inputs(seconds=SECONDS)
    length = int(mask[0].sum())
    prompt = torch.tensor([[START, *prefix]])
    return model.generate(features[:1, :length], decoder_input_ids=prompt, return_dict_in_generate=True)


# --- the text before ---


def test_previous_text_stands_before_the_prompt():
    model = tiny_drafts_model()
    model.generation_config.prompt_template = {"tokens": [START], "previous": 50}
    features, mask = tiny_inputs(seconds=SECONDS)

    def given(**kwargs):
        return model.generate(features, attention_mask=mask, max_new_tokens=20, **kwargs)

    prompt = torch.tensor([[50, 7, 8, 9, START]])
    expected = given(decoder_input_ids=prompt)
    assert not torch.equal(given(), expected)
    # One text for all rows, or each its own; without any the prompt is as ever.
    assert torch.equal(given(previous_ids=[7, 8, 9]), expected)
    mixed = given(previous_ids=[[7, 8, 9], [], [8]])
    assert torch.equal(mixed[0], expected[0]) and mixed[1].tolist() == given()[1].tolist()
    # Half of the 300 positions are for it: 149 tokens and the one before them.
    long = list(range(3, 53)) * 5
    assert torch.equal(given(previous_ids=long), given(decoder_input_ids=torch.tensor([[50, *long[-149:], START]])))


# --- several samples ---


def test_an_utterance_has_the_geometric_mean_of_its_tokens_confidences():
    confidence = np.array([[0.5, 0.25, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert utterance_confidence(confidence) == [pytest.approx(0.0625 ** (1 / 3)), None]


@each("make", [tiny_model, tiny_drafts_model])
def test_samples_differ_by_their_rows_generator(make):
    out = generate(make(), temperature=1.0, num_return_sequences=4, generator=torch.Generator(), max_new_tokens=20)
    assert out.sequences.shape[0] == out.nfe.shape[0] == 8
    assert out.struck_drafts is None or len(out.struck_drafts) == 8
    for start in (0, 4):
        scores = utterance_confidence(out.confidence[start : start + 4])
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(row) for row in out.sequences[start : start + 4].tolist()}) > 1

    model = make()
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))

    def sample(rows, seeds):
        n = int(mask[rows].sum(dim=-1).max())
        return model.generate(
            features[rows, :n],
            attention_mask=mask[rows, :n],
            temperature=1.0,
            num_return_sequences=3,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            return_dict_in_generate=True,
            max_new_tokens=20,
        )

    both, second = sample([0, 1], [1, 2]), sample([1], [2])
    width = second.sequences.shape[1]
    assert torch.equal(both.sequences[3:, :width], second.sequences)
    torch.testing.assert_close(both.confidence[3:, :width], second.confidence, atol=1e-4, rtol=1e-3)
    assert sample([1], [3]).sequences.tolist() != second.sequences.tolist()


def test_samples_take_the_hypothesis_of_their_row(drafter):
    out = generate(
        drafter,
        prefix_ids=[[5, 6], [7]],
        temperature=1.0,
        num_return_sequences=2,
        generator=torch.Generator().manual_seed(0),
    )
    assert out.sequences[:2, :2].tolist() == [[5, 6]] * 2 and out.sequences[2:, 0].tolist() == [7, 7]

    with pytest.raises(ValueError, match="`num_return_sequences=2` would return the same text.*random"):
        generate(tiny_model("whisper"), num_return_sequences=2)
    assert len(generate(tiny_model("whisper"), num_return_sequences=2, sampler="random").sequences) == 4
    with pytest.raises(ValueError, match="would return the same text each time. Set `temperature` above 0.$"):
        generate(drafter, num_return_sequences=2)
