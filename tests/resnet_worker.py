"""A small ResNet that classifies pictures, synchronized by DiLoCoWorker: the worker of
test_untrained.py. Each worker sees pictures of its own, of its own brightness, so that the statistics
of its BatchNorm differ. Writes all of its state dict to --out, and prints what the network makes of
pictures that nobody has trained on.

    python tests/resnet_worker.py --server 127.0.0.1:8512 --worker-id w0 --out w0.safetensors
"""

import argparse
import json
import os
import sys

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy, relu

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from diloco_callback import DiLoCoWorker

CLASSES = 4


class Block(nn.Module):
    """Two convolutions with BatchNorm, and a way past them."""

    def __init__(self, inside, outside, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.past = nn.Sequential(
            nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
        )

    def forward(self, x):
        return relu(self.bn2(self.conv2(relu(self.bn1(self.conv1(x))))) + self.past(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(1, 8, 1), Block(8, 16, 2))
        self.head = nn.Linear(16, CLASSES)
        self.register_buffer("local", torch.zeros(1), persistent=False)

    def forward(self, x):
        self.local += len(x)
        return self.head(self.blocks(x).mean((2, 3)))


def pictures(count, seed, brightness=1.0):
    """Pictures of 8 x 8 with a bright quarter, and which one it is."""
    generator = torch.Generator().manual_seed(seed)
    where = torch.randint(CLASSES, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for image, quarter in zip(images, where.tolist(), strict=True):
        row, column = 4 * (quarter // 2), 4 * (quarter % 2)
        image[0, row : row + 4, column : column + 4] += 1
    return brightness * images, where


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    parser.add_argument("--worker-id", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("--sync-every", type=int, default=5)
    parser.add_argument("--num-fragments", type=int, default=1)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pictures, and of their brightness"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    net = ResNet()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    options = {"sync_every": args.sync_every, "num_fragments": args.num_fragments}
    with DiLoCoWorker(net, optimizer, args.server, worker_id=args.worker_id, **options):
        for step in range(args.steps):
            images, where = pictures(32, 1000 * args.seed + step, 1 + args.seed / 2)
            optimizer.zero_grad()
            cross_entropy(net(images), where).backward()
            optimizer.step()
    net.eval()
    images, where = pictures(256, 99)
    with torch.no_grad():
        logits = net(images)
    right = (logits.argmax(1) == where).float().mean().item()
    save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, args.out)
    print(json.dumps({"logits": logits.tolist(), "right": right, "local": net.local.item()}))


if __name__ == "__main__":
    main()
