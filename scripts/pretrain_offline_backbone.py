"""Pre-trains a backbone that the package ships, on fresh drawings of the source task, on one CPU core.

    python scripts/pretrain_offline_backbone.py
    python scripts/pretrain_offline_backbone.py --model vit_offline_deep_patch8_32 --stack vit_offline_patch8_32

Every batch is new: image n of the run is the source task's drawing number n, so a run is fixed by its seed and an
interrupted one goes on from its last checkpoint. Writes the weights (fp16 safetensors) and a JSON card beside them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

from mosa_kernels._weights import write_tensors
from mosa_kernels.data.backbone import ASSETS, OFFLINE_BACKBONE, OFFLINE_BACKBONES, file_hash
from mosa_kernels.data.procedural import DRAWN_TASKS
from mosa_kernels.train.folder import write_json

SOURCE = DRAWN_TASKS["source"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=OFFLINE_BACKBONES, default=OFFLINE_BACKBONE)
    parser.add_argument(
        "--stack", choices=OFFLINE_BACKBONES, help="start from this one, with each of its blocks as often as fits"
    )
    parser.add_argument("--steps", type=int, default=9600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--warm-up", type=int, default=400, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--test-images", type=int, default=4096)
    parser.add_argument("--validation-images", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrain"), help="checkpoints and the log")
    return parser.parse_args()


def batch_of(model: nn.Module, seed: int, stream: str, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Drawings start .. start + count - 1: normalised images [count, 3, 32, 32] and labels [count]."""
    images, labels = SOURCE.draw(seed, stream, np.arange(start, start + count))
    cfg = model.pretrained_cfg
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    return (pixels - mean) / std, torch.from_numpy(labels)


def learning_rate(step: int, options: argparse.Namespace) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < options.warm_up:
        return options.lr * (step + 1) / options.warm_up
    done = (step - options.warm_up) / max(1, options.steps - options.warm_up)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


def decayed_and_not(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and convolutions only."""
    decayed = [p for name, p in model.named_parameters() if p.ndim >= 2 and "pos_embed" not in name]
    kept = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in kept]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@torch.inference_mode()
def accuracy(model: nn.Module, seed: int, stream: str, count: int) -> float:
    """Share of right answers, in percent, on `count` drawings that no training step has seen."""
    model.eval()
    right = 0
    for start in range(0, count, 256):
        images, labels = batch_of(model, seed, stream, start, min(256, count - start))
        right += int((model(images).argmax(1) == labels).sum())
    model.train()
    return 100 * right / count


def save_checkpoint(path: Path, step: int, model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    for parameter, state in optimizer.state.items():
        tensors |= {f"{key}/{names[id(parameter)]}": value for key, value in state.items()}
    write_tensors(path, tensors, {"step": str(step)})


def load_checkpoint(path: Path, model: nn.Module, optimizer: torch.optim.AdamW) -> int:
    """Restores model and optimizer; returns the number of steps already done."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    model.load_state_dict({name[len("model/") :]: t for name, t in tensors.items() if name.startswith("model/")})
    for name, parameter in model.named_parameters():
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    return step


def train(model: nn.Module, options: argparse.Namespace) -> float:
    """Trains in place; returns the seconds that this process spent."""
    optimizer = torch.optim.AdamW(decayed_and_not(model, options.weight_decay), lr=options.lr)
    checkpoint = options.work / f"{options.model}-seed{options.seed}.safetensors"
    first = load_checkpoint(checkpoint, model, optimizer) if checkpoint.exists() else 0
    began, shown = time.perf_counter(), 0.0
    for step in range(first, options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options)
        images, labels = batch_of(model, options.seed, "train", step * options.batch, options.batch)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        shown = loss.item() if step == first else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            rate = (step + 1 - first) * options.batch / (time.perf_counter() - began)
            print(f"step {step + 1}/{options.steps}  loss {shown:.3f}  {rate:.0f} images/s", flush=True)
        if (step + 1) % 300 == 0 or step + 1 == options.steps:
            save_checkpoint(checkpoint, step + 1, model, optimizer)
            print(
                f"  validation accuracy {accuracy(model, options.seed, 'validation', options.validation_images):.1f} %",
                flush=True,
            )
    return time.perf_counter() - began


def stack(model: nn.Module, name: str) -> None:
    """Gives a deeper model the weights of a trained one: each block follows itself (progressive stacking)."""
    trained = timm.create_model(name, pretrained=True)
    times, rest = divmod(len(model.blocks), len(trained.blocks))
    if rest:
        raise SystemExit(f"--stack: expected a backbone whose blocks divide {len(model.blocks)}, got {name}")
    tensors = {key: tensor for key, tensor in trained.state_dict().items() if not key.startswith("blocks.")}
    for number in range(len(model.blocks)):
        block = trained.blocks[number // times].state_dict()
        tensors |= {f"blocks.{number}.{key}": tensor for key, tensor in block.items()}
    model.load_state_dict(tensors)


def architecture_of(model: nn.Module) -> dict[str, object]:
    """What the card says of it."""
    facts: dict[str, object] = {
        "class": f"timm {type(model).__name__} with a convolutional stem (mosa_kernels.data.backbone.ConvStem)",
        "image_size": 32,
        "patch_size": model.patch_embed.patch_size[0],
        "embed_dim": model.embed_dim,
    }
    if hasattr(model, "blocks"):
        facts |= {"depth": len(model.blocks), "heads": model.blocks[0].attn.num_heads}
    else:
        facts |= {"depths": [len(stage.blocks) for stage in model.layers]}
        facts |= {"heads": [stage.blocks[0].attn.num_heads for stage in model.layers]}
    return facts | {"parameters": sum(p.numel() for p in model.parameters())}


def ship(model: nn.Module, options: argparse.Namespace, seconds: float) -> dict[str, object]:
    """Writes the weights and their card; the accuracies are those of the stored fp16 weights."""
    weights = options.out / f"{options.model}.safetensors"
    stored = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    write_tensors(weights, stored, {"architecture": options.model})
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    command = ["python", "scripts/pretrain_offline_backbone.py"]
    for name in ("model", "stack", "steps", "batch", "lr", "weight_decay", "warm_up", "seed"):
        if getattr(options, name) is None:
            continue
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    card: dict[str, object] = {
        "name": options.model,
        "sha256": file_hash(weights),
        "storage": "float16",
        "architecture": architecture_of(model),
        "normalisation": {name: list(model.pretrained_cfg[name]) for name in ("mean", "std")},
        "source_task": {"name": "offline:source", "classes": list(SOURCE.classes)},
        "command": " ".join(command),
        "seed": options.seed,
        "images_seen": options.steps * options.batch,
        "seconds": round(seconds),
        "threads": options.threads,
        "source_accuracy_percent": round(accuracy(model, options.seed, "test", options.test_images), 2),
        "source_test_images": options.test_images,
        "made_with": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
    write_json(weights.with_suffix(".json"), card)
    return card


def main() -> int:
    options = arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    model = timm.create_model(options.model)
    if options.stack is not None:
        stack(model, options.stack)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    seconds = train(model, options)
    print(json.dumps(ship(model, options, seconds), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
