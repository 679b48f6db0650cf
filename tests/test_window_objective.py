"""The objective of the active window: what it shows, what it scores, and that models and trainer take it."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import VOCAB_SIZE, tiny_model

from mdm_asr_hf import MDMASRTrainingArguments, WindowObjective
from mdm_asr_hf.window_objective_mdm_asr import window_objective

EOS, MASK, WRONG = 1, 99, 2
TARGETS = torch.tensor(
    [[5, 6, 7, 8, 9, 10, 11, EOS, EOS, EOS, EOS], [12, 13, EOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS, EOS]]
)
LENGTHS = torch.tensor([7, 2])


class Decoder:
    """Predicts one token for every position, and remembers what it was shown and asked."""

    def __init__(self, prediction=WRONG, vocab_size=16):
        self.logits = torch.zeros(vocab_size)
        self.logits[prediction] = 3.0
        self.logits.requires_grad_()
        self.calls = []

    def __call__(self, canvas, visible, wanted):
        self.calls.append((canvas, visible, wanted))
        return self.logits.expand(int(wanted.sum()), -1)


def run(objective, seed=0, targets=TARGETS, lengths=LENGTHS, prediction=WRONG):
    decoder = Decoder(prediction)
    generator = torch.Generator().manual_seed(seed)
    return decoder, window_objective(decoder, targets, lengths, objective, mask_token_id=MASK, generator=generator)


def starts_of(wanted):
    return wanted.int().argmax(dim=-1)


@pytest.mark.parametrize("seed", range(5))
def test_a_window_shows_the_text_up_to_it_and_nothing_behind_it(seed):
    objective = WindowObjective(ahead=3, num_draws=2, num_steps=1, uniform_share=0.0)
    decoder, _ = run(objective, seed)
    assert len(decoder.calls) == 2
    for number, (canvas, visible, wanted) in enumerate(decoder.calls):
        starts = starts_of(wanted)
        # The d-th draw begins in the d-th part of the text and its EOS: of 8 positions, of 3.
        for start, n in zip(starts.tolist(), (8, 3), strict=True):
            assert number / 2 * n - 1 < start < (number + 1) / 2 * n
        assert canvas.shape[1] == int(starts.max()) + 3
        positions = torch.arange(canvas.shape[1])
        assert torch.equal(visible, positions < starts[:, None] + 3)
        assert (wanted[range(2), starts]).all() and not (wanted & ~visible).any()
        shown = visible & ~wanted
        assert torch.equal(canvas[shown], TARGETS[:, : canvas.shape[1]][shown])
        assert (canvas[~shown] == MASK).all()


def test_the_loss_is_the_mean_of_masked_positions_and_little_of_it_behind_the_end():
    # One draw of one row whose text is empty: position 0 is its EOS, the two behind it weigh a quarter.
    objective = WindowObjective(ahead=3, num_draws=1, num_steps=1, uniform_share=0.0, revealed_share=0.0)
    targets, lengths = torch.tensor([[EOS, EOS, EOS]]), torch.tensor([0])
    _, out = run(objective, targets=targets, lengths=lengths, prediction=EOS)
    # By hand, of 16 logits of which one is 3: log(1 + 15 e^-3) where that one is right.
    right = math.log(1 + 15 * math.exp(-3))
    assert out.loss.item() == pytest.approx(right) and out.step_accuracies.tolist() == [1.0]

    # A text of one token, predicted wrongly (3 more), and its EOS, right.
    targets, lengths = torch.tensor([[5, EOS, EOS]]), torch.tensor([1])
    seen = {}
    for seed in range(20):
        decoder, out = run(objective, seed, targets, lengths, prediction=EOS)
        seen[int(starts_of(decoder.calls[0][2]))] = (out.loss.item(), out.step_accuracies.item())
    assert seen[0] == pytest.approx((right + 3 / 2.25, 2 / 3)) and seen[1] == pytest.approx((right, 1.0))


@pytest.mark.parametrize("seed", range(8))
def test_a_later_step_shows_the_predictions_of_the_one_before(seed):
    objective = WindowObjective(ahead=4, num_draws=1, num_steps=2, uniform_share=0.0, reach=2, correction_weight=0.0)
    decoder, out = run(objective, seed)
    (first, _, wanted_first), (second, visible, wanted) = decoder.calls
    before, after = starts_of(wanted_first), starts_of(wanted)
    for row, (start, moved, last) in enumerate(zip(before.tolist(), after.tolist(), LENGTHS.tolist(), strict=True)):
        # 1 or 2 further, but not over the EOS.
        assert min(start + 1, last) <= moved <= min(start + 2, last)
        width = second.shape[1]
        for i in range(min(moved + 4, width)):
            if wanted[row, i]:
                continue
            # What the first step masked has its wrong prediction now, what it showed is carried over.
            was_masked = i < first.shape[1] and wanted_first[row, i]
            assert second[row, i] == (WRONG if was_masked else TARGETS[row, i])
            # Nothing is shown that the first step could not know.
            assert i < start + 4
    assert torch.equal(visible, torch.arange(second.shape[1]) < after[:, None] + 4)
    assert out.step_losses.shape == out.step_accuracies.shape == (2,)
    torch.testing.assert_close(out.loss, out.step_losses.sum())


def test_what_shows_a_prediction_is_scored_too():
    # A text of three tokens, of which the model predicts the second everywhere.
    targets, lengths = torch.tensor([[5, 6, 7, EOS]]), torch.tensor([3])
    right = math.log(1 + 15 * math.exp(-3))
    seen = set()
    for seed in range(30):
        objective = WindowObjective(
            ahead=2, num_draws=1, num_steps=2, uniform_share=0.0, reach=1, revealed_share=0.0, correction_weight=0.5
        )
        decoder, out = run(objective, seed, targets, lengths, prediction=6)
        start = int(starts_of(decoder.calls[0][2])[0])
        canvas, visible, wanted = decoder.calls[1]
        if start == 3:
            # The EOS remains masked: there is nothing behind it to move to.
            assert not (wanted & (canvas != MASK)).any()
            continue
        seen.add(start)
        assert canvas[0, start] == 6 and wanted[0, start] and wanted[0].sum() == visible[0].sum() - start
        # By hand: the one prediction at half its weight, then the masked ones; 3 more where they are not 6.
        tokens = [5, 6, 7, EOS][start : start + 3]
        weights = [0.5, 1.0, 1.0][: len(tokens)]
        losses = [right + 3 * (token != 6) for token in tokens]
        expected = sum(w * one for w, one in zip(weights, losses, strict=True)) / sum(weights)
        assert out.step_losses[1].item() == pytest.approx(expected, rel=1e-5)
        assert out.step_accuracies[1].item() == pytest.approx(tokens[1:].count(6) / len(tokens[1:]))
    assert seen == {0, 1, 2}


def test_uniform_draws_show_the_whole_text_and_mask_any_of_it():
    objective = WindowObjective(ahead=3, num_draws=40, num_steps=2, uniform_share=1.0, correction_weight=0.0)
    decoder, _ = run(objective)
    firsts, seconds = decoder.calls[::2], decoder.calls[1::2]
    assert any(wanted[0, 0] and not wanted[0, 3] for _, _, wanted in firsts)
    for canvas, visible, wanted in firsts:
        # The text, its EOS and up to two positions more.
        assert all(n + 1 <= seen <= n + 3 for n, seen in zip([7, 2], visible.sum(dim=-1).tolist(), strict=True))
        assert torch.equal(canvas[visible & ~wanted], TARGETS[:, : canvas.shape[1]][visible & ~wanted])
    assert any((canvas[visible & ~wanted] == WRONG).any() for canvas, visible, wanted in seconds)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    ahead=st.integers(1, 12),
    uniform=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_text_gives_a_finite_loss(lengths, spare, ahead, uniform, seed):
    width = max(max(lengths) + spare, 1)
    targets = torch.full((len(lengths), width), EOS)
    for row, n in zip(targets, lengths, strict=True):
        row[:n] = torch.arange(3, 3 + n)
    objective = WindowObjective(ahead=ahead, uniform_share=uniform)
    decoder, out = run(objective, seed, targets, torch.tensor(lengths))
    assert torch.isfinite(out.loss) and out.loss.requires_grad
    assert all(canvas.shape[1] <= width for canvas, _, _ in decoder.calls)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ahead": 0}, "`ahead` must be an integer of at least 1, got 0"),
        ({"num_draws": 1.5}, "`num_draws`"),
        ({"uniform_share": 1.1}, r"`uniform_share` must be in \[0, 1\]"),
        ({"eos_weight": -1.0}, "`eos_weight` must be a finite number"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        WindowObjective(**wrong)


@pytest.mark.parametrize("shift", [False, True])
def test_a_model_scores_the_canvases_it_is_shown(shift):
    model = tiny_model(shift_logits=shift).train()
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100]])
    features, mask = torch.randn(2, 40, 80), torch.ones(2, 40, dtype=torch.long)
    objective = WindowObjective(ahead=3, num_draws=1, num_steps=1, uniform_share=0.0, eos_weight=1.0)
    model.eval()
    out = model(
        input_features=features,
        attention_mask=mask,
        labels=labels,
        objective=objective,
        generator=torch.Generator().manual_seed(1),
    )
    canvas = out.canvases[0]
    prompt = model._default_prompt(2)
    starts = (canvas == model.config.mask_token_id).int().argmax(dim=-1)
    visible = torch.arange(canvas.shape[1]) < starts[:, None] + 3
    plain = model(
        input_features=features,
        attention_mask=mask,
        decoder_input_ids=torch.cat([prompt, canvas], dim=-1),
        decoder_attention_mask=torch.cat([torch.ones_like(prompt, dtype=torch.bool), visible], dim=-1),
    ).logits
    wanted = (canvas == model.config.mask_token_id) & visible
    first = prompt.shape[1] - int(shift)
    logits = plain[:, first : first + canvas.shape[1]][wanted]
    targets = torch.full_like(canvas, model.config.eos_token_id)
    for row, text in zip(targets, labels, strict=True):
        text = text[text != -100][: len(row)]
        row[: len(text)] = text
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(logits, targets[wanted]))
    torch.testing.assert_close(out.logits, logits)
    out.loss.backward()
    assert model.get_decoder().layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_windows_end_with_the_decoders_positions():
    model = tiny_model().eval()
    capacity = model.config.decoder_config.max_position_embeddings - model._default_prompt(1).shape[1]
    labels = torch.randint(3, VOCAB_SIZE, (1, capacity - 1))
    objective = WindowObjective(ahead=20, num_draws=50, uniform_share=0.0)
    out = model(
        input_features=torch.randn(1, 40, 80), attention_mask=torch.ones(1, 40), labels=labels, objective=objective
    )
    assert torch.isfinite(out.loss) and max(canvas.shape[1] for canvas in out.canvases) == capacity


def test_arguments_make_the_objective_and_refuse_what_it_does_not_know(tmp_path):
    def arguments(**kwargs):
        return MDMASRTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **kwargs)

    made = arguments(window_ahead=6, window_draws=2, window_uniform_share=0.3, isct_steps=1).make_objective()
    assert made == WindowObjective(ahead=6, num_draws=2, num_steps=1, uniform_share=0.3)
    with pytest.raises(ValueError, match="`position_biased_share=0.5` belongs to whole canvases"):
        arguments(window_ahead=6, position_biased_share=0.5)
    with pytest.raises(ValueError, match="`window_draws` must be an integer"):
        arguments(window_ahead=6, window_draws=0)
    with pytest.raises(ValueError, match="`donor_learning_rate` must be positive"):
        arguments(donor_learning_rate=0.0)


def test_the_windows_of_a_text_cover_it():
    objective = WindowObjective(ahead=2, num_draws=8, num_steps=1, uniform_share=0.0)
    decoder, _ = run(objective)
    starts = [int(starts_of(wanted)[0]) for _, _, wanted in decoder.calls]
    # A text of 7 tokens and its EOS, in 8 draws: one each.
    assert starts == list(range(8)) and all(a < b for a, b in pairwise(starts))
