"""Every text of the preview's page, in English and in Chinese. Names of options, fields and tokens stay as
they are in both."""

from __future__ import annotations

from collections.abc import Callable

LANGUAGES = {"en": 0, "zh": 1}

WORDS = {
    "title": ("Preview of {source}", "数据预览：{source}"),
    "about": (
        "{shown} of the data, as the model meets them in epoch {epoch} with seed {seed}. Everything below is read off the packed row that "
        "training uses.",
        "数据中的 {shown}，即模型在 seed {seed}、第 {epoch} 轮（epoch）见到的样子。以下内容全部取自训练时所用的打包结果。",
    ),
    "records": ("{n} records", "{n} 条记录"),
    "record_1": ("1 record", "1 条记录"),
    "bad_count": ("{bad} of them cannot be used.", "其中 {bad} 条无法使用。"),
    "words_note": (
        "No model_path is given: texts are cut into words, an estimate of the tokens, and picture sizes are those of BAGEL-7B-MoT. "
        "Give --model_path for the real tokens and sizes.",
        "没有给出 model_path：文本按词切分，token 数只是估计；图像尺寸按 BAGEL-7B-MoT 计算。要看真实的 token 与尺寸，请加 --model_path。",
    ),
    "model_note": ("Tokens and picture sizes are those of {model}.", "token 与图像尺寸取自 {model}。"),
    "legend": ("How to read this page", "怎样看这一页"),
    "blocks": ("Blocks", "块"),
    "text": ("text", "文本"),
    "vit": ("ViT image", "ViT 图像"),
    "clean": ("clean VAE image", "干净的 VAE 图像"),
    "noised": ("noised VAE image", "加噪的 VAE 图像"),
    "k_text": ("text, and the two markers of every image", "文本，以及每张图像的两个标记"),
    "k_vit": ("patches of a picture to look at", "供理解的图像块（patch）"),
    "k_clean": ("latents of a picture that is there, time 0", "已有图像的潜变量，时间 t = 0"),
    "k_noised": (
        "latents of a picture to draw, at a time t; always with loss; nothing but itself sees it",
        "要画的图像的潜变量，时间为 t；总有损失；只有它自己能看到",
    ),
    "l_context": ("context: read, never learnt", "上下文：只读，不学习"),
    "l_learnt": ("learnt: the label of the token before it", "要学习：是前一个 token 的标签（label）"),
    "l_special": ("special token", "特殊 token"),
    "l_transition": ("transition: what the closing token learns to open next", "转移：结束 token 学习接下来打开什么"),
    "l_cut": ("cut off by max_sequence_length", "被 max_sequence_length 截去"),
    "l_cut_label": ("label of the last token before the cut", "截断处最后一个 token 的标签"),
    "l_invisible": (
        "spaces show as a dot, other invisible characters by name; ×2 marks a character made of two tokens",
        "空格显示为小点，其他不可见字符显示名称；×2 表示一个字符由两个 token 组成",
    ),
    "l_hover": (
        "Hold the pointer over a token, a block or a cell of the mask for its numbers.",
        "把指针停在 token、块或掩码格子上，可看到具体数字。",
    ),
    "comma": (", ", "，"),
    "loss": ("loss", "损失"),
    "context": ("context", "上下文"),
    "copy": ("copy of a target: context", "目标的副本：上下文"),
    "record": ("Record {number}", "记录 {number}"),
    "place": ("where", "出处"),
    "format": ("format", "格式"),
    "task": ("task", "任务"),
    "metadata": ("metadata", "元数据"),
    "length": ("length", "长度"),
    "of_max": ("{share} of the {limit} tokens of max_sequence_length", "占 max_sequence_length（{limit}）的 {share}"),
    "cut_note": ("cut: {lost} text tokens are lost", "已截断：丢失 {lost} 个文本 token"),
    "text_labels": ("text labels", "文本标签"),
    "image_targets": ("image target tokens", "图像目标 token"),
    "share_row": ("{share} of the sample's tokens", "占样本 token 的 {share}"),
    "share_labels": ("{share} of its targets", "占全部目标的 {share}"),
    "sequence": ("The sequence", "序列"),
    "sequence_note": ("widths grow with the root of the length; an orange edge carries loss", "宽度随长度的平方根增长；橙色底边表示有损失"),
    "tokens_n": ("{n} tokens", "{n} 个 token"),
    "more_tokens": ("… {n} more tokens", "…… 还有 {n} 个 token"),
    "places": ("index {a}–{b}", "index {a}–{b}"),
    "rope": ("RoPE {a}–{b}", "RoPE {a}–{b}"),
    "rope_1": ("RoPE {a}", "RoPE {a}"),
    "shares": ("same position as {others}", "与 {others} 同位置"),
    "may_drop": ("may be left out: {chance}", "可能被丢弃：{chance}"),
    "dropped": ("left out in this visit", "这一次被丢弃"),
    "dropped_text": ("A dropped text leaves nothing; what follows moves up.", "丢弃的文本不留下任何内容，后面的内容前移。"),
    "dropped_image": ("It leaves no token, but position {position} stays taken.", "不留下 token，但位置 {position} 仍被占用。"),
    "dropped_label": ("Its label {label} is gone as well.", "它的标签 {label} 也随之消失。"),
    "opens": ("then", "之后"),
    "wording": ("wording {k} of {n}", "第 {k} 种说法（共 {n} 种）"),
    "special_inside": ("special token inside the text", "文本里含有特殊 token"),
    "upscaled": ("enlarged ×{factor}: this adds no detail", "放大 ×{factor}：不会增加细节"),
    "scaled_down": ("scaled down to {share}", "缩小到 {share}"),
    "same_size": ("size unchanged", "尺寸不变"),
    "scaled_up": ("scaled up", "放大"),
    "mixed_scale": ("resized", "已调整尺寸"),
    "aspect": ("proportions changed by {share}", "宽高比改变 {share}"),
    "file": ("file", "文件"),
    "size": ("size", "尺寸"),
    "tokens": ("tokens", "token"),
    "pixels": ("{w} × {h} px", "{w} × {h} 像素"),
    "grid": ("{rows} × {columns} = {n}, {side} px each", "{rows} 行 × {columns} 列 = {n} 个，每个 {side} 像素"),
    "time": ("t = {t}: {picture} picture, {noise} noise", "t = {t}：{picture} 图像，{noise} 噪声"),
    "illustration": (
        "Mixed here in pixels, as an illustration: training mixes normalised latents, with other noise.",
        "此处在像素上混合，仅作示意；训练时混合的是归一化的潜变量，噪声也不同。",
    ),
    "in_bytes": ("(inside the data file)", "（在数据文件内）"),
    "dropout": ("What training may leave out", "训练时可能丢弃的内容"),
    "d_block": ("block", "块"),
    "d_option": ("option", "选项"),
    "d_chance": ("chance", "概率"),
    "d_now": ("in this visit", "这一次"),
    "d_kept": ("kept", "保留"),
    "d_none_text": ("Nothing: only samples that draw lose context.", "没有：只有要画图的样本才会丢弃上下文。"),
    "d_none": ("Nothing: this sample has no context that may be left out.", "没有：这个样本没有可丢弃的上下文。"),
    "copies": (
        "The answer is one single image. In {share} of the visits clean copies follow it, to learn to stop after it "
        "(single_image_stop_prob). In this visit: {now}.",
        "回答是单独一张图像。有 {share} 的访问会在其后附上干净的副本，以学习在它之后停止（single_image_stop_prob）。这一次：{now}。",
    ),
    "with_copies": ("with copies", "有副本"),
    "without_copies": ("without copies", "没有副本"),
    "mask": ("Who sees whom", "谁能看到谁"),
    "mask_note": (
        "A row is a block that looks, a column what it sees, in the order of the sequence. Filled: all of it. Triangle: each token sees "
        "itself and what stands before it. Hatched: hidden although it stands before (a noised image). Empty: it stands after.",
        "行是“看”的块，列是被看的块，按序列顺序排列。"
        "实心：全部可见。三角：每个 token 只看到自己和前面的 token。斜线：虽在前面但被隐藏（加噪图像）。空白：在后面。",
    ),
    "mask_tokens": ("One cell is one token.", "一格是一个 token。"),
    "mask_blocks": ("One cell is one block, drawn smaller than its length where it is long.", "一格是一个块；长的块按比例缩小。"),
    "mask_first": ("Only the first {n} of {all} blocks are drawn.", "只画出前 {n} 个块（共 {all} 个）。"),
    "sees_0": ("sees nothing of", "完全看不到"),
    "sees_1": ("sees all of", "能看到全部"),
    "sees_2": ("sees, each token up to itself,", "每个 token 看到它自己为止："),
    "sees_3": ("sees a part of", "能看到一部分"),
    "bad": ("This record cannot be used.", "这条记录无法使用。"),
    "raw": ("the record as it stands", "记录原文"),
    "code": ("problem", "问题"),
    "field": ("field", "字段"),
    "found": ("found", "实际"),
    "expected": ("expected", "应为"),
    "fix": ("fix", "解决办法"),
}  # fmt: skip


def words(language: str) -> Callable[..., str]:
    """The function from a key and its values to the text in ``language`` (``en`` or ``zh``)."""
    column = LANGUAGES[language]

    def say(key: str, **values: object) -> str:
        return WORDS[key][column].format(**values)

    return say
