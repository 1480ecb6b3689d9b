"""What the dashboard shows, from top to bottom; `grafana.py` turns it into Grafana's JSON."""

from __future__ import annotations

from dataclasses import dataclass

from scripts.dashboards.queries import quantile, rate, value


@dataclass(frozen=True)
class Query:
    """A PromQL expression and the name of its series."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        title: what it shows.
        says: how to read it.
        queries: what it draws.
        unit: Grafana's name of the unit.
        look: `lines`, `stack` or `number`.
        warn: a number that is yellow from here on.
        alarm: a number that is red from here on.
    """

    title: str
    says: str
    queries: tuple[Query, ...]
    unit: str = "short"
    look: str = "lines"
    warn: float | None = None
    alarm: float | None = None


@dataclass(frozen=True)
class Row:
    """A question, and the panels that answer it."""

    question: str
    panels: tuple[Panel, ...]


_RUNNING = value("jobs", where='state="running"')
_HELD = value("host_blocks", where='use="held"')
_MEAN_BATCH = f"{rate('batch_requests', suffix='_sum')} / {rate('batch_requests', suffix='_count')}"
_OWN = rate("scheduler_seconds", "phase")
_STEPPING = rate("step_seconds", suffix="_sum")

GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Waiting for a turn",
            "Live requests outside the batch.",
            (Query(value("jobs", where='state!="running"')),),
            look="number",
        ),
        Panel(
            "Longest wait",
            "Of all requests that could run now.",
            (Query(value("longest_wait_seconds", merge="max")),),
            "s",
            "number",
            warn=10,
            alarm=60,
        ),
        Panel(
            "Batch in use",
            "Running requests over batch places.",
            (Query(f"{_RUNNING} / {value('batch_limit')}"),),
            "percentunit",
            "number",
        ),
        Panel(
            "Host memory in use",
            "Swap space that waiting requests hold; reclaimable copies do not count.",
            (Query(f"{_HELD} / {value('host_blocks')}"),),
            "percentunit",
            "number",
            warn=0.8,
            alarm=0.95,
        ),
        Panel(
            "Steps standing still",
            "Share of step time spent waiting for KV copies: 0 means that all are hidden.",
            (Query(f"{rate('copy_wait_seconds')} / {_STEPPING}"),),
            "percentunit",
            "number",
            warn=0.02,
            alarm=0.1,
        ),
        Panel(
            "Step model error",
            "How far predicted step time is from what steps took.",
            (Query(f"abs({rate('predicted_step_seconds')} / {_STEPPING} - 1)"),),
            "percentunit",
            "number",
            warn=0.25,
            alarm=0.5,
        ),
    ),
)

WAITING = Row(
    "Who waits, how long, at which level?",
    (
        Panel(
            "Requests by state",
            "Queued have no KV cache, paused keep it on the device, swapped on the host.",
            (Query(value("jobs", "state"), "{{state}}"),),
            look="stack",
        ),
        Panel(
            "Requests by level",
            "Level 0 is the highest. Many at low levels are long answers that give way.",
            (Query(value("level_jobs", "level"), "level {{level}}"),),
            look="stack",
        ),
        Panel(
            "Longest current wait by level",
            "Against the limit after which a request is promoted.",
            (
                Query(value("longest_wait_seconds", "level", merge="max"), "level {{level}}"),
                Query(value("starvation_limit_seconds", merge="max"), "starvation limit"),
                Query(value("token_gap_limit_seconds", merge="max"), "token gap limit"),
            ),
            "s",
        ),
        Panel(
            "Wait for a turn, 95th percentile",
            "By the level in which the turn began; level 0 holds first tokens of short prompts.",
            (Query(quantile(0.95, "queue_wait_seconds", "level"), "level {{level}}"),),
            "s",
        ),
        Panel(
            "Joins by entry level",
            "Below level 0: long prompts, by skip-join. In the last one: beyond the share of the "
            "time that first tokens may take.",
            (Query(rate("joins", "level"), "level {{level}}"),),
            "reqps",
        ),
        Panel(
            "Moves between levels",
            "Demotions by the level left; promotions by absolute ageing.",
            (
                Query(rate("demotions", "level"), "demoted from {{level}}"),
                Query(rate("promotions"), "promoted"),
            ),
            "reqps",
        ),
        Panel(
            "Turns for those who waited",
            "Given by relative ageing; late ones were overdue by the bound of the token gap.",
            (Query(rate("aged_turns"), "given"), Query(rate("late_turns"), "late")),
            "reqps",
        ),
        Panel(
            "Lengths explained",
            "How far prompts' lengths tell answers' lengths, and the last level relies on that.",
            (Query(value("explained_lengths_ratio", merge="max"), "explained"),),
            "percentunit",
        ),
        Panel(
            "Quantum by level",
            "Service that a level grants; it follows the fastest decode step.",
            (Query(value("quantum_seconds", "level", merge="max"), "level {{level}}"),),
            "s",
        ),
    ),
)

COST = Row(
    "What does it cost?",
    (
        Panel(
            "Preemptions",
            "What became of the KV cache, and why.",
            (Query(rate("preemptions", "mode", "cause"), "{{mode}}: {{cause}}"),),
            "reqps",
        ),
        Panel(
            "Turns begun",
            "Entries into the batch: with many for each request, quanta are short.",
            (Query(rate("started"), "turns"), Query(rate("joins"), "requests")),
            "reqps",
        ),
        Panel(
            "Tokens computed",
            "Recomputed ones are the part of the prefill that was done before.",
            (
                Query(rate("batch_tokens", "phase"), "{{phase}}"),
                Query(rate("recomputed_tokens"), "given up"),
            ),
        ),
        Panel(
            "FastServe's own time",
            "Share of step time, by phase.",
            (Query(f"{_OWN} / ignoring (phase) group_left {_STEPPING}", "{{phase}}"),),
            "percentunit",
            "stack",
        ),
    ),
)

MEMORY = Row(
    "Is memory the bottleneck?",
    (
        Panel(
            "Device blocks",
            "Leaving ones come free when their copies end.",
            (Query(value("device_blocks", "use"), "{{use}}"),),
            look="stack",
        ),
        Panel(
            "Host blocks",
            "Reclaimable ones go when room is needed.",
            (Query(value("host_blocks", "use"), "{{use}}"),),
            look="stack",
        ),
        Panel(
            "Declined",
            "Places in the batch and swap-outs that something was missing for.",
            (Query(rate("declined", "reason"), "{{reason}}"),),
            "reqps",
        ),
        Panel(
            "Reserve for arrivals",
            "Blocks to keep idle, or as good as idle; it follows the bursts.",
            (Query(value("reserve_blocks"), "blocks"),),
        ),
    ),
)

COPIES = Row(
    "Are copies hidden?",
    (
        Panel(
            "KV cache copied",
            "By all workers together.",
            (Query(rate("copied_bytes", "direction"), "{{direction}}"),),
            "binBps",
        ),
        Panel(
            "Copies by worker",
            "Each worker copies its own shard: within an engine the lines keep level.",
            (
                Query(
                    rate("worker_copies", "engine", "rank", "direction"),
                    "engine {{engine}} rank {{rank}} {{direction}}",
                ),
            ),
            "cps",
        ),
        Panel(
            "Copying and standing still",
            "Seconds a second: copies run beside the steps, unless steps stand still.",
            (
                Query(rate("copy_seconds", "direction"), "copying {{direction}}"),
                Query(rate("copy_wait_seconds"), "steps stand still"),
            ),
            "percentunit",
        ),
        Panel(
            "Requests that move",
            "Saved ones stay on the device; leaving is then free.",
            (
                Query(rate("swapped_out"), "out"),
                Query(rate("swapped_in"), "in"),
                Query(rate("saved"), "saved in advance"),
            ),
            "reqps",
        ),
        Panel(
            "Blocks not copied again",
            "The host had them already.",
            (Query(rate("reused_blocks", "source"), "{{source}}"),),
        ),
        Panel(
            "Blocks in flight",
            "Being copied now.",
            (Query(value("in_flight_blocks", "direction"), "{{direction}}"),),
        ),
        Panel(
            "Bandwidth of a worker",
            "As measured; it decides between copying and computing again.",
            (Query(value("copy_bytes_per_second", "engine", merge="max"), "engine {{engine}}"),),
            "binBps",
        ),
        Panel(
            "Failed copies",
            "Their requests compute again.",
            (Query(rate("copies_failed"), "failed"),),
        ),
    ),
)

STEPS = Row(
    "What do steps do?",
    (
        Panel(
            "Step time",
            "Median and tail of steps that computed something.",
            (
                Query(quantile(0.5, "step_seconds"), "median"),
                Query(quantile(0.95, "step_seconds"), "95th percentile"),
            ),
            "s",
        ),
        Panel(
            "Predicted over actual",
            "Skip-join and KV swap rely on the prediction; 1 is right.",
            (
                Query(quantile(0.1, "prediction_ratio"), "10th percentile"),
                Query(quantile(0.5, "prediction_ratio"), "median"),
                Query(quantile(0.9, "prediction_ratio"), "90th percentile"),
            ),
        ),
        Panel(
            "Requests a step",
            "Against the batch limit.",
            (
                Query(_MEAN_BATCH, "mean"),
                Query(value("batch_limit", merge="max"), "limit"),
            ),
        ),
    ),
)

ROWS = (GLANCE, WAITING, COST, MEMORY, COPIES, STEPS)
