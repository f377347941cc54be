"""nanoGPT's model and training loop, written again, to compare `task=language` with.

After model.py and train.py of Karpathy's nanoGPT (2022, MIT licence), for one device, in float32,
without gradient accumulation. Names of modules are those of GPT-2's checkpoints, as there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import Table, in_turn
from benchmarks.step import train_py
from regrow.distributed.parallel import World

OPTIONS = (
    *("task=language", "data=text", "model=gpt", "data.batch_size=16", "data.augment=true"),
    *("optimizer.lr=0.001", "optimizer.weight_decay=0.1", "optimizer.betas=[0.9,0.99]"),
    *("scheduler=constant", "trainer.clip_norm=1.0"),
)
STEPS = 20


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd)
        self.c_proj = nn.Linear(n_embd, n_embd)
        self.n_head, self.n_embd = n_head, n_embd

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=0, is_causal=True)
        out: Tensor = self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))
        return out


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(n_embd)
        self.attn = CausalSelfAttention(n_embd, n_head)
        self.ln_2 = nn.LayerNorm(n_embd)
        self.c_fc = nn.Linear(n_embd, 4 * n_embd)
        self.c_proj = nn.Linear(4 * n_embd, n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(F.gelu(self.c_fc(self.ln_2(x))))


class NanoGPT(nn.Module):
    def __init__(
        self, *, vocab_size: int, block_size: int, n_layer: int, n_head: int, n_embd: int
    ) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, n_embd)
        self.wpe = nn.Embedding(block_size, n_embd)
        self.h = nn.ModuleList([Block(n_embd, n_head) for _ in range(n_layer)])
        self.ln_f = nn.LayerNorm(n_embd)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.wte.weight = self.lm_head.weight
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, mean=0.0, std=0.02 / math.sqrt(2 * n_layer))

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, mean=0.0, std=0.02)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        pos = torch.arange(0, idx.size(1), dtype=torch.long, device=idx.device)
        x = self.wte(idx) + self.wpe(pos)
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def like(ours: nn.Module, *, n_head: int) -> NanoGPT:
    """Return nanoGPT's model with the weights of a `lab.models.gpt.GPT`."""
    state = ours.state_dict()
    (vocab_size, n_embd), block_size = (
        state["token_embedding.weight"].shape,
        len(state["position_embedding.weight"]),
    )
    n_layer = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    model = NanoGPT(
        vocab_size=vocab_size, block_size=block_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd
    )
    names = {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "blocks.": "h.",
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attention.query_key_value": "attn.c_attn",
        "attention.project": "attn.c_proj",
        "mlp.expand": "c_fc",
        "mlp.project": "c_proj",
        "norm.": "ln_f.",
    }
    theirs = {}
    for name, tensor in state.items():
        for one, other in names.items():
            name = name.replace(one, other)
        theirs[name] = tensor.clone()
    theirs["lm_head.weight"] = theirs["wte.weight"]
    model.load_state_dict(theirs)
    return model


def configure_optimizers(model: nn.Module, *, decays_all: bool = False) -> torch.optim.AdamW:
    params = [p for p in model.parameters() if p.requires_grad]
    decay = [p for p in params if p.dim() >= 2 or decays_all]
    nodecay = [p for p in params if p.dim() < 2 and not decays_all]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": nodecay, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)


def train(
    model: NanoGPT,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    log_interval: int = 1,
) -> list[float]:
    """Return the loss of every `log_interval`-th iteration."""
    model.train()
    lossf = []
    for iter_num, (X, Y) in enumerate(batches):
        loss = model(X, Y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if iter_num % log_interval == 0:
            lossf.append(loss.item())
    return lossf


def get_batch(data: np.ndarray, batch_size: int, block_size: int) -> tuple[Tensor, Tensor]:
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack(
        [torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix]
    )
    return x, y


def reference(model: NanoGPT, data: np.ndarray, steps: int) -> Callable[[], float]:
    optimizer = configure_optimizers(model)

    def run() -> float:
        batches = (get_batch(data, 16, 64) for _ in range(steps))
        started = time.perf_counter()
        train(model, optimizer, batches, log_interval=10)
        return time.perf_counter() - started

    return run


def measure() -> Table:
    torch.set_num_threads(1)
    world = World(device=torch.device("cpu"))
    ours, inputs, _ = train_py(world, *OPTIONS, steps=STEPS, before=3)
    data = inputs.flatten().numpy().astype(np.uint16)
    model = NanoGPT(vocab_size=76, block_size=64, n_layer=4, n_head=4, n_embd=128)
    return Table(
        title="A training step of a GPT on text (0.8 million parameters)",
        note="model=gpt on data=text, 16 windows of 64 characters a step, beside nanoGPT's model "
        f"and loop, written again. The whole loop, as for a step. One thread, {STEPS} steps a "
        "round; tests/test_nanogpt.py compares the losses.",
        unit="ms a step",
        reference="nanoGPT's loop",
        seconds=in_turn(
            {"train.py": ours, "nanoGPT's loop": reference(model, data, STEPS)}, rounds=9
        ),
        per=STEPS,
        scale=1e3,
    )
