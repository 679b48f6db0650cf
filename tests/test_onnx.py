# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Export to ONNX, and `generate` by ONNX Runtime: the same texts, confidences, evaluations and times as PyTorch's."""

import json
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import jiwer
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_inputs, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_hf import MDMASRPipeline, onnx_export_mdm_asr
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.onnx_export_mdm_asr import export_onnx
from mdm_asr_hf.onnx_mdm_asr import OnnxMDMASR, session_options
from mdm_asr_hf.streaming_mdm_asr import StreamingTranscriber
from mdm_asr_hf.transcription_mdm_asr import Transcriber

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module)

REPOSITORY = Path(__file__).parents[1]
RECORDING = REPOSITORY / "demo" / "common_voice_en_48.flac"
# Recordings with transcripts that may lie beside the repository.
LIBRISPEECH = REPOSITORY.parent / "shared" / "speech" / "eval" / "librispeech"
# A prompt whose language a donor predicts, among ids that the tiny models predict.
TEMPLATE = {
    "tokens": [VOCAB_SIZE, "language"],
    "slots": {"language": {"en": 10, "de": 11, "fr": 12}},
    "detectable": ["language"],
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model, and its export."""
    model, folder = tiny_model(), tmp_path_factory.mktemp("onnx") / "tiny"
    export_onnx(model, folder, processor=tiny_processor())
    return model, OnnxMDMASR.from_pretrained(folder, num_threads=1), folder


def assert_same(model, onnx, seconds=(1.0, 0.6, 0.35), encoder="whisper", **settings):
    """Everything `generate` returns is the same; returns PyTorch's."""
    features, mask = tiny_inputs(encoder, seconds)
    expected, output = (
        one.generate(features, attention_mask=mask, return_dict_in_generate=True, **settings) for one in (model, onnx)
    )
    assert expected.keys() == output.keys()
    assert torch.equal(output.sequences, expected.sequences)
    assert torch.equal(output.commit_steps, expected.commit_steps)
    assert output.nfe.tolist() == expected.nfe.tolist() and output.languages == expected.languages
    torch.testing.assert_close(output.confidence, expected.confidence, rtol=1e-3, atol=1e-4)
    for name in ("token_timestamps", "no_speech"):
        if expected.get(name) is not None:
            torch.testing.assert_close(output[name], expected[name], rtol=1e-3, atol=1e-4)
    return expected


# --- graphs ---


# The shortest, odd and even, with and without room for the silence, and what only padding makes too long.
@pytest.mark.parametrize("seconds", [(0.02,), (0.99, 0.4), (29.75,), (29.9, 3.0), (30.0,)])
def test_encoder(pair, seconds):
    model, onnx, _ = pair
    features, mask = tiny_inputs(seconds=seconds)
    if seconds == (30.0,):
        features, mask = (torch.nn.functional.pad(x, (0, 0, 0, 150)[-2 * (x.dim() - 1) :]) for x in (features, mask))
    with torch.no_grad():
        expected = model.prepare_cross_attention(model.encode(features, mask))
    output = onnx.encode(features, mask)
    inside = expected.attention_mask
    assert torch.equal(output.attention_mask, inside)
    assert (output.last_hidden_state - expected.last_hidden_state)[inside].abs().max() < 1e-4
    for ours, theirs in zip(output.cross_attention_states, expected.cross_attention_states, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one - other).transpose(1, 2)[inside].abs().max() < 1e-4
    assert onnx.prepare_cross_attention(output) is output


def test_decoder_logits(pair):
    model, onnx, _ = pair
    features, mask = tiny_inputs()
    ids = torch.randint(0, VOCAB_SIZE, (3, 9))
    visible = torch.arange(9) < torch.tensor([[9], [5], [7]])
    kept = torch.zeros(3, 6, dtype=torch.bool)
    kept[0, 2:], kept[2, 1] = True, True
    for settings in ({}, {"logits_to_keep": 4}, {"logits_to_keep": kept}):
        arguments = dict(decoder_input_ids=ids, decoder_attention_mask=visible, **settings)
        with torch.no_grad():
            expected = model(encoder_outputs=model.encode(features, mask), **arguments).logits
        logits = onnx(encoder_outputs=onnx.encode(features, mask), **arguments).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_graphs_name_no_place_on_this_machine(pair):
    for name in ("encoder.onnx", "decoder.onnx"):
        assert str(REPOSITORY).encode() not in (pair[2] / name).read_bytes()


# --- generate ---


@pytest.mark.parametrize(
    "settings",
    [
        {"active_ahead": 4, "gamma": 0.5},
        {"active_ahead": 4, "active_behind": 3, "sampler": "eb_conf", "gamma": 1.0},
        {"active_ahead": None, "gamma": 0.5},
        {"sampler": "conf_top_k", "k": 3},
        {"active_ahead": 4, "max_denoising_steps": 4},
        {"active_ahead": 4, "draft_ids": [[5, 6, -100, 7], [], [8]]},
        {"active_ahead": 4, "hotword_ids": [[20, 21], [22]], "hotword_boost": 4.0},
        {"active_ahead": 4, "repair_rounds": 2, "repair_doubled_below": 1.0, "repair_doubtful_below": 0.9},
        {"active_ahead": 4, "return_token_timestamps": True},
        {"suppress_tokens": [3, 4], "canvas_length": 12},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_generate(pair, settings):
    output = assert_same(*pair[:2], **settings)
    assert output.num_steps > 1 and output.sequences.unique().numel() > 5


def test_one_row(pair):
    assert_same(*pair[:2], seconds=(0.7,), active_ahead=4)


def test_samples(pair):
    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    features, mask = tiny_inputs()
    expected, output = (
        model.generate(features, mask, generator=generators(), temperature=1.0, num_return_sequences=2)
        for model in pair[:2]
    )
    assert len(output) == 6 and torch.equal(output, expected)


def test_rows_do_not_depend_on_their_batch(pair):
    _, onnx, _ = pair
    features, mask = tiny_inputs()
    together = onnx.generate(features, mask, active_ahead=4)
    for row, length in enumerate(mask.sum(dim=-1).tolist()):
        alone = onnx.generate(features[row : row + 1, :length], mask[row : row + 1, :length], active_ahead=4)
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()


def test_no_speech(pair):
    model, onnx, _ = pair
    probe = {"weights": [0.1 * i for i in range(16)], "bias": 0.2, "window_frames": 5, "step_frames": 2}
    probe |= {"confidence_weight": 0.5, "confidence_offset": -0.1, "threshold": 0.5}
    features, mask = tiny_inputs()
    chance = model.generate(features, mask, no_speech=probe, return_dict_in_generate=True).no_speech
    # A threshold amid the rows', so that it decides for some.
    probe["threshold"] = float(chance.sort().values[:2].mean())
    output = assert_same(model, onnx, no_speech=probe)
    assert 0 < (output.no_speech > probe["threshold"]).sum() < 3


def test_language_is_detected(pair):
    model, onnx, _ = pair
    output = assert_same(model, onnx, prompt_template=TEMPLATE, language="auto")
    assert set(output.languages) <= {"en", "de", "fr"}


def test_shifted_logits(pair, tmp_path):
    # They are read elsewhere; the graphs are the same.
    folder = shutil.copytree(pair[2], tmp_path / "shifted")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "shift_logits": True}))
    model, onnx = tiny_model(shift_logits=True), OnnxMDMASR.from_pretrained(folder)
    for active_ahead in (4, None):
        shifted = assert_same(model, onnx, active_ahead=active_ahead, return_token_timestamps=True)
    assert not torch.equal(shifted.sequences, assert_same(*pair[:2], active_ahead=None).sequences)


@pytest.mark.parametrize("encoder", ["parakeet", "wav2vec2"])
def test_other_encoders(encoder, tmp_path, monkeypatch):
    # Grouped heads, fixed positions, a bias on the logits; and weights in a file of their own.
    monkeypatch.setattr(onnx_export_mdm_asr, "MAX_EMBEDDED_BYTES", 0)
    model = tiny_model(encoder, decoder_config={"num_key_value_heads": 1})
    export_onnx(model, tmp_path / "out", processor=tiny_processor())
    assert (tmp_path / "out" / "decoder.onnx.data").is_file()
    onnx = OnnxMDMASR.from_pretrained(tmp_path / "out", num_threads=1)
    assert_same(model, onnx, encoder=encoder, active_ahead=4, return_token_timestamps=True)
    assert_same(model, onnx, encoder=encoder, seconds=(1.7,), active_ahead=None)


# --- the checkpoint of the package ---


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The checkpoint, its export, their processor, and the export's folder."""
    folder = tmp_path_factory.mktemp("onnx") / "golden"
    export_onnx(mdm_asr_hf.default_checkpoint(), folder)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(mdm_asr_hf.default_checkpoint(), dtype="float32")
    return model, OnnxMDMASR.from_pretrained(folder), AutoProcessor.from_pretrained(folder), folder


def test_golden(golden):
    model, onnx, processor, _ = golden
    inputs = processor(str(RECORDING))
    for settings in ({}, {"active_ahead": 8, "return_token_timestamps": True}):
        expected, output = (one.generate(**inputs, return_dict_in_generate=True, **settings) for one in (model, onnx))
        assert torch.equal(output.sequences, expected.sequences) and output.nfe.tolist() == expected.nfe.tolist()
        torch.testing.assert_close(output.confidence, expected.confidence, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.token_timestamps, expected.token_timestamps, rtol=0, atol=0.021)
    assert processor.decode(output.sequences[0]) == (REPOSITORY / "demo" / "transcript.txt").read_text().strip()


def test_transcriber_pipeline_and_stream(golden):
    model, onnx, processor, _ = golden
    expected, output = (Transcriber(one, processor, timestamps=True).transcribe(RECORDING) for one in (model, onnx))
    assert output.text == expected.text
    assert [word.text for word in output.words] == [word.text for word in expected.words]
    parts = dict(tokenizer=processor.tokenizer, feature_extractor=processor.feature_extractor)
    assert MDMASRPipeline(model=onnx, **parts)(str(RECORDING))["text"] == expected.text
    samples = torch.from_numpy(load_audio(RECORDING))
    expected, output = (
        [
            (update.committed, update.partial)
            for update in StreamingTranscriber(one, processor).stream(samples.split(8000))
        ]
        for one in (model, onnx)
    )
    assert output == expected and len(output) > 3


def test_the_stages_of_an_export_can_be_watched(pair, monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from work import watch_stages

    features, mask = tiny_inputs()
    seen, widths = [], []

    @contextmanager
    def around(stage):
        seen.append(stage)
        yield

    with watch_stages(pair[1], around, widths.append):
        output = pair[1].generate(features, attention_mask=mask, return_dict_in_generate=True, no_speech=None)
    assert seen.count("encoder") == 1 and len(widths) == output.num_steps > 0
    assert seen.count("decoder") == seen.count("sampler") == output.num_steps


def test_scales_of_positions_change_nothing_but_the_rounding(pair):
    import onnx
    import onnxruntime

    file = pair[2] / "encoder.onnx"
    graph = onnx.load(file)
    onnx_export_mdm_asr._untie_output(graph)
    before = [node.op_type for node in graph.graph.node]
    onnx_export_mdm_asr._scale_positions(graph)
    after = [node.op_type for node in graph.graph.node]
    # The second feed-forward layer of each of the two blocks.
    assert after.count("ReduceMax") - before.count("ReduceMax") == after.count("Abs") - before.count("Abs") == 2
    features, mask = tiny_inputs(seconds=(1.0, 0.4))
    inputs = {"input_features": features.numpy(), "attention_mask": mask.long().numpy()}
    expected, output = (
        onnxruntime.InferenceSession(one).run(None, inputs) for one in (str(file), graph.SerializeToString())
    )
    for one, other in zip(output, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), rtol=1e-4, atol=1e-5)


def test_large_sums_of_int8_are_not_cut_off(tmp_path):
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    # 8 products of the largest activation and the largest weight: 8 x 3 x 2, of which 16 bits hold half.
    weight = numpy_helper.from_array(np.array([[2.0, -2.0]] * 8, dtype=np.float32), "weight")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name, width in (("in", 8), ("out", 2))
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["in", "weight"], ["out"])], "sum", *zip(ends), [weight])
    file = tmp_path / "sum.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    onnx_export_mdm_asr._quantize(file)
    session = onnxruntime.InferenceSession(str(file), session_options(1))
    (sums,) = session.run(None, {"in": np.full((1, 8), 3.0, dtype=np.float32)})
    np.testing.assert_allclose(sums, [[48.0, -48.0]], rtol=1e-3)


def test_int8(golden, tmp_path, monkeypatch, run_command):
    model, _, processor, exported = golden
    for name in ("_export_encoder", "_export_decoder"):
        # Quantising starts from the graphs that are there already.
        monkeypatch.setattr(onnx_export_mdm_asr, name, lambda model, path: shutil.copyfile(exported / path.name, path))
    folder = tmp_path / "int8"
    code, out, _ = run_command("export", "--format", "onnx", "--int8", "--output", folder)
    assert code == 0 and out.startswith(f"wrote {folder}: decoder.onnx 4")
    # The embeddings stay in fp32, which is 25 MB of the decoder.
    assert (folder / "decoder.onnx").stat().st_size < 42e6 and (folder / "encoder.onnx").stat().st_size < 15e6
    code, out, _ = run_command("transcribe", "--model", folder, RECORDING)
    assert code == 0 and out.startswith("He had found where his treasure was")
    clips = [str(RECORDING)]
    if LIBRISPEECH.is_dir():
        rows = [json.loads(line) for line in (LIBRISPEECH / "metadata.jsonl").read_text().splitlines()]
        rows = sorted(rows, key=lambda row: row["duration_s"])[20:200:30]
        clips += [str(LIBRISPEECH / row["file_name"]) for row in rows]
    inputs = processor(clips)
    expected, texts = (
        [text.lower() for text in processor.batch_decode(one.generate(**inputs, active_ahead=8))]
        for one in (model, OnnxMDMASR.from_pretrained(folder))
    )
    edits = jiwer.process_words(expected, texts)
    assert edits.substitutions + edits.deletions + edits.insertions <= len(clips)


# --- errors ---


def test_wrong_folders(pair, tmp_path, run_command):
    with pytest.raises(ValueError, match=r"`folder` .* has no encoder.onnx, decoder.onnx, config.json"):
        OnnxMDMASR.from_pretrained(tmp_path)
    damaged = shutil.copytree(pair[2], tmp_path / "damaged")
    (damaged / "decoder.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="cannot be loaded: .* Export it again"):
        OnnxMDMASR.from_pretrained(damaged)
    with pytest.raises(ValueError, match="`output` .* is not an empty folder"):
        export_onnx(pair[0], damaged, processor=tiny_processor())
    with pytest.raises(ValueError, match="`processor` is missing"):
        export_onnx(pair[0], tmp_path / "new")
    with pytest.raises(ValueError, match="`model` is a OnnxMDMASR"):
        export_onnx(pair[1], tmp_path / "new", processor=tiny_processor())
    with pytest.raises(ValueError, match="`is_causal=True` cannot be exported"):
        export_onnx(tiny_model(decoder_config={"is_causal": True}), tmp_path / "new", processor=tiny_processor())
    assert not (tmp_path / "new").exists()
    code, _, error = run_command("export", "--output", damaged)
    assert code == 1 and "is not an empty folder" in error
    code, _, error = run_command("transcribe", "--model", pair[2], "--device", "cuda", RECORDING)
    assert code == 1 and "`device` 'cuda'" in error
    code, _, error = run_command("transcribe", "--model", pair[2], "--dtype", "int8", RECORDING)
    assert code == 1 and "`dtype` 'int8' cannot be used with the ONNX model" in error


def test_waiting_threads_leave_the_cores_to_others(pair):
    _, onnx, _ = pair
    for session in (onnx.encoder, onnx.decoder.session):
        assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_wrong_arguments(pair):
    _, onnx, folder = pair
    with pytest.raises(ValueError, match="`num_threads` must be an integer of at least 1, got 0"):
        OnnxMDMASR.from_pretrained(folder, num_threads=0)
    with pytest.raises(ValueError, match=r"must be \(B, T, 80\)"):
        onnx.generate(torch.zeros(1, 80, 100))
    with pytest.raises(ValueError, match="hold 31.0 s of audio, but this encoder takes at most 30.0 s"):
        onnx.generate(torch.randn(1, 3100, 80))
    with pytest.raises(ValueError, match="have no `cross_attention_states`"):
        onnx.generate(torch.randn(1, 90, 80), encoder_outputs=pair[0].encode(torch.randn(1, 90, 80)))
    with pytest.raises(ValueError, match="cannot be moved to 'cuda'"):
        onnx.to("cuda")
    with pytest.raises(ValueError, match="cannot be moved to 'torch.bfloat16'"):
        onnx.to(torch.bfloat16)
    assert onnx.to("cpu").eval() is onnx


def test_a_model_that_cannot_be_exported(tmp_path, monkeypatch):
    model = tiny_model()
    # What depends on the data has no graph.
    monkeypatch.setattr(type(model), "encode", lambda self, features, mask: self.model.encode(features[mask.bool()]))
    with pytest.raises(ValueError, match="The encoder of type 'whisper' cannot be exported to ONNX"):
        export_onnx(model, tmp_path / "out", processor=tiny_processor())


@pytest.mark.parametrize("module", ["onnxscript", "onnxruntime"])
def test_without_the_extra(pair, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}: `pip install "mdm_asr_hf\[onnx\]"`'):
        if module == "onnxscript":
            export_onnx(pair[0], tmp_path / "out", processor=tiny_processor())
        else:
            OnnxMDMASR.from_pretrained(pair[2])
