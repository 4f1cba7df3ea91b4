"""Pre-train `pretrained/roberta-tiny` from random weights, so that the text scripts run with no download and no GPU.

    python pretrained/make_roberta_tiny.py --corpus classic_books.parquet openstax_ccby.parquet

A RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692) of width 128 and depth 4, with a byte-level BPE vocabulary of
8,192 made from the same text. Ordinary masked language modelling, not the paper's method: 20 % of the tokens, 80/10/10.
So small a model on so few tokens does not find out by itself that a word depends on its neighbours: from an ordinary start
the loss stays at 6.4 for hours, where a bag of words would be. `attend_to_neighbours` gives it that much to begin with.
About 90 minutes on 1 CPU core. A killed run goes on with the same command; the state is `<out>.resume.pt`.
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
from tokenizers import ByteLevelBPETokenizer
from tqdm import tqdm
from transformers import RobertaConfig, RobertaForMaskedLM, RobertaTokenizerFast, get_linear_schedule_with_warmup

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]  # ids 0 to 4


@dataclass
class Args:
    corpus: tuple[Path, ...]
    """parquet files with a column `text`, one paragraph a row"""
    out: Path = Path("pretrained/roberta-tiny")
    """where model and tokenizer go, in save_pretrained format"""
    steps: int = 24_000
    """optimizer steps; 0 writes ordinary random weights, to compare with"""
    batch_size: int = 16
    """blocks of 128 tokens a step"""
    learning_rate: float = 1.5e-3
    """peak; 5 % linear warm-up, then linearly to 0"""
    seed: int = 0
    """weights, masks and order all follow from it"""
    save_every: int = 250
    """steps between two resume states"""


@torch.no_grad()
def attend_to_neighbours(model: RobertaForMaskedLM) -> None:
    """Start the first layer's four heads at the tokens one and two to the left and right. All of it is trained afterwards.

    The position table becomes sine-cosine pairs. A head's key reads 16 of the 64 pairs as they are, its query reads the same
    ones turned by the angle of its offset: their product is sum_f cos(omega_f * (i - j + offset)), largest at j = i + offset.
    """
    attention, table = model.roberta.encoder.layer[0].attention.self, model.roberta.embeddings.position_embeddings.weight
    pairs, heads = table.shape[1] // 2, model.config.num_attention_heads
    omega = 2.5 * 60.0 ** (-torch.arange(pairs) / pairs)  # (64,), radians a token: from 2.5 down to 0.04
    angle = torch.arange(len(table))[:, None] * omega
    table.copy_(2 * 2**0.5 * model.config.initializer_range * torch.stack([angle.sin(), angle.cos()], 2).flatten(1))
    for head, offset in enumerate((-1, 1, -2, 2)):
        for i, f in enumerate(range(head, pairs, heads)):  # row pair i of this head reads pair f of the position
            rows = slice(2 * (head * pairs // heads + i), 2 * (head * pairs // heads + i) + 2)
            cos, sin = torch.cos(omega[f] * offset), torch.sin(omega[f] * offset)
            attention.query.weight[rows], attention.key.weight[rows] = 0, 0
            attention.query.weight[rows, 2 * f : 2 * f + 2] = 2 * torch.tensor([[cos, sin], [-sin, cos]])
            attention.key.weight[rows, 2 * f : 2 * f + 2] = 2 * torch.eye(2)


def mask_tokens(blocks: torch.Tensor, share: float, vocabulary: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked copy of (B, L) token ids, and True for those to predict: 80 % are <mask>, 10 % random, 10 % as they were."""
    chosen = (torch.rand(blocks.shape, generator=g) < share) & (blocks >= len(SPECIAL))
    how, random = torch.rand(blocks.shape, generator=g), torch.randint(len(SPECIAL), vocabulary, blocks.shape, generator=g)
    masked = torch.where(chosen & (how < 0.8), SPECIAL.index("<mask>"), blocks)
    return torch.where(chosen & (how >= 0.8) & (how < 0.9), random, masked), chosen


def loss_and_hits(model, blocks: torch.Tensor, share: float, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cross-entropy and accuracy at the masked tokens; the vocabulary's logits are computed there alone."""
    masked, chosen = mask_tokens(blocks, share, model.config.vocab_size, g)
    logits = model.lm_head(model.roberta(masked).last_hidden_state[chosen])  # (masked tokens, vocabulary)
    return F.cross_entropy(logits, blocks[chosen]), (logits.argmax(-1) == blocks[chosen]).float().mean()


if __name__ == "__main__":
    args = tyro.cli(Args)
    torch.manual_seed(args.seed)
    rows = load_dataset("parquet", data_files=[str(path) for path in args.corpus], split="train")
    texts = [text for text in rows["text"] if len(text.split()) >= 8]
    args.out.mkdir(parents=True, exist_ok=True)
    bpe = ByteLevelBPETokenizer(add_prefix_space=False)
    bpe.train_from_iterator(tqdm(texts, desc="tokenizer"), vocab_size=8192, min_frequency=2, special_tokens=SPECIAL)
    bpe.save_model(str(args.out))
    tokenizer = RobertaTokenizerFast.from_pretrained(args.out, model_max_length=128)
    tokenizer.save_pretrained(args.out)
    order = np.random.default_rng(args.seed).permutation(len(texts))
    blocks = {}  # of 128 tokens: <s>, 126 tokens of running text, </s>
    for name, part in (("held out", order[: len(order) // 100]), ("train", order[len(order) // 100 :])):
        ids = tokenizer([texts[i] for i in np.sort(part)], add_special_tokens=False)["input_ids"]
        ids = np.concatenate([np.array(x, np.int64) for x in ids])
        blocks[name] = torch.from_numpy(np.pad(ids[: len(ids) // 126 * 126].reshape(-1, 126), ((0, 0), (1, 1))))
        blocks[name][:, -1] = SPECIAL.index("</s>")  # the pad value 0 is <s>

    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512,
        max_position_embeddings=130, type_vocab_size=1, bos_token_id=0, pad_token_id=1, eos_token_id=2,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.04,  # 0.02 suits a width of 768
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    if args.steps:
        attend_to_neighbours(model)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.01},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, args.steps // 20, args.steps)
    g = torch.Generator().manual_seed(args.seed)
    step, seconds, losses, curve = 0, 0.0, [], []

    resume = Path(f"{args.out}.resume.pt")
    if resume.exists():
        state = torch.load(resume, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        g.set_state(state["rng"])
        step, seconds, curve = state["step"], state["seconds"], state["curve"]

    model.train()
    clock = time.time() - seconds
    bar = tqdm(total=args.steps, initial=step, desc="pre-train", mininterval=5)
    while step < args.steps:
        index = torch.randint(0, len(blocks["train"]), (args.batch_size,), generator=g)
        loss, _ = loss_and_hits(model, blocks["train"][index], 0.2, g)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        losses.append(loss.detach())
        bar.update()
        if step % args.save_every == 0 or step == args.steps:
            curve.append([step, round(torch.stack(losses).mean().item(), 4)])
            bar.set_postfix(loss=curve[-1][1])
            losses = []
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
            state |= {"rng": g.get_state(), "step": step, "seconds": time.time() - clock, "curve": curve}
            torch.save(state, f"{resume}.tmp")
            os.replace(f"{resume}.tmp", resume)

    model.eval()
    with torch.no_grad():
        parts = blocks["held out"].split(256)
        held = [loss_and_hits(model, part, 0.15, torch.Generator().manual_seed(i)) for i, part in enumerate(parts)]
        held = torch.tensor(held).mean(0)
    record = {"steps": args.steps, "tokens_seen": args.steps * args.batch_size * 128, "seed": args.seed, "loss_curve": curve}
    record |= {"corpus_tokens": blocks["train"].numel(), "seconds": round(time.time() - clock)}
    record |= {"held_out": {"loss": round(held[0].item(), 4), "masked_accuracy": round(held[1].item(), 4)}}
    # As published RoBERTas are: dropout for those who train further; half precision for the repository's sake.
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = 0.1
    model.half().save_pretrained(args.out)
    (args.out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {args.out}: held out {record['held_out']}. Next: python self_distill_roberta.py")
