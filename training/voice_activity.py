# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
The package's graph of silero-vad (MIT licence), of the weights in the Python package of that name: its convolutions as
products of matrices over all frames of a call, which takes a third of the time.

    pip install ".[export]" "silero-vad>=6.2.3"
    python training/voice_activity.py src/mdm_asr_hf/transcribe/silero_vad.onnx
"""

import argparse
from importlib.resources import files

import numpy as np
import onnx
from onnx import numpy_helper

# Each frame is heard behind the last 64 samples of the one before, and mirrored at its end: 5 hops of 128, whose
# neighbours are 4 windows. Convolutions are over these, then 2, then 1.
GRAPH = """
<ir_version: 8, opset_import: ["": 17], doc_string: "silero-vad, MIT License, Copyright (c) 2020-present Silero Team">
silero_vad (float[N, 512] frames) => (float[N] probabilities) {
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    minus_one = Constant <value_ints = [-1]> ()
    minus_two = Constant <value_ints = [-2]> ()
    minus_64 = Constant <value_ints = [-64]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    a_row_down = Constant <value_ints = [1, 0, -1, 0]> ()
    half_a_hop = Constant <value_ints = [0, 0, 0, 64]> ()
    a_row_around = Constant <value_ints = [0, 1, 0, 0, 1, 0]> ()
    by_hops = Constant <value_ints = [-1, 5, 128]> ()
    by_states = Constant <value_ints = [-1, 128]> ()

    ends = Slice (frames, minus_64, end, one)
    before = Pad (ends, a_row_down)
    joined = Concat <axis = 1> (before, frames)
    heard = Pad <mode = "reflect"> (joined, half_a_hop)
    hops = Reshape (heard, by_hops)
    earlier = Slice (hops, zero, minus_one, one)
    later = Slice (hops, one, end, one)
    windows = Concat <axis = 2> (earlier, later)
    waves = MatMul (windows, stft)
    cosine, sine = Split <axis = 2> (waves)
    cosine_squared = Mul (cosine, cosine)
    sine_squared = Mul (sine, sine)
    power = Add (cosine_squared, sine_squared)
    states0 = Sqrt (power)
    CONVOLUTIONS
    encoded = LSTM <hidden_size = 128> (states4, lstm_input, lstm_state, lstm_bias)
    flat = Reshape (encoded, by_states)
    kept = Relu (flat)
    weighed = MatMul (kept, final_weight)
    logits = Add (weighed, final_bias)
    shares = Sigmoid (logits)
    probabilities = Squeeze (shares, one)
}
"""
CONVOLUTION = """
    padded{k} = Pad (states{before}, a_row_around)
    first{k} = Slice (padded{k}, zero, minus_two, one, {step})
    second{k} = Slice (padded{k}, one, minus_one, one, {step})
    third{k} = Slice (padded{k}, two, end, one, {step})
    near{k} = Concat <axis = 2> (first{k}, second{k}, third{k})
    product{k} = MatMul (near{k}, weight{k})
    sum{k} = Add (product{k}, bias{k})
    states{k} = Relu (sum{k})
"""
STEPS = ("one", "two", "two", "one")


def make_graph(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """The graph, of frames (N, 512) one after the other at 16 kHz, with the weights of the package's own graph."""
    text = "".join(CONVOLUTION.format(k=k, before=k - 1, step=step) for k, step in enumerate(STEPS, start=1))
    model = onnx.parser.parse_model(GRAPH.replace("CONVOLUTIONS", text))
    constants = {
        "stft": weights["stft.forward_basis_buffer"][:, 0].T,
        "lstm_input": weights["onnx::LSTM_209"],
        "lstm_state": weights["onnx::LSTM_210"],
        "lstm_bias": weights["onnx::LSTM_211"],
        "final_weight": weights["output.weight"][:, :, 0].T,
        "final_bias": weights["output.bias"],
    }
    for k in range(1, len(STEPS) + 1):
        weight, bias = weights[f"encoder.{k - 1}.weight"], weights[f"encoder.{k - 1}.bias"]
        constants |= {f"weight{k}": weight.transpose(2, 1, 0).reshape(-1, len(weight)), f"bias{k}": bias}
    for name, values in constants.items():
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values), name))
    onnx.checker.check_model(model)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output")
    output = parser.parse_args(arguments).output
    package = onnx.load(files("silero_vad") / "data" / "silero_vad_16k_sequence.onnx")
    weights = {one.name: numpy_helper.to_array(one) for one in package.graph.initializer}
    onnx.save(make_graph(weights), output)


if __name__ == "__main__":
    main()
