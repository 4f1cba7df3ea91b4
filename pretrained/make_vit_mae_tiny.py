"""Pre-train `pretrained/vit-mae-tiny` from random weights, so that the five scripts run with no download and no GPU.

    python pretrained/make_vit_mae_tiny.py --images tiny_imagenet_64px/train.parquet

A ViT-MAE (He et al. 2022, https://arxiv.org/abs/2111.06377) of width 192 and depth 5 on 64x64 images cut in 8x8 patches.
This is ordinary pre-training, not the paper's method: here, and only here, images are cropped and flipped, since
nothing but augmentation keeps some ten thousand pictures from being learned by heart over many epochs.
The matrices are trained by Muon (torch.optim.Muon; Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), which got
the loss to 0.69 in three minutes where AdamW was at 0.74. About 90 minutes on 1 CPU core.
A killed run goes on with the same command; the state is `<out>.resume.pt`.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining, get_linear_schedule_with_warmup

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in the published ViT-MAE checkpoints


@dataclass
class Args:
    images: Path
    """a parquet file with a column `image`"""
    out: Path = Path("pretrained/vit-mae-tiny")
    """where the model goes, in save_pretrained format"""
    steps: int = 10_000
    """optimizer steps; 0 writes the random weights themselves, to compare with"""
    batch_size: int = 128
    """images a step"""
    learning_rate: float = 1e-3
    """AdamW's peak; 2 % linear warm-up, then linearly to 0"""
    muon_learning_rate: float = 0.02
    """the same for Muon, which trains the matrices of the layers"""
    seed: int = 0
    """weights, masks, crops and order all follow from it"""
    save_every: int = 250
    """steps between two resume states"""


def sincos_2d(dim: int, grid: int) -> torch.Tensor:
    """Fixed position table, (1, 1 + grid * grid, dim): a zero row for CLS, then row-major patches.

    First half of the vector from the column, second half from the row: the order of the published weights.
    """
    omega = 10_000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega  # (grid, dim/4)
    one_axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim/2)
    table = torch.cat([one_axis.repeat(grid, 1), one_axis.repeat_interleave(grid, 0)], dim=1)  # (grid*grid, dim)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def random_crop_flip(x: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    """Square crops of 30 to 100 % of the area, flipped half of the time, one bilinear sampling. (B, C, H, W) -> same."""
    b = len(x)
    side = (0.3 + 0.7 * torch.rand(b, generator=g)).sqrt()  # of the crop, as a fraction of the image's
    shift = (1 - side)[:, None] * (2 * torch.rand(b, 2, generator=g) - 1)  # of its centre, in [-1, 1] coordinates
    flip = 1 - 2 * torch.randint(0, 2, (b,), generator=g)
    theta = torch.zeros(b, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = side * flip, side, shift
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


if __name__ == "__main__":
    args = tyro.cli(Args)
    rows = load_dataset("parquet", data_files=str(args.images), split="train").select_columns("image")
    rows = rows if args.steps else rows.select(range(1))
    images = np.stack([np.asarray(row["image"].convert("RGB")) for row in tqdm(rows, desc="decode")])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)  # uint8 (N, 3, 64, 64)

    torch.manual_seed(args.seed)
    config = ViTMAEConfig(
        hidden_size=192, num_hidden_layers=5, num_attention_heads=3, intermediate_size=768,
        decoder_hidden_size=96, decoder_num_hidden_layers=1, decoder_num_attention_heads=3, decoder_intermediate_size=384,
        image_size=64, patch_size=8, mask_ratio=0.75, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    # transformers 5 leaves both tables at zero when a model is built from a config, and they are frozen.
    model.vit.embeddings.position_embeddings.data.copy_(sincos_2d(192, 8))
    model.decoder.decoder_pos_embed.data.copy_(sincos_2d(96, 8))

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = [p for name, p in trained.items() if p.ndim == 2 and "layer" in name]
    others = [p for p in trained.values() if not any(p is m for m in matrices)]
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    muon = torch.optim.Muon(matrices, lr=args.muon_learning_rate, weight_decay=0.05)
    schedules = [get_linear_schedule_with_warmup(o, args.steps // 50, args.steps) for o in (adam, muon)]
    parts = {"model": model, "adam": adam, "muon": muon, "adam_schedule": schedules[0], "muon_schedule": schedules[1]}
    g = torch.Generator().manual_seed(args.seed)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    step, seconds, losses, curve = 0, 0.0, [], []

    resume = Path(f"{args.out}.resume.pt")
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        g.set_state(state["rng"])
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    model.train()
    clock = time.time() - seconds
    bar = tqdm(total=args.steps, initial=step, desc="pre-train", mininterval=5)
    while step < args.steps:
        index = torch.randint(0, len(images), (args.batch_size,), generator=g)
        pixels = (random_crop_flip(images[index].float() / 255, g) - mean) / std
        loss = model(pixels, noise=torch.rand(args.batch_size, 64, generator=g)).loss
        loss.backward()
        for part in (adam, muon, *schedules):
            part.step()
        model.zero_grad()
        step += 1
        losses.append(loss.detach())
        bar.update()
        if step % args.save_every == 0 or step == args.steps:
            curve.append([step, round(torch.stack(losses).mean().item(), 4)])
            bar.set_postfix(loss=curve[-1][1])
            losses = []
            state = {name: part.state_dict() for name, part in parts.items()}
            state |= {"rng": g.get_state(), "step": step, "seconds": time.time() - clock, "curve": curve}
            torch.save(state, f"{resume}.tmp")
            os.replace(f"{resume}.tmp", resume)

    model.half().save_pretrained(args.out)  # half precision for the repository's sake; the scripts load it as fp32
    # transformers 5.23 writes the decoder's layers under a name that 4.x cannot read; both read the published layout.
    weights = load_file(args.out / "model.safetensors")
    weights = {key.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): w for key, w in weights.items()}
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    processor = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(args.out)
    record = {"steps": args.steps, "images_seen": args.steps * args.batch_size, "seed": args.seed, "loss_curve": curve}
    record["seconds"] = round(time.time() - clock)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}: {args.steps:,} steps, last point of the loss {curve[-1:]}. Next: python self_distill_vit.py")
