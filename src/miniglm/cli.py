"""The command line: one verb a stage. Parsing and printing, no work; nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from miniglm import __version__
from miniglm.distributed import launch
from miniglm.errors import MiniGLMError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miniglm.lookup import Answerer
    from miniglm.pipeline import Run
    from miniglm.qa.formats import Example
    from miniglm.sampling import SamplingSettings

# No telemetry from any library that a verb may load.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
# numpy multiplies small matrices only (torch has its own threads): a second thread would mostly wait, on the core of
# whoever else works (a look-up took 55 ms of CPU time in place of 24).
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

LOCAL = r"http://(localhost|127(\.\d+){3}|\[::1\])(:\d+)?(/|$)"
"""Addresses on this machine."""

app = typer.Typer(
    help="把书变成会回答问题的小模型：miniglm demo 一条命令从《三国演义》训练出一个，然后和它聊天。",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
corpus_app = typer.Typer(help="书：目录、取书、检查文件。", no_args_is_help=True)
app.add_typer(corpus_app, name="corpus")
qa_app = typer.Typer(help="问答：出题、清理、人工过目、查泄漏、分训练和验证。", no_args_is_help=True)
app.add_typer(qa_app, name="qa")

Out = Annotated[Path, typer.Option("--out", help="运行目录，所有结果都在里面")]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="配方文件（TOML）；不给就用默认配方或运行目录里已有的")
]
Minutes = Annotated[float | None, typer.Option("--minutes", help="总共训练多少分钟；模型大小和步数由此推出")]
BookOption = Annotated[list[str] | None, typer.Option("--book", help="书：文件、目录、网址或书名，可给多次")]
TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", help="大语料：txt、jsonl、parquet 文件、目录，或 hf:数据集；可给多次"),
]
QAOption = Annotated[list[str] | None, typer.Option("--qa", help="问答文件（jsonl、json、csv），可给多次")]
Device = Annotated[str | None, typer.Option("--device", help="auto、cpu、cuda 或 mps")]
Encoding = Annotated[str | None, typer.Option("--encoding", help="书的文字编码，如 gb18030；不给就自动识别")]
Simplify = Annotated[bool | None, typer.Option("--simplify/--no-simplify", help="繁体转成简体")]
AllowBad = Annotated[bool, typer.Option("--allow-bad-lines", help="问答里用不了的行超过 1% 也继续")]
Shard = Annotated[bool, typer.Option("--shard", help="几个进程一起训练时，每个只放模型的一份（FSDP2）")]
RunArgument = Annotated[Path, typer.Argument(help="运行目录或模型目录", metavar="RUN")]
MaxTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="每次最多生成多少个 token")]
Temperature = Annotated[float, typer.Option(help="温度；0 是每步取最可能的")]
TopK = Annotated[int, typer.Option(help="只从最可能的 k 个里选；0 不限")]
TopP = Annotated[float, typer.Option(help="只从概率之和到 p 为止的里选")]
Penalty = Annotated[float, typer.Option(help="重复惩罚；1 是没有")]
Seed = Annotated[int, typer.Option(help="随机种子")]


def _open(
    out: Path,
    recipe: Path | None,
    minutes: float | None = None,
    book: list[str] | None = None,
    qa: list[str] | None = None,
    device: str | None = None,
    encoding: str | None = None,
    simplify: bool | None = None,
    allow_bad: bool = False,
    offline: bool = False,
    tokenizer: str | None = None,
    text: list[str] | None = None,
    look_up_text: bool = False,
    shard: bool = False,
) -> Run:
    from miniglm.pipeline import Run, open_offline
    from miniglm.recipe import load_recipe

    if minutes is not None and not 0 < minutes < 1e6:
        raise MiniGLMError(f"--minutes 是 {minutes:g}，应大于 0", fix="例如 --minutes 10")
    overrides: dict[str, Any] = {
        "run.minutes": minutes,
        "run.device": device,
        "corpus.encoding": encoding,
        "corpus.simplify": simplify,
        "qa.allow_bad_lines": allow_bad or None,
        "tokenizer.kind": tokenizer,
        "corpus.books": book or None,
        "corpus.texts": text or None,
        "corpus.look_up_texts": (bool(text) and look_up_text) or None,
        "qa.train": qa or None,
    }
    if qa:
        overrides["qa.validation"] = []
    elif book:
        overrides |= {"qa.train": [], "qa.validation": []}  # the shipped questions are about another book
    if offline and qa:
        raise MiniGLMError("--offline 和 --qa 不能一起用", fix="有了问答就不必用规则出题，去掉其中一个")
    overrides = {key: value for key, value in overrides.items() if value is not None}
    saved = out / "recipe.toml"
    base = recipe or (saved if saved.exists() else None)
    if launch.size() > 1:
        from miniglm.distributed.team import join, on_first

        join()
        return Run(out, on_first(lambda: load_recipe(base, overrides)), shard=shard)
    loaded = load_recipe(base, overrides)
    return open_offline(out, loaded) if offline else Run(out, loaded, shard=shard)


@app.command()
def prepare(
    out: Out = Path("runs/default"),
    recipe: RecipeFile = None,
    book: BookOption = None,
    qa: QAOption = None,
    encoding: Encoding = None,
    simplify: Simplify = None,
    allow_bad_lines: AllowBad = False,
    text: TextOption = None,
) -> None:
    """取书、清洗、分出验证部分，读问答。"""
    from miniglm import pipeline

    pipeline.prepare(_open(out, recipe, None, book, qa, None, encoding, simplify, allow_bad_lines, text=text))


@app.command()
def tokenize(
    out: Out = Path("runs/default"),
    recipe: RecipeFile = None,
    book: BookOption = None,
    qa: QAOption = None,
    text: TextOption = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="几个进程一起给大语料分词；不给就每个核一个")
    ] = None,
) -> None:
    """训练分词器，把文字变成 token。"""
    from miniglm import pipeline

    pipeline.tokenize(_open(out, recipe, None, book, qa, text=text), processes)


@app.command()
def pretrain(
    out: Out = Path("runs/default"),
    recipe: RecipeFile = None,
    minutes: Minutes = None,
    book: BookOption = None,
    qa: QAOption = None,
    device: Device = None,
    text: TextOption = None,
    shard: Shard = False,
) -> None:
    """预训练：让模型学会书里的文字。没做的前几步会先做。"""
    from miniglm import pipeline

    pipeline.pretrain(_open(out, recipe, minutes, book, qa, device, text=text, shard=shard))


@app.command()
def finetune(
    out: Out = Path("runs/default"),
    recipe: RecipeFile = None,
    minutes: Minutes = None,
    book: BookOption = None,
    qa: QAOption = None,
    device: Device = None,
    init: Annotated[
        str | None,
        typer.Option("--init", help="从这个 GLM 开始，而不是自己预训练的：目录、Hub 上的名字或 modelscope:名字"),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="只训练低秩的附加权重（LoRA），最后合并")] = False,
    dtype: Annotated[str, typer.Option("--dtype", help="--init 的模型用 float32 还是 bfloat16")] = "float32",
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="反向时重算每一层，省内存，慢三分之一")
    ] = False,
    shard: Shard = False,
) -> None:
    """微调：让模型学会回答问题。没做的前几步会先做。"""
    from miniglm.interop.adapt import Start, finetune_from, read_start

    if init is None:
        if lora or checkpointing or dtype != "float32":
            raise MiniGLMError("--lora、--dtype、--checkpointing 只和 --init 一起用")
        start = read_start(out)  # a run that began so goes on so
    else:
        from miniglm.interop.hub import find_model_to_start_from

        start = Start(str(find_model_to_start_from(init)), lora, dtype, checkpointing)
    own = None if start is None else start.folder
    run = _open(out, recipe, minutes, book, qa, device, tokenizer=own, shard=shard)
    if start is not None:
        finetune_from(run, start)
        return
    from miniglm import pipeline

    pipeline.finetune(run)


@app.command()
def index(
    out: Out = Path("runs/default"),
    recipe: RecipeFile = None,
    minutes: Minutes = None,
    book: BookOption = None,
    qa: QAOption = None,
    text: TextOption = None,
) -> None:
    """建立查找用的索引：回答时到书里找依据，给了 --text 也到那些文字里找。不需要训练好的模型。"""
    from miniglm import pipeline

    pipeline.index(_open(out, recipe, minutes, book, qa, text=text, look_up_text=True))


def _settings(
    tokenizer: Any, max_new_tokens: int, temperature: float, top_k: int, top_p: float, penalty: float, seed: int
) -> SamplingSettings:
    from miniglm.sampling import SamplingSettings

    try:
        return SamplingSettings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty,
            seed=seed,
            stop_ids=tokenizer.stop_ids,
        )
    except ValueError as error:
        raise MiniGLMError(f"采样设置不对：{error}") from None


def _load(run: Path, device: str | None, *, pretrained: bool = False) -> Any:
    from miniglm.checkpoint import load_model
    from miniglm.locate import find_model, pick_device

    return load_model(find_model(run, pretrained=pretrained), device=str(pick_device(device or "auto")))


@app.command()
def sample(
    run: RunArgument,
    start: Annotated[str, typer.Option("--start", help="开头的文字，或 FILE:文件（一行一个开头）")],
    num_samples: Annotated[int, typer.Option(min=1, help="每个开头续写几次")] = 1,
    max_new_tokens: MaxTokens = 300,
    temperature: Temperature = 0.8,
    top_k: TopK = 100,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 1337,
    evaluate: Annotated[
        bool, typer.Option("--eval", help="当作问题来回答，按旁边的 labels.txt 评分，直方图写进运行目录")
    ] = False,
    device: Device = None,
) -> None:
    """续写一段文字，不重复开头。"""
    if evaluate:
        if top_p != 1.0 or repetition_penalty != 1.0 or temperature <= 0:
            raise MiniGLMError("--eval 只用温度（大于 0）和 top-k 采样", fix="去掉 --top-p 和 --repetition-penalty")
        _sample_eval(run, start, temperature, top_k, seed, device)
        return
    from miniglm.chat import continue_text

    if start.startswith("FILE:"):
        path = Path(start.removeprefix("FILE:"))
        if not path.is_file():
            raise MiniGLMError("没有这个文件", path=path, fix="FILE: 后面写一个文本文件，一行一个开头")
        from miniglm.corpus.reading import read_lines

        prompts = read_lines(path)
    else:
        prompts = [start]
    if not all(prompts):
        raise MiniGLMError("--start 是空的", fix="给出开头的文字，或 FILE:文件")
    model, tokenizer = _load(run, device, pretrained=True)
    settings = _settings(tokenizer, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    from dataclasses import replace

    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    each = [replace(settings, seed=seed + i) for i in range(len(repeated))]
    for i, text in enumerate(continue_text(model, tokenizer, repeated, each)):
        if len(repeated) > 1:
            print(f"—— {repeated[i][:30]} ——")
        print(text)


def _sample_eval(run: Path, start: str, temperature: float, top_k: int, seed: int, device: str | None) -> None:
    path = Path(start.removeprefix("FILE:"))
    if not start.startswith("FILE:") or not path.is_file():
        raise MiniGLMError("--eval 要 --start FILE:文件，文件里一行一个问题", path=path)
    from miniglm.evaluation.evaluate import Settings, Subject, sample_and_score
    from miniglm.locate import find_model

    model, tokenizer = _load(run, device)
    subject = Subject(run.name, find_model(run), model, tokenizer)
    found = sample_and_score(subject, path, run, Settings(temperature=temperature, top_k=top_k, seed=seed))
    for row in found["rows"]:
        print(
            f"问：{row['question']}\n答：{row['answer']}\n（参考：{row['reference']}；ROUGE-L {row['rouge_l']:.2f}）\n"
        )
    for name, title in (("rouge_l", "ROUGE-L"), ("self_perplexity", "自困惑度（对自己抽样的答案，只说明有多肯定）")):
        if (value := found[name]) is not None:
            print(
                f"{title}：{value['count']} 个答案的平均 {value['mean']:.3f}，95% 区间 {value['low']:.3f}–{value['high']:.3f}"
            )
    print(f"直方图 {run / 'rouge_l.png'}、{run / 'perplexity.png'}，数字 {run / 'sample_eval.json'}")


ClosedBook = Annotated[bool, typer.Option("--closed-book", help="不查书，只凭模型的权重回答")]


def _say_unused(context: typer.Context) -> None:
    """One line about options that were given and that an answer from the book has no use for."""
    from miniglm.ui import say

    of_the_model = ("max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed", "turns", "device")
    # By name: which click the enumeration belongs to depends on typer's version.
    sources = {name: context.get_parameter_source(name) for name in of_the_model}
    given = [
        "--" + name.replace("_", "-") for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]
    if given:
        say(f"查书的回答用不着 {'、'.join(given)}；要由模型回答，加 --closed-book")


@app.command()
def ask(
    context: typer.Context,
    run: RunArgument,
    question: Annotated[str | None, typer.Argument(help="问题", metavar="问题")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", help="问题文件，任何一种问答格式，或一行一个问题的 txt")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="答案写到这个 jsonl；不给就打印")] = None,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 1337,
    closed_book: ClosedBook = False,
    device: Device = None,
) -> None:
    """问一个问题，或一个文件的问题。有索引就到书里查，带出处；没有，或加 --closed-book，就由模型回答，这时采样的选项才有用。"""
    if (question is None) == (file is None):
        raise MiniGLMError(
            "要么给一个问题，要么给 --file，不能都给或都不给", fix='例如 miniglm ask runs/demo "关羽字什么？"'
        )
    if question is not None and not question.strip():
        raise MiniGLMError("问题是空的")
    from miniglm.qa.formats import Example, Turn, read_examples, write_jsonl

    if file is not None:
        found = read_examples(file, need_answer=False, allow_bad=True)
        for bad in found.rejected:
            print(f"跳过 {bad.path} 第 {bad.line} 行：{bad.reason}", file=sys.stderr)
        questions = list(found.examples)
    else:
        questions = [Example(turns=(Turn(question or "", ""),))]
    from miniglm.lookup import answerer_of

    answerer = None if closed_book else answerer_of(run)
    if answerer is not None:
        _say_unused(context)
        _ask_book(answerer, questions, single=file is None, out=out)
        return
    from miniglm.chat import answer_questions

    model, tokenizer = _load(run, device)
    settings = _settings(tokenizer, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    if file is None:
        print(answer_questions(model, tokenizer, questions, settings)[0])
        return
    from miniglm.ui import count_bar, say

    with count_bar("回答", len(questions)) as bar:
        answers = answer_questions(model, tokenizer, questions, settings, progress=bar)
    rows = [
        dict(q.extra or {"question": q.question}) | {"prediction": a} for q, a in zip(questions, answers, strict=True)
    ]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_jsonl(out, rows)
        say(f"{len(rows)} 个答案写到 {out}")
    else:
        for q, a in zip(questions, answers, strict=True):
            print(f"问：{q.question}\n答：{a}\n")


def _ask_book(answerer: Answerer, questions: Sequence[Example], *, single: bool, out: Path | None) -> None:
    """Answers from the book: printed, or with all citations into a file."""
    from dataclasses import asdict

    from miniglm.lookup import with_sources
    from miniglm.lookup.measure import answer_all
    from miniglm.qa.formats import write_jsonl
    from miniglm.ui import count_bar, say

    if single:
        print(with_sources(answerer.answer(questions[0].question)))
        return
    with count_bar("查书", len(questions)) as bar:
        answers = answer_all(answerer, [q.question for q in questions], bar)
    if out is None:
        for q, a in zip(questions, answers, strict=True):
            print(f"问：{q.question}\n答：{with_sources(a)}\n")
        return
    rows = [
        dict(q.extra or {"question": q.question})
        | {"prediction": a.text, "refused": a.refused, "citations": [asdict(c) for c in a.citations]}
        for q, a in zip(questions, answers, strict=True)
    ]
    out.parent.mkdir(parents=True, exist_ok=True)
    write_jsonl(out, rows)
    say(f"{len(rows)} 个答案写到 {out}")


@app.command()
def chat(
    context: typer.Context,
    run: RunArgument,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = 1337,
    turns: Annotated[
        int, typer.Option("--turns", min=0, help="提问时带上前面几轮；自带的问答都是单轮，带上反而答不好")
    ] = 0,
    closed_book: ClosedBook = False,
    device: Device = None,
) -> None:
    """在终端里问答。有索引就到书里查，带出处；没有，或加 --closed-book，就和模型聊天，这时采样的选项和 --turns 才有用。"""
    from miniglm.chat import terminal_chat, terminal_lookup
    from miniglm.lookup import answerer_of

    answerer = None if closed_book else answerer_of(run)
    if answerer is not None:
        _say_unused(context)
        terminal_lookup(answerer)
        return
    model, tokenizer = _load(run, device)
    settings = _settings(tokenizer, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    terminal_chat(model, tokenizer, settings, remember=turns)


@app.command()
def serve(
    run: Annotated[
        Path | None, typer.Argument(help="运行目录或模型目录；有 --backend 时只为它的报告和例题", metavar="RUN")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="在哪个地址上提供服务；0.0.0.0 是对外开放")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="端口；0 是随便一个空着的")] = 7860,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", envvar="MINIGLM_API_KEY", help="API 和页面要这个 key；写在环境变量里，别的用户就看不到"
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", help="模型在这个 OpenAI 兼容的服务里，如 http://host:8000/v1；只开页面")
    ] = None,
    backend_key: Annotated[
        str | None, typer.Option("--backend-key", envvar="MINIGLM_BACKEND_KEY", help="那个服务的 API key")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option("--cors", help="允许这个网站的页面来请求，如 https://my.site，可给多次")
    ] = None,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="把收到的问题打印到 stderr；平时不记")] = False,
    device: Device = None,
) -> None:
    """开服务：聊天页面在 /，OpenAI 兼容的 API 在 /v1。"""
    from miniglm.serving import server

    server.run(
        run,
        host=host,
        port=port,
        api_key=api_key,
        backend=backend,
        backend_key=backend_key,
        cors=cors or (),
        log_prompts=log_prompts,
        device=device,
    )


def _serve_demo(run: Path, device: str | None) -> None:
    """The page, where it is installed; else the chat in the terminal, where there is one."""
    from miniglm.serving import server
    from miniglm.ui import say

    if server.missing():
        say('页面要装扩展 serve：pip install -e ".[serve]"')
        if sys.stdin.isatty():
            app(["chat", str(run), *(["--device", device] if device else [])], standalone_mode=False)
        return
    port = server.PORT if server.port_free("127.0.0.1", server.PORT) else 0
    server.run(run, port=port, open_browser=True, device=device)


@app.command()
def demo(
    minutes: Minutes = None,
    out: Out = Path("runs/demo"),
    no_serve: Annotated[bool, typer.Option("--no-serve", "--no-chat", help="训练完不打开页面")] = False,
    recipe: RecipeFile = None,
    book: BookOption = None,
    qa: QAOption = None,
    device: Device = None,
    encoding: Encoding = None,
    simplify: Simplify = None,
    allow_bad_lines: AllowBad = False,
    offline: Annotated[
        bool,
        typer.Option("--offline", help="没有问答也没有大模型可用时，按规则从书里出题；只是凑合，见 docs/synthesis.md"),
    ] = False,
) -> None:
    """从一本书到一个会回答的模型：取书、训练、报告成绩、打开聊天页面。中断后再运行会接着做。"""
    begun = time.monotonic()
    from miniglm import pipeline
    from miniglm.ui import say

    run = _open(out, recipe, minutes, book, qa, device, encoding, simplify, allow_bad_lines, offline)
    pipeline.demo(run, begun)
    for line in pipeline.report_lines(pipeline.read_report(out)):
        print(line)
    say(f"评测报告 {out / 'report' / 'report.html'}，损失曲线 {out / 'loss.png'}，模型 {out / 'model'}")
    if not no_serve:
        _serve_demo(out, device)


@app.command()
def evaluate(
    run: RunArgument,
    qa: Annotated[
        list[Path] | None, typer.Option("--qa", help="问这些问题，而不是运行自己的；任何一种问答格式")
    ] = None,
    text: Annotated[Path | None, typer.Option("--text", help="量这篇文字的比特/字，而不是小说的验证部分")] = None,
    split: Annotated[
        list[str] | None, typer.Option("--split", help="只评 val、unseen 或 train，可给多次；不给就都评，并排报告")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="每题答几次；多于一次就按温度抽样")] = 1,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="温度；不给时答一次取 0（最可能的），多次取 0.8")
    ] = None,
    top_k: TopK = 0,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="每一部分最多这么多题，均匀地取")] = None,
    seed: Seed = 1337,
    against: Annotated[Path | None, typer.Option("--against", help="与这个运行的报告比较", metavar="RUN")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="接着上次停下的评测")] = False,
    device: Device = None,
) -> None:
    """评测：分数、置信区间、与检索基线比较，写成报告（RUN/report）。"""
    from miniglm import pipeline
    from miniglm.evaluation.evaluate import Settings
    from miniglm.ui import say

    names = [pipeline.SPLIT_NAMES.get(name, "") for name in split or []]
    if not all(names) or (qa and len(names) > 1):
        found, expected = "、".join(split or []), "一个名字" if qa else "名字"
        raise MiniGLMError(f"--split 是 {found}，应为 val、unseen、train 中的{expected}")
    if temperature is None:
        temperature = 0.0 if samples == 1 else 0.8
    elif temperature == 0 and samples > 1:
        raise MiniGLMError("--temperature 0 每次的答案都一样，不必 --samples 多次", fix="例如 --temperature 0.8")
    try:
        report = pipeline.evaluate(
            run,
            qa=qa or [],
            text=text,
            splits=names,
            settings=Settings(samples=samples, temperature=temperature, top_k=top_k, seed=seed, limit=limit),
            earlier=against,
            resume=resume,
            device=device,
        )
    except KeyboardInterrupt:
        print("\n已停止，做完的题都留着；加 --resume 再运行就会接着做。", file=sys.stderr)
        raise typer.Exit(130) from None
    for line in pipeline.report_lines(report):
        print(line)
    say(f"报告 {run / 'report' / 'report.html'}，全部数字 {run / 'report' / 'report.json'}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="两个或更多做过评测的运行；后面的都和第一个比", metavar="RUN RUN…")
    ],
    out: Annotated[Path, typer.Option("--out", help="数字和图写到这个目录")] = Path("compare"),
) -> None:
    """比较几次运行：逐题的差和置信区间，一张表，一张图。"""
    if len(runs) < 2:
        raise MiniGLMError(f"只给了 {len(runs)} 个运行，至少要两个", fix="例如 miniglm compare runs/a runs/b")
    from rich.console import Console

    from miniglm.evaluation.compare import compare_reports, comparison_table, write_comparison
    from miniglm.files import keep_dated
    from miniglm.pipeline import read_report
    from miniglm.ui import say

    comparison = compare_reports([read_report(run) for run in runs], [str(run) for run in runs])
    keep_dated(out)
    write_comparison(comparison, out)
    Console().print(comparison_table(comparison))
    say(f"图 {out / 'compare.png'}，数字 {out / 'compare.json'}")


@app.command()
def export(
    run: RunArgument,
    format: Annotated[str, typer.Option("--format", help="gguf（llama.cpp、Ollama）或 onnx（手机、浏览器）")],
    type: Annotated[str, typer.Option("--type", help="gguf：f32、f16、q8_0、q4_0；onnx：f32、int8")] = "f32",
    out: Annotated[Path | None, typer.Option("--out", help="写到这个文件；不给就写在运行目录的 export/ 里")] = None,
) -> None:
    """导出成别的程序的格式。"""
    from miniglm.interop.export import export_model
    from miniglm.ui import say

    for path in export_model(run, format, type, out):
        say(f"写好 {path}（{path.stat().st_size / 1e6:.1f} MB）")


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="参考作业的 ckpt.pt", metavar="CKPT")],
    out: Annotated[Path, typer.Option("--out", help="模型写到这个目录")],
) -> None:
    """把参考作业的 ckpt.pt 转成模型目录，之后 sample、ask、evaluate 都能用。"""
    from miniglm.interop.gpt2 import convert_checkpoint
    from miniglm.ui import say

    config = convert_checkpoint(checkpoint, out)
    say(
        f"写好 {out}：{config.num_hidden_layers} 层，宽 {config.hidden_size}，{config.num_parameters / 1e6:.1f} 百万参数"
    )


@app.command()
def card(run: RunArgument) -> None:
    """写模型卡：README.md（Hub 的元数据、配方、数据、成绩、局限）和 ModelScope 的 configuration.json。"""
    from miniglm.interop.card import write_card
    from miniglm.ui import say

    say(f"写好 {write_card(run)}；怎样上传见 docs/interop.md")


@qa_app.command("check")
def qa_check(
    files: Annotated[
        list[Path], typer.Argument(help="第一个是训练的问答，其余是评测的；只有一个就看它每十题留一题会怎样")
    ],
    similarity: Annotated[float, typer.Option(min=0.1, max=1, help="相似度不低于它就算几乎相同的问题")] = 0.8,
    out: Annotated[Path | None, typer.Option("--out", help="全部结果写到这个 JSON 文件")] = None,
) -> None:
    """查泄漏：训练和评测里相同或几乎相同的问题、相同的答案、整句照抄的答案。"""
    import json

    from rich.console import Console

    from miniglm.evaluation.summary import leak_report, leak_table
    from miniglm.files import write_whole
    from miniglm.qa.formats import read_examples
    from miniglm.qa.leaks import split_every_tenth

    sets = {str(file): list(read_examples(file).examples) for file in files}
    train = sets.pop(str(files[0]))
    if not sets:
        halves = split_every_tenth(train)
        train, sets = halves.train, {f"{files[0]} 的每十题留一题": halves.validation}
    report = leak_report(train, sets, similarity=similarity, shown=None)
    console = Console()
    for part in leak_table(report):
        console.print(part)
    if out is not None:
        write_whole(out, json.dumps(report, ensure_ascii=False, indent=2) + "\n")


@qa_app.command("split")
def qa_split(
    file: Annotated[Path, typer.Argument(help="问答文件")],
    out: Annotated[Path, typer.Option("--out", help="train.jsonl、validation.jsonl、test.jsonl 写到这个目录")],
    shares: Annotated[str, typer.Option("--shares", help="训练、验证、测试各占多少")] = "0.8,0.1,0.1",
    seed: Seed = 1337,
    similarity: Annotated[float, typer.Option(min=0.1, max=1, help="相似度不低于它的问题分在同一边")] = 0.8,
    every_tenth: Annotated[
        bool, typer.Option("--every-tenth", help="参考作业的分法：每十题的第十题做验证。会泄漏，只为比较")
    ] = False,
) -> None:
    """分成训练、验证、测试；几乎相同的问题、相同的答案不会分在两边。"""
    from miniglm.qa.formats import read_examples, write_jsonl
    from miniglm.qa.leaks import split_every_tenth, split_groups

    try:
        first, second, third = map(float, shares.split(","))
        if min(first, second, third) < 0 or abs(first + second + third - 1) > 1e-6 or first == 0:
            raise ValueError
    except ValueError:
        raise MiniGLMError(
            f"--shares 是 {shares!r}，应为三个加起来是 1 的数，训练大于 0", fix="例如 0.8,0.1,0.1"
        ) from None
    read = read_examples(file)
    examples = list(read.examples)
    if every_tenth:
        parts = split_every_tenth(examples)
    else:
        parts = split_groups(examples, seed=seed, fractions=(first, second, third), similarity=similarity)
    made = {name: part for name in ("train", "validation", "test") if (part := getattr(parts, name))}
    for name in made:
        if (out / f"{name}.jsonl").exists():
            raise MiniGLMError("这个文件已经有了，不会覆盖", path=out / f"{name}.jsonl", fix="换一个 --out")
    for name, part in made.items():
        write_jsonl(out / f"{name}.jsonl", [read.row(e) for e in part])
        print(f"{out / name}.jsonl：{len(part)} 题")


def _budget(text: str | None) -> tuple[int | None, float | None]:
    """`--budget` as tokens or as money: 500000, 50万, 10元, $2."""
    if text is None:
        return None, None
    match = re.fullmatch(r"([¥￥$]?)\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s*(万|k|K|m|M)?\s*(元|美元|tokens?)?", text.strip())
    if not match or (match[1] and match[4]):
        raise MiniGLMError(f"--budget 是 {text!r}，应为 token 数或钱数", fix="例如 500000、50万、10元、$2")
    amount = float(match[2].replace(",", "")) * {"万": 1e4, "k": 1e3, "m": 1e6}.get((match[3] or "").lower(), 1)
    return (None, amount) if match[1] or match[4] in ("元", "美元") else (int(amount), None)


@qa_app.command("synthesize")
def qa_synthesize(
    books: Annotated[list[str], typer.Argument(help="书：文件、目录、网址或书名", metavar="BOOK…")],
    out: Annotated[Path, typer.Option("--out", help="问答写到这个 jsonl；中断后用同一个 --out 再运行就接着做")],
    provider: Annotated[
        str | None,
        typer.Option("--provider", help="zhipu、deepseek、qwen、moonshot、openai、ollama、vllm、llamacpp、miniglm"),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option("--base-url", help="OpenAI 形式的接口，代替 --provider 的地址")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", help="模型的名字，按服务商的写法")] = None,
    key_file: Annotated[
        Path | None, typer.Option("--key-file", help="只有密钥的文件；不给就读服务商的环境变量，见 docs/synthesis.md")
    ] = None,
    seeds: Annotated[
        Path | None, typer.Option("--seeds", help="作示例的问答，20 到 50 条；不给就用自带的三国问答")
    ] = None,
    passage: Annotated[int, typer.Option("--passage", min=100, max=8000, help="每次给多长的段落，字")] = 1000,
    facts: Annotated[int, typer.Option("--facts", min=1, max=20, help="每个段落要几个事实")] = 4,
    phrasings: Annotated[int, typer.Option("--phrasings", min=1, max=8, help="每个事实要几种问法")] = 3,
    check: Annotated[bool, typer.Option("--check", help="再让模型只看段落回答一遍，答不出要点的不要")] = False,
    at_once: Annotated[int, typer.Option("--at-once", min=1, max=256, help="同时发几个请求")] = 8,
    timeout: Annotated[float, typer.Option("--timeout", min=1, help="一次请求最多等多少秒")] = 180.0,
    budget: Annotated[
        str | None, typer.Option("--budget", help="到这么多就停：token 数（500000、50万）或钱（10元、$2，要有单价）")
    ] = None,
    price_in: Annotated[float | None, typer.Option("--price-in", min=0, help="每百万输入 token 的价钱")] = None,
    price_out: Annotated[float | None, typer.Option("--price-out", min=0, help="每百万输出 token 的价钱")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="不问，直接开始")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="不用大模型，按规则从书里出题；弱得多")] = False,
    encoding: Encoding = None,
    simplify: Simplify = None,
) -> None:
    """让大模型按书的段落出问答；每条都有原文为证，随时可停，接着做不会重问。"""
    from miniglm.corpus import load_books
    from miniglm.qa.formats import write_jsonl
    from miniglm.qa.offline import fact_rows, find_facts
    from miniglm.ui import say

    if offline:
        if out.exists():
            raise MiniGLMError("这个文件已经有了，不会覆盖", path=out, fix="换一个 --out")
        found = [fact for book in load_books(books, encoding=encoding, simplify=simplify) for fact in find_facts(book)]
        if not found:
            raise MiniGLMError("规则在书里找不到可问的事实", path="、".join(books))
        write_jsonl(out, (row for fact in found for row in fact_rows(fact)))
        say(f"{len(found):,} 个事实，每个几种问法，写到 {out}。这是按规则出的题，远不如大模型出的")
        return
    from miniglm.qa import synthesis
    from miniglm.qa.endpoint import OWN, PRESETS, Endpoint, read_key

    if provider is not None and provider not in PRESETS:
        raise MiniGLMError(f"--provider 是 {provider!r}，应为 {'、'.join(PRESETS)} 之一")
    if provider is None and base_url is None:
        raise MiniGLMError(
            "没有说用哪个大模型", fix="给出 --provider 或 --base-url，以及 --model；没有大模型可用就加 --offline"
        )
    if model is None:
        raise MiniGLMError("没有给出 --model", fix="写服务商文档里的模型名")
    tokens, money = _budget(budget)
    if (price_in is None) != (price_out is None):
        raise MiniGLMError("--price-in 和 --price-out 要一起给")
    price = None if price_in is None or price_out is None else synthesis.Price(price_in, price_out)
    if money is not None and price is None:
        raise MiniGLMError("--budget 是钱数，却没有单价", fix="加上 --price-in 和 --price-out（每百万 token 的价钱）")
    preset = PRESETS[provider] if provider else OWN
    key = read_key(preset, key_file)
    address = base_url or preset.base_url
    if key and address.startswith("http://") and not re.match(LOCAL, address):
        say(f"注意：{address} 不是 https，密钥会明文经过网络")
    settings = synthesis.Settings(model, passage, facts, phrasings, check)
    made = synthesis.Synthesis(
        load_books(books, encoding=encoding, simplify=simplify), synthesis.read_seeds(seeds), settings, out
    )
    endpoint = Endpoint(address, model, key, structure=preset.structure, timeout=timeout)
    _synthesize(made, endpoint, at_once, synthesis.Budget(tokens, money), price, yes)


def _synthesize(made: Any, endpoint: Any, at_once: int, budget: Any, price: Any, yes: bool) -> None:
    import asyncio

    from miniglm.qa.synthesis import Progress, rejected_file
    from miniglm.ui import described_bar, say

    todo, progress = len(made.todo()), made.progress
    if progress.done:
        say(f"接着做：{progress.done} 段已完成，{progress.accepted} 条问答")
    prompt, completion = made.estimate()
    cost = "" if price is None else f"，约 {price.cost(prompt, completion):.2f} 元（按给出的单价）"
    say(
        f"{todo} 个段落要问 {endpoint.model}（{endpoint.base_url}）：估计输入 {prompt:,}、输出 {completion:,} 个 token{cost}"
    )
    if todo and not yes:
        if not sys.stdin.isatty():
            raise MiniGLMError("开始之前要确认，这里却没有终端可以问", fix="看过上面的估计后加 --yes")
        if not typer.confirm("开始吗？"):
            raise typer.Exit(1)

    def described(p: Progress) -> str:
        spent = "" if price is None else f" · {price.cost(p.prompt_tokens, p.completion_tokens):.2f} 元"
        failed = f" · 失败 {p.failed}" if p.failed else ""
        return f"收 {p.accepted} · 弃 {p.rejected}{failed} · {p.tokens:,} token{spent}"

    async def go() -> str:
        try:
            with described_bar(progress.passages) as bar:
                result: str = await made.run(
                    endpoint,
                    at_once=at_once,
                    budget=budget,
                    price=price,
                    progress=lambda p: bar(p.done, described(p)),
                )
                return result
        finally:
            await endpoint.close()

    interrupted = False
    try:
        stopped = asyncio.run(go())
    except KeyboardInterrupt:
        interrupted, stopped = True, ""
    for reason, count in progress.reasons.most_common():
        print(f"弃 {count:6,} 条：{reason}")
    for reason, count in progress.failures.most_common(5):
        print(f"失败 {count} 段：{reason}", file=sys.stderr)
    say(
        f"{progress.done}/{progress.passages} 段，{progress.accepted:,} 条问答写到 {made.out}，"
        f"{progress.rejected:,} 条没有收（{rejected_file(made.out)}）；{described(progress)}"
    )
    if interrupted:
        print("已停止，做完的都留着，再运行同一条命令就会接着做。", file=sys.stderr)
        raise typer.Exit(130)
    if stopped:
        raise MiniGLMError(f"停下了：{stopped}", fix="做完的都留着；解决后再运行同一条命令就会接着做")
    if progress.done < progress.passages:
        raise MiniGLMError(
            f"有 {progress.passages - progress.done} 个段落没有做成", fix="再运行同一条命令会只问这些段落"
        )


@qa_app.command("curate")
def qa_curate(
    file: Annotated[Path, typer.Argument(help="问答文件，任何一种格式")],
    out: Annotated[Path, typer.Option("--out", help="留下的写到这个 jsonl；去掉的连同原因写到旁边的 .rejected.jsonl")],
    book: Annotated[list[str] | None, typer.Option("--book", help="书；给了就查证据是不是原文，可给多次")] = None,
    per_chapter: Annotated[int | None, typer.Option("--per-chapter", min=1, help="每章最多留多少条，均匀地留")] = None,
    similarity: Annotated[float, typer.Option(min=0.1, max=1, help="相似度不低于它就算几乎相同")] = 0.8,
    novelty: Annotated[
        float | None,
        typer.Option("--novelty", min=0.1, max=1, help="与留下的别的问题 ROUGE-L 达到它的不要；self-instruct 用 0.7"),
    ] = None,
    encoding: Encoding = None,
    simplify: Simplify = None,
) -> None:
    """清理：重复、矛盾、太长太短、语言不对、泄露要点、证据不是原文；什么也不删，去掉的另存并写明原因。"""
    from collections import Counter

    from rich.console import Console
    from rich.table import Table

    from miniglm.qa.curation import Criteria, chapter_counts, curate
    from miniglm.qa.formats import read_examples, write_jsonl
    from miniglm.qa.synthesis import rejected_file
    from miniglm.ui import count_bar, say

    dropped = rejected_file(out)
    for path in (out, dropped):
        if path.exists():
            raise MiniGLMError("这个文件已经有了，不会覆盖", path=path, fix="换一个 --out")
    read = read_examples(file, allow_bad=True)
    text = None
    if book:
        from miniglm.corpus import load_books

        books = load_books(book, encoding=encoding, simplify=simplify)
        text = "\n".join(p.text for each in books for p in each.paragraphs)
    examples = list(read.examples)
    with count_bar("比较", len(examples)) as bar:
        faults = curate(examples, Criteria(similarity, per_chapter, novelty), text, bar)
        bar(len(examples))
    rows = [read.row(e) for e in examples]
    rejected = [{"reason": "读不出来", "line": bad.line, "detail": bad.reason} for bad in read.rejected]
    for number, fault in sorted(faults.items()):
        other = {} if fault.other is None else {"other": examples[fault.other].question}
        rejected.append({"reason": fault.reason} | other | rows[number])
    write_jsonl(out, (row for number, row in enumerate(rows) if number not in faults))
    write_jsonl(dropped, rejected)
    table = Table("去掉的原因", "条数", "例子")
    for reason, count in Counter(str(row["reason"]) for row in rejected).most_common():
        example = next((examples[n] for n, fault in faults.items() if fault.reason == reason), None)
        table.add_row(reason, f"{count:,}", "" if example is None else f"{example.question} {example.answer}"[:60])
    table.add_row("留下", f"{len(examples) - len(faults):,}", "")
    Console().print(table)
    chapters = chapter_counts([e for n, e in enumerate(examples) if n not in faults])
    if len(chapters) > 1:
        sizes = sorted(chapters.values())
        say(f"{len(chapters)} 章，每章 {sizes[0]} 到 {sizes[-1]} 条，中位数 {sizes[len(sizes) // 2]}")
    say(f"留下的在 {out}，去掉的在 {dropped}")


@qa_app.command("review")
def qa_review(
    file: Annotated[Path, typer.Argument(help="问答文件，任何一种格式；它本身不会改动")],
    out: Annotated[
        Path | None, typer.Option("--out", help="看过的问答写到这里；不给就是旁边的 .reviewed.jsonl")
    ] = None,
    book: Annotated[list[str] | None, typer.Option("--book", help="书；给了就显示证据前后的原文，可给多次")] = None,
    port: Annotated[int | None, typer.Option("--port", min=1, max=65535, help="端口；不给就找一个空的")] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="不自动打开浏览器")] = False,
    encoding: Encoding = None,
    simplify: Simplify = None,
) -> None:
    """在本机的网页里逐条看：原文和证据、问答，用键盘保留、修改或弃掉；每按一次都存下。"""
    from miniglm.qa.review import Review, decisions_file
    from miniglm.qa.review_page import launch_page
    from miniglm.ui import say

    books = []
    if book:
        from miniglm.corpus import load_books

        books = load_books(book, encoding=encoding, simplify=simplify)
    target = out or file.with_name(f"{file.stem}.reviewed.jsonl")
    if target.resolve() == file.resolve():
        raise MiniGLMError("--out 是问答文件本身，它不会改动", path=target, fix="换一个 --out")
    review = Review(file, books)
    page = launch_page(review, target, port=port, browser=not no_browser)
    say(f"在浏览器里打开 {page.local_url}；决定都记在 {decisions_file(file)}；按 Ctrl-C 结束并写出")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print(file=sys.stderr)
    finally:
        page.close(verbose=False)
        count = review.write(target)
        review.close()
        say(f"{count} 条写到 {target}，{len(review.examples) - len(review.decisions)} 条还没有看")


@corpus_app.command("list")
def corpus_list() -> None:
    """列出书目里的书。"""
    from miniglm.corpus.catalog import CATALOG

    for entry in CATALOG:
        print(f"{entry.name:10} 《{entry.title}》  {entry.url}")


@corpus_app.command("get")
def corpus_get(name: Annotated[str, typer.Argument(help="书名，见 corpus list")]) -> None:
    """把书目里的一本书取到缓存，打印它的位置。"""
    from miniglm.corpus import catalog
    from miniglm.ui import download_bar

    entry = catalog.find(name)
    if entry is None:
        known = "、".join(e.name for e in catalog.CATALOG)
        raise MiniGLMError(f"书目里没有 {name!r}", fix=f"有 {known}")
    with download_bar(entry.title) as progress:
        path = catalog.fetch(entry, progress=progress)
    print(path)


@corpus_app.command("inspect")
def corpus_inspect(
    files: Annotated[list[str], typer.Argument(help="文件、目录、网址或书名")],
    encoding: Encoding = None,
    simplify: Simplify = None,
) -> None:
    """检查书：编码、字数、段落、章节、清洗掉了什么、一段摘录。"""
    from rich.console import Console
    from rich.table import Table

    from miniglm.corpus import load_books

    table = Table("书", "编码", "字数", "段落", "章节")
    for wide in ("清洗掉", "摘录"):  # Chinese has no spaces to break at: fold, or a narrow terminal shows an ellipsis
        table.add_column(wide, overflow="fold")
    for book in load_books(files, encoding=encoding, simplify=simplify):
        removed = "\n".join(f"{rule} {what.count} 处 {what.characters} 字" for rule, what in book.removed.items())
        excerpt = max((p.text for p in book.paragraphs[:20]), key=len)[:60]
        table.add_row(
            book.title,
            book.encoding,
            f"{book.characters:,}",
            f"{len(book.paragraphs):,}",
            str(len(book.chapters)),
            removed or "无",
            excerpt,
        )
    Console().print(table)


TOGETHER = ("pretrain", "finetune")
"""The verbs that several processes do together."""


@app.callback(invoke_without_command=True)
def _version(context: typer.Context, version: Annotated[bool, typer.Option("--version", help="版本")] = False) -> None:
    if version:
        print(f"miniglm {__version__}")
        raise typer.Exit
    if launch.size() > 1 and context.invoked_subcommand not in TOGETHER:
        raise MiniGLMError(
            f"torchrun 只用于 {'、'.join(TOGETHER)}，不能用于 {context.invoked_subcommand}", fix="这一步直接用 miniglm"
        )


def main() -> None:
    """Entry point: a user's fault is one line on stderr and exit code 1; a stop by Ctrl-C is exit code 130, by SIGTERM
    143, whatever was going on."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console may be set to an encoding without Chinese
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    stopped = signal.SIGINT

    def terminate(number: int, frame: object) -> None:
        """SIGTERM outside of training is a Ctrl-C with another exit code: what is half written is cleared away."""
        nonlocal stopped
        stopped = signal.SIGTERM
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, terminate)
    try:
        _run()
    except KeyboardInterrupt:
        pass
    except SystemExit as end:
        if end.code != 130:
            raise
    else:
        return
    sys.exit(128 + stopped)


def _fail(error: MiniGLMError) -> None:
    if launch.size() == 1:
        print(f"错误：{error}", file=sys.stderr)
    else:
        from miniglm.distributed.team import is_first_to_fail

        if is_first_to_fail():  # the others fail because of it, or as it does
            print(f"错误（进程 {launch.rank()}）：{error}", file=sys.stderr)
    sys.exit(1)


def _run() -> None:
    try:
        app()
    except MiniGLMError as error:
        _fail(error)
    except BrokenPipeError:  # the reader of our output has gone (miniglm … | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # Not imported above: only the training verbs load torch.
        if type(error).__name__ != "Interrupted":
            if launch.size() > 1:
                from miniglm.distributed.team import lost

                if gone := lost(error):
                    _fail(gone)
            raise
        if launch.is_first():
            print("已保存，再运行同一条命令就会接着做。", file=sys.stderr)
        sys.exit(128 + getattr(error, "signal", signal.SIGINT))


if __name__ == "__main__":
    main()
