# Copyright 2026 The mdm_asr_hf authors. Licensed under the Apache License, Version 2.0.
"""Two processes evaluate and train as one does; FSDP takes the model."""

import contextlib
import dataclasses
import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from tiny_data import save_model, write_data
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor
from tiny_training import EOS, arguments, collate

from mdm_asr_cli import main
from mdm_asr_hf import MDMASRForConditionalGeneration, decoder_mdm_asr, diffusion_mdm_asr
from mdm_asr_hf.diffusion_mdm_asr import DiffusionObjective, DraftObjective
from mdm_asr_hf.evaluate.evaluation import TIMES
from mdm_asr_hf.evaluate.scoring import read_rows
from mdm_asr_hf.train import clips, distillation, donor_cache
from mdm_asr_hf.train import trainer as training
from mdm_asr_hf.train.trainer import ISCTTrainer

FSDP_CONFIG = Path(__file__).parents[1] / "training" / "configs" / "fsdp.yaml"
NUM_STEPS = 6
# Of what is evaluated, and two more that cannot be.
SECONDS = (0.5, 1.2, 0.3, 0.9, 0.9, 0.7, 1.0, 0.4)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of what two processes did, all in one run."""
    folder = tmp_path_factory.mktemp("two")
    write_data(folder / "speech", [1 + 0.025 * i for i in range(16)])
    model = tiny_drafts_model(dtype=torch.float32)
    model.generation_config.max_new_tokens = 30
    save_model(folder / "donor", model, tiny_processor())
    # Drawn, so that rows that got another generator would show.
    model.generation_config.temperature = 1.0
    save_model(folder / "drawing", model, tiny_processor())
    data = write_data(folder / "clips", SECONDS, prefix="audio/")
    (data / "audio" / "3.wav").write_text("These are notes.\n" * 100)
    # Cut off: that it cannot be read shows while it is.
    (data / "audio" / "6.wav").write_bytes((data / "audio" / "6.wav").read_bytes()[:2000])
    paths = [str(Path(__file__).parent / "helpers"), *filter(None, sys.path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


# The evaluation of a folder, half of its batches each


def evaluation_of(folder, output):
    arguments = ["--model", folder / "drawing", "--batch-size", 2, "--device", "cpu", "--batch-1-rows", 0]
    return ["evaluate", "--data", folder / "clips", *arguments, "--output", folder / output]


def test_two_processes_write_what_one_does(two, run_command):
    assert run_command(*evaluation_of(two, "one"))[0] == 0
    one, both = (json.loads((two / name / "metrics.json").read_text()) for name in ("one", "both"))
    assert (one["settings"]["num_processes"], both["settings"]["num_processes"]) == (1, 2)
    assert [s["id"] for s in both["data"][0]["skipped"]] == ["audio/3.wav", "audio/6.wav"]
    assert one["data"] == both["data"]
    metrics = {name: value for name, value in one["metrics"].items() if name[:4] not in ("rtfx", "peak")}
    assert metrics.items() <= both["metrics"].items()
    rows = [[{k: v for k, v in row.items() if k not in TIMES} for row in read_rows(two / n)] for n in ("one", "both")]
    assert rows[0] == rows[1] and len(rows[0]) == 6


# Data parallel


class Rows(torch.utils.data.Dataset):
    """Sixteen clips, each told from the others by its first label."""

    def __init__(self):
        self.features, self.mask = tiny_inputs("whisper", seconds=(0.5, 0.4, 0.45, 0.3) * 4)
        self.durations_s = self.mask.sum(dim=1) / 100

    def __len__(self):
        return len(self.features)

    def __getitem__(self, i):
        labels = torch.tensor([3 + i, 4 + i % 5, 9, EOS])
        return {"input_features": self.features[i], "attention_mask": self.mask[i], "labels": labels}


class Stream(torch.utils.data.IterableDataset):
    """The same clips as a stream, which every process reads whole: accelerate deals its batches out."""

    def __iter__(self):
        rows = Rows()
        yield from ({**rows[i], "duration_s": float(rows.durations_s[i])} for i in range(len(rows)))


class MaskByRow:
    """In place of the random masks: 4 of 6 positions, which ones depends on the row alone, wherever it is."""

    rows, step = None, 0

    def __call__(self, tokens, probability, *, mask_token_id, generator=None):
        if self.step == 0:
            self.rows = tokens[:, 0]  # The first step's tokens are the truth.
        positions = torch.arange(tokens.shape[1])
        masked = ((self.rows[:, None] * 7 + positions * 2 + self.step) % 3 > 0) & (probability > 0)
        self.step = (self.step + 1) % 2
        return tokens.masked_fill(masked, mask_token_id), masked


class Recorder(ISCTTrainer):
    """Keeps the first labels of each training batch."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            self.__dict__.setdefault("seen", []).append(sorted(inputs["labels"][:, 0].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder, num_processes, patch):
    """Trains with a global batch of 4, and writes what process 0 logged and what each process masked."""
    model = tiny_model("whisper")
    model.generation_config.canvas_length = 6
    settings = {"predict_with_generate": True, "ddp_backend": "gloo" if num_processes > 1 else None}
    args = arguments(
        folder,
        per_device_train_batch_size=4 // num_processes,
        per_device_eval_batch_size=3,
        max_steps=NUM_STEPS,
        logging_steps=2,
        **settings,
    )
    assert args.world_size == num_processes
    patch.setattr(diffusion_mdm_asr, "sample_timesteps", lambda n, device=None, **_: 0.25 + 0.5 * torch.ones(n))
    patch.setattr(diffusion_mdm_asr, "mask_tokens", MaskByRow())
    patch.setattr(training, "STEPS_BETWEEN_LOOKS", 1)

    def count_rows(prediction):
        return {"rows": float(len(prediction.predictions)), "labels": prediction.label_ids[:, 0].sum().item()}

    rows = Rows()
    uneven = torch.utils.data.Subset(rows, range(7))
    trainer = Recorder(model, args, train_dataset=rows, eval_dataset=uneven, compute_metrics=count_rows)
    trainer.train()
    result = {"metrics": trainer.evaluate(), "log": trainer.state.log_history, "seen": trainer.seen}
    result |= {"drawn": torch.rand(1).item(), "weight": model.proj_out.weight.tolist()}
    # Batches of bounded seconds from a stream, by the clock.
    args = dataclasses.replace(args, max_seconds_per_batch=1.1, max_minutes=10.0, max_steps=3)
    streaming = Recorder(tiny_model("whisper"), args, train_dataset=Stream(), data_collator=collate)
    streaming.train()
    result |= {"streamed": streaming.seen, "clock": streaming.clock.share}
    (folder / f"{num_processes}_{args.process_index}.json").write_text(json.dumps(result))


def test_two_processes_give_the_loss_curve_of_one(two, monkeypatch):
    with monkeypatch.context() as patch:
        train(two, 1, patch)
    one, first, second = (json.loads((two / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))
    # The two share each step's rows.
    assert [sorted(a + b) for a, b in zip(first["seen"], second["seen"], strict=True)] == one["seen"]
    assert len(set(map(tuple, one["seen"]))) > 1
    for name in ("loss", "loss_step_1", "loss_step_2", "accuracy_step_1", "accuracy_step_2", "grad_norm"):
        curves = [[entry[name] for entry in result["log"] if name in entry] for result in (one, first)]
        assert len(curves[0]) == 3
        torch.testing.assert_close(*map(torch.tensor, curves), atol=1e-4, rtol=1e-4)
    weights = [torch.tensor(result["weight"]) for result in (one, first, second)]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(weights[1], weights[2])
    # A stream's rows come to one process each, and both follow one clock.
    streams = [[row for batch in result["streamed"] for row in batch] for result in (first, second)]
    assert all(len(result["streamed"]) == 3 for result in (first, second))
    assert not set(streams[0]) & set(streams[1]) and all(len(set(rows)) == len(rows) > 3 for rows in streams)
    assert first["clock"] == second["clock"] > 0
    # Seven rows: none is counted twice, though two processes see eight.
    for result in (one, first):
        assert result["metrics"]["eval_rows"] == 7 and result["metrics"]["eval_labels"] == sum(range(3, 10))
    # Left to themselves the processes would mask differently.
    assert first["drawn"] != second["drawn"]


# Sharded


MODELS = {"canvas": tiny_model, "drafts": functools.partial(tiny_drafts_model, dtype=torch.float32)}


def shard(folder):
    """The gradients of sharded models, and what they generate."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    rank, results = torch.distributed.get_rank(), {}
    for kind, make in MODELS.items():
        model = make("parakeet").train()
        model.model.encoder.requires_grad_(False)
        mesh = init_device_mesh("cpu", (2,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in ("MDMASRDecoderLayer", "MDMASRDraftLayer", "ParakeetEncoderBlock"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trainer = ISCTTrainer(model, arguments(folder))
        trainer.is_fsdp_enabled = True
        trainer.shard_methods()
        trainer.shard_methods()
        assert isinstance(model.model.decoder.layers[0], FSDPModule)
        # The second process has fewer rows, and is done earlier.
        gradients, tokens = forward_and_backward(model, slice(rank, 2 if rank else 3))
        results[kind] = {name: gradient.full_tensor() for name, gradient in gradients.items()}, tokens
    torch.save(results, folder / f"sharded{rank}.pt")


def forward_and_backward(model, rows=slice(None)):
    features, mask = tiny_inputs("parakeet")
    labels = torch.tensor([[5, 6, EOS], [7, EOS, -100], [8, 9, EOS]])
    inputs = {"input_features": features, "attention_mask": mask, "labels": labels}
    has_drafts = model.config.has_drafts
    objective = DraftObjective() if has_drafts else DiffusionObjective(num_steps=2)
    generator = torch.Generator().manual_seed(0)
    model.model.encoder.eval()
    model(**inputs, objective=objective, generator=generator).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    settings = dict(max_new_tokens=16 if has_drafts else 8, synced_gpus=True)
    return gradients, model.eval().generate(features[rows], attention_mask=mask[rows], **settings)


def test_sharded_layers_have_the_gradients_of_the_whole_model(two):
    sharded, second = (torch.load(two / f"sharded{rank}.pt") for rank in (0, 1))
    for kind, make in MODELS.items():
        model = make("parakeet").train()
        model.model.encoder.requires_grad_(False)
        whole, expected = forward_and_backward(model)
        gradients, tokens = sharded[kind]
        assert set(gradients) == set(whole) and any("cross_attn.k_proj" in name for name in whole)
        assert any("drafts" in name for name in whole) == (kind == "drafts")
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        own = second[kind][1]
        assert torch.equal(tokens, expected) and torch.equal(own[0], expected[1, : own.shape[1]])


def test_the_fsdp_configuration_wraps_the_layers(monkeypatch):
    """What `accelerate launch --config_file` brings about, without a launch."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    args = launch_command_parser().parse_args(["--config_file", str(FSDP_CONFIG), "script.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert args.use_fsdp and plugin.fsdp_version == 2 and "FULL_STATE_DICT" in str(plugin.state_dict_type)
    model = tiny_model("parakeet")
    plugin.set_auto_wrap_policy(model)
    policy = plugin.auto_wrap_policy
    assert decoder_mdm_asr.MDMASRDecoderLayer in policy.keywords["transformer_layer_cls"]
    wrapped = [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert len(wrapped) == 4  # Two layers of the decoder, two of the encoder.


# Drafts


def distil(folder, output, patch):
    """All stages on a random donor: their losses, the durations of the clips that were seen."""
    # Random models loop, as no donor that has learnt does.
    patch.setattr(donor_cache, "_why_not", lambda *text: None)
    patch.setattr(clips, "ALONE_SHARE", 1.0)
    seen, own = [], distillation.DistillationCollator.__call__

    def collate(collator, rows):
        seen.append([float(row["seconds"]) for row in rows])
        return own(collator, rows)

    patch.setattr(distillation.DistillationCollator, "__call__", collate)
    settings = {"silence_s": 0.1, "max_seconds_per_batch": 6.0, "use_cpu": True, "bf16": False, "logging_steps": 1}
    steps = {"encoder_steps": 3, "draft_steps": 3}
    results = distillation.train_drafts(str(folder / "donor"), [folder / "speech"], output, **steps, **settings)
    losses = {name: [e["loss"] for e in one["log"] if "loss" in e] for name, one in results["stages"].items()}
    return losses, seen


def test_two_processes_train_drafts_as_one(two, monkeypatch):
    with monkeypatch.context() as patch:
        alone = distil(two, two / "alone", patch)
    first, second = (torch.load(two / f"distilled{rank}.pt") for rank in (0, 1))
    # What the donor made is the same; the frames are of encoders that learnt otherwise.
    caches = [two / name / "training" / "cache" for name in ("alone", "together")]
    cached = [[*sorted(one.glob("donor/0/block-*")), *sorted(one.glob("held-out/0/block-*"))] for one in caches]
    blocks, others = ([path.read_bytes() for path in paths] for paths in cached)
    assert len(blocks) == 2 and blocks == others
    # They share the steps' losses and work on different clips.
    assert first[0] == second[0] and first[1][-1] != second[1][-1] and list(first[0]) == list(alone[0])
    # The model of two has learnt, and what is saved is whole.
    trained = MDMASRForConditionalGeneration.from_pretrained(two / "together").state_dict()
    assert trained["model.encoder.silence_embeddings"].abs().sum() > 0
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values() if tensor.is_floating_point())


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What torchrun tells each process. They are forks, since what they import takes as long as what they do.
    other = os.fork()
    names = {"RANK": int(not other), "LOCAL_RANK": int(not other), "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    # First, since the command that is launched joins the processes itself. It would part them, once and for all.
    sys.argv = ["mdm-asr", *map(str, evaluation_of(folder, "both"))]
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(PartialState, "destroy_process_group", lambda state: None)
        main()
    with pytest.MonkeyPatch.context() as patch:
        train(folder, 2, patch)
    shard(folder)
    with pytest.MonkeyPatch.context() as patch:
        torch.save(distil(folder, folder / "together", patch), folder / f"distilled{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
    # All is written: threads of the group that are left may abort an interpreter that ends in the ordinary way.
    sys.stderr.flush()
    os._exit(other and os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]))
