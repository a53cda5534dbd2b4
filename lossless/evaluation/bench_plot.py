"""A report of `bench` as a picture that stands alone: speeds of the sides, gains by category, acceptance by depth.

Knows: the fields of a report, and matplotlib. Does not know: how anything was measured.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_OURS, _OTHERS, _LINE = "tab:blue", "silver", "tab:red"


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Write the report's picture, a PNG.

    Args:
        report: what `bench` returned; with what `evaluation.machine.ceiling` returned as `machine`, the ceiling is drawn too.
    """
    from matplotlib.figure import Figure  # takes half a second that most commands need not wait

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    compared = report["speedup"] is not None
    categories = dict.fromkeys(run["category"] for run in report["runs"])
    height = 2.8 + 0.32 * max(len(report["sides"]), len(categories) if compared else 0, 5)
    figure = Figure(figsize=(16 if compared else 11, height), layout="constrained")
    speeds, *gains, depths = figure.subplots(1, 3 if compared else 2)
    _draw_speeds(speeds, report)
    for axes in gains:
        _draw_gains(axes, report, list(categories))
    _draw_depths(depths, report)
    figure.suptitle(_title(report))
    figure.savefig(path, dpi=120, format="png")


def _title(report: dict[str, Any]) -> str:
    decoding = report["decoding"]
    how = f"sampled at temperature {decoding['temperature']}" if decoding["do_sample"] else "greedy"
    same = "" if report["identical"] is None else f", answers identical to the plain model's: {report['identical']} of {report['prompts']}"
    suite = f", suite {report['suite']}" if report.get("suite") else ""
    return (
        f"{report['model']}, {report['dtype']}{', ' + report['load_in'] if report['load_in'] else ''}, {report['device']}, "
        f"{report['threads']} threads{suite}\n{report['prompts']} prompts, up to {decoding['max_new_tokens']} new tokens, {how}{same}"
    )


def _draw_speeds(axes: Any, report: dict[str, Any]) -> None:
    """A bar for each side, its quartiles, and what the machine allows one token a pass."""
    sides = list(report["sides"].items())[::-1]  # the first on top
    for place, (name, side) in enumerate(sides):
        median, (low, high) = side["tokens_per_s"], side["tokens_per_s_quartiles"]
        axes.barh(place, median, color=_OURS if name == "accelerated" else _OTHERS)
        axes.plot([low, high], [place, place], color="black", linewidth=1.5, marker="|", label="first to third quartile")
        axes.annotate(f"{median:.1f}", (max(median, high), place), xytext=(4, 0), textcoords="offset points", va="center")
        if ceiling := _ceiling(report, side):
            label = "ceiling of one token a pass\n(memory bandwidth / weights as loaded)"
            axes.plot([ceiling] * 2, [place - 0.45, place + 0.45], color=_LINE, linestyle="--", label=label)
    axes.set_yticks(range(len(sides)), [f"{name}\n({side['dtype']})" if side["dtype"] else name for name, side in sides])
    axes.margins(x=0.15)
    axes.set_xlim(left=0)
    axes.set(xlabel="tokens per second while decoding (higher is faster)", title="Speed: median over prompts")
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    axes.legend(once.values(), once.keys(), loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small", frameon=False)


def _ceiling(report: dict[str, Any], side: dict[str, Any]) -> float | None:
    """Tokens a second with one token a pass, for the weights that this side reads."""
    if "machine" not in report or not side["dtype"]:
        return None
    ceilings: dict[str, float] = report["machine"]["one_row_tokens_per_s"]
    return ceilings["as loaded"] if side["dtype"] == report["dtype"] else ceilings.get(side["dtype"])


def _draw_gains(axes: Any, report: dict[str, Any], categories: list[str]) -> None:
    """Each prompt's speedup over stock, one row a category."""
    for place, category in enumerate(categories[::-1]):
        ratios = [run["speedup"] for run in report["runs"] if run["category"] == category]
        axes.plot(ratios, [place] * len(ratios), "o", color=_OURS, alpha=0.5, label=None if place else "a prompt")
    axes.axvline(1.0, color="black", label="as fast as stock")
    axes.axvline(report["speedup"], color=_LINE, linestyle=":", label=f"median {report['speedup']:.2f}")
    axes.set_yticks(range(len(categories)), [category or "all" for category in categories[::-1]])
    axes.set_xlim(0, 1.08 * max(1.0, *(run["speedup"] for run in report["runs"])))
    axes.set(xlabel="times as fast as stock model.generate", title="Speedup: accelerated against stock, by prompt")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize="small", frameon=False)


def _draw_depths(axes: Any, report: dict[str, Any]) -> None:
    """How deep the drafts of the passes were accepted."""
    shares = report["acceptance_by_depth"]
    axes.bar(range(1, len(shares) + 1), [100 * share for share in shares], color=_OURS)
    axes.set_xticks(range(1, len(shares) + 1, max(1, len(shares) // 8)))
    axes.set(
        ylim=(0, 100),
        xlabel="depth: drafted tokens accepted in one pass, at least",
        ylabel="% of verification passes",
        title=f"Acceptance: {report['acceptance_length']:.2f} tokens a pass",
    )
