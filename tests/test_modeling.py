import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tables import each
from tiny_models import ENCODERS, VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder, sinusoids

from mdm_asr_hf import MDMASRForConditionalGeneration
from mdm_asr_hf.decoder_mdm_asr import DraftingCache
from mdm_asr_hf.diffusion_mdm_asr import DiffusionObjective, DraftObjective, masked_diffusion_loss

EOS, PAD, START, MASK = 1, 2, VOCAB_SIZE, VOCAB_SIZE + 1


def canvas_inputs(batch_size, length=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    ids[:, 0] = START
    ids[:, ::3] = torch.where(torch.arange(0, length, 3) > 0, MASK, ids[:, ::3])
    return ids


# --- encoders ---


@each("encoder", sorted(ENCODERS))
def test_padding_and_the_outside_of_a_canvas_have_no_influence(encoder):
    model = tiny_model(encoder)
    features, mask = tiny_inputs(encoder)
    with torch.no_grad():
        batch = model.encode(features, mask)
        assert batch.attention_mask.shape == batch.last_hidden_state.shape[:2]
        for row, length in enumerate(mask.sum(-1).tolist()):
            alone = model.encode(features[row : row + 1, :length], mask[row : row + 1, :length])
            inside = batch.attention_mask[row].bool()
            assert int(inside.sum()) == int(alone.attention_mask.sum()) > 0
            torch.testing.assert_close(
                batch.last_hidden_state[row, inside],
                alone.last_hidden_state[0, alone.attention_mask[0].bool()],
                atol=2e-5,
                rtol=1e-4,
            )

    ids = canvas_inputs(3)
    with torch.no_grad():
        frames = model.encode(features, mask)
        expected = model(decoder_input_ids=ids, encoder_outputs=frames).logits
        outside = ~frames.attention_mask.bool()
        assert outside.any()
        frames.last_hidden_state[outside] = 1e3
        torch.testing.assert_close(model(decoder_input_ids=ids, encoder_outputs=frames).logits, expected)
        frames.attention_mask = None
        unmasked = model(decoder_input_ids=ids, encoder_outputs=frames).logits
        assert not torch.allclose(unmasked[1:], expected[1:], atol=1e-2)

    canvas_mask = torch.ones_like(ids)
    canvas_mask[1, 8:] = 0
    with torch.no_grad():
        batch = model(features, mask, decoder_input_ids=ids, decoder_attention_mask=canvas_mask).logits
        length = int(mask[1].sum())
        alone = model(features[1:2, :length], mask[1:2, :length], decoder_input_ids=ids[1:2, :8]).logits
    torch.testing.assert_close(batch[1, :8], alone[0], atol=1e-4, rtol=1e-4)


def test_whisper_encoder_is_the_stock_one_at_any_length():
    model = tiny_model("whisper")
    stock = WhisperEncoder(WhisperConfig(**{k: v for k, v in ENCODERS["whisper"].items() if k != "model_type"})).eval()
    stock.load_state_dict(model.model.encoder.state_dict())
    features = torch.randn(1, 3000, 80)
    with torch.no_grad():
        ours = model.encode(features).last_hidden_state
        theirs = stock(features.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    # Before any training, too, its positions are sinusoids.
    torch.testing.assert_close(model.model.encoder.embed_positions.weight, sinusoids(1500, 16))

    for num_frames, silence_s, positions in [(100, 0.0, 50), (101, 0.0, 51), (100, 5.0, 300), (2900, 5.0, 1500)]:
        model = tiny_model("whisper", encoder_trailing_silence_s=silence_s)
        with torch.no_grad():
            out = model.encode(torch.randn(1, num_frames, 80), torch.ones(1, num_frames))
        assert out.last_hidden_state.shape[1] == positions == int(out.attention_mask.sum())

    # Two seconds of audio, then silence as the stock extractor writes it: the loudest value - 2, but not below -1.5.
    model = tiny_model("whisper", encoder_trailing_silence_s=1.0)
    speech = torch.rand(1, 200, 80) * 2 - 1
    silence = torch.full((1, 100, 80), max(float(speech.max()) - 2.0, -1.5))
    with torch.no_grad():
        appended = model.encode(speech).last_hidden_state
        model.config.encoder_trailing_silence_s = 0.0
        written = model.encode(torch.cat([speech, silence], dim=1)).last_hidden_state
    torch.testing.assert_close(appended, written)

    model = tiny_model("whisper")
    with pytest.raises(ValueError, match="30.2 s of audio.*at most 30.0 s. Split"):
        model.encode(torch.randn(1, 3020, 80))
    with pytest.raises(ValueError, match=r"must be \(B, T, 80\)"):
        model.encode(torch.randn(1, 80, 3000))
    # Padding beyond 30 s is no audio.
    mask = torch.zeros(1, 3020)
    mask[:, :100] = 1
    model.encode(torch.randn(1, 3020, 80), mask)


def learn_silence(model, num_frames):
    """Gives a model frames of silence as if they were learnt."""
    encoder = model.get_encoder()
    encoder.config.silence_frames = num_frames
    learnt = torch.randn(num_frames, encoder.config.d_model, generator=torch.Generator().manual_seed(1))
    encoder.silence_embeddings = torch.nn.Parameter(learnt)


def test_learnt_frames_stand_for_a_short_silence_and_no_other(tmp_path):
    model = tiny_model("whisper", encoder_trailing_silence_s=0.2)
    features, mask = tiny_inputs(seconds=(1.0, 0.6, 0.35))
    with torch.no_grad():
        plain = model.encode(features, mask)
        longer = model.encode(features, mask, trailing_silence_s=0.5)
        # An odd frame of audio belongs to the silence: ten frames, and eleven.
        learn_silence(model, 11)
        learnt = model.encode(features, mask)
        # Whisper's own, exactly.
        assert torch.equal(model.encode(features, mask, trailing_silence_s=0.5)[0], longer[0])
        difference = (learnt[0] - plain[0]).abs().amax(dim=-1)
        assert torch.equal(learnt.attention_mask, plain.attention_mask)
        assert (difference[plain.attention_mask] > 1e-3).all()
        for row, num_frames in enumerate((100, 60, 35)):
            alone = model.encode(features[row : row + 1, :num_frames], mask[row : row + 1, :num_frames])
            count = alone[0].shape[1]
            torch.testing.assert_close(alone[0][0], learnt[0][row, :count], atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = MDMASRForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(features, mask)[0], learnt[0])
    # They are zero before they are learnt.
    fresh = MDMASRForConditionalGeneration(model.config)
    assert not fresh.get_encoder().silence_embeddings.any()


# --- decoder ---


def test_attention_is_causal_where_it_should_be():
    for is_causal in (False, True):
        model = tiny_model("parakeet", decoder_config=dict(is_causal=is_causal))
        features, mask = tiny_inputs("parakeet", seconds=(0.5,))
        ids = canvas_inputs(1)
        changed = ids.clone()
        changed[0, -1] = 5
        with torch.no_grad():
            first, second = (model(features, mask, decoder_input_ids=i).logits[0, 0] for i in (ids, changed))
        assert torch.allclose(first, second) == is_causal

    model = tiny_drafts_model(decoder_config=dict(draft_length=4))
    features, mask = tiny_inputs()
    arguments = dict(decoder_input_ids=text_inputs(), frontiers=torch.full((3, 1), 3))
    arguments["block_ids"] = model._lay_blocks(text_inputs(), arguments["frontiers"])
    with torch.no_grad():
        before = model(features, mask, **arguments).draft_hidden_states
        model.model.decoder.drafts.offset_embeddings.weight[2] *= -1.0
        after = model(features, mask, **arguments).draft_hidden_states
    difference = (before - after).abs().amax(dim=-1)
    assert (difference[..., 1:] > 1e-3).all() and not difference[..., 0].any()


def test_masks_have_an_embedding_and_no_logit():
    for encoder in sorted(ENCODERS):
        model = tiny_model(encoder)
        features, mask = tiny_inputs(encoder)
        logits = model(features, mask, decoder_input_ids=canvas_inputs(3)).logits
        assert logits.shape == (3, 12, VOCAB_SIZE) and model.config.mask_token_id == MASK >= VOCAB_SIZE

    model = tiny_model()
    embed = model.model.decoder.embed_ids
    ids = torch.tensor([[START, 5, MASK]])
    with torch.no_grad():
        got = embed(ids)[0]
    decoder = model.model.decoder
    rows = [
        decoder.input_only_embeddings.weight[0],
        decoder.embed_tokens.weight[5],
        decoder.input_only_embeddings.weight[1],
    ]
    torch.testing.assert_close(got, torch.stack(rows))

    for shift in [False, True]:
        model = tiny_model()
        model.config.shift_logits = shift
        features, mask = tiny_inputs()
        ids = canvas_inputs(3)
        with torch.no_grad():
            frames = model.encode(features, mask)
            everything = model(decoder_input_ids=ids, encoder_outputs=frames, logits_to_keep=11).logits
            chosen = torch.rand(3, 11, generator=torch.Generator().manual_seed(0)) < 0.4
            some = model(decoder_input_ids=ids, encoder_outputs=frames, logits_to_keep=chosen).logits
        assert 0 < len(some) == int(chosen.sum()) < 33
        torch.testing.assert_close(some, everything[chosen], atol=1e-5, rtol=1e-5)


@each("encoder", sorted(ENCODERS))
def test_sdpa_and_eager_agree_and_cross_attention_is_computed_once(encoder, monkeypatch):
    model = tiny_model(encoder)
    features, mask = tiny_inputs(encoder)
    ids = canvas_inputs(3)
    canvas_mask = torch.ones_like(ids)
    canvas_mask[1, 8:] = 0
    with torch.no_grad():
        outputs = []
        for implementation in ("sdpa", "eager"):
            # Parakeet's eager encoder gives NaN for padded rows before transformers 5.18.
            broken = encoder == "parakeet" and Version(transformers.__version__) < Version("5.18")
            (model.model.decoder if broken else model).set_attn_implementation(implementation)
            assert model.model.decoder.config._attn_implementation == implementation
            outputs.append(model(features, mask, decoder_input_ids=ids, decoder_attention_mask=canvas_mask).logits)
    inside = canvas_mask.bool()
    torch.testing.assert_close(outputs[0][inside], outputs[1][inside], atol=1e-4, rtol=1e-4)

    model = tiny_model(encoder)
    features, mask = tiny_inputs(encoder)
    ids = canvas_inputs(3)
    with torch.no_grad():
        expected = model(features, mask, decoder_input_ids=ids).logits
        prepared = model.prepare_cross_attention(model.encode(features, mask))

        def fail(*args, **kwargs):
            raise AssertionError("computed again")

        monkeypatch.setattr(model.model.decoder, "cross_attention_states", fail)
        for layer in model.model.decoder.layers:
            monkeypatch.setattr(layer.cross_attn, "project_key_value", fail)
        torch.testing.assert_close(model(decoder_input_ids=ids, encoder_outputs=prepared).logits, expected)
        assert model.prepare_cross_attention(prepared) is prepared


@each("encoder", sorted(ENCODERS))
@each("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(encoder, dtype):
    model = tiny_model(encoder)
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            parameter.mul_(0.3)
    features, mask = tiny_inputs(encoder)
    ids = canvas_inputs(3)
    with torch.no_grad():
        single = model(features, mask, decoder_input_ids=ids).logits.softmax(-1)
        half = model.to(dtype)(features, mask, decoder_input_ids=ids).logits
    assert half.dtype == dtype
    assert (half.float().softmax(-1) - single).abs().max() < 0.05


@each("tied", [True, False])
@each("draft_vocab_size", [None, 40])
def test_a_resized_vocabulary_writes_the_same_text(tmp_path, tied, draft_vocab_size):
    model = tiny_drafts_model(decoder_config=dict(draft_vocab_size=draft_vocab_size))
    if not tied:
        model.config.tie_word_embeddings = False
        model.proj_out.weight = torch.nn.Parameter(model.proj_out.weight + 1.0)
    model.generation_config.prompt_template = {
        "tokens": ["language"],
        "slots": {"language": {"en": START, "de": 5}},
        "defaults": {"language": "en"},
    }
    model.generation_config.suppress_tokens = [3, 58]
    features, mask = tiny_inputs()
    settings = dict(return_dict_in_generate=True, compression_ratio_threshold=None)
    expected = model.generate(features.double(), attention_mask=mask, **settings)
    assert (expected.nfe < (expected.sequences != PAD).sum(dim=-1)).any()

    model.resize_token_embeddings(VOCAB_SIZE + 10)
    with torch.no_grad():
        # Those of transformers are near the old ones' mean.
        for weight in (model.get_input_embeddings().weight, model.proj_out.weight):
            weight[VOCAB_SIZE:] = 0.0
    assert (model.config.mask_token_id, model.config.decoder_start_token_id) == (MASK + 10, START + 10)
    assert model.generation_config.prompt_template["slots"] == {"language": {"en": START + 10, "de": 5}}
    assert len(model.draft_token_ids) == (draft_vocab_size or VOCAB_SIZE + 10)
    model.save_pretrained(tmp_path)
    for one in (model, MDMASRForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64).eval()):
        output = one.generate(features.double(), attention_mask=mask, **settings)
        assert torch.equal(output.sequences, expected.sequences)
        # Ids more to choose from make drafts less sure.
        assert torch.equal(output.nfe, expected.nfe) or draft_vocab_size is None

    model.resize_token_embeddings(50)
    assert (model.config.mask_token_id, model.config.decoder_start_token_id) == (51, 50)
    assert model.generation_config.suppress_tokens == [3] and int(model.draft_token_ids.max()) < 50
    embeddings, output = model.get_input_embeddings().weight, model.proj_out.weight
    assert len(embeddings) == len(output) == 50 and torch.equal(embeddings, output) == tied
    model.generate(features.double(), attention_mask=mask, **settings)
    with pytest.raises(ValueError, match="`new_num_tokens=5` leaves no room for the id 5.* Pass 6 at least"):
        model.resize_token_embeddings(5)


def test_bad_calls_name_the_remedy():
    model = tiny_model()
    features, mask = tiny_inputs()
    with pytest.raises(ValueError, match="`decoder_input_ids`.*missing"):
        model(features, mask)
    with pytest.raises(ValueError, match="`input_features` or `encoder_outputs`"):
        model(decoder_input_ids=canvas_inputs(1))
    with pytest.raises(ValueError, match="301 tokens.*300 positions"):
        model(features, mask, decoder_input_ids=torch.ones(3, 301, dtype=torch.long))

    with pytest.raises(ValueError, match="`objective` is a DiffusionObjective, which trains a canvas"):
        tiny_drafts_model()(features, mask, labels=DRAFT_LABELS, objective=DiffusionObjective())

    model = tiny_model()
    features, mask = tiny_inputs(seconds=(1.0,))
    with pytest.raises(ValueError, match="-100 before a token"):
        model(features, mask, labels=torch.tensor([[5, -100, 7]]))
    with pytest.raises(ValueError, match="must hold the prompt and a canvas"):
        model(features, mask, labels=torch.tensor([[5, 6, 7]]), decoder_input_ids=torch.tensor([[5, MASK]]))


# --- drafts ---


def text_inputs(batch_size=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator)
    ids[:, 0] = START
    return ids


@each("encoder", sorted(ENCODERS))
@each("implementation", ["sdpa", "eager"])
def test_blocks_beside_the_causal_rows_are_those_behind_them(encoder, implementation):
    model = tiny_drafts_model(encoder)
    model.model.decoder.set_attn_implementation(implementation)
    features, mask = tiny_inputs(encoder)
    ids, length = text_inputs(), 7
    frontiers = torch.tensor([[0, 3, 6], [2, 2, 5], [6, 1, 0]])
    with torch.no_grad():
        outputs = model.prepare_cross_attention(model.encode(features.double(), mask))
        block_ids = model._lay_blocks(ids, frontiers)
        together = model(decoder_input_ids=ids, encoder_outputs=outputs, frontiers=frontiers, block_ids=block_ids)
        rows = model(decoder_input_ids=ids, encoder_outputs=outputs)
        # The causal rows do not see the masks, and are the donor's.
        torch.testing.assert_close(together.logits, rows.logits)
        assert together.draft_hidden_states.shape == (3, 3, 3, model.config.decoder_config.hidden_size)
        assert rows.draft_hidden_states is None
        # Behind rows that are in a cache, as after an evaluation; and one by one.
        config = model.config.decoder_config
        shape = (3, config.num_key_value_heads, 12, config.head_dim)
        cache = DraftingCache(config.num_hidden_layers, shape, dtype=torch.float64)
        cache.place(torch.arange(length).expand(3, -1), length)
        causal = torch.ones(3, length, length, dtype=torch.bool).tril()
        cached = model(
            decoder_input_ids=ids, decoder_attention_mask=causal, encoder_outputs=outputs, past_key_values=cache
        )
        torch.testing.assert_close(cached.logits, rows.logits)
        for place in range(3):
            own = frontiers[:, place : place + 1]
            cache.place(ids.new_zeros((3, 0)), length)
            alone = model(
                decoder_input_ids=ids.new_zeros((3, 0)),
                encoder_outputs=outputs,
                past_key_values=cache,
                frontiers=own,
                frontier_mask=torch.arange(length) <= own[..., None],
                block_ids=block_ids[:, place : place + 1],
                logits_to_keep=ids.new_zeros((3, 0)),
            )
            assert alone.logits.shape == (3, 0, VOCAB_SIZE)
            # Eager attention takes its softmax in single precision.
            torch.testing.assert_close(
                alone.draft_hidden_states[:, 0], together.draft_hidden_states[:, place], atol=1e-5, rtol=1e-4
            )
        # What stands behind a frontier has no influence on its block.
        changed = ids.clone()
        changed[:, 4:] = 5
        other = model(decoder_input_ids=changed, encoder_outputs=outputs, frontiers=frontiers, block_ids=block_ids)
    same = (other.draft_hidden_states - together.draft_hidden_states).abs().amax(dim=(2, 3)) < 1e-5
    assert torch.equal(same, frontiers < 4)


@each("encoder", sorted(ENCODERS))
def test_before_training_the_first_mask_says_the_donors_own_token(encoder):
    model = tiny_drafts_model(encoder, decoder_config=dict(draft_layers=2, num_hidden_layers=2))
    decoder = model.get_decoder()
    with torch.no_grad():
        for layer, of_donor in zip(decoder.drafts.layers, decoder.layers, strict=True):
            layer.load_state_dict({name: of_donor.state_dict()[name] for name in layer.state_dict()})
        decoder.drafts.layer_norm.load_state_dict(decoder.layer_norm.state_dict())
        decoder.drafts.offset_embeddings.weight.zero_()
        outputs = model.prepare_cross_attention(model.encode(*tiny_inputs(encoder)))
        ids, frontiers = text_inputs(), torch.arange(6).expand(3, -1)
        blocks = dict(frontiers=frontiers, block_ids=model._lay_blocks(ids, frontiers))
        result = model.model(decoder_input_ids=ids, encoder_outputs=outputs, **blocks)
    torch.testing.assert_close(result.draft_hidden_states[:, :, 0], result.last_hidden_state[:, 1:])


def test_drafts_in_half_precision_and_autocast():
    for dtype in [torch.bfloat16, torch.float16]:
        model = tiny_drafts_model(dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.model.decoder.parameters():
                parameter.mul_(0.5)
        features, mask = tiny_inputs()
        arguments = dict(decoder_input_ids=text_inputs(), frontiers=torch.tensor([[0, 4]] * 3))
        arguments["block_ids"] = model._lay_blocks(text_inputs(), arguments["frontiers"])
        with torch.no_grad():
            single = model(features, mask, **arguments)
            half = model.to(dtype)(features, mask, **arguments)
        assert half.logits.dtype == half.draft_hidden_states.dtype == dtype
        assert (half.logits.float().softmax(-1) - single.logits.softmax(-1)).abs().max() < 0.05
        difference = (half.draft_hidden_states.float() - single.draft_hidden_states).norm()
        assert difference / single.draft_hidden_states.norm() < 0.05

        model = tiny_drafts_model(dtype=torch.float32)
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
            outputs = model.prepare_cross_attention(model.encode(*tiny_inputs()))
            assert model.begin_steps(outputs, np.arange(3), 10).cache.keys.dtype == dtype

    model = tiny_drafts_model(dtype=torch.float32)
    features, mask = tiny_inputs()
    plain = model.generate(features, mask, return_dict_in_generate=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.generate(features, mask, return_dict_in_generate=True)
    assert output.confidence.dtype == torch.float32 and output.confidence.isfinite().all()
    assert output.sequences[:, :4].tolist() == plain.sequences[:, :4].tolist()
    assert model.dtype == torch.float32


@each("encoder", sorted(ENCODERS))
@each("weights", [torch.float32, torch.bfloat16])
@each("dtypes", [(torch.bfloat16, None), (torch.float16, None), (None, torch.bfloat16)])
def test_frames_and_keys_are_taken_into_and_out_of_autocast(encoder, weights, dtypes):
    model = tiny_drafts_model(encoder, dtype=torch.float32)
    features, mask = tiny_inputs(encoder)
    with torch.no_grad():
        for parameter in model.model.decoder.parameters():
            parameter.mul_(0.5)
        expected = model(features, mask, decoder_input_ids=text_inputs()).logits.softmax(-1)
        model.to(weights)

        def under(dtype):
            return torch.autocast("cpu", dtype=dtype, enabled=dtype is not None)

        if {weights, *dtypes} >= {torch.bfloat16, torch.float16}:
            message = "`torch.autocast` to torch.float16 .* weights of torch.bfloat16 .*`dtype=torch.float32`"
            outputs = model.encode(features, mask)
            with under(dtypes[0]), pytest.raises(ValueError, match=message):
                model.encode(features, mask)
            with under(dtypes[0]), pytest.raises(ValueError, match=message):
                model.generate(encoder_outputs=outputs)
            return
        with under(dtypes[0]):
            frames = model.encode(features, mask)
            with_keys = model.prepare_cross_attention(frames)
        for outputs in (frames, with_keys):
            with under(dtypes[1]):
                logits = model(encoder_outputs=outputs, decoder_input_ids=text_inputs()).logits
                text = model.generate(encoder_outputs=outputs, max_new_tokens=6)
            assert (logits.float().softmax(-1) - expected).abs().max() < 0.05
            # Half precision may turn a near tie.
            first = expected[:, 0]
            assert (first.gather(1, text[:, :1])[:, 0] > first.amax(-1) - 0.05).all()


def test_drafts_and_safetensors_are_saved_and_loaded(tmp_path):
    model = tiny_drafts_model(decoder_config=dict(draft_vocab_size=30))
    with torch.no_grad():
        model.model.decoder.drafts.head.token_ids.copy_(torch.arange(30) * 2 - 1).clamp_(min=0)
    model.save_pretrained(tmp_path)
    loaded, report = MDMASRForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.dtype == torch.float64
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    features, mask = tiny_inputs()
    ours, theirs = (m.generate(features, mask, return_dict_in_generate=True) for m in (model, loaded))
    assert torch.equal(ours.sequences, theirs.sequences) and ours.struck_drafts == theirs.struck_drafts

    model = tiny_model()
    model.config.save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    with pytest.raises(OSError, match="model.safetensors"):
        MDMASRForConditionalGeneration.from_pretrained(tmp_path / "pickled")
    with pytest.raises(ValueError, match="`use_safetensors=False` is refused"):
        MDMASRForConditionalGeneration.from_pretrained(tmp_path / "pickled", use_safetensors=False)


# --- training drafts ---

DRAFT_LABELS = torch.tensor([[5, 6, 7, 8, EOS], [9, 10, EOS, -100, -100], [11, EOS, -100, -100, -100]])


@each("encoder, prompt", [*((one, [START]) for one in sorted(ENCODERS)), ("whisper", [START, 4])])
def test_the_losses_of_drafts_by_hand(encoder, prompt):
    model = tiny_drafts_model(encoder, decoder_config=dict(draft_vocab_size=40))
    features, mask = tiny_inputs(encoder)
    labels = torch.tensor([[5, 6, 7, 50, EOS], [9, 10, EOS, -100, -100], [11, EOS, -100, -100, -100]])
    objective = DraftObjective(draft_weight=0.25)
    with torch.no_grad():
        out = model(
            features,
            mask,
            labels=labels,
            prompt_ids=torch.tensor([prompt] * 3),
            objective=objective,
            generator=torch.Generator().manual_seed(3),
        )
        # A position for every token of the text, drawn anew.
        drawn = torch.rand(3, 6, generator=torch.Generator().manual_seed(3))
        frontiers = len(prompt) - 1 + (drawn * torch.tensor([[5], [3], [2]])).long()
        if len(prompt) > 1:
            # And one that begins the text, and sees nothing of the donor's.
            frontiers = torch.cat([torch.zeros(3, 1, dtype=torch.long), frontiers], dim=1)
        head, embed = model.model.decoder.drafts.head, model.model.decoder.embed_ids
        losses, weights, donor, right = [], [], [], []
        for row, length in enumerate((5, 3, 2)):
            ids = torch.cat([torch.tensor(prompt), labels[row, :length]])
            seen = model.encode(features[row : row + 1, : int(mask[row].sum())].double())
            own = frontiers[row : row + 1]
            blocks = torch.full((1, own.shape[1], 3), model.config.mask_token_id)
            blocks[0, :, 0] = ids[own[0] + 1]
            visible = torch.arange(len(ids) - 1) <= own[..., None]
            visible[:, :1] &= len(prompt) == 1
            result = model(
                decoder_input_ids=ids[None, :-1],
                encoder_outputs=seen,
                frontiers=own,
                frontier_mask=visible,
                block_ids=blocks,
            )
            of_text = result.logits[0, len(prompt) - 1 :].log_softmax(dim=-1)
            donor += (-of_text[torch.arange(length), labels[row, :length]]).tolist()
            for place, frontier in enumerate(frontiers[row].tolist()):
                for k in range(3):
                    target = frontier + 2 + k
                    # Beyond the end there is nothing to draft, and the short list has the ids up to 39.
                    if target >= len(ids) or ids[target] >= 40:
                        continue
                    states = head(
                        result.draft_hidden_states[0, place, k], embed(ids[target - 1]), embed(ids[target - 2])
                    )
                    log_probs = (states @ model.get_input_embeddings().weight[:40].T).log_softmax(dim=-1)
                    if (bias := getattr(model.proj_out, "bias", None)) is not None:
                        assert not bias.any()
                    losses.append(-(0.75**k) * log_probs[ids[target]])
                    weights.append(0.75**k)
                    right.append(float(log_probs.argmax() == ids[target]))
    drafts = sum(losses) / sum(weights)
    assert len(losses) > 10
    torch.testing.assert_close(
        out.step_losses, torch.stack([torch.tensor(donor).mean(), drafts.float()]).float(), check_dtype=False
    )
    assert out.loss.item() == pytest.approx(float(torch.tensor(donor).mean() + 0.25 * drafts), rel=1e-5)
    assert out.step_accuracies[1].item() == pytest.approx(sum(right) / len(right))
    assert out.logits.shape == (3, 5, VOCAB_SIZE)


def test_evaluation_is_seeded_and_padded_labels_change_nothing():
    model = tiny_drafts_model(dtype=torch.float32)
    features, mask = tiny_inputs()
    longer = torch.cat([DRAFT_LABELS, torch.full((3, 4), -100)], dim=1)
    losses = [model(features, mask, labels=labels).step_losses for labels in (DRAFT_LABELS, longer)]
    torch.testing.assert_close(*losses)
    model.train()
    assert model(features, mask, labels=DRAFT_LABELS).loss != model(features, mask, labels=DRAFT_LABELS).loss

    model = tiny_model()

    def loss(seed=None):
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return model(features, mask, labels=LABELS, generator=generator).loss.item()

    assert loss() == loss() and loss(3) == loss(3) != loss(4)
    model.train()
    assert loss(3) == loss(3) and loss() != loss()


def test_drafts_learn_behind_the_rows_that_are_given():
    model, (features, mask) = tiny_drafts_model(), tiny_inputs()
    prompt, tokens = torch.tensor([[START, 7]]).expand(3, -1), DRAFT_LABELS[:, :-1].clamp(min=EOS)
    expected = model(features, mask, labels=DRAFT_LABELS, prompt_ids=prompt)
    rows = torch.cat([prompt, tokens], dim=-1)
    given = model(features, mask, decoder_input_ids=rows, labels=DRAFT_LABELS)
    assert torch.equal(given.loss, expected.loss) and torch.equal(given.logits, expected.logits)
    rows[0, -2] = 9
    assert not torch.equal(model(features, mask, decoder_input_ids=rows, labels=DRAFT_LABELS).logits, expected.logits)
    with pytest.raises(ValueError, match="4 tokens.* as long as `labels` .5 tokens"):
        model(features, mask, decoder_input_ids=rows[:, :4], labels=DRAFT_LABELS)


# --- the objective ---

LABELS = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, -100, -100, -100]])


@each("encoder", sorted(ENCODERS))
def test_the_loss_is_of_an_eos_filled_canvas(encoder):
    model = tiny_model(encoder)
    features, mask = tiny_inputs(encoder, seconds=(1.0, 0.6, 0.35))
    t = torch.tensor([1.0, 0.5, 0.7])
    model.generation_config.canvas_tokens_per_s, model.generation_config.canvas_extra_tokens = 10.0, 3
    out = model(features, mask, labels=LABELS, timesteps=t, generator=torch.Generator().manual_seed(5))
    # Canvases of 10 * 1.0 + 3, 10 * 0.6 + 3 and ceil(10 * 0.35) + 3 tokens.
    lengths, length = torch.tensor([13, 9, 7]), 13
    assert out.logits.shape == (3, length, VOCAB_SIZE)
    targets = torch.full((3, length), EOS)
    targets[0, :4], targets[1, :2], targets[2, :1] = torch.tensor([5, 6, 7, 8]), torch.tensor([9, 10]), 11
    inside = torch.arange(length) < lengths[:, None]
    masked = (torch.rand(3, length, generator=torch.Generator().manual_seed(5)) < t[:, None]) & inside
    assert masked[0].all()
    ids = torch.cat([torch.full((3, 1), START), targets.masked_fill(masked, MASK)], dim=-1)
    attention = torch.cat([torch.ones(3, 1, dtype=torch.bool), inside], dim=-1)
    logits = model(features, mask, decoder_input_ids=ids, decoder_attention_mask=attention).logits[:, 1:]
    torch.testing.assert_close(out.loss, masked_diffusion_loss(logits, targets, masked, 1 / t, inside))


def test_the_canvas_of_training():
    model = tiny_model()
    model.generation_config.canvas_length = 256
    features, mask = tiny_inputs()
    assert model(features, mask, labels=LABELS).logits.shape[1] == 256

    model = tiny_model()
    model.generation_config.canvas_tokens_per_s = model.generation_config.canvas_extra_tokens = 0
    assert model(features, mask, labels=LABELS).logits.shape[1] == 5  # four tokens and an end of text


@each("encoder", sorted(ENCODERS))
def test_gradients_reach_what_is_trained_with_and_without_checkpointing(encoder):
    model = tiny_model(encoder).train()
    features, mask = tiny_inputs(encoder)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.model.decoder.gradient_checkpointing
        torch.manual_seed(0)
        model.zero_grad()
        generator = torch.Generator().manual_seed(1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.model.encoder.eval()
        model(features, mask, labels=LABELS, timesteps=torch.ones(3), generator=generator).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    untrained = {n for n, p in model.named_parameters() if p.requires_grad} - set(gradients[0])
    # Wav2vec2's mask embedding belongs to its own pre-training.
    assert untrained <= {"model.encoder.masked_spec_embed"}
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-3)

    model = tiny_drafts_model(encoder)
    features, mask = tiny_inputs(encoder)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model.train()
        model.model.encoder.eval()
        generator = torch.Generator().manual_seed(1)
        model(features, mask, labels=DRAFT_LABELS, generator=generator).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    untrained = {n for n, p in model.named_parameters() if p.requires_grad} - set(gradients[0])
    assert untrained <= {"model.encoder.masked_spec_embed"}
    # The donor learns from both losses: what the masks attend to is its keys.
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients[0].items() if "drafts" in name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=1e-6, msg=name)


def test_the_prompt_and_visible_tokens_bear_no_loss():
    model = tiny_model()
    features, mask = tiny_inputs(seconds=(1.0,))
    labels = torch.tensor([[5, 6, 7]])
    ids = torch.tensor([[START, 5, MASK, 7]])
    logits = model(features, mask, decoder_input_ids=ids).logits
    expected = -logits[0, 2].log_softmax(-1)[6] / 3 / 0.5
    out = model(features, mask, decoder_input_ids=ids, labels=labels, timesteps=torch.tensor([0.5]))
    torch.testing.assert_close(out.loss, expected)
    # A wrong visible token is not penalised either: that is what ISCT's second step trains on.
    wrong = torch.tensor([[START, 9, 8, 9]])
    assert model(features, mask, decoder_input_ids=wrong, labels=labels).loss.item() == 0

    model = tiny_model()
    features, mask = tiny_inputs()
    t = torch.ones(3)
    default = model(features, mask, labels=LABELS, timesteps=t).loss
    same = model(features, mask, labels=LABELS, timesteps=t, prompt_ids=torch.tensor([[START]])).loss
    other = model(features, mask, labels=LABELS, timesteps=t, prompt_ids=torch.tensor([[4, 7]])).loss
    assert default == same != other
