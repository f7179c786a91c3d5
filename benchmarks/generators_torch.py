"""The peer of train_step.py and sampling.py: jaxgen's transformer and U-Net, their training step and sampler, in PyTorch.

At its best as far as its manuals tell: torch.compile (max-autotune with CUDA graphs on a GPU), scaled_dot_product_attention,
channels-last convolutions, fused AdamW, averages by foreach, bfloat16 autocast where it is native, all threads, nothing read
back in a step. Modules are named as jaxgen's, so that weights move over by name."""

import copy
import itertools
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workers import Work, serve

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class RMSNorm(nn.Module):
    def __init__(self, width: int, learned: bool = True):
        super().__init__()
        self.width, self.weight = (width,), nn.Parameter(torch.ones(width)) if learned else None

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.width, self.weight, 1e-6)


class Conv(nn.Module):
    """Over [B, H, W, C], which as [B, C, H, W] is channels-last already."""

    def __init__(self, din: int, dout: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dout, din, 3, 3).to(memory_format=torch.channels_last))
        self.bias = nn.Parameter(torch.empty(dout))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x.permute(0, 3, 1, 2), self.weight, self.bias, padding=1).permute(0, 2, 3, 1)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class MLPEmbed(nn.Module):
    def __init__(self, din: int, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(din, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x)))


class Attention(nn.Module):
    def __init__(self, width: int, head_dim: int, context: int | None = None):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_norm, self.k_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.out = nn.Linear(width, width, bias=False)
        if context is not None:
            self.context_k, self.context_v = (nn.Linear(context, width, bias=False) for _ in range(2))
            self.context_norm = RMSNorm(head_dim)

    def forward(self, x: Tensor, mask: Tensor, rotary: Tensor, context: Tensor | None = None) -> Tensor:
        q = rotate(self.q_norm(self.heads(self.q(x))), rotary)
        k, v = rotate(self.k_norm(self.heads(self.k(x))), rotary), self.heads(self.v(x))
        if context is not None:
            k = torch.cat([k, self.context_norm(self.heads(self.context_k(context)))], 2)
            v = torch.cat([v, self.heads(self.context_v(context))], 2)
        y = F.scaled_dot_product_attention(q, k, v.to(q.dtype), mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class TextBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.attention, self.mlp = Attention(width, 32), MLP(width, 2 * width)

    def forward(self, x: Tensor, mask: Tensor, rotary: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), mask, rotary)
        return x + self.mlp(self.norm2(x))


class Conditioning(nn.Module):
    def __init__(self, hidden: int, pooled: int, width: int, refiner: int):
        super().__init__()
        self.time, self.pooled, self.tokens = MLPEmbed(128, width), MLPEmbed(pooled, width), nn.Linear(hidden, width)
        self.blocks = nn.ModuleList([TextBlock(width) for _ in range(refiner)])
        self.register_buffer("frequencies", torch.empty(64), persistent=False)  # jaxgen's

    def forward(self, t: Tensor, hidden: Tensor, pooled: Tensor, mask: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        angles = t[:, None] * self.frequencies * torch.pi
        vector = self.time(torch.cat([angles.cos(), angles.sin()], -1)) + self.pooled(
            F.rms_norm(pooled, pooled.shape[-1:], eps=1e-6)
        )
        tokens = self.tokens(F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6))
        for block in self.blocks:
            tokens = block(tokens, mask, rotary)
        return F.silu(vector), tokens


class Transformer(nn.Module):
    def __init__(self, c: dict, size: int, text: int, tokens: int):
        super().__init__()
        self.patch, width, rows = c["patch"], c["width"], size // c["patch"]
        self.conditioning = Conditioning(text, text, width, c["refiner"])
        self.stem = nn.Linear(3 * self.patch**2, width)
        self.blocks = nn.ModuleList([Block(c) for _ in range(c["depth"])])
        self.norm, self.modulation = RMSNorm(width, learned=False), nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 3 * self.patch**2)
        self.register_buffer("text_rotary", rotary_1d(tokens, 32), persistent=False)
        self.register_buffer("rotary", rotary_2d(rows, c["head_dim"], still=tokens), persistent=False)

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        vector, tokens = self.conditioning(t, hidden, pooled, mask, self.text_rotary)
        patches = patchify(x, self.patch)
        b, rows, columns, _ = patches.shape
        stream = torch.cat([tokens, self.stem(patches.flatten(1, 2))], 1)
        mask = torch.cat([mask, mask.new_ones(b, rows * columns)], 1)
        for block in self.blocks:
            stream = block(stream, vector, mask, self.rotary)
        scale, shift = self.modulation(vector)[:, None].chunk(2, -1)
        out = self.head(self.norm(stream[:, tokens.shape[1] :]) * (1 + scale) + shift)
        return unpatchify(out.unflatten(1, (rows, columns)), self.patch)


class Block(nn.Module):
    def __init__(self, c: dict):
        super().__init__()
        width = c["width"]
        self.norm1, self.norm2 = RMSNorm(width, learned=False), RMSNorm(width, learned=False)
        self.attention, self.mlp = Attention(width, c["head_dim"]), MLP(width, c["mlp_ratio"] * width)
        self.modulation = nn.Linear(width, 4 * width)

    def forward(self, x: Tensor, vector: Tensor, mask: Tensor, rotary: Tensor) -> Tensor:
        scale1, shift1, scale2, shift2 = self.modulation(vector)[:, None].chunk(4, -1)
        x = x + self.attention(self.norm1(x) * (1 + scale1) + shift1, mask, rotary)
        return x + self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class UNet(nn.Module):
    def __init__(self, c: dict, size: int, text: int, tokens: int):
        super().__init__()
        self.patch, widths = c["patch"], c["widths"]
        self.conditioning = Conditioning(text, text, widths[-1], c["refiner"])
        self.stem = Conv(3 * self.patch**2, widths[0])

        def level(i: int, blocks: int) -> nn.ModuleList:
            rows = size // self.patch // 2**i
            return nn.ModuleList(
                [MapBlock(widths[i], widths[-1], c["attention"][i], c["head_dim"], rows) for _ in range(blocks)]
            )

        self.down = nn.ModuleList([level(i, n) for i, n in enumerate(c["down"])])
        self.up = nn.ModuleList([level(i, n) for i, n in enumerate(c["up"])])
        pairs = list(itertools.pairwise(widths))
        self.shrink = nn.ModuleList([nn.Linear(4 * a, b) for a, b in pairs])
        self.grow = nn.ModuleList([nn.Linear(b, 4 * a) for a, b in pairs])
        self.norm, self.head = RMSNorm(widths[0]), Conv(widths[0], 3 * self.patch**2)
        self.register_buffer("text_rotary", rotary_1d(tokens, 32), persistent=False)

    def forward(self, x: Tensor, t: Tensor, hidden: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        vector, tokens = self.conditioning(t, hidden, pooled, mask, self.text_rotary)
        x, skips = self.stem(patchify(x, self.patch)), []
        for i, blocks in enumerate(self.down):
            if i:
                x = self.shrink[i - 1](patchify(x, 2))
            for block in blocks:
                x = block(x, vector, tokens, mask)
            skips.append(x)
        for i in reversed(range(len(self.up))):
            if i + 1 < len(self.up):
                x = skips[i] + unpatchify(self.grow[i](x), 2)
            for block in self.up[i]:
                x = block(x, vector, tokens, mask)
        return unpatchify(self.head(F.silu(self.norm(x))), self.patch)


class MapBlock(nn.Module):
    def __init__(self, width: int, text: int, attends: str, head_dim: int, rows: int):
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.conv1, self.conv2, self.modulation = Conv(width, width), Conv(width, width), nn.Linear(text, 2 * width)
        self.attends = attends
        if attends == "joint":
            self.attention_norm, self.attention = RMSNorm(width), Attention(width, head_dim, text)
            self.register_buffer("rotary", rotary_2d(rows, head_dim), persistent=False)
        elif attends == "text":
            self.attention_norm, self.attention = RMSNorm(width), TextAttention(width, head_dim, text)

    def forward(self, x: Tensor, vector: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        scale, shift = self.modulation(vector)[:, None, None].chunk(2, -1)
        h = self.conv1(F.silu(self.norm1(x)))
        x = x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        if self.attends == "none":
            return x
        flat = self.attention_norm(x).flatten(1, 2)
        if self.attends == "joint":
            mask = torch.cat([mask.new_ones(flat.shape[:2]), mask], 1)
            y = self.attention(flat, mask, self.rotary, tokens)
        else:
            y = self.attention(flat, mask, tokens)
        return x + y.view_as(x)


class TextAttention(nn.Module):
    """To the text alone."""

    def __init__(self, width: int, head_dim: int, context: int):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.context_k, self.context_v = (nn.Linear(context, width, bias=False) for _ in range(2))
        self.q_norm, self.context_norm = RMSNorm(head_dim), RMSNorm(head_dim)

    def forward(self, x: Tensor, mask: Tensor, context: Tensor) -> Tensor:
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # noqa: E731
        q, k = self.q_norm(heads(self.q(x))), self.context_norm(heads(self.context_k(context)))
        y = F.scaled_dot_product_attention(q, k, heads(self.context_v(context)).to(q.dtype), mask[:, None, None, :])
        return self.out(y.transpose(1, 2).flatten(2))


def rotary_1d(length: int, head_dim: int) -> Tensor:
    """[2, length, head_dim / 2]: cosines and sines."""
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
    return torch.stack([angles.cos(), angles.sin()])


def rotary_2d(rows: int, head_dim: int, still: int = 0) -> Tensor:
    pairs = head_dim // 4
    frequencies = 100.0 ** (-torch.arange(pairs) / pairs)
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(rows), indexing="ij")
    angles = torch.cat([y.reshape(-1, 1) * frequencies, x.reshape(-1, 1) * frequencies], -1)
    angles = torch.cat([torch.zeros(still, 2 * pairs), angles])
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    cos, sin = rotary.to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def patchify(x: Tensor, patch: int) -> Tensor:
    b, h, w, c = x.shape
    return x.reshape(b, h // patch, patch, w // patch, patch, c).transpose(2, 3).reshape(b, h // patch, w // patch, -1)


def unpatchify(x: Tensor, patch: int) -> Tensor:
    b, h, w, _ = x.shape
    return x.reshape(b, h, w, patch, patch, -1).transpose(2, 3).reshape(b, h * patch, w * patch, -1)


def theirs(name: str, value: np.ndarray) -> tuple[str, Tensor]:
    """A weight of jaxgen's as PyTorch names and lays it out."""
    *path, last = name.split(".")
    x = torch.from_numpy(value)
    if last == "kernel":
        return ".".join([*path, "weight"]), x.T if x.ndim == 2 else x.permute(3, 2, 0, 1)
    if last == "scale":
        return ".".join([*path, "weight"]), x
    if last == "bias":
        return name, x
    flat = x.reshape(-1, x.shape[-1]) if last == "out" else x.reshape(len(x), -1)
    return ".".join([*path, last, "weight"]), flat.T


class Torch:
    def __init__(self):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        torch.set_float32_matmul_precision("high" if CUDA else "highest")
        self.mode = "max-autotune" if CUDA else "default"

    def load(self, problem: dict, file: str) -> None:
        self.problem, held = problem, np.load(file)
        kind = {"unet": UNet, "transformer": Transformer}[problem["network"]["type"]]
        tokens = held["hidden"].shape[2]
        self.model = kind(problem["network"], problem["size"], problem["text"], tokens)
        weights = {name.removeprefix("weight:"): held[name] for name in held.files if name.startswith("weight:")}
        self.model.load_state_dict(dict(theirs(name, value) for name, value in weights.items()))
        self.model.conditioning.frequencies.copy_(torch.from_numpy(held["frequencies"]))
        self.model.to(DEVICE)
        names = ("image", "hidden", "pooled", "mask", "t", "noise")
        self.batches = [[torch.from_numpy(held[name][i]).to(DEVICE) for name in names] for i in range(len(held["t"]))]
        self.dtype = torch.bfloat16 if problem["bfloat16"] else torch.float32

    def train(self, variant: str, drawn: bool) -> Work:
        """run: one step. With `drawn`, times and noise are drawn in it, else they are the batch's; show: its loss."""
        c, model = self.problem, copy.deepcopy(self.model)  # each variant trains its own
        model.train()
        matrices = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": c["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, c["learning_rate"], (c["b1"], c["b2"]), fused=True)
        weights = list(model.parameters())
        average = [p.detach().clone() for p in weights]

        def loss_of(image: Tensor, hidden: Tensor, pooled: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            image = image.float() / 127.5 - 1
            if drawn:
                normal, uniform = torch.sigmoid(c["time_mean"] + torch.randn_like(t)), torch.rand_like(t)
                t = torch.where(torch.rand_like(t) < c["time_uniform"], uniform, normal)
                noise = torch.randn_like(image)
            at = t[:, None, None, None]
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=c["bfloat16"]):
                clean = model((1 - at) * image + at * noise, t, hidden, pooled, mask)
            error = (clean.float() - image).square().mean((1, 2, 3))
            return (error / t.clamp(min=c["loss_min_time"]).square()).mean()

        loss_of = loss_of if variant == "eager" else torch.compile(loss_of, mode=self.mode)
        state = {"step": 0}

        def run() -> Tensor:
            step = state["step"]
            state["step"] += 1
            loss = loss_of(*self.batches[step % len(self.batches)])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, c["clip_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(c["ema_decay"], (1 + step) / (10 + step))
            torch._foreach_lerp_(average, weights, 1 - decay)
            if CUDA:
                torch.cuda.synchronize()
            return loss.detach()

        return run, lambda loss: loss.float().cpu().numpy()

    def sample(self, variant: str, count: int, steps: int, guidance: float, shift: float) -> Work:
        """run: `count` pictures by Euler's steps with guidance; show: the pictures in [-1, 1]."""
        model = self.model
        model.eval()
        _, hidden, pooled, mask, _, noise = (x[:count] for x in self.batches[0])
        none = [x[:1].expand_as(x) for x in self.batches[1][1:4]]
        both = [torch.cat([x, y[:count]]) for x, y in zip((hidden, pooled, mask), none, strict=True)]
        times = torch.linspace(1, 0, steps + 1)
        times = (shift * times / (1 + (shift - 1) * times)).tolist()
        forward = model if variant == "eager" else torch.compile(model, mode=self.mode)

        def run() -> Tensor:
            x = noise
            with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.problem["bfloat16"]):
                for t, after in itertools.pairwise(times):
                    at = torch.full((2 * count,), t, device=DEVICE)
                    with_text, without = forward(torch.cat([x, x]), at, *both).float().chunk(2)
                    clean = without + guidance * (with_text - without)
                    x = x + (after - t) * (x - clean) / max(t, 0.05)
            if CUDA:
                torch.cuda.synchronize()
            return x

        return run, lambda x: x.cpu().numpy()

    def bare(self, variant: str, tokens: int, width: int) -> Work:
        x, kernel = (torch.randn(s, device=DEVICE, dtype=self.dtype) for s in [(tokens, width), (width, 4 * width)])

        def run() -> Tensor:
            y = x @ kernel
            if CUDA:
                torch.cuda.synchronize()
            return y

        return run, lambda y: y.float().cpu().numpy()


if __name__ == "__main__":
    serve(Torch())
