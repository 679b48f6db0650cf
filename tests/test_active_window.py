import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_generation import EOS, MASK
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mdm_asr_hf.active_window_mdm_asr import ActiveWindow, CanvasCache, select_rows

START = VOCAB_SIZE


def around(rows, computed=None, lengths=None, is_last=False, ahead=3, behind=1):
    """The window of rows of prompt and canvas; what is masked before the first EOS is open."""
    sequences = torch.tensor(rows)
    computed = sequences if computed is None else torch.tensor(computed)
    lengths = torch.tensor(lengths or [sequences.shape[1]] * len(rows))
    inside = torch.arange(sequences.shape[1]) < lengths[:, None]
    ended = (sequences == EOS).cummax(dim=-1).values
    candidates = (sequences == MASK) & inside & ~ended
    return ActiveWindow.around(
        sequences,
        computed,
        candidates,
        inside & ((sequences == EOS).cumsum(dim=-1) - (sequences == EOS).long() == 0),
        lengths,
        torch.full((len(rows),), is_last),
        MASK,
        ahead=ahead,
        behind=behind,
    )


# --- where the window lies, by hand ---


def test_the_window_starts_behind_the_first_open_position_and_reaches_so_far_ahead():
    window = around([[START, 5, 6, 7, MASK, MASK, MASK, MASK, MASK]])
    assert window.places.tolist() == [[3, 4, 5, 6]] and window.starts.tolist() == [3] and window.ends.tolist() == [7]
    window = around([[START, 5, 6, 7, MASK, MASK, MASK, MASK, MASK]], ahead=2, behind=0)
    assert window.places.tolist() == [[4, 5]]


def test_the_window_goes_back_to_what_was_committed_since_it_was_computed():
    now = [START, 5, 6, 7, MASK, MASK, MASK, MASK]
    # Position 2 was still masked when its keys were computed, and nothing from 6 on ever was.
    window = around([now], [[START, 5, MASK, 7, MASK, MASK, -1, -1]])
    assert window.places.tolist() == [[2, 3, 4, 5, 6]]
    # The first step has computed nothing, not even the prompt.
    window = around([[START, MASK, MASK, MASK, MASK, MASK]], [[-1] * 6])
    assert window.places.tolist() == [[0, 1, 2, 3]]


def test_the_window_begins_where_the_logits_of_the_first_wanted_position_are_read():
    sequences = torch.tensor([[START, 5, 6, 7, 8, MASK, MASK, MASK]])

    def start(wanted, **options):
        wanted = torch.tensor([[i in wanted for i in range(8)]])
        everything, lengths = torch.ones_like(wanted), torch.tensor([8])
        window = ActiveWindow.around(
            sequences, sequences, wanted, everything, lengths, lengths > 9, MASK, ahead=2, behind=0, **options
        )
        # Wherever it begins: what is ahead is counted from the first masked one.
        assert window.ends.tolist() == [7]
        return window.starts.item()

    assert start({5, 6}) == 5 and start({5, 6}, shift=1) == 4
    # Two that may be revised.
    assert start({3, 4, 5, 6}) == 3 and start({3, 4, 5, 6}, shift=1) == 2


def test_the_window_takes_in_committed_text_ahead_but_nothing_behind_the_end_of_text():
    repaired = [START, MASK, 6, 7, 8, 9, EOS, MASK, MASK]
    assert around([repaired], ahead=2).ends.tolist() == [7]
    # Two gaps: the text to the right of the second is visible, too.
    assert around([[START, MASK, 6, MASK, 8, EOS, 5, 5, 5]], ahead=2).ends.tolist() == [6]
    # The end of text is committed, the mask before it is not: what follows it does not matter.
    assert around([[START, MASK, MASK, EOS, 5, 6, 7, 8]], ahead=2).ends.tolist() == [4]


def test_the_window_ends_with_the_canvas_of_its_row_and_a_last_step_takes_all_of_it():
    rows = [[START, 5, MASK, MASK, MASK, MASK, MASK], [START, MASK, MASK, EOS, EOS, EOS, EOS]]
    window = around(rows, lengths=[7, 3], ahead=4)
    # What fills up the shorter row does not count as text.
    assert window.ends.tolist() == [6, 3]
    assert window.places.tolist() == [[1, 2, 3, 4, 5], [0, 1, 2, 7, 7]]
    assert around(rows, lengths=[7, 3], ahead=2, is_last=True).ends.tolist() == [7, 3]


def test_a_finished_row_takes_the_narrowest_of_windows():
    rows = [[START, 5, MASK, MASK, MASK, MASK, MASK], [START, 5, 6, 7, EOS, EOS, EOS]]
    # Nothing of the finished row was ever computed, and nothing will be.
    window = around(rows, [[START, 5, MASK, MASK, -1, -1, -1], [-1] * 7])
    assert window.ends.tolist() == [5, 5] and window.places.tolist() == [[1, 2, 3, 4], [4, 7, 7, 7]]


def test_the_cache_keeps_what_the_window_does_not_cover():
    cache = CanvasCache(1, (2, 1, 4, 1), torch.float32, torch.device("cpu"))
    cache.move(torch.tensor([[0, 1], [0, 4]]), 2)
    first = torch.tensor([[[[1.0], [2.0]]], [[[3.0], [9.0]]]])
    keys, values = cache.update(0, first, -first)
    assert keys.flatten().tolist() == [1, 2, 3, 0] and values.flatten().tolist() == [-1, -2, -3, 0]
    cache.move(torch.tensor([[1, 2], [1, 2]]), 3)
    keys, _ = cache.update(0, 10 * first, first)
    assert keys.flatten().tolist() == [1, 10, 20, 3, 30, 90]
    cache.take_rows(torch.tensor([1]))
    assert cache.states[:, 0, 0].flatten().tolist() == [3, 30, 90, 0, 9]


def test_all_layers_of_a_window_are_written_as_one_by_one():
    one, all_at_once = (CanvasCache(3, (2, 2, 6, 4), torch.float32, torch.device("cpu")) for _ in range(2))
    new = torch.randn(3, 2, 2, 2, 2, 4)
    for cache in (one, all_at_once):
        cache.move(torch.tensor([[1, 2], [4, 6]]), 6)
    for layer, (keys, values) in enumerate(new):
        one.update(layer, keys, values)
    all_at_once.update_all(new)
    assert torch.equal(one.states, all_at_once.states) and one.states.count_nonzero() == new.numel()


def test_rows_that_are_kept_move_up():
    values = torch.arange(10).reshape(5, 2)
    kept = select_rows(values, torch.tensor([0, 2, 4]), in_place=True)
    assert kept.tolist() == [[0, 1], [4, 5], [8, 9]] and kept.data_ptr() == values.data_ptr()
    assert select_rows(kept, torch.tensor([1, 2]), in_place=True).tolist() == [[4, 5], [8, 9]]
    assert select_rows(kept, torch.tensor([], dtype=torch.long), in_place=True).shape == (0, 2)


# --- decoding with it ---


def transcribe(model, encoder="whisper", seconds=(1.0, 0.6, 0.35), **kwargs):
    features, mask = tiny_inputs(encoder, seconds=seconds)
    return model.generate(features, attention_mask=mask, return_dict_in_generate=True, **{"gamma": 3.0, **kwargs})


def assert_same(one, other):
    assert one.sequences.tolist() == other.sequences.tolist()
    assert one.commit_steps.tolist() == other.commit_steps.tolist() and one.nfe.tolist() == other.nfe.tolist()
    torch.testing.assert_close(one.confidence, other.confidence, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("encoder", ["whisper", "parakeet", "wav2vec2"])
@pytest.mark.parametrize("settings", [{}, {"shift_logits": True}])
def test_a_window_over_everything_is_the_whole_canvas(encoder, settings):
    model = tiny_model(encoder, **settings)
    whole = transcribe(model, encoder, active_ahead=None)
    assert_same(whole, transcribe(model, encoder, active_ahead=100, active_behind=100))
    draft = [[7, -100, 9], [5], [-100, 8]]
    whole = transcribe(model, encoder, active_ahead=None, draft_ids=draft)
    assert_same(whole, transcribe(model, encoder, active_ahead=100, active_behind=100, draft_ids=draft))


@pytest.mark.parametrize("settings", [{}, {"shift_logits": True}])
def test_with_everything_computed_again_the_cache_changes_nothing(settings):
    # An attention implementation of another name decodes without the cache.
    AttentionInterface.register("uncached_sdpa", sdpa_attention_forward)
    AttentionMaskInterface.register("uncached_sdpa", sdpa_mask)
    model = tiny_model("whisper", **settings)
    cached = transcribe(model, active_ahead=3, active_behind=100, repair_rounds=1, repair_doubled_below=1.0)
    model.set_attn_implementation("uncached_sdpa")
    assert_same(cached, transcribe(model, active_ahead=3, repair_rounds=1, repair_doubled_below=1.0))


def test_a_causal_decoder_has_no_use_for_what_lies_ahead():
    model = tiny_model("whisper", decoder_config={"is_causal": True})
    # So strong a bias commits from left to right.
    whole = transcribe(model, active_ahead=None, gamma=0.0, lambda_=50.0, max_denoising_steps=100)
    assert whole.nfe.max() < 100
    assert_same(whole, transcribe(model, active_ahead=2, gamma=0.0, lambda_=50.0, max_denoising_steps=100))


@settings(max_examples=15, deadline=None)
@given(
    ahead=st.integers(1, 12),
    behind=st.integers(0, 4),
    seed=st.integers(0, 3),
    steps=st.integers(1, 12),
    shift=st.booleans(),
    committed=st.one_of(st.none(), st.integers(1, 6)),
)
def test_a_batch_is_its_rows_and_every_row_ends(ahead, behind, seed, steps, shift, committed):
    model = tiny_model("whisper", seed=seed, shift_logits=shift)
    options = {"active_ahead": ahead, "active_behind": behind, "max_denoising_steps": steps, "repair_rounds": 1}
    options["commit_ahead"] = committed
    features, mask = tiny_inputs("whisper")
    batch = transcribe(model, **options)
    assert not (batch.sequences == MASK).any() and batch.nfe.max() <= steps
    for i in range(3):
        n = int(mask[i].sum())
        alone = model.generate(
            features[i : i + 1, :n],
            attention_mask=mask[i : i + 1, :n],
            return_dict_in_generate=True,
            gamma=3.0,
            **options,
        )
        width = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == batch.sequences[i, :width].tolist()
        assert alone.nfe[0] == batch.nfe[i]


@pytest.mark.parametrize("settings", [{}, {"active_ahead": 3}, {"active_ahead": 3, "repair_rounds": 1}])
@pytest.mark.parametrize("shift", [False, True])
def test_finished_rows_of_a_large_batch_drop_out_several_at_a_time(settings, shift):
    model = tiny_model("whisper", shift_logits=shift)
    seconds = tuple(0.2 + 0.1 * i for i in range(24))
    options = {"gamma": 0.5, "max_denoising_steps": 40, "active_ahead": None, **settings}
    num_rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: num_rows.append(len(kwargs["decoder_input_ids"])), with_kwargs=True
    )
    batch = transcribe(model, seconds=seconds, **options)
    handle.remove()
    assert len(set(batch.nfe.tolist())) > 6
    # What is dropped is an eighth or more; of 8 rows and less, each by itself. A repair begins with all rows again.
    for before, after in zip(num_rows, num_rows[1:], strict=False):
        assert after >= before or before - after >= before / 8
    assert max(num_rows) == 24
    if "repair_rounds" not in settings:
        assert len(set(num_rows)) < len(set(batch.nfe.tolist()))
    features, mask = tiny_inputs("whisper", seconds=seconds)
    for i in range(0, 24, 5):
        n = int(mask[i].sum())
        alone = model.generate(
            features[i : i + 1, :n], attention_mask=mask[i : i + 1, :n], return_dict_in_generate=True, **options
        )
        width = alone.sequences.shape[1]
        assert alone.sequences[0].tolist() == batch.sequences[i, :width].tolist() and alone.nfe[0] == batch.nfe[i]


@pytest.mark.parametrize("ahead", [None, 3])
def test_the_callers_encoder_outputs_stay_as_they_were(ahead):
    model = tiny_model("whisper")
    features, mask = tiny_inputs("whisper", seconds=tuple(0.2 + 0.1 * i for i in range(6)))
    with torch.no_grad():
        frames = model.prepare_cross_attention(model.encode(features, mask))
    before = copy.deepcopy(frames)
    options = {"gamma": 0.5, "active_ahead": ahead, "repair_rounds": 1, "return_dict_in_generate": True}
    once, again = (model.generate(encoder_outputs=frames, attention_mask=mask, **options) for _ in range(2))
    # Rows finished one by one, and the others moved up.
    assert len(set(once.nfe.tolist())) > 2
    assert_same(once, again)
    torch.testing.assert_close(frames.to_tuple(), before.to_tuple(), rtol=0, atol=0)


def test_eager_attention_decodes_alike():
    model = tiny_model("whisper")
    fused = transcribe(model, active_ahead=3)
    model.set_attn_implementation("eager")
    assert_same(fused, transcribe(model, active_ahead=3))


def test_steps_compute_the_window_alone():
    model = tiny_model("whisper")
    widths = []

    def note(module, args, kwargs):
        widths.append(kwargs["decoder_input_ids"].shape[1])

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    out = transcribe(model, seconds=(5.0,), active_ahead=4, active_behind=2, gamma=0.0, max_denoising_steps=100)
    handle.remove()
    assert out.nfe.item() == len(widths) > 8
    # The first has the prompt; later ones four positions ahead, and two or what was committed just now behind.
    assert widths[0] == 5 and max(widths) <= 8 and sum(widths) / len(widths) < 6.5


@pytest.mark.parametrize("ahead", [None, 8])
@pytest.mark.parametrize("shift", [False, True])
def test_steps_commit_among_the_first_open_positions_alone(ahead, shift):
    model = tiny_model("whisper", shift_logits=shift)
    wanted = []

    def note(module, args, kwargs):
        wanted.append(kwargs["logits_to_keep"].sum(dim=-1).tolist())

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    # The bound is so loose that it alone would commit eight and more at a time.
    options = {"active_ahead": ahead, "gamma": 100.0, "lambda_": 0.0}
    out = transcribe(model, seconds=(5.0, 3.0), commit_ahead=3, **options)
    handle.remove()
    assert len(wanted) > 4 and {number for step in wanted for number in step} <= {0, 1, 2, 3}
    for row in range(2):
        steps = out.commit_steps[row][out.commit_steps[row] > 0].tolist()
        # Everything among the first three is committed at once, so that the text is filled from left to right.
        assert steps == sorted(steps) and max(steps.count(step) for step in steps) == 3
    loose = transcribe(model, seconds=(5.0, 3.0), commit_ahead=None, **options)
    assert loose.nfe.max() < out.nfe.max()
    assert_same(loose, transcribe(model, seconds=(5.0, 3.0), commit_ahead=1000, **options))


def test_the_last_step_commits_all_that_is_left():
    out = transcribe(tiny_model("whisper"), seconds=(5.0,), active_ahead=4, commit_ahead=1, max_denoising_steps=3)
    assert out.nfe.tolist() == [3] and not (out.sequences == MASK).any()
    assert (out.commit_steps == 3).sum() > 4 and (out.commit_steps[0, :2].tolist()) == [1, 2]


def test_samplers_that_choose_among_the_whole_canvas_get_it():
    model = tiny_model("whisper")
    for sampler in ("conf_top_k", "random"):
        outputs = [
            transcribe(
                model,
                sampler=sampler,
                gamma=None,
                active_ahead=n,
                commit_ahead=n,
                generator=torch.Generator().manual_seed(1),
            )
            for n in (None, 2)
        ]
        assert_same(*outputs)


def test_without_a_bound_all_is_committed_at_once():
    out = transcribe(tiny_model("whisper"), gamma=float("inf"), active_ahead=2)
    assert out.nfe.tolist() == [1, 1, 1]


def test_eb_conf_uses_the_window():
    model = tiny_model("whisper")
    out = transcribe(model, sampler="eb_conf", gamma=1e6, active_ahead=2, max_denoising_steps=200)
    # No bound but the window: two positions a step.
    assert out.commit_steps[0, :6].tolist() == [1, 1, 2, 2, 3, 3]


def test_processes_in_step_decode_alike():
    model = tiny_model("whisper")
    for options in ({}, {"shift_logits": True}):
        model = tiny_model("whisper", **options)
        alone = transcribe(model, active_ahead=2, active_behind=0)
        assert_same(alone, transcribe(model, active_ahead=2, active_behind=0, synced_gpus=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cache_has_the_models_precision(dtype):
    model = tiny_model("whisper").to(dtype)
    out = transcribe(model, active_ahead=3)
    assert out.confidence.isfinite().all()


@pytest.mark.parametrize("value", [0, 2.5, True, "8"])
def test_bad_windows_are_named(value):
    with pytest.raises(ValueError, match="`active_ahead` must be an integer of at least 1"):
        transcribe(tiny_model("whisper"), active_ahead=value)
    with pytest.raises(ValueError, match="`commit_ahead` must be an integer of at least 1"):
        transcribe(tiny_model("whisper"), commit_ahead=value)
    with pytest.raises(ValueError, match="`active_behind` must be an integer of at least 0"):
        transcribe(tiny_model("whisper"), active_behind=-1)
