"""What each codec and block size costs and gives, on a pseudo-gradient of real training.

    python tests/bench_codecs.py                       # some 20 seconds
    python tests/bench_codecs.py --steps 200 --text my.txt

Trains a small Llama for some steps, takes the difference of its parameters, and encodes that with
blocks of several sizes. `error` is the norm of what rounding loses over the norm of the difference.
A bit more for each number would halve it, so `error at equal bytes` is error * 2 ** (bits a number,
scales included): the block with the least of it makes the most of its bytes.
"""

import argparse
import os
import sys
import time

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import model as models
import protocol
import worker


def pseudo_gradient(steps, text):
    """The parameters before minus after some steps of AdamW, as one float32 vector."""
    torch.manual_seed(1)
    config = models.Config(
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = models.Llama(config)
    tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 129, (8,)).tolist()
        batch = torch.from_numpy(np.stack([tokens[a : a + 129] for a in starts]))
        optimizer.zero_grad()
        model(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return before - torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--text", help="a text file (the built-in stories)")
    args = parser.parse_args()
    text = "\n".join(worker.story(1, number) for number in range(400))
    if args.text:
        with open(args.text, encoding="utf-8") as file:
            text = file.read()
    delta = pseudo_gradient(args.steps, text)
    print(f"{delta.numel():,} numbers, {args.steps} steps, largest over mean size "
          f"{delta.abs().max() / delta.abs().mean():.0f}")  # fmt: skip
    print(
        "codec           bytes a number    error    error at equal bytes    ns a number, both ways"
    )
    for bits in (8, 4, 2):
        for block in (16, 32, 64, 128, 256, 512):
            protocol.BLOCK = block
            show(f"int{bits}, block {block}", protocol.Blocks(bits), delta)
    protocol.BLOCK = 64
    for every in (16, 32):
        show(f"top{every}", protocol.Largest(every), delta)
    pieces = torch.nn.functional.pad(delta, (0, -delta.numel() % 4096)).view(-1, 4096)
    for kept in (64, 128):
        at = pieces.abs().topk(kept, 1).indices
        left = pieces.scatter(1, at, 0.0).norm() / delta.norm()
        size = (kept * 14 / 8 + 4) / 4096  # 12 bits for a place, 2 for a value, two scales
        print(f"{kept} of 4096     {size:14.4f}  {left:8.5f}    (values as they are)")


def show(name, codec, delta):
    """Print what a codec costs and loses on a vector."""
    decoded, buffer = torch.empty_like(delta), protocol.Payload(codec.layout(delta.numel()))
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        for start, stop in protocol.chunks(delta.numel()):
            codec.encode(delta[start:stop], buffer.tensors, start)
            codec.decode(buffer.tensors, start, decoded[start:stop])
        seconds.append(time.perf_counter() - began)
    size = len(buffer.raw) / delta.numel()
    error = ((delta - decoded).norm() / delta.norm()).item()
    print(
        f"{name:16}{size:14.4f}  {error:8.5f}  {error * 2 ** (8 * size):22.3f}  "
        f"{min(seconds) / delta.numel() * 1e9:24.2f}"
    )


if __name__ == "__main__":
    main()
