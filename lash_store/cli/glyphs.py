"""Owns the shapes and colours of the picture of a timeline: each meaning has a shape of its own, not a colour alone."""

from __future__ import annotations

__all__ = ["DEFINITIONS", "ENDS", "MARKS", "PHASES", "STYLE", "end_cap", "mark"]

PHASES = {
    "queued": ("queued", 4),
    "backoff": ("put off until its next try", 6),
    "running": ("running", 12),
    "waiting": ("waiting or asleep", 12),
    "cancelling": ("cancel requested", 12),
    "lost": ("its owner died in here", 12),
    "unowned": ("nobody has it", 2),
}
"""What each phase is called, and how high its bar is."""

ENDS = {"completed": "completed", "failed": "failed", "cancelled": "cancelled", "abandoned": "abandoned"}

MARKS = {
    "died": "owner last heard of, then dead",
    "reattached": "reattached",
    "claimed": "taken over, not started",
    "released": "given back",
    "retry": "failed, to be tried again",
    "step_retry": "a step to be tried again",
    "cancel_requested": "cancel asked for",
    "callback_failed": "cancel callback failed",
    "transferred": "moved from a session to another",
    "handed_off": "handoff",
    "signalled": "signal sent",
    "noted": "note posted",
    "progress": "progress",
    "saved": "saved",
}
"""What each mark is called."""

# no custom properties: renderers that make pictures of this know none
STYLE = """
text { font: 11px ui-sans-serif, system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2328;
  direction: ltr; unicode-bidi: isolate }
.id { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11px }
.title { font-size: 15px; font-weight: bold } .name { font-size: 12px; font-weight: bold }
.dim { fill: #59636e } .small { font-size: 9px } .warn { fill: #b02a00; font-weight: bold }
.bg { fill: #ffffff } .band { fill: #f6f8fa } .grid { stroke: #dfe3e8; stroke-width: 1 }
.rule { stroke: #8c959f; stroke-width: 1 } .now { stroke: #59636e; stroke-width: 1; stroke-dasharray: 3 3 }
.queued { fill: #9aa4af } .running { fill: #0072b2 } .waiting { fill: #e69f00 } .cancelling { fill: #b75d97 }
.backoff { fill: none; stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 3 2 }
.unowned { fill: none; stroke: #59636e; stroke-width: 1.5; stroke-dasharray: 1 3 }
.faint { opacity: .28 } .life { fill: #7d8894 } .session { fill: #c5ccd4 }
.hatch { stroke: #d55e00; stroke-width: 1.6 } .dots { fill: #7a4f00 } .lines { stroke: #ffffff; stroke-width: 1.4 }
.onbar { fill: #ffffff; font-size: 9px; font-weight: bold } .cut { stroke: #ffffff; stroke-width: 1.5 }
.ink { fill: none; stroke: #1f2328; stroke-width: 1.4; stroke-linejoin: round } .solid { fill: #1f2328 }
.paper { fill: #ffffff; stroke: #1f2328; stroke-width: 1.3; stroke-linejoin: round }
.kill { fill: none; stroke: #c42b00; stroke-width: 2.6; stroke-linecap: round }
.halo { fill: none; stroke: #ffffff; stroke-width: 5; stroke-linecap: round }
.again { fill: #00523b; stroke: #ffffff; stroke-width: 1.2 }
.tick { stroke: #ffffff; stroke-width: 1.4 } .tock { stroke: #ffffff; stroke-width: 1; opacity: .75 }
.completed { fill: #00805c } .failed { fill: #c42b00 } .cancelled { fill: #8a3d6e } .abandoned { fill: #1f2328 }
.sign { fill: none; stroke: #ffffff; stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round } .dot { fill: #ffffff }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } .dim { fill: #9aa5b1 } .warn { fill: #ff9b73 }
  .bg { fill: #0d1117 } .band { fill: #151b23 } .grid { stroke: #262d36 } .rule { stroke: #6e7681 } .now { stroke: #9aa5b1 }
  .queued { fill: #6e7681 } .running { fill: #3d9bd9 } .waiting { fill: #e0a01a } .cancelling { fill: #cc79a7 }
  .backoff, .unowned { stroke: #9aa5b1 } .faint { opacity: .35 } .life { fill: #76818d } .session { fill: #3d444d }
  .hatch { stroke: #ff8a4c } .onbar { fill: #04121f } .cut, .tick, .tock, .lines { stroke: #0d1117 }
  .ink { stroke: #e6edf3 } .solid { fill: #e6edf3 } .paper { fill: #0d1117; stroke: #e6edf3 }
  .kill { stroke: #ff7b54 } .halo { stroke: #0d1117 } .again { fill: #56d9a9; stroke: #0d1117 }
  .completed { fill: #2ebd8b } .failed { fill: #ff7b54 } .cancelled { fill: #d78fb9 } .abandoned { fill: #e6edf3 }
  .sign { stroke: #0d1117 } .dot { fill: #0d1117 }
}
"""

DEFINITIONS = """
<pattern id="lost" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<line class="hatch" x1="1" y1="0" x2="1" y2="5"/></pattern>
<pattern id="waits" width="5" height="4" patternUnits="userSpaceOnUse"><circle class="dots" cx="2.5" cy="2" r="0.9"/></pattern>
<pattern id="cancels" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(-45)">
<line class="lines" x1="1" y1="0" x2="1" y2="6"/></pattern>
"""

_ENDS = {
    "completed": '<circle class="completed" r="6.5"/><path class="sign" d="M-3 0.2 L-0.9 2.4 L3.1 -2.3"/>',
    "failed": '<rect class="failed" x="-6" y="-6" width="12" height="12" rx="1.5"/>'
    '<path class="sign" d="M0 -3.6 V0.8"/><circle class="dot" cy="3.5" r="1.1"/>',
    "cancelled": '<path class="cancelled" d="M0 -7.5 L7.5 0 L0 7.5 L-7.5 0 Z"/><path class="sign" d="M-3 0 H3"/>',
    "abandoned": '<path class="abandoned" d="M0 -7.5 L7.8 6 H-7.8 Z"/>'
    '<path class="sign" d="M-1.9 -1.2 A1.9 1.9 0 1 1 0.6 0.6 V1.4"/><circle class="dot" cx="0.6" cy="4.1" r="1"/>',
}

_MARKS = {
    # what ends at the moment stands before it, what begins behind it: marks of one gap never cover each other
    "died": '<path class="halo" d="M-9 -4.5 L0 4.5 M0 -4.5 L-9 4.5"/><path class="kill" d="M-9 -4.5 L0 4.5 M0 -4.5 L-9 4.5"/>',
    "reattached": '<path class="again" d="M0 -7 L10 0 L0 7 Z"/>',
    "claimed": '<path class="paper" d="M0 -4.5 L7 0 L0 4.5 Z"/>',
    "released": '<path class="paper" d="M0 -4.5 L-7 0 L0 4.5 Z"/>',
    "retry": '<path class="paper" d="M-6 -5 H0 V5 H-6 Z"/><path class="ink" d="M-4.4 -2.4 L-1.6 2.4 M-1.6 -2.4 L-4.4 2.4"/>',
    "step_retry": '<path class="ink" d="M-2.5 5.5 L0 8.5 L2.5 5.5"/>',
    "cancel_requested": '<path class="paper" d="M0 -10 L3.5 -6.5 L0 -3 L-3.5 -6.5 Z"/>',
    "callback_failed": '<path class="ink" d="M0 -9 V-5.5 M0 -3.6 V-3"/>',
    "transferred": '<path class="halo" d="M0 -9 V9"/><path class="ink" d="M0 -9.5 V9.5 M-3 -6.5 L0 -9.5 L3 -6.5"/>',
    "handed_off": '<path class="paper" d="M-6 -4 H1 V-7 L8 0 L1 7 V4 H-6 Z"/>',
    "signalled": '<path class="solid" d="M-3.5 -10 H3.5 L0 -5.5 Z"/>',
    "noted": '<rect class="paper" x="-3.5" y="4.5" width="7" height="5"/>',
    "progress": '<path class="tick" d="M0 -6 V-1"/>',
    "saved": '<path class="tock" d="M0 2 V6"/>',
}


def end_cap(state: str) -> str:
    """Return the shape of how a task ended, its middle at the origin."""
    return _ENDS[state]


def mark(what: str) -> str:
    """Return the shape of a mark; the origin is its moment, and the middle of the bar."""
    return _MARKS[what]
