"""Two processes train as one does; FSDP takes the model."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from tiny_models import tiny_drafts_model, tiny_inputs, tiny_model, tiny_processor

from mdm_asr_hf import MDMASRForConditionalGeneration, decoder_mdm_asr, objective_mdm_asr
from mdm_asr_hf.objective_mdm_asr import DiffusionObjective, DraftObjective
from mdm_asr_hf.train.trainer import ISCTTrainer, MDMASRTrainingArguments

HERE = Path(__file__).parent
FSDP_CONFIG = HERE.parent / "training" / "configs" / "fsdp.yaml"
NUM_STEPS, EOS = 6, 1


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


def mask_by_row(tokens, probability, *, mask_token_id, generator=None):
    """In place of the random masks: 4 of 6 positions, which ones depends on the row alone, wherever it is."""
    if mask_by_row.rows is None:
        mask_by_row.rows = tokens[:, 0]  # The first step's tokens are the truth.
    positions = torch.arange(tokens.shape[1])
    masked = ((mask_by_row.rows[:, None] * 7 + positions * 2 + mask_by_row.step) % 3 > 0) & (probability > 0)
    mask_by_row.step += 1
    if mask_by_row.step == 2:
        mask_by_row.step, mask_by_row.rows = 0, None
    return tokens.masked_fill(masked, mask_token_id), masked


mask_by_row.rows, mask_by_row.step = None, 0


class Stream(torch.utils.data.IterableDataset):
    """The same clips as a stream, which every process reads whole: accelerate deals its batches out."""

    def __iter__(self):
        rows = Rows()
        for i in range(len(rows)):
            yield {**rows[i], "duration_s": float(rows.durations_s[i])}


def collate(batches):
    (rows,) = batches
    return torch.utils.data.default_collate([{k: v for k, v in row.items() if k != "duration_s"} for row in rows])


def train_on_stream(args, seen):
    """Batches of bounded seconds from a stream, by the clock."""
    args = dataclasses.replace(args, max_seconds_per_batch=1.1, max_minutes=10.0, max_steps=3, logging_steps=1)
    trainer = Recorder(seen, tiny_model("whisper"), args, train_dataset=Stream(), data_collator=collate)
    trainer.clock.STEPS_BETWEEN_LOOKS = 1
    trainer.train()
    return trainer


class Recorder(ISCTTrainer):
    """Appends the first labels of each training batch to a list."""

    def __init__(self, seen, *args, **kwargs):
        self.seen = seen
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.seen.append(sorted(inputs["labels"][:, 0].tolist()) if model.training else [])
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(folder, num_processes):
    """Trains with a global batch of 4, and writes what process 0 logged and what each process masked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    model = tiny_model("whisper")
    model.generation_config.canvas_length = 6
    args = MDMASRTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4 // num_processes,
        per_device_eval_batch_size=3,
        max_steps=NUM_STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_backend="gloo" if num_processes > 1 else None,
        disable_tqdm=True,
        predict_with_generate=True,
        dataloader_pin_memory=False,
    )
    assert args.world_size == num_processes
    objective_mdm_asr.sample_timesteps = lambda n, device=None, **_: 0.25 + 0.5 * torch.ones(n)
    objective_mdm_asr.mask_tokens = mask_by_row
    rows = Rows()
    seen = []

    def count_rows(prediction):
        return {"rows": float(len(prediction.predictions)), "labels": prediction.label_ids[:, 0].sum().item()}

    uneven = torch.utils.data.Subset(rows, range(7))
    trainer = Recorder(seen, model, args, train_dataset=rows, eval_dataset=uneven, compute_metrics=count_rows)
    trainer.train()
    metrics = trainer.evaluate()
    drawn = torch.rand(1).item()
    streamed = []
    clock = train_on_stream(args, streamed).clock
    result = {
        "log": trainer.state.log_history,
        "metrics": metrics,
        "seen": seen[:NUM_STEPS],
        "streamed": streamed,
        "clock": clock.share,
        "drawn": drawn,
        "weight": model.proj_out.weight.tolist(),
    }
    (folder / f"{num_processes}_{args.process_index}.json").write_text(json.dumps(result))
    # A process that ends with its group's threads still running may abort.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def launch(*command, timeout_s=100):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "FSDP_"))}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stderr[-4000:]


LAUNCHERS = {
    # --multi_gpu stands for torchrun; the arguments' `use_cpu` keeps to the CPU and gloo.
    "accelerate": "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    "--dynamo_backend no --main_process_port 0",
    "torchrun": "-m torch.distributed.run --standalone --nproc_per_node 2",
}


def test_two_processes_give_the_loss_curve_of_one(tmp_path):
    launch(__file__, "train", tmp_path, 1)
    launch(*LAUNCHERS["accelerate"].split(), __file__, "train", tmp_path, 2)
    one, first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1_0", "2_0", "2_1"))

    # The two share each step's rows.
    assert [sorted(a + b) for a, b in zip(first["seen"], second["seen"], strict=True)] == one["seen"]
    assert len(set(map(tuple, one["seen"]))) > 1
    for name in ("loss", "loss_step_1", "loss_step_2", "accuracy_step_1", "accuracy_step_2", "grad_norm"):
        curves = [[entry[name] for entry in result["log"] if name in entry] for result in (one, first)]
        assert len(curves[0]) == 3
        torch.testing.assert_close(*map(torch.tensor, curves), atol=1e-4, rtol=1e-4)
    # A stream's rows come to one process each, and both follow one clock.
    streams = [[row for batch in result["streamed"] for row in batch] for result in (first, second)]
    assert all(len(result["streamed"]) == 3 for result in (first, second))
    assert not set(streams[0]) & set(streams[1]) and all(len(set(rows)) == len(rows) > 3 for rows in streams)
    assert first["clock"] == second["clock"] > 0
    losses = [entry["loss_step_2"] for entry in one["log"] if "loss_step_2" in entry]
    assert losses[-1] < losses[0]
    weights = [torch.tensor(result["weight"]) for result in (one, first, second)]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-4, rtol=1e-4)
    assert torch.equal(weights[1], weights[2])
    # Seven rows: none is counted twice, though two processes see eight.
    for result in (one, first):
        assert result["metrics"]["eval_rows"] == 7 and result["metrics"]["eval_labels"] == sum(range(3, 10))
    # Left to themselves the processes would mask differently.
    assert first["drawn"] != second["drawn"]


MODELS = {"canvas": tiny_model, "drafts": functools.partial(tiny_drafts_model, dtype=torch.float32)}


def shard(folder):
    """The gradients of sharded models, and what they generate."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    torch.distributed.init_process_group("gloo")
    rank, results = torch.distributed.get_rank(), {}
    for kind, make in MODELS.items():
        model = make("parakeet").train()
        model.model.encoder.requires_grad_(False)
        mesh = init_device_mesh("cpu", (2,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in ("MDMASRDecoderLayer", "MDMASRDraftLayer", "ParakeetEncoderBlock"):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        trainer = ISCTTrainer(
            model, MDMASRTrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], freeze_encoder=True)
        )
        trainer.is_fsdp_enabled = True
        trainer._shard_methods()
        trainer._shard_methods()
        assert isinstance(model.model.decoder.layers[0], FSDPModule)
        # The second process has fewer rows, and is done earlier.
        gradients, tokens = forward_and_backward(model, slice(rank, 2 if rank else 3))
        results[kind] = {name: gradient.full_tensor() for name, gradient in gradients.items()}, tokens
    torch.save(results, folder / f"sharded{rank}.pt")
    torch.distributed.destroy_process_group()


def forward_and_backward(model, rows=slice(None)):
    features, mask = tiny_inputs("parakeet")
    labels = torch.tensor([[5, 6, EOS], [7, EOS, -100], [8, 9, EOS]])
    inputs = {"input_features": features, "attention_mask": mask, "labels": labels}
    has_drafts = model.config.has_drafts
    objective = DraftObjective(num_frontiers=4) if has_drafts else DiffusionObjective(num_steps=2)
    generator = torch.Generator().manual_seed(0)
    model.model.encoder.eval()
    model(**inputs, objective=objective, generator=generator).loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    settings = dict(max_new_tokens=16 if has_drafts else 8, synced_gpus=True)
    return gradients, model.eval().generate(features[rows], attention_mask=mask[rows], **settings)


def test_sharded_layers_have_the_gradients_of_the_whole_model(tmp_path):
    launch(*LAUNCHERS["torchrun"].split(), __file__, "shard", tmp_path)
    sharded, second = (torch.load(tmp_path / f"sharded{rank}.pt") for rank in (0, 1))
    for kind, make in MODELS.items():
        model = make("parakeet").train()
        model.model.encoder.requires_grad_(False)
        whole, expected = forward_and_backward(model)
        gradients, tokens = sharded[kind]
        assert set(gradients) == set(whole) and any("cross_attn.k_proj" in name for name in whole)
        assert any("drafts" in name for name in whole) == (kind == "drafts")
        for name, gradient in whole.items():
            torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
        assert torch.equal(tokens, expected)
        own = second[kind][1]
        assert torch.equal(own[0], expected[1, : own.shape[1]])


def distil(folder):
    """All stages on a random donor; what each process ends with."""
    from mdm_asr_hf.train import clips, distillation, donor_cache

    # Random models loop, as no donor that has learnt does.
    donor_cache._why_not, clips.ALONE_SHARE = lambda *text: None, 1.0
    steps = {f"{stage}_steps": 3 for stage in ("encoder", "draft")}
    settings = {"silence_s": 0.1, "max_seconds_per_batch": 6.0, "use_cpu": True, "bf16": False, "logging_steps": 1}
    rank = int(os.environ.get("RANK", 0))
    seen, own = [], distillation.DistillationCollator.__call__

    def collate(collator, rows):
        seen.append([float(row["seconds"]) for row in rows])
        return own(collator, rows)

    distillation.DistillationCollator.__call__ = collate
    output = folder / os.environ.get("WORLD_SIZE", "1")
    results = distillation.train_drafts(str(folder / "donor"), [folder / "speech"], output, **steps, **settings)
    losses = {name: [e["loss"] for e in one["log"] if "loss" in e] for name, one in results["stages"].items()}
    torch.save((losses, seen, rank), folder / f"distilled-{output.name}-{rank}.pt")


def test_two_processes_train_drafts_as_one(tmp_path):
    (tmp_path / "speech").mkdir()
    rng = np.random.default_rng(0)
    for i in range(16):
        soundfile.write(tmp_path / "speech" / f"{i:02d}.wav", 0.1 * rng.standard_normal(16_000 + 400 * i), 16_000)
    model = tiny_drafts_model(dtype=torch.float32)
    model.generation_config.max_new_tokens = 30
    model.save_pretrained(tmp_path / "donor")
    tiny_processor().save_pretrained(tmp_path / "donor")
    launch(__file__, "distil", tmp_path)
    launch(*LAUNCHERS["torchrun"].split(), __file__, "distil", tmp_path)
    alone, first, second = (torch.load(tmp_path / f"distilled-{name}.pt") for name in ("1-0", "2-0", "2-1"))
    # What the donor made is the same; the frames are of encoders that learnt otherwise.
    caches = [tmp_path / number / "training" / "cache" for number in ("1", "2")]
    cached = [[*sorted(one.glob("donor/0/block-*")), *sorted(one.glob("held-out/0/block-*"))] for one in caches]
    assert len(cached[0]) == 2 and [path.read_bytes() for path in cached[0]] == [
        path.read_bytes() for path in cached[1]
    ]
    # They share the steps' losses and work on different clips.
    assert first[0] == second[0] and first[1][-1] != second[1][-1] and list(first[0]) == list(alone[0])
    # The model of two has learnt, and what is saved is whole.
    trained = MDMASRForConditionalGeneration.from_pretrained(tmp_path / "2").state_dict()
    assert trained["model.encoder.silence_embeddings"].abs().sum() > 0
    assert all(bool(tensor.isfinite().all()) for tensor in trained.values() if tensor.is_floating_point())


def fsdp_plugin(monkeypatch, config):
    """The plugin that `accelerate launch --config_file` brings about, without a launch."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    parser = launch_command_parser()
    args = parser.parse_args(["--config_file", str(config), "script.py"])
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        if name.startswith(("FSDP_", "ACCELERATE_")):
            monkeypatch.setenv(name, value)
    return args, FullyShardedDataParallelPlugin()


def test_the_fsdp_configuration_wraps_the_layers(monkeypatch):
    args, plugin = fsdp_plugin(monkeypatch, FSDP_CONFIG)
    assert args.use_fsdp and args.num_processes == 8 and args.mixed_precision == "bf16"
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert "FULL_STATE_DICT" in str(plugin.state_dict_type)
    model = tiny_model("parakeet")
    plugin.set_auto_wrap_policy(model)
    policy = plugin.auto_wrap_policy
    assert isinstance(policy, functools.partial)
    classes = {layer.__name__ for layer in policy.keywords["transformer_layer_cls"]}
    assert classes == {"MDMASRDecoderLayer", "ParakeetEncoderBlock"}
    assert decoder_mdm_asr.MDMASRDecoderLayer in policy.keywords["transformer_layer_cls"]
    wrapped = [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=0)]
    assert len(wrapped) == 4  # 2 layers each.


if __name__ == "__main__":
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]), int(sys.argv[3]))
    elif sys.argv[1] == "distil":
        distil(Path(sys.argv[2]))
    else:
        shard(Path(sys.argv[2]))
    # All is written: threads of the group that are left may abort an interpreter that ends in the ordinary way.
    sys.stdout.flush()
    os._exit(0)
