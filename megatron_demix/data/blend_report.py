"""A blend's manifest as a table for people."""

from __future__ import annotations

from typing import Any


def blend_table(manifest: dict[str, Any]) -> str:
    """Requested, planned and realised tokens of every domain, its share as asked for and as it is, with epochs and limits."""
    rows = [("domain", "share", "asked for", "requested", "planned", "realised", "documents", "epochs", "limit")]
    for name, d in manifest["domains"].items():
        counts = [f"{d[key]:,}" for key in ("requested_tokens", "planned_tokens", "tokens", "documents")]
        share = d["tokens"] / manifest["tokens"]
        rows.append((name, f"{share:.4f}", f"{d['share']:.4f}", *counts, f"{d['epochs']:.3f}", f"{d['max_epochs']:g}"))
    rows.append(
        ("total", "", "", f"{manifest['target_tokens']:,}", "", f"{manifest['tokens']:,}", f"{manifest['documents']:,}", "", "")
    )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(c.ljust(w) if n == 0 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    if dropped := manifest["dropped_domains"]:
        lines.append(f"left out, as their share is zero or less than half a document: {', '.join(dropped)}")
    evenness = manifest.get("evenness")
    if evenness:
        worst = max([*evenness["tokens_ahead_of_share"].values(), *evenness["tokens_behind_share"].values()], default=0)
        lines.append(f"no prefix of the blend is more than {worst:,} tokens off any domain's share")
    return "\n".join(lines)
