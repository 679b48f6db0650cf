#!/usr/bin/env python3
# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a clip takes, beside the least that this machine could take for it: the encoder's arithmetic at the peak that
matrix products reach here, and the decoder's weights, read once in each evaluation at the speed of the memory.

    python benchmarks/run_floor.py --model OUT8 --data speech/eval/librispeech --threads 2 --output OUT

OUT8 is what `mdm-asr export --int8` wrote, of a Whisper donor.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import RATE_HZ, Row, load_ours, make_parser, run, table

FRAMES_PER_S, ROUNDS = 50, 5
STAGES = ("encoder", "causal rows", "drafts")


def best_seconds(call: Callable[[], Any], rounds: int = 20) -> float:
    """The shortest of some calls."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def bytes_per_s(threads: int) -> float:
    """How fast the threads read a quarter of a gigabyte."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.split(np.ones(1 << 26, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / best_seconds(lambda: list(pool.map(np.sum, parts)))


def operations_per_s(threads: int, int8: bool, size: int = 1024) -> float:
    """Additions and multiplications of products of matrices, by ONNX Runtime as the model runs with it."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper, save_model

    from mdm_asr_hf.onnx.model import session_options

    weight = np.random.default_rng(0).integers(-127, 127, (size, size))
    given, made = (TensorProto.UINT8, TensorProto.INT32) if int8 else (TensorProto.FLOAT, TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if int8 else "MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", given, [size, size])],
        [helper.make_tensor_value_info("y", made, [size, size])],
        [numpy_helper.from_array(weight.astype(np.int8 if int8 else np.float32), "w")],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "product.onnx"
        save_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
        session = onnxruntime.InferenceSession(str(path), session_options(threads))
    feed = {"x": np.ones((size, size), np.uint8 if int8 else np.float32)}
    return 2 * size**3 / best_seconds(lambda: session.run(["y"], feed))


def encoder_operations(config: Any, duration_s: float) -> tuple[float, float]:
    """Of Whisper's encoder and the cross-attention's keys and values, for so much audio with its silence: those of
    linear layers, and those of convolutions and attention."""
    encoder, decoder = config.encoder_config, config.decoder_config
    width, wide = encoder.d_model, encoder.encoder_ffn_dim
    frames = round((duration_s + config.encoder_trailing_silence_s) * FRAMES_PER_S)
    linear = encoder.encoder_layers * (4 * width**2 + 2 * width * wide)
    linear += decoder.num_hidden_layers * 2 * width * decoder.num_key_value_heads * decoder.head_dim
    convolutions = 3 * width * (2 * encoder.num_mel_bins + width)
    attention = encoder.encoder_layers * 2 * width * frames
    return 2.0 * frames * linear, 2.0 * frames * (convolutions + attention)


def is_int8(folder: Path) -> bool:
    import onnx

    graph = onnx.load(folder / "decoder.onnx", load_external_data=False).graph
    return any(one.data_type == onnx.TensorProto.INT8 for one in graph.initializer)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """The peaks of the machine; then for each length milliseconds a clip, and their floors."""
    from peers import watch_stages
    from run_peers import make_clips

    folder = Path(args.model)
    model, processor = load_ours(args)
    peaks = {
        "GB/s": bytes_per_s(args.threads) / 1e9,
        "linear GOP/s": operations_per_s(args.threads, is_int8(folder)) / 1e9,
        "fp32 GOP/s": operations_per_s(args.threads, False) / 1e9,
    }
    weights = {name: (folder / f"{name}.onnx").stat().st_size / 1e9 for name in ("decoder", "drafts")}
    yield {"kind": "peaks", "peaks": peaks, "weights_gb": weights}
    for length_s, clips in make_clips(args.data[0], args.lengths, args.clips).items():
        rounds = []
        for _ in range(ROUNDS):
            seconds: dict[str, float] = {}
            evaluations, start = 0, time.perf_counter()
            with watch_stages(model, seconds):
                for clip in clips:
                    inputs = processor(clip["samples"], sampling_rate=RATE_HZ)
                    evaluations += int(model.generate(**inputs, return_dict_in_generate=True).nfe[0])
            rounds.append({**seconds, "all": time.perf_counter() - start})
        linear, other = encoder_operations(model.config, statistics.mean(clip["duration_s"] for clip in clips))
        nfe = evaluations / len(clips)
        floor = {
            "encoder": linear / peaks["linear GOP/s"] / 1e6 + other / peaks["fp32 GOP/s"] / 1e6,
            "causal rows": nfe * weights["decoder"] / peaks["GB/s"] * 1e3,
            # The text's end is not drafted behind.
            "drafts": (nfe - 1) * weights["drafts"] / peaks["GB/s"] * 1e3,
        }
        ms = {name: statistics.median(one[name] for one in rounds) / len(clips) * 1e3 for name in rounds[0]}
        yield {"kind": "clips", "length_s": length_s, "evaluations": nfe, "ms": ms, "floor_ms": floor}


def summarise(rows: list[Row]) -> dict[str, Any]:
    return {"machine": rows[0], "rows": rows[1:]}


def to_markdown(summary: dict[str, Any]) -> str:
    lines = []
    for row in summary["rows"]:
        ms, floor = row["ms"], row["floor_ms"]
        cells = [f"{ms.get(stage, 0.0):.1f} / {floor[stage]:.1f}" for stage in STAGES]
        lines.append([f"{row['length_s']:g} s", *cells, f"{ms['all']:.1f} / {sum(floor.values()):.1f}"])
    peaks = ", ".join(f"{value:.1f} {name}" for name, value in summary["machine"]["peaks"].items())
    rows, run = table(["ms a clip, measured / floor", *STAGES, "all"], lines), summary["run"]
    return f"{rows}\n\n{run['threads']} threads: {peaks}.\n\n```bash\n{run['command']}\n```\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = make_parser(__doc__, threads=2)
    parser.add_argument("--lengths", type=float, nargs="+", default=[2, 5, 10, 20, 25])
    parser.add_argument("--clips", type=int, default=8, help="of each length")
    args = parser.parse_args(argv)
    if not args.rescore and not Path(args.model or "", "decoder.onnx").is_file():
        parser.error("--model must be a folder that `mdm-asr export` wrote")
    return run(parser, args, measure, summarise, to_markdown)


if __name__ == "__main__":
    main()
