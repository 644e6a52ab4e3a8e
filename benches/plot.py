#!/usr/bin/env python3
"""Draws what `make bench` measured: plot.py RESULTS.json PICTURE.svg

Bars of each server's multiple of the limit, a bare tonic server that hands out ready bytes; the measured values beside them.
It is legible on white and on black.
"""

import json
import sys
from html import escape

# Part of the benchmark, figure, heading.
PANELS = [
    ("change", "p99", "A change to all streams, p99"),
    ("change", "CPU a response", "CPU of the server a response"),
    ("change", "memory a stream", "Memory of a stream"),
    ("reconnect", "all served after", "All reconnect at once, holding everything"),
    ("storm", "all open", "All connect at once, holding nothing"),
    ("catalog", "CPU a change", "CPU of a change to 100 streams, as the catalog grows"),
]
COLOURS = {
    "limit": "#8a8f98",
    "Disco": "#2f81f7",
    "go-control-plane LinearCache": "#d98324",
    "go-control-plane SnapshotCache": "#c2554d",
}
WIDTH, LEFT, RIGHT = 880, 275, 190
BAR, GAP, GROUP = 12, 3, 14

STYLE = """
text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328 }
.head { font-weight: 600; font-size: 15px }
.value { font-size: 11.5px }
.faint { fill: #59636e }
.line { stroke: #59636e; stroke-width: 1; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .faint { fill: #9198a1 } .line { stroke: #9198a1 } }
"""


def thousands(case):
    return " ".join(f"{int(word.rstrip(',')):,}" + "," * word.endswith(",") if word.rstrip(",").isdigit() else word for word in case.split())


def number(value):
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def groups(rows, part, figure):
    """For each case: (server, value, unit) or (server, None, reason). Of cost a stream only the largest numbers of streams."""
    cases = {}
    for row in rows:
        if row["part"] != part:
            continue
        found = [f for f in row.get("figures", []) if f["name"] == figure]
        if found:
            cases.setdefault(row["case"], []).append((row["server"], found[0]["value"], found[0]["unit"]))
        elif "missing" in row:
            cases.setdefault(row["case"], []).append((row["server"], None, row["missing"].split(":")[0]))
    if figure in ("CPU a response", "memory a stream"):
        most = max((int(case.split()[0]) for case in cases), default=0)
        return {case: bars for case, bars in cases.items() if case.startswith(f"{most} ")}
    return cases


def panel(out, y, heading, cases):
    room = WIDTH - LEFT - RIGHT
    values = [value for bars in cases.values() for _, value, _ in bars if value is not None]
    # What is a multiple of the limit is drawn as one; the rest, as a multiple of the smallest.
    limits = {case: next((v for s, v, _ in bars if s == "limit"), None) for case, bars in cases.items()}
    has_limit = all(limits.values())
    base = limits if has_limit else {case: min(values) for case in cases}
    largest = max(value / base[case] for case, bars in cases.items() for _, value, _ in bars if value is not None)
    cut = min(largest, 6 if has_limit else largest)
    out.append(f'<text class="head" x="16" y="{y + 16}">{escape(heading)}</text>')
    y += 28
    top = y
    for case, bars in cases.items():
        middle = y + (len(bars) * (BAR + GAP) - GAP) / 2 + 4
        out.append(f'<text x="{LEFT - 10}" y="{middle:.0f}" text-anchor="end">{escape(thousands(case))}</text>')
        for server, value, unit in bars:
            if value is None:
                text, wide = unit, 0
            else:
                times = value / base[case]
                wide = max(1.5, min(times, cut) / cut * room)
                text = f"{number(value)} {unit}"
                if server != "limit" and has_limit:
                    text += f" · {times:.2f} x"
                if times > cut:
                    text += " »"
                out.append(f'<rect x="{LEFT}" y="{y}" width="{wide:.1f}" height="{BAR}" rx="2" fill="{COLOURS[server]}"/>')
            out.append(f'<text class="value" x="{LEFT + wide + 6:.1f}" y="{y + BAR - 2}">{escape(text)}</text>')
            y += BAR + GAP
        y += GROUP
    if has_limit:
        x = LEFT + room / cut
        out.append(f'<line class="line" x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{y - GROUP + 1}"/>')
    return y + 10


def main(source, target):
    with open(source, encoding="utf-8") as file:
        results = json.load(file)
    out, y, x = [], 16, 16
    servers = {row["server"] for row in results["rows"]}
    for server, colour in COLOURS.items():
        if server in servers:
            out.append(f'<rect x="{x}" y="{y}" width="12" height="12" rx="2" fill="{colour}"/>')
            out.append(f'<text x="{x + 18}" y="{y + 11}">{escape(server)}</text>')
            x += 18 + 7.2 * len(server) + 24
    y += 36
    for part, figure, heading in PANELS:
        cases = groups(results["rows"], part, figure)
        if any(value is not None for bars in cases.values() for _, value, _ in bars):
            y = panel(out, y, heading, cases)
    machine = results["machine"]
    busy = machine["load before"].split()[0]
    for line in (
        "The dashed line is the limit: a bare tonic server that hands the same ready bytes to all its streams.",
        f"{machine['cores']} cores ({machine['cpu']}) shared with the load; load average before: {busy}.",
    ):
        out.append(f'<text class="value faint" x="16" y="{y + 8}">{escape(line)}</text>')
        y += 18
    height = y + 8
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = "<title>Disco beside the limit and go-control-plane</title>"
    with open(target, "w", encoding="utf-8") as file:
        file.write("\n".join([head, title, f"<style>{STYLE}</style>", *out, "</svg>"]) + "\n")
    print(f"{target}: drawn from {source}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
