"""One GPT training step, minipar beside PyTorch: forward, backward and AdamW, medians of interleaved runs.

    python benchmarks/gpt_step.py                 # one rank, then two ranks data parallel
    python benchmarks/gpt_step.py --width 512

Model: 4 layers, 4 heads, 128 tokens, batch 16, vocabulary 96, tied head, float32, one thread a rank. Each
engine runs in processes of its own (see `turns`). Peak memory is the process's.
"""

from __future__ import annotations

import argparse

from steps import Size
from turns import Program, take_turns


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7, help="turns of three steps each")
    parser.add_argument("--ranks", type=int, default=0, help="1 or 2 only (default: both)")
    args = parser.parse_args()
    print(f"{Size(width=args.width)}, float32, one thread a rank, medians")
    print(
        f"{'ranks':>5}  {'minipar ms':>10}  {'PyTorch ms':>10}  {'throughput ratio':>16}"
        f"  {'minipar MiB':>11}  {'PyTorch MiB':>11}"
    )
    size = {"model": "gpt", "width": args.width}
    for ranks in [args.ranks] if args.ranks else [1, 2]:
        programs = [Program("minipar", "steps:ours", size, ranks), Program("torch", "steps:torchs", size, ranks)]
        ours, peer = take_turns(programs, args.rounds)
        if peer.absent is not None:
            print(f"{ranks:>5}  {ours.seconds * 1e3:>10.0f}  {peer.absent}; minipar {ours.peak_mb:.0f} MiB")
            continue
        print(
            f"{ranks:>5}  {ours.seconds * 1e3:>10.0f}  {peer.seconds * 1e3:>10.0f}"
            f"  {peer.seconds / ours.seconds:>16.2f}  {ours.peak_mb:>11.0f}  {peer.peak_mb:>11.0f}"
        )


if __name__ == "__main__":
    main()
