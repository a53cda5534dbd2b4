"""A report of `bench` as text: categories, sides, and the machine that they ran on.

Knows: the fields of a report. Does not know: how anything was measured.
"""

from __future__ import annotations

from typing import Any

_DEPTHS = 8  # that a line has room for


def categories_table(found: dict[str, Any]) -> str:
    """The accelerated side of a report, one line a category and one for all."""
    head = f"{'category':<24}{'prompts':>8}{'tokens':>8}{'identical':>11}{'accepted':>10}{'base t/s':>10}{'fast t/s':>10}{'speedup':>9}"
    lines = [head, "-" * len(head)]
    rows = list(found["categories"].items()) if len(found["categories"]) > 1 else []
    for name, s in [*rows, ("all", found)]:
        same, baseline, speedup = "-", "-", "-"
        if s["identical"] is not None:
            same, baseline, speedup = f"{s['identical']}/{s['prompts']}", f"{s['baseline_tokens_per_s']:.1f}", f"{s['speedup']:.2f}"
        lines.append(
            f"{name or '-':<24}{s['prompts']:>8}{s['tokens']:>8}{same:>11}{s['acceptance_length']:>10.2f}"
            f"{baseline:>10}{s['tokens_per_s']:>10.1f}{speedup:>9}"
        )
    return "\n".join(lines)


def sides_table(found: dict[str, Any]) -> str:
    """The sides of a report, one a line, and what they are to be held against."""
    head = f"{'side':<17}{'dtype':<10}{'identical':>10}{'first token':>13}{'tokens/s':>10}{'quartiles':>17}{'times stock':>13}{'quartiles':>15}"
    lines = [head, "-" * len(head)]
    lines += [_side_line(name, side, found["prompts"]) for name, side in found["sides"].items()]
    if any(not side["same_tokens"] for side in found["sides"].values()):
        lines.append("* not the stock model's weights in its dtype: its tokens may be others")
    return "\n".join(["medians over prompts, and their quartiles (25 and 75 %)", *lines, *_conclusions(found)])


def _side_line(name: str, side: dict[str, Any], prompts: int) -> str:
    same = "-" if side["identical"] is None else f"{side['identical']}/{prompts}"
    times, spread = "-", "-"
    if side["speedup"] is not None:
        times, spread = f"{side['speedup']:.2f}", _range(side["speedup_quartiles"], 2)
    return (
        f"{name + ('' if side['same_tokens'] else ' *'):<17}{side['dtype'] or '-':<10}{same:>10}{1000 * side['time_to_first_token_s']:>10.0f} ms"
        f"{side['tokens_per_s']:>10.1f}{_range(side['tokens_per_s_quartiles'], 1):>17}{times:>13}{spread:>15}"
    )


def _conclusions(found: dict[str, Any]) -> list[str]:
    """What follows for the accelerated side, a line each."""
    lines = []
    if found["best_plain"] and found["best_plain"]["side"] != "stock":
        best = found["best_plain"]
        lines.append(
            f"best plain setting measured: {best['side']}, {best['tokens_per_s']:.1f} tokens/s; accelerated is "
            f"{best['speedup']:.2f} times as fast ({_range(best['speedup_quartiles'], 2)})"
        )
    if found["acceptance_by_depth"]:
        shares = ", ".join(f"{depth}: {100 * share:.0f} %" for depth, share in enumerate(found["acceptance_by_depth"][:_DEPTHS], start=1))
        lines.append(f"passes that accepted at least so many drafted tokens: {shares}")
    if machine := found.get("machine"):
        lines.append(
            f"the machine: memory read at {machine['bandwidth_gb_s']:.1f} GB/s, "
            + ", ".join(f"{flops:.0f} GFLOP/s in {dtype}" for dtype, flops in machine["gflops"].items())
            + f"; {machine['cpu_capability']} ({', '.join(machine['processor_flags']) or 'no flags known'})"
        )
        lines.append(
            f"its ceiling with one token a pass: {machine['one_row_tokens_per_s']['as loaded']:.1f} tokens/s "
            f"({machine['weights_mb']:.0f} MB of weights read for each token)"
        )
    if found["process_peak_mib"] is not None:
        lines.append(f"most memory of the process, all sides and loading included: {found['process_peak_mib']:.0f} MiB")
    return lines


def _range(quartiles: list[float], digits: int) -> str:
    return " to ".join(f"{value:.{digits}f}" for value in quartiles)
