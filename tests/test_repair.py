import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import EOS, MASK, ScriptedModel, generate
from tiny_models import tiny_inputs, tiny_model

from mdm_asr_hf.canvas_mdm_asr import Canvas
from mdm_asr_hf.repair_mdm_asr import doubled_tokens, doubtful_neighbours, repair


def make_canvas(rows, confidences, nfe=3, lengths=None):
    """Rows of committed tokens; what a row's own canvas lacks is outside."""
    lengths = lengths or [len(row) for row in rows]
    canvas = Canvas.lay(lengths, torch.device("cpu"), mask_token_id=MASK, eos_token_id=EOS)
    for i, (row, confidence) in enumerate(zip(rows, confidences, strict=True)):
        canvas.tokens[i, : len(row)] = torch.tensor(row)
        canvas.confidence[i, : len(row)] = torch.tensor(confidence)
        canvas.commit_steps[i, : len(row)] = 1
    canvas.nfe += nfe
    return canvas


def test_the_less_confident_of_two_equal_neighbours_is_taken_out_and_its_neighbours_refined():
    # 5 6 6 7 EOS: the first 6 is the less sure one; around the gap stand 5 and the other 6.
    canvas = make_canvas([[5, 6, 6, 7, EOS, EOS]], [[0.9, 0.4, 0.6, 0.8, 0.9, 0.9]])
    assert doubled_tokens(canvas, 0.7).tolist() == [[False, True, False, False, False, False]]
    assert repair(canvas, 0.7, 0.0, max_denoising_steps=8)
    assert canvas.tokens.tolist() == [[MASK, MASK, 7, EOS, EOS, MASK]]
    torch.testing.assert_close(canvas.confidence, torch.tensor([[0.0, 0.0, 0.8, 0.9, 0.9, 0.0]]))
    assert canvas.commit_steps.tolist() == [[0, 0, 1, 1, 1, 0]]
    # What lies behind the end of text is not open.
    assert canvas.open_positions().tolist() == [[True, True, False, False, False, False]]


def test_of_three_equal_tokens_the_surest_stays():
    canvas = make_canvas([[5, 6, 6, 6, 7, EOS]], [[0.9, 0.5, 0.6, 0.4, 0.8, 0.9]])
    assert doubled_tokens(canvas, 0.7).tolist() == [[False, True, False, True, False, False]]
    repair(canvas, 0.7, 0.0, max_denoising_steps=8)
    assert canvas.tokens[0, 2:4].tolist() == [MASK, EOS] and canvas.tokens[0, :2].tolist() == [MASK, MASK]


def test_what_is_said_twice_stays():
    # "very very", both sure; and equal ends of text are no pair.
    canvas = make_canvas([[5, 5, EOS, EOS]], [[0.9, 0.8, 0.3, 0.2]])
    assert not doubled_tokens(canvas, 0.7).any()
    assert not repair(canvas, 0.7, 0.0, max_denoising_steps=8)
    assert canvas.tokens.tolist() == [[5, 5, EOS, EOS]]


def test_a_row_without_steps_left_only_loses_its_double():
    canvas = make_canvas([[5, 6, 6, 7]], [[0.9, 0.6, 0.4, 0.8]], nfe=8)
    assert not repair(canvas, 0.7, 0.5, max_denoising_steps=8)
    # The canvas was full: its new place must not ask for a step that is not there.
    assert canvas.tokens.tolist() == [[5, 6, 7, EOS]]
    torch.testing.assert_close(canvas.confidence, torch.tensor([[0.9, 0.6, 0.8, 0.0]]))


def test_a_full_row_gets_the_room_for_what_it_left_out():
    canvas = make_canvas([[5, 6, 6, 7]], [[0.9, 0.6, 0.4, 0.8]], nfe=2)
    assert repair(canvas, 0.7, 0.0, max_denoising_steps=8)
    assert canvas.tokens.tolist() == [[5, MASK, MASK, MASK]]


def test_doubtful_neighbours_are_masked_and_single_doubtful_tokens_are_not():
    canvas = make_canvas([[5, 6, 7, 8, 9, EOS]], [[0.2, 0.9, 0.4, 0.4, 0.9, 0.1]])
    assert doubtful_neighbours(canvas, 0.5).tolist() == [[False, False, True, True, False, False]]
    assert repair(canvas, 0.0, 0.5, max_denoising_steps=8)
    assert canvas.tokens.tolist() == [[5, 6, MASK, MASK, 9, EOS]]


def test_drafted_tokens_stay():
    canvas = make_canvas([[6, 6, 6, EOS]], [[1.0, 1.0, 0.2, 0.9]])
    canvas.commit_steps[0, :2] = 0
    assert doubled_tokens(canvas, 1.1).tolist() == [[False, False, True, False]]
    repair(canvas, 1.1, 1.1, max_denoising_steps=8)
    assert canvas.tokens[0, :2].tolist() == [6, 6]


tokens = st.lists(st.sampled_from([5, 6, EOS]), min_size=1, max_size=8)


@given(data=st.data(), rows=st.lists(tokens, min_size=1, max_size=3), nfe=st.sampled_from([1, 8]))
@settings(max_examples=100, deadline=None)
def test_repair_shortens_texts_by_what_it_takes_out_and_rows_do_not_mix(data, rows, nfe):
    confidences = [data.draw(st.lists(st.floats(0.05, 1), min_size=len(r), max_size=len(r))) for r in rows]
    canvas = make_canvas(rows, confidences, nfe=nfe)
    lengths = canvas.text_positions().sum(dim=-1)
    num_doubled = doubled_tokens(canvas, 0.7).sum(dim=-1)
    repair(canvas, 0.7, 0.3, max_denoising_steps=8)
    for i, (row, confidence) in enumerate(zip(rows, confidences, strict=True)):
        alone = make_canvas([row], [confidence], nfe=nfe)
        repair(alone, 0.7, 0.3, max_denoising_steps=8)
        assert alone.tokens[0].tolist() == canvas.tokens[i, : len(row)].tolist()
        assert (canvas.tokens[i, len(row) :] == EOS).all()
        if nfe == 8:
            expected = lengths[i] - num_doubled[i]
            text = canvas.text_positions()[i].sum()
            # A row that was full gets an end of text where it had none.
            assert text == expected + (EOS not in row and num_doubled[i] > 0)
            assert not canvas.open_positions()[i].any()


def test_generate_repairs_within_its_steps(monkeypatch):
    model = tiny_model("whisper")
    script = ScriptedModel(model, monkeypatch, [[5, 6, 6, 7]], confidence=3.0)
    # Four tokens and the end in one step, all unsure; the step after the repair is the last one.
    out = generate(model, seconds=(1.0,), canvas_length=8, gamma=float("inf"), repair_rounds=1, max_denoising_steps=2)
    assert out.nfe.tolist() == [2] and out.num_steps == 2
    assert len(script.calls) == 2
    # Of equally confident ones the right one goes. 6 is kept before the gap, 7 behind it, and both are read again.
    assert script.calls[1][1][0, :5].tolist() == [5, MASK, MASK, EOS, EOS]
    assert out.commit_steps[0].tolist() == [1, 2, 2, 1]
    plain = generate(model, seconds=(1.0,), canvas_length=8, gamma=float("inf"), repair_rounds=0)
    assert plain.sequences.tolist() == [[5, 6, 6, 7, EOS]] and plain.nfe.tolist() == [1]
    bounded = generate(
        model, seconds=(1.0,), canvas_length=8, gamma=float("inf"), repair_rounds=3, max_denoising_steps=1
    )
    assert bounded.sequences.tolist() == [[5, 6, 7, EOS]] and bounded.nfe.tolist() == [1]


def test_a_batch_is_repaired_as_its_rows_are():
    model = tiny_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=(1.0, 0.6))
    given_settings = {"gamma": 2.0, "repair_rounds": 2, "repair_doubled_below": 1.1, "repair_doubtful_below": 0.5}
    batch = model.generate(features, attention_mask=mask, return_dict_in_generate=True, **given_settings)
    for i in range(2):
        n = int(mask[i].sum())
        alone = model.generate(
            features[i : i + 1, :n], attention_mask=mask[i : i + 1, :n], return_dict_in_generate=True, **given_settings
        )
        width = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == batch.sequences[i, :width].tolist()
        assert alone.nfe[0] == batch.nfe[i]


@pytest.mark.parametrize("name", ["repair_doubled_below", "repair_doubtful_below", "repair_rounds"])
def test_settings_are_checked(name):
    with pytest.raises(ValueError, match=name):
        tiny_model("whisper").generate(*tiny_inputs("whisper"), **{name: -1})
