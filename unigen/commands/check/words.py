"""The texts of ``unigen check``, in one table: English and Chinese."""

from __future__ import annotations

from typing import Any

LANGUAGES = ("en", "zh")

WORDS: dict[str, tuple[str, str]] = {
    "title": ("Data check", "数据检查"),
    "clean": ("No problem found", "没有发现问题"),
    "bad": ("{n:,} problems found", "发现 {n:,} 个问题"),
    "one_bad": ("1 problem found", "发现 1 个问题"),
    "interrupted": (
        "Interrupted: this report covers only the {n:,} records read until then",
        "检查被中断：本报告只包含中断前读取的 {n:,} 条记录",
    ),
    "covered": (
        "Records: {records:,}; files: {files:,}; read in {seconds:.1f} s; {depth}.",
        "共 {files:,} 个文件、{records:,} 条记录，用时 {seconds:.1f} 秒；{depth}。",
    ),
    "deep": ("every picture decoded", "每张图片都已完整解码"),
    "headers": ("pictures: headers only", "图片只读取了文件头"),
    # headings
    "problems": ("Problems", "问题"),
    "advice": ("Advice", "建议"),
    "contents": ("What is in it", "数据构成"),
    "balance": ("Targets and balance", "训练目标与平衡"),
    "lengths": ("Lengths", "长度"),
    "pictures": ("Pictures", "图片"),
    "repetitions": ("Repetitions", "重复"),
    "near_empties": ("Near-empty descriptions", "几乎为空的描述"),
    "cuts": ("What a max_sequence_length would cut", "不同 max_sequence_length 的截断情况"),
    "fill": ("How full rows get", "打包行的填充率"),
    # columns and lines
    "records": ("records", "记录数"),
    "share": ("share", "占比"),
    "format": ("format", "格式"),
    "task": ("task", "任务"),
    "text_tokens": ("text tokens with loss", "计损失的文本 token"),
    "image_tokens": ("image tokens with loss", "计损失的图像 token"),
    "modality": ("targets", "目标"),
    "texts": ("texts", "文本"),
    "images": ("images", "图像"),
    "pieces": ("pieces", "片段数"),
    "tokens_with_loss": ("tokens with loss", "计损失的 token"),
    "kind": ("tokens of", "token 种类"),
    "kind_text": ("text", "文本"),
    "kind_vit": ("pictures seen by the ViT", "ViT 看到的图片"),
    "kind_clean": ("clean latents (context)", "干净 latent（上下文）"),
    "kind_noised": ("noised latents (targets)", "加噪 latent（目标）"),
    "tokens": ("tokens", "token 数"),
    "words": ("words", "词"),
    "unit_tokens": ("tokens of a record (exact)", "每条记录的 token 数（精确）"),
    "unit_words": ("length of a record (texts estimated in words)", "每条记录的长度（文本按词估计）"),
    "minimum": ("min", "最小"),
    "maximum": ("max", "最大"),
    "mean": ("mean", "平均"),
    "median": ("median", "中位数"),
    "sum": ("sum", "总和"),
    "vae_tokens": ("latent tokens of a picture", "每张图片的 latent token 数"),
    "vit_tokens": ("ViT tokens of a picture", "每张图片的 ViT token 数"),
    "size": ("width × height", "宽 × 高"),
    "count": ("times", "次数"),
    "other_sizes": ("{n:,} other sizes", "其他 {n:,} 种尺寸"),
    "upscaled_line": (
        "{n:,} of {of:,} pictures that the VAE encodes ({share:.1%}) are smaller than its minimum and are scaled up.",
        "VAE 编码的 {of:,} 张图片中有 {n:,} 张（{share:.1%}）小于最小尺寸，会被放大。",
    ),
    "repeated": ("repeated", "重复内容"),
    "where": ("where (first ones)", "位置（前几处）"),
    "what": ("what", "内容"),
    "same_records": ("records that repeat another one", "与其他记录相同的记录"),
    "same_texts": ("records whose text targets repeat those of another one", "文本目标与其他记录相同的记录"),
    "same_pictures": ("uses of a picture beyond the first", "图片的重复使用次数"),
    "same_copies": (
        "files that are byte for byte a copy of another one",
        "内容与其他文件逐字节相同的图片文件",
    ),
    "distinct": ("distinct", "不同的"),
    "surplus": ("surplus", "多余的"),
    "none": ("None.", "无。"),
    "cut": ("records cut", "被截断的记录"),
    "lost": ("text target tokens lost", "丢失的文本目标 token"),
    "refused": ("records refused", "被拒绝的记录"),
    "refused_note": (
        "Only text targets are cut; a record whose pictures and context alone are longer is refused.",
        "只截断文本目标；若图片和上下文本身就超长，该记录会被拒绝。",
    ),
    "this_one": ("in force", "当前生效"),
    "packed": ("packed", "打包后"),
    "one_a_row": ("one sample a row", "每行一个样本"),
    "samples_a_row": ("samples a row", "每行样本数"),
    "longer": ("samples longer than a row", "比一行更长的样本"),
    "code": ("code", "代码"),
    "place": ("file : line", "文件 : 行"),
    "field": ("field", "字段"),
    "found": ("found", "发现"),
    "expected": ("expected", "应为"),
    "cure": ("fix", "解决办法"),
    "more": ("... and {n:,} more", "…… 另有 {n:,} 个"),
    "more_in": ("... and {n:,} more; all are in {path}", "…… 另有 {n:,} 个；全部列在 {path}"),
    "more_how": (
        "... and {n:,} more; --problems problems.jsonl lists all",
        "…… 另有 {n:,} 个；用 --problems problems.jsonl 列出全部",
    ),
    "tile_records": ("records", "条记录"),
    "tile_problems": ("problems", "个问题"),
    "tile_length": ("median length", "长度中位数"),
    "tile_pictures": ("pictures", "张图片"),
    "tile_text": ("text tokens with loss", "文本 token 计损失"),
    "tile_image": ("image tokens with loss", "图像 token 计损失"),
    "records_per_bin": ("records", "记录数"),
    "pictures_per_bin": ("pictures", "图片数"),
    "task_text": ("text", "纯文本"),
    "task_understand": ("understand", "理解"),
    "task_generate": ("generate", "生成"),
    "task_edit": ("edit", "编辑"),
    "task_interleaved": ("interleaved", "图文交错"),
    # advice
    "advice_problems": (
        "Problems: {n:,} ({share:.1%} of the records). Correct them: training stops before its first step.",
        "有 {n:,} 个问题（占记录的 {share:.1%}）。请先修正：否则训练在第一步之前就会停止。",
    ),
    "advice_few_problems": (
        "Problems: {n:,} ({share:.2%} of the records). Correct them, or train with --on_bad_record skip, which leaves up to 1 % out.",
        "有 {n:,} 个问题（占记录的 {share:.2%}）。请修正，或在训练时使用 --on_bad_record skip（最多跳过 1 %）。",
    ),
    "advice_duplicates": (
        "{n:,} records ({share:.1%}) repeat another one. The model sees them twice an epoch; remove them unless that is meant.",
        "{n:,} 条记录（{share:.1%}）与其他记录重复，每个 epoch 会被多次学习；若非有意，请删除。",
    ),
    "advice_same_text": (
        "“{text}” is the answer of {n:,} records ({share:.1%} of those with text). The model learns to say it regardless of the question.",
        "“{text}” 是 {n:,} 条记录的答案（占含文本目标记录的 {share:.1%}）。模型容易不看问题就这样回答。",
    ),
    "advice_near_empty": (
        "{n:,} descriptions of pictures ({share:.1%}) say next to nothing. Write them anew or leave the records out.",
        "{n:,} 条图片描述（{share:.1%}）几乎为空。请重写，或删除这些记录。",
    ),
    "advice_only_text": (
        "All targets are texts: nothing here teaches the model to draw. --visual_gen false halves the memory of such a training.",
        "所有目标都是文本：这些数据不训练画图。此时 --visual_gen false 可节省一半显存。",
    ),
    "advice_only_image": (
        "All targets are images: nothing here keeps the model's answers in words. Add some text, or train with --freeze_und.",
        "所有目标都是图像：模型的文字能力得不到训练。请加入一些文本数据，或使用 --freeze_und。",
    ),
    "advice_few_text_records": (
        "Only {n:,} records ({share:.1%}) have a text target. Their loss moves the weights as much as all images together, with much "
        "noise: add text, or lower --text_loss_weight.",
        "只有 {n:,} 条记录（{share:.1%}）含文本目标。文本损失与图像损失同等加权，少量文本会带来很大噪声："
        "请增加文本数据，或降低 --text_loss_weight。",
    ),
    "advice_few_image_records": (
        "Only {n:,} records ({share:.1%}) have an image target. Their loss moves the weights as much as all texts together, with much "
        "noise: add images, or lower --image_loss_weight.",
        "只有 {n:,} 条记录（{share:.1%}）含图像目标。图像损失与文本损失同等加权，少量图像会带来很大噪声："
        "请增加图像数据，或降低 --image_loss_weight。",
    ),
    "advice_few_text_tokens": (
        "Only {share:.2%} of the tokens with loss ({n:,}) are text: a row may hold hardly any. Larger rows (--max_num_tokens) or more "
        "text make the text loss steadier.",
        "计损失的 token 中只有 {share:.2%}（{n:,} 个）是文本，一行里可能几乎没有文本。增大 --max_num_tokens 或增加文本可使文本损失更稳定。",
    ),
    "advice_few_image_tokens": (
        "Only {share:.2%} of the tokens with loss ({n:,}) are of images: a row may hold none. Larger rows (--max_num_tokens) or more "
        "images make the image loss steadier.",
        "计损失的 token 中只有 {share:.2%}（{n:,} 个）是图像，一行里可能没有图像。增大 --max_num_tokens 或增加图像可使图像损失更稳定。",
    ),
    "advice_upscaled": (
        "{n:,} pictures ({share:.1%} of those that the VAE encodes) are smaller than its minimum and are scaled up: what is learnt from "
        "them is blurred. Use larger originals.",
        "{n:,} 张图片（占 VAE 编码图片的 {share:.1%}）小于最小尺寸，会被放大，模型会学到模糊的画面。请使用更大的原图。",
    ),
    "advice_copies": (
        "Picture files that are copies of another one under another name: {n:,}.",
        "{n:,} 个图片文件与其他文件内容相同，只是名字不同。",
    ),
    "advice_not_deep": (
        "Only the headers of pictures were read. --deep decodes every picture and finds truncated ones, too.",
        "图片只检查了文件头。使用 --deep 会完整解码每张图片，可发现被截断的文件。",
    ),
    "advice_cut": (
        "max_sequence_length {limit:,} cuts {n:,} records ({share:.1%}), which lose {lost:.1%} of all text target tokens.",
        "max_sequence_length {limit:,} 会截断 {n:,} 条记录（{share:.1%}），丢失全部文本目标 token 的 {lost:.1%}。",
    ),
    "advice_rows": (
        "--max_num_tokens {budget} packs rows that are {fill:.1%} full; with one sample a row they would be {single:.1%} full.",
        "--max_num_tokens {budget} 打包后每行填充 {fill:.1%}；若每行只放一个样本，填充率为 {single:.1%}。",
    ),
    "advice_estimate": (
        "Texts were counted in words, an estimate of their tokens. --model_path counts them with the model's tokenizer.",
        "文本长度按词估计。给出 --model_path 可用模型的分词器精确统计。",
    ),
}


CODES: dict[str, tuple[str, str]] = {
    "ambiguous_format": ("fields of two formats", "字段属于两种格式"),
    "ambiguous_piece": ("a text and a picture in one piece", "同一片段里既有文本又有图片"),
    "bad_json": ("not valid JSON", "JSON 语法错误"),
    "bad_path": ("not the path of a file", "不是文件路径"),
    "bad_step_number": ("steps do not count up", "步骤编号不连续"),
    "bad_text": ("not Unicode text", "不是合法的 Unicode 文本"),
    "bad_utf8": ("not UTF-8", "不是 UTF-8 编码"),
    "broken_file": ("file truncated or damaged", "数据文件被截断或损坏"),
    "broken_picture": ("picture truncated or damaged", "图片被截断或损坏"),
    "check_died": ("reading it ended the process", "读取时进程异常退出"),
    "duplicate_key": ("a field twice", "字段重复"),
    "empty_text": ("an empty target", "目标文本为空"),
    "huge_picture": ("picture too large", "图片过大"),
    "image_target_without_visual_gen": (
        "an image target, but visual_gen is false",
        "有图像目标，但 visual_gen 为 false",
    ),
    "image_without_visual_und": (
        "a picture to look at, but visual_und is false",
        "有要看的图片，但 visual_und 为 false",
    ),
    "missing_field": ("a field is missing", "缺少字段"),
    "missing_picture": ("no such picture file", "找不到图片文件"),
    "no_format": ("fits no format", "不符合任何格式"),
    "no_target": ("nothing to learn: context alone", "没有训练目标，只有上下文"),
    "not_a_file": ("not a regular file", "不是普通文件"),
    "not_a_picture": ("not a picture", "不是图片"),
    "not_an_object": ("not a JSON object", "不是 JSON 对象"),
    "nothing_to_learn": ("nothing to learn", "没有可学习的内容"),
    "outside_root": ("picture outside data_root", "图片在 data_root 之外"),
    "too_long": (
        "longer than max_sequence_length before any text target",
        "图片与上下文已超过 max_sequence_length",
    ),
    "unequal_image_count": ("tags and images differ in number", "<image> 标签与图片数量不一致"),
    "unexpected_field": ("a field that does not belong there", "多余的字段"),
    "unknown_role": ("unknown role", "未知的 role"),
    "unknown_type": ("unknown type", "未知的 type"),
    "unreadable_file": ("data file cannot be read", "数据文件无法读取"),
    "unreadable_picture": ("picture file cannot be read", "图片文件无法读取"),
    "unsupported_picture": ("kind of picture not supported", "不支持的图片类型"),
    "wrong_type": ("value of a wrong type", "字段类型错误"),
}


class Words:
    """The texts of one language: ``words("bad", n=3)``."""

    def __init__(self, language: str):
        assert language in LANGUAGES
        self.language, self._column = language, LANGUAGES.index(language)

    def __call__(self, key: str, **values: Any) -> str:
        text = WORDS[key][self._column]
        return text.format(**values) if values else text

    def of_code(self, code: str) -> str:
        """What a problem's code means; empty for one that is not in the table."""
        return CODES[code][self._column] if code in CODES else ""
