# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""
What a clip takes, beside the least that this machine could take for it: the encoder's arithmetic at the peak that
matrix products reach here, and the decoder's weights, read once in each evaluation at the speed of the memory.

    python benchmarks/run_floor.py --model OUT8 --data speech/eval/librispeech --threads 2 --output OUT

OUT8 is what `mdm-asr export --int8` wrote, of a Whisper donor.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import watch_stages
from run_peers import make_clips, table

FRAMES_PER_S, ROUNDS = 50, 5


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

    parts = np.split(np.ones(1 << 26, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / best_seconds(lambda: list(pool.map(np.sum, parts)))


def operations_per_s(threads: int, int8: bool, size: int = 1024) -> float:
    """Additions and multiplications of products of matrices, by ONNX Runtime as the model runs with it."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper, save_model

    from mdm_asr_hf.onnx.model import session_options

    weight = np.random.default_rng(0).integers(-127, 127, (size, size))
    kind = (TensorProto.UINT8, TensorProto.INT32) if int8 else (TensorProto.FLOAT, TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger" if int8 else "MatMul", ["x", "w"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", kind[0], [size, size])],
        [helper.make_tensor_value_info("y", kind[1], [size, size])],
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


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Peaks of the machine, and for each length milliseconds a clip and their floors."""
    import mdm_asr_hf

    model = mdm_asr_hf.OnnxMDMASR.from_pretrained(args.model, num_threads=args.threads)
    processor = mdm_asr_hf.OnnxProcessor.from_pretrained(args.model)
    is_int8 = "int8" in json.dumps(_initializer_types(args.model))
    peaks = {
        "GB/s": bytes_per_s(args.threads) / 1e9,
        "linear GOP/s": operations_per_s(args.threads, is_int8) / 1e9,
        "fp32 GOP/s": operations_per_s(args.threads, False) / 1e9,
    }
    weights = {name: (Path(args.model) / f"{name}.onnx").stat().st_size / 1e9 for name in ("decoder", "drafts")}
    rows = []
    for length, clips in make_clips(args.data, args.lengths, args.clips).items():
        rounds = []
        for _ in range(ROUNDS):
            seconds: dict[str, float] = {}
            evaluations, start = 0, time.perf_counter()
            with watch_stages(model, seconds):
                for clip in clips:
                    output = model.generate(
                        **processor(clip["samples"], sampling_rate=16_000), return_dict_in_generate=True
                    )
                    evaluations += int(output.nfe[0])
            rounds.append({**seconds, "all": time.perf_counter() - start})
        found = {name: statistics.median(one[name] for one in rounds) / len(clips) * 1e3 for name in rounds[0]}
        mean_s = statistics.mean(len(clip["samples"]) / 16_000 for clip in clips)
        linear, other = encoder_operations(model.config, mean_s)
        nfe = evaluations / len(clips)
        floor = {
            "encoder": linear / peaks["linear GOP/s"] / 1e6 + other / peaks["fp32 GOP/s"] / 1e6,
            "causal rows": nfe * weights["decoder"] / peaks["GB/s"] * 1e3,
            # The text's end is not drafted behind.
            "drafts": (nfe - 1) * weights["drafts"] / peaks["GB/s"] * 1e3,
        }
        rows.append({"length_s": length, "evaluations": nfe, "ms": found, "floor_ms": floor})
    return {"peaks": peaks, "weights_gb": weights, "threads": args.threads, "rows": rows}


def _initializer_types(folder: str) -> list[str]:
    import onnx

    graph = onnx.load(Path(folder) / "decoder.onnx", load_external_data=False).graph
    return [onnx.TensorProto.DataType.Name(one.data_type).lower() for one in graph.initializer]


def to_markdown(results: dict[str, Any], command: str) -> str:
    stages = ("encoder", "causal rows", "drafts")
    lines = []
    for row in results["rows"]:
        ms, floor = row["ms"], row["floor_ms"]
        cells = [f"{ms[stage]:.1f} / {floor[stage]:.1f}" for stage in stages]
        lines.append([f"{row['length_s']:g} s", *cells, f"{ms['all']:.1f} / {sum(floor.values()):.1f}"])
    peaks = ", ".join(f"{value:.1f} {name}" for name, value in results["peaks"].items())
    head = ["ms a clip, measured / floor", *stages, "all"]
    return f"{table(head, lines)}\n\n{results['threads']} threads: {peaks}.\n\n```bash\n{command}\n```\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--lengths", type=float, nargs="+", default=[2, 5, 10, 20, 25])
    parser.add_argument("--clips", type=int, default=8, help="of each length")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    results = measure(args)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    command = f"python benchmarks/run_floor.py --model {args.model} --data {args.data} --threads {args.threads} "
    page = to_markdown(results, command + f"--output {args.output}")
    (args.output / "results.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
