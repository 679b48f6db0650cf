"""Export to ONNX, and `generate` by ONNX Runtime: the same texts, confidences, evaluations and times as PyTorch's."""

import ast
import json
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jiwer
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx_exports import exported_checkpoint, graphs_of
from tables import each
from tiny_models import VOCAB_SIZE, tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from transformers import AutoModelForSpeechSeq2Seq, AutoProcessor

import mdm_asr_hf
from mdm_asr_cli.terminal import _leave_out_pytorch
from mdm_asr_hf import MDMASRGenerateOutput, OnnxProcessor
from mdm_asr_hf.audio_mdm_asr import load_audio
from mdm_asr_hf.drafting_mdm_asr import DraftTree
from mdm_asr_hf.onnx import export
from mdm_asr_hf.onnx.export import export_onnx
from mdm_asr_hf.onnx.model import OnnxEncoderOutput, OnnxMDMASR, _keys, session_options
from mdm_asr_hf.transcribe.streaming import StreamingTranscriber
from mdm_asr_hf.transcribe.transcriber import Transcriber
from mdm_asr_hf.transcribe.transcript import token_texts

for module in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(module)

REPOSITORY = Path(__file__).parents[2]
RECORDING = REPOSITORY / "demo" / "common_voice_en_48.flac"
# Recordings with transcripts that may lie beside the repository.
LIBRISPEECH = REPOSITORY.parent / "shared" / "speech" / "eval" / "librispeech"
# A prompt whose language a donor predicts and that has a place for earlier text, of ids that the tiny models predict.
TEMPLATE = {
    "tokens": [VOCAB_SIZE, "language"],
    "slots": {"language": {"en": 10, "de": 11, "fr": 12}},
    "detectable": ["language"],
    "previous": 13,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny model, and its export."""
    model, folder = tiny_drafts_model(dtype=torch.float32), tmp_path_factory.mktemp("onnx") / "tiny"
    # Where autocast is on, as it may be in a training, the graphs are no others.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        export_onnx(model, folder, processor=tiny_processor())
    return model, OnnxMDMASR.from_pretrained(folder, num_threads=1), folder


def as_tensors(output):
    """An output of arrays as one of tensors."""
    values = {n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in vars(output).items()}
    return MDMASRGenerateOutput(**values)


def assert_same(model, onnx, seconds=(1.0, 0.6, 0.35), encoder="whisper", **settings):
    """Everything `generate` returns is the same; returns PyTorch's."""
    features, mask = tiny_inputs(encoder, seconds)
    settings = {"return_dict_in_generate": True, "max_new_tokens": 40, **settings}
    expected, output = (one.generate(features, attention_mask=mask, **settings) for one in (model, onnx))
    output = as_tensors(output)
    assert expected.keys() == output.keys()
    for name in ("sequences", "commit_steps", "nfe", "accepted_drafts", "rejected_drafts", "token_branches"):
        assert torch.equal(output[name], expected[name]), name
    assert output.struck_drafts == expected.struck_drafts and output.languages == expected.languages
    for name in ("confidence", "token_timestamps", "no_speech"):
        if expected.get(name) is not None:
            torch.testing.assert_close(output[name], expected[name], rtol=1e-3, atol=1e-4)
    return expected


# --- graphs ---


# The shortest, odd and even, with and without room for the silence, and what only padding makes too long.
@each("silence_s", [None, 30.0])
@each("seconds", [(0.02,), (0.99, 0.4), (29.75,), (30.0,)])
def test_encoder(pair, seconds, silence_s):
    model, onnx, _ = pair
    features, mask = tiny_inputs(seconds=seconds)
    if seconds == (30.0,):
        features, mask = (torch.nn.functional.pad(x, (0, 0, 0, 150)[-2 * (x.dim() - 1) :]) for x in (features, mask))
    with torch.no_grad():
        expected = model.prepare_cross_attention(model.encode(features, mask, trailing_silence_s=silence_s))
    output = onnx.encode(features, mask, trailing_silence_s=silence_s)
    inside, num_frames = expected.attention_mask, expected.attention_mask.shape[1]
    output = OnnxEncoderOutput(
        torch.from_numpy(output.last_hidden_state),
        torch.from_numpy(output.attention_mask),
        {name: torch.from_numpy(values) for name, values in output.cross_attention_states.items()},
    )
    # Padded to a multiple of 64.
    assert output.attention_mask.shape[1] == -(-num_frames // 64) * 64
    assert not output.attention_mask[:, num_frames:].any()
    assert torch.equal(output.attention_mask[:, :num_frames], inside)
    frames = output.last_hidden_state[:, :num_frames]
    assert (frames - expected.last_hidden_state)[inside].abs().max() < 1e-4
    for layer, pair in enumerate(expected.cross_attention_states):
        for kind, other in zip(("cross_key", "cross_value"), pair, strict=True):
            one = output.cross_attention_states[f"{kind}.{layer}"]
            assert (one[:, :, :num_frames] - other).transpose(1, 2)[inside].abs().max() < 1e-4
    assert onnx.prepare_cross_attention(output) is output


def test_encoder_of_waveforms(tmp_path):
    import onnxruntime

    model = tiny_drafts_model("wav2vec2", dtype=torch.float32)
    with export._quiet():
        export._export_encoder(model, tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "encoder.onnx"), session_options(1))
    for seconds in (0.35, 1.7):
        samples, mask = tiny_inputs("wav2vec2", (seconds,))
        with torch.no_grad():
            expected = model.encode(samples, mask).last_hidden_state
        (frames,) = session.run(["frames"], {"input_features": samples.numpy()})
        assert frames.shape == expected.shape and (torch.from_numpy(frames) - expected).abs().max() < 1e-4


def test_steps_and_graphs(pair):
    model, onnx, _ = pair
    tokens = np.array([[VOCAB_SIZE, 5, 6, 7, 9], [VOCAB_SIZE, 8, 9, 0, 0]])
    # Prompts of different lengths; then a token each, and branches whose padding stands amid the longest row.
    branches = [(np.array([[10, 11], [12, 13]]), np.array([1, 2])), (np.array([[20, 21]] * 2), np.array([2, 1]))]
    masks, results = [VOCAB_SIZE + 1, 31], []
    for one in (model, onnx):
        with torch.no_grad():
            outputs = one.prepare_cross_attention(one.encode(*tiny_inputs(seconds=(1.0, 0.6, 0.3))))
            steps, logits, drafts = one.begin_steps(outputs, np.array([0, 1]), 12), [], []
            # Before there are keys.
            drafts.append(steps.propose(np.array([[30, *masks], [32, *masks]]), np.array([5, 8]), np.array([0, 1]), 2))
            for lengths, cached, its_branches in (([4, 2], [0, 0], []), ([5, 3], [4, 2], branches)):
                tree = DraftTree.lay(tokens, np.array(lengths), np.array(cached), its_branches, steps.padding_slot)
                every = np.arange(tree.ids.shape[1])[None].repeat(2, axis=0)
                logits.append(steps.verify(tree, every)[tree.slots != steps.padding_slot])
                frontiers = np.array(lengths) - 1
                drafts.append(steps.propose(np.array([[30, *masks], [32, *masks]]), np.array([5, 8]), frontiers, 2))
            # The second branch's keys become those of the text; then one row alone goes on.
            steps.move(np.array([[6, 7], [5, 12]]), np.array([[5, 6], [3, 12]]))
            steps.keep_rows(np.array([1]))
            tree = DraftTree.lay(tokens[1:], np.array([4]), np.array([3]), [], steps.padding_slot)
            logits.append(steps.verify(tree, np.array([[0]]))[0])
        results.append((logits, drafts))
    for expected, output in zip(*(logits for logits, _ in results), strict=True):
        np.testing.assert_allclose(output, expected, rtol=1e-3, atol=1e-4)
    for (ids, entropies), (other_ids, other_entropies) in zip(*(drafts for _, drafts in results), strict=True):
        assert np.array_equal(ids, other_ids) and ids.shape == (2, 2)
        np.testing.assert_allclose(entropies, other_entropies, rtol=1e-3, atol=1e-4)
    assert [len(one) for one in results[0][0]] == [6, 8, 1]

    files = [file for file in pair[2].iterdir() if file.suffix == ".onnx"]
    assert len(files) == 3 and not any(str(REPOSITORY).encode() in file.read_bytes() for file in files)

    _, onnx, _ = pair
    for session in (onnx.encoder, onnx.decoder, onnx.drafts):
        options = session.get_session_options()
        for name in ("session.force_spinning_stop", "session.use_env_allocators"):
            assert options.get_session_config_entry(name) == "1"


@pytest.fixture(scope="module")
def exact(pair, tmp_path_factory):
    """The tiny model in int8, what its encoder gives for three clips, and random texts of theirs."""
    folder = tmp_path_factory.mktemp("onnx") / "int8"
    with graphs_of(pair[2]):
        export_onnx(pair[0], folder, int8=True, processor=tiny_processor())
    model = OnnxMDMASR.from_pretrained(folder, num_threads=1)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 80))
    return model, model.encode(*tiny_inputs()), tokens


def test_sizes_may_be_read_from_any_input(pair, exact, tmp_path):
    """Which one of those that have it the exporter takes differs from model to model."""
    import onnx

    shutil.copytree(pair[2], tmp_path / "graphs")
    for path in (tmp_path / "graphs" / "decoder.onnx", tmp_path / "graphs" / "drafts.onnx"):
        graph = onnx.load(path)
        sizes = [node for node in graph.graph.node if node.op_type == "Shape"]
        places = {"frame_mask": 1, "cross_key.1": 2, "cross_value.1": 2}
        read = [node for node in sizes if places.get(node.input[0]) == node.attribute[1].i]
        assert read and all(node.attribute[1].name == "start" for node in read)
        for node in read:
            node.input[0] = "cross_key.1"
            for attribute in node.attribute:
                attribute.i = {"start": 2, "end": 3}[attribute.name]
        onnx.save(graph, path)
    with graphs_of(tmp_path / "graphs"):
        export_onnx(pair[0], tmp_path / "int8", int8=True, processor=tiny_processor())
    outputs = [
        model.generate(*tiny_inputs(), max_new_tokens=20, return_dict_in_generate=True)
        for model in (exact[0], OnnxMDMASR.from_pretrained(tmp_path / "int8", num_threads=1))
    ]
    assert np.array_equal(outputs[0].sequences, outputs[1].sequences)
    assert np.array_equal(outputs[0].confidence, outputs[1].confidence)


def token_by_token(exact, row, length):
    """Logits (L, V) behind each token of a text, one a call."""
    model, outputs, tokens = exact
    steps, logits = model.begin_steps(outputs, np.array([row]), 100), []
    for end in range(1, length + 1):
        tree = DraftTree.lay(tokens[[row], :end], np.array([end]), np.array([end - 1]), [], steps.padding_slot)
        logits.append(steps.verify(tree, np.array([[0]]))[0, 0])
    return np.stack(logits)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    cuts=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)), min_size=1, max_size=12),
)
def test_a_rows_int8_logits_do_not_depend_on_what_is_computed_with_them(exact, rows, cuts):
    model, outputs, tokens = exact
    expected = [token_by_token(exact, row, 80) for row in range(3)]
    steps, at = model.begin_steps(outputs, np.array(rows), 110), 1
    texts, many = tokens[rows], np.ones(len(rows), dtype=np.int64)
    for number, others in cuts:
        # As many drafts as are accepted, and a branch of others beside them.
        number = min(number, 79 - at)
        branches = [(texts[:, at : at + number], many * number), (texts[:, :others] * 0 + 7, many * others)]
        tree = DraftTree.lay(texts[:, :at], many * at, many * (at - 1), branches, steps.padding_slot)
        columns = np.arange(number + 1)[None].repeat(len(rows), axis=0)
        logits = steps.verify(tree, columns)
        for i, row in enumerate(rows):
            assert np.array_equal(logits[i], expected[row][at - 1 : at + number]), (row, at)
        at += number
    assert len({one.tobytes() for one in expected}) == 3


# --- generate ---


# Of two threads, each writes some rows of a batch.
@each("num_threads", [1, 2])
def test_generate_is_pytorchs(pair, num_threads):
    models = pair[0], OnnxMDMASR.from_pretrained(pair[2], num_threads=num_threads)
    for options in [
        {},
        {"gamma": 0.5},
        {"draft_branches": []},
        {"draft_length": 2},
        # The first text as it is, and of the last one a part.
        {"draft_ids": [slice(None), slice(0), slice(6)]},
        {"draft_ids": [slice(None), slice(0), slice(None)], "prefix_ids": [[4, 5], [], [5, 6]]},
        {"suppress_tokens": [53, 31], "begin_suppress_tokens": [24]},
        {"prompt_template": TEMPLATE, "language": "auto"},
        {"prompt_template": TEMPLATE, "previous_ids": [[7, 8, 9], [], [5]], "prefix_ids": [[4], [], [5, 6]]},
        {"return_token_timestamps": True, "no_speech_token_id": 5},
        {"hotword_ids": [[[7, 8], [9]], [], [[31, 4]]]},
    ]:
        if "draft_ids" in options:
            parts = options.pop("draft_ids")
            texts = assert_same(*models, **options).sequences.tolist()
            options["draft_ids"] = [text[part] for text, part in zip(texts, parts, strict=True)]
        output = assert_same(*models, **options)
        assert output.num_steps > 1 and output.sequences.unique().numel() > 5
        assert options.get("draft_branches") == [] or output.accepted_drafts.sum() > 0
        assert "draft_ids" not in options or output.accepted_drafts[:, 1].tolist()[::2] > [0, 0]

    # Every text is: by the silence of 30 s, and then twice by a temperature.
    output = assert_same(*models, logprob_threshold=0.0, temperature=[0.0, 0.5], max_new_tokens=8)
    assert output.nfe.min() > assert_same(*models, max_new_tokens=8).nfe.max()

    for generator in [0, [1, 2, 3]]:
        features, mask = tiny_inputs()
        options = {"temperature": 1.0, "num_return_sequences": 2, "max_new_tokens": 20}
        expected, output = (model.generate(features, mask, generator=generator, **options) for model in models)
        assert len(output) == 6 and output.tolist() == expected.tolist()


def test_rows_and_threads_do_not_depend_on_others(pair):
    _, onnx, _ = pair
    features, mask = tiny_inputs()
    together = onnx.generate(features, mask)
    for row, length in enumerate(mask.sum(dim=-1).tolist()):
        alone = onnx.generate(features[row : row + 1, :length], mask[row : row + 1, :length])
        assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()

    _, onnx, _ = pair
    features, mask = tiny_inputs(seconds=(0.5, 1.0, 0.3, 0.8))
    expected = onnx.generate(features, mask).tolist()
    outputs = onnx.encode(features, mask)
    before = [values.copy() for values in outputs.cross_attention_states.values()]
    for _ in range(2):
        assert onnx.generate(features, mask, encoder_outputs=outputs).tolist() == expected
    assert all(map(np.array_equal, before, outputs.cross_attention_states.values()))

    # Rows of a batch are done side by side, for which the first thread makes what it takes, once.
    onnx = OnnxMDMASR.from_pretrained(pair[2], num_threads=2)
    made, make = [], onnx.workers.load

    def make_slowly():
        made.append(time.sleep(0.1))
        return make()

    onnx.workers.load = make_slowly
    batches = [tiny_inputs(seconds=(1.0, 0.4 + 0.03 * i), seed=i) for i in range(20)]
    barrier = threading.Barrier(8)

    def call(i):
        if i < 8:
            barrier.wait()
        output = onnx.generate(*batches[i], max_new_tokens=20, return_dict_in_generate=True)
        return output.sequences.tolist(), output.confidence.tolist()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(call, range(len(batches))))
    assert len(made) == 1
    barrier = threading.Barrier(1)
    assert found == [call(i) for i in range(len(batches))]


def test_batches_of_recordings_side_by_side(pair, monkeypatch):
    alone, several = (OnnxMDMASR.from_pretrained(pair[2], num_threads=number) for number in (1, 2))
    random = np.random.default_rng(0)
    clips = [random.standard_normal(n).astype(np.float32) / 10 for n in random.integers(3000, 16000, 11)]
    expected = list(Transcriber(alone, tiny_processor(), batch_size=2, vad="none").transcribe_all(clips))
    transcriber, seen, threads = Transcriber(several, tiny_processor(), batch_size=2, vad="none"), [], set()
    generate = OnnxMDMASR.generate

    def watched(model, **inputs):
        threads.add(threading.current_thread())
        if len(inputs["input_features"]) == 1 and len(seen) > len(clips):
            raise ValueError("It is too long.")
        return generate(model, **inputs)

    monkeypatch.setattr(OnnxMDMASR, "generate", watched)
    found = list(transcriber.transcribe_all(clips, on_window=lambda place, window: seen.append(place)))
    assert [(i, one.text, one.nfe) for i, one in found] == [(i, one.text, one.nfe) for i, one in expected]
    assert sorted(seen) == list(range(len(clips))) and threading.main_thread() not in threads

    # The one that is alone in its batch fails, no other; and who goes away leaves nothing undone for the next.
    seen.extend(seen)
    results = [one for _, one in transcriber.transcribe_all(clips)]
    assert [str(one) for one in results if isinstance(one, ValueError)] == ["It is too long."]
    seen.clear()

    def leave(place, window):
        raise RuntimeError("It is enough.")

    with pytest.raises(RuntimeError, match="It is enough"):
        list(transcriber.transcribe_all(clips, on_window=leave))
    assert transcriber.transcribe(clips[0]).text == expected[0][1].text


def test_canary_like_models(tmp_path, monkeypatch):
    # Grouped heads, fixed positions, a bias on the logits, fewer draft layers; and weights in a file of their own.
    monkeypatch.setattr(export, "MAX_EMBEDDED_BYTES", 0)
    settings = {"num_key_value_heads": 1, "draft_layers": 1}
    encoder = {"num_hidden_layers": 1}
    model = tiny_drafts_model("parakeet", dtype=torch.float32, encoder_config=encoder, decoder_config=settings)
    export_onnx(model, tmp_path / "out", processor=tiny_processor())
    assert (tmp_path / "out" / "decoder.onnx.data").is_file()
    onnx = OnnxMDMASR.from_pretrained(tmp_path / "out", num_threads=1)
    output = assert_same(model, onnx, encoder="parakeet", return_token_timestamps=True)
    assert output.accepted_drafts[:, 0].sum() > 0
    assert_same(model, onnx, encoder="parakeet", seconds=(1.7,))
    # In int8, which the keys of groups of heads are not.
    with graphs_of(tmp_path / "out"):
        export_onnx(model, tmp_path / "int8", int8=True, processor=tiny_processor())
    quantised = OnnxMDMASR.from_pretrained(tmp_path / "int8", num_threads=1)
    features, mask = tiny_inputs("parakeet", (1.0, 0.6))
    drafted, plain = (
        quantised.generate(features, attention_mask=mask, max_new_tokens=20, **settings)
        for settings in ({}, {"draft_branches": []})
    )
    assert np.array_equal(drafted, plain)


# --- the checkpoint of the package ---


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """The checkpoint, its export, their processor, and the export's folder."""
    folder = exported_checkpoint(tmp_path_factory)
    model = AutoModelForSpeechSeq2Seq.from_pretrained(mdm_asr_hf.default_checkpoint(), dtype="float32")
    return model, OnnxMDMASR.from_pretrained(folder, num_threads=2), AutoProcessor.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def processor(golden):
    """The export's own."""
    return OnnxProcessor.from_pretrained(golden[3])


def test_golden_transcript_and_stream(golden):
    model, onnx, processor, _ = golden
    inputs = processor(str(RECORDING))
    settings = {"return_dict_in_generate": True, "return_token_timestamps": True}
    expected, output = (one.generate(**inputs, **settings) for one in (model, onnx))
    output = as_tensors(output)
    assert torch.equal(output.sequences, expected.sequences) and output.nfe.tolist() == expected.nfe.tolist()
    assert torch.equal(output.token_branches, expected.token_branches) and set(output.token_branches[0].tolist()) > {0}
    torch.testing.assert_close(output.confidence, expected.confidence, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(output.token_timestamps, expected.token_timestamps, rtol=0, atol=0.021)
    assert processor.decode(output.sequences[0]).startswith("He had found where his treasure was")
    # Rows of a batch are done side by side.
    batch = onnx.generate(**processor([str(RECORDING), load_audio(RECORDING)[:32_000]]))
    assert onnx.workers._model is not None
    assert batch[0, : output.sequences.shape[1]].tolist() == output.sequences[0].tolist()
    assert processor.decode(batch[1]).startswith("He had found where his") and batch.shape[0] == 2

    model, onnx, processor, _ = golden
    expected, output = (Transcriber(one, processor, timestamps=True).transcribe(RECORDING) for one in (model, onnx))
    assert output.text == expected.text
    assert [word.text for word in output.words] == [word.text for word in expected.words]
    # Of windows, each thread decodes some.
    expected, output = (
        Transcriber(one, processor, max_window_s=1.5, batch_size=2).transcribe(RECORDING) for one in (model, onnx)
    )
    assert output.text == expected.text and output.nfe == expected.nfe
    samples = torch.from_numpy(load_audio(RECORDING))
    expected, output = (
        [
            (update.committed, update.partial)
            for update in StreamingTranscriber(one, processor).stream(samples.split(8000))
        ]
        for one in (model, onnx)
    )
    assert output == expected and len(output) > 3

    _, _, expected, folder = golden
    processor = OnnxProcessor.from_pretrained(folder)
    assert processor.hotword_ids(["Zorblax", "New York"]) == expected.hotword_ids(["Zorblax", "New York"])
    assert processor.hotword_ids(["Zürich"]).letters == expected.hotword_ids(["Zürich"]).letters
    text = " I said: “it's 5 o'clock”, naïve 東京 🙂."
    ids = processor.previous_ids(text)
    assert ids == expected.previous_ids(text) and processor.previous_ids(" ") == []
    rows = [[50257, *ids, 50256], [50362, 50256, 50256]]
    assert processor.batch_decode(rows) == expected.batch_decode(rows) == [text.strip(), ""]
    assert processor.batch_decode(rows, False) == expected.batch_decode(rows, skip_special_tokens=False)
    # Pieces of a character have no text of their own.
    pieces = [token_texts(one.tokenizer, ids) for one in (processor, expected)]
    assert pieces[0] == pieces[1] and "".join(pieces[0]).strip() == text.strip()
    with pytest.raises(ValueError, match="has no mel_filters.npy, tokenizer.json"):
        OnnxProcessor.from_pretrained(folder.parent)


@each("is_exact", [True, False])
def test_large_sums_of_int8_are_not_cut_off(is_exact):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    # 8 products of the largest activation and the largest weight: 8 x 3 x 2, of which 16 bits hold half.
    weight = numpy_helper.from_array(np.array([[2.0, -2.0]] * 8, dtype=np.float32), "weight")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name, width in (("in", 8), ("out", 2))
    ]
    bias = numpy_helper.from_array(np.array([1.0, 2.0], dtype=np.float32), "bias")
    nodes = [helper.make_node("MatMul", ["in", "weight"], ["sum"]), helper.make_node("Add", ["sum", "bias"], ["out"])]
    graph = helper.make_graph(nodes, "sum", *zip(ends), [weight, bias])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    export._quantize(model, is_exact)
    session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))
    (sums,) = session.run(None, {"in": np.full((1, 8), 3.0, dtype=np.float32)})
    np.testing.assert_allclose(sums, [[49.0, -46.0]], rtol=1e-3)


@each("is_exact", [True, False])
@each("largest", [False, True])
def test_attention_to_frames_in_int8(largest, is_exact):
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    def run_quantised(nodes, outputs, shape, feed, initializers=()):
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, feed_shape) for name, feed_shape in shape]
        ends = [helper.make_tensor_value_info(*output) for output in outputs]
        graph = helper.make_graph(nodes, "frames", infos, ends, list(initializers))
        opsets = [helper.make_opsetid("", 20)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        export._quantize_frames(model, is_exact)
        session = onnxruntime.InferenceSession(model.SerializeToString(), session_options(1))
        return dict(zip((one.name for one in session.get_outputs()), session.run(None, feed), strict=True))

    make_random = np.random.default_rng(0)
    heads, frames, size, queries = 2, 100, 64, 3
    shapes = {"query": (1, heads, queries, size), "key": (1, heads, frames, size), "value": (1, heads, frames, size)}
    query, key, value = (make_random.standard_normal(shape).astype(np.float32) for shape in shapes.values())
    # One head's keys, and one channel's values, are larger than the others.
    key[:, 1] *= 5
    value[..., 7] *= 20
    if largest:
        # All products have the largest numbers there are, and one sign.
        query, key, value = np.full_like(query, 0.1), np.full_like(key, 8.0), np.full_like(value, -3.0)
    states = run_quantised(
        [helper.make_node("Identity", [name], [f"cross_{name}.0"]) for name in ("key", "value")],
        [(f"cross_{name}.0", TensorProto.FLOAT, (1, heads, "T", size)) for name in ("key", "value")],
        [(name, (1, heads, "T", size)) for name in ("key", "value")],
        {"key": key, "value": value},
    )
    assert {name: (one.dtype.name, one.shape) for name, one in states.items()} == {
        "cross_key.0": ("int8", (1, heads, size, frames)),
        "cross_value.0": ("int8", (1, heads, frames, size)),
        "cross_key_scale.0": ("float32", (1, heads, 1, 1)),
        "cross_value_scale.0": ("float32", (1, heads, 1, size)),
    }
    largest_key = np.abs(key).max(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(states["cross_key_scale.0"], largest_key / 127, rtol=1e-6)
    assert np.abs(_keys(states, 0) - key).max() <= 0.51 * states["cross_key_scale.0"].max()

    output = run_quantised(
        [
            helper.make_node("Transpose", ["cross_key.0"], ["turned"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["query", "turned"], ["products"]),
            helper.make_node("Mul", ["products", "scale"], ["scores"]),
            helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
            helper.make_node("MatMul", ["shares", "cross_value.0"], ["attended"]),
        ],
        [("attended", TensorProto.FLOAT, (1, heads, queries, size))],
        [("query", (1, heads, queries, size))]
        + [(f"cross_{name}.0", (1, heads, "T", size)) for name in ("key", "value")],
        {"query": query, **states},
        [numpy_helper.from_array(np.float32(0.125), "scale")],
    )["attended"]
    scores = np.exp(query @ key.swapaxes(2, 3) / 8)
    expected = scores / scores.sum(axis=-1, keepdims=True) @ value
    np.testing.assert_allclose(output, expected, atol=(0.001 if largest else 0.05) * np.abs(expected).max())


def test_int8(golden, tmp_path, run_command):
    model, _, processor, exported = golden
    folder = tmp_path / "int8"
    with graphs_of(exported):
        code, out, _ = run_command("export", "--format", "onnx", "--int8", "--output", folder)
    assert code == 0 and out.startswith(f"wrote {folder}: decoder.onnx 28.9 MB")
    # A quarter, and the embeddings a half.
    for file in (*exported.glob("*.onnx"), exported / "embeddings.npy"):
        assert (folder / file.name).stat().st_size < 0.51 * file.stat().st_size
    code, out, _ = run_command("transcribe", "--model", folder, RECORDING)
    assert code == 0 and out.startswith("He had found where his treasure was")
    manifest = tmp_path / "data.jsonl"
    manifest.write_text(json.dumps({"audio": str(RECORDING), "text": "He had found where his treasure was"}))
    code, _, error = run_command("evaluate", "--model", folder, "--data", manifest, "--output", tmp_path / "metrics")
    assert code == 0, error
    (row,) = [json.loads(line) for line in (tmp_path / "metrics" / "hypotheses.jsonl").read_text().splitlines()]
    assert row["hypothesis"].startswith("He had found where his treasure was")
    clips = [str(RECORDING)]
    if LIBRISPEECH.is_dir():
        rows = [json.loads(line) for line in (LIBRISPEECH / "metadata.jsonl").read_text().splitlines()]
        rows = sorted(rows, key=lambda row: row["duration_s"])[20:200:30]
        clips += [str(LIBRISPEECH / row["file_name"]) for row in rows]
    inputs = processor(clips)
    expected, texts = (
        [text.lower() for text in processor.batch_decode(one.generate(**inputs))]
        for one in (model, OnnxMDMASR.from_pretrained(folder))
    )
    edits = jiwer.process_words(expected, texts)
    assert edits.substitutions + edits.deletions + edits.insertions <= len(clips)


# --- without PyTorch ---


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 480_000), min_size=1, max_size=2), level=st.sampled_from([0.0, 1e-3, 0.3]))
def test_features_are_whispers(golden, processor, lengths, level):
    clips = [level * np.random.default_rng(n).standard_normal(n).astype(np.float32) for n in (*lengths, 479_990)]
    expected, output = (one(clips, sampling_rate=16_000) for one in (golden[2], processor))
    assert np.array_equal(output["attention_mask"], expected["attention_mask"])
    np.testing.assert_allclose(output["input_features"], expected["input_features"], atol=2e-4)


@given(
    text=st.text(max_size=40) | st.text("aZ é'\u00a0\n<|endoftext|>9sTll", max_size=40),
    ids=st.lists(st.integers(0, 52_000)),
)
@example(text=" I'LL  it's\n\n <|endoftext|>x", ids=[50256, 50257, 51_999, 220])
def test_tokenizer_is_transformers(golden, processor, text, ids):
    expected, tokenizer = golden[2].tokenizer, processor.tokenizer
    assert tokenizer.encode(text) == expected.encode(text, add_special_tokens=False)
    for skipped in (True, False):
        assert tokenizer.decode(ids, skipped) == expected.decode(ids, skip_special_tokens=skipped)


def test_transcribes_without_torch_and_transformers(golden):
    """As an installation with the extra `onnx` alone, in a process of its own."""
    model, _, processor, folder = golden
    program = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import mdm_asr_hf
from mdm_asr_hf import OnnxMDMASR, OnnxProcessor, StreamingTranscriber, Transcriber
from mdm_asr_cli.app import main
parts = OnnxMDMASR.from_pretrained({str(folder)!r}), OnnxProcessor.from_pretrained({str(folder)!r})
words = Transcriber(*parts, vad="energy", timestamps=True, hotwords=["Zorblax"]).transcribe({str(RECORDING)!r}).words
print([(word.text, word.start_s, word.end_s) for word in words])
from mdm_asr_hf.audio_mdm_asr import load_audio
*_, last = StreamingTranscriber(*parts).stream([load_audio({str(RECORDING)!r})])
print(last.committed)
try:
    mdm_asr_hf.MDMASRForConditionalGeneration
except ImportError as error:
    print(error)
sys.argv = ["mdm-asr", "transcribe", "--vad", "energy", "--model", {str(folder)!r}, {str(RECORDING)!r}]
try:
    main()
finally:
    sys.argv = ["mdm-asr", "evaluate", "--data", "x", "--output", "y"]
    main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = Transcriber(model, processor, vad="energy", timestamps=True).transcribe(RECORDING)
    words, stream, missing, text = done.stdout.splitlines()
    for (word, *times), other in zip(ast.literal_eval(words), expected.words, strict=True):
        assert word == other.text and times == pytest.approx([other.start_s, other.end_s], abs=0.041)
    *_, last = StreamingTranscriber(model, processor).stream([load_audio(RECORDING)])
    assert text == expected.text and stream == last.committed
    assert (
        missing
        == '`MDMASRForConditionalGeneration` needs PyTorch: `pip install ".[torch]"` in a clone of this project.'
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(
        'error: this command needs torch: `pip install ".[torch]"` in a clone of this project'
    )


def test_commands_load_no_pytorch_for_an_export(golden, tmp_path, monkeypatch):
    program = "import sys, mdm_asr_cli\ntry: mdm_asr_cli.main()\nfinally: print(sys.modules['torch'])"
    command = [sys.executable, "-c", program, "transcribe", "--model", golden[3], RECORDING]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("He had found") and done.stdout.endswith("None\n") and not done.stderr
    # Where the languages of a request have names, whose list is transformers', it is loaded.
    for name in ("mel_filters.npy", "generation_config.json"):
        shutil.copy(golden[3] / name, tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"prompt_template": TEMPLATE}))
    with monkeypatch.context() as patch:
        patch.delitem(sys.modules, "torch")
        patch.setitem(sys.modules, "transformers", sys.modules["transformers"])
        for folder in (tmp_path, tmp_path / "missing", mdm_asr_hf.default_checkpoint()):
            _leave_out_pytorch(folder)
            assert "torch" not in sys.modules
        _leave_out_pytorch(golden[3])
        assert sys.modules["torch"] is None


# --- errors ---


def test_wrong_folders_and_arguments(pair, tmp_path, run_command, monkeypatch):
    with pytest.raises(ValueError, match=r"`folder` .* has no encoder.onnx, decoder.onnx, drafts.onnx"):
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
    with pytest.raises(ValueError, match="`draft_layers=0`: a model that decodes on a canvas cannot be exported"):
        export_onnx(tiny_model(), tmp_path / "new", processor=tiny_processor())
    assert not (tmp_path / "new").exists()
    code, _, error = run_command("export", "--output", damaged)
    assert code == 1 and "is not an empty folder" in error
    code, _, error = run_command("transcribe", "--model", pair[2], "--device", "cuda", RECORDING)
    assert code == 1 and "`device` 'cuda'" in error
    code, _, error = run_command("transcribe", "--model", pair[2], "--dtype", "int8", RECORDING)
    assert code == 1 and "`dtype` 'int8' cannot be used with the ONNX model" in error

    _, onnx, folder = pair
    with pytest.raises(ValueError, match="`num_threads` must be an integer of at least 1, got 0"):
        OnnxMDMASR.from_pretrained(folder, num_threads=0)
    with pytest.raises(ValueError, match=r"must be \(B, T, 80\)"):
        onnx.generate(torch.zeros(1, 80, 100))
    with pytest.raises(ValueError, match="hold 31.0 s of audio, but this encoder takes at most 30.0 s"):
        onnx.generate(torch.randn(1, 3100, 80))
    with pytest.raises(ValueError, match="must be what this model's `encode` returned"):
        onnx.generate(torch.randn(1, 90, 80), encoder_outputs=pair[0].encode(torch.randn(1, 90, 80)))

    model = tiny_drafts_model(dtype=torch.float32)

    def encode(self, features, mask, **kwargs):
        # What depends on the data has no graph.
        return self.model.encode(features[mask.bool()])

    monkeypatch.setattr(type(model), "encode", encode)
    with pytest.raises(ValueError, match="The encoder of type 'whisper' cannot be exported to ONNX"):
        export_onnx(model, tmp_path / "out", processor=tiny_processor())


@each("module", ["onnxscript", "onnxruntime"])
def test_without_the_extra(pair, tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    extra = "export" if module == "onnxscript" else "onnx"
    with pytest.raises(ImportError, match=rf'{module}: `pip install "\.\[{extra}\]"`'):
        if module == "onnxscript":
            export_onnx(pair[0], tmp_path / "out", processor=tiny_processor())
        else:
            OnnxMDMASR.from_pretrained(pair[2])
