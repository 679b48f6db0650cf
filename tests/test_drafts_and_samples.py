import pytest
import torch
from test_generation import EOS, MASK, PAD, ScriptedModel, generate
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf.canvas_mdm_asr import OPEN_ID, read_draft
from mdm_asr_hf.confidence_mdm_asr import utterance_confidence

# --- drafts ---


def test_a_draft_stays_and_the_rest_is_filled_in(monkeypatch):
    model = tiny_model("whisper")
    script = ScriptedModel(model, monkeypatch, [[5, 6, 7], [8, 9]])
    out = generate(model, canvas_length=8, gamma=0.0, draft_ids=[[10], [OPEN_ID, 11, OPEN_ID]])
    assert script.calls[0][1][:, :3].tolist() == [[10, MASK, MASK], [MASK, 11, MASK]]
    assert out.sequences.tolist() == [[10, 6, 7, EOS], [8, 11, EOS, PAD]]
    # One step for each token that was not given.
    assert out.nfe.tolist() == [3, 2]
    assert out.commit_steps.tolist() == [[0, 1, 2, 3], [1, 0, 2, 0]]
    assert out.confidence[0, 0] == 1.0 and out.confidence[1, 1] == 1.0


def test_a_whole_draft_costs_no_decoder_evaluation(monkeypatch):
    model = tiny_model("whisper")
    script = ScriptedModel(model, monkeypatch, [[5]])
    out = generate(model, seconds=(1.0,), canvas_length=8, draft_ids=torch.tensor([[10, 11, EOS]]))
    assert out.sequences.tolist() == [[10, 11, EOS]] and out.nfe.tolist() == [0] and not script.calls


def test_a_canvas_grows_with_its_draft(monkeypatch):
    model = tiny_model("whisper")
    ScriptedModel(model, monkeypatch, [[5] * 3, [5] * 3])
    out = generate(model, canvas_length=3, gamma=0.0, draft_ids=[[10, 11, 12, 13], [10]])
    assert out.sequences.tolist() == [[10, 11, 12, 13, EOS], [10, 5, 5, PAD, PAD]]


def test_a_draft_in_a_batch_is_a_draft_alone():
    model = tiny_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))
    draft = [[5, 6], [7]]
    batch = model.generate(features, attention_mask=mask, draft_ids=draft)
    for i in range(2):
        n = int(mask[i].sum())
        alone = model.generate(features[i : i + 1, :n], attention_mask=mask[i : i + 1, :n], draft_ids=draft[i : i + 1])
        assert alone[0].tolist() == batch[i, : alone.shape[1]].tolist()


@pytest.mark.parametrize(
    ("draft", "message"),
    [
        ([[5]], r"`draft_ids` of shape \(1, 1\) must be \(2, K\)"),
        ([[5], [10**6]], "`draft_ids` must be token ids below"),
        ([[-1], [5]], "`draft_ids` must be token ids below"),
        ([[5] * 500, [5]], "`draft_ids` need a canvas of 501 tokens"),
    ],
)
def test_bad_drafts_are_named(draft, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model("whisper"), draft_ids=draft)


def test_drafts_of_any_width_are_read():
    assert read_draft([[], [3, 4]], 2, 10).tolist() == [[OPEN_ID, OPEN_ID], [3, 4]]
    assert read_draft([[], []], 2, 10).shape == (2, 0)
    assert (
        generate(tiny_model("whisper"), draft_ids=[[], []]).sequences.tolist()
        == generate(tiny_model("whisper")).sequences.tolist()
    )


# --- several samples ---


def rows_of(output, start, stop):
    return [
        (ids, [round(c, 5) for c in confidence])
        for ids, confidence in zip(
            output.sequences[start:stop].tolist(), output.confidence[start:stop].tolist(), strict=True
        )
    ]


def test_samples_come_best_first_and_differ():
    out = generate(tiny_model("whisper"), temperature=1.0, num_return_sequences=4, generator=torch.Generator())
    assert out.sequences.shape[0] == out.nfe.shape[0] == 8
    for start in (0, 4):
        scores = utterance_confidence(out.confidence[start : start + 4])
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(row) for row in out.sequences[start : start + 4].tolist()}) > 1


def test_a_rows_samples_depend_on_its_own_generator_alone():
    model = tiny_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))

    def sample(rows, seeds, **kwargs):
        n = int(mask[rows].sum(dim=-1).max())
        return model.generate(
            features[rows, :n],
            attention_mask=mask[rows, :n],
            temperature=1.0,
            num_return_sequences=3,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            return_dict_in_generate=True,
            **kwargs,
        )

    both, second = sample([0, 1], [1, 2]), sample([1], [2])
    width = second.sequences.shape[1]
    for k in range(3):
        assert both.sequences[3 + k, :width].tolist() == second.sequences[k].tolist()
    other = sample([1], [3])
    assert rows_of(other, 0, 3) != rows_of(second, 0, 3)


def test_equal_samples_are_refused():
    with pytest.raises(ValueError, match="`num_return_sequences=2` would return the same text"):
        generate(tiny_model("whisper"), num_return_sequences=2)
    assert len(generate(tiny_model("whisper"), num_return_sequences=2, sampler="random").sequences) == 4
