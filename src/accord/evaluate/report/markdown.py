"""The report as Markdown, for a pull request or a model card. Texts of models stand in indented blocks, inert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from accord.evaluate.compare import PairedOutcome
from accord.evaluate.report import words
from accord.evaluate.report.record import Report, change_of, sorted_outcomes, summary
from accord.stats.agreement import Agreement

__all__ = ["render_markdown"]

_EXAMPLES = 3


def render_markdown(report: Report) -> str:
    """The whole text."""
    blocks = [
        f"# {_inline(report.title)}{' (simulated)' if report.simulated else ''}",
        "**Simulated:** the preferences come from a simulated panel, a program with noise and bias, not from people."
        if report.simulated
        else "",
        summary(report),
        f"{_code(report.baseline)} → {_code(report.candidate)}, paired on {report.comparison.n} held-out prompts.",
        _headlines(report),
        words.power(report.comparison),
        _kinds(report),
        _preferences(report),
        _examples(report, "regressed"),
        _examples(report, "improved"),
        _facts("Time and memory", {stage: words.duration(seconds) for stage, seconds in report.stage_seconds.items()}),
        f"Peak memory: {report.peak_memory / 1e9:.1f} GB." if report.peak_memory else "",
        _facts("What was not measured", words.missing(report.comparison, report.not_measured)),
        _facts("Provenance", report.provenance),
        "## Next\n\n" + _indented("\n".join(report.next_commands)) if report.next_commands else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _headlines(report: Report) -> str:
    comparison = report.comparison
    rows = []
    for name, verdict in comparison.verdicts.items():
        measure = getattr(comparison, name)
        if measure is None:
            rows.append([words.LABELS[name], verdict, "", "", "", "", "", ""])
            continue
        rows.append(
            [
                words.LABELS[name],
                f"**{verdict}**",
                words.value(name, measure.before),
                words.value(name, measure.after),
                words.change(name, measure.difference),
                words.interval(name, measure.interval),
                f"{words.p_value(words.adjusted(measure))} ({words.which_test(measure)}, Holm)",
                str(measure.n),
            ]
        )
    length = comparison.length
    rows.append(
        [
            words.LABELS["length"],
            "",
            words.value("length", length.before),
            words.value("length", length.after),
            words.change("length", length.difference),
            words.interval("length", length.interval),
            words.p_value(length.p_value),
            str(length.n),
        ]
    )
    if (kl := comparison.kl) is not None:
        rows.append([words.LABELS["kl"], "", "", f"{kl.mean:.2f} nats", "", words.numbers(kl.interval), "", str(kl.n)])
    else:
        rows.append([words.LABELS["kl"], "Not measured", "", "", "", "", "", ""])
    return _table(["Metric", "Verdict", "Before", "After", "Difference", "95 % interval", "Test", "n"], rows)


def _kinds(report: Report) -> str:
    if not report.comparison.kinds:
        return ""
    rows = [
        [
            _inline(kind.kind),
            str(kind.n),
            words.percent(kind.before),
            words.percent(kind.after),
            words.change("pass_rate", kind.difference),
            words.interval("pass_rate", kind.interval),
        ]
        for kind in report.comparison.kinds
    ]
    header = ["Requirement", "n", "Before", "After", "Difference", "95 % interval"]
    return "## Requirements by kind\n\n" + _table(header, rows)


def _preferences(report: Report) -> str:
    parts = []
    panel = report.panel
    if (reward := report.reward) is not None:
        accuracies = [("Reward model", reward.accuracy), ("Longer wins", reward.longer_wins)]
        rows = [
            [label, words.percent(row.value, 1), words.shares(row.interval), str(row.n)]
            for label, row in accuracies
            if row is not None
        ]
        if (ceiling := words.ceiling(reward, panel)) is not None:
            rows.insert(1, _agreement("Ceiling: one more annotator", ceiling))
        parts.append(_table(["Accuracy on held-out pairs", "Share", "95 % interval", "n"], rows))
        parts.append(
            f"Mean margin {words.change('reward', reward.margin)}, log-loss {reward.log_loss:.3f} (always ½: 0.693), "
            f"Brier score {reward.brier:.3f} (0.250), mean confidence {words.percent(reward.confidence)}, "
            f"ties {reward.ties}."
        )
        parts.append(words.calibration(reward.calibration))
    if panel is not None:
        named = {"Any two annotators": panel.pairwise, **panel.annotators}
        title = "Simulated panel" if report.simulated else "Panel"
        rows = [_agreement(name, measure) for name, measure in named.items()]
        parts.append(_table([f"{title}: agreement", "Share", "95 % interval", "n"], rows))
        parts.append(words.alpha(panel.alpha))
    return "\n\n".join(["## Reward model and panel", *parts]) if parts else ""


def _agreement(label: str, measure: Agreement) -> list[str]:
    share = "undefined" if measure.value is None else words.percent(measure.value, 1)
    return [_inline(label), share, words.shares(measure.interval) if measure.interval else "", str(measure.pairs)]


def _examples(report: Report, change: str) -> str:
    chosen = [row for row in sorted_outcomes(report.comparison) if change_of(row) == change][:_EXAMPLES]
    if not chosen:
        return ""
    return f"## Most {change}\n\n" + "\n\n".join(_example(row) for row in chosen)


def _example(row: PairedOutcome) -> str:
    parts = [("Prompt", row.prompt), ("Before", row.text_before), ("After", row.text_after)]
    return "\n\n".join([_code(row.prompt_id), *(f"{name}:\n\n{_indented(text)}" for name, text in parts)])


def _facts(title: str, facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    return f"## {title}\n\n" + _table(["", ""], [[_inline(name), _inline(value)] for name, value in facts.items()])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(header), ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _inline(text: str) -> str:
    """One line in which no character means anything to Markdown or HTML."""
    line = " ".join(text.split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{character}" if character in r"\`*_[]|#!~" else character for character in line)


def _code(text: str) -> str:
    return "`" + " ".join(text.split()).replace("`", "'").replace("|", "¦") + "`"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in (text or "(empty)").splitlines())
