"""Runs the parts that are named, or all of them, and renders the page."""

from __future__ import annotations

import argparse
import importlib

from benchmarks.quality.page import render

PARTS = ("causal", "mixed", "encoder", "dense", "recovery")


def main() -> None:
    parser = argparse.ArgumentParser(description="What conversions cost in quality.")
    parser.add_argument("parts", nargs="*", default=[*PARTS, "page"], help=f"some of {', '.join(PARTS)}, page")
    for part in parser.parse_args().parts:
        if part == "page":
            print(f"wrote {render()}")
        else:
            importlib.import_module(f"benchmarks.quality.{part}").run()


if __name__ == "__main__":
    main()
