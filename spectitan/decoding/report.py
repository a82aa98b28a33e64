"""The report of an evaluation for people: a table for the console and a picture of acceptance by position."""

import json
import os
from pathlib import Path

from spectitan.files import write_whole

# One series needs one hue; text stays in ink.
_SURFACE, _INK, _MUTED, _GRID, _SERIES = "#fcfcfb", "#0b0b0b", "#52514e", "#e3e2de", "#2a78d6"


def write_report(report: dict, folder: str | os.PathLike) -> Path:
    """Writes report.json, and acceptance.svg if a speculator was measured, into `folder`; returns the path of report.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = {"report.json": json.dumps(report, indent=2) + "\n"}
    if "acceptance_by_position" in report:
        files["acceptance.svg"] = acceptance_picture(report)
    for name, content in files.items():
        write_whole(folder / name, content)
    return folder / "report.json"


def table(report: dict) -> str:
    """The report as lines of text: figures, then what happens at each drafted position; then the same of a tree of candidates."""
    lines = [f"{name:<31}{value}" for name, value in _rows(report)]
    if "acceptance_by_position" in report:
        positions = "".join(f"{i + 1:>8}" for i in range(len(report["acceptance_by_position"])))
        lines += ["", f"{'drafted token':<25}{positions}"]
        for name in ("acceptance_by_position", "conditional_acceptance", "heldout_accuracy", "heldout_loss"):
            if name in report:
                lines.append(f"{name:<25}" + "".join("       -" if value is None else f"{value:>8.3f}" for value in report[name]))
    if "tree" in report:
        tree = report["tree"]
        lines += ["", f"tree of candidates, top_k_tokens_per_head = {tree['top_k_tokens_per_head']}:", table(tree)]
    return "\n".join(lines)


def _rows(report: dict) -> list[tuple[str, str]]:
    """(name, formatted value) of the figures that are not lists over positions."""
    units = {"speedup": "x", "round_cost": "plain tokens"}
    rows = []
    for name, value in report.items():
        if name == "tree":
            continue
        if isinstance(value, float):
            value = f"{value:.3f}"
        elif isinstance(value, dict):
            value = ", ".join(f"{key} {item:.4g}" if isinstance(item, (int, float)) else f"{key} {item}" for key, item in value.items())
        elif isinstance(value, list):
            continue
        if value is not None:
            rows.append((name, f"{value} {units.get(name, '')}".rstrip()))
    return rows


def acceptance_picture(report: dict) -> str:
    """SVG: one bar a drafted position, its height the share of rounds in which the base accepted that token."""
    shares = report["acceptance_by_position"]
    width, height, left, top, bottom = max(420, 90 + 80 * len(shares)), 320, 56, 74, 52
    plot = height - top - bottom
    slot = (width - left - 24) / len(shares)
    bar = min(slot * 0.6, 64)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{_INK}" role="img">',
        f'<rect width="{width}" height="{height}" fill="{_SURFACE}"/>',
        f'<text x="{left}" y="28" font-size="15" font-weight="600">Acceptance by position</text>',
        f'<text x="{left}" y="48" fill="{_MUTED}">acceptance length {report["acceptance_length"]:.2f} tokens a round, '
        f"{report['rounds']:,} rounds, {report['sequences']} prompts</text>",
    ]
    for percent in range(0, 101, 25):
        y = top + plot * (1 - percent / 100)
        out.append(f'<line x1="{left}" x2="{width - 24}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="{_MUTED}">{percent}%</text>')
    for i, share in enumerate(shares):
        center, y = left + slot * (i + 0.5), top + plot * (1 - share)
        radius = min(4.0, plot * share)  # rounded at the value, square on the axis
        out.append(
            f'<path d="M{center - bar / 2:.1f} {top + plot} V{y + radius:.1f} q0 {-radius:.1f} {radius:.1f} {-radius:.1f} '
            f'H{center + bar / 2 - radius:.1f} q{radius:.1f} 0 {radius:.1f} {radius:.1f} V{top + plot} Z" fill="{_SERIES}"/>'
        )
        out.append(f'<text x="{center:.1f}" y="{y - 6:.1f}" text-anchor="middle">{share:.1%}</text>')
        out.append(f'<text x="{center:.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="{_MUTED}">{i + 1}</text>')
    out.append(f'<text x="{left + slot * len(shares) / 2:.1f}" y="{height - 12}" text-anchor="middle" fill="{_MUTED}">drafted token</text>')
    return "\n".join([*out, "</svg>", ""])
