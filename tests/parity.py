"""What does the loss pay for fewer syncs? A table of final validation losses, real processes all.

    python tests/parity.py                                   # three seeds, some 15 minutes
    python tests/parity.py --seeds 1 --only full,stream-4    # a part of it
    python tests/parity.py --against full-fp32 --only full-fp32,full,full-int8,full-int4
    python tests/parity.py --text my.txt --rounds 30 --sync-every 40

Trains a small model on one text: alone, alone with twice the batch (what two data-parallel workers
would do), with DiLoCo at two workers, and with streaming DiLoCo in 2 or 4 fragments, with a delay of one
interval (or, "tenth", of a tenth of the cycle) and each `fragment_update`; and the full model in each
codec both ways ("full" is bf16; "plain": without error feedback). Every run takes the same number of
steps and is judged by the loss of the global model on the same held-out text. The percentages are
against one variant (full-model DiLoCo, or `--against`) of the same seed, averaged.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TEXT = os.path.join(ROOT, "..", "shared", "data", "tinyshakespeare.txt")
SMALL = {  # 0.2 million parameters, a few milliseconds a step
    "model.hidden_size": 64,
    "model.intermediate_size": 172,
    "model.num_hidden_layers": 4,
    "model.num_attention_heads": 4,
    "train.batch_size": 8,
    "train.context": 64,
    "train.learning_rate": 0.002,
    "train.min_learning_rate": 0.0002,
    "train.warmup_steps": 40,
    "train.threads": 1,
    "output.eval_tokens": 32768,
    "output.save_every": 0,
    "output.log_every": 200,
}


def variants(sync_every):
    """{name: (workers, settings, server options)}; 0 workers: one, standalone."""

    def streaming(fragments, update, alpha=0.5, delay=None):
        return {
            "diloco.num_fragments": fragments,
            "diloco.fragment_update": update,
            "diloco.fragment_update_alpha": alpha,
            "diloco.fragment_sync_delay": "null" if delay is None else delay,
        }

    def codec(name, *more):
        return 2, {}, ["--upload-codec", name, "--download-codec", name, *more]

    tenth = max(1, sync_every // 10)
    return {
        "one": (0, {}, []),
        "twice-batch": (0, {"train.batch_size": 2 * SMALL["train.batch_size"]}, []),
        "full": (2, {}, []),
        "full-fp32": codec("fp32"),
        "full-int8": codec("int8"),
        "full-int4": codec("int4"),
        "full-int4-plain": codec("int4", "--no-error-feedback"),
        "full-paper": (2, {}, ["--no-momentum-warmup"]),
        "stream-2": (2, streaming(2, "predict"), []),
        "stream-2-rebase": (2, streaming(2, "rebase"), []),
        "stream-2-mix": (2, streaming(2, "mix"), []),
        "stream-4": (2, streaming(4, "predict"), []),
        "stream-4-rebase": (2, streaming(4, "rebase"), []),
        "stream-4-mix": (2, streaming(4, "mix"), []),
        "stream-4-tenth": (2, streaming(4, "predict", delay=tenth), []),
        "stream-4-tenth-rebase": (2, streaming(4, "rebase", delay=tenth), []),
    }


def train(folder, source, seed, steps, sync_every, workers, settings, options):
    """One run in an empty folder: (final validation loss, seconds)."""
    config = os.path.join(folder, "empty.yaml")
    with open(config, "w", encoding="utf-8") as file:
        blocks = {}
        values = {**SMALL, "train.seed": seed, "train.max_steps": steps, "data.source": source}
        values |= {"diloco.sync_every": sync_every, "output.eval_every": steps, **settings}
        for name, value in values.items():
            block, key = name.split(".")
            blocks.setdefault(block, []).append(f"  {key}: {value}\n")
        file.writelines(line for block, keys in blocks.items() for line in (f"{block}:\n", *keys))
    command = [os.path.join(ROOT, "worker.py"), config]
    if workers:
        command = [os.path.join(ROOT, "server.py"), "-m", "model", "-n", str(workers)]
        command += ["--port", "0", "--save-every", "0", "--spawn", config, *options]
    env = {k: v for k, v in os.environ.items() if not k.startswith("DILOCO_")}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    found = re.search(r"final validation loss ([\d.]+)", done.stdout)
    if done.returncode or not found:
        sys.exit(f"a run failed with exit code {done.returncode}:\n{done.stdout}")
    return float(found[1]), time.monotonic() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", help="a text file (tiny Shakespeare if there, else built-in)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (%(default)s)")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--sync-every", type=int, default=40)
    parser.add_argument("--only", help="names of variants, separated by commas")
    parser.add_argument("--against", default="full", help="the variant that others are held to")
    args = parser.parse_args()
    source = args.text or (TEXT if os.path.isfile(TEXT) else "builtin")
    source = source if source == "builtin" else os.path.abspath(source)
    steps = args.rounds * args.sync_every
    chosen = variants(args.sync_every)
    if args.only:
        chosen = {name: chosen[name] for name in args.only.split(",")}

    losses = {name: [] for name in chosen}
    print(f"{steps} steps, sync_every {args.sync_every}, {os.path.basename(source)}", flush=True)
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for name, (workers, settings, options) in chosen.items():
            with tempfile.TemporaryDirectory() as folder:
                loss, seconds = train(
                    folder, source, seed, steps, args.sync_every, workers, settings, options
                )
            losses[name].append(loss)
            print(f"seed {seed}  {name:20} {loss:.4f}  {seconds:.0f} s", flush=True)

    print(f"\n{'variant':20} {'mean':>7} {'spread':>7}  against {args.against}")
    for name, values in losses.items():
        spread = max(values) - min(values)
        against = ""
        if args.against in losses:
            ratios = [a / b for a, b in zip(values, losses[args.against], strict=True)]
            against = f"{100 * (statistics.mean(ratios) - 1):+.2f}%"
        print(f"{name:20} {statistics.mean(values):7.4f} {spread:7.4f}  {against:>8}")


if __name__ == "__main__":
    main()
