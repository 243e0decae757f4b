"""The texts of ``unigen watch``, in one table: English and Chinese; and numbers as people read them."""

from __future__ import annotations

import math
import unicodedata
from typing import Any

from unigen.tty import harmless

LANGUAGES = ("en", "zh")

WORDS: dict[str, tuple[str, str]] = {
    # states and their evidence
    "running": ("running", "运行中"),
    "hung": ("hung", "卡住"),
    "dead": ("dead", "已异常退出"),
    "stopped": ("stopped", "已停止"),
    "finished": ("finished", "已完成"),
    "new": ("starting", "正在启动"),
    "heartbeat": ("heartbeat {ago} ago, in phase {phase}; processes: {n}", "{ago}前有心跳，当前阶段 {phase}；进程数 {n}"),
    "lock_held": ("a process holds the run's lock", "有进程持有本次运行的锁"),
    "said_goodbye": ("its processes ended in phase {phase}, {ago} ago", "各进程已在 {ago}前结束，最后阶段 {phase}"),
    "reason": ("reason: {why}", "原因：{why}"),
    "all_steps": ("all {n:,} steps are done", "全部 {n:,} 步已完成"),
    "process_gone": (
        "process {pid} (rank {rank}) has ended, in phase {phase} at step {step:,}; last heartbeat {ago} ago",
        "进程 {pid}（rank {rank}）已经不在，最后处于第 {step:,} 步的 {phase} 阶段；最后心跳在 {ago}前",
    ),
    "no_heartbeat": (
        "no heartbeat for {ago}; the last came from rank {rank} at step {step:,}, phase {phase}",
        "已有 {ago}没有心跳；最后一次来自 rank {rank}，第 {step:,} 步，阶段 {phase}",
    ),
    "nothing_yet": ("nothing has been logged yet", "还没有任何日志"),
    "no_process": ("no process works on it; last written {ago} ago", "没有进程在运行；最后写入在 {ago}前"),
    "silent": (
        "rank {rank} on {host} gave no heartbeat for {ago} (step {step:,}, phase {phase})",
        "{host} 上的 rank {rank} 已有 {ago}没有心跳（第 {step:,} 步，阶段 {phase}）",
    ),
    "stuck": (
        "rank {rank} makes no progress for {for_}: phase {phase} of step {step:,}",
        "rank {rank} 已有 {for_}没有进展：第 {step:,} 步的 {phase} 阶段",
    ),
    # worries
    "not_finite": ("Not finite: {n:,} logged steps, the last at step {step:,}.", "数值非有限：共 {n:,} 步，最近一次在第 {step:,} 步。"),
    "skipped": (
        "{n:,} of the last {of:,} steps were skipped ({total:,} in all); see bad_steps.jsonl.",
        "最近 {of:,} 步中有 {n:,} 步被跳过（累计 {total:,} 步）；见 bad_steps.jsonl。",
    ),
    "norm_grows": (
        "The gradient norm grows: {after:.3g} lately, {before:.3g} a little earlier. Consider a lower --learning_rate.",
        "梯度范数正在变大：最近 {after:.3g}，此前 {before:.3g}。可考虑降低 --learning_rate。",
    ),
    "data_wait": (
        "{share:.0%} of the time waits for data. More --num_workers, or pictures encoded once (unigen cache).",
        "{share:.0%} 的时间在等待数据。可增大 --num_workers，或先编码图片（unigen cache）。",
    ),
    "no_better": (
        "The last {n:,} validations were no better than {best:.4g} at step {step:,}; now {now:.4g}.",
        "最近 {n:,} 次验证都没有好于第 {step:,} 步的 {best:.4g}；现在是 {now:.4g}。",
    ),
    "no_checkpoint": (
        "No checkpoint for {n:,} steps, though one is due every {every:,} (--save_steps).",
        "已有 {n:,} 步没有检查点，而应每 {every:,} 步保存一次（--save_steps）。",
    ),
    "old_checkpoint": (
        "The last checkpoint is {ago} old: a crash now would cost that much.",
        "最近的检查点是 {ago}前的：此刻崩溃会损失这段训练。",
    ),
    "long_phase": (
        "Rank {rank} makes no progress for {for_}: phase {phase} of step {step:,}.",
        "rank {rank} 已有 {for_}没有进展：第 {step:,} 步的 {phase} 阶段。",
    ),
    "behind": ("Rank {rank} is at step {step:,}, others at {ahead:,}.", "rank {rank} 在第 {step:,} 步，其他进程已到第 {ahead:,} 步。"),
    "clock_ahead": ("The clock of the run is {for_} ahead of this machine's.", "运行所在机器的时钟比本机快 {for_}。"),
    "clock_behind": ("The clock of the run is {for_} behind this machine's.", "运行所在机器的时钟比本机慢 {for_}。"),
    "disk_full": ("The disk has {free} left; the next checkpoint needs about {need}.", "磁盘只剩 {free}；下一个检查点约需 {need}。"),
    "stack_written": (
        "A process that hung has left its stack: {file} ({n:,} in all).",
        "有进程卡住并留下了调用栈：{file}（共 {n:,} 个）。",
    ),
    "half_written": (
        "Checkpoint {name} was being written when the run ended; it does not count, and a resume sweeps it.",
        "运行结束时检查点 {name} 尚未写完；它不算数，恢复训练时会被清除。",
    ),
    "unreadable": ("{n:,} lines of metrics.jsonl cannot be read.", "metrics.jsonl 中有 {n:,} 行无法读取。"),
    # figures
    "step": ("step", "步"),
    "of_steps": ("step {step:,} of {total:,}", "第 {step:,} / {total:,} 步"),
    "step_alone": ("step {step:,}", "第 {step:,} 步"),
    "eta": ("time left", "剩余时间"),
    "steps_per_minute": ("steps per minute", "每分钟步数"),
    "tokens_per_second": ("tokens per second", "每秒 token 数"),
    "data_wait_share": ("waiting for data", "等待数据"),
    "last_checkpoint": ("last checkpoint", "最近检查点"),
    "disk_left": ("free on the disk", "磁盘剩余"),
    "ago": ("{t} ago", "{t}前"),
    "loss": ("loss", "总损失"),
    "text_loss": ("text loss", "文本损失"),
    "image_loss": ("image loss", "图像损失"),
    "grad_norm": ("gradient norm", "梯度范数"),
    "learning_rate": ("learning rate", "学习率"),
    "data_wait_curve": ("waiting for data", "等待数据"),
    "training": ("training", "训练"),
    "validation": ("validation", "验证"),
    "skipped_steps": ("skipped steps", "跳过的步"),
    "best": ("best", "最佳"),
    "now": ("now", "当前"),
    "unit_loss": ("nats per token", "nat / token"),
    "unit_text_loss": ("nats per token", "nat / token"),
    "unit_image_loss": ("mean squared error", "均方误差"),
    "unit_share": ("% of the time", "占时间 %"),
    "cut_off": ("some values above {high:.3g} are cut off", "高于 {high:.3g} 的少数值未显示"),
    "done": ("done", "已完成"),
    "log_scale": ("logarithmic", "对数坐标"),
    "smoothed": ("smoothed", "已平滑"),
    # parts of the page
    "title": ("Run {name}", "运行 {name}"),
    "title_many": ("{n:,} runs", "{n:,} 个运行"),
    "seen": ("As of {when}, from the files in {folder}", "截至 {when}，数据取自 {folder}"),
    "curves": ("Curves", "曲线"),
    "samples": ("Samples", "样例"),
    "samples_note": (
        "The same prompt with the same seed, over the steps of the run.",
        "同一提示词、同一随机种子在不同训练步的结果。",
    ),
    "samples_of_runs": ("The newest answers of each run to the same prompt.", "各个运行对同一提示词的最新结果。"),
    "checkpoints": ("Checkpoints", "检查点"),
    "processes": ("Processes", "进程"),
    "problems": ("Skipped steps and left-out records", "跳过的步与排除的记录"),
    "options": ("Options", "选项"),
    "options_note": ("Options that differ from their defaults.", "与默认值不同的选项。"),
    "runs": ("Runs", "运行"),
    "worries": ("Warnings", "警告"),
    "no_metrics": ("No metrics yet: the first step is still to come.", "还没有指标：第一步尚未完成。"),
    "earlier": ("Earlier runs in this folder: {names}", "此文件夹中更早的运行：{names}"),
    "reading": (
        "The log is long: older curves are drawn from samples of it, {share:.0%} are read.",
        "日志很长：较早的曲线取自抽样，已读取 {share:.0%}。",
    ),
    "being_written": ("being written", "正在写入"),
    "bad_steps": ("skipped steps", "跳过的步"),
    "bad_records": ("left-out records", "排除的记录"),
    "none": ("none", "无"),
    "picture": ("picture", "图片"),
    "not_shown": ("picture not shown: {why}", "图片未显示：{why}"),
    "too_large": ("too large for this page", "对本页面来说过大"),
    "unreadable_picture": ("it cannot be read", "无法读取"),
    "more": ("... and {n:,} more", "…… 另有 {n:,} 个"),
    # columns
    "run": ("run", "运行"),
    "state": ("state", "状态"),
    "name": ("name", "名称"),
    "age": ("age", "时间"),
    "size": ("size", "大小"),
    "world": ("processes", "进程数"),
    "rank": ("rank", "rank"),
    "host": ("host", "主机"),
    "pid": ("process", "进程号"),
    "phase": ("phase", "阶段"),
    "phase_for": ("in it for", "已持续"),
    "last_sign": ("last heartbeat", "最后心跳"),
    "why": ("why", "原因"),
    "records": ("records", "记录"),
    "file": ("file : line", "文件 : 行"),
    "code": ("code", "代码"),
    "found": ("found", "发现"),
    "option": ("option", "选项"),
    "value": ("value", "值"),
    "prompt": ("prompt", "提示词"),
    "latest_sample": ("latest sample, step {step:,}", "最新样例，第 {step:,} 步"),
    "quit": ("Ctrl-C leaves; the run goes on", "按 Ctrl-C 退出，训练不受影响"),
    # time
    "seconds": ("{n} s", "{n} 秒"),
    "minutes": ("{n} min", "{n} 分钟"),
    "hours": ("{n} h {m} min", "{n} 小时 {m} 分钟"),
    "days": ("{n} d {m} h", "{n} 天 {m} 小时"),
}

DURATIONS = ("ago", "for_")  # values that are seconds
SIZES = ("free", "need")  # bytes


class Words:
    """The texts of one language: ``words("skipped", n=3)``."""

    def __init__(self, language: str):
        assert language in LANGUAGES
        self.language, self._column = language, LANGUAGES.index(language)

    def __call__(self, key: str, **values: Any) -> str:
        shown = {name: self._shown(name, value) for name, value in values.items()}
        text = WORDS[key][self._column]
        return text.format(**shown) if shown else text

    def _shown(self, name: str, value: Any) -> Any:
        if name in DURATIONS:
            return self.duration(value)
        if name == "phase":
            return harmless(value) or "–"
        return size(value) if name in SIZES else harmless(value) if isinstance(value, str) else value

    def duration(self, seconds: float) -> str:
        """``45 s``, ``12 min``, ``3 h 5 min``, ``2 d 4 h``."""
        if not 0 <= seconds < 1e11:
            return "?"
        if seconds < 120:
            return self("seconds", n=round(seconds))
        minutes = round(seconds / 60)
        if minutes < 60:
            return self("minutes", n=minutes)
        if minutes < 48 * 60:
            return self("hours", n=minutes // 60, m=minutes % 60)
        hours = round(seconds / 3600)
        return self("days", n=hours // 24, m=hours % 24)


def size(n: float) -> str:
    """Bytes: ``29.4 GB`` (10^9), as disks and ``min_free_gb`` count."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if n >= unit:
            return f"{n / unit:.3g} {name}" if n < 100 * unit else f"{n / unit:,.0f} {name}"
    return f"{n:.0f} B"


def figure(value: float | None) -> str:
    """Four significant digits: ``1.234``, ``12,340``, ``2e-05``; ``–`` where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e7 else f"{value:.3g}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.3g}"


def columns(text: str) -> int:
    """Columns that a terminal gives the text: Chinese characters take two, combining ones none."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 0 if unicodedata.combining(c) else 1 for c in text)
